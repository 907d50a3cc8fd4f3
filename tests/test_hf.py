"""Weights out and in (nanolab/hf.py), beside transformers: one table of classes, each with the same promises."""
import dataclasses
import json
import random
import re
import runpy
import shutil
import sys

import pytest
import torch

from data import tokens
from model import FEED_FORWARDS, MIXERS, TransformerConfig, build_model
from models.low_rank import Adapted
from nanolab import hf, run as experiment, settings as flags
from nanolab.generate import generate
from choices import raises_one_line
from forks import ROOT, assert_equal
from scripts import assert_same_end, folder as run_folder

pytest.importorskip("safetensors", reason="safetensors is not installed: weights go neither in nor out")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=64, n_layer=2, n_head=4, n_embd=32, block_size=32, norm="rms", positions="rope", bias=False,
             activation="swiglu", window=5, init="gpt2")
SHARES = dict(n_expert=5, expert_top_k=2)
MAMBA = dict(mixer="mamba", ff="none")
PART = dict(norm="layer", activation="gelu", partial_rotary=0.5)  # as GPTNeoX and Phi

# (class, settings): what nanolab trains, and the class of transformers that computes it.
OUT = [
    ("Llama", dict(bias=True, n_kv_head=2, tie_weights=True, residual_scale="layerscale")),
    ("Llama", dict(activation="geglu", head_dim=10, rope_scaling="ntk", rope_factor=4.0, residual_scale=0.3)),
    ("Llama", dict(activation="glu", rope_scaling="linear", rope_factor=2.0, rope_base=500.0, norm_gain=False)),
    ("Llama", dict(rope_scaling="llama3", rope_factor=4.0, norm_eps=1e-3, ff_width=44)),
    *(("Llama", dict(rope_scaling="yarn", rope_factor=4.0, head_dim=16, rope_base=50.0, rope_ramp=word))
      for word in ("turns", "index")), ("Llama", dict(parametrisation="mup", mup_base_width=16, bias=True)),
    ("Llama", dict(n_targets=2, intermediate_losses=True, mtp_depth=0)),
    ("Mistral", dict(mixer="window", n_kv_head=2)), ("Mistral", dict(n_head=3, head_dim=8)),
    ("Qwen2", dict(mixer="window,full")), ("Qwen2", dict(bias="qkv", n_kv_head=1)),
    ("Qwen3", dict(qk_norm=True, qk_scale=True, mixer="full,window")),
    ("Qwen3", dict(qk_norm=True, qk_gain=True, norm_eps=1e-2)), ("SmolLM3", dict(positions="none")),
    ("Qwen3", dict(qk_norm=True, qk_scale=True, parametrisation="mup", mup_base_width=16, tie_weights=True)),
    ("Arcee", dict(activation="gelu", bias=True)), ("Apertus", dict(activation="relu2", qk_norm=True, norm_gain=False)),
    ("Apertus", dict(activation="gelu", qk_norm=True, qk_scale=True, n_kv_head=2, head_dim=10)),
    ("Mixtral", dict(ff="moe", **SHARES)), ("Mixtral", dict(ff="moe", mixer="window", n_expert=4, ff_mult=6.0)),
    ("Qwen3Moe", dict(ff="moe,mlp", qk_norm=True, **SHARES)),
    ("Qwen3Moe", dict(ff="moe", qk_norm=True, n_expert=4, expert_top_k=1)),
    ("DeepseekV3", dict(mixer="mla", q_rank=12, rope_dim=6)),
    ("DeepseekV3", dict(mixer="mla", ff="mlp,moe", n_shared_expert=1, expert_balance="bias", mtp_depth=1, **SHARES)),
    ("DeepseekV3", dict(mixer="mla", ff="moe", n_shared_expert=2, expert_balance="bias", expert_top_k=1, n_expert=8,
                        expert_groups=3, expert_top_groups=1)),
    ("DeepseekV3", dict(mixer="mla", rope_scaling="yarn", rope_factor=4.0, rope_ramp="index", rope_mscale=0.7,
                        rope_mscale_all_dim=0.5, rope_dim=8)),
    ("DiffLlama", dict(mixer="diff", n_kv_head=2, norm_eps=1e-3)), ("Mamba", dict(MAMBA, tie_weights=True)),
    ("GPT2", dict(norm="layer", positions="learned", activation="gelu", bias=True)),
    ("GPT2", dict(norm="layer", positions="learned", activation="gelu_tanh", tie_weights=True)),
    ("GPT2", dict(norm="layer", positions="learned", activation="relu2", norm_gain=False, ff_mult=3.0)),
    ("Starcoder2", dict(norm="layer", activation="gelu", bias=True, n_kv_head=2)),
    ("Starcoder2", dict(norm="layer", activation="gelu_tanh", mixer="window", tie_weights=True)),
    ("SmolLM3", dict(nope_interval=2, n_layer=5, n_kv_head=2)),
    ("Olmo2", dict(norm_after=True, qk_norm="full", n_kv_head=2)),
    ("Olmo2", dict(norm_after=True, qk_norm="full", parametrisation="mup", mup_base_width=16, norm_gain=False)),
    ("Phi", dict(PART, parallel_residual="shared", head_bias=True, bias=True, n_kv_head=2)),
    ("Phi", dict(PART, parallel_residual="shared", activation="relu2", partial_rotary=1.0, rope_scaling="yarn",
                 rope_factor=4.0, residual_scale="layerscale")),
    ("GPTNeoX", dict(PART, parallel_residual=True, bias=True)),
    ("GPTNeoX", dict(PART, partial_rotary=0.3, n_embd=80, rope_scaling="yarn", rope_factor=4.0, tie_weights=True)),
    ("Mpt", dict(norm="layer", positions="alibi", activation="gelu", tie_weights=True)),
]


def shake(tensors):
    """Every number of {name: tensor} anew, so that all of them matter: matrices loud, gains near 1, biases near 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, t in tensors.items():
            if name.endswith(("a_log", "dt_bias", "A_log", "dt_proj.bias")):
                continue                                     # Mamba's decay, as it starts
            near = 1.0 if t.dim() < 2 and not name.endswith(("bias", ".scale", "lambda_q1")) else 0.0
            t.copy_(near + torch.randn(t.shape) * (0.3 if t.dim() < 2 else t.size(-1) ** -0.5))


def loud(**settings):
    """A model of these settings, for inference."""
    model = build_model(TransformerConfig(**{**SMALL, **settings}))
    shake(model.state_dict())
    return model.for_inference().eval()


def written(folder, config, found):
    """The folder that an export would write, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder


def theirs(folder, **how):
    """Their model of a folder; every tensor found, and none left."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(map(len, (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]))), info
    return model.eval()


X = torch.randint(64, (5, 32), generator=torch.Generator().manual_seed(1))


def differ(ours, other, x=X):
    """The largest difference of their logits, over the bound 2e-5 max(1, their deviation)."""
    with torch.no_grad():
        one, two = ours(x), other(x).logits
    return ((one - two).abs().max() / max(1.0, one.std().item())).item()


def same_text(ours, other, length=12):
    """Whether both go on alike, greedily."""
    prompt = X[:1, :4]
    found = other.generate(prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)[0, 4:]
    return [int(t) for t in generate(ours, [prompt[0].tolist()], length, temperature=0.0)] == found.tolist()


def name_of(case):
    return f"{case[0]}-" + "-".join(f"{key}={value}" for key, value in case[1].items())


@pytest.mark.parametrize("case", OUT, ids=name_of)
def test_out(case, tmp_path):
    """Logits, text and tensors of the class; and back here, where nothing was multiplied in, bit for bit."""
    kind, settings = case
    model = loud(**settings)
    config, found = hf.as_folder(model)
    assert config["architectures"][0].startswith(kind)
    assert bool({"lm_head.weight", "embed_out.weight"} & {*found}) != config["tie_word_embeddings"]   # tied: once
    other = theirs(written(tmp_path / "out", config, found))
    assert differ(model, other) <= (0.0 if kind == "GPT2" else 2e-5)
    assert same_text(model, other)
    back = hf.load(tmp_path / "out").eval()
    assert hf.as_folder(back)[0] == config
    assert differ(back, other) <= 2e-5
    for name, t in hf.as_folder(back)[1].items():
        assert torch.equal(t, found[name]), name


def test_a_wrong_number_in_config_json_is_seen(tmp_path):
    """The bound is tight: what text alone would never show."""
    for settings, wrong in (({}, dict(rms_norm_eps=1e-5)), (dict(norm="layer", positions="learned", activation="gelu"),
                                                            dict(activation_function="gelu_new"))):
        model = loud(**settings)
        config, found = hf.as_folder(model)
        assert differ(model, theirs(written(tmp_path / "out", {**config, **wrong}, found))) > 2e-5


def test_dtype(tmp_path):
    """bfloat16: in the file and in config.json; read as float32, each number rounded once."""
    model = loud()
    config, found = hf.as_folder(model, "bfloat16")
    assert config["dtype"] == "bfloat16" and {t.dtype for t in found.values()} == {torch.bfloat16}
    back = hf.load(written(tmp_path / "out", config, found)).state_dict()
    assert all(torch.equal(t.bfloat16().float(), back[name]) for name, t in model.state_dict().items())


# What they publish: (model_type, settings of its class); a name in the second place says which tensors are folded.
THEIRS = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=44, max_position_embeddings=32, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=8)
V3 = dict(num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1,
          num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8,
          qk_nope_head_dim=8, v_head_dim=8)
IN = [
    ("llama", dict(rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True)),
    ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=128, tie_word_embeddings=True, head_dim=16)),
    ("llama", dict(rope_parameters=YARN, head_dim=16)), ("mistral", dict(sliding_window=5)),
    ("mistral", dict(sliding_window=None)), ("qwen2", {}),
    ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("qwen3", dict(head_dim=8, tie_word_embeddings=True)), ("apertus", dict(hidden_act="relu2", rope_parameters=YARN)),
    ("qwen3_moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
                       mlp_only_layers=[0])),
    ("mixtral", dict(num_local_experts=4, intermediate_size=48)), ("smollm3", dict(no_rope_layers=[1, 1])),
    ("smollm3", dict(num_hidden_layers=5)), ("smollm3", dict(no_rope_layers=[0, 0])),
    ("olmo2", dict(rms_norm_eps=1e-3, rope_parameters=LLAMA3)),
    ("phi", dict(intermediate_size=96)), ("phi", dict(rope_parameters=dict(LLAMA3, partial_rotary_factor=0.75))),
    ("gpt_neox", dict(rope_parameters=dict(rope_type="default", rope_theta=99.0, partial_rotary_factor=0.25))),
    ("gpt_neox", dict(use_parallel_residual=False)),
    ("arcee", {}), ("starcoder2", {}), ("diffllama", dict(rms_norm_eps=1e-2)), ("mamba", {}),
    ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=32)), ("mpt", dict(d_model=32, n_heads=4, n_layers=2)),
    ("deepseek_v3", dict(V3, folded=r"mlp.experts.*down|q_b_proj|kv_a_proj")),
    ("deepseek_v3", dict(V3, folded=r"mlp.experts.*down|q_proj|kv_a_proj", q_lora_rank=None, rope_parameters=dict(
        YARN, mscale=1.0, mscale_all_dim=0.8))),
    ("deepseek_v3", dict(V3, rope_interleave=False, routed_scaling_factor=1.0, n_routed_experts=8, n_group=4,
                         topk_group=2)),
]


@pytest.mark.parametrize("case", IN, ids=lambda case: "-".join([case[0], *sorted(case[1].keys() - V3.keys())]))
def test_in(case, tmp_path):
    """Logits and text of what they publish; back out, all tensors are theirs, bit for bit where nothing is folded."""
    kind, settings = case[0], dict(case[1])
    folded = settings.pop("folded", "$^")
    own = {"gpt2": ("vocab", "pad"), "mpt": ("vocab", "pad"), "mamba": ("vocab", "pad", "hidden")}.get(kind, ("",))
    sizes = {key: value for key, value in THEIRS.items() if key.startswith(own)}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **settings})).eval()
    shake(other.state_dict())
    other.generation_config.eos_token_id = None
    other.save_pretrained(tmp_path / "in")
    ours = hf.load(tmp_path / "in").eval()
    assert differ(ours, other) <= 2e-5
    assert same_text(ours, other)
    config, found = hf.as_folder(ours)
    saved = load_file(tmp_path / "in" / "model.safetensors")
    assert found.keys() == saved.keys()
    assert [name for name in found if not torch.equal(found[name], saved[name]) and not re.search(folded, name)] == []
    assert differ(ours, theirs(written(tmp_path / "out", config, found))) <= 2e-5
    assert not re.search("[a-z]", folded) or any(re.search(folded, name) for name in found)


def test_adapters_beside_peft(tmp_path, monkeypatch):
    """The same adapters on the folder that the base goes out as, in float64, its norms too: logits and gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed: tests/test_mixers.py has the formula")
    monkeypatch.setattr(transformers.models.smollm3.modeling_smollm3.SmolLM3RMSNorm, "forward", lambda norm, x: (
        norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()))
    config, found = hf.as_folder(base := loud(n_kv_head=2, positions="none"))
    ours = build_model(dataclasses.replace(base.config, lora_rank=3, lora_on="all", lora_alpha=6.0), base.state_dict())
    shake({name: p for name, p in ours.named_parameters() if p.requires_grad})
    other = peft.get_peft_model(theirs(written(tmp_path / "out", config, found)), peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear")).double()
    pairs = [(other.get_submodule(f"base_model.model.{theirs.removesuffix('.weight')}"), m, i)
             for name, names, *_ in hf.correspondence(hf.FORMS["smollm3"], base) for i, theirs in enumerate(names)
             if isinstance(m := ours.double().get_submodule(name.rpartition(".")[0]), Adapted)]
    assert len(pairs) == 14 == sum("lora_A" in name for name, _ in other.named_parameters())

    def each(kind):
        for layer, m, i in pairs:
            yield layer.lora_A["default"].weight, getattr(m.lora_a, kind).split(3)[i]
            yield layer.lora_B["default"].weight, getattr(m.lora_b, kind).split(m.rows)[i]
    for p, t in each("data"):
        p.data.copy_(t)
    one, two = ours(X), other(X).logits
    torch.testing.assert_close(one.double(), two, atol=1e-6, rtol=0)
    for logits in (ours(X), two):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), X.flatten()).backward()
    for p, grad in each("grad"):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=0)
        assert grad.abs().max() > 1e-4


# Every preset: its class, or None; and every word of the settings that make a model: parity, or one line.
PRESETS = {
    "train_enwik8": dict(cpu="Apertus", shakespeare_cpu="Apertus", shakespeare_fast=None, nanogpt_cpu="GPT2",
                         enwik8_cpu="Apertus", variants_cpu="Arcee", one_change="Arcee", a100="Apertus", t4="Apertus",
                         deepseek_cpu="DeepseekV3", t12=None, t64=None),
    "train_facts": dict(cpu="Llama", mqar=None, zoology=None, shakespeare_bytes="Apertus", shakespeare_bpe="Apertus",
                        smollm="Apertus"),
}


def outcome(settings, folder, wanted=()):
    """The class of a config that exports with parity; None where one line, with the words `wanted`, says why not."""
    model = loud(**settings)
    try:
        config, found = hf.as_folder(model)
    except ValueError as error:
        assert "\n" not in str(error) and "stand" in str(error) and all(word in str(error) for word in wanted), error
        return None
    assert differ(model, theirs(written(folder, config, found))) <= 2e-5, settings
    return config["architectures"][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")


@pytest.mark.parametrize("script", PRESETS)
def test_every_preset(script, tmp_path):
    module = runpy.run_path(str(ROOT / f"{script}.py"))
    assert PRESETS[script].keys() == module["presets"].keys()
    small = dict(n_layer=2, n_embd=32, block_size=32, dropout=0.0, n_expert=5, head_dim=8)
    names = {f.name for f in dataclasses.fields(TransformerConfig)}
    for preset, kind in PRESETS[script].items():
        said = flags.override({"__file__": str(ROOT / f"{script}.py"), "presets": module["presets"]},
                              ["--preset", preset])
        said = {name: value for name, value in said.items() if name in names} | small
        said["head_dim"] = 32 // said["n_head"]
        assert outcome(said, tmp_path / preset) == kind, preset


def test_every_word(tmp_path):
    """Each word of each setting, alone, then random ones together: no third outcome."""
    words = {name: spec.words for name, spec in flags._fields_of(TransformerConfig).items() if spec.kind is str and
             spec.words and name not in ("attention", "kernels", "init", "parametrisation")}
    words |= dict(mixer=[*MIXERS, "window,full"], ff=[*FEED_FORWARDS, "none"], tie_weights=[True], norm_gain=[False],
                  bias=[True, "qkv"], qk_norm=[True], head_bias=[True], short_conv=[3], shorten=[2], n_kv_head=[2],
                  value_residual=[True], score_softcap=[5.0], softmax_plus_one=[True], logit_softcap=[9.0])
    alone = [{name: word} for name, choices in words.items() for word in choices]
    draw = random.Random(3)
    together = [{name: draw.choice(words[name]) for name in draw.sample([*words], 3)} for _ in range(20)]
    counts = {True: 0, False: 0}
    for number, settings in enumerate(alone + together):
        settings = dict(rope_factor=2.0, **settings) if "rope_scaling" in settings else settings
        try:
            TransformerConfig(**{**SMALL, **settings})
        except ValueError:
            continue                                         # no model can be so
        stands = [f"{name} " for name, word in settings.items()] if number < len(alone) else []
        counts[outcome(settings, tmp_path / "out", stands) is None] += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert min(counts.values()) > 20, counts


def test_what_a_config_json_says():
    """Null where there is no special token; rope_theta beside rope_parameters; experts of an even width; yarn by turns
    as longrope; no name of a compiled module."""
    config, found = hf.as_folder(loud(rope_base=777.0))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 777.0
    assert not [name for name in found if "_orig_mod" in name]
    config, found = hf.as_folder(loud(ff="moe", n_expert=5))
    assert config["intermediate_size"] % 8 == 0 and found[
        "model.layers.0.block_sparse_moe.experts.0.w2.weight"].shape == (32, config["intermediate_size"])
    assert hf.as_folder(loud(rope_scaling="yarn", rope_factor=2.0))[0]["rope_parameters"]["rope_type"] == "longrope"


def bad(name, error, *words):
    """A case of a folder that is changed by the function `name`d, and what its one line says."""
    return pytest.param(error, words, id=name)


def retold(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
    return change


def rewritten(change):
    def into(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")
    return into


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")


class Bomb:
    """What a pickle could do."""

    def __reduce__(self):
        return exec, ("open('exploded', 'w')",)


def sharded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("change, words", [
    bad("no config", lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    bad("no object", lambda folder: (folder / "config.json").write_text("[1]"), "no object"),
    bad("unknown class", retold(model_type="gemma"), "'gemma' is not read", "llama, mistral"),
    bad("a size that is a lie", retold(intermediate_size=96), "gate_proj", "(88, 32)", "(96, 32)"),
    bad("a size past all memory", retold(hidden_size=2 ** 40), "config.json"),
    bad("a billion layers", retold(num_hidden_layers=10 ** 9), "n_layer 1,000,000,000"),
    bad("a negative size", retold(num_hidden_layers=-1), "n_layer"), bad("no size", retold(hidden_size=None), "lacks"),
    bad("a text for a size", retold(num_attention_heads="4"), "config.json"),
    bad("another activation", retold(hidden_act="mish"), "mish"),
    bad("another rope", retold(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "dynamic"),
    bad("partly turned", retold(partial_rotary_factor=0.5), "partial_rotary_factor"),
    bad("turns now and then", retold(model_type="smollm3", no_rope_layers=[0, 1]), "no_rope_layers"),
    bad("an odd part", retold(model_type="phi", partial_rotary_factor=0.4), "no pairs"),
    bad("norms of phi", retold(model_type="phi", qk_layernorm=True), "qk_layernorm"),
    bad("biases of a half", retold(attention_bias=True), "one setting"),
    bad("missing tensor", rewritten(lambda found: found.pop(Q)), "lacks the tensor " + Q),
    bad("a tensor too many", rewritten(lambda found: found.update(extra=found[Q].clone())), "takes its tensor extra"),
    bad("another shape", rewritten(lambda found: found.update({Q: found[Q][:8].clone()})), Q, "(8, 32)", "(32, 32)"),
    bad("another head", lambda folder: retold(tie_word_embeddings=True)(folder), "lm_head.weight is another"),
    bad("missing shard", sharded, "model-00001-of-00002.safetensors"), bad("a pickle", pickled, "could run code"),
    bad("a pickle so named", lambda folder: torch.save({"a": Bomb()}, folder / "model.safetensors"), "safetensors"),
    bad("cut off", lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-9]), "damaged"),
])
def test_a_bad_folder_is_one_line(change, words, tmp_path, monkeypatch):
    """And no code of it runs, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "bad", *hf.as_folder(loud()))
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    with raises_one_line("bad", *words):
        hf.load(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_old_names_are_read(tmp_path):
    """Of a compiled module, with masks beside, without the top of a hub's gpt2, in shards."""
    model = loud(norm="layer", positions="learned", activation="gelu_tanh", tie_weights=True, bias=True)
    config, found = hf.as_folder(model)
    found = {f"_orig_mod.{name.removeprefix('transformer.')}": t for name, t in found.items()}
    folder = written(tmp_path / "a", {**config, "activation_function": "gelu_new"}, {})
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, "b.safetensors": {}}
    for name, t in found.items():
        shards["a.safetensors" if "h.0" in name else "b.safetensors"][name] = t
    for shard, part in shards.items():
        save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: shard for shard, part in shards.items() for name in part}}))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in hf.load(folder).state_dict().items())


# What llama.cpp computes: (its architecture, settings).
BYTES = dict(vocab_size=256, block_size=64)
GGUF = [
    ("llama", {}), ("llama", dict(bias=True, n_kv_head=2, tie_weights=True)),
    ("llama", dict(rope_scaling="linear", rope_factor=2.0, norm_eps=1e-3, head_dim=10, vocab_size=257)),
    ("llama", dict(rope_scaling="llama3", rope_factor=4.0, rope_original=16)), ("llama", dict(ff="moe", **SHARES)),
    ("arcee", dict(activation="relu2")), ("qwen2", dict(bias="qkv", n_kv_head=1)), ("mamba", MAMBA),
    ("qwen3", dict(qk_norm=True, qk_gain=True, n_kv_head=2)), ("qwen3moe", dict(ff="moe", qk_norm=True, **SHARES)),
    ("olmo2", dict(norm_after=True, qk_norm="full", n_kv_head=2)), ("smollm3", dict(nope_interval=4, n_layer=5)),
    ("gpt2", dict(norm="layer", positions="learned", activation="gelu_tanh")),
    ("starcoder2", dict(norm="layer", activation="gelu_tanh", n_kv_head=2)),
    ("phi2", dict(PART, activation="gelu_tanh", parallel_residual="shared", head_bias=True, n_kv_head=2)),
    ("gptneox", dict(PART, activation="gelu_tanh", parallel_residual=True, bias=True)),
]


def gguf_of(settings, folder):
    """(a model, {name: tensor} of its class, the file that is written from its folder)."""
    model = loud(**BYTES | settings)
    config, found = hf.as_folder(model)
    written(folder / "out", config, found)
    (folder / "out" / "tokenizer.json").write_text(tokens.as_json(tokens.Bytes()))
    hf.gguf(folder / "out", folder / "model.gguf")
    return model, found, folder / "model.gguf"


@pytest.mark.parametrize("case", GGUF, ids=name_of)
def test_gguf(case, tmp_path):
    """Every number of the folder is in the file, and what is at it says what the model is."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: nothing is written for llama.cpp")
    model, found, path = gguf_of(case[1], tmp_path)
    c, reader, turns = model.config, gguf.GGUFReader(path), case[0] not in ("gpt2", "mamba")
    said = {name.removeprefix(case[0] + "."): field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == case[0] and said["block_count"] == c.n_layer
    assert (said["embedding_length"], said["context_length"], said["vocab_size"]) == (32, 64, c.vocab_size)
    assert said["tokenizer.ggml.eos_token_id"] == len(said["tokenizer.ggml.tokens"]) - 1 == c.vocab_size - 1
    assert said.get("rope.dimension_count", 0) == (c.turning or c.head_dim) * turns
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], model.embed)
    values = torch.cat([t.flatten() for name, t in tensors.items() if name not in ("rope_freqs.weight", "blk.0.ssm_a",
                                                                                   "blk.1.ssm_a")])
    wanted = torch.cat([t.flatten() for name, t in found.items() if not name.endswith("A_log")])
    assert torch.equal(values.sort().values, wanted.sort().values)
    for i in range(c.n_layer):
        if case[0] == "mamba":                               # A, not its logarithm
            minus = tensors[f"blk.{i}.ssm_a"] / found[f"backbone.layers.{i}.mixer.A_log"].exp()
            torch.testing.assert_close(minus, torch.full_like(minus, -1.0))
        if case[0] in ("llama", "arcee", "smollm3"):         # features that turn together lie side by side
            halves = found[f"model.layers.{i}.self_attn.q_proj.weight"].unflatten(0, (c.n_head, 2, -1))
            pairs = tensors[f"blk.{i}.attn_q.weight"].unflatten(0, (c.n_head, -1, 2))
            assert torch.equal(pairs, halves.transpose(1, 2))
    if c.rope_scaling == "llama3":                           # by what the frequencies are divided
        plain = c.rope_base ** -(torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        torch.testing.assert_close(tensors["rope_freqs.weight"].double(), plain / model.ropes[str(
            c.head_dim)].frequencies, atol=1e-6, rtol=1e-6)


def test_what_llama_cpp_computes_otherwise_is_one_line(tmp_path):
    """And nothing is written."""
    pytest.importorskip("gguf", reason="gguf is not installed: nothing is written for llama.cpp")
    for settings, words in ((dict(mixer="window"), "'window' stands"), (dict(activation="geglu"), "'geglu' stands"),
                            (dict(activation="relu2", bias=True), "bias True"), (dict(mixer="mla"), "DeepseekV3"),
                            (dict(positions="none"), "positions 'none'"), (dict(vocab_size=300), "of bytes"),
                            (dict(rope_scaling="yarn", rope_factor=2.0), "rope_scaling 'yarn'"),
                            (dict(norm="layer", activation="gelu"), "takes activation gelu_tanh")):
        with raises_one_line("out", words):
            gguf_of(settings, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("case", GGUF, ids=name_of)
def test_llama_cpp(case, tmp_path):
    """Log-probabilities and greedy text of llama.cpp itself, float32 throughout. Its GELU is a table of float16."""
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: no llama.cpp to ask")
    model, _, path = gguf_of(case[1], tmp_path)
    how = llama.CommonParams()
    how.model.path, how.n_ctx, how.n_parallel, how.warmup, how.cpuparams.n_threads = str(path), 64, 1, False, 1
    how.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    how.cache_type_k = how.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server, prompt = llama.Server(how), [*b"The quick"]

    def answer(ids, n):
        return server.handle_completions(dict(prompt=ids, n_predict=n, temperature=0.0, top_k=1, n_probs=512,
                                              cache_prompt=False))["choices"][0]
    text = [int(t) for t in generate(model, [prompt], 40, temperature=0.0)]
    text = text[:text.index(model.config.vocab_size - 1)] if model.config.vocab_size - 1 in text else text
    with torch.no_grad():
        wanted = model(torch.tensor([prompt + text]))[0].log_softmax(-1)
    worst, seen = 0.0, 0
    for n in range(0, len(text), 2):                         # an unfinished character is not reported
        for step in (answer(prompt + text[:n], 1)["logprobs"] or {"content": []})["content"]:
            said = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
            worst = max([worst, *(abs(wanted[len(prompt) + n - 1, i].item() - p) for i, p in said.items())])
            seen += len(said) == model.config.vocab_size
    print(f"{name_of(case)}: {worst:.1e} at {seen} steps, {len(text)} bytes")
    assert seen and worst <= (2e-3 if model.config.activation == "gelu_tanh" else 2e-5)
    assert answer(prompt, len(text))["text"] == bytes(text).decode(errors="replace")


TEXT = "".join(f"The {word} of {number} is a {word}ing, or it's not: {number * 37 % 101}.\n" for number in range(300)
               for word in ("king", "song", "m\u00fch", "  day"))
ODD = ["", " ", "\n\n  \t x", "<|endoftext|>", "\u2581 \u00e9\U0001f600\u0301", "\x00\x7f", "don't  123", "\u4e2d abc"]


@pytest.mark.parametrize("kind", ["bytes", "bpe:300", "sentencepiece:400", "bpe"])
def test_tokenizers(kind, tmp_path):
    """The ids of a tokenizer.json are ours, by transformers and read back here; every text comes back."""
    if kind == "bpe":                                        # of sentencepiece's two kinds the other
        ours = tokens.SentencePiece(tokens._sentencepiece(TEXT, 400, "bpe"))
    else:
        ours = tokens.open_or_train(kind, TEXT.encode())
    (tmp_path / "tokenizer.json").write_text(tokens.as_json(ours), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    other, back = AutoTokenizer.from_pretrained(tmp_path), tokens.open_tokenizer(tmp_path / "tokenizer.json")
    assert len(other) == ours.size == back.size and back.pieces == ours.pieces
    odd = [text for text in ODD if kind in ("bytes", "bpe:300") or "\u2581" not in text]     # which becomes a space
    with_end = json.loads(tokens.as_json(ours, "<|end|>"))["added_tokens"][-1]
    assert (with_end["id"], with_end["content"], with_end["special"]) == (ours.size, "<|end|>", True)
    for text in [TEXT, *odd]:
        ids = ours.encode(text)
        assert other.encode(text, add_special_tokens=False) == ids == back.encode(text), text
        assert other.decode(ids) == text == back.decode(ids)
    assert isinstance(back, tokens.Bytes) == (kind == "bytes")


@pytest.mark.parametrize("size, words", [(300, ""), (64, "tokens, more than block_size 64")])
def test_a_folder_is_probed(size, words, tmp_path, monkeypatch, capsys):
    """About people whom its prompts tell of, and the same untold; or one line where these are too long."""
    config, found = hf.as_folder(loud(vocab_size=256, block_size=size))
    (written(tmp_path / "out", config, found) / "tokenizer.json").write_text(tokens.as_json(tokens.Bytes()))
    monkeypatch.setattr(sys, "argv", ["probe.py", str(tmp_path / "out"), "--n_people", "24", "--steps", "3"])
    probe = runpy.run_path(str(ROOT / "nanolab" / "probe.py"))["main"]
    if words:
        with pytest.raises(SystemExit, match="2"):
            probe()
        assert words in capsys.readouterr().err
        return
    probe()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["told people", "not told people"] and len(lines) == 6
    embed = lines[3].split()                                 # the last byte is the same: nothing to tell people by
    assert embed[0] == "embed" and embed[1] == embed[3] and embed[4] == embed[6]


SHORT = ("--dataset data.txt --block_size 32 --batch_size 4 --max_steps {} --warmup_steps 1 --eval_interval 4 "
         "--save_interval 1 --log_interval 1 --device cpu --dtype float32 --lr 0.003 --dropout 0.1 --run_name {}")
RUNS = {  # a run, and what another says that begins with its weights
    "train_enwik8": ("--n_layer 2 --n_head 2 --n_embd 32 --positions learned --norm layer --activation relu2 "
                     "--n_targets 1 --no-intermediate_losses --eval_windows 2 --sample_length 0",
                     "--eval_windows 2 --sample_length 0 --lora_rank 2 --lora_on all --lora_alpha 9 --lora_only "
                     "--ema_decay 0.5 --block_size 16"),
    "train_facts": ("--task text --tokenizer bpe:300 --n_embd 32 --eval_prompts 2", "--task text --eval_prompts 2"),
}


@pytest.mark.parametrize("script", RUNS)
def test_a_run_goes_out_and_another_begins_with_it(script, tmp_path, monkeypatch, capsys):
    """The folder says what the run says, by transformers too; a run that begins with it resumes to the same bits, the
    folder gone, or where it keeps adapters alone not without it. A run that begins with a run leaves it as it is."""
    (tmp_path / "data.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("draw_curves", "_output", "_version"):
        monkeypatch.setattr(experiment, name, lambda *given: None)

    def typed(words, code=0):
        """What a script prints; on standard error where its exit status is not 0."""
        torch.set_deterministic_debug_mode("default")
        monkeypatch.setattr(sys, "argv", words.split())
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / sys.argv[0]))["main"]()
            assert code == 0
        except SystemExit as end:
            assert end.code == code, capsys.readouterr().err
        return capsys.readouterr()[code > 0]
    typed(f"{script}.py {SHORT.format(6, 'first')} {RUNS[script][0]}")
    first, out = run_folder(script, "runs", "first"), tmp_path / "out"
    hf.main(["export", str(first), str(out)])
    with raises_one_line("is there already"):
        hf.export(first, out)
    said = [typed(f"sample.py {source} --greedy --length 20 --prompt The") for source in (first, out)]
    assert said[0] == said[1]
    scored = [typed(f"evaluate.py {source} --dataset data.txt --resamples 20").splitlines()[-1].split()
              for source in (first, out)]
    assert scored[0][:-1] == scored[1][:-1]
    if script == "train_facts":
        words = AutoTokenizer.from_pretrained(out)
        found = theirs(out).generate(words("The", return_tensors="pt").input_ids, max_new_tokens=20, do_sample=False,
                                     pad_token_id=0)
        assert words.decode(found[0]) + "\n" == said[0]
    again = RUNS[script][1] + f" --init_from {out}"
    for steps, name in ((4, "straight"), (2, "halves")):
        typed(f"{script}.py {SHORT.format(steps, name)} {again}")
    halves, straight = (run_folder(script, tmp_path / "runs", name) for name in ("halves", "straight"))
    resume = f"{script}.py --resume --run_name halves --max_steps"
    if "--lora_only" not in again:
        shutil.rmtree(out)
    typed(f"{resume} 4")
    assert_same_end(halves, straight)
    assert typed(f"sample.py {halves} --length 5")
    if "--lora_only" in again:
        last = experiment.load_checkpoint(halves / "last.pt")
        stepped = sum((group["params"] for group in last["optimizer"]["param_groups"]), [])
        assert len(last["model"]) == len(stepped) == len(last["ema"]["weights"]) == 16
        assert all(name.endswith(("lora_a", "lora_b")) and t.std() > 0 for name, t in last["model"].items())
        hf.export(halves, tmp_path / "merged", weights="ema")
        said = [typed(f"sample.py {place} --greedy --length 9") for place in (f"{halves} --weights ema", "merged")]
        assert said[0] == said[1]
        shutil.rmtree(out)
        for said, other in (("without their base", None), ("has other weights now", tmp_path / "merged")):
            if other:
                other.rename(out)
            for command in (f"{resume} 5", f"sample.py {halves}"):
                error = typed(command, 2)
                assert said in error and error.startswith("error: ") and error.count("\n") == 1
        shutil.rmtree(out)
    assert typed(f"{script}.py {SHORT.format(4, 'gone')} {again}", 2).endswith("out: no such file or directory\n")
    again = RUNS[script][1].partition("--lora")[0] + " --lora_rank 2"
    assert "which? --init_from" in typed(f"{script}.py {SHORT.format(1, 'of_none')} {again}", 2)
    typed(f"{script}.py {SHORT.format(1, 'adapted')} {again} --init_from {first}")           # a run in a folder's place
    adapted, base = (experiment.load_checkpoint(run / "last.pt")["model"]
                     for run in (run_folder(script, "runs", "adapted"), first))
    assert_equal({name: adapted[name] for name in base}, dict(base))
    assert len(adapted) == len(base) + 8
