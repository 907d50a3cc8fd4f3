"""Latent actions: what happened between two frames, as a code."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import initialise
from models.discrete import VQ, Quantised, straight_through
from models.video import SpatioTemporal
from models.world_layers import Affine, Conv, Residual, config_of, from_patches, move, to_patches


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

    kind "conv": encoder and decoder see `history` frames: with one, how a thing moves by itself is hidden, and competes
    with the action for the code. The encoder also sees x_t+1 - x_t. kind "transformer": spatio-temporal, causal in
    time; it learns from every frame of its history (`every`), and the decoder also sees the codes that led to the
    frames before. colours: P of the palette, or None: then x_t plus a residual is written. channels: C of frames, 3 of
    RGB. With signs the bias of `to_code` has no gradient: their normalisation takes it away.

    decoder "film": written as above, the code a gain and a shift of each block; "warp", of kind "conv" without a
    palette: x_t moved by a flow of 4 x 4 control points that the code alone sets. It cannot paint, so what the code
    says is where things go: of a camera that moves, how.
    """

    def __init__(self, height, width, patch, colours, history=2, n_codes=8, n_embd=32, n_layer=3, kind="conv",
                 quantiser="signs", n_head=4, difference=True, channels=3, past=True, decoder="film"):
        super().__init__()
        self.height, self.width, self.patch, self.colours = height, width, patch, colours
        self.history, self.n_codes, self.kind, self.difference, self.past = history, n_codes, kind, difference, past
        self.quantiser = Signs(n_codes) if quantiser == "signs" else Nearest(n_codes)
        D, n_out = self.quantiser.width, patch * patch * (colours or channels)
        self.config = config_of(n_layer, n_head, n_embd, max(2, history + 1))
        self.to_hidden, self.to_code = Affine(n_embd, n_embd), Affine(n_embd, D)
        self.warps = decoder == "warp"
        if kind == "conv":
            self.look = Conv(channels * (history * past + 1), n_embd, patch, patch)
            self.encoder = nn.ModuleList(Residual(n_embd) for _ in range(n_layer))
        if self.warps:
            self.act, self.flow = Affine(D, n_embd), Affine(n_embd, 2 * 4 * 4)
        elif kind == "conv":
            self.see = Conv(channels * history, n_embd, patch, patch)
            self.decoder = nn.ModuleList(Residual(n_embd, D) for _ in range(n_layer))
            self.write = Conv(n_embd, n_out, 1)
        else:
            grid = height // patch, width // patch
            self.look, self.see = (Affine(2 * channels * patch * patch, n_embd) for _ in range(2))
            self.encoder = SpatioTemporal(self.config, grid[0] * grid[1], grid)
            self.decoder = SpatioTemporal(self.config, grid[0] * grid[1], grid)
            self.act, self.write = Affine(D, n_embd), Affine(n_embd, n_out)
        initialise(self)

    def encode(self, frames):
        """frames (B, history + 1, H, W, 3), the last of them the one to explain -> u (B, D), before the quantiser."""
        if self.kind == "transformer":
            return self.encode_every(frames)[:, -1]
        last = frames[:, -1:] - frames[:, -2:-1] if self.difference else frames[:, -1:]
        h = self.look(self._channels(torch.cat((frames[:, :-1], last), 1) if self.past else last))
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
        if self.warps:
            return move(frames[:, -1], self.flow(F.relu(self.act(e))).view(-1, 2, 4, 4))
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
        from the true frames and the codes up to it, Quantised of B T codes)."""
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
