"""The tokenizer of frames."""
import torch.nn as nn

from model import initialise
from models.discrete import FSQ, VQ
from models.video import SpatialTransformer, SpatioTemporal
from models.world_layers import Affine, Conv, Residual, config_of, from_patches, to_patches


class Tokenizer(nn.Module):
    """A VQ-VAE over patches: frames to N tokens each, and back (van den Oord et al. 2017; Genie's ST-ViViT).

    kind "spatial": each frame by itself; "spatiotemporal": causal in time as well, so that a token may also say what
    moved; a frame sees the last `window` frames, as many as a training clip has. quantiser "vq" (codes as running
    means) or "fsq".
    """

    def __init__(self, height, width, patch, colours, codebook_size=64, code_dim=8, n_layer=2, n_head=4, n_embd=64,
                 kind="spatial", quantiser="vq", window=None, block_size=16):
        super().__init__()
        grid = self.lay_out(height, width, patch, colours, codebook_size, code_dim, quantiser)
        self.kind, self.window = kind, window
        self.config = config_of(n_layer, n_head, n_embd, block_size)
        Trunk = SpatialTransformer if kind == "spatial" else SpatioTemporal
        self.look = Affine(3 * patch * patch, n_embd)
        self.encoder = Trunk(self.config, self.n_tokens, grid)
        self.to_code = Affine(n_embd, self.width_of_code)
        self.from_code = Affine(self.width_of_code, n_embd)
        self.decoder = Trunk(self.config, self.n_tokens, grid)
        self.write = Affine(n_embd, patch * patch * (colours or 3))
        initialise(self)

    def lay_out(self, height, width, patch, colours, codebook_size, code_dim, quantiser):
        """The sizes and the codebook; returns the grid of tokens, (rows, columns)."""
        self.height, self.width, self.patch, self.colours, self.kind = height, width, patch, colours, "spatial"
        self.grid, self.codebook_size = (height // patch, width // patch), codebook_size
        self.n_tokens = self.grid[0] * self.grid[1]
        self.codebook = FSQ(codebook_size) if quantiser == "fsq" else VQ(codebook_size, code_dim, "cosine")
        self.width_of_code = len(self.codebook.levels) if quantiser == "fsq" else code_dim
        return self.grid

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


class ConvTokenizer(Tokenizer):
    """The same by convolutions, each frame by itself: patches of centred pixels, `n_layer` residual blocks of two 3x3
    convolutions, the code; back a 3x3 convolution, as many blocks, pixels. It needs a fraction of attention's time for
    a camera's frames, whose mean colour attention spends its first steps on."""

    def __init__(self, height, width, patch, colours, codebook_size=64, code_dim=8, n_layer=1, n_embd=48,
                 quantiser="fsq"):
        nn.Module.__init__(self)
        self.lay_out(height, width, patch, colours, codebook_size, code_dim, quantiser)
        D, self.config = self.width_of_code, config_of(n_layer, 1, n_embd, 1)
        self.look, self.to_code = Conv(3, n_embd, patch, patch), Conv(n_embd, D, 1)
        self.encoder, self.decoder = (nn.Sequential(*(Residual(n_embd) for _ in range(n_layer))) for _ in range(2))
        self.from_code, self.write = Conv(D, n_embd, 3), Conv(n_embd, patch * patch * (colours or 3), 1)
        initialise(self)

    def encode(self, frames):
        """As Tokenizer.encode."""
        x = self.look((frames - 0.5).flatten(0, 1).permute(0, 3, 1, 2))
        return self.to_code(self.encoder(x)).flatten(2).mT.reshape(len(frames), -1, self.width_of_code)

    def decode(self, e, cache=None):
        """As Tokenizer.decode."""
        x = e.reshape(-1, *self.grid, e.size(-1)).permute(0, 3, 1, 2).to(self.write.weight.dtype)  # (B T, D, h, w)
        x = self.write(self.decoder(self.from_code(x))).flatten(2).mT            # (B T, N, p p P)
        pixels = from_patches(x, self.patch, self.height, self.width)
        return pixels.unflatten(0, (len(e), -1)) + (0.0 if self.colours else 0.5)
