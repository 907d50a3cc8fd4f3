"""ARC grids: finds, fetches, checks and splits them, makes synthetic ones, and cuts them into batches and tokens.

    python data/arc.py synthetic --stats             # made here, nothing to download; writes arc_synthetic.png
    python data/arc.py arc1 --max_side 10 --stats    # small grids and crops of ARC-AGI-1; writes arc_arc1.png

Sets: `synthetic`, or one or several (joined by +) of `arc1-training` (short: arc1), `arc1-evaluation`, `arc2-training`
(short: arc2) and `arc2-evaluation`. Their files, such as arc-agi-1-training.json.gz, are looked for in the folders of
NANOLAB_DATA, then in data/downloads/, then made from a download of the ARC repositories on GitHub. Or a .json file or a
folder of your own: `python data/arc.py my_tasks/`, see docs/dvae.md.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import functools
import gzip
import hashlib
import json
import zipfile
from dataclasses import dataclass

import numpy as np
import torch

from data import draw, files
from data.synthetic import KINDS, synthetic
from nanolab.run import command, replacing
from nanolab.settings import UserError, unknown

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
FORM = '{"train": [{"input": [[0, 1], ...], "output": ...}, ...], "test": [...]}'
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

    dataset: synthetic, arc1-training (short: arc1), arc1-evaluation, arc2-training (arc2), arc2-evaluation, joined by
        +; or a .json file or folder of tasks
    val_dataset: likewise, for validation; none: the usual partner, or one in ten of a file's or folder's tasks
    max_side: [>= 1, <= 30] only grids that are no larger
    n_colours: [>= 1, <= 10] only grids with lower colours
    n_train: [>= 1, <= 10_000_000] synthetic training grids
    n_val: [>= 1, <= 10_000_000] synthetic validation grids
    crops: [>= 0, <= 10_000] random pieces of each training grid of ARC that is larger than max_side
    seed: of crops, synthetic grids and which tasks are held out, which do not differ from machine to machine

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
    own = {*train_names}.isdisjoint(["synthetic", *SETS])
    if val_dataset is None and not own:
        val_dataset = PARTNERS.get("+".join(train_names))
        if val_dataset is None:
            raise UserError(f"dataset {dataset} has no usual validation set: give --val_dataset, one or several of "
                            f"{', '.join(SETS)} joined by +")
    val_names = _names(val_dataset, "val_dataset") if val_dataset is not None else []
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
    """The sets that `dataset` names, joined by +, each once and without aliases; or it, where it is a file or folder.
    """
    known, words = ["synthetic", *SETS], dataset.split("+")
    wrong = [word for word in words if word not in (*known, *ALIASES)]
    if wrong and files.existing(dataset):
        return [dataset]
    if wrong:
        raise unknown(what, wrong[0], [*known, "a .json file or a folder of tasks"], ALIASES)
    found = list(dict.fromkeys(ALIASES.get(word, word) for word in words))
    if "synthetic" in found and len(found) > 1:
        raise UserError(f"{what} {dataset}: synthetic grids cannot be mixed with others; take one of the two")
    return found


class _Collector:
    """Gathers the grids of one side, each kept once by its canonical form, and none that is `forbidden`."""

    def __init__(self, max_side, forbidden=()):
        self.max_side, self.forbidden = max_side, forbidden
        self.rows, self.kept, self.pairs = {}, [], []  # canonical form: row; (cells, shape, name, task, factors)
        self.repeated = self.held_out = 0

    def add(self, groups, limit=None):
        """Takes groups of one or two items (rows of a grid, name, task, factors) in order, up to `limit` grids in all.
        Two are a pair where both were kept, or others that are exactly equal; where there are factors, which those of
        another number need not share, both themselves."""
        items, rows = [item for group in groups for item in group], []
        cells, shapes = canvases([item[0] for item in items], self.max_side)
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
            rows.append(row)
        found = iter(rows)
        for group in groups:
            pair = tuple(next(found) for _ in group)
            if len(pair) == 2 and all(row is not None and (not item[3] or self.kept[row][3] == item[2])
                                      for row, item in zip(pair, group)):
                self.pairs.append(pair)

    def grids(self):
        cells, shapes, names, tasks, factors = zip(*self.kept)
        table = {name: torch.tensor([row.get(name, -1) for row in factors]) for name in factors[0] or ()}
        pairs = torch.tensor(list(dict.fromkeys(self.pairs)), dtype=torch.int64).view(-1, 2)
        return Grids(torch.from_numpy(np.stack(cells)), torch.from_numpy(np.stack(shapes)), list(names), pairs, table,
                     list(tasks))


def canvases(grids, max_side):
    """Lists of rows -> cells (N, S, S) uint8 and shapes (N, 2) int64, arrays."""
    cells = np.full((len(grids), max_side, max_side), OUTSIDE, np.uint8)
    shapes = np.array([(len(grid), len(grid[0])) for grid in grids], np.int64).reshape(-1, 2)
    for canvas, grid, (height, width) in zip(cells, grids, shapes.tolist()):
        canvas[:height, :width] = grid
    return cells, shapes


def _load_tasks(train_names, val_names, max_side, n_colours, crops, seed):
    """(train, val, lines for people) of sets of ARC, or of a person's own; val_names []: of one set, a tenth of it."""
    train_sets, val_sets = ({Path(name).name.partition(".json")[0] or name: _find_tasks(name) for name in names}
                            for names in (train_names, val_names))
    if not val_names:
        train_sets, val_sets = _divided(*train_sets.items(), seed)
    for name, tasks in train_sets.items():
        for other, others in val_sets.items():
            if shared := sorted(tasks.keys() & others.keys()):
                listed = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
                raise UserError(f"{name} and {other} share {len(shared)} of {len(others)} tasks ({listed}): a "
                                "model trained on one must not be scored on the other; choose arc1-training with "
                                "arc1-evaluation, or arc2-training with arc2-evaluation")
    val, train = (val := _Collector(max_side)), _Collector(max_side, val.rows)
    n_val, _ = _add_tasks(val, val_sets, n_colours)
    n_train, large = _add_tasks(train, train_sets, n_colours)
    n_whole, lines = len(train.kept), []
    pieces = [_crop(grid, name, task, k, max_side, seed) for grid, name, task in large for k in range(crops)]
    train.add([[piece] for piece in pieces if max(map(max, piece[0])) < n_colours])
    for side, sets, collector, total in (("train", train_sets, train, n_train), ("val", val_sets, val, n_val)):
        if not collector.kept:
            raise UserError(f"{'+'.join(sets)} has no grid with sides up to {max_side} and colours below {n_colours}"
                            f"{' that is not in the validation set' * (side == 'train')}: take a larger max_side or "
                            "n_colours")
        tasks = len({item[3] for item in collector.kept})
        n_tasks = len({task for tasks_of in sets.values() for task in tasks_of})
        lines.append(f"{side}: {len(collector.kept):,} grids of {tasks:,} of {n_tasks:,} tasks of {'+'.join(sets)} "
                     f"({total:,} grids in all), {len(dict.fromkeys(collector.pairs)):,} whole pairs; sides up to "
                     f"{max_side}, colours below {n_colours}; {collector.repeated:,} dropped as repeated")
    lines[0] += (f", {train.held_out:,} as in val; {len(train.kept) - n_whole:,} of the grids are crops ({crops} of "
                 "each larger grid)")
    return train.grids(), val.grids(), lines


def _divided(named, seed):
    """({name: tasks} to train on, {name: tasks} to validate on) of (name, tasks): one task in ten, at least one, is
    held out, by a hash of its name and the seed."""
    name, tasks = named
    if len(tasks) < 2:
        raise UserError(f"{name} has {len(tasks)} task, and takes two to be split: give --val_dataset")
    order = sorted(tasks, key=lambda task: draw.digest(seed, "held out", task))
    held = {*order[:max(1, len(tasks) // 10)]}
    return [{name: {task: parts for task, parts in tasks.items() if (task in held) == side}} for side in (False, True)]


def _add_tasks(collector, sets, n_colours):
    """Adds the grids of {set: tasks} that fit and their pairs; returns how many grids the tasks have, and (grid, name,
    task) of those that are larger than the canvas."""
    groups, larger = [], []
    for name, task, part, pairs in ((name, task, part, pairs) for name, tasks in sets.items()
                                    for task, parts in tasks.items() for part, pairs in parts.items()):
        for k, pair in enumerate(pairs):
            groups.append([])
            for end, grid in pair.items():
                label = f"{name} {task} {part} {k} {end}"
                if max(len(grid), len(grid[0])) > collector.max_side:
                    larger.append((grid, label, task))
                elif max(map(max, grid)) < n_colours:
                    groups[-1].append((grid, label, task, {}))
    collector.add(groups)
    return 2 * len(groups), larger


def _crop(grid, name, task, k, max_side, seed):
    """The k-th random piece of a grid: a function of the grid's name, k, the side and the seed."""
    digest = draw.digest(seed, max_side, name, k)
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
    """{task: {"train": [{"input", "output"}, ...], "test": [...]}} of a set, from a checked file or a download; or of a
    person's own."""
    if name not in SETS:
        return _own_tasks(files.existing(name))
    file, n_tasks, digest = SETS[name][:3]
    path = files.find(file)
    if path is None:
        try:
            path = _download(name)
        except UserError as error:
            raise UserError(f"{error}; put {file}.gz into {files.DOWNLOADS} or a folder of NANOLAB_DATA, or use "
                            "--dataset synthetic, which needs no file") from error
    try:
        return _checked(files.read(path).numpy().tobytes(), n_tasks, digest)
    except ValueError as error:
        raise UserError(f"{path} is not {file} ({n_tasks} tasks of ARC): {error}; replace or remove it") from error


def _own_tasks(path):
    """The tasks in a .json file of one, whose name is the file's, or of many, or in all such files of a folder."""
    paths, found = sorted(path.glob("*.json*")) if path.is_dir() else [path], {}
    for file in paths:
        try:
            tasks = _checked(files.content(str(file)), single=file.name.partition(".json")[0])
        except ValueError as error:
            raise UserError(f"{file}: {error}; a task is {FORM}") from error
        if again := sorted(found.keys() & tasks):
            raise UserError(f"{file} has task {again[0]}, which another file of {path} has")
        found |= tasks
    if not found:
        raise UserError(f"{path} has no {'task' if paths else '.json file'}: a task is {FORM}")
    return found


def _checked(content, n_tasks=None, digest=None, single=""):
    """The tasks in the bytes of a .json file, in the order of their ids. Raises ValueError: what is wrong.

    n_tasks: None: any number; then there may be one without an id, which is `single`."""
    try:
        tasks = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if single and isinstance(tasks, dict) and {"train", "test"} & tasks.keys():
        tasks = {single: tasks}
    if not isinstance(tasks, dict) or n_tasks not in (None, len(tasks)):
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
                    if what := wrong(grid):
                        raise ValueError(f"task {task}, {part} {k} {end} is no grid: {what}")
    if digest and _digest(found) != digest:
        raise ValueError(f"the sha256 of its tasks is {_digest(found)[:12]}..., not {digest[:12]}...")
    return found


def wrong(grid, side=LARGEST, n_colours=COLOURS):
    """What keeps a value from being one of ARC's grids with such sides and colours; "" if nothing."""
    if not isinstance(grid, list) or not 1 <= len(grid) <= side or not all(isinstance(row, list) for row in grid):
        return f"it must be a list of 1 to {side} rows"
    if len({len(row) for row in grid}) > 1 or not 1 <= len(grid[0]) <= side:
        return f"its rows must have one length from 1 to {side}"
    values = [value for row in grid for value in row if type(value) is not int or not 0 <= value < n_colours]
    return f"it has the value {values[0]!r}, and colours are 0 to {n_colours - 1}" if values else ""


def _digest(tasks):
    return hashlib.sha256(json.dumps(tasks, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _download(name):
    """Downloads the repository that has a set, checks and packs its sets into data/downloads/; returns the path."""
    repository, commit = SETS[name][3]

    def packed(archive):
        for file, n_tasks, digest, (other, _), part in SETS.values():
            if other == repository:
                tasks = _checked(_packed_folder(archive, part), n_tasks, digest)
                with replacing(files.DOWNLOADS / f"{file}.gz") as out:
                    out.write(gzip.compress(json.dumps(tasks, separators=(",", ":")).encode(), mtime=0))
    return files.fetched(f"https://codeload.github.com/{repository}/zip/{commit}",
                         files.DOWNLOADS / f"{SETS[name][0]}.gz", packed,
                         files.DOWNLOADS / f"{repository.rpartition('/')[2]}.zip.part")


def _packed_folder(archive, part):
    """The tasks in a folder of a repository's zip as one .json file: bytes."""
    with zipfile.ZipFile(archive) as packed:
        names = [name for name in packed.namelist()
                 if name.partition("/")[2].startswith(part) and name.endswith(".json")]
        if sum(packed.getinfo(name).file_size for name in names) > files.most_unpacked(archive):
            raise ValueError(f"it unpacks to more than {files.most_unpacked(archive):,} bytes")
        found = {name: packed.read(name) for name in names}
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

    def cut(self, tokens, shapes):
        """tokens (B, S, S) -> cells (B, S, S) uint8: what lies in shapes (B, 2), OUTSIDE elsewhere."""
        return torch.where(_inside(shapes, self.max_side), tokens, OUTSIDE).to(torch.uint8)


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
            images = [_renumbered(image.reshape(len(part), -1)) for image in images]
            head = bytes([min(height, width), max(height, width)])
            for i, *rows in zip(part.tolist(), *images):
                found[i] = head + min(row.tobytes() for row in rows)
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

    Each epoch is a permutation of all grids. `group` consecutive batches are drawn together, sorted by area, so that a
    batch has grids of similar size, and come in a random order. colours, symmetry, n_colours: see augment.
    """

    def __init__(self, grids, batch_size, seed, colours="all", symmetry=True, group=8, n_colours=10):
        self.grids, self.batch_size, self.group, self.how = grids, batch_size, group, (colours, symmetry, n_colours)
        self._generator = functools.partial(draw.torch_generator, seed)
        self._epoch, self._batches = functools.lru_cache(2)(self._epoch), functools.lru_cache(1)(self._batches)

    def _epoch(self, epoch):
        return torch.randperm(len(self.grids), generator=self._generator("epoch", epoch))

    def _batches(self, number):
        """The rows (group, B) of a group of batches."""
        size, n = self.group * self.batch_size, len(self.grids)
        start, stop = number * size, (number + 1) * size
        rows = torch.cat([self._epoch(epoch)[max(start - epoch * n, 0):stop - epoch * n]
                          for epoch in range(start // n, (stop - 1) // n + 1)])
        if self.group > 1:
            rows = rows[self.grids.shapes[rows].prod(1).argsort(stable=True)].view(self.group, -1)
            rows = rows[torch.randperm(self.group, generator=self._generator("group", number))]
        return rows.view(self.group, -1)

    def rows(self, step):
        """(B,) int64: which grids the batch of this step (from 0) holds, before augmentation."""
        return self._batches(step // self.group)[step % self.group]

    def at(self, step):
        """The batch of a step (from 0): cells (B, S, S) uint8, shapes (B, 2) int64."""
        rows = self.rows(step)
        return augment(self.grids.cells[rows], self.grids.shapes[rows], self._generator("augment", step), *self.how)


# --- Synthetic grids: data/synthetic.py makes them ---

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
        collector.add([synthetic(seed, side, number + i, max_side, n_colours) for i in range(size)], wanted)
        number += size
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


def describe(arc, dataset, stats=False, out="."):
    """Prints what there is; for --stats figures of both sides, and writes a picture.

    stats: count, and write arc_<dataset>.png (training grids)
    out: the folder of the picture
    """
    print(arc.source)
    if not stats:
        return
    for name, side in (("train", arc.train), ("val", arc.val)):
        figures = statistics(side)
        print(f"{name}: {figures['grids']:,} grids, {figures['pairs']:,} pairs, median area "
              f"{figures['median_area']:g}, 90% up to {figures['p90_area']:g}; colour 0 in {figures['zeros']:.1%} "
              f"of the cells; each grid's best constant colour is right in {figures['constant']:.1%}")
    path = Path(out) / f"arc_{Path(dataset).name.replace('+', '_')}.png"
    from matplotlib import image
    with replacing(path) as file:
        image.imsave(file, picture(arc.train), format="png")
    print(f"wrote {path}")


main = command(serve(load, describe))

if __name__ == "__main__":
    main()
