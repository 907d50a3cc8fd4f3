"""Row-wise kernels: norms, rotary positions, gates and activations, cross-entropy. kernels.py has their formulas.

Blocks are chosen from shapes by plain functions, not by timing.
"""
import torch
from torch.autograd.function import once_differentiable
from triton import cdiv, next_power_of_2

from fused.ground import as_rows, jit, tl


# --- Norms ---

PROGRAMS = 256  # of a norm's backward pass at most: each keeps partial sums for gain and bias


def norm_blocks(C):
    """(rows of a tile, its columns, warps) for rows of C features: one row of many, several of few."""
    columns = next_power_of_2(C)
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
        norm_forward[(cdiv(len(x), rows),)](
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
            programs = min(PROGRAMS, cdiv(n, rows))
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


# --- Rotary positions ---

def rotary_blocks(D):
    """(heads of a tile, its pairs of features, warps) for heads of D features."""
    pairs = next_power_of_2(D // 2)
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
    turn_rows[(cdiv(B * T * H, rows),)](
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


# --- Activations ---

def gate_blocks(W):
    """(rows of a tile, its columns, warps) for rows of W outputs."""
    columns = min(1024, next_power_of_2(W))
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
        gate_forward[(cdiv(n, rows) * cdiv(W, columns),)](
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
        gate_backward[(cdiv(n, rows) * cdiv(W, columns),)](
            x, dy, dx, n, W, x.stride(0), dy.stride(0), KIND=ctx.kind, ROWS=rows, COLUMNS=columns, num_warps=warps)
        return None, dx.view(ctx.shape)


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
        plain_forward[(cdiv(x.numel(), FLAT),)](x, y, x.numel(), KIND=kind, BLOCK=FLAT, num_warps=4)
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """The gradient of x."""
        (x,), dy = ctx.saved_tensors, dy.contiguous()
        dx = torch.empty_like(x)
        plain_backward[(cdiv(x.numel(), FLAT),)](x, dy, dx, x.numel(), KIND=ctx.kind, BLOCK=FLAT, num_warps=4)
        return None, dx


# --- Cross-entropy ---

def entropy_blocks(V):
    """(columns of a block, warps) for rows of V logits."""
    columns = min(4096, next_power_of_2(V))
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
    """(losses, log-sum-exps), (N,) each, float32 each, of logits (N, V)."""
    logits, targets = as_rows(logits), targets.contiguous()
    (N, V), (block, warps) = logits.shape, entropy_blocks(logits.size(1))
    losses, sums = (torch.empty(N, device=logits.device) for _ in range(2))
    entropy_forward[(N,)](logits, targets, losses, sums, V, logits.stride(0), ignore_index, BLOCK=block,
                          num_warps=warps)
    return losses, sums


def entropy_gradient(logits, targets, sums, dloss, ignore_index, out):
    """Writes (softmax - one hot) dloss into out (N, V), contiguous, which may be the logits; returns it."""
    logits, V = as_rows(logits), logits.size(1)
    block, warps = entropy_blocks(V)
    entropy_backward[(len(logits) * cdiv(V, block),)](
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
