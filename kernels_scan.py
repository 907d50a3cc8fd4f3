"""Recurrences and grouped products as Triton kernels, each beside its PyTorch twin: see kernels.py for the ground.

scan, min_gru and selective_scan go through time step by step, one program for every row and block of features, whose
state stays in registers; loads of later steps are on their way meanwhile (`num_stages`). grouped_linear multiplies rows
sorted by expert with their expert's matrix.

Sums are in fixed order: no atomics. Blocks are chosen from the shapes by plain functions, not by measuring.
Shapes: B batch, T time, I inner width, N states per feature; for experts N rows, E experts, C width in, W width out.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import by_triton, ceil_div, dot, exactly, fits, jit, power_of_2, tl
from recurrent import scan_reference


def _power(n, low, high):
    """The smallest power of two that is at least n, within low ... high (powers of two)."""
    return min(high, max(low, power_of_2(n)))


def _scanned(a, b, h):
    """scan_reference, also where there is no time at all."""
    return scan_reference(a, b, h) if a.size(1) else a * b


def _expect(ok, message):
    if not ok:
        raise ValueError(message)


# --- The scan: h_t = a_t h_(t-1) + b_t ---

STEP_BLOCKS = dict(BLOCK=64)  # features of a program: one warp, two neighbours a thread, so that bfloat16 fills a word
STEP_OPTIONS = dict(num_warps=1)


def _step_grid(B, features):
    return (B * ceil_div(features, STEP_BLOCKS["BLOCK"]),)


@jit
def scan_forward(a, b, h, out, T, features, BLOCK: tl.constexpr):
    """a, b, out (B, T, features), h (B, features)."""
    blocks = tl.cdiv(features, BLOCK)
    row, cols = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = cols < features
    state = tl.load(h + row * features + cols, mask=keep, other=0)
    at = row * T * features + cols
    for _ in tl.range(0, T, num_stages=8):
        state = tl.load(a + at, mask=keep, other=0) * state + tl.load(b + at, mask=keep, other=0)
        tl.store(out + at, state, mask=keep)
        at += features


@jit
def scan_backward(a, h, states, grad, d_a, d_b, d_h, T, features, BLOCK: tl.constexpr):
    """From right to left: g_t = grad_t + a_(t+1) g_(t+1), d_b_t = g_t, d_a_t = g_t h_(t-1), d_h = a_0 g_0."""
    blocks = tl.cdiv(features, BLOCK)
    row, cols = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = cols < features
    first = tl.load(h + row * features + cols, mask=keep, other=0)
    at = (row * T + T - 1) * features + cols
    carried = tl.zeros_like(first)  # a_(t+1) g_(t+1)
    for i in tl.range(0, T, num_stages=8):
        before = tl.load(states + at - features, mask=cols < tl.where(i < T - 1, features, 0), other=0)
        g = carried + tl.load(grad + at, mask=keep, other=0)
        tl.store(d_b + at, g, mask=keep)
        tl.store(d_a + at, g * tl.where(i < T - 1, before, first), mask=keep)
        carried = tl.load(a + at, mask=keep, other=0) * g
        at -= features
    tl.store(d_h + row * features + cols, carried, mask=keep)


class Scan(torch.autograd.Function):
    """scan by its kernels. Saves a, h and the states."""

    @staticmethod
    def forward(ctx, a, b, h):
        a, b, h = a.contiguous(), b.contiguous(), h.contiguous()
        (B, T), features, out = a.shape[:2], a.shape[2:].numel(), torch.empty_like(b)
        scan_forward[_step_grid(B, features)](a, b, h, out, T, features, **STEP_BLOCKS, **STEP_OPTIONS)
        ctx.save_for_backward(a, h, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, h, states = ctx.saved_tensors
        (B, T), features = a.shape[:2], a.shape[2:].numel()
        d_a, d_b, d_h = torch.empty_like(a), torch.empty_like(a), torch.empty_like(h)
        scan_backward[_step_grid(B, features)](a, h, states, grad.contiguous(), d_a, d_b, d_h, T, features,
                                               **STEP_BLOCKS, **STEP_OPTIONS)
        return d_a, d_b, d_h


def scan(a, b, h=None):
    """h_t = a_t h_(t-1) + b_t along dimension 1, with gradients: recurrent.scan as a kernel.

    a, b (B, T, ...) of one shape and type (float32 or float64), h (B, ...) the state before, None: zeros. Returns all
    states (B, T, ...). The twin is recurrent.scan_reference. Raises ValueError for other shapes and types.
    """
    _expect(a.dim() > 1 and a.shape == b.shape and a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64),
            "scan needs a and b (B, T, ...) of one shape, both float32 or both float64")
    h = b.new_zeros(b.shape[:1] + b.shape[2:]) if h is None else h
    _expect(h.shape == b.shape[:1] + b.shape[2:] and h.dtype == b.dtype, "scan needs h (B, ...) of the type of a and b")
    return Scan.apply(a, b, h) if by_triton(b) else _scanned(a, b, h)


# --- minGRU ---

def min_gru_reference(z, v, h):
    """h_t = (1 - s) h_(t-1) + s g(v_t), s = sigmoid(z_t), g(v) = v + 0.5 where v >= 0, else sigmoid(v)."""
    z, v = torch.sigmoid(exactly(z)), exactly(v)
    return _scanned(1 - z, z * torch.where(v >= 0, v + 0.5, torch.sigmoid(v)), exactly(h))


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
    """scan_backward with a = 1 - s and b = s g(v), on to z and v."""
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
        min_gru_forward[_step_grid(B, features)](z, v, h, out, T, features, **STEP_BLOCKS, **STEP_OPTIONS)
        ctx.save_for_backward(z, v, h, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, v, h, states = ctx.saved_tensors
        B, T, features = z.shape
        d_z, d_v, d_h = torch.empty_like(z), torch.empty_like(v), torch.empty_like(h)
        min_gru_backward[_step_grid(B, features)](z, v, h, states, grad.contiguous(), d_z, d_v, d_h, T, features,
                                                  **STEP_BLOCKS, **STEP_OPTIONS)
        return d_z, d_v, d_h


def min_gru(z, v, h=None):
    """The recurrence of minGRU (Feng et al. 2024, see recurrent.MinGRU) from its raw projections to its states.

        h_t = (1 - s_t) h_(t-1) + s_t g(v_t),   s = sigmoid(z),   g(v) = v + 0.5 where v >= 0, else sigmoid(v)

    z, v (B, T, I) of any float types, h (B, I) the state before, None: zeros. Returns the states (B, T, I), float32
    (float64 where z is). A position with z = -inf and finite v changes no state: so padding enters. Raises ValueError
    for other shapes.
    """
    _expect(z.dim() == 3 and z.shape == v.shape, "min_gru needs z and v (B, T, I) of one shape")
    h = z.new_zeros(z.size(0), z.size(2), dtype=torch.float32) if h is None else h
    _expect(h.shape == (z.size(0), z.size(2)), "min_gru needs h (B, I)")
    return (MinGru.apply if fits(z) else min_gru_reference)(z, v, h)


# --- Mamba's selective scan ---

CHUNK = 64  # steps between the states that the forward pass keeps


def selective_scan_reference(u, dt, A, Bm, Cm, D, h):
    """y_t = C_t h_t + D u_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t; holds (B, T, I, N) whole."""
    u, dt, A, Bm, Cm, D, h = (exactly(t) for t in (u, dt, A, Bm, Cm, D, h))
    decay = torch.exp(dt.unsqueeze(3) * A)  # (B, T, I, N)
    states = _scanned(decay, (dt * u).unsqueeze(3) * Bm.unsqueeze(2), h)  # (B, T, I, N)
    y = (states * Cm.unsqueeze(2)).sum(3) + D * u
    return y, torch.cat((h.unsqueeze(1), states), 1)[:, -1]


def selective_blocks(I, N):
    """The constants and options for I features of N states: a program's tile, at most 8 states a thread
    where N is at most 128."""
    rows, cols = _power(I, 1, 16), _power(N, 1, 1 << 16)
    return dict(ROWS=rows, COLS=cols, CHUNK=CHUNK), dict(num_warps=_power(rows * cols // 256, 1, 8))


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
        at, side = (row * T + start) * I + i, (row * T + start) * N + n
        for t in tl.range(start, end, num_stages=6):
            tl.store(own + (t - start) * ROWS * COLS, state)
            x = tl.load(u + at, mask=i < I, other=0).to(tl.float32)
            step = tl.load(dt + at, mask=i < I, other=0).to(tl.float32)
            b = tl.load(Bm + side, mask=n < N, other=0).to(tl.float32)
            state = tl.exp(step[:, None] * a) * state + (step * x)[:, None] * b[None, :]
            at += I
            side += N
        tl.debug_barrier()  # what other threads stored
        side_out = ((row * blocks + block) * T + end - 1) * N + n
        for t in range(start, end):
            at -= I
            side -= N
            x = tl.load(u + at, mask=i < I, other=0).to(tl.float32)
            step = tl.load(dt + at, mask=i < I, other=0).to(tl.float32)
            dy = tl.load(d_y + at, mask=i < I, other=0)
            b = tl.load(Bm + side, mask=n < N, other=0).to(tl.float32)
            c = tl.load(Cm + side, mask=n < N, other=0).to(tl.float32)
            before = tl.load(own + (end - 1 - t) * ROWS * COLS)
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
            side_out -= N
        tl.debug_barrier()  # before scratch is written anew
    tl.store(d_A + row * I * N + cell, sum_a, mask=mask)
    tl.store(d_D + row * I + i, sum_d, mask=i < I)
    tl.store(d_h + row * I * N + cell, g, mask=mask)


class SelectiveScan(torch.autograd.Function):
    """selective_scan by its kernels. Saves its inputs and, where a gradient is needed, the state every CHUNK steps."""

    @staticmethod
    def forward(ctx, u, dt, A, Bm, Cm, D, h, keep):
        u, dt, A, Bm, Cm, D, h = (t.contiguous() for t in (u, dt, A, Bm, Cm, D, h))
        (B, T, I), N, new = u.shape, A.size(1), dict(dtype=torch.float32, device=u.device)
        y, last = torch.empty(u.shape, **new), torch.empty(h.shape, **new)
        kept = torch.empty((B, ceil_div(T, CHUNK) if keep else 0, I, N), **new)
        blocks, options = selective_blocks(I, N)
        selective_forward[(B * ceil_div(I, blocks["ROWS"]),)](u, dt, A, Bm, Cm, D, h, y, last, kept, T, I, N, KEEP=keep,
                                                          **blocks, **options)
        ctx.save_for_backward(u, dt, A, Bm, Cm, D, kept)
        ctx.h_type = h.dtype
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last):
        u, dt, A, Bm, Cm, D, kept = ctx.saved_tensors
        (B, T, I), N, new = u.shape, A.size(1), dict(dtype=torch.float32, device=u.device)
        blocks, options = selective_blocks(I, N)
        across = ceil_div(I, blocks["ROWS"])
        scratch = torch.empty((B * across, CHUNK, blocks["ROWS"], blocks["COLS"]), **new)
        d_u, d_dt = torch.empty_like(u), torch.empty_like(dt)
        d_B, d_C = torch.empty((B, across, T, N), **new), torch.empty((B, across, T, N), **new)
        d_A, d_D, d_h = torch.empty((B, I, N), **new), torch.empty((B, I), **new), torch.empty((B, I, N), **new)
        selective_backward[(B * across,)](u, dt, A, Bm, Cm, D, kept, d_y.contiguous(), d_last.contiguous(), scratch,
                                          d_u, d_dt, d_A, d_B, d_C, d_D, d_h, T, I, N, **blocks, **options)
        return (d_u, d_dt, d_A.sum(0).to(A.dtype), d_B.sum(1).to(Bm.dtype), d_C.sum(1).to(Cm.dtype),
                d_D.sum(0).to(D.dtype), d_h.to(ctx.h_type), None)


def selective_scan(u, dt, A, Bm, Cm, D, h=None):
    """Mamba's recurrence (Gu & Dao 2023, section 3), as recurrent.Mamba runs it, skip included:

        h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,   y_t = C_t h_t + D u_t

    u, dt (B, T, I), A (I, N), Bm, Cm (B, T, N), D (I,), of any float types; h (B, I, N) the state before, None: zeros.
    dt comes after its softplus, and is 0 at padding, where the state then stays; A is negative, -exp(a_log). Returns y
    (B, T, I) and the last state (B, I, N), both float32 (float64 where u is); either may be differentiated. Raises
    ValueError for other shapes.
    Memory of the kernels' backward pass beside the gradients, in float32 numbers: T / 64 states are kept, B I N each;
    64 B I N of scratch; N / 16 times B T I for each of the partial gradients of Bm and Cm.
    """
    _expect(u.dim() == 3 and u.shape == dt.shape, "selective_scan needs u and dt (B, T, I) of one shape")
    (B, T, I), N = u.shape, A.size(-1)
    _expect(A.shape == (I, N) and D.shape == (I,), "selective_scan needs A (I, N) and D (I,)")
    _expect(Bm.shape == Cm.shape == (B, T, N), "selective_scan needs Bm and Cm (B, T, N)")
    h = torch.zeros(B, I, N, device=u.device) if h is None else h
    _expect(h.shape == (B, I, N), "selective_scan needs h (B, I, N)")
    given = u, dt, A, Bm, Cm, D, h
    if fits(u):
        return SelectiveScan.apply(*given, torch.is_grad_enabled() and any(t.requires_grad for t in given))
    return selective_scan_reference(*given)


# --- Experts: one matrix for every group of rows ---

def grouped_linear_reference(x, weight, offsets):
    """Expert after expert, F.linear of its rows."""
    ends = offsets.tolist()
    return torch.cat([F.linear(x[i:j], weight[e]) for e, (i, j) in enumerate(zip(ends, ends[1:]))])


def grouped_blocks(N, E, out, into, dtype):
    """The constants and options to multiply N rows of E experts, `into` wide, to `out` columns: tiles near the mean
    number of rows, smaller for float32, which has no tensor cores here."""
    most, depth = (64, 16) if dtype == torch.float32 else (128, 64)
    rows, cols = _power(ceil_div(N, E), 16, most), _power(out, 16, most)
    return (dict(ROWS=rows, COLS=cols, DEPTH=_power(into, 16, depth), EXPERTS=_power(E, 1, 1 << 16)),
            dict(num_warps=8 if rows * cols > 8192 else 4, num_stages=3))


def weight_blocks(W, C, dtype):
    """The constants and options for the gradient of matrices (W, C)."""
    most, depth = (64, 16) if dtype == torch.float32 else (128, 64)
    rows, cols = _power(W, 16, most), _power(C, 16, most)
    return (dict(ROWS=rows, COLS=cols, DEPTH=depth), dict(num_warps=8 if rows * cols > 8192 else 4, num_stages=3))


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
    blocks, options = grouped_blocks(N, E, out, into, x.dtype)
    grid = ((N // blocks["ROWS"] + E) * ceil_div(out, blocks["COLS"]),)
    grouped_rows[grid](x, weight, offsets, y, E, out, into, TURNED=turned, **blocks, **options)
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
            d_weight, (blocks, options) = torch.empty_like(weight), weight_blocks(W, C, x.dtype)
            grid = (E * ceil_div(W, blocks["ROWS"]) * ceil_div(C, blocks["COLS"]),)
            grouped_weight[grid](x, grad, offsets, d_weight, W, C, **blocks, **options)
        return d_x, d_weight, None


def grouped_linear(x, weight, offsets):
    """Rows sorted by expert, each times the matrix of its expert: y_i = weight[e] x_i.

    x (N, C) float16, bfloat16, float32 or float64, weight (E, W, C) of the same type (under autocast both are cast, as
    F.linear does), offsets (E + 1,) int64 on the device of x: expert e has the rows offsets[e] ... offsets[e + 1] - 1,
    none if they are equal; they rise from 0 to N, which is not checked, because that would wait for the device.
    Returns (N, W) of the type of x; sums are float32. Raises ValueError for other shapes and types.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        kind = torch.get_autocast_dtype(device)
        x, weight = x.to(kind), weight.to(kind)
    _expect(x.dim() == 2 and weight.dim() == 3 and x.size(1) == weight.size(2) and x.dtype == weight.dtype,
            "grouped_linear needs x (N, C) and weight (E, W, C) of one type")
    _expect(offsets.shape == (weight.size(0) + 1,) and len(weight) and offsets.dtype == torch.int64,
            "grouped_linear needs offsets (E + 1,) int64 for one expert or more")
    return (GroupedLinear.apply if fits(x) else grouped_linear_reference)(x, weight, offsets)
