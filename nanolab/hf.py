"""Weights out and in: a run as a folder that Hugging Face's classes load, and a folder of theirs as a model here.

    python -m nanolab.hf export runs/train_enwik8/my_run FOLDER             # AutoModelForCausalLM, AutoTokenizer
    python -m nanolab.hf export runs/train_enwik8/my_run/best.pt FOLDER --dtype bfloat16 --weights ema
    python train_enwik8.py --init_from FOLDER                               # sample.py, evaluate.py take it, too

FORMS is the one table: for every class what it takes, what it calls our settings and our tensors. Export reads it from
left to right, import from right to left. What no class computes is refused in one line; docs/weights.md has the limits.
"""
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import tokens
from data.tokenized import tokenizer_of
from model import TransformerConfig, build_model, from_checkpoint, fused_rows
from models.rope_scaling import from_json, to_json
from nanolab.run import Checkpoint, command, find_checkpoint, load_checkpoint, write_json
from nanolab.settings import UserError, as_user_error, serve

EVEN = 8  # experts' widths must be multiples of it: 16 bytes of bfloat16, for grouped_mm of transformers
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
ALSO = {"gelu_new": "gelu_pytorch_tanh", "swish": "silu"}  # other words of theirs
LARGEST = dict(n_layer=10_000, n_expert=10_000, block_size=2 ** 24)  # in a config.json that is believed
PASSED_OVER = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # buffers in old files: masks, angles


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


def unturned_in(d):
    """SmolLM3: 1 is a layer that turns; without a list every fourth does not."""
    turns, every = d.get("no_rope_layers"), d.get("no_rope_layer_interval", 4)
    if turns is None:
        turns = [int((i + 1) % every != 0) for i in range(d["num_hidden_layers"])]
    if len({*turns}) > 1 or d.get("use_sliding_window"):
        raise UserError("layers of which some turn and some do not are not read: here all layers have the same")
    return dict(positions="rope", **from_json(d, 2e6)) if turns[0] else dict(positions="none")


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


WAYS = {None: (lambda t, c: t,) * 2, "pairs": by_rows(pairs_apart), "heads": by_rows(heads_in_turn),
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
             softmax_plus_one=(False,), logit_softcap=(None,), output=("softmax",), head_bias=(False,))
ROUTED = dict(ff=("moe",), n_shared_expert=(0,), expert_balance=("loss", "none"))


MULTI_HEAD = dict(n_kv_head=lambda c: (c.n_head,), head_dim=lambda c: (c.n_embd / c.n_head,))
WHOLE = dict(n_embd=lambda c: (c.n_embd // c.n_head * c.n_head,))  # n_head divides it, whatever head_dim is


def form(name, takes=(), keys=(), names=LLAMA, layers="model.layers.#.", knots=(ROPE,), full=(), fixed=(), absent=()):
    """A class of transformers, as it differs from Llama's.

    takes: as TAKES. keys: {their key of config.json: our field, or None for none}. names, layers: as LLAMA. knots: what
    is more than another word. full: what it always has; gains of 1 and biases of 0 change nothing. fixed: {key: value}
    that config.json must say. absent: {key: value} that it means where it leaves a key out.
    """
    return SimpleNamespace(name=name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"), names=names, layers=layers,
                           takes=TAKES | dict(takes), knots=knots, full=dict(norm_gain=True) | dict(full),
                           keys={key: ours for key, ours in (KEYS | dict(keys)).items() if ours}, fixed=dict(fixed),
                           absent=dict(absent))


WINDOWS = windows_out, windows_in
FORMS = {  # the first that takes a config is it
    "llama": form("Llama", takes=dict(WHOLE, bias=(False, True)), keys=BIASES),
    "mistral": form("Mistral", takes=dict(mixer=("full", "window")), knots=(ROPE, ONE_WINDOW),
                    absent=dict(sliding_window=4096)),
    "qwen2": form("Qwen2", takes=dict(mixer=("full", "window"), bias=("qkv", False)), knots=(ROPE, WINDOWS),
                  full=dict(bias="qkv")),
    "qwen3": form("Qwen3", takes=dict(qk_norm=(True,), mixer=("full", "window")), knots=(ROPE, WINDOWS),
                  full=dict(qk_gain=True), fixed=dict(attention_bias=False), absent=dict(head_dim=128)),
    "smollm3": form("SmolLM3", takes=dict(positions=("none",), bias=(False, True)), keys=BIASES,
                    knots=((lambda c: dict(no_rope_layers=[0] * c.n_layer, use_sliding_window=False), unturned_in),),
                    absent=dict(tie_word_embeddings=True)),
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
                   expert_balance=lambda c: ("bias",) if "moe" in c.ffs else (c.expert_balance,),
                   n_shared_expert=lambda c: range(1, c.n_expert) if "moe" in c.ffs else (c.n_shared_expert,)),
        keys={**MOE, "moe_intermediate_size": "expert_width", "n_shared_experts": "n_shared_expert",
              "q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank", "qk_rope_head_dim": "rope_dim",
              "qk_nope_head_dim": "head_dim", "v_head_dim": "head_dim", "head_dim": None},
        knots=(ROPE, (latent_out, latent_in)), fixed=dict(n_group=1, topk_group=1, attention_bias=False),
        absent=dict(n_group=8, topk_group=4, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048)),
    "diffllama": form("DiffLlama", takes=dict(mixer=("diff",)), names=DIFF, fixed=dict(attention_bias=False),
                      absent=dict(rms_norm_eps=1e-5)),
    "gpt2": form("GPT2", names=GPT2, layers="transformer.h.#.", knots=(),
                 takes=dict(MULTI_HEAD, norm=("layer",), positions=("learned",), activation=tuple(PLAIN),
                            bias=(True, False)), full=dict(bias=True),
                 fixed=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
                 absent=dict(tie_word_embeddings=True, activation_function="gelu_new", layer_norm_epsilon=1e-5)),
    "starcoder2": form("Starcoder2", names=STARCODER, knots=(ROPE, ONE_WINDOW),
                       takes=dict(norm=("layer",), activation=tuple(PLAIN), bias=(True, False),
                                  mixer=("full", "window")), full=dict(bias=True), fixed=dict(use_bias=True),
                       absent=dict(tie_word_embeddings=True, norm_epsilon=1e-5, hidden_act="gelu_pytorch_tanh")),
    "mpt": form("Mpt", names=MPT, layers="transformer.blocks.#.", knots=(),
                takes=dict(MULTI_HEAD, norm=("layer",), positions=("alibi",), activation=("gelu",),
                           tie_weights=(True,), ff_width=lambda c: (4 * c.n_embd,),
                           n_head=lambda c: [2 ** i for i in range(20)]),
                fixed=dict(no_bias=True, attn_config=dict(alibi=True, alibi_bias_max=8, attn_type="multihead_attention",
                                                          qk_ln=False, clip_qkv=None, softmax_scale=None)),
                absent=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5)),
    "mamba": form("Mamba", names=MAMBA, layers="backbone.layers.#.", knots=(),
                  takes=dict(mixer=("mamba",), ff=("none",), positions=("none", "rope", "alibi"),
                             activation=lambda c: (c.activation,), bias=(False, True), qk_norm=(False, True),
                             expand=lambda c: (round(c.expand),)),
                  fixed=dict(hidden_act="silu", use_bias=False, use_conv_bias=True),
                  absent=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5, expand=2, conv_kernel=4,
                              state_size=16, max_position_embeddings=2048)),
}
SAME = ("vocab_size", "n_embd", "n_layer", "n_head")  # GPT-2's names, which ours are
FORMS["gpt2"].keys = dict(zip(SAME, SAME), n_positions="block_size", n_inner="ff_width", layer_norm_epsilon="norm_eps",
                          activation_function="activation", tie_word_embeddings="tie_weights")
FORMS["starcoder2"].keys = {"norm_epsilon" if key == "rms_norm_eps" else key: ours for key, ours in KEYS.items()}
FORMS["mpt"].keys = dict(vocab_size="vocab_size", d_model="n_embd", n_heads="n_head", n_layers="n_layer",
                         max_seq_len="block_size", layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_weights")
FORMS["mamba"].keys = dict(vocab_size="vocab_size", hidden_size="n_embd", num_hidden_layers="n_layer", expand="expand",
                           state_size="state_dim", conv_kernel="conv_width", layer_norm_epsilon="norm_eps",
                           tie_word_embeddings="tie_weights", max_position_embeddings="block_size")


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
    """The model_type of FORMS that computes what a model of this config does. UserError: none, with the settings that
    stand in the way of the nearest."""
    ranked = {kind: misfits(form, c) for kind, form in FORMS.items()}
    best = min(ranked, key=lambda kind: len(ranked[kind]))
    if not ranked[best]:
        return best
    reasons = ", ".join(f"{name} {value!r}" for name, value, _ in ranked[best])
    allowed = "; ".join(f"{name} {' or '.join(map(str, list(takes)[:6]))}" for name, _, takes in ranked[best])
    raise UserError(f"no class of transformers computes this model: {reasons} stand{'s' * (len(ranked[best]) == 1)} in "
                    f"the way; the nearest, {FORMS[best].name}, takes {allowed}")


# --- Out ---

def folded(c, state):
    """(config, state) of the plainest model that computes the same: scales of branches, of scores, of classifiers, and
    of rope's base are multiplied into weights and base."""
    state, D, rows = dict(state), c.head_dim, c.n_head * c.head_dim
    for i in range(c.n_layer):
        for number, ends in ((1, ("mixer.out",)), (2, ("ff.down", "ff.shared.down"))):
            scale = state.pop(f"blocks.{i}.scale{number}", None)
            if scale is None:
                scale = torch.tensor([(2 * c.n_layer) ** -0.5 if c.residual_scale == "depth" else c.residual_scale])
            for name in [f"blocks.{i}.{end}.{kind}" for end in ends for kind in ("weight", "bias")]:
                if name in state and c.residual_scale != 1.0:
                    t = state[name]
                    wide = scale.expand(c.n_embd).repeat(len(t) // c.n_embd)  # experts lie one below the other
                    state[name] = t * wide.view(-1, *[1] * (t.dim() - 1))
        own = f"blocks.{i}.mixer."
        by = state.pop(own + "qk_scale", None)
        by = c.score_factor if by is None else by / D ** 0.5
        if c.qk_norm and (c.qk_scale or c.score_factor != 1):
            state[own + "q_gain"] = by * state.get(own + "q_gain", torch.ones(D))
            state.setdefault(own + "k_gain", torch.ones(D))
        elif c.score_factor != 1:
            for name in (own + "qkv.weight", own + "qkv.bias"):
                if name in state:
                    state[name] = torch.cat((state[name][:rows] * by, state[name][rows:]))
    if c.width_factor != 1:
        state["heads.0"] = (state["embed"] if c.tie_weights else state["heads.0"]) / c.width_factor
    changed = dict(residual_scale=1.0, qk_scale=False, parametrisation="standard", init="gpt2", dropout=0.0,
                   tie_weights=c.tie_weights and c.width_factor == 1,
                   qk_gain=c.qk_gain or c.qk_norm and (c.qk_scale or c.score_factor != 1))
    if c.rope_scaling == "ntk":
        width = c.rope_dim if "mla" in c.mixers else D
        changed |= dict(rope_scaling="none", rope_factor=1.0,
                        rope_base=c.rope_base * c.rope_factor ** (width / max(width - 2, 1)))
    return replace(c, **changed), state


def filled(c, state, full):
    """(config, state) with all that the class always has, gains 1 and biases 0, and with experts of an even width."""
    if "moe" in c.ffs:
        W = c.expert_width or max(1, c.ff_width // c.n_expert)
        full, more = {**full, "expert_width": W + -W % EVEN}, -W % EVEN
        for name in [name for name in state if re.search(r"\.ff\.(shared\.)?(up|down)\.weight$", name)]:
            t = state[name]
            if c.ffs[int(name.split(".")[1])] == "moe":  # up (experts W, C); down (experts C, W), shared (C, experts W)
                state[name] = (F.pad(t.view(-1, W, c.n_embd), (0, 0, 0, more)).flatten(0, 1) if ".up." in name else
                               F.pad(t.view(len(t), -1, W), (0, more)).flatten(1))
    c = replace(c, **full)
    with torch.device("meta"):
        skeleton = build_model(c)
    return c, skeleton, {name: state[name] if name in state else (torch.ones if name.endswith("gain") else torch.zeros)(
        t.shape) for name, t in skeleton.state_dict().items()}


def correspondence(form, model):
    """Yields (our tensor, [their tensors], rows of each or None, their way) of all tensors of a model of that class."""
    c, fused = model.config, fused_rows(model)
    for ours in model.state_dict():
        at, key, tail = re.match(r"blocks\.(\d+)\.", ours), ours, ""
        if at:
            key = "#." + ours[at.end():]
            key = key.replace("#.ff.", "#.moe.") if c.ffs[int(at[1])] == "moe" else key
        if key not in form.names:
            key, _, last = key.rpartition(".")
            tail = ".bias" if last == "bias" else ".weight"
        theirs, way = form.names[key] if isinstance(form.names[key], tuple) else (form.names[key], None)
        if c.q_rank is None:
            theirs = theirs.replace("q_b_proj", "q_proj")
        theirs = (form.layers.replace("#", at[1]) if at else "") + theirs + tail
        names = [theirs.replace("@", str(e)) for e in range(c.n_expert - c.n_shared_expert if "@" in theirs else 1)]
        if parts := re.search(r"\((.*)\)", theirs):
            names = [name.replace(parts[0], part) for name in names for part in parts[1].split("|")]
        rows = fused.get(re.sub("bias$", "weight", ours)) if len(names) > 1 else None
        yield ours, names, rows, way


def to_theirs(t, rows, way, c):
    """Our tensor as theirs, a list."""
    t = WAYS[way][0](t, c)
    return [t] if rows is None else list(t.split(rows))


def config_of(kind, c, dtype):
    """The dict of config.json. What is not there is null: a class has numbers of its own for these."""
    form, found = FORMS[kind], dict(architectures=[FORMS[kind].name], model_type=kind, dtype=dtype, torch_dtype=dtype,
                                    bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True)
    for theirs, ours in form.keys.items():
        value = getattr(c, ours)
        if value is None and ours in ("norm_eps", "expert_width"):
            value = (1e-6 if c.norm == "rms" else 1e-5) if ours == "norm_eps" else max(1, c.ff_width // c.n_expert)
        found[theirs] = {**GATES, **PLAIN}[value] if ours == "activation" else value
    for out, _ in form.knots:
        found |= out(c)
    if "expand" in found:
        found["expand"] = int(found["expand"])
    return found | form.fixed


def as_folder(model, dtype="float32"):
    """(config.json's dict, {name: tensor}) of a Transformer's last layer's first target. UserError: as `choose`."""
    state = {name: t.detach().cpu().float() for name, t in model.state_dict().items()}
    choose(model.config)
    c, state = folded(model.config, state)
    kind = choose(c)
    c, skeleton, state = filled(c, state, FORMS[kind].full)
    found = {}
    for ours, theirs, rows, way in correspondence(FORMS[kind], skeleton):
        found |= zip(theirs, to_theirs(state[ours], rows, way, c))
    return config_of(kind, c, dtype), {name: t.to(getattr(torch, dtype)).contiguous().clone()
                                       for name, t in found.items()}


def export(run, folder, dtype="float32", weights="raw"):
    """Writes a run as a folder that transformers loads. UserError: no class computes the model; the folder is there.

    run: a run's directory, or a checkpoint
    folder: the folder to write, which must not be there yet
    dtype: [float32, bfloat16] of the tensors
    weights: [raw, ema] which weights
    """
    save_file = tokens.needed("safetensors.torch").save_file
    folder, path = Path(folder), find_checkpoint(run)
    if folder.exists():
        raise UserError(f"{folder} is there already: name a new folder")
    loaded = complete(load_checkpoint(path))
    if loaded["script"] not in ("train_enwik8", "train_facts"):
        raise UserError(f"{path} is a checkpoint of {loaded['script']}.py: one of train_enwik8.py or train_facts.py is "
                        "exported")
    try:
        config, found = as_folder(from_checkpoint(loaded, weights).for_inference(), dtype)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    words, special = tokenizer_files(loaded, config)
    config |= special
    place = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        place.mkdir(parents=True)
        save_file(found, place / "model.safetensors", metadata={"format": "pt"})
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", {key: config[key] for key in config if key.endswith("token_id")})
        for name, content in words.items():
            (place / name).write_text(content, encoding="utf-8")
        os.replace(place, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{folder}: {config['architectures'][0]}, {sum(t.numel() for t in found.values()):,} parameters in {dtype}"
          + ("" if words else ", without a tokenizer: its task has a vocabulary of its own"))


def tokenizer_files(loaded, config):
    """({file: its text} of the checkpoint's tokenizer, or {} of a task without one; its special ids of config.json)."""
    settings = loaded["settings"]
    if loaded["script"] == "train_facts":
        if settings["task"] != "text":
            return {}, {}
        tokenizer = tokenizer_of(settings, loaded.get("tokenizer_json"))
        tokens.check(tokenizer, loaded["tokenizer"])
    else:
        tokenizer = tokens.Bytes()
    special = {"eos_token_id": tokenizer.size} if config["vocab_size"] == tokenizer.size + 1 else {}  # ends a document
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                 model_max_length=config.get("max_position_embeddings") or config.get("n_positions"),
                 **({"eos_token": "<|end|>"} if special else {}))
    return {"tokenizer.json": tokens.as_json(tokenizer, "<|end|>" if special else None),
            "tokenizer_config.json": json.dumps(about)}, special


# --- In ---

def config_in(d):
    """(kind, TransformerConfig) of a config.json's dict. UserError: a class or a setting that is not read."""
    kind = d.get("model_type")
    if kind not in FORMS:
        raise UserError(f"model_type {str(kind)[:40]!r} is not read: {', '.join(FORMS)} are")
    form = FORMS[kind]
    d = {**form.absent, **d}
    for key, wanted in form.fixed.items():
        parts = wanted.items() if isinstance(wanted, dict) else [(None, wanted)]
        for part, value in parts:
            said = (d.get(key) or {}).get(part, value) if part else d.get(key, value)
            if said != value:
                raise UserError(f"{key} {part + ' ' if part else ''}{said!r} is not read: only {value!r} is")
    found = {name: values[0] for name, values in form.takes.items() if not callable(values)} | form.full
    said = {}
    for theirs, ours in form.keys.items():
        value = d.get(theirs)
        if ours == "activation":
            words = GATES if "swiglu" in form.takes["activation"] else PLAIN
            value = d.get(theirs, "silu")
            value = {hidden: word for word, hidden in words.items()}.get(ALSO.get(value, value), value)
        if value is None and ours in ("vocab_size", "n_embd", "n_layer", "n_head", "block_size", "kv_rank"):
            raise UserError(f"it lacks {theirs}")
        if ours == "norm_eps" and value is None:
            value = 1e-6
        if ours in ("tie_weights", "bias"):
            value = bool(value)
        if ours in said and said[ours][1] != value:
            raise UserError(f"{said[ours][0]} {said[ours][1]!r} beside {theirs} {value!r} is not read: it is one "
                            "setting here")
        said[ours] = theirs, value
    found |= {ours: value for ours, (_, value) in said.items()}
    if kind in ("gpt2", "mpt") and not found.get("ff_width"):
        found["ff_width"] = 4 * found["n_embd"]
    for into in (lambda d: {}, *(into for _, into in form.knots)):
        found |= into(d)
        for name, most in LARGEST.items():
            if type(found.get(name)) is int and found[name] > most:
                raise UserError(f"{name} {found[name]:,} is more than a model has")
    return kind, TransformerConfig(**found)


def read_folder(folder):
    """(kind, TransformerConfig, config.json's dict, {name: tensor}) of a folder. UserError, naming the folder: what is
    missing, damaged, not read, or could run code."""
    folder = Path(folder)
    try:
        d = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(d, dict):
            raise UserError("it is no object")
        kind, config = config_in(d)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json") from None
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/config.json is not read: {' '.join(str(error).split())[:300]}") from None
    return kind, config, d, read_tensors(folder)


def read_tensors(folder):
    """{name: tensor} of model.safetensors, or of the shards that its index names. UserError, as read_folder."""
    found, name = {}, "model.safetensors"
    names, index = [name], folder / "model.safetensors.index.json"
    try:
        if not (folder / name).exists() and index.exists():
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                pickles = [path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")]
                raise UserError(f"{folder} has no {name}" + (f"; {pickles[0]} is a pickle, which could run code: it is "
                                                             "not read, save it as safetensors" if pickles else ""))
            found |= tokens.needed("safetensors.torch").load_file(folder / name)
    except UserError:
        raise
    except Exception as error:                           # SafetensorError, or an index that is none
        raise UserError(f"{folder}: {name} is no safetensors file, or damaged: {str(error)[:200]}") from None
    return {name.removeprefix("_orig_mod."): t for name, t in found.items()}


def load(folder):
    """The Transformer of a folder, float32 on the CPU, in training mode; its `.config.block_size` is the context that
    config.json names. UserError, naming the folder: as read_folder, or a tensor that is missing, left over or of
    another shape than config.json says."""
    kind, c, d, found = read_folder(folder)
    form = FORMS[kind]
    top, embed = form.names["embed"].split(".", 1)
    if embed in found:                                   # of a model without its head, as the hub's gpt2
        found = {name if name.startswith("lm_head.") else f"{top}.{name}": t for name, t in found.items()}
    try:
        with torch.device("meta"):
            skeleton = build_model(c)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{folder}/config.json: no model can have these sizes: {str(error)[:100]}") from None
    wanted, state = skeleton.state_dict(), {}
    for ours, theirs, rows, way in correspondence(form, skeleton):
        shapes = [t.shape for t in to_theirs(wanted[ours], rows, way, c)]
        for name, shape in zip(theirs, shapes):
            if name not in found:
                raise UserError(f"{folder} lacks the tensor {name}, which its config.json asks for")
            if found[name].shape != shape:
                raise UserError(f"{folder}: {name} is {tuple(found[name].shape)}, but by config.json {tuple(shape)}")
        parts = [found.pop(name).float() for name in theirs]
        t = WAYS[way][1](parts[0] if rows is None else torch.cat(parts), c)
        state[ours] = t.clone(memory_format=torch.contiguous_format)  # the file's pages may change under it
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), state["embed"]):
        raise UserError(f"{folder}: lm_head.weight is another than the embedding, to which config.json ties it")
    left = [name for name in found if not PASSED_OVER.search(name) and not (
        kind == "deepseek_v3" and (at := re.match(r"model\.layers\.(\d+)\.", name)) and int(at[1]) >= c.n_layer)]
    if left:
        raise UserError(f"{folder}: nothing here takes its tensor {left[0]}" + f" and {len(left) - 1} more" * (
            len(left) > 1))
    if kind == "deepseek_v3":
        deepseek_in(d, c, state)
    return build_model(c, state)


def deepseek_in(d, c, state):
    """Neighbours that turn together become halves; the factor of routed experts goes into their outputs."""
    def halves(t, first):  # of the last rope_dim rows of each (first + rope_dim)
        order = torch.arange(len(t)).view(-1, first + c.rope_dim)
        order[:, first:] = torch.cat((order[:, first::2], order[:, first + 1::2]), 1)
        return t[order.flatten()]
    scale = d.get("routed_scaling_factor", 2.5)
    for name in list(state):
        if d.get("rope_interleave", True) and name.endswith("mixer.q.weight"):
            state[name] = halves(state[name], c.head_dim)
        if d.get("rope_interleave", True) and name.endswith("mixer.kv.weight"):
            state[name] = halves(state[name], c.kv_rank)
        if re.search(r"\.ff\.down\.weight$", name) and c.ffs[int(name.split(".")[1])] == "moe" and scale != 1:
            state[name] = state[name] * scale


# --- As a run has them ---

def vocabulary(folder):
    """(what train_facts' setting `tokenizer` is for a folder, the text of its tokenizer.json): "bytes" and None where
    it is that. UserError: there is none."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json")
    opened = tokens.open_tokenizer(path)
    return ("bytes", None) if isinstance(opened, tokens.Bytes) else (str(path), opened.content.decode())


def as_checkpoint(folder, weights="raw"):
    """(what a checkpoint would say, the model) of a folder, for sample.py and evaluate.py. UserError: as `load`."""
    if weights == "ema":
        raise UserError("there are no averaged weights: a folder has one set of them")
    model, (tokenizer, text) = load(folder), vocabulary(folder)
    settings = Checkpoint(dict(task="text", tokenizer=tokenizer, dataset=None, max_bytes=None), folder)
    fingerprint = tokens.open_tokenizer(tokenizer).fingerprint
    found = dict(script="train_facts", settings=settings, step=0, tokenizer=fingerprint, tokenizer_json=text)
    return Checkpoint(found, folder), model


def complete(loaded):
    """A checkpoint that holds adapters alone, with the weights of its base beside them; any other as it is. UserError:
    the base is gone, or another."""
    if digest := loaded.get("base"):
        path = loaded["settings"]["init_from"]
        try:
            base = base_of(path)
        except UserError as error:
            raise UserError(f"{loaded.path} holds adapters alone, and without their base nothing can be made of them: "
                            f"{error}") from None
        if digest_of(base) != digest:
            raise UserError(f"{loaded.path} holds adapters alone, and {path} has other weights now than those beside "
                            "which they were trained")
        loaded["model"] = cut(base.state_dict(), loaded["settings"]["block_size"]) | loaded["model"]
    return loaded


def base_of(path):
    """The Transformer of a folder, or of a run or its checkpoint."""
    path = find_checkpoint(path)
    if path.is_dir():
        return load(path)
    with as_user_error(f"{path}: "):
        return from_checkpoint(complete(load_checkpoint(path)))


def cut(state, block_size):
    """A state dict with learned positions no longer than block_size."""
    return {name: t[:block_size].clone() if name.endswith("position") else t for name, t in state.items()}


def digest_of(model):
    """The sha256 of a model's weights and their names, hexadecimal."""
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(name.encode())
        digest.update(t.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


main = command(serve(export=(export,)))

if __name__ == "__main__":
    main()
