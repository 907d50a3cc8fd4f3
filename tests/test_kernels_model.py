"""The model with kernels "triton" against kernels "torch": losses, gradients, logits, caches; and who calls what when.

On a CPU kernels are their formulas, and in Triton's interpreter themselves.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import kernels
from interpreter import (Largest, alone, assert_dropped_alike, assert_near_under_autocast, assert_same, by_each,
                         in_words, interpreted, needs_interpreter, watched, whole)
from interpreter import pair as pair_of
from model import Causal, Positions, TransformerConfig, build_model, from_checkpoint
from models.experts import MixtureOfExperts

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(vocab_size=31, n_layer=2, n_head=4, n_embd=24, block_size=16, init="xavier", positions="rope")
LOSS, NORM = "batched_linear_cross_entropy", "layer_norm"
PLAIN = {LOSS, NORM, "rotary", "gelu", "attend"}  # what SMALL calls
RAGGED = torch.tensor([[-1, -1, -1, *range(13)], [*range(16)]])
SPREAD = torch.tensor([[*range(8), *[-1] * 5, *range(8, 11)], [*range(16)]])  # padding within a row
FAR = dict(n_targets=3, head_bias=True, intermediate_losses=True)
COUNTED = dict(counted=torch.tensor([0, 5, 6, 17, 31]))

CASES = {  # name: (settings, what forward is given more, operations called)
    "plain": ({}, {}, PLAIN),
    "rms": (dict(norm="rms", norm_gain=False), {}, PLAIN - {NORM} | {"rms_norm"}),
    "dyt": (dict(norm="dyt", residual_scale=10.0), {}, PLAIN - {NORM}),
    "swiglu": (dict(activation="swiglu"), {}, PLAIN - {"gelu"} | {"gated"}),
    "relu2": (dict(activation="relu2"), {}, PLAIN - {"gelu"} | {"relu2"}),
    "solu": (dict(activation="solu"), {}, PLAIN - {"gelu"}),
    "low rank": (dict(ff="low_rank", activation="swiglu"), {}, PLAIN - {"gelu"} | {"gated"}),
    "learned": (dict(positions="learned"), {}, PLAIN - {"rotary"}),
    "grouped heads": (dict(n_kv_head=2, qk_norm=True, qk_scale=True), {}, PLAIN),
    "values of the first layer": (dict(value_residual=True, n_layer=3), {}, PLAIN),
    "own heads": (FAR, {}, PLAIN),
    "shared heads": (dict(FAR, target_heads="shared"), {}, PLAIN),
    "layers share": (dict(FAR, layer_heads="shared"), COUNTED, PLAIN),
    "last layer only": (FAR, dict(active=(1,)), PLAIN),
    "tied": (dict(tie_weights=True, head_bias=True), {}, PLAIN),
    "stablemax": (dict(output="stablemax"), {}, PLAIN - {LOSS}),
    "capped logits": (dict(logit_softcap=0.5, n_targets=2), COUNTED, PLAIN - {LOSS}),
    "two bytes ahead": (dict(mtp_depth=1), {}, PLAIN),
    "recomputed": (dict(checkpoint_activations=True), {}, PLAIN),
    "ragged": (dict(n_targets=2), dict(positions=RAGGED), PLAIN - {"attend"}),
    "alibi": (dict(positions="alibi"), {}, PLAIN - {"rotary", "attend"}),
    "by hand": (dict(attention="manual"), {}, PLAIN - {"attend"}),
    "sdpa": (dict(attention="sdpa"), {}, PLAIN - {"attend"}),
    "capped scores": (dict(score_softcap=0.5), {}, PLAIN - {"attend"}),
    "softmax plus one": (dict(softmax_plus_one=True), {}, PLAIN - {"attend"}),
    "diff, capped scores": (dict(mixer="diff", score_softcap=0.5), {}, PLAIN - {"attend"}),
    "mla, capped scores": (dict(mixer="mla", score_softcap=0.5), {}, PLAIN - {"attend"} | {"rms_norm"}),
    "wide heads": (dict(n_head=1, head_dim=258), {}, PLAIN - {"attend"}),
    "later": ({}, dict(positions=torch.arange(4, 20)), PLAIN),
    "limited": ({}, dict(window=5), PLAIN),
    "window": (dict(mixer="window", window=5), {}, PLAIN),
    "prefix": ({}, dict(prefix=6), PLAIN),
    "prefixes": (dict(mixer="full,window", window=4), dict(prefix=torch.tensor([3, 9])), PLAIN),
    "prefix later": ({}, dict(prefix=10, positions=torch.arange(4, 20)), PLAIN - {"attend"}),
    "strided": (dict(mixer="strided", sparse_stride=4), {}, PLAIN),
    "diff": (dict(mixer="diff", n_kv_head=2), {}, PLAIN - {"attend"} | {"attend_differential"}),
    "diff, prefix": (dict(mixer="diff"), dict(prefix=6, window=7), PLAIN - {"attend"} | {"attend_differential"}),
    "diff, alibi": (dict(mixer="diff", positions="alibi"), {}, PLAIN - {"attend", "rotary"}),
    "diff, wide heads": (dict(mixer="diff", n_head=2, head_dim=130), {}, PLAIN - {"attend"}),
    "mla": (dict(mixer="mla", q_rank=8), {}, PLAIN | {"rms_norm"}),
    "mla, few queries": (dict(mixer="mla", kv_rank=2, rope_dim=2), {}, PLAIN | {"rms_norm"}),
    "xl": (dict(mixer="xl", memory_length=8), {}, PLAIN - {"attend"}),
    "mingru": (dict(mixer="mingru"), {}, {LOSS, NORM, "gelu", "min_gru"}),
    "mingru, padding": (dict(mixer="mingru"), dict(positions=SPREAD), {LOSS, NORM, "gelu", "min_gru"}),
    "mamba": (dict(mixer="mamba"), {}, {LOSS, NORM, "gelu", "selective_scan"}),
    "mamba, padding": (dict(mixer="mamba,full"), dict(positions=SPREAD), PLAIN - {"attend"} | {"selective_scan"}),
    "moe": (dict(ff="moe", activation="swiglu", n_shared_expert=1), {}, PLAIN - {"gelu"} | {"gated", "grouped_linear"}),
    "moe, biases": (dict(ff="moe", expert_balance="bias", n_expert=16), {}, PLAIN | {"grouped_linear"}),
    "pyramid": (dict(n_layer=4, shorten=2), {}, PLAIN),
    "mup": (dict(parametrisation="mup", mup_base_width=8, n_targets=2), COUNTED, PLAIN),
}


def pair(**settings):
    """The same model twice, gains and biases moved too."""
    return pair_of(lambda: build_model(TransformerConfig(**{**SMALL, **settings})), 0.1)


def close(got, want, near=1e-5):
    torch.testing.assert_close(got, want, atol=near, rtol=1e-5)


def text(*shape, seed=1):
    return whole(SMALL["vocab_size"], *shape, seed=seed)


def labels(model, B=2, T=16):
    """Targets, some of which do not count."""
    targets = text(B, T, model.config.n_labels, seed=2)
    targets[0, 3:6, 0] = targets[1, -2:] = -1
    return targets


def passing(**how):
    """What a pass for training gives: the objective, nats, balance and other extras."""
    def run(model):
        objective, nats = model(text(2, 16), labels(model), **how)
        assert nats.abs().min() > 0.1 and nats.dtype == torch.float32
        return dict(objective=objective, nats=nats, **model.extras, **{f"loads {i}": n for i, n in model.usage.items()})
    return run


# --- Formulas ---

@pytest.mark.parametrize("case", CASES)
def test_same_losses_and_gradients_and_who_is_called(case):
    settings, how, expected = CASES[case]
    assert_same(pair(**settings), passing(**how), expected, near=1e-5, largest=False)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("prefix later", "later")])
@torch.no_grad()
def test_same_logits_with_and_without_cache(case):
    settings, how, _ = CASES[case]
    one, two = (model.eval() for model in pair(**settings))
    how, x = {name: how[name] for name in ("positions", "prefix", "window") if name in how}, text(2, 16)
    if "positions" in how:
        how["positions"] = RAGGED  # a cache of states takes rows padded on the left only
    whole = one(x, **how)
    assert whole.std() > 0.1
    kernels.use("triton")
    close(two(x, **how), whole)
    cache, parts = two.new_cache(2, 16, how.pop("window", None)), []
    for first, end in ((0, 9), (9, 10), (10, 11), (11, 16)):
        given = {name: value[:, first:end] if name == "positions" else value for name, value in how.items()}
        parts.append(two(x[:, first:end], cache=cache, **given))
        how.pop("prefix", None)
    real = how.get("positions", torch.arange(16).expand(2, 16)) >= 0
    close(torch.cat(parts, 1)[real], whole[real])


@pytest.mark.parametrize("mixer, positions", [("mingru", "rope"), ("mamba", "rope"), ("xl", "rope"),
                                              ("xl", "relative"), ("compressive", "rope")])
def test_same_over_segments(mixer, positions):
    """Three segments of a stream; each goes on from the memory of those before."""
    def run(model):
        memory = model.new_memory(2)
        parts = [model(text(2, 8, seed=i), text(2, 8, 1, seed=9), memory=memory)[0] for i in range(3)]
        return dict(loss=sum(parts), parts=parts)
    models = pair(mixer=mixer, positions=positions, memory_length=8, block_size=8, compressed_length=4,
                  compression_rate=2)
    called = assert_same(models, run, near=1e-5, largest=False)
    assert ("attend" in called) == ((mixer, positions) == ("xl", "rope"))  # keys of old are plain causal ones


def test_dropout_is_drawn_as_before():
    """Attention with dropout is PyTorch's, so both draw the same; in evaluation it is the kernel's again."""
    assert_dropped_alike(pair(dropout=0.3), lambda model: passing()(model)["nats"], {"attend"}, near=1e-5)


LONE = {"rotary", "attend_one"}


@pytest.mark.parametrize("settings, expected", [
    (dict(mixer="mingru"), set()), (dict(mixer="mamba"), set()), ({}, LONE), (dict(mixer="diff"), LONE),
    (dict(mixer="window", window=4), LONE), (dict(mixer="xl"), {"rotary"}), (dict(mixer="strided"), LONE),
    (dict(n_kv_head=2), LONE), (dict(mixer="mla", norm="rms"), {"rms_norm", "rotary", "attend_latent"}),
    (dict(positions="alibi"), set()), (dict(score_softcap=0.5), {"rotary"}), (dict(attention="sdpa"), {"rotary"}),
    (dict(softmax_plus_one=True), {"rotary"}), (dict(positions="learned"), {"attend_one"}),
], ids=in_words)
@torch.no_grad()
def test_what_one_byte_over_a_cache_calls(settings, expected, by_triton):
    model = pair(**settings)[1].eval()
    cache = model.new_cache(2, 16)
    model(text(2, 12), cache=cache)
    with watched() as called:
        model(text(2, 1), cache=cache)
    assert called.keys() == {NORM, "gelu"} - ({NORM} if "norm" in settings else set()) | expected


def test_a_latent_too_wide_for_its_kernel_goes_as_ever(by_triton):
    q, held = torch.randn(1, 2, 1, 514), torch.randn(1, 1, 5, 514)
    for rank, expected in ((512, {"attend_latent"}), (513, set())):
        mixer = pair(mixer="mla", n_layer=1, n_head=2, kv_rank=rank, rope_dim=2)[1].blocks[0].mixer
        with watched() as called:
            y = mixer.attend_latents(q, held, Positions(4, 1), None, Causal(), 0.1)
        close(y, (q @ held.mT * 0.1).softmax(-1) @ held[..., :rank])
        assert called.keys() == expected


@pytest.mark.parametrize("settings", [dict(norm="rms", qk_norm=True, activation="swiglu", n_targets=2),
                                      dict(mixer="mla", ff="moe"), dict(mixer="diff,mingru,mamba", n_layer=3)], ids=str)
def test_autocast(settings):
    def run(model):
        objective, nats = model(text(2, 16), labels(model))
        assert model(text(2, 16)).dtype == nats.dtype == torch.float32
        return nats, objective
    assert_near_under_autocast(pair(**settings), run, 0.05, 0.98)


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_never_all_logits(heads):
    models = by_each(pair(vocab_size=256, n_targets=2, target_heads=heads, ff="none"))
    for all_of_them, model in zip((True, False), models):
        x, targets = text(16, 16), text(16, 16, 2, seed=2)
        with Largest() as seen:
            model(x, targets)[0].backward()
        assert (seen.numel >= 256 * 2 * 256) == all_of_them and (all_of_them or seen.numel <= 256 * 2 * 256 // 4)


def test_experts_do_not_wait_for_the_device(monkeypatch, by_triton):
    """On tensors without numbers, where reading one is an error; without the product: its twin reads the offsets."""
    seen = []

    def product(x, weight, offsets):
        seen.append((x.shape, weight.shape, offsets.shape, offsets.dtype))
        return x.new_empty(len(x), weight.size(1))
    monkeypatch.setattr(kernels, "grouped_linear", product)
    monkeypatch.setattr(kernels, "gated", lambda kind, x, gated=kernels.gated: seen.append(x.shape) or gated(kind, x))
    with FakeTensorMode():
        ff = MixtureOfExperts(TransformerConfig(**SMALL, ff="moe", activation="swiglu", n_expert=9, n_shared_expert=1))
        places = Positions(0, 5)
        assert ff(torch.empty(3, 5, 24), places).shape == (3, 5, 24)
        with pytest.raises(DynamicOutputShapeException):
            torch.bincount(torch.zeros(3, dtype=torch.int64))
    assert len(places.losses["balance"]) == 1 and places.usage[0][1].shape == (8,)
    W = ff.width
    assert seen == [((30, 24), (8, 2 * W, 24), (9,), torch.int64), (30, 2 * W),
                    ((30, W), (8, 24, W), (9,), torch.int64), (15, 2 * W)]  # the last is the shared expert's


# --- Kernels ---

@needs_interpreter
@pytest.mark.parametrize("settings", [
    dict(activation="swiglu", n_targets=2, n_kv_head=1, mixer="full,mamba", state_dim=4, ff="moe,mlp", n_expert=4),
    dict(norm="rms", mixer="window,diff", window=3, activation="relu2", target_heads="shared", n_targets=2,
         head_bias=True), dict(mixer="mingru", intermediate_losses=True)], ids=str)
def test_one_step_in_the_interpreter(settings):
    tiny = dict(vocab_size=17, n_layer=2, n_head=2, n_embd=16, block_size=8)
    padded = torch.tensor([[-1, -1, *range(6)], [*range(8)]])
    how = dict(positions=padded) if settings["mixer"] == "mingru" else {}

    def run(model):
        targets = whole(17, 2, 8, model.config.n_labels, seed=2)
        targets[1, 2] = -1
        objective, nats = model(whole(17, 2, 8), targets, **how)
        return dict(objective=objective, nats=nats)
    assert_same(pair(**tiny, **settings), run, way=alone, near=1e-5, largest=False)


@needs_interpreter
@pytest.mark.parametrize("settings", [dict(n_kv_head=1, mixer="window", window=4), dict(mixer="diff"),
                                      dict(mixer="mla", kv_rank=8, rope_dim=4)], ids=str)
@torch.no_grad()
def test_generation_in_the_interpreter(settings, monkeypatch):
    """Bytes one by one over a cache, by kernels, against one pass by PyTorch."""
    one, two = (model.eval() for model in pair(n_layer=1, n_head=2, n_embd=16, **settings))
    x = text(2, 10)
    whole = one(x)
    monkeypatch.setattr(kernels, "softmax_over", None)  # no reference can run
    cache = two.new_cache(2, 16)
    with interpreted():
        parts = [two(part, cache=cache) for part in x.split((7, 1, 1, 1), 1)]
    close(torch.cat(parts, 1), whole)


# --- The setting ---


def test_the_switch():
    """One for the process; `using` puts back what was, come what may; another word changes nothing."""
    assert TransformerConfig().kernels == "torch"
    with pytest.raises(ValueError, match="kernels is 'cuda', but must be one of torch, triton"):
        TransformerConfig(kernels="cuda")
    assert not kernels.on()
    with pytest.raises(ZeroDivisionError), kernels.using("triton"):
        assert kernels.on() and not kernels.fits(torch.ones(2))  # on a CPU the formula
        with kernels.using("torch"):
            assert not kernels.on()
        assert kernels.on() and 1 / 0
    assert not kernels.on()
    with pytest.raises(ValueError, match="kernels 'cuda': it must be torch or triton"):
        kernels.use("cuda")
    assert not kernels.on()


def test_a_checkpoint_brings_its_kernels():
    """Whoever samples or evaluates goes by what the run was trained with; checkpoints from before the setting too."""
    model = build_model(TransformerConfig(**SMALL))
    for setting, on in (({"kernels": "triton"}, True), ({"kernels": "torch"}, False), ({}, False)):
        found = from_checkpoint(dict(settings={**SMALL, **setting}, vocab_size=31, model=model.state_dict()))
        assert kernels.on() == on and found.state_dict().keys() == model.state_dict().keys()
