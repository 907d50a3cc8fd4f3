"""Curves of many runs, and the table of a grid.

    python plot.py "runs/train_enwik8/*"                         # validation of all, over steps, to curves.png
    python plot.py runs/train_enwik8/a,runs/train_enwik8/b --by seconds --split train
    python plot.py "runs/train_mult/*" --over n_latent --metric accuracy   # last values over a setting, and a table
    python plot.py --table runs/one_change                       # Markdown, and a picture beside it
    python plot.py --table runs/facts                            # means only, of a grid with `cross`
    python plot.py runs/facts.jsonl                              # an archive of runs that grid.py has made
    python plot.py runs/train_enwik8/a --html a.html             # one page: settings, curves, samples, pictures
    python plot.py "runs/facts.jsonl/*in_weight*" --capacity     # some of its runs; bits stored

    python plot.py "runs/facts/*/*" --contours n_people,n_embd --metric accuracy   # two settings
    python plot.py "runs/facts/*/*" --contours n_people,parameters --metric accuracy
    python plot.py "runs/facts/*/*" --metric accuracy --only tool,unseen           # some curves

Runs whose settings differ in nothing but seeds and names are one curve: their mean, and a band of one standard
deviation. A run without metrics is left out and named. Contours have a panel for each curve and for whatever else
differs; numbers that follow from the panel and its two axes, as steps do from people, are named below instead. Capacity
is that of Physics of Language Models 3.3 (Allen-Zhu and Li 2024, arXiv 2404.05405).

The rule of a table of rows (less is better): intervals from one deviation pooled over all rows, what a draw does to all
alike taken out; verdicts by Holm at 5 % over the table. More in docs/one-change.md and nanolab/verdict.py. A table of a
cross has means and deviations, and no verdicts.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__, "runs")  # before the seconds that the next lines take

import io
import itertools
import math
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from nanolab import archive, curves
from nanolab.archive import natural
from nanolab.run import UserError, as_typed, command, override, replacing
from nanolab.verdict import components, judge, ordered_alike, rank_correlation, read_index

# --- What ---
runs = None              # directories and archives, with commas and wildcards (may also be typed as a bare word)
table = None             # a grid's out_dir, or an archive of it: its table instead
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
csv = None               # with --table: the table as a file for machines too
html = None              # one page, a file that a browser needs nothing else for: all about the runs, and their table
out = None               # the picture, .png .pdf or .svg; none: curves.png, and for a table table.png in its folder
width = 8.0              # [>= 1.0, <= 50.0] inches

PICTURES = (".png", ".pdf", ".svg")
LOOKS = ("over", "contours", "capacity", "levels", "same", "only", "by", "split", "metric")   # of curves
SEEDS = {"seed", "data_seed", "run_name", "out_dir", "resume", "preset", "tag",
         "models"}       # each has a curve of its own, and learns the same alone as beside another
ACCURACY = "accuracy_trained_no_tool_raw"
CAPACITY = ("parameters", "bits", "bits_of_all", "epoch", ACCURACY)                           # of summary.json
MEAN = "mean +- standard deviation (seeds)"


# --- What the runs have ---

def read_run(run, by, split, metric, sized=False):
    """(settings, {name of the curve: [(x, y)]}) of a Run; several curves where its lines name models or protocols.

    sized: its parameters are a setting too. ValueError, saying why, where there is nothing to draw.
    """
    clock = sorted((line["step"], line["seconds"]) for line in run.lines if is_number(line.get("seconds")))
    found = {}
    for line in run.lines:
        if line.get("split") == split and is_number(line.get(metric)):
            name = " ".join(value for key, value in line.items() if isinstance(value, str) and key != "split")
            found.setdefault(name, {})[line["step"]] = line[metric]              # the latest line of a step counts
    if not found:
        raise ValueError(f"no {metric} of {split} in its metrics")
    settings = {name: value for name, value in run.settings.items() if name not in (same or "").split(",")}
    settings |= numbers_of(run, ("parameters",)) if sized else {}
    return settings, {name: [(place(step, by, run.settings, clock), y) for step, y in sorted(points.items())]
                      for name, points in found.items()}


def numbers_of(run, names, why=""):
    """{name: number} of a Run's summary. ValueError where it lacks one, as before a run has ended."""
    for name in names:
        if not is_number(run.summary.get(name)):
            raise ValueError(f"no {name} in its summary.json{why}")
    return {name: run.summary[name] for name in names}


def place(step, by, settings, clock):
    """Where a step stands on the axis: itself, tokens seen, or seconds of training, between two lines of the clock."""
    if by == "tokens":
        sizes = [settings.get(name) for name in ("batch_size", "block_size", "grad_accum")]
        if not all(map(is_number, sizes)):
            raise ValueError("its settings do not say how many tokens a step has")
        return step * math.prod(sizes)
    if by == "seconds":
        if not clock:
            raise ValueError("its metrics have no seconds")
        return float(np.interp(step, *zip((0, 0.0), *clock)))
    return step


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def chosen(found, words):
    """Of (run, settings, curves) the curves whose names have all of `words`, and the runs that have any.

    UserError, naming the curves that there are, where none is left.
    """
    left = [(run, settings, {name: curve for name, curve in curves.items() if set(words) <= set(name.split())})
            for run, settings, curves in found]
    left = [entry for entry in left if entry[2]]
    if not left:
        names = dict.fromkeys(name for _, _, curves in found for name in curves)
        raise UserError(f"no curve has the words {' '.join(words)}; there are: {', '.join(names)}")
    if len(left) < len(found):
        print(f"left out {len(found) - len(left)} runs that have no curve {' '.join(words)}", file=sys.stderr)
    return left


def distinguishing(found, axes=()):
    """([settings that tell runs apart], {setting that follows from those: its values}) of (run, settings, ...).

    A setting follows if it has one value wherever those before it, and numbers wherever also the `axes` of a picture,
    have one: the batch with the task, the steps with the people. Words come before numbers, as they say more, and few
    values before many.
    """
    every = [settings for _, settings, _ in found]
    words = pd.DataFrame([{name: as_typed(value) for name, value in settings.items()} for settings in every])
    words = words.fillna("none")
    numbers = {name: all(settings.get(name) is None or is_number(settings[name]) for settings in every)
               for name in words}
    differ = [name for name in words if words[name].nunique() > 1 and name not in SEEDS and name not in axes]
    kept = []
    for name in sorted(differ, key=lambda name: (numbers[name], words[name].nunique())):
        given = kept + [axis for axis in axes if axis in words and (numbers[name] or not numbers[axis])]
        if not given or words.groupby(given)[name].nunique().max() > 1:
            kept.append(name)
    return [name for name in words if name in kept], {
        name: list(words[name].unique()) for name in differ if name not in kept}


def labelled(found, axes=(), option=None):
    """(a row for each of `found`: name, label, its places `across` and `up` on the axes; the settings that follow).

    A label says what tells runs apart, see `distinguishing`; it is empty where that is nothing. A place is a number, or
    a word. UserError: a run has no such setting.
    """
    kept, following = distinguishing(found, axes)
    for run, settings, _ in found:
        if missing := [axis for axis in axes if axis not in settings]:
            raise UserError(f"{option} {missing[0]}: {run.place} has no such setting")
    rows = [{"name": run.name, "label": ", ".join(f"{name} {as_typed(settings.get(name))}" for name in kept)} |
            {at: settings[axis] if is_number(settings[axis]) else as_typed(settings[axis])
             for at, axis in zip(("across", "up"), axes)} for run, settings, _ in found]
    return pd.DataFrame(rows, dtype=object), following


def points_of(found, axes=(), option=None):
    """`labelled` of (run, settings, {curve: [(x, y)]}) with a row for each point: also run, curve, x, y."""
    rows, following = labelled(found, axes, option)
    points = [(number, curve, x, y) for number, (_, _, curves) in enumerate(found)
              for curve, points in curves.items() for x, y in points]
    return pd.DataFrame(points, columns=["run", "curve", "x", "y"]).join(rows, on="run"), following


def last(points):
    """Of `points_of` the last point of every curve of every run."""
    return points.groupby(["run", "curve"]).tail(1)


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_of(values, digits=None):
    """Values of seeds in a table: mean, standard deviation and how many. digits: behind the point; none: 4, or 1 from
    10 on."""
    digits = (4 if abs(statistics.mean(values)) < 10 else 1) if digits is None else digits
    spread = f" +- {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread} ({len(values)})"


def average(curve):
    """Of the points of one curve x, y and its spread over runs, at the places that all runs have."""
    mean = statistics.mean
    at = curve.groupby(curve.groupby("run").cumcount()).agg(
        x=("x", mean), y=("y", mean), spread=("y", deviation), runs=("y", "size"))
    return at[at["runs"] == curve["run"].nunique()]


def tabled(cells, function):
    """Cells as a table, a row for each `up` and a column for each `across`, of a function of the y there."""
    values = cells.groupby(["up", "across"], sort=False)["y"].agg(function).unstack("across")
    return values.reindex(index=list(places_of(values.index)), columns=list(places_of(values.columns)))


# --- Words ---

def short_names(names):
    """{name of a curve: the name without the words that all have}; one that is left with none stays as it is."""
    common = set.intersection(*(set(name.split()) for name in names))
    return {name: " ".join(word for word in name.split() if word not in common) or name for name in names}


def footnote(following):
    """In words, what settings differ that no label says; "" for none."""
    words = {name: sorted(values, key=natural) for name, values in following.items()}
    return "" if not words else "not in the labels: " + "; ".join(
        f"{name} {', '.join(values) if len(values) < 5 else f'{values[0]} to {values[-1]}'}"
        for name, values in words.items())


def as_markdown(columns, rows):
    """A table as lines of Markdown."""
    return ["|" + " --- |" * len(columns) if row is None else f"| {' | '.join(map(str, row))} |"
            for row in (columns, None, *rows)]


# --- Pictures ---

def canvas(wide, high, rows=1, columns=1, **shared):
    """(a figure of so many inches, its axes in a list)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(wide, high), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def save(figure, path):
    """A figure as a file of the kind that its name says; UserError where it cannot be written."""
    try:
        figure.savefig(path, format=path.suffix.lower()[1:] or "png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


def legend_title(note, columns):
    """What a legend has to say beside its lines, as its keyword arguments."""
    return {"title": textwrap.fill(note, columns), "title_fontsize": 7} if note else {}


def draw(points, xlabel, ylabel, path, note=""):
    """The picture of `points_of`: means over the runs of a label, a band of their spread. note: the legend's title."""
    figure, (axes,) = canvas(width, 0.6 * width)
    short = short_names(points["curve"].unique())
    for i, (label, mine) in enumerate(points.groupby("label", sort=False)):
        seeds = mine.groupby("curve")["run"].nunique().max()
        title = (label or mine["name"].iloc[0]) + (f" ({seeds} seeds)" if seeds > 1 else "")
        for name, curve in mine.groupby("curve", sort=False):
            mean, style = average(curve), {}
            if label and len(short) > 1:                     # a colour for each setting, and a dash for each curve
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[list(short).index(name) % 4]}
            line, = axes.plot(mean["x"], mean["y"], label=f"{title}: {short[name]}" if len(short) > 1 else title,
                              linewidth=1.3, marker="o" if len(mean) < 30 else None, markersize=3, **style)
            if mean["spread"].any():
                axes.fill_between(mean["x"], mean["y"] - mean["spread"], mean["y"] + mean["spread"],
                                  color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    place = dict(loc="outside lower center", ncols=2) if len(axes.lines) > 4 else {}     # no room among the lines
    (figure if place else axes).legend(fontsize=8, **place, **legend_title(note, 90))
    save(figure, path)


def draw_over(ends, over, what, ylabel, path):
    """The picture of the `last` points over one axis, a dot per seed and a line through the means; prints the table."""
    figure, (axes,) = canvas(width, 0.6 * width)
    places, short, rows = places_of(ends["across"].unique()), short_names(ends["curve"].unique()), []
    for i, ((label, name), curve) in enumerate(ends.groupby(["label", "curve"], sort=False)):
        title = short[name] or label or curve["name"].iloc[0]
        if label and name and name not in label:
            title = f"{label}: {short[name]}"
        values = curve.groupby("across", sort=False)["y"].agg(list)
        values = values.loc[sorted(values.index, key=places.get)]
        line, = axes.plot([places[x] for x in values.index], values.map(statistics.mean), label=title, linewidth=1.3,
                          color=f"C{i % 10}", linestyle=("-", "--", ":", "-.")[i // 10 % 4])
        axes.plot([places[x] for x, ys in values.items() for _ in ys], [y for ys in values for y in ys], "o",
                  markersize=4, color=line.get_color())
        rows += [[as_typed(x), title, f"{statistics.mean(ys):.4f}", f"{deviation(ys):.4f}" if len(ys) > 1 else "",
                  len(ys), ", ".join(f"{y:.4f}" for y in ys)] for x, ys in values.items()]
    print("\n".join(as_markdown([over, "curve", f"{what}, mean", "standard deviation", "seeds", "values"], rows)))
    set_ticks(axes.xaxis, places, over, 0.04)
    axes.set(xlabel=over, ylabel=f"{ylabel}, last")
    axes.grid(alpha=0.3)
    place = dict(loc="outside lower center", ncols=2) if i > 7 else {}
    (figure if place else axes).legend(fontsize=8, **place)
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
    axis.set_ticks([places[value] for value in shown], map(compact if name == "parameters" else as_typed, shown))


def edges(places):
    """Where cells about sorted places begin and end: half-way between two, as far beyond the first and the last."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    if not middles:
        return [places[0] - 0.5, places[0] + 0.5]
    return [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]


def panels(ends, x, y):
    """[(title, its cells)] of the `last` points over two axes, by title: a panel for each label and curve."""
    short = short_names(ends["curve"].unique())
    titles = [": ".join(filter(None, (label, short[name]))) for label, name in zip(ends["label"], ends["curve"])]
    return sorted(ends.assign(title=titles).groupby("title"), key=lambda panel: natural(panel[0]))


def contour_tables(drawn, x, y, what):
    """The tables of `panels` as lines of Markdown: a row for each value of y, a column for each of x."""
    lines = []
    for title, cells in drawn:
        found = tabled(cells, mean_of).fillna("not measured")
        lines += [f"**{title}**: {what}, {MEAN}" if title else f"{what}, {MEAN}", "", *as_markdown(
            [f"{y} \\ {x}", *map(as_typed, found.columns)],
            [[as_typed(value), *row] for value, row in zip(found.index, found.values)]), ""]
    return lines


def contour_panel(axes, means, x, y, across, up, limits):
    """Means as of `tabled` in colour, lines at `levels`, a dot where runs are; returns what a colour bar is of.

    across, up: `places_of` all values that the axes show. Places of x and y are those of this panel alone.
    """
    at_x, at_y = [across[value] for value in means.columns], [up[value] for value in means.index]
    mesh = axes.pcolormesh(edges(at_x), edges(at_y), means, vmin=limits[0], vmax=limits[1], cmap="viridis", alpha=0.85,
                           linewidth=0, rasterized=True)
    there = means.stack().dropna()
    axes.plot([across[a] for _, a in there.index], [up[b] for b, _ in there.index], "o", markersize=2.5, color="white",
              markeredgecolor="0.3", markeredgewidth=0.4)
    inside = [level for level in sorted(set(levels)) if there.min() < level < there.max()]
    if inside and min(means.shape) > 1:
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
    bar = figure.colorbar(mesh, ax=panels, shrink=0.9)
    bar.set_label(what, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def draw_contours(drawn, x, y, what, path, note=""):
    """The picture of `panels`, as a PNG file; all panels have the same axes and the same colours."""
    means = [tabled(cells, statistics.mean) for _, cells in drawn]
    across, up = (places_of({value for mean in means for value in mean.axes[i]}) for i in (1, 0))
    limits = min(mean.min(axis=None) for mean in means), max(mean.max(axis=None) for mean in means)
    limits = (0, 1) if 0 <= limits[0] and limits[1] <= 1 else limits
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure, grid = canvas(width, (0.1 + 0.75 / columns * rows) * width if columns > 1 else 0.7 * width, rows, columns,
                          sharex=True, sharey=True)
    for axes, mean, (title, _) in zip(grid, means, drawn):
        mesh = contour_panel(axes, mean, x, y, across, up, limits)
        axes.set_title(textwrap.fill(title, {1: 80, 2: 50, 3: 32}[columns]), fontsize=8)
        axes.label_outer()
    for axes in grid[len(drawn):]:
        axes.remove()
    colour_bar(figure, mesh, grid[:len(drawn)], what)
    if note:
        figure.supxlabel(textwrap.fill(note, 110), fontsize=7)
    save(figure, path)


# --- Capacity: bits in the weights ---


def read_capacity(run):
    """(settings, with its parameters, and what CAPACITY names) of a Run. ValueError, saying why, where one lacks."""
    summary = numbers_of(run, CAPACITY, ": finished runs of task in_weight have it")
    return {**run.settings, "parameters": summary["parameters"]}, summary


def capacities(found):
    """(`labelled` of read_capacity's runs over people and parameters, in order, with width and CAPACITY; what follows).
    """
    rows, following = labelled(found, ("n_people", "parameters"), "--capacity")
    following.pop("n_embd", None)                            # the table has it
    rows["width"] = [as_typed(settings.get("n_embd")) for _, settings, _ in found]
    rows = rows.join(pd.DataFrame([summary for _, _, summary in found])).sort_values(["across", "up"])
    return rows.sort_values("label", key=lambda labels: labels.map(natural), kind="stable"), following


def capacity_table(rows):
    """The runs of `capacities` as lines of Markdown."""
    several, lines = rows["label"].nunique() > 1, []
    for (label, people, parameters), cell in rows.groupby(["label", "across", "up"], sort=False):
        mean = cell[list(CAPACITY)].map(float).agg(statistics.mean)
        lines.append([*[label] * several, f"{people:,}", ", ".join(cell["width"].unique()), f"{parameters:,}",
                      f"{mean['epoch']:.4g}", mean_of(cell[ACCURACY]), mean_of(cell["bits"], 0),
                      f"{mean['bits'] / mean['bits_of_all']:.1%}", mean_of(cell["bits"] / parameters, 3)])
    return as_markdown([*["settings"] * several, "people", "width", "parameters", "exposures", "accuracy", "bits",
                        "share of all bits", "bits a parameter"], lines)


def draw_capacity(rows, path, note=""):
    """The picture of `capacities`, as a PNG file: bits over parameters, and accuracy over people and parameters."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    if not (rows["bits"] > 0).any():
        raise UserError("no run holds more than 0 bits: nothing to draw")
    groups = list(rows.groupby("label", sort=False))
    columns = min(3, 1 + len(groups))
    high = math.ceil((1 + len(groups)) / columns)
    figure, grid = canvas((0.4 + 0.42 * columns) * width, (0.15 + 0.45 * high) * width, high, columns)
    axes, left, right = grid[0], 0.8 * rows["up"].min(), 1.25 * rows["up"].max()
    for ratio, style in ((2, "-"), (1, "--"), (0.5, ":")):
        axes.plot([left, right], [ratio * left, ratio * right], style, color="0.6", linewidth=1,
                  label=f"{ratio:g} bits a parameter", zorder=1)
    markers = dict(zip(rows["label"].unique(), itertools.cycle("osD^v*")))
    for i, (people, alike) in enumerate(rows.groupby("across")):
        axes.axhline(alike["bits_of_all"].iloc[0], color=f"C{i % 10}", linestyle=(0, (6, 4)), linewidth=0.8, zorder=1)
        for label, group in alike.groupby("label", sort=False):
            bits = group.groupby("up")["bits"].agg([statistics.mean, deviation])
            bits = bits[bits["mean"] > 0]                    # a log has no place for others
            if len(bits):
                axes.errorbar(bits.index, bits["mean"], bits["deviation"], color=f"C{i % 10}", marker=markers[label],
                              markersize=4, linewidth=1.3, capsize=3,
                              label=f"{people:,} people" + (f", {label}" if label else ""))
    axes.set(xscale="log", yscale="log", xlim=(left, right),
             ylim=(0.6 * rows["bits"][rows["bits"] > 0].min(), 1.6 * rows["bits_of_all"].max()))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(compact))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("parameters", fontsize=8)
    axes.set_ylabel("bits about people in the weights (dashes: all that there are)", fontsize=8)
    axes.grid(alpha=0.2)
    across, up = places_of(rows["across"].unique()), places_of(rows["up"].unique())
    for panel, (label, group) in zip(grid[1:], groups):
        means = tabled(group.assign(y=group[ACCURACY]), statistics.mean)
        mesh = contour_panel(panel, means, "n_people", "parameters", across, up, (0, 1))
        panel.set_title(textwrap.fill(label, 50), fontsize=8)
    for panel in grid[1 + len(groups):]:
        panel.remove()
    colour_bar(figure, mesh, grid[:1 + len(groups)], "accuracy, people that were trained on")
    figure.legend(loc="outside lower center", ncols=4 if len(groups) == 1 else 3 + len(groups), fontsize=7,
                  **legend_title(note, 130))
    save(figure, path)


# --- The table of a grid ---

def markdown(index):
    """The table of a grid.json as lines of Markdown, and above it what the noise is and how far the rungs agree."""
    judged, first, log = judge(index), index["rows"][0], index.get("log")
    names = list(first["runs"][0].get("shown", {}))

    def shown(row):
        """What the table prints beside a row's metric: means of other numbers of its runs, '' where one has none."""
        values = [[run.get("shown", {}).get(name) for run in row["runs"]] for name in names]
        return [f"{statistics.mean(mine):.4f}" if mine and all(map(is_number, mine)) else "" for mine in values]
    beside = "".join(f", {name} {mean}" for name, mean in zip(names, shown(first)))
    timed, worked = (any(getattr(mine, name) for mine in judged.rows) for name in ("time", "work"))
    ladder = len(judged.rungs) > 1
    what = "ratio" if log else "difference"
    columns = ["axis", "change", *(f"{rung.name} {what}".strip() for rung in judged.rungs), "verdict",
               *["over rungs", "worth in steps"] * ladder, *["seconds a step", "at equal seconds"] * timed,
               "parameters", *["FLOPs"] * worked, "rate", *["rates' spread", "published"] * ladder, "draws", *names]
    outer = (min(index["factors"]), max(index["factors"])) if len(index["factors"]) > 1 else ()
    lines = []
    for mine in judged.rows:
        row, tried = mine.row, sorted(factor for factor, _ in mine.row["tuned"])
        edges = (tried[0], tried[-1]) if len(tried) > 1 else outer
        name = row["name"] + (f" (against {row['against']})" if row["against"] != first["name"] else "")
        if not mine.effects:
            why = row["error"] or (f"{row['open']} runs to go" if row["open"] else "not measured")
            lines.append([row["axis"], name, why + " |" * (len(columns) - 3)])
            continue
        lines.append([
            row["axis"], name, *(interval(mine.effects.get(rung.name), log) for rung in judged.rungs),
            {"better": "**better**", "worse": "**worse**", None: "not measured"}.get(mine.verdict, mine.verdict),
            *[mine.holds, f"x{mine.worth:.3g}" if mine.worth else ""] * ladder,
            *[f"{mine.time:.2f}" if mine.time else "", at_equal_seconds(mine, index)] * timed,
            percent(mine.size), *[percent(mine.work)] * worked,
            f"x{row['factor']:g}{'*' if row['factor'] in edges else ''}",
            *[f"{mine.sensitivity:.3f}" if mine.sensitivity is not None else ""] * ladder,
            *["; ".join(f"{source} {value:+g}" for source, value in row.get("published", {}).items())] * ladder,
            " + ".join(str(effect.draws) for effect in mine.effects.values()), *shown(row)])
    star = "\\* the best of the tried rates is the smallest or the largest: a better one may lie beyond."
    starred = any(line[columns.index("rate")].endswith("*") for line in lines if len(line) == len(columns))
    return [*noise(judged, index, beside), "", *as_markdown(columns, lines), *(["", star] if starred else [])]


def interval(effect, log):
    """An Effect in words: difference and half of its 95 % interval; of logarithms, the ratio and its interval."""
    if effect and log:
        ends = [math.exp(effect.difference + sign * effect.half()) for sign in (0, -1, 1)]
        return "x{:.3g} ({:.3g} .. {:.3g})".format(*ends)
    return f"{effect.difference:+.4f} ± {effect.half():.4f}" if effect else ""


def percent(ratio):
    """A ratio as the percentage by which it is more or less than 1; "same" up to 1 %."""
    return "" if not ratio else f"{ratio - 1:+.1%}" if abs(ratio - 1) > 0.0101 else "same"


def at_equal_seconds(mine, index):
    """The cell of a Found."""
    if mine.equal:
        return interval(mine.equal, index.get("log"))
    return "" if not mine.time else "as at equal steps" if abs(mine.time - 1) <= index["slower"] else "not measured"


def noise(judged, index, beside):
    """Lines: baseline and deviations of each rung; verdicts that chance makes; how far rungs and papers agree."""
    first, log, primary = index["rows"][0]["name"], index.get("log"), judged.primary
    lines = []
    for rung in judged.rungs:
        fit, mean = rung.fit, rung.fit.mean(first)
        lines.append(
            f"{f'{rung.name}, {rung.steps} steps: baseline' if rung.steps else 'Baseline:'} "
            f"{math.exp(mean) if log else mean:.4f} ({index['metric']}){beside}, {len(fit.values[first])} draws; sigma "
            f"{fit.sigma:.4f}{' of the logarithm' if log else ''} ({fit.freedom} degrees of freedom), with the draws "
            f"left in {fit.unpaired:.4f}." + f" Judged by their own: {', '.join(fit.wild)}." * (fit.wild != {}))
    if data := primary.fit.error:
        lines.append(f"Another draw of the data moves a difference by {data:.4f}: it is in every interval.")
    if primary.steps != (wanted := index.get("primary", (index.get("rungs") or [None])[-1])):
        lines.append(f"Nothing tells the noise at {wanted} steps yet: the verdicts are those at {primary.steps}.")
    rows = [mine for mine in judged.rows if primary.name in mine.effects]
    lines.append(f"{len(rows)} rows are judged: Holm keeps the chance of one false better or worse among them at 5 %"
                 + (f"; the same: the 90 % interval lies within ±{index['same']:g}." if index.get("same") else "."))
    if gains := sorted(mine.gain for mine in rows if mine.gain == mine.gain):
        lines.append(f"Parabolas through the rates of {len(gains)} rows gain {statistics.median(gains):.4f} in the "
                     f"median, {gains[-1]:.4f} at most; {len(rows) - len(gains)} rows are best at an edge or untuned.")
    if judged.doubling:
        lines.append(f"The baseline gains {judged.doubling:.4f} by twice the steps.")
    lines += [agreement(one, other, judged, index) for one, other in itertools.pairwise(judged.rungs)]
    for source in dict.fromkeys(name for mine in rows for name in mine.row.get("published", {})):
        told = [mine.row["published"][source] * mine.effects[primary.name].difference > 0 for mine in rows
                if source in mine.row.get("published", {})]
        lines.append(f"{source}: the sign of {sum(told)} of {len(told)} rows.")
    told = [mine.row["predicted"].partition(":")[0] == mine.verdict for mine in rows if mine.row.get("predicted")]
    return lines + [f"Predicted beforehand: {sum(told)} of {len(told)} verdicts."] * (told != [])


def agreement(one, other, judged, index):
    """How far two rungs order the rows alike, in a line: over all pairs, and over those that the first has close."""
    first = index["rows"][0]["name"]
    means = [{row: rung.fit.mean(row) for row, same in rung.as_one.items()
              if row == same and rung.fit.together(first, row)} for rung in (one, other)]
    close = 3 * one.fit.sigma * math.sqrt(2 / len(one.fit.values[first]))
    told = [f"{share:.3f} of {pairs} pairs" if pairs else "no pairs" for share, pairs in
            (ordered_alike(*means, within) for within in (math.inf, close))]
    signs = [mine.effects[one.name].difference * mine.effects[other.name].difference > 0 for mine in judged.rows
             if {one.name, other.name} <= mine.effects.keys()]
    return (f"{one.name} to {other.name}: ordered alike {told[0]}, {told[1]} closer than {close:.4f}; rank correlation "
            f"{rank_correlation(*means):.2f}; {sum(signs)} of {len(signs)} signs kept.")


def write_csv(index, path):
    """The table as a CSV for machines: a line a row, differences with the ends of their 95 % intervals at each rung."""
    judged, lines = judge(index), []
    for mine in judged.rows:
        line = {key: mine.row[key] for key in ("axis", "name", "against")}
        for name, effect in mine.effects.items():
            line |= {f"{what}{f'_{name}' * (name != '')}": value for what, value in (
                ("difference", effect.difference), ("low", effect.difference - effect.half()),
                ("high", effect.difference + effect.half()), ("p", effect.p), ("draws", effect.draws))}
        lines.append(line | {
            "verdict": mine.verdict, "over_rungs": mine.holds, "worth_in_steps": mine.worth, "time": mine.time,
            "parameters": mine.size, "flops": mine.work, "factor": mine.row["factor"], "sensitivity": mine.sensitivity,
            "gain": mine.gain, "predicted": mine.row.get("predicted"),
            **{f"published: {source}": value for source, value in mine.row.get("published", {}).items()}})
    try:
        with open(path, "w", newline="") as file:                # pandas would read addresses and compress by the name
            pd.DataFrame(lines).to_csv(file, index=False)
    except (OSError, ValueError) as error:                       # a name with a null byte
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {path}", file=sys.stderr)


def pivot(index):
    """The table of a grid.json with `cross`, as lines of Markdown: a block for the metric and for each number shown.

    The last axis stands in the columns, the others before the rows; of a single axis, the rows.
    """
    options, rows = {axis: list(given) for axis, given in index["cross"].items()}, index["rows"]
    *down, across = options if len(options) > 1 else (*options, None)
    titles = [f"{across} {option}" for option in options[across]] if across else ["mean"]
    places = list(itertools.product(*(options[axis] for axis in down)))
    more = [(option,) for option in options[across]] if across else [()]
    at, lines = {tuple(row["at"][axis] for axis in options): row for row in rows}, []
    for name in (None, *dict.fromkeys(name for row in rows for run in row["runs"] for name in run.get("shown", {}))):
        cells = [[*place, *(crossed(at.get((*place, *option)), name) for option in more)] for place in places]
        title = f"**{index['metric'] if name is None else name}**, {MEAN}"
        lines += [title, "", *as_markdown([*down, *titles], cells), ""]
    values = {row["name"]: {run["seed"]: run["value"] for run in row["runs"]} for row in rows}
    if len(options) == 1 and (parts := components(values)):
        lines += ["Deviations: {:.4f} over {}, {:.4f} over seeds, {:.4f} of the rest.".format(
            parts[0], down[0], *parts[1:]), ""]
    failed = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    waiting = sum(row["open"] for row in rows)
    return lines + [f"{waiting} runs to go."] * (waiting > 0) + [f"Failed: {'; '.join(failed)}."] * (failed != [])


def crossed(row, name):
    """A cell of `pivot`: the metric of a row's seeds, or another number, which only some kinds of runs have."""
    runs = row["runs"] if row else []
    values = [run["value"] if name is None else run.get("shown", {}).get(name) for run in runs]
    values = [value for value in values if is_number(value)]
    return mean_of(values) if values else "" if runs else "not measured"


def draw_table(index):
    """The picture of the differences: a dot a draw, a bar for 95 %, the rungs in shades; families together."""
    judged = judge(index)
    rows = [mine for mine in judged.rows if mine.effects]
    if not rows:
        raise UserError("no row has finished yet: nothing to draw")
    figure, (axes,) = canvas(width, 1.2 + 0.2 * len(rows))
    families = {axis: i for i, axis in enumerate(dict.fromkeys(mine.row["axis"] for mine in rows))}
    rows.sort(key=lambda mine: families[mine.row["axis"]])
    fit, same = judged.primary.fit, index.get("same", 0.0)
    if same:
        axes.axvspan(-same, same, color="0.85", label=f"within ±{same:g}")
    axes.axvspan(-fit.sigma, fit.sigma, color="0.75" if same else "0.85", label=f"sigma {fit.sigma:.4f}")
    colours = {"better": "tab:green", "worse": "tab:red", "the same": "tab:blue"}
    for y, mine in enumerate(rows):
        for i, rung in enumerate(rung for rung in judged.rungs if rung.name in mine.effects):
            effect, place = mine.effects[rung.name], y + 0.22 * (i - (len(judged.rungs) - 1) / 2)
            shade = dict(color=colours.get(mine.verdict, "0.35"), alpha=(i + 1) / len(judged.rungs))
            axes.plot([effect.difference - effect.half(), effect.difference + effect.half()], [place] * 2, **shade)
            dots = rung.fit.cleared(rung.as_one[mine.row["name"]]) - rung.fit.mean(rung.as_one[mine.row["against"]])
            axes.plot(dots, [place] * len(dots), "o", markersize=3, **shade)
    first = index["rows"][0]["name"]
    axes.set_yticks(range(len(rows)), [f"{mine.row['axis']}: {mine.row['name']}"
                                       f"{'' if mine.row['against'] == first else ' †'}" for mine in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("symlog", linthresh=max(4 * fit.sigma, 1e-6))
    rungs = f"; the darker, the longer: {', '.join(rung.name for rung in judged.rungs)}" * (len(judged.rungs) > 1)
    what = "logarithm of the ratio" if index.get("log") else "difference"
    axes.set_xlabel(f"{what} to the baseline (left is better; † to another row){rungs}")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=7, loc="outside upper right", ncols=2)
    return figure


# --- The command ---

def show_table(settings):
    """The table of a grid, and where it has verdicts a picture beside it."""
    index = read_index(Path(table) if table.endswith(".jsonl") else Path(table) / "grid.json")
    if index.get("cross"):
        settings.refuse_idle(("out", "width", "csv"), f"with --table {table}: a cross has no picture of its own")
        return print("\n".join(pivot(index)))
    print("\n".join(markdown(index)))
    if csv:
        write_csv(index, csv)
    folder = Path(table.removesuffix(".jsonl"))
    save(draw_table(index), Path(out or (folder / "table.png" if folder.is_dir() else f"{folder}.png")))


def show_page():
    """The page of --html: of `runs`, or of the runs in a folder of them, whose grid's table it then has."""
    words = [word.strip() for word in runs.split(",")]
    there, notes = archive.find(",".join(place for word in words for place in places_in(word)))
    whole = [run for run in there if run.settings and isinstance(run.summary, dict)]
    notes += [f"{run.place}: no params.json, or it is damaged" for run in there if run not in whole]
    if not whole:
        raise UserError(f"nothing to show: {'; '.join(notes[:3])}")
    for note in notes:
        print("left out", note, file=sys.stderr)
    tables = []
    for place in map(Path, words):
        path = place if place.suffix == ".jsonl" else place / "grid.json"
        try:
            if archive.read_grid(path):
                index, picture = read_index(path), io.BytesIO()
                if not index.get("cross"):
                    draw_table(index).savefig(picture, format="png")
                tables.append((pivot(index) if index.get("cross") else markdown(index), picture.getvalue()))
        except UserError as error:                           # runs that have not ended have no table yet
            notes.append(str(error))
    text = curves.page(runs, whole, tables, notes)
    with replacing(Path(html)) as file:
        file.write(text.encode("utf-8", "replace"))
    print(f"wrote {html}", file=sys.stderr)


def places_in(word):
    """[the runs in a folder that is none itself]; a word that means something else stays alone."""
    place = Path(word)
    if not place.is_dir() or (place / "params.json").exists():
        return [word]
    return sorted({str(path.parent) for path in place.rglob("params.json")}, key=natural) or [word]


def read_all(read):
    """[(run, *read(run))] of all `runs`; what cannot be read is named. UserError where nothing can."""
    (there, left_out), found = archive.find(runs), []
    for run in there:
        try:
            if not run.settings:
                raise ValueError("no params.json")
            found.append((run, *read(run)))
        except ValueError as error:
            left_out.append(f"{run.place}: {error}")
    if not found:
        more = f"; and so on, {len(left_out)} in all" if len(left_out) > 3 else ""
        raise UserError(f"nothing to draw: {'; '.join(left_out[:3])}{more}")
    for line in left_out:
        print("left out", line, file=sys.stderr)
    return found


@command
def main():
    settings = override(globals(), positional="runs")
    if (runs is None) == (table is None):
        raise UserError('what to draw? python plot.py "runs/train_enwik8/*", or --table runs/one_change')
    if sum((over is not None, contours is not None, capacity)) > 1:
        raise UserError("--over, --contours and --capacity are pictures of their own: choose one")
    if out is not None and Path(out).suffix.lower() not in ("", *PICTURES):
        raise UserError(f"--out {out}: a picture ends in {', '.join(PICTURES)}")
    two = [] if contours is None else [word.strip() for word in contours.split(",")]
    if html is not None:
        settings.refuse_idle(("table", *LOOKS, "csv", "out", "width"), "with --html")
        if not html.endswith(".html"):
            raise UserError(f"--html {html}: a page ends in .html")
        return show_page()
    if table is not None:
        settings.refuse_idle(LOOKS, "with --table")
    elif capacity:
        settings.refuse_idle(("same", "only", "by", "split", "metric"), "with --capacity")
    elif two or over is not None:
        settings.refuse_idle(("by",), "with --contours or --over, which draw the last values")
    if table is None:
        settings.refuse_idle(("csv",), "without --table")
    if not two and not capacity:
        settings.refuse_idle(("levels",), "without --contours or --capacity")
    if two and (len(set(two)) != 2 or len(two) != 2 or "" in two):
        raise UserError(f"--contours {contours}: must be two settings, as n_people,n_embd")
    if table is not None:
        return show_table(settings)
    if capacity:
        rows, following = capacities(read_all(read_capacity))
        print("\n".join(capacity_table(rows)))
        return draw_capacity(rows, Path(out or "capacity.png"), footnote(following))
    found = read_all(lambda run: read_run(run, by, split, metric, "parameters" in two))
    if only is not None:
        found = chosen(found, only.replace(",", " ").split())
    ylabel = f"{split} {'bits per byte' if metric == 'bpb' else metric}"
    axes, option = (two, "--contours") if two else ([over], "--over") if over is not None else ([], None)
    points, following = points_of(found, axes, option)
    if two:
        drawn = panels(last(points), *two)
        print("\n".join(contour_tables(drawn, *two, ylabel)))
        draw_contours(drawn, *two, ylabel, Path(out or "contours.png"), footnote(following))
    elif over is not None:
        draw_over(last(points), over, f"{split} {metric}", ylabel, Path(out or f"{over}.png"))
    else:
        xlabel = {"step": "step", "seconds": "seconds of training", "tokens": "tokens seen"}[by]
        draw(points, xlabel, ylabel, Path(out or "curves.png"), footnote(following))


if __name__ == "__main__":
    main()
