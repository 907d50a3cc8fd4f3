"""Whole models beside the decoder: encoder-decoder, with latents, with a prefix; transformers over frames; text.

All are built of the layers of model.py and take a TransformerConfig; each parameter has one rule of `initialise`.
Shapes: B batch, T time or positions, S source positions, M latents, N tokens of a frame, C width, V vocabulary.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from cache import Cache
from kernels import plain_rms_norm
from mixers import EVERYTHING, Attention, Linear, Norm, Positions
from model import CARRY, FEED_FORWARDS, Block, Transformer, initialise, make_ropes


def running_positions(padding):
    """padding (B, T) bool, True where there is no token -> positions (B, T) int64, -1 there, else 0, 1, 2, ..."""
    return (~padding).long().cumsum(1).sub(1).masked_fill(padding, -1)


def places_of(ropes, T, index=None, start=0, **kind):
    """The Positions of T inputs from `start`, or at index (B, T), with RoPE's tables where the model has ropes."""
    places = Positions(start, T, index, **kind)
    if len(ropes):
        places.look_up_ropes(ropes, max(1, start + T if index is None else int(index.max()) + 1))
    return places


def attends(config, model):
    """Raises ValueError where a mixer cannot see ahead."""
    for kind in config.mixers:
        if kind in CARRY:
            raise ValueError(f"mixer {kind!r} reads from left to right: {model} sees everything at once")


def own_layers(config):
    """Raises ValueError for settings that only the layers of model.py have."""
    if config.short_conv or "none" in config.ffs:
        raise ValueError("short_conv and ff 'none' are for decoders: layers that read a context, or frames, have "
                         "neither")


def as_mask(padding, S):
    """Padding (B, S) bool as it is; the lengths (B,) of rows that it only ends as that mask; None as None."""
    if padding is None or padding.dim() == 2:
        return padding
    return torch.arange(S, device=padding.device) >= padding[:, None]


class WideAttention(Attention):
    """Attention of layers that see ahead, or frames: by kernel where it is on and what is seen is of its kinds."""

    def attend(self, q, k, v, positions, seen, span, bias=None, scale=None, slopes=None):
        """As Attention.attend; but by kernel padded places, whose outputs nobody reads, see nothing and get 0."""
        if span is EVERYTHING and bias is None and q.size(2) > 1 and self.fusible(q.size(3)):
            return kernels.attend(q.to(v.dtype), k.to(v.dtype), v, causal=False, places=seen, scale=scale)
        return super().attend(q, k, v, positions, seen, span, bias, scale, slopes)

    def of_frames(self, x, places, rows, attend):
        """`attend` of kernels.py over frames x (B, T, N, C), which are read where they lie: (B, T, N, C).

        places: Positions whose tables turn x as rows = (a, b), a b = B T N, of which b have places of their own.
        """
        c, H, G = self.config, self.config.n_head, self.config.n_kv_head
        qk, v = self.qkv(x).unflatten(3, (H + 2 * G, c.head_dim)).split((H + G, G), 3)
        if c.qk_norm:
            qk = plain_rms_norm(qk)
        q, k = places.turn(qk.reshape(*rows, H + G, c.head_dim)).view(qk.shape).split((H, G), 3)  # (B, T, N, H, D), ...
        if c.qk_scale:
            q = q * (self.qk_scale / c.head_dim ** 0.5)
        return self.out(attend(q.to(v.dtype), k.to(v.dtype), v).flatten(3))


def see_ahead(blocks, config):
    """Gives the Blocks of a bidirectional model, which are without weights yet, their WideAttention. Other mixers than
    plain attention stay as they are."""
    for layer, block in enumerate(blocks):
        if type(block.mixer) is Attention:
            block.mixer = WideAttention(config, layer, block.mixer.kind)
    return blocks


class Encoder(nn.Module):
    """Bidirectional transformer over tokens: (B, T) int64 to (B, T, C), with a padding mask.

    Raises ValueError for mixers that read from left to right, and for positions past a learned table.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        attends(c, "an encoder")
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.n_embd))
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.ropes = make_ropes(c)
        self.blocks = see_ahead(nn.ModuleList(Block(c, layer) for layer in range(c.n_layer)), c)
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        initialise(self)

    def forward(self, x, padding=None):
        """x (B, T) int64, padding (B, T) bool or None, True where there is no token, or (B,) int64: how many tokens a
        row has, with padding after them only. Returns (B, T, C)."""
        c, T = self.config, x.size(1)
        padding = as_mask(padding, T)
        if c.learned_positions and T > c.block_size:
            raise ValueError(f"{T} tokens are more than block_size {c.block_size}, where positions {c.positions!r} end")
        index = None if padding is None else running_positions(padding)
        places = places_of(self.ropes, T, index, bidirectional=True)
        x = F.embedding(x, self.embed)
        if self.position is not None:
            x = x + places.look_up(self.position)
        for block in self.blocks:
            x = block(x, places)
        return self.norm(x)

    def new_cache(self, *_, **__):
        """Raises ValueError: every token sees every other, so nothing computed before a token came would hold."""
        raise ValueError("an encoder sees its whole input at once: there is nothing that a cache could keep")


class CrossAttention(WideAttention):
    """Queries from x, keys and values from a context of another length; no positions, no causal mask."""

    def __init__(self, config, layer=0):
        nn.Module.__init__(self)
        c = self.config = config
        self.layer, self.kind, self.slopes = layer, "cross", None
        self.q = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.bias)
        self.kv = Linear(c.n_embd, 2 * c.n_kv_head * c.head_dim, bias=c.bias)
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.fused = {"kv": (c.n_kv_head * c.head_dim,) * 2}

    def keys(self, context):
        """context (B, S, C) to keys and values, each (B, G, S, D)."""
        c = self.config
        return self.kv(context).view(*context.shape[:2], 2, c.n_kv_head, c.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, held, padding=None):
        """x (B, T, C); held: keys and values from `keys`; padding (B, S) bool, True where not to look, or (B,) int64:
        how many keys to look at, from the first on; only these go by kernel. -> (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        q = self.q(x).view(B, T, c.n_head, c.head_dim).transpose(1, 2)  # (B, H, T, D)
        if T > 1 and (padding is None or padding.dim() == 1) and self.fusible(c.head_dim):
            k, v = held
            y = kernels.attend(q.to(v.dtype), k.to(v.dtype), v, causal=False, lengths=padding)
        else:
            padding = as_mask(padding, held[0].size(2))
            mask = None if padding is None else ~padding[:, None, None, :].expand(B, 1, T, -1)
            y = self.softmax(q, *held, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def flops(self, T):
        """Depends on the context, which is not known here: 0."""
        return 0


class CrossBlock(nn.Module):
    """A layer that reads a context: self-attention where `itself`, cross-attention, feed-forward, each on a norm."""

    def __init__(self, config, layer=0, itself=True):
        super().__init__()
        own_layers(config)
        c = config
        self.norm1 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias) if itself else None
        self.mixer = WideAttention(c, layer) if itself else None
        self.norm2 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.cross = CrossAttention(c, layer)
        self.norm3 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.ff = FEED_FORWARDS[c.ffs[layer % c.n_layer]](c, layer)
        self.dropout = c.dropout

    def forward(self, x, held, places=None, cache=None, padding=None):
        """x (B, T, C), held the context's keys and values; padding as CrossAttention takes it. Returns (B, T, C)."""
        def drop(branch):
            return F.dropout(branch, self.dropout) if self.dropout and self.training else branch
        if self.mixer is not None:
            x = x + drop(self.mixer(self.norm1(x), places, cache))
        x = x + drop(self.cross(self.norm2(x), held, padding))
        return x + drop(self.ff(self.norm3(x), places))


class EncoderDecoder(nn.Module):
    """Encoder and decoder (Vaswani et al. 2017): the decoder, causal over its own tokens, reads the source's states.

    config.n_layer layers in each; positions of both begin at 0. padding, everywhere: (B, S) bool, True where the source
    has no token, or (B,) int64, the tokens that a row has before its padding: only with lengths does cross-attention go
    by kernel.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(replace(c, mixer="full"))
        self.read_context(c)
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.n_embd))
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.ropes = make_ropes(replace(c, mixer="full"))
        self.blocks = nn.ModuleList(CrossBlock(c, i) for i in range(c.n_layer))
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(c.vocab_size, c.n_embd))])
        initialise(self)

    def read_context(self, config):
        """Builds what stands between encoder and decoder: nothing."""

    def encode(self, source, padding=None):
        """source (B, S) int64 with its padding or None -> context (B, S, C)."""
        return self.encoder(source, padding)

    def states(self, x, context, padding=None, cache=None):
        """x (B, T) int64 after what the cache holds, context (B, S, C) with its padding -> states (B, T, C).

        With a cache the context's keys and values are computed in the first pass and kept. Raises ValueError past
        block_size with learned positions.
        """
        start = 0 if cache is None else cache.length
        if self.config.learned_positions and start + x.size(1) > self.config.block_size:
            raise ValueError(f"position {start + x.size(1) - 1} is past block_size {self.config.block_size}")
        places = places_of(self.ropes, x.size(1), start=start)
        h = F.embedding(x, self.embed)
        if self.position is not None:
            h = h + places.look_up(self.position)
        held = None if cache is None else cache.context
        if held is None:
            held = [block.cross.keys(context) for block in self.blocks]
        for i, block in enumerate(self.blocks):
            h = block(h, held[i], places, None if cache is None else cache.layers[i], padding)
        if cache is not None:
            cache.context = [tuple(t.detach() for t in pair) for pair in held]
            cache.advance(places)
        return self.norm(h)

    def classify(self, states):
        """states (..., C) -> logits (..., V) float32."""
        return F.linear(states, self.heads[0]).float()

    def decode(self, x, context, cache=None, padding=None):
        """`classify` of `states`: logits (B, T, V)."""
        return self.classify(self.states(x, context, padding, cache))

    def forward(self, source, x, targets=None, padding=None):
        """Logits (B, T, V) of x (B, T) after source (B, S); with targets (B, T), -1 where they do not count, the mean
        loss in nats, with gradient, and the same detached as (1, 1)."""
        logits = self.decode(x, self.encode(source, padding), padding=padding)
        if targets is None:
            return logits
        loss = kernels.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="mean")
        return loss, loss.detach().view(1, 1)

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        """An empty ContextCache for the decoder."""
        device, dtype = device or self.embed.device, dtype or self.embed.dtype
        layers = (block.mixer.new_cache(batch_size, max_length, window, device, dtype) for block in self.blocks)
        return ContextCache(layers, window)


class LatentTransformer(EncoderDecoder):
    """EncoderDecoder with a bottleneck: n_latent learned queries read the encoder's states, in n_read layers, and the
    decoder sees the source through these latents only (after Perceiver, Jaegle et al. 2021).
    """

    def __init__(self, config, n_latent=4, n_read=1):
        self.n_latent, self.n_read = n_latent, n_read
        super().__init__(config)

    def read_context(self, config):
        """The latents and the layers that read with them. Latents need no mask: only the encoder's states are padded"""
        c = config
        self.latents = nn.Parameter(torch.empty(self.n_latent, c.n_embd))
        self.own = {"latents": "embedding"}
        self.readers = nn.ModuleList(CrossBlock(c, i, itself=False) for i in range(self.n_read))
        self.latent_norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)

    def fill(self):
        """Latents N(0, 1): alike ones would read alike."""
        self.latents.normal_()

    def encode(self, source, padding=None):
        """source (B, S) int64 with its padding or None -> latents (B, M, C)."""
        states = self.encoder(source, padding)
        x = self.latents.expand(source.size(0), -1, -1)
        for block in self.readers:
            x = block(x, block.cross.keys(states), padding=padding)
        return self.latent_norm(x)

    def states(self, x, context, padding=None, cache=None):
        """As EncoderDecoder.states; the source's padding has ended with the latents."""
        return super().states(x, context, None, cache)


class ContextCache(Cache):
    """A Cache that also keeps the keys and values of a context, per layer."""
    context = None

    @property
    def bytes(self):
        """Bytes of storage, the context's included."""
        return super().bytes + sum(t.nbytes for pair in self.context or () for t in pair)

    def reset(self):
        """Forgets everything, the context too."""
        super().reset()
        self.context = None

    def fork(self, n=1):
        """An independent copy with each row repeated n times."""
        twin, plain = ContextCache((), self.window), super().fork(n)
        twin.__dict__.update(plain.__dict__)
        if self.context is not None:
            twin.context = [tuple(t.repeat_interleave(n, 0) for t in pair) for pair in self.context]
        return twin


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
        x, places = x + self.position, frame_places(self, x.size(1), index)
        for block in self.blocks:
            x = block(x, places)
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
        self.ff = FEED_FORWARDS[c.ffs[layer]](c, layer)
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
            x = x + drop(self.time.of_frames(h, of_every_place(time, N), (B, T * N),
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


def frame_places(model, N, index=None):
    """The Positions of a frame's N tokens, (B, N) or at index (B, N), which see one another; a model's buffers cos and
    sin (`axial_tables`), if they are not None, turn them."""
    tables = None if model.cos is None else {model.config.head_dim: (model.cos, model.sin)}
    return Positions(0, N, index, bidirectional=True, tables=tables)


def of_every_place(time, N):
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
    if head_dim % 4:
        raise ValueError(f"axial positions turn pairs by row and pairs by column: head_dim {head_dim} must be a "
                         "multiple of 4")
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

    def __init__(self, ropes, T, true, first, window=None):
        super().__init__(0, T, window=window)
        self.true, self.places = true, torch.cat((torch.arange(true), torch.arange(first, first + T - true)))
        self.look_up_ropes(ropes, max(true, first + T - true))

    def look_up(self, table):
        """Rows (T, C) of a table (P, C) at these places."""
        return table[self.places.to(table.device)]

    def mask(self, span, S, seen, device, slopes=None, rows=None):
        """(T, T) bool, True where a frame sees another."""
        if "streams" not in self._made:
            q, corrupted = self.places.to(device)[:, None], torch.arange(self.T, device=device) >= self.true
            own = torch.eye(self.T, dtype=torch.bool, device=device)
            past = span.allowed(q, q.T, q) & ~corrupted & ~(corrupted[:, None] & (q == q.T))
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
        if set(c.mixers) != {"full"} or c.positions == "learned_per_layer":
            raise ValueError(f"a spatio-temporal transformer has mixer 'full' and one table of positions, not "
                             f"{c.mixer!r} and {c.positions!r}")
        self.place_position = nn.Parameter(torch.empty(n_tokens, c.n_embd))
        self.own = {"place_position": "position"}
        self.position = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.positions == "learned" else None
        self.ropes = make_ropes(c)
        turn_by_place(self, grid, n_tokens)
        self.blocks = nn.ModuleList(SpatioTemporalBlock(c, layer) for layer in range(c.n_layer))
        self.norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        initialise(self)

    def fill(self):
        """Places N(0, 0.02), as all positions."""
        self.place_position.normal_(0, 0.02)

    def forward(self, x, cache=None, window=None, streams=None):
        """x (B, T, N, C), the frames after those in the cache. Raises ValueError for other sizes than the model's.

        streams = (true, first): x is `true` frames, and after them corrupted ones that stand at `first` and after, each
        of which sees itself and the true frames before it (TwoStreams): what generation with a cache sees, for many
        frames at once.
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
            time = TwoStreams(self.ropes, T, *streams, window)
        else:
            time = places_of(self.ropes, T, start=start, window=window)
        space = frame_places(self, N)
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


class TextTransformer(Transformer):
    """The decoder over padded rows of tokens, for captions and other short texts of unequal length."""

    def forward(self, x, targets=None, padding=None, positions=None, **how):
        """As Transformer.forward, with padding (B, T) bool, True where a row has no token, on either side.

        targets may be (B, T) with one label; padded places never count in the loss.
        """
        if padding is not None:
            positions = running_positions(padding)
        if targets is not None:
            targets = targets.unsqueeze(2) if targets.dim() == 2 else targets
            if padding is not None:
                targets = targets.masked_fill(padding.unsqueeze(2), -1)
        return super().forward(x, targets, positions=positions, **how)


class PrefixDecoder(Transformer):
    """One stack over source and answer in a row: the source's tokens see one another, the answer's all before them.

    It has the face of an EncoderDecoder, so that a script takes either; config.block_size holds source and answer.
    """

    def encode(self, source, padding=None):
        """source (B, S) int64 -> itself: its states differ from layer to layer, and the decoder's layers make them."""
        return source

    def states(self, x, context, padding=None, cache=None):
        """x (B, T) int64 after source `context` (B, S) with its padding, or after what the cache holds ->
        states (B, T, C). With a cache the first pass takes the source in."""
        if cache is not None and cache.length:
            return self.norm(self.stream(x, self.place(x, None, cache), cache)[0])
        S, positions = context.size(1), None
        prefix, padding = S, as_mask(padding, S)
        if padding is not None:
            positions, prefix = running_positions(F.pad(padding, (0, x.size(1)))), S - padding.sum(1)
        x = torch.cat([context, x], 1)
        return self.norm(self.stream(x, self.place(x, positions, cache, prefix), cache)[0][:, S:])

    def classify(self, states):
        """states (..., C) -> logits (..., V) float32."""
        return self.logits(F.linear(states, self.classifier(self.first_head)))

    def decode(self, x, context, cache=None, padding=None):
        """`classify` of `states`: logits (B, T, V)."""
        return self.classify(self.states(x, context, padding, cache))

    def forward(self, source, x, targets=None, padding=None):
        """As EncoderDecoder.forward."""
        return EncoderDecoder.forward(self, source, x, targets, padding)

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        """An empty Cache with room for any source before max_length tokens of the answer."""
        return super().new_cache(batch_size, self.config.block_size + max_length, window, device, dtype)
