"""Mixers that carry a state instead of keys: a parallel scan, minGRU, Mamba.

Shapes: B batch, T time, C width, I inner width, N states per feature. States are float32, whatever the rest is.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import kernels
from kernels import expect
from model import Linear
from models.short_conv import convolve
from nanolab.cache import RecurrentCache


def check(config):
    """Raises ValueError where a state would have no width."""
    expect(config.expand * config.n_embd >= 1,
           f"expand {config.expand} leaves no inner width at n_embd {config.n_embd}")


# --- The scan ---

def _scan(a, b, h):
    """kernels.scan_reference in about 2 sqrt(T) steps: inside all pieces of sqrt(T) at once, then over the pieces.

    A piece's states are its own scan from zero, plus the running products of a times the state before the piece.
    """
    T = a.size(1)
    n = max(1, math.isqrt(T))
    pieces = -(-T // n)
    if pieces * n > T:  # states past the end are cut off again
        pad = (0, 0) * (a.dim() - 2) + (0, pieces * n - T)
        a, b = F.pad(a, pad), F.pad(b, pad)
    shape = (a.size(0), pieces, n, *a.shape[2:])
    a, b = a.reshape(shape), b.reshape(shape)
    products, states = a.clone(), b.clone()
    for t in range(1, n):
        products[:, :, t].mul_(products[:, :, t - 1])
        states[:, :, t].addcmul_(a[:, :, t], states[:, :, t - 1])
    for p in range(pieces):
        states[:, p].addcmul_(products[:, p], h.unsqueeze(1))
        h = states[:, p, -1]
    return states.view(shape[0], pieces * n, *shape[3:])[:, :T]


class Scan(torch.autograd.Function):
    """`scan` with its gradient: g_t = dh_t + a_(t+1) g_(t+1), the same scan from right to left; da_t = g_t h_(t-1)."""

    @staticmethod
    def forward(ctx, a, b, h):
        states = _scan(a, b, h)
        ctx.save_for_backward(a, h, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        a, h, states = ctx.saved_tensors
        later = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1).flip(1)
        g = _scan(later, grad.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat((h.unsqueeze(1), states[:, :-1]), 1)
        return g * before, g, a[:, 0] * g[:, 0]


def scan(a, b, h=None):
    """h_t = a_t h_(t-1) + b_t along dimension 1, in parallel, with gradients.

    a, b (B, T, ...) of one shape and type (float32 or float64), h (B, ...) the state before, None: zeros. Returns all
    states (B, T, ...).
    """
    h = torch.zeros_like(b[:, 0]) if h is None else h
    return (Scan.apply if a.requires_grad or b.requires_grad or h.requires_grad else _scan)(a, b, h)


# --- What both mixers share ---

class Recurrent(nn.Module):
    """A mixer whose past is a state: where it comes from, where it goes, and rows with padding.

    A subclass has `run(x, states) -> (y, states)` on x (B, T, C) without padding, with `real` (B, T) bool or None:
    where False, the input must change no state; with `age` as Positions has it, or None: where it is 0 the state before
    is forgotten; and `shapes`, its states' shapes without the batch.
    """

    def forward(self, x, positions, cache=None):
        """x (B, T, C) to (B, T, C), going on from the cache's state, or the memory's, or nothing.

        Raises ValueError where positions look ahead: a state reads from left to right.
        """
        if positions.bidirectional or positions.prefix is not None:
            raise ValueError("a recurrent mixer reads from left to right: it sees neither ahead nor a whole prefix")
        before = (cache.states if cache is not None else positions.memory[self.layer] if positions.memory is not None
                  else self.new_memory(x.size(0), x.device, x.dtype))
        age = positions.age
        if positions.index is None:
            y, after = self.run(x, before, age=age)
        else:
            order, back, real = positions.real_first
            age = None if age is None else age.take_along_dim(order, 1).masked_fill(~real, 1)  # padding forgets nothing
            y, after = self.run(x.take_along_dim(order, 1), before, real[..., 0], age)
            y = y.take_along_dim(back, 1)
        if cache is not None:
            cache.update(after, positions.T)
        elif positions.memory is not None:
            positions.memory_out[self.layer] = after
        return y

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A RecurrentCache: the states alone, of constant size, float32, in a float64 model float64."""
        return RecurrentCache(self.new_memory(batch_size, device, dtype))

    def new_memory(self, batch_size, device, dtype):
        """States of nothing: zeros (B, *shape) float32, or float64 where dtype is."""
        exact = torch.promote_types(dtype, torch.float32)
        return tuple(torch.zeros(batch_size, *shape, device=device, dtype=exact) for shape in self.shapes)


class MinGRU(Recurrent):
    """minGRU (Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 with the positive candidate of appendix B).

    z = sigmoid(W_z x), h_t = (1 - z_t) h_(t-1) + z_t g(W_h x_t) with g(v) = v + 0.5 where v >= 0, else sigmoid(v):
    gates see no state, so that a scan does all of time at once. Inner width expand C; state (I,).
    """

    def __init__(self, config, layer=0):
        super().__init__()
        c, self.layer = config, layer
        self.inner = round(c.expand * c.n_embd)
        self.into = Linear(c.n_embd, 2 * self.inner, bias=c.bias)
        self.out = Linear(self.inner, c.n_embd, bias=c.bias)
        self.fused, self.shapes = {"into": (self.inner, self.inner)}, [(self.inner,)]

    def run(self, x, states, real=None, age=None):
        """x (B, T, C), states (h (B, I),), real (B, T) or None, age (B, T, 1) or None. Returns y (B, T, C) and the
        states after."""
        z, v = self.into(x).chunk(2, -1)  # (B, T, I)
        if kernels.on() and x.size(1) > 1 and age is None:
            z = z if real is None else z.masked_fill(~real.unsqueeze(2), -math.inf)
            h = kernels.min_gru(z, v, states[0])
        else:
            z, v = torch.sigmoid(z.to(states[0].dtype)), v.to(states[0].dtype)
            v = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
            z = z if real is None else z * real.unsqueeze(2)
            if age is not None:
                h = scan((1 - z).masked_fill(age == 0, 0), z * v, states[0])
            else:
                h = scan(1 - z, z * v, states[0]) if x.size(1) > 1 else torch.lerp(states[0].unsqueeze(1), v, z)
        return self.out(h.to(x.dtype)), (h[:, -1],)

    def flops(self, T):
        """Forward, of one token, beside the matrices: the scan's updates."""
        return 6 * self.inner


class Mamba(Recurrent):
    """Mamba (Gu & Dao 2023, section 3): x, gate = W x; x passes a causal depthwise convolution and silu and drives
    a state

        h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t,   y_t = C_t h_t + D x_t

    whose dt, B, C depend on x_t; then y silu(gate) is projected back. A = -exp(a_log) starts at -1 ... -N (S4D-real).
    States: the last conv_width - 1 inputs of the convolution (K - 1, I), and h (I, N).
    """

    def __init__(self, config, layer=0):
        super().__init__()
        c, self.layer = config, layer
        self.inner, self.n_state, self.width = round(c.expand * c.n_embd), c.state_dim, c.conv_width
        self.rank = -(-c.n_embd // 16)
        self.into = Linear(c.n_embd, 2 * self.inner, bias=False)
        self.join = Linear(self.inner, self.rank + 2 * self.n_state, bias=False)
        self.dt = nn.Parameter(torch.empty(self.inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.conv = nn.Parameter(torch.empty(self.width, self.inner))
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.a_log = nn.Parameter(torch.empty(self.inner, self.n_state))
        self.skip = nn.Parameter(torch.empty(self.inner))
        self.out = Linear(self.inner, c.n_embd, bias=False)
        self.roles = {"dt": "gain", "dt_bias": "bias", "conv": "gain", "conv_bias": "bias", "a_log": "gain",
                    "skip": "gain"}
        self.fused = {"into": (self.inner, self.inner), "join": (self.rank, self.n_state, self.n_state)}
        self.shapes = [(self.width - 1, self.inner), (self.inner, self.n_state)]

    def init_weights(self):
        """As the paper's: dt log-uniform in 0.001 ... 0.1 at first, A = -1 ... -N, D = 1."""
        self.dt.uniform_(-self.rank ** -0.5, self.rank ** -0.5)
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.conv.uniform_(-self.width ** -0.5, self.width ** -0.5)
        self.conv_bias.zero_()
        rates = torch.arange(1, self.n_state + 1, device=self.a_log.device).float()
        self.a_log.copy_(rates.log().expand_as(self.a_log))
        self.skip.fill_(1)

    def run(self, x, states, real=None, age=None):
        """x (B, T, C), states (inputs (B, K - 1, I), h (B, I, N)), real (B, T) or None; real inputs come first; age
        (B, T, 1) or None. Returns y (B, T, C) and the states after.
        """
        B, T, _ = x.shape
        (recent, h), K, exact = states, self.width, states[0].dtype
        u, gate = self.into(x).chunk(2, -1)  # (B, T, I)
        u = u.to(exact)
        line = torch.cat((recent, u), 1)  # (B, K - 1 + T, I)
        if real is None:
            recent = line[:, T:]
        else:  # the last K - 1 real ones of each row
            place = real.sum(1, keepdim=True) + torch.arange(K - 1, device=x.device)  # (B, K - 1)
            recent = line.take_along_dim(place.unsqueeze(2), 1)
        u = F.silu(convolve(line, self.conv.to(exact), T, self.conv_bias.to(exact), age))  # (B, T, I)
        dt, b, c = self.join(u.to(x.dtype)).to(exact).split((self.rank, self.n_state, self.n_state), -1)
        with torch.autocast(x.device.type, enabled=False):
            dt = F.softplus(F.linear(dt, self.dt.to(exact), self.dt_bias.to(exact)))  # (B, T, I)
            if real is not None:
                dt = dt * real.unsqueeze(2)  # exp(0) h + 0: the state stays
            a = -torch.exp(self.a_log.to(exact))  # (I, N)
            skip = self.skip.to(exact)
            skipped = u
            if age is not None:  # a step so long that nothing of the state is left, of an input as much weaker
                u = torch.where(age == 0, dt * u / FORGETS, u)
                dt = dt.masked_fill(age == 0, FORGETS)
            if kernels.on() and T > 1 and age is None:
                y, h = kernels.selective_scan(u, dt, a, b, c, skip, h)
            elif T == 1:
                h = torch.exp(dt[:, 0, :, None] * a) * h + (dt * u)[:, 0, :, None] * b[:, 0, None, :]  # (B, I, N)
                y = torch.addcmul((h @ c[:, 0, :, None])[..., 0].unsqueeze(1), skipped, skip)  # (B, 1, I)
            else:
                y, h = selective_scan(dt, u, b, c, a, h)
                y = torch.addcmul(y, skipped, skip)
        return self.out((y * F.silu(gate.to(exact))).to(x.dtype)), (recent, h)

    def flops(self, T):
        """Forward, of one token, beside the matrices: the convolution, dt, the state's update and its reading."""
        return 2 * self.inner * (self.width + self.rank) + 6 * self.inner * self.n_state


class Documents(Recurrent):
    """Where documents begin: after every place where their last bytes, config.document_bytes, stand. States: the last
    so many bytes of a row, each plus 1 (0: there was none), and the age of the position that comes next."""

    def __init__(self, config):
        super().__init__()
        c, end = config, config.document_bytes
        self.layer = c.n_layer * (2 if c.short_conv else 1)  # its place in a Memory: after those of all layers
        self.restart, self.shapes = c.documents == "reset", [(len(end),), (1,)]
        self.register_buffer("end", torch.tensor(list(end)) + 1, persistent=False)

    def find(self, x, positions, cache, end):
        """Tells positions the age of each of x (B, T). Returns how many rows of position tables are needed; by
        position alone they are `end`."""
        positions.age = self(x.unsqueeze(2), positions, None if cache is None else cache.layers[self.layer])
        if self.restart:
            positions.places = positions.age[..., 0]
            if positions.memory is not None:  # a document older than its segment, which is all that attention sees
                positions.places = positions.places.minimum(torch.arange(x.size(1), device=x.device))
        return end

    def run(self, x, states, real=None, age=None):
        """x (B, T, 1) int64 to the ages of its positions (B, T, 1) int64."""
        (recent, age), n, T = states, len(self.end), x.size(1)
        line = torch.cat((recent, x[..., 0] + 1), 1)  # (B, n + T)
        begins = (line.unfold(1, n, 1) == self.end).all(2)  # (B, T + 1), the next position's too
        place = torch.arange(T + 1, device=x.device)
        ages = place - torch.where(begins, place, -age).cummax(1).values
        read = torch.full_like(age, T) if real is None else real.sum(1, keepdim=True)  # (B, 1)
        recent = line.take_along_dim(read + torch.arange(n, device=x.device), 1)
        return ages[:, :T, None], (recent, ages.take_along_dim(read, 1))

    def new_memory(self, batch_size, device, dtype):
        """States of nothing: zeros (B, *shape) int64."""
        return tuple(torch.zeros(batch_size, *shape, device=device, dtype=torch.long) for shape in self.shapes)


FORGETS = 2.0 ** 60  # a step dt after which exp(dt A) is 0; by a power of 2 numbers are divided exactly
STRETCH = 32  # positions whose (B, I, N) states are held at a time


def selective_scan(dt, u, b, c, a, h):
    """y_t = C_t h_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t; the skip D is the caller's.

    dt, u (B, T, I), b, c (B, T, N), a (I, N), h (B, I, N), all float32 or all float64. Returns y (B, T, I) and the last
    state (B, I, N). (B, T, I, N) is never held whole: time is cut into stretches, computed again in the backward pass.
    On a GPU a stretch is a parallel scan; on a CPU a loop, whose (B, I, N) stays in the processor's cache.
    """
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (dt, u, b, c, a, h))
    if u.device.type == "cpu":
        return SelectiveScan.apply(dt, u, b, c, a, h) if grad else _selective_loop(dt, u, b, c, a, h)
    parts = []
    for piece in zip(*(t.split(STRETCH, 1) for t in (dt, u, b, c))):
        y, h = recompute(stretch, *piece, a, h, use_reentrant=False) if grad else stretch(*piece, a, h)
        parts.append(y)
    return torch.cat(parts, 1), h


def stretch(dt, u, b, c, a, h):
    """selective_scan of one stretch, in parallel over its time."""
    decay = torch.exp(dt.unsqueeze(3) * a)  # (B, T, I, N)
    states = scan(decay, (dt * u).unsqueeze(3) * b.unsqueeze(2), h)  # (B, T, I, N)
    return (states @ c.unsqueeze(3)).squeeze(3), states[:, -1]


def _selective_loop(dt, u, b, c, a, h, keep=None):
    """selective_scan, position after position; `keep`, a list, is given the state before every stretch."""
    x, y, h = dt * u, torch.empty_like(u), h.clone()
    decay = torch.empty_like(h)
    for t in range(u.size(1)):
        if keep is not None and t % STRETCH == 0:
            keep.append(h.clone())
        torch.mul(dt[:, t].unsqueeze(2), a, out=decay)
        h.mul_(decay.exp_()).addcmul_(x[:, t].unsqueeze(2), b[:, t].unsqueeze(1))
        y[:, t] = torch.bmm(h, c[:, t].unsqueeze(2)).squeeze(2)
    return y, h


class SelectiveScan(torch.autograd.Function):
    """selective_scan on a CPU with its gradient, by hand. With g_t = dL/dh_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1):

        dC_t = sum_i dy_t h_t,  dB_t = sum_i g_t dt_t u_t,  du_t = dt_t (g_t . B_t),
        ddt_t = u_t (g_t . B_t) + sum_n w_t A,  dA = sum_(b, t) w_t dt_t,   w_t = g_t exp(dt_t A) h_(t-1)
    """

    @staticmethod
    def forward(ctx, dt, u, b, c, a, h):
        kept = []
        y, last = _selective_loop(dt, u, b, c, a, h, kept)
        ctx.save_for_backward(dt, u, b, c, a, *kept)
        return y, last

    @staticmethod
    def backward(ctx, grad_y, grad_last):
        dt, u, b, c, a, *kept = ctx.saved_tensors
        x, T = dt * u, u.size(1)
        g = grad_last.clone()  # of the state after the position at hand, from all later ones
        d_dt, d_u, d_b, d_c = (torch.empty_like(t) for t in (dt, u, b, c))
        d_a = torch.zeros_like(g)  # of each row
        for i in range(len(kept) - 1, -1, -1):
            first, end = i * STRETCH, min(T, (i + 1) * STRETCH)
            states, decays = [kept[i]], []
            for t in range(first, end):
                decays.append(torch.exp(dt[:, t].unsqueeze(2) * a))
                states.append((states[-1] * decays[-1]).addcmul_(x[:, t].unsqueeze(2), b[:, t].unsqueeze(1)))
            for t in range(end - 1, first - 1, -1):
                before, after, decay = states[t - first], states[t - first + 1], decays[t - first]
                g.addcmul_(grad_y[:, t].unsqueeze(2), c[:, t].unsqueeze(1))
                d_c[:, t] = torch.bmm(grad_y[:, t].unsqueeze(1), after).squeeze(1)
                d_b[:, t] = torch.bmm(x[:, t].unsqueeze(1), g).squeeze(1)
                d_x = torch.bmm(g, b[:, t].unsqueeze(2)).squeeze(2)  # (B, I)
                g.mul_(decay)
                w = before.mul(g)
                d_u[:, t] = d_x * dt[:, t]
                d_dt[:, t] = torch.addcmul((w * a).sum(2), d_x, u[:, t])
                d_a.addcmul_(w, dt[:, t].unsqueeze(2))
        return d_dt, d_u, d_b, d_c, d_a.sum(0), g
