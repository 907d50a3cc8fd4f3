"""A grid of runs: a baseline with several seeds, and rows that change one thing each; goes on where it stopped.

    python grid.py grids/one_change.yaml                   # two runs at a time; after Ctrl-C the same command goes on
    python grid.py grids/one_change.yaml --jobs 1 --threads 2
    python grid.py grids/one_change.yaml --print           # what could start now, for a cluster's own scheduler
    python grid.py grids/one_change.yaml --status          # how far each row is
    python plot.py --table runs/one_change                 # the table
    python grid.py archive runs/one_change                 # all of its runs as one text file, runs/one_change.jsonl
    python grid.py restore runs/one_change.jsonl runs/one_change   # and back: a grid goes on from them

What the baseline and every row go through: their rates times each factor of `tune`, and further while the best one is
the smallest or the largest; the best factor with all seeds (without `rungs` a row with the first two), at each length
of training. Two short runs time its steps (the faster counts: a neighbour on the machine only ever adds). One that is
faster or slower than the baseline by more than 10 % is trained once more for as many steps as fit into the baseline's
seconds: so it is compared per step and per second.

    script: train_enwik8.py
    out_dir: runs/one_change
    metric: val_bpb_raw                # of summary.json; less is better
    base: {preset: cpu, lr: 0.004}     # settings of every run
    seeds: [1, 2, 3, 4, 5]
    seeded: [seed, data_seed]          # what a seed sets; without it, seed
    tune: {settings: [lr], factors: [0.5, 1, 2], seed: 0, further: 4}               # a seed that counts nowhere
    rungs: {500: 5, 2000: 3}           # values of max_steps, and with how many of the seeds
    primary: 2000                      # the rung of the verdicts; a row has those up to it, or its own `rungs`
    speed: {max_steps: 60, eval_interval: none, log_interval: 5}                    # what the timing runs change
    rows:
      layer norm: {axis: norm, set: {norm: layer}}
      own heads: {axis: losses, set: {layer_heads: own}, against: shared heads}     # compared with another row
    cross:                             # or, in place of rows, every combination of some settings with every seed
      n_embd: [8, 16, 32, 64]
      task: {weights: {task: in_weight, batch_size: 256}, tool: {task: in_tool}}    # options with all that they set

A run is known by its settings: a row that is renamed does not run again, one that is changed is another run, and what
the yaml no longer wants stays where it is. Several grid.py may share a folder. A run that fails does not stop the
others; it is told at the end and left alone until --retry. One that was killed goes on with the next command.
What a grid measured, and each key of its yaml: docs/one-change.md.
"""
from nanolab.settings import Settings, _read_settings, _read_tables, answer_help

answer_help(__name__, __file__, "grid")  # before the seconds that the next lines take

import ast
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from builtins import print as say
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanolab import archive
from nanolab.run import (UserError, as_typed, check_settings, command, lock_file, override, read_json, read_metrics,
                         write_json)

# --- What ---
grid = None              # the yaml file (may also be typed as a bare word)
print = False            # only list the commands that could start now
status = False           # only say how far each row is
retry = False            # try runs again that failed
# --- How ---
jobs = 2                 # [>= 1] runs at a time
threads = 1              # [>= 1] CPU threads of each
checkpoints = False      # keep the checkpoints of finished runs

SHAPE = {"script": str, "out_dir": str, "metric": str, "show": list, "base": dict, "seeds": list, "tune": dict,
         "speed": (dict, str, type(None)), "sigma_data": float, "same": float, "log": bool, "rungs": dict,
         "primary": int, "rows": dict, "cross": dict, "seeded": list}
ROW_SHAPE = {"axis": str, "set": dict, "against": str, "rungs": list, "tune": dict, "published": dict,
             "predicted": str}
FORETOLD = ("better", "worse", "the same")
BASELINE = "baseline"
SLOWER = 0.1             # a row is as fast as the baseline up to this share: timings of equal work differ by 8 %
KILLED = (130, 143, -9, -15, -2, -1)  # the last four by SIGKILL, SIGTERM, SIGINT, SIGHUP
LARGEST = 100_000        # values in a yaml, those that aliases repeat counted each time


@dataclass
class Row:
    """A model of the table: the baseline, or one change of it."""
    name: str
    axis: str
    changes: dict
    against: str         # the row that it is compared with
    at: dict = None      # of a cross: {axis: option}
    rungs: list = (None,)                              # values of max_steps; None: that of base
    tune: dict = field(default_factory=dict)           # {setting: values}, of which the best stays
    told: dict = field(default_factory=dict)           # what the table says beside: published, predicted


@dataclass(frozen=True)
class Cell:
    """One run that a grid may want. `settings`: JSON of what is typed; `run`: its directory's name, which holds a hash
    of the settings."""
    row: str
    seed: int
    factor: float
    settings: str
    run: str


@dataclass
class Result:
    """What is known of a cell: `state` "done" with a value, "failed" with an error, or "open"."""
    state: str
    value: float = None
    times: list = field(default_factory=list)          # seconds per step, of each stretch between two lines of metrics
    parameters: int = None
    flops: int = None                                  # per token
    error: str = ""
    shown: dict = field(default_factory=dict)          # {name: number} of what the table prints beside


@dataclass
class Progress:
    """Where a row stands: cells that it wants next, and what it has. `values`: those of `cells`."""
    wanted: list = field(default_factory=list)
    tuned: dict = field(default_factory=dict)          # {factor: value, None where it failed}
    factor: float = None
    chosen: dict = field(default_factory=dict)         # of the row's own `tune`, the best values
    cells: list = field(default_factory=list)          # of the best factor, by rung and seed
    values: list = field(default_factory=list)
    step_seconds: float = None                         # of the faster timing run
    parameters: int = None
    flops: int = None                                  # per token
    equal: Cell = None                                 # the run of equal seconds, if it needs one
    error: str = ""


class Grid:
    """A yaml file that was read and checked, and what its runs have left on the disk.

    Raises UserError for a file that is not there or no grid, with the place in it.
    """

    def __init__(self, path):
        self.path = Path(path)
        plan = read_yaml(self.path)
        check_shape(plan, SHAPE, {"script", "out_dir", "metric", "base", "seeds"}, str(path))
        self.need(bool(plan.get("rows")) != bool(plan.get("cross")), "it needs either rows or cross")
        extra = {"tune", "speed", "sigma_data", "rungs", "primary", "same"} & plan.keys() if "cross" in plan else ()
        self.need(not extra, f"{', '.join(sorted(extra))} goes with rows, not with cross")
        self.need(plan["out_dir"].isprintable(), f"out_dir {plan['out_dir']!r} is no name of a folder")
        self.script = Path(__file__).resolve().parent / plan["script"]
        self.need(self.script.is_file(), f"there is no script {plan['script']}")
        try:
            self.specs, self.presets = _read_settings(self.script), _read_tables(self.script)[1].get("presets", {})
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{path}: script {plan['script']} is no Python: {error}") from None
        self.folder, self.metric, self.seeds = Path(plan["out_dir"]), plan["metric"], plan["seeds"]
        self.home = self.folder / self.script.stem           # of the runs
        self.need(all(type(seed) is int for seed in self.seeds) and 2 <= len(self.seeds) == len(set(self.seeds)),
                  f"seeds must be at least 2 different whole numbers, not {self.seeds}")
        self.judging = {key: plan[key] for key in ("sigma_data", "same", "log", "primary") if key in plan}
        for key in ("sigma_data", "same"):
            self.need(0 <= plan.get(key, 0) < math.inf, f"{key} must be a number from 0 on, not {plan.get(key)}")
        self.read_tuning(plan)
        self.seeded, self.show = plan.get("seeded", ["seed"]), plan.get("show", [])
        for key, names in (("seeded", self.seeded), ("tune: settings", self.scaled), ("show", self.show)):
            self.need(all(type(name) is str for name in names) and (names or key != "seeded")
                      and len(set(names)) == len(names),
                      f"{key} must be names{' of settings' * (key != 'show')}, each once, not {names}")
        self.base = self.read_base(plan)
        self.check({name: self.seeds[0] for name in self.seeded if name != "seed"}, "seeded")
        speed = plan.get("speed", {})
        self.need(speed == "none" or not isinstance(speed, str), f"speed must be settings, or none, not {speed!r}")
        self.speed = self.check(speed if isinstance(speed, dict) else {}, "speed")
        for name in self.scaled:
            self.need(type(self.base.get(name)) in (int, float), f"tune: {name} must be a number in base")
        self.need(not self.speed or self.base.get("max_steps"), "speed needs max_steps in base")
        self.cross = {str(axis): self.options(str(axis), given) for axis, given in plan.get("cross", {}).items()}
        self.rows = self.crossed() if self.cross else self.listed(plan["rows"])
        self.need(None in self.rungs or "max_steps" not in plan["base"], "base: the rungs set max_steps")
        twice = set(self.seeded) & {*self.base, *(name for row in self.rows for name in {**row.changes, **row.tune})}
        self.need(not twice, f"{', '.join(sorted(twice))} is set by the seeds (seeded), it cannot be set again")
        self.names, self.known, self.failed = {}, {}, {}        # by hash; by run
        self.check_cells()

    def need(self, right, words):
        """UserError with the yaml's path where something in it is not right."""
        if not right:
            raise UserError(f"{self.path}: {words}")

    def read_tuning(self, plan):
        """What is tried before the seeds count, and the lengths of training with how many of the seeds each has."""
        tune = plan.get("tune", {})
        check_shape(tune, {"settings": list, "factors": list, "seed": int, "further": int}, set(), f"{self.path}: tune")
        self.scaled, self.factors = tune.get("settings", []), tune.get("factors", [1])
        self.need(self.factors and all(type(f) in (int, float) and 0 < f <= sys.float_info.max for f in self.factors),
                  f"tune: factors must be numbers above 0, none endless, not {self.factors}")
        self.further, self.tune_seed = tune.get("further", 0), tune.get("seed", self.seeds[0])
        self.need(self.further >= 0 and (not self.further or self.factors == sorted(set(self.factors))
                                         and len(self.factors) > 1),
                  f"tune: further is how many factors more, from 0 on, beyond several in order, not {self.further}")
        self.need("seed" not in tune or self.tune_seed not in self.seeds,
                  f"tune: seed {self.tune_seed} is one of the seeds: its runs would count")
        self.rungs = plan.get("rungs", {None: len(self.seeds)})
        self.need(self.rungs and ("rungs" not in plan or all(
            type(long) is int and 0 < long <= sys.maxsize and type(count) is int and 2 <= count <= len(self.seeds)
            for long, count in self.rungs.items()) and list(self.rungs) == sorted(self.rungs)),
            f"rungs must be values of max_steps in order, each with how many of the {len(self.seeds)} seeds, at least "
            f"2, not {self.rungs}")
        self.need(plan.get("primary", None) in self.rungs or "primary" not in plan,
                  f"primary must be one of the rungs {list(self.rungs)}, not {plan.get('primary')}")

    def read_base(self, plan):
        """The settings of every run; what a preset has and the seeds set is left out."""
        base = plan["base"]
        if "preset" in base:
            known = ", ".join(self.presets) or f"none: {self.script.name} has no presets"
            self.need(base["preset"] in list(self.presets),  # a list: what is no name may have no hash
                      f"base: preset {as_typed(base['preset'])}: must be one of {known}")
            preset = {name: value for name, value in self.presets[base["preset"]].items() if name not in self.seeded}
            base = preset | {name: value for name, value in base.items() if name != "preset"}
        base = self.check(base, "base")
        return base if None in self.rungs else base | {"max_steps": next(iter(self.rungs))}  # of what is tuned

    def crossed(self):
        """The rows of a cross: one for every combination of its options."""
        rows = []
        for chosen in itertools.product(*self.cross.values()):
            at = dict(zip(self.cross, chosen))
            settings = [self.cross[axis][option] for axis, option in at.items()]
            twice = {name for name, count in Counter(itertools.chain(*settings)).items() if count > 1}
            self.need(not twice, f"cross: {', '.join(sorted(twice))} is set by several axes")
            changes = {name: value for option in settings for name, value in option.items()}
            rows.append(Row(", ".join(f"{axis} {option}" for axis, option in at.items()), "", changes, None, at))
        return rows

    def listed(self, given):
        """The rows of `rows`, the baseline before them; each leads to it over what it is compared with."""
        rows = [Row(BASELINE, "", {}, None, rungs=list(self.rungs))]
        primary = self.judging.get("primary", list(self.rungs)[-1])
        for name, row in given.items():
            row, place = {} if row is None else row, f"row {name!r}"
            check_shape(row, ROW_SHAPE, {"set"}, f"{self.path}: {place}")
            rungs = row.get("rungs", [long for long in self.rungs if long is None or long <= primary])
            some = [long for long in self.rungs if long in rungs]            # as text: 500.0 is another run than 500
            self.need(rungs and str(some) == str(rungs), f"{place}: rungs must be some of {list(self.rungs)}, in "
                                                         f"order, not {rungs}")
            self.need(row.get("predicted", "better").partition(":")[0] in FORETOLD,
                      f"{place}: predicted begins with one of {', '.join(FORETOLD)}, and a colon")
            self.need(all(type(value) in (int, float) and abs(value) <= sys.float_info.max     # also none that is nan
                          for value in row.get("published", {}).values()),
                      f"{place}: published must be differences by their sources, not {row.get('published')}")
            changes, tune = self.check(row["set"], place), row.get("tune", {})
            for setting, values in tune.items():
                self.need(isinstance(values, list) and len(values) > 1,
                          f"{place}: tune: {setting} must be several values in brackets, not {values!r}")
                tune[setting] = [self.check({setting: value}, f"{place}: tune")[setting] for value in values]
            self.need(None in self.rungs or "max_steps" not in {*changes, *tune}, f"{place}: the rungs set max_steps")
            both = ", ".join(tune.keys() & set(self.scaled))
            self.need(not both, f"{place}: tune: {both} is tuned by its factors already")
            told = {key: row[key] for key in ("published", "predicted") if key in row}
            rows.append(Row(str(name), row.get("axis", ""), changes, row.get("against", BASELINE), None, rungs, tune,
                            told))
        against, count = {row.name: row.against for row in rows}, Counter(row.name for row in rows)
        for row in rows[1:]:
            self.need(count[row.name] == 1 and row.name != row.against and row.against in against,
                      f"row {row.name!r}: its name must be its own, and `against` another row's")
        for name in against:
            chain = [name]
            while against[chain[-1]] is not None and against[chain[-1]] not in chain:
                chain.append(against[chain[-1]])
            self.need(chain[-1] == BASELINE,
                      f"`against` goes in a circle: {' against '.join(map(str, [*chain, against[chain[-1]]]))}")
        return rows

    def check(self, values, place):
        """Settings of the yaml in the script's types; UserError with the place."""
        kept = {"seed", "out_dir", "run_name", "resume"} & values.keys()
        self.need(not kept, f"{place}: {', '.join(map(str, sorted(kept)))} cannot stand in a grid: it sets them itself")
        self.need("preset" not in values, f"{place}: preset can stand in base only")
        for before, name in zip([None, *values], values):
            example = f"{before or 'betas'}: [{as_typed(values.get(before, 0.9))}, {name}]"
            self.need(isinstance(name, str), f"{place}: {name!r} is no name of a setting: several values of one stand "
                                             f"in brackets, as {example}")
        with said_at(f"{self.path}: {place}"):
            return check_settings(self.script, values, self.specs)

    def check_cells(self):
        """UserError where the script would refuse a run, as far as its settings say, or never writes a number that the
        table needs. A script with functions `check` and `main` is imported for that, which runs nothing."""
        module, seen = None, set()
        if {"check", "main"} <= set(re.findall(r"^def (\w+)\(", self.script.read_text(), re.M)):
            for name in never_made(self.script, [self.metric, *self.show]):
                self.need(False, f"{self.script.name} writes no number {name!r} into its summary.json")
            spec = importlib.util.spec_from_file_location(f"of_grid_{self.script.stem}", self.script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        for place, seeds in (("seeds", self.seeds), ("tune: seed", [self.tune_seed])):
            for seed in seeds:
                with said_at(f"{self.path}: {place}"):
                    check_settings(self.script, dict.fromkeys(self.seeded, seed), self.specs)
        for long in self.rungs if None not in self.rungs else ():
            with said_at(f"{self.path}: rungs"):
                check_settings(self.script, {"max_steps": long}, self.specs)
        for row in self.rows:
            for factor, other in [*((factor, {}) for factor in self.factors), (self.factors[0], self.speed)]:
                values = self.settings(row, factor, self.seeds[0], **other)
                words = json.dumps(values, sort_keys=True)
                if words in seen:
                    continue
                seen.add(words)
                place = f"{self.path}: " + (f"row {row.name!r}" if row.name != BASELINE else "base")
                place += f" times {factor:g}" if factor != 1 and self.scaled else ""
                with said_at(place):
                    if values.get("max_steps", 0) is None:
                        raise UserError("max_steps none: a run of a grid must end")
                    values = check_settings(self.script, values, self.specs)
                    if module and factor == self.factors[0]:                 # a rate's bounds are the parser's
                        quiet = getattr(module, "debug_settings", {}) if values.get("debug") else {}
                        whole = Settings({name: spec.default for name, spec in self.specs.items()} | quiet | values)
                        vars(module).update(whole)
                        with contextlib.redirect_stdout(io.StringIO()):      # what it says, each run will say
                            module.check(whole)
                        whole.only = {name: spec.only for name, spec in self.specs.items()}
                        if row.changes and all(map(whole.idle, row.changes)):
                            name = next(iter(row.changes))
                            raise UserError(f"it changes nothing: {name} has no effect {whole.idle(name)}")

    def options(self, axis, given):
        """{option: {name: value}} of an axis of `cross`: a list of one setting's values, or options by name."""
        if isinstance(given, list):
            word, count = Counter(map(as_typed, given)).most_common(1)[0] if given else ("", 0)
            self.need(count < 2, f"cross: {axis} has {word} twice")
            given = {as_typed(value): {axis: value} for value in given}
        self.need(isinstance(given, dict) and given and all(isinstance(option, dict) for option in given.values()),
                  f"cross: {axis} must be a list of values, or options with what each sets")
        return {str(name): self.check(option, f"cross: {axis} {name}") for name, option in given.items()}

    def settings(self, row, factor, seed, **other):
        """{name: value} of a run of a row. other: settings that win over the row's."""
        settings = {**self.base, **row.changes, **dict.fromkeys(self.seeded, seed)}
        for name in self.scaled:
            self.need(type(settings[name]) in (int, float), f"row {row.name!r}: {name} is tuned and must be a number, "
                                                            f"not {as_typed(settings[name])}")
            settings[name] = float(f"{settings[name] * factor:.12g}")
        return settings | other

    def cell(self, row, factor, seed, word="", **other):
        """The Cell of a row. other: as of `settings`; word: what its name says about them."""
        words = json.dumps(self.settings(row, factor, seed, **other), sort_keys=True)
        key = hashlib.sha256(f"{self.script.name} {words}".encode()).hexdigest()[:10]
        if key not in self.names:                       # else another row, or this one under an older name, has it
            name = re.sub(r"[^A-Za-z0-9]+", "_", row.name).strip("_")[:60 if self.cross else 40] or "row"
            found = next(self.home.glob(f"*-{key}"), None)
            self.names[key] = found.name if found else f"{name}-x{factor:g}-s{seed}{word}-{key}"
        return Cell(row.name, seed, factor, words, self.names[key])

    def result(self, cell):
        """What the disk says about a cell."""
        if cell.run in self.known:
            return self.known[cell.run]
        summary = read_json(self.home / cell.run / "summary.json")
        value = summary.get(self.metric)
        if summary.get("status") != "done":
            failed = cell.run in self.failed
            return Result("failed", error=self.failed[cell.run]) if failed else Result("open")
        if "-speed-" not in cell.run and (type(value) not in (int, float) or not abs(value) <= sys.float_info.max):
            return Result("failed", error=f"its summary.json has no number {self.metric}")
        self.known[cell.run] = Result("done", value, step_times(self.home / cell.run / "metrics.jsonl"),
                                      summary.get("parameters"), summary.get("flops"),
                                      shown={name: summary.get(name) for name in self.show})
        return self.known[cell.run]

    def read_journal(self):
        """Which runs failed by themselves, from the lines that launches left; --retry forgets them."""
        self.failed, journal = {}, self.folder / "grid.jsonl"
        for line in journal.read_bytes().splitlines() if journal.exists() else ():
            try:
                entry = json.loads(line)
                run, code, error = str(entry["run"]), entry["code"], str(entry["error"])
            except (ValueError, LookupError, TypeError, RecursionError):
                continue                                                     # cut off by a kill
            self.failed.pop(run, None)
            if code not in (0, *KILLED):
                self.failed[run] = error

    def progress(self):
        """{row's name: Progress}, from what is on the disk."""
        found = {row.name: self.walk(row) for row in self.rows}
        whole = {name: bool(mine.values) and not mine.wanted for name, mine in found.items()}
        for row in self.rows[1:] if not self.cross else ():
            mine, other = found[row.name], found[row.against]
            if not (whole[BASELINE] and whole[row.name] and whole[row.against]):
                continue
            ratio = mine.step_seconds / other.step_seconds if mine.step_seconds and other.step_seconds else 1
            if abs(ratio - 1) > SLOWER:
                steps = row.changes.get("max_steps", self.base["max_steps"])
                mine.equal = self.equal_cell(row, mine, max(10, round(steps / ratio / 10) * 10))
                if self.result(mine.equal).state == "open":
                    mine.wanted.append(mine.equal)
        return found

    def equal_cell(self, row, mine, steps):
        """The run of equal seconds. One that is there already is kept if it is within 10 % of `steps`: timings waver,
        and every new run of the baseline would ask for others."""
        there = (re.search(r"-(\d+)steps-", path.name) for path in self.home.glob("*steps-*"))
        for known in sorted({int(found[1]) for found in there if found}, key=lambda n: abs(n - steps)):
            cell = self.cell(row, mine.factor, self.seeds[0], f"-{known}steps", **mine.chosen | {"max_steps": known})
            if abs(known - steps) <= 0.1 * steps and (self.home / cell.run).exists():
                return cell
        return self.cell(row, mine.factor, self.seeds[0], f"-{steps}steps", **mine.chosen | {"max_steps": steps})

    def walk(self, row):
        """Progress of a row by itself: its factors, its own `tune`, then the seeds of its rungs."""
        mine, factors = Progress(), list(self.factors)
        while True:
            tuning = [self.cell(row, factor, self.tune_seed) for factor in factors]
            best = self.best(mine, tuning)
            mine.tuned = {cell.factor: self.result(cell).value for cell in tuning if self.result(cell).state != "open"}
            if best is None:
                return mine
            mine.factor, ends = best.factor, (min(factors), max(factors))
            if best.factor not in ends or len(factors) - len(self.factors) == self.further:
                break
            first, second = sorted(factors, reverse=best.factor == ends[1])[:2]
            factors.append(float(f"{first * first / second:.12g}"))          # a step of the same size beyond the end
        for name, values in row.tune.items():
            cells = [self.cell(row, mine.factor, self.tune_seed, re.sub(r"[^\w.+-]+", "_", f"-{name}{value}")[:60],
                               **mine.chosen | {name: value}) for value in values]
            best = self.best(mine, cells)
            if best is None:
                return mine
            mine.chosen[name] = json.loads(best.settings)[name]
        mine.parameters = self.result(best).parameters
        for long in row.rungs:
            whole = row.name == BASELINE or self.cross or long
            for seed in self.seeds[:self.rungs[long] if whole else 2]:
                self.add_seed(row, mine, seed, **mine.chosen | ({"max_steps": long} if long else {}))
        timing = [self.cell(row, mine.factor, seed, "-speed", **mine.chosen | self.speed)
                  for seed in self.seeds[:2] if self.speed]
        timed = [self.result(cell) for cell in timing]
        mine.wanted += [cell for cell, result in zip(timing, timed) if result.state == "open"]
        means = [statistics.mean(result.times) for result in timed if result.times]
        mine.flops = next((result.flops for result in (self.result(best), *timed) if result.flops), None)
        mine.step_seconds = min(means) if means and len(means) == len(timing) else None
        return mine

    def best(self, mine, cells):
        """Of cells that try something the best; None where one is open, which mine.wanted gets, or all failed."""
        results = {cell: self.result(cell) for cell in cells}
        mine.wanted += [cell for cell, result in results.items() if result.state == "open"]
        done = [cell for cell, result in results.items() if result.state == "done"]
        if not mine.wanted and not done:
            mine.error = results[cells[0]].error
        return None if mine.wanted or not done else min(done, key=lambda cell: results[cell].value)

    def add_seed(self, row, mine, seed, **other):
        """The run of a seed: into mine.values where it is done, into mine.wanted where it is not."""
        cell = self.cell(row, mine.factor, seed, f"-{other['max_steps']}" if other.get("max_steps") else "", **other)
        result = self.result(cell)
        if result.state == "done":
            mine.cells.append(cell)
            mine.values.append(result.value)
        elif result.state == "open":
            mine.wanted.append(cell)
        else:
            mine.error = result.error

    def turn(self, cell):
        """What a cell waits for: a short rung comes before a longer one, in each (and in a cross) a whole table of the
        first seed before the second's, and what is tuned comes first, what is timed last."""
        if None in self.rungs and not self.cross:
            return 0
        if re.search(r"-(speed|\d+steps)-", cell.run):
            return 2, 0, 0
        rung = 0 if None in self.rungs else json.loads(cell.settings)["max_steps"]
        return (1, rung, self.seeds.index(cell.seed)) if cell.seed in self.seeds else (0, 0, 0)

    def words(self, cell):
        """The command of a cell, word by word; with --resume where something is there."""
        settings = {**json.loads(cell.settings), "out_dir": self.folder, "run_name": cell.run}
        words = [word for name, value in settings.items() for word in (f"--{name}", as_typed(value))]
        return [sys.executable, str(self.script), *words, *["--resume"] * (self.home / cell.run).exists()]

    def write_index(self, found):
        """out_dir/grid.json: what plot.py makes the table from."""
        def run(cell):
            result = self.result(cell)
            return {"run": cell.run, "seed": cell.seed, "value": result.value,
                    **({"shown": result.shown} if self.show else {}),
                    "max_steps": json.loads(cell.settings).get("max_steps")}
        rows = [{"name": row.name, "axis": row.axis, "set": row.changes, "against": row.against,
                 "factor": mine.factor, "tuned": list(mine.tuned.items()), **row.told,
                 **({"chosen": mine.chosen} if row.tune else {}), "runs": list(map(run, mine.cells)),
                 "step_seconds": mine.step_seconds, "parameters": mine.parameters, "flops": mine.flops,
                 "error": mine.error, "open": len(mine.wanted),
                 "equal_seconds": run(mine.equal) if mine.equal and self.result(mine.equal).state == "done" else None,
                 **({"at": row.at} if self.cross else {})}
                for row in self.rows for mine in [found[row.name]]]
        write_json(self.folder / "grid.json", {
            "grid": self.path.name, "script": self.script.name, "metric": self.metric, "base": self.base,
            "seeds": self.seeds, "tuned_settings": self.scaled, "factors": self.factors, "slower": SLOWER,
            **self.judging, **({} if None in self.rungs else {"rungs": list(self.rungs)}),
            **({"cross": self.cross} if self.cross else {}), "rows": rows})


def read_yaml(path):
    """What a yaml file holds. UserError: not there, no yaml, a key twice, a name that yaml reads as something else, an
    alias within itself, too deep, too large."""
    import yaml
    try:
        if path.is_char_device():
            raise UserError(f"{path} is a device, no yaml")  # it may have no end
        text = path.read_bytes()
        left, count, made = [(yaml.compose(text, yaml.SafeLoader), ())], 0, yaml.SafeLoader("").construct_object
        while left:
            node, above = left.pop()
            inside, count, names = (*above, node), count + 1, set()
            if node in above:
                raise UserError(f"{path} is no yaml: line {node.start_mark.line + 1}: an alias within itself")
            if len(above) > 50 or count > LARGEST:
                raise UserError(f"{path} is no grid: " + ("it is nested too deeply" if len(above) > 50 else
                                                          f"it has more than {LARGEST:,} values"))
            if isinstance(node, yaml.SequenceNode):
                left += [(item, inside) for item in node.value]
            for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
                left.append((value, inside))
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    name, line = str(made(key)), f"{path}: line {key.start_mark.line + 1}:"
                    if name != key.value:
                        raise UserError(f"{line} yaml reads the name {key.value} as {name}: write it in quotes")
                    if name in names:
                        raise UserError(f"{line} {name} is there twice")
                    names.add(name)
        return yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is no grid: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:             # also dates that there are not
        raise UserError(f"{path} is no yaml: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def said_at(place):
    """A UserError of the block begins with the place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def never_made(script, names):
    """Of `names` those that cannot be made of the texts in a script or in the modules beside it that it imports.

    By their sources alone: a text or a keyword that stands there, or an f-string whose gaps are such texts or numbers.
    So a name that is misspelt is found before the first run, though no source lists what a summary.json has.
    """
    words, patterns, left, read = set(), set(), [script], set()

    def made(name):
        found = (re.fullmatch(pattern, name) for pattern in patterns)
        return name in words or name.isdecimal() or any(all(map(made, match.groups())) for match in found if match)

    while left and names:
        path = left.pop(0)
        if path in read or not path.is_file():
            continue
        read.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.update(node.value.split())             # a text may list several
            elif isinstance(node, ast.keyword) and node.arg:
                words.add(node.arg)
            elif isinstance(node, ast.JoinedStr):
                fixed = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if None in fixed and re.fullmatch(r"\w*_\w*", "".join(filter(None, fixed))):
                    patterns.add("".join("(.+)" if part is None else part for part in fixed))
            elif isinstance(node, ast.Import):
                left += [script.parent / f"{alias.name}.py" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                place = script.parent / node.module.replace(".", "/")
                left += [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
        names = [name for name in names if not made(name)]
    return names


def step_times(path):
    """Seconds per optimiser step in each stretch between two training lines of a metrics.jsonl; [] where none is."""
    lines = read_metrics(path) if path.exists() else []
    lines = [entry for entry in lines if entry["split"] == "train" and entry.get("seconds")]
    return [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(lines, lines[1:])
            if b["step"] > a["step"]]


def check_shape(value, shape, needed, place):
    """UserError where `value` is not a mapping of these keys to these types."""
    if not isinstance(value, dict):
        raise UserError(f"{place} must be a mapping, not {type(value).__name__}")
    for key, item in value.items():
        if key not in shape:
            raise UserError(f"{place}: unknown key {key!r}; there are {', '.join(shape)}")
        if not isinstance(item, shape[key]) or isinstance(item, bool) and shape[key] is not bool:
            kind = shape[key][0] if isinstance(shape[key], tuple) else shape[key]
            raise UserError(f"{place}: {key} must be a {kind.__name__}, not {item!r}")
    if missing := [key for key in shape if key in needed and key not in value]:
        raise UserError(f"{place}: {', '.join(missing)} is missing")


def claim(folder, cell):
    """An open, locked file that says that this process runs the cell; None where another one does.

    The run inherits it: should grid.py be killed, the cell stays claimed for as long as its run lives.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = open(folder / "logs" / f"{cell.run}.lock", "w")
    try:
        lock_file(file)
        return file
    except OSError:
        file.close()
        return None


def show(plan, found):
    """One line per row."""
    for row in plan.rows:
        mine = found[row.name]
        tuned = ", ".join(f"x{factor:g} {'failed' if value is None else f'{value:.4f}'}"
                          for factor, value in mine.tuned.items())
        seeds = ", ".join(f"{value:.4f}" for value in mine.values)
        trouble = f" | {mine.error}" if mine.error else ""
        say(f"{row.name:<34} {len(mine.wanted)} to run | {tuned} | seeds {seeds}{trouble}")


@command
def main():
    if sys.argv[1:2] == ["restore"]:
        if len(sys.argv) != 4:
            raise UserError("restore what, and where? python grid.py restore runs/one_change.jsonl runs/one_change")
        return say(f"restored {archive.restore(Path(sys.argv[2]), Path(sys.argv[3]))} runs: the grid goes on from them")
    if sys.argv[1:2] == ["archive"]:
        if len(sys.argv) != 3 or not Path(sys.argv[2]).is_dir():
            raise UserError("archive which folder of runs? python grid.py archive runs/one_change")
        path, count = archive.write(Path(sys.argv[2]))
        return say(f"wrote {path}: {count} runs, {path.stat().st_size / 1e6:.2f} MB")
    settings = override(globals(), positional="grid")
    if grid is None:
        raise UserError("which grid? python grid.py grids/one_change.yaml")
    if print or status:
        settings.refuse_idle(("jobs", "threads", "checkpoints", *("print",) * status),
                             f"with --{'status' if status else 'print'}, which runs nothing")
    plan = Grid(grid)
    plan.read_journal()
    if retry:
        plan.failed.clear()
    found = plan.progress()
    if status:
        return show(plan, found)
    if print:
        for cell in {cell.run: cell for mine in found.values() for cell in mine.wanted}.values():
            say(shlex.join(plan.words(cell)))
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    running = {}
    try:
        work_off(plan, found, running)
    finally:
        for child in running:                                # an error came: nothing goes on behind a person's back
            child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()


def work_off(plan, found, running):
    """Runs what the Grid wants until nothing is left. found: its progress; running: {child: (cell, its claim)}."""
    given_up, stop, told = set(), [], Counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    began, finished = time.monotonic(), 0
    while True:
        for child in running:                                # here, as a signal may come while one is being started
            if told[child] < len(stop):
                child.send_signal(signal.SIGTERM)                            # it saves; a second one ends it at once
                told[child] += 1
        # ---- what has ended ----
        ended = [child for child in running if child.poll() is not None]
        for child in ended:
            cell, held = running.pop(child)
            what = record(plan, cell, child.returncode, given_up)
            held.close()
            finished += 1
            say(f"{finished:>4} runs, {(time.monotonic() - began) / 60:.1f} min: {cell.run.rpartition('-')[0]}: {what}",
                flush=True)
        if ended or not running:
            found = plan.progress()
            plan.write_index(found)
        # ---- what can start ----
        todo = dict.fromkeys(cell for mine in found.values() for cell in mine.wanted if cell.run not in given_up)
        todo = dict.fromkeys(sorted(todo, key=plan.turn))
        taken, waiting = {cell.run for cell, _ in running.values()}, False
        for cell in todo:
            if len(running) >= jobs or stop:
                break
            if cell.run in taken:
                continue
            held = claim(plan.folder, cell)
            if held is None:
                waiting = True                                               # another grid.py has it
            elif plan.result(cell).state == "done":                          # it had, after `found` was
                held.close()
                waiting = True
            else:
                running[start(plan, cell, held)] = cell, held
                taken.add(cell.run)
        if not running and (stop or not waiting and not any(plan.result(cell).state == "open" for cell in todo)):
            break
        time.sleep(0.2 if running else 2)
    if stop:
        say("stopped: the same command goes on")
        sys.exit(128 + stop[0])
    tell_the_end(plan, found, given_up)


def start(plan, cell, held):
    """A process that runs a cell, and keeps its claim `held` for as long as it lives."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with open(plan.folder / "logs" / f"{cell.run}.log", "ab") as log:
        return subprocess.Popen(plan.words(cell), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                pass_fds=[held.fileno()], start_new_session=True)


def record(plan, cell, code, given_up):
    """Writes down how the run of a cell has ended, and says it in words; given_up: runs that this command leaves."""
    log = (plan.folder / "logs" / f"{cell.run}.log").read_text(errors="replace").strip() if code else ""
    error = log.splitlines()[-1][:200] if log else "no output" * (code != 0)
    with open(plan.folder / "grid.jsonl", "ab", buffering=0) as journal:
        entry = {"run": cell.run, "row": cell.row, "code": code, "error": error, "time": time.time()}
        journal.write((json.dumps(entry) + "\n").encode())
    if code:
        given_up.add(cell.run)
        if code not in KILLED:
            plan.failed[cell.run] = error
    result = plan.result(cell)
    if result.state != "done":
        return f"exit {code}: {error or result.error}"
    if not checkpoints:
        for path in (plan.home / cell.run).glob("*.pt"):
            path.unlink()
    return "timed" if result.value is None else f"{result.value:.4f}"


def tell_the_end(plan, found, given_up):
    """The last line of a grid that nothing stopped; UserError, with all of them, where some have failed."""
    say(f"done: {sum(len(mine.values) > 0 for mine in found.values())} of {len(plan.rows)} rows; "
        f"{plan.folder / 'grid.json'}")
    troubles = {name: mine.error for name, mine in found.items() if mine.error}
    if troubles or given_up:
        broken = troubles or {run: error for run, error in plan.failed.items() if run in given_up}
        told = "; ".join(f"{name}: {error}" for name, error in broken.items()) or ", ".join(given_up)
        raise UserError(f"{max(len(given_up), len(troubles))} failed (--retry runs them again): {told}")


if __name__ == "__main__":
    main()
