"""Attention kernels against their twins, in Triton's interpreter and on a GPU, and the twins by gradcheck."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from interpreter import INTERPRETED, formula, interpreted, kernels_of
from kernels import (attend, attend_differential, attend_latent, attend_one, attend_space, attend_time, rms_norm, using,
                     who_sees_whom)
from model import Positions, Transformer, TransformerConfig, causal

pytestmark = pytest.mark.usefixtures("one_thread", "by_triton")
ka = kernels_of("attention")
attend_reference, attend_differential_reference, attend_latent_reference, attend_one_reference = map(
    formula, (attend, attend_differential, attend_latent, attend_one))
attend_space_reference, attend_time_reference = formula(attend_space), formula(attend_time)
interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")


def draw(*shape, seed=0, dtype=torch.float32, device="cpu", size=1.0):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (size * torch.randn(shape, generator=generator)).to(device, dtype)


def inputs(B, H, G, T, S, D, Dv, **how):
    """q, k and v as attention has them: places before heads in memory, k and v parts of a wider tensor."""
    q, both = draw(B, T, H, D, seed=1, **how), draw(B, S, G, D + Dv, seed=2, **how)
    return [t.transpose(1, 2).requires_grad_() for t in (q, both[..., :D], both[..., D:])]


def results(op, tensors, *rest, **options):
    """The output and the gradients at some gradient of it."""
    y = op(*tensors, *rest, **options)
    dy = draw(*y.shape, seed=3, device=y.device, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (*tensors, *rest) if t.requires_grad], dy)]


def assert_agree(op, twin, tensors, *rest, near=1e-5, **options):
    """Kernel in the interpreter against twin: output and gradients, each to `near` of its largest number."""
    with interpreted():
        found = results(op, tensors, *rest, **options)
    for mine, other in zip(found, results(twin, tensors, *rest, **options), strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0, atol=near * max(1.0, float(other.abs().max())))


def left_padded(S, *padding):
    """Places (B, S) of rows with so many padded keys before them."""
    return (torch.arange(S) - torch.tensor(padding)[:, None]).clamp(min=-1)


CASES = {  # (B, H, G, T, S, D, Dv), masks; blocks are 64 and 32 wide here
    "causal": ((1, 2, 1, 70, 70, 16, 16), {}),
    "grouped chunk, odd sizes": ((1, 4, 2, 37, 71, 20, 9), {"scale": 0.3}),
    "all": ((1, 1, 1, 67, 35, 16, 33), {"causal": False}),
    "all, padded keys": ((3, 1, 1, 3, 40, 8, 8), {"causal": False, "lengths": torch.tensor([40, 33, 0])}),
    "window": ((1, 1, 1, 67, 150, 16, 16), {"window": 20}),
    "window of one": ((1, 1, 1, 5, 5, 3, 3), {"window": 1}),
    "prefix": ((1, 1, 1, 70, 70, 16, 16), {"prefix": 68}),
    "prefixes, window": ((2, 1, 1, 66, 70, 8, 8), {"prefix": torch.tensor([45, -3]), "window": 9}),
    "prefix, lengths": ((2, 1, 1, 9, 40, 8, 8), {"prefix": 36, "lengths": torch.tensor([34, 1])}),
    "positions": ((2, 1, 1, 66, 70, 8, 8), {"positions": left_padded(70, 0, 6), "prefix": 33, "window": 30}),
    "positions, all, lengths": ((2, 1, 1, 9, 40, 8, 8), {"positions": left_padded(40, 35, 2), "causal": False,
                                                      "lengths": torch.tensor([39, 40])}),
    "one query": ((2, 2, 1, 1, 35, 16, 16), {}),
    "more queries than keys": ((1, 1, 1, 9, 4, 8, 8), {}),
}


@interpreter
@pytest.mark.parametrize("case", CASES)
def test_attend_equals_its_twin(case):
    shape, masks = CASES[case]
    assert_agree(attend, attend_reference, inputs(*shape), **masks)


@interpreter
@pytest.mark.parametrize("dtype, near", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_attend_in_half_precision(dtype, near):
    """Weights and their gradients are rounded to the inputs' type before the second products, the twin's are not:
    errors of a few units of the last place, 2^-11 and 2^-8 (the interpreter's stores in bfloat16 also truncate)."""
    assert_agree(attend, attend_reference, inputs(1, 2, 1, 35, 40, 16, 16, dtype=dtype), near=near)


@interpreter
def test_attend_at_extreme_scores():
    """Scores to 6e4 have a last place of 2^-8, and so have the weights of keys that nearly tie; nothing overflows."""
    q, k, v = inputs(1, 1, 1, 20, 40, 16, 16)
    q = (q.detach() * 1e4).requires_grad_()
    assert_agree(attend, attend_reference, (q, k, v), near=1e-2)
    with interpreted():
        found = results(attend, (q, (k.detach() * 1e4).requires_grad_(), v))
    assert all(t.isfinite().all() for t in found)


@interpreter
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none():
    tensors = inputs(2, 1, 1, 6, 6, 8, 8)
    for masks in ({"lengths": torch.tensor([0, 6])}, {"positions": left_padded(6, 6, 0)}):
        for way in (attend_reference, attend):
            with interpreted():
                found = results(way, tensors, **masks)
            assert all((t[0] == 0).all() and t[1].abs().max() > 0 for t in found)


@interpreter
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_blocks_outside_the_mask_are_not_read():
    """NaN in keys, values and gradients that the window does not reach would spoil what reads them."""
    sizes = ka.blocks("forward", 8, 8, 4, ka.limit_of(torch.ones(1)))
    T = 4 * sizes["BT"]
    q, k, v = inputs(1, 1, 1, T, T, 8, 8)
    seen = slice(T // 2, T // 2 + sizes["BT"])  # the block of queries, then of keys, that is looked at
    with torch.no_grad():
        for t in (k, v):
            t[:, :, :T // 2 - sizes["BS"]] = math.nan
            t[:, :, seen.stop:] = math.nan
    with interpreted():
        y = attend(q, k, v, window=sizes["BS"])
        assert y[:, :, seen].isfinite().all()
        dy = torch.zeros_like(y)
        dq, = torch.autograd.grad(y, q, dy, retain_graph=True)
        assert dq[:, :, seen].isfinite().all()
        q, k, v = inputs(1, 1, 1, T, T, 8, 8)
        y = attend(q, k, v, window=sizes["BS"])
        dy[:, :, :seen.start] = math.nan
        dy[:, :, seen.stop + sizes["BS"]:] = math.nan
        dk, dv = torch.autograd.grad(y, (k, v), dy)
    assert dk[:, :, seen].isfinite().all() and dv[:, :, seen].isfinite().all()


@interpreter
def test_padded_keys_may_be_garbage():
    q, k, v = inputs(2, 1, 1, 4, 20, 8, 8)
    lengths = torch.tensor([13, 20])
    want = results(attend_reference, (q, k, v), lengths=lengths)
    with torch.no_grad():
        k[0, :, 13:], v[0, :, 13:] = math.nan, math.inf
    with interpreted():
        found = results(attend, (q, k, v), lengths=lengths)
        one = attend_one(q.detach(), k.detach(), v.detach(), lengths)
    for mine, other in zip(found, want):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert one.isfinite().all()


@interpreter
@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 3, 8, 8), (1, 2, 1, 0, 3, 8, 8), (2, 2, 1, 3, 0, 8, 8)])
def test_empty_tensors(shape):
    tensors = inputs(*shape)
    with interpreted():
        y, *grads = results(attend, tensors, causal=False)
        one = attend_one(*(t.detach() for t in tensors))
    assert y.shape == one.shape == (shape[0], shape[1], shape[3], shape[6])
    assert (y == 0).all() and (one == 0).all() and all((g == 0).all() for g in grads)


def test_outputs_and_gradients_lie_as_inputs():
    x = torch.empty(2, 5, 3, 4, 8).permute(0, 2, 3, 1, 4)
    assert ka.empty_beside(x, 2, 3, 4, 5, 7).permute(0, 3, 1, 2, 4).is_contiguous()
    assert ka.empty_beside(torch.empty(2, 3, 8), 2, 3, 8).is_contiguous()
    repeated = torch.empty(2, 1, 3, 8).expand(2, 4, 3, 8)
    assert ka.empty_beside(repeated, 2, 4, 3, 8).transpose(0, 1).is_contiguous()


# --- Differential ---

@interpreter
@pytest.mark.parametrize("lam", [torch.tensor(0.4), torch.tensor([0.4, -0.2])], ids=["one", "of each pair"])
def test_differential_equals_its_twin(lam):
    tensors = inputs(1, 4, 2, 11, 35, 8, 8)[:2] + [inputs(1, 4, 1, 11, 35, 8, 16)[2]]
    assert_agree(attend_differential, attend_differential_reference, tensors, lam.requires_grad_(), window=20)


@pytest.mark.parametrize("way", [attend_differential_reference,
                                 pytest.param(attend_differential, marks=interpreter)])
def test_differential_is_the_mixers(way):
    """Output, and gradients of queries, keys, values and the four vectors of lambda."""
    torch.manual_seed(0)
    mixer = Transformer(TransformerConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, block_size=16, mixer="diff",
                                          positions="none")).blocks[0].mixer
    q, k, v = inputs(2, 4, 2, 12, 12, 8, 8)
    lambdas = [getattr(mixer, name) for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")]
    with using("torch"):
        want = mixer.attend(q, k, v, Positions(0, 12), None, causal())

    def op(q, k, v, *lambdas):
        a, b, c, d = lambdas
        lam = torch.exp((a * b).sum()) - torch.exp((c * d).sum()) + mixer.lambda_init
        pairs = v.unflatten(1, (1, 2)).transpose(2, 3).flatten(3)  # (B, 1, S, 2 D)
        y = rms_norm(way(q, k, pairs, lam)) * (1 - mixer.lambda_init)
        return y.unflatten(3, (2, 8)).transpose(2, 3).flatten(1, 2)
    if way is attend_differential:
        with interpreted():
            found = results(op, (q, k, v, *lambdas))
    else:
        found = results(op, (q, k, v, *lambdas))
    dy = draw(*want.shape, seed=3)
    for mine, other in zip(found, (want, *torch.autograd.grad(want, (q, k, v, *lambdas), dy)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


# --- Space and time ---

class Copies(TorchDispatchMode):
    """Counts the copies that are made within it."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        return function(*args, **(kwargs or {}))


def frames(B, T, S, N, H, G, D, Dv, **how):
    """q, k, v of frames, views of one projection where T = S: (B, T, N, H, D), (B, S, N, G, D), (B, S, N, G, Dv)."""
    q, both = draw(B, T, N, H, D + 3, seed=1, **how)[..., :D], draw(B, S, N, G, D + Dv, seed=2, **how)
    return [t.requires_grad_() for t in (q, both[..., :D], both[..., D:])]


WAYS = {"space": (attend_space, attend_space_reference, {}), "time": (attend_time, attend_time_reference, {}),
        "time, window": (attend_time, attend_time_reference, {"window": 3})}


@interpreter
@pytest.mark.parametrize("way", WAYS)
def test_space_and_time_equal_their_twins(way):
    op, twin, options = WAYS[way]
    T, S = (3, 3) if way == "space" else (4, 6)
    assert_agree(op, twin, frames(1, T, S, 3, 2, 1, 8, 5), **options)


@interpreter
@pytest.mark.parametrize("way", ["space", "time"])
def test_space_and_time_equal_permuted_sdpa_and_copy_nothing(way):
    tensors = frames(2, 3, 3, 2, 2, 2, 8, 8)
    order = (0, 1, 3, 2, 4) if way == "space" else (0, 2, 3, 1, 4)
    q, k, v = (t.permute(order).contiguous() for t in tensors)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=way == "time")
    want = y.permute([order.index(i) for i in range(5)])
    want = want.detach(), *torch.autograd.grad(want, tensors, draw(*want.shape, seed=3))
    with interpreted(), Copies() as copies:
        y = WAYS[way][0](*tensors)
        dy = torch.empty_like(y).copy_(draw(*y.shape, seed=3))
        grads = torch.autograd.grad(y, tensors, dy)
    assert copies.n == 0 and y.is_contiguous() and all(t.is_contiguous() for t in grads)
    for mine, other in zip((y.detach(), *grads), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


# --- Generation ---

ONE = {  # (B, H, G, T, S, D, Dv), lengths, splits
    "one": ((1, 2, 2, 1, 70, 16, 16), None, 1),
    "odd sizes, grouped, split": ((1, 6, 2, 3, 71, 20, 9), None, 3),
    "ragged": ((3, 2, 1, 2, 70, 8, 8), [70, 0, 1], 2),
    "more splits than keys": ((1, 2, 1, 1, 5, 8, 8), [3], 4),
    "many rows": ((1, 40, 1, 2, 40, 8, 130), None, 2),
    "splits by itself": ((1, 2, 1, 8, 600, 8, 8), None, None),
}


@interpreter
@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
def test_one_equals_its_twin(case, dtype, near):
    """bfloat16: weights are rounded before the second product, 2^-8, and stores truncate."""
    if dtype == torch.bfloat16 and case not in ("ragged", "odd sizes, grouped, split"):
        pytest.skip("two cases in bfloat16 are enough")
    shape, lengths, splits = ONE[case]
    lengths = None if lengths is None else torch.tensor(lengths)
    q, k, v = (t.detach() for t in inputs(*shape, dtype=dtype))
    with interpreted():
        y = attend_one(q, k, v, lengths, splits)
    assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, attend_one_reference(q, k, v, lengths), rtol=0, atol=near)


def test_one_is_attention_of_the_last_queries():
    q, k, v = (t.detach() for t in inputs(1, 2, 1, 3, 9, 8, 8))
    torch.testing.assert_close(attend_one(q, k, v), attend_reference(q, k, v))
    short = attend_one(q, k, v, torch.tensor([7]))
    torch.testing.assert_close(short, attend_reference(q, k[:, :, :7], v[:, :, :7]))


@interpreter
@pytest.mark.parametrize("rank, R, lengths", [(32, 8, None), (20, 0, [40, 3]), (150, 5, [0, 38])])
def test_latent_equals_its_twin(rank, R, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    q, held = draw(2, 3, 2, rank + R, seed=1, size=0.3), draw(2, 1, 40, rank + R, seed=2)
    with interpreted():
        y = attend_latent(q, held, rank, 0.25, lengths, 2)
    torch.testing.assert_close(y, attend_latent_reference(q, held, rank, 0.25, lengths), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [attend_latent_reference, pytest.param(attend_latent, marks=interpreter)])
def test_latent_is_the_mixers(way, monkeypatch):
    """A Latent layer generates the same with its attention replaced."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_layer=1, n_head=4, n_embd=32, block_size=32, mixer="mla", kv_rank=12,
                                          rope_dim=4, positions="rope")).eval()
    mixer, x = model.blocks[0].mixer, torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), using("torch"):
        cache = model.new_cache(2, 32)
        model(x[:, :20], cache=cache)
        fork = cache.fork()
        want = model(x[:, 20:], cache=cache)
        asked = []

        def attend(q, k, v, positions, seen, pattern, scale=None):
            asked.append(q.shape)
            with interpreted() if way is attend_latent else nullcontext():
                return way(q, k, v.size(3), scale)
        monkeypatch.setattr(mixer, "attend", attend)
        found = model(x[:, 20:], cache=fork)
    assert asked == [(2, 4, 1, 16)]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


# --- Choices and mistakes ---

@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
def test_blocks_are_powers_of_two_that_products_take(kind):
    for limit in (99 * 1024, 163 * 1024, 227 * 1024):
        for itemsize in (2, 4):
            for D, Dv in ((1, 1), (64, 64), (100, 200), (256, 256)):
                sizes = ka.blocks(kind, D, Dv, itemsize, limit)
                assert all(sizes[n] >= 16 and sizes[n].bit_count() == 1 for n in ("BT", "BS", "BD", "BDV"))
                own, loop = (sizes["BS"], sizes["BT"]) if kind == "dkv" else (sizes["BT"], sizes["BS"])
                assert itemsize * (own + sizes["num_stages"] * loop) * (sizes["BD"] + sizes["BDV"]) <= limit
                assert sizes["BD"] >= D and sizes["BDV"] >= Dv and sizes["num_stages"] >= 1


def test_shared_memory_by_capability():
    assert [ka.shared_limit(c) // 1024 for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [163, 99, 227, 227, 99]


def test_splits_fill_the_gpu():
    cpu = torch.device("cpu")
    assert ka.n_splits(1, 100, cpu) == 1 and ka.n_splits(1, 256 * 9, cpu) == 9
    assert ka.n_splits(1, 10 ** 6, cpu) == 128 and ka.n_splits(54, 10 ** 6, cpu) == 4
    assert ka.n_splits(10 ** 4, 10 ** 6, cpu) == 1


def test_mistakes():
    q, k, v = (t.detach() for t in inputs(2, 4, 2, 5, 6, 8, 8))
    lam = torch.tensor(0.1)
    wrong = [
        lambda: attend(q[0], k, v), lambda: attend(q, k[..., :4], v), lambda: attend(q[:1], k, v),
        lambda: attend(q, k[:, :, :3], v), lambda: attend(q[:, :3], k, v), lambda: attend(q.double(), k, v),
        lambda: attend(q.long(), k.long(), v.long()), lambda: attend(q, k, v.repeat(1, 1, 1, 33)),
        lambda: attend(q, k, v, causal=False, window=3), lambda: attend(q, k, v, causal=False, prefix=3),
        lambda: attend(q, k, v, window=0), lambda: attend(q, k, v, lengths=torch.tensor([1])),
        lambda: attend(q, k, v, prefix=torch.tensor([1, 2, 3])),
        lambda: attend(q, k, v, positions=left_padded(5, 0, 0)),
        lambda: attend(k[:, :, :1].repeat(1, 1, 7, 1), k, v, positions=left_padded(6, 0, 0)),
        lambda: attend_differential(q[:, :3], k, v, lam), lambda: attend_differential(q, k, v, lam),
        lambda: attend_differential(q, k, v[:, :1], torch.ones(3)),
        lambda: attend_space(q, k, v), lambda: attend_time(q, k, v),
        lambda: attend_space(q[None], k[None, :, :, :5], v[None]),
        lambda: attend_time(*(t[None] for t in (q, q, q)), window=0),
        lambda: attend_one(q, k, v, splits=0), lambda: attend_one(q.clone().requires_grad_(), k, v),
        lambda: attend_one(q, k, v, lengths=torch.tensor([1])),
        lambda: attend_latent(q, k, 4, 1.0), lambda: attend_latent(q, k[:, :1], 0, 1.0),
        lambda: attend_latent(q, k[:, :1], 9, 1.0), lambda: attend_latent(q.repeat(1, 1, 1, 100), k[:, :1], 600, 1.0),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


# --- Twins ---

TWIN_MASKS = {
    "causal": {}, "all": {"causal": False}, "window": {"window": 2}, "prefix": {"prefix": torch.tensor([3, 0])},
    "prefix, window": {"prefix": 4, "window": 2}, "lengths": {"lengths": torch.tensor([0, 4])},
    "positions": {"positions": left_padded(5, 3, 1)},
}


@pytest.mark.parametrize("masks", TWIN_MASKS)
def test_gradcheck_of_the_twin(masks):
    q, k, v = (t.detach().double().requires_grad_() for t in inputs(2, 2, 1, 3, 5, 3, 2))
    assert torch.autograd.gradcheck(lambda *t: attend_reference(*t, **TWIN_MASKS[masks]), (q, k, v))


def test_gradcheck_of_the_other_twins():
    q, k = (t.detach().double().requires_grad_() for t in inputs(1, 4, 2, 3, 4, 2, 2)[:2])
    v = draw(1, 1, 4, 3, dtype=torch.float64).requires_grad_()
    lam = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend_differential_reference, (q, k, v, lam))
    tensors = [t.detach().double().requires_grad_() for t in frames(1, 2, 2, 3, 2, 1, 2, 3)]
    assert torch.autograd.gradcheck(attend_space_reference, tensors)
    assert torch.autograd.gradcheck(lambda *t: attend_time_reference(*t, window=2), tensors)


@pytest.mark.parametrize("masks", [{}, {"window": 3}, {"prefix": 6}, {"prefix": torch.tensor([2, 7]), "window": 4}])
def test_the_masks_are_those_of_positions(masks):
    """A chunk of 5 after 4 places, and ragged rows. Positions lets padding see padding; here it sees none."""
    positions = Positions(4, 5, prefix=masks.get("prefix"))
    pattern = causal(masks.get("window"))
    want = positions._make_mask(pattern, 9, None, "cpu", None, None)
    found = who_sees_whom(5, 9, **masks)
    assert (found == want).all()
    positions = left_padded(9, 5, 0)
    ragged = Positions(4, 5, positions[:, 4:], prefix=masks.get("prefix"))
    want = ragged._make_mask(pattern, 9, positions, "cpu", None, None)
    real = (positions[:, None, 4:, None] >= 0) & (positions[:, None, None, :] >= 0)
    assert (who_sees_whom(5, 9, positions=positions, **masks) == want & real).all()


@pytest.mark.parametrize("op", [attend, attend_space, attend_time])
def test_float64_and_cpu_tensors_take_the_twin(op):
    tensors = inputs(1, 2, 1, 3, 3, 4, 4, dtype=torch.float64)
    if op is not attend:
        tensors = frames(1, 3, 3, 2, 2, 1, 4, 4, dtype=torch.float64)
    twin = {attend: attend_reference, attend_space: attend_space_reference, attend_time: attend_time_reference}[op]
    assert torch.equal(op(*tensors), twin(*tensors))
    if INTERPRETED:
        with interpreted():
            assert torch.equal(op(*tensors), twin(*tensors))


# --- On a GPU ---

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case", CASES)
def test_attend_on_a_gpu(case, dtype, near):
    """Kernel, twin and compiled twin agree; half precision as in the interpreter, over longer sums."""
    (B, H, G, T, S, D, Dv), masks = CASES[case]
    masks = {name: t.cuda() if torch.is_tensor(t) else t for name, t in masks.items()}
    tensors = inputs(B, H, G, T, S, D, Dv, dtype=dtype, device="cuda")
    found = results(attend, tensors, **masks)
    torch.compiler.reset()  # a new set of masks is a new program
    for twin in (attend_reference, torch.compile(attend_reference)):
        for mine, other in zip(found, results(twin, tensors, **masks), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=near * max(1.0, float(other.abs().max())))


@pytest.mark.gpu
@pytest.mark.parametrize("D, Dv", [(64, 64), (128, 128), (128, 256), (256, 256), (80, 96)])
def test_attend_at_realistic_sizes_on_a_gpu(D, Dv):
    tensors = inputs(2, 4, 2, 500, 700, D, Dv, dtype=torch.bfloat16, device="cuda")
    found, again = (results(attend, tensors, window=300) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    for mine, other in zip(found, results(attend_reference, tensors, window=300), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=3e-2 * max(1.0, float(other.abs().max())))


@pytest.mark.gpu
def test_the_others_on_a_gpu():
    how = dict(dtype=torch.float32, device="cuda")
    q, k, _ = inputs(2, 4, 2, 50, 70, 16, 16, **how)
    v, lam = inputs(2, 4, 1, 50, 70, 16, 32, **how)[2], torch.tensor([0.3, 0.5], device="cuda", requires_grad=True)
    pairs = [(results(attend_differential, (q, k, v), lam), results(attend_differential_reference, (q, k, v), lam))]
    for op, twin, options in WAYS.values():
        tensors = frames(2, 5, 5, 7, 4, 2, 16, 8, **how)
        pairs.append((results(op, tensors, **options), results(twin, tensors, **options)))
    lengths = torch.tensor([5000, 77], device="cuda")
    with torch.no_grad():
        q, k, v = inputs(2, 8, 2, 2, 5000, 64, 64, **how)
        pairs.append(([attend_one(q, k, v, lengths)], [attend_one_reference(q, k, v, lengths)]))
        q, held = draw(2, 16, 1, 576, size=0.1, **how), draw(2, 1, 5000, 576, **how)
        pairs.append(([attend_latent(q, held, 512, 0.1, lengths)],
                      [attend_latent_reference(q, held, 512, 0.1, lengths)]))
    for found, want in pairs:
        for mine, other in zip(found, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * max(1.0, float(other.abs().max())))


def test_the_twin_under_autocast_is_exact():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        under = attend_reference(q, k, v)
    assert torch.equal(under, attend_reference(q, k, v)) and under.dtype == torch.float32
