"""A step of train_mult.py and train_dvae.py: N passes over B rows are one pass over N B rows; the last one is evaluated
like any other; a stop on one that is to be evaluated leaves the files of a run that never stopped.

What draws noise for each pass draws other numbers in another order, so nothing here does: no dropout, no forcing, and
of the dVAE the first step, in which codes are not noisy yet; each code chosen here is nearer than the next by 1e-3, far
from rounding. SGD, since a step of Adam from a gradient of rounding errors is as long as any other.
"""
import functools
import io
import sys
from pathlib import Path

import pytest
import torch

import nanolab.run
from data.arc import load
from nanolab.run import Checkpoint, Run
from forks import assert_equal
from test_scripts import fresh

load = functools.cache(load)
pytestmark = pytest.mark.usefixtures("one_thread")
SGD = dict(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip="none", warmup_steps=0, max_steps=1,
           log_interval=1, device="cpu", dtype="float32")
MULT = dict(min_digits=1, max_digits=2, n_examples=500, val_fraction=0.2, val_examples=2, eval_examples=2, n_layer=1,
            n_head=2, n_embd=16, n_latent=3, models="simple,latent,prefix")
DVAE = dict(max_side=5, n_train=60, n_val=2, n_codes=6, codebook_size=16, code_dim=8, n_head=2, n_embd=16, cell_dim=8,
            reset_interval="none", usage_weight="0,0", ema_decay=0.0)


class Told(Run):
    """A Run without files, and what it is told: lines of metrics without clocks, the summary, and every state saved:
    [(name, state)]. With stop_at it is as if a signal came in that step."""

    def __init__(self, stop_at, *given, **things):
        self.stop_at, self.lines, self.saved, self.end = stop_at, [], [], {}
        super().__init__(*given, **things)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log(self, **line):
        self.lines.append({name: value for name, value in line.items() if name != "seconds" and name[-2:] != "_s"})
        if line["split"] == "train" and line["step"] == self.stop_at:
            self.stop = 15

    def _write(self, name, state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.saved.append((name, torch.load(file, weights_only=True)))

    def summary(self, **values):
        self.end |= values

    def bar(self, *_):
        return self

    def nothing(self, *_, **__):
        """Of a bar, and of the clock."""

    spent = note = update = close = nothing

    def last(self, name="last.pt"):
        """The state that a file has at the end."""
        return [state for saved, state in self.saved if saved == name][-1]


def run(script, monkeypatch, settings, checkpoint=None, stop_at=None):
    """What a Run is told by main(), in this process, without files; on resume from the state `checkpoint`."""
    g, told = fresh(script), []
    g.update(Run=lambda *given, **things: told.append(Told(stop_at, *given, **things)) or told[0],
             draw_all=lambda *_: None)
    if script == "train_dvae.py":
        g["load"] = load                                     # the same grids, drawn once
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    with monkeypatch.context() as patch:
        if checkpoint:
            checkpoint = Checkpoint(checkpoint, Path("last.pt"))
            patch.setattr(nanolab.run, "find_resume", lambda *_: checkpoint.path)
            patch.setattr(nanolab.run, "load_checkpoint", lambda *_: checkpoint)
        patch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in settings.items())])
        g["main"]()
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    return told[0]


def assert_same(three, one, states):
    """Metrics of the step, and all tensors of the `states` of the last.pt, to 1e-5."""
    for a, b in zip(*([line for line in told.lines if line["split"] == "train"] for told in (three, one)), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == (b[name] if isinstance(b[name], str) else pytest.approx(b[name], rel=1e-5)) for name in b)
    torch.testing.assert_close(*(states(told.last()) for told in (three, one)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [
    dict(format="reversed"), dict(format="plain", sum_head="value"),
    dict(format="reversed", sum_head="classes", sequence_weight=2.0), dict(format="plain", sequence_weight=0.5),
    dict(format="padded", sum_head="classes"), dict(format="trace", sum_head="value", sequence_weight=1.0)], ids=str)
def test_mult(monkeypatch, settings):
    three, one = (run("train_mult.py", monkeypatch, SGD | MULT | settings | dict(batch_size=rows, grad_accum=passes))
                  for rows, passes in ((4, 3), (12, 1)))
    assert_same(three, one, lambda last: {name: own["model"] for name, own in last["models"].items()})


@pytest.mark.parametrize("settings", [
    dict(estimator="gumbel_soft", loss_scale="token"), dict(estimator="gumbel_hard", hard_at=0.0, kl_weight="0.1,0.1"),
    dict(estimator="straight_through", hard_at=0.0, loss_scale="token", kl_weight="0.1,0.1", mask_rate="0.3,0.3"),
    dict(estimator="reinmax", hard_at=0.0, loss_scale="grid", codebook_bound=0.1, kl_target=3.0),
    dict(estimator="vq"), dict(estimator="vq", loss_scale="token", similarity="dot", layout="canvas"),
    dict(estimator="fsq", loss_scale="token", mask_rate="0.5,0.5")], ids=str)
def test_dvae(monkeypatch, settings):
    three, one = (run("train_dvae.py", monkeypatch, SGD | DVAE | settings | dict(batch_size=rows, grad_accum=passes))
                  for rows, passes in ((4, 3), (12, 1)))
    assert_same(three, one, lambda last: last["model"])


@pytest.mark.parametrize("settings, said", [
    (dict(usage_weight="0.1,0.1", tc_weight="0,0.1"), "usage_weight, tc_weight"), (dict(kl_weight="0.1,0.1"), None)])
def test_what_is_not_linear_is_said(monkeypatch, capsys, settings, said):
    run("train_dvae.py", monkeypatch, SGD | DVAE | settings | dict(batch_size=4, grad_accum=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not linear" in line]
    assert [said in line and line.startswith("grad_accum 2: ") for line in lines] == [True] * bool(said)


def test_what_a_step_lacks_is_left_out_of_its_mean(monkeypatch):
    """A part that begins to weigh between two lines of the log: the mean of the steps that have it."""
    settings = SGD | DVAE | dict(batch_size=4, tc_weight="0,0.1", max_steps=2)
    told, each = (run("train_dvae.py", monkeypatch, settings | dict(log_interval=n)) for n in (2, 1))
    line, (one, two) = told.lines[1], each.lines[1:3]
    assert "tc" not in one and line["tc"] == two["tc"] and line["kl"] == (one["kl"] + two["kl"]) / 2


# --- After the last step, and on a stop ---

ENDS = {"train_mult.py": SGD | MULT | dict(models="simple,latent", batch_size=4),
        "train_dvae.py": SGD | DVAE | dict(batch_size=4, estimator="vq", ema_decay=0.5)}


def validated(told):
    """[(step, exact match, loss)] of the validations by the protocol of the loop, of one model."""
    lines = [line for line in told.lines if line["split"] == "val" and "final" not in line]
    return [(line["step"], line.get("exact", line["accuracy"]), -line.get("nats", line["loss"]))
            for line in lines if line.get("model") in (None, "latent")]


@pytest.mark.parametrize("script", ENDS)
def test_the_last_step_counts_for_best(script, monkeypatch):
    """Where eval_interval does not divide max_steps too; a stopped run evaluates nothing more; one that goes on to more
    steps neither waits less nor forces sooner for that validation."""
    settings = ENDS[script] | dict(max_steps=3, eval_interval=2)
    suffix = "_latent" if script == "train_mult.py" else ""
    told = run(script, monkeypatch, settings)
    found = validated(told)
    best, name = max(found, key=lambda line: line[1:])[0], f"best{suffix}.pt"
    assert [step for step, *_ in found] == [0, 2, 3] and [line.get("final") for line in told.lines][-1]
    assert best == 3 == told.last(name)["step"] == told.end[f"best_step{suffix}"]
    stopped = run(script, monkeypatch, settings, stop_at=3)
    assert [step for step, *_ in validated(stopped)] == [0, 2] and "final" not in stopped.lines[-1]
    resumed = run(script, monkeypatch, settings, stopped.last())
    assert validated(resumed) == found[2:]
    for file in (name, "last.pt"):
        assert_equal(resumed.last(file), told.last(file), file)
    if suffix:
        more = dict(max_steps=4, schedule="constant", forcing="linear", stability_window=2, stability_eps=10)
        whole = run(script, monkeypatch, settings | more)
        parts = run(script, monkeypatch, settings | more, run(script, monkeypatch, settings | more | dict(
            max_steps=3)).last())
        one, two = (told.last()["models"]["latent"] for told in (parts, whole))
        assert one["forcing"]["losses"] == two["forcing"]["losses"] and len(one["forcing"]["losses"]) == 2
        assert [line for line in parts.lines if line["split"] == "train"] == [
            line for line in whole.lines if line["split"] == "train" and line["step"] == 4]


@pytest.mark.parametrize("script", ENDS)
def test_a_stop_where_an_evaluation_is_due(script, monkeypatch):
    """Every file, with the rate of its step in the optimiser's groups, is that of a run that never stopped."""
    settings = ENDS[script] | dict(max_steps=4, eval_interval=2, save_interval=2, warmup_steps=3, schedule="cosine")
    whole, stopped = run(script, monkeypatch, settings), run(script, monkeypatch, settings, stop_at=2)
    resumed = run(script, monkeypatch, settings, stopped.last())
    due, found = ([(name, state) for name, state in told.saved if state["step"] >= 2] for told in (whole, resumed))
    assert [(name, state["step"]) for name, state in due] == [(name, state["step"]) for name, state in found]
    assert due[0][1]["step"] == 2 and due[0][0][:4] == "best"
    for (name, one), (_, two) in zip(due, found):
        assert_equal(one, two, name)
