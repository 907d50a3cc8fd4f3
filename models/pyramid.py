"""The Hourglass (Nawrot et al. 2021), causal: shorten above 1."""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import expect
from model import Positions, Transformer
from nanolab.cache import Cache


def check(config):
    """Raises ValueError for settings that do not go with layers of two lengths."""
    c, said = config, f"shorten {config.shorten} makes a pyramid, which"
    expect(c.n_layer >= 3, f"{said} needs at least 3 layers, not {c.n_layer}")
    expect(not c.short_conv, f"{said} has layers whose neighbours are units: short_conv does not go with it")
    expect(not c.value_residual, f"{said} has layers of two lengths: value_residual does not go with it")
    expect(not c.carries, f"{said} starts afresh with every block: mixer {c.mixer!r} does not go with it")
    expect(c.positions != "learned_per_layer" and not c.intermediate_losses and not c.mtp_depth,
           f"{said} has layers of two lengths: neither positions 'learned_per_layer' nor intermediate_losses nor "
           "mtp_depth go with it")


class PyramidCache:
    """Of a Pyramid: caches of its outer and of its middle layers, and the streams between them, by position; the
    methods of Cache, for rows that stand alike."""
    ragged, window = False, None

    def __init__(self, outer, middle, stream, lifted, shorten):
        self.outer, self.middle, self.stream, self.lifted, self.shorten = outer, middle, stream, lifted, shorten
        self.length, self.prefix = 0, 0

    @property
    def layers(self):
        """All layer caches: outer, then middle."""
        return self.outer.layers + self.middle.layers

    @property
    def bytes(self):
        """Bytes of storage held."""
        return self.outer.bytes + self.middle.bytes + self.stream.nbytes + self.lifted.nbytes

    def check(self, index, ordered):
        """Raises ValueError for ragged rows."""
        if index is not None:
            raise ValueError("a pyramid's rows must stand alike: rows with padding begin their units at other places")
        self.outer.check(None, ordered)
        self.middle.check(None, ordered)

    def reset(self):
        """Forgets everything; the storage stays."""
        self.outer.reset(), self.middle.reset()
        self.length = self.prefix = 0

    def crop(self, length):
        """Keeps the first `length` positions, and the units that end among them. Raises as Cache.crop does."""
        self.outer.crop(length)
        self.middle.crop(length // self.shorten)
        self.length = length

    def fork(self, n=1):
        """An independent copy with each row repeated n times."""
        twin = copy.copy(self)
        twin.outer, twin.middle = self.outer.fork(n), self.middle.fork(n)
        twin.stream, twin.lifted = (t.repeat_interleave(n, 0) for t in (self.stream, self.lifted))
        return twin

    def log(self):
        """Lines of text, as Cache.log: the outer layers, then the middle ones."""
        return self.outer.log() + self.middle.log()[1:]


class Pyramid(Transformer):
    """Hourglass (Nawrot et al. 2021), causal: outer layers see every position, middle layers one unit for `shorten`.

    The first and the last quarter of the layers (at least one) are outer. `shorten` = k neighbouring states become a
    unit by one matrix; a middle layer's output is lifted to k places by another and added to the stream, beginning with
    the unit's last position, so that no position sees a unit with later bytes in it. Same face as Transformer, but rows
    stand alike, and nothing slides.
    """

    @property
    def edge(self):
        """Outer layers before the middle ones, and after."""
        return max(1, self.config.n_layer // 4)

    def forward(self, x, targets=None, active=None, positions=None, cache=None, prefix=None, window=None, memory=None):
        """As Transformer.forward. Raises ValueError for ragged positions, a prefix, a window and a memory."""
        expect((positions is None or positions.dim() == 1) and prefix is None and memory is None
               and (window is None or window >= x.size(1)),
               "a pyramid takes rows that stand alike, without prefix, window or memory")
        c, k = self.config, self.config.shorten
        positions = self.place(x, positions, cache)
        if targets is not None:
            active = self.check_losses(x, targets, active)
        B, T = x.shape
        start, first, last = positions.start, positions.start // k, (positions.start + T) // k
        expect(cache is not None or not start,
               "a pyramid's pass without a cache begins at position 0: units are counted from there")
        h = self.embedded(x, positions)  # (B, T, C)
        outer = [None] * (2 * self.edge) if cache is None else cache.outer.layers
        middle = [None] * c.n_layer if cache is None else cache.middle.layers
        for block, layer_cache in zip(self.blocks[:self.edge], outer):
            h = self.layer(block, h, positions, layer_cache)
        stream = h
        if cache is not None:
            cache.stream[:, start:start + T] = h.detach()
            stream = cache.stream[:, first * k:last * k]
        n, u = last - first, h[:, :0]
        if n:
            u = self.shortening["into"](stream[:, :n * k].reshape(B, n, k * c.n_embd))  # (B, n, C)
            units = Positions(first, n)
            units.look_up_ropes(self.ropes, last)
            for block, layer_cache in zip(self.blocks[self.edge:c.n_layer - self.edge], middle):
                u = self.layer(block, u, units, layer_cache)
            u = self.shortening["out"](u).view(B, n * k, c.n_embd)
        if cache is None:
            lifted = F.pad(u, (0, 0, k - 1, T))[:, :T]
        else:
            cache.lifted[:, first * k + k - 1:last * k + k - 1] = u.detach()
            lifted = cache.lifted[:, start:start + T]
            cache.outer.advance(positions)
            if n:
                cache.middle.advance(units)
            cache.length += T
        h = h + lifted
        for block, layer_cache in zip(self.blocks[c.n_layer - self.edge:], outer[self.edge:]):
            h = self.layer(block, h, positions, layer_cache)
        if targets is not None:
            objective, nats = self.losses([h], targets, active)
            return objective + self.extra_losses(h, targets, positions), nats
        return self.predict(h)

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None, snapshots=0):
        """An empty PyramidCache. Raises ValueError for a window: units are counted from position 0."""
        if window is not None:
            raise ValueError("a pyramid does not slide: its units are counted from position 0")
        c, k = self.config, self.config.shorten
        whole = super().new_cache(batch_size, max_length, None, device, dtype, snapshots)
        inner = range(self.edge, c.n_layer - self.edge)
        middle = Cache((self.blocks[i].mixer.new_cache(batch_size, max(1, max_length // k), None, self.embed.device
                                                       if device is None else device, whole.layers[0].k.dtype)
                        for i in inner), None, snapshots)
        outer = Cache((layer for i, layer in enumerate(whole.layers) if i not in inner), None, snapshots)
        with torch.inference_mode(False):
            stream, lifted = (torch.zeros(batch_size, n, c.n_embd, device=whole.layers[0].k.device,
                                          dtype=self.embed.dtype) for n in (max_length, max_length + k))
        return PyramidCache(outer, middle, stream, lifted, k)

    def flops_per_token(self, T, active=None):
        """As Transformer.flops_per_token; middle layers work once for `shorten` positions."""
        inner = nn.ModuleList(self.blocks[self.edge:self.config.n_layer - self.edge])
        k = self.config.shorten

        def cost(module, length):
            hidden = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            return 6 * hidden + 3 * sum(m.flops(length) for m in module.modules() if hasattr(m, "flops"))
        return int(super().flops_per_token(T, active) - cost(inner, T) + cost(inner, T // k) / k
                   - cost(self.shortening, T) * (1 - 1 / k))
