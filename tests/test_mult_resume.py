"""train_mult.py as it is typed: models at steps of their own, in one stream, asked and cleaned away. What it shares
with the other scripts is in test_resume.py."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.multiplication import Problems
from nanolab.run import load_checkpoint, override
from forks import assert_done, assert_equal, assert_error, records, snapshot, summary
from scripts import KEEP, curve, of
from test_scripts import fresh

_, at, done = of("train_mult")
KEEP = KEEP["train_mult"]


@pytest.fixture(scope="module")
def base(forks, tmp_path_factory):
    """A finished run with all its numbered checkpoints and TensorBoard; tests work on copies."""
    folder = tmp_path_factory.mktemp("base")
    done(forks, folder, **KEEP)
    return at(folder)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


def test_one_stream_whatever_is_trained(forks, tmp_path):
    """Alone, together, or one after the other: each model sees the same batches and learns the same bits."""
    both, alone, later = (tmp_path / name for name in ("both", "alone", "later"))
    done(forks, both, dropout=0.2)
    done(forks, alone, dropout=0.2, models="latent")
    done(forks, later, dropout=0.2, models="simple")
    done(forks, later, "--resume", dropout=0.2, models="latent")
    together = load_checkpoint(at(both) / "last.pt")["models"]
    assert set(load_checkpoint(at(alone) / "last.pt")["models"]) == {"latent"}
    assert_equal(load_checkpoint(at(alone) / "last.pt")["models"]["latent"], together["latent"])
    assert_equal(dict(sorted(load_checkpoint(at(later) / "last.pt")["models"].items())), dict(sorted(together.items())))
    assert curve(at(both), "loss", model="simple") == curve(at(later), "loss", model="simple")


def test_probability_one_is_no_forcing(forks, base, tmp_path):
    """Also with a schedule that has begun; a falling one changes the run after its start, and not before."""
    done(forks, tmp_path / "one", forcing="linear", forcing_slope=0.0)
    done(forks, tmp_path / "falling", forcing="linear", forcing_slope=0.1, forcing_start=5)
    runs = base, at(tmp_path / "one"), at(tmp_path / "falling")
    none, one, falling = (curve(run, "loss", model="latent") for run in runs)
    assert none == one and falling[:6] == none[:6] and falling != none
    assert_equal(*(load_checkpoint(run / "last.pt")["models"]["latent"]["model"] for run in runs[:2]))
    assert curve(runs[2], "forcing", model="simple")[5:8] == pytest.approx([1, 0.9, 0.8])
    for model in ("simple", "latent"):                       # best: its own highest exact match, then the lowest loss
        steps, hits, losses = (curve(base, key, "val", model=model) for key in ("step", "accuracy", "loss"))
        best = max(zip(steps, hits, losses), key=lambda line: (line[1], -line[2]))[0]
        assert load_checkpoint(base / f"best_{model}.pt")["steps"][model] == best == summary(base)[f"best_step_{model}"]


def test_tensorboard_is_one_curve_for_each_model(forks, base, copy, tmp_path):
    """Resumed from an older checkpoint, with one model ahead afterwards: no step twice, nothing of the old branch. The
    one that is not trained is kept; evaluate.py, which knows one model of a run, scores none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    done(forks, tmp_path / "runs", "--resume", copy / "step_00000007.pt", models="simple", max_steps=14, **KEEP)
    last, before = (load_checkpoint(path) for path in (copy / "last.pt", base / "step_00000007.pt"))
    assert last["steps"] == {"simple": 14, "latent": 7}
    assert_equal(last["models"]["latent"], before["models"]["latent"])
    assert_error(forks.run(["evaluate.py", copy], tmp_path), "last.pt")
    done(forks, tmp_path / "runs", "--resume", models="simple,latent", max_steps=13, **KEEP)
    for model, end in (("simple", 14), ("latent", 13)):
        assert curve(copy, model=model) == list(range(1, end + 1))
        events = EventAccumulator(str(copy / "tensorboard" / model), size_guidance={"scalars": 0}).Reload()
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in found] == list(range(1, end + 1))
        assert [value for _, value in found] == pytest.approx(curve(copy, "loss", model=model), rel=1e-5)
    assert load_checkpoint(copy / "last.pt")["steps"] == {"simple": 14, "latent": 13}


def test_early_stopped_one_rests(forks, tmp_path):
    """A rate of nearly zero never gets better: with patience 1 both rest early, and more patience wakes them."""
    how, last = dict(lr=1e-12, muon_lr=1e-12, weight_decay=0.0, eval_interval=3), at(tmp_path) / "last.pt"
    child = done(forks, tmp_path, **how, patience=1)
    assert all(step < 12 for step in load_checkpoint(last)["steps"].values()) and "exact match" in child.out
    done(forks, tmp_path, "--resume", **how, patience=99)
    assert load_checkpoint(last)["steps"] == {"simple": 12, "latent": 12}


def test_original_command_line(forks, tmp_path):
    """With the names of old and hyphens; the same run."""
    words = ("--d_model 16 --num_layers 1 --num_latent 4 --min_digits 1 --max_digits 1 --batch_size 16 --max_steps 2 "
             "--save_every 3 --n_head 2 --n_examples 500 --device cpu --run_name")
    assert_done(forks.run(["train_mult.py", *re.sub(r"(?<=\w)_(?=\w+ )", "-", words).split(), "a"], tmp_path))
    settings = json.loads((tmp_path / "runs" / "train_mult" / "a" / "params.json").read_text())["settings"]
    assert (settings["n_embd"], settings["n_layer"], settings["n_latent"], settings["save_interval"]) == (16, 1, 4, 3)
    shown = " ".join(forks.run(["train_mult.py", "-h"], tmp_path).out.split())
    assert "also --d_model" in shown and "also --save_every" in shown


def test_start_and_questions(forks, base, copy, tmp_path):
    """What is said at the start; what --ask and --eval_only print; and that they write nothing."""
    before = snapshot(tmp_path)
    asked = done(forks, tmp_path / "runs", "--resume", "--ask", "12*34, 7 x 8")
    assert "12 x 34 = 408 (" in asked.out and "7 x 8 = 56 (" in asked.out
    assert len(re.findall(r"^  (simple|latent) +\S.* (right|wrong) \(wrote \S*, step 12\)$", asked.out, re.M)) == 4
    assert re.search(r"split by unordered pair: seed 0, hash [0-9a-f]{12}\n", asked.out)
    assert re.search(r"\d+ x \d+ = \d+: the model reads \d+\*\d+ and writes =\d+\$\n", asked.out)
    evaluated = done(forks, tmp_path / "runs", "--resume", "--eval_only")
    row = r"(simple|latent), step 12, (training|held-out) pairs: exact match (\S+) on (\d+)"
    found, held_out = re.findall(row, evaluated.out), len(Problems(1, 2, 1, 0.2, 60).val)
    assert [row[:2] for row in found] == [(m, s) for m in ("simple", "latent") for s in ("training", "held-out")]
    for model, split, accuracy, n in found:
        if split == "held-out":
            assert accuracy == f"{summary(base)[f'val_accuracy_{model}']:.4f}" and int(n) == held_out
    assert "truth (rows) against prediction" in evaluated.out and "first error here" in evaluated.out
    assert snapshot(tmp_path) == before


def test_training_pairs_are_as_long_as_those_held_out(forks, tmp_path):
    """Where shorter problems are among the training examples: exact match on training pairs is not of these."""
    done(forks, tmp_path, short_share=0.9, min_digits=2, n_examples=3000, eval_interval=20)
    checkpoint = load_checkpoint(at(tmp_path) / "last.pt")
    problems = Problems(2, 2, 3000, 0.2, 60, short_share=0.9)
    full = problems.train[(problems.train >= 10).all(1)][:40]
    assert (problems.train[:40] < 10).any()
    g = fresh("train_mult.py")
    override(g, [f"--{name}={value}" for name, value in checkpoint["settings"].items()
                 if name in ("n_layer", "n_head", "n_embd", "min_digits", "max_digits")])
    _, notation, config = g["check"](dict(g))
    solver = g["Solver"]("simple", config)
    solver.load_state_dict(checkpoint["models"]["simple"]["model"])
    found = g["evaluate"](solver, notation, full, torch.autocast("cpu", enabled=False))
    last = [line for line in records(at(tmp_path)) if line["split"] == "val" and line["model"] == "simple"
            and "train_loss" in line][-1]
    assert last["step"] == 12 and last["train_loss"] == pytest.approx(found["loss"], rel=1e-5)
