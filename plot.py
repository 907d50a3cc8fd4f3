"""Curves of many runs, and the table of a grid.

    python plot.py "runs/train_enwik8/*"                         # validation of all, over steps, to curves.png
    python plot.py runs/train_enwik8/a,runs/train_enwik8/b --by seconds --split train
    python plot.py "runs/train_mult/*" --over n_latent --metric accuracy   # last values over a setting, and a table
    python plot.py --table runs/one_change                       # Markdown, and a picture beside it
    python plot.py --table runs/facts                            # means only, of a grid with `cross`

    python plot.py "runs/facts/*/*" --contours n_people,n_embd --metric accuracy   # two settings
    python plot.py "runs/facts/*/*" --contours n_people,parameters --metric accuracy
    python plot.py "runs/facts/*/*" --metric accuracy --only tool,unseen           # some curves
    python plot.py "runs/facts/*/*" --capacity                                     # bits stored

Runs whose settings differ in nothing but seeds and names are one curve: their mean, and a band of one standard
deviation. A run without metrics is left out and named. Contours have a panel for each curve and for whatever else
differs; numbers that follow from the panel and its two axes, as steps do from people, are named below instead. Capacity
is that of Physics of Language Models 3.3 (Allen-Zhu and Li 2024, arXiv 2404.05405).

The rule of a table of rows: sigma is the standard deviation of the baseline over its seeds, and a row's difference
counts where it is at least 3 sigma sqrt(1/n1 + 1/n2), with n1 and n2 seeds on the two sides; otherwise no difference
was measured. Less is better. Where all runs read one draw of the data, and the grid knows the deviation `sigma_data`
that another draw gives to a difference, a row that counts by sigma is undecided up to 3 sqrt(sigma^2 (1/n1 + 1/n2) +
sigma_data^2). A table of a cross has means and deviations, and no verdicts. See docs/one-change.md.
"""
import flags

flags.answer_help(__name__, __file__, "runs")  # before the seconds that the next lines take

import glob
import itertools
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

from experiment import NOISE, UserError, as_typed, command, compare, noise_floor, override, read_json, run_metrics

# --- What ---
runs = None              # directories of runs, with commas and wildcards (may also be typed as a bare word)
table = None             # a grid's out_dir: its table instead
# --- How ---
over = None              # a setting: the last value of each run over it, not a curve; with a table in Markdown
contours = None          # two settings, X,Y, or `parameters` for one: the last values over both, with tables
levels = (0.5, 0.8, 0.95)  # [>= -1e9, <= 1e9] where contours and capacity draw a line
capacity = False         # runs of task in_weight: bits that the weights hold over parameters, with a table
same = None              # settings with commas that do not tell runs apart, as those of older runs that lack them
only = None              # words with commas: curves whose names have them all, as "tool,unseen"
by = "step"              # [step, seconds, tokens] over what; seconds of training, evaluation apart
split = "val"            # [train, val, test] which part of the data
metric = "bpb"           # a key of metrics.jsonl
out = None               # the picture, .png .pdf or .svg; none: curves.png, and for a table table.png in its folder
width = 8.0              # [>= 1.0, <= 50.0] inches

PICTURES = (".png", ".pdf", ".svg")
SEEDS = {"seed", "data_seed", "run_name", "out_dir", "resume", "preset", "tag",
         "models"}       # each has a curve of its own, and learns the same alone as beside another


def read_run(directory, by, split, metric):
    """(settings, {name of the curve: [(x, y)]}) of a run; several curves where its lines name models or protocols.

    Raises ValueError, saying why, where there is nothing to draw.
    """
    settings = settings_of(directory)
    lines = run_metrics(directory)
    clock = sorted((line["step"], line["seconds"]) for line in lines if is_number(line.get("seconds")))
    found = {}
    for line in lines:
        if line.get("split") == split and is_number(line.get(metric)):
            name = " ".join(value for key, value in line.items() if isinstance(value, str) and key != "split")
            found.setdefault(name, {})[line["step"]] = line[metric]              # the latest line of a step counts
    if not found:
        raise ValueError(f"no {metric} of {split} in its metrics")
    kept = {name: value for name, value in settings.items() if name not in (same or "").split(",")}
    return kept, {name: [(place(step, by, settings, clock), y) for step, y in sorted(points.items())]
                  for name, points in found.items()}


def settings_of(directory):
    """The settings of a run. ValueError where there are none."""
    settings = read_json(directory / "params.json").get("settings")
    if not settings or not isinstance(settings, dict):
        raise ValueError("no params.json")
    return settings


def place(step, by, settings, clock):
    """Where a step stands on the axis: itself, tokens seen, or seconds of training, between two lines of the clock."""
    if by == "step":
        return step
    if by == "tokens":
        sizes = [settings.get(name) for name in ("batch_size", "block_size", "grad_accum")]
        if not all(map(is_number, sizes)):
            raise ValueError("its settings do not say how many tokens a step has")
        return step * math.prod(sizes)
    if not clock:
        raise ValueError("its metrics have no seconds")
    clock = [(0, 0.0), *clock]
    for (a, before), (b, after) in zip(clock, clock[1:]):
        if a <= step <= b:
            return after if a == b else before + (after - before) * (step - a) / (b - a)
    return clock[-1][1]


def chosen(found, words):
    """Of (directory, settings, curves) the curves whose names have all of `words`, and the runs that have any.

    UserError, naming the curves that there are, where none is left.
    """
    left = [(directory, settings, {name: curve for name, curve in curves.items() if set(words) <= set(name.split())})
            for directory, settings, curves in found]
    left = [run for run in left if run[2]]
    if not left:
        names = dict.fromkeys(name for _, _, curves in found for name in curves)
        raise UserError(f"no curve has the words {' '.join(words)}; there are: {', '.join(names)}")
    if len(left) < len(found):
        print(f"left out {len(found) - len(left)} runs that have no curve {' '.join(words)}", file=sys.stderr)
    return left


def natural(words):
    """A key that puts n_embd 8 before n_embd 16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", words)]


def short_names(names):
    """{name of a curve: the name without the words that all have}; one that is left with none stays as it is."""
    common = set.intersection(*(set(name.split()) for name in names))
    return {name: " ".join(word for word in name.split() if word not in common) or name for name in names}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def told_apart(found, axes=()):
    """([settings that tell runs apart], {setting that follows from those: its values}) of (directory, settings, ...).

    A setting follows if it has one value wherever those before it, and numbers wherever also the `axes` of a picture,
    have one: the batch with the task, the steps with the people. Words come before numbers, as they say more, and few
    values before many.
    """
    every = [settings for _, settings, _ in found]
    values = {name: list(dict.fromkeys(as_typed(settings.get(name)) for settings in every))
              for name in dict.fromkeys(name for settings in every for name in settings)}
    differ = [name for name in values if len(values[name]) > 1 and name not in SEEDS and name not in axes]
    numbers = {name: all(settings.get(name) is None or is_number(settings[name]) for settings in every)
               for name in [*differ, *axes]}
    kept = []
    for name in sorted(differ, key=lambda name: (numbers[name], len(values[name]))):
        given = kept + [axis for axis in axes if numbers[name] or not numbers[axis]]
        cells = {}
        for settings in every:
            cells.setdefault(tuple(as_typed(settings.get(other)) for other in given), set()).add(
                as_typed(settings.get(name)))
        if any(len(cell) > 1 for cell in cells.values()):
            kept.append(name)
    return [name for name in values if name in kept], {name: values[name] for name in differ if name not in kept}


def say_beside(following):
    """In words, what settings differ that no label says; "" for none."""
    words = {name: sorted(values, key=natural) for name, values in following.items()}
    return "" if not words else "not in the labels: " + "; ".join(
        f"{name} {', '.join(values) if len(values) < 5 else f'{values[0]} to {values[-1]}'}"
        for name, values in words.items())


def seeds_of(members):
    """What a label says of how many runs [{name of the curve: ...}] share a curve: " (3 seeds)", or "" for one."""
    most = max(sum(name in curves for curves in members) for name in {name for curves in members for name in curves})
    return f" ({most} seeds)" if most > 1 else ""


def families(found):
    """[(label, [curves of one setting])] from [(directory, settings, curves)]; a label says what differs, without what
    follows from the rest of it (see `told_apart`)."""
    groups = {}
    for directory, settings, curves in found:
        key = as_typed(tuple(f"{name}={value}" for name, value in sorted(settings.items()) if name not in SEEDS))
        groups.setdefault(key, []).append((directory, settings, curves))
    names, labels = told_apart(found)[0], []
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


def draw(labels, by, split, metric, path, beside=""):
    """The picture of `families`, as a PNG file. beside: words for the legend's foot."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, 0.6 * width), layout="constrained", dpi=120)
    axes = figure.subplots()
    short = short_names([name for _, members in labels for curves in members for name in curves])
    for i, (label, members) in enumerate(labels):
        for name in dict.fromkeys(name for curves in members for name in curves):
            xs, means, spread = average([curves[name] for curves in members if name in curves])
            style = {}
            if len(labels) > 1 and len(short) > 1:           # a colour for each setting, and a dash for each curve
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[list(short).index(name) % 4]}
            line, = axes.plot(xs, means, label=f"{label}: {short[name]}" if len(short) > 1 else label, linewidth=1.3,
                              marker="o" if len(xs) < 30 else None, markersize=3, **style)
            if any(spread):
                axes.fill_between(xs, [m - s for m, s in zip(means, spread)], [m + s for m, s in zip(means, spread)],
                                  color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel={"step": "step", "seconds": "seconds of training", "tokens": "tokens seen"}[by],
             ylabel=f"{split} {'bits per byte' if metric == 'bpb' else metric}")
    axes.grid(alpha=0.3)
    title = {"title": textwrap.fill(beside, 90), "title_fontsize": 7} if beside else {}
    if len(axes.lines) > 4:                                  # no room among the lines
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, **title)
    else:
        axes.legend(fontsize=8, **title)
    save(figure, path)


def last_values(found, over):
    """[(label, {name of the curve: {value of the setting: [last y of each seed]}})] from `found` as for families.

    UserError: a run that has no such setting.
    """
    bare, kept = [], told_apart(found, (over,))[0]
    for directory, settings, curves in found:
        x = on_axis(settings, over, "--over", directory)
        ends = {name: [(x, curve[-1][1])] for name, curve in curves.items()}
        bare.append((directory, {name: settings.get(name) for name in kept}, ends))
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
    places = places_of({x for _, by_name in rows for values in by_name.values() for x in values})
    short = short_names([name for _, by_name in rows for name in by_name])
    figure = Figure(figsize=(width, 0.6 * width), layout="constrained", dpi=120)
    axes = figure.subplots()
    print(f"| {over} | curve | {split} {metric}, mean | standard deviation | seeds | values |")
    print("| " + " | ".join(["---"] * 6) + " |")
    for label, by_name in rows:
        for name, values in by_name.items():
            several, xs = len(rows) > 1 and name not in label, sorted(values, key=places.get)
            title = f"{label}: {short[name]}" if several and name else short[name] or label
            means = [statistics.mean(values[x]) for x in xs]
            line, = axes.plot([places[x] for x in xs], means, label=title, linewidth=1.3)
            axes.plot([places[x] for x in xs for _ in values[x]], [y for x in xs for y in values[x]], "o", markersize=4,
                      color=line.get_color())
            for x, mean in zip(xs, means):
                spread = f"{statistics.stdev(values[x]):.4f}" if len(values[x]) > 1 else ""
                print(f"| {as_typed(x)} | {title} | {mean:.4f} | {spread} | {len(values[x])} | "
                      f"{', '.join(f'{y:.4f}' for y in values[x])} |")
    set_ticks(axes.xaxis, places, over, 0.04)
    axes.set(xlabel=over, ylabel=f"{split} {'bits per byte' if metric == 'bpb' else metric}, last")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def places_of(values):
    """{value: where it stands on an axis}, in order: log2 of numbers above 0 that span a factor of 8, other numbers
    themselves, words one after the other."""
    numbers = all(map(is_number, values))
    ordered = sorted(values, key=lambda x: x if numbers else as_typed(x))
    if numbers and ordered[0] > 0 and ordered[-1] >= 8 * ordered[0]:
        return {x: math.log2(x) for x in ordered}
    return {x: x if numbers else i for i, x in enumerate(ordered)}


def compact(number, _=None):
    """A count in a few letters: 980, 12.3k, 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def set_ticks(axis, places, name, share):
    """Ticks at the values themselves, but for those that would come nearer to the one before than `share` of all."""
    shown, span = [], max(places.values()) - min(places.values())
    for value, place in places.items():
        if not shown or place - places[shown[-1]] >= share * span:
            shown.append(value)
    axis.set_ticks([places[value] for value in shown],
                   [compact(value) if name == "parameters" else as_typed(value) for value in shown])


def on_axis(settings, name, option, directory):
    """A setting's value as a place on an axis: a number, or a word. UserError where a run has no such setting."""
    if name not in settings:
        raise UserError(f"{option} {name}: {directory} has no such setting")
    return settings[name] if is_number(settings[name]) else as_typed(settings[name])


def panels(found, x, y):
    """[(title, {(value of x, value of y): [last value of each seed]})] from `found` as for families, and what follows.

    A panel is a curve under one choice of the settings that tell runs apart beside x and y; see `told_apart`.
    UserError: a run that has no such setting.
    """
    kept, following = told_apart(found, (x, y))
    short = short_names([name for _, _, curves in found for name in curves])
    cells = {}
    for directory, settings, curves in found:
        label = ", ".join(f"{name} {as_typed(settings.get(name))}" for name in kept)
        place = tuple(on_axis(settings, name, "--contours", directory) for name in (x, y))
        for name, curve in curves.items():
            title = ": ".join(part for part in (label, short[name]) if part)
            cells.setdefault(title, {}).setdefault(place, []).append(curve[-1][1])
    return sorted(cells.items(), key=lambda panel: natural(panel[0])), following


def mean_of(values, digits=None):
    """Values of seeds in a table: mean, standard deviation and how many. digits: behind the point; none: 4, or 1 from
    10 on."""
    digits = (4 if abs(statistics.mean(values)) < 10 else 1) if digits is None else digits
    spread = f" +- {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread} ({len(values)})"


def head(columns):
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def contour_tables(drawn, x, y, what):
    """The tables of `panels` as lines of Markdown: a row for each value of y, a column for each of x."""
    lines = []
    for title, cells in drawn:
        xs, ys = (list(places_of({place[i] for place in cells})) for i in (0, 1))
        lines += [f"**{title}**: {what}, mean +- standard deviation (seeds)" if title else
                  f"{what}, mean +- standard deviation (seeds)", "",
                  *head([f"{y} \\ {x}", *map(as_typed, xs)])]
        for b in ys:
            row = [mean_of(cells[a, b]) if (a, b) in cells else "not measured" for a in xs]
            lines.append(f"| {as_typed(b)} | {' | '.join(row)} |")
        lines.append("")
    return lines


def edges(places):
    """Where cells about sorted places begin and end: half-way between two, as far beyond the first and the last."""
    middles = [(a + b) / 2 for a, b in zip(places, places[1:])]
    if not middles:
        return [places[0] - 0.5, places[0] + 0.5]
    return [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]


def contour_panel(axes, cells, x, y, across, up, limits):
    """Cells {(x, y): [values]} in colour, lines at `levels`, a dot where runs are; returns what a colour bar is of.

    across, up: `places_of` all values that the axes show. Places of x and y are those of this panel alone.
    """
    xs = [value for value in across if any(value == a for a, _ in cells)]
    ys = [value for value in up if any(value == b for _, b in cells)]
    at_x, at_y = [across[value] for value in xs], [up[value] for value in ys]
    means = [[statistics.mean(cells[a, b]) if (a, b) in cells else math.nan for a in xs] for b in ys]
    mesh = axes.pcolormesh(edges(at_x), edges(at_y), means, vmin=limits[0], vmax=limits[1], cmap="viridis", alpha=0.85,
                           linewidth=0, rasterized=True)
    axes.plot([across[a] for a, _ in cells], [up[b] for _, b in cells], "o", markersize=2.5, color="white",
              markeredgecolor="0.3", markeredgewidth=0.4)
    known = [mean for row in means for mean in row if not math.isnan(mean)]
    inside = [level for level in sorted(set(levels)) if min(known) < level < max(known)]
    if inside and len(xs) > 1 and len(ys) > 1:
        lines = axes.contour(at_x, at_y, means, levels=inside, colors="black", linewidths=1.1)
        axes.clabel(lines, fmt="%g", fontsize=8)
    set_ticks(axes.xaxis, across, x, 0.13)
    set_ticks(axes.yaxis, up, y, 0.05)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    return mesh


def colour_bar(figure, mesh, panels, what):
    """One bar beside all panels."""
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.9)
    bar.set_label(what, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def draw_contours(drawn, x, y, what, path, beside=""):
    """The picture of `panels`, as a PNG file; all panels have the same axes and the same colours."""
    from matplotlib.figure import Figure
    across, up = (places_of({place[i] for _, cells in drawn for place in cells}) for i in (0, 1))
    means = [statistics.mean(values) for _, cells in drawn for values in cells.values()]
    limits = (0, 1) if 0 <= min(means) and max(means) <= 1 else (min(means), max(means))
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(width, (0.1 + 0.75 / columns * rows) * width if columns > 1 else 0.7 * width),
                    layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (title, cells) in zip(grid.flat, drawn):
        mesh = contour_panel(axes, cells, x, y, across, up, limits)
        axes.set_title(textwrap.fill(title, {1: 80, 2: 50, 3: 32}[columns]), fontsize=8)
        axes.label_outer()
    for axes in grid.flat[len(drawn):]:
        axes.remove()
    colour_bar(figure, mesh, grid.flat[:len(drawn)], what)
    if beside:
        figure.supxlabel(textwrap.fill(beside, 110), fontsize=7)
    save(figure, path)


def parameters_of(directory):
    """How many parameters a run's summary.json says. ValueError where it does not, as before a run has ended."""
    found = read_json(directory / "summary.json").get("parameters")
    if not is_number(found):
        raise ValueError("no parameters in its summary.json")
    return found


CAPACITY = ("parameters", "bits", "bits_of_all", "epoch", "accuracy_trained_no_tool_raw")     # of summary.json


def read_capacity(directory):
    """(settings, with its parameters, and what CAPACITY names) of a run. ValueError, saying why, where one lacks."""
    settings, summary = settings_of(directory), read_json(directory / "summary.json")
    if missing := [name for name in CAPACITY if not is_number(summary.get(name))]:
        raise ValueError(f"no {missing[0]} in its summary.json: finished runs of task in_weight have it")
    return {**settings, "parameters": summary["parameters"]}, {name: summary[name] for name in CAPACITY}


def capacities(found):
    """({label: {(people, parameters): [(settings, summary) of each seed]}}, what follows) from read_capacity's runs."""
    kept, following = told_apart(found, ("n_people", "parameters"))
    following.pop("n_embd", None)                            # the table has it
    groups = {}
    for directory, settings, summary in found:
        label = ", ".join(f"{name} {as_typed(settings.get(name))}" for name in kept)
        place = on_axis(settings, "n_people", "--capacity", directory), settings["parameters"]
        groups.setdefault(label, {}).setdefault(place, []).append((settings, summary))
    return dict(sorted(groups.items(), key=lambda group: natural(group[0]))), following


def capacity_table(groups):
    """The runs of `capacities` as lines of Markdown."""
    several = len(groups) > 1
    lines = head([*["settings"] * several, "people", "width", "parameters", "exposures", "accuracy", "bits",
                  "share of all bits", "bits a parameter"])
    for label, cells in groups.items():
        for (people, parameters), runs in sorted(cells.items()):
            columns = {name: [summary[name] for _, summary in runs] for name in CAPACITY}
            widths = ", ".join(dict.fromkeys(as_typed(settings.get("n_embd")) for settings, _ in runs))
            share = statistics.mean(columns["bits"]) / statistics.mean(columns["bits_of_all"])
            lines.append("| " + " | ".join([
                *[label] * several, f"{people:,}", widths, f"{parameters:,}",
                f"{statistics.mean(columns['epoch']):.4g}",
                mean_of(columns["accuracy_trained_no_tool_raw"]), mean_of(columns["bits"], 0), f"{share:.1%}",
                mean_of([bits / parameters for bits in columns["bits"]], 3)]) + " |")
    return lines


def draw_capacity(groups, path, beside=""):
    """The picture of `capacities`, as a PNG file: bits over parameters, and accuracy over people and parameters."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    every = [(people, size, runs) for cells in groups.values() for (people, size), runs in cells.items()]
    counts, sizes = sorted({people for people, _, _ in every}), sorted({size for _, size, _ in every})
    above = [summary["bits"] for _, _, runs in every for _, summary in runs if summary["bits"] > 0]
    if not above:
        raise UserError("no run holds more than 0 bits: nothing to draw")
    columns = min(3, 1 + len(groups))
    rows = math.ceil((1 + len(groups)) / columns)
    figure = Figure(figsize=((0.4 + 0.42 * columns) * width, (0.15 + 0.45 * rows) * width), layout="constrained",
                    dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = grid.flat[0]
    left, right = 0.8 * sizes[0], 1.25 * sizes[-1]
    all_bits = {people: runs[0][1]["bits_of_all"] for people, _, runs in every}
    bottom, top = 0.6 * min(above), 1.6 * max(all_bits.values())
    for ratio, style in ((2, "-"), (1, "--"), (0.5, ":")):
        axes.plot([left, right], [ratio * left, ratio * right], style, color="0.6", linewidth=1,
                  label=f"{ratio:g} bits a parameter", zorder=1)
    for i, people in enumerate(counts):
        colour = f"C{i % 10}"
        axes.axhline(all_bits[people], color=colour, linestyle=(0, (6, 4)), linewidth=0.8, zorder=1)
        for marker, (label, cells) in zip("osD^v*" * len(groups), groups.items()):
            mine = {size: [summary["bits"] for _, summary in cells[people, size]] for size in sizes
                    if (people, size) in cells}
            mine = {size: bits for size, bits in mine.items() if statistics.mean(bits) > 0}      # a log has no place
            spread = [statistics.stdev(bits) if len(bits) > 1 else 0 for bits in mine.values()]
            if mine:
                axes.errorbar(list(mine), [statistics.mean(bits) for bits in mine.values()], spread, color=colour,
                              marker=marker, markersize=4, linewidth=1.3, capsize=3,
                              label=f"{people:,} people" + (f", {label}" if label else ""))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(compact))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("parameters", fontsize=8)
    axes.set_ylabel("bits about people in the weights (dashes: all that there are)", fontsize=8)
    axes.grid(alpha=0.2)
    across, up = places_of(counts), places_of(sizes)
    for panel, (label, cells) in zip(grid.flat[1:], groups.items()):
        means = {place: [summary["accuracy_trained_no_tool_raw"] for _, summary in runs]
                 for place, runs in cells.items()}
        mesh = contour_panel(panel, means, "n_people", "parameters", across, up, (0, 1))
        panel.set_title(textwrap.fill(label, 50), fontsize=8)
    for panel in grid.flat[1 + len(groups):]:
        panel.remove()
    colour_bar(figure, mesh, grid.flat[:1 + len(groups)], "accuracy, people that were trained on")
    figure.legend(loc="outside lower center", ncols=4 if len(groups) == 1 else 3 + len(groups), fontsize=7,
                  **({"title": textwrap.fill(beside, 130), "title_fontsize": 7} if beside else {}))
    save(figure, path)


def save(figure, path):
    """A figure as a file of the kind that its name says; UserError where it cannot be written."""
    try:
        figure.savefig(path, format=path.suffix.lower()[1:] or "png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def read_index(path):
    """The grid.json at `path`. UserError where it is not there, or not as grid.py writes it."""
    index = read_json(path)
    number = (int, float)
    run = {"value": number, "shown": dict}
    row = {"name": str, "axis": str, "against": (str, type(None)), "factor": (*number, type(None)), "runs": [run],
           "step_seconds": (*number, type(None)), "parameters": (*number, type(None)), "error": (str, type(None)),
           "open": int, "equal_seconds": (dict, type(None)), "at": (dict, type(None))}
    late = {"shown", "at", "sigma_data"}                     # which only some grids have

    def fits(value, shape):
        if isinstance(shape, list):
            return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
        if isinstance(shape, dict):
            return isinstance(value, dict) and all(name in value or name in late for name in shape) and all(
                fits(value[name], kind) for name, kind in shape.items() if name in value)
        return isinstance(value, shape) and not isinstance(value, bool)

    right = index.get("rows") and fits(index, {"metric": str, "rows": [row], "sigma_data": number})
    names = {row["name"] for row in index["rows"]} if right else set()
    for row in index["rows"] if right else ():
        right = right and row["against"] in (None, *names) and fits(row["equal_seconds"] or {"value": 0}, run)
    if right and (cross := index.get("cross")):
        right = isinstance(cross, dict) and all(isinstance(given, dict) for given in cross.values()) and all(
            row.get("at") and row["at"].keys() == cross.keys() for row in index["rows"])
    elif right:
        right = fits(index, {"factors": [number], "slower": number}) and bool(index["factors"]) and all(
            (row["against"] is None) == (row is index["rows"][0]) and (not row["runs"] or row["factor"] is not None)
            for row in index["rows"])
    if not right:
        raise UserError(f"{path} is missing or no grid: python grid.py writes it")
    return index


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
    sigma, judged, data = noise_floor(baseline), [], index.get("sigma_data", 0.0)
    for row in index["rows"][1:]:
        found, other = {"row": row, "values": values[row["name"]]}, values[row["against"]]
        if found["values"] and other:
            against = rows[row["against"]]
            found["difference"], found["verdict"] = decide(found["values"], other, sigma, data)
            if row["step_seconds"] and against["step_seconds"]:
                found["time"] = row["step_seconds"] / against["step_seconds"]
            if row["parameters"] and against["parameters"]:
                found["size"] = row["parameters"] / against["parameters"]
            if row["equal_seconds"]:
                found["equal"] = decide([row["equal_seconds"]["value"]], other, sigma, data)
        judged.append(found)
    return sigma, baseline, judged


def least(n1, n2, sigma, data=0.0):
    """The difference of means of n1 and n2 seeds from which on it counts."""
    return NOISE * math.hypot(sigma * math.sqrt(1 / n1 + 1 / n2), data)


def decide(values, other, sigma, data):
    """As `compare`, with the verdict None where only another draw of the data could have made the difference."""
    difference, verdict = compare(values, other, sigma)
    undecided = verdict and data and abs(difference) < least(len(values), len(other), sigma, data)
    return difference, None if undecided else verdict


WORDS = {-1: "**better**", 0: "no difference measured", 1: "**worse**", None: "undecided (one order of the data)"}


def markdown(index):
    """The table of a grid.json as lines of Markdown."""
    sigma, baseline, judged = judge(index)
    mean = statistics.mean(baseline)
    names = list(index["rows"][0]["runs"][0].get("shown", {}))
    beside = "".join(f", {name} {shown_of(index['rows'][0], name)}" for name in names)
    timed = ["seconds a step", "at equal seconds"] if any("time" in found for found in judged) else []
    data = index.get("sigma_data", 0.0)
    columns = ["axis", "change", "mean", "difference", "at equal steps", *timed, "parameters", "rate", "seeds", *names]
    lines = [f"Baseline: {mean:.4f} ({index['metric']}){beside}, {len(baseline)} seeds, sigma {sigma:.4f}; a row of "
             f"two seeds counts from {least(2, len(baseline), sigma):.4f} on, of three from "
             f"{least(3, len(baseline), sigma):.4f}."
             + (f" With another draw of the data a difference moves by {data:.4f}: below "
                f"{least(2, len(baseline), sigma, data):.4f}, of three {least(3, len(baseline), sigma, data):.4f}, "
                "such a row is undecided." if data else ""), "",
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
    return f"{statistics.mean(values):.4f}" if values and all(map(is_number, values)) else ""


def pivot(index):
    """The table of a grid.json with `cross`, as lines of Markdown: a block for the metric and for each number shown.

    The last axis stands in the columns, the others before the rows; of a single axis, the rows.
    """
    options = {axis: list(given) for axis, given in index["cross"].items()}
    down = list(options)[:-1] or list(options)
    last = list(options)[-1] if len(options) > 1 else None
    rows = {tuple(row["at"][axis] for axis in options): row for row in index["rows"]}
    shown = dict.fromkeys(name for row in rows.values() for run in row["runs"] for name in run.get("shown", {}))
    lines = []
    for name in (None, *shown):
        lines += [f"**{index['metric'] if name is None else name}**, mean +- standard deviation (seeds)", "",
                  *head([*down, *([f"{last} {option}" for option in options[last]] if last else ["mean"])])]
        for place in itertools.product(*(options[axis] for axis in down)):
            cells = [crossed(rows.get((*place, *more)), name)
                     for more in ([(option,) for option in options[last]] if last else [()])]
            lines.append(f"| {' | '.join([*place, *cells])} |")
        lines.append("")
    failed = [f"{row['name']}: {row['error']}" for row in index["rows"] if row["error"]]
    lines += [f"{waiting} runs to go."] if (waiting := sum(row["open"] for row in index["rows"])) else []
    return lines + ([f"Failed: {'; '.join(failed)}."] if failed else [])


def crossed(row, name):
    """A cell of `pivot`: the metric of a row's seeds, or another number, which only some kinds of runs have."""
    runs = row["runs"] if row else []
    values = [run["value"] if name is None else run["shown"].get(name) for run in runs]
    values = [value for value in values if is_number(value)]
    return mean_of(values) if values else "" if runs else "not measured"


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
    limit, data = least(2, len(baseline), sigma), index.get("sigma_data", 0.0)
    if data:
        wide = least(2, len(baseline), sigma, data)
        axes.axvspan(-wide, wide, color="0.93", label="undecided, two seeds (one order of the data)")
    axes.axvspan(-limit, limit, color="0.85", label="no difference measured (two seeds)")
    colours = {-1: "tab:green", 0: "0.35", 1: "tab:red", None: "tab:orange"}
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
    settings = override(globals(), positional="runs")
    if (runs is None) == (table is None):
        raise UserError('what to draw? python plot.py "runs/train_enwik8/*", or --table runs/one_change')
    if sum((over is not None, contours is not None, capacity)) > 1:
        raise UserError("--over, --contours and --capacity are pictures of their own: choose one")
    two = [] if contours is None else [word.strip() for word in contours.split(",")]
    if out is not None and Path(out).suffix.lower() not in ("", *PICTURES):
        raise UserError(f"--out {out}: a picture ends in {', '.join(PICTURES)}")
    drawn_by = ("over", "contours", "capacity", "levels", "same", "only", "by", "split", "metric")
    if table is not None:
        settings.refuse_idle(drawn_by, "with --table")
    elif capacity:
        settings.refuse_idle(("same", "only", "by", "split", "metric"), "with --capacity")
    elif two or over is not None:
        settings.refuse_idle(("by",), "with --contours or --over, which draw the last values")
    if not two and not capacity:
        settings.refuse_idle(("levels",), "without --contours or --capacity")
    if two and (len(set(two)) != 2 or len(two) != 2 or "" in two):
        raise UserError(f"--contours {contours}: must be two settings, as n_people,n_embd")
    if table is not None:
        index = read_index(Path(table) / "grid.json")
        if index.get("cross"):
            settings.refuse_idle(("out", "width"), f"with --table {table}: a cross has no picture of its own")
        lines = pivot(index) if index.get("cross") else markdown(index)
        print("\n".join(lines))
        if index.get("cross"):
            return
        return draw_table(index, Path(out or Path(table) / "table.png"))
    places = [Path(place) for word in runs.split(",")
              for place in sorted(glob.glob(word.strip()), key=natural) or [word.strip()]]
    found, left_out = [], []
    for directory in places:
        try:
            if capacity:
                found.append((directory, *read_capacity(directory)))
                continue
            settings, curves = read_run(directory, by, split, metric)
            if "parameters" in two:
                settings = {**settings, "parameters": parameters_of(directory)}
            found.append((directory, settings, curves))
        except ValueError as error:
            left_out.append(f"{directory}: {error}")
    if not found:
        more = f"; and so on, {len(left_out)} in all" if len(left_out) > 3 else ""
        raise UserError(f"nothing to draw: {'; '.join(left_out[:3])}{more}")
    for line in left_out:
        print("left out", line, file=sys.stderr)
    what = f"{split} {'bits per byte' if metric == 'bpb' else metric}"
    if capacity:
        groups, following = capacities(found)
        print("\n".join(capacity_table(groups)))
        return draw_capacity(groups, Path(out or "capacity.png"), say_beside(following))
    if only is not None:
        found = chosen(found, only.replace(",", " ").split())
    if two:
        drawn, following = panels(found, *two)
        print("\n".join(contour_tables(drawn, *two, what)))
        return draw_contours(drawn, *two, what, Path(out or "contours.png"), say_beside(following))
    if over is not None:
        return draw_over(last_values(found, over), over, split, metric, Path(out or f"{over}.png"))
    draw(families(found), by, split, metric, Path(out or "curves.png"), say_beside(told_apart(found)[1]))


if __name__ == "__main__":
    main()
