"""Fused Triton operations, each beside its PyTorch twin. This file: the ground they share, and the row-wise ones.

An operation `op` is four things: `op_reference`, plain PyTorch in the twin's own words, which runs anywhere and is what
the kernel is tested against; the Triton kernels; an autograd.Function around them; and `op`, which takes the Triton
way for CUDA tensors and the twin for all others. Attention is in kernels_attention.py, recurrences and experts in
kernels_scan.py, codes in kernels_codes.py, optimiser steps in kernels_optim.py.

No kernel here has been timed on a GPU yet, so none is in a model's default path: TransformerConfig.kernels "triton"
takes them. See docs/kernels.md.
Without Triton (macOS, Windows) every operation is its twin. Under TRITON_INTERPRET=1 kernels run in Triton's
interpreter on CPU tensors, inside `interpreted()`: that is how tests/ compare them with their twins.
"""
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # every operation is its twin
    triton = None

    class tl:  # so that signatures below can be read
        """What stands for triton.language where there is none."""
        constexpr = None

    def jit(function):
        """The function itself: nothing calls it."""
        return function

# --- The ground ---

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRETED) if triton else False  # the interpreter multiplies bfloat16 bits as if integers
_here = [False]


@contextmanager
def interpreted():
    """Within it, operations on CPU tensors take their kernels, in Triton's interpreter.

    Raises RuntimeError where TRITON_INTERPRET=1 was not set before kernels.py was imported.
    """
    if not INTERPRETED:
        raise RuntimeError("kernels run on CPU tensors only where TRITON_INTERPRET=1 was set before kernels.py")
    _here[0] = True
    try:
        yield
    finally:
        _here[0] = False


def by_triton(x):
    """Whether an operation on tensor x takes its kernel: on a GPU, or inside `interpreted()`."""
    return triton is not None and (x.is_cuda or _here[0])


@jit
def dot(a, b):
    """a (M, K) @ b (K, N) summed in float32, whatever a and b are; float32 is not rounded to TF32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def power_of_2(n):
    """The smallest power of 2 that is at least n (an int from 1)."""
    return 1 << (n - 1).bit_length()


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def fits(x):
    """Whether an operation on x takes its kernel: not where x is empty, nor in float64, which kernels would round."""
    return by_triton(x) and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def as_rows(x):
    """x (..., C) as (rows, C), features side by side; a copy only where strides leave no other way."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()


def exactly(x):
    """x in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- Norms ---

WIDEST = 8192  # features of a row that one program holds
PROGRAMS = 256  # of a norm's backward pass at most: each keeps partial sums for gain and bias


def norm_blocks(C):
    """(rows of a tile, its columns, warps) for rows of C features: one row of many, several of few."""
    columns = power_of_2(C)
    rows = max(1, 2048 // columns)
    return rows, columns, 4 if rows * columns <= 2048 else 8 if columns <= 4096 else 16


@jit
def norm_forward(x, residual, gain, bias, y, s, means, scales, n, C, x_stride, residual_stride, eps,
                 CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of rows: s = x + residual if there is one, y = norm(s). Keeps 1 / deviation, and if CENTRED the mean."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < C)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside,
                         other=0.0).to(tl.float32)
        rounded = value.to(s.dtype.element_ty)  # the norm is of what is kept: the backward pass sees no other
        tl.store(s + row[:, None] * C + column[None, :], rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(value, 1) / C
        tl.store(means + row, mean, mask=row < n)
        value = tl.where(inside, value - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / C + eps)
    tl.store(scales + row, scale, mask=row < n)
    out = value * scale[:, None]
    if gain is not None:
        out *= tl.load(gain + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * C + column[None, :], out.to(y.dtype.element_ty), mask=inside)


@jit
def norm_backward(s, gain, bias, means, scales, dy, ds, dx, gain_sums, bias_sums, n, C, s_stride, dy_stride, ds_stride,
                  CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dx of every so manieth tile of rows, and this program's sums for gain and bias (one row of C each).

    With z = (s - mean) scale and w = gain dy: dx = scale (w - z mean(w z) - mean(w)) + ds, the last mean if CENTRED.
    """
    column = tl.arange(0, COLUMNS)
    there = column < C
    if gain is not None:
        factor = tl.load(gain + column, mask=there, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n)[:, None] & there[None, :]
        z = tl.load(s + row[:, None] * s_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            z -= tl.load(means + row, mask=row < n, other=0.0)[:, None]
        scale = tl.load(scales + row, mask=row < n, other=0.0)[:, None]
        z *= scale
        w = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            bias_sum += w
        if gain is not None:
            gain_sum += w * z
            w *= factor[None, :]
        out = w - z * (tl.sum(w * z, 1) / C)[:, None]
        if CENTRED:
            out -= (tl.sum(w, 1) / C)[:, None]
        out *= scale
        if ds is not None:
            out += tl.load(ds + row[:, None] * ds_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * C + column[None, :], out.to(dx.dtype.element_ty), mask=inside)
    place = tl.program_id(0) * C + column
    if gain is not None:
        tl.store(gain_sums + place, tl.sum(gain_sum, 0), mask=there)
    if bias is not None:
        tl.store(bias_sums + place, tl.sum(bias_sum, 0), mask=there)


class NormRows(torch.autograd.Function):
    """The kernels of both norms. Keeps s, and one or two float32 numbers per row."""

    @staticmethod
    def forward(ctx, x, residual, gain, bias, eps, centred):
        """x (..., C): y, or (y, s) with a residual."""
        C, shape, dtype = x.size(-1), x.shape, x.dtype
        x = as_rows(x)
        rows, columns, warps = norm_blocks(C)
        s, gain, bias = x, *(None if p is None else p.contiguous() for p in (gain, bias))
        if residual is not None:
            dtype = torch.promote_types(dtype, residual.dtype)
            ctx.types = x.dtype, residual.dtype
            residual = as_rows(residual)
            s = torch.empty(x.shape, dtype=dtype, device=x.device)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(len(x), device=x.device)
        means = torch.empty(len(x), device=x.device) if centred else None
        norm_forward[(ceil_div(len(x), rows),)](
            x, residual, gain, bias, y, None if residual is None else s, means, scales, len(x), C, x.stride(0),
            0 if residual is None else residual.stride(0), eps, CENTRED=centred, ROWS=rows, COLUMNS=columns,
            num_warps=warps)
        ctx.save_for_backward(s, gain, bias, means, scales)
        ctx.centred, ctx.added, ctx.shape = centred, residual is not None, shape
        ctx.set_materialize_grads(False)
        return (y.view(shape), s.view(shape)) if ctx.added else y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        """Gradients of x, residual, gain and bias."""
        s, gain, bias, means, scales = ctx.saved_tensors
        dx, sums = ds, (None, None)
        if dy is not None:
            dy, ds = as_rows(dy), None if ds is None else as_rows(ds)
            (n, C), (rows, columns, warps) = s.shape, norm_blocks(s.size(1))
            programs = min(PROGRAMS, ceil_div(n, rows))
            sums = [None if p is None else torch.empty(programs, C, device=s.device) for p in (gain, bias)]
            dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
            norm_backward[(programs,)](
                s, gain, bias, means, scales, dy, ds, dx, *sums, n, C, s.stride(0), dy.stride(0),
                0 if ds is None else ds.stride(0), CENTRED=ctx.centred, ROWS=rows, COLUMNS=columns, num_warps=warps)
            dx = dx.view(ctx.shape)
        dgain, dbias = (None if part is None else part.sum(0).to(p.dtype) for part, p in zip(sums, (gain, bias)))
        if not ctx.added or dx is None:
            return dx, None, dgain, dbias, None, None
        return *(dx.to(dtype) for dtype in ctx.types), dgain, dbias, None, None


def check_norm(x, residual, gain, bias):
    """Raises ValueError where shapes do not go together."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    for name, p in (("gain", gain), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} {tuple(p.shape)} must have one number for each of x's {x.size(-1)} features")


def rms_norm_reference(x, gain=None, eps=1e-6, residual=None):
    """The twin of rms_norm."""
    s = x if residual is None else x + residual
    wide = exactly(s)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y if gain is None else y * gain).to(s.dtype)
    return y if residual is None else (y, s)


def rms_norm(x, gain=None, eps=1e-6, residual=None):
    """s / sqrt(mean(s^2) + eps) over the last dimension, times gain (Zhang & Sennrich 2019), with s = x + residual.

    x (..., C) of any float type; residual of x's shape, or None, which is 0; gain (C,). Returns y (..., C), and with a
    residual (y, s): both carry gradients, and both have the type to which x and residual promote. Sums are float32,
    rounded once; s is rounded before it is normalised. The backward pass needs one tensor of x's size, and C float32
    sums per program of at most PROGRAMS, added in a fixed order. Rows wider than WIDEST take the twin.
    Raises ValueError for shapes that do not go together.
    """
    check_norm(x, residual, gain, None)
    if fits(x) and x.size(-1) <= WIDEST:
        return NormRows.apply(x, residual, gain, None, eps, False)
    return rms_norm_reference(x, gain, eps, residual)


def layer_norm_reference(x, gain=None, bias=None, eps=1e-5, residual=None):
    """The twin of layer_norm."""
    s = x if residual is None else x + residual
    wide = exactly(s)
    wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y if gain is None else y * gain
    y = (y if bias is None else y + bias).to(s.dtype)
    return y if residual is None else (y, s)


def layer_norm(x, gain=None, bias=None, eps=1e-5, residual=None):
    """(s - mean(s)) / sqrt(var(s) + eps) over the last dimension, times gain (C,), plus bias (C,) (Ba et al. 2016), the
    variance over C. All else as rms_norm; eps as in torch.nn.functional.layer_norm."""
    check_norm(x, residual, gain, bias)
    if fits(x) and x.size(-1) <= WIDEST:
        return NormRows.apply(x, residual, gain, bias, eps, True)
    return layer_norm_reference(x, gain, bias, eps, residual)


# --- Rotary positions ---

def rotary_blocks(D):
    """(heads of a tile, its pairs of features, warps) for heads of D features."""
    pairs = power_of_2(D // 2)
    return max(1, 1024 // pairs), pairs, 4


@jit
def turn_rows(x, cos, sin, y, n, T, H, half, x_batch, x_time, x_head, table_batch, BACK: tl.constexpr,
              ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """A tile of n = B T H heads turned. BACK: by the transposed turn, which exchanges the halves of sin."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, time, head = (row // H // T).to(tl.int64), (row // H % T).to(tl.int64), (row % H).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (row < n)[:, None] & (pair < half)
    x += (batch * x_batch + time * x_time + head * x_head)[:, None] + pair
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    table = (batch * table_batch + time * (2 * half))[:, None] + pair
    cos_a = tl.load(cos + table, mask=inside, other=0.0)
    cos_b = tl.load(cos + table + half, mask=inside, other=0.0)
    sin_a = tl.load(sin + table, mask=inside, other=0.0)
    sin_b = tl.load(sin + table + half, mask=inside, other=0.0)
    y += row.to(tl.int64)[:, None] * (2 * half) + pair
    if BACK:
        tl.store(y, (a * cos_a + b * sin_b).to(y.dtype.element_ty), mask=inside)
        tl.store(y + half, (b * cos_b + a * sin_a).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(y, (a * cos_a + b * sin_a).to(y.dtype.element_ty), mask=inside)
        tl.store(y + half, (b * cos_b + a * sin_b).to(y.dtype.element_ty), mask=inside)


def turned(x, cos, sin, back):
    """x (B, T, H, D) by `turn_rows`, contiguous; cos and sin contiguous."""
    if x.stride(3) != 1:
        x = x.contiguous()
    B, T, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, pairs, warps = rotary_blocks(D)
    turn_rows[(ceil_div(B * T * H, rows),)](
        x, cos, sin, y, B * T * H, T, H, D // 2, *x.stride()[:3], 0 if cos.size(0) == 1 else T * D, BACK=back,
        ROWS=rows, PAIRS=pairs, num_warps=warps)
    return y


class Rotary(torch.autograd.Function):
    """The kernel of rotary, both ways. Keeps the tables only."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """x (B, T, H, D) turned."""
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """The gradient of x: dy turned back."""
        return turned(dy, *ctx.saved_tensors, True), None, None


def rotary_reference(x, cos, sin):
    """The twin of rotary."""
    wide = exactly(x)
    a, b = wide.chunk(2, -1)
    return (wide * cos + torch.cat((b, a), -1) * sin).to(x.dtype)


def rotary(x, cos, sin):
    """x (B, T, H, D) turned by RoPE's tables (Su et al. 2021): x cos + (b, a) sin, where a and b are the halves of x.

    So features i and i + D/2 are a pair. cos, sin: (1 or B, T, 1, D) float32, sin with its sign (-sin, sin), as in
    mixers.Positions.tables; constants, to which no gradient goes. Computed in float32; the result has x's type.
    Backward is the turn by the negative angle. Raises ValueError for an odd D and for tables of another shape.
    """
    B, T, _, D = x.shape
    if D % 2:
        raise ValueError(f"rotary turns pairs of features: {D} must be even")
    if cos.shape != sin.shape or cos.shape not in ((1, T, 1, D), (B, T, 1, D)):
        raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} must be ({B} or 1, {T}, 1, {D})")
    return (Rotary.apply if fits(x) else rotary_reference)(x, cos, sin)


# --- Activations ---

GATED = ("glu", "bilinear", "reglu", "geglu", "swiglu")


def gate_blocks(W):
    """(rows of a tile, its columns, warps) for rows of W outputs."""
    columns = min(1024, power_of_2(W))
    return 1024 // columns, columns, 4


@jit
def value_of(a, KIND: tl.constexpr):
    """The activation of a gate or of a plain kind, at a float32."""
    if KIND == "swiglu":
        y = a * tl.sigmoid(a)
    elif KIND == "glu":
        y = tl.sigmoid(a)
    elif KIND == "reglu":
        y = tl.where(a <= 0, 0.0, a)
    elif KIND == "relu2":
        y = tl.where(a <= 0, 0.0, a) * a
    elif KIND == "bilinear":
        y = a
    else:
        y = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    return y


@jit
def slope_of(a, KIND: tl.constexpr):
    """The derivative of value_of; of relu at 0 it is 0."""
    if KIND == "swiglu":
        gate = tl.sigmoid(a)
        y = gate * (1 + a * (1 - gate))
    elif KIND == "glu":
        gate = tl.sigmoid(a)
        y = gate * (1 - gate)
    elif KIND == "reglu":
        y = tl.where(a <= 0, 0.0, 1.0)
    elif KIND == "relu2":
        y = tl.where(a <= 0, 0.0, 2 * a)
    elif KIND == "bilinear":
        y = tl.full(a.shape, 1.0, tl.float32)
    else:  # Phi(a) + a phi(a)
        y = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    return y


@jit
def gate_forward(x, y, n, W, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of y (n, W) = act(a) b, where x (n, 2 W) is a beside b."""
    blocks = tl.cdiv(W, COLUMNS)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < W)
    x += row * x_stride + column
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + W, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * W + column, (value_of(a, KIND) * b).to(y.dtype.element_ty), mask=inside)


@jit
def gate_backward(x, dy, dx, n, W, x_stride, dy_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of dx (n, 2 W), act(a) computed again."""
    blocks = tl.cdiv(W, COLUMNS)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < W)
    x += row * x_stride + column
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + W, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    dx += row * (2 * W) + column
    tl.store(dx, (g * b * slope_of(a, KIND)).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + W, (g * value_of(a, KIND)).to(dx.dtype.element_ty), mask=inside)


class GateRows(torch.autograd.Function):
    """The kernels of gated. Keeps x only."""

    @staticmethod
    def forward(ctx, kind, x):
        """x (..., 2 W) to (..., W)."""
        shape, x = x.shape, as_rows(x)
        n, W = len(x), x.size(1) // 2
        rows, columns, warps = gate_blocks(W)
        y = torch.empty(n, W, dtype=x.dtype, device=x.device)
        gate_forward[(ceil_div(n, rows) * ceil_div(W, columns),)](
            x, y, n, W, x.stride(0), KIND=kind, ROWS=rows, COLUMNS=columns, num_warps=warps)
        ctx.save_for_backward(x)
        ctx.kind, ctx.shape = kind, shape
        return y.view(*shape[:-1], W)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """The gradient of x."""
        (x,), dy = ctx.saved_tensors, as_rows(dy)
        n, W = dy.shape
        rows, columns, warps = gate_blocks(W)
        dx = torch.empty(n, 2 * W, dtype=x.dtype, device=x.device)
        gate_backward[(ceil_div(n, rows) * ceil_div(W, columns),)](
            x, dy, dx, n, W, x.stride(0), dy.stride(0), KIND=ctx.kind, ROWS=rows, COLUMNS=columns, num_warps=warps)
        return None, dx.view(ctx.shape)


def gated_reference(kind, x):
    """The twin of gated."""
    a, b = exactly(x).chunk(2, -1)
    gate = {"glu": torch.sigmoid, "bilinear": torch.clone, "reglu": F.relu, "geglu": F.gelu, "swiglu": F.silu}[kind]
    return (gate(a) * b).to(x.dtype)


def gated(kind, x):
    """act(a) b of the halves a and b of x (..., 2 W): (..., W) in x's type (Shazeer 2020).

    kind, of GATED: act is the sigmoid ("glu"), nothing ("bilinear"), relu ("reglu"), the exact gelu ("geglu") or silu
    ("swiglu"). Computed in float32 and rounded once, where feedforward.activate rounds act(a) first. Only x is kept:
    the backward pass computes act(a) again. Raises ValueError for another kind and an odd width.
    """
    if kind not in GATED:
        raise ValueError(f"kind is {kind!r}, but can be {', '.join(GATED)}")
    if x.size(-1) % 2:
        raise ValueError(f"gated takes two halves: {x.size(-1)} features must be even")
    return (GateRows.apply if fits(x) else gated_reference)(kind, x)


FLAT = 1024  # elements of a program of gelu and relu2, by 4 warps


@jit
def plain_forward(x, y, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(x), n elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)
    tl.store(y + place, value_of(a, KIND).to(y.dtype.element_ty), mask=place < n)


@jit
def plain_backward(x, dy, dx, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """dx = act'(x) dy, n elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)
    g = tl.load(dy + place, mask=place < n, other=0.0).to(tl.float32)
    tl.store(dx + place, (g * slope_of(a, KIND)).to(dx.dtype.element_ty), mask=place < n)


class Plain(torch.autograd.Function):
    """The kernels of gelu and relu2. Keeps x only."""

    @staticmethod
    def forward(ctx, kind, x):
        """x, any shape, to the same shape."""
        x = x.contiguous()
        y = torch.empty_like(x)
        plain_forward[(ceil_div(x.numel(), FLAT),)](x, y, x.numel(), KIND=kind, BLOCK=FLAT, num_warps=4)
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """The gradient of x."""
        (x,), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty_like(x)
        plain_backward[(ceil_div(x.numel(), FLAT),)](x, dy, dx, x.numel(), KIND=ctx.kind, BLOCK=FLAT, num_warps=4)
        return None, dx


def gelu_reference(x):
    """The twin of gelu."""
    return F.gelu(exactly(x)).to(x.dtype)


def gelu(x):
    """x Phi(x), exact (Hendrycks & Gimpel 2016): x of any shape and float type, to the same. Keeps x only."""
    return Plain.apply("gelu", x) if fits(x) else gelu_reference(x)


def relu2_reference(x):
    """The twin of relu2."""
    return F.relu(exactly(x)).square().to(x.dtype)


def relu2(x):
    """relu(x)^2 (So et al. 2021): x of any shape and float type, to the same. Keeps x only."""
    return Plain.apply("relu2", x) if fits(x) else relu2_reference(x)


# --- Cross-entropy ---

def entropy_blocks(V):
    """(columns of a block, warps) for rows of V logits."""
    columns = min(4096, power_of_2(V))
    return columns, 4 if columns <= 1024 else 8


@jit
def entropy_forward(logits, targets, losses, sums, V, stride, ignore_index, BLOCK: tl.constexpr):
    """One row's loss and log-sum-exp, in one reading: the sum so far is rescaled where the maximum grows."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * stride
    top, total = float("-inf"), 0.0
    for first in range(0, tl.where(target == ignore_index, 0, V), BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    whole = top + tl.log(total)
    known = (target >= 0) & (target < V)
    chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(sums + row, whole)
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, whole - chosen))


@jit
def entropy_backward(logits, targets, sums, dloss, out, V, stride, ignore_index, BLOCK: tl.constexpr):
    """A block of one row of (softmax - one hot) dloss; `out` (rows, V) may be the logits."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    x = tl.load(logits + row * stride + column, mask=column < V, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(sums + row)) - tl.where(column == target, 1.0, 0.0)
    share = tl.where(target == ignore_index, 0.0, share * tl.load(dloss + row).to(tl.float32))
    tl.store(out + row * V + column, share.to(out.dtype.element_ty), mask=column < V)


def entropies(logits, targets, ignore_index):
    """(losses, log-sum-exps), (N,) each, of logits (N, V): by the kernel, or in plain PyTorch."""
    if not fits(logits):
        wide, ignored = exactly(logits), targets == ignore_index
        sums = wide.logsumexp(-1)
        chosen = wide.gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
        return (sums - chosen).masked_fill_(ignored, 0), sums
    logits, targets = as_rows(logits), targets.contiguous()
    (N, V), (block, warps) = logits.shape, entropy_blocks(logits.size(1))
    losses, sums = (torch.empty(N, device=logits.device) for _ in range(2))
    entropy_forward[(N,)](logits, targets, losses, sums, V, logits.stride(0), ignore_index, BLOCK=block,
                          num_warps=warps)
    return losses, sums


def entropy_gradient(logits, targets, sums, dloss, ignore_index, out):
    """Writes (softmax - one hot) dloss into out (N, V), contiguous, which may be the logits; returns it."""
    if not fits(logits):
        ignored = targets == ignore_index
        wide = exactly(logits)  # the logits themselves, if they are float32: then this is in place
        wide = torch.sub(wide, sums.unsqueeze(1), out=out if out.dtype == wide.dtype else None).exp_()
        wide.scatter_add_(1, targets.masked_fill(ignored, 0).unsqueeze(1), -torch.ones_like(sums).unsqueeze(1))
        wide.mul_(dloss.unsqueeze(1)).masked_fill_(ignored.unsqueeze(1), 0)
        return wide if wide is out else out.copy_(wide)
    logits, V = as_rows(logits), logits.size(1)
    block, warps = entropy_blocks(V)
    entropy_backward[(len(logits) * ceil_div(V, block),)](
        logits, targets.contiguous(), sums.contiguous(), dloss.contiguous(), out, V, logits.stride(0), ignore_index,
        BLOCK=block, num_warps=warps)
    return out


class CrossEntropy(torch.autograd.Function):
    """The kernels of cross_entropy. Keeps the logits, as they are, and one float32 number per row."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        """Losses (N,)."""
        losses, sums = entropies(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, sums)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        """The gradient of the logits."""
        logits, targets, sums = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        return entropy_gradient(logits, targets, sums, dloss, ctx.ignore_index, out), None, None


def cross_entropy_reference(logits, targets, ignore_index=-1):
    """The twin of cross_entropy."""
    return F.cross_entropy(exactly(logits), targets, ignore_index=ignore_index, reduction="none")


def check_targets(targets, shape):
    """Raises ValueError where targets are not int64 of this shape."""
    if targets.shape != shape or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}, but must be int64 {tuple(shape)}")


def cross_entropy(logits, targets, ignore_index=-1):
    """log sum exp of a row less its target's logit: logits (N, V) of any float type, targets (N,) int64, to losses
    (N,) float32 (float64 for float64).

    A row whose target is ignore_index has loss 0 and gradient 0; its logits must be finite only for the twin. One
    reading of the logits forward (online softmax, Milakov & Gimelshein 2018); one reading and one writing backward,
    which needs one tensor of the logits' size and type. A row of nothing but -inf has loss nan. A target out of range
    is not looked for, as that would wait for the GPU: its loss is nan there; the twin raises IndexError on the CPU.
    Raises ValueError for targets of another shape or type.
    """
    check_targets(targets, logits.shape[:1])
    return (CrossEntropy.apply if fits(logits) else cross_entropy_reference)(logits, targets, ignore_index)


# --- Cross-entropy of a linear layer, without all logits ---

def chunk_rows(N, C, O):
    """Rows of h (N, C) whose O logits are computed at once: as many as make no more numbers than h or the classifiers
    (O, C) hold, whichever are more; at least 1. The gradient of the classifiers is as large as they are in any case,
    and so no product has fewer than C rows, if there are as many."""
    return max(1, min(N, max(N, O) * C // max(O, 1)))


def logits_by_chunk(h, weight, bias, chunk, dtype):
    """Yields (slice of rows, their h (G, n, C), their logits (G, n, O)), both in dtype; arguments as below."""
    weight = weight.to(dtype).transpose(1, 2)  # (G, C, O)
    bias = None if bias is None else bias.to(dtype).unsqueeze(1)  # (G, 1, O)
    for first in range(0, h.size(1), chunk):
        rows = slice(first, first + chunk)
        part = h[:, rows].to(dtype)
        yield rows, part, torch.bmm(part, weight) if bias is None else torch.baddbmm(bias, part, weight)


class LinearCrossEntropy(torch.autograd.Function):
    """Losses chunk by chunk, forward and again backward, on every device; only a chunk's losses and the gradient of its
    logits have a kernel. Keeps its inputs and one number per loss."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets, ignore_index, chunk, dtype):
        """h (G, N, C), weight (G, O, C), bias (G, O) or None, targets (G, N, K), O = K V: losses (G, N, K).

        Products are in dtype.
        """
        ctx.settings = ignore_index, chunk, dtype
        V, exact = weight.size(1) // targets.size(2), torch.promote_types(dtype, torch.float32)
        losses, sums = (torch.empty(targets.shape, dtype=exact, device=h.device) for _ in range(2))
        with torch.autocast(h.device.type, enabled=False):  # the backward pass would be outside it
            for rows, part, logits in logits_by_chunk(h, weight, bias, chunk, dtype):
                labels = targets[:, rows]  # (G, n, K)
                some, bases = entropies(logits.view(-1, V), labels.flatten(), ignore_index)
                losses[:, rows], sums[:, rows] = some.view(labels.shape), bases.view(labels.shape)
        ctx.save_for_backward(h, weight, bias, targets, sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        """Gradients of h, weight and bias; sums over chunks are float32."""
        h, weight, bias, targets, sums = ctx.saved_tensors
        ignore_index, chunk, dtype = ctx.settings
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        V, exact = weight.size(1) // targets.size(2), sums.dtype
        dh = torch.empty_like(h) if needs_h else None
        dweight = torch.zeros(weight.shape, dtype=exact, device=h.device) if needs_weight else None
        dbias = torch.zeros(bias.shape, dtype=exact, device=h.device) if needs_bias else None
        with torch.autocast(h.device.type, enabled=False):
            kept = weight.to(dtype)
            for rows, part, d in logits_by_chunk(h, kept, bias, chunk, dtype):
                labels, bases, given = (t[:, rows].flatten() for t in (targets, sums, dlosses))
                flat = d.view(-1, V)
                entropy_gradient(flat, labels, bases, given, ignore_index, flat)  # d (G, n, O) is now the gradient
                if needs_h:
                    dh[:, rows] = torch.bmm(d, kept)
                if needs_weight and exact == dtype:
                    dweight.baddbmm_(d.transpose(1, 2), part)
                elif needs_weight:
                    dweight += torch.bmm(d.transpose(1, 2), part)
                if needs_bias:
                    dbias += d.sum(1, dtype=exact)
        return (dh, None if dweight is None else dweight.to(weight.dtype),
                None if dbias is None else dbias.to(bias.dtype), None, None, None, None)


def product_type(h, weight):
    """The type of a linear layer's products: autocast's where it is on. Raises ValueError for types that differ."""
    if torch.is_autocast_enabled(h.device.type) and h.dtype != torch.float64:
        return torch.get_autocast_dtype(h.device.type)
    if h.dtype != weight.dtype:
        raise ValueError(f"h is {h.dtype} and weight {weight.dtype}, but without autocast they must be of one type")
    return h.dtype


def linear_cross_entropy_reference(h, weight, targets, bias=None, ignore_index=-1):
    """The twin of linear_cross_entropy: with all logits."""
    logits = F.linear(h, weight, bias).flatten(0, -2)
    return cross_entropy_reference(logits, targets.flatten(), ignore_index).view(targets.shape)


def linear_cross_entropy(h, weight, targets, bias=None, ignore_index=-1, chunk=None):
    """cross_entropy(h @ weight.T + bias, targets) without ever holding all logits, on any device.

    h (..., C), weight (V, C), bias (V,), targets (...) int64: losses (...) float32 (float64 for float64). chunk: rows
    at once, by default chunk_rows(N, C, V), whose logits are no more numbers than the larger of h and weight. The
    backward pass computes the logits of every chunk again, one matrix product more, and so is right for any gradient
    that comes in. Beside the gradients it needs one chunk of logits, which half precision without a kernel holds in
    float32 too, and in half precision a float32 sum of weight's gradient and one product of its size. Products are in
    autocast's type where it is on; weight is cast to it once per pass. Ignored rows as in cross_entropy; targets out of
    range too, but they raise RuntimeError where there is no kernel. Raises ValueError for shapes or types that do not
    go together, and for a chunk below 1.
    """
    if weight.dim() != 2 or h.size(-1) != weight.size(1) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"h {tuple(h.shape)}, weight {tuple(weight.shape)} and bias do not go together")
    check_targets(targets, h.shape[:-1])
    biases = None if bias is None else bias[None, None]
    losses = batched_linear_cross_entropy(h.reshape(1, -1, h.size(-1)), weight[None, None], targets.reshape(1, -1, 1),
                                          biases, ignore_index, chunk)
    return losses.view(targets.shape)


def stacked(parts):
    """Tensors in lists, of any depth, as one tensor; a tensor as it is, and one alone without a copy."""
    if torch.is_tensor(parts):
        return parts
    parts = [stacked(part) for part in parts]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def batched_linear_cross_entropy_reference(h, weights, targets, biases=None, ignore_index=-1):
    """The twin of batched_linear_cross_entropy: with all logits."""
    weights = stacked(weights)
    logits = torch.einsum("gnc,gkvc->gnkv", h, weights.expand(len(h), -1, -1, -1))
    if biases is not None:
        logits = logits + stacked(biases).unsqueeze(1)
    targets = targets.expand(logits.shape[:3])
    return cross_entropy_reference(logits.flatten(0, 2), targets.flatten(), ignore_index).view(targets.shape)


def batched_linear_cross_entropy(h, weights, targets, biases=None, ignore_index=-1, chunk=None):
    """linear_cross_entropy of K classifiers on each of G groups of rows, by one product per chunk.

    h (G, N, C), weights (G, K, V, C), biases (G, K, V) or None, targets (N, K) or (G, N, K) int64: losses (G, N, K)
    float32 (float64 for float64). weights and biases may be lists of lists of (V, C) and (V,), or have one group for
    all, which then takes all G N rows as one. chunk: rows of a group of classifiers at once, by default
    chunk_rows(N or G N, C, K V). All else as linear_cross_entropy.
    """
    weights, biases = stacked(weights), None if biases is None else stacked(biases)
    (G, N, C), (groups, K, V, width) = h.shape, weights.shape
    fitting = biases is None or biases.shape == weights.shape[:3]
    if K < 1 or groups not in (1, max(1, G)) or width != C or not fitting:
        raise ValueError(f"h {tuple(h.shape)}, weights {tuple(weights.shape)} and biases do not go together")
    if targets.dim() == 2:
        targets = targets.expand(G, *targets.shape)
    check_targets(targets, (G, N, K))
    if chunk is None:
        chunk = chunk_rows(G * N // groups, C, K * V)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1")
    dtype = product_type(h, weights)
    losses = LinearCrossEntropy.apply(
        h.reshape(groups, -1, C), weights.reshape(groups, K * V, C),
        None if biases is None else biases.reshape(groups, K * V), targets.reshape(groups, -1, K), ignore_index,
        chunk, dtype)
    return losses.view(G, N, K)
