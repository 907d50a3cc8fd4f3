"""short_conv, ff "none" and qk_scale by hand; a short convolution that slides, remembers and is computed again."""
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm
from model import (Positions, Transformer, TransformerConfig, build_model, equal_ff_mult, initialise,
                   parameter_roles, parameter_rules)
from models.encoder_decoder import Encoder, PrefixDecoder
from models.short_conv import ShortConv
from nanolab.dialog_tree import DialogTree
from variants import SMALL, T, close, in_chunks, padded, text, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mixer="full", seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, "short_conv": 2, **settings})).eval()


def conv(width, n_embd=3):
    made = ShortConv(TransformerConfig(n_embd=n_embd, n_head=1, short_conv=width)).double()
    with torch.no_grad():
        made.init_weights()
    return made


# --- The convolution by hand ---

def test_closed_form():
    made = conv(3, 2)
    with torch.no_grad():
        made.kernel.copy_(torch.tensor([[1.0, 10.0], [0.5, -1.0], [0.25, 2.0]]))
    x = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [4.0, 3.0], [8.0, 5.0]]], dtype=torch.float64)
    wanted = torch.tensor([[[1.0, 10.0], [2.5, -1.0], [5.25, 32.0], [10.5, 47.0]]], dtype=torch.float64)
    assert torch.equal(made(x, Positions(0, 4)), wanted)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("width", [2, 4])
def test_against_conv1d_with_gradients(width, n):
    made, x = conv(width), torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    wanted = F.conv1d(F.pad(x.mT, (width - 1, 0)), made.kernel.flip(0).mT.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(made(x, Positions(0, n)), wanted)
    index = padded((n, n // 2), n).flip(1)

    def run(x, kernel, index=None):
        return torch.func.functional_call(made, {"kernel": kernel}, (x, Positions(0, n, index)))
    assert torch.autograd.gradcheck(run, (x, made.kernel))
    assert torch.autograd.gradcheck(lambda *t: run(*t, index)[index >= 0], (x, made.kernel))


def test_initial_range():
    for width in (2, 4):
        kernel = conv(width, 4096).kernel
        assert kernel.shape == (width, 4096) and kernel.abs().max() <= width ** -0.5
        assert kernel.abs().max() > 0.99 * width ** -0.5 and kernel.mean().abs() < 0.02
        assert kernel.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.02)


def test_it_stands_between_norm_and_mixer():
    model = build(short_conv=3)
    block, x = model.blocks[1], torch.randn(1, 6, 32)
    places = model.place(text(1, 6), None)
    h = block.norm1(x)
    k = block.conv.kernel
    h = k[0] * h + k[1] * F.pad(h, (0, 0, 1, 0))[:, :-1] + k[2] * F.pad(h, (0, 0, 2, 0))[:, :-2]
    y = x + block.mixer(h, places)
    torch.testing.assert_close(block(x, places), y + block.ff(block.norm2(y)))


def test_other_parameters_start_as_without():
    plain, model = build("mamba,full", short_conv=0), build("mamba,full")
    found = dict(model.named_parameters())
    kernels = {f"blocks.{i}.conv.kernel" for i in range(3)}
    assert set(found) - kernels == {name for name, _ in plain.named_parameters()}
    assert torch.equal(found["blocks.2.ff.up.weight"], plain.blocks[2].ff.up.weight)
    assert {parameter_roles(model)[name] for name in kernels} == {"gain"}
    assert all(parameter_rules(model)[name] == "module" for name in kernels)
    assert model.n_params() - plain.n_params() == 3 * 2 * 32
    assert model.flops_per_token(8) - plain.flops_per_token(8) == 3 * 3 * 2 * 2 * 32


# --- Caches ---

@pytest.mark.parametrize("mixer", ["full", "mla,diff", "strided,fixed"])
def test_padding_anywhere_with_a_cache_that_forgets_nothing(mixer):
    model, x = build(mixer, short_conv=4, block_size=32), text(2, 9)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, -1, 2, -1, -1, -1, 3, 4]])
    real, alone = places[1] >= 0, whole(model, x[1:, places[1] >= 0])[0]
    for sizes in ([9], [3, 6], [4, 1, 1, 3], [1] * 9):
        found = in_chunks(model, x, sizes, model.new_cache(2, 9), places)
        close(found[0], whole(model, x[:1])[0])
        close(found[1, real], alone)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mixer, width", [("full", 4), ("mla,diff", 2), ("strided", 9), ("mamba,full", 9)])
def test_sliding_caches(mixer, width, ragged):
    """Full attention limited to 6 positions; the convolution sees as many as ever, a wider one too."""
    model, x, W = build(mixer, short_conv=width), text(2, 60), 6
    places = padded((60, 41), 60) if ragged else None
    real = torch.ones(2, 60, dtype=torch.bool) if places is None else places >= 0
    full = whole(model, x, positions=places, window=W)
    for sizes in ([60], [1] * 60, [20, 1, 1, 30, 8]):
        cache = model.new_cache(2, 8, window=W)
        before = cache.bytes
        close(in_chunks(model, x, sizes, cache, places)[real], full[real])
        assert ragged or cache.bytes == before


def test_bytes_by_hand():
    cache = build(short_conv=4, n_kv_head=2).new_cache(5, 10)
    assert cache.bytes == 3 * 5 * 10 * (2 * 2 * 8 + 32) * 4
    cache = build("mingru", short_conv=4).new_cache(5, 10)
    assert cache.bytes == 3 * 5 * (64 + 2 * 4 * 32) * 4


def test_prefix_decoder_with_padding_between_source_and_answer():
    torch.manual_seed(0)
    model = PrefixDecoder(TransformerConfig(**{**SMALL, "block_size": 32, "short_conv": 3})).eval()
    source, x = text(2, 7), text(2, 5, seed=2)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    cache = model.new_cache(2, 5)
    with torch.no_grad():
        full = model(source, x, padding=padding)
        close(torch.cat([model.decode(part, source, cache, padding) for part in x.split([2, 1, 2], 1)], 1), full)
        close(model(source[1:, :4], x[1:]), full[1:])


def test_autocast():
    model, x = build("full,mamba", short_conv=4), text(2, T)
    full = whole(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, T)
        found = in_chunks(model, x, [7, 1, 16], cache)
    assert cache.layers[-1].dtype == torch.bfloat16
    torch.testing.assert_close(found, full, atol=0.3, rtol=0.1)
    short = model.to(torch.bfloat16)
    assert short.blocks[0].conv(torch.zeros(1, 3, 32, dtype=torch.bfloat16), Positions(0, 3)).dtype == torch.bfloat16


# --- Segments ---

def test_segments_shorter_than_the_convolution():
    model, x = build("mingru", short_conv=6), text(2, 10)
    memory = model.new_memory(2)
    close(torch.cat([whole(model, part, memory=memory) for part in x.split([1, 2, 1, 6], 1)], 1), whole(model, x))


def test_memory_holds_no_gradient():
    model, x = build("xl").train(), text(2, 16)
    memory = model.new_memory(2)
    for part in x.split(8, 1):
        objective, _ = model(part, part.unsqueeze(2), memory=memory)
        assert all(not t.requires_grad for held in memory.layers for t in held)
    objective.backward()
    assert all(block.conv.kernel.grad.abs().min() > 0 for block in model.blocks)


# --- Dialogs ---

@torch.no_grad()
def turn(model, tree, tokens, **how):
    with tree.lock(tokens) as prefix:
        cache = tree.take(prefix, 64)
        assert all(layer.length == prefix.length for layer in cache.layers)
        logits = model(tokens[None, prefix.length:], cache=cache)[0] if prefix.length < len(tokens) else None
        assert tree.put(tokens, cache) == len(tokens)
    if logits is not None:
        close(logits, whole(model, tokens[None], **how)[0, prefix.length:])
    return prefix.length


def test_dialogs_under_a_sliding_window():
    model, base = build("mamba,full", short_conv=9), text(1, 30)[0]
    tree = DialogTree(model, budget=None, window=6)
    assert turn(model, tree, base, window=6) == 0
    assert turn(model, tree, torch.cat((base, text(1, 20, seed=2)[0])), window=6) == 30


# --- Where it goes and where not ---

def test_horizon():
    base = dict(mixer="window", n_layer=3, window=6)
    assert [build(short_conv=w, **base).config.receptive_field(8) for w in (0, 2, 5)] == [18, 21, 30]
    assert build("mamba,full").config.receptive_field(8) is None
    model, x = build(short_conv=5, positions="none", **base), text(1, 40)
    full = whole(model, x)[0, -1]
    reach = 3 * 5 + 3 * 4
    for back, moved in ((reach, True), (reach + 1, False), (30, False)):
        other = x.clone()
        other[0, 39 - back] = (x[0, 39 - back] + 1) % 256
        assert torch.equal(whole(model, other)[0, -1], full) != moved


@pytest.mark.parametrize("settings", [dict(mtp_depth=2), dict(mixer="mamba"), dict(mixer="xl"), dict(ff="none,mlp"),
                                      dict(qk_norm=True, qk_scale=True), dict(residual_scale="layerscale", ff="none")],
                         ids=str)
def test_trains_with_and_without_checkpoints(settings):
    found = []
    for again in (False, True):
        model = build(checkpoint_activations=again, short_conv=3, **settings).train()
        x, y = text(2, 8), text(2, 8 * model.config.n_labels, seed=2).view(2, 8, -1)
        memory = model.new_memory(2) if model.config.carries else None
        for _ in range(2 if memory else 1):
            objective, nats = model(x, y, memory=memory)
        objective.backward()
        found.append((objective.detach(), nats, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    kernels = [p.grad for name, p in model.named_parameters() if name.endswith("conv.kernel")]
    assert len(kernels) == 3 + model.config.mtp_depth and all(grad.abs().min() > 0 for grad in kernels)
    twin = build(seed=1, short_conv=3, **settings)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(whole(twin, x), whole(model.eval(), x))
    assert torch.equal(whole(twin.for_inference(), x), whole(model, x))


@pytest.mark.parametrize("settings, word", [
    (dict(short_conv=1), "at least 2"), (dict(short_conv=-2), "must be >= 0"), (dict(shorten=2), "pyramid"),
    (dict(qk_scale=True), "needs qk_norm"), (dict(ff="none,dense"), "ff has 'dense'"),
    (dict(qk_scale=True, qk_norm=True, mixer="full,xl"), "mixer 'xl'"),
    (dict(qk_scale=True, qk_norm=True, mixer="compressive"), "mixer 'compressive'"),
    (dict(qk_scale=True, qk_norm=True, mixer="mla"), "qk_norm normalises keys")])
def test_errors(settings, word):
    with pytest.raises(ValueError, match=word):
        build(**settings)


def test_not_in_what_sees_everything():
    model = Encoder(TransformerConfig(**SMALL, short_conv=2))
    with pytest.raises(ValueError, match="left to right"):
        model(text(1, 8))


# --- ff "none" ---

def test_layers_without_feed_forward():
    model = build(short_conv=0, ff="none")
    assert not [name for name, _ in model.named_parameters() if "norm2" in name or ".ff." in name]
    one = build(short_conv=0, ff="none", norm_gain=False, bias=False)
    wide = one.config.n_embd
    assert one.n_params() == 3 * 4 * wide * wide + 2 * 256 * wide
    assert one.flops_per_token(8) == 6 * (3 * 4 * wide * wide + 256 * wide) + 3 * 3 * 4 * wide * 8
    block, x, places = model.blocks[0], torch.randn(1, 6, 32), model.place(text(1, 6), None)
    torch.testing.assert_close(block(x, places), x + block.mixer(block.norm1(x), places))
    close(in_chunks(model, text(2, T), [7, 1, 16], model.new_cache(2, T)), whole(model, text(2, T)))


def test_patterns_of_feed_forwards():
    model = build(short_conv=0, ff="none,mlp", residual_scale="rezero")
    assert [block.ff is None for block in model.blocks] == [True, False, True]
    assert [sorted(block.roles) for block in model.blocks] == [["scale1"], ["scale1", "scale2"], ["scale1"]]
    assert not any(hasattr(block, "scale2") for block in model.blocks[::2])
    for p in model.parameters():
        p.data.fill_(math.nan)
    initialise(model)
    assert all(p.isfinite().all() for p in model.parameters()) and model.blocks[0].scale1 == 0
    tfixup = build(short_conv=2, ff="mlp,none", init="tfixup")
    assert tfixup.blocks[1].ff is None


def test_equal_parameters():
    base = dict(n_layer=4, n_head=4, n_embd=64, block_size=64, positions="rope", norm="rms", bias=False)
    plain = build_model(TransformerConfig(**base)).n_params()
    wider = equal_ff_mult(TransformerConfig(**base, ff="none,mlp"))
    found = build_model(TransformerConfig(**base, ff="none,mlp", ff_mult=wider)).n_params()
    assert abs(found / plain - 1) < 0.01 and wider > 8
    for ff in ("none", "none,none"):
        with pytest.raises(ValueError, match="no layer has a feed-forward"):
            equal_ff_mult(TransformerConfig(**base, ff=ff))


# --- qk_scale ---

KINDS = ["full", "window", "strided", "fixed", "diff", "mamba,full"]


@pytest.mark.parametrize("mixer", KINDS)
def test_qk_scale_starts_as_without(mixer):
    plain, model, x = build(mixer, qk_norm=True), build(mixer, qk_norm=True, qk_scale=True), text(2, 30)
    assert torch.equal(whole(plain, x), whole(model, x))
    scales = {name: p for name, p in model.named_parameters() if name.endswith("qk_scale")}
    assert len(scales) == (1 if "mamba" in mixer else 3) == model.n_params() - plain.n_params()
    assert all(parameter_roles(model)[name] == "gain" for name in scales)
    with torch.no_grad():
        for p in scales.values():
            assert p.item() == pytest.approx(8 ** 0.5)
            p.mul_(3)
    full = whole(model, x)
    assert (full - whole(plain, x)).abs().max() > 1e-2
    close(in_chunks(model, x, [7, 1, 22], model.new_cache(2, 30)), full)
    close(in_chunks(model, x, [7, 1, 22], model.new_cache(2, 30), padded((30, 12), 30))[0], full[0])


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_qk_scale_by_hand(n_kv_head):
    model = build(n_layer=1, positions="none", qk_norm=True, qk_scale=True, n_kv_head=n_kv_head)
    mixer, h = model.blocks[0].mixer, torch.randn(1, 6, 32)
    with torch.no_grad():
        mixer.qk_scale.fill_(5.0)
    q, k, v = mixer.qkv(h).view(1, 6, -1, 8).transpose(1, 2).split((4, n_kv_head, n_kv_head), 1)
    k, v = (t.repeat_interleave(4 // n_kv_head, 1) for t in (k, v))
    scores = 5.0 * (rms_norm(q) @ rms_norm(k).mT) / 8
    scores = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf)
    wanted = mixer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 6, 32))
    found = mixer(h, model.place(text(1, 6), None))
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.grad(found.square().sum(), mixer.qk_scale)[0].abs() > 0


def test_diff_fills_both_its_own():
    model = build("diff", qk_norm=True, qk_scale=True)
    mixer = model.blocks[0].mixer
    assert mixer.roles.keys() == {"qk_scale", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
    assert 0 < mixer.lambda_q1.abs().max() < 1
