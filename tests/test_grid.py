"""grid.py: what it runs, once, in which order; kills, failures, changed files; and plot.py's table of it.

Most grids here run a script of a few lines that makes up its figures, in processes of their own as always.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
import grid as grid_module
import plot
from forks import wait_for
from nanolab import run as experiment
from nanolab.run import UserError
from test_experiment import fork, status_of
from test_scripts import fresh

FAKE = '''"""A script that makes up its figures."""
import json, os, signal, sys, time

out_dir = "runs"      # where
run_name = None       # name
resume = False        # [path] go on
seed = 0              # of the figure's noise
data_seed = 0         # of nothing
lr = 1.0              # [> 0.0] best at 1
max_steps = 100       # [>= 1] steps
kind = "plain"        # [plain, better, worse, doubtful, slow, sleepy, broken, silent] what the change does

given = dict(zip((w[2:] for w in sys.argv[1::2]), sys.argv[2::2]))
again = "--resume" in sys.argv
home = os.path.join(given["out_dir"], "fake", given["run_name"])
os.makedirs(home, exist_ok=True)
with open(os.path.join(given["out_dir"], "calls"), "a") as calls:
    calls.write(given["run_name"] + (" again" if again else "") + "\\n")
kind, seed, lr, steps = given.get("kind", "plain"), int(given["seed"]), float(given["lr"]), int(given["max_steps"])
if kind == "broken":
    print("error: it cannot work", file=sys.stderr)
    sys.exit(2)
if kind == "sleepy":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    time.sleep(float(open(os.path.join(given["out_dir"], "nap")).read()))
value = 2 + 0.1 * (lr - 1) ** 2 + 0.01 * [0, 1, -1, 2, -2][seed - 1] - 0.001 * (steps - 100)
value += {"better": -0.5, "worse": 0.5}.get(kind, 0) + (0.06 * (seed == 2) if kind == "doubtful" else 0)
pace = 0.2 if kind == "slow" else 0.1
with open(os.path.join(home, "metrics.jsonl"), "w") as file:
    for step in range(10, 60, 10):
        file.write(json.dumps({"step": step, "split": "train", "loss": value, "seconds": pace * step}) + "\\n")
json.dump({"settings": {**given}}, open(os.path.join(home, "params.json"), "w"))
summary = {"status": "done", "step": steps, "seconds": pace * steps, "parameters": 1000}
if kind != "silent":
    summary["figure"] = value
json.dump(summary, open(os.path.join(home, "summary.json"), "w"))
open(os.path.join(home, "last.pt"), "w").close()
'''
PLAN = """
script: {script}
out_dir: {out}
metric: figure
base: {{lr: 1.0, max_steps: 100}}
seeds: [1, 2, 3, 4, 5]
tune: {{settings: [lr], factors: [0.5, 1, 2]}}
speed: {{max_steps: 60}}
rows:
"""


@pytest.fixture
def plan(tmp_path):
    """A function that writes a yaml with these rows, and returns its path."""
    (tmp_path / "fake.py").write_text(FAKE)

    def write(*rows, **changes):
        text = PLAN.format(script=tmp_path / "fake.py", out=tmp_path / "out") + "".join(f"  {row}\n" for row in rows)
        for old, new in changes.get("replace", ()):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "plan.yaml").write_text(text)
        (tmp_path / "out").mkdir(exist_ok=True)
        return tmp_path / "plan.yaml"
    return write


class Command:
    """grid.py with these words in a fork of this process, whose imports are done, and in a session of its own."""

    def __init__(self, path, *words):
        self.file, self.words = path.with_name(f"said_{len(list(path.parent.iterdir()))}"), [str(path), *words]
        self.pid = fork(self.main, self.file)

    def main(self):
        os.setsid()
        sys.argv, sleep = ["grid.py", *self.words], time.sleep
        time.sleep = lambda seconds: sleep(seconds / 10)     # between two looks at what runs
        grid_module.main()

    def wait(self):
        wait_for(lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), every=0.02)
        self.code = status_of(self.pid)
        self.out, self.err = (Path(f"{self.file}{end}").read_text() for end in ("", ".err"))
        return self


def run(path, *words, code=0):
    """grid.py to its end, with this exit status."""
    child = Command(path, *words).wait()
    assert child.code == code, child.err
    return child


def calls(path):
    file = path.parent / "out" / "calls"
    return file.read_text().splitlines() if file.exists() else []


def index_of(path):
    return json.loads((path.parent / "out" / "grid.json").read_text())


def test_a_whole_grid(plan):
    """Rates are tuned, seeds follow, a slow row gets its run of equal seconds; nothing twice; what fails does not stop
    the rest, is told, and is tried again only when asked."""
    path = plan("better: {axis: a, set: {kind: better}}", "broken: {axis: b, set: {kind: broken}}",
                "same as the base: {axis: a, set: {lr: 1.0}}", "doubtful: {axis: a, set: {kind: doubtful}}",
                "slow: {axis: a, set: {kind: slow}}", "slow again: {set: {kind: slow}, against: slow}",
                "without a figure: {set: {kind: silent}}")
    first = run(path, code=2)
    assert "error:" in first.err.splitlines()[-1] and "Traceback" not in first.err
    assert "broken: error: it cannot work" in first.err and "no number figure" in first.err
    done = calls(path)
    assert len(done) == len(set(done)), "a run was started twice"
    index = index_of(path)
    rows = {row["name"]: row for row in index["rows"]}
    assert [run["seed"] for run in rows["baseline"]["runs"]] == [1, 2, 3, 4, 5] and rows["baseline"]["factor"] == 1
    assert [value for _, value in rows["baseline"]["tuned"]] == pytest.approx([2.025, 2.0, 2.1])
    assert [run["seed"] for run in rows["better"]["runs"]] == [1, 2]
    assert [run["seed"] for run in rows["doubtful"]["runs"]] == [1, 2]
    assert rows["slow"]["equal_seconds"]["max_steps"] == 50 and rows["better"]["equal_seconds"] is None
    assert rows["slow again"]["equal_seconds"] is None                # no slower than what it is compared with
    assert rows["broken"]["runs"] == [] and "cannot work" in rows["broken"]["error"]
    # 3 + 4 for the baseline, 4 better, 3 broken, 4 doubtful, 5 slow, 3 without a figure; none for the two twins; and
    # two timing runs for each that works
    assert len(done) == 7 + 4 + 3 + 4 + 5 + 3 + 2 * 4
    kept = {file.parent.name.split("-")[0] for file in (path.parent / "out").rglob("*.pt")}
    settings = json.loads(next((path.parent / "out" / "fake").glob("better-*/params.json")).read_text())["settings"]
    assert "seed" in settings and "data_seed" not in settings, "without `seeded` the seed alone is set"
    assert kept == {"without_a_figure"}, "runs whose figure is known keep no checkpoints, the others do"

    table = plot.markdown(index)
    line = {row: next(text for text in table if f"| {row} " in text) for row in
            ("better", "same as the base", "doubtful", "slow", "broken")}
    assert "-0.5000" in line["better"] and "**better**" in line["better"]
    assert "undecided" in line["same as the base"]
    assert "+0.0300" in line["doubtful"] and "undecided" in line["doubtful"] and "| 2 |" in line["doubtful"]
    assert "| 2.00 | +0.0575 ± " in line["slow"]
    assert "it cannot work" in line["broken"]

    run(path, code=2)
    assert calls(path) == done, "a second command ran something again"
    run(path, "--retry", code=2)
    assert len(calls(path)) == len(done) + 3                          # the broken row's rates
    assert "(against slow)" in next(text for text in table if "slow again" in text)


def test_what_a_table_shows_beside(plan):
    path = plan("better: {set: {kind: better}}", replace=[
        ("seeds: [1, 2, 3, 4, 5]", "seeds: [1, 2]\nshow: [step, lost]"), ("[0.5, 1, 2]", "[1]"),
        ("speed: {max_steps: 60}", "speed: none\nsigma_data: 0.5\nlog: true")])
    run(path)
    index = index_of(path)
    assert index["sigma_data"] == 0.5 and index["log"] is True
    assert all(entry["shown"] == {"step": 100, "lost": None} for row in index["rows"] for entry in row["runs"])


def test_rungs(plan):
    """Every row at each of its lengths, the short first, in each all of a seed before the next; the rate on a seed that
    counts nowhere, and further down until the best is inside; a row's own tune; what was foretold is in the index."""
    path = plan("better: {set: {lr: 4.0}, tune: {kind: [worse, better]}, predicted: 'better: as it is told'}",
                "long: {set: {kind: worse}, rungs: [50, 100, 200], published: {Narang: 0.1}}", replace=[
        ("seeds: [1, 2, 3, 4, 5]", "seeds: [1, 2, 3]\nrungs: {50: 3, 100: 2, 200: 2}\nprimary: 100\nsame: 0.02"),
        (", max_steps: 100}", "}"),
        ("factors: [0.5, 1, 2]}", "factors: [0.5, 1, 2], seed: 0, further: 1}"),
        ("speed: {max_steps: 60}", "speed: none")])
    run(path, "--jobs", "1")
    index = index_of(path)
    rows, done = {row["name"]: row for row in index["rows"]}, calls(path)
    assert [factor for factor, _ in rows["baseline"]["tuned"]] == [0.5, 1, 2] and rows["baseline"]["factor"] == 1
    assert [factor for factor, _ in rows["better"]["tuned"]] == [0.5, 1, 2, 0.25] and rows["better"]["factor"] == 0.25
    assert rows["better"]["chosen"] == {"kind": "better"} and rows["better"]["predicted"] == "better: as it is told"
    lengths = {name: [(run["max_steps"], run["seed"]) for run in row["runs"]] for name, row in rows.items()}
    upto = [(50, 1), (50, 2), (50, 3), (100, 1), (100, 2)]
    assert lengths == {"baseline": [*upto, (200, 1), (200, 2)], "better": upto, "long": [*upto, (200, 1), (200, 2)]}
    assert index["rungs"] == [50, 100, 200] and index["primary"] == 100 and index["same"] == 0.02
    steps = {run["run"]: run["max_steps"] for row in index["rows"] for run in row["runs"]}
    turns = [(steps.get(name, 0), int(name.split("-s")[1][0])) for name in done]
    assert turns == sorted(turns) and len(done) == len(set(done)) == 10 + 9 + 9    # what two rows want runs once
    table = plot.markdown(index)
    line = next(text for text in table if "| better " in text)
    assert "**better**" in line and "| holds |" in line and "3 + 2" in line and "x0.25*" in line
    assert "Predicted beforehand: 1 of 1 verdicts." in table and "Narang: the sign of 1 of 1 rows." in table


def test_what_runs_are_called_and_when_they_start(plan, tmp_path):
    """A row's name makes no timing run of it; a tuned path is no folder; a figure that is no number is none."""
    (tmp_path / "fake.py").write_text(FAKE.replace("max_steps = 100 ", "data = None   # [path]\nmax_steps = 100 "))
    path = plan("8 steps: {set: {kind: better}, tune: {data: [a/b, c/d]}, rungs: [50, 100]}", replace=[
        ("seeds: [1, 2, 3, 4, 5]", "seeds: [1, 2, 3]\nrungs: {50: 3, 100: 2}\nprimary: 50"), ("[0.5, 1, 2]", "[1]"),
        (", max_steps: 100}", "}")])
    found = grid_module.Grid(path)
    row = found.rows[1]
    assert [found.turn(found.cell(row, 1, seed)) for seed in (1, 3)] == [(1, 50, 0), (1, 50, 2)]
    assert [found.turn(found.cell(row, 1, 1, word, max_steps=n)) for word, n in (("-speed", 60), ("-70steps", 70))] == [
        (2, 0, 0)] * 2
    cell, = found.walk(row).wanted
    home = tmp_path / "out" / "fake" / cell.run
    home.mkdir(parents=True)
    for value in ("NaN", "true", "-Infinity", '"2"'):
        (home / "summary.json").write_text(f'{{"status": "done", "figure": {value}}}')
        assert found.result(cell).state == "failed" and "no number figure" in found.walk(row).error
    (home / "summary.json").write_text('{"status": "done", "figure": 2}')
    assert [cell.run.rpartition("-")[0] for cell in found.walk(row).wanted] == [
        "8_steps-x1-s1-dataa_b", "8_steps-x1-s1-datac_d"]


def test_a_changed_yaml_runs_only_what_is_new(plan):
    path = plan("one: {set: {kind: better}}", "two: {set: {kind: worse}}")
    run(path)
    before = calls(path)
    plan("another name: {set: {kind: better}}", "two: {set: {kind: worse, max_steps: 90}}")
    run(path)
    new = calls(path)[len(before):]
    assert len(new) == 4 and all(name.startswith("two-") for name in new)
    index = index_of(path)
    assert [run["value"] for run in index["rows"][1]["runs"]] == pytest.approx([1.5, 1.51])
    assert len(list((path.parent / "out" / "fake").iterdir())) == len(before) + 4     # the old ones stay


def test_a_run_of_equal_seconds_is_kept_when_timings_waver(plan):
    path = plan("slow: {set: {kind: slow}}", replace=[("max_steps: 100", "max_steps: 1000")])
    run(path)
    done = calls(path)
    assert len([name for name in done if "-500steps-" in name]) == 1
    for factor, new in ((1.04, 0), (1.3, 1)):             # the baseline seems slower: 520 steps, then 680
        for file in (path.parent / "out" / "fake").glob("baseline-*/metrics.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps({**line, "seconds": line["seconds"] * factor}) + "\n" for line in lines))
        run(path)
        assert len(calls(path)) == len(done) + new


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_grid_that_is_stopped_goes_on(plan, number):
    """SIGKILL leaves its runs behind, and the next command waits for them; SIGTERM and Ctrl-C stop them to resume."""
    path = plan("sleepy: {set: {kind: sleepy}}", replace=[("[0.5, 1, 2]", "[1]"), ("4, 5]", "4]")])
    nap = path.parent / "out" / "nap"
    nap.write_text("1" if number == signal.SIGKILL else "60")
    child = Command(path, "--jobs", "1")
    wait_for(lambda: any(name.startswith("sleepy") for name in calls(path)), every=0.02)
    done = calls(path)
    os.kill(child.pid, number)
    assert child.wait().code == (-number if number == signal.SIGKILL else 128 + number)
    status = run(path, "--status").out.splitlines()
    assert status[0].startswith("baseline") and "to run" in status[1] and calls(path) == done
    nap.write_text("0")
    run(path, "--jobs", "1")
    started = calls(path)
    if number == signal.SIGKILL:
        assert len(started) == len({name.split()[0] for name in started}), "the orphan's run was started twice"
    else:
        assert [name for name in started if " again" in name] == [done[-1] + " again"]
    assert [len(row["runs"]) for row in index_of(path)["rows"]] == [4, 2] and run(path, "--print").out == ""


def test_two_grids_share_a_folder(plan):
    path = plan("sleepy: {set: {kind: sleepy}}", "worse: {set: {kind: worse}}")
    (path.parent / "out" / "nap").write_text("0.5")
    for child in [Command(path, "--jobs", "1") for _ in range(2)]:
        assert child.wait().code == 0, child.err
    assert len(calls(path)) == len(set(calls(path))) == 7 + 4 + 4 + 2 * 3


def test_what_another_grid_ends_between_two_looks_counts(plan, in_process, monkeypatch):
    path = plan("better: {set: {kind: better}}", replace=[
        ("[0.5, 1, 2]", "[1]"), ("4, 5]", "4]"), ("{max_steps: 60}", "none")])
    whole, other = grid_module.claim, grid_module.Grid(path)

    def claim(folder, cell):
        subprocess.run(other.words(cell), check=True)
        return whole(folder, cell)
    (path.parent / "out" / "logs").mkdir()
    monkeypatch.setattr(grid_module, "claim", claim)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert in_process(grid_module, path)[0] == 0
    assert [len(row["runs"]) for row in index_of(path)["rows"]] == [4, 2]


def test_print_lists_what_could_start_and_starts_nothing(plan):
    path = plan("better: {set: {kind: better}}")
    lines = run(path, "--print").out.splitlines()
    assert len(lines) == 6 and not calls(path)
    assert all("--lr" in line and "--run_name" in line and "fake.py" in line for line in lines)
    assert run(path, "--status").out.startswith("baseline") and not calls(path)
    for line in lines:                                    # a scheduler of one's own
        subprocess.run(line, shell=True, check=True)
    assert len(run(path, "--print").out.splitlines()) == 4 + 1 + 4    # the baseline's seeds, the row's second, timing


CROSS = """
script: {script}
out_dir: {out}
metric: figure
show: [step]
base: {{max_steps: 100}}
seeds: [1, 2]
seeded: [seed, data_seed]
cross:
  lr: [0.5, 1, 2]
  way: {{plain: {{}}, much better: {{kind: better, max_steps: 120}}}}
"""


@pytest.fixture
def crossed(plan, tmp_path):
    """A function that writes the grid CROSS, with replacements, and returns its path."""
    path = plan()

    def write(*replace):
        text = CROSS.format(script=tmp_path / "fake.py", out=tmp_path / "out")
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return path
    return write


def test_a_cross_runs_every_combination_with_every_seed(crossed):
    path = crossed()
    assert len(run(path, "--print").out.splitlines()) == 6            # the first seeds; the others follow
    run(path)
    done = calls(path)
    assert len(done) == len(set(done)) == 3 * 2 * 2
    index = index_of(path)
    assert index["cross"] == {"lr": {"0.5": {"lr": 0.5}, "1": {"lr": 1.0}, "2": {"lr": 2.0}},
                              "way": {"plain": {}, "much better": {"kind": "better", "max_steps": 120}}}
    assert [row["at"] for row in index["rows"]] == [{"lr": lr, "way": way} for lr in ("0.5", "1", "2")
                                                    for way in ("plain", "much better")]
    for row in index["rows"]:
        lr, better = float(row["at"]["lr"]), row["at"]["way"] == "much better"
        assert row["name"] == f"lr {row['at']['lr']}, way {row['at']['way']}" and row["open"] == 0
        assert row["set"] == {"lr": lr, **({"kind": "better", "max_steps": 120} if better else {})}
        expected = 2 + 0.1 * (lr - 1) ** 2 - (0.52 if better else 0)
        assert [entry["value"] for entry in row["runs"]] == pytest.approx([expected + 0.01 * noise for noise in (0, 1)])
        assert [(entry["seed"], entry["shown"]) for entry in row["runs"]] == [
            (seed, {"step": 120 if better else 100}) for seed in (1, 2)]
        for entry in row["runs"]:
            typed = json.loads((path.parent / "out" / "fake" / entry["run"] / "params.json").read_text())["settings"]
            assert typed["seed"] == typed["data_seed"] == str(entry["seed"]) and float(typed["lr"]) == lr
            assert typed.get("kind", "plain") == ("better" if better else "plain")
    run(path)
    assert calls(path) == done
    crossed(("[0.5, 1, 2]", "[0.5, 1, 4]"))
    run(path)
    new = calls(path)[len(done):]
    assert len(new) == 4 and all(name.startswith("lr_4_") for name in new)


HUGE, DEEP, RUNGS = "1" + "0" * 23, "base: {lr: 1.0 -> base: {lr: ", "+rungs: {50: 2}"
MISTAKES = {  # {a mistake's line: what makes it}: OLD -> NEW, +A KEY MORE, &MORE OF THE ROW
    "no setting 'knd'; did you mean kind": "kind: better -> knd: better",
    "did you mean better": "kind: better -> kind: bettr", "base: max_steps 0": "max_steps: 100 -> max_steps: 0",
    "seed cannot stand in a grid": "kind: better -> seed: 3", "unknown key 'columns'": "rows: -> columns:",
    "metric is missing": "metric: figure\n -> ", "seeds: seed 1000": f"[1, 2, 3, 4, 5] -> [1, {HUGE}]",
    "seeds must be at least 2 different": ["[1, 2, 3, 4, 5] -> [1]", "[1, 2, 3, 4, 5] -> [[1], [2]]"],
    "factors must be numbers": [f"[0.5, 1, 2] -> [0.5, {word}]" for word in ("no", ".inf", ".nan", "1" + "0" * 400)],
    "tune: settings must be names": ["settings: [lr] -> settings: [[lr]]", "settings: [lr] -> settings: [lr, lr]"],
    "times 1e+308: lr": "[0.5, 1, 2] -> [1, 1.0e+308]",
    "tune: seed: seed 1000": f"factors: -> seed: {HUGE}, factors:",
    "seed 3 is one of the seeds": "factors: -> seed: 3, factors:",
    "beyond several in order": "factors: [0.5, 1, 2] -> further: 2, factors: [1]",
    "another row's": "&against: nobody", "must be a mapping": "{set: {kind: better}} -> [1]",
    "`against` goes in a circle: better against b against better": "{set: {kind: better}} -> {set: {kind: better}, "
                                                                   "against: b}\n  b: {set: {lr: 2}, against: better}",
    "speed must be a dict": "speed: { -> speed: 3 #{",
    "speed must be settings, or none": "speed: {max_steps: 60} -> speed: sometimes",
    "better is there twice": "rows: -> rows:\n  better: {set: {}}", "no script": "fake.py -> nowhere.py",
    "yaml reads the name no as False: write it in quotes": "better: -> no:",
    "is no yaml": ["rows: -> rows: [", "better: -> [1, 2]:", "better: -> ? {a: 1}\n  :", "base: { -> base: &a {x: *a, ",
                   "base: { -> base: &a {x: [*a], ", "script:  -> show: 2000-02-31\nscript: "],
    "nested too deeply": [DEEP + "[" * n + "]" * n for n in (70, 400)],
    "values": DEEP + "[&a [1, 1], &b [" + "*a, " * 400 + "1], " + "*b, " * 400 + "1]",
    "show must be names": "+show: [[1]]", "no name of a folder": 'out_dir:  -> out_dir: "a\\0" #',
    "base: preset cpu: must be one of none: fake.py has no presets": "base: { -> base: {preset: cpu, ",
    "same must be a number from 0 on": "+same: -1.0",
    "rungs must be values of max_steps in order": "+rungs: {100: 2, 50: 2}",
    "each with how many of the 5 seeds": "+rungs: {50: 9}", "base: the rungs set max_steps": RUNGS,
    "primary must be one of the rungs [50]": RUNGS + "\nprimary: 60",
    "the rungs set max_steps": [(RUNGS, "kind: better -> max_steps: 9")],
    "rungs must be some of [50]": [(RUNGS, f"&rungs: {some}") for some in ("[[50]]", "[50, 50]", "[50.0]")],
    "rungs must be some of": "&rungs: [7]", "lr must be several values in brackets": "&tune: {lr: 3}",
    "lr x: must be a number": "&tune: {lr: [1, x]}", "predicted begins with one of better": "&predicted: perhaps",
    "lr is tuned by its factors already": "&tune: {lr: [1, 2]}",
    "data_seed is set by the seeds": [("+seeded: [seed, data_seed]", "&tune: {data_seed: [8, 9]}")],
    "differences by their sources": [f"&published: {{Narang: {word}}}" for word in ("no", ".nan", "-.inf")],
}
CROSSED = {
    "no setting 'lrr'; did you mean lr": "  lr: ->   lrr:", "cross: lr 0": "[0.5, 1, 2] -> [0.5, 1, 0]",
    "cross: way much better: fake.py has no setting 'knd'; did you mean kind": "kind: better -> knd: better",
    "cross: lr false: lr false: must be a number": "[0.5, 1, 2] -> [0.5, 1, no]",
    "cross: lr must be a list of values, or options": [f"[0.5, 1, 2] -> {word}" for word in ("3", "[]", "{a: 3}")],
    "cross: lr has 1 twice": "[0.5, 1, 2] -> [0.5, 1, 1]",
    "cross: lr is set by several axes": "kind: better -> lr: 3",
    "run_name cannot stand in a grid": "kind: better -> run_name: x",
    "either rows or cross": "+rows: {one: {set: {lr: 2.0}}}",
    "tune goes with rows, not with cross": "+tune: {settings: [], factors: [1]}",
    "seeded: fake.py has no setting 'dta_seed'": "seeded: [seed, data_seed] -> seeded: [seed, dta_seed]",
    "seeded must be a list": "seeded: [seed, data_seed] -> seeded: data_seed",
    "seeded must be names of settings": "seeded: [seed, data_seed] -> seeded: [[1]]",
    "cross must be a dict, not [1]": "cross: -> cross: [1]\nspeed:",
}
REAL = {  # of train_enwik8.py itself, which knows what it will refuse
    "row 'better': mixer has 'fulll'": "kind: better -> mixer: fulll", "row 'better': ": "kind: better -> n_head: 3",
    "qk_norm": "kind: better -> mixer: mla, qk_norm: true",
    "a run of a grid must end": "kind: better -> max_steps: none",
    "preset can stand in base only": "kind: better -> preset: cpu",
    "stand in brackets, as betas: [0.8, 0.95]": "kind: better -> betas: 0.8, 0.95",
    "writes no number 'val_bbp_raw'": "val_bpb_raw -> val_bbp_raw",
    "preset cpuu: must be one of cpu, ": "preset: cpu -> preset: cpuu",
    "preset 1: must be one of cpu, ": "preset: cpu -> preset: [1]",
}
REALLY = ("metric: figure -> metric: val_bpb_raw", "[1, 2, 3, 4, 5] -> [1, 2]",
          "lr: 1.0, max_steps: 100 -> preset: cpu", "tune: {settings: [lr], factors: [0.5, 1, 2]} -> ",
          "speed: {max_steps: 60} -> ")


@pytest.mark.parametrize("table", [MISTAKES, CROSSED, REAL], ids=["rows", "cross", "of a script"])
def test_mistakes_in_the_yaml_are_one_line(plan, crossed, monkeypatch, tmp_path, table):
    monkeypatch.setattr(grid_module, "LARGEST", 3000)
    for said, made_by in table.items():
        for words in [made_by] if isinstance(made_by, str) else made_by:
            path = crossed() if table is CROSSED else plan("better: {set: {kind: better}}")
            text = path.read_text().replace(str(tmp_path / "fake.py"), "train_enwik8.py") if table is REAL else (
                path.read_text())
            for word in (*REALLY * (table is REAL), *([words] if isinstance(words, str) else words)):
                old, new = (("better}}", f"better}}, {word[1:]}}}") if word[0] == "&" else
                            ("seeds:", f"{word[1:]}\nseeds:") if word[0] == "+" else word.split(" -> "))
                assert old in text, word
                text = text.replace(old, new)
            path.write_text(text.replace("kind: better", "n_layer: 2") if table is REAL else text)
            with pytest.raises(UserError) as error:
                grid_module.Grid(path)
                pytest.fail(f"{words} is taken")
            assert said in str(error.value) and str(path) in str(error.value), (words, str(error.value))
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, runs", [("facts_steps", 32), ("mqar", 60)])
def test_the_shipped_crosses_read(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = grid_module.Grid(ROOT / "grids" / f"{name}.yaml")
    assert len(found.rows) == runs and len({row.name for row in found.rows}) == runs and len(found.seeds) == 3
    assert found.seeded == ["seed", "data_seed"]
    cells = [found.cell(row, 1, seed) for row in found.rows for seed in found.seeds]
    assert len({cell.run for cell in cells}) == 3 * runs
    for cell in (cells[0], cells[-1]):
        settings = json.loads(cell.settings)
        g = fresh("train_facts.py")
        assert settings["seed"] == settings["data_seed"] == cell.seed
        words = [word for key, value in settings.items() for word in (f"--{key}", experiment.as_typed(value))]
        g["check"](experiment.override(g, words))


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("grids/published/*.yaml")))
def test_the_grids_of_published_results_read_and_say_what_counts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "grids" / "published" / name
    assert grid_module.Grid(path).rows
    assert all(word in path.read_text().lower() for word in ("reproduced", "prediction:"))


@pytest.mark.parametrize("path, said", [("none.yaml", "cannot read"), ("/dev/zero", "/dev/zero is a device, no")])
def test_a_yaml_that_is_not_there(in_process, path, said):
    code, _, err = in_process(grid_module, path)
    assert code == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1


def one_change(found):
    """The preset that two grids begin with."""
    return grid_module.check_settings(found.script, fresh("train_enwik8.py")["presets"]["one_change"])


def test_the_shipped_grid_is_the_preset(tmp_path, monkeypatch):
    """grids/one_change.yaml reads, has rows on every axis, and its base is train_enwik8.py's preset one_change."""
    monkeypatch.chdir(tmp_path)
    found = grid_module.Grid(ROOT / "grids" / "one_change.yaml")
    assert found.base == one_change(found)
    assert len(found.rows) > 24 and len(found.seeds) >= 5 and len(found.factors) == 3
    assert {row.axis for row in found.rows[1:]} >= set(
        "norm bias activation positions init residual heads mixer feed-forward pyramid losses optimizer schedule "
        "precision dropout".split())


def test_the_ladder_is_the_preset_on_random_windows(tmp_path, monkeypatch):
    """grids/ladder.yaml: the seeds set what the preset's data_seed did; rows with three rungs; foretold where new."""
    monkeypatch.chdir(tmp_path)
    found = grid_module.Grid(ROOT / "grids" / "ladder.yaml")
    preset = one_change(found)
    differs = {name for name in {*preset, *found.base} if found.base.get(name) != preset.get(name)}
    assert differs == set("batching data_seed dtype eval_interval log_interval save_interval".split())
    assert found.seeded == ["seed", "data_seed"] and found.tune_seed not in found.seeds
    assert sum(row.rungs == [500, 2000, 8000] for row in found.rows[1:]) >= 8 and len(found.rows) > 60
    assert sum("predicted" in row.told for row in found.rows) >= 8


def test_the_real_script_in_a_grid(tmp_path):
    """Two tiny runs of train_enwik8.py."""
    (tmp_path / "plan.yaml").write_text(f"""
script: train_enwik8.py
out_dir: {tmp_path}/out
metric: val_bpb_raw
base: {{debug: true, device: cpu, max_steps: 4, eval_interval: 4, sample_length: 0, schedule: constant}}
seeds: [1, 2]
cross: {{activation: [gelu]}}
""")
    run(tmp_path / "plan.yaml")
    row, = index_of(tmp_path / "plan.yaml")["rows"]
    for entry in row["runs"]:
        summary = json.loads((tmp_path / "out" / "train_enwik8" / entry["run"] / "summary.json").read_text())
        assert 6 < summary["val_bpb_raw"] == entry["value"] < 8 and summary["step"] == 4
    assert [entry["seed"] for entry in row["runs"]] == [1, 2]
