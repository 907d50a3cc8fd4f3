"""An experiment as one text file: all that its runs were told and measured, without checkpoints, code, or pictures.

The first line has what most of the runs share: experiment, format, script, versions, device, git, settings, the words
of the command, and of a grid what grid.json says. Every other line is a run: its name, whatever of the first line it
has otherwise (`lacks`: settings that it does not know, as it is older), its own words of the command, its history
where it was resumed, its summary, and its metrics by columns:

    {"line": [0, 1, 3], "step": [10, 20, 30], "split": "train", "loss": [3.32, 2.62, 2.44]}

are the lines 0, 1 and 3 of its metrics.jsonl: a list has a value for each of them, anything else stands in all.
"""
import contextlib
import fnmatch
import glob
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanolab.run import UserError, as_user_error, is_running, read_json, replacing, run_metrics, write_json

SHARED = ("format", "script", "versions", "device", "git")   # of params.json; beside settings and command


@dataclass
class Run:
    """What a run left, wherever it lies. `place`: how messages call it."""
    name: str
    place: str
    settings: dict       # {} where there is no params.json
    summary: dict        # {} before it has ended
    lines: list          # of its metrics, in the order of their steps
    params: dict = field(default_factory=dict)   # all of its params.json


def natural(words):
    """A key that puts n_embd 8 before n_embd 16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", words)]


def of_folder(directory):
    """The Run in a directory, as far as it is there."""
    params = read_json(directory / "params.json")
    settings = params.get("settings")
    return Run(directory.name, str(directory), settings if isinstance(settings, dict) else {},
               read_json(directory / "summary.json"), run_metrics(directory) if directory.is_dir() else [], params)


def find(words):
    """(all Runs that are named, [why others cannot be read]): directories and archives with commas and wildcards.

    `runs/a/*`, `runs/a.jsonl`, and `runs/a.jsonl/*_s1` for some runs of an archive.
    """
    found, unread = [], []
    for word in words.split(","):
        path, some, names = word.strip().partition(".jsonl/")
        path += ".jsonl" if some else ""
        for place in sorted(glob.glob(path), key=natural) or [path]:
            if not place.endswith(".jsonl"):
                if Path(place).exists():
                    found.append(of_folder(Path(place)))
                else:
                    unread.append(f"{place}: no such run")
                continue
            try:
                runs = [run for run in read(Path(place)) if fnmatch.fnmatchcase(run.name, names or "*")]
                found += runs
                unread += [] if runs else [f"{place}: no run {names}"]
            except ValueError as error:
                unread.append(str(error))
    return found, unread


def read(path):
    """The Runs of an archive, in its order. ValueError where it is none."""
    first, runs = read_first(path), []
    try:
        for number, text in enumerate(path.read_bytes().splitlines()[1:], 2):
            line = json.loads(text)
            told = line.get("settings")
            settings = {} if told is None else {name: value for name, value in (first["settings"] | told).items()
                                                if name not in line.get("lacks", ())}
            runs.append(Run(line["run"], f"{path}/{line['run']}", settings, line["summary"], unpack(line["metrics"])))
            with contextlib.suppress(LookupError, TypeError, ValueError):        # its curves need none
                runs[-1].params = restored_params(first, runs[-1], line)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: line {number} is no run of an archive") from None
    return runs


def read_first(path):
    """The first line of an archive: what its runs share. ValueError where there is none."""
    try:
        with open(path, "rb") as file:
            first = json.loads(file.readline())
        if isinstance(first["settings"], dict) and isinstance(first["grid"], (dict, type(None))):
            return first
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path}: no archive: python grid.py archive writes one")


def read_grid(path):
    """What a grid.json says, or an archive of its folder; {} where there is nothing."""
    if path.suffix != ".jsonl":
        return read_json(path)
    try:
        return read_first(path)["grid"] or {}
    except ValueError:
        return {}


def write(folder):
    """The archive of all runs under `folder`, beside it: (its path, how many runs).

    UserError: no runs, one that is still being written, an archive that is there already.
    """
    path = Path(f"{folder.resolve() if folder.name in ('', '..') else folder}.jsonl")
    places = sorted({file.parent for file in folder.rglob("metrics.jsonl")}, key=lambda place: natural(str(place)))
    if not places:
        raise UserError(f"{folder}: no runs")
    if busy := [str(place) for place in places if is_running(place)]:
        raise UserError(f"{', '.join(busy)}: still being written")
    if path.exists():
        raise UserError(f"{path} is there already")
    params = {place: read_json(place / "params.json") for place in places}
    params = {place: mine if isinstance(mine.get("settings"), dict) else {} for place, mine in params.items()}
    first, names = first_line([mine for mine in params.values() if mine]), Counter(place.name for place in places)
    lines = [{"experiment": path.stem, **first, "grid": read_json(folder / "grid.json") or None}]
    for place, mine in params.items():
        name = place.name if names[place.name] == 1 else place.relative_to(folder).as_posix()
        lines.append({"run": name, **run_line(place, mine, first)})
    with replacing(path) as file:
        file.writelines(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    return path, len(places)


def restore(path, folder):
    """The runs of an archive as directories, so that a grid goes on from them: how many. Not checkpoints, code and
    pictures, which it does not hold: a run that had not ended begins anew, so it gets no summary.

    UserError: no archive, names that lead elsewhere or are there twice, a folder that is there already.
    """
    with as_user_error():
        first, runs = read_first(path), read(path)
    if folder.exists():
        raise UserError(f"{folder} is there already")
    try:
        home = folder / Path((first["grid"] or {}).get("script") or str(first["script"])).stem
        places = [(home if Path(run.name).name == run.name else folder) / run.name for run in runs]
        whole = [place.resolve() for place in places]
        params = [restored_params(first, run, json.loads(text))
                  for run, text in zip(runs, path.read_bytes().splitlines()[1:])]
    except (ValueError, LookupError, TypeError, OSError):        # also a name with a null byte
        raise UserError(f"{path}: its runs are not as python grid.py archive writes them") from None
    if any(folder.resolve() not in place.parents for place in whole):
        raise UserError(f"{path}: a name of a run leads out of {folder}")
    if len(set(whole)) < len(whole) or set(whole) & {above for place in whole for above in place.parents}:
        raise UserError(f"{path}: two runs would lie in one folder")
    try:
        for place, run, params in zip(places, runs, params):
            place.mkdir(parents=True)
            if params:
                write_json(place / "params.json", params)
                (place / "lock").touch()                         # which says that it is a run's directory
            if run.summary.get("status", "done") == "done":
                write_json(place / "summary.json", run.summary)
            (place / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in run.lines))
        if first["grid"]:
            write_json(folder / "grid.json", first["grid"])
    except (OSError, UserError) as error:
        shutil.rmtree(folder, ignore_errors=True)                # half of them would look like all
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    return len(runs)


def restored_params(first, run, line):
    """What params.json of a run has that an archive knows by its first line and the run's; {} where it had none."""
    if not isinstance(run.summary, dict):
        raise TypeError("a summary is a mapping")
    if not run.settings:
        return {}
    words = [*first["command"][:1], *dict.fromkeys(first["command"][1:] + line.get("command", []))]
    return {key: line.get(key, first[key]) for key in SHARED} | {
        "settings": run.settings, "command": shlex.split(" ".join(words)), "history": line.get("history", [])}


def first_line(params):
    """Of params.json of several runs, what most of them have; of their commands the words that all have."""
    names = dict.fromkeys(name for mine in params for name in mine["settings"])
    words = list(map(typed, params))
    return {**{key: usual([mine[key] for mine in params if key in mine]) for key in SHARED},
            "settings": {name: usual([mine["settings"][name] for mine in params if name in mine["settings"]])
                         for name in names},
            "command": [word for word in words[0] if all(word in each for each in words)] if words else []}


def run_line(place, params, first):
    """What the line of a run in a directory has beside its name: of params.json what the first line has otherwise."""
    line = {}
    if params:
        mine, shared = params["settings"], first["settings"]
        line |= {key: params[key] for key in SHARED if key in params and differ(params[key], first[key])}
        line["settings"] = {name: value for name, value in mine.items() if differ(value, shared[name])}
        line["lacks"] = [name for name in shared if name not in mine]
        line["command"] = [word for word in typed(params) if word not in first["command"]]
        line["history"] = params.get("history", [])[1:] and params["history"]
    line = {key: value for key, value in line.items() if value or key not in ("lacks", "history")}
    return line | {"summary": read_json(place / "summary.json"), "metrics": pack(run_metrics(place))}


def typed(params):
    """The command of a run, a word for each setting with its value."""
    return re.split(r" (?=--)", shlex.join(params.get("command", ())))


def usual(values):
    """Of JSON values the one that is there most often; None of none."""
    counted = Counter(map(json.dumps, values))
    return json.loads(max(counted, key=counted.get)) if counted else None


def differ(one, other):
    """Of JSON values: 1, 1.0 and true are three, as a file has them."""
    return json.dumps(one) != json.dumps(other)


def pack(lines):
    """Lines of metrics by columns; lines with the same keys and words belong together."""
    kinds = {}
    for number, line in enumerate(lines):
        fixed = {key: value for key, value in line.items() if isinstance(value, (str, bool))}
        kinds.setdefault(json.dumps([list(line), fixed]), []).append((number, line))
    return [{"line": [number for number, _ in mine]} |
            {key: value if isinstance(value, (str, bool)) else [line[key] for _, line in mine]
             for key, value in mine[0][1].items()} for mine in kinds.values()]


def unpack(kinds):
    """The lines of `pack`, in their order."""
    lines = {}
    for kind in kinds:
        for i, number in enumerate(kind["line"]):
            lines[number] = {key: value[i] if isinstance(value, list) else value for key, value in kind.items()
                             if key != "line"}
    return [lines[number] for number in sorted(lines)]
