"""From video to a world that one can play: frames as tokens, latent actions without labels, and the next frame.

    python train_worldmodel.py --preset cpu                    # a grid world under its true actions: minutes
    python train_worldmodel.py --preset cpu_latent             # the same under actions that are found without labels
    python train_worldmodel.py --play MY_RUN                   # in the browser, with the true world beside it
    python train_worldmodel.py --stage actions                 # one stage: which of 8 codes led to each next frame
    python train_worldmodel.py --stage tokenizer               # another: frames as codes of one codebook
    python train_worldmodel.py --resume --stage dynamics       # goes on with the newest run: that stage is added
    python train_worldmodel.py --preset cpu --resume           # goes on exactly where the newest run stopped
    python train_worldmodel.py --preset cells                  # the dynamics alone, on the world's own cells
    python train_worldmodel.py --dataset donkeycar             # a real drive; or a file of your own: --dataset my.npz
    python train_worldmodel.py -h                              # every setting

A small Genie (Bruce et al. 2024, 2402.15391): a tokenizer (VQ-VAE over patches), a latent action model, and MaskGIT
over the next frame's tokens. The own world knows which action happened, so every score has its ceiling and its floors.
Figures, and what failed: docs/worldmodel.md.
"""
from nanolab.settings import answer_help

answer_help(__name__, __file__)  # before the seconds that the next lines take

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import draw
from data.video import Stream, caption_length, draw_clips, load
from kernels import cross_entropy, readable
from model import fused_rows, parameter_roles
from models import world_measures as measures
from models.discrete import FSQ, fsq_levels
from models.world_actions import ActionModel
from models.world_dynamics import CausalDynamics, Dynamics, PackedDynamics
from models.world_measures import pixel_loss
from models.world_tokenizer import ConvTokenizer, Tokenizer
from models.world_words import FirstFrame, Writer
from nanolab import limits, optim, world as worlds
from nanolab.play import Session, parse_actions, save_samples, serve, write_rollout
from nanolab.run import (Generators, Loop, Run, Stopwatch, UserError, as_user_error, begin, command, means,
                         mixed_precision, optional, resolve_device, restoring, resumed, seed_everything)

# --- Run ---
preset = None              # a named set of settings (below); flags win over it
stage = "all"              # [all, tokenizer, actions, dynamics, text, frame] what to train; all: one after the other
eval_only = False          # with resume: figures of all stages that are trained, rollouts too; trains nothing
play = None                # a run's directory: its world in the browser, keys choose actions
port = 0                   # [>= 0, <= 65535] of that page on 127.0.0.1; 0: a free one
rollout = None             # a run's directory: one world after `actions`, as samples/rollout.png and .gif there
actions = "0,3,3,1,4,2"    # of that rollout, numbers with commas between
seed = 1337                # [>= 0] initialisation, masks, draws
data_seed = 1337           # [>= 0] which clips a batch holds
device = "auto"            # auto, cpu, cuda, cuda:1, ...
dtype = "auto"             # [auto, float32, bfloat16, float16] autocast; auto: 16 bits on cuda, else float32
compile = False            # torch.compile of the pass that training makes
kernels = "torch"          # [torch, triton] triton: fused operations of kernels.py; not compared with --compile yet
deterministic = True       # same bits on the same machine; exact resume needs it, a GPU is a little slower with it

# --- Data ---
dataset = "gridworld"      # gridworld, donkeycar, atari:Freeway (needs ale-py), or a recording: data/recordings.py
n_train = 4096             # [>= 1, with dataset gridworld/atari] training episodes
n_val = 256                # [>= 1, with dataset gridworld/atari] episodes to evaluate on, in worlds never seen
length = 24                # [>= 2, with dataset gridworld/atari] frames of an episode
side = 8                   # [>= 2, with dataset gridworld] cells
cell_px = 8                # [>= 4, with dataset gridworld] pixels of a cell
walls = 0.15               # [>= 0.0, < 0.9, with dataset gridworld] share of the cells
ball = True                # [with dataset gridworld] with a ball that moves by itself
push = False               # [with ball] that lies still until the agent pushes it, as a box in Sokoban
facing = False             # [with dataset gridworld] the agent shows where it was pushed last, so a blocked press too
split_seed = 0             # [>= 0] which worlds there are
val_share = 0.2            # [> 0.0, < 1.0, not with dataset gridworld/atari] of a recording, its end, to evaluate on
frame_px = 64              # [>= 4, <= 1024, not with dataset gridworld/atari] pixels of a side of a film's frames
fps = None                 # [none, > 0.0, <= 1000, not with dataset gridworld/atari] frames a second of a film, at most
action_lag = 0             # [>= 0, <= 1000, not with dataset gridworld/atari] frames by which true actions act late
flip = False               # [not with dataset gridworld] half of the clips to train on mirrored: with latent actions
change_threshold = 0.0     # [>= 0.0, < 1.0] a pixel has changed that differs by more than this: cameras have noise
batch_size = 64            # [>= 1] clips per forward pass of the action model
grad_accum = 1             # [>= 1] forward passes per optimiser step

# --- Tokenizer ---
tokenizer = "spatial"      # [spatial, spatiotemporal, conv] attention within each frame, in time as well; convolutions
patch = 8                  # [>= 1] pixels of a side of a patch, of tokens and of the action model
n_head = 4                 # [>= 1] attention heads of all transformers
codebook_size = 8          # [>= 2] codes to choose from
code_dim = 8               # [>= 1] width of a code
quantiser = "vq"           # [vq, fsq] codes as running means, or fixed levels
tokenizer_layers = 1       # [>= 1, <= 1000] in encoder and decoder each
tokenizer_embd = 64        # [>= 1] width
tokenizer_batch = 16       # [>= 1] clips
tokenizer_frames = 2       # [>= 1] frames of a clip, and those that a frame sees if spatiotemporal
tokenizer_steps = 1000     # [>= 0] optimiser steps
tokenizer_change = 10.0    # [>= 0.0] extra weight of pixels that differ between frames of a clip: movers are rare
reset_interval = 20        # [none, >= 1] steps after which codes that nothing chose become encoder outputs; none: never
reset_distance = 0.5       # [>= 0.0] only outputs at least so far (squared, of unit vectors) from every living code
reset_fraction = 0.5       # [>= 0.0, <= 1.0, with reset_interval] share of the steps with resets

# --- Latent actions ---
action_model = "conv"      # [conv, transformer] of the encoder and the decoder
n_codes = 8                # [>= 2] latent actions
history = 2                # [>= 1] frames that explain the next one; with 1 what moves by itself hides the action
action_decoder = "film"    # [film, warp] writes the next frame; warp: moves the last by a flow that the code alone sets
action_quantiser = "signs" # [signs, vq] signs of normalised numbers, or the nearest of n_codes vectors
difference = True          # [with action_model conv] the encoder sees x_t+1 - x_t; False: x_t+1
action_past = True         # [with action_model conv] the encoder sees the frames before, too; False: only what changed
action_frames = "pixels"   # [pixels, tokens] what the action model sees and writes: frames, or the tokenizer's tokens
action_layers = 3          # [>= 1, <= 1000] in encoder and decoder each
action_embd = 32           # [>= 1] width
action_lr = None           # [none, > 0.0] peak learning rate of this stage; none: lr
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
token_input = "tables"     # [tables, digits] a vector for each code; or a linear map of its levels, whose logits add up
pack = 1                   # [>= 1, <= 64] so many by so many tokens share a place of the transformer
draft = False              # hidden tokens are told what the action model makes of the frame before
merge_codes = False        # [with action_source latent] codes that write the same frame are one to the dynamics, and of
                           # those that write the very frame that came next, as at a wall, one is drawn
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
play_presses = 200         # [>= 0, with dataset gridworld] the dynamics are scored by, in 20 worlds; 0: they are not
log_cache = False          # print the cache after a rollout

# --- Optimisation ---
max_steps = None           # [none, >= 0] optimiser steps of each stage; none: the stage's own number
optimizer = "muon"         # [adam, adamw, muon] muon: matrices of transformers, the rest by adamw
lr = 2e-3                  # [> 0.0] peak learning rate
muon_lr = 0.02             # [> 0.0, with optimizer muon] peak learning rate of the matrices
schedule = "cosine"        # [constant, noam, cosine, wsd] all start with a linear warm-up
warmup_steps = 50          # [>= 0] steps
decay_fraction = 0.5       # [> 0.0, <= 1.0, with schedule wsd] share of the steps in which the rate falls linearly
min_lr_scale = 0.05        # [>= 0.0, <= 1.0, with schedule cosine/wsd] the last rate over the peak
betas = (0.9, 0.99)        # [>= 0.0, < 1.0]
weight_decay = 1e-4        # [>= 0.0] on matrices only
grad_clip = 1.0            # [none, > 0.0] largest norm of the whole gradient
ema_decay = 0.0            # [>= 0.0, < 1.0] running average of the weights, evaluated in their place; 0: none

# --- Evaluation and logging ---
eval_interval = 400        # [>= 1] steps between validations
eval_clips = 512           # [>= 1] of them, spread over the validation worlds
patience = None            # [none, >= 1] validations without a better one after which a stage ends; none: never
save_interval = 200        # [>= 1] steps between checkpoints
log_interval = 10          # [>= 1] steps between lines of metrics

# Flags all the same: the commented fields of these classes.
FURTHER = {"the optimiser": "nanolab/optim.py:Settings but orthograd warmup_peak ess hess_init clip_radius "
                            "decay_params",
           "the run": "nanolab/settings.py:Common"}

presets = {
    "cpu": dict(stage="all", action_source="true", mask_rate=(0.3, 1.0), text_steps=100, frame_steps=250),
    "cpu_latent": dict(stage="all", facing=True, tokens="cells", action_frames="tokens", action_layers=1,
                       action_past=False, action_steps=2000, action_lr=4e-3, merge_codes=True, mask_rate=(0.3, 1.0),
                       n_head=2, dynamics_batch=8, dynamics_steps=2000, text_steps=100, frame_steps=250,
                       eval_interval=1000),
    "cells": dict(stage="dynamics", tokens="cells", action_source="true"),
    "video": dict(dataset="donkeycar", val_share=0.15, flip=True, change_threshold=0.05, tokenizer="conv", patch=4,
                  quantiser="fsq", codebook_size=256, tokenizer_embd=48, tokenizer_batch=16, tokenizer_frames=1,
                  tokenizer_steps=2400, tokenizer_change=0.0, history=1, action_decoder="warp", action_change=0.0,
                  batch_size=32, action_lr=2e-3, action_steps=500, token_input="digits", pack=2, draft=True,
                  mask_rate=(1.0, 1.0), context=4, dynamics_batch=8, dynamics_steps=700, dynamics_change=0.0,
                  decode_steps=1, lr=3e-3, rollout_clips=32, eval_interval=400),
}

aliases = {"d_model": "dynamics_embd", "n_actions": "n_codes", "learning_rate": "lr", "save_every": "save_interval",
           "eval_every": "eval_interval"}

debug_settings = dict(n_train=32, n_val=8, length=8, eval_clips=16, tokenizer_steps=8, action_steps=8,
                      dynamics_steps=8, text_steps=8, frame_steps=8, warmup_steps=2, eval_interval=4, save_interval=4,
                      log_interval=1, batch_size=8, tokenizer_batch=4, dynamics_batch=4, tokenizer_embd=16,
                      action_embd=8, dynamics_embd=16, text_embd=16, frame_embd=16, play_presses=8)

# These make the shape of the weights, or what a model is scored on: on resume the checkpoint's hold, of "all" always,
# of a stage once it has begun.
architecture = {
    "all": ("dataset", "n_train", "n_val", "length", "side", "cell_px", "walls", "ball", "push", "facing", "split_seed",
            "patch", "n_head", "optimizer", "val_share", "frame_px", "fps", "action_lag"),
    "tokenizer": ("tokenizer", "codebook_size", "code_dim", "quantiser", "tokenizer_layers", "tokenizer_embd",
                  "tokenizer_frames"),
    "actions": ("action_model", "n_codes", "history", "action_quantiser", "difference", "action_layers", "action_embd",
                "action_frames", "action_past", "action_decoder"),
    "dynamics": ("dynamics", "tokens", "action_source", "action_input", "context", "dynamics_layers", "dynamics_embd",
                 "token_input", "pack", "draft"),
    "text": ("text_layers", "text_embd"),
    "frame": ("tokens", "frame_layers", "frame_embd"),
}

PACE = {}                  # stage: the steps that its shares are of, its own or as many as max_seconds bring it to


# --- Settings ---

def check(settings):
    """Settings that cannot go together: UserError with one sentence."""
    if tokens == "cells" and dataset != "gridworld":
        raise UserError(f"tokens cells are the grid world's own: {dataset} has none")
    if mask_rate[0] > mask_rate[1]:
        raise UserError(f"mask_rate {mask_rate[0]:g},{mask_rate[1]:g} begins above its end")
    if action_quantiser == "signs" and n_codes & (n_codes - 1):
        raise UserError(f"n_codes {n_codes}: signs make a power of two, 2, 4, 8, ...; --action_quantiser vq takes any")
    if action_model == "transformer" and not difference:
        raise UserError("no-difference goes with action_model conv: the transformer sees frames beside differences")
    if action_decoder == "warp" and (action_model, action_frames) != ("conv", "pixels"):
        raise UserError("action_decoder warp goes with action_model conv and action_frames pixels: it moves those")
    if packed() and (dynamics, tokens) != ("maskgit", "tokenizer"):
        raise UserError("token_input digits, pack and draft go with dynamics maskgit and tokens tokenizer")
    if token_input == "digits" and quantiser != "fsq":
        raise UserError("token_input digits reads the levels of an FSQ: --quantiser fsq")
    if draft and (token_input, action_source, action_frames, history) != ("digits", "latent", "pixels", 1):
        raise UserError("draft goes with token_input digits, action_source latent, action_frames pixels and history 1: "
                        "the action model writes a frame from the one before")
    if flip and action_source == "true":
        raise UserError("flip goes with action_source latent: nobody knows which true actions a mirror exchanges")
    axial = ["dynamics_embd", "frame_embd"] + ["tokenizer_embd"] * (tokenizer != "conv") + ["action_embd"] * (
        action_model == "transformer")
    for name in (*axial, "text_embd"):
        unit, how = (2 * n_head, "") if name == "text_embd" else (4 * n_head, " by row and column")
        if settings[name] % unit:
            raise UserError(f"{name} {settings[name]}: {n_head} heads that turn{how} need a multiple of {unit}")
    with as_user_error():
        if quantiser == "fsq":
            fsq_levels(codebook_size)
        for name in STAGES:
            optim.check({**settings, "max_steps": steps_of(name)})


def check_sizes(settings, video):
    """UserError where the data does not fit the settings, or the machine what they ask for."""
    rows, columns = video.height // patch, video.width // patch
    if video.height % patch or video.width % patch:
        raise UserError(f"patch {patch} does not divide frames of {video.height} x {video.width}")
    if rows % pack or columns % pack:
        raise UserError(f"pack {pack} does not divide {rows} x {columns} tokens")
    if (action_decoder == "warp" or draft) and video.palette is not None:
        raise UserError(f"action_decoder warp and draft are for a camera's colours: those of {dataset} are a palette's")
    if action_source == "true" and not video.n_actions:
        raise UserError(f"action_source true: {dataset} has no actions")
    pixels = 12 * video.height * video.width                 # of a frame, float32
    for part in STAGES.values():
        clips = settings[part.batch]
        limits.fits(clips * max(pixels * part.frames(), 8 * grad_accum), f"a {part.batch} of {clips} clips", device)
    widest, deepest = (max(settings[name] for name in settings if name.endswith(end)) for end in ("_embd", "_layers"))
    if widest * max(widest * deepest, patch ** 2 * history, codebook_size, n_codes) > 1e7 or codebook_size > 1e7:
        for name in STAGES if stage == "all" else (stage,):
            if stage != "all" or video.cell_px or name not in ("text", "frame"):
                limits.weigh(lambda: build(name, video), device)    # which takes a second
    longest, held = max(context, history + 4, tokenizer_frames), min(video.train.length, video.val.length)
    if longest > held:
        raise UserError(f"clips of {longest} frames do not fit into episodes of {held}: take a smaller context, "
                        "history or tokenizer_frames")


def steps_of(name, settings=None):
    """Optimiser steps of a stage, by these settings or those of now."""
    settings = settings or globals()
    return settings[STAGES[name].steps] if settings["max_steps"] is None else settings["max_steps"]


def out_of_time(loop):
    """Whether a stage whose training stands at `loop` has had its max_seconds."""
    return loop["seconds"] >= (globals().get("max_seconds") or math.inf)


def is_over(name, loop):
    """Whether a stage whose training stands at `loop` ends there: its steps, patience or time are at an end."""
    return loop["step"] >= steps_of(name) or loop["waited"] >= (patience or math.inf) or out_of_time(loop)


def shares_of(name):
    """Steps that a stage's shares are of."""
    return PACE.get(name) or steps_of(name)


def falling(step, steps, first, fraction):
    """A weight that falls from `first` to none in a share of the steps, a line."""
    return first * max(0.0, 1 - step / (fraction * steps)) if steps else 0.0


def packed():
    """Whether the dynamics' ends are those of a camera's frames."""
    return token_input == "digits" or pack > 1 or draft


def generation():
    """How the dynamics generate, but for chance."""
    return dict(window=window, steps=decode_steps)


def sizes(video):
    """Height, width, pixels of a patch's side, colours of the palette (None: RGB)."""
    return video.height, video.width, patch, None if video.palette is None else len(video.palette)


def token_sizes(video):
    """Rows and columns of a frame's tokens, and how many tokens there are to choose from."""
    if tokens == "cells":
        return (side, side), 8 if facing else 4
    return (video.height // patch, video.width // patch), codebook_size


# --- Each stage: its untrained model, what a pass reads of clips index (B,), what it makes of that ---
#
# A `read_` returns a batch, whose last entry is what each target weighs, and a `_loss` (the mean by these weights, what
# a codebook chose: a Quantised, or None). A step does not depend on how its grad_accum passes divide it: its loss is a
# sum over all of them over the sum of their weights, and the masks `hidden` are drawn for all its clips at once.

def build_tokenizer(video):
    if tokenizer == "conv":
        return ConvTokenizer(*sizes(video), codebook_size, code_dim, tokenizer_layers, tokenizer_embd, quantiser)
    return Tokenizer(*sizes(video), codebook_size, code_dim, tokenizer_layers, n_head, tokenizer_embd, tokenizer,
                     quantiser, tokenizer_frames)


def read_tokenizer(reader, index, step, hidden=None):
    """(frames, palette indices, weight (B, T, H, W)): pixels that differ between frames of a clip weigh more."""
    frames, indices = reader.pictures(index, tokenizer_frames)
    moving = measures.changed(frames, frames[:, :1], change_threshold).any(1, keepdim=True).expand(frames.shape[:-1])
    return frames, indices, 1 + tokenizer_change * moving


def tokenizer_loss(model, batch):
    """Of reconstructing clips."""
    frames, indices, weight = batch
    written, found = model(frames)
    return pixel_loss(written, frames, indices, weight), found


def build_actions(video):
    """Over pixels or over tokens."""
    how = history, n_codes, action_embd, action_layers, action_model, action_quantiser, n_head, difference
    if action_frames == "pixels":
        return ActionModel(*sizes(video), *how, past=action_past, decoder=action_decoder)
    grid, K = token_sizes(video)
    return ActionModel(*grid, 1, K, *how, channels=K, past=action_past)


def read_actions(reader, index, step, hidden=None):
    """(frames, palette indices of the targets, are codes soft, weight (B, targets, H, W)).

    Pixels that change weigh more at first, since a model that copies is otherwise nearly right; but no longer at the
    end, since a weight that stays moves the likeliest colour and paints movers where there are none.
    """
    frames, indices = reader.watch(index, history + 1)
    first = min(2, history) if action_model == "transformer" else history         # frame that is a target
    extra = falling(step, shares_of("actions"), action_change, action_change_fraction)
    weight = 1 + extra * measures.changed(frames[:, first:], frames[:, first - 1:-1], change_threshold)
    return frames, None if indices is None else indices[:, first:], step < soft_fraction * shares_of("actions"), weight


def actions_loss(model, batch):
    """Of writing the last frame of each clip from those before and a code; the transformer writes every frame from the
    third on. Not linear in the batch with action_quantiser signs: they are normalised by the clips of one pass."""
    frames, targets, soft, weight = batch
    if action_model == "transformer":
        written, found = model.every(frames, soft=soft)
        written = written[:, -weight.size(1):]
    else:
        written, found = model(frames, soft=soft)
        written = written[:, None]
    return pixel_loss(written, frames[:, -weight.size(1):], targets, weight), found


def build_dynamics(video):
    n_actions = n_codes if action_source == "latent" else video.n_actions
    how, block_size = (*token_sizes(video), n_actions, dynamics_layers, n_head, dynamics_embd), max(16, context)
    if dynamics == "causal":
        return CausalDynamics(*how, block_size)
    if packed():
        codebook = FSQ(codebook_size) if token_input == "digits" else None
        return PackedDynamics(*how, action_input, block_size, pack, codebook, draft)
    return Dynamics(*how, action_input, block_size)


def first_target():
    """The first frame of a clip of the dynamics that is a target."""
    return min(2, context - 1) if streams or dynamics == "causal" else context - 1


def hide(shape, noise):
    """(..., N) bool: the tokens of each frame to be hidden, a share of them between the two of mask_rate."""
    low, high = mask_rate
    rate = low + (high - low) * torch.rand(*shape[:-1], 1, generator=noise, device=noise.device)
    return torch.rand(shape, generator=noise, device=noise.device) < rate


def hide_in_clips(n, n_tokens, noise):
    """(n, T, N) bool: the tokens that the dynamics are asked for; causal: all from the first target on."""
    shape = n, context, n_tokens
    hidden = torch.ones(shape, dtype=torch.bool, device=noise.device) if dynamics == "causal" else hide(shape, noise)
    hidden[:, :first_target()] = False
    return hidden


def read_dynamics(reader, index, step, hidden):
    """(tokens (B, T, N), actions (B, T), hidden, with `draft` the frames before the targets, weight (B, targets, N)):
    tokens that change weigh more at first."""
    truth, acts = reader.tokens_and_actions(index, context)
    if reader.merged is not None:
        places = index.numpy()[:, None] * context + np.arange(context)
        acts = reader.redraw(index, acts, draw.pair_hash(places, step, data_seed))
    first, extra = first_target(), falling(step, shares_of("dynamics"), dynamics_change, dynamics_change_fraction)
    before = reader.frames(index, context)[:, first - 1:-1] if draft else None
    return truth, acts, hidden, before, (1 + extra * (truth[:, first:] != truth[:, first - 1:-1])) * hidden[:, first:]


def dynamics_loss(model, batch):
    """Of naming the hidden tokens of frames, given those before them and the actions: mean nats. With `streams` all
    frames but the first two are targets, each seeing the true frames before it; else the last."""
    truth, acts, hidden, before, weight = batch
    T, first, how = truth.size(1), first_target(), {} if before is None else dict(before=before)
    seen = truth if dynamics == "causal" else truth.masked_fill(hidden, model.mask)
    if streams and dynamics == "maskgit":
        how |= dict(streams=(T - 1, first))
        seen, acts = torch.cat((truth[:, :-1], seen[:, first:]), 1), torch.cat((acts[:, :-1], acts[:, first:]), 1)
    logits = model(seen, acts, window=window, **how)[:, first - T:]               # of the targets, which are the last
    nats = cross_entropy(logits.flatten(0, 2), truth[:, first:].flatten())
    return (nats * weight.flatten()).sum() / weight.sum().clamp(min=1), None


def read_text(reader, index, step, hidden=None):
    """(characters (B, S), weight): as many as there are, and the end of each caption."""
    text = reader.captions(index)
    return text, (text != 0).sum() + len(text)


def text_loss(model, batch):
    """Of writing captions, in nats a character."""
    return model.nats(batch[0]), None


def hide_in_frames(n, n_tokens, noise):
    """(n, N) bool: the tokens of frames that are asked for."""
    hidden = hide((n, n_tokens), noise)
    hidden[:, 0] |= ~hidden.any(1)                            # a row with nothing to name would have no mean
    return hidden


def read_frame(reader, index, step, hidden):
    """(tokens (B, N), captions (B, S), hidden)."""
    return reader.tokens(index, 1)[:, 0], reader.captions(index), hidden


def frame_loss(model, batch):
    """Of naming the hidden tokens of a frame that a caption describes."""
    truth, text, hidden = batch
    logits = model(truth.masked_fill(hidden, model.codebook_size), model.read(text))
    truth = truth.masked_fill(~hidden, -1)
    if readable(hidden):                                      # elsewhere nobody counts them
        logits, truth = logits[hidden], truth[hidden]
    return cross_entropy(logits.flatten(0, -2), truth.flatten(), reduction="mean"), None


# --- The table of stages ---

@dataclass
class Stage:
    """One of the models of a world, and what tells it from the others."""
    build: Callable                         # (video) -> its untrained model
    read: Callable                          # (reader, index (B,), step, hidden) -> a batch
    loss: Callable                          # (model, batch) -> (loss, Quantised or None)
    evaluate: Callable                      # (model, reader) -> {name: figure}, score among them
    draw: Callable                          # (model, reader) -> {title: frames}, or texts
    steps: str                              # the settings that say how many optimiser steps,
    batch: str                              # and how many clips a pass
    frames: Callable                        # () -> frames of a clip
    shown: str                              # figures in the line of a validation, beside the loss
    hide: Callable | None = None            # (clips, tokens of a frame, noise) -> the mask `hidden` of a step
    needs: Callable = lambda: ()            # () -> the stages that it reads
    method: Callable = lambda: "forward"    # () -> the name of the model's pass in training
    codebook: Callable = lambda model: None  # (model) -> what follows the codes of each step, if anything does
    commitment: float = 1.0                 # weight of the loss that the Quantised has itself


def reads_tokens():
    """The stage by which frames become tokens, if there is one."""
    return ("tokenizer",) * (tokens == "tokenizer")


STAGES = {
    "tokenizer": Stage(
        build_tokenizer, read_tokenizer, tokenizer_loss,
        lambda model, val: measures.evaluate_tokenizer(model, val, max(2, tokenizer_frames), eval_clips,
                                                       change_threshold),
        lambda model, val: worlds.draw_tokenizer(model, val, tokenizer_frames),
        steps="tokenizer_steps", batch="tokenizer_batch", frames=lambda: tokenizer_frames,
        shown="psnr frame_psnr ssim changed_psnr usage perplexity",
        codebook=lambda model: model.codebook if quantiser == "vq" else None, commitment=0.25),
    "actions": Stage(
        build_actions, read_actions, actions_loss,
        lambda model, val: measures.evaluate_actions(model, val, eval_clips), worlds.draw_actions,
        steps="action_steps", batch="batch_size", frames=lambda: history + 1,
        shown="information majority usage psnr_1 frame_psnr_1 copy_1 dpsnr_1 dpsnr_4 consistency",
        method=lambda: "every" if action_model == "transformer" else "forward", codebook=lambda model: model.quantiser,
        needs=lambda: reads_tokens() * (action_frames == "tokens")),
    "dynamics": Stage(
        build_dynamics, read_dynamics, dynamics_loss,
        lambda model, val: measures.evaluate_dynamics(model, val, context, eval_clips, window, dynamics == "causal"),
        lambda model, val: worlds.draw_dynamics(model, val, context, temperature=0.0, **generation()),
        steps="dynamics_steps", batch="dynamics_batch", frames=lambda: context,
        shown="tokens changed agent ball frame copy", hide=hide_in_clips,
        needs=lambda: reads_tokens() + ("actions",) * (action_source == "latent")),
    "text": Stage(
        lambda video: Writer(caption_length(side), text_layers, n_head, text_embd), read_text, text_loss,
        lambda model, val: measures.evaluate_text(model, val, eval_clips),
        lambda model, val: model.write(8, generator=torch.Generator().manual_seed(0)),
        steps="text_steps", batch="text_batch", frames=lambda: 1, shown="perplexity valid different",
        method=lambda: "nats"),
    "frame": Stage(
        lambda video: FirstFrame(*token_sizes(video), frame_layers, n_head, frame_embd, caption_length(side)),
        read_frame, frame_loss,
        lambda model, val: measures.evaluate_frame(model, val, eval_clips, decode_steps),
        lambda model, val: worlds.draw_frame(model, val, decode_steps),
        steps="frame_steps", batch="frame_batch", frames=lambda: 1, shown="tokens frame drawn floor",
        hide=hide_in_frames, needs=reads_tokens),
}


def build(name, video, models=None):
    """The untrained model of a stage, which may draft by the trained models. UserError: its sizes do not go
    together."""
    with as_user_error():
        model = STAGES[name].build(video)
    if name == "dynamics" and draft:
        model.sources = models
    return model


def in_words(name, numbers):
    """The line of a validation."""
    return measures.in_line({key: numbers[key] for key in ("loss", *STAGES[name].shown.split()) if key in numbers})


def plan(checkpoint, done, ended, video, only_read):
    """(stages to train now, in order; {stage: what it goes on from, its end or the checkpoint}; those that begin anew),
    or UserError.

    done, ended: of the checkpoint, see `World`. A stage that has learned from one that goes on begins anew.
    """
    words = ("text", "frame") if video.cell_px else ()       # where the data has any
    if stage in ("text", "frame") and not words:
        raise UserError(f"stage {stage} learns captions of grid worlds: {dataset} has none")
    everything = "dynamics", *STAGES["dynamics"].needs(), *words
    wanted = [name for name in STAGES if name in (everything if stage == "all" else (stage,))]
    longer, anew, begun = [], [], checkpoint and checkpoint["stage"]
    if checkpoint and not only_read:
        longer = [name for name in wanted if name in done and name in ended and not is_over(name, ended[name]["loop"])]
        anew = [name for name in STAGES if name in (*done, begun) and set(STAGES[name].needs()) & set(longer)]
        longer = [name for name in longer if name not in anew]
        for name in anew:
            read = " and ".join(other for other in STAGES[name].needs() if other in longer)
            if name not in wanted:
                raise UserError(f"stage {name} has learned from stage {read} as it is, which would go on: --stage all "
                                f"begins {name} anew, or leave {read} its steps")
            print(f"stage {name} begins anew: it has learned from stage {read}, which goes on")
        for name in wanted:
            if name in done and name not in ended and steps_of(name) > steps_of(
                    name, globals() | checkpoint["settings"]):
                print(f"stage {name} stays as it is: {checkpoint.path} holds its best weights only, from which no more "
                      "steps follow")
    left = [name for name in wanted if name not in done or name in (*longer, *anew)]
    was = {name: ended[name] for name in longer}
    if checkpoint and begun not in (*longer, *anew):
        left.sort(key=lambda name: name != begun)             # what was begun is ended first
        if begun in left:
            was[begun] = checkpoint
    for name in left:
        missing = [other for other in STAGES[name].needs() if other not in done and other not in wanted]
        if missing:
            raise UserError(f"stage {name} reads what stage {missing[0]} learns: --stage {missing[0]} first, then "
                            f"--resume --stage {name}; or --stage all")
    if checkpoint and begun not in done and begun not in left:
        raise UserError(f"this run is in the middle of stage {begun}: --resume --stage {begun} ends it first")
    return left, was, anew


def check_left(left):
    """Settings by which a stage to train would have nothing to learn: UserError."""
    signs, rows = "actions" in left and action_quantiser == "signs", batch_size
    if signs and rows * (1 if action_model == "conv" else history) < 3:
        raise UserError(f"batch_size {rows}: signs are normalised over a pass's codes, of which there must be 3: "
                        "of two each is 1 or -1 whatever was seen; --action_quantiser vq takes any")
    if "tokenizer" in left and quantiser == "vq" and code_dim == 1:
        raise UserError("code_dim 1: vq compares unit vectors, and of one number they are 1 and -1, without a "
                        "gradient: 2 or more, or --quantiser fsq")
    if "dynamics" in left and dynamics == "maskgit" and not mask_rate[1]:
        raise UserError("mask_rate 0,0 hides no token: the dynamics would have nothing to learn")
    if signs and grad_accum > 1:
        print(f"signs are normalised over the {rows} clips of each pass: grad_accum {grad_accum} is not one pass over "
              f"{rows * grad_accum}")


# --- A stage in training ---

@dataclass
class World:
    """What a run has of its world: the data as the models read it, and the stages that are finished."""
    video: object
    train: worlds.Reader
    val: worlds.Reader
    models: dict    # stage: trained model
    done: dict      # stage: its weights, the best on validation
    ended: dict     # stage: what it goes on from, if it is asked for more
    figures: dict   # stage: what the summary says of it
    total: int      # optimiser steps of all stages so far
    precision: torch.dtype
    autocast: torch.autocast


def compiled(model, name):
    """The model with the pass that training makes compiled; weights are shared, evaluation and generation stay as they
    are: the lengths of a cache change from call to call."""
    fast, method = copy.copy(model), STAGES[name].method()
    setattr(fast, method, torch.compile(getattr(model, method)))
    return fast


@torch.no_grad()
def passes_of(name, model, reader, index, step, noise):
    """A step's passes over clips index (M,): [(clips (B,), their mask, their share of the step's weights)]."""
    how, size = STAGES[name], globals()[STAGES[name].batch]
    hidden = how.hide(len(index), model.n_tokens, noise).split(size) if how.hide else [None] * grad_accum
    passes = list(zip(index.split(size), hidden))
    if len(passes) == 1:
        return [(*passes[0], 1.0)]
    weights = [how.read(reader, part, step, mask)[-1].sum() for part, mask in passes]
    total = sum(weights).clamp(min=1)
    return [(*part, weight / total) for part, weight in zip(passes, weights)]


class Learner:
    """A stage in training: its model, and all that the rest of its training depends on. parts: what a checkpoint holds
    of it, by its names there."""

    def __init__(self, name, world, settings):
        self.name, self.world, self.stage, where = name, world, STAGES[name], world.train.device
        self.settings = {**settings, "lr": action_lr if name == "actions" and action_lr else lr,
                         "max_steps": steps_of(name)}
        seed_everything(seed, deterministic)
        self.model = build(name, world.video, world.models).to(where)
        self.trained = compiled(self.model, name) if compile else self.model
        self.opt = optim.build(self.settings, self.model.named_parameters(), parameter_roles(self.model),
                               fused_rows(self.model))
        self.ema = optim.EMA(self.model, ema_decay) if ema_decay else None
        self.codebook = self.stage.codebook(self.model)
        self.noise = torch.Generator(where).manual_seed(seed)      # masks
        self.revival = torch.Generator().manual_seed(seed)         # which encoder outputs dead codes become
        _, self.scaler = mixed_precision(where, world.precision)
        self.loop = Loop(dict(step=0, evaluated=-1, best=-math.inf, best_step=0, best_model=None, waited=0, pending=[],
                              seconds=0.0, logged_seconds=0.0, clips=0, start=world.total,
                              chosen=torch.zeros(codebook_size, dtype=torch.int64, device=where)), self.scaler)
        self.clips = Stream(world.video.train, self.stage.frames(), globals()[self.stage.batch] * grad_accum, data_seed)
        self.parts = dict(stage=name, model=self.model, optimizer=self.opt, ema=self.ema, scaler=self.scaler,
                          generators=Generators(noise=self.noise, revival=self.revival), loop=self.loop)

    def evaluated(self, place, clock):
        """(figures, weights) of the weights to evaluate, of which samples go to files that begin with `place`."""
        world, model = self.world, self.model.eval()
        clock.start()
        with optim.evaluated(self.opt, self.ema):
            with world.autocast:
                numbers = self.stage.evaluate(model, world.val)
            clock.lap("evaluation")
            weights = copy.deepcopy(model.state_dict())
            with torch.no_grad(), world.autocast, optional("samples are"):
                save_samples(place, self.stage.draw(model, world.val))
        model.train()
        return numbers, weights

    def step(self, clock):
        """One optimiser step, whose numbers go to the loop."""
        loop, world, stage = self.loop, self.world, self.stage
        step, row, outputs, chosen = loop["step"], dict(loss=0.0), [], []
        clock.start()
        with world.autocast:
            passes = passes_of(self.name, self.model, world.train, self.clips.at(step), step, self.noise)
        for index, hidden, share in passes:
            clock.lap("data")                                 # which clips; what is made of them belongs to the pass
            with world.autocast:
                loss, found = stage.loss(self.trained, stage.read(world.train, index, step, hidden))
                loss = loss * share
                objective = loss if found is None else loss + stage.commitment * found.loss / grad_accum
            clock.lap("forward")
            self.scaler.scale(objective).backward()
            clock.lap("backward")
            row["loss"] = row["loss"] + loss.detach()
            if found is not None:
                outputs.append(found.z.detach().flatten(0, -2))
                chosen.append(found.codes.flatten())
        row["grad_norm"] = optim.take_step(self.opt, self.scaler, self.model.parameters(), grad_clip, self.ema)
        if self.codebook is not None:                         # once a step, by all of its passes
            self.codebook.follow(torch.cat(outputs), torch.cat(chosen))
        clock.lap("optimiser")
        loop.add(row)
        loop.update(step=step + 1, clips=loop["clips"] + self.clips.batch_size)
        if self.name == "tokenizer":
            self.revive(torch.cat(outputs), torch.cat(chosen))

    def revive(self, outputs, chosen):
        """Counts which of the tokenizer's codes a step has chosen; every reset_interval steps, in a share of all steps,
        the codes (K) that nothing chose become encoder outputs (M, D)."""
        loop = self.loop
        loop["chosen"].index_add_(0, chosen, torch.ones_like(chosen))
        if self.codebook is not None and reset_interval and loop["step"] % reset_interval == 0:
            if loop["step"] <= reset_fraction * shares_of("tokenizer"):
                self.codebook.revive(loop["chosen"] == 0, outputs, self.revival, reset_distance)
            loop["chosen"].zero_()


def on_cpu(value):
    """A copy of nested dicts and lists of tensors and plain values, on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def finish(learner, run, clock):
    """A stage is one of world's: its best weights serve the later ones."""
    name, world, loop = learner.name, learner.world, learner.loop
    world.ended[name] = on_cpu(run.states("model", "optimizer", "ema", "scaler", "generators", "loop"))
    world.done[name] = loop["best_model"]
    del world.ended[name]["loop"]["best_model"]
    learner.model.load_state_dict(world.done[name])
    world.models[name] = learner.model.eval().requires_grad_(False)
    world.total = loop["start"] + loop["step"]
    clock.start()
    world.figures[name] = last_figures(name, world, loop)
    clock.lap("evaluation")
    run.summary(**world.figures[name], **{f"{name}_seconds": loop["seconds"]})
    run.save("last.pt", world.total)                          # with its figures, which are not counted again


# --- What a finished stage is worth ---

def know_codes(train, val):
    """What the dynamics are told of latent actions: one code for those that write the same frame."""
    if merge_codes and action_source == "latent":
        train.merged = val.merged = None
        stands = worlds.same_codes(train, eval_clips)
        print("codes that write the same frame: " + (", ".join(
            f"{code} as {other}" for code, other in enumerate(stands.tolist()) if code != other) or "none"))
        train.merged = val.merged = stands.to(train.device)


def last_figures(name, world, loop):
    """What the summary says of a finished stage: its figures, of actions their floors, of dynamics rollouts."""
    model, val = world.models[name], world.val
    with world.autocast:
        numbers = STAGES[name].evaluate(model, val)
    found = {f"{name}_{key}": value for key, value in numbers.items()} | {f"{name}_best_step": loop["best_step"]}
    print(f"{name}: best at step {loop['best_step']}: {in_words(name, numbers)}; {loop['seconds']:.0f} s")
    if name == "actions" and "information" in numbers:
        beside = floors(model, world.video, world.train, val)
        found |= {f"actions_{key}": value for key, value in beside.items()}
        print(f"floors: moved or not {numbers['moved_information']:.3f}, " + measures.in_line(beside))
    if name == "tokenizer":
        found["tokenizer_copy_psnr"] = measures.copy_psnr(val, max(2, tokenizer_frames), eval_clips)
    if name == "dynamics":
        found |= tell_dynamics(world)
    found = {key: None if math.isnan(value) else value for key, value in found.items()}
    doubts = measures.doubts(name, found)
    for line in doubts.values():
        print(f"warning: {name}: {line}")
    return found | {f"{name}_flags": [*doubts]}


def floors(model, video, train, val):
    """What the figures of actions are seen beside: those of the untrained model, and of a linear map; of a recording
    what its codes say by chance, and by what was counted on the training part."""
    with torch.random.fork_rng(devices=[]):
        seed_everything(seed, deterministic)
        clips = Stream(train.clips, history + 1, batch_size, data_seed)
        found = measures.untrained_floor(build("actions", video).to(train.device), train, val,
                                         [clips.at(step) for step in range(8)], eval_clips)
    if val.side is None:
        found |= measures.against_time(model, train, val, eval_clips)
    return found | measures.linear_probe(train, val, history + 1, eval_clips)


def tell_dynamics(world):
    """The figures of the dynamics' rollouts, and where it is known what a press should do of playing them, in print and
    returned."""
    model, train, val = world.models["dynamics"], world.train, world.val
    numbers = measures.evaluate_rollouts(model, val, context, rollout_clips, temperature=temperature, **generation())
    if val.side is None:
        numbers |= measures.rollout_floors(train, val, context, rollout_clips)
    told = " by the actions inferred from the true frames to come" * (action_source == "latent")
    print(f"rollouts{told}: {measures.in_line(numbers)}")
    found = {f"rollout_{key}": value for key, value in numbers.items()}
    if world.video.cell_px and play_presses:
        codes = range(world.video.n_actions) if action_source == "true" else measures.meanings_of(train, eval_clips)[1]
        numbers = worlds.play_score(val, globals(), codes, play_presses)
        print(f"played: {measures.in_line(numbers)}")
        found |= {f"play_{key}": value for key, value in numbers.items()} | {"play_presses": play_presses}
    return found


def show(world, settings, checkpoint):
    """A world that is there: played in the browser, written down as a rollout, or measured."""
    models, train, val = world.models, world.train, world.val
    if "dynamics" in models:
        know_codes(train, val)
    if eval_only:
        for name, model in models.items():
            with world.autocast:
                print(f"{name}: {in_words(name, STAGES[name].evaluate(model, val))}")
        if "dynamics" in models:
            tell_dynamics(world)
        return
    if "dynamics" not in models:
        raise UserError(f"{checkpoint.path} has no dynamics yet, only {', '.join(models) or 'nothing finished'}: "
                        "--resume --stage dynamics trains them")
    meant = measures.meanings_of(train, eval_clips) if action_source == "latent" else (None, None)
    told = measures.of_play({"play_presses": play_presses} | world.figures.get("dynamics", {}))
    played = Session(val, world.video, settings, *meant, *told)
    if play is not None:
        return serve(played, port)
    chosen = parse_actions(actions, len(played.actions))
    paths = write_rollout(played, chosen, prompt, checkpoint.path.parent)
    print("wrote " + " and ".join(map(str, paths)))
    if log_cache:
        print("\n".join(played.cache.log()))


# --- The run ---

@command
def main():
    # ---- settings: flags, preset, and on resume the checkpoint's ----
    settings = begin(globals())
    if (shown := play or rollout) is not None:               # RUN: its directory, or its name
        named = Path(settings["out_dir"], "train_worldmodel", shown)
        settings.put(resume=str(named if named.exists() and not Path(shown).exists() else shown))
    only_read = eval_only or shown is not None
    checkpoint = resumed(settings, architecture, ("eval_only", "play", "rollout"), ("port", "actions", "prompt"))
    where, precision = resolve_device(device, dtype)

    # ---- data ----
    check(settings)
    video = load(dataset, n_train, n_val, length, side, cell_px, walls, ball, split_seed, val_share, facing=facing,
                 push=push, action_lag=action_lag, frame_px=frame_px, fps=fps)
    check_sizes(settings, video)
    video.train.mirror = flip and video.palette is None
    if not only_read:
        settings.check_data(checkpoint, architecture["all"][:10], video.hash)
    print(video.source)

    # ---- what is trained already, and what is next ----
    done, ended, figures = (dict(checkpoint.get(key, {})) if checkpoint else {} for key in ("done", "ended", "figures"))
    with restoring(checkpoint.path) if checkpoint else nullcontext():
        left, was, anew = plan(checkpoint, done, ended, video, only_read)
        to_do = sum(steps_of(name) - (was[name]["loop"]["step"] if name in was else 0) for name in left)
        if not only_read:
            check_left(left)
        seed_everything(seed, deterministic)
        models = {}
        for name in done:
            models[name] = build(name, video, models).to(where)
        for name, model in models.items():
            model.load_state_dict(done[name])
            model.eval().requires_grad_(False)
    train, val = (worlds.Reader(clips, video.palette, where, models, tokens, action_source, video.n_actions, n_codes,
                                action_frames)
                  for clips in (video.train, video.val))
    world = World(video, train, val, models, done, ended, figures, checkpoint["step"] if checkpoint else 0, precision,
                  mixed_precision(where, precision)[0])
    if only_read:
        return show(world, settings, checkpoint)

    limits.notes(settings, {f"{name} steps": steps_of(name) for name in left},
                 checkpoint and {f"{checkpoint['stage']} steps": steps_of(checkpoint["stage"], checkpoint["settings"])})
    with Run(settings, checkpoint, done=done, ended=ended, figures=figures) as run:
        for name in [name for name in figures if name not in left]:
            seconds = {f"{name}_seconds": ended[name]["loop"]["seconds"]} if name in ended else {}
            run.summary(**figures[name], **seconds)
        if video.cell_px is None:
            with optional("the picture of the data is"):
                (run.dir / "samples").mkdir(exist_ok=True)
                draw_clips(video, run.dir / "samples" / "data.png")
        bar, clock = run.bar(world.total + to_do, world.total), Stopwatch(where, run)

        # ---- the stages, one after the other ----
        for name in left:
            before, going = was.get(name), name in was and was[name] is checkpoint
            if before and not going:
                before["loop"] |= dict(best_model=done[name], start=world.total - before["loop"]["step"])
                print(f"stage {name} goes on from step {before['loop']['step']}; what is a share of its steps is one "
                      f"of {steps_of(name)}")
                for other in (name, *(other for other in anew if name in STAGES[other].needs())):
                    for kept in (models, done, ended, figures):
                        kept.pop(other, None)
            if name == "dynamics":
                know_codes(train, val)
            learner = Learner(name, world, settings)
            run.track(before, **learner.parts)                # on resume, goes on where the checkpoint was saved
            loop, limit, patches = learner.loop, steps_of(name), (video.height // patch) * (video.width // patch)
            clip_tokens = caption_length(side) if name == "text" else learner.stage.frames() * patches
            print(f"stage {name}: {sum(p.numel() for p in learner.model.parameters()):,} parameters, {limit} steps")
            first = loop["start"]                             # steps of the stages before
            saved = loop["step"] if going and not settings["keep_every"] else None
            if saved is None:
                run.save("last.pt", first + loop["step"])

            while not run.stop:
                # ---- validate and save: before the step, so that a run that stops here does on resume what was due --
                step = loop["step"]
                if (step % eval_interval == 0 or step == limit or out_of_time(loop)) and loop["evaluated"] < step:
                    loop.flush()
                    loop["evaluated"] = step
                    numbers, weights = learner.evaluated(run.dir / "samples" / f"{name}_{step:06d}", clock)
                    run.log(step=first + step, split="val", stage=name, stage_step=step, **numbers)
                    bar.note(f"{name} {step}: {in_words(name, numbers)}")
                    loop["waited"] += 1
                    if numbers["score"] > loop["best"] or loop["best_model"] is None:
                        loop.update(best=numbers["score"], best_step=step, best_model=weights, waited=0)
                        run.save("best.pt", first + step, done={**done, name: weights})
                if saved is None or saved != step and (step % save_interval == 0 or is_over(name, loop)):
                    run.save("last.pt", first + step)
                    saved = step
                if is_over(name, loop):
                    break

                # ---- one optimiser step ----
                began = time.perf_counter()
                rate = optim.set_rate(learner.opt, learner.settings, step, loop["seconds"])
                PACE[name] = optim.horizon(learner.settings, step, loop["seconds"])
                learner.step(clock)

                # ---- log ----
                step = loop["step"]
                rows, elapsed = loop.lap(began, step % log_interval == 0)
                if rows:
                    line, speed = means(rows), loop["clips"] / elapsed
                    run.log(step=first + step, split="train", stage=name, stage_step=step, **line, lr=rate,
                            clips_per_s=speed, tokens_per_s=speed * clip_tokens, seconds=loop["seconds"])
                    loop["clips"] = 0
                    bar.update(first + step, f"{name} loss {line['loss']:.4f}")

            # ---- the end ----
            if not run.stop:
                finish(learner, run, clock)
            elif saved != loop["step"]:
                run.save("last.pt", first + loop["step"])
            if run.stop:
                break
        bar.close()
        run.summary(step=world.total, hash=video.hash, stages=list(done))
        run.spent(clock)
        print(f"{'stopped' if run.stop else 'done'}: {run.dir}")


if __name__ == "__main__":
    main()
