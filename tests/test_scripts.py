"""The commands and links of the README and of docs, and a newcomer's mistakes, typed as a person types them."""
import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
import scripts
import train_enwik8
from data import text
from model import Transformer, from_checkpoint
from nanolab import runs
from nanolab.run import load_checkpoint, override
from nanolab.score import score
from forks import assert_done, snapshot, wait_for

SCRIPTS = ("train_enwik8.py", "train_mult.py", "train_dvae.py", "train_worldmodel.py", "train_facts.py",
           "evaluate.py", "sample.py", "bench.py", "grid.py", "plot.py", "nanolab/probe.py")
SMALL = ("--n_layer 2 --n_head=2 --n-embd 32 --block_size 32 --batch_size 4 --max_bytes 100000 --max_steps 30 "
         "--eval_interval 10 --eval_windows 8 --save_interval 10 --sample_length 60 --ema_decay 0.9 "
         "--device cpu").split()


def shell(folder, *words):
    """`python words...` in a process of its own; .stdout and .stderr are pipes, as under `| tee`."""
    environment = {name: value for name, value in os.environ.items() if name != "NANOLAB_DATA"}
    return subprocess.run([sys.executable, str(ROOT / words[0]), *map(str, words[1:])], cwd=folder, capture_output=True,
                          text=True, errors="replace", env=environment | {"OMP_NUM_THREADS": "1"}, timeout=120)


def fresh(script):
    """The script's globals, as a new module: what a test sets in it is nobody else's."""
    spec = importlib.util.spec_from_file_location(f"fresh_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def typed(home):
    """The README's first command, made small."""
    return shell(home, "train_enwik8.py", "--preset", "cpu", *SMALL, "--run_name", "first")


@pytest.fixture(scope="module")
def run(home, typed):
    """The directory of its run."""
    assert (typed.returncode, typed.stderr) == (0, ""), typed.stderr
    return home / "runs" / "train_enwik8" / "first"


# ------------------------------------------------------------------------------------------------------ what is shown

def test_first_command(typed, run):
    """Speed and time left on the way, then validation with protocol and byte count, a sample, and where it all lies."""
    out = typed.stdout
    assert "the standard library of Python" in out and re.search(r"step \d+/30: loss \d\.\d+, .* left\n", out)
    found = re.search(r"val (\d\.\d{4}) bits/byte = .*protocol block, 5,000 bytes, raw weights", out)
    summary = json.loads((run / "summary.json").read_text())
    assert float(found[1]) == round(summary["val_bpb_raw"], 4) < 8
    assert "5,000 bytes, ema weights" in out and summary["val_bpb_ema"] != summary["val_bpb_raw"]
    sample = (run / "samples" / "step_00000030.txt").read_text()
    assert len(sample) > 20 and sample in out
    assert out.rstrip().endswith(str(Path("runs/train_enwik8/first")))


def test_run_directory(run):
    assert {path.name for path in run.iterdir()} == set(
        "params.json code metrics.jsonl last.pt best.pt summary.json curves.png samples lock".split())
    code = {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*.py")}
    assert code >= {"train_enwik8.py", "model.py", "nanolab/optim.py", "nanolab/cache.py", "data/text.py"}
    params = json.loads((run / "params.json").read_text(), parse_constant=pytest.fail)
    assert params["settings"]["n_layer"] == 2 and params["settings"]["norm"] == "rms"       # a flag; the preset
    assert params["settings"].keys() == override(fresh("train_enwik8.py"), []).keys()
    assert "--preset" in params["command"] and "git" in params
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in trained] == [10, 20, 30] and len(trained) < len(lines)
    assert trained[0].keys() >= {"loss", "bpb", "lr", "grad_norm", "tokens_per_s", "mfu", "seconds", "epoch"}
    assert all(line["loss"] / math.log(2) == pytest.approx(line["bpb"]) for line in lines)
    summary, sizes = json.loads((run / "summary.json").read_text()), ("batch_size", "grad_accum", "block_size")
    assert min(line["bpb"] for line in lines if line["split"] == "val" and "windows" in line["protocol"]
               and line["weights"] == "ema") == summary["best_bpb"]
    assert summary["bytes"] == 30 * math.prod(params["settings"][name] for name in sizes)


def test_debug(forks, tmp_path):
    """Tiny, short, and nothing is logged outside, whatever the flags say."""
    words = "--debug --run_name a --wandb online --tensorboard --device cpu".split()
    assert_done(forks.run(["train_enwik8.py", *words], tmp_path))
    run = tmp_path / "runs" / "train_enwik8" / "a"
    settings = json.loads((run / "params.json").read_text())["settings"]
    assert settings["n_layer"] == 2 and settings["max_steps"] == 20 and settings["debug"] is True
    assert not (run / "wandb").exists() and not (run / "tensorboard").exists()
    assert load_checkpoint(run / "last.pt")["step"] == 20


def test_profile(forks, tmp_path):
    """Of three optimiser steps, both models' of train_mult.py."""
    child = forks.run(scripts.typed("train_mult", tmp_path, "--profile", max_steps=3), tmp_path)
    assert_done(child)
    path = scripts.folder("train_mult", tmp_path) / "trace.json"
    trace = json.loads(path.read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"]) and "Self CPU" in child.out
    assert f"profile of 3 steps: {path}" in child.out


def test_estimate_without_gpu(forks, tmp_path):
    """A run that will take days says so within its first seconds, and names the preset."""
    words = ["train_enwik8.py", "--preset", "cpu", *SMALL, "--max_steps", 10 ** 9, "--run_name", "long"]
    child, metrics = forks.start(words, tmp_path), tmp_path / "runs" / "train_enwik8" / "long" / "metrics.jsonl"
    late = re.compile(r'"seconds": (2\.[5-9]|[3-9])')
    wait_for(lambda: child.over() or metrics.exists() and late.search(metrics.read_text()))
    child.kill(2)
    assert child.wait().code == 130
    said = [line for line in child.out.splitlines() if "hours" in line]
    assert len(said) == 1 and "1,000,000,000 steps" in said[0] and "--preset cpu" in said[0]


def test_import_runs_nothing(forks):
    """Of any script, in the process that all others are forks of; and nothing is imported that not every run needs."""
    assert (forks.folder / "server").read_text().splitlines()[0] == "imported set()"
    assert not any(path.is_dir() for path in forks.folder.iterdir()), "nothing is written"


# ------------------------------------------------------------------------------------------------ evaluate and sample

def test_evaluate(forks, home, run):
    """The block figure is the trainer's own last one; a directory means its last.pt; the batch size changes nothing."""
    with ThreadPoolExecutor(2) as pool:
        done, more = pool.map(lambda words: forks.run(["evaluate.py", *words], home), (
            ["runs/train_enwik8/first"],
            [run / "last.pt", "--protocols", "block,stride:8,cache", "--weights", "ema", "--batch_size", 5]))
    assert_done(done)
    assert_done(more)
    summary, row = json.loads((run / "summary.json").read_text()), r"val +{} +(\d\.\d{{4}}) .* 5,000 "
    assert re.search(row.format("block"), done.out)[1] == f"{summary['val_bpb_raw']:.4f}"
    assert re.search(row.format("block"), more.out)[1] == f"{summary['val_bpb_ema']:.4f}"
    assert re.search(row.format("stride:8"), more.out) and re.search(row.format("cache"), more.out)
    checkpoint = load_checkpoint(run / "last.pt")
    val = text.load("stdlib", 100_000).val
    for weights in ("raw", "ema"):
        found = score(from_checkpoint(checkpoint, weights).for_inference().eval(), val, "block", 7)
        assert found.bytes == 5000 and found.bpb == pytest.approx(summary[f"val_bpb_{weights}"], abs=1e-6)


def test_sample(forks, home, run):
    """Same seed, same text, from the directory or the file; several come as one batch."""
    how = ["--prompt", "import ", "--length", 40]
    with ThreadPoolExecutor(2) as pool:
        one, same, other, three = pool.map(lambda words: forks.run(["sample.py", *words, *how], home), (
            ["runs/train_enwik8/first"], [run / "last.pt"], [run, "--seed", 8], [run, "--n_samples", 3]))
    for child in (one, same, other, three):
        assert_done(child)
    assert one.out == same.out != other.out and same.out.startswith("import ") and len(same.out.encode()) > 40
    parts = re.split(r"--- sample \d of 3 ---\n", three.out)
    assert parts[0] == "" and len(parts) == 4 == len(set(parts))
    assert all(part.startswith("import ") for part in parts[1:])


# ----------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {  # of train_enwik8.py
    "--n_layr 4": ["n_layr", "n_layer"],
    "cpu": ["--preset cpu"],
    "--optimizer adamv": ["optimizer", "adamw"],
    "--n_embd 30 --n_head 4": ["30", "4", "n_head"],
    "--n_head 4 --n_kv_head 3": ["n_kv_head", "3"],
    "--max_steps none": ["max_steps", "intermediate_losses"],
    "--schedule cosine --max_steps none --no-intermediate_losses": ["cosine", "max_steps"],
    "--dataset shakspeare": ["shakspeare", "shakespeare"],
    "--debug --block_size 200000 --device cpu": ["block_size"],
    "--preset cpu --resume no/such.pt": ["no/such.pt"],
    "--debug --device cuda:77": ["cuda:77"],
    "--debug --run_name ../up --device cpu": ["../up"],
}


def test_mistakes(in_process, monkeypatch, tmp_path):
    """One line that says what is wrong, status 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    for line, said in MISTAKES.items():
        code, _, err = in_process(train_enwik8, *shlex.split(line))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (line, err)
        assert all(word in err for word in said) and snapshot(tmp_path) == {}, (line, err)


@contextlib.contextmanager
def noting(what):
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


# ------------------------------------------------------------------------------------------------ settings, in-process

@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith("train_")])
def test_presets_are_legal(script):
    """Every preset passes the parser and the script's own check, alone and with a flag over it."""
    presets = fresh(script)["presets"]
    assert "cpu" in presets
    for preset in presets:
        g = fresh(script)
        g["check"](override(g, ["--preset", preset, "--batch_size", "3"]))
        assert g["batch_size"] == 3 and g["preset"] == preset


@pytest.mark.parametrize("words, training, inference", [
    ("--n_layer 12 --block_size 512", 44.17, 41.16), ("--preset t12", 44.17, 41.16), ("--preset t64", 235.0, None)])
def test_parameter_counts(words, training, inference):
    """Al-Rfou et al.: T12 44.17M in training and 41.16M at inference, T64 235.0M; nothing is allocated."""
    g = fresh("train_enwik8.py")
    config = g["check"](override(g, words.split()))
    with torch.device("meta"):
        model = Transformer(config)
    assert model.n_params() / 1e6 == pytest.approx(training, abs=0.005 if training < 100 else 0.05)
    if inference:
        assert model.for_inference().n_params() / 1e6 == pytest.approx(inference, abs=0.005)


# ---------------------------------------------------------------------------------------------------- README and docs

TEST_COMMAND = "pip install -r requirements.txt -c constraints.txt && pytest tests/"
FIRST_COMMAND = "pip install -r requirements.txt -c constraints.txt && python train_enwik8.py --preset cpu"


def python_commands(lines):
    """The words after `python` of every command in these lines that starts a script."""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        line = line.strip().removeprefix("$ ").removeprefix("!")
        line = re.sub(r"^(srun )?torchrun( --\S+)+ ", "python ", line)
        line = re.sub(r"\bpython -m (nanolab|models)\.(\w+)", r"python \1/\2.py", line)
        if not re.search(r"\bpython3? +\S+\.py\b", line):
            continue
        for part in re.split(r"&&|\|\|?|;", re.sub(r"\s#.*", "", line)):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)                                 # NANOLAB_DATA=... python ...
            if len(words) > 1 and re.fullmatch(r"python3?", words[0]) and words[1].endswith(".py"):
                yield words[1:]


def assert_typable(command, empty):
    """The script is there, and takes these words; `empty`: a folder without runs."""
    script, words = command[0], [word for word in command[1:] if word not in ("&", ">", "...", "-h", "--help")]
    assert (ROOT / script).is_file(), f"{script} is not there"
    g = fresh(script)
    try:
        if script == "nanolab/runs.py":                       # words of its own: among no runs all do nothing
            runs.main([*words, "--out_dir", str(empty)])
        elif {"override", "begin"} & set(g):
            bare = next((name for name in ("checkpoint", "grid", "runs") if name in g), None)
            settings = override(g, [] if words[:1] in (["archive"], ["restore"]) else words, positional=bare)
            if "check" in g:
                g["check"](settings)
        elif hasattr(g["main"], "read"):                     # of data/
            g["main"].read(words)
        else:                                                # discrete.py's words are names of its own
            assert all(f'"{word}"' in (ROOT / script).read_text() for word in words)
    except Exception as error:
        raise AssertionError(f"{' '.join(command)}: {type(error).__name__}: {error}") from error


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```\n", re.M | re.S)


def test_first_commands():
    """The README opens with what this is, then the two commands; the workflow and .ci/run type the same ones."""
    readme, ci, public = (ROOT.joinpath(name).read_text() for name in (
        "README.md", ".ci/run", ".github/workflows/tests.yml"))
    assert TEST_COMMAND in ci.splitlines() and TEST_COMMAND in readme and FIRST_COMMAND in readme
    assert readme.index(FIRST_COMMAND) < 3000
    assert f"run: {TEST_COMMAND}\n" in public and f"run: {FIRST_COMMAND}\n" in public
    wanted, held = ((ROOT / f"{name}.txt").read_text().splitlines()[1:] for name in ("requirements", "constraints"))
    for package, version in zip(wanted, held, strict=True):   # lower bounds, and for each what was tested
        assert re.match(r"[a-z-]+>=[0-9.]+(; .*)?$", package), package
        assert re.match(re.match(r"[a-z-]+", package)[0] + r"==[0-9.]+(; .*)?$", version), version


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_pages(page, tmp_path):
    """Every command in a block; a page of docs opens with its own."""
    source = page.read_text()
    found = [words for block in FENCED.findall(source) for words in python_commands(block.splitlines())]
    if page.parent == ROOT / "docs":
        assert re.match(r"# [^\n]+\n\n```sh\n", source) and found
    elif page.name == "README.md":
        assert {words[0] for words in found} >= {"train_enwik8.py", "plot.py", "grid.py", "evaluate.py", "sample.py"}
    for words in found:
        assert_typable(words, tmp_path)


def test_the_notebook(forks, tmp_path, monkeypatch):
    """docs/colab.ipynb, its code cells in their order, outside of Colab, by --debug; in a new session the first ones go
    on with the run; what is installed leaves torch as it is."""
    book, said, others, pictures = json.loads((ROOT / "docs" / "colab.ipynb").read_text()), [], [], []
    assert book["nbformat"] == 4 and {cell["cell_type"] for cell in book["cells"]} == {"code", "markdown"}
    assert not any(cell.get("outputs") for cell in book["cells"])
    display = types.SimpleNamespace(Image=lambda path: pictures.append(Path(path).read_bytes()[:4]))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "google", None)                         # Colab's, which others have as well
    monkeypatch.chdir(tmp_path)

    def shell(line):
        words = shlex.split(line)
        if words[0] != "python":
            return others.append(words)
        child = forks.run(words[1:], tmp_path)
        assert child.code == 0, child.err
        said.append(child.out)
    for session in range(2):
        names = {"shell": shell}
        for cell in [cell for cell in book["cells"] if cell["cell_type"] == "code"]:
            source = "".join(cell["source"]).replace('"--preset cpu"', '"--debug --device cpu"').replace("1200", "22")
            source = re.sub(r"^!(.*)$", r"shell(f'''\1''')", source, flags=re.M)  # which fills {NAME} in, as IPython
            exec(re.sub(r"^%cd nanolab$", "", source, flags=re.M), names)
            if len(said) > 5:
                break
    run = tmp_path / "runs" / "train_enwik8" / "first"
    assert load_checkpoint(run / "last.pt")["step"] == 22 and "<title>runs/train_enwik8/first</title>" in (
        tmp_path / "runs" / "first.html").read_text() and pictures == [b"\x89PNG"]
    first, sample, scored, more, _, again = said
    assert "starting at step 0" in first and "done at step 20" in first and sample.startswith("def ")
    assert "block" in scored and "resuming from" in more and "done at step 22" in more and "done at step 22" in again
    assert [" ".join(words[:2]) for words in others] == ["[ -d", "pip install"] * 2
    assert others[1][2:] == ["-q", "-r", "requirements.txt"]


def anchors(page):
    """The anchors of a page's headings, as its reader's browser knows them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages(page):
    """Every link within the repository: its file is there, and its heading; so are the tests and runs that are named;
    and the README leads to every page."""
    source = FENCED.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", source) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file() and there.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(there), link
    for name in re.findall(r"`(?:tests/)?(test_\w+\.py)", source):
        assert (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"runs/reference/[\w./*-]*\w", page.read_text()):          # also with wildcards
        assert list(ROOT.glob(re.sub(r"\.jsonl/.*", ".jsonl", name))), name
    if page.name == "README.md":
        assert {link for link in links if link.startswith("docs/")} >= {
            f"docs/{other.name}" for other in PAGES if other.parent == ROOT / "docs"}


def test_the_readme_says_what_the_pages_say():
    """Its table has the changes of the page that are better and the eight worse by most; it fits a screen or two."""
    readme, page = (ROOT.joinpath(name).read_text().splitlines() for name in ("README.md", "docs/one-change.md"))
    start = readme.index("## Did it matter?")
    head, rule, *rows = [line for line in readme[start:start + 30] if line.startswith("|")]
    table = page[page.index(head) + 2:]
    table = sorted(table[:table.index("")], key=lambda line: float(line.split(" | ")[2].split()[0]))
    assert rows == [line for line in table if "**better**" in line] + [
        line for line in table[::-1] if "**worse**" in line][:8] and len(rows) == 15 and len(readme) <= 250


@pytest.mark.parametrize("script", [*SCRIPTS, "data/text.py", "data/arc.py", "data/tokens.py", "data/smollm.py",
                                    "data/facts.py", "data/mqar.py"])
def test_commands_in_docstrings(script, tmp_path):
    doc = fresh(script)["__doc__"]
    found, page = list(python_commands(doc.splitlines())), re.search(r"docs/[\w-]+\.md", doc)
    assert found and (page or "data" in script) and (not page or (ROOT / page[0]).is_file())
    for words in found:
        assert_typable(words, tmp_path)
