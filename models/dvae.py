"""The discrete VAE of train_dvae.py: grids of coloured cells to codes, and codes to grids.

Encoder -> query pooler -> one codebook -> decoder. Layout "grid": the first code or two are height and width, and the
learned ones lie over the grid. "canvas": all are learned and lie over the canvas, row ends and PAD are tokens to say.
Attention knows distances from the start, and a path past it resamples values by distance alone: with queries that have
to find out where to look, the pooler is a blurred mean for long. Shapes: B grids, P patches, N latents, S side of the
canvas, C width; places are (row, column) in cells.
"""
import itertools
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import cross_entropy, readable
from model import FeedForward, Linear, Norm, initialise
from models.discrete import FSQ, LFQ, VQ, Books, Codebook, SimVQ


class Config(SimpleNamespace):
    """What the model is built from: train_dvae.py's settings, a `canvas` (data.arc.Canvas) and the `quantiser`,
    "categorical", "vq", "simvq", "lfq" or "fsq"."""
    tie_weights, vq_levels, vq_heads, rotation_trick = False, 1, 1, False

    @property
    def n_books(self):
        """Codes of a latent, each out of a book of its own."""
        return self.vq_levels * self.vq_heads

    @property
    def n_shape_codes(self):
        """Codes that name the shape, one of max_side^2: with layout "grid" as many as that takes, else none."""
        shapes = 1 if self.layout == "canvas" else self.canvas.max_side ** 2
        return next(n for n in itertools.count() if self.codebook_size ** n >= shapes)

    @property
    def n_latents(self):
        """Places of codes that are learned."""
        return (self.n_codes - self.n_shape_codes) // self.n_books

    @property
    def n_layer(self):
        """Layers with a branch into the same stream, for the initialisation."""
        return max(self.encoder_layers, self.latent_layers, self.decoder_layers)

    @property
    def ff_width(self):
        """Of the feed-forward's hidden layer; a gated one has as much in each half."""
        return round(self.n_embd * self.ff_mult)


def tiles(side, n):
    """Sizes [(rows, columns)] of the tiles that a canvas of side x side may have to be laid with so that there are not
    more than n, from the largest to a single cell."""
    sizes = [(1, 1)]
    while -(-side // sizes[-1][0]) * -(-side // sizes[-1][1]) > n:
        rows, columns = sizes[-1]
        sizes.append((rows + 1, columns) if rows == columns else (rows, columns + 1))
    return sizes[::-1]


def position_features(places, extent):
    """places (B, T, 2) and extent (B, 1, 2), in cells -> (B, T, 60): sines and cosines of the distances from the upper
    left and the lower right edge, wavelengths 2 to 64 cells, and of the place relative to the extent."""
    cells = torch.cat([places, extent - places], -1)[..., None] * (math.pi / 2 ** torch.arange(
        6, device=places.device))                                                # (B, T, 4, 6)
    relative = (places / extent)[..., None] * (math.pi * 2 ** torch.arange(3, device=places.device))  # (B, T, 2, 3)
    angles = torch.cat([cells.flatten(2), relative.flatten(2)], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


RELATIONS = 8


def relations(queries, keys, scale):
    """queries (B, T, 2), keys (B, S, 2) in cells, scale (B, 1, 2) cells -> (B, T, S, 8): what attention is told of two
    places, first of all their squared distance."""
    d = (queries.unsqueeze(2) - keys.unsqueeze(1)) / scale.unsqueeze(1)          # (B, T, S, 2)
    square, near = d.square(), d.abs() < 0.5
    total = square.sum(-1, keepdim=True)
    return torch.cat([total, total.clamp(max=4), d.abs(), d.clamp(-2, 2), near.to(d.dtype)], -1)


class Attention(nn.Module):
    """Attention of x to itself or to a context, with a learned bias per head that is linear in the relations of the two
    places; at first -a_h d^2, a_h = 1/2, 1/4, ... and 0 in the last head."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.n_head, self.cross, self.near = c.n_head, cross, c.distance_bias
        if cross:
            self.q, self.kv = Linear(c.n_embd, c.n_embd, bias=c.bias), Linear(c.n_embd, 2 * c.n_embd, bias=c.bias)
        else:
            self.qkv = Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.fused = {"kv": (c.n_embd,) * 2} if cross else {"qkv": (c.n_embd,) * 3}
        self.out = Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.distance = nn.Parameter(torch.empty(RELATIONS, c.n_head))
        self.roles = {"distance": "position"}

    def init_weights(self):
        """The heads look from near to far."""
        self.distance.zero_()
        if self.near:
            self.distance[0] = -0.5 ** torch.arange(1, self.n_head + 1)
            self.distance[0, -1] = 0.0

    def forward(self, x, related, padding=None, context=None):
        """x (B, T, C), related (B or 1, T, S, 8), padding (B, S) bool or None, context (B, S, C) -> (B, T, C)."""
        (B, T, C), H = x.shape, self.n_head
        if self.cross:
            q = self.q(x).view(B, T, H, -1).transpose(1, 2)                      # (B, H, T, D)
            k, v = self.kv(context).view(B, -1, 2, H, C // H).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        scores = (q * (C // H) ** -0.5) @ k.transpose(2, 3) + (related @ self.distance).permute(0, 3, 1, 2)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        p = torch.softmax(scores.float(), -1).to(v.dtype)
        return self.out((p @ v).transpose(1, 2).reshape(B, T, C))


class Resample(nn.Module):
    """Each query takes the values of the keys near it, by a softmax over their places alone: no attention to learn."""

    def __init__(self, c):
        super().__init__()
        self.distance = nn.Parameter(torch.empty(RELATIONS))
        self.roles = {"distance": "position"}

    def init_weights(self):
        """-3 d^2."""
        self.distance.zero_()
        self.distance[0] = -3.0

    def forward(self, x, related, padding=None):
        """x (B, S, C), related (B, T, S, 8), padding (B, S) -> (B, T, C)."""
        scores = related @ self.distance
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, :], -math.inf)
        return torch.softmax(scores.float(), -1).to(x.dtype) @ x


class Layer(nn.Module):
    """Attention to a context where `cross`, to itself, feed-forward; each on a norm, added to the stream."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (Norm(c.norm, c.n_embd, c.norm_gain, c.bias) if wanted else None
                                              for wanted in (cross, True, True))
        self.read = Attention(c, cross=True) if cross else None
        self.mix, self.ff, self.dropout = Attention(c), FeedForward(c), c.dropout

    def forward(self, x, related, padding=None, context=None, to_context=None, context_padding=None):
        """x (B, T, C), related (B or 1, T, T, 8), to_context (B, T, S, 8). Returns (B, T, C)."""
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        if self.read is not None:
            x = x + drop(self.read(self.norm1(x), to_context, context_padding, context))
        x = x + drop(self.mix(self.norm2(x), related, padding))
        return x + drop(self.ff(self.norm3(x)))


def build_codebook(c):
    """The codebook, or books, of a Config."""
    if c.quantiser in ("lfq", "fsq"):
        return (LFQ if c.quantiser == "lfq" else FSQ)(c.codebook_size)
    sizes, init = (c.codebook_size, c.code_dim, c.similarity), dict(init=c.codebook_init)
    if c.quantiser == "categorical":
        return Codebook(*sizes, **init)
    kind, how = (SimVQ, {}) if c.quantiser == "simvq" else (VQ, init)
    how["rotation"] = c.rotation_trick
    return kind(*sizes, **how) if c.n_books == 1 else Books(kind, c.n_books, c.vq_levels > 1, *sizes, **how)


class DVAE(nn.Module):
    """Grids to codes and back.

    With one latent attention to it has nothing to choose: its queries, and what they know of places, learn nothing."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        C, cells = c.n_embd, c.patch_height * c.patch_width
        self.rows, self.columns = -(-c.canvas.max_side // c.patch_height), -(-c.canvas.max_side // c.patch_width)
        self.register_buffer("patch", torch.tensor([[[c.patch_height, c.patch_width]]]), persistent=False)
        self.register_buffer("tiles", torch.tensor(tiles(c.canvas.max_side, c.n_latents)), persistent=False)  # (n, 2)
        # encoder
        self.cell = nn.Parameter(torch.empty(c.canvas.n_tokens, c.cell_dim))
        self.into = Linear(cells * c.cell_dim, C, bias=c.bias)
        self.places = nn.ModuleDict({name: Linear(width, C, bias=False) for name, width in
                                     (("patch", 60), ("latent", 64), ("code", 64), ("query", 60))})
        self.encoder = nn.ModuleList(Layer(c) for _ in range(c.encoder_layers))
        # pooler
        self.queries = nn.Parameter(torch.empty(c.n_latents, C))
        self.pool = Resample(c) if c.resample else None
        self.value = Linear(c.cell_dim, C, bias=False) if c.resample else None
        self.pooler = nn.ModuleList(Layer(c, cross=True) for _ in range(c.latent_layers))
        self.code_norm = Norm(c.norm, C, c.norm_gain, c.bias)
        self.to_code = Linear(C, c.code_dim, bias=c.bias)
        # codes
        self.codebook = build_codebook(c)
        # decoder
        self.from_code = Linear(c.code_dim, C, bias=c.bias)
        self.slots = nn.Parameter(torch.empty(c.n_latents, C))
        self.latents = nn.ModuleList(Layer(c) for _ in range(c.latent_layers))
        self.spread = Resample(c) if c.resample else None
        self.join = Linear(cells * C, C, bias=c.bias) if c.resample else None
        self.decoder = nn.ModuleList(Layer(c, cross=True) for _ in range(c.decoder_layers))
        self.head_norm = Norm(c.norm, C, c.norm_gain, c.bias)
        said = c.canvas.n_colours if c.layout == "grid" else c.canvas.n_outputs
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(cells * said, C))])
        self.roles = {"cell": "embedding", "queries": "position", "slots": "position", "to_code.weight": "head",
                    "from_code.weight": "matrix", **{f"places.{name}.weight": "position" for name in self.places}}
        if c.resample:
            self.roles["value.weight"] = "matrix"
        if c.bias:
            self.roles |= {"to_code.bias": "bias", "from_code.bias": "bias"}
        initialise(self)

    def init_weights(self):
        """What no rule of `initialise` fills."""
        self.cell.normal_()
        for layer in self.places.values():
            layer.weight.normal_(0, 0.5 * 60 ** -0.5)
        self.queries.normal_(0, 0.1)
        self.slots.normal_(0, 0.1)
        for layer in filter(None, (self.value, self.to_code, self.from_code)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                layer.bias.zero_()

    def laid_out(self, shapes, ends):
        """What encoder (`ends`) and decoder know of shapes (B, 2): index and padding of `patches`; of these the centres
        (B, P, 2), position_features and relations to each other (B, P, P, 8); what `latent_places` says. With layout
        "canvas" latents, and what is decoded, lie over the whole canvas."""
        c = self.config
        whole = torch.full_like(shapes, c.canvas.max_side) if c.layout == "canvas" else shapes
        index, padding = self.patches(shapes if ends else whole, ends)
        row, column = index // self.columns, index % self.columns
        centres = torch.stack([(row + 0.5) * c.patch_height, (column + 0.5) * c.patch_width], -1)
        return (index, padding, centres, position_features(centres, whole.unsqueeze(1).float()),
                relations(centres, centres, self.patch), *self.latent_places(whole))

    def patches(self, shapes, ends):
        """shapes (B, 2) -> index (B, P) of the patches with tokens in them, 0 where there are fewer than P, and padding
        (B, P) bool there. ends: with the row ends, which need one more column; else cells only."""
        c = self.config
        height, width = shapes[:, :1], (shapes[:, 1:] + ends).clamp(max=c.canvas.max_side)
        index = torch.arange(self.rows * self.columns, device=shapes.device)
        there = (index // self.columns * c.patch_height < height) & (index % self.columns * c.patch_width < width)
        P = int(there.sum(1).max()) if readable(there) else len(index)
        index = there.int().argsort(dim=1, descending=True, stable=True)[:, :P]      # (B, P)
        padding = ~there.gather(1, index)
        return index.masked_fill(padding, 0), padding

    def cells(self, centres):
        """centres (B, P, 2) of patches -> those of their cells (B, P cells, 2)."""
        size = self.config.patch_height, self.config.patch_width
        offsets = torch.cartesian_prod(*(torch.arange(n, device=centres.device) - (n - 1) / 2 for n in size))
        return (centres.unsqueeze(2) + offsets).flatten(1, 2)

    def latent_places(self, shapes):
        """shapes (B, 2) -> places (B, N, 2) of the latents in cells, the tile (B, 1, 2) whose sides count as one from
        latent to cell, and features (B, N, 64) of the places.

        Latents stand in the order of reading on tiles, the smallest of 1 x 1, 2 x 1, 2 x 2, 3 x 2, ... cells of which
        there are at most as many as latents (or one in twenty more: some go without). Several on one tile lie one below
        the other: what two latents see alike they would say alike.
        """
        N, extent = self.config.n_latents, shapes.unsqueeze(1).float()
        part = (torch.arange(N, device=shapes.device) + 0.5) / N                 # (N,) of the way
        share = extent.new_zeros(len(shapes), N)
        places, tile = share.unsqueeze(2).expand(-1, -1, 2), torch.ones_like(extent)
        for size in self.tiles.unbind():                                         # from the largest
            columns = -(-shapes[:, 1:] // size[1])                               # (B, 1)
            count = -(-shapes[:, :1] // size[0]) * columns
            at = part * count                                                    # (B, N)
            number, frac = at.long(), torch.where(count <= N, at.frac(), 0.5)
            centres = torch.stack([(number // columns + frac) * size[0], (number % columns + 0.5) * size[1]], -1)
            few = (count <= 1.05 * N)[..., None]
            centres = torch.minimum(centres, extent - 0.5)                       # a tile that the edge cuts
            places, tile = torch.where(few, centres, places), torch.where(few, size.to(extent.dtype), tile)
            share = torch.where(few[..., 0], frac, share)
        angle, load = share * math.pi, (extent.prod(-1) / N).clamp(max=4).expand_as(share)
        where = torch.stack([angle.cos(), (2 * angle).cos(), (2 * angle).sin(), load], -1)
        return places, tile, torch.cat([position_features(places, extent), where], -1)

    def as_patches(self, tokens, beyond):
        """tokens (B, S, S) -> (B, all patches, cells of a patch), `beyond` where a patch goes past the canvas."""
        c, (B, S, _) = self.config, tokens.shape
        below, right = self.rows * c.patch_height - S, self.columns * c.patch_width - S
        tokens = F.pad(tokens, (0, right, 0, below), value=beyond)
        tokens = tokens.view(B, self.rows, c.patch_height, self.columns, c.patch_width)
        return tokens.transpose(2, 3).reshape(B, self.rows * self.columns, -1)

    def encode(self, tokens, shapes):
        """tokens (B, S, S) int64 with their shapes (B, 2) -> z (B, N, code_dim), what the codebook compares."""
        c = self.config
        index, padding, centres, where, related, places, scale, features = self.laid_out(shapes, ends=True)
        words = self.as_patches(tokens, c.canvas.pad).gather(
            1, index[..., None].expand(-1, -1, c.patch_height * c.patch_width))
        embedded = F.embedding(words, self.cell).masked_fill((words == c.canvas.pad)[..., None], 0)  # PAD is nothing
        where = self.places["patch"](where)
        x = self.into(embedded.flatten(2)) + where
        for layer in self.encoder:
            x = layer(x, related, padding)
        if c.output_positions:
            x = x + where
        to_patches, among = relations(places, centres, scale), relations(places, places, scale)
        h = self.queries + self.places["latent"](features)
        if self.pool is not None:                                                # of cells: a latent may stand on one
            nothing = (padding[..., None] | (words == c.canvas.pad)).flatten(1)
            cells = self.value(embedded) + x.unsqueeze(2)                        # (B, P, cells, C)
            h = h + self.pool(cells.flatten(1, 2), relations(places, self.cells(centres), scale), nothing)
        for layer in self.pooler:
            h = layer(h, among, None, x, to_patches, padding)
        return self.to_code(self.code_norm(h))

    def decode(self, e, shapes):
        """e (B, N, code_dim) of the codebook, shapes (B, 2) -> logits (B, P, cells, outputs) float32 of the patches,
        their index and padding (B, P). With layout "canvas" `shapes` changes nothing: all patches are said."""
        c = self.config
        index, padding, centres, where, related, places, scale, features = self.laid_out(shapes, ends=False)
        u, among = self.from_code(e) + self.slots + self.places["code"](features), relations(places, places, scale)
        for layer in self.latents:
            u = layer(u, among)
        x, to_latents = self.places["query"](where), relations(centres, places, scale)
        if self.spread is not None:
            near = self.spread(u, relations(self.cells(centres), places, scale))  # (B, P cells, C)
            x = x + self.join(near.view(*index.shape, -1))
        for layer in self.decoder:
            x = layer(x, related, padding, u, to_latents)
        logits = F.linear(self.head_norm(x), self.heads[0]).float()
        return logits.view(*index.shape, c.patch_height * c.patch_width, -1), index, padding

    def nats(self, e, tokens, shapes):
        """-ln p(grid | codes) per grid (B,), and right (B,) bool: is the likeliest canvas the true one? e (B, N,
        code_dim), tokens (B, S, S) with their shapes (B, 2). "grid": cells only; "canvas": every token."""
        c = self.config
        logits, index, padding = self.decode(e, shapes)
        targets = self.as_patches(tokens, -1).gather(1, index[..., None].expand(-1, -1, logits.size(2)))
        counted = ~padding[..., None] & (targets >= 0)
        if c.layout == "grid":
            counted = counted & (targets < c.canvas.n_colours)
        targets = targets.masked_fill(~counted, 0)
        ce = cross_entropy(logits.flatten(0, 2), targets.flatten()).view(targets.shape)
        right = ((logits.argmax(-1) == targets) | ~counted).all(2).all(1)
        return (ce * counted).sum((1, 2)), right

    def write(self, e, shapes):
        """e (B, N, code_dim), shapes (B, 2) as the codes say -> the likeliest canvas (B, S, S) int64."""
        c, S = self.config, self.config.canvas.max_side
        logits, index, padding = self.decode(e, shapes)
        canvas = torch.full((len(e), self.rows * self.columns + 1, logits.size(2)), c.canvas.pad, device=e.device)
        index = index.masked_fill(padding, self.rows * self.columns)             # a patch that is cut off below
        canvas.scatter_(1, index[..., None].expand(-1, -1, logits.size(2)), logits.argmax(-1))
        canvas = canvas[:, :-1].view(len(e), self.rows, self.columns, c.patch_height, c.patch_width).transpose(2, 3)
        canvas = canvas.reshape(len(e), self.rows * c.patch_height, -1)[:, :S, :S]
        return canvas if c.layout == "canvas" else c.canvas.tokens(c.canvas.cut(canvas, shapes))

    def digits(self, device):
        """What one of each code of the shape counts, (n_shape_codes,): the shape's number is written in them."""
        return self.config.codebook_size ** torch.arange(self.config.n_shape_codes - 1, -1, -1, device=device)

    def with_shape(self, codes, shapes):
        """Learned codes (B, N) with those of the shape before them: all n_codes of a grid, (B, n_codes)."""
        number = (shapes[:, :1] - 1) * self.config.canvas.max_side + shapes[:, 1:] - 1
        return torch.cat([number // self.digits(codes.device) % self.config.codebook_size, codes], 1)

    def numbered(self, codes):
        """Learned codes (..., N) -> the same (..., N) among those of all books: those of book i begin at i K."""
        if self.config.n_books == 1:
            return codes
        book = torch.arange(codes.size(-1), device=codes.device) % self.config.n_books
        return codes + self.config.codebook_size * book

    def read(self, codes):
        """codes (B, n_codes) -> e (B, N, code_dim) and the shapes (B, 2) that the first of them say; a number past the
        last shape means that one."""
        S, n = self.config.canvas.max_side, self.config.n_shape_codes
        number = (codes[:, :n] * self.digits(codes.device)).sum(1).clamp(max=S * S - 1)
        return self.codebook.look_up(codes[:, n:]), torch.stack([number // S + 1, number % S + 1], 1)

    def code_map(self, codes):
        """All codes (B, n_codes) -> (B, rows, columns): the learned ones in the order of reading, -1 at the end."""
        learned = codes[:, self.config.n_shape_codes:]
        columns = math.ceil(math.sqrt(learned.size(1)))
        return F.pad(learned, (0, -learned.size(1) % columns), value=-1).view(len(codes), -1, columns)

    def n_params(self):
        """Parameters in all."""
        return sum(p.numel() for p in self.parameters())
