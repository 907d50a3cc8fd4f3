"""The networks of train_worldmodel.py: what turned one frame into the next, frames as tokens, the next frame's tokens.

Shapes: B batch, T frames, H x W pixels, N tokens of a frame, P colours of a palette, K codes, A actions, C width.
Frames are float32 in 0..1 (B, T, H, W, 3). Where the data has a palette, what is written is P logits a pixel, else RGB.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from cache import Cache
from discrete import FSQ, VQ, Quantised, straight_through
from mixers import Linear, Norm
from model import Block, TransformerConfig, initialise, make_ropes
from networks import (CrossBlock, Encoder, SpatialTransformer, SpatioTemporal, TextTransformer, axial_tables,
                      frame_places, places_of)


def to_patches(x, p):
    """x (..., H, W, c) -> (..., N, p p c), N = (H / p) (W / p), row by row."""
    *batch, H, W, c = x.shape
    return x.view(*batch, H // p, p, W // p, p, c).transpose(-4, -3).reshape(*batch, H * W // p ** 2, p * p * c)


def from_patches(x, p, height, width):
    """The inverse: x (..., N, p p c) -> (..., height, width, c)."""
    *batch, N, c = x.shape
    x = x.view(*batch, height // p, width // p, p, p, c // p ** 2).transpose(-4, -3)
    return x.reshape(*batch, height, width, c // p ** 2)


def config_of(n_layer, n_head, n_embd, block_size, vocab_size=1, ff_mult=2.0, **more):
    """The TransformerConfig that all these models have in common."""
    return TransformerConfig(vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, ff_mult=ff_mult,
                             block_size=block_size, norm="rms", positions="rope", bias=False, init="xavier",
                             qk_norm=True, **more)


def fill_evenly(layer, scale=1.0):
    """Weights U(-1, 1) / sqrt(fan_in) times `scale`, biases 0."""
    bound = layer.weight[0].numel() ** -0.5
    layer.weight.uniform_(-bound, bound).mul_(scale)
    layer.bias.zero_()


class Conv(nn.Conv2d):
    """A convolution with zero padding, whose first weights are multiplied by `scale`."""

    def __init__(self, c_in, c_out, kernel, stride=1, scale=1.0):
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2 if stride == 1 else 0)
        self.scale, self.own = scale, {"weight": "head", "bias": "bias"}  # a head's rule: AdamW, with decay

    def reset_parameters(self):
        """Draws nothing: `fill` does."""

    def fill(self):
        """Called by `initialise`."""
        fill_evenly(self, self.scale)


class Affine(Linear):
    """A linear layer between two kinds of things (pixels, codes, actions) and the stream."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.own = {"weight": "head", "bias": "bias"}

    def fill(self):
        """Called by `initialise`."""
        fill_evenly(self)


class Residual(nn.Module):
    """h + conv(relu(conv(h))), with a gain and a shift between them that z (B, D) sets where n_condition (FiLM)."""

    def __init__(self, width, n_condition=0):
        super().__init__()
        self.first, self.second = Conv(width, width, 3), Conv(width, width, 3, scale=0.3)
        self.film = Affine(n_condition, 2 * width) if n_condition else None

    def forward(self, h, z=None):
        """h (B, C, rows, columns)."""
        a = self.first(h)
        if self.film is not None:
            gain, shift = self.film(z)[:, :, None, None].chunk(2, 1)
            a = a * (1 + gain) + shift
        return h + self.second(F.relu(a))


# --- Latent actions ---

class Signs(nn.Module):
    """n_codes = 2^D codes, the signs of D numbers, each normalised over the batch first (BatchNorm without parameters,
    running statistics in evaluation): no code can win them all. FSQ (Mentzer et al. 2024) with two levels a channel.
    As in `VQ`, a pass changes nothing: a training step calls `follow` once. The batch is that of one pass: not linear
    in its rows.

    Raises ValueError where n_codes is no power of two from 2 on.
    """

    def __init__(self, n_codes):
        super().__init__()
        self.width = n_codes.bit_length() - 1
        if n_codes < 2 or n_codes != 2 ** self.width:
            raise ValueError(f"n_codes is {n_codes}: signs make a power of two, 2, 4, 8, ...; take vq for another")
        self.norm = nn.BatchNorm1d(self.width, affine=False)
        self.register_buffer("bits", 2 ** torch.arange(self.width), persistent=False)

    def forward(self, u, soft=False):
        """u (B, D) -> Quantised with e (B, D), codes (B,); soft: e = tanh of the normalised u, not its signs."""
        x = u.float()
        t = torch.tanh(F.batch_norm(x, None, None, training=True, eps=self.norm.eps) if self.training else self.norm(x))
        signs = torch.where(t > 0, 1.0, -1.0)
        return Quantised(t if soft else straight_through(signs, t), ((t > 0) * self.bits).sum(-1), z=u)

    @torch.no_grad()
    def follow(self, u, codes=None):
        """One update of the running statistics by u (M, D) of all passes of a step, in training."""
        self.norm(u.float())

    def look_up(self, codes):
        """codes (...) int64 -> (..., D)."""
        return (codes[..., None] // self.bits % 2) * 2.0 - 1.0


class Nearest(nn.Module):
    """n_codes vectors of width D, the nearest chosen, codes as running means (VQ): what `Signs` is compared with."""

    def __init__(self, n_codes, width=8):
        super().__init__()
        self.width, self.vq = width, VQ(n_codes, width, "dot")

    def forward(self, u, soft=False):
        """As Signs.forward; the Quantised has a commitment loss."""
        found = self.vq(u[:, None], "vq")
        e = u if soft else found.e[:, 0]
        return Quantised(e, found.codes[:, 0], z=u, loss=found.loss)

    def follow(self, u, codes):
        """As VQ.follow."""
        self.vq.follow(u, codes)

    def look_up(self, codes):
        """codes (...) int64 -> (..., D)."""
        return self.vq.look_up(codes)


class ActionModel(nn.Module):
    """A latent action model (Genie, Bruce et al. 2024, section 2.1): which of n_codes codes turned frames up to t into
    frame t+1, learned by writing frame t+1 from the frames before and the code alone.

    kind "conv": convolutions over patches. Encoder and decoder see `history` frames: with one, how a thing moves by
    itself is hidden, and competes with the action for the code. The encoder also sees x_t+1 - x_t.
    kind "transformer": the same with spatio-temporal transformers, axial positions, causal in time; it learns from
    every frame of its history (`every`), and the decoder also sees the codes that led to the frames before.
    colours: P of the palette, or None: then x_t plus a residual is written.
    With signs the bias of `to_code` has no gradient: their normalisation takes it away.
    """

    def __init__(self, height, width, patch, colours, history=2, n_codes=8, n_embd=32, n_layer=3, kind="conv",
                 quantiser="signs", n_head=4, difference=True):
        super().__init__()
        self.height, self.width, self.patch, self.colours = height, width, patch, colours
        self.history, self.n_codes, self.kind, self.difference = history, n_codes, kind, difference
        self.quantiser = Signs(n_codes) if quantiser == "signs" else Nearest(n_codes)
        D, n_out = self.quantiser.width, patch * patch * (colours or 3)
        self.config = config_of(n_layer, n_head, n_embd, max(2, history + 1))
        self.to_hidden, self.to_code = Affine(n_embd, n_embd), Affine(n_embd, D)
        if kind == "conv":
            self.look = Conv(3 * (history + 1), n_embd, patch, patch)
            self.encoder = nn.ModuleList(Residual(n_embd) for _ in range(n_layer))
            self.see = Conv(3 * history, n_embd, patch, patch)
            self.decoder = nn.ModuleList(Residual(n_embd, D) for _ in range(n_layer))
            self.write = Conv(n_embd, n_out, 1)
        else:
            grid = height // patch, width // patch
            self.look, self.see = Affine(6 * patch * patch, n_embd), Affine(6 * patch * patch, n_embd)
            self.encoder = SpatioTemporal(self.config, grid[0] * grid[1], grid)
            self.decoder = SpatioTemporal(self.config, grid[0] * grid[1], grid)
            self.act, self.write = Affine(D, n_embd), Affine(n_embd, n_out)
        initialise(self)

    def encode(self, frames):
        """frames (B, history + 1, H, W, 3), the last of them the one to explain -> u (B, D), before the quantiser."""
        if self.kind == "transformer":
            return self.encode_every(frames)[:, -1]
        last = frames[:, -1:] - frames[:, -2:-1] if self.difference else frames[:, -1:]
        h = self.look(self._channels(torch.cat((frames[:, :-1], last), 1)))
        for block in self.encoder:
            h = block(h)
        return self.to_code(F.relu(self.to_hidden(h.amax((2, 3)))))

    def encode_every(self, frames):
        """Transformer: frames (B, T + 1, H, W, 3) -> u (B, T, D), for each frame but the first what led to it."""
        h = self.encoder(self.look(self._moving(frames)))[:, 1:].amax(2)         # (B, T, C), over the places
        return self.to_code(F.relu(self.to_hidden(h)))

    def predict(self, frames, e):
        """frames (B, history, H, W, 3) and what the code stands for e (B, D) -> (B, H, W, P) logits, or (..., 3)."""
        if self.kind == "transformer":
            e = e[:, None]
            if frames.size(1) > 1:                           # what led to the frames before, as in training
                u = self.encode_every(frames)
                e = torch.cat((self.quantiser(u.flatten(0, 1)).e.view(u.shape).to(e.dtype), e), 1)
            return self.predict_every(frames, e)[:, -1]
        h = self.see(self._channels(frames))
        for block in self.decoder:
            h = block(h, e)
        pixels = self.write(h).permute(0, 2, 3, 1).flatten(1, 2)                 # (B, N, p p P)
        out = from_patches(pixels, self.patch, self.height, self.width)
        return out if self.colours else frames[:, -1] + out

    def predict_every(self, frames, e):
        """Transformer: frames (B, T, H, W, 3), e (B, T, D) -> the frame after each (B, T, H, W, P or 3)."""
        x = self.see(self._moving(frames)) + self.act(e)[:, :, None]
        out = from_patches(self.write(self.decoder(x)), self.patch, self.height, self.width)
        return out if self.colours else frames + out

    def every(self, frames, soft=False):
        """Transformer: frames (B, T + 1, H, W, 3) -> (what it writes for each but the first (B, T, H, W, P or 3), each
        from the true frames and the codes up to it, Quantised of B T codes): many targets of one pass."""
        u = self.encode_every(frames)
        found = self.quantiser(u.flatten(0, 1), soft)
        return self.predict_every(frames[:, :-1], found.e.view(u.shape)), found

    def forward(self, frames, soft=False):
        """frames (B, history + 1, H, W, 3) -> (what `predict` writes for the last of them, Quantised)."""
        found = self.quantiser(self.encode(frames), soft)
        return self.predict(frames[:, :-1], found.e), found

    @staticmethod
    def _channels(frames):
        """(B, T, H, W, 3) -> (B, 3 T, H, W)."""
        return frames.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def _moving(self, frames):
        """Patches of each frame beside its difference from the one before: (B, T, N, 6 p p)."""
        before = torch.cat((frames[:, :1], frames[:, :-1]), 1)
        return to_patches(torch.cat((frames, frames - before), -1), self.patch)


# --- Frames as tokens ---

class Tokenizer(nn.Module):
    """A VQ-VAE over patches: frames to N tokens each, and back (van den Oord et al. 2017; Genie's ST-ViViT).

    kind "spatial": each frame by itself; "spatiotemporal": causal in time as well, so that a token may also say what
    moved; a frame sees the last `window` frames, as many as a training clip has. quantiser "vq" (codes as running
    means) or "fsq". Raises ValueError where `patch` does not divide the sides.
    """

    def __init__(self, height, width, patch, colours, codebook_size=64, code_dim=8, n_layer=2, n_head=4, n_embd=64,
                 kind="spatial", quantiser="vq", window=None, block_size=16):
        super().__init__()
        if height % patch or width % patch:
            raise ValueError(f"patch {patch} does not divide frames of {height} x {width}")
        self.height, self.width, self.patch, self.colours, self.kind = height, width, patch, colours, kind
        self.window = window
        grid = height // patch, width // patch
        self.n_tokens, self.grid, self.codebook_size = grid[0] * grid[1], grid, codebook_size
        self.config = config_of(n_layer, n_head, n_embd, block_size)
        self.codebook = FSQ(codebook_size) if quantiser == "fsq" else VQ(codebook_size, code_dim, "cosine")
        width_of_code = len(self.codebook.levels) if quantiser == "fsq" else code_dim

        def trunk():
            if kind == "spatial":
                return SpatialTransformer(self.config, self.n_tokens, grid)
            return SpatioTemporal(self.config, self.n_tokens, grid)
        self.look, self.encoder, self.to_code = Affine(3 * patch * patch, n_embd), trunk(), Affine(n_embd,
                                                                                                   width_of_code)
        self.from_code, self.decoder = Affine(width_of_code, n_embd), trunk()
        self.write = Affine(n_embd, patch * patch * (colours or 3))
        initialise(self)

    def through(self, trunk, x, cache=None):
        """x (B, T, N, C) through a trunk of either kind."""
        if self.kind == "spatial":
            return trunk(x.flatten(0, 1)).view(x.shape)
        return trunk(x, cache, self.window if cache is None else None)

    def encode(self, frames):
        """frames (B, T, H, W, 3) -> (B, T N, D), before the codebook."""
        return self.to_code(self.through(self.encoder, self.look(to_patches(frames, self.patch)))).flatten(1, 2)

    def decode(self, e, cache=None):
        """What the codes stand for, e (B, T N, D) -> (B, T, H, W, P) logits, or (..., 3)."""
        x = self.from_code(e.view(len(e), -1, self.n_tokens, e.size(-1)))
        pixels = self.write(self.through(self.decoder, x, cache))
        return from_patches(pixels, self.patch, self.height, self.width)

    def forward(self, frames, estimator="vq"):
        """frames (B, T, H, W, 3) -> (what `decode` writes, Quantised)."""
        found = self.codebook(self.encode(frames), estimator)
        return self.decode(found.e), found

    def tokens(self, frames):
        """frames (B, T, H, W, 3) -> (B, T, N) int64."""
        return self.codebook(self.encode(frames)).codes.view(len(frames), -1, self.n_tokens)

    def pixels(self, tokens, cache=None):
        """tokens (B, T, N) -> what `decode` writes. With a cache the frames go after those that it holds."""
        return self.decode(self.codebook.look_up(tokens.flatten(1)), cache)

    def new_cache(self, batch_size, max_length):
        """For `pixels` of frames one after another; None where frames are seen one by one anyway."""
        return None if self.kind == "spatial" else self.decoder.new_cache(batch_size, max_length, self.window)


# --- Drawing tokens ---

def draw(logits, temperature=1.0, generator=None):
    """A token (..., 1) of logits (..., K), by Gumbel's noise from `generator`, on the CPU whatever the device;
    temperature 0: the likeliest."""
    if temperature:
        chance = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(logits.device)
        logits = logits.float() / temperature - torch.log(-torch.log(chance))
    return logits.argmax(-1, keepdim=True)


def fill_in(logits_of, B, N, K, device=None, steps=8, temperature=1.0, choice=4.5, generator=None):
    """Tokens (B, N) below K by MaskGIT (Chang et al. 2022, section 3.2): all are hidden (K) at first; in each of
    `steps` rounds every hidden place draws a token from logits_of(tokens (B, N)) (B, N, K), and those most sure of
    theirs keep it, so that half a cosine of the places stays hidden.

    temperature 0: the likeliest token; choice: how much chance there is in who is sure, falling to none in the last
    round. Draws come from `generator`, on the CPU whatever the device.
    """
    def gumbel(*shape):
        return torch.empty(shape).exponential_(generator=generator).clamp_(min=1e-20).log_().neg_().to(device)
    tokens, left = torch.full((B, N), K, dtype=torch.int64, device=device), N
    for step in range(steps):
        if not left:
            break
        hidden, logits = tokens == K, logits_of(tokens)
        drawn = (logits / temperature + gumbel(B, N, K) if temperature else logits).argmax(-1)
        sure = torch.log_softmax(logits, -1).gather(-1, drawn[..., None])[..., 0]
        share = (step + 1) / steps
        if choice and temperature and step + 1 < steps:
            sure = sure + choice * (1 - share) * gumbel(B, N)
        # one place at least is settled in a round, and all are after the last
        left = min(int(N * math.cos(math.pi / 2 * share)), left - 1) if step + 1 < steps else 0
        order = sure.masked_fill(~hidden, math.inf).argsort(dim=1, descending=True, stable=True)
        settled = torch.zeros_like(hidden).scatter_(1, order[:, :N - left], True)
        tokens = torch.where(hidden & settled, drawn, tokens)
    return tokens


# --- The next frame ---

class Dynamics(nn.Module):
    """MaskGIT over the tokens of a video (Chang et al. 2022; Genie's dynamics): where tokens of a frame are hidden, it
    says what they are, from the others, the frames before, and the action that led to each frame.

    action_input "add": the action's embedding is added to every token of its frame; "prepend": it is one more token.
    Actions are 0 to n_actions - 1, and n_actions where there is none (the first frame); the token codebook_size is the
    mask.
    """

    def __init__(self, grid, codebook_size, n_actions, n_layer=2, n_head=4, n_embd=64, action_input="add",
                 block_size=16):
        super().__init__()
        self.grid, self.n_tokens = tuple(grid), grid[0] * grid[1]
        self.codebook_size, self.n_actions = codebook_size, n_actions
        self.extra = int(action_input == "prepend")
        self.config = config_of(n_layer, n_head, n_embd, block_size, codebook_size + 1)
        self.embed = nn.Parameter(torch.empty(codebook_size + 1, n_embd))
        self.acts = nn.Parameter(torch.empty(n_actions + 1, n_embd))
        self.own = {"acts": "embedding"}
        self.trunk = SpatioTemporal(self.config, self.n_tokens + self.extra, self.grid)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        initialise(self)

    def fill(self):
        """Actions N(0, 0.02), as all embeddings."""
        self.acts.normal_(0, 0.02)

    @property
    def mask(self):
        """The token of a hidden place."""
        return self.codebook_size

    def forward(self, tokens, actions, cache=None, window=None, streams=None):
        """tokens (B, T, N) int64, actions (B, T) int64, the one that led to each frame -> logits (B, T, N, K) float32.

        streams = (true, first): some frames are as they are, the others corrupted (SpatioTemporal).
        """
        x, act = F.embedding(tokens, self.embed), F.embedding(actions, self.acts)[:, :, None]
        x = torch.cat((act, x), 2) if self.extra else x + act
        h = self.trunk(x, cache, window, streams)[:, :, self.extra:]
        return F.linear(h, self.heads[0]).float()

    def new_cache(self, batch_size, max_length, window=None):
        """An empty cache of max_length frames, or of a sliding window of them."""
        return self.trunk.new_cache(batch_size, max_length + 1, window)

    @torch.no_grad()
    def next_frame(self, actions, cache=None, steps=8, temperature=1.0, choice=4.5, generator=None, past=None,
                   window=None):
        """The tokens (B, N) of the frame that `actions` (B,) lead to, by `fill_in`.

        With a cache, which holds the frames before, only the new frame runs in each round, and once more with its final
        tokens, so that the cache then holds it too: exact, since frames see only the past. Without, past = (tokens
        (B, T, N), actions (B, T)) are computed again in every round; `window` frames are seen (a sliding cache has its
        own).
        """
        actions = actions.view(-1, 1)

        def logits_of(tokens):
            if cache is None:
                frames = torch.cat((past[0], tokens[:, None]), 1), torch.cat((past[1], actions), 1)
                return self(*frames, window=window)[:, -1]
            held = cache.length
            logits = self(tokens[:, None], actions, cache)[:, -1]
            cache.crop(held)
            return logits
        tokens = fill_in(logits_of, len(actions), self.n_tokens, self.codebook_size, self.embed.device, steps,
                         temperature, choice, generator)
        if cache is not None:
            self(tokens[:, None], actions, cache)                                # what is kept are the final tokens'
        return tokens

    @torch.no_grad()
    def generate(self, tokens, actions, plan, cached=True, window=None, generator=None, **how):
        """Goes on after frames tokens (B, T, N), led to by actions (B, T): the tokens (B, n, N) of the frames that plan
        (B, n) leads to, one after another. cached False computes all frames again in every round of every frame.
        `how`: of next_frame."""
        cache, made = None, []
        if cached:
            cache = self.new_cache(len(tokens), tokens.size(1) + plan.size(1), window)
            self(tokens, actions, cache)
            how = dict(how, cache=cache)
        for t in range(plan.size(1)):
            if not cached:
                how = dict(how, past=(tokens, actions), window=window)
            frame = self.next_frame(plan[:, t], generator=generator, **how)
            made.append(frame)
            tokens, actions = torch.cat((tokens, frame[:, None]), 1), torch.cat((actions, plan[:, t:t + 1]), 1)
        return torch.stack(made, 1)


class CausalDynamics(nn.Module):
    """The same by a causal transformer (as IRIS, Micheli et al. 2023): action, then the frame's tokens row by row, each
    seeing all before it; N passes of one token for a frame. Its cache holds (N + 1) T keys a layer.
    """

    def __init__(self, grid, codebook_size, n_actions, n_layer=2, n_head=4, n_embd=64, block_size=16):
        super().__init__()
        self.grid, self.n_tokens = tuple(grid), grid[0] * grid[1]
        self.codebook_size, self.n_actions = codebook_size, n_actions
        c = self.config = config_of(n_layer, n_head, n_embd, block_size * (self.n_tokens + 1), codebook_size)
        self.embed = nn.Parameter(torch.empty(codebook_size, n_embd))
        self.acts = nn.Parameter(torch.empty(n_actions + 1, n_embd))
        self.place_position = nn.Parameter(torch.empty(self.n_tokens, n_embd))
        self.own = {"acts": "embedding", "place_position": "position"}
        self.ropes = make_ropes(c)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(n_layer))
        self.norm = Norm(c.norm, n_embd, c.norm_gain, c.bias)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        initialise(self)

    def fill(self):
        """N(0, 0.02), as embeddings and positions are."""
        self.acts.normal_(0, 0.02)
        self.place_position.normal_(0, 0.02)

    def read(self, x, cache=None, window=None):
        """x (B, S, C), what is read after what the cache holds -> logits (B, S, K) of the token after each."""
        places = places_of(self.ropes, x.size(1), start=0 if cache is None else cache.length, window=window)
        for i, block in enumerate(self.blocks):
            x = block(x, places, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(places)
        return F.linear(self.norm(x), self.heads[0]).float()

    def forward(self, tokens, actions, cache=None, window=None):
        """tokens (B, T, N) int64, actions (B, T) -> logits (B, T, N, K) of each token given all before it. A window
        of frames is one of window (N + 1) places."""
        x = torch.cat((F.embedding(actions, self.acts)[:, :, None],
                       F.embedding(tokens, self.embed) + self.place_position), 2)           # (B, T, N + 1, C)
        window = None if window is None else window * (self.n_tokens + 1)
        return self.read(x.flatten(1, 2), cache, window).view(*x.shape[:3], -1)[:, :, :-1]

    def new_cache(self, batch_size, max_length, window=None):
        """An empty cache of max_length frames, or of a sliding window of them."""
        n, p = self.n_tokens + 1, self.embed
        window = None if window is None else window * n
        return Cache((block.mixer.new_cache(batch_size, max_length * n, window, p.device, p.dtype)
                      for block in self.blocks), window)

    @torch.no_grad()
    def next_frame(self, actions, cache=None, steps=None, temperature=1.0, choice=None, generator=None, past=None,
                   window=None):
        """The tokens (B, N) of the frame that `actions` (B,) lead to, one after another. As Dynamics.next_frame, but
        steps and choice are MaskGIT's and mean nothing here."""
        B = len(actions)
        tokens = torch.zeros(B, 0, dtype=torch.int64, device=self.embed.device)
        new = F.embedding(actions.view(B, 1), self.acts)
        for place in range(self.n_tokens):
            if cache is not None:
                logits = self.read(new, cache)[:, -1]
            else:
                whole = torch.cat((past[0], F.pad(tokens, (0, self.n_tokens - place))[:, None]), 1)
                logits = self(whole, torch.cat((past[1], actions.view(B, 1)), 1), window=window)[:, -1, place]
            drawn = draw(logits, temperature, generator)
            tokens = torch.cat((tokens, drawn), 1)
            new = F.embedding(drawn, self.embed) + self.place_position[place]
        if cache is not None:
            self.read(new, cache)                                                # the frame's last token
        return tokens

    generate = Dynamics.generate


# --- Words ---

N_CHARACTERS = 128  # ASCII; 0 begins and ends a text, and fills up a shorter row


def as_text(rows):
    """Rows of characters (B, S) int64 -> list of str, each up to its first 0."""
    return ["".join(map(chr, row)).partition("\0")[0] for row in rows.tolist()]


def as_characters(texts, length=None):
    """texts -> (B, S) int64, S the longest of them (or `length`), 0 where a text has ended. ValueError: not ASCII, or
    longer than `length`."""
    longest = max(map(len, texts))
    length = longest if length is None else length
    if longest > length or not all(text.isascii() and "\0" not in text for text in texts):
        raise ValueError(f"a sentence of at most {length} plain ASCII characters is needed")
    return torch.tensor([[ord(letter) for letter in text] + [0] * (length - len(text)) for text in texts])


class Writer(TextTransformer):
    """A causal language model over the characters of captions, with its own generation loop."""

    def __init__(self, block_size, n_layer=2, n_head=4, n_embd=64):
        super().__init__(config_of(n_layer, n_head, n_embd, block_size + 1, N_CHARACTERS, 4.0))

    def nats(self, text):
        """text (B, S) int64, 0 after its end -> mean loss in nats per character, the end's 0 counted once."""
        ended = F.pad(text, (0, 1))                                              # (B, S + 1): what is to come
        seen = F.pad(text, (1, 0))                                               # 0 begins
        later = (F.pad(ended == 0, (1, 0))[:, :-1]).cummax(1).values             # after the end
        return super().forward(seen, ended.masked_fill(later, -1))[0]

    @torch.no_grad()
    def write(self, n, temperature=1.0, generator=None):
        """n texts, each to its end or block_size, drawn character by character."""
        text = new = torch.zeros(n, 1, dtype=torch.int64, device=self.heads[0].device)       # 0 begins
        cache = self.new_cache(n, self.config.block_size)
        while text.size(1) < self.config.block_size and not (text[:, 1:] == 0).any(1).all():
            new = draw(self(new, cache=cache)[:, -1], temperature, generator)
            text = torch.cat((text, new), 1)
        return as_text(text[:, 1:])


class FirstFrame(nn.Module):
    """A sentence starts a world: an encoder reads a padded caption, a spatial transformer that reads its states fills
    in the tokens of a frame, by MaskGIT. What the caption's keys and values are is computed once, for all rounds.
    """

    def __init__(self, grid, codebook_size, n_layer=2, n_head=4, n_embd=64, block_size=160):
        super().__init__()
        self.grid, self.n_tokens, self.codebook_size = tuple(grid), grid[0] * grid[1], codebook_size
        c = self.config = config_of(n_layer, n_head, n_embd, block_size, N_CHARACTERS)
        self.encoder = Encoder(c)
        self.tokens = nn.Parameter(torch.empty(codebook_size + 1, n_embd))
        self.places = nn.Parameter(torch.empty(self.n_tokens, n_embd))
        self.own = {"tokens": "embedding", "places": "position"}
        self.blocks = nn.ModuleList(CrossBlock(c, i) for i in range(n_layer))
        self.norm = Norm(c.norm, n_embd, c.norm_gain, c.bias)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        for name, table in zip(("cos", "sin"), axial_tables(*self.grid, c.head_dim)):
            self.register_buffer(name, table, persistent=False)
        initialise(self)

    def fill(self):
        """N(0, 0.02), as embeddings and positions are; places N(0, 1), since all queries begin with the same token."""
        self.tokens.normal_(0, 0.02)
        self.places.normal_()

    def read(self, text):
        """text (B, S) int64, 0 where it has ended -> what `forward` takes: keys and values of each layer, lengths."""
        lengths = (text != 0).sum(1)
        states = self.encoder(text, lengths)
        return [block.cross.keys(states) for block in self.blocks], lengths

    def forward(self, tokens, held):
        """tokens (B, N) int64, codebook_size where hidden; held of `read` -> logits (B, N, K) float32."""
        keys, lengths = held
        places = frame_places(self, self.n_tokens)
        x = F.embedding(tokens, self.tokens) + self.places
        for block, pair in zip(self.blocks, keys):
            x = block(x, pair, places, padding=lengths)
        return F.linear(self.norm(x), self.heads[0]).float()

    @torch.no_grad()
    def draw(self, text, **how):
        """The tokens (B, N) of frames that captions text (B, S) describe. `how`: of fill_in."""
        held = self.read(text)
        return fill_in(lambda tokens: self(tokens, held), len(text), self.n_tokens, self.codebook_size, text.device,
                       **how)
