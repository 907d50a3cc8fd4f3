"""The models: a pre-norm decoder over bytes with one setting per variant.

Shapes: B batch, T queries or time, S keys, C width, H heads, D head size, V vocabulary, N = B T positions, A layers
whose loss counts, K targets per position. Queries, keys and values are (B, H, T, D) inside attention.
A setting that cannot be is a ValueError with one sentence.
"""
import math
import re
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from cache import Cache, KVCache

CHOICES = {
    "norm": ("layer", "rms"),
    "activation": ("gelu", "relu", "relu2", "solu", "swiglu"),
    "positions": ("learned", "learned_per_layer", "rope", "none"),
    "init": ("gpt2", "normal", "xavier", "zero"),
    "target_heads": ("own", "shared"),
    "layer_heads": ("own", "shared"),
    "attention": ("auto", "sdpa", "manual"),
}


@dataclass
class TransformerConfig:
    """Every setting of a Transformer. Raises ValueError with one sentence where settings cannot go together."""

    vocab_size: int = 256
    n_layer: int = 12
    n_head: int = 8
    n_kv_head: int = None  # None: n_head; fewer share keys and values among groups of heads (Ainslie et al. 2023)
    head_dim: int = None  # None: n_embd / n_head; otherwise free
    n_embd: int = 512
    block_size: int = 512
    ff_mult: float = 4.0  # feed-forward width / n_embd; swiglu takes 2/3 of it (a multiple of 8): equal parameters
    dropout: float = 0.0  # of embeddings, attention probabilities and branch outputs
    norm: str = "layer"
    norm_gain: bool = True  # False: norms without parameters
    bias: bool = True  # of linear layers and LayerNorm; RMSNorm has none
    activation: str = "gelu"
    positions: str = "learned"
    rope_base: float = 10000.0
    residual_scale: float | str = 1.0  # multiplies every branch's output; "depth": 1 / sqrt(2 n_layer)
    init: str = "gpt2"
    qk_norm: bool = False  # RMSNorm without parameters on queries and keys, per head
    tie_weights: bool = False  # the classifier is the embedding
    n_targets: int = 1  # bytes predicted ahead
    target_heads: str = "own"  # "shared": one classifier, later targets read through an own C x C matrix
    layer_heads: str = "own"  # "own": every layer whose loss is used has own classifiers; "shared": the last layer's
    head_bias: bool = False
    intermediate_losses: bool = False
    attention: str = "auto"  # "auto": SDPA, but by hand when training on a CPU in bfloat16

    @classmethod
    def from_settings(cls, settings):
        """Picks the fields by name from a dict of settings; other names are ignored."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but can be {', '.join(allowed)}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "n_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: set head_dim too")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim < 1:
            raise ValueError(f"head_dim is {self.head_dim}, but must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"positions 'rope' turns pairs of features: head_dim {self.head_dim} must be even")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base is {self.rope_base}, but must be above 0")
        if self.ff_width < 1:
            raise ValueError(f"ff_mult {self.ff_mult} leaves no feed-forward width at n_embd {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1")
        if isinstance(self.residual_scale, str) and self.residual_scale != "depth":
            raise ValueError(f"residual_scale is {self.residual_scale!r}, but can be a number or 'depth'")
        if self.tie_weights and self.n_classifiers > 1:
            raise ValueError(f"tie_weights needs one classifier, not {self.n_classifiers}: set target_heads and "
                             "layer_heads to 'shared', or n_targets to 1 and intermediate_losses off")

    @property
    def ff_width(self):
        """Width of the feed-forward's hidden layer."""
        width = self.ff_mult * self.n_embd
        return 8 * round(width / 12) if self.activation == "swiglu" else int(width)

    @property
    def n_head_groups(self):
        """Sets of classifiers: one, or one per layer."""
        return self.n_layer if self.intermediate_losses and self.layer_heads == "own" else 1

    @property
    def n_classifiers(self):
        """Classifiers in all."""
        return self.n_head_groups * (self.n_targets if self.target_heads == "own" else 1)


def active_layers(step, max_steps, n_layer):
    """0-based indices of the layers whose losses count at `step` (steps done so far, of max_steps), as a tuple.

    Al-Rfou et al. 2018, section "Intermediate Layer Losses": layer l of n (from 1) stops after the fraction l / (2n) of
    training, so that all but the last are gone at half time; the last never stops. Their text adds an interval between
    two stops for 64 layers and 4M steps, 62.5K steps, that contradicts the rule: 4M / (2 * 64) is 31.25K. The
    rule is what is done here.
    """
    return tuple(l - 1 for l in range(1, n_layer + 1) if l == n_layer or 2 * n_layer * step < l * max_steps)


class Positions:
    """Where the T inputs of one forward pass stand. Made once per pass and given to every mixer.

    start: the position of the first input, where all rows stand alike and inputs are consecutive (index None).
    index: (B, T) int64 where rows are ragged; -1 marks padding. window: positions a query sees; None: all before it.
    cos, sin: RoPE's tables at these places, (1 or B, T, 1, D) float32, or None.
    """

    def __init__(self, start, T, index=None, window=None, cos=None, sin=None):
        self.start, self.T, self.index, self.window, self.cos, self.sin = start, T, index, window, cos, sin
        self._made = None

    def look_up(self, table):
        """Rows of a learned table (P, C) at these places: (T, C), or (B, T, C) where ragged; padding takes row 0."""
        if self.index is None:
            return table[self.start:self.start + self.T]
        return F.embedding(self.index.clamp(min=0), table)

    def mask(self, S, seen, device):
        """Which of S keys each query may see: None (all), "causal", or a bool mask ((B, 1,) T, S), True where allowed.

        seen: (B, S) int64, the keys' positions, or None where all rows stand alike and the keys end at the last query.
        Allowed: (k <= q), not padding unless q is padding itself, and (k > q - window). Every layer sees the same keys,
        so the first layer's mask serves all.
        """
        if self._made is None or self._made[0] != S:
            self._made = (S, self._make_mask(S, seen, device))
        return self._made[1]

    def _make_mask(self, S, seen, device):
        T, W = self.T, self.window
        if seen is None:
            if T == 1:  # the cache shows a lone query what is in its window and no more
                return None
            if S == T and (W is None or S <= W):
                return "causal"
            k = torch.arange(S, device=device)
            q = k[S - T:, None]  # (T, 1)
            allowed = k <= q  # (T, S)
        else:
            k = seen[:, None, None, :]  # (B, 1, 1, S)
            q = self.index[:, None, :, None]  # (B, 1, T, 1)
            allowed = (k <= q) & ((k >= 0) | (q < 0))  # (B, 1, T, S)
        return allowed if W is None else allowed & (k > q - W)


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021): feature pairs (i, i + D/2) turn by position * base^(-2i/D).

    Angles are computed in float64 and kept as float32 tables that grow with the positions asked for; not saved.
    One Rope serves all layers.
    """

    def __init__(self, head_dim, base, n):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._build(n, "cpu")

    def _build(self, n, device):
        with torch.inference_mode(False):  # these tables must serve training too, whoever asks for them first
            half = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
            angle = torch.outer(torch.arange(n, dtype=torch.float64, device="cpu"), self.base ** -half)  # (n, D/2)
            self.cos = torch.cat((angle.cos(), angle.cos()), 1).float().to(device)  # (n, D)
            self.sin = torch.cat((-angle.sin(), angle.sin()), 1).float().to(device)  # (n, D), signed for `turn`

    def forward(self, n):
        """The tables (>= n, D), for positions 0 to n - 1 at least."""
        if n > self.cos.size(0) or self.cos.dtype != torch.float32:  # model.to(bfloat16) spoils the tables
            self._build(max(n, 2 * self.cos.size(0)) if n > self.cos.size(0) else self.cos.size(0), self.cos.device)
        return self.cos, self.sin


def turn(x, cos, sin):
    """Rotates x (B, T, H, D) by the tables of Positions, in float32; returns float32."""
    x = x.float()
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin)  # (B, T, H, D)


def rms_norm(x, gain=None, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times gain (Zhang & Sennrich 2019)."""
    if x.requires_grad and x.device.type == "cpu":  # F.rms_norm has no fused backward there: 2.4 times slower
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.size(-1)
        x = x * torch.rsqrt(mean + eps).to(x.dtype)
        return x if gain is None else x * gain
    return F.rms_norm(x, (x.size(-1),), gain, eps)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with a learned gain and bias or without."""

    def __init__(self, kind, width, gain, bias):
        super().__init__()
        self.kind, self.width = kind, width
        self.gain = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if gain and bias and kind == "layer" else None

    def forward(self, x):
        """x (..., width) to the same shape and type."""
        if self.kind == "rms":
            return rms_norm(x, self.gain)
        return F.layer_norm(x, (self.width,), self.gain, self.bias)


class Linear(nn.Linear):
    """nn.Linear that leaves its parameters to `initialise`, which claims each of them."""

    def forward(self, x):
        """x (..., in) to (..., out). Reads its parameters past nn.Module's look-up, which a decoded byte feels."""
        return F.linear(x, self._parameters["weight"], self._parameters["bias"])

    def reset_parameters(self):
        """Draws nothing."""


def attend_by_hand(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(D)) v with the softmax in float32; what SDPA computes, in steps.

    q (B, H, T, D); k, v (B, H or fewer, S, D); mask as Positions.mask gives it. Returns (B, H, T, D).
    Under bfloat16 on a CPU forward and backward are 2 to 4 times faster than SDPA's.
    """
    B, H, T, D = q.shape
    S = k.size(2)
    if k.size(1) != H:
        k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))  # (B, H, S, D)
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    with torch.autocast(q.device.type, enabled=False):  # softmax of bfloat16 already works in float32 inside
        scores = (q * D ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        p = torch.softmax(scores, -1)
        if dropout:
            p = F.dropout(p, dropout)
        return p @ v


class Attention(nn.Module):
    """Causal self-attention with one fused projection and n_kv_head <= n_head groups of keys and values.

    With qk_norm, queries and keys pass an RMSNorm without parameters before they turn; RoPE keeps lengths, so after
    would be the same.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.qkv = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.bias)
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)

    def forward(self, x, positions, cache=None):
        """x (B, T, C), positions a Positions, cache a KVCache or None. Returns (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        H, G = c.n_head, c.n_kv_head
        qkv = self.qkv(x).view(B, T, H + 2 * G, c.head_dim)  # (B, T, H + 2 G, D)
        if not c.qk_norm and positions.cos is None:
            q, k, v = qkv.transpose(1, 2).split((H, G, G), 1)  # (B, H, T, D), (B, G, T, D) twice
        else:
            qk, v = qkv.split((H + G, G), 2)
            if c.qk_norm:
                qk = rms_norm(qk)
            if positions.cos is not None:
                qk = turn(qk, positions.cos, positions.sin).to(v.dtype)
            q, k = qk.transpose(1, 2).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
            v = v.transpose(1, 2)  # (B, G, T, D)
        seen = positions.index
        if cache is not None:
            k, v, seen = cache.update(k, v, positions.index)
            q = q.to(k.dtype)
        y = self.attend(q, k, v, positions.mask(k.size(2), seen, x.device))
        return self.out(y.transpose(1, 2).reshape(B, T, H * c.head_dim).to(x.dtype))  # (B, T, C)

    def attend(self, q, k, v, mask):
        """q (B, H, T, D), k and v (B, G, S, D), mask as Positions.mask gives it. Returns (B, H, T, D)."""
        c = self.config
        dropout = c.dropout if self.training else 0.0
        by_hand = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16
        if c.attention == "manual" or c.attention == "auto" and by_hand:
            return attend_by_hand(q, k, v, mask, dropout)
        if mask is None and q.size(2) == 1 and c.n_kv_head < c.n_head:  # one query: its group's heads act as queries
            q = q.reshape(q.size(0), c.n_kv_head, -1, c.head_dim)  # (B, G, H/G, D)
            return F.scaled_dot_product_attention(q, k, v, None, dropout).reshape(q.size(0), c.n_head, 1, c.head_dim)
        causal = isinstance(mask, str)
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal,
                                              enable_gqa=c.n_kv_head < c.n_head)


def gelu(x):
    """x Phi(x), exact (Hendrycks & Gimpel 2016)."""
    if x.requires_grad or x.device.type != "cpu" or x.numel() > 65536:
        return F.gelu(x)
    h = 0.5 * x  # one decoded byte: the call into oneDNN costs more than these four small ones
    return torch.addcmul(h, h, torch.erf(x * 0.5 ** 0.5))


class FeedForward(nn.Module):
    """Two linear layers around an activation.

    relu2: relu(x)^2 (So et al. 2021). solu: x softmax(x) over the width, then a LayerNorm (Elhage et al. 2022).
    swiglu: silu(a) b of two halves (Shazeer 2020), at 2/3 of the width.
    """

    def __init__(self, config):
        super().__init__()
        c, width = config, config.ff_width
        self.activation = c.activation
        self.up = Linear(c.n_embd, 2 * width if c.activation == "swiglu" else width, bias=c.bias)
        self.down = Linear(width, c.n_embd, bias=c.bias)
        if c.activation == "solu":
            self.norm = Norm("layer", width, c.norm_gain, c.bias)

    def forward(self, x):
        """x (B, T, C) to (B, T, C)."""
        x = self.up(x)
        if self.activation == "gelu":
            x = gelu(x)
        elif self.activation == "relu":
            x = F.relu(x)
        elif self.activation == "relu2":
            x = F.relu(x).square()
        elif self.activation == "solu":
            x = self.norm(x * torch.softmax(x, -1, dtype=torch.float32).to(x.dtype))
        else:
            a, b = x.chunk(2, -1)
            x = F.silu(a) * b
        return self.down(x)


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + ff(norm(x)), each branch scaled, after its own position table if any."""

    def __init__(self, config):
        super().__init__()
        c = config
        own = c.positions == "learned_per_layer"
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if own else None
        self.norm1 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.mixer = Attention(c)
        self.norm2 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.ff = FeedForward(c)
        self.dropout = c.dropout
        self.scale = (2 * c.n_layer) ** -0.5 if c.residual_scale == "depth" else c.residual_scale

    def forward(self, x, positions, cache=None):
        """x (B, T, C) to (B, T, C)."""
        if self.position is not None:
            x = x + positions.look_up(self.position)
        x = self.add(x, self.mixer(self.norm1(x), positions, cache))
        return self.add(x, self.ff(self.norm2(x)))

    def add(self, x, branch):
        """The stream and a branch's output, both (B, T, C): x + scale * dropout(branch)."""
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        return x + branch if self.scale == 1 else torch.add(x, branch, alpha=self.scale)


class Transformer(nn.Module):
    """A pre-norm decoder with as many classifiers as its losses need.

    With intermediate_losses, every layer predicts every target (Al-Rfou et al. 2018); one final norm serves all layers.
    Target k (bytes k + 1 ahead) weighs 0.5^k. Initialisation draws from the global CPU generator.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.n_embd))
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.rope = Rope(c.head_dim, c.rope_base, c.block_size) if c.positions == "rope" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)

        def table(n, *shape):
            return nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(n))
        self.heads = table(0 if c.tie_weights else c.n_classifiers, c.vocab_size, c.n_embd)
        self.head_biases = table(c.n_classifiers if c.head_bias else 0, c.vocab_size)
        n_maps = c.n_targets - 1 if c.target_heads == "shared" else 0
        self.target_maps = table(c.n_head_groups * n_maps, c.n_embd, c.n_embd)
        initialise(self)

    def forward(self, x, targets=None, active=None, positions=None, cache=None):
        """Logits, or the losses of all active layers and targets at once.

        x: (B, T) int64. targets: (B, T, n_targets) int64. active: 0-based layers whose losses count, the last among
        them; None: all with intermediate_losses, else the last. positions: None or (T,) int64 (consecutive, all rows
        alike), or (B, T) int64 with -1 for padding. cache: from `new_cache`; positions None go on where it ends.

        Without targets returns logits (B, T, V) float32 of the last layer's first target. With targets returns
        (objective, nats): objective, a scalar with gradient, sums over active layers and targets 0.5^k times the mean
        loss; nats (A, n_targets) float32, detached, are those means in nats per target, the last row's first the loss
        of the model. Raises ValueError for positions past a learned table, and for shapes or layers that do not fit.
        """
        places = self.place(x, positions, cache)
        if targets is not None:
            active = self.check_losses(x, targets, active)
        x = F.embedding(x, self.embed)  # (B, T, C)
        if self.position is not None:
            x = x + places.look_up(self.position)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        states = []
        for layer, block in enumerate(self.blocks):
            x = block(x, places, None if cache is None else cache.layers[layer])
            if targets is not None and layer in active:
                states.append(x)
        if targets is not None:
            return self.losses(states, targets, active)
        bias = self.head_biases[self.first_head] if len(self.head_biases) else None
        return F.linear(self.norm(x), self.classifier(self.first_head), bias).float()

    def place(self, x, positions, cache):
        """The Positions of inputs x (B, T): checks them, and looks up RoPE's tables once for all layers."""
        c = self.config
        B, T = x.shape
        index, start = None, 0 if cache is None else cache.length
        if positions is not None and positions.dim() == 1:
            first = int(positions[0])
            if positions.numel() != T or int(positions[-1]) != first + T - 1:
                raise ValueError(f"positions (T,) must be {T} consecutive ones; rows of their own need (B, T)")
            if cache is not None and first != start:
                raise ValueError(f"positions start at {first}, but the cache ends at {start}: crop it, or pass (B, T)")
            start = first
        elif positions is not None:
            if positions.shape != x.shape:
                raise ValueError(f"positions are {tuple(positions.shape)}, but the input is {(B, T)}")
            index = positions
        if index is None and cache is not None and cache.ragged:
            index = cache.next_positions(T)
        if index is not None and cache is not None and cache.window is not None and not cache.in_order(index):
            raise ValueError("a sliding cache needs rows padded on the left: each row's positions must never fall")
        end = start + T if index is None else int(index.max()) + 1
        if end > c.block_size and c.positions.startswith("learned"):
            raise ValueError(f"position {end - 1} is past block_size {c.block_size}, where positions {c.positions!r} "
                             "has no row: use positions 'rope' or 'none', or a larger block_size")
        places = Positions(start, T, index, None if cache is None else cache.window)
        if self.rope is not None:
            tables = self.rope(max(end, 1))
            places.cos, places.sin = (places.look_up(t).view(-1, T, 1, c.head_dim) for t in tables)  # (1 or B, T, 1, D)
        return places

    def check_losses(self, x, targets, active):
        """The active layers as a tuple. Raises ValueError where they or the targets do not fit the model."""
        c = self.config
        if targets.shape != (*x.shape, c.n_targets):
            raise ValueError(f"targets are {tuple(targets.shape)}, but (B, T, n_targets) is {(*x.shape, c.n_targets)}")
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
        """The i-th classifier's weight (V, C)."""
        return self.embed if self.config.tie_weights else self.heads[i]

    def losses(self, states, targets, active):
        """All active layers' and targets' losses by one matrix product and one cross-entropy; as `forward` returns.

        states: A hidden states (B, T, C), targets (B, T, K).
        """
        c = self.config
        A, K, N = len(states), c.n_targets, targets.size(0) * targets.size(1)
        groups = active if c.n_head_groups > 1 else (0,)
        h = states[0].unsqueeze(0) if A == 1 else torch.stack(states)
        h = self.norm(h).reshape(A, N, c.n_embd)  # (A, N, C)
        if len(self.target_maps):
            maps = [self.target_maps[g * (K - 1) + k] for g in groups for k in range(K - 1)]
            far = batched_linear(h, maps, len(groups))  # (A, N, (K - 1) C)
            h = torch.cat((h.to(far.dtype), far), -1).view(A, N * K, c.n_embd)  # (A, N K, C)
        per_group = c.n_classifiers // c.n_head_groups
        used = [g * per_group + i for g in groups for i in range(per_group)]
        biases = [self.head_biases[i] for i in used] if c.head_bias else None
        logits = batched_linear(h, [self.classifier(i) for i in used], len(groups), biases)  # (A, N, K V), (A, N K, V)
        labels = targets.reshape(1, N * K).expand(A, N * K).reshape(A * N * K)
        loss = F.cross_entropy(logits.view(A * N * K, c.vocab_size).float(), labels, reduction="none")
        nats = loss.view(A, N, K).mean(1)  # (A, K)
        objective = nats.sum() if K == 1 else sum(0.5 ** k * nats[:, k].sum() for k in range(K))
        return objective, nats.detach()

    def for_inference(self):
        """Drops all classifiers but the last layer's first target's, in place; returns self. Load weights first."""
        def keep(parameters):
            return nn.ParameterList([parameters[self.first_head]] if len(parameters) else [])
        self.heads, self.head_biases, self.target_maps = keep(self.heads), keep(self.head_biases), nn.ParameterList()
        self.config = replace(self.config, n_targets=1, intermediate_losses=False)
        return self

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        """An empty Cache for batch_size rows of max_length positions, or of any number past a sliding `window`.

        device and dtype default to the parameters', or to autocast's type inside autocast. Raises as KVCache does.
        """
        c = self.config
        device = self.embed.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed.dtype
        return Cache(KVCache(batch_size, c.n_kv_head, c.head_dim, max_length, window, device, dtype)
                     for _ in self.blocks)

    def n_params(self):
        """Parameters in all, each counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T, active=None):
        """Floating-point operations of forward and backward per token, at T positions: 6 P + 12 L H D T.

        P: parameters in matrix products, those of the active layers' classifiers included (a shared classifier counts
        once per use); the second term is attention's scores and sums, uncut by the causal mask.
        """
        c = self.config
        A = 1 if not c.intermediate_losses else c.n_layer if active is None else len(active)
        hidden = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        maps = c.n_embd * c.n_embd * (c.n_targets - 1) if c.target_heads == "shared" else 0
        heads = A * (c.n_targets * c.vocab_size * c.n_embd + maps)
        return 6 * (hidden + heads) + 12 * c.n_layer * c.n_head * c.head_dim * T


def batched_linear(h, weights, groups, biases=None):
    """h (A, M, C) times weights, `groups` sets of (O, C) each, stacked: (A, M, O in a set); groups is A or 1."""
    def stack(parts):
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts).view(groups, -1, *parts[0].shape[1:])
    weight = stack(weights)  # (groups, O, C)
    bias = None if biases is None else stack(biases)  # (groups, O)
    if groups == 1:
        return F.linear(h, weight[0], None if bias is None else bias[0])
    if bias is None:
        return torch.bmm(h, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))


RULES = {  # each parameter's name must match exactly one; the rule initialises it, and is its role for the optimiser
    "embedding": r"embed",
    "position": r"position|blocks\.\d+\.position",
    "matrix": r"blocks\.\d+\.(mixer\.qkv|ff\.up)\.weight",
    "residual": r"blocks\.\d+\.(mixer\.out|ff\.down)\.weight",
    "head": r"heads\.\d+",
    "target_map": r"target_maps\.\d+",
    "gain": r"(.+\.)?norm\d?\.gain",
    "bias": r"(.+\.)?(norm\d?|qkv|out|up|down)\.bias|head_biases\.\d+",
}


def parameter_rules(model):
    """{name: the one rule of RULES that claims the parameter}. Raises ValueError where none or several do."""
    claimed = {}
    for name, _ in model.named_parameters():
        claims = [rule for rule, pattern in RULES.items() if re.fullmatch(pattern, name)]
        if len(claims) != 1:
            raise ValueError(f"parameter {name} needs exactly one rule, but {' and '.join(claims) or 'none'} claims it")
        claimed[name] = claims[0]
    return claimed


def parameter_roles(model):
    """{name: role} of every parameter, for the optimiser.

    Roles: "embedding" (also the tied classifier), "position", "matrix" (hidden 2-D), "residual" (hidden 2-D that writes
    into the stream), "head" (classifiers, and the maps before a shared one), "gain", "bias".
    Raises ValueError for a parameter that not exactly one rule claims.
    """
    return {name: "head" if rule == "target_map" else rule for name, rule in parameter_rules(model).items()}


def fused_rows(model):
    """{name: (rows, ...)}: matrices that hold several side by side (query, key, value; the halves of swiglu)."""
    c, found = model.config, {}
    for i in range(c.n_layer):
        found[f"blocks.{i}.mixer.qkv.weight"] = tuple(n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head))
        if c.activation == "swiglu":
            found[f"blocks.{i}.ff.up.weight"] = (c.ff_width, c.ff_width)
    return found


@torch.no_grad()
def initialise(model):
    """Fills every parameter by its rule, drawing from the global CPU generator. Biases 0, gains 1.

    Positions and classifiers are N(0, 0.02) under every `init`, embeddings too, but "zero" has N(0, 1) unless tied:
    the stream starts at the scale at which the branches come to write. Target maps start as the identity. Hidden
    matrices: "gpt2" N(0, 0.02), those that write into the stream divided by sqrt(2 n_layer) (Radford et al. 2019);
    "normal" N(0, 0.02); "xavier" uniform within sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010), each part of a
    fused matrix by itself; "zero" N(0, fan_in^-0.5), those that write into the stream zero. N(0, s): of
    standard deviation s.
    """
    init, depth, fused = model.config.init, model.config.n_layer, fused_rows(model)

    def normal(p, name):
        p.normal_(0, 0.02)

    def xavier(p, name):
        for part in p.split(fused.get(name, (p.size(0),))):
            nn.init.xavier_uniform_(part)

    hidden = {
        "gpt2": (normal, lambda p, name: p.normal_(0, 0.02 / math.sqrt(2 * depth))),
        "normal": (normal, normal),
        "xavier": (xavier, xavier),
        "zero": (lambda p, name: p.normal_(0, p.size(1) ** -0.5), lambda p, name: p.zero_()),
    }
    rules = {
        "embedding": (lambda p, name: p.normal_()) if init == "zero" and not model.config.tie_weights else normal,
        "position": normal, "head": normal,
        "matrix": hidden[init][0], "residual": hidden[init][1],
        "target_map": lambda p, name: nn.init.eye_(p),
        "gain": lambda p, name: p.fill_(1), "bias": lambda p, name: p.zero_(),
    }
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model).items():
        rules[rule](parameters[name], name)


def from_checkpoint(checkpoint, weights="raw"):
    """The Transformer of a checkpoint (from experiment.load_checkpoint), on the CPU, with its raw or its "ema" weights.

    Raises ValueError where the checkpoint holds no such weights, or not those of a Transformer of this version.
    """
    if weights == "ema" and not checkpoint.get("ema"):
        raise ValueError("there are no averaged weights: the run had ema_decay 0")
    try:
        model = Transformer(TransformerConfig.from_settings(checkpoint["settings"]))
        model.load_state_dict(checkpoint["model"])
        if weights == "ema":
            model.load_state_dict({**checkpoint["model"], **checkpoint["ema"]["weights"]})
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the checkpoint does not hold a Transformer of this version: {reason}") from error
    return model
