"""What generation remembers: one cache per layer, and Cache, the list of them that a model's forward takes; and Memory,
what one segment of training leaves to the next.

Shapes: B batch, H key-value heads, T new keys, S visible keys, D head size. Nothing here holds gradients: what enters
is detached, and storage is written in place, inside or outside `torch.inference_mode`.

For dialogs a layer's cache gives rows away and takes them in: `row(b)` is (mark, tensors), row b without its batch
dimension; `fill(rows)` forgets everything and takes for each row (length, [such parts]), ragged where lengths differ;
`divisible`: the parts are keys that can be cut between any two positions, else a state, whole or nothing; `layout` is
equal where a part of one cache fits another.
"""
import copy

import torch


class LayerCache:
    """What the caches of one layer share; a subclass has `tensors()`, all that it holds, `kind`, `reset`, `fill`.

    `length`: positions appended so far, evicted ones included; `hits`: positions found instead of computed again, over
    all passes. Unless a subclass knows more, what is held is a state, whole or nothing: it cannot go back to an earlier
    length.
    """
    divisible, window = False, None
    room = 0  # positions that may be appended and cropped again

    @property
    def bytes(self):
        """Bytes of storage held, whether filled or not."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def batch_size(self):
        """Rows."""
        return self.tensors()[0].size(0)

    @property
    def dtype(self):
        """Type of what is held."""
        return self.tensors()[0].dtype

    @property
    def device(self):
        """Where it is."""
        return self.tensors()[0].device

    def croppable(self, length):
        """Whether it can go back to length; of length 0: whether nothing is ever lost."""
        return False

    def fork(self, n=1):
        """An independent copy, each row repeated n times in a row: tensors (n B, ...)."""
        twin = copy.copy(self)
        with torch.inference_mode(False):
            for name, value in vars(self).items():
                if torch.is_tensor(value):
                    setattr(twin, name, value.repeat_interleave(n, 0))
                elif name == "states":
                    twin.states = tuple(t.repeat_interleave(n, 0) for t in value)
        return twin

    def snapshot(self):
        """A copy from which `restore` comes back to this moment."""
        return self.fork()

    def restore(self, snapshot):
        """Back to when `snapshot` was taken; it may be restored again."""
        self.__dict__.update(snapshot.fork().__dict__, hits=self.hits)


class KVCache(LayerCache):
    """Keys and values of one attention layer, preallocated as two tensors (B, H, capacity, D).

    Without `window`, it holds at most `max_length` keys. With `window` = W, each query sees the last W positions, its
    own included, and the cache goes on for ever: storage is 2 W entries in a line, and when it is full the last W - 1
    move to its front, so that a key is moved about once in its life. `positions` is None while all rows stand alike, or
    (B, capacity) int64 for ragged rows, where -1 marks padding. Raises ValueError where max_length < 1 or window < 2.
    """
    divisible = True

    def __init__(self, batch_size, n_kv_head, head_dim, max_length, window=None, device=None, dtype=None,
                 value_dim=None):
        if max_length < 1:
            raise ValueError(f"a cache needs room for at least one key: max_length is {max_length}")
        if window is not None and window < 2:
            raise ValueError(f"a sliding cache needs a window of at least 2 positions: window is {window}")
        self.max_length, self.window = max_length, window
        self.capacity = max_length if window is None else 2 * window
        value_dim = head_dim if value_dim is None else value_dim
        shape = (batch_size, n_kv_head, self.capacity)
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference_mode
            self.k = torch.empty(*shape, head_dim, device=device, dtype=dtype)
            self.v = torch.empty(*shape, value_dim, device=device, dtype=dtype)
        self.positions = None
        self.kind = "keys" if window is None else "ring"
        self._evicted = self._filled = self.hits = 0

    @property
    def length(self):
        """Keys appended so far, evicted ones included."""
        return self._evicted + self._filled

    @property
    def room(self):
        """Positions that may be appended and cropped again: until then nothing is evicted."""
        return self.capacity - self._filled

    @property
    def layout(self):
        """Kind, window, heads and widths, type and device."""
        return self.kind, self.window, *self.k.shape[1::2], self.v.size(3), self.dtype, self.device

    def tensors(self):
        """Keys, values, and the positions of ragged rows."""
        return [self.k, self.v] if self.positions is None else [self.k, self.v, self.positions]

    def update(self, k, v, positions=None):
        """Appends k and v, both (B, H, T, D), and returns (keys, values, key positions) of all that T queries may see.

        positions: (B, T) int64 for ragged rows, else None. Keys and values are (B, H, S, D), views of the storage where
        possible; key positions (B, S) int64 or None. With a window S <= W - 1 + T: for T > 1 the caller masks each
        query to its band. Raises ValueError where the cache is full and has no window.
        """
        T = k.size(2)
        if self._filled + T > self.capacity and self.window is None:
            raise ValueError(f"the cache is full: {self.length} keys and {T} more exceed max_length {self.max_length}; "
                             "make it longer, or give it a window")
        if positions is not None and self.positions is None:
            self._start_positions()
        if k.requires_grad:
            k, v = k.detach(), v.detach()
        self.hits += self._filled if self.window is None else min(self._filled, self.window - 1)
        if self._filled + T > self.capacity:
            keep = min(self._filled, self.window - 1)
            if keep + T > self.capacity:
                return self._update_long(k, v, positions, keep)
            self._retain(keep)
        start, end = self._filled, self._filled + T
        self.k.narrow(2, start, T).copy_(k)
        self.v.narrow(2, start, T).copy_(v)
        if positions is not None:
            self.positions[:, start:end] = positions
        self._filled = end
        first = 0 if self.window is None else max(0, end - (self.window - 1 + T))
        seen = None if self.positions is None else self.positions[:, first:end]
        return self.k.narrow(2, first, end - first), self.v.narrow(2, first, end - first), seen

    def reset(self):
        """Forgets everything; the storage stays."""
        self.positions = None
        self._evicted = self._filled = 0

    def row(self, b):
        """What is held of row b, padding apart: (position of its first key, (keys (H, n, D), values (H, n, D'))).

        Views of the storage while no row is ragged. Raises ValueError where the row's positions have gaps.
        """
        k, v = self.k[b, :, :self._filled], self.v[b, :, :self._filled]  # (H, n, D)
        if self.positions is None:
            return self._evicted, (k, v)
        positions = self.positions[b, :self._filled]
        real = positions >= 0
        positions = positions[real].tolist()
        first = positions[0] if positions else 0
        if positions != list(range(first, first + len(positions))):
            raise ValueError(f"row {b} has keys that do not stand at consecutive positions")
        return first, (k[:, real], v[:, real])

    def fill(self, rows):
        """Holds for row b the keys and values that end its `length` positions, rows = [(length, [(mark, (k, v))])].

        Every k (H, n, D) and v (H, n, D'), in order; shorter rows are padded on the left, with zeros. Where lengths are
        equal, rows must bring equally many keys.
        """
        self.reset()
        sizes = [sum(k.size(1) for _, (k, _) in parts) for _, parts in rows]
        longest, self._filled = max(length for length, _ in rows), max(sizes)
        self._evicted = longest - self._filled
        for b, (_, parts) in enumerate(rows):
            at = self._filled - sizes[b]
            self.k[b, :, :at] = 0  # masked, but a number: nothing times infinity is not nothing
            self.v[b, :, :at] = 0
            for _, (k, v) in parts:
                self.k[b, :, at:at + k.size(1)] = k
                self.v[b, :, at:at + k.size(1)] = v
                at += k.size(1)
        if any(length != longest for length, _ in rows):
            self._start_positions()
            behind = torch.tensor([longest - length for length, _ in rows], device=self.k.device)
            with torch.inference_mode(False):
                self.positions = (self.positions - behind[:, None]).clamp(min=-1)  # (B, capacity)

    def crop(self, length):
        """Keeps the first `length` keys, above 0 and croppable."""
        self._filled = length - self._evicted

    def croppable(self, length):
        """Whether what a query after `length` keys sees is still held; of length 0: whether nothing is ever lost."""
        return self.window is None or length > 0 and self._evicted <= max(0, length - (self.window - 1))

    def _start_positions(self):
        """From now on rows are ragged: what is held already stands at consecutive positions in every row."""
        with torch.inference_mode(False):
            positions = torch.arange(self._evicted, self._evicted + self.capacity, device=self.k.device)
            self.positions = positions.repeat(self.k.size(0), 1)  # (B, capacity)

    def _retain(self, keep):
        """Moves the last `keep` entries to the front and evicts the rest."""
        for line in (self.k, self.v) if self.positions is None else (self.k, self.v, self.positions.unsqueeze(1)):
            line[:, :, :keep] = line[:, :, self._filled - keep:self._filled].clone()  # the two may overlap
        self._evicted += self._filled - keep
        self._filled = keep

    def _update_long(self, k, v, positions, keep):
        """A chunk longer than the storage: its queries see a joined copy, and only the chunk's end is stored."""
        def join(line, new):
            return torch.cat((line[..., self._filled - keep:self._filled, :], new.to(line.dtype)), -2)
        keys, values = join(self.k, k), join(self.v, v)
        seen = None if positions is None else join(self.positions.unsqueeze(-1), positions.unsqueeze(-1)).squeeze(-1)
        length, tail = self.length + k.size(2), self.window - 1
        self.k[:, :, :tail] = keys[:, :, -tail:]
        self.v[:, :, :tail] = values[:, :, -tail:]
        if seen is not None:
            self.positions[:, :tail] = seen[:, -tail:]
        self._filled, self._evicted = tail, length - tail
        return keys, values, seen


class RecurrentCache(LayerCache):
    """The state of one recurrent layer: a tuple of tensors (B, ...) of constant size, whatever the length."""
    kind = "state"

    def __init__(self, states):
        self.states, self.length, self.hits = tuple(states), 0, 0

    @property
    def layout(self):
        """Kind, and shape, type and device of each state."""
        return self.kind, *((t.shape[1:], t.dtype, t.device) for t in self.states)

    def tensors(self):
        """The states."""
        return self.states

    def update(self, states, T):
        """Takes the state after T more positions."""
        self.states = tuple(t.detach() for t in states)
        self.hits += self.length
        self.length += T

    def reset(self):
        """Back to the state of nothing."""
        self.states, self.length = tuple(torch.zeros_like(t) for t in self.states), 0

    def row(self, b):
        """(None, the states of row b)."""
        return None, tuple(t[b] for t in self.states)

    def fill(self, rows):
        """Takes the states of each row, rows = [(length, [(None, states)])]; with no states, those of nothing."""
        with torch.inference_mode(False):
            self.states = tuple(torch.stack([parts[0][1][i] if parts else torch.zeros_like(old[0])
                                             for _, parts in rows]) for i, old in enumerate(self.states))
        self.length = max(length for length, _ in rows)


class CompressedCache(LayerCache):
    """Of one Compressive layer: keys and values of the memory, those of compressed blocks, and a block's
    unfinished inputs.

    `rows` holds one state for all rows while they stand alike, else one for each row: {"raw": a sliding KVCache,
    "slots": [keys, values] (B, H, n, D) or None, "first", "known": the block of the first slot and the first unknown
    one, "inputs": (B, < rate, C) or None}. Its size does not depend on the length. The mixer writes the states.
    """
    kind, batch_size = "compressed", 0

    def __init__(self, batch_size, new_row):
        self.batch_size, self._new_row = batch_size, new_row
        self.rows, self.length, self.hits = [new_row(batch_size)], 0, 0

    @property
    def ragged(self):
        """True once rows stand at different places."""
        return len(self.rows) > 1

    def tensors(self):
        """Those of the memory, unfinished inputs and slots, row after row."""
        return [t for row in self.rows for t in (*row["raw"].tensors(), row["inputs"], *(row["slots"] or ()))
                if t is not None]

    @property
    def layout(self):
        """Kind, and that of the memory."""
        return self.kind, self.rows[0]["raw"].layout

    def row(self, b):
        """(blocks known, (keys and values of the memory, unfinished inputs, keys and values of the slots)) of row b,
        which must have read something."""
        state, b = (self.rows[b], 0) if self.ragged else (self.rows[0], b)
        _, (k, v) = state["raw"].row(b)
        tail = state["raw"].window - 1
        slots = [t[b] for t in state["slots"]] if state["slots"] else [k[:, :0], v[:, :0]]
        return state["known"], (k[:, -tail:], v[:, -tail:], state["inputs"][b], *slots)

    def fill(self, rows):
        """Takes each row's state, rows = [(length, [(blocks known, tensors)])] as `row` gives them."""
        alike = len({length for length, _ in rows}) == 1
        self.rows = [self._joined(group) for group in ([rows] if alike else [[row] for row in rows])]
        self.length = max(length for length, _ in rows)

    def _joined(self, rows):
        """One state of rows of one length."""
        state, length = self._new_row(len(rows)), rows[0][0]
        if length:
            known = rows[0][1][0][0]
            k, v, *others = zip(*(parts[0][1] for _, parts in rows))
            state["raw"].fill([(length, [(None, pair)]) for pair in zip(k, v)])
            with torch.inference_mode(False):
                inputs, *slots = (torch.stack(part) for part in others)
            state.update(inputs=inputs, slots=slots if slots[0].size(2) else None, known=known,
                         first=known - slots[0].size(2))
        return state

    def each_row(self):
        """A state for each row, to be written by the mixer."""
        if len(self.rows) < self.batch_size:
            whole = self.rows[0]
            self.rows = [self._copy(whole, slice(b, b + 1)) for b in range(self.batch_size)]
        return self.rows

    def advance(self, positions):
        """After a pass of the mixer over positions.T inputs."""
        self.hits += self.length
        self.length += positions.T

    def reset(self):
        """Forgets everything."""
        self.rows, self.length = [self._new_row(self.batch_size)], 0

    def fork(self, n=1):
        """An independent copy, each row repeated n times in a row."""
        twin, times = copy.copy(self), n.tolist() if torch.is_tensor(n) else [n] * self.batch_size
        twin.batch_size = sum(times)
        if self.ragged:
            twin.rows = [self._copy(row) for row, n in zip(self.rows, times) for _ in range(n)]
        else:
            twin.rows = [self._copy(self.rows[0], n=n)]
        return twin

    @staticmethod
    def _copy(row, part=slice(None), n=1):
        """A state of its own: some rows of another, each n times."""
        def pick(t):
            return t[part].repeat_interleave(n, 0)
        raw = row["raw"].fork(n)
        if part != slice(None):
            raw.k, raw.v = raw.k[part].clone(), raw.v[part].clone()
        return {"raw": raw, "inputs": None if row["inputs"] is None else pick(row["inputs"]), "known": row["known"],
                "slots": None if row["slots"] is None else [pick(t) for t in row["slots"]], "first": row["first"]}


class Cache:
    """One LayerCache per layer, with the same methods; what `model.new_cache` returns and `model.forward` takes.

    window: positions that layers of full attention see, their own included; None: all. snapshots: before each of the
    latest so many passes, what layers would forget is kept, so that `crop` can go back to where those passes began.
    """

    def __init__(self, layers, window=None, snapshots=0):
        self.layers, self.window, self.snapshots = list(layers), window, snapshots
        self.length, self.prefix = 0, 0
        self.last = None  # (B, 1) int64, the last position of each row, once rows are ragged
        self._kept = []  # (length, last, snapshots of the layers)

    @property
    def ragged(self):
        """True once rows were given positions of their own."""
        return self.last is not None

    @property
    def bytes(self):
        """Bytes of storage over all layers, snapshots apart."""
        return sum(layer.bytes for layer in self.layers)

    def check(self, index, ordered):
        """Before a pass. index: (B, T) its positions, or None. ordered: some layer needs them in order.

        Raises ValueError where a row's positions fall, or padding follows a byte, and a layer forgets by age.
        """
        if index is not None and (ordered or self.window is not None) and not self.in_order(index):
            raise ValueError("a sliding cache needs rows padded on the left: each row's positions must never fall")
        if self.snapshots:
            kept = [None if layer.croppable(0) else layer.snapshot() for layer in self.layers]
            self._kept = [old for old in self._kept if old[0] < self.length] + [(self.length, self.last, kept)]
            del self._kept[:-self.snapshots]

    def advance(self, positions):
        """After a pass: counts its positions, a Positions."""
        index = positions.index
        self.length += positions.T
        if index is not None:
            newest = index.amax(1, keepdim=True)
            self.last = newest if self.last is None else torch.maximum(newest, self.last)

    def reset(self):
        """Forgets everything; the storage stays."""
        self.length, self.prefix, self.last, self._kept = 0, 0, None, []
        for layer in self.layers:
            layer.reset()

    def crop(self, length):
        """Keeps the first `length` positions, 0 <= length <= self.length.

        Raises ValueError for other lengths, inside a prefix whose positions saw one another, and where a layer has
        forgotten what it knew there and no snapshot was taken at this length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} positions: the cache holds {self.length}")
        if 0 < length < self.prefix:
            raise ValueError(f"cannot crop to {length}: the {self.prefix} positions of the prefix saw one another")
        if length == 0:
            return self.reset()
        if length == self.length:
            return
        found = next((kept for kept in self._kept if kept[0] == length), None)
        if found is None and not all(layer.croppable(length) for layer in self.layers):
            at = ", ".join(str(kept[0]) for kept in self._kept if kept[0]) or "none"
            raise ValueError(f"cannot crop to {length} positions: a layer has forgotten what it knew there; snapshots "
                             f"at {at} (new_cache(..., snapshots=n) keeps more)")
        for i, layer in enumerate(self.layers):
            if layer.croppable(length):
                layer.crop(length)
            else:
                layer.restore(found[2][i])
        self.length = length
        if self.ragged:
            self.last = self._last_at(length, found)
        self._kept = [kept for kept in self._kept if kept[0] <= length]

    def _last_at(self, length, found):
        """The rows' last positions (B, 1) once cropped to length."""
        if found is not None:
            return found[1] if found[1] is not None else torch.full_like(self.last, length - 1)
        layer = next(layer for layer in self.layers if getattr(layer, "positions", None) is not None)
        return layer.positions[:, :layer._filled].amax(1, keepdim=True)

    def fork(self, n=1):
        """An independent copy with each row repeated n times: one prefill, n continuations. Snapshots stay behind.

        n: an int, or (B,) int64, how often each row: 0 drops it.
        """
        twin = copy.copy(self)
        twin.layers, twin._kept = [layer.fork(n) for layer in self.layers], []
        twin.last = None if self.last is None else self.last.repeat_interleave(n, 0)
        return twin

    def next_positions(self, T):
        """(B, T) int64: where ragged rows go on, each after its own last position."""
        return self.last + torch.arange(1, T + 1, device=self.last.device)  # (B, T)

    def in_order(self, positions):
        """Whether positions (B, T) never fall within a row, nor below what it holds: forgetting by age needs it."""
        if self.length:
            last = self.length - 1 if self.last is None else self.last
            positions = torch.cat((torch.zeros_like(positions[:, :1]) + last, positions), 1)  # (B, 1 + T)
        return bool((positions[:, 1:] >= positions[:, :-1]).all())

    def log(self):
        """Lines of text, one per layer: kind, length, bytes, hits; and their sum."""
        lines = [f"{'layer':>5}  {'cache':<12} {'length':>9} {'bytes':>13} {'hits':>13}"]
        lines += [f"{i:>5}  {layer.kind:<12} {layer.length:>9,} {layer.bytes:>13,} {layer.hits:>13,}"
                  for i, layer in enumerate(self.layers)]
        hits = sum(layer.hits for layer in self.layers)
        return lines + [f"{'all':>5}  {'':<12} {self.length:>9,} {self.bytes:>13,} {hits:>13,}"]


class Memory:
    """What one segment of training leaves to the next: per layer a tuple of detached tensors.

    `model.new_memory` makes it empty; `model.forward(..., memory=memory)` reads it and leaves the new one. `length`
    counts the positions since the streams began; tensors of empty memory are zeros that a layer masks by it. `kind`
    says what the tensors are, where they are not states alone: another kind of the same shapes is not gone on from.
    """

    def __init__(self, layers, kind=None):
        self.layers, self.length, self.kind = [tuple(tensors or ()) for tensors in layers], 0, kind

    @property
    def bytes(self):
        """Bytes over all layers."""
        return sum(t.nbytes for tensors in self.layers for t in tensors)

    def update(self, positions):
        """After a pass: takes what the layers left in positions.memory_out, {layer: tensors}."""
        self.layers = [tuple(t.detach().to(old.dtype) for t, old in
                             zip(positions.memory_out.get(i, ()), tensors, strict=True))
                       for i, tensors in enumerate(self.layers)]
        self.length += positions.T

    def reset(self):
        """Forgets everything: a new list, since an unfinished backward pass may still read the old one."""
        self.layers = [tuple(torch.zeros_like(t) for t in tensors) for tensors in self.layers]
        self.length = 0

    def state_dict(self):
        """Tensors and numbers from which load_state_dict goes on exactly."""
        return {"length": self.length, "layers": [list(tensors) or None for tensors in self.layers],
                **({"kind": self.kind} if self.kind else {})}

    def load_state_dict(self, state):
        """Goes on where state was taken; begins empty, and says so, where that is of another kind (checkpoints from
        when memories kept the inputs of mixers do not name theirs). Raises ValueError where its shapes are others."""
        if state.get("kind") != self.kind:
            print(f"the saved memory does not hold {self.kind or 'states'}, as this version does: it begins empty")
            return self.reset()
        saved = [tensors or () for tensors in state["layers"]]
        shapes = [[[t.shape for t in tensors] for tensors in layers] for layers in (self.layers, saved)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the saved memory has the shapes {shapes[1]}, this one {shapes[0]}")
        self.layers = [tuple(t.to(mine) for t, mine in zip(*pair)) for pair in zip(saved, self.layers)]
        self.length = state["length"]
