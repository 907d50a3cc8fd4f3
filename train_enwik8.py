"""Byte-level language model after Al-Rfou et al. 2018, "Character-Level Language Modeling with Deeper Self-Attention".

    python train_enwik8.py --preset cpu                     # no GPU, no download: minutes on two cores
    python train_enwik8.py --preset shakespeare_cpu         # tinyshakespeare on two cores, beside nanoGPT's CPU command
    python train_enwik8.py --n_layer 12 --block_size 512    # T12 on enwik8, for one GPU
    python train_enwik8.py --preset t64                     # T64: 235M parameters
    python train_enwik8.py --preset cpu --resume            # goes on exactly where the newest run stopped
    python train_enwik8.py -h                               # every setting

The defaults are wired like T12: 12 layers of width 512, an own position table in every layer, two bytes predicted ahead
(the second at half weight), an own classifier per layer and target, intermediate losses that end layer by layer in the
first half of training; 44.17M parameters in training, 41.16M at inference. Published: 1.11 bits per byte on enwik8's
test split under stride:1. What this code measured, and with which command: docs/language-model.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import math
import time

import torch

from data import text
from model import TransformerConfig, active_layers, build_model, equal_ff_mult, fused_rows, parameter_roles
from nanolab import hf, limits, optim, parallel
from nanolab.generate import generate
from nanolab.run import (Generators, Loop, Run, Stopwatch, UserError, as_user_error, begin, command,
                         measure_peak_flops, mixed_precision, optional, resolve_device, resumed, seed_everything)
from nanolab.score import LN2, parse_protocol, score

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
seed = 1337                # [>= 0] initialisation and dropout
data_seed = 1337           # [>= 0] batches
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: 16 bits on cuda, else float32
compile = False            # torch.compile
dp = 1                     # [>= 1] processes over which a batch's rows are divided, under torchrun
tp = 1                     # [>= 1] processes over which each layer's matrices are divided, under torchrun
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it
init_from = None           # [path] a run, or a folder with config.json and model.safetensors: its sizes and weights
lora_only = False          # [with lora_rank] checkpoints hold the adapters alone: init_from's weights must stay there

# --- Data ---
dataset = "enwik8"         # enwik8, shakespeare, stdlib, or a file (.txt .gz .xz .bz2 .zip), folder or glob of them
max_bytes = None           # [none, >= 1] only the first so many bytes, before splitting
batching = "random"        # [random, epochs, streams, documents] windows: random; shuffled; in order; documents' starts
batch_size = 16            # [>= 1] windows per forward pass
grad_accum = 1             # [>= 1] forward passes per optimiser step

# --- Model ---
n_layer = 12               # [>= 1, <= 1000] transformer blocks
n_head = 8                 # [>= 1] attention heads
n_embd = 512               # [>= 1] width
block_size = 512           # [>= 1] bytes of context
extend_block_size = None   # [none, >= 1] on resume: a larger block_size, for positions that have no table
dropout = 0.1              # [>= 0.0, < 1.0] probability: embedding, attention, branches
norm = "layer"             # [layer, rms, dyt] normalisation, before each branch
norm_gain = False          # learned gain in the norms
bias = False               # [qkv] biases in linear layers and LayerNorm; qkv: of queries, keys, values alone
positions = "learned_per_layer"  # [learned, learned_per_layer, rope, alibi, relative, none] where a byte stands
init = "gpt2"              # [gpt2, normal, xavier, tfixup, truncated, zero] zero: output projections start at zero
qk_norm = False            # [full] RMSNorm on queries and keys, per head; full: over all of them (OLMo 2)

# --- Mixers: one word, or several with commas, repeated over the layers ---
mixer = "full"             # full, window, strided, fixed, diff, mla, xl, compressive, mamba, mingru
window = 128               # [>= 2, with mixer window] positions that a byte sees
short_conv = 0             # [>= 0, <= 1024] bytes that a causal convolution before every mixer sees; 0: none
shorten = 1                # [>= 1] above 1 a pyramid: the middle layers see one vector for so many bytes
carry_memory = True        # xl, compressive, mamba, mingru with batching streams: go on from the segment before

# --- Feed-forwards: one word, or several with commas, repeated over the layers ---
ff = "mlp"                 # mlp, low_rank, moe, none
ff_mult = 4.0              # [> 0.0] width of the feed-forward over n_embd (gated: 2/3 of it, equal parameters)
equal_params = False       # choose ff_mult such that there are as many parameters as with mixer full and ff mlp
activation = "relu"        # [gelu, gelu_tanh, relu, relu2, silu, solu, glu, bilinear, reglu, geglu, swiglu]

# --- Classifiers, losses ---
tie_weights = False        # the last classifier is the byte embedding
n_targets = 2              # [>= 1, <= 256] bytes predicted ahead, weights 1, 1/2, 1/4, ...
intermediate_losses = True # layer l of n also predicts, until the fraction l / (2n) of max_steps

# --- Optimisation ---
max_steps = 200_000        # [none, >= 0] optimiser steps in all, resumes included; none: until stopped
patience = None            # [none, >= 1, with eval_interval] validations without a better one that end the run
optimizer = "adamw"        # [sgd, adam, adamw, muon, schedule_free, ivon] muon: hidden matrices, the rest by adamw
lr = 7e-4                  # [> 0.0] peak learning rate
muon_lr = 0.02             # [> 0.0, with optimizer muon] peak learning rate of the matrices
schedule = "noam"          # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 4000        # [>= 0] steps
decay_fraction = 0.2       # [> 0.0, <= 1.0, with schedule wsd] share of max_steps in which the rate falls linearly
min_lr_scale = 0.0         # [>= 0.0, <= 1.0, with schedule cosine/wsd] the last rate over the peak
betas = (0.9, 0.99)        # [>= 0.0, < 1.0, not with optimizer sgd] ivon: 0.9,0.99999
momentum = 0.99            # [>= 0.0, < 1.0, with optimizer sgd]
weight_decay = 0.01        # [>= 0.0] on what decay_params names
grad_clip = 1.0            # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.0            # [>= 0.0, < 1.0] running average of the weights, evaluated beside them; 0: none

# --- Evaluation and logging ---
eval_interval = 1000       # [none, >= 1] steps between validations on a fixed set of windows; none: not even a last one
eval_windows = 64          # [>= 1] how many windows, evenly spread over the validation split
eval_batch_size = 32       # [>= 1] windows at once; changes the speed, not the result
full_eval_interval = 10_000  # [none, >= 1] steps between validations on the whole split
full_eval_protocol = "block" # [with eval_interval] and the last one: block, stride:S, cache, memory (evaluate.py -h)
save_interval = 1000       # [>= 1] steps between checkpoints
keep_last = 0              # [>= 0] numbered checkpoints to keep beside last.pt and best.pt
log_interval = 10          # [>= 1] steps between lines of metrics
sample_length = 400        # [>= 0, <= 1000000] bytes of text written at the end

# Flags all the same: the commented fields of these classes.
FURTHER = {"the model": "model.py:TransformerConfig",
           "the optimiser": "nanolab/optim.py:Settings",
           "the run": "nanolab/settings.py:Common"}

# What several presets share: a plain model as one builds it now; the part of enwik8 that two cores read in minutes.
modern = dict(dropout=0.0, n_targets=1, intermediate_losses=False, positions="rope", norm="rms", activation="relu2",
              init="zero", optimizer="muon", betas=(0.8, 0.95), schedule="wsd")
some_enwik8 = dict(modern, dataset="enwik8", max_bytes=4_150_000, n_embd=256, block_size=256, batch_size=16, lr=0.02,
                   muon_lr=0.02, decay_fraction=0.8, dtype="bfloat16", eval_interval=100, save_interval=100)
variants = dict(some_enwik8, batching="streams", n_layer=6, n_head=4, warmup_steps=10, max_steps=200)
shakespeare = dict(modern, dataset="shakespeare", n_head=2, n_embd=128, block_size=64, qk_norm=True, lr=0.03,
                   weight_decay=0.0, decay_fraction=1.0, warmup_steps=0, dtype="bfloat16")
one_gpu = dict(modern, n_layer=12, n_head=8, n_embd=512, block_size=512, batch_size=64, qk_norm=True, compile=True,
               batching="epochs", lr=0.02, muon_lr=0.02, decay_fraction=0.8, warmup_steps=100, max_steps=12_000)
al_rfou = dict(optimizer="sgd", lr=3e-3, schedule="constant", warmup_steps=0, weight_decay=0.0, max_steps=4_000_000)

presets = {
    # No download, some minutes on two cores.
    "cpu": dict(
        modern, dataset="stdlib", n_layer=4, n_head=2, n_embd=128, block_size=128, batch_size=16, qk_norm=True, lr=0.03,
        muon_lr=0.04, muon_momentum=0.9, weight_decay=0.0, decay_fraction=1.0, warmup_steps=0, max_steps=1000,
        eval_interval=100, save_interval=200),
    # tinyshakespeare with the batch of nanoGPT's CPU command, about its size, and what is known since.
    "shakespeare_cpu": dict(
        shakespeare, n_layer=4, batch_size=12, muon_lr=0.05, muon_momentum=0.85, max_steps=250, eval_interval=50,
        save_interval=250),
    # The same text to 1.88 nats in the least time: one layer, whose convolution knows the bytes just before.
    "shakespeare_fast": dict(
        shakespeare, n_layer=1, batch_size=32, short_conv=4, muon_lr=0.1, muon_momentum=0.8, max_steps=125,
        eval_interval=125, save_interval=125),
    # nanoGPT's CPU command: the same architecture, batch, optimiser and schedule, on bytes, in bfloat16.
    "nanogpt_cpu": dict(
        dataset="shakespeare", n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, n_targets=1,
        intermediate_losses=False, positions="learned", norm="layer", norm_gain=True, activation="gelu", init="gpt2",
        tie_weights=True, optimizer="adamw", lr=1e-3, schedule="cosine", min_lr_scale=0.1, warmup_steps=100,
        warmup_peak="next", weight_decay=0.1, decay_params="2d", dtype="bfloat16", max_steps=2000, eval_interval=250,
        save_interval=500),
    # The first 4,150,000 bytes of enwik8 on two cores.
    "enwik8_cpu": dict(
        some_enwik8, batching="epochs", n_layer=4, n_head=4, qk_norm=True, warmup_steps=20, max_steps=2000),
    # One recipe for every mixer at equal parameters: T12's shape in small.
    "variants_cpu": dict(variants, equal_params=True, sample_length=0),
    # The baseline of grids/one_change.yaml; with --max_steps 10000 the curve of docs/one-change.md.
    "one_change": dict(
        modern, dataset="enwik8", max_bytes=4_150_000, batching="streams", carry_memory=False, data_seed=1,
        batch_size=8, block_size=128, n_layer=4, n_head=4, n_embd=96, equal_params=True, norm_gain=False, bias=False,
        activation="gelu", mixer="full", ff="mlp", lr=0.02, muon_lr=0.02, momentum=0.9, weight_decay=0.0, grad_clip=1.0,
        decay_fraction=0.8, warmup_steps=10, dtype="bfloat16", max_steps=500, eval_interval=100, eval_windows=32,
        save_interval=250, log_interval=10, sample_length=0),
    # DeepSeek-V2 and V3 in small: latent attention, experts after a dense layer, two bytes ahead.
    "deepseek_cpu": dict(
        variants, norm_gain=True, mixer="mla", ff="mlp,moe,moe,moe,moe,moe", activation="swiglu", n_expert=9,
        n_shared_expert=1, expert_top_k=2, expert_balance="bias", mtp_depth=1),
    # Four passes over the whole of enwik8 at T12's size. Never run: what they cost is predicted (docs/speed.md). A T4
    # has no bfloat16, in which Muon iterates.
    "a100": dict(one_gpu, dtype="bfloat16"),
    "t4": dict(one_gpu, dtype="float16", batch_size=32, grad_accum=2, optimizer="adamw", lr=1e-3, betas=(0.9, 0.95)),
    # Al-Rfou et al.: batch 16, momentum 0.99, fixed rate 0.003. Dropout and length of T12 are not in the text: ours.
    "t12": dict(al_rfou, dropout=0.2),
    "t64": dict(al_rfou, n_layer=64, dropout=0.55),
}

# What --debug sets, unless a flag says otherwise.
debug_settings = dict(dataset="stdlib", max_bytes=200_000, n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4,
                      max_steps=20, warmup_steps=2, eval_interval=10, eval_windows=4, save_interval=10, log_interval=1,
                      sample_length=40, deterministic=True)

# These make the shape of the weights and of the state beside them: on resume they come from the checkpoint.
architecture = (*TransformerConfig.shape(), "init_from", "lora_only", "optimizer", "decay_params", "batching")


def check(settings):
    """Settings that cannot go together: UserError with one sentence. Returns the model's configuration."""
    with as_user_error():
        config = TransformerConfig.from_settings(settings)
        optim.check(settings)
    if intermediate_losses and optim.horizon(settings, 0) is None:
        raise UserError("intermediate_losses end at fractions of max_steps: give --max_steps N, --max_seconds S, or "
                        "--no-intermediate_losses")
    limits.weigh(lambda: build_model(config), device)
    before = config.memory_length + config.compressed_length if {"xl", "compressive"} & set(config.mixers) else 0
    limits.fits(limits.kept(batch_size / dp, block_size + before, n_embd, n_layer if shorten == 1 else 2),
                f"a batch_size of {batch_size} windows of {block_size} bytes", device)
    return config


def extend(settings, checkpoint):
    """On resume: the model's context grows to extend_block_size, rope's factor with it."""
    if extend_block_size is None or checkpoint and extend_block_size == block_size:
        return
    if not checkpoint:
        raise UserError("--extend_block_size goes with --resume: a new run takes --block_size")
    if extend_block_size < block_size:
        raise UserError(f"--extend_block_size {extend_block_size} is less than the model's block_size {block_size}")
    if positions.startswith("learned"):
        raise UserError(f"--extend_block_size: positions {positions} end at block_size {block_size}; rope, alibi, "
                        "relative and none go further")
    factor = settings["rope_factor"]
    grown = factor * extend_block_size / block_size if settings["rope_scaling"] != "none" else factor
    settings.put(block_size=extend_block_size, rope_factor=grown)
    checkpoint.update(data=None, memory=None)            # longer windows are another division of the data


def equalise(settings, config):
    """Sets ff_mult such that there are as many parameters as with mixer full and ff mlp; returns the configuration."""
    for name in ("ff_width", "expert_width"):
        if settings[name] is not None:
            raise UserError(f"--equal_params chooses ff_mult, which --{name} overrules: leave one of the two out")
    with as_user_error():
        settings.put(ff_mult=equal_ff_mult(config))
    return check(settings)


def evaluate(model, opt, ema, data, windows, autocast, mesh):
    """Yields (name, Score), of windows under the block protocol, of the whole split (windows None) under
    full_eval_protocol: of the raw weights (the average that a schedule-free optimiser keeps, the mean of ivon's
    posterior) and, when there is an ema, of that."""
    for weights, place in optim.both(opt, ema):
        with place, autocast, mesh.gathered(model):
            yield weights, score(model, data, "block" if windows else full_eval_protocol, eval_batch_size, windows)


def log_scores(run, step, scores, say=None, **more):
    """Scores, as `evaluate` yields them, to the metrics, and in words to `say`. Returns the last: of the average of the
    weights when there is one."""
    for weights, found in scores:
        run.log(step=step, split="val", loss=found.loss, bpb=found.bpb, protocol=found.protocol, bytes=found.bytes,
                weights=weights, **more)
        if say:
            say(f"step {step}: val {found.bpb:.4f} bits/byte ({found.protocol}; {weights} weights)")
    return found


def last_words(run, step, scores, seconds):
    """The scores of the whole split to the metrics, the summary and in print."""
    for weights, found in scores:
        log_scores(run, step, [(weights, found)], final=True)
        run.summary(**{f"val_bpb_{weights}": found.bpb, f"val_loss_{weights}": found.loss})
        print(f"val {found.bpb:.4f} bits/byte = {found.loss:.4f} nats/byte (protocol {found.protocol}, "
              f"{found.bytes:,} bytes, {weights} weights) after {step:,} steps, {seconds:.0f} s of training")


def usage(model):
    """How the last step spread over the experts of each layer, for the metrics: shares, and the largest over even."""
    shares = {layer: (n.float() / n.sum()).tolist() for layer, n in model.usage.items()}
    return {**{f"experts_{layer}": [round(share, 4) for share in found] for layer, found in shares.items()},
            **{f"imbalance_{layer}": len(found) * max(found) for layer, found in shares.items()}}


def write_sample(model, run, step, prompt=b"\n"):
    """`sample_length` bytes from the model at temperature 0.8: printed, and as text into the run's samples/. Its
    generator is its own."""
    model.eval()
    tokens = generate(model, [prompt], sample_length, torch.Generator().manual_seed(seed), temperature=0.8)
    written = (prompt + b"".join(bytes(token.tolist()) for token in tokens)).decode(errors="replace")
    if run.main:
        print(f"--- sample ---{written}\n--------------")
        with optional("the sample's file is"):
            (run.dir / "samples").mkdir(exist_ok=True)
            (run.dir / "samples" / f"step_{step:08d}.txt").write_text(written, encoding="utf-8")


@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    mesh = parallel.start(dp, tp, device)                # from here on only rank 0 prints
    checkpoint = resumed(settings, architecture)
    given = hf.begin_from(settings, checkpoint)          # with --init_from its sizes hold, too
    extend(settings, checkpoint)
    config = check(settings)
    if equal_params and not checkpoint:
        config = equalise(settings, config)
    limits.notes(settings, {"max_steps": max_steps}, checkpoint and checkpoint["settings"])
    where, precision = resolve_device(mesh.device, dtype)
    carry = carry_memory and batching == "streams" and config.carries
    mesh.check(config, batch_size, optimizer, precision, carry, compile)
    parallel.warn_of_passes(config, grad_accum)

    # ---- data ----
    ends = text.ending(settings)
    corpus = text.load(dataset, max_bytes, where, ends)
    begins = text.document_beginnings(corpus.train, ends, dataset) if ends else None
    if eval_interval:
        text.check_split(corpus.val, block_size)
        parse_protocol(full_eval_protocol, config, len(corpus.val))
    batches = text.Batches(corpus.train, batch_size, block_size, config.n_labels, batching, data_seed, where, begins)

    # ---- model, optimiser ----
    seed_everything(seed, deterministic)
    model = mesh.parallelise(build_model(config, given.weights).to(where))
    if compile:
        torch._dynamo.config.recompile_limit = max(8, 2 * n_layer)   # every ended intermediate loss is one more graph
    net = torch.compile(model) if compile else model
    autocast, scaler = mixed_precision(where, precision)
    memory = model.new_memory(batch_size) if carry else None
    opt = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model), mesh,
                      n_examples=len(corpus.train))
    ema = optim.EMA(model, ema_decay) if ema_decay else None

    # ---- the run: on resume, what it is handed goes on where the checkpoint was saved ----
    loop = Loop(dict(step=0, evaluated=0, best=math.inf, best_step=0, bytes=0, seconds=0.0, pending=[],
                     logged_seconds=0.0), scaler)
    with Run(settings, checkpoint, mesh, model=given.kept_of(model), ema=ema, optimizer=opt, scaler=scaler,
             generators=Generators(), data=batches, memory=memory, loop=loop,
             posterior=optim.Posterior(opt, model.named_parameters()), **given.kept()) as run:
        print(f"{corpus.source}; {limits.size(model)}; {where.type} {str(precision).removeprefix('torch.')}")
        peak_flops = measure_peak_flops(where, precision) * mesh.size
        limits.hint(where, model, batch_size // dp, block_size, grad_accum, peak_flops, precision != torch.float32)
        bytes_per_step = batch_size * grad_accum * block_size
        first = loop["step"]
        # a new run at once: a full disk shows at the start; with keep_last again: the numbered one may be missing
        saved = first if checkpoint and not (keep_last or settings["keep_every"]) else -1
        hinted = where.type != "cpu" or max_steps is None or settings["max_seconds"] is not None
        bar, clock = run.bar(max_steps, first), Stopwatch(where, run)

        while not mesh.stop(run):
            # ---- validate and save: before the step, so that a run that stops here does on resume what was due ----
            step = loop["step"]
            if eval_interval and step % eval_interval == 0 and loop["evaluated"] < step:
                loop.flush()
                loop["evaluated"] = step
                everything = full_eval_interval and step % full_eval_interval == 0
                clock.start()
                for windows in (None, eval_windows) if everything else (eval_windows,):
                    scores = evaluate(model, opt, ema, corpus.val, windows, autocast, mesh)
                    found = log_scores(run, step, scores, bar.note)
                clock.lap("evaluation")
                if found.bpb < loop["best"]:             # the fixed windows; of the average when there is one
                    loop.update(best=found.bpb, best_step=step)
                    run.save("best.pt", step)
            if step % save_interval == 0 and saved < step:
                run.save("last.pt", step, keep=keep_last)
                saved = step
            if run.ended(loop):
                break

            # ---- one optimiser step ----
            began = time.perf_counter()
            rate = optim.set_rate(opt, settings, step, loop["seconds"])
            steps = optim.horizon(settings, step, loop["seconds"])
            active = active_layers(step, steps, n_layer) if intermediate_losses else None
            loss, reports = 0.0, []
            clock.start()
            for _ in range(grad_accum):
                x, y = mesh.rows(*batches.next())                # each process draws the whole batch and takes its rows
                if memory and batches.fresh:
                    memory.reset()
                clock.lap("data")
                with opt.sampled():                      # ivon: one draw of the weights for each pass
                    with autocast:
                        objective, nats = net(x, targets=y, active=active, memory=memory)
                    clock.lap("forward")
                    scaler.scale(objective / grad_accum).backward()
                    clock.lap("backward")
                loss = loss + nats[-1, 0] / grad_accum           # last layer, next byte: what the published figures are
                reports.append((model.usage, model.extras))
            grad_norm = optim.take_step(opt, scaler, model.parameters(), grad_clip, ema, mesh.clip_grad_norm)
            mesh.gather(model, reports)
            model.balance_experts()
            clock.lap("optimiser")
            loop.add(torch.stack([mesh.mean(loss), grad_norm]))
            step = loop["step"] = step + 1
            loop["bytes"] += bytes_per_step

            # ---- log ----
            rows, elapsed = loop.lap(began, step % log_interval == 0)
            if rows:
                mean, speed = sum(loss for loss, _ in rows) / len(rows), len(rows) * bytes_per_step / elapsed
                run.log(step=step, split="train", loss=mean, bpb=mean / LN2, lr=rate,
                        grad_norm=rows[-1][1], tokens_per_s=speed,
                        mfu=speed * model.flops_per_token(block_size, active) / peak_flops,
                        seconds=loop["seconds"], epoch=batches.epoch,
                        **{f"loss_{name}": mesh.mean(value).item() for name, value in model.extras.items()},
                        **usage(model))
                bar.update(step, f"loss {mean:.4f}, {speed:,.0f} bytes/s")
            if not hinted and loop["seconds"] > 2:
                hinted = True
                limits.hint_hours(step, max_steps, loop["seconds"], bar.note)

        # ---- the end ----
        stopped, ended = mesh.stop(run), run.ended(loop)     # of all processes: what follows, they do together
        step = loop["step"]
        bar.close()
        loop.flush()
        if saved < step:
            run.save("last.pt", step)
        if eval_interval and not stopped and loop["evaluated"] < step:
            clock.start()
            lines = list(evaluate(model, opt, ema, corpus.val, eval_windows, autocast, mesh))
            if lines[-1][1].bpb < loop["best"]:          # the last step may be the best, too
                loop.update(best=lines[-1][1].bpb, best_step=step)
                run.save("best.pt", step)
                run.save("last.pt", step)
            log_scores(run, step, lines)                 # after these: a run that goes on from here has no line of it
            clock.lap("evaluation")
        run.summary(step=step, best_bpb=loop["best"], best_step=loop["best_step"], seconds=loop["seconds"],
                    bytes=loop["bytes"], parameters=model.n_params(), flops=model.flops_per_token(block_size))
        if eval_interval and not stopped:
            clock.start()
            last_words(run, step, evaluate(model, opt, ema, corpus.val, None, autocast, mesh), loop["seconds"])
            clock.lap("evaluation")
        if sample_length and not stopped:
            with opt.averaged(), mesh.gathered(model):
                write_sample(model, run, step)
        run.spent(clock)
        print(f"{'stopped' if stopped else ended} at step {step:,}: {run.dir}")


if __name__ == "__main__":
    main()
