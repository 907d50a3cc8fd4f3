"""A tree of dialogs in storms of operations, of numbers that tell which tokens they stand for: what is found, on the
device or the host, never over budget; what leaves first; no copy that fails loses anything; with real models a sliding
window, other types, inference mode; what a tree refuses."""
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from model import Positions, TransformerConfig
from models.encoder_decoder import Encoder, EncoderDecoder, PrefixDecoder
from models.video import SpatioTemporal
from nanolab import dialog_tree
from nanolab.cache import Cache, KVCache, RecurrentCache
from nanolab.dialog_tree import DialogTree, common_length
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


def held_by(tree):
    return [t for node in nodes_of(tree).values() for _, tensors in node.parts for t in tensors]


def check(tree, locks=()):
    """What must hold after every operation. locks: the prefixes that are locked. Returns nodes_of(tree)."""
    nodes = nodes_of(tree)
    turns = {node: i for i, node in enumerate([*tree._held["host"], *tree._held["device"]])}
    assert turns.keys() == {*nodes.values()}
    for place, held in tree._held.items():
        assert all(node.place == place for node in held) and tree._bytes[place] == sum(node.bytes for node in held)
        assert tree._budgets[place] is None or tree._bytes[place] <= tree._budgets[place]
    for end, node in nodes.items():
        assert node.end == len(end) and node.start == node.parent.end and node.tokens
        assert node.locks == sum(node in prefix.node.path for prefix in locks)
        assert turns[node] < turns.get(node.parent, len(turns))  # children leave first
        assert node.children or tree._ends_at(node, node.end)    # nothing is kept that leads nowhere
        for (mark, tensors), cuts in zip(node.parts, tree._divisible):
            for t in tensors:
                assert t.untyped_storage().nbytes() == t.nbytes and not t.is_inference() and not t.requires_grad
                assert not cuts or node.start <= mark and t.size(1) == node.end - mark > 0
    assert sum(tree._bytes.values()) == sum(t.nbytes for t in held_by(tree)) and tree.bytes <= tree.peak_bytes
    assert tree._budgets["device"] is None or tree.peak_bytes <= tree._budgets["device"]
    return nodes


# --- Caches of numbers that tell which tokens they stand for ---

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

    def read(self, cache, tokens, chunk=99):
        """Appends what is not read yet, `chunk` positions at a time."""
        while cache.length < len(tokens):
            ends = range(cache.length + 1, min(cache.length + chunk, len(tokens)) + 1)
            for i, layer in enumerate(cache.layers):
                k = torch.tensor([mark_of(tokens[:n], i) for n in ends])  # (T, 2)
                if self.kinds[i] == "state":
                    layer.update((k[-1:, :, None].repeat(1, 1, 5),), len(ends))
                else:
                    layer.update(k[None, None], k.repeat(1, 9)[None, None, :, :2 + i])
            cache.advance(Positions(cache.length, len(ends)))
        return cache

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


STORMS = {  # layers, budget, host_budget
    "keys": ([None], 350, 200), "nothing": ([None, None], 0, 0), "states": (["state", "state"], 250, None),
    "hybrid": ([None, "state"], 400, 400), "windows": ([3, 2], 400, 0), "all": ([None, 3, "state", 6], 900, 300)}


@pytest.mark.parametrize("storm", STORMS)
def test_hundreds_of_operations(storm):
    """All that is found holds what its tokens leave. Beside it a tree without a budget: there whatever was put is
    found, beginnings that keys have in common too, and after states no other. In the small one what is locked stays."""
    kinds, budget, host_budget = STORMS[storm]
    model, chance, counts = Numbers(kinds), random.Random(storm), Counter()
    tree, endless = DialogTree(model, budget, host_budget), DialogTree(model, None)
    locks, said, puts = [], [()], {()}

    def put(tokens, cache, row=0):
        before, away = nodes_of(tree).keys(), {*tree._held["host"]}
        found = tree.put(tokens, cache, row)
        counts["back"] += bool(away & {*tree._held["device"]})
        assert found == tree.match(tokens) and endless.put(tokens, cache, row) == len(tokens)
        puts.add(tokens)
        counts.update(refused=found < len(tokens), left=bool(before - nodes_of(tree).keys()))

    def dialog():
        old = chance.choice(said)
        old = old[:chance.randint(0, len(old))] if chance.random() < 0.5 else old
        said.append((*old, *(chance.randrange(3) for _ in range(chance.choice((0, 1, 2, 4, 9)))))[:16])
        del said[:-12]
        return said[-1]
    for _ in range(300):
        what, tokens = chance.choice(("turn", "turn", "turn", "put", "lock", "unlock", "batch")), dialog()
        whole = max(len(old) for old in puts if tokens[:len(old)] == old)
        most = whole if "state" in kinds else max(common_length(old, tokens) for old in puts)
        assert whole <= endless.match(tokens) <= most
        if {*kinds} <= {None, "state"}:
            assert tree.match(tokens) <= endless.match(tokens) == most
        if what == "unlock" or len(locks) > 3:
            for lock, _ in [locks.pop(chance.randrange(len(locks))) for _ in locks[:2]]:
                lock.unlock()
        if what in ("turn", "lock"):
            away, lock = {*tree._held["host"]}, tree.lock(tokens)
            counts["back"] += bool(away & {*tree._held["device"]})
            locks.append((lock, tokens[:lock.length]))
            cache = tree.take(lock, 16)
            model.check_row(cache, 0, tokens[:lock.length])
            counts["hits"] += lock.length > 0
        if what == "put":
            cache = model.new_cache(1, 16)
        if what in ("turn", "put"):
            put(tokens, model.read(cache, tokens, chance.randint(1, 9)))
        if what == "turn" and chance.random() < 0.7:
            locks.pop()[0].unlock()
        if what == "batch" and locks:
            some = [chance.choice(locks) for _ in range(3)]
            cache = tree.take([lock for lock, _ in some], 16)
            for row, (_, kept) in enumerate(some):
                model.check_row(cache, row, kept)
                put(kept, cache, row)
        check(tree, [lock for lock, _ in locks])
        assert all(tree.match(kept) == len(kept) for _, kept in locks)
        assert all(node.place == "device" for lock, _ in locks for node in lock.node.path)
    check(endless)
    assert (counts["hits"] > 20) == bool(budget) and counts["refused"]
    assert (counts["left"] > 10) == bool(budget and host_budget is not None)
    assert (counts["back"] > 5) == (host_budget != 0)


# --- One thing at a time ---

def numbers(*kinds, budget=None, host_budget=0):
    """A model of numbers, its tree, and a function that reads and puts a dialog."""
    model = Numbers(kinds or [None])
    tree = DialogTree(model, budget, host_budget)

    def put(word):
        tokens = dialog(word)
        return tree.put(tokens, model.read(model.new_cache(1, len(word)), tokens))
    return model, tree, put


def dialog(word):
    return tuple(map(int, word))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("word, host", [("56", 0), ("17", 0), ("9999", 0), ("9999", 999), ("12347", 999)],
                         ids=["put", "put in a cut", "put in another's place", "page out", "page in and put"])
def test_a_failed_copy_loses_nothing(word, host, n, monkeypatch):
    """Memory may be short at any copy: the error comes through, the tree stays whole, and goes on afterwards."""
    model, tree, put = numbers(None, "state", None, budget=400, host_budget=host)
    for old in ("12", "1234", "5", *["99999"] * (word == "12347")):
        put(old)
    words, copies, count = {*nodes_of(tree)}, dialog_tree._copies, iter(range(1, 99))

    def short(tensors, device):
        if next(count) == n:
            raise torch.OutOfMemoryError("no memory")
        return copies(tensors, device)
    monkeypatch.setattr(dialog_tree, "_copies", short)
    try:
        put(word)
    except torch.OutOfMemoryError:
        assert {*nodes_of(tree)} - {(1,)} == words if host or word != "9999" else {*nodes_of(tree)} <= words
    monkeypatch.undo()
    for end in check(tree):
        with tree.lock(end) as prefix:
            assert prefix.length == len(end) or end == (1,)
            model.check_row(tree.take(prefix, 8), 0, end[:prefix.length])
    assert put(word) == len(word)
    check(tree)


def test_what_was_used_longest_ago_leaves_first_and_before_anything_is_stored(monkeypatch):
    _, tree, put = numbers(budget=12 * 16)                       # of 12 positions
    copies = dialog_tree._copies

    def watched(tensors, device):
        made = copies(tensors, device)
        assert tree.bytes + sum(t.nbytes for t in made) <= 12 * 16
        return made
    for word in ("1234", "7777", "1256"):                        # 12, with 34 and 56 below it
        put(word)
    monkeypatch.setattr(dialog_tree, "_copies", watched)

    def found():
        check(tree)
        return [tree.match(dialog(word)) for word in ("1234", "1256", "7777", "888", "99999")]
    with tree.lock(dialog("1234")):
        assert put("888") == 3 and put("9" * 9) == 0             # no room beside what is locked: nothing leaves for it
    assert found() == [4, 4, 0, 3, 0]
    assert put("99999") == 5 and found() == [4, 2, 0, 3, 5]
    assert put("1256") == 4 and found() == [2, 4, 0, 3, 5]       # 12 is in use: 34 leaves
    assert put("0000") == 4 and found() == [2, 4, 0, 0, 0]
    assert put("1256") == 4 and put("3" * 6) == 6 and tree.match(dialog("0000")) == 0 and found() == [2, 4, 0, 0, 0]
    _, tree, put = numbers(None, "state", budget=200)
    put("1234"), put("1256"), put("77777")                       # 34 and 56 leave, and so 12 leads nowhere
    assert [*check(tree)] == [dialog("77777")]


def test_the_host_takes_what_leaves_and_gives_it_back():
    _, tree, put = numbers(budget=6 * 16, host_budget=7 * 16)
    put("1234"), put("555")
    with tree.lock(dialog("123")) as prefix:                     # cut on the host, where 4 stays
        assert prefix.length == 3 and (tree.bytes, tree.peak_bytes, tree._bytes["host"]) == (96, 96, 16)
    put("777777")
    assert [tree.match(dialog(word)) for word in ("1234", "555", "777777")] == [4, 3, 6] and len(check(tree)) == 4
    with tree.lock(dialog("7777")) as locked, tree.lock(dialog("1234")) as prefix:
        assert prefix.length == 0                                # 123 finds no room, so 4 stays too
        check(tree, [locked, prefix])
    _, tree, put = numbers(budget=6 * 16, host_budget=2 * 16)
    put("1234"), put("123456"), put("999999")
    assert tree.match(dialog("123456")) == 0 and len(check(tree)) == 1  # 1234 is too long for the host: 56 goes too


def test_a_thousand_turns_are_no_recursion():
    model, tree, _ = numbers(budget=1000 * 16, host_budget=1000 * 16)
    cache, said = model.new_cache(1, 1000), ()
    for _ in range(1000):
        said += (1,)
        cache.layers[0].update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        cache.length += 1
        tree.put(said, cache)
    with tree.lock(said) as prefix:
        assert prefix.length == 1000 and tree.take(prefix, 1000).length == 1000
    assert tree.put((2,) * 1000, cache) == 1000 and len(check(tree)) == 1001 == len(tree._held["host"]) + 1
    assert tree.put((3,) * 1000, cache) == 1000 and len(check(tree)) == 2  # the host has room for one of the two


@pytest.mark.parametrize("kind", [bytes, list, torch.tensor, np.array, lambda t: [torch.tensor(i) for i in t]],
                         ids="bytes list tensor array tensors".split())
def test_tokens_of_any_kind_are_the_same(kind):
    _, tree, put = numbers()
    put("1234")
    assert tree.match(kind([1, 2, 3, 9])) == 3
    with tree.lock(kind([1, 2, 3, 4])) as prefix:
        assert prefix.length == 4 and tree.put(kind([1, 2, 3, 4]), tree.take(prefix, 4)) == 4


def test_reset_waits_for_locks_and_nothing_is_a_prefix_too():
    _, tree, put = numbers("state", None)
    put("12"), put("1234")
    refs = [weakref.ref(t) for t in held_by(tree)]
    with tree.lock(dialog("12")), pytest.raises(ValueError, match="still locked"):
        tree.reset()
    with tree.lock(()) as prefix:
        cache = tree.take([prefix, prefix], 4)
        assert prefix.length == 0 == cache.length == tree.put((), cache, 1)
        tree.reset()  # nothing is locked
    assert not any(ref() is not None for ref in refs)  # at once, without the garbage collector
    assert tree.match(dialog("12")) == 0 and not check(tree)
    put("123")
    assert len(check(tree)) == 1


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


@pytest.mark.parametrize("mixer", ["mla,full", "strided"])
def test_sliding_caches(mixer):
    """Full attention limited to the last 6 positions, as for generation without end. With states: test_variants.py."""
    model = build(mixer)
    tree, base = DialogTree(model, budget=None, window=6), said(9)
    longer = torch.cat((base, said(40, seed=2)))
    early = torch.cat((base[:7], said(9, seed=3)))  # 7 positions: the last 5 are held, all that a window of 6 shows
    for tokens, known in ((base, 0), (longer, 9), (early, 7)):
        logits, n = turn(model, tree, tokens, 8)
        assert n == known
        close(logits, whole(model, tokens, window=6)[n:])
    assert turn(model, tree, longer)[1] == 49


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


@pytest.mark.parametrize("mixer, wide", [("compressive", False), ("mamba,full", True)])
def test_bfloat16(mixer, wide):
    """The type that the tree was made with holds, whatever autocast says later."""
    model, tokens = build(mixer), said(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
        tree = DialogTree(model, budget=None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        turn(model, tree, tokens[:9])
    assert (torch.bfloat16 in {t.dtype for t in held_by(tree)}) != wide
    logits, n = turn(model, tree, tokens)
    assert n == 9
    close(logits, whole(model, tokens)[9:], 0.1)


# --- What cannot be ---

def test_models_and_budgets_that_a_tree_refuses():
    config = TransformerConfig(**{**SMALL, "block_size": 32})

    class Other:
        def new_cache(self, *a, **how):
            return Cache([object()])
    for model, budgets, word in (
            (build(shorten=2), [1000], "Pyramid.* a PyramidCache"), (Encoder(config), [1000], "whole input"),
            (EncoderDecoder(config), [1000], "EncoderDecoder.* a ContextCache"),
            (SpatioTemporal(config, 4), [1000], "layer 0 of SpatioTemporal with its KVCache has not"),
            (Other(), [1000], "layer 0 of Other with its object has not"), (build(), [-1], "budget is -1"),
            (build(), [None, -2], "budget is -2 bytes on the host")):
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
             (lambda: tree.put([*tokens, 1, 1], far), "positions 2 ... 9 in layer 0"),
             (lambda: tree.put([*tokens, 1], gaps), "consecutive positions"),
             (lambda: tree.put(tokens, saw), "first 4 positions saw one another"),
             (lambda: DialogTree(prefixed, None).put(tokens, saw_too), "first 5 positions saw one another"),
             *((lambda other=other: tree.put([], other), "not of this tree's model") for other in others),
             (lambda: tree.take(lock, 8), "not locked"), (lock.unlock, "not locked"),
             (lambda: DialogTree(model, None).take(tree.lock(tokens), 8), "not in this tree")]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()
    for wrong in ("text", [1.5], tokens[None]):
        with pytest.raises(TypeError):
            tree.match(wrong)
    assert not nodes_of(tree) and tree.put(tokens, cache, 1) == 8
    with tree.lock(tokens) as prefix, pytest.raises(ValueError, match="8 positions, which exceed max_length 7"):
        tree.take(prefix, 7)
    with pytest.raises(RuntimeError), tree.lock(tokens) as prefix:
        raise RuntimeError
    assert prefix.node is None and check(tree)
