"""A tree of dialogs against a naive one in flat dictionaries: after every operation the same nodes, places, contents,
order of eviction, locks and counts, never over budget; no copy that fails loses anything; what `stats` counts."""
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from model import Positions
from nanolab.cache import Cache, KVCache, RecurrentCache
from nanolab.dialog_tree import DialogTree

pytestmark = pytest.mark.usefixtures("one_thread")


def nodes_of(tree):
    """{first tokens: node} of every node."""
    found, todo = {}, [((), tree._root)]
    for before, node in todo:
        for child in node.children.values():
            found[before + child.tokens] = child
            todo.append((before + child.tokens, child))
    return found


def check(tree, locks=()):
    """What must hold after every operation. locks: the prefixes that are locked. Returns nodes_of(tree)."""
    nodes = nodes_of(tree)
    held = Counter()
    for end, node in nodes.items():
        assert node.end == len(end) and node.start == node.parent.end and node.tokens
        assert node.parent.children[node.tokens[0]] is node
        assert node.place == "device" or all(child.place == "host" for child in node.children.values())
        assert node in tree._held[node.place]
        assert node.locks == sum(node in prefix.node.path for prefix in locks)
        assert node.place == "device" or not node.locks
        size = 0
        for (mark, tensors), cuts in zip(node.parts, tree._divisible):
            for t in tensors:
                assert t.untyped_storage().nbytes() == t.nbytes and not t.is_inference() and not t.requires_grad
                assert not cuts or node.start <= mark and t.size(1) == node.end - mark > 0
                size += t.nbytes
        assert node.bytes == size
        held[node.place] += size
    for place, order in tree._held.items():
        turns = {node: i for i, node in enumerate(order)}
        assert set(turns) == {node for node in nodes.values() if node.place == place}
        assert all(turns[node] < turns.get(node.parent, len(turns)) for node in turns)  # children leave first
        assert tree._bytes[place] == held[place] and held[place] <= (tree._limits[place] or held[place])
    assert (tree.device_bytes, tree.host_bytes) == (held["device"], held["host"])
    stats = tree.stats()
    assert stats["device_nodes"] + stats["host_nodes"] == len(nodes)
    assert stats["device_tokens"] + stats["host_tokens"] == sum(len(node.tokens) for node in nodes.values())
    return nodes


# --- A naive one in flat dictionaries, and caches of numbers that tell which tokens they stand for ---

def mark_of(tokens, layer):
    """What stands for the last of tokens in a layer: two numbers."""
    return [float(hash((layer, *tokens)) % 9973), float(hash((*tokens, layer)) % 9967)]


class Numbers:
    """In place of a model: `kinds` of its layers, None (keys), an int (keys under a window) or "state"."""

    def __init__(self, kinds):
        self.kinds = kinds

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        return Cache([RecurrentCache((torch.zeros(batch_size, 2, 5),)) if kind == "state" else
                      KVCache(batch_size, 1, 2, max_length, kind, value_dim=2 + i)
                      for i, kind in enumerate(self.kinds)])

    def read(self, cache, tokens, chunk):
        """Appends what is not read yet, `chunk` positions at a time."""
        while cache.length < len(tokens):
            ends = range(cache.length + 1, min(cache.length + chunk, len(tokens)) + 1)
            places = Positions(cache.length, len(ends))
            for i, layer in enumerate(cache.layers):
                k = torch.tensor([mark_of(tokens[:n], i) for n in ends])  # (T, 2)
                if self.kinds[i] == "state":
                    layer.update((k[-1:, :, None].repeat(1, 1, 5),), len(ends))
                else:
                    layer.update(k[None, None], k.repeat(1, 9)[None, None, :, :2 + i])
            cache.advance(places)

    def check_row(self, cache, row, tokens):
        """That a row of a cache holds what these tokens leave, and enough of it."""
        for i, layer in enumerate(cache.layers):
            first, tensors = layer.row(row)
            if self.kinds[i] == "state":
                wanted = torch.tensor(mark_of(tokens, i)) if tokens else torch.zeros(2)
                assert torch.equal(tensors[0], wanted[:, None].repeat(1, 5))
                continue
            k, v = tensors
            assert first == max(0, len(tokens) - (self.kinds[i] or 999) + 1) and first + k.size(1) == len(tokens)
            wanted = [mark_of(tokens[:n], i) for n in range(first + 1, len(tokens) + 1)]
            assert k[0].tolist() == wanted
            assert v[0].tolist() == [(mark * 9)[:2 + i] for mark in wanted]


class Naive:
    """What a DialogTree of Numbers must do, said for whole beginnings: each is a tuple of tokens.

    have: per layer, the beginnings whose last position is held (keys), or after which the state is. ends: where nodes
    end, with their place. turns: when they were last used, ends after what continues them. locked: those in use.
    """

    def __init__(self, kinds, budget, host_budget):
        self.kinds, self.limits = kinds, {"device": budget, "host": host_budget}
        self.have, self.ends, self.turns, self.locked, self.now = [set() for _ in kinds], {}, {}, Counter(), 0
        self.dropped = self.evicted = self.paged_in = self.refused = 0

    def span(self, end):
        """The beginnings that a node is made of."""
        start = max((len(e) for e in self.ends if len(e) < len(end) and end[:len(e)] == e), default=0)
        return [end[:n] for n in range(start + 1, len(end) + 1)]

    def size(self, i, n=1):
        return n * (40 if self.kinds[i] == "state" else 4 * (2 + 2 + i))

    def bytes(self, end):
        return sum(self.size(i, len(have & set(self.span(end)))) for i, have in enumerate(self.have))

    def path(self, end):
        return sorted((e for e in self.ends if end[:len(e)] == e), key=len)

    def usable(self, tokens):
        for kind, have in zip(self.kinds, self.have):
            low = {None: 0, "state": len(tokens) - 1}.get(kind, kind and kind != "state" and len(tokens) - kind + 1)
            if any(tokens[:n + 1] not in have for n in range(max(0, low), len(tokens))):
                return False
        return True

    def match(self, tokens):
        return next(n for n in range(len(tokens), -1, -1) if self.usable(tokens[:n]) and (
            n == 0 or any(e[:n] == tokens[:n] for e in self.ends)))

    def touch(self, end):
        for e in reversed(self.path(end)):
            self.now += 1
            self.turns[e] = self.now

    def cut(self, tokens):
        if tokens and tokens not in self.ends:
            self.ends[tokens] = self.ends[min((e for e in self.ends if e[:len(tokens)] == tokens), key=len)]
            self.touch(tokens)

    def room(self, place, size, pins):
        limit = self.limits[place]
        here = [e for e in self.ends if self.ends[e] == place]
        fixed = [e for e in here if any(pin[:len(e)] == e for pin in (*self.locked, pins))]
        used = sum(map(self.bytes, here))
        if limit is None or used + size <= limit:
            return True
        if sum(map(self.bytes, fixed)) + size > limit:
            return False
        victim = min((e for e in here if e not in fixed), key=self.turns.get)
        assert not any(self.ends[e] == place for e in self.ends if len(e) > len(victim) and e[:len(victim)] == victim)
        if place == "host":
            self.drop(victim, pins)
        elif not self.room("host", self.bytes(victim), pins):
            self.drop(victim, pins)
        elif victim in self.ends:
            self.ends[victim] = "host"
            self.now += 1
            self.turns[victim] = self.now
            self.evicted += 1
        return self.room(place, size, pins)

    def drop(self, end, pins):
        above = self.path(end)[:-1]
        for e in [e for e in self.ends if e[:len(end)] == end]:
            for have in self.have:
                have.difference_update(b for b in list(have) if b[:len(end)] == end or b in self.span(end))
            self.evicted += self.ends.pop(e) == "device"
            self.dropped += 1
        if above and not self.usable(above[-1]) and not any(
                other[:len(above[-1])] == above[-1] for other in (*self.locked, pins, *(set(self.ends) - {above[-1]}))):
            self.drop(above[-1], pins)

    def lock(self, tokens):
        wanted = tokens[:self.match(tokens)]
        self.cut(wanted)
        kept = ()
        for e in self.path(wanted):
            if self.ends[e] == "host":
                if not self.room("device", self.bytes(e), wanted):
                    self.refused += 1
                    break
                self.ends[e] = "device"
                self.paged_in += 1
            kept = e
        while not self.usable(kept):
            kept = max((e for e in self.ends if len(e) < len(kept) and kept[:len(e)] == e), key=len, default=())
        self.touch(wanted)
        self.locked[kept] += 1
        return kept

    def unlock(self, kept):
        self.locked[kept] -= 1
        self.locked += Counter()

    def put(self, tokens, firsts):
        """firsts: per layer the first position that the cache holds."""
        n = max((n for e in self.ends for n in range(len(tokens) + 1) if e[:n] == tokens[:n]), default=0)
        if n == len(tokens) and self.usable(tokens):
            if tokens:
                self.touch(min((e for e in self.ends if e[:n] == tokens), key=len))
            return n
        self.cut(tokens[:n])
        path, new = self.path(tokens[:n]), []
        for i, (kind, have, first) in enumerate(zip(self.kinds, self.have, firsts)):
            if kind == "state":
                new.append({tokens} - have)
                continue
            low = 0 if kind is None else max(0, len(tokens) - kind + 1)
            spans = [self.span(e) for e in path] + [[tokens[:m] for m in range(n + 1, len(tokens) + 1)]]
            gaps = [span for span in spans if any(b not in have and len(b) > low for b in span)]
            new.append({b for span in gaps for b in span if len(b) > first})
        away = [e for e in path if self.ends[e] == "host"]
        size = sum(self.size(i, len(b)) for i, b in enumerate(new)) + sum(map(self.bytes, away))
        if not self.room("device", size, tokens[:n]):
            self.refused += 1
            self.touch(tokens[:n])
            return self.match(tokens)
        for e in away:
            self.ends[e] = "device"
            self.paged_in += 1
        self.ends[tokens] = "device"
        for have, b in zip(self.have, new):
            have |= b
        self.touch(tokens)
        return len(tokens)


class Watched(DialogTree):
    """A tree that never has more alive on a device than its budget, but for one layer's part while a node is cut."""
    spare = most = 0

    def _copies(self, tensors, place):
        made = super()._copies(tensors, place)
        self.alive = [(where, ref) for where, ref in getattr(self, "alive", []) if ref() is not None]
        self.alive += [(place, weakref.ref(t)) for t in made]
        for where, limit in self._limits.items():
            spare = self.spare if where == place else 0
            assert limit is None or sum(ref().nbytes for at, ref in self.alive if at == where) <= limit + spare
        return made

    def _split(self, node, length):
        self.spare = max(sum(t.nbytes for t in tensors) for _, tensors in node.parts)
        first = super()._split(node, length)
        self.spare = 0
        return first

    def _enter(self, node):
        super()._enter(node)
        self.most = max(self.most, self.device_bytes)
        limit = self._limits[node.place]
        assert limit is None or self._bytes[node.place] <= limit


def assert_same(tree, naive, locks):
    """The same nodes, places, order and contents as the naive one has, and the same counts."""
    nodes = check(tree, [lock for lock, _ in locks])
    assert {end: node.place for end, node in nodes.items()} == naive.ends
    for i, kind in enumerate(naive.kinds):
        held = set()
        for end, node in nodes.items():
            mark, tensors = node.parts[i]
            ends = [len(end)] if kind == "state" else range(mark + 1, len(end) + 1)
            held |= {end[:n] for n in ends if tensors}
            for t in tensors[:1]:
                wanted = torch.tensor([mark_of(end[:n], i) for n in ends])
                assert torch.equal(t[:, 0], wanted[0]) if kind == "state" else torch.equal(t[0], wanted)
        assert held == naive.have[i]
    for place, order in tree._held.items():
        ends = {node: end for end, node in nodes.items()}
        assert [ends[node] for node in order] == sorted((e for e in naive.ends if naive.ends[e] == place),
                                                        key=naive.turns.get)
    stats = tree.stats()
    assert tree.peak_bytes == tree.most
    assert [stats[name] for name in ("drops", "evictions", "page_ins", "refused")] == [
        naive.dropped, naive.evicted, naive.paged_in, naive.refused]


STORMS = {  # layers, budget, host budget
    "keys": ([None], 500, 400), "keys, little": ([None, None], 300, 100), "keys, no host": ([None, None], 700, 0),
    "keys, endless host": ([None], 250, None), "keys, endless": ([None], None, None), "nothing": ([None], 0, 500),
    "states": (["state"], 280, 200), "states, little": (["state", "state"], 250, 90),
    "hybrid": (["state", None], 600, 300), "hybrid, little": ([None, "state"], 250, 130),
    "hybrid, no host": (["state", None], 500, 0), "window": ([4], 400, 200), "window, no host": ([3, 2], 400, 0),
    "window and keys": ([4, None], 700, 300), "all": ([None, 3, "state", 6], 900, 500),
}


@pytest.mark.parametrize("storm", STORMS)
def test_thousands_of_operations_equal_the_naive_one(storm):
    kinds, budget, host_budget = STORMS[storm]
    model, chance = Numbers(kinds), random.Random(storm)
    tree, naive = Watched(model, budget, host_budget), Naive(kinds, budget, host_budget)
    locks, said = [], [()]

    def dialog():
        old = chance.choice(said)
        old = old[:chance.randint(0, len(old))] if chance.random() < 0.5 else old
        new = (*old, *(chance.randrange(3) for _ in range(chance.choice((0, 1, 2, 4, 9)))))
        said.append(new[:16])
        del said[:-12]
        return said[-1]
    for _ in range(400 if budget is not None and host_budget is not None else 200):  # else too much is held
        what, tokens = chance.choice(("turn", "turn", "turn", "put", "match", "lock", "unlock", "batch")), dialog()
        if what == "match":
            before = tree.stats()
            assert tree.match(tokens) == naive.match(tokens) and tree.stats() == before
        if what == "unlock" or len(locks) > 3:
            for lock, kept in [locks.pop(chance.randrange(len(locks))) for _ in locks[:2]]:
                lock.unlock()
                naive.unlock(kept)
        if what in ("turn", "lock"):
            lock = tree.lock(tokens)
            locks.append((lock, naive.lock(tokens)))
            assert lock.length == len(locks[-1][1])
        if what == "turn":
            assert_same(tree, naive, locks)
            cache = tree.take(lock, 16)
            model.check_row(cache, 0, tokens[:lock.length])
            model.read(cache, tokens, chance.randint(1, 9))
        elif what == "put":
            cache = model.new_cache(1, 16)
            model.read(cache, tokens, chance.randint(1, 9))
        if what in ("turn", "put"):
            firsts = [getattr(layer, "_evicted", None) for layer in cache.layers]
            found = tree.put(tokens, cache)
            assert found == naive.put(tokens, firsts) == tree.match(tokens)
        if what == "turn" and chance.random() < 0.7:
            naive.unlock(locks.pop()[1])
            lock.unlock()
        if what == "batch" and locks:
            some = [chance.choice(locks) for _ in range(3)]
            cache = tree.take([lock for lock, _ in some], 16)
            for row, (_, kept) in enumerate(some):
                model.check_row(cache, row, kept)
                assert tree.put(kept, cache, row) == len(kept)
                naive.put(kept, [None] * len(kinds))
        assert_same(tree, naive, locks)
    stats = tree.stats()
    assert (stats["hits"] > 25) == (budget != 0)
    assert (stats["refused"] > 0) == (budget is not None)
    assert (stats["evictions"] > 20) == bool(budget) and (stats["page_ins"] > 5) == bool(budget and host_budget != 0)
    assert (stats["drops"] > 10) == bool(budget and host_budget is not None)


# --- One thing at a time ---

def numbers(*kinds, budget=None, host_budget=None):
    """A model of numbers, its tree, and a function that reads and puts a dialog."""
    model = Numbers(kinds or [None])
    tree = DialogTree(model, budget, host_budget)

    def put(tokens):
        cache = model.new_cache(1, len(tokens))
        model.read(cache, tokens, 99)
        return tree.put(tokens, cache)
    return model, tree, put


def places(tree):
    return {"".join(map(str, end)): node.place for end, node in nodes_of(tree).items()}


def dialog(word):
    return tuple(map(int, word))


ONE = 16  # bytes of a position in the first layer of numbers


def fail_at(tree, monkeypatch, n):
    """The n-th copy from now runs out of memory."""
    whole, count = tree._copies, iter(range(1, 99))

    def copies(tensors, place):
        if next(count) == n:
            raise torch.OutOfMemoryError("no memory")
        return whole(tensors, place)
    monkeypatch.setattr(tree, "_copies", copies)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("what", ["put", "put in a cut", "cut", "page out", "page in", "page in and put"])
def test_a_failed_copy_loses_nothing(what, n, monkeypatch):
    """Memory may be short at any copy: the error comes through, the tree stays whole, and goes on afterwards."""
    model, tree, put = numbers(None, "state", None, budget=400)
    put(dialog("12")), put(dialog("1234")), put(dialog("5"))
    if what.startswith("page in"):
        put(dialog("99999"))
    words, lock = list(places(tree)), tree.lock(dialog("12")) if what == "cut" else None
    act = {"put": lambda: put(dialog("56")), "put in a cut": lambda: put(dialog("17")), "cut": lambda: put(dialog("1")),
           "page out": lambda: put(dialog("99999")), "page in": lambda: tree.lock(dialog("1234")).unlock(),
           "page in and put": lambda: put(dialog("12347"))}[what]
    fail_at(tree, monkeypatch, n)
    try:
        act()
    except torch.OutOfMemoryError:
        assert set(places(tree)) in (set(words), set(words) | {"1"})
    monkeypatch.undo()
    check(tree, [lock] if lock else [])
    if lock:
        lock.unlock()
    for word in words:
        with tree.lock(dialog(word)) as prefix:
            assert prefix.length == len(word)
            model.check_row(tree.take(prefix, 8), 0, dialog(word))
    act()
    check(tree)


def test_a_thousand_turns_are_no_recursion():
    model, tree, _ = numbers(budget=1400 * ONE, host_budget=600 * ONE)
    cache, said = model.new_cache(1, 1100), ()
    for _ in range(1100):
        said += (1,)
        cache.layers[0].update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        cache.length += 1
        tree.put(said, cache)
    with tree.lock(said) as prefix:
        assert prefix.length == 1100 and tree.take(prefix, 1100).length == 1100
    for first in (2, 3):
        other = model.new_cache(1, 1400)
        other.layers[0].update(torch.zeros(1, 1, 1400, 2), torch.zeros(1, 1, 1400, 2))
        other.length = 1400
        assert tree.put((first,) * 1400, other) == 1400
    # Of the first dialog the host has 600 turns, its beginning; the second would not fit there, and is gone.
    assert tree.stats()["host_nodes"] == 600 == tree.match(said) and tree.stats()["drops"] == 501
    tree._drop(nodes_of(tree)[said[:1]])
    assert tree.stats()["drops"] == 1101 and len(check(tree)) == 1


@pytest.mark.parametrize("kind", [bytes, list, tuple, torch.tensor, np.array, lambda t: [torch.tensor(i) for i in t]])
def test_tokens_of_any_kind_are_the_same(kind):
    _, tree, put = numbers()
    put(dialog("1234"))
    assert tree.match(kind([1, 2, 3, 9])) == 3
    with tree.lock(kind([1, 2, 3, 4])) as prefix:
        assert prefix.length == 4 and tree.put(kind([1, 2, 3, 4]), tree.take(prefix, 4)) == 4


def test_nothing_is_a_prefix_too():
    model, tree, put = numbers("state", None)
    put(dialog("12"))
    with tree.lock(()) as prefix:
        assert prefix.length == 0
        cache = tree.take([prefix, prefix], 4)
        assert cache.length == 0 and tree.put((), cache, 1) == 0
        tree.reset()  # nothing is locked
    assert tree.stats()["hits"] == 0 and tree.stats()["lookups"] == 1 and not places(tree)


def test_reset_waits_for_locks():
    _, tree, put = numbers()
    put(dialog("12")), put(dialog("1234"))
    refs = [weakref.ref(t) for node in nodes_of(tree).values() for _, tensors in node.parts for t in tensors]
    with tree.lock(dialog("12")):
        with pytest.raises(ValueError, match="still locked"):
            tree.reset()
    tree.reset()
    assert not any(ref() is not None for ref in refs)  # at once, without the garbage collector
    assert tree.match(dialog("12")) == 0 and not check(tree)
    put(dialog("123"))
    assert tree.stats()["device_nodes"] == 1 == len(check(tree))


def test_stats():
    _, tree, put = numbers(budget=64 * ONE)
    put(dialog("1234")), put(dialog("1256"))
    tree._move(nodes_of(tree)[dialog("1256")], "host")
    for word in ("1299", "1234", "7", "1234"):
        with tree.lock(dialog(word)) as prefix:
            tree.take([prefix, prefix], 9)
    assert tree.stats() == dict(
        lookups=4, hits=3, tokens_asked=13, tokens_reused=20, evictions=0, page_ins=0, drops=0, refused=0,
        device_bytes=4 * ONE, device_nodes=2, device_tokens=4, host_bytes=2 * ONE, host_nodes=1, host_tokens=2)
