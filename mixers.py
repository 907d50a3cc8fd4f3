"""How positions mix: norms, position schemes, who sees whom, and the attention mixers of a layer.

Every mixer is one class with the same face, so that a layer takes any of them:

    mixer(x, positions, cache=None)     x (B, T, C) to (B, T, C); positions a Positions; cache from new_cache, or None
    mixer.new_cache(batch_size, max_length, window, device, dtype)    what it remembers in generation (cache.py)
    mixer.new_memory(batch_size, device, dtype)    what one segment of training leaves to the next: tensors; or None
    mixer.flops(T)                      of one token, forward, apart from 2 per weight of its Linear layers

Beside its Linear and Norm layers a module may have parameters of its own: `own` maps their names to a role for the
optimiser, and `fill()` draws them. `fused` maps the name of a matrix that holds several, one below the other, to their
rows.

Shapes: B batch, T queries, S keys, C width, H heads, G key-value heads, D head size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from cache import KVCache
from kernels import plain_rms_norm


# --- Who sees whom ---

@dataclass(frozen=True)
class Span:
    """A rule of who sees whom: a query sees itself and those before it that `sees` allows, with `window` only among the
    last so many places, its own included."""
    window: int = None

    @property
    def reach(self):
        """The most keys that a query sees; None: any number."""
        return None

    def first(self, q):
        """The first place that a query at place q (int) sees."""
        return 0 if self.window is None else max(0, q - self.window + 1)

    def sees(self, q, k):
        """bool, broadcast: may a query at places q see keys at places k <= q, as far as the window goes back?"""
        return k <= q

    def allowed(self, q, k, end):
        """bool, broadcast: may a query at places q see keys at places k? It looks ahead up to `end` (>= q)."""
        seen = self.sees(q, k) & (k <= q) | (k > q) & (k <= end)
        return seen if self.window is None else seen & (k > q - self.window)


class Causal(Span):
    """A query sees itself and what stands before it."""

    @property
    def reach(self):
        """As Span.reach."""
        return self.window


class Everything(Span):
    """Every query sees every key."""

    def allowed(self, q, k, end):
        """As Span.allowed: True."""
        return (k == k) & (q == q)


CAUSAL, EVERYTHING = Causal(), Everything()


def causal(window=None):
    """The Causal of this window."""
    return CAUSAL if window is None else Causal(window)


class Positions:
    """What all layers of one forward pass share: where its T inputs stand, masks made once, and what layers report.

    start: the position of the first input, where all rows stand alike and inputs are consecutive (index None).
    index: (B, T) int64 where rows are ragged; -1 marks padding. window: the last positions that a layer of full
    attention sees; None: all before it. prefix: int or (B,) int64, the positions below it see one another.
    bidirectional: every position sees every other. tables: RoPE's, {D: (cos, sin)} at these places, each
    (1 or B, T, 1, D) float32; ropes: the modules that make them, {str(D): Rope}. memory: what the segment before left
    to each layer, which stands for the `remembered` positions before this one.

    Layers write into: `losses`, {name: [weighted scalars]}; `usage`, [(layer, counts)] of experts; `memory_out`,
    {layer: tensors} for the next segment.
    """

    in_order = True  # a query's keys lie side by side: long passes may be cut into blocks

    def __init__(self, start, T, index=None, window=None, prefix=None, bidirectional=False,
                 memory=None, remembered=0, tables=None):
        self.start, self.T, self.index, self.window = start, T, index, window
        self.ropes, self.tables = {}, tables or {}
        self.prefix, self.bidirectional = prefix, bidirectional
        self.memory, self.remembered = memory, remembered
        self.losses, self.usage, self.memory_out = {}, [], {}
        self._made = {}

    def real_first(self):
        """Of ragged rows, (order, back, real), each (B, T, 1): taken along dimension 1, `order` puts each row's real
        inputs first, so that a padded one never stands between two of them, and `back` undoes it; real is bool, in that
        order."""
        if "real_first" not in self._made:
            real = self.index.unsqueeze(2) >= 0
            order = (~real).byte().argsort(dim=1, stable=True)
            self._made["real_first"] = order, order.argsort(1), real.take_along_dim(order, 1)
        return self._made["real_first"]

    def turn(self, x):
        """x (B, T, H, D) turned by RoPE's tables, in its own type; x itself where there are none."""
        return kernels.rotary(x, *self.tables[x.size(-1)]) if self.tables else x

    def look_up_ropes(self, ropes, n):
        """Takes the tables of ropes, {str(D): Rope}, at these places, which are all below n."""
        self.ropes = ropes
        self.tables = {int(D): tuple(self.look_up(t).view(-1, self.T, 1, int(D)) for t in rope(n))  # (1 or B, T, 1, D)
                       for D, rope in ropes.items()}

    def look_up(self, table):
        """Rows of a learned table (P, C) at these places: (T, C), or (B, T, C) where ragged; padding takes row 0."""
        if self.index is None:
            return table[self.start:self.start + self.T]
        return F.embedding(self.index.clamp(min=0), table)

    def mask(self, span, S, seen, device, slopes=None, rows=None):
        """Which of S keys each query may see: None (all), "causal", or a mask ((B, 1,) T, S), True where allowed.

        span: the rule (Causal, ...). seen: (B, S) int64, the keys' positions, or None where all rows stand alike and
        the keys end at the last query. Padding sees padding and nothing else does. slopes: (H,) float32, ALiBi's;
        then the mask is float32 ((B,) H, T, S) to be added to the scores. rows: (first, end) of some queries, their
        first key and the end of their keys, (i, j, low, high): only that part of the mask. Made once for all layers.
        """
        if seen is None and slopes is None and rows is None and self.prefix is None:
            if type(span) is Causal:
                W = span.window
                if self.T == 1 and (W is None or S <= W):
                    return None
                if S == self.T and (W is None or S <= W):
                    return "causal"
            elif type(span) is Everything:
                return None
        key = (span, S, None if slopes is None else (slopes.numel(), slopes.data_ptr()), rows)
        if key not in self._made:
            self._made[key] = self._make_mask(span, S, seen, device, slopes, rows)
        return self._made[key]

    def _make_mask(self, span, S, seen, device, slopes, rows):
        T = self.T
        if seen is None:
            k = torch.arange(self.start + T - S, self.start + T, device=device)  # (S,)
            q = k[S - T:, None]  # (T, 1)
            if rows is not None:
                q, k = q[rows[0]:rows[1]], k[rows[2]:rows[3]]
        else:
            k = seen[:, None, None, :]  # (B, 1, 1, S)
            q = self.index[:, None, :, None]  # (B, 1, T, 1)
        end = q
        if self.prefix is not None:
            prefix = self.prefix.view(-1, 1, 1, 1) if torch.is_tensor(self.prefix) else self.prefix
            end = torch.clamp(q, min=prefix - 1)
        allowed = span.allowed(q, k, end)
        if seen is not None:
            allowed = allowed & (k >= 0) & (q >= 0) | (k < 0) & (q < 0)  # (B, 1, T, S)
        if slopes is None:
            return allowed
        bias = -(q - k).abs() * slopes.view(-1, 1, 1)  # ((B,) H, T, S)
        return torch.where(allowed, bias, -math.inf)


# --- Position schemes ---

class Rope(nn.Module):
    """Rotary positions (Su et al. 2021): feature pairs (i, i + D/2) turn by position * base^(-2i/D).

    For a context of `factor` times the `original` one, `scaling` is "none"; "linear", positions over factor (position
    interpolation, Chen et al. 2023); "ntk", a base of base * factor^(D / (D - 2)), which leaves the fastest pair as it
    is and slows the slowest by factor (bloc97 2023); or "yarn" (Peng et al. 2023, section 3): pairs that turn more than
    32 times in the original context stay, those that turn less than once are interpolated, a ramp between, and queries
    and keys grow by yarn_mscale(factor, mscale) each (`magnitude`). The `ramp` goes by "turns" as in the paper, or by
    "index" as in published code and so in published weights: by the number of the pair, between those that turn 32
    times and once, rounded outwards.

    Angles are computed in float64 and kept as float32 tables that grow with the positions asked for; not saved.
    One Rope serves all layers.
    """

    def __init__(self, head_dim, base, n, scaling="none", factor=1.0, original=None, ramp="turns", mscale=1.0):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.frequencies, self.magnitude = rope_frequencies(head_dim, base, scaling, factor, original or n, ramp,
                                                            mscale)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._build(n, "cpu")

    def _build(self, n, device):
        with torch.inference_mode(False):  # these tables must serve training too, whoever asks for them first
            angle = torch.outer(torch.arange(n, dtype=torch.float64, device="cpu"), self.frequencies)  # (n, D/2)
            cos, sin = angle.cos() * self.magnitude, angle.sin() * self.magnitude
            self.cos = torch.cat((cos, cos), 1).float().to(device)  # (n, D)
            self.sin = torch.cat((-sin, sin), 1).float().to(device)  # (n, D), signed for kernels.rotary

    def forward(self, n):
        """The tables (>= n, D), for positions 0 to n - 1 at least."""
        if n > self.cos.size(0) or self.cos.dtype != torch.float32:  # model.to(bfloat16) spoils the tables
            self._build(max(n, 2 * self.cos.size(0)) if n > self.cos.size(0) else self.cos.size(0), self.cos.device)
        return self.cos, self.sin


def yarn_mscale(factor, mscale):
    """0.1 mscale ln(factor) + 1: YaRN's growth of a query or key (Peng et al. 2023, section 3.4; DeepSeek's mscale)."""
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1


def rope_frequencies(head_dim, base, scaling="none", factor=1.0, original=512, ramp="turns", mscale=1.0):
    """(angles per position (D/2,) float64 on the CPU, magnitude of the tables); Rope says what the words mean."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim  # (D/2,)
    if scaling == "ntk":
        base = base * factor ** (head_dim / max(head_dim - 2, 1))
    plain = base ** -pair
    if scaling == "linear":
        return plain / factor, 1.0
    if scaling == "yarn":
        if ramp == "index":
            low, high = (head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1))
            low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
            keep = 1 - ((torch.arange(len(plain), dtype=torch.float64, device="cpu") - low)
                        / (high - low or 0.001)).clamp(0, 1)
        else:
            turns = original * plain / (2 * math.pi)  # of each pair over the original context
            keep = ((turns - 1) / (32 - 1)).clamp(0, 1)  # 0: interpolate, 1: leave
        return plain / factor * (1 - keep) + plain * keep, yarn_mscale(factor, mscale)
    return plain, 1.0


def alibi_slopes(n_head):
    """(H,) float32: 2^(-8 h / H) for h = 1 ... H (Press et al. 2022; for H no power of 2 the same formula)."""
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1) / n_head)


# --- Norms and linear layers ---

class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with a learned gain and bias or without."""

    def __init__(self, kind, width, gain, bias):
        super().__init__()
        self.kind, self.width = kind, width
        self.gain = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if gain and bias and kind == "layer" else None

    def forward(self, x, learn=True):
        """x (..., width) to the same shape and type. Only with `learn` does a gradient reach gain and bias."""
        own = self._parameters  # past nn.Module's look-up, which a decoded byte feels
        if not learn:
            own = {name: p.detach() for name, p in own.items() if p is not None}
        if self.kind == "rms":
            return kernels.rms_norm(x, own.get("gain"))
        return kernels.layer_norm(x, own.get("gain"), own.get("bias"))


class Linear(nn.Linear):
    """nn.Linear that leaves its parameters to `initialise`, which claims each of them."""

    def forward(self, x):
        """x (..., in) to (..., out)."""
        return F.linear(x, self._parameters["weight"], self._parameters["bias"])

    def reset_parameters(self):
        """Draws nothing."""


# --- Convolutions over time ---

def convolve(line, kernel, T, y):
    """y plus the depthwise causal convolution of the last T of line (B, K - 1 + T, I) by kernel (K, I), whose last row
    is for the position itself: (B, T, I)."""
    for k in range(len(kernel)):
        y = torch.addcmul(y, line[:, k:k + T], kernel[k])
    return y


class ShortConv(nn.Module):
    """A depthwise causal convolution over the normed inputs of a layer's mixer, y_t = sum_(i < w) k_i x_(t-i), with
    w = config.short_conv rows k_i of `kernel` (w, C) and no bias, as in Zoology (Arora et al. 2023).

    Before a row's first input stand zeros. Padding is left out, wherever it stands: a row's inputs follow one another
    in the order in which they come. It never looks ahead, inside a prefix either. One segment of training goes on from
    the last w - 1 hidden states of the one before, normed anew, in layers of full attention too. Cache: the inputs of
    old, as a layer of attention over w positions would keep keys.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.width = config.short_conv
        self.slot = config.n_layer + layer  # its place in a Memory: after those of all mixers
        self.kernel = nn.Parameter(torch.empty(self.width, config.n_embd))
        self.own = {"kernel": "gain"}

    def fill(self):
        """U(-1, 1) / sqrt(w)."""
        self.kernel.uniform_(-self.width ** -0.5, self.width ** -0.5)

    def over(self, x):
        """x (B, T, C) to (B, T, C), with nothing before."""
        return convolve(F.pad(x, (0, 0, self.width - 1, 0)), self.kernel.flip(0).to(x.dtype), x.size(1),
                        x.new_zeros(()))

    def forward(self, x, positions, cache=None, hidden=None, norm=None):
        """x (B, T, C) to (B, T, C), going on from the cache, or the memory, or nothing; cache from new_cache.

        hidden (B, T, C), norm: the states that x was made of, and by which norm; a memory keeps these states.
        Raises ValueError where every position sees every other.
        """
        if positions.bidirectional:
            raise ValueError("short_conv reads from left to right: it does not go with a model that sees everything at "
                             "once")
        T, n = positions.T, self.width - 1
        before = seen = None  # (B, m, C), (B, m): what stands before x
        if cache is not None:
            held, _, seen = cache.update(x.unsqueeze(1), x[:, None, :, :0], positions.index)
            before = held[:, 0, :held.size(2) - T].to(x.dtype)
        elif positions.memory is not None:
            kept, = positions.memory[self.slot]
            positions.memory_out[self.slot] = (torch.cat((kept, hidden), 1)[:, -n:],)
            before = norm(kept[:, n - min(n, positions.remembered):].to(hidden.dtype)).to(x.dtype)
        order = None
        if positions.index is not None:
            order, back, _ = positions.real_first()
            x = x.take_along_dim(order, 1)
            if before is not None:
                before = last_real(before, seen[:, :-T], n)
        if before is None:
            line = F.pad(x, (0, 0, n, 0))
        else:
            before = before[:, max(0, before.size(1) - n):]
            line = torch.cat((F.pad(before, (0, 0, n - before.size(1), 0)), x), 1)  # (B, w - 1 + T, C)
        y = convolve(line, self.kernel.flip(0).to(x.dtype), T, x.new_zeros(()))
        return y if order is None else y.take_along_dim(back, 1)

    def new_cache(self, batch_size, max_length, beside, device, dtype):
        """A KVCache of one head with the inputs (as keys) and no values. They are kept as long as the keys of the
        mixer's cache `beside`, so that it can be cropped to and forked from the same lengths; where that is a state,
        only those that the convolution sees."""
        window = self.width if not beside.divisible else beside.window and max(beside.window, self.width)
        cache = KVCache(batch_size, 1, self.kernel.size(1), max_length, window, device, dtype, value_dim=0)
        cache.kind = "inputs"
        return cache

    def new_memory(self, batch_size, device, dtype):
        """The hidden states of the last w - 1 positions: ((B, w - 1, C),)."""
        return (torch.zeros(batch_size, self.width - 1, self.kernel.size(1), device=device, dtype=dtype),)

    def flops(self, T):
        """Forward, of one token: 2 w C."""
        return 2 * self.kernel.numel()


def last_real(x, seen, n):
    """The last n or fewer of x (B, S, C) in each row where seen (B, S) is no padding, which becomes zeros before."""
    real = seen >= 0
    order = real.byte().argsort(dim=1, stable=True)[:, -n:]  # padding first
    real = real.take_along_dim(order, 1)
    return x.take_along_dim(order.unsqueeze(2), 1).masked_fill(~real.unsqueeze(2), 0)


# --- Attention ---

LONG = 1024  # keys from which on SDPA's causal attention outruns attend_by_hand


def attend_by_hand(q, k, v, mask, dropout=0.0, scale=None):
    """softmax(scale q k^T) v with the softmax in float32; what SDPA computes, in steps.

    q (B, H, T, D); k (B, H or fewer, S, D); v (B, as many, S, D'); mask as Positions.mask gives it; scale None:
    D^-0.5. Returns (B, H, T, D'). Under bfloat16 on a CPU forward and backward outrun SDPA's up to some hundred keys;
    over more SDPA gains, which skips what causal queries do not see (bench.py --what growth --attention sdpa, manual).
    """
    B, H, T, D = q.shape
    S = k.size(2)
    if k.size(1) != H:
        k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))  # (B, H, S, D)
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    scale = D ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # softmax of bfloat16 already works in float32 inside
        if mask is not None and mask.dim() == 2:  # one operation in place of three
            scores = torch.baddbmm(mask.to(q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
            scores = scores.view(B, H, T, S)
        else:
            scores = (q * scale) @ k.mT  # (B, H, T, S)
            scores = scores if mask is None else scores + mask.to(q.dtype)
        p = torch.softmax(scores, -1)
        if dropout:
            p = F.dropout(p, dropout)
        return p @ v


class Attention(nn.Module):
    """Self-attention with one fused projection and n_kv_head <= n_head groups of keys and values.

    kind "window" sees the last config.window positions only. With qk_norm, queries and keys pass an RMSNorm without
    parameters before they turn; RoPE keeps lengths, so after would be the same. They then have length sqrt(D); with
    qk_scale the score is s q.k / D, s learned, one of a layer, and sqrt(D) at first. A bias of keys that do not turn
    (nor are normed) moves all scores of a query alike, so no loss reaches it.
    """

    def __init__(self, config, layer=0, kind="full"):
        super().__init__()
        c = self.config = config
        self.layer, self.kind = layer, kind
        rows = tuple(n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head))
        self.qkv = Linear(c.n_embd, sum(rows), bias=c.bias)
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.fused, self.own = {"qkv": rows}, {}
        if c.qk_scale:
            self.qk_scale = nn.Parameter(torch.empty(1))
            self.own["qk_scale"] = "gain"
        slopes = alibi_slopes(c.n_head) if c.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        # One query, to which a cache shows just what it sees, is then PyTorch's attention.
        self.plain = (type(self) is Attention and slopes is None and c.n_kv_head == c.n_head
                      and c.attention != "manual")

    def fill(self):
        """Scores start as without qk_scale."""
        if self.config.qk_scale:
            self.qk_scale.fill_(self.config.head_dim ** 0.5)

    def forward(self, x, positions, cache=None):
        """x (B, T, C), positions a Positions, cache a KVCache or None. Returns (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        H, G = c.n_head, c.n_kv_head
        into, out = self._modules["qkv"], self._modules["out"]
        qkv = into(x).view(B, T, H + 2 * G, c.head_dim)  # (B, T, H + 2 G, D)
        if not c.qk_norm and not positions.tables:
            heads = qkv.transpose(1, 2)  # (B, H + 2 G, T, D)
            q, k, v = torch.split_with_sizes(heads, (H, G, G), 1)  # (B, H, T, D), (B, G, T, D) twice
        else:
            qk, v = qkv.split((H + G, G), 2)
            if c.qk_norm:
                qk = plain_rms_norm(qk)
            q, k = positions.turn(qk).transpose(1, 2).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
            v = v.transpose(1, 2)  # (B, G, T, D)
            if c.qk_scale:  # D^-0.5 of it is in every softmax
                q = (q * (self.qk_scale / c.head_dim ** 0.5)).to(q.dtype)
        seen = positions.index
        if cache is not None:
            k, v, seen = cache.update(k, v, positions.index)
            if q.dtype != k.dtype:
                q = q.to(k.dtype)
        if T == 1 and self.plain and seen is None and not self.training and not kernels.on():
            y = F.scaled_dot_product_attention(q, k, v)  # what attend comes to, without its questions
        else:
            y = self.attend(q, k, v, positions, seen, self.span(positions, cache))
        y = (y.transpose(1, 2) if T > 1 else y).reshape(B, T, H * c.head_dim)
        if cache is not None and y.dtype != x.dtype:  # a cache may be of another type
            y = y.to(x.dtype)
        return out(y)  # (B, T, C)

    def span(self, positions, cache=None):
        """Who sees whom in this layer."""
        if positions.bidirectional:
            return EVERYTHING
        limit = positions.window if cache is None else cache.window
        if self.kind == "window":
            limit = self.config.window if limit is None else min(limit, self.config.window)
        return causal(limit)

    def attend(self, q, k, v, positions, seen, span, bias=None, scale=None, slopes=None):
        """Queries (B, H, T, D) over keys (B, G, S, D) and values (B, G, S, D'), as `span` allows: (B, H, T, D').

        seen: the keys' positions (B, S) where rows are ragged, else None. bias: (B or 1, H, T, S), added to the scores.
        scale: of the scores; None: D^-0.5. slopes: ALiBi's of these heads; None: the layer's. Where a
        query reaches only a few of many keys, the work is cut into blocks of queries, each beside the keys that it
        reaches: time and memory grow with T times the reach, not with T S.
        """
        if bias is None and self.by_kernel(q, v, positions, seen, span):
            return kernels.attend(q.to(v.dtype), k.to(v.dtype), v, window=span.window, prefix=positions.prefix,
                                  scale=scale)
        slopes = self.slopes if slopes is None else slopes
        T, S, reach = q.size(2), k.size(2), span.reach
        if reach is not None and seen is None:
            if T == 1 and S > reach:  # a lone query: a view of what it sees needs no mask
                k, v, S = k[:, :, -reach:], v[:, :, -reach:], reach
                bias = None if bias is None else bias[..., -reach:]
            if T == 1 and (n := positions.start - span.first(positions.start) + 1) < S:
                k, v, S = k[:, :, -n:], v[:, :, -n:], n
                bias = None if bias is None else bias[..., -n:]
            elif T > 2 * reach and bias is None and positions.prefix is None and positions.in_order:
                parts = []
                for i in range(0, T, reach):
                    j = min(T, i + reach)
                    low, high = max(0, S - T + i - reach + 1), S - T + j
                    mask = positions.mask(span, S, None, q.device, slopes, (i, j, low, high))
                    parts.append(self.softmax(q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], mask, scale))
                return torch.cat(parts, 2)
        if bias is None and self.by_lone_kernel(q, k, v, positions, seen, span):
            return kernels.attend_one(q.to(v.dtype), k.to(v.dtype), v, scale=scale)
        lone = T == 1 and seen is None and reach is not None and positions.prefix is None and slopes is None
        mask = None if lone else positions.mask(span, S, seen, q.device, slopes)
        if bias is not None:
            mask = add_masks(mask, bias, T, S)
        return self.softmax(q, k, v, mask, scale)

    def fusible(self, *widths):
        """Whether kernels are on and know this layer's scores and heads of these widths: attention "auto", no ALiBi, no
        dropout in training."""
        c = self.config
        return (kernels.on() and c.attention == "auto" and self.slopes is None and not (self.training and c.dropout)
                and max(widths) <= kernels.WIDEST_HEAD)

    def by_kernel(self, q, v, positions, seen, span):
        """Whether kernels.attend computes what these queries see; arguments as `attend` takes them.

        Where rows stand alike and a query sees what is before it, a window of it, or a prefix that counts from the
        first key; in training and other passes of many places.
        """
        return (q.size(2) > 1 and seen is None and type(span) is Causal and positions.in_order
                and (positions.prefix is None or not positions.start) and self.fusible(q.size(3), v.size(3)))

    def by_lone_kernel(self, q, k, v, positions, seen, span):
        """Whether kernels.attend_one computes what a lone query over a cache sees, which is all of k: for inference,
        where rows stand alike, without a prefix."""
        return (q.size(2) == 1 and seen is None and type(span) is Causal and positions.in_order
                and positions.prefix is None and k.size(2) <= (span.reach or k.size(2))
                and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
                and self.fusible(q.size(3), v.size(3)))

    def softmax(self, q, k, v, mask, scale=None):
        """q (B, H, T, D), k (B, G, S, D), v (B, G, S, D'), mask None, "causal", bool or float: (B, H, T, D')."""
        c = self.config
        dropout = c.dropout if self.training else 0.0
        by_hand = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16
        by_hand = by_hand and (k.size(2) < (LONG if isinstance(mask, str) else 4 * LONG) or dropout > 0)
        if c.attention == "manual" or c.attention == "auto" and by_hand:
            return attend_by_hand(q, k, v, mask, dropout, scale)
        H, G = q.size(1), k.size(1)
        if mask is None and q.size(2) == 1 and G < H:  # one query: its group's heads act as queries
            q = q.reshape(q.size(0), G, -1, q.size(3))  # (B, G, H/G, D)
            y = F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scale)
            return y.reshape(q.size(0), H, 1, v.size(3))
        width, D = v.size(3), q.size(3)
        if D != width and q.size(2) > 1 and q.device.type == "cpu":  # there, fused attention takes one width only
            scale = D ** -0.5 if scale is None else scale
            q, k, v = (F.pad(t, (0, max(D, width) - t.size(3))) for t in (q, k, v))
        is_causal = isinstance(mask, str)
        if is_causal:
            mask = None
        elif mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=G < H)
        return y if y.size(3) == width else y[..., :width]

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A KVCache; a layer of kind "window" never keeps more than its own window."""
        c = self.config
        if self.kind == "window":
            window = c.window if window is None else min(window, c.window)
        return KVCache(batch_size, c.n_kv_head, c.head_dim, max_length, window, device, dtype)

    def new_memory(self, batch_size, device, dtype):
        """Attention starts afresh with every segment: None."""
        return None

    def flops(self, T):
        """Scores and sums of one token, forward, at T positions: 4 H D T, uncut by the causal mask; a window cuts T."""
        c = self.config
        return 4 * c.n_head * c.head_dim * (min(T, c.window) if self.kind == "window" else T)


def add_masks(mask, bias, T, S):
    """A float mask: bias (..., T, S) where mask (None, "causal", bool or float) allows."""
    if mask is None:
        return bias
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=bias.device).tril()
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


# --- Sparse attention ---

@dataclass(frozen=True)
class Strided(Span):
    """A query sees every stride-th place before it, counted from itself."""
    stride: int = 1

    def sees(self, q, k):
        """As Span.sees."""
        return (q - k) % self.stride == 0


@dataclass(frozen=True)
class Neighbours(Span):
    """A query sees its own block of `stride` places, up to itself."""
    stride: int = 1

    @property
    def reach(self):
        """As Span.reach."""
        return self.stride if self.window is None else min(self.stride, self.window)

    def first(self, q):
        """As Span.first."""
        return max(q // self.stride * self.stride, super().first(q))

    def sees(self, q, k):
        """As Span.sees."""
        return torch.div(q, self.stride, rounding_mode="floor") == torch.div(k, self.stride, rounding_mode="floor")


@dataclass(frozen=True)
class Summaries(Span):
    """A query sees itself and the last `summary` places of every block of `stride` before it or its own."""
    stride: int = 1
    summary: int = 1

    def sees(self, q, k):
        """As Span.sees."""
        return (k % self.stride >= self.stride - self.summary) | (k == q)


class Sparse(Attention):
    """Factorised attention (Child et al. 2019, section 4.3), one pattern for each half of the heads.

    kind "strided": the last `sparse_stride` places, and every sparse_stride-th place. kind "fixed": the query's own
    block of sparse_stride places, and the last `sparse_summary` places of all blocks. A whole pass over many places
    computes only what is seen, in time T sqrt(T) where the stride is sqrt(T); the cache keeps all keys.
    """

    def attend(self, q, k, v, positions, seen, span, bias=None, scale=None):
        """As Attention.attend; `span` says how far back a sliding cache goes, if it slides, or that all is seen."""
        if isinstance(span, Everything):
            return super().attend(q, k, v, positions, seen, span)
        c, H, G = self.config, q.size(1) // 2, k.size(1) // 2
        near = causal(c.sparse_stride if span.window is None else min(c.sparse_stride, span.window))
        far = Strided(span.window, c.sparse_stride)
        if self.kind == "fixed":
            near = Neighbours(span.window, c.sparse_stride)
            far = Summaries(span.window, c.sparse_stride, c.sparse_summary)
        slopes = (None, None) if self.slopes is None else self.slopes.split(H)
        whole = seen is None and span.window is None and positions.prefix is None and self.slopes is None
        y = super().attend(q[:, :H], k[:, :G], v[:, :G], positions, seen, near, slopes=slopes[0])
        q, k, v = q[:, H:], k[:, G:], v[:, G:]
        if whole and positions.start == 0 and q.size(2) == k.size(2) > 4 * c.sparse_stride:
            far_y = self.columns(q, k, v) if self.kind == "strided" else self.summaries(q, k, v)
        elif whole and q.size(2) == 1 and self.kind == "strided":  # one query: its own residue class, a view
            first = (k.size(2) - 1) % c.sparse_stride
            far_y = self.softmax(q, k[:, :, first::c.sparse_stride], v[:, :, first::c.sparse_stride], None)
        else:
            far_y = super().attend(q, k, v, positions, seen, far, slopes=slopes[1])
        return torch.cat((y, far_y), 1)

    def columns(self, q, k, v):
        """Every stride-th place by causal attention within each residue class: (B, H, T, D) all, start 0."""
        stride, T = self.config.sparse_stride, q.size(2)

        def fold(t):  # places past the end come last in their class: no real query sees them
            B, H, _, D = t.shape
            t = F.pad(t, (0, 0, 0, -T % stride)).view(B, H, -1, stride, D)  # (B, H, rows, stride, D)
            return t.permute(0, 3, 1, 2, 4).reshape(B * stride, H, -1, D)
        y = self.softmax(fold(q), fold(k), fold(v), "causal")  # (B stride, H, rows, D)
        B, H, rows, D = q.size(0), q.size(1), y.size(2), q.size(3)
        return y.view(B, stride, H, rows, D).permute(0, 2, 3, 1, 4).reshape(B, H, rows * stride, D)[:, :, :T]

    def summaries(self, q, k, v):
        """Itself and the summary places before it, all (B, H, T, D), start 0.

        The softmax over a query's own key and the shared ones is one over [shared keys, own key]: the own key's score
        is weighed against the others' sum, which a float32 log-sum-exp gives.
        """
        c, T = self.config, q.size(2)
        place = torch.arange(T, device=q.device)
        chosen = place[place % c.sparse_stride >= c.sparse_stride - c.sparse_summary]
        some_k, some_v = (t.index_select(2, chosen).repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        exact = torch.promote_types(q.dtype, torch.float32)
        own = (q.to(exact) * k.to(exact)).sum(-1, keepdim=True) * c.head_dim ** -0.5  # (B, H, T, 1)
        others = (q @ some_k.transpose(2, 3)).to(exact) * c.head_dim ** -0.5  # (B, H, T, some)
        others = others.masked_fill(chosen >= place[:, None], -math.inf)
        p = torch.softmax(torch.cat((others, own), -1), -1).to(v.dtype)
        if c.dropout and self.training:
            p = F.dropout(p, c.dropout)
        return p[..., :-1] @ some_v + p[..., -1:] * v

    def flops(self, T):
        """Scores and sums of one token, forward: half of the heads see a stride, half T over it."""
        c, stride = self.config, min(T, self.config.sparse_stride)
        far = T / stride * (c.sparse_summary if self.kind == "fixed" else 1)
        return int(2 * c.n_head * c.head_dim * (stride + far))


# --- Differential Transformer ---

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class Differential(Attention):
    """Differential attention (Ye et al. 2024, equations 1 to 3): heads in pairs, whose softmaxes are subtracted,

        (softmax(q1 k1) - lambda softmax(q2 k2)) v,   lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_init,

    with values of both heads' width, an RMSNorm per pair, times 1 - lambda_init. lambda_init = 0.8 - 0.6 exp(-0.3 l) in
    layer l from 0. As many parameters as full attention and 4 D more. Cache: keys and values of full attention.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        D = config.head_dim
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        for name in LAMBDAS:
            setattr(self, name, nn.Parameter(torch.empty(D)))
            self.own[name] = "gain"

    def fill(self):
        """N(0, 0.1), as the paper's code."""
        super().fill()
        for name in LAMBDAS:
            getattr(self, name).normal_(0, 0.1)

    def attend(self, q, k, v, positions, seen, span, bias=None, scale=None):
        """q (B, H, T, D), k and v (B, G, S, D), neighbours a pair: (B, H, T, D), a pair's output in both its places."""
        B, H, T, D = q.shape
        G, S = k.size(1) // 2, k.size(2)
        v = v.reshape(B, G, 2, S, D).transpose(2, 3).reshape(B, G, S, 2 * D)
        strength = (torch.exp((self.lambda_q1 * self.lambda_k1).sum())
                    - torch.exp((self.lambda_q2 * self.lambda_k2).sum()) + self.lambda_init)
        if self.by_kernel(q, v, positions, seen, span):
            y = kernels.attend_differential(q.to(v.dtype), k.to(v.dtype), v, strength, span.window,
                                            positions.prefix)  # (B, H/2, T, 2 D)
        else:
            slopes = None if self.slopes is None else self.slopes[1::2]
            one, two = (super(Differential, self).attend(q[:, i::2], k[:, i::2], v, positions, seen, span,
                                                         slopes=slopes) for i in range(2))  # (B, H/2, T, 2 D)
            y = one - strength.to(one.dtype) * two
        y = plain_rms_norm(y) * (1 - self.lambda_init)
        return y.view(B, H // 2, T, 2, D).transpose(2, 3).reshape(B, H, T, D)

    def flops(self, T):
        """Scores and sums of one token, forward: values are twice as wide for each softmax."""
        return 6 * self.config.n_head * self.config.head_dim * T


# --- Multi-head latent attention ---

class Latent(Attention):
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values of all heads come out of one latent
    of kv_rank dimensions, which is normalised and is all that the cache keeps, beside one key of rope_dim dimensions
    that turns and that all heads share (with positions "rope" only). q_rank: queries pass a normalised bottleneck too.

    A pass of many queries expands the latents to keys and values. A few queries over a cache are taken to the latents
    instead: q W_k . c = q . (W_k c), so that the cache is read as it is, as one key-value head (section 2.1.2's
    absorption).

    Under YaRN the part of a score that turns grows by yarn_mscale(factor, rope_mscale)^2 in RoPE's tables, and the
    other by yarn_mscale(factor, rope_mscale_all_dim)^2 here: DeepSeek's softmax scale and tables, multiplied out.
    """

    def __init__(self, config, layer=0):
        nn.Module.__init__(self)
        c = self.config = config
        self.layer, self.kind, self.rank = layer, "full", c.kv_rank
        self.turning = c.rope_dim if c.positions == "rope" else 0
        self.growth = yarn_mscale(c.rope_factor, c.rope_mscale_all_dim) ** 2 if c.rope_scaling == "yarn" else 1.0
        H, D = c.n_head, c.head_dim
        self.into = self.q_norm = None
        if c.q_rank is not None:
            self.into = Linear(c.n_embd, c.q_rank, bias=False)
            self.q_norm = Norm("rms", c.q_rank, c.norm_gain, False)
        self.q = Linear(c.n_embd if c.q_rank is None else c.q_rank, H * (D + self.turning), bias=False)
        self.kv = Linear(c.n_embd, self.rank + self.turning, bias=False)
        self.kv_norm = Norm("rms", self.rank, c.norm_gain, False)
        self.up = Linear(self.rank, 2 * H * D, bias=False)
        self.out = Linear(H * D, c.n_embd, bias=c.bias)
        self.fused = {"up": (H * D, H * D)}
        if self.turning:
            self.fused["kv"] = (self.rank, self.turning)
        self.register_buffer("slopes", alibi_slopes(H) if c.positions == "alibi" else None, persistent=False)

    def forward(self, x, positions, cache=None):
        """x (B, T, C), positions a Positions, cache from new_cache or None. Returns (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        H, D, R = c.n_head, c.head_dim, self.turning
        q = self.q(x if self.into is None else self.q_norm(self.into(x))).view(B, T, H, D + R)
        latent, key = self.kv(x).split((self.rank, R), -1)
        latent = self.kv_norm(latent).to(x.dtype if not torch.is_autocast_enabled(x.device.type) else q.dtype)
        if R:
            still = q[..., :D] if self.growth == 1 else q[..., :D] * self.growth
            q = torch.cat((still, positions.turn(q[..., D:])), -1)
            latent = torch.cat((latent, positions.turn(key.unsqueeze(2)).squeeze(2).to(latent.dtype)), -1)
        q, held, seen = q.transpose(1, 2), latent.unsqueeze(1), positions.index  # (B, H, T, D + R), (B, 1, T, rank + R)
        if cache is not None:
            held, _, seen = cache.update(held, held[..., :0], positions.index)
            q = q.to(held.dtype)
        span, scale, S = self.span(positions, cache), (D + R) ** -0.5, held.size(2)
        if T * (self.rank + R) * 2 < S * D:  # few queries, many latents
            keys, values = self.up.weight.view(2, H, D, self.rank).to(held.dtype)  # (H, D, rank)
            q = torch.cat((q[..., :D] @ keys, q[..., D:]), -1)  # (B, H, T, rank + R)
            y = self.attend_latents(q, held, positions, seen, span, scale)  # (B, H, T, rank)
            y = y @ values.transpose(1, 2)  # (B, H, T, D)
        else:
            k, v = self.up(held[:, 0, :, :self.rank]).view(B, S, 2, H, D).permute(2, 0, 3, 1, 4)  # (B, H, S, D)
            if R:
                k = torch.cat((k, held[..., self.rank:].to(k.dtype).expand(B, H, S, R)), -1)
            y = self.attend(q.to(k.dtype), k, v, positions, seen, span, scale=scale)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D).to(x.dtype))

    def attend_latents(self, q, held, positions, seen, span, scale):
        """q (B, H, T, rank + R) over held (B, 1, S, rank + R), whose first columns are values: (B, H, T, rank)."""
        lone = self.by_lone_kernel(q[..., self.rank:], held, q[..., :0], positions, seen, span)
        if lone and self.rank <= kernels.WIDEST_RANK:
            return kernels.attend_latent(q, held, self.rank, scale)
        return self.attend(q, held, held[..., :self.rank], positions, seen, span, scale=scale)

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A KVCache of one head with keys (latent and turned key) and no values."""
        cache = KVCache(batch_size, 1, self.rank + self.turning, max_length, window, device, dtype, value_dim=0)
        cache.kind = "latent"
        return cache

    def flops(self, T):
        """Scores and sums of one token, forward, keys and values expanded."""
        c = self.config
        return 2 * c.n_head * (2 * c.head_dim + self.turning) * T
