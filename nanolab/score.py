"""Named protocols of evaluation: every byte of a split scored once, in bits. evaluate.py says what each means."""
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanolab.run import UserError

LN2 = math.log(2)


@contextmanager
def evaluating(model):
    """Within it the model is in eval mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class Score:
    """What a protocol found: `bits` (one float64 per scored target, in the order of the split), `protocol`, `seconds`.

    Of a model over bytes, a target is a byte; over a tokenizer's ids, `n_bytes` says how many bytes the targets are.
    """
    bits: torch.Tensor
    protocol: str
    seconds: float
    n_bytes: int = None

    @property
    def bytes(self):
        return self.bits.numel() if self.n_bytes is None else self.n_bytes

    @property
    def bpb(self):
        """Bits per byte: of all scored targets, over their bytes."""
        return self.bits.sum().item() / self.bytes

    @property
    def loss(self):
        """Nats per target."""
        return self.bits.sum().item() / self.bits.numel() * LN2

    def interval(self, resamples=1000, chunk=4096, seed=0):
        """95 % bootstrap interval of bpb over chunks of neighbouring bytes (single bytes are far from independent).

        The last chunk may be shorter, and weighs less. Returns (low, high); (nan, nan) where two whole chunks are not
        there. Its generator is its own.
        """
        if self.bits.numel() < 2 * chunk:
            return math.nan, math.nan
        missing = -self.bits.numel() % chunk                                            # in the last chunk
        totals = F.pad(self.bits, (0, missing)).view(-1, chunk).sum(1)                  # (n,)
        sizes, n = torch.full_like(totals, chunk), len(totals)                          # (n,)
        sizes[-1] -= missing
        generator, means = torch.Generator().manual_seed(seed), []
        for _ in range(resamples):
            drawn = torch.randint(n, (n,), generator=generator)                          # (n,)
            means.append(totals[drawn].sum() / sizes[drawn].sum())
        low_high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return tuple((low_high * (self.bits.numel() / self.bytes)).tolist())


def target_bits(logits, targets):
    """-log2 softmax: bits, float64 (...), of targets (...) under logits (..., V); exactly 8.0 for equal logits."""
    if logits.device.type == "mps":                              # it has no float64
        logits, targets = logits.cpu(), targets.cpu()
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) / LN2


def parse_protocol(protocol, config, n_bytes):
    """'block', 'stride:S', 'cache', 'memory' -> (kind, S or None), for a model of this config and a split of n_bytes.

    UserError for any other name, for cache where it needs more positions than a learned table has, and for memory where
    no layer has one.
    """
    T = config.block_size
    kind, _, number = protocol.partition(":")
    if protocol == "block":
        return kind, T
    if kind == "stride" and number.isdecimal() and 1 <= int(number) <= T:
        return kind, int(number)
    if protocol == "memory":
        if not config.carries:
            raise UserError(f"protocol memory is impossible with mixer {config.mixer}: no layer carries anything from "
                            "one segment to the next; use block, stride:S or cache")
        return kind, None
    if protocol != "cache":
        raise UserError(f"unknown protocol {protocol!r}: block, cache, memory, or stride:S with S from 1 to "
                        f"block_size ({T})")
    if config.positions.startswith("learned") and n_bytes - 1 > T:
        raise UserError(f"protocol cache is impossible past block_size {T} with positions {config.positions}: every "
                        "cached state would need a new position at each step; use block or stride:S, or a model with "
                        "rope or none")
    if config.shorten > 1:
        raise UserError("protocol cache is impossible with a pyramid: its units are counted from the start of a "
                        "window; use block or stride:S")
    return (kind, None) if T > 1 else ("block", 1)               # a cache of one key holds nothing to reuse


@torch.no_grad()
def score(model, data, protocol="block", batch_size=32, windows=None, sizes=None):
    """Scores `data` (N,), bytes or a tokenizer's ids, under a protocol; leaves the model in the mode it was in and
    draws no random number.

    windows: only that many windows of the block protocol, evenly spread (a trainer's quick validation), or all whole
    ones if there are fewer; then the first byte of the split is not charged, and `protocol` says how many they were.
    Otherwise all N bytes are scored, each once. sizes: (V,) int64, the bytes of each id, from which bits per byte come;
    with `windows` by the mean over the whole split. The caller decides on autocast. Raises UserError for an impossible
    protocol or a split of < 2 bytes, ValueError for `windows` < 1 or with another protocol than block.
    """
    T = model.config.block_size
    N = data.numel()
    kind, stride = parse_protocol(protocol, model.config, N)
    if N < 2:
        raise UserError(f"a split of {N} bytes cannot be scored")
    if windows is not None and (protocol != "block" or windows < 1):
        raise ValueError(f"windows is {windows} with protocol {protocol}: it must be at least 1, and needs block")
    began = time.perf_counter()
    with evaluating(model):
        if windows is not None:
            rows = data.unfold(0, min(T + 1, N), T)              # (all windows, T + 1); a split may be one short window
            windows = min(windows, len(rows))
            protocol = f"block, {windows} windows"
            chosen = (torch.arange(windows) * len(rows) // windows).to(data.device)
            parts = [_bits(model, rows[batch]).flatten() for batch in chosen.split(batch_size)]
        else:
            first = torch.full((1,), math.log2(model.config.vocab_size), dtype=torch.float64)
            parts = [first, *(_segments(model, data) if kind == "memory" else _stream(model, data, batch_size)
                              if kind == "cache" else _windows(model, data, stride, batch_size))]
    bits = torch.cat(parts)
    assert windows is not None or len(bits) == N, f"{len(bits)} bytes scored, but the split has {N}"
    n_bytes = None
    if sizes is not None:
        n_bytes = round(int(sizes[data.long()].sum()) * len(bits) / N)
    return Score(bits, protocol, time.perf_counter() - began, n_bytes)


def _bits(model, rows, first=0, **how):
    """Bits (B, <= T - first), on the CPU, of the targets in rows (B, <= T + 1), without the `first` ones."""
    rows = rows.to(next(model.parameters()).device).long()
    return target_bits(model(rows[:, :-1], **how)[:, first:], rows[:, 1 + first:]).cpu()


def _windows(model, data, stride, batch_size):
    """Bits of all but the first byte, in pieces (n,): windows start at multiples of `stride`, and each scores what no
    earlier one has scored."""
    T, N, start = model.config.block_size, data.numel(), 0
    yield _bits(model, data[None, :T + 1])[0]                    # nothing before it: all of it counts
    if N - stride > T:
        rows = data[stride:].unfold(0, T + 1, stride)            # (windows, T + 1), a view
        for batch in rows.split(batch_size):
            yield _bits(model, batch, T - stride).flatten()
        start = len(rows) * stride                               # of the last whole window
    if start + T + 1 < N:                                        # the end of the split: one shorter window
        yield _bits(model, data[None, start + stride:], T - stride)[0]


def _stream(model, data, batch_size):
    """Bits of all but the first byte, in pieces (n,), of one stream through a cache in which full attention slides over
    T keys, computed in parallel.

    A state of the last layer depends on a limited number of bytes before it. Each segment starts that many bytes early
    and scores only its own bytes, so that the cut into segments changes nothing but speed. Cuts lie where blocks of all
    layers begin. A recurrent layer depends on everything before it: then there is one segment.
    """
    config = model.config
    T, N = config.block_size, data.numel()
    unit = math.lcm(T, config.sparse_stride) if "fixed" in config.mixers else T
    receptive_field = config.receptive_field(T)
    warm = N if receptive_field is None else -(-receptive_field // unit) * unit
    # Each reads from its start on, and scores the targets [a, b).
    segments = [(max(0, a - 1 - warm), a, min(a + 4 * warm, N)) for a in range(1, N, 4 * warm)]
    by_length, found = {}, {}
    for segment in segments:
        by_length.setdefault(segment[2] - segment[0], []).append(segment)
    for same in by_length.values():
        for i in range(0, len(same), batch_size):
            rows = same[i:i + batch_size]
            x = torch.stack([data[start:b] for start, _, b in rows])                     # (B, length + 1)
            cache = model.new_cache(len(rows), T, window=T)
            costs = torch.cat([_bits(model, x[:, j:j + T + 1], cache=cache) for j in range(0, x.size(1) - 1, T)], 1)
            found |= {a: cost[a - 1 - start:] for (start, a, _), cost in zip(rows, costs)}
    return [found[a] for _, a, _ in segments]


def _segments(model, data):
    """Bits of all but the first byte, in pieces (T,): segment after segment, each going on from what the one before
    left."""
    T, memory = model.config.block_size, model.new_memory(1)
    for start in range(0, data.numel() - 1, T):
        yield _bits(model, data[None, start:start + T + 1], memory=memory)[0]


class Ensemble(torch.nn.Module):
    """One model under several sets of weights: the logits are the logarithm of their mean probability, float64."""

    def __init__(self, model, weights):
        super().__init__()
        self.model, self.weights, self.config = model, weights, model.config

    def forward(self, x):
        """x (B, T) int64 to (B, T, V)."""
        total = None
        for weights in self.weights:
            found = torch.func.functional_call(self.model, weights, (x,)).double().log_softmax(-1)
            total = found if total is None else torch.logaddexp(total, found)
        return total - math.log(len(self.weights))
