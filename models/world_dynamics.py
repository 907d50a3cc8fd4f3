"""Dynamics over tokens of frames: MaskGIT, and token by token."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Norm, initialise, make_ropes
from models.encoder_decoder import positions_of
from models.video import SpatioTemporal
from models.world_layers import config_of, from_patches, to_patches
from nanolab.cache import Cache


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
    round. Draws come from `generator`, on the CPU.
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
    """MaskGIT over the tokens of a video (Chang et al. 2022; Genie's dynamics): says what the hidden tokens of a frame
    are, from the others, the frames before, and the action that led to each frame.

    action_input "add": the action's embedding is added to every token of its frame; "prepend": it is one more token.
    Action n_actions: there is none (the first frame); token codebook_size: the mask.
    """
    draft = False  # does it also read the last frame's pixels?

    def __init__(self, grid, codebook_size, n_actions, n_layer=2, n_head=4, n_embd=64, action_input="add",
                 block_size=16):
        super().__init__()
        self.grid, self.n_tokens = tuple(grid), grid[0] * grid[1]
        self.codebook_size, self.n_actions = codebook_size, n_actions
        self.extra = int(action_input == "prepend")
        self.config = config_of(n_layer, n_head, n_embd, block_size, codebook_size + 1)
        self.embed = nn.Parameter(torch.empty(codebook_size + 1, n_embd))
        self.acts = nn.Parameter(torch.empty(n_actions + 1, n_embd))
        self.roles = {"acts": "embedding"}
        self.trunk = SpatioTemporal(self.config, self.n_tokens + self.extra, self.grid)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        initialise(self)

    def init_weights(self):
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
                   window=None, watch=None):
        """The tokens (B, N) of the frame that `actions` (B,) lead to, by `fill_in`. watch: is called with the logits
        (B, N, K) of the first round, in which all is hidden.

        With a cache, which holds the frames before, only the new frame runs in each round, and once more with its final
        tokens, which the cache then holds too. Without, past = (tokens (B, T, N), actions (B, T)) are computed again in
        every round, of which `window` frames are seen.
        """
        actions = actions.view(-1, 1)

        def logits_of(tokens):
            if cache is None:
                frames = torch.cat((past[0], tokens[:, None]), 1), torch.cat((past[1], actions), 1)
                return self(*frames, window=window)[:, -1]
            held = cache.length
            logits = self(tokens[:, None], actions, cache)[:, -1]
            cache.crop(held)
            if watch is not None and (tokens == self.mask).all():
                watch(logits)
            return logits
        tokens = fill_in(logits_of, len(actions), self.n_tokens, self.codebook_size, self.embed.device, steps,
                         temperature, choice, generator)
        if cache is not None:
            self(tokens[:, None], actions, cache)                                # what is kept are the final tokens'
        return tokens

    @torch.no_grad()
    def generate(self, tokens, actions, plan, cached=True, window=None, generator=None, shown=None, **how):
        """Goes on after frames tokens (B, T, N), led to by actions (B, T): the tokens (B, n, N) of the frames that plan
        (B, n) leads to, one after another. cached False computes all frames again in every round of every frame.
        shown: the last of them (B, 1, H, W, 3), where the model drafts by it. `how`: of next_frame."""
        cache, made = None, []
        if cached:
            cache = self.new_cache(len(tokens), tokens.size(1) + plan.size(1), window)
            self(tokens, actions, cache)
            if shown is not None:
                cache.shown = shown
            how = dict(how, cache=cache)
        for t in range(plan.size(1)):
            if not cached:
                how = dict(how, past=(tokens, actions), window=window)
            frame = self.next_frame(plan[:, t], generator=generator, **how)
            made.append(frame)
            tokens, actions = torch.cat((tokens, frame[:, None]), 1), torch.cat((actions, plan[:, t:t + 1]), 1)
        return torch.stack(made, 1)


class PackedDynamics(Dynamics):
    """Dynamics of a camera's frames: what differs from `Dynamics` are the ends of the trunk.

    pack: p x p tokens share one place of the trunk, each with an input and an output of its own, so that fine tokens
    cost no more places. codebook, an FSQ: a token goes in as its levels, by a linear map, and its logit is the sum of
    those of its levels: neighbouring codes share what they learn; None: a table of vectors, as `Dynamics` has.
    draft, with a codebook: a hidden token's place is also told, as numbers of the tokenizer's encoder, what the action
    model makes of the frame before, and its logits begin as those of a normal distribution of the code around them,
    whose precision is learned. `sources` {"tokenizer", "actions"}, the trained models, is to be set, and is not part of
    the weights. The first frame has none.
    """

    def __init__(self, grid, codebook_size, n_actions, n_layer=2, n_head=4, n_embd=64, action_input="add",
                 block_size=16, pack=2, codebook=None, draft=False):
        nn.Module.__init__(self)
        self.grid, self.n_tokens, self.pack = tuple(grid), grid[0] * grid[1], pack
        self.codebook_size, self.n_actions, self.extra = codebook_size, n_actions, int(action_input == "prepend")
        self.config = config_of(n_layer, n_head, n_embd, block_size, codebook_size + 1)
        places, self.sources = (grid[0] // pack, grid[1] // pack), None
        self.digits, self.draft, n_in, n_out, D = codebook is not None, draft, codebook_size, codebook_size, 0
        if self.digits:
            codes = torch.arange(codebook_size)
            digits = codes[:, None] // codebook.basis % codebook.levels
            one_hot = torch.cat([F.one_hot(d, int(n)) for d, n in zip(digits.T, codebook.levels)], 1).float()
            numbers = F.pad(codebook.look_up(codes).float(), (0, 1), value=1.0)  # (K, D + 1), the bias last
            self.register_buffer("numbers", numbers, persistent=False)
            self.register_buffer("levels", one_hot, persistent=False)            # (K, sum of the levels)
            n_in, n_out, D = numbers.size(1), one_hot.size(1), numbers.size(1) - 1
        self.entry = nn.Parameter(torch.empty(pack ** 2, n_in + 1, n_embd))      # the mask last
        self.acts = nn.Parameter(torch.empty(n_actions + 1, n_embd))
        self.readout = nn.Parameter(torch.empty(pack ** 2, n_out, n_embd))
        self.roles = dict(entry="embedding", acts="embedding", readout="head")
        if draft:
            self.hints = nn.Parameter(torch.empty(pack ** 2, D, n_embd))
            self.log_precision = nn.Parameter(torch.empty(D))
            self.roles |= dict(hints="embedding", log_precision="gain")
        self.trunk = SpatioTemporal(self.config, places[0] * places[1] + self.extra, places)
        initialise(self)

    def init_weights(self):
        """N(0, 0.02), as embeddings and classifiers are; maps of a few numbers N(0, 0.3), precisions 5."""
        for name in self.roles:
            getattr(self, name).normal_(0, 0.3 if name == "hints" or name == "entry" and self.digits else 0.02)
        if self.draft:
            self.log_precision.fill_(math.log(5))

    @property
    def embed(self):
        """What tells the device."""
        return self.entry

    def packed(self, x):
        """x (B, T, N, c) -> (B, T, N / p p, p p, c)."""
        x = to_patches(x.unflatten(2, self.grid), self.pack)
        return x.unflatten(-1, (self.pack ** 2, -1))

    def drafts(self, frames, actions):
        """What the action model makes of frames (B, T, H, W, 3) by actions (B, T): the tokenizer's codes for it before
        they are rounded, (B, T, N, D)."""
        tokenizer, model, (B, T) = self.sources["tokenizer"], self.sources["actions"], actions.shape
        with torch.no_grad():
            frames = frames.flatten(0, 1).clamp(0, 1)[:, None]
            e = model.quantiser.look_up(actions.flatten().clamp(max=model.n_codes - 1)).to(frames.dtype)
            moved = model.predict(frames, e)[:, None].clamp(0, 1)
            book = tokenizer.codebook
            return (book.bounded(tokenizer.encode(moved)) / (book.levels // 2)).view(B, T, self.n_tokens, -1)

    def forward(self, tokens, actions, cache=None, window=None, streams=None, before=None):
        """As Dynamics.forward. before (B, n, H, W, 3): the true frames before the last n, those with hidden tokens,
        where they are known; else they are what the tokens before say."""
        hidden, p, table, drafts = tokens == self.mask, self.pack ** 2, self.entry, None
        if self.digits:                                      # (p p, K + 1, C)
            table = torch.cat((self.numbers @ table[:, :-1], table[:, -1:]), 1)
        chosen = self.packed(tokens[..., None])[..., 0]                          # (B, T, N / p p, p p)
        x = sum(F.embedding(chosen[..., j], table[j]) for j in range(p))
        if self.draft and (before := self.before(tokens, cache, streams) if before is None else before) is not None:
            n = before.size(1)
            drafts = self.drafts(before, actions[:, -n:]) * hidden[:, -n:, :, None]
            x = torch.cat((x[:, :-n], x[:, -n:] + torch.einsum("btnjd,jdc->btnc", self.packed(drafts), self.hints)), 1)
        if cache is not None and self.draft and not hidden.any():
            cache.shown = self.sources["tokenizer"].pixels(tokens[:, -1:])
        act = F.embedding(actions, self.acts)[:, :, None]
        x = torch.cat((act, x), 2) if self.extra else x + act
        h = self.trunk(x, cache, window, streams)[:, :, self.extra:]
        head = self.levels @ self.readout if self.digits else self.readout       # (p p, K, C)
        logits = torch.stack([F.linear(h, head[j]) for j in range(p)], 3)        # (B, T, N / p p, p p, K)
        logits = from_patches(logits.flatten(3), self.pack, *self.grid).flatten(2, 3).float()
        if drafts is None:
            return logits
        codes = self.numbers[:, :-1]                         # - precision (draft - code)^2, less what all codes share
        precision = self.log_precision.exp()
        near = 2 * (drafts * precision) @ codes.T - codes.square() @ precision
        return torch.cat((logits[:, :-n], logits[:, -n:] + near.float() * hidden[:, -n:, :, None]), 1)

    def before(self, tokens, cache, streams):
        """The frames (B, n, H, W, 3) before the last n of a pass, those with hidden tokens; None where none has."""
        if streams is not None:
            true, first = streams
            tokens = tokens[:, max(first - 1, 0):first - 1 + tokens.size(1) - true]
        elif not (tokens[:, -1] == self.mask).any():
            return None
        elif tokens.size(1) == 1:
            return None if cache is None else cache.shown
        else:
            tokens = tokens[:, -2:-1]
        return self.sources["tokenizer"].pixels(tokens)

    @torch.no_grad()
    def next_frame(self, actions, cache=None, *drawn, watch=None, **how):
        """As Dynamics.next_frame. What `watch` returns, a frame (B, 1, H, W, 3), is drafted from next."""
        seen = []
        how["watch"] = watch and (lambda logits: seen.append(watch(logits)))
        tokens = super().next_frame(actions, cache, *drawn, **how)
        if seen and self.draft:
            cache.shown = seen[0]
        return tokens

    def new_cache(self, batch_size, max_length, window=None):
        """As Dynamics.new_cache; it also holds the last frame, (B, 1, H, W, 3)."""
        cache = super().new_cache(batch_size, max_length, window)
        cache.shown = None
        return cache


class CausalDynamics(nn.Module):
    """The same by a causal transformer (as IRIS, Micheli et al. 2023): action, then the frame's tokens row by row, each
    seeing all before it; N passes of one token for a frame. Its cache holds (N + 1) T keys a layer.
    """
    draft = False

    def __init__(self, grid, codebook_size, n_actions, n_layer=2, n_head=4, n_embd=64, block_size=16):
        super().__init__()
        self.grid, self.n_tokens = tuple(grid), grid[0] * grid[1]
        self.codebook_size, self.n_actions = codebook_size, n_actions
        c = self.config = config_of(n_layer, n_head, n_embd, block_size * (self.n_tokens + 1), codebook_size)
        self.embed = nn.Parameter(torch.empty(codebook_size, n_embd))
        self.acts = nn.Parameter(torch.empty(n_actions + 1, n_embd))
        self.place_position = nn.Parameter(torch.empty(self.n_tokens, n_embd))
        self.roles = {"acts": "embedding", "place_position": "position"}
        self.ropes = make_ropes(c)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(n_layer))
        self.norm = Norm(c.norm, n_embd, c.norm_gain, c.bias)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        initialise(self)

    def init_weights(self):
        """N(0, 0.02), as embeddings and positions are."""
        self.acts.normal_(0, 0.02)
        self.place_position.normal_(0, 0.02)

    def read(self, x, cache=None, window=None):
        """x (B, S, C), what is read after what the cache holds -> logits (B, S, K) of the token after each."""
        positions = positions_of(self.ropes, x.size(1), start=0 if cache is None else cache.length, window=window)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(positions)
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
