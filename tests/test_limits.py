"""Every setting of every script at, beyond and far beyond its bounds; models and batches that cannot be held."""
import functools
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanolab import limits, settings as flags
from nanolab.run import UserError, override

ROOT = Path(flags.__file__).parents[1]
TRAINERS = ("train_enwik8", "train_mult", "train_dvae", "train_worldmodel", "train_facts")
TOOLS = ("sample", "evaluate", "grid", "plot", "bench", "nanolab/probe")
ODD = ["", " ", "x", "-", ",", "1,2", "nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "1e38", "1e-37", "0", "-1",
       "1.5", "12", "1000000", str(10 ** 12), str(2 ** 63 - 1), str(2 ** 63), str(-2 ** 63 - 1), str(10 ** 25),
       "9" * 5000, "none", "true", "\N{FOX FACE}", "\N{ARABIC-INDIC DIGIT THREE}", "a\nb", "x" * 300]


@functools.lru_cache
def opened(script):
    """The globals of a script and its settings, read once."""
    g = runpy.run_path(str(ROOT / f"{script}.py"))
    return (g["check"] if "check" in g else g["main"].__wrapped__).__globals__, flags._read_settings(g["__file__"])


def tried(script, words):
    """What becomes of a command line: a UserError's line, or "" where flags and check() take it."""
    g, specs = opened(script)
    for name, spec in specs.items():
        g[name] = spec.default
    try:
        settings = override(g, words)
        if "check" in g:
            quiet = {name: value for name, value in g.get("debug_settings", {}).items()
                     if name not in settings.explicit}
            settings.update(quiet)
            g.update(quiet)
            g["check"](settings)
            if script == "train_worldmodel":                  # what its own world would look like
                clips = SimpleNamespace(length=settings["length"])
                pixels = settings["side"] * settings["cell_px"]
                g["check_sizes"](settings, SimpleNamespace(height=pixels, width=pixels, palette=range(4), n_actions=5,
                                                           train=clips, val=clips, cell_px=settings["cell_px"]))
    except UserError as error:
        return str(error)
    return ""


def values(spec):
    """Words to type for a setting: those around its bounds, its choices, and odd ones."""
    found = [*(ODD if spec.kind in (int, float) else ODD[:6] + ODD[-4:]), *spec.words]
    for _, bound in spec.bounds:
        bound = float(bound)
        if bound == 1000:                                    # layers: so many take a second to count
            found.append("1001")
            continue
        found += [repr(number) for number in (bound, math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf))]
        found += [str(int(bound) + step) for step in (-1, 0, 1)]
    if isinstance(spec.default, tuple):
        kept = [flags.as_typed(value) for value in spec.default]
        found += [",".join([word, *kept[1:]]) for word in found] + [",".join([*kept[:-1], word]) for word in found]
    return dict.fromkeys(found)


@pytest.mark.parametrize("script", [*TRAINERS, *TOOLS])
def test_every_setting_is_taken_or_refused_in_a_line(script, monkeypatch, capsys):
    """By flags or by the script's own check: never a traceback, and nothing is built that has no room."""
    g, specs = opened(script)
    source = (path.read_text() for path in (ROOT / f"{script}.py", ROOT / "model.py", *ROOT.glob("models/*.py")))
    words = set(re.findall(r"\.(\w+)", "".join(source)))
    monkeypatch.setattr(flags, "_read_settings", lambda path: specs)     # parsed once
    shape, known, weigh, taken = g.get("architecture", ()), {}, limits.weigh, 0
    shape = [name for part in shape.values() for name in part] if isinstance(shape, dict) else shape

    def read(value):                                         # what a model can read of what it is built from
        return {name: read(part) for name, part in vars(value).items() if name in words} if (
            hasattr(value, "__dict__")) else value

    def weighed(build, device):                              # a model of the same shape is not weighed again
        key = repr(([g.get(name) for name in shape], [read(cell.cell_contents) for cell in build.__closure__ or ()]))
        if key not in known:
            known[key] = weigh(build, device) and None
    monkeypatch.setattr(limits, "weigh", weighed)
    for name, spec in specs.items():
        for value in values(spec):
            try:
                said = tried(script, [f"--{name}={value}"])
            except SystemExit:
                raise AssertionError(f"--{name}={value} ends the script") from None
            except Exception as error:
                raise AssertionError(f"--{name}={value[:40]}: {type(error).__name__}: {error}") from error
            assert "\n" not in said and len(said) < 1000, (name, value)
            taken += not said
    assert taken > len(specs), "and most settings have another value than their own"


@pytest.mark.parametrize("script, line, says", [
    ("train_enwik8", "--n_layer 1000000", "must be >= 1 and <= 1000"),
    ("train_enwik8", "--n_layer 1000 --n_embd 8192", "parameters and more cannot be held"),
    ("train_enwik8", f"--batch_size {10 ** 12}", "windows of 32 bytes cannot be held"),
    ("train_enwik8", f"--n_embd {10 ** 25}", "whole numbers have 64 bits"),
    ("train_enwik8", "--positions rope --mixer mamba --expand 1e308", "as float32 holds them"),
    ("train_enwik8", "--positions rope --mixer mamba --expand 1e30", "cannot be held"),
    ("train_enwik8", "--mixer mla --positions rope --qk_norm", "qk_norm normalises keys, which mixer 'mla' never"),
    ("train_facts", "--mixer mla --qk_norm", "qk_norm normalises keys, which mixer 'mla' never forms"),
    ("train_facts", f"--task mqar --n_rows {10 ** 12}", "cannot be held"),
    ("train_mult", f"--n_embd {2 ** 40}", "cannot be held"),
    ("train_mult", f"--n_examples {10 ** 12}", "cannot be held"),
    ("train_dvae", f"--codebook_size {2 ** 60}", "cannot be held"),
    ("train_dvae", f"--batch_size {10 ** 12}", "grids cannot be held"),
    ("train_dvae", "--estimator fsq --codebook_size 11", "no product of levels"),
    ("train_worldmodel", f"--dynamics_embd {2 ** 40}", "cannot be held"),
    ("train_worldmodel", f"--tokenizer_batch {10 ** 12}", "clips cannot be held"),
    *[(script, f"--{name} {value}", "must be") for script in TRAINERS for name, value in (
        ("betas", "0.9,1.0"), ("betas", "1,1"), ("eps", "0"), ("seed", "-1"), ("data_seed", "-1"), ("seed", 2 ** 63))]])
def test_refused_before_anything_is_made(script, line, says):
    assert says in tried(script, line.split())


@pytest.mark.parametrize("script", TRAINERS)
def test_what_is_allowed(script):
    assert tried(script, ["--muon_momentum", "0", "--optimizer", "muon"]) == ""
    assert tried(script, ["--seed", str(2 ** 63 - 1)]) == ""


def test_weighing_draws_nothing_and_knows_its_own_errors():
    before = torch.get_rng_state()
    made = limits.weigh(lambda: torch.nn.Linear(3, 4))
    assert made.weight.is_meta and torch.equal(before, torch.get_rng_state())
    with pytest.raises(TypeError, match="positional"):       # a bug stays one
        limits.weigh(lambda: torch.nn.Linear())
    assert not limits.register_module_parameter_registration_hook.__globals__["_global_parameter_registration_hooks"]


def test_checks_do_not_import_the_compiler():
    """Which takes longer than all else before the first step."""
    code = ("import sys; sys.path.insert(0, 'tests'); import test_limits as t\n"
            "for script in t.TRAINERS: assert t.tried(script, []) == '', script\n"
            "assert not {'sympy', 'torch._dynamo'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_notes(capsys):
    settings, noam = (flags.Settings(schedule=name, warmup_steps=10) for name in ("cosine", "noam"))
    limits.notes(settings, {"max_steps": 20}, {"max_steps": 20})
    limits.notes(noam, {"max_steps": 20}, {"max_steps": 10})
    limits.notes(settings, {"max_steps": None})
    assert capsys.readouterr().out == ""
    limits.notes(settings, {"max_steps": 20}, {"max_steps": 12})
    assert capsys.readouterr().out.startswith("max_steps 20 was 12: the rate of schedule cosine is computed anew")
    limits.notes(settings, {"max_steps": 5})
    assert capsys.readouterr().out == ("warmup_steps 10 of max_steps 5: the rate rises to the end and never reaches "
                                       "its peak\n")


@pytest.mark.parametrize("columns", ["20", "80", "300"])
@pytest.mark.parametrize("script", [*TRAINERS, *TOOLS])
def test_help_fits(script, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["x", "-h"])
    with pytest.raises(SystemExit):
        flags.answer_help("__main__", str(ROOT / f"{script}.py"))
    lines = capsys.readouterr().out.splitlines()
    assert 60 < max(map(len, lines)) <= min(120, max(80, int(columns)))
    assert sum(len(line.strip()) == 1 for line in lines) < 4, "no column of single letters"


@pytest.mark.parametrize("words", ["sample.py", "-m nanolab.runs list", "data/mqar.py"])
def test_help_into_a_closed_pipe(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *words.split(), "-h"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE,
                          text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 141)
