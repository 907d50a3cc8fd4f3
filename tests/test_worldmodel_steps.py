"""A step of the world model is a step however many passes it has; a finished stage goes on; nothing is cut off: 15 s.

Runs are started in this process, without the curves and the copy of the code that each leaves.
"""
import itertools
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import train_worldmodel as w
from data.video import load
from models.world_actions import Signs
from nanolab import run as experiment, settings as flags
from nanolab.run import load_checkpoint
from nanolab.world import Reader
from forks import assert_equal, records, summary
from scripts import TINY
from test_worldmodel_resume import STAGES, at, train

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = ("tokenizer_batch", "batch_size", "dynamics_batch", "text_batch", "frame_batch")


@pytest.fixture
def launch(monkeypatch, capsys):
    """launch(out_dir, more words, settings on top of TINY) -> (exit status, standard output and error)."""
    defaults = {name: spec.default for name, spec in flags._read_settings(w.__file__).items()}
    for name in defaults:
        monkeypatch.setattr(w, name, getattr(w, name, None), raising=False)      # as it was, in the end
    monkeypatch.setattr(experiment, "draw_curves", lambda *paths: None)
    monkeypatch.setattr(experiment, "_output", lambda *words: None)
    monkeypatch.setattr(experiment.Run, "_copy_code", lambda run: None)

    def launch(out_dir, *more, **settings):
        vars(w).update(defaults)
        monkeypatch.setattr(sys, "argv", list(map(str, train(out_dir, *more, **settings))))
        code = 0
        try:
            w.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()
    yield launch
    torch.set_deterministic_debug_mode("default")


def done(told):
    assert told[0] == 0, told
    return told[1]


def error(told, text):
    """One line, status 2."""
    assert told[0] == 2 and told[2].startswith("error: ") and told[2].count("\n") == 1 and text in told[2], told


@pytest.fixture
def put(monkeypatch):
    """Sets settings of the script for one test, on top of TINY."""
    def put(**settings):
        for name, value in (TINY["train_worldmodel"] | settings).items():
            monkeypatch.setattr(w, name, None if value == "none" else value, raising=False)
    return put


@pytest.fixture(scope="module")
def video():
    return load("gridworld", 12, 8, 8, 4, 4)


def material(video):
    return Reader(video.train, video.palette, "cpu", {}, w.tokens, w.action_source, video.n_actions, w.n_codes)


def margin(model, frames, kind):
    """The least distance, over what is quantised, between the code that was chosen and the next."""
    with torch.no_grad():
        if kind == "fsq":                                     # of a channel from where it would be rounded otherwise
            z, half = model.encode(frames), (model.codebook.levels - 1) * (1 + 1e-3) / 2
            offset = 0.5 * (model.codebook.levels % 2 == 0)
            bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
            return (0.5 - (bounded - bounded.round()).abs()).min().item()
        if kind == "tokenizer":
            vq, z = model.codebook, model.encode(frames)
        else:
            vq, z = model.quantiser.vq, (model.encode_every(frames) if model.kind == "transformer" else
                                         model.encode(frames))
        z = torch.nn.functional.normalize(z, dim=-1) if vq.similarity == "cosine" else z
        gaps = (z @ vq.table().T - vq.table().square().sum(1) / 2).topk(2, -1).values
        return (gaps[..., 0] - gaps[..., 1]).min().item()


WORDS = dict(tokens="cells", action_source="true", mask_rate="0.3,0.9")
STEPS = {
    "tokenizer vq": dict(stage="tokenizer", tokenizer="spatiotemporal", tokenizer_frames=3),
    "tokenizer fsq": dict(stage="tokenizer", quantiser="fsq"),
    "actions vq": dict(stage="actions", action_quantiser="vq", soft_fraction=0.0),
    "actions transformer": dict(stage="actions", action_quantiser="vq", action_model="transformer", history=3),
    "dynamics, text, frame": dict(WORDS),                     # all three, one after the other
    "dynamics of the last frame": dict(WORDS, stage="dynamics", streams="false", action_input="prepend"),
    "dynamics causal": dict(WORDS, stage="dynamics", dynamics="causal"),
}


@pytest.mark.parametrize("case", STEPS)
def test_passes_are_one_pass(launch, tmp_path, put, case):
    """Three passes over B clips, whose weights differ, are one over 3 B: loss, norm, weights and codes, as a run."""
    how = dict(STEPS[case], max_steps=1, eval_clips=2, rollout_clips=2, n_codes=4, save_interval=100, warmup_steps=1,
               optimizer="adamw", eps=1e-3)                   # so large that a step goes with the gradient
    runs = {}
    for passes in (3, 1):
        sizes = {name: 6 // passes for name in BATCHES}
        done(launch(tmp_path / str(passes), **how, **sizes, grad_accum=passes))
        run = at(tmp_path / str(passes))
        runs[passes] = [line for line in records(run) if line["split"] == "train"], load_checkpoint(run / "last.pt")
    for many, one in zip(*(runs[passes][0] for passes in (3, 1)), strict=True):
        for key in ("loss", "grad_norm"):
            assert many[key] == pytest.approx(one[key], rel=1e-5), (one["stage"], key)
    many, one = (runs[passes][1]["done"] for passes in (3, 1))
    assert many.keys() == one.keys()
    if how.get("stage") in ("tokenizer", "actions"):          # no choice is compared that rounding could turn
        put(**{name: value for name, value in how.items() if name != "streams"})
        torch.manual_seed(1337)
        data, stage = load("gridworld", 12, 4, 7, 4, 4), how["stage"]
        model, T = w.build(stage, data), w.tokenizer_frames if stage == "tokenizer" else w.history + 1
        index = w.Stream(data.train, T, 6, 1337).at(0)
        assert margin(model, material(data).frames(index, T), "fsq" if how.get("quantiser") == "fsq" else stage) > 1e-5
    for stage in one:
        for name, value in one[stage].items():
            torch.testing.assert_close(many[stage][name], value, rtol=1e-5, atol=1e-5, msg=f"{stage} {name}")


def test_rows_of_the_table_name_settings_that_there_are():
    """Steps, clips of a pass and what makes a stage's shape; a stage reads stages above it."""
    known = flags._read_settings(w.__file__)
    assert set(w.architecture) == {"all", *w.STAGES}
    for i, (name, stage) in enumerate(w.STAGES.items()):
        assert {stage.steps, stage.batch, *w.architecture[name]} <= known.keys()
        assert set(stage.needs()) <= {*list(w.STAGES)[:i]}


def test_signs_follow_a_step_not_a_pass():
    """Running statistics of all passes at once, as VQ's means; a pass alone changes none."""
    u = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    many, one = Signs(4).train(), Signs(4).train()
    for part in u.split(8):
        many(part)
    assert torch.equal(many.norm.running_mean, torch.zeros(2)) and not many.norm.num_batches_tracked
    many.follow(u)
    one.norm(u)                                               # BatchNorm's own step
    assert_equal(dict(many.state_dict()), dict(one.state_dict()), "signs")


def test_shares_count_what_is_hidden_and_what_changes(put, video):
    """Shares of a step's passes: sums over sums, written out for one stage with masks."""
    put(**{**WORDS, "mask_rate": (0.3, 0.9)}, grad_accum=3, dynamics_change=10.0, dynamics_steps=8, max_steps=8)
    index = torch.arange(6)
    drawn = w.hide_in_clips(6, 16, torch.Generator().manual_seed(0))
    found = w.passes_of("dynamics", SimpleNamespace(n_tokens=16), material(video), index, 0,
                        torch.Generator().manual_seed(0))
    parts, hidden, shares = zip(*found)
    assert torch.equal(torch.cat(parts), index) and torch.equal(torch.cat(hidden), drawn)
    truth = video.train.cells(index, w.context).long().flatten(2)
    weights = [sum(1 + 10 * bool(truth[i, t, n] != truth[i, t - 1, n]) for i in rows for t in range(2, w.context)
                   for n in range(16) if drawn[i, t, n]) for rows in (range(2), range(2, 4), range(4, 6))]
    assert [share.item() for share in shares] == pytest.approx([weight / sum(weights) for weight in weights])
    assert 0.1 < min(shares) and len({share.item() for share in shares}) > 1


# --- A finished stage that is asked for more ---

def test_a_longer_run_goes_on_where_the_shorter_ended(launch, tmp_path):
    """Under a constant rate the weights of a run that was asked for all steps at once; what has read them is anew."""
    how = dict(action_source="true", schedule="constant", dynamics_change=0.0, reset_fraction=1.0, ema_decay=0.5,
               eval_clips=2, rollout_clips=2, decode_steps=1, save_interval=100)
    short = at(tmp_path / "short")
    done(launch(tmp_path / "whole", **how, max_steps=6))
    done(launch(tmp_path / "short", **how, max_steps=3))
    old = shutil.copytree(short, at(tmp_path / "old"))
    error(launch(tmp_path / "short", "--resume", stage="tokenizer", max_steps=6),
          "stage dynamics has learned from stage tokenizer as it is")
    said = done(launch(tmp_path / "short", "--resume", max_steps=6))
    assert "stage text goes on from step 3" in said
    assert "stage dynamics begins anew: it has learned from stage tokenizer, which goes on" in said
    one, two = (load_checkpoint(at(tmp_path / name) / "last.pt") for name in ("whole", "short"))
    for stage in one["done"]:
        assert_equal(two["done"][stage], one["done"][stage], stage)
        assert_equal(two["ended"][stage]["optimizer"], one["ended"][stage]["optimizer"], stage)
    steps = [line["step"] for line in records(short) if line["split"] == "train"]
    assert steps == list(range(1, 12 + 3 + 6 + 3 + 6 + 1))    # tokenizer and text go on, dynamics and frame begin anew
    # figures of finished stages stay in the summary of every resume; a picture that cannot be written costs one line
    before = {key: value for key, value in summary(short).items() if key.startswith((*STAGES, "rollout"))}
    assert {"tokenizer_psnr", "tokenizer_seconds", "dynamics_loss", "rollout_copy_4", "text_best_step"} <= before.keys()
    shutil.rmtree(short / "samples")
    (short / "samples").write_text("no folder")
    assert "samples are left out" in done(launch(tmp_path / "short", "--resume", stage="text", max_steps=7))
    after = summary(short)
    assert after["status"] == "done" and all(after[key] == value for key, value in before.items()
                                             if not key.startswith("text"))
    # a checkpoint from before `ended`: it loads, stays as it is, and says so
    checkpoint = load_checkpoint(old / "last.pt")
    for key in ("ended", "figures"):
        del checkpoint[key]
    torch.save(dict(checkpoint), old / "last.pt")
    assert "stage tokenizer stays as it is" in done(launch(tmp_path / "old", "--resume", max_steps=6))


@pytest.mark.parametrize("stop", [2, 4])
def test_stopped_where_an_evaluation_is_due(launch, tmp_path, monkeypatch, stop):
    """A signal before a validation, or at a stage's end: last.pt and best.pt of a run that was not stopped, bit for
    bit; the rate in them is that of the step."""
    how = dict(WORDS, stage="dynamics", eval_interval=2, save_interval=3, max_steps=4, eval_clips=2, rollout_clips=2)
    done(launch(tmp_path / "whole", **how))
    passes = w.passes_of

    def interrupted(name, model, reader, index, step, noise):
        if (name, step) == ("dynamics", stop - 1):
            os.kill(os.getpid(), signal.SIGINT)
        return passes(name, model, reader, index, step, noise)
    with monkeypatch.context() as patched:
        patched.setattr(w, "passes_of", interrupted)
        assert launch(tmp_path / "stopped", **how)[0] == 130
    done(launch(tmp_path / "stopped", "--resume", **how))
    for name in ("last.pt", "best.pt"):
        assert_equal(*(load_checkpoint(at(tmp_path / run) / name) for run in ("stopped", "whole")), name)


# --- Parameters that are cut off ---

def variants():
    for kind, quantiser in itertools.product(("spatial", "spatiotemporal"), ("vq", "fsq")):
        yield "tokenizer", dict(tokenizer=kind, quantiser=quantiser)
    for kind, quantiser, soft in itertools.product(("conv", "transformer"), ("signs", "vq"), (0.0, 1.0)):
        yield "actions", dict(action_model=kind, action_quantiser=quantiser, soft_fraction=soft)
    yield "actions", dict(difference=False, history=1)
    for given, streams in itertools.product(("add", "prepend"), (True, False)):
        yield "dynamics", dict(action_input=given, streams=streams, context=2 if streams else 4)
    yield "dynamics", dict(dynamics="causal", context=2)
    yield "text", {}
    yield "frame", {}


@pytest.mark.parametrize("stage, case", list(variants()), ids=str)
def test_every_parameter_has_a_gradient(put, video, stage, case):
    """One that is not rounding; but for the bias before signs, which their normalisation takes away."""
    put(**{**TINY["train_worldmodel"], "tokens": "cells", "action_source": "true", "text_embd": 16, **case})
    torch.manual_seed(0)
    model = w.build(stage, video)
    with torch.no_grad():
        for p in model.parameters():                          # what begins at 0 hides what is behind it
            if not p.any():
                p.normal_(0, 0.02)
    how, noise = w.STAGES[stage], torch.Generator().manual_seed(0)
    index = torch.randint(video.train.count(how.frames()), (12,), generator=torch.Generator().manual_seed(1))
    hidden = how.hide(12, model.n_tokens, noise) if how.hide else None
    loss, found = how.loss(model, how.read(material(video), index, 1, hidden))
    loss = loss if found is None else loss + how.commitment * found.loss
    loss.backward()
    sizes = {name: p.grad.norm().item() / math.sqrt(p.numel()) for name, p in model.named_parameters()
             if not (name == "to_code.bias" and w.action_quantiser == "signs")}
    assert min(sizes.values()) > 1e-5 * max(sizes.values()), min(sizes, key=sizes.get)


@pytest.mark.parametrize("words, said", [
    ("--code_dim=1", "without a gradient"), ("--batch_size=2 --stage=actions", "signs are normalised"),
    ("--mask_rate=0,0 --tokens=cells --action_source=true", "hides no token")])
def test_settings_that_cut_the_loss_off(launch, tmp_path, words, said):
    """One line, nothing written."""
    error(launch(tmp_path / "out", *words.split()), said)
    assert not (tmp_path / "out").exists()
