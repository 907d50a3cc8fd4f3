"""Attention as kernels: forward, backward, and over a cache. kernels.py has the formulas, and what callers are told.

Every mask but padding's is an interval: a query sees the keys whose positions lie in [low, high). What the kernels keep
of the scores is one number of a query, the base-2 log-sum-exp; the backward pass computes them again, block by block,
in two kernels without atomics, so that results are the same every time. Block sizes come from `blocks`, plain Python:
nothing is tuned at run time.

Shapes: B batch, H heads, G key-value heads (G divides H), T queries, S keys, D head size, Dv values' size. Inside, all
tensors have two batch dimensions, (A, N, H, T, D): masks belong to the first, and both may be strided at will.
"""
import math

import torch
from torch.autograd.function import once_differentiable
from triton import cdiv, next_power_of_2

from fused.ground import dot, jit, tl

LOG2_E = math.log2(math.e)
MANY = 2 ** 31 - 1


# --- Block sizes ---

def shared_limit(capability):
    """Bytes of shared memory that one program may take on a GPU of this compute capability, (major, minor)."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    if capability < (8, 0):
        return 64 * 1024
    return 227 * 1024 if 9 <= capability[0] < 12 else 99 * 1024  # 99: 8.6, 8.9 and 12.x


def limit_of(x):
    """shared_limit of the GPU that tensor x lies on; of sm_80 for a CPU tensor, in the interpreter."""
    return shared_limit(torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0))


def padded(n):
    """The power of two that a tile takes for n columns; a product needs 16 at least."""
    return max(16, next_power_of_2(n))


def blocks(kind, D, Dv, itemsize, limit):
    """Sizes for one kernel of `attend`, as keyword arguments: BT queries by BS keys, padded widths, warps and stages.

    kind: "forward", "dq" or "dkv". itemsize: bytes of one number. limit: shared memory, bytes. The program's own tile
    stays; the tiles of its loop lie in shared memory once for each stage. Starting from sizes for tensor cores (2
    bytes) or plain multiplication (4), stages go first where the limit is exceeded, then the loop's tile, then its own.
    """
    BD, BDV = padded(D), padded(Dv)
    width = max(BD, BDV)
    if itemsize == 2:
        own, loop = (64, 32) if width > 128 else (128, 64) if kind == "forward" else (64, 64)
    else:
        own, loop = (64, 32) if width <= 64 else (32, 32) if width <= 128 else (32, 16)
    warps = 4 if width <= 64 and itemsize == 2 else 8
    stages = 3 if kind == "forward" else 2

    def size():
        """Tiles of queries and keys are as wide as those of outputs and values, one beside the other."""
        return itemsize * ((own + stages * loop) * (BD + BDV) + (2 if kind == "dkv" else 1) * own * loop)
    while size() > limit:
        if stages > 1:
            stages -= 1
        elif loop > 16:
            loop //= 2
        else:
            own //= 2
    BT, BS = (loop, own) if kind == "dkv" else (own, loop)
    return dict(BT=BT, BS=BS, BD=BD, BDV=BDV, num_warps=warps, num_stages=stages)


def blocks_one(rows, D, extra, Dv, itemsize, limit, shared):
    """Sizes for the kernel of `attend_one`, as `blocks`: BR of `rows` queries of one key head by BS keys.

    extra: columns of the keys beyond D that are no values. shared: values are the keys' first D columns.
    """
    BD, BX, BDV = padded(D), padded(extra) if extra else 0, padded(Dv)
    BR = min(padded(rows), 32 if BDV > 128 else 64)
    BS, stages = 64 if BDV <= 128 and itemsize == 2 else 32, 2
    wide = BD + BX + (0 if shared else BDV)
    while itemsize * (BR * (BD + BX + BS) + stages * BS * wide) > limit:
        if stages > 1:
            stages -= 1
        elif BS > 16:
            BS //= 2
        else:
            BR //= 2
    return dict(BR=BR, BS=BS, BD=BD, BX=max(BX, 16), BDV=BDV, num_warps=8 if BDV > 128 else 4, num_stages=stages)


# --- Kernels ---

@jit
def load_tile(base, rows, row_stride, columns, column_stride, n, width):
    """Rows (M,) below n by columns (W,) below width of what lies at base: (M, W), zeros elsewhere."""
    at = base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(at, mask=(rows < n)[:, None] & (columns < width)[None, :], other=0.0)


@jit
def store_tile(base, rows, row_stride, columns, column_stride, n, width, x):
    """The reverse of load_tile."""
    at = base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tl.store(at, x.to(base.dtype.element_ty), mask=(rows < n)[:, None] & (columns < width)[None, :])


@jit
def of_row(a, lengths, prefixes, S, PADDED: tl.constexpr, PREFIXED: tl.constexpr):
    """Of row a: (end of its keys, end of its prefix)."""
    end, prefix = S, 0
    if PADDED:
        end = tl.maximum(tl.minimum(tl.load(lengths + a), S), 0)
    if PREFIXED:
        prefix = tl.load(prefixes + a)
    return end, prefix


@jit
def queries_at(positions, t, T, S, PLACED: tl.constexpr):
    """Where queries t stand; -1 marks padding where there are `positions` (S,)."""
    if PLACED:
        return tl.load(positions + S - T + t, mask=t < T, other=-1)
    return S - T + t


@jit
def keys_at(positions, s, end, PLACED: tl.constexpr):
    """Where keys s stand; those from `end` on are padding, which -1 marks where there are `positions` (S,)."""
    if PLACED:
        return tl.load(positions + s, mask=s < end, other=-1)
    return s


@jit
def bounds(t, at, T, end, prefix, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PLACED: tl.constexpr):
    """Queries t, which stand at `at`, see the keys whose positions lie in [low, high)."""
    real, high, low = t < T, at * 0 + end, at * 0
    if PLACED:
        real, high = real & (at >= 0), at * 0 + 2147483647  # keys_at knows the end
    if CAUSAL:
        high = tl.minimum(tl.maximum(at + 1, prefix), high)
    if WINDOWED:
        low = tl.maximum(at - window + 1, 0)
    return low, tl.where(real, high, 0)


@jit
def inside(low, high, at, BOTH: tl.constexpr):
    """Keys at positions `at` lie in [low, high). BOTH: they may lie below it."""
    if BOTH:
        return (at >= low) & (at < high)
    return at < high


@jit
def key_range(t0, t1, T, S, end, prefix, window, BS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
              PLACED: tl.constexpr):
    """The keys [first, end) that queries t0 to t1 - 1 may see, first a multiple of BS."""
    first = 0
    if CAUSAL and not PLACED:
        end = tl.minimum(end, tl.maximum(S - T + t1, prefix))
        if WINDOWED:
            first = tl.maximum(S - T + t0 - window + 1, 0) // BS * BS
    return first, end


@jit
def forward_kernel(q, k, v, o, lse, lengths, prefixes, positions, scale, window, N, H, rep, T, S,
                   q_a, q_n, q_h, q_t, q_d, k_a, k_n, k_h, k_t, k_d, v_a, v_n, v_h, v_t, v_d, o_a, o_n, o_h, o_t, o_d,
                   CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PREFIXED: tl.constexpr, PADDED: tl.constexpr,
                   PLACED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                   BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr):
    """BT queries of one head over all keys that they see, softmax as it goes. scale: times log2 e. lse (A, N, H, T)."""
    n_blocks = tl.cdiv(T, BT)
    t0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BT  # those with the most keys start first
    line = tl.program_id(0) // n_blocks
    h, n = (line % H).to(tl.int64), (line // H % N).to(tl.int64)
    a = (line // H // N).to(tl.int64)
    t, d, dv = t0 + tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BDV)
    k += a * k_a + n * k_n + h // rep * k_h
    v += a * v_a + n * v_n + h // rep * v_h
    positions += a * S
    end, prefix = of_row(a, lengths, prefixes, S, PADDED, PREFIXED)
    low, high = bounds(t, queries_at(positions, t, T, S, PLACED), T, end, prefix, window, CAUSAL, WINDOWED, PLACED)
    query = load_tile(q + a * q_a + n * q_n + h * q_h, t, q_t, d, q_d, T, D)  # (BT, BD)
    top = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    y = tl.zeros((BT, BDV), tl.float32)
    first, last = key_range(t0, tl.minimum(t0 + BT, T), T, S, end, prefix, window, BS, CAUSAL, WINDOWED, PLACED)
    for s0 in range(first, last, BS):
        s = s0 + tl.arange(0, BS)
        key = load_tile(k, s, k_t, d, k_d, end, D)  # (BS, BD)
        scores = dot(query, tl.trans(key)) * scale  # (BT, BS)
        at = keys_at(positions, s, end, PLACED)
        scores = tl.where(inside(low[:, None], high[:, None], at[None, :], WINDOWED or PLACED), scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        value = load_tile(v, s, v_t, dv, v_d, end, DV)  # (BS, BDV)
        y = y * shrink[:, None] + dot(p.to(value.dtype), value)
        top = new
    nothing = total == 0.0
    y = y / tl.where(nothing, 1.0, total)[:, None]
    store_tile(o + a * o_a + n * o_n + h * o_h, t, o_t, dv, o_d, T, DV, y)
    sums = tl.where(nothing, float("inf"), top + tl.log2(tl.where(nothing, 1.0, total)))  # inf: all weights are 0
    tl.store(lse + line.to(tl.int64) * T + t, sums, mask=t < T)


@jit
def dq_kernel(q, k, v, o, do, dq, lse, delta, lengths, prefixes, positions, scale, plain_scale, window, N, H, rep, T, S,
              q_a, q_n, q_h, q_t, q_d, k_a, k_n, k_h, k_t, k_d, v_a, v_n, v_h, v_t, v_d, o_a, o_n, o_h, o_t, o_d,
              do_a, do_n, do_h, do_t, do_d, dq_a, dq_n, dq_h, dq_t, dq_d,
              CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PREFIXED: tl.constexpr, PADDED: tl.constexpr,
              PLACED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr):
    """dq of BT queries of one head; leaves delta = rowsum(do o) (A, N, H, T) float32 to dkv_kernel."""
    n_blocks = tl.cdiv(T, BT)
    t0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BT
    line = tl.program_id(0) // n_blocks
    h, n = (line % H).to(tl.int64), (line // H % N).to(tl.int64)
    a = (line // H // N).to(tl.int64)
    t, d, dv = t0 + tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BDV)
    k += a * k_a + n * k_n + h // rep * k_h
    v += a * v_a + n * v_n + h // rep * v_h
    positions += a * S
    end, prefix = of_row(a, lengths, prefixes, S, PADDED, PREFIXED)
    low, high = bounds(t, queries_at(positions, t, T, S, PLACED), T, end, prefix, window, CAUSAL, WINDOWED, PLACED)
    dy = load_tile(do + a * do_a + n * do_n + h * do_h, t, do_t, dv, do_d, T, DV)  # (BT, BDV)
    y = load_tile(o + a * o_a + n * o_n + h * o_h, t, o_t, dv, o_d, T, DV)
    inner = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)  # (BT,)
    tl.store(delta + line.to(tl.int64) * T + t, inner, mask=t < T)
    query = load_tile(q + a * q_a + n * q_n + h * q_h, t, q_t, d, q_d, T, D)  # (BT, BD)
    sums = tl.load(lse + line.to(tl.int64) * T + t, mask=t < T, other=float("inf"))
    grad = tl.zeros((BT, BD), tl.float32)
    first, last = key_range(t0, tl.minimum(t0 + BT, T), T, S, end, prefix, window, BS, CAUSAL, WINDOWED, PLACED)
    for s0 in range(first, last, BS):
        s = s0 + tl.arange(0, BS)
        key = load_tile(k, s, k_t, d, k_d, end, D)  # (BS, BD)
        value = load_tile(v, s, v_t, dv, v_d, end, DV)  # (BS, BDV)
        scores = dot(query, tl.trans(key)) * scale  # (BT, BS)
        at = keys_at(positions, s, end, PLACED)
        scores = tl.where(inside(low[:, None], high[:, None], at[None, :], WINDOWED or PLACED), scores, float("-inf"))
        p = tl.exp2(scores - sums[:, None])
        ds = p * (dot(dy, tl.trans(value)) - inner[:, None])
        grad += dot(ds.to(key.dtype), key)
    store_tile(dq + a * dq_a + n * dq_n + h * dq_h, t, dq_t, d, dq_d, T, D, grad * plain_scale)


@jit
def dkv_kernel(q, k, v, do, dk, dv, lse, delta, lengths, prefixes, positions, scale, plain_scale, window, N, G, rep,
               T, S, q_a, q_n, q_h, q_t, q_d, k_a, k_n, k_h, k_t, k_d, v_a, v_n, v_h, v_t, v_d,
               do_a, do_n, do_h, do_t, do_d, dk_a, dk_n, dk_h, dk_t, dk_d, dv_a, dv_n, dv_h, dv_t, dv_d,
               CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PREFIXED: tl.constexpr, PADDED: tl.constexpr,
               PLACED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
               BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr):
    """dk and dv of BS keys of one key head, summed over the rep query heads that share it."""
    n_blocks = tl.cdiv(S, BS)
    s0 = tl.program_id(0) % n_blocks * BS  # the first keys are seen by the most queries
    line = tl.program_id(0) // n_blocks
    g, n = (line % G).to(tl.int64), (line // G % N).to(tl.int64)
    a = (line // G // N).to(tl.int64)
    s, d, e = s0 + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BDV)
    positions += a * S
    end, prefix = of_row(a, lengths, prefixes, S, PADDED, PREFIXED)
    at = keys_at(positions, s, end, PLACED)
    key = load_tile(k + a * k_a + n * k_n + g * k_h, s, k_t, d, k_d, end, D)  # (BS, BD)
    value = load_tile(v + a * v_a + n * v_n + g * v_h, s, v_t, e, v_d, end, DV)  # (BS, BDV)
    dkey = tl.zeros((BS, BD), tl.float32)
    dvalue = tl.zeros((BS, BDV), tl.float32)
    first, last = 0, T  # the queries that may see these keys
    if CAUSAL and not PLACED:
        first = tl.where(s0 < prefix, 0, tl.maximum(s0 - (S - T), 0) // BT * BT)
        if WINDOWED:
            last = tl.minimum(T, s0 + BS - 1 + window - (S - T))
    if PADDED:
        last = tl.where(s0 < end, last, 0)
    for i in range(rep):
        head = g * rep + i
        row = ((a * N + n) * G * rep + head) * T
        for t0 in range(first, last, BT):
            t = t0 + tl.arange(0, BT)
            query = load_tile(q + a * q_a + n * q_n + head * q_h, t, q_t, d, q_d, T, D)  # (BT, BD)
            dy = load_tile(do + a * do_a + n * do_n + head * do_h, t, do_t, e, do_d, T, DV)  # (BT, BDV)
            sums = tl.load(lse + row + t, mask=t < T, other=float("inf"))
            inner = tl.load(delta + row + t, mask=t < T, other=0.0)
            low, high = bounds(t, queries_at(positions, t, T, S, PLACED), T, end, prefix, window, CAUSAL, WINDOWED,
                              PLACED)
            scores = dot(key, tl.trans(query)) * scale  # (BS, BT)
            scores = tl.where(inside(low[None, :], high[None, :], at[:, None], WINDOWED or PLACED), scores,
                              float("-inf"))
            p = tl.exp2(scores - sums[None, :])
            dvalue += dot(p.to(dy.dtype), dy)
            ds = p * (dot(value, tl.trans(dy)) - inner[None, :])
            dkey += dot(ds.to(query.dtype), query)
    store_tile(dk + a * dk_a + n * dk_n + g * dk_h, s, dk_t, d, dk_d, S, D, dkey * plain_scale)
    store_tile(dv + a * dv_a + n * dv_n + g * dv_h, s, dv_t, e, dv_d, S, DV, dvalue)


@jit
def split_kernel(q, k, v, part, lse, lengths, scale, G, rep, T, S, splits,
                 q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
                 PADDED: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, EXTRA: tl.constexpr, DV: tl.constexpr,
                 BR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BDV: tl.constexpr):
    """One split of a row's keys, for BR of the rep T queries of one key head.

    Keys are D columns and EXTRA more; SHARED: their first D are the values too. part (B H T, splits, DV) float32: what
    this split alone would give; lse (B H T, splits) float32: its base-2 log-sum-exp, -inf where it has no keys.
    """
    i = tl.program_id(0) % splits
    rest = tl.program_id(0) // splits
    n_blocks = tl.cdiv(rep * T, BR)
    r = rest % n_blocks * BR + tl.arange(0, BR)
    g = (rest // n_blocks % G).to(tl.int64)
    b = (rest // n_blocks // G).to(tl.int64)
    end = S
    if PADDED:
        end = tl.maximum(tl.minimum(tl.load(lengths + b), S), 0)
    real, t = r < rep * T, r % T
    h = g * rep + r // T
    high = tl.where(real, end - T + t + 1, 0)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    line = q + b * q_b + h * q_h + t.to(tl.int64) * q_t  # (BR,)
    query = tl.load(line[:, None] + d.to(tl.int64)[None, :] * q_d, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if EXTRA:
        x = tl.arange(0, BX)
        query_x = tl.load(line[:, None] + (x + D).to(tl.int64)[None, :] * q_d,
                          mask=real[:, None] & (x < EXTRA)[None, :], other=0.0)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    y = tl.zeros((BR, BDV), tl.float32)
    each = tl.cdiv(tl.cdiv(end, splits), BS) * BS
    for s0 in range(i * each, tl.minimum(end, (i + 1) * each), BS):
        s = s0 + tl.arange(0, BS)
        key = load_tile(k, s, k_t, d, k_d, end, D)  # (BS, BD)
        scores = dot(query, tl.trans(key))  # (BR, BS)
        if EXTRA:
            scores += dot(query_x, tl.trans(load_tile(k + D * k_d, s, k_t, x, k_d, end, EXTRA)))
        scores = tl.where(s[None, :] < high[:, None], scores * scale, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        if SHARED:
            value = key
        else:
            value = load_tile(v, s, v_t, dv, v_d, end, DV)  # (BS, BDV)
        y = y * shrink[:, None] + dot(p.to(value.dtype), value)
        top = new
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    place = ((b * G * rep + h) * T + t) * splits + i
    tl.store(lse + place, tl.where(nothing, float("-inf"), top + tl.log2(total)), mask=real)
    tl.store(part + place[:, None] * DV + dv[None, :], y / total[:, None], mask=real[:, None] & (dv < DV)[None, :])


@jit
def join_kernel(part, lse, o, H, T, splits, o_b, o_h, o_t, o_d, DV: tl.constexpr, BP: tl.constexpr,
                BDV: tl.constexpr):
    """One query's output out of its splits, each weighed by its part of the sum; zeros where no split has a key."""
    line = tl.program_id(0).to(tl.int64)
    t, h, b = line % T, line // T % H, line // T // H
    i, dv = tl.arange(0, BP), tl.arange(0, BDV)
    sums = tl.load(lse + line * splits + i, mask=i < splits, other=float("-inf"))
    top = tl.max(sums, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(sums - safe), 0)
    y = tl.zeros((BDV,), tl.float32)
    for j in range(splits):
        weight = tl.exp2(tl.load(lse + line * splits + j) - safe)
        y += weight * tl.load(part + (line * splits + j) * DV + dv, mask=dv < DV, other=0.0)
    y = y / tl.where(total == 0.0, 1.0, total)
    tl.store(o + b * o_b + h * o_h + t * o_t + dv.to(tl.int64) * o_d, y.to(o.dtype.element_ty), mask=dv < DV)


# --- From Python ---

def empty_beside(x, *shape):
    """Empty (*shape) in the type of x, dense, its dimensions in memory in the order of x's, features innermost."""
    outer = sorted(range(x.dim() - 1), key=lambda i: -(x.stride(i) or MANY))  # what is repeated lies outermost
    order = [*outer, x.dim() - 1]
    made = torch.empty([shape[i] for i in order], dtype=x.dtype, device=x.device)
    return made.permute([order.index(i) for i in range(x.dim())])


class Attend(torch.autograd.Function):
    """The kernels on (A, N, H, T, D), (A, N, G, S, D) and (A, N, G, S, Dv); memory beyond inputs and gradients: the
    output and two float32 numbers of each query."""

    @staticmethod
    def forward(ctx, q, k, v, causal, window, prefixes, lengths, positions, scale):
        (A, N, H, T, D), S, Dv = q.shape, k.size(3), v.size(4)
        o = empty_beside(q, A, N, H, T, Dv)
        lse = torch.empty(A, N, H, T, dtype=torch.float32, device=q.device)
        flags = dict(CAUSAL=causal, WINDOWED=window is not None, PREFIXED=prefixes is not None,
                     PADDED=lengths is not None, PLACED=positions is not None, D=D, DV=Dv)
        rows = [q if t is None else t for t in (lengths, prefixes, positions)]  # a flag says that it is not read
        ctx.rest = flags, window or 0, scale
        ctx.save_for_backward(q, k, v, o, lse, *rows)
        sizes = blocks("forward", D, Dv, q.element_size(), limit_of(q))
        with torch.cuda.device_of(q):
            forward_kernel[(cdiv(T, sizes["BT"]) * A * N * H,)](
                q, k, v, o, lse, *rows, scale * LOG2_E, window or 0, N, H, H // k.size(2), T, S,
                *q.stride(), *k.stride(), *v.stride(), *o.stride(), **flags, **sizes)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, *rows = ctx.saved_tensors
        flags, window, scale = ctx.rest
        (A, N, H, T, D), G, S, Dv = q.shape, k.size(2), k.size(3), v.size(4)
        dq, dk, dv = (empty_beside(t, *t.shape) for t in (q, k, v))
        delta = torch.empty_like(lse)
        ends = scale * LOG2_E, scale, window, N
        sizes = blocks("dq", D, Dv, q.element_size(), limit_of(q))
        with torch.cuda.device_of(q):
            dq_kernel[(cdiv(T, sizes["BT"]) * A * N * H,)](
                q, k, v, o, do, dq, lse, delta, *rows, *ends, H, H // G, T, S, *q.stride(), *k.stride(), *v.stride(),
                *o.stride(), *do.stride(), *dq.stride(), **flags, **sizes)
            sizes = blocks("dkv", D, Dv, q.element_size(), limit_of(q))
            dkv_kernel[(cdiv(S, sizes["BS"]) * A * N * G,)](
                q, k, v, do, dk, dv, lse, delta, *rows, *ends, G, H // G, T, S, *q.stride(), *k.stride(), *v.stride(),
                *do.stride(), *dk.stride(), *dv.stride(), **flags, **sizes)
        return dq, dk, dv, None, None, None, None, None, None


def per_row(t, B, device):
    """An int or (B,) as (B,) int32; a tensor of positions as int32; None as None."""
    if t is None:
        return None
    if torch.is_tensor(t):
        return t.to(device, torch.int32).contiguous()
    return torch.full((B,), t, dtype=torch.int32, device=device)


def attend_rows(q, k, v, causal=True, window=None, prefix=None, lengths=None, positions=None, scale=None):
    """`attend`'s kernels on two batch dimensions, the first of which masks belong to."""
    B, device = q.size(0), q.device
    return Attend.apply(q, k, v, causal, window, *(per_row(t, B, device) for t in (prefix, lengths, positions)),
                        q.size(-1) ** -0.5 if scale is None else scale)


def n_splits(programs, S, device):
    """Splits of S keys so that about two programs come on each multiprocessor, 256 keys at least and 128 at most."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108
    return max(1, min(-(-S // 256), 2 * units // programs, 128))


def over_cache(q, k, v, lengths, splits, scale, D, shared):
    """attend_one and attend_latent. Keys are D columns and the rest; shared: their first D are the values too."""
    (B, H, T, width), G, S, Dv = q.shape, k.size(1), k.size(2), v.size(3)
    sizes = blocks_one(H // G * T, D, width - D, Dv, q.element_size(), limit_of(q), shared)
    programs = cdiv(H // G * T, sizes["BR"]) * B * G
    splits = n_splits(programs, S, q.device) if splits is None else splits
    part = torch.empty(B * H * T, splits, Dv, dtype=torch.float32, device=q.device)
    lse = torch.empty(B * H * T, splits, dtype=torch.float32, device=q.device)
    o = empty_beside(q, B, H, T, Dv)
    with torch.cuda.device_of(q):
        split_kernel[(splits * programs,)](
            q, k, v, part, lse, q if lengths is None else per_row(lengths, B, q.device), scale * LOG2_E, G, H // G, T,
            S, splits, *q.stride(), *k.stride(), *v.stride(), PADDED=lengths is not None, SHARED=shared, D=D,
            EXTRA=width - D, DV=Dv, **sizes)
        join_kernel[(B * H * T,)](part, lse, o, H, T, splits, *o.stride(), DV=Dv, BP=next_power_of_2(splits),
                                  BDV=padded(Dv), num_warps=1)
    return o
