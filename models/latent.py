"""Multi-head latent attention: mixer "mla"."""
import torch
import torch.nn as nn

import kernels
from kernels import expect
from model import Attention, Linear, Norm, alibi_slopes
from models.rope_scaling import yarn_mscale
from nanolab.cache import KVCache


def check(config):
    """Raises ValueError for settings that do not go with a latent."""
    c = config
    expect(not c.qk_norm, "qk_norm normalises keys, which mixer 'mla' never forms in generation: the latent has a norm "
                          "of its own")
    expect(c.n_kv_head == c.n_head,
           f"mixer 'mla' has one latent for all heads: n_kv_head {c.n_kv_head} does not apply")
    expect(c.positions != "rope" or not c.rope_dim % 2, f"rope_dim is {c.rope_dim}, but must be even and at least 2")


class Latent(Attention):
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values of all heads come out of one latent
    of kv_rank dimensions, which is normalised and is all that the cache keeps, beside one key of rope_dim dimensions
    that turns and that all heads share (with positions "rope" only). q_rank: queries pass a normalised bottleneck too.

    A pass of many queries expands the latents to keys and values. A few queries over a cache are taken to the latents
    instead: q W_k . c = q . (W_k c), one key-value head (section 2.1.2's absorption).

    Under YaRN the part of a score that turns grows by yarn_mscale(factor, rope_mscale)^2 in RoPE's tables, and the
    other by yarn_mscale(factor, rope_mscale_all_dim)^2 here: DeepSeek's softmax scale and tables, multiplied out.
    """

    def __init__(self, config, layer=0):
        nn.Module.__init__(self)
        c = self.config = config
        self.layer, self.kind, self.rank = layer, "full", c.kv_rank
        self.turning = c.rope_dim if c.positions == "rope" else 0
        self.growth = yarn_mscale(c.rope_factor, c.rope_mscale_all_dim) ** 2 if c.rope_scaling == "yarn" else 1.0
        H, D = c.n_head, c.head_dim
        self.into = self.q_norm = None
        if c.q_rank is not None:
            self.into = Linear(c.n_embd, c.q_rank, bias=False)
            self.q_norm = Norm("rms", c.q_rank, c.norm_gain, False)
        self.q = Linear(c.n_embd if c.q_rank is None else c.q_rank, H * (D + self.turning), bias=False)
        self.kv = Linear(c.n_embd, self.rank + self.turning, bias=False)
        self.kv_norm = Norm("rms", self.rank, c.norm_gain, False)
        self.up = Linear(self.rank, 2 * H * D, bias=False)
        self.out = Linear(H * D, c.n_embd, bias=c.bias)
        self.fused = {"up": (H * D, H * D)}
        if self.turning:
            self.fused["kv"] = (self.rank, self.turning)
        self.register_buffer("slopes", alibi_slopes(H) if c.positions == "alibi" else None, persistent=False)

    def forward(self, x, positions, cache=None):
        """x (B, T, C), positions a Positions, cache from new_cache or None. Returns (B, T, C)."""
        c, (B, T, _) = self.config, x.shape
        H, D, R = c.n_head, c.head_dim, self.turning
        q = self.q(x if self.into is None else self.q_norm(self.into(x))).view(B, T, H, D + R)
        latent, key = self.kv(x).split((self.rank, R), -1)
        latent = self.kv_norm(latent).to(x.dtype if not torch.is_autocast_enabled(x.device.type) else q.dtype)
        if R:
            still = q[..., :D] if self.growth == 1 else q[..., :D] * self.growth
            q = torch.cat((still, positions.turn(q[..., D:])), -1)
            latent = torch.cat((latent, positions.turn(key.unsqueeze(2)).squeeze(2).to(latent.dtype)), -1)
        q, latents = q.transpose(1, 2), latent.unsqueeze(1)  # (B, H, T, D + R), (B, 1, T, rank + R)
        key_positions = positions.index
        if cache is not None:
            latents, _, key_positions = cache.update(latents, latents[..., :0], positions.index)
            q = q.to(latents.dtype)
        pattern, scale, S = self.pattern(positions, cache), (D + R) ** -0.5, latents.size(2)
        if T * (self.rank + R) * 2 < S * D:  # few queries, many latents
            keys, values = self.up.weight.view(2, H, D, self.rank).to(latents.dtype)  # (H, D, rank)
            q = torch.cat((q[..., :D] @ keys, q[..., D:]), -1)  # (B, H, T, rank + R)
            y = self.attend_latents(q, latents, positions, key_positions, pattern, scale)  # (B, H, T, rank)
            y = y @ values.transpose(1, 2)  # (B, H, T, D)
        else:
            k, v = self.up(latents[:, 0, :, :self.rank]).view(B, S, 2, H, D).permute(2, 0, 3, 1, 4)  # (B, H, S, D)
            if R:
                k = torch.cat((k, latents[..., self.rank:].to(k.dtype).expand(B, H, S, R)), -1)
            y = self.attend(q.to(k.dtype), k, v, positions, key_positions, pattern, scale=scale)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D).to(x.dtype))

    def attend_latents(self, q, latents, positions, key_positions, pattern, scale):
        """q (B, H, T, rank + R) over latents (B, 1, S, rank + R), whose first columns are values: (B, H, T, rank)."""
        if q.size(2) == 1 and self.rank <= kernels.WIDEST_RANK and self.by_kernel(
                q[..., self.rank:], latents, q[..., :0], positions, key_positions, pattern):
            return kernels.attend_latent(q, latents, self.rank, scale)
        return self.attend(q, latents, latents[..., :self.rank], positions, key_positions, pattern, scale=scale)

    def new_cache(self, batch_size, max_length, window, device, dtype):
        """A KVCache of one head with keys (latent and turned key) and no values."""
        cache = KVCache(batch_size, 1, self.rank + self.turning, max_length, window, device, dtype, value_dim=0)
        cache.kind = "latent"
        return cache

    def flops(self, T):
        """Scores and sums of one token, forward, keys and values expanded."""
        c = self.config
        return 2 * c.n_head * (2 * c.head_dim + self.turning) * T
