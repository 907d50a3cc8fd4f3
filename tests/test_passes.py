"""A step is a step: N passes over B rows are one pass over N B rows, in train_mult.py and train_dvae.py.

What draws noise for each pass draws other numbers in another order, so nothing here does: no dropout, no forcing, and
of the dVAE the first step, in which codes are not noisy yet; each code chosen here is nearer than the next by 1e-3, far
from rounding. SGD, since a step of Adam from a gradient of rounding errors is as long as any other.
"""
import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from data.arc import load  # noqa: E402
from test_scripts import fresh  # noqa: E402

load = functools.cache(load)
pytestmark = pytest.mark.usefixtures("one_thread")
SGD = dict(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip="none", warmup_steps=0, max_steps=1,
           log_interval=1, device="cpu", dtype="float32")
MULT = dict(min_digits=1, max_digits=2, n_examples=500, val_fraction=0.2, val_examples=2, eval_examples=2, n_layer=1,
            n_head=2, n_embd=16, n_latent=3, models="simple,latent,prefix")
DVAE = dict(max_side=5, n_train=60, n_val=2, n_codes=6, codebook_size=16, code_dim=8, n_head=2, n_embd=16, cell_dim=8,
            reset_interval="none", usage_weight="0,0", ema_decay=0.0)


class Told:
    """What a Run is told: lines of metrics, and a copy of each file's last state."""

    def __init__(self, *_, **__):
        self.stop, self.dir, self.lines, self.files = None, None, [], {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log(self, **line):
        self.lines.append(line)

    def save(self, name, state):
        self.files[name] = {key: {k: v.clone() for k, v in value.items()} if key == "model" else value
                            for key, value in state.items()}

    def nothing(self, *_, **__):
        pass

    keep = summary = spent = update = note = close = nothing

    def bar(self, *_):
        return self


def run(script, monkeypatch, settings):
    """What a Run is told by main(), in this process, without files."""
    g, told = fresh(script), Told()
    g.update(Run=lambda *_, **__: told, draw_all=lambda *_: None)
    if script == "train_dvae.py":
        g["load"] = load                                     # the same grids, drawn once
    monkeypatch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in settings.items())])
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    g["main"]()
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    return told


def assert_same(one, two, where):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5, msg=lambda text: f"{where} {name} {text}")


def numbers(lines):
    """[{name: number}] of the steps, without clocks."""
    return [{name: value for name, value in line.items() if name not in ("seconds", "model", "split")
             and not name.endswith("_s")} for line in lines if line["split"] == "train"]


@pytest.mark.parametrize("settings", [
    dict(format="reversed"), dict(format="plain", sum_head="value"),
    dict(format="reversed", sum_head="classes", sequence_weight=2.0), dict(format="plain", sequence_weight=0.5),
    dict(format="padded", sum_head="classes"), dict(format="trace", sum_head="value", sequence_weight=1.0)], ids=str)
def test_mult(monkeypatch, settings):
    three, one = (run("train_mult.py", monkeypatch, SGD | MULT | settings | dict(batch_size=rows, grad_accum=passes))
                  for rows, passes in ((4, 3), (12, 1)))
    for a, b in zip(numbers(three.lines), numbers(one.lines), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, state in three.files["last.pt"]["models"].items():
        assert_same(state["model"], one.files["last.pt"]["models"][name]["model"], name)


@pytest.mark.parametrize("settings", [
    dict(estimator="gumbel_soft", loss_scale="token"), dict(estimator="gumbel_hard", hard_at=0.0, kl_weight="0.1,0.1"),
    dict(estimator="straight_through", hard_at=0.0, loss_scale="token", kl_weight="0.1,0.1", mask_rate="0.3,0.3"),
    dict(estimator="reinmax", hard_at=0.0, loss_scale="grid", codebook_bound=0.1, kl_target=3.0),
    dict(estimator="vq"), dict(estimator="vq", loss_scale="token", similarity="dot", layout="canvas"),
    dict(estimator="fsq", loss_scale="token", mask_rate="0.5,0.5")], ids=str)
def test_dvae(monkeypatch, settings):
    three, one = (run("train_dvae.py", monkeypatch, SGD | DVAE | settings | dict(batch_size=rows, grad_accum=passes))
                  for rows, passes in ((4, 3), (12, 1)))
    for a, b in zip(numbers(three.lines), numbers(one.lines), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert_same(three.files["last.pt"]["model"], one.files["last.pt"]["model"], settings["estimator"])


@pytest.mark.parametrize("settings, said", [(dict(usage_weight="0.1,0.1", tc_weight="0,0.1"), "usage_weight, tc_weight"),
                                            (dict(kl_weight="0.1,0.1"), None)])
def test_what_is_not_linear_is_said(monkeypatch, capsys, settings, said):
    run("train_dvae.py", monkeypatch, SGD | DVAE | settings | dict(batch_size=4, grad_accum=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not linear" in line]
    assert [said in line and line.startswith("grad_accum 2: ") for line in lines] == [True] * bool(said)
