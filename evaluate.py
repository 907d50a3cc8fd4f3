"""The true evaluation: text under named protocols, every byte of the split scored once; facts by real generation; tasks
of choices.

    python evaluate.py runs/train_enwik8/my_run                              # block protocol on the validation split
    python evaluate.py runs/train_enwik8/my_run --split test --protocols block,stride:64
    python evaluate.py runs/train_enwik8/my_run/best.pt --weights ema --protocols cache
    python evaluate.py --watch runs/train_enwik8/my_run                      # every checkpoint as it lands
    python evaluate.py runs/train_enwik8/my_run --samples 10                 # of ivon's posterior
    python evaluate.py runs/train_facts/my_run --protocols tool              # the model asks, the database answers
    python evaluate.py runs/train_enwik8/my_run --tasks hellaswag_val.jsonl  # the likeliest of several texts

Protocols (T = block_size of the model):
    block      disjoint windows of T bytes; a byte sees 1 to T bytes before it. Cheap, and what most loops print.
    stride:S   windows overlap, only the last S bytes of each are scored: at least T - S bytes of context, but for the
               first T bytes of the split. stride:1 is what Al-Rfou et al. 2018 report.
    cache      one stream through a sliding KV cache: each layer sees the last T states, which have seen others before
               them. Not equal to recomputing a window. Impossible with learned absolute positions.
    memory     one stream in segments of T bytes: layers with a memory or a state go on from the segment before, layers
               of full attention see their own segment only; what training on streams sees.

and of the people of train_facts.py, those that were trained on and those that were not:
    tool       greedy generation, the database answers the model's calls in mid-sequence
    no_tool    the same with calls forbidden: what the model knows by itself
    mqar       of task mqar: the answers at the queries of held-out rows

--tasks takes lines of {"context": str, "choices": [str, ...], "answer": int}, or HellaSwag's own: the model chooses by
log-likelihood. acc compares sums; acc_norm and acc_bytes divide them by characters and bytes, all three as
lm-evaluation-harness has them; acc_tokens by ids. A context that is too long loses its beginning.

A figure means nothing without its protocol and its byte count, so both are always printed. The first byte of a split
has no context and is charged 8 bits (of a tokenizer's ids: the logarithm of how many there are). The result does not
depend on batch_size, but for the rounding of matrix products (relative 1e-6 in float32).

--watch evaluates beside a training that goes on: each checkpoint that it finds new, in this process, into the run's
evaluation.jsonl, which the trainer never writes. Where the trainer does not evaluate (--eval_interval none), the best
one under the first protocol becomes best.pt; else that file is the trainer's. It ends when the run is done, or when no
trainer has been there for `patience` seconds. A checkpoint that is replaced before its turn is not evaluated:
--keep_last keeps more of them. More: docs/runs.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__, "checkpoint")  # before the seconds that the next lines take

import copy
import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from data import tokens
from nanolab.hf import load_model, tokenizer_in
from nanolab.run import (Settings, UserError, command, draw_curves, find_checkpoint, is_running, lock_file, optional,
                         override, read_json, read_metrics, replacing, resolve_device)
from nanolab.score import Ensemble
from nanolab.tasks import Choices, cost, kind_of, result

# --- What ---
checkpoint = None        # run directory, checkpoint file, or a folder of weights (may also be typed as a bare word)
watch = None             # a run's directory: evaluate each new checkpoint as it lands
patience = 60.0          # [>= 0.0, <= 1e8] watch: seconds without a trainer before it ends
weights = "raw"          # [raw, ema] which weights
samples = 0              # [>= 0, <= 10_000] ivon: mean probabilities of so many draws of its posterior; 0: of the mean
seed = 0                 # [>= 0] of these draws
split = "val"            # [train, val, test] which part of the data
protocols = None         # block, stride:S, cache, memory; tool, no_tool; mqar; several with commas; none: the task's
tasks = None             # [path] questions with choices in place of protocols, .jsonl; several with commas
dataset = None           # [none] none: as in training; otherwise as train_enwik8.py --dataset
max_bytes = None         # [none, >= 1] none: as in training
database = None          # [path] facts: the tool's database; none: as in training
prompts = None           # [none, >= 1] facts, mqar, tasks: how many, evenly spread; none: all
# --- How ---
batch_size = 32          # [>= 1, <= 1e6] windows, dialogs or rows at once; changes the speed, not the result
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "float32"        # [auto, float32, bfloat16, float16] autocast
resamples = 1000         # [>= 2, <= 1e6] bootstrap resamples for the 95 % interval
chunk = 4096             # [>= 1, <= 1e12] bytes that the bootstrap draws together

chosen = Settings()      # what was typed


def open_model(path, where):
    """(the checkpoint's dict, its model for inference on `where`): of the weights that were asked for, or an Ensemble
    of draws around them. UserError: as load_model; no posterior."""
    loaded, model = load_model(path, weights)
    found, generator, draws = loaded.get("posterior"), torch.Generator().manual_seed(seed), []
    if samples and not found:
        raise UserError(f"--samples: {path} has no posterior: it was not trained with optimizer ivon, or not at all")
    means = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(samples):
        for name, p in model.named_parameters():
            p.data = means[name] + found[name] * torch.randn(p.shape, generator=generator)
        one = copy.deepcopy(model).for_inference()
        draws.append({name: p.detach().to(where) for name, p in one.named_parameters()})
    model = model.for_inference().eval().to(where)
    return loaded, Ensemble(model, draws) if samples else model


def open_task(loaded, where):
    """What the checkpoint's model can be asked, and the data for it. UserError: another tokenizer than it had."""
    settings = loaded["settings"]
    if tasks:
        chosen.refuse_idle(Choices.unused, "beside --tasks")
        tokenizer = tokenizer_in(loaded)
        if tokenizer is None:
            raise UserError(f"--tasks: {loaded.path} was trained on {settings['task']}, not on text")
        return Choices(settings, where, [name.strip() for name in tasks.split(",")], tokenizer)
    task, kind = settings.get("task", "text"), kind_of(settings)
    chosen.refuse_idle(kind.unused, f"on a model of task {task}")
    if task != "text":
        if database:
            settings["database"] = database
        if prompts and task == "mqar":
            settings["n_test_rows"] = min(prompts, settings["n_test_rows"])              # the first ones
        found = kind(settings, where)
        if loaded["tokenizer"] is not None:
            tokens.check(found.vocabulary, loaded["tokenizer"])
        return found
    tokenizer = tokenizer_in(loaded) if loaded["script"] == "train_facts" else None          # of its own text
    if dataset:
        settings.update(dataset=dataset, max_bytes=None)
    if max_bytes:
        settings.update(max_bytes=max_bytes)
    if settings["dataset"] is None:
        raise UserError("a folder of weights names no text: which one? --dataset shakespeare, stdlib, or a file")
    return kind(settings, where, split, tokenizer)


def asked_for(task, config):
    """The protocols that --protocols names, a list, checked; without it, all that the task itself is about."""
    wanted = [name.strip() for name in protocols.split(",")] if protocols else list(task.protocols)
    for name in wanted:
        task.check(name, config)
    return wanted


def measured(task, model, protocol, precision):
    """Yields (line of metrics, what it was counted from) of a protocol."""
    with torch.autocast(next(model.parameters()).device.type, precision, enabled=precision != torch.float32):
        for line, found in task.measure(model, protocol, batch_size, prompts):
            yield line | ({"evaluation_seconds": found.seconds} if found else {}), found


# --- Beside a training ---

class Log:
    """A run's evaluation.jsonl: `lines`, of which one that a kill has cut off is left out."""

    def __init__(self, path):
        self.path, self.lines = path, read_metrics(path) if path.exists() else []
        if path.exists():
            self._rewrite()

    def _rewrite(self):
        with replacing(self.path) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in self.lines)

    def back_to(self, step):
        """Forgets what is later: the trainer went back."""
        if any(line["step"] > step for line in self.lines):
            self.lines = [line for line in self.lines if line["step"] <= step]
            self._rewrite()

    def has(self, step, protocol):
        """Whether these weights were evaluated at this step on this split."""
        return any((line["step"], line["protocol"], line["weights"], line["split"]) == (step, protocol, weights, split)
                   for line in self.lines)

    def add(self, lines):
        """Appends lines; returns whether the first is better than all before it of its kind."""
        kind = {key: value for key, value in lines[0].items() if isinstance(value, str)}
        best = min((cost(line) for line in self.lines if kind.items() <= line.items()), default=math.inf)
        with open(self.path, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self.lines += lines
        return cost(lines[0]) < best


@contextmanager
def watching(run):
    """Within it this process alone watches the run's directory; gives the path for copies of its checkpoints."""
    began = time.monotonic()
    if run.exists() and not run.is_dir():
        raise UserError(f"--watch {run}: the directory of a run is needed, and this is a file")
    while not (run / "lock").exists():
        if time.monotonic() - began > patience:
            raise UserError(f"--watch {run}: no run is there, and none has begun in {patience:g} seconds")
        time.sleep(0.2)
    mine = run / f".watch-{os.getpid()}.pt"
    with open(run / "watch.lock", "w") as lock:
        try:
            lock_file(lock)
        except OSError:
            raise UserError(f"another process is watching {run}") from None
        for leftover in run.glob(".watch-*.pt"):                 # of killed processes
            leftover.unlink()
        try:
            yield mine
        finally:
            mine.unlink(missing_ok=True)


def next_checkpoint(run, stamps, mine):
    """The path of a checkpoint that is not in `stamps`, now copied to `mine`, or None where there is no new one."""
    for path in [*sorted(run.glob("step_*.pt")), run / "last.pt"]:
        try:
            stat = path.stat()
            if stamps.get(path.name) == (stat.st_ino, stat.st_mtime_ns):
                continue
            shutil.copyfile(path, mine)                          # the trainer may replace or prune it meanwhile
        except FileNotFoundError:
            continue
        stamps[path.name] = stat.st_ino, stat.st_mtime_ns
        return path
    return None


def follow(run, where, precision):
    """Evaluates the checkpoints of a run's directory (Path) as they land, until it is over."""
    with watching(run) as mine:
        log, stamps, task, alive = Log(run / "evaluation.jsonl"), {}, None, time.monotonic()
        print(f"watching {run}", flush=True)
        while True:
            if found := next_checkpoint(run, stamps, mine):
                try:
                    loaded, model = open_model(mine, where)
                except UserError as error:                       # a person knows the file, not its copy
                    raise UserError(str(error).replace(str(mine), str(found))) from None
                step = loaded["step"]
                if found.name == "last.pt":
                    log.back_to(step)
                if task is None:
                    task = open_task(loaded, where)
                    wanted = asked_for(task, model.config)
                for name in wanted:
                    if log.has(step, name):
                        continue
                    lines, note = [{"step": step, **line, "weights": weights, "split": split}
                                   for line, _ in measured(task, model, name, precision)], ""
                    trainer = read_json(run / "params.json").get("settings", {})
                    if log.add(lines) and name == wanted[0] and trainer.get("eval_interval", 0) is None:
                        os.replace(mine, run / "best.pt")
                        note = ", best.pt"
                    for line in lines:
                        of, size = (f"{split} ", f", {line['bytes']:,} bytes") if "bytes" in line else ("", "")
                        print(f"step {step}: {of}{result(line)} ({line['protocol']}{size}, {weights} weights{note})",
                              flush=True)
                    with optional("curves.png is"):
                        draw_curves(run)
                alive = time.monotonic()
                continue
            if is_running(run):
                alive = time.monotonic()
            state = read_json(run / "summary.json").get("status")
            if not is_running(run) and state == "done" or time.monotonic() - alive > patience:
                print(f"{run}: {'done' if state == 'done' else f'no trainer for {patience:g} seconds ({state})'}")
                return
            time.sleep(0.2)


@command
def main():
    global chosen
    chosen = override(globals(), positional="checkpoint")
    if (checkpoint is None) == (watch is None):
        raise UserError("which run? python evaluate.py runs/train_enwik8/NAME, or --watch runs/train_enwik8/NAME")
    if watch is None:
        chosen.refuse_idle(("patience",), "without --watch")
    if not samples:
        chosen.refuse_idle(("seed",), "without --samples")
    where, precision = resolve_device(device, dtype)
    if samples and not all(name == "block" or name.startswith("stride:") for name in (protocols or "block").split(",")):
        raise UserError("--samples goes with the protocols block and stride:S: each draw would need a cache of its own")
    if watch is not None:
        return follow(Path(watch), where, precision)
    path = find_checkpoint(checkpoint)
    loaded, model = open_model(path, where)
    task = open_task(loaded, where)
    wanted = asked_for(task, model.config)                       # complain before the first long pass, not after it
    of = f"{samples} draws of the posterior" if samples else f"{weights} weights"
    print(f"{path}: step {loaded['step']}, {of}, {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{task.source}\n{task.header}")
    for name in wanted:
        for line, found in measured(task, model, name, precision):
            print(task.row(line, found, resamples, chunk))


if __name__ == "__main__":
    main()
