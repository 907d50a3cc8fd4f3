"""Two transformers learn to multiply, side by side on the same batches: one sees every digit, one a few latent vectors.

    python train_mult.py --preset cpu                       # two digits by two, both models: minutes on two cores
    python train_mult.py --preset two_digits                # the same, until pairs never seen are right
    python train_mult.py --preset three_digits              # 100 x 100 to 999 x 999: 35 minutes of one core
    python train_mult.py --preset cpu --resume              # goes on exactly where the newest run stopped
    python train_mult.py --resume --eval_only               # exact match on held-out pairs, and where errors fall
    python train_mult.py --resume --ask "12*34"             # each model's digits, and the truth
    python train_mult.py -h                                 # every setting

`simple` is an encoder-decoder (Vaswani et al. 2017); `latent` is the same with a bottleneck: n_latent learned queries
read the encoder's states, and the decoder sees the problem through them only (after Perceiver, Jaegle et al. 2021).
`prefix`, on request (--models simple,latent,prefix), is one stack of as many layers over problem and answer in a row.
By default numbers stand least significant digit first and the answer comes without any step between; the presets also
train a head on the running sums of long multiplication, which is never asked for an answer. Pairs are held out
unordered: where 12 x 34 is, 34 x 12 is too. To expect of three_digits: exact match 0.999 on these (bfloat16, a CPU).
Figures: docs/multiplication.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import copy
import math
import re
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.multiplication import EQUALS, SYMBOLS, Notation, Problems, Stream, held_out, numbers, of_length
from kernels import cross_entropy
from model import TransformerConfig, fused_rows, parameter_roles
from models.encoder_decoder import EncoderDecoder, LatentTransformer, PrefixDecoder
from nanolab import limits, optim
from nanolab.run import (Generators, Loop, Run, Stopwatch, UserError, as_user_error, begin, command, mixed_precision,
                         onto, put_back, resolve_device, restoring, resumed, seed_everything)
from nanolab.settings import shown

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
eval_only = False          # with resume: evaluate on all held-out examples, train nothing, write nothing
ask = None                 # with resume: problems to solve, as "12*34", several with commas
seed = 1337                # [>= 0] initialisation, dropout and coins of teacher forcing
data_seed = 1337           # [>= 0] the order of the examples
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: 16 bits on cuda, else float32
compile = False            # torch.compile
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it

# --- Data ---
min_digits = 3             # [>= 1, <= 8] of the operands
max_digits = 3             # [>= 1, <= 8] of the operands
n_examples = 1_000_000     # [>= 1] training examples; past the 810,000 ordered pairs of three digits some come twice
short_share = 0.0          # [>= 0.0, <= 1.0] of the training examples, with operands of 1 to max_digits digits instead
val_fraction = 0.05        # [> 0.0, < 1.0] of all unordered pairs, held out
val_examples = 10_000      # [>= 1] held-out ordered pairs for the final evaluation
split_seed = 0             # [>= 0] which pairs are held out
format = "reversed"        # [plain, reversed, padded, trace] 123*456 as 123*456, 321*654, with zeros, with carries
batch_size = 256           # [>= 1] problems per forward pass
grad_accum = 1             # [>= 1] forward passes per optimiser step

# --- Models ---
models = "simple,latent"   # which to train, with commas: simple, latent, prefix
n_latent = 8               # [>= 1, with models latent] vectors between encoder and decoder
n_read = 1                 # [>= 1, <= 1000, with models latent] layers in which they read the encoder's states
n_layer = 2                # [>= 1, <= 1000] layers of the encoder, and of the decoder; prefix: half of its layers
n_head = 4                 # [>= 1] attention heads
n_embd = 128               # [>= 1] width
ff_mult = 4.0              # [> 0.0] width of the feed-forward over n_embd
dropout = 0.0              # [>= 0.0, < 1.0] probability: attention, branches
norm = "rms"               # [layer, rms, dyt] normalisation, before each branch
norm_gain = False          # learned gain in the norms
bias = False               # biases in linear layers and LayerNorm
positions = "learned"      # [learned, rope, alibi, none] where a token stands
activation = "gelu"        # [gelu, relu, relu2, silu, swiglu, geglu]
init = "gpt2"              # [gpt2, normal, xavier, truncated, zero] gpt2: embeddings and positions of one size
qk_norm = True             # RMSNorm on queries and keys
kernels = "torch"          # [torch, triton] triton: fused operations of kernels.py; not compared with --compile yet

# --- Losses ---
sequence_weight = 0.0      # [>= 0.0] a wrong answer weighs 1 + this, a right one 1
sum_head = "none"          # [none, classes, value] in training also name, or regress, the sums of long multiplication
sum_weight = 1.0           # [>= 0.0, with sum_head] of that head's loss
forcing = "none"           # [none, linear, exponential, inverse_sigmoid] scheduled sampling; none: always true tokens
forcing_start = 0          # [>= 0, with forcing] steps before the probability of a true token starts to fall
forcing_k = None           # [none, > 0.0, with forcing] none: linear 1, exponential 0.9998, inverse_sigmoid 500
forcing_slope = 1e-4       # [>= 0.0, with forcing linear] fall per step
forcing_min = 0.0          # [>= 0.0, <= 1.0, with forcing] the probability falls no further
stability_window = 0       # [>= 0, with forcing] evaluations whose loss must agree before it falls; 0: it falls
stability_eps = 0.02       # [> 0.0, with stability_window] nats: so closely

# --- Optimisation ---
max_steps = 20_000         # [none, >= 0] optimiser steps of each model in all, resumes included; none: until stopped
patience = None            # [none, >= 1] a model rests after so many validations without a better one
optimizer = "muon"         # [sgd, adam, adamw, muon, schedule_free] muon: hidden matrices, the rest by adamw
lr = 2e-3                  # [> 0.0] peak learning rate
muon_lr = 0.02             # [> 0.0, with optimizer muon] peak learning rate of the matrices
schedule = "wsd"           # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 50          # [>= 0] steps
decay_fraction = 0.5       # [> 0.0, <= 1.0, with schedule wsd] share of max_steps in which the rate falls linearly
min_lr_scale = 0.02        # [>= 0.0, <= 1.0, with schedule cosine/wsd] the last rate over the peak
betas = (0.9, 0.98)        # [>= 0.0, < 1.0, not with optimizer sgd]
momentum = 0.9             # [>= 0.0, < 1.0, with optimizer sgd]
weight_decay = 0.1         # [>= 0.0] on matrices only
grad_clip = 1.0            # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.0            # [>= 0.0, < 1.0] running average of the weights, evaluated in their place; 0: none

# --- Evaluation and logging ---
eval_interval = 250        # [>= 1] steps between validations
eval_examples = 2000       # [>= 1] how many held-out, and how many training examples
eval_batch_size = 1000     # [>= 1] examples at once; changes the speed, not the result
save_interval = 500        # [>= 1] steps between checkpoints
keep_last = 0              # [>= 0] numbered checkpoints to keep beside last.pt and best_MODEL.pt
log_interval = 10          # [>= 1] steps between lines of metrics

# Flags all the same: the commented fields of these classes.
FURTHER = {"the optimiser": "nanolab/optim.py:Settings but warmup_peak ess hess_init clip_radius decay_params",
           "the run": "nanolab/settings.py:Common"}

presets = {
    "cpu": dict(min_digits=2, max_digits=2, val_fraction=0.1, max_steps=1000, format="padded", activation="swiglu",
                short_share=0.3, sum_head="value"),
    "two_digits": dict(min_digits=2, max_digits=2, val_fraction=0.1, max_steps=4000, format="padded",
                       activation="swiglu", short_share=0.3, sum_head="value", dtype="bfloat16"),
    "three_digits": dict(max_steps=10_000, eval_interval=500, val_fraction=0.03, activation="swiglu", short_share=0.3,
                         sum_head="classes", dtype="bfloat16"),
}

# Names that are also understood.
aliases = {"d_model": "n_embd", "num_layers": "n_layer", "num_heads": "n_head", "num_latent": "n_latent",
           "save_every": "save_interval", "eval_every": "eval_interval", "learning_rate": "lr"}

# What --debug sets, unless a flag says otherwise.
debug_settings = dict(min_digits=1, max_digits=2, n_examples=1000, val_examples=100, n_layer=1, n_head=2, n_embd=32,
                      batch_size=16, max_steps=20, warmup_steps=2, eval_interval=10, eval_examples=50,
                      save_interval=10, log_interval=1, deterministic=True)

# These make the shape of the weights, the state beside them, or what is held out: on resume the checkpoint's hold.
architecture = (
    "n_latent", "n_read", "n_layer", "n_head", "n_embd", "ff_mult", "norm", "norm_gain", "bias", "positions",
    "activation", "qk_norm", "min_digits", "max_digits", "n_examples", "short_share", "val_fraction", "split_seed",
    "format", "optimizer", "sum_head")

KINDS = ("simple", "latent", "prefix")
SCHEDULED = {"linear": 1.0, "exponential": 0.9998, "inverse_sigmoid": 500.0}  # forcing: k where none is given


def check(settings):
    """Settings that cannot go together: UserError with one sentence. Returns (names of models, Notation, the models'
    configuration)."""
    names = [name.strip() for name in models.split(",")]
    for name in names:
        if name not in KINDS or names.count(name) > 1:
            raise UserError(f"--models {shown(models)}: must be of {', '.join(KINDS)}, each once, with commas between")
    if n_embd % n_head:
        raise UserError(f"n_head {n_head} does not divide n_embd {n_embd}")
    if min_digits > max_digits:
        raise UserError(f"min_digits {min_digits} is more than max_digits {max_digits}")
    if forcing_k and {"linear": forcing_k > 1, "exponential": forcing_k >= 1, "inverse_sigmoid": forcing_k < 1,
                      "none": False}[forcing]:
        raise UserError(f"forcing_k {forcing_k}: linear is at most 1, exponential below 1, inverse_sigmoid at least 1")
    if ask is not None:
        problems_asked()
    notation = Notation(format, max_digits)
    with as_user_error():
        config = TransformerConfig.from_settings({
            **settings, "vocab_size": len(SYMBOLS), "block_size": max(notation.source_length, notation.answer_length)})
        optim.check(settings)
    limits.weigh(lambda: [Solver(name, config, sums_named(notation)) for name in names], device)
    limits.fits(limits.kept(batch_size, notation.answer_length, n_embd, n_layer),
                f"a batch_size of {batch_size} problems", device)
    limits.fits(32 * n_examples, f"n_examples {n_examples}")
    if max_digits > 3:                                       # of fewer digits there are not more pairs than can be kept
        limits.fits(32 * val_examples, f"val_examples {val_examples}")
    return names, notation, config


def sums_named(notation):
    """Rows of the head for running sums; 0: no head."""
    return {"none": 0, "value": 1, "classes": notation.n_sums}[sum_head]


def problems_asked():
    """The setting `ask` as [(a, b)]. UserError: not written as 12*34."""
    found = [re.fullmatch(r"\s*(\d+)\s*[*x]\s*(\d+)\s*", word) for word in ask.split(",")]
    if None in found:
        raise UserError(f"--ask {shown(ask)}: must be two numbers with a * between them, as 12*34, or several with "
                        "commas")
    return [tuple(map(int, match.groups())) for match in found]


# --- Models and losses ---

class Solver(nn.Module):
    """One of the models; n_sums: rows of a head on its decoder's last states, for the running sums (0: no head).

    What has no gradient: that head with sum_weight 0; with n_latent 1 the decoder's queries for one vector to look at.
    """

    def __init__(self, kind, config, n_sums=0):
        super().__init__()
        if kind == "prefix":             # as many layers in all, over problem and answer in a row
            self.body = PrefixDecoder(replace(config, n_layer=2 * config.n_layer, block_size=2 * config.block_size))
        else:
            self.body = EncoderDecoder(config) if kind == "simple" else LatentTransformer(config, n_latent, n_read)
        self.roles, self.sum_head = {}, None
        if n_sums:
            self.sum_head = nn.Parameter(torch.empty(n_sums, config.n_embd).normal_(0, 0.02))
            self.roles = {"sum_head": "head"}

    def forward(self, source, x, padding=None):
        """source (B, S), x (B, T) int64 -> logits (B, T, V) and the head's output (B, T, n_sums) or None, float32.

        padding (B, S) bool, True after a source's end, or None where no row has any."""
        if padding is not None:
            padding = (~padding).sum(1)      # lengths, by which cross-attention has a kernel
        states = self.body.states(x, self.body.encode(source, padding), padding)
        sums = None if self.sum_head is None else F.linear(states, self.sum_head).float()
        return self.body.classify(states), sums

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def sequence_loss(logits, targets, mask, weight=0.0, mean=None):
    """Cross-entropy in which a sequence with a wrong argmax anywhere weighs 1 + weight, a right one 1: (loss in nats,
    accuracy), scalars. logits (B, T, V), targets (B, T) int64, mask (B, T) bool, False on padding.

    c_b = 1 where every unmasked argmax is the target, w_b = 1 + weight (1 - c_b), divided by its mean over the
    sequences that have an unmasked token, without gradient; loss = sum of w_b m_bt ce_bt over sum of m_bt. mean: that
    of w_b over all sequences of the step, where these are a part of them (None: they are all). accuracy: the mean of
    c_b over sequences with an unmasked token. Both are 0 where there is none. What stands at masked places, NaN too,
    changes nothing.
    """
    logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
    targets = targets.masked_fill(~mask, 0)
    ce = cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)  # (B, T)
    with torch.no_grad():
        correct = ((logits.argmax(-1) == targets) | ~mask).all(1).to(ce.dtype)  # (B,)
        present = mask.any(1).to(ce.dtype)
        n = present.sum().clamp(min=1)
        w = 1 + weight * (1 - correct)
        w = w * n / (w * present).sum().clamp(min=1) if mean is None else w / mean
    loss = (w.unsqueeze(1) * ce * mask).sum() / mask.sum().clamp(min=1)
    return loss, (correct * present).sum() / n


def sum_loss(sums, truth, mask, n_classes):
    """Auxiliary loss on running sums, a mean over `mask` (B, T) bool; truth (B, T) int64, from 0 to n_classes - 1.

    sums (B, T, n_classes): cross-entropy over all sums that there are, nats. sums (B, T, 1): squared error, in units of
    a tenth of the largest sum (Bai et al. 2025 regress).
    """
    if sums.size(2) > 1:
        error = cross_entropy(sums.flatten(0, 1), truth.flatten()).view(truth.shape)
    else:
        error = (sums.squeeze(2) - truth * (10 / n_classes)).square()
    return (error * mask).sum() / mask.sum().clamp(min=1)


def named_sums(sums, n_classes):
    """The running sums (B, T) int64 that a head's output (B, T, n_classes), or (B, T, 1), says."""
    return sums.argmax(2) if sums.size(2) > 1 else (sums.squeeze(2) * (n_classes / 10)).round().long()


class Forcing:
    """Scheduled sampling (Bengio et al. 2015): with which probability the decoder reads the true token in training.

    After i steps of the schedule: linear max(minimum, k - slope i), exponential k^i, inverse_sigmoid k / (k + e^(i/k)).
    i counts training steps from `start` on, but with a stability window W only those at which the last W validation
    losses differ by less than eps: else the probability holds.
    """

    def __init__(self, kind, start=0, k=None, slope=1e-4, minimum=0.0, window=0, eps=0.02, seed=0):
        self.kind, self.start, self.slope, self.minimum, self.eps = kind, start, slope, minimum, eps
        self.k = SCHEDULED.get(kind) if k is None else k
        self.steps, self.losses, self.generator = 0, deque(maxlen=window), torch.Generator().manual_seed(seed)

    def probability(self):
        """Of a true token, in [minimum, 1]; 1 before the schedule starts."""
        i, k = self.steps, self.k
        if self.kind == "none" or not i:
            return 1.0
        if self.kind == "inverse_sigmoid":
            return max(self.minimum, k / (k + math.exp(min(i / k, 700))))
        return max(self.minimum, k - self.slope * i if self.kind == "linear" else k ** i)

    def stepped(self, step):
        """After the step with which `step` are done."""
        losses = self.losses                                 # stable: the window is full, and they agree
        stable = len(losses) == losses.maxlen and max(losses, default=0) - min(losses, default=0) < self.eps
        if self.kind != "none" and step > self.start and stable:
            self.steps += 1

    def mix(self, targets, predicted):
        """(B, T) targets and predictions -> tokens to read, each the true one with `probability`."""
        true = torch.rand(targets.shape, generator=self.generator) < self.probability()
        return torch.where(onto(targets.device, true), targets, predicted)

    def state_dict(self):
        return {"steps": self.steps, "losses": list(self.losses), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.steps, self.losses = state["steps"], deque(state["losses"], self.losses.maxlen)
        self.generator.set_state(state["generator"])


class Learner:
    """One of the models, with all that is its own: optimiser, step, position in the stream, forcing, best, counts.

    Each has the state of the global generators for itself: trained alone or beside another, it learns the same.
    """

    def __init__(self, name, config, where, precision, settings):
        seed_everything(seed, deterministic)
        self.name, self.where, self.limit = name, where, settings["max_seconds"]
        self.model = Solver(name, config, sums_named(Notation(format, max_digits))).to(where)
        self.net = torch.compile(self.model) if compile else self.model
        self.opt = optim.build(settings, self.model.named_parameters(), parameter_roles(self.model),
                               fused_rows(self.model))
        _, self.scaler = mixed_precision(where, precision)
        self.ema = optim.EMA(self.model, ema_decay) if ema_decay else None
        self.forcing = Forcing(forcing, forcing_start, forcing_k, forcing_slope, forcing_min, stability_window,
                               stability_eps, seed)
        self.generators = Generators().state_dict()
        self.loop = Loop(dict(step=0, evaluated=-1, position=0, best=[-1.0, -math.inf], best_step=0, without_better=0,
                              history=[], pending=[], seconds=0.0, logged_seconds=0.0), self.scaler, name)
        self.parts = dict(model=self.model, ema=self.ema, optimizer=self.opt, scaler=self.scaler, generators=None,
                          forcing=self.forcing, loop=self.loop)

    @property
    def step(self):
        return self.loop["step"]

    def done(self):
        """Whether it has done its steps, or had its seconds."""
        return max_steps is not None and self.step >= max_steps or (
            self.limit is not None and self.loop["seconds"] >= self.limit)

    def rests(self):
        """Whether it is done, or was stopped early."""
        return self.done() or patience is not None and self.loop["without_better"] >= patience

    @contextmanager
    def own_randomness(self):
        """The global generators are this model's; only dropout asks them."""
        if not dropout:
            yield
            return
        others = Generators().state_dict()
        Generators().load_state_dict(self.generators)
        yield
        self.generators = Generators().state_dict()
        Generators().load_state_dict(others)

    def inputs(self, notation, source, padding, targets, autocast):
        """What the decoder reads in a training pass, (B, T): the true tokens, or, by the schedule, its own predictions
        among them (in two passes: Mihaylova & Martins 2019)."""
        x = notation.inputs(targets)
        if self.forcing.probability() < 1:
            with self.own_randomness(), autocast, torch.no_grad():
                predicted = self.net(source, x, padding)[0].argmax(-1)
            x = notation.inputs(self.forcing.mix(targets, predicted))
        return x

    def state_dict(self):
        """Everything that the rest of its training depends on."""
        with self.opt.averaged():        # what others read is what was evaluated; a copy, as it ends with this block
            states = {name: thing and thing.state_dict() for name, thing in self.parts.items()}
            return copy.deepcopy({**states, "generators": self.generators})

    def load_state_dict(self, state):
        put_back(state, self.parts)
        self.generators = state["generators"]

    def mean_weight(self, passes, read, autocast):
        """The mean over a step's sequences of what they weigh, by answering them all; None where one pass is a step."""
        if not sequence_weight or grad_accum == 1:
            return None
        with self.own_randomness(), autocast, torch.no_grad():
            right = [sequence_loss(self.net(source, x, padding)[0], targets, places > -2)[1]
                     for (_, _, source, padding, targets, places), x in zip(passes, read)]
        return 1 + sequence_weight * (1 - sum(right) / grad_accum)

    def losses(self, notation, some, x, n_tokens, n_digits, mean, autocast):
        """(objective, nats a token, accuracy) of a pass `some`, (a, b, source, padding, targets, places), of which the
        decoder reads x: the losses are its shares of the means over the step's n_tokens and n_digits."""
        a, b, source, padding, targets, places = some
        with self.own_randomness(), autocast:
            logits, sums = self.net(source, x, padding)
        objective, accuracy = sequence_loss(logits, targets, places > -2, sequence_weight, mean)
        nats = sequence_loss(logits.detach(), targets, places > -2)[0] if sequence_weight else objective
        share = (places > -2).sum() / n_tokens           # of the step's: means over all of them, not of means
        objective = objective * share
        if sums is not None:
            truth = notation.running_sums(a, b).gather(1, places.clamp(min=0))
            named = sum_loss(sums, truth, places >= 0, notation.n_sums)
            objective = objective + sum_weight * named * ((places >= 0).sum() / n_digits)
        return objective, nats.detach() * share, accuracy

    def evaluated(self, notation, autocast, *sides):
        """What `evaluate` finds on each of the sides, (N, 2) problems, by the weights to evaluate."""
        with optim.evaluated(self.opt, self.ema):
            return [evaluate(self.model, notation, pairs, autocast) for pairs in sides]


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, notation, pairs, autocast):
    """A model on problems (N, 2), teacher-forced: the argmax of every token is right exactly where greedy decoding is.

    Returns a dict: loss (nats per target), accuracy (all targets right), digit_loss and digit_accuracy ({power of ten:
    value}, each over the products that have this digit), examples; with a head for running sums sum_accuracy (of those
    of the digits); and for reports `predicted`, `targets`, `places` (N, T).
    """
    model.eval()
    rows = []
    for chunk in pairs.split(eval_batch_size):
        a, b = chunk.long().unbind(1)
        (source, padding), (targets, places) = notation.sources(a, b), notation.answers(a, b)
        with autocast:
            logits, sums = model(source, notation.inputs(targets), padding)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        row = dict(predicted=logits.argmax(-1), targets=targets, places=places, nats=nats)
        if sums is not None:
            truth = notation.running_sums(a, b).gather(1, places.clamp(min=0))
            row["sums"] = (named_sums(sums, notation.n_sums) == truth)[places >= 0]
        rows.append(row)
    model.train()
    found = {name: torch.cat([row[name] for row in rows]).cpu() for name in row}
    right, places, nats = found["predicted"] == found["targets"], found["places"], found.pop("nats").double()
    counted = places > -2
    digits = [k for k in range(notation.width) if (places == k).any()]
    sums = {"sum_accuracy": found.pop("sums").double().mean().item()} if "sums" in found else {}
    return {**found, "loss": nats[counted].mean().item(), "examples": len(pairs),
            "accuracy": (right | ~counted).all(1).double().mean().item(), **sums,
            "digit_accuracy": {k: right[places == k].double().mean().item() for k in digits},
            "digit_loss": {k: nats[places == k].mean().item() for k in digits}}


def numbers_of(found):
    """What of `evaluate` goes into metrics.jsonl."""
    return {**{name: found[name] for name in ("loss", "accuracy", "examples", "sum_accuracy") if name in found},
            **{f"{kind}_{k}": value for kind in ("digit_accuracy", "digit_loss") for k, value in found[kind].items()}}


@torch.no_grad()
def solve(model, notation, a, b):
    """a, b (B,) int64 -> the model's greedy answers (B, T) int64, one token after another through the cache."""
    model.eval()
    body = model.body
    source, padding = notation.sources(a, b)
    context, cache = body.encode(source, padding), body.new_cache(len(a), notation.answer_length)
    tokens = torch.full_like(a, EQUALS)[:, None]
    for _ in range(notation.answer_length):
        tokens = torch.cat((tokens, body.decode(tokens[:, -1:], context, cache, padding).argmax(-1)), 1)
    model.train()
    return tokens[:, 1:]


def report(found, notation, title):
    """Prints what `evaluate` found: exact match, every digit, where the first error falls, truth against prediction."""
    print(f"{title}: exact match {found['accuracy']:.4f} on {found['examples']:,} examples, loss {found['loss']:.4f}")
    right, places = found["predicted"] == found["targets"], found["places"]
    wrong = ~(right | (places == -2))
    failed = wrong.any(1)
    first = places.gather(1, wrong.int().argmax(1)[:, None])[failed]                 # errors, in writing order

    def share(k):
        return (first == k).sum().item() / max(1, len(first))
    print("  digit      accuracy   loss    first error here")
    for k in found["digit_accuracy"]:
        print(f"  10^{k:<8}{found['digit_accuracy'][k]:.4f}   {found['digit_loss'][k]:.4f}   {share(k):7.1%}")
    if (places == -1).any():
        print(f"  {'end' if not notation.fixed else 'carries':<11}{right[places == -1].double().mean():.4f}"
              f"{'':12}{share(-1):7.1%}")
    if not failed.any():
        return
    print("  wrong answers by how many digits are wrong: " + ", ".join(
        f"{n}: {count:,}" for n, count in enumerate(wrong[failed].sum(1).bincount().tolist()) if count))
    pairs = found["targets"][wrong & (places >= 0)], found["predicted"][wrong & (places >= 0)]
    table = (pairs[0] * len(SYMBOLS) + pairs[1]).bincount(minlength=10 * len(SYMBOLS)).view(10, -1)
    print("  wrong digits, truth (rows) against prediction:")
    columns = [token for token in range(len(SYMBOLS)) if token < 10 or table[:, token].any()]
    print("        " + "".join(f"{repr(SYMBOLS[token]) if token > 9 else token:>7}" for token in columns))
    for digit, row in enumerate(table.tolist()):
        print(f"  {digit:>4}  " + "".join(f"{row[token] or '.':>7}" for token in columns))


def answer_questions(learners, notation):
    """Prints each model's answer to the setting `ask`, and the truth. UserError: more digits than the models know."""
    for a, b in problems_asked():
        if max(a, b) >= 10 ** max_digits:
            raise UserError(f"--ask {a}*{b}: these models multiply numbers of at most {max_digits} digits")
    for a, b in problems_asked():
        side = "held out" if held_out(a, b, val_fraction, split_seed) else "on the training side"
        seen = "" if min(a, b) >= numbers(min_digits)[0] else "; shorter than the pairs it is evaluated on"
        print(f"{a} x {b} = {a * b} ({side}{seen})")
        for learner in learners:
            x, y = (torch.tensor([n], device=learner.where) for n in (a, b))
            with optim.evaluated(learner.opt, learner.ema):
                tokens = solve(learner.model, notation, x, y)
            answer = notation.numbers(tokens)[0]
            print(f"  {learner.name:<8}{'no number' if answer is None else answer} "
                  f"{'right' if answer == a * b else 'wrong'} (wrote {notation.text(tokens[0])}, step {learner.step})")


def last_words(run, learner, found, trained):
    """What `evaluate` found at the end, to the metrics, the summary and in print."""
    name, digits = learner.name, " ".join(f"{value:.3f}" for value in found["digit_accuracy"].values())
    run.log(step=learner.step, model=name, split="val", final=True, **numbers_of(found))
    run.summary(**{f"val_accuracy_{name}": found["accuracy"], f"val_loss_{name}": found["loss"],
                   f"train_accuracy_{name}": trained["accuracy"]})
    print(f"{name}: exact match {found['accuracy']:.4f} on {found['examples']:,} held-out examples, digits from 10^0: "
          f"{digits}; {trained['accuracy']:.4f} on training ones; {learner.step:,} steps, "
          f"{learner.loop['seconds']:.0f} s of training")


@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    checkpoint = resumed(settings, architecture, readers=("eval_only", "ask"))
    names, notation, config = check(settings)
    where, precision = resolve_device(device, dtype)
    autocast, _ = mixed_precision(where, precision)

    # ---- data ----
    problems = Problems(min_digits, max_digits, n_examples, val_fraction, val_examples, split_seed, short_share)
    stream, val = Stream(problems.train.to(where), data_seed), problems.val.to(where)
    seen = of_length(problems.train, min_digits)[:eval_examples].to(where)
    print(problems.describe())
    print(notation.example(*Stream(problems.train, data_seed).at(0, 1)[0].tolist()))

    # ---- models, optimisers, resume ----
    learners = [Learner(name, config, where, precision, settings) for name in names]
    known = checkpoint["models"] if checkpoint else {}
    others = {name: state for name, state in known.items() if name not in names}     # which are not trained now
    if checkpoint:
        with restoring(checkpoint.path):
            put_back(known, {learner.name: learner for learner in learners if learner.name in known})
    print("; ".join(f"{learner.name} {learner.model.n_params():,} parameters" for learner in learners) +
          f"; {where.type} {str(precision).removeprefix('torch.')}")

    if ask is not None:
        return answer_questions(learners, notation)
    if eval_only:
        for learner in learners:
            for title, found in zip(("training", "held-out"), learner.evaluated(notation, autocast, seen, val)):
                report(found, notation, f"{learner.name}, step {learner.step:,}, {title} pairs")
        return
    limits.notes(settings, {"max_steps": max_steps}, checkpoint and checkpoint["settings"])

    def save(name, keep=0):
        """A checkpoint of all models; its step is that of the furthest."""
        steps = {**{name: kept["loop"]["step"] for name, kept in others.items()}, **{m.name: m.step for m in learners}}
        run.save(name, max(steps.values()), keep, steps=steps)

    with Run(settings, checkpoint, models={**others, **{learner.name: learner for learner in learners}}) as run:
        bar, clock = run.bar(max_steps, min(learner.step for learner in learners)), Stopwatch(where, run)
        saved = None                                     # on resume too: a stop comes before what is due at its step
        if not checkpoint:
            save("last.pt")                              # at once: a full disk shows, and a kill leaves what to resume

        while not run.stop:
            # ---- validate and save: before the step, so that a run that stops here does on resume what was due ----
            for learner in learners:
                loop, step = learner.loop, learner.step
                planned = step % eval_interval == 0      # else it is the last step: its validation moves best, no more
                if loop["evaluated"] >= step or not (planned or learner.done()):
                    continue
                loop.flush()
                loop["evaluated"] = step
                clock.start()
                found, trained = learner.evaluated(notation, autocast, val[:eval_examples], seen)
                clock.lap("evaluation")
                if planned:
                    learner.forcing.losses.append(found["loss"])
                loop["history"] = [*loop["history"], [step, found["loss"], found["accuracy"]]]
                run.log(step=step, model=learner.name, split="val", **numbers_of(found),
                        train_accuracy=trained["accuracy"], train_loss=trained["loss"])
                digits = " ".join(f"{value:.2f}" for value in found["digit_accuracy"].values())
                bar.note(f"step {step}: {learner.name:<7}exact {found['accuracy']:.4f} held-out, "
                         f"{trained['accuracy']:.4f} training; loss {found['loss']:.4f}; digits from 10^0: {digits}")
                better = [found["accuracy"], -found["loss"]] > loop["best"]
                loop["without_better"] = 0 if better else loop["without_better"] + planned
                if better:
                    loop.update(best=[found["accuracy"], -found["loss"]], best_step=step)
                    save(f"best_{learner.name}.pt")
            steps = [learner.step for learner in learners]
            if saved != steps and any(step % save_interval == 0 for step in steps):
                save("last.pt", keep=keep_last)
                saved = steps
            active = [learner for learner in learners if not learner.rests()]
            if not active:
                break

            # ---- one optimiser step of each model that does not rest ----
            for learner in active:
                loop, began = learner.loop, time.perf_counter()
                rate = optim.set_rate(learner.opt, settings, learner.step, loop["seconds"])
                probability, total, exact = learner.forcing.probability(), 0.0, 0.0
                clock.start()
                problems_now = stream.at(loop["position"], batch_size * grad_accum)
                loop["position"] += len(problems_now)
                passes = [(a, b, *notation.sources(a, b), *notation.answers(a, b)) for a, b in (
                    some.unbind(1) for some in problems_now.split(batch_size))]
                n_tokens, n_digits = (sum((places > least).sum() for *_, places in passes) for least in (-2, -1))
                clock.lap("data")
                read = (learner.inputs(notation, *some[2:5], autocast) for some in passes)
                if sequence_weight and grad_accum > 1:
                    read = list(read)
                mean = learner.mean_weight(passes, read, autocast)
                for some, x in zip(passes, read):
                    objective, nats, accuracy = learner.losses(notation, some, x, n_tokens, n_digits, mean, autocast)
                    clock.lap("forward")
                    learner.scaler.scale(objective).backward()
                    clock.lap("backward")
                    total, exact = total + nats, exact + accuracy / grad_accum
                grad_norm = optim.take_step(learner.opt, learner.scaler, learner.model.parameters(), grad_clip,
                                            learner.ema)
                clock.lap("optimiser")
                loop.add(torch.stack([total, exact, grad_norm]))
                step = loop["step"] = loop["step"] + 1
                learner.forcing.stepped(step)

                # ---- log ----
                rows, elapsed = loop.lap(began, step % log_interval == 0)
                if rows:
                    mean = sum(loss for loss, _, _ in rows) / len(rows)
                    speed = len(rows) * batch_size * grad_accum / elapsed
                    run.log(step=step, model=learner.name, split="train", loss=mean, lr=rate,
                            accuracy=sum(value for _, value, _ in rows) / len(rows), forcing=probability,
                            grad_norm=rows[-1][2], examples_per_s=speed,
                            tokens_per_s=speed * notation.answer_length, seconds=loop["seconds"],
                            epoch=loop["position"] / len(stream.examples))
                    loop["shown"] = f"{learner.name} {step} loss {mean:.4f}"
            slowest = min(learner.step for learner in active)
            if slowest % log_interval == 0:
                bar.update(slowest, ", ".join(learner.loop.get("shown", learner.name) + " (rests)" * learner.rests()
                                              for learner in learners))

        # ---- the end ----
        bar.close()
        if saved != [learner.step for learner in learners]:
            save("last.pt")
        run.summary(step=max(learner.step for learner in learners), hash=problems.hash,
                    parameters=sum(learner.model.n_params() for learner in learners))
        for learner in learners:
            loop, name = learner.loop, learner.name
            run.summary(**{f"step_{name}": learner.step, f"best_accuracy_{name}": loop["best"][0],
                           f"best_step_{name}": loop["best_step"], f"seconds_{name}": loop["seconds"],
                           f"parameters_{name}": learner.model.n_params()})
            if not run.stop:
                clock.start()
                found, trained = learner.evaluated(notation, autocast, val, seen)
                clock.lap("evaluation")
                last_words(run, learner, found, trained)
        run.spent(clock)
        print(f"{'stopped' if run.stop else 'done'}: {run.dir}")


if __name__ == "__main__":
    main()
