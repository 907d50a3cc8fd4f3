"""From video to a world that one can play: frames as tokens, latent actions without labels, and the next frame.

    python train_worldmodel.py --preset cpu                    # every stage on the own grid world: minutes
    python train_worldmodel.py --stage actions                 # one stage: which of 8 codes led to each next frame
    python train_worldmodel.py --stage tokenizer               # another: frames as codes of one codebook
    python train_worldmodel.py --resume --stage dynamics       # goes on with the newest run: that stage is added
    python train_worldmodel.py --preset cpu --resume           # goes on exactly where the newest run stopped
    python train_worldmodel.py --preset cells                  # the dynamics alone, on the world's own cells
    python train_worldmodel.py --dataset donkeycar             # a real drive; or a file of your own: --dataset my.npz
    python train_worldmodel.py -h                              # every setting

A small Genie (Bruce et al. 2024, 2402.15391): a tokenizer (VQ-VAE over patches), a latent action model, and MaskGIT
over the next frame's tokens. The own world knows which action happened, so every score has its ceiling and its floors.
"""
import flags

flags.answer_help(__name__, __file__)  # before the seconds that the next lines take

import copy
import itertools
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import limits
import optim
from data.video import (ACTIONS, AGENT, BALL, Stream, World, caption, caption_length, load, paint, read_caption,
                        read_cells, unknown_words)
from discrete import code_statistics, fsq_levels, mutual_information
from experiment import (Generators, Loop, Run, Stopwatch, UserError, begin, command, optional, replacing,
                        resolve_device, resumed, seed_everything)
from model import fused_rows, parameter_roles
from networks import cross_entropy
from play import View, parse_actions, save_gif, save_strip, serve
from worldmodel import ActionModel, CausalDynamics, Dynamics, FirstFrame, Tokenizer, Writer, as_characters, to_patches

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
run_name = None            # name of the run's directory; none: date and time
out_dir = "runs"           # the run's directory is out_dir/train_worldmodel/run_name
tag = None                 # a word by which `python experiment.py clean --tag` finds the run
stage = "all"              # [all, tokenizer, actions, dynamics, text, frame] what to train; all: one after the other
resume = False             # [path] go on with run_name (none: the newest run); --resume PATH: from that checkpoint
eval_only = False          # with resume: figures of all stages that are trained, rollouts too; trains nothing
play = None                # a run's directory: its world in the browser, keys choose actions
port = 0                   # [>= 0, <= 65535] of that page on 127.0.0.1; 0: a free one
rollout = None             # a run's directory: one world after `actions`, as samples/rollout.png and .gif there
actions = "0,3,3,1,4,2"    # of that rollout, numbers with commas between
seed = 1337                # [>= 0] initialisation, masks, draws
data_seed = 1337           # [>= 0] which clips a batch holds
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: bfloat16 on cuda, else float32
compile = False            # torch.compile of the pass that training makes
kernels = "torch"          # [torch, triton] triton: fused operations of kernels.py; not compared with --compile yet
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it
debug = False              # tiny and short, no wandb, no tensorboard

# --- Data ---
dataset = "gridworld"      # gridworld, donkeycar, atari:Freeway (needs ale-py), or a file: frames (N, H, W, 3), actions
n_train = 4096             # [>= 1] gridworld, atari: training episodes
n_val = 256                # [>= 1] gridworld, atari: episodes to evaluate on, in worlds never seen
length = 24                # [>= 2] gridworld, atari: frames of an episode
side = 8                   # [>= 2] gridworld: cells
cell_px = 8                # [>= 4] gridworld: pixels of a cell
walls = 0.15               # [>= 0.0, < 0.9] gridworld: share of the cells
ball = True                # gridworld: with a ball that moves by itself
split_seed = 0             # [>= 0] which worlds there are
batch_size = 64            # [>= 1] clips per forward pass of the action model
grad_accum = 1             # [>= 1] forward passes per optimiser step

# --- Tokenizer ---
tokenizer = "spatial"      # [spatial, spatiotemporal] transformer: each frame by itself, or causal in time as well
patch = 8                  # [>= 1] pixels of a side of a patch, of tokens and of the action model
n_head = 4                 # [>= 1] attention heads of all transformers
codebook_size = 8          # [>= 2] codes to choose from
code_dim = 8               # [>= 1] width of a code
quantiser = "vq"           # [vq, fsq] codes as running means, or fixed levels
tokenizer_layers = 1       # [>= 1, <= 1000] in encoder and decoder each
tokenizer_embd = 64        # [>= 1] width
tokenizer_batch = 16       # [>= 1] clips
tokenizer_frames = 2       # [>= 2] frames of a clip, and those that a frame sees if spatiotemporal
tokenizer_steps = 1000     # [>= 0] optimiser steps
tokenizer_change = 10.0    # [>= 0.0] extra weight of pixels that differ between frames of a clip: movers are rare
reset_interval = 20        # [none, >= 1] steps after which codes that nothing chose become encoder outputs; none: never
reset_distance = 0.5       # [>= 0.0] only outputs at least so far (squared, of unit vectors) from every living code
reset_fraction = 0.5       # [>= 0.0, <= 1.0] share of the steps with resets

# --- Latent actions ---
action_model = "conv"      # [conv, transformer] of the encoder and the decoder
n_codes = 8                # [>= 2] latent actions
history = 2                # [>= 1] frames that explain the next one; with 1 what moves by itself hides the action
action_quantiser = "signs" # [signs, vq] signs of normalised numbers, or the nearest of n_codes vectors
difference = True          # conv: the encoder sees x_t+1 - x_t; False: x_t+1
action_layers = 3          # [>= 1, <= 1000] in encoder and decoder each
action_embd = 32           # [>= 1] width
action_steps = 1600        # [>= 0] optimiser steps
soft_fraction = 0.3        # [>= 0.0, <= 1.0] share of the steps with continuous codes
action_change = 20.0       # [>= 0.0] extra weight of pixels that change, at first
action_change_fraction = 0.7  # [> 0.0, <= 1.0] share of the steps in which that falls to none, a line

# --- Dynamics ---
dynamics = "maskgit"       # [maskgit, causal] hidden tokens all at once, in rounds; or one token after another
tokens = "tokenizer"       # [tokenizer, cells] of the tokenizer, or the grid world's own cells
action_source = "latent"   # [latent, true] actions that lead to each frame
action_input = "add"       # [add, prepend] to every token of the frame, or as one more token
streams = True             # true and corrupted frames side by side, all frames are targets; False: the last frame only
mask_rate = (0.5, 1.0)     # [>= 0.0, <= 1.0] share of a frame's tokens that are hidden: uniform between these
context = 6                # [>= 2] frames of a clip
window = 4                 # [none, >= 2] frames that a frame sees, its own too, trained and generated; none: all
dynamics_layers = 2        # [>= 1, <= 1000] layers
dynamics_embd = 64         # [>= 1] width
dynamics_batch = 16        # [>= 1] clips
dynamics_steps = 1000      # [>= 0] optimiser steps
dynamics_change = 10.0     # [>= 0.0] extra weight of tokens that change, at first
dynamics_change_fraction = 0.67  # [> 0.0, <= 1.0] share of the steps in which that falls to none, a line

# --- Words: text writes captions of worlds, frame draws what a caption says ---
text_layers = 2            # [>= 1, <= 1000] of the language model
text_embd = 64             # [>= 1] its width
text_batch = 32            # [>= 1] captions
text_steps = 600           # [>= 0] optimiser steps
frame_layers = 2           # [>= 1, <= 1000] of the encoder of captions, and of the transformer over the frame
frame_embd = 64            # [>= 1] their width
frame_batch = 32           # [>= 1] captions
frame_steps = 1500         # [>= 0] optimiser steps

# --- Generation ---
prompt = None              # a sentence that starts the rollout's world; write: one that the text model writes
decode_steps = 2           # [>= 1] rounds of MaskGIT for a frame; a world without chance needs no more
temperature = 0.0          # [>= 0.0] of the tokens drawn; 0: the likeliest
rollout_clips = 64         # [>= 1] clips of the final rollouts
log_cache = False          # print the cache after a rollout

# --- Optimisation ---
max_steps = None           # [none, >= 0] optimiser steps of each stage; none: the stage's own number
optimizer = "muon"         # [adam, adamw, muon] muon: matrices of transformers, the rest by adamw
lr = 2e-3                  # [> 0.0] peak learning rate
muon_lr = 0.02             # [> 0.0] peak learning rate of the matrices under muon
schedule = "cosine"        # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 50          # [>= 0] steps
decay_fraction = 0.5       # [> 0.0, <= 1.0] wsd: share of the steps in which the rate falls linearly
min_lr_scale = 0.05        # [>= 0.0, <= 1.0] cosine, wsd: the last rate over the peak
betas = (0.9, 0.99)        # [>= 0.0, < 1.0] adam, adamw
eps = 1e-8                 # [> 0.0] adam, adamw
muon_momentum = 0.95       # [>= 0.0, < 1.0] muon
weight_decay = 1e-4        # [>= 0.0] on matrices only
grad_clip = 1.0            # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.0            # [>= 0.0, < 1.0] running average of the weights, evaluated in their place; 0: none

# --- Evaluation and logging ---
eval_interval = 400        # [>= 1] steps between validations
eval_clips = 512           # [>= 1] of them, spread over the validation worlds
patience = None            # [none, >= 1] validations without a better one after which a stage ends; none: never
save_interval = 200        # [>= 1] steps between checkpoints
log_interval = 10          # [>= 1] steps between lines of metrics
wandb = "disabled"         # [disabled, offline, online]
tensorboard = False        # curves for TensorBoard in the run's directory

presets = {
    "cpu": dict(stage="all", action_steps=1000, dynamics_steps=400, text_steps=100, frame_steps=250),
    "cells": dict(stage="dynamics", tokens="cells", action_source="true"),
    "drive": dict(dataset="donkeycar", patch=4, codebook_size=256, reset_distance=0.05, tokenizer_change=0.0,
                  tokenizer_embd=96, tokenizer_batch=8, tokenizer_steps=700, action_change=0.0, action_steps=500,
                  dynamics_change=0.0, dynamics_batch=8, dynamics_steps=250, eval_interval=100),
}

aliases = {"d_model": "dynamics_embd", "n_actions": "n_codes", "learning_rate": "lr", "save_every": "save_interval",
           "eval_every": "eval_interval"}

debug_settings = dict(n_train=32, n_val=8, length=8, eval_clips=16, tokenizer_steps=8, action_steps=8,
                      dynamics_steps=8, text_steps=8, frame_steps=8, warmup_steps=2, eval_interval=4, save_interval=4,
                      log_interval=1, batch_size=8, tokenizer_batch=4, dynamics_batch=4, tokenizer_embd=16,
                      action_embd=8, dynamics_embd=16, text_embd=16, frame_embd=16)

STAGES = ("tokenizer", "actions", "dynamics", "text", "frame")

# These make the shape of the weights, or what a model is scored on: on resume the checkpoint's hold, of "all" always,
# of a stage once it has begun.
architecture = {
    "all": ("dataset", "n_train", "n_val", "length", "side", "cell_px", "walls", "ball", "split_seed", "patch",
            "n_head", "optimizer"),
    "tokenizer": ("tokenizer", "codebook_size", "code_dim", "quantiser", "tokenizer_layers", "tokenizer_embd",
                  "tokenizer_frames"),
    "actions": ("action_model", "n_codes", "history", "action_quantiser", "difference", "action_layers", "action_embd"),
    "dynamics": ("dynamics", "tokens", "action_source", "action_input", "context", "dynamics_layers", "dynamics_embd"),
    "text": ("text_layers", "text_embd"),
    "frame": ("tokens", "frame_layers", "frame_embd"),
}


def check(settings, video=None):
    """Settings that cannot go together, or not with the data: UserError with one sentence."""
    if tokens == "cells" and dataset != "gridworld":
        raise UserError(f"tokens cells are the grid world's own: {dataset} has none")
    if mask_rate[0] > mask_rate[1]:
        raise UserError(f"mask_rate {mask_rate[0]:g},{mask_rate[1]:g} begins above its end")
    if action_quantiser == "signs" and n_codes & (n_codes - 1):
        raise UserError(f"n_codes {n_codes}: signs make a power of two, 2, 4, 8, ...; --action_quantiser vq takes any")
    if action_model == "transformer" and not difference:
        raise UserError("no-difference goes with action_model conv: the transformer sees frames beside differences")
    axial = ["tokenizer_embd", "dynamics_embd", "frame_embd"] + ["action_embd"] * (action_model == "transformer")
    for name, unit in [(name, 4 * n_head) for name in axial] + [("text_embd", 2 * n_head)]:
        if globals()[name] % unit:
            raise UserError(f"{name} {globals()[name]}: {n_head} heads that turn by row and column need a multiple of "
                            f"{unit}" if unit == 4 * n_head else f"{name} {globals()[name]}: {n_head} heads that turn "
                            f"need a multiple of {unit}")
    if video is not None:
        if video.height % patch or video.width % patch:
            raise UserError(f"patch {patch} does not divide frames of {video.height} x {video.width}")
        if action_source == "true" and not video.n_actions:
            raise UserError(f"action_source true: {dataset} has no actions")
        pixels = 12 * video.height * video.width             # of a frame, float32
        for name, frames in (("batch_size", history + 1), ("dynamics_batch", context), ("frame_batch", 1),
                             ("tokenizer_batch", tokenizer_frames), ("text_batch", 1)):
            clips = settings[name]
            limits.fits(clips * max(pixels * frames, 8 * grad_accum), f"a {name} of {clips} clips", device)
        widest, deepest = (max(settings[name] for name in settings if name.endswith(end)) for end in (
            "_embd", "_layers"))
        if widest * max(widest * deepest, patch ** 2 * history, codebook_size, n_codes) > 1e7 or codebook_size > 1e7:
            for name in STAGES if stage == "all" and video.cell_px else STAGES[:3] if stage == "all" else (stage,):
                limits.weigh(lambda: build(name, video), device)    # which takes a second
        longest, held = max(context, history + 4, tokenizer_frames), min(video.train.length, video.val.length)
        if longest > held:
            raise UserError(f"clips of {longest} frames do not fit into episodes of {held}: take a smaller context, "
                            "history or tokenizer_frames")
    try:
        if quantiser == "fsq":
            fsq_levels(codebook_size)
        for name in STAGES:
            optim.factor(settings | {"max_steps": steps_of(name)}, 0)
    except ValueError as error:
        raise UserError(error)


def steps_of(name, settings=None):
    """Optimiser steps of a stage, by these settings or those of now."""
    settings = settings or globals()
    own = "action_steps" if name == "actions" else f"{name}_steps"
    return settings[own] if settings["max_steps"] is None else settings["max_steps"]


def is_over(name, loop):
    """Whether a stage whose training stands at `loop` ends there: it has its steps, or patience is at an end."""
    return loop["step"] >= steps_of(name) or patience is not None and loop["waited"] >= patience


def needs(name):
    """The stages that a stage reads."""
    if name in ("tokenizer", "actions", "text"):
        return ()
    if name == "frame":
        return ("tokenizer",) * (tokens == "tokenizer")
    return ("tokenizer",) * (tokens == "tokenizer") + ("actions",) * (action_source == "latent")


def falling(step, steps, first, fraction):
    """A weight that falls from `first` to none in a share of the steps, a line."""
    return first * max(0.0, 1 - step / (fraction * steps)) if steps else 0.0


# --- Models and losses ---

def build(name, video):
    """The untrained model of a stage. UserError: its sizes do not go together."""
    colours = None if video.palette is None else len(video.palette)
    try:
        if name == "tokenizer":
            return Tokenizer(video.height, video.width, patch, colours, codebook_size, code_dim, tokenizer_layers,
                             n_head, tokenizer_embd, tokenizer, quantiser, tokenizer_frames, kernels=kernels)
        if name == "actions":
            return ActionModel(video.height, video.width, patch, colours, history, n_codes, action_embd, action_layers,
                               action_model, action_quantiser, n_head, difference=difference, kernels=kernels)
        if name == "text":
            return Writer(caption_length(side), text_layers, n_head, text_embd, kernels=kernels)
        grid = (side, side) if tokens == "cells" else (video.height // patch, video.width // patch)
        size = 4 if tokens == "cells" else codebook_size
        if name == "frame":
            return FirstFrame(grid, size, frame_layers, n_head, frame_embd, caption_length(side), kernels=kernels)
        n_actions = n_codes if action_source == "latent" else video.n_actions
        if dynamics == "causal":
            return CausalDynamics(grid, size, n_actions, dynamics_layers, n_head, dynamics_embd, max(16, context),
                                  kernels=kernels)
        return Dynamics(grid, size, n_actions, dynamics_layers, n_head, dynamics_embd, action_input, max(16, context),
                        kernels=kernels)
    except ValueError as error:
        raise UserError(error)


def pixel_loss(written, frames, indices, weight=None):
    """Mean loss a pixel: nats of the palette's colours where there is a palette, else squared error of RGB in 0..1.

    written (..., H, W, P or 3); frames (..., H, W, 3) float; indices (..., H, W) int64 or None; weight (..., H, W).
    """
    if indices is not None:
        loss = cross_entropy(written.flatten(0, -2).float(), indices.flatten(), kernels)
    else:
        loss = (written.float() - frames).square().mean(-1).flatten()
    return loss.mean() if weight is None else (loss * weight.flatten()).sum() / weight.sum()


class Material:
    """Clips of one side of a Video on a device: frames as floats, palette indices, actions, tokens."""

    def __init__(self, clips, palette, where):
        self.clips, self.palette, self.where = clips, palette, where

    def frames(self, index, T):
        """(B, T, H, W, 3) float32 in 0..1."""
        return self.clips.frames(index, T).to(self.where).float() / 255

    def pictures(self, index, T):
        """(frames, indices (B, T, H, W) int64 or None)."""
        if self.palette is None:
            return self.frames(index, T), None
        indices = self.clips.indices(index, T).to(self.where).long()
        return (self.palette.to(self.where).float() / 255)[indices], indices


def as_frames(written, palette):
    """What a model wrote (..., P or 3) as RGB in 0..1: the likeliest colour of the palette, or clipped."""
    if palette is None:
        return written.float().clamp(0, 1)
    return (palette.to(written.device).float() / 255)[written.argmax(-1)]


def tokenizer_weight(frames, step):
    """What each pixel of clips (B, T, H, W, 3) weighs in `tokenizer_loss`, (B, T, H, W)."""
    moving = (frames != frames[:, :1]).any(-1).any(1, keepdim=True).expand(frames.shape[:-1])
    return 1 + tokenizer_change * moving


def tokenizer_loss(model, material, index, step, share=1.0):
    """(loss, parts) of reconstructing clips; parts has what the codebook chose, and of what. share: of the step's
    weights, those of this one of its `grad_accum` passes (`passes_of`); the losses of all add up to the step's."""
    frames, indices = material.pictures(index, tokenizer_frames)
    written, found = model(frames)
    loss = pixel_loss(written, frames, indices, tokenizer_weight(frames, step)) * share
    return loss + 0.25 * found.loss / grad_accum, dict(loss=loss.detach(), codes=found.codes.flatten(),
                                                       z=found.z.detach())


def actions_first():
    """The first frame of a clip that `actions_loss` has as a target."""
    return min(2, history) if action_model == "transformer" else history


def actions_weight(frames, step):
    """What each pixel of the frames from `actions_first` on weighs in `actions_loss`, (B, T - first, H, W)."""
    extra, first = falling(step, steps_of("actions"), action_change, action_change_fraction), actions_first()
    return 1 + extra * (frames[:, first:] != frames[:, first - 1:-1]).any(-1)


def actions_loss(model, material, index, step, share=1.0):
    """(loss, parts) of writing the last frame of each clip from those before and a code; the transformer writes every
    frame from the third on. share: as in `tokenizer_loss`.

    Pixels that change weigh more at first, since a model that copies is otherwise nearly right; but no longer at the
    end, since a weight that stays moves the likeliest colour and paints movers where there are none.
    Not linear in the batch with action_quantiser signs: what they are normalised by are the clips of one pass.
    """
    frames, indices = material.pictures(index, history + 1)
    soft, first = step < soft_fraction * steps_of("actions"), actions_first()
    if action_model == "transformer":
        written, found = model.every(frames, soft=soft)
        written = written[:, first - 1:]
    else:
        written, found = model(frames, soft=soft)
        written = written[:, None]
    target = None if indices is None else indices[:, first:]
    loss = pixel_loss(written, frames[:, first:], target, actions_weight(frames, step)) * share
    return loss + found.loss / grad_accum, dict(loss=loss.detach(), codes=found.codes, z=found.z.detach())


@torch.no_grad()
def tokens_of(models, material, index, T):
    """(B, T, N) int64: the clips' frames as the dynamics read them."""
    if tokens == "cells":
        return material.clips.cells(index, T).to(material.where).long().flatten(2)
    return models["tokenizer"].tokens(material.frames(index, T))


def tokens_and_actions(models, material, index, T):
    """(tokens (B, T, N), actions (B, T)): what the dynamics read of clips; the action that led to each frame."""
    found = tokens_of(models, material, index, T)
    with torch.no_grad():
        if action_source == "true":
            return found, F.pad(material.clips.actions(index, T).to(material.where), (1, 0), value=-1)
        return found, F.pad(latent_actions(models["actions"], material.frames(index, T)), (1, 0), value=-1)


def latent_actions(model, frames):
    """frames (B, T, H, W, 3) -> codes (B, T - 1) of the steps between them; before the first frame stands a copy of it,
    as often as the model's history asks."""
    frames = torch.cat((frames[:, :1].expand(-1, model.history - 1, -1, -1, -1), frames), 1)
    windows = [frames[:, t:t + model.history + 1] for t in range(frames.size(1) - model.history)]
    found = [model.quantiser(model.encode(window)).codes for window in windows]
    return torch.stack(found, 1) if found else torch.empty(len(frames), 0, dtype=torch.int64, device=frames.device)


def hide(truth, noise):
    """(..., N) bool: the tokens of each frame to be hidden, a share of them between the two of mask_rate."""
    low, high = mask_rate
    rate = low + (high - low) * torch.rand(*truth.shape[:-1], 1, generator=noise, device=truth.device)
    return torch.rand(truth.shape, generator=noise, device=truth.device) < rate


def dynamics_first():
    """The first frame of a clip of the dynamics that is a target."""
    return min(2, context - 1) if streams or dynamics == "causal" else context - 1


def dynamics_hidden(truth, noise):
    """(B, T, N) bool: the tokens of truth (B, T, N) that `dynamics_loss` asks for; causal: all from the first target
    on."""
    hidden = torch.ones_like(truth, dtype=torch.bool) if dynamics == "causal" else hide(truth, noise)
    hidden[:, :dynamics_first()] = False
    return hidden


def dynamics_loss(model, models, material, index, step, noise, share=1.0, read=None):
    """(loss, parts) of naming the hidden tokens of frames, given those before them and the actions.

    With `streams` all frames but the first two are targets, each seeing the true frames before it; else the last.
    share: as in `tokenizer_loss`. read: (tokens, actions, hidden) of the clips, where `passes_of` has them already."""
    truth, acts, hidden = read or (*tokens_and_actions(models, material, index, context), None)
    hidden = dynamics_hidden(truth, noise) if hidden is None else hidden
    acts = acts.masked_fill(acts < 0, model.n_actions)
    T, first = truth.size(1), dynamics_first()
    if dynamics == "causal":
        return weighted_nats(model(truth, acts, window=window)[:, first:], truth, hidden, first, step, share)
    corrupted = truth.masked_fill(hidden, model.mask)
    if streams:
        both = torch.cat((truth[:, :-1], corrupted[:, first:]), 1), torch.cat((acts[:, :-1], acts[:, first:]), 1)
        logits = model(*both, window=window, streams=(T - 1, first))[:, T - 1:]
    else:
        logits = model(corrupted, acts, window=window)[:, first:]
    return weighted_nats(logits, truth, hidden, first, step, share)


def dynamics_weight(truth, hidden, first, step):
    """What each token of the frames from `first` on weighs in `dynamics_loss`, (B, T - first, N)."""
    extra = falling(step, steps_of("dynamics"), dynamics_change, dynamics_change_fraction)
    return (1 + extra * (truth[:, first:] != truth[:, first - 1:-1])) * hidden[:, first:]


def weighted_nats(logits, truth, hidden, first, step, share=1.0):
    """(loss, parts): mean nats of the `hidden` tokens of frames from `first` on, those that change weighing more at
    first. logits (B, T - first, N, K); truth and hidden (B, T, N). share: as in `tokenizer_loss`."""
    weight = dynamics_weight(truth, hidden, first, step)
    nats = cross_entropy(logits.flatten(0, 2), truth[:, first:].flatten(), kernels)
    loss = (nats * weight.flatten()).sum() / weight.sum().clamp(min=1) * share
    return loss, dict(loss=loss.detach())


def captions(material, index):
    """Captions of the clips' first frames, (B, S) int64."""
    return as_characters([caption(cells) for cells in material.clips.cells(index, 1)[:, 0].numpy()]).to(material.where)


def frame_hidden(truth, noise):
    """(B, N) bool: the tokens of truth (B, N) that `frame_loss` asks for."""
    hidden = hide(truth, noise)
    hidden[:, 0] |= ~hidden.any(1)                            # a row with nothing to name would have no mean
    return hidden


def frame_loss(model, models, material, index, noise, share=1.0, read=None):
    """(loss, parts) of naming the hidden tokens of a frame that a caption describes. share, and read (tokens, hidden):
    as in `dynamics_loss`."""
    truth, hidden = read or (tokens_of(models, material, index, 1)[:, 0], None)
    hidden = frame_hidden(truth, noise) if hidden is None else hidden
    logits = model(truth.masked_fill(hidden, model.codebook_size), model.read(captions(material, index)))
    loss = cross_entropy(logits[hidden], truth[hidden], kernels, "mean") * share
    return loss, dict(loss=loss.detach())


@torch.no_grad()
def passes_of(name, models, material, parts, step, noise):
    """One step's passes over the clips of `parts`, a list of (B,): [(what the pass's loss reads already or None, its
    share of the step's weights)]. A step's loss is a sum over its passes over a sum of their weights, so that it does
    not depend on how they divide it: so are masks, which are drawn for all clips at once, as one pass draws them."""
    if len(parts) == 1:
        return [(None, 1.0)]
    reads, sizes = [None] * len(parts), list(map(len, parts))
    if name == "tokenizer":
        weights = [tokenizer_weight(material.frames(index, tokenizer_frames), step).sum() for index in parts]
    elif name == "actions":
        weights = [actions_weight(material.frames(index, history + 1), step).sum() for index in parts]
    elif name == "text":                                      # characters, and the end of each caption
        weights = [(captions(material, index) != 0).sum() + len(index) for index in parts]
    elif name == "frame":
        truth = [tokens_of(models, material, index, 1)[:, 0] for index in parts]
        reads = list(zip(truth, frame_hidden(torch.cat(truth), noise).split(sizes)))
        weights = [hidden.sum() for _, hidden in reads]
    else:
        truth, acts = zip(*(tokens_and_actions(models, material, index, context) for index in parts))
        reads = list(zip(truth, acts, dynamics_hidden(torch.cat(truth), noise).split(sizes)))
        weights = [dynamics_weight(tokens, hidden, dynamics_first(), step).sum() for tokens, _, hidden in reads]
    total = sum(weights).clamp(min=1)
    return [(read, weight / total) for read, weight in zip(reads, weights)]


def on_cpu(value):
    """A copy of nested dicts and lists of tensors and plain values, on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def compiled(model, name):
    """The model with the pass that training makes compiled; weights are shared, evaluation and generation stay as they
    are: the lengths of a cache change from call to call."""
    used = "nats" if name == "text" else "every" if name == "actions" and action_model == "transformer" else "forward"
    fast = copy.copy(model)
    setattr(fast, used, torch.compile(getattr(model, used)))
    return fast


# --- Evaluation ---

def over(a, b):
    """a / b; not a number where b is 0: a mean over nothing, or a share of nothing, is no figure."""
    return a / b if b else math.nan


def psnr(error):
    """Decibels of a mean squared error of values in 0..1: of many frames that of their pooled error. 100 at most; not a
    number of one that is none."""
    return math.nan if math.isnan(error) else -10 * math.log10(max(error, 1e-10))


def frame_psnrs(square):
    """The sum of the frames' own PSNRs: square (..., H, W, 3), squared errors."""
    return (-10 * square.flatten(-3).mean(-1).double().clamp(min=1e-10).log10()).sum().item()


def ssim(a, b, size=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of frames (B, H, W, 3) in 0..1: mean over frames, colours and windows, a
    Gaussian of 11 pixels (fewer where a side has fewer), without padding."""
    size = min(size, *a.shape[1:3])
    place = torch.arange(size, device=a.device) - (size - 1) / 2
    line = torch.exp(-place.float().square() / (2 * sigma ** 2))
    line = line / line.sum()
    a, b = (x.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1) for x in (a, b))   # (3 B, 1, H, W)

    def mean(x):
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))).mean().item()


def spread(clips, T, count):
    """(count,) int64: clips of T frames, evenly over all."""
    n = clips.count(T)
    return torch.linspace(0, n - 1, min(count, n), dtype=torch.float64).long()


@torch.no_grad()
def evaluate_tokenizer(model, material, palette):
    """Figures of held-out clips. psnr, ssim: of whole frames; frame_psnr: mean over frames of each one's; changed_psnr:
    of patches that differ from the frame before, changed_floor: of copying that frame there, both not a number where
    none does; usage, perplexity: of the codebook over all clips."""
    T = max(2, tokenizer_frames)
    error = changed = floor = count = losses = likeness = each = n = 0.0
    codes = []
    for index in spread(material.clips, T, eval_clips).split(64):
        frames, indices = material.pictures(index, T)
        written, found = model(frames, None)
        losses += pixel_loss(written, frames, indices).item() * len(index)
        seen = as_frames(written, palette)
        square = (seen - frames).square()
        error += square.mean().item() * len(index)
        each += frame_psnrs(square)
        likeness += ssim(seen.flatten(0, 1), frames.flatten(0, 1)) * len(index)
        truth, copied = to_patches(frames, patch)[:, 1:], to_patches(frames, patch)[:, :-1]
        moved = (truth != copied).any(-1)                                        # (B, T - 1, N)
        changed += to_patches(square, patch)[:, 1:].mean(-1)[moved].sum().item()
        floor += (truth - copied).square().mean(-1)[moved].sum().item()
        count += moved.sum().item()
        codes.append(found.codes.cpu())
        n += len(index)
    used = code_statistics(torch.cat(codes).view(-1, 1), codebook_size)
    return dict(loss=losses / n, psnr=psnr(error / n), frame_psnr=each / (n * T), ssim=likeness / n,
                changed_psnr=psnr(over(changed, count)), changed_floor=psnr(over(floor, count)), usage=used["usage"],
                perplexity=used["perplexity"], score=-losses / n)


def majority_map(codes, labels, n_codes, n_labels):
    """(n_codes,) int64: the label that came most often with each code."""
    return (codes * n_labels + labels).bincount(minlength=n_codes * n_labels).view(n_codes, n_labels).argmax(1)


@torch.no_grad()
def evaluate_actions(model, material, palette, n_actions):
    """Figures of a latent action model on held-out clips; true actions are for scoring only.

    information: I(code; effective action) / H(effective action); majority: accuracy of naming the effective action by
    a map from codes that was counted on one half of the clips, on the other; majority_200: counted on 200 steps;
    moved_information: what "moved or not" alone would score. psnr_1, psnr_4: of 1 and 4 frames written after each other
    from the codes inferred; frame_psnr_1, frame_psnr_4: means over frames of each one's; copy_1, copy_4: of the last
    true frame instead; dpsnr_1, dpsnr_4: psnr less that of codes inferred in other clips (of the same 64; a clip alone
    has no other and is left out), dpsnr_random_4: less that of uniform codes. ceiling_*: what n_codes codes could
    reach. consistency, lost: see `consistency_of`. What is over nothing is not a number: majority of one clip,
    information where all actions are the same.
    """
    training = model.training
    model.eval()
    T, generator = model.history + 4, torch.Generator().manual_seed(0)
    sums, codes, labels, losses, n, paired = {}, [], [], 0.0, 0, 0
    for index in spread(material.clips, T, eval_clips).split(64):
        frames, indices = material.pictures(index, T)
        windows = [frames[:, t:t + model.history + 1] for t in range(4)]
        found = torch.stack([model.quantiser(model.encode(window)).codes for window in windows], 1)  # (B, 4)
        written, _ = model(windows[0])
        last = None if indices is None else indices[:, model.history]
        losses += pixel_loss(written, windows[0][:, -1], last).item() * len(index)
        chosen = {"inferred": found, "permuted": found.roll(1, 0),
                  "random": torch.randint(n_codes, found.shape, generator=generator).to(found.device)}
        for name, plan in chosen.items():
            past = frames[:, :model.history]
            for t in range(4):
                out = as_frames(model.predict(past, model.quantiser.look_up(plan[:, t])), palette)
                past = torch.cat((past[:, 1:], out[:, None]), 1)
                square = (out - frames[:, model.history + t]).square()
                error = square.mean().item() * len(index)
                copied = (frames[:, model.history - 1] - frames[:, model.history + t]).square().mean().item()
                found_here = {name: error}
                if name == "inferred":
                    found_here |= dict(copy=copied * len(index), each=frame_psnrs(square), paired=error)
                for key, value in found_here.items():
                    if len(index) > 1 or key not in ("permuted", "paired"):
                        sums[key, t] = sums.get((key, t), 0.0) + value
        codes.append(found.cpu())
        effective = material.clips.effective(index, T)
        if effective is not None:
            labels.append(effective[:, model.history - 1:])
        n, paired = n + len(index), paired + len(index) * (len(index) > 1)
    codes = torch.cat(codes)
    used = code_statistics(codes.view(-1, 1), n_codes)

    def value(key, t):
        return psnr(over(sums.get((key, t), 0.0), paired if key in ("permuted", "paired") else n))
    numbers = dict(loss=losses / n, psnr_1=value("inferred", 0), psnr_4=value("inferred", 3),
                   frame_psnr_1=sums["each", 0] / n, frame_psnr_4=sums["each", 3] / n, copy_1=value("copy", 0),
                   copy_4=value("copy", 3), dpsnr_1=value("paired", 0) - value("permuted", 0),
                   dpsnr_4=value("paired", 3) - value("permuted", 3),
                   dpsnr_random_4=value("inferred", 3) - value("random", 3), usage=used["usage"],
                   perplexity=used["perplexity"], score=-losses / n)
    if labels:
        truth = torch.cat(labels)
        half, few = len(codes) // 2, min(200, len(codes) // 2 * codes.size(1))
        fit, fit_labels, test, test_labels = (x.flatten() for x in (codes[:half], truth[:half], codes[half:],
                                                                    truth[half:]))
        shared, _, entropy = mutual_information(codes.flatten(), truth.flatten(), n_codes, n_actions)
        moved, _, _ = mutual_information((truth.flatten() > 0).long(), truth.flatten(), 2, n_actions)
        whole = majority_map(fit, fit_labels, n_codes, n_actions)
        small = majority_map(fit[:few], fit_labels[:few], n_codes, n_actions)
        numbers |= dict(information=over(shared, entropy), moved_information=over(moved, entropy),
                        majority=over((whole[test] == test_labels).double().mean().item(), half and 1),
                        majority_200=over((small[test] == test_labels).double().mean().item(), half and 1),
                        majority_floor=test_labels.bincount().max().item() / len(test_labels))
        numbers |= ceilings(truth.flatten().bincount(minlength=n_actions), n_codes)
    if material.clips.cell_px:
        shares = codes.flatten().bincount(minlength=n_codes).float() / codes.numel()
        numbers |= consistency_of(model, material, palette, shares)
    model.train(training)
    return numbers


def ceilings(counts, n_codes):
    """What a code that knows the label could score: counts (L,) of the labels. With fewer codes than labels a code
    stands for several: the best way to share them, of more than six labels only a good one, in which the two rarest
    share a code until there are as many as codes."""
    def nats(shares):
        return -sum(p * math.log(p) for p in shares if p)
    shares = sorted((counts / counts.sum()).tolist())
    kept, best = [*shares], sum(shares[-n_codes:])
    while len(kept) > n_codes:
        kept = sorted([kept[0] + kept[1], *kept[2:]])
    most = nats(kept)
    if n_codes < len(shares) <= 6:
        maps = itertools.product(range(n_codes), repeat=len(shares))
        most = max(nats([sum(p for p, code in zip(shares, codes) if code == k) for k in range(n_codes)])
                   for codes in maps)
    return dict(ceiling_information=over(most, nats(shares)), ceiling_majority=best)


@torch.no_grad()
def consistency_of(model, material, palette, shares):
    """Whether a code means the same wherever it starts. Every code writes the frame after each of `eval_clips` pasts;
    where the agent stands in another cell than before, its displacement has a direction. A code counts as often as it
    is inferred, its share (n_codes,).

    consistency: mean cosine of two such directions under one code (0: no code has a direction, 1: each has one, in all
    worlds; a code that moved the agent once has no two and is left out; not a number: all have); lost: share of the
    written frames without exactly one agent.
    """
    sums, moved, lost, n = torch.zeros(model.n_codes, 2), torch.zeros(model.n_codes), torch.zeros(model.n_codes), 0
    for index in spread(material.clips, model.history, eval_clips).split(64):
        frames = material.frames(index, model.history)
        before = (material.clips.cells(index, model.history)[:, -1] == AGENT).flatten(1).int().argmax(1)
        n += len(index)
        for code in range(model.n_codes):
            e = model.quantiser.look_up(torch.full((len(index),), code, device=frames.device))
            seen = (as_frames(model.predict(frames, e), palette) * 255).round().byte().cpu()
            agents = (read_cells(seen, cell_px) == AGENT).flatten(1)
            one = agents.sum(1) == 1
            now = agents.int().argmax(1)
            step = torch.stack((now // side - before // side, now % side - before % side), 1).float()
            went = one & (now != before)
            sums[code] += F.normalize(step[went], dim=1).sum(0)
            moved[code] += went.sum()
            lost[code] += (~one).sum()
    cosine = (sums.square().sum(1) - moved) / (moved * (moved - 1)).clamp(min=1)  # without a step with itself
    weight = shares * moved * (moved > 1)
    return dict(consistency=((cosine * weight).sum() / weight.sum()).item(),      # of no pairs 0 / 0
                lost=(lost * shares).sum().item() / n)


def untrained_floor(video, train, val):
    """`information` and `majority` of the action model before training, its BatchNorm settled on 8 training batches."""
    seed_everything(seed, deterministic)
    model = build("actions", video).to(train.where)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = None                            # the plain mean over all batches
    clips = Stream(video.train, history + 1, batch_size, data_seed)
    with torch.no_grad():
        for step in range(8):
            found = model(train.frames(clips.at(step), history + 1))[1]
            model.quantiser.follow(found.z, found.codes)
    numbers = evaluate_actions(model, val, video.palette, video.n_actions)
    return {f"untrained_{key}": numbers[key] for key in ("information", "majority") if key in numbers}


def linear_probe(train, val, n_actions, clips=4096, penalty=1.0):
    """What a linear map knows of the label: ridge regression, fitted with labels, from `history` + 1 frames of 16 x 16
    grey values to the actions' one-hots. probe_information, probe_majority: of what it names on held-out clips, I over
    H and accuracy; probe_floor: accuracy of the commonest."""
    def features(material, index):
        frames = material.frames(index, history + 1).mean(-1).flatten(0, 1)[:, None]
        small = F.adaptive_avg_pool2d(frames, 16).view(len(index), -1).double().cpu()
        return F.pad(small, (0, 1), value=1.0), material.clips.effective(index, history + 1)[:, -1]
    parts = []
    for material, count in ((train, clips), (val, eval_clips)):
        found = [features(material, index) for index in spread(material.clips, history + 1, count).split(256)]
        parts.append([torch.cat(part) for part in zip(*found)])
    (x, y), (test, truth) = parts
    target = F.one_hot(y, n_actions).double()
    map = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.size(1), dtype=torch.float64), x.T @ target)
    said = (test @ map).argmax(1)
    shared, _, entropy = mutual_information(said, truth, n_actions, n_actions)
    return dict(probe_information=over(shared, entropy), probe_majority=(said == truth).double().mean().item(),
                probe_floor=truth.bincount().max().item() / len(truth))


@torch.no_grad()
def evaluate_dynamics(model, models, material):
    """Figures of held-out clips whose last frame is wholly hidden, named in one pass, likeliest tokens; by causal
    dynamics one token after another, likeliest each (its loss is given the true ones before).

    tokens, changed: share of all tokens and of those that differ from the frame before (not a number where none does);
    copy: of all, by copying it; agent, ball: share of the clips in which it moved to another cell and stands there
    (left out where none moved); frame: whole frames. Rollouts are what `evaluate_rollouts` is for.
    """
    training = model.training
    model.eval()
    right = changed = moved = whole = copied = losses = n = 0
    seen = {AGENT: [0, 0], BALL: [0, 0]}
    for index in spread(material.clips, context, eval_clips).split(64):
        truth, acts = tokens_and_actions(models, material, index, context)
        acts = acts.masked_fill(acts < 0, model.n_actions)
        last, before = truth[:, -1], truth[:, -2]
        if dynamics == "causal":
            logits = model(truth, acts, window=window)[:, -1]
            cache = model.new_cache(len(truth), context, window)
            model(truth[:, :-1], acts[:, :-1], cache)
            said = model.next_frame(acts[:, -1], cache, temperature=0.0)
        else:
            hidden = torch.cat((truth[:, :-1], torch.full_like(truth[:, -1:], model.mask)), 1)
            logits = model(hidden, acts, window=window)[:, -1]
            said = logits.argmax(-1)
        losses += F.cross_entropy(logits.flatten(0, 1), last.flatten(), reduction="sum").item()
        right += (said == last).sum().item()
        changed += (said == last)[last != before].sum().item()
        moved += (last != before).sum().item()
        copied += (last == before).sum().item()
        whole += (said == last).all(1).sum().item()
        n += last.numel()
        cells = material.clips.cells(index, context)
        if cells is not None:
            written = said
            if tokens != "cells":
                written = as_seen(models, torch.cat((truth[:, :-1], said[:, None]), 1), material)[:, -1]
                written = torch.as_tensor(read_cells((written * 255).round().byte().cpu().numpy(), cell_px))
            written, cells = written.view(len(index), -1).cpu(), cells.flatten(2)
            for kind, count in seen.items():
                appears = (cells[:, -1] == kind) & (cells[:, -2] != kind)        # (B, N)
                count[0] += ((written == kind) & appears).sum().item()
                count[1] += appears.sum().item()
    model.train(training)
    numbers = dict(loss=losses / n, tokens=right / n, changed=over(changed, moved), copy=copied / n,
                   frame=whole * truth.size(2) / n, perplexity=math.exp(min(losses / n, 50)), score=-losses / n)
    for kind, name in ((AGENT, "agent"), (BALL, "ball")):
        if seen[kind][1]:
            numbers[name] = seen[kind][0] / seen[kind][1]
    return numbers


@torch.no_grad()
def evaluate_text(model, material):
    """loss: nats per character of held-out captions; perplexity: exp of it; valid: share of 64 texts that it writes
    itself which describe a possible picture, different: how many of those differ."""
    losses = n = 0
    for index in spread(material.clips, 1, eval_clips).split(64):
        text = captions(material, index)
        count = (text != 0).sum().item() + len(text)
        losses += model.nats(text).item() * count
        n += count
    written = model.write(64, generator=torch.Generator().manual_seed(0))
    valid = [text for text in written if read_caption(text, side) is not None]
    return dict(loss=losses / n, perplexity=math.exp(losses / n), valid=len(valid) / 64, different=len(set(valid)),
                score=-losses / n)


@torch.no_grad()
def evaluate_frame(model, models, material):
    """tokens, frame: share of tokens and of whole frames that are right, all named in one pass; drawn: of whole frames
    filled in by MaskGIT; loss in nats per token; floor: tokens right by the commonest token."""
    losses = right = whole = drawn = n = frames = 0
    every = []
    for index in spread(material.clips, 1, eval_clips).split(64):
        truth, text = tokens_of(models, material, index, 1)[:, 0], captions(material, index)
        logits = model(torch.full_like(truth, model.codebook_size), model.read(text))
        losses += F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == truth).sum().item()
        whole += (logits.argmax(-1) == truth).all(1).sum().item()
        drawn += (model.draw(text, steps=decode_steps, temperature=0.0) == truth).all(1).sum().item()
        every.append(truth.flatten().cpu())
        n, frames = n + truth.numel(), frames + len(truth)
    return dict(loss=losses / n, tokens=right / n, frame=whole / frames, drawn=drawn / frames, score=-losses / n,
                floor=torch.cat(every).bincount().max().item() / n)


def as_seen(models, written, material, cache=None):
    """Tokens (B, T, N) as frames (B, T, H, W, 3) in 0..1. A spatio-temporal tokenizer also sees the frames before:
    they are to be in `written`, or in a cache of its own."""
    if tokens == "tokenizer":
        return as_frames(models["tokenizer"].pixels(written, cache), material.palette)
    cells = written.view(*written.shape[:2], side, side).to(torch.uint8).cpu().numpy()
    return torch.from_numpy(paint(cells, cell_px)).to(written.device).float() / 255


@torch.no_grad()
def evaluate_rollouts(model, models, material):
    """PSNR of frames 1, 4 and 16 after `context` - 1 true ones, each generated from those before: with the actions that
    led there (psnr_n; frame_psnr_n is the mean over frames of each one's), with those of another clip (permuted_n; of
    the same 64, a clip alone is left out) or even draws (random_n); copy_n: the last true frame stays; dpsnr_4 = psnr_4
    - random_4 (Genie's), dpsnr_permuted_4. exact_n: share of frames n that are wholly right. Where there is but one
    action, permuted and random ones are the same again: not a number."""
    ahead = min(16, material.clips.length - context + 1)
    T, sums, n, paired, generator = context - 1 + ahead, {}, 0, 0, torch.Generator().manual_seed(0)
    for index in spread(material.clips, T, rollout_clips).split(64):
        truth, acts = tokens_and_actions(models, material, index, T)
        acts = acts.masked_fill(acts < 0, model.n_actions)
        frames, held = material.frames(index, T), context - 1
        plan = acts[:, held:]
        plans = {"psnr": plan, "permuted": plan.roll(1, 0),
                 "random": torch.randint(model.n_actions, plan.shape, generator=generator).to(plan.device)}
        written = {name: as_seen(models, torch.cat((truth[:, :held], model.generate(
            truth[:, :held], acts[:, :held], chosen, window=window, steps=decode_steps, temperature=temperature,
            generator=generator)), 1), material)[:, held:] for name, chosen in plans.items()}
        written["copy"] = frames[:, held - 1:held].expand(-1, ahead, -1, -1, -1)
        for name, seen in written.items():
            for t in (1, 4, 16):
                if t <= ahead:
                    square = (seen[:, t - 1] - frames[:, held + t - 1]).square()
                    error = square.flatten(1).mean(1)
                    found = {name: error.sum().item()}
                    if name == "psnr":
                        found |= dict(exact=(error < 1e-9).sum().item(), frame_psnr=frame_psnrs(square),
                                      paired=found[name])
                    for key, value in found.items():
                        sums[key, t] = sums.get((key, t), 0.0) + value * (len(index) > 1 or key not in (
                            "permuted", "paired"))
        n, paired = n + len(index), paired + len(index) * (len(index) > 1)
    controls = dict(permuted=paired, paired=paired) | (dict(permuted=0, random=0) if model.n_actions == 1 else {})
    numbers = {}
    for (name, t), total in sums.items():
        mean = over(total, controls.get(name, n))
        numbers[f"{name}_{t}"] = mean if name in ("exact", "frame_psnr") else psnr(mean)
    if "psnr_4" in numbers:
        numbers |= dict(dpsnr_4=numbers["psnr_4"] - numbers["random_4"],
                        dpsnr_permuted_4=numbers["paired_4"] - numbers["permuted_4"])
    return {name: value for name, value in numbers.items() if not name.startswith("paired")}


# --- Pictures ---

@torch.no_grad()
def draw_samples(name, model, models, material, path, ahead=8):
    """What a stage's model makes of held-out clips, for the eye: `path`.png, of the text stage `path`.txt."""
    path.parent.mkdir(exist_ok=True)
    if name == "text":
        texts = model.write(8, generator=torch.Generator().manual_seed(0))
        with replacing(path.with_suffix(".txt")) as file:
            file.write("".join(text + "\n" for text in texts).encode())
        return
    T = dict(tokenizer=max(2, tokenizer_frames), actions=history + 1, dynamics=context - 1 + ahead, frame=1)[name]
    T, training = min(T, material.clips.length), model.training
    model.eval()
    index = spread(material.clips, T, 8)
    frames = material.frames(index, T)
    if name == "tokenizer":
        rows = {"held-out frames": frames[:, -1], "from their tokens": as_frames(model(frames, None)[0],
                                                                                 material.palette)[:, -1]}
    elif name == "actions":
        past, found = frames[:, :-1], model.quantiser(model.encode(frames))
        rows = {"the frame before": past[:, -1], "the frame after": frames[:, -1]}
        rows["written from the code inferred: " + ", ".join(map(str, found.codes.tolist()))] = as_frames(
            model.predict(past, model.quantiser.look_up(found.codes)), material.palette)
        for code in range(n_codes):
            e = model.quantiser.look_up(torch.full((len(index),), code, device=past.device))
            rows[f"from code {code}"] = as_frames(model.predict(past, e), material.palette)
    elif name == "dynamics":
        index = index[::3]
        truth, acts = tokens_and_actions(models, material, index, T)
        acts, held = acts.masked_fill(acts < 0, model.n_actions), context - 1
        written = model.generate(truth[:, :held], acts[:, :held], acts[:, held:], window=window, steps=decode_steps,
                                 temperature=0.0)
        written = as_seen(models, torch.cat((truth[:, :held], written), 1), material)[:, held:]
        rows = {}
        for i, true in enumerate(frames[::3]):
            rows[f"held-out clip {i + 1}, frames {held + 1} to {T}"] = true[held:]
            rows[f"generated after frame {held} and these actions: " + ", ".join(map(str, acts[i, held:].tolist()))] = (
                written[i])
    else:
        text = captions(material, index)
        drawn = model.draw(text, steps=decode_steps, temperature=0.0)[:, None]
        rows = {"held-out frames": frames[:, 0], "drawn from their captions": as_seen(models, drawn, material)[:, 0]}
    model.train(training)
    save_strip(path.with_suffix(".png"), [[(frame * 255).round().byte().cpu().numpy() for frame in row]
                                          for row in rows.values()], list(rows))


# --- A world that is played ---

class Played:
    """One world: frames generated after the actions that a person chooses, the true world beside it where there is one.

    The grid world begins at a random state with `context` - 1 true frames after "stay"; other data at a clip that was
    never trained on. Latent actions are shown with the true action that most often goes with them.
    """

    def __init__(self, model, models, material, video, meanings=None):
        self.model, self.models, self.material, self.video = model, models, material, video
        self.prompts = "frame" in models and video.action_names == ACTIONS
        self.meanings = meanings                              # (n_codes,) true action of each code, or None
        names = tuple(video.action_names)
        if action_source == "true":
            self.actions = names
        else:
            self.actions = tuple(f"code {k}" + (f" ({names[m]})" if meanings is not None else "")
                                 for k, m in enumerate(meanings.tolist() if meanings is not None else range(n_codes)))
        self.keys = {str(i): i for i in range(min(10, len(self.actions)))}
        if video.action_names == ACTIONS:
            true = {"stay": " ", "up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft", "right": "ArrowRight"}
            known = range(5) if action_source == "true" else meanings.tolist() if meanings is not None else ()
            self.keys |= {true[ACTIONS[m]]: k for k, m in reversed(list(enumerate(known)))}
        self.title = f"{dataset}, {'true' if action_source == 'true' else 'latent'} actions"
        self.began = 0
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def reset(self, prompt=None):
        """A new world, or one that begins with the frame that a sentence describes ("write": a sentence of the text
        model). ValueError: no sentence of this model's."""
        began, T = time.perf_counter(), context - 1
        if prompt is not None:
            return self.reset_by(prompt, began)
        clips = self.material.clips
        index = torch.tensor([self.began * 7919 % clips.count(T)])
        self.began += 1
        acts = None
        if self.video.action_names == ACTIONS:                # a world of our own, which then goes on by itself
            import numpy as np
            self.world = World(1, np.random.default_rng(seed + self.began), side, walls, ball)
            seen = [self.world.cells()]
            for _ in range(T - 1):
                self.world.step(np.zeros(1, np.int64))
                seen.append(self.world.cells())
            cells = np.stack(seen, 1)
            self.frames = torch.from_numpy(paint(cells, cell_px)).to(self.material.where).float() / 255
            acts = torch.zeros(1, T - 1, dtype=torch.int64)
        else:
            self.world, self.frames = None, self.material.frames(index, T)
            acts = clips.actions(index, T)
        if tokens == "cells":
            written = torch.from_numpy(cells).long().flatten(2).to(self.material.where)
        else:
            written = self.models["tokenizer"].tokens(self.frames)
        if action_source == "latent":
            acts = latent_actions(self.models["actions"], self.frames)
        acts = F.pad(acts.to(written.device), (1, 0), value=self.model.n_actions)
        self.cache = self.model.new_cache(1, max(1024, T), window or 64)
        self.model(written, acts, self.cache)
        self.draw(written)
        return self.view(self.frames[0, -1], began)

    @torch.no_grad()
    def reset_by(self, prompt, began):
        """A world whose first frame is drawn from words; how its ball flies only the next frames show."""
        if prompt == "write":
            if "text" not in self.models:
                raise ValueError("write needs the stage text: --resume --stage text trains it")
            prompt = self.models["text"].write(1, generator=self.generator)[0]
            if not prompt:
                raise ValueError("the text model wrote an empty sentence: ask again, or with another seed")
            strange = []
        else:
            strange = unknown_words(prompt, side)
            if not prompt.strip(" ,.;:"):
                raise ValueError("a sentence of at least one word is needed")
        text = as_characters([prompt], caption_length(side)).to(self.material.where)
        if strange:
            raise ValueError(f"no caption has the word {strange[0]!r}, so no stage has seen it; captions are such as "
                             "'agent at c4, ball at f2, walls a1 b3 c7.'")
        written = self.models["frame"].draw(text[:, :len(prompt)], steps=decode_steps, temperature=temperature,
                                            generator=self.generator)[:, None]
        frame = self.draw(written)
        cells = read_cells((frame * 255).round().byte().cpu(), cell_px)[None].numpy()
        try:                                                  # the true world begins as it was drawn, if that is one
            import numpy as np
            self.world = World.from_cells(cells, np.random.default_rng(seed))
        except ValueError:
            self.world = None
        self.cache = self.model.new_cache(1, 1024, window or 64)
        self.model(written, torch.full((1, 1), self.model.n_actions, device=written.device), self.cache)
        return self.view(frame, began, prompt)

    @torch.no_grad()
    def step(self, action):
        """The frame after `action`."""
        began = time.perf_counter()
        written = self.model.next_frame(torch.tensor([action], device=self.material.where), self.cache, decode_steps,
                                        temperature, generator=self.generator)
        frame, note = self.draw(written[:, None], first=False), self.actions[action]
        if self.world is not None:
            true = action if action_source == "true" else self.meanings[action].item()
            happened = int(self.world.step([true])[0])
            note = f"{note}; in the true world: {ACTIONS[happened]}" + " (blocked)" * (happened != true)
        return self.view(frame, began, note)

    def draw(self, written, first=True):
        """Tokens (1, T, N) -> the last frame's pixels (H, W, 3). first: of a new world, else after those drawn."""
        if first:
            self.drawn = self.models["tokenizer"].new_cache(1, 1024) if tokens == "tokenizer" else None
        return as_seen(self.models, written, self.material, self.drawn)[0, -1]

    def view(self, frame, began, note=""):
        """What the page shows."""
        truth = None if self.world is None else paint(self.world.cells(), cell_px)[0]
        size = f"{self.cache.length} frames seen, {self.cache.bytes / 1e6:.2f} MB"
        return View((frame * 255).round().byte().cpu().numpy(), truth, size, time.perf_counter() - began, note)


def meanings_of(models, material, n_actions):
    """(n_codes,) int64: the effective action that most often goes with each code; None where no actions are known."""
    index = spread(material.clips, history + 1, eval_clips)
    labels = material.clips.effective(index, history + 1)
    if labels is None or not n_actions:
        return None
    with torch.no_grad():
        codes = torch.cat([models["actions"].quantiser(models["actions"].encode(material.frames(part, history + 1)))
                           .codes.cpu() for part in index.split(64)])
    return majority_map(codes, labels[:, -1], n_codes, n_actions)


def write_rollout(played, plan, folder):
    """samples/rollout.png, a row of generated and a row of true frames, and rollout.gif. Returns their paths."""
    if prompt is not None and not played.prompts:
        raise UserError("--prompt needs a run with the stage frame: --resume --stage frame trains it")
    try:
        views = [played.reset(prompt)]
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    if prompt is not None:
        print(views[0].note)
    views += [played.step(action) for action in plan]
    rows, titles = [[view.frame for view in views]], ["generated after " + ", ".join(played.actions[a] for a in plan)]
    if views[0].truth is not None:
        rows, titles = [*rows, [view.truth for view in views]], [*titles, "the true world"]
    (folder / "samples").mkdir(exist_ok=True)
    paths = folder / "samples" / "rollout.png", folder / "samples" / "rollout.gif"
    save_strip(paths[0], rows, titles)
    save_gif(paths[1], rows[0])
    return paths


# --- The run ---

def rollout_words(numbers):
    """The line of evaluate_rollouts."""
    return "rollouts: " + in_line(numbers)


NOTHING = {"changed": "nothing changes", "information": "all actions are the same", "majority": "one clip only",
           "consistency": "no code moves the agent twice", "": "no other clip or action to compare with"}


def in_line(numbers):
    """name value, name value, ...; and why where one is not a number."""
    return ", ".join(f"{key} {value:.4g}" + (f" ({next(why for word, why in NOTHING.items() if word in key)})" if
                                             math.isnan(value) else "") for key, value in numbers.items())


def in_words(name, numbers):
    """The line of a validation."""
    shown = {"tokenizer": ("psnr", "frame_psnr", "ssim", "changed_psnr", "usage", "perplexity"),
             "actions": ("information", "majority", "usage", "psnr_1", "frame_psnr_1", "copy_1", "dpsnr_1",
                         "dpsnr_4", "consistency"),
             "dynamics": ("dynamics", "tokens", "changed", "agent", "ball", "frame", "copy"),
             "text": ("perplexity", "valid", "different"), "frame": ("tokens", "frame", "drawn", "floor")}[name]
    return in_line({key: numbers[key] for key in ("loss", *shown) if key in numbers})


@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    if play is not None and rollout is not None:
        raise UserError("--play and --rollout: one of them")
    if (shown := play or rollout) is not None:               # RUN: its directory, or its name
        named = Path(out_dir, "train_worldmodel", shown)
        settings.put(resume=str(named if named.exists() and not Path(shown).exists() else shown))
    if eval_only and resume is False:
        raise UserError("--eval_only goes with --resume, or --resume PATH: which model?")
    only_read = eval_only or shown is not None
    checkpoint = resumed(settings, architecture, ("eval_only", "play", "port", "rollout", "actions", "prompt"),
                         needed=only_read)
    checkpoint_path = checkpoint.path if checkpoint else None
    where, precision = resolve_device(device, dtype)
    autocast = torch.autocast(where.type, precision, enabled=precision != torch.float32)

    # ---- data ----
    check(settings)
    video = load(dataset, n_train, n_val, length, side, cell_px, walls, ball, split_seed)
    check(settings, video)
    if not only_read:
        settings.check_data(checkpoint, architecture["all"][:9], video.hash)
    print(video.source)
    train, val = (Material(clips, video.palette, where) for clips in (video.train, video.val))
    clip_frames = dict(tokenizer=tokenizer_frames, actions=history + 1, dynamics=context, text=1, frame=1)
    patches = (video.height // patch) * (video.width // patch)
    clip_tokens = {name: clip_frames[name] * patches for name in STAGES} | dict(text=caption_length(side))
    clip_batch = dict(tokenizer=tokenizer_batch, actions=batch_size, dynamics=dynamics_batch, text=text_batch,
                      frame=frame_batch)

    # ---- what is trained already, and what is next ----
    done = dict(checkpoint["done"]) if checkpoint else {}     # stage: weights, the best on validation
    ended = dict(checkpoint.get("ended", {})) if checkpoint else {}   # stage: what it goes on from, if asked for more
    told = dict(checkpoint.get("figures", {})) if checkpoint else {}  # stage: what the summary says of it
    wanted = [name for name in STAGES if stage in ("all", name)]
    if stage == "all":                                       # what the dynamics read, and words where there are any
        wanted = [name for name in STAGES if name == "dynamics" or name in needs("dynamics") or
                  name in ("text", "frame") and video.cell_px]
    elif stage in ("text", "frame") and not video.cell_px:
        raise UserError(f"stage {stage} learns captions of grid worlds: {dataset} has none")
    longer, anew = [], []                                     # finished stages that go on; those that read them
    if checkpoint and not only_read:
        longer = [name for name in wanted if name in done and name in ended and not is_over(name, ended[name]["loop"])]
        anew = [name for name in STAGES if name in (*done, checkpoint["stage"]) and set(needs(name)) & set(longer)]
        longer = [name for name in longer if name not in anew]
        for name in anew:
            read = " and ".join(other for other in needs(name) if other in longer)
            if name not in wanted:
                raise UserError(f"stage {name} has learned from stage {read} as it is, which would go on: --stage all "
                                f"begins {name} anew, or leave {read} its steps")
            print(f"stage {name} begins anew: it has learned from stage {read}, which goes on")
        for name in wanted:
            if name in done and name not in ended and steps_of(name) > steps_of(
                    name, globals() | checkpoint["settings"]):
                print(f"stage {name} stays as it is: {checkpoint_path} holds its best weights only, from which no more "
                      "steps follow")
    left = [name for name in wanted if name not in done or name in (*longer, *anew)]
    if checkpoint and checkpoint["stage"] not in (*longer, *anew):
        left.sort(key=lambda name: name != checkpoint["stage"])                       # what was begun is ended first
    for name in wanted:
        missing = [other for other in needs(name) if other not in done and other not in wanted]
        if missing and name in left:
            raise UserError(f"stage {name} reads what stage {missing[0]} learns: --stage {missing[0]} first, then "
                            f"--resume --stage {name}; or --stage all")
    if checkpoint and checkpoint["stage"] not in done and checkpoint["stage"] not in left:
        raise UserError(f"this run is in the middle of stage {checkpoint['stage']}: --resume --stage "
                        f"{checkpoint['stage']} ends it first")
    for name in left if not only_read else ():
        rows = batch_size * (1 if action_model == "conv" else history)
        if name == "actions" and action_quantiser == "signs" and rows < 3:
            raise UserError(f"batch_size {batch_size}: signs are normalised over a pass's codes, of which there must "
                            "be 3: of two each is 1 or -1 whatever was seen; --action_quantiser vq takes any")
        if name == "tokenizer" and quantiser == "vq" and code_dim == 1:
            raise UserError("code_dim 1: vq compares unit vectors, and of one number they are 1 and -1, without a "
                            "gradient: 2 or more, or --quantiser fsq")
        if name == "dynamics" and dynamics == "maskgit" and not mask_rate[1]:
            raise UserError("mask_rate 0,0 hides no token: the dynamics would have nothing to learn")
    seed_everything(seed, deterministic)
    models = {}
    for name in done:
        models[name] = build(name, video).to(where)
        models[name].load_state_dict(done[name])
        models[name].eval().requires_grad_(False)

    def figures(name, model):
        """The numbers of a stage's model on held-out clips."""
        with autocast:
            if name == "tokenizer":
                return evaluate_tokenizer(model, val, video.palette)
            if name == "actions":
                return evaluate_actions(model, val, video.palette, video.n_actions)
            if name == "text":
                return evaluate_text(model, val)
            if name == "frame":
                return evaluate_frame(model, models, val)
            return evaluate_dynamics(model, models, val)

    if shown is not None:
        if "dynamics" not in models:
            raise UserError(f"{checkpoint_path} has no dynamics yet, only {', '.join(done) or 'nothing finished'}: "
                            "--resume --stage dynamics trains them")
        meanings = meanings_of(models, train, video.n_actions) if action_source == "latent" else None
        played = Played(models["dynamics"], models, val, video, meanings)
        if play is not None:
            serve(played, port)
        else:
            plan = parse_actions(actions, len(played.actions))
            print("wrote " + " and ".join(map(str, write_rollout(played, plan, Path(checkpoint_path).parent))))
            if log_cache:
                print("\n".join(played.cache.log()))
        return

    if eval_only:
        for name in models:
            print(f"{name}: {in_words(name, figures(name, models[name]))}")
        if "dynamics" in models:
            print(rollout_words(evaluate_rollouts(models["dynamics"], models, val)))
        return

    limits.notes(settings, {f"{name} steps": steps_of(name) for name in left},
                 checkpoint and {f"{checkpoint['stage']} steps": steps_of(checkpoint["stage"], checkpoint["settings"])})
    total = checkpoint["step"] if checkpoint else 0           # optimiser steps of all stages
    with Run(settings, checkpoint, done=done, ended=ended, figures=told) as run:
        for name in [name for name in told if name not in left]:
            run.summary(**told[name], **({f"{name}_seconds": ended[name]["loop"]["seconds"]} if name in ended else {}))
        begun = {name: ended[name]["loop"]["step"] for name in longer}
        if checkpoint and checkpoint["stage"] in left and checkpoint["stage"] not in (*longer, *anew):
            begun[checkpoint["stage"]] = checkpoint["loop"]["step"]
        bar = run.bar(total + sum(steps_of(name) - begun.get(name, 0) for name in left), total)
        clock = Stopwatch(where)
        for name in left:
            # ---- model, optimiser and the loop's own state of this stage ----
            seed_everything(seed, deterministic)
            model = build(name, video).to(where)
            noise = torch.Generator(where).manual_seed(seed)  # masks
            revival = torch.Generator().manual_seed(seed)     # which encoder outputs dead codes become
            was = None                                        # what the stage goes on from
            if name in longer:
                was = ended[name]
                was["loop"] |= dict(best_model=done[name], start=total - was["loop"]["step"])
                print(f"stage {name} goes on from step {was['loop']['step']}; what is a share of its steps is one of "
                      f"{steps_of(name)}")
                stale = [other for other in anew if name in needs(other)]
                for kept in (done, ended, told, models):
                    for other in (name, *stale):
                        kept.pop(other, None)
            elif checkpoint is not None and checkpoint["stage"] == name and name not in anew:
                was = checkpoint
            if grad_accum > 1 and name == "actions" and action_quantiser == "signs":
                print(f"signs are normalised over the {batch_size} clips of each pass: grad_accum {grad_accum} is not "
                      f"one pass over {batch_size * grad_accum}")
            opt = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model))
            scaler = torch.amp.GradScaler(where.type, enabled=precision == torch.float16)
            ema = optim.EMA(model, ema_decay) if ema_decay else None
            loop = Loop(dict(step=0, evaluated=-1, best=-math.inf, best_step=0, best_model=None, waited=0, pending=[],
                             seconds=0.0, logged_seconds=0.0, clips=0, start=total,
                             chosen=torch.zeros(codebook_size, dtype=torch.int64)), scaler)
            run.track(was, stage=name, model=model, optimizer=opt, ema=ema, scaler=scaler,
                      generators=Generators(noise=noise, revival=revival), loop=loop)
            trained = compiled(model, name) if compile else model
            clips = Stream(video.train, clip_frames[name], clip_batch[name] * grad_accum, data_seed)
            limit = steps_of(name)
            print(f"stage {name}: {sum(p.numel() for p in model.parameters()):,} parameters, {limit} steps")

            saved = loop["step"] if was is checkpoint is not None else None
            if saved is None:
                run.save("last.pt", loop["start"] + loop["step"])

            while True:
                # ---- validate and save: before the step, so that a run that stops here does on resume what was due --
                step = loop["step"]
                if run.stop:
                    break
                if (step % eval_interval == 0 or step == limit) and loop["evaluated"] < step:
                    loop.flush()
                    loop["evaluated"] = step
                    clock.start()
                    with optim.evaluated(opt, ema):
                        numbers = figures(name, model)
                        clock.lap("evaluation")
                        weights = copy.deepcopy(model.state_dict())
                        with autocast, optional("samples are"):
                            draw_samples(name, model, models, val, run.dir / "samples" / f"{name}_{step:06d}")
                        model.train()
                    run.log(step=loop["start"] + step, split="val", stage=name, stage_step=step, **numbers)
                    bar.note(f"{name} {step}: {in_words(name, numbers)}")
                    loop["waited"] += 1
                    if numbers["score"] > loop["best"] or loop["best_model"] is None:
                        loop.update(best=numbers["score"], best_step=step, best_model=weights, waited=0)
                        run.save("best.pt", loop["start"] + step, done={**done, name: weights})
                if saved is None or saved != step and (step % save_interval == 0 or is_over(name, loop)):
                    run.save("last.pt", loop["start"] + step)
                    saved = step
                if is_over(name, loop):
                    break

                # ---- one optimiser step ----
                began = time.perf_counter()
                rate = optim.set_rate(opt, settings | {"max_steps": limit}, step)
                row, outputs, chosen = {}, [], []
                clock.start()
                indices = clips.at(step).split(clip_batch[name])
                with autocast:
                    passes = passes_of(name, models, train, indices, step, noise)
                for index, (read, share) in zip(indices, passes):
                    clock.lap("data")                         # which clips; what is made of them belongs to the pass
                    with autocast:
                        if name == "tokenizer":
                            loss, parts = tokenizer_loss(trained, train, index, step, share)
                            loop["chosen"] += parts["codes"].bincount(minlength=codebook_size).cpu()
                        elif name == "actions":
                            loss, parts = actions_loss(trained, train, index, step, share)
                        elif name == "text":
                            loss = trained.nats(captions(train, index)) * share
                            parts = dict(loss=loss.detach())
                        elif name == "frame":
                            loss, parts = frame_loss(trained, models, train, index, noise, share, read)
                        else:
                            loss, parts = dynamics_loss(trained, models, train, index, step, noise, share, read)
                    clock.lap("forward")
                    scaler.scale(loss).backward()
                    clock.lap("backward")
                    if "codes" in parts:
                        outputs.append(parts.pop("z").flatten(0, -2))
                        chosen.append(parts.pop("codes"))
                    for key, value in parts.items():
                        row[key] = row.get(key, 0.0) + value
                    loop["clips"] += len(index)
                scaler.unscale_(opt)
                row["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad(set_to_none=True)
                if ema:
                    ema.update()
                if name == "actions" or name == "tokenizer" and quantiser == "vq":   # once a step, by all of its passes
                    (model.codebook if name == "tokenizer" else model.quantiser).follow(
                        torch.cat(outputs), torch.cat(chosen))
                clock.lap("optimiser")
                loop.add(row)
                step = loop["step"] = step + 1
                if name == "tokenizer" and quantiser == "vq" and reset_interval and step % reset_interval == 0:
                    if step <= reset_fraction * limit:
                        model.codebook.revive((loop["chosen"] == 0).to(where), torch.cat(outputs), revival,
                                              reset_distance)
                    loop["chosen"].zero_()

                # ---- log ----
                due = step % log_interval == 0
                if due:
                    loop.flush()                              # waits for the device: part of the step's time
                loop["seconds"] += time.perf_counter() - began
                if due:
                    rows = loop["pending"]
                    means = {key: sum(line[key] for line in rows) / len(rows) for key in rows[-1]}
                    elapsed = loop["seconds"] - loop["logged_seconds"]
                    speed = loop["clips"] / elapsed
                    run.log(step=loop["start"] + step, split="train", stage=name, stage_step=step, **means,
                            lr=rate, clips_per_s=speed, tokens_per_s=speed * clip_tokens[name],
                            seconds=loop["seconds"])
                    loop.update(pending=[], logged_seconds=loop["seconds"], clips=0)
                    bar.update(loop["start"] + step, f"{name} loss {means['loss']:.4f}")

            # ---- the stage's end: its best weights serve the later stages ----
            if run.stop:
                if saved != loop["step"]:
                    run.save("last.pt", loop["start"] + loop["step"])
                break
            ended[name] = on_cpu(run.states("model", "optimizer", "ema", "scaler", "generators", "loop"))
            del ended[name]["loop"]["best_model"]             # which is done[name]
            model.load_state_dict(loop["best_model"])
            done[name] = loop["best_model"]
            models[name] = model.eval().requires_grad_(False)
            total = loop["start"] + loop["step"]
            clock.start()
            numbers = figures(name, model)
            found = {f"{name}_{key}": value for key, value in numbers.items()} | {f"{name}_best_step":
                                                                                  loop["best_step"]}
            print(f"{name}: best at step {loop['best_step']}: {in_words(name, numbers)}; {loop['seconds']:.0f} s")
            if name == "actions" and "information" in numbers:
                with torch.random.fork_rng(devices=[]):
                    floors = untrained_floor(video, train, val)
                floors |= linear_probe(train, val, video.n_actions)
                found |= {f"actions_{key}": value for key, value in floors.items()}
                print(f"floors: moved or not {numbers['moved_information']:.3f}, " + in_line(floors))
            if name == "dynamics":
                numbers = evaluate_rollouts(model, models, val)
                found |= {f"rollout_{key}": value for key, value in numbers.items()}
                print(rollout_words(numbers))
            clock.lap("evaluation")
            told[name] = {key: None if math.isnan(value) else value for key, value in found.items()}
            run.summary(**told[name], **{f"{name}_seconds": loop["seconds"]})
            run.save("last.pt", total)                        # with its figures, which are not counted again

        # ---- the end ----
        bar.close()
        run.summary(step=total, hash=video.hash, stages=list(done))
        run.spent(clock)
        print(f"{'stopped' if run.stop else 'done'}: {run.dir}")


if __name__ == "__main__":
    main()
