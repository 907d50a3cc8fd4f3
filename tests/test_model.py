"""The decoder: losses, heads, counts, initialisation, settings. About 10 s."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as mixers
import model as room
from kernels import plain_rotary, rms_norm
from model import (Causal, Positions, Transformer, TransformerConfig, active_layers, attend_by_hand, fused_rows,
                   parameter_roles)

T12 = dict(n_layer=12, n_head=8, n_embd=512, block_size=512, bias=False, norm_gain=False, head_bias=False,
           positions="learned_per_layer", n_targets=2, target_heads="own", layer_heads="own", intermediate_losses=True,
           activation="relu")
VARIANTS = [
    *({"positions": p} for p in ("learned", "learned_per_layer", "rope", "none")),
    *({"activation": a} for a in ("gelu", "relu", "relu2", "solu", "swiglu")),
    *({"norm": n, "norm_gain": g} for n in ("layer", "rms", "dyt") for g in (True, False)),
    {"positions": "rope", "qk_norm": True, "n_kv_head": 2}, {"n_kv_head": 1, "attention": "manual"}, {"bias": False},
    {"tie_weights": True, "residual_scale": "depth"}, {"head_dim": 10, "head_bias": True},
]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**dict(n_layer=2, n_head=4, n_embd=32, block_size=16), **settings}))


def text(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def test_every_earlier_byte_counts():
    model, x = build(init="xavier", positions="rope"), text(1, 16)
    for t in range(15):
        other = x.clone()
        other[:, t] += 1 - 2 * (x[:, t] > 0).long()
        assert not torch.equal(model(x)[:, -1], model(other)[:, -1])


# --- Losses and heads ---

@pytest.mark.parametrize("init", ["gpt2", "normal", "xavier", "zero"])
@pytest.mark.parametrize("settings", [
    {}, dict(positions="rope", norm="rms", qk_norm=True), dict(T12, n_layer=2, n_embd=64),
], ids=str)
def test_loss_at_start_is_uniform(settings, init):
    model = build(**{**dict(n_embd=64), **settings, "block_size": 64, "init": init})
    x, K = text(8, 64), settings.get("n_targets", 1)
    objective, nats = model(x, text(8, 64, K, seed=2))
    assert objective.shape == () and nats.dtype == torch.float32 and not nats.requires_grad
    assert nats.shape == (2 if settings.get("intermediate_losses") else 1, K)
    assert (nats - math.log(256)).abs().max() < 0.06


HEADS = [
    dict(n_targets=3, target_heads=t, layer_heads=layers, intermediate_losses=inner, head_bias=b)
    for t in ("own", "shared") for layers in ("own", "shared") for inner in (False, True) for b in (False, True)
] + [dict(n_targets=n, target_heads="shared", layer_heads="shared", intermediate_losses=True, head_bias=True,
          tie_weights=True) for n in (1, 3)] + [dict(n_targets=1, intermediate_losses=True), dict(tie_weights=True)]


def loop_of_losses(model, x, targets, active):
    """What `losses` computes, spelled out: a cross-entropy per layer and target. The streams come from hooks."""
    c, states = model.config, []
    hooks = [block.register_forward_hook(lambda m, i, o: states.append(o)) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    own = c.intermediate_losses and c.layer_heads == "own"
    objective, nats = 0.0, torch.zeros(len(active), c.n_targets)
    for row, layer in enumerate(active):
        group = layer if own else 0
        for k in range(c.n_targets):
            h = model.norm(states[layer])
            if c.target_heads == "shared":
                i = group
                if k:
                    h = h @ model.target_maps[group * (c.n_targets - 1) + k - 1].T
            else:
                i = group * c.n_targets + k
            logits = h @ (model.embed if c.tie_weights else model.heads[i]).T
            if c.head_bias:
                logits = logits + model.head_biases[i]
            loss = F.cross_entropy(logits.reshape(-1, c.vocab_size), targets[:, :, k].reshape(-1))
            objective = objective + loss * (1.0, 0.5, 0.25)[k]
            nats[row, k] = loss.item()
    return objective, nats


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_batched_heads_equal_a_loop(settings):
    model = build(n_layer=3, norm="rms", **settings)
    with torch.no_grad():  # away from the start, where maps are the identity and biases zero
        for p in [*model.heads, *model.head_biases, *model.target_maps]:
            p.add_(torch.randn_like(p), alpha=0.3)
    x, y = text(2, 8), text(2, 8, settings.get("n_targets", 1), seed=2)
    for active in ((0, 1, 2), (1, 2), (2,)) if settings.get("intermediate_losses") else ((2,),):
        twin = copy.deepcopy(model)
        objective, nats = model(x, y, active)
        wanted, wanted_nats = loop_of_losses(twin, x, y, active)
        torch.testing.assert_close(objective, wanted)
        torch.testing.assert_close(nats, wanted_nats)
        model.zero_grad()
        objective.backward()
        wanted.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f"{name}: {m}")
    if not settings.get("intermediate_losses"):
        assert torch.equal(model(x, y)[0], objective)
    else:
        assert model(x, y)[1].shape[0] == 3


def test_one_cross_entropy_for_all(monkeypatch):
    calls, original = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a, **k: calls.append((x.shape, x.dtype)) or original(x, *a, **k))
    model = build(n_layer=3, n_targets=2, intermediate_losses=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(text(2, 8), text(2, 8, 2))
    assert calls == [((3 * 2 * 16, 256), torch.float32)]


def test_dropped_layers_get_no_gradient():
    model = build(n_layer=3, n_targets=2, intermediate_losses=True)
    model(text(2, 8), text(2, 8, 2), active=(1, 2))[0].backward()
    assert [p.grad is None for p in model.heads] == [True, True, False, False, False, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, when its compiler is imported
def test_compiled_losses_follow_the_active_layers():
    """The second set of layers reaches the compiler as symbols: they must still be found among the layers."""
    model, x, y = build(n_layer=3, n_targets=2, intermediate_losses=True), text(2, 8), text(2, 8, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for active in ((0, 1, 2), (1, 2), (2,)):
        torch.testing.assert_close(compiled(x, y, active), model(x, y, active))


@pytest.mark.parametrize("active", [(), (0,), (0, 1), (0, 0, 2), (-1, 2), (0, 3)])
def test_active_layers_that_do_not_fit(active):
    model = build(n_layer=3, intermediate_losses=True)
    with pytest.raises(ValueError, match="active layers"):
        model(text(1, 4), text(1, 4, 1), active)


def test_losses_that_do_not_fit():
    model = build(n_targets=2)
    with pytest.raises(ValueError, match=r"n_labels"):
        model(text(1, 4), text(1, 4, 1))
    with pytest.raises(ValueError, match="need intermediate_losses"):
        model(text(1, 4), text(1, 4, 2), active=(0, 1))


def test_layer_drop_fractions():
    """Layer l of n (from 1) stops after l / (2n) of training; the last never."""
    n, steps = 12, 4800
    for l in range(1, n):
        stop = l * steps // (2 * n)
        assert l - 1 in active_layers(stop - 1, steps, n)
        assert l - 1 not in active_layers(stop, steps, n)
    assert active_layers(0, steps, n) == tuple(range(12))
    assert active_layers(steps // 2 - 1, steps, n) == (11,)
    assert active_layers(11 * 200 - 1, steps, n) == (10, 11)
    assert active_layers(steps, steps, n) == (n - 1,)
    assert active_layers(31_249, 4_000_000, 64) == tuple(range(64))
    assert active_layers(31_250, 4_000_000, 64) == tuple(range(1, 64))
    assert active_layers(0, 0, 1) == (0,)


# --- Counts ---

def test_parameter_counts():
    """Al-Rfou et al. 2018: 44M and 235M in training, 41M for 12 layers at inference."""
    with torch.device("meta"):
        t12, t64 = Transformer(TransformerConfig(**T12)), Transformer(TransformerConfig(**{**T12, "n_layer": 64}))
    assert t12.n_params() == sum(p.numel() for p in t12.parameters()) == 44_171_264
    assert t64.n_params() == 235_012_096
    assert t12.for_inference().n_params() == 41_156_608


def test_swiglu_costs_as_much():
    def count(activation):
        config = TransformerConfig(n_layer=2, n_embd=384, n_head=6, bias=False, activation=activation)
        with torch.device("meta"):
            return Transformer(config).n_params()
    assert count("swiglu") == count("gelu")


def test_tied_weights_count_once():
    assert build().n_params() - build(tie_weights=True).n_params() == 256 * 32


def test_flops_per_token():
    model = build(bias=False, n_kv_head=2, n_targets=2, intermediate_losses=True)
    matrices = 2 * (32 * 64 + 32 * 32 + 8 * 32 * 32)
    for active, heads in ((None, 4), ((0, 1), 4), ((1,), 2)):
        assert model.flops_per_token(16, active) == 6 * (matrices + heads * 256 * 32) + 12 * 2 * 32 * 16
    shared = build(bias=False, tie_weights=True, n_targets=3, target_heads="shared")
    assert shared.flops_per_token(8) == 6 * (2 * 12 * 32 * 32 + 3 * 256 * 32 + 2 * 32 * 32) + 12 * 2 * 32 * 8


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_for_inference_keeps_the_logits(settings):
    model, x = build(**settings).eval(), text(2, 8)
    before, nats = model(x), model(x, text(2, 8, settings.get("n_targets", 1)))[1]
    assert model.for_inference() is model
    assert torch.equal(model(x), before)
    assert len(model.heads) == (0 if settings.get("tie_weights") else 1)
    assert len(model.target_maps) == 0 and len(model.head_biases) == settings.get("head_bias", False)
    objective, after = model(x, text(2, 8, settings.get("n_targets", 1))[..., :1])
    torch.testing.assert_close(after[0, 0], nats[-1, 0])
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}


# --- Attention ---

@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "all", "mask"])
def test_attention_by_hand_equals_sdpa(kind, kv):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 8, requires_grad=True) for h in (4, kv, kv))
    ragged = Positions(0, 7, torch.tensor([[-1, -1, 0, 1, 2, 3, 4], list(range(7))]))
    mask = {"causal": "causal", "all": None, "mask": ragged.mask(Causal(), 7, ragged.index, "cpu")}[kind]
    grads = []
    model = build(n_kv_head=kv, attention="sdpa")
    for y in (attend_by_hand(q, k, v, mask), model.blocks[0].mixer.softmax(q, k, v, mask)):
        grads.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_attention_by_hand_in_bfloat16(bfloat16_sdpa):
    """Autocast on: the softmax must keep float32's accuracy, so the result is as near to float32 as SDPA's is."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 64, 32)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    low = [t.bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = attend_by_hand(*low, "causal")
        sdpa = F.scaled_dot_product_attention(*low, is_causal=True)
    assert by_hand.dtype == torch.bfloat16
    assert (by_hand - exact).abs().mean() < 1.5 * (sdpa - exact).abs().mean() + 1e-3


def test_auto_attention_chooses(monkeypatch):
    calls = []
    monkeypatch.setattr(mixers, "attend_by_hand", lambda *a: calls.append(1) or attend_by_hand(*a))
    model, x = build(), text(1, 8)
    model(x)
    assert len(calls) == 0  # float32: SDPA
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert len(calls) == 2  # training on a CPU in bfloat16
        with torch.no_grad():
            model(x)
    assert len(calls) == 2


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_dropout_everywhere_and_only_in_training(attention):
    model, x = build(dropout=0.5, attention=attention), text(2, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(0)
    q, v = torch.randn(1, 4, 5000, 4), torch.ones(1, 4, 8, 4)
    y = model.train().blocks[0].mixer.softmax(q, torch.zeros(1, 4, 8, 4), v, None)
    assert abs(y.mean().item() - 1) < 0.02 and abs(y.std().item() - (1 / 8) ** 0.5) < 0.02  # 8 weights, half kept


def test_rms_norm_with_and_without_gradient():
    torch.manual_seed(0)
    x, gain = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    torch.testing.assert_close(rms_norm(x, gain), exact)
    x, exact = x.float(), exact.float()
    torch.testing.assert_close(rms_norm(x.requires_grad_(), gain.float()), exact)
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("gain, bias", [(True, True), (True, False), (False, True)])
def test_dyt_by_hand(gain, bias):
    """gamma tanh(alpha x) + beta number by number, with gradients; alpha is 0.5 at first, and has the gains' rule."""
    model = build(norm="dyt", norm_gain=gain, bias=bias)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, mixers.Norm)}
    assert len(norms) == 5 and all(norm.alpha.tolist() == [0.5] for norm in norms.values())
    assert all(parameter_roles(model)[f"{name}.alpha"] == "gain" for name in norms)
    norm, x = model.blocks[1].norm2.double(), torch.randn(3, 4, 32, dtype=torch.float64, requires_grad=True)
    assert {name for name, _ in norm.named_parameters()} == {"alpha", *["gain"] * gain, *["bias"] * (gain and bias)}
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn_like(p))
    a, g, b = (norm.alpha.item(), *([1.0] * 32 if p is None else p.tolist() for p in (norm.gain, norm.bias)))
    b = b if gain and bias else [0.0] * 32
    y = norm(x)
    wanted = [[g[i] * math.tanh(a * number) + b[i] for i, number in enumerate(row)] for row in x.view(-1, 32).tolist()]
    torch.testing.assert_close(y.view(-1, 32), torch.tensor(wanted, dtype=torch.float64))
    grads = torch.autograd.grad(y.sum(), [x, norm.alpha])
    slopes = torch.tensor(g, dtype=torch.float64) * (1 - torch.tanh(a * x.detach()).square())
    torch.testing.assert_close(grads, (a * slopes, (slopes * x.detach()).sum().view(1)))
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and torch.equal(norm(x, learn=False), y)
    norm(x, learn=False).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in norm.parameters())


def test_rope_turns_by_position():
    """A query at m and a key at n: the product depends on m - n only; pair (i, i + D/2) turns at base^(-2i/D)."""
    rope = mixers.Rope(8, 100.0, 4)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rope(50)

    def at(x, m):
        return plain_rotary(x.view(1, 1, 1, 8), cos[m].view(1, 1, 1, 8), sin[m].view(1, 1, 1, 8)).flatten()
    torch.testing.assert_close(at(q, 17) @ at(k, 11), at(q, 46) @ at(k, 40))
    assert abs(at(q, 17) @ at(k, 11) - at(q, 17) @ at(k, 12)) > 1e-3
    pair = torch.complex(q[1], q[5]) * torch.exp(torch.tensor(3j * 100.0 ** (-2 / 8)))
    torch.testing.assert_close(at(q, 3)[[1, 5]], torch.view_as_real(pair))
    low = rope.to(torch.bfloat16)
    assert low(50)[0].dtype == torch.float32 and torch.equal(low(50)[0], cos)


# --- Blocks ---

@pytest.mark.parametrize("activation, f", [
    ("gelu", F.gelu), ("relu", F.relu), ("relu2", lambda x: F.relu(x) ** 2),
    ("solu", lambda x: F.layer_norm(x * x.softmax(-1), x.shape[-1:])),
    ("swiglu", lambda x: F.silu(x[..., :88]) * x[..., 88:]),
])
def test_feed_forward(activation, f):
    ff, x = build(activation=activation, init="xavier").blocks[0].ff, torch.randn(2, 3, 32)
    assert ff.down.in_features == (88 if activation == "swiglu" else 128)
    torch.testing.assert_close(ff(x), ff.down(f(ff.up(x))))


@pytest.mark.parametrize("scale, factor", [("depth", 0.5), (0.25, 0.25), (1.0, 1.0)])
def test_residual_scale(scale, factor):
    block, x = build(residual_scale=scale, init="xavier").blocks[0], torch.randn(2, 3, 32)
    half = x + factor * block.mixer(block.norm1(x), Positions(0, 3))
    torch.testing.assert_close(block(x, Positions(0, 3)), half + factor * block.ff(block.norm2(half)))


def test_own_position_table_in_every_layer():
    model, x = build(positions="learned_per_layer"), text(1, 6)
    tables = [block.position for block in model.blocks]
    assert [t.shape for t in tables] == [(16, 32)] * 2
    model(x).sum().backward()
    for table in tables:
        assert table.grad[:6].abs().sum() > 0 and table.grad[6:].abs().sum() == 0


def test_positions_past_the_table():
    for scheme in ("learned", "learned_per_layer"):
        with pytest.raises(ValueError, match=f"position 16 is past block_size 16.*'{scheme}'"):
            build(positions=scheme)(text(1, 17))
    for scheme in ("rope", "none"):
        assert build(positions=scheme)(text(1, 40)).shape == (1, 40, 256)


# --- Parameters: roles and initialisation ---

@pytest.mark.parametrize("settings", VARIANTS + HEADS, ids=str)
def test_every_parameter_has_one_role(settings):
    model = build(**settings)
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert set(roles.values()) <= {"embedding", "position", "matrix", "residual", "head", "gain", "bias"}
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert p.dim() == (1 if roles[name] in ("gain", "bias") else 2), name
    for name, rows in fused_rows(model).items():
        assert sum(rows) == model.get_parameter(name).size(0)


def test_unclaimed_and_doubly_claimed_parameters_raise(monkeypatch):
    model = build()
    model.stray = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="stray"):
        parameter_roles(model)
    monkeypatch.setitem(room.RULES, "residual", r"blocks\.\d+\.(mixer|ff)\..*")
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.qkv\.weight.*matrix and residual"):
        build()


@pytest.mark.parametrize("init, matrix, residual", [
    ("gpt2", lambda i, o: 0.02, lambda i, o: 0.02 / 2), ("normal", lambda i, o: 0.02, lambda i, o: 0.02),
    ("xavier", *[lambda i, o: (2 / (i + o)) ** 0.5] * 2), ("zero", lambda i, o: i ** -0.5, lambda i, o: 0.0),
])
def test_initialisation(init, matrix, residual):
    model = build(init=init, n_embd=128, n_kv_head=2, n_head=4, activation="swiglu", positions="learned", n_targets=2,
                  target_heads="shared", head_bias=True, block_size=64)
    roles, fused = parameter_roles(model), fused_rows(model)
    for name, p in model.named_parameters():
        role = roles[name]
        if role in ("matrix", "residual"):
            for part in p.split(fused.get(name, (p.size(0),))):
                std = {"matrix": matrix, "residual": residual}[role](part.size(1), part.size(0))
                assert abs(part.std().item() - std) <= 0.04 * std, name
                assert abs(part.mean().item()) <= 0.05 * std, name
                if init == "xavier":
                    bound = 3 ** 0.5 * std
                    assert 0.99 * bound < part.abs().max() <= bound
        elif name.startswith("target_maps"):
            assert torch.equal(p, torch.eye(128))
        elif role in ("gain", "bias"):
            assert torch.equal(p, torch.full_like(p, role == "gain"))
        else:
            std = 1.0 if init == "zero" and role == "embedding" else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name
    twin = build(init=init, n_embd=128, n_kv_head=2, n_head=4, activation="swiglu", positions="learned", n_targets=2,
                 target_heads="shared", head_bias=True, block_size=64)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    assert not torch.equal(build(seed=1).embed, build(seed=2).embed)
    assert build(init=init, tie_weights=True).embed.std() < 0.021    # a classifier too, so never N(0, 1)


# --- Settings ---

@pytest.mark.parametrize("settings, word", [
    (dict(n_head=5), "n_head 5 does not divide n_embd 32"), (dict(n_kv_head=3), "n_kv_head 3 does not divide n_head 4"),
    (dict(head_dim=7, positions="rope"), "head_dim 7 must be even"), (dict(head_dim=0), "head_dim"),
    (dict(tie_weights=True, n_targets=2), "tie_weights needs one classifier"),
    (dict(tie_weights=True, intermediate_losses=True), "tie_weights needs one classifier, not 2"),
    (dict(norm="batch"), "layer, rms"), (dict(activation="elu"), "swiglu"), (dict(init="he"), "xavier"),
    (dict(positions="sines"), "learned_per_layer"), (dict(target_heads="both"), "own, shared"),
    (dict(layer_heads=""), "own, shared"),
    (dict(attention="flash"), "auto, sdpa, manual"), (dict(residual_scale="deep"), "or depth, or rezero"),
    (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout"), (dict(rope_base=0), "rope_base"),
    (dict(ff_mult=0.01), "ff_mult"), (dict(logit_softcap=0.0), "logit_softcap"),
    *((dict([(name, 0)]), name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "n_targets")),
])
def test_impossible_settings_are_one_sentence(settings, word):
    with pytest.raises(ValueError, match=word) as error:
        build(**settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_from_settings_picks_by_name():
    c = TransformerConfig.from_settings(dict(n_layer=3, n_embd=64, n_head=2, lr=1.0, seed=4, head_dim=None))
    assert (c.n_layer, c.n_embd, c.n_kv_head, c.head_dim, c.vocab_size) == (3, 64, 2, 32, 256)
    assert TransformerConfig.from_settings(dict(n_head=5, n_embd=32, head_dim=8)).head_dim == 8


# --- Training ---

@pytest.mark.parametrize("settings", [
    dict(), dict(positions="rope", norm="rms", qk_norm=True, activation="relu2", init="zero", n_kv_head=2),
    dict(positions="learned_per_layer", n_targets=2, intermediate_losses=True, activation="relu", norm_gain=False),
], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_overfits_one_batch(settings, bf16):
    model, x = build(n_embd=64, **settings), text(2, 17)
    y = x.unfold(1, 1 + settings.get("n_targets", 1), 1)[:, :, 1:]
    x = x[:, :y.size(1)]
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            objective, nats = model(x, y)
        opt.zero_grad()
        objective.backward()
        opt.step()
    assert nats[-1, 0] < 0.1


# --- StableMax ---

def test_stablemax_is_its_definition():
    """s(x) / sum s with s(x) = x + 1 from 0 on, 1 / (1 - x) below: as a softmax of sign(x) ln(1 + |x|)."""
    x = torch.randn(50, 20, dtype=torch.float64) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    torch.testing.assert_close(room.stablemax(x).softmax(-1), s / s.sum(-1, keepdim=True), atol=2e-15, rtol=1e-12)
    torch.testing.assert_close(room.stablemax(x), x.sign() * x.abs().log1p(), atol=0, rtol=1e-15)


def test_stablemax_has_finite_gradients_everywhere():
    """1 / (1 + |x|): also at 0, and at +-1e4, where softmax's are 0 or overflow; float32 in, float32 gradients."""
    x = torch.tensor([-1e4, -1.0, -0.0, 0.0, 1e-30, 1.0, 1e4], requires_grad=True)
    room.stablemax(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 + x.detach().abs()))
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    F.cross_entropy(room.stablemax(logits), torch.tensor([1])).backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).all()


@pytest.mark.parametrize("settings", [dict(n_targets=2, intermediate_losses=True), dict(mtp_depth=1), dict(shorten=2,
                                      n_layer=3)])
def test_stablemax_reaches_losses_logits_and_evaluation(settings):
    """The loss in training is the one of the logits that inference returns, and it is not softmax's."""
    from model import build_model
    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, init="xavier") | settings
    model = build_model(TransformerConfig(**config, output="stablemax")).eval()
    x = torch.randint(256, (2, 16))
    y = torch.stack([x.roll(-k - 1, 1) for k in range(model.config.n_labels)], -1)
    objective, nats = model(x, y)
    logits = model(x)
    assert logits.dtype == torch.float64 and nats.dtype == torch.float32 and objective.isfinite()
    assert nats[-1, 0].item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), y[..., 0].flatten()).item(), 1e-6)
    plain = build_model(TransformerConfig(**config))
    plain.load_state_dict(model.state_dict())
    assert abs(plain(x, y)[1][-1, 0] - nats[-1, 0]) > 1e-4


# --- A cap of the logits ---

@pytest.mark.parametrize("settings", [dict(n_targets=2, intermediate_losses=True), dict(mtp_depth=1), dict(shorten=2,
                                      n_layer=3), dict(output="stablemax")])
def test_logit_softcap_by_hand(settings):
    """cap (1 - 2 / (exp(2 z / cap) + 1)) of each logit z, in losses, gradients and what inference returns."""
    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, init="xavier") | settings
    model = room.build_model(TransformerConfig(**config, logit_softcap=0.05))
    plain = room.build_model(TransformerConfig(**config))
    plain.load_state_dict(model.state_dict())
    seen, logits = [], plain.logits

    def by_hand(z):
        seen.append(z.detach().abs().max())
        return logits(0.05 * (1 - 2 / (torch.exp(2 * z / 0.05) + 1)))
    plain.logits = by_hand
    x = torch.randint(256, (2, 16))
    y = torch.stack([x.roll(-k - 1, 1) for k in range(model.config.n_labels)], -1)
    for one, two in zip((model(x), *model(x, y)), (plain(x), *plain(x, y))):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    for one in (model, plain):
        one(x, y)[0].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    assert min(seen) > 0.05  # far enough from 0 to be bent
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype


def test_a_model_that_could_never_learn_is_refused():
    with pytest.raises(ValueError, match="no gradient"):
        TransformerConfig(residual_scale="rezero", init="zero")
