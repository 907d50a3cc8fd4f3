"""What a run is: its directory, metrics, checkpoints, resume, signals, errors; also in processes that get killed."""
import contextlib
import errno
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from choices import refused
from forks import assert_equal, snapshot, summary, wait_for
from nanolab import curves, optim, parallel, run as experiment
from nanolab.run import (Generators, Loop, NonFinite, Run, Settings, UserError, command, find_checkpoint, find_resume,
                         load_checkpoint, put_back, restoring)


def settings_for(tmp_path, **more):
    settings = Settings({"out_dir": str(tmp_path / "runs"), "run_name": "a", "resume": False, **more})
    settings.script = tmp_path / "toy.py"
    return settings


def state(step=0, fill=0.0, **more):
    return {"step": step, "settings": {"betas": (0.9, 0.95), "lr": 0.1}, "model": {"w": torch.full((8,), fill)}, **more}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def script(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("print('toy')\n")
    return path


@pytest.fixture
def home(tmp_path):
    """The directory of the run "a"."""
    return tmp_path / "runs" / "toy" / "a"


@pytest.fixture
def begin(tmp_path):
    """begin(path, ...): a Run "a" of toy.py with these settings; it goes on from the checkpoint `path`."""
    def begin(path=None, things=(), **more):
        settings = settings_for(tmp_path, **{"resume": path is not None, **more})
        return Run(settings, path and load_checkpoint(path), **dict(things))
    return begin


@pytest.fixture(autouse=True)
def sometimes_drawn(request):
    """No curves but in a test that looks at them."""
    if request.function is not test_a_run_leaves_what_the_plan_says:
        request.getfixturevalue("undrawn")


@pytest.fixture
def ended(capsys):
    """ended(main): the exit status and the standard error of a command."""
    def ended(main):
        with pytest.raises(SystemExit) as caught:
            command(main)()
        return caught.value.code, capsys.readouterr().err
    return ended


def raising(error):
    def main():
        raise error
    return main


def fork(function, out=None):
    """Runs `function` in a forked process, its stdout and stderr in the files `out` and `out`.err; returns its pid.

    A fresh process would take seconds for its imports. Its exit status is that of a script.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        pid = os.fork()
    if pid:
        return pid
    try:
        for number, name in [(1, out), (2, f"{out}.err")] if out else []:
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function()
        sys.stdout.flush()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        status = 1
        os.write(2, repr(error).encode())
    os._exit(status)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- The directory ---

def test_a_run_leaves_what_the_plan_says(tmp_path, script, home):
    settings = settings_for(tmp_path, betas=(0.9, 0.95), lr=float("inf"), where=Path("x"))
    settings.command = ["--lr", "inf"]
    with Run(settings) as run:
        assert run.dir == home and summary(home)["status"] == "running"
        run.log(step=1, loss=2.5, lr=0.1)
        run.log(step=2, split="val", psnr=float("nan"), bpb=torch.tensor(3.5), accuracy=float("inf"), note=(1, 2))
        assert len(read_lines(home / "metrics.jsonl")) == 2, "lines are on the disk at once"
        run.save("last.pt", **state(2))
        run.summary(step=2, best_bpb=3.5, seconds=12.0)
    assert read_lines(home / "metrics.jsonl") == [
        {"step": 1, "split": "train", "loss": 2.5, "lr": 0.1},
        {"step": 2, "split": "val", "psnr": None, "bpb": 3.5, "accuracy": None, "note": [1, 2]}]
    params, end = (json.loads((home / name).read_text(), parse_constant=pytest.fail) for name in (
        "params.json", "summary.json"))
    assert params["settings"] == {"out_dir": str(tmp_path / "runs"), "run_name": "a", "resume": False,
                                  "betas": [0.9, 0.95], "lr": None, "where": "x"}
    assert params["command"] == ["toy.py", "--lr", "inf"] and params["versions"]["torch"] == torch.__version__
    (first,) = params["history"]
    assert first["step"] == 0 and first["changed"] == {}
    assert (end["status"], end["step"], end["best_bpb"], end["seconds"]) == ("done", 2, 3.5, 12.0)
    assert end["peak_memory"] > 1e7 and "error" not in end
    assert (home / "code" / "toy.py").read_text() == script.read_text()
    assert (home / "code" / "nanolab" / "run.py").read_bytes() == Path(experiment.__file__).read_bytes()
    assert not (home / "code" / "test_experiment.py").exists()
    assert (home / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in home.iterdir()} == set(
        "lock params.json code metrics.jsonl summary.json last.pt curves.png".split())


def test_the_code_of_the_rooms_is_kept(tmp_path, begin, monkeypatch):
    """Modules of the folders beside the scripts, and what they read there."""
    root = tmp_path / "house"
    for name in ("models/one.py", "models/one_words.txt", "models/other.txt", "elsewhere/two.py", "nanolab/run.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    monkeypatch.setattr(experiment, "__file__", str(root / "nanolab/run.py"))
    for name in ("models/one.py", "elsewhere/two.py"):
        monkeypatch.setitem(sys.modules, f"a_module_{name}", types.SimpleNamespace(__file__=str(root / name)))
    with begin() as run:
        copied = {str(path.relative_to(run.dir / "code")) for path in (run.dir / "code").rglob("*.*")}
    assert copied == {"toy.py", "nanolab/run.py", "models/one.py", "models/one_words.txt"}


def test_a_name_is_made_from_the_clock_and_unique(begin, monkeypatch):
    monkeypatch.setattr(experiment.time, "strftime", lambda form: "20261122-014312")
    names = []
    for _ in range(3):
        with begin(run_name=None) as run:
            names.append(run.dir.name)
    assert names == ["20261122-014312", "20261122-014312-2", "20261122-014312-3"]


def test_names_that_are_no_names(tmp_path, begin):
    for name in ("../x", "", ".hidden", "naïve", "a b", "-x", "a\n", "x" * 101):
        with pytest.raises(UserError, match="--run_name"):
            begin(run_name=name).__enter__()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("files, resume, said", [
    ({"lock": experiment.FORMAT, "metrics.jsonl": "{}\n"}, False, "is there already: --resume --run_name a goes on"),
    ({"thesis.txt": "mine"}, True, "is not the directory of a run"),
    (None, False, "cannot write to .*runs: Not a directory"),
    pytest.param({}, False, "cannot write to", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write"))])
def test_a_directory_that_is_refused_is_untouched(tmp_path, begin, home, files, resume, said):
    if files is None:
        (tmp_path / "runs").write_text("")
    elif not files:
        (tmp_path / "runs").mkdir(mode=0o500)
    for name, text in (files or {}).items():
        home.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    before = snapshot(tmp_path)
    refused(said, begin(resume=resume).__enter__)
    assert snapshot(tmp_path) == before


def test_two_processes_in_one_directory(tmp_path, begin, home):
    with begin() as run:
        run.save("last.pt", **state(1))
        run.log(step=2, loss=1.0)
        before = snapshot(home)
        second = fork(command(lambda: begin(home / "last.pt").__enter__()), tmp_path / "out")
        assert status_of(second) == 2 and snapshot(home) == before
        assert (tmp_path / "out.err").read_text() == f"error: another process is writing to {home}\n"


def test_a_file_system_without_locks_does_not_stop_the_run(begin, home, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(experiment.fcntl, "flock", flock)
    with begin() as run:
        run.save("last.pt", **state(1))
    assert load_checkpoint(home / "last.pt")["step"] == 1


def test_a_start_that_fails_leaves_no_directory(begin, home, monkeypatch):
    monkeypatch.setattr(curves, "Wandb", lambda *given: raising(UserError("no network"))())
    refused("no network", begin(wandb="online").__enter__)
    assert not home.exists()
    with begin(wandb="online", debug=True) as run:
        assert run.dir.exists(), "debug opens no wandb, and nobody holds the lock any more"


# --- Resume ---

@pytest.fixture
def train(tmp_path):
    """A loop like the scripts': validates and saves before the step; a kill is an exception that nothing catches."""
    def train(until, die_at=None, **more):
        settings = settings_for(tmp_path, **more)
        path = find_resume(settings)
        checkpoint = load_checkpoint(path) if path else None
        done = step = checkpoint["step"] if checkpoint else 0
        with Run(settings, checkpoint) as run:
            while True:
                if step % 4 == 0 and step > done:
                    run.log(step=step, split="val", loss=200.0 + step)
                    run.save("last.pt", keep=2, **state(step))
                if step == until:
                    break
                if step == die_at:
                    os.write(run._metrics.fileno(), b'{"step": 99, "lo')     # as a kill or a full disk may leave it
                    raise KeyboardInterrupt
                step += 1
                run.log(step=step, loss=100.0 + step)
            run.log(step=step, split="val", loss=1.0, final=True)
        return run.dir
    return train


def test_metrics_that_were_lost_are_told_in_one_line(begin, saved, capsys):
    metrics = saved.parent / "metrics.jsonl"
    whole = metrics.read_bytes()
    lines = whole.splitlines(keepends=True)
    for lost, content in [(0, whole), (0, whole + b'{"step": 9, "lo'), (8, None), (1, b"".join(lines[:7]) + bytes(40)),
                          (1, b"".join([*lines[:3], b"x" + lines[3], *lines[4:]])),
                          (2, b"".join([*lines[:3], b"\0" * 30, *lines[4:]])), (3, b"".join(lines[:5]))]:
        metrics.write_bytes(content) if content is not None else metrics.unlink()
        with begin(saved):
            pass
        said = [line for line in capsys.readouterr().out.splitlines() if "lost" in line]
        assert said == ([f"{metrics} has lost {lost} of the 8 lines that the checkpoint knows of: the curves have a "
                         "gap"] if lost else [])
        assert len(read_lines(metrics)) == 8 - lost
    older = load_checkpoint(saved)                           # one that counts no lines: those past its step go
    del older["metrics_lines"]
    metrics.write_bytes(whole + b'{"step": 9, "loss": 1}\n{"step": 8, "final": true}\n')
    with Run(begin(saved).settings, older):
        assert metrics.read_bytes() == whole


def test_tensorboard_after_a_kill_and_resume_is_one_curve(tmp_path, begin, home):
    def loop():
        checkpoint = home / "last.pt" if home.exists() else None
        with begin(checkpoint, tensorboard=True) as run:
            for step in range(run.step + 1, 31):
                run.log(step=step, loss=100.0 + step, model="toy")
                if step % 10 == 0:
                    run.log(step=step, split="val", loss=200.0 + step)
                    run.save("last.pt", **state(step))
                    run.log(step=step, split="val", loss=300.0 + step, protocol="block")
                if step == 17 and not checkpoint:
                    [mirror.flush() for mirror in run._mirrors]
                    os.kill(os.getpid(), signal.SIGKILL)

    assert [status_of(fork(loop, tmp_path / "out")) for _ in range(2)] == [-9, 0]
    assert (tmp_path / "out.err").read_text() == ""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = {}
    for folder in ("", "toy/"):
        events = EventAccumulator(str(home / "tensorboard" / folder)).Reload()
        found |= {folder + tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"toy/train/loss": [(i, 100.0 + i) for i in range(1, 31)],
                     "val/loss": [(i, 200.0 + i) for i in (10, 20, 30)],
                     "val/block/loss": [(i, 300.0 + i) for i in (20, 30)]}     # 10: came after the save
    lines = read_lines(home / "metrics.jsonl")
    assert sorted((e["step"], e["loss"]) for e in lines) == sorted(p for points in found.values() for p in points)


def test_wandb_goes_on_with_its_id_offline(begin, home, capfd):
    """Also after a kill that left its file and the id cut off: the lines are sent again."""
    with begin(wandb="offline") as run:
        run.log(step=1, loss=1.0)
        run.save("last.pt", **state(1))
    ident = (home / "wandb_id").read_text()
    wait_for(lambda: curves.wandb_lines(home) == {0, 1})     # its own process writes them
    for path in (home / "wandb").glob("*/*.wandb"):
        path.write_bytes(path.read_bytes()[:300])
    (home / "wandb_id").write_text("")
    assert curves.wandb_lines(home) <= {0}
    with begin(home / "last.pt", wandb="offline") as run:
        run.log(step=2, loss=5.0)
    wait_for(lambda: curves.wandb_lines(home) == {0, 1, 2})
    assert (home / "wandb_id").read_text() == ident, "the folders know it"
    assert all(ident in path.name for path in (home / "wandb").glob("offline-run-*"))    # in one second: wandb adds -1
    assert "wandb:" not in "".join(capfd.readouterr()), "no stray lines"


def test_history_of_resumes_and_changed_code(tmp_path, train, script, home, capsys):
    first = script.read_text()
    train(4)
    script.write_text("print('other')\n")
    capsys.readouterr()
    settings = settings_for(tmp_path, resume=True, lr=0.5)
    settings.command = ["--resume", "--lr", "0.5"]
    with Run(settings, load_checkpoint(find_resume(settings))):
        pass
    assert "the code has changed since this run began (toy.py)" in capsys.readouterr().out
    assert (home / "code" / "toy.py").read_text() == first
    assert [path.name for path in (home / "code" / "resumed_at_00000004").iterdir()] == ["toy.py"]
    script.write_text(first)
    train(4, resume=True)
    assert "the code" not in capsys.readouterr().out
    one, two, _ = json.loads((home / "params.json").read_text())["history"]
    assert (one["step"], two["step"]) == (0, 4) and two["command"] == ["toy.py", "--resume", "--lr", "0.5"]
    assert two["changed"] == {"resume": [False, True], "lr": [None, 0.5]}


def test_bare_resume_finds_the_run_that_started_last(tmp_path, train, home, capsys):
    train(4, run_name="z")
    train(4, run_name="a")
    (home.parent / "stray").mkdir()
    os.utime(home.parent / "z" / "lock", ns=(0, 0))
    capsys.readouterr()
    settings = settings_for(tmp_path, run_name=None, resume=True)
    path = find_resume(settings)
    assert path == home / "last.pt" and capsys.readouterr().out == f"resuming from {path}\n"
    with Run(settings, load_checkpoint(path)) as run:
        assert run.dir == home


@pytest.mark.parametrize("name", [None, "a"])
def test_nothing_to_resume_starts_at_step_0(tmp_path, train, home, capsys, name):
    assert find_resume(settings_for(tmp_path, run_name=name, resume=True)) is None
    assert capsys.readouterr().out.endswith(": starting at step 0\n")
    assert find_resume(settings_for(tmp_path)) is None and capsys.readouterr().out == ""
    assert not (tmp_path / "runs").exists(), "it only reads"
    with pytest.raises(KeyboardInterrupt):                   # killed before the first save, then the same command
        train(8, die_at=3, resume=True)
    (home / "summary.json").write_text('{"status": "running", "step": 0}')
    assert train(8, resume=True, run_name=name) == home
    assert [e["step"] for e in read_lines(home / "metrics.jsonl")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 8]


def test_a_run_that_lost_its_last_checkpoint_says_so(tmp_path, train, home):
    train(12)
    (home / "last.pt").unlink()
    for said, resume in (("has no last.pt; there is .*step_00000008.pt, .*step_00000012.pt", True),
                         ("no checkpoint, although its summary.json says step 12", True),
                         ("no such file or directory", str(tmp_path / "nowhere.pt"))):
        refused(said, find_resume, settings_for(tmp_path, resume=resume))
        for path in home.glob("*.pt"):
            path.unlink()
    refused("has no last.pt; there is no other checkpoint either", find_checkpoint, home)


def test_resume_from_a_path(tmp_path, begin, train, home):
    train(12)
    whole, middle = read_lines(home / "metrics.jsonl"), home / "step_00000008.pt"
    branch = dict(resume=str(middle), run_name="branch")
    assert find_resume(settings_for(tmp_path, **branch)) == middle
    with begin(middle, **branch) as run:
        assert run.dir.name == "branch" and read_lines(run.dir / "metrics.jsonl") == []
    assert load_checkpoint(run.dir / "last.pt")["step"] == 8, "a branch that is killed goes on with --resume"
    with pytest.raises(UserError, match="is there already"):
        begin(middle, **branch).__enter__()
    with begin(middle, resume=str(middle), run_name=None) as run:
        assert run.dir == home
        assert load_checkpoint(home / "last.pt")["step"] == 8, "checkpoint and metrics go back together"
    train(12, resume=True)
    assert read_lines(home / "metrics.jsonl") == whole


def test_a_checkpoint_from_elsewhere_starts_a_run_of_its_own(tmp_path, begin, saved):
    (tmp_path / "downloads").mkdir()
    path = shutil.copy(saved, tmp_path / "downloads" / "model.pt")
    with begin(path, run_name=None, resume=str(path)) as run:
        assert run.dir.parent == tmp_path / "runs" / "toy"
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["model.pt"]
    refused("is a checkpoint of toy, not of other", load_checkpoint, path, tmp_path / "other.py")


# --- Checkpoints ---

@pytest.fixture
def saved(begin):
    """The last.pt of a finished run at step 8 with metrics."""
    with begin() as run:
        for step in range(1, 9):
            run.log(step=step, loss=1.0)
        run.save("last.pt", **state(8, 2.0, loop={"best": 1.0, "pending": [{"a": (1, 2)}]}))
    return run.dir / "last.pt"


def test_save_and_load(begin, home):
    with begin() as run:
        run.log(step=3, loss=1.0)
        run.save("last.pt", **state(3, 2.0, ema=None, generators=Generators(data=torch.Generator()).state_dict()))
    found = load_checkpoint(home / "last.pt")
    assert (found["format"], found["script"], found["step"], found["metrics_lines"]) == ("nanolab-1", "toy", 3, 1)
    assert found["settings"] == {"betas": (0.9, 0.95), "lr": 0.1} and found["ema"] is None
    assert torch.equal(found["model"]["w"], torch.full((8,), 2.0))
    for holder in (found, found["settings"]):                # a key that it lacks is told wherever it is asked for
        with pytest.raises(UserError, match="last.pt lacks 'nothing'"):
            holder["nothing"]
        assert holder.get("nothing") is None and "nothing" not in holder
    torch.save(found, home / "last.pt")                      # what was loaded can be saved, and loaded again
    assert load_checkpoint(home / "last.pt")["settings"] == found["settings"]


def test_numbered_checkpoints_are_pruned(begin):
    """Where the run has gone back, what lies ahead is no older one."""
    with begin() as run:
        run.save("best.pt", **state(1))
        for step, keep, left in ((900, 2, [900]), (1000, 2, [900, 1000]), (1100, 2, [1000, 1100]),
                                 (1000, 1, [1000, 1100]), (1200, 2, [1100, 1200]), (1300, 1, [1300])):
            run.save("last.pt", keep=keep, **state(step))
            assert sorted(int(path.stem[5:]) for path in run.dir.glob("step_*.pt")) == left


def test_what_a_run_is_handed_is_saved_and_goes_on(begin, home):
    """Also where an average begins on resume: with the weights that were loaded."""
    def parts(averaged):
        model = torch.nn.Linear(2, 2)
        opt = optim.build(dict(optimizer="schedule_free", lr=0.1), model.named_parameters(),
                          dict(weight="matrix", bias="bias"))
        return dict(model=model, ema=optim.EMA(model, 0.9) if averaged else None, optimizer=opt, plain=[1])

    things = parts(False)
    with begin(things=things) as run:
        for _ in range(3):
            things["model"](torch.ones(1, 2)).sum().backward()
            things["optimizer"].step()
        y = things["model"].weight.detach().clone()
        run.save("last.pt", 1, plain=[2])
    checkpoint, resumed = load_checkpoint(home / "last.pt"), parts(True)
    assert list(checkpoint)[:6] == ["step", "settings", "model", "ema", "optimizer", "plain"]
    assert checkpoint["plain"] == [2] and checkpoint["ema"] is None
    assert torch.equal(things["model"].weight, y) and not torch.equal(checkpoint["model"]["weight"], y), "the average"
    run = begin(home / "last.pt", resumed)
    assert torch.equal(resumed["model"].weight, y) and torch.equal(resumed["ema"].weights["weight"], y)
    run.track(model=torch.nn.Linear(3, 1))
    assert run.states("model")["model"]["weight"].shape == (1, 3)
    del checkpoint["optimizer"]
    refused("last.pt lacks 'optimizer'", Run, run.settings, checkpoint, **parts(True))


def a_loop():
    values = dict(step=0, best=math.inf, pending=[], best_model=None, chosen=torch.zeros(2), score=[-1, -math.inf])
    return Loop(values, torch.amp.GradScaler("cpu", enabled=False))


def test_losses_wait_and_the_first_that_is_not_finite_ends_the_run():
    loop = a_loop()
    loop.add(torch.tensor([1.0, 0.5]))
    assert loop["pending"] == [] and loop.state_dict()["pending"] == loop["pending"] == [[1.0, 0.5]]
    for step, (loss, norm) in enumerate(((3.0, 1.0), (4.0, math.nan), (math.nan, 1.0)), 2):
        loop["step"] = step - 1
        loop.add(dict(loss=torch.tensor(loss), grad_norm=torch.tensor(norm)))
        loop["step"] = step
    with pytest.raises(NonFinite, match="loss is not finite at step 3"):
        loop.flush()
    whole = {**a_loop(), "step": 3, "best": 2, "best_model": {}, "pending": [[1, 2]], "score": [0.5, -2.0]}
    loop = a_loop()
    loop.load_state_dict(whole)
    assert loop == whole and loop.state_dict() == whole


@pytest.mark.parametrize("load, said", [
    (lambda found: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.ones(8), "bias": torch.ones(2)}),
     "size mismatch"),
    (lambda found: found["loop"]["pending"]["x"], "does not fit or is damaged: TypeError: list indices"),
    (lambda found: found["state"], "lacks 'state'"),
    *[(lambda found, name=name, value=value: put_back({"loop": {**a_loop(), name: value}}, {"loop": a_loop()}),
       f"does not fit or is damaged: ValueError: {name} of its loop") for name, value in (
        ("step", "x"), ("best", None), ("pending", 3), ("chosen", [1]), ("score", [1.0, "x"]), ("score", [1.0]))]])
def test_what_does_not_fit_is_one_line(saved, ended, load, said):
    def main():
        with restoring(saved):
            load(load_checkpoint(saved))
    status, err = ended(main)
    assert status == 2 and err.startswith(f"error: {saved} ") and said in err and err.count("\n") == 1


class Trap:
    """A pickle that makes a file when somebody loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


OURS = {"format": "nanolab-1", "script": "toy", **state(8)}
TRAPPED = {"format": "nanolab-1", "model": Trap("sprung")}
FOREIGN = ({"model": {}}, {"format": "nanolab-9"}, torch.zeros(3), [1, 2])


@pytest.mark.parametrize("content, said", [
    *((foreign, "last.pt is not a nanolab checkpoint") for foreign in FOREIGN), (b"", "last.pt is truncated or not"),
    (b"hello\n" * 100, "last.pt is truncated or not a nanolab checkpoint"), (None, "No such file"), ({}, "a nanolab"),
    (pickle.dumps(TRAPPED), "last.pt is truncated or not a nanolab checkpoint"),
    (TRAPPED, "last.pt is refused: it holds more than plain data, which could run code"),
    *(({**OURS, name: value}, f"last.pt is damaged: {name} is not what a run saves there") for name, value in (
        ("settings", []), ("step", "8"), ("steps", [1]), ("steps", {"../../x": 1}), ("steps", {"/x": 1}),
        ("steps", {"a": "1"}), ("loop", 3), ("model", [1]), ("generators", None), ("metrics_lines", "8"),
        ("script", 3), ("ema", [1]), ("ended", None), ("figures", [])))])
def test_what_is_no_checkpoint_is_one_line_and_does_not_run(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=said) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    if isinstance(content, (dict, list, torch.Tensor)):      # of torch before 1.6
        torch.save(content, path, _use_new_zipfile_serialization=False)
        refused("last.pt", load_checkpoint, path)
    refused("Is a directory", load_checkpoint, tmp_path)
    assert not Path("sprung").exists()
    pickle.loads(pickle.dumps(TRAPPED))
    assert Path("sprung").exists(), "the trap works where somebody is careless"


def test_damage_is_noticed(saved):
    """Where torch pads its file nothing depends on it; elsewhere, and at any length, one line says so, and which
    checkpoint there is besides. The file stays as it is."""
    whole, good, noticed, chance = saved.read_bytes(), load_checkpoint(saved), 0, random.Random(0)
    other = Path(shutil.copy(saved, saved.with_name("step_00000008.pt")))
    for trial in range(120):
        broken = bytearray(whole)
        for place in chance.sample(range(len(whole)), 1 if trial % 2 else 20):
            broken[place] ^= 1 << chance.randrange(8)
        if trial > 100:
            broken = whole[:chance.randrange(len(whole))]
        saved.write_bytes(broken)
        try:
            assert_equal(load_checkpoint(saved), good)
        except UserError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            assert str(other) in str(error) or "cannot read" in str(error)
            noticed += 1
        assert saved.read_bytes() == broken
    assert noticed > 70
    for length in (0, 1, 4, 100, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(f"{saved} is truncated .*{other}", load_checkpoint, saved)
    at = whole.index(torch.full((8,), 2.0).numpy().tobytes()) + 5
    saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    refused("last.pt is truncated or damaged .*check sum", load_checkpoint, saved)


def test_killed_at_many_moments_of_a_save(begin, home):
    last = home / "last.pt"
    with begin() as run:
        def save(i):
            run.save("last.pt", i, a=torch.full((20_000,), float(i)), b=torch.full((7,), float(i)))

        save(0)
        chance, torn, moved, step = random.Random(3), 0, 0, 0
        for kills in range(400):
            pid = fork(lambda: [save(i) for i in range(step + 1, step + 10**6)])
            temporary = home / f".last.pt.tmp-{pid}"
            wait_for(temporary.exists)
            time.sleep(chance.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found, before = load_checkpoint(last), step
            step = found["step"]
            assert torch.equal(found["a"], torch.full((20_000,), float(step)))
            assert torch.equal(found["b"], torch.full((7,), float(step)))
            moved, torn = moved + (step > before), torn + temporary.exists()
            if kills >= 10 and min(torn, moved) >= 4:
                break
        assert torn >= 4 and moved >= 4, "kills have hit the middle of a save, and saves have got through"
    with begin(last):
        assert not list(home.glob(".*.tmp-*")), "the next start removes what the kills have left"


@contextlib.contextmanager
def small_disk(limit):
    """Within it no file may have more bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_keeps_the_old_checkpoint(begin, home):
    """And no temporary file takes the room."""
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: File too large"):
        with begin() as run:
            for limit in (4_000, 5_000, 40_000, 399_000, 400_900, 401_500, 402_500):
                run.save("last.pt", **state(1, 1.0))
                with small_disk(limit), pytest.raises(UserError, match="cannot write .*last.pt: File too large"):
                    run.save("last.pt", 2, model={"w": torch.randn(100_000)}, more=torch.randn(1000))
                assert torch.equal(load_checkpoint(home / "last.pt")["model"]["w"], torch.full((8,), 1.0))
                assert not list(home.glob(".*.tmp-*"))
            with small_disk(40_000):
                for step in range(100_000):
                    run.log(step=step, loss=1.0)
    assert summary(home)["status"] == "failed"


# --- The end of a run ---

def signalled(tmp_path, begin, home, pause, numbers):
    """(status, stdout, stderr) of a run without end that gets `numbers`, one after the other."""
    @command
    def main():
        step = 0
        with begin() as run:
            while not run.stop:
                step += 1
                run.log(step=step, loss=1.0)
                time.sleep(pause)
            run.save("last.pt", **state(step))
        print("never printed")

    out, err, metrics = tmp_path / "out", tmp_path / "out.err", home / "metrics.jsonl"
    pid = fork(main, out)
    wait_for(lambda: metrics.exists() and metrics.stat().st_size)
    for number in numbers:
        os.kill(pid, number)
        wait_for(err.read_text)
    return status_of(pid), out.read_text(), err.read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(tmp_path, begin, home, number, status):
    """A second one stops at once."""
    line = f"\n{number.name}: stopping after this step, then saving; once more stops at once\n"
    assert signalled(tmp_path, begin, home, 0.01, [number]) == (status, "", line)
    end = summary(home)
    assert end["status"] == "interrupted" and end["step"] == load_checkpoint(home / "last.pt")["step"] > 0
    assert end["step"] == len(read_lines(home / "metrics.jsonl"))
    shutil.rmtree(home)
    twice = signalled(tmp_path, begin, home, 60, [number, signal.SIGTERM])   # amid a long step
    assert twice == (-signal.SIGTERM, "", line)


def test_handlers_are_put_back(begin, home):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        with begin() as run:
            assert signal.getsignal(signal.SIGINT) != before[0]
            run.log(step=5, loss=1.0)
            1 / 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    end = summary(home)
    assert (end["status"], end["step"], end["error"]) == ("failed", 5, "ZeroDivisionError: division by zero")


OUT_OF_MEMORY = "error: out of memory: try a smaller batch_size (and more grad_accum), block_size or model\n"


@pytest.mark.parametrize("action, status, said", [
    (raising(UserError("two\nlines")), 2, "error: two lines\n"),
    (raising(NonFinite(7)), 3,
     "error: loss is not finite at step 7; the last good checkpoint is not written yet\n"),
    (raising(KeyboardInterrupt()), 130, "error: interrupted\n"),
    (raising(OSError(28, "No space left on device", "x.bin")), 2,
     "error: cannot write x.bin: No space left on device\n"),
    (raising(MemoryError()), 2, OUT_OF_MEMORY), (raising(torch.OutOfMemoryError("CUDA")), 2, OUT_OF_MEMORY),
    (lambda: torch.empty(2 ** 58), 2, OUT_OF_MEMORY),
    (lambda: Path("~nobody-here/x").expanduser(), 2, "a path begins with ~ and a name that this machine does not know"),
    (lambda: open("x" * 300), 2, "File name too long"), (lambda: open(f"{__file__}/x"), 2, "Not a directory"),
    (lambda: __import__("yaml"), 2, "this needs pyyaml: pip install pyyaml"),
    (raising(ValueError("bug")), ValueError, ""), (raising(RuntimeError("bug")), RuntimeError, ""),
    (raising(PermissionError(13, "bug")), PermissionError, ""), (lambda: {}["x"], KeyError, "")])
def test_errors_of_a_person_are_one_line_and_bugs_keep_their_traceback(ended, monkeypatch, action, status, said):
    monkeypatch.setitem(sys.modules, "yaml", None)
    if isinstance(status, type):
        with pytest.raises(status):
            command(action)()
        return
    code, err = ended(action)
    assert code == status and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 250
    assert err == said if said.endswith("\n") else said in err


@pytest.mark.parametrize("name", ["", "loss", "nats", "bpb", "score"])
def test_what_is_not_finite_fails(begin, home, ended, name):
    """A loss, and a figure of a validation; both name the last checkpoint."""
    def main():
        with begin() as run:
            run.log(step=1, split="val", **{name or "loss": torch.tensor(2.0)})
            run.save("last.pt", **state(2))
            if not name:
                raise NonFinite(7)
            run.log(step=2, split="val", **{name: -math.inf})
            run.save("best.pt", **state(2))

    said = f"{name} of the validation is not finite at step 2; the last" if name else (
        "loss is not finite at step 7; the last good")
    assert ended(main) == (3, f"error: {said} checkpoint is {home / 'last.pt'}\n")
    assert summary(home)["status"] == "failed" and load_checkpoint(home / "last.pt")["step"] == 2
    assert not (home / "best.pt").exists() and (not name or read_lines(home / "metrics.jsonl")[-1][name] is None)


def test_not_finite_in_other_places(tmp_path):
    """Weights, where a validation asks for words and has no loss; and processes that write nothing, which end too."""
    model = torch.nn.Linear(2, 2)
    experiment.check_weights(3, model)
    model.weight.data[1, 1] = math.inf
    with pytest.raises(NonFinite, match="a weight is not finite at step 3"):
        experiment.check_weights(3, model)
    silent = Run(settings_for(tmp_path), mesh=parallel.Mesh(2, rank=1))
    silent.log(step=1, loss=math.nan)                        # of training: the loop itself looks at those
    with pytest.raises(NonFinite, match="loss of the validation is not finite at step 1"):
        silent.log(step=1, split="val", loss=math.nan)


def test_a_reader_that_closes_early_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)

    @command
    def main():
        os.dup2(write, 1)
        print("x" * 100)
    assert status_of(fork(main, tmp_path / "out")) == 141 and (tmp_path / "out.err").read_text() == ""
    os.close(write)


def test_pictures_that_cannot_be_drawn_cost_a_line(begin, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with begin() as run:
            assert "curves.png will not be drawn" in capsys.readouterr().out, "before step 1"
    assert capsys.readouterr().out == "" and not (run.dir / "curves.png").exists()
    monkeypatch.setattr(experiment, "draw_curves", lambda *words: 1 / 0)
    with begin(run_name="b") as other:
        other.log(step=1, loss=1.0)
    assert capsys.readouterr().out == "curves.png is left out: ZeroDivisionError: division by zero\n"
    assert summary(run.dir)["status"] == summary(other.dir)["status"] == "done"


@pytest.mark.parametrize("package, setting", [("wandb", "offline"), ("tensorboard", True)])
def test_packages_that_are_asked_for_and_not_there(tmp_path, begin, monkeypatch, package, setting):
    monkeypatch.setitem(sys.modules, "wandb" if package == "wandb" else "torch.utils.tensorboard", None)
    refused(f"--{package} needs the package {package}: pip install {package}", begin(**{package: setting}).__enter__)
    assert not (tmp_path / "runs").exists()
