"""Whole models beside the decoder: encoder-decoder, with latents, with a prefix; text.

All are built of the layers of model.py and take a TransformerConfig; each parameter has one rule of `initialise`.
Shapes: B batch, T time or positions, S source positions, M latents, N tokens of a frame, C width, V vocabulary.
"""
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels import expect
from model import (CARRY, EVERYTHING, FEED_FORWARDS, Attention, Block, Linear, Norm, Positions, Transformer, initialise,
                   make_ropes, variant)
from nanolab.cache import Cache


def running_positions(padding):
    """padding (B, T) bool, True where there is no token -> positions (B, T) int64, -1 there, else 0, 1, 2, ..."""
    return (~padding).long().cumsum(1).sub(1).masked_fill(padding, -1)


def positions_of(ropes, T, index=None, start=0, **kind):
    """The Positions of T inputs from `start`, or at index (B, T) below T, with RoPE's tables where the model has
    ropes."""
    positions = Positions(start, T, index, **kind)
    if len(ropes):
        positions.look_up_ropes(ropes, max(1, start + T))
    return positions


def attends(config, model):
    """Raises ValueError where a mixer cannot see ahead."""
    for kind in config.mixers:
        expect(kind not in CARRY, f"mixer {kind!r} reads from left to right: {model} sees everything at once")


def own_layers(c):
    """Raises ValueError for settings that only the layers of model.py have."""
    expect(not c.short_conv and "none" not in c.ffs,
           "short_conv and ff 'none' are for decoders: layers that read a context, or frames, have neither")
    expect(c.logit_softcap is None and c.qk_norm != "full" and not (c.value_residual or c.norm_after or
           c.parallel_residual), "logit_softcap, value_residual, norm_after, parallel_residual and qk_norm 'full' are "
           "for decoders: models that read a context, or frames, have none of them")


def as_mask(padding, S):
    """Padding (B, S) bool as it is; the lengths (B,) of rows that it only ends as that mask; None as None."""
    if padding is None or padding.dim() == 2:
        return padding
    return torch.arange(S, device=padding.device) >= padding[:, None]


class WideAttention(Attention):
    """Attention of layers that see ahead, or frames: by kernel where it is on and what is seen is of its kinds."""

    def attend(self, q, k, v, positions, key_positions, pattern, bias=None, scale=None, slopes=None):
        """As Attention.attend; but by kernel padded positions, whose outputs nobody reads, see nothing and get 0."""
        if pattern is EVERYTHING and bias is None and q.size(2) > 1 and self.fusible(q.size(3)):
            return kernels.attend(q.to(v.dtype), k.to(v.dtype), v, causal=False, positions=key_positions, scale=scale)
        return super().attend(q, k, v, positions, key_positions, pattern, bias, scale, slopes)

    def of_frames(self, x, positions, rows, attend):
        """`attend` of kernels.py over frames x (B, T, N, C), which are read where they lie: (B, T, N, C).

        positions: whose tables turn x as rows = (a, b), a b = B T N, of which b differ.
        """
        c, H, G = self.config, self.config.n_head, self.config.n_kv_head
        qk, v = self.qkv(x).unflatten(3, (H + 2 * G, c.head_dim)).split((H + G, G), 3)
        if c.qk_norm:
            qk = self.unit(qk)
        q, k = positions.turn(qk.reshape(*rows, H + G, c.head_dim)).view(qk.shape).split((H, G), 3)  # (B, T, N, H, D)
        if c.qk_scale:
            q = q * (self.qk_scale / c.head_dim ** 0.5)
        return self.out(attend(q.to(v.dtype), k.to(v.dtype), v).flatten(3))


def see_ahead(blocks, config):
    """Gives the Blocks of a bidirectional model, which are without weights yet, WideAttention for plain Attention."""
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
        expect(not c.learned_positions or T <= c.block_size,
               f"{T} tokens are more than block_size {c.block_size}, where positions {c.positions!r} end")
        index = None if padding is None else running_positions(padding)
        positions = positions_of(self.ropes, T, index, bidirectional=True)
        x = F.embedding(x, self.embed)
        if self.position is not None:
            x = x + positions.look_up(self.position)
        for block in self.blocks:
            x = block(x, positions)
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

    def forward(self, x, context_kv, padding=None):
        """x (B, T, C); context_kv: from `keys`; padding (B, S) bool, True where not to look, or (B,) int64: how many
        keys to look at, from the first on; only these go by kernel. -> (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        q = self.q(x).view(B, T, c.n_head, c.head_dim).transpose(1, 2)  # (B, H, T, D)
        if T > 1 and (padding is None or padding.dim() == 1) and self.fusible(c.head_dim):
            k, v = context_kv
            y = kernels.attend(q.to(v.dtype), k.to(v.dtype), v, causal=False, lengths=padding)
        else:
            padding = as_mask(padding, context_kv[0].size(2))
            mask = None if padding is None else ~padding[:, None, None, :].expand(B, 1, T, -1)
            y = self.softmax(q, *context_kv, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def flops(self, T):
        """Depends on the context, which is not known here: 0."""
        return 0


class CrossBlock(nn.Module):
    """A layer that reads a context: self-attention where `itself`, cross-attention, feed-forward, each on a norm."""

    def __init__(self, config, layer=0, itself=True):
        super().__init__()
        c = config
        own_layers(c)
        self.norm1 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias) if itself else None
        self.mixer = WideAttention(c, layer) if itself else None
        self.norm2 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.cross = CrossAttention(c, layer)
        self.norm3 = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)
        self.ff = variant(FEED_FORWARDS[c.ffs[layer % c.n_layer]])(c, layer)
        self.dropout = c.dropout

    def forward(self, x, context_kv, positions=None, cache=None, padding=None):
        """x (B, T, C), the context's keys and values; padding as CrossAttention takes it. Returns (B, T, C)."""
        def drop(branch):
            return F.dropout(branch, self.dropout) if self.dropout and self.training else branch
        if self.mixer is not None:
            x = x + drop(self.mixer(self.norm1(x), positions, cache))
        x = x + drop(self.cross(self.norm2(x), context_kv, padding))
        return x + drop(self.ff(self.norm3(x), positions))


class EncoderDecoder(nn.Module):
    """Encoder and decoder (Vaswani et al. 2017): the decoder, causal over its own tokens, reads the source's states.

    config.n_layer layers in each; positions of both begin at 0. padding, everywhere, as CrossAttention takes it.
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

    def read_context(self, c):
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
        expect(not self.config.learned_positions or start + x.size(1) <= self.config.block_size,
               f"position {start + x.size(1) - 1} is past block_size {self.config.block_size}")
        positions = positions_of(self.ropes, x.size(1), start=start)
        h = F.embedding(x, self.embed)
        if self.position is not None:
            h = h + positions.look_up(self.position)
        context_kv = None if cache is None else cache.context
        if context_kv is None:
            context_kv = [block.cross.keys(context) for block in self.blocks]
        for i, block in enumerate(self.blocks):
            h = block(h, context_kv[i], positions, None if cache is None else cache.layers[i], padding)
        if cache is not None:
            cache.context = [tuple(t.detach() for t in pair) for pair in context_kv]
            cache.advance(positions)
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

    def read_context(self, c):
        """The latents and the layers that read with them."""
        self.latents = nn.Parameter(torch.empty(self.n_latent, c.n_embd))
        self.roles = {"latents": "embedding"}
        self.readers = nn.ModuleList(CrossBlock(c, i, itself=False) for i in range(self.n_read))
        self.latent_norm = Norm(c.norm, c.n_embd, c.norm_gain, c.bias)

    def init_weights(self):
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
        twin = super().fork(n)
        if self.context is not None:
            twin.context = [tuple(t.repeat_interleave(n, 0) for t in pair) for pair in self.context]
        return twin


class TextTransformer(Transformer):
    """The decoder over padded rows of tokens, for captions and other short texts of unequal length."""

    def forward(self, x, targets=None, padding=None, positions=None, **how):
        """As Transformer.forward, with padding (B, T) bool, True where a row has no token, on either side; there no
        target counts. targets may be (B, T) with one label."""
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

    decode, forward = EncoderDecoder.decode, EncoderDecoder.forward

    def new_cache(self, batch_size, max_length, window=None, device=None, dtype=None):
        """An empty Cache with room for any source before max_length tokens of the answer."""
        return super().new_cache(batch_size, self.config.block_size + max_length, window, device, dtype)
