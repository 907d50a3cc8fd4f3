"""The true evaluation of a byte-level model: named protocols, every byte of the split scored exactly once.

    python evaluate.py runs/train_enwik8/my_run                              # block protocol on the validation split
    python evaluate.py runs/train_enwik8/my_run --split test --protocols block,stride:64
    python evaluate.py runs/train_enwik8/my_run/best.pt --weights ema --protocols cache
    python evaluate.py --watch runs/train_enwik8/my_run                      # every checkpoint as it lands
    python evaluate.py runs/train_enwik8/my_run --samples 10                 # of ivon's posterior

Protocols (T = block_size of the model):
    block      disjoint windows of T bytes; a byte sees 1 to T bytes before it. Cheap, and what most loops print.
    stride:S   windows overlap, only the last S bytes of each are scored: at least T - S bytes of context, but for the
               first T bytes of the split. stride:1 is what Al-Rfou et al. 2018 report.
    cache      one stream through a sliding KV cache: each layer sees the last T states, which have seen others before
               them. Not equal to recomputing a window. Impossible with learned absolute positions.
    memory     one stream in segments of T bytes: layers with a memory or a state go on from the segment before, layers
               of full attention see their own segment only; what training on streams sees.

A figure means nothing without its protocol and its byte count, so both are always printed. The first byte of a split
has no context and is charged 8 bits. The result does not depend on batch_size, but for the rounding of matrix products
(relative 1e-6 in float32).

--watch evaluates beside a training that goes on: each checkpoint that it finds new, in this process, into the run's
evaluation.jsonl, which the trainer never writes. Where the trainer does not evaluate (--eval_interval none), the best
one under the first protocol becomes best.pt; else that file is the trainer's. It ends when the run is done, or when no
trainer has been there for `patience` seconds. A checkpoint that is replaced before its turn is not evaluated:
--keep_last keeps more of them.
"""
import copy
import fcntl
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import text
from experiment import (UserError, command, draw_curves, find_checkpoint, is_running, load_checkpoint, override,
                        read_json, read_metrics, replacing, resolve_device)
from model import from_checkpoint

# --- What ---
checkpoint = None        # run directory or checkpoint file (may also be typed as a bare word)
watch = None             # a run's directory: evaluate each new checkpoint as it lands
patience = 60.0          # [>= 0.0] watch: seconds without a trainer before it ends
weights = "raw"          # [raw, ema] which weights
samples = 0              # [>= 0] ivon: mean probabilities of so many draws of its posterior; 0: the mean's weights
seed = 0                 # of these draws
split = "val"            # [train, val, test] which part of the data
protocols = "block"      # block, stride:S, cache, memory; several with commas
dataset = None           # [none] none: as in training; otherwise as train_enwik8.py --dataset
max_bytes = None         # [none, >= 1] none: as in training
# --- How ---
batch_size = 32          # [>= 1] windows at once; changes the speed, not the result
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast
resamples = 1000         # [>= 2] bootstrap resamples for the 95 % interval
chunk = 4096             # [>= 1] bytes that the bootstrap draws together

LN2 = math.log(2)


@dataclass
class Score:
    """What a protocol found: `bits` (one float64 per scored byte, in the order of the split), `protocol`, `seconds`."""
    bits: torch.Tensor
    protocol: str
    seconds: float

    @property
    def bytes(self):
        return self.bits.numel()

    @property
    def bpb(self):
        """Bits per byte: mean over all scored bytes."""
        return self.bits.sum().item() / self.bytes

    @property
    def loss(self):
        """Nats per byte."""
        return self.bpb * LN2

    def interval(self, resamples=1000, chunk=4096, seed=0):
        """95 % bootstrap interval of bpb over chunks of neighbouring bytes (single bytes are far from independent).

        The last chunk may be shorter, and weighs less. Returns (low, high); (nan, nan) where two whole chunks are not
        there. Its generator is its own.
        """
        if self.bytes < 2 * chunk:
            return math.nan, math.nan
        missing = -self.bytes % chunk                                                   # in the last chunk
        totals = F.pad(self.bits, (0, missing)).view(-1, chunk).sum(1)                  # (n,)
        sizes, n = torch.full_like(totals, chunk), len(totals)                          # (n,)
        sizes[-1] -= missing
        generator, means = torch.Generator().manual_seed(seed), []
        for _ in range(resamples):
            drawn = torch.randint(n, (n,), generator=generator)                          # (n,)
            means.append(totals[drawn].sum() / sizes[drawn].sum())
        return tuple(torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


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
def score(model, data, protocol="block", batch_size=32, windows=None):
    """Scores `data` (N,) uint8 under a protocol; leaves the model in the mode it was in and draws no random number.

    windows: only that many windows of the block protocol, evenly spread (a trainer's quick validation), or all whole
    ones if there are fewer; then the first byte of the split is not charged, and `protocol` says how many they were.
    Otherwise all N bytes are scored, each once. The caller decides on autocast. Raises UserError for an impossible
    protocol or a split of < 2 bytes, ValueError for `windows` < 1 or with another protocol than block.
    """
    T = model.config.block_size
    N = data.numel()
    kind, stride = parse_protocol(protocol, model.config, N)
    if N < 2:
        raise UserError(f"a split of {N} bytes cannot be scored")
    if windows is not None and (protocol != "block" or windows < 1):
        raise ValueError(f"windows is {windows} with protocol {protocol}: it must be at least 1, and needs block")
    was_training, began = model.training, time.perf_counter()
    model.eval()
    try:
        if kind == "memory":
            bits = _score_segments(model, data)
        elif kind == "cache":
            bits = _score_stream(model, data, batch_size)
        else:
            if windows is not None:
                windows = min(windows, max(1, (N - 1) // T))     # a split shorter than a window is one short window
                protocol = f"block, {windows} windows"
            bits = _score_windows(model, data, T, stride, batch_size, windows)
    finally:
        model.train(was_training)
    return Score(bits, protocol, time.perf_counter() - began)


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
    bits[0] = 8.0                                                # nothing before it: charged as a uniform guess
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
    horizon = config.horizon(T)
    warm = N if horizon is None else -(-horizon // unit) * unit
    length = 4 * warm
    bits, done = torch.empty(N, dtype=torch.float64), 1
    bits[0] = 8.0
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
    memory, bits = model.new_memory(1), [torch.full((1,), 8.0, dtype=torch.float64)]
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


def open_model(path, where):
    """(the checkpoint's dict, its model for inference on `where`): of the weights that were asked for, or an Ensemble
    of draws around them. UserError: no such weights, no posterior."""
    loaded = load_checkpoint(path)
    try:
        model = from_checkpoint(loaded, weights)
    except ValueError as error:
        raise UserError(f"{path}: {error}")
    found, generator, draws = loaded.get("posterior"), torch.Generator().manual_seed(seed), []
    if samples and not found:
        raise UserError(f"--samples: {path} has no posterior: it was not trained with optimizer ivon, or not at all")
    means = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(samples):
        for name, p in model.named_parameters():
            p.data = means[name] + found[name] * torch.randn(p.shape, generator=generator)
        one = copy.deepcopy(model).for_inference()
        draws.append({name: p.detach().to(where) for name, p in one.named_parameters()})
    model = model.for_inference().eval().to(where)
    return loaded, Ensemble(model, draws) if samples else model


def open_data(trained, where):
    """The split to be scored, (N,) uint8, and where it came from. UserError: there is none."""
    corpus = text.load(dataset or trained["dataset"], max_bytes or (None if dataset else trained["max_bytes"]), where)
    data = getattr(corpus, split)
    if data is None:
        raise UserError(f"{corpus.name} has no {split} split")
    return data, corpus.source


def follow(run, wanted, where, precision):
    """Evaluates the checkpoints of a run's directory (Path) as they land, until it is over."""
    began = time.monotonic()
    while not (run / "lock").exists():
        if time.monotonic() - began > patience:
            raise UserError(f"--watch {run}: no run is there, and none has begun in {patience:g} seconds")
        time.sleep(0.2)
    lock = open(run / "watch.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is watching {run}") from None
    for leftover in run.glob(".watch-*.pt"):                     # of killed processes
        leftover.unlink()
    log, mine = run / "evaluation.jsonl", run / f".watch-{os.getpid()}.pt"
    done, stamps, data, alive = read_metrics(log) if log.exists() else [], {}, None, time.monotonic()

    def write(lines, mode):
        with open(log, mode) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    print(f"watching {run}", flush=True)
    try:
        while True:
            found = None
            for path in sorted(run.glob("step_*.pt")) + [run / "last.pt"]:
                try:
                    stat = path.stat()
                    if stamps.get(path.name) == (stat.st_ino, stat.st_mtime_ns):
                        continue
                    shutil.copyfile(path, mine)                  # the trainer may replace or prune it meanwhile
                except FileNotFoundError:
                    continue
                stamps[path.name] = stat.st_ino, stat.st_mtime_ns
                found = path
                break
            if found:
                try:
                    loaded, model = open_model(mine, where)
                except UserError as error:                       # a person knows the file, not its copy
                    raise UserError(str(error).replace(str(mine), str(found))) from None
                step, newest = loaded["step"], found.name == "last.pt"
                if newest and any(line["step"] > step for line in done):             # the trainer went back
                    done = [line for line in done if line["step"] <= step]
                    with replacing(log) as file:
                        file.writelines((json.dumps(line) + "\n").encode() for line in done)
                if data is None:
                    data, _ = open_data(loaded["settings"], where)
                have = {(line["protocol"], line["weights"], line["split"]) for line in done if line["step"] == step}
                for name in wanted:
                    if (name, weights, split) in have:
                        continue
                    parse_protocol(name, model.config, data.numel())
                    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
                        result = score(model, data, name, batch_size)
                    kind = {"protocol": result.protocol, "weights": weights, "split": split}
                    line = {"step": step, **kind, "loss": result.loss, "bpb": result.bpb, "bytes": result.bytes,
                            "evaluation_seconds": result.seconds}
                    best = min((old["bpb"] for old in done if kind.items() <= old.items()), default=math.inf)
                    write([line], "a")
                    done.append(line)
                    note = ""
                    if name == wanted[0] and result.bpb < best and keeps_best(run):
                        os.replace(mine, run / "best.pt")
                        note = ", best.pt"
                        if name != wanted[-1]:
                            shutil.copyfile(run / "best.pt", mine)
                    print(f"step {step}: {split} {result.bpb:.4f} bits/byte ({result.protocol}, "
                          f"{result.bytes:,} bytes, {weights} weights{note})", flush=True)
                    draw_curves(run, run / "curves.png")
                alive = time.monotonic()
                continue
            if is_running(run):
                alive = time.monotonic()
            state = read_json(run / "summary.json").get("status")
            if not is_running(run) and state == "done" or time.monotonic() - alive > patience:
                print(f"{run}: {'done' if state == 'done' else f'no trainer for {patience:g} seconds ({state})'}")
                return
            time.sleep(0.2)
    finally:
        mine.unlink(missing_ok=True)
        lock.close()


def keeps_best(run):
    """Whether best.pt is the watcher's: the trainer does not evaluate."""
    return read_json(run / "params.json").get("settings", {}).get("eval_interval", 0) is None


@command
def main():
    override(globals(), positional="checkpoint")
    if (checkpoint is None) == (watch is None):
        raise UserError("which run? python evaluate.py runs/train_enwik8/NAME, or --watch runs/train_enwik8/NAME")
    where, precision = resolve_device(device, dtype)
    wanted = [name.strip() for name in protocols.split(",")]
    if samples and not all(name == "block" or name.startswith("stride:") for name in wanted):
        raise UserError("--samples goes with the protocols block and stride:S: each draw would need a cache of its own")
    if watch is not None:
        return follow(Path(watch), wanted, where, precision)
    path = find_checkpoint(checkpoint)
    loaded, model = open_model(path, where)
    data, source = open_data(loaded["settings"], where)
    for name in wanted:
        parse_protocol(name, model.config, data.numel())         # complain before the first long pass, not after it
    of = f"{samples} draws of the posterior" if samples else f"{weights} weights"
    print(f"{path}: step {loaded['step']}, {of}, {sum(p.numel() for p in model.parameters()):,} parameters; {source}")
    print(f"{'split':<6} {'protocol':<12} {'bits/byte':>10} {'95 % interval':>19} {'nats/byte':>10} "
          f"{'bytes scored':>13} {'seconds':>8}")
    for name in wanted:
        with torch.autocast(where.type, precision, enabled=precision != torch.float32):
            found = score(model, data, name, batch_size)
        low, high = found.interval(resamples, chunk)
        interval = "too few bytes" if found.bytes < 2 * chunk else f"{low:.4f} .. {high:.4f}"
        print(f"{split:<6} {found.protocol:<12} {found.bpb:>10.4f} {interval:>19} {found.loss:>10.4f} "
              f"{found.bytes:>13,} {found.seconds:>8.1f}")


if __name__ == "__main__":
    main()
