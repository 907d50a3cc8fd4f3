"""The key-value cache by itself: right padding, windows that slide, what it holds, takes and refuses. What it promises
for every variant: test_variants.py."""
import functools

import pytest
import torch

import variants
from model import Causal, Positions
from nanolab.cache import KVCache
from variants import CHUNKS, T, in_chunks, padded, text, whole

SCHEMES = ("learned", "learned_per_layer", "rope", "none")
build = functools.partial(variants.build, block_size=32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("positions", SCHEMES)
def test_rows_padded_on_the_right_equal_each_row_alone(positions, chunks):
    model, lengths = build(positions=positions, n_kv_head=2, qk_norm=True), (T, 15, 3)
    x, places = text(3, T), padded(lengths, right=True)
    cached = in_chunks(model, x, CHUNKS[chunks], model.new_cache(3, T), places)
    uncached = whole(model, x, positions=places)
    assert uncached.isfinite().all() and cached.isfinite().all()
    for row, length in enumerate(lengths):
        alone = whole(model, x[row:row + 1, :length])[0]
        torch.testing.assert_close(uncached[row, :length], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached[row, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_bytes_and_reset(n_kv_head):
    """Keys and values of 3 layers, 2 rows and T places in heads of 12 numbers."""
    model, x = build(n_kv_head=n_kv_head, head_dim=12), text()
    cache = model.new_cache(2, T)
    in_chunks(model, x, [T], cache, padded((T, 9)))
    assert cache.bytes >= 3 * 2 * 2 * n_kv_head * T * 12 * 4 and cache.ragged
    cache.reset()
    assert cache.length == 0 and not cache.ragged
    torch.testing.assert_close(in_chunks(model, x, [T], cache), whole(model, x), atol=1e-5, rtol=1e-5)
    fresh = model.new_cache(2, T)
    in_chunks(model, x, [T], fresh)
    assert fresh.bytes == 3 * 2 * 2 * n_kv_head * T * 12 * 4


def test_padding_bytes_do_not_matter():
    model, places = build(positions="rope"), padded((T, 10))
    x = text()
    other = torch.where(places < 0, (x + 77) % 256, x)
    with torch.no_grad():
        a, b = model(x, positions=places), model(other, positions=places)
    assert torch.equal(a[places >= 0], b[places >= 0])
    assert not torch.equal(a[places < 0], b[places < 0])


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("positions", SCHEMES)
def test_ragged_rows_go_on_without_positions(positions, right):
    """positions None after a ragged prefill: every row goes on after its own last position."""
    model, lengths, more = build(positions=positions), (12, 5), text(2, 4, seed=3)
    x, places = text(2, 12), padded(lengths, 12, right=right)
    cache = model.new_cache(2, 16)
    in_chunks(model, x, [12], cache, places)
    steps = in_chunks(model, more, [1, 3], cache)
    for row in range(2):
        alone = torch.cat((x[row, places[row] >= 0], more[row]))
        with torch.no_grad():
            torch.testing.assert_close(steps[row], model(alone[None])[0, -4:], atol=1e-5, rtol=1e-5)


def test_consecutive_rows_may_become_ragged():
    model, x = build(positions="rope"), text(2, 10)
    cache = model.new_cache(2, 10)
    in_chunks(model, x[:, :6], [6], cache)
    assert not cache.ragged
    places = torch.tensor([[6, 7, 8, 9], [-1, -1, 6, 7]])
    late = in_chunks(model, x[:, 6:], [4], cache, places)
    assert cache.ragged
    with torch.no_grad():
        torch.testing.assert_close(late[0], model(x[:1])[0, 6:], atol=1e-5, rtol=1e-5)
        short = torch.cat((x[1, :6], x[1, 8:]))
        torch.testing.assert_close(late[1, 2:], model(short[None])[0, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 60, [60], [5] * 12, [20, 1, 1, 30, 8], [17, 16] + [1] * 27, [8, 9, 9, 34]])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_window_in_any_chunks(positions, ragged, sizes):
    model, x, W = build(positions=positions, n_kv_head=2), text(2, 60), 8
    places = padded((60, 41), 60) if ragged else None
    real = torch.ones(2, 60, dtype=torch.bool) if places is None else places >= 0
    full = whole(model, x, positions=places, window=W)
    cache = model.new_cache(2, 16, window=W)
    before = cache.bytes
    out = in_chunks(model, x, sizes, cache, places)
    torch.testing.assert_close(out[real], full[real], atol=1e-5, rtol=1e-5)
    assert cache.length == 60
    assert cache.bytes - before == (3 * 2 * 16 * 8 if ragged else 0)  # the storage does not grow
    with torch.no_grad():
        assert (model(x, positions=places)[real] - full[real]).abs().max() > 1e-3  # the window does cut something off


def test_window_becomes_ragged_after_evictions():
    model, x = build(positions="rope"), text(2, 40)
    full = whole(model, x, window=8)
    cache = model.new_cache(2, 16, window=8)
    in_chunks(model, x[:, :30], [30], cache)
    with pytest.raises(ValueError, match="left"):
        model(x[:, 30:31], positions=torch.tensor([[30], [28]]), cache=cache)
    late = in_chunks(model, x[:, 30:], [1, 9], cache, torch.arange(30, 40).repeat(2, 1))
    assert cache.ragged
    torch.testing.assert_close(late, full[:, 30:], atol=1e-5, rtol=1e-5)


def test_window_crop_and_fork():
    model, x, W = build(positions="rope"), text(1, 40), 8
    full = whole(model, x, window=W)
    cache = model.new_cache(1, 16, window=W)
    in_chunks(model, x[:, :30], [1] * 30, cache)
    back = next(n for n in range(1, 30) if all(layer.croppable(n) for layer in cache.layers))
    twin = cache.fork()
    assert 22 < back < 30  # the first key held is position 22 or less, and a window of 8 needs 7 before the next one
    twin.crop(back)
    late = in_chunks(model, x[:, back:], [3, 37 - back], twin)
    torch.testing.assert_close(late, full[:, back:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="forgotten"):
        cache.crop(back - 1)
    torch.testing.assert_close(in_chunks(model, x[:, 30:], [10], cache), full[:, 30:], atol=1e-5, rtol=1e-5)


def test_window_refuses_padding_behind_bytes():
    """Slots are evicted in order, so a pad behind a byte would push visible bytes out: an error, not a wrong number."""
    model = build(positions="rope")
    cache = model.new_cache(2, 16, window=8)
    with pytest.raises(ValueError, match="left"):
        model(text(2, 12), positions=padded((12, 7), 12, right=True), cache=cache)
    model(text(2, 12), positions=padded((12, 7), 12), cache=cache)
    with pytest.raises(ValueError, match="left"):
        model(text(2, 1), positions=torch.tensor([[12], [-1]]), cache=cache)


def test_full_cache_is_one_sentence():
    model = build(positions="rope")
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        model(text(1, 6), cache=cache)
        with pytest.raises(ValueError, match="6 keys and 3 more exceed max_length 8"):
            model(text(1, 3), cache=cache)
    assert all(layer.length == 6 for layer in cache.layers)


@pytest.mark.parametrize("positions", ["learned", "learned_per_layer"])
@pytest.mark.parametrize("window", [None, 8])
def test_learned_positions_end_at_block_size(positions, window):
    model = build(positions=positions)
    cache = model.new_cache(1, 64, window=window)
    with torch.no_grad():
        model(text(1, 32), cache=cache)
        with pytest.raises(ValueError, match="position 32 is past block_size 32.*" + positions):
            model(text(1, 1), cache=cache)


def test_rope_goes_far_past_block_size():
    """Only differences of positions count: byte 100,000 of a stream sees its window as byte 40 does."""
    model, x, W = build(positions="rope", n_layer=1), text(1, 40), 8
    near, far = model.new_cache(1, 16, window=W), model.new_cache(1, 16, window=W)
    shifted = torch.arange(100_000, 100_040)[None]
    a, b = in_chunks(model, x, [40], near), in_chunks(model, x, [40], far, shifted)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert model.ropes["8"].cos.size(0) >= 100_040
    exact = torch.cos(torch.tensor(100_039, dtype=torch.float64) * 10000.0 ** (-2 / 8))
    assert abs(model.ropes["8"].cos[100_039, 1].item() - exact.item()) < 1e-7


def test_tables_and_cache_made_in_inference_mode_serve_training():
    model = build(positions="rope", n_layer=1)
    with torch.inference_mode():
        cache = model.new_cache(1, 64)
        model(text(1, 50), cache=cache)  # grows the tables past block_size
    objective, _ = model.train()(text(1, 40), text(1, 40).unsqueeze(-1))
    objective.backward()
    assert model.blocks[0].mixer.qkv.weight.grad.abs().sum() > 0
    model(text(1, 2), cache=cache)  # with gradients on: what is kept has none
    assert cache.length == 52 and not cache.layers[0].k.requires_grad


def test_one_query_builds_no_mask():
    for window, S in ((None, 10), (8, 8)):
        assert Positions(9, 1).mask(Causal(window), S, None, "cpu") is None
    assert Positions(0, 5).mask(Causal(), 5, None, "cpu") == "causal"
    band = Positions(3, 2).mask(Causal(2), 3, None, "cpu")
    assert band.tolist() == [[True, True, False], [False, True, True]]


def test_autocast_and_other_types():
    model, x = build(positions="rope", n_kv_head=2), text()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, T)
        assert cache.layers[0].k.dtype == torch.bfloat16
        cached, full = in_chunks(model, x, [10, 1, 13], cache), model(x)
    torch.testing.assert_close(cached, full, atol=0.1, rtol=0.1)
    with torch.no_grad():
        low = in_chunks(model, x, [10, 14], model.new_cache(2, T, dtype=torch.bfloat16))
        torch.testing.assert_close(low, model(x), atol=0.1, rtol=0.1)
        assert not torch.equal(low, model(x))


@pytest.mark.parametrize("settings, word", [(dict(max_length=0), "max_length"), (dict(max_length=4, window=1), "win")])
def test_impossible_caches(settings, word):
    with pytest.raises(ValueError, match=word):
        KVCache(1, 1, 8, **settings)


@pytest.mark.parametrize("positions, word", [
    (torch.tensor([0, 2, 3]), "consecutive"), (torch.arange(2), "consecutive"), (torch.arange(5, 8), "cache ends at 2"),
    (torch.zeros(1, 4, dtype=torch.long), "but the input is"),
])
def test_positions_that_do_not_fit(positions, word):
    model = build(positions="rope")
    cache = model.new_cache(1, 16)
    with torch.no_grad():
        model(text(1, 2), cache=cache)
        with pytest.raises(ValueError, match=word):
            model(text(1, 3), positions=positions, cache=cache)
        same = cache.fork()
        one = model(text(1, 3), positions=torch.arange(2, 5), cache=cache)
        assert torch.equal(one, model(text(1, 3), cache=same))


def test_one_dimensional_positions_without_cache():
    """RoPE sees differences only, so a shift changes nothing but rounding; a learned table takes the rows asked for."""
    model, x = build(positions="rope"), text(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x, positions=torch.arange(9, 15)), model(x), atol=1e-5, rtol=1e-5)
        model = build(positions="learned")
        moved = model(x, positions=torch.arange(9, 15))
        assert not torch.allclose(moved, model(x), atol=1e-3)
        torch.testing.assert_close(moved, model(x, positions=torch.arange(9, 15)[None]), atol=1e-5, rtol=1e-5)
