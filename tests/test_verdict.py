"""nanolab/verdict.py: the two-way fit, Student's t, Holm, what rungs say of each other; beside slow formulas."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from choices import refused
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


@pytest.mark.parametrize("lacking", [
    "12 13 20 41 42 43", "02 03 12 13 20 21 30 31 40 43"], ids=["some", "two halves with a row between"])
def test_gaps(lacking):
    """Some rows lack draws: ordinary least squares with dummy variables, its covariance written out."""
    lacking = {(int(row), int(draw)) for row, draw in lacking.split()}
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


def test_a_wild_baseline_with_draws_of_its_own():
    """Its mean and its deviation are those of the draws that others have: on the rest nothing tells draw from noise."""
    values = table(12, 3, draw=1.0)
    values["r0"] = {d: 20 * (-1) ** d for d in range(6)}
    fit, calm = Fit(values), Fit({row: mine for row, mine in values.items() if row != "r0"})
    cleared = [values["r0"][d] - calm.draws[d] for d in range(3)]
    effect, parts = fit.effect("r4", "r0"), (np.var(cleared, ddof=1) / 3, calm.sigma ** 2 / 3)
    assert [*fit.wild] == ["r0"] and effect.difference == pytest.approx(calm.mean("r4") - np.mean(cleared))
    assert effect.error == pytest.approx(math.sqrt(sum(parts)))
    assert effect.freedom == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / calm.freedom))
    error, freedom = fit.apart([("r0", 1), ("r4", 3)])
    assert error == pytest.approx(math.sqrt(3 * parts[0] + parts[1])) and 2 < freedom < 2.1
    # two draws that others have: it cannot show that it is wild
    assert not Fit({row: {d: mine[d] for d in mine if row == "r0" or d < 2} for row, mine in values.items()}).wild
    # two wild rows that have the third draw alone: it goes with them, and they are judged by the pooled deviation
    calm = {row: {d: mine[d] for d in range(2)} for row, mine in table(30, 3, draw=1.0).items()}
    both = calm | {"a": {0: 0.0, 1: 60.0, 2: 9.0}, "b": {0: 60.0, 1: 0.0, 2: 9.0}}
    assert not Fit(both).wild and Fit(both).freedom == 66 - 32 - 3 + 1


def test_rows_that_share_no_draws():
    """No difference of rows that no draws lead between, not even over others; where they do, `test_gaps`."""
    values = {"a": {1: 1.0, 2: 1.5}, "b": {1: 2.0, 2: 2.6}, "c": {3: 5.0, 4: 5.2}, "d": {3: 7.0, 4: 7.1}, "e": {}}
    fit = Fit(values)
    assert fit.freedom == 2 and fit.effect("a", "c") is None and fit.effect("d", "b") is None
    assert fit.effect("e", "a") is None and fit.effect("a", "e") is None
    assert fit.effect("b", "a").difference == pytest.approx(1.05)
    assert Fit({**values, "e": {2: 1.0, 3: 2.0}}).effect("c", "a").draws == 2
    assert fit.effect("a", "a") == Effect(0.0, 0.0, 2, 2)


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
    refused("nothing tells the noise", judge, {**ladder(), "rungs": [7]})


def test_rows_with_the_same_runs_tell_the_noise_once():
    index = ladder(up={100: -0.2, 400: -0.1}, down={100: 0.2, 400: 0.1})
    alone, twin = judge(index), {**index["rows"][1], "name": "twin", "against": "up"}
    half = {**twin, "name": "other", "against": "baseline", "runs": twin["runs"][1:4]}
    judged = judge({**index, "rows": [*index["rows"], twin, half]})
    assert [(rung.fit.sigma, rung.fit.freedom) for rung in judged.rungs] == [
        (rung.fit.sigma, rung.fit.freedom) for rung in alone.rungs]
    up, down, twin, other = judged.rows
    assert other.effects == up.effects == alone.rows[0].effects and down.effects == alone.rows[1].effects
    assert twin.effects["4x"] == Effect(0.0, 0.0, 4, 3) and twin.verdict == "the same"


def test_what_is_not_there_yet():
    """The verdicts are those of the primary rung, else of the last that tells the noise; equal seconds go by the first
    rung; a row whose other lacks a rung has no difference there."""
    index = ladder(up={100: -0.2, 400: -0.1}, short={100: 0.1}, after={100: 0.1, 400: 0.2})
    index["rows"][3]["against"] = "short"
    index["rows"][1]["equal_seconds"] = {"run": "e", "seed": 1, "value": 3.2, "max_steps": 50}
    judged = judge(index)
    fit, (up, _, after) = judged.rungs[0].fit, judged.rows
    assert [*after.effects] == ["1x"] and after.verdict is None
    assert up.equal.difference == pytest.approx(3.2 - fit.draws[1] - fit.mean("baseline"))
    assert up.equal.error == pytest.approx(fit.sigma * math.sqrt(1 + 1 / 3)) and up.equal.draws == 1
    index["rows"][1]["equal_seconds"]["seed"] = 9                   # nothing is known of its draw
    assert judge(index).rows[0].equal is None
    index["rows"][1]["equal_seconds"]["seed"] = 1
    for row in index["rows"][1:]:
        row["runs"] = [run for run in row["runs"] if run["max_steps"] == 400]
    assert judge(index).rows[0].equal is None and [rung.name for rung in judge(index).rungs] == ["4x"]
    for row in index["rows"][1:]:
        row["runs"] = [{**run, "max_steps": 100} for run in row["runs"]]
    judged = judge(index)
    assert judged.primary is judged.rungs[0] and judged.doubling is None and judged.rows[0].verdict == "better"


def test_where_verdicts_begin():
    """"the same" by the 90 % interval and not the 95 %; better and worse by Holm and not each p by itself."""
    index = ladder(**{f"r{i}": {100: 0.0, 400: 0.00025 * i} for i in range(16)})
    judged = judge({**index, "same": 0.0})
    effects = [mine.effects["4x"] for mine in judged.rows]
    adjusted = holm([effect.p for effect in effects])
    assert any(effect.p < 0.05 <= p for effect, p in zip(effects, adjusted)) and min(adjusted) < 0.05
    assert [mine.verdict != "undecided" for mine in judged.rows] == [p < 0.05 for p in adjusted]
    effect, = [mine.effects["4x"] for mine in judged.rows if mine.row["name"] == "r0"]
    for share, verdict in ((0.5, "the same"), (-0.1, "undecided")):
        same = abs(effect.difference) + effect.half(0.9) + share * (effect.half() - effect.half(0.9))
        assert judge({**index, "same": same}).rows[0].verdict == verdict
    assert judge({**index, "primary": 9}).primary.steps == 400
    for run in index["rows"][0]["runs"]:
        run["value"] += 2 * (run["max_steps"] == 400)
    assert judge(index).doubling < 0 and judge(index).rows[0].worth is None
    assert math.isnan(rank_correlation({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}))


def test_figures_at_the_edge():
    """Equal figures; a logarithm of 0; a baseline that hardly gains by steps."""
    equal = {row: dict.fromkeys(range(3), 0.1) for row in "abc"}
    effect = Fit(equal).effect("b", "a")
    assert effect.difference == 0 and effect.p == 1 and effect.half() < 1e-12 and not effect.sign
    index = ladder(up={100: -0.2, 400: -0.1})
    index["rows"][1]["runs"][0]["value"] = 0.0
    refused("log: a figure of up is not above 0", judge, {**index, "log": True})
    index = ladder(up={100: -0.2, 400: -0.1})
    for run in index["rows"][0]["runs"]:
        run["value"] = 2 + 0.1 * run["seed"] - 1e-6 * (run["max_steps"] == 400)
    assert judge(index).rows[0].worth == 2 ** 99


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
    for seed in range(100):
        values = {row: mine for row, mine in table(12, 3, seed=seed).items()}
        values = {row: {d: figure - int(row[1:]) for d, figure in mine.items()} for row, mine in values.items()}
        fit = Fit(values)
        effects = [fit.effect(row, "r0") for row in values if row != "r0"]
        count += min(holm([effect.p for effect in effects])) < 0.05
        held_zero += sum(not effect.sign for effect in effects)
    assert count <= 10 and 0.93 < held_zero / 1100 < 0.97
