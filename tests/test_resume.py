"""SCRIPTS x promises: stopped, extended, rewound, resumed with other flags or after a kill before anything was saved, a
run goes on to the bits of one that never stopped; what cannot go on says so in one line, and changes nothing.

Every run is a fork (forks.py); tests work on copies of one finished run of each script. What holds of any run, whatever
its script, is in test_experiment.py; kills at random moments in test_killed.py.
"""
import functools
import json
import math
import random
import re
import shlex
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch

from forks import assert_done, assert_equal, assert_error, records, snapshot, summary
from nanolab.run import load_checkpoint
from nanolab.settings import as_typed
from scripts import KEEP, TINY, assert_same_end, curve, done, folder, typed
from test_scripts import fresh


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """4,000 bytes of text, which a tiny run of train_enwik8.py reads here."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    known = "the model reads bytes and learns x = 1 def f():".split()
    path.write_bytes(" ".join(random.Random(1).choices(known, k=1000)).encode()[:4000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY["train_enwik8"], "dataset", path)
        yield


@pytest.fixture
def script():
    """Of a test that is not of all: the one to read first."""
    return "train_enwik8"


@pytest.fixture
def go(script, forks):
    """go(out_dir, more words, settings): a Child that came to a good end."""
    return functools.partial(done, script, forks)


@pytest.fixture(scope="module")
def bases(forks, tmp_path_factory):
    """bases(script): a finished run of 12 steps with every numbered checkpoint."""
    @functools.cache
    def base(script):
        place = tmp_path_factory.mktemp("base")
        done(script, forks, place, **KEEP[script])
        return folder(script, place)
    return base


@pytest.fixture
def base(script, bases):
    return bases(script)


@pytest.fixture
def copy(script, base, tmp_path):
    """The base run in tmp_path/runs."""
    return Path(shutil.copytree(base, folder(script, tmp_path / "runs")))


@pytest.fixture
def resume(script, forks, tmp_path):
    """resume(more words, settings): a Child that went on with the copy, however it ended."""
    def resume(*more, **settings):
        return forks.run(typed(script, tmp_path / "runs", "--resume", *more, **KEEP[script] | settings), tmp_path)
    return resume


def params(run):
    return json.loads((run / "params.json").read_text())


# ---------------------------------------------------------------------------------------- from a run that has an end

OVERRULED = {  # what makes the weights, and what is learned
    "train_enwik8": dict(n_layer=4, norm="rms"),
    "train_dvae": dict(n_embd=64, codebook_size=8, n_codes=9, max_side=7, layout="canvas", n_val=9),
    "train_mult": dict(n_layer=3, n_embd=64, n_latent=2, split_seed=9, max_digits=3, sum_head="value"),
    "train_facts": dict(n_people=7, task="in_weight", loss_on="all", n_embd=32, data_seed=3, tokenizer="bytes"),
    "train_worldmodel": dict(dynamics_embd=16, text_embd=16, frame_layers=2)}


@pytest.mark.parametrize("script", TINY)
def test_any_checkpoint(script, forks, base, copy, resume, tmp_path):
    """At the end a resume does nothing but save what was left, from an older checkpoint it does the steps that are
    left; one line says which flags the checkpoint overrules. A bare --resume goes on as the run began, and the script's
    defaults do not matter."""
    older = {"train_worldmodel": [], "train_mult": ["step_00000011.pt"]}     # their best.pt are of a stage, or model
    sources = ["last.pt", *older.get(script, ["best.pt"])]
    steps = [load_checkpoint(base / name)["step"] for name in sources]
    for source in sources:
        (copy / "step_00000012.pt").unlink(missing_ok=True)  # stopped or killed at this step, before it was written
        child = resume(copy / source, **OVERRULED[script] if source == sources[-1] else {})
        assert_done(child)
        assert_same_end(copy, base)
        assert sorted(copy.glob("step_*")) == [copy / path.name for path in sorted(base.glob("step_*"))]
    said, = [line for line in child.out.splitlines() if "overruled" in line]
    before, after = params(base)["settings"], params(copy)["settings"]
    assert said.count("overruled") == len(OVERRULED[script])
    for name, value in OVERRULED[script].items():
        assert f"{name} {as_typed(before[name])} comes from the checkpoint: --{name} {value} is overruled" in said
        assert before[name] == after[name]
    if script != "train_worldmodel":
        shutil.copy(copy / "step_00000004.pt", copy / "last.pt")
        steps.append(4)
        assert_done(forks.run([f"{script}.py", "--out_dir", tmp_path / "runs", "--resume"], tmp_path))
        assert_same_end(copy, base)
    assert [entry["step"] for entry in params(copy)["history"]] == [0, *steps]


@pytest.mark.parametrize("script, interval, patience", [
    ("train_enwik8", 3, 2), ("train_dvae", 9, 1), ("train_facts", 5, 1)])
def test_early_stopped(script, interval, patience, go, tmp_path):
    """What gets no better ends after `patience` validations more, and says so; with more patience it goes on as one
    that had it from the beginning."""
    how = dict(lr=1e-12, muon_lr=1e-12, weight_decay=0.0, eval_interval=interval)
    first, run = go(tmp_path / "parts", **how, patience=patience), folder(script, tmp_path / "parts")
    end, steps = summary(run), curve(run, split="val")
    assert end["ended_early"] == end["step"] == steps[-1] < 12 and end["status"] == "done"
    assert steps[-1] == load_checkpoint(run / "last.pt")["loop"]["best_step"] + patience * interval
    assert re.search(rf"ended early at step {steps[-1]}\b.*: {run}$", first.out.strip())
    if script == "train_enwik8":
        more = go(tmp_path / "parts", "--resume", **how, patience=9)
        go(tmp_path / "whole", **how, patience=9)
        assert_same_end(run, folder(script, tmp_path / "whole"))
        assert "done at step 12" in more.out and "ended_early" not in summary(run)


@pytest.mark.parametrize("script", TINY)
def test_no_steps_at_all(script, go, tmp_path):
    """What is saved then are the first weights, k-means codes too; the average begins with them."""
    go(tmp_path, max_steps=0, **dict(codebook_init="kmeans") if script == "train_dvae" else {})
    run = folder(script, tmp_path)
    last = load_checkpoint(run / "last.pt")
    assert last["step"] == 0 == summary(run)["step"] and curve(run) == []
    assert last.get("steps", {}) == (dict(simple=0, latent=0) if script == "train_mult" else {})
    if script == "train_dvae":
        assert_equal(dict(last["ema"]["weights"]), {name: last["model"][name] for name in last["ema"]["weights"]})


@pytest.mark.parametrize("script, said, at_the_end, more", [
    ("train_enwik8", "the sample's file is left out: FileExistsError", True, dict(sample_length=9)),
    ("train_dvae", "pictures are left out: FileExistsError", False, {})], ids=["train_enwik8", "train_dvae"])
def test_what_cannot_be_drawn_costs_a_line(script, base, copy, resume, said, at_the_end, more):
    shutil.rmtree(copy / "samples", ignore_errors=True)
    (copy / "samples").write_text("mine")
    for source in ("last.pt", "step_00000010.pt"):
        child = resume(copy / source, **more)
        assert_done(child)
        assert (said in child.out) == (at_the_end or source != "last.pt")
        assert_same_end(copy, base)


OTHER = {  # settings that watch a run; (a key of its validations, which of them, the values)
    "train_enwik8": [(dict(eval_interval=3, eval_windows=1, eval_batch_size=1, full_eval_interval="none",
                           save_interval=7, log_interval=4, sample_length=30, keep_last=0),
                      ("step", dict(weights="ema"), [3, 6, 9, 12, 12]))],
    "train_dvae": [(dict(eval_interval=5, save_interval=7, log_interval=3, eval_grids=3, eval_batch_size=2),
                    ("grids", {}, [3, 3, 3, 3, 5]))],
    "train_facts": [(dict(eval_interval=1, eval_prompts=3, log_interval=4),
                     ("step", dict(people="unseen", protocol="no_tool", weights="ema"), [*range(13)])),
                    (dict(eval_interval="none", save_interval=7), ("step", {}, []))],
}


@pytest.mark.parametrize("script", OTHER)
def test_intervals_change_nothing(script, base, go, tmp_path):
    """Validating, logging, saving and sampling leave batches, losses and weights as they are."""
    losses, run = curve(base, "loss"), folder(script, tmp_path)
    for other, (key, which, values) in OTHER[script]:
        shutil.rmtree(run, ignore_errors=True)
        go(tmp_path, **KEEP[script] | other)
        one, two = ({name: value for name, value in load_checkpoint(place / "last.pt").items() if name in (
            "step", "model", "ema", "optimizer", "generators", "data")} for place in (base, run))
        assert one.keys() >= {"step", "model", "ema", "optimizer", "generators"}
        assert_equal(one, two)
        n = other.get("log_interval", 1)
        assert curve(run, "loss") == [sum(losses[end - n:end]) / n for end in range(n, 13, n)]
        assert [line[key] for line in records(run) if line["split"] == "val"
                and all(line[name] == value for name, value in which.items())] == values


# ------------------------------------------------------------------------------------- stopped, killed, out of numbers

ENDLESS = {"train_enwik8": {}, "train_mult": dict(schedule="constant"),
           "train_dvae": dict(schedule="constant", schedule_steps=30, mask_rate="0,0.5"),
           "train_facts": dict(schedule="noam", ema_decay=0.9),
           "train_worldmodel": dict(tokens="cells", action_steps=8, dynamics_steps=4, text_steps=2, frame_steps=2)}


@pytest.mark.parametrize("script", ENDLESS)
def test_stopped_without_an_end(script, forks, go, tmp_path):
    """By SIGINT where an evaluation is due, then by SIGTERM (train_worldmodel: in the next stage), then given an end,
    and then more steps: what every file holds is what it holds where nobody stopped, the rate of the last step too."""
    how, more = dict(max_steps="none", save_interval=100, eval_interval=5) | ENDLESS[script], []
    run, models = folder(script, tmp_path / "stopped"), 2 if script == "train_mult" else 1
    for number, code, reached in ((signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 10)):
        child = forks.start(typed(script, tmp_path / "stopped", *more, **how), tmp_path,
                            stop_at=(number, 5 * models)).wait()
        assert child.code == code and "Traceback" not in child.err and number.name in child.err
        last, end = load_checkpoint(run / "last.pt"), summary(run)
        assert end["status"] == "interrupted" and last["step"] == reached
        assert end["step"] == reached or script == "train_worldmodel"        # whose summary counts whole stages
        assert set(last.get("steps", {}).values()) <= {reached}
        assert sorted(curve(run)) == sorted([*range(1, reached + 1)] * models)
        assert {5: reached > 5, reached: False} == {step: step in curve(run, split="val") for step in {5, reached}}
        assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
        more = ["--resume"]
    ends = {"train_worldmodel": (16,), "train_enwik8": (11, 13), "train_facts": (11, 13)}    # stages have their steps
    for end in ends.get(script, (10, 13)):                   # where one is validated in between, a line of it stays
        how |= {} if script == "train_worldmodel" else dict(max_steps=end)
        go(tmp_path / "stopped", "--resume", **how)
        assert load_checkpoint(run / "last.pt")["step"] == summary(run)["step"] == end
    go(tmp_path / "whole", **how)
    assert_same_end(run, folder(script, tmp_path / "whole"))


FIRST = {  # calls of the file system before which a run is killed, and its settings
    "train_enwik8": ((1, 6, 18), {}),
    "train_dvae": ((6, 18), dict(save_interval=5, codebook_init="kmeans")),
    "train_mult": ((5, 14, 17, 20), dict(save_interval=5, val_examples=20, eval_examples=8)),
    "train_facts": ((5, 18), dict(save_interval=5, ema_decay=0.9)),
    "train_worldmodel": ((6, 18), dict(stage="dynamics", tokens="cells", action_source="true", rollout_clips=2))}


@pytest.mark.parametrize("script", FIRST)
def test_killed_around_the_first_saves(script, forks, go, tmp_path):
    """The same command plus --resume starts it again in the same directory; also between the first last.pt, which is
    there before any step, and the first best.pt, or that of one model and that of the other."""
    calls, how = FIRST[script]
    how, whole, unsaved = how | dict(max_steps=2), folder(script, tmp_path / "whole"), 0
    go(tmp_path / "whole", **how)
    for die_at in calls:
        place = tmp_path / f"killed{die_at}"
        run = folder(script, place)
        assert forks.run(typed(script, place, **how), tmp_path, die_at=die_at).code == -signal.SIGKILL
        unsaved += not (run / "last.pt").exists()
        go(place, "--resume", **how)
        assert_same_end(run, whole)
        assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert 1 <= unsaved < len(calls)


def test_killed_while_rewinding(base, copy, forks, resume, tmp_path):
    """Between the old checkpoint's arrival as last.pt and the first step; then a bare --resume."""
    older = typed("train_enwik8", tmp_path / "runs", "--resume", copy / "step_00000009.pt", **KEEP["train_enwik8"])
    for die_at in (2, 3, 14, 15):                            # about the new last.pt, and about the metrics
        assert forks.run(older, tmp_path, die_at=die_at).code == -signal.SIGKILL
        load_checkpoint(copy / "last.pt")
    assert_done(resume())
    assert_same_end(copy, base)


BOOM = {"train_enwik8": dict(optimizer="sgd", grad_clip="none", momentum=0.9, schedule="constant", warmup_steps=0),
        "train_dvae": dict(muon_lr=1e30, grad_clip="none", max_steps=50),
        "train_mult": dict(muon_lr=1e30, grad_clip="none", max_steps=50),
        "train_facts": dict(optimizer="sgd", schedule="constant", warmup_steps=0, max_steps=50)}


@pytest.mark.parametrize("script", BOOM)
def test_loss_is_not_finite(script, forks, tmp_path):
    """Status 3 with the step, and a checkpoint without a bad number."""
    boom = BOOM[script] | dict(lr=1e30)
    run, late = (folder(script, tmp_path / name) for name in ("saved", "late"))
    child = forks.run(typed(script, tmp_path / "saved", **boom), tmp_path)
    said = re.fullmatch(rf"error: loss is not finite at (step \d+)(?: of (?:simple|latent))?; the last good checkpoint "
                        rf"is {re.escape(str(run / 'last.pt'))}\n", child.err)
    assert child.code == 3 and said, child.err
    last, lines = load_checkpoint(run / "last.pt"), [line for line in records(run) if line["split"] == "train"]
    assert said[1] == f"step {last['step'] + 1}"             # saved after every step, so the next one was the bad one
    assert 1 <= last["step"] < 50 and summary(run)["status"] == "failed"
    for state in last["models"].values() if script == "train_mult" else [last]:
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[-1]["step"] == last["step"]
    if script == "train_enwik8":                             # seen only later, the step is still the right one, and
        boom |= dict(log_interval=8, save_interval=9, eval_interval=10)      # nothing bad is saved
        assert_error(forks.run(typed(script, tmp_path / "late", **boom), tmp_path), said[1], code=3)
        first, = map(load_checkpoint, late.glob("*.pt"))     # what every new run saves before its first step
        assert first["step"] == 0 and all(tensor.isfinite().all() for tensor in first["model"].values())
        assert records(late) == []


# ------------------------------------------------------------------------------------------------ flags on a resume

def test_context_grows_on_resume(forks, go, tmp_path):
    """--extend_block_size: longer windows from there on, rope stretched too; again is no change; less is refused."""
    ropes = dict(positions="rope", rope_scaling="yarn", max_steps=4, save_interval=2)
    go(tmp_path, **ropes)
    run, bare = folder("train_enwik8", tmp_path), ["train_enwik8.py", "--out_dir", tmp_path, "--resume"]
    for steps, more, wanted in ((6, 64, (64, 2.0)), (8, 64, (64, 2.0)), (10, 128, (128, 4.0))):
        assert_done(forks.run([*bare, "--max_steps", steps, "--extend_block_size", more], tmp_path))
        saved = load_checkpoint(run / "last.pt")
        assert saved["step"] == steps
        assert (saved["settings"]["block_size"], saved["settings"]["rope_factor"]) == wanted
    before = snapshot(run)
    for size, said in ((100, "less than the model's block_size 128"), (0, "extend_block_size")):
        assert_error(forks.run([*bare, "--extend_block_size", size, "--max_steps", 12], tmp_path), said)
    assert snapshot(run) == before
    tables = typed("train_enwik8", tmp_path, "--extend_block_size", 64, max_steps=2, run_name="tables")
    assert_error(forks.run(tables, tmp_path), "goes with --resume")
    go(tmp_path, max_steps=2, run_name="tables")
    assert_error(forks.run([*tables, "--resume"], tmp_path), "learned_per_layer end at")


def test_explicit_rate_takes_effect(copy, resume):
    """So small a rate moves no float32 weight: those of the checkpoint stay, while the steps are done."""
    old = load_checkpoint(copy / "step_00000006.pt")
    assert_done(resume(copy / "step_00000006.pt", lr=1e-30, weight_decay=0.5))
    new, rates = load_checkpoint(copy / "last.pt"), curve(copy, "lr")
    assert_equal(old["model"], new["model"])
    assert new["step"] == 12 and {group["base_lr"] for group in new["optimizer"]["param_groups"]} == {1e-30}
    assert {group["weight_decay"] for group in new["optimizer"]["param_groups"]} >= {0.5}
    assert rates[5] > 1e-4 and all(rate <= 1e-30 for rate in rates[6:]) and len(rates) == 12
    assert params(copy)["settings"]["lr"] == 1e-30 and params(copy)["history"][-1]["changed"]["lr"] == [3e-3, 1e-30]


# ---------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("script", TINY)
def test_foreign_broken_and_lost_checkpoints(script, base, copy, resume, tmp_path):
    """Each is one line that names the file, which stays as it is; where there is an older one, that goes on."""
    last, whole = copy / "last.pt", (copy / "last.pt").read_bytes()
    for content in (whole[:-10], None)[:2 if script == "train_enwik8" else 1]:
        last.unlink() if content is None else last.write_bytes(content)
        before = snapshot(copy)
        assert_error(resume(), last if content is not None else copy, "last.pt", "best" if content is None else "")
        assert snapshot(copy) == before
    if script == "train_enwik8":
        torch.save({**load_checkpoint(base / "last.pt"), "script": "train_other"}, tmp_path / "foreign.pt")
        assert_error(resume(tmp_path / "foreign.pt"), f"a checkpoint of train_other, not of {script}")
        assert_done(resume(copy / "step_00000011.pt"))
        assert_same_end(copy, base)


MISTAKES = {  # RUN: a finished one of the script
    "train_enwik8": {"--out_dir FILE": "FILE", "--keep_every 3 --save_interval 2": "no multiple of save_interval 2"},
    "train_dvae": {
        "--encode task.json": "goes with --resume", "--decode 1,2": "goes with --resume",
        "--eval_only": "goes with --resume",
        "--resume --encode task.json": "no checkpoint yet", "--n_head 3": "does not divide",
        "--max_steps none": "max_steps", "--n_codes 1": "none is left", "--max_side 2 --n_train 20000": "hardly more",
        "--dataset arc3": "did you mean", "--resume elsewhere": "no such file"},
    "train_mult": {
        "--models simple,deep": "must be of simple, latent, prefix", "--models latent,latent": "each once",
        "--min_digits 3": "more than max_digits", "--ask 12*34": "goes with --resume",
        "--resume RUN --ask twelve": "as 12*34", "--resume RUN --ask 1234*5": "at most 2 digits",
        "--eval_only": "goes with --resume", "--forcing exponential --forcing_k 1.5": "below 1",
        "--max_steps none": "max_steps", "--resume --eval_only": "no checkpoint yet", "--resume --ask 12*34": "train"},
    "train_worldmodel": {
        "--n_codes=6": "power of two", "--tokenizer_embd=12": "multiple of 8", "--text_embd=6": "multiple of 4",
        "--patch=5": "patch 5 does not divide", "--context=9": "do not fit", "--mask_rate=0.9,0.5": "begins above",
        "--dataset=gridwrld": "gridworld", "--tokens=cells --dataset=x.npz": "cells", "--eval_only": "--resume",
        "--play=a --rollout=b": "one of them", "--quantiser=fsq --codebook_size=11": "no product",
        "--action_model=transformer --no-difference": "transformer sees"},
}


@pytest.mark.parametrize("script", MISTAKES)
def test_mistakes(script, in_process, bases, tmp_path):
    """One line, status 2, nothing written."""
    (tmp_path / "FILE").write_text("mine")
    old = bases(script) if "RUN" in str(MISTAKES[script]) else tmp_path
    before, tool = snapshot(old), types.SimpleNamespace(**fresh(f"{script}.py"))
    for line, said in MISTAKES[script].items():
        words = [{"RUN": old / "last.pt", "FILE": tmp_path / "FILE" / "runs"}.get(word, word)
                 for word in shlex.split(line)]
        code, _, err = in_process(tool, *typed(script, tmp_path / "out", *words)[1:])
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err, (line, err)
    assert snapshot(tmp_path) == {Path("FILE"): b"mine"} and snapshot(old) == before
