"""Did it matter? The rule by which a change is told from noise, and the grid.json of its runs."""
import math

from nanolab import archive
from nanolab.run import UserError

NOISE = 3.0  # a difference counts from so many standard errors on


def noise_floor(values):
    """The standard deviation of one figure over seeds, n - 1 in the denominator. ValueError for fewer than 2 values."""
    if len(values) < 2:
        raise ValueError(f"a noise floor needs at least 2 seeds, not {len(values)}")
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def least(n1, n2, sigma, sigma_data=0.0):
    """The difference of means of n1 and n2 seeds from which on it counts: 3 sqrt(sigma^2 (1/n1 + 1/n2) + sigma_data^2).

    sigma: the noise_floor of the baseline, as two or three seeds of a change are too few for one of its own.
    sigma_data: the deviation that another draw of the data gives to a difference.
    """
    return NOISE * math.hypot(sigma * math.sqrt(1 / n1 + 1 / n2), sigma_data)


def compare(values, other, sigma, sigma_data=0.0):
    """(difference of the means, verdict) of two models' figures, one per seed.

    Verdict: the sign of a difference that counts; 0 where none was measured; None, undecided, where another draw of the
    data could have made it.
    """
    difference = math.fsum(values) / len(values) - math.fsum(other) / len(other)
    if not difference or abs(difference) < least(len(values), len(other), sigma):
        return difference, 0
    undecided = abs(difference) < least(len(values), len(other), sigma, sigma_data)
    return difference, None if undecided else math.copysign(1, difference)


NUMBER, LATE = (int, float), {"shown", "at", "sigma_data"}   # LATE: what only some grids have
RUN = {"value": NUMBER, "shown": dict}
ROW = {"name": str, "axis": str, "against": (str, type(None)), "factor": (*NUMBER, type(None)), "runs": [RUN],
       "step_seconds": (*NUMBER, type(None)), "parameters": (*NUMBER, type(None)), "error": (str, type(None)),
       "open": int, "equal_seconds": (dict, type(None)), "at": (dict, type(None))}


def fits(value, shape):
    """Whether a JSON value has the shape: a type or several, [the shape of all its items], {key: shape}."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[name], kind) if name in value else name in LATE for name, kind in shape.items())
    return isinstance(value, shape) and not isinstance(value, bool)


def read_index(path):
    """The grid.json at `path`, or that in an archive. UserError where it is not there, or not as grid.py writes it."""
    index = archive.read_grid(path)
    right = index.get("rows") and fits(index, {"metric": str, "rows": [ROW], "sigma_data": NUMBER})
    rows = index["rows"] if right else []
    names, cross = {row["name"] for row in rows}, index.get("cross")
    right = right and all(row["against"] in (None, *names) and fits(row["equal_seconds"] or {"value": 0}, RUN)
                          for row in rows)
    if right and cross:
        right = fits(cross, dict) and all(fits(given, dict) for given in cross.values()) and all(
            row.get("at") and row["at"].keys() == cross.keys() for row in rows)
    elif right:
        right = fits(index, {"factors": [NUMBER], "slower": NUMBER}) and index["factors"] and all(
            (row["against"] is None) == (row is rows[0]) and (not row["runs"] or row["factor"] is not None)
            for row in rows)
    if not right:
        raise UserError(f"{path} is missing or no grid: python grid.py writes it")
    return index


def judge(index):
    """Of a grid.json: (sigma, baseline's values, [row with its difference, verdict and what else the table says]).

    UserError where the baseline has not two seeds yet.
    """
    rows = {row["name"]: row for row in index["rows"]}
    values = {name: [run["value"] for run in row["runs"]] for name, row in rows.items()}
    baseline, *others = rows.values()
    baseline, judged, data = values[baseline["name"]], [], index.get("sigma_data", 0.0)
    if len(baseline) < 2:
        raise UserError(f"the baseline has {len(baseline)} finished seeds: a noise floor needs at least 2")
    sigma = noise_floor(baseline)
    for row in others:
        against, found = rows[row["against"]], {"row": row, "values": values[row["name"]]}
        if found["values"] and (other := values[row["against"]]):
            found["difference"], found["verdict"] = compare(found["values"], other, sigma, data)
            found |= {name: row[key] / against[key] for name, key in (("time", "step_seconds"), ("size", "parameters"))
                      if row[key] and against[key]}
            if row["equal_seconds"]:
                found["equal"] = compare([row["equal_seconds"]["value"]], other, sigma, data)
        judged.append(found)
    return sigma, baseline, judged
