"""Causal depthwise convolutions over time."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import add_parameter
from nanolab.cache import KVCache


def convolve(line, kernel, T, y, age=None):
    """y plus the depthwise causal convolution of the last T of line (B, K - 1 + T, I) by kernel (K, I), whose last row
    is for the position itself: (B, T, I). age: (B, T, 1), of how many before it a position sees at most; None: all."""
    for k in range(len(kernel)):
        seen = line[:, k:k + T]
        if age is not None:
            seen = seen.masked_fill(age < len(kernel) - 1 - k, 0)
        y = torch.addcmul(y, seen, kernel[k])
    return y


class ShortConv(nn.Module):
    """A depthwise causal convolution over the normed inputs of a layer's mixer, y_t = sum_(i < w) k_i x_(t-i), with
    w = config.short_conv rows k_i of `kernel` (w, C) and no bias, as in Zoology (Arora et al. 2023).

    Before a row's first input stand zeros; padding is left out, wherever it stands. It never looks ahead, inside a
    prefix either. One segment of training goes on from the last w - 1 hidden states of the one before, normed anew, in
    layers of full attention too. Cache: the inputs of old, as attention over w positions would keep keys.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.width = config.short_conv
        self.slot = config.n_layer + layer  # its place in a Memory: after those of all mixers
        add_parameter(self, "kernel", 0.0, self.width, config.n_embd)

    def init_weights(self):
        """U(-1, 1) / sqrt(w)."""
        self.kernel.uniform_(-self.width ** -0.5, self.width ** -0.5)

    def over(self, x, before=None, age=None):
        """x (B, T, C) to (B, T, C), with zeros before, or after the last of `before` (B, n, C); age as Positions'."""
        n = self.width - 1
        line = x if before is None else torch.cat((before[:, max(0, before.size(1) - n):], x), 1)
        line = F.pad(line, (0, 0, n + x.size(1) - line.size(1), 0))  # (B, w - 1 + T, C)
        return convolve(line, self.kernel.flip(0).to(x.dtype), x.size(1), x.new_zeros(()), age)

    def forward(self, x, positions, cache=None, hidden=None, norm=None):
        """x (B, T, C) to (B, T, C), going on from the cache, or the memory, or nothing; cache from new_cache.

        hidden (B, T, C), norm: the states that x was made of, and by which norm; a memory keeps these states.
        Raises ValueError where every position sees every other.
        """
        if positions.bidirectional:
            raise ValueError("short_conv reads from left to right: it does not go with a model that sees everything at "
                             "once")
        T, n = positions.T, self.width - 1
        before = key_positions = None  # (B, m, C), (B, m): what stands before x
        if cache is not None:
            inputs, _, key_positions = cache.update(x.unsqueeze(1), x[:, None, :, :0], positions.index)
            before = inputs[:, 0, :inputs.size(2) - T].to(x.dtype)
        elif positions.memory is not None:
            kept, = positions.memory[self.slot]
            positions.memory_out[self.slot] = (torch.cat((kept, hidden), 1)[:, -n:],)
            before = norm(kept[:, n - min(n, positions.remembered):].to(hidden.dtype)).to(x.dtype)
        order, age = None, positions.age
        if positions.index is not None:
            order, back, _ = positions.real_first
            x, age = x.take_along_dim(order, 1), None if age is None else age.take_along_dim(order, 1)
            if before is not None:
                before = last_real(before, key_positions[:, :-T], n)
        y = self.over(x, before, age)
        return y if order is None else y.take_along_dim(back, 1)

    def new_cache(self, batch_size, max_length, beside, device, dtype):
        """A KVCache of one head with the inputs (as keys) and no values, kept as long as the keys of the mixer's cache
        `beside`; where that is a state, only those that the convolution sees."""
        window = self.width if not beside.divisible else beside.window and max(beside.window, self.width)
        cache = KVCache(batch_size, 1, self.kernel.size(1), max_length, window, device, dtype, value_dim=0)
        cache.kind = "inputs"
        return cache

    def new_memory(self, batch_size, device, dtype):
        """The hidden states of the last w - 1 positions: ((B, w - 1, C),)."""
        return (torch.zeros(batch_size, self.width - 1, self.kernel.size(1), device=device, dtype=dtype),)

    def flops(self, T):
        """Forward, of one token: 2 w C."""
        return 2 * self.kernel.numel()


def last_real(x, positions, n):
    """The last n or fewer of x (B, S, C) in each row whose positions (B, S) are no padding; zeros before."""
    real = positions >= 0
    order = real.byte().argsort(dim=1, stable=True)[:, -n:]  # padding first
    real = real.take_along_dim(order, 1)
    return x.take_along_dim(order.unsqueeze(2), 1).masked_fill(~real.unsqueeze(2), 0)
