"""Sparse, differential and latent attention by their formulas, query by query, in float64; feed-forwards by theirs."""
import math

import pytest
import torch
import torch.nn.functional as F

import model as mixers
from kernels import GLU, gelu, plain_rotary
from model import (FEED_FORWARDS, Positions, Transformer, TransformerConfig, equal_ff_mult, fused_rows, parameter_roles,
                   variant)
from nanolab import optim

T = 21


def build(seed=0, **settings):
    torch.manual_seed(seed)
    base = dict(n_layer=1, n_head=4, n_embd=32, block_size=32, init="xavier", positions="none", sparse_stride=4,
                sparse_summary=2)
    return Transformer(TransformerConfig(**{**base, **settings})).double()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES = [{}, dict(score_softcap=0.3), dict(softmax_plus_one=True),  # what may be made of attention's scores
          dict(score_softcap=0.3, softmax_plus_one=True)]


def weights_of(products, bias=0.0, score_softcap=None, softmax_plus_one=False):
    """Of one query's scores (S,), what its values weigh; bias (S,) is added."""
    c = score_softcap
    scores = products if c is None else c * (1 - 2 / ((2 * products / c).exp() + 1))
    e = (scores + bias).exp()
    return e / (softmax_plus_one + e.sum())


def softmax_over(q, k, v, seen, bias=0.0, **scores):
    """One query (D,) over the keys (S, D) whose index is in seen; scores get bias (S,) added."""
    bias = torch.as_tensor(bias, dtype=q.dtype).expand(len(k))
    return weights_of((k @ q / len(q) ** 0.5)[seen], bias[seen], **scores) @ v[seen]


# --- Full ---

@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("positions", ["none", "alibi"])
@pytest.mark.parametrize("kind, kv", [("full", 4), ("full", 1), ("window", 2)])
def test_full_by_definition(kind, kv, positions, scores):
    model, x = build(mixer=kind, n_kv_head=kv, positions=positions, window=5, **scores), draw(1, T, 32)
    mixer, out = model.blocks[0].mixer, []
    q, k, v = mixer.qkv(x[0]).view(T, 4 + 2 * kv, 8).split((4, kv, kv), 1)
    for t in range(T):
        seen, distance = list(range(0 if kind == "full" else max(0, t - 4), t + 1)), t - torch.arange(T).double()
        heads = [softmax_over(q[t, h], k[:, h * kv // 4], v[:, h * kv // 4], seen,
                              -distance * 2.0 ** (-2 * (h + 1)) * (positions == "alibi"), **scores) for h in range(4)]
        out.append(mixer.out(torch.cat(heads)))
    torch.testing.assert_close(mixer(x, Positions(0, T))[0], torch.stack(out), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind, kv", [("full", 4), ("full,window", 2), ("strided,fixed,full", 2)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_value_residual_by_hand(kind, kv, qk_norm):
    """Each later layer is the one without it whose values are a g-th of the first layer's; half of them at first."""
    settings = dict(mixer=kind, n_kv_head=kv, n_layer=3, window=5, qk_norm=qk_norm)
    model, plain = build(value_residual=True, **settings), build(**settings)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"blocks.{n}.mixer.first_share" for n in (1, 2)]
    shares, x = [model.get_parameter(name) for name in missing], draw(1, T, 32)
    assert all(g.item() == 0.5 and parameter_roles(model)[name] == "gain" for name, g in zip(missing, shares))
    with torch.no_grad():
        shares[0].fill_(0.3), shares[1].fill_(1.25)
    h = wanted = x
    for n, (block, other) in enumerate(zip(model.blocks, plain.blocks)):
        normed, rows = other.norm1(wanted), (4 + kv) * 8
        values = F.linear(normed, other.mixer.qkv.weight[rows:], other.mixer.qkv.bias[rows:])
        if n == 0:
            first = values
        g = shares[n - 1].item() if n else 0.0

        def mixed(module, given, qkv):
            return torch.cat((qkv[..., :rows], (1 - g) * values + g * first), -1)
        hook = other.mixer.qkv.register_forward_hook(mixed)
        wanted = other(wanted, Positions(0, T))
        hook.remove()
    positions = Positions(0, T)
    for block in model.blocks:
        h = block(h, positions)
    torch.testing.assert_close(h, wanted)
    grad, *grads = torch.autograd.grad(h.square().sum(), [model.blocks[0].mixer.qkv.weight, *shares])
    torch.testing.assert_close(grad, *torch.autograd.grad(wanted.square().sum(), plain.blocks[0].mixer.qkv.weight))
    assert all(g.abs().max() > 1e-3 for g in grads)


def test_softmax_plus_one_neither_overflows_nor_divides_by_zero():
    """A query that fits nothing sees nothing; one that fits something far better than 1 has a plain softmax."""
    scores = torch.tensor([[-1e4, -2e4], [1e4, 1e4], [-math.inf, -math.inf], [0.0, -math.inf]], requires_grad=True)
    found = mixers.weights_of(scores, True)
    assert found.tolist() == [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.5, 0.0]]
    found[:, 0].sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[3, 0] == 0.25


# --- Sparse ---

@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("n", [T, 5, 16, 17, 40])
@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_sparse_by_definition(kind, n, kv, scores):
    model, x = build(mixer=kind, n_kv_head=kv, **scores), draw(1, n, 32)
    mixer = model.blocks[0].mixer
    q, k, v = mixer.qkv(x[0]).view(n, 4 + 2 * kv, 8).split((4, kv, kv), 1)
    out = []
    for t in range(n):
        near = [s for s in range(t + 1) if (t - s < 4 if kind == "strided" else s // 4 == t // 4)]
        far = [s for s in range(t + 1) if ((t - s) % 4 == 0 if kind == "strided" else s == t or s % 4 >= 2)]
        heads = [softmax_over(q[t, h], k[:, h * kv // 4], v[:, h * kv // 4], near if h < 2 else far, **scores)
                 for h in range(4)]
        out.append(mixer.out(torch.cat(heads)))
    torch.testing.assert_close(mixer(x, Positions(0, n))[0], torch.stack(out))


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_sparse_whole_pass_equals_masks_with_gradients(kind):
    found = []
    for index in (None, torch.arange(30)[None]):  # ragged positions take the masks
        model, x = build(mixer=kind), draw(1, 30, 32).requires_grad_()
        y = model.blocks[0].mixer(x, Positions(0, 30, index))
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.blocks[0].mixer.parameters()])))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


# --- Differential ---

@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("positions", ["none", "alibi"])
def test_differential_by_definition(positions, kv, scores):
    model, x = build(mixer="diff", positions=positions, n_kv_head=kv, n_layer=2, **scores), draw(1, T, 32)
    mixer = model.blocks[1].mixer
    q, k, v = mixer.qkv(x[0]).view(T, 4 + 2 * kv, 8).split((4, kv, kv), 1)
    start = 0.8 - 0.6 * math.exp(-0.3)
    strength = ((mixer.lambda_q1 @ mixer.lambda_k1).exp() - (mixer.lambda_q2 @ mixer.lambda_k2).exp() + start)
    out = []
    for t in range(T):
        heads = []
        for pair in range(2):
            g = pair * kv // 4 * 2  # the first of the pair's two key heads
            value, parts = torch.cat((v[:, g], v[:, g + 1]), 1), []
            for i in range(2):
                slope = 2.0 ** (-8 * (2 * pair + 2) / 4) if positions == "alibi" else 0.0
                bias = -slope * (t - torch.arange(T, dtype=torch.float64))
                parts.append(softmax_over(q[t, 2 * pair + i], k[:, g + i], value, list(range(t + 1)), bias, **scores))
            y = parts[0] - strength * parts[1]
            heads.append(y / (y.square().mean() + 1e-6).sqrt() * (1 - start))
        out.append(mixer.out(torch.cat(heads)))
    torch.testing.assert_close(mixer(x, Positions(0, T))[0], torch.stack(out), atol=1e-6, rtol=1e-5)


def test_differential_has_the_parameters_of_full():
    assert build(mixer="diff").n_params() == build().n_params() + 4 * 8


# --- Latent ---

@pytest.mark.parametrize("how", SCORES, ids=str)
@pytest.mark.parametrize("q_rank", [None, 12])
def test_latent_by_definition(q_rank, how):
    model, x = build(mixer="mla", positions="rope", kv_rank=10, rope_dim=6, q_rank=q_rank, **how), draw(1, T, 32)
    mixer, places = model.blocks[0].mixer, model.place(torch.zeros(1, T), None)
    cos, sin = model.ropes["6"](T)

    def norm(t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(t, at):
        return plain_rotary(t.view(1, 1, 1, 6), cos[at].view(1, 1, 1, 6), sin[at].view(1, 1, 1, 6)).flatten().double()
    q = mixer.q(x[0] if q_rank is None else norm(mixer.into(x[0]))).view(T, 4, 14)
    latent, key = mixer.kv(x[0]).split((10, 6), 1)
    k, v = mixer.up(norm(latent)).view(T, 2, 4, 8).unbind(1)
    shared, out = torch.stack([turned(key[s], s) for s in range(T)]), []
    for t in range(T):
        heads = []
        for h in range(4):
            scores = (k[:t + 1, h] @ q[t, h, :8] + shared[:t + 1] @ turned(q[t, h, 8:], t)) / 14 ** 0.5
            heads.append(weights_of(scores, **how) @ v[:t + 1, h])
        out.append(mixer.out(torch.cat(heads)))
    torch.testing.assert_close(mixer(x, places)[0], torch.stack(out), atol=1e-5, rtol=1e-4)


def test_latent_cache_holds_latents():
    model = build(mixer="mla", positions="rope", kv_rank=10, rope_dim=6).float()
    cache = model.new_cache(3, 50)
    assert cache.bytes == 3 * 50 * (10 + 6) * 4 and cache.layers[0].kind == "latent"


# --- Feed-forwards ---

def feed_forward(kind="mlp", **settings):
    return build(ff=kind, **settings).blocks[0].ff


@pytest.mark.parametrize("activation", GLU)
def test_gated_activations(activation):
    ff, x = feed_forward(activation=activation), draw(2, 3, 32)
    a, b = ff.up(x).chunk(2, -1)
    gate = {"glu": 1 / (1 + torch.exp(-a)), "bilinear": a, "reglu": a.clamp(min=0), "swiglu": a / (1 + torch.exp(-a)),
            "geglu": a * 0.5 * (1 + torch.erf(a / 2 ** 0.5))}[activation]
    torch.testing.assert_close(ff(x), ff.down(gate * b))


def test_low_rank():
    ff, x = feed_forward("low_rank", ff_rank=5), draw(2, 3, 32)
    torch.testing.assert_close(ff(x), ff.down(ff.join(F.gelu(ff.up(ff.into(x))))))
    assert sum(p.numel() for name, p in ff.named_parameters() if "weight" in name) == 2 * 5 * (32 + 128)


@pytest.mark.parametrize("S, mask, dropout, expected", [
    (15, "causal", 0.0, True), (16, "causal", 0.0, False), (16, "causal", 0.1, True), (63, None, 0.0, True),
    (64, None, 0.0, False), (64, None, 0.1, True)])
def test_training_on_a_cpu_attends_by_hand_while_that_is_faster(S, mask, dropout, expected, monkeypatch, bfloat16_sdpa):
    called, attend = [], mixers.attend_by_hand
    monkeypatch.setattr(mixers, "LONG", 16)
    monkeypatch.setattr(mixers, "attend_by_hand", lambda *given: called.append(1) or attend(*given))
    layer = build(dropout=dropout).blocks[0].mixer.train()
    q = draw(1, 4, S, 8).bfloat16().requires_grad_()
    layer.softmax(q, q, q, mask)
    assert bool(called) == expected
    called.clear()
    layer.softmax(q.float(), q.float(), q.float(), mask), layer.softmax(q.detach(), q.detach(), q.detach(), mask)
    assert not called


@torch.no_grad()
def test_a_lone_query_is_dropped_out_in_training_only():
    layer, x = build(dropout=0.5).blocks[0].mixer, draw(1, 1, 32)
    cache = layer.new_cache(1, 8, None, "cpu", torch.float64)
    cache.update(draw(1, 4, 6, 8), draw(1, 4, 6, 8, seed=2))

    def found(training):
        layer.train(training)
        return layer(x, Positions(6, 1), cache.fork())
    assert torch.equal(found(False), found(False)) and not torch.equal(found(True), found(True))


@pytest.mark.parametrize("n", [1, 512, 16384, 16385])
@pytest.mark.parametrize("usual", [True, False])
def test_gelu_of_any_size_leaves_onednn_as_it_was(n, usual, monkeypatch):
    x = draw(n, 1)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", usual)
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)))
    with pytest.raises(RuntimeError):
        gelu(x.long())
    assert torch.backends.mkldnn.enabled == usual


@pytest.mark.parametrize("n", [1, 64, 65, 128, 150])
def test_rows_added_to_an_expert_change_nothing(n, monkeypatch):
    """And there are a multiple of 64 in the products, once there are more than 64."""
    ff, found, seen, linear = feed_forward("moe", activation="swiglu"), [], [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    for rounded in (False, True):
        x, up, down = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(n, 8), (12, 8), (8, 6)]))
        y = ff.expert(x, up, down, rounded)
        y.backward(draw(n, 8, seed=4))
        found.append((y, x.grad, up.grad, down.grad))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two)
    assert seen == [n, n] + [n if n <= 64 else -(-n // 64) * 64] * 2


def test_experts_add_rows_in_bfloat16_on_a_cpu(monkeypatch):
    asked, kind = [], variant(FEED_FORWARDS["moe"])
    expert = kind.expert
    monkeypatch.setattr(kind, "expert", lambda *given: asked.append(given[-1]) or expert(*given))
    ff, x = feed_forward("moe").float(), draw(2, 3, 32).float()
    ff(x)
    assert set(asked) == {False}
    asked.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ff(x)
    ff.bfloat16()(x.bfloat16())
    assert set(asked) == {True}


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_experts_token_by_token(activation, balance, shared):
    ff = feed_forward("moe", activation=activation, expert_balance=balance, n_shared_expert=shared).train()
    x, E, places = draw(2, 7, 32), 8 - shared, Positions(0, 7)
    if balance == "bias":
        ff.correction.copy_(torch.linspace(-0.3, 0.3, E))
    found, w, rows = ff(x, places), ff.width, ff.rows

    def act(h):
        return F.relu(h).square() if activation == "relu2" else F.silu(h[:w]) * h[w:]
    up, down, loads = ff.up.weight.view(E, rows, 32), ff.down.weight.view(E, 32, w), torch.zeros(E)
    total = torch.zeros(E, dtype=torch.float64)
    for row in range(2):
        for t in range(7):
            logits = ff.router.weight @ x[row, t]
            scores = logits.sigmoid() if balance == "bias" else logits.softmax(0)
            ranked = scores + ff.correction if balance == "bias" else scores
            first = ranked.topk(3).values
            assert first[1] - first[2] > 1e-5  # else rounding chooses: another seed
            best = ranked.topk(2).indices
            wanted = sum(scores[e] / scores[best].sum() * (down[e] @ act(up[e] @ x[row, t])) for e in best)
            if shared:
                h = ff.shared["up"](x[row, t])
                h = F.relu(h).square() if activation == "relu2" else F.silu(h[:2 * w]) * h[2 * w:]
                wanted = wanted + ff.shared["down"](h)
            torch.testing.assert_close(found[row, t], wanted, atol=1e-6, rtol=1e-5)
            loads[best] += 1
            total += scores
    (layer, counted), = places.usage
    assert layer == 0 and torch.equal(counted.float(), loads)
    if balance == "loss":
        wanted = 0.01 * E * (loads / loads.sum() * total / 14).sum()
        torch.testing.assert_close(places.losses["balance"][0].double(), wanted, atol=1e-7, rtol=1e-5)
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


def test_balance_loss_is_one_where_even_and_grows():
    ff = feed_forward("moe", balance_weight=1.0).train()
    for bias, low, high in ((0.0, 0.99, 1.01), (9.0, 3.5, 4.1)):
        places = Positions(0, 1)
        scores = torch.full((64, 8), 0.0)
        scores[:, :2] += bias
        chosen = scores.topk(2).indices if bias else (torch.arange(128) % 8).view(64, 2)
        ff.report(places, chosen, scores.softmax(1), torch.bincount(chosen.flatten(), minlength=8))
        assert low < places.losses["balance"][0] < high


def test_padding_is_no_load():
    ff, x = feed_forward("moe").train(), draw(1, 6, 32)
    places = Positions(0, 6, torch.tensor([[-1, -1, 0, 1, 2, 3]]))
    ff(x, places)
    assert places.usage[0][1].sum() == 4 * 2


def test_biases_even_the_loads_without_a_loss():
    model = build(ff="moe", expert_balance="bias", balance_rate=0.05, n_layer=2).train()
    with torch.no_grad():
        for block in model.blocks:
            block.ff.router.weight[0] *= 6
    x, spread = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0)), []
    for _ in range(60):
        assert not model.extras
        model(x, x.unsqueeze(-1))
        spread.append(max((n.max() / n.float().mean()).item() for n in model.usage.values()))
        model.balance_experts()
    assert spread[-1] < 0.75 * spread[0] and spread[-1] < 1.7


def test_idle_experts():
    model, dense = build(ff="moe", n_expert=8, expert_top_k=2), build()
    width = 4 * 32 // 8
    assert model.n_params() - model.n_active_params() == 6 * 2 * width * 32
    assert model.n_active_params() < dense.n_params() < model.n_params()
    router = 6 * 8 * 32
    assert dense.flops_per_token(8) - model.flops_per_token(8) == 6 * 6 * 2 * width * 32 - router


def test_only_chosen_experts_have_gradients():
    ff = feed_forward("moe").train()
    x = draw(1, 1, 32)
    chosen = ff.route(x[0])[0].flatten().tolist()
    ff(x, Positions(0, 1)).sum().backward()
    moved = ff.up.weight.grad.view(8, -1).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted(chosen) and ff.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("settings", [
    dict(ff="moe", activation="swiglu", n_shared_expert=1), dict(ff="low_rank"), dict(mixer="mla", positions="rope"),
    dict(mixer="diff"), dict(mixer="mamba", residual_scale="layerscale"), dict(mixer="mingru"), dict(mtp_depth=1)],
    ids=str)
def test_learns(settings, optimizer):
    model = build(**settings, init="gpt2", n_layer=2).float().train()
    fused = fused_rows(model)
    assert all(sum(fused[name]) == p.size(0) for name, p in model.named_parameters() if name in fused)
    built = optim.build(dict(optimizer=optimizer, lr=5e-3, muon_lr=0.02), model.named_parameters(),
                        parameter_roles(model), fused)
    x = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    y = x.roll(-1, 1)
    targets = torch.stack([y.roll(-k, 1) for k in range(model.config.n_labels)], 2)
    for _ in range(60):
        objective, nats = model(x, targets)
        objective.backward()
        built.step()
        built.zero_grad()
    assert nats[-1, 0].item() < 1.5


def test_words():
    assert set(FEED_FORWARDS) == {"mlp", "low_rank", "moe"} and equal_ff_mult(TransformerConfig()) == pytest.approx(4.0)
