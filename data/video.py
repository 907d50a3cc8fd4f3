"""Videos with actions: grid worlds made here, a model car's camera, Atari games, or any recording; cut into clips.

    python data/video.py gridworld --stats        # made here, nothing to download; writes video_gridworld.png
    python data/video.py donkeycar --stats        # 1,000 frames of a model car; writes video_donkeycar.png
    python data/video.py atari:Freeway --stats    # needs `pip install ale-py`; random play
    python data/video.py drive.mp4 --fps 20       # a film, a GIF, a folder of them or of pictures: what moves in it

Sets: `gridworld`; `donkeycar` (donkeycar-1000-64x64.npz, looked for in the folders of NANOLAB_DATA); `atari:` and a
game of ale-py, such as atari:Freeway; or the path of a recording: a film, a GIF, a folder (data/recordings.py), or an
.npz file with `frames` (N, H, W, 3) uint8 and, if there are any, `actions` (N,), whole numbers from 0 or floats, or
`angle` (N,) floats: entry k was done at frame k and leads to frame k + 1; and `episode` (N,), whole numbers that change
where an episode ends. Floats become 5 buckets. A gridworld's frame says all of its world but the ball's direction and
what the ball hides.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import functools
import hashlib
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import draw, files, recordings
from nanolab.run import command, fits, replacing
from nanolab.settings import UserError, unknown

ACTIONS = ("stay", "up", "down", "left", "right")
MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])  # rows and columns of each action
FLOOR, WALL, AGENT, BALL = range(4)  # cell types; an agent that faces up, down, left, right is 4, 5, 6, 7
PALETTE = np.array([(236, 230, 214), (96, 104, 120), (44, 50, 64), (32, 120, 210), (255, 255, 255), (222, 62, 48)],
                   np.uint8)  # floor sand, wall slate, its edge dark, agent blue, eye white, ball red
LARGEST = 26  # rows and columns: captions name columns by letters
CHUNK = 256  # worlds that are drawn together, by a generator of their own
BUCKETS = 5  # of actions that are floats
DONKEYCAR = "donkeycar-1000-64x64.npz"


# --- The world ---

class World:
    """n grid worlds side by side in NumPy: a ball flies diagonally, over walls too, and is reflected by the edge; an
    agent takes one step at a time and is stopped by walls and the edge. One that faces shows where it was pushed last,
    as MiniGrid's does: else no picture tells a press at a wall from none. With `push` the ball lies on the floor until
    the agent walks into it, as Sokoban's box, and stops both where the cell behind it is not free.

    rng: np.random.Generator, only its random() is used; side: rows and columns, from 2 to 26; walls: probability of a
    wall in each cell; ball: is there one? walls (n, side, side) bool; agent (n, 2) int: row and column, never in a
    wall; ball (n, 2) int, -1 where there is none; velocity (n, 2) int: +-1, 0 where no ball flies; facing (n,) int,
    the last action but to stay, 0: the agent does not show it.
    """

    def __init__(self, n, rng, side=8, walls=0.15, ball=True, facing=False, push=False):
        self.side, self.push = side, push
        self.walls = rng.random((n, side, side)) < walls
        score = np.where(self.walls, -1, rng.random((n, side, side))).reshape(n, -1)
        self.agent = np.stack(np.divmod(score.argmax(1), side), 1)  # uniform over the cells without a wall
        self.walls[np.arange(n), self.agent[:, 0], self.agent[:, 1]] = False  # matters only where all are walls
        self.ball = (rng.random((n, 2)) * side).astype(np.int64)
        self.velocity = np.where(rng.random((n, 2)) < 0.5, -1, 1)
        if push:                                          # the second of the same draws, clear of walls and the agent
            self.ball = np.stack(np.divmod(score.argsort(1)[:, -2], side), 1)
            self.walls[np.arange(n), self.ball[:, 0], self.ball[:, 1]], self.velocity[:] = False, 0
        if not ball:
            self.ball[:], self.velocity[:] = -1, 0
        self.facing = 1 + (rng.random(n) * 4).astype(np.int64) if facing else np.zeros(n, np.int64)

    @classmethod
    def from_cells(cls, cells, rng, push=False):
        """Worlds that start at given pictures, cells (n, side, side) uint8 numpy: there is floor below agent and ball,
        the ball's velocity is random, and where no ball is seen there is none. Raises ValueError where a picture has
        not exactly one agent, or several balls."""
        cells = np.asarray(cells)
        n, side = cells.shape[:2]
        found, kinds = plain(cells).reshape(n, side * side), cells.reshape(n, side * side)
        if ((found == AGENT).sum(1) != 1).any() or ((found == BALL).sum(1) > 1).any() or (kinds > BALL + 4).any():
            raise ValueError("each picture must have one agent, at most one ball, and cell types from 0 to 7")
        world = cls(n, rng, side, push=push)
        world.walls, world.facing = cells == WALL, (kinds.max(1).astype(np.int64) - BALL).clip(0)
        seen = (found == BALL).any(1)[:, None]
        world.agent, world.ball = (np.stack(np.divmod((found == kind).argmax(1), side), 1) for kind in (AGENT, BALL))
        world.ball, world.velocity = np.where(seen, world.ball, -1), np.where(seen, world.velocity, 0)
        return world

    def step(self, actions):
        """Moves all by one step. actions (n,) int, see ACTIONS; returns what happened, (n,) int: the action, or 0
        (stay) where a wall or the edge was in the way, and no turn of an agent that faces showed it either."""
        actions = np.asarray(actions)
        target = self.agent + MOVES[actions]
        free, hit = self.open(target), self.push & (target == self.ball).all(1)
        free &= ~hit | self.open(target + MOVES[actions])
        self.agent = np.where(free[:, None], target, self.agent)
        if self.push:
            self.ball = np.where((hit & free)[:, None], target + MOVES[actions], self.ball)
        else:
            target = self.ball + self.velocity
            self.velocity = np.where((target < 0) | (target >= self.side), -self.velocity, self.velocity)
            self.ball = self.ball + self.velocity  # no ball: -1 + 0
        facing = np.where((self.facing > 0) & (actions > 0), actions, self.facing)
        turned, self.facing = facing != self.facing, facing
        return np.where(free | turned, actions, 0)

    def open(self, place):
        """(n,) bool: whether the cells `place` (n, 2) are inside and no walls."""
        row, column = place.clip(0, self.side - 1).T
        return ((place >= 0) & (place < self.side)).all(1) & ~self.walls[np.arange(len(place)), row, column]

    def cells(self):
        """The picture, (n, side, side) uint8: the agent hides a ball, and a ball a wall."""
        cells = np.where(self.walls, np.uint8(WALL), np.uint8(FLOOR))
        seen = np.flatnonzero(self.ball[:, 0] >= 0)
        cells[seen, self.ball[seen, 0], self.ball[seen, 1]] = BALL
        kind = np.where(self.facing > 0, BALL + self.facing, AGENT)
        cells[np.arange(len(cells)), self.agent[:, 0], self.agent[:, 1]] = kind
        return cells


def plain(cells):
    """Cells, numpy or torch, in which an agent is AGENT wherever it faces."""
    cells = cells.clone() if torch.is_tensor(cells) else cells.copy()
    cells[cells > BALL] = AGENT
    return cells


# --- Pictures ---

@functools.lru_cache
def sprites(cell_px=8):
    """(8, cell_px, cell_px) uint8: palette indices of each cell type; the first four differ from cell_px 1 on, all from
    4 on, where those that face are white on that side."""
    place = np.arange(cell_px) + 0.5 - cell_px / 2  # from the middle
    furthest = np.maximum(abs(place)[:, None], abs(place)[None])
    floor = np.zeros((cell_px, cell_px), np.uint8)
    wall, agent, ball = floor + 1, floor + 3, floor + 5
    if cell_px >= 4:
        edge = max(1, cell_px // 8)
        wall[furthest > cell_px / 2 - edge] = 2
        agent[furthest > cell_px / 2 - edge] = 0
        eye = slice(cell_px // 4, cell_px // 4 + max(1, cell_px // 4))
        agent[eye, cell_px // 2:cell_px // 2 + max(1, cell_px // 4)] = 4
        ball[np.hypot(place[:, None], place[None]) > cell_px / 2 - edge / 2] = 0
    faces = [np.where(agent == 4, 3, agent) for _ in range(4)]
    for face, (down, right) in zip(faces, MOVES[1:]):
        ahead = down * place[:, None] + right * place[None]
        face[(face == 3) & (ahead > cell_px / 2 - max(1, cell_px // 8) - max(1, cell_px // 4))] = 4
    return np.stack([floor, wall, agent, ball, *faces])


def _draw(cells, pictures):
    """cells (..., h, w), pictures (4, px, px, ...) of the cell types -> (..., h px, w px, ...)."""
    *lead, height, width = np.shape(cells)
    px, drawn = pictures.shape[1], np.moveaxis(pictures[cells], len(lead) + 2, len(lead) + 1)
    return drawn.reshape(*lead, height * px, width * px, *pictures.shape[3:])


def render(cells, cell_px=8):
    """cells (..., side, side) uint8 numpy -> palette indices (..., side * cell_px, side * cell_px) uint8."""
    return _draw(cells, sprites(cell_px))


def paint(cells, cell_px=8):
    """PALETTE[render(cells, cell_px)], (..., side * cell_px, side * cell_px, 3) uint8, in one go."""
    return _draw(cells, PALETTE[sprites(cell_px)])


def read_cells(frames, cell_px=8, facing=False):
    """The inverse of paint, also for blurred frames: each cell's nearest sprite by squared RGB distance. facing: of a
    world whose agent faces.

    frames (..., H, W, 3) uint8, numpy or torch -> (..., H / cell_px, W / cell_px) uint8, likewise, on the same device.
    """
    *lead, height, width, _ = frames.shape
    x = torch.as_tensor(frames)
    kinds = [FLOOR, WALL, BALL, *range(4, 8)] if facing else [FLOOR, WALL, AGENT, BALL]
    table = torch.from_numpy(PALETTE[sprites(cell_px)[kinds]]).flatten(1).float().to(x.device)  # (kinds, px * px * 3)
    x = x.reshape(-1, height // cell_px, cell_px, width // cell_px, cell_px, 3).transpose(2, 3)
    x = x.reshape(-1, table.shape[1]).float()
    nearest = (table.square().sum(1) / 2 - x @ table.T).argmin(1)              # |x - s|^2 without what all share
    cells = torch.tensor(kinds, dtype=torch.uint8, device=x.device)[nearest]
    cells = cells.view(*lead, height // cell_px, width // cell_px)
    return cells if torch.is_tensor(frames) else cells.numpy()


# --- Words ---

LOOKS = "^v<>"  # behind the square of an agent that faces: up, down, left, right
PHRASES = (("agent at {agent}", ", ball at {ball}", ", walls {walls}."),
           ("the agent is on {agent}", ", the ball on {ball}", "; walls: {walls}."),
           ("agent {agent}", ", ball {ball}", ". there are walls on {walls}."))


def _square(row, column):
    return f"{chr(97 + column)}{row + 1}"


def caption_length(side):
    """The most characters of a caption of a side x side picture: at most half of the cells are listed."""
    head = max(len("".join(phrase).format(agent="", ball="", walls="all but ")) for phrase in PHRASES)
    return head + (2 + side * side // 2) * (2 + len(str(side)))


def caption(cells):
    """One picture, cells (side, side) uint8, in words such as "agent at c4, ball at f2, walls a1 b3 c7.".

    Columns are letters, rows numbers from the top; "c4<" is an agent that faces left. A hidden ball is left out. Where
    more than half of the cells are walls the others are listed: "walls all but a1 c4." The picture's hash chooses one
    of PHRASES. Raises ValueError where there is not exactly one agent, or several balls.
    """
    cells = np.ascontiguousarray(cells, np.uint8)
    squares = {kind: [_square(*place) for place in np.argwhere(plain(cells) == kind).tolist()] for kind in range(4)}
    if len(squares[AGENT]) != 1 or len(squares[BALL]) > 1:
        raise ValueError(f"a picture with {len(squares[AGENT])} agents and {len(squares[BALL])} balls has no caption")
    walls = " ".join(squares[WALL]) or "none"
    if 2 * len(squares[WALL]) > cells.size:
        walls = "all but " + " ".join(_square(*place) for place in np.argwhere(cells != WALL).tolist())
    start, middle, end = PHRASES[hashlib.sha256(cells.tobytes()).digest()[0] % len(PHRASES)]
    text = start + middle * len(squares[BALL]) + end
    look = "" if cells.max() <= BALL else LOOKS[cells.max() - BALL - 1]
    return text.format(agent=squares[AGENT][0] + look, ball="".join(squares[BALL]), walls=walls)


def unknown_words(text, side, facing=False):
    """The words of a text that no caption of a side x side picture has, a list. facing: of an agent that faces."""
    words = re.sub("[{][a-z]+[}]", " ", " ".join(map("".join, PHRASES))) + " none all but"
    squares = {_square(*divmod(i, side)) for i in range(side * side)}
    known = {*re.findall("[a-z]+", words), *squares, *(square + look for square in squares for look in LOOKS * facing)}
    return [word for word in re.findall(r"[^\s,.;:]+", text) if word not in known]


@functools.lru_cache
def _patterns():
    square = "[a-z][1-9][0-9]?"
    return [re.compile("".join((re.escape(start), f"(?:{re.escape(middle)})?", re.escape(end)))
                       .replace(r"\{agent\}", f"(?P<agent>{square})(?P<look>[v<>^])?")
                       .replace(r"\{ball\}", f"(?P<ball>{square})")
                       .replace(r"\{walls\}", f"(?P<walls>none|(?:all but )?{square}(?: {square})*)"))
            for start, middle, end in PHRASES]


def read_caption(text, side):
    """The inverse of caption: cells (side, side) uint8, or None where the text is no valid description of one picture:
    other words, a cell outside or named twice, two things in one cell."""
    match = next(filter(None, (pattern.fullmatch(text.strip()) for pattern in _patterns())), None)
    if match is None:
        return None
    places = {_square(row, column): (row, column) for row in range(side) for column in range(side)}
    walls, all_but = match["walls"], match["walls"].startswith("all but ")
    listed = [] if walls == "none" else walls.removeprefix("all but ").split()
    things = [match["agent"]] + [match["ball"]] * (match["ball"] is not None)
    if not places.keys() >= {*listed, *things} or len({*listed}) < len(listed) or len({*things}) < len(things):
        return None
    if any((thing in listed) != all_but for thing in things):  # agent and ball are not in a wall
        return None
    cells = np.full((side, side), WALL if all_but else FLOOR, np.uint8)
    for square in listed:
        cells[places[square]] = FLOOR if all_but else WALL
    agent = BALL + 1 + LOOKS.index(match["look"]) if match["look"] else AGENT
    for kind, square in zip((agent, BALL), things):
        cells[places[square]] = kind
    return cells


# --- Clips ---

class Clips:
    """Episodes of frames with actions; a clip is a window of T consecutive frames that never crosses an episode.

    Clip i starts at frame i % (length - T + 1) of episode i // (length - T + 1). len(clips) is the number of episodes,
    length the frames of each. Either stored_cells (E, length, side, side) uint8 with cell_px, whose frames are drawn
    when asked for, or stored_frames (E, length, H, W, 3) uint8; stored_actions and stored_effective (E, length - 1)
    uint8 or int64, None where there are none; all torch. An index outside 0 <= i < count(T) is an IndexError; of clips
    with `mirror` those from count(T) on are the same once more, left and right exchanged, which `Stream` draws too.
    """
    mirror, stored_values = False, None  # (E, length - 1) float64: the numbers that actions were before their buckets

    def __init__(self, stored_cells=None, stored_frames=None, stored_actions=None, stored_effective=None, cell_px=None):
        self.stored_cells, self.stored_frames, self.cell_px = stored_cells, stored_frames, cell_px
        self.stored_actions = stored_actions
        self.stored_effective = stored_actions if stored_effective is None else stored_effective
        self.facing = stored_cells is not None and bool((stored_cells > BALL).any())
        self._episodes, self.length = (stored_frames if stored_cells is None else stored_cells).shape[:2]

    def __len__(self):
        return self._episodes

    def count(self, T):
        """The number of clips of T frames. Raises UserError where an episode has fewer, or T < 1."""
        if not 1 <= T <= self.length:
            raise UserError(f"clips of {T} frames do not fit into episodes of {self.length} frames")
        return len(self) * (self.length - T + 1)

    def spread(self, T, count):
        """(count,) int64: clips of T frames, evenly over all; of fewer all."""
        n = self.count(T)
        return torch.linspace(0, n - 1, min(count, n), dtype=torch.float64).long()

    def _gather(self, stored, index, T, n):
        """n consecutive entries of `stored` (E, ...) for each clip: (B, n, ...)."""
        index, count = torch.as_tensor(index, device="cpu"), self.count(T)
        if stored is None:
            return None
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count * (1 + self.mirror):
            raise IndexError(f"there are {count} clips of {T} frames, from 0 on")
        row, first = self._places(index % count, T)
        return stored[row[:, None], first[:, None] + torch.arange(n)]

    def _places(self, index, T):
        """(rows of what is stored, their first entries), (B,) each, of clips index (B,)."""
        return index // (self.length - T + 1), index % (self.length - T + 1)

    def cells(self, index, T):
        """index (B,) int64 -> cell types (B, T, side, side) uint8, or None where the data has no cells."""
        return self._gather(self.stored_cells, index, T, T)

    def frames(self, index, T):
        """index (B,) int64 -> RGB (B, T, H, W, 3) uint8."""
        if self.stored_cells is None:
            frames = self._gather(self.stored_frames, index, T, T)
            if self.mirror and (mirrored := torch.as_tensor(index, device="cpu") >= self.count(T)).any():
                frames[mirrored] = frames[mirrored].flip(3)
            return frames
        return torch.from_numpy(paint(self.cells(index, T).numpy(), self.cell_px))

    def indices(self, index, T):
        """index (B,) int64 -> palette indices (B, T, H, W) uint8, or None where there is no palette."""
        if self.stored_cells is None:
            return None
        return torch.from_numpy(render(self.cells(index, T).numpy(), self.cell_px))

    def actions(self, index, T):
        """index (B,) int64 -> (B, T - 1) int64: action k leads from frame k to k + 1; None where there are none."""
        found = self._gather(self.stored_actions, index, T, T - 1)
        return None if found is None else found.long()

    def effective(self, index, T):
        """Likewise, what happened: in a gridworld 0 (stay) where the way was blocked, elsewhere the same as actions."""
        found = self._gather(self.stored_effective, index, T, T - 1)
        return None if found is None else found.long()

    def values(self, index, T):
        """index (B,) int64 -> (B, T - 1) float64: the numbers that the actions were; None where they were none."""
        return self._gather(self.stored_values, index, T, T - 1)


class Episodes(Clips):
    """Clips of episodes of unequal lengths that lie one after another: stored_frames (1, N, H, W, 3) and stored_actions
    (1, N - 1), of which those between two episodes lead nowhere; starts: the first frame of each episode. length: of
    the longest; a clip lies in one of those that are long enough."""

    def __init__(self, starts, *stored):
        super().__init__(*stored)
        self.starts = torch.tensor(starts)
        self.lengths = torch.tensor([*starts[1:], self.length]) - self.starts
        self.length = int(self.lengths.max())

    def __len__(self):
        return len(self.starts)

    def count(self, T):
        """As Clips.count."""
        super().count(T)
        return int((self.lengths - T + 1).clamp(min=0).sum())

    def _places(self, index, T):
        """As Clips._places."""
        ends = (self.lengths - T + 1).clamp(min=0).cumsum(0)
        episode = torch.searchsorted(ends, index, right=True)
        return torch.zeros_like(index), self.starts[episode] + index - ends[episode] + (
            self.lengths[episode] - T + 1)


class Stream:
    """Training batches as a pure function of the seed and the step: nothing to save, and a resumed run sees the same.
    Clips of T frames are drawn at random with replacement."""

    def __init__(self, clips, T, batch_size, seed):
        self.clips, self.T, self.batch_size, self.seed = clips, T, batch_size, seed
        self.n = clips.count(T) * (1 + clips.mirror)

    def at(self, step):
        """(B,) int64: the clips of the batch of a step (from 0)."""
        return torch.randint(self.n, (self.batch_size,), generator=draw.torch_generator(self.seed, "clips", step))


# --- Loading ---

@dataclass
class Video:
    """Both sides of a data set: no clip of val is in train."""
    train: Clips
    val: Clips
    palette: torch.Tensor  # (P, 3) uint8, or None where frames are not drawn from one
    n_actions: int  # 0: the data has none
    action_names: tuple
    cell_px: int  # None where there are no cells
    height: int
    width: int
    source: str  # where the data came from and what was done to it, lines for people
    hash: str  # of the data


def load(dataset="gridworld", n_train=4096, n_val=512, length=16, side=8, cell_px=8, walls=0.15, ball=True,
         split_seed=0, val_share=0.2, frame_skip=4, facing=False, action_lag=0, frame_px=64, fps=None, push=False):
    """Makes or finds the videos of both sides: a Video.

    dataset: gridworld, donkeycar, atari:<game>, or the path of a recording: .npz, a film, a GIF, a folder
    n_train: [>= 1, <= 10_000_000] training episodes (gridworld, atari)
    n_val: [>= 1, <= 10_000_000] validation episodes (gridworld, atari)
    length: [>= 2, <= 1_000_000] frames of an episode (gridworld, atari)
    side: [>= 2, <= 26] cells of a gridworld's row
    cell_px: [>= 1, <= 256] pixels of a cell
    walls: [>= 0, <= 1] share of cells with a wall
    ball: whether there is a ball
    split_seed: of all that is drawn
    val_share: [>= 0, <= 1] the last part of a recording, for validation
    frame_skip: [>= 1, <= 10_000] frames for an action (atari)
    facing: whether the agent shows where it was pushed last (gridworld)
    action_lag: [>= 0, <= 1000] frames by which the actions of a recording act late
    frame_px: [>= 4, <= 1024] pixels of a side that a recording's frames are averaged to; an .npz file keeps its own
    fps: [none, > 0.0, <= 1000] at most so many frames a second of a film or a GIF; none: all
    push: whether the ball lies until the agent walks into it (gridworld)

    Gridworlds are the same on every machine; fewer or shorter episodes are the first ones. Raises UserError: an unknown
    name, a number out of range, a missing or wrong file, no ale-py, too few frames, no layout left for training.
    """
    for name, value, low, high in (("n_train", n_train, 1, None), ("n_val", n_val, 1, None),
                                   ("length", length, 2, None), ("side", side, 2, LARGEST),
                                   ("cell_px", cell_px, 1, 256), ("frame_skip", frame_skip, 1, None),
                                   ("action_lag", action_lag, 0, 1000), ("frame_px", frame_px, 4, 1024)):
        if value < low or (high and value > high):
            raise UserError(f"{name} is {value}: it must be {f'from {low} to {high}' if high else f'at least {low}'}")
    if not 0 <= walls < 1:
        raise UserError(f"walls is {walls}: it must be at least 0 and below 1")
    if facing and cell_px < 4:
        raise UserError(f"cell_px is {cell_px}: an agent that faces needs 4 pixels or more")
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"fps is {fps}: it must be above 0 and at most 1000")
    if not 0 < val_share < 1:
        raise UserError(f"val_share is {val_share}: it must be between 0 and 1")
    if dataset == "gridworld":
        fits((n_train + n_val) * length * side ** 2, f"{n_train + n_val:,} episodes of {length} frames")
        video = _load_gridworld(n_train, n_val, length, side, cell_px, float(walls), bool(ball), split_seed,
                                bool(facing), bool(push))
    elif dataset == "donkeycar":
        video = _load_recording(_find_donkeycar(), val_share, action_lag, frame_px, fps)
    elif recordings.known(str(dataset)):
        video = _load_recording(Path(dataset).expanduser(), val_share, action_lag, frame_px, fps)
    elif dataset.startswith("atari:"):
        video = _load_atari(dataset.removeprefix("atari:"), n_train, n_val, length, split_seed, frame_skip)
    else:
        raise unknown("dataset", dataset, ("gridworld", "donkeycar", "atari:Freeway", "another game, or an .npz file, "
                                           "a film, a GIF, a folder"))
    digest = hashlib.sha256()
    for part in (video.train, video.val):
        for stored in (part.stored_cells, part.stored_frames, part.stored_actions, part.stored_effective):
            if stored is not None:
                digest.update(f"{tuple(stored.shape)} {stored.dtype}".encode())
                digest.update(stored.numpy())
    video.hash = digest.hexdigest()[:12]
    video.source += f"; hash {video.hash}"
    return video


# --- Grid worlds ---

def _load_gridworld(n_train, n_val, length, side, cell_px, walls, ball, seed, facing, push):
    settings = length, side, walls, ball, seed, facing, push
    what = f"wall layouts with side {side} and walls {walls:g}" if walls else f"starts with side {side}"
    hardly = (f"there are hardly any {what} for training that are not in validation: take a smaller n_val or a larger "
              "side")
    val, layouts, _ = draw.first(n_val, _chunks("val", *settings), (), hardly)
    train, _, dropped = draw.first(n_train, _chunks("train", *settings), frozenset(layouts), hardly)
    clips = [Clips(torch.from_numpy(cells), None, torch.from_numpy(actions), torch.from_numpy(effective), cell_px)
             for cells, actions, effective in (train, val)]
    source = (f"gridworld: {n_train:,} training and {n_val:,} validation episodes of {length} frames, {side} x {side} "
              f"cells of {cell_px} pixels, walls {walls:g}, {'a' if ball else 'no'} ball, "
              f"{'to be pushed, ' * push}{'the agent faces, ' * facing}seed {seed}; {dropped:,} training episodes "
              f"dropped for a {'layout' if walls else 'start'} of val")
    return Video(*clips, torch.from_numpy(PALETTE.copy()), len(ACTIONS), ACTIONS, cell_px, side * cell_px,
                 side * cell_px, source, "")


def _chunks(part, length, side, walls, ball, seed, facing, push):
    """Endlessly: of CHUNK episodes of random actions the layouts, cells (CHUNK, length, side, side), actions and what
    happened (CHUNK, length - 1), all uint8."""
    for number in itertools.count():
        rng = draw.numpy_generator(seed, part, side, walls, ball, number)
        world = World(CHUNK, rng, side, walls, ball, facing, push)
        keys = world.walls if walls else np.concatenate([world.agent, world.ball], 1)
        keys = [hashlib.sha256(np.ascontiguousarray(key, np.int8)).digest() for key in keys]
        cells, actions, effective = [world.cells()], [], []
        for _ in range(length - 1):
            actions.append((rng.random(CHUNK) * len(ACTIONS)).astype(np.uint8))
            effective.append(world.step(actions[-1]).astype(np.uint8))
            cells.append(world.cells())
        yield keys, *(np.stack(steps, 1) for steps in (cells, actions, effective))


# --- Files ---

def _find_donkeycar():
    """The path of the file in the folders of NANOLAB_DATA."""
    path = next((folder / DONKEYCAR for folder in files.named() if (folder / DONKEYCAR).is_file()), None)
    if path is None:
        raise UserError(f"{DONKEYCAR} was not found: set NANOLAB_DATA to the folder that holds it")
    return path


def _load_recording(path, val_share, lag, size, fps):
    """A Video of a recording: the last val_share of its frames for validation."""
    recording = recordings.read(path, size, fps, lag)
    frames, actions, n = recording.frames, recording.actions, len(recording.frames)
    cut = n - round(n * val_share)
    if min(cut, n - cut) < 2:
        raise UserError(f"{path}: {n:,} frames with val_share {val_share:g} are {cut:,} for training and {n - cut:,} "
                        "for validation, too few: each side needs at least 2")
    names, numbers = (), None
    if actions is not None and actions.dtype.kind == "f":
        actions = actions.astype(np.float64)
        edges = np.quantile(actions[:cut], np.arange(1, BUCKETS) / BUCKETS)  # of the training part alone
        numbers, actions = actions, np.searchsorted(edges, actions)
        names = (*(f"steering up to {edge:.2f}" for edge in edges), f"steering above {edges[-1]:.2f}")
    elif actions is not None:
        names = tuple(f"action {k}" for k in range(int(actions.max()) + 1))
    sides = []
    for first, last in ((0, cut), (cut, n)):
        starts = [0, *(start - first for start in recording.starts if first < start < last)]
        kind = Clips if len(starts) == 1 else functools.partial(Episodes, starts)
        done, value = (None if x is None else torch.from_numpy(x[first:last][:-1].astype(to))[None]
                       for x, to in ((actions, np.uint8), (numbers, np.float64)))
        sides.append(kind(None, torch.from_numpy(np.ascontiguousarray(frames[first:last]))[None], done))
        sides[-1].stored_values = value
    height, width = frames.shape[1:3]
    source = (f"{path.name}: {n:,} frames of {height} x {width}, " + (len(recording.starts) > 1) * (
        f"{len(recording.starts):,} episodes, ") + f"the first {cut:,} for training and the last {n - cut:,} for "
        f"validation, {len(names) or 'no'} actions")
    return Video(*sides, None, len(names), names, None, height, width, source, "")


# --- Atari ---

def _load_atari(game, n_train, n_val, length, seed, frame_skip):
    """A Video of a game under uniformly random actions of its minimal set, each for frame_skip frames. One long play
    for each side: episodes follow each other after 1 to 8 steps of no action; a game that is over is started anew, and
    the episode too."""
    try:
        import ale_py
        from ale_py import roms
    except ImportError as error:
        raise UserError("atari needs the Arcade Learning Environment: pip install ale-py") from error
    games = {name.replace("_", ""): name for name in roms.get_all_rom_ids()}
    key = re.sub("[^a-z0-9]", "", game.lower())
    if key not in games:
        raise unknown("game of ale-py", game, games.values())
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    sides = []
    for part, n in (("train", n_train), ("val", n_val)):
        words = seed, part, key, frame_skip
        rng, ale = draw.numpy_generator(*words), ale_py.ALEInterface()
        ale.setInt("random_seed", int.from_bytes(draw.digest(*words)[16:20], "little") >> 1)
        ale.setInt("frame_skip", frame_skip)
        ale.setFloat("repeat_action_probability", 0)
        ale.loadROM(roms.get_rom_path(games[key]))
        legal = ale.getMinimalActionSet()
        frames, actions = np.empty((n, length, 64, 64, 3), np.uint8), np.empty((n, length - 1), np.uint8)
        for episode in range(n):
            _play(ale, ale_py.Action.NOOP, legal, rng, frames[episode], actions[episode], game)
        sides.append(Clips(None, torch.from_numpy(frames), torch.from_numpy(actions)))
    names = tuple(action.name.lower() for action in legal)
    source = (f"atari {games[key]}: {n_train:,} training and {n_val:,} validation episodes of {length} frames of "
              f"random play, frame_skip {frame_skip}, 64 x 64, {len(names)} actions, seed {seed}")
    return Video(*sides, None, len(names), names, None, 64, 64, source, "")


def _play(ale, noop, legal, rng, frames, actions, game):
    """Fills the frames and actions of one episode."""
    for _ in range(20):
        for _ in range(1 + int(rng.random() * 8)):
            ale.act(noop)
        frames[0] = recordings.shrink(ale.getScreenRGB())
        for k in range(len(actions)):
            if ale.game_over():
                break
            actions[k] = int(rng.random() * len(legal))
            ale.act(legal[actions[k]])
            frames[k + 1] = recordings.shrink(ale.getScreenRGB())
        else:
            return
        ale.reset_game()
    raise UserError(f"{game} is over before {len(frames)} frames each time: take a smaller length or frame_skip")


# --- Statistics ---

def statistics(clips, n_actions):
    """Figures of one side: episodes, length, pairs of frames; shares of what happened, and their entropy in nats;
    stopped: the share of actions that did not happen; copy_last: PSNR in dB of predicting that nothing changes, over at
    most 4,096 pairs."""
    n = clips.count(2)
    figures = {"episodes": len(clips), "length": clips.length, "pairs": n, "shares": [], "entropy": 0.0, "stopped": 0.0}
    if n_actions:
        done = clips.stored_effective.long()
        shares = done.flatten().bincount(minlength=n_actions).double() / done.numel()
        figures["shares"] = shares.tolist()
        figures["entropy"] = float(torch.special.entr(shares).sum())
        figures["stopped"] = float((done != clips.stored_actions.long()).double().mean())
    figures["copy_last"] = copying(clips)
    return figures


def copying(clips, ahead=1):
    """PSNR in dB of predicting that so many frames on nothing has changed, over at most 4,096 clips."""
    index, total = clips.spread(ahead + 1, 4096), 0.0
    for piece in index.split(64):
        clip = clips.frames(piece, ahead + 1)[:, [0, -1]].float() / 255
        total += float((clip[:, 1] - clip[:, 0]).square().mean()) * len(piece)
    error = total / len(index)
    return -10 * math.log10(error) if error else math.inf


def motion(video):
    """Lines about a recording, before a minute is spent on it: what moves, what copying scores, and how much of the
    actions the frames show."""
    frames, ahead = video.val.stored_frames[0], [h for h in (1, 4, 16) if h < video.val.length]
    moved = (frames[1:].int() - frames[:-1].int()).abs().amax(-1) > 0.05 * 255
    copied = ", ".join(f"{copying(video.val, h):.1f}" for h in ahead)
    yield (f"val: {float(moved.double().mean()):.0%} of the pixels change by more than 0.05 from frame to frame; "
           f"copying scores {copied} dB after {', '.join(map(str, ahead))} frames")
    if video.n_actions and min(video.train.length, video.val.length) > 8:
        sides = []
        for clips in (video.train, video.val):
            done = F.one_hot(clips.stored_actions[0].long(), video.n_actions).double()
            if clips.stored_values is not None:
                done = clips.stored_values[0, :, None]
            sides.append((clips.stored_frames[0].numpy(), done.numpy()))
        found = recordings.visible(*sides)
        best = int(np.argmax(np.nan_to_num(found, nan=-9.0)))
        yield (f"actions as far as the frame's halves show them by their shift: R2 {found[0]:.2f}"
               + f"; {best} frames later {found[best]:.2f} (--action_lag {best})" * (best > 0))


def draw_clips(video, path):
    """Writes a PNG of four clips of training, up to 8 frames of each, every frame under the action that led to it."""
    from matplotlib.figure import Figure
    clips, T = video.train, min(8, video.train.length)
    index = clips.spread(T, 4)
    frames, actions, done, cells = (read(index, T) for read in (clips.frames, clips.actions, clips.effective,
                                                                clips.cells))
    figure = Figure(figsize=(1.5 * T, 1.95 * len(index)), layout="constrained")
    for row, line in enumerate(figure.subplots(len(index), T, squeeze=False)):
        for k, axis in enumerate(line):
            axis.imshow(frames[row, k].numpy(), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            title = "start" if k == 0 else ""
            if k and actions is not None:
                title = video.action_names[actions[row, k - 1]].replace("steering ", "steering\n")
                title += " (blocked)" if actions[row, k - 1] != done[row, k - 1] else ""
            axis.set_title(title, fontsize=9)
        if cells is not None:
            words = line[0].text(0, -0.04, caption(cells[row, 0].numpy()), transform=line[0].transAxes, va="top")
            words.set_in_layout(False)  # or the first column would be as wide as its words
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def describe(video, dataset, stats=False, out="."):
    """Prints what there is, of a recording what moves in it; for --stats figures of both sides, and writes a picture.

    stats: count, and write video_<dataset>.png (training clips)
    out: the folder of the picture
    """
    print(video.source)
    if video.cell_px is None:
        print("\n".join(motion(video)))
    if not stats:
        return
    for name, clips in (("train", video.train), ("val", video.val)):
        figures = statistics(clips, video.n_actions)
        print(f"{name}: {figures['episodes']:,} episode{'s' * (figures['episodes'] > 1)} of {figures['length']:,} "
              f"frames; copying the last frame has a PSNR of {figures['copy_last']:.2f} dB")
        if video.n_actions:
            shares = ", ".join(f"{what} {share:.1%}" for what, share in zip(video.action_names, figures["shares"]))
            print(f"{name}: {shares}; entropy {figures['entropy']:.3f} nats"
                  + f"; {figures['stopped']:.1%} blocked" * (figures["stopped"] > 0))
    path = Path(out) / f"video_{Path(dataset).stem if recordings.known(dataset) else dataset.replace(':', '_')}.png"
    draw_clips(video, path)
    print(f"wrote {path}")


main = command(serve(load, describe))

if __name__ == "__main__":
    main()
