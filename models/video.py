"""Transformers over frames: in space, and in space and time."""
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels import expect
from model import FEED_FORWARDS, Block, Norm, Positions, initialise, make_ropes, variant
from models.encoder_decoder import WideAttention, attends, own_layers, positions_of, see_ahead
from nanolab.cache import Cache


class SpatialTransformer(nn.Module):
    """Bidirectional transformer over the N embedded tokens of one frame, (B, N, C) to (B, N, C), each place with a
    learned position. grid = (rows, columns): attention also turns by row and column (`axial_tables`).
    """

    def __init__(self, config, n_tokens, grid=None):
        super().__init__()
        c = self.config = replace(config, positions="learned", block_size=n_tokens, rope_scaling="none")
        attends(c, "a spatial transformer")
        turn_by_place(self, grid, n_tokens)
        self.position = nn.Parameter(torch.empty(n_tokens, c.n_embd))
        self.blocks = see_ahead(nn.ModuleList(Block(c, layer) for layer in range(c.n_layer)), c)
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        initialise(self)

    def forward(self, x, padding=None):
        """x (B, N, C), padding (B, N) bool or None. Raises ValueError for another number of tokens."""
        if x.size(1) != self.position.size(0):
            raise ValueError(f"a frame has {self.position.size(0)} tokens, not {x.size(1)}")
        index = None if padding is None else torch.arange(x.size(1), device=x.device).masked_fill(padding, -1)
        x, positions = x + self.position, frame_positions(self, x.size(1), index)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)


class SpatioTemporalBlock(nn.Module):
    """Spatial attention within a frame, causal attention of each place over time, one feed-forward (Genie, Bruce et al.
    2024, section 2.1)."""

    def __init__(self, config, layer=0):
        super().__init__()
        own_layers(config)
        c = config
        self.norm1, self.norm2, self.norm3 = (Norm(c.norm, c.n_embd, c.norm_gain, c.bias) for _ in range(3))
        self.space = WideAttention(replace(c, positions="none", rope_scaling="none"), layer)
        self.time = WideAttention(c, layer)
        self.ff = variant(FEED_FORWARDS[c.ffs[layer]])(c, layer)
        self.dropout = c.dropout

    def forward(self, x, space, time, cache=None):
        """x (B, T, N, C) with the Positions of a frame's tokens and of the frames. Returns (B, T, N, C)."""
        B, T, N, C = x.shape

        def drop(branch):
            return F.dropout(branch, self.dropout) if self.dropout and self.training else branch
        h = self.norm1(x)
        if self.space.fusible(self.space.config.head_dim):
            x = x + drop(self.space.of_frames(h, space, (B * T, N), kernels.attend_space))
        else:
            x = x + drop(self.space(h.view(B * T, N, C), space).view(B, T, N, C))
        h = self.norm2(x)
        if cache is None and time.in_order and self.time.fusible(self.time.config.head_dim):
            x = x + drop(self.time.of_frames(h, every_token(time, N), (B, T * N),
                                             partial(kernels.attend_time, window=time.window)))
        else:
            over = h.transpose(1, 2).reshape(B * N, T, C)
            x = x + drop(self.time(over, time, cache).view(B, N, T, C).transpose(1, 2))
        return x + drop(self.ff(self.norm3(x).reshape(B * T, N, C)).view(B, T, N, C))


def turn_by_place(model, grid, n_tokens):
    """Gives a model over frames of n_tokens its buffers cos and sin: `axial_tables` of grid = (rows, columns), before
    which tokens do not turn; None where grid is."""
    tables = None, None
    if grid is not None:
        tables = axial_tables(*grid, model.config.head_dim, extra=n_tokens - grid[0] * grid[1])
    for name, table in zip(("cos", "sin"), tables):
        model.register_buffer(name, table, persistent=False)


def frame_positions(model, N, index=None):
    """The Positions of a frame's N tokens, (B, N) or at index (B, N), which see one another; a model's buffers cos and
    sin (`axial_tables`), if they are not None, turn them."""
    tables = None if model.cos is None else {model.config.head_dim: (model.cos, model.sin)}
    return Positions(0, N, index, bidirectional=True, tables=tables)


def every_token(time, N):
    """The Positions of frames, `time`, as those of all their tokens in a row, frame by frame: each of RoPE's tables'
    rows N times. Made once for all layers."""
    if "every place" not in time._made:
        tables = {D: tuple(t.repeat_interleave(N, 1) for t in pair) for D, pair in time.tables.items()}
        time._made["every place"] = Positions(time.start, time.T * N, tables=tables)
    return time._made["every place"]


def axial_tables(height, width, head_dim, base=100.0, extra=0):
    """RoPE's tables for the places of a frame, row by row, after `extra` places that do not turn: (cos, sin), each
    (1, extra + height width, 1, D) float32. Of the D/2 feature pairs the first half turns by the row, the rest by the
    column, at frequencies base^(-2i/D) each. Raises ValueError where head_dim is no multiple of 4."""
    expect(not head_dim % 4,
           f"axial positions turn pairs by row and pairs by column: head_dim {head_dim} must be a multiple of 4")
    frequencies = base ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angle = torch.cat([torch.outer(place.flatten().double(), frequencies) for place in (row, column)], 1)  # (N, D/2)
    angle = F.pad(angle, (0, 0, extra, 0))
    cos, sin = angle.cos(), angle.sin()
    return tuple(t.float()[None, :, None] for t in (torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


class TwoStreams(Positions):
    """Positions of `true` frames from 0 on, and after them of corrupted ones that stand at `first`, first + 1, ...: T
    in all. A true frame sees itself and those before it; a corrupted one the true frames before it, and itself, as
    frames that are being generated do. window: the last frames that a frame sees, its own included.
    """

    in_order = False

    def __init__(self, ropes, T, true, first, window=None, device=None):
        super().__init__(0, T, window=window)
        self.true, t = true, torch.arange(T, device=device)
        self.frames = torch.where(t < true, t, t + (first - true))
        self.look_up_ropes(ropes, max(true, first + T - true))

    def look_up(self, table):
        """Rows (T, C) of a table (P, C) of these frames."""
        return table[self.frames]

    def mask(self, pattern, S, key_positions, device, slopes=None, rows=None):
        """(T, T) bool, True where a frame sees another."""
        if "streams" not in self._made:
            q, corrupted = self.frames[:, None], torch.arange(self.T, device=device) >= self.true
            own = torch.eye(self.T, dtype=torch.bool, device=device)
            past = pattern.allowed(q, q.T, q) & ~corrupted & ~(corrupted[:, None] & (q == q.T))
            self._made["streams"] = past | own
        return self._made["streams"]


class SpatioTemporal(nn.Module):
    """Transformer over frames of N tokens: (B, T, N, C) to (B, T, N, C), causal in time, bidirectional in a frame.

    Places of a frame have learned positions, and with grid = (rows, columns) attention within it turns by row and
    column as well (`axial_tables`; n_tokens - rows columns tokens before the grid do not turn). Time has
    config.positions: rope, alibi, none, or learned up to block_size. The cache holds each place's keys over time;
    frames come in any chunks. window: frames that a frame sees.
    """

    def __init__(self, config, n_tokens, grid=None):
        super().__init__()
        c = self.config = config
        expect({*c.mixers} == {"full"} and c.positions != "learned_per_layer", "a spatio-temporal transformer has "
               f"mixer 'full' and one table of positions, not {c.mixer!r} and {c.positions!r}")
        self.place_position = nn.Parameter(torch.empty(n_tokens, c.n_embd))
        self.roles = {"place_position": "position"}
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.ropes = make_ropes(c)
        turn_by_place(self, grid, n_tokens)
        self.blocks = nn.ModuleList(SpatioTemporalBlock(c, layer) for layer in range(c.n_layer))
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        initialise(self)

    def init_weights(self):
        """Places N(0, 0.02), as all positions."""
        self.place_position.normal_(0, 0.02)

    def forward(self, x, cache=None, window=None, streams=None):
        """x (B, T, N, C), the frames after those in the cache. Raises ValueError for other sizes than the model's.

        streams = (true, first): x is `true` frames, and after them corrupted ones from `first` on, as TwoStreams says:
        what generation with a cache sees, for many frames at once.
        """
        c, (T, N, C) = self.config, x.shape[1:]
        start = 0 if cache is None else cache.length
        if (N, C) != tuple(self.place_position.shape):
            raise ValueError(f"frames are {(N, C)}, but the model's (N, C) is {tuple(self.place_position.shape)}")
        if c.learned_positions and start + T > c.block_size:
            raise ValueError(f"frame {start + T - 1} is past block_size {c.block_size}, where positions 'learned' end")
        if streams is not None:
            if c.positions not in ("rope", "none") or cache is not None:
                raise ValueError("two streams of frames go with positions 'rope' or 'none', without a cache")
            time = TwoStreams(self.ropes, T, *streams, window, x.device)
        else:
            time = positions_of(self.ropes, T, start=start, window=window)
        space = frame_positions(self, N)
        x = x + self.place_position
        if self.position is not None:
            x = x + time.look_up(self.position).unsqueeze(1)
        for i, block in enumerate(self.blocks):
            x = block(x, space, time, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(time)
        return self.norm(x)

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        """An empty Cache of max_length frames, or of a sliding window of them; its rows are the B N places."""
        p = self.place_position
        return Cache((block.time.new_cache(batch_size * p.size(0), max_length, window, device or p.device,
                                           dtype or p.dtype) for block in self.blocks), window)
