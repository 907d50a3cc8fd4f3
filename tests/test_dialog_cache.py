"""DialogTree against no cache at all, and against a naive one in flat dictionaries. About 10 s on two cores."""
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

import choices
from model import MIXERS, Positions, Transformer, TransformerConfig, build_model
from models.encoder_decoder import Encoder, EncoderDecoder, PrefixDecoder
from models.video import SpatioTemporal
from nanolab.cache import Cache, KVCache, RecurrentCache
from nanolab.dialog_tree import DialogTree

PATTERNS = [*MIXERS, "mamba,mamba,full", "window,full", "xl,mingru", "mla,diff", "compressive,window"]
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, init="xavier", positions="rope", window=6, sparse_stride=4,
             sparse_summary=1, memory_length=8, compressed_length=4, compression_rate=2)
STATES = ("mamba", "mingru", "compressive")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mixer="full", seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**SMALL, "mixer": mixer, **settings})).eval()


def text(n, seed=1):
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


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


# --- Logits equal those without a cache ---

CASES = [*((mixer, {}) for mixer in PATTERNS), ("full", dict(n_kv_head=1)), ("window,full", dict(n_kv_head=2)),
         ("strided,fixed", dict(n_kv_head=2)), ("full", dict(positions="learned", block_size=96)),
         ("full,window", dict(positions="alibi")), ("xl", dict(positions="relative")), ("diff", dict(qk_norm=True)),
         ("compressive", dict(positions="relative", n_kv_head=2)), ("full", dict(ff="moe", n_expert=4))]


@pytest.mark.parametrize("mixer, settings", CASES, ids=str)
def test_forked_dialogs_equal_no_cache(mixer, settings):
    model = build(mixer, **settings)
    tree = DialogTree(model, budget=None)
    base = text(20)
    near = torch.cat((base, text(9, seed=2)))
    dialogs = [near, torch.cat((base, text(5, seed=3))), torch.cat((base, text(30, seed=4))),
               torch.cat((near, text(3, seed=5))), text(7, seed=6)]
    close(turn(model, tree, base)[0], whole(model, base))
    for dialog, wanted in zip(dialogs, (20, 20, 20, 29, 0)):
        logits, n = turn(model, tree, dialog)
        assert n == wanted
        close(logits, whole(model, dialog)[n:])
    assert [turn(model, tree, dialog)[1] for dialog in dialogs] == list(map(len, dialogs))
    branch = torch.cat((near[:25], text(4, seed=7)))  # inside a node
    logits, n = turn(model, tree, branch)
    # A window of 6 in a ring of 12 has thrown away what stood before 23 when 29 positions were put.
    assert n == (20 if {*mixer.split(",")} & {*STATES, "window"} else 25)
    close(logits, whole(model, branch)[n:])
    assert turn(model, tree, branch) == (None, 29)
    check(tree)


@pytest.mark.parametrize("mixer", PATTERNS)
def test_a_batch_of_dialogs_goes_on_together(mixer):
    """Rows of many lengths, one of them empty, one twice: ragged, then all put, and found again."""
    model = build(mixer)
    tree, dialogs = DialogTree(model, budget=None), [text(n, seed=n) for n in (29, 4, 13, 0, 29)]
    for dialog in dialogs:
        if len(dialog):
            turn(model, tree, dialog)
    locks = [tree.lock(dialog) for dialog in dialogs]
    assert [lock.length for lock in locks] == [29, 4, 13, 0, 29]
    cache = tree.take(locks, 40)
    assert cache.ragged and cache.length == 29
    y = text(25, seed=40).view(5, 5)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache) for part in y.split([1, 3, 1], 1)], 1)
    for row, dialog in enumerate(dialogs):
        full = torch.cat((dialog, y[row]))
        close(logits[row], whole(model, full)[-5:])
        assert tree.put(full, cache, row) == len(full) == tree.match(full)
        more = torch.cat((full, text(4, seed=50 + row)))
        logits_more, n = turn(model, tree, more)
        assert n == len(full)
        close(logits_more, whole(model, more)[n:])
    for lock in locks:
        lock.unlock()
    check(tree)


@pytest.mark.parametrize("mixer", PATTERNS)
def test_equal_lengths_are_not_ragged(mixer):
    model = build(mixer)
    tree, base = DialogTree(model, budget=None), text(11)
    turn(model, tree, base)
    other = torch.cat((base[:-1], text(1, seed=9)))
    turn(model, tree, other)
    with tree.lock(base) as one, tree.lock(other) as two:
        cache = tree.take([one, one, two], 32)
        assert not cache.ragged
        y = text(9, seed=3).view(3, 3)
        with torch.no_grad():
            logits = model(y, cache=cache)
            fork = cache.fork(2)
            model(y, cache=cache)
    for row, dialog in enumerate((base, base, other)):
        close(logits[row], whole(model, torch.cat((dialog, y[row])))[-3:])
        assert tree.put(torch.cat((dialog, y[row])), fork, 2 * row + 1) == 14
    check(tree)


def test_uneven_new_parts_in_one_pass():
    """Where nothing forgets by age, new tokens may be padded on the left, whatever stands before them."""
    model = build("full", n_kv_head=2)
    tree, dialogs = DialogTree(model, budget=None), [text(n, seed=n) for n in (12, 3)]
    for dialog in dialogs:
        turn(model, tree, dialog)
    locks = [tree.lock(dialog) for dialog in dialogs]
    cache, y = tree.take(locks, 40), text(8, seed=3).view(2, 4)
    places = torch.tensor([[12, 13, 14, 15], [-1, -1, 3, 4]])
    with torch.no_grad():
        logits = model(y, positions=places, cache=cache)
    late = [torch.cat((dialogs[0], y[0])), torch.cat((dialogs[1], y[1, 2:]))]
    close(logits[0], whole(model, late[0])[-4:])
    close(logits[1, 2:], whole(model, late[1])[-2:])
    for row in range(2):
        assert tree.put(late[row], cache, row) == len(late[row])
        longer = torch.cat((late[row], text(2, seed=8)))
        found, n = turn(model, tree, longer)
        assert n == len(late[row])
        close(found, whole(model, longer)[n:])


@pytest.mark.parametrize("mixer", ["full", "mla,full", "strided", "mamba,full"])
def test_sliding_caches(mixer):
    """Full attention limited to the last 6 positions, as for generation without end."""
    model = build(mixer)
    tree, base = DialogTree(model, budget=None, window=6), text(9)
    close(turn(model, tree, base, 8)[0], whole(model, base, window=6))
    dialog = torch.cat((base, text(40, seed=2)))
    logits, n = turn(model, tree, dialog, 8)
    assert n == 9
    close(logits, whole(model, dialog, window=6)[9:])
    early = torch.cat((base[:7], text(9, seed=3)))  # 7 positions: the last 5 are held, all that a window of 6 shows
    logits, n = turn(model, tree, early, 8)
    assert n == (0 if "mamba" in mixer else 7)
    close(logits, whole(model, early, window=6)[n:])
    assert turn(model, tree, dialog)[1] == 49
    with pytest.raises(ValueError, match="not of this tree's model"):
        cache = model.new_cache(1, 8)
        model(base[None, :8], cache=cache)
        tree.put(base[:8], cache)


@pytest.mark.parametrize("mixer", ["full", "window", "mamba,full"])
def test_generation_goes_on_from_the_tree(mixer):
    """The logits after each of 64 greedy bytes of three dialogs in one batch are those that `generate` has."""
    model = build(mixer, block_size=128)
    prompts = [b"The history of the ", b"The history of a", b"The"]
    tree = DialogTree(model, budget=None)
    for prompt in prompts[::-1]:
        if len(prompt) > 1:
            turn(model, tree, torch.tensor(list(prompt[:-1])))
    locks = [tree.lock(prompt[:-1]) for prompt in prompts]
    cache, x, found, logits = tree.take(locks, 128), torch.tensor([[prompt[-1]] for prompt in prompts]), [], []
    with torch.inference_mode():
        for _ in range(64):
            logits.append(model(x, cache=cache)[:, -1])
            x = logits[-1].argmax(-1, keepdim=True)
            found.append(x[:, 0])
        close(torch.stack(logits), choices.followed(found, model, prompts))
    for row, prompt in enumerate(prompts):  # the last byte drawn is not read yet
        said = prompt + bytes(torch.stack(found)[:-1, row].tolist())
        assert tree.put(said, cache, row) == len(said)
    check(tree, locks)


def test_what_was_put_in_inference_mode_serves_outside():
    model, dialog = build("mamba,window,full"), text(20)
    tree = DialogTree(model, budget=None)
    with torch.inference_mode():
        for n in (8, 20):
            with tree.lock(dialog[:n]) as prefix:
                cache = tree.take(prefix, 40)
                model(dialog[None, prefix.length:n], cache=cache)
                tree.put(dialog[:n], cache)
        locks = [tree.lock(dialog), tree.lock(dialog[:8])]
        ragged = tree.take(locks, 40)
    check(tree, locks)
    logits = model(torch.stack((dialog[:2], dialog[8:10])), cache=ragged)  # with gradients on
    assert logits.requires_grad and torch.allclose(logits[1], whole(model, dialog)[8:10], atol=1e-5)


@pytest.mark.parametrize("kind", ["autocast", "dtype"])
@pytest.mark.parametrize("mixer", ["full", "compressive", "mamba,full"])
def test_bfloat16(mixer, kind):
    """The type that the tree was made with holds, whatever autocast says later."""
    model, dialog = build(mixer), text(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        tree = DialogTree(model, budget=None, dtype=torch.bfloat16 if kind == "dtype" else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        turn(model, tree, dialog[:9])
    tree_dtypes = {t.dtype for node in nodes_of(tree).values() for _, tensors in node.parts for t in tensors}
    assert torch.bfloat16 in tree_dtypes
    logits, n = turn(model, tree, dialog)
    assert n == 9
    torch.testing.assert_close(logits, whole(model, dialog)[9:], atol=0.1, rtol=0.1)


# --- Paging ---

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixer", ["full", "mla", "window,full", "mamba", "mingru,full", "compressive"])
def test_page_out_and_in_is_bit_identical(mixer, device):
    model = build(mixer).to(device)
    dialogs = [torch.cat((text(12), text(8, seed=s))).to(device) for s in (2, 3, 4)]
    tree = DialogTree(model, budget=None)
    turn(model, tree, dialogs[0][:12])
    for dialog in dialogs:
        turn(model, tree, dialog)
    one = max(sum(node.bytes for node in child.path) for child in nodes_of(tree).values())

    def read():
        found = []
        for i, dialog in enumerate(dialogs):
            with tree.lock(dialog) as prefix, torch.no_grad():
                assert prefix.length == 20
                check(tree, [prefix])
                found.append(model(text(3, seed=i)[None].to(device), cache=tree.take(prefix, 40)))
        return torch.stack(found)
    before, nodes = read(), nodes_of(tree)
    bits = {end: [t.cpu() for _, tensors in node.parts for t in tensors] for end, node in nodes.items()}
    assert tree.host_bytes == 0
    tree._limits["device"] = one  # as if the budget had been so from the start
    tree._make_room("device", 0)
    assert torch.equal(read(), before) and torch.equal(read(), before)
    stats = tree.stats()
    assert stats["page_ins"] >= 4 and stats["evictions"] >= 6 and stats["drops"] == 0
    assert tree.host_bytes > 0 and tree.device_bytes <= one
    for end, node in check(tree).items():
        tensors = [t for _, tensors in node.parts for t in tensors]
        assert all(t.device.type == ("cpu" if node.place == "host" else device) for t in tensors)
        assert all(torch.equal(t.cpu(), old) for t, old in zip(tensors, bits[end], strict=True))


def test_a_page_is_a_copy():
    """Nothing of a page that left is still in use, neither by the tree nor through a cache that was taken from it."""
    model, dialog = build("mamba,full"), text(20)
    tree = DialogTree(model, budget=None)
    turn(model, tree, dialog)
    with tree.lock(dialog) as prefix:
        cache, other = tree.take(prefix, 40), tree.take([prefix, prefix], 40)
    (node,) = nodes_of(tree).values()
    for place in ("host", "device"):
        old = [t for _, tensors in node.parts for t in tensors]
        tree._move(node, place)
        new = [t for _, tensors in node.parts for t in tensors]
        assert not {t.data_ptr() for t in old} & {t.data_ptr() for t in new}
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        for t in old:
            t.fill_(torch.nan)
    for held, rows in ((cache, 1), (other, 2)):
        with torch.no_grad():
            logits = model(text(2)[None].repeat(rows, 1), cache=held)[0]
        close(logits, whole(model, torch.cat((dialog, text(2))))[-2:])
    tree._move(node, "host")
    assert turn(model, tree, dialog) == (None, 20) and tree.stats()["page_ins"] == 2


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

    def verify(self, cache, row, tokens):
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
        self.dropped = self.evicted = self.paged_in = 0

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
    spare = 0

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
        limit = self._limits[node.place]
        assert limit is None or self._bytes[node.place] <= limit


def compare(tree, naive, locks):
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
    assert (stats["drops"], stats["evictions"], stats["page_ins"]) == (naive.dropped, naive.evicted, naive.paged_in)


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
    refused = 0

    def dialog():
        old = chance.choice(said)
        old = old[:chance.randint(0, len(old))] if chance.random() < 0.5 else old
        new = (*old, *(chance.randrange(3) for _ in range(chance.choice((0, 1, 2, 4, 9)))))
        said.append(new[:16])
        del said[:-12]
        return said[-1]
    for _ in range(400):
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
            compare(tree, naive, locks)
            cache = tree.take(lock, 16)
            model.verify(cache, 0, tokens[:lock.length])
            model.read(cache, tokens, chance.randint(1, 9))
        elif what == "put":
            cache = model.new_cache(1, 16)
            model.read(cache, tokens, chance.randint(1, 9))
        if what in ("turn", "put"):
            firsts = [getattr(layer, "_evicted", None) for layer in cache.layers]
            found = tree.put(tokens, cache)
            assert found == naive.put(tokens, firsts) == tree.match(tokens)
            refused += found < len(tokens)
        if what == "turn" and chance.random() < 0.7:
            naive.unlock(locks.pop()[1])
            lock.unlock()
        if what == "batch" and locks:
            some = [chance.choice(locks) for _ in range(3)]
            cache = tree.take([lock for lock, _ in some], 16)
            for row, (_, kept) in enumerate(some):
                model.verify(cache, row, kept)
                assert tree.put(kept, cache, row) == len(kept)
                naive.put(kept, [None] * len(kinds))
        compare(tree, naive, locks)
    stats = tree.stats()
    assert (stats["hits"] > 50) == (budget != 0) and stats["refused"] >= refused
    assert (refused > 0) == (budget is not None)
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


def locked(tree, locks):
    return {"".join(map(str, end)): node.locks for end, node in check(tree, locks).items()}


def dialog(word):
    return tuple(map(int, word))


ONE = 16  # bytes of a position in the first layer of numbers


def test_common_beginnings_lie_once():
    _, tree, put = numbers()
    for a in range(8):
        for b in range(8):
            assert put((*range(10, 30), a, a, a, b, b)) == 25
    assert len(check(tree)) == 1 + 8 + 64 and tree.device_bytes == (20 + 8 * 3 + 64 * 2) * ONE
    tree.lock(range(10, 16)).unlock()  # a cut adds nothing
    assert len(check(tree)) == 2 + 8 + 64 and tree.device_bytes == (20 + 8 * 3 + 64 * 2) * ONE


def test_a_partial_match_is_cut_before_it_is_locked():
    """Only what was found is locked: the rest of the node may go."""
    _, tree, put = numbers(budget=8 * ONE, host_budget=0)
    put(dialog("11112222"))
    with tree.lock(dialog("111133")) as prefix:
        assert prefix.length == 4 and prefix.locked
        assert locked(tree, [prefix]) == {"1111": 1, "11112222": 0}
        put(dialog("333"))
        assert places(tree) == {"1111": "device", "333": "device"}
        assert put(dialog("33334")) == 3  # 9 positions would be too many
        check(tree, [prefix])
    assert not prefix.locked
    put(dialog("44444444"))
    assert places(tree) == {"44444444": "device"}


def test_a_cut_keeps_the_locks():
    _, tree, put = numbers(budget=10 * ONE, host_budget=0)
    put(dialog("12345678"))
    one, two = tree.lock(dialog("12345678")), tree.lock(dialog("12345678"))
    three = tree.lock(dialog("1239"))  # cuts what one and two have locked
    assert (one.length, two.length, three.length) == (8, 8, 3)
    locks = [one, two, three]
    assert locked(tree, locks) == {"123": 3, "12345678": 2}
    assert put(dialog("124")) == 3
    assert locked(tree, locks) == {"12": 3, "123": 3, "124": 0, "12345678": 2}
    assert [tree.take(lock, 8).length for lock in locks] == [8, 8, 3]
    for lock in (two, one):
        lock.unlock()
    assert locked(tree, [three]) == {"12": 1, "123": 1, "124": 0, "12345678": 0}
    assert put(dialog("77777777")) == 0 and put(dialog("7777777")) == 7
    assert locked(tree, [three]) == {"12": 1, "123": 1, "7777777": 0}
    three.unlock()
    assert locked(tree, []) == {"12": 0, "123": 0, "7777777": 0}


def test_what_finds_no_room_evicts_nothing():
    _, tree, put = numbers(budget=8 * ONE)
    put(dialog("1111")), put(dialog("222"))
    with tree.lock(dialog("1111")) as prefix:
        assert put(dialog("33333")) == 0 and put(dialog("222222222")) == 3 and put(dialog("111122222")) == 4
        assert places(tree) == {"1111": "device", "222": "device"} and check(tree, [prefix])
        assert tree.stats()["refused"] == 3 and tree.stats()["evictions"] == 0
        assert put(dialog("11112222")) == 8  # with room made for it
    assert put(dialog("9" * 9)) == 0 and tree.stats()["refused"] == 4
    assert places(tree) == {"1111": "device", "11112222": "device", "222": "host"}


def test_a_lock_keeps_what_fits():
    _, tree, put = numbers(budget=8 * ONE)
    put(dialog("1111")), put(dialog("111122"))
    put(dialog("3333")), put(dialog("33335"))
    assert places(tree) == {"1111": "host", "111122": "host", "3333": "device", "33335": "device"}
    with tree.lock(dialog("3333")) as one, tree.lock(dialog("111122")) as two:
        assert (one.length, two.length) == (4, 4) and tree.match(dialog("111122")) == 6
        assert places(tree) == {"1111": "device", "111122": "host", "3333": "device", "33335": "host"}
        assert locked(tree, [one, two]) == {"1111": 1, "3333": 1, "111122": 0, "33335": 0}
        with tree.lock(dialog("33335")) as three:
            assert three.length == 4
        assert tree.stats()["refused"] == 2
    with tree.lock(dialog("111122")) as two:
        assert two.length == 6
    check(tree)


def test_a_hybrid_locks_no_more_than_its_states():
    """Keys may fit where the state after them does not: then the lock ends where a state is."""
    _, tree, put = numbers("state", None, budget=4 * 20 + 80)
    put(dialog("11")), put(dialog("1111"))
    put(dialog("22222"))  # 100 + 40: all else is on the host
    assert set(places(tree).items()) == {("11", "host"), ("1111", "host"), ("22222", "device")}
    with tree.lock(dialog("22222")) as one, tree.lock(dialog("1111")) as two:
        assert (one.length, two.length) == (5, 0)
        check(tree, [one, two])
    with tree.lock(dialog("1111")) as two:
        assert two.length == 4


def test_least_recently_used_goes_first():
    _, tree, put = numbers(budget=4 * ONE, host_budget=2 * ONE)
    for word in "1234":
        put(dialog(word))
    tree.lock(dialog("1")).unlock()  # used
    tree.match(dialog("2"))  # not used
    put(dialog("3"))  # used, though it was there
    for word, wanted in (("5", "4135/2"), ("6", "1356/24"), ("7", "3567/41"), ("2", "5672/13")):
        put(dialog(word))
        found = places(tree)
        on = {where: {w for w in found if found[w] == where} for where in ("device", "host")}
        assert on == {"device": set(wanted[:4]), "host": set(wanted[5:])}
    assert tree.stats()["drops"] == 2 and tree.stats()["page_ins"] == 0


def test_children_of_what_was_paged_out():
    _, tree, put = numbers(budget=6 * ONE, host_budget=6 * ONE)
    put(dialog("11")), put(dialog("1122")), put(dialog("1133"))
    put(dialog("555555"))
    assert places(tree) == {"11": "host", "1122": "host", "1133": "host", "555555": "device"}
    assert put(dialog("1144")) == 4  # its parent comes back first, for which 555555 finds no room on the host
    assert places(tree) == {"11": "device", "1144": "device", "1122": "host", "1133": "host"}
    check(tree)
    put(dialog("666"))
    assert places(tree) == {"11": "device", "666": "device", "1122": "host", "1133": "host", "1144": "host"}
    put(dialog("77777"))
    assert places(tree) == {"11": "host", "666": "host", "77777": "device"}  # the parent stays longer than its children
    put(dialog("888888"))
    assert places(tree) == {"77777": "host", "888888": "device"} and check(tree)


def test_a_state_is_found_where_it_was_put():
    model, tree, put = numbers("state", None)
    put(dialog("12345678"))
    assert [tree.match(dialog(word)) for word in ("1234", "1234567", "12345678", "123456789")] == [0, 0, 8, 8]
    put(dialog("1239"))  # cuts, but nobody has seen the state after 123
    assert tree.match(dialog("1234")) == 0 and len(check(tree)) == 3
    before = tree.device_bytes
    assert put(dialog("123")) == 3 and tree.device_bytes == before + 40  # now they have
    assert [tree.match(dialog(word)) for word in ("1234", "123", "12", "12345678")] == [3, 3, 0, 8]
    with tree.lock(dialog("1234")) as prefix:
        model.verify(tree.take(prefix, 8), 0, dialog("123"))
    check(tree)


def test_what_leads_nowhere_goes_too():
    """The head of a cut node has no state: with the last dialog through it gone, nothing would ever find it."""
    _, tree, put = numbers("state", None, budget=200, host_budget=0)
    put(dialog("12")), put(dialog("13"))
    assert set(places(tree)) == {"1", "12", "13"}
    put(dialog("444444"))
    assert set(places(tree)) == {"444444"} and check(tree)
    assert tree.stats()["drops"] == tree.stats()["evictions"] == 3


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
            model.verify(tree.take(prefix, 8), 0, dialog(word))
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


# --- What cannot be ---

def test_models_that_a_tree_refuses():
    config = TransformerConfig(**{**SMALL, "block_size": 32})

    class Other:
        def new_cache(self, *a, **how):
            return Cache([object()])
    for model, word in ((build_model(TransformerConfig(**{**SMALL, "shorten": 2})), "Pyramid.* a PyramidCache"),
                        (EncoderDecoder(config), "EncoderDecoder.* a ContextCache"), (Encoder(config), "whole input"),
                        (SpatioTemporal(config, 4), "layer 0 of SpatioTemporal with its KVCache has not"),
                        (Other(), "layer 0 of Other with its object has not")):
        with pytest.raises(ValueError, match=word) as error:
            DialogTree(model, 1000)
        assert "\n" not in str(error.value)
    for budgets, word in (((-1,), "^budget is -1"), ((5, -2), "host_budget is -2")):
        with pytest.raises(ValueError, match=word):
            DialogTree(build(), *budgets)


def test_a_prefix_that_saw_itself_is_refused():
    model, tokens = build("full"), text(8)
    tree, cache = DialogTree(model, None), model.new_cache(1, 16)
    with torch.no_grad():
        model(tokens[None], cache=cache, prefix=4)
    with pytest.raises(ValueError, match="first 4 positions saw one another"):
        tree.put(tokens, cache)
    torch.manual_seed(0)
    model = PrefixDecoder(TransformerConfig(**{**SMALL, "block_size": 32})).eval()
    tree, cache = DialogTree(model, None), model.new_cache(1, 8)
    with torch.no_grad():
        model.decode(tokens[None, 5:], tokens[None, :5], cache)
    with pytest.raises(ValueError, match="first 5 positions saw one another"):
        tree.put(tokens, cache)
    assert tree.match(tokens) == 0


@torch.no_grad()
def test_calls_that_cannot_be():
    model, tokens = build("full"), text(8)
    tree, cache = DialogTree(model, None), model.new_cache(2, 16)
    model(tokens.expand(2, 8), cache=cache)
    lock = tree.lock(tokens)
    lock.unlock()
    far, gaps = model.new_cache(1, 16), model.new_cache(1, 16)
    model(tokens[None], positions=torch.arange(2, 10)[None], cache=far)
    model(tokens[None], positions=torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]), cache=gaps)
    double = model.new_cache(1, 16, dtype=torch.float64)
    wide = build("full", n_kv_head=2).new_cache(1, 16)
    cases = [(lambda: tree.put(tokens[:7], cache), "has read 8 positions, but there are 7 tokens"),
             (lambda: tree.put([*tokens, 1], cache), "has read 8 positions, but there are 9 tokens"),
             (lambda: tree.put(tokens, cache, 2), "no row 2 in a cache of 2"),
             (lambda: tree.put(tokens, cache, -1), "no row -1"),
             (lambda: tree.put([*tokens, 1, 1], far), "positions 2 ... 9 in layer 0"),
             (lambda: tree.put([*tokens, 1], gaps), "consecutive positions"),
             *((lambda other=other: tree.put([], other), "not of this tree's model") for other in (
                 double, wide, model.new_cache(1, 16, window=8), build("mla").new_cache(1, 16),
                 build("full", n_layer=2).new_cache(1, 16), build("mamba").new_cache(1, 16), [])),
             (lambda: tree.put(tokens[None], cache), r"not \(1, 8\)"), (lambda: tree.take([], 8), "must be a prefix"),
             (lambda: tree.take(lock, 8), "not locked"), (lock.unlock, "not locked"),
             (lambda: DialogTree(model, None).take(tree.lock(tokens), 8), "not in this tree")]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()
    for wrong in ("text", [1.5]):
        with pytest.raises(TypeError):
            tree.match(wrong)
    assert not nodes_of(tree)
    assert tree.put(tokens, cache, 1) == 8
    with tree.lock(tokens) as prefix, pytest.raises(ValueError, match="8 positions, which exceed max_length 7"):
        tree.take(prefix, 7)
    with pytest.raises(RuntimeError), tree.lock(tokens) as prefix:
        raise RuntimeError
    assert not prefix.locked and check(tree)
