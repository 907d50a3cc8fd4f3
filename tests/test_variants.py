"""Every variant against the same promises: what is cached equals what is recomputed, whole, in chunks, token by token,
in ragged rows, after fork and crop, past the window, by segments, in other types; causal; weights go through a state
dict; impossible settings are refused in one line. The variants: variants.py; single caches: test_cache.py."""
import copy
import itertools
import math

import pytest
import torch

import choices
from model import (CARRY, MIXERS, NEEDS, RECURRENT, TransformerConfig, build_model, equal_ff_mult, fused_rows,
                   initialise, parameter_roles)
from nanolab.dialog_tree import DialogTree
from nanolab.settings import as_bytes
from variants import CHUNKS, END, VARIANTS, T, build, close, each, in_chunks, made, padded, text, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(held):
    """All floating tensors that a layer's cache holds."""
    if torch.is_tensor(held):
        return [held] if held.is_floating_point() else []
    parts = held if isinstance(held, (list, tuple)) else held.values() if isinstance(held, dict) else \
        vars(held).values() if hasattr(held, "__dict__") and not callable(held) else ()
    return [t for part in parts for t in tensors(part)]


def alike(model, found, wanted, bf16=False):
    """Bit for bit, but where the size of an expert's batch, which later bytes change, decides how sums are rounded."""
    if "moe" in model.config.ffs:
        return torch.allclose(found, wanted, atol=0.05 if bf16 else 1e-5)
    return torch.equal(found, wanted)


def ragged(config):
    return config.shorten == 1


def kept(config):
    """What decides of which positions a cache keeps something, and what."""
    return config.mixers, config.short_conv, config.positions, config.documents


def real_rows(lengths, n):
    """(positions, which of them are real) of rows padded on the left; of None: rows that stand alike."""
    if lengths is None:
        return None, torch.ones(2, n, dtype=torch.bool)
    places = padded(lengths, n)
    return places, places >= 0


# --- Cached equals recomputed ---

@each()
def test_cached_equals_recomputed(name):
    """Also of ragged rows, and of full attention limited to 8 positions, far past them: as one banded pass, in storage
    that does not grow; a window of 6 stays 6."""
    model, x = made(name), text()
    slides = model.config.rolls and not {*model.config.mixers} & {"xl", "compressive"}
    for window, lengths in [(None, None), *([(8, None), (8, (T, 15))] if slides else [(None, (T, 15))])]:
        if lengths and not ragged(model.config):
            continue
        places, real = real_rows(lengths, T)
        full, cache = whole(model, x, positions=places, window=window), model.new_cache(2, window or T, window=window)
        assert {*model.config.mixers} != {"window"} or torch.equal(full, whole(model, x, positions=places))
        size, layer = cache.bytes, cache.layers[0]
        for sizes in CHUNKS.values():
            cache.reset()
            hits = layer.hits
            close(in_chunks(model, x, sizes, cache, places)[real], full[real])
            starts = [0, *itertools.accumulate(sizes)][:-1]
            assert layer.hits - hits == sum(min(s, layer.window - 1) if layer.window else s for s in starts)
            assert lengths or cache.bytes == size or "compressive" in model.config.mixers
    shorter = T // model.config.shorten
    assert cache.length == T and {layer.length for layer in cache.layers} == {T, shorter}
    streams = cache.stream.nbytes + cache.lifted.nbytes if model.config.shorten > 1 else 0
    assert cache.bytes == sum(layer.bytes for layer in cache.layers) + streams
    assert len(cache.log()) == 2 + len(cache.layers) + (model.config.shorten > 1)


@each(ragged)
def test_ragged_rows_equal_each_row_alone(name):
    """And each goes on after its own last position where none are given; without a cache padding may be anywhere."""
    model, lengths, x = made(name), (T, 15, 3), text(3, T + 3)
    places = padded(lengths)
    uncached = whole(model, x[:, :T], positions=places)
    assert uncached.isfinite().all()
    cache = model.new_cache(3, T + 3)
    cached = torch.cat((in_chunks(model, x[:, :T], [7, 1, 10, 6], cache, places),
                        in_chunks(model, x[:, T:], [1, 2], cache)), 1)
    for row, n in enumerate(lengths):
        alone = whole(model, x[row:row + 1, T - n:])[0]
        close(uncached[row, T - n:], alone[:n])
        close(cached[row, T - n:], alone)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, -1, -1, 2, -1, 3, 4], [-1, 0, 1, 2, -1, 3, -1, -1]])
    found = whole(model, x[:, :8], positions=places)
    for row, real in enumerate(places >= 0):
        close(found[row, real], whole(model, x[row:row + 1, :8][:, real])[0])


@each()
def test_fork_and_crop(name):
    """Back to where a pass began, with twins that go on by themselves; also to before rows became ragged."""
    model, x, y = made(name), text(), text(2, T, seed=5)
    for rows in ("ragged", "ragged later") if ragged(model.config) else ("alike",):
        times = torch.tensor([0, 3]) if rows == "ragged" else 2
        places = padded((T, T - 4)) if rows == "ragged" else None
        cut = (lambda a, b: None) if places is None else lambda a, b: places[:, a:b]
        cache, late = model.new_cache(2, T, snapshots=3), cut(9, T)
        in_chunks(model, x[:, :9], [5, 4], cache, cut(0, 9))
        twin = cache.fork(times)
        in_chunks(model, x[:, 9:], [8, T - 17], cache, torch.arange(9, T).repeat(2, 1) if "later" in rows else late)
        cache.crop(9)
        assert cache.length == 9 and twin.length == 9
        full = whole(model, torch.cat((x[:, :9], y[:, 9:]), 1), positions=places)[:, 9:]
        close(in_chunks(model, y[:, 9:], [1, T - 10], cache, late), full)
        more = None if late is None else late.repeat_interleave(times, 0)
        again = y[:, 9:].repeat_interleave(times, 0)
        assert {layer.batch_size for layer in twin.layers} == {len(again)}
        close(in_chunks(model, again, [T - 9], twin, more), full.repeat_interleave(times, 0))
        with pytest.raises(ValueError, match="holds 24"):
            cache.crop(T + 1)
        cache.crop(0)
        assert not cache.ragged
        close(in_chunks(model, x, [T], cache), whole(model, x))


@each()
def test_crop_where_nothing_was_kept(name):
    """Either the cache still knows what it needs, or it says that it does not; inputs of a short convolution are kept
    as long as keys."""
    model, x, y, allowed = made(name), text(1, 20), text(1, T, seed=5), []
    for length in (1, 14, 19):
        cache = model.new_cache(1, T)
        in_chunks(model, x, [13] + [1] * 7, cache)
        if all(layer.croppable(length) for layer in cache.layers):
            allowed.append(length)
            cache.crop(length)
            late = in_chunks(model, y[:, length:], [1, T - length - 1], cache)
            close(late, whole(model, torch.cat((x[:, :length], y[:, length:]), 1))[:, length:])
        else:
            with pytest.raises(ValueError, match="snapshots at none"):
                cache.crop(length)
    kinds = set(model.config.mixers)
    states = kinds & {"mamba", "mingru", "compressive"} or model.config.documents != "none"
    assert not allowed if states else allowed if "window" in kinds else len(allowed) == 3


@each(alike=kept)
def test_past_the_window_and_in_generation(name):
    """Past block_size, rows of unequal length: the same logits after each token with a cache and without."""
    model = made(name)
    prompts = [b"ab", b"abc%bfgh" % as_bytes(END), b"q"] if ragged(model.config) else [b"The ", b"abcd"]
    tokens = text(12, len(prompts), seed=7)
    close(*(choices.followed(tokens, model, prompts, use_cache=use) for use in (True, False)))


@each(lambda config: ragged(config) and not config.carries and config.documents == "none")
def test_prefix_sees_itself_and_the_rest_is_causal(name):
    model, x = build(**{"block_size": 48, **VARIANTS[name], "window": 30, "sparse_stride": 8}), text()
    for lengths, prefix in ((None, 9), ((T, T - 4), torch.tensor([9, 6]))):
        places, real = real_rows(lengths, T)
        how = dict(positions=places, prefix=prefix)
        full, causal = whole(model, x, **how), whole(model, x, positions=places)
        assert (full - causal).abs()[:, 8].max() > 1e-3
        for place, seen in ((8, True), (9, False), (15, False)):    # the last byte of row 0's prefix, later ones
            other = x.clone()
            other[:, place] += 1 - 2 * (x[:, place] > 0).long()
            found = whole(model, other, **how)
            assert torch.equal(found[0, 0], full[0, 0]) != seen
            assert seen or alike(model, found[0, :place], full[0, :place])
        for sizes in ([T], [12] + [1] * 12):
            cache = model.new_cache(2, T)
            close(in_chunks(model, x, sizes, cache, places, prefix=prefix)[real], full[real])
        with pytest.raises(ValueError, match="saw one another"):
            cache.crop(3)
        with pytest.raises(ValueError, match="must come whole"):
            model(x[:, :4], cache=model.new_cache(2, T), prefix=9)


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 0.15), (torch.float64, 1e-5)])
@each()
def test_caches_take_the_type_of_the_model(name, dtype, near):
    """In chunks, after fork and crop, by segments; states are float32 at least."""
    model, x = copy.deepcopy(made(name)).to(dtype), text()
    full, cache, found = whole(model, x), model.new_cache(2, T, snapshots=2), []
    for part in x.split([11, 1, 1, 5, 6], 1):
        twin = cache.fork()
        found.append(in_chunks(model, part, [part.size(1)], cache))
    close(torch.cat(found, 1).double(), full.double(), near)
    cache.crop(18)
    for again in (cache, twin):
        close(in_chunks(model, x[:, 18:], [6], again), found[-1], near)
    kept = {torch.promote_types(dtype, torch.float32) if layer.kind == "state" else dtype for layer in cache.layers
            if tensors(layer)}
    assert {t.dtype for layer in cache.layers for t in tensors(layer)} == kept


@torch.no_grad()
def turn(model, tree, tokens, **how):
    """Tokens beyond what the tree knows, equal to a pass over all of them; how many it knew."""
    with tree.lock(tokens) as prefix:
        cache = tree.take(prefix, 64)
        if prefix.length < len(tokens):
            found = model(tokens[None, prefix.length:], cache=cache)[0]
            close(found, model(tokens[None], **how)[0, prefix.length:])
        assert tree.put(tokens, cache) == len(tokens)
    return prefix.length


@each(ragged, alike=kept)
def test_dialogs(name):
    """Forked, in batches of many lengths and put again; a short convolution changes neither where a dialog goes on nor
    what it says."""
    model, plain = made(name), VARIANTS[name].get("short_conv") and build(**{**VARIANTS[name], "short_conv": 0})
    base = text(1, 20)[0]
    near = torch.cat((base, text(1, 9, seed=2)[0]))
    dialogs = [base, near, torch.cat((base, text(1, 5, seed=3)[0])), text(1, 2, seed=6)[0],
               torch.cat((near[:25], text(1, 4, seed=7)[0])), near]
    tree = DialogTree(model, budget=None)
    known = [turn(model, tree, d) for d in dialogs]
    if plain:
        other = DialogTree(plain, budget=None)
        assert known == [turn(plain, other, d) for d in dialogs]
    befores = near, dialogs[3], base[:0], base
    locks = [tree.lock(d) for d in befores]
    cache, y = tree.take(locks, 40), text(4, 5, seed=9)
    logits = in_chunks(model, y, [1, 3, 1], cache)
    for row, before in enumerate(befores):
        late = torch.cat((before, y[row]))
        close(logits[row], whole(model, late[None])[0, -5:])
        assert tree.put(late, cache, row) == len(late)
    for lock in locks:
        lock.unlock()


# --- Causal ---

@each()
def test_causality(name):
    """Bit for bit, with and without bfloat16 and its attention by hand; and the last byte sees the first, where it is
    not too far back, and of its document."""
    model, x = made(name), text()
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.set_grad_enabled(bf16):
            full = model(x).detach()
            assert full.dtype == (torch.float64 if model.config.output == "stablemax" else torch.float32)
            for t in (0, 7, T - 2):
                other = x.clone()
                other[:, t + 1:] = (x[:, t + 1:] + 1) % 256
                found = model(other).detach()
                assert alike(model, found[:, :t + 1], full[:, :t + 1], bf16)
                assert not torch.equal(found[:, t + 1:], full[:, t + 1:])
    if (model.config.receptive_field(T) or T) >= T:
        first = torch.cat(((x[:, :1] + 1) % 256, x[:, 1:]), 1)
        seen = (whole(model, first) != whole(model, x))[:, -1].any(-1)
        assert seen.tolist() == [model.config.documents == "none", True]


def test_receptive_field():
    base = dict(mixer="window", n_layer=3, window=6, positions="none")
    assert [build(short_conv=w, **base).config.receptive_field(8) for w in (0, 2, 5)] == [18, 21, 30]
    assert build("mamba,full").config.receptive_field(8) is None
    model, x = build(short_conv=5, **base), text(1, 40)
    full = whole(model, x)[0, -1]
    reach = 3 * 5 + 3 * 4
    for back, moved in ((reach, True), (reach + 1, False), (30, False)):
        other = x.clone()
        other[0, 39 - back] = (x[0, 39 - back] + 1) % 256
        assert torch.equal(whole(model, other)[0, -1], full) != moved


# --- Documents ---

ALONE = [kind for kind in MIXERS if kind not in ("xl", "compressive")]
PACKED = [dict(mixer=",".join(ALONE[i:i + 3]), **more) for i in range(0, len(ALONE), 3)
          for more in ({}, dict(positions="alibi", short_conv=4))]
PACKED += [dict(positions=word, block_size=48, mixer=kind) for word in ("learned", "learned_per_layer")
           for kind in ("full", "diff,mla")] + [dict(positions="none", n_kv_head=2, attention="manual")]


def documents(row, end):
    """[(first, last + 1)] of the documents of a row (T,), byte by byte."""
    cuts = [i for i in range(len(end), len(row)) if row[i - len(end):i].tolist() == end]
    return list(zip([0, *cuts], [*cuts, len(row)]))


@pytest.mark.parametrize("settings", PACKED, ids=str)
@pytest.mark.parametrize("how", ["mask", "reset"])
def test_a_document_is_read_as_if_it_were_alone(how, settings):
    """By the model that knows of no documents, at its own positions, or from 0; packed in a row, in chunks, in padded
    rows whose padding looks like ends."""
    settings = {"mixer": "full", **settings}
    if how == "reset":
        settings["mixer"] = settings["mixer"].replace("fixed", "full")
    model, plain = build(**settings, documents=how, document_end="\\1\\x01"), build(**settings)
    x, lengths, n = torch.randint(3, (3, 40), generator=torch.Generator().manual_seed(11)), (40, 26, 2), 0
    places = padded(lengths, 40)
    full, x = whole(model, x), x.masked_fill(places < 0, 1)
    ragged = whole(model, x, positions=places)
    for row, length in enumerate(lengths):
        line = x[row:row + 1, 40 - length:]
        for a, b in documents(line[0], [1, 1]):
            n += 1
            alone = whole(plain, line[:, a:b], positions=torch.arange(a, b) if how == "mask" else None)[0]
            close(ragged[row, 40 - length:][a:b], alone)
            row or close(full[row, a:b], alone)
    assert n > 12
    for sizes in ([7, 1, 12, 14, 6], [1] * 40):
        close(in_chunks(model, x, sizes, model.new_cache(3, 40), places)[places >= 0], ragged[places >= 0])
        close(in_chunks(model, x[:1], sizes, model.new_cache(1, 40)), full[:1])
    for said, given in (("left to right", dict(prefix=3)),
                        ("never fall", dict(positions=places.flip(1), cache=model.new_cache(3, 40)))):
        with pytest.raises(ValueError, match=said):
            model(x, **given)


@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_no_gradient_leaves_a_document(settings):
    model = build(**settings, documents="mask", document_end="\\1\\x02").train()
    own, x = (torch.arange(10, 19), torch.arange(19, 30)), torch.cat((torch.arange(10, 19), torch.tensor([1, 2]),
                                                                      torch.arange(19, 30)))[None]
    for this, other, of in (*own, slice(0, 11)), (*own[::-1], slice(11, None)):
        y = torch.full_like(x, -1)
        y[:, of] = 5
        model.zero_grad()
        model(x, y[..., None])[0].backward()
        assert model.embed.grad[this].abs().amax(1).min() > 0 and model.embed.grad[other].abs().max() == 0


def test_a_document_may_be_older_than_its_segment():
    """Where states go on and attention sees its segment, restarted positions are as good: rope knows distances."""
    x, found = torch.randint(3, (2, 48), generator=torch.Generator().manual_seed(11)), []
    for how in ("mask", "reset"):
        model = build(mixer="mingru,full", positions="rope", documents=how, document_end="\\1\\x01")
        memory = model.new_memory(2)
        found.append(torch.cat([whole(model, part, memory=memory) for part in x.split(8, 1)], 1))
    close(*found)


# --- Segments of training ---

@each(lambda config: {*config.mixers} <= {*CARRY})
def test_segments_equal_one_long_pass(name):
    """Training on a stream, segment by segment, sees what one pass over all of it sees; states alone may be of any
    length, shorter than a convolution too; a memory goes through its state dict, refuses other shapes, forgets on
    reset."""
    uneven = [[1, 2, 1, 44]] if {*made(name).config.mixers} <= {*RECURRENT} else []
    for sizes in (dict(), dict(memory_length=16, compressed_length=3), dict(memory_length=4)):
        model, x = build(**{**VARIANTS[name], **sizes}), text(2, 48)
        full = whole(model, x)
        for lengths in [[8] * 6, *uneven]:
            memory = model.new_memory(2)
            close(torch.cat([whole(model, part, memory=memory) for part in x.split(lengths, 1)], 1), full)
            assert memory.length == 48
        close(in_chunks(model, x, [3, 20, 1, 1, 23], model.new_cache(2, 1)), full)
    other = model.new_memory(2)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(whole(model, x[:, :8], memory=other), whole(model, x[:, :8], memory=memory))
    with pytest.raises(ValueError, match="shapes"):
        model.new_memory(3).load_state_dict(memory.state_dict())
    memory.reset()
    close(whole(model, x[:, :8], memory=memory), full[:, :8])


@each(lambda config: config.carries)
def test_gradients_end_at_the_segment(name):
    model = copy.deepcopy(made(name)).train()
    memory, x, y, embeddings = model.new_memory(2), text(2, 32), text(2, 32, seed=2), []
    model.embed.register_hook(embeddings.append)
    for part in (slice(i, i + 8) for i in range(0, 32, 8)):
        objective, _ = model(x[:, part], y[:, part, None], memory=memory)
        assert all(not t.requires_grad for held in memory.layers for t in held)
    objective.backward()
    untouched = torch.ones(256, dtype=torch.bool)
    untouched[x[:, 24:].flatten()] = False
    assert embeddings[0][untouched].abs().max() == 0 and embeddings[0][~untouched].abs().max() > 0


# --- Parameters ---

def losses_with_gradients(model):
    """Of two passes where something is carried on, else of one, with dropout from one seed."""
    c, x = model.train().config, text(2, 8)
    y, memory = text(2, 8 * c.n_labels, seed=2).view(2, 8, -1), model.new_memory(2) if c.carries else None
    torch.manual_seed(9)
    for _ in range(2 if memory else 1):
        objective, nats = model(x, y, memory=memory)
    objective.backward()
    return objective.detach(), nats, [p.grad for p in model.parameters()]


@each()
def test_parameters(name):
    """Each is claimed by one rule, filled by `initialise` from the seed alone, and goes through a state dict; matrix
    products are counted; computing layers again changes neither losses nor gradients; the loss at first is uniform."""
    model = build(**VARIANTS[name])
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert set(roles.values()) <= {"embedding", "position", "matrix", "residual", "head", "gain", "bias"}
    assert all(sum(rows) == model.get_parameter(place).size(0) for place, rows in fused_rows(model).items())
    for p in model.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(0)
    initialise(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), made(name).parameters()))
    hidden = sum(p.numel() for p in (m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)))
    if model.config.shorten == 1:
        mixing = 3 * sum(m.flops(8) for m in model.modules() if hasattr(m, "flops"))
        assert model.flops_per_token(8) == 6 * (hidden + 256 * 32 * (1 + model.config.mtp_depth)) + mixing
    twin = build(seed=1, **{**VARIANTS[name], "checkpoint_activations": True})
    twin.load_state_dict(model.state_dict())
    assert torch.equal(whole(twin, text()), whole(model, text()))
    found = losses_with_gradients(model)
    torch.testing.assert_close(found, losses_with_gradients(twin), atol=1e-6, rtol=1e-5)
    assert abs(found[1].item() - math.log(256)) < 0.5


@pytest.mark.parametrize("mixer, flops", [
    ("full", 128 * 100), ("window", 128 * 6), ("strided", 64 * (4 + 25)), ("fixed", 64 * (4 + 25)),
    ("diff", (64 + 128) * 100), ("mla", 8 * (8 + 8 + 4) * 100), ("xl", 128 * (8 + 8)), ("compressive", 128 * (16 + 4)),
    ("mingru", 6 * 64), ("mamba", 2 * 64 * (4 + 2) + 6 * 64 * 16)])
def test_flops_of_a_mixer_by_hand(mixer, flops):
    """Of one token at 100 positions: 4 H D = 128 of each key, or what a state takes, matrices apart."""
    assert build(mixer).blocks[0].mixer.flops(100) == flops


@pytest.mark.parametrize("settings", [dict(mixer="mamba"), dict(mixer="mla"), dict(ff="low_rank"), dict(ff="moe"),
                                      dict(activation="swiglu"), dict(ff="none,mlp"), {}], ids=str)
def test_equal_parameters(settings):
    base = dict(n_layer=2, n_head=4, n_embd=128, block_size=64, positions="rope", norm="rms", bias=False)
    mult = equal_ff_mult(TransformerConfig(**{**base, **settings}))
    with torch.device("meta"):
        plain, found = (build_model(TransformerConfig(**{**base, **more})).n_params()
                        for more in ({}, {**settings, "ff_mult": mult}))
    assert abs(found / plain - 1) < 0.01 and (settings or mult == 4.0)
    with pytest.raises(ValueError, match="no layer has a feed-forward"):
        equal_ff_mult(TransformerConfig(**base, ff="none,none"))


# --- Impossible settings (the bounds of a single one: test_limits.py) ---

IMPOSSIBLE = {  # what is said: of which settings
    "n_head 5 does not divide n_embd 32": [dict(n_head=5)], "vocab_size": [dict(vocab_size=0)],
    "n_kv_head 3 does not divide n_head 4": [dict(n_kv_head=3)], "layer, rms": [dict(norm="batch")],
    "mixer has 'lstm'": [dict(mixer="full,lstm")], "ff has 'dense'": [dict(ff="none,dense")],
    "head_dim 7 must be even": [dict(head_dim=7)], "Transformer-XL": [dict(positions="relative")],
    "needs positions 'rope'": [dict(rope_scaling="yarn", positions="none")],
    "past block_size": [dict(mixer="mamba", positions="learned")], "no inner width": [dict(mixer="mamba", expand=0.01)],
    "rope_dim": [dict(partial_rotary=0.5, mixer="full,mla"), dict(mixer="mla", rope_dim=3)],
    "one latent for all heads": [dict(mixer="mla", n_kv_head=2)],
    "qk_norm normalises keys": [dict(mixer="mla", qk_norm=True)],
    "sparse_summary": [dict(mixer="fixed", sparse_summary=9)],
    "must be even": [dict(mixer=kind, n_kv_head=1) for kind in ("strided", "diff")],
    "earlier segments": [dict(mixer="xl", positions="learned")],
    "segment memory": [dict(qk_scale=True, qk_norm=True, mixer=f"full,{kind}") for kind in ("xl", "compressive")],
    "compression_rate 3 must divide": [dict(mixer="compressive", compression_rate=3)],
    "expert_top_k": [dict(ff="moe", expert_top_k=9),
                     dict(ff="moe", expert_groups=4, expert_top_groups=1, expert_top_k=3)],
    "expert_groups": [dict(ff="moe", expert_groups=3), dict(ff="moe", expert_groups=8),
                      dict(ff="moe", expert_groups=2, expert_top_groups=3)],
    "n_shared_expert": [dict(ff="moe", n_shared_expert=8)], "solu": [dict(ff="moe", activation="solu")],
    "is of layers full": [dict(mixer="full,mamba", bias="qkv"), dict(mixer="mla", nope_interval=2),
                          dict(mixer="mingru", qk_norm="full"), dict(mixer="full,mamba", qk_norm=True, qk_gain=True),
                          *(dict(value_residual=True, mixer=f"full,{kind}") for kind in ("mla", *CARRY)),
                          dict(lora_rank=2, mixer="full,mla")],
    "needs qk_norm": [dict(qk_gain=True), dict(qk_scale=True), dict(qk_norm="full", qk_scale=True)],
    "at least 2 layers": [dict(value_residual=True, n_layer=1)],
    "norm_after": [dict(norm_after=True, **more) for more in (
        dict(short_conv=2), dict(parallel_residual="shared"), dict(mixer="full,xl"))],
    "are of attention": [dict(mixer="mamba,mingru", softmax_plus_one=True), dict(mixer="mamba", score_softcap=9.0)],
    "plain softmax": [dict(attention="sdpa", softmax_plus_one=True), dict(attention="sdpa", score_softcap=9.0)],
    "positions 'relative'": [dict(score_softcap=9.0, mixer="xl", positions="relative")],
    "tfixup": [dict(init="tfixup", mixer="mamba"), dict(init="tfixup", ff="moe")],
    "tie_weights needs one classifier": [dict(tie_weights=True, n_targets=2),
                                         dict(tie_weights=True, intermediate_losses=True)],
    "document_end is": [dict(document_end=end) for end in ("", "\\", "\\N{BULLET}", "\udcff")],
    "a vocabulary of 257": [dict(documents="mask", vocab_size=257)],
    "lie across documents": [dict(documents="mask", mixer="full,xl"), dict(documents="mask", mixer="compressive"),
                             dict(documents="reset", shorten=2)],
    "begin at multiples": [dict(documents="reset", mixer="full,fixed")],
    "mtp_depth": [dict(mtp_depth=1, mixer="xl"), dict(mtp_depth=1, shorten=2)],
    "makes a pyramid": [dict(shorten=2, **more) for more in (
        dict(short_conv=2), dict(value_residual=True), dict(mixer="xl"), dict(n_layer=2))],
    "parametrisation 'mup'": [dict(parametrisation="mup", **more) for more in (
        dict(mixer="full,diff"), dict(mixer="mamba"), dict(ff="mlp,moe"), dict(init="tfixup"), dict(activation="solu"),
        dict(n_targets=2, target_heads="shared"), dict(lora_rank=2))],
    "more than n_embd 32": [dict(lora_rank=33)], "choose attention": [dict(lora_rank=2, lora_on="all", ff="mlp,moe")],
    "leaves the base": [dict(lora_rank=2, ff="moe", expert_balance="bias")],
    # What would cut a parameter off from the loss
    "n_embd is 1": [dict(n_embd=1, head_dim=2)], "head_dim is 1": [dict(head_dim=1, qk_norm=True, positions="none")],
    "width is 1": [dict(activation="solu", ff_mult=0.04)], "no feed-forward width": [dict(ff_mult=0.01)],
    "at least 2$": [dict(mixer="window", window=1), dict(short_conv=1)],
    "no gradient": [dict(residual_scale="rezero", init="zero")]}


def test_impossible_settings_are_one_sentence():
    """And each row of NEEDS is broken by one of these."""
    said = []
    for word, settings in [(word, settings) for word, cases in IMPOSSIBLE.items() for settings in cases]:
        with pytest.raises(ValueError, match=word) as error:
            pytest.fail(f"{settings} made {build(**{'mixer': 'full', **settings}).config}")
        said.append(str(error.value))
        assert "\n" not in said[-1] and len(said[-1]) < 250
    for _, _, message in NEEDS:
        assert any(line.startswith(message.split("{")[0]) for line in said), message


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_prefix_is_for_what_can_be_shown_whole_and_a_memory_for_what_carries(mixer):
    model, carries = build(mixer), mixer in CARRY
    with pytest.raises(ValueError, match="left to right" if carries else "carries nothing"):
        model(text(), prefix=3) if carries else model.new_memory(2)
