"""RoPE for a context of `factor` times the `original` one: rope_scaling."""
import math

import torch

from model import rope_frequencies


def yarn_mscale(factor, mscale):
    """0.1 mscale ln(factor) + 1: YaRN's growth of a query or key (Peng et al. 2023, section 3.4; DeepSeek's mscale)."""
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1


def scaled(head_dim, base, scaling, factor, original=512, ramp="turns", mscale=1.0):
    """(angles per position (D/2,) float64 on the CPU, magnitude of the tables).

    scaling "linear": positions over factor (position interpolation, Chen et al. 2023). "ntk": a base of
    base * factor^(D / (D - 2)), which leaves the fastest pair as it is and slows the slowest by factor (bloc97 2023).
    "yarn" (Peng et al. 2023, section 3): pairs that turn more than 32 times in the original context stay, those that
    turn less than once are interpolated, a ramp between, and queries and keys grow by yarn_mscale(factor, mscale) each.
    The ramp goes by "turns" as in the paper, or by "index" as in published code and so in published weights: by the
    number of the pair, between those that turn 32 times and once, rounded outwards.
    """
    if scaling == "ntk":
        return rope_frequencies(head_dim, base * factor ** (head_dim / max(head_dim - 2, 1))), 1.0
    plain = rope_frequencies(head_dim, base)
    if scaling == "linear":
        return plain / factor, 1.0
    if ramp == "index":
        low, high = (head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        pair = torch.arange(len(plain), dtype=torch.float64, device="cpu")
        keep = 1 - ((pair - low) / (high - low or 0.001)).clamp(0, 1)
    else:
        turns = original * plain / (2 * math.pi)  # of each pair over the original context
        keep = ((turns - 1) / (32 - 1)).clamp(0, 1)  # 0: interpolate, 1: leave
    return plain / factor * (1 - keep) + plain * keep, yarn_mscale(factor, mscale)
