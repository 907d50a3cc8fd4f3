"""Text of a world: captions, and the first frame to a caption."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Norm, initialise
from models.encoder_decoder import CrossBlock, Encoder, TextTransformer
from models.video import axial_tables, frame_positions
from models.world_dynamics import draw, fill_in
from models.world_layers import config_of


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
    """A sentence starts a world: an encoder reads a padded caption, once for all rounds; a spatial transformer that
    reads its states fills in the tokens of a frame, by MaskGIT."""

    def __init__(self, grid, codebook_size, n_layer=2, n_head=4, n_embd=64, block_size=160):
        super().__init__()
        self.grid, self.n_tokens, self.codebook_size = tuple(grid), grid[0] * grid[1], codebook_size
        c = self.config = config_of(n_layer, n_head, n_embd, block_size, N_CHARACTERS)
        self.encoder = Encoder(c)
        self.tokens = nn.Parameter(torch.empty(codebook_size + 1, n_embd))
        self.places = nn.Parameter(torch.empty(self.n_tokens, n_embd))
        self.roles = {"tokens": "embedding", "places": "position"}
        self.blocks = nn.ModuleList(CrossBlock(c, i) for i in range(n_layer))
        self.norm = Norm(c.norm, n_embd, c.norm_gain, c.bias)
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(codebook_size, n_embd))])
        for name, table in zip(("cos", "sin"), axial_tables(*self.grid, c.head_dim)):
            self.register_buffer(name, table, persistent=False)
        initialise(self)

    def init_weights(self):
        """N(0, 0.02), as embeddings and positions are; places N(0, 1), since all queries begin with the same token."""
        self.tokens.normal_(0, 0.02)
        self.places.normal_()

    def read(self, text):
        """text (B, S) int64, 0 where it has ended -> what `forward` takes: keys and values of each layer, lengths."""
        lengths = (text != 0).sum(1)
        states = self.encoder(text, lengths)
        return [block.cross.keys(states) for block in self.blocks], lengths

    def forward(self, tokens, context):
        """tokens (B, N) int64, codebook_size where hidden; context of `read` -> logits (B, N, K) float32."""
        keys, lengths = context
        positions = frame_positions(self, self.n_tokens)
        x = F.embedding(tokens, self.tokens) + self.places
        for block, pair in zip(self.blocks, keys):
            x = block(x, pair, positions, padding=lengths)
        return F.linear(self.norm(x), self.heads[0]).float()

    @torch.no_grad()
    def draw(self, text, **how):
        """The tokens (B, N) of frames that captions text (B, S) describe. `how`: of fill_in."""
        context = self.read(text)
        return fill_in(lambda tokens: self(tokens, context), len(text), self.n_tokens, self.codebook_size, text.device,
                       **how)
