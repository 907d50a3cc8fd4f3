"""The decoder: losses and heads, multi-token prediction, counts, norms and positions, initialisation, what classifiers
say. Its layers: test_mixers.py."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as room
from kernels import plain_rotary
from model import Positions, Transformer, TransformerConfig, active_layers, build_model, fused_rows, parameter_roles
from models.rope_scaling import scaled
from variants import text

T12 = dict(n_layer=12, n_head=8, n_embd=512, block_size=512, bias=False, norm_gain=False, head_bias=False,
           positions="learned_per_layer", n_targets=2, target_heads="own", layer_heads="own", intermediate_losses=True,
           activation="relu")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(TransformerConfig(**{**dict(n_layer=2, n_head=4, n_embd=32, block_size=16), **settings}))


def targets(model, B=2, T=8):
    """(B, T, n_labels) random bytes."""
    return text(B, T * model.config.n_labels, seed=2).view(B, T, -1)


# --- Losses and heads ---

HEADS = [
    dict(n_targets=3, target_heads=t, layer_heads=layers, intermediate_losses=inner, head_bias=(t == "own") == inner)
    for t in ("own", "shared") for layers, inner in (("own", True), ("shared", True), ("own", False))
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
            h, i = model.norm(states[layer]), group * c.n_targets + k
            if c.target_heads == "shared":
                i = group
                if k:
                    h = h @ model.target_maps[group * (c.n_targets - 1) + k - 1].T
            logits = h @ (model.embed if c.tie_weights else model.heads[i]).T
            if c.head_bias:
                logits = logits + model.head_biases[i]
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, :, k].flatten(), ignore_index=-1)
            objective = objective + loss * (1.0, 0.5, 0.25)[k]
            nats[row, k] = loss.item()
    return objective, nats


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_batched_heads_equal_a_loop_and_inference_keeps_one(settings):
    """With gradients, of whom a layer that has stopped has none, and without targets of -1; without the other heads
    logits stay as they were."""
    model = build(n_layer=3, norm="rms", **settings)
    with torch.no_grad():  # away from the start, where maps are the identity and biases zero
        for p in [*model.heads, *model.head_biases, *model.target_maps]:
            p.add_(torch.randn_like(p), alpha=0.3)
    x, y, inner = text(2, 8), targets(model), settings.get("intermediate_losses")
    y[0, 3:, 0] = y[1, 5:] = -1
    for active in ((0, 1, 2), (1, 2), (2,)) if inner else ((2,),):
        twin = copy.deepcopy(model)
        objective, nats = model(x, y, active)
        wanted, wanted_nats = loop_of_losses(twin, x, y, active)
        torch.testing.assert_close((objective, nats), (wanted, wanted_nats))
        model.zero_grad()
        objective.backward()
        wanted.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f"{name}: {m}")
    assert model(x, y)[1].shape[0] == (3 if inner else 1)
    before, nats = model.eval()(x), model(x, y)[1]
    assert model.for_inference() is model and torch.equal(model(x), before)
    assert len(model.heads) == (0 if settings.get("tie_weights") else 1)
    assert len(model.target_maps) == 0 and len(model.head_biases) == settings.get("head_bias", False)
    torch.testing.assert_close(model(x, y[..., :1])[1][0, 0], nats[-1, 0])
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, when its compiler is imported
def test_compiled_losses_follow_the_active_layers():
    """The second set of layers reaches the compiler as symbols: they must still be found among the layers."""
    model, x = build(n_layer=3, n_targets=2, intermediate_losses=True), text(2, 8)
    compiled, y = torch.compile(model, backend="eager", fullgraph=True), targets(model)
    for active in ((0, 1, 2), (1, 2)):
        torch.testing.assert_close(compiled(x, y, active), model(x, y, active))


def test_losses_that_do_not_fit():
    model, plain = build(n_layer=3, intermediate_losses=True), build(n_targets=2)
    for active in ((), (0,), (0, 1), (0, 0, 2), (-1, 2), (0, 3)):
        with pytest.raises(ValueError, match="active layers"):
            model(text(1, 4), text(1, 4, 1), active)
    with pytest.raises(ValueError, match=r"n_labels"):
        plain(text(1, 4), text(1, 4, 1))
    with pytest.raises(ValueError, match="need intermediate_losses"):
        plain(text(1, 4), text(1, 4, 2), active=(0, 1))


def test_layer_drop_fractions():
    """Layer l of n (from 1) stops after l / (2n) of training; the last never."""
    n, steps = 12, 4800
    for l in range(1, n):
        stop = l * steps // (2 * n)
        assert l - 1 in active_layers(stop - 1, steps, n) and l - 1 not in active_layers(stop, steps, n)
    assert active_layers(0, steps, n) == tuple(range(12)) and active_layers(11 * 200 - 1, steps, n) == (10, 11)
    assert active_layers(steps // 2 - 1, steps, n) == active_layers(steps, steps, n) == (n - 1,)
    assert active_layers(31_249, 4_000_000, 64) == tuple(range(64))
    assert active_layers(31_250, 4_000_000, 64) == tuple(range(1, 64)) and active_layers(0, 0, 1) == (0,)


def test_multi_token_prediction():
    """Module d predicts the byte d + 1 ahead from the stream and byte d; dropped at inference."""
    model, x, states = build(mtp_depth=2, mtp_weight=0.6, init="xavier", positions="rope").eval(), text(2, 8), []
    y, places = text(2, 10, seed=2).unfold(1, 3, 1), model.place(x, None)  # (2, 8, 3)
    objective, nats = model(x, y)
    hook = model.blocks[-1].register_forward_hook(lambda m, i, o: states.append(o))
    plain = model(x)
    hook.remove()
    h, wanted = states[0], 0.0
    for d, module in enumerate(model.mtp, 1):
        joined = torch.cat((module.norm1(h), module.norm2(model.embed[y[..., d - 1]])), -1)
        h = module.block(module.join(joined), places)
        wanted = wanted + 0.3 * F.cross_entropy((model.norm(h) @ model.heads[0].T).transpose(1, 2), y[..., d])
    torch.testing.assert_close(model.extras["mtp"], wanted)
    torch.testing.assert_close(objective, nats[0, 0] + wanted)
    small = model.for_inference()
    assert torch.equal(small(x), plain) and not small.mtp and small.config.n_labels == 1


def test_experts_of_multi_token_prediction_have_loads_of_their_own():
    """By the last layer's number they moved that layer's biases, and its loads were nowhere."""
    model = build(mtp_depth=2, ff="mlp,moe", n_expert=4, expert_balance="bias").train()
    experts = [model.blocks[1].ff, *(module.block.ff for module in model.mtp)]
    seen = [[] for _ in experts]
    for ff, found in zip(experts, seen):
        ff.register_forward_pre_hook(lambda m, given, found=found: found.append(given[0].flatten(0, 1)))
    model(text(2, 8), targets(model))
    wanted = [torch.bincount(ff.route(x)[0].flatten(), minlength=4) for ff, (x,) in zip(experts, seen)]
    torch.testing.assert_close(model.usage, dict(enumerate(wanted, 1)))
    model.usage = {1: torch.tensor([9, 1, 1, 1])}
    model.balance_experts()
    assert experts[0].correction.any() and not any(ff.correction.any() for ff in experts[1:])


def test_compression_learns_from_its_own_loss_alone():
    """Which falls, joins the objective, and is none before something was compressed; the network's does not reach it.
    """
    model = build(mixer="compressive", positions="rope", n_layer=1, block_size=8, memory_length=8, compressed_length=4,
                  compression_rate=2, compression_weight=1.0, init="xavier").train()
    x, y, weight, found = text(4, 8 * 8), text(4, 8 * 8, seed=2), model.blocks[0].mixer.compress_weight, []
    optimizer, memory = torch.optim.Adam([weight], 3e-3), None
    for part in [slice(8 * i, 8 * i + 8) for _ in range(5) for i in range(8)]:
        memory = memory if part.start else model.new_memory(4)
        objective, nats = model(x[:, part], y[:, part, None], memory=memory)
        found.append(model.extras.get("compression", torch.tensor(0.0)))
        torch.testing.assert_close(objective.detach(), nats[0, 0] + found[-1])
        model.zero_grad()
        objective.backward()
        assert bool(model.extras) == (weight.grad is not None and weight.grad.any().item()) == (part.start > 0)
        optimizer.step()
    assert 0 < sum(found[-7:]) < 0.85 * sum(found[1:8])
    grads = []
    for strength in (0.0, 9.0):
        model.config.compression_weight = strength
        model.zero_grad()
        model(x[:, part], y[:, part, None], memory=copy.deepcopy(memory))[0].backward()
        assert weight.grad.any() == (strength > 0)
        grads.append([p.grad for p in model.parameters() if p is not weight])
    assert all(map(torch.equal, *grads))


# --- Counts ---

def test_counts():
    """Al-Rfou et al. 2018: 44M and 235M in training, 41M for 12 layers at inference."""
    def meta(**settings):
        with torch.device("meta"):
            return Transformer(TransformerConfig(**settings))
    t12 = meta(**T12)
    assert t12.n_params() == sum(p.numel() for p in t12.parameters()) == 44_171_264
    assert meta(**{**T12, "n_layer": 64}).n_params() == 235_012_096
    assert t12.for_inference().n_params() == 41_156_608
    base = dict(n_layer=2, n_embd=384, n_head=6, bias=False)
    assert meta(**base, activation="swiglu").n_params() == meta(**base, activation="gelu").n_params()
    assert build().n_params() - build(tie_weights=True).n_params() == 256 * 32
    plain, pyramid = (build(n_layer=4, shorten=k) for k in (1, 2))
    assert pyramid.flops_per_token(16) < plain.flops_per_token(16)


def test_flops_per_token():
    model = build(bias=False, n_kv_head=2, n_targets=2, intermediate_losses=True)
    matrices = 2 * (32 * 64 + 32 * 32 + 8 * 32 * 32)
    for active, heads in ((None, 4), ((0, 1), 4), ((1,), 2)):
        assert model.flops_per_token(16, active) == 6 * (matrices + heads * 256 * 32) + 12 * 2 * 32 * 16
    shared = build(bias=False, tie_weights=True, n_targets=3, target_heads="shared")
    assert shared.flops_per_token(8) == 6 * (2 * 12 * 32 * 32 + 3 * 256 * 32 + 2 * 32 * 32) + 12 * 2 * 32 * 8


# --- Blocks, norms, positions ---

@pytest.mark.parametrize("settings, factor", [
    (dict(residual_scale="depth"), 0.5), (dict(residual_scale=0.25), 0.25), (dict(ff="none"), 1), ({}, 1),
    (dict(short_conv=3), 1), (dict(short_conv=2, parallel_residual=True), 1), (dict(parallel_residual="shared"), 1),
    (dict(norm_after=True), 1), (dict(norm_after=True, parallel_residual=True), 1)], ids=str)
def test_blocks_by_hand(settings, factor):
    """Each branch behind its norm, or before it; both on one stream or one after the other; a convolution between the
    first norm and the mixer; one branch alone."""
    block, x, places = build(init="xavier", **settings).blocks[1], torch.randn(2, 6, 32), Positions(0, 6)

    def branch(x, norm, layer):
        if "norm_after" in settings:
            return factor * norm(layer(x))
        h = norm(x)
        if block.conv is not None and norm is block.norm1:
            h = sum(k * F.pad(h, (0, 0, i, 0))[:, :6] for i, k in enumerate(block.conv.kernel))
        return factor * layer(h)
    wanted = x + branch(x, block.norm1, lambda h: block.mixer(h, places))
    if settings.get("parallel_residual") == "shared":
        assert block.norm2 is None
        wanted = wanted + block.ff(block.norm1(x))
    elif "ff" not in settings:
        wanted = wanted + branch(x if "parallel_residual" in settings else wanted, block.norm2, block.ff)
    torch.testing.assert_close(block(x, places), wanted)


@pytest.mark.parametrize("gain, bias", [(True, True), (True, False), (False, True)])
def test_dyt_by_hand(gain, bias):
    """gamma tanh(alpha x) + beta, with gradients; alpha is 0.5 at first, and has the gains' rule."""
    norm = build(norm="dyt", norm_gain=gain, bias=bias).blocks[1].norm2.double()
    assert {name for name, _ in norm.named_parameters()} == {"alpha", *["gain"] * gain, *["bias"] * (gain and bias)}
    assert norm.alpha.tolist() == [0.5] and norm.roles == {"alpha": "gain"}
    x = torch.randn(3, 4, 32, dtype=torch.float64, requires_grad=True)
    for p in norm.parameters():
        p.data.add_(torch.randn_like(p))
    a, g, b = (0.0 if p is None else p.detach() for p in (norm.alpha, norm.gain if gain else torch.ones(32), norm.bias))
    y, h = norm(x), x.detach()
    bent = 1 - 2 / ((2 * a * h).exp() + 1)
    torch.testing.assert_close(y, g * bent + b)
    slopes = g * (1 - bent ** 2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, norm.alpha]), (a * slopes, (slopes * h).sum().view(1)))
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and torch.equal(norm(x, learn=False), y)
    norm(x, learn=False).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in norm.parameters())


def test_rope_turns_by_position():
    """A query at m and a key at n: the product depends on m - n only; pair (i, i + D/2) turns at base^(-2i/D)."""
    rope = room.Rope(8, 100.0, 4)
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


def test_rope_scalings():
    """By index YaRN is the published formula for the numbers of DeepSeek-V3 (64 dimensions, 4,096 positions times 40):
    pairs 0 to 10 stay, those from 23 on are divided by 40, a line between; by turns, the paper's, it is another."""
    plain, (linear, one) = room.rope_frequencies(64, 1e4), scaled(64, 1e4, "linear", 4.0)
    ntk, (yarn, magnitude) = scaled(64, 1e4, "ntk", 4.0)[0], scaled(64, 1e4, "yarn", 4.0, 512)
    assert one == 1 and torch.equal(linear, plain / 4)
    torch.testing.assert_close(ntk[[0, -1]], torch.stack((plain[0], plain[-1] / 4)))
    turns = 512 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 32], plain[turns > 32])
    torch.testing.assert_close(yarn[turns < 1], plain[turns < 1] / 4)
    assert (yarn[1:] < yarn[:-1]).all() and magnitude == pytest.approx(0.1 * math.log(4) + 1)
    for scaling in ("linear", "ntk", "yarn"):
        torch.testing.assert_close(scaled(64, 1e4, scaling, 1.0)[0], plain)
    found, magnitude = scaled(64, 1e4, "yarn", 40.0, 4096, "index", 0.707)
    stretched = ((torch.arange(32).double() - 10) / (23 - 10)).clamp(0, 1)
    torch.testing.assert_close(found, (stretched / 40 + 1 - stretched) * plain, rtol=1e-12, atol=0)
    assert magnitude == pytest.approx(0.0707 * math.log(40) + 1)
    assert (scaled(64, 1e4, "yarn", 40.0, 4096)[0] / found - 1).abs().max() > 0.1


# --- Parameters: roles and initialisation ---

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
    ("truncated", *[lambda i, o: 0.8796 * 128 ** -0.5] * 2)])  # of N(0, 1) cut at two deviations
def test_initialisation(init, matrix, residual):
    """Standard deviations by role, the same from one seed; the loss at first is uniform."""
    settings = dict(init=init, n_embd=128, n_kv_head=2, activation="swiglu", n_targets=2, target_heads="shared",
                    head_bias=True, block_size=64)
    model = build(**settings)
    roles, fused = parameter_roles(model), fused_rows(model)
    for name, p in model.named_parameters():
        role = roles[name]
        if role in ("matrix", "residual"):
            for part in p.split(fused.get(name, (p.size(0),))):
                std = {"matrix": matrix, "residual": residual}[role](part.size(1), part.size(0))
                assert abs(part.std().item() - std) <= 0.04 * std and abs(part.mean().item()) <= 0.05 * std, name
                bound = {"xavier": 3 ** 0.5 * std, "truncated": 2 * 128 ** -0.5}.get(init)
                assert bound is None or 0.99 * bound < part.abs().max() <= bound, name
        elif name.startswith("target_maps"):
            assert torch.equal(p, torch.eye(128))
        elif role in ("gain", "bias"):
            assert torch.equal(p, torch.full_like(p, role == "gain"))
        else:
            std = 1.0 if init == "zero" and role == "embedding" else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name
    assert all(map(torch.equal, model.parameters(), build(**settings).parameters()))
    assert not torch.equal(model.embed, build(seed=1, **settings).embed)
    assert build(init=init, tie_weights=True).embed.std() < 0.021    # a classifier too, so never N(0, 1)
    nats = model(text(8, 64), targets(model, 8, 64))[1]
    assert nats.dtype == torch.float32 and not nats.requires_grad and nats.shape == (1, 2)
    assert (nats - math.log(256)).abs().max() < 0.06


def test_tfixup_by_its_numbers():
    """Huang et al. 2020, section 3.2: embeddings N(0, d^-1/2) times (9 L)^-1/4; values, outputs and feed-forwards
    Xavier's times 0.67 L^-1/4 (the encoder's rule); queries and keys Xavier's."""
    L, C = 4, 64
    model = build(init="tfixup", n_layer=L, n_embd=C)
    assert model.embed.std().item() == pytest.approx(C ** -0.5 * (9 * L) ** -0.25, rel=0.03)
    block, small = model.blocks[1], 0.67 * L ** -0.25
    q, k, v = block.mixer.qkv.weight.chunk(3)
    for weight, factor in ((q, 1), (k, 1), (v, small), (block.mixer.out.weight, small), (block.ff.up.weight, small),
                           (block.ff.down.weight, small)):
        bound = factor * (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)


def test_from_settings_picks_by_name():
    c = TransformerConfig.from_settings(dict(n_layer=3, n_embd=64, n_head=2, lr=1.0, seed=4, head_dim=None))
    assert (c.n_layer, c.n_embd, c.n_kv_head, c.head_dim, c.vocab_size) == (3, 64, 2, 32, 256)
    assert TransformerConfig.from_settings(dict(n_head=5, n_embd=32, head_dim=8)).head_dim == 8


# --- What classifiers say ---

def test_stablemax_is_its_definition_and_has_gradients_everywhere():
    """s(x) / sum s with s(x) = x + 1 from 0 on, 1 / (1 - x) below, as a softmax of sign(x) ln(1 + |x|), whose slope is
    1 / (1 + |x|): also at 0, and at +-1e4, where softmax's are 0 or overflow."""
    x = torch.randn(50, 20, dtype=torch.float64) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    torch.testing.assert_close(room.stablemax(x).softmax(-1), s / s.sum(-1, keepdim=True), atol=2e-15, rtol=1e-12)
    torch.testing.assert_close(room.stablemax(x), x.sign() * x.abs().log1p(), atol=0, rtol=1e-15)
    x = torch.tensor([-1e4, -1.0, -0.0, 0.0, 1e-30, 1.0, 1e4], requires_grad=True)
    room.stablemax(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 + x.detach().abs()))


def capped(z):
    return 0.05 * (1 - 2 / (torch.exp(2 * z / 0.05) + 1))


def stable(z):
    return z.double().sign() * z.double().abs().log1p()


@pytest.mark.parametrize("how, by_hand", [
    (dict(output="stablemax"), stable), (dict(logit_softcap=0.05), capped),
    (dict(output="stablemax", logit_softcap=0.05), lambda z: stable(capped(z)))], ids=["stable", "capped", "both"])
@pytest.mark.parametrize("settings", [dict(n_targets=2, intermediate_losses=True), dict(mtp_depth=1),
                                      dict(shorten=2, n_layer=3)], ids=str)
def test_logits_by_hand_in_losses_gradients_and_inference(settings, how, by_hand):
    settings = dict(n_head=2, n_embd=16, init="xavier", **settings)
    model, plain, seen = build(**settings, **how), build(**settings), []
    plain.load_state_dict(model.state_dict())
    x, y = text(2, 16), targets(model, 2, 16)
    assert (plain(x) - model(x)).abs().max() > 1e-3
    plain.logits = lambda z: seen.append(z.detach().abs().max()) or by_hand(z)
    for one, two in zip((model(x), *model(x, y)), (plain(x), *plain(x, y))):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    for one in (model, plain):
        one(x, y)[0].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    assert min(seen) > 0.05  # far enough from 0 to be bent
    assert model(x).dtype == (torch.float64 if "output" in how else torch.float32)
    assert F.cross_entropy(model(x).flatten(0, 1), y[..., 0].flatten()).item() == pytest.approx(
        model(x, y)[1][-1, 0].item(), rel=1e-6)
