"""Every setting of every script typed anew on resume: the run goes on, or says in one line why the checkpoint's value
holds, or is refused in one line with status 2. Never a traceback."""
import functools
import importlib.util
import sys
import traceback
from pathlib import Path

import pytest
import torch

from data import arc, text
from nanolab import run as experiment, settings as flags

ROOT = Path(flags.__file__).parents[1]
# Two tiny steps; what is drawn and measured beside the training stays away.
BASE = {
    "train_enwik8": "--n_layer 2 --block_size 16 --max_bytes 4000 --batch_size 2 --n_head 2 --n_embd 16 "
                    "--sample_length 2 --eval_windows 2",
    "train_facts": "--n_people 8 --n_unseen 2 --n_embd 8 --batch_size 4 --eval_prompts 2 --final_prompts 2",
    "train_mult": "--n_examples 50 --val_examples 20 --eval_examples 10 --batch_size 4 --n_embd 16",
    "train_dvae": "--n_train 40 --n_val 8 --batch_size 4",
    "train_worldmodel": "--stage dynamics --tokens cells --action_source true --n_train 8 --n_val 4 --side 4 "
                        "--cell_px 4 --patch 4 --context 3 --batch_size 2 --dynamics_batch 2 "
                        "--eval_clips 2 --rollout_clips 2",
}
LEFT = {"resume", "out_dir", "run_name", "max_steps",         # typed in every run here
        "compile", "play", "profile", "debug"}                # minutes; a server; a table; the runs here are debug runs
TYPED = {"dataset": {"train_dvae": "arc1", "train_worldmodel": "donkeycar"}, "models": "latent", "mixer": "mamba",
         "ff": "moe", "device": "cpu", "tag": "b", "tokenizer": {"train_facts": "bytes"}, "ask": "1*2",
         "actions": "1,0", "rollout": "nowhere", "encode": "nowhere", "decode": "1,2,3,4,5,6",
         "val_dataset": "synthetic",
         "database": "nowhere", "init_from": "nowhere", "prompt": "a", "preset": "cpu"}


def others(script, name, spec, now):
    """Words to type for a setting that the checkpoint has as `now`: each other choice, another number, none."""
    if name in TYPED:
        word = TYPED[name]
        return [word.get(script, "shakespeare") if isinstance(word, dict) else word]
    if spec.kind is bool:
        return [str(not now).lower()]
    found = [word for word in spec.words if word != now] + ["none"] * (spec.none and now is not None)
    if spec.kind in (int, float):
        try:                                                   # what 0 switches off
            found += ["0"] * (not isinstance(now, tuple) and spec.read("0", typed=True) != now)
        except ValueError:
            pass
        first = now[0] if isinstance(now, tuple) else 1 if now in (None, *spec.words) else now
        for number in (first + 1, first / 2, first - 1, first + 2) if spec.kind is int else (
                first / 2, first + 0.25, first * 2):
            word = flags.as_typed(int(number) if spec.kind is int else number)
            word = ",".join([word] * len(now)) if isinstance(now, tuple) else word
            try:
                if spec.read(word, typed=True) != now:
                    return [*found, word]
            except ValueError:
                continue
    return found


class Runs:
    """Runs of one script in this process, from one checkpoint of two steps."""

    def __init__(self, script, folder, monkeypatch):
        spec = importlib.util.spec_from_file_location(f"resumed_{script}", ROOT / f"{script}.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.script, self.folder, self.count = script, folder, 0
        monkeypatch.setattr(experiment.Run, "_copy_code", lambda run: None)
        for place, name in (arc, "synthetic"), (text, "_stdlib"):            # pure functions
            monkeypatch.setattr(place, name, functools.cache(getattr(place, name)))
        read = functools.cache(flags._read_settings)
        monkeypatch.setattr(flags, "_read_settings", lambda path: dict(read(str(path))))
        stubs = dict.fromkeys(("draw_curves", "draw_all", "_output", "_version")) | {
            "measure_peak_flops": 1e9, "thoroughly": dict(floor=0.0)}
        for name, value in stubs.items():
            for place in (experiment, self.module):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, lambda *a, value=value, **k: value)
        self.typed = ["--debug", "--device", "auto", "--out_dir", str(folder), *BASE[script].split()]

    def run(self, words):
        """The exit status, 0 for none, of the script with these words; what is no exit goes through."""
        self.count += 1
        sys.argv = [f"{self.script}.py", *words, "--run_name", f"run{self.count}", "--out_dir", str(self.folder)]
        torch.set_deterministic_debug_mode("default")
        try:
            self.module.main()
        except SystemExit as end:
            return end.code or 0
        return 0

    def walk(self, typed, capsys):
        """[(setting, what went wrong)] of resuming to step 3 with {setting: word} typed together; where a run ends in
        one line, or worse, by halves, until each setting has been typed alone or among others that go on."""
        capsys.readouterr()
        words = [f"--{name}={word}" for name, word in typed.items()]
        try:
            code = self.run([f"--resume={self.start}", "--max_steps=3", *words])
        except Exception as error:
            code, wrong = None, f"{type(error).__name__}: {error} {traceback.extract_tb(error.__traceback__)[-1]}"
        out, err = capsys.readouterr()
        if code == 0:
            return []
        if code == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(typed) == 1:
            return []
        if len(typed) > 1:
            items = list(typed.items())
            half = len(items) // 2
            return self.walk(dict(items[:half]), capsys) + self.walk(dict(items[half:]), capsys)
        return [(self.script, words[0], wrong if code is None else f"status {code}: {err}")]


@pytest.mark.parametrize("script", BASE)
def test_every_setting_typed_on_resume(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    runs = Runs(script, tmp_path, monkeypatch)
    assert runs.run([*runs.typed, "--max_steps", "2"]) == 0
    runs.start = tmp_path / script / "run1" / "last.pt"
    checkpoint = torch.load(runs.start, weights_only=True)
    shape = runs.module.architecture
    shape = [name for part in shape.values() for name in part] if isinstance(shape, dict) else shape
    specs = {name: spec for name, spec in flags._read_settings(runs.module.__file__).items() if name not in LEFT}
    left = {name: others(script, name, spec, spec.read(checkpoint["settings"][name])) for name, spec in specs.items()}
    assert not [name for name, words in left.items() if not words]
    wrong = []
    alone = [name for name in left if name in TYPED and name not in shape] + ["dp", "tp"]
    for name in [name for name in alone if name in left]:     # most of these are refused, or train nothing
        wrong += runs.walk({name: left.pop(name)[0]}, capsys)
    while left:
        now = {name: words.pop(0) for name, words in left.items()}
        left = {name: words for name, words in left.items() if words}
        for overruled in (True, False):
            some = [(name, word) for name, word in now.items() if (name in shape) == overruled]
            size = len(some) if overruled else 16
            for i in range(0, len(some), size or 1):
                wrong += runs.walk(dict(some[i:i + size]), capsys)
    assert not wrong, "\n".join(map(" ".join, wrong))
