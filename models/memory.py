"""Mixers that see earlier segments: Transformer-XL and the Compressive Transformer.

Both are defined by absolute position, so that any division of a text into passes gives the same: with T = block_size,
M = memory_length, the segment of a query at q begins at s = (q // T) T.

    xl            keys s - M ... q
    compressive   these, and the compressed_length blocks of compression_rate positions that end before s - M

In training a segment is one pass, and its memory is what the pass before left: hidden states, as they entered the
layer, without gradient, which are normed (and convolved, with short_conv) and projected again with the weights of today
(Dai et al. 2019). So forward takes, beside its inputs x, the states `hidden` that they were made of, and the modules
`norm` and `conv` (or None) that made them; without these, x itself is what is kept.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import expect, plain_rotary
from model import Attention, Linear, Pattern, add_parameter, causal
from nanolab.cache import CompressedCache, KVCache


@dataclass(frozen=True)
class Segments(Pattern):
    """A query sees its own segment of `length` positions, up to itself, and `memory` before the segment."""
    length: int = 1
    memory: int = 0

    max_keys = property(lambda self: self.length + self.memory)
    period = property(lambda self: self.length)

    def first(self, q):
        return max(0, q // self.length * self.length - self.memory)

    def sees(self, q, k):
        return k >= torch.div(q, self.length, rounding_mode="floor") * self.length - self.memory


def check(config):
    """Raises ValueError for settings that do not go with a memory."""
    c, kind = config, "xl" if "xl" in config.mixers else "compressive"
    expect(not c.learned_positions, f"mixer {kind!r} sees states of earlier segments, which positions {c.positions!r} "
                                    "would place wrongly: use 'rope', 'relative', 'alibi' or 'none'")
    expect(not c.qk_scale, f"qk_scale is for mixers without segment memory, not for mixer {kind!r}")
    if "compressive" in c.mixers:
        expect(not c.block_size % c.compression_rate and not c.memory_length % c.compression_rate,
               f"compression_rate {c.compression_rate} must divide block_size {c.block_size} and memory_length "
               f"{c.memory_length}")


class TransformerXL(Attention):
    """Attention with segment memory (Dai et al. 2019, section 3).

    Positions "relative" are the paper's: score = ((q + u) k + (q + v) W_R R_(q-k)) / sqrt(D), R the sinusoid of the
    distance (section 3.3). "rope" and "alibi" see distances anyway; "none" sees none.
    """

    keeps_hidden = True  # a layer hands it the hidden states, too

    def __init__(self, config, layer=0, kind="xl"):
        super().__init__(config, layer, kind)
        if config.positions == "relative":
            self.into = Linear(config.n_embd, config.n_head * config.head_dim, bias=False)  # W_R
            for name in ("bias_u", "bias_v"):
                add_parameter(self, name, 0.0, config.n_head, config.head_dim, role="bias")

    def project(self, x, learn=True):
        """x (B, T, C) to queries (B, T, H, D), keys and values (B, T, G, D), with qk_norm, not turned yet. Only with
        `learn` does a gradient reach the weights."""
        c, weights = self.config, self.qkv._parameters.values()
        qkv = self.qkv(x) if learn else F.linear(x, *(None if p is None else p.detach() for p in weights))
        q, k, v = qkv.view(*x.shape[:2], -1, c.head_dim).split((c.n_head, c.n_kv_head, c.n_kv_head), 2)
        return (self.unit(q), self.unit(k), v) if c.qk_norm else (q, k, v)

    def project_keys(self, x):
        """The keys and values of `project` alone."""
        c, rows = self.config, self.config.n_head * self.config.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[rows:]
        k, v = F.linear(x, self.qkv.weight[rows:], bias).view(*x.shape[:2], 2, c.n_kv_head, c.head_dim).unbind(2)
        return (self.unit(k) if c.qk_norm else k), v

    def at(self, t, positions, index, end):
        """t (B, n, H, D) turned as at index (n,) int64 below `end`, where positions are "rope"; else itself."""
        if self.config.positions != "rope" or not t.size(1):
            return t
        tables = positions.ropes[str(t.size(3))](end)
        return plain_rotary(t, *(table[index].view(1, -1, 1, t.size(3)) for table in tables))

    def relative(self, q, distance, n):
        """(q + u, bias): queries q (B, H, T, D) for the keys, and (q + v) W_R R_d / sqrt(D) as (B, H, T, S).

        distance: int64 (T, S) or (B, 1, T, S), below n; elsewhere, and where negative, anything: such keys are masked.
        """
        c, half = self.config, torch.arange(0, self.config.n_embd, 2, device=q.device) / self.config.n_embd
        angle = torch.arange(n, device=q.device)[:, None] * 10000.0 ** -half  # (n, C/2)
        R = torch.cat((angle.sin(), angle.cos()), 1)[:, :c.n_embd]
        r = self.into(R.to(self.into.weight.dtype)).view(n, c.n_head, c.head_dim).permute(1, 2, 0)  # (H, D, n)
        scores = (q + self.bias_v.unsqueeze(1).to(q.dtype)) @ r.to(q.dtype) * c.head_dim ** -0.5  # (B, H, T, n)
        index = distance.clamp(0, n - 1).expand(*scores.shape[:3], distance.size(-1))
        return q + self.bias_u.unsqueeze(1).to(q.dtype), scores.gather(3, index)

    def check(self, positions):
        """Raises ValueError for what has no meaning here."""
        if positions.bidirectional:
            raise ValueError(f"mixer {self.kind!r} reads from left to right: it cannot see ahead")
        if positions.memory is not None and positions.remembered % self.config.block_size:
            raise ValueError(f"the memory stands for {positions.remembered} positions, no whole number of segments of "
                             f"{self.config.block_size}")

    def old_inputs(self, kept, remembered, x, norm, conv):
        """Of kept states (B, M or, with a convolution, M + w - 1, C), whose last `remembered` are real, what today's
        norm and convolution make of the last M: (B, n <= M, C), in the type of x."""
        old = kept[:, kept.size(1) - min(remembered, kept.size(1)):]
        old = old.to(x.dtype) if norm is None else norm(old)
        old = old if conv is None else conv.over(old)
        return old[:, max(0, old.size(1) - self.config.memory_length):].to(x.dtype)

    def forward(self, x, positions, cache=None, hidden=None, norm=None, conv=None):
        """x (B, T, C), positions a Positions, cache from new_cache or None. Returns (B, T, C)."""
        self.check(positions)
        c, (B, T, _) = self.config, x.shape
        if positions.memory is not None:
            kept, = positions.memory[self.layer]
            positions.memory_out[self.layer] = (torch.cat((kept, x if hidden is None else hidden), 1)
                                                [:, -kept.size(1):],)
            old = self.old_inputs(kept, positions.remembered, x, norm, conv)
            known = old.size(1)
            q, k, v = self.project(x)
            old_k, old_v = self.project_keys(old)
            k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
            index = torch.arange(known + T, device=x.device)
            q, k = self.at(q, positions, index[known:], known + T), self.at(k, positions, index, known + T)
            key_positions, pattern = None, causal()
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        else:
            q, k, v = self.project(x)
            q, k, v = (t.transpose(1, 2) for t in (positions.turn(q), positions.turn(k), v))
            key_positions, pattern = positions.index, Segments(None, c.block_size, c.memory_length)
            if cache is not None:
                k, v, key_positions = cache.update(k, v, positions.index)
                q = q.to(k.dtype)
        bias = None
        if c.positions == "relative":
            S = n = k.size(2)
            if key_positions is None:
                place = torch.arange(S, device=x.device)
                distance = place[S - T:, None] - place
            else:
                distance, n = positions.index[:, None, :, None] - key_positions[:, None, None, :], pattern.max_keys
            q, bias = self.relative(q, distance, n)
        y = self.attend(q, k, v, positions, key_positions, pattern, bias)
        return self.out(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A sliding KVCache as long as memory and segment, whatever max_length and window say."""
        c = self.config
        cache = KVCache(batch_size, c.n_kv_head, c.head_dim, max_length, c.block_size + c.memory_length, device, dtype)
        cache.kind = "memory"
        return cache

    def new_memory(self, batch_size, device, dtype):
        """The hidden states of the last M positions, and of those before that a convolution needs: ((B, n, C),)."""
        n = self.config.memory_length + max(0, self.config.short_conv - 1)
        return (torch.zeros(batch_size, n, self.config.n_embd, device=device, dtype=dtype),)

    def flops(self, T):
        """Scores and sums of one token, forward, memory and segment uncut by the causal mask."""
        c = self.config
        return 4 * c.n_head * c.head_dim * min(T, c.block_size + c.memory_length)


class Compressive(TransformerXL):
    """Transformer-XL that compresses what leaves its memory (Rae et al. 2019, section 3).

    Hidden states, compression_rate neighbours at a time, become one: by a convolution of that width and stride, by
    their mean or their maximum. Such a slot is normed like them, but passes no short_conv. It stands where its last
    position stood (in the paper slots count one step each). The network's loss does not reach the compression, nor the
    other way: the convolution learns from the attention-reconstruction loss alone (algorithm 2), the mean square
    between what this segment reads, by content, from the states that leave and from their slots.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer, "compressive")
        c = config
        if c.compression == "conv":
            add_parameter(self, "compress_weight", 0.0, c.n_embd, c.compression_rate * c.n_embd, role="matrix")

    def init_weights(self):
        """The convolution starts near the mean."""
        c = self.config
        if c.compression == "conv":
            mean = torch.eye(c.n_embd, device=self.compress_weight.device).repeat(1, c.compression_rate)
            self.compress_weight.normal_(0, 0.02).add_(mean / c.compression_rate)

    def compress(self, x, learn=False):
        """x (B, n c, C) to (B, n, C). Only with `learn` does the gradient reach the convolution; x's never."""
        c = self.config
        blocks = x.detach().view(x.size(0), -1, c.compression_rate, c.n_embd)  # (B, n, c, C)
        if c.compression == "mean":
            return blocks.mean(2)
        if c.compression == "max":
            return blocks.amax(2)
        weight = self.compress_weight if learn else self.compress_weight.detach()
        return F.linear(blocks.flatten(2), weight)

    def forward(self, x, positions, cache=None, hidden=None, norm=None, conv=None):
        """x (B, T, C), positions a Positions, cache a CompressedCache or None. Returns (B, T, C)."""
        self.check(positions)
        hidden = x if hidden is None else hidden
        if positions.memory is not None:
            return self.segment(x, positions, hidden, norm, conv)
        if positions.index is None and (cache is None or not cache.ragged):
            y = self.run(x, hidden, norm, positions, positions.start, None if cache is None else cache.rows[0])
        else:  # rows reach the ends of blocks and segments at times of their own: one after another
            real, y = positions.index >= 0, torch.zeros_like(x)
            rows = [None] * x.size(0) if cache is None else cache.each_row()
            for b, row in enumerate(rows):
                if bool(real[b].any()):
                    start = int(positions.index[b][real[b]][0])
                    found = self.run(x[b:b + 1, real[b]], hidden[b:b + 1, real[b]], norm, positions, start, row)
                    y = y.index_put((torch.tensor(b, device=x.device), real[b].nonzero()[:, 0]), found[0].to(y.dtype))
        if cache is not None:
            cache.advance(positions)
        return y

    def run(self, x, hidden, norm, positions, start, state=None):
        """Rows that stand alike: x (B, T, C) from position `start` on, `state` what a cache knows of what is before:
        keys and values `raw`, `inputs` of a block not full yet, `slots`, keys and values of compressed blocks from
        number `first` on, and how many blocks are `known`."""
        c, (B, T, _) = self.config, x.shape
        L, M, rate = c.block_size, c.memory_length, c.compression_rate
        index = torch.arange(start, start + T, device=x.device)
        q, k, v = self.project(x)
        q, k = (self.at(t, positions, index, start + T) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        state = dict.fromkeys(("raw", "inputs", "slots"), None) | {"known": 0, "first": 0} if state is None else state
        slots, raw, first, known = None, state["raw"], state["first"], state["known"]
        if raw is not None:
            k, v, _ = raw.update(k, v)
            q = q.to(k.dtype)
        if state["inputs"] is not None:
            hidden = torch.cat((state["inputs"].to(hidden.dtype), hidden), 1)
        n = hidden.size(1) // rate
        if n and (raw is not None or start + T - 1 >= L + M):
            ends = torch.arange(known + 1, known + n + 1, device=x.device) * rate - 1
            slot = self.compress(hidden[:, :n * rate])
            slot_k, slot_v = self.project_keys((slot if norm is None else norm(slot)).to(x.dtype))
            slots = [t.transpose(1, 2).to(k.dtype)
                     for t in (self.at(slot_k, positions, ends, (known + n) * rate), slot_v)]  # (B, G, n, D)
        if state["slots"] is not None:
            slots = state["slots"] if slots is None else [torch.cat(pair, 2) for pair in zip(state["slots"], slots)]
        parts, begin, S = [], start, k.size(2)
        while begin < start + T:  # one segment at a time: all its queries see the same memory and the same slots
            s = begin // L * L
            end = min(s + L, start + T)
            low = max(0, s - M)
            newest = max(0, s - M) // rate
            oldest = max(0, newest - c.compressed_length)
            a, b = (low - (start + T - S)), end - (start + T - S)
            keys, values, where, reach = k[:, :, a:b], v[:, :, a:b], torch.arange(low, end, device=x.device), end - low
            if newest > oldest:
                ends = torch.arange(oldest + 1, newest + 1, device=x.device) * rate - 1
                keys = torch.cat((slots[0][:, :, oldest - first:newest - first], keys), 2)
                values = torch.cat((slots[1][:, :, oldest - first:newest - first], values), 2)
                where, reach = torch.cat((ends, where)), end + 1 - (oldest + 1) * rate
            parts.append(self.read(q[:, :, begin - start:end - start], keys, values,
                                   torch.arange(begin, end, device=x.device), where, reach))
            begin = end
        kept = -(-(2 * L + M) // rate) + c.compressed_length
        drop = 0 if slots is None else max(0, slots[0].size(2) - kept)
        state.update(inputs=hidden[:, n * rate:].detach().clone(), known=known + n, first=first + drop,
                     slots=None if slots is None else [t[:, :, drop:].detach() for t in slots])
        y = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return self.out(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))

    def read(self, q, k, v, q_place, k_place, n):
        """Causal attention by positions (T,) and (S,) int64, less than n apart: q (B, H, T, D), k, v (B, G, S, D)."""
        distance = q_place[:, None] - k_place  # (T, S)
        mask = distance >= 0
        if self.slopes is not None:
            mask = (-distance * self.slopes.view(-1, 1, 1)).masked_fill(~mask, float("-inf"))  # (H, T, S)
        elif self.config.positions == "relative":
            q, bias = self.relative(q, distance, n)
            mask = bias.masked_fill(~mask, float("-inf"))
        return self.softmax(q, k, v, None if q.size(2) == 1 and mask.dtype == torch.bool else mask)

    def segment(self, x, positions, hidden, norm, conv):
        """One segment of training: x (B, T, C) after positions.memory[layer], as new_memory makes it."""
        c, (B, T, _) = self.config, x.shape
        M, Mc, rate, before = c.memory_length, c.compressed_length, c.compression_rate, positions.remembered
        raw, slots = positions.memory[self.layer]
        n_raw, n_slots = min(before, M), min(Mc, max(0, before - M) // rate)
        origin = Mc * rate + M  # where the segment stands: only distances matter
        q_place = torch.arange(origin, origin + T, device=x.device)
        k_place = torch.cat((origin - M - 1 - rate * torch.arange(n_slots - 1, -1, -1, device=x.device),
                             torch.arange(origin - n_raw, origin + T, device=x.device)))
        q, k, v = self.project(x)
        used = slots[:, Mc - n_slots:]
        used = used if norm is None else norm(used)
        old_k, old_v = self.project_keys(torch.cat((used.to(x.dtype), self.old_inputs(raw, before, x, norm, conv)), 1))
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        end, reach = origin + T, T + (M + 1 + rate * (n_slots - 1) if n_slots else n_raw)
        q, k = self.at(q, positions, q_place, end), self.at(k, positions, k_place, end)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.read(q, k, v, q_place, k_place, reach)
        line = torch.cat((raw[:, raw.size(1) - n_raw:].to(hidden.dtype), hidden), 1)
        leaving = line[:, :max(0, n_raw + T - M) // rate * rate].detach()
        if leaving.size(1):
            learn = self.training and torch.is_grad_enabled()
            new = self.compress(leaving, learn)
            if learn and c.compression == "conv":
                positions.losses.setdefault("compression", []).append(
                    c.compression_weight * self.reconstruction(x.detach(), leaving, new, norm))
            slots = torch.cat((slots, new.detach().to(slots.dtype)), 1)[:, -Mc:]
        positions.memory_out[self.layer] = (torch.cat((raw, hidden), 1)[:, -raw.size(1):], slots)
        return self.out(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))

    def reconstruction(self, h, old, new, norm):
        """Mean square between what h (B, T, C) reads from old (B, n c, C) and from new (B, n, C), normed; projections
        and norm fixed."""
        def read(states):
            states = (states if norm is None else norm(states, learn=False)).to(h.dtype)
            return self.softmax(q, *(t.transpose(1, 2) for t in self.project(states, learn=False)[1:]), None).float()
        q = self.project(h, learn=False)[0].transpose(1, 2)
        with torch.no_grad():
            wanted = read(old)
        return F.mse_loss(read(new), wanted)

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A CompressedCache, of constant size whatever max_length and window say."""
        c = self.config

        def row(n):
            return {"raw": KVCache(n, c.n_kv_head, c.head_dim, 1, c.block_size + c.memory_length, device, dtype),
                    "inputs": None, "slots": None, "known": 0, "first": 0}
        return CompressedCache(batch_size, row)

    def new_memory(self, batch_size, device, dtype):
        """The hidden states that an `xl` keeps and the compressed ones before: ((B, n, C), (B, Mc, C))."""
        slots = torch.zeros(batch_size, self.config.compressed_length, self.config.n_embd, device=device, dtype=dtype)
        return (*super().new_memory(batch_size, device, dtype), slots)

    def flops(self, T):
        """Scores and sums of one token, forward, memories and segment uncut by the causal mask."""
        c = self.config
        return 4 * c.n_head * c.head_dim * min(T, c.block_size + c.memory_length + c.compressed_length)
