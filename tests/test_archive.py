"""nanolab/archive.py: a folder of runs as one file loses nothing, and plot.py makes the same of either; the archives of
runs/reference give the tables of the docs word for word, and their pictures byte for byte."""
import fcntl
import fnmatch
import importlib.metadata
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
import grid
import plot
from choices import refused
from nanolab import archive, verdict
from nanolab.run import is_run
from test_grid import plan, run  # noqa: E402, F401
from test_plot import make

REFERENCE = ROOT / "runs" / "reference"
WORDS = {"format": "nanolab-1", "script": "train_enwik8", "versions": {"torch": "2"}, "device": {}, "git": None}


def folder_of_runs(folder):
    """Runs of two seeds, of an older version, one that was resumed, one without settings; all kinds of metrics."""
    for name, more in (("s1", {}), ("s2", {"seed": 2}), ("s10", {"seed": 10, "lr": 1, "new": None})):
        place = make(folder / "train_enwik8" / name, **more)
        settings = json.loads((place / "params.json").read_text())["settings"]
        command = ["train_enwik8.py", "--lr", "0.1", "--seed", str(settings["seed"]), "--run_name", name]
        (place / "params.json").write_text(json.dumps(WORDS | {"settings": settings, "command": command, "history": [
            {"step": 0, "command": command}]}))
        (place / "summary.json").write_text(json.dumps({"status": "done", "parameters": 100, "bpb": 2.0 / len(name)}))
    with open(place / "metrics.jsonl", "a") as file:
        for line in ({"step": 30, "split": "val", "bpb": None, "protocol": "block", "final": True},
                     {"step": 40, "xs": [1, 2]}, {"step": 40, "xs": [3], "split": "train", "loss": 1},
                     {"step": 50, "xs": []}):
            file.write(json.dumps(line) + "\n")
    (place / "evaluation.jsonl").write_text(json.dumps({"step": 20, "split": "val", "bpb": 1.5, "protocol": "cache"}))
    older = make(folder / "train_enwik8" / "older", versions=3)
    params = json.loads((older / "params.json").read_text())
    del params["settings"]["grad_accum"]
    (older / "params.json").write_text(json.dumps(params | {"history": [{"step": 0}, {"step": 9, "changed": {}}]}))
    bare = make(folder / "train_enwik8" / "bare")
    (bare / "params.json").write_text('{"of": "another"}')
    return folder


def test_restored_runs_are_those_that_were_archived(tmp_path):
    """As directories again, and from these the same archive; nothing is written outside the folder."""
    path, count = archive.write(folder_of_runs(tmp_path / "a"))
    assert archive.restore(path, tmp_path / "back" / "a") == count
    before = [[as_text(run) for run in archive.find(str(tmp_path / place / "*" / "*"))[0]] for place in ("a", "back/a")]
    assert before[0] == before[1]
    again, _ = archive.write(tmp_path / "back" / "a")
    first, *lines = path.read_text().splitlines()
    other, *others = again.read_text().splitlines()
    assert (first, lines[1:]) == (other, others[1:])      # but the run that had no settings of its own
    refused("there already", archive.restore, path, tmp_path / "a")
    path.write_text(path.read_text().replace('"run":"s2"', '"run":"../../s2"'))
    refused("leads out of", archive.restore, path, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    refused("no archive", archive.restore, tmp_path / "none.jsonl", tmp_path / "c")


BROKEN = {  # {what is said: [(line, key, its value; ...: none)]}
    "leads out of": [(1, "run", "."), (1, "run", "..")],
    "two runs would lie in one folder": [(1, "run", ""), (1, "run", "s2"), (1, "run", "train_enwik8/s2/x")],
    "as python grid.py archive writes": [
        (1, "run", "a\0b"), (1, "run", 3), (3, "summary", [1]), (3, "command", 3), (3, "command", ["'"]),
        (0, "command", None), (0, "script", ...), (0, "grid", {"script": 3}), (0, "device", ...)],
    "cannot write .*: File name too long": [(1, "run", "x" * 300)]}


def test_a_broken_archive_restores_nothing(tmp_path):
    path, _ = archive.write(folder_of_runs(tmp_path / "a"))
    whole = path.read_text().splitlines()
    for words, line, key, value in [(words, *broken) for words, all_of in BROKEN.items() for broken in all_of]:
        lines = [json.loads(text) for text in whole]
        lines[line] = {name: told for name, told in {**lines[line], key: value}.items() if told is not ...}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused(words, archive.restore, path, tmp_path / "c")
        assert not (tmp_path / "c").exists()


def test_a_run_that_had_not_ended_is_restored_to_begin_anew(tmp_path):
    """Without a checkpoint a summary that names a step would forbid it; the lock says that the folder is a run's. What
    other programs wrote unescaped is a line as well."""
    folder = folder_of_runs(tmp_path / "a")
    for name, status in (("s1", "stopped"), ("s2", "done")):
        (folder / "train_enwik8" / name / "summary.json").write_text(json.dumps({"status": status, "step": 20}))
    (folder / "grid.json").write_text('{"of": "a grid"}')
    path, _ = archive.write(folder)
    first, *lines = path.read_text().splitlines()
    lines = [json.dumps({**json.loads(line), "history": [{"note": "a\u2028b"}]}, ensure_ascii=False) for line in lines]
    path.write_text("\n".join([first, *lines]))
    archive.restore(path, tmp_path / "b")
    s1, s2 = (tmp_path / "b" / "train_enwik8" / name for name in ("s1", "s2"))
    assert is_run(s1) and is_run(s2) and not (s1 / "summary.json").exists() and (s2 / "summary.json").exists()
    assert json.loads((tmp_path / "b" / "grid.json").read_text()) == {"of": "a grid"}
    params = json.loads((s2 / "params.json").read_text())
    assert params["history"] == [{"note": "a\u2028b"}]
    assert params["command"] == ["train_enwik8.py", "--lr", "0.1", "--seed", "2", "--run_name", "s2"]


def as_text(run):
    return json.dumps([run.name, dict(sorted(run.settings.items())), run.summary, run.lines])


def test_nothing_is_lost(tmp_path):
    folder = folder_of_runs(tmp_path / "a")
    path, count = archive.write(folder)
    assert (path, count) == (tmp_path / "a.jsonl", 5)
    kept, (there, unread) = archive.read(path), archive.find(str(folder / "*" / "*"))
    assert list(map(as_text, kept)) == list(map(as_text, there)) and not unread
    assert [run.name for run in kept] == ["bare", "older", "s1", "s2", "s10"] and kept[0].settings == {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["experiment"] == "a" and lines[0]["settings"]["lr"] == 0.1 and lines[0]["grid"] is None
    assert {key: lines[0][key] for key in WORDS} == WORDS
    assert lines[4]["settings"] == {"seed": 2, "run_name": "s2"}
    assert lines[4]["command"] == ["train_enwik8.py", "--lr 0.1", "--seed 2", "--run_name s2"]
    assert "grad_accum" in lines[2]["lacks"] and len(lines[2]["history"]) == 2 and "history" not in lines[3]


def test_what_is_archived_and_what_is_not(tmp_path):
    folder = folder_of_runs(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    refused("no runs", archive.write, tmp_path / "empty")
    busy = folder / "train_enwik8" / "s1" / "lock"
    busy.write_text("")
    with open(busy) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("s1: still being written", archive.write, folder)
    make(folder / "another" / "s1")                          # a name twice: then with its folder
    path, _ = archive.write(folder)
    assert {"another/s1", "train_enwik8/s1", "s2"} <= {run.name for run in archive.read(path)}
    before = path.read_bytes()
    refused("there already", archive.write, folder)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_what_is_no_archive_is_left_out_by_name(tmp_path):
    path, _ = archive.write(folder_of_runs(tmp_path / "a"))
    other, lines = tmp_path / "b.jsonl", path.read_text().splitlines()
    for text in ("", "[1]\n", "{}\n", '{"settings": {}, "grid": 3}\n', "[" * 3000, "\x00"):
        other.write_text(text)
        found, unread = archive.find(f"{tmp_path}/*.jsonl")
        assert len(found) == 5 and unread == [f"{other}: no archive: python grid.py archive writes one"]
    for wrong in ('{"run": "a"}', "[1]", "\xff", lines[2][:-40], lines[2].replace('"line":[', '"line":[7,')):
        other.write_bytes("\n".join([*lines[:2], wrong]).encode("latin-1"))
        with pytest.raises(ValueError, match="line 3 is no run"):
            archive.read(other)
    assert archive.find(str(tmp_path / "c.jsonl"))[1] and archive.find(f"{path}/x*")[1] == [f"{path}: no run x*"]


def test_runs_of_an_archive_by_name(tmp_path):
    path, _ = archive.write(folder_of_runs(tmp_path / "a"))
    for words, names in ((f"{path}/s*", "s1 s2 s10"), (f"{path}/s2, {path}/bare", "s2 bare"),
                         (f"{tmp_path}/a/*/older,{tmp_path}/*.jsonl/s10", "older s10")):
        assert [run.name for run in archive.find(words)[0]] == names.split()


def test_the_commands(plan, in_process, monkeypatch, tmp_path):  # noqa: F811
    """A grid, its archive, and the same tables and pictures of both."""
    monkeypatch.chdir(tmp_path)
    path = plan("better: {set: {kind: better}}", replace=[
        ("[0.5, 1, 2]", "[1]"), ("3, 4, 5]", "3]"), ("speed: {max_steps: 60}", "speed: none")])
    run(path)
    code, out, err = in_process(grid, "archive", "out")
    assert code == 0 and out.startswith("wrote out.jsonl: 5 runs"), err
    for words in (["--table", "{}"], ["{}", "--metric", "loss", "--split", "train", "--over", "seed"]):
        said = []
        for place in ("out", "out.jsonl"):
            place += "/fake/*" * (place == "out" and "--table" not in words)
            done = in_process(plot, *(word.format(place) for word in words), "--out", "a.png")
            said.append((*done, (tmp_path / "a.png").read_bytes()))
        assert said[0] == said[1] and said[0][0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    code, said, _ = in_process(grid, "restore", "out.jsonl", "out")
    assert code == 0 and "restored 5 runs" in said and run(path)
    assert not (tmp_path / "out" / "calls").exists()          # nothing ran again
    for words in (["archive"], ["archive", "nowhere"], ["archive", "out", "x"], ["archive", "out"], ["restore", "a"],
                  ["restore", "out.jsonl", "out"]):
        code, _, err = in_process(grid, *words)
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


# --- The archives of runs/reference ---

PICTURES = {  # of each kind, and those that no table says
    "ladder/table.png": "--table runs/reference/ladder.jsonl",
    "world_actions/table.png": "--table runs/reference/world_actions.jsonl",
    "mult_latents/n_latent.png": "runs/reference/mult_latents.jsonl/*_s* --over n_latent --metric accuracy",
    "dvae_arc/codebook_size.png": "runs/reference/dvae_arc.jsonl/arc_50* --over codebook_size --metric exact",
    "facts_curves/curves.png": "runs/reference/facts_curves.jsonl --metric accuracy",
    "facts_steps/contours.png": "runs/reference/facts_steps.jsonl --contours n_people,n_embd --metric accuracy",
    "facts_exposures/capacity.png": "runs/reference/facts_exposures.jsonl/*in_weight* --capacity",
    "facts_unseen/n_people.png": "runs/reference/facts_unseen.jsonl --over n_people --metric accuracy "
                                 "--only tool,unseen --same dp,tp,block_size",
}


def versions_are_pinned(*packages):
    """Whether these packages are those of constraints.txt: pictures of others have other bytes."""
    pinned = dict(re.findall(r"^(\w+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    return all(importlib.metadata.version(name) == pinned[name] for name in packages)


@pytest.mark.parametrize("picture", PICTURES)
def test_the_pictures_of_the_reference_runs(picture, in_process, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    code, _, err = in_process(plot, *PICTURES[picture].split(), "--out", tmp_path / "a.png")
    assert code == 0, err
    if not versions_are_pinned("matplotlib", "pillow"):
        pytest.skip("drawn by another matplotlib")
    assert (tmp_path / "a.png").read_bytes() == (REFERENCE / picture).read_bytes()


@pytest.mark.parametrize("name, without", [
    ("one_change", ()), ("ladder", ("draws",)), ("multiplication", ()), ("dvae_changes", ()),
    ("world_dynamics", ("parameters", "rate")), ("world_actions", ("parameters", "rate"))])
def test_the_pages_have_the_tables_of_the_reference_runs(name, without):
    """Row by row, but for rows with no run yet; and the counts of verdicts that the text names."""
    found = plot.read_index(REFERENCE / f"{name}.jsonl")
    found["rows"] = [row for row in found["rows"] if row["runs"]]
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    lines = [line.strip("| ").split(" | ") for line in plot.markdown(found)[2:] if line.startswith("|")]
    for line in lines:
        line = " | ".join(cell for column, cell in zip(lines[0], line) if column not in without)
        assert line in pages, line
    words, verdicts = " ".join(pages.split()), [mine.verdict for mine in plot.judge(found).rows]
    counted = [verdicts.count(word) for word in ("undecided", "worse", "better", "the same")]
    if name == "ladder":
        assert "Of {4} rows {2} are better, {1} worse, {3} the same, {0} undecided.".format(*counted, len(verdicts)) \
            in words and "three draws; sigma 0.0112 (154 degrees of freedom)" in words
        fit = plot.judge(found).primary.fit
        assert (round(fit.mean("baseline"), 4), round(fit.sigma, 4), fit.freedom) == (2.7823, 0.0112, 154)
        old = {mine.row["name"]: mine for mine in plot.judge(plot.read_index(REFERENCE / "one_change.jsonl")).rows}
        both = [(old[mine.row["name"]], mine) for mine in plot.judge(found).rows if mine.row["name"] in old]
        assert Counter((before.verdict, now.verdict) for before, now in both) == {
            ("worse", "worse"): 20, ("better", "better"): 1, ("undecided", "undecided"): 21,
            ("undecided", "worse"): 9, ("undecided", "better"): 2, ("undecided", "the same"): 5}
        assert sum(before.effects[""].difference * now.effects["1x"].difference < 0 for before, now in both) == 6
    if name == "one_change":
        assert "That leaves {} rows undecided, {} worse, {} better.".format(*counted) in words
        yaml = (ROOT / "grids" / "one_change.yaml").read_text()
        assert f"sigma_data: {found['sigma_data']}\n" in yaml
        assert f" = {found['sigma_data']}, is what another" in words


def arm(name, pattern, metric="val_bpb_raw", seeds=3):
    """A figure of the seeds of an arm of a published claim, by the name of its runs."""
    runs = archive.read(REFERENCE / "published" / f"{name}.jsonl")
    found = {run.settings["seed"]: run.summary[metric] for run in runs if fnmatch.fnmatchcase(run.name, pattern)}
    assert sorted(found) == [*range(1, seeds + 1)], (name, pattern)
    return np.array([found[seed] for seed in sorted(found)])


def assert_told(values, form="+.4f", page=" ".join((ROOT / "docs" / "published.md").read_text().split())):
    """docs/published.md has the mean and its interval: t s / sqrt(n), t of n - 1 degrees of freedom."""
    mean, half = values.mean(), {3: 4.302653, 10: 2.262157}[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    ends = f"({mean - half:{form}} .. {mean + half:{form}})"
    assert f"{mean:{form}}" in page and ends in page, (f"{mean:{form}}", ends)


@pytest.mark.parametrize("name, one, other", [
    *[("alibi_length", f"positions_{kind}-*-{length}", f"positions_{kind}-x1-s[0-9]-??????????")
      for kind in ("alibi", "rope", "none") for length in (128, 256)],
    ("canon_nope", "positions_none_short_conv_0_lr_0_006-*", "positions_rope_short_conv_0_lr_0_006-*"),
    ("canon_nope", "positions_none_short_conv_4_lr_0_012-*", "positions_rope_short_conv_4_lr_0_012-*"),
    ("canon_nope", "positions_rope_short_conv_4_lr_0_012-*", "positions_rope_short_conv_0_lr_0_006-*"),
    ("cooldown", "schedule_*cooldown*lr_0_006-*", "schedule_cosine_to_10*lr_0_006-*"),
    *[("multi_token", f"steps_{steps}_n_targets_{n}_lr_0_006-*", f"steps_{steps}_n_targets_1_lr_0_006-*")
      for steps in (300, 900) for n in (2, 4)],
    ("tied_head", "*500_tie_weights_true_lr_0_003-*", "*500_tie_weights_false_lr_0_006-*"),
    ("qk_norm_heads", "steps_600*head_4_queries_and_keys_normed-*", "steps_600*head_4_queries_and_keys_plain-*"),
    ("qk_norm_heads", "steps_600*head_64_queries_and_keys_normed-*", "steps_600*head_64_queries_and_keys_plain-*")])
def test_differences_of_published_claims(name, one, other):
    assert_told(arm(name, one) - arm(name, other))


def test_other_figures_of_published_claims():
    """Sensitivity to rates and its ratio, recall at the best rate, Muon after equal steps, the vertices of muP."""
    rates = "0_0003", "0_001", "0_003", "0_01", "0_03", "0_1", "0_3"
    losses = [np.array([arm("qk_norm_rates", f"qk_norm_{norm}_lr_{rate}-*") for rate in rates])
              for norm in ("false", "true")]
    plain, normed = (np.minimum(mine, 8).mean(0) - mine.min(0) for mine in losses)
    assert_told(plain, ".4f")
    assert_told(normed, ".4f")
    page = (ROOT / "docs" / "published.md").read_text()
    logs = np.log(plain / normed)
    ends = np.exp(logs.mean() + np.array([-1, 0, 1]) * 4.302653 * logs.std(ddof=1) / 3 ** 0.5)
    assert "**{1:.2f}** ({0:.2f} .. {2:.2f})".format(*ends) in page
    assert_told(arm("recall_attention", "short_conv_0_lr_0_001-*", "accuracy"), ".3f")
    with_it = arm("recall_attention", "short_conv_4_lr_0_003-*", "accuracy")
    assert f"**{with_it.mean():.3f}**" in page and "{:.3f}, {:.3f}, {:.3f} with it".format(*with_it) in page
    assert_told(arm("muon_steps", "*AdamW*0_006*400-*") - arm("muon_steps", "*Muon*0_02*-*"), ".4f")
    for quantiser, size in ("FSQ", 512), ("FSQ", 4096), ("VQ", 64), ("VQ", 512), ("VQ", 4096):
        assert_told(arm("fsq_usage", f"quantiser_{quantiser}_codebook_size_{size}-*", "val_usage"), ".3f")
    for metric in "val_accuracy_simple", "val_loss_simple", "train_accuracy_simple":
        own, true = (arm("scheduled_sampling", f"reads_{kind}-*", metric, seeds=10)
                     for kind in ("its_own_more_and_more", "true_digits"))
        assert_told(own - true)
        if metric == "val_accuracy_simple":
            assert_told(own, ".4f")
            assert_told(true, ".4f")
            assert ((own < true).sum(), (own > true).sum()) == (7, 2)
    nats = {weight: arm("dvae_kl", f"weight_of_the_KL_{weight}-*", "val_nats") for weight in ("0", "0_1", "1", "6_6")}
    for mine in nats.values():
        assert_told(mine, ".4f")
    assert_told(nats["6_6"] - nats["0"])
    assert_told(nats["6_6"] - nats["1"])
    rates, octaves = ("0_0005", "0_00125", "0_003125", "0_0078125", "0_01953125"), {}
    for kind in ("standard", "mup"):
        names = f"parametrisation_{kind}_n_embd_{{}}_lr_{{}}-*"
        found = {width: np.array([arm("mup_width", names.format(width, rate)) for rate in rates])
                 for width in (48, 192)}
        vertices = {width: np.array([vertex(mine[:, seed]) for seed in range(3)]) for width, mine in found.items()}
        octaves[kind] = vertex(found[192].mean(1)) - vertex(found[48].mean(1))
        assert "(seeds {:+.2f}, {:+.2f}, {:+.2f})".format(*(vertices[192] - vertices[48])) in page
        assert f"**{octaves[kind]:+.2f}**" in page
        assert_told(vertices[192] - vertices[48], "+.2f")
    assert octaves["standard"] <= -1 and abs(octaves["mup"]) < 0.5       # the rule of grids/published/mup_width.yaml


def test_the_noise_of_initialisation_and_of_the_data_apart():
    """The sentence of docs/one-change.md has what plot.py --table says of the noise grid."""
    line = next(line for line in plot.pivot(plot.read_index(REFERENCE / "noise.jsonl")) if "Deviations" in line)
    draw, seed, rest = re.findall(r"0\.\d{4}", line)
    page = " ".join((ROOT / "docs" / "one-change.md").read_text().split())
    assert f"a draw of the data deviates by {draw} bits, an initialisation by {seed}, the rest by {rest}" in page


def test_recall_at_every_rate():
    """docs/facts.md has the first table of plot.py --table, and the best mean of each mixer that its text names."""
    found, page = plot.read_index(REFERENCE / "mqar.jsonl"), (ROOT / "docs" / "facts.md").read_text()
    lines = plot.pivot(found)[2:]
    table = lines[:lines.index("")]
    assert len(table) == 14 and all(line in page for line in table)
    rows = [[float(cell.split()[0]) for cell in line.split(" | ")[2:]] for line in table[2:]]
    assert min(rows[2]) > 0.99 and max(map(max, rows[6:])) < 0.11 and max(rows[5]) < 0.63
    assert all(row.index(max(row)) == 3 for row in rows[9:])


def test_the_rates_of_the_ladder():
    arms = {}
    for tuned in archive.read(REFERENCE / "ladder.jsonl"):
        if tuned.settings["seed"] == 0:                            # which counts nowhere
            name, factor = re.match(r"(.*)-x([\d.]+)-s0-", tuned.name).groups()
            arms.setdefault(name, {}).setdefault(float(factor), []).append(tuned.summary["val_bpb_raw"])
    best = {name: min(found, key=lambda factor: min(found[factor])) for name, found in arms.items()}
    edges = [name for name, found in arms.items() if best[name] in (min(found), max(found))]
    assert (Counter(best.values()), edges) == ({1: 69, 2: 9, 0.5: 3}, [])
    lost = {name: min(found[1]) - min(found[best[name]]) for name, found in arms.items()}
    assert {name: round(bits, 2) for name, bits in lost.items() if bits > 0.01} == {
        "norms_after_the_branches": 0.18, "momentum": 0.14, "IVON": 0.14, "Noam": 0.13, "schedule_free_AdamW": 0.07,
        "LayerScale": 0.05, "constant": 0.04}
    page = " ".join((ROOT / "docs" / "one-change.md").read_text().split())
    assert "of 81 arms 69 are best at x1, nine at x2, three at x0.5, none at an edge" in page


def test_what_one_draw_of_2000_steps_says():
    """The sentence of docs/one-change.md, of the rows whose first draw is there at both lengths."""
    found = plot.read_index(REFERENCE / "ladder.jsonl")
    short = plot.judge(found).rungs[0]
    late = {row["name"]: run["value"] for row in found["rows"] for run in row["runs"]
            if (run["max_steps"], run["seed"]) == (2000, 1)}
    early = {name: short.fit.mean(short.as_one[name]) for name in late}
    kept = Counter((mine.verdict, mine.effects["1x"].difference * (late[name] - late[against]) > 0)
                   for mine in plot.judge(found).rows for name, against in [(mine.row["name"], mine.row["against"])]
                   if {name, against} <= late.keys())
    all_, near = (verdict.ordered_alike(early, late, within) for within in (math.inf, 3 * short.fit.sigma))
    page = " ".join((ROOT / "docs" / "one-change.md").read_text().split())
    assert (f"of {len(late) - 1} rows one draw is in" in page and f"{late['baseline']:.4f} for the baseline" in page
            and "{} of {} that are better keep their sign, {} of {} that are worse".format(*(
                n for word in ("better", "worse") for n in (kept[word, True], kept[word, True] + kept[word, False])))
            in page and f"{all_[0]:.2f} of {all_[1]:,} pairs of rows, {near[0]:.2f} of the {near[1]:,}" in page)
    for name in ("learned positions", "no positions", "Xavier", "AdamW", "minGRU", "short convolution", "low rank",
                 "Mamba", "SwiGLU"):
        assert f"from {early[name] - early['baseline']:+.2f} to {late[name] - late['baseline']:+.2f}" in page, name


def test_the_estimators_of_the_dvae():
    """Rows of docs/dvae.md: mean and deviation of the seeds of each arm, as it is typed."""
    arms, page = {}, (ROOT / "docs" / "dvae.md").read_text()
    for told in archive.find(f"{REFERENCE}/dvae_estimators.jsonl,{REFERENCE}/dvae_synthetic.jsonl/syn128_s?")[0]:
        words = [f" --{name} {n}" for name in ("vq_levels", "vq_heads") if (n := told.settings.get(name, 1)) > 1]
        words += [" --rotation_trick"] * told.settings.get("rotation_trick", False)
        words += [f" --n_codes {told.settings['n_codes']}"] * (told.settings["n_codes"] != 32)
        arms.setdefault(told.settings["estimator"] + "".join(words), []).append(told.summary)
    for name, runs in arms.items():
        def said(metric, form, factor=1):
            found = factor * np.array([summary[f"val_{metric}"] for summary in runs])
            return f"{found.mean():{form}} +- {found.std(ddof=1):{form.strip('+')}}", found
        exact, each = said("exact", ".1f", 100)
        gap = said("soft_hard_gap", "+.2f", 100)[0] if "val_soft_hard_gap" in runs[0] else "none"
        usage, bits = (said(metric, ".2f")[1].mean() for metric in ("usage", "code_bits"))
        seeds = ", ".join(f"{v:.1f}" for v in each)
        row = (f"| `{name}` | {said('accuracy', '.2f', 100)[0]} | {exact} ({seeds}) | "
               f"{bits:.0f} | {usage:.0%} | {said('perplexity', '.1f')[0]} | {gap} | {said('nats', '.2f')[0]} |")
        assert row.replace("%", " %", 1) in page, row
    assert {len(runs) for runs in arms.values()} == {3}


def test_the_worlds_that_were_played():
    """Rows of docs/worldmodel.md, and the decibels of the tokenizers that it names."""
    page = (ROOT / "docs" / "worldmodel.md").read_text()
    runs = {told.name: told.summary for told in archive.read(REFERENCE / "world_runs.jsonl")}
    for name in "played_s2", "played_s2_batch_8", "box_s1", "box_latent":
        cells = [f"{runs[name][f'play_{what}']:.3f}" for what in ("agent", "effect", "ball", "stay", "free", "blocked")]
        assert " | ".join([*cells, f"{runs[name]['play_first_slip']:g} |"]) in page, name
    found = [runs[f"box_{name}"]["tokenizer_psnr"] for name in ("vq_s1", "vq_s2", "vq_reset", "fsq", "fsq_600")]
    assert [round(psnr, 1) for psnr in found] == [26.5, 22.6, 12.7, 100, 25.3]
    assert "16.4, 26.5 and 22.6 dB" in page and f"agent is there in {runs['played_s2_less']['play_agent']:.3f}" in page


def vertex(losses):
    """Octaves of the parabola's vertex through the least of losses at rates 2.5 apart, and its neighbours."""
    at = int(losses.argmin())
    a, b, c = losses[at - 1:at + 2]
    return math.log2(2.5) * (at + (a - c) / (2 * (a - 2 * b + c)))


def test_the_archives_of_the_reference_runs():
    """All can be read, and the runs that a grid's table is made of say what it says."""
    count = 0
    for path in REFERENCE.rglob("*.jsonl"):
        runs, index = {run.name: run for run in archive.read(path)}, archive.read_grid(path)
        count += len(runs)
        for entry in (entry for row in index.get("rows", ()) for entry in row["runs"]):
            assert runs[entry["run"]].summary[index["metric"]] == pytest.approx(entry["value"], rel=1e-5)
    assert count == 2167
