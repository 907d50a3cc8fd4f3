"""DialogTree: what the layers remember of many dialogs, of which a common beginning lies once."""
import operator
from collections import OrderedDict
from contextlib import contextmanager

import torch

from nanolab.cache import Cache


class LockedPrefix:
    """The first `length` tokens of a dialog, kept by a DialogTree until `unlock`, or the end of a `with`. One of length
    0 stands for nothing held: a cache taken from it is empty."""

    def __init__(self, tree, node):
        self.tree, self.node, self.length = tree, node, node.end

    def unlock(self):
        """Lets go of it. Raises ValueError the second time."""
        self.tree._check_locked(self)
        self.tree._pin(self.node, -1)
        self.node = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.node is not None:
            self.unlock()


class _Node:
    """A span of tokens of a DialogTree, and what the layers keep of it.

    parts: per layer (mark, tensors), tensors () where nothing is kept. Of a divisible layer, keys and values (H, n, D)
    of the positions mark ... end - 1, mark >= start; of another, its state after the span's last token.
    """

    def __init__(self, tokens, parent, parts, place="device"):
        self.tokens, self.parent, self.parts, self.place = tokens, parent, parts, place
        self.start = 0 if parent is None else parent.end
        self.end = self.start + len(tokens)
        self.children, self.locks = {}, 0  # by their first token; the locked prefixes that end here or below

    @property
    def bytes(self):
        """Of its parts."""
        return sum(t.nbytes for _, tensors in self.parts for t in tensors)

    @property
    def path(self):
        """The nodes from below the root down to this one."""
        path, node = [], self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


class DialogTree:
    """What the layers remember of many dialogs, as a tree in which a common beginning lies once.

        tree = DialogTree(model, budget=1 << 30, host_budget=8 << 30)
        with tree.lock(tokens) as prefix:                      # the longest beginning that is held, on the device
            cache = tree.take(prefix, max_length=2048)         # a Cache of one row; take([prefix, ...]): of many
            logits = model(x[:, prefix.length:], cache=cache)  # only the rest is computed
            tree.put(tokens, cache)                            # and only the rest is stored

    Tokens are those of a dialog from its very beginning: integers, bytes, or an integer tensor (n,). A node is a span
    of tokens. Of a layer that attends it holds the keys and values of its positions, so that dialogs branch off
    anywhere: the node is cut in two. Under a sliding window it holds those that the cache still had when they were put,
    and a beginning is found where all that the window shows at its end is held. A state (Mamba, minGRU, a compressed
    memory) cannot be cut: only those lengths are found that were put, so put a dialog wherever others may branch off.

    budget: bytes of keys, values and states on the model's device, None: no limit; never exceeded: room is made before
    anything is stored; `peak_bytes` is the most there were. Nodes leave in the order of their last use (lock, put),
    children before parents, locked ones never. While host_budget bytes suffice they go to the CPU's memory, and come
    back when they are locked, or put again with something new; of those there, what was used longest ago is forgotten.
    Not counted: tokens, and the second copy of a node while it is cut. What finds no room beside locked nodes is no
    error: `put` leaves it out, and evicts nothing for it, `lock` keeps what fits.

    model: anything with `new_cache`, to which window goes on. Its weights must stay as they are, and so does the type
    of what is held: else `reset`. Raises ValueError for a negative budget, and where a dialog is more than one row of
    every layer (a Pyramid, an EncoderDecoder, a model of video).

    Ideas: the tree, its locks and its order of eviction are RadixAttention's (Zheng et al. 2024, SGLang), the second
    tier HiCache's (SGLang).
    """

    def __init__(self, model, budget, host_budget=0, window=None):
        self._budgets = {"device": budget, "host": host_budget}
        for place, limit in self._budgets.items():
            if limit is not None and limit < 0:
                raise ValueError(f"budget is {limit} bytes on the {place}: it must be at least 0, or None, no limit")
        probe, name = model.new_cache(1, 1, window=window), type(model).__name__
        needed = "a dialog tree needs a Cache with one row of every layer for each dialog"
        if type(probe) is not Cache:
            raise ValueError(f"{needed}, but {name}.new_cache returns a {type(probe).__name__}")
        for i, layer in enumerate(probe.layers):
            if not hasattr(layer, "row") or layer.batch_size != 1:
                raise ValueError(f"{needed}, which layer {i} of {name} with its {type(layer).__name__} has not")
        self._model, self._layout = model, [layer.layout for layer in probe.layers]
        dtype = next((layer.dtype for layer in probe.layers if layer.kind != "state"), None)
        self._how = dict(window=window, device=probe.layers[0].device, dtype=dtype)
        self._divisible = [layer.divisible for layer in probe.layers]
        self._reach = [layer.window for layer in probe.layers]  # positions that a divisible layer sees; None: all
        self._devices = {"device": self._how["device"], "host": torch.device("cpu")}
        self._bytes, self.peak_bytes = {"device": 0, "host": 0}, 0
        self._held = {"device": OrderedDict(), "host": OrderedDict()}  # nodes, children before parents: first to go
        self._root = _Node((), None, [])

    @property
    def bytes(self):
        """Held on the model's device."""
        return self._bytes["device"]

    def match(self, tokens):
        """How many of the first tokens are held, on the device or the host. Changes nothing and uses nothing."""
        return self._find(_as_tokens(tokens))[1]

    def lock(self, tokens):
        """The longest beginning of tokens that is held, as a LockedPrefix. Where it ends inside a node, the node is cut
        first, and the rest is not locked."""
        node, length = self._find(_as_tokens(tokens))
        if length < node.end:
            node = self._split(node, length)
        kept = self._root
        with self._pinned(node):
            for step in node.path:
                if step.place == "host":
                    if not self._make_room("device", step.bytes):
                        break
                    self._move(step, "device")
                kept = step
        while not self._ends_at(kept, kept.end):
            kept = kept.parent
        self._pin(kept, 1)
        return LockedPrefix(self, kept)

    def take(self, prefixes, max_length):
        """A Cache that has read a LockedPrefix, or one row for each of a list of them; the same one may come often.

        It is a copy, with room for max_length positions in all. Rows of different lengths are ragged, padded on the
        left: `model(x, cache=cache)` goes on after each row's own last position. Raises ValueError for a prefix that is
        not locked, and where max_length is too short.
        """
        prefixes = [prefixes] if isinstance(prefixes, LockedPrefix) else prefixes
        for prefix in prefixes:
            self._check_locked(prefix)
        lengths = [prefix.length for prefix in prefixes]
        unbounded = any(cuts and reach is None for cuts, reach in zip(self._divisible, self._reach))
        if unbounded and max_length < max(lengths):
            raise ValueError(f"the prefix has {max(lengths)} positions, which exceed max_length {max_length}")
        cache = self._model.new_cache(len(prefixes), max_length, **self._how)
        paths = [prefix.node.path for prefix in prefixes]
        for i, layer in enumerate(cache.layers):
            layer.fill([(length, self._parts(path, length, i)) for length, path in zip(lengths, paths)])
        return standing(cache, lengths)

    def put(self, tokens, cache, row=0):
        """Stores what a row of a cache has read, all of tokens and nothing more, beyond what is held already.

        Returns how many of the tokens are held then: all, or what was before, where the rest finds no room. The cache
        stays the caller's. Raises ValueError for a cache of other layers, of another number of positions, or with a
        prefix whose positions saw one another: such keys depend on what comes after them.
        """
        tokens = _as_tokens(tokens)
        self._check(tokens, cache, row)
        node, length = self._descend(tokens)
        if length == len(tokens) and self._ends_at(node, length):
            self._touch(node)
            return length
        new = [layer.row(row) for layer in cache.layers]
        for i, (mark, tensors) in enumerate(new):
            end = mark + tensors[0].size(1) if self._divisible[i] else len(tokens)
            if self._divisible[i] and mark > self._first_seen(i, len(tokens)) or end != len(tokens):
                raise ValueError(f"row {row} holds positions {mark} ... {end - 1} in layer {i}, not those of a dialog "
                                 f"of {len(tokens)} tokens that begins at 0")
        if length < node.end:
            node = self._split(node, length)
        leaf = node
        if length < len(tokens):
            leaf = _Node(tokens[length:], node, [(len(tokens), ())] * len(new))
        missing = list(self._missing(leaf, new))
        away = [step for step in node.path if step.place == "host"]
        size = sum(step.bytes for step in away) + sum(t.nbytes for *_, views in missing for t in views)
        with self._pinned(node):
            if not self._make_room("device", size):
                return self.match(tokens)
            for step in away:
                self._move(step, "device")
            copies = [_copies(views, self._devices["device"]) for *_, views in missing]  # may fail: nothing has changed
        if leaf is not node:
            node.children[leaf.tokens[0]] = leaf
            self._held["device"][leaf] = None
        for (step, i, mark, _), tensors in zip(missing, copies):
            self._bytes["device"] -= step.bytes
            step.parts[i] = (mark, tensors)
            self._bytes["device"] += step.bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self._touch(leaf)
        return len(tokens)

    def reset(self):
        """Forgets all dialogs. Raises ValueError while a prefix is locked."""
        if any(child.locks for child in self._root.children.values()):
            raise ValueError("a prefix of this tree is still locked: unlock it before reset")
        self._root.children.clear()
        for place, held in self._held.items():
            for node in held:
                node.parent = None  # no circle: memory is free at once
            held.clear()
            self._bytes[place] = 0

    def _first_seen(self, i, length):
        """The first position that a query after `length` positions sees in the divisible layer i."""
        return 0 if self._reach[i] is None else max(0, length - self._reach[i] + 1)

    def _ends_at(self, node, length):
        """Whether the first `length` positions, start < length <= end, can be gone on from."""
        for i, cuts in enumerate(self._divisible):
            if not cuts and node is not self._root and (length < node.end or not node.parts[i][1]):
                return False
            step, low = node, self._first_seen(i, length)
            while cuts and step.end > low:
                if step.parts[i][0] > max(step.start, low):
                    return False
                step = step.parent
        return True

    def _descend(self, tokens):
        """(deepest node that has some of the tokens, how many of them there are from the root to there)."""
        node, at = self._root, 0
        while at == node.end and at < len(tokens) and tokens[at] in node.children:
            node = node.children[tokens[at]]
            at += common_length(node.tokens, tokens[at:at + len(node.tokens)])
        return node, at

    def _find(self, tokens):
        """As _descend, but only as far as the layers can go on from."""
        node, length = self._descend(tokens)
        while not self._ends_at(node, length):
            node = node.parent
            length = node.end
        return node, length

    def _parts(self, path, length, i):
        """Of layer i, the parts that a cache of the path's `length` positions takes in."""
        if not self._divisible[i]:
            return [path[-1].parts[i]] if path else []
        low, found = self._first_seen(i, length), []
        for mark, tensors in (step.parts[i] for step in path if step.end > low):
            found.append((max(mark, low), tuple(t[:, max(0, low - mark):] for t in tensors)))
        return found

    def _missing(self, leaf, new):
        """What leaf's path needs of a row's parts, `new`, so that its end can be found: (node, layer, mark, views)."""
        for i, (mark, tensors) in enumerate(new):
            if not self._divisible[i]:
                if not leaf.parts[i][1]:
                    yield leaf, i, mark, tensors
                continue
            low = self._first_seen(i, leaf.end)
            for step in leaf.path:
                if step.end > low and step.parts[i][0] > max(step.start, low):
                    first = max(step.start, mark)
                    yield step, i, first, tuple(t[:, first - mark:step.end - mark] for t in tensors)

    def _check(self, tokens, cache, row):
        """Raises ValueError where a row of a cache has not read these tokens, or cannot be stored here."""
        if type(cache) is not Cache or [layer.layout for layer in cache.layers] != self._layout:
            raise ValueError("the cache is not of this tree's model: its layers differ in kind, size, type or device")
        if cache.prefix:
            raise ValueError(f"the cache's first {cache.prefix} positions saw one another: their keys are not those of "
                             "a dialog that reads from left to right")
        n = int(cache.last[row]) + 1 if cache.ragged else cache.length
        if n != len(tokens):
            raise ValueError(f"row {row} of the cache has read {n} positions, but there are {len(tokens)} tokens; one "
                             "that was drawn last is not read yet")

    def _check_locked(self, prefix):
        if prefix.tree is not self or prefix.node is None:
            raise ValueError("the prefix is not locked, or not in this tree")

    def _pin(self, node, n):
        for step in node.path:
            step.locks += n

    @contextmanager
    def _pinned(self, node):
        """Neither it nor what is above it leaves; then it is used now."""
        self._pin(node, 1)
        try:
            yield
        finally:
            self._pin(node, -1)
            self._touch(node)

    def _touch(self, node):
        """Used now: children go before parents, so the path is put last from its end on."""
        for step in reversed(node.path):
            self._held[step.place].move_to_end(step)

    def _make_room(self, place, size):
        """Frees `size` bytes at a place. False, and then nothing has changed, where locked nodes leave less."""
        budget, held = self._budgets[place], self._held[place]
        if budget is None or self._bytes[place] + size <= budget:
            return True
        if sum(node.bytes for node in held if node.locks) + size > budget:
            return False
        while self._bytes[place] + size > budget:
            node = next(node for node in held if not node.locks)  # its children went before it
            if place == "host" or not self._make_room("host", node.bytes):
                self._drop(node)
            elif node.parent is not None:  # else it went with the last of its children
                self._move(node, "host")
        return True

    def _move(self, node, place):
        """To the other place. The copies come first: should one fail, nothing is lost."""
        parts = [(mark, _copies(tensors, self._devices[place])) for mark, tensors in node.parts]
        self._leave(node)
        node.parts, node.place = parts, place
        self._held[place][node] = None
        self._bytes[place] += node.bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _leave(self, node):
        del self._held[node.place][node]
        self._bytes[node.place] -= node.bytes

    def _drop(self, node):
        """Forgets a node, what lies below it, and what above it then leads nowhere."""
        gone = [node]
        for step in gone:
            gone += step.children.values()
        while gone:
            parent = node.parent
            del parent.children[node.tokens[0]]
            for step in gone:
                self._leave(step)
                step.parent = None
            used = parent is self._root or parent.children or parent.locks or self._ends_at(parent, parent.end)
            node, gone = parent, [] if used else [parent]

    def _split(self, node, length):
        """Cuts a node where `length` positions end. Returns the new first part, used now; `node` stays the last one."""
        heads, tails, n = [], [], length - node.start
        for cuts, (mark, tensors) in zip(self._divisible, node.parts):
            if not cuts or mark >= length:  # all of it is the last part's
                heads.append((length, ()))
                tails.append((mark, tensors))
            else:
                device = self._devices[node.place]
                heads.append((mark, _copies([t[:, :length - mark] for t in tensors], device)))
                tails.append((length, _copies([t[:, length - mark:] for t in tensors], device)))
        first = _Node(node.tokens[:n], node.parent, heads, node.place)
        first.locks, first.children[node.tokens[n]] = node.locks, node
        node.parent.children[first.tokens[0]] = first
        node.tokens, node.parent, node.start, node.parts = node.tokens[n:], first, length, tails
        self._held[node.place][first] = None
        self._touch(first)
        return first


def _copies(tensors, device):
    """Tensors of their own, not views of what may be larger."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t) for t in tensors)


def _as_tokens(tokens):
    """Any sequence of integers as a tuple of them. Raises TypeError for another."""
    return tuple(map(operator.index, tokens.tolist() if torch.is_tensor(tokens) else tokens))


def common_length(a, b):
    """How many first tokens two tuples have in common."""
    return len(a) if a == b else next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def standing(cache, lengths):
    """The cache, told how many positions each of its rows has read."""
    cache.length = max(lengths)
    if min(lengths) < cache.length:
        with torch.inference_mode(False):
            cache.last = torch.tensor(lengths, device=cache.layers[0].device).unsqueeze(1) - 1           # (B, 1)
    return cache
