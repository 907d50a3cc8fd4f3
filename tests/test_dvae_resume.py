"""train_dvae.py as it is typed: how a run goes, what it leaves, asked for codes. What all scripts share is in
test_resume.py."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from data.arc import load
from nanolab.run import load_checkpoint
from forks import assert_done, assert_error, records, snapshot, summary
from scripts import KEEP, curve, of

train, at, done = of("train_dvae")
KEEP = KEEP["train_dvae"]


@pytest.fixture(scope="module")
def base(forks, tmp_path_factory):
    """A finished run with all its numbered checkpoints; tests work on copies."""
    folder = tmp_path_factory.mktemp("base")
    child = done(forks, folder, **KEEP)
    (folder / "out.txt").write_text(child.out)
    return at(folder)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


def test_what_a_run_leaves(base):
    """Settings, metrics with all their keys, pictures, and words for people."""
    params = json.loads((base / "params.json").read_text())
    assert params["settings"]["mask_rate"] == [0.0, 0.3] and params["script"] == "train_dvae"
    found = records(base)
    first, val, final = (next(line for line in found if wanted(line)) for wanted in (
        lambda line: line["split"] == "train", lambda line: line["split"] == "val", lambda line: "final" in line))
    for line, has in ((first, "loss nats exact kl masked lr tau noise hardness grad_norm kl_weight usage_weight "
                              "mask_rate revived"),
                      (val, "loss nats accuracy exact usage perplexity shape_accuracy soft_hard_gap dead_codes bits "
                            "code_bits codebook_norm_max grids"),
                      (final, "nmi nmi_floor mi mi_ceiling tc dwkl floor information_height gap_height chance_height")):
        assert set(has.split()) <= line.keys()
    assert "commitment" not in first and "nmi" not in val and found[-1] == final
    raw = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] > line["grids_per_s"] > 0 for line in raw if line["split"] == "train")
    assert curve(base, split="val") == [0, 6, 12] and curve(base) == list(range(1, 13))
    assert final["bits"] == 20 and first["kl_weight"] == 0 and first["lr"] == pytest.approx(5e-3 / 2)
    end = summary(base)
    assert end["status"] == "done" and end["val_exact"] == final["exact"] and end["hash"] in (
        base.parents[1] / "out.txt").read_text()
    assert {path.name for path in (base / "samples").iterdir()} == {
        f"{name}_{step:08d}.png" for name in ("step", "usage", "traversal") for step in (0, 6, 12)}
    assert (base / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((base / "tensorboard").iterdir())) == 1


def test_pairs_are_reported(forks, tmp_path):
    """On synthetic grids with whole pairs, what differs in them beside what differs between strangers: by --debug,
    which is tiny and short, where a flag wins."""
    child = forks.run(["train_dvae.py", "--debug", "--estimator=fsq", "--max_steps=3", "--n_val=60", "--eval_grids=1",
                       "--device=cpu", "--run_name=run", "--max_side=5"], tmp_path)
    assert_done(child)
    settings, final = (json.loads((at(tmp_path / "runs") / "params.json").read_text())["settings"],
                       records(at(tmp_path / "runs"))[-1])
    assert (settings["n_embd"], settings["max_steps"]) == (16, 3) and curve(at(tmp_path / "runs")) == [1, 2, 3]
    assert 0 <= final["pair_difference"] <= 1 and 0 <= final["random_pair_difference"] <= 1
    assert f"between input and output of {final['pairs']} pairs" in child.out and final["pairs"] > 1


def test_average_of_the_weights(base):
    """After each step average += (1 - d) (w - average), d = min(0.9, (1 + t) / (10 + t)), from the first weights on."""
    for t in (1, 6, 11):
        old, new = (load_checkpoint(base / f"step_{step:08d}.pt") for step in (t, t + 1))
        decay = min(0.9, (1 + t) / (10 + t))
        assert (old["ema"]["updates"], new["ema"]["updates"]) == (t, t + 1)
        for name, average in new["ema"]["weights"].items():
            wanted = old["ema"]["weights"][name].double() * decay + new["model"][name].double() * (1 - decay)
            if name != "codebook.codes":                     # revived after the average was taken
                torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=1e-5)


def test_dead_codes_are_revived(base):
    """Those that nothing chose, every 4 steps and never between, in the first 0.8 of the run; counts begin anew."""
    revived, total = curve(base, "revived"), 0
    for step in range(1, 13):
        loop = load_checkpoint(base / f"step_{step:08d}.pt")["loop"]
        assert loop["chosen"].sum() == step % 4 * 8 * 3 and loop.get("revived", 0) == revived[step - 1]
        if step % 4 == 0:
            assert (revived[step - 1] > total) == (step <= 9)
        else:
            assert revived[step - 1] == total
        total = revived[step - 1]
    before, after = (load_checkpoint(base / f"step_{step:08d}.pt") for step in (7, 8))
    dead = before["loop"]["chosen"] == 0
    moved = (after["model"]["codebook.codes"] - before["model"]["codebook.codes"]).norm(dim=1)
    lengths = after["model"]["codebook.codes"].norm(dim=1)
    new = revived[7] - revived[6]
    assert (moved > 0.3).sum() >= new - 2 > 0 and (moved > 0.3)[~dead].sum() == 0
    assert ((lengths - 1).abs() < 1e-5).sum() >= new


def test_weight_that_holds_the_kl(base):
    """One per cent a step at most, upwards while the KL is above its target of 2 bits."""
    weights, kls = curve(base, "kl_weight"), curve(base, "kl")
    for step in range(11):
        over = max(-1, min(1, kls[step] / (2 * math.log(2)) - 1))
        assert weights[step + 1] == pytest.approx(max(1e-4, weights[step]) * math.exp(0.01 * over), rel=1e-5)
    assert weights[0] == 0 and weights[-1] > 1e-4


# --- Flags on a resume ---

def test_another_estimator_on_resume(forks, copy, tmp_path):
    """One that draws from the same codebook goes on; another kind of codebook, and masks that were not, are refused."""
    before = snapshot(copy)
    for settings, said in ((dict(estimator="vq", kl_target="none"), "--estimator vq"),
                           (dict(estimator="fsq", kl_target="none"), "--estimator fsq"),
                           (dict(mask_rate="0,0"), "--mask_rate"),
                           (dict(estimator="reinmax", tau_end=0.5), "at least 1")):
        assert_error(forks.run(train(tmp_path / "runs", "--resume", **KEEP | settings), tmp_path), said)
        assert snapshot(copy) == before
    done(forks, tmp_path / "runs", "--resume", estimator="reinmax", max_steps=13, **KEEP)
    assert load_checkpoint(copy / "last.pt")["step"] == 13 and curve(copy, "tau")[-1] == 1
    done(forks, tmp_path / "plain", max_steps=1)
    assert_error(forks.run(train(tmp_path / "plain", "--resume", mask_rate="0,0.2"), tmp_path), "--mask_rate")


# --- Questions ---

def reversed_(weights):
    return {name: w.flip(0) if w.dim() else w for name, w in weights.items()}


def test_figures_of_a_trained_model(forks, base, copy, tmp_path):
    """--eval_only prints the last figures, of the average whatever the raw weights, and draws; nothing else changes."""
    shutil.rmtree(copy / "samples")
    checkpoint = load_checkpoint(copy / "last.pt")
    torch.save({**checkpoint, "model": reversed_(checkpoint["model"])}, copy / "last.pt")
    before = snapshot(copy)
    child = done(forks, tmp_path / "runs", "--resume", "--eval_only", **KEEP)
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before
    assert {str(name) for name in after.keys() - before.keys()} == {
        f"samples/{name}_00000012.png" for name in ("step", "usage", "traversal")}
    final, parting = records(base)[-1], "grids that were never seen"
    assert (f"5 {parting}: exact {final['exact']:.4f}, cells {final['accuracy']:.4f}, shapes "
            f"{final['shape_accuracy']:.4f}, usage {final['usage']:.0%}") in child.out
    assert child.out.split(parting)[1].splitlines()[:9] == (
        base.parents[1] / "out.txt").read_text().split(parting)[1].splitlines()[:9]


@pytest.fixture(scope="module")
def skilled(forks, tmp_path_factory):
    """A run with more codes than cells that knows some of its grids by heart, which are a task in a file."""
    folder = tmp_path_factory.mktemp("skilled")
    done(forks, folder, "--no-symmetry", max_side=3, n_codes=11, codebook_size=32, n_embd=32, n_train=30, batch_size=30,
         group=1, max_steps=100, eval_interval=100, save_interval=100, log_interval=20, colours="none")
    known = load(max_side=3, n_train=30, n_val=2).train
    rows = [known.cells[i, :h, :w].tolist() for i, (h, w) in enumerate(known.shapes.tolist())]
    task = {"train": [{"input": rows[i], "output": rows[i + 1]} for i in range(0, 18, 2)], "test": [{"input": [[7]]}]}
    (folder / "task.json").write_text(json.dumps(task))
    return folder


def answers(forks, folder, *words):
    """The lines of JSON that a question prints."""
    child = forks.run(["train_dvae.py", "--out_dir", folder, "--run_name", "run", "--resume", *words], folder)
    assert_done(child)
    return [json.loads(line) for line in child.out.splitlines() if line[0] in "{[n"]


def test_codes_of_grids_and_grids_of_codes(forks, skilled, tmp_path):
    """What --encode says is exact, --decode gives back; of others a grid of the same shape; nothing is written."""
    before = snapshot(skilled)
    found = answers(forks, skilled, "--encode", "task.json")
    task = json.loads((skilled / "task.json").read_text())
    grids = [pair[end] for part in task.values() for pair in part for end in pair]
    assert [row["grid"] for row in found[:2]] == ["task train 0 input", "task train 0 output"] and len(found) == 19
    assert [row["shape"] for row in found] == [[len(grid), len(grid[0])] for grid in grids]
    assert all(len(row["codes"]) == 11 and 0 <= min(row["codes"]) <= max(row["codes"]) < 32 for row in found)
    codes = tmp_path / "codes.json"
    codes.write_text(json.dumps([row["codes"] for row in found]))
    written = answers(forks, skilled, "--decode", codes)
    assert [row["exact"] for row in found] == [grid == again for grid, again in zip(grids, written, strict=True)]
    assert sum(row["exact"] for row in found) >= 3
    assert [[len(grid), len(grid[0])] for grid in written] == [row["shape"] for row in found]
    assert answers(forks, skilled, "--decode", ",".join(map(str, found[3]["codes"]))) == [written[3]]
    codes.write_text(json.dumps(found[3]["codes"]))
    assert answers(forks, skilled, "--decode", codes) == [written[3]]
    assert snapshot(skilled) == before


def test_questions_are_answered_by_the_averaged_weights(forks, copy, tmp_path):
    """As evaluated: other raw weights in the checkpoint change no answer, other averages do."""
    (tmp_path / "grid.json").write_text(json.dumps([[[1, 2], [3, 4]], [[5] * 5] * 5]))
    checkpoint = load_checkpoint(copy / "last.pt")
    raw, ema = reversed_(checkpoint["model"]), checkpoint["ema"]
    first = answers(forks, tmp_path / "runs", "--encode", tmp_path / "grid.json")
    assert [row["shape"] for row in first] == [[2, 2], [5, 5]]
    for changed in (dict(model=raw), dict(model=raw, ema={**ema, "weights": reversed_(ema["weights"])})):
        torch.save({**checkpoint, **changed}, copy / "last.pt")
        again = answers(forks, tmp_path / "runs", "--encode", tmp_path / "grid.json")
        assert (again == first) == ("ema" not in changed)


WRONG_GRIDS = {"large.json": json.dumps([[0] * 4]), "ragged.json": "[[1, 2], [3]]", "colour.json": "[[1, 10]]",
               "negative.json": "[[-1]]", "none.json": "{}", "text.json": "grid"}
WRONG_CODES = {"few.json": "[1, 2]", "float.json": json.dumps([0.5] * 11), "dict.json": "{}", "half.json": "[[1"}


def test_wrong_grids_and_codes(forks, skilled, tmp_path):
    """One line that says what is wrong, status 2, and nothing is written."""
    for name, content in (WRONG_GRIDS | WRONG_CODES).items():
        (tmp_path / name).write_text(content)
    before = snapshot(skilled)
    ask = ["train_dvae.py", "--out_dir", skilled, "--run_name", "run", "--resume"]
    for name in [*WRONG_GRIDS, "missing.json"]:
        assert_error(forks.run([*ask, "--encode", name], tmp_path), name.partition(".")[0])
    for codes in [*WRONG_CODES, ",".join("1" * 12), ",".join(["32"] * 11), ",".join(["-1"] * 11), ",".join("²" * 11)]:
        said = "half.json" if codes == "half.json" else "11 codes from 0 to 31"
        assert_error(forks.run([*ask, "--decode", codes], tmp_path), said)
    assert snapshot(skilled) == before
