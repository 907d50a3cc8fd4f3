"""data/video.py: the grid world against a slow one, pictures, words, clips, splits and files. No network."""
import contextlib
import io
import itertools
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from choices import raises_one_line

from data import draw, recordings, video
from data.video import (ACTIONS, AGENT, BALL, FLOOR, PALETTE, WALL, Clips, Stream, World, caption,
                        caption_length, load, paint, plain, read_caption, read_cells, render, sprites, statistics)
from nanolab.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def worlds(n=1, seed=0, **settings):
    return World(n, np.random.default_rng(seed), **settings)


def from_text(text):
    """A picture (side, side) from lines of . # A o."""
    return np.array([[".#Ao".index(letter) for letter in line] for line in text.split()], np.uint8)


@pytest.fixture(scope="module")
def small():
    return load(n_train=300, n_val=40, length=12, side=6, cell_px=5)


# --- The world ---

class Slow:
    """One world in plain Python, from the rules as they are told."""

    def __init__(self, world, i):
        self.side, self.walls = world.side, set(map(tuple, np.argwhere(world.walls[i]).tolist()))
        self.agent, self.ball = tuple(world.agent[i].tolist()), world.ball[i].tolist()
        self.velocity, self.push = world.velocity[i].tolist(), world.push

    def step(self, action):
        moves = {"stay": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
        row, column = (a + b for a, b in zip(self.agent, moves[ACTIONS[action]]))
        def shut(row, column):
            return min(row, column) < 0 or max(row, column) == self.side or (row, column) in self.walls
        pushed = self.push and [row, column] == self.ball
        behind = [2 * row - self.agent[0], 2 * column - self.agent[1]]
        if shut(row, column) or pushed and shut(*behind):
            action = 0
        else:
            self.agent, self.ball = (row, column), behind if pushed else self.ball
        for axis in range(2) if self.velocity != [0, 0] else ():
            if self.ball[axis] + self.velocity[axis] in (-1, self.side):
                self.velocity[axis] *= -1
            self.ball[axis] += self.velocity[axis]
        return action

    def cells(self):
        picture = {**dict.fromkeys(self.walls, WALL), tuple(self.ball): BALL, self.agent: AGENT}
        return [[picture.get((row, column), FLOOR) for column in range(self.side)] for row in range(self.side)]


@pytest.mark.parametrize("settings", [{}, {"side": 2, "walls": 0.3}, {"side": 5, "walls": 0.6}, {"ball": False},
                                      {"push": True, "side": 4}, {"push": True, "side": 2, "walls": 0.9}], ids=str)
def test_a_world_is_as_the_slow_one(settings):
    world, rng = worlds(40, **settings), random.Random(1)
    slow, happened, pushes = [Slow(world, i) for i in range(40)], Counter(), []
    for _ in range(30):
        actions = [rng.randrange(5) for _ in slow]
        assert world.step(np.array(actions)).tolist() == [one.step(action) for one, action in zip(slow, actions)]
        cells = world.cells()
        assert cells.dtype == np.uint8 and cells.tolist() == [one.cells() for one in slow]
        happened.update(hidden=int((world.ball == world.agent).all(1).sum()),
                        over=int(world.walls[np.arange(40), world.ball[:, 0], world.ball[:, 1]].sum()))
        pushes.append(world.ball)
        if world.push:                                       # a picture says all
            world = World.from_cells(cells, np.random.default_rng(2), True)
    if settings.get("push"):
        assert not happened["hidden"] and not happened["over"] and (world.velocity == 0).all()
        assert world.side == 2 or (np.stack(pushes[1:]) != np.stack(pushes[:-1])).any(2).sum() > 10
    elif settings.get("ball", True):
        assert happened["hidden"] and happened["over"]
    else:
        assert (world.ball == -1).all() and (world.velocity == 0).all() and not (cells == BALL).any()


def test_what_a_new_world_has():
    """Walls and velocities as often as they should be; no agent in a wall; no ball changes nothing else."""
    world = worlds(4000, side=4, walls=0.3)
    assert not world.walls[np.arange(4000), world.agent[:, 0], world.agent[:, 1]].any()
    assert world.walls.mean() == pytest.approx(0.3, abs=0.01)
    ways = Counter(map(tuple, world.velocity.tolist()))
    assert {*ways} == {(-1, -1), (-1, 1), (1, -1), (1, 1)} and min(ways.values()) > 900
    full = worlds(4000, side=2, walls=0.5).walls.sum((1, 2))  # room is made only where there is none
    assert np.bincount(full) / 4000 == pytest.approx(np.array([1, 4, 6, 5]) / 16, abs=0.03)
    with_ball, without = worlds(5), worlds(5, ball=False)
    assert (with_ball.walls == without.walls).all() and (with_ball.agent == without.agent).all()


BAD = "... ... ...", "AA. ... ...", "A.o ..o ..."


def test_a_world_from_a_picture():
    cells, rng = np.stack([from_text("A#. .#o ..."), from_text("..# #.. .A.")]), np.random.default_rng(0)
    world = World.from_cells(cells, rng)
    assert (world.cells() == cells).all() and not world.walls[0, 1, 2]
    assert world.ball.tolist() == [[1, 2], [-1, -1]] and world.velocity[1].tolist() == [0, 0]
    assert world.agent.tolist() == [[0, 0], [2, 1]]
    many = World.from_cells(cells[:1].repeat(400, 0), rng)
    assert min(Counter(map(tuple, many.velocity.tolist())).values()) > 60 and (abs(many.velocity) == 1).all()
    for wrong, said in (*((from_text(bad), "one agent") for bad in BAD),
                        (cells[0] + 8 * np.eye(3, dtype=np.uint8)[::-1], "0 to 7")):
        with pytest.raises(ValueError, match=said):
            World.from_cells(wrong[None], rng)


def test_an_agent_that_faces():
    """All else is as without; it shows the last action but to stay, and a turn is something that happened."""
    world, twin = (World(30, np.random.default_rng(0), 5, 0.4, True, facing) for facing in (True, False))
    assert {*world.facing.tolist()} == {1, 2, 3, 4}
    for actions in np.random.default_rng(1).integers(5, size=(12, 30)):
        facing = np.where(actions > 0, actions, world.facing)
        turned, happened = facing != world.facing, world.step(actions)
        assert (happened == np.where(turned, actions, twin.step(actions))).all() and (world.facing == facing).all()
        cells = world.cells()
        assert (plain(cells) == twin.cells()).all() and (cells.reshape(30, -1).max(1) == BALL + facing).all()
        for picture, look in zip(cells, facing):
            words = caption(picture)
            assert f"{'^v<>'[look - 1]}" in words and (read_caption(words, 5) == picture).all()
            assert video.unknown_words(words, 5, True) == [] != video.unknown_words(words, 5)
        again = World.from_cells(cells, np.random.default_rng(2))
        assert (again.cells() == cells).all() and (again.facing == facing).all()


# --- Pictures ---


@pytest.mark.parametrize("cell_px", [1, 3, 8])
def test_pictures_and_back(cell_px):
    table = sprites(cell_px)
    assert table.shape == (8, cell_px, cell_px) and len({sprite.tobytes() for sprite in table[:4]}) == 4
    if cell_px >= 4:
        assert [sorted({*sprite.flatten().tolist()}) for sprite in table] == [
            [0], [1, 2], [0, 3, 4], [0, 5], *[[0, 3, 4]] * 4] and len({sprite.tobytes() for sprite in table}) == 8
        facing = World(6, np.random.default_rng(0), 5, 0.4, True, True).cells()
        assert (read_cells(paint(facing, cell_px), cell_px, facing=True) == facing).all()
    distance = np.square(PALETTE[:, None].astype(int) - PALETTE[None]).sum(2) ** 0.5
    assert PALETTE.shape == (6, 3) and PALETTE.dtype == np.uint8 and distance[~np.eye(6, dtype=bool)].min() > 40
    cells = np.stack([worlds(3, seed, side=5, walls=0.4).cells() for seed in range(2)])  # (2, 3, 5, 5)
    image, frames = render(cells, cell_px), paint(cells, cell_px)
    assert image.shape == (2, 3, 5 * cell_px, 5 * cell_px) and image.dtype == frames.dtype == np.uint8
    assert (image.reshape(2, 3, 5, cell_px, 5, cell_px).swapaxes(3, 4) == table[cells]).all()
    assert (frames == PALETTE[image]).all()
    found = read_cells(torch.from_numpy(frames), cell_px)
    assert found.dtype == torch.uint8 and (found.numpy() == cells).all()
    for some in (cells[0, 0], cells[:, :, :2]):
        found = read_cells(paint(some, cell_px), cell_px)
        assert isinstance(found, np.ndarray) and found.shape == some.shape and (found == some).all()


def test_the_nearest_sprite_as_by_hand():
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 12, 3), dtype=np.uint8)
    parts = noise.reshape(50, 2, 4, 3, 4, 3).swapaxes(2, 3)[..., None, :, :, :].astype(int)
    for facing, kinds in ((False, [0, 1, 2, 3]), (True, [0, 1, 3, 4, 5, 6, 7])):
        wanted = np.square(PALETTE[sprites(4)[kinds]].astype(int) - parts).sum((-1, -2, -3)).argmin(-1)
        assert (read_cells(noise, 4, facing) == np.array(kinds)[wanted]).all()


# --- Words ---

def test_a_caption_by_hand(monkeypatch):
    starts = [phrase[0].split("{")[0] for phrase in video.PHRASES]  # which one is the same on every machine
    said = [max((start for start in starts if caption(picture).startswith(start)), key=len)
            for picture in worlds(8).cells()]
    assert [starts.index(start) for start in said] == [1, 0, 0, 2, 1, 1, 0, 0]
    for bad in BAD:
        with pytest.raises(ValueError, match="has no caption"):
            caption(from_text(bad))
    for phrase, text in zip(video.PHRASES, ("agent at c2, ball at c1, walls a1 b3.",
                                            "the agent is on c2, the ball on c1; walls: a1 b3.",
                                            "agent c2, ball c1. there are walls on a1 b3."), strict=True):
        monkeypatch.setattr(video, "PHRASES", (phrase,))
        assert caption(from_text("#.o ..A .#.")) == text
    assert caption(from_text("... ... .A.")) == "agent b3. there are walls on none."
    assert caption(from_text("##. #A# ###")) == "agent b2. there are walls on all but c1 b2."


@pytest.mark.parametrize("side, walls", [(2, 0.3), (8, 0.15), (26, 0.6)])
def test_captions_and_back(side, walls):
    cells = worlds(30, side=side, walls=walls).cells()
    told = [caption(picture) for picture in cells]
    for picture, text in zip(cells, told):
        assert text.isascii() and len(text) <= caption_length(side) and caption(picture.copy()) == text
        found = read_caption(f" {text}\n", side)
        assert found.dtype == np.uint8 and (found == picture).all()
    assert len({text[:9] for text in told}) >= 3  # several ways to say it
    assert caption_length(8) <= 160


def test_no_valid_description():
    good = "agent at c2, ball at c1, walls a1 b3."
    assert read_caption(good, 3).tolist() == from_text("#.o ..A .#.").tolist()
    for wrong in ("", "agent", good[:-1], good + " x", f"{good} {good}", *(good.replace(old, new) for old, new in (
            ("agent", "angel"), ("c2", "d2"), ("c2", "c4"), ("c2", "a1"), ("c1", "b3"), ("c1", "c2"),
            ("a1 b3", "a1 a1"), ("a1 b3", "a0 b3"), ("a1 b3", ""), ("a1 b3", "a1  b3"), ("a1 b3", "b9"),
            ("a1", "all but a1"), ("a1 b3", "all but c2"), ("a1 b3", "all but c1 b1"), (", walls", "; walls:")))):
        assert read_caption(wrong, 3) is None, wrong
    assert read_caption(good.replace("a1 b3", "all but c1 c2"), 3).tolist() == from_text("##o ##A ###").tolist()


# --- Clips and batches ---

def numbered(episodes=3, length=5):
    """Clips whose frames say where they come from: red is the episode, green the frame; actions 10 * episode + k."""
    frames = torch.zeros(episodes, length, 2, 4, 3, dtype=torch.uint8)
    frames[..., 0] += torch.arange(episodes, dtype=torch.uint8)[:, None, None, None]
    frames[..., 1] += torch.arange(length, dtype=torch.uint8)[:, None, None]
    actions = torch.arange(episodes)[:, None] * 10 + torch.arange(length - 1)
    return Clips(None, frames, actions.to(torch.uint8))


@pytest.mark.parametrize("T", [1, 3, 5])
def test_clips_never_cross_an_episode(T):
    clips = numbered()
    assert len(clips) == 3 and clips.length == 5 and clips.count(T) == 3 * (6 - T)
    index = torch.arange(clips.count(T))
    frames, actions = clips.frames(index, T), clips.actions(index, T)
    assert frames.shape == (len(index), T, 2, 4, 3) and frames.dtype == torch.uint8 and actions.dtype == torch.int64
    starts = list(itertools.product(range(3), range(6 - T)))
    assert frames[:, :, 1, 1, 0].tolist() == [[episode] * T for episode, _ in starts]
    assert frames[:, :, 0, 2, 1].tolist() == [[*range(start, start + T)] for _, start in starts]
    assert actions.tolist() == [[10 * episode + k for k in range(start, start + T - 1)] for episode, start in starts]
    assert clips.effective(index, T).equal(actions) and clips.cells(index, T) is None
    assert clips.indices(index, T) is None


def test_clips_without_actions_and_out_of_range():
    clips = Clips(None, torch.zeros(2, 3, 2, 2, 3, dtype=torch.uint8))
    assert clips.actions(torch.tensor([0]), 2) is None and clips.effective(torch.tensor([0]), 2) is None
    for index in (-1, 4):
        with pytest.raises(IndexError, match="4 clips of 2 frames"):
            clips.frames(torch.tensor([0, index]), 2)
    for T in (0, 4):
        with raises_one_line(f"clips of {T} frames", "episodes of 3 frames"):
            clips.frames(torch.tensor([0]), T)


def test_clips_of_grid_worlds(small):
    assert (len(small.train), len(small.val), small.train.length) == (300, 40, 12)
    assert (small.n_actions, small.action_names, small.cell_px, small.height, small.width) == (5, ACTIONS, 5, 30, 30)
    assert small.palette.dtype == torch.uint8 and small.palette.numpy().tolist() == PALETTE.tolist()
    assert small.hash in small.source and "300" in small.source
    index = torch.tensor([0, 5, 299 * 9 + 8])
    cells, frames, indices = (read(index, 4) for read in (small.train.cells, small.train.frames, small.train.indices))
    assert cells.shape == (3, 4, 6, 6) and frames.shape == (3, 4, 30, 30, 3) and frames.dtype == torch.uint8
    assert cells[1].equal(small.train.stored_cells[0, 5:9]) and cells[2].equal(small.train.stored_cells[299, 8:])
    assert indices.shape == (3, 4, 30, 30) and indices.dtype == torch.uint8
    assert small.palette[indices.long()].equal(frames) and read_cells(frames, 5).equal(cells)


def test_a_stream_draws_evenly_from_all_clips(small):
    drawn, n = torch.cat([Stream(small.train, 4, 50, 3).at(step) for step in range(40)]), small.train.count(4)
    assert drawn.dtype == torch.int64 and drawn.shape == (2000,) and len(drawn.unique()) < 2000
    assert drawn.min() >= 0 and n * 0.99 < drawn.max() < n and drawn.float().mean() == pytest.approx(n / 2, rel=0.05)
    assert drawn[:50].equal(torch.randint(n, (50,), generator=draw.torch_generator(3, "clips", 0)))
    with raises_one_line("13 frames", "12 frames"):
        Stream(small.train, 13, 4, 0)


# --- Grid worlds as data ---


def test_actions_lead_from_frame_to_frame(small):
    index = torch.arange(40)
    cells, actions, effective = (read(index, 12).numpy() for read in (small.val.cells, small.val.actions,
                                                                      small.val.effective))
    where = np.stack(np.divmod((cells == AGENT).reshape(40, 12, 36).argmax(2), 6), 2)  # (40, 12, 2)
    moves = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
    assert (where[:, 1:] - where[:, :-1] == moves[effective]).all()
    assert ((effective == actions) | (effective == 0)).all() and (effective != actions).mean() > 0.1


def test_shares_of_what_happens():
    figures = statistics(load(n_train=400, n_val=1).train, 5)
    assert figures["shares"] == pytest.approx([0.40, 0.15, 0.15, 0.15, 0.15], abs=0.015)
    assert figures["stopped"] == pytest.approx(0.205, abs=0.015)
    assert figures["entropy"] == pytest.approx(-sum(p * math.log(p) for p in figures["shares"]), abs=1e-9)
    assert figures["copy_last"] == pytest.approx(21.2, abs=0.3)
    frames = torch.zeros(1, 3, 1, 1, 3, dtype=torch.uint8)
    frames[0, 1:, 0, 0, 0] = 255  # one value of six differs
    figures = statistics(Clips(None, frames), 0)
    assert figures["copy_last"] == pytest.approx(10 * math.log10(6)) and figures["pairs"] == 2
    assert statistics(Clips(None, torch.zeros_like(frames)), 0)["copy_last"] == math.inf


def test_the_same_worlds_on_every_machine():
    made = load(n_train=20, n_val=6, length=5, side=5, walls=0.2, split_seed=7)
    assert made.hash == "79f677d174cc"                       # of all that is stored


def test_worlds_depend_on_what_they_should():
    def cells(side="train", **settings):
        return getattr(load(**{"n_train": 20, "n_val": 4, "length": 4, **settings}), side).stored_cells

    first = cells()
    assert cells().equal(first) and cells(length=9)[:, :4].equal(first) and cells(n_train=300)[:20].equal(first)
    assert cells(n_val=30).equal(first) and cells(cell_px=4).equal(first)
    for other in ({"split_seed": 1}, {"walls": 0.2}, {"ball": False}):
        assert not cells(**other).equal(first)
    assert not cells("val", n_val=20).equal(first)
    assert load(n_train=20, n_val=4, length=4).hash != load(n_train=21, n_val=4, length=4).hash


@pytest.mark.parametrize("walls, n_val", [(0.15, 8), (0.5, 300)])
def test_no_layout_is_in_both(walls, n_val, monkeypatch):
    """The split is by the walls of the world, not by those that the first picture shows: the ball may hide one."""
    drawn, init = [], World.__init__

    def noted(world, *args):
        init(world, *args)
        drawn.append(world.walls.copy())
    monkeypatch.setattr(World, "__init__", noted)
    made = load(n_train=600, n_val=n_val, length=2, side=3, walls=walls)
    n = math.ceil(n_val / video.CHUNK)
    val, train = {layout.tobytes() for layout in np.concatenate(drawn[:n])[:n_val]}, np.concatenate(drawn[n:])
    kept = np.array([layout.tobytes() not in val for layout in train])
    assert f"; {(~kept).sum():,} training episodes dropped" in made.source and not kept.all() and len(val) > 5
    shown, bare = made.train.stored_cells[:, 0].numpy(), train[kept][:600]
    assert ((shown == WALL) <= bare).all() and ((shown == BALL) & bare).any()
    assert ((shown == WALL) | (shown == BALL) | ~bare).all()


def test_without_walls_the_starts_differ():
    made = load(n_train=500, n_val=100, length=3, side=4, walls=0)
    assert not (made.train.stored_cells == WALL).any() and "start of val" in made.source
    visible = [{picture.tobytes() for picture in side.stored_cells[:, 0].numpy() if (picture == BALL).any()}
               for side in (made.train, made.val)]
    assert len(visible[0]) > 50 < len(visible[1]) and not visible[0] & visible[1]


@pytest.mark.parametrize("settings, words", [
    ({"side": 2}, ("wall layouts", "side 2", "walls 0.15", "n_val")), ({"side": 2, "walls": 0}, ("starts", "side 2")),
    ({"walls": 0, "ball": False}, ("starts", "side 8"))], ids=str)
def test_nothing_left_for_training(settings, words):
    with raises_one_line(*words):
        load(length=2, **settings)


@pytest.mark.parametrize("name, near", [("donkey", "did you mean donkeycar?"), ("atari", "another game"),
                                        ("xyz", "choose gridworld, donkeycar, atari:"), ("frames.npy", ".npz file")])
def test_unknown_names(name, near):
    with raises_one_line(repr(name), near, "gridworld", "donkeycar", "atari:Freeway", ".npz"):
        load(name)


# --- Files ---

def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def frames_of(n, height=4, width=6):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8], ids=["int64", "uint8"])
def test_a_file_with_whole_actions(dtype, tmp_path):
    frames, actions = frames_of(20), (np.arange(20) % 4).astype(dtype)
    made = load(npz(tmp_path / "some.npz", frames=frames, actions=actions, angle=np.full(20, np.nan)))
    assert (len(made.train), made.train.length, len(made.val), made.val.length) == (1, 16, 1, 4)
    assert made.n_actions == 4 == len(made.action_names) and made.palette is None and made.cell_px is None
    assert (made.height, made.width) == (4, 6) and "some.npz" in made.source and made.hash in made.source
    assert (made.train.frames(torch.tensor([2]), 5)[0].numpy() == frames[2:7]).all()
    assert (made.val.frames(torch.tensor([0]), 4)[0].numpy() == frames[16:]).all()
    assert made.train.actions(torch.tensor([2]), 5).tolist() == [[2, 3, 0, 1]]
    assert made.val.effective(torch.tensor([1]), 3).tolist() == [[1, 2]]


def test_a_file_without_actions(tmp_path):
    made = load(npz(tmp_path / "plain.npz", frames=frames_of(20), other=np.zeros(3)), val_share=0.5)
    assert made.val.length == 10 and made.n_actions == 0 and made.action_names == () and "no actions" in made.source
    assert made.train.actions(torch.tensor([0]), 3) is None and statistics(made.train, 0)["shares"] == []


@pytest.mark.parametrize("name", ["angle", "actions"])
def test_floats_become_buckets_of_the_training_part(name, tmp_path):
    angle = np.concatenate([np.random.default_rng(0).permutation(100) / 100, np.full(20, 9), np.full(5, -9)])
    made = load(npz(tmp_path / "car.npz", frames=frames_of(125), **{name: angle.astype(np.float32)}))
    assert made.train.length == 100 and made.n_actions == 5
    wanted = np.searchsorted(np.arange(1, 5) * 20, angle[:99] * 100 + 0.5, side="left")
    assert made.train.stored_actions[0].tolist() == wanted.tolist()
    assert made.val.stored_actions[0].tolist() == [4] * 20 + [0] * 4
    assert made.action_names[0] == "steering up to 0.20" and made.action_names[4] == "steering above 0.79"
    tied = load(npz(tmp_path / "car.npz", frames=frames_of(50), **{name: np.zeros(50)}))
    assert tied.n_actions == 5 and not tied.train.stored_actions.any()


NAN9 = np.where(np.arange(9) == 4, np.nan, 0)
WRONG = [  # frames, other arrays, what the line says
    (None, {"images": frames_of(9)}, ("no array named frames",)),
    (frames_of(9).astype(np.float32), {}, ("float32", "uint8")),
    (frames_of(9)[0], {}, ("(4, 6, 3)", "(N, H, W, 3)")), (frames_of(9)[..., :1], {}, ("(9, 4, 6, 1)", "(N, H, W, 3)")),
    (frames_of(9, 0), {}, ("(9, 0, 6, 3)", "at least 1")), (frames_of(9, 4, 0), {}, ("(9, 4, 0, 3)", "at least 1")),
    (frames_of(9), {"actions": np.zeros(8, int)}, ("9 frames and 8 actions",)),
    (frames_of(9), {"angle": np.zeros(10)}, ("9 frames and 10 angle",)),
    (frames_of(9), {"actions": np.zeros((9, 1), int)}, ("actions", "(9, 1)")),
    (frames_of(9), {"actions": np.arange(9) - 1}, ("actions go from -1 to 7",)),
    (frames_of(9), {"actions": np.arange(9) * 100}, ("actions go from 0 to 800", "0 to 255")),
    (frames_of(9), {"actions": np.zeros(9, complex)}, ("complex128", "whole numbers or floats")),
    (frames_of(9), {"angle": np.zeros(9, int)}, ("angle are int64", "floats")),
    (frames_of(9), {"angle": NAN9}, ("not all finite", "4 is nan")),
    (frames_of(9), {"actions": NAN9 + np.inf}, ("not all finite", "0 is inf")),
    (frames_of(9), {"actions": np.array([None] * 9)}, ("plain arrays",)),
    (frames_of(5), {}, ("5 frames", "4 for training and 1 for validation", "too few")),
    (frames_of(0), {"actions": np.zeros(0, int)}, ("0 frames", "too few"))]


@pytest.mark.parametrize("frames, arrays, words", WRONG, ids=range(len(WRONG)))
def test_files_that_are_wrong(tmp_path, frames, arrays, words):
    path = npz(tmp_path / "wrong.npz", **({} if frames is None else {"frames": frames}), **arrays)
    with raises_one_line("wrong.npz", *words):
        load(path)


def test_files_that_are_no_archives(tmp_path):
    whole, plain, path = io.BytesIO(), io.BytesIO(), tmp_path / "broken.npz"
    np.savez_compressed(whole, frames=frames_of(40), angle=np.zeros(40))
    np.save(plain, frames_of(9))
    whole = whole.getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"hello", whole[:len(whole) // 2], bytes(flipped), plain.getvalue()):
        path.write_bytes(content)
        with raises_one_line("broken.npz", "damaged"):
            load(str(path))
    path.unlink()
    path.mkdir()
    for missing in (path, tmp_path / "nowhere.npz"):
        with raises_one_line(missing.name, "no such file"):
            load(str(missing))


def test_the_car_is_looked_for(tmp_path, monkeypatch):
    for value in (None, "", str(tmp_path), f"{tmp_path}{os.pathsep}{tmp_path / 'none'}"):
        monkeypatch.delenv("NANOLAB_DATA", raising=False)
        if value is not None:
            monkeypatch.setenv("NANOLAB_DATA", value)
        with raises_one_line("donkeycar-1000-64x64.npz", "set NANOLAB_DATA"):
            load("donkeycar")
    npz(tmp_path / "donkeycar-1000-64x64.npz", frames=frames_of(10), angle=np.zeros(10))
    assert load("donkeycar").train.length == 8


@pytest.mark.skipif(not any((Path(folder) / video.DONKEYCAR).is_file()
                            for folder in os.environ.get("NANOLAB_DATA", "").split(os.pathsep)),
                    reason="no folder of NANOLAB_DATA has the file")
def test_the_car():
    made = load("donkeycar")
    assert (made.height, made.width, made.n_actions, made.train.length, made.val.length) == (64, 64, 5, 800, 200)
    assert made.hash == "ada084fe7bd0" and min(statistics(made.train, 5)["shares"]) > 0.15


# --- Films and pictures ---

def save(path, frames, **how):
    """Pictures as a folder of PNGs, every second one grey and transparent, or as a GIF; or a file of text."""
    Image = pytest.importorskip("PIL.Image")
    pictures = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)
    else:
        path.mkdir(parents=True)
        for k, picture in enumerate(pictures):
            (picture.convert("LA") if k % 2 else picture).save(path / f"f{k}.png")
    return str(path)


def grey(n, side=8):
    """Frame k is all of grey 9 k."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None] * 9, (n, side, side, 3)).copy()


def film(monkeypatch, frames, rate=10, wrong=None):
    """A PyAV that shows these frames of every file, and then fails where `wrong`."""
    def decode(video):
        for k, picture in enumerate(frames):
            yield SimpleNamespace(time=k / rate, to_ndarray=lambda format, p=picture: p)
        if wrong:
            raise OSError(wrong)
    shown = SimpleNamespace(decode=decode, streams=SimpleNamespace(
        video=[SimpleNamespace(average_rate=rate)] * (frames is not None)))
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda path: contextlib.nullcontext(shown),
                                                           FFmpegError=OSError))


def shown(clips, T=1):
    """The grey, over 9, of every first frame of the clips of T."""
    return (clips.frames(torch.arange(clips.count(T)), T)[:, 0, 0, 0, 0].int() / 9).round().int().tolist()


@pytest.mark.parametrize("kind", ["folder", "gif", "film"])
def test_films_and_pictures(kind, tmp_path, monkeypatch):
    """In the order of their numbers, averaged to a size; so many a second; with the actions that lie beside."""
    path = tmp_path / dict(folder="seen", gif="seen.gif", film="seen.mp4")[kind]
    if kind == "film":
        film(monkeypatch, grey(20))
        path.touch()
    else:
        save(path, grey(20), **dict(duration=100) if kind == "gif" else {})
    made = load(str(path), frame_px=4)
    assert (made.height, made.width, made.n_actions) == (4, 4, 0) and "20 frames" in made.source
    assert shown(made.train) == [*range(16)] and shown(made.val) == [*range(16, 20)]
    (path / "actions.txt" if kind == "folder" else path.with_suffix(".txt")).write_text("\n".join("0123" * 5))
    made = load(str(path), frame_px=4, action_lag=3)
    assert made.n_actions == 4 and made.train.actions(torch.tensor([0]), 8).tolist() == [[0, 0, 0, 0, 1, 2, 3]]
    if kind == "folder":
        with raises_one_line("no clock"):
            load(str(path), fps=2)
    else:
        made = load(str(path), fps=5, frame_px=4)
        assert shown(made.train) == [*range(0, 16, 2)] and made.train.stored_actions.tolist() == [[0, 2] * 3 + [0]]


def test_episodes_are_never_crossed(tmp_path):
    """Folders of pictures, 10 after 9, one of a single frame; `episode` of an .npz file: clips of all lengths."""
    lengths, starts = [5, 1, 7, 9, 8], [0, 5, 6, 13, 22]
    for name, first, length in zip((1, 2, 9, 10, 11), starts, lengths):
        save(tmp_path / "play" / f"e{name}", grey(30)[first:first + length])
    frames = np.stack([recordings.shrink(frame, 4, 4) for frame in grey(30)])
    made = load(npz(tmp_path / "play.npz", frames=frames, episode=np.repeat([4, 1, 3, 0, 2], lengths),
                    actions=np.arange(30) % 7), action_lag=1)
    folder = load(str(tmp_path / "play"), frame_px=4)
    assert made.train.frames(torch.arange(24), 1).equal(folder.train.frames(torch.arange(24), 1))
    assert len(made.train) == 5 and made.train.length == 9 and "5 episodes" in made.source
    ends = [*starts[1:], 24]                                  # the last goes on in val
    for T in (1, 2, 3, 7, 9):
        wanted = [k for first, end in zip(starts, ends) for k in range(first, end - T + 1)]
        assert made.train.count(T) == len(wanted) and shown(made.train, T) == wanted
        lagged = [[(k - (k not in starts)) % 7 for k in range(first, first + T - 1)] for first in wanted]
        assert made.train.actions(torch.arange(len(wanted)), T).tolist() == lagged
    for index, T in ((made.train.count(7), 7), (-1, 2)):
        with pytest.raises(IndexError):
            made.train.frames(torch.tensor([index]), T)
    with raises_one_line("10 frames", "9"):
        made.train.count(10)


def test_mirrored_clips_come_behind_the_others():
    made = Clips(None, torch.from_numpy(frames_of(9))[None])
    plain_ = made.frames(torch.arange(7), 3)
    made.mirror = True
    assert made.count(3) == 7 and Stream(made, 3, 4, 0).n == 14
    assert made.frames(torch.arange(7), 3).equal(plain_) and made.frames(torch.arange(7, 14), 3).equal(plain_.flip(3))
    assert made.frames(torch.tensor([8, 1]), 3).equal(torch.stack((plain_[1].flip(2), plain_[1])))
    with pytest.raises(IndexError):
        made.frames(torch.tensor([14]), 3)


def test_films_that_are_wrong(tmp_path, monkeypatch):
    def refused(name, *words, said_of=None):
        with raises_one_line(said_of or name, *words):
            load(str(tmp_path / name))
    for name in ("a.mp4", "b.gif", "two/a.mp4", "two/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"hello" * 9)
    (tmp_path / "two/c.txt").write_text("1\n" * 9)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "odd", [*frames_of(2), *frames_of(2, 6)])
    npz(tmp_path / "e.npz", frames=frames_of(9), episode=np.zeros(8, int))
    monkeypatch.setitem(sys.modules, "av", None)
    refused("a.mp4", "pip install av")
    for frames, wrong, *words in ((None, None, "no video in it"), ([], None, "no frame"),
                                  (grey(9), "bad data", "no video that can be read", "bad data"),
                                  ([*grey(4), *grey(4, 6)], None, "frame 5 is of 6 x 6", "8 x 8")):
        film(monkeypatch, frames, wrong=wrong)
        refused("a.mp4", *words)
    film(monkeypatch, grey(9))
    for text, said in (("1\n2", "9 frames and 2 actions"), ("x", "no list of numbers"), ("nan\n" * 9, "not all")):
        (tmp_path / "a.txt").write_text(text)
        refused("a.mp4", said, said_of="a.txt")
    for name, *words in (("b.gif", "no picture that can be read"), ("none.mp4", "no such file"),
                         ("empty", "holds no pictures"), ("two", "some episodes have actions"),
                         ("odd", "frame 3 is of 6 x 6 pixels, those before of 4 x 6"),
                         ("e.npz", "episode is int64 of shape (8,)")):
        refused(name, *words)

    def full(n, what):
        raise UserError(what)
    monkeypatch.setattr(recordings, "fits", full)
    refused("a.mp4", "take a smaller fps")


def test_how_much_of_the_actions_can_be_seen():
    """Noise that is pushed sideways by what was done, seen three frames later; nothing of what was done by chance."""
    rng = np.random.default_rng(0)
    done, wide = rng.integers(-2, 3, 120), rng.integers(0, 256, (16, 500, 3), dtype=np.uint8)
    place = 250 + np.cumsum(np.concatenate([[0] * 4, done[:-4]]))               # entry k moves frame k + 4
    frames = np.stack([wide[:, p:p + 40] for p in place])
    parts = [(frames[part], done[part, None].astype(float)) for part in (slice(80), slice(80, 120))]
    found = recordings.visible(*parts)
    assert len(found) == 6 and found[3] > 0.95 and max(found[:3] + found[4:]) < 0.5
    moved = recordings.shifts(frames)
    assert moved.shape == (119, 4) and (moved[3:, [0, 2]] == done[:-4, None]).all()
    up = recordings.shifts(np.stack([wide.transpose(1, 0, 2)[p:p + 40] for p in place]))
    assert (up[3:, [1, 3]] == done[:-4, None]).all()


# --- Atari ---

def test_shrinking_averages_by_area():
    for height, width, to in ((6, 5, (4, 2)), (210, 160, (64, 64)), (3, 7, (5, 7)), (9, 8, (3, 2))):
        screen = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = screen.astype(float)
        for axis in range(2):  # so often repeated that the results are made of whole pixels
            wanted = wanted.repeat(to[axis], 0).reshape(to[axis], -1, *wanted.shape[1:]).mean(1).swapaxes(0, 1)
        assert abs(recordings.shrink(screen, *to) - wanted).max() <= 0.5 + 1e-9
    assert (recordings.shrink(np.full((210, 160, 3), 200, np.uint8)) == 200).all()
    assert recordings.shrink(np.zeros((210, 160, 3), np.uint8)).shape == (64, 64, 3)


def test_atari(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ale_py", None)
        with raises_one_line("pip install ale-py"):
            load("atari:Freeway")
    pytest.importorskip("ale_py")
    settings = {"n_train": 4, "n_val": 3, "length": 6}
    made = load("atari:Freeway", **settings)
    assert made.hash == load("atari:freeway", **settings).hash != load("atari:Freeway", split_seed=1, **settings).hash
    assert made.action_names == ("noop", "up", "down") and (len(made.train), len(made.val), made.n_actions) == (4, 3, 3)
    assert made.train.frames(torch.arange(4), 6).shape == (4, 6, 64, 64, 3) and made.train.stored_frames.max() > 100
    assert not made.train.stored_frames[:3].equal(made.val.stored_frames)
    with raises_one_line("'Freewax'", "freeway"):
        load("atari:Freewax")


class Fake:
    """An emulator whose screens count its steps and whose games are over after so many of them."""

    def __init__(self, over):
        self.over, self.steps, self.taken = over, 0, []

    def act(self, action):
        self.steps, self.taken = self.steps + 1, [*self.taken, action]

    def game_over(self):
        return self.steps >= self.over

    def reset_game(self):
        self.steps = 0

    def getScreenRGB(self):
        return np.full((8, 8, 3), self.steps % 256, np.uint8)


def test_an_episode_never_crosses_the_end_of_a_game():
    rng, frames, actions = np.random.default_rng(0), np.zeros((5, 64, 64, 3), np.uint8), np.zeros(4, np.uint8)
    short, endless, waits = Fake(10), Fake(10 ** 9), set()
    for _ in range(60):
        video._play(short, "noop", ["a", "b"], rng, frames, actions, "game")
        shown = frames[:, 0, 0, 0].tolist()
        assert shown == list(range(shown[0], shown[0] + 5)) and 1 <= shown[0] and shown[-1] <= 10
        assert short.taken[-4:] == ["ab"[k] for k in actions] and short.taken[-5] == "noop"
        endless.taken = []
        video._play(endless, "noop", ["a", "b"], rng, frames, actions, "game")
        waits.add(endless.taken.count("noop"))
    assert waits == {*range(1, 9)}
    with raises_one_line("game is over before 5 frames"):
        video._play(Fake(4), "noop", ["a", "b"], rng, frames, actions, "game")
