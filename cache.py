"""What generation remembers: one KVCache per attention layer, and Cache, the list of them that a model's forward takes.

Shapes: B batch, H key-value heads, T new keys, S visible keys, D head size. Nothing here holds gradients: what enters
is detached, and storage is written in place, inside or outside `torch.inference_mode`.
"""
import torch


class KVCache:
    """Keys and values of one attention layer, preallocated as two tensors (B, H, capacity, D).

    Without `window`, it holds at most `max_length` keys. With `window` = W, each query sees the last W positions, its
    own included, and the cache goes on for ever: storage is 2 W entries in a line, and when it is full the last W - 1
    move to its front, so that a key is moved about once in its life.

    `length` counts the keys appended so far, those evicted by the window included. `positions` is None while all rows
    stand at the same places, or (B, capacity) int64 for ragged rows, where -1 marks padding.

    Raises ValueError where max_length < 1 or window < 2.
    """

    def __init__(self, batch_size, n_kv_head, head_dim, max_length, window=None, device=None, dtype=None):
        if max_length < 1:
            raise ValueError(f"a cache needs room for at least one key: max_length is {max_length}")
        if window is not None and window < 2:
            raise ValueError(f"a sliding cache needs a window of at least 2 positions: window is {window}")
        self.max_length, self.window = max_length, window
        self.capacity = max_length if window is None else 2 * window
        shape = (batch_size, n_kv_head, self.capacity, head_dim)
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference_mode
            self.k = torch.empty(shape, device=device, dtype=dtype)
            self.v = torch.empty(shape, device=device, dtype=dtype)
        self.positions = None
        self._evicted = self._filled = 0

    @property
    def length(self):
        """Keys appended so far, evicted ones included."""
        return self._evicted + self._filled

    @property
    def bytes(self):
        """Bytes of storage held, whether filled or not."""
        return self.k.nbytes + self.v.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def update(self, k, v, positions=None):
        """Appends k and v, both (B, H, T, D), and returns (keys, values, key positions) of all that T queries may see.

        positions: (B, T) int64 for ragged rows, else None. Keys and values are (B, H, S, D), views of the storage where
        possible; key positions are (B, S) int64 or None. With a window S <= W - 1 + T, and for T > 1 the caller still
        masks each query to its own band. Raises ValueError where the cache is full and has no window.
        """
        T = k.size(2)
        if self._filled + T > self.capacity and self.window is None:
            raise ValueError(f"the cache is full: {self.length} keys and {T} more exceed max_length {self.max_length}; "
                             "make it longer, or give it a window")
        if positions is not None and self.positions is None:
            self._start_positions()
        if k.requires_grad:
            k, v = k.detach(), v.detach()
        if self._filled + T > self.capacity:
            keep = min(self._filled, self.window - 1)
            if keep + T > self.capacity:
                return self._update_long(k, v, positions, keep)
            self._retain(keep)
        start, end = self._filled, self._filled + T
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        if positions is not None:
            self.positions[:, start:end] = positions
        self._filled = end
        first = 0 if self.window is None else max(0, end - (self.window - 1 + T))
        seen = None if self.positions is None else self.positions[:, first:end]
        return self.k[:, :, first:end], self.v[:, :, first:end], seen

    def reset(self):
        """Forgets everything; the storage stays."""
        self.positions = None
        self._evicted = self._filled = 0

    def crop(self, length):
        """Keeps the first `length` keys. Raises ValueError where there are fewer, or the window needs evicted ones."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop to {length} keys: the cache holds {self.length}")
        if length == 0 and self._evicted == 0:
            return self.reset()
        if self.window is not None and self._evicted > max(0, length - (self.window - 1)):
            raise ValueError(f"cannot crop to {length} keys: the first {self._evicted} were evicted, and a window of "
                             f"{self.window} needs some of them")
        self._filled = length - self._evicted

    def fork(self, n=1):
        """An independent copy, each row repeated n times in a row: (n B, H, capacity, D)."""
        twin = object.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            for name in ("k", "v", "positions"):
                if (held := getattr(self, name)) is not None:
                    setattr(twin, name, held.repeat_interleave(n, 0))
        return twin

    def in_order(self, positions):
        """Whether positions (B, T) never fall within a row, nor below what the row holds, as eviction by age needs."""
        if self._filled:
            held = self.length - 1 if self.positions is None else self.positions[:, self._filled - 1:self._filled]
            positions = torch.cat((torch.zeros_like(positions[:, :1]) + held, positions), 1)  # (B, 1 + T)
        return bool((positions[:, 1:] >= positions[:, :-1]).all())

    def next_positions(self, T):
        """(B, T) int64: where ragged rows go on, each after its own last position."""
        last = self.positions[:, :self._filled].amax(1, keepdim=True)
        return last + torch.arange(1, T + 1, device=last.device)  # (B, T)

    def _start_positions(self):
        """From now on rows are ragged: what is held already stands at consecutive positions in every row."""
        with torch.inference_mode(False):
            held = torch.arange(self._evicted, self._evicted + self.capacity, device=self.k.device)
            self.positions = held.repeat(self.k.size(0), 1)  # (B, capacity)

    def _retain(self, keep):
        """Moves the last `keep` entries to the front and evicts the rest."""
        for held in (self.k, self.v) if self.positions is None else (self.k, self.v, self.positions.unsqueeze(1)):
            held[:, :, :keep] = held[:, :, self._filled - keep:self._filled].clone()  # the two places may overlap
        self._evicted += self._filled - keep
        self._filled = keep

    def _update_long(self, k, v, positions, keep):
        """A chunk longer than the storage: its queries see a joined copy, and only the chunk's end is stored."""
        def join(held, new):
            return torch.cat((held[..., self._filled - keep:self._filled, :], new.to(held.dtype)), -2)
        keys, values = join(self.k, k), join(self.v, v)
        seen = None if positions is None else join(self.positions.unsqueeze(-1), positions.unsqueeze(-1)).squeeze(-1)
        length, tail = self.length + k.size(2), self.window - 1
        self.k[:, :, :tail] = keys[:, :, -tail:]
        self.v[:, :, :tail] = values[:, :, -tail:]
        if seen is not None:
            self.positions[:, :tail] = seen[:, -tail:]
        self._filled, self._evicted = tail, length - tail
        return keys, values, seen


class Cache:
    """One KVCache per layer, with the same methods; what `model.new_cache` returns and `model.forward` takes.

    All layers hold the same positions, so `length`, `window` and `ragged` speak for each of them.
    """

    def __init__(self, layers):
        self.layers = list(layers)

    @property
    def length(self):
        """Positions appended so far to every layer."""
        return self.layers[0].length

    @property
    def window(self):
        """Positions that a query sees, its own included; None: all."""
        return self.layers[0].window

    @property
    def ragged(self):
        """True once rows were given positions of their own."""
        return self.layers[0].positions is not None

    @property
    def bytes(self):
        """Bytes of storage over all layers."""
        return sum(layer.bytes for layer in self.layers)

    def reset(self):
        """Forgets everything; the storage stays."""
        for layer in self.layers:
            layer.reset()

    def crop(self, length):
        """Keeps the first `length` positions. Raises ValueError as KVCache.crop does."""
        for layer in self.layers:
            layer.crop(length)

    def fork(self, n=1):
        """An independent copy with each row repeated n times: one prefill, n continuations."""
        return Cache(layer.fork(n) for layer in self.layers)

    def next_positions(self, T):
        """(B, T) int64: where ragged rows go on, each after its own last position."""
        return self.layers[0].next_positions(T)

    def in_order(self, positions):
        """Whether positions (B, T) never fall within a row, as a sliding cache needs."""
        return self.layers[0].in_order(positions)
