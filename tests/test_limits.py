"""Every setting of every script: at, beyond and far beyond its bounds; where it cannot count, which its comment says;
typed anew on resume. Models and batches that cannot be held."""
import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch

import grid
from data import arc, text
from model import FEED_FORWARDS, MIXERS, TransformerConfig, build_model
from nanolab import limits, optim, run as experiment, settings as flags
from nanolab.run import UserError, override
from nanolab.settings import ROOT, Settings
from scripts import TINY, typed
from test_scripts import fresh

TRAINERS = ("train_enwik8", "train_mult", "train_dvae", "train_worldmodel", "train_facts")
TOOLS = ("sample", "evaluate", "grid", "plot", "bench", "nanolab/probe")


SPECS = functools.cache(flags._read_settings)


@pytest.fixture(autouse=True)
def parsed_once(monkeypatch):
    monkeypatch.setattr(flags, "_read_settings", lambda path: dict(SPECS(str(path))))


def shape_of(g):
    """The settings that make the weights of a script."""
    shape = g.get("architecture", ())
    return [name for part in shape.values() for name in part] if isinstance(shape, dict) else shape


# --- Bounds ---

NUMBERS = ["0", "-1", "1.5", "12", "1000000", str(10 ** 12), str(2 ** 63 - 1), str(2 ** 63), str(-2 ** 63 - 1),
           str(10 ** 25), "none"]
FLOATS = ["nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "1e38", "1e-37"]
ODD = ["", " ", "x", "-", ",", "1,2", "\N{FOX FACE}", "\N{ARABIC-INDIC DIGIT THREE}", "a\nb", "x" * 300]


@functools.lru_cache
def opened(script):
    """The globals of a script and its settings, read once."""
    g = fresh(f"{script}.py")
    return (g["check"] if "check" in g else g["main"].__wrapped__).__globals__, SPECS(g["__file__"])


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


def values(spec, met):
    """Words to type for a setting: its choices, those around its bounds, numbers, and odd ones where none of its kind
    has been met: these are read alike."""
    found, kind = [*spec.words], (spec.kind, spec.none, type(spec.default), bool(spec.words))
    if kind not in met:
        found += [*ODD, *FLOATS, "9" * 5000, "true"]
    if spec.kind is str and not spec.words:                  # a path, a name: each is looked at in its own way
        found += ODD
    if spec.kind in (int, float):
        found += NUMBERS + FLOATS * (spec.kind is float)
    met.add(kind)
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
    shape, known, met, weigh, taken = shape_of(g), {}, set(), limits.weigh, 0

    def read(value):                                         # what a model can read of what it is built from
        return {name: read(part) for name, part in vars(value).items() if name in words} if (
            hasattr(value, "__dict__")) else value

    def weighed(build, device):                              # a model of the same shape is not weighed again
        key = repr(([g.get(name) for name in shape], [read(cell.cell_contents) for cell in build.__closure__ or ()]))
        if key not in known:
            known[key] = weigh(build, device) and None
    monkeypatch.setattr(limits, "weigh", weighed)
    for name, spec in specs.items():
        for value in values(spec, met):
            try:
                said = tried(script, [f"--{name}={value}"])
            except (Exception, SystemExit) as error:
                raise AssertionError(f"--{name}={value[:40]}: {type(error).__name__}: {error}") from error
            assert "\n" not in said and len(said) < 1000, (name, value)
            taken += not said
    assert taken > len(specs), "and most settings have another value than their own"


REFUSED = {
    "train_enwik8": [("--n_layer 1000000", "must be >= 1 and <= 1000"), (f"--n_embd {10 ** 25}", "have 64 bits"),
                     ("--n_layer 1000 --n_embd 8192", "parameters and more cannot be held"),
                     (f"--batch_size {10 ** 12}", "windows of 32 bytes cannot be held"),
                     ("--positions rope --mixer mamba --expand 1e308", "as float32 holds them"),
                     ("--positions rope --mixer mamba --expand 1e30", "cannot be held"),
                     ("--mixer mla --positions rope --qk_norm", "qk_norm normalises keys, which mixer 'mla' never")],
    "train_facts": [("--mixer mla --qk_norm", "qk_norm normalises keys"),
                    (f"--task mqar --n_rows {10 ** 12}", "cannot be held")],
    "train_mult": [(f"--n_embd {2 ** 40}", "cannot be held"), (f"--n_examples {10 ** 12}", "cannot be held")],
    "train_dvae": [(f"--codebook_size {2 ** 60}", "cannot be held"),
                   (f"--batch_size {10 ** 12}", "grids cannot be held"),
                   ("--estimator fsq --codebook_size 11", "no product of levels"),
                   ("--estimator lfq --codebook_size 12", "no power of 2")],
    "train_worldmodel": [(f"--dynamics_embd {2 ** 40}", "cannot be held"),
                         (f"--tokenizer_batch {10 ** 12}", "clips cannot be held")]}


@pytest.mark.parametrize("script", TRAINERS)
def test_refused_before_anything_is_made(script):
    for line in ("--betas=0.9,1.0", "--betas=1,1", "--eps=0", "--seed=-1", "--data_seed=-1", f"--seed={2 ** 63}"):
        assert "must be" in tried(script, [line]), line
    for line, says in REFUSED[script]:
        assert says in tried(script, line.split()), line
    for line in ("--muon_momentum 0 --optimizer muon", f"--seed {2 ** 63 - 1}"):
        assert tried(script, line.split()) == "", line


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
    settings, noam = (Settings(schedule=name, warmup_steps=10) for name in ("cosine", "noam"))
    for said, *given in (
            ("", settings, {"max_steps": 20}, {"max_steps": 20}), ("", settings, {"max_steps": None}),
            ("", noam, {"max_steps": 20}, {"max_steps": 10}),
            ("max_steps 20 was 12: the rate of schedule cosine is", settings, {"max_steps": 20}, {"max_steps": 12}),
            ("warmup_steps 10 are all of max_steps 10", settings, {"max_steps": 10}),
            ("warmup_steps 10 of max_steps 5: the rate rises to the end and never", settings, {"max_steps": 5})):
        limits.notes(*given)
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


@pytest.mark.parametrize("words", ["sample.py", "data/mqar.py"])
def test_help_into_a_closed_pipe(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *words.split(), "-h"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE,
                          text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 141)


# --- Settings without an effect ---

WORDS = {"mixer": set(MIXERS), "ff": set(FEED_FORWARDS), "optimizer": set(optim.RULES)}


@pytest.mark.parametrize("script", TRAINERS)
def test_comments_name_other_settings_and_their_words(script):
    specs = flags._read_settings(ROOT / f"{script}.py")
    conditions = {name: spec.only for name, spec in specs.items() if spec.only}
    assert len(conditions) >= 8
    for name, (_, other, words) in conditions.items():
        assert other in specs and other != name, name
        known = WORDS.get(other) or set(specs[other].words) or set(re.findall(r"\w+", specs[other].comment))
        assert set(words) <= known, name
        while other:                                         # no circle
            assert other != name
            other = conditions.get(other, ("", "", ""))[1]


IDLE = [  # (script, what is typed, *(which of it counts for nothing, because of what))
    ("train_enwik8", "--state_dim 32", "state_dim, mixer full"),
    ("train_enwik8", "--mtp_weight 1 --mixer xl", "mtp_weight, mtp_depth 0"),
    ("train_enwik8", "--window 9 --mixer mamba,window --state_dim 4"),
    ("train_enwik8", "--preset small"),                      # a preset's settings are for what it is changed into
    ("train_enwik8", "--betas 0.9,0.9 --optimizer sgd --momentum 0.5", "betas, optimizer sgd"),
    ("train_enwik8", "--mixer compressive --compression max --compression_weight 2",
     "compression_weight, compression max"),
    ("train_enwik8", "--compression_weight 2", "compression_weight, mixer full"),              # by its own
    ("train_mult", "--forcing_slope 1 --forcing exponential --forcing_min 0.5", "forcing_slope, forcing exponential"),
    ("train_mult", "--models simple,prefix --n_latent 3", "n_latent, models simple,prefix"),
    ("train_facts", "--task text --pairs 3 --names plain", "pairs, task text", "names, task text"),
    ("train_worldmodel", "--dataset atari:Freeway --walls 0 --length 9", "walls, dataset atari:Freeway"),
    ("train_dvae", "--reset_interval none --reset_fraction 1", "reset_fraction, reset_interval none"),
    ("train_dvae", "--estimator fsq --vq_levels 2 --rotation_trick", "vq_levels, estimator fsq",
     "rotation_trick, estimator fsq")]


@pytest.mark.parametrize("script, line, idle", [(script, line, idle) for script, line, *idle in IDLE])
def test_a_flag_without_an_effect_is_told(script, line, idle, capsys):
    presets = {"small": {"optimizer": "adam", "muon_lr": 0.1}}
    limits.notes(override({"__file__": str(ROOT / f"{script}.py"), "presets": presets}, line.split()), {})
    assert capsys.readouterr().out.splitlines() == [
        "--{} has no effect with {}".format(*words.split(", ")) for words in idle]


def another(spec):
    """A legal value that is not the default."""
    if spec.words:
        return next(word for word in spec.words if word != spec.default)
    one = spec.default or 1
    return True if spec.kind is bool else spec.kind(one / 2 if ("<=", "1.0") in spec.bounds else 2 * one)


def defaults(specs, **settings):
    made = Settings({name: spec.default for name, spec in specs.items()} | settings)
    made.only = {name: spec.only for name, spec in specs.items()}
    return made


FIELDS = flags._fields_of(TransformerConfig)


@pytest.mark.parametrize("name", [name for name, spec in FIELDS.items()
                                  if spec.only and name not in ("qk_scale", "qk_gain")])
def test_an_idle_field_changes_no_model(name):
    small = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, positions="none", compression="mean")
    assert defaults(FIELDS, **small).idle(name)
    made = []
    for value in (FIELDS[name].default, another(FIELDS[name])):
        torch.manual_seed(0)
        model = build_model(TransformerConfig(**small | {name: value}))
        made.append((model.state_dict(), model(torch.arange(8)[None])))
    torch.testing.assert_close(*made, rtol=0, atol=0)


@pytest.mark.parametrize("rule", optim.RULES)
def test_an_idle_setting_changes_no_step(rule):
    specs = flags._read_settings(ROOT / "train_enwik8.py")
    settings = defaults(specs, optimizer=rule, warmup_steps=1)
    idle = [name for name, spec in specs.items() if spec.only and spec.only[1] == "optimizer" and settings.idle(name)]
    assert idle

    def stepped(values):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, bias=False)
        opt = optim.build(values, model.named_parameters(), {"weight": "matrix"}, n_examples=100)
        for step in range(2):
            optim.set_rate(opt, values, step)
            with opt.sampled():
                model(torch.randn(2, 4)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return model.weight
    others = dict(betas=(0.5, 0.6), momentum=0.3, muon_momentum=0.3)
    changed = settings | {name: others.get(name) or another(specs[name]) for name in idle}
    assert torch.equal(stepped(settings), stepped(changed))
    busy = {"sgd": "momentum", "muon": "muon_momentum"}.get(rule, "betas")
    assert not torch.equal(stepped(settings), stepped(settings | {busy: others[busy]}))


def test_a_row_of_a_grid_that_changes_nothing_is_refused(tmp_path):
    path, row = tmp_path / "grid.yaml", dict(state_dim=32)
    plan = dict(script=str(ROOT / "train_enwik8.py"), out_dir=str(tmp_path / "out"), metric="best_bpb", seeds=[1, 2],
                base=dict(debug=True, positions="rope"), rows=dict(states=dict(set=row)))
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="row 'states': it changes nothing: state_dim has no effect with mixer full"):
        grid.Grid(path)
    row["mixer"] = "mamba"
    path.write_text(json.dumps(plan))
    assert grid.Grid(path).rows[-1].changes == row


# --- Typed anew on resume: the run goes on, says in one line why the checkpoint's value holds, or is refused in one ---

SHORT = dict(max_steps=2, save_interval=9, eval_interval=9, device="auto")     # on top of TINY
SHORTER = {"train_worldmodel": dict(stage="dynamics", tokens="cells", action_source="true", eval_clips=2,
                                    rollout_clips=2)}
LEFT = {"resume", "out_dir", "run_name", "max_steps",         # typed in every run here
        "compile", "play", "profile", "debug"}                # minutes; a server; a table; the runs here are debug runs
TYPED = {"dataset": {"train_dvae": "arc1", "train_worldmodel": "donkeycar"}, "models": "latent", "mixer": "mamba",
         "ff": "moe", "device": "cpu", "tag": "b", "tokenizer": {"train_facts": "bytes"}, "ask": "1*2",
         "actions": "1,0", "rollout": "nowhere", "encode": "nowhere", "decode": "1,2,3,4,5,6",
         "val_dataset": "synthetic", "database": "nowhere", "init_from": "nowhere", "prompt": "a", "preset": "cpu",
         "keep_every": "9", "full_eval_protocol": "stride:2", "document_end": "e"}


def others(script, name, spec, now):
    """Words to type for a setting that the checkpoint has as `now`: each other choice, another number, none."""
    if name in TYPED:
        word = TYPED[name]
        return [word.get(script, "shakespeare") if isinstance(word, dict) else word]
    if spec.kind is bool:
        return [str(not now).lower()]
    found = [word for word in spec.words if word != now] + ["none"] * (spec.none and now is not None)
    if spec.kind is str:
        return found
    pair = isinstance(now, tuple)
    first = now[0] if pair else 1 if now in (None, *spec.words) else now
    more = (first + 1, first / 2, first - 1, first + 2) if spec.kind is int else (first / 2, first + 0.25, first * 2)
    legal = []
    for number in more if pair else (0, *more):
        word = flags.as_typed(int(number) if spec.kind is int else number)
        word = ",".join([word] * len(now)) if pair else word
        with contextlib.suppress(ValueError):
            legal += [word] * (spec.read(word, typed=True) != now)
    return found + (legal[:1 + (legal[0] == "0")] if legal else [])          # what 0 switches off, and another


def quicken(g, monkeypatch):
    """Runs of a script's globals in this process without what takes long: drawing, copying, measuring."""
    monkeypatch.setattr(experiment.Run, "_copy_code", lambda run: None)
    for place, name in (arc, "synthetic"), (text, "_stdlib"):                # pure functions
        monkeypatch.setattr(place, name, functools.cache(getattr(place, name)))
    stubs = dict.fromkeys(("draw_curves", "draw_all", "_output", "_version")) | {
        "measure_peak_flops": 1e9, "thoroughly": dict(floor=0.0)}
    for name, value in stubs.items():
        for place in (vars(experiment), g):
            if name in place:
                monkeypatch.setitem(place, name, lambda *a, value=value, **k: value)
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("script", TINY)
def test_every_setting_typed_on_resume(script, tmp_path, monkeypatch, capsys):
    """From a checkpoint of two steps to the third, settings given together; where such a run ends in one line, or
    worse, by halves, until each setting has been typed alone or among others that go on."""
    g, count = fresh(f"{script}.py"), itertools.count(1)
    quicken(g, monkeypatch)

    def run(*words):
        """(exit status or what went wrong, stderr) of the script."""
        monkeypatch.setattr(sys, "argv", [*words, "--run_name", f"run{next(count)}", "--out_dir", str(tmp_path)])
        try:
            g["main"]()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except Exception as error:
            status = f"{type(error).__name__}: {error} {traceback.extract_tb(error.__traceback__)[-1]}"
        return status, capsys.readouterr().err

    def walk(given):
        status, err = run(f"{script}.py", f"--resume={start}", "--max_steps=3", *(f"--{n}={w}" for n, w in given))
        if status == 0 or status == 2 and len(given) == 1 and err.startswith("error: ") and err.count("\n") == 1:
            return []
        half = len(given) // 2
        return walk(given[:half]) + walk(given[half:]) if half else [f"{given} {status} {err}"]
    assert run(*map(str, typed(script, tmp_path, "--debug", **SHORT | SHORTER.get(script, {}))))[0] == 0
    start = tmp_path / script / "run1" / "last.pt"
    saved, shape = torch.load(start, weights_only=True)["settings"], shape_of(g)
    specs = {name: spec for name, spec in SPECS(g["__file__"]).items() if name not in LEFT}
    left = {name: others(script, name, spec, spec.read(saved[name])) for name, spec in specs.items()}
    left = {name: words[:1] if name in shape else words for name, words in left.items()}     # overruled, one as all
    assert all(left.values())
    alone = [name for name in left if name in ("dp", "tp") or name in TYPED and name not in shape]
    wrong = [line for name in alone for line in walk([(name, left.pop(name)[0])])]           # most are refused
    while left:
        now = [(name, words.pop(0)) for name, words in left.items()]
        left = {name: words for name, words in left.items() if words}
        overruled, free = ([pair for pair in now if (pair[0] in shape) == shapes] for shapes in (True, False))
        for some in filter(None, [overruled, *(free[i:i + 16] for i in range(0, len(free), 16))]):
            wrong += walk(some)
    assert not wrong, "\n".join(wrong)
