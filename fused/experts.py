"""One matrix for every group of rows: the product of experts as kernels. kernels.grouped_linear is their formula.

Shapes: N rows, E experts, C width in, W width out. Blocks are chosen from shapes by plain functions, not by measuring.
"""
import torch
from torch.autograd.function import once_differentiable
from triton import cdiv

from fused.ground import bounded, dot, jit, tl


def grouped_blocks(N, E, out, into, dtype):
    """Sizes to multiply N rows of E experts, `into` wide, to `out` columns: tiles near the mean
    number of rows, smaller for float32, which has no tensor cores here."""
    most, depth = (64, 16) if dtype == torch.float32 else (128, 64)
    rows, cols = bounded(cdiv(N, E), 16, most), bounded(out, 16, most)
    return dict(ROWS=rows, COLS=cols, DEPTH=bounded(into, 16, depth), EXPERTS=bounded(E, 1, 1 << 16),
                num_warps=8 if rows * cols > 8192 else 4, num_stages=3)


def weight_blocks(W, C, dtype):
    """Sizes for the gradient of matrices (W, C)."""
    most, depth = (64, 16) if dtype == torch.float32 else (128, 64)
    rows, cols = bounded(W, 16, most), bounded(C, 16, most)
    return dict(ROWS=rows, COLS=cols, DEPTH=depth, num_warps=8 if rows * cols > 8192 else 4, num_stages=3)


@jit
def grouped_rows(x, weight, offsets, y, E, out, into, TURNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                 DEPTH: tl.constexpr, EXPERTS: tl.constexpr):
    """y (N, out) = x (N, into) times the matrix of its expert: weight (E, out, into), or (E, into, out) if TURNED.

    Tiles of rows are counted expert by expert, so that every program finds its own; there are a few programs too many.
    """
    across = tl.cdiv(out, COLS)
    tile, e = tl.program_id(0) // across, tl.arange(0, EXPERTS)
    sizes = tl.load(offsets + e + 1, mask=e < E, other=0) - tl.load(offsets + e, mask=e < E, other=0)
    tiles = (sizes + ROWS - 1) // ROWS
    over = tl.cumsum(tiles, 0) <= tile  # experts that end before this tile
    expert = tl.sum(over.to(tl.int32))
    if expert >= E:
        return
    rows = tl.load(offsets + expert) + (tile - tl.sum(tl.where(over, tiles, 0))) * ROWS + tl.arange(0, ROWS)
    own = rows < tl.load(offsets + expert + 1)
    cols, k = tl.program_id(0) % across * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
    matrix = weight + expert.to(tl.int64) * out * into
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, into, DEPTH):
        depth = start + k
        left = tl.load(x + rows[:, None] * into + depth[None, :], mask=own[:, None] & (depth < into)[None, :], other=0)
        place = depth[:, None] * out + cols[None, :] if TURNED else cols[None, :] * into + depth[:, None]
        right = tl.load(matrix + place, mask=(depth < into)[:, None] & (cols < out)[None, :], other=0)
        total += dot(left, right)
    tl.store(y + rows[:, None] * out + cols[None, :], total, mask=own[:, None] & (cols < out)[None, :])


@jit
def grouped_weight(x, grad, offsets, d_weight, W, C, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """d_weight (E, W, C): for every expert the sum over its rows of grad (N, W) times x (N, C)."""
    across, down = tl.cdiv(C, COLS), tl.cdiv(W, ROWS)
    expert = tl.program_id(0) // (across * down)
    w = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        left = tl.load(grad + rows[None, :] * W + w[:, None], mask=(rows < end)[None, :] & (w < W)[:, None], other=0)
        right = tl.load(x + rows[:, None] * C + c[None, :], mask=(rows < end)[:, None] & (c < C)[None, :], other=0)
        total += dot(left, right)
    place = (expert.to(tl.int64) * W + w[:, None]) * C + c[None, :]
    tl.store(d_weight + place, total, mask=(w < W)[:, None] & (c < C)[None, :])


def _grouped(x, weight, offsets, turned):
    """y (N, out) by grouped_rows; the number of tiles is bounded from N and E alone: nothing waits for the device."""
    (N, into), E, out = x.shape, weight.size(0), weight.size(2 if turned else 1)
    y = x.new_empty(N, out)
    sizes = grouped_blocks(N, E, out, into, x.dtype)
    grid = ((N // sizes["ROWS"] + E) * cdiv(out, sizes["COLS"]),)
    grouped_rows[grid](x, weight, offsets, y, E, out, into, TURNED=turned, **sizes)
    return y


class GroupedLinear(torch.autograd.Function):
    """grouped_linear by its kernels. Saves x, weight and offsets."""

    @staticmethod
    def forward(ctx, x, weight, offsets):
        x, weight, offsets = x.contiguous(), weight.contiguous(), offsets.contiguous()
        ctx.save_for_backward(x, weight, offsets)
        return _grouped(x, weight, offsets, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, offsets = ctx.saved_tensors
        (E, W, C), grad, d_x, d_weight = weight.shape, grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            d_x = _grouped(grad, weight, offsets, True)
        if ctx.needs_input_grad[1]:
            d_weight, sizes = torch.empty_like(weight), weight_blocks(W, C, x.dtype)
            grid = (E * cdiv(W, sizes["ROWS"]) * cdiv(C, sizes["COLS"]),)
            grouped_weight[grid](x, grad, offsets, d_weight, W, C, **sizes)
        return d_x, d_weight, None
