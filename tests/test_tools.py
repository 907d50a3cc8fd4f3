"""What tools are given: numbers, paths, archives, checkpoints, flags without an effect; each mistake is one line. What
nanolab.runs says of runs, what it removes, and what it never does."""
import bz2
import contextlib
import fcntl
import gzip
import io
import json
import lzma
import os
import signal
import sqlite3
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
import bench
import evaluate
import grid
import plot
import sample
from choices import refused
from data import facts, files, smollm, tokens, video
from model import TransformerConfig, build_model
from nanolab import probe, run as experiment, runs, settings as flags
from nanolab.run import Settings, UserError
from forks import snapshot
from test_scripts import fresh

@pytest.mark.parametrize("tool", [sample, evaluate, plot, grid, bench, probe], ids=lambda tool: tool.__name__)
def test_every_number_of_a_tool_has_bounds(tool):
    """What lies beyond them, or is none: test_settings.py."""
    found = {name: spec for name, spec in flags._read_settings(tool.__file__).items() if spec.kind in (int, float)}
    assert found and not [name for name, spec in found.items() if not spec.bounds]


# --- Archives, lines, databases ---

def zipped(content):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", content)
        file.writestr("__MACOSX/._a.txt", b"of the desktop")  # what macOS adds is no second member
    return made.getvalue()


@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress),
                                              ("zip", zipped)], ids=["gz", "xz", "bz2", "zip"])
def test_an_archive_that_goes_on_is_refused(suffix, compress, tmp_path, monkeypatch):
    """No more than the bound is ever in memory; a beginning may be taken."""
    path, content = tmp_path / f"a.txt.{suffix}", bytes(3_000_000)
    path.write_bytes(compress(content))
    assert len(files.read(path)) == len(content)
    monkeypatch.setattr(files, "FEW", 1_000_000)
    monkeypatch.setattr(files, "UNPACKED", 2_000_000)
    refused("unpacks to more than", files.read, path)
    assert len(files.read(path, 1000)) == 1000
    monkeypatch.setattr(files, "UNPACKED", 4_000_000)
    monkeypatch.setattr(files, "RATIO", 10 ** 6)
    assert len(files.read(path)) == len(content)


def test_frames_that_go_on_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, frames=np.zeros((100, 8, 8, 3), np.uint8))
    assert len(video.load(str(path)).train) == 1
    monkeypatch.setattr(files, "FEW", 10_000)
    monkeypatch.setattr(files, "RATIO", 2)
    refused("more than 10,000 are refused", video.load, str(path))
    with zipfile.ZipFile(path, "w") as file:                 # a head that promises 2^60 bytes
        head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 1024, 1024, 3), }" % 2 ** 39
        file.writestr("frames.npy", b"\x93NUMPY\x01\x00" + (len(head) + 1).to_bytes(2, "little") + head + b"\n")
    refused("damaged", video.load, str(path))


def test_lines_that_go_on_or_nest_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 3000 + "]" * 3000 + "}\n")
    refused("line 1 of .* is no JSON object", list, smollm.documents([path]))
    monkeypatch.setattr(smollm, "LINE", 1000)
    refused("line 1 of .* has more than 1,000 bytes", smollm.n_rows, path)


def test_a_view_that_never_ends_is_broken_off(tmp_path, monkeypatch):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as file:
        file.execute("CREATE VIEW people AS WITH RECURSIVE n(name, trade) AS "
                     "(SELECT 'Ada', 7 UNION ALL SELECT name || 'x', 8 FROM n) SELECT * FROM n")
    monkeypatch.setattr(facts.Database, "STEPS", 100_000)
    there = facts.Database(path)
    assert there.fingerprint is not None
    refused("does not say trade: interrupted", there.find, "trade", "Bob")
    with sqlite3.connect(path) as file:
        file.executescript("DROP VIEW people; CREATE TABLE people (name TEXT, trade INTEGER); "
                           "INSERT INTO people VALUES ('Ada', 7)")
    assert facts.Database(path).find("trade", "Ada") == "7" and facts.Database(path).fingerprint != there.fingerprint


def test_words_that_no_caption_has():
    cells = np.zeros((8, 8), np.uint8)
    cells[1, 2], cells[3, 4], cells[5:, 5] = video.AGENT, video.BALL, video.WALL
    assert video.unknown_words(video.caption(cells), 8) == []
    assert video.unknown_words("agent at c4, fish at z9, walls none.", 8) == ["fish", "z9"]


# --- Data that changed, or is too small ---

def test_data_that_changed_under_the_same_name_is_noticed(tmp_path):
    first, second = Settings(dataset="a.npz", n_train=3), Settings(dataset="a.npz", n_train=4)
    first.check_data(None, ("dataset", "n_train"), "abc")
    saved = {"settings": dict(first), "fingerprint": first.fingerprint}
    first.check_data(saved, ("dataset", "n_train"), "abc")
    with pytest.raises(UserError, match="dataset a.npz changed since the checkpoint: its fingerprint was abc"):
        first.check_data(saved, ("dataset", "n_train"), "abd")
    second.check_data(saved, ("dataset", "n_train"), "abd")  # other data were asked for
    first.check_data({"settings": dict(first)}, ("dataset", "n_train"), "abd")     # an older checkpoint knows of none
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {i:05} of many"}) for i in range(400)]
    path.write_text("\n".join(lines))
    batches = smollm.Batches([path], tokens.Bytes(), 2, 50)
    state = batches.state_dict()
    path.write_text("\n".join(lines).replace("00123 of", "00123 if"))
    other = smollm.Batches([path], tokens.Bytes(), 2, 50)
    with pytest.raises(UserError, match="fingerprint of the data"):
        other.load_state_dict(state)
    other.load_state_dict({key: value for key, value in state.items() if key != "fingerprint of the data"})


def clips(path, seed):
    rng = np.random.default_rng(seed)
    np.savez(path, frames=rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8), actions=rng.integers(0, 3, 60))


@pytest.mark.parametrize("script, words, change, said", [
    ("train_enwik8.py", ["--dataset", "a.txt", "--max_bytes", "none", "--block_size", 16],
     lambda: Path("a.txt").write_bytes(bytes(range(98, 118)) * 200), "fingerprint of the data"),  # of the same length
    ("train_worldmodel.py", ["--stage", "tokenizer", "--dataset", "a.npz"], lambda: clips("a.npz", 2),
     "changed since the checkpoint"),
    ("train_facts.py", ["--task", "in_tool", "--n_people", 16, "--database", "a.db"],
     lambda: (os.unlink("a.db"), facts.Database(facts.people(17, 0, unseen=300)).save("a.db")),
     "changed since the checkpoint")], ids=["train_enwik8", "train_worldmodel", "train_facts"])
def test_a_resumed_run_notices_data_that_changed(
        script, words, change, said, tmp_path, monkeypatch, in_process, undrawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(video, "draw_clips", lambda *given: None)
    clips("a.npz", 1)
    Path("a.txt").write_bytes(bytes(range(97, 117)) * 200)
    facts.Database(facts.people(16, 0, unseen=300)).save("a.db")
    words = ["--debug", "--device", "cpu", "--run_name", "a", "--max_steps", 1, *words]
    assert in_process(types.SimpleNamespace(**fresh(script)), *words)[0] == 0
    kept = snapshot(Path("runs"))
    change()
    code, _, err = in_process(types.SimpleNamespace(**fresh(script)), *words, "--resume")
    assert code == 2 and err.count("\n") == 1 and said in err
    assert kept == snapshot(Path("runs"))


@pytest.mark.parametrize("script, words, n, said", [
    ("train_enwik8.py", [], 20, "too few to be scored"),
    ("train_facts.py", ["--task", "text", "--tokenizer", "bytes"], 20, "too few to be scored"),
    ("train_enwik8.py", [], 200, "mean little")])
def test_a_validation_that_is_too_small(script, words, n, said, tmp_path, monkeypatch, in_process, undrawn):
    """Refused before the first step where there is nothing to score; ten bytes are said to mean little."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(bytes(range(97, 117)) * (n // 20))
    code, out, err = in_process(
        types.SimpleNamespace(**fresh(script)), "--debug", "--device", "cpu", "--dataset", "a.txt", "--max_bytes",
        "none", "--block_size", 16, "--max_steps", 1, "--run_name", "a", *words)
    if n == 20:
        assert code == 2 and err.count("\n") == 1 and said in err and not Path("runs").exists(), err
    else:
        assert code == 0 and said in out


# --- Checkpoints, and flags without an effect ---

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with checkpoints: of text, of people, of another script, and of text by halves."""
    home = tmp_path_factory.mktemp("models")
    (home / "a.txt").write_bytes(bytes(range(256)) * 20)
    small = dict(n_layer=1, n_head=1, n_embd=8, block_size=64, dropout=0.0)
    settings = {name: spec.default for name, spec in flags._read_settings(ROOT / "train_enwik8.py").items()}
    settings |= small | dict(dataset=str(home / "a.txt"), n_targets=1, intermediate_losses=False)
    model = build_model(TransformerConfig.from_settings({**settings, "vocab_size": 256}))
    whole = {"format": experiment.FORMAT, "script": "train_enwik8", "step": 1, "settings": settings, "ema": None,
             "model": model.state_dict()}
    torch.save(whole, home / "text.pt")
    torch.save({**whole, "script": "train_dvae"}, home / "dvae.pt")
    torch.save({key: value for key, value in whole.items() if key != "settings"}, home / "bare.pt")
    torch.save({**whole, "model": dict(list(model.state_dict().items())[1:])}, home / "half.pt")
    torch.save({**whole, "settings": {**settings, "n_embd": 16}}, home / "wide.pt")
    settings = {name: spec.default for name, spec in flags._read_settings(ROOT / "train_facts.py").items()}
    settings |= small | dict(n_people=6, n_unseen=3)
    _, vocabulary, _ = facts.open_facts(settings)
    model = build_model(TransformerConfig.from_settings({**settings, "vocab_size": vocabulary.size}))
    torch.save({**whole, "script": "train_facts", "settings": settings, "model": model.state_dict(),
                "vocab_size": vocabulary.size, "tokenizer": vocabulary.fingerprint}, home / "facts.pt")
    return home


MISTAKES = {  # what ends in .pt lies in the folder of models
    sample: {"dvae.pt": "is a checkpoint of train_dvae", "bare.pt": "settings", "half.pt": "Missing key",
             "wide.pt": "size mismatch", "text.pt --greedy --top_k 3": "--top_k has no effect", "x" * 300: "too long",
             "text.pt --greedy --temperature 1": "--temperature has no effect", "": "sample.py", "folder": "folder"},
    evaluate: {"dvae.pt": "is a checkpoint of train_dvae", "bare.pt": "settings", "half.pt": "Missing key",
               "wide.pt": "size mismatch", "x" * 300: "name too long",
               "text.pt --database x": "--database has no effect on a model of task text",
               "text.pt --prompts 3": "--prompts has no effect on a model of task text",
               "text.pt --seed 3": "--seed has no effect without --samples",
               "text.pt --patience 3": "--patience has no effect without --watch",
               "facts.pt --dataset x": "--dataset has no effect on a model of task in_",
               "facts.pt --split val": "--split has no effect on a model of task in_",
               "--watch text.pt": "the directory of a run is needed", "": "evaluate.py", "text.pt --splt val": "split",
               "text.pt --protocols block,strid:4": "strid:4", "text.pt --protocols stride:65": "stride:65",
               "text.pt --weights ema": "text.pt", "text.pt --protocols cache": "learned"},
    probe: {"text.pt": "is a checkpoint of train_enwik8, not of train_facts", "x" * 300: "name too long",
            "facts.pt --attribute birth_place --part month": "--part has no effect"},
    bench: {"--what worlds --draws 3": "--draws has no effect with --what worlds", "--n_embd 10 --n_head 3": "n_embd",
            "--json no/where.json": "--json no/where.json: cannot be written there",
            "--json .": "--json .: cannot be written there: it is a folder",
            "--n_layer 1000 --n_embd 65536": "cannot be held",
            "--block_size 1000000 --batch_size 1000000": "cannot be held", "--what nothing": "what",
            "--clock cpu": "threads", "--draws 1,x": "1,x"},
    plot: {"RUN --levels 0.1,0.2,0.3": "--levels has no effect without --contours or --capacity",
           "RUN --out a.jpg": "--out a.jpg: a picture ends in .png, .pdf, .svg", "--table RUN": "missing or no grid",
           "RUN --width 1e9": "--width 1e9: must be >= 1.0 and <= 50.0", "RUN": "nothing to draw: RUN: no such run",
           "--table RUN --by step": "--by has no effect with --table", "--table " + "x" * 300: "missing or no grid"},
    grid: {"plan.yaml --print --jobs 3": "--jobs has no effect with --print", "x" * 300: "name too long"},
}


@pytest.mark.parametrize("tool", MISTAKES, ids=lambda tool: tool.__name__)
def test_mistakes_are_one_line(tool, models, in_process, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "compare_training", lambda peers: pytest.fail("it began to measure"))
    for line, said in MISTAKES[tool].items():
        code, _, err = in_process(tool, *(models / word if word.endswith(".pt") else word for word in line.split()))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said.lower() in err.lower(), err
        assert not list(tmp_path.iterdir())


def test_pictures_are_what_their_names_say(tmp_path):
    from matplotlib.figure import Figure
    for name, begin in (("a.png", b"\x89PNG"), ("a", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        plot.save(Figure(figsize=(1, 1)), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_few_people(models, tmp_path, in_process):
    """Values that one person alone has cannot be held out, and one value is no choice: a line says so."""
    loaded = torch.load(models / "facts.pt", weights_only=True)
    seen = set()
    for n, unseen in ((6, 3), (1, 0), (40, 4)):
        loaded["settings"].update(n_people=n, n_unseen=unseen)
        torch.save(loaded, tmp_path / "few.pt")
        code, _, err = in_process(probe, tmp_path / "few.pt", "--steps", 2, "--device", "cpu")
        assert code == 0 or "nothing to learn from" in err
        seen.add(code)
    assert seen == {0, 2}


# --- Grids ---

def test_a_signal_while_a_run_is_being_started(tmp_path, monkeypatch, in_process):
    """It reaches the run that was on its way, and no other is started; an error ends what was started too."""
    (tmp_path / "plan.yaml").write_text(
        f"script: {tmp_path}/nap.py\nout_dir: {tmp_path}/out\nmetric: figure\nbase: {{}}\nseeds: [1, 2]\n"
        "seeded: [seed]\ncross: {length: [20, 21, 22]}\n")
    (tmp_path / "nap.py").write_text("import time\nseed = 0  # seed\nlength = 20  # seconds\ntime.sleep(20)\n")
    started, popen, number, began = [], grid.subprocess.Popen, signal.SIGINT, time.monotonic()

    def starting(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        if len(started) == 2:
            raise OSError("no more processes")
        os.kill(os.getpid(), number)
        return started[-1]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(grid.subprocess, "Popen", starting)
    try:
        assert in_process(grid, tmp_path / "plan.yaml")[0] == 130
        assert len(started) == 1 and started[0].returncode == -signal.SIGTERM
        number = 0                                           # none
        started.clear()
        with pytest.raises(OSError, match="no more"):
            in_process(grid, tmp_path / "plan.yaml")
        assert started[0].returncode == -signal.SIGTERM
    finally:
        for child in started:
            child.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert time.monotonic() - began < 15


# --- python -m nanolab.runs list and clean ---

def make(folder, name, tag=None, age=0, status="done", step=7, marker=experiment.FORMAT, **more):
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


@pytest.fixture
def cleaned(tmp_path, monkeypatch, in_process):
    """cleaned(words): (exit status, standard output, standard error) of the command line, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: in_process(runs, *words)


@contextlib.contextmanager
def written_to(run):
    """As while another process writes to it."""
    with open(run / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_list(tmp_path, cleaned):
    make(tmp_path, "a", tag="test", age=3, best_bpb=2.25)
    make(tmp_path, "b", status="running")                              # whose process is gone
    busy = make(tmp_path, "c", status="running")
    make(tmp_path, "stranger", marker="another's")
    (tmp_path / "runs" / "link").symlink_to(busy)
    with written_to(busy):
        code, out, err = cleaned("list")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == "run status step best size age tag".split() and rows[-1][:2] == ["3", "runs,"]
    assert rows[1][:5] == ["runs/train_mult/a", "done", "7", "bpb", "2.2500"] and rows[1][-2:] == ["3d", "test"]
    assert rows[2][:3] == ["runs/train_mult/b", "killed", "3"] and rows[3][:3] == ["runs/train_mult/c", "running", "3"]
    assert len(rows) == 5 and [runs._as_age(seconds) for seconds in (59, 60, 86400)] == ["59s", "1m", "1d"]


def test_clean_only_says_what_it_would_do(tmp_path, cleaned):
    old = make(tmp_path, "old", tag="test", age=8)
    new, other = make(tmp_path, "new", tag="test", age=6), make(tmp_path, "other", tag="mine", age=9)
    code, out, _ = cleaned("clean", "--tag", "test", "--older_than", "7d")
    assert code == 0 and "runs/train_mult/old" in out and "new" not in out and "other" not in out
    assert "1 runs" in out and "would be removed" in out and old.exists()
    code, out, _ = cleaned("clean", "--tag=test", "--older-than=7d", "--yes")
    assert code == 0 and "1 runs removed" in out and not old.exists() and new.exists() and other.exists()


def test_clean_leaves_alone_what_is_not_ours_and_what_is_written(tmp_path, cleaned, monkeypatch):
    stranger, foreign = make(tmp_path, "stranger", "test", 9, marker=None), make(tmp_path, "f", "test", 9, marker="x")
    busy, outside = make(tmp_path, "busy", "test", 9), make(tmp_path / "elsewhere", "o", "test", 9)
    (tmp_path / "runs" / "train_mult" / "link").symlink_to(outside)
    (tmp_path / "runs" / "folder").symlink_to(outside.parent)
    kept = make(tmp_path, "held", "test", 9)
    (kept / "samples").symlink_to(outside)                             # a link inside a run that does go
    with written_to(busy):
        code, out, _ = cleaned("clean", "--tag", "test", "--older_than", "7d", "--yes")
        assert code == 0 and "runs/train_mult/busy is being written" in out and "1 runs removed" in out
    assert not kept.exists()
    assert all(len(list(place.iterdir())) >= 3 for place in (stranger, foreign, busy, outside))
    for place in (stranger, foreign, tmp_path / "runs", tmp_path / "runs" / "train_mult" / "link"):
        code, _, err = cleaned("clean", place, "--yes")
        assert code == 2 and err.startswith("error: ") and "is not the directory of a run" in err and place.exists()
        refused("not the directory", runs.remove_run, place)
    assert (outside / "params.json").exists()
    with monkeypatch.context() as patch:                               # it begins to be written after the look
        remove = runs.remove_run

        def busily(directory):
            with written_to(directory):
                remove(directory)
        patch.setattr(runs, "remove_run", busily)
        code, out, _ = cleaned("clean", "--tag", "test", "--yes")
        assert code == 0 and "another process is writing" in out and "0 runs removed" in out and busy.exists()
    assert cleaned("clean", busy, "--yes")[0] == 0 and not busy.exists()


@pytest.mark.parametrize("words, said", [
    ("clean", "which runs"), ("clean --older_than soon", "write 30m, 12h or 7d"), ("sweep", "invalid choice"),
    ("", "required"), ("clean --tags x", "unrecognized"), ("list --out_dir nowhere", "no such directory")])
def test_mistakes_of_runs(tmp_path, cleaned, words, said):
    make(tmp_path, "a")
    code, _, err = cleaned(*words.split())
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1
