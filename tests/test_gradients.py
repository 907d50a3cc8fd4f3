"""No value of a setting cuts a parameter off from the loss: a walk over all variants and all words.

A parameter that starts at zero, or behind one that does, has no gradient at first: so three steps are taken, and then
each parameter, and each part of a fused matrix, must have a gradient that is not rounding.
"""
import pytest
import torch

from model import TransformerConfig, build_model, fused_rows
from nanolab import settings as flags
from variants import SMALL, VARIANTS

CHOICES = {name: spec.words for name, spec in flags._fields_of(TransformerConfig).items() if spec.kind is str and
           spec.words}

ROUNDING = 1e-8

pytestmark = pytest.mark.usefixtures("one_thread")


def cut_off(**settings):
    """Names of the parameters, and numbers of their parts, that the loss does not move."""
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": 13, "n_embd": 16, "n_expert": 3, **settings}
    model = build_model(TransformerConfig(**config)).double().train()
    c, draw = model.config, torch.Generator().manual_seed(1)
    T, segments = c.block_size, 4 if c.carries else 1
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(4):
        x = torch.randint(13, (6, T * segments + c.n_labels), generator=draw)
        memory = model.new_memory(6) if c.carries else None
        optimizer.zero_grad()
        for i in range(0, T * segments, T):
            y = torch.stack([x[:, i + k:i + k + T] for k in range(1, c.n_labels + 1)], -1)
            model(x[:, i:i + T], y, memory=memory)[0].backward()
        if step < 3:
            optimizer.step()
    fused, found = fused_rows(model), []
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        rows = fused.get(name.removesuffix(".bias") + ".weight" if name.endswith("bias") else name, (len(p),))
        rows = (len(p),) if ".ff." in name and "moe" in c.ff else rows  # an expert whom nobody chose may wait
        parts = [torch.zeros(1)] if p.grad is None else p.grad.split(rows)
        found += [(name, i) for i, part in enumerate(parts) if part.abs().max() < ROUNDING]
    if c.positions != "rope":  # a bias of keys that do not turn moves all scores of a query alike
        found = [(name, part) for name, part in found if not (name.endswith("qkv.bias") and part == 1)]
    return found


WALK = {
    "variants": VARIANTS.values(),
    "mixers": [dict(mixer=kind, positions="none") for kind in ("full,diff", "mla,xl")],
    "rope": [dict(mixer="full,mla", rope_scaling=kind, rope_factor=4.0) for kind in CHOICES["rope_scaling"]]
    + [dict(mixer="full,mla", rope_scaling="yarn", rope_factor=4.0, rope_ramp="index", rope_mscale_all_dim=0.0)],
    "sizes": [dict(mixer="mla", q_rank=2, kv_rank=2), dict(mixer="mamba", state_dim=1, conv_width=1),
              dict(mixer="mamba,mingru", expand=1 / 16), dict(ff="low_rank", ff_rank=1), dict(ff_mult=1 / 16),
              dict(mixer="strided", n_kv_head=2), dict(mixer="fixed"), dict(mixer="diff", n_kv_head=2),
              dict(n_kv_head=1), dict(n_head=1, head_dim=2, qk_norm=True), dict(activation="solu", ff_mult=3 / 16)],
    "attention": [dict(mixer="full,diff", value_residual=True, mtp_depth=1), dict(short_conv=2, mtp_depth=1),
                  *(dict(attention=word) for word in CHOICES["attention"]),
                  *(dict(mixer="compressive", compression=word) for word in CHOICES["compression"])],
    "feed-forwards": [dict(ff="none", residual_scale="layerscale"), dict(ff="low_rank", activation="swiglu"),
                      *(dict(activation=word) for word in CHOICES["activation"])],
    "experts": [dict(ff="moe", expert_balance=word, n_shared_expert=shared, expert_top_k=2 - shared)
                for word in CHOICES["expert_balance"] for shared in (0, 1)],
    "residual and init": [dict(residual_scale=scale, init=init) for scale, *inits in (
        ("depth", "gpt2", "xavier"), ("rezero", *sorted({*CHOICES["init"]} - {"zero"})), ("layerscale", "zero"),
        (0.1, "tfixup")) for init in inits],
    "norms": [dict(norm=word, norm_gain=gain, bias=gain, residual_scale=30.0 if word == "dyt" else 1.0)
              for word in CHOICES["norm"] for gain in (True, False)],  # dyt leaves what is small small
    "heads": [dict(n_targets=2, target_heads=t, layer_heads=l, intermediate_losses=i, head_bias=True)
              for t in CHOICES["target_heads"] for l in CHOICES["layer_heads"] for i in (True, False)],
    "classifiers": [dict(tie_weights=True), dict(tie_weights=True, init="zero"), dict(mtp_depth=2),
                    dict(mtp_depth=1, output="stablemax")],
    "widths": [dict(parametrisation="mup", mup_base_width=4), dict(parametrisation="mup", tie_weights=True),
               dict(parametrisation="mup", qk_norm=True, qk_scale=True)],
    "adapters": [dict(lora_rank=2, lora_on=word, n_layer=1, activation="swiglu") for word in CHOICES["lora_on"]],
    "kernels": [dict(kernels=word, mixer="mamba,mingru", ff="mlp,moe") for word in CHOICES["kernels"]],
}


@pytest.mark.parametrize("what", WALK)
def test_every_parameter_learns(what):
    for settings in WALK[what]:
        assert not (found := cut_off(**settings)), (settings, found)


def test_the_walk_knows_every_choice():
    """A new word of a setting is walked, or this fails."""
    walked = [settings for part in WALK.values() for settings in part] + [SMALL]
    for name, words in CHOICES.items():
        assert {settings.get(name, getattr(TransformerConfig, name)) for settings in walked} >= set(words), name
