"""What the networks of a world share: patches, convolutions, affine and residual layers.

Shapes: B batch, T frames, H x W pixels, N tokens of a frame, P colours of a palette, K codes, A actions, C width.
Frames are float32 in 0..1 (B, T, H, W, 3). Where the data has a palette, what is written is P logits a pixel, else RGB.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, TransformerConfig


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
        self.scale, self.roles = scale, {"weight": "head", "bias": "bias"}  # a head's rule: AdamW, with decay

    def reset_parameters(self):
        """Draws nothing: `fill` does."""

    def init_weights(self):
        """Called by `initialise`."""
        fill_evenly(self, self.scale)


class Affine(Linear):
    """A linear layer between two kinds of things (pixels, codes, actions) and the stream."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.roles = {"weight": "head", "bias": "bias"}

    def init_weights(self):
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


def move(frames, flow):
    """Frames (B, H, W, 3) whose every pixel is read where `flow` (B, 2, h, w) says, in pixels to the right and down
    from its own place: control points, bilinear between them; past the edge the edge's colour goes on."""
    B, H, W, _ = frames.shape
    flow = F.interpolate(flow.to(frames.dtype), (H, W), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    rows, columns = (torch.linspace(-1, 1, n, device=frames.device, dtype=frames.dtype) for n in (H, W))
    place = torch.stack((columns.expand(H, W), rows[:, None].expand(H, W)), -1)
    place = place + flow * place.new_tensor((2 / max(W - 1, 1), 2 / max(H - 1, 1)))
    moved = F.grid_sample(frames.permute(0, 3, 1, 2), place, padding_mode="border", align_corners=True)
    return moved.permute(0, 2, 3, 1)
