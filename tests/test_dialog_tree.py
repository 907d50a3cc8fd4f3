"""A tree of dialogs against a naive one in flat dictionaries: after every operation the same nodes, places, contents,
order of eviction, locks and counts, never over budget; no copy that fails loses anything; with real models a sliding
window, other types, inference mode, pages that went and came back bit for bit; what a tree refuses."""
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from model import Positions, TransformerConfig
from models.encoder_decoder import Encoder, EncoderDecoder, PrefixDecoder
from models.video import SpatioTemporal
from nanolab.cache import Cache, KVCache, RecurrentCache
from nanolab.dialog_tree import DialogTree
from variants import SMALL, build, close

pytestmark = pytest.mark.usefixtures("one_thread")


def nodes_of(tree):
    """{first tokens: node} of every node."""
    found, todo = {}, [((), tree._root)]
    for before, node in todo:
        for child in node.children.values():
            found[before + child.tokens] = child
            todo.append((before + child.tokens, child))
    return found


def held_by(node):
    return [t for _, tensors in node.parts for t in tensors]


def check(tree, locks=()):
    """What must hold after every operation. locks: the prefixes that are locked. Returns nodes_of(tree)."""
    nodes, held = nodes_of(tree), Counter()
    for end, node in nodes.items():
        assert node.end == len(end) and node.start == node.parent.end and node.tokens
        assert node.place == "device" or all(child.place == "host" for child in node.children.values())
        assert node.locks == sum(node in prefix.node.path for prefix in locks)
        assert node.place == "device" or not node.locks
        for (mark, tensors), cuts in zip(node.parts, tree._divisible):
            for t in tensors:
                assert t.untyped_storage().nbytes() == t.nbytes and not t.is_inference() and not t.requires_grad
                assert not cuts or node.start <= mark and t.size(1) == node.end - mark > 0
        assert node.bytes == sum(t.nbytes for t in held_by(node))
        held[node.place] += node.bytes
    for place, order in tree._held.items():
        turns = {node: i for i, node in enumerate(order)}
        assert set(turns) == {node for node in nodes.values() if node.place == place}
        assert all(turns[node] < turns.get(node.parent, len(turns)) for node in turns)  # children leave first
        assert tree._bytes[place] == held[place] <= (tree._limits[place] or held[place])
    stats = tree.stats()
    assert (tree.device_bytes, tree.host_bytes) == (held["device"], held["host"])
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
            assert k[0].tolist() == wanted and v[0].tolist() == [(mark * 9)[:2 + i] for mark in wanted]


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
    ends = {node: end for end, node in nodes.items()}
    for place, order in tree._held.items():
        here = (end for end in naive.ends if naive.ends[end] == place)
        assert [ends[node] for node in order] == sorted(here, key=naive.turns.get)
    stats = tree.stats()
    assert tree.peak_bytes == tree.most
    assert [stats[name] for name in ("drops", "evictions", "page_ins", "refused")] == [
        naive.dropped, naive.evicted, naive.paged_in, naive.refused]


STORMS = {  # layers, budget, host budget
    "keys": ([None], 500, 400), "keys, no host": ([None, None], 700, 0), "keys, endless host": ([None], 250, None),
    "keys, endless": ([None], None, None), "nothing": ([None], 0, 500), "states, little": (["state", "state"], 250, 90),
    "hybrid, little": ([None, "state"], 250, 130), "hybrid, no host": (["state", None], 500, 0),
    "windows, no host": ([3, 2], 400, 0), "window and keys": ([4, None], 700, 300),
    "all": ([None, 3, "state", 6], 900, 500)}


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

ONE = 16  # bytes of a position in the first layer of numbers


def numbers(*kinds, budget=None, host_budget=None):
    """A model of numbers, its tree, and a function that reads and puts a dialog."""
    model = Numbers(kinds or [None])
    tree = DialogTree(model, budget, host_budget)

    def put(word):
        cache, tokens = model.new_cache(1, len(word)), dialog(word)
        model.read(cache, tokens, 99)
        return tree.put(tokens, cache)
    return model, tree, put


def dialog(word):
    return tuple(map(int, word))


ACTS = {"put": "56", "put in a cut": "17", "cut": "1", "page out": "99999", "page in": "1234",
        "page in and put": "12347"}


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("what", ACTS)
def test_a_failed_copy_loses_nothing(what, n, monkeypatch):
    """Memory may be short at any copy: the error comes through, the tree stays whole, and goes on afterwards."""
    model, tree, put = numbers(None, "state", None, budget=400)
    for word in ("12", "1234", "5", *["99999"] * what.startswith("page in")):
        put(word)
    words, locks = [*nodes_of(tree)], [tree.lock(dialog("12"))] if what == "cut" else []
    whole, count = tree._copies, iter(range(1, 99))

    def copies(tensors, place):
        if next(count) == n:
            raise torch.OutOfMemoryError("no memory")
        return whole(tensors, place)

    def act():
        tree.lock(dialog(ACTS[what])).unlock() if what == "page in" else put(ACTS[what])
    monkeypatch.setattr(tree, "_copies", copies)
    try:
        act()
    except torch.OutOfMemoryError:
        assert {*nodes_of(tree)} in ({*words}, {*words, (1,)})
    monkeypatch.undo()
    check(tree, locks)
    for lock in locks:
        lock.unlock()
    for word in words:
        with tree.lock(word) as prefix:
            assert prefix.length == len(word)
            model.check_row(tree.take(prefix, 8), 0, word)
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


@pytest.mark.parametrize("kind", [bytes, list, tuple, torch.tensor, np.array, lambda t: [torch.tensor(i) for i in t]],
                         ids="bytes list tuple tensor array tensors".split())
def test_tokens_of_any_kind_are_the_same(kind):
    _, tree, put = numbers()
    put("1234")
    assert tree.match(kind([1, 2, 3, 9])) == 3
    with tree.lock(kind([1, 2, 3, 4])) as prefix:
        assert prefix.length == 4 and tree.put(kind([1, 2, 3, 4]), tree.take(prefix, 4)) == 4


def test_reset_waits_for_locks_and_nothing_is_a_prefix_too():
    _, tree, put = numbers("state", None)
    put("12"), put("1234")
    refs = [weakref.ref(t) for node in nodes_of(tree).values() for t in held_by(node)]
    with tree.lock(dialog("12")), pytest.raises(ValueError, match="still locked"):
        tree.reset()
    with tree.lock(()) as prefix:
        cache = tree.take([prefix, prefix], 4)
        assert prefix.length == 0 == cache.length == tree.put((), cache, 1)
        tree.reset()  # nothing is locked
    assert not any(ref() is not None for ref in refs)  # at once, without the garbage collector
    assert tree.match(dialog("12")) == 0 and not check(tree)
    put("123")
    assert tree.stats()["device_nodes"] == 1 == len(check(tree))


def test_stats():
    _, tree, put = numbers(budget=64 * ONE)
    put("1234"), put("1256")
    tree._move(nodes_of(tree)[dialog("1256")], "host")
    for word in ("1299", "1234", "7", "1234"):
        with tree.lock(dialog(word)) as prefix:
            tree.take([prefix, prefix], 9)
    assert tree.stats() == dict(
        lookups=4, hits=3, tokens_asked=13, tokens_reused=20, evictions=0, page_ins=0, drops=0, refused=0,
        device_bytes=4 * ONE, device_nodes=2, device_tokens=4, host_bytes=2 * ONE, host_nodes=1, host_tokens=2)


# --- Real models: what logits alone do not say (those of every variant: test_variants.py) ---

def said(n, seed=1):
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, tokens, **settings):
    """Logits (n, V) of a dialog without any cache."""
    return model(tokens[None], **settings)[0]


@torch.no_grad()
def turn(model, tree, tokens, max_length=96):
    """Reads a dialog through the tree: logits (new, V) of what was not held, and how much was."""
    with tree.lock(tokens) as prefix:
        cache = tree.take(prefix, max_length)
        assert cache.length == prefix.length and all(layer.length == prefix.length for layer in cache.layers)
        logits = model(tokens[None, prefix.length:], cache=cache)[0] if prefix.length < len(tokens) else None
        assert tree.put(tokens, cache) == len(tokens)
    return logits, prefix.length


@pytest.mark.parametrize("mixer", ["mla,full", "strided", "mamba,full"])
def test_sliding_caches(mixer):
    """Full attention limited to the last 6 positions, as for generation without end."""
    model = build(mixer)
    tree, base = DialogTree(model, budget=None, window=6), said(9)
    longer = torch.cat((base, said(40, seed=2)))
    early = torch.cat((base[:7], said(9, seed=3)))  # 7 positions: the last 5 are held, all that a window of 6 shows
    for tokens, known in ((base, 0), (longer, 9), (early, 0 if "mamba" in mixer else 7)):
        logits, n = turn(model, tree, tokens, 8)
        assert n == known
        close(logits, whole(model, tokens, window=6)[n:])
    assert turn(model, tree, longer)[1] == 49
    cache = model.new_cache(1, 8)
    model(base[None, :8], cache=cache)
    with pytest.raises(ValueError, match="not of this tree's model"):
        tree.put(base[:8], cache)


def test_what_was_put_in_inference_mode_serves_outside():
    model, tokens = build("mamba,window,full"), said(20)
    tree = DialogTree(model, budget=None)
    with torch.inference_mode():
        for n in (8, 20):
            turn(model, tree, tokens[:n], 40)
        locks = [tree.lock(tokens), tree.lock(tokens[:8])]
        ragged = tree.take(locks, 40)
    check(tree, locks)
    logits = model(torch.stack((tokens[:2], tokens[8:10])), cache=ragged)  # with gradients on
    assert logits.requires_grad and torch.allclose(logits[1], whole(model, tokens)[8:10], atol=1e-5)


@pytest.mark.parametrize("kind", ["autocast", "dtype"])
@pytest.mark.parametrize("mixer", ["compressive", "mamba,full"])
def test_bfloat16(mixer, kind):
    """The type that the tree was made with holds, whatever autocast says later."""
    model, tokens = build(mixer), said(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        tree = DialogTree(model, budget=None, dtype=torch.bfloat16 if kind == "dtype" else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        turn(model, tree, tokens[:9])
    assert torch.bfloat16 in {t.dtype for node in nodes_of(tree).values() for t in held_by(node)}
    logits, n = turn(model, tree, tokens)
    assert n == 9
    close(logits, whole(model, tokens)[9:], 0.1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mixer", ["mla", "window,full", "mingru,full", "compressive"])
def test_page_out_and_in_is_bit_identical(mixer, device):
    """And a copy: nothing of a page that left is in use, neither by the tree nor by a cache that was taken before."""
    model = build(mixer).to(device)
    dialogs = [torch.cat((said(12), said(8, seed=s))).to(device) for s in (2, 3, 4)]
    tree = DialogTree(model, budget=None)
    for tokens in (dialogs[0][:12], *dialogs):
        turn(model, tree, tokens)

    @torch.no_grad()
    def read(caches):
        return torch.stack([model(said(3, seed=i)[None].to(device), cache=cache) for i, cache in enumerate(caches)])

    def taken():
        for tokens in dialogs:
            with tree.lock(tokens) as prefix:
                assert prefix.length == 20
                check(tree, [prefix])
                yield tree.take(prefix, 40)
    before, nodes = read(taken()), nodes_of(tree)
    one = max(sum(node.bytes for node in child.path) for child in nodes.values())
    old, early = [t for node in nodes.values() for t in held_by(node)], [*taken()]
    bits = {end: [t.cpu().clone() for t in held_by(node)] for end, node in nodes.items()}
    assert tree.host_bytes == 0
    tree._limits["device"] = one  # as if the budget had been so from the start
    tree._make_room("device", 0)
    here = {t.data_ptr() for node in nodes_of(tree).values() for t in held_by(node)}
    left = [t for t in old if t.data_ptr() not in here]
    for t in left:
        t.fill_(torch.nan)
    assert left and torch.equal(read(early), before)
    assert torch.equal(read(taken()), before) and torch.equal(read(taken()), before)
    stats = tree.stats()
    assert stats["page_ins"] >= 4 and stats["evictions"] >= 6 and stats["drops"] == 0
    assert tree.host_bytes > 0 and tree.device_bytes <= one
    for end, node in check(tree).items():
        assert all(t.device.type == ("cpu" if node.place == "host" else device) for t in held_by(node))
        assert all(torch.equal(t.cpu(), old) for t, old in zip(held_by(node), bits[end], strict=True))


# --- What cannot be ---

def test_models_and_budgets_that_a_tree_refuses():
    config = TransformerConfig(**{**SMALL, "block_size": 32})

    class Other:
        def new_cache(self, *a, **how):
            return Cache([object()])
    for model, budgets, word in (
            (build(shorten=2), (1000,), "Pyramid.* a PyramidCache"), (Encoder(config), (1000,), "whole input"),
            (EncoderDecoder(config), (1000,), "EncoderDecoder.* a ContextCache"),
            (SpatioTemporal(config, 4), (1000,), "layer 0 of SpatioTemporal with its KVCache has not"),
            (Other(), (1000,), "layer 0 of Other with its object has not"), (build(), (-1,), r"(?<!_)budget is -1"),
            (build(), (5, -2), "host_budget is -2")):
        with pytest.raises(ValueError, match=rf"\A[^\n]*{word}[^\n]*\Z"):
            DialogTree(model, *budgets)


@torch.no_grad()
def test_calls_that_cannot_be():
    model, tokens = build("full"), said(8)
    tree, cache = DialogTree(model, None), model.new_cache(2, 16)
    model(tokens.expand(2, 8), cache=cache)
    lock = tree.lock(tokens)
    lock.unlock()
    far, gaps, saw = (model.new_cache(1, 16) for _ in range(3))
    model(tokens[None], positions=torch.arange(2, 10)[None], cache=far)
    model(tokens[None], positions=torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]), cache=gaps)
    model(tokens[None], cache=saw, prefix=4)
    prefixed = PrefixDecoder(TransformerConfig(**{**SMALL, "block_size": 32})).eval()
    saw_too = prefixed.new_cache(1, 8)
    prefixed.decode(tokens[None, 5:], tokens[None, :5], saw_too)
    others = (model.new_cache(1, 16, dtype=torch.float64), build("full", n_kv_head=2).new_cache(1, 16),
              model.new_cache(1, 16, window=8), build("mla").new_cache(1, 16),
              build("full", n_layer=2).new_cache(1, 16), build("mamba").new_cache(1, 16), [])
    cases = [(lambda: tree.put(tokens[:7], cache), "has read 8 positions, but there are 7 tokens"),
             (lambda: tree.put([*tokens, 1], cache), "has read 8 positions, but there are 9 tokens"),
             (lambda: tree.put(tokens, cache, 2), "no row 2 in a cache of 2"),
             (lambda: tree.put(tokens, cache, -1), "no row -1"),
             (lambda: tree.put([*tokens, 1, 1], far), "positions 2 ... 9 in layer 0"),
             (lambda: tree.put([*tokens, 1], gaps), "consecutive positions"),
             (lambda: tree.put(tokens, saw), "first 4 positions saw one another"),
             (lambda: DialogTree(prefixed, None).put(tokens, saw_too), "first 5 positions saw one another"),
             *((lambda other=other: tree.put([], other), "not of this tree's model") for other in others),
             (lambda: tree.put(tokens[None], cache), r"not \(1, 8\)"), (lambda: tree.take([], 8), "must be a prefix"),
             (lambda: tree.take(lock, 8), "not locked"), (lock.unlock, "not locked"),
             (lambda: DialogTree(model, None).take(tree.lock(tokens), 8), "not in this tree")]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()
    for wrong in ("text", [1.5]):
        with pytest.raises(TypeError):
            tree.match(wrong)
    assert not nodes_of(tree) and tree.put(tokens, cache, 1) == 8
    with tree.lock(tokens) as prefix, pytest.raises(ValueError, match="8 positions, which exceed max_length 7"):
        tree.take(prefix, 7)
    with pytest.raises(RuntimeError), tree.lock(tokens) as prefix:
        raise RuntimeError
    assert not prefix.locked and check(tree)
