"""Settings: every accepted and every refused form of the command line, presets, -h, and what a resume adopts."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from choices import refused
from model import TransformerConfig
from nanolab import settings as flags
from nanolab.run import UserError, adopt, override
from nanolab.settings import ROOT, serve
from test_scripts import SCRIPTS, fresh

SOURCE = '''"""A script for tests.

    python script.py --preset small          # a command
"""
import math

LIMIT = 3
_hidden = 4
computed = math.pi

# --- Run ---
preset = None              # a named set of settings
run_name = None            # name of the run
out_dir = "runs"           # where
resume = False             # [path] bare: the newest; --resume PATH: that checkpoint
compile = False            # torch.compile
tie = True                 # on unless said otherwise
max_steps = 1000           # [none, >= 0] steps in all
checkpoint = ""            # what to read

# --- Model ---
n_layer = 12               # [>= 1] blocks
n_kv_head = None           # [none, >= 1] heads
scale = None               # [none, > 0.0] factor
dropout = 0.1              # [>= 0, < 1] probability
lr = 1e-3                  # [> 0] rate
shift = -1.5               # any number
norm = "layer"             # [layer, rms] normalisation
positions = "rope"         # [learned, rope, none] positions
residual_scale = 1.0       # [> 0.0, depth] factor or depth
betas = (0.9, 0.95)        # [>= 0, < 1] two numbers
sizes = (1, 2)             # whole numbers
mixed = (1, 0.5)           # numbers

presets = {
    "small": dict(n_layer=2, betas=(0.5, 0.6), max_steps=None),
    "large": dict(n_layer=48, norm="rms", lr=1),
}
architecture = ("n_layer", "norm")


def main():
    later = 1


after = 5
'''


@pytest.fixture
def g(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE)
    return runpy.run_path(str(path))


ACCEPTED = {  # {setting: {what is typed: its value}}
    "n_layer": {"--n_layer 6": 6, "--n_layer=6": 6, "--n-layer 6": 6, "--n-layer=6": 6, "--n_layer 1_0": 10,
                "--n_layer 3 --n_layer 4": 4, "--preset small": 2, "--preset none": 12, "--preset small --n_layer 5": 5,
                "--n_layer 5 --preset small": 5},
    "compile": {"--compile": True, "--no-compile": False, "--no_compile": False, "--compile --no-compile": False,
                "--compile=true": True, "--compile false": False, "--compile 1": True, "--compile yes": True,
                "--compile --n_layer 3": True},
    "tie": {"--no-tie": False, "--tie 0": False, "--tie no": False, "--tie False": False},
    "max_steps": {"--max_steps none": None, "--max_steps=None": None, "--max_steps 0": 0, "--preset small": None},
    "n_kv_head": {"--n_kv_head 4": 4, "--n_kv_head none": None},
    "scale": {"--scale 2": 2.0, "--scale 0.5": 0.5},
    "dropout": {"--dropout 0": 0.0, "--dropout .5": 0.5},
    "lr": {"--lr 1": 1.0, "--lr 3e-4": 3e-4, "--preset large": 1.0},
    "shift": {"--shift -2": -2.0, "--shift -2e-1": -0.2, "--shift=-2.5": -2.5},
    "norm": {"--norm rms": "rms", "--preset large --preset small": "layer"},
    "positions": {"--positions none": "none"},
    "residual_scale": {"--residual_scale depth": "depth", "--residual_scale 0.5": 0.5},
    "betas": {"--betas 0.8,0.9": (0.8, 0.9), "--betas=0,0.9": (0.0, 0.9), "--betas (0.8,0.9)": (0.8, 0.9),
              "--preset small": (0.5, 0.6)},
    "sizes": {"--sizes 3,4": (3, 4), "--sizes -3,4": (-3, 4)},
    "mixed": {"--mixed 2,3": (2.0, 3.0)},
    "run_name": {"--run_name test": "test", "--run_name=": "", "--run_name=--odd": "--odd", "--run_name none": None},
    "out_dir": {"--out_dir a=b": "a=b", "--out_dir=a=b": "a=b"},
    "resume": {"--resume": True, "--resume --compile": True, "--resume runs/a/last.pt": "runs/a/last.pt",
               "--resume=runs/a": "runs/a", "--resume 1": "1", "--resume=true": True, "--resume false": False,
               "--no-resume": False},
    "preset": {"--preset small": "small"},
}


def test_accepted(g):
    for name, line, value in [(name, line, value) for name, lines in ACCEPTED.items() for line, value in lines.items()]:
        settings = override(g, line.split())
        assert settings[name] == g[name] == value and type(settings[name]) is type(value), line
        if isinstance(value, tuple):
            assert [type(item) for item in settings[name]] == [type(item) for item in value], line


MUST = [  # setting, what it must be, wrong values
    ("n_layer", "a whole number >= 1", ["", "1.5", "1e5", "six", "none", "true", "inf", "9" * 5000]),
    ("n_layer", ">= 1", ["0", "-" + "9" * 30]),
    ("n_layer", "a whole number >= 1; whole numbers have 64 bits here", [str(2 ** 63), "9" * 30]),
    ("lr", "a number > 0; numbers are 0 or from 1.2e-38", ["1e39", "1e-39"]),
    ("max_steps", ">= 0, or none", ["-1"]), ("max_steps", "a whole number >= 0, or none", ["nine"]),
    ("n_kv_head", ">= 1, or none", ["0"]), ("n_kv_head", "a whole number >= 1, or none", ["1.0"]),
    ("scale", "> 0.0, or none", ["0"]), ("dropout", ">= 0 and < 1", ["1.5", "1", "-0.1"]),
    ("dropout", "a number >= 0 and < 1", ["high"]), ("lr", "a number > 0", ["nan", "inf", "1e999"]),
    ("shift", "a number", ["-inf"]), ("norm", "one of layer, rms; did you mean layer?", ["laier", "Layer"]),
    ("norm", "one of layer, rms", ["none"]), ("residual_scale", "a number > 0.0, or depth", ["deep"]),
    ("residual_scale", "> 0.0, or depth", ["0"]),
    ("betas", "2 values with commas between them, each a number >= 0 and < 1", ["0.9", "0.9,0.9,0.9", "none"]),
    ("betas", "2 values with commas between them, each >= 0 and < 1", ["0.9,1"]),
    ("sizes", "2 values with commas between them, each a whole number", ["1,2.5"]),
    ("compile", "true or false", ["maybe", ""]), ("preset", "one of small, large; did you mean small?", ["smal"]),
]
FLAG = "--no-name is for settings that are true or false, and takes no value"
REFUSED = {
    "--n_layers 6": "unknown setting --n_layers; did you mean --n_layer?",
    "--qwertz 6": "unknown setting --qwertz; -h lists them all",
    "--n_layer": "--n_layer: a value is missing; it must be a whole number >= 1",
    "--n_layer --compile": "--n_layer: a value is missing; it must be a whole number >= 1",
    "--compile maybe": "unexpected word 'maybe': settings are written --name value",
    "--no-compile=true": f"--no-compile=true: {FLAG}", "--no-n_layer": f"--no-n_layer: {FLAG}",
    "--no-n_layers": "unknown setting --no_n_layers", "-- 6": "unexpected word '--'",
    "small": "unexpected word 'small'; did you mean --preset small?",
    "n_layer=6": "unexpected word 'n_layer=6'; did you mean --n_layer?",
    "-n_layer 6": "unexpected word '-n_layer'; did you mean --n_layer?",
    **{f"--{name} 4": f"unknown setting --{name}" for name in (
        "LIMIT", "_hidden", "computed", "presets", "architecture", "after", "later")},
    **{f"--{name}={value}": f"--{name} {flags.shown(value)}: must be {must}"
       for name, must, values in MUST for value in values},
}


def test_refused(g):
    before = dict(g)
    for line, said in REFUSED.items():
        refused(rf"\A{re.escape(said)}", override, g, line.split())
        assert g == before, "a refused command line changes nothing"


def test_defaults_of_the_source_and_explicit_names(g):
    g["n_layer"] = 99                                        # left by an earlier call in the same process
    settings = override(g, [])
    assert settings["n_layer"] == g["n_layer"] == 12
    assert settings.explicit == frozenset() and settings.command == []
    assert list(settings)[:3] == ["preset", "run_name", "out_dir"]
    assert set(settings) == set("preset run_name out_dir resume compile tie max_steps checkpoint n_layer n_kv_head "
                                "scale dropout lr shift norm positions residual_scale betas sizes mixed".split())
    settings = override(g, "--preset small --lr 0.5 --resume".split())
    assert settings.explicit == {"preset", "lr", "resume", "n_layer", "betas", "max_steps"}
    assert settings.command == ["--preset", "small", "--lr", "0.5", "--resume"]


def test_positional(g):
    for line in ("runs/a --n_layer 3", "--n_layer 3 runs/a"):
        assert override(g, line.split(), positional="checkpoint")["checkpoint"] == "runs/a"
    refused("unexpected word 'runs/b'", override, g, "runs/a runs/b".split(), positional="checkpoint")


def test_a_wrong_preset_or_default_is_a_bug_of_the_script(g, tmp_path):
    for bad in (dict(n_layers=2), dict(n_layer=2.5), dict(n_layer=0), dict(norm="laier"), dict(compile=1),
                dict(betas=(0.9,)), dict(lr=float("nan"))):
        g["presets"]["small"] = bad
        with pytest.raises(ValueError, match="preset small"):
            override(g, [])
    for line in ("n_layer = 0  # [>= 1] blocks", "norm = 'x'  # [layer, rms] kind", "lr = 1e999"):
        (tmp_path / "s.py").write_text(line + "\n")
        with pytest.raises(ValueError, match="must be"):
            override({"__file__": str(tmp_path / "s.py")}, [])


def test_help(g, capsys):
    with pytest.raises(SystemExit) as caught:
        override(g, ["--nonsense", "-h"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, out.splitlines())) <= 100
    for text in ("A script for tests.", "--preset small", "n_layer=2, betas=0.5,0.6, max_steps=none", "\nModel\n",
                 "--dropout 0.1", "[>= 0, < 1] probability", "--betas 0.9,0.95", "--resume false"):
        assert text in out
    assert out.index("\nRun\n") < out.index("--compile") < out.index("\nModel\n") < out.index("--n_layer")


def test_help_before_anything_is_imported(g, capsys, monkeypatch):
    """From the source alone, word for word what override says; presets that are computed are left to override."""
    path = g["__file__"]
    monkeypatch.setattr(sys, "argv", [path, "--lr", "1", "--help"])
    with pytest.raises(SystemExit):
        override(g, ["-h"])
    said = capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        flags.answer_help("__main__", path)
    assert caught.value.code == 0 and capsys.readouterr().out == said
    flags.answer_help("script", path)  # imported, not run
    monkeypatch.setattr(sys, "argv", [path, "--lr", "1"])
    flags.answer_help("__main__", path)  # not asked
    monkeypatch.setattr(sys, "argv", [path, "-h"])
    Path(path).write_text(Path(path).read_text().replace("n_layer=48", "n_layer=16 * LIMIT"))
    flags.answer_help("__main__", path)
    assert capsys.readouterr().out == ""


DATA = [f"data/{name}.py" for name in ("text", "arc", "video", "facts", "mqar", "smollm", "tokens")]


@pytest.mark.parametrize("words", [*SCRIPTS, *DATA, "data/tokens.py train"])
def test_help_of_the_commands(tmp_path, words):
    """Before torch is imported, within 80 columns: every setting with its comment, every preset. Nothing is written.
    A narrow terminal makes no column of single letters of it."""
    path, *more = words.split()
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    done = subprocess.run([sys.executable, ROOT / path, *more, "-h"], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "20"})
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and max(map(len, lines)) <= 80
    assert sum(len(line.strip()) == 1 for line in lines) < 4
    assert [file.name for file in tmp_path.iterdir()] == ["torch.py"]
    if path.startswith("data/"):
        assert done.stdout.startswith(f"usage: {path}")
        return
    for name in flags._read_settings(ROOT / path):
        assert re.search(rf"^ *--{name} .*\S", done.stdout, re.M), name
    for name in fresh(path).get("presets", {}):
        assert re.search(rf"^  {name}\b", done.stdout, re.M), name


@pytest.mark.parametrize("line, saved, wanted, said", [
    ("--lr 0.25 --out_dir here --resume a.pt",               # what was typed stays; a key that is gone, one that is new
     dict(lr=0.5, betas=[0.1, 0.2], n_layer=6, gone=1, out_dir="elsewhere", run_name="other", resume=True, scale=...),
     dict(lr=0.25, betas=(0.1, 0.2), n_layer=6, out_dir="here", run_name=None, resume="a.pt", scale=None),
     "from the checkpoint: n_layer 6 (not 12), betas 0.1,0.2 (not 0.9,0.95)\n"),
    ("--n_layer 12 --norm layer", dict(n_layer=6), dict(n_layer=6, norm="layer"),
     "n_layer 6 comes from the checkpoint: --n_layer 12 is overruled\n"),
    ("--resume", {}, dict(resume=True, n_layer=12), "")])
def test_what_a_resume_adopts(g, capsys, line, saved, wanted, said):
    checkpoint = {name: value for name, value in {**override(g, []), **saved}.items() if value is not ...}
    settings = override(g, line.split())
    before, typed = set(settings), settings.explicit
    adopt(settings, checkpoint, ("n_layer", "norm"))
    assert set(settings) == before and settings.explicit == typed
    assert {name: settings[name] for name in wanted} == {name: g[name] for name in wanted} == wanted
    assert capsys.readouterr().out == said


def test_a_resume_refuses_values_that_the_script_does_not_know(g):
    with pytest.raises(UserError, match="the checkpoint's norm 'batch' is not allowed here: must be one of layer, rms"):
        adopt(override(g, []), {**override(g, []), "norm": "batch"}, ("norm",))


# --- Fields of config classes ---

CONFIG = """
from dataclasses import dataclass

@dataclass
class Shape:
    \"\"\"A comment such as # this is no field's.\"\"\"
    rows: int
    width: int = 4  # [>= 2] of a row
    kind: str = "a"  # [a, b] which
    depth: int = None  # [none, >= 1] none: derived
    inner: int = 3

    def __post_init__(self):
        flags.check_fields(self)
"""


def test_commented_fields_of_a_config_class_are_settings(tmp_path, capsys):
    (tmp_path / "shapes.py").write_text("from nanolab import settings as flags\n" + CONFIG)
    script = tmp_path / "train.py"
    script.write_text('"""A script."""\npreset = None\nkind = "b"  # [a, b] its own default\nlr = 0.1  # [> 0.0] rate\n'
                      'FURTHER = {"the model": "shapes.py:Shape but depth"}\npresets = {"wide": dict(width=8)}\n')
    g = runpy.run_path(str(script))
    settings = override(g, ["--preset", "wide"])
    assert settings == {"preset": "wide", "kind": "b", "lr": 0.1, "width": 8} and g["width"] == 8
    for line, error in (("--width 1", "must be >= 2"), ("--depth 2", "unknown setting --depth"),
                        ("--inner 2", "unknown setting --inner"), ("--kind c", "must be one of a, b")):
        refused(error, override, g, line.split())
    with pytest.raises(SystemExit):
        override(g, ["-h"])
    assert "Further, of the model\n  --width 4" in capsys.readouterr().out
    made = runpy.run_path(str(tmp_path / "shapes.py"))["Shape"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.inspect, "getsourcefile", lambda kind: str(tmp_path / "shapes.py"))
        assert made(rows=1, width=2).width == 2
        for wrong, error in ((dict(width=1), "width is 1, but must be >= 2"), (dict(depth=0), "depth is 0, but must"),
                             (dict(kind="c"), "kind is 'c', but must be one of a, b")):
            with pytest.raises(ValueError, match=error):
                made(rows=1, **wrong)


def test_begin_takes_what_debug_says_unless_a_flag_does(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("steps = 100  # [>= 1] steps\nrows = 5  # [>= 1] rows\ndebug = False  # tiny\n")
    g = runpy.run_path(str(script)) | {"debug_settings": dict(steps=2, rows=1)}
    assert flags.begin(g, ["--debug", "--rows", "3"]) == {"steps": 2, "rows": 3, "debug": True} and g["steps"] == 2
    settings = flags.begin(g, [])
    settings.put(rows=7)
    assert settings["rows"] == g["rows"] == 7


# --- serve: options from signatures and docstrings, what is typed wrongly, -h before any long import ---

def load(dataset, max_bytes=None, share=0.5, ball=True, word="a", seed=7):
    """Finds a text.

    dataset: a name, or
        a file
    max_bytes: [>= 1] only the first; none: all
    share: [> 0.0, < 1.0] 50 % is half
    ball: is there one?
    word: [a, b] one of two
    seed: of all
    """
    return dict(dataset=dataset, max_bytes=max_bytes, share=share, ball=ball, word=word, seed=seed)


def show(found, seed, stats=False):
    """Shows it.

    stats: count
    """
    return {**found, "shown": (seed, stats)}


def last(found):
    """A step without options."""
    RETURNED.append(found)


RETURNED = []
main = serve(load, show, last, defaults=dict(seed=3))


def typed(words, main=main):
    main(words.split())
    return RETURNED.pop()


def test_options_reach_the_functions_that_name_them():
    assert typed("x") == dict(dataset="x", max_bytes=None, share=0.5, ball=True, word="a", seed=3, shown=(3, False))
    found = typed("y --max-bytes 12 --share=.25 --no-ball --word b --stats --seed -4")
    assert found == dict(dataset="y", max_bytes=12, share=0.25, ball=False, word="b", seed=-4, shown=(-4, True))
    assert typed("--max_bytes none z")["max_bytes"] is None


def test_commands_and_options_that_must_be_typed():
    def train(*, out, n=3):
        """Trains.

        out: a file
        n: [>= 0] how many
        """
        return out, n

    def look(*, text=None):
        """Looks.

        text: which
        """
        return text
    both = serve(train=(train, last), look=(look, last))
    assert typed("train --out x --n 0", both) == ("x", 0) and typed("look", both) is None
    for words in ("train", "", "lok", "train --out x --n -1", "look --out x"):
        with pytest.raises(UserError):
            both(words.split())


@pytest.mark.parametrize("words, said", [
    ("", "dataset"), ("x --max_bytes 0", "must be >= 1"), ("x --max_bytes few", "must be a whole number >= 1"),
    ("x --max_bytes " + "9" * 30, "64 bits"), ("x --share nan", "must be a number"),
    ("x --share 1", "< 1.0"), ("x --word c", "one of a, b"), ("x --nonsense", "--nonsense"), ("x --stats 3", "3")])
def test_what_is_typed_wrongly_is_said(words, said):
    with pytest.raises(UserError) as error:
        main(words.split())
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("script", ["train_enwik8", "train_facts"])
def test_a_script_offers_every_word_of_the_model(script):
    """Also where a setting of TransformerConfig stands among the script's own."""
    own = flags._read_settings(f"{ROOT}/{script}.py")
    for name, spec in flags._fields_of(TransformerConfig).items():
        assert name not in own or {*spec.words} <= {*own[name].words}, name


def test_a_comment_goes_on_below():
    """Far to the right and alone in its line; else it is another one."""
    from nanolab.settings import _comments
    assert _comments("a = 1                     # one\n" + 26 * " " + "# and more\n# --- B ---\nb = 2  # two\n") == {
        1: "one and more", 3: "--- B ---", 4: "two"}
