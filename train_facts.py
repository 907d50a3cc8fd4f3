"""Facts in the weights or behind a tool: a small language model learns made-up people by heart, or to look them up.

    python train_facts.py --preset cpu                      # 512 people behind a tool: a minute on two cores
    python train_facts.py --preset cpu --task in_weight     # the same people in the weights
    python train_facts.py --preset cpu --n_people 64        # so few that the calls are learned by heart, not the rule
    python train_facts.py --preset mqar                     # associative recall: attention, a short convolution
    python train_facts.py --preset zoology                  # the same at 256 tokens, as published: plain attention
    python train_facts.py --preset shakespeare_bpe          # text: byte pairs that are trained here
    python train_facts.py --preset cpu --resume             # goes on exactly where the newest run stopped
    python evaluate.py --watch runs/train_facts/NAME        # beside the training: every checkpoint by real generation
    torchrun --nproc_per_node=2 train_facts.py --preset cpu --tp 2     # the matrices divided over two processes
    python train_facts.py -h                                # every setting

A question, and what the assistant says to it, in both tasks; the loss is taken where a star stands:

      user       birth_date NAME ?                        user       birth_date NAME ?
    * assistant  13/2/1987 <END>                        * assistant  FIND birth_date FOR NAME <CALL>
                                                          tool       13/2/1987 <ANSWER>
                                                        * assistant  13/2/1987 <END>

Evaluation generates: greedily, with the database in the loop (protocol tool) or with calls forbidden (no_tool), on
people that were trained on and on people that were not. A model without memory of single people is right in 3.94 % of
the notes' questions. What this code measured, and with which command, stands in docs/facts.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import math
import time

import torch

from data.facts import MODES as FACTS
from model import TransformerConfig, build_model, fused_rows, parameter_roles
from nanolab import hf, limits, optim, parallel
from nanolab.run import (Generators, Loop, Run, Stopwatch, UserError, as_user_error, begin, check_weights, command,
                         measure_peak_flops, mixed_precision, onto, resolve_device, resumed, seed_everything)
from nanolab.tasks import cost, kind_of, say

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
seed = 1337                # [>= 0] initialisation and dropout
data_seed = 1337           # [>= 0] people, rows and the order of batches
dp = 1                     # [>= 1] processes over which a batch's rows are divided, under torchrun
tp = 1                     # [>= 1] processes over which each layer's matrices are divided, under torchrun
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: 16 bits on cuda, else float32
compile = False            # torch.compile
init_from = None           # [path, with task text] a run, or a folder with config.json: sizes, weights, tokenizer
lora_only = False          # [with lora_rank] checkpoints hold the adapters alone: init_from's weights must stay there
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it

# --- Task ---
task = "in_tool"           # [in_weight, in_tool, both, mqar, text] both: each fact by one of the two ways
loss_on = "assistant"      # [assistant, all] whose tokens are learned; all: plain pretraining, the tool's answers apart
tokenizer = "closed"       # closed (facts), bytes, tiktoken:NAME, a file, or bpe:SIZE, sentencepiece:SIZE: trained here

# --- Facts: people ---
n_people = 512             # [>= 1, not with task mqar/text] to train on; four questions each (notes) or seven (bios)
n_unseen = 256             # [>= 0, not with task mqar/text] people that only the database knows
kind = "notes"             # [notes, bios, not with task mqar/text] 31.25 or 47.59 bits a person
names = "syllables"        # [syllables, plain, with kind notes] four of 64 syllables, or first and last names
form = "short"             # [short, natural, not with task mqar/text] questions: "birth_date NAME ?", or sentences
alpha = 1.0                # [>= 0.0, <= 1.0, not with task mqar/text] 1: independent ones; 0: a hidden type says all
prefix = False             # [not with task mqar/text] a question's tokens see one another, what follows is causal
tool_share = 0.5           # [>= 0.0, <= 1.0, with task both] share of the facts behind the tool
database = None            # [not with task mqar/text] a file that data/facts.py wrote; none: the people, in memory

# --- Rows of multi-query associative recall; block_size tokens each ---
n_rows = 100_000           # [>= 1, with task mqar] to train on
n_test_rows = 1000         # [>= 1, with task mqar] held out
pairs = 4                  # [>= 1, with task mqar] keys with a value
mqar_vocab = 8192          # [>= 4, with task mqar] tokens that there are
mqar_alpha = 0.01          # [> 0.0, <= 10.0, with task mqar] of the power law by which queries follow
random_non_queries = False # [with task mqar] random tokens between the queries

# --- Text ---
dataset = "shakespeare"    # [with task text] shakespeare, stdlib, enwik8, smollm:SUBSET, .txt, .parquet, .jsonl, folder
max_bytes = None           # [none, >= 1, with task text] only the first so many bytes, before splitting; not of shards
batching = "random"        # [random, epochs, with task text] of text that fits into memory

# --- Batches ---
batch_size = 128           # [>= 1] rows per forward pass
grad_accum = 1             # [>= 1] forward passes per optimiser step

# --- Model ---
n_layer = 2                # [>= 1, <= 1000] transformer blocks
n_head = 2                 # [>= 1] attention heads
n_embd = 32                # [>= 1] width
block_size = None          # [none, >= 1] tokens of a row; none: of the longest dialog, mqar 64, text 128
dropout = 0.0              # [>= 0.0, < 1.0] probability: embedding, attention, branches
norm = "rms"               # [layer, rms, dyt] normalisation, before each branch
norm_gain = True           # learned gain in the norms
bias = False               # [qkv] biases in linear layers and LayerNorm; qkv: of queries, keys, values alone
positions = "rope"         # [learned, learned_per_layer, rope, alibi, relative, none] where a token stands
init = "zero"              # [gpt2, normal, xavier, tfixup, truncated, zero] zero: output projections start at zero
qk_norm = False            # [full] RMSNorm on queries and keys, per head; full: over all of them (OLMo 2)

# --- Mixers: one word, or several with commas, repeated over the layers ---
mixer = "full"             # full, window, strided, fixed, diff, mla, xl, compressive, mamba, mingru
short_conv = 0             # [>= 0, <= 1024] width of a causal convolution before every mixer; 0: none
window = 16                # [>= 2, with mixer window] positions that a token sees

# --- Feed-forwards: one word, or several with commas, repeated over the layers ---
ff = "mlp"                 # mlp, low_rank, moe, none
ff_mult = 6.0              # [> 0.0] width of the feed-forward over n_embd (gated: 2/3 of it, equal parameters)
activation = "swiglu"      # [gelu, gelu_tanh, relu, relu2, silu, solu, glu, bilinear, reglu, geglu, swiglu]

# --- Classifier ---
tie_weights = False        # the classifier is the embedding

# --- Optimisation ---
max_steps = 800            # [none, >= 0] optimiser steps in all, resumes included; none: until stopped
patience = None            # [none, >= 1, with eval_interval] validations without a better one that end the run
exposures = None           # [none, > 0.0, not with task mqar/text] how often each fact is seen; sets max_steps
optimizer = "muon"         # [sgd, adam, adamw, muon, schedule_free, ivon] muon: hidden matrices, the rest by adamw
lr = 2e-2                  # [> 0.0] peak learning rate
muon_lr = 0.02             # [> 0.0, with optimizer muon] peak learning rate of the matrices
schedule = "wsd"           # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 50          # [>= 0] steps
decay_fraction = 0.5       # [> 0.0, <= 1.0, with schedule wsd] share of max_steps in which the rate falls linearly
min_lr_scale = 0.02        # [>= 0.0, <= 1.0, with schedule cosine/wsd] the last rate over the peak
betas = (0.9, 0.98)        # [>= 0.0, < 1.0, not with optimizer sgd] ivon: 0.9,0.99999
momentum = 0.99            # [>= 0.0, < 1.0, with optimizer sgd]
weight_decay = 0.1         # [>= 0.0] on what decay_params names
grad_clip = None           # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.0            # [>= 0.0, < 1.0] running average of the weights, evaluated beside them; 0: none

# --- Evaluation and logging ---
eval_interval = 100        # [none, >= 1] steps between evaluations on part of the prompts; none: not even a last one
eval_prompts = 256         # [>= 1] facts: so many questions, evenly spread; mqar: rows; text: windows
final_prompts = 4096       # [>= 1] facts: at the end, of each kind of people; of other tasks everything
eval_batch_size = 512      # [>= 1] rows at once; changes the speed, not the result
save_interval = 200        # [>= 1] steps between checkpoints
keep_last = 0              # [>= 0] numbered checkpoints to keep beside last.pt and best.pt
log_interval = 10          # [>= 1] steps between lines of metrics

# Flags all the same: the commented fields of these classes.
FURTHER = {"the model": "model.py:TransformerConfig but shorten n_targets target_heads layer_heads "
                        "intermediate_losses mtp_depth mtp_weight documents document_end",
           "the optimiser": "nanolab/optim.py:Settings",
           "the run": "nanolab/settings.py:Common"}

shakespeare = dict(task="text", dataset="shakespeare", batch_size=16, n_layer=4, n_head=4, n_embd=128, norm_gain=False,
                   qk_norm=True, ff_mult=4.0, activation="relu2", lr=0.03, muon_lr=0.04, muon_momentum=0.9,
                   betas=(0.8, 0.95), weight_decay=0.0, decay_fraction=1.0, warmup_steps=0, min_lr_scale=0.0,
                   dtype="bfloat16", max_steps=500, eval_prompts=32, eval_batch_size=32)

presets = {
    # No download, a minute on two cores: the rule of the tool, at width 16.
    "cpu": dict(n_embd=16),
    # The short convolution of our own trials, not Zoology's model.
    "mqar": dict(
        task="mqar", block_size=64, batch_size=64, n_head=1, n_embd=64, positions="none",
        short_conv=2, qk_norm=True, qk_scale=True, ff="none", tie_weights=True, init="gpt2", optimizer="adamw", lr=1e-2,
        betas=(0.9, 0.95), max_steps=400, eval_interval=50, eval_prompts=1000),
    # Arora et al. 2023, appendix: attention, learned positions, no feed-forward, AdamW. At 256 tokens, not 8,192.
    "zoology": dict(
        task="mqar", mqar_vocab=256, block_size=64, batch_size=64, n_head=1, n_embd=64,
        positions="learned", ff="none", init="xavier", optimizer="adamw", lr=3e-3, betas=(0.9, 0.95),
        schedule="constant", max_steps=3000, eval_interval=100, eval_prompts=1000, save_interval=500),
    # Bytes and byte pairs of tinyshakespeare, two cores.
    "shakespeare_bytes": dict(shakespeare, tokenizer="bytes", block_size=256),
    "shakespeare_bpe": dict(shakespeare, tokenizer="bpe:1024", block_size=128),
    # The SmolLM corpus with GPT-2's tokenizer, for one GPU: downloads shards.
    "smollm": dict(
        task="text", dataset="smollm:cosmopedia-v2", tokenizer="tiktoken:gpt2", block_size=1024, batch_size=32,
        n_layer=12, n_head=12, n_embd=768, norm_gain=False, qk_norm=True, ff_mult=4.0, activation="relu2", lr=0.004,
        muon_lr=0.02, betas=(0.8, 0.95), weight_decay=0.0, grad_clip=1.0, max_steps=20_000, eval_interval=500,
        eval_prompts=64, eval_batch_size=16, save_interval=1000),
}

# What --debug sets, unless a flag says otherwise.
debug_settings = dict(n_people=16, n_unseen=8, n_rows=500, n_test_rows=50, mqar_vocab=64, n_embd=16, batch_size=16,
                      max_steps=20, warmup_steps=2, eval_interval=10, eval_prompts=16, final_prompts=32,
                      save_interval=10, log_interval=1)

# These make the shape of the weights and of the state beside them: on resume they come from the checkpoint.
architecture = (
    *TransformerConfig.shape(), "init_from", "lora_only", "data_seed", "task", "loss_on", "tokenizer", "n_people",
    "kind", "names", "form", "prefix", "alpha", "tool_share", "exposures", "n_rows", "pairs", "mqar_vocab",
    "mqar_alpha", "random_non_queries", "dataset", "batching", "optimizer", "decay_params")


def check(settings):
    """Settings that cannot go together: UserError with one sentence."""
    with as_user_error():
        optim.check(settings)
    if task not in FACTS:
        for name in ("database", "exposures"):
            if settings[name] is not None:
                raise UserError(f"--{name} is for facts, not for task {task}")
    if prefix and (task not in FACTS or loss_on == "all"):
        raise UserError("--prefix is for facts, with the loss on the assistant's tokens: a question that sees itself "
                        "whole cannot also be predicted")
    if task == "text" and tokenizer == "closed":
        raise UserError("tokenizer closed has only the words of the notes: text needs bytes, bpe:SIZE, a file, ...")
    if task in FACTS and tokenizer == "closed" and (kind, form, names) != ("notes", "short", "syllables"):
        raise UserError(f"tokenizer closed has only the words of notes with names of syllables in the short form: kind "
                        f"{kind}, names {names}, form {form} need bytes or a tokenizer that is trained here")
    configure(settings, mqar_vocab if task == "mqar" else 256)           # of the rest the data says how many there are
    T = block_size or (64 if task == "mqar" else 16)
    limits.fits(limits.kept(batch_size / dp, T, n_embd, n_layer) + 16 * batch_size * T * (grad_accum - 1),
                f"a batch_size of {batch_size} rows, {grad_accum} times a step,", device)
    rows = n_rows + n_test_rows if task == "mqar" else 4 * (n_people + n_unseen) if task in FACTS else 0
    limits.fits(16 * rows * T, f"data of {rows:,} rows")


def configure(settings, vocab_size):
    """The model's configuration. UserError: settings that cannot go together, a model that cannot be held."""
    with as_user_error():
        config = TransformerConfig.from_settings({**settings, "vocab_size": vocab_size, "block_size": block_size or 16})
    limits.weigh(lambda: build_model(config), device)
    return config


def evaluate(work, model, opt, ema, step, autocast, mesh, last=False):
    """Yields (name of the weights, line of metrics): of the raw weights, and when there is an ema, of that."""
    for weights, place in optim.both(opt, ema):
        with place, autocast, mesh.gathered(model):
            check_weights(step, model)                       # right or wrong answers would not tell
            for line in work.evaluate(model, last):
                yield weights, line


def last_words(run, step, lines, seconds):
    """The last evaluation, (name of the weights, line) after another, to the metrics, the summary and in print. Returns
    what a better model has less of."""
    found, firsts = math.inf, {}
    for weights, line in lines:
        run.log(step=step, split="val", weights=weights, final=True, **line)
        words = [line.get("people"), line["protocol"] if task in FACTS else None, weights]
        name = "_".join(word for word in words if word)
        given = {key: line[key] for key in ("accuracy", "loss", "bpb", "calls") if key in line}
        run.summary(**{f"{key}_{name}": value for key, value in given.items()})
        print(f"{say(line)} ({weights} weights) after {step:,} steps, {seconds:.0f} s of training")
        found = cost(line) if found == math.inf else found
        kinds = "accuracy" if task == "mqar" else "bpb" if task == "text" else f"accuracy_{line['people']}"
        firsts.setdefault(kinds, line.get("accuracy", line.get("bpb")))      # by the way that the task trains
    run.summary(**firsts)
    return found


@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    mesh = parallel.start(dp, tp, device)                # from here on only rank 0 prints
    checkpoint = resumed(settings, architecture)
    given = hf.begin_from(settings, checkpoint)          # with --init_from its sizes and tokenizer hold, too
    check(settings)
    where, precision = resolve_device(mesh.device, dtype)

    # ---- data ----
    work = kind_of(settings)(settings, where, **given.tokenizer())
    work.prepare()
    settings.put(block_size=work.block_size)
    if task in FACTS:
        settings.check_data(checkpoint, ("database",), work.database.fingerprint)
    if exposures is not None and not checkpoint:
        settings.put(max_steps=math.ceil(exposures * work.n_rows / (batch_size * grad_accum)))
        check(settings)
        print(f"{exposures:g} exposures: max_steps {max_steps:,}")
    limits.notes(settings, {"max_steps": max_steps}, checkpoint and checkpoint["settings"])
    batches = work.batches

    # ---- model, optimiser ----
    seed_everything(seed, deterministic)
    work.vocab_size = given.vocab_size(work.vocab_size)
    config = configure(settings, work.vocab_size)
    if prefix and config.carries:
        raise UserError(f"--prefix: mixer {mixer} reads from left to right: a question's tokens cannot see one another")
    mesh.check(config, batch_size, optimizer, precision, compiled=compile)
    parallel.warn_of_passes(config, grad_accum)
    model = mesh.parallelise(build_model(config, given.weights).to(where))
    net = torch.compile(model) if compile else model
    autocast, scaler = mixed_precision(where, precision)
    opt = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model), mesh,
                      n_examples=work.n_rows)
    ema = optim.EMA(model, ema_decay) if ema_decay else None
    if checkpoint and checkpoint["tokenizer"] != work.fingerprint:
        raise UserError(f"tokenizer {tokenizer} does not match the checkpoint: its fingerprint is "
                        f"{str(work.fingerprint)[:12]}, the checkpoint's {str(checkpoint['tokenizer'])[:12]}")

    # ---- the run: on resume, what it is handed goes on where the checkpoint was saved ----
    loop = Loop(dict(step=0, evaluated=-1, best=math.inf, best_step=0, rows=0, seconds=0.0, pending=[],
                     logged_seconds=0.0), scaler)
    with Run(settings, checkpoint, mesh, vocab_size=work.vocab_size, tokenizer=work.fingerprint,
             model=given.kept_of(model), ema=ema, optimizer=opt, scaler=scaler, generators=Generators(), data=batches,
             loop=loop, posterior=optim.Posterior(opt, model.named_parameters()), **given.kept()) as run:
        print(f"{work.shown}\n{work.example}\n{work.n_rows:,} rows; {limits.size(model)}; {where.type} "
              f"{str(precision).removeprefix('torch.')}")
        peak_flops = measure_peak_flops(where, precision) * mesh.size
        limits.hint(where, model, batch_size // dp, work.block_size, grad_accum, peak_flops,
                    precision != torch.float32)
        first = loop["step"]
        # a new run at once: a full disk shows at the start; with keep_last again: the numbered one may be missing
        saved = first if checkpoint and not (keep_last or settings["keep_every"]) else -1
        bar, clock, seen = run.bar(max_steps, first), Stopwatch(where, run), 0   # tokens since the last line of metrics

        while not mesh.stop(run):
            # ---- validate and save: before the step, so that a run that stops here does on resume what was due ----
            step = loop["step"]
            over = run.ended(loop)
            rate = optim.set_rate(opt, settings, step, loop["seconds"])  # first: what is saved asks nobody who stepped
            if saved < 0:                                # before the first evaluation, which writes best.pt
                run.save("last.pt", step, keep=keep_last)
                saved = step
            if eval_interval and step % eval_interval == 0 and loop["evaluated"] < step and not over:
                loop.flush()
                loop["evaluated"], found = step, math.inf
                clock.start()
                for weights, line in evaluate(work, model, opt, ema, step, autocast, mesh):
                    run.log(step=step, split="val", weights=weights, **line)
                    bar.note(f"step {step}: {say(line)}{'; ema weights' if weights == 'ema' else ''}")
                    found = cost(line) if found == math.inf else found     # the first line: what the task is about
                clock.lap("evaluation")
                if found < loop["best"]:
                    loop.update(best=found, best_step=step)
                    run.save("best.pt", step)
            if step % save_interval == 0 and saved < step:
                run.save("last.pt", step, keep=keep_last)
                saved = step
            if over or run.ended(loop):
                break

            # ---- one optimiser step ----
            began = time.perf_counter()
            clock.start()
            parts = [batches.next() for _ in range(grad_accum)]
            counts = [y.numel() if task == "text" else int((y >= 0).sum()) for _, y in parts]
            targets = sum(counts)                            # the loss is the mean over all of the step's
            loss, reports = 0.0, []
            for (x, y), count in zip(parts, counts):
                share = count / max(targets, 1) * mesh.weight(y)
                x, y = mesh.rows(x, y)                       # each process draws the whole batch and takes its rows
                ends = (y >= 0).byte().argmax(1) + 1 if prefix else None
                counted = None if task == "text" else (y.flatten() >= 0).nonzero()[:, 0]     # of text all are
                y, ends, counted = (t if t is None else onto(where, t) for t in (y, ends, counted))
                clock.lap("data")
                with opt.sampled():                      # ivon: one draw of the weights for each pass
                    with autocast:
                        objective, nats = net(x, targets=y.view(*x.shape, 1), counted=counted, prefix=ends)
                    clock.lap("forward")
                    scaler.scale(objective * share).backward()
                    clock.lap("backward")
                loss, seen = loss + nats[-1, 0] * share, seen + x.numel() * mesh.dp
                reports.append((model.usage, model.extras))
            grad_norm = optim.take_step(opt, scaler, model.parameters(), grad_clip, ema, mesh.clip_grad_norm)
            mesh.gather(model, reports)
            model.balance_experts()
            clock.lap("optimiser")
            loop.add(torch.stack([mesh.mean(loss), grad_norm]))
            step = loop["step"] = step + 1
            loop["rows"] += batch_size * grad_accum

            # ---- log ----
            rows, elapsed = loop.lap(began, step % log_interval == 0)
            if rows:
                mean, speed = sum(loss for loss, _ in rows) / len(rows), seen / max(elapsed, 1e-9)
                run.log(step=step, split="train", loss=mean, lr=rate, grad_norm=rows[-1][1],
                        tokens_per_s=speed, mfu=speed * model.flops_per_token(x.size(1)) / peak_flops,
                        seconds=loop["seconds"], epoch=batches.epoch)
                seen = 0
                bar.update(step, f"loss {mean:.4f}, {speed:,.0f} tokens/s")

        # ---- the end ----
        step = loop["step"]
        bar.close()
        loop.flush()
        stopped, ended = mesh.stop(run), run.ended(loop)     # of all processes: what follows, they do together
        if saved < step:
            run.save("last.pt", step)
        if eval_interval and not stopped:
            clock.start()
            lines = evaluate(work, model, opt, ema, step, autocast, mesh, last=True)
            found = last_words(run, step, lines, loop["seconds"])
            clock.lap("evaluation")
            if found < loop["best"]:
                loop.update(best=found, best_step=step)
                run.save("best.pt", step)
            with opt.averaged(), mesh.gathered(model):
                more = work.last(model)
            run.summary(**more)
            if "bits" in more:
                print(f"{more['bits']:,.0f} of {more['bits_of_all']:,.0f} bits about people in the weights, "
                      f"{more['bits_per_parameter']:.3f} a parameter")
        run.summary(step=step, best=loop["best"], best_step=loop["best_step"], seconds=loop["seconds"],
                    rows=loop["rows"], epoch=batches.epoch, parameters=model.n_params())
        run.spent(clock)
        print(f"{'stopped' if stopped else ended} at step {step:,}: {run.dir}")


if __name__ == "__main__":
    main()
