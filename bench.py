"""What everything costs, beside peers and beside the machine's own limit: one table, by turns in one sitting.

    python bench.py                                               # ours alone: a minute or two
    python bench.py --preset big --threads 1 --clock cpu          # 6 layers, 384 wide; a busy neighbour does not count
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT && pip install x-transformers
    python bench.py --peer nanogpt=../nanoGPT,x-transformers --json table.json
    python bench.py --what kernels,growth,startup                 # operations; a step as sizes grow; first steps
    python bench.py --what loss --peer nanogpt=../nanoGPT         # seconds to 1.88 nats on tinyshakespeare
    python bench.py --what mixers,worlds,dialogs --threads 1      # generation with our caches and without
    python bench.py --what gpus                                   # what the presets for one GPU should take, by FLOPs
    python bench.py --preset gpu --json gpu.json                  # on a GPU: what none has been asked yet

Each round times all sides right after one another, in an order that turns; a row gives each side's median over the
rounds with quartiles, and the median and quartiles of the rounds' ratios. nanoGPT's model.py is imported as it is, its
loop is what its train.py does on a CPU (float32, fused attention, AdamW, clipping at 1); x-transformers is its Decoder
of the same depth, width and heads with learned positions, with the same loop. Ours is the loop of train_enwik8.py with
the preset nanogpt_cpu (bfloat16 autocast). Random bytes: speed does not depend on the text.

Shares: `of peak` is against the best square matrix product of this device and type just before; `of bandwidth` against
the best copy of a large tensor; the ratio beside `its products` against the step's own matrix products and nothing
else, which is all that any training of these shapes could reach here. What it measured: docs/speed.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import contextlib
import ctypes
import functools
import gc
import importlib.util
import io
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from json import dumps, loads
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as sample.py does

import torch
import torch.nn.functional as F

import kernels as ops
from data import text
from model import Transformer, TransformerConfig, build_model, parameter_roles
from models.world_dynamics import CausalDynamics, Dynamics
from nanolab import limits, optim
from nanolab.dialog_tree import DialogTree
from nanolab.dialogs import converse
from nanolab.generate import generate
from nanolab.run import (UserError, as_user_error, command, keep_freed_memory, measure_peak_flops, override,
                         peak_memory, read_metrics, replacing, resolve_device)
from nanolab.score import score
from nanolab.settings import shown

# --- What ---
preset = None            # a named set of settings (below); flags win over it
peer = None              # nanogpt=FOLDER, x-transformers, liger (operations, on a GPU), several with commas; none: ours
what = "train,memory,generate,evaluate,optimiser"  # and kernels growth startup loss mixers contexts worlds dialogs gpus
                                                   # presets
json = None              # [path] the rows are written there too
device = "auto"          # auto, cpu, cuda, cuda:1, ...
dtype = "bfloat16"       # [float32, bfloat16] autocast of our training side
compile = False          # our training side through torch.compile, a row more
kernels = "torch"        # [torch, triton] of our side
attention = "auto"       # [auto, sdpa, manual] of our side
threads = 0              # [>= 0, <= 1024] CPU threads; 0: as many as PyTorch takes
clock = "wall"           # [wall, cpu] cpu: this process's CPU time, for one thread beside a busy neighbour
rounds = 15              # [>= 1, <= 100_000] each side is timed once a round
steps = 20               # [>= 1, <= 1e6] training steps a round
seed = 0                 # [>= 0] weights and bytes
# --- Size: nanoGPT's own CPU command ---
n_layer = 4              # [>= 1, <= 1000] transformer blocks
n_head = 4               # [>= 1, <= 1000] attention heads
n_embd = 128             # [>= 1, <= 65_536] width
block_size = 64          # [>= 1, <= 1e6] context
batch_size = 12          # [>= 1, <= 1e6] windows per step
vocab_size = 65          # [>= 2, <= 1e7] nanoGPT's distinct characters; ours has always 256 bytes
draws = "1,16"           # rows generated at once, several with commas
eval_block_size = 512    # [>= 2, <= 1e6] context of the evaluated model, which has rope
# --- Loss: tinyshakespeare, the whole validation split ---
loss_target = 1.88       # [> 0.0, < 100.0] nats a byte: how many of our runs reach it is counted
# --- Mixers: the shape of train_enwik8.py's preset variants_cpu, in float32 ---
mixers = ("full full/n_kv_head=1 full/shorten=2 window strided fixed diff mla xl compressive mamba mingru "
          "mamba,mamba,full")  # with spaces; /n_kv_head=N and /shorten=N change that one
contexts = (128, 512, 2048, 8192)  # [>= 2, <= 1e6] bytes of a row, and before the one more that is timed
# --- Worlds: frames of 8 x 8 tokens by train_worldmodel.py's dynamics, 2 layers, 4 heads, 64 wide ---
frames = 16              # [>= 2, <= 10_000] of a world, the first of them given
decode_steps = 25        # [>= 1, <= 10_000] rounds of MaskGIT for a frame
# --- Dialogs: one beginning, 8 branches, 8 leaves each; 2 layers, 4 heads, 128 wide ---
dialog_tokens = (200, 20, 10)  # [>= 1, <= 1e6] of the beginning, of a branch, of a leaf
reply_tokens = (1, 8, 32)  # [>= 1, <= 1e6] drawn in each dialog; 1 comes out of the prompt's own pass
tree_budgets = (8_000_000, 2_000_000)  # [>= 0] bytes; all that the 64 dialogs hold is 2 to 6 million
# --- Presets: whole runs of train_enwik8.py on random bytes ---
preset_runs = "a100 a100/kernels=triton/compile=false t4 t12 t64"  # with spaces; /name=value adds a flag to that one
preset_steps = 100       # [>= 2, <= 1e6] optimiser steps of each, of which the first half is not counted

presets = {
    # nanoGPT's config for the same text on a GPU, with a smaller batch.
    "big": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16, steps=2, rounds=7),
    # All that a GPU is asked for, at GPT-2's size.
    "gpu": dict(what="train,memory,generate,evaluate,optimiser,kernels,growth,contexts,presets", n_layer=12, n_head=12,
                n_embd=768, block_size=1024, batch_size=12, compile=True, steps=5, rounds=5),
}

USES = dict(generate=["draws"], evaluate=["eval_block_size"], loss=["loss_target"], mixers=["mixers"],
            contexts=["mixers", "contexts"], worlds=["frames", "decode_steps"],
            dialogs=["dialog_tokens", "reply_tokens", "tree_budgets"], presets=["preset_runs", "preset_steps"])
SCRIPTS = ("train_enwik8.py", "train_mult.py", "train_dvae.py", "train_worldmodel.py", "train_facts.py")
HERE = Path(__file__).resolve().parent
where = torch.device("cpu")  # what `device` resolves to
settings = {}             # all that are above, as typed
peers = {}                # {name: Side} of `peer`
kind = None               # which of `what` is being measured
found = []                # the rows so far, as JSON has them


# --- Timing, and the table ---

def seconds(run):
    """Seconds of one run: CUDA events on a GPU, else the chosen clock."""
    if where.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(where)
        return start.elapsed_time(end) / 1000
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    run()
    return now() - began


def in_turns(sides, n=None):
    """{side: function} -> {side: seconds of each round}. One run each before counts for nothing."""
    for run in sides.values():
        run()  # allocation, thread pools, kernels
    taken, names = {side: [] for side in sides}, list(sides)
    for i in range(rounds if n is None else n):
        for side in names[i % len(names):] + names[:i % len(names)]:
            taken[side].append(seconds(sides[side]))
    return taken


def spread(values):
    """(median, lower quartile, upper quartile)."""
    values = sorted(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), low, high


def number(x):
    """A figure with three or four digits that mean something."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def heading(title):
    """The line above some rows."""
    print(f"\n{title}\n{'':<34} {'ours':>12} {'(quartiles)':<21} {'unit':<9} {'beside':<16} {'theirs':>10} {'ratio':>7}"
          "   (quartiles)", flush=True)


def row(name, unit, amount, taken, note="", lower=False):
    """Prints and notes one line for each other side: rates amount / seconds, or with `lower` seconds * amount, where
    less is better; a ratio above 1 always says that ours is better. taken: of `in_turns`, with the side "ours"."""
    figures = {side: spread([t * amount if lower else amount / t for t in times]) for side, times in taken.items()}
    ours, low, high = figures.pop("ours")
    ratios = {side: spread([b / a for a, b in zip(taken["ours"], taken[side])]) for side in figures}
    left = f"{name:<34} {number(ours):>12} {f'({number(low)} .. {number(high)})':<21} {unit:<9}"
    lines = [f" {side:<16} {number(figures[side][0]):>10} {ratio:>6.2f}x   ({least:.2f} .. {most:.2f})"
             for side, (ratio, least, most) in ratios.items()] or [""]
    lines[0] += f"   {note}" if note else ""
    print(left + f"\n{'':{len(left)}}".join(lines), flush=True)
    beside = {side: dict(theirs=figures[side][0], ratio=ratio[0], quartiles=ratio[1:])
              for side, ratio in ratios.items()}
    found.append(dict(kind=kind, name=name, unit=unit, ours=ours, quartiles=(low, high), note=note, beside=beside))


def measure(name, unit, amount, sides, note="", lower=False, n=None):
    """A `row` of sides that are timed now, in n rounds (None: `rounds`). note: a text, or a function of `taken`."""
    taken = in_turns(sides, n)
    row(name, unit, amount, taken, note(taken) if callable(note) else note, lower)


# --- Sides ---

Side = namedtuple("Side", "model training sampling")  # functions: () -> model, model -> run, (model, rows) -> run
silent = functools.partial(contextlib.redirect_stdout, io.StringIO())


def load_peers(words):
    """{name: Side} of --peer. UserError for one that is not known or not there."""
    sides = {}
    for word in words.split(",") if words else ():
        name, _, folder = word.partition("=")
        if name == "nanogpt" and folder:
            sides["nanoGPT"] = nanogpt(Path(folder) / "model.py")
        elif word == "x-transformers":
            sides[word] = x_transformers(needed("x_transformers", word, "pip install x-transformers"))
        elif word == "liger":                                # no model: of single operations, see liger_operations
            if where.type != "cuda":
                raise UserError("--peer liger: its kernels need a GPU")
            needed("liger_kernel", word, "pip install --no-deps liger-kernel")
        else:
            raise UserError(f"--peer {word}: nanogpt=FOLDER, x-transformers, liger, or several with commas")
    return sides


def needed(package, word, how):
    """A peer's package. UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--peer {word}: {error}; {how}") from None


def our_config(**other):
    """Our side of nanoGPT's architecture: learned positions, LayerNorm with gain, GELU, tied classifier, no biases."""
    how = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, dropout=0.0, positions="learned",
               norm="layer", norm_gain=True, bias=False, activation="gelu", tie_weights=True, n_targets=1,
               intermediate_losses=False, attention=attention)
    return TransformerConfig(**how | other)


def our_model(**other):
    """The model of `our_config`."""
    return build_model(our_config(**other)).to(where)


def loop(model, opt, loss_of, draw, n, half):
    """A function that does n optimiser steps: batch, loss (in bfloat16 where `half`), clipping at 1."""
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=half)

    def run():
        for _ in range(n):
            x, y = draw()
            with autocast:
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
    return run


def our_training(model, T=None, rows=None, n=None, compiled=False):
    """A function that does n (None: `steps`) optimiser steps the way train_enwik8.py does."""
    T, rows = T or block_size, rows or batch_size
    opt = optim.build(dict(optimizer="adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), decay_params="2d"),
                      model.named_parameters(), parameter_roles(model))
    data = torch.randint(256, (200_000,), dtype=torch.uint8, device=where)
    part = torch.arange(T + 1, device=where)
    forward = torch.compile(model) if compiled else model

    def draw():
        window = data[torch.randint(len(data) - T - 1, (rows,), device=where)[:, None] + part].long()  # (B, T + 1)
        return window[:, :-1], window[:, 1:, None]
    return loop(model, opt, lambda x, y: forward(x, targets=y)[0], draw, n or steps, dtype == "bfloat16")


def their_sampling(model, n, **how):
    """A function that draws n rows from one token up to block_size tokens by a peer's own generate()."""
    first = torch.zeros((n, 1), dtype=torch.long, device=where)
    return functools.partial(model.eval().generate, first, block_size - 1, temperature=0.8, **how)


def their_loop(loss_of, model, opt):
    """`steps` steps: batches drawn window by window as nanoGPT does; on a GPU in bfloat16."""
    data = torch.randint(vocab_size, (200_000,))

    def draw():
        starts = torch.randint(len(data) - block_size, (batch_size,))
        return (torch.stack([data[i + k:i + k + block_size] for i in starts]).to(where) for k in (0, 1))
    return loop(model, opt, loss_of, draw, steps, where.type == "cuda")


def nanogpt(path):
    """The Side of nanoGPT: its model.py at a path, the loop of its train.py; it has no cache."""
    if not path.is_file():
        raise UserError(f"--peer nanogpt={path.parent}: no model.py there; git clone "
                        "https://github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def model():
        with silent():
            return module.GPT(module.GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer,
                                               n_head=n_head, n_embd=n_embd, dropout=0.0, bias=False)).to(where)

    def training(model):
        with silent():
            opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), where.type)
        return their_loop(lambda x, y: model(x, y)[1], model, opt)
    return Side(model, training, functools.partial(their_sampling, top_k=50))


def x_transformers(package):
    """The Side of x-transformers: fused attention, no biases, torch's AdamW, its cache of keys and values."""
    def model():
        return package.AutoregressiveWrapper(package.TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=block_size, tie_embedding=True, attn_layers=package.Decoder(
                dim=n_embd, depth=n_layer, heads=n_head, attn_dim_head=n_embd // n_head, attn_flash=True,
                ff_no_bias=True))).to(where)

    def training(model):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        return their_loop(lambda x, y: F.cross_entropy(model.net(x).flatten(0, 1), y.flatten()), model, opt)
    top_k = package.autoregressive_wrapper.top_k
    return Side(model, training, functools.partial(their_sampling, filter_logits_fn=top_k, filter_kwargs=dict(k=50),
                                                   cache_kv=True))


def bare_products(model):
    """A function that does the matrix products of `steps` training steps and nothing else: what these shapes allow.

    Of every linear layer and the classifier the output, the input's gradient and the weight's; of attention scores and
    sums, and the two gradients of each, uncut by the causal mask.
    """
    def made(*shape):
        return torch.randn(shape, device=where).to(getattr(torch, dtype))
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights.append(model.classifier(model.first_head))
    tokens, rows = batch_size * block_size, batch_size * n_head
    linears = [(made(tokens, w.size(1)), made(*w.shape), made(tokens, w.size(0))) for w in weights]
    heads = [(made(rows, block_size, n_embd // n_head), made(rows, block_size, block_size)) for _ in range(n_layer)]

    def run():
        for _ in range(steps):
            for x, w, y in linears:
                x @ w.mT, y @ w, y.mT @ x
            for q, p in heads:  # q stands for k, v and their gradients too
                q @ q.mT, p @ q, q @ q.mT, p.mT @ q, p @ q, p.mT @ q
    return run


def our_sampling(model, n, use_cache=True):
    """A function that draws n rows from one byte up to block_size bytes."""
    model.eval()

    def run():
        generator = torch.Generator().manual_seed(seed)
        for _ in generate(model, [b"\n"] * n, block_size - 1, generator, use_cache, temperature=0.8, top_k=50):
            pass
    return run


# --- Training, generation, evaluation, optimisers ---

def compare_training():
    """Tokens per second of training, its share of the machine's best matrix product, and of its own products alone."""
    heading(f"training, batch {batch_size}, {n_layer} layers, {n_embd} wide, block {block_size}")
    peak, tokens = measure_peak_flops(where, getattr(torch, dtype)), steps * batch_size * block_size
    for compiled in (False, True)[:1 + compile]:
        model = our_model()
        sides = {"ours": our_training(model, compiled=compiled),
                 **{name: side.training(side.model()) for name, side in peers.items()},
                 "its products": bare_products(model)}
        began = time.perf_counter()
        sides["ours"]()
        first = f"; first {steps} steps {time.perf_counter() - began:.0f} s" * compiled

        def note(taken):
            flops = model.flops_per_token(block_size) * tokens / statistics.median(taken["ours"])
            return f"{flops / 1e9:,.0f} GFLOP/s, {flops / peak:.1%} of peak {peak / 1e9:,.0f}{first}"
        measure("training, compiled" if compiled else "training", "tokens/s", tokens, sides, note)


def _peak(side, typed):
    """In a process of its own: the peak of bytes of training, on a CPU of the whole process."""
    globals().update(typed, where=resolve_device(typed["device"], "float32")[0])
    keep_freed_memory()
    ops.use(kernels)
    if threads:
        torch.set_num_threads(threads)
    theirs = load_peers(peer).get(side)
    run = theirs.training(theirs.model()) if theirs else our_training(our_model())
    run()
    return peak_so_far()


def peak_so_far():
    """Bytes: the most that a GPU held, on a CPU the most that this process held."""
    try:  # getrusage begins with what the parent held
        status = Path("/proc/self/status").read_text() if where.type == "cpu" else ""
    except OSError:
        status = ""
    return 1024 * int(mine[1]) if (mine := re.search(r"VmHWM:\s+(\d+)", status)) else peak_memory(where)


def peak_of(run):
    """Bytes held at the peak of run(), on a CPU imports included; None where the system cannot count anew."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not this run's
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on (man 5 proc)
        except (AttributeError, OSError, TypeError):
            return None
    run()
    return peak_so_far()


def compare_memory():
    """Peak bytes of training, each side in a process of its own."""
    heading("peak memory of training" + (", imports included" if where.type == "cpu" else ""))
    taken = {}
    for side in ("ours", *peers):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            taken[side] = [child.submit(_peak, side, dict(settings)).result()]
    row("training", "MB", 1e-6, taken, lower=True)


def compare_generation():
    """Tokens per second of drawing a whole block from one token, with the cache and without."""
    heading(f"generation, block {block_size}, from one token to a full block")
    for n in map(int, draws.split(",")):
        model, tokens = our_model().for_inference(), n * (block_size - 1)
        sides = {name: side.sampling(side.model(), n) for name, side in peers.items()}
        measure(f"batch {n}, cache", "tokens/s", tokens, {"ours": our_sampling(model, n), **sides})
        measure(f"batch {n}, our cache or none", "tokens/s", tokens,
                {"ours": our_sampling(model, n), "without": our_sampling(model, n, use_cache=False)}, n=5)


@torch.no_grad()
def compare_protocols():
    """Bytes per second of evaluation under each protocol, each beside `stride:1`."""
    T = eval_block_size
    heading(f"evaluation, {n_layer} layers, {n_embd} wide, block {T}, rope; bytes of a whole split")
    torch.manual_seed(seed)
    model = our_model(block_size=T, positions="rope", tie_weights=False).eval()
    data = torch.randint(256, (64 * T,), dtype=torch.uint8)
    sizes = {"block": 64 * T, "cache": 64 * T, f"stride:{T // 8}": 16 * T, "stride:1": 3 * T}
    taken = in_turns({name: functools.partial(score, model, data[:n], name) for name, n in sizes.items()},
                     min(rounds, 3))
    of_one = {name: [t / sizes[name] for t in times] for name, times in taken.items()}  # seconds of a byte
    for name in sizes:
        beside = {} if name == "stride:1" else {"stride:1": of_one["stride:1"]}
        row(name, "bytes/s", 1, {"ours": of_one[name], **beside}, f"{sizes[name]:,} bytes")


def compare_optimisers():
    """Milliseconds of one step over the model's weights, beside torch's own optimisers."""
    heading(f"optimiser step over the {n_layer}-layer, {n_embd}-wide model's weights, float32")

    def fresh():
        torch.manual_seed(seed)
        model = our_model(tie_weights=False)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 0.01
        return model

    def ours(name, **how):
        model = fresh()
        return optim.build(dict(optimizer=name, lr=1e-3, weight_decay=0.1, **how), model.named_parameters(),
                           parameter_roles(model)).step

    def torchs(**how):
        return torch.optim.AdamW(fresh().parameters(), lr=1e-3, weight_decay=0.1, **how).step
    rows = {"adamw": {"ours": ours("adamw"), "torch": torchs(), "torch, fused": torchs(fused=True)},
            **{name: {"ours": ours(name)} for name in ("sgd", "schedule_free", "muon")},
            "adamw, orthograd": {"ours": ours("adamw", orthograd=True)}}
    if hasattr(torch.optim, "Muon"):
        hidden = [p for p in fresh().blocks.parameters() if p.dim() == 2]
        mine = optim.Muon([torch.nn.Parameter(p.detach().clone()) for p in hidden])
        for p, q in zip(mine.param_groups[0]["params"], hidden):
            p.grad = q.grad
        rows["muon, hidden matrices alone"] = {"ours": mine.step, "torch": torch.optim.Muon(hidden).step}
    for name, sides in rows.items():
        measure(name, "ms", 1e3, sides, lower=True)


# --- What grows ---

def compare_growth():
    """Tokens per second of training, and its peak of memory, as one size grows and the others stay."""
    heading(f"growth: training, {n_layer} layers, {n_embd} wide unless said, 8,192 tokens a step unless said")

    def grown(name, unit, amount, run, note=""):
        peak = peak_of(run)
        said = [f"{peak / 1e6:,.0f} MB"] * (peak is not None) + [note] * (note != "")
        measure(name, unit, amount, {"ours": run}, ", ".join(said), n=min(rounds, 5))

    def cost(name, T=256, rows=32, **other):
        torch.manual_seed(seed)
        model = our_model(**{"block_size": T, "positions": "rope", "tie_weights": False} | other)
        grown(name, "tokens/s", T * rows, our_training(model, T, rows, 1))
    for T in (128, 512, 2048, 8192):
        cost(f"context {T}", T, 8192 // T)
    for n in (1, 4, 16, 64):
        cost(f"batch {n}, context 256", 256, n)
    for width in (64, 128, 256, 512):
        cost(f"width {width}", n_embd=width, n_head=width // 32)
    cost("feed-forward, dense")
    for n in (4, 8, 16, 32, 64):
        cost(f"{n} experts, 2 chosen", ff="moe", n_expert=n)
    for n in (4, 8, 16, 32):
        torch.manual_seed(seed)
        model = Dynamics((8, 8), 8, 5, block_size=n).to(where)
        tokens, actions = torch.randint(8, (8, n, 64), device=where), torch.randint(5, (8, n), device=where)

        def step():
            F.cross_entropy(model(tokens, actions).flatten(0, 2), tokens.flatten()).backward()
            model.zero_grad()
        grown(f"{n} frames of 64 tokens, batch 8", "frames/s", 8 * n, step, "dynamics, forward and backward")


# --- Start-up, and time to a loss ---

def until(line, *words):
    """Seconds from the start of `python words...` to a line of its output that matches; then it is killed.

    Raises RuntimeError where it ends without.
    """
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        child = subprocess.Popen([sys.executable, *words, "--out_dir", folder], cwd=HERE, text=True, errors="replace",
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                 env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            for said in child.stdout:
                if re.match(line, said):
                    return time.perf_counter() - began
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    raise RuntimeError(f"{' '.join(words)}: no line {line!r}")


def whole(*words, cwd=HERE):
    """(seconds, standard output) of `python words...`. Raises RuntimeError where it fails, UserError for a mistake."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise (UserError if done.returncode == 2 else RuntimeError)(f"{' '.join(words)}: {done.stderr[-500:].strip()}")
    return time.perf_counter() - began, done.stdout


def compare_startup():
    """Wall seconds of -h, and to the first optimiser step (its line of the log), of every training script."""
    heading("start-up, wall seconds")
    rows = {"python -c 'import torch'": [whole("-c", "import torch")[0]],
            **{f"{script} -h": [whole(script, "-h")[0] for _ in range(6)][1:] for script in SCRIPTS}}
    for name, times in rows.items():
        row(name, "s", 1, {"ours": times}, lower=True)
    for script in SCRIPTS:
        times = [until("step 1/", script, "--preset", "cpu", "--log_interval", "1") for _ in range(6)]
        row(f"{script}, first step", "s", 1, {"ours": times[1:]}, "--preset cpu", lower=True)


def compare_presets():
    """Tokens per second of train_enwik8.py's presets by their own log, with its share of the peak and the memory."""
    heading(f"train_enwik8.py --preset, on random bytes, the second half of {preset_steps} steps")
    for words in preset_runs.split():
        name, *more = words.split("/")
        with tempfile.TemporaryDirectory() as folder:
            data, made = Path(folder, "bytes"), Path(folder, "train_enwik8", "one")
            data.write_bytes(random.Random(seed).randbytes(4_000_000))
            whole("train_enwik8.py", "--preset", name, "--dataset", str(data), "--max_steps", str(preset_steps),
                  "--log_interval", str(max(1, preset_steps // 10)), "--eval_interval", "none", "--sample_length", "0",
                  "--device", device, "--out_dir", folder, "--run_name", "one", *(f"--{flag}" for flag in more))
            rates = [line for line in read_metrics(made / "metrics.jsonl") if "tokens_per_s" in line]
            peak = loads((made / "summary.json").read_text())["peak_memory"]
        rates = rates[len(rates) // 2:]
        row(words, "tokens/s", 1, {"ours": [1 / line["tokens_per_s"] for line in rates]},
            f"{statistics.median(line['mfu'] for line in rates):.1%} of peak, {peak / 1e6:,.0f} MB")


NANOGPT_COMMAND = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
                   "--log_interval=1000 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
                   "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")


def prepare_nanogpt(folder):
    """tinyshakespeare as nanoGPT's train.py wants it, where it is not there yet; by our reader, which checks it."""
    place = Path(folder) / "data" / "shakespeare_char"
    if (place / "train.bin").is_file() and (place / "meta.pkl").is_file():
        return
    corpus = text.load("shakespeare")
    letters, ids = torch.cat((corpus.train, corpus.val)).unique(return_inverse=True)     # sorted; (N,)
    for name, part in zip(("train", "val"), ids.to(torch.int16).split([len(corpus.train), len(corpus.val)])):
        part.numpy().tofile(place / f"{name}.bin")
    itos = dict(enumerate(map(chr, letters.tolist())))
    meta = dict(vocab_size=len(letters), itos=itos, stoi={letter: i for i, letter in itos.items()})
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))


def compare_loss():
    """Wall seconds, start of the process to its end, of our preset and of nanoGPT's CPU command, and what both reach.

    Ours scores the whole validation split under `block`; nanoGPT's is its own estimate over 20 random batches.
    """
    heading(f"to {loss_target} nats on tinyshakespeare, from the start of the process to its end")
    folder = dict(word.partition("=")[::2] for word in (peer or "").split(",")).get("nanogpt")
    if folder:
        prepare_nanogpt(folder)
    taken, losses = {"ours": []}, {"ours": []}
    for i in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            sides = [("ours", HERE, r"= ([0-9.]+) nats/byte \(protocol block, 111,540", "train_enwik8.py", "--preset",
                      "shakespeare_fast", "--seed", str(seed + i), "--data_seed", str(seed + i), "--out_dir", out)]
            if folder:
                sides.append(("nanoGPT", folder, r"val loss ([0-9.]+)", *NANOGPT_COMMAND.split(),
                              f"--out_dir={out}/nanogpt"))
            for side, cwd, pattern, *words in sides if i % 2 == 0 else sides[::-1]:
                second, said = whole(*words, cwd=cwd)
                taken.setdefault(side, []).append(second)
                losses.setdefault(side, []).append(float(re.findall(pattern, said)[-1]))
    said = "; ".join(f"{side} " + ", ".join(f"{loss:.4f}" for loss in values) for side, values in losses.items())
    reached = sum(loss <= loss_target for loss in losses["ours"])
    row("shakespeare_fast", "s", 1, taken, f"{reached} of {rounds} reach it; nats: {said}", lower=True)


# --- Kernels ---

Case = namedtuple("Case", "name op inputs flops bytes twin", defaults=[None])  # twin: None: op without its kernel


def kernel_cases():
    """What is timed, at the sizes of a 12-layer, 512-wide model on a GPU, smaller on a CPU. Inputs of a float type want
    gradients."""
    big = where.type == "cuda"
    half = torch.bfloat16 if big else torch.float32
    B, T, C, V, H = (16, 1024, 512, 50304, 8) if big else (4, 256, 256, 8192, 4)
    N, D, W, E, K = B * T, C // H, 4 * C, 8, 1024
    e = half.itemsize

    def random(*shape, type=half):
        return torch.randn(*shape, device=where).to(type)
    x, wide, gain = random(N, C), random(N, 2 * W), random(C)
    labels = torch.randint(V, (N,), device=where)
    angle = torch.rand(1, T, 1, D, device=where) * 6
    heads, key = [random(B, H, T, D) for _ in range(3)], random(B, 1, 8 * T, D)
    space = [random(B, T // 64, 64, H, D) for _ in range(3)]
    ends = torch.linspace(0, N, E + 1, device=where).long()
    gate, state = random(B, T, C), 16
    logits, noise = random(N, K), random(N, K)
    yield Case("rms_norm with residual", lambda x, r, g: sum(ops.rms_norm(x, g, residual=r)), (x, random(N, C), gain),
               0, 9 * N * C * e)
    yield Case("layer_norm", ops.layer_norm, (x, gain, random(C)), 0, 5 * N * C * e)
    yield Case("rotary", ops.rotary, (random(B, T, H, D), torch.cos(angle), torch.sin(angle)), 0, 4 * N * C * e)
    yield Case("swiglu", functools.partial(ops.gated, "swiglu"), (wide,), 0, 8 * N * W * e)
    yield Case("gelu", ops.gelu, (wide,), 0, 10 * N * W * e)
    yield Case(f"cross_entropy, {V:,} ids", ops.cross_entropy, (random(N, V), labels), 0, 3 * N * V * e)
    yield Case(f"linear_cross_entropy, {V:,} ids",
               lambda x, w, t: ops.batched_linear_cross_entropy(x[None], w[None, None], t[:, None])[0, :, 0],
               (x, random(V, C) * C ** -0.5, labels), 6 * N * C * V, 0,
               lambda x, w, t: ops.cross_entropy_reference(F.linear(x, w), t))
    yield Case("attend, causal", ops.attend, heads, 7 * B * H * T * T * D, 0,
               functools.partial(F.scaled_dot_product_attention, is_causal=True))
    yield Case("attend, window 128", functools.partial(ops.attend, window=128), heads, 14 * B * H * T * 128 * D, 0)
    yield Case("attend_time", ops.attend_time, space, 0, 12 * N * C * e)
    yield Case("grouped_linear, 8 experts", ops.grouped_linear, (x, random(E, W // E, C), ends), 6 * N * C * W // E, 0)
    yield Case("min_gru", ops.min_gru, (gate, random(B, T, C), random(B, C, type=torch.float32)), 0, 10 * N * C * e)
    yield Case("selective_scan", lambda *a: ops.selective_scan(*a)[0],
               (gate.float(), torch.rand(B, T, C, device=where) * 0.1, -torch.rand(C, state, device=where),
                random(B, T, state).float(), random(B, T, state).float(), random(C).float(),
                torch.zeros(B, C, state, device=where)), 0, 8 * N * C * 4)
    yield Case("attend_space", ops.attend_space, space, 14 * N * 64 * C, 0)
    yield Case(f"attend_one, {8 * T:,} keys", lambda q, k: ops.attend_one(*map(torch.detach, (q, k, k))),
               (random(B, H, 1, D), key), 0, 2 * key.numel() * e)
    yield Case(f"attend_latent, {8 * T:,} keys", lambda q, k: ops.attend_latent(q.detach(), k.detach(), D // 2, 1.0),
               (random(B, H, 1, D), key), 0, key.numel() * e)
    yield Case("gumbel_softmax", lambda x: ops.gumbel_softmax(x, noise, 1.0, True)[0], (logits,), 0, 7 * N * K * e)
    yield Case("reinmax", lambda x: ops.reinmax(x, noise)[0], (logits,), 0, 6 * N * K * e)
    yield Case(f"nearest_code, {K:,} codes", lambda x, c: ops.nearest_code(x.detach(), c.detach()), (x, random(K, C)),
               2 * N * K * C, 0)


def liger_operations():
    """{operation: function of the inputs of its case}: what Liger-Kernel has of ours (0.8.5). Its cross-entropies are
    means, which ask less of the backward pass, and the first overwrites its logits."""
    from liger_kernel.transformers import functional as liger

    def rotary(x, cos, sin):  # turns queries and keys at once: here the halves of our heads
        q, k = x.transpose(1, 2).chunk(2, 1)
        return torch.cat(liger.liger_rope(q, k, cos[:, :, 0], sin[:, :, 0]), 1)

    def residual(x, r, gain):
        return sum(liger.liger_fused_add_rms_norm(x, r, gain, 1e-6, in_place=False))
    return {"rms_norm with residual": residual,
            "layer_norm": lambda x, g, b: liger.liger_layer_norm(x, g, b, 1e-5),
            "rotary": rotary,
            "swiglu": lambda x: liger.liger_swiglu(*x.chunk(2, -1)),
            "cross_entropy": liger.liger_cross_entropy,
            "linear_cross_entropy": liger.liger_fused_linear_cross_entropy}


def compare_kernels():
    """Milliseconds, forward and backward, of each operation beside its twin, eager and by torch.compile; its share of
    the copy's bandwidth (bytes that must be read and written) or of the matrix product's peak."""
    heading("operations, forward and backward" + ("" if where.type == "cuda" else
                                                  "; on a CPU an operation is its twin, but for linear_cross_entropy"))
    source = torch.zeros(2 ** 28 if where.type == "cuda" else 2 ** 25, device=where)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))  # bytes a second
    peak = functools.lru_cache(lambda dtype: measure_peak_flops(where, dtype))
    liger = liger_operations() if "liger" in (peer or "").split(",") else {}
    for case in kernel_cases():
        inputs = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in case.inputs]

        def both(op, way="torch"):
            def run():
                with ops.using(way):
                    out = op(*inputs)
                    if out.requires_grad:
                        (out * out).sum().backward()  # not a sum: a softmax's gradient would be zeros
            return run

        def note(taken):
            best = statistics.median(taken["ours"])
            return (f"{case.flops / best / peak(case.inputs[0].dtype):.0%} of peak" if case.flops else
                    f"{case.bytes / best / copied:.0%} of bandwidth")
        torch._dynamo.reset()
        twin, theirs = case.twin or case.op, liger.get(case.name.partition(",")[0])
        measure(case.name, "ms", 1e3, {
            "ours": both(case.op, "triton"), "eager": both(twin), "compiled": both(torch.compile(twin)),
            **({"Liger-Kernel": both(theirs)} if theirs else {})}, note, lower=True, n=min(rounds, 7))

    # ---- one fused AdamW step over the model's weights ----
    def stepping(way):
        tensors = [torch.randn_like(p) for p in our_model().parameters()]
        state = (tensors, [t * 0.01 for t in tensors], *([torch.zeros_like(t) for t in tensors] for _ in range(2)))
        tables = {}

        def run():
            with ops.using(way):
                ops.adamw_step(*state, 1, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, tables=tables)
        return run
    params = [torch.nn.Parameter(torch.randn_like(p)) for p in our_model().parameters()]
    for p in params:
        p.grad = p.detach() * 0.01
    measure("adamw_step", "ms", 1e3, {
        "ours": stepping("triton"), "eager": stepping("torch"),
        "torch, fused": torch.optim.AdamW(params, lr=1e-3, fused=True).step}, lower=True, n=min(rounds, 7))


# --- Mixers, worlds, dialogs: with our cache or tree, and without ---

def with_and_without(run):
    """The two sides of a function of a side's name."""
    return {side: functools.partial(run, side) for side in ("ours", "without")}


def of_mixer(words, T, **more):
    """The model of one of `mixers`, T bytes long."""
    mixer, _, other = words.partition("/")
    name, _, value = other.partition("=")
    if other and (name not in ("n_kv_head", "shorten") or not value.isdecimal()):
        raise UserError(f"--mixers {words}: a mixer, or one with /n_kv_head=N or /shorten=N")
    torch.manual_seed(seed)
    with as_user_error(f"--mixers {words}: "):
        return build_model(TransformerConfig(
            n_layer=6, n_head=4, n_embd=256, block_size=T, positions="rope", norm="rms", norm_gain=False, bias=False,
            activation="relu2", mixer=mixer, **more, **({name: int(value)} if other else {}))).to(where)


def compare_contexts():
    """Microseconds a byte of each mixer by context: of a training step over as many bytes as the largest context has,
    and its peak of memory; of reading so many bytes in one pass; of writing one more with so many in the cache. And the
    slope of each from the last context but one to the last, as an exponent of the context."""
    most, curves = max(contexts), {}
    heading(f"a byte by context: 6 layers, 4 heads, 256 wide, window 128, memories 256; float32; {most:,} bytes a step")
    for words in mixers.split():
        for n in contexts:
            model, x = of_mixer(words, n, memory_length=256), torch.randint(256, (most // n, n), device=where)

            def step():
                model(x, targets=x[..., None])[0].backward()
                model.zero_grad()
            peak = peak_of(step)
            taken = {"train": in_turns({"ours": step}, min(rounds, 5))["ours"]}
            with torch.inference_mode():
                model.eval()
                cache = model.new_cache(1, n + 64)
                taken["read"] = in_turns({"ours": lambda: model(x[:1])}, min(rounds, 5))["ours"]
                model(x[:1], cache=cache)
                taken["write"] = [seconds(lambda: model(x[:1, :1], cache=cache)) for _ in range(40)]
            for what, n_bytes in dict(train=x.numel(), read=n, write=1).items():
                memory = f"{peak / 1e6:,.0f} MB" if peak and what == "train" else ""
                row(f"{words}, {what} {n}", "us/byte", 1e6 / n_bytes, {"ours": taken[what]}, memory, lower=True)
                curves.setdefault(what, {}).setdefault(words, []).append(found[-1]["ours"])
            if peak:
                curves.setdefault("peak", {}).setdefault(words, []).append(peak / 1e6)
        if contexts[-1] != contexts[-2]:
            slopes = {what: math.log(of[words][-1] / of[words][-2], contexts[-1] / contexts[-2])
                      for what, of in curves.items()}
            print(f"{words}: exponents " + ", ".join(f"{what} {slope:.2f}" for what, slope in slopes.items()))
    if json:
        draw_contexts(curves, Path(json).with_suffix(".png"))


def draw_contexts(curves, path):
    """Writes a picture, a panel for each of {what: {mixer: [figure of each context]}}; times on logarithmic scales."""
    from matplotlib.figure import Figure
    titles = {"train": "training, microseconds a byte", "read": "reading, microseconds a byte",
              "write": "one byte more, microseconds", "peak": "training, peak of memory, MB"}
    figure = Figure(figsize=(4 * len(curves), 4), layout="constrained")
    for axes, (what, of) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for words, figures in of.items():
            axes.plot(contexts, figures, "o-", label=words)
        axes.set(xscale="log", title=titles[what], xlabel="context, bytes")
        if what == "peak":
            axes.set_ylim(0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
        axes.tick_params(axis="x", which="minor", bottom=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(of))
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def compare_mixers():
    """Bytes per second of generation with the cache and without, for each mixer, and its cache's bytes."""
    T = 256
    heading(f"6 layers, 4 heads, 256 wide, block {T}, window 128, memories {T}; float32, batch 1, random weights")
    for words in mixers.split():
        model = of_mixer(words, T).eval()
        short, long = (model.new_cache(1, n).bytes for n in (1024, 8192))

        def run(side):
            list(generate(model, [bytes(range(128))], 64, use_cache=side == "ours", temperature=0))
        measure(words, "bytes/s", 64, with_and_without(run), f"cache {(long - short) / (8192 - 1024):,.0f} B/byte, "
                f"{long / 1000:,.0f} kB at 8192", n=3)


@torch.inference_mode()
def compare_worlds():
    """Frames per second of each dynamics and batch with the cache and without, whether all tokens are the same, and
    the cache's bytes."""
    heading(f"8 x 8 tokens of 8 codes a frame, 2 layers, 4 heads, 64 wide; {frames - 1} frames after one, MaskGIT in "
            f"{decode_steps} rounds at temperature 1; float32, random weights")
    for name, kind in (("maskgit", Dynamics), ("prepend", Dynamics), ("causal", CausalDynamics)):
        torch.manual_seed(seed)
        how = dict(action_input="prepend") if name == "prepend" else {}
        model = kind((8, 8), 8, 5, block_size=frames, **how).to(where).eval()
        for batch in (1, 16) if kind is Dynamics else (1,):
            first, plan = (torch.randint(n, shape, device=where)
                           for n, shape in ((8, (batch, 1, 64)), (5, (batch, frames - 1))))
            made = {}

            def run(side):
                made[side] = model.generate(first, torch.full((batch, 1), 5, device=where), plan, side == "ours",
                                            steps=decode_steps, generator=torch.Generator().manual_seed(seed))

            def note(taken):
                same = "identical" if torch.equal(*made.values()) else "DIFFERENT"
                return f"{same} tokens, cache {model.new_cache(batch, frames).bytes / 1000:,.0f} kB"
            measure(f"{name}, batch {batch}", "frames/s", batch * (frames - 1),
                    with_and_without(run), note, n=3)


def compare_dialogs():
    """Tokens per second of `converse` with a tree that is empty at first, and without, for each budget and length of
    reply; the tree's largest number of bytes, and whether all replies are the same. Raises RuntimeError where a tree
    exceeded its budget.

    Tokens are the same on both sides: all that the 64 prompts have, whether read or found, and all that is drawn. Both
    sides are one batch of 64 rows; beginnings and branches, which only the tree's side has, are batches of 1 and 8.
    """
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(
        n_layer=2, n_head=4, n_embd=128, block_size=sum(dialog_tokens), positions="rope", norm="rms", norm_gain=False,
        bias=False, activation="relu2", init="xavier")).to(where).eval()
    base, branches, leaves = (torch.randint(256, (*shape, n)) for shape, n in zip(((), (8,), (8, 8)), dialog_tokens))
    prompts = [[*base.tolist(), *branches[i].tolist(), *leaves[i, j].tolist()] for i in range(8) for j in range(8)]
    heading(f"64 dialogs, {' + '.join(map(str, dialog_tokens))} tokens, in 1, 8 and 64 kinds; 2 layers, 4 heads, 128 "
            "wide, greedy, float32, random weights; beside: without a tree")
    for budget in tree_budgets:
        for n in reply_tokens:
            replies, most = {}, []

            def run(side):
                tree = DialogTree(model, budget) if side == "ours" else False
                replies[side] = [reply.tokens for reply in converse(model, prompts, n, None, tree=tree)]
                most.extend([tree.peak_bytes] if tree else [])

            def note(taken):
                if max(most) > budget:
                    raise RuntimeError(f"the tree held {max(most)} bytes with a budget of {budget}")
                same = "identical" if replies["ours"] == replies["without"] else "DIFFERENT"
                return f"{same} replies, {max(most):,} bytes at most"
            measure(f"budget {budget:,}, reply {n}", "tokens/s", 64 * (sum(dialog_tokens) + n),
                    with_and_without(run), note)


# --- GPUs that are not at hand ---

CARDS = {"a100": 312e12, "t4": 65e12}  # FLOP/s by the data sheets: dense products in bfloat16, in float16


def compare_gpus():
    """Time and memory that train_enwik8.py's presets for one GPU should take: of `limits.first_step`, whose step takes
    twice as long as its products at the card's peak."""
    print("\none GPU, predicted from FLOPs and data sheets, not measured")
    script = runpy.run_path(str(HERE / "train_enwik8.py"))
    for card, peak in CARDS.items():
        s = script | script["presets"][card]
        with torch.device("meta"):
            model = build_model(TransformerConfig.from_settings(s))
        T, rows, passes = s["block_size"], s["batch_size"], s["grad_accum"]
        n_bytes, one = limits.first_step(model, rows, T, passes, peak, half=True)
        flops, tokens = model.flops_per_token(T), rows * passes * T
        print(f"--preset {card}: {limits.size(model)}, {flops / 1e6:.0f} MFLOPs a byte; {s['max_steps']:,} steps of "
              f"{tokens:,} bytes at half of {peak / 1e12:.0f} TFLOP/s: {1000 * one:.0f} ms a step, "
              f"{s['max_steps'] * one / 60:.0f} minutes, {n_bytes / 1e9:.0f} GB at most")


COMPARISONS = dict(train=compare_training, memory=compare_memory, generate=compare_generation,
                   evaluate=compare_protocols, optimiser=compare_optimisers, kernels=compare_kernels,
                   growth=compare_growth, startup=compare_startup, loss=compare_loss, mixers=compare_mixers,
                   contexts=compare_contexts, worlds=compare_worlds, dialogs=compare_dialogs, gpus=compare_gpus,
                   presets=compare_presets)


def check(settings):
    """UserError for settings that do not fit together, or cannot be held or written."""
    kinds = what.split(",")
    if not set(kinds) <= set(COMPARISONS):
        raise UserError(f"--what {shown(what)}: {', '.join(COMPARISONS)}, or several with commas")
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", draws):
        raise UserError(f"--draws {shown(draws)}: numbers of rows from 1 to 999,999, with commas")
    if clock == "cpu" and threads != 1:
        raise UserError("--clock cpu counts the time of all threads: it needs --threads 1")
    used = {name for kind in kinds for name in USES.get(kind, ())}
    settings.refuse_idle([name for names in USES.values() for name in names if name not in used],
                         f"with --what {what}")
    if {"train", "memory", "generate", "optimiser"} & set(kinds):
        limits.weigh(lambda: build_model(our_config()), device)
        limits.fits(limits.kept(batch_size, block_size, n_embd, n_layer), f"batch_size {batch_size}", device)
    if json:                                                 # now, not after minutes
        try:
            tempfile.TemporaryFile(dir=Path(json).parent).close()
            if Path(json).is_dir():
                raise IsADirectoryError(0, "it is a folder")
        except OSError as error:
            raise UserError(f"--json {shown(json)}: cannot be written there: {error.strerror}") from None


@command
def main():
    global settings, where, peers, kind
    settings = override(globals())
    check(settings)
    if threads:
        torch.set_num_threads(threads)
    where, _ = resolve_device(device, "float32")
    if (preset, device, where.type) == ("gpu", "auto", "cpu"):
        raise UserError("--preset gpu: there is no GPU; --preset big is for a CPU")
    ops.use(kernels)
    torch.manual_seed(seed)
    peers = load_peers(peer)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}; {clock} time, {rounds} rounds")
    for kind in COMPARISONS:
        if kind in what.split(","):
            COMPARISONS[kind]()
            if json:  # after each: what is measured stays, whatever the next one meets
                with replacing(Path(json)) as file:
                    words = dict(device=name, torch=torch.__version__, python=sys.version.split()[0], clock=clock,
                                 rounds=rounds, rows=found)
                    file.write((dumps(words, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
