"""Did it matter? The rule by which a change is told from noise, and the grid.json of its runs.

Every figure is y(row, draw) = row + draw + rest: a draw is a seed, of the initialisation and, where it sets the data
too, of the data, and what it does to all rows alike is taken out by least squares. The deviation of the rest, pooled
over all rows, is the noise that a difference is held against. Of many rows some differ by chance: Holm (1979) keeps the
chance of one false "better" or "worse" among all at 5 %, where the rows are equally noisy. "the same" asks of each row
by itself as much evidence as a difference: two one-sided tests at 5 % (Schuirmann 1987), that is, the 90 % interval
lies within +-`same`.
"""
import math
from dataclasses import dataclass

import numpy as np

from nanolab import archive
from nanolab.run import UserError

LEVEL = 0.05         # of a false verdict in the whole table; intervals are of 95 %
WILD = 2.0           # a row of 3 draws, which others have too, whose own deviation is so many times the pooled one is
                     # judged by it (Welch 1947)


@dataclass(frozen=True)
class Effect:
    """A difference of two rows: its standard error, the degrees of freedom of that, and the row's number of draws."""
    difference: float
    error: float
    freedom: float
    draws: int

    def half(self, level=1 - LEVEL):
        """Half of the interval of this level, by Student's t."""
        from scipy.special import stdtrit        # here: it takes a third of a second
        return float(self.error * stdtrit(self.freedom, (1 + level) / 2))

    @property
    def p(self):
        """Of a difference at least as large where there is none, either sign."""
        from scipy.special import stdtr
        if not self.error:
            return float(self.difference == 0)
        return float(2 * stdtr(self.freedom, -abs(self.difference) / self.error))

    @property
    def sign(self):
        """-1 or 1 where the interval leaves out 0, else 0."""
        return 0 if self.p >= LEVEL else int(math.copysign(1, self.difference))


class Fit:
    """The two-way fit of one rung. values: {row: {draw: figure}}; less is better.

    sigma: deviation of the rest, freedom: its degrees of freedom; unpaired: the deviation within rows with the draws
    left in. Rows that are wild have no part in any of them. error: a further deviation of every difference.
    """

    def __init__(self, values, error=0.0):
        self.values, self.error, self.wild = values, error, {}
        self.solve()
        self.wild = {row: own for row in values if (own := self.own(row)) > WILD * self.sigma}
        if self.wild:
            self.solve()
            kept = {row: own for row in self.wild if (own := self.own(row))}
            if kept.keys() != self.wild.keys():
                self.wild = kept                 # 3 draws of the others have gone with them: back into the pool
                self.solve()
            self.wild = {row: self.own(row) for row in kept}

    def solve(self):
        """Least squares over the rows that are not wild."""
        tame = [row for row, mine in self.values.items() if mine and row not in self.wild]
        draws = sorted({draw for row in tame for draw in self.values[row]})
        cells = [(row, draw) for row in tame for draw in self.values[row]]
        design = np.zeros((len(cells), len(tame) + len(draws)))
        for i, (row, draw) in enumerate(cells):
            design[i, tame.index(row)] = design[i, len(tame) + draws.index(draw)] = 1
        figures = np.array([self.values[row][draw] for row, draw in cells])
        self.inverse, self.place = np.linalg.pinv(design.T @ design), {row: i for i, row in enumerate(tame)}
        found = self.inverse @ design.T @ figures
        found[len(tame):] -= found[len(tame):].mean()
        self.draws = dict(zip(draws, found[len(tame):].tolist()))
        rest = figures - design @ (self.inverse @ design.T @ figures)
        self.freedom = len(cells) - int(np.linalg.matrix_rank(design))
        self.sigma = math.sqrt(rest @ rest / self.freedom) if self.freedom else math.nan
        within = np.concatenate([own - own.mean() for row in tame for own in [np.array([*self.values[row].values()])]])
        self.unpaired = math.sqrt(within @ within / max(1, len(cells) - len(tame)))

    def cleared(self, row):
        """A row's figures without what their draws do to all rows."""
        return np.array([figure - self.draws[draw] for draw, figure in self.values[row].items() if draw in self.draws])

    def own(self, row):
        """The deviation of a row's own rest; 0 of fewer than 3 draws, which tell little of it. A draw that no other row
        has tells nothing: its rest is 0."""
        others = set().union(*(self.values[other] for other in self.place if other != row))
        mine = self.cleared(row)[[draw in others for draw in self.values[row] if draw in self.draws]]
        return float(mine.std(ddof=1)) if len(mine) > 2 else 0.0

    def together(self, one, other):
        """Whether draws lead from one row to another, if only over the rows between: else nothing tells them apart."""
        near, before = self.values[one].keys() & self.draws.keys(), None
        while near != before:
            before = near
            near = near.union(*(self.values[row] for row in self.place if near & self.values[row].keys()))
        return bool(near & self.values[other].keys())

    def mean(self, row):
        """A row's figure, as if it had had every draw."""
        return float(self.cleared(row).mean())

    def effect(self, row, against):
        """The Effect of a row; None without degrees of freedom, or where no draws lead from one to the other."""
        if not self.freedom or not self.values.get(row) or not self.values.get(against) \
                or not self.together(row, against):
            return None
        if row == against:                       # the same runs
            return Effect(0.0, 0.0, self.freedom, len(self.values[row]))
        difference, pair = round(self.mean(row) - self.mean(against), 12), (row, against)
        if self.wild.keys() & set(pair):
            error, freedom = self.apart([(name, len(self.cleared(name))) for name in pair])
        else:
            one, other = (self.place[name] for name in pair)
            spread = self.inverse[one, one] + self.inverse[other, other] - 2 * self.inverse[one, other]
            error, freedom = self.sigma * math.sqrt(max(0.0, spread)), self.freedom
        return Effect(difference, math.hypot(error, self.error), freedom, len(self.values[row]))

    def apart(self, counts):
        """(standard error, degrees of freedom) of a difference of means of so many draws, a (row, count) for each of
        the two; where one is wild, by the deviation of each (Welch-Satterthwaite)."""
        parts = [(self.wild.get(row, self.sigma) ** 2 / count,
                  len(self.cleared(row)) - 1 if row in self.wild else self.freedom) for row, count in counts]
        variance, wild = sum(part for part, _ in parts), self.wild.keys() & dict(counts)
        freedom = variance ** 2 / sum(part ** 2 / own for part, own in parts) if wild else self.freedom
        return math.sqrt(variance), freedom


def components(values):
    """Deviations (of rows, of draws, of the rest) of {row: {draw: figure}} by the mean squares of the two-way table; 0
    where one is below the rest's. None with gaps, or without two of each."""
    draws = {(*sorted(mine),) for mine in values.values()}
    if len(draws) != 1 or len(*draws) < 2 or len(values) < 2:
        return None
    table = np.array([[mine[draw] for draw in sorted(mine)] for mine in values.values()])
    rows, draws = table.shape
    down, across = table.mean(1, keepdims=True) - table.mean(), table.mean(0) - table.mean()
    rest = ((table - table.mean() - down - across) ** 2).sum() / ((rows - 1) * (draws - 1))
    return tuple(math.sqrt(max(0.0, square)) for square in (
        (down ** 2).sum() / (rows - 1) - rest / draws, (across ** 2).sum() / (draws - 1) - rest / rows, rest))


def holm(chances):
    """Holm's adjusted p: the i-th smallest of n times n - i, never below one before it."""
    adjusted, largest = [0.0] * len(chances), 0.0
    for i, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = adjusted[place] = max(largest, min(1.0, (len(chances) - i) * chances[place]))
    return adjusted


def ordered_alike(one, other, within=math.inf):
    """Decision accuracy (Magnusson et al. 2025, arXiv 2504.11393): (share, count) of the pairs of rows that two rungs
    order alike, of those that the first has closer than `within`. one, other: {row: mean}."""
    names = [name for name in one if name in other]
    alike = [(one[a] - one[b]) * (other[a] - other[b]) > 0 for i, a in enumerate(names) for b in names[:i]
             if abs(one[a] - one[b]) < within]
    return (sum(alike) / len(alike) if alike else math.nan), len(alike)


def rank_correlation(one, other):
    """Spearman's over the rows that both have; not a number for fewer than 3."""
    names = [name for name in one if name in other]
    if len(names) < 3:
        return math.nan
    ranks = [np.argsort(np.argsort([side[name] for name in names])) for side in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


NUMBER = (int, float)
LATE = {"shown", "at", "sigma_data", "rungs", "primary", "same", "log", "published", "predicted", "flops"}  # of some
RUN = {"run": str, "value": NUMBER, "seed": int, "max_steps": (int, type(None)), "shown": dict}
ROW = {"name": str, "axis": str, "against": (str, type(None)), "factor": (*NUMBER, type(None)), "runs": [RUN],
       "tuned": [list], "published": dict, "predicted": (str, type(None)),
       "step_seconds": (*NUMBER, type(None)), "parameters": (*NUMBER, type(None)), "flops": (*NUMBER, type(None)),
       "error": (str, type(None)), "open": int, "equal_seconds": (dict, type(None)), "at": (dict, type(None))}


def fits(value, shape):
    """Whether a JSON value has the shape: a type or several, [the shape of all its items], {key: shape}. No number is
    endless, not a number, or too long to reckon with."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[name], kind) if name in value else name in LATE for name, kind in shape.items())
    if isinstance(value, (int, float)) and not abs(value) < 1e300:
        return False
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


def read_index(path):
    """The grid.json at `path`, or that in an archive. UserError where it is not there, or not as grid.py writes it."""
    index = archive.read_grid(path)
    right = index.get("rows") and fits(index, {"metric": str, "rows": [ROW], "sigma_data": NUMBER, "same": NUMBER,
                                               "rungs": [int], "primary": int, "log": bool})
    rows = index["rows"] if right else []
    names, cross = {row["name"] for row in rows}, index.get("cross")
    right = right and len(names) == len(rows) and all(
        row["against"] in (None, *names) and (not (run := row["equal_seconds"]) or fits(run, RUN))
        and all(len(pair) == 2 and fits(pair, [(*NUMBER, type(None))]) and pair[0] for pair in row["tuned"])
        and fits([*row.get("published", {}).values()], [NUMBER]) for row in rows)
    right = right and index.get("rungs", []) == sorted({max(1, long) for long in index.get("rungs", [])})
    if right and cross:
        right = fits(cross, dict) and all(fits(given, dict) for given in cross.values()) and all(
            row.get("at") and row["at"].keys() == cross.keys() for row in rows)
    elif right:
        right = fits(index, {"factors": [NUMBER], "slower": NUMBER}) and index["factors"] and all(
            factor > 0 for factor in [*index["factors"], *(pair[0] for row in rows for pair in row["tuned"])]) and all(
            (row["against"] is None) == (row is rows[0]) and (not row["runs"] or row["factor"] is not None)
            for row in rows)
    if not right:
        raise UserError(f"{path} is missing or no grid: python grid.py writes it")
    return index


@dataclass
class Rung:
    """One length of training. `steps`: None where the grid has no ladder; name: 1x, 4x, ... of the first; as_one: {row:
    the first one with a run of it, which the fit has}."""
    steps: int
    name: str
    fit: Fit
    as_one: dict

    def effect(self, row, against):
        """The Effect of a row, as of Fit."""
        return self.fit.effect(self.as_one[row], self.as_one[against])


@dataclass
class Found:
    """What is known of a row. effects: {rung's name: Effect}, of those that were run; equal: that at equal seconds.

    time, size, work: seconds a step, parameters and FLOPs relative to what the row is held against; worth: it is worth
    so many times the steps; sensitivity: how much the tried rates lose on average against the best (Wortsman et al.
    2023); gain: what a parabola through the best rate and its two neighbours promises beyond it, not a number at an
    edge.
    """
    row: dict
    effects: dict
    verdict: str = None      # better, worse, the same, undecided
    holds: str = ""          # over the rungs: holds, turns, 1x only
    worth: float = None
    equal: Effect = None
    time: float = None
    size: float = None
    work: float = None
    sensitivity: float = None
    gain: float = math.nan


@dataclass
class Judged:
    """A table: its rungs, the one of the verdicts, and what is known of each row."""
    rungs: list
    primary: Rung
    rows: list               # of Found, without the baseline
    doubling: float = None   # what the baseline gains by twice the steps


def judge(index):
    """The Judged of a grid.json; where it says `log`, of the logarithms, so that a difference is that of a ratio.

    UserError where nothing can tell the noise yet.
    """
    rows, steps, log = {row["name"]: row for row in index["rows"]}, index.get("rungs") or [None], index.get("log")
    first, *others = rows
    if log and (low := [row["name"] for row in index["rows"] for run in [*row["runs"], row["equal_seconds"]]
                        if run and run["value"] <= 0]):
        raise UserError(f"log: a figure of {low[0]} is not above 0, it has no logarithm")
    rungs = []
    for long in steps:
        runs = {name: [run for run in row["runs"] if long is None or run["max_steps"] == long]
                for name, row in rows.items()}
        owners, as_one, values = {}, {}, {}      # rows that share a run are one model: it tells the noise once
        for name, mine in runs.items():
            as_one[name] = owner = next((owners[run["run"]] for run in mine if run["run"] in owners), name)
            owners |= {run["run"]: owner for run in mine}
            values.setdefault(owner, {}).update(
                {run["seed"]: math.log(run["value"]) if log else run["value"] for run in mine})
        if values[first] and (fit := Fit(values, index.get("sigma_data", 0.0))).freedom:
            rungs.append(Rung(long, f"{long / steps[0]:g}x" if long else "", fit, as_one))
    if not rungs:
        raise UserError("no two seeds of the baseline and of a row yet: nothing tells the noise")
    primary = next((rung for rung in rungs if rung.steps == index.get("primary")), rungs[-1])
    found = [Found(rows[name], {rung.name: effect for rung in rungs
                                if (effect := rung.effect(name, rows[name]["against"]))})
             for name in others]
    judged = [mine for mine in found if primary.name in mine.effects]
    chances = holm([mine.effects[primary.name].p for mine in judged])
    gained = None
    if primary is not rungs[0]:
        gained = (rungs[0].fit.mean(first) - primary.fit.mean(first)) / math.log2(primary.steps / rungs[0].steps)
    for mine, chance in zip(judged, chances):
        effect, same = mine.effects[primary.name], index.get("same", 0.0)
        mine.verdict = ("better" if effect.difference < 0 else "worse") if chance < LEVEL else "undecided"
        if mine.verdict == "undecided" and abs(effect.difference) + effect.half(1 - 2 * LEVEL) < same:
            mine.verdict = "the same"
        mine.worth = 2 ** min(99.0, -effect.difference / gained) if gained and gained > 0 else None
        mine.holds = held(mine.effects)
    for mine in found:
        row, against = mine.row, rows[mine.row["against"]]
        mine.time, mine.size, mine.work = (row[key] / against[key] if row.get(key) and against.get(key) else None
                                           for key in ("step_seconds", "parameters", "flops"))
        tried = {factor: value for factor, value in row["tuned"] if value is not None}
        losses = [tried[factor] for factor in index["factors"] if factor in tried]
        mine.sensitivity = sum(losses) / len(losses) - min(losses) if len(losses) > 1 else None
        mine.gain = parabola(tried)
        if row["equal_seconds"] and rungs[0].steps == steps[0]:              # whose steps they are
            mine.equal = equal_seconds(rungs[0], row, log)
    return Judged(rungs, primary, found, gained)


def parabola(tried):
    """{factor: figure}: how far the vertex, over log factor, lies below the best; not a number for one at an edge."""
    factors = sorted(tried)
    at = min(range(len(factors)), key=lambda i: tried[factors[i]], default=0)
    if not 0 < at < len(factors) - 1:
        return math.nan
    near = factors[at - 1:at + 2]
    a, b, c = np.polyfit(np.log(near), [tried[factor] for factor in near], 2)
    return float(tried[factors[at]] - (c - b * b / (4 * a)))


def held(effects):
    """Over rungs, {name: Effect}: "holds" where all that have a sign agree and two have one, "turns" where two have
    another, "4x only" where one alone has one; "" where none has, or there is one rung."""
    signs = {name: effect.sign for name, effect in effects.items() if effect.sign}
    if len(effects) < 2 or not signs:
        return ""
    return "turns" if len(set(signs.values())) > 1 else "holds" if len(signs) > 1 else f"{next(iter(signs))} only"


def equal_seconds(rung, row, log):
    """The Effect of the one run that had as many seconds: its draw is that of its seed, which others must have."""
    fit, run, mine, against = rung.fit, row["equal_seconds"], rung.as_one[row["name"]], rung.as_one[row["against"]]
    if run["seed"] not in fit.draws or not len(fit.cleared(against)):
        return None
    value = math.log(run["value"]) if log else run["value"]
    error, freedom = fit.apart([(mine, 1), (against, len(fit.cleared(against)))])
    return Effect(value - fit.draws[run["seed"]] - fit.mean(against), math.hypot(error, fit.error), freedom, 1)
