"""Every script, killed by SIGKILL as it starts, steps and saves: the bits of a run that never stopped."""
from concurrent.futures import ThreadPoolExecutor

import pytest

from forks import assert_done, kill_again_and_again, summary
from nanolab.run import load_checkpoint
from scripts import assert_same_end, curve, folder, typed

CASES = {
    ("train_enwik8", "sgd"): dict(
        max_steps=18, optimizer="sgd", lr=0.03, momentum=0.9, batching="random", seed=1, data_seed=2, n_targets=2,
        intermediate_losses=True),
    ("train_enwik8", "adamw, memory"): dict(
        max_steps=24, optimizer="adamw", orthograd=True, mixer="compressive,mamba", positions="rope",
        batching="streams", batch_size=8, memory_length=16, compressed_length=4, seed=5, data_seed=6, log_interval=4,
        keep_last=2, keep_every=10),
    ("train_enwik8", "muon, experts"): dict(
        max_steps=18, optimizer="muon", schedule="wsd", ff="moe", expert_balance="bias", n_shared_expert=1,
        activation="swiglu", mtp_depth=1, positions="rope", seed=13, data_seed=14, save_interval=2),
    ("train_enwik8", "schedule_free"): dict(
        max_steps=18, optimizer="schedule_free", schedule="constant", lr=0.01, parametrisation="mup", seed=15,
        data_seed=16, save_interval=3),
    ("train_enwik8", "ivon"): dict(
        max_steps=18, optimizer="ivon", schedule="constant", lr=0.1, ess=10000.0, grad_accum=2, batching="epochs",
        seed=17, data_seed=18, log_interval=2),
    ("train_dvae", "reinmax"): dict(
        max_steps=15, estimator="reinmax", mask_rate="0.1,0.5", dropout=0.1, grad_accum=2, group=4, reset_interval=3,
        codebook_init="kmeans", kl_target=5.0, mi_weight="0.1,0", tc_weight="0,0.1", hard_at=0.5, layout="canvas",
        ema_decay=0.9, log_interval=3, save_interval=2, seed=3),
    ("train_dvae", "vq"): dict(
        max_steps=15, estimator="vq", reset_interval=2, codebook_init="kmeans", similarity="dot", ema_decay=0.0,
        seed=4, vq_levels=2, rotation_trick=True),
    ("train_mult", "forced"): dict(
        max_steps=18, dropout=0.2, forcing="linear", forcing_start=4, forcing_slope=0.05, stability_window=2,
        stability_eps=0.5, eval_interval=2, sequence_weight=1.0, sum_head="classes", ema_decay=0.9, grad_accum=2),
    ("train_mult", "schedule_free"): dict(
        max_steps=18, optimizer="schedule_free", schedule="constant", format="trace", save_interval=3),
    ("train_facts", "in_tool"): dict(
        max_steps=18, eval_prompts=4, task="in_tool", tokenizer="bytes", ema_decay=0.9, grad_accum=2, dropout=0.2,
        keep_last=2, seed=3),
    ("train_facts", "mqar"): dict(
        max_steps=18, eval_prompts=4, task="mqar", block_size=32, short_conv=2, optimizer="adamw", grad_accum=2,
        save_interval=3, log_interval=2, seed=5),
    ("train_facts", "text"): dict(
        max_steps=18, eval_prompts=4, task="text", tokenizer="bpe:270", block_size=16, ema_decay=0.9, dropout=0.1,
        batching="epochs", save_interval=2, seed=6),
    ("train_worldmodel", "all stages"): dict(
        seed=1, action_quantiser="vq", action_model="transformer", action_input="prepend", grad_accum=2,
        save_interval=2),
    ("train_worldmodel", "cells"): dict(
        seed=2, tokens="cells", action_source="true", ema_decay=0.9, dynamics="causal", keep_every=3),
}


@pytest.mark.parametrize("script, case", CASES)
def test_killed_at_random_moments(forks, text, tmp_path, script, case):
    how, runs = dict(CASES[script, case]), [folder(script, tmp_path / name) for name in ("killed", "whole")]
    if script == "train_enwik8" or case == "text":
        how["dataset"] = text
    more = []
    if script == "train_mult":                               # one model is six steps ahead of the other
        for run in runs:
            ahead = how | dict(models="simple", max_steps=6)
            assert_done(forks.run(typed(script, run.parents[1], **ahead), tmp_path))
        how["models"], more = "simple,latent", ["--resume"]
    commands = [typed(script, run.parents[1], *more, **how) for run in runs]
    with ThreadPoolExecutor(2) as pool:
        kills = pool.submit(kill_again_and_again, forks, commands[0], tmp_path, runs[0], how.get("seed", len(case)))
        assert_done(pool.submit(forks.run, commands[1], tmp_path).result())
        assert kills.result() >= (3 if script == "train_enwik8" else 2)
    assert_same_end(*runs, how.get("log_interval", 1))
    last = load_checkpoint(runs[0] / "last.pt")
    assert last["step"] == how.get("max_steps", last["step"]) == summary(runs[0])["step"]
    assert summary(runs[0])["status"] == "done"
    if script == "train_facts":
        assert last["loop"]["rows"] == 18 * 8 * how.get("grad_accum", 1)
    if script == "train_enwik8" and how.get("keep_last"):
        assert sorted(int(path.stem[5:]) for path in runs[0].glob("step_*.pt")) == [0, 10, 20, 23, 24]
    if case == "cells":                                      # of each stage the multiples of its own steps
        assert sorted(int(path.stem[5:]) for path in runs[0].glob("step_*.pt")) == [0, 3, 4, 7, 8, 11]
    if script == "train_mult":
        assert last["steps"] == {"simple": 18, "latent": 18}
        assert case != "forced" or 0 < last["models"]["simple"]["forcing"]["steps"] <= 16
    elif script != "train_worldmodel":                       # whose stages, like models of train_mult, average alone
        average = last.get("ema")
        assert bool(average) == (script == "train_enwik8" or case in ("in_tool", "text")
                                 or script == "train_dvae" and case != "vq")
        assert not average or average["updates"] == last["step"]
    if script == "train_facts":
        assert len(set(curve(runs[0], "loss"))) > 5
