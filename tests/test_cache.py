"""Caches and memories by themselves: padding anywhere, windows that slide, what they hold, take and refuse. What they
promise for every variant: test_variants.py."""
import functools

import pytest
import torch

import variants
from nanolab.cache import KVCache
from variants import T, close, in_chunks, padded, text, whole

build = functools.partial(variants.build, block_size=32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("settings", [
    *(dict(positions=word, n_kv_head=2, qk_norm=True) for word in ("learned", "learned_per_layer", "rope")),
    *(dict(mixer=kind, short_conv=4) for kind in ("full", "mla,diff", "strided,fixed"))], ids=str)
def test_padding_anywhere_with_a_cache_that_forgets_nothing(settings):
    """On the left, on the right, in between: every row is as alone, and goes on after its own last position."""
    model, x, more = build(**settings), text(4, 9), text(4, 4, seed=3)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, -1, 2, -1, -1, -1, 3, 4],
                           [0, 1, 2, 3, 4, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1, 0, 1, 2]])
    uncached = whole(model, x, positions=places)
    for sizes in ([9], [4, 1, 1, 3], [1] * 9):
        cache = model.new_cache(4, 13)
        cached, late = in_chunks(model, x, sizes, cache, places), in_chunks(model, more, [1, 3], cache)
        assert cached.isfinite().all() and uncached.isfinite().all()
        for row, real in enumerate(places >= 0):
            alone = whole(model, torch.cat((x[row, real], more[row]))[None])[0]
            close(cached[row, real], alone[:-4])
            close(uncached[row, real], alone[:-4])
            close(late[row], alone[-4:])


@pytest.mark.parametrize("settings, numbers", [  # of one place, all of 4 bytes
    (dict(n_kv_head=4, head_dim=12), 2 * 4 * 12), (dict(n_kv_head=1, head_dim=12), 2 * 12),
    (dict(n_kv_head=2, short_conv=4), 2 * 2 * 8 + 32), (dict(mixer="mla", kv_rank=10, rope_dim=6), 10 + 6)], ids=str)
def test_bytes_and_reset(settings, numbers):
    model, x = build(**settings), text()
    cache = model.new_cache(2, T)
    in_chunks(model, x, [T], cache, padded((T, 9)))
    assert cache.ragged and cache.bytes == 3 * 2 * T * (4 * numbers + 8) + 3 * 2 * T * 8 * ("short_conv" in settings)
    cache.reset()
    assert cache.length == 0 and not cache.ragged
    close(in_chunks(model, x, [T], cache), whole(model, x))
    assert cache.bytes == 3 * 2 * T * numbers * 4
    assert cache.layers[0].kind == ("latent" if "mixer" in settings else "keys")


def test_consecutive_rows_may_become_ragged():
    model, x = build(), text(2, 10)
    cache = model.new_cache(2, 10)
    in_chunks(model, x[:, :6], [6], cache)
    assert not cache.ragged
    late = in_chunks(model, x[:, 6:], [4], cache, torch.tensor([[6, 7, 8, 9], [-1, -1, 6, 7]]))
    assert cache.ragged
    close(late[0], whole(model, x[:1])[0, 6:])
    close(late[1, 2:], whole(model, torch.cat((x[1, :6], x[1, 8:]))[None])[0, 6:])


def test_window_becomes_ragged_after_evictions_but_not_out_of_order():
    """Slots are evicted in order, so a pad behind a byte would push visible bytes out: an error, not a wrong number."""
    model, x = build(), text(2, 40)
    full, cache = whole(model, x, window=8), model.new_cache(2, 16, window=8)
    in_chunks(model, x[:, :30], [30], cache)
    for places in ([[30], [28]], [[30], [-1]]):
        with pytest.raises(ValueError, match="left"):
            model(x[:, 30:31], positions=torch.tensor(places), cache=cache)
    close(in_chunks(model, x[:, 30:], [1, 9], cache, torch.arange(30, 40).repeat(2, 1)), full[:, 30:])
    assert cache.ragged
    with pytest.raises(ValueError, match="left"):
        model(x[:, :12], positions=padded((12, 7), 12, right=True), cache=model.new_cache(2, 16, window=8))


def test_window_crop_and_fork():
    model, x = build(), text(1, 40)
    full, cache = whole(model, x, window=8), model.new_cache(1, 16, window=8)
    assert (whole(model, x) - full).abs().max() > 1e-3  # the window cuts something off
    in_chunks(model, x[:, :30], [1] * 30, cache)
    back = next(n for n in range(1, 30) if all(layer.croppable(n) for layer in cache.layers))
    assert 22 < back < 30  # the first key held is position 22 or less, and a window of 8 needs 7 before the next one
    twin = cache.fork()
    twin.crop(back)
    close(in_chunks(model, x[:, back:], [3, 37 - back], twin), full[:, back:])
    with pytest.raises(ValueError, match="forgotten"):
        cache.crop(back - 1)
    close(in_chunks(model, x[:, 30:], [10], cache), full[:, 30:])


@pytest.mark.parametrize("snapshots", [1, 2])
def test_as_many_snapshots_are_kept_as_were_asked_for(snapshots):
    model, x = build("mingru"), text(1, T)
    cache = model.new_cache(1, T, snapshots=snapshots)
    in_chunks(model, x[:, :20], [4] * 5, cache)
    kept = [16, 12][:snapshots]                           # before the last pass, and the one before it
    with pytest.raises(ValueError, match="snapshots at " + ", ".join(map(str, sorted(kept))) + " "):
        cache.crop(16 - 4 * snapshots)
    cache.crop(kept[-1])
    close(in_chunks(model, x[:, kept[-1]:], [T - kept[-1]], cache), whole(model, x)[:, kept[-1]:])


def test_rope_goes_far_past_block_size():
    """Only differences of positions count: byte 100,000 of a stream sees its window as byte 40 does."""
    model, x = build(n_layer=1), text(1, 40)
    near, far = (in_chunks(model, x, [40], model.new_cache(1, 16, window=8), torch.arange(n, n + 40)[None])
                 for n in (0, 100_000))
    close(near, far, 1e-4)
    exact = torch.cos(torch.tensor(100_039, dtype=torch.float64) * 10000.0 ** (-2 / 8))
    assert abs(model.ropes["8"].cos[100_039, 1].item() - exact.item()) < 1e-7


def test_tables_and_cache_made_in_inference_mode_serve_training():
    model = build(n_layer=1)
    with torch.inference_mode():
        cache = model.new_cache(1, 64)
        model(text(1, 50), cache=cache)  # grows the tables past block_size
    objective, _ = model.train()(text(1, 40), text(1, 40).unsqueeze(-1))
    objective.backward()
    assert model.blocks[0].mixer.qkv.weight.grad.abs().sum() > 0
    model(text(1, 2), cache=cache)  # with gradients on: what is kept has none
    assert cache.length == 52 and not cache.layers[0].k.requires_grad


@pytest.mark.parametrize("settings", [dict(n_kv_head=2), dict(mixer="full,mamba,mingru", short_conv=4)], ids=str)
def test_autocast_and_other_types(settings):
    """States stay float32, keys and inputs are bfloat16; training has finite gradients; a type may be asked for."""
    model, x = build(**settings), text()
    exact = whole(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, T)
        cached, full = in_chunks(model, x, [10, 1, 13], cache), whole(model, x)
        model.train()(x, x.unsqueeze(-1))[0].backward()
    close(cached, full, 0.1)
    close(cached, exact, 0.3)
    assert all(layer.dtype == (torch.float32 if layer.kind == "state" else torch.bfloat16) for layer in cache.layers)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if "mixer" not in settings:
        low = in_chunks(model.eval(), x, [10, 14], model.new_cache(2, T, dtype=torch.bfloat16))
        close(low, exact, 0.1)
        assert not torch.equal(low, exact)


# --- What is refused ---

def test_impossible_caches_and_a_full_one():
    for settings, word in ((dict(max_length=0), "max_length"), (dict(max_length=4, window=1), "window")):
        with pytest.raises(ValueError, match=word):
            KVCache(1, 1, 8, **settings)
    model = build()
    cache = model.new_cache(1, 8)
    whole(model, text(1, 6), cache=cache)
    with pytest.raises(ValueError, match="6 keys and 3 more exceed max_length 8"):
        model(text(1, 3), cache=cache)
    assert all(layer.length == 6 for layer in cache.layers)


def test_learned_positions_end_at_block_size():
    model, word = build(positions="learned"), "position 32 is past block_size 32.*'learned'"
    with pytest.raises(ValueError, match=word):
        model(text(1, 33))
    for window in (None, 8):
        cache = model.new_cache(1, 64, window=window)
        whole(model, text(1, 32), cache=cache)
        with pytest.raises(ValueError, match=word):
            model(text(1, 1), cache=cache)


@pytest.mark.parametrize("positions, word", [
    (torch.tensor([0, 2, 3]), "consecutive"), (torch.arange(2), "consecutive"), (torch.arange(5, 8), "cache ends at 2"),
    (torch.zeros(1, 4, dtype=torch.long), "but the input is")], ids=["gap", "short", "later", "long"])
def test_positions_that_do_not_fit(positions, word):
    model = build()
    cache = model.new_cache(1, 16)
    whole(model, text(1, 2), cache=cache)
    with pytest.raises(ValueError, match=word):
        model(text(1, 3), positions=positions, cache=cache)
    same = cache.fork()
    one = whole(model, text(1, 3), positions=torch.arange(2, 5), cache=cache)
    assert torch.equal(one, whole(model, text(1, 3), cache=same))


def test_one_dimensional_positions_without_cache():
    """RoPE sees differences only, so a shift changes nothing but rounding; a learned table takes the rows asked for."""
    x, places = text(1, 6), torch.arange(9, 15)
    close(whole(build(), x, positions=places), whole(build(), x))
    model = build(positions="learned")
    moved = whole(model, x, positions=places)
    assert not torch.allclose(moved, whole(model, x), atol=1e-3)
    close(moved, whole(model, x, positions=places[None]))


# --- Memory: segments of training ---

@pytest.mark.parametrize("mixer, short_conv, norm, positions", [
    ("xl", 0, "layer", "rope"), ("xl", 3, "rms", "rope"), ("compressive", 0, "rms", "rope"),
    ("compressive", 3, "layer", "relative"), ("mamba", 3, "layer", "rope")])
@torch.no_grad()
def test_memory_is_hidden_states_under_the_weights_of_today(mixer, short_conv, norm, positions):
    """Dai et al. 2019: what is remembered is projected anew. In a first layer hidden states are embeddings: once the
    weights between these and the memory have changed, a segment sees what one long pass with the new ones sees."""
    model = build(mixer, block_size=8, n_layer=1, short_conv=short_conv, norm=norm, positions=positions)
    x = text(2, 8 * 5)
    block, memory = model.blocks[0], model.new_memory(2)
    changed = [*block.norm1.parameters()] + ([block.mixer.qkv.weight] if mixer != "mamba" else [])
    changed += [block.conv.kernel] if short_conv and mixer != "mamba" else []
    for i, part in enumerate(x.split(8, 1)):
        if mixer == "mamba":  # the state as one long pass has it, the convolution's memory as it was kept
            fresh = model.new_memory(2)
            for before in x.split(8, 1)[:i]:
                model(before, memory=fresh)
            memory.layers[0] = fresh.layers[0]
        close(model(part, memory=memory), model(x[:, :8 * i + 8])[:, 8 * i:])
        for p in changed:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("mixer, said", [("mamba", False), ("mamba,xl", True)])
def test_memory_of_the_old_kind_is_not_gone_on_from(mixer, said, capsys):
    """Checkpoints of mixers' inputs have the same shapes: one line, and an empty memory; states are states as ever."""
    model = build(mixer, block_size=8)
    memory, other = model.new_memory(2), model.new_memory(2)
    whole(model, text(2, 8), memory=memory)
    other.load_state_dict({name: value for name, value in memory.state_dict().items() if name != "kind"})
    assert (other.length == 0) == said == (capsys.readouterr().out.count("\n") == 1)
    assert not said or not any(t.any() for held in other.layers for t in held)
    other.load_state_dict(memory.state_dict())
    assert other.length == 8 and not capsys.readouterr().out


def test_memory_needs_whole_segments():
    model = build("xl", block_size=8)
    memory = model.new_memory(2)
    whole(model, text(2, 5), memory=memory)
    with pytest.raises(ValueError, match="no whole number of segments"):
        model(text(2, 8), memory=memory)
    with pytest.raises(ValueError, match="whole segments of a stream"):
        model(text(2, 8), memory=model.new_memory(2), cache=model.new_cache(2, 8))
