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
        if kind == "memory":
            bits = _score_segments(model, data)
        elif kind == "cache":
            bits = _score_stream(model, data, batch_size)
        else:
            if windows is not None:
                windows = min(windows, max(1, (N - 1) // T))     # a split shorter than a window is one short window
                protocol = f"block, {windows} windows"
            bits = _score_windows(model, data, T, stride, batch_size, windows)
    n_bytes = None
    if sizes is not None:
        n_bytes = round(int(sizes[data.long()].sum()) * len(bits) / N)
    return Score(bits, protocol, time.perf_counter() - began, n_bytes)


def _score_windows(model, data, T, stride, batch_size, windows):
    """Bits (N,) under windows that start at multiples of `stride`: each scores what no earlier one has scored.

    With `windows`, only the bits of that many whole windows, in order.
    """
    device, N = next(model.parameters()).device, data.numel()

    def cost(rows, first):
        """Bits of the targets of rows (B, <= T + 1), without the `first` ones, one after another."""
        rows = rows.to(device).long()
        return target_bits(model(rows[:, :-1])[:, first:], rows[:, 1 + first:]).cpu().flatten()

    def pieces():
        """All there is to score, as (rows, first), in the order of the split."""
        yield data[None, :T + 1], 0                              # nothing before it: all of it counts
        start = 0
        if N - stride > T:
            rows = data[stride:].unfold(0, T + 1, stride)        # (windows, T + 1), a view
            for i in range(0, len(rows), batch_size):
                yield rows[i:i + batch_size], T - stride
            start = len(rows) * stride                           # of the last whole window
        done = start + T + 1
        if done < N:                                             # the end of the split: one shorter window
            yield data[None, start + stride:], T - stride

    if windows is not None and N > T:
        rows = data.unfold(0, T + 1, T)                          # (all windows, T + 1), a view
        chosen = (torch.arange(windows) * len(rows) // windows).to(data.device)
        return torch.cat([cost(rows[batch], 0) for batch in chosen.split(batch_size)])
    bits, done = torch.empty(N, dtype=torch.float64), 1
    bits[0] = math.log2(model.config.vocab_size)                 # nothing before it: charged as a uniform guess
    for rows, first in pieces():
        found = cost(rows, first)
        bits[done:done + len(found)] = found
        done += len(found)
    assert done == N, f"{done} bytes scored, but the split has {N}"
    return bits[1:] if windows is not None else bits


def _score_stream(model, data, batch_size):
    """Bits (N,) of one stream through a cache in which full attention slides over T keys, computed in parallel.

    A state of the last layer depends on a limited number of bytes before it. Each segment starts that many bytes early
    and scores only its own bytes, so that the cut into segments changes nothing but speed. Cuts lie where blocks of all
    layers begin. A recurrent layer depends on everything before it: then there is one segment.
    """
    device = next(model.parameters()).device
    config = model.config
    T, N = config.block_size, data.numel()
    unit = math.lcm(T, config.sparse_stride) if "fixed" in config.mixers else T
    receptive_field = config.receptive_field(T)
    warm = N if receptive_field is None else -(-receptive_field // unit) * unit
    length = 4 * warm
    bits, done = torch.empty(N, dtype=torch.float64), 1
    bits[0] = math.log2(model.config.vocab_size)
    # Each reads from its start on, and scores the targets [a, b).
    segments = [(max(0, a - 1 - warm), a, min(a + length, N)) for a in range(1, N, length)]
    by_length = {}
    for segment in segments:
        by_length.setdefault(segment[2] - segment[0], []).append(segment)
    for same in by_length.values():
        for i in range(0, len(same), batch_size):
            rows = same[i:i + batch_size]
            x = torch.stack([data[start:b] for start, _, b in rows]).to(device).long()       # (B, length + 1)
            cache = model.new_cache(len(rows), T, window=T)
            costs = []
            for j in range(0, x.size(1) - 1, T):
                piece = x[:, j:j + T + 1]
                costs.append(target_bits(model(piece[:, :-1], cache=cache), piece[:, 1:]).cpu())
            cost = torch.cat(costs, 1)
            for row, (start, a, b) in enumerate(rows):
                bits[a:b] = cost[row, a - 1 - start:]
                done += b - a
    assert done == N, f"{done} bytes scored, but the split has {N}"
    return bits


def _score_segments(model, data):
    """Bits (N,) of one stream, segment after segment of T bytes, each going on from what the one before left."""
    device = next(model.parameters()).device
    T, N = model.config.block_size, data.numel()
    first = math.log2(model.config.vocab_size)
    memory, bits = model.new_memory(1), [torch.full((1,), first, dtype=torch.float64)]
    for start in range(0, N - 1, T):
        piece = data[None, start:start + T + 1].to(device).long()                        # (1, <= T + 1)
        bits.append(target_bits(model(piece[:, :-1], memory=memory), piece[:, 1:]).cpu()[0])
    bits = torch.cat(bits)
    assert len(bits) == N, f"{len(bits)} bytes scored, but the split has {N}"
    return bits


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
