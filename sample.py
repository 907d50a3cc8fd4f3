"""Text from any checkpoint of train_enwik8.py, or of train_facts.py's task text.

    python sample.py runs/train_enwik8/my_run
    python sample.py runs/train_enwik8/my_run/best.pt --prompt "The history of " --length 99 --temperature 1 --top_p 0.9
    python sample.py runs/train_enwik8/my_run --greedy
    python sample.py runs/train_enwik8/my_run --n_samples 16 --seed 7
    python sample.py runs/train_enwik8/my_run --log_cache                # what each layer's cache held

One sample is written byte by byte as it comes; several are computed as one batch and written when they are done. Same
seed, same text. Positions rope and none roll on past block_size with a sliding cache; learned absolute positions
cannot, so there the model starts again from the last half of its window. More: docs/runs.md.
"""
import flags

flags.answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import codecs
import math
import sys
from bisect import bisect_right
from contextlib import ExitStack
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch

from data import tokens as tokenizers
from data.tokenized import tokenizer_of
from experiment import UserError, command, find_checkpoint, load_checkpoint, override, resolve_device
from model import from_checkpoint

# --- What ---
checkpoint = None        # run directory or checkpoint file (may also be typed as a bare word)
weights = "raw"          # [raw, ema] which weights
prompt = "\n"            # what the text begins with
length = 500             # [>= 0, <= 1e9] bytes to generate, or ids of a tokenizer
n_samples = 1            # [>= 1, <= 100_000] samples, generated as one batch
seed = 1337              # [>= 0] same seed, same text
# --- How the next byte is drawn ---
temperature = 0.8        # [>= 0.0, <= 1e6] below 1 sharpens, above 1 flattens; 0 is greedy
top_k = None             # [none, >= 1] only the k most probable bytes
top_p = None             # [none, > 0.0, <= 1.0] only the most probable bytes that together reach this probability
typical_p = None         # [none, > 0.0, <= 1.0] only the bytes nearest to the expected surprise that reach this
min_p = None             # [none, >= 0.0, <= 1.0] only bytes at least this fraction as probable as the best
greedy = False           # always the most probable byte
# --- How it is computed ---
cache = True             # reuse what earlier bytes left; off: every byte reads the whole text again, for the same text
log_cache = False        # at the end, on stderr: what each layer's cache holds, and how often it was used
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Logits (B, V) -> float32 logits (B, V) over temperature, with everything that may not be drawn at -inf.

    The filters look at the distribution after the temperature, in the order top_k, top_p, typical_p, min_p, each at
    what the one before it left. top_k keeps exactly k bytes and top_p the shortest prefix of the sorted bytes whose sum
    reaches p; of equal ones the smaller byte value comes first. typical_p (Meister et al. 2022) does the same with the
    bytes sorted by how far their surprisal, -ln p, is from its mean, the entropy. min_p (Nguyen et al. 2024) keeps what
    is at least min_p times as probable as the best. The first byte always stays: the best, or the most typical, which
    may be another. temperature must be above 0.
    """
    logits = logits.float() / max(temperature, 1e-30)            # a smaller one would overflow, and change nothing
    if top_k is not None and top_p is None:                      # what the sort below would say, without sorting
        k = min(top_k, logits.size(-1))
        kth = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)                 # (B, 1)
        drop = logits < kth
        if drop.device.type != "cpu" or int(drop.sum()) != drop.numel() - k * len(drop):                # ties
            tie = logits == kth
            room = k - (logits > kth).sum(-1, keepdim=True)
            drop |= tie & (tie.cumsum(-1) > room)
        logits = logits.masked_fill(drop, -torch.inf)
    elif top_p is not None:
        values, order = logits.sort(dim=-1, descending=True, stable=True)                # (B, V)
        if top_k is not None:
            values[:, top_k:] = -torch.inf
        if top_p < 1:
            before = values.softmax(-1).cumsum(-1)[:, :-1]       # (B, V - 1), all that stands before a byte
            values[:, 1:].masked_fill_(before >= top_p, -torch.inf)
        logits = torch.empty_like(values).scatter_(1, order, values)
    if typical_p is not None and typical_p < 1:
        surprisal, p = -logits.log_softmax(-1), logits.softmax(-1)                       # (B, V)
        order = (surprisal - torch.special.entr(p).sum(-1, keepdim=True)).abs().argsort(dim=-1, stable=True)
        before = p.gather(1, order).cumsum(-1)[:, :-1]                                   # (B, V - 1)
        drop = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order[:, 1:], before >= typical_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits, generator, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Logits (B, V) -> next bytes (B,) int64. Temperature 0 takes the most probable and draws no random number.

    Inverse of the cumulated distribution at one uniform number per row, drawn on the generator's own device (CPU), so
    that a seed gives the same text everywhere, without multinomial's checks and waits. generator None: the global one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    u = torch.rand(logits.size(0), 1, generator=generator, device=generator.device if generator else None)
    if logits.size(0) == 1 and logits.device.type == "cpu" and not (top_p or min_p or typical_p):
        token = draw_of_few(logits[0], u.item(), temperature, top_k)
        if token is not None:
            return torch.full((1,), token)
    p = filter_logits(logits, temperature, top_k, top_p, min_p, typical_p).softmax(-1)
    reached = p.cumsum(-1)
    level = u.to(p.device) * reached[:, -1:]
    if p.device.type != "cpu":
        return first_past(reached, level, p)
    return torch.searchsorted(reached, level, right=True)[:, 0].clamp_(max=p.size(1) - 1)


def draw_of_few(logits, u, temperature, top_k, few=256):
    """The byte that `draw` takes at the uniform number u, an int, from logits (V,) on the CPU; None where more than
    `few` may be drawn, or equal ones stand at the edge of top_k.

    Python's own numbers: a dozen operations on a tensor of 256 cost a lone row more than this loop.
    """
    V = logits.numel()
    k = V if top_k is None else min(top_k, V)
    if k > few:
        return None
    if k == V:
        kept = list(enumerate(logits.tolist()))                  # (byte, logit), in the order of bytes
        best = max(logit for _, logit in kept)
    else:
        values, order = (t.tolist() for t in logits.topk(k + 1))
        if values[k - 1] == values[k]:
            return None
        best, kept = values[0], sorted(zip(order[:k], values))
    scale = 1 / max(temperature, 1e-30)
    reached = list(accumulate(math.exp((logit - best) * scale) for _, logit in kept))
    return kept[min(bisect_right(reached, u * reached[-1]), k - 1)][0]


def first_past(reached, level, p):
    """The first byte (B,) int64 that can be drawn, of p (B, V) above 0, and whose sum (B, V) is past the level (B, 1).

    What searchsorted says on a CPU. A GPU's sums may move by a rounding error where nothing is added.
    """
    return ((reached > level) & (p > 0)).byte().argmax(-1)


@torch.inference_mode()
def generate(model, prompts, length, generator=None, use_cache=True, report=None, **how):
    """Yields `length` times the next bytes (B,) int64 of all rows, from a cache; the same ones without.

    prompts: list of B byte strings, none empty, of any lengths (shorter ones are padded on the left, masked). Longer
    than block_size: only the last block_size bytes are read. how: temperature, top_k, top_p, min_p, typical_p. The
    model should be in eval mode. Learned positions: all rows start again at once, when the longest has filled the
    window. Other positions roll on; without a cache the whole text is read again for each byte, full attention limited
    to the last block_size positions. report: called with the cache at the end. Raises ValueError, when the first byte
    is asked for, if a prompt is empty.
    """
    T = model.config.block_size
    where = next(model.parameters()).device
    rolls = T > 1 and model.config.rolls
    rows = [list(prompt[-T:]) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("there must be a prompt, and each must have at least one byte")
    n_bytes = torch.tensor([len(row) for row in rows])           # bytes of each row so far
    columns = int(n_bytes.max())
    x = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=where)   # (B, columns), padded left
    recent, held = [x], columns                                  # what a restart would read, and its bytes
    positions = _left_padded(n_bytes, columns, where)
    window = T if rolls else None
    cache = model.new_cache(len(rows), T, window=window) if use_cache else None
    for step in range(length):
        if not rolls and held > T:                               # the window is full: start again from its last half
            if cache is not None:
                cache.reset()
            x = torch.cat(recent, 1)[:, -max(1, T // 2):]
            recent, held = [x], x.size(1)
            positions = _left_padded(n_bytes + step, x.size(1), where)
        if use_cache:
            logits = model(x, positions=positions, cache=cache)[:, -1]                   # (B, V)
        else:
            logits = model(torch.cat(recent, 1), positions=positions, window=window)[:, -1]
        token = draw(logits, generator, **how)
        yield token
        x = token[:, None]                                                               # (B, 1)
        if positions is not None:
            ahead = positions[:, -1:] + 1
            positions = ahead if use_cache else torch.cat((positions, ahead), 1)
        if not (rolls and use_cache):
            recent.append(x)
            held += 1
    if report and use_cache:
        report(cache)


def _left_padded(n_bytes, columns, device):
    """Positions (B, columns) of rows that end together, -1 where a row has no byte; None when every row is full."""
    if bool((n_bytes >= columns).all()):
        return None
    return (torch.arange(columns) - (columns - n_bytes.clamp(max=columns))[:, None]).clamp(min=-1).to(device)


# ---- Dialogs with a tool ----

class Reply(NamedTuple):
    """What `converse` wrote after one prompt.

    tokens: all ids after the prompt, injected ones, the calls' ids and the `end` included. injected: for each of them,
    whether it came from the tool. reason: "end", "stop", "call" (of a tool that is off, or one call too many) or
    "length". calls: [(ids of the call, ids of the answer)]. nats: for each of tokens its -ln p under the model, before
    temperature, filters and ban; 0 where injected, so that their sum is that of all that was drawn. text: what the
    model wrote after the last answer, decoded without the `end` and cut before a stop string; None without `decode`.
    """
    tokens: list
    injected: list
    reason: str
    calls: list
    nats: list
    text: str


class _Dialog:
    """A row of `converse`: its prompt and reply; the ids that the model has still to read, how many it has read, how
    many it wrote in all, and those that it wrote since its turn began."""

    def __init__(self, prompt):
        self.prompt, self.waiting, self.read = prompt, list(prompt), 0
        self.drawn, self.turn, self.reply = 0, [], Reply([], [], None, [], [], None)

    @property
    def live(self):
        """Whether it goes on."""
        return self.reply.reason is None


@torch.inference_mode()
def converse(model, prompts, max_new_tokens, end, tool=None, call=None, stop=(), decode=None, max_calls=1, prefix=False,
             tree=None, ban=(), generator=None, temperature=0.0, **how):
    """Goes on with B dialogs as one batch, with a tool that answers in mid-sequence: a list of B `Reply`.

    prompts: list of B lists of ids, none empty, of any lengths. A row ends with the id `end`, after max_new_tokens
    drawn ids (calls' ids and `end` count, injected ones do not), or once what it wrote in a turn contains one of the
    strings `stop` by `decode(ids) -> str`, over however many ids the string goes. A turn begins at the beginning and
    after each answer.

    When a row draws the id `call`, `tool(ids that it wrote in this turn) -> ids` gives what is injected after it, the
    answer and whatever ends it, and the row goes on from there. A call beyond max_calls, or where there is no tool,
    ends the row; so does one that max_new_tokens cuts off, by "length", unanswered. ban: ids that are never drawn:
    with `call` among them the model has to answer by itself.

    prefix: the positions of each prompt see one another; what comes after stays causal. tree: a cache.DialogTree of
    this model, without window: what it holds of the prompts is not read again, what prompts have in common is read
    once, and each dialog goes into it as far as the model has read it, which is up to the last id drawn. The replies
    are the same. temperature, how: as in `draw`; generator: on the CPU. At temperature 0 a row's reply does not depend
    on the other rows.

    The model should be in eval mode. All dialogs share one cache. What a row has to read, a drawn id or a call with its
    answer, goes in passes whose columns are at least half full, shorter rows padded on the left, rows with more to read
    going on in the next; layers that forget by age (`model.ordered`) get no padding, only as many columns as every row
    fills. Finished rows read on, unheeded, until they are half of the batch. Then, and when the cache's columns are
    used up, the others move into a new cache without padding. Dialogs may go past block_size, but for learned
    positions.

    Raises ValueError for an empty prompt, for arguments that do not go together, for a model with shorten above 1, with
    `prefix` for layers that read from left to right, and where a dialog passes the end of a learned position table.
    """
    rows = [_Dialog(list(prompt)) for prompt in prompts]
    if not rows or not all(row.prompt for row in rows):
        raise ValueError("there must be a prompt, and each must have at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if tool is not None and call is None:
        raise ValueError("a tool needs the id with which a call ends: call")
    if stop and (decode is None or isinstance(stop, str) or "" in stop):
        raise ValueError("stop is a list of strings, none empty, and needs decode")
    if prefix and tree is not None:
        raise ValueError("a tree keeps dialogs that read from left to right: it does not go with prefix")
    if model.config.shorten > 1:
        raise ValueError(f"shorten {model.config.shorten}: a pyramid takes rows that stand alike, as dialogs do not")
    banned = torch.tensor(list(ban), dtype=torch.int64, device=model.embed.device)
    room = max(len(row.prompt) for row in rows) + max_new_tokens
    if tree is None:
        cache = model.new_cache(len(rows), room)
    else:
        cache = _recall(model, tree, [tuple(row.prompt[:-1]) for row in rows], room)
        for row in rows:
            row.read, row.waiting = len(row.prompt) - 1, row.prompt[-1:]
    shown = torch.tensor([len(row.prompt) for row in rows], device=model.embed.device) if prefix else None
    batch, table = rows, model.config.block_size if model.config.learned_positions else math.inf

    def write(row, token, nats):
        """Takes an id that the row has drawn."""
        reply, reason = row.reply, None
        for held, new in ((reply.tokens, token), (reply.injected, False), (reply.nats, nats)):
            held.append(new)
        row.drawn += 1
        if token == end:
            reason = "end"
        elif token != call:
            row.turn.append(token)
            reason = "stop" if stop and _cut(decode(row.turn), stop) is not None else None
        elif tool is None or len(reply.calls) >= max_calls:
            reason = "call"
        if reason is None and row.drawn == max_new_tokens:
            reason = "length"
        if reason is not None:
            text = None if decode is None else decode(row.turn)
            row.reply = reply._replace(reason=reason, text=_cut(text, stop) if reason == "stop" else text)
            return
        row.waiting = [token]
        if token == call:
            answer = list(tool(list(row.turn)))
            reply.calls.append((row.turn, answer))
            row.turn, row.waiting = [], [token, *answer]
            for held, new in ((reply.tokens, answer), (reply.injected, [True] * len(answer)),
                              (reply.nats, [0.0] * len(answer))):
                held.extend(new)

    while live := [row for row in batch if row.live]:
        T = _columns([len(row.waiting) for row in live], 0.0 if not cache.length else 1.0 if model.ordered else 0.5)
        past = any(row.read + T > table for row in batch if not row.live)
        if 2 * len(live) <= len(batch) or cache.length + T > room or past:
            room = max(row.read for row in live) + T + max_new_tokens
            cache = _gather(model, [(cache, b, row.read) for b, row in enumerate(batch) if row.live], room)
            batch = live
        chunks = [row.waiting[:T] if row.live else [0] * T for row in batch]
        logits = _read(model, cache, chunks, [row.read for row in batch], shown)         # (B, V)
        shown = None
        for row, chunk in zip(batch, chunks):
            row.read += len(chunk)
            del row.waiting[:T]
        drawing = [b for b, row in enumerate(batch) if row.live and not row.waiting]
        if not drawing:
            continue
        logits = logits[drawing]
        tokens = draw(logits.index_fill(1, banned, -torch.inf), generator, temperature, **how)
        nats = logits.logsumexp(-1) - logits.gather(1, tokens[:, None])[:, 0]
        for b, token, surprise in zip(drawing, tokens.tolist(), nats.tolist()):
            row = batch[b]
            write(row, token, surprise)
            if tree is not None and not row.live:
                tree.put((row.prompt + row.reply.tokens)[:row.read], cache, b)
    return [row.reply for row in rows]


def _cut(text, stop):
    """The text before the first of the stop strings, or None where there is none."""
    found = [at for at in map(text.find, stop) if at >= 0]
    return text[:min(found)] if found else None


def _columns(waiting, full):
    """The most columns of a pass in which at least this part is not padding; waiting: what each row has to read."""
    T = max(waiting)
    while sum(min(n, T) for n in waiting) < full * T * len(waiting):
        T -= 1
    return T


def _read(model, cache, chunks, read, prefix=None):
    """The model reads a list of ids in each row, none empty, after read[b] positions: logits (B, V) after the last."""
    T = max(map(len, chunks))
    x = torch.tensor([[0] * (T - len(chunk)) + chunk for chunk in chunks], device=model.embed.device)    # (B, T)
    positions = None                                             # each row goes on where it ended
    if any(len(chunk) < T for chunk in chunks):
        positions = torch.tensor([[-1] * (T - len(chunk)) + list(range(at, at + len(chunk)))
                                  for chunk, at in zip(chunks, read)], device=model.embed.device)        # (B, T)
    h, _ = model.stream(x, model.place(x, positions, cache, prefix), cache)              # (B, T, C)
    return model.predict(h[:, -1:])[:, 0]


def _gather(model, rows, room):
    """A Cache of `room` columns with rows of other caches of the model, [(cache, row, positions read)], unpadded."""
    old = rows[0][0]
    dtype = next((layer.dtype for layer in old.layers if layer.kind != "state"), None)
    new = model.new_cache(len(rows), room, device=old.layers[0].device, dtype=dtype)
    for i, layer in enumerate(new.layers):
        parts = []
        for cache, b, read in rows:
            mark, tensors = cache.layers[i].row(b) if read else (None, ())
            if layer.divisible and layer.window is not None and tensors:                 # as many as rows of its length
                surplus = max(0, tensors[0].size(1) - layer.window + 1)
                mark, tensors = mark + surplus, tuple(t[:, surplus:] for t in tensors)
            parts.append((read, [(mark, tensors)] if tensors else []))
        layer.fill(parts)
    lengths = [read for *_, read in rows]
    new.length = max(lengths)
    if min(lengths) < new.length:
        new.last = torch.tensor(lengths, device=old.layers[0].device).unsqueeze(1) - 1   # (B, 1)
    return new


def _recall(model, tree, texts, room):
    """A Cache of `room` columns that has read each of the texts, tuples of ids; all go into the tree.

    What several of them begin with is read first, once, as long as the tree has room for it.
    """
    for level in _forks(texts):
        new = [text for text in level if tree.match(text) < len(text)]
        if new:
            _read_with(model, tree, new, room)
        if any(tree.match(text) < len(text) for text in new):
            break
    return _read_with(model, tree, texts, room)


def _forks(texts):
    """Where texts part: lists of beginnings that two or more have, a list after those that its own begin with."""
    texts = sorted(texts)
    common = {tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*neighbours)))
              for neighbours in zip(texts, texts[1:])}
    levels, above = [], []
    for text in sorted(common - {()}):
        while above and text[:len(above[-1])] != above[-1]:
            above.pop()
        if len(above) == len(levels):
            levels.append([])
        levels[len(above)].append(text)
        above.append(text)
    return levels


def _read_with(model, tree, texts, room):
    """A Cache that has read each of the texts: of each the tree's part, and the rest in passes of like lengths."""
    with ExitStack() as locked:
        prefixes = [locked.enter_context(tree.lock(text)) for text in texts]
        groups = {}                                              # padding at most doubles a row, or there is none
        for b, (text, prefix) in enumerate(zip(texts, prefixes)):
            rest = len(text) - prefix.length
            groups.setdefault(rest if model.ordered else rest.bit_length(), []).append(b)
        held = [prefix.length for prefix in prefixes]
        caches = []
        for group in groups.values():
            columns = max(held[b] for b in group) + max(len(texts[b]) - held[b] for b in group)
            columns = max(columns, room if len(groups) == 1 else 1)
            caches.append(tree.take([prefixes[b] for b in group], columns))
            if caches[-1].window is not None:
                raise ValueError("the tree's caches slide: make it without window")
    rows = [None] * len(texts)
    for group, cache in zip(groups.values(), caches):
        chunks = [list(texts[b][held[b]:]) for b in group]
        if all(chunks):
            _read(model, cache, chunks, [held[b] for b in group])
        for j, b in enumerate(group):
            if chunks[j]:
                tree.put(texts[b], cache, j)
            rows[b] = cache, j, len(texts[b])
    return caches[0] if len(groups) == 1 else _gather(model, rows, room)


def load_text_checkpoint(path):
    """load_checkpoint of a script that trains a Transformer over text or tokens. UserError: another script's."""
    loaded = load_checkpoint(path)
    if loaded["script"] not in ("train_enwik8", "train_facts"):
        raise UserError(f"{path} is a checkpoint of {loaded['script']}.py: here one of train_enwik8.py or "
                        "train_facts.py is needed")
    return loaded


@command
def main():
    settings = override(globals(), positional="checkpoint")
    if checkpoint is None:
        raise UserError("which run? python sample.py runs/train_enwik8/NAME")
    if greedy or temperature == 0:
        settings.refuse_idle(("temperature",) * greedy + ("top_k", "top_p", "typical_p", "min_p"),
                             "where the most probable byte is taken")
    if not prompt:
        raise UserError('--prompt "": must have at least one byte')
    if log_cache and not cache:
        raise UserError("--log_cache with --no-cache: there is no cache to log")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                 # a terminal may not know every character
    where, precision = resolve_device(device, dtype)
    path = find_checkpoint(checkpoint)
    loaded = load_text_checkpoint(path)
    try:
        model = from_checkpoint(loaded, weights).for_inference().eval().to(where)
    except ValueError as error:
        raise UserError(f"{path}: {error}")
    start = typed = prompt.encode(errors="surrogateescape")      # bytes that the shell passed on as they were
    written = bytes                                              # of ids
    if loaded["script"] == "train_facts":
        if loaded["settings"]["task"] != "text":
            raise UserError(f"{path} was trained on {loaded['settings']['task']}, not on text: ask it with evaluate.py")
        tokenizer = tokenizer_of(loaded["settings"])
        tokenizers.check(tokenizer, loaded["tokenizer"])
        start = tokenizers.encode_corpus(tokenizer, typed).tolist()

        def written(ids):
            return b"".join(tokenizer.decode_bytes([i]) if i < tokenizer.size else b"\n\n" for i in ids)
    generator = torch.Generator().manual_seed(seed)
    how = dict(temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               typical_p=typical_p)
    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
        report = (lambda held: print(*held.log(), sep="\n", file=sys.stderr)) if log_cache else None
        stream = generate(model, [start] * n_samples, length, generator, cache, report, **how)
        if n_samples == 1:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")                   # a character may take 4 bytes
            sys.stdout.write(decoder.decode(typed))
            for token in stream:
                sys.stdout.write(decoder.decode(written(token.tolist())))
                sys.stdout.flush()
            sys.stdout.write(decoder.decode(b"", final=True) + "\n")
        else:
            columns = torch.stack(list(stream), 1).tolist() if length else [[]] * n_samples
            for number, row in enumerate(columns, 1):
                print(f"--- sample {number} of {n_samples} ---\n{(typed + written(row)).decode(errors='replace')}")


if __name__ == "__main__":
    main()
