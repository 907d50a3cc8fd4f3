"""Every variant against the same promises: causal, cached equal to recomputed, resumable in shape. About 20 s."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import choices
import model as mixers
from model import (CARRY, MIXERS, Transformer, TransformerConfig, build_model, equal_ff_mult, initialise,
                   parameter_roles, parameter_rules)
from models.rope_scaling import scaled

T = 24
PATTERNS = [*MIXERS, "mamba,mamba,full", "window,full", "xl,mingru", "mla,diff", "strided,fixed", "compressive,window"]
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, init="xavier", positions="rope", window=6, sparse_stride=4,
             sparse_summary=1, memory_length=8, compressed_length=4, compression_rate=2)
CHUNKS = {"whole": [T], "chunks": [7, 1, 10, 6], "bytes": [1] * T}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mixer="full", seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, **settings})).eval()


def text(B=2, n=T, seed=1):
    return torch.randint(256, (B, n), generator=torch.Generator().manual_seed(seed))


def padded(lengths, n=T):
    return torch.tensor([[-1] * (n - length) + list(range(length)) for length in lengths])


@torch.no_grad()
def in_chunks(model, x, sizes, cache, positions=None, prefix=None):
    parts = x.split(sizes, 1)
    places = [None] * len(parts) if positions is None else positions.split(sizes, -1)
    return torch.cat([model(part, positions=p, cache=cache, prefix=prefix if i == 0 else None)
                      for i, (part, p) in enumerate(zip(parts, places))], 1)


# --- Caches ---

@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
@pytest.mark.parametrize("mixer", PATTERNS)
def test_cached_equals_recomputed(mixer, positions, chunks):
    model, x = build(mixer, positions=positions), text()
    with torch.no_grad():
        full = model(x)
    cache = model.new_cache(2, T)
    torch.testing.assert_close(in_chunks(model, x, CHUNKS[chunks], cache), full, atol=1e-5, rtol=1e-5)
    assert cache.length == T and all(layer.length == T for layer in cache.layers)
    assert cache.bytes == sum(layer.bytes for layer in cache.layers) > 0
    assert len(cache.log()) == 2 + 3 and (cache.layers[0].hits > 0) == (chunks != "whole")


@pytest.mark.parametrize("mixer", [m for m in PATTERNS if "mla" not in m])
def test_fewer_key_heads(mixer):
    model, x = build(mixer, n_kv_head=2), text()
    with torch.no_grad():
        cached = in_chunks(model, x, [7, 1, 16], model.new_cache(2, T))
        torch.testing.assert_close(cached, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("mixer", PATTERNS)
def test_ragged_rows_equal_each_row_alone(mixer, chunks):
    model, lengths = build(mixer), (T, 15, 3)
    x, places = text(3), padded(lengths)
    cached = in_chunks(model, x, CHUNKS[chunks], model.new_cache(3, T), places)
    with torch.no_grad():
        uncached = model(x, positions=places)
        assert uncached.isfinite().all() and cached.isfinite().all()
        for row, length in enumerate(lengths):
            alone = model(x[row:row + 1, T - length:])[0]
            torch.testing.assert_close(uncached[row, T - length:], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cached[row, T - length:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mixer", PATTERNS)
def test_fork_and_crop(mixer, ragged):
    model, x, y = build(mixer), text(), text(seed=5)
    places = padded((T, T - 4)) if ragged else None
    cache = model.new_cache(2, T, snapshots=3)
    cut = (lambda a, b: None) if places is None else lambda a, b: places[:, a:b]
    in_chunks(model, x[:, :9], [5, 4], cache, cut(0, 9))
    twin = cache.fork(2)
    in_chunks(model, x[:, 9:], [8, T - 17], cache, cut(9, T))
    cache.crop(9)
    assert cache.length == 9
    joined = torch.cat((x[:, :9], y[:, 9:]), 1)
    with torch.no_grad():
        full = model(joined, positions=places)[:, 9:]
    torch.testing.assert_close(in_chunks(model, y[:, 9:], [1, T - 10], cache, cut(9, T)), full, atol=1e-5, rtol=1e-5)
    more = None if places is None else places[:, 9:].repeat_interleave(2, 0)
    late = in_chunks(model, y[:, 9:].repeat_interleave(2, 0), [T - 9], twin, more)
    torch.testing.assert_close(late, full.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="holds 24"):
        cache.crop(T + 1)
    cache.reset()
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(model, x, [T], cache), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("snapshots", [1, 2])
def test_as_many_snapshots_are_kept_as_were_asked_for(snapshots):
    model, x = build("mingru"), text(1)
    cache = model.new_cache(1, T, snapshots=snapshots)
    for end in range(4, 21, 4):
        in_chunks(model, x[:, end - 4:end], [4], cache)
    kept = [16, 12][:snapshots]                           # before the last pass, and the one before it
    with pytest.raises(ValueError, match="snapshots at " + ", ".join(map(str, sorted(kept))) + " "):
        cache.crop(16 - 4 * snapshots)
    cache.crop(kept[-1])
    with torch.no_grad():
        late = in_chunks(model, x[:, kept[-1]:], [T - kept[-1]], cache)
        torch.testing.assert_close(late, model(x)[:, kept[-1]:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", PATTERNS)
def test_crop_where_nothing_was_kept(mixer):
    model, x = build(mixer), text(1)
    cache = model.new_cache(1, T)
    in_chunks(model, x[:, :20], [20], cache)
    if all(layer.croppable(13) for layer in cache.layers):
        cache.crop(13)
        with torch.no_grad():
            late = in_chunks(model, x[:, 13:], [T - 13], cache)
            torch.testing.assert_close(late, model(x)[:, 13:], atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="snapshots at none"):
            cache.crop(13)


@pytest.mark.parametrize("mixer", [m for m in PATTERNS if not any(kind in m for kind in CARRY)])
@pytest.mark.parametrize("ragged", [False, True])
def test_prefix_sees_itself_and_the_rest_is_causal(mixer, ragged):
    model, x = build(mixer, window=30, block_size=32, sparse_stride=8), text()
    places, prefix = (padded((T, T - 4)), torch.tensor([9, 6])) if ragged else (None, 9)
    with torch.no_grad():
        full, causal = model(x, positions=places, prefix=prefix), model(x, positions=places)
        assert (full - causal).abs()[:, 8].max() > 1e-3
        other = x.clone()
        other[:, 8] += 1 - 2 * (other[:, 8] > 0).long()  # the last byte of row 0's prefix
        assert not torch.equal(model(other, positions=places, prefix=prefix)[0, 0], full[0, 0])
        other = x.clone()
        other[:, 15] += 1 - 2 * (other[:, 15] > 0).long()
        assert torch.equal(model(other, positions=places, prefix=prefix)[:, :15], full[:, :15])
    for sizes in ([T], [10, 14], [12] + [1] * 12):
        cache = model.new_cache(2, T)
        torch.testing.assert_close(in_chunks(model, x, sizes, cache, places, prefix), full, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="prefix saw one another|saw one another"):
        cache.crop(3)
    with pytest.raises(ValueError, match="must come whole"):
        model(x[:, :4], cache=model.new_cache(2, T), prefix=9)


@pytest.mark.parametrize("mixer", CARRY)
def test_no_prefix_for_what_reads_from_left_to_right(mixer):
    with pytest.raises(ValueError, match="left to right"):
        build(mixer)(text(), prefix=3)


@pytest.mark.parametrize("mixer", PATTERNS)
def test_past_the_window_and_in_generation(mixer):
    """Far past block_size: the same logits after each byte with a cache and without."""
    model = build(mixer)
    for prompts in ([b"The "], [b"ab", b"abcdefgh", b"q"]):
        tokens = text(30, len(prompts), seed=7)
        torch.testing.assert_close(*(choices.followed(tokens, model, prompts, use_cache=use) for use in (True, False)),
                                   atol=1e-5, rtol=1e-5)


# --- Causality, rules, losses ---

@pytest.mark.parametrize("mixer", PATTERNS)
def test_causality(mixer):
    model, x = build(mixer), text()
    with torch.no_grad():
        full = model(x)
        for t in (0, 7, 16, T - 2):
            other = x.clone()
            other[:, t + 1:] = (x[:, t + 1:] + 1) % 256
            assert torch.equal(model(other)[:, :t + 1], full[:, :t + 1])
            assert not torch.equal(model(other)[:, t + 1:], full[:, t + 1:])


@pytest.mark.parametrize("init", ["gpt2", "normal", "xavier", "tfixup", "truncated", "zero"])
@pytest.mark.parametrize("mixer, ff", [*((m, "mlp") for m in PATTERNS), ("full", "low_rank"), ("full", "moe"),
                                       ("mla", "mlp,moe")])
def test_every_parameter_is_claimed_and_filled(mixer, ff, init):
    def drawn(seed):
        torch.manual_seed(seed)
        return Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, "ff": ff, "init": init, "n_embd": 64}))
    try:
        TransformerConfig(**{**SMALL, "mixer": mixer, "ff": ff, "init": init, "n_embd": 64})
    except ValueError as error:
        assert init == "tfixup" and "tfixup" in str(error)
        return
    model = drawn(0)
    assert set(parameter_rules(model)) == set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    for p in model.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(0)
    initialise(model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), drawn(0).parameters()))
    x = text(4, 32)
    objective, nats = model(x, text(4, 32, seed=2).unsqueeze(-1))
    assert abs(nats.item() - math.log(256)) < (0.5 if init in ("tfixup", "xavier", "truncated") else 0.1)
    objective.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("compress" in name or "ff." in name for name in silent), silent


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


@pytest.mark.parametrize("settings", [
    dict(residual_scale="rezero"), dict(residual_scale="layerscale"), dict(residual_scale="depth"), dict(ff="moe"),
    dict(mtp_depth=2), dict(dropout=0.2), dict(mixer="mamba"), dict(mixer="xl"), dict(mixer="compressive"),
    dict(mixer="mla", ff="mlp,moe", mtp_depth=1)], ids=str)
def test_checkpointing_changes_neither_losses_nor_gradients(settings):
    found = []
    for again in (False, True):
        model = build(checkpoint_activations=again, **settings).train()
        if isinstance(settings.get("residual_scale"), str):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)
        torch.manual_seed(9)
        x, y = text(2, 8), text(2, 8 * model.config.n_labels, seed=2).view(2, 8, -1)
        memory = model.new_memory(2) if model.config.carries else None
        for _ in range(2 if memory else 1):
            objective, nats = model(x, y, memory=memory)
        objective.backward()
        found.append((objective.detach(), nats, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


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


# --- Positions ---

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
    plain, (linear, one) = mixers.rope_frequencies(64, 1e4), scaled(64, 1e4, "linear", 4.0)
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
    plain = mixers.rope_frequencies(64, 1e4)
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


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("mixer", ["full", "mla", "window", "xl"])
def test_scaled_rope_keeps_the_cache(mixer, scaling):
    model, x = build(mixer, rope_scaling=scaling, rope_factor=2.0), text()
    with torch.no_grad():
        cached = in_chunks(model, x, [7, 1, 16], model.new_cache(2, T))
        torch.testing.assert_close(cached, model(x), atol=1e-5, rtol=1e-5)


# --- Equal parameters ---

@pytest.mark.parametrize("settings", [dict(mixer="mamba"), dict(mixer="mingru"), dict(mixer="mla"), dict(ff="low_rank"),
                                      dict(ff="moe"), dict(activation="swiglu"), dict(mixer="diff,full")], ids=str)
def test_equal_parameters(settings):
    base = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, positions="rope", norm="rms", bias=False)
    plain = Transformer(TransformerConfig(**base)).n_params()
    config = TransformerConfig(**{**base, **settings})
    found = Transformer(TransformerConfig(**{**base, **settings, "ff_mult": equal_ff_mult(config)})).n_params()
    assert abs(found / plain - 1) < 0.01


# --- Impossible settings ---

@pytest.mark.parametrize("settings, word", [
    (dict(mixer="full,lstm"), "mixer has 'lstm'"), (dict(ff="mlp,dense"), "ff has 'dense'"),
    (dict(mixer="xl", positions="learned"), "earlier segments"), (dict(positions="relative"), "Transformer-XL"),
    (dict(mixer="mamba", positions="learned"), "past block_size"), (dict(mixer="diff", n_kv_head=1), "pairs of heads"),
    (dict(mixer="mla", n_kv_head=2), "one latent for all heads"), (dict(mixer="mla", rope_dim=3), "rope_dim"),
    (dict(mixer="fixed", sparse_summary=9), "sparse_summary"),
    (dict(mixer="compressive", compression_rate=3), "divide"),
    (dict(ff="moe", expert_top_k=9), "expert_top_k"), (dict(ff="moe", n_shared_expert=8), "n_shared_expert"),
    (dict(ff="moe", activation="solu"), "solu"), (dict(init="tfixup", mixer="mamba"), "tfixup"),
    (dict(rope_ramp="index", rope_base=1.0), "rope_base"), (dict(rope_mscale_all_dim=-1.0), "rope_mscale_all_dim"),
    (dict(rope_scaling="yarn", positions="none"), "needs positions 'rope'"), (dict(rope_factor=0.5), "rope_factor"),
    (dict(residual_scale="learned"), "layerscale"), (dict(mtp_depth=1, mixer="xl"), "mtp_depth"),
    (dict(mixer="window", window=1), "at least 2"), (dict(mixer="mla", qk_norm=True), "qk_norm"),
])
def test_impossible_settings_are_one_sentence(settings, word):
    with pytest.raises(ValueError, match=word) as error:
        build(**settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in CARRY])
def test_no_memory_where_nothing_is_carried(mixer):
    with pytest.raises(ValueError, match="carries nothing"):
        build(mixer).new_memory(2)


# --- Memory: segments of training ---

MEMORIES = [("xl", "relative"), ("compressive", "relative"), ("compressive,xl", "alibi"), ("mamba,xl", "none"),
            *((m, "rope") for m in ("xl", "compressive", "mamba", "mingru", "compressive,mamba", "xl,window"))]


@pytest.mark.parametrize("sizes", [dict(), dict(memory_length=16, compressed_length=3),
                                   dict(memory_length=4, n_kv_head=2)], ids=str)
@pytest.mark.parametrize("mixer, positions", [pair for pair in MEMORIES if "window" not in pair[0]])
def test_segments_equal_one_long_pass(mixer, positions, sizes):
    """Training on a stream, segment by segment, sees what one pass over all of it sees, and what a cache sees."""
    model, x = build(mixer, positions=positions, n_layer=2, **sizes), text(2, 8 * 7)
    with torch.no_grad():
        full, memory = model(x), model.new_memory(2)
        for i, part in enumerate(x.split(8, 1)):
            torch.testing.assert_close(model(part, memory=memory), full[:, 8 * i:8 * i + 8], atol=1e-5, rtol=1e-5)
            assert memory.length == 8 * (i + 1)
        shown = in_chunks(model, x, [3, 20, 1, 1, 31], model.new_cache(2, 1))
    torch.testing.assert_close(shown, full, atol=1e-5, rtol=1e-5)


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


def test_memory_of_the_old_kind_is_not_gone_on_from(capsys):
    """Checkpoints of mixers' inputs have the same shapes: one line, and an empty memory; states are states as ever."""
    for mixer, said in (("xl", True), ("mamba", False), ("mamba,xl", True)):
        model, x = build(mixer), text(2, 8)
        memory, other = model.new_memory(2), model.new_memory(2)
        with torch.no_grad():
            model(x, memory=memory)
        other.load_state_dict({name: value for name, value in memory.state_dict().items() if name != "kind"})
        assert (other.length == 0) == said == (capsys.readouterr().out.count("\n") == 1)
        if said:
            assert all(not t.any() for held in other.layers for t in held)
        other.load_state_dict(memory.state_dict())
        assert other.length == 8 and not capsys.readouterr().out


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


@pytest.mark.parametrize("mixer, positions", MEMORIES)
def test_gradients_end_at_the_segment(mixer, positions):
    model = build(mixer, positions=positions, n_layer=2).train()
    memory, x, y = model.new_memory(2), text(2, 48), text(2, 48, seed=2)
    embeddings = []
    model.embed.register_hook(lambda g: embeddings.append(g))
    for i in range(6):
        part = slice(8 * i, 8 * i + 8)
        objective, _ = model(x[:, part], y[:, part, None], memory=memory)
        assert all(not t.requires_grad for held in memory.layers if held is not None for t in held)
    objective.backward()
    untouched = torch.ones(256, dtype=torch.bool)
    untouched[x[:, 40:].flatten()] = False
    assert embeddings[0][untouched].abs().max() == 0 and embeddings[0][~untouched].abs().max() > 0
    state = memory.state_dict()
    other = model.new_memory(2)
    other.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x[:, :8], memory=other), model(x[:, :8], memory=memory))
    with pytest.raises(ValueError, match="shapes"):
        model.new_memory(3).load_state_dict(state)
    memory.reset()
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :8], memory=memory), model(x[:, :8]))


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


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_memory_needs_whole_segments(positions):
    model = build("xl", positions=positions)
    memory = model.new_memory(2)
    with torch.no_grad():
        model(text(2, 5), memory=memory)
        with pytest.raises(ValueError, match="no whole number of segments"):
            model(text(2, 8), memory=memory)
        with pytest.raises(ValueError, match="whole segments of a stream"):
            model(text(2, 8), memory=model.new_memory(2), cache=model.new_cache(2, 8))


# --- Pyramid ---

def pyramid(k=3, n_layer=4, **settings):
    return build_pyramid(**{**SMALL, "shorten": k, "n_layer": n_layer, "block_size": 32, **settings})


def build_pyramid(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(TransformerConfig(**settings)).eval()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pyramid_is_causal_and_sees_all(k):
    model = pyramid(k)
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


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "none"])
@pytest.mark.parametrize("mixer", ["full", "window", "diff,mla", "strided"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_pyramid_cache(k, mixer, positions):
    model, x, y = pyramid(k, 5, mixer=mixer, positions=positions), text(), text(seed=4)
    with torch.no_grad():
        full = model(x)
        for sizes in CHUNKS.values():
            cache = model.new_cache(2, T)
            torch.testing.assert_close(in_chunks(model, x, sizes, cache), full, atol=1e-5, rtol=1e-5)
            assert cache.length == T and cache.middle.length == T // k and len(cache.log()) > 5
        twin = cache.fork(2)
        for cut in (17, 10) if "window" not in mixer else ():
            cache.crop(cut)
            late = in_chunks(model, y[:, cut:], [1, T - cut - 1], cache)
            wanted = model(torch.cat((x[:, :cut], y[:, cut:]), 1))[:, cut:]
            torch.testing.assert_close(late, wanted, atol=1e-5, rtol=1e-5)
            cache.reset()
            in_chunks(model, x, [T], cache)
        assert twin.length == T and twin.stream.size(0) == 4
        cache = model.new_cache(2, T, snapshots=2)        # a window forgets: back to where a pass began
        in_chunks(model, x, [11, T - 11], cache)
        cache.crop(11)
        wanted = model(torch.cat((x[:, :11], y[:, 11:]), 1))[:, 11:]
        torch.testing.assert_close(in_chunks(model, y[:, 11:], [T - 11], cache), wanted, atol=1e-5, rtol=1e-5)
    for prompts in ([b"The ", b"abcd"],):
        tokens = text(40, len(prompts), seed=7)
        torch.testing.assert_close(*(choices.followed(tokens, model, prompts, use_cache=use) for use in (True, False)),
                                   atol=1e-5, rtol=1e-5)


def test_pyramid_trains_and_refuses():
    model, x = pyramid(2, init="gpt2").train(), text(4, 32)
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
                       (lambda: pyramid(2, mixer="xl"), "starts afresh"),
                       (lambda: pyramid(2, n_layer=2), "at least 3")):
        with pytest.raises(ValueError, match=word):
            call()
