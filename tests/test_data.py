"""What all of data/ promises: command lines, numbers out of range, and batches that are drawn by the seed alone, go on
exactly after a resume and notice data that changed under the same name."""
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from choices import raises_one_line

from data import arc, draw, facts, multiplication, smollm, text, tokens, video
from nanolab import tasks
from nanolab.run import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("data/*.py") if "\nmain = command(serve(" in path.read_text())

# --- Command lines ---

RUNS = [  # script, words, what it says, the picture it draws; FOLDER has the files of `folder`
    ("arc", "synthetic --n_train 200 --n_val 40 --max_side 6 --stats",
     ["train: 200 synthetic grids of 11 kinds", "val: 40 grids", "colour 0 in ", "best constant colour is right in"],
     "arc_synthetic.png"),
    ("arc", "synthetic --n_train 5 --n_val 2", ["train: 5 synthetic"], None),
    ("facts", "--n 50 --unseen 5 --stats",
     ["notes: 50 people to train on and 5 held out, of 16,777,216 names", "31.25 bits a person", "3.94% by",
      "user:      birth_date nopesomo ?", "* assistant: FIND birth_date FOR nopesomo <CALL>",
      "tool:      24/10/1997 <ANSWER>", "* assistant: 24/10/1997 <END>", "vocabulary closed: 210 tokens and 4 special",
      "vocabulary bytes: 256 tokens and 4 special", "natural: the closed vocabulary has no token",
      "in_tool, short: 18 to 22 tokens a dialog, 20.0 on average, 11.0 of them trained"], None),
    ("facts", "--n 5 --kind bios --alpha 0.5 --stats", ["bios: 5 people", "32.82 bits", "both, natural"], None),
    ("facts", "--n 5", ["notes: 5 people"], None),
    ("mqar", "--n_train 500 --n-test 20 --T 32 --vocab_size 64 --stats",
     ["500 training and 20 test rows of 32 tokens, 4 pairs", "vocabulary 64", "no fillers", "seed 0", "asked for",
      "accuracy of 0.250", "among all values 0.031", "are: ", " of 8 tokens", "of 16 tokens, 100.0% of 32 tokens\n"],
     None),
    ("mqar", "--n_train 500 --n_test 20 --random_non_queries", ["random fillers"], None),
    ("smollm", "FOLDER/two.jsonl --documents 3",
     ["two.jsonl: 66 bytes, 4 documents", "first 3 documents: 3 bytes on average, 8 at most, 1 empty, 0 held out"],
     None),
    ("text", "FOLDER/wiki --stats",
     ["split: train 142, val 8, test 8 bytes", "distinct bytes: 10\n", "articles (<page> to </page>): 3, of 50.0 bytes "
      "in the mean, 30.0 in the median"], "byte_distribution.png"),
    ("text", "FOLDER/wiki --max-bytes 100", ["split: train 90, val 5, test 5 bytes"], None),
    ("tokens", "train --kind bpe --dataset FOLDER/wiki --vocab_size 259 --out FOLDER/tok",
     ["trained on 142 bytes", "bpe: 259 ids, fingerprint ", "bytes a token, val: "], None),
    ("tokens", "show --tokenizer bytes --text ab", ["ids: 97 98\n", "pieces: 'a' 'b'\n"], None),
    ("tokens", "show --tokenizer bytes --dataset FOLDER/wiki",
     ["bytes a token, train: 1.000\nbytes a token, val: 1.000\nbytes a token, test: 1.000"], None),
    ("video", "--n_train 20 --n-val 4 --stats",
     ["gridworld: 20 training and 4", "20 episodes of 16 frames", "stay ", "nats", "% blocked", "PSNR of"],
     "video_gridworld.png"),
    ("video", "FOLDER/car.npz --stats", ["1 episode of 24 frames; copying", "1 episode of 6 frames",
                                        "of the pixels change by more than 0.05", "copying scores"], "video_car.png")]

MISTAKES = [  # script, words, what the line says
    ("arc", "arc3", ["arc3"]), ("facts", "--n x", ["--n"]), ("text", "stdlip", ["did you mean stdlib?"]),
    ("text", "stdlib --stat 3", []), ("text", "", ["dataset"]), ("tokens", "sow", ["sow"]),
    ("video", "gridwrold", ["unknown dataset", "did you mean gridworld?"]),
    ("video", "FOLDER/car.npz --stats --out FOLDER/none", ["cannot write"])]


@pytest.fixture
def folder(tmp_path):
    pages = [b"<page>" + b"x" * n + b"</page>" for n in (7, 17, 87)]
    (tmp_path / "wiki").write_bytes(b"0\n" + b"\n".join(pages) + b"\n<pa")
    lines = [json.dumps({"text": word}) + "\n" for word in ("a", "", "caf\u00e9 au", "b")]
    (tmp_path / "two.jsonl").write_text("".join(lines))
    frames = np.random.default_rng(0).integers(0, 256, (30, 16, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "car.npz", frames=frames, angle=np.linspace(-1, 1, 30))
    return tmp_path


def run(name, words, folder):
    importlib.import_module(f"data.{name}").main(words.replace("FOLDER", str(folder)).split())


@pytest.mark.parametrize("name, words, said, picture", RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_says_what_there_is(name, words, said, picture, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    run(name, words, folder)
    printed = capsys.readouterr().out
    assert [word for word in said if word not in printed] == []
    assert {path.name for path in folder.glob("*.png")} == ({picture} if picture else set())
    if picture:
        from matplotlib import image
        drawn = image.imread(folder / picture)[..., :3]
        assert drawn.std() > 0.05
        if name == "arc":
            seen = {tuple(pixel) for pixel in (255 * drawn.reshape(-1, 3)).round().astype(int).tolist()}
            assert {*arc.PALETTE} <= seen
    elif "--stats" not in words and name in ("arc", "facts", "mqar"):
        assert printed.count("\n") == 1 + (name == "arc")


@pytest.mark.parametrize("name, words, said", MISTAKES + [(name, "--nonsense 3", []) for name in SCRIPTS])
def test_a_mistake_is_one_line(name, words, said, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, words, folder)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", shown)
    assert [word for word in said if word not in shown] == []
    assert not list(folder.glob("*.png"))


def options(name):
    """[(the function, its option, the lowest number that its docstring allows)] of a script."""
    main = importlib.import_module(f"data.{name}").main
    words = {"smollm": ["x"], "text": ["x"], "tokens": ["show", "--tokenizer", "bytes"]}.get(name, [])
    return [(step, *found) for step in main.read(words)[0]
            for found in re.findall(r"^\s+(\w+): \[>= ([-\d]+)", step.__doc__, re.M)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_anywhere_and_names_its_options(name, tmp_path):
    words = ["show", "-h"] if name == "tokens" else ["-h"]
    done = subprocess.run([sys.executable, str(ROOT / f"data/{name}.py"), *words], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == "" and f"usage: data/{name}.py" in done.stdout
    assert all(f"--{option} " in done.stdout for _, option, _ in options(name))


NEEDED = {"text": {"dataset": "stdlib"}, "facts": {"n": 5, "seed": 0},
          "mqar": {"n_train": 5, "n_test": 5, "T": 64, "pairs": 4, "vocab_size": 256, "seed": 0}}
NAN = float("nan")


@pytest.mark.parametrize("name, step, option, value", [
    *((name, step, option, int(least) - 1) for name in SCRIPTS for step, option, least in options(name)
      if step.__name__ != "describe" and option not in ("shards", "T")),  # which count only of a subset; with the pairs
    *(("arc", arc.load, option, value) for option, value in (("max_side", 31), ("n_colours", 11))),
    *(("facts", facts.people, "alpha", value) for value in (1.1, -0.1, NAN)),
    *(("video", video.load, option, value) for option, value in (
        ("side", 27), ("cell_px", 257), ("walls", 1), ("walls", NAN), ("val_share", 0), ("val_share", 1)))])
def test_a_number_outside_the_range_is_refused_by_the_function_too(name, step, option, value):
    with raises_one_line(f"{option} is {value}" if option != "unseen" else "unseen -1"):
        step(**{**NEEDED.get(name, {}), option: value})


# --- Batches ---

DATA = torch.randint(256, (1009,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
BEGINS = torch.arange(0, 1009, 21)
DOCUMENTS = [f"document {i} " + "n\u00e9\U0001f642\n\t " * (i % 5) + "x" * (i * 7 % 40) for i in range(90)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return [path]


def of_text(word, shards, seed, **given):
    settings = dict(data=DATA, batch_size=4, block_size=16, n_targets=2, mode=word, begins=BEGINS) | given
    return text.Batches(seed=seed, **settings)


def of_shards(shards, seed, **given):
    settings = {"tokenizer": tokens.Bytes(), "batch_size": 2, "block_size": 50, **given}
    return smollm.Batches(shards, seed=seed, **settings)


@pytest.fixture(autouse=True)
def read_twenty_together(monkeypatch):
    monkeypatch.setattr(smollm, "BUFFER", 20)


def of_rows(shards, seed, **given):
    return tasks.Rows(**{"x": DATA[:99].view(33, 3), "y": DATA[100:199].view(33, 3), "batch_size": 8, "device": "cpu",
                         "seed": seed, **given})


def of_multiplication(seed):
    """By the step of batches of 8."""
    stream = multiplication.Stream(torch.arange(80).view(40, 2), seed)
    return SimpleNamespace(at=lambda step: stream.at(8 * step, 8))


STATES = {**{mode: functools.partial(of_text, mode) for mode in ("random", "epochs", "streams", "documents")},
          "shards": of_shards, "rows": of_rows}
GRIDS = functools.cache(lambda: arc.load(n_train=40, n_val=2, max_side=6).train)
CLIPS = functools.cache(lambda: video.load(n_train=20, n_val=2, length=5).train)
STREAMS = {"arc": lambda seed: arc.Stream(GRIDS(), 8, seed, group=3), "multiplication": of_multiplication,
           "video": lambda seed: video.Stream(CLIPS(), 3, 8, seed)}


def flat(batch):
    return torch.cat([part.flatten().long() for part in ((batch,) if torch.is_tensor(batch) else batch)])


def several(name, shards, seed):
    """A function that gives so many batches, in order."""
    if name in STATES:
        batches = STATES[name](shards, seed)
        return lambda n: [flat(batches.next()) for _ in range(n)]
    stream = STREAMS[name](seed)
    return lambda n: [flat(stream.at(step)) for step in range(n)]


@pytest.mark.parametrize("name", [*STATES, *STREAMS])
def test_batches_follow_their_seed_and_leave_torch_s_generator_alone(name, shards):
    torch.manual_seed(0)
    draws, before = [several(name, shards, seed) for seed in (1, 1, 2)], torch.get_rng_state()
    first = draws[0](20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, draws[1](20)))
    assert all(map(torch.equal, first, draws[2](20))) == (name == "streams")  # whose places nothing draws


@pytest.mark.parametrize("name", STREAMS)
def test_a_step_says_its_batch(name):
    """In any order, twice, and in every epoch another."""
    stream, again, steps = STREAMS[name](3), STREAMS[name](3), [0, 9, 3, 17, 4, 3, 0, 30, 16]
    first = {step: flat(stream.at(step)) for step in steps}
    for step in sorted(first):
        assert torch.equal(flat(again.at(step)), first[step]), step
    assert len({tuple(batch.tolist()) for batch in first.values()}) == len(first)
    assert len({int(flat(STREAMS[name](seed).at(0))[0]) for seed in range(4)}) > 1  # where it starts, too


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("before", [0, 15, 16, 60])  # within, at and across the end of a pass
def test_resumed_batches_go_on_exactly(name, before, shards, tmp_path):
    straight = STATES[name](shards, 8)
    for _ in range(before):
        straight.next()
    state = straight.state_dict()
    torch.save(state, tmp_path / "state.pt")
    resumed = STATES[name](shards, 99)
    resumed.next()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(40):
        assert resumed.epoch == straight.epoch
        assert getattr(resumed, "fresh", None) == getattr(straight, "fresh", None)
        assert all(map(torch.equal, resumed.next(), straight.next()))
    for key, value in torch.load(tmp_path / "state.pt", weights_only=True).items():  # going on changed it not
        assert torch.equal(state[key], value) if torch.is_tensor(value) else state[key] == value, key


@pytest.mark.parametrize("name, other, words", [
    ("streams", dict(mode="epochs"), "mode streams, these have epochs"),
    ("streams", dict(data=DATA[:900]), "bytes 1009, these have 900"),
    ("epochs", dict(data=DATA + 1), "fingerprint of the data"),
    ("random", dict(data=torch.cat([DATA[:-1], DATA[-1:] + 1])), "fingerprint of the data"),
    ("streams", dict(block_size=8), "block_size 16, these have 8"), ("random", dict(n_targets=1), "n_targets 2"),
    ("streams", dict(batch_size=5), "batch_size 4, these have 5"),
    ("documents", dict(begins=BEGINS + 1), "fingerprint of the documents"),
    ("shards", dict(tokenizer=tokens.train("bpe", "ab" * 9, 257)), "tokenizer")],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value)
def test_a_state_of_other_batches_is_refused(name, other, words, shards):
    state = STATES[name](shards, 0).state_dict()
    with raises_one_line(f"saved batches have {words}"):
        STATES[name](shards, 0, **other).load_state_dict(state)


def test_a_fingerprint_has_both_ends_of_a_long_text():
    for place in (0, -1):
        data = DATA.repeat(9)
        state = text.Batches(data, 4, 16).state_dict()
        data[place] += 1
        with raises_one_line("fingerprint of the data"):
            text.Batches(data, 4, 16).load_state_dict(state)


@pytest.mark.parametrize("change, words", [
    (lambda path: path.rename(path.with_name("b.jsonl")), "files a.jsonl, these have b.jsonl"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b"document 7 ", b"dokument 7 ")) and path, "fingerprint"),
    (lambda path: path.write_bytes(path.read_bytes() + b'{"text": "more"}\n') and path, "documents 90, these have 91")])
def test_shards_that_changed_are_noticed(change, words, shards, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(shards[0].read_bytes())
    state, changed = STATES["shards"]([path], 0).state_dict(), change(path)
    with raises_one_line(words):
        STATES["shards"]([changed], 0).load_state_dict(state)
    state.pop("fingerprint of the data")  # of a checkpoint from before there was one
    STATES["shards"](shards, 0).load_state_dict(state)


@pytest.mark.parametrize("size", ["batch_size", "block_size", "n_targets"])
@pytest.mark.parametrize("name", ["random", "epochs", "streams"])
def test_sizes_below_one(name, size, shards):
    with pytest.raises(UserError, match=f"{size} 0.*at least 1"):
        STATES[name](shards, 0, **{size: 0})


# --- The hash that everything is drawn from: figures that must never change ---

def test_known_draws():
    assert draw.numpy_generator("mqar", "test", 0, 0).random() == 0.7858773239592972
    assert torch.randint(10 ** 9, (), generator=draw.torch_generator(0, "clips", 0)).item() == 907158413
    assert [hex(h) for h in draw.pair_hash([0, 123], [1, 456], 7, 1).tolist()] == [
        "0xecf5970337fcf2a6", "0x428da3959fabf5b7"]
    hashes = draw.mix(np.arange(100_000, dtype=np.uint64))
    assert not draw.chance(hashes, 0).any() and draw.chance(hashes, 1).all()
    assert abs(draw.chance(hashes, 0.05).mean() - 0.05) < 0.003


def test_the_first_rows_of_chunks():
    def chunks():
        for start in range(0, 1000, 10):
            rows = np.arange(start, start + 10)
            yield list(map(str, rows)), rows, -rows
    (rows, others), keys, left_out = draw.first(12, chunks(), {"0", "3", "11", "40"}, "")
    assert rows.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14] == (-others).tolist() == list(map(int, keys))
    assert left_out == 3
    few = {f"{i}" for i in range(1000) if i % 60}  # one row of 60 is new: fewer than one of 25
    with raises_one_line("hardly any"):
        draw.first(3, chunks(), few, "hardly any")
