"""AdamW, global clipping and OrthoGrad over many tensors at once. kernels.adamw_step has their formulas.

One program works on one chunk of one tensor. Where the tensors lie is read from a table of addresses, so one launch
updates all of them, whatever their number. Sums (norms, and OrthoGrad's dot products) take a launch of their own, one
partial sum a chunk, and a small second one that adds a tensor's chunks in order: no atomics, the same bits at every
run, and nothing waits for the host.
"""
import torch
from torch.autograd.graph import increment_version

from fused.ground import jit, tl

BLOCK, WARPS = 1024, 4  # elements at a time
FLOATS = (torch.float32, torch.bfloat16)  # of parameters and gradients, in this order; state is float32
COLUMNS = 7  # of the table: addresses of parameter, gradient and both moments; elements; dtypes; the first chunk


def _chunk(elements):
    """Elements of a chunk: small ones where there would be too few programs for a GPU, else ones worth a launch."""
    return 4 * BLOCK if elements < 2 ** 22 else 16 * BLOCK


# --- One chunk of one tensor ---

@jit
def _pointers(address, WHOLE: tl.constexpr):
    """Pointers to float32 and to bfloat16 from an address, an int64. WHOLE: the compiler shall know that it is a
    multiple of 16, so that a thread may take 16 bytes at once."""
    single, half = address.to(tl.pointer_type(tl.float32)), address.to(tl.pointer_type(tl.bfloat16))
    if WHOLE:
        single, half = tl.multiple_of(single, 16), tl.multiple_of(half, 16)
    return single, half


@jit
def _clip(norm, most, CLIP: tl.constexpr):
    """min(most / (norm + 1e-6), 1), as torch's clip_grad_norm_; NaN stays NaN."""
    scale = 1.0
    if CLIP:
        scale = most / (tl.load(norm) + 1e-6)
        scale = tl.where(scale > 1.0, 1.0, scale)
    return scale


@jit
def _along(totals, tensor, tensors, scale):
    """-w.g / w.w of a tensor, g being clipped; 0 where clipping leaves nothing, though w.g may have overflowed."""
    dot = scale * tl.load(totals + tensors + tensor)
    along = -dot / (tl.load(totals + 2 * tensors + tensor) + 1e-30)
    return tl.where(scale == 0.0, 0.0, along)


# --- Sums ---

@jit
def _chunk_sums(w_at, g_at, w_half, g_half, start, left, along, scale, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
                KIND: tl.constexpr, WHOLE: tl.constexpr):
    """The sums of a chunk that KIND asks for: see `_sums`."""
    w32, w16 = _pointers(w_at, WHOLE)
    g32, g16 = _pointers(g_at, WHOLE)
    # of a block's shape, as a comparison of one number makes the interpreter's masks integers
    w_wide, g_wide = w_half + tl.zeros((BLOCK,), tl.int64) == 0, g_half + tl.zeros((BLOCK,), tl.int64) == 0
    first_sum = tl.zeros((BLOCK,), tl.float32)
    dots = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        inside = first + tl.arange(0, BLOCK) < (CHUNK if WHOLE else left)
        at = start + first + tl.arange(0, BLOCK)
        g = tl.load(g16 + at, mask=inside & (g_wide == 0), other=0.0).to(tl.float32)
        g = tl.where(g_wide, tl.load(g32 + at, mask=inside & g_wide, other=0.0), g)
        if KIND > 0:
            w = tl.load(w16 + at, mask=inside & (w_wide == 0), other=0.0).to(tl.float32)
            w = tl.where(w_wide, tl.load(w32 + at, mask=inside & w_wide, other=0.0), w)
            if KIND == 2:
                g = along * w + g * scale
            else:
                dots += w * g
                squares += w * w
        first_sum += g * g
    return tl.sum(first_sum, 0), tl.sum(dots, 0), tl.sum(squares, 0)


@jit
def _sums(table, chunks, partials, totals, norm, most, tensors, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
          BLOCK: tl.constexpr, CLIP: tl.constexpr, KIND: tl.constexpr):
    """partials (rows, chunks) of every chunk. KIND 0: g.g; 1: g.g, w.g, w.w; 2: |g + along w|^2 of clipped g."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk).to(tl.int64)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    row = table + tensor * COLUMNS
    w_at, g_at, halves = tl.load(row), tl.load(row + 1), tl.load(row + 5)
    left = tl.load(row + 4) - start
    scale = _clip(norm, most, CLIP)
    along = 0.0
    if KIND == 2:
        along = _along(totals, tensor, tensors, scale)
    if (left >= CHUNK) & ((w_at | g_at) % 16 == 0):
        a, b, c = _chunk_sums(w_at, g_at, halves % 2, halves // 2, start, left, along, scale, CHUNK, BLOCK, KIND, True)
    else:
        a, b, c = _chunk_sums(w_at, g_at, halves % 2, halves // 2, start, left, along, scale, CHUNK, BLOCK, KIND, False)
    tl.store(partials + chunk, a)
    if KIND == 1:
        tl.store(partials + tl.num_programs(0) + chunk, b)
        tl.store(partials + 2 * tl.num_programs(0) + chunk, c)


@jit
def _finish(table, partials, totals, chunks, tensors, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK: tl.constexpr):
    """partials (rows, chunks) -> totals (rows, tensors), one program a sum."""
    tensor, row = tl.program_id(0), tl.program_id(1)
    count = tl.cdiv(tl.load(table + tensor * COLUMNS + 4), CHUNK).to(tl.int32)
    partials += row * chunks + tl.load(table + tensor * COLUMNS + 6)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < count, other=0.0)
    tl.store(totals + row * tensors + tensor, tl.sum(total, 0))


# --- The update ---

@jit
def _chunk_update(w_at, g_at, mean_at, square_at, w_half, g_half, start, left, keep, size, new1, keep2, new2, eps,
                  scale, along, stretch, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ORTHOGRAD: tl.constexpr,
                  WHOLE: tl.constexpr):
    """AdamW on a chunk."""
    w32, w16 = _pointers(w_at, WHOLE)
    g32, g16 = _pointers(g_at, WHOLE)
    means, _ = _pointers(mean_at, WHOLE)
    squares, _ = _pointers(square_at, WHOLE)
    w_wide, g_wide = w_half + tl.zeros((BLOCK,), tl.int64) == 0, g_half + tl.zeros((BLOCK,), tl.int64) == 0
    for first in range(0, tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        inside = first + tl.arange(0, BLOCK) < (CHUNK if WHOLE else left)
        at = start + first + tl.arange(0, BLOCK)
        w = tl.load(w16 + at, mask=inside & (w_wide == 0), other=0.0).to(tl.float32)
        w = tl.where(w_wide, tl.load(w32 + at, mask=inside & w_wide, other=0.0), w)
        g = tl.load(g16 + at, mask=inside & (g_wide == 0), other=0.0).to(tl.float32)
        g = tl.where(g_wide, tl.load(g32 + at, mask=inside & g_wide, other=0.0), g) * scale
        mean = tl.load(means + at, mask=inside, other=0.0)
        square = tl.load(squares + at, mask=inside, other=0.0)
        if ORTHOGRAD:
            g = (along * w + g) * stretch
        # torch.lerp, which is exact at both ends
        mean = tl.where(new1 < 0.5, mean + new1 * (g - mean), g - (g - mean) * (1 - new1))
        square = square * keep2 + new2 * g * g
        w = w * keep + tl.div_rn(size * mean, tl.sqrt_rn(square) + eps)
        tl.store(w32 + at, w, mask=inside & w_wide)
        tl.store(w16 + at, w.to(tl.bfloat16), mask=inside & (w_wide == 0))
        tl.store(means + at, mean, mask=inside)
        tl.store(squares + at, square, mask=inside)


@jit
def _update(table, chunks, decays, totals, norm, most, tensors, lr, size, new1, keep2, new2, eps,
            COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, CLIP: tl.constexpr,
            ORTHOGRAD: tl.constexpr):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk).to(tl.int64)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    row = table + tensor * COLUMNS
    w_at, g_at, mean_at, square_at = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    elements, halves = tl.load(row + 4), tl.load(row + 5)
    left = elements - start
    keep = 1 - lr * tl.load(decays + tensor)
    scale = _clip(norm, most, CLIP)
    along, stretch = 0.0, 1.0
    if ORTHOGRAD:
        length = tl.sqrt_rn(tl.load(totals + tensor)) * scale
        rest = tl.sqrt_rn(tl.load(totals + 3 * tensors + tensor))
        stretch = tl.where(rest > 1.9073486328125e-06 * length, length / (rest + 1e-30), 0.0)  # 16 eps: rounding
        one = elements == 1  # has no direction but its own
        along = tl.where(one, 0.0, _along(totals, tensor, tensors, scale))
        stretch = tl.where(one, 1.0, stretch)
    if (left >= CHUNK) & ((w_at | g_at | mean_at | square_at) % 16 == 0):
        _chunk_update(w_at, g_at, mean_at, square_at, halves % 2, halves // 2, start, left, keep, size, new1, keep2,
                      new2, eps, scale, along, stretch, CHUNK, BLOCK, ORTHOGRAD, True)
    else:
        _chunk_update(w_at, g_at, mean_at, square_at, halves % 2, halves // 2, start, left, keep, size, new1, keep2,
                      new2, eps, scale, along, stretch, CHUNK, BLOCK, ORTHOGRAD, False)


# --- From Python ---

def _fit(tables, wanted):
    """Brings the device tables of one list of tensors into the dict `tables`, anew where something has moved.

    wanted: (parameter, gradient, first and second moment, decay) of each tensor; none of them empty. rows (T, COLUMNS)
    int64, decays (T,) float32, chunks (as many, 2) int32: the tensor's number, and which of its chunks. They hold
    addresses, no tensors: those must live until the step is done.
    """
    known = [(p.device, *(t.data_ptr() for t in (p, g, mean, square)), p.numel(), p.dtype, g.dtype, decay)
             for p, g, mean, square, decay in wanted]
    if known == tables.get("known"):
        return
    sizes = torch.tensor([p.numel() for p, *_ in wanted])
    chunk = _chunk(int(sizes.sum()))
    counts = (sizes + chunk - 1) // chunk
    firsts = counts.cumsum(0) - counts
    rows = [[*(t.data_ptr() for t in (p, g, mean, square)), p.numel(),
             FLOATS.index(p.dtype) + 2 * FLOATS.index(g.dtype), first]
            for (p, g, mean, square, _), first in zip(wanted, firsts.tolist())]
    owners = torch.arange(len(wanted)).repeat_interleave(counts)
    parts = torch.arange(len(owners)) - firsts.repeat_interleave(counts)
    decays = torch.tensor([decay for *_, decay in wanted], dtype=torch.float32)
    tables.update(known=known, chunk=chunk, **{name: _upload(table, wanted[0][0].device) for name, table in (
        ("rows", torch.tensor(rows, dtype=torch.int64)), ("chunks", torch.stack([owners, parts], 1).int()),
        ("decays", decays))})


def _upload(tensor, device):
    """A copy on the device that the host need not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def adamw_step(wanted, lr, size, betas, eps, clip, orthograd, tables):
    """As kernels.adamw_step. wanted: as `_fit` takes them; size, eps: with both bias corrections moved into them."""
    solid = [(*(t.contiguous() for t in tensors[:4]), tensors[4]) for tensors in wanted]
    _fit(tables, solid)
    table, chunks, chunk = tables["rows"], tables["chunks"], tables["chunk"]
    tensors, n_chunks, device = len(solid), len(chunks), table.device
    norm = totals = torch.empty(4 if orthograd else 1, tensors, dtype=torch.float32, device=device)
    most = 1.0 if clip is None else float(clip)
    shape = dict(COLUMNS=COLUMNS, CHUNK=chunk, BLOCK=BLOCK, num_warps=WARPS)
    if clip is not None or orthograd:
        partials = torch.empty(3 if orthograd else 1, n_chunks, dtype=torch.float32, device=device)

        def add(kind, into, clipped):
            _sums[(n_chunks,)](table, chunks, partials, totals, norm, most, tensors, CLIP=clipped, KIND=kind, **shape)
            _finish[(tensors, 3 if kind == 1 else 1)](table, partials, into, n_chunks, tensors, **shape)
        add(int(orthograd), totals, False)
        if clip is not None:
            norm = totals[0].sum().sqrt()
        if orthograd:
            add(2, totals[3], clip is not None)
    _update[(n_chunks,)](table, chunks, tables["decays"], totals, norm, most, tensors, float(lr), float(size),
                         float(1 - betas[0]), float(betas[1]), float(1 - betas[1]), float(eps), CLIP=clip is not None,
                         ORTHOGRAD=orthograd, **shape)
    for (p, _, mean, square, _), made in zip(wanted, solid):
        for tensor, new in ((p, made[0]), (mean, made[2]), (square, made[3])):
            if new is not tensor:
                tensor.copy_(new)
    increment_version([t for p, _, mean, square, _ in wanted for t in (p, mean, square)])
    return norm if clip is not None else None
