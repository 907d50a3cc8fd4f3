"""Optimiser steps over many tensors at once, beside their PyTorch twin: AdamW, global clipping, OrthoGrad.

One program works on one chunk of one tensor. Where the tensors lie is read from a table of addresses, so one launch
updates all of them, whatever their number. Formulas and order of operations are optim.py's. See kernels.py for what an
operation is; no kernel here has been timed on a GPU yet.

Sums (norms, and OrthoGrad's dot products) take a launch of their own, one partial sum a chunk, and a small second one
that adds a tensor's chunks in order: no atomics, the same bits at every run, and nothing waits for the host.
"""
import torch
from torch.autograd.graph import increment_version

from kernels import by_triton, jit, tl

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

class Tables:
    """The device tables of one list of tensors: kept from step to step, built anew where something has moved.

    rows (T, COLUMNS) int64, decays (T,) float32, chunks (as many, 2) int32: the tensor's number, and which of its
    chunks. They hold addresses, no tensors: those must live until the step is done.
    """

    def __init__(self):
        self.known = None

    def fit(self, wanted):
        """wanted: (parameter, gradient, first and second moment, decay) of each tensor; none of them empty."""
        known = [(p.device, *(t.data_ptr() for t in (p, g, mean, square)), p.numel(), p.dtype, g.dtype, decay)
                 for p, g, mean, square, decay in wanted]
        if known == self.known:
            return
        sizes = torch.tensor([p.numel() for p, *_ in wanted])
        self.chunk = _chunk(int(sizes.sum()))
        counts = (sizes + self.chunk - 1) // self.chunk
        firsts = counts.cumsum(0) - counts
        rows = [[*(t.data_ptr() for t in (p, g, mean, square)), p.numel(),
                 FLOATS.index(p.dtype) + 2 * FLOATS.index(g.dtype), first]
                for (p, g, mean, square, _), first in zip(wanted, firsts.tolist())]
        owners = torch.arange(len(wanted)).repeat_interleave(counts)
        parts = torch.arange(len(owners)) - firsts.repeat_interleave(counts)
        device = wanted[0][0].device
        self.rows = _upload(torch.tensor(rows, dtype=torch.int64), device)
        self.chunks = _upload(torch.stack([owners, parts], 1).int(), device)
        self.decays = _upload(torch.tensor([decay for *_, decay in wanted], dtype=torch.float32), device)
        self.known = known


def _upload(tensor, device):
    """A copy on the device that the host need not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _wanted(params, grads, exp_avgs, exp_avg_sqs, weight_decay):
    """(parameter, gradient, first and second moment, decay) of each tensor that has a gradient and elements.

    ValueError where the lists do not fit.
    """
    decays = [weight_decay] * len(params) if isinstance(weight_decay, (int, float)) else list(weight_decay)
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "weight_decay": decays}
    for name, found in lists.items():
        if len(found) != len(params):
            raise ValueError(f"{len(params)} params, but {len(found)} {name}")
    wanted = []
    for p, g, mean, square, decay in zip(params, *lists.values()):
        if g is None:
            continue
        state = torch.float64 if p.dtype == torch.float64 else torch.float32
        if not p.shape == g.shape == mean.shape == square.shape or mean.dtype != state or square.dtype != state:
            raise ValueError(f"a parameter {tuple(p.shape)} of {p.dtype} needs a gradient of its shape and moments of "
                             f"its shape and {state}")
        if len({t.device for t in (params[0], p, g, mean, square)}) > 1:
            raise ValueError("the tensors of one step must lie on one device")
        if p.numel():
            wanted.append((p, g, mean, square, float(decay)))
    return wanted


def _scalars(step, lr, betas, eps):
    """(step size with its sign, eps) with both bias corrections moved into them, as in optim.py."""
    correction = (1 - betas[1] ** step) ** 0.5
    return -lr * correction / (1 - betas[0] ** step), eps * correction


@torch.no_grad()
def adamw_step_reference(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, clip=None,
                         orthograd=False):
    """The twin of `adamw_step`: a loop over tensors. float64 parameters have float64 moments."""
    wanted = _wanted(params, grads, exp_avgs, exp_avg_sqs, weight_decay)
    size, eps = _scalars(step, lr, betas, eps)
    norm = None
    if clip is not None:
        norms = [torch.linalg.vector_norm(g.to(mean.dtype)) for _, g, mean, *_ in wanted]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else _no_norm(params)
    for p, g, mean, square, decay in wanted:
        w, g = p.to(mean.dtype), g.to(mean.dtype)
        if clip is not None:
            g = g * (clip / (norm + 1e-6)).clamp(max=1.0)
        if orthograd and g.numel() > 1:
            g = _orthogonal(w, g)
        w = w * (1 - lr * decay)
        mean.lerp_(g, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.copy_(w.addcdiv_(mean, square.sqrt().add_(eps), value=size))
    return norm


def _orthogonal(w, g):
    """g without its part along w, made as long as it was (Prieto et al. 2025); 0 where only rounding is left."""
    along = -(w * g).sum() / (w.square().sum() + 1e-30)
    projected = along * w + g
    length, left = torch.linalg.vector_norm(g), torch.linalg.vector_norm(projected)
    rounding = 16 * torch.finfo(left.dtype).eps * length
    return projected * torch.where(left > rounding, length / (left + 1e-30), 0.0)


def _no_norm(params):
    """The norm of no gradients."""
    return torch.zeros((), device=params[0].device if params else None)


@torch.no_grad()
def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, clip=None, orthograd=False,
               tables=None):
    """One step of AdamW in place, by one launch for all tensors; returns the gradients' norm before clipping, or None.

    As optim.AdamW (Loshchilov & Hutter 2019): w *= 1 - lr weight_decay, m += (1 - beta1) (g - m),
    v = beta2 v + (1 - beta2) g^2, w -= lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps).

    params: float32 or bfloat16, each with its gradient (either dtype; None: the tensor is passed over), exp_avgs and
    exp_avg_sqs, float32. A bfloat16 parameter is rounded once, at the end. Gradients are only read.
    step: 1 at the first, one for all. weight_decay: a number, or one for each tensor.
    clip: the norm over all gradients, float32 (), is returned, and they count min(clip / (norm + 1e-6), 1) times, as
    in torch.nn.utils.clip_grad_norm_; math.inf: the norm alone. It costs two launches more, and no wait for the host.
    orthograd: after clipping each gradient is taken orthogonal to its tensor, at its old length: optim.OrthoGrad. It
    costs four launches more, which read weights and gradients twice.
    tables: a `Tables` that the caller keeps for this list, else they are built and sent to the device at each step.
    Tensors that are not contiguous are copied there and back. Memory: up to 76 bytes a tensor and 20 a chunk, which has
    thousands of elements. ValueError: lists that do not fit, or tensors of several devices.
    """
    wanted = _wanted(params, grads, exp_avgs, exp_avg_sqs, weight_decay)
    fits = all(t.dtype in FLOATS for tensors in wanted for t in tensors[:2])
    if not (wanted and by_triton(params[0]) and fits):
        return adamw_step_reference(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, clip,
                                    orthograd)
    solid = [(*(t.contiguous() for t in tensors[:4]), tensors[4]) for tensors in wanted]
    tables = Tables() if tables is None else tables
    tables.fit(solid)
    device = params[0].device
    tensors, chunks = len(solid), len(tables.chunks)
    norm = totals = torch.empty(4 if orthograd else 1, tensors, dtype=torch.float32, device=device)
    most = 1.0 if clip is None else float(clip)
    shape = dict(COLUMNS=COLUMNS, CHUNK=tables.chunk, BLOCK=BLOCK, num_warps=WARPS)
    if clip is not None or orthograd:
        partials = torch.empty(3 if orthograd else 1, chunks, dtype=torch.float32, device=device)

        def add(kind, into, clipped):
            _sums[(chunks,)](tables.rows, tables.chunks, partials, totals, norm, most, tensors, CLIP=clipped, KIND=kind,
                             **shape)
            _finish[(tensors, 3 if kind == 1 else 1)](tables.rows, partials, into, chunks, tensors, **shape)
        add(int(orthograd), totals, False)
        if clip is not None:
            norm = totals[0].sum().sqrt()
        if orthograd:
            add(2, totals[3], clip is not None)
    size, eps = _scalars(step, lr, betas, eps)
    _update[(chunks,)](tables.rows, tables.chunks, tables.decays, totals, norm, most, tensors, float(lr), float(size),
                       float(1 - betas[0]), float(betas[1]), float(1 - betas[1]), float(eps), CLIP=clip is not None,
                       ORTHOGRAD=orthograd, **shape)
    for (p, _, mean, square, _), made in zip(wanted, solid):
        for tensor, new in ((p, made[0]), (mean, made[2]), (square, made[3])):
            if new is not tensor:
                tensor.copy_(new)
    increment_version([t for p, _, mean, square, _ in wanted for t in (p, mean, square)])
    return norm if clip is not None else None
