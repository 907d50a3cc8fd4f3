"""train_mult.py as it is typed: models at steps of their own, killed, stopped, resumed, asked and cleaned away."""
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from data.multiplication import Problems
from nanolab.run import load_checkpoint, override
from forks import (assert_done, assert_equal, assert_error, records, snapshot,
                         summary, wait_for)
from test_scripts import fresh
from scripts import assert_same_end, of

train, at = of("train_mult")


def curve(run, model, split="train", key="step"):
    return [line[key] for line in records(run)
            if (line["model"], line["split"]) == (model, split) and "final" not in line]


def test_killed_around_the_first_saves(forks, tmp_path):
    """Between the first checkpoints too: the best of one model there, that of the other and last.pt not yet."""
    whole, steps = tmp_path / "whole", dict(max_steps=2, save_interval=5)
    assert_done(forks.run(train(whole, **steps), tmp_path))
    for die_at in range(1, 20, 2):
        out_dir = tmp_path / f"killed{die_at}"
        assert forks.run(train(out_dir, **steps), tmp_path, die_at=die_at).code == -signal.SIGKILL
        assert_done(forks.run(train(out_dir, "--resume", **steps), tmp_path))
        assert_same_end(at(out_dir), at(whole))


def test_one_stream_whatever_is_trained(forks, tmp_path):
    """Alone, together, or one after the other: each model sees the same batches and learns the same bits."""
    both, alone, later = (tmp_path / name for name in ("both", "alone", "later"))
    assert_done(forks.run(train(both, dropout=0.2), tmp_path))
    assert_done(forks.run(train(alone, dropout=0.2, models="latent"), tmp_path))
    assert_done(forks.run(train(later, dropout=0.2, models="simple"), tmp_path))
    assert_done(forks.run(train(later, "--resume", dropout=0.2, models="latent"), tmp_path))
    together = load_checkpoint(at(both) / "last.pt")["models"]
    assert set(load_checkpoint(at(alone) / "last.pt")["models"]) == {"latent"}
    assert_equal(load_checkpoint(at(alone) / "last.pt")["models"]["latent"], together["latent"])
    assert_equal(dict(sorted(load_checkpoint(at(later) / "last.pt")["models"].items())), dict(sorted(together.items())))
    assert curve(at(both), "simple", key="loss") == curve(at(later), "simple", key="loss")


def test_probability_one_is_no_forcing(forks, tmp_path):
    """Also with a schedule that has begun; a falling one changes the run after its start, and not before."""
    commands = [train(tmp_path / str(i), **settings) for i, settings in enumerate((
        {}, dict(forcing="linear", forcing_slope=0.0), dict(forcing="linear", forcing_slope=0.1, forcing_start=5)))]
    for command in commands:
        assert_done(forks.run(command, tmp_path))
    none, one, falling = (curve(at(tmp_path / str(i)), "latent", key="loss") for i in range(3))
    assert none == one and falling[:6] == none[:6] and falling != none
    states = [load_checkpoint(at(tmp_path / str(i)) / "last.pt")["models"]["latent"]["model"] for i in range(2)]
    assert_equal(*states)
    assert curve(at(tmp_path / "2"), "simple", key="forcing")[5:8] == pytest.approx([1, 0.9, 0.8])


@pytest.fixture(scope="module")
def base(forks, tmp_path_factory):
    """A finished run with all its numbered checkpoints and TensorBoard; tests work on copies."""
    folder = tmp_path_factory.mktemp("base")
    assert_done(forks.run(train(folder, **KEEP), folder))
    return at(folder)


KEEP = dict(keep_last=12, tensorboard=True)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


def test_exactly_max_steps(forks, base, copy, tmp_path):
    for model in load_checkpoint(base / "last.pt")["models"].values():
        assert {state["step"] for state in model["optimizer"]["state"].values() if "step" in state} == {12}
    same = train(tmp_path / "runs", **KEEP)
    (copy / "step_00000012.pt").unlink()                     # stopped or killed at this step, before it was written
    for source in ("last.pt", "step_00000011.pt", "step_00000005.pt"):
        assert_done(forks.run([*same, "--resume", copy / source], tmp_path))
        assert_same_end(copy, base)
        assert (copy / "step_00000012.pt").exists()
    more, whole = train(tmp_path / "runs", "--resume", **KEEP | dict(max_steps=14)), train(
        tmp_path / "whole", **KEEP | dict(max_steps=14))
    assert_done(forks.run(more, tmp_path))
    assert_done(forks.run(whole, tmp_path))
    assert curve(copy, "simple") == curve(copy, "latent") == list(range(1, 15))
    assert_done(forks.run(train(tmp_path / "none", max_steps=0), tmp_path))
    assert load_checkpoint(at(tmp_path / "none") / "last.pt")["steps"] == {"simple": 0, "latent": 0}


def test_tensorboard_is_one_curve_for_each_model(forks, copy, tmp_path):
    """Resumed from an older checkpoint, with one model ahead afterwards: no step twice, nothing of the old branch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert_done(forks.run(train(tmp_path / "runs", "--resume", copy / "step_00000007.pt", **KEEP | dict(
        models="simple", max_steps=14)), tmp_path))
    assert_done(forks.run(train(tmp_path / "runs", "--resume", **KEEP | dict(models="simple,latent", max_steps=13)),
                          tmp_path))
    for model, end in (("simple", 14), ("latent", 13)):
        assert curve(copy, model) == list(range(1, end + 1))
        events = EventAccumulator(str(copy / "tensorboard" / model), size_guidance={"scalars": 0}).Reload()
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in found] == list(range(1, end + 1))
        assert [value for _, value in found] == pytest.approx(curve(copy, model, key="loss"), rel=1e-5)
    assert load_checkpoint(copy / "last.pt")["steps"] == {"simple": 14, "latent": 13}


def test_dimensions_come_from_the_checkpoint(forks, base, copy, tmp_path):
    """What makes the weights, and what is held out, is the checkpoint's; one line says which flags were overruled."""
    command = train(tmp_path / "runs", "--resume", copy / "step_00000008.pt", **KEEP | dict(
        n_layer=3, n_embd=64, n_latent=2, split_seed=9, max_digits=3, sum_head="value"))
    child = forks.run(command, tmp_path)
    assert_done(child)
    said = [line for line in child.out.splitlines() if "overruled" in line]
    assert len(said) == 1
    for phrase in ("n_layer 1 comes", "--n_layer 3 is", "--n_embd 64 is", "n_latent 8", "split_seed 0", "max_digits 2",
                   "sum_head none"):
        assert phrase in said[0]
    assert_same_end(copy, base)


def test_a_model_that_is_not_trained_now_is_kept(forks, base, copy, tmp_path):
    before = load_checkpoint(base / "last.pt")["models"]["latent"]
    assert_done(forks.run(train(tmp_path / "runs", "--resume", **KEEP | dict(models="simple", max_steps=15)), tmp_path))
    last = load_checkpoint(copy / "last.pt")
    assert last["steps"] == {"simple": 15, "latent": 12}
    assert_equal(last["models"]["latent"], before)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_without_an_end(forks, tmp_path, number, code):
    run = at(tmp_path / "runs")
    endless = train(tmp_path / "runs", max_steps="none", save_interval=100, schedule="constant")
    child = forks.start(endless, tmp_path)
    wait_for(lambda: child.over() or (run / "metrics.jsonl").exists() and
             (run / "metrics.jsonl").read_bytes().count(b"\n") > 20)
    child.kill(number)
    assert child.wait().code == code and "Traceback" not in child.err
    last = load_checkpoint(run / "last.pt")
    assert summary(run)["status"] == "interrupted" and summary(run)["step"] == last["step"] > 5
    assert len(set(last["steps"].values())) == 1
    goal = last["step"] + 4
    more = train(tmp_path / "runs", "--resume", max_steps=goal, save_interval=100, schedule="constant")
    whole = train(tmp_path / "whole", max_steps=goal, save_interval=100, schedule="constant")
    assert_done(forks.run(more, tmp_path))
    assert_done(forks.run(whole, tmp_path))
    assert records(run) == records(at(tmp_path / "whole"))
    for name, state in load_checkpoint(run / "last.pt")["models"].items():
        assert_equal(state, load_checkpoint(at(tmp_path / "whole") / "last.pt")["models"][name])


def test_early_stopped_one_rests(forks, tmp_path):
    """A rate of nearly zero never gets better: with patience 1 both rest early, and more patience wakes them."""
    command = train(tmp_path / "runs", lr=1e-12, muon_lr=1e-12, weight_decay=0.0, patience=1, eval_interval=3)
    child = forks.run(command, tmp_path)
    assert_done(child)
    last = load_checkpoint(at(tmp_path / "runs") / "last.pt")
    assert all(step < 12 for step in last["steps"].values()) and "exact match" in child.out
    assert_done(forks.run([*command, "--resume", "--patience", 99], tmp_path))
    assert load_checkpoint(at(tmp_path / "runs") / "last.pt")["steps"] == {"simple": 12, "latent": 12}


def test_not_finite(forks, tmp_path):
    child = forks.run(train(tmp_path / "runs", lr=1e30, muon_lr=1e30, grad_clip="none", max_steps=50), tmp_path)
    assert child.code == 3 and re.fullmatch(r"error: loss is not finite at step \d+ of (simple|latent); the last good "
                                            r"checkpoint is \S+last.pt\n", child.err), child.err


def test_original_command_line(forks, tmp_path):
    """With the names of old, with hyphens, and values after =; the same run."""
    words = ("--d_model 16 --num_layers 1 --num_latent 4 --min_digits 1 --max_digits 1 --batch_size 16 --max_steps 6 "
             "--save_every 3 --n_head 2 --device cpu").split()
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    for name, typed in (("a", words), ("b", hyphens)):
        assert_done(forks.run(["train_mult.py", *typed, "--run_name", name], tmp_path))
    one, two = (tmp_path / "runs" / "train_mult" / name for name in "ab")
    assert records(one) == records(two)
    settings = json.loads((one / "params.json").read_text())["settings"]
    assert (settings["n_embd"], settings["n_layer"], settings["n_latent"], settings["save_interval"]) == (16, 1, 4, 3)
    shown = " ".join(forks.run(["train_mult.py", "-h"], tmp_path).out.split())
    assert "also --d_model" in shown and "also --save_every" in shown


def test_start_and_questions(forks, base, copy, tmp_path):
    """What is said at the start; what --ask and --eval_only print; and that they write nothing."""
    before = snapshot(tmp_path)
    again = train(tmp_path / "runs", "--resume")
    asked = forks.run([*again, "--ask", "12*34, 7 x 8"], tmp_path)
    assert_done(asked)
    assert "12 x 34 = 408 (" in asked.out and "7 x 8 = 56 (" in asked.out
    assert len(re.findall(r"^  (simple|latent) +\S.* (right|wrong) \(wrote \S*, step 12\)$", asked.out, re.M)) == 4
    assert re.search(r"split by unordered pair: seed 0, hash [0-9a-f]{12}\n", asked.out)
    assert re.search(r"\d+ x \d+ = \d+: the model reads \d+\*\d+ and writes =\d+\$\n", asked.out)
    evaluated = forks.run([*again, "--eval_only"], tmp_path)
    assert_done(evaluated)
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
    assert_done(forks.run(train(tmp_path, short_share=0.9, min_digits=2, max_digits=2, n_examples=3000,
                                max_steps=60, eval_interval=60, n_embd=32), tmp_path))
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
    assert last["step"] == 60 and last["train_loss"] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize("words, said", [
    (["--models", "simple,deep"], "must be of simple, latent, prefix"), (["--models", "latent,latent"], "each once"),
    (["--min_digits", "3", "--max_digits", "2"], "more than max_digits"), (["--ask", "12*34"], "goes with --resume"),
    (["--resume", "--ask", "twelve"], "as 12*34"), (["--resume", "--ask", "1234*5"], "at most 2 digits"),
    (["--eval_only"], "goes with --resume"), (["--n_head", "3"], "does not divide"), (["--max_digits", "9"], "<= 8"),
    (["--forcing", "exponential", "--forcing_k", "1.5"], "below 1"),
    (["--num_latnt", "3"], "did you mean --num_latent"),
    (["--max_steps", "none"], "max_steps"), (["--resume", "runs/elsewhere"], "no such file")])
def test_mistakes(forks, base, copy, tmp_path, words, said):
    """One line, status 2, and what was there is untouched."""
    before = snapshot(tmp_path)
    named = ["--run_name", "run"] if "--resume" in words else []
    command = ["train_mult.py", "--out_dir", tmp_path / "runs", *words, *named]
    assert_error(forks.run(command, tmp_path), said)
    assert snapshot(tmp_path) == before


def test_questions_before_any_training(forks, tmp_path):
    for words in (["--eval_only"], ["--ask", "12*34"]):
        assert_error(forks.run(["train_mult.py", "--resume", *words], tmp_path), "no checkpoint yet", "train first")
    assert snapshot(tmp_path) == {}


def test_foreign_checkpoint(forks, copy, tmp_path):
    checkpoint = load_checkpoint(copy / "last.pt")
    torch.save({**checkpoint, "script": "train_enwik8"}, tmp_path / "foreign.pt")
    foreign = forks.run(train(tmp_path / "runs", "--resume", tmp_path / "foreign.pt"), tmp_path)
    assert_error(foreign, "train_enwik8, not")
    (tmp_path / "cut.pt").write_bytes((copy / "last.pt").read_bytes()[:2000])
    assert_error(forks.run(train(tmp_path / "runs", "--resume", tmp_path / "cut.pt"), tmp_path), "cut.pt")
    assert_error(forks.run(["evaluate.py", copy], tmp_path), "last.pt")


def test_best_is_of_its_own_model(base):
    """best_MODEL.pt is from the step with the highest exact match of that model, then the lowest loss."""
    for model in ("simple", "latent"):
        lines = [line for line in records(base)
                 if (line["model"], line["split"]) == (model, "val") and "final" not in line]
        best = max(lines, key=lambda line: (line["accuracy"], -line["loss"]))["step"]
        assert load_checkpoint(base / f"best_{model}.pt")["steps"][model] == best == summary(base)[f"best_step_{model}"]


def test_runs_of_tests_are_found_by_their_tag(forks, base, copy, tmp_path):
    """Each run here has the tag `test`; the command removes it, and nothing else."""
    other = train(tmp_path / "runs", run_name="mine", tag="none", max_steps=1)
    assert_done(forks.run(other, tmp_path))
    command = ["nanolab/runs.py", "clean", "--tag", "test", "--out_dir", tmp_path / "runs"]
    child = forks.run(command, tmp_path)
    assert_done(child)
    assert str(copy) in child.out and "mine" not in child.out and copy.exists()
    assert_done(forks.run([*command, "--yes"], tmp_path))
    assert not copy.exists() and (tmp_path / "runs" / "train_mult" / "mine" / "last.pt").exists()
