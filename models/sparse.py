"""Sparse attention (Child et al. 2019): mixers "strided" and "fixed"."""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from kernels import expect
from model import Attention, Everything, Pattern, causal, softcap, weights_of


@dataclass(frozen=True)
class Strided(Pattern):
    """A query sees every stride-th position before it, counted from itself."""
    stride: int = 1

    def sees(self, q, k):
        return (q - k) % self.stride == 0


@dataclass(frozen=True)
class Neighbours(Pattern):
    """A query sees its own block of `stride` places, up to itself."""
    stride: int = 1

    max_keys = property(lambda self: min(self.stride, self.window or self.stride))
    period = property(lambda self: self.stride)

    def first(self, q):
        return max(q // self.stride * self.stride, super().first(q))

    def sees(self, q, k):
        return torch.div(q, self.stride, rounding_mode="floor") == torch.div(k, self.stride, rounding_mode="floor")


@dataclass(frozen=True)
class Summaries(Pattern):
    """A query sees itself and the last `summary` places of every block of `stride` before it or its own."""
    stride: int = 1
    summary: int = 1

    def sees(self, q, k):
        return (k % self.stride >= self.stride - self.summary) | (k == q)


def check(config):
    """Raises ValueError for settings that do not go with these mixers."""
    c = config
    expect("fixed" not in c.mixers or c.sparse_summary <= c.sparse_stride,
           f"sparse_summary is {c.sparse_summary}, but must be from 1 to sparse_stride {c.sparse_stride}")
    expect(not c.n_head % 2 and not c.n_kv_head % 2, "mixers 'strided' and 'fixed' give half of the heads to each "
           f"pattern: n_head {c.n_head} and n_kv_head {c.n_kv_head} must be even")


class Sparse(Attention):
    """Factorised attention (Child et al. 2019, section 4.3), one pattern for each half of the heads.

    kind "strided": the last `sparse_stride` places, and every sparse_stride-th place. kind "fixed": the query's own
    block of sparse_stride places, and the last `sparse_summary` places of all blocks. A whole pass over many places
    computes only what is seen, in time T sqrt(T) where the stride is sqrt(T); the cache keeps all keys.
    """

    def attend(self, q, k, v, positions, key_positions, pattern, bias=None, scale=None):
        """As Attention.attend; `pattern` says how far back a sliding cache goes, if it slides, or that all is seen."""
        if isinstance(pattern, Everything):
            return super().attend(q, k, v, positions, key_positions, pattern)
        c, H, G, window = self.config, q.size(1) // 2, k.size(1) // 2, pattern.window
        near, far = causal(min(c.sparse_stride, window or c.sparse_stride)), Strided(window, c.sparse_stride)
        if self.kind == "fixed":
            near = Neighbours(window, c.sparse_stride)
            far = Summaries(window, c.sparse_stride, c.sparse_summary)
        slopes = (None, None) if self.slopes is None else self.slopes.split(H)
        whole = (key_positions is None and window is None and positions.prefix is None and positions.age is None
                 and self.slopes is None)
        y = super().attend(q[:, :H], k[:, :G], v[:, :G], positions, key_positions, near, slopes=slopes[0])
        q, k, v = q[:, H:], k[:, G:], v[:, G:]
        if whole and positions.start == 0 and q.size(2) == k.size(2) > 4 * c.sparse_stride:
            far_y = self.columns(q, k, v) if self.kind == "strided" else self.summaries(q, k, v)
        elif whole and q.size(2) == 1 and self.kind == "strided":  # one query: its own residue class, a view
            first = (k.size(2) - 1) % c.sparse_stride
            far_y = self.softmax(q, k[:, :, first::c.sparse_stride], v[:, :, first::c.sparse_stride], None)
        else:
            far_y = super().attend(q, k, v, positions, key_positions, far, slopes=slopes[1])
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
        """Itself and the summary positions before it, all (B, H, T, D), start 0: a softmax over [shared keys, own]."""
        c, T = self.config, q.size(2)
        place = torch.arange(T, device=q.device)
        chosen = place[place % c.sparse_stride >= c.sparse_stride - c.sparse_summary]
        some_k, some_v = (t.index_select(2, chosen).repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        exact = torch.promote_types(q.dtype, torch.float32)
        own = (q.to(exact) * k.to(exact)).sum(-1, keepdim=True) * c.head_dim ** -0.5  # (B, H, T, 1)
        others = (q @ some_k.transpose(2, 3)).to(exact) * c.head_dim ** -0.5  # (B, H, T, some)
        if c.score_softcap is not None:
            own, others = softcap(own, c.score_softcap), softcap(others, c.score_softcap)
        others = others.masked_fill(chosen >= place[:, None], -math.inf)
        p = weights_of(torch.cat((others, own), -1), c.softmax_plus_one).to(v.dtype)
        if c.dropout and self.training:
            p = F.dropout(p, c.dropout)
        return p[..., :-1] @ some_v + p[..., -1:] * v

    def flops(self, T):
        """Scores and sums of one token, forward: half of the heads see a stride, half T over it."""
        c, stride = self.config, min(T, self.config.sparse_stride)
        far = T / stride * (c.sparse_summary if self.kind == "fixed" else 1)
        return int(2 * c.n_head * c.head_dim * (stride + far))


strided, fixed = partial(Sparse, kind="strided"), partial(Sparse, kind="fixed")
