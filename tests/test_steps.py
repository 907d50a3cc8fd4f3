"""A step of every script: N passes over B rows are one pass over N B rows; the last one is evaluated like any other; a
stop on one that is to be evaluated leaves the files of a run that never stopped. And the preset that says it is
nanoGPT's is; stages of the world model go on; nothing in them is cut off.

And a step waits for no device.

Noise drawn for each pass is drawn in another order, so nothing here draws any: no dropout, no forcing, of the dVAE the
first step, where codes are not noisy yet; each code is nearer than the next by far more than rounding. SGD, as a step
of Adam from a gradient of rounding errors is as long as any other.
"""
import contextlib
import functools
import itertools
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import train_worldmodel as w
from choices import clear
from data import arc, text as texts
from data.video import load
from forks import assert_equal, assert_error, records, summary
from model import FEED_FORWARDS, MIXERS, TransformerConfig, build_model, from_checkpoint
from models.world_actions import Signs
from nanolab import run as experiment, settings as flags
from nanolab.generate import draw
from nanolab.run import Loop, Run, load_checkpoint
from nanolab.score import score
from nanolab.world import Reader
from scripts import TINY, curve, folder, typed
from test_scripts import fresh

grids, read_settings = functools.cache(arc.load), functools.cache(flags._read_settings)
PLAIN = dict(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0, max_steps=1)
MODELS = PLAIN | dict(dropout=0.0, init="normal", n_head=2, eval_interval="none")
BASE = {  # on top of TINY
    "train_enwik8": MODELS | dict(n_embd=16, block_size=16, positions="rope"),
    "train_facts": MODELS | dict(n_people=20, n_unseen=0),
    "train_mult": PLAIN | dict(
        grad_clip="none", val_examples=2, eval_examples=2, n_latent=3, models="simple,latent,prefix"),
    "train_dvae": PLAIN | dict(grad_clip="none", n_val=2, reset_interval="none", usage_weight="0,0", ema_decay=0.0),
    "train_worldmodel": dict(max_steps=1, eval_clips=2, rollout_clips=2, save_interval=100, warmup_steps=1,
                             optimizer="adamw", eps=1e-3)}   # so large that a step goes with the gradient


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path, one_thread):
    """launch(script, name, more words, settings on top of TINY): the script in this process, without curves and the
    copy of its code; a signal comes in the optimiser step `stop_at`. .code, .out and .err of it; .dir; .lines of
    metrics without clocks; .saved: [(file, step, copy of it)] of all that it saved."""
    def launch(script, name, *more, stop_at=None, **settings):
        g, saved, steps, write = fresh(f"{script}.py"), [], itertools.count(1), Run._write

        def writing(run, file, state):
            write(run, file, state)
            copy = tmp_path / f"{name}-{len(saved)}-{file}"
            saved.append((file, state["step"], shutil.copyfile(run.dir / file, copy)))

        def stepping(*given):
            if next(steps) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
        if script == "train_dvae":
            g.update(load=grids, draw_all=lambda *_: None)   # the same grids, drawn once
        code, hook = 0, register_optimizer_step_pre_hook(stepping)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_write", writing)
            patch.setattr(Run, "_copy_code", lambda run: None)
            for stubbed in ("draw_curves", "_output", "_version"):
                patch.setattr(experiment, stubbed, lambda *words: None)
            patch.setattr(flags, "_read_settings", lambda path: dict(read_settings(str(path))))
            patch.setattr(sys, "argv", list(map(str, typed(script, tmp_path / name, *more, **settings))))
            try:
                g["main"]()
            except SystemExit as end:
                code = end.code
            finally:
                hook.remove()
        place = folder(script, tmp_path / name)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict(), dir=place, saved=saved,
                               lines=records(place) if place.exists() else [])
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    yield launch
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def done(launch):
    """launch, of a run that comes to a good end."""
    def done(*words, **how):
        told = launch(*words, **how)
        assert told.code == 0, told.err
        return told
    return done


# --- A clock in place of a number of steps ---

@pytest.mark.parametrize("script", TINY)
def test_max_seconds_at_an_even_pace_are_max_steps(done, monkeypatch, script, text):
    """With steps of a quarter of a second rates, weights of losses and layers that predict, codes and all weights are
    those of the steps that the seconds are enough for; the sixth is the last one."""
    lap = experiment.Loop.lap

    def even(loop, began, due):
        rows, _ = lap(loop, began, due)
        loop["seconds"] = 0.25 * loop["step"]
        return rows, 0.25 * len(rows)
    monkeypatch.setattr(experiment.Loop, "lap", even)
    how = dict(max_steps=6, schedule="cosine", warmup_steps=2, save_interval=12, eval_interval=6) | {
        "train_enwik8": dict(dataset=text, eval_interval="none", intermediate_losses=True, schedule="wsd"),
        "train_facts": dict(eval_interval="none"),
        "train_dvae": dict(mask_rate="0,0.5", reset_interval=2, reset_fraction=0.5, kl_weight="0,0.1"),
        "train_mult": dict(val_examples=2, eval_examples=2, eval_interval=4),
        "train_worldmodel": dict(stage="actions", eval_clips=2, soft_fraction=0.5)}.get(script, {})
    runs = [done(script, name, **how | more) for name, more in (
        ("steps", {}), ("seconds", dict(max_steps=1000, max_seconds=1.5)))]
    first, second = (told.lines for told in runs)
    assert first == second and sum("lr" in line for line in first) >= 6
    assert_equal(*map(weights, runs))


# --- N passes over B rows ---

MOE = dict(ff="moe", n_expert=4, expert_balance="bias", activation="swiglu")
WORDS = dict(tokens="cells", action_source="true", mask_rate="0.3,0.9")
PASSES = {
    "train_enwik8": {
        "layers": dict(n_targets=2, intermediate_losses=True, positions="learned_per_layer", batching="epochs"),
        "experts": MOE | dict(mtp_depth=1, n_shared_expert=1, mixer="mla"),
        "one expert": MOE | dict(expert_top_k=1, expert_balance="none"),
        "memory": dict(mixer="compressive,mamba"),
        "pyramid": dict(shorten=2, n_layer=3, output="stablemax")},
    "train_facts": {
        "in_tool": dict(task="in_tool", tokenizer="bytes", kind="bios", form="natural"),
        "in_weight": dict(task="in_weight", prefix=True),
        "both": dict(task="both", loss_on="all", mixer="compressive"),
        "mqar": dict(task="mqar", block_size=32, random_non_queries=True),
        "text": MOE | dict(task="text", block_size=16, tokenizer="bpe:270", mixer="window,mingru")},
    "train_mult": {
        "reversed": dict(format="reversed", sum_head="classes", sequence_weight=2.0),
        "plain": dict(format="plain", sum_head="value", sequence_weight=0.5),
        "padded": dict(format="padded", sum_head="classes"), "trace": dict(format="trace", sum_head="value")},
    "train_dvae": {
        "gumbel_soft": dict(estimator="gumbel_soft", loss_scale="token"),
        "gumbel_hard": dict(estimator="gumbel_hard", hard_at=0.0, loss_scale="token", kl_weight="0.1,0.1",
                            mask_rate="0.3,0.3"),
        "reinmax": dict(estimator="reinmax", hard_at=0.0, loss_scale="grid", codebook_bound=0.1, kl_target=3.0),
        "vq": dict(estimator="vq"), "vq dot": dict(estimator="vq", similarity="dot", layout="canvas"),
        "fsq": dict(estimator="fsq", loss_scale="token", mask_rate="0.5,0.5"), "lfq": dict(estimator="lfq"),
        "residual vq": dict(estimator="vq", vq_levels=2, rotation_trick=True),
        "simvq heads": dict(estimator="simvq", vq_heads=2)},
    "train_worldmodel": {
        "tokenizer vq": dict(stage="tokenizer", tokenizer="spatiotemporal", tokenizer_frames=3),
        "tokenizer fsq": dict(stage="tokenizer", quantiser="fsq"),
        "actions vq": dict(stage="actions", action_quantiser="vq", soft_fraction=0.0),
        "actions transformer": dict(stage="actions", action_quantiser="vq", action_model="transformer", history=3),
        "dynamics, text, frame": WORDS,                      # all three, one after the other
        "dynamics of the last frame": WORDS | dict(stage="dynamics", streams=False, action_input="prepend"),
        "dynamics causal": WORDS | dict(stage="dynamics", dynamics="causal")},
}
BATCHES = {"train_worldmodel": ("tokenizer_batch", "batch_size", "dynamics_batch", "text_batch", "frame_batch")}


def weights(told):
    last = load_checkpoint(told.dir / "last.pt")
    return last.get("done") or {name: own["model"] for name, own in last.get("models", {"": last}).items()}


@pytest.mark.parametrize("script, case", [(script, case) for script, cases in PASSES.items() for case in cases])
def test_passes_are_one_pass_over_all_their_rows(done, put, text, script, case):
    """Three passes, whose weights differ: what is logged and all weights and codes are those of one pass."""
    how = BASE[script] | PASSES[script][case]
    if script == "train_enwik8" or case == "text":
        how["dataset"] = text
    rows, sizes = 6 if script == "train_worldmodel" else 12, BATCHES.get(script, ("batch_size",))
    some, whole = (done(script, f"{n}", **how, **dict.fromkeys(sizes, rows // n), grad_accum=n) for n in (3, 1))
    logged = [[line for line in told.lines if line["split"] == "train"] for told in (some, whole)]
    for one, two in zip(*logged, strict=True):
        assert one.keys() == two.keys() and two["grad_norm"] > 1e-3
        for name, value in two.items():
            assert one[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name
    atol = 1e-6 if script in ("train_enwik8", "train_facts") else 1e-5
    torch.testing.assert_close(weights(some), weights(whole), rtol=1e-5, atol=atol)
    if how.get("ff") == "moe":
        assert script == "train_facts" or {"experts_0", "imbalance_1"} <= two.keys()
        assert how["expert_balance"] != "bias" or weights(whole)[""]["blocks.0.ff.correction"].any()
    if how.get("stage") in ("tokenizer", "actions"):         # no choice is compared that rounding could turn
        put(**how)
        torch.manual_seed(1337)
        data, stage = load("gridworld", 12, 4, 7, 4, 4), w.STAGES[how["stage"]]
        model, index = w.build(how["stage"], data), w.Stream(data.train, stage.frames(), 6, 1337).at(0)
        with clear():
            stage.loss(model, stage.read(material(data), index, 0, None))


@pytest.mark.parametrize("script, settings, said", [
    ("train_dvae", dict(usage_weight="0.1,0.1", tc_weight="0,0.1"), "usage_weight, tc_weight"),
    ("train_dvae", dict(usage_weight="0.1,0.1", estimator="lfq"), "usage_weight"),
    ("train_dvae", dict(usage_weight="0.1,0.1", estimator="vq"), None),
    ("train_dvae", dict(kl_weight="0.1,0.1"), None),
    ("train_enwik8", MOE | dict(expert_balance="loss"), "expert_balance loss")],
    ids=["usage", "lfq", "vq", "kl", "experts"])
def test_what_is_not_linear_in_the_batch_is_said(done, text, script, settings, said):
    how = BASE[script] | settings | (dict(dataset=text) if script == "train_enwik8" else {})
    told = done(script, "run", **how | dict(batch_size=2, grad_accum=2, max_steps=0))
    lines = [line for line in told.out.splitlines() if "not linear" in line]
    assert [line.startswith("grad_accum 2: ") and said in line for line in lines] == [True] * bool(said)


def test_what_a_step_lacks_is_left_out_of_its_mean(done):
    """A part that begins to weigh between two lines of the log: the mean of the steps that have it."""
    how = BASE["train_dvae"] | dict(batch_size=4, tc_weight="0,0.1", max_steps=2)
    line, one, two = (line for n in (2, 1) for line in done("train_dvae", f"{n}", **how, log_interval=n).lines
                      if line["split"] == "train")
    assert "tc" not in one and line["tc"] == two["tc"] and line["kl"] == (one["kl"] + two["kl"]) / 2


# --- After the last step, and on a stop ---

ENDS = {"train_enwik8": BASE["train_enwik8"] | dict(lr=0.3, ema_decay=0.0),
        "train_mult": BASE["train_mult"] | dict(models="simple,latent", batch_size=4),
        "train_dvae": BASE["train_dvae"] | dict(batch_size=4, estimator="vq", ema_decay=0.5)}


def validated(told):
    """[(step, exact match, loss)] of the validations by the protocol of the loop, of one model."""
    lines = [line for line in told.lines if line["split"] == "val" and "final" not in line]
    return [(line["step"], line.get("exact", line.get("accuracy", 0)), -line.get("bpb", line.get("nats", line["loss"])))
            for line in lines if line.get("model") in (None, "latent") and line.get("weights") in (None, "raw")]


@pytest.mark.parametrize("protocol", ["stride:5", "cache"])
def test_the_whole_split_is_scored_as_asked(done, text, protocol):
    """In the middle and at the end; the windows, by which the best is chosen, stay those of the block protocol."""
    told = done("train_enwik8", "run", **BASE["train_enwik8"] | dict(
        dataset=text, max_steps=2, eval_interval=2, full_eval_interval=2, full_eval_protocol=protocol, ema_decay=0.0))
    lines = [line for line in told.lines if line["split"] == "val"]
    model = from_checkpoint(load_checkpoint(told.dir / "last.pt"), "raw").for_inference()
    wanted = score(model, texts.load(str(text)).val, protocol).bpb
    assert [line["protocol"] for line in lines] == [protocol, "block, 2 windows", protocol]
    assert lines[0]["bpb"] == lines[2]["bpb"] == pytest.approx(wanted, rel=1e-6)
    assert summary(told.dir)["best_bpb"] == lines[1]["bpb"] != wanted


@pytest.mark.parametrize("protocol, said", [
    ("cache", "cache is impossible past block_size 16 with positions learned: every cached state would need a new "
              "position at each step; use block or stride:S"), ("stride:17", "S from 1 to block_size (16)")])
def test_a_protocol_that_cannot_be_is_refused_at_the_start(launch, text, protocol, said):
    told = launch("train_enwik8", "run", **BASE["train_enwik8"] | dict(
        dataset=text, positions="learned", eval_interval=2, full_eval_protocol=protocol))
    assert told.code == 2 and told.err.count("\n") == 1 and said in told.err and not told.dir.exists()


@pytest.mark.parametrize("script", ["train_enwik8", "train_mult", "train_dvae"])
def test_the_last_step_counts_for_best(done, launch, text, script):
    """Where eval_interval does not divide max_steps too; a stopped run evaluates nothing more. What is killed once a
    best.pt is there has a last.pt to go on from; last.pt knows of the last step what best.pt knows."""
    models = 2 if script == "train_mult" else 1
    how = ENDS[script] | dict(max_steps=3, eval_interval=2, save_interval=100)
    how |= dict(dataset=text) if script == "train_enwik8" else {}
    file = "best_latent.pt" if models == 2 else "best.pt"
    told = done(script, "whole", **how)
    found, last, best = validated(told), *(load_checkpoint(told.dir / name) for name in ("last.pt", file))
    assert [step for step, *_ in found] == [0, 2, 3][script == "train_enwik8":]
    assert max(found, key=lambda line: line[1:])[0] == 3 == best["step"]
    assert summary(told.dir)["best_step_latent" if models == 2 else "best_step"] == 3 and told.lines[-1]["final"]
    assert models == 2 or told.saved[0][:2] == ("last.pt", 0)
    if script == "train_enwik8":
        assert [(name, step) for name, step, _ in told.saved] == [
            ("last.pt", 0), ("best.pt", 2), *[(name, 3) for name in ("last.pt", "best.pt", "last.pt")]]
        assert summary(told.dir)["best_bpb"] == -found[1][2] == last["loop"]["best"] and -found[1][2] < -found[0][2]
        assert last["loop"] == best["loop"] and last["loop"]["evaluated"] == 2
    stopped = launch(script, "parts", stop_at=3 * models, **how)
    assert stopped.code == 130 and validated(stopped) == found[:-1] and "final" not in stopped.lines[-1]
    resumed = done(script, "parts", "--resume", **how)
    assert validated(resumed) == found and told.lines == resumed.lines
    for name in (file, "last.pt"):
        assert_equal(*(load_checkpoint(run.dir / name) for run in (resumed, told)), name)


def test_the_first_file_is_last_pt(done):
    """Also where the first weights are the best so far."""
    how = BASE["train_facts"] | dict(task="mqar", block_size=32, eval_interval=2)
    saved = done("train_facts", "run", **how).saved
    assert [(name, step) for name, step, _ in saved[:2]] == [("last.pt", 0), ("best.pt", 0)]


def test_a_longer_run_neither_waits_less_nor_forces_sooner_for_the_last_validation(done):
    how = ENDS["train_mult"] | dict(eval_interval=2, forcing="linear", stability_window=2, stability_eps=10)
    whole = done("train_mult", "whole", **how | dict(max_steps=4))
    done("train_mult", "parts", **how | dict(max_steps=3))
    parts = done("train_mult", "parts", "--resume", **how | dict(max_steps=4))
    one, two = (load_checkpoint(told.dir / "last.pt")["models"]["latent"]["forcing"] for told in (parts, whole))
    assert one["losses"] == two["losses"] and len(one["losses"]) == 2
    assert curve(parts.dir, "loss") == curve(whole.dir, "loss")


@pytest.mark.parametrize("script, stop", [*((script, 2) for script in (*ENDS, "train_worldmodel")),
                                          ("train_worldmodel", 4)])
def test_a_stop_where_an_evaluation_is_due(done, launch, text, script, stop):
    """Also at a stage's end: every file that is saved from there on, with the rate of its step in the optimiser's
    groups, is that of a run that never stopped."""
    how = ENDS.get(script, WORDS | dict(stage="dynamics", eval_clips=2, rollout_clips=2))
    how = how | dict(max_steps=4, eval_interval=2, save_interval=2, warmup_steps=3, schedule="cosine")
    how |= dict(dataset=text) if script == "train_enwik8" else {}
    whole = done(script, "whole", **how)
    stopped = launch(script, "stopped", stop_at=stop * (2 if script == "train_mult" else 1), **how)
    assert stopped.code == 130 and stopped.saved[-1][1] == stop
    resumed = done(script, "stopped", "--resume", **how)
    due, found = ({(name, step): load_checkpoint(copy) for name, step, copy in told.saved if step >= stop}
                  for told in (whole, resumed))
    if script in ("train_enwik8", "train_worldmodel") and stop < 4:
        del due["last.pt", stop]                             # which the stop has written, and its evaluation does not
    assert due.keys() == found.keys() and any(name[:4] == "best" and step == stop for name, step in found)
    for name in due:
        assert_equal(found[name], due[name], name)


# --- The world model: its table, what is counted, a finished stage that is asked for more ---

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


def test_a_longer_run_goes_on_where_the_shorter_ended(done, launch, tmp_path):
    """Under a constant rate the weights of a run that was asked for all steps at once; what has read them is anew."""
    world = functools.partial(done, "train_worldmodel", action_source="true", schedule="constant", dynamics_change=0.0,
                              reset_fraction=1.0, ema_decay=0.5, eval_clips=2, rollout_clips=2, decode_steps=1,
                              save_interval=100, eval_interval=2)
    whole, short = world("whole", max_steps=4).dir, world("short", max_steps=2).dir
    old = shutil.copytree(short, folder("train_worldmodel", tmp_path / "old"))
    assert_error(launch("train_worldmodel", "short", "--resume", stage="tokenizer", max_steps=4),
                 "stage dynamics has learned from stage tokenizer as it is")
    said = world("short", "--resume", max_steps=4).out
    assert "stage text goes on from step 2" in said
    assert "stage dynamics begins anew: it has learned from stage tokenizer, which goes on" in said
    one, two = (load_checkpoint(run / "last.pt") for run in (whole, short))
    for stage in one["done"]:
        assert_equal(two["done"][stage], one["done"][stage], stage)
        assert_equal(two["ended"][stage]["optimizer"], one["ended"][stage]["optimizer"], stage)
    assert curve(short) == list(range(1, 8 + 2 + 4 + 2 + 4 + 1))  # tokenizer and text go on, dynamics and frame anew
    # figures of finished stages stay in the summary of every resume; a picture that cannot be written costs one line
    before = {key: value for key, value in summary(short).items() if key.startswith((*w.STAGES, "rollout"))}
    assert {"tokenizer_psnr", "tokenizer_seconds", "dynamics_loss", "rollout_copy_4", "text_best_step"} <= before.keys()
    shutil.rmtree(short / "samples")
    (short / "samples").write_text("no folder")
    assert "samples are left out" in world("short", "--resume", stage="text", max_steps=5).out
    after = summary(short)
    assert after["status"] == "done" and all(after[key] == value for key, value in before.items()
                                             if not key.startswith("text"))
    # a checkpoint from before `ended`: it loads, stays as it is, and says so
    checkpoint = load_checkpoint(old / "last.pt")
    for key in ("ended", "figures"):
        del checkpoint[key]
    torch.save(dict(checkpoint), old / "last.pt")
    assert "stage tokenizer stays as it is" in world("old", "--resume", max_steps=4).out


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
def test_settings_that_cut_the_loss_off(launch, words, said):
    """One line, nothing written."""
    told = launch("train_worldmodel", "out", *words.split())
    assert_error(told, said)
    assert not told.dir.exists()


# --- Graphs, and a device whose numbers nobody can read ---

def test_no_layer_breaks_a_graph():
    """All mixers and feed-forwards in one model, on a segment after another. Before `waits`, with whose patches the
    compiler would learn what autocast is."""
    model = build_model(TransformerConfig(
        n_layer=len(MIXERS), n_head=2, n_embd=8, block_size=2, positions="rope", mixer=",".join(MIXERS), window=2,
        sparse_stride=2, sparse_summary=1, compression_rate=2, ff=",".join(FEED_FORWARDS), state_dim=2))
    x, memory = torch.zeros(2, 2, dtype=torch.int64), model.new_memory(2)
    model(x, memory=memory)
    told = torch._dynamo.explain(model)(x, x.unsqueeze(2), memory=memory)
    torch._dynamo.reset()
    assert told.graph_count == 1 and not told.break_reasons, told.break_reasons


META = torch.device("meta")


class Stepped(BaseException):
    """Enough was seen."""


class Waits(TorchFunctionMode):
    """Once `on`, refuses copies of what the CPU holds to "meta" for which a GPU's host would wait; what is read from
    there "meta" refuses itself: .item(), .tolist(), .cpu(), nonzero, bincount, unique, an index of bools."""
    COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.to, torch.Tensor.copy_}
    on = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if self.on and func in self.COPIES and made.is_meta and not (kwargs or {}).get("non_blocking"):
            source = args[func is torch.Tensor.copy_]
            assert func is not torch.Tensor.new_tensor and getattr(source, "is_meta", False), "a copy that waits"
        return made


@pytest.fixture
def waits(monkeypatch):
    """Waits, with "meta" as a device that trains: it has no autocast, and no generator of its own."""
    cast, enabled, fill, of = torch.autocast, torch.is_autocast_enabled, torch.Tensor.exponential_, torch.Generator

    class Generator(torch.Generator):
        device = META

        def __new__(cls, device="cpu"):
            return super().__new__(cls) if torch.device(device) == META else of(device)
    patched = {
        "autocast": lambda kind, *how, **more: contextlib.nullcontext() if kind == "meta" else cast(kind, *how, **more),
        "is_autocast_enabled": lambda *kind: kind != ("meta",) and enabled(*kind), "Generator": Generator}
    for name, value in patched.items():
        monkeypatch.setattr(torch, name, value)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda t, *rate, generator=None: fill(
        t, *rate, generator=None if t.is_meta else generator))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.cpu)
    with Waits() as waits:
        yield waits


WORLD = dict(tokens="cells", action_source="true", reset_interval=100)


@pytest.mark.parametrize("script, how", [
    ("train_enwik8", dict(mixer="full,compressive", batching="streams", positions="rope", ff="mlp,moe", grad_accum=1)),
    ("train_facts", dict(prefix=True)),
    ("train_mult", dict(
        models="simple,latent,prefix", positions="rope", forcing="linear", forcing_start=0, sum_weight=1.0)),
    ("train_dvae", dict(mask_rate="0,0.3", tc_weight="1,1")), ("train_dvae", dict(estimator="vq")),
    ("train_worldmodel", dict(stage="tokenizer", quantiser="vq", reset_interval=100)),
    ("train_worldmodel", WORLD | dict(stage="actions")), ("train_worldmodel", WORLD | dict(stage="dynamics")),
    ("train_worldmodel", WORLD | dict(stage="text")), ("train_worldmodel", WORLD | dict(stage="frame"))], ids=str)
def test_a_step_waits_for_no_device(launch, waits, monkeypatch, text, script, how):
    """The second steps of all models. Not due in them, and right to wait: a line of metrics, a check for what is not
    finite, a save, an evaluation, codes that are reset. kl_target waits once a step."""
    begin, load, laps, last = Loop.__init__, texts.load, itertools.count(1), 6 if script == "train_mult" else 2
    monkeypatch.setattr(experiment, "resolve_device", lambda *_: (META, torch.float32))
    monkeypatch.setattr(experiment, "measure_peak_flops", lambda *_: 1.0)
    monkeypatch.setattr(texts, "load", lambda name, most, where, ends: load(name, most, "cpu", ends))
    monkeypatch.setattr(Run, "save", lambda *_, **__: None)
    monkeypatch.setattr(Loop, "__init__", lambda loop, values, *more: begin(loop, values | dict(evaluated=0), *more))

    def lap(loop, began, due):
        if (done := next(laps)) == last:
            raise Stepped
        waits.on = done >= last // 2
        return [], 0.0
    monkeypatch.setattr(Loop, "lap", lap)
    how = how | dict(dataset=text) if script == "train_enwik8" else how
    how = how | dict(max_steps=50, save_interval=50, log_interval=50, eval_interval=50)
    with pytest.raises(Stepped):
        launch(script, "meta", **how)


@pytest.mark.parametrize("how", [
    dict(mixer=",".join(MIXERS)), dict(mixer=",".join(kind for kind in MIXERS if kind != "compressive")),
    dict(mixer="xl,compressive", positions="relative"), dict(mixer="xl", positions="relative"),
    dict(positions="learned", mtp_depth=1, n_targets=2)], ids=str)
def test_no_layer_waits_for_a_device(waits, how):
    """In training, on segments and on ragged rows, nor for a byte, but for a compressive memory's, whose rows come to
    the ends of blocks when the host says. The first pass of ragged rows alone asks whether they are in order."""
    how = dict(positions="rope", n_layer=1 + how.get("mixer", "").count(","), ff=",".join(FEED_FORWARDS)) | how
    config = TransformerConfig(**how, n_head=2, n_embd=16, block_size=16, window=4, sparse_stride=4)
    model, x = build_model(config).to(META), torch.zeros(2, 16, dtype=torch.int64, device=META)
    targets = torch.zeros(2, 16, config.n_labels, dtype=torch.int64, device=META)
    memory, ragged = model.new_memory(2) if config.carries else None, "compressive" not in config.mixers
    for waits.on in (False, True):                            # tables of rope that are too short grow once
        for more in (dict(memory=memory), dict(memory=memory), dict(positions=x) if ragged else {}):
            model(x, targets, **more)[0].backward()
    model.eval()
    for last in (None, x[:, :1]) if ragged else (None,):
        cache = model.new_cache(2, 64, window=16 if config.rolls else None)
        cache.last = last
        with torch.inference_mode():
            token = x[:, :4]
            for _ in range(3):
                token = draw(model(token, cache=cache)[:, -1], torch.Generator(), temperature=0.8, top_k=5)[:, None]


# ------------------------------------------------------------------------------------------------------- nanogpt_cpu

def gpt2(w, x, y, n_layer, n_head):
    """GPT-2's loss, nats: pre-LN, no biases, a tied head. w: weights by the name of nanolab's; x, y (B, T) int64."""
    B, T = x.shape
    C = w["embed"].size(1)

    def layer_norm(h, gain):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    h = w["embed"][x] + w["position"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(n_layer):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (layer_norm(h, block["norm1.gain"]) @ block["mixer.qkv.weight"].T).view(B, T, 3, n_head, -1).permute(
            2, 0, 3, 1, 4)                                               # each (B, H, T, D)
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // n_head)).masked_fill(future, -math.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C) @ block["mixer.out.weight"].T
        wide = layer_norm(h, block["norm2.gain"]) @ block["ff.up.weight"].T
        h = h + 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2))) @ block["ff.down.weight"].T
    logits = layer_norm(h, w["norm.gain"]) @ w["embed"].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_nanogpt_cpu_is_nanogpts_formula(done, monkeypatch, text):
    """The first 10 losses of the preset, in float32, from the same weights and batches: decoupled decay of everything
    with two dimensions, a warm-up by (i + 1) / 101, then a cosine; the norm clipped to 1."""
    monkeypatch.setitem(TINY, "train_enwik8", dict(
        preset="nanogpt_cpu", dataset=text, dtype="float32", device="cpu", save_interval=100, eval_interval="none",
        log_interval=1, sample_length=0, run_name="run"))
    zero = load_checkpoint(done("train_enwik8", "zero", max_steps=0).dir / "last.pt")
    run = done("train_enwik8", "run", max_steps=10).dir
    s = zero["settings"]
    assert (s["n_layer"], s["n_head"], s["n_embd"], s["block_size"], s["batch_size"]) == (4, 4, 128, 64, 12)
    w = {name: p.detach().clone().requires_grad_() for name, p in from_checkpoint(zero).named_parameters()}
    batches = texts.Batches(texts.load(str(text), None, "cpu").train, 12, 64, 1, "random", s["data_seed"])
    mean, square = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    found = []
    for i in range(10):
        x, y = batches.next()
        loss = gpt2(w, x, y[..., 0], 4, 4)
        loss.backward()
        found.append(loss.item())
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in w.values()))
        rate = 1e-3 * (i + 1) / (100 + 1)
        with torch.no_grad():
            for name, p in w.items():
                grad = p.grad * min(1.0, 1.0 / (norm + 1e-6))
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.99 * square[name] + 0.01 * grad * grad
                if p.dim() >= 2:
                    p.mul_(1 - rate * 0.1)
                root = (square[name] / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8
                p.sub_(rate * mean[name] / (1 - 0.9 ** (i + 1)) / root)
                p.grad = None
    assert curve(run, "loss") == pytest.approx(found, rel=1e-6)
