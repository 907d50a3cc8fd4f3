"""A setting that cannot count beside the others is told: when it counts stands in its comment, and is true."""
import io
import json
import re
from contextlib import redirect_stdout

import pytest
import torch

import grid
from model import FEED_FORWARDS, MIXERS, TransformerConfig, build_model
from nanolab import limits, optim
from nanolab.run import UserError, override
from nanolab.settings import ROOT, Settings, _read_fields, _read_settings

TRAINERS = ("train_enwik8", "train_mult", "train_dvae", "train_worldmodel", "train_facts")
WORDS = {"mixer": set(MIXERS), "ff": set(FEED_FORWARDS), "optimizer": set(optim.RULES)}


@pytest.mark.parametrize("script", TRAINERS)
def test_comments_name_other_settings_and_their_words(script):
    specs = _read_settings(ROOT / f"{script}.py")
    conditions = {name: spec.only for name, spec in specs.items() if spec.only}
    assert len(conditions) >= 8
    for name, (_, other, words) in conditions.items():
        assert other in specs and other != name, name
        known = WORDS.get(other) or set(specs[other].words) or set(re.findall(r"\w+", specs[other].comment))
        assert set(words) <= known, name
        while other:                                         # no circle
            assert other != name
            other = conditions.get(other, ("", "", ""))[1]


def told(script, *words):
    """What is printed before step 1."""
    presets = {"small": {"optimizer": "adam", "muon_lr": 0.1}}
    settings = override({"__file__": str(ROOT / f"{script}.py"), "presets": presets}, list(words))
    with redirect_stdout(io.StringIO()) as out:
        limits.notes(settings, {})
    return out.getvalue().splitlines()


@pytest.mark.parametrize("script, words, wanted", [
    ("train_enwik8", "--state_dim 32", ["--state_dim has no effect with mixer full"]),
    ("train_enwik8", "--window 9 --mixer mamba,window --state_dim 4", []),
    ("train_enwik8", "--preset small", []),                  # a preset's settings are for what it is changed into
    ("train_enwik8", "--betas 0.9,0.9 --optimizer sgd --momentum 0.5", ["--betas has no effect with optimizer sgd"]),
    ("train_enwik8", "--mixer compressive --compression max --compression_weight 2",
     ["--compression_weight has no effect with compression max"]),
    ("train_enwik8", "--compression_weight 2", ["--compression_weight has no effect with mixer full"]),  # by its own
    ("train_enwik8", "--mtp_weight 1", ["--mtp_weight has no effect with mtp_depth 0"]),
    ("train_mult", "--forcing_slope 1 --forcing exponential --forcing_min 0.5",
     ["--forcing_slope has no effect with forcing exponential"]),
    ("train_mult", "--models simple,prefix --n_latent 3", ["--n_latent has no effect with models simple,prefix"]),
    ("train_facts", "--task text --pairs 3 --names plain", ["--pairs has no effect with task text",
                                                            "--names has no effect with task text"]),
    ("train_worldmodel", "--dataset atari:Freeway --walls 0 --length 9",
     ["--walls has no effect with dataset atari:Freeway"]),
    ("train_dvae", "--reset_interval none --reset_fraction 1",
     ["--reset_fraction has no effect with reset_interval none"]),
])
def test_a_flag_without_an_effect_is_told(script, words, wanted):
    assert told(script, *words.split()) == wanted


def another(spec):
    """A legal value that is not the default."""
    if spec.words:
        return next(word for word in spec.words if word != spec.default)
    return True if spec.kind is bool else spec.kind(2 * (spec.default or 1))


FIELDS = _read_fields(ROOT / "model.py", "TransformerConfig")


@pytest.mark.parametrize("name", [name for name, spec in FIELDS.items()
                                  if spec.only and name not in ("qk_scale", "qk_gain")])
def test_an_idle_field_changes_no_model(name):
    small = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, positions="none", compression="mean")
    alone = Settings({field: spec.default for field, spec in FIELDS.items()} | small)
    alone.only = {field: spec.only for field, spec in FIELDS.items()}
    assert alone.idle(name)
    made = []
    for value in (FIELDS[name].default, another(FIELDS[name])):
        torch.manual_seed(0)
        model = build_model(TransformerConfig(**small | {name: value}))
        made.append((model.state_dict(), model(torch.arange(8)[None])))
    torch.testing.assert_close(*made, rtol=0, atol=0)


@pytest.mark.parametrize("rule", optim.RULES)
def test_an_idle_setting_changes_no_step(rule):
    specs = _read_settings(ROOT / "train_enwik8.py")
    settings = Settings({name: spec.default for name, spec in specs.items()} | {"optimizer": rule, "warmup_steps": 1})
    settings.only = {name: spec.only for name, spec in specs.items()}
    idle = [name for name, spec in specs.items() if spec.only and spec.only[1] == "optimizer" and settings.idle(name)]
    assert idle

    def stepped(values):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, bias=False)
        roles = {"weight": "matrix"}
        opt = optim.build(values, model.named_parameters(), roles, n_examples=100)
        for step in range(2):
            optim.set_rate(opt, values, step)
            with opt.sampled():
                model(torch.randn(2, 4)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return model.weight
    others = dict(betas=(0.5, 0.6), momentum=0.3, muon_momentum=0.3)
    changed = settings | {name: others.get(name) or another(specs[name]) for name in idle}
    assert torch.equal(stepped(settings), stepped(changed))
    busy = {"sgd": "momentum", "muon": "muon_momentum"}.get(rule, "betas")
    assert not torch.equal(stepped(settings), stepped(settings | {busy: others[busy]}))


def test_a_row_of_a_grid_that_changes_nothing_is_refused(tmp_path):
    plan = dict(script=str(ROOT / "train_enwik8.py"), out_dir=str(tmp_path / "out"), metric="best_bpb", seeds=[1, 2],
                base=dict(debug=True, positions="rope"), rows=dict(states=dict(set=dict(state_dim=32))))
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="row 'states': it changes nothing: state_dim has no effect with mixer full"):
        grid.Grid(path)
    plan["rows"]["states"]["set"]["mixer"] = "mamba"
    path.write_text(json.dumps(plan))
    assert grid.Grid(path).rows[-1].changes == {"state_dim": 32, "mixer": "mamba"}
