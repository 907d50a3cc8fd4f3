"""What each class of transformers computes, in our words: the table that nanolab/hf.py writes and reads by.

FORMS has for every class what it takes, what it calls our settings and our tensors. Export reads it from left to right,
import from right to left.
"""
import math
from functools import partial
from types import SimpleNamespace

import torch

from models.rope_scaling import from_json, to_json
from nanolab.settings import UserError

GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
ALSO = {"gelu_new": "gelu_pytorch_tanh", "swish": "silu"}  # other words of theirs


# --- Settings that are more than another word: a pair of functions each, theirs of ours, and back ---

ROPE = to_json, from_json
ONE_WINDOW = (lambda c: dict(sliding_window=c.window if "window" in c.mixers else None),  # of all layers, or of none
              lambda d: dict(mixer="full") if d.get("sliding_window") is None else dict(mixer="window",
                                                                                        window=d["sliding_window"]))


def windows_out(c):
    """A window of some layers."""
    kinds = ["sliding_attention" if kind == "window" else "full_attention" for kind in c.mixers]
    some = "window" in c.mixers
    return dict(layer_types=kinds, use_sliding_window=some, sliding_window=c.window if some else None,
                max_window_layers=c.n_layer)


def windows_in(d):
    """Its fields; without layer_types those from max_window_layers on have it."""
    kinds, window, n = d.get("layer_types"), d.get("sliding_window", 4096), d["num_hidden_layers"]
    if not d.get("use_sliding_window", False) or window is None:
        return dict(mixer="full")
    if kinds is None:
        kinds = ["sliding_attention" if i >= d.get("max_window_layers", 28) else "full_attention" for i in range(n)]
    return dict(window=window, mixer=",".join("window" if kind == "sliding_attention" else "full" for kind in kinds))


def turning_layers(n, every):
    """SmolLM3's no_rope_layers: 1 is a layer that turns, the last of every so many does not. every None: all turn."""
    return [1 if every is None else int((i + 1) % every != 0) for i in range(n)]


def unturned_out(c):
    """SmolLM3: layers that do not turn."""
    every = 1 if c.positions == "none" else c.nope_interval
    return dict(to_json(c), no_rope_layers=turning_layers(c.n_layer, every), use_sliding_window=False)


def unturned_in(d):
    """Its fields; without a list every fourth does not turn."""
    n = d["num_hidden_layers"]
    turns = d.get("no_rope_layers") or turning_layers(n, d.get("no_rope_layer_interval", 4))
    every = turns.index(0) + 1 if 0 in turns[:n] else None
    if turns[:n] != turning_layers(n, every) or d.get("use_sliding_window"):
        raise UserError("no_rope_layers is read where of every so many layers the last does not turn, or all do, or "
                        "none, without use_sliding_window")
    return dict(positions="none") if every == 1 else dict(positions="rope", nope_interval=every, **from_json(d, 2e6))


def part_turns_out(c):
    """GPTNeoX, Phi: how much of a head turns; old keys beside."""
    found, D, n = to_json(c), c.head_dim, c.turning or c.head_dim
    part = next(part for part in (c.partial_rotary, n / D, math.nextafter(n / D, 2)) if int(part * D) == n)
    found["rope_parameters"]["partial_rotary_factor"] = part
    return found | dict(partial_rotary_factor=part, rotary_pct=part, rotary_emb_base=c.rope_base)


def part_turns_in(d, usual):
    """Its fields. usual: the part of its class."""
    said = d.get("rope_parameters") or d.get("rope_scaling") or {}
    part = float(said.get("partial_rotary_factor", d.get("partial_rotary_factor", d.get("rotary_pct", usual))))
    width = int(d["hidden_size"] // d["num_attention_heads"] * part)
    if width < 2 or width % 2:
        raise UserError(f"partial_rotary_factor {part:g} turns {width} features of a head, which are no pairs")
    return dict(partial_rotary=part, **from_json(d | dict(
        rope_theta=d.get("rope_theta") or d.get("rotary_emb_base"), partial_rotary_factor=None, head_dim=width,
        rope_parameters=said | dict(partial_rotary_factor=None))))


def sparse_out(c):
    """Qwen3Moe: experts in all layers but mlp_only_layers. transformers 5 calls their number num_local_experts."""
    return dict(num_experts=c.n_expert, num_local_experts=c.n_expert, norm_topk_prob=c.expert_top_k > 1,
                decoder_sparse_step=1, mlp_only_layers=[i for i, kind in enumerate(c.ffs) if kind == "mlp"])


def sparse_in(d):
    """Its fields."""
    k, every = d.get("num_experts_per_tok", 8), d.get("decoder_sparse_step", 1)
    expect_topk(d.get("norm_topk_prob", False), k)
    dense = {*(d.get("mlp_only_layers") or ())}
    kinds = ["mlp" if i in dense or (i + 1) % every else "moe" for i in range(d["num_hidden_layers"])]
    return dict(n_expert=d.get("num_local_experts", d.get("num_experts", 128)), ff=",".join(kinds))


def expect_topk(norm, k):
    """UserError where k experts' scores are not summed to 1 as here."""
    if norm != (k > 1):
        raise UserError(f"norm_topk_prob {str(norm).lower()} with {k} experts a token is not read: here scores of "
                        "several sum to 1, and a single one keeps its own")


def latent_out(c):
    """DeepseekV3: dense layers, then experts. rope_interleave: pairs of neighbours in place of halves."""
    dense = c.ffs.count("mlp")
    experts = dict(n_routed_experts=c.n_expert - c.n_shared_expert) if dense < c.n_layer else {}
    return dict(first_k_dense_replace=dense, norm_topk_prob=c.expert_top_k > 1, head_dim=c.rope_dim,
                rope_interleave=False, routed_scaling_factor=1.0, num_nextn_predict_layers=0, **experts)


def latent_in(d):
    """Its fields."""
    expect_topk(d.get("norm_topk_prob", True), d.get("num_experts_per_tok", 8))
    n, shared = d["num_hidden_layers"], d.get("n_shared_experts", 1)
    dense = min(n, d.get("first_k_dense_replace", 3))
    return dict(ff=",".join(["mlp"] * dense + ["moe"] * (n - dense)), n_expert=d.get("n_routed_experts", 256) + shared,
                expert_balance="bias")


# --- Tensors that lie otherwise: (theirs of ours, ours of theirs), each of a tensor and our config ---

def by_rows(order):
    """A pair of functions: theirs are our rows in the order that `order`, a function of the config, gives."""
    return (lambda t, c: t[order(c)]), (lambda t, c: t[order(c).argsort()])


def heads_in_turn(c):
    """kv_b_proj: of each head its keys and its values; ours are all keys, then all values."""
    return torch.arange(2 * c.n_head * c.head_dim).view(2, c.n_head, c.head_dim).transpose(0, 1).flatten()


def pairs_apart(c):
    """DiffLlama's pairs are heads i and i + H/2; ours are neighbours."""
    rows, first = [], 0
    for n in (c.n_head, c.n_kv_head, c.n_kv_head):
        rows.append(first + torch.arange(n * c.head_dim).view(n // 2, 2, c.head_dim).transpose(0, 1).flatten())
        first += n * c.head_dim
    return torch.cat(rows)


def first_turn(c):
    """GPTNeoX, Phi: of each head of queries and keys those features that turn come first, as halves, then the rest."""
    halves, n = torch.arange(c.head_dim).view(2, -1), (c.turning or c.head_dim) // 2
    heads = torch.arange((c.n_head + 2 * c.n_kv_head) * c.head_dim).view(-1, c.head_dim)
    heads[:-c.n_kv_head] = heads[:-c.n_kv_head, torch.cat((halves[:, :n].flatten(), halves[:, n:].flatten()))]
    return heads.flatten()


def first_turn_by_head(c):
    """GPTNeoX: of each head its query, key and value."""
    return first_turn(c).view(3, c.n_head, c.head_dim).transpose(0, 1).flatten()


WAYS = {None: (lambda t, c: t,) * 2, "pairs": by_rows(pairs_apart), "heads": by_rows(heads_in_turn),
        "first": by_rows(first_turn), "first, by head": by_rows(first_turn_by_head),
        "transposed": (lambda t, c: t.mT if t.dim() == 2 else t,) * 2,
        "taps": (lambda t, c: t.mT.unsqueeze(1), lambda t, c: t.squeeze(1).mT)}  # a convolution's (K, I), (I, 1, K)

# --- The table ---

# Our tensors, and theirs: # is a layer, @ an expert, (a|b) lie one below the other in ours; .weight and .bias follow.
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm", "heads.0": "lm_head.weight"}
LLAMA = {
    **TOP, "#.norm1": "input_layernorm", "#.norm2": "post_attention_layernorm",
    "#.mixer.qkv": "self_attn.(q|k|v)_proj", "#.mixer.out": "self_attn.o_proj",
    "#.mixer.q_gain": "self_attn.q_norm.weight", "#.mixer.k_gain": "self_attn.k_norm.weight",
    "#.ff.up": "mlp.(gate|up)_proj", "#.ff.down": "mlp.down_proj",
}
ARCEE = {**LLAMA, "#.ff.up": "mlp.up_proj"}
APERTUS = {**ARCEE, "#.norm1": "attention_layernorm", "#.norm2": "feedforward_layernorm"}
STARCODER = {**LLAMA, "#.ff.up": "mlp.c_fc", "#.ff.down": "mlp.c_proj"}
MIXTRAL = {**LLAMA, "#.moe.router": "block_sparse_moe.gate", "#.moe.up": "block_sparse_moe.experts.@.(w1|w3)",
           "#.moe.down": "block_sparse_moe.experts.@.w2"}
QWEN_MOE = {**LLAMA, "#.moe.router": "mlp.gate", "#.moe.up": "mlp.experts.@.(gate|up)_proj",
            "#.moe.down": "mlp.experts.@.down_proj"}
DEEPSEEK = {
    **QWEN_MOE, "#.moe.correction": "mlp.gate.e_score_correction_bias",
    "#.moe.shared.up": "mlp.shared_experts.(gate|up)_proj", "#.moe.shared.down": "mlp.shared_experts.down_proj",
    "#.mixer.into": "self_attn.q_a_proj", "#.mixer.q_norm": "self_attn.q_a_layernorm",
    "#.mixer.q": "self_attn.q_b_proj",  # q_proj without a rank
    "#.mixer.kv": "self_attn.kv_a_proj_with_mqa", "#.mixer.kv_norm": "self_attn.kv_a_layernorm",
    "#.mixer.up": ("self_attn.kv_b_proj", "heads"),
}
DIFF = {**LLAMA, "#.mixer.qkv": ("self_attn.(q|k|v)_proj", "pairs"),
        **{f"#.mixer.lambda_{end}": f"self_attn.lambda_{end}" for end in ("q1", "k1", "q2", "k2")}}
GPT2 = {
    "embed": "transformer.wte.weight", "position": "transformer.wpe.weight", "norm": "transformer.ln_f",
    "heads.0": "lm_head.weight", "#.norm1": "ln_1", "#.norm2": "ln_2",
    **{ours: (theirs, "transposed") for ours, theirs in {"#.mixer.qkv": "attn.c_attn", "#.mixer.out": "attn.c_proj",
                                                         "#.ff.up": "mlp.c_fc", "#.ff.down": "mlp.c_proj"}.items()},
}
OLMO = {**LLAMA, "#.norm1": "post_attention_layernorm", "#.norm2": "post_feedforward_layernorm"}
PHI = {**LLAMA, "norm": "model.final_layernorm", "head_biases.0": "lm_head.bias",
       "#.mixer.qkv": ("self_attn.(q|k|v)_proj", "first"), "#.mixer.out": "self_attn.dense", "#.ff.up": "mlp.fc1",
       "#.ff.down": "mlp.fc2"}
NEOX = {"embed": "gpt_neox.embed_in.weight", "norm": "gpt_neox.final_layer_norm", "heads.0": "embed_out.weight",
        "#.norm1": "input_layernorm", "#.norm2": "post_attention_layernorm",
        "#.mixer.qkv": ("attention.query_key_value", "first, by head"), "#.mixer.out": "attention.dense",
        "#.ff.up": "mlp.dense_h_to_4h", "#.ff.down": "mlp.dense_4h_to_h"}
MPT = {"embed": "transformer.wte.weight", "norm": "transformer.norm_f", "#.norm1": "norm_1", "#.norm2": "norm_2",
       "#.mixer.qkv": "attn.Wqkv", "#.mixer.out": "attn.out_proj", "#.ff.up": "ffn.up_proj",
       "#.ff.down": "ffn.down_proj"}
MAMBA = {
    "embed": "backbone.embeddings.weight", "norm": "backbone.norm_f", "heads.0": "lm_head.weight", "#.norm1": "norm",
    "#.mixer.into": "mixer.in_proj", "#.mixer.join": "mixer.x_proj", "#.mixer.out": "mixer.out_proj",
    "#.mixer.dt": "mixer.dt_proj.weight", "#.mixer.dt_bias": "mixer.dt_proj.bias",
    "#.mixer.conv": ("mixer.conv1d.weight", "taps"), "#.mixer.conv_bias": "mixer.conv1d.bias",
    "#.mixer.a_log": "mixer.A_log", "#.mixer.skip": "mixer.D",
}

# Their keys of config.json, and our settings.
KEYS = dict(vocab_size="vocab_size", hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
            num_key_value_heads="n_kv_head", head_dim="head_dim", max_position_embeddings="block_size",
            intermediate_size="ff_width", hidden_act="activation", rms_norm_eps="norm_eps",
            tie_word_embeddings="tie_weights")
BIASES = dict(attention_bias="bias", mlp_bias="bias")
MOE = dict(num_experts_per_tok="expert_top_k")

# What a class takes of ours: values, the first of which an import sets; or a function of the config that gives them.
TAKES = dict(norm=("rms",), positions=("rope",), mixer=("full",), ff=("mlp",), activation=tuple(GATES), bias=(False,),
             qk_norm=(False,), short_conv=(0,), shorten=(1,), value_residual=(False,), score_softcap=(None,),
             softmax_plus_one=(False,), norm_after=(False,), parallel_residual=(False,), partial_rotary=(1.0,),
             nope_interval=(None,), expert_top_groups=lambda c: (c.expert_groups,),
             logit_softcap=(None,), output=("softmax",), head_bias=(False,), documents=("none",))
ROUTED = dict(ff=("moe",), n_shared_expert=(0,), expert_balance=("loss", "none"))
MULTI_HEAD = dict(n_kv_head=lambda c: (c.n_head,), head_dim=lambda c: (c.n_embd / c.n_head,))
PART = dict(norm=("layer",), activation=tuple(PLAIN), bias=(True, False), head_dim=MULTI_HEAD["head_dim"],
            partial_rotary=lambda c: (c.partial_rotary,))  # of a head turns
WHOLE = dict(n_embd=lambda c: (c.n_embd // c.n_head * c.n_head,))  # n_head divides it, whatever head_dim is


def form(name, takes=(), keys=(), names=LLAMA, layers="model.layers.#.", knots=(ROPE,), full=(), fixed=(), absent=(),
         eps="rms_norm_eps", only=()):
    """A class of transformers, as it differs from Llama's.

    takes: as TAKES. keys: {their key of config.json: our field, or None for none}; eps: the key of norm_eps; only: all
    keys. names, layers: as LLAMA. knots: what is more than another word. full: what it always has; gains of 1 and
    biases of 0 change nothing. fixed: {key: value} that config.json must say. absent: {key: value} that it means where
    it leaves a key out.
    """
    keys = {eps if ours == "norm_eps" else key: ours for key, ours in (KEYS | dict(keys)).items() if ours}
    return SimpleNamespace(name=name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"), names=names, layers=layers,
                           takes=TAKES | dict(takes), knots=knots, full=dict(norm_gain=True) | dict(full),
                           keys=dict(only) or keys, fixed=dict(fixed), absent=dict(absent))


WINDOWS, SAME = (windows_out, windows_in), ("vocab_size", "n_embd", "n_layer", "n_head")  # GPT-2's names are ours
FORMS = {  # the first that takes a config is it
    "llama": form("Llama", takes=dict(WHOLE, bias=(False, True)), keys=BIASES),
    "mistral": form("Mistral", takes=dict(mixer=("full", "window")), knots=(ROPE, ONE_WINDOW),
                    absent=dict(sliding_window=4096)),
    "qwen2": form("Qwen2", takes=dict(mixer=("full", "window"), bias=("qkv", False)), knots=(ROPE, WINDOWS),
                  full=dict(bias="qkv")),
    "qwen3": form("Qwen3", takes=dict(qk_norm=(True,), mixer=("full", "window")), knots=(ROPE, WINDOWS),
                  full=dict(qk_gain=True), fixed=dict(attention_bias=False), absent=dict(head_dim=128)),
    "smollm3": form("SmolLM3", takes=dict(positions=("none", "rope"), bias=(False, True),
                                          nope_interval=lambda c: (c.nope_interval,)), keys=BIASES,
                    knots=((unturned_out, unturned_in),), absent=dict(tie_word_embeddings=True)),
    "olmo2": form("Olmo2", takes=dict(norm_after=(True,), qk_norm=("full",), residual_scale=(1.0,)), names=OLMO,
                  full=dict(qk_gain=True), fixed=dict(attention_bias=False), absent=dict(rms_norm_eps=1e-5)),
    "arcee": form("Arcee", takes=dict(WHOLE, activation=tuple(PLAIN), bias=(False, True)),
                  keys=BIASES, names=ARCEE, absent=dict(hidden_act="relu2", rms_norm_eps=1e-5)),
    "apertus": form("Apertus", takes=dict(qk_norm=(True,), activation=tuple(PLAIN)), names=APERTUS,
                    knots=((to_json, partial(from_json, base=12e6)),), full=dict(qk_gain=True),
                    fixed=dict(attention_bias=False), absent=dict(hidden_act="xielu", rms_norm_eps=1e-5)),
    "mixtral": form("Mixtral", takes={**ROUTED, "mixer": ("full", "window"),
                                      "expert_top_k": lambda c: range(2, c.n_expert + 1)}, names=MIXTRAL,
                    keys={**MOE, "intermediate_size": "expert_width", "num_local_experts": "n_expert"},
                    knots=((to_json, partial(from_json, base=1e6)), ONE_WINDOW),
                    absent=dict(rms_norm_eps=1e-5, num_experts_per_tok=2, num_local_experts=8)),
    "qwen3_moe": form("Qwen3Moe", takes={**ROUTED, "qk_norm": (True,), "ff": ("moe", "mlp")}, names=QWEN_MOE,
                      keys={**MOE, "moe_intermediate_size": "expert_width"},
                      knots=(ROPE, (sparse_out, sparse_in)), full=dict(qk_gain=True),
                      fixed=dict(attention_bias=False, use_sliding_window=False),
                      absent=dict(num_experts_per_tok=8, moe_intermediate_size=768)),
    "deepseek_v3": form(
        "DeepseekV3", names=DEEPSEEK,
        takes=dict(mixer=("mla",), ff=lambda c: (",".join(k for word in ("mlp", "moe") for k in c.ffs if k == word),),
                   expert_top_groups=lambda c: (c.expert_top_groups,),
                   expert_balance=lambda c: ("bias",) if "moe" in c.ffs else (c.expert_balance,),
                   n_shared_expert=lambda c: range(1, c.n_expert) if "moe" in c.ffs else (c.n_shared_expert,)),
        keys={**MOE, "n_group": "expert_groups", "topk_group": "expert_top_groups",
              "moe_intermediate_size": "expert_width", "n_shared_experts": "n_shared_expert",
              "q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank", "qk_rope_head_dim": "rope_dim",
              "qk_nope_head_dim": "head_dim", "v_head_dim": "head_dim", "head_dim": None},
        knots=(ROPE, (latent_out, latent_in)), fixed=dict(attention_bias=False),
        absent=dict(n_group=8, topk_group=4, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048)),
    "diffllama": form("DiffLlama", takes=dict(mixer=("diff",)), names=DIFF, fixed=dict(attention_bias=False),
                      absent=dict(rms_norm_eps=1e-5)),
    "gpt2": form("GPT2", names=GPT2, layers="transformer.h.#.", knots=(),
                 only=dict(zip(SAME, SAME), n_positions="block_size", n_inner="ff_width", layer_norm_epsilon="norm_eps",
                           activation_function="activation", tie_word_embeddings="tie_weights"),
                 takes=dict(MULTI_HEAD, norm=("layer",), positions=("learned",), activation=tuple(PLAIN),
                            bias=(True, False)), full=dict(bias=True),
                 fixed=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
                 absent=dict(tie_word_embeddings=True, activation_function="gelu_new", layer_norm_epsilon=1e-5)),
    "starcoder2": form("Starcoder2", names=STARCODER, knots=(ROPE, ONE_WINDOW), eps="norm_epsilon",
                       takes=dict(norm=("layer",), activation=tuple(PLAIN), bias=(True, False),
                                  mixer=("full", "window")), full=dict(bias=True), fixed=dict(use_bias=True),
                       absent=dict(tie_word_embeddings=True, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh")),
    "phi": form("Phi", names=PHI, knots=((part_turns_out, partial(part_turns_in, usual=0.5)),), eps="layer_norm_eps",
                keys=dict(head_dim=None),
                takes=dict(PART, parallel_residual=("shared",), head_bias=(True, False)),
                full=dict(bias=True, head_bias=True), fixed=dict(qk_layernorm=False),
                absent=dict(hidden_act="gelu_new", layer_norm_eps=1e-5)),
    "gpt_neox": form("GPTNeoX", names=NEOX, knots=((part_turns_out, partial(part_turns_in, usual=0.25)),),
                     layers="gpt_neox.layers.#.", takes={**PART, **MULTI_HEAD, "parallel_residual": (True, False)},
                     keys=dict(use_parallel_residual="parallel_residual", num_key_value_heads=None, head_dim=None),
                     eps="layer_norm_eps",
                     full=dict(bias=True), fixed=dict(attention_bias=True),
                     absent=dict(hidden_act="gelu", layer_norm_eps=1e-5, use_parallel_residual=True)),
    "mpt": form("Mpt", names=MPT, layers="transformer.blocks.#.", knots=(),
                only=dict(vocab_size="vocab_size", d_model="n_embd", n_heads="n_head", n_layers="n_layer",
                          max_seq_len="block_size", layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_weights"),
                takes=dict(MULTI_HEAD, norm=("layer",), positions=("alibi",), activation=("gelu",),
                           tie_weights=(True,), ff_width=lambda c: (4 * c.n_embd,),
                           n_head=lambda c: [2 ** i for i in range(20)]),
                fixed=dict(no_bias=True, attn_config=dict(alibi=True, alibi_bias_max=8, attn_type="multihead_attention",
                                                          qk_ln=False, clip_qkv=None, softmax_scale=None)),
                absent=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5)),
    "mamba": form("Mamba", names=MAMBA, layers="backbone.layers.#.", knots=(),
                  only=dict(vocab_size="vocab_size", hidden_size="n_embd", num_hidden_layers="n_layer", expand="expand",
                            state_size="state_dim", conv_kernel="conv_width", layer_norm_epsilon="norm_eps",
                            tie_word_embeddings="tie_weights", max_position_embeddings="block_size"),
                  takes=dict(mixer=("mamba",), ff=("none",), positions=("none", "rope", "alibi"),
                             activation=lambda c: (c.activation,), bias=(False, True), qk_norm=(False, True),
                             expand=lambda c: (round(c.expand),)),
                  fixed=dict(hidden_act="silu", use_bias=False, use_conv_bias=True),
                  absent=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5, expand=2, conv_kernel=4,
                              state_size=16, max_position_embeddings=2048)),
}


def architecture(name, activation="swiglu", **takes):
    """An architecture of llama.cpp, what of a class it computes."""
    return SimpleNamespace(name=name, knots=(), takes=dict(
        activation=(activation,), mixer=("full",), rope_scaling=("none", "linear")) | takes)


FACTORS = "none", "linear", "llama3"
LLAMA_CPP = {
    **{kind: architecture("llama", rope_scaling=FACTORS) for kind in ("llama", "mistral", "mixtral")},
    "arcee": architecture("arcee", "relu2", bias=(False,), rope_scaling=FACTORS), "qwen2": architecture("qwen2"),
    "qwen3": architecture("qwen3"), "qwen3_moe": architecture("qwen3moe", ff=("moe",)),
    "olmo2": architecture("olmo2"), "smollm3": architecture("smollm3", positions=("rope",), nope_interval=(4,)),
    "gpt2": architecture("gpt2", "gelu_tanh"), "starcoder2": architecture("starcoder2", "gelu_tanh"),
    "phi": architecture("phi2", "gelu_tanh"), "gpt_neox": architecture("gptneox", "gelu_tanh"),
    "mamba": SimpleNamespace(name="mamba", knots=(), takes={}),
}
NEIGHBOURS = ("llama", "arcee", "smollm3")  # there neighbours turn together, elsewhere halves


# --- Which class ---

def misfits(form, c):
    """[(field, its value, what the class takes)] of all that a config has and the class does not."""
    found = []
    for name, takes in form.takes.items():
        allowed, value = takes(c) if callable(takes) else takes, getattr(c, name)
        layers = {"mixer": c.mixers, "ff": c.ffs}.get(name, (value,))
        if not {",".join(layers) if callable(takes) and name == "ff" else word for word in layers} <= {*allowed}:
            found.append((name, value, allowed))
    if ONE_WINDOW in form.knots and len({*c.mixers}) > 1:
        found.append(("mixer", c.mixer, ("one for all layers",)))
    return found


def choose(c):
    """The model_type of FORMS that computes what a model of this config does. ValueError: none, with the settings that
    stand in the way of the nearest."""
    ranked = {kind: misfits(form, c) for kind, form in FORMS.items()}
    best = min(ranked, key=lambda kind: len(ranked[kind]))
    if not ranked[best]:
        return best
    refuse(ranked[best], "no class of transformers computes this model", f"the nearest, {FORMS[best].name},")


def refuse(found, what, name):
    """ValueError where misfits are found: what cannot be, because of which settings, and what the class of this name
    takes."""
    reasons = ", ".join(f"{field} {value!r}" for field, value, _ in found)
    allowed = "; ".join(f"{field} {' or '.join(map(str, list(takes)[:6]))}" for field, _, takes in found)
    if found:
        raise ValueError(f"{what}: {reasons} stand{'s' * (len(found) == 1)} in the way; {name} takes {allowed}")
