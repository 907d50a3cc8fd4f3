"""Fused operations on discrete codes, each beside its PyTorch twin: the nearest code, and two ways through a choice.

Formulas and words are those of discrete.py, whose `choose` draws the noise; see kernels.py for what an operation is.
Shapes: N rows, K codes or classes, C width of a code.

Block sizes follow from shapes by the plain functions `_tile` and `_rows`, not from a search by timing: no kernel here
has been timed on a GPU yet.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import by_triton, dot, exactly, jit, power_of_2, tl, triton

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what kernels read; float64 is left to the twins


# --- The nearest code ---

@jit
def _nearest(x, codes, squares, index, distance, N, K, C: tl.constexpr, MIXED: tl.constexpr,
             ROWS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows[:, None] < N
    x += rows[:, None] * C
    own = tl.zeros((ROWS,), tl.float32)  # |x|^2
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)[None, :]
        part = tl.load(x + c, mask=here & (c < C), other=0.0).to(tl.float32)
        own += tl.sum(part * part, 1)
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
        score = square[None, :] - 2 * product  # less |x|^2, in which small differences would drown
        low = tl.min(score, 1)
        at = tl.min(tl.where(score == low[:, None], k[None, :], K), 1)
        best = tl.where(low < least, at, best)  # < keeps the earlier tile where two are equal
        least = tl.where(low < least, low, least)
    tl.store(index + rows, best.to(tl.int64), mask=rows < N)
    far = least + own
    tl.store(distance + rows, tl.where(far < 0, 0.0, far), mask=rows < N)


def _tile(C, dtype):
    """(ROWS, CODES, WIDTH), num_warps: 16-bit products fill tensor cores, float32 ones are unrolled over WIDTH."""
    width = max(16, power_of_2(max(1, C)))
    return ((64, 64, min(width, 32)), 8) if dtype == torch.float32 else ((64, 64, min(width, 64)), 4)


@torch.no_grad()
def nearest_code_reference(x, codes):
    """The twin of `nearest_code`; it makes the (N, K) table of distances. float64 stays float64."""
    _check_codes(x, codes)
    x, codes = exactly(x), exactly(codes)
    score = codes.square().sum(1) - 2 * (x @ codes.T)  # (N, K)
    index = score.argmin(1)
    least = score.gather(1, index[:, None])[:, 0]
    return index, (least + x.square().sum(1)).clamp(min=0)


@torch.no_grad()
def nearest_code(x, codes):
    """x (N, C), codes (K, C) -> the nearest code's number (N,) int64, and its squared distance (N,) float32.

    |x|^2 - 2 x.c + |c|^2 (van den Oord et al. 2017 take its argmin), x.c summed in float32, float32 not rounded to
    TF32. Of equally near codes the first counts where these sums are exact, as of small integers; otherwise rounding
    decides, which may differ from place to place even among equal codes (a BLAS sums its last columns in another
    order). The distance is cut at 0, below which rounding may bring it; it loses digits where it is small beside
    |x|^2. Neither result has a gradient: a commitment loss takes x - codes[index].
    x and codes: float32 or 16-bit, not necessarily the same; no NaN among the codes. Beside the results the kernel
    needs 4 K bytes, never a table (N, K). ValueError: other shapes than these, no codes.
    """
    _check_codes(x, codes)
    if not (by_triton(x) and len(x) and x.dtype in FLOATS and codes.dtype in FLOATS):
        return nearest_code_reference(x, codes)
    x, codes = x.contiguous(), codes.contiguous()
    (N, C), K = x.shape, len(codes)
    index = torch.empty(N, dtype=torch.int64, device=x.device)
    distance = torch.empty(N, dtype=torch.float32, device=x.device)
    mixed = x.dtype != codes.dtype
    (rows, tile, width), warps = _tile(C, torch.float32 if mixed else x.dtype)
    _nearest[(triton.cdiv(N, rows),)](x, codes, codes.float().square().sum(1), index, distance, N, K, C, MIXED=mixed,
                                      ROWS=rows, CODES=tile, WIDTH=width, num_warps=warps)
    return index, distance


def _check_codes(x, codes):
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] != codes.shape[1] or not len(codes):
        raise ValueError(f"nearest_code takes x (N, C) and codes (K, C) with K > 0, not {tuple(x.shape)} and "
                         f"{tuple(codes.shape)}")


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
    """(ROWS, BLOCK), num_warps: tiles of 1024 values, several rows where these are short; longer ones in several."""
    block = min(max(16, power_of_2(K)), 1024)
    return (1024 // block, block), 4


def _matrix(x, like):
    """x (..., K) -> (N, K) contiguous; None stays None, of which kernels see `like` that they do not read."""
    return like if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _check_choice(logits, noise):
    if not logits.ndim or not logits.shape[-1] or noise is not None and noise.shape != logits.shape:
        raise ValueError(f"logits (..., K) with K > 0 and noise of the same shape are wanted, not "
                         f"{tuple(logits.shape)} and {None if noise is None else tuple(noise.shape)}")


def _by_kernel(logits, noise):
    return (by_triton(logits) and logits.numel() and logits.dtype in FLOATS
            and (noise is None or noise.dtype in FLOATS))


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


class _GumbelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, noise, temperature, hard):
        flat = _matrix(logits, None)
        noisy = _matrix(noise, flat)
        N, K = flat.shape
        y, codes = torch.empty_like(flat), torch.empty(N, dtype=torch.int64, device=flat.device)
        tops, totals = torch.empty(2, N, dtype=torch.float32, device=flat.device)
        (rows, block), warps = _rows(K)
        _gumbel_forward[(triton.cdiv(N, rows),)](flat, noisy, y, codes, tops, totals, N, K, temperature,
                                                 NOISE=noise is not None, HARD=hard, ROWS=rows, BLOCK=block,
                                                 num_warps=warps)
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
        (rows, block), warps = _rows(K)
        _gumbel_backward[(triton.cdiv(N, rows),)](flat, noisy, tops, totals, _matrix(grad, None), out, N, K,
                                                  ctx.temperature, NOISE=ctx.noise, ROWS=rows, BLOCK=block,
                                                  num_warps=warps)
        return out.view(grad.shape), None, None, None


def gumbel_softmax_reference(logits, noise, temperature, hard):
    """The twin of `gumbel_softmax`."""
    _check_choice(logits, noise)
    noisy = exactly(logits) if noise is None else exactly(logits) + exactly(noise.detach())
    codes = noisy.argmax(-1)
    y = torch.softmax(noisy / temperature, -1)
    if hard:
        y = F.one_hot(codes, y.shape[-1]).to(y.dtype) + (y - y.detach())
    return y.to(logits.dtype), codes


def gumbel_softmax(logits, noise, temperature, hard):
    """logits (..., K), noise alike or None -> y (..., K) in place of a one-hot code, and the codes (...) int64.

    As discrete.choose: the code is the argmax of the float32 sums l + g, the first of equal ones;
    y = softmax((l + g) / temperature) (Jang et al. 2017, Maddison et al. 2017), or, where hard, one-hot going forward
    and that softmax going backward.
    noise: Gumbel noise g (discrete.gumbel_like), times its weight; None: none, the mode. It gets no gradient. y is of
    the logits' dtype, computed in float32. A row of -inf alone is NaN, as in torch.softmax.
    Going backward the kernel computes the softmax again: it keeps logits and noise, and 8 bytes a row.
    temperature: a number > 0, else ValueError, as for shapes that do not fit. No second derivative.
    """
    _check_choice(logits, noise)
    if not temperature > 0:
        raise ValueError(f"gumbel_softmax needs a temperature above 0, not {temperature}")
    if _by_kernel(logits, noise):
        return _GumbelSoftmax.apply(logits, noise, float(temperature), bool(hard))
    return gumbel_softmax_reference(logits, noise, temperature, hard)


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


class _ReinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, noise, temperature):
        flat = _matrix(logits, None)
        N, K = flat.shape
        y, codes = torch.empty_like(flat), torch.empty(N, dtype=torch.int64, device=flat.device)
        tops, plain, soft = torch.empty(3, N, dtype=torch.float32, device=flat.device)
        (rows, block), warps = _rows(K)
        _reinmax_forward[(triton.cdiv(N, rows),)](flat, _matrix(noise, flat), y, codes, tops, plain, soft, N, K,
                                                  temperature, NOISE=noise is not None, ROWS=rows, BLOCK=block,
                                                  num_warps=warps)
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
        (rows, block), warps = _rows(K)
        _reinmax_backward[(triton.cdiv(N, rows),)](flat, codes, tops, plain, soft, _matrix(grad, None), out, N, K,
                                                   ctx.temperature, ROWS=rows, BLOCK=block, num_warps=warps)
        return out.view(grad.shape), None, None


def reinmax_reference(logits, noise, temperature=1.0):
    """The twin of `reinmax`."""
    _check_choice(logits, noise)
    wide = exactly(logits)
    codes = (wide if noise is None else wide + exactly(noise.detach())).argmax(-1)
    one_hot = F.one_hot(codes, wide.shape[-1]).to(wide.dtype)
    p0 = torch.softmax(wide, -1)
    p1 = (one_hot + torch.softmax(wide / temperature, -1)) / 2
    # a function of the logits with the value p1 and the Jacobian of a softmax there; -inf is cut, as it has no change
    change = wide.clamp(min=torch.finfo(wide.dtype).min)
    change = change - change.detach()
    p1 = torch.softmax(p1.detach().clamp(min=torch.finfo(p1.dtype).tiny).log() + change, -1)
    surrogate = 2 * p1 - p0 / 2
    return (one_hot + (surrogate - surrogate.detach())).to(logits.dtype), codes


def reinmax(logits, noise, temperature=1.0):
    """logits (..., K), noise alike or None -> one-hot y (..., K) with ReinMax's gradient, and the codes (...) int64.

    As discrete.choose: the code is the argmax of the float32 sums l + g, the first of equal ones. Going backward
    (Liu et al. 2023, algorithm 2) g -> 2 J(p1) g - J(p0) g / 2 with J(p) = diag(p) - p p^T, p0 = softmax(l) and
    p1 = (one-hot + softmax(l / temperature)) / 2. noise: see `gumbel_softmax`. A logit of -inf has no gradient
    (discrete.reinmax gives NaN there); a row of -inf alone is NaN.
    Going backward the kernel computes both softmaxes again: it keeps logits and codes, and 12 bytes a row.
    ValueError: temperature below 1, of which the paper warns; shapes that do not fit. No second derivative.
    """
    _check_choice(logits, noise)
    if not temperature >= 1:
        raise ValueError(f"reinmax needs a temperature of at least 1, not {temperature}")
    if _by_kernel(logits, noise):
        return _ReinMax.apply(logits, noise, float(temperature))
    return reinmax_reference(logits, noise, temperature)
