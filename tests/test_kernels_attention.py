"""What is particular to attention's kernels: what is not read, memory, block sizes.

Their values and gradients beside the formulas': test_kernels.py.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import frames, heads, left_padded, made
from interpreter import by_kernel, formula, interpreted, kernels_of, needs_interpreter, results
from kernels import (attend, attend_differential, attend_latent, attend_one, attend_space, attend_time, using,
                     who_sees_whom)
from model import Positions, causal

pytestmark = pytest.mark.usefixtures("one_thread", "by_triton")
ka = kernels_of("attention")
WAYS = pytest.mark.parametrize("way", ["formula", pytest.param("kernel", marks=needs_interpreter)])


def going(way):
    """Within it attention goes by kernel, or by the formula."""
    return by_kernel("cpu") if way == "kernel" else using("torch")


# --- What is seen ---

@WAYS
@pytest.mark.parametrize("masks", [{"lengths": torch.tensor([0, 6])}, {"positions": left_padded(6, 6, 0)}], ids=list)
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none(masks, way):
    with going(way):
        out, gradients, _ = results(lambda *heads: attend(*heads, **masks), made(*heads(2, 1, 1, 3, 6, 8, 8)))
    assert all((t[0] == 0).all() and t[1].abs().max() > 0 for t in (*out, *gradients))


@needs_interpreter
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_blocks_outside_the_mask_are_not_read():
    """NaN in keys, values and gradients that the window does not reach would spoil what reads them."""
    sizes = ka.blocks("forward", 8, 8, 4, ka.limit_of(torch.ones(1)))
    T, BS = 4 * sizes["BT"], sizes["BS"]
    seen = slice(T // 2, T // 2 + sizes["BT"])  # the block of queries, then of keys, that is looked at
    tensors = made(*heads(1, 1, 1, T, T, 8, 8))
    q, k, v = (t.clone().requires_grad_() for t in tensors)
    spoilt = [t.index_fill(2, torch.tensor([*range(T // 2 - BS), *range(seen.stop, T)]), math.nan) for t in tensors]
    with interpreted():
        y = attend(q, *spoilt[1:], window=BS)
        dq, = torch.autograd.grad(y, q, torch.zeros_like(y))
        whole = attend(q, k, v, window=BS)
        dy = torch.zeros_like(y).index_fill(2, torch.tensor([*range(seen.start), *range(seen.stop + BS, T)]), math.nan)
        dk, dv = torch.autograd.grad(whole, (k, v), dy)
    assert attend(q, *spoilt[1:], window=BS)[:, :, seen].isnan().all()  # as the formula reads them
    assert all(t[:, :, seen].isfinite().all() for t in (y, dq, dk, dv))


@needs_interpreter
def test_padded_keys_may_be_garbage():
    lengths = torch.tensor([13, 20])
    q, k, v = made(*heads(2, 1, 1, 4, 20, 8, 8))
    out, gradients, upstream = results(lambda *heads: formula(attend)(*heads, lengths=lengths), (q, k, v))
    k[0, :, 13:], v[0, :, 13:] = math.nan, math.inf
    with interpreted():
        found, theirs, _ = results(lambda *heads: attend(*heads, lengths=lengths), (q, k, v), upstream)
        one = attend_one(q, k, v, lengths)
    torch.testing.assert_close(found + theirs, out + gradients, rtol=0, atol=1e-5)
    assert one.isfinite().all()


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


def test_one_is_attention_of_the_last_queries():
    q, k, v = made(*heads(1, 2, 1, 3, 9, 8, 8))
    torch.testing.assert_close(attend_one(q, k, v), formula(attend)(q, k, v))
    short = attend_one(q, k, v, torch.tensor([7]))
    torch.testing.assert_close(short, formula(attend)(q, k[:, :, :7], v[:, :, :7]))


def test_the_formula_under_autocast_is_exact():
    tensors = made(*heads(1, 2, 2, 5, 5, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        under = formula(attend)(*tensors)
    assert torch.equal(under, formula(attend)(*tensors)) and under.dtype == torch.float32


# --- Memory ---

@needs_interpreter
def test_outputs_and_gradients_lie_as_inputs():
    x = torch.empty(2, 5, 3, 4, 8).permute(0, 2, 3, 1, 4)
    assert ka.empty_beside(x, 2, 3, 4, 5, 7).permute(0, 3, 1, 2, 4).is_contiguous()
    assert ka.empty_beside(torch.empty(2, 3, 8), 2, 3, 8).is_contiguous()
    with interpreted():
        y = attend_one(*made(*heads(3, 2, 1, 2, 70, 8, 8), dtype=torch.bfloat16), splits=2)
    assert y.dtype == torch.bfloat16 and y.transpose(1, 2).is_contiguous()
    repeated = torch.empty(2, 1, 3, 8).expand(2, 4, 3, 8)
    assert ka.empty_beside(repeated, 2, 4, 3, 8).transpose(0, 1).is_contiguous()


class Copies(TorchDispatchMode):
    """Counts the copies that are made within it."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        return function(*args, **(kwargs or {}))


@needs_interpreter
@pytest.mark.parametrize("op", [attend_space, attend_time])
def test_space_and_time_equal_permuted_sdpa_and_copy_nothing(op):
    tensors = made(*frames(1, 3, 3, 2, 2, 2, 8, 8))
    order = (0, 1, 3, 2, 4) if op is attend_space else (0, 2, 3, 1, 4)

    def sdpa(*tensors):
        rows = (t.permute(order).contiguous() for t in tensors)
        y = F.scaled_dot_product_attention(*rows, is_causal=op is attend_time)
        return y.permute([order.index(i) for i in range(5)])
    want, gradients, upstream = results(sdpa, tensors)
    dy = torch.empty(want[0].shape).copy_(upstream[0])
    with interpreted(), Copies() as copies:
        found, theirs, _ = results(op, tensors, [dy])
    assert copies.n == 0 and all(t.is_contiguous() for t in found + theirs)
    torch.testing.assert_close(found + theirs, want + gradients, rtol=0, atol=1e-5)


# --- Choices and mistakes ---

def test_shared_memory_by_capability():
    assert [ka.shared_limit(c) // 1024 for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        64, 163, 99, 227, 227, 99]


def test_splits_fill_the_gpu():
    for programs, keys, splits in ((1, 100, 1), (1, 256 * 9, 9), (1, 10 ** 6, 128), (54, 10 ** 6, 4),
                                   (10 ** 4, 10 ** 6, 1)):
        assert ka.n_splits(programs, keys, torch.device("cpu")) == splits


def test_mistakes():
    q, k, v = made(*heads(2, 4, 2, 5, 6, 8, 8))
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
