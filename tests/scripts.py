"""The five scripts with the settings of a tiny run; what it takes for two runs to be the same."""
import functools
from pathlib import Path

from forks import assert_done, assert_equal, records
from nanolab.run import load_checkpoint

TINY = {
    "train_enwik8": dict(
        n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, grad_accum=2, dropout=0.2, ema_decay=0.9,
        lr=0.003, warmup_steps=3, n_targets=1, intermediate_losses=False, max_steps=12, eval_interval=5,
        eval_windows=2, full_eval_interval=10, save_interval=1, log_interval=1, sample_length=0, device="cpu",
        dtype="float32", run_name="run"),
    "train_dvae": dict(
        max_side=5, n_train=60, n_val=1, n_codes=6, codebook_size=16, code_dim=8, n_head=2, n_embd=16, cell_dim=8,
        batch_size=8, max_steps=12, warmup_steps=2, eval_interval=9, save_interval=1, log_interval=1, device="cpu",
        dtype="float32", run_name="run", tag="test"),
    "train_mult": dict(
        min_digits=1, max_digits=2, n_examples=500, val_fraction=0.2, val_examples=60, n_layer=1, n_head=2,
        n_embd=16, batch_size=8, max_steps=12, warmup_steps=2, eval_interval=5, eval_examples=40, save_interval=1,
        log_interval=1, device="cpu", dtype="float32", run_name="run", tag="test"),
    "train_facts": dict(
        n_people=6, n_unseen=4, n_rows=90, n_test_rows=20, mqar_vocab=32, n_layer=2, n_embd=16, batch_size=8,
        max_steps=12, warmup_steps=2, eval_interval=5, eval_prompts=6, final_prompts=8, save_interval=1,
        log_interval=1, device="cpu", dtype="float32", run_name="run", tag="test"),
    "train_worldmodel": dict(
        n_train=12, n_val=4, length=7, side=4, cell_px=4, patch=4, codebook_size=8, code_dim=4, tokenizer_embd=8,
        tokenizer_batch=2, action_embd=8, n_head=2, action_layers=1, n_codes=4, batch_size=4, context=3,
        dynamics_layers=1, dynamics_embd=8, dynamics_batch=2, text_layers=1, text_embd=8, text_batch=2,
        frame_layers=1, frame_embd=8, frame_batch=2, max_steps=4, warmup_steps=2, eval_interval=3, save_interval=1,
        log_interval=1, eval_clips=8, decode_steps=2, rollout_clips=4, play_presses=5, reset_interval=2, device="cpu",
        dtype="float32", run_name="run"),
}

# A run that tests go on from: with every numbered checkpoint, which train_worldmodel.py does not keep.
KEEP = {
    "train_enwik8": dict(keep_last=12, tensorboard=True),
    "train_dvae": dict(
        keep_last=20, reset_interval=4, kl_target=2.0, ema_decay=0.9, n_codes=4, codebook_size=32, mask_rate="0,0.3",
        tensorboard=True, n_val=5, eval_interval=6),
    "train_mult": dict(keep_last=12, tensorboard=True),
    "train_facts": dict(keep_last=12, dropout=0.2, ema_decay=0.9),
    "train_worldmodel": dict(tokens="cells", action_source="true", save_interval=3),
}


def typed(script, out_dir, *more, **settings):
    """The words of a command line; settings on top of TINY, then words as they are."""
    words = [f"{script}.py", "--out_dir", out_dir]
    for name, value in (TINY[script] | settings).items():
        words += [f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"]
    return words + list(more)


def folder(script, out_dir, name="run"):
    """The directory of a run."""
    return Path(out_dir) / script / name


def done(script, forks, out_dir, *more, **settings):
    """The Child of a script that was typed and has come to a good end; out_dir is absolute."""
    child = forks.run(typed(script, out_dir, *more, **settings), forks.folder)
    assert_done(child)
    return child


def of(script):
    """typed, folder and done of one script."""
    return (functools.partial(call, script) for call in (typed, folder, done))


def curve(run, key="step", split="train", **which):
    """A key's values in the lines of a split, but for the final ones; which: a model or stage."""
    return [line[key] for line in records(run) if line["split"] == split and "final" not in line
            and all(line[name] == value for name, value in which.items())]


def assert_same_end(run, reference, log_interval=1):
    """Metrics line by line, last.pt and every best, bit for bit; no step of a model twice, none missing; nothing left
    of a killed process."""
    assert records(run) == records(reference)
    names = ["last.pt", *sorted(path.name for path in reference.glob("best*.pt"))]
    assert len(names) > 1 and names[1:] == sorted(path.name for path in run.glob("best*.pt"))
    for name in names:
        assert_equal(load_checkpoint(run / name), load_checkpoint(reference / name), name)
    last = load_checkpoint(run / "last.pt")
    for model, end in last["steps"].items() if "steps" in last else [(None, last["step"])]:
        steps = curve(run, **{"model": model} if model else {})
        assert steps == list(range(log_interval, end + 1, log_interval))
    assert not list(run.glob(".*tmp*"))
