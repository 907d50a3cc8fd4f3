"""One list of small models, one of each kind of layer and setting that a cache, a mask or a gradient can notice, and
the helpers that feed them: test_variants.py proves every promise for every one of them."""
from functools import cache

import pytest
import torch

from model import FEED_FORWARDS, MIXERS, TransformerConfig, build_model

T = 24
CHUNKS = {"whole": [T], "chunks": [7, 1, 10, 6], "tokens": [1] * T}
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=8, init="xavier", positions="rope", window=6, sparse_stride=4,
             sparse_summary=1, memory_length=8, compressed_length=4, compression_rate=2)


def build(mixer="full", seed=0, **settings):
    """A small model in inference mode, whose logits depend strongly on what its layers see."""
    torch.manual_seed(seed)
    return build_model(TransformerConfig(**{**SMALL, "mixer": mixer, **settings})).eval()


def text(*shape, seed=1):
    """Bytes, by default (2, T)."""
    return torch.randint(256, shape or (2, T), generator=torch.Generator().manual_seed(seed))


END = "".join(f"\\x{byte:02x}" for byte in text()[0, 9:11])  # ends the first document of row 0, after 11 bytes


def padded(lengths, n=T, right=False):
    """Positions (B, n) of rows that hold `lengths` bytes each, -1 elsewhere, padded left or right."""
    rows = [([-1] * (n - length), list(range(length))) for length in lengths]
    return torch.tensor([real + pad if right else pad + real for pad, real in rows])


@torch.no_grad()
def whole(model, x, **how):
    """Logits of one pass without a cache."""
    return model(x, **how)


@torch.no_grad()
def in_chunks(model, x, sizes, cache, positions=None, **first):
    """Logits of x fed to the cache in pieces of these sizes; `first` goes with the first of them."""
    places = [None] * len(sizes) if positions is None else positions.split(sizes, -1)
    return torch.cat([model(part, positions=p, cache=cache, **(first if i == 0 else {}))
                      for i, (part, p) in enumerate(zip(x.split(sizes, 1), places))], 1)


def close(found, wanted, bound=1e-5):
    """Fails where two paths of float32 differ by more than rounding."""
    torch.testing.assert_close(found, wanted, atol=bound, rtol=bound)


def listed():
    """Settings of every variant. A word that MIXERS or FEED_FORWARDS gains is among them."""
    for kind in MIXERS:  # plain, and with fewer key heads, ALiBi and a short convolution before it
        yield dict(mixer=kind)
        yield dict(mixer=kind, positions="alibi", short_conv=4, **({} if kind == "mla" else dict(n_kv_head=2)))
    yield from (dict(ff=kind) for kind in [*FEED_FORWARDS, "none,mlp"] if kind != "mlp")
    yield dict(ff="moe", n_expert=8, expert_groups=4, expert_top_groups=2, expert_balance="bias")
    yield from (dict(mixer=pattern) for pattern in ("mamba,mamba,full", "xl,mingru", "compressive,window"))
    yield dict(mixer="mamba,full", short_conv=9, positions="none")  # wider than any window
    yield from (dict(mixer=kind, positions="relative") for kind in ("xl", "compressive"))
    yield from (dict(positions=place, block_size=48, n_kv_head=2) for place in ("learned", "learned_per_layer"))
    yield dict(mixer="full,mla,xl", rope_scaling="yarn", rope_factor=2.0)
    yield dict(n_kv_head=1, head_dim=12, qk_norm=True, attention="manual")
    yield dict(mixer="full,diff", qk_norm=True, qk_scale=True, short_conv=2)
    yield dict(mixer="full,mamba,compressive", short_conv=2, norm="rms", residual_scale="layerscale")
    yield dict(norm_after=True, parallel_residual=True)
    yield dict(parallel_residual="shared", partial_rotary=0.5, mixer="window,mamba,full", short_conv=2, ff="mlp,none")
    yield dict(qk_norm="full", qk_gain=True, n_kv_head=2, nope_interval=2, mixer="full,diff,window")
    yield dict(norm="dyt", residual_scale=30.0)  # loud branches: dyt leaves the small embeddings small
    yield dict(norm="dyt", residual_scale=30.0, mixer="xl,compressive,mamba", short_conv=2, norm_gain=False)
    yield dict(output="stablemax", logit_softcap=0.1)
    yield from (dict(mixer=pattern, score_softcap=0.5) for pattern in ("full,window", "diff,mla"))
    yield from (dict(mixer=pattern, softmax_plus_one=True) for pattern in ("strided,fixed", "xl,compressive"))
    yield dict(softmax_plus_one=True, score_softcap=0.5, n_kv_head=2, positions="alibi")
    yield from (dict(mixer=pattern, value_residual=True) for pattern in ("window,full", "strided,diff,fixed"))
    yield dict(value_residual=True, n_kv_head=1, positions="learned", block_size=48)
    yield dict(mixer="full,strided,window", parametrisation="mup", mup_base_width=8)
    yield from (dict(mtp_depth=2, dropout=0.2, **settings) for settings in (dict(mixer="mla", ff="mlp,moe"),
                                                                            dict(value_residual=True)))
    yield dict(mixer="xl,compressive,mamba", dropout=0.2)
    yield dict(documents="mask", document_end=END, mixer="window,mamba,strided", short_conv=2)
    yield dict(documents="reset", document_end=END, mixer="mamba,mingru")
    yield dict(documents="reset", document_end=END, positions="learned_per_layer", block_size=48, n_kv_head=2)
    yield dict(shorten=2, n_layer=4, block_size=32, mixer="full,window")
    yield dict(shorten=3, n_layer=5, block_size=32, mixer="diff,mla", positions="alibi")
    yield dict(shorten=5, n_layer=3, block_size=48, mixer="strided", positions="learned")


def name_of(settings):
    """'mixer=xl-positions=relative' and the like."""
    return "-".join(f"{name}={value}" for name, value in settings.items())


VARIANTS = {name_of(settings): settings for settings in listed()}


@cache
def made(name):
    """The model of a variant, built once: tests leave its weights as they are."""
    return build(**VARIANTS[name])


CONFIGS = {name: TransformerConfig(**{**SMALL, **settings}) for name, settings in VARIANTS.items()}


def each(wanted=lambda config: True, alike=lambda config: str(config)):
    """Parametrises `name` with the variants whose config is `wanted`; of those with the same `alike` with one."""
    names = {alike(config): name for name, config in reversed(CONFIGS.items()) if wanted(config)}
    return pytest.mark.parametrize("name", [*names.values()][::-1])
