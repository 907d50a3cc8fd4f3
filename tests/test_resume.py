"""Exact resume: a run that is killed, stopped, refused or out of space goes on to the bits of one that never stopped.

Every run here is a fork (forks.py)
with one thread, on a text of 4,000 bytes. test_scripts.py starts the same script the slow way.
"""
import json
import math
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from forks import (assert_done, assert_equal, assert_error, records, snapshot,
                   summary, wait_for)
from nanolab.run import load_checkpoint
from scripts import assert_same_end, of

typed, at = of("train_enwik8")


def train(text, out_dir, *more, **settings):
    return typed(out_dir, *more, dataset=text, **settings)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes(words(1))
    return path


def words(seed):
    known = ["the", "model", "reads", "bytes", "and", "learns\n", "x = 1", "def f():"]
    return " ".join(random.Random(seed).choices(known, k=1000)).encode()[:4000]


def steps_of(run, split="train"):
    return [entry["step"] for entry in records(run) if entry["split"] == split and "final" not in entry]


# ----------------------------------------------------------------------------------------------------------- kill -9

def test_killed_inside_a_save(forks, text, tmp_path):
    settings = dict(max_steps=16, eval_interval=2, n_embd=64)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run, command, caught = at(killed), train(text, killed, **settings), 0
    for _ in range(20):
        child = forks.start(command, tmp_path)
        wait_for(lambda: child.over() or list(run.glob(f".last.pt.tmp-{child.pid}")), every=0.0002)
        child.kill()
        assert child.wait().code == -signal.SIGKILL, "the run reached its end before a kill fell into a save"
        caught += bool(list(run.glob(f".last.pt.tmp-{child.pid}")))          # never renamed: it died in the middle
        if (run / "last.pt").exists():
            load_checkpoint(run / "last.pt")
        command = train(text, killed, "--resume", **settings)
        if caught == 2:
            break
    assert caught == 2
    assert_done(forks.run(command, tmp_path))
    assert_done(forks.run(train(text, whole, **settings), tmp_path))
    assert_same_end(run, at(whole))


# ------------------------------------------------------------------------------------------------- a run that was done

@pytest.fixture(scope="module")
def base(forks, text, tmp_path_factory):
    """A whole run of 12 steps with every numbered checkpoint and TensorBoard; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("base")
    assert_done(forks.run(train(text, folder, **KEEP), folder))
    return at(folder)


KEEP = dict(keep_last=12, tensorboard=True)


@pytest.fixture
def copy(base, tmp_path):
    """The base run in tmp_path/runs."""
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


def test_exactly_max_steps(forks, base, copy, text, tmp_path):
    """At the end a resume does nothing, one step before it one step, and a larger max_steps goes on."""
    adam_steps = {state["step"] for state in load_checkpoint(base / "last.pt")["optimizer"]["state"].values()}
    assert adam_steps == {12} and steps_of(base) == list(range(1, 13))
    assert steps_of(base, "val") == [5, 5, 10, 10, 10, 10, 12, 12]  # raw and averaged; at 10 also of the whole split
    same = train(text, tmp_path / "runs", **KEEP)
    (copy / "step_00000012.pt").unlink()                     # stopped or killed at this step, before it was written
    again = forks.run(same + ["--resume"], tmp_path)
    assert_done(again)
    assert_same_end(copy, base)
    assert (copy / "step_00000012.pt").exists()
    one = forks.run(same + ["--resume", copy / "step_00000011.pt"], tmp_path)
    assert_done(one)
    assert_same_end(copy, base)
    with ThreadPoolExecutor(2) as pool:
        more, whole = (pool.submit(forks.run, words, tmp_path) for words in (
            train(text, tmp_path / "runs", "--resume", **KEEP | dict(max_steps=15)),
            train(text, tmp_path / "whole", **KEEP | dict(max_steps=15))))
    assert_done(more.result())
    assert_done(whole.result())
    assert_same_end(copy, at(tmp_path / "whole"))
    assert steps_of(copy)[-1] == 15 == summary(copy)["step"]
    assert [entry["step"] for entry in json.loads((copy / "params.json").read_text())["history"]] == [0, 12, 11, 12]


def test_no_steps_at_all(forks, text, tmp_path):
    assert_done(forks.run(train(text, tmp_path, max_steps=0), tmp_path))
    assert load_checkpoint(at(tmp_path) / "last.pt")["step"] == 0 == summary(at(tmp_path))["step"]
    assert steps_of(at(tmp_path)) == []
    (at(tmp_path) / "samples").write_text("mine")            # a sample that cannot be written costs a line
    child = forks.run(train(text, tmp_path, "--resume", max_steps=0, sample_length=9), tmp_path)
    assert_done(child)
    assert "the sample's file is left out: FileExistsError" in child.out


def test_stop_by_signal(forks, text, tmp_path):
    """Without an end, stopped by SIGINT where an evaluation is due, then by SIGTERM where one of everything is, then
    given an end: what best.pt holds is what it holds where nobody stopped, the rate of the last step too."""
    run, settings, more = at(tmp_path / "stopped"), dict(max_steps="none", save_interval=100), []
    for number, code, reached in ((signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 10)):
        child = forks.start(train(text, tmp_path / "stopped", *more, **settings), tmp_path, stop_at=(number, 5)).wait()
        assert child.code == code and "Traceback" not in child.err and number.name in child.err
        last, end = load_checkpoint(run / "last.pt"), summary(run)
        assert end["status"] == "interrupted" and end["step"] == last["step"] == reached
        assert steps_of(run) == list(range(1, reached + 1)) and steps_of(run, "val") == [5] * (reached // 10 * 2)
        assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
        more = ["--resume"]
    settings["max_steps"] = 12
    with ThreadPoolExecutor(2) as pool:
        stopped, whole = (pool.submit(forks.run, words, tmp_path) for words in (
            train(text, tmp_path / "stopped", "--resume", **settings), train(text, tmp_path / "whole", **settings)))
    assert_done(stopped.result())
    assert_done(whole.result())
    assert_same_end(run, at(tmp_path / "whole"))
    assert load_checkpoint(run / "last.pt")["step"] == 12


def steps_of_unfinished(run):
    """The last step of a metrics.jsonl that is being written."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def test_intervals_change_nothing(forks, base, text, tmp_path):
    """Validation, logging, saving and sampling leave batches, losses and weights as they are."""
    other = dict(eval_interval=3, eval_windows=1, eval_batch_size=1, full_eval_interval="none", save_interval=7,
                 log_interval=4, sample_length=30, keep_last=0)
    assert_done(forks.run(train(text, tmp_path, **other), tmp_path))
    one, two = load_checkpoint(base / "last.pt"), load_checkpoint(at(tmp_path) / "last.pt")
    for key in ("step", "model", "ema", "optimizer", "generators", "data"):
        assert_equal(one[key], two[key], key)
    losses = [entry["loss"] for entry in records(base) if entry["split"] == "train"]
    means = {entry["step"]: entry["loss"] for entry in records(at(tmp_path)) if entry["split"] == "train"}
    assert means == {end: sum(losses[end - 4:end]) / 4 for end in (4, 8, 12)}
    steps = [entry["step"] for entry in records(at(tmp_path)) if entry["split"] == "val" and entry["weights"] == "ema"]
    assert steps == [3, 6, 9, 12, 12]


def board(run):
    """What TensorBoard shows of a run: sorted (key, step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return sorted((tag.rsplit("/", 1)[1], event.step, event.value) for tag in events.Tags()["scalars"]
                  for event in events.Scalars(tag))


def assert_board_is_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = sorted((key, line["step"], float(torch.tensor(value, dtype=torch.float32))) for line in lines
                    for key, value in line.items() if type(value) in (int, float) and key != "step")
    shown = board(run)
    assert [entry[:2] for entry in shown] == [entry[:2] for entry in wanted]
    assert [entry[2] for entry in shown] == pytest.approx([entry[2] for entry in wanted], rel=1e-6)


@pytest.mark.parametrize("name", ["step_00000004.pt", "best.pt"])
def test_older_checkpoint(forks, base, copy, text, tmp_path, name):
    step = load_checkpoint(copy / name)["step"]
    assert step == (12 if name == "best.pt" else 4)
    child = forks.run(train(text, tmp_path / "runs", "--resume", copy / name, **KEEP), tmp_path)
    assert_done(child)
    assert_same_end(copy, base)
    assert_board_is_metrics(base)
    assert_board_is_metrics(copy)
    params = json.loads((copy / "params.json").read_text())
    assert [entry["step"] for entry in params["history"]] == [0, step]


def test_older_checkpoint_killed_while_rewinding(forks, base, copy, text, tmp_path):
    """Kills between the old checkpoint's arrival as last.pt and the first step; then a bare --resume."""
    for die_at in (1, 2, 3, 4, 6, 8, 11):
        older = train(text, tmp_path / "runs", "--resume", copy / "step_00000009.pt", **KEEP)
        killed = forks.run(older, tmp_path, die_at=die_at)
        assert killed.code == -signal.SIGKILL
        load_checkpoint(copy / "last.pt")
    assert_done(forks.run(train(text, tmp_path / "runs", "--resume", **KEEP), tmp_path))
    assert_same_end(copy, base)


def test_older_checkpoint_under_another_name(forks, base, copy, text, tmp_path):
    """A new --run_name leaves the old run alone and ends with the same weights."""
    before, new = snapshot(copy), at(tmp_path / "runs", "branch")
    command = train(text, tmp_path / "runs", "--resume", copy / "step_00000006.pt", **KEEP | dict(run_name="branch"))
    assert_done(forks.run(command, tmp_path))
    assert snapshot(copy) == before
    assert steps_of(new) == list(range(7, 13))
    assert [entry for entry in records(base) if entry["step"] > 6] == records(new)
    one, two = load_checkpoint(base / "last.pt"), load_checkpoint(new / "last.pt")
    for key in ("step", "model", "ema", "optimizer", "generators", "data"):
        assert_equal(one[key], two[key], key)


# ------------------------------------------------------------------------------------------------ flags on a resume

def test_architecture_comes_from_the_checkpoint(forks, base, copy, text, tmp_path):
    other = KEEP | dict(n_layer=4, norm="rms")
    command = train(text, tmp_path / "runs", "--resume", copy / "step_00000008.pt", **other)
    child = forks.run(command, tmp_path)
    assert_done(child)
    said = [line for line in child.out.splitlines() if "overruled" in line]
    assert len(said) == 1 and said[0].count("comes from the checkpoint") == 2
    for phrase in ("n_layer 2", "--n_layer 4 is overruled", "--norm rms is overruled"):
        assert phrase in child.out
    assert_same_end(copy, base)
    assert json.loads((copy / "params.json").read_text())["settings"]["n_layer"] == 2


def test_context_grows_on_resume(forks, text, tmp_path):
    """--extend_block_size: longer windows from there on, rope stretched too; again is no change; less is refused."""
    ropes = dict(KEEP, positions="rope", rope_scaling="yarn", max_steps=4, save_interval=2)
    assert_done(forks.run(train(text, tmp_path / "runs", **ropes), tmp_path))
    run = at(tmp_path / "runs")
    for steps, more, wanted in ((6, 64, (64, 2.0)), (8, 64, (64, 2.0)), (10, 128, (128, 4.0))):
        more = ["--max_steps", steps, "--extend_block_size", more, "--resume"]
        assert_done(forks.run(["train_enwik8.py", "--out_dir", tmp_path / "runs", *more], tmp_path))
        saved = load_checkpoint(run / "last.pt")
        assert saved["step"] == steps
        assert (saved["settings"]["block_size"], saved["settings"]["rope_factor"]) == wanted
    before = snapshot(run)
    for size, said in ((100, "less than the model's block_size 128"), (0, "extend_block_size")):
        more = ["--out_dir", tmp_path / "runs", "--extend_block_size", size, "--resume", "--max_steps", 12]
        assert_error(forks.run(["train_enwik8.py", *more], tmp_path), said)
    assert snapshot(run) == before
    tables = train(text, tmp_path / "runs", **dict(KEEP, max_steps=2, run_name="tables"))
    assert_error(forks.run([*tables, "--extend_block_size", 64], tmp_path), "goes with --resume")
    assert_done(forks.run(tables, tmp_path))
    assert_error(forks.run([*tables, "--extend_block_size", 64, "--resume"], tmp_path), "learned_per_layer end at")


def test_unsaid_settings_come_from_the_checkpoint(forks, base, copy, tmp_path):
    """--resume with nothing else goes on as the run began; the script's defaults do not matter."""
    (copy / "last.pt").write_bytes((copy / "step_00000010.pt").read_bytes())
    child = forks.run(["train_enwik8.py", "--out_dir", tmp_path / "runs", "--resume"], tmp_path)
    assert_done(child)
    assert_same_end(copy, base)


def test_explicit_rate_takes_effect(forks, base, copy, text, tmp_path):
    """So small a rate moves no float32 weight: those of the checkpoint stay, while the steps are done."""
    old = load_checkpoint(copy / "step_00000006.pt")
    other = KEEP | dict(lr=1e-30, weight_decay=0.5)
    command = train(text, tmp_path / "runs", "--resume", copy / "step_00000006.pt", **other)
    assert_done(forks.run(command, tmp_path))
    new, lines = load_checkpoint(copy / "last.pt"), [entry for entry in records(copy) if entry["split"] == "train"]
    assert_equal(old["model"], new["model"])
    assert new["step"] == 12 and {group["base_lr"] for group in new["optimizer"]["param_groups"]} == {1e-30}
    assert {group["weight_decay"] for group in new["optimizer"]["param_groups"]} >= {0.5}
    assert lines[5]["lr"] > 1e-4 and all(entry["lr"] <= 1e-30 for entry in lines[6:]) and len(lines) == 12
    params = json.loads((copy / "params.json").read_text())
    assert params["settings"]["lr"] == 1e-30 and params["history"][-1]["changed"]["lr"] == [3e-3, 1e-30]


# ---------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("size", [4000, 3000])
def test_wrong_data(forks, copy, tmp_path, size):
    """Another text than the one it was trained on: also one of the same length."""
    other, before = tmp_path / "other.txt", snapshot(copy)
    other.write_bytes(words(2)[:size])
    child = forks.run(train(other, tmp_path / "runs", "--resume", **KEEP | dict(max_steps=14)), tmp_path)
    assert_error(child, "data")
    assert snapshot(copy) == before


def test_broken_last(forks, base, copy, text, tmp_path):
    """Truncated, empty, foreign or lost: one line that names the file, which stays as it is; an older one goes on."""
    whole = (copy / "last.pt").read_bytes()
    resume = train(text, tmp_path / "runs", "--resume", **KEEP)
    for content in (whole[:len(whole) // 2], whole[:-10], b"", b"not a checkpoint at all"):
        (copy / "last.pt").write_bytes(content)
        before = snapshot(copy)
        assert_error(forks.run(resume, tmp_path), copy / "last.pt")
        assert snapshot(copy) == before
    (copy / "last.pt").unlink()
    before = snapshot(copy)
    assert_error(forks.run(resume, tmp_path), "last.pt", "best.pt", copy)
    assert snapshot(copy) == before
    assert_done(forks.run(resume + [copy / "step_00000011.pt"], tmp_path))
    assert_same_end(copy, base)


def test_loss_is_not_finite(forks, text, tmp_path):
    boom = dict(optimizer="sgd", lr=1e30, grad_clip="none", momentum=0.9, schedule="constant", warmup_steps=0)
    child = forks.run(train(text, tmp_path / "saved", **boom), tmp_path)
    last, lines = load_checkpoint(at(tmp_path / "saved") / "last.pt"), records(at(tmp_path / "saved"))
    step = last["step"] + 1                                  # saved after every step, so the next one was the bad one
    assert_error(child, f"step {step}", at(tmp_path / "saved") / "last.pt", code=3)
    assert 1 < step < 12 and all(tensor.isfinite().all() for tensor in last["model"].values())
    assert summary(at(tmp_path / "saved"))["status"] == "failed"
    assert all(math.isfinite(entry["loss"]) for entry in lines) and lines[-1]["step"] == last["step"]
    # Seen only later, the step is still the right one, and nothing bad is saved.
    boom |= dict(log_interval=8, save_interval=9, eval_interval=10)
    late = forks.run(train(text, tmp_path / "late", **boom), tmp_path)
    assert_error(late, f"step {step}", code=3)
    first, = at(tmp_path / "late").glob("*.pt")              # what every new run saves before its first step
    first = load_checkpoint(first)
    assert first["step"] == 0 and all(tensor.isfinite().all() for tensor in first["model"].values())
    assert records(at(tmp_path / "late")) == []


def test_two_runs_in_one_directory(forks, text, tmp_path):
    endless = dict(max_steps="none")
    first = forks.start(train(text, tmp_path, **endless), tmp_path)
    run = at(tmp_path)
    wait_for(lambda: first.over() or (run / "last.pt").exists())
    kept = [(run / name).read_bytes() for name in ("params.json", "lock", "summary.json")]
    with ThreadPoolExecutor(2) as pool:
        second, third = pool.map(lambda words: forks.run(words, tmp_path), (
            train(text, tmp_path, "--resume", **endless), train(text, tmp_path, **endless)))
    assert_error(second, "another process", run)
    assert_error(third, run, "--resume")
    assert [(run / name).read_bytes() for name in ("params.json", "lock", "summary.json")] == kept
    before = steps_of_unfinished(run)
    wait_for(lambda: first.over() or steps_of_unfinished(run) > before + 1)
    first.kill(signal.SIGINT)
    assert first.wait().code == 130
    end = load_checkpoint(run / "last.pt")["step"]
    assert steps_of(run) == list(range(1, end + 1)) and end > before


def test_full_disk(forks, base, text, tmp_path):
    """No file may grow past a quarter of a checkpoint: the earlier one stays, and goes on where there is space."""
    limit, run = (base / "last.pt").stat().st_size // 4, at(tmp_path / "runs")
    new = forks.run(train(text, tmp_path / "new"), tmp_path, limit=limit)
    assert_error(new, at(tmp_path / "new") / "last.pt")
    assert not list(at(tmp_path / "new").rglob("*.pt")) and not list(at(tmp_path / "new").glob(".*tmp*"))
    assert_done(forks.run(train(text, tmp_path / "runs", max_steps=6), tmp_path))
    before = (run / "last.pt").read_bytes()
    full = forks.run(train(text, tmp_path / "runs", "--resume"), tmp_path, limit=limit)
    assert_error(full, run / "last.pt")
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*tmp*"))
    assert load_checkpoint(run / "last.pt")["step"] == 6 and summary(run)["status"] == "failed"
    assert_done(forks.run(train(text, tmp_path / "runs", "--resume"), tmp_path))
    assert_same_end(run, base)


def test_unwritable_out_dir(forks, text, tmp_path):
    (tmp_path / "file").write_text("mine")
    child = forks.run(train(text, tmp_path / "file" / "runs"), tmp_path)
    assert_error(child, tmp_path / "file")
    assert snapshot(tmp_path) == {Path("file"): b"mine"}


def test_killed_before_the_first_save(forks, text, tmp_path):
    """The same command plus --resume starts it again, from nothing, in the same directory."""
    whole = at(tmp_path / "whole")
    assert_done(forks.run(train(text, tmp_path / "whole"), tmp_path))
    unsaved = 0
    for die_at in (1, 2, 4, 5, 6):
        run = at(tmp_path / f"killed{die_at}")
        child = forks.run(train(text, tmp_path / f"killed{die_at}"), tmp_path, die_at=die_at)
        assert child.code == -signal.SIGKILL
        unsaved += run.exists() and not (run / "last.pt").exists()
        assert_done(forks.run(train(text, tmp_path / f"killed{die_at}", "--resume"), tmp_path))
        assert_same_end(run, whole)
        assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert unsaved >= 3
