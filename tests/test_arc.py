"""data/arc.py: tokens, symmetries and batches beside slow ones, synthetic grids with true factors and rules, the
files of ARC found, fetched, checked and split so that no task or grid is on both sides. No network."""
import gzip
import io
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from choices import raises_one_line

from data import arc, files
from data.arc import OUTSIDE, Canvas, Grids, Stream, augment, canonical, load
from data.synthetic import FACTORS, KINDS, RULES

pytestmark = pytest.mark.usefixtures("one_thread")
real_data = pytest.mark.skipif(not Path(os.environ.get("NANOLAB_DATA") or "/nowhere").is_dir(),
                               reason="NANOLAB_DATA names no folder")


def canvases(grids, side):
    """Lists of rows -> cells and shapes, tensors."""
    return tuple(map(torch.from_numpy, arc.canvases(grids, side)))


def noise(n, side, n_colours=10, seed=0, smallest=1):
    """n grids of random shapes and colours: lists of rows."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(smallest, side + 1, (n, 2))
    return [rng.integers(0, n_colours, shape).tolist() for shape in shapes]


def rows_of(grids, i):
    height, width = grids.shapes[i].tolist()
    return grids.cells[i, :height, :width].tolist()


def images(grid):
    """The 8 symmetric images of a list of rows, the plain way."""
    turned = [np.rot90(grid, k) for k in range(4)]
    return [image.tolist() for one in turned for image in (one, one[::-1])]


def slow_canonical(grid):
    """The smallest image after numbering the colours by their first place: the definition, one grid at a time."""
    found = []
    for image in images(grid):
        cells = sum(image, [])
        found.append((len(image), len(image[0]), [list(dict.fromkeys(cells)).index(cell) for cell in cells]))
    return min(found)


# --- Tokens ---


@pytest.mark.parametrize("side", [1, 5])
def test_tokens_round_trip_for_every_shape(side):
    rng, canvas = np.random.default_rng(0), Canvas(side, 4)
    grids = [rng.integers(0, 4, (h, w)).tolist() for h in range(1, side + 1) for w in range(1, side + 1)]
    cells, shapes = canvases(grids, side)
    tokens = canvas.tokens(cells)
    assert tokens.dtype == torch.int64 and torch.equal(canvas.shapes(tokens), shapes)
    assert torch.equal(canvas.cut(tokens, shapes), cells) and canvas.cut(tokens, shapes).dtype == torch.uint8
    for n_colours, masked, ids in ((10, False, (10, 11, None, 12, 12)), (3, True, (3, 4, 5, 5, 6))):
        canvas = Canvas(side, n_colours, masked)
        assert (canvas.pad, canvas.eos, canvas.mask, canvas.n_outputs, canvas.n_tokens) == ids


def test_a_canvas_that_forms_no_grid():
    canvas = Canvas(4, 3, masked=True)
    good, wide = canvas.tokens(canvases([[[0, 1], [2, 0]], [[1, 1, 0, 2]]], 4)[0])
    assert good.tolist() == [[0, 1, 4, 3], [2, 0, 4, 3], [3] * 4, [3] * 4]
    assert wide.tolist() == [[1, 1, 0, 2], [3] * 4, [3] * 4, [3] * 4]
    changes = [(0, 1, canvas.pad), (1, 1, canvas.mask), (1, 1, canvas.eos), (1, 2, canvas.pad), (1, 2, 0), (3, 3, 0),
               (2, 0, 1), (2, 2, canvas.eos), (0, 3, canvas.eos), (0, 0, canvas.pad), (0, 0, canvas.eos), (0, 1, -1),
               (0, 2, canvas.pad), (1, 0, canvas.pad)]  # holes, ends too early or missing, colours outside, two ends
    bad = torch.cat([good.repeat(len(changes), 1, 1), torch.full((1, 4, 4), canvas.pad)])
    for tokens, (row, column, token) in zip(bad, changes):
        tokens[row, column] = token
    assert canvas.shapes(good[None]).tolist() == [[2, 2]] and canvas.shapes(bad).tolist() == [[0, 0]] * len(bad)


# --- Symmetries and colours ---

def test_canonical_agrees_with_its_definition():
    grids = noise(300, 3, 3) + noise(40, 5) + [[[0]], [[7]], [[0, 0]], [[0], [0]], [[0, 1]]]
    keys, slow = canonical(*canvases(grids, 5)), [str(slow_canonical(grid)) for grid in grids]
    assert all(isinstance(key, bytes) for key in keys)
    assert len({*keys}) == len({*slow}) == len({*zip(keys, slow)}) > 100  # equal where they are equal
    for grid in grids[:20]:
        assert len({*canonical(*canvases(images(grid), 5))}) == 1
    assert canonical(torch.zeros(0, 3, 3, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64)) == []


@pytest.mark.parametrize("colours, symmetry, n_colours", [
    ("all", True, 10), ("keep_zero", True, 10), ("none", True, 10), ("all", False, 10), ("all", True, 4)])
def test_augmented_grids_stay_in_their_orbit(colours, symmetry, n_colours):
    cells, shapes = canvases(noise(300, 6, n_colours), 6)
    before = cells.clone()
    new, new_shapes = augment(cells, shapes, torch.Generator().manual_seed(0), colours, symmetry, n_colours)
    assert torch.equal(cells, before) and new.dtype == torch.uint8 and new_shapes.dtype == torch.int64
    assert canonical(new, new_shapes) == canonical(cells, shapes)
    assert torch.equal(Canvas(6).shapes(Canvas(6).tokens(new)), new_shapes)  # in the corner, and OUTSIDE elsewhere
    turned, inside = (new_shapes != shapes).any(1), new != OUTSIDE
    assert turned.any() == symmetry and torch.equal(new_shapes[turned], shapes[turned].flip(1))
    assert (new[inside] < n_colours).all()
    assert colours != "keep_zero" or torch.equal((new == 0).sum((1, 2)), (cells == 0).sum((1, 2)))
    if colours == "none":
        for one, h, w, other, height, width in zip(new, *new_shapes.T, cells, *shapes.T):
            assert one[:h, :w].tolist() in images(other[:height, :width].tolist())
    if not symmetry:
        assert torch.equal(inside, cells != OUTSIDE) and (new != cells)[inside].float().mean() > 0.8


def test_augment_is_uniform_and_follows_its_generator():
    grid = [[0, 1, 2], [3, 4, 5]]
    cells, shapes = (x.repeat(4000, *[1] * (x.dim() - 1)) for x in canvases([grid], 4))

    def draw(**given):
        return augment(cells, shapes, torch.Generator().manual_seed(0), **given)
    seen = Counter(str(new[:h, :w].tolist()) for new, (h, w) in zip(*draw(colours="none")))
    assert {*seen} == {str(image) for image in images(grid)} and min(seen.values()) > 400  # of 8: 500 +- 21
    new, zero = draw(symmetry=False)[0], draw(symmetry=False, colours="keep_zero")[0]
    for i, j in ((0, 0), (1, 2)):  # each cell's colour: 400 +- 19 of each
        assert torch.bincount(new[:, i, j].long(), minlength=10).sub(400).abs().max() < 100
    assert (zero[:, 0, 0] == 0).all() and {*zero[:, 1, 2].tolist()} == {*range(1, 10)}
    assert {*draw(symmetry=False, n_colours=6)[0][:, 1, 2].tolist()} == {*range(6)}
    assert all(map(torch.equal, draw(colours="none", symmetry=False), (cells, shapes)))


# --- Batches ---

def some_grids(n, side=6):
    cells, shapes = canvases(noise(n, side), side)
    return Grids(cells, shapes, [str(i) for i in range(n)], torch.zeros(0, 2, dtype=torch.int64), {}, [""] * n)


@pytest.mark.parametrize("n, size, group", [(40, 8, 1), (40, 8, 5), (7, 20, 2), (1, 5, 3)])
def test_every_grid_comes_once_in_an_epoch(n, size, group):
    grids = some_grids(n)
    stream = Stream(grids, size, 3, group=group)
    rows = torch.cat([stream.rows(step) for step in range(4 * group)])
    for epoch in rows[:len(rows) // n * n].view(-1, n):
        assert n % size or sorted(epoch.tolist()) == [*range(n)]
    counts = torch.bincount(rows, minlength=n)
    assert len(rows) == 4 * group * size and counts.max() - counts.min() <= 1
    assert n == 1 or not torch.equal(rows[:n], rows[n:2 * n][:n])
    torch.testing.assert_close(stream.at(2)[1].prod(1), grids.shapes[stream.rows(2)].prod(1))


def test_a_batch_has_grids_of_similar_area():
    """And within a group batches come in a random order."""
    grids = some_grids(2000, 8)
    areas = grids.shapes.prod(1).double()
    plain, alike = (torch.stack([areas[stream.rows(step)] for step in range(48)]) for stream in (
        Stream(grids, 32, 0, group=group) for group in (1, 8)))
    assert alike.std(1).mean() < 0.35 * plain.std(1).mean() and plain.std(1).mean() > 0.85 * areas.std()
    means = alike.mean(1).view(-1, 8)
    assert len({tuple(row.argsort().tolist()) for row in means} | {(*range(8),)}) == len(means) + 1


# --- Synthetic grids ---

@pytest.fixture(scope="module")
def synthetic():
    return load(n_train=3000, n_val=300)


def test_synthetic_grids_are_the_same_everywhere(synthetic):
    assert synthetic.hash == "07a15cd5b570", "other grids than before: earlier results do not compare"
    again = load(n_train=300, n_val=300)
    assert torch.equal(again.val.cells, synthetic.val.cells) and again.val.names == synthetic.val.names
    assert torch.equal(again.train.cells, synthetic.train.cells[:300])
    assert again.hash != synthetic.hash and f"hash {again.hash}" in again.source
    other = load(n_train=50, n_val=50, seed=1)
    assert not torch.equal(other.val.cells, synthetic.val.cells[:50])
    assert not torch.equal(other.val.cells, other.train.cells)


def components(grid, background):
    """How many groups of touching cells (corners too) are not background."""
    left = {(i, j) for i, row in enumerate(grid) for j, cell in enumerate(row) if cell != background}
    found = 0
    while left:
        found, edge = found + 1, [left.pop()]
        while edge:
            i, j = edge.pop()
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
    return found


def test_factors_are_true(synthetic):
    checked = Counter()
    assert {*synthetic.train.factors} == {*FACTORS}
    for side in (synthetic.train, synthetic.val):
        for i, values in enumerate(zip(*(column.tolist() for column in side.factors.values()))):
            grid, f = rows_of(side, i), dict(zip(side.factors, values))
            array, flat, kind = np.array(grid), [cell for row in grid for cell in row], KINDS[f["kind"]].__name__
            where = f"{side.names[i]}: {f} {grid}"
            assert f" {kind} " in side.names[i] and side.names[i].split()[2] == side.tasks[i], where
            assert (f["height"], f["width"], f["n_colours"]) == (*array.shape, len({*flat})), where
            across, down = (array == array[:, ::-1]).all(), (array == array[::-1]).all()
            diagonal = array.shape[0] == array.shape[1] and (array == array.T).all()
            assert f["symmetry"] == (3 if across and down else 1 if across else 2 if down else 4 * diagonal), where
            background, p = f["background"], f["period"]
            counts = Counter(cell for cell in flat if cell != background)
            assert background in (*flat, -1) and counts[f["colour"]] == max(counts.values()), where
            if p > 0:
                assert (array[p:] == array[:-p]).all() and (array[:, p:] == array[:, :-p]).all(), where
            if f["count"] > 0 and background >= 0:
                marked = array != background
                tracks = [{*track.tolist()} for i, j in [np.nonzero(marked)] for track in (i, j, i - j, i + j)]
                true = {"scattered": [marked.sum()], "lines": [*map(len, tracks)], "fields": (2, 3, 4)}
                assert f["count"] in true.get(kind, [components(grid, background)]), where
                checked[kind] += 1
                if f["count"] == 1:
                    found = (*(axis.min() for axis in np.nonzero(marked)), marked.sum())
                    assert (f["row"], f["column"], f["size"]) == found, where
                    checked["one object"] += 1
            if f["count"] != 1:
                assert f["row"] == f["column"] == f["size"] == -1, where
            assert kind != "mirrored" or f["rule"] >= 0 or f["symmetry"] > 0, where
    assert min(checked.values()) > 50 and {*checked} == {
        *"rectangles outlines sprites crosses scattered lines fields".split(), "one object"}, checked


def test_synthetic_pairs_follow_their_rules(synthetic):
    side, seen = synthetic.train, Counter()
    rules = side.factors["rule"].tolist()
    for first, second in side.pairs.tolist():
        assert side.names[first].removesuffix("input") == side.names[second].removesuffix("output")
        assert side.tasks[first] == side.tasks[second] and rules[first] == rules[second] >= 0
        before, after = np.array(rows_of(side, first)), np.array(rows_of(side, second))
        background, rule = side.factors["background"][first].item(), RULES[rules[first]]
        marked, half = before != background, (before.shape[1] + 1) // 2
        seen[rule] += 1
        if rule == "fall":
            assert all(column.tolist() == sorted(column, key=lambda cell: cell != background) for column in after.T)
            assert ((after != background).sum(0) == marked.sum(0)).all()
        elif rule == "frame":
            assert len({*after[0], *after[-1], *after[:, 0], *after[:, -1]}) == 1
            assert (after[1:-1, 1:-1] == before[1:-1, 1:-1]).all()
        elif rule == "trim":
            (top, left), (bottom, right) = (np.argwhere(marked).min(0), np.argwhere(marked).max(0))
            assert (after == before[top:bottom + 1, left:right + 1]).all() and after.size < before.size
        elif rule == "unify":
            assert ((after != background) == marked).all() and len({*after[marked].tolist()}) == 1
        else:
            assert (after == after[:, ::-1]).all() and (after[:, :half] == before[:, :half]).all()
    assert len(side.pairs.unique(dim=0)) == len(side.pairs) and {*seen} == {*RULES}
    assert 0.12 < 2 * len(side.pairs) / len(side) < 0.28


@pytest.mark.parametrize("max_side, n_colours, n", [(8, 10, None), (2, 4, 3), (30, 10, 20)])
def test_synthetic_sides_share_no_grid(max_side, n_colours, n, synthetic):
    found = load(max_side=max_side, n_colours=n_colours, n_train=n, n_val=n) if n else synthetic
    keys, canvas = [], Canvas(max_side, n_colours)
    for side in (found.train, found.val):
        assert len(side) == n or not n and side.cells.shape == (len(side), max_side, max_side)
        assert {*side.cells.unique().tolist()} - {OUTSIDE} <= {*range(n_colours)}
        assert torch.equal(canvas.shapes(canvas.tokens(side.cells)), side.shapes) and side.shapes.min() > 0
        keys += canonical(side.cells, side.shapes)
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize("given, words", [
    (dict(max_side=1, n_train=1, n_val=5), ("for val with max_side 1", "smaller n_val")),
    (dict(max_side=2, n_colours=2, n_train=1000, n_val=5), ("for train with max_side 2 and n_colours 2", "is 1,000"))])
def test_more_synthetic_grids_than_there_are(given, words):
    with raises_one_line("hardly more than", *words):
        load(**given)


# --- ARC's files ---

def task(*grids):
    """A task of one training pair and test pairs: grids in the order input, output, input, output, ..."""
    pairs = [{"input": a, "output": b} for a, b in zip(grids[::2], grids[1::2])]
    return {"train": pairs[:1], "test": pairs[1:]}


def fake_sets():
    """Small tasks for the sets: {name: tasks}. Of arc1 no two grids are the same, of arc2 and arc1 two tasks are."""
    big = noise(1, 12, 3, seed=9, smallest=12)[0]
    first = {"a": task([[0, 1, 2]], [[1], [1], [1], [1]], big, [[2, 9]]),
             "b": task([[5, 5, 5, 5, 6]], [[1, 2], [1, 1]])}
    second = {"c": task([[0, 1], [2, 3]], [[0, 1, 0]]),
              "d": task([[4, 4], [4, 4]], [[0, 1, 1, 0]], big, [[3, 3, 3, 0]])}
    return {"arc1-training": first, "arc1-evaluation": second, "arc2-training": {**first, "d": second["d"]},
            "arc2-evaluation": {"e": task([[1, 1, 2, 2, 3]], [[0, 1], [0, 2]])}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A NANOLAB_DATA with the fake sets, in whose place the module's table expects just these; no network."""
    given = tmp_path / "given"
    given.mkdir()
    monkeypatch.setenv("NANOLAB_DATA", str(given))
    monkeypatch.setattr(files, "DOWNLOADS", tmp_path / "downloads")
    table = {}
    for name, tasks in fake_sets().items():
        file, _, digest, repository, part = arc.SETS[name]
        table[name] = (file, len(tasks), digest and arc._digest(tasks), repository, part)
        (given / f"{file}.gz").write_bytes(gzip.compress(json.dumps(tasks).encode()))
    monkeypatch.setattr(arc, "SETS", table)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return given


def write(monkeypatch, folder, name, content, expected=True):
    """Writes tasks, or bytes, as a set's file; the module's table then expects them. Returns the path."""
    file, *_, repository, part = arc.SETS[name]
    if expected:
        monkeypatch.setitem(arc.SETS, name, (file, len(content), arc._digest(content), repository, part))
    path = folder / f"{file}.gz"
    path.write_bytes(gzip.compress(content if isinstance(content, bytes) else json.dumps(content).encode()))
    return path


def test_grids_pairs_and_names_of_arc(folder):
    found = load("arc1", max_side=5, crops=0)
    train, val = found.train, found.val
    assert train.names == [f"arc1-training {rest}" for rest in (
        "a train 0 input", "a train 0 output", "a test 0 output", "b train 0 input", "b train 0 output")]
    assert train.tasks == ["a", "a", "a", "b", "b"] and train.factors == {}
    assert rows_of(train, 0) == [[0, 1, 2]] and rows_of(train, 1) == [[1]] * 4
    assert train.shapes.tolist() == [[1, 3], [4, 1], [1, 2], [1, 5], [2, 2]]
    assert train.pairs.tolist() == [[0, 1], [3, 4]]  # the pair with a large input is not whole
    assert val.pairs.tolist() == [[0, 1], [2, 3]] and len(val) == 5
    assert train.cells.dtype == torch.uint8 and train.pairs.dtype == train.shapes.dtype == torch.int64
    assert load("arc1+arc1-training", "arc1-evaluation", max_side=5, crops=0).hash == found.hash
    assert load("arc1", max_side=5, crops=0, n_colours=7).train.names == [
        name for name in train.names if "a test" not in name]  # [[2, 9]] has a colour above 6
    joined = load("arc1+arc2", "arc2-evaluation", max_side=5, crops=0)
    assert {name.split()[0] for name in joined.train.names} == {"arc1-training", "arc2-training"}


def test_repeated_and_held_out_grids_are_dropped(folder, monkeypatch):
    tasks = {"a": task([[0, 1, 2]], [[3, 4, 5]], [[0, 1, 2]], [[1, 1, 2]]),  # 345 is 012 in other colours, 112 is 010's
             "b": task([[7], [8], [7]], [[0, 3], [1, 2]])}  # both are validation grids turned and recoloured
    write(monkeypatch, folder, "arc1-training", tasks)
    found = load("arc1", max_side=5)
    assert found.train.names == [f"arc1-training a {rest}" for rest in ("train 0 input", "test 0 output")]
    assert found.train.pairs.tolist() == [[0, 1]]  # 012 stands for itself again, but 345 is not in
    train, _ = found.source.splitlines()
    assert "2 grids of 1 of 2 tasks" in train and "2 dropped as repeated, 2 as in val" in train
    write(monkeypatch, folder, "arc1-evaluation", {"c": tasks["a"], "d": tasks["a"]})
    found = load("arc1", max_side=5)
    assert len(found.val) == 2 and found.val.pairs.tolist() == [[0, 1]] and len(found.train) == 2
    write(monkeypatch, folder, "arc1-evaluation", {"c": tasks["a"], "d": tasks["b"]})
    with raises_one_line("arc1-training has no grid", "not in the validation set"):
        load("arc1", max_side=5)


def test_crops_are_pieces_of_larger_training_grids(folder):
    found = load("arc1", max_side=4, crops=30)
    train, big = found.train, np.array(fake_sets()["arc1-training"]["a"]["test"][0]["input"])
    crops = [i for i, name in enumerate(train.names) if "crop" in name]
    from_big = [i for i in crops if re.fullmatch(r"arc1-training a test 0 input crop \d+", train.names[i])]
    assert len(from_big) > 20 and {train.tasks[i] for i in from_big} == {"a"}
    for i in from_big:
        piece = np.array(rows_of(train, i))
        assert (np.lib.stride_tricks.sliding_window_view(big, piece.shape) == piece).all((2, 3)).any()
    assert {*train.shapes[from_big].flatten().tolist()} == {3, 4}
    narrow = [i for i in crops if "b train 0 input" in train.names[i]]  # a row of five: as high as it is
    assert {train.shapes[i, 0].item() for i in narrow} == {1}
    assert f"{len(crops)} of the grids are crops (30 of each" in found.source
    keys = canonical(train.cells, train.shapes)
    assert len(keys) == len({*keys}) and not {*keys} & {*canonical(found.val.cells, found.val.shapes)}
    assert load("arc1", max_side=4, crops=30).hash == found.hash != load("arc1", max_side=4, crops=30, seed=1).hash
    assert not any("crop" in name for name in [*found.val.names, *load("arc1", max_side=4, crops=0).train.names])
    assert load("arc1", max_side=4, n_colours=3, crops=30).train.cells.unique().tolist() == [0, 1, 2, OUTSIDE]


REFUSED = [  # dataset and val_dataset, what the line says
    ("arc2 arc1-evaluation", ["arc2-training and arc1-evaluation share 1 of 2 tasks (d)", "must not be scored"]),
    ("arc1 arc1", ["arc1-training and arc1-training share 2 of 2 tasks (a, b)"]),
    ("arc1+arc2 arc2-evaluation+arc1-evaluation", ["arc2-training and arc1-evaluation share"]),
    ("syntetic", ["dataset 'syntetic'", "did you mean synthetic?"]), ("mnist", ["choose synthetic, arc1-training"]),
    ("arc1 arc1-evalaution", ["val_dataset 'arc1-evalaution'", "did you mean arc1-evaluation?"]),
    ("arc1+", ["dataset ''"]), ("synthetic+arc1", ["synthetic+arc1: synthetic grids cannot be mixed"]),
    ("synthetic arc1-evaluation", ["cannot be mixed"]), ("arc1 synthetic", ["cannot be mixed"]),
    ("arc1+arc2", ["arc1+arc2 has no usual validation set", "--val_dataset"])]


@pytest.mark.parametrize("given, words", REFUSED, ids=range(len(REFUSED)))
def test_names_that_do_not_fit(folder, given, words):
    with raises_one_line(*words):
        load(*given.split())


def test_numbers_that_leave_nothing(folder):
    with raises_one_line("n_colours is 1", "least 2"):
        load(n_colours=1)
    with raises_one_line("arc1-evaluation has no grid with sides up to 1", "larger max_side"):
        load("arc1", max_side=1)


@pytest.mark.parametrize("grid, words", [
    ([[0, 10]], "the value 10, and colours are 0 to 9"), ([[1.0]], "the value 1.0"), ([[True]], "the value True"),
    ([["1"]], "the value '1'"), ([[0, 1], [0]], "one length"), ([[]], "one length from 1 to 30"), ([], "1 to 30 rows"),
    ([[0]] * 31, "1 to 30 rows"), ([[0] * 31], "one length from 1 to 30"), (None, "1 to 30 rows"), ([0, 1], "30 rows")])
def test_what_is_no_grid(grid, words):
    assert words in arc.wrong(grid) and not arc.wrong([[0, 9] * 15] * 30)


def test_files_that_are_not_the_set(folder, monkeypatch):
    good = fake_sets()["arc1-training"]
    changed = json.loads(json.dumps(good))
    changed["a"]["train"][0]["input"][0][0] = 3
    for content, *words in (
            (b"{", "no JSON"), (b"\xff\xfe{}", "no JSON"), ([], "no table of tasks"),
            ({"a": good["a"]}, "it has 1 tasks"),
            ({"a": good["a"], "b": {"train": [], "test": [5]}}, "task b has no list of test pairs"),
            ({"a": good["a"], "b": task([[1]], [[2]], [[1]], [[-1]])}, "task b, test 0 output is no grid", "value -1"),
            (changed, f"sha256 of its tasks is {arc._digest(changed)[:12]}", f"not {arc._digest(good)[:12]}")):
        path = write(monkeypatch, folder, "arc1-training", content, expected=False)
        with raises_one_line(f"{path} is not arc-agi-1-training.json (2 tasks", *words, "replace or remove it"):
            load("arc1")
    path = write(monkeypatch, folder, "arc1-training", good)
    path.write_bytes(path.read_bytes()[:-9])
    with raises_one_line(str(path), "damaged"):
        load("arc1")
    path.unlink()
    changed = {key: {"name": key, **good[key]} for key in reversed(good)}  # another order and more keys: the same tasks
    path.with_suffix("").write_text(json.dumps(changed, indent=1))
    assert load("arc1").train.tasks[0] == "a"


# --- Tasks of one's own ---

@pytest.fixture
def mine(folder):
    """20 tasks as files of one each, and as one file: (that folder, that file)."""
    rows = noise(80, 4, seed=3, smallest=2)
    tasks = {f"t{i:02}": task(*rows[4 * i:4 * i + 4]) for i in range(20)}
    (folder / "mine").mkdir()
    for name, own in tasks.items():
        (folder / "mine" / f"{name}.json").write_text(json.dumps(own))
    (folder / "mine" / "README.md").write_text("no task")
    (folder / "mine.json.gz").write_bytes(gzip.compress(json.dumps(tasks).encode()))
    return folder / "mine", folder / "mine.json.gz"


def test_own_tasks_are_split_by_task(mine):
    """As one file or many, named in full or found in a folder of data; other seeds hold out others; with a validation
    set all are for training."""
    found = load(str(mine[0]), max_side=3)
    assert [load(name, max_side=3).hash for name in (str(mine[1]), "mine", "mine.json.gz")] == [found.hash] * 3
    sides = [{*side.tasks} for side in (found.train, found.val)]
    assert [len(side) for side in sides] == [18, 2] and not sides[0] & sides[1] and len(found.val.pairs) < 4
    assert found.train.names[0].startswith("mine t") and "18 of 18 tasks of mine" in found.source
    assert any("crop" in name for name in found.train.names)
    assert len({*map(str, ({*load("mine", max_side=3, seed=seed).val.tasks} for seed in range(4)))}) > 1
    scored = load("mine", "arc1-evaluation", max_side=4)
    assert len({*scored.train.tasks}) == 20 and {name.split()[0] for name in scored.val.names} == {"arc1-evaluation"}
    assert load("arc1", "mine", max_side=4).val.tasks[0] == "t00"
    with raises_one_line("mine and mine share 20 of 20 tasks"):
        load("mine", str(mine[1]))


@pytest.mark.parametrize("files_of, words", [
    ({"a.txt": "{}"}, ["has no .json file"]), ({"a.json": "{}"}, ["has no task"]),
    ({"a.json": "ONE"}, ["own has 1 task, and takes two", "--val_dataset"]),
    ({"a.json": "ONE", "b.json": '{"trian": [], "test": []}'}, ["b.json: task b has no list of train pairs"]),
    ({"a.json": '{"train": [{"in": [[1]], "output": [[1]]}], "test": []}'}, ["task a, train 0 input is no grid"]),
    ({"a.json": "ONE", "b.json": '{"c": {"train": [], "test": [{"input": [[10]], "output": [[1]]}]}}'},
     ["b.json: task c, test 0 input is no grid: it has the value 10", "a task is {"]),
    ({"a.json": "ONE", "b.json": '{"a": ONE}'}, ["b.json has task a, which another file"])])
def test_own_tasks_that_cannot_serve(folder, files_of, words):
    (folder / "own").mkdir()
    for name, content in files_of.items():
        (folder / "own" / name).write_text(content.replace("ONE", json.dumps(task([[1]], [[2]], [[3]], [[4]]))))
    with raises_one_line(*words):
        load("own")


def test_without_network_the_error_says_what_to_put_where(folder, monkeypatch, tmp_path):
    (folder / "arc-agi-1-evaluation.json.gz").unlink()
    with raises_one_line("no connection to https://codeload.github.com/fchollet/ARC-AGI/zip/3990", "no network in test",
                         f"put arc-agi-1-evaluation.json.gz into {tmp_path / 'downloads'}", "NANOLAB_DATA",
                         "--dataset synthetic"):
        load("arc1")
    monkeypatch.setenv("NANOLAB_DATA", str(tmp_path / "nowhere"))
    with raises_one_line("nowhere", "not a folder"):
        load("arc1")
    assert len(load(n_train=5, n_val=5).train) == 5  # needs neither


def repository_zip(training, evaluation):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ARC-AGI-3990/readme.json", "[")
        for part, tasks in (("training", training), ("evaluation", evaluation)):
            archive.writestr(f"ARC-AGI-3990/data/{part}/", "")
            for name, content in tasks.items():
                archive.writestr(f"ARC-AGI-3990/data/{part}/{name}.json", json.dumps(content))
    return buffer.getvalue()


def test_a_download_is_checked_packed_and_found_again(folder, monkeypatch, tmp_path):
    expected, downloads, asked = load("arc1", max_side=5).hash, tmp_path / "downloads", []
    for name in ("arc1-training", "arc1-evaluation"):
        (folder / f"{arc.SETS[name][0]}.gz").unlink()
    sets, at = fake_sets(), "https://codeload.github.com/fchollet/ARC-AGI/zip/399030444e0ab0cc8b4e199870fb20b863846f34"
    contents = [repository_zip(sets["arc1-training"], {}), b"<html>no zip</html>",
                repository_zip(sets["arc1-training"], sets["arc1-evaluation"])]

    def answer(request, timeout):
        asked.append(request.full_url)
        (tmp_path / "sent").write_bytes(contents[len(asked) - 1])
        response = urlopen(f"file://{tmp_path}/sent")
        response.code = 200
        return response
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    for words in (["it has 0 tasks"], ["not a zip file"]):
        with raises_one_line("and was removed", *words, "--dataset synthetic"):
            load("arc1", max_side=5)
        (downloads / "arc-agi-1-training.json.gz").unlink(missing_ok=True)  # the one that was right
    assert not [path for path in downloads.iterdir() if path.suffix != ".lock"]
    assert load("arc1", max_side=5).hash == expected
    assert sorted(path.name for path in downloads.iterdir()) == [
        "ARC-AGI.zip.lock", "arc-agi-1-evaluation.json.gz", "arc-agi-1-training.json.gz"]
    assert load("arc1", max_side=5).hash == expected and asked == [at] * 3  # what is there is not fetched again


@real_data
def test_small_grids_of_arc1():
    found = load("arc1", max_side=10, crops=4)
    plain = [name for name in found.train.names if "crop" not in name]
    assert (len(plain), len(found.train), len(found.val)) == (1601, 5873, 1267)
    assert (len(found.train.pairs), len(found.val.pairs)) == (605, 459)
    assert found.val.names[0].split()[:2] == ["arc1-evaluation", found.val.tasks[0]]
    assert found.hash == "562e484aa2bb"


def test_statistics():
    cells, shapes = canvases([[[0, 0, 1], [0, 2, 2]], [[3, 3]]], 4)
    grids = Grids(cells, shapes, ["", ""], torch.tensor([[0, 1]]), {}, ["", ""])
    assert arc.statistics(grids) == {"grids": 2, "pairs": 1, "median_area": 4, "p90_area": pytest.approx(5.6),
                                     "zeros": pytest.approx(3 / 8), "constant": pytest.approx(5 / 8)}
