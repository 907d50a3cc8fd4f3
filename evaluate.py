"""The true evaluation: text under named protocols, every byte of the split scored once; facts by real generation.

    python evaluate.py runs/train_enwik8/my_run                              # block protocol on the validation split
    python evaluate.py runs/train_enwik8/my_run --split test --protocols block,stride:64
    python evaluate.py runs/train_enwik8/my_run/best.pt --weights ema --protocols cache
    python evaluate.py --watch runs/train_enwik8/my_run                      # every checkpoint as it lands
    python evaluate.py runs/train_enwik8/my_run --samples 10                 # of ivon's posterior
    python evaluate.py runs/train_facts/my_run --protocols tool              # the model asks, the database answers

Protocols (T = block_size of the model):
    block      disjoint windows of T bytes; a byte sees 1 to T bytes before it. Cheap, and what most loops print.
    stride:S   windows overlap, only the last S bytes of each are scored: at least T - S bytes of context, but for the
               first T bytes of the split. stride:1 is what Al-Rfou et al. 2018 report.
    cache      one stream through a sliding KV cache: each layer sees the last T states, which have seen others before
               them. Not equal to recomputing a window. Impossible with learned absolute positions.
    memory     one stream in segments of T bytes: layers with a memory or a state go on from the segment before, layers
               of full attention see their own segment only; what training on streams sees.

and of the people of train_facts.py, those that were trained on and those that were not:
    tool       greedy generation, the database answers the model's calls in mid-sequence
    no_tool    the same with calls forbidden: what the model knows by itself
    mqar       of task mqar: the answers at the queries of held-out rows

A figure means nothing without its protocol and its byte count, so both are always printed. The first byte of a split
has no context and is charged 8 bits (of a tokenizer's ids: the logarithm of how many there are). The result does not
depend on batch_size, but for the rounding of matrix products (relative 1e-6 in float32).

--watch evaluates beside a training that goes on: each checkpoint that it finds new, in this process, into the run's
evaluation.jsonl, which the trainer never writes. Where the trainer does not evaluate (--eval_interval none), the best
one under the first protocol becomes best.pt; else that file is the trainer's. It ends when the run is done, or when no
trainer has been there for `patience` seconds. A checkpoint that is replaced before its turn is not evaluated:
--keep_last keeps more of them. More: docs/runs.md.
"""
import flags

flags.answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import copy
import json
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import facts, mqar, text, tokens
from data.tokenized import open_text, tokenizer_of
from experiment import (Settings, UserError, command, draw_curves, find_checkpoint, is_running, lock_file, optional,
                        override, read_json, read_metrics, replacing, resolve_device)
from model import from_checkpoint
from sample import converse, load_text_checkpoint

# --- What ---
checkpoint = None        # run directory or checkpoint file (may also be typed as a bare word)
watch = None             # a run's directory: evaluate each new checkpoint as it lands
patience = 60.0          # [>= 0.0, <= 1e8] watch: seconds without a trainer before it ends
weights = "raw"          # [raw, ema] which weights
samples = 0              # [>= 0, <= 10_000] ivon: mean probabilities of so many draws of its posterior; 0: of the mean
seed = 0                 # [>= 0] of these draws
split = "val"            # [train, val, test] which part of the data
protocols = None         # block, stride:S, cache, memory; tool, no_tool; mqar; several with commas; none: the task's
dataset = None           # [none] none: as in training; otherwise as train_enwik8.py --dataset
max_bytes = None         # [none, >= 1] none: as in training
database = None          # [path] facts: the tool's database; none: as in training
prompts = None           # [none, >= 1] facts, mqar: how many, evenly spread; none: all
# --- How ---
batch_size = 32          # [>= 1, <= 1e6] windows, dialogs or rows at once; changes the speed, not the result
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast
resamples = 1000         # [>= 2, <= 1e6] bootstrap resamples for the 95 % interval
chunk = 4096             # [>= 1, <= 1e12] bytes that the bootstrap draws together

LN2 = math.log(2)
chosen = Settings()      # what was typed


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
    horizon = config.horizon(T)
    warm = N if horizon is None else -(-horizon // unit) * unit
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


# --- Facts: what train_facts.py's models know ---

@dataclass
class Recalled:
    """What one way of answering found on questions about one kind of people; counts, of all `prompts`."""
    protocol: str
    people: str
    prompts: int
    right: int
    called: int          # with at least one call
    right_calls: int     # whose only call is word for word the right one
    endless: int         # that came to no end
    by_attribute: dict   # {attribute: share that is right}
    seconds: float

    @property
    def accuracy(self):
        return self.right / self.prompts

    def line(self):
        """A line of metrics."""
        found = dict(protocol=self.protocol, people=self.people, accuracy=self.accuracy, prompts=self.prompts,
                     endless=self.endless / self.prompts, evaluation_seconds=self.seconds,
                     **{f"accuracy_{name}": share for name, share in self.by_attribute.items()})
        if self.protocol == "tool":
            found.update(calls=self.called / self.prompts, right_calls=self.right_calls / self.prompts)
        return found


@torch.no_grad()
def recall(model, people, vocabulary, database=None, unseen=False, form="short", prompts=None, batch_size=512,
           prefix=False):
    """Asks for facts and lets the model generate, greedily: Recalled.

    database: a facts.Database that answers calls (protocol "tool"); None: calls are forbidden, and so is the token that
    opens one, if no value has it: the model has to say it by itself ("no_tool"). unseen: of people that were held out
    of training. prompts: so many facts, evenly spread over people and attributes; None: all. Right is an
    answer whose whole text is the value, followed by END. A row may be 8 tokens longer than the longest right one, and
    makes one call; with learned positions no longer than the table lets any row become. prefix: as the model was
    trained. Leaves the model in the mode it was in.
    """
    n = people.unseen if unseen else people.n
    first, attributes = people.n if unseen else 0, people.attributes
    every = n * len(attributes)
    number = every if prompts is None else min(prompts, every)
    asked = [(people[first + i * n // number], attributes[i % len(attributes)]) for i in range(number)]
    began, was_training = time.perf_counter(), model.training
    dialogs = [facts.in_tool(person, attribute, form, i) for i, (person, attribute) in enumerate(asked)]
    rows = [[vocabulary.encode(segment.text) for segment in dialog] for dialog in dialogs]
    special = vocabulary.specials
    longest = max(len(row[3]) + (len(row[1]) if database else 0) for row in rows) + 2 + 8

    if model.config.learned_positions:
        told = max(len(vocabulary.encode(text)) for text in (
            facts.NO_RESULT, facts.NO_ATTRIBUTE, facts.NO_CALL, *(person.values[name] for person, name in asked)))
        room = model.config.block_size - max(len(row[0]) for row in rows)
        longest = min(longest, room - (told + 1 if database else 0))
        if longest < 1:
            raise UserError(f"block_size {model.config.block_size} leaves no room for an answer with learned positions")

    def tool(ids):
        return vocabulary.encode(database.answer(vocabulary.decode(ids))) + [special["ANSWER"]]

    never = [special["PAD"], special["ANSWER"]]
    if database is None:
        never.append(special["CALL"])
        opening = rows[0][1][0]                                  # the first token of a call
        if not any(opening in vocabulary.encode(text) for name in attributes for text in set(people.values[name])):
            never.append(opening)
    counts, found, order = Counter(), Counter(), sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            replies = converse(model, [rows[i][0] for i in batch], longest, special["END"],
                               tool=tool if database else None, call=special["CALL"] if database else None,
                               ban=never, prefix=prefix)
            for i, reply in zip(batch, replies):
                person, attribute = asked[i]
                own = [token for token, given in zip(reply.tokens, reply.injected) if not given]
                said = own[len(reply.calls[-1][0]) + 1:] if reply.calls else own         # after the call and its end
                ended = reply.reason == "end"
                right = ended and vocabulary.decode(said[:-1] if said[-1:] == [special["END"]] else said) == \
                    person.values[attribute]
                found[attribute] += right
                counts.update(right=right, called=bool(reply.calls), endless=not ended,
                              right_calls=len(reply.calls) == 1 and reply.calls[0][0] == rows[i][1])
    finally:
        model.train(was_training)
    asked_of = Counter(attribute for _, attribute in asked)
    return Recalled("tool" if database else "no_tool", "unseen" if unseen else "trained", len(asked), counts["right"],
                    counts["called"], counts["right_calls"], counts["endless"],
                    {name: found[name] / number for name, number in asked_of.items()}, time.perf_counter() - began)


@torch.no_grad()
def bits_of(model, people, vocabulary, form="short", batch_size=512, prefix=False):
    """Bits about the people to train on that a model holds in its weights, a float: see facts.bits_stored.

    The nats are those of a value's own tokens, teacher-forced after the question; END, and a city of work, which
    follows from the employer, are left out.
    """
    attributes = [name for name in people.attributes if name != "work_city"]
    dialogs = [facts.in_weight(people[i], name, form, i) for i in range(people.n) for name in attributes]
    ids, mask = facts.rows(dialogs, vocabulary)
    asked = mask.byte().argmax(1)                                                        # (N,) tokens of the question
    mask &= ids < vocabulary.n_text                                                      # without END
    device, nats, was_training = next(model.parameters()).device, [], model.training
    model.eval()
    try:
        for x, wanted, n in zip(ids.split(batch_size), mask.split(batch_size), asked.split(batch_size)):
            x, wanted = x.to(device), wanted[:, 1:].to(device)
            logits = model(x[:, :-1], prefix=n.to(device) if prefix else None)
            cost = target_bits(logits, x[:, 1:]) * LN2                                   # (B, T - 1)
            nats.append(cost.masked_fill(~wanted, 0).sum(1).cpu())
    finally:
        model.train(was_training)
    return facts.bits_stored(torch.cat(nats).view(people.n, -1).sum(1), people.bits)


@torch.no_grad()
def answered(model, x, y, batch_size=512):
    """Accuracy and loss at the labelled places of rows x (N, T), labels y (N, T), -1 where there is none: a line of
    metrics. Leaves the model in the mode it was in."""
    right, nats, was_training = 0, 0.0, model.training
    model.eval()
    try:
        for a, b in zip(x.split(batch_size), y.split(batch_size)):
            here = b >= 0
            h, _ = model.stream(a, model.place(a, None))                                 # (B, T, C)
            logits = model.predict(h[here][None])[0]                                     # (labels, V)
            right += int((logits.argmax(-1) == b[here]).sum())
            nats += F.cross_entropy(logits.float(), b[here], reduction="sum").item()
    finally:
        model.train(was_training)
    prompts = int((y >= 0).sum())
    return dict(protocol="mqar", accuracy=right / prompts, loss=nats / prompts, prompts=prompts)


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
    loaded = load_text_checkpoint(path)
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


class OfText:
    """What can be asked of a model of text, over bytes or a tokenizer's ids. `source` says where the text came from.

    UserError: there is no such split; another tokenizer than the checkpoint's.
    """
    idle = ("database", "prompts")
    header = (f"{'split':<6} {'protocol':<12} {'bits/byte':>10} {'95 % interval':>19} {'nats/target':>11} "
              f"{'bytes scored':>13} {'seconds':>8}")

    def __init__(self, loaded, where):
        trained = {**loaded["settings"], **{name: loaded["settings"][name] for name in ("dataset", "max_bytes")}}
        if dataset:
            trained.update(dataset=dataset, max_bytes=None)
        if max_bytes:
            trained.update(max_bytes=max_bytes)
        self.sizes = None
        if loaded["script"] == "train_facts":
            tokenizer = tokenizer_of(loaded["settings"])         # also where another text is scored
            tokens.check(tokenizer, loaded["tokenizer"])
            opened = open_text(trained, tokenizer)
            self.data, self.source = getattr(opened, split), opened.source
            self.sizes = opened.sizes.to(where)
        else:
            corpus = text.load(trained["dataset"], trained["max_bytes"], where)
            self.data, self.source = getattr(corpus, split), corpus.source
        if self.data is None:
            raise UserError(f"{trained['dataset']} has no {split} split")
        self.data, self.names = self.data.to(where), ("block",)

    def check(self, name, config):
        """UserError where the model cannot be asked so."""
        parse_protocol(name, config, self.data.numel())

    def measure(self, model, name):
        """[(line of metrics, row of the table, what to say, its bracket open)]."""
        found = score(model, self.data, name, batch_size, sizes=self.sizes)
        line = dict(protocol=found.protocol, loss=found.loss, bpb=found.bpb, bytes=found.bytes,
                    evaluation_seconds=found.seconds)
        low, high = found.interval(resamples, chunk)
        interval = "too few bytes" if math.isnan(low) else f"{low:.4f} .. {high:.4f}"
        return [(line, f"{split:<6} {found.protocol:<12} {found.bpb:>10.4f} {interval:>19} "
                 f"{found.loss:>11.4f} {found.bytes:>13,} {found.seconds:>8.1f}",
                 f"{split} {found.bpb:.4f} bits/byte ({found.protocol}, {found.bytes:,} bytes")]


class OfFacts:
    """What can be asked of a model of people.

    UserError: as facts.open_facts; another tokenizer than the checkpoint's.
    """
    idle = ("split", "dataset", "max_bytes")
    header = (f"{'people':<8} {'protocol':<9} {'accuracy':>9} {'called':>7} {'right calls':>12} {'no end':>7} "
              f"{'prompts':>8} {'seconds':>8}")

    def __init__(self, loaded, where):
        self.settings = loaded["settings"]
        self.settings["database"] = database or self.settings["database"]
        self.people, self.vocabulary, self.database = facts.open_facts(self.settings)
        tokens.check(self.vocabulary, loaded["tokenizer"])
        self.source = self.people.describe()
        self.names = ("no_tool",) if self.settings["task"] == "in_weight" else ("tool", "no_tool")

    def check(self, name, config):
        """UserError where the model cannot be asked so."""
        if name not in self.names:
            raise UserError(f"protocol {name!r}: a model of task {self.settings['task']} can be asked by "
                            f"{' and '.join(self.names)}")

    def measure(self, model, name):
        """As OfText.measure: one each for people that were trained on and for unseen ones."""
        for unseen in (False, True) if self.people.unseen else (False,):
            found = recall(model, self.people, self.vocabulary, self.database if name == "tool" else None, unseen,
                           self.settings["form"], prompts, batch_size, self.settings["prefix"])
            line = found.line()
            rates = [f"{line[key]:.4f}" if key in line else "" for key in ("calls", "right_calls")]
            yield (line, f"{found.people:<8} {name:<9} {found.accuracy:>9.4f} {rates[0]:>7} {rates[1]:>12} "
                   f"{line['endless']:>7.4f} {found.prompts:>8,} {found.seconds:>8.1f}",
                   f"{found.people} people {found.accuracy:.4f} of {found.prompts:,} answers right ({name}")


class OfRecall:
    """What can be asked of a model of associative recall."""
    idle = (*OfFacts.idle, "database")
    header = f"{'protocol':<9} {'accuracy':>9} {'nats/query':>11} {'queries':>8}"

    def __init__(self, loaded, where):
        s = loaded["settings"]
        _, (x, y) = mqar.split(1, s["n_test_rows"], s["block_size"], s["pairs"], s["mqar_vocab"], s["data_seed"],
                               s["random_non_queries"], s["mqar_alpha"])
        self.x, self.y, self.names = x[:prompts].to(where), y[:prompts].to(where), ("mqar",)
        self.source = f"mqar: {len(self.x):,} held-out rows of {s['block_size']} tokens with {s['pairs']} pairs"

    def check(self, name, config):
        """UserError where the model cannot be asked so."""
        if name != "mqar":
            raise UserError(f"protocol {name!r}: a model of task mqar can be asked by mqar")

    def measure(self, model, name):
        """As OfText.measure."""
        line = answered(model, self.x, self.y, batch_size)
        return [(line, f"{name:<9} {line['accuracy']:>9.4f} {line['loss']:>11.4f} {line['prompts']:>8,}",
                 f"accuracy {line['accuracy']:.4f} of {line['prompts']:,} queries ({name}")]


def open_task(loaded, where):
    """What the checkpoint's model can be asked, and the data for it: one of the three above."""
    task = loaded["settings"].get("task", "text") if loaded["script"] == "train_facts" else "text"
    kind = {"text": OfText, "mqar": OfRecall}.get(task, OfFacts)
    chosen.refuse_idle(kind.idle, f"on a model of task {task}")
    return kind(loaded, where)


def follow(run, where, precision):
    """Evaluates the checkpoints of a run's directory (Path) as they land, until it is over."""
    began = time.monotonic()
    if run.exists() and not run.is_dir():
        raise UserError(f"--watch {run}: the directory of a run is needed, and this is a file")
    while not (run / "lock").exists():
        if time.monotonic() - began > patience:
            raise UserError(f"--watch {run}: no run is there, and none has begun in {patience:g} seconds")
        time.sleep(0.2)
    lock = open(run / "watch.lock", "w")
    try:
        lock_file(lock)
    except OSError:
        raise UserError(f"another process is watching {run}") from None
    for leftover in run.glob(".watch-*.pt"):                     # of killed processes
        leftover.unlink()
    log, mine = run / "evaluation.jsonl", run / f".watch-{os.getpid()}.pt"
    done, stamps, asked, alive = read_metrics(log) if log.exists() else [], {}, None, time.monotonic()

    def write(lines, mode):
        with open(log, mode) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    if log.exists():                                             # without what a kill has cut off
        with replacing(log) as whole:
            whole.writelines((json.dumps(line) + "\n").encode() for line in done)
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
                if asked is None:
                    asked = open_task(loaded, where)
                    wanted = asked_for(asked, model.config)
                have = {(line["protocol"], line["weights"], line["split"]) for line in done if line["step"] == step}
                for name in wanted:
                    if (name, weights, split) in have:
                        continue
                    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
                        results = list(asked.measure(model, name))
                    new = [{"step": step, **line, "weights": weights, "split": split} for line, _, _ in results]
                    kind = {key: value for key, value in new[0].items() if isinstance(value, str)}
                    best = min((cost_of(old) for old in done if kind.items() <= old.items()), default=math.inf)
                    write(new, "a")
                    done += new
                    note = ""
                    if name == wanted[0] and cost_of(new[0]) < best and keeps_best(run):
                        os.replace(mine, run / "best.pt")
                        note = ", best.pt"
                    for _, _, said in results:
                        print(f"step {step}: {said}, {weights} weights{note})", flush=True)
                    with optional("curves.png is"):
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


def asked_for(asked, config):
    """The protocols that --protocols names, a list, checked; without it, all that the task itself is about."""
    wanted = [name.strip() for name in protocols.split(",")] if protocols else list(asked.names)
    for name in wanted:
        asked.check(name, config)
    return wanted


def cost_of(line):
    """Of a line of metrics, what a better model has less of."""
    return line["bpb"] if "bpb" in line else 1 - line["accuracy"]


def keeps_best(run):
    """Whether best.pt is the watcher's: the trainer does not evaluate."""
    return read_json(run / "params.json").get("settings", {}).get("eval_interval", 0) is None


@command
def main():
    global chosen
    chosen = override(globals(), positional="checkpoint")
    if (checkpoint is None) == (watch is None):
        raise UserError("which run? python evaluate.py runs/train_enwik8/NAME, or --watch runs/train_enwik8/NAME")
    if watch is None:
        chosen.refuse_idle(("patience",), "without --watch")
    if not samples:
        chosen.refuse_idle(("seed",), "without --samples")
    where, precision = resolve_device(device, dtype)
    if samples and not all(name == "block" or name.startswith("stride:") for name in (protocols or "block").split(",")):
        raise UserError("--samples goes with the protocols block and stride:S: each draw would need a cache of its own")
    if watch is not None:
        return follow(Path(watch), where, precision)
    path = find_checkpoint(checkpoint)
    loaded, model = open_model(path, where)
    asked = open_task(loaded, where)
    wanted = asked_for(asked, model.config)                      # complain before the first long pass, not after it
    of = f"{samples} draws of the posterior" if samples else f"{weights} weights"
    print(f"{path}: step {loaded['step']}, {of}, {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{asked.source}\n{asked.header}")
    for name in wanted:
        with torch.autocast(where.type, precision, enabled=precision != torch.float32):
            for _, row, _ in asked.measure(model, name):
                print(row)


if __name__ == "__main__":
    main()
