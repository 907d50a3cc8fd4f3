"""Limits: every setting of every script at, beyond and far beyond its bounds; models and batches that cannot be held."""
import functools
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flags
import limits
from experiment import UserError, override

ROOT = Path(flags.__file__).parent
TRAINERS = ("train_enwik8", "train_mult", "train_dvae", "train_worldmodel", "train_facts")
TOOLS = ("sample", "evaluate", "grid", "plot", "bench", "probe")
ODD = ["", " ", "x", "-", ",", "1,2", "nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "1e38", "1e-37", "0", "-1", "1.5",
       "12", "1000000", str(10 ** 12), str(2 ** 63 - 1), str(2 ** 63), str(-2 ** 63 - 1), str(10 ** 25), "9" * 5000,
       "none", "true", "\N{FOX FACE}", "\N{ARABIC-INDIC DIGIT THREE}", "a\nb", "x" * 300]


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
            quiet = {name: value for name, value in g["debug_settings"].items() if name not in settings.explicit}
            settings.update(quiet)
            g.update(quiet)
            more = []
            if script == "train_worldmodel":                  # what its own world would look like
                clips = SimpleNamespace(length=settings["length"])
                pixels = settings["side"] * settings["cell_px"]
                more = [SimpleNamespace(height=pixels, width=pixels, palette=range(4), n_actions=5, train=clips,
                                        val=clips, cell_px=settings["cell_px"])]
            g["check"](settings, *more)
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
    monkeypatch.setattr(flags, "_read_settings", lambda path: specs)     # parsed once
    shape, known, weigh, taken = g.get("architecture", ()), {}, limits.weigh, 0
    shape = [name for part in shape.values() for name in part] if isinstance(shape, dict) else shape

    def weighed(build, device):                              # a model of the same shape is not weighed again
        key = repr(([g[name] for name in shape], [cell.cell_contents for cell in build.__closure__ or ()]))
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
