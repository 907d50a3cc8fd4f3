"""The curves of a run, from its lines of metrics: their names, the picture, the page of `plot.py --html`, and their
mirrors, TensorBoard and wandb.

A mirror takes up what it lacks of a resumed run's lines (`catch_up`), then a line at a time (`log`).
"""
import base64
import contextlib
import functools
import hashlib
import html
import itertools
import json
import os
import re
import shlex
import struct
from pathlib import Path

import numpy as np

from nanolab.settings import UserError, _read_settings, _read_tables, as_typed

PANELS = {"loss": "loss (nats per target)", "bpb": "bits per byte", "accuracy": "accuracy", "exact": "exact match",
          "digit_accuracy": "accuracy of a digit", "perplexity": "perplexity of the codes", "psnr": "PSNR (dB)",
          "information": "I(code; action) / H(action)", "changed": "changed tokens that are right",
          "frame": "whole frames that are right"}
PICTURES = {".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg"}  # that a page shows
ROOT = Path(__file__).resolve().parents[1]
LARGEST = 8_000_000  # bytes of a file in a page


def is_name(name):
    """Whether it can name a folder inside a run's directory."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]{1,100}", name) is not None


def curve_of(entry):
    """The curve of a line of metrics: model, stage, split and whatever else it says in words, as in `val/block`."""
    first = {key: entry[key] for key in ("model", "stage", "split") if key in entry}
    return "/".join(value for value in {**first, **entry}.values() if isinstance(value, str))


def _numbers(entry, curve):
    """{name: what a line of metrics measures}."""
    return {f"{curve}/{key}": value for key, value in entry.items()
            if key != "step" and type(value) in (int, float)}


def draw(lines, file):
    """Draws what PANELS names, as far as it is there, over the steps of a run's lines into an open PNG file."""
    from matplotlib.figure import Figure
    curves, powers, whose = {key: {} for key in PANELS}, {}, {}
    for entry in lines:
        for name, value in entry.items():
            key, _, power = name.rpartition("_") if name.startswith("digit_accuracy_") else (name, "", "")
            if key in PANELS and value is not None:
                label = curve_of(entry) + (f" 10^{power}" if power else "")
                curves[key].setdefault(label, []).append((entry["step"], value))
                if power:                                    # a colour for each digit, a line style for each model
                    powers[label] = int(power)
                    whose.setdefault(curve_of(entry), len(whose))
    panels = [key for key in curves if curves[key]] or ["loss"]
    figure = Figure(figsize=(8, 4.5 * len(panels)), layout="constrained", dpi=100)
    for axes, key in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for name, points in sorted(curves[key].items()):
            style = dict(linewidth=1) if len(points) > 60 else dict(marker="o", markersize=3.5)
            if name in powers:
                dashes = ("-", "--", ":", "-.")[whose[name.rpartition(" ")[0]] % 4]
                style |= dict(color=f"C{powers[name] % 10}", linestyle=dashes)
            axes.plot(*zip(*points), label=name, **style)
        axes.set(xlabel="step", ylabel=PANELS[key])
        axes.grid(alpha=0.3)
        if curves[key]:
            axes.legend(fontsize="small" if len(curves[key]) > 6 else None)
    figure.savefig(file, format="png")


def by_curve(lines, most=400):
    """[{"name": a curve, "step": [...], "seconds": [...], and each number's list, None where a line lacks it}] of a
    run's lines; of a curve with more than twice `most` lines, evenly, about so many and the last."""
    def number(value):
        return value if type(value) in (int, float) and abs(value) < 1e300 else None     # nor nan
    clocks, curves = {}, {}
    for entry in (entry for entry in lines if abs(entry["step"]) < 2 ** 53):
        clock = clocks.setdefault(str((entry.get("model"), entry.get("stage"))), [(0, 0.0)])
        if number(entry.get("seconds")) is not None:
            clock.append((entry["step"], entry["seconds"]))
        curves.setdefault(curve_of(entry), []).append((entry, clock))
    found = []
    for name, entries in curves.items():
        entries = entries[:-1:max(1, len(entries) // most)] + entries[-1:]
        keys = dict.fromkeys(key for entry, _ in entries for key in entry if number(entry[key]) is not None)
        seconds = [float(np.interp(entry["step"], *zip(*clock))) if len(clock) > 1 else None
                   for entry, clock in entries]              # between two lines of the clock, as plot.py has it
        found.append({key: [number(entry.get(key)) for entry, _ in entries] for key in keys} | {
            "name": name, "seconds": seconds})
    return found


def page(title, runs, tables=(), notes=()):
    """A whole page of HTML, which needs nothing else: curves to hover over, tables, and all about each run.

    runs: of archive.Run. tables: [(lines of Markdown, PNG bytes or none)]. notes: sentences on top. Whatever a run says
    is escaped, and a policy of the page lets no script run but its own.
    """
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1]
    body = [f"<p>{html.escape(note)}</p>" for note in notes]
    for lines, picture in tables:
        body += [*_from_markdown(lines), _picture(picture, "image/png", "the table") if picture else ""]
    body += [_overview(runs), *(_about(run, open=len(runs) == 1) for run in runs)]
    found = [by_curve(run.lines) for run in runs]
    keys = dict.fromkeys(key for curve in itertools.chain(*found) for key in curve if key not in ("name", "step"))
    data = json.dumps({"keys": [key for key in PANELS if key in keys] + [key for key in keys if key not in PANELS],
                       "runs": found}, separators=(",", ":"))
    parts = {"@TITLE@": html.escape(title), "@BODY@": "\n".join(body), "@DATA@": data.replace("<", "\\u003c"),
             "@HASH@": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}
    return re.sub("@[A-Z]+@", lambda place: parts[place[0]], template)


def _table(head, rows, raw=False):
    """HTML; raw: the first cell of each row is HTML already."""
    def line(tag, row, raw=0):
        cells = [str(cell) if i < raw else html.escape(str(cell)) for i, cell in enumerate(row)]
        return f"<tr><{tag}>{f'</{tag}><{tag}>'.join(cells)}</{tag}></tr>"
    lines = [line("th", head), *(line("td", row, raw) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _from_markdown(lines):
    """Tables and sentences as plot.py prints them, as HTML."""
    for is_table, block in itertools.groupby(lines, lambda line: line.startswith("|")):
        block = [line.replace("**", "").replace("\\*", "*") for line in block]
        rows = [line[2:-2].split(" | ") for line in block] if is_table else []
        yield _table(rows[0], rows[2:]) if rows else "".join(f"<p>{html.escape(line)}</p>" for line in block)


def _overview(runs, shown=10):
    """The runs in a table, with a box each that draws its curves; at first those of the first `shown`."""
    alone = len({run.name for run in runs}) == len(runs)
    names = [html.escape(run.name if alone else run.place) for run in runs]
    best = [", ".join(f"{name} {value:.4f}" for name, value in run.summary.items()
                      if name.startswith("best_") and isinstance(value, float)) for run in runs]
    return _table(["run", "status", "step", "best", "seconds"], [
        [f'<label><input type="checkbox" class="run" value="{names[i]}"{" checked" * (i < shown)}> {names[i]}</label>',
         run.summary.get("status", "not ended"), run.summary.get("step", ""), best[i],
         f"{run.summary['seconds']:.1f}" if isinstance(run.summary.get("seconds"), float) else ""]
        for i, run in enumerate(runs)], raw=True)


@functools.cache
def _known(script):
    """(the settings of a script as it is here, its presets); nothing of one that is not."""
    path = ROOT / f"{script}.py"
    if path.parent != ROOT or not path.is_file():
        return {}, {}
    return {name: spec.default for name, spec in _read_settings(path).items()}, _read_tables(path)[1].get("presets", {})


def _differing(run):
    """[(setting, its value, the preset's, the script's own)] where a Run has neither the one nor the other value, first
    those that no preset set."""
    defaults, presets = _known(str(run.params.get("script")))
    preset = presets.get(run.settings.get("preset"), {}) if isinstance(run.settings.get("preset"), str) else {}
    rows = [(name, *map(as_typed, (run.settings[name], preset.get(name, default), default)))
            for name, default in defaults.items() if name in run.settings and name != "preset"]
    return sorted((row for row in rows if not row[1] == row[2] == row[3]), key=lambda row: row[1] == row[2])


def _about(run, open):
    """All that is known of a run: command, settings, summary, environment, samples, pictures."""
    differ = _differing(run)
    versions, device, git = (value if isinstance(value := run.params.get(key), dict) else {}
                             for key in ("versions", "device", "git"))
    words = list(map(str, run.params["command"])) if isinstance(run.params.get("command"), list) else []
    parts = [f"<pre>python {html.escape(shlex.join(words))}</pre>" if words else "",
             "" if run.lines else "<p>no metrics yet</p>",
             _table(["setting", "this run", f"preset {as_typed(run.settings.get('preset'))}", "the script"], differ)
             if differ else "<p>no setting is known to differ from the preset and the script</p>"]
    machine = versions | device | {"commit": git.get("commit"), "uncommitted changes": git.get("dirty")}
    for name, values in (("summary", run.summary), ("environment", machine), ("all settings", run.settings)):
        rows = [(key, as_typed(value)) for key, value in values.items() if value is not None]
        parts.append(f"<details><summary>{name}</summary>{_table(['name', 'value'], rows)}</details>")
    for path in samples_of(Path(run.place)):
        kind = PICTURES.get(path.suffix)
        if path.stat().st_size > LARGEST:
            parts.append(f"<p>{html.escape(path.name)} is left out: it is larger than {LARGEST // 10 ** 6} MB</p>")
        elif kind:
            parts.append(_picture(path.read_bytes(), kind, path.name))
        else:
            parts.append(f"<figure><figcaption>{html.escape(path.name)}</figcaption><pre>"
                         f"{html.escape(path.read_text(encoding='utf-8', errors='replace'))}</pre></figure>")
    return f"<details{' open' * open}><summary>{html.escape(run.place)}</summary>{''.join(parts)}</details>"


def _picture(data, kind, name):
    return (f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="{html.escape(name)}" '
            f'src="data:{kind};base64,{base64.b64encode(data).decode()}"></figure>')


def samples_of(directory):
    """The files of a run's samples/ that a page can show, of those whose names differ in numbers alone the last."""
    found = {}
    for path in sorted((directory / "samples").glob("*")):
        if path.suffix in (*PICTURES, ".txt") and path.is_file() and not path.is_symlink():
            found[re.sub(r"\d+", "", path.name)] = path
    return list(found.values())


class TensorBoard:
    """A model's curves in a folder of its own: TensorBoard shows them as a run, and its steps count alone.

    reached: {model: the step where a resumed run goes on}, "" for all others; of a new run {}.
    """

    def __init__(self, directory, reached):
        self.directory, self.reached, self.boards = directory, reached, {}

    def catch_up(self, lines):
        """What was written after the step where the run goes on is hidden, that step itself too: it is said again."""
        for model in [model for model in self.reached if model] or self.reached:
            self._open(model)
        for entry in lines:
            if entry["step"] == self.reached.get(entry.get("model", ""), self.reached.get("")):
                self.log(entry, 0)

    def log(self, entry, number):
        """A line of metrics."""
        model = entry.get("model", "")
        board = self.boards.get(model) or self._open(model)
        for name, value in _numbers(entry, curve_of({**entry, "model": None})).items():
            board.add_scalar(name, value, entry["step"])

    def _open(self, model):
        if model and not is_name(model):                     # a damaged file must not lead out of the directory
            raise UserError(f"{self.directory / 'metrics.jsonl'} is damaged: {model[:50]!r} is no name of a model")
        from torch.utils.tensorboard import SummaryWriter
        purge = self.reached.get(model, self.reached.get(""))
        self.boards[model] = SummaryWriter(str(self.directory / "tensorboard" / model), purge_step=purge)
        return self.boards[model]

    def flush(self):
        """To the disk."""
        for board in self.boards.values():
            board.flush()

    def close(self, good):
        """At the run's end."""
        for board in self.boards.values():
            board.close()


class Wandb:
    """A run of wandb, by its `mode` under a name, that goes on where the directory's files say which it is."""

    def __init__(self, directory, name, mode, config):
        import wandb
        self.directory, ident = directory, directory / "wandb_id"
        if not (ident.exists() and ident.read_text().isalnum()):     # else of what wandb wrote here under it
            found = [re.search(r"run-\d+_\d+-(\w+)", path.name) for path in directory.glob("wandb/*run-*")]
            ident.write_text(next((match[1] for match in found if match), os.urandom(4).hex()))
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise UserError("wandb has no API key: type `wandb login` once, or choose --wandb offline")
            self.run = wandb.init(project="nanolab", name=name, id=ident.read_text(), mode=mode, resume="allow",
                                  dir=str(directory), config=config,
                                  settings=wandb.Settings(silent=True, console="off", init_timeout=60))
            self.run.define_metric("*", step_metric="step")  # its own step counts lines: two models may be apart
        except wandb.Error as error:
            raise UserError(f"wandb did not start: {error}; --wandb offline needs no network") from None

    def catch_up(self, lines):
        """What a killed process did not bring there any more."""
        there = wandb_lines(self.directory) if lines else ()
        for number, entry in enumerate(lines, 1):
            if number not in there:
                self.log(entry, number)

    def log(self, entry, number):
        """Line `number` of the metrics; what wandb has, a resumed run only repeats."""
        if number >= self.run.step:
            self.run.log({**_numbers(entry, curve_of(entry)), "step": entry["step"]}, step=number)

    def flush(self):
        """Its own process does."""

    def close(self, good):
        """At the run's end."""
        self.run.finish(0 if good else 1)


def wandb_lines(directory):
    """The numbers of the lines of metrics in the files that wandb keeps in a run's directory: a set.

    Their format is LevelDB's log: blocks of 32,768 bytes, of records (check sum, size, kind) that may be in parts.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    found = set()
    for path in directory.glob("wandb/*run-*/*.wandb"):
        data, at, record = path.read_bytes(), 7, b""         # after the file's own header
        with contextlib.suppress(Exception):                 # what a kill has cut off
            while at + 7 <= len(data):
                left = 32768 - at % 32768
                if left < 7:                                 # no record begins in the rest of a block
                    at += left
                    continue
                size, kind = struct.unpack_from("<HB", data, at + 4)
                record, at = record + data[at + 7:at + 7 + size], at + 7 + size
                if kind in (1, 4):                           # whole, or the last part
                    found.add(Record.FromString(record).history.step.num)    # 0: a record of something else
                    record = b""
    return found
