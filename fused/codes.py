"""Kernels for discrete codes: the nearest code, and two ways through a choice. kernels.py has their formulas.

Shapes: N rows, K codes or classes, C width of a code. Block sizes follow from shapes by the plain functions `_tile` and
`_rows`, not from a search by timing.
"""
import torch
from torch.autograd.function import once_differentiable
from triton import cdiv

from fused.ground import bounded, dot, jit, tl


# --- The nearest code ---

@jit
def _nearest(x, codes, squares, index, N, K, C: tl.constexpr, MIXED: tl.constexpr, ROWS: tl.constexpr,
             CODES: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows[:, None] < N
    x += rows[:, None] * C
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K, CODES):
        k = first + tl.arange(0, CODES)
        product = tl.zeros((ROWS, CODES), tl.float32)
        for start in range(0, C, WIDTH):
            c = start + tl.arange(0, WIDTH)
            a = tl.load(x + c[None, :], mask=here & (c[None, :] < C), other=0.0)
            b = tl.load(codes + k.to(tl.int64)[None, :] * C + c[:, None],
                        mask=(k[None, :] < K) & (c[:, None] < C), other=0.0)  # (WIDTH, CODES)
            if MIXED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            product += dot(a, b)
        square = tl.load(squares + k, mask=k < K, other=float("inf"))
        score = square[None, :] - 2 * product  # without |x|^2, in which small differences would drown
        low = tl.min(score, 1)
        at = tl.min(tl.where(score == low[:, None], k[None, :], K), 1)
        best = tl.where(low < least, at, best)  # < keeps the earlier tile where two are equal
        least = tl.where(low < least, low, least)
    tl.store(index + rows, best.to(tl.int64), mask=rows < N)


def _tile(C, dtype):
    """Sizes of a tile: 16-bit products fill tensor cores, float32 ones are unrolled over WIDTH."""
    most, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return dict(ROWS=64, CODES=64, WIDTH=bounded(max(1, C), 16, most), num_warps=warps)


def nearest_code(x, codes):
    """x (N, C), codes (K, C) -> the number (N,) int64 of each row's nearest."""
    x, codes = x.contiguous(), codes.contiguous()
    (N, C), K = x.shape, len(codes)
    index = torch.empty(N, dtype=torch.int64, device=x.device)
    mixed = x.dtype != codes.dtype
    sizes = _tile(C, torch.float32 if mixed else x.dtype)
    _nearest[(cdiv(N, sizes["ROWS"]),)](x, codes, codes.float().square().sum(1), index, N, K, C, MIXED=mixed, **sizes)
    return index


# --- A choice: what its kernels share ---

@jit
def _read(pointer, rows, k, N, K: tl.constexpr, other):
    """The tile (ROWS, BLOCK) of a matrix (N, K), as float32."""
    here = (rows[:, None] < N) & (k[None, :] < K)
    return tl.load(pointer + rows[:, None] * K + k[None, :], mask=here, other=other).to(tl.float32)


@jit
def _noisy(logits, noise, rows, k, N, K: tl.constexpr, NOISE: tl.constexpr):
    """l + g of a tile; -inf beyond the row's end."""
    value = _read(logits, rows, k, N, K, float("-inf"))
    if NOISE:
        value += _read(noise, rows, k, N, K, 0.0)
    return value


@jit
def _write(pointer, value, rows, k, N, K: tl.constexpr):
    """That tile written."""
    tl.store(pointer + rows[:, None] * K + k[None, :], value, mask=(rows[:, None] < N) & (k[None, :] < K))


@jit
def _choose(noisy, k, K: tl.constexpr, top, code):
    """The largest value so far and the first place (ROWS,) where it is; place 0 where there is nothing but -inf."""
    most = tl.max(noisy, 1)
    at = tl.min(tl.where(noisy == most[:, None], k[None, :], K), 1)
    return tl.where(most > top, most, top), tl.where(most > top, at, code)


@jit
def _add(total, values, top, higher, temperature):
    """The sum of exp(values / temperature) relative to `top`, made relative to `higher` and grown by a tile."""
    shift = tl.where(higher == float("-inf"), 0.0, higher) / temperature  # -inf - -inf would be NaN
    values = tl.exp(values / temperature - shift[:, None])
    return total * tl.exp(top / temperature - shift) + tl.sum(values, 1)


@jit
def _one_hot(k, code, top, total):
    """1 where k is the code, 0 elsewhere; NaN in a row whose softmax is: one of -inf only, or with inf or NaN."""
    return tl.where(k[None, :] == code[:, None], 1.0, 0.0) + 0.0 * (top + total)[:, None]


def _rows(K):
    """Sizes of a tile of 1024 values, of several rows where these are short; longer rows take several tiles."""
    block = bounded(K, 16, 1024)
    return dict(ROWS=1024 // block, BLOCK=block, num_warps=4)


def _matrix(x, like):
    """x (..., K) -> (N, K) contiguous; None stays None, of which kernels see `like` that they do not read."""
    return like if x is None else x.reshape(-1, x.shape[-1]).contiguous()


# --- Gumbel-softmax ---

@jit
def _gumbel_forward(logits, noise, y, codes, tops, totals, N, K: tl.constexpr, temperature, NOISE: tl.constexpr,
                    HARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        noisy = _noisy(logits, noise, rows, k, N, K, NOISE)
        higher, code = _choose(noisy, k, K, top, code)
        total = _add(total, noisy, top, higher, temperature)
        top = higher
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        if HARD:
            value = _one_hot(k, code, top, total)
        else:
            noisy = _noisy(logits, noise, rows, k, N, K, NOISE)
            value = tl.exp(noisy / temperature - (top / temperature)[:, None]) / total[:, None]
        _write(y, value, rows, k, N, K)
    tl.store(codes + rows, code.to(tl.int64), mask=rows < N)
    tl.store(tops + rows, top, mask=rows < N)
    tl.store(totals + rows, total, mask=rows < N)


@jit
def _gumbel_backward(logits, noise, tops, totals, grad, out, N, K: tl.constexpr, temperature, NOISE: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    top = tl.load(tops + rows, mask=rows < N, other=0.0) / temperature
    total = tl.load(totals + rows, mask=rows < N, other=1.0)
    inner = tl.zeros((ROWS,), tl.float32)  # y . g
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        noisy = _noisy(logits, noise, rows, k, N, K, NOISE)
        y = tl.exp(noisy / temperature - top[:, None]) / total[:, None]
        inner += tl.sum(y * _read(grad, rows, k, N, K, 0.0), 1)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        noisy = _noisy(logits, noise, rows, k, N, K, NOISE)
        y = tl.exp(noisy / temperature - top[:, None]) / total[:, None]
        g = _read(grad, rows, k, N, K, 0.0)
        _write(out, y * (g - inner[:, None]) / temperature, rows, k, N, K)


class GumbelSoftmax(torch.autograd.Function):
    """logits (..., K), noise alike or None, temperature, hard -> y and codes. Keeps logits and noise, 8 bytes a row."""

    @staticmethod
    def forward(ctx, logits, noise, temperature, hard):
        flat = _matrix(logits, None)
        noisy = _matrix(noise, flat)
        N, K = flat.shape
        y, codes = torch.empty_like(flat), torch.empty(N, dtype=torch.int64, device=flat.device)
        tops, totals = torch.empty(2, N, dtype=torch.float32, device=flat.device)
        sizes = _rows(K)
        _gumbel_forward[(cdiv(N, sizes["ROWS"]),)](flat, noisy, y, codes, tops, totals, N, K, temperature,
                                                   NOISE=noise is not None, HARD=hard, **sizes)
        codes = codes.view(logits.shape[:-1])
        ctx.save_for_backward(flat, noisy, tops, totals)
        ctx.temperature, ctx.noise = temperature, noise is not None
        ctx.mark_non_differentiable(codes)
        return y.view(logits.shape), codes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        flat, noisy, tops, totals = ctx.saved_tensors
        N, K = flat.shape
        out = torch.empty_like(flat)
        sizes = _rows(K)
        _gumbel_backward[(cdiv(N, sizes["ROWS"]),)](flat, noisy, tops, totals, _matrix(grad, None), out, N, K,
                                                    ctx.temperature, NOISE=ctx.noise, **sizes)
        return out.view(grad.shape), None, None, None


# --- ReinMax ---

@jit
def _reinmax_forward(logits, noise, y, codes, tops, plain, soft, N, K: tl.constexpr, temperature, NOISE: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.full((ROWS,), float("-inf"), tl.float32)  # of l + g
    code = tl.zeros((ROWS,), tl.int32)
    top = most  # of l
    total = tl.zeros((ROWS,), tl.float32)  # of exp(l), relative to the top
    softer = total  # of exp(l / temperature)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = _read(logits, rows, k, N, K, float("-inf"))
        higher = tl.maximum(top, tl.max(value, 1))
        total = _add(total, value, top, higher, 1.0)
        softer = _add(softer, value, top, higher, temperature)
        top = higher
        most, code = _choose(_noisy(logits, noise, rows, k, N, K, NOISE), k, K, most, code)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        _write(y, _one_hot(k, code, top, total), rows, k, N, K)
    tl.store(codes + rows, code.to(tl.int64), mask=rows < N)
    tl.store(tops + rows, top, mask=rows < N)
    tl.store(plain + rows, total, mask=rows < N)
    tl.store(soft + rows, softer, mask=rows < N)


@jit
def _halves(logits, rows, k, N, K: tl.constexpr, code, top, total, softer, temperature):
    """p0 = softmax(l) and p1 = (one-hot + softmax(l / temperature)) / 2 of a tile."""
    value = _read(logits, rows, k, N, K, float("-inf"))
    p0 = tl.exp(value - top[:, None]) / total[:, None]
    q = tl.exp(value / temperature - (top / temperature)[:, None]) / softer[:, None]
    return p0, (tl.where(k[None, :] == code[:, None], 1.0, 0.0) + q) / 2


@jit
def _reinmax_backward(logits, codes, tops, plain, soft, grad, out, N, K: tl.constexpr, temperature, ROWS: tl.constexpr,
                      BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code = tl.load(codes + rows, mask=rows < N, other=0).to(tl.int32)
    top = tl.load(tops + rows, mask=rows < N, other=0.0)
    total = tl.load(plain + rows, mask=rows < N, other=1.0)
    softer = tl.load(soft + rows, mask=rows < N, other=1.0)
    inner0 = tl.zeros((ROWS,), tl.float32)  # p0 . g
    inner1 = tl.zeros((ROWS,), tl.float32)  # p1 . g
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p0, p1 = _halves(logits, rows, k, N, K, code, top, total, softer, temperature)
        g = _read(grad, rows, k, N, K, 0.0)
        inner0 += tl.sum(p0 * g, 1)
        inner1 += tl.sum(p1 * g, 1)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p0, p1 = _halves(logits, rows, k, N, K, code, top, total, softer, temperature)
        g = _read(grad, rows, k, N, K, 0.0)
        _write(out, 2 * p1 * (g - inner1[:, None]) - p0 * (g - inner0[:, None]) / 2, rows, k, N, K)


class ReinMax(torch.autograd.Function):
    """logits (..., K), noise alike or None, temperature -> y and codes. Keeps logits and codes, 12 bytes a row."""

    @staticmethod
    def forward(ctx, logits, noise, temperature):
        flat = _matrix(logits, None)
        N, K = flat.shape
        y, codes = torch.empty_like(flat), torch.empty(N, dtype=torch.int64, device=flat.device)
        tops, plain, soft = torch.empty(3, N, dtype=torch.float32, device=flat.device)
        sizes = _rows(K)
        _reinmax_forward[(cdiv(N, sizes["ROWS"]),)](flat, _matrix(noise, flat), y, codes, tops, plain, soft, N, K,
                                                    temperature, NOISE=noise is not None, **sizes)
        codes = codes.view(logits.shape[:-1])
        ctx.save_for_backward(flat, codes, tops, plain, soft)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(codes)
        return y.view(logits.shape), codes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        flat, codes, tops, plain, soft = ctx.saved_tensors
        N, K = flat.shape
        out = torch.empty_like(flat)
        sizes = _rows(K)
        _reinmax_backward[(cdiv(N, sizes["ROWS"]),)](flat, codes, tops, plain, soft, _matrix(grad, None), out, N, K,
                                                     ctx.temperature, **sizes)
        return out.view(grad.shape), None, None
