"""plot.py: curves by step, seconds and tokens, means over seeds, and runs that are broken, empty or half-written."""
import json
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402
from experiment import UserError  # noqa: E402
from test_scripts import shell  # noqa: E402

SETTINGS = {"batch_size": 4, "block_size": 8, "grad_accum": 2, "lr": 0.1, "seed": 1, "run_name": "a"}


def make(folder, values=(3.0, 2.5, 2.0), lines=(), **settings):
    """A run's directory with validations at steps 10, 20, ..., and training lines between them of 0.5 s a step."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps({"settings": {**SETTINGS, "run_name": folder.name, **settings}}))
    with open(folder / "metrics.jsonl", "w") as file:
        for i, value in enumerate(values, 1):
            for line in ({"step": 10 * i - 5, "split": "train", "loss": value, "seconds": 5 * i - 2.5},
                         {"step": 10 * i, "split": "val", "bpb": value, "protocol": "block"}, *lines):
                file.write(json.dumps(line) + "\n")
    return folder


def test_axes(tmp_path):
    run = make(tmp_path / "a")
    assert plot.read_run(run, "step", "val", "bpb")[1] == {"block": [(10, 3.0), (20, 2.5), (30, 2.0)]}
    assert plot.read_run(run, "tokens", "val", "bpb")[1]["block"] == [(640, 3.0), (1280, 2.5), (1920, 2.0)]
    by_seconds = plot.read_run(run, "seconds", "val", "bpb")[1]["block"]
    assert by_seconds == [(5.0, 3.0), (10.0, 2.5), (12.5, 2.0)]           # past the last clock: where it stopped
    assert plot.read_run(run, "seconds", "train", "loss")[1][""] == [(2.5, 3.0), (7.5, 2.5), (12.5, 2.0)]


def test_the_evaluation_beside_training_is_drawn_and_the_latest_line_of_a_step_counts(tmp_path):
    run = make(tmp_path / "a")
    (run / "evaluation.jsonl").write_text("".join(
        json.dumps({"step": 20, "split": "val", "bpb": bpb, "protocol": "cache"}) + "\n" for bpb in (9.0, 1.5)))
    assert plot.read_run(run, "step", "val", "bpb")[1]["cache"] == [(20, 1.5)]


def test_seeds_are_one_curve_and_labels_say_what_differs(tmp_path):
    runs = [make(tmp_path / "a", (3.0, 2.0), seed=1), make(tmp_path / "b", (4.0, 3.0), seed=2),
            make(tmp_path / "c", (5.0, 5.0), lr=0.2)]
    found = [(run, *plot.read_run(run, "step", "val", "bpb")) for run in runs]
    families = plot.families(found)
    assert [label for label, _ in families] == ["lr 0.1 (2 seeds)", "lr 0.2"]
    xs, means, spread = plot.average([curves["block"] for curves in families[0][1]])
    assert xs == [10, 20] and means == [3.5, 2.5] and spread == pytest.approx([0.5 ** 0.5] * 2)
    # a seed that is shorter: only what all have
    assert plot.average([[(1, 1.0), (2, 2.0)], [(1, 3.0)]])[:2] == ([1], [2.0])


def test_what_cannot_be_drawn_is_named(tmp_path):
    make(tmp_path / "runs" / "good")
    half = make(tmp_path / "runs" / "half")
    (half / "metrics.jsonl").write_bytes((half / "metrics.jsonl").read_bytes()[:-20] + b'\n[1]\n"text"\n{"loss": 1}\n')
    for name, words in (("empty", ""), ("cut", '{"settings": {"lr"'), ("other", "[]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "params.json").write_text(words)
    no_lines = make(tmp_path / "runs" / "no_lines", ())
    make(tmp_path / "runs" / "null", (None,))
    (no_lines / "curves.png").write_text("")
    (tmp_path / "runs" / "file.txt").write_text("")
    done = shell(tmp_path, "plot.py", "runs/*", "--out", "all.png")
    assert done.returncode == 0 and (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    left_out = [line.split(": ")[0].removeprefix("left out runs/") for line in done.stderr.splitlines()
                if line.startswith("left out")]
    assert left_out == ["cut", "empty", "file.txt", "no_lines", "null", "other"]
    alone = shell(tmp_path, "plot.py", "runs/empty")
    assert alone.returncode == 2 and alone.stderr.splitlines()[-1].startswith("error: nothing to draw")
    nothing = shell(tmp_path, "plot.py", "--table", "runs")
    assert nothing.returncode == 2 and "grid.json" in nothing.stderr and len(nothing.stderr.splitlines()) == 1
    assert shell(tmp_path, "plot.py").returncode == 2
    assert shell(tmp_path, "plot.py", "runs/good", "--out", "nowhere/a.png").stderr.startswith("error: cannot write")


def test_drawing_gives_no_warnings(tmp_path):
    runs = [make(tmp_path / name, (3.0, 2.0), seed=i) for i, name in enumerate("ab")] + [make(tmp_path / "c", (1.0,))]
    found = [(run, *plot.read_run(run, "step", "val", "bpb")) for run in runs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw(plot.families(found), "step", "val", "bpb", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_last_values_over_a_setting(tmp_path, capsys):
    """Seeds are one row, other settings another; the last value counts; the table holds what the picture shows."""
    runs = [make(tmp_path / str(i), values, n_layer=n, seed=i, dropout=p) for i, (n, p, values) in enumerate((
        (2, 0.0, (3.0, 2.0)), (2, 0.0, (3.0, 2.5)), (4, 0.0, (3.0, 1.0)), (4, 0.1, (3.0, 0.5))))]
    found = [(run, *plot.read_run(run, "step", "val", "bpb")) for run in runs]
    rows = dict(plot.last_values(found, "n_layer"))
    assert {label: list(by_name.values()) for label, by_name in rows.items()} == {
        "dropout 0.0": [{2: [2.0, 2.5], 4: [1.0]}], "dropout 0.1": [{4: [0.5]}]}
    plot.draw_over(list(rows.items()), "n_layer", "val", "bpb", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ")]
    assert len(lines) == 1 and "| 2.2500 | 0.3536 | 2 | 2.0000, 2.5000 |" in lines[0]
    with pytest.raises(UserError, match="no such setting"):
        plot.last_values(found, "n_lair")


def test_a_model_trained_alone_joins_those_trained_beside_others(tmp_path):
    both = [{"step": 30, "split": "val", "model": name, "accuracy": value} for name, value in (("a", 0.5), ("b", 0.75))]
    runs = [make(tmp_path / "0", (3.0,), both, models="a,b", n=8),
            make(tmp_path / "1", (3.0,), both[1:], models="b", n=4)]
    found = [(run, *plot.read_run(run, "step", "val", "accuracy")) for run in runs]
    assert plot.last_values(found, "n") == [("0", {"a": {8: [0.5]}, "b": {8: [0.75], 4: [0.75]}})]
    apart = [make(tmp_path / name, (3.0,), [line], models=name) for name, line in zip("ab", both)]
    found = [(run, *plot.read_run(run, "step", "val", "accuracy")) for run in apart]
    assert [label for label, _ in plot.families(found)] == ["a"]    # two models, one seed of each


def row(name, values, against="baseline", **more):
    return {"name": name, "axis": "a", "set": {}, "against": against, "factor": 1, "tuned": [], "error": "", "open": 0,
            "runs": [{"run": f"{name}{i}", "seed": i, "value": v, "max_steps": 9} for i, v in enumerate(values)],
            "step_seconds": 0.1, "parameters": 100, "equal_seconds": None, **more}


def index(*rows):
    baseline = row("baseline", [2.0, 2.02, 1.98, 2.01, 1.99], None)
    return {"metric": "m", "factors": [0.5, 1, 2], "slower": 0.1, "rows": [baseline, *rows]}


def test_the_table():
    """Verdicts by the rule, sizes that differ by more than 1 %, rates at the edge, rows that have nothing yet."""
    lines = plot.markdown(index(
        row("none", [2.02, 2.03]), row("worse", [2.05, 2.06]), row("better", [1.9], factor=2),
        row("wide", [2.0, 2.0], parameters=103, step_seconds=0.2, equal_seconds={"value": 2.2}),
        row("nearly", [2.0], parameters=101), row("open", [], open=3), row("failed", [], error="why"),
        row("chained", [2.0, 2.0], against="worse"), row("slow", [2.0, 2.0], step_seconds=0.12)))
    text = {line.split(" | ")[1]: line for line in lines if line.startswith("| a |")}
    assert lines[0].startswith("Baseline: 2.0000 (m), 5 seeds, sigma 0.0158;") and "0.0397 on" in lines[0]
    assert "no difference measured" in text["none"] and "**worse**" in text["worse"] and "**better**" in text["better"]
    assert "x2* | 1 |" in text["better"] and "| x1 | 2 |" in text["none"]
    assert "+3.0%" in text["wide"] and "| 2.00 | +0.2000: **worse** |" in text["wide"] and "same" in text["nearly"]
    assert "| 1.20 | not measured |" in text["slow"] and "as at equal steps" in text["none"]
    assert "3 runs to go" in text["open"] and "why" in text["failed"]
    assert "**better**" in text["chained (against worse)"]
    with pytest.raises(UserError, match="at least 2"):
        plot.markdown({"metric": "m", "factors": [1], "rows": [row("baseline", [2.0], None)]})


def test_other_numbers_beside_the_metric():
    """Means of the runs of a row; nothing where one has none; without timing runs there are no columns for time."""
    def given(values):
        return [{"run": "r", "seed": i, "value": 2 + i / 100, "max_steps": 9, "shown": {"exact": value}}
                for i, value in enumerate(values)]
    values = {"baseline": [0.5, 0.7], "a": [0.1, 0.4], "b": [0.1, None]}
    rows = [row(name, [], "baseline", step_seconds=None, parameters=None) | {"runs": given(mine)}
            for name, mine in values.items()]
    lines = plot.markdown({"metric": "m", "factors": [1], "slower": 0.1, "rows": [*rows, row("open", [], open=2)]})
    assert ", exact 0.6000, 2 seeds" in lines[0] and "seconds" not in lines[2] and lines[2].endswith(" seeds | exact |")
    assert lines[4].endswith(" | 2 | 0.2500 |") and lines[5].endswith(" | 2 |  |") and "same" not in lines[4]
    assert {line.count("|") for line in lines[2:]} == {lines[2].count("|")}
