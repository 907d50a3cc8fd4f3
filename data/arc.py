"""ARC grids: finds, fetches, checks and splits them, makes synthetic ones, and cuts them into batches and tokens.

    python data/arc.py synthetic --stats             # made here, nothing to download; writes arc_synthetic.png
    python data/arc.py arc1 --max_side 10 --stats    # small grids and crops of ARC-AGI-1; writes arc_arc1.png

Sets: `synthetic`, or one or several (joined by +) of `arc1-training` (short: arc1), `arc1-evaluation`, `arc2-training`
(short: arc2) and `arc2-evaluation`. Their files, such as arc-agi-1-training.json.gz, are looked for in the folders of
NANOLAB_DATA, then in data/downloads/, then made from a download of the ARC repositories on GitHub.
"""
import argparse
import difflib
import fcntl
import gzip
import hashlib
import json
import random
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from data import text
from experiment import UserError, command, replacing

COLOURS = 10
LARGEST = 30  # rows and columns of ARC's largest grids
OUTSIDE = 255  # in `cells`, where there is no cell
PALETTE = ((0, 0, 0), (0, 116, 217), (255, 65, 54), (46, 204, 64), (255, 220, 0),  # black blue red green yellow
           (170, 170, 170), (240, 18, 190), (255, 133, 27), (127, 219, 255), (135, 12, 37))  # grey magenta orange ...

ARC1 = "fchollet/ARC-AGI", "399030444e0ab0cc8b4e199870fb20b863846f34"
ARC2 = "arcprize/ARC-AGI-2", "f3283f727488ad98fe575ea6a5ac981e4a188e49"
SETS = {  # name: file, tasks, sha256 of the tasks as _digest writes them (None: not known), repository, its folder
    "arc1-training": ("arc-agi-1-training.json", 400,
                      "58599ab594750bd7f44ec796aee539fd7f3acfbc89ad50b2f9aba042b39e26c2", ARC1, "data/training/"),
    "arc1-evaluation": ("arc-agi-1-evaluation.json", 400,
                        "a7c0a44404e6fcd16fa71f55a75b56e7e7d21003a0653e5f41baf176b0034a3d", ARC1, "data/evaluation/"),
    "arc2-training": ("arc-agi-2-training.json", 1000,
                      "ded3d8eb1f19bc85e624bdc79ddb23178cf90726748b2e501d4c02cbcf277ac0", ARC2, "data/training/"),
    "arc2-evaluation": ("arc-agi-2-evaluation.json", 120, None, ARC2, "data/evaluation/"),
}
ALIASES = {"arc1": "arc1-training", "arc2": "arc2-training"}
PARTNERS = {"synthetic": "synthetic", "arc1-training": "arc1-evaluation", "arc2-training": "arc2-evaluation"}


@dataclass
class Grids:
    """Grids of one side, each in the top left corner of a square canvas, no two the same up to symmetry and colours."""
    cells: torch.Tensor  # (N, S, S) uint8: the colour of each cell, OUTSIDE where there is none
    shapes: torch.Tensor  # (N, 2) int64: height and width
    names: list[str]  # where each comes from: "arc1-training 007bbfb7 train 0 input", "synthetic lines 17"
    pairs: torch.Tensor  # (P, 2) int64: the rows of a pair's input and output, as they stand in the task
    factors: dict[str, torch.Tensor]  # name: (N,) int64, -1 where a grid has no such factor; {} for ARC
    tasks: list[str]  # the task of each; synthetic: a running number, which the two of a pair share

    def __len__(self):
        return len(self.names)


@dataclass
class Arc:
    """Training and validation grids that share no task of ARC, and no grid up to symmetry and colours."""
    train: Grids
    val: Grids
    source: str  # lines for people: what, how many, what was left out
    hash: str  # 12 hex digits over the grids of both sides, in their order


# --- Loading and splitting ---

def load(dataset="synthetic", val_dataset=None, max_side=8, n_colours=10, n_train=20_000, n_val=1_000, crops=4,
         seed=0):
    """Finds (or downloads, or makes) the grids of both sides: an Arc.

    dataset, val_dataset: `synthetic`, or names of SETS or ALIASES joined by +; val_dataset None: the usual partner of
    dataset. max_side, n_colours: grids that are larger or have a colour of n_colours and above are left out.
    n_train, n_val: how many synthetic grids. crops: so many random pieces of each training grid of ARC that is larger
    than max_side. seed: of the crops and of synthetic grids, which do not differ from machine to machine.
    Validation grids are unique up to the symmetries of the square and a permutation of the colours; so are training
    grids, and none is a validation grid in this sense.
    Raises UserError: unknown or mixed names, sides that share tasks, missing, damaged or other files, no network, a
    number out of range, nothing left, more synthetic grids wanted than there are.
    """
    for name, value, low, high in (("max_side", max_side, 1, LARGEST), ("n_colours", n_colours, 1, COLOURS),
                                   ("n_train", n_train, 1, None), ("n_val", n_val, 1, None), ("crops", crops, 0, None)):
        if value < low or (high and value > high):
            raise UserError(f"{name} is {value}: it must be {f'from {low} to {high}' if high else f'at least {low}'}")
    train_names = _names(dataset, "dataset")
    if val_dataset is None:
        val_dataset = PARTNERS.get("+".join(train_names))
        if val_dataset is None:
            raise UserError(f"dataset {dataset} has no usual validation set: give --val_dataset, one or several of "
                            f"{', '.join(SETS)} joined by +")
    val_names = _names(val_dataset, "val_dataset")
    if ("synthetic" in train_names) != ("synthetic" in val_names):
        raise UserError(f"dataset {dataset} and val_dataset {val_dataset}: synthetic grids cannot be mixed with others")
    if "synthetic" in train_names:
        train, val, lines = _load_synthetic(max_side, n_colours, n_train, n_val, seed)
    else:
        train, val, lines = _load_tasks(train_names, val_names, max_side, n_colours, crops, seed)
    digest = hashlib.sha256()
    for side in (train, val):
        for part in (side.shapes.to(torch.uint8), side.cells):
            digest.update(part.numpy().tobytes())
    lines[-1] += f"; hash {digest.hexdigest()[:12]}"
    return Arc(train, val, "\n".join(lines), digest.hexdigest()[:12])


def _names(dataset, what):
    """The sets that `dataset` names, joined by +, each once and without aliases."""
    known, found = ["synthetic", *SETS], {}
    for word in dataset.split("+"):
        name = ALIASES.get(word, word)
        if name not in known:
            nearest = difflib.get_close_matches(word, [*known, *ALIASES], 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"take {', '.join(known[:-1])} or {known[-1]}"
            raise UserError(f"{what} {word!r} is no known set: {hint}")
        found[name] = True
    if "synthetic" in found and len(found) > 1:
        raise UserError(f"{what} {dataset}: synthetic grids cannot be mixed with others; take one of the two")
    return list(found)


class _Collector:
    """Gathers the grids of one side, each kept once by its canonical form, and none that is `forbidden`."""

    def __init__(self, max_side, forbidden=()):
        self.max_side, self.forbidden = max_side, forbidden
        self.rows, self.kept, self.pairs = {}, [], []  # canonical form: row; (cells, shape, name, task, factors)
        self.repeated = self.held_out = 0

    def add(self, items, limit=None):
        """Takes items (rows of a grid, name, task, factors) in order, up to `limit` grids in all; returns the row of
        each: None where a grid was not kept and no kept one is exactly equal."""
        cells, shapes = _canvases([item[0] for item in items], self.max_side)
        places = []
        for key, canvas, shape, item in zip(canonical(cells, shapes), cells, shapes, items):
            row = self.rows.get(key)
            if key in self.forbidden:
                self.held_out += 1
            elif row is not None:
                self.repeated += 1
                row = row if np.array_equal(self.kept[row][0], canvas) else None
            elif limit is None or len(self.kept) < limit:
                row = self.rows[key] = len(self.kept)
                self.kept.append((canvas, shape, *item[1:]))
            places.append(row)
        return places

    def grids(self):
        cells, shapes, names, tasks, factors = zip(*self.kept)
        table = {name: torch.tensor([row.get(name, -1) for row in factors]) for name in factors[0] or ()}
        pairs = torch.tensor(list(dict.fromkeys(self.pairs)), dtype=torch.int64).view(-1, 2)
        return Grids(torch.from_numpy(np.stack(cells)), torch.from_numpy(np.stack(shapes)), list(names), pairs, table,
                     list(tasks))


def _canvases(grids, max_side):
    """Lists of rows -> cells (N, S, S) uint8 and shapes (N, 2) int64, arrays."""
    cells = np.full((len(grids), max_side, max_side), OUTSIDE, np.uint8)
    shapes = np.array([(len(grid), len(grid[0])) for grid in grids], np.int64).reshape(-1, 2)
    for canvas, grid, (height, width) in zip(cells, grids, shapes.tolist()):
        canvas[:height, :width] = grid
    return cells, shapes


def _load_tasks(train_names, val_names, max_side, n_colours, crops, seed):
    """(train, val, lines for people) of sets of ARC."""
    sets = {name: _find_tasks(name) for name in dict.fromkeys([*train_names, *val_names])}
    for name in train_names:
        for other in val_names:
            if shared := sorted(sets[name].keys() & sets[other].keys()):
                listed = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
                raise UserError(f"{name} and {other} share {len(shared)} of {len(sets[other])} tasks ({listed}): a "
                                "model trained on one must not be scored on the other; choose arc1-training with "
                                "arc1-evaluation, or arc2-training with arc2-evaluation")
    val, n_val = _Collector(max_side), 0
    for name in val_names:
        n_val += _add_tasks(val, name, sets[name], n_colours)[0]
    train, n_train, large = _Collector(max_side, val.rows), 0, []
    for name in train_names:
        n, larger = _add_tasks(train, name, sets[name], n_colours)
        n_train, large = n_train + n, large + larger
    n_crops = len(train.kept)
    pieces = [_crop(grid, name, task, k, max_side, seed) for grid, name, task in large for k in range(crops)]
    train.add([piece for piece in pieces if max(map(max, piece[0])) < n_colours])
    n_crops = len(train.kept) - n_crops
    lines = []
    for side, names, collector, total in (("train", train_names, train, n_train), ("val", val_names, val, n_val)):
        if not collector.kept:
            raise UserError(f"{'+'.join(names)} has no grid with sides up to {max_side} and colours below {n_colours}"
                            f"{' that is not in the validation set' * (side == 'train')}: take a larger max_side or "
                            "n_colours")
        tasks = len({item[3] for item in collector.kept})
        n_tasks = len({task for name in names for task in sets[name]})
        lines.append(f"{side}: {len(collector.kept):,} grids of {tasks:,} of {n_tasks:,} tasks of {'+'.join(names)} "
                     f"({total:,} grids in all), {len(dict.fromkeys(collector.pairs)):,} whole pairs; sides up to "
                     f"{max_side}, colours below {n_colours}; {collector.repeated:,} dropped as repeated")
    lines[0] += f", {train.held_out:,} as in val; {n_crops:,} of the grids are crops ({crops} of each larger grid)"
    return train.grids(), val.grids(), lines


def _add_tasks(collector, name, tasks, n_colours):
    """Adds the grids that fit and their pairs; returns how many grids the tasks have, and (grid, name, task) of those
    that are larger than the canvas."""
    n, items, pairs, larger = 0, [], [], []
    for task, parts in tasks.items():
        for part in ("train", "test"):
            for k, pair in enumerate(parts[part]):
                places = []
                for end in ("input", "output"):
                    grid, label = pair[end], f"{name} {task} {part} {k} {end}"
                    n += 1
                    if max(len(grid), len(grid[0])) > collector.max_side:
                        larger.append((grid, label, task))
                    elif max(map(max, grid)) < n_colours:
                        places.append(len(items))
                        items.append((grid, label, task, {}))
                if len(places) == 2:
                    pairs.append(places)
    rows = collector.add(items)
    pairs = [(rows[first], rows[second]) for first, second in pairs]
    collector.pairs += [pair for pair in pairs if None not in pair]
    return n, larger


def _crop(grid, name, task, k, max_side, seed):
    """The k-th random piece of a grid: a function of the grid's name, k, the side and the seed."""
    digest = hashlib.sha256(f"{seed} {max_side} {name} {k}".encode()).digest()
    draws = [int.from_bytes(digest[8 * i:8 * i + 8], "little") for i in range(4)]
    cuts = []
    for side, (a, b) in zip((len(grid), len(grid[0])), (draws[:2], draws[2:])):
        most = min(side, max_side)
        least = min(3, most)
        size = least + a % (most - least + 1)
        start = b % (side - size + 1)
        cuts.append(slice(start, start + size))
    return [row[cuts[1]] for row in grid[cuts[0]]], f"{name} crop {k}", task, {}


# --- Files of ARC ---

def _find_tasks(name):
    """{task: {"train": [{"input", "output"}, ...], "test": [...]}} of a set, from a checked file or a download."""
    file, n_tasks, digest = SETS[name][:3]
    path = text._find(file)
    if path is None:
        try:
            path = _download(name)
        except UserError as error:
            raise UserError(f"{error}; put {file}.gz into {text.DOWNLOADS} or a folder of NANOLAB_DATA, or use "
                            "--dataset synthetic, which needs no file") from error
    try:
        return _checked(text._read(path).numpy().tobytes(), n_tasks, digest)
    except ValueError as error:
        raise UserError(f"{path} is not {file} ({n_tasks} tasks of ARC): {error}; replace or remove it") from error


def _checked(content, n_tasks, digest):
    """The tasks in the bytes of a .json file, in the order of their ids. Raises ValueError: what is wrong."""
    try:
        tasks = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(tasks, dict) or len(tasks) != n_tasks:
        raise ValueError(f"it has {len(tasks)} tasks" if isinstance(tasks, dict) else "it is no table of tasks")
    found = {}
    for task, parts in sorted(tasks.items()):
        found[task] = {}
        for part in ("train", "test"):
            pairs = parts.get(part) if isinstance(parts, dict) else None
            if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
                raise ValueError(f"task {task} has no list of {part} pairs")
            found[task][part] = [{end: pair.get(end) for end in ("input", "output")} for pair in pairs]
            for k, pair in enumerate(found[task][part]):
                for end, grid in pair.items():
                    if wrong := _wrong(grid):
                        raise ValueError(f"task {task}, {part} {k} {end} is no grid: {wrong}")
    if digest and _digest(found) != digest:
        raise ValueError(f"the sha256 of its tasks is {_digest(found)[:12]}..., not {digest[:12]}...")
    return found


def _wrong(grid):
    """What keeps a value from being one of ARC's grids; "" if nothing."""
    if not isinstance(grid, list) or not 1 <= len(grid) <= LARGEST or not all(isinstance(row, list) for row in grid):
        return f"it must be a list of 1 to {LARGEST} rows"
    if len({len(row) for row in grid}) > 1 or not 1 <= len(grid[0]) <= LARGEST:
        return f"its rows must have one length from 1 to {LARGEST}"
    wrong = [value for row in grid for value in row if type(value) is not int or not 0 <= value < COLOURS]
    return f"it has the value {wrong[0]!r}, and colours are 0 to {COLOURS - 1}" if wrong else ""


def _digest(tasks):
    return hashlib.sha256(json.dumps(tasks, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _download(name):
    """Downloads the repository that has a set, checks and packs its sets into data/downloads/; returns the path."""
    (repository, commit), folder = SETS[name][3], text.DOWNLOADS
    url = f"https://codeload.github.com/{repository}/zip/{commit}"
    archive, wanted = folder / f"{repository.rpartition('/')[2]}.zip.part", folder / f"{SETS[name][0]}.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(archive.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs that start together the second waits and finds the file
            if wanted.exists():
                return wanted
            text._fetch(url, archive)
            try:
                for file, n_tasks, digest, (other, _), part in SETS.values():
                    if other == repository:
                        tasks = _checked(_packed_folder(archive, part), n_tasks, digest)
                        with replacing(folder / f"{file}.gz") as packed:
                            packed.write(gzip.compress(json.dumps(tasks, separators=(",", ":")).encode(), mtime=0))
            except (ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(f"what {url} sent is not the expected data set and was removed: {error}") from error
            finally:
                archive.unlink()
            return wanted
    except OSError as error:
        raise UserError(f"cannot write {wanted}: {error.strerror or error}") from error


def _packed_folder(archive, part):
    """The tasks in a folder of a repository's zip as one .json file: bytes."""
    with zipfile.ZipFile(archive) as packed:
        found = {name: packed.read(name) for name in packed.namelist()
                 if name.partition("/")[2].startswith(part) and name.endswith(".json")}
    return json.dumps({Path(name).stem: json.loads(content) for name, content in found.items()}).encode()


# --- Tokens ---

class Canvas:
    """Grids as tokens on a square canvas: n_colours colours, PAD, EOS (the end of a row) and, if `masked`, MASK.

    The canvas alone tells the shape, so a decoder can be asked for a whole grid. pad, eos, mask: their ids, mask None
    where there is none. n_outputs: what a decoder may say; n_tokens: what an encoder may read (MASK too).
    """

    def __init__(self, max_side, n_colours=10, masked=False):
        self.max_side, self.n_colours = max_side, n_colours
        self.pad, self.eos = n_colours, n_colours + 1
        self.mask = n_colours + 2 if masked else None
        self.n_outputs, self.n_tokens = n_colours + 2, n_colours + 2 + bool(masked)

    def tokens(self, cells):
        """cells (B, S, S) uint8 -> (B, S, S) int64: colours, EOS right after a row's last cell, PAD elsewhere.

        A row as wide as the canvas ends at its edge, without EOS."""
        inside = cells != OUTSIDE
        tokens = cells.long().masked_fill(~inside, self.pad)
        tokens[:, :, 1:][inside[:, :, :-1] & ~inside[:, :, 1:]] = self.eos
        return tokens

    def shapes(self, tokens):
        """tokens (B, S, S) -> (B, 2) int64 height and width, (0, 0) where they are not exactly what `tokens` writes."""
        S = self.max_side
        place = torch.arange(S, device=tokens.device)
        colour = (tokens >= 0) & (tokens < self.n_colours)
        width = torch.where(tokens[:, 0] == self.eos, place, S).amin(1)
        height = colour[:, :, 0].long().cumprod(1).sum(1)
        row, column = place[:, None] < height[:, None, None], place - width[:, None, None]  # (B, S, 1), (B, 1, S)
        rest = torch.where(row & (column == 0), self.eos, self.pad)
        valid = torch.where(row & (column < 0), colour, tokens == rest).flatten(1).all(1) & (height > 0)
        return torch.stack([height, width], 1) * valid[:, None]

    def cells(self, tokens):
        """tokens (B, S, S) -> (B, S, S) uint8; all OUTSIDE where they form no grid."""
        return torch.where(_inside(self.shapes(tokens), self.max_side), tokens, OUTSIDE).to(torch.uint8)


def _inside(shapes, side):
    """(B, 2) -> (B, S, S) bool: which places of the canvas are cells."""
    place = torch.arange(side, device=shapes.device)
    return (place[:, None] < shapes[:, :1, None]) & (place < shapes[:, 1:, None])


# --- Symmetries and colours ---

def canonical(cells, shapes):
    """cells (N, S, S) uint8 and shapes (N, 2), tensors or arrays -> N bytes objects: equal exactly for grids that one
    of the 8 symmetries of the square and a permutation of the 10 colours turn into each other.

    It is the smallest of the symmetric images after numbering the colours in the order in which they appear.
    """
    cells, shapes = np.asarray(cells), np.asarray(shapes)
    found = [b""] * len(cells)
    codes = shapes[:, 0] * 256 + shapes[:, 1]
    order = np.argsort(codes, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else ():
        height, width = shapes[members[0]].tolist()
        for part in np.array_split(members, -(-len(members) * height * width // 2 ** 20)):  # bounds the memory
            block = cells[part, :height, :width]
            if height > width:  # all images of a grid that is not square lie down, so that they can be compared
                block = block.transpose(0, 2, 1)
            images = [block, block[:, ::-1], block[:, :, ::-1], block[:, ::-1, ::-1]]
            if height == width:
                images += [image.transpose(0, 2, 1) for image in images]
            best = None
            for image in images:
                image = _renumbered(image.reshape(len(part), -1))
                if best is not None:
                    place = (image != best).argmax(1)[:, None]  # where the two first differ
                    smaller = np.take_along_axis(image, place, 1) < np.take_along_axis(best, place, 1)
                    image = np.where(smaller, image, best)
                best = image
            head = bytes([min(height, width), max(height, width)])
            for i, row in zip(part.tolist(), best):
                found[i] = head + row.tobytes()
    return found


def _renumbered(flat):
    """(N, n) uint8 colours -> the same with the first colour of each row called 0, the next new one 1, ..."""
    first = np.empty((len(flat), COLOURS), np.int64)
    for colour in range(COLOURS):
        here = flat == colour
        first[:, colour] = np.where(here.any(1), here.argmax(1), flat.shape[1])
    ranks = first.argsort(1, kind="stable").argsort(1).astype(np.uint8)
    return np.take_along_axis(ranks, flat.astype(np.int64), 1)


def augment(cells, shapes, generator, colours="all", symmetry=True, n_colours=10):
    """cells (B, S, S) uint8, shapes (B, 2) int64 -> the same, each grid under a symmetry and colours of its own.

    colours: `all` (a random permutation of the first n_colours), `keep_zero` (one that leaves 0 alone) or `none`.
    symmetry: one of the 8 symmetries of the square at random, the grid again in the top left corner; False: none.
    """
    if colours not in ("all", "keep_zero", "none"):
        raise UserError(f"colours is {colours!r}: it must be all, keep_zero or none")
    B, S, device = len(cells), cells.shape[-1], cells.device
    if symmetry:
        which = torch.randint(8, (B,), generator=generator, device=generator.device).to(device)
        transposed, upside, mirrored = (which[:, None] >> bit & 1 == 1 for bit in range(3))  # (B, 1) each
        shapes = torch.where(transposed, shapes.flip(1), shapes)
        place = torch.arange(S, device=device).expand(B, S)
        row = torch.where(upside, shapes[:, :1] - 1 - place, place)[:, :, None]  # which row each one comes from,
        column = torch.where(mirrored, shapes[:, 1:] - 1 - place, place)[:, None]  # before the transposition
        source = torch.where(transposed[:, :, None], column * S + row, row * S + column)
        moved = cells.flatten(1).gather(1, source.clamp(0, S * S - 1).flatten(1)).view(B, S, S)
        cells = moved.masked_fill(~_inside(shapes, S), OUTSIDE)
    if colours != "none":
        kept = int(colours == "keep_zero")
        drawn = torch.rand(B, n_colours - kept, generator=generator, device=generator.device).argsort(1).to(device)
        table = torch.arange(256, device=device).repeat(B, 1)
        table[:, kept:n_colours] = drawn + kept
        cells = table.gather(1, cells.flatten(1).long()).view(B, S, S).to(torch.uint8)
    return cells, shapes


# --- Batches ---

class Stream:
    """Training batches as a pure function of the seed and the step: nothing to save, and a resumed run sees the same.

    Each epoch is a permutation of all grids; a batch may go over from one to the next. `group` consecutive batches
    are drawn together, sorted by area, so that a batch has grids of similar size, and come in a random order.
    colours, symmetry, n_colours: see augment.
    """

    def __init__(self, grids, batch_size, seed, colours="all", symmetry=True, group=8, n_colours=10):
        if batch_size < 1 or group < 1:
            raise UserError(f"batch_size {batch_size} and group {group} must be at least 1")
        if not len(grids):
            raise UserError("there are no grids to make batches of")
        self.grids, self.batch_size, self.seed, self.group = grids, batch_size, seed, group
        self.colours, self.symmetry, self.n_colours = colours, symmetry, n_colours
        self._areas = grids.shapes.prod(1)
        self._epochs, self._groups = {}, {}  # the latest ones; what they hold can be drawn again at any time

    def _generator(self, what, number):
        digest = hashlib.sha256(f"{self.seed} {what} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _epoch(self, epoch):
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = torch.randperm(len(self.grids), generator=self._generator("epoch", epoch))
        return self._epochs[epoch]

    def rows(self, step):
        """(B,) int64: which grids the batch of this step (from 0) holds, before augmentation."""
        group, size, n = step // self.group, self.group * self.batch_size, len(self.grids)
        if group not in self._groups:
            start, stop = group * size, (group + 1) * size
            rows = torch.cat([self._epoch(epoch)[max(start - epoch * n, 0):stop - epoch * n]
                              for epoch in range(start // n, (stop - 1) // n + 1)])
            if self.group > 1:
                rows = rows[self._areas[rows].argsort(stable=True)].view(self.group, -1)
                rows = rows[torch.randperm(self.group, generator=self._generator("group", group))].flatten()
            self._groups = {group: rows}
        return self._groups[group].view(self.group, -1)[step % self.group]

    def at(self, step):
        """The batch of a step (from 0): cells (B, S, S) uint8, shapes (B, 2) int64."""
        rows = self.rows(step)
        return augment(self.grids.cells[rows], self.grids.shapes[rows], self._generator("augment", step), self.colours,
                       self.symmetry, self.n_colours)


# --- Synthetic grids ---

RULES = ("fall", "frame", "trim", "unify", "complete")  # from a pair's input to its output
PAIRED = 1 / 6  # of what is drawn; about a fifth of the grids that are kept are parts of a pair
FACTORS = ("kind", "height", "width", "colour", "background", "count", "symmetry", "n_colours", "row", "column", "size",
           "period", "rule")


class Dice:
    """Random choices, the same on every machine and Python: all come from random.random() of a seeded generator."""

    def __init__(self, *seeds):
        self.random = random.Random(" ".join(map(str, seeds))).random

    def between(self, low, high):
        """A whole number from low to high, both included; low where high is smaller."""
        return low + int(self.random() * (high - low + 1)) if high > low else low

    def pick(self, values):
        return values[int(self.random() * len(values))]

    def chance(self, share):
        return self.random() < share

    def shuffled(self, values):
        values = list(values)
        for i in range(len(values) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            values[i], values[j] = values[j], values[i]
        return values


def _blank(height, width, colour):
    return [[colour] * width for _ in range(height)]


def _with_objects(dice, height, width, background, objects):
    """(grid, how many found room): objects, lists of rows with None where they are hollow, put at random places so
    that no two touch, not even at a corner; the first always fits."""
    grid, count = _blank(height, width, background), 0
    for thing in objects:
        tall, wide = len(thing), len(thing[0])
        for _ in range(8):
            top, left = dice.between(0, height - tall), dice.between(0, width - wide)
            around = slice(max(left - 1, 0), left + wide + 1)
            if all(cell == background for row in grid[max(top - 1, 0):top + tall + 1] for cell in row[around]):
                for row, cells in zip(grid[top:], thing):
                    for column, cell in enumerate(cells, left):
                        if cell is not None:
                            row[column] = cell
                count += 1
                break
    return grid, count


def _painted(dice, colours, n):
    """n colours for n objects: all the same, or each drawn from the first three."""
    return [colours[0]] * n if dice.chance(0.4) else [colours[0]] + [dice.pick(colours[:3]) for _ in range(n - 1)]


def _inserted(dice, background, height, width, pattern):
    """A pattern, a function of (height, width, row, column), over the whole grid or in a box: (grid, whole?)."""
    whole = min(height, width) < 4 or dice.chance(0.3)
    tall, wide = (height, width) if whole else (dice.between(3, height), dice.between(3, width))
    top, left = dice.between(0, height - tall), dice.between(0, width - wide)
    grid = _blank(height, width, background)
    for i in range(tall):
        grid[top + i][left:left + wide] = [pattern(tall, wide, i, j) for j in range(wide)]
    return grid, (tall, wide) == (height, width)


def rectangles(dice, height, width, background, colours):
    """One to three filled rectangles."""
    objects = []
    for colour in _painted(dice, colours, dice.between(1, 3)):
        tall, wide = (dice.between(min(2, size), size * 2 // 3) for size in (height, width))
        objects.append(_blank(tall, wide, colour))
    grid, count = _with_objects(dice, height, width, background, objects)
    return grid, {"count": count}


def outlines(dice, height, width, background, colours):
    """One to three hollow rectangles, some filled with another colour."""
    objects = []
    for colour in _painted(dice, colours, dice.between(1, 3)):
        tall, wide = dice.between(min(3, height), height), dice.between(min(3, width), width)
        thing = _blank(tall, wide, colour)
        inner = dice.pick(colours) if dice.chance(0.3) else None
        for row in thing[1:-1]:
            row[1:-1] = [inner] * (wide - 2)
        objects.append(thing)
    grid, count = _with_objects(dice, height, width, background, objects)
    return grid, {"count": count}


def sprites(dice, height, width, background, colours):
    """Copies of one small connected shape of 3 to 6 cells."""
    tall, wide = min(dice.between(2, 4), height), min(dice.between(2, 4), width)
    cells = [(dice.between(0, tall - 1), dice.between(0, wide - 1))]
    wanted = min(dice.between(3, 6), tall * wide)
    while len(cells) < wanted:
        i, j = dice.pick(cells)
        i, j = dice.pick(((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)))
        if 0 <= i < tall and 0 <= j < wide and (i, j) not in cells:
            cells.append((i, j))
    top, left = min(i for i, _ in cells), min(j for _, j in cells)
    tall, wide = max(i for i, _ in cells) - top + 1, max(j for _, j in cells) - left + 1
    objects = []
    for colour in _painted(dice, colours, dice.between(1, 5)):
        thing = _blank(tall, wide, None)
        for i, j in cells:
            thing[i - top][j - left] = colour
        objects.append(thing)
    grid, count = _with_objects(dice, height, width, background, objects)
    return grid, {"count": count}


def lines(dice, height, width, background, colours):
    """One to four lines in one direction, each in a row, column or diagonal of its own, across or only partly."""
    grid, direction = _blank(height, width, background), dice.between(0, 3)
    places = {}
    for i in range(height):
        for j in range(width):
            places.setdefault((i, j, i - j, i + j)[direction], []).append((i, j))
    tracks = [track for track in places.values() if len(track) > 1] or list(places.values())
    tracks = dice.shuffled(tracks)[:dice.between(1, min(4, (len(tracks) + 1) // 2))]
    across = dice.chance(0.5)
    for track, colour in zip(tracks, _painted(dice, colours, len(tracks))):
        length = len(track) if across else dice.between(min(2, len(track)), len(track))
        start = dice.between(0, len(track) - length)
        for i, j in track[start:start + length]:
            grid[i][j] = colour
    return grid, {"count": len(tracks)}


def mirrored(dice, height, width, background, colours):
    """A random pattern made symmetric: left-right, up-down, both, or about the diagonal."""
    density, used = 0.15 + 0.45 * dice.random(), colours[:dice.between(1, 3)]
    grid = [[dice.pick(used) if dice.chance(density) else background for _ in range(width)] for _ in range(height)]
    grid[0][0] = colours[0]
    way = dice.pick(("across", "down", "both", "diagonal") if height == width else ("across", "down", "both"))
    for i in range(height):
        for j in range(width):
            if way == "diagonal":
                a, b = min(i, j), max(i, j)
            else:
                a = min(i, height - 1 - i) if way != "across" else i
                b = min(j, width - 1 - j) if way != "down" else j
            grid[i][j] = grid[a][b]
    return grid, {}


def tiled(dice, height, width, background, colours):
    """A small random tile of two or three colours, repeated."""
    tall, wide = dice.between(2, 3), dice.between(2, 3)
    tile = [[dice.pick(colours[:2]) if dice.chance(0.4) else background for _ in range(wide)] for _ in range(tall)]
    tile[0][0], tile[-1][-1] = colours[0], background
    grid, whole = _inserted(dice, background, height, width, lambda h, w, i, j: tile[i % tall][j % wide])
    return grid, {"period": (tall if tall == wide else tall * wide) if whole else -1}


def stripes(dice, height, width, background, colours):
    """Stripes (across, down, aslant) or a checkerboard of two to four colours."""
    band = [colours[0], background] + [dice.pick((background, *colours[:2])) for _ in range(dice.between(0, 2))]
    if dice.chance(0.2):
        band[1] = colours[1 % len(colours)]
    way, block = dice.between(0, 3), 1
    if way == 3:
        band, block = band[:2], 1 if min(height, width) < 4 else dice.between(1, 2)
    place = (lambda i, j: i, lambda i, j: j, lambda i, j: i + j, lambda i, j: i // block + j // block)[way]
    grid, whole = _inserted(dice, background, height, width, lambda h, w, i, j: band[place(i, j) % len(band)])
    return grid, {"period": len(band) * block if whole else -1}


def crosses(dice, height, width, background, colours):
    """One to three crosses, upright or slanting, or a row and a column across the whole grid."""
    if min(height, width) > 2 and dice.chance(0.3):
        grid, row, column = _blank(height, width, background), dice.between(0, height - 1), dice.between(0, width - 1)
        grid[row] = [colours[0]] * width
        second = dice.pick(colours[:2])
        for cells in grid:
            cells[column] = second
        grid[row][column] = dice.pick(colours[:3])
        return grid, {"count": 1}
    objects, arm = [], min(dice.between(1, 3), (min(height, width) - 1) // 2)
    slanting = dice.chance(0.4)
    for colour in _painted(dice, colours, dice.between(1, 4)):
        thing = [[colour if (abs(i) == abs(j) if slanting else 0 in (i, j)) else None for j in range(-arm, arm + 1)]
                 for i in range(-arm, arm + 1)]
        thing[arm][arm] = dice.pick((colour, *colours[:2]))
        objects.append(thing)
    grid, count = _with_objects(dice, height, width, background, objects)
    return grid, {"count": count}


def frames(dice, height, width, background, colours):
    """Frames in one another, in the whole grid or in a box of it."""
    band = [colours[0]] + [dice.pick((background, background, *colours[:3])) for _ in range(dice.between(1, 3))]
    return _inserted(dice, background, height, width,
                     lambda h, w, i, j: band[min(i, j, h - 1 - i, w - 1 - j) % len(band)])[0], {}


def scattered(dice, height, width, background, colours):
    """One to eight single cells."""
    grid, count = _blank(height, width, background), dice.between(1, min(8, max(1, height * width // 2)))
    places = dice.shuffled(range(height * width))[:count]
    for place, colour in zip(places, _painted(dice, colours, count)):
        grid[place // width][place % width] = colour
    return grid, {"count": count}


def fields(dice, height, width, background, colours):
    """Two, three or four fields between lines of one colour, each empty, filled or with a few cells."""
    line, fills = colours[0], colours[1:4]
    cuts = []
    for size in (height, width):
        places = list(range(1, size - 1))
        cuts.append([dice.pick(places)] if places else [])
    way = dice.between(0, 2)
    if way < 2 and cuts[way]:
        cuts[1 - way] = []
        if dice.chance(0.3):
            cuts[way] += [place for place in range(1, (height, width)[way] - 1) if abs(place - cuts[way][0]) > 1][:1]
    grid = _blank(height, width, background)
    bounds = [[-1, *sorted(cut), size] for cut, size in zip(cuts, (height, width))]
    for top, bottom in zip(bounds[0], bounds[0][1:]):
        for left, right in zip(bounds[1], bounds[1][1:]):
            manner = dice.random() if fills else 1
            fill = dice.pick(fills) if fills else background
            for i in range(top + 1, bottom):
                for j in range(left + 1, right):
                    if manner < 0.2 or (manner < 0.6 and dice.chance(0.3)):
                        grid[i][j] = fill
    for i in cuts[0]:
        grid[i] = [line] * width
    for row in grid:
        for j in cuts[1]:
            row[j] = line
    if not cuts[0] and not cuts[1]:  # too small for a line
        grid[0][0] = line
        return grid, {}
    return grid, {"count": (len(cuts[0]) + 1) * (len(cuts[1]) + 1)}


KINDS = (rectangles, outlines, sprites, lines, mirrored, tiled, stripes, crosses, frames, scattered, fields)


def symmetry_of(grid):
    """0 none, 1 left-right, 2 up-down, 3 both, 4 about the main diagonal only; of a list of rows."""
    across, down = all(row == row[::-1] for row in grid), grid == grid[::-1]
    if across or down:
        return across + 2 * down
    return 4 if len(grid) == len(grid[0]) and grid == [list(column) for column in zip(*grid)] else 0


def measured(grid, background, count=None):
    """The factors that can be read off a finished grid; those of an object where it is the only one (count 1)."""
    flat = [cell for row in grid for cell in row]
    seen = Counter(flat)
    others = [(-n, colour) for colour, n in seen.items() if colour != background]
    found = {"height": len(grid), "width": len(grid[0]), "n_colours": len(seen), "symmetry": symmetry_of(grid),
             "background": background if background in seen else -1, "colour": min(others)[1] if others else -1}
    if count == 1:
        found["row"] = next(i for i, row in enumerate(grid) if any(cell != background for cell in row))
        found["column"] = min(j for row in grid for j, cell in enumerate(row) if cell != background)
        found["size"] = len(flat) - seen[background]
    return found


def _ruled(dice, rule, grid, background, colours):
    """The output that a rule makes of an input."""
    height, width = len(grid), len(grid[0])
    if rule == "fall":  # what is not background drops to the lower edge
        columns = [[cell for cell in column if cell != background] for column in zip(*grid)]
        columns = [[background] * (height - len(column)) + column for column in columns]
        return [list(row) for row in zip(*columns)]
    if rule == "frame":  # a line along the edge
        colour = dice.pick(colours)
        return [[colour if i in (0, height - 1) or j in (0, width - 1) else cell for j, cell in enumerate(row)]
                for i, row in enumerate(grid)]
    if rule == "complete":  # the left half mirrored onto the right one
        return [[row[min(j, width - 1 - j)] for j in range(width)] for row in grid]
    places = [(i, j) for i, row in enumerate(grid) for j, cell in enumerate(row) if cell != background]
    if rule == "trim":  # only the box that everything lies in
        top, bottom = places[0][0], places[-1][0]
        left, right = min(j for _, j in places), max(j for _, j in places)
        return [row[left:right + 1] for row in grid[top:bottom + 1]]
    colour = grid[places[0][0]][places[0][1]]  # unify: everything in the first cell's colour
    return [[cell if cell == background else colour for cell in row] for row in grid]


def synthetic(seed, side, number, max_side, n_colours):
    """What is drawn under this number: one item, or two (input and output), each (rows, name, task, factors).

    Depends on nothing but its arguments. `side`: "train" or "val". Factors, -1 where there is none:
    kind (place in KINDS), height, width, n_colours (distinct), symmetry (see symmetry_of), background (where any of it
    is left), colour (the most frequent other one, the lowest of several), count (of objects; fields: of fields), row,
    column and size (of an only object: the top left corner of its box, and how many cells it has), period (the whole
    grid repeats after so many rows, and after so many columns), rule (place in RULES; of both parts of a pair). An
    output has neither count nor period.
    """
    dice = Dice(seed, side, number, max_side, n_colours)
    smallest = min(3, max_side) if max_side >= 3 else 1
    height = dice.between(smallest, max_side)
    width = height if dice.chance(0.3) else dice.between(smallest, max_side)
    background = 0 if dice.chance(0.9) else dice.between(1, n_colours - 1)
    colours = dice.shuffled(colour for colour in range(n_colours) if colour != background)
    if background and 0 in colours[1:] and dice.chance(0.5):  # black is the most frequent colour in ARC
        colours.remove(0)
        colours.insert(0, 0)
    kind = dice.between(0, len(KINDS) - 1)
    grid, given = KINDS[kind](dice, height, width, background, colours)
    first = {"kind": kind, **given, **measured(grid, background, given.get("count"))}
    name, task = f"synthetic {KINDS[kind].__name__} {number}", str(number)
    rule = dice.between(0, len(RULES) - 1)
    output = _ruled(dice, RULES[rule], grid, background, colours) if dice.chance(PAIRED) else grid
    second = {"kind": kind, "rule": rule, **measured(output, background)}
    if output == grid or second["colour"] < 0:  # no pair, or one that shows nothing
        return [(grid, name, task, _complete(first))]
    return [(grid, f"{name} input", task, _complete({**first, "rule": rule})),
            (output, f"{name} output", task, _complete(second))]


def _complete(factors):
    return {name: factors.get(name, -1) for name in FACTORS}


def _load_synthetic(max_side, n_colours, n_train, n_val, seed):
    """(train, val, lines for people) of synthetic grids."""
    if n_colours < 2:
        raise UserError(f"n_colours is {n_colours}: synthetic grids need at least 2 colours")
    val = _drawn("val", n_val, max_side, n_colours, seed, ())
    train = _drawn("train", n_train, max_side, n_colours, seed, val.rows)
    told = [f"{side}: {len(collector.kept):,} synthetic grids of {len(KINDS)} kinds, {len(collector.pairs):,} whole "
            f"pairs; sides up to {max_side}, {n_colours} colours, seed {seed}; {collector.repeated:,} dropped as "
            "repeated" for side, collector in (("train", train), ("val", val))]
    told[0] += f", {train.held_out:,} as in val"
    return train.grids(), val.grids(), told


def _drawn(side, wanted, max_side, n_colours, seed, forbidden):
    """A collector of `wanted` different grids: the first ones by their numbers."""
    collector, number = _Collector(max_side, forbidden), 0
    while (have := len(collector.kept)) < wanted:
        size = max(1000, (wanted - have) * 5 // 4)
        drawn = [synthetic(seed, side, number + i, max_side, n_colours) for i in range(size)]
        number += size
        places = iter(collector.add([item for items in drawn for item in items], wanted))
        for items in drawn:
            rows = [next(places) for _ in items]
            if len(rows) == 2 and all(row is not None and collector.kept[row][3] == items[0][2] for row in rows):
                collector.pairs.append(tuple(rows))  # no grid of another number, whose factors say something else
        if len(collector.kept) < min(wanted, have + size // 25):  # hardly any is new
            raise UserError(f"there are hardly more than {len(collector.kept):,} different synthetic grids for {side} "
                            f"with max_side {max_side} and n_colours {n_colours}, and n_{side} is {wanted:,}: take a "
                            f"smaller n_{side} or a larger max_side")
    return collector


# --- Statistics ---

def statistics(grids):
    """Figures of one side: grids, pairs, median_area, p90_area; zeros: the share of cells of colour 0; constant: the
    share of cells right when each grid is filled with its own most frequent colour (the floor of a reconstruction)."""
    areas = grids.shapes.prod(1)
    counts = torch.stack([(grids.cells == colour).flatten(1).sum(1) for colour in range(COLOURS)], 1)  # (N, colours)
    return {"grids": len(grids), "pairs": len(grids.pairs), "median_area": float(areas.double().quantile(0.5)),
            "p90_area": float(areas.double().quantile(0.9)), "zeros": float(counts[:, 0].sum() / areas.sum()),
            "constant": float(counts.amax(1).sum() / areas.sum())}


def picture(grids, rows=8, columns=12):
    """(H, W, 3) uint8 array: rows x columns of the grids, spread evenly over all of them, in ARC's colours."""
    cell = max(4, 80 // grids.cells.shape[-1])  # pixels
    side = grids.cells.shape[-1] * cell + 4
    image = np.full((rows * side, columns * side, 3), 60, np.uint8)
    palette = np.array(PALETTE, np.uint8)
    for place, i in enumerate(np.linspace(0, len(grids) - 1, min(rows * columns, len(grids))).astype(int).tolist()):
        height, width = grids.shapes[i].tolist()
        tile = palette[grids.cells[i, :height, :width].numpy()].repeat(cell, 0).repeat(cell, 1)
        tile[::cell], tile[:, ::cell] = 85, 85  # thin lines between the cells
        top, left = place // columns * side + 2, place % columns * side + 2
        image[top:top + len(tile), left:left + tile.shape[1]] = tile
    return image


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


@command
def main(argv=None):
    """The command line: loads a data set, says what is in it and draws some of it."""
    parser = _Parser(prog="data/arc.py", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", default="synthetic", help=f"synthetic, {', '.join(SETS)}; joined by +")
    parser.add_argument("--val_dataset", "--val-dataset", help="likewise, for validation; else the usual partner")
    parser.add_argument("--max_side", "--max-side", type=int, default=8, help="only grids that are no larger")
    parser.add_argument("--n_colours", "--n-colours", type=int, default=10, help="only grids with lower colours")
    parser.add_argument("--n_train", "--n-train", type=int, default=20_000, help="synthetic training grids")
    parser.add_argument("--n_val", "--n-val", type=int, default=1_000, help="synthetic validation grids")
    parser.add_argument("--crops", type=int, default=4, help="random pieces of each larger training grid")
    parser.add_argument("--seed", type=int, default=0, help="of crops and synthetic grids")
    parser.add_argument("--stats", action="store_true", help="count, and write arc_<dataset>.png (training grids)")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the picture")
    args = parser.parse_args(argv)
    arc = load(args.dataset, args.val_dataset, args.max_side, args.n_colours, args.n_train, args.n_val, args.crops,
               args.seed)
    print(arc.source)
    if args.stats:
        for name, side in (("train", arc.train), ("val", arc.val)):
            figures = statistics(side)
            print(f"{name}: {figures['grids']:,} grids, {figures['pairs']:,} pairs, median area "
                  f"{figures['median_area']:g}, 90% up to {figures['p90_area']:g}; colour 0 in {figures['zeros']:.1%} "
                  f"of the cells; each grid's best constant colour is right in {figures['constant']:.1%}")
        path = args.out / f"arc_{args.dataset.replace('+', '_')}.png"
        from matplotlib import image
        try:
            image.imsave(path, picture(arc.train))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
