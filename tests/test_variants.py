"""Every variant against the same promises: what is cached equals what is recomputed, whole, in chunks, token by token,
in ragged rows, after fork and crop, past the window, by segments, in other types; causal; nothing cut off from the
loss; weights go through a state dict; impossible settings are refused in one line. The variants: variants.py."""
import copy
import math

import pytest
import torch

import choices
from model import (CARRY, MIXERS, TransformerConfig, build_model, equal_ff_mult, fused_rows, initialise,
                   parameter_roles, parameter_rules)
from nanolab.dialog_tree import DialogTree
from variants import CHUNKS, SMALL, VARIANTS, T, build, close, each, in_chunks, made, padded, text, whole

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


def attends(config):
    return ragged(config) and not config.carries


# --- Cached equals recomputed ---

@each()
def test_cached_equals_recomputed(name):
    model, x = made(name), text()
    full, cache = whole(model, x), model.new_cache(2, T)
    for chunks, sizes in CHUNKS.items():
        cache.reset()
        hits = cache.layers[0].hits
        close(in_chunks(model, x, sizes, cache), full)
        assert cache.length == T and (cache.layers[0].hits > hits) == (chunks != "whole")
        lengths = {T} if model.config.shorten == 1 else {T, T // model.config.shorten}
        assert {layer.length for layer in cache.layers} == lengths
    streams = 4 * sum(t.numel() for t in vars(cache).values() if torch.is_tensor(t))
    assert cache.bytes == sum(layer.bytes for layer in cache.layers) + streams
    assert len(cache.log()) == 2 + len(cache.layers) + (model.config.shorten > 1)


@each(ragged)
def test_ragged_rows_equal_each_row_alone(name):
    """And each goes on after its own last position where none are given."""
    model, lengths, x, more = made(name), (T, 15, 3), text(3, T), text(3, 3, seed=7)
    places = padded(lengths)
    uncached = whole(model, x, positions=places)
    assert uncached.isfinite().all()
    alone = [whole(model, torch.cat((x[row, T - n:], more[row]))[None])[0] for row, n in enumerate(lengths)]
    for sizes in CHUNKS.values():
        cache = model.new_cache(3, T + 3)
        cached, late = in_chunks(model, x, sizes, cache, places), in_chunks(model, more, [1, 2], cache)
        for row, n in enumerate(lengths):
            close(uncached[row, T - n:], alone[row][:n])
            close(cached[row, T - n:], alone[row][:n])
            close(late[row], alone[row][n:])


@each(ragged)
def test_padding_anywhere_in_one_pass(name):
    model, x = made(name), text(3, 8)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, -1, -1, 2, -1, 3, 4], [-1, 0, 1, 2, -1, 3, -1, -1]])
    found = whole(model, x, positions=places)
    for row, real in enumerate(places >= 0):
        close(found[row, real], whole(model, x[row:row + 1, real])[0])


@pytest.mark.parametrize("rows", ["alike", "ragged", "ragged later"])
@each()
def test_fork_and_crop(name, rows):
    """Back to where a pass began, with twins that go on by themselves; also to before rows became ragged."""
    model, x, y = made(name), text(), text(2, T, seed=5)
    if rows != "alike" and not ragged(model.config):
        return
    places = padded((T, T - 4)) if rows == "ragged" else None
    late = padded((T, T - 4))[:, 9:] if rows == "ragged" else None
    cut = (lambda a, b: None) if places is None else lambda a, b: places[:, a:b]
    cache = model.new_cache(2, T, snapshots=3)
    in_chunks(model, x[:, :9], [5, 4], cache, cut(0, 9))
    twin = cache.fork(2)
    moved = torch.arange(9, T).repeat(2, 1) if rows == "ragged later" else cut(9, T)
    in_chunks(model, x[:, 9:], [8, T - 17], cache, moved)
    cache.crop(9)
    assert cache.length == 9 and twin.length == 9
    full = whole(model, torch.cat((x[:, :9], y[:, 9:]), 1), positions=places)[:, 9:]
    close(in_chunks(model, y[:, 9:], [1, T - 10], cache, late), full)
    more = None if late is None else late.repeat_interleave(2, 0)
    close(in_chunks(model, y[:, 9:].repeat_interleave(2, 0), [T - 9], twin, more), full.repeat_interleave(2, 0))
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
    for length in (1, 9, 14, 16, 19):
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
    states = kinds & {"mamba", "mingru", "compressive"}
    assert not allowed if states else allowed if "window" in kinds else len(allowed) == 5


@each()
def test_past_the_window_and_in_generation(name):
    """Far past block_size, rows of unequal length: the same logits after each token with a cache and without."""
    model = made(name)
    for prompts in ([b"The "], [b"ab", b"abcdefgh", b"q"] if ragged(model.config) else [b"The ", b"abcd"]):
        tokens = text(30, len(prompts), seed=7)
        close(*(choices.followed(tokens, model, prompts, use_cache=use) for use in (True, False)))


@pytest.mark.parametrize("rows", ["alike", "ragged"])
@each(attends)
def test_prefix_sees_itself_and_the_rest_is_causal(name, rows):
    settings = {"block_size": 48, **VARIANTS[name], "window": 30, "sparse_stride": 8}
    model, x = build(**settings), text()
    places, prefix = (padded((T, T - 4)), torch.tensor([9, 6])) if rows == "ragged" else (None, 9)
    real = torch.ones(2, T, dtype=torch.bool) if places is None else places >= 0
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


@pytest.mark.parametrize("rows", ["alike", "ragged"])
@each(lambda c: c.rolls and not {*c.mixers} & {"xl", "compressive"})
def test_sliding_caches(name, rows):
    """Full attention limited to 6 positions, far past them: as one banded pass, in storage that does not grow."""
    model, x, places = made(name), text(2, 60), padded((60, 41), 60) if rows == "ragged" else None
    real = torch.ones(2, 60, dtype=torch.bool) if places is None else places >= 0
    full = whole(model, x, positions=places, window=6)
    for sizes in ([60], [1] * 60, [20, 1, 1, 30, 8]):
        cache = model.new_cache(2, 8, window=6)
        before = cache.bytes
        close(in_chunks(model, x, sizes, cache, places)[real], full[real])
        assert rows == "ragged" or cache.bytes == before


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
    kept = {torch.promote_types(dtype, torch.float32) if layer.kind == "state" else dtype for layer in cache.layers}
    assert {t.dtype for layer in cache.layers for t in tensors(layer)} == kept


@torch.no_grad()
def turn(model, tree, tokens):
    """Tokens beyond what the tree knows, equal to a pass over all of them; how many it knew."""
    with tree.lock(tokens) as prefix:
        cache = tree.take(prefix, 64)
        if prefix.length < len(tokens):
            found = model(tokens[None, prefix.length:], cache=cache)[0]
            close(found, model(tokens[None])[0, prefix.length:])
        assert tree.put(tokens, cache) == len(tokens)
    return prefix.length


@each(ragged)
def test_dialogs(name):
    """Forked, in batches of many lengths and put again; a short convolution changes neither where a dialog goes on nor
    what it says."""
    model, plain = made(name), build(**{**VARIANTS[name], "short_conv": 0})
    base = text(1, 20)[0]
    near = torch.cat((base, text(1, 9, seed=2)[0]))
    dialogs = [base, near, torch.cat((base, text(1, 5, seed=3)[0])), text(1, 2, seed=6)[0],
               torch.cat((near[:25], text(1, 4, seed=7)[0])), near]
    tree, other = DialogTree(model, budget=None), DialogTree(plain, budget=None)
    assert [turn(model, tree, d) for d in dialogs] == [turn(plain, other, d) for d in dialogs]
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
    """Bit for bit, with and without bfloat16 and its attention by hand; and every earlier byte is seen."""
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


# --- Segments of training ---

@each(lambda c: {*c.mixers} <= {*CARRY})
def test_segments_equal_one_long_pass(name):
    """Training on a stream, segment by segment, sees what one pass over all of it sees; a memory goes through its
    state dict, refuses other shapes, holds no gradient, and forgets on reset."""
    for sizes in (dict(), dict(memory_length=16, compressed_length=3), dict(memory_length=4)):
        model, x = build(**{**VARIANTS[name], **sizes}), text(2, 48)
        full, memory = whole(model, x), model.new_memory(2)
        for i, part in enumerate(x.split(8, 1)):
            close(whole(model, part, memory=memory), full[:, 8 * i:8 * i + 8])
            assert memory.length == 8 * (i + 1)
        close(in_chunks(model, x, [3, 20, 1, 1, 23], model.new_cache(2, 1)), full)
    other = model.new_memory(2)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(whole(model, x[:, :8], memory=other), whole(model, x[:, :8], memory=memory))
    with pytest.raises(ValueError, match="shapes"):
        model.new_memory(3).load_state_dict(memory.state_dict())
    memory.reset()
    close(whole(model, x[:, :8], memory=memory), full[:, :8])


@each(lambda c: c.carries)
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

@each()
def test_parameters(name):
    """Each is claimed by one rule, filled by `initialise` from the seed alone, and goes through a state dict; matrix
    products are counted; computing layers again changes neither losses nor gradients; the loss at first is uniform."""
    model = build(**VARIANTS[name])
    names = [name for name, _ in model.named_parameters()]
    roles = parameter_roles(model)
    assert list(parameter_rules(model)) == list(roles) == names
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
        assert model.flops_per_token(8) == 6 * (hidden + 256 * 32) + mixing and model.flops_per_token(16) >= mixing
    x, y = text(2, 8), text(2, 8, 1, seed=2)
    twin = build(seed=1, **{**VARIANTS[name], "checkpoint_activations": True})
    twin.load_state_dict(model.state_dict())
    assert torch.equal(whole(twin, x), whole(model, x))
    found = []
    for one in (model.train(), twin.train()):
        objective, nats = one(x, y)
        objective.backward()
        found.append((objective.detach(), nats, [p.grad for p in one.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    assert abs(nats.item() - math.log(256)) < 0.5


@pytest.mark.parametrize("snapshots", [1, 2])
def test_as_many_snapshots_are_kept_as_were_asked_for(snapshots):
    model, x = build("mingru"), text(1, T)
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


@pytest.mark.parametrize("mixer", CARRY)
def test_no_prefix_for_what_reads_from_left_to_right(mixer):
    with pytest.raises(ValueError, match="left to right"):
        build(mixer)(text(), prefix=3)


@pytest.mark.parametrize("init", ["gpt2", "normal", "xavier", "tfixup", "truncated", "zero"])
@pytest.mark.parametrize("mixer, ff", [*((m, "mlp") for m in MIXERS), ("full", "low_rank"), ("full", "moe"),
                                       ("mla", "mlp,moe")])
def test_every_parameter_is_claimed_and_filled(mixer, ff, init):
    def drawn(seed):
        torch.manual_seed(seed)
        return build_model(TransformerConfig(**{**SMALL, "mixer": mixer, "ff": ff, "init": init, "n_embd": 64}))
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


@pytest.mark.parametrize("settings", [
    dict(residual_scale="rezero"), dict(residual_scale="layerscale"), dict(residual_scale="depth"), dict(ff="moe"),
    dict(mtp_depth=2), dict(dropout=0.2), dict(mixer="mamba"), dict(mixer="xl"), dict(mixer="compressive"),
    dict(mixer="mla", ff="mlp,moe", mtp_depth=1), dict(value_residual=True, mtp_depth=1, dropout=0.2)], ids=str)
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


# --- Equal parameters ---

@pytest.mark.parametrize("settings", [dict(mixer="mamba"), dict(mixer="mingru"), dict(mixer="mla"), dict(ff="low_rank"),
                                      dict(ff="moe"), dict(activation="swiglu"), dict(mixer="diff,full")], ids=str)
def test_equal_parameters(settings):
    base = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, positions="rope", norm="rms", bias=False)
    plain = build_model(TransformerConfig(**base)).n_params()
    config = TransformerConfig(**{**base, **settings})
    found = build_model(TransformerConfig(**{**base, **settings, "ff_mult": equal_ff_mult(config)})).n_params()
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
    (dict(score_softcap=9.0, mixer="mamba,mingru"), "are of attention"),
    (dict(softmax_plus_one=True, mixer="mamba,mingru"), "are of attention"),
    (dict(softmax_plus_one=True, attention="sdpa"), "plain softmax"),
    (dict(score_softcap=9.0, attention="sdpa"), "plain softmax"),
    (dict(score_softcap=9.0, mixer="xl", positions="relative"), "positions 'relative'"),
    (dict(value_residual=True, n_layer=1), "at least 2: mixer 'full' in 1"),
    (dict(value_residual=True, shorten=2), "value_residual"),
    *((dict(value_residual=True, mixer=f"full,{kind}"), "value_residual") for kind in ("mla", *CARRY)),
    *((dict(parametrisation="mup", **settings), "parametrisation 'mup'") for settings in (
        dict(mixer="full,diff"), dict(mixer="mamba"), dict(ff="low_rank"), dict(ff="mlp,moe"), dict(init="tfixup"),
        dict(activation="solu"), dict(n_targets=2, target_heads="shared"))),
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
