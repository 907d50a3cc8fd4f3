"""What tests of train_worldmodel.py share: grid worlds of 12 and 24 clips with a ball or without, the script's settings
for one test, its stages asked by name, and figures written out."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_worldmodel as w
from data.video import AGENT, MOVES, World, load, paint, read_cells, render
from models import world_measures as m
from nanolab.world import Reader

SIDE, PX, HISTORY, CONTEXT = 5, 4, 2, 4
SHARP = 8.0  # logit of what a stub names, the others' are 0


def some(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def decibels(error):
    return -10 * math.log10(max(error, 1e-10))


def near(value, tolerance=1e-4):
    return pytest.approx(value, rel=tolerance, abs=tolerance)


SMALL = dict(side=SIDE, cell_px=PX, patch=PX, history=HISTORY, n_codes=8, codebook_size=8, eval_clips=70,
             rollout_clips=70, context=CONTEXT, window=3, tokens="cells", action_source="true", max_steps=None,
             tokenizer_frames=3, decode_steps=3)
video = load("gridworld", 12, 24, 20, SIDE, PX)
still = load("gridworld", 12, 24, 20, SIDE, PX, ball=False)  # a frame says all: World goes on from it exactly


def reader(clips, palette=None, models=None, n_actions=5):
    """Of clips, by the settings of the script."""
    return Reader(clips, palette, "cpu", models, w.tokens, w.action_source, n_actions, w.n_codes)


def material(video, part="val", models=None):
    return reader(getattr(video, part), video.palette, models)


def evaluate(stage, model, shown):
    return w.STAGES[stage].evaluate(model, shown)


def rollouts(model, shown):
    return m.evaluate_rollouts(model, shown, w.context, w.rollout_clips, temperature=w.temperature, **w.generation())


def loss_of(stage, model, shown, index, step=0, seed=0):
    """(loss, what the codebook chose) of one pass over clips."""
    stage, noise = w.STAGES[stage], torch.Generator().manual_seed(seed)
    hidden = stage.hide(len(index), SIDE * SIDE, noise) if stage.hide else None
    return stage.loss(model, stage.read(shown, index, step, hidden))


def cells_of(frames):
    """frames (..., H, W, 3) in 0..1 -> cells (..., side, side) numpy."""
    return read_cells((frames * 255).round().to(torch.uint8).numpy(), PX)


def as_logits(cells):
    """cells (..., side, side) numpy -> logits (..., H, W, 6) whose likeliest colours draw them."""
    return F.one_hot(torch.from_numpy(render(cells, PX)).long(), 6) * SHARP


def picture_error(a, b):
    """Mean squared error of the pictures of cells, RGB in 0..1."""
    return ((paint(a, PX).astype(float) - paint(b, PX)) ** 2).mean() / 255 ** 2


def nats_of(wrong, n, choices):
    """Mean nats where a stub is wrong about `wrong` of n."""
    return math.log(1 + (choices - 1) * math.exp(-SHARP)) + wrong / n * (
        math.log(math.exp(SHARP) + choices - 1) - math.log(1 + (choices - 1) * math.exp(-SHARP)))


def entropy(labels):
    return -sum(n / len(labels) * math.log(n / len(labels)) for n in Counter(labels).values())


STEP = {tuple(move): label for label, move in enumerate(MOVES.tolist())}


def displacement(before, after):
    """(B,) effective actions between cells (B, side, side)."""
    places = [np.stack(np.nonzero(x == AGENT)[1:], 1) for x in (before, after)]
    return torch.tensor([STEP[tuple(step)] for step in (places[1] - places[0]).tolist()])


def simulate(cells, actions):
    """The next cells (B, side, side), no ball; numbers of no action stay."""
    world = World.from_cells(cells, np.random.default_rng(0))
    world.step(np.where(np.asarray(actions) < 5, actions, 0))
    return world.cells()


def copy_(cells, codes):
    return cells
