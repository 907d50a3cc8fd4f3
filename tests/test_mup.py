"""parametrisation "mup": sizes and changes of what a model computes do not grow with its width, and do with "standard";
at the base width the two are one; what has which rate and decay; its groups go on from a checkpoint.

The coordinate check of Yang et al. 2022 (arXiv 2203.03466, appendix D.1): four steps on four random bytes, so few that
random sums of features, which vanish as width^-0.5, do not hide what the rules are about.
"""
import math

import pytest
import torch

import model as models
from model import TransformerConfig, build_model, fused_rows, parameter_roles
from nanolab import optim

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=4, positions="learned", attention="manual", mup_base_width=32,
             lr=0.01, muon_lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
WIDTHS = (32, 96, 256)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, optimizer="adamw", **settings):
    """A model, its optimiser, and four random bytes with the next ones."""
    settings = {**SMALL, "optimizer": optimizer, **settings}
    torch.manual_seed(seed)
    model = build_model(TransformerConfig.from_settings(settings))
    step = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model))
    text = torch.randint(256, (1, 5), generator=torch.Generator().manual_seed(100 + seed))
    return model, step, text[:, :-1], text[:, 1:, None]


def train(model, optimizer, x, y, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, y)[0].backward()
        optimizer.step()


@torch.no_grad()
def outputs(model, x, monkeypatch):
    """{name: what it gives} of every branch and stream, of attention's scores, and the logits."""
    found, scores, softmax = {}, [], models.weights_of
    hooks = [module.register_forward_hook(lambda module, args, y, name=f"{name} {i}": found.update({name: y}))
             for i, block in enumerate(model.blocks)
             for name, module in (("mixer", block.mixer), ("ff", block.ff), ("stream", block))]
    with monkeypatch.context() as patch:
        patch.setattr(models, "weights_of", lambda s, plus_one: scores.append(s) or softmax(s, plus_one))
        found["logits"] = model(x)
    for hook in hooks:
        hook.remove()
    scores = torch.stack(scores)
    return {**found, "scores": scores[scores > -math.inf]}


def coordinates(monkeypatch, seeds=4, without=None, **settings):
    """{"at first" or "change": {name: [mean absolute size at each width]}} over some seeds; without: one of the rules.
    """
    sizes = {"at first": {}, "change": {}}
    for place, width in enumerate(WIDTHS):
        for seed in range(seeds):
            model, optimizer, x, y = build(seed, n_embd=width, **settings)
            if without:
                WITHOUT[without](model, optimizer, model.config.width_factor)
            first = outputs(model, x, monkeypatch)
            train(model, optimizer, x, y)
            for name, last in outputs(model, x, monkeypatch).items():
                for kind, value in (("at first", first[name]), ("change", last - first[name])):
                    sizes[kind].setdefault(name, [0.0] * len(WIDTHS))[place] += value.abs().mean().item() / seeds
    return sizes


def spread(found, *left_out):
    """The largest ratio of sizes at two widths of anything."""
    return max(max(sizes) / min(sizes) for name, sizes in found.items() if name not in left_out)


@torch.no_grad()
def as_standard_init(model, optimizer, factor):
    for name, role in parameter_roles(model).items():
        model.get_parameter(name).mul_(factor ** 0.5 if role in optim.HIDDEN else 1.0)


def plain_scores(model, optimizer, factor):
    for block in model.blocks:
        block.mixer.score_factor = 1.0


WITHOUT = {"init": as_standard_init, "scores": plain_scores,
           "rate": lambda model, optimizer, factor: [g.update(lr=SMALL["lr"]) for g in optimizer.param_groups],
           "readout": lambda model, optimizer, factor: setattr(model, "classifier", lambda i: model.heads[i])}


@pytest.mark.parametrize("optimizer, seeds", [("adamw", 6), ("muon", 2)])
def test_what_grows_with_the_width_under_standard_stays_under_mup(optimizer, seeds, monkeypatch):
    """Measured from width 32 to 256: under mup nothing changes by more than a factor of 1.39 (AdamW) and 1.13 (Muon);
    under standard all grow, by 5 to 107 and by 1.6 to 9. What mup lets vanish as width^-0.5 are logits and scores
    before the first step."""
    still = coordinates(monkeypatch, seeds, optimizer=optimizer, parametrisation="mup")
    assert spread(still["change"]) < 1.5
    if optimizer == "adamw":                                 # before the first step there is no other
        assert spread(still["at first"], "logits", "scores") < 1.15
        for name in ("logits", "scores"):
            assert still["at first"][name][-1] / still["at first"][name][0] == pytest.approx(8 ** -0.5, rel=0.2)
    for names in coordinates(monkeypatch, seeds, optimizer=optimizer).values():
        assert min(sizes[-1] / sizes[0] for sizes in names.values()) > 1.45


@pytest.mark.parametrize("rule", WITHOUT)
def test_each_rule_is_needed(rule, monkeypatch):
    """Without it the bounds above break: measured 9.5 (init, before the first step), 109, 3.9 and 1.8."""
    found = coordinates(monkeypatch, without=rule, parametrisation="mup")
    assert (spread(found["at first"], "logits", "scores") > 5 if rule == "init" else spread(found["change"]) > 1.6)


@pytest.mark.parametrize("optimizer, settings", [
    ("adam", dict()), ("adamw", dict(tie_weights=True)), ("muon", dict(qk_norm=True, qk_scale=True, init="normal")),
    ("schedule_free", dict(mup_base_head_dim=16, shorten=2, n_layer=3, init="zero"))], ids=str)
def test_at_the_base_width_it_is_standard_bit_for_bit(optimizer, settings):
    """There every factor of the table is 1; so it is in steps with decay."""
    one, other = (build(optimizer=optimizer, weight_decay=0.1, parametrisation=word, **settings)
                  for word in ("standard", "mup"))
    for model, step, x, y in (one, other):
        train(model, step, x, y)
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))
    assert torch.equal(one[0](one[2]), other[0](one[2]))


def test_away_from_it_initial_weights_scores_and_logits_differ_by_their_factors():
    """At 4 times the width: hidden matrices by 4^-0.5, scores by 4^-0.5 (1 / d for 1 / sqrt(d)), logits by 1 / 4."""
    (standard, *_), (mup, _, x, _) = (build(n_embd=128, parametrisation=word) for word in ("standard", "mup"))
    for (name, p), q in zip(standard.named_parameters(), mup.parameters()):
        factor = 0.5 if parameter_roles(mup)[name] in optim.HIDDEN else 1.0
        assert torch.allclose(p * factor, q, rtol=1e-6, atol=0)
    standard.load_state_dict(mup.state_dict())
    for block in standard.blocks:
        rows = block.mixer.fused["qkv"][0]
        with torch.no_grad():
            block.mixer.qkv.weight[:rows] *= 0.5
            block.mixer.qkv.bias[:rows] *= 0.5
    assert torch.allclose(standard(x) / 4, mup(x), rtol=1e-4, atol=1e-7)
    learned, fixed = (build(n_embd=128, parametrisation="mup", qk_norm=True, qk_scale=scale)[0]
                      for scale in (True, False))  # a learned scale of scores starts as the fixed one
    assert learned.blocks[0].mixer.qk_scale.item() == 4.0  # the root of 16, head_dim at the base width
    assert torch.allclose(learned(x), fixed(x), rtol=1e-5, atol=1e-8)
    whole, same_heads = (TransformerConfig(n_embd=128, n_head=n, mup_base_width=32, parametrisation="mup",
                                           mup_base_head_dim=base) for n, base in ((2, None), (8, 16)))
    assert (whole.score_factor, same_heads.score_factor) == (0.5, 1.0)  # more heads of one width: scores as they are


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "schedule_free"])
def test_rates_and_decays(optimizer):
    """Hidden matrices under Adam's kin: a fourth of the rate and four times the decay, as one step decays by both;
    Muon's, and all else: as they were typed. As many groups at any width, and without decay: checkpoints go over."""
    how = dict(optimizer=optimizer, parametrisation="mup")
    model, step, *_ = build(n_embd=128, weight_decay=0.1, **how)
    groups = {p: group for group in step.param_groups for p in group["params"]}
    for name, role in parameter_roles(model).items():
        group, hidden = groups[model.get_parameter(name)], role in optim.HIDDEN
        rate = 0.02 if hidden and optimizer == "muon" else 0.01 / 4 if hidden else 0.01
        assert group["base_lr"] == group["lr"] == rate
        decay = 0.4 if hidden and optimizer != "muon" else 0.1 if role in optim.DECAYED else 0.0
        assert group["weight_decay"] == decay
    for n, decay in ((32, 0.0), (32, 0.1), (64, 0.0)):
        other = build(1, n_embd=n, weight_decay=decay, **how)[1]
        assert [len(g["params"]) for g in other.param_groups] == [len(g["params"]) for g in step.param_groups]
    optim.set_rate(step, dict(lr=0.01, schedule="wsd", warmup_steps=2, max_steps=9, min_lr_scale=0.0,
                              decay_fraction=0.5), 0)
    assert all(group["lr"] == group["base_lr"] / 2 for group in step.param_groups)


@pytest.mark.parametrize("optimizer", ["sgd", "ivon"])
def test_rules_without_rates_by_width_are_refused(optimizer):
    with pytest.raises(ValueError, match="choose adam, adamw, muon or schedule_free"):
        build(optimizer=optimizer, parametrisation="mup")
    build(optimizer=optimizer)
