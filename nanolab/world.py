"""Clips of a world as its models read and write them: frames, tokens, actions, captions; pictures of what they make.

Shapes: B clips, T frames, H x W pixels, P colours of a palette, N tokens of a frame. Frames are float32 in 0..1.
"""
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F

from data import draw
from data.video import ACTIONS, AGENT, BALL, Clips, World, caption, paint, plain, read_caption, read_cells
from models.world_words import as_characters
from nanolab.run import onto


def latent_actions(model, frames):
    """frames (B, T, H, W, C) as the action model sees them -> codes (B, T - 1) of the steps between; before the first
    frame stands a copy of it, as often as the model's history asks."""
    frames = torch.cat((frames[:, :1].expand(-1, model.history - 1, -1, -1, -1), frames), 1)
    windows = [frames[:, t:t + model.history + 1] for t in range(frames.size(1) - model.history)]
    found = [model.quantiser(model.encode(window)).codes for window in windows]
    return torch.stack(found, 1) if found else torch.empty(len(frames), 0, dtype=torch.int64, device=frames.device)


class Reader:
    """Clips of one side of a data.video.Video, on a device; asked for by index (B,) int64.

    models: {stage: trained model}, which may still grow. kind: tokens are those of the "tokenizer", or the world's own
    "cells". source: actions are the n_codes of the "latent" action model, or the n_actions "true" ones; that no action
    leads to a clip's first frame is said by the number after the last of them. watched: the action model sees "pixels",
    or "tokens" of the tokenizer (T, rows, columns, K), one-hot. merged: (n_codes,) what the dynamics are told in each
    code's place, or None.
    """
    movers = {"agent": AGENT, "ball": BALL}       # of `plain` cells
    plain = staticmethod(plain)

    def __init__(self, clips, palette, device, models=None, kind="tokenizer", source="latent", n_actions=0,
                 n_codes=0, watched="pixels"):
        self.clips, self.palette, self.device = clips, palette, torch.device(device)
        self.models = {} if models is None else models
        self.kind, self.source, self.n_actions = kind, source, n_actions
        self.no_action, self.watched = n_codes if source == "latent" else n_actions, watched
        self.merged = None
        self.colours = None if palette is None else palette.to(device).float() / 255
        self.side = None if clips.stored_cells is None else clips.stored_cells.size(-1)

    @property
    def merged(self):
        return self._merged

    @merged.setter
    def merged(self, codes):
        self._merged, self.merged_codes = codes, None if codes is None else codes.unique()   # once: it waits

    def spread(self, T, count):
        """(count,) int64: clips of T frames, evenly over all."""
        return self.clips.spread(T, count)

    def frames(self, index, T):
        """(B, T, H, W, 3)."""
        return onto(self.device, self.clips.frames(index, T)).float() / 255

    def pictures(self, index, T):
        """(frames, indices (B, T, H, W) int64 of the palette's colours, or None where there is no palette)."""
        if self.palette is None:
            return self.frames(index, T), None
        indices = onto(self.device, self.clips.indices(index, T)).long()
        return self.colours[indices], indices

    @torch.no_grad()
    def tokens(self, index, T):
        """(B, T, N) int64: frames as the dynamics read them."""
        if self.kind == "cells":
            return onto(self.device, self.clips.cells(index, T)).long().flatten(2)
        return self.models["tokenizer"].tokens(self.frames(index, T))

    def watch(self, index, T):
        """`pictures` as the action model sees them."""
        if self.watched == "pixels":
            return self.pictures(index, T)
        grid, K = ((self.side, self.side), 8 if self.clips.facing else 4) if self.kind == "cells" else (
            self.models["tokenizer"].grid, self.models["tokenizer"].codebook_size)
        tokens = self.tokens(index, T).unflatten(2, grid)
        return F.one_hot(tokens, K).float(), tokens

    def as_watched(self, written):
        """What the action model wrote, as it sees frames."""
        return self.as_frames(written) if self.watched == "pixels" else F.one_hot(
            written.argmax(-1), written.size(-1)).float()

    def as_seen(self, watched):
        """Frames (B, T, ...) as the action model sees them as RGB."""
        return watched if self.watched == "pixels" else self.paint(watched.argmax(-1).flatten(2))

    def codes(self, index, T):
        """Latent actions (B, T - 1) of clips."""
        found = latent_actions(self.models["actions"], self.watch(index, T)[0])
        return found if self.merged is None else self.merged[found]

    @torch.no_grad()
    def redraw(self, index, actions, hashes):
        """Latent actions (B, T) of clips, each drawn evenly, by hashes (B, T) uint64, of the codes that write the very
        frame that came next, and itself; the first of a clip, whose past is not whole, stay as they are."""
        model, (B, T), past = self.models["actions"], actions.shape, self.models["actions"].history
        if T <= past:
            return actions
        frames, codes, own = self.watch(index, T)[0], self.merged_codes, actions[:, past:].flatten()
        windows = torch.stack([frames[:, t - past:t] for t in range(past, T)], 1).flatten(0, 1)
        true = frames[:, past:].flatten(0, 1).flatten(1)
        explains = own[:, None] == codes
        for place, code in enumerate(codes):
            written = model.predict(windows, model.quantiser.look_up(code.expand(len(own))))
            explains[:, place] |= (self.as_watched(written).flatten(1) == true).all(1)
        share = torch.from_numpy((hashes[:, past:] >> 11) / 2.0 ** 53).to(explains.device).flatten()
        place = (explains.cumsum(1) > (share * explains.sum(1)).floor()[:, None]).int().argmax(1)
        return torch.cat((actions[:, :past], codes[place].view(B, T - past)), 1)

    @torch.no_grad()
    def tokens_and_actions(self, index, T):
        """(tokens (B, T, N), actions (B, T) int64, the one that led to each frame)."""
        tokens = self.tokens(index, T)
        actions = onto(self.device, self.clips.actions(index, T)) if self.source == "true" else self.codes(index, T)
        return tokens, F.pad(actions, (1, 0), value=self.no_action)

    def captions(self, index):
        """Captions of the clips' first frames, (B, S) int64."""
        return onto(self.device, as_characters([caption(cells) for cells in self.clips.cells(index, 1)[:, 0].numpy()]))

    def is_caption(self, text):
        """Whether a text describes a possible picture."""
        return read_caption(text, self.side) is not None

    def as_frames(self, written):
        """What a model wrote (..., P or 3) as RGB: the likeliest colour of the palette, or clipped."""
        return written.float().clamp(0, 1) if self.palette is None else self.colours[written.argmax(-1)]

    def paint(self, tokens, cache=None):
        """Tokens (B, T, N) -> frames (B, T, H, W, 3). A spatio-temporal tokenizer also sees the frames before: they are
        to be in `tokens`, or in a cache of its own."""
        if self.kind == "tokenizer":
            return self.as_frames(self.models["tokenizer"].pixels(tokens, cache))
        cells = tokens.view(*tokens.shape[:2], self.side, self.side).to(torch.uint8).cpu().numpy()
        return torch.from_numpy(paint(cells, self.clips.cell_px)).to(tokens.device).float() / 255

    def blurs(self, model):
        """Whether dynamics can be asked for `expected` frames: MaskGIT over a recording's frames, each by itself."""
        return self.kind == "tokenizer" and self.palette is None and hasattr(model, "mask") and (
            self.models["tokenizer"].kind == "spatial")

    def expected(self, logits):
        """Logits (B, N, K) of a frame's tokens -> the frame (B, 1, H, W, 3) that the mean of their codes is."""
        book = self.models["tokenizer"].codebook
        table = book.look_up(torch.arange(logits.size(-1), device=logits.device))
        return self.as_frames(self.models["tokenizer"].decode(logits.softmax(-1) @ table))

    def canvas(self, n, length):
        """A cache for `paint` of n worlds of at most so many frames."""
        return self.models["tokenizer"].new_cache(n, length) if self.kind == "tokenizer" else None

    def cells(self, frames):
        """The cells (..., side, side) uint8 that are seen on frames (..., H, W, 3), on the CPU."""
        return read_cells(as_bytes(frames), self.clips.cell_px, self.clips.facing)


def as_bytes(frames):
    """Frames in 0..1 as uint8 on the CPU."""
    return (frames * 255).round().byte().cpu()


# --- Played ---


@torch.no_grad()
def same_codes(reader, clips):
    """(n_codes,) int64: the code that stands for each latent one, the commonest of those that write the same frame as
    it after more than half of so many pasts, and for one of less than a hundredth of the steps that which most often
    does. No labels are asked."""
    model, index = reader.models["actions"], reader.spread(reader.models["actions"].history + 1, clips)
    chosen, same = torch.zeros(model.n_codes), torch.zeros(model.n_codes, model.n_codes)
    for part in index.split(64):
        frames = reader.watch(part, model.history + 1)[0]
        chosen += model.quantiser(model.encode(frames)).codes.bincount(minlength=model.n_codes).cpu()
        every = map(model.quantiser.look_up, torch.arange(model.n_codes, device=frames.device)[:, None].expand(
            -1, len(part)))
        written = torch.stack([reader.as_watched(model.predict(frames[:, :-1], e)).flatten(1) for e in every])
        same += torch.stack([(one == written).all(-1).sum(-1) for one in written]).cpu()
    kept, stands = [], torch.arange(model.n_codes)
    for code in chosen.argsort(descending=True, stable=True).tolist():
        near = max(kept, key=lambda other: same[code, other].item(), default=code)
        if near != code and (same[code, near] > len(index) / 2 or chosen[code] < 0.01 * len(index)):
            stands[code] = near
        else:
            kept.append(code)
    return stands


def opening(reader, world, T):
    """The first T frames of grid worlds (n) in which the agent stays: (a reader of them, their clips (n,) int64)."""
    seen, n = [world.cells()], len(world.agent)
    for _ in range(T - 1):
        world.step([0] * n)
        seen.append(world.cells())
    reader = copy(reader)
    reader.clips = Clips(torch.from_numpy(np.stack(seen, 1)), stored_actions=torch.zeros(n, T - 1),
                         cell_px=reader.clips.cell_px)
    return reader, torch.arange(n)


class Referee:
    """Whether generated frames of n grid worlds obey their rules, each judged by the frame before it as it was
    generated, so that a slip counts once. world: a data.video.World as those frames begin; it is not changed."""

    def __init__(self, world):
        self.rules, self.there = copy(world), np.ones(len(world.agent), bool)

    def judge(self, actions, cells):
        """Of the frames cells (n, side, side) uint8 after actions (n,) int a dict of (n,) arrays: agent: there is
        exactly one; effect: it stands where the action leads, or where it was if a wall or the edge is in the way
        (after a frame without an agent: no); ball: where it flies to, or hidden by the agent; way: 0 the action was
        to stay, 1 its way was free, 2 it was not; -1: no agent was there. All bool but way."""
        rules, had, before, stood = self.rules, self.there, self.rules.ball, self.rules.agent
        rules.step(actions)
        blocked = (rules.agent == stood).all(1)
        agent, ball = ((plain(cells) == kind).reshape(len(cells), -1) for kind in (AGENT, BALL))
        one, seen = agent.sum(1) == 1, ball.sum(1) == 1
        place, flown = (np.stack(np.divmod(found.argmax(1), rules.side), 1) for found in (agent, ball))
        hidden = one & (place == rules.ball).all(1) & ~ball.any(1) & (not rules.push)
        exists = rules.ball[:, 0] >= 0
        found = dict(agent=one, effect=had & one & (place == rules.agent).all(1),
                     ball=np.where(exists, seen & (flown == rules.ball).all(1) | hidden, ~ball.any(1)),
                     way=np.where(had, np.where(actions == 0, 0, 1 + blocked), -1))
        # what comes next is judged from here on
        follows = seen & exists & (abs(flown - before) == 1).all(1)
        rules.velocity = np.where(follows[:, None], flown - before, rules.velocity)
        rules.ball = np.where((seen & exists)[:, None], flown, rules.ball)
        rules.agent, self.there = np.where(one[:, None], place, rules.agent), one
        return found


@torch.no_grad()
def play_score(reader, settings, codes, presses=200, n=20):
    """n worlds that nobody has seen, after so many presses of the five actions each, drawn evenly: as someone plays
    them, each frame from those generated before. codes: what the dynamics are given for each action, None where nothing
    means it: then that press counts as wrong.

    Shares of all presses: agent, effect, ball (see `Referee`); stay, free, blocked: of those whose agent was there, the
    right effects by what was in the way; first_slip: the median over the worlds of the first press without its effect
    (presses + 1: all had theirs). settings: those of train_worldmodel.py.
    """
    rng = draw.numpy_generator(settings["split_seed"], "play", settings["side"], settings["walls"], settings["ball"])
    world = World(n, rng, *(settings[name] for name in ("side", "walls", "ball", "facing", "push")))
    pressed = (rng.random((presses, n)) * len(ACTIONS)).astype(np.int64)
    known = np.array([code is not None for code in codes])
    given = torch.tensor([code or 0 for code in codes], device=reader.device)
    first, index = opening(reader, world, settings["context"] - 1)
    tokens, actions = first.tokens_and_actions(index, settings["context"] - 1)
    model, referee, every = reader.models["dynamics"], Referee(world), []
    cache = model.new_cache(n, settings["context"] + presses, settings["window"] or 64)
    model(tokens, actions, cache)
    drawn = reader.canvas(n, settings["context"] + presses)
    reader.paint(tokens, drawn)
    chance = torch.Generator().manual_seed(0)
    for press in pressed:
        tokens = model.next_frame(given[torch.from_numpy(press).to(reader.device)], cache, settings["decode_steps"],
                                  settings["temperature"], generator=chance)
        found = referee.judge(press, reader.cells(reader.paint(tokens[:, None], drawn)[:, 0]).numpy())
        every.append(found | dict(effect=found["effect"] & known[press]))
    found = {name: np.stack([one[name] for one in every]) for name in every[0]}      # (presses, n)
    slips = np.where(found["effect"].all(0), presses, (~found["effect"]).argmax(0)) + 1
    shares = {name: float(found[name].mean()) for name in ("agent", "effect", "ball")}
    ways = {name: found["effect"][found["way"] == way] for way, name in enumerate(("stay", "free", "blocked"))}
    return shares | {name: float(right.mean()) if right.size else float("nan") for name, right in ways.items()} | dict(
        first_slip=float(np.median(slips)))


# --- Pictures, for the eye: {title: frames of a row} ---

def draw_tokenizer(model, reader, T):
    """The last frames of 8 clips of T, and what their tokens say of them."""
    frames = reader.frames(reader.spread(T, 8), T)
    return {"held-out frames": frames[:, -1], "from their tokens": reader.as_frames(model(frames, None)[0])[:, -1]}


def draw_actions(model, reader):
    """Two frames of 8 clips, and what becomes of the first by the code of the second, and by every code."""
    frames, _ = reader.watch(reader.spread(model.history + 1, 8), model.history + 1)
    past, codes, seen = frames[:, :-1], model.quantiser(model.encode(frames)).codes, reader.as_seen(frames)

    def after(codes):
        return reader.as_seen(reader.as_watched(model.predict(past, model.quantiser.look_up(codes)))[:, None])[:, 0]
    rows = {"the frame before": seen[:, -2], "the frame after": seen[:, -1],
            "written from the code inferred: " + ", ".join(map(str, codes.tolist())): after(codes)}
    return rows | {f"from code {code}": after(torch.full_like(codes, code)) for code in range(model.n_codes)}


def draw_dynamics(model, reader, context, ahead=8, **how):
    """8 frames of three clips, and those generated after the same frames and actions; how: of `generate`."""
    T, held, rows = min(context - 1 + ahead, reader.clips.length), context - 1, {}
    index = reader.spread(T, 8)[::3]
    tokens, actions = reader.tokens_and_actions(index, T)
    made = model.generate(tokens[:, :held], actions[:, :held], actions[:, held:], **how)
    seen = reader.paint(torch.cat((tokens[:, :held], made), 1))[:, held:]
    for i, true in enumerate(reader.frames(index, T)):
        rows[f"held-out clip {i + 1}, frames {held + 1} to {T}"] = true[held:]
        words = ", ".join(map(str, actions[i, held:].tolist()))
        rows[f"generated after frame {held} and these actions: {words}"] = seen[i]
    return rows


def draw_frame(model, reader, steps):
    """8 frames, and those drawn from their captions in so many rounds."""
    index = reader.spread(1, 8)
    drawn = model.draw(reader.captions(index), steps=steps, temperature=0.0)[:, None]
    return {"held-out frames": reader.frames(index, 1)[:, 0], "drawn from their captions": reader.paint(drawn)[:, 0]}
