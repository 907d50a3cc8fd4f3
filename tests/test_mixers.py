"""What every layer computes beside its formula written out, in float64: attention of all kinds, memories, scans and
states, the short convolution, feed-forwards and experts."""
import math

import pytest
import torch
import torch.nn.functional as F

import model as room
from kernels import activate, gelu, rms_norm, scan_reference
from model import Positions, Transformer, TransformerConfig, attend_by_hand, fused_rows
from models import experts
from models.low_rank import Adapted, adapt, merge
from models.recurrent import scan, selective_scan, stretch
from models.short_conv import ShortConv
from variants import padded

T = 21

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **settings):
    torch.manual_seed(seed)
    base = dict(n_layer=1, n_head=4, n_embd=32, block_size=32, init="xavier", positions="none", sparse_stride=4,
                sparse_summary=2, window=5)
    return Transformer(TransformerConfig(**{**base, **settings})).double()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(model, x):
    """What the first layer's mixer makes of x (B, T, C)."""
    return model.blocks[0].mixer(x, model.place(torch.zeros(x.shape[:2]), None))


# --- Attention ---

SCORES = [{}, dict(score_softcap=0.3), dict(softmax_plus_one=True),  # what may be made of attention's scores
          dict(score_softcap=0.3, softmax_plus_one=True)]
near = pytest.approx


def weights_of(products, bias, score_softcap=None, softmax_plus_one=False):
    """What values weigh: of products (..., S) and of a bias that is added."""
    c = score_softcap
    scores = products if c is None else c * (1 - 2 / ((2 * products / c).exp() + 1))
    e = (scores + bias).exp()
    return e / (softmax_plus_one + e.sum(-1, keepdim=True))


def attended(q, k, v, seen=None, bias=0.0, scale=None, **scores):
    """q (H, T, D) over k and v (H, S, D) where seen (H or 1, T, S), or before them: (T, H D)."""
    seen = torch.ones(q.size(1), k.size(1)).tril() > 0 if seen is None else seen
    bias = torch.where(seen, torch.as_tensor(bias, dtype=q.dtype), -math.inf)
    return (weights_of(q @ k.mT * (scale or q.size(2) ** -0.5), bias, **scores) @ v).transpose(0, 1).flatten(1)


SEES = {"full": lambda t, s, far: t >= s, "window": lambda t, s, far: t - s < 5,
        "strided": lambda t, s, far: (t - s) % 4 == 0 if far else t - s < 4,
        "fixed": lambda t, s, far: (s == t) | (s % 4 >= 2) if far else s // 4 == t // 4}


HOW = [*SCORES, dict(qk_norm=True), dict(qk_norm=True, qk_scale=True), dict(value_residual=True),
       dict(attention="manual"), dict(qk_norm=True, qk_gain=True)]
SHAPES = [(T, 4, "none"), (16, 2, "alibi"), (40, 2, "none"), (5, 2, "none")]


@pytest.mark.parametrize("kind, n, kv, positions, how", [
    (kind, *SHAPES[(i + j) % 4], how) for i, how in enumerate(HOW) for j, kind in enumerate(SEES)]
    + [(kind, *shape, HOW[0]) for kind in SEES for shape in SHAPES[1:]], ids=str)
def test_attention_by_definition(kind, n, kv, positions, how):
    """Half of a sparse layer's heads see far; a learned scale takes the place of the root of D; a share of the values
    is the first layer's of the same pass."""
    model, x = build(mixer=kind, n_kv_head=kv, positions=positions, n_layer=2, **how), draw(1, n, 32)
    mixer, scale, places, before = model.blocks[1].mixer, None, Positions(0, n), draw(1, n, 32, seed=2)
    q, k, v = mixer.qkv(x[0]).view(n, 4 + 2 * kv, 8).transpose(0, 1).split((4, kv, kv))
    if "value_residual" in how:
        model.blocks[0].mixer(before, places)
        first = model.blocks[0].mixer.qkv(before[0]).view(n, 4 + 2 * kv, 8).transpose(0, 1)[4 + kv:]
        assert mixer.first_share.item() == 0.5 and not hasattr(model.blocks[0].mixer, "first_share")
        mixer.first_share.data.fill_(1.25)
        v = -0.25 * v + 1.25 * first
        slope, = torch.autograd.grad(mixer(x, places).square().sum(), model.blocks[0].mixer.qkv.weight)
        assert slope.abs().max() > 1e-3
    k, v = k.repeat_interleave(4 // kv, 0), v.repeat_interleave(4 // kv, 0)
    if "qk_norm" in how:
        q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    if "qk_gain" in how:
        mixer.q_gain.data, mixer.k_gain.data = gains = draw(2, 8)
        q, k = q * gains[0], k * gains[1]
    if "qk_scale" in how:
        assert mixer.qk_scale.item() == near(8 ** 0.5)  # as without
        mixer.qk_scale.data.fill_(5.0)
        scale = 5.0 / 8
    t, s = torch.arange(n)[:, None], torch.arange(n)
    seen = torch.stack([SEES[kind](t, s, far=h >= 2) & (s <= t) for h in range(4)])
    slopes = torch.tensor([2.0 ** -2, 2.0 ** -4, 2.0 ** -6, 2.0 ** -8]).view(4, 1, 1) * (positions == "alibi")
    scores = {name: value for name, value in how.items() if name.startswith("s")}
    wanted = mixer.out(attended(q, k, v, seen, -slopes * (t - s), scale, **scores))
    torch.testing.assert_close(mixer(x, places)[0], wanted, atol=1e-6, rtol=1e-5)


def test_softmax_plus_one_neither_overflows_nor_divides_by_zero():
    """A query that fits nothing sees nothing; one that fits something far better than 1 has a plain softmax."""
    scores = torch.tensor([[-1e4, -2e4], [1e4, 1e4], [-math.inf, -math.inf], [0.0, -math.inf]], requires_grad=True)
    weights = room.weights_of(scores, True)
    assert weights.tolist() == [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.5, 0.0]]
    weights[:, 0].sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[3, 0] == 0.25


@pytest.mark.parametrize("positions, kv, how", [("none", 4, {}), ("alibi", 2, {}), *(("none", 2, how) for how in
                                                                                   SCORES[1:])], ids=str)
def test_differential_by_definition(positions, kv, how):
    model, x = build(mixer="diff", positions=positions, n_kv_head=kv, n_layer=2, **how), draw(1, T, 32)
    mixer, start = model.blocks[1].mixer, 0.8 - 0.6 * math.exp(-0.3)
    q, k, v = mixer.qkv(x[0]).view(T, 4 + 2 * kv, 8).transpose(0, 1).split((4, kv, kv))
    strength = (mixer.lambda_q1 @ mixer.lambda_k1).exp() - (mixer.lambda_q2 @ mixer.lambda_k2).exp() + start
    heads, distance = [], torch.arange(T)[:, None] - torch.arange(T)
    for pair in range(2):
        g = pair * kv // 4 * 2  # the first of the pair's two key heads
        bias = -distance * 2.0 ** (-8 * (2 * pair + 2) / 4) * (positions == "alibi")
        one, two = (attended(q[2 * pair + i, None], k[g + i, None], torch.cat((v[g], v[g + 1]), 1)[None], bias=bias,
                             **how) for i in range(2))
        y = one - strength * two
        heads.append(y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt() * (1 - start))
    wanted = mixer.out(torch.cat(heads, 1))
    torch.testing.assert_close(mixer(x, Positions(0, T))[0], wanted, atol=1e-6, rtol=1e-5)
    assert model.n_params() == build(n_kv_head=kv, n_layer=2).n_params() + 2 * 4 * 8


@pytest.mark.parametrize("how", [*SCORES, dict(q_rank=12), *(
    dict(rope_scaling="yarn", rope_factor=4.0, rope_mscale=mscale, rope_mscale_all_dim=all_dim)
    for mscale, all_dim in ((0.707, 0.707), (1.0, 0.0)))], ids=str)
def test_latent_by_definition(how):
    """YaRN as DeepSeek has it: tables times m(mscale) / m(all_dim), whole scores times m(all_dim)^2, of which the
    model's tables have the first factor; m(s) = 0.1 s ln(factor) + 1."""
    model, x = build(mixer="mla", positions="rope", kv_rank=10, rope_dim=6, **how), draw(1, T, 32)
    mixer, places = model.blocks[0].mixer, model.place(torch.zeros(1, T), None)
    grown = 0.1 * how.get("rope_mscale_all_dim", 0.0) * math.log(4) + 1
    cos, sin = (t[0].double() / grown for t in places.tables[6])  # (T, 1, 6)

    def norm(t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(t):  # sin has its signs already
        return t * cos + torch.cat(t.chunk(2, -1)[::-1], -1) * sin
    q = mixer.q(norm(mixer.into(x[0])) if "q_rank" in how else x[0]).view(T, 4, 14)
    latent, key = mixer.kv(x[0]).split((10, 6), 1)
    k, v = mixer.up(norm(latent)).view(T, 2, 4, 8).unbind(1)
    q = torch.cat((q[..., :8], turned(q[..., 8:])), -1)
    k = torch.cat((k, turned(key.unsqueeze(1)).expand(T, 4, 6)), -1)
    scores = {name: value for name, value in how.items() if name in ("score_softcap", "softmax_plus_one")}
    wanted = mixer.out(attended(*(t.transpose(0, 1) for t in (q, k, v)), scale=14 ** -0.5 * grown ** 2, **scores))
    torch.testing.assert_close(mixer(x, places)[0], wanted, atol=1e-5, rtol=1e-4)


# --- Attention as it is computed ---

def test_attention_by_hand_in_bfloat16(bfloat16_sdpa):
    """Autocast on: the softmax must keep float32's accuracy, so the result is as near to float32 as SDPA's is."""
    q, k, v = draw(3, 2, 4, 64, 32).float()
    exact, low = F.scaled_dot_product_attention(q, k, v, is_causal=True), [t.bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        by_hand, sdpa = attend_by_hand(*low, "causal"), F.scaled_dot_product_attention(*low, is_causal=True)
    assert by_hand.dtype == torch.bfloat16
    assert (by_hand - exact).abs().mean() < 1.5 * (sdpa - exact).abs().mean() + 1e-3


@pytest.mark.parametrize("S, mask, dropout, expected", [
    (15, "causal", 0.0, True), (16, "causal", 0.0, False), (16, "causal", 0.1, True), (63, None, 0.0, True),
    (64, None, 0.0, False)])
def test_training_on_a_cpu_attends_by_hand_while_that_is_faster(S, mask, dropout, expected, monkeypatch, bfloat16_sdpa):
    called, layer = [], build(dropout=dropout).blocks[0].mixer.train()
    monkeypatch.setattr(room, "LONG", 16)
    monkeypatch.setattr(room, "attend_by_hand", lambda *given: called.append(1) or attend_by_hand(*given))
    q = draw(1, 4, S, 8).bfloat16().requires_grad_()
    for t, by_hand in ((q, expected), (q.float(), False), (q.detach(), False)):
        called.clear()
        layer.softmax(t, t, t, mask)
        assert bool(called) == by_hand


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_attention_is_dropped_out_in_training_only(attention):
    """Also of a lone query over a cache; of 8 equal weights half are kept, twice as large."""
    layer, x = build(dropout=0.5, attention=attention).blocks[0].mixer, draw(1, 1, 32)
    cache = layer.new_cache(1, 8, None, "cpu", torch.float64)
    cache.update(draw(1, 4, 6, 8), draw(1, 4, 6, 8, seed=2))
    for training in (False, True):
        layer.train(training)
        assert torch.equal(*(layer(x, Positions(6, 1), cache.fork()) for _ in range(2))) != training
    torch.manual_seed(0)
    y = layer.softmax(draw(1, 4, 5000, 4), torch.zeros(1, 4, 8, 4).double(), torch.ones(1, 4, 8, 4).double(), None)
    assert y.mean().item() == near(1, abs=0.02) and y.std().item() == near((1 / 8) ** 0.5, abs=0.02)


# --- Memories of segments ---

@pytest.mark.parametrize("mixer, positions", [("xl", "none"), ("compressive", "none"), ("xl", "relative"),
                                               ("compressive", "relative")])
@torch.no_grad()
def test_memories_by_definition(mixer, positions):
    """Query by query. Relative positions: content and position terms, with u and v, over the sinusoid of the distance
    (Dai et al. 2019, section 3.3)."""
    model = build(mixer=mixer, positions=positions, block_size=8, memory_length=4, compressed_length=3,
                  compression_rate=2)
    mixer, x, bias = model.blocks[0].mixer, draw(50, 32), 0.0
    if positions == "relative":
        mixer.bias_u.copy_(draw(4, 8, seed=1)), mixer.bias_v.copy_(draw(4, 8, seed=2))
        frequencies = 10000.0 ** -(torch.arange(0, 32, 2).double() / 32)
    for t, y in enumerate(found(model, x[None])[0]):
        low = max(0, t // 8 * 8 - 4)
        pairs = range(max(0, low // 2 - 3), low // 2) if model.config.mixer == "compressive" else ()
        slots = [mixer.compress_weight @ x[2 * j:2 * j + 2].flatten() for j in pairs]
        _, k, v = mixer.qkv(torch.stack([*slots, *x[low:t + 1]])).view(-1, 3, 4, 8).permute(1, 2, 0, 3)  # (H, S, D)
        q = mixer.qkv(x[t]).view(3, 4, 1, 8)[0]
        if positions == "relative":
            places = torch.tensor([*(2 * j + 1 for j in pairs), *range(low, t + 1)])  # a slot's: that of its last
            angle = (t - places)[:, None] * frequencies
            r = mixer.into(torch.cat((angle.sin(), angle.cos()), 1)).view(-1, 4, 8).transpose(0, 1)  # (H, S, D)
            bias = (q + mixer.bias_v[:, None]) @ r.mT / 8 ** 0.5
            q = q + mixer.bias_u[:, None]
        wanted = mixer.out(attended(q, k, v, torch.ones(1, 1, k.size(1)) > 0, bias))[0]
        torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)


# --- Scans and states ---

@pytest.mark.parametrize("n", [1, 3, 16, 23])
def test_scan_equals_a_loop(n):
    a, b, h = draw(2, n, 3).sigmoid(), draw(2, n, 3, seed=2), draw(2, 3, seed=3)
    torch.testing.assert_close(scan(a, b, h), scan_reference(a, b, h))
    torch.testing.assert_close(scan(a, b), scan_reference(a, b, torch.zeros_like(h)))
    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in (a, b, h)])


def inputs(n):
    dt, u, b, c, a, h = (draw(*shape, seed=i) for i, shape in enumerate(
        ((2, n, 3), (2, n, 3), (2, n, 4), (2, n, 4), (3, 4), (2, 3, 4))))
    return [t.requires_grad_() for t in (F.softplus(dt), u, b, c, -a.exp(), h)]


@pytest.mark.parametrize("n", [1, 70])
def test_selective_scans_agree(n):
    """The loop of a CPU, the parallel scan of a GPU, with gradients."""
    one, two, results = inputs(n), inputs(n), []
    for y, last in (selective_scan(*one), stretch(*two)):
        (y.square().sum() + last.sin().sum()).backward()
        results.append((y, last))
    torch.testing.assert_close(*results)
    torch.testing.assert_close([p.grad for p in one], [q.grad for q in two])
    with torch.no_grad():
        torch.testing.assert_close(selective_scan(*one), results[0])


@torch.no_grad()
def test_mingru_by_its_formula():
    model, x, h = build(mixer="mingru"), draw(1, 9, 32), 0.0
    mixer = model.blocks[0].mixer
    for t, y in enumerate(found(model, x)[0]):
        gate, v = mixer.into(x[0, t]).split(64)
        z, candidate = torch.sigmoid(gate), torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
        h = (1 - z) * h + z * candidate
        torch.testing.assert_close(y, mixer.out(h), atol=1e-6, rtol=1e-5)  # states are float32


@torch.no_grad()
def test_mamba_by_its_formula():
    model, x = build(mixer="mamba", n_embd=12, n_head=2, state_dim=3, conv_width=4), draw(1, 9, 12)
    m, h = model.blocks[0].mixer, torch.zeros(24, 3, dtype=torch.float64)
    u, gate = m.into(x[0]).chunk(2, -1)
    for t, y in enumerate(found(model, x)[0]):
        s = m.conv_bias + sum(m.conv[k] * u[t - 3 + k] for k in range(4) if t - 3 + k >= 0)
        s = s * torch.sigmoid(s)
        dt, b, c = m.join(s).split((1, 3, 3))
        dt = torch.log1p(torch.exp(m.dt @ dt + m.dt_bias))
        h = torch.exp(-dt[:, None] * torch.exp(m.a_log)) * h + dt[:, None] * b * s[:, None]
        wanted = m.out((h @ c + m.skip * s) * gate[t] * torch.sigmoid(gate[t]))
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)


def test_mamba_starts_as_the_paper_does():
    mixer = build(mixer="mamba", n_embd=64).float().blocks[0].mixer
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1 + 1e-6
    torch.testing.assert_close(mixer.a_log[5], torch.arange(1, 17).float().log())


# --- The short convolution ---

def conv(width, n_embd=3):
    made = ShortConv(TransformerConfig(n_embd=n_embd, n_head=1, short_conv=width)).double()
    with torch.no_grad():
        made.init_weights()
    return made


@pytest.mark.parametrize("width, n", [(2, 1), (2, 7), (4, 3), (4, 6)])
def test_short_convolution_against_conv1d_with_gradients(width, n):
    """Also where positions are ragged. At first kernels are uniform within width^-0.5."""
    made, x = conv(width), draw(2, n, 3).requires_grad_()
    wanted = F.conv1d(F.pad(x.mT, (width - 1, 0)), made.kernel.flip(0).mT.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(made(x, Positions(0, n)), wanted)
    index = padded((n, n // 2), n).flip(1)

    def run(x, kernel, index=None):
        return torch.func.functional_call(made, {"kernel": kernel}, (x, Positions(0, n, index)))
    assert torch.autograd.gradcheck(run, (x, made.kernel))
    assert torch.autograd.gradcheck(lambda *t: run(*t, index)[index >= 0], (x, made.kernel))
    kernel = conv(width, 4096).kernel
    assert 0.99 * width ** -0.5 < kernel.abs().max() <= width ** -0.5 and kernel.mean().abs() < 0.02
    assert kernel.std().item() == near((3 * width) ** -0.5, rel=0.02) and made.flops(8) == 2 * width * 3


# --- Feed-forwards ---

def feed_forward(kind="mlp", **settings):
    return build(ff=kind, **settings).blocks[0].ff


def gated(f):
    return lambda x: f(x[..., :88]) * x[..., 88:]  # two thirds of the width, and as many parameters


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)), "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2, "silu": lambda x: x / (1 + torch.exp(-x)),
    "solu": lambda x: F.layer_norm(x * x.softmax(-1), x.shape[-1:]), "glu": gated(lambda a: 1 / (1 + torch.exp(-a))),
    "bilinear": gated(lambda a: a), "reglu": gated(lambda a: a.clamp(min=0)),
    "swiglu": gated(lambda a: a / (1 + torch.exp(-a))),
    "geglu": gated(lambda a: a * 0.5 * (1 + torch.erf(a / 2 ** 0.5)))}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(activation):
    ff, x = feed_forward(activation=activation), draw(2, 3, 32)
    assert ff.down.in_features == (88 if activation in room.GLU else 128)
    torch.testing.assert_close(ff(x), ff.down(ACTIVATIONS[activation](ff.up(x))), atol=1e-6, rtol=1e-5)


def test_low_rank():
    ff, x = feed_forward("low_rank", ff_rank=5), draw(2, 3, 32)
    torch.testing.assert_close(ff(x), ff.down(ff.join(F.gelu(ff.up(ff.into(x))))))
    assert sum(p.numel() for name, p in ff.named_parameters() if "weight" in name) == 2 * 5 * (32 + 128)


@pytest.mark.parametrize("settings, count", [
    (dict(lora_on="all", activation="swiglu", n_kv_head=2, bias=True), 4), (dict(mixer="diff", ff="moe"), 2),
    (dict(lora_on="all", ff="low_rank", activation="solu", mixer="fixed", tie_weights=True), 6)], ids=str)
def test_adapters(settings, count):
    """Hu et al. 2021: the base with W + alpha / r B A in the place of each matrix W: at first the base itself, then its
    logits, and gradients by the chain rule; the base's own weights have none. Merged it is that model."""
    model, plain = adapt(build(lora_rank=3, lora_alpha=1.5, **settings)).double(), build(**settings)
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids), plain(ids))
    rows, adapted = fused_rows(plain), {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    assert len(adapted) == count and all(abs(m.lora_a.std() * m.in_features ** 0.5 - 1) < 0.3 for m in adapted.values())

    def parts(m, name):  # (A, B, its rows of W) of each part of a fused matrix
        sizes = rows.get(f"{name}.weight", (m.out_features,))
        return zip(m.lora_a.split(3), m.lora_b.split(sizes), torch.arange(m.out_features).split(sizes))
    for i, (name, m) in enumerate(adapted.items()):
        m.lora_b.data = draw(*m.lora_b.shape, seed=i)
        for A, B, at in parts(m, name):
            plain.get_submodule(name).weight.data[at] += (0.5 * B @ A).detach()
    torch.testing.assert_close(model(ids), plain(ids))
    for one in (model, plain):
        one(ids, ids.unsqueeze(-1))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        f"{name}.lora_{end}" for name in adapted for end in "ab"]
    for name, m in adapted.items():
        grad = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(m.lora_b.grad, torch.cat([0.5 * grad[at] @ A.T for A, _, at in parts(m, name)]))
        torch.testing.assert_close(m.lora_a.grad, torch.cat([0.5 * B.T @ grad[at] for _, B, at in parts(m, name)]))
    learned = sum(m.lora_a.numel() + m.lora_b.numel() for m in adapted.values())
    products = (plain.flops_per_token(8) - 3 * sum(block.mixer.flops(8) for block in plain.blocks)) / 6
    assert model.flops_per_token(8) == plain.flops_per_token(8) + 6 * learned - 2 * products
    merged = merge(model)
    torch.testing.assert_close(merged(ids), plain(ids))
    assert merged.config == plain.config and all(p.requires_grad for p in merged.parameters())
    assert [(name, p.shape) for name, p in merged.named_parameters()] == [
        (name, p.shape) for name, p in plain.named_parameters()]


@pytest.mark.parametrize("n, usual", [(1, True), (512, False), (16384, True), (16385, True), (16385, False)])
def test_gelu_of_any_size_leaves_onednn_as_it_was(n, usual, monkeypatch):
    x = draw(n, 1)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", usual)
    torch.testing.assert_close(gelu(x), ACTIVATIONS["gelu"](x))
    with pytest.raises(RuntimeError):
        gelu(x.long())
    assert torch.backends.mkldnn.enabled == usual


def test_rms_norm_with_and_without_gradient():
    x, gain = draw(3, 5, 8), draw(8, seed=2)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    torch.testing.assert_close(rms_norm(x, gain), exact)
    torch.testing.assert_close(rms_norm(x.float().requires_grad_(), gain.float()), exact.float())
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


# --- Experts ---

@pytest.mark.parametrize("n", [1, 64, 65])
def test_rows_added_to_an_expert_change_nothing(n, monkeypatch):
    """And there are a multiple of 64 in the products, once there are more than 64."""
    ff, results, seen, linear = feed_forward("moe", activation="swiglu"), [], [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    for rounded in (False, True):
        x, up, down = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(n, 8), (12, 8), (8, 6)]))
        y = ff.expert(x, up, down, rounded)
        y.backward(draw(n, 8, seed=4))
        results.append((y, x.grad, up.grad, down.grad))
    torch.testing.assert_close(*results)
    assert seen == [n, n] + [n if n <= 64 else -(-n // 64) * 64] * 2


@pytest.mark.parametrize("loads", [[5], [0, 7, 0], [1, 1, 1, 1], [0, 0, 9, 1, 0, 3], [65, 0, 1], [0, 0, 1]], ids=str)
def test_tiles_are_each_experts_own_products(loads, monkeypatch):
    """In values and gradients, for any loads; less than twice the rows are computed."""
    ff, results, seen, E, n = feed_forward("moe", activation="swiglu"), [], [], len(loads), sum(loads)
    monkeypatch.setattr(experts, "activate", lambda kind, x: seen.append(x[..., 0].numel()) or activate(kind, x))
    expert, counts = torch.arange(E).repeat_interleave(torch.tensor(loads)), torch.tensor([0, *loads])
    for tiles in (False, True):
        x, up, down = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(n, 8), (E, 12, 8), (E, 8, 6)]))
        y = ff.by_tiles(x, up, down, expert, counts.cumsum(0)) if tiles else torch.cat(
            [F.linear(activate("swiglu", F.linear(part, up[e])), down[e]) for e, part in enumerate(x.split(loads))])
        y.backward(draw(n, 8, seed=4))
        results.append((y, x.grad, up.grad, down.grad))
    torch.testing.assert_close(*results)
    assert n <= seen[0] < 2 * n


@pytest.mark.parametrize("activation, balance, shared, tiles", [
    ("relu2", "loss", 0, False), ("swiglu", "loss", 2, True), ("relu2", "bias", 2, False), ("swiglu", "bias", 0, False),
    ("swiglu", "none", 2, False)])
def test_experts_token_by_token(activation, balance, shared, tiles, monkeypatch):
    if tiles:
        monkeypatch.setattr(experts, "readable", lambda x: False)
    ff = feed_forward("moe", activation=activation, expert_balance=balance, n_shared_expert=shared).train()
    x, E, places, bias = draw(2, 7, 32), 8 - shared, Positions(0, 7), 0.0
    if balance == "bias":
        bias = ff.correction.copy_(torch.linspace(-0.3, 0.3, E))
    y, w, rows = ff(x, places).flatten(0, 1), ff.width, ff.rows

    def act(h, w=w):
        return F.relu(h).square() if activation == "relu2" else F.silu(h[:w]) * h[w:]
    up, down, loads = ff.up.weight.view(E, rows, 32), ff.down.weight.view(E, 32, w), torch.zeros(E)
    total = torch.zeros(E, dtype=torch.float64)
    for t, given in enumerate(x.flatten(0, 1)):
        logits = ff.router.weight @ given
        scores = logits.sigmoid() if balance == "bias" else logits.softmax(0)
        first, best = (scores + bias).topk(3)
        assert first[1] - first[2] > 1e-5  # else rounding chooses: another seed
        best = best[:2]
        wanted = sum(scores[e] / scores[best].sum() * (down[e] @ act(up[e] @ given)) for e in best)
        if shared:
            wanted = wanted + ff.shared["down"](act(ff.shared["up"](given), 2 * w))
        torch.testing.assert_close(y[t], wanted, atol=1e-6, rtol=1e-5)
        loads[best] += 1
        total += scores
    (layer, counted), = places.usage
    assert layer == 0 and torch.equal(counted.float(), loads)
    if balance == "loss":
        wanted = 0.01 * E * (loads / loads.sum() * total / 14).sum()
        ragged = Positions(0, 9, torch.tensor([[-1, *range(7), -1], [*range(7), -1, -1]]))
        ff(torch.stack((F.pad(x[0], (0, 0, 1, 1), value=3.0), F.pad(x[1], (0, 0, 0, 2), value=-3.0))), ragged)
        for same in (places, ragged):
            assert torch.equal(same.usage[0][1].float(), loads)
            torch.testing.assert_close(same.losses["balance"][0].double(), wanted, atol=1e-7, rtol=1e-5)
    else:
        assert not places.losses


@pytest.mark.parametrize("balance", ["none", "loss", "bias"])
def test_one_expert_is_weighed_by_its_score(balance):
    """Divided by itself it would be 1, and the router would not learn from what the experts say."""
    ff, x = feed_forward("moe", expert_top_k=1, expert_balance=balance, balance_weight=0.0).train(), draw(1, 6, 32)
    chosen, weights, scores = ff.route(x[0])
    assert torch.equal(weights, scores.gather(1, chosen)) and weights.max() < 1
    ff(x, Positions(0, 6)).square().sum().backward()
    assert ff.router.weight.grad.norm() > 1e-3 * ff.up.weight.grad.norm()


def test_loads_without_padding_move_biases():
    """Experts with more than the mean load are asked less after the step."""
    ff, places = feed_forward("moe", expert_balance="bias", balance_rate=0.05).train(), Positions(
        0, 6, torch.tensor([[-1, -1, 0, 1, 2, 3]]))
    ff(draw(1, 6, 32), places)
    loads = places.usage[0][1]
    assert loads.sum() == 4 * 2
    ff.balance({0: loads, 1: -loads})
    torch.testing.assert_close(ff.correction, 0.05 * (loads < 1).to(ff.correction) - 0.05 * (loads > 1))


def test_idle_experts():
    model, dense, width = build(ff="moe", n_expert=8, expert_top_k=2), build(), 4 * 32 // 8
    assert model.n_params() - model.n_active_params() == 6 * 2 * width * 32
    assert model.n_active_params() < dense.n_params() < model.n_params()
    assert dense.flops_per_token(8) - model.flops_per_token(8) == 6 * 6 * 2 * width * 32 - 6 * 8 * 32
