"""python -m nanolab.runs list and clean: what is said of runs, what is removed, and what never is."""
import fcntl
import json
import os
import shutil

import pytest

from nanolab import runs
from nanolab.run import FORMAT


def make(folder, name, tag=None, age=0, status="done", step=7, marker=FORMAT, **more):
    """A run's directory as a finished process leaves it; age in days."""
    place = folder / "runs" / "train_mult" / name
    place.mkdir(parents=True)
    for file, content in (("params.json", json.dumps({"settings": {"tag": tag}})), ("lock", marker),
                          ("summary.json", json.dumps({"status": status, "step": step, **more})),
                          ("metrics.jsonl", json.dumps({"step": 3, "split": "train", "loss": 1.0}) + "\n")):
        if content is not None:
            (place / file).write_text(content)
            os.utime(place / file, (place.stat().st_mtime - age * 86400,) * 2)
    return place


def run(capsys, *words):
    """(exit status, standard output, standard error) of the command line."""
    code = 0
    try:
        runs.main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    return (code, *capsys.readouterr())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_list(tmp_path, capsys):
    make(tmp_path, "a", tag="test", age=3, best_bpb=2.25)
    make(tmp_path, "b", status="running")                              # whose process is gone
    busy = make(tmp_path, "c", status="running")
    make(tmp_path, "stranger", marker=None)
    (tmp_path / "runs" / "link").symlink_to(busy)
    with open(busy / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == "run status step best size age tag".split() and rows[-1][:2] == ["3", "runs,"]
    assert rows[1][:5] == ["runs/train_mult/a", "done", "7", "bpb", "2.2500"] and rows[1][-2:] == ["3d", "test"]
    assert rows[2][:3] == ["runs/train_mult/b", "killed", "3"] and rows[3][:3] == ["runs/train_mult/c", "running", "3"]
    assert len(rows) == 5


def test_clean_only_says_what_it_would_do(tmp_path, capsys):
    old = make(tmp_path, "old", tag="test", age=8)
    new, other = make(tmp_path, "new", tag="test", age=6), make(tmp_path, "other", tag="mine", age=9)
    code, out, _ = run(capsys, "clean", "--tag", "test", "--older_than", "7d")
    assert code == 0 and "runs/train_mult/old" in out and "new" not in out and "other" not in out
    assert "1 runs" in out and "would be removed" in out and old.exists()
    code, out, _ = run(capsys, "clean", "--tag=test", "--older-than=7d", "--yes")
    assert code == 0 and "1 runs removed" in out and not old.exists() and new.exists() and other.exists()


def test_clean_leaves_alone_what_is_not_ours_and_what_is_written(tmp_path, capsys):
    stranger, foreign = make(tmp_path, "stranger", "test", 9, marker=None), make(tmp_path, "f", "test", 9, marker="x")
    busy, outside = make(tmp_path, "busy", "test", 9), make(tmp_path / "elsewhere", "o", "test", 9)
    (tmp_path / "runs" / "train_mult" / "link").symlink_to(outside)
    (tmp_path / "runs" / "folder").symlink_to(outside.parent)
    kept = make(tmp_path, "held", "test", 9)
    (kept / "samples").symlink_to(outside)                             # a link inside a run that does go
    with open(busy / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, _ = run(capsys, "clean", "--tag", "test", "--older_than", "7d", "--yes")
        assert code == 0 and "runs/train_mult/busy is being written" in out and "1 runs removed" in out
        with pytest.raises(runs.UserError, match="another process"):
            runs.remove_run(busy)
    assert not kept.exists()
    assert all(len(list(place.iterdir())) >= 3 for place in (stranger, foreign, busy, outside))
    for place in (stranger, foreign, tmp_path / "runs", tmp_path / "runs" / "train_mult" / "link"):
        code, _, err = run(capsys, "clean", place, "--yes")
        assert code == 2 and err.startswith("error: ") and "is not the directory of a run" in err and place.exists()
        with pytest.raises(runs.UserError, match="not the directory"):
            runs.remove_run(place)
    assert (outside / "params.json").exists()
    code, out, _ = run(capsys, "clean", busy, "--yes")
    assert code == 0 and not busy.exists()


@pytest.mark.parametrize("words, said", [
    (["clean"], "which runs"), (["clean", "--older_than", "soon"], "write 30m, 12h or 7d"),
    (["sweep"], "invalid choice"), ([], "required"), (["clean", "--tags", "x"], "unrecognized"),
    (["list", "--out_dir", "nowhere"], "no such directory"),
])
def test_mistakes(tmp_path, capsys, words, said):
    make(tmp_path, "a")
    code, _, err = run(capsys, *words)
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_run_that_goes_while_one_looks(tmp_path, capsys, monkeypatch):
    """A run that begins to be written between the look and the removal is said and left."""
    place = make(tmp_path, "a", "test")
    real = runs.remove_run

    def busy(directory):
        with open(directory / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            real(directory)
    monkeypatch.setattr(runs, "remove_run", busy)
    code, out, _ = run(capsys, "clean", "--tag", "test", "--yes")
    assert code == 0 and "another process is writing" in out and "0 runs removed" in out and place.exists()
    shutil.rmtree(place)
    assert runs.find_runs(tmp_path / "runs") == []
