"""Dialogs: `converse` goes on with many at once, a tool in mid-sequence; a DialogTree keeps what they have in common.

    replies = converse(model, prompts, 64, end=END, tool=lambda ids: encode(look_up(decode(ids))), call=CALL)
    tree = DialogTree(model, budget=1 << 30)             # for dialogs of several turns: what was read is not read again
    replies = converse(model, prompts, 64, end=END, tree=tree)
"""
import math
from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch

from nanolab.dialog_tree import DialogTree, common_length, standing
from nanolab.generate import draw


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
    many it wrote in all, and those that it wrote since its turn began. rules: arguments of `converse`."""

    def __init__(self, prompt, rules):
        self.prompt, self.rules, self.waiting, self.read = list(prompt), rules, list(prompt), 0
        self.drawn, self.turn, self.reply = 0, [], Reply([], [], None, [], [], None)

    @property
    def live(self):
        """Whether it goes on."""
        return self.reply.reason is None

    def write(self, token, nats):
        """Takes an id that was drawn at this many nats: the dialog ends, or goes on with what is to be read next."""
        rules = self.rules
        self._append([token], False, [nats])
        self.drawn += 1
        if token not in (rules.end, rules.call):
            self.turn.append(token)
        if reason := self._reason(token):
            text = rules.decode and rules.decode(self.turn)
            self.reply = self.reply._replace(reason=reason, text=_cut(text, rules.stop) if reason == "stop" else text)
            return
        self.waiting = [token]
        if token == rules.call:
            answer = list(rules.tool(list(self.turn)))
            self.reply.calls.append((self.turn, answer))
            self.turn, self.waiting = [], [token, *answer]
            self._append(answer, True, [0.0] * len(answer))

    def _append(self, tokens, injected, nats):
        self.reply.tokens.extend(tokens)
        self.reply.injected.extend([injected] * len(tokens))
        self.reply.nats.extend(nats)

    def _reason(self, token):
        """Why the dialog ends with this id, or None."""
        rules = self.rules
        if token == rules.end:
            return "end"
        if token == rules.call:
            if rules.tool is None or len(self.reply.calls) >= rules.max_calls:
                return "call"
        elif rules.stop and _cut(rules.decode(self.turn), rules.stop) is not None:
            return "stop"
        return "length" if self.drawn == rules.max_new_tokens else None


@torch.inference_mode()
def converse(model, prompts, max_new_tokens, end, tool=None, call=None, stop=(), decode=None, max_calls=1, prefix=False,
             tree=None, ban=(), generator=None, temperature=0.0, **how):
    """Goes on with B dialogs as one batch, with a tool that answers in mid-sequence: a list of B `Reply`.

    prompts: list of B lists of ids, none empty, of any lengths. A row ends with the id `end`, after max_new_tokens
    drawn ids (calls' ids and `end` count, injected ones do not), or once what it wrote in a turn contains one of the
    strings `stop` by `decode(ids) -> str`. A turn begins at the beginning and after each answer. When a row draws the
    id `call`, `tool(ids of this turn) -> ids` gives what is injected after it, and the row goes on from there; a call
    beyond max_calls, or without a tool, ends the row. ban: ids that are never drawn. prefix: the positions of each
    prompt see one another. temperature, how: as in `draw`, at 0 independent of the other rows; generator: on the CPU.

    tree: a DialogTree of this model, without window: what it holds of the prompts is not read again, and each dialog
    goes into it as far as the model has read it, up to the last id but one. None: a tree for this call alone, where
    prompts have much in common, which is then read once. False: none. The replies are the same.

    The model should be in eval mode. Dialogs may go past block_size, but for learned positions. Raises ValueError for
    an empty prompt, arguments that do not go together, a model with shorten above 1, `prefix` with layers that read
    from left to right, and where a dialog passes the end of a learned position table.
    """
    rules = SimpleNamespace(max_new_tokens=max_new_tokens, end=end, tool=tool, call=call, stop=stop, decode=decode,
                            max_calls=max_calls)
    rows = [_Dialog(prompt, rules) for prompt in prompts]
    if not rows or not all(row.prompt for row in rows):
        raise ValueError("there must be a prompt, and each must have at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if tool is not None and call is None:
        raise ValueError("a tool needs the id with which a call ends: call")
    if stop and (decode is None or isinstance(stop, str) or "" in stop):
        raise ValueError("stop is a list of strings, none empty, and needs decode")
    if prefix and tree:
        raise ValueError("a tree keeps dialogs that read from left to right: it does not go with prefix")
    if model.config.shorten > 1:
        raise ValueError(f"shorten {model.config.shorten}: a pyramid takes rows that stand alike, as dialogs do not")
    where, table = model.embed.device, model.config.block_size if model.config.learned_positions else math.inf
    banned = torch.tensor(list(ban), dtype=torch.int64, device=where)
    shown = torch.tensor([len(row.prompt) for row in rows], device=where) if prefix else None
    room, batch = max(len(row.prompt) for row in rows) + max_new_tokens, rows
    cache = _begin(model, rows, False if prefix else tree, room)
    while any(row.live for row in batch):
        cache, batch, room, T = _make_room(model, cache, batch, room, table, max_new_tokens)
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
            batch[b].write(token, surprise)
            if tree and not batch[b].live:
                tree.put((batch[b].prompt + batch[b].reply.tokens)[:batch[b].read], cache, b)
    return [row.reply for row in rows]


def _begin(model, rows, tree, room):
    """A Cache of `room` columns for the rows, which has read their prompts but for the last id where a tree is used."""
    texts = [tuple(row.prompt[:-1]) for row in rows]
    new = DialogTree(model, None) if tree is None and _is_worth_a_tree(texts) else None
    if not tree and not new:
        return model.new_cache(len(rows), room)
    for row in rows:
        row.read, row.waiting = len(row.prompt) - 1, row.prompt[-1:]
    return _recall(model, new or tree, texts, room, keep=not new)


def _make_room(model, cache, batch, room, table, more):
    """(cache, its rows, its columns, columns of the next pass): the same, or a new cache of those that go on.

    What a row has to read, a drawn id or a call with its answer, goes in passes whose columns are at least half full,
    shorter rows padded on the left, rows with more to read going on in the next; layers that forget by age
    (`model.ordered`) get no padding, only as many columns as every row fills. Finished rows read on, unheeded, until
    they are half of the batch. Then, and when the cache's columns or the `table` of positions are used up, the others
    move into a new cache without padding, which has room for `more` ids.
    """
    live = [(b, row) for b, row in enumerate(batch) if row.live]
    T = _columns([len(row.waiting) for _, row in live], 0.0 if not cache.length else 1.0 if model.ordered else 0.5)
    past = any(row.read + T > table for row in batch if not row.live)
    if 2 * len(live) <= len(batch) or cache.length + T > room or past:
        room = max(row.read for _, row in live) + T + more
        cache, batch = _gather(model, [(cache, b, row.read) for b, row in live], room), [row for _, row in live]
    return cache, batch, room, T


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


# ---- Prompts that have much in common ----

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
    return standing(new, [read for *_, read in rows])


def _is_worth_a_tree(texts):
    """Whether to read once what texts have in common saves more than it costs: at least half of all, 16 tokens of each
    on average, and a piece for no fewer than four of them (each costs a copy, and maybe a pass)."""
    texts = sorted(texts)
    common = [a[:common_length(a, b)] for a, b in pairwise(texts)]
    saved = sum(map(len, common))
    return 2 * saved >= sum(map(len, texts)) and saved >= 16 * len(texts) >= 64 * len(set(common))


def _recall(model, tree, texts, room, keep=True):
    """A Cache of `room` columns that has read each of the texts, tuples of ids; with keep, all go into the tree.

    What several of them begin with is read first, once, as long as the tree has room for it.
    """
    for level in _forks(texts):
        new = [text for text in level if tree.match(text) < len(text)]
        if new:
            _read_with(model, tree, new, room)
        if any(tree.match(text) < len(text) for text in new):
            break
    return _read_with(model, tree, texts, room, keep)


def _forks(texts):
    """Where texts part: lists of beginnings that two or more have, a list after those that its own begin with."""
    texts = sorted(texts)
    common = {a[:common_length(a, b)] for a, b in pairwise(texts)}
    levels, above = [], []
    for text in sorted(common - {()}):
        while above and text[:len(above[-1])] != above[-1]:
            above.pop()
        if len(above) == len(levels):
            levels.append([])
        levels[len(above)].append(text)
        above.append(text)
    return levels


def _read_with(model, tree, texts, room, keep=True):
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
            if keep and chunks[j]:
                tree.put(texts[b], cache, j)
            rows[b] = cache, j, len(texts[b])
    return caches[0] if len(groups) == 1 else _gather(model, rows, room)
