"""The models: a pre-norm decoder over bytes with one setting per variant.

Shapes: B batch, T queries or time, S keys, C width, H heads, D head size, V vocabulary, N = B T positions, A layers
whose loss counts, K targets per position. Queries, keys and values are (B, H, T, D) inside attention.
A setting that cannot be is a ValueError with one sentence.
"""
import importlib
import math
import re
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import kernels
from kernels import GLU, activate, exactly, expect, plain_rms_norm, readable
from nanolab.cache import Cache, KVCache, Memory
from nanolab.settings import as_bytes, check_fields

# What a word of `mixer` and of `ff` builds, a function of (config, layer), as "module:name": a variant of models/ is
# imported when a setting asks for it.
MIXERS = {
    "full": "model:Attention",
    "window": "model:windowed",
    "strided": "models.sparse:strided",
    "fixed": "models.sparse:fixed",
    "diff": "models.differential:Differential",
    "mla": "models.latent:Latent",
    "xl": "models.memory:TransformerXL",
    "compressive": "models.memory:Compressive",
    "mamba": "models.recurrent:Mamba",
    "mingru": "models.recurrent:MinGRU",
}
FEED_FORWARDS = {"mlp": "model:FeedForward", "low_rank": "models.low_rank:LowRank",
                 "moe": "models.experts:MixtureOfExperts"}
RECURRENT = ("mamba", "mingru")  # they know order by themselves, and have no keys
CARRY = ("xl", "compressive", *RECURRENT)  # one segment leaves something to the next


def variant(place):
    """What a "module:name" of the tables above names."""
    module, name = place.split(":")
    return globals()[name] if module == "model" else getattr(importlib.import_module(module), name)


def repeat_words(words, n_layer, allowed, name):
    """'a,b,b' repeated over the layers: a tuple of n_layer words. Raises ValueError for a word that is not allowed."""
    kinds = [word.strip() for word in words.split(",")]
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"{name} has {kind!r}, but can be {', '.join(allowed)}, or several with commas")
    return tuple(kinds[layer % len(kinds)] for layer in range(n_layer))


@dataclass
class TransformerConfig:
    """Every setting of a Transformer. Raises ValueError with one sentence where settings cannot go together.

    A comment may begin with what is allowed, as in a script; the scripts that name this class have these settings too.
    """

    vocab_size: int = 256
    n_layer: int = 12              # [>= 1] transformer blocks
    n_head: int = 8                # [>= 1] attention heads
    n_kv_head: int = None          # [none, >= 1] key and value heads, each for a group of heads (GQA); none: n_head
    head_dim: int = None           # [none, >= 1] width of a head; none: n_embd / n_head
    n_embd: int = 512              # [>= 1] width
    block_size: int = 512          # [>= 1] context; at 1 queries and keys have nothing to choose from
    dropout: float = 0.0           # [>= 0.0, < 1.0] of embeddings, attention probabilities and branch outputs
    norm: str = "layer"            # [layer, rms, dyt] normalisation, before each branch; dyt: tanh instead (see Norm)
    norm_gain: bool = True         # learned gain in the norms
    norm_eps: float = None         # [none, > 0.0] in the root of a norm (dyt has none); none: layer 1e-5, rms 1e-6
    norm_after: bool = False       # norms stand after the branches, not before: x + norm(branch(x)) (OLMo 2)
    bias: bool = True              # [qkv] of linear layers, LayerNorm, dyt (no RMSNorm); qkv: of q, k and v alone
    # Mixers
    mixer: str = "full"            # words of MIXERS, repeated over the layers: "mamba,mamba,full"
    window: int = 128              # [>= 1, with mixer window] positions that a layer sees
    sparse_stride: int = 16        # [>= 2, with mixer strided/fixed] a head sees so many neighbours, one every so many
    sparse_summary: int = 4        # [>= 1, with mixer fixed] places at the end of a block that all later ones see
    kv_rank: int = None            # [none, >= 2, with mixer mla] latent for keys and values; none: 2 head_dim
    q_rank: int = None             # [none, >= 2, with mixer mla] queries through so many dimensions; none: directly
    rope_dim: int = None           # [none, >= 2, with mixer mla] width of the shared key that turns; none: head_dim / 2
    memory_length: int = None      # [none, >= 1, with mixer xl/compressive] before the segment; none: block_size
    compressed_length: int = None  # [none, >= 1, with mixer compressive] states; none: block_size / compression_rate
    compression_rate: int = 4      # [>= 1, with mixer compressive] positions in one compressed state
    compression: str = "conv"      # [conv, mean, max, with mixer compressive] how
    compression_weight: float = 1.0  # [>= 0.0, with compression conv] of attention reconstruction, all it learns from
    state_dim: int = 16            # [>= 1, <= 4096, with mixer mamba] states per feature
    conv_width: int = 4            # [>= 1, <= 1024, with mixer mamba] positions that the convolution sees
    expand: float = 2.0            # [> 0.0, with mixer mamba/mingru] inner width over n_embd
    short_conv: int = 0            # [>= 0, <= 1024] width of a causal convolution before every mixer; 0: none
    # Feed-forwards
    ff: str = "mlp"                # words of FEED_FORWARDS, or "none", repeated over the layers
    ff_mult: float = 4.0           # [> 0.0] width over n_embd; gated: 2/3 of it (a multiple of 8): equal parameters
    ff_width: int = None           # [none, >= 1] width of the hidden layer itself; none: by ff_mult
    activation: str = "gelu"       # [gelu, gelu_tanh, relu, relu2, silu, solu, glu, bilinear, reglu, geglu, swiglu]
    ff_rank: int = None            # [none, >= 1, with ff low_rank] of both matrices; none: n_embd / 4
    n_expert: int = 8              # [>= 1, with ff moe] experts, which share the width; one alone needs no router
    expert_width: int = None       # [none, >= 1, with ff moe] of an expert's hidden layer; none: ff_width / n_expert
    n_shared_expert: int = 0       # [>= 0, with ff moe] of those, how many serve every position
    expert_top_k: int = 2          # [>= 1, with ff moe] of the others, how many a position chooses
    expert_groups: int = 1         # [>= 1, with ff moe] these others stand in so many groups (DeepSeek-V3)
    expert_top_groups: int = None  # [none, >= 1, with ff moe] in how many a position finds all its own; none: all
    expert_balance: str = "loss"   # [loss, bias, none, with ff moe] load-balance loss, or biases moved after every step
    balance_weight: float = 0.01   # [>= 0.0, with expert_balance loss] of the load-balance loss
    balance_rate: float = 0.001    # [>= 0.0, with expert_balance bias] step of the biases
    shorten: int = 1               # [>= 1] above 1 a Pyramid: the middle layers see one vector for so many positions
    # Documents
    documents: str = "none"        # [none, mask, reset] mask: no layer sees another document; reset: positions restart
    document_end: str = "</page>\\n"  # of documents, and of batching documents: its last bytes, \n as in Python
    # Positions
    positions: str = "learned"     # [learned, learned_per_layer, rope, alibi, relative, none] where a position stands
    rope_base: float = 10000.0     # [> 1.0, with positions rope] longest wavelength of rope over 2 pi
    partial_rotary: float = 1.0    # [> 0.0, <= 1.0, with positions rope] of a head's features, how many turn (GPT-NeoX)
    nope_interval: int = None      # [none, >= 2, with positions rope] of so many layers the last has no rope (SmolLM3)
    rope_scaling: str = "none"     # [none, linear, ntk, yarn, llama3] how rope is stretched to rope_factor times
    rope_factor: float = 1.0       # [>= 1.0] extend_block_size multiplies it
    rope_original: int = None      # [none, >= 1] the context before it was stretched; none: block_size / rope_factor
    rope_ramp: str = "turns"       # [turns, index, with rope_scaling yarn] by turns (paper) or index (published code)
    rope_mscale: float = 1.0       # [>= 0.0, with rope_scaling yarn] q, k grow by 0.1 rope_mscale ln(rope_factor) + 1
    rope_mscale_all_dim: float = 1.0  # [>= 0.0, with mixer mla] yarn: of what does not turn; 0: it does not grow
    # Residual stream, initialisation
    residual_scale: float | str = 1.0  # [> 0.0, depth, rezero, layerscale] of every branch; depth: 1 / sqrt(2 n_layer)
    parallel_residual: bool = False  # [shared] both branches read one stream (GPT-NeoX); shared: by one norm (Phi)
    init: str = "gpt2"             # [gpt2, normal, xavier, tfixup, truncated, zero] see `initialise`
    parametrisation: str = "standard"  # [standard, mup] mup: rates found at mup_base_width hold at every width
    mup_base_width: int = 96       # [>= 1, with parametrisation mup] n_embd at which all is as with standard
    mup_base_head_dim: int = None  # [none, >= 1, with parametrisation mup] head_dim there; none: as many heads as here
    qk_norm: bool = False          # [full] RMSNorm without parameters on queries and keys, per head; full: of all
    qk_gain: bool = False          # [with qk_norm] learned gains of both, of each layer (Qwen3)
    qk_scale: bool = False         # [with qk_norm] learned scale of each layer's scores in place of head_dim^-0.5
    score_softcap: float = None    # [none, > 0.0] attention's scores become cap tanh(scores / cap) (Gemma 2: 50)
    softmax_plus_one: bool = False # 1 more in the denominator of attention's softmax (Miller 2023): it may see nothing
    value_residual: bool = False   # values mixed with the first layer's (Zhou et al. 2024), by a learned share a layer
    # Classifiers, losses
    tie_weights: bool = False      # the classifier is the embedding
    n_targets: int = 1             # [>= 1, <= 256] bytes predicted ahead, weights 1, 1/2, 1/4, ...
    target_heads: str = "own"      # [own, shared] shared: one classifier, later targets through an own C x C matrix
    layer_heads: str = "own"       # [own, shared] classifiers of every layer whose loss counts, or the last layer's
    head_bias: bool = False        # bias of the classifiers
    output: str = "softmax"        # [softmax, stablemax] stablemax (Prieto et al. 2025) before every softmax
    logit_softcap: float = None    # [none, > 0.0] classifiers say cap tanh(logits / cap) (Gemma 2: 30)
    intermediate_losses: bool = False  # layers predict too, until a fraction of training (see active_layers)
    mtp_depth: int = 0             # [>= 0, <= 64] modules of multi-token prediction (DeepSeek-V3), a layer each
    mtp_weight: float = 0.3        # [>= 0.0, with mtp_depth] of the mean of their losses
    # Adapters of a base that stays as it is (LoRA)
    lora_rank: int = 0             # [>= 0] of the product beside a frozen matrix, which alone is trained; 0: none
    lora_on: str = "attention"     # [attention, all, with lora_rank] whose matrices; all: feed-forwards' too
    lora_alpha: float = None       # [none, > 0.0, with lora_rank] products times lora_alpha / lora_rank; none: times 1
    # How it is computed
    attention: str = "auto"        # [auto, sdpa, manual] auto: by hand to train in bfloat16 on a CPU, up to 1,023 bytes
    kernels: str = "torch"         # [torch, triton] what kernels.use was told: formulas, or the fused operations
    checkpoint_activations: bool = False  # compute layers again in the backward pass: less memory, more time

    # Fields that may be others on resume: they make no shape, of the weights or of the state beside them.
    FREE = ("dropout", "documents", "document_end", "compression_weight", "balance_weight", "balance_rate", "init",
            "mtp_weight", "attention", "kernels", "checkpoint_activations")

    @classmethod
    def shape(cls):
        """Names of the fields that make a shape: on resume the checkpoint's hold."""
        return tuple(f.name for f in fields(cls) if f.name not in cls.FREE)

    @classmethod
    def from_settings(cls, settings):
        """Picks the fields by name from a dict of settings; other names are ignored."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    def __post_init__(self):
        check_fields(self)
        expect(self.vocab_size >= 1, f"vocab_size is {self.vocab_size}, but must be at least 1")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            expect(not self.n_embd % self.n_head,
                   f"n_head {self.n_head} does not divide n_embd {self.n_embd}: set head_dim too")
            self.head_dim = self.n_embd // self.n_head
        expect(not self.n_head % self.n_kv_head, f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        derived = dict(memory_length=self.block_size, expert_top_groups=self.expert_groups, kv_rank=2 * self.head_dim,
                       ff_rank=max(1, self.n_embd // 4),
                       compressed_length=max(1, self.block_size // self.compression_rate),
                       rope_dim=max(2, 2 * (self.head_dim // 4)), lora_alpha=float(self.lora_rank) or None,
                       ff_width=8 * round(self.ff_mult * self.n_embd / 12) if self.activation in GLU
                       else int(self.ff_mult * self.n_embd))
        vars(self).update((name, value) for name, value in derived.items() if getattr(self, name) is None)
        chosen = [place for kind, place in (MIXERS | FEED_FORWARDS).items() if kind in self.mixers + self.ffs]
        chosen += ["models.pyramid:"] * (self.shorten > 1) + ["models.low_rank:"] * (self.lora_rank > 0)
        for module in dict.fromkeys(place.split(":")[0] for place in chosen):
            if check := getattr(importlib.import_module(module), "check", None):
                check(self)
        for name, holds, message in NEEDS:
            if getattr(self, name) != getattr(TransformerConfig, name) and not holds(self):
                raise ValueError(message.format(c=self))

    # The mixer and the feed-forward of every layer, n_layer words.
    mixers = property(lambda c: repeat_words(c.mixer, c.n_layer, tuple(MIXERS), "mixer"))
    ffs = property(lambda c: repeat_words(c.ff, c.n_layer, (*FEED_FORWARDS, "none"), "ff"))
    # Whether some layer carries something from one segment to the next; whether a table of positions ends at
    # block_size; whether generation may go on past it with a sliding cache.
    carries = property(lambda c: bool({*c.mixers} & {*CARRY}))
    learned_positions = property(lambda c: c.positions.startswith("learned"))
    # The bytes with which a document ends; None: the whole text is one.
    document_bytes = property(lambda c: None if c.documents == "none" else as_bytes(c.document_end))
    rolls = property(lambda c: not c.learned_positions and c.shorten == 1)
    # Features of a head that turn under partial_rotary, an even number; None: all, or as rope_dim says.
    turning = property(lambda c: 2 * max(1, round(c.partial_rotary * c.head_dim / 2)) if c.partial_rotary < 1 else None)
    # Whether attention is a softmax of its scores as they are: what PyTorch's, and every kernel's, computes.
    plain_scores = property(lambda c: c.score_softcap is None and not c.softmax_plus_one)
    # Under "mup" (Yang et al. 2022, arXiv 2203.03466, table 8), else 1: how often mup_base_width goes into n_embd, as
    # which heads and feed-forwards are taken to grow; what makes attention's scores q.k / sqrt(D) those of
    # sqrt(D of the base) q.k / D.
    width_factor = property(lambda c: c.n_embd / c.mup_base_width if c.parametrisation == "mup" else 1.0)
    score_factor = property(lambda c: ((c.mup_base_head_dim or c.head_dim / c.width_factor) / c.head_dim) ** 0.5
                            if c.parametrisation == "mup" else 1.0)
    # Bytes ahead of each position that the losses need; sets of classifiers: one, or one a layer; classifiers in all.
    n_labels = property(lambda c: max(c.n_targets, c.mtp_depth + 1))
    n_head_groups = property(lambda c: c.n_layer if c.intermediate_losses and c.layer_heads == "own" else 1)
    n_classifiers = property(lambda c: c.n_head_groups * (c.n_targets if c.target_heads == "own" else 1))

    def receptive_field(self, window):
        """How many positions back the last layer's state can depend on, where full attention sees `window`, as each
        sees states that have themselves seen further back; None: any."""
        max_keys = {"window": min(self.window, window), "xl": self.memory_length + self.block_size,
                 **dict.fromkeys(RECURRENT),
                 "compressive": self.memory_length + self.block_size + self.compressed_length * self.compression_rate}
        reaches = [max_keys.get(kind, window) for kind in self.mixers]
        more = self.n_layer * max(0, self.short_conv - 1) + len(self.document_bytes or ())
        return None if None in reaches else sum(reaches) + more


PLAIN = {"full", "window", "strided", "fixed", "diff"}  # their queries, keys and values are products of what they read
OTHERS = "is of layers full, window, strided, fixed and diff: mixer {c.mixer!r} has others"
ONE = "is 1, but a norm over one feature leaves a sign at most, which lets no gradient pass: it must be at least 2"

NEEDS = [  # (a setting that is not the default, whether it goes with the others of a config c, what is said if not)
    ("ff_width", lambda c: c.ff_width >= 1, "ff_mult {c.ff_mult} leaves no feed-forward width at n_embd {c.n_embd}"),
    ("n_embd", lambda c: c.n_embd > 1, f"n_embd {ONE}"),
    ("qk_norm", lambda c: c.head_dim > 1, f"head_dim {ONE}"),
    ("activation", lambda c: c.activation != "solu" or c.ff_width > 1, f"the feed-forward's width {ONE}"),
    ("window", lambda c: c.window > 1 or "window" not in c.mixers, "mixer 'window' needs a window of at least 2"),
    ("short_conv", lambda c: c.short_conv > 1, "short_conv is 1, but must be 0, which is none, or at least 2"),
    ("positions", lambda c: c.positions != "rope" or not c.head_dim % 2,
     "positions 'rope' turns pairs of features: head_dim {c.head_dim} must be even"),
    ("positions", lambda c: c.positions != "relative" or {*c.mixers} <= {*CARRY},
     "positions 'relative' are Transformer-XL's: mixer {c.mixer!r} has none; use 'rope'"),
    ("mixer", lambda c: not c.learned_positions or not {*c.mixers} & {*RECURRENT},
     "mixer {c.mixer!r} goes on past block_size, positions {c.positions!r} do not: use 'rope', 'alibi' or 'none'"),
    ("partial_rotary", lambda c: "mla" not in c.mixers,
     "partial_rotary is of heads that turn as a whole: of mixer 'mla' rope_dim says how much turns"),
    ("rope_scaling", lambda c: c.positions == "rope",
     "rope_scaling {c.rope_scaling!r} needs positions 'rope', not {c.positions!r}"),
    ("bias", lambda c: c.bias != "qkv" or {*c.mixers} <= PLAIN, f"bias 'qkv' {OTHERS}"),
    ("nope_interval", lambda c: {*c.mixers} <= PLAIN, f"nope_interval {OTHERS}"),
    ("qk_norm", lambda c: c.qk_norm != "full" or {*c.mixers} <= PLAIN, f"qk_norm 'full' {OTHERS}"),
    ("qk_gain", lambda c: {*c.mixers} <= PLAIN, f"qk_gain {OTHERS}"),
    ("qk_gain", lambda c: c.qk_norm, "qk_gain multiplies queries and keys of one length: it needs qk_norm"),
    ("qk_scale", lambda c: c.qk_norm is True,
     "qk_scale scales scores of queries and keys of one length: it needs qk_norm, of each head"),
    ("value_residual", lambda c: {*c.mixers} <= PLAIN, f"value_residual {OTHERS}"),
    ("value_residual", lambda c: c.n_layer > 1, "value_residual mixes in values of the first of at least 2 layers"),
    ("norm_after", lambda c: not c.short_conv and c.parallel_residual != "shared"
     and not {*c.mixers} & {"xl", "compressive"}, "norm_after leaves a mixer's input without a norm: short_conv, "
     "parallel_residual 'shared' and mixers xl and compressive need one"),
    ("mixer", lambda c: c.plain_scores or not {*c.mixers} <= {*RECURRENT},
     "score_softcap and softmax_plus_one are of attention, which mixer {c.mixer!r} is not"),
    ("attention", lambda c: c.plain_scores or c.attention != "sdpa",
     "attention 'sdpa' has a plain softmax: with score_softcap or softmax_plus_one choose auto or manual"),
    ("score_softcap", lambda c: c.positions != "relative",
     "score_softcap caps products of queries and keys, not what positions 'relative' add: choose others"),
    ("residual_scale", lambda c: c.residual_scale != "rezero" or c.init != "zero", "residual_scale 'rezero' starts all "
     "branches at zero, and init 'zero' their outputs too: no gradient would ever reach either; choose another init"),
    ("init", lambda c: c.init != "tfixup" or {*c.mixers} <= PLAIN | {"xl"} and {*c.ffs} <= {"mlp", "none"},
     "init 'tfixup' scales matrices of attention layers with ff mlp: mixer {c.mixer!r} with ff {c.ff!r} has others"),
    ("parametrisation", lambda c: {*c.mixers} <= PLAIN - {"diff"} and {*c.ffs} <= {"mlp", "none"}, "parametrisation "
     "'mup' knows mixers full, window, strided and fixed with ff mlp or none, not {c.mixer!r} with {c.ff!r}"),
    ("parametrisation", lambda c: c.init != "tfixup" and c.activation != "solu" and (c.n_targets == 1 or c.target_heads
     == "own"), "parametrisation 'mup' has no rule for init 'tfixup', activation 'solu' and target_heads 'shared'"),
    ("tie_weights", lambda c: c.n_classifiers == 1, "tie_weights needs one classifier, not {c.n_classifiers}: set "
     "target_heads and layer_heads to 'shared', or n_targets to 1 and intermediate_losses off"),
    ("document_end", lambda c: as_bytes(c.document_end), "document_end is {c.document_end!r}, but must be at least one "
     "byte, where \\n, \\0 and \\xff are written as in Python"),
    ("documents", lambda c: c.vocab_size <= 256, "documents end with certain bytes, which a vocabulary of "
     "{c.vocab_size} has not"),
    ("documents", lambda c: c.shorten == 1 and not {*c.mixers} & {"xl", "compressive"}, "documents {c.documents!r}: "
     "units of a pyramid and memories of mixers xl and compressive lie across documents; choose other layers"),
    ("documents", lambda c: c.documents != "reset" or "fixed" not in c.mixers, "documents 'reset': the blocks of mixer "
     "'fixed' begin at multiples of sparse_stride, not with a document; choose documents 'mask'"),
    ("mtp_depth", lambda c: not c.carries,
     "mtp_depth {c.mtp_depth} goes with layers that attend, not with mixer {c.mixer!r}"),
]


def active_layers(step, max_steps, n_layer):
    """0-based indices of the layers whose losses count at `step` (steps done so far, of max_steps), as a tuple.

    Al-Rfou et al. 2018, section "Intermediate Layer Losses": layer l of n (from 1) stops after the fraction l / (2n) of
    training; the last never stops. Their text's interval between two stops, 62.5K of 4M steps in 64 layers, contradicts
    this rule, whose is 31.25K.
    """
    return tuple(l - 1 for l in range(1, n_layer + 1) if l == n_layer or 2 * n_layer * step < l * max_steps)


# --- Who sees whom ---

@dataclass(frozen=True)
class Pattern:
    """A rule of who sees whom: a query sees itself and those before it that `sees` allows, with `window` only among the
    last so many positions, its own included. max_keys: the most keys that a query sees; None: any number.
    period: so many positions further on the rule is the same. block: the least multiple of it that is no less."""
    window: int = None
    max_keys, period = None, 1
    block = property(lambda self: -(-self.max_keys // self.period) * self.period)

    def first(self, q):
        """The first position that a query at q (int) sees."""
        return 0 if self.window is None else max(0, q - self.window + 1)

    def sees(self, q, k):
        """bool, broadcast: may queries at q see keys at k <= q, the window apart?"""
        return k <= q

    def allowed(self, q, k, end):
        """bool, broadcast: may queries at q see keys at k? They look ahead up to `end` (>= q)."""
        allowed = self.sees(q, k) & (k <= q) | (k > q) & (k <= end)
        return allowed if self.window is None else allowed & (k > q - self.window)


class Causal(Pattern):
    """A query sees itself and what stands before it."""
    max_keys = property(lambda self: self.window)


class Everything(Pattern):
    """Every query sees every key."""

    def allowed(self, q, k, end):
        """True, broadcast."""
        return (k == k) & (q == q)


CAUSAL, EVERYTHING = Causal(), Everything()


def causal(window=None):
    """The Causal of this window."""
    return CAUSAL if window is None else Causal(window)


class Positions:
    """What all layers of one forward pass share: where its T inputs stand, masks made once, and what layers report.

    start: the position of the first input, where all rows stand alike and inputs are consecutive (index None).
    index: (B, T) int64 where rows are ragged; -1 marks padding. window: the last positions that a layer of full
    attention sees; None: all before it. prefix: int or (B,) int64, the positions below it see one another.
    bidirectional: every position sees every other. tables: RoPE's, {D: (cos, sin)} of these positions, each
    (1 or B, T, 1, D) float32; ropes: the modules that make them, {str(D): Rope}. memory: what the segment before left
    to each layer, which stands for the `remembered` positions before this one. age: with documents (B, T, 1) int64, how
    many positions of its own stand before each. places: the rows of position tables where rows differ, (B, T) int64.

    Layers write into: `losses`, {name: [weighted scalars]}; `usage`, [(layer, counts)] of experts; `memory_out`,
    {layer: tensors} for the next segment; `first_values`, with value_residual: the first layer's (B, G, T, D).
    """

    in_order = True  # a query's keys lie side by side: long passes may be cut into blocks
    age = None

    def __init__(self, start, T, index=None, window=None, prefix=None, bidirectional=False,
                 memory=None, remembered=0, tables=None):
        self.start, self.T, self.index, self.window, self.places = start, T, index, window, index
        self.ropes, self.tables = {}, tables or {}
        self.prefix, self.bidirectional = prefix, bidirectional
        self.memory, self.remembered = memory, remembered
        self.losses, self.usage, self.memory_out, self.first_values = {}, [], {}, None
        self._made = {}

    @cached_property
    def real_first(self):
        """Of ragged rows, (order, back, real), each (B, T, 1): taken along dimension 1, `order` puts each row's real
        inputs first, so that a padded one never stands between two of them, and `back` undoes it; real is bool, in that
        order."""
        real = self.index.unsqueeze(2) >= 0
        order = (~real).byte().argsort(dim=1, stable=True)
        return order, order.argsort(1), real.take_along_dim(order, 1)

    def turn(self, x):
        """x (B, T, H, D) turned by RoPE's tables, in its own type; x itself where there are none."""
        return kernels.rotary(x, *self.tables[x.size(-1)]) if self.tables else x

    def look_up_ropes(self, ropes, n):
        """Takes the tables of ropes, {str(D): Rope}, at these positions, which are all below n."""
        self.ropes = ropes
        self.tables = {int(D): tuple(self.look_up(t).view(-1, self.T, 1, int(D)) for t in rope(n))  # (1 or B, T, 1, D)
                       for D, rope in ropes.items()}

    def look_up(self, table):
        """Rows of a learned table (P, C): (T, C), or (B, T, C) where rows differ; padding takes row 0."""
        if self.places is None:
            return table[self.start:self.start + self.T]
        return F.embedding(self.places.clamp(min=0), table)

    def mask(self, pattern, S, key_positions, device, slopes=None, rows=None):
        """Which of S keys each query may see: None (all), "causal", or a mask ((B, 1,) T, S), True where allowed.

        pattern: the rule (Causal, ...). key_positions: (B, S) int64, or None where all rows stand alike and the keys
        end at the last query. Padding sees padding and nothing else does. slopes: (H,) float32, ALiBi's;
        then the mask is float32 ((B,) H, T, S) to be added to the scores. rows: (first, end) of some queries, their
        first key and the end of their keys, (i, j, low, high): only that part of the mask. Made once for all layers.
        """
        if key_positions is None and slopes is None and rows is None and self.prefix is None and self.age is None:
            if type(pattern) is Everything:
                return None
            if type(pattern) is Causal and S <= (pattern.window or S) and (self.T == 1 or self.T == S):
                return None if self.T == 1 else "causal"
        key = (pattern, S, None if slopes is None else (slopes.numel(), slopes.data_ptr()), rows)
        if key not in self._made:
            self._made[key] = self._make_mask(pattern, S, key_positions, device, slopes, rows)
        return self._made[key]

    def _make_mask(self, pattern, S, key_positions, device, slopes, rows):
        T = self.T
        if key_positions is None:
            k = torch.arange(self.start + T - S, self.start + T, device=device)  # (S,)
            q = k[S - T:, None]  # (T, 1)
            if rows is not None:
                q, k = q[rows[0]:rows[1]], k[rows[2]:rows[3]]
        else:
            k = key_positions[:, None, None, :]  # (B, 1, 1, S)
            q = self.index[:, None, :, None]  # (B, 1, T, 1)
        end = q
        if self.prefix is not None:
            prefix = self.prefix.view(-1, 1, 1, 1) if torch.is_tensor(self.prefix) else self.prefix
            end = torch.clamp(q, min=prefix - 1)
        allowed = pattern.allowed(q, k, end)
        if self.age is not None:
            allowed = allowed & (q - k <= self.age.unsqueeze(1))  # (B, 1, T, S)
        if key_positions is not None:
            allowed = allowed & (k >= 0) & (q >= 0) | (k < 0) & (q < 0)  # (B, 1, T, S)
        if slopes is None:
            return allowed
        bias = -(q - k).abs() * slopes.view(-1, 1, 1)  # ((B,) H, T, S)
        return torch.where(allowed, bias, -math.inf)


# --- Position schemes ---

class Rope(nn.Module):
    """Rotary positions (Su et al. 2021): feature pairs (i, i + D/2) turn by position * base^(-2i/D); `scaling` other
    than "none", and what follows it, is models/rope_scaling.py's. Only the first `turning` features' pairs turn, as if
    D were that (None: all), those of the rest stand still: GPT-NeoX's (Black et al. 2022, section 2.1) with features in
    another order. Angles are computed in float64 and kept as float32 tables that grow with the positions asked for; not
    saved. One Rope serves all layers."""

    def __init__(self, head_dim, base, n, scaling="none", factor=1.0, original=None, ramp="turns", mscale=1.0,
                 turning=None):
        super().__init__()
        turning = turning or head_dim
        self.frequencies, self.magnitude = rope_frequencies(turning, base), 1.0
        if scaling != "none":
            self.frequencies, self.magnitude = variant("models.rope_scaling:scaled")(
                turning, base, scaling, factor, original or n, ramp, mscale)
        if still := (head_dim - turning) // 2:
            self.magnitude = F.pad(torch.full_like(self.frequencies, self.magnitude), (0, still), value=1.0)  # (D/2,)
            self.frequencies = F.pad(self.frequencies, (0, still))
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._build(n, "cpu")

    def _build(self, n, device):
        with torch.inference_mode(False):  # these tables must serve training too, whoever asks for them first
            angle = torch.outer(torch.arange(n, dtype=torch.float64, device="cpu"), self.frequencies)  # (n, D/2)
            cos, sin = angle.cos() * self.magnitude, angle.sin() * self.magnitude
            self.cos = torch.cat((cos, cos), 1).float().to(device)  # (n, D)
            self.sin = torch.cat((-sin, sin), 1).float().to(device)  # (n, D), signed for kernels.rotary

    def forward(self, n):
        """The tables (>= n, D), for positions 0 to n - 1 at least."""
        known = self.cos.size(0)
        if n > known or self.cos.dtype != torch.float32:  # model.to(bfloat16) spoils the tables
            self._build(max(n, 2 * known) if n > known else known, self.cos.device)
        return self.cos, self.sin


def rope_frequencies(head_dim, base):
    """Angles per position, (D/2,) float64 on the CPU."""
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)


def alibi_slopes(n_head):
    """(H,) float32: 2^(-8 h / H) for h = 1 ... H (Press et al. 2022; for H no power of 2 the same formula)."""
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1) / n_head)


# --- Norms and linear layers ---

def add_parameter(module, name, start, *shape, role="gain"):
    """Gives a module a parameter of its own, which no rule claims, and `initialise` fills with `start`."""
    setattr(module, name, nn.Parameter(torch.empty(shape)))
    for kind, value in (("roles", role), ("starts", start)):
        vars(module).setdefault(kind, {})[name] = value


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with a learned gain and bias or without; or, of kind "dyt", what
    takes their place feature by feature (Zhu et al. 2025, "Transformers without Normalization", section 4):

        DyT(x) = gain tanh(alpha x) + bias,   alpha one learned number, 0.5 at first.

    eps: added to the mean square; None: 1e-6 of RMSNorm, 1e-5 of LayerNorm.
    """

    def __init__(self, kind, width, gain, bias, eps=None):
        super().__init__()
        self.kind, self.width, self.eps = kind, width, (1e-6 if kind == "rms" else 1e-5) if eps is None else eps
        self.gain = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if gain and bias is True and kind != "rms" else None
        self.alpha = None
        if kind == "dyt":
            add_parameter(self, "alpha", 0.5, 1)

    def forward(self, x, learn=True):
        """x (..., width) to the same shape and type. Only with `learn` does a gradient reach what is learned."""
        weights = self._parameters  # past nn.Module's look-up, which a decoded byte feels
        if not learn:
            weights = {name: p.detach() for name, p in weights.items() if p is not None}
        if self.kind == "rms":
            return kernels.rms_norm(x, weights.get("gain"), self.eps)
        if self.kind == "layer":
            return kernels.layer_norm(x, weights.get("gain"), weights.get("bias"), self.eps)
        y, gain, bias = torch.tanh(weights["alpha"] * x), weights.get("gain"), weights.get("bias")
        y = y if gain is None else y * gain
        return (y if bias is None else y + bias).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear that leaves its parameters to `initialise`, which claims each of them."""

    def forward(self, x):
        """x (..., in) to (..., out)."""
        return F.linear(x, self._parameters["weight"], self._parameters["bias"])

    def reset_parameters(self):
        """Draws nothing."""


# --- Attention ---

LONG = 1024  # keys from which on SDPA's causal attention outruns attend_by_hand


def weights_of(scores, plus_one):
    """softmax over scores (..., S), or with plus_one exp(s_i) / (1 + sum_j exp(s_j)) (Miller 2023, "Attention Is Off By
    One"): a softmax beside one more score, 0, whose value is 0."""
    return torch.softmax(F.pad(scores, (0, 1)), -1)[..., :-1] if plus_one else torch.softmax(scores, -1)


def attend_by_hand(q, k, v, mask, dropout=0.0, scale=None, cap=None, plus_one=False):
    """softmax(scale q k^T) v with the softmax in float32; what SDPA computes, in steps.

    q (B, H, T, D); k (B, H or fewer, S, D); v (B, as many, S, D'); mask as Positions.mask gives it; scale None:
    D^-0.5. Returns (B, H, T, D'). cap: `softcap` of the scores, before mask and ALiBi are added; plus_one: as
    `weights_of` says. Under bfloat16 on a CPU it outruns SDPA up to some hundred keys: bench.py --what growth.
    """
    B, H, T, D = q.shape
    S = k.size(2)
    if k.size(1) != H:
        k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))  # (B, H, S, D)
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    scale = D ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # softmax of bfloat16 already works in float32 inside
        if mask is not None and mask.dim() == 2 and cap is None:  # one operation in place of three
            scores = torch.baddbmm(mask.to(q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
            scores = scores.view(B, H, T, S)
        else:
            scores = (q * scale) @ k.mT  # (B, H, T, S)
            scores = scores if cap is None else softcap(scores, cap)
            scores = scores if mask is None else scores + mask.to(q.dtype)
        p = weights_of(scores, plus_one)
        if dropout:
            p = F.dropout(p, dropout)
        return p @ v


class Attention(nn.Module):
    """Self-attention with one fused projection and n_kv_head <= n_head groups of keys and values; kind "window" sees
    the last config.window positions only.

    qk_norm: an RMSNorm without parameters before they turn (RoPE keeps lengths: after would be the same); "full": one
    over the H D features of a query, one over the G D of a key (OLMo 2). They then have length sqrt(D); with qk_scale
    the score is s q.k / D, s learned, one of a layer, and sqrt(D) at first; with qk_gain a layer's queries have one
    learned gain, (D,) or as wide as the norm, and its keys another. A bias of keys that do not turn (nor are normed)
    moves all scores of a query alike, so no loss reaches it. nope_interval: Kazemnejad et al. 2023; mixed: Yang et al.
    2025, "Rope to Nope and Back Again".

    With value_residual the values V_n of every layer after the first become (1 - g_n) V_n + g_n V_1 of the same
    positions, g_n learned and 1/2 at first (Zhou et al. 2024, "Value Residual Learning", whose two numbers here sum to
    1). A cache keeps them mixed.
    """

    def __init__(self, config, layer=0, kind="full"):
        super().__init__()
        c = self.config = config
        self.layer, self.kind, self.score_factor = layer, kind, c.score_factor
        self.turns = not c.nope_interval or (layer + 1) % c.nope_interval > 0
        rows = tuple(n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head))
        self.qkv = Linear(c.n_embd, sum(rows), bias=bool(c.bias))
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias is True)
        self.fused, self.roles = {"qkv": rows}, {}
        for name, width in zip(("q_gain", "k_gain"), rows) if c.qk_gain else ():
            add_parameter(self, name, 1.0, width if c.qk_norm == "full" else c.head_dim)
        if c.qk_scale:
            add_parameter(self, "qk_scale", c.head_dim ** 0.5 * self.score_factor, 1)  # scores at first as without
        if c.value_residual and layer:
            add_parameter(self, "first_share", 0.5, 1)
        slopes = alibi_slopes(c.n_head) if c.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        # One query, to which a cache shows just what it sees, is then PyTorch's attention.
        self.plain = (type(self) is Attention and slopes is None and c.n_kv_head == c.n_head
                      and c.attention != "manual" and c.plain_scores and c.documents == "none")

    def forward(self, x, positions, cache=None):
        """x (B, T, C), positions a Positions, cache a KVCache or None. Returns (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        H, G = c.n_head, c.n_kv_head
        into, out = self._modules["qkv"], self._modules["out"]
        qkv = into(x).view(B, T, H + 2 * G, c.head_dim)  # (B, T, H + 2 G, D)
        if c.qk_norm or positions.tables and self.turns:
            q, k, v = self.normed_and_turned(qkv, positions)
        else:
            q, k, v = torch.split_with_sizes(qkv.transpose(1, 2), (H, G, G), 1)  # (B, H, T, D), (B, G, T, D) twice
        if self.score_factor != 1 and not c.qk_scale:
            q = q * self.score_factor
        if c.value_residual:
            if self.layer:
                v = (v + self.first_share * (positions.first_values - v)).to(v.dtype)
            else:
                positions.first_values = v
        key_positions = positions.index
        if cache is not None:
            k, v, key_positions = cache.update(k, v, positions.index)
            if q.dtype != k.dtype:
                q = q.to(k.dtype)
        if T == 1 and self.plain and key_positions is None and not self.training and not kernels.on():
            y = F.scaled_dot_product_attention(q, k, v)  # what attend comes to, without its questions
        else:
            y = self.attend(q, k, v, positions, key_positions, self.pattern(positions, cache))
        y = (y.transpose(1, 2) if T > 1 else y).reshape(B, T, H * c.head_dim)
        if cache is not None and y.dtype != x.dtype:  # a cache may be of another type
            y = y.to(x.dtype)
        return out(y)  # (B, T, C)

    def normed_and_turned(self, qkv, positions):
        """qkv (B, T, H + 2 G, D) to queries (B, H, T, D), keys and values (B, G, T, D), as qk_norm and RoPE have it."""
        c, H, G = self.config, self.config.n_head, self.config.n_kv_head
        qk, v = qkv.split((H + G, G), 2)
        if c.qk_norm == "full":
            qk = torch.cat([self.unit(t.flatten(2)).view(t.shape) for t in qk.split((H, G), 2)], 2)
        elif c.qk_norm:
            qk = self.unit(qk)
        if c.qk_gain:
            gains = (gain.view(-1, c.head_dim) for gain in (self.q_gain, self.k_gain))  # (1 or H, D), (1 or G, D)
            qk = torch.cat([t * gain for t, gain in zip(qk.split((H, G), 2), gains)], 2).to(v.dtype)
        if positions.tables and self.turns:
            qk = positions.turn(qk)
        q, k = qk.transpose(1, 2).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
        if c.qk_scale:  # D^-0.5 of it is in every softmax
            q = (q * (self.qk_scale / c.head_dim ** 0.5)).to(q.dtype)
        return q, k, v.transpose(1, 2)

    def unit(self, x):
        """x (..., D) to the same shape, of length sqrt(D): RMSNorm without parameters."""
        return plain_rms_norm(x, eps=self.config.norm_eps or 1e-6)

    def pattern(self, positions, cache=None):
        """Who sees whom in this layer."""
        if positions.bidirectional:
            return EVERYTHING
        return causal(self.limit(positions.window if cache is None else cache.window))

    def limit(self, window):
        """The last positions that this layer sees where full attention sees `window`; None: all."""
        if self.kind == "window":
            return self.config.window if window is None else min(window, self.config.window)
        return window

    def attend(self, q, k, v, positions, key_positions, pattern, bias=None, scale=None, slopes=None):
        """Queries (B, H, T, D) over keys (B, G, S, D) and values (B, G, S, D'), as `pattern` allows: (B, H, T, D').

        key_positions: (B, S) where rows are ragged, else None. bias: (B or 1, H, T, S), added to the scores.
        scale: of the scores; None: D^-0.5. slopes: ALiBi's of these heads; None: the layer's.

        By kernel where one computes it; of many queries that see few keys each `by_blocks`, whose time and memory grow
        with T times that number, not with T S; else by `softmax`, of a lone query over a view of what it sees.
        """
        slopes = self.slopes if slopes is None else slopes
        T, S, max_keys = q.size(2), k.size(2), pattern.max_keys
        few = max_keys is not None and key_positions is None and positions.age is None
        if few and T == 1:  # a lone query: a view of what it sees needs no mask
            S = min(S, max_keys, positions.start - pattern.first(positions.start) + 1)
            k, v, bias = k[:, :, -S:], v[:, :, -S:], None if bias is None else bias[..., -S:]
        if kernels.on() and bias is None and self.by_kernel(q, k, v, positions, key_positions, pattern):
            q, k = q.to(v.dtype), k.to(v.dtype)
            return (kernels.attend_one(q, k, v, scale=scale) if T == 1 else
                    kernels.attend(q, k, v, window=pattern.window, prefix=positions.prefix, scale=scale))
        if few and T > 2 * pattern.block and bias is None and positions.prefix is None and positions.in_order:
            return self.by_blocks(q, k, v, positions, pattern, scale, slopes)
        if few and T == 1 and slopes is None:
            return self.softmax(q, k, v, bias, scale)
        if bias is None:
            mask = positions.mask(pattern, S, key_positions, q.device, slopes)
        else:
            mask = bias.masked_fill(~positions.mask(pattern, S, key_positions, q.device, None, (0, T, 0, S)), -math.inf)
        return self.softmax(q, k, v, mask, scale)

    def by_blocks(self, q, k, v, positions, pattern, scale, slopes):
        """As `attend`: the first w of T queries, which see at most w keys each, then the others by blocks of w in the
        batch, each beside its own 2 w keys. Not by a slice a block: the gradient of each would fill all T."""
        w, T, S, B = pattern.block, q.size(2), k.size(2), q.size(0)
        n, before = -(-T // w) - 1, S - T                    # blocks after the first; keys before the first query
        low = max(0, before - w + 1)

        def part(q, k, v, *rows):
            return self.softmax(q, k, v, positions.mask(pattern, S, None, q.device, slopes, rows), scale)

        def cut(t, n):  # zeros past the end: what no real query sees
            return F.pad(t, (0, 0, 0, n * w - t.size(2))).unflatten(2, (n, w)).transpose(1, 2)  # (B, n, H, w, D)

        def beside(t):
            t = cut(t[:, :, before:], n + 1)
            return torch.cat((t[:, :-1], t[:, 1:]), 3).flatten(0, 1)  # (B n, G, 2 w, D)
        first = part(q[:, :, :w], k[:, :, low:before + w], v[:, :, low:before + w], 0, w, low, before + w)
        rest = part(cut(q[:, :, w:], n).flatten(0, 1), beside(k), beside(v), w, 2 * w, before, before + 2 * w)
        rest = rest.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)  # (B, H, n w, D')
        return torch.cat((first, rest[:, :, :T - w]), 2)

    def fusible(self, *widths):
        """Whether kernels are on and know this layer's scores and heads of these widths."""
        c = self.config
        return (kernels.on() and c.attention == "auto" and c.plain_scores and self.slopes is None
                and not (self.training and c.dropout) and max(widths) <= kernels.WIDEST_HEAD)

    def by_kernel(self, q, k, v, positions, key_positions, pattern):
        """Whether kernels.attend computes what these queries see: what is before them, a window of it, or a prefix that
        counts from the first key; or, without a gradient, kernels.attend_one what a lone query sees, which is all."""
        if not (key_positions is None and type(pattern) is Causal and positions.in_order and positions.age is None
                and self.fusible(q.size(3), v.size(3))):
            return False
        if q.size(2) > 1:
            return positions.prefix is None or not positions.start
        return (positions.prefix is None and k.size(2) <= (pattern.max_keys or k.size(2))
                and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)))

    def softmax(self, q, k, v, mask, scale=None):
        """q (B, H, T, D), k (B, G, S, D), v (B, G, S, D'), mask as Positions.mask gives it: (B, H, T, D').

        By hand in bfloat16 training on a CPU, where it is faster, and where scores are not plain; else by PyTorch's.
        """
        c = self.config
        dropout = c.dropout if self.training else 0.0
        by_hand = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16
        by_hand = by_hand and (k.size(2) < (LONG if isinstance(mask, str) else 4 * LONG) or dropout > 0)
        if c.attention == "manual" or c.attention == "auto" and by_hand or not c.plain_scores:
            return attend_by_hand(q, k, v, mask, dropout, scale, c.score_softcap, c.softmax_plus_one)
        H, G = q.size(1), k.size(1)
        if mask is None and q.size(2) == 1 and G < H:  # one query: its group's heads act as queries
            q = q.reshape(q.size(0), G, -1, q.size(3))  # (B, G, H/G, D)
            y = F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scale)
            return y.reshape(q.size(0), H, 1, v.size(3))
        width, D = v.size(3), q.size(3)
        if D != width and q.size(2) > 1 and q.device.type == "cpu":  # there, fused attention takes one width only
            scale = D ** -0.5 if scale is None else scale
            q, k, v = (F.pad(t, (0, max(D, width) - t.size(3))) for t in (q, k, v))
        is_causal = isinstance(mask, str)
        if is_causal:
            mask = None
        elif mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=G < H)
        return y if y.size(3) == width else y[..., :width]

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A KVCache, of a layer of kind "window" never longer than its window."""
        c = self.config
        return KVCache(batch_size, c.n_kv_head, c.head_dim, max_length, self.limit(window), device, dtype)

    def new_memory(self, batch_size, device, dtype):
        """Attention starts afresh with every segment: None."""
        return None

    def flops(self, T):
        """Scores and sums of one token, forward, at T positions: 4 H D T, uncut by the causal mask; a window cuts T."""
        c = self.config
        return 4 * c.n_head * c.head_dim * (min(T, c.window) if self.kind == "window" else T)


windowed = partial(Attention, kind="window")


# --- Feed-forward ---

class FeedForward(nn.Module):
    """Two linear layers around an activation; a gated one has 2/3 of the width, and as many parameters."""

    def __init__(self, config, layer=0):
        super().__init__()
        c, width = config, config.ff_width
        self.activation = c.activation
        gated = c.activation in GLU
        self.up = Linear(c.n_embd, 2 * width if gated else width, bias=c.bias is True)
        self.down = Linear(width, c.n_embd, bias=c.bias is True)
        self.norm = Norm("layer", width, c.norm_gain, c.bias) if c.activation == "solu" else None
        self.fused = {"up": (width, width)} if gated else {}

    def forward(self, x, positions=None):
        """x (B, T, C) to (B, T, C)."""
        parts = self._modules  # past nn.Module's look-up
        x = activate(self.activation, parts["up"](x))
        return parts["down"](x if self.norm is None else self.norm(x))


# --- Layers and the whole ---

class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + ff(norm(x)), each branch scaled, after its own position table if any.

    With short_conv a convolution stands between the first norm and the mixer. ff "none": the first branch alone.
    norm_after: x + norm(mixer(x)), and so on (OLMo 2, Team OLMo 2025). parallel_residual: x + mixer(norm(x)) +
    ff(norm'(x)) (Wang & Komatsuzaki 2021; GPT-NeoX), "shared" with norm' = norm.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        c = config
        learned = c.positions == "learned_per_layer"
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if learned else None
        self.norm1 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias, c.norm_eps)
        self.conv = variant("models.short_conv:ShortConv")(c, layer) if c.short_conv else None
        self.mixer = variant(MIXERS[c.mixers[layer % c.n_layer]])(c, layer)
        self.keeps_hidden = getattr(self.mixer, "keeps_hidden", False)
        self.norm2 = self.ff = None
        if (kind := c.ffs[layer % c.n_layer]) != "none":
            if c.parallel_residual != "shared":
                self.norm2 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias, c.norm_eps)
            self.ff = variant(FEED_FORWARDS[kind])(c, layer)
        self.dropout, self.norm_after, self.parallel = c.dropout, c.norm_after, c.parallel_residual
        self.scale, self.roles = c.residual_scale, {}
        if c.residual_scale == "depth":
            self.scale = (2 * c.n_layer) ** -0.5
        for name in ("scale1", "scale2")[:1 + (self.ff is not None)] if isinstance(self.scale, str) else ():
            if c.residual_scale == "rezero":  # Bachlechner et al. 2020
                add_parameter(self, name, 0.0, 1)
            else:  # layerscale: Touvron et al. 2021
                add_parameter(self, name, 0.1 if c.n_layer <= 18 else 1e-5 if c.n_layer <= 24 else 1e-6, c.n_embd)

    def forward(self, x, positions, cache=None, inputs=None):
        """x (B, T, C) to (B, T, C); cache: the mixer's, inputs: the convolution's."""
        if self.position is not None:
            x = x + positions.look_up(self.position)
        parts = self._modules  # past nn.Module's look-up, which a decoded byte feels
        normed = h = x if self.norm_after else parts["norm1"](x)
        if self.conv is not None:
            h = self.conv(h, positions, inputs, x, parts["norm1"])
        made = (x, parts["norm1"], self.conv) if self.keeps_hidden else ()
        branch = parts["mixer"](h, positions, cache, *made)
        y = self.add(x, parts["norm1"](branch) if self.norm_after else branch, 1)
        if "ff" not in parts:
            return y
        if self.parallel != "shared":
            read = x if self.parallel else y
            normed = read if self.norm_after else parts["norm2"](read)
        branch = parts["ff"](normed, positions)
        return self.add(y, parts["norm2"](branch) if self.norm_after else branch, 2)

    def add(self, x, branch, number=1):
        """x + scale * dropout(branch), both (B, T, C); number 1: the mixer's branch, 2: the feed-forward's."""
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        if self.roles:
            return x + branch * (self.scale1 if number == 1 else self.scale2)
        return x + branch if self.scale == 1 else torch.add(x, branch, alpha=self.scale)


class Transformer(nn.Module):
    """A pre-norm decoder with as many classifiers as its losses need.

    With intermediate_losses, every layer predicts every target (Al-Rfou et al. 2018); one final norm serves all layers.
    Target k (bytes k + 1 ahead) weighs 0.5^k. After a forward pass with targets, `extras` holds what layers added to
    the objective, {name: weighted sum, detached}, and `usage` the positions that each expert was given, {layer: (E,)};
    modules of multi-token prediction count on from n_layer.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.n_embd))
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.ropes = make_ropes(c)
        self.documents = None if c.documents == "none" else variant("models.recurrent:Documents")(c)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.mtp = nn.ModuleList(variant("models.multi_token:MultiTokenPrediction")(c, depth + 1)
                                 for depth in range(c.mtp_depth))
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias, c.norm_eps)
        self.extras, self.usage = {}, {}

        def table(n, *shape):
            return nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(n))
        self.heads = table(0 if c.tie_weights else c.n_classifiers, c.vocab_size, c.n_embd)
        self.head_biases = table(c.n_classifiers if c.head_bias else 0, c.vocab_size)
        n_maps = c.n_targets - 1 if c.target_heads == "shared" else 0
        self.target_maps = table(c.n_head_groups * n_maps, c.n_embd, c.n_embd)
        if c.shorten > 1:
            self.shortening = nn.ModuleDict({"into": Linear(c.shorten * c.n_embd, c.n_embd, bias=False),
                                             "out": Linear(c.n_embd, c.shorten * c.n_embd, bias=False)})
        initialise(self)

    def forward(self, x, targets=None, active=None, positions=None, cache=None, prefix=None, window=None, memory=None,
                counted=None):
        """Logits, or the losses of all active layers and targets at once.

        x: (B, T) int64. targets: (B, T, config.n_labels) int64, -1 where a target does not count. active: 0-based
        layers whose losses count, the last among them; None: all with intermediate_losses, else the last. positions:
        None or (T,) int64 (consecutive, all rows alike), or (B, T) int64 with -1 for padding (off the CPU, where nobody
        looks at them, below block_size, or T and what the cache has read). cache: from `new_cache`; positions None go
        on where it ends. prefix: int or (B,) int64, the positions below it see one another (with a
        cache, the first pass must hold them all). window: the last positions that full attention sees, as a cache with
        that window would show; for a pass without cache. memory: from `new_memory`; this segment goes on from it, and
        it then holds what this segment leaves. counted: (M,) int64, places in the B T rows' positions, one row after
        another: only there are classifiers computed and targets looked at; None: everywhere.

        Without targets returns logits (B, T, V) float32 of the last layer's first target. With targets returns
        (objective, nats): objective, a scalar with gradient, sums over active layers and targets 0.5^k times the mean
        loss, and what layers add (`extras`); nats (A, n_targets) float32, detached, are those means in nats per target,
        the last row's first the loss of the model. Raises ValueError for positions past a learned table, and for
        shapes or layers that do not fit.
        """
        positions = self.place(x, positions, cache, prefix, window, memory)
        if targets is not None:
            active = self.check_losses(x, targets, active)
        x, states = self.stream(x, positions, cache, () if targets is None else active)
        if memory is not None:
            memory.update(positions)
        if targets is not None:
            objective, nats = self.losses(states, targets[..., :self.config.n_targets], active, counted)
            return objective + self.extra_losses(x, targets, positions), nats
        return self.predict(x)

    def stream(self, x, positions, cache=None, active=()):
        """x (B, T) int64 -> the last stream (B, T, C), before the final norm, and those of active layers."""
        x, states, n = self.embedded(x, positions), [], self.config.n_layer
        for layer, block in enumerate(self.blocks):
            caches = () if cache is None else cache.layers[layer:2 * n:n]  # the mixer's, the convolution's
            x = self.layer(block, x, positions, *caches)
            if layer in active:
                states.append(x)
        if cache is not None:
            cache.advance(positions)
        return x, states

    def embedded(self, x, positions):
        """x (B, T) int64 -> (B, T, C), what the first layer reads."""
        x = F.embedding(x, self.embed)
        if self.position is not None:
            x = x + positions.look_up(self.position)
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

    def layer(self, block, x, *rest):
        """One layer, (B, T, C) to (B, T, C), with activation checkpointing if that is set."""
        if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
            return recompute(block, x, *rest, use_reentrant=False)
        return block(x, *rest)

    def predict(self, h):
        """The last stream h (B, T, C) to logits (B, T, V) of the next byte: float32, under "stablemax" float64."""
        bias = self.head_biases[self.first_head] if len(self.head_biases) else None
        return self.logits(F.linear(self.norm(h), self.classifier(self.first_head), bias))

    def logits(self, scores):
        """A classifier's output (..., V) as what a softmax makes probabilities of."""
        if self.config.logit_softcap is not None:
            scores = softcap(exactly(scores), self.config.logit_softcap)
        return stablemax(scores) if self.config.output == "stablemax" else scores.float()

    def extra_losses(self, h, targets, positions):
        """The weighted sum of what the layers reported and of multi-token prediction from the last stream h (B, T, C),
        whose module d reads the byte d ahead, which is target d - 1, and predicts target d."""
        c, losses = self.config, dict(positions.losses)
        for d, module in enumerate(self.mtp, 1):
            h = module(h, F.embedding(targets[..., d - 1].clamp(min=0), self.embed), positions)
            loss = F.cross_entropy(self.predict(h).flatten(0, 1), targets[..., d].flatten(), ignore_index=-1)
            losses.setdefault("mtp", []).append(c.mtp_weight / c.mtp_depth * loss)
        self.extras = {name: sum(values).detach() for name, values in losses.items()}
        self.usage = dict(positions.usage)
        return sum(sum(values) for values in losses.values()) if losses else 0.0

    def place(self, x, positions, cache=None, prefix=None, window=None, memory=None):
        """The Positions of inputs x (B, T): checks them, and looks up RoPE's tables once for all layers."""
        c = self.config
        B, T = x.shape
        index, start = None, 0 if cache is None else cache.length
        if positions is not None and positions.dim() == 1:
            first = int(positions[0])
            expect(positions.numel() == T and int(positions[-1]) == first + T - 1,
                   f"positions (T,) must be {T} consecutive ones; rows of their own need (B, T)")
            expect(cache is None or first == start,
                   f"positions start at {first}, but the cache ends at {start}: crop it, or pass (B, T)")
            start = first
        elif positions is not None:
            expect(positions.shape == x.shape, f"positions are {tuple(positions.shape)}, but the input is {(B, T)}")
            index = positions
        if cache is not None:
            cache.check(index, self.ordered)
            if index is None and cache.ragged:
                index = cache.next_positions(T)
        if prefix is not None:
            self.check_prefix(prefix, T, cache)
        if memory is not None and (cache is not None or positions is not None or prefix is not None):
            raise ValueError("memory is for whole segments of a stream: without cache, positions or prefix")
        known = index is None or readable(index)
        end = start + T if index is None or not known else int(index.max()) + 1
        if known and end > c.block_size and c.learned_positions:
            raise ValueError(f"position {end - 1} is past block_size {c.block_size}, where positions {c.positions!r} "
                             "has no row: use positions 'rope' or 'none', or a larger block_size")
        positions = Positions(start, T, index, window, prefix=prefix, memory=None if memory is None else memory.layers,
                              remembered=0 if memory is None else memory.length)
        if self.documents is not None:
            end = self.documents.find(x, positions, cache, end)
        positions.look_up_ropes(self.ropes, max(end, 1))
        return positions

    @cached_property
    def ordered(self):
        """Whether some layer needs each row's positions in order: a window, a memory or a state forgets by age."""
        return self.documents is not None or any(kind in CARRY or kind == "window" for kind in self.config.mixers)

    def check_prefix(self, prefix, T, cache):
        """Raises ValueError where a layer knows order by itself, or the first pass does not hold the whole prefix."""
        for kind in self.config.mixers:
            if kind in CARRY:
                raise ValueError(f"mixer {kind!r} reads from left to right: it cannot show a prefix as a whole")
        expect(self.documents is None, "documents are read from left to right: they cannot show a prefix as a whole")
        if cache is not None:
            longest = int(prefix.max()) if torch.is_tensor(prefix) else prefix
            if cache.length or T < longest:
                raise ValueError(f"a prefix of {longest} positions must come whole, in the first pass of a cache")
            cache.prefix = longest

    def check_losses(self, x, targets, active):
        """The active layers as a tuple. Raises ValueError where they or the targets do not fit the model."""
        c = self.config
        if targets.shape != (*x.shape, c.n_labels):
            raise ValueError(f"targets are {tuple(targets.shape)}, but (B, T, n_labels) is {(*x.shape, c.n_labels)}")
        if active is None:
            active = range(c.n_layer) if c.intermediate_losses else (c.n_layer - 1,)
        # Compared one by one: under torch.compile the numbers may be symbols, which `in` would not find.
        found = tuple(layer for layer in range(c.n_layer) if any(a == layer for a in active))
        if len(found) != len(active) or c.n_layer - 1 not in found:
            raise ValueError(f"active layers {tuple(active)} must differ and include the last one, {c.n_layer - 1}")
        if len(found) > 1 and not c.intermediate_losses:
            raise ValueError(f"active layers {found} need intermediate_losses: only the last layer has a classifier")
        return found

    @property
    def first_head(self):
        """Index of the classifier of the last layer's first target."""
        return self.config.n_classifiers - (self.config.n_targets if self.config.target_heads == "own" else 1)

    def classifier(self, i):
        """The i-th classifier's weight (V, C), under "mup" over the width factor."""
        weight = self.embed if self.config.tie_weights else self.heads._parameters[str(i)]  # past ParameterList
        return weight if self.config.width_factor == 1 else weight / self.config.width_factor

    def losses(self, states, targets, active, counted=None):
        """As `forward` returns, of A hidden states (B, T, C) and targets (B, T, K), by one matrix product and one
        cross-entropy; by kernel there are never all logits at once."""
        c = self.config
        A, K, N = len(states), c.n_targets, targets.size(0) * targets.size(1)
        groups = active if c.n_head_groups > 1 else (0,)
        h = states[0].unsqueeze(0) if A == 1 else torch.stack(states)
        if counted is not None:
            N, targets = len(counted), targets.flatten(0, 1)[counted]  # (M, K)
            h = h.flatten(1, 2)[:, counted]  # (A, M, C)
        h = self.norm(h).reshape(A, N, c.n_embd)  # (A, N, C)
        if len(self.target_maps):
            maps = [self.target_maps[g * (K - 1) + k] for g in groups for k in range(K - 1)]
            far = batched_linear(h, maps, len(groups))  # (A, N, (K - 1) C)
            h = torch.cat((h.to(far.dtype), far), -1).view(A, N * K, c.n_embd)  # (A, N K, C)
        per_group = c.n_classifiers // c.n_head_groups
        used = [g * per_group + i for g in groups for i in range(per_group)]
        weights = [self.classifier(i) for i in used]
        biases = [self.head_biases[i] for i in used] if c.head_bias else None
        if kernels.on() and c.output == "softmax" and c.logit_softcap is None:
            def sets(parts):
                return None if parts is None else [parts[i:i + per_group] for i in range(0, len(parts), per_group)]
            loss = kernels.batched_linear_cross_entropy(h, sets(weights), targets.reshape(-1, per_group), sets(biases))
        else:
            logits = batched_linear(h, weights, len(groups), biases)  # (A, N, K V), (A, N K, V)
            labels = targets.reshape(1, N * K).expand(A, N * K).reshape(A * N * K)
            logits = self.logits(logits.view(A * N * K, c.vocab_size))
            loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
        counted = (targets.reshape(N, K) >= 0).sum(0).clamp(min=1)  # (K,)
        nats = loss.float().view(A, N, K).sum(1) / counted  # (A, K)
        objective = nats.sum() if K == 1 else sum(0.5 ** k * nats[:, k].sum() for k in range(K))
        return objective, nats.detach()

    def for_inference(self):
        """Drops all classifiers but the last layer's first target's, in place; returns self. Load weights first."""
        def keep(parameters):
            return nn.ParameterList([parameters[self.first_head]] if len(parameters) else [])
        self.heads, self.head_biases, self.target_maps = keep(self.heads), keep(self.head_biases), nn.ParameterList()
        self.mtp = nn.ModuleList()
        self.config = replace(self.config, n_targets=1, intermediate_losses=False, mtp_depth=0)
        return self

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None, snapshots=0):
        """An empty Cache for batch_size rows of max_length positions, or of any number past a sliding `window`.

        With short_conv there are as many caches again, of the convolutions' inputs, after those of the mixers; with
        documents one more. device and dtype default to the parameters', or to autocast's type inside autocast.
        snapshots: as Cache says. Raises as KVCache does.
        """
        device = self.embed.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed.dtype
        layers = [block.mixer.new_cache(batch_size, max_length, window, device, dtype) for block in self.blocks]
        layers += [block.conv.new_cache(batch_size, max_length, beside, device, dtype)
                   for block, beside in zip(self.blocks, layers) if block.conv is not None]
        if self.documents is not None:
            layers.append(self.documents.new_cache(batch_size, max_length, window, device, dtype))
        return Cache(layers, window, snapshots)

    def new_memory(self, batch_size):
        """An empty Memory for batch_size streams. Raises ValueError where no layer carries anything on."""
        if not self.config.carries:
            raise ValueError(f"mixer {self.config.mixer!r} carries nothing from one segment to the next: only "
                             f"{', '.join(CARRY)} do")
        parts = [block.mixer for block in self.blocks] + [block.conv for block in self.blocks if block.conv is not None]
        parts += [] if self.documents is None else [self.documents]
        hidden = any(block.keeps_hidden or block.conv is not None for block in self.blocks)
        kind = "hidden states" if hidden else None
        return Memory((part.new_memory(batch_size, self.embed.device, self.embed.dtype) for part in parts),
                      kind if self.documents is None else "states of documents")

    def balance_experts(self):
        """After an optimiser step: moves the biases of experts."""
        for module in self.modules():
            if hasattr(module, "balance"):
                module.balance(self.usage)

    def n_params(self):
        """Parameters, each counted once."""
        return sum(p.numel() for p in self.parameters())

    def n_active_params(self):
        """Parameters that one position uses: all but those of experts that it did not choose."""
        return self.n_params() - sum(module.idle for module in self.modules() if hasattr(module, "balance"))

    def flops_per_token(self, T, active=None):
        """Floating-point operations of forward and backward per token, at T positions: 6 P + 3 sum of what mixers say.

        P: parameters in matrix products, the active layers' classifiers included (a shared one counts once per use),
        and of experts those that a position uses. A frozen one has no gradient: 2 less.
        """
        c = self.config
        A = 1 if not c.intermediate_losses else c.n_layer if active is None else len(active)
        hidden = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        maps = c.n_embd * c.n_embd * (c.n_targets - 1) if c.target_heads == "shared" else 0
        heads = (A * c.n_targets + c.mtp_depth) * c.vocab_size * c.n_embd + A * maps
        spared = 2 * (hidden + heads + self.n_active_params() - self.n_params()) if c.lora_rank else 0
        return 6 * (hidden + heads) - spared + 3 * sum(m.flops(T) for m in self.modules() if hasattr(m, "flops"))


def build_model(config, weights=None):
    """The Transformer of a config, or Pyramid. weights: a state dict, with lora_rank that of the base, whose tensors
    become the model's in place of what was drawn."""
    model = variant("models.pyramid:Pyramid")(config) if config.shorten > 1 else Transformer(config)
    if weights is not None:
        model.load_state_dict(weights, assign=True)  # two copies of a large model may be one too many
    return variant("models.low_rank:adapt")(model) if config.lora_rank else model


def equal_ff_mult(config):
    """The ff_mult at which a model of this config comes nearest in parameters to the same one with mixer "full" and ff
    "mlp". Raises ValueError where no layer has a feed-forward."""
    if set(config.ffs) == {"none"}:
        raise ValueError("with ff 'none' no layer has a feed-forward whose width could make up for other parameters")

    def size(**settings):
        try:
            with torch.device("meta"):  # shapes only: nothing is drawn, nothing allocated
                return build_model(replace(config, ff_width=None, expert_width=None, **settings)).n_params()
        except ValueError:  # too narrow
            return 0

    def off(width):  # in features of a plain feed-forward's width
        return size(ff_mult=width / C) - target
    C, step = config.n_embd, 12 if config.activation in GLU else 1
    target = size(mixer="full", n_kv_head=config.n_head, ff="mlp", activation="gelu", shorten=1)
    width = bisect_left(range(16 * C), 0, lo=1, key=off)
    return min((w for w in (width, width - step) if w >= step), key=lambda w: abs(off(w))) / C


def make_ropes(config):
    """{str(width): Rope} of the widths that turn in this model, as a ModuleDict."""
    c, widths = config, set()
    if c.positions == "rope":
        widths = {c.rope_dim if kind == "mla" else c.head_dim for kind in c.mixers if kind not in RECURRENT}
    return nn.ModuleDict({str(width): Rope(width, c.rope_base, c.block_size, c.rope_scaling, c.rope_factor,
                                           c.rope_original or max(1, round(c.block_size / c.rope_factor)), c.rope_ramp,
                                           c.rope_mscale, c.turning)
                          for width in sorted(widths)})


def softcap(x, cap):
    """x of any shape to cap tanh(x / cap), between -cap and cap (Gemma Team 2024, "Gemma 2", section 2, logit
    soft-capping; after Bello et al. 2016): near 0 x itself."""
    return cap * torch.tanh(x / cap)


def stablemax(x):
    """x (..., V) to sign(x) ln(1 + |x|), float64: its softmax is StableMax, s(x) / sum s with s(x) = x + 1 for x >= 0
    and 1 / (1 - x) below (Prieto et al. 2025), whose gradient does not vanish where x grows."""
    x = x.double()
    below = x < 0  # not by relu and clamp, whose gradients at 0 differ between versions of torch: here it is 1
    return torch.log1p(x.masked_fill(below, 0)) - torch.log1p((-x).masked_fill(~below, 0))


def batched_linear(h, weights, groups, biases=None):
    """h (A, M, C) times weights, `groups` sets of (O, C) each, stacked: (A, M, O in a set); groups is A or 1."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (groups O, C)
    bias = None if biases is None else torch.cat(biases)  # (groups O,)
    if groups == 1:
        return F.linear(h, weight, bias)
    weight = weight.view(groups, -1, h.size(2)).mT  # (groups, C, O)
    return torch.bmm(h, weight) if bias is None else torch.baddbmm(bias.view(groups, 1, -1), h, weight)


RULES = {  # each parameter's name must match exactly one; the rule initialises it, and is its role for the optimiser
    "embedding": r"(.+\.)?embed",
    "position": r"(.+\.)?position",
    "matrix": r"(.+\.)?(qkv|q|kv|up|join|into|router)\.weight",
    "residual": r"(.+\.)?(out|down)\.weight",
    "head": r"(.+\.)?heads\.\d+|target_maps\.\d+",
    "gain": r"(.+\.)?\w*norm\d?\.gain",
    "bias": r"(.+\.)?(\w*norm\d?|qkv|q|kv|up|join|into|router|out|down)\.bias|(.+\.)?head_biases\.\d+",
}


def module_roles(model):
    """{name: role} of the parameters that their modules claim, and fill."""
    return {f"{place}.{name}".lstrip("."): role for place, module in model.named_modules()
            for name, role in getattr(module, "roles", {}).items()}


def parameter_roles(model):
    """{name: role} of every parameter, for the optimiser.

    Roles: "embedding" (also the tied classifier), "position", "matrix" (hidden 2-D), "residual" (hidden 2-D that writes
    into the stream), "head" (classifiers, and the maps before a shared one), "gain", "bias".
    Raises ValueError for a parameter that not exactly one rule, or its module, claims.
    """
    by_module, roles = module_roles(model), {}
    for name, _ in model.named_parameters():
        claims = [rule for rule, words in RULES.items() if re.fullmatch(words, name)]
        claims += [by_module[name]] if name in by_module else []
        if len(claims) != 1:
            raise ValueError(f"parameter {name} needs exactly one rule, but {' and '.join(claims) or 'none'} claims it")
        roles[name] = claims[0]
    return roles


def fused_rows(model):
    """{name: (rows, ...)}: matrices that hold several, one below the other (query, key, value; the halves of a GLU)."""
    found = {f"{place}.{name}": rows for place, module in model.named_modules()
             for name, rows in getattr(module, "fused", {}).items()}
    known = {name for name, _ in model.named_parameters()}
    return {name if name in known else f"{name}.weight": rows for name, rows in found.items()}


@torch.no_grad()
def initialise(model):
    """Fills every parameter by its role, drawing from the global CPU generator; those of modules as these say.

    Biases 0, gains 1; positions and classifiers N(0, 0.02) under every `init`, embeddings too, but N(0, 1) under "zero"
    unless tied; target maps the identity. Hidden matrices: "gpt2" N(0, 0.02), those that write into the stream divided
    by sqrt(2 n_layer) (Radford et al. 2019); "normal" N(0, 0.02); "xavier" uniform within sqrt(6 / (fan_in + fan_out))
    (Glorot & Bengio 2010), each part of a fused matrix by itself; "tfixup" as xavier, with values, outputs and
    feed-forwards times 0.67 n_layer^-0.25, and embeddings N(0, C^-0.5) times (9 n_layer)^-0.25 (Huang et al. 2020, the
    encoder's rule); "truncated" N(0, C^-0.5) cut at two standard deviations; "zero" N(0, fan_in^-0.5), those that write
    into the stream zero. N(0, s): of standard deviation s. Under "mup" 0.02 of hidden matrices is that of the base
    width, divided by the root of the width factor.
    """
    c, roles, by_module, fused = model.config, parameter_roles(model), module_roles(model), fused_rows(model)
    hidden = 0.02 / math.sqrt(getattr(c, "width_factor", 1.0))  # other models' configs have none
    for name, p in model.named_parameters():
        role = roles[name]
        if name in by_module:
            continue
        if role in ("gain", "bias"):
            p.fill_(float(role == "gain"))
        elif name.startswith("target_maps"):
            nn.init.eye_(p)
        elif role == "embedding" and c.init == "tfixup":
            p.normal_(0, c.n_embd ** -0.5).mul_((9 * c.n_layer) ** -0.25)
        elif role in ("embedding", "position", "head"):
            p.normal_(0, 1.0 if role == "embedding" and c.init == "zero" and not c.tie_weights else 0.02)
        elif c.init in ("xavier", "tfixup"):
            parts = p.split(fused.get(name, (p.size(0),)))
            for part in parts:
                nn.init.xavier_uniform_(part)
            if c.init == "tfixup":
                (p if ".ff." in name or role == "residual" else parts[-1]).mul_(0.67 * c.n_layer ** -0.25)
        elif c.init == "truncated":
            std = c.n_embd ** -0.5
            nn.init.trunc_normal_(p, 0, std, -2 * std, 2 * std)
        elif c.init == "zero":
            p.zero_() if role == "residual" else p.normal_(0, p.size(1) ** -0.5)
        else:
            p.normal_(0, hidden / math.sqrt(2 * c.n_layer) if (c.init, role) == ("gpt2", "residual") else hidden)
    for module in model.modules():
        for name, start in getattr(module, "starts", {}).items():
            getattr(module, name).fill_(start)
        if getattr(module, "roles", None) and hasattr(module, "init_weights"):
            module.init_weights()


def from_checkpoint(checkpoint, weights="raw"):
    """The Transformer of a checkpoint from nanolab.run.load_checkpoint, on the CPU, with its raw or its "ema" weights,
    adapters merged into them; from here on this process goes by the kernels that it was trained with.

    Raises ValueError where the checkpoint holds no such weights, or not those of a Transformer of this version.
    """
    if weights == "ema" and not checkpoint.get("ema"):
        raise ValueError("there are no averaged weights: the run had ema_decay 0")
    try:
        model = build_model(TransformerConfig.from_settings(
            {**checkpoint["settings"], "vocab_size": checkpoint.get("vocab_size", 256)}))
        kernels.use(model.config.kernels)
        model.load_state_dict(checkpoint["model"])
        if weights == "ema":
            model.load_state_dict({**checkpoint["model"], **checkpoint["ema"]["weights"]})
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(map(str.strip, str(error).splitlines()[:2]))       # the first tensor that does not fit
        raise ValueError(f"the checkpoint does not hold a Transformer of this version: {reason}") from error
    return variant("models.low_rank:merge")(model) if model.config.lora_rank else model
