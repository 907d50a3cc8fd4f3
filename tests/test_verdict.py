"""nanolab/verdict.py: the two-way fit, Student's t, Holm, what rungs say of each other; beside slow formulas."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nanolab.run import UserError
from nanolab.verdict import Effect, Fit, components, held, holm, judge, ordered_alike, parabola, rank_correlation


def table(rows, draws, seed=0, deviation=1.0, draw=3.0, lacking=()):
    """{row: {draw: figure}} of made-up figures, without some cells: row i is i, each draw adds its own."""
    noise = np.random.default_rng(seed)
    shift = draw * noise.standard_normal(draws)
    return {f"r{i}": {d: i + shift[d] + deviation * noise.standard_normal() for d in range(draws)
                      if (i, d) not in lacking} for i in range(rows)}


def test_all_draws_of_all_rows():
    """With no gaps the fit is the paired comparison: the mean of paired differences, sigma by the two-way residual."""
    values = table(6, 4, draw=5.0)
    fit, figures = Fit(values), np.array([[*mine.values()] for mine in values.values()])
    rest = figures - figures.mean(0) - figures.mean(1, keepdims=True) + figures.mean()
    assert fit.freedom == 15 and fit.sigma == pytest.approx(math.sqrt((rest ** 2).sum() / 15))
    assert fit.unpaired == pytest.approx(math.sqrt(figures.var(1, ddof=1).mean()))
    assert fit.unpaired > 2 * fit.sigma                             # the draws are the larger noise here
    effect = fit.effect("r4", "r1")
    assert effect.difference == pytest.approx((figures[4] - figures[1]).mean()) and effect.draws == 4
    assert effect.error == pytest.approx(fit.sigma * math.sqrt(2 / 4)) and effect.freedom == 15
    assert fit.mean("r4") == pytest.approx(figures[4].mean())


def test_gaps():
    """Some rows lack draws: ordinary least squares with dummy variables, its covariance written out."""
    lacking = {(1, 2), (1, 3), (2, 0), (4, 1), (4, 2), (4, 3)}
    values = table(5, 4, lacking=lacking, deviation=0.1)
    fit, cells = Fit(values), [(i, d) for i in range(5) for d in range(4) if (i, d) not in lacking]
    design = np.array([[i == k for k in range(5)] + [d == k for k in range(1, 4)] for i, d in cells], float)
    figures = np.array([values[f"r{i}"][d] for i, d in cells])
    found, *_ = np.linalg.lstsq(design, figures, rcond=None)
    rest = figures - design @ found
    variance = rest @ rest / (len(cells) - 8)
    assert fit.sigma == pytest.approx(math.sqrt(variance)) and fit.freedom == len(cells) - 8
    for one, other in ((1, 0), (4, 2), (3, 1)):
        contrast = np.eye(8)[one] - np.eye(8)[other]
        effect = fit.effect(f"r{one}", f"r{other}")
        assert effect.difference == pytest.approx(contrast @ found, abs=1e-9)
        spread = contrast @ np.linalg.inv(design.T @ design) @ contrast
        assert effect.error == pytest.approx(math.sqrt(variance * spread))
    with_data = Fit(values, error=0.3).effect("r1", "r0")
    assert with_data.error == pytest.approx(math.hypot(fit.effect("r1", "r0").error, 0.3))


def test_intervals_and_chances():
    effect = Effect(-0.03, 0.01, 7, 3)
    assert effect.half() == pytest.approx(0.01 * stats.t.ppf(0.975, 7))
    assert effect.half(0.9) == pytest.approx(0.01 * stats.t.ppf(0.95, 7))
    assert effect.p == pytest.approx(2 * stats.t.cdf(-3, 7)) and effect.sign == -1
    assert Effect(0.02, 0.01, 7, 3).sign == 0 and Effect(0.03, 0.01, 7, 3).sign == 1
    assert Effect(0.0, 0.0, 7, 3).p == 1 and Effect(0.1, 0.0, 7, 3).p == 0


def test_a_wild_row():
    """One whose own deviation is more than twice the pooled: out of the pool, judged by its own (Welch)."""
    values = table(8, 5, draw=0.0)
    values["r3"] = {d: 3 + 20 * (-1) ** d for d in range(5)}
    fit, calm = Fit(values), Fit({row: mine for row, mine in values.items() if row != "r3"})
    assert [*fit.wild] == ["r3"] and fit.sigma == pytest.approx(calm.sigma) and fit.freedom == calm.freedom
    own, effect = fit.wild["r3"], fit.effect("r3", "r0")
    parts = own ** 2 / 5, fit.sigma ** 2 / 5
    assert own == pytest.approx(np.std([figure - fit.draws[d] for d, figure in values["r3"].items()], ddof=1))
    assert effect.error == pytest.approx(math.sqrt(sum(parts)))
    assert effect.freedom == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / fit.freedom))
    assert fit.effect("r2", "r0") == calm.effect("r2", "r0")
    two = {row: {d: mine[d] for d in range(2)} for row, mine in values.items()}
    assert not Fit(two).wild                                        # two draws tell little of a deviation
    assert Fit({"a": {1: 2.0}, "b": {1: 3.0}}).effect("a", "b") is None


def test_components():
    """Means over many tables of known deviations; the textbook's mean squares of one."""
    noise, found = np.random.default_rng(5), []
    for _ in range(300):
        rows, draws = 3 * noise.standard_normal((6, 1)), 2 * noise.standard_normal((1, 5))
        figures = 7 + rows + draws + noise.standard_normal((6, 5))
        found.append(components({i: dict(enumerate(mine)) for i, mine in enumerate(figures.tolist())}))
    assert np.sqrt((np.array(found) ** 2).mean(0)) == pytest.approx([3, 2, 1], rel=0.1)
    assert components({0: {1: 2.0, 2: 3.0}, 1: {1: 3.0, 2: 4.0}}) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5), 0))
    assert components({0: {1: 2.0, 2: 3.0}, 1: {1: 3.0}}) is None and components({0: {1: 2.0, 2: 3.0}}) is None


def test_holm():
    """Beside its definition: the least of p is tested at 5 %/n, the next at 5 %/(n - 1), ..., until one fails."""
    noise = np.random.default_rng(1)
    for _ in range(50):
        chances = (noise.random(7) ** 4).tolist()
        rejected, order = set(), sorted(range(7), key=chances.__getitem__)
        for i, place in enumerate(order):
            if chances[place] >= 0.05 / (7 - i):
                break
            rejected.add(place)
        assert {i for i, p in enumerate(holm(chances)) if p < 0.05} == rejected
    assert holm([]) == [] and holm([0.5, 0.6]) == [1.0, 1.0]


def test_order_and_ranks():
    noise = np.random.default_rng(2)
    one, other = ({f"r{i}": x for i, x in enumerate(noise.standard_normal(12))} for _ in range(2))
    pairs = list(itertools.combinations(one, 2))
    alike = [(one[a] < one[b]) == (other[a] < other[b]) for a, b in pairs]
    assert ordered_alike(one, other) == (pytest.approx(sum(alike) / 66), 66)
    close = [same for same, (a, b) in zip(alike, pairs) if abs(one[a] - one[b]) < 0.5]
    assert ordered_alike(one, other, 0.5) == (pytest.approx(sum(close) / len(close)), len(close))
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr([*one.values()], [*other.values()]).statistic)
    assert ordered_alike(one, {"r1": 0.0})[1] == 0 and math.isnan(rank_correlation(one, {"r1": 0.0}))


def test_a_parabola():
    assert parabola({f: 2 + (math.log2(f) - 0.3) ** 2 for f in (0.5, 1, 2, 4)}) == pytest.approx(0.09)
    assert all(math.isnan(parabola(tried)) for tried in ({0.5: 1.0, 1: 2.0, 2: 3.0}, {1: 1.0}, {}))


def ladder(**rows):
    """A grid.json of two rungs, 100 and 400 steps: rows are differences to the baseline at each, None: not run."""
    noise = np.random.default_rng(3)

    def runs(name, there):
        return [{"run": f"{name}{steps}{seed}", "seed": seed, "max_steps": steps,
                 "value": {100: 3.0, 400: 2.0}[steps] + there[steps] + 0.1 * seed + 0.001 * noise.standard_normal()}
                for steps in there for seed in (1, 2, 3)]
    return {"metric": "m", "factors": [0.5, 1, 2], "slower": 0.1, "rungs": [100, 400], "primary": 400, "same": 0.01,
            "rows": [{"name": name, "axis": "a", "against": None if name == "baseline" else "baseline", "factor": 1,
                      "tuned": [[0.5, 3.1], [1, 3.0], [2, 3.3], [4, 9.0]], "runs": runs(name, there), "error": "",
                      "open": 0, "step_seconds": None, "parameters": 100, "equal_seconds": None}
                     for name, there in {"baseline": {100: 0.0, 400: 0.0}, **rows}.items()]}


def test_rungs():
    judged = judge(ladder(up={100: -0.2, 400: -0.1}, down={100: 0.2, 400: 0.1}, turns={100: 0.1, 400: -0.1},
                          fades={100: 0.1, 400: 0.0}, short={100: 0.1}, same={100: 0.0, 400: 0.0}))
    found = {mine.row["name"]: mine for mine in judged.rows}
    assert [rung.name for rung in judged.rungs] == ["1x", "4x"] and judged.primary is judged.rungs[1]
    assert {name: (mine.verdict, mine.holds) for name, mine in found.items()} == {
        "up": ("better", "holds"), "down": ("worse", "holds"), "turns": ("better", "turns"),
        "fades": ("the same", "1x only"), "short": (None, ""), "same": ("the same", "")}
    assert judged.doubling == pytest.approx(0.5, abs=0.002)         # from 3 to 2 in two doublings
    assert found["up"].worth == pytest.approx(2 ** 0.2, rel=0.01) and found["down"].worth < 1
    assert found["up"].sensitivity == pytest.approx((0.1 + 0 + 0.3) / 3)    # of the factors that all rows have
    assert found["up"].gain == pytest.approx(parabola({0.5: 3.1, 1: 3.0, 2: 3.3}))
    wide = judge({**ladder(none={100: 0.0, 400: 0.0}), "same": 0.0})
    assert wide.rows[0].verdict == "undecided"
    some, none = Effect(0.1, 0.01, 9, 3), Effect(0.0, 0.01, 9, 3)
    assert held({"1x": some, "4x": none, "16x": some}) == "holds" and held({"1x": some}) == ""
    with pytest.raises(UserError, match="nothing tells the noise"):
        judge({**ladder(), "rungs": [7]})


def test_logarithms_are_ratios():
    index = ladder(double={100: 3.0, 400: 2.0})
    for row in index["rows"]:
        for run in row["runs"]:
            run["value"] *= math.exp(0.01 * run["seed"])
    effect = judge({**index, "log": True}).rows[0].effects["4x"]
    assert effect.difference == pytest.approx(math.log(2), abs=0.1)


def test_chance_makes_few_verdicts():
    """Of tables in which no row differs, at most about 5 % have a verdict, and 95 % of intervals hold 0."""
    count = held_zero = 0
    for seed in range(200):
        values = {row: mine for row, mine in table(12, 3, seed=seed).items()}
        values = {row: {d: figure - int(row[1:]) for d, figure in mine.items()} for row, mine in values.items()}
        fit = Fit(values)
        effects = [fit.effect(row, "r0") for row in values if row != "r0"]
        count += min(holm([effect.p for effect in effects])) < 0.05
        held_zero += sum(not effect.sign for effect in effects)
    assert count <= 18 and 0.93 < held_zero / 2200 < 0.97
