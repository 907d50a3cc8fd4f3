"""Differential attention: mixer "diff"."""
import math

import torch

import kernels
from kernels import expect
from model import Attention, add_parameter


LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def check(config):
    """Raises ValueError for heads that are no pairs."""
    expect(not config.n_head % 2 and not config.n_kv_head % 2, "mixer 'diff' subtracts pairs of heads: n_head "
           f"{config.n_head} and n_kv_head {config.n_kv_head} must be even")


class Differential(Attention):
    """Differential attention (Ye et al. 2024, equations 1 to 3): heads in pairs, whose softmaxes are subtracted,

        (softmax(q1 k1) - lambda softmax(q2 k2)) v,   lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_init,

    with values of both heads' width, an RMSNorm per pair, times 1 - lambda_init. lambda_init = 0.8 - 0.6 exp(-0.3 l) in
    layer l from 0. As many parameters as full attention and 4 D more. Cache: keys and values of full attention.
    """

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        for name in LAMBDAS:
            add_parameter(self, name, 0.0, config.head_dim)

    def init_weights(self):
        """N(0, 0.1), as the paper's code."""
        for name in LAMBDAS:
            getattr(self, name).normal_(0, 0.1)

    def attend(self, q, k, v, positions, key_positions, pattern, bias=None, scale=None):
        """q (B, H, T, D), k and v (B, G, S, D), neighbours a pair: (B, H, T, D), a pair's output in both its places."""
        B, H, T, D = q.shape
        G, S = k.size(1) // 2, k.size(2)
        v = v.reshape(B, G, 2, S, D).transpose(2, 3).reshape(B, G, S, 2 * D)
        strength = (torch.exp((self.lambda_q1 * self.lambda_k1).sum())
                    - torch.exp((self.lambda_q2 * self.lambda_k2).sum()) + self.lambda_init)
        if T > 1 and self.by_kernel(q, k, v, positions, key_positions, pattern):
            y = kernels.attend_differential(q.to(v.dtype), k.to(v.dtype), v, strength, pattern.window,
                                            positions.prefix)  # (B, H/2, T, 2 D)
        else:
            slopes = None if self.slopes is None else self.slopes[1::2]
            one, two = (super(Differential, self).attend(q[:, i::2], k[:, i::2], v, positions, key_positions, pattern,
                                                         slopes=slopes) for i in range(2))  # (B, H/2, T, 2 D)
            y = one - strength.to(one.dtype) * two
        y = self.unit(y) * (1 - self.lambda_init)
        return y.view(B, H // 2, T, 2, D).transpose(2, 3).reshape(B, H, T, D)

    def flops(self, T):
        """Scores and sums of one token, forward: values are twice as wide for each softmax."""
        return 6 * self.config.n_head * self.config.head_dim * T
