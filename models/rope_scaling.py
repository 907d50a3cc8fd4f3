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
    number of the pair, between those that turn 32 times and once, rounded outwards. "llama3" (Grattafiori et al. 2024,
    "The Llama 3 Herd of Models", and Llama 3.1's code): as yarn by turns, between 4 turns and one, and nothing grows.
    """
    if scaling == "ntk":
        return rope_frequencies(head_dim, base * factor ** (head_dim / max(head_dim - 2, 1))), 1.0
    plain = rope_frequencies(head_dim, base)
    if scaling == "linear":
        return plain / factor, 1.0
    if ramp == "index" and scaling == "yarn":
        low, high = (head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        pair = torch.arange(len(plain), dtype=torch.float64, device="cpu")
        keep = 1 - ((pair - low) / (high - low or 0.001)).clamp(0, 1)
    else:
        turns = original * plain / (2 * math.pi)  # of each pair over the original context
        keep = ((turns - 1) / ((4 if scaling == "llama3" else 32) - 1)).clamp(0, 1)  # 0: interpolate, 1: leave
    return plain / factor * (1 - keep) + plain * keep, 1.0 if scaling == "llama3" else yarn_mscale(factor, mscale)


def to_json(c):
    """What a config.json of Hugging Face's says of the rope of a TransformerConfig: rope_parameters; for transformers
    before 5, which pass over these, rope_theta and rope_scaling beside."""
    found = dict(rope_theta=c.rope_base, rope_type="default")
    width = c.rope_dim if c.mixers[0] == "mla" else c.turning or c.head_dim
    if c.rope_scaling != "none":
        factor, original = c.rope_factor, c.rope_original or max(1, round(c.block_size / c.rope_factor))
        found |= dict(rope_type=c.rope_scaling, factor=factor)
        if c.rope_scaling != "linear":
            found["original_max_position_embeddings"] = original
        if c.rope_scaling == "llama3":
            found |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
        if c.rope_scaling == "yarn":
            still = yarn_mscale(factor, c.rope_mscale_all_dim)
            angles, growth = scaled(width, c.rope_base, "yarn", factor, original, c.rope_ramp, c.rope_mscale)
            found["attention_factor"] = growth
            if c.mixers[0] == "mla":
                found |= dict(mscale_all_dim=c.rope_mscale_all_dim, attention_factor=growth / still)
            if c.rope_ramp == "turns":  # theirs ramps over the number of a pair: ours is written out, pair by pair
                stretch = (scaled(width, c.rope_base, "linear", 1.0)[0] / angles).tolist()
                found |= dict(rope_type="longrope", short_factor=stretch, long_factor=stretch)
    old = None if c.rope_scaling == "none" else {**found, "type": found["rope_type"]}
    return dict(rope_theta=c.rope_base, rope_parameters=found, **({} if old is None else {"rope_scaling": old}))


def from_json(d, base=10000.0):
    """The fields of a TransformerConfig that a config.json, a dict, says by its rope. base: its class's own. Raises
    ValueError for what is not computed here."""
    said = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in said.values()):
        raise ValueError("rope_parameters of each kind of layer are not read")
    kind = said.get("rope_type", said.get("type", "default"))
    factor, original = said.get("factor"), said.get("original_max_position_embeddings")
    found = dict(rope_base=float(said.get("rope_theta") or d.get("rope_theta") or base))
    if (said.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1: all features of a head turn here")
    if kind == "default":
        return found
    original = original or d["max_position_embeddings"]
    factor = float(factor or d["max_position_embeddings"] / original)
    found |= dict(rope_scaling=kind, rope_factor=factor, rope_original=None if kind == "linear" else original)
    if kind == "llama3" and (said.get("low_freq_factor"), said.get("high_freq_factor")) != (1.0, 4.0):
        raise ValueError("rope llama3 is read with low_freq_factor 1 and high_freq_factor 4 only")
    if kind in ("yarn", "longrope"):
        found |= _yarn(said, found, factor, original, d)
    elif kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not read: default, linear, llama3 and yarn are")
    return found


def _yarn(said, found, factor, original, d):
    """Our fields of yarn, or of a longrope that is one; the growth of queries and keys becomes rope_mscale."""
    latent, all_dim = "kv_lora_rank" in d, said.get("mscale_all_dim") or 0.0
    growth = said.get("attention_factor")
    if growth is None:
        growth = (yarn_mscale(factor, said["mscale"]) / yarn_mscale(factor, all_dim) if said.get("mscale") and all_dim
                  else yarn_mscale(factor, 1.0))
    growth *= yarn_mscale(factor, all_dim) if latent else 1.0
    more = dict(rope_scaling="yarn", rope_ramp="index", rope_mscale_all_dim=float(all_dim) if latent else 1.0,
                rope_mscale=(growth - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0)
    if said.get("rope_type", said.get("type")) == "longrope":
        width = d["qk_rope_head_dim"] if latent else d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"]
        ours = scaled(width, found["rope_base"], "linear", 1.0)[0] / scaled(
            width, found["rope_base"], "yarn", factor, original)[0]
        theirs = [torch.tensor(said.get(f"{end}_factor") or [], dtype=torch.float64) for end in ("short", "long")]
        if not all(t.shape == ours.shape and torch.allclose(t, ours, rtol=1e-6) for t in theirs):
            raise ValueError("rope_type 'longrope' is read only where its factors are those of yarn by turns")
        more["rope_ramp"] = "turns"
    elif (said.get("beta_fast") or 32, said.get("beta_slow") or 1, said.get("truncate", True)) != (32, 1, True):
        raise ValueError("yarn is read with beta_fast 32, beta_slow 1 and truncate true only")
    return more
