"""Positions, memories of segments, multi-token prediction and the pyramid, by their formulas and known values."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import model as room
from model import Transformer, TransformerConfig
from models.rope_scaling import scaled
from variants import SMALL, build, padded, text

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_multi_token_prediction():
    """Module d predicts the byte d + 1 ahead from the stream and byte d; dropped at inference; causal."""
    model = build(mtp_depth=2, mtp_weight=0.6)
    x, y = text(2, 8), text(2, 10, seed=2).unfold(1, 3, 1)  # (2, 8, 3)
    objective, nats = model(x, y)
    states = []
    hook = model.blocks[-1].register_forward_hook(lambda m, i, o: states.append(o))
    plain = model(x)
    hook.remove()
    places, h, wanted = model.place(x, None), states[0], 0.0
    for d in (1, 2):
        module = model.mtp[d - 1]
        joined = torch.cat((module.norm1(h), module.norm2(model.embed[y[..., d - 1]])), -1)
        h = module.block(module.join(joined), places)
        wanted = wanted + 0.3 * F.cross_entropy((model.norm(h) @ model.heads[0].T).transpose(1, 2), y[..., d])
    torch.testing.assert_close(model.extras["mtp"], wanted)
    torch.testing.assert_close(objective, nats[0, 0] + wanted)
    small = model.for_inference()
    assert torch.equal(small(x), plain) and not small.mtp and small.config.n_labels == 1


def test_alibi_by_hand():
    model, x = build(positions="alibi", n_layer=1), text(1, 8)
    mixer, h = model.blocks[0].mixer, torch.randn(1, 8, 32)
    q, k, v = mixer.qkv(h).view(1, 8, 12, 8).transpose(1, 2).split(4, 1)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    slopes = torch.tensor([2 ** -2.0, 2 ** -4.0, 2 ** -6.0, 2 ** -8.0]).view(4, 1, 1)
    scores = (q @ k.transpose(2, 3) / 8 ** 0.5 - slopes * distance).masked_fill(distance < 0, -math.inf)
    wanted = mixer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 8, 32))
    torch.testing.assert_close(mixer(h, model.place(x, None)), wanted)


def test_rope_scalings():
    plain, (linear, one) = room.rope_frequencies(64, 1e4), scaled(64, 1e4, "linear", 4.0)
    ntk, _ = scaled(64, 1e4, "ntk", 4.0)
    yarn, magnitude = scaled(64, 1e4, "yarn", 4.0, 512)
    assert one == 1 and torch.equal(linear, plain / 4)
    torch.testing.assert_close(ntk[[0, -1]], torch.stack((plain[0], plain[-1] / 4)))
    turns = 512 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 32], plain[turns > 32])
    torch.testing.assert_close(yarn[turns < 1], plain[turns < 1] / 4)
    assert (yarn[1:] < yarn[:-1]).all() and magnitude == pytest.approx(0.1 * math.log(4) + 1)
    for scaling, factor in itertools.product(("linear", "ntk", "yarn"), (1.0,)):
        torch.testing.assert_close(scaled(64, 1e4, scaling, factor)[0], plain)


def test_yarn_by_index_is_the_published_formula():
    """Written out for the numbers of DeepSeek-V3 (64 dimensions, 4,096 positions times 40): pairs 0 to 10 stay, those
    from 23 on are divided by 40, a line by index between; by turns, the paper's ramp, other pairs lie between."""
    plain = room.rope_frequencies(64, 1e4)
    found, magnitude = scaled(64, 1e4, "yarn", 40.0, 4096, "index", 0.707)
    for i in range(32):
        stretched = min(1.0, max(0.0, (i - 10) / (23 - 10)))
        assert found[i].item() == pytest.approx((stretched / 40 + 1 - stretched) * plain[i].item(), rel=1e-12)
    assert magnitude == pytest.approx(0.0707 * math.log(40) + 1)
    assert (scaled(64, 1e4, "yarn", 40.0, 4096)[0] / found - 1).abs().max() > 0.1


@pytest.mark.parametrize("mscale, all_dim", [(1.0, 1.0), (0.707, 0.707), (1.0, 0.0), (1.0, 0.5)])
def test_yarn_in_mla_is_deepseeks(mscale, all_dim):
    """Theirs: tables times m(mscale) / m(all_dim), the whole score times m(all_dim)^2, m(s) = 0.1 s ln(factor) + 1."""
    model = build("mla", n_layer=1, rope_scaling="yarn", rope_factor=4.0, rope_mscale=mscale,
                  rope_mscale_all_dim=all_dim).double()
    mixer, x, (H, D, R, rank) = model.blocks[0].mixer, text(1, 20), (4, 8, 4, 16)
    h = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    places, grown = model.place(x, None), [0.1 * s * math.log(4) + 1 for s in (mscale, all_dim)]
    cos, sin = (t.double() / grown[0] * (grown[0] / grown[1]) for t in places.tables[R])
    with torch.no_grad():
        found = mixer(h, places)
        q = mixer.q(h).view(1, 20, H, D + R)
        latent, key = mixer.kv(h).split((rank, R), -1)
        k, v = mixer.up(mixer.kv_norm(latent)).view(1, 20, 2, H, D).unbind(2)

        def turned(t):
            return t * cos + torch.cat(t.chunk(2, -1)[::-1], -1) * sin
        scores = torch.einsum("bthd,bshd->bhts", q[..., :D], k)
        scores += torch.einsum("bthd,bsd->bhts", turned(q[..., D:]), turned(key.unsqueeze(2))[:, :, 0])
        scores *= (D + R) ** -0.5 * grown[1] ** 2
        scores.masked_fill_(~torch.ones(20, 20, dtype=torch.bool).tril(), -math.inf)
        wanted = mixer.out(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mixer, short_conv", [
    ("xl", 0), ("xl", 3), ("compressive", 0), ("compressive", 3), ("mamba", 3)])
def test_memory_is_hidden_states_under_the_weights_of_today(mixer, short_conv, norm):
    """Dai et al. 2019: what is remembered is projected anew. In a first layer hidden states are embeddings: once the
    weights between these and the memory have changed, a segment sees what one long pass with the new ones sees."""
    model, x = build(mixer, n_layer=1, short_conv=short_conv, norm=norm), text(2, 8 * 5)
    block, memory = model.blocks[0], model.new_memory(2)
    changed = [*block.norm1.parameters()] + ([block.mixer.qkv.weight] if mixer != "mamba" else [])
    changed += [block.conv.kernel] if short_conv and mixer != "mamba" else []
    with torch.no_grad():
        for i, part in enumerate(x.split(8, 1)):
            if mixer == "mamba":  # the state as one long pass has it, the convolution's memory as it was kept
                fresh = model.new_memory(2)
                for before in x.split(8, 1)[:i]:
                    model(before, memory=fresh)
                memory.layers[0] = fresh.layers[0]
            torch.testing.assert_close(model(part, memory=memory), model(x[:, :8 * i + 8])[:, 8 * i:], atol=1e-5,
                                       rtol=1e-5)
            for p in changed:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def by_definition(model, x):
    """One-layer compressive or XL attention, query by query, in float64, from the definition; positions "none"."""
    c, mixer = model.config, model.blocks[0].mixer
    D, L, M, rate = c.head_dim, c.block_size, c.memory_length, c.compression_rate
    q, k, v = mixer.qkv(x).view(-1, 3, c.n_head, D).unbind(1)  # (N, H, D)
    out = []
    for t in range(len(x)):
        low = max(0, t // L * L - M)
        keys, values = [k[low:t + 1]], [v[low:t + 1]]
        if model.config.mixer == "compressive":
            for j in range(max(0, low // rate - c.compressed_length), low // rate):
                slot = mixer.compress_weight @ x[j * rate:(j + 1) * rate].flatten()
                _, slot_k, slot_v = mixer.qkv(slot).view(3, 1, c.n_head, D)
                keys.append(slot_k), values.append(slot_v)
        keys, values = torch.cat(keys), torch.cat(values)
        p = (torch.einsum("hd,shd->hs", q[t], keys) / D ** 0.5).softmax(-1)
        out.append(mixer.out(torch.einsum("hs,shd->hd", p, values).flatten()))
    return torch.stack(out)


@pytest.mark.parametrize("mixer", ["xl", "compressive"])
def test_memories_by_definition(mixer):
    model = build(mixer, n_layer=1, positions="none", memory_length=4, compressed_length=3).double()
    x = torch.randn(1, 50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model.blocks[0].mixer(x, model.place(torch.zeros(1, 50), None))
        torch.testing.assert_close(found[0], by_definition(model, x[0]))


def test_relative_positions_by_definition():
    """Dai et al. 2019, section 3.3: content and position terms, with u and v, over the sinusoid of the distance."""
    model = build("xl", n_layer=1, positions="relative", memory_length=4, n_head=2).double()
    mixer = model.blocks[0].mixer
    x = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for p in (mixer.bias_u, mixer.bias_v):
            p.normal_(generator=torch.Generator().manual_seed(3))
        found = mixer(x[None], model.place(torch.zeros(1, 20), None))[0]
        q, k, v = mixer.qkv(x).view(-1, 3, 2, 16).unbind(1)
        for t in range(20):
            first, scores = max(0, t // 8 * 8 - 4), []
            for s in range(first, t + 1):
                angle = (t - s) * 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
                r = mixer.into(torch.cat((angle.sin(), angle.cos()))).view(2, 16)
                scores.append((((q[t] + mixer.bias_u) * k[s]).sum(1) + ((q[t] + mixer.bias_v) * r).sum(1)) / 4)
            p = torch.stack(scores).softmax(0)  # (S, H)
            wanted = mixer.out(torch.einsum("sh,shd->hd", p, v[first:t + 1]).flatten())
            torch.testing.assert_close(found[t], wanted, atol=1e-6, rtol=1e-5)


def test_compression_learns_from_its_own_loss_alone():
    model = build("compressive", n_layer=1, compression_weight=1.0).train()
    x, y = text(4, 8 * 12), text(4, 8 * 12, seed=2)
    optimizer, found = torch.optim.Adam([model.blocks[0].mixer.compress_weight], 3e-3), []
    for _ in range(6):
        memory = model.new_memory(4)
        for i in range(12):
            part = slice(8 * i, 8 * i + 8)
            objective, nats = model(x[:, part], y[:, part, None], memory=memory)
            if i < 1:
                assert not model.extras
                continue
            loss = model.extras["compression"]
            torch.testing.assert_close(objective.detach(), nats[0, 0] + loss)
            model.zero_grad()
            objective.backward()
            with_loss = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            found.append(loss.item())
    assert 0 < sum(found[-11:]) < 0.8 * sum(found[:11])
    model.zero_grad()
    model.config.compression_weight = 0.0
    memory = model.new_memory(4)
    for i in range(2):
        objective, _ = model(x[:, 8 * i:8 * i + 8], y[:, 8 * i:8 * i + 8, None], memory=memory)
    objective.backward()
    assert model.blocks[0].mixer.compress_weight.grad.abs().max() == 0  # the network's loss does not reach it
    assert with_loss["blocks.0.mixer.compress_weight"].abs().max() > 0


def test_experts_of_multi_token_prediction_have_loads_of_their_own():
    """By the last layer's number they moved that layer's biases, and its loads were nowhere."""
    model = build(n_layer=2, mtp_depth=2, ff="mlp,moe", n_expert=4, expert_balance="bias").train()
    experts = [model.blocks[1].ff, *(module.block.ff for module in model.mtp)]
    seen = [[] for _ in experts]
    for ff, found in zip(experts, seen):
        ff.register_forward_pre_hook(lambda m, given, found=found: found.append(given[0].flatten(0, 1)))
    model(text(2, 8), text(2, 10, seed=2).unfold(1, 3, 1))
    wanted = [torch.bincount(ff.route(x)[0].flatten(), minlength=4) for ff, (x,) in zip(experts, seen)]
    torch.testing.assert_close(model.usage, dict(enumerate(wanted, 1)))
    model.usage = {1: torch.tensor([9, 1, 1, 1])}
    model.balance_experts()
    assert experts[0].correction.any() and not any(ff.correction.any() for ff in experts[1:])


def test_targets_of_minus_one_do_not_count():
    model, x, y = build(), text(2, 8), text(2, 8, seed=2).unsqueeze(-1)
    some = y.clone()
    some[0, 3:] = -1
    nats = F.cross_entropy(model(x).transpose(1, 2), some[..., 0], ignore_index=-1)
    torch.testing.assert_close(model(x, some)[1][0, 0], nats.detach())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pyramid_is_causal_and_sees_all(k):
    model = build(shorten=k, n_layer=4, block_size=32)
    for n in range(1, 21):
        x = text(1, n)
        with torch.no_grad():
            full = model(x)
            for t in range(n - 1):
                other = x.clone()
                other[:, t + 1:] = (x[:, t + 1:] + 1) % 256
                assert torch.equal(model(other)[:, :t + 1], full[:, :t + 1])
                first = x.clone()
                first[:, t] = (x[:, t] + 1) % 256
                assert not torch.equal(model(first)[:, -1], full[:, -1])


def test_pyramid_trains_and_refuses():
    model, x = build(shorten=2, n_layer=4, block_size=32, init="gpt2").train(), text(4, 32)
    y = torch.cat((x[:, 1:], x[:, :1]), 1).unsqueeze(-1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    assert abs(model(x, y)[1].item() - math.log(256)) < 0.1
    for _ in range(120):
        objective, nats = model(x, y)
        optimizer.zero_grad()
        objective.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert nats.item() < 1
    assert model.flops_per_token(32) < Transformer(TransformerConfig(**{**SMALL, "n_layer": 4})).flops_per_token(32)
    for call, word in ((lambda: model.new_cache(1, 8, window=4), "does not slide"),
                       (lambda: model(x, positions=padded((32, 30, 20, 32), 32)), "stand alike"),
                       (lambda: build(shorten=2, n_layer=4, mixer="xl"), "starts afresh"),
                       (lambda: build(shorten=2, n_layer=2), "at least 3")):
        with pytest.raises(ValueError, match=word):
            call()
