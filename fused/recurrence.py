"""Recurrences as kernels, which go through time step by step: kernels.min_gru and kernels.selective_scan.

One program for every row and block of features, whose state stays in registers; loads of later steps are on their way
meanwhile (`num_stages`). Sums are in fixed order: no atomics. Blocks are chosen from the shapes by plain functions.
Shapes: B batch, T time, I inner width, N states per feature.
"""
import torch
from torch.autograd.function import once_differentiable
from triton import cdiv

from fused.ground import bounded, jit, tl

# --- minGRU ---

BLOCK = 64  # features of a program: one warp, two neighbours a thread, so that bfloat16 fills a word


@jit
def min_gru_forward(z, v, h, out, T, features, BLOCK: tl.constexpr):
    """z, v (B, T, features) of any type, h (B, features), out (B, T, features) float32."""
    blocks = tl.cdiv(features, BLOCK)
    row, cols = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = cols < features
    state = tl.load(h + row * features + cols, mask=keep, other=0).to(tl.float32)
    at = row * T * features + cols
    for _ in tl.range(0, T, num_stages=8):
        gate = tl.sigmoid(tl.load(z + at, mask=keep, other=0).to(tl.float32))
        x = tl.load(v + at, mask=keep, other=0).to(tl.float32)
        state = (1 - gate) * state + gate * tl.where(x >= 0, x + 0.5, tl.sigmoid(x))
        tl.store(out + at, state, mask=keep)
        at += features


@jit
def min_gru_backward(z, v, h, states, grad, d_z, d_v, d_h, T, features, BLOCK: tl.constexpr):
    """From right to left: with h_t = a_t h_(t-1) + b_t, a = 1 - s, b = s g(v): G_t = grad_t + a_(t+1) G_(t+1) is the
    gradient of b_t, and G_t h_(t-1) that of a_t; on to z and v."""
    blocks = tl.cdiv(features, BLOCK)
    row, cols = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = cols < features
    first = tl.load(h + row * features + cols, mask=keep, other=0).to(tl.float32)
    at = (row * T + T - 1) * features + cols
    carried = tl.zeros_like(first)
    for i in tl.range(0, T, num_stages=8):
        before = tl.load(states + at - features, mask=cols < tl.where(i < T - 1, features, 0), other=0)
        before = tl.where(i < T - 1, before, first)
        gate = tl.sigmoid(tl.load(z + at, mask=keep, other=0).to(tl.float32))
        x = tl.load(v + at, mask=keep, other=0).to(tl.float32)
        low = tl.sigmoid(x)
        g = carried + tl.load(grad + at, mask=keep, other=0)
        tl.store(d_z + at, g * (tl.where(x >= 0, x + 0.5, low) - before) * gate * (1 - gate), mask=keep)
        tl.store(d_v + at, g * gate * tl.where(x >= 0, 1.0, low * (1 - low)), mask=keep)
        carried = (1 - gate) * g
        at -= features
    tl.store(d_h + row * features + cols, carried, mask=keep)


class MinGru(torch.autograd.Function):
    """min_gru by its kernels. Saves z, v, h as they came, and the states: gates are computed again."""

    @staticmethod
    def forward(ctx, z, v, h):
        z, v, h = z.contiguous(), v.contiguous(), h.contiguous()
        (B, T, features), out = z.shape, torch.empty(z.shape, dtype=torch.float32, device=z.device)
        min_gru_forward[(B * cdiv(features, BLOCK),)](z, v, h, out, T, features, BLOCK=BLOCK, num_warps=1)
        ctx.save_for_backward(z, v, h, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, v, h, states = ctx.saved_tensors
        B, T, features = z.shape
        d_z, d_v, d_h = torch.empty_like(z), torch.empty_like(v), torch.empty_like(h)
        min_gru_backward[(B * cdiv(features, BLOCK),)](z, v, h, states, grad.contiguous(), d_z, d_v, d_h, T, features,
                                                       BLOCK=BLOCK, num_warps=1)
        return d_z, d_v, d_h


# --- Mamba's selective scan ---

CHUNK = 64  # steps between the states that the forward pass keeps


def selective_blocks(I, N):
    """Sizes for I features of N states: a program's tile, at most 8 states a thread where N is at most 128."""
    rows, cols = bounded(I, 1, 16), bounded(N, 1, 1 << 16)
    return dict(ROWS=rows, COLS=cols, CHUNK=CHUNK, num_warps=bounded(rows * cols // 256, 1, 8))


@jit
def selective_forward(u, dt, A, Bm, Cm, D, h, y, last, kept, T, I, N, KEEP: tl.constexpr, CHUNK: tl.constexpr,
                      ROWS: tl.constexpr, COLS: tl.constexpr):
    """One row and ROWS features of selective_scan. kept (B, chunks, I, N): under KEEP the state before every chunk."""
    blocks = tl.cdiv(I, ROWS)
    row, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLS)
    mask, cell = (i < I)[:, None] & (n < N)[None, :], i[:, None] * N + n[None, :]
    a = tl.load(A + cell, mask=mask, other=0).to(tl.float32)
    skip = tl.load(D + i, mask=i < I, other=0).to(tl.float32)
    state = tl.load(h + row * I * N + cell, mask=mask, other=0).to(tl.float32)
    at, side = row * T * I + i, row * T * N + n
    keep = kept + row * tl.cdiv(T, CHUNK) * I * N + cell
    for start in range(0, T, CHUNK):
        if KEEP:
            tl.store(keep, state, mask=mask)
            keep += I * N
        for _ in tl.range(start, tl.minimum(T, start + CHUNK), num_stages=6):
            x = tl.load(u + at, mask=i < I, other=0).to(tl.float32)
            step = tl.load(dt + at, mask=i < I, other=0).to(tl.float32)
            b = tl.load(Bm + side, mask=n < N, other=0).to(tl.float32)
            c = tl.load(Cm + side, mask=n < N, other=0).to(tl.float32)
            state = tl.exp(step[:, None] * a) * state + (step * x)[:, None] * b[None, :]
            tl.store(y + at, tl.sum(state * c[None, :], 1) + skip * x, mask=i < I)
            at += I
            side += N
    tl.store(last + row * I * N + cell, state, mask=mask)


@jit
def selective_backward(u, dt, A, Bm, Cm, D, kept, d_y, d_last, scratch, d_u, d_dt, d_A, d_B, d_C, d_D, d_h, T, I, N,
                       CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The gradient, chunk by chunk from the right. With g_t = dL/dh_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1):

        dC_t = sum_i dy_t h_t,  dB_t = sum_i g_t dt_t u_t,  du_t = dt_t (g_t . B_t) + D dy_t,  dD = sum_t dy_t u_t
        ddt_t = u_t (g_t . B_t) + sum_n w_t A,  dA = sum_t w_t dt_t,  w_t = g_t exp(dt_t A) h_(t-1)

    scratch (programs, CHUNK, ROWS, COLS): the states before each step of a chunk. d_A (B, I, N) and d_D (B, I) are of
    each row, d_B and d_C (B, blocks, T, N) of each block of features.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(I, ROWS)
    row, block = (pid // blocks).to(tl.int64), pid % blocks
    r, n = tl.arange(0, ROWS), tl.arange(0, COLS)
    i = block * ROWS + r
    mask, cell = (i < I)[:, None] & (n < N)[None, :], i[:, None] * N + n[None, :]
    a = tl.load(A + cell, mask=mask, other=0).to(tl.float32)
    skip = tl.load(D + i, mask=i < I, other=0).to(tl.float32)
    g = tl.load(d_last + row * I * N + cell, mask=mask, other=0)
    sum_a, sum_d = tl.zeros_like(a), tl.zeros_like(skip)
    chunks = tl.cdiv(T, CHUNK)
    keep = kept + (row * chunks + chunks) * I * N + cell
    own = scratch + pid.to(tl.int64) * CHUNK * ROWS * COLS + r[:, None] * COLS + n[None, :]
    for k in range(chunks):
        chunk = chunks - 1 - k
        start, end = chunk * CHUNK, tl.minimum(T, chunk * CHUNK + CHUNK)
        keep -= I * N
        state = tl.load(keep, mask=mask, other=0)
        for t in tl.range(start, end, num_stages=6):
            at, side = (row * T + t) * I + i, (row * T + t) * N + n
            tl.store(own + (t - start) * ROWS * COLS, state)
            x = tl.load(u + at, mask=i < I, other=0).to(tl.float32)
            step = tl.load(dt + at, mask=i < I, other=0).to(tl.float32)
            b = tl.load(Bm + side, mask=n < N, other=0).to(tl.float32)
            state = tl.exp(step[:, None] * a) * state + (step * x)[:, None] * b[None, :]
        tl.debug_barrier()  # what other threads stored
        for t in range(end - 1, start - 1, -1):
            at, side = (row * T + t) * I + i, (row * T + t) * N + n
            side_out = ((row * blocks + block) * T + t) * N + n
            x = tl.load(u + at, mask=i < I, other=0).to(tl.float32)
            step = tl.load(dt + at, mask=i < I, other=0).to(tl.float32)
            dy = tl.load(d_y + at, mask=i < I, other=0)
            b = tl.load(Bm + side, mask=n < N, other=0).to(tl.float32)
            c = tl.load(Cm + side, mask=n < N, other=0).to(tl.float32)
            before = tl.load(own + (t - start) * ROWS * COLS)
            decay, moved = tl.exp(step[:, None] * a), step * x
            g += dy[:, None] * c[None, :]
            after = decay * before + moved[:, None] * b[None, :]
            tl.store(d_C + side_out, tl.sum(dy[:, None] * after, 0), mask=n < N)
            tl.store(d_B + side_out, tl.sum(moved[:, None] * g, 0), mask=n < N)
            d_moved = tl.sum(g * b[None, :], 1)
            g *= decay
            w = before * g
            tl.store(d_u + at, d_moved * step + skip * dy, mask=i < I)
            tl.store(d_dt + at, tl.sum(w * a, 1) + d_moved * x, mask=i < I)
            sum_a += w * step[:, None]
            sum_d += dy * x
        tl.debug_barrier()  # before scratch is written anew
    tl.store(d_A + row * I * N + cell, sum_a, mask=mask)
    tl.store(d_D + row * I + i, sum_d, mask=i < I)
    tl.store(d_h + row * I * N + cell, g, mask=mask)


class SelectiveScan(torch.autograd.Function):
    """Of kernels.selective_scan. Saves its inputs and, where a gradient is needed, the state every CHUNK steps."""

    @staticmethod
    def forward(ctx, u, dt, A, Bm, Cm, D, h, keep):
        u, dt, A, Bm, Cm, D, h = (t.contiguous() for t in (u, dt, A, Bm, Cm, D, h))
        (B, T, I), N, new = u.shape, A.size(1), dict(dtype=torch.float32, device=u.device)
        y, last = torch.empty(u.shape, **new), torch.empty(h.shape, **new)
        kept = torch.empty((B, cdiv(T, CHUNK) if keep else 0, I, N), **new)
        sizes = selective_blocks(I, N)
        selective_forward[(B * cdiv(I, sizes["ROWS"]),)](u, dt, A, Bm, Cm, D, h, y, last, kept, T, I, N, KEEP=keep,
                                                         **sizes)
        ctx.save_for_backward(u, dt, A, Bm, Cm, D, kept)
        ctx.h_type = h.dtype
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last):
        u, dt, A, Bm, Cm, D, kept = ctx.saved_tensors
        (B, T, I), N, new = u.shape, A.size(1), dict(dtype=torch.float32, device=u.device)
        sizes = selective_blocks(I, N)
        across = cdiv(I, sizes["ROWS"])
        scratch = torch.empty((B * across, CHUNK, sizes["ROWS"], sizes["COLS"]), **new)
        d_u, d_dt = torch.empty_like(u), torch.empty_like(dt)
        d_B, d_C = torch.empty((B, across, T, N), **new), torch.empty((B, across, T, N), **new)
        d_A, d_D, d_h = torch.empty((B, I, N), **new), torch.empty((B, I), **new), torch.empty((B, I, N), **new)
        selective_backward[(B * across,)](u, dt, A, Bm, Cm, D, kept, d_y.contiguous(), d_last.contiguous(), scratch,
                                          d_u, d_dt, d_A, d_B, d_C, d_D, d_h, T, I, N, **sizes)
        return (d_u, d_dt, d_A.sum(0).to(A.dtype), d_B.sum(1).to(Bm.dtype), d_C.sum(1).to(Cm.dtype),
                d_D.sum(0).to(D.dtype), d_h.to(ctx.h_type), None)


def selective_scan(*given):
    """kernels.selective_scan after its checks: (u, dt, A, Bm, Cm, D, h)."""
    return SelectiveScan.apply(*given, torch.is_grad_enabled() and any(t.requires_grad for t in given))
