"""Synthetic grids with known factors, in the manner of ARC's: eleven kinds, and rules from an input to its output.

Every grid depends on its number, the side it is for and the settings only, and is the same on every machine.
"""
import random
from collections import Counter

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
    """(grid, {"count": how many found room}): objects, lists of rows with None where they are hollow, put at random
    places so that no two touch, not even at a corner; the first always fits."""
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
    return grid, {"count": count}


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
    return _with_objects(dice, height, width, background, objects)


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
    return _with_objects(dice, height, width, background, objects)


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
    return _with_objects(dice, height, width, background, objects)


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
    return _with_objects(dice, height, width, background, objects)


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


def measured(grid, background, **given):
    """All factors, those given and those that can be read off a finished grid: of an object where it is the only one
    (count 1)."""
    flat = [cell for row in grid for cell in row]
    seen = Counter(flat)
    others = [(-n, colour) for colour, n in seen.items() if colour != background]
    found = {"height": len(grid), "width": len(grid[0]), "n_colours": len(seen), "symmetry": symmetry_of(grid),
             "background": background if background in seen else -1, "colour": min(others)[1] if others else -1}
    if given.get("count") == 1:
        found["row"] = next(i for i, row in enumerate(grid) if any(cell != background for cell in row))
        found["column"] = min(j for row in grid for j, cell in enumerate(row) if cell != background)
        found["size"] = len(flat) - seen[background]
    return dict.fromkeys(FACTORS, -1) | given | found


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
    """What is drawn under this number: one item, or two (input and output), each (rows, name, task, factors). `side`:
    "train" or "val".

    Factors, -1 where there is none: kind (place in KINDS), height, width, n_colours (distinct), symmetry (see
    symmetry_of), background (where any of it is left), colour (the most frequent other one, the lowest of several),
    count (of objects; fields: of fields), row, column and size (of an only object: the corner of its box, and its
    cells), period (of rows and of columns of the whole grid), rule (place in RULES; of both parts of a pair). An output
    has neither count nor period.
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
    first = measured(grid, background, kind=kind, **given)
    name, task = f"synthetic {KINDS[kind].__name__} {number}", str(number)
    rule = dice.between(0, len(RULES) - 1)
    output = _ruled(dice, RULES[rule], grid, background, colours) if dice.chance(PAIRED) else grid
    second = measured(output, background, kind=kind, rule=rule)
    if output == grid or second["colour"] < 0:  # no pair, or one that shows nothing
        return [(grid, name, task, first)]
    return [(grid, f"{name} input", task, {**first, "rule": rule}), (output, f"{name} output", task, second)]
