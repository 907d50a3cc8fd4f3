"""train_dvae.py as it is typed: how a run goes, what it leaves, asked for codes. What all scripts share is in
test_resume.py."""
import functools
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


@pytest.fixture(scope="module")
def saved(base):
    """step -> its checkpoint."""
    return functools.cache(lambda step: load_checkpoint(base / f"step_{step:08d}.pt"))


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
    raw = list(map(json.loads, (base / "metrics.jsonl").read_text().splitlines()))
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


def test_average_of_the_weights(saved):
    """After each step average += (1 - d) (w - average), d = min(0.9, (1 + t) / (10 + t)), from the first weights on."""
    for t in (1, 11):
        old, new = saved(t), saved(t + 1)
        decay = min(0.9, (1 + t) / (10 + t))
        assert (old["ema"]["updates"], new["ema"]["updates"]) == (t, t + 1)
        for name, average in new["ema"]["weights"].items():
            wanted = old["ema"]["weights"][name].double() * decay + new["model"][name].double() * (1 - decay)
            if name != "codebook.codes":                     # revived after the average was taken
                torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=1e-5)


def test_dead_codes_are_revived(base, saved):
    """Those that nothing chose, every 4 steps and never between, in the first 0.8 of the run; counts begin anew."""
    revived, total = curve(base, "revived"), 0
    for step in range(1, 13):
        loop = saved(step)["loop"]
        assert loop["chosen"].sum() == step % 4 * 8 * 3 and loop.get("revived", 0) == revived[step - 1]
        if step % 4 == 0:
            assert (revived[step - 1] > total) == (step <= 9)
        else:
            assert revived[step - 1] == total
        total = revived[step - 1]
    before, after = saved(7), saved(8)
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
                           (dict(mask_rate="0,0"), "--mask_rate")):
        assert_error(forks.run(train(tmp_path / "runs", "--resume", **KEEP | settings), tmp_path), said)
        assert snapshot(copy) == before
    done(forks, tmp_path / "runs", "--resume", estimator="reinmax", max_steps=13, **KEEP)
    assert load_checkpoint(copy / "last.pt")["step"] == 13 and curve(copy, "tau")[-1] == 1


# --- Questions ---

def answers(forks, folder, *words):
    """The lines of JSON that a question prints."""
    child = forks.run(["train_dvae.py", "--out_dir", folder, "--run_name", "run", "--resume", *words], folder)
    assert_done(child)
    return [json.loads(line) for line in child.out.splitlines() if line[0] in "{[n"]


def test_the_averaged_weights_are_asked(forks, base, copy, tmp_path):
    """Whatever the raw weights: --eval_only prints the last figures, and draws; --encode says the same codes. Nothing
    else changes."""
    (tmp_path / "grid.json").write_text(json.dumps([[[1, 2], [3, 4]], [[5] * 5] * 5]))
    codes = answers(forks, tmp_path / "runs", "--encode", tmp_path / "grid.json")
    assert [row["shape"] for row in codes] == [[2, 2], [5, 5]]
    shutil.rmtree(copy / "samples")
    checkpoint = load_checkpoint(copy / "last.pt")
    raw = {name: w.flip(0) if w.dim() else w for name, w in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": raw}, copy / "last.pt")
    before = snapshot(copy)
    assert answers(forks, tmp_path / "runs", "--encode", tmp_path / "grid.json") == codes
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


@pytest.mark.parametrize("estimator, more", [("reinmax", {}), ("vq", dict(n_codes=9, vq_heads=2)), ("fsq", {}),
                                             ("lfq", {})])
def test_codes_of_grids_that_are_known_by_heart(estimator, more, forks, tmp_path):
    """What is learned is exact by hard codes; --encode says so, and --decode gives the grid back; of others one of the
    same shape. Nothing is written."""
    how = dict(n_codes=8) | more
    done(forks, tmp_path / "runs", "--no-symmetry", max_side=3, codebook_size=64, n_embd=32, n_train=8, max_steps=140,
         eval_interval=140, save_interval=140, colours="none", estimator=estimator, **how)
    exact = curve(at(tmp_path / "runs"), "exact")
    assert exact[-1] > 0.9 and exact[0] < 0.2
    known = load(max_side=3, n_train=8, n_val=1).train
    grids = [known.cells[i, :h, :w].tolist() for i, (h, w) in enumerate(known.shapes.tolist())] + [[[7]]]
    (tmp_path / "task.json").write_text(json.dumps({"train": [
        {"input": grids[i], "output": grids[i + 1]} for i in range(0, 8, 2)], "test": [{"input": grids[8]}]}))
    before = snapshot(tmp_path / "runs")
    found = answers(forks, tmp_path / "runs", "--encode", tmp_path / "task.json")
    assert [row["grid"] for row in found[:2]] == ["task train 0 input", "task train 0 output"]
    assert [row["shape"] for row in found] == [[len(grid), len(grid[0])] for grid in grids]
    assert {len(row["codes"]) for row in found} == {how["n_codes"]}
    assert all(0 <= code < 64 for row in found for code in row["codes"])
    codes = tmp_path / "codes.json"
    codes.write_text(json.dumps([row["codes"] for row in found]))
    written = answers(forks, tmp_path / "runs", "--decode", codes)
    assert [row["exact"] for row in found] == [grid == again for grid, again in zip(grids, written, strict=True)]
    assert sum(row["exact"] for row in found) >= 7
    assert [[len(grid), len(grid[0])] for grid in written] == [row["shape"] for row in found]
    assert snapshot(tmp_path / "runs") == before
