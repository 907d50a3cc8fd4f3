"""Grids of ARC and their codes, in pictures and in files: what train_dvae.py draws, reads and prints of them.

Shapes: M grids, S side of the canvas; r rows and c columns of codes. Tokens are those of a data.arc.Canvas.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch

from data.arc import PALETTE, canvases, wrong
from nanolab.run import replacing
from nanolab.settings import UserError, shown


# --- Pictures ---

def picture(tokens, canvas):
    """Tokens (S, S) -> an RGB image (S, S, 3) uint8: ARC's colours, row ends and PAD white, MASK light grey."""
    table = np.full((canvas.n_outputs + 1, 3), 255, np.uint8)
    table[:canvas.n_colours] = PALETTE[:canvas.n_colours]
    table[-1] = 200
    return table[tokens.clamp(max=canvas.n_outputs).numpy()]


def draw(path, panels, canvas, codebook_size):
    """A PNG of a column of panels for each (title, tokens (M, S, S)), or (title, codes (M, r, c)) if it says so."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    page, panel = np.full((120 * len(panels[0][1]), 120 * len(panels), 3), 255, np.uint8), 108
    # one image in one frame: axes for every panel would take a second
    figure = Figure(figsize=(page.shape[1] / 80, page.shape[0] / 80 + 0.4), dpi=80)
    axes = figure.add_axes((0, 0, 1, page.shape[0] / (page.shape[0] + 32)))
    for c, (title, column) in enumerate(panels):
        axes.text(120 * c + 60, -8, title, ha="center", fontsize=8)
        for r, one in enumerate(column):
            if title.startswith("codes"):
                small = (colormaps["nipy_spectral"](one.numpy() / (codebook_size - 1))[..., :3] * 255).astype(np.uint8)
                small[one.numpy() < 0] = 255
            else:
                small = picture(one, canvas)
            y, x = (np.arange(panel) * n // panel for n in small.shape[:2])      # enlarged by repeating
            top, left = 120 * r + 6, 120 * c + 6
            page[top - 1:top + panel + 1, left - 1:left + panel + 1] = 0         # a thin frame
            page[top:top + panel, left:left + panel] = small[y[:, None], x]
    axes.imshow(page)
    axes.axis("off")
    with replacing(path) as file:
        figure.savefig(file, format="png")


# --- Files: grids to codes, codes to grids ---

def grids_of(value, name="grid", depth=0):
    """[(name, rows of colours)] of what a JSON file holds: one grid, a list of grids, a task, or several by name."""
    if depth > 20:
        raise UserError(f"{shown(name)}: nested too deeply: a grid is a list of rows, each a list of colours")
    if isinstance(value, list) and value and all(isinstance(row, list) and row and all(
            type(cell) is int for cell in row) for row in value):
        return [(name, value)]
    if not isinstance(value, (dict, list)):
        raise UserError(f"{shown(name)}: {json.dumps(value)[:40]} is no grid: a grid is a list of rows, each a list of "
                        "colours")
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [found for key, item in items for found in grids_of(item, f"{name} {key}", depth + 1)]


def read_file(path):
    """The JSON in a file. UserError: not there, not JSON."""
    try:
        if Path(path).is_char_device():
            raise UserError(f"{path} is a device, no JSON")      # it may have no end
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


@torch.no_grad()
def print_codes(model, path, autocast):
    """A line of JSON for every grid of a JSON file: its name, shape and codes, and whether they suffice. UserError: no
    file, no grid, one that the model does not know."""
    named, canvas = grids_of(read_file(path), Path(path).stem), model.config.canvas
    if not named:
        raise UserError(f"{path} holds no grid")
    for name, rows in named:
        if what := wrong(rows, canvas.max_side, canvas.n_colours):
            raise UserError(f"{path}, {name}: {what} for this model")
    cells, shapes = (torch.from_numpy(part).to(model.queries.device)
                     for part in canvases([rows for _, rows in named], canvas.max_side))
    tokens = canvas.tokens(cells)
    with autocast:
        codes = model.with_shape(model.codebook(model.encode(tokens, shapes)).codes, shapes)
        exact = (model.write(*model.read(codes)) == tokens).flatten(1).all(1)
    for (name, _), shape, row, right in zip(named, shapes.tolist(), codes.tolist(), exact.tolist()):
        print(json.dumps({"grid": name, "shape": shape, "codes": row, "exact": right}))


@torch.no_grad()
def print_grids(model, words, autocast):
    """A line of JSON for the grid that codes with commas between stand for, or for each list of codes in a JSON file;
    null where what is written forms no grid. UserError: too few codes, too many, out of range."""
    n, size = model.config.n_codes, model.config.codebook_size
    if os.path.isfile(words):                                # False where it is too long for a name
        value = read_file(words)
        codes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    else:
        codes = [[int(word) if word.strip().isdecimal() else word for word in words.split(",")]]
    for row in codes:
        if not isinstance(row, list) or len(row) != n or not all(type(k) is int and 0 <= k < size for k in row):
            raise UserError(f"--decode: this model wants {n} codes from 0 to {size - 1}, with commas between, or a "
                            "JSON file with a list of such lists")
    with autocast:
        tokens = model.write(*model.read(torch.tensor(codes, device=model.queries.device))).cpu()
    for rows, (h, w) in zip(tokens.tolist(), model.config.canvas.shapes(tokens).tolist()):
        print(json.dumps([row[:w] for row in rows[:h]] if h else None))
