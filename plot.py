"""Curves of many runs, and the table of a grid.

    python plot.py "runs/train_enwik8/*"                         # validation of all, over steps, to curves.png
    python plot.py runs/train_enwik8/a,runs/train_enwik8/b --by seconds --split train
    python plot.py "runs/train_mult/*" --over n_latent --metric accuracy   # last values over a setting, and a table
    python plot.py --table runs/one_change                       # Markdown, and a picture beside it

Runs whose settings differ in nothing but seeds and names are one curve: their mean, and a band of one standard
deviation. A run without metrics is left out and named. The table's rule: sigma is the standard deviation of the
baseline over its seeds, and a row's difference counts where it is at least 3 sigma sqrt(1/n1 + 1/n2), with n1 and n2
seeds on the two sides; otherwise no difference was measured. Less is better.
"""
import glob
import math
import statistics
import sys
from pathlib import Path

from experiment import NOISE, UserError, as_typed, command, compare, noise_floor, override, read_json, run_metrics

# --- What ---
runs = None              # directories of runs, with commas and wildcards (may also be typed as a bare word)
table = None             # a grid's out_dir: its table instead
# --- How ---
over = None              # a setting: the last value of each run over it, not a curve; with a table in Markdown
by = "step"              # [step, seconds, tokens] over what; seconds of training, evaluation apart
split = "val"            # [train, val, test] which part of the data
metric = "bpb"           # a key of metrics.jsonl
out = None               # the picture; none: curves.png, and for a table table.png in its folder
width = 8.0              # [> 0.0] inches

SEEDS = {"seed", "data_seed", "run_name", "out_dir", "resume", "preset", "tag",
         "models"}       # each has a curve of its own, and learns the same alone as beside another


def read_run(directory, by, split, metric):
    """(settings, {name of the curve: [(x, y)]}) of a run; several curves where its lines name models or protocols.

    Raises ValueError, saying why, where there is nothing to draw.
    """
    settings = read_json(directory / "params.json").get("settings")
    if not settings:
        raise ValueError("no params.json")
    lines = run_metrics(directory)
    clock = sorted((line["step"], line["seconds"]) for line in lines if isinstance(line.get("seconds"), (int, float)))
    found = {}
    for line in lines:
        if line.get("split") == split and isinstance(line.get(metric), (int, float)):
            name = " ".join(value for key, value in line.items() if isinstance(value, str) and key != "split")
            found.setdefault(name, {})[line["step"]] = line[metric]              # the latest line of a step counts
    if not found:
        raise ValueError(f"no {metric} of {split} in its metrics")
    return settings, {name: [(place(step, by, settings, clock), y) for step, y in sorted(points.items())]
                      for name, points in found.items()}


def place(step, by, settings, clock):
    """Where a step stands on the axis: itself, tokens seen, or seconds of training, between two lines of the clock."""
    if by == "step":
        return step
    if by == "tokens":
        sizes = [settings.get(name) for name in ("batch_size", "block_size", "grad_accum")]
        if None in sizes:
            raise ValueError("its settings do not say how many tokens a step has")
        return step * math.prod(sizes)
    if not clock:
        raise ValueError("its metrics have no seconds")
    clock = [(0, 0.0), *clock]
    for (a, before), (b, after) in zip(clock, clock[1:]):
        if a <= step <= b:
            return after if a == b else before + (after - before) * (step - a) / (b - a)
    return clock[-1][1]


def seeds_of(members):
    """What a label says of how many runs [{name of the curve: ...}] share a curve: " (3 seeds)", or "" for one."""
    most = max(sum(name in curves for curves in members) for name in {name for curves in members for name in curves})
    return f" ({most} seeds)" if most > 1 else ""


def families(found):
    """[(label, [curves of one setting])] from [(directory, settings, curves)]; a label says what differs."""
    groups = {}
    for directory, settings, curves in found:
        key = as_typed(tuple(f"{name}={value}" for name, value in sorted(settings.items()) if name not in SEEDS))
        groups.setdefault(key, []).append((directory, settings, curves))
    firsts = [members[0][1] for members in groups.values()]
    names = [name for name in firsts[0] if name not in SEEDS
             and any(other.get(name) != firsts[0][name] for other in firsts[1:])]
    labels = []
    for members in groups.values():
        directory, settings, _ = members[0]
        label = ", ".join(f"{name} {as_typed(settings.get(name))}" for name in names) if len(groups) > 1 else ""
        label = label or directory.name
        curves = [curves for _, _, curves in members]
        labels.append((label + seeds_of(curves), curves))
    return labels


def average(curves):
    """Mean and standard deviation of curves [(x, y)] at the places that all have: (xs, means, deviations)."""
    common = sorted(set.intersection(*({i for i in range(len(curve))} for curve in curves)))
    xs = [statistics.mean(curve[i][0] for curve in curves) for i in common]
    ys = [[curve[i][1] for curve in curves] for i in common]
    return xs, [statistics.mean(y) for y in ys], [statistics.stdev(y) if len(y) > 1 else 0.0 for y in ys]


def draw(labels, by, split, metric, path):
    """The picture of `families`, as a PNG file."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, 0.6 * width), layout="constrained", dpi=120)
    axes = figure.subplots()
    for label, members in labels:
        for name in dict.fromkeys(name for curves in members for name in curves):
            xs, means, spread = average([curves[name] for curves in members if name in curves])
            several = len({name for curves in members for name in curves}) > 1
            line, = axes.plot(xs, means, label=f"{label}: {name}" if several else label, linewidth=1.3,
                              marker="o" if len(xs) < 30 else None, markersize=3)
            if any(spread):
                axes.fill_between(xs, [m - s for m, s in zip(means, spread)], [m + s for m, s in zip(means, spread)],
                                  color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel={"step": "step", "seconds": "seconds of training", "tokens": "tokens seen"}[by],
             ylabel=f"{split} {'bits per byte' if metric == 'bpb' else metric}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def last_values(found, over):
    """[(label, {name of the curve: {value of the setting: [last y of each seed]}})] from `found` as for families.

    UserError: a run that has no such setting.
    """
    bare = []
    for directory, settings, curves in found:
        if over not in settings:
            raise UserError(f"--over {over}: {directory} has no such setting")
        ends = {name: [(settings[over], curve[-1][1])] for name, curve in curves.items()}
        bare.append((directory, {name: value for name, value in settings.items() if name != over}, ends))
    rows = []
    for label, members in families(bare):
        by_name = {}
        for name, x, y in [(name, *curve[0]) for curves in members for name, curve in curves.items()]:
            by_name.setdefault(name, {}).setdefault(x, []).append(y)
        rows.append((label.removesuffix(seeds_of(members)), by_name))
    return rows


def draw_over(rows, over, split, metric, path):
    """The picture of `last_values`, as a PNG file: a dot per seed and a line through the means; prints the table."""
    from matplotlib.figure import Figure
    every = {x for _, by_name in rows for values in by_name.values() for x in values}
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in every)
    places = {x: x if numbers else i for i, x in enumerate(sorted(every, key=lambda x: x if numbers else str(x)))}
    figure = Figure(figsize=(width, 0.6 * width), layout="constrained", dpi=120)
    axes = figure.subplots()
    print(f"| {over} | curve | {split} {metric}, mean | standard deviation | seeds | values |")
    print("| " + " | ".join(["---"] * 6) + " |")
    for label, by_name in rows:
        for name, values in by_name.items():
            several, xs = len(rows) > 1 and name not in label, sorted(values, key=places.get)
            title = f"{label}: {name}" if several and name else name or label
            means = [statistics.mean(values[x]) for x in xs]
            line, = axes.plot([places[x] for x in xs], means, label=title, linewidth=1.3)
            axes.plot([places[x] for x in xs for _ in values[x]], [y for x in xs for y in values[x]], "o", markersize=4,
                      color=line.get_color())
            for x, mean in zip(xs, means):
                spread = f"{statistics.stdev(values[x]):.4f}" if len(values[x]) > 1 else ""
                print(f"| {as_typed(x)} | {title} | {mean:.4f} | {spread} | {len(values[x])} | "
                      f"{', '.join(f'{y:.4f}' for y in values[x])} |")
    if numbers and min(every) > 0 and max(every) >= 8 * min(every):
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [as_typed(x) for x in places])
    axes.set(xlabel=over, ylabel=f"{split} {'bits per byte' if metric == 'bpb' else metric}, last")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    """A figure as a PNG file; UserError where it cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def judge(index):
    """Of a grid.json: (sigma, baseline's values, [row with its difference, verdict and what else the table says]).

    UserError where the baseline has not two seeds yet.
    """
    rows = {row["name"]: row for row in index["rows"]}
    values = {name: [run["value"] for run in row["runs"]] for name, row in rows.items()}
    first = index["rows"][0]
    baseline = values[first["name"]]
    if len(baseline) < 2:
        raise UserError(f"the baseline has {len(baseline)} finished seeds: a noise floor needs at least 2")
    sigma, judged = noise_floor(baseline), []
    for row in index["rows"][1:]:
        found, other = {"row": row, "values": values[row["name"]]}, values[row["against"]]
        if found["values"] and other:
            against = rows[row["against"]]
            found["difference"], found["verdict"] = compare(found["values"], other, sigma)
            if row["step_seconds"] and against["step_seconds"]:
                found["time"] = row["step_seconds"] / against["step_seconds"]
            if row["parameters"] and against["parameters"]:
                found["size"] = row["parameters"] / against["parameters"]
            if row["equal_seconds"]:
                found["equal"] = compare([row["equal_seconds"]["value"]], other, sigma)
        judged.append(found)
    return sigma, baseline, judged


WORDS = {-1: "**better**", 0: "no difference measured", 1: "**worse**"}


def markdown(index):
    """The table of a grid.json as lines of Markdown."""
    sigma, baseline, judged = judge(index)
    mean = statistics.mean(baseline)
    names = list(index["rows"][0]["runs"][0].get("shown", {}))
    beside = "".join(f", {name} {shown_of(index['rows'][0], name)}" for name in names)
    timed = ["seconds a step", "at equal seconds"] if any("time" in found for found in judged) else []
    columns = ["axis", "change", "mean", "difference", "at equal steps", *timed, "parameters", "rate", "seeds", *names]
    lines = [f"Baseline: {mean:.4f} ({index['metric']}){beside}, {len(baseline)} seeds, sigma {sigma:.4f}; a row of "
             f"two seeds counts from {NOISE * sigma * math.sqrt(1 / 2 + 1 / len(baseline)):.4f} on, of three from "
             f"{NOISE * sigma * math.sqrt(1 / 3 + 1 / len(baseline)):.4f}.", "",
             f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    edges = (min(index["factors"]), max(index["factors"])) if len(index["factors"]) > 1 else ()
    for found in judged:
        row = found["row"]
        name = row["name"] + (f" (against {row['against']})" if row["against"] != index["rows"][0]["name"] else "")
        if "verdict" not in found:
            why = row["error"] or (f"{row['open']} runs to go" if row["open"] else "not measured")
            lines.append(f"| {row['axis']} | {name} | {why} |" + " |" * (len(columns) - 3))
            continue
        seconds = f"{found['time']:.2f}" if "time" in found else ""
        equal = ""
        if "time" in found:
            equal = "as at equal steps" if abs(found["time"] - 1) <= index["slower"] else "not measured"
        if "equal" in found:
            equal = f"{found['equal'][0]:+.4f}: {WORDS[found['equal'][1]]}"
        size = f"{found['size'] - 1:+.1%}" if "size" in found and abs(found["size"] - 1) > 0.0101 else "same"
        mean, star = statistics.mean(found["values"]), "*" if row["factor"] in edges else ""
        cells = [row["axis"], name, f"{mean:.4f}", f"{found['difference']:+.4f}", WORDS[found["verdict"]],
                 *([seconds, equal] if timed else []), size if "size" in found else "", f"x{row['factor']:g}{star}",
                 len(found["values"]), *(shown_of(row, name) for name in names)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if edges:
        lines += ["", "\\* the best of the tried rates is the smallest or the largest: a better one may lie beyond."]
    return lines


def shown_of(row, name):
    """What a table prints beside a row's metric: the mean of another number of its runs, '' where one has none."""
    values = [run["shown"].get(name) for run in row["runs"]]
    return f"{statistics.mean(values):.4f}" if values and None not in values else ""


def draw_table(index, path):
    """A picture of the differences: a dot per seed, a band for what counts as none."""
    from matplotlib.figure import Figure
    sigma, baseline, judged = judge(index)
    rows = {row["name"]: [run["value"] for run in row["runs"]] for row in index["rows"]}
    shown = [found for found in judged if "verdict" in found]
    if not shown:
        raise UserError("no row has finished yet: nothing to draw")
    figure = Figure(figsize=(width, 1.2 + 0.2 * len(shown)), layout="constrained", dpi=120)
    axes = figure.subplots()
    limit = NOISE * sigma * math.sqrt(1 / 2 + 1 / len(baseline))
    axes.axvspan(-limit, limit, color="0.85", label="no difference measured (two seeds)")
    colours = {-1: "tab:green", 0: "0.35", 1: "tab:red"}
    for y, found in enumerate(shown):
        base = statistics.mean(rows[found["row"]["against"]])
        axes.plot([value - base for value in found["values"]], [y] * len(found["values"]), "o", markersize=4,
                  color=colours[found["verdict"]])
    against = index["rows"][0]["name"]
    names = [f"{row['axis']}: {row['name']}{'' if row['against'] == against else ' †'}"
             for row in (found["row"] for found in shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xscale("symlog", linthresh=max(2 * limit, 1e-6))
    axes.set_xlabel("difference to the baseline (left is better; † to another row)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=7, loc="lower right")
    save(figure, path)


@command
def main():
    override(globals(), positional="runs")
    if (runs is None) == (table is None):
        raise UserError('what to draw? python plot.py "runs/train_enwik8/*", or --table runs/one_change')
    if table is not None:
        index = read_json(Path(table) / "grid.json")
        if not index.get("rows"):
            raise UserError(f"{Path(table) / 'grid.json'} is missing or no grid: python grid.py writes it")
        lines = markdown(index)
        print("\n".join(lines))
        return draw_table(index, Path(out or Path(table) / "table.png"))
    places = [Path(place) for word in runs.split(",") for place in sorted(glob.glob(word.strip())) or [word.strip()]]
    found = []
    for directory in places:
        try:
            found.append((directory, *read_run(directory, by, split, metric)))
        except ValueError as error:
            print(f"left out {directory}: {error}", file=sys.stderr)
    if not found:
        raise UserError(f"nothing to draw: {'none of the ' + str(len(places)) + ' runs' if len(places) > 1 else runs} "
                        f"has {metric} of {split}")
    if over is not None:
        return draw_over(last_values(found, over), over, split, metric, Path(out or f"{over}.png"))
    draw(families(found), by, split, metric, Path(out or "curves.png"))


if __name__ == "__main__":
    main()
