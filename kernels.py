"""Every fused operation: its formula in PyTorch, and the one switch that hands it to the Triton kernels of fused/.

    kernels.use("triton")      from here on; "torch", PyTorch alone, is where every process begins

Models call the operations below whichever way is on, and ask `on()` only where the two differ in more than the
operation. By "triton" a tensor on a GPU goes to fused/, unless it is empty or float64; any other, and without Triton
(macOS, Windows) every one, takes the formula. Where PyTorch has a faster one than what a kernel computes, which is in
float32 and rounded once, the kernel's is the operation's `_reference`. No kernel has been timed on a GPU yet, so none
is anybody's default; see docs/kernels.md.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

WAYS = ("torch", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read
WIDEST_ROW = 8192  # features of a row that one program normalises
WIDEST_HEAD, WIDEST_RANK = 256, 512  # features of a head that attention's kernels take, and of a latent
fused = None  # the kernels, once somebody has asked for them and Triton is there
_triton = _interpreted = False


def use(way):
    """Goes by "torch" or by "triton" from here on, in this process. Raises ValueError for another word."""
    global fused, _triton
    if way not in WAYS:
        raise ValueError(f"kernels {way!r}: it must be torch or triton")
    _triton = way == "triton"
    if _triton and fused is None:
        try:  # here only: the default path shall not pay for Triton
            import fused
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise


@contextmanager
def using(way, interpreted=False):
    """Within it another way, for comparisons. interpreted: tensors on the CPU take kernels too, for which the
    environment must have said TRITON_INTERPRET=1 before any kernel was imported, else RuntimeError."""
    global _interpreted
    before = WAYS[_triton], _interpreted
    try:
        use(way)
        if interpreted and not (fused and fused.ground.INTERPRETED):
            raise RuntimeError("kernels run on CPU tensors only where TRITON_INTERPRET=1 was set before their import")
        _interpreted = interpreted
        yield
    finally:
        use(before[0])
        _interpreted = before[1]


def on():
    """Whether operations go by "triton"."""
    return _triton


def fits(*tensors):
    """Whether an operation on these (or None) goes to its kernel: on a GPU (or interpreted), none empty or float64."""
    return (_triton and fused is not None and (tensors[0].is_cuda or _interpreted)
            and all(t is None or t.numel() and t.dtype in FLOATS for t in tensors))


def readable(x):
    """Whether the host may look at the numbers of x: on the CPU, where it need not wait for them, and uncompiled, as a
    look breaks a graph. Who may not takes bounds that shapes give."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def exactly(x):
    """x in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expect(ok, message):
    """Raises ValueError(message) if not ok."""
    if not ok:
        raise ValueError(message)


# --- Norms ---

def norm_reference(x, gain, bias, eps, residual, centred):
    """Both norms as their kernel computes them."""
    s = x if residual is None else x + residual
    wide = exactly(s)
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y if gain is None else y * gain
    y = (y if bias is None else y + bias).to(s.dtype)
    return y if residual is None else (y, s)


def norm(x, gain, bias, eps, residual, centred):
    """Both norms by "triton", or with a residual. Raises ValueError for shapes that do not go together."""
    expect(residual is None or residual.shape == x.shape, "residual must have the shape of x")
    for name, p in (("gain", gain), ("bias", bias)):
        expect(p is None or p.shape == x.shape[-1:], f"{name} must have a number for each of x's {x.size(-1)} features")
    if fits(x) and x.size(-1) <= WIDEST_ROW:
        return fused.rows.NormRows.apply(x, residual, gain, bias, eps, centred)
    return norm_reference(x, gain, bias, eps, residual, centred)


def plain_rms_norm(x, gain=None, eps=1e-6):
    """rms_norm without a kernel, whichever way is on: of queries and keys, say."""
    if x.requires_grad and x.device.type == "cpu":  # F.rms_norm has no fused backward there: 2.4 times slower
        exact = torch.promote_types(x.dtype, torch.float32)
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square() / x.size(-1)
        x = x * torch.rsqrt(mean + eps).to(x.dtype)
        return x if gain is None else x * gain
    if gain is not None and gain.dtype != x.dtype:  # autocast: else neither fused nor quiet
        gain = gain.to(x.dtype)
    return F.rms_norm(x, (x.size(-1),), gain, eps)


def rms_norm(x, gain=None, eps=1e-6, residual=None):
    """s / sqrt(mean(s^2) + eps) over the last dimension, times gain (Zhang & Sennrich 2019), with s = x + residual.

    x (..., C) of any float type; residual of x's shape, or None, which is 0; gain (C,). Returns y (..., C), and with a
    residual (y, s): both carry gradients and have the type to which x and residual promote. By kernel sums are float32,
    rounded once; s is rounded before it is normalised. Rows wider than WIDEST_ROW take no kernel.
    """
    if not _triton and residual is None:
        return plain_rms_norm(x, gain, eps)
    return norm(x, gain, None, eps, residual, False)


def layer_norm(x, gain=None, bias=None, eps=1e-5, residual=None):
    """(s - mean(s)) / sqrt(var(s) + eps) over the last dimension, times gain (C,), plus bias (C,) (Ba et al. 2016), the
    variance over C. All else as rms_norm; eps as in torch.nn.functional.layer_norm."""
    if not _triton and residual is None:
        return torch.layer_norm(x, (x.size(-1),), gain, bias, eps)
    return norm(x, gain, bias, eps, residual, True)


# --- Rotary positions ---

def plain_rotary(x, cos, sin):
    """rotary without a kernel, whichever way is on."""
    wide = exactly(x)
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, -1), sin).to(x.dtype)  # (B, T, H, D)


def rotary(x, cos, sin):
    """x (B, T, H, D) turned by RoPE's tables (Su et al. 2021): x cos + (b, a) sin, where a and b are the halves of x.

    cos, sin: (1 or B, T, 1, D) float32, sin with its sign (-sin, sin), as in model.Positions.tables; no gradient goes
    to them. The result has x's type. Raises ValueError for an odd D and for tables of another shape.
    """
    if not _triton:
        return plain_rotary(x, cos, sin)
    B, T, _, D = x.shape
    expect(D % 2 == 0, f"rotary turns pairs of features: {D} must be even")
    if cos.shape != sin.shape or cos.shape not in ((1, T, 1, D), (B, T, 1, D)):
        raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} must be ({B} or 1, {T}, 1, {D})")
    if fits(x):
        return fused.rows.Rotary.apply(x, cos, sin)
    wide = exactly(x)
    return (wide * cos + wide.roll(D // 2, -1) * sin).to(x.dtype)


# --- Activations ---

def gelu(x):
    """x Phi(x), exact (Hendrycks & Gimpel 2016): x of any shape and float type, to the same. By kernel keeps x only."""
    if _triton:
        return fused.rows.Plain.apply("gelu", x) if fits(x) else F.gelu(exactly(x)).to(x.dtype)
    small = x.device.type == "cpu" and x.numel() <= 16384 and not x.requires_grad
    if not small or torch.compiler.is_compiling():
        return F.gelu(x)
    usual = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # for one decoded byte the way into oneDNN costs more than GELU
    try:
        return F.gelu(x)
    finally:
        torch.backends.mkldnn.enabled = usual


def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, GPT-2's GELU (Hendrycks & Gimpel 2016): x of any shape and
    float type, to the same. It has no kernel: by "triton" too it is PyTorch's."""
    return F.gelu(x, approximate="tanh")


def relu2(x):
    """relu(x)^2 (So et al. 2021): x of any shape and float type, to the same. By kernel keeps x only."""
    if _triton:
        return fused.rows.Plain.apply("relu2", x) if fits(x) else F.relu(exactly(x)).square().to(x.dtype)
    return F.relu(x).square()


GATES = {"glu": torch.sigmoid, "bilinear": lambda a: a, "reglu": F.relu, "geglu": gelu, "swiglu": F.silu}
GLU = tuple(GATES)  # act(a) b of two halves (Shazeer 2020)
PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": relu2, "silu": F.silu,
         "solu": lambda x: x * torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)}


def gated_reference(kind, x):
    """gated as its kernel computes it."""
    a, b = exactly(x).chunk(2, -1)
    return ((F.gelu if kind == "geglu" else GATES[kind])(a) * b).to(x.dtype)


def gated(kind, x):
    """act(a) b of the halves a and b of x (..., 2 W): (..., W) in x's type (Shazeer 2020).

    kind: of GATES. By kernel it is computed in float32 and rounded once, where PyTorch rounds act(a) first, and only x
    is kept: the backward pass computes act(a) again. Raises ValueError for another kind and an odd width.
    """
    expect(kind in GATES, f"kind is {kind!r}, but can be {', '.join(GLU)}")
    expect(x.size(-1) % 2 == 0, f"gated takes two halves: {x.size(-1)} features must be even")
    if _triton:
        return (fused.rows.GateRows.apply if fits(x) else gated_reference)(kind, x)
    a, b = x.chunk(2, -1)
    return GATES[kind](a) * b


def activate(kind, x):
    """x (..., W) to (..., W); a gated kind takes (..., 2 W), gates the second half by the first, gives (..., W).

    solu: x softmax(x) over the width (Elhage et al. 2022; a LayerNorm follows).
    """
    return gated(kind, x) if kind in GATES else PLAIN[kind](x)


# --- Cross-entropy ---

def cross_entropy_reference(logits, targets, ignore_index=-1):
    """cross_entropy as its kernel computes it."""
    return F.cross_entropy(exactly(logits), targets, ignore_index=ignore_index, reduction="none")


def cross_entropy(logits, targets, ignore_index=-1, reduction="none"):
    """-ln softmax(logits)[target], nats: logits (N, V) of any float type, targets (N,) int64, to losses (N,), by
    "triton" float32 (float64 for float64); or with reduction "mean" to the mean of those that count.

    A row whose target is ignore_index has loss 0 and gradient 0; its logits need be finite only without a kernel. By
    kernel: one reading of the logits forward (online softmax, Milakov & Gimelshein 2018), one reading and one writing
    backward. A row of nothing but -inf has loss nan. A target out of range is not looked for, as that would wait for
    the GPU: its loss is nan there; on the CPU it is an IndexError. By "triton" raises ValueError for targets of another
    shape or type.
    """
    if not _triton:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    check_targets(targets, logits.shape[:1])
    way = fused.rows.CrossEntropy.apply if fits(logits) else cross_entropy_reference
    losses = way(logits, targets, ignore_index)
    return losses if reduction == "none" else losses.sum() / (targets != ignore_index).sum()


def check_targets(targets, shape):
    """Raises ValueError where targets are not int64 of this shape."""
    if targets.shape != shape or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}, but must be int64 {tuple(shape)}")


# --- Cross-entropy of a linear layer, without all logits ---

def entropies(logits, targets, ignore_index):
    """(losses, log-sum-exps), (N,) each, of logits (N, V)."""
    if fits(logits):
        return fused.rows.entropies(logits, targets, ignore_index)
    wide, ignored = exactly(logits), targets == ignore_index
    sums = wide.logsumexp(-1)
    chosen = wide.gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return (sums - chosen).masked_fill_(ignored, 0), sums


def entropy_gradient(logits, targets, sums, dloss, ignore_index, out):
    """Writes (softmax - one hot) dloss into out (N, V), contiguous, which may be the logits; returns it."""
    if fits(logits):
        return fused.rows.entropy_gradient(logits, targets, sums, dloss, ignore_index, out)
    ignored = targets == ignore_index
    wide = exactly(logits)  # the logits themselves, if they are float32: then this is in place
    wide = torch.sub(wide, sums.unsqueeze(1), out=out if out.dtype == wide.dtype else None).exp_()
    wide.scatter_add_(1, targets.masked_fill(ignored, 0).unsqueeze(1), -torch.ones_like(sums).unsqueeze(1))
    wide.mul_(dloss.unsqueeze(1)).masked_fill_(ignored.unsqueeze(1), 0)
    return wide if wide is out else out.copy_(wide)


def chunk_rows(N, C, O):
    """Rows of h (N, C) whose O logits are computed at once: as many as make no more numbers than h or the classifiers
    (O, C) hold, whichever are more; at least 1."""
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
        """h (G, N, C), weight (G, O, C), bias (G, O) or None, targets (G, N, K), O = K V: losses (G, N, K)."""
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


def stacked(parts):
    """Tensors in lists, of any depth, as one tensor; a tensor as it is, and one alone without a copy."""
    if torch.is_tensor(parts):
        return parts
    parts = [stacked(part) for part in parts]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


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
    expect(chunk >= 1, f"chunk is {chunk}, but must be at least 1")
    dtype = product_type(h, weights)
    losses = LinearCrossEntropy.apply(
        h.reshape(groups, -1, C), weights.reshape(groups, K * V, C),
        None if biases is None else biases.reshape(groups, K * V), targets.reshape(groups, -1, K), ignore_index,
        chunk, dtype)
    return losses.view(G, N, K)


# --- Attention: B batch, H heads, G key-value heads (G divides H), T queries, S keys, D head size, Dv values' size ---

def softmax_over(q, k, v, mask, scale):
    """softmax(scale q k^T) v where `mask` (bool, broadcast to (..., H, T, S)), in float32 or wider: (..., H, T, Dv).

    q (..., H, T, D), k (..., G, S, D), v (..., G, S, Dv). A query that sees nothing gets zeros, and leaves none but
    zeros to the gradients.
    """
    q, dtype = exactly(q), q.dtype
    k, v = (exactly(t).repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))  # (..., H, S, D)
    with torch.autocast(q.device.type, enabled=False):  # it would round the products
        scores = q @ k.transpose(-1, -2) * scale  # (..., H, T, S)
        p = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) * mask  # not -inf: a row of it would be NaN
        return (p @ v).to(dtype)


def who_sees_whom(T, S, causal=True, window=None, prefix=None, lengths=None, positions=None, device=None):
    """The mask of `attend` made explicitly: bool, (1 or B, 1, T, S), True where query t sees key s."""
    if positions is None:
        q, k = torch.arange(S - T, S, device=device).view(1, T, 1), torch.arange(S, device=device).view(1, 1, S)
    else:
        q, k = positions[:, S - T:, None], positions[:, None, :]
    mask = (k == k) & (q == q)  # (1 or B, T, S)
    if causal:
        end = q
        if prefix is not None:
            end = torch.clamp(q, min=(prefix.view(-1, 1, 1) if torch.is_tensor(prefix) else prefix) - 1)
        mask = mask & (k <= end)
    if window is not None:
        mask = mask & (k > q - window)
    if positions is not None:
        mask = mask & (k >= 0) & (q >= 0)
    if lengths is not None:
        mask = mask & (torch.arange(S, device=device) < lengths.view(-1, 1, 1))
    return mask.unsqueeze(1)


def attend(q, k, v, causal=True, window=None, prefix=None, lengths=None, positions=None, scale=None):
    """softmax(scale q k^T) v where a query sees a key (Dao et al. 2022, 2023), differentiable in q, k and v.

    q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), all float32, float16 or bfloat16, of any strides; D and Dv up to
    WIDEST_HEAD. Returns (B, H, T, Dv) in their type, in memory as q. Head h reads key-value head h // (H / G). scale
    None: D^-0.5. Scores and sums are float32.

    Key s stands at s and query t at S - T + t, as a chunk after a cache does. positions (B, S) int: they stand where
    this says instead, the queries at its last T columns; -1 marks padding, as in Positions. Then
    causal: a query at q sees a key at k where k <= q; False: every query sees every key.
    window: and where k > q - window; with causal only.
    prefix: int or (B,) int; with causal only: k <= max(q, prefix - 1) instead of k <= q.
    lengths (B,) int: keys from lengths[b] on, in the order of memory, are padding, and may be any garbage.
    Padding is seen by nobody. A query that sees nothing, as padding does, gets zeros, and gives zero gradients.
    Raises ValueError where shapes, types or masks do not go together. Not differentiable twice.
    """
    check_heads(q, k, v)
    check_mask(q, k, causal, window, prefix, lengths, positions)
    scale = q.size(3) ** -0.5 if scale is None else scale
    if fits(q, k, v):
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))  # (B, 1, H, T, D), ...
        return fused.attention.attend_rows(q, k, v, causal, window, prefix, lengths, positions, scale).squeeze(1)
    mask = who_sees_whom(q.size(2), k.size(2), causal, window, prefix, lengths, positions, q.device)
    return softmax_over(q, k, v, mask, scale)


def attend_differential(q, k, v, lam, window=None, prefix=None):
    """(softmax(q1 k1) - lam softmax(q2 k2)) v of neighbouring heads (Ye et al. 2024, equations 1 to 3).

    q (B, H, T, D) and k (B, G, S, D), neighbours a pair; v (B, G/2, S, Dv), a pair's shared values: two heads' values
    side by side where Dv = 2D. lam: a tensor of one number, or (H/2,). Returns (B, H/2, T, Dv), before the norm;
    causal, with masks, strides and errors as `attend`, and for heads that are no pairs. Differentiable in all four.
    """
    expect(q.dim() == k.dim() == 4 and not q.size(1) % 2 and not k.size(1) % 2,
           "differential attention needs (B, H, T, D) and (B, G, S, D) of an even number of heads")
    check_heads(q[:, ::2], k[:, ::2], v)
    check_mask(q, k, True, window, prefix)
    pairs = q.size(1) // 2
    if lam.numel() not in (1, pairs):
        raise ValueError(f"lam is one number, or one of each of {pairs} pairs, not {tuple(lam.shape)}")
    if fits(q, k, v):
        q, k = (t.unflatten(1, (-1, 2)).transpose(1, 2) for t in (q, k))  # (B, 2, H/2, T, D), (B, 2, G/2, S, D)
        v = v.unsqueeze(1).expand(-1, 2, -1, -1, -1)  # (B, 2, G/2, S, Dv), the second without memory of its own
        one, two = fused.attention.attend_rows(q, k, v, True, window, prefix).unbind(1)  # (B, H/2, T, Dv)
    else:
        one, two = (attend(q[:, i::2], k[:, i::2], v, True, window, prefix) for i in range(2))
    return one - lam.to(one.dtype).view(-1, 1, 1) * two


def attend_space(q, k, v):
    """Within each frame, every token sees every other: q (B, T, N, H, D), k (B, T, N, G, D), v (B, T, N, G, Dv).

    Read and written where they lie. Returns (B, T, N, H, Dv). Types, sizes, gradients and errors as `attend`.
    """
    rows = [t.transpose(-3, -2) for t in (q, k, v)]  # (B, T, H, N, D)
    check_heads(*rows, dims=5)
    if fits(q, k, v):
        return fused.attention.attend_rows(*rows, causal=False).transpose(2, 3)
    y = attend(*(t.flatten(0, 1) for t in rows), causal=False)  # (B T, H, N, Dv)
    return y.unflatten(0, q.shape[:2]).transpose(2, 3)


def attend_time(q, k, v, window=None, scale=None):
    """Each place of a frame sees itself in this frame and those before, `window` of them at most, its own included.

    q (B, T, N, H, D), k (B, S, N, G, D), v (B, S, N, G, Dv), query t in frame S - T + t. As attend_space otherwise:
    returns (B, T, N, H, Dv).
    """
    if any(t.dim() != 5 for t in (q, k, v)):
        raise ValueError(f"queries, keys and values have 5 dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    rows = [t.permute(0, 2, 3, 1, 4) for t in (q, k, v)]  # (B, N, H, T, D)
    check_heads(*rows, dims=5)
    check_mask(*(t[..., 0, :].transpose(1, 2) for t in (q, k)), True, window)  # a frame may be empty
    if fits(q, k, v):
        return fused.attention.attend_rows(*rows, window=window, scale=scale).permute(0, 3, 1, 2, 4)
    y = attend(*(t.flatten(0, 1) for t in rows), window=window, scale=scale)  # (B N, H, T, Dv)
    return y.unflatten(0, (q.size(0), q.size(2))).permute(0, 3, 1, 2, 4)


def attend_one(q, k, v, lengths=None, splits=None, scale=None):
    """A few queries over a long cache (Dao et al. 2023, Flash-Decoding): all queries of a key head read its keys once.

    q (B, H, T, D), meant for T of 1 to 8; k (B, G, S, D), v (B, G, S, Dv), of any strides, types and sizes as `attend`.
    The queries are the last T of the row's keys: query t sees the keys below lengths[b] - T + t + 1. lengths (B,) int;
    None: S. One that sees nothing gets zeros. Returns (B, H, T, Dv) in memory as q.

    splits: programs that share a row's keys; None: as many as fill the GPU. Inference only: raises ValueError where a
    gradient is asked for, or as `attend` does.
    """
    check_heads(q, k, v)
    D = q.size(3)
    return over_cache(q, k, v, lengths, splits, D ** -0.5 if scale is None else scale, D, False)


def attend_latent(q, latents, rank, scale, lengths=None, splits=None):
    """attend_one over a latent cache (DeepSeek-V2 2024, section 2.1.2): one key head, whose first columns are values.

    q (B, H, T, rank + R), queries taken to the latents and their turned part; latents (B, 1, S, rank + R), with the
    turned keys. Returns (B, H, T, rank). scale: that of the heads as they were, (D + R)^-0.5. rank up to WIDEST_RANK, R
    from 0 up to WIDEST_HEAD; otherwise as attend_one.
    """
    more = q.size(-1) - rank
    if not 1 <= rank <= WIDEST_RANK or not 0 <= more <= WIDEST_HEAD:
        raise ValueError(f"a latent has 1 to {WIDEST_RANK} columns and its keys up to {WIDEST_HEAD} more, not {rank} "
                         f"and {more}")
    check_heads(q, latents, latents, widest=WIDEST_RANK + WIDEST_HEAD)
    expect(latents.size(1) == 1, "a latent cache has one head")
    return over_cache(q, latents, latents[..., :rank], lengths, splits, scale, rank, True)


def over_cache(q, k, v, lengths, splits, scale, D, shared):
    """attend_one, and attend_latent, whose keys are the D columns that are shared as values, and more."""
    check_mask(q, k, True, lengths=lengths)
    expect(splits is None or splits >= 1, "keys are split into at least 1 part")
    expect(not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, k, v)),
           "attention over a cache is for inference: it has no gradient")
    if fits(q, k, v):
        return fused.attention.over_cache(q, k, v, lengths, splits, scale, D, shared)
    T, S = q.size(2), k.size(2)
    ends = torch.full((1,), S, device=q.device) if lengths is None else lengths.clamp(max=S)
    last = ends.view(-1, 1, 1) - T + torch.arange(T, device=q.device)[:, None]  # (1 or B, T, 1)
    mask = (torch.arange(S, device=q.device) <= last).unsqueeze(1)  # (1 or B, 1, T, S)
    return softmax_over(q, k, v, mask, scale)


def check_heads(q, k, v, dims=4, widest=WIDEST_HEAD):
    """Raises ValueError where heads, sizes or types do not go together; batches, heads, places, features in order."""
    if not q.dim() == k.dim() == v.dim() == dims:
        raise ValueError(f"queries, keys and values have {dims} dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    batches = {t.shape[:-3] for t in (q, k, v)}
    if len(batches) > 1 or k.shape[-3:-1] != v.shape[-3:-1] or q.size(-1) != k.size(-1):
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not go "
                         "together")
    if not k.size(-3) or q.size(-3) % k.size(-3):
        raise ValueError(f"{k.size(-3)} key-value heads do not divide {q.size(-3)} heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"queries, keys and values are of one floating type, not {q.dtype}, {k.dtype} and {v.dtype}")
    if not 1 <= q.size(-1) <= widest or not 1 <= v.size(-1) <= widest:
        raise ValueError(f"heads have 1 to {widest} features, not {q.size(-1)} and {v.size(-1)}")


def check_mask(q, k, causal, window=None, prefix=None, lengths=None, positions=None):
    """Raises ValueError for a mask that `attend` does not know; q and k of 4 dimensions."""
    expect(causal or window is None and prefix is None, "a window or a prefix goes with causal attention only")
    expect(window is None or window >= 1, "a window has at least 1 place: its own")
    for name, t, shape in (("prefix", prefix, q.shape[:1]), ("lengths", lengths, q.shape[:1]),
                           ("positions", positions, (q.size(0), k.size(2)))):
        if torch.is_tensor(t) and t.shape != torch.Size(shape):
            raise ValueError(f"{name} has the shape {tuple(t.shape)}, not {tuple(shape)}")
    expect(positions is None or q.size(2) <= k.size(2), "queries stand at the last of the keys' positions: too few")


# --- Recurrences and experts: B batch, T time, I inner width, N states per feature ---

def scan_reference(a, b, h):
    """h_t = a_t h_(t-1) + b_t in a loop over dimension 1: a, b (B, T, ...), h (B, ...) to all states (B, T, ...)."""
    states = []
    for t in range(a.size(1)):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1) if states else a * b


def min_gru(z, v, h=None):
    """The recurrence of minGRU (Feng et al. 2024, see recurrent.MinGRU) from its raw projections to its states.

        h_t = (1 - s_t) h_(t-1) + s_t g(v_t),   s = sigmoid(z),   g(v) = v + 0.5 where v >= 0, else sigmoid(v)

    z, v (B, T, I) of any float types, h (B, I) the state before, None: zeros. Returns the states (B, T, I), float32
    (float64 where z is). A position with z = -inf and finite v changes no state: so padding enters. Raises ValueError
    for other shapes.
    """
    expect(z.dim() == 3 and z.shape == v.shape, "min_gru needs z and v (B, T, I) of one shape")
    h = z.new_zeros(z.size(0), z.size(2), dtype=torch.float32) if h is None else h
    expect(h.shape == (z.size(0), z.size(2)), "min_gru needs h (B, I)")
    if fits(z):
        return fused.recurrence.MinGru.apply(z, v, h)
    z, v = torch.sigmoid(exactly(z)), exactly(v)
    return scan_reference(1 - z, z * torch.where(v >= 0, v + 0.5, torch.sigmoid(v)), exactly(h))


def selective_scan(u, dt, A, Bm, Cm, D, h=None):
    """Mamba's recurrence (Gu & Dao 2023, section 3), as recurrent.Mamba runs it, skip included:

        h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,   y_t = C_t h_t + D u_t

    u, dt (B, T, I), A (I, N), Bm, Cm (B, T, N), D (I,), of any float types; h (B, I, N) the state before, None: zeros.
    dt comes after its softplus, and is 0 at padding, where the state then stays; A is negative, -exp(a_log). Returns y
    (B, T, I) and the last state (B, I, N), both float32 (float64 where u is); either may be differentiated. Raises
    ValueError for other shapes.
    """
    expect(u.dim() == 3 and u.shape == dt.shape, "selective_scan needs u and dt (B, T, I) of one shape")
    (B, T, I), N = u.shape, A.size(-1)
    expect(A.shape == (I, N) and D.shape == (I,), "selective_scan needs A (I, N) and D (I,)")
    expect(Bm.shape == Cm.shape == (B, T, N), "selective_scan needs Bm and Cm (B, T, N)")
    h = torch.zeros(B, I, N, device=u.device) if h is None else h
    expect(h.shape == (B, I, N), "selective_scan needs h (B, I, N)")
    if fits(u):
        return fused.recurrence.selective_scan(u, dt, A, Bm, Cm, D, h)
    u, dt, A, Bm, Cm, D, h = (exactly(t) for t in (u, dt, A, Bm, Cm, D, h))
    decay = torch.exp(dt.unsqueeze(3) * A)  # (B, T, I, N)
    states = scan_reference(decay, (dt * u).unsqueeze(3) * Bm.unsqueeze(2), h)  # (B, T, I, N)
    y = (states * Cm.unsqueeze(2)).sum(3) + D * u
    return y, torch.cat((h.unsqueeze(1), states), 1)[:, -1]


def grouped_linear(x, weight, offsets):
    """Rows sorted by expert, each times the matrix of its expert: y_i = weight[e] x_i.

    x (N, C) of any float type, weight (E, W, C) of the same (under autocast both are cast, as F.linear does), offsets
    (E + 1,) int64 on the device of x: expert e has the rows offsets[e] ... offsets[e + 1] - 1, none if they are equal;
    they rise from 0 to N, which is not checked, because that would wait for the device.
    Returns (N, W) of the type of x; sums are float32. Raises ValueError for other shapes and types.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        kind = torch.get_autocast_dtype(device)
        x, weight = x.to(kind), weight.to(kind)
    expect(x.dim() == 2 and weight.dim() == 3 and x.size(1) == weight.size(2) and x.dtype == weight.dtype,
           "grouped_linear needs x (N, C) and weight (E, W, C) of one type")
    expect(offsets.shape == (weight.size(0) + 1,) and len(weight) and offsets.dtype == torch.int64,
           "grouped_linear needs offsets (E + 1,) int64 for one expert or more")
    if fits(x):
        return fused.experts.GroupedLinear.apply(x, weight, offsets)
    ends = offsets.tolist()
    return torch.cat([F.linear(x[i:j], weight[e]) for e, (i, j) in enumerate(zip(ends, ends[1:]))])


# --- Discrete codes: N rows, K codes or classes, C width of a code ---

@torch.no_grad()
def nearest_code(x, codes):
    """x (N, C), codes (K, C) -> the number of each row's nearest code, (N,) int64, without a gradient.

    The least |c|^2 - 2 x.c (van den Oord et al. 2017), summed in float32, float32 not rounded to TF32. Of equally near
    codes the first counts where these sums are exact, as of small integers; otherwise rounding decides, even among
    equal codes (a BLAS sums its last columns in another order). x and codes: any float types; no NaN among the codes.
    The kernel makes no table (N, K). ValueError: other shapes than these, no codes.
    """
    expect(x.ndim == codes.ndim == 2 and x.shape[1] == codes.shape[1] and len(codes),
           "nearest_code takes x (N, C) and codes (K, C) with K > 0")
    if fits(x, codes):
        return fused.codes.nearest_code(x, codes)
    x, codes = exactly(x), exactly(codes)
    return (x @ codes.T - codes.square().sum(1) / 2).argmax(1)


def gumbel_softmax(logits, noise, temperature, hard):
    """logits (..., K), noise alike or None -> y (..., K) in place of a one-hot code, and the codes (...) int64.

    The code is the argmax of the float32 sums l + g, the first of equal ones; y = softmax((l + g) / temperature) (Jang
    et al. 2017, Maddison et al. 2017), or, where hard, one-hot going forward and that softmax going backward.
    noise: Gumbel noise g (discrete.gumbel_like), times its weight; None: none, the mode. It gets no gradient. y is of
    the logits' dtype, computed in float32. A row of -inf alone is NaN, as in torch.softmax. temperature: a number > 0,
    else ValueError, as for shapes that do not fit. No second derivative by kernel.
    """
    check_choice(logits, noise)
    expect(temperature > 0, "gumbel_softmax needs a temperature above 0")
    if fits(logits, noise):
        return fused.codes.GumbelSoftmax.apply(logits, noise, float(temperature), bool(hard))
    noisy = exactly(logits) if noise is None else exactly(logits) + exactly(noise.detach())
    codes = noisy.argmax(-1)
    y = torch.softmax(noisy / temperature, -1)
    if hard:
        y = F.one_hot(codes, y.shape[-1]).to(y.dtype) + (y - y.detach())
    return y.to(logits.dtype), codes


def reinmax(logits, noise, temperature=1.0):
    """logits (..., K), noise alike or None -> one-hot y (..., K) with ReinMax's gradient, and the codes (...) int64.

    The code is the argmax of the float32 sums l + g, the first of equal ones. Going backward
    (Liu et al. 2023, algorithm 2) g -> 2 J(p1) g - J(p0) g / 2 with J(p) = diag(p) - p p^T, p0 = softmax(l) and
    p1 = (one-hot + softmax(l / temperature)) / 2. noise: see `gumbel_softmax`. A logit of -inf has no gradient
    (discrete.reinmax gives NaN there); a row of -inf alone is NaN. ValueError: temperature below 1, of which the paper
    warns; shapes that do not fit. No second derivative.
    """
    check_choice(logits, noise)
    expect(temperature >= 1, "reinmax needs a temperature of at least 1")
    if fits(logits, noise):
        return fused.codes.ReinMax.apply(logits, noise, float(temperature))
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


def check_choice(logits, noise):
    """Raises ValueError where shapes do not go together."""
    expect(logits.ndim and logits.shape[-1] and (noise is None or noise.shape == logits.shape),
           "logits (..., K) with K > 0 and noise of the same shape are wanted")


# --- An optimiser's step ---

def orthogonal(w, g):
    """g without its part along w, made as long as it was (Prieto et al. 2025); 0 where only rounding is left."""
    along = -(w * g).sum() / (w.square().sum() + 1e-30)
    projected = along * w + g
    length, left = torch.linalg.vector_norm(g), torch.linalg.vector_norm(projected)
    rounding = 16 * torch.finfo(left.dtype).eps * length
    return projected * torch.where(left > rounding, length / (left + 1e-30), 0.0)


def adamw_step_reference(wanted, lr, size, betas, eps, clip, orthograd, tables=None):
    """adamw_step as its kernels compute it: a loop over tensors. float64 parameters have float64 moments."""
    norm = None
    if clip is not None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.to(mean.dtype))
                                                     for _, g, mean, *_ in wanted]))
    for p, g, mean, square, decay in wanted:
        w, g = p.to(mean.dtype), g.to(mean.dtype)
        if clip is not None:
            g = g * (clip / (norm + 1e-6)).clamp(max=1.0)
        if orthograd and g.numel() > 1:
            g = orthogonal(w, g)
        w = w * (1 - lr * decay)
        mean.lerp_(g, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.copy_(w.addcdiv_(mean, square.sqrt().add_(eps), value=size))
    return norm


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
    in torch.nn.utils.clip_grad_norm_; math.inf: the norm alone.
    orthograd: after clipping each gradient is taken orthogonal to its tensor, at its old length: optim.orthogonal.
    tables: a dict that the caller keeps for this list: where its tensors lie is then sent to the device only once.
    Tensors that are not contiguous are copied there and back. ValueError: lists that do not fit, several devices.
    """
    decays = [weight_decay] * len(params) if isinstance(weight_decay, (int, float)) else weight_decay
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "weight_decay": decays}
    for name, found in lists.items():
        if len(found) != len(params):
            raise ValueError(f"{len(params)} params, but {len(found)} {name}")
    wanted = [one for one in zip(params, *lists.values()) if one[1] is not None and one[0].numel()]
    for p, g, mean, square, _ in wanted:
        state = torch.float64 if p.dtype == torch.float64 else torch.float32
        if not p.shape == g.shape == mean.shape == square.shape or not mean.dtype == square.dtype == state:
            raise ValueError(f"a parameter {tuple(p.shape)} of {p.dtype} needs a gradient of its shape and moments of "
                             f"its shape and {state}")
        expect(len({t.device for t in (params[0], p, g, mean, square)}) == 1,
               "the tensors of one step must lie on one device")
    if not wanted:
        return None if clip is None else torch.zeros((), device=params[0].device if params else None)
    # both bias corrections are moved into two plain numbers
    correction = (1 - betas[1] ** step) ** 0.5
    size, eps = -lr * correction / (1 - betas[0] ** step), eps * correction
    ours = fits(wanted[0][0]) and all(t.dtype in FLOATS[:2] for tensors in wanted for t in tensors[:2])
    way = fused.adamw.adamw_step if ours else adamw_step_reference
    return way(wanted, lr, size, betas, eps, clip, orthograd, {} if tables is None else tables)
