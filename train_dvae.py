"""A discrete VAE over ARC grids: a grid becomes a few codes of one codebook, and the codes become the grid again.

    python train_dvae.py --preset cpu                          # synthetic grids up to 8 x 8, 32 codes of 128: minutes
    python train_dvae.py --preset arc                          # ARC-AGI-1: training tasks, scored on evaluation tasks
    python train_dvae.py --preset arc_full                     # the same up to 30 x 30, 64 codes of 512
    python train_dvae.py --preset cpu --estimator reinmax      # another gradient through the choice, same everything
    python train_dvae.py --preset cpu --resume                 # goes on exactly where the newest run stopped
    python train_dvae.py --resume --eval_only                  # figures, pictures and the codes' statistics
    python train_dvae.py --resume --encode task.json           # codes of every grid in a file, as JSON
    python train_dvae.py -h                                    # every setting

Encoder -> query pooler -> n_codes choices out of one codebook -> decoder, in the manner of DALL-E's dVAE (Ramesh et al.
2021, 2102.12092), with the choice relaxed by Gumbel noise (Jang et al. 2017), copied straight through, by ReinMax (Liu
et al. 2023), or replaced by VQ (also residual, multi-head, SimVQ), LFQ or FSQ. The first code or two are the grid's
height and width; the others stand on tiles of it. To expect of the preset cpu: exact match 0.92 on 1,000 grids never
seen, after two minutes of one core. Figures: docs/dvae.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import math
import time

import torch

from data.arc import Canvas, Stream, load, statistics
from model import fused_rows, parameter_roles
from models.discrete import (FIXED, SAMPLED, choose, code_statistics, decompose, fsq_levels, information_gaps,
                             kl_uniform, lfq_bits, nmi_matrix, usage_kl)
from models.dvae import DVAE, Config
from nanolab import limits, optim
from nanolab.codes import draw, print_codes, print_grids
from nanolab.run import (Generators, Loop, Run, Stopwatch, UserError, as_user_error, begin, command, means,
                         mixed_precision, onto, optional, put_back, replacing, resolve_device, restoring, resumed,
                         seed_everything)

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
eval_only = False          # with resume: evaluate, draw, train nothing
encode = None              # with resume: a JSON file with grids (a task, a list of grids, one grid); prints their codes
decode = None              # with resume: codes with commas between, or a JSON file with lists of codes; prints grids
seed = 1337                # [>= 0] initialisation, dropout, noise of the codes, masks
data_seed = 1337           # [>= 0] order and augmentation of the grids
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: 16 bits on cuda, else float32
compile = False            # torch.compile
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it

# --- Data ---
dataset = "synthetic"      # synthetic; of ARC arc1, arc2, arc1-evaluation, ... with + between; a .json file or folder
val_dataset = None         # what is scored; none: synthetic, the evaluation tasks of dataset, or a tenth of your own
max_side = 8               # [>= 1, <= 30] of a grid; larger ones are left out (training: cropped)
n_colours = 10             # [>= 1, <= 10] grids with others are left out
n_train = 20_000           # [>= 1, with dataset synthetic] training grids
n_val = 1_000              # [>= 1] synthetic: grids to evaluate on
crops = 4                  # [>= 0] ARC: pieces of each training grid that is larger than max_side
colours = "keep_zero"      # [all, keep_zero, none] augmentation: colours exchanged at random; 0 stays background
symmetry = True            # augmentation: one of the eight symmetries of the square
split_seed = 0             # [>= 0] which synthetic grids there are, where crops are cut, which tasks are held out
batch_size = 64            # [>= 1] grids per forward pass
grad_accum = 1             # [>= 1] forward passes per optimiser step
group = 1                  # [>= 1] batches that are drawn together and sorted by area; 1: unsorted

# --- Model ---
n_codes = 32               # [>= 1] codes of a grid
codebook_size = 128        # [>= 2] codes to choose from
code_dim = 32              # [>= 1] width of a code; fsq: as many channels as it has levels; lfq: as it has bits
layout = "grid"            # [grid, canvas] codes spread over the grid, whose shape the first are; or over the canvas
patch_height = 2           # [>= 1] cells of a patch
patch_width = 1            # [>= 1] cells of a patch
encoder_layers = 1         # [>= 1, <= 1000] self-attention over patches
latent_layers = 1          # [>= 1, <= 1000] in the pooler, and again between codes and decoder
decoder_layers = 1         # [>= 1, <= 1000] layers of the decoder that read the latents
n_head = 4                 # [>= 1] attention heads
n_embd = 64                # [>= 1] width
cell_dim = 16              # [>= 1] width of a cell's embedding
ff_mult = 2.0              # [> 0.0] width of the feed-forward over n_embd
activation = "gelu"        # [gelu, relu, relu2, silu, swiglu, geglu]
norm = "layer"             # [layer, rms, dyt] before each branch
norm_gain = True           # learned gain in the norms
bias = True                # biases in linear layers and LayerNorm
init = "xavier"            # [gpt2, normal, xavier, truncated, zero] of the hidden matrices
dropout = 0.0              # [>= 0.0, < 1.0] probability, of branches
distance_bias = True       # attention knows distances from the start; False: it has to learn where things are
resample = True            # a path past attention, by distance alone, into the pooler and into the decoder
output_positions = False   # positions once more on the encoder's output
kernels = "torch"          # [torch, triton] triton: fused operations of kernels.py; not compared with --compile yet

# --- Codes ---
estimator = "gumbel_soft"  # [gumbel_soft, gumbel_hard, straight_through, reinmax, vq, simvq, lfq, fsq]
vq_levels = 1              # [>= 1, <= 64, with estimator vq/simvq] residual VQ: codes of a place, each of what is left
vq_heads = 1               # [>= 1, <= 64, with estimator vq/simvq] multi-head VQ: codes of a place, each of a part
rotation_trick = False     # [with estimator vq/simvq] the gradient is rotated from the code back to z, not copied
similarity = "cosine"      # [cosine, dot] of encoder output and code
codebook_init = "normal"   # [normal, uniform, kmeans] kmeans: of the untrained encoder's outputs
codebook_bound = 0.0       # [>= 0.0] weight of (length of a code - 1)^2
tau_start = None           # [none, > 0.0] temperature at first; none: the estimator's own (gumbel 1, the others 1)
tau_end = None             # [none, > 0.0] and at last; none: gumbel 1/16, the others 1
tau_fraction = None        # [none, > 0.0, <= 1.0] share of the schedule in which it goes there, half a cosine
noise_fraction = None      # [none, >= 0.0, <= 1.0] share in which the noise grows from none to its last size, a line
noise_last = 1.0           # [>= 0.0, <= 1.0] that size; 1: codes are drawn from the posterior
hard_at = None             # [none, >= 0.0, <= 1.0] share after which codes are one-hot; soft without noise until then
schedule_steps = None      # [none, >= 1] steps that all shares are of; none: max_steps
reset_interval = 20        # [none, >= 1] steps after which codes that nothing chose become encoder outputs; none: never
reset_fraction = 0.8       # [>= 0.0, <= 1.0, with reset_interval] share of the schedule with resets
mask_rate = (0.0, 0.0)     # [>= 0.0, < 1.0] share of the tokens that the encoder does not see, first and last
mask_fraction = 1.0        # [> 0.0, <= 1.0] share of the schedule in which it goes from one to the other

# --- Losses ---
loss_scale = "even"        # [even, token, grid] each grid's nats over its cells; over the mean number of them; as is
kl_weight = (0.0, 0.0)     # [>= 0.0] of the KL to the uniform prior, nats per grid, first and last
mi_weight = (0.0, 0.0)     # [>= 0.0] of its part MI
tc_weight = (0.0, 0.0)     # [>= 0.0] of its part TC
dwkl_weight = (0.0, 0.0)   # [>= 0.0] of its part DWKL, dimension-wise
usage_weight = (0.1, 0.1)  # [>= 0.0] of n_codes times the KL of the mean posterior over all positions
weight_fraction = 0.02     # [> 0.0, <= 1.0] share of the schedule in which weights go from first to last, half a cosine
positive_parts = False     # negative estimates of MI and TC become 0
kl_target = None           # [none, > 0.0] bits per grid: the KL's weight moves until the KL is that

# --- Optimisation ---
max_steps = 1000           # [none, >= 0] optimiser steps in all, resumes included; none: until stopped
patience = None            # [none, >= 1] validations without a better one that end the run
optimizer = "muon"         # [sgd, adam, adamw, muon, schedule_free] muon: hidden matrices, the rest by adamw
lr = 5e-3                  # [> 0.0] peak learning rate
muon_lr = 0.01             # [> 0.0, with optimizer muon] peak learning rate of the matrices
schedule = "cosine"        # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 50          # [>= 0] steps
decay_fraction = 0.5       # [> 0.0, <= 1.0, with schedule wsd] share of max_steps in which the rate falls linearly
min_lr_scale = 0.02        # [>= 0.0, <= 1.0, with schedule cosine/wsd] the last rate over the peak
betas = (0.9, 0.98)        # [>= 0.0, < 1.0, not with optimizer sgd]
momentum = 0.9             # [>= 0.0, < 1.0, with optimizer sgd]
weight_decay = 0.01        # [>= 0.0] on matrices only
grad_clip = 1.0            # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.99           # [>= 0.0, < 1.0] running average of the weights, evaluated in their place; 0: none

# --- Evaluation and logging ---
eval_interval = 250        # [>= 1] steps between validations
eval_grids = 1000          # [>= 1] grids of them; the final evaluation takes all
eval_batch_size = 256      # [>= 1] grids at once; changes the speed, not the result
save_interval = 250        # [>= 1] steps between checkpoints
keep_last = 0              # [>= 0] numbered checkpoints to keep beside last.pt and best.pt
log_interval = 10          # [>= 1] steps between lines of metrics

# Flags all the same: the commented fields of these classes.
FURTHER = {"the optimiser": "nanolab/optim.py:Settings but warmup_peak ess hess_init clip_radius decay_params",
           "the run": "nanolab/settings.py:Common"}

presets = {
    "cpu": dict(max_steps=1000),
    "arc": dict(dataset="arc1", max_side=10, n_codes=50, loss_scale="token", max_steps=3000, eval_interval=500),
    "arc_full": dict(dataset="arc1", max_side=30, n_codes=64, codebook_size=512, patch_height=2, patch_width=2,
                     batch_size=32, group=8, max_steps=3000, eval_interval=500, eval_batch_size=32),
    # DALL-E's own numbers (Ramesh et al. 2021, 2102.12092, sections 2.1 and A.2), its 3,000,000 steps of 512 images
    # become 1,000 of 64 grids, shares of the steps with them; the model, and what docs/dvae.md names, stay as they are.
    "dalle": dict(max_steps=1000, noise_fraction=0.0, tau_start=1.0, tau_end=1 / 16, tau_fraction=0.05,
                  kl_weight=(0.0, 6.6), weight_fraction=1 / 600, usage_weight=(0.0, 0.0), reset_interval=None,
                  loss_scale="token", optimizer="adamw", lr=1e-4, min_lr_scale=1 / 80, warmup_steps=0,
                  betas=(0.9, 0.999), weight_decay=1e-4, grad_clip=None, ema_decay=0.999),
}

# Names that are also understood.
aliases = {"d_model": "n_embd", "num_heads": "n_head", "codes": "n_codes", "learning_rate": "lr",
           "save_every": "save_interval", "eval_every": "eval_interval"}

# What --debug sets, unless a flag says otherwise.
debug_settings = dict(max_side=5, n_train=100, n_val=20, n_codes=6, codebook_size=16, code_dim=8, n_head=2, n_embd=16,
                      batch_size=8, max_steps=20, warmup_steps=2, eval_interval=10, save_interval=10, log_interval=1)

# These make what the model is scored on, or the shape of the weights: on resume the checkpoint's hold.
data_settings = ("dataset", "val_dataset", "max_side", "n_colours", "n_train", "n_val", "crops", "split_seed")
architecture = (
    "n_codes", "codebook_size", "code_dim", "layout", "patch_height", "patch_width", "encoder_layers", "latent_layers",
    "decoder_layers", "n_head", "n_embd", "cell_dim", "ff_mult", "activation", "norm", "norm_gain", "bias",
    "distance_bias", "resample", "output_positions", "vq_levels", "vq_heads", "similarity", *data_settings, "optimizer")


def check(settings):
    """Settings that cannot go together: UserError with one sentence. Returns the model's configuration."""
    if n_embd % n_head:
        raise UserError(f"n_head {n_head} does not divide n_embd {n_embd}")
    if round(ff_mult * n_embd) < 1:
        raise UserError(f"ff_mult {ff_mult} leaves no feed-forward width at n_embd {n_embd}")
    several = estimator in ("vq", "simvq")
    if several and min(vq_levels, vq_heads) > 1:
        raise UserError(f"vq_levels {vq_levels} and vq_heads {vq_heads}: one of the two must be 1")
    if several and code_dim % vq_heads:
        raise UserError(f"vq_heads {vq_heads} does not divide code_dim {code_dim}")
    width = code_dim // vq_heads if several else code_dim
    if width == 1 and similarity == "cosine" and estimator not in ("lfq", "fsq") and settings["resume"] is False:
        raise UserError(f"code_dim {code_dim}: on a line cosine knows two directions and has no gradient, so the "
                        f"encoder would learn nothing: take code_dim {2 * code_dim}, or --similarity dot")
    if estimator == "reinmax" and min(setting("tau_start"), setting("tau_end")) < 1:
        raise UserError(f"tau {setting('tau_start')} to {setting('tau_end')}: reinmax needs at least 1, unlike gumbel")
    if estimator not in SAMPLED and (kl_target or any(map(max, (kl_weight, mi_weight, tc_weight, dwkl_weight)))):
        raise UserError(f"{estimator} has no posterior: kl_weight, mi_weight, tc_weight, dwkl_weight and kl_target are "
                        f"for {', '.join(SAMPLED)}")
    if estimator not in SAMPLED and codebook_bound:
        raise UserError(f"codebook_bound {codebook_bound}: the codes of {estimator} are not learned by gradients")
    if schedule_steps is None and optim.horizon(settings, 0) is None:
        raise UserError("the schedules are shares of max_steps: with max_steps none give schedule_steps or max_seconds")
    with as_user_error():
        optim.check(settings)
        channels = (len(fsq_levels(codebook_size)) if estimator == "fsq" else
                    lfq_bits(codebook_size) if estimator == "lfq" else None)
    canvas = Canvas(max_side, n_colours, masked=max(mask_rate) > 0)
    config = Config(**{**settings, "canvas": canvas, "code_dim": channels or code_dim,
                       "quantiser": "categorical" if estimator in SAMPLED else estimator,
                       **({} if several else dict(vq_levels=1, vq_heads=1))})
    learned = n_codes - config.n_shape_codes
    if learned < 1:
        raise UserError(f"n_codes {n_codes}: {config.n_shape_codes} of them name the shape, none is left for the cells")
    if learned % config.n_books:
        raise UserError(f"n_codes {n_codes}: {config.n_shape_codes} of them name the shape, and the other {learned} "
                        f"are no multiple of {config.n_books} for a place: take {n_codes - learned % config.n_books}")
    limits.weigh(lambda: DVAE(config), device)
    limits.fits(8 * codebook_size, f"codebook_size {codebook_size}")     # how often each was chosen
    each = max_side ** 2 * 2 * cell_dim + n_codes * (2 * n_embd + (0 if estimator == "fsq" else 2 * codebook_size))
    limits.fits(batch_size * each, f"a batch_size of {batch_size} grids", device)
    limits.fits(max(8 * group, max_side ** 2) * batch_size * grad_accum, f"{grad_accum} times {batch_size} grids")
    if dataset == "synthetic":
        limits.fits((n_train + n_val) * max_side ** 2, f"{n_train + n_val:,} grids")
    return config


# --- Schedules: pure functions of the step, or with max_seconds of the share of the time ---

def ramp(step, steps, first, last, shape="cosine"):
    """From `first` at step 0 to `last` at `steps` and after, by a line or by half a cosine, as in DALL-E (Ramesh et al.
    2021, appendix A.2), not the quarter that is often copied for it."""
    part = min(1.0, step / steps) if steps else 1.0
    return first + (last - first) * (part if shape == "linear" else (1 - math.cos(math.pi * part)) / 2)


def setting(name):
    """A setting of the codes' schedules, or where it is none the estimator's own value: Gumbel wants a temperature
    below 1, ReinMax at least 1; one-hot codes come when code and decoder agree already."""
    value, tau_end = globals()[name], 1 / 16 if estimator.startswith("gumbel") else 1.0
    return dict(tau_start=1.0, tau_end=tau_end, tau_fraction=0.4, noise_fraction=0.25,
                hard_at=0.0 if estimator == "gumbel_soft" else 0.3)[name] if value is None else value


def steps_of(step, seconds=0.0):
    """Steps that all shares are of, after `step` of them, which took so many seconds."""
    return schedule_steps or optim.horizon(globals(), step, seconds)


def scheduled(step, seconds=0.0):
    """What the step after `step` finished ones is taken with: dict of tau, noise, hardness, mask_rate and weights."""
    steps = steps_of(step, seconds)
    now = {name: ramp(step, weight_fraction * steps, *globals()[name])
           for name in ("kl_weight", "mi_weight", "tc_weight", "dwkl_weight", "usage_weight")}
    now["mask_rate"] = ramp(step, mask_fraction * steps, *mask_rate)
    if estimator in SAMPLED:
        now["tau"] = ramp(step, setting("tau_fraction") * steps, setting("tau_start"), setting("tau_end"))
        now["noise"] = ramp(step, setting("noise_fraction") * steps, 0.0, noise_last, "linear")
        now["hardness"] = float(step >= setting("hard_at") * steps)
    return now


def next_kl_weight(weight, kl):
    """The KL's weight of the next step, for kl_target: 1 % more at most where the KL (nats) is above it, or less."""
    over = kl / (kl_target * math.log(2)) - 1
    return min(10.0, max(1e-4, weight) * math.exp(0.01 * max(-1.0, min(1.0, over))))


# --- Losses ---

def objective(model, found, tokens, shapes, now, mean_cells):
    """The loss of a batch, and its parts for the log: (scalar with gradient, {name: tensor}), nats per grid.

    found: what the codebook made of the grids; now: what `scheduled` says of this step. mean_cells: cells per grid of
    the whole step, of which this batch may be one pass of several; the mean over passes is then that of one pass over
    all of their grids, but for usage, MI, TC and DWKL. The usage term counts once for each learned code. loss_scale
    "token" divides by the cells per grid, as DALL-E's loss by the values of an image.
    """
    nats, right = model.nats(found.e, tokens, shapes)
    parts = {"nats": nats.mean().detach(), "exact": right.float().mean()}
    total = (nats / shapes.prod(1).float()).mean() * mean_cells if loss_scale == "even" else nats.mean()
    if found.logits is not None:
        if any(now[f"{name}_weight"] for name in ("mi", "tc", "dwkl")):
            terms = decompose(found.logits, found.y, positive_parts)
        else:
            terms = {"kl": kl_uniform(found.logits).sum(1).mean()}
        for name in [name for name in ("kl", "mi", "tc", "dwkl") if name in terms]:
            total = total + now[f"{name}_weight"] * terms[name] if now[f"{name}_weight"] else total
            parts[name] = terms[name].detach()
        if now["usage_weight"]:
            total = total + now["usage_weight"] * len(model.queries) * usage_kl(found.logits)
    if codebook_bound:
        total = total + codebook_bound * (model.codebook.norms() - 1).square().mean()
    if not isinstance(found.loss, float):
        total = total + len(model.queries) * found.loss
        parts["commitment"] = found.loss.detach()
    return total if loss_scale == "grid" else total / mean_cells, {**parts, "loss": parts["nats"] / mean_cells}


def masked(tokens, canvas, rate, generator):
    """tokens (B, S, S) with a share `rate` of those that are not PAD replaced by MASK, and how many are."""
    hidden = (torch.rand(tokens.shape, generator=generator, device=tokens.device) < rate) & (tokens != canvas.pad)
    return tokens.masked_fill(hidden, canvas.mask), hidden.sum() / (tokens != canvas.pad).sum()


def warn_of_passes():
    """One line where a step of several passes is not that of one pass over all of their grids."""
    nonlinear = [name for name in ("usage_weight", "mi_weight", "tc_weight", "dwkl_weight") if max(globals()[name])]
    if grad_accum > 1 and nonlinear and estimator in (*SAMPLED, "lfq"):
        print(f"grad_accum {grad_accum}: what {', '.join(nonlinear)} weighs is not linear in the batch: each pass of "
              f"{batch_size} grids has its own, and a step takes their mean")


def revive(model, loop, outputs, chosen, generator):
    """Counts which codes a step has chosen, (M n,) out of n books; every reset_interval steps, in a share of all, those
    codes that nothing chose become some of its encoder outputs (M, D)."""
    chosen = model.numbered(chosen.view(len(outputs), -1)).flatten()
    loop["chosen"].index_add_(0, chosen, torch.ones_like(chosen))
    if reset_interval and estimator not in FIXED and loop["step"] % reset_interval == 0:
        if loop["step"] <= reset_fraction * steps_of(loop["step"] - 1, loop["seconds"]):  # its own come later
            dead = loop["chosen"] == 0
            model.codebook.revive(dead, outputs, generator)
            loop["revived"] = loop.get("revived", 0) + int(dead.sum())
        loop["chosen"].zero_()


@torch.no_grad()
def fit_codebook(model, ema, canvas, stream, autocast, generator):
    """Codes become k-means of what the encoder makes of the first four batches; the average begins with them."""
    where = model.queries.device
    with autocast:
        outputs = [model.encode(canvas.tokens(cells).to(where), shapes.to(where)).flatten(0, 1)
                   for cells, shapes in map(stream.at, range(4))]
    model.codebook.fit(torch.cat(outputs), generator)
    if ema:
        ema.reset()


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, canvas, grids, autocast, now, count=None):
    """Figures of a model on the first `count` of Grids, by hard codes without noise, from codes alone.

    Returns (numbers for metrics.jsonl, what else there is: codes (M, N), written and true canvases (M, S, S)).
    accuracy: of tokens that are neither row end nor PAD; exact: whole canvases; nats and loss: -ln p(grid | codes) per
    grid and per cell; raw_bits: cells times log2 of the colours, on average; larger_exact: exact among the
    larger_grids, which have more of them than bits. soft_hard_gap: accuracy with codes drawn as `now` draws them in
    training, minus accuracy. count None: all grids, and also `thoroughly`.
    """
    model.eval()
    where, parts = model.queries.device, {}
    generator = torch.Generator(where).manual_seed(0)        # its own: an evaluation changes nothing in training
    cells, all_shapes = grids.cells[:count], grids.shapes[:count]
    for first in range(0, len(cells), eval_batch_size):
        some = slice(first, first + eval_batch_size)
        tokens, shapes = canvas.tokens(cells[some]).to(where), all_shapes[some].to(where)
        with autocast:
            z = model.encode(tokens, shapes)
            found = model.codebook(z)
            codes = model.with_shape(found.codes, shapes)
            nats, _ = model.nats(model.codebook.look_up(found.codes), tokens, shapes)
            row = dict(codes=codes, nats=nats, tokens=tokens, written=model.write(*model.read(codes)))
            if found.logits is not None:
                row["kl"] = kl_uniform(found.logits).sum(1)
                schedules = {name: now[name] for name in ("tau", "noise", "hardness")}
                row["drawn"] = model.write(model.codebook(z, estimator, generator=generator, **schedules).e, shapes)
                if count is None and first < 1000:               # the mixture of `decompose` compares all with all
                    row["logits"] = found.logits[:1000 - first]
        for name, value in row.items():
            parts.setdefault(name, []).append(value.cpu())
    model.train()
    found = {name: torch.cat(values) for name, values in parts.items()}
    tokens, inside = found["tokens"], found["tokens"] < canvas.n_colours

    def accuracy(written):
        return ((written == tokens) & inside).sum().item() / inside.sum().item()
    correct = (found["written"] == tokens).flatten(1).all(1)
    same_shape = (canvas.shapes(found["written"]) == canvas.shapes(tokens)).all(1)
    numbers = dict(
        accuracy=accuracy(found["written"]), exact=correct.double().mean().item(),
        shape_accuracy=same_shape.double().mean().item(), nats=found["nats"].double().mean().item(),
        loss=found["nats"].double().sum().item() / inside.sum().item(), bits=n_codes * math.log2(codebook_size),
        grids=len(tokens), **code_statistics(model.numbered(found["codes"][:, model.config.n_shape_codes:]),
                                             codebook_size * model.config.n_books))
    numbers["code_bits"] = code_statistics(found["codes"], codebook_size)["code_bits"]
    if "kl" in found:
        numbers["kl"] = found["kl"].double().mean().item()
        numbers["soft_hard_gap"] = accuracy(found["drawn"]) - numbers["accuracy"]
    raw_bits = inside.flatten(1).sum(1).double() * math.log2(n_colours)
    larger = raw_bits > numbers["bits"]
    numbers.update(raw_bits=raw_bits.mean().item(), larger_grids=larger.sum().item())
    if larger.any():
        numbers["larger_exact"] = correct[larger].double().mean().item()
    if hasattr(model.codebook, "norms"):
        norms = model.codebook.norms()
        numbers.update(codebook_norm_min=norms.min().item(), codebook_norm_max=norms.max().item())
    if count is None:
        numbers.update(thoroughly(found, grids, model.config.n_shape_codes))
    return numbers, found


def thoroughly(found, grids, n_shape_codes):
    """The monitors that a whole set is wanted for; plain numbers. All of learned codes, but factors: of all codes."""
    codes, generator = found["codes"][:, n_shape_codes:], torch.Generator().manual_seed(0)
    numbers = dict(floor=statistics(grids)["constant"])
    nmi, floor = nmi_matrix(codes, generator)
    apart = ~torch.eye(len(nmi), dtype=torch.bool)
    if apart.any():
        numbers.update(nmi=nmi[apart].mean().item(), nmi_floor=floor[apart].mean().item(),
                       nmi_max=nmi[apart].max().item())
    if "logits" in found:
        drawn = choose(found["logits"], "straight_through", generator=generator)[1]
        parts = decompose(found["logits"], torch.nn.functional.one_hot(drawn, codebook_size))
        numbers.update({name: parts[name].item() for name in ("mi", "tc", "dwkl", "code_mi")},
                       mi_ceiling=math.log(len(drawn)))
    if len(grids.pairs) > 1:
        a, b = codes[grids.pairs.T]                          # (pairs, N) each
        numbers.update(pair_difference=(a != b).double().mean().item(), pairs=len(a),
                       random_pair_difference=(a != b.roll(1, 0)).double().mean().item())
    for name, (best, gap, by_chance) in information_gaps(
            found["codes"], codebook_size, grids.factors, generator).items():
        numbers.update({f"information_{name}": best, f"gap_{name}": gap, f"chance_{name}": by_chance})
    return numbers


@torch.no_grad()
def draw_all(model, canvas, grids, found, run_dir, step, autocast):
    """Three pictures of an evaluation: panels of grid, what the encoder saw of it masked, reconstructions and code map;
    how often each code was chosen; and what changes where one code is changed."""
    from matplotlib.figure import Figure
    model.eval()
    where, folder = model.queries.device, run_dir / "samples"
    folder.mkdir(exist_ok=True)
    order = torch.linspace(0, len(found["codes"]) - 1, min(8, len(found["codes"]))).long()
    tokens, shapes, codes, written = (part[order] for part in (found["tokens"], grids.shapes, found["codes"],
                                                               found["written"]))
    panels = [("grid", tokens)]
    if canvas.mask is not None:
        hidden, _ = masked(tokens, canvas, max(mask_rate), torch.Generator().manual_seed(0))
        with autocast:
            again = model.codebook(model.encode(hidden.to(where), shapes.to(where))).codes
            again = model.write(model.codebook.look_up(again), shapes.to(where)).cpu()
        panels += [("masked", hidden), ("of masked", again)]
    panels += [("reconstruction", written), ("codes", model.code_map(codes))]
    draw(folder / f"step_{step:08d}.png", panels, canvas, codebook_size)

    learned = model.numbered(found["codes"][:, model.config.n_shape_codes:])
    counts = learned.flatten().bincount(minlength=codebook_size * model.config.n_books)
    figure = Figure(figsize=(6, 3), layout="constrained", dpi=80)
    axes = figure.subplots()
    heights = counts.sort(descending=True).values / counts.sum() * len(counts)
    axes.bar(range(len(counts)), heights.tolist(), width=1.0)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="code, by frequency", ylabel="frequency x codebook size", title=f"step {step}")
    with replacing(folder / f"usage_{step:08d}.png") as file:
        figure.savefig(file, format="png")

    base = codes[:4, None, None].expand(-1, 3, 3, -1).clone()    # 4 grids, 3 positions, 3 other codes each
    positions = torch.linspace(model.config.n_shape_codes, n_codes - 1, 3).round().long()
    popular = counts.argsort(descending=True)[torch.arange(3) % len(counts)] % codebook_size   # of two one comes twice
    for p, position in enumerate(positions):
        base[:, p, :, position] = popular
    with autocast:
        changed = model.write(*model.read(base.flatten(0, 2).to(where))).cpu().unflatten(0, (-1, 9)).unbind(1)
    labels = [f"code {int(p)} = {int(k)}" for p in positions for k in popular]
    draw(folder / f"traversal_{step:08d}.png", [("reconstruction", written[:4]), *zip(labels, changed)], canvas,
         codebook_size)
    model.train()


def fits(model, state):
    """UserError where two settings that change the weights say otherwise than the checkpoint does."""
    here = model.state_dict()
    if here.keys() != state.keys() or here["to_code.weight"].shape != state["to_code.weight"].shape:
        raise UserError(f"--estimator {estimator}: the checkpoint's codebook is of another kind; vq, simvq, lfq, fsq "
                        f"and the estimators that draw ({', '.join(SAMPLED)}) cannot go on with one another's")
    if here["cell"].shape != state["cell"].shape:
        raise UserError("--mask_rate: a run with masks has a token for them, one without has not: start anew for that")


def answer(checkpoint, model, opt, ema, autocast):
    """Prints the codes of the grids, or the grids of the codes, that the setting `encode` or `decode` names."""
    with restoring(checkpoint.path):
        put_back(checkpoint, dict(model=model, ema=ema, optimizer=opt))
    with optim.evaluated(opt, ema):
        print_codes(model, encode, autocast) if encode is not None else print_grids(model, decode, autocast)


@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    checkpoint = resumed(settings, architecture, readers=("eval_only", "encode", "decode"))
    config = check(settings)
    canvas = config.canvas
    where, precision = resolve_device(device, dtype)
    autocast, scaler = mixed_precision(where, precision)

    # ---- model, and what a person asks of a trained one ----
    seed_everything(seed, deterministic)
    model = DVAE(config).to(where)
    ema = optim.EMA(model, ema_decay) if ema_decay else None
    opt = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model))
    if checkpoint:
        fits(model, checkpoint["model"])
    if encode is not None or decode is not None:
        return answer(checkpoint, model, opt, ema, autocast)

    # ---- data ----
    arc = load(dataset, val_dataset, max_side, n_colours, n_train, n_val, crops, split_seed)
    stream = Stream(arc.train, batch_size * grad_accum, data_seed, colours, symmetry, group, n_colours)
    if not eval_only:
        settings.check_data(checkpoint, data_settings, arc.hash)
    print(f"{arc.source}\n{model.n_params():,} parameters; {n_codes} codes of {codebook_size}, "
          f"{n_codes * math.log2(codebook_size):.0f} bits a grid; {where.type} {str(precision).removeprefix('torch.')}")

    # ---- the run: on resume, what it is handed goes on where the checkpoint was saved ----
    noise = torch.Generator(where).manual_seed(seed)         # of codes and masks
    revival = torch.Generator().manual_seed(seed)            # which encoder outputs dead codes become
    loop = Loop(dict(step=0, evaluated=-1, best=[-1.0, -math.inf], best_step=0, pending=[], seconds=0.0,
                     logged_seconds=0.0, tokens=0, kl_weight=0.0,
                     chosen=torch.zeros(codebook_size * config.n_books, dtype=torch.int64, device=where)), scaler)
    run = Run(settings, checkpoint, model=model, optimizer=opt, ema=ema, scaler=scaler,
              generators=Generators(noise=noise, revival=revival), loop=loop)
    if compile:                                              # what costs; the choice between them stays as it is
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
    clock = Stopwatch(where, run)

    def validate(folder, count=None, pictures=True):
        """Figures and pictures of the weights to evaluate, as `evaluate` gives them."""
        clock.start()
        with optim.evaluated(opt, ema):
            now = scheduled(loop["step"], loop["seconds"])
            numbers, found = evaluate(model, canvas, arc.val, autocast, now, count)
            clock.lap("evaluation")
            if pictures:
                with optional("pictures are"):
                    draw_all(model, canvas, arc.val, found, folder, loop["step"], autocast)
                model.train()
        return numbers

    if eval_only:
        folder = checkpoint.path.parent
        report(validate(folder))
        print(f"pictures: {folder / 'samples'}")
        return

    limits.notes(settings, {"max_steps": max_steps}, checkpoint and checkpoint["settings"])
    with run:
        bar, saved = run.bar(max_steps, loop["step"]), None  # on resume too: a stop comes before what is due
        if not checkpoint:
            if codebook_init == "kmeans" and estimator not in FIXED:
                fit_codebook(model, ema, canvas, stream, autocast, revival)
            run.save("last.pt", loop["step"])                # at once: a full disk shows, a kill leaves what to resume
        warn_of_passes()

        while not run.stop:
            # ---- validate and save: before the step, so that a run that stops here does on resume what was due ----
            step = loop["step"]
            if (step % eval_interval == 0 or run.ended(loop)) and loop["evaluated"] < step:
                loop.flush()
                loop["evaluated"] = step
                numbers = validate(run.dir, eval_grids)
                run.log(step=step, split="val", **numbers)
                bar.note(f"step {step}: {in_words(numbers)}")
                score = [numbers["exact"], -numbers["nats"]]
                if score > loop["best"]:
                    loop.update(best=score, best_step=step)
                    run.save("best.pt", step)
            if saved != step and step % save_interval == 0:
                run.save("last.pt", step, keep=keep_last)
                saved = step
            if run.ended(loop):
                break

            # ---- one optimiser step ----
            began = time.perf_counter()
            now = scheduled(step, loop["seconds"])
            if kl_target is not None:                        # a weight that rises while the KL is above its target
                now["kl_weight"] = loop["kl_weight"]
            rate = optim.set_rate(opt, settings, step, loop["seconds"])
            row, outputs, chosen = {}, [], []
            clock.start()
            cells, all_shapes = stream.at(step)
            loop["tokens"] += int(all_shapes.prod(1).sum())
            all_tokens, all_shapes = onto(where, canvas.tokens(cells)), onto(where, all_shapes)
            mean_cells, n_tokens = all_shapes.prod(1).float().mean(), (all_tokens != canvas.pad).sum()
            for tokens, shapes in zip(all_tokens.split(batch_size), all_shapes.split(batch_size)):
                seen = tokens
                if canvas.mask is not None:
                    seen, share = masked(tokens, canvas, now["mask_rate"], noise)
                    row["masked"] = row.get("masked", 0.0) + share * ((tokens != canvas.pad).sum() / n_tokens)
                clock.lap("data")
                with autocast:
                    z = model.encode(seen, shapes)
                    how = {name: now[name] for name in ("tau", "noise", "hardness") if name in now}
                    found = model.codebook(z, estimator, generator=noise, **how)
                    loss, parts = objective(model, found, tokens, shapes, now, mean_cells)
                clock.lap("forward")
                scaler.scale(loss / grad_accum).backward()
                clock.lap("backward")
                for name, value in parts.items():
                    row[name] = row.get(name, 0.0) + value / grad_accum
                outputs.append(found.z.detach().flatten(0, 1))
                chosen.append(found.codes.flatten())
            row["grad_norm"] = optim.take_step(opt, scaler, model.parameters(), grad_clip, ema)
            outputs, chosen = torch.cat(outputs), torch.cat(chosen)
            if estimator == "vq":
                model.codebook.follow(outputs, chosen)
            clock.lap("optimiser")
            if kl_target is not None:                        # the same tensor also goes to the log
                loop["kl_weight"] = next_kl_weight(loop["kl_weight"], float(row["kl"]))
            loop.add(row)
            step = loop["step"] = step + 1
            revive(model, loop, outputs, chosen, revival)

            # ---- log ----
            rows, elapsed = loop.lap(began, step % log_interval == 0)
            if rows:                                         # not all alike: a weight of 0 leaves its part out
                found = means(rows)
                run.log(step=step, split="train", **found, lr=rate, **now, tokens_per_s=loop["tokens"] / elapsed,
                        grids_per_s=len(rows) * batch_size * grad_accum / elapsed, seconds=loop["seconds"],
                        **({"revived": loop.get("revived", 0)} if reset_interval else {}))
                loop["tokens"] = 0
                bar.update(step, f"loss {found['loss']:.4f}, exact {found['exact']:.3f}")

        # ---- the end ----
        bar.close()
        if saved != loop["step"]:
            run.save("last.pt", loop["step"])
        run.summary(step=loop["step"], hash=arc.hash, parameters=model.n_params(), best_exact=loop["best"][0],
                    best_step=loop["best_step"], seconds_training=loop["seconds"])
        if not run.stop:
            numbers = validate(run.dir, pictures=loop["evaluated"] != loop["step"])
            run.log(step=loop["step"], split="val", final=True, **numbers)
            run.summary(**{f"val_{name}": value for name, value in numbers.items()})
            report(numbers)
        run.spent(clock)
        print(f"{'stopped' if run.stop else run.ended(loop)} at step {loop['step']}, {loop['seconds']:.0f}s: {run.dir}")


def in_words(numbers):
    """The line of a validation."""
    gap = f", soft-hard gap {100 * numbers['soft_hard_gap']:+.1f} points" if "soft_hard_gap" in numbers else ""
    return (f"exact {numbers['exact']:.4f}, cells {numbers['accuracy']:.4f}, shapes {numbers['shape_accuracy']:.4f}, "
            f"usage {numbers['usage']:.0%}, perplexity {numbers['perplexity']:.1f}{gap}")


def report(numbers):
    """Prints what the last evaluation found."""
    print(f"{numbers['grids']:,} grids that were never seen: {in_words(numbers)}")
    print(f"  {numbers['bits']:.0f} bits a grid, of which the codes' entropies use {numbers['code_bits']:.0f}; "
          f"{numbers['nats'] / math.log(2):.2f} bits are missing; best single colour: cells {numbers['floor']:.4f}")
    larger = f", of which {numbers['larger_exact']:.4f} are exact" if "larger_exact" in numbers else ""
    print(f"  raw cells are {numbers['raw_bits']:.0f} bits on average; {numbers['larger_grids']:,} grids are larger "
          f"than their codes{larger}")
    if "mi" in numbers:
        print("  KL {kl:.1f} nats = MI {mi:.2f} (of at most {mi_ceiling:.2f}) + TC {tc:.1f} + dimension-wise "
              "{dwkl:.1f} (all over the first 1,000)".format(**numbers))
    if "nmi" in numbers:
        print("  positions share {nmi:.3f} of their information ({nmi_floor:.3f} by chance)".format(**numbers))
    if "pairs" in numbers:
        print("  codes that differ: {pair_difference:.3f} between input and output of {pairs} pairs, "
              "{random_pair_difference:.3f} between strangers".format(**numbers))
    for name in [name.removeprefix("gap_") for name in numbers if name.startswith("gap_")]:
        print(f"  {name}: one position knows {numbers[f'information_{name}']:.3f} of it "
              f"({numbers[f'chance_{name}']:.3f} by chance), {numbers[f'gap_{name}']:.3f} more than the next")


if __name__ == "__main__":
    main()
