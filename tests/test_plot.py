"""plot.py: curves by step, seconds and tokens, means over seeds, and runs that are broken, empty or half-written;
contours, capacity, and the tables of grids. What is drawn is compared in test_archive.py, byte for byte."""
import base64
import hashlib
import html
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
import plot
from choices import refused
from nanolab import archive, curves
from nanolab.archive import of_folder
from nanolab.run import UserError
from test_play import CHROMIUM, browse

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
    """The evaluation beside the training is drawn too, the latest line of a step counts."""
    place = make(tmp_path / "a")
    (place / "evaluation.jsonl").write_text("".join(
        json.dumps({"step": step, "split": "val", "bpb": bpb, "protocol": protocol}) + "\n" for step, bpb, protocol in (
            (20, 9.0, "cache"), (20, 1.5, "cache"), (2, 4.0, "early"))))
    for axis, split, metric, curve, points in (
            ("step", "val", "bpb", "block", [(10, 3.0), (20, 2.5), (30, 2.0)]),
            ("step", "val", "bpb", "cache", [(20, 1.5)]),
            ("tokens", "val", "bpb", "block", [(640, 3.0), (1280, 2.5), (1920, 2.0)]),
            ("seconds", "val", "bpb", "block", [(5.0, 3.0), (10.0, 2.5), (12.5, 2.0)]),     # the last: where it stopped
            ("seconds", "val", "bpb", "early", [(1.0, 4.0)]),     # before the first clock
            ("seconds", "train", "loss", "", [(2.5, 3.0), (7.5, 2.5), (12.5, 2.0)])):
        assert plot.read_run(of_folder(place), axis, split, metric)[1][curve] == points


def test_seeds_are_one_curve_and_labels_say_what_differs(tmp_path):
    runs = [make(tmp_path / "a", (3.0, 2.0), seed=1), make(tmp_path / "b", (4.0, 3.0), seed=2),
            make(tmp_path / "c", (5.0, 5.0), lr=0.2)]
    points, _ = plot.points_of(read(runs, "bpb"))
    assert list(points["label"].unique()) == ["lr 0.1", "lr 0.2"]
    mean = plot.average(points[points["label"] == "lr 0.1"])
    assert list(mean["x"]) == [10, 20] and list(mean["y"]) == [3.5, 2.5]
    assert list(mean["spread"]) == pytest.approx([0.5 ** 0.5] * 2)
    # a seed that is shorter: only what all have
    mean = plot.average(plot.pd.DataFrame({"run": [0, 0, 1], "x": [1, 2, 1], "y": [1.0, 2.0, 3.0]}))
    assert (list(mean["x"]), list(mean["y"])) == ([1], [2.0])


def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "good")
    half = make(tmp_path / "runs" / "half")
    (half / "metrics.jsonl").write_bytes((half / "metrics.jsonl").read_bytes()[:-20] +
                                         b'\n[1]\n"text"\n{"step": "a"}\n{"loss": 1}\n')
    for name, words in (("empty", ""), ("cut", '{"settings": {"lr"'), ("other", "[]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "params.json").write_text(words)
    no_lines = make(tmp_path / "runs" / "no_lines", ())
    make(tmp_path / "runs" / "null", (None,))
    (no_lines / "curves.png").write_text("")
    (tmp_path / "runs" / "file.txt").write_text("")
    code, _, err = in_process(plot, "runs/*", "--out", "all.png")
    assert code == 0 and (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG", err
    left_out = [line.split(": ")[0].removeprefix("left out runs/") for line in err.splitlines()
                if line.startswith("left out")]
    assert left_out == ["cut", "empty", "file.txt", "no_lines", "null", "other"]
    for words, said in (("runs/empty", "error: nothing to draw"), ("--table runs", "grid.json"), ("", "error: "),
                        ("runs/good --out nowhere/a.png", "error: cannot write")):
        code, _, err = in_process(plot, *words.split())
        assert code == 2 and said in err.splitlines()[-1], words


@pytest.fixture
def strict():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_drawn(*pictures):
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)


def test_last_values_over_a_setting(tmp_path, capsys):
    """Seeds are one row, other settings another; the last value counts; the table holds what the picture shows."""
    runs = [make(tmp_path / str(i), values, n_layer=n, seed=i, dropout=p) for i, (n, p, values) in enumerate((
        (2, 0.0, (3.0, 2.0)), (2, 0.0, (3.0, 2.5)), (4, 0.0, (3.0, 1.0)), (4, 0.1, (3.0, 0.5))))]
    found = read(runs, "bpb")
    assert last_values(found, "n_layer") == {("dropout 0.0", "block"): {2: [2.0, 2.5], 4: [1.0]},
                                             ("dropout 0.1", "block"): {4: [0.5]}}
    ends = plot.last(plot.points_of(found, ("n_layer",))[0])
    plot.draw_over(ends, "n_layer", "val bpb", "bits per byte", tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ")]
    assert len(lines) == 1 and "| 2.2500 | 0.3536 | 2 | 2.0000, 2.5000 |" in lines[0]
    refused("--over n_lair: .* no such setting", plot.points_of, found, ["n_lair"], "--over")


def last_values(found, over):
    """{(label, curve): {value of the setting: [last y of each seed]}}."""
    rows = {}
    for entry in plot.last(plot.points_of(found, (over,))[0]).itertuples():
        rows.setdefault((entry.label, entry.curve), {}).setdefault(entry.across, []).append(entry.y)
    return rows


def test_a_model_trained_alone_joins_those_trained_beside_others(tmp_path):
    both = [{"step": 30, "split": "val", "model": name, "accuracy": value} for name, value in (("a", 0.5), ("b", 0.75))]
    runs = [make(tmp_path / "0", (3.0,), both, models="a,b", n=8),
            make(tmp_path / "1", (3.0,), both[1:], models="b", n=4)]
    assert last_values(read(runs), "n") == {("", "a"): {8: [0.5]}, ("", "b"): {8: [0.75], 4: [0.75]}}
    apart = [make(tmp_path / name, (3.0,), [line], models=name) for name, line in zip("ab", both)]
    assert set(plot.points_of(read(apart))[0]["label"]) == {""}     # two models, one seed of each


def row(name, values, against="baseline", **more):
    return {"name": name, "axis": "a", "set": {}, "against": against, "factor": 1, "tuned": [], "error": "", "open": 0,
            "runs": [{"run": f"{name}{i}", "seed": i, "value": v, "max_steps": 9} for i, v in enumerate(values)],
            "step_seconds": 0.1, "parameters": 100, "equal_seconds": None, **more}


def index(*rows):
    baseline = row("baseline", [2.0, 2.02, 1.98, 2.01, 1.99], None, flops=2)
    return {"metric": "m", "factors": [0.5, 1, 2], "slower": 0.1, "rows": [baseline, *rows]}


def test_the_table(tmp_path):
    """Verdicts by the rule, sizes that differ by more than 1 %, rates at the edge, rows that have nothing yet."""
    found = index(
        row("none", [2.001, 2.02]), row("worse", [2.055, 2.07]), row("better", [1.9], factor=2),
        row("wide", [2.0, 2.02], parameters=103, flops=3, step_seconds=0.2, equal_seconds={"value": 2.2, "seed": 0}),
        row("nearly", [2.0], parameters=101), row("open", [], open=3), row("failed", [], error="why"),
        row("chained", [2.0, 2.018], against="worse"), row("slow", [2.0, 2.02], step_seconds=0.12))
    lines = plot.markdown(found)
    text = {line.split(" | ")[1]: line for line in lines if line.startswith("| a |")}
    assert lines[0].startswith("Baseline: 2.0000 (m), 5 draws; sigma 0.00")
    assert lines[1].startswith("7 rows are judged") and "at 5 %." in lines[1]
    assert "undecided" in text["none"] and "**worse**" in text["worse"] and "**better**" in text["better"]
    assert "| same |  | x2* | 1 |" in text["better"] and "| x1 | 2 |" in text["none"]
    assert "| +3.0% | +50.0% | x1" in text["wide"] and "| 2.00 | +0.1993 ± " in text["wide"]
    assert "| same |" in text["nearly"]
    assert "| 1.20 | not measured |" in text["slow"] and "as at equal steps" in text["none"]
    assert "3 runs to go" in text["open"] and "why" in text["failed"]
    assert "**better**" in text["chained (against worse)"]
    assert "the 90 % interval lies within ±0.03" in "".join(plot.markdown({**found, "same": 0.03}))
    wider = plot.markdown({**found, "sigma_data": 0.02})     # another draw of the data widens every interval
    assert "moves a difference by 0.0200" in wider[1] and "undecided" in next(
        line for line in wider if "| worse |" in line)
    both = next(line for line in wider if "| wide |" in line).split("± ")[1:]    # at equal steps and seconds
    assert len(both) == 2 and all(float(words.split(" ")[0]) > 0.04 for words in both)
    ratios = {line.split(" | ")[1]: line for line in plot.markdown({**found, "log": True}) if line.startswith("| a |")}
    assert " | x0.95 (0.9" in ratios["better"]
    early = {**found, "rungs": [9, 18], "primary": 18, "rows": [row("baseline", [2.0, 2.02], None), *found["rows"][1:]]}
    early["rows"] = [{**mine, "tuned": [[1, 2.0], [2, 2.1]]} for mine in early["rows"]]
    assert "| x2* |" in next(line for line in plot.markdown(early) if "| better " in line)   # largest of its own
    assert "Nothing tells the noise at 18 steps yet: the verdicts are those at 9." in plot.markdown(early)
    plot.write_csv(found, tmp_path / "a.csv")
    told = pd.read_csv(tmp_path / "a.csv").set_index("name")
    assert told.loc["better", "verdict"] == "better"
    assert told.loc["worse", "low"] < 0.05 < 0.056 < told.loc["worse", "high"]
    assert math.isnan(told.loc["open", "difference"]) and told.loc["wide", "parameters"] == 1.03
    with pytest.raises(UserError, match="nothing tells the noise"):
        plot.markdown({"metric": "m", "factors": [1], "rows": [row("baseline", [2.0], None)]})


def test_the_csv_goes_to_a_file_of_that_name_and_nowhere_else(tmp_path):
    found = index(row("a", [3.1, 3.12], published={"verdict": 0.5}, predicted="worse: why"))
    plot.write_csv(found, str(tmp_path / "a.zip"))
    told = pd.read_csv((tmp_path / "a.zip").open()).set_index("name")
    assert told.loc["a", "verdict"] == "worse" and told.loc["a", "published: verdict"] == 0.5
    for place in (tmp_path, tmp_path / "no" / "a.csv", "/dev/full", "s3://nowhere/a.csv", "a\0b"):
        refused("cannot write", plot.write_csv, found, str(place))


DAMAGE = {  # of a key of grid.json, of its second row, of that row's first run: other values; ...: none
    "": dict(metric=[...], rows=[3, [[]]], factors=[[], ["x"], [0, 1]], slower=[None], cross=[[1], {"x": {"y": {}}}],
             rungs=[[0, 100], [100, 100], [400, 100], [-5, 100]], same=[math.nan], sigma_data=[math.inf],
             primary=[10 ** 400]),
    "row": dict(name=["baseline", ...], against=["b", None], factor=[None], equal_seconds=[{"value": []}], open=["1"],
                tuned=[[[1, 2, 3]], [[None, 2]], [["a", 2]], [[-1, 2]], [[1, math.nan]]], published=[{"a": None}],
                parameters=[10 ** 400], runs=[[{"seed": 1, "value": 2.0, "max_steps": 9}]]),
    "run": dict(value=["1", math.nan, 10 ** 400], seed=[...], shown=[3]),
}


@pytest.mark.parametrize("of", DAMAGE)
def test_a_damaged_table_is_one_line(tmp_path, of):
    path = tmp_path / "grid.json"
    for name, value in ((name, value) for name, values in DAMAGE[of].items() for value in values):
        found = index(row("a", [2.1, 2.2]))
        path.write_text(json.dumps(found))
        assert plot.read_index(path)["rows"]
        place = {"": found, "row": found["rows"][1], "run": found["rows"][1]["runs"][0]}[of]
        place[name] = value
        if value is ...:
            del place[name]
        path.write_text(json.dumps(found))
        with pytest.raises(UserError, match="is missing or no grid"):
            plot.read_index(path)
            pytest.fail(f"{name} {value} is taken")
    for text in ("{}", "[" * 3000 + "]" * 3000):
        path.write_text(text)
        refused("is missing or no grid", plot.read_index, path)


def test_other_numbers_beside_the_metric():
    """Means of the runs of a row; nothing where one has none; without timing runs there are no columns for time."""
    def given(values):
        return [{"run": f"{values}{i}", "seed": i, "value": 2 + i / 100, "max_steps": 9, "shown": {"exact": value}}
                for i, value in enumerate(values)]
    values = {"baseline": [0.5, 0.7], "a": [0.1, 0.4], "b": [0.1, None]}
    rows = [row(name, [], "baseline", step_seconds=None, parameters=None) | {"runs": given(mine)}
            for name, mine in values.items()]
    lines = plot.markdown({"metric": "m", "factors": [1], "slower": 0.1, "rows": [*rows, row("open", [], open=2)]})
    head, _, *lines = [line for line in lines if line.startswith("|") or ", exact 0.6000, 2 draws" in line][1:]
    assert "seconds" not in head and head.endswith(" draws | exact |")
    assert lines[0].endswith(" | 2 | 0.2500 |") and lines[1].endswith(" | 2 |  |") and "same" not in lines[0]
    assert {line.count("|") for line in lines} == {head.count("|")}


HOSTILE = "</script><img src=x onerror=document.title='owned'>&amp;"


def make_told(folder, script="train_enwik8", **settings):
    """A run with all that a page shows, as one from a stranger may have it."""
    run = make(folder, lines=[{"step": 1, "split": "train", "lr": value, "loss": 4.0, "seconds": 0.5}
                              for value in (math.nan, 10 ** 400, True)], **settings)
    params = json.loads((run / "params.json").read_text())
    (run / "params.json").write_text(json.dumps(params | {
        "script": script, "command": ["train_enwik8.py", "--tag", HOSTILE], "git": {"commit": "c0ffee", "dirty": True},
        "versions": {"torch": HOSTILE, "triton": None}, "device": [3]}))
    (run / "summary.json").write_text(json.dumps({"status": "done", "step": 30, "seconds": 12.34, "best_bpb": 2.0}))
    (run / "samples").mkdir()
    for name, text in (("step_3.txt", "old"), ("step_9.txt", HOSTILE), ("a<b>.png", "png"), ("big.gif", "x" * 99)):
        (run / "samples" / name).write_text(text)
    (run / "samples" / "link.txt").symlink_to(run / "params.json")
    return run


def test_a_page_shows_all_of_a_run_and_runs_nothing_of_it(tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "LARGEST", 98)
    make_told(tmp_path / "runs" / "a", preset="cpu", n_layer=4, n_head=3, dataset=HOSTILE, optimizer="muon", lr=7e-4)
    with open(tmp_path / "runs" / "a" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "split": HOSTILE, "loss": 1.0}))
    code, _, err = in_process(plot, "runs/a", "--html", "a.html")
    assert (code, err) == (0, "wrote a.html\n")
    text = (tmp_path / "a.html").read_text()
    assert "<img src=x" not in text and text.count("</script>") == 2 and "@" not in re.sub("@media", "", text)
    outside = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|src=\"(?!data:)", outside)
    script, = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text
    rows = [[html.unescape(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row)]
            for row in re.findall("<tr>(.*?)</tr>", text)]
    at = rows.index(["setting", "this run", "preset cpu", "the script"])
    found = {row[0]: row[1:] for row in rows[at + 1:rows.index(["name", "value"])]}
    assert found["n_head"] == ["3", "2", "8"] and found["n_layer"] == ["4", "4", "12"] and "n_embd" not in found
    assert found["lr"] == ["0.0007", "0.03", "0.0007"] and found["dataset"] == [HOSTILE, "stdlib", "enwik8"]
    assert list(found).index("n_head") < list(found).index("n_layer")        # first what the preset has otherwise
    for row in (["status", "done"], ["commit", "c0ffee"], ["uncommitted changes", "true"], ["torch", HOSTILE],
                ["n_head", "3"], ["n_head", "3", "2", "8"]):
        assert row in rows
    assert rows[1][1:] == ["done", "30", "best_bpb 2.0000", "12.3"] and not any(row[0] == "triton" for row in rows)
    assert html.escape("python train_enwik8.py --tag '</script>") in text
    assert "old" not in re.findall("<pre>(.*?)</pre>", text) and html.escape(HOSTILE) in text
    assert '<img alt="a&lt;b&gt;.png" src="data:image/png;base64,cG5n">' in text and "link.txt" not in text
    assert "big.gif is left out: it is larger than" in text
    assert 'data.textContent' not in text and json.loads(data_of(text))["keys"][:2] == ["loss", "bpb"]


def data_of(text):
    return re.search('<script type="application/json" id="data">(.*?)</script>', text)[1]


def test_a_page_of_runs_that_lack_something(tmp_path, monkeypatch, in_process):
    """Names that occur twice, no metrics, a damaged run; one line where nothing is left."""
    monkeypatch.chdir(tmp_path)
    for place in ("runs/x/a", "runs/y/a"):
        make(tmp_path / place, ())
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "params.json").write_text('{"settings": {"lr"')
    code, _, err = in_process(plot, "runs", "--html", "a.html")
    assert (code, err) == (0, "left out runs/bad: no params.json, or it is damaged\nwrote a.html\n")
    text = (tmp_path / "a.html").read_text()
    assert text.count("no metrics yet") == 2 and 'value="runs/x/a" checked' in text and "<p>runs/bad: no" in text
    assert text.count("no setting is known to differ") == 2 and "preset none" not in text     # its script is not
    for words, said in (("runs/bad --html b.html", "nothing to show: runs/bad: no params.json"),
                        ("runs/none --html b.html", "nothing to show: runs/none: no such run"),
                        ("runs --html b.png", "a page ends in .html"),
                        ("runs --html no/b.html", "cannot write no/b.html"),
                        ("runs/x/a --html b.html --over lr", "--over has no effect with --html"),
                        ("--html b.html", "what to draw")):
        code, _, err = in_process(plot, *words.split())
        assert code == 2 and err.splitlines()[-1].startswith("error: ") and said in err, words
    assert not list(tmp_path.glob("b.*"))


def test_a_page_has_the_table_of_its_grid(tmp_path, monkeypatch, in_process):
    """Of a folder and of its archive, with intervals and a picture; in words where there is none yet."""
    monkeypatch.chdir(tmp_path)
    make_told(tmp_path / "grid" / "t" / "a")
    def shown(place, told):
        (tmp_path / "grid" / "grid.json").write_text(json.dumps({"script": "train_enwik8.py", **told}))
        if place == "grid.jsonl":
            archive.write(Path("grid"))
        assert in_process(plot, place, "--html", "a.html")[0] == 0
        return (tmp_path / "a.html").read_text()
    text = shown("grid", index(row("none <b>", [2.001, 2.02], factor=2), row("a*", [])))
    assert re.search(r"<td>none &lt;b&gt;</td><td>\+0\.0\d+ ± 0\.\d+</td><td>undecided</td>", text)
    assert 'alt="the table" src="data:image/png;base64,iVBOR' in text and "<p>Baseline: 2.0000 (m), 5 draws" in text
    assert "<p>* the best of the tried rates" in text
    text = shown("grid.jsonl", {**index(row("a", [])), "rows": [row("baseline", [2.0], None), row("a", [])]})
    assert "<p>no two seeds of the baseline and of a row yet" in text and 'alt="the table"' not in text
    assert "--tag &#x27;&lt;/script&gt;" in text and "c0ffee" in text                 # of an archive's run, too
    text = shown("grid", {"metric": "m", "cross": {"lr": {"1": {}}}, "rows": [crossed({"lr": "1"}, [0.5])]})
    assert "<tr><td>1</td><td>0.5000 (1)</td></tr>" in text and 'alt="the table"' not in text


def test_curves_of_a_page():
    lines = [{"step": step, "split": "train", "loss": 1.0 / step, "seconds": step / 2} for step in range(1, 1002)]
    lines += [{"step": 0, "split": "val", "accuracy": 0}, {"step": 4, "split": "val", "bpb": math.inf, "accuracy": 1}]
    lines += [{"step": 10 ** 400, "split": "val"},
              {"step": 2000, "split": "val", "accuracy": None}, {"step": 9, "split": "val", "stage": "x", "psnr": 1}]
    train, val, stage = sorted(curves.by_curve(lines), key=lambda curve: curve["name"])
    assert train["name"] == "train" and train["step"][-2:] == [1001 - 2, 1001] and len(train["step"]) == 501
    assert train["loss"][3] == 1 / train["step"][3] and train["seconds"][3] == train["step"][3] / 2
    assert (val["name"], val["step"], val["seconds"]) == ("val", [0, 4, 2000], [0.0, 2.0, 500.5])
    assert val["accuracy"] == [0, 1, None] and "bpb" not in val
    assert (stage["name"], stage["seconds"]) == ("x/val", [None])


# Runs in a page behind its own script, whose names it sees.
DRIVER = """
const seen = [], errors = [];
addEventListener("error", event => errors.push(event.message));
function look() {
  seen.push([get("svg").querySelectorAll("path").length, [...get("legend").children].map(e => e.textContent)]);
}
function set(id, value) {
  get(id)[typeof value === "boolean" ? "checked" : "value"] = value;
  get(id).dispatchEvent(new Event("change"));
  look();
}
look();
const lowest = dots.reduce((best, dot) => dot.y > best.y ? dot : best), box = get("svg").getBoundingClientRect();
const near = {clientX: box.left + lowest.x + 2, clientY: box.top + lowest.y};
get("svg").dispatchEvent(new PointerEvent("pointermove", near));
const tip = get("tip").textContent;
set("metric", "bpb"), set("over", "seconds"), set("log", true), set("logx", true), set("metric", "nothing");
boxes[1].checked = false, set("metric", "loss");
const parts = [document.title, tip, [...get("metric").options].map(e => e.text), errors, seen,
               document.documentElement.scrollWidth <= innerWidth, document.images.length];
document.body.append(Object.assign(document.createElement("pre"), {id: "report", textContent: JSON.stringify(parts)}));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_page_in_a_browser(tmp_path):
    """Curves are drawn, overlaid and hovered over at a phone's width; what a run says never runs."""
    runs = [of_folder(make_told(tmp_path / name)) for name in "ab"]
    runs[0].name = HOSTILE
    text = curves.page(HOSTILE, runs, (), [HOSTILE])
    allowed = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{allowed}' ").replace(
        "</html>", f"<script>{DRIVER}</script><script>document.title = 'owned'</script></html>")
    (tmp_path / "page.html").write_text(text)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        browser = browse(home, "--window-size=500,900", "--dump-dom", f"file://{tmp_path}/page.html",
                         stdout=subprocess.PIPE)
        try:
            out = browser.communicate(timeout=60)[0].decode()
        finally:
            if browser.poll() is None:
                os.killpg(browser.pid, signal.SIGKILL)
    found = json.loads(html.unescape(re.search('<pre id="report">(.*?)</pre>', out)[1]))
    both = [f"{name}: {curve}" for name in (HOSTILE, "b") for curve in ("train", "val/block")]
    title, tip, metrics, errors, seen, fits, pictures = found
    assert (title, errors, fits, pictures) == (HOSTILE, [], True, 4)
    assert tip == f"{HOSTILE}, train: loss 2 at step 25" and metrics == ["loss", "bpb", "seconds"]
    train, val = both[::2], both[1::2]
    assert seen == [[2, train], [2, val], [2, val], [2, val], [2, val], [0, []], [1, ["train"]]]


CURVES = {"in_weight": [("no_tool", "trained")], "in_tool": [("tool", "trained"), ("tool", "unseen")]}


def make_facts(folder, people, width, task, seed, accuracy=0.5, bits=None, **settings):
    """A finished run of train_facts.py: two evaluations; "unseen" is right half as often. 100 width parameters."""
    batch = {"in_weight": 256, "in_tool": 128}[task]
    settings = {"task": task, "n_people": people, "n_embd": width, "batch_size": batch, "data_seed": seed,
                "max_steps": 400 * people // batch, "mixer": "full"} | settings
    run = make(folder, (), seed=seed, **settings)
    (run / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": step, "split": "val", "weights": "raw", "protocol": protocol, "people": kind,
         "accuracy": accuracy * (step > 0) / (1 + (kind == "unseen"))}) + "\n"
        for step in (0, 50) for protocol, kind in CURVES[task]))
    more = {"bits": bits, "bits_of_all": 31.25 * people, "accuracy_trained_no_tool_raw": accuracy} if bits else {}
    (run / "summary.json").write_text(json.dumps({"parameters": 100 * width, "epoch": 100.0, **more}))
    return run


def grid_of_facts(folder):
    """Widths 8 and 16, people 32, 128 and 512, both tasks, seeds 1 and 2; in_weight: 800 bits for each of the width."""
    return [make_facts(folder / f"{width}_{people}_{task}_{seed}", people, width, task, seed,
                       round(min(1, 0.1 * width * 16 / people) - seed / 100, 6),
                       min(31.25 * people, 800 * width / 4) + seed if task == "in_weight" else None)
            for width in (8, 16) for people in (32, 128, 512) for task in CURVES for seed in (1, 2)]


def read(runs, metric="accuracy", by="step", parameters=False):
    return [(run, *plot.read_run(run, by, "val", metric, parameters)) for run in map(of_folder, runs)]


def test_only_keeps_curves_by_whole_words(tmp_path, capsys):
    found = read([make_facts(tmp_path / task, 32, 8, task, 1) for task in CURVES])
    assert [list(curves) for _, _, curves in plot.chosen(found, ["tool"])] == [["raw tool trained", "raw tool unseen"]]
    assert capsys.readouterr().err == "left out 1 runs that have no curve tool\n"
    assert [list(curves) for _, _, curves in plot.chosen(found, ["trained", "raw"])] == [
        ["raw no_tool trained"], ["raw tool trained"]] and not capsys.readouterr().err
    with pytest.raises(UserError, match="words no_tool unseen; there are: raw no_tool trained, raw tool trained"):
        plot.chosen(found, ["no_tool", "unseen"])


def test_what_follows_from_the_rest_is_in_no_label(tmp_path):
    found = read(grid_of_facts(tmp_path))
    assert plot.distinguishing(found, ("n_people", "n_embd")) == (
        ["task"], {"batch_size": ["256", "128"], "max_steps": ["50", "100", "200", "400", "800", "1600"]})
    # without axes, people and width are in the labels; what follows is said once, in order
    kept, following = plot.distinguishing(found)
    assert kept == ["task", "n_people", "n_embd"] and list(following) == ["batch_size", "max_steps"]
    assert plot.footnote(following) == "not in the labels: batch_size 128, 256; max_steps 50 to 1600"
    assert plot.footnote({}) == ""
    assert "task in_tool, n_people 128, n_embd 8" in set(plot.points_of(found)[0]["label"])
    # exposures, of few values, explain the steps, and not the other way round
    more = read([make_facts(tmp_path / "e" / f"{n}_{e}", n, 8, "in_weight", 1, exposures=e, max_steps=n * e)
                 for n in (32, 128) for e in (100, 1000)])
    assert plot.distinguishing(more, ("n_people", "n_embd"))[0] == ["exposures"]
    # one run more whose steps differ inside a cell tells all apart
    odd = read([make_facts(tmp_path / "odd", 32, 8, "in_weight", 3, max_steps=77)])
    assert plot.distinguishing(found + odd, ("n_people", "n_embd"))[0] == ["task", "max_steps"]
    # tasks are apart even where they share no cell, as a number need not be
    apart = read([make_facts(tmp_path / "apart" / task, n, n, task, 1, lr=n / 10)
                  for task, n in (("in_tool", 8), ("in_weight", 16))])
    assert plot.distinguishing(apart, ("n_people", "n_embd"))[0] == ["task"]


def test_contours(tmp_path, strict):
    """Panels for curves and tasks, means over seeds, holes where no run is; parameters from the summary."""
    runs = [run for run in grid_of_facts(tmp_path) if run.name not in ("16_512_in_tool_1", "16_512_in_tool_2",
                                                                       "8_512_in_tool_2")]
    def panels(runs, x, y, **more):
        return plot.panels(plot.last(plot.points_of(read(runs, **more), (x, y), "--contours")[0]), x, y)
    drawn = panels(runs, "n_people", "n_embd")
    assert [title for title, _ in drawn] == ["task in_tool: tool trained", "task in_tool: tool unseen",
                                             "task in_weight: no_tool trained"]
    cells = plot.tabled(dict(drawn)["task in_weight: no_tool trained"], list)
    assert cells.loc[8, 128] == [0.09, 0.08]                                # the last values
    lines = plot.contour_tables(drawn, "n_people", "n_embd", "val accuracy")
    assert lines[:6] == ["**task in_tool: tool trained**: val accuracy, mean +- standard deviation (seeds)", "",
                         "| n_embd \\ n_people | 32 | 128 | 512 |", "| --- | --- | --- | --- |",
                         "| 8 | 0.3850 +- 0.0071 (2) | 0.0850 +- 0.0071 (2) | 0.0150 (1) |",
                         "| 16 | 0.7850 +- 0.0071 (2) | 0.1850 +- 0.0071 (2) | not measured |"]
    by_size = dict(panels(runs, "parameters", "n_people", parameters=True))
    assert plot.tabled(by_size["task in_weight: no_tool trained"], list).loc[128, 1600] == [0.19, 0.18]
    refused("--contours n_embed: .* no such setting", panels, runs, "n_people", "n_embed")
    plot.draw_contours(drawn, "n_people", "n_embd", "val accuracy", tmp_path / "a.png")
    plot.draw_contours(panels(runs[:1], "task", "n_embd"), "task", "n_embd", "x", tmp_path / "b.png")
    assert_drawn(tmp_path / "a.png", tmp_path / "b.png")


def test_places():
    assert plot.places_of([512, 32, 128]) == {32: 5, 128: 7, 512: 9}        # a factor of 8 and more: logarithms
    assert plot.places_of([1, 0, 16]) == {0: 0, 1: 1, 16: 16} and plot.places_of([2, 1]) == {1: 1, 2: 2}
    assert plot.places_of(["b", "a"]) == {"a": 0, "b": 1}
    assert plot.edges([5, 7, 8]) == [4, 6, 7.5, 8.5] and plot.edges([3]) == [2.5, 3.5]
    assert [plot.compact(n) for n in (980, 12_345, 1_200_000, 2e9)] == ["980", "12.3k", "1.2M", "2G"]
    assert sorted(["n 16", "n 8", "a"], key=plot.natural) == ["a", "n 8", "n 16"]


def test_capacity(tmp_path, strict):
    runs = grid_of_facts(tmp_path / "runs")
    runs.append(make_facts(tmp_path / "runs" / "worse", 2048, 8, "in_weight", 1, 0.0, -5.0))
    with pytest.raises(ValueError, match="no bits in its summary"):
        plot.read_capacity(of_folder(tmp_path / "runs" / "8_32_in_tool_1"))
    found = [(run, *plot.read_capacity(run)) for run in map(of_folder, runs) if "in_tool" not in run.name]
    groups, following = plot.capacities(found)
    assert set(groups["label"]) == {""} and list(following) == ["max_steps"]
    lines = plot.capacity_table(groups)
    assert lines[0] == ("| people | width | parameters | exposures | accuracy | bits | share of all bits | bits a "
                        "parameter |")
    assert lines[2] == "| 32 | 8 | 800 | 100 | 0.3850 +- 0.0071 (2) | 1,002 +- 1 (2) | 100.2% | 1.252 +- 0.001 (2) |"
    assert lines[4].startswith("| 128 | 8 | 800 |") and "| 1,602 +- 1 (2) | 40.0% | 2.002 +- 0.001 (2) |" in lines[4]
    assert "| -5 (1) | -0.0% | -0.006 (1) |" in lines[-1] and lines[-1].startswith("| 2,048 | 8 |")
    refused("more than 0 bits", plot.draw_capacity, plot.capacities(found[-1:])[0], tmp_path / "none.png")
    # what tells runs apart beside people and size has rows, lines and a panel of its own
    more = [make_facts(tmp_path / "more" / str(n), 32, n, "in_weight", 1, 0.5, 500.0, exposures=e, max_steps=e)
            for n, e in ((8, 1000), (16, 1000))]
    found = [(run, {**settings, "exposures": 100}, summary) for run, settings, summary in found]
    groups, following = plot.capacities(found + [(run, *plot.read_capacity(run)) for run in map(of_folder, more)])
    assert list(groups["label"].unique()) == ["exposures 100", "exposures 1000"]
    assert plot.capacity_table(groups)[-1].startswith("| exposures 1000 | 32 | 16 | 1,600 |")
    plot.draw_capacity(groups, tmp_path / "a.png", plot.footnote(following))
    assert_drawn(tmp_path / "a.png")


def test_the_commands(tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tmp_path)
    grid_of_facts(tmp_path / "runs")
    code, out, err = in_process(plot, "runs/*", "--contours", "n_people,parameters", "--metric", "accuracy", "--only",
                                "tool,unseen")
    assert code == 0 and out.startswith("**raw tool unseen**: val accuracy, mean +- standard deviation (seeds)"), err
    assert "| parameters \\ n_people | 32 | 128 | 512 |" in out and "left out 12 runs" in err
    code, out, err = in_process(plot, "runs/*", "--capacity")
    assert code == 0 and out.startswith("| people |") and err.count("left out runs/") == 12  # the tool's runs, by name
    assert_drawn(tmp_path / "contours.png", tmp_path / "capacity.png")
    for words, why in (("--capacity --over n_embd", "choose one"), ("--contours n_embd", "two settings"),
                       ("--contours n_embd,n_embd", "two settings"), ("--only tol", "there are: raw")):
        code, _, err = in_process(plot, "runs/*", "--metric", "accuracy", *words.split())
        assert code == 2 and why in err.splitlines()[-1]


def crossed(at, values, shown=(), **more):
    return row(", ".join(f"{axis} {option}" for axis, option in at.items()), values, None, at=at) | {
        "runs": [{"run": "r", "seed": i, "value": value, "max_steps": 9, "shown": dict(shown)}
                 for i, value in enumerate(values)]} | more


def test_the_table_of_a_cross():
    cross = {"n_embd": {"8": {}, "16": {}}, "n_people": {"32": {}}, "task": {"in_weight": {}, "in_tool": {}}}
    rows = [crossed({"n_embd": "8", "n_people": "32", "task": "in_weight"}, [0.5, 0.7], {"bits": 100.0, "calls": None}),
            crossed({"n_embd": "8", "n_people": "32", "task": "in_tool"}, [0.25], {"bits": None, "calls": 1}, open=1),
            crossed({"n_embd": "16", "n_people": "32", "task": "in_weight"}, [], open=2),
            crossed({"n_embd": "16", "n_people": "32", "task": "in_tool"}, [], error="out of memory")]
    lines = plot.pivot({"metric": "m", "cross": cross, "rows": rows})
    assert lines[:7] == ["**m**, mean +- standard deviation (seeds)", "",
                         "| n_embd | n_people | task in_weight | task in_tool |", "| --- | --- | --- | --- |",
                         "| 8 | 32 | 0.6000 +- 0.1414 (2) | 0.2500 (1) |",
                         "| 16 | 32 | not measured | not measured |", ""]
    assert lines[7].startswith("**bits**") and lines[11] == "| 8 | 32 | 100.0 +- 0.0 (2) |  |"
    assert lines[14].startswith("**calls**") and lines[18] == "| 8 | 32 |  | 1.0000 (1) |"
    assert lines[-2:] == ["3 runs to go.", "Failed: n_embd 16, n_people 32, task in_tool: out of memory."]
    one = plot.pivot({"metric": "m", "cross": {"lr": {"1": {}}}, "rows": [crossed({"lr": "1"}, [0.5])]})
    assert one[2:5] == ["| lr | mean |", "| --- | --- |", "| 1 | 0.5000 (1) |"] and one[-1] == ""
    two = plot.pivot({"metric": "m", "cross": {"lr": {"1": {}, "2": {}}}, "rows": [
        crossed({"lr": str(i)}, [i, i + 1.0]) | {"name": f"lr {i}"} for i in (1, 2)]})
    assert two[-2] == "Deviations: 0.7071 over lr, 0.7071 over seeds, 0.0000 of the rest."
