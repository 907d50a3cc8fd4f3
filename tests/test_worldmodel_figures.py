"""What the models of a world are worth: figures of frames, latent actions, dynamics and rollouts by stubs whose
scores are known and by loops; what is over nothing is not a number."""
import itertools
import math
from collections import Counter
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_worldmodel as w
from data import draw
from data.video import AGENT, BALL, FLOOR, MOVES, Clips, Stream, World, load, paint, plain, render
from models import world_measures as m
from models.discrete import Quantised
from models.world_dynamics import Dynamics
from models.world_layers import move
from models.world_tokenizer import ConvTokenizer
from nanolab import world as worlds
from nanolab.world import latent_actions
from world_clips import (CONTEXT, HISTORY, PX, SHARP, SIDE, SMALL, as_logits, cells_of, copy_, decibels, displacement,
                         entropy, evaluate, material, nats_of, near, picture_error, reader, rollouts,
                         simulate, some, still, video, whole)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(put):
    """The script's settings for 5 x 5 cells of 4 pixels."""
    put(**SMALL)


# --- Small functions ---

@pytest.mark.parametrize("height, width", [(12, 13), (12, 7)])
def test_ssim_is_that_of_its_windows(height, width):
    """11 x 11, or as many pixels as the shorter side has, inside the frame, each with its own moments."""
    a = some(2, height, width, 3)
    b = (a + 0.4 * some(2, height, width, 3, seed=1) - 0.2).clamp(0, 1)
    size = min(11, height, width)
    line = torch.tensor([math.exp(-(i - (size - 1) / 2) ** 2 / (2 * 1.5 ** 2)) for i in range(size)]).double()
    kernel = torch.outer(line, line) / line.sum() ** 2
    x, y = (frames.double().unfold(1, size, 1).unfold(2, size, 1) for frames in (a, b))      # (2, h, w, 3, size, size)
    mx, my = ((kernel * part).sum((-2, -1), keepdim=True) for part in (x, y))
    vx, vy, cov = ((kernel * u * v).sum((-2, -1), keepdim=True)
                   for u, v in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
    wanted = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4))).mean().item()
    assert m.ssim(a, b) == near(wanted) and 0.5 < wanted < 0.95
    assert m.ssim(a, a) == near(1, 1e-6)


def test_spread_reaches_from_the_first_clip_to_the_last():
    n = 24 * 15                                               # windows of 6 frames in 24 episodes of 20
    found = video.val.spread(6, 50)
    gaps = found.diff()
    assert len(found) == 50 and found[0] == 0 and found[-1] == n - 1 and gaps.max() - gaps.min() <= 1
    assert video.val.spread(6, 10 ** 6).tolist() == list(range(n)) and video.val.spread(6, 1).tolist() == [0]


@pytest.mark.parametrize("counts, n_codes", [
    ((16, 1, 8, 2, 4), 3), ((5, 5, 5, 5), 2), ((0, 3, 0, 5, 1), 5), ((40, 15, 15, 15, 15), 2)])  # not the two rarest
def test_ceilings_are_the_best_map_from_labels_to_codes(counts, n_codes):
    """All maps are tried."""
    labels = [label for label, n in enumerate(counts) for _ in range(n)]
    information = majority = 0
    for map in itertools.product(range(n_codes), repeat=len(counts)):
        codes = [map[label] for label in labels]
        information = max(information, entropy(codes))        # a map of the label: H(code | label) is 0
        best = {}                                             # code: its commonest label's count
        for (code, _), n in Counter(zip(codes, labels)).items():
            best[code] = max(best.get(code, 0), n)
        majority = max(majority, sum(best.values()) / len(labels))
    found = m.ceilings(torch.tensor(counts), n_codes)
    assert found == dict(ceiling_information=near(information / entropy(labels), 1e-6),
                         ceiling_majority=near(majority, 1e-6))


def test_of_many_labels_the_two_rarest_share_a_code():
    counts, joined = (5, 1, 16, 2, 8, 40, 60, 90), (8, 16, 8, 40, 60, 90)  # 1 + 2, and 5 with them
    found = m.ceilings(torch.tensor(counts), 6)
    both = (entropy([label for label, n in enumerate(given) for _ in range(n)]) for given in (joined, counts))
    assert found["ceiling_information"] == near(next(both) / next(both), 1e-6)
    assert found["ceiling_majority"] == near((sum(joined) - 1 - 2) / sum(counts), 1e-6)


# --- Tokenizer ---

class Painter:
    """A tokenizer that writes `paint_(frames)`, with given codes."""
    patch, codebook_size = PX, 8

    def __init__(self, paint_):
        self.paint_, self.n = paint_, 0

    def __call__(self, frames, estimator="vq"):
        assert estimator is None and frames.size(1) == w.tokenizer_frames       # validation must not move the codebook
        codes = (torch.arange(self.n, self.n + len(frames)) % 4).view(-1, 1).expand(-1, frames.size(1) * 25)
        self.n += len(frames)
        return self.paint_(frames), Quantised(None, codes.clone())


def test_a_tokenizer_that_copies_the_frame_before():
    """All by loops over clips, frames and patches; 70 clips are a batch of 64 and one of 6."""
    cells = video.val.cells(video.val.spread(3, 70), 3).numpy()
    found = evaluate("tokenizer", Painter(lambda frames: as_logits(cells_of(frames)[:, [0, 0, 1]])), material(video))
    errors, changed, wrong, likeness = [], [], 0, []
    for clip, t in itertools.product(cells, range(3)):
        a, b = clip[t], clip[max(t - 1, 0)]
        errors.append(picture_error(a, b))
        wrong += (render(a, PX) != render(b, PX)).sum()
        likeness.append(m.ssim(*(torch.from_numpy(paint(x, PX))[None].float() / 255 for x in (a, b))))
        changed += [picture_error(a[i:i + 1, j:j + 1], b[i:i + 1, j:j + 1]) for i, j in np.argwhere(a != b)]
    assert found["psnr"] == near(decibels(np.mean(errors))) and found["frame_psnr"] == near(np.mean(
        [decibels(error) for error in errors])) and found["frame_psnr"] > found["psnr"] + 1
    assert found["changed_psnr"] == near(decibels(np.mean(changed))) == near(found["changed_floor"])
    assert found["ssim"] == near(np.mean(likeness)) and found["score"] == -found["loss"]
    assert found["usage"] == 0.5 and found["perplexity"] == near(4, 2e-3)  # 70 clips: 18, 18, 17, 17
    assert found["loss"] == near(nats_of(wrong, 70 * 3 * (SIDE * PX) ** 2, 6))


def test_a_tokenizer_of_pixels_without_a_palette(put):
    """0.1 too bright everywhere: 20 dB, in frames that never change; what is above 1 is seen as 1."""
    put(tokenizer_frames=2)
    shown = reader(Clips(None, torch.full((2, 4, 8, 8, 3), 51, dtype=torch.uint8)))
    found, bright = (evaluate("tokenizer", Painter(lambda frames: frames + by), shown) for by in (0.1, 3))
    assert found["psnr"] == near(20) == near(found["frame_psnr"]) and found["loss"] == near(0.01)
    assert math.isnan(found["changed_floor"]) and math.isnan(found["changed_psnr"])           # of no patches
    assert bright["psnr"] == near(decibels(0.8 ** 2)) and bright["loss"] == near(9)


# --- Latent actions ---

class Codes:
    """A quantiser whose codes stand for themselves; what it was asked for is kept."""

    def __init__(self):
        self.asked = []

    def __call__(self, u, soft=False):
        return Quantised(u, u)

    def look_up(self, codes):
        self.asked.append(codes)
        return codes


class Actor:
    """A latent action model over cells: `name(effective action, row) -> code`, `write(cells, codes) -> next cells`.
    Rows count over all clips."""
    n_codes = 8

    def __init__(self, name=lambda action, row: action, write=copy_, history=HISTORY):
        self.name, self.write, self.history = name, write, history
        self.quantiser, self.windows = Codes(), []

    def encode(self, frames):
        assert frames.size(1) == self.history + 1
        row = torch.arange(len(frames)) + len(self.windows) // 4 * 64             # four windows of every batch of 64
        cells = cells_of(frames)
        self.windows.append(cells)
        return self.name(displacement(cells[:, -2], cells[:, -1]), row)

    def predict(self, frames, e):
        assert frames.size(1) == self.history
        return as_logits(self.write(cells_of(frames)[:, -1], e.numpy()))

    def __call__(self, frames):
        cells = cells_of(frames)
        return self.predict(frames[:, :-1], displacement(cells[:, -2], cells[:, -1])), None


def scored(video, model, count=70):
    """(figures, cells (B, history + 4, side, side), effective actions (B, 4)) of the clips that are scored."""
    T = model.history + 4
    index = video.val.spread(T, count)
    labels = video.val.effective(index, T)[:, model.history - 1:]
    assert labels.shape == (count, 4)
    return evaluate("actions", model, material(video)), video.val.cells(index, T).numpy(), labels


@pytest.mark.parametrize("history", [1, 3])
def test_codes_that_are_the_action_say_all(put, history):
    put(history=history)
    found, _, labels = scored(video, Actor(lambda action, row: action * 3 % 8, history=history))
    assert found["information"] == near(1) and found["majority"] == found["majority_200"] == 1
    assert found["usage"] == 5 / 8 and found["perplexity"] == near(math.exp(entropy(labels.flatten().tolist())))
    assert found["ceiling_information"] == near(1) == found["ceiling_majority"]


def test_codes_that_say_nothing_or_whether_it_moved():
    found, _, labels = scored(video, Actor(lambda action, row: action * 0 + 6))
    assert found["information"] == near(0, 1e-9)
    floor = max(Counter(labels[35:].flatten().tolist()).values()) / (35 * 4)      # of the half that is scored
    assert found["majority"] == found["majority_200"] == near(floor) == near(found["majority_floor"])
    assert found["usage"] == 1 / 8 and found["perplexity"] == near(1)
    moved, labels = Actor(lambda action, row: (action > 0).long()), labels.flatten().tolist()
    moved.n_codes = 2
    found, shares = scored(video, moved)[0], sorted(Counter(labels).values())
    wanted = entropy([label > 0 for label in labels]) / entropy(labels)
    assert found["information"] == near(wanted) == near(found["moved_information"]) and 0.2 < wanted < 0.8
    assert found["ceiling_majority"] == near(sum(shares[-2:]) / len(labels)) and found["ceiling_information"] < 1


def test_the_map_is_counted_on_the_first_half_and_scored_on_the_second(put):
    """Codes mean something else from clip 64 of 128 on: all named wrong. 200 steps know only what is in them."""
    put(eval_clips=128)
    other = Actor(lambda action, row: torch.where(row < 64, action, (action + 1) % 5))
    found, _, labels = scored(video, other, 128)
    assert found["majority"] == 0 == found["majority_200"]
    late = Actor(lambda action, row: torch.where((row >= 50) & (action == 2), 5, torch.where(
        (row >= 49) & (action == 4), 6, action)))
    found, _, labels = scored(video, late, 128)               # 50 clips are 200 steps: code 6 is in them, 5 is not
    assert (labels[49] == 4).any() and (labels[50:52] == 2).any() and found["majority"] == 1
    assert found["majority_200"] == near(1 - (labels[64:] == 2).double().mean().item())


@pytest.mark.parametrize("code, codes", [
    (lambda action, row: action * 3 % 8, [0, 3, 6, 1, 4]),
    (lambda action, row: torch.where(action == 4, 5 + (row % 3 == 0).long(), action), [0, 1, 2, 3, 5]),
    (lambda action, row: action.clamp(max=3), [0, 1, 2, 3, None])], ids=["one each", "two of one", "none of one"])
def test_codes_are_shown_with_the_action_that_goes_with_them(code, codes):
    """A code that never comes means nothing in particular, an action that none means has no code, one of several has
    the commonest; where no actions are known there is nothing to show."""
    models = dict(actions=Actor(code))
    meanings, found = m.meanings_of(material(video, models=models), w.eval_clips)
    assert found == codes and len(meanings) == 8
    assert all(meanings[code] == label for label, code in enumerate(codes) if code is not None)
    assert m.meanings_of(reader(video.val, models=models, n_actions=0), w.eval_clips) == (None, None)


def test_frames_written_by_a_simulator():
    """Inferred codes write the truth; permuted and random ones what their worlds come to, by a loop."""
    model = Actor(write=simulate)
    before = torch.get_rng_state()
    found, cells, labels = scored(still, model)
    assert torch.equal(torch.get_rng_state(), before)         # draws of its own: training goes on as if it were not
    assert found["psnr_1"] == found["psnr_4"] == 100 and found["loss"] == near(nats_of(0, 1, 6))
    plans = {name: torch.cat([torch.stack(model.quantiser.asked[first + i:first + i + 4], 1) for first in (0, 12)])
             for i, name in ((4, "permuted"), (8, "random"))}  # 4 frames each by inferred, permuted and random codes
    assert torch.equal(plans["permuted"], torch.cat([part.roll(1, 0) for part in labels.split(64)]))  # the one before
    drawn = plans["random"].flatten()
    assert (drawn.bincount(minlength=8).double() / len(drawn) - 1 / 8).abs().max() < 0.06 and drawn.max() == 7
    errors = {}
    for name, plan in plans.items():
        now = cells[:, HISTORY - 1]
        for t, codes in enumerate(plan.T):
            now = simulate(now, codes.numpy())
            errors[name, t] = decibels(picture_error(now, cells[:, HISTORY + t]))
    for t in (0, 3):
        assert found[f"dpsnr_{t + 1}"] == near(100 - errors["permuted", t]) and found[f"dpsnr_{t + 1}"] > 50
        copied = picture_error(cells[:, HISTORY - 1], cells[:, HISTORY + t])
        assert found[f"copy_{t + 1}"] == near(decibels(copied))
    assert found["dpsnr_random_4"] == near(100 - errors["random", 3])
    found, cells, _ = scored(video, Actor())                  # that copies
    assert found["dpsnr_1"] == found["dpsnr_4"] == found["dpsnr_random_4"] == 0
    assert found["psnr_1"] == near(found["copy_1"]) and found["psnr_4"] == near(found["copy_4"])
    wrong = (render(cells[:, HISTORY - 1], PX) != render(cells[:, HISTORY], PX)).sum()
    assert found["loss"] == near(nats_of(wrong, 70 * (SIDE * PX) ** 2, 6)) and found["score"] == -found["loss"]


def test_without_actions_there_is_nothing_to_name():
    """Figures of frames alone, here of RGB: each is written as the one before plus 0.1."""
    class Blind(Actor):
        def encode(self, frames):
            return torch.zeros(len(frames), dtype=torch.int64)

        def predict(self, frames, e):
            return frames[:, -1] + 0.1

        def __call__(self, frames):
            return self.predict(frames[:, :-1], None), None
    clips = Clips(None, torch.full((1, 9, 8, 8, 3), 51, dtype=torch.uint8))
    found = evaluate("actions", Blind(), reader(clips, n_actions=0))
    assert found["psnr_1"] == near(20) == found["frame_psnr_1"] and found["loss"] == near(0.01)
    assert found["psnr_4"] == near(decibels(0.4 ** 2)) and found["copy_4"] == 100
    assert not {"information", "majority", "consistency"} & found.keys()


# --- Consistency ---

def shifted(cells, steps):
    """The agent of cells (B, side, side) by steps (B, 2), over walls; where that is outside it stays."""
    out = cells.copy()
    for picture, step in zip(out, steps):
        place = np.argwhere(picture == AGENT)[0]
        if ((place + step >= 0) & (place + step < SIDE)).all():
            picture[tuple(place)] = FLOOR
            picture[tuple(place + step)] = AGENT
    return out


def direction(cells, codes):
    return shifted(cells, MOVES[np.where(codes < 5, codes, 0)])


def consistency(video, write, shares=torch.full((8,), 1 / 8)):
    return m.consistency_of(Actor(write=write), material(video), shares, w.eval_clips)


def test_consistent_codes_and_an_agent_that_is_gone_or_there_twice():
    """Codes that mean a direction are consistent, those that move nobody have none, which is not one of 0."""
    def erased(cells, codes):
        return np.where(cells == AGENT, FLOOR, cells)

    def doubled(cells, codes):
        out = cells.copy()
        for picture in out:
            picture[tuple(np.argwhere(picture != AGENT)[0])] = AGENT
        return out
    assert evaluate("actions", Actor(write=direction), material(video))["consistency"] == near(1)
    for write, lost in ((copy_, 0), (erased, 1), (doubled, 1)):
        found = consistency(video, write)
        assert math.isnan(found["consistency"]) and found["lost"] == near(lost)
    shares = torch.tensor([0.5, 0.3, 0.2, 0, 0, 0, 0, 0])
    found = consistency(video, lambda cells, codes: (erased if codes[0] == 1 else direction)(cells, codes), shares)
    assert found["lost"] == near(0.3) and found["consistency"] == near(1)


def test_consistency_is_the_mean_cosine_of_all_pairs():
    """By loops: any jump has a direction, codes count by their share and how often the agent moved."""
    pictures = video.val.cells(video.val.spread(HISTORY, 70), HISTORY)[:, -1].numpy()
    before = [np.argwhere(picture == AGENT)[0] for picture in pictures]
    jumps = np.random.default_rng(1).integers(-2, 3, (8, 70, 2))
    jumps[0, 10:] = 0                                         # seldom moves
    jumps[1], jumps[2, ::2], jumps[3, 20:] = (1, 0), (0, -1), (-2, 1)
    seen = Counter()

    def write(cells, codes):
        code = int(codes[0])
        seen[code] += len(cells)
        return shifted(cells, jumps[code][seen[code] - len(cells):seen[code]])
    shares = some(8) / some(8).sum()
    found = consistency(video, write, shares)
    total = weights = 0
    for code in range(8):
        kept = [step / np.linalg.norm(step) for place, step in zip(before, jumps[code])
                if step.any() and ((place + step >= 0) & (place + step < SIDE)).all()]
        weight = shares[code].item() * len(kept)
        total += weight * np.mean([a @ b for a, b in itertools.combinations(kept, 2)])
        weights += weight
    assert seen == dict.fromkeys(range(8), 70)
    assert found["consistency"] == near(total / weights, 1e-3) and 0.1 < total / weights < 0.9


# --- Floors ---

def probed(labels, written, n=700, levels=4):
    """linear_probe of noise in which, on frame k + 1, the patch of label k is a little brighter. labels (n, 2)."""
    frames = np.random.default_rng(0).integers(0, 200, (n, 3, 16, 16, 3), dtype=np.uint8)
    for i, k in itertools.product(range(n), written):
        frames[i, k + 1, 4 * labels[i, k]:4 * labels[i, k] + 4, :8] += 55
    clips = [Clips(None, torch.from_numpy(frames[part]), torch.from_numpy(labels[part]).to(torch.uint8))
             for part in (slice(n - 200), slice(n - 200, n))]
    return m.linear_probe(*(reader(part, n_actions=levels) for part in clips), 3, 200)


def test_a_linear_probe_finds_what_is_linear_and_nothing_else():
    labels = np.random.default_rng(1).choice(4, (700, 2), p=(0.4, 0.2, 0.2, 0.2))
    floor = max(Counter(labels[500:, 1].tolist()).values()) / 200
    found = probed(labels, [1])
    assert found["probe_information"] > 0.95 and found["probe_majority"] > 0.98
    assert found["probe_floor"] == near(floor)
    found = probed(labels, [0])                               # only the action before is in the frames
    assert found["probe_information"] < 0.08 and abs(found["probe_majority"] - floor) < 0.15


def test_the_untrained_floor_is_the_same_again(put, monkeypatch):
    """And it is that of a model whose BatchNorm knows the training batches, not held-out clips; of a recording there is
    more."""
    put(eval_clips=16, batch_size=8, action_embd=8, action_layers=1, seed=3, data_seed=4, deterministic=False)
    built, real = [], m.evaluate_actions
    monkeypatch.setattr(m, "linear_probe", lambda *_: {})
    monkeypatch.setattr(m, "evaluate_actions", lambda model, *more: built.append(model) or real(model, *more))

    def floor():
        return w.floors(None, video, material(video, "train"), material(video))
    first = floor()
    torch.rand(7)
    assert floor() == first
    assert set(first) == {"untrained_information", "untrained_majority"} and 0 < first["untrained_information"] < 0.9
    model, norm = built[0], built[0].quantiser.norm
    assert not model.training                                 # what is scored goes by the running statistics
    index = torch.cat([Stream(video.train, 3, 8, 4).at(step) for step in range(8)])
    with torch.no_grad():
        u = model.encode(material(video, "train").frames(index, 3))
    torch.manual_seed(3)
    assert all(map(torch.equal, model.parameters(), w.build("actions", video).parameters()))
    assert ((norm.running_mean - u.mean(0)).abs() < 0.3 * u.std(0) + 0.05 * u.mean(0).abs()).all()
    put(seed=5)
    assert floor() != first
    film = driven(40, 1)
    found = w.floors(built[0], SimpleNamespace(height=8, width=16, palette=None), film, film)
    assert {"untrained_null_information", "null_information", "named", "steps"} <= found.keys() and found["steps"] == 16


# --- Dynamics ---

class Namer:
    """Dynamics that name given tokens said (B, N) of the clips' last frames, in order; checks what it is shown."""
    n_actions, draft = 5, False

    def __init__(self, clips, said, logits=None, rename=lambda cells: cells, size=4):
        index = clips.spread(CONTEXT, len(said))
        self.truth, self.acts = rename(clips.cells(index, CONTEXT).flatten(2).long()), clips.actions(index, CONTEXT)
        self.logits = F.one_hot(rename(said), size) * SHARP if logits is None else logits
        self.mask, self.n, self.spoken = size, 0, said

    def __call__(self, tokens, acts, cache=None, window=None):
        rows = slice(self.n, self.n + len(tokens))
        assert window == (3 if cache is None else None)       # a cache has its own
        assert (acts[:, 0] == self.n_actions).all()
        assert torch.equal(acts[:, 1:], self.acts[rows, :acts.size(1) - 1])
        assert torch.equal(tokens[:, :CONTEXT - 1], self.truth[rows, :-1])
        if cache is not None:                                 # causal: reads what is before
            assert tokens.size(1) == CONTEXT - 1
            return cache.append(rows)
        if w.dynamics == "causal":
            assert torch.equal(tokens[:, -1], self.truth[rows, -1])
        else:
            assert (tokens[:, -1] == self.mask).all()         # wholly hidden
            self.n += len(tokens)
        out = torch.full((*tokens.shape, self.mask), math.nan)
        out[:, -1] = self.logits[rows].float()
        return out

    def new_cache(self, n, length, window):
        assert length >= CONTEXT and window == 3
        return []

    def next_frame(self, acts, cache, temperature):
        assert temperature == 0 and torch.equal(acts, self.acts[cache[0], -1])
        self.n += len(acts)
        return self.spoken[cache[0]]


def counted(said, last, before):
    """Shares of tokens (B, N) that are right: of all, of those that changed, of movers where they came to."""
    right, where = said == last, dict(tokens=last >= 0, changed=last != before)
    where |= {name: (last == kind) & (before != kind) for name, kind in (("agent", AGENT), ("ball", BALL))}
    return {name: right[place].double().mean().item() for name, place in where.items()} | dict(
        copy=(last == before).double().mean().item(), frame=right.all(1).double().mean().item())


def renamed(cells):
    """Tokens of cell types: 0, 3, 6, 1."""
    return cells * 3 % 8


class Coder:
    """A tokenizer whose token of a patch is its cell's type, renamed. shown: the frames of each call of `pixels`, since
    one that sees time needs those before."""

    def __init__(self):
        self.shown = []

    def tokens(self, frames):
        return renamed(torch.from_numpy(cells_of(frames)).long()).flatten(2)

    def pixels(self, tokens, cache=None):
        self.shown.append(tokens.size(1))
        return as_logits(renamed(tokens).view(*tokens.shape[:2], SIDE, SIDE).numpy())


@pytest.mark.parametrize("how", ["cells", "tokenizer", "causal"])
def test_what_dynamics_name_is_counted(put, how):
    """Agent and ball are read from what the tokenizer draws; causal ones name by generation, and their loss is of what
    they say given the true tokens. Some frames are whole, most others with half of what changed."""
    put(tokens="tokenizer" if how == "tokenizer" else "cells", dynamics="causal" if how == "causal" else "maskgit")
    cells = video.val.cells(video.val.spread(CONTEXT, 70), CONTEXT).flatten(2).long()
    last, before, coder = cells[:, -1], cells[:, -2], Coder()
    said = torch.where(some(*last.shape) < 0.5, last, before)
    said[::5] = last[::5]
    said[1, 3] = (last[1, 3] + 1) % 4
    rename, size = (renamed, 8) if how == "tokenizer" else (lambda cells: cells, 4)
    logits = F.one_hot(rename(last if how == "causal" else said), size) * SHARP + some(*last.shape, size)
    model = Namer(video.val, said, logits, rename, size)
    found = evaluate("dynamics", model, material(video, models=dict(tokenizer=coder)))
    wanted = counted(said, last, before)
    assert {name: found[name] for name in wanted} == {name: near(value, 1e-6) for name, value in wanted.items()}
    nats = -logits.double().log_softmax(-1).gather(-1, rename(last)[..., None]).mean().item()
    assert found["loss"] == near(nats) == -found["score"] and found["perplexity"] == near(math.exp(nats))
    assert model.n == 70 and set(coder.shown) == ({CONTEXT} if how == "tokenizer" else set())
    assert all(0.2 < value < 0.97 for value in wanted.values())


# --- Rollouts ---

class Dreamer:
    """Dynamics whose frames are `write(cells, plan's actions)` of those before."""
    n_actions, draft = 5, False

    def __init__(self, write, shown):
        self.write, self.shown, self.plans, self.rename = write, shown, [], lambda cells: cells

    def generate(self, tokens, acts, plan, window, steps, temperature, generator):
        assert tokens.size(1) == acts.size(1) == CONTEXT - 1 and (acts[:, 0] == 5).all()
        assert (window, steps, temperature) == self.shown
        self.plans.append(plan)
        cells, made = self.rename(tokens[:, -1]).view(-1, SIDE, SIDE).numpy().astype(np.uint8), []
        for codes in plan.T.numpy():
            cells = self.write(cells, codes)
            made.append(torch.from_numpy(cells).long().flatten(1))
        return self.rename(torch.stack(made, 1))


@pytest.mark.parametrize("tokens", ["cells", "tokenizer"])
def test_rollouts_of_a_simulator(put, tokens):
    """With the actions that led there the truth, 16 frames on; with others what World comes to."""
    put(window=7, temperature=0.5, tokens=tokens)
    model = Dreamer(simulate, (7, 3, 0.5))
    if tokens == "tokenizer":
        model.rename = renamed
    before, coder = torch.get_rng_state(), Coder()
    found = rollouts(model, material(still, models=dict(tokenizer=coder)))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(coder.shown) == ({CONTEXT - 1 + 16} if tokens == "tokenizer" else set())
    index = still.val.spread(CONTEXT - 1 + 16, 70)
    cells, acts = still.val.cells(index, CONTEXT - 1 + 16).numpy(), still.val.actions(index, CONTEXT - 1 + 16)
    plan, (true, permuted, random) = acts[:, CONTEXT - 2:], (torch.cat(model.plans[i::3]) for i in range(3))
    assert torch.equal(true, plan) and torch.equal(permuted, torch.cat([part.roll(1, 0) for part in plan.split(64)]))
    assert random.shape == plan.shape
    assert (random.flatten().bincount(minlength=5).double() / random.numel() - 0.2).abs().max() < 0.05
    assert len(index) == len(true) == 48                      # 24 episodes of 20 frames hold two clips of 19

    def apart(seen, t):
        return near(decibels(picture_error(seen, cells[:, CONTEXT - 2 + t])))
    for name, chosen in (("permuted", permuted), ("random", random)):
        now = cells[:, CONTEXT - 2]
        for t in range(1, 17):
            now = simulate(now, chosen[:, t - 1].numpy())
            assert t not in (1, 4, 16) or found[f"{name}_{t}"] == apart(now, t), (name, t)
    for t in (1, 4, 16):
        assert found[f"psnr_{t}"] == 100 and found[f"exact_{t}"] == 1
        assert found[f"copy_{t}"] == apart(cells[:, CONTEXT - 2], t)
    assert found["dpsnr_4"] == near(100 - found["random_4"]) and found["dpsnr_permuted_4"] == near(
        100 - found["permuted_4"]) and found["permuted_4"] < 40 > found["random_4"]


# --- Figures over nothing ---

def cut(video, episodes, length):
    """A Reader of the first episodes of val, each of so many frames: one clip in each of so many."""
    clips = Clips(video.val.stored_cells[:episodes, :length], None, video.val.stored_actions[:episodes, :length - 1],
                  video.val.stored_effective[:episodes, :length - 1], PX)
    return reader(clips, video.palette)


def test_a_clip_alone_is_no_control():
    """One of one clip has none; one that is the 65th is left out of the control and of what that is compared with."""
    found = evaluate("actions", Actor(write=simulate), cut(still, 1, HISTORY + 4))
    for key in ("dpsnr_1", "dpsnr_4", "majority", "majority_200"):
        assert math.isnan(found[key]), key
    assert found["psnr_1"] == found["frame_psnr_1"] == 100 and found["dpsnr_random_4"] > 0
    many = load("gridworld", 12, 65, 20, SIDE, PX, ball=False)

    def write(cells, codes):                                  # the clip alone is written wrongly, whatever its code
        return simulate(cells, codes) if len(cells) > 1 else np.where(cells == AGENT, FLOOR, cells)
    figures = [evaluate("actions", Actor(write=write), cut(many, n, HISTORY + 4)) for n in (64, 65)]
    assert figures[0]["dpsnr_4"] == figures[1]["dpsnr_4"] and figures[0]["psnr_4"] > figures[1]["psnr_4"]
    roll = [rollouts(Dreamer(write, (3, 3, w.temperature)), cut(many, n, CONTEXT + 3)) for n in (1, 64, 65)]
    assert math.isnan(roll[0]["permuted_4"]) and math.isnan(roll[0]["dpsnr_permuted_4"]) and roll[0]["random_1"] < 100
    for key in ("permuted_1", "permuted_4", "dpsnr_permuted_4"):
        assert roll[1][key] == roll[2][key], key
    assert roll[1]["psnr_4"] == 100 > roll[2]["psnr_4"] and not {key for key in roll[2] if "paired" in key}


def test_what_is_over_nothing_is_not_a_number():
    """Nothing moves: no changed tokens, no information, no direction; one action: no control. Said in words, not 0."""
    stays = torch.zeros(24, 8, dtype=torch.uint8)
    clips = Clips(still.val.stored_cells[:, :1].expand(-1, 9, -1, -1), None, stays, stays, PX)
    shown = reader(clips, still.palette)
    acted = evaluate("actions", Actor(), shown)
    named = evaluate("dynamics", Namer(clips, clips.cells(clips.spread(CONTEXT, 70), CONTEXT)[:, -1].flatten(1).long()),
                     shown)
    painted = evaluate("tokenizer", Painter(lambda frames: as_logits(cells_of(frames))), shown)
    one = Dreamer(copy_, None)
    one.n_actions = 1
    one.generate = lambda tokens, acts, plan, **how: tokens[:, -1:].expand(-1, plan.size(1), -1)
    rolled, probe = rollouts(one, shown), probed(np.zeros((700, 2), np.int64), [])
    for found, keys in ((acted, ("information", "moved_information", "ceiling_information", "consistency")),
                        (named, ("changed",)), (painted, ("changed_psnr", "changed_floor")),
                        (rolled, ("permuted_4", "random_4", "dpsnr_4", "dpsnr_permuted_4")),
                        (probe, ("probe_information",))):
        assert all(math.isnan(found[key]) for key in keys), keys
    assert acted["majority"] == 1 and acted["copy_4"] == painted["psnr"] == rolled["psnr_4"] == rolled["copy_4"] == 100
    assert named["tokens"] == 1 and not {"agent", "ball"} & named.keys()
    assert "changed nan (nothing changes)" in w.in_words("dynamics", named)


@pytest.mark.parametrize("history", [1, 3])
def test_latent_actions_explain_each_step(history):
    """The code of step t is found in frames t - history + 1 to t + 1, the first frame repeated before the video."""
    index, model = whole(video.val.count(6), 5), Actor(history=history)
    cells, labels = video.val.cells(index, 6).numpy(), video.val.effective(index, 6)
    assert torch.equal(latent_actions(model, material(video).frames(index, 6)), labels)
    for t, window in enumerate(model.windows):
        assert (window == cells[:, [max(0, t + 1 - history + i) for i in range(history + 1)]]).all()


# ---- Recordings ----

def recorded(frames, actions, values=None):
    """One episode of frames (N, H, W, 3) in 0..1 and actions (N - 1,)."""
    clips = Clips(None, (frames * 255).round().to(torch.uint8)[None], torch.as_tensor(actions)[None].to(torch.uint8))
    clips.stored_values = None if values is None else torch.as_tensor(values, dtype=torch.float64)[None]
    return reader(clips, n_actions=3)


class Reads(Codes):
    """An action model of one frame's history that reads its code, or 0, off the last frame's first pixel."""
    history, n_codes = 1, 4

    def __init__(self, read=True):
        super().__init__()
        self.quantiser, self.read = self, read

    def encode(self, frames):
        return (frames[:, -1, 0, 0, 0] * 255 / 10).round().long() * self.read


def test_what_codes_of_a_recording_say_by_chance_and_by_the_training_part():
    """By loops: codes rolled in time against the labels; a map and means that were counted on the training part."""
    rng = np.random.default_rng(0)
    labels, codes = rng.integers(0, 3, 90), rng.integers(0, 4, 91)
    codes[1:61] = np.where(rng.random(60) < 0.7, labels[:60], codes[1:61])
    values = labels * 2.0 + rng.normal(size=90)
    frames = torch.from_numpy(codes)[:, None, None, None].expand(-1, 8, 8, 3) * 10 / 255
    sides = [recorded(frames[part], labels[part.start:part.stop - 1], values[part.start:part.stop - 1])
             for part in (slice(0, 61), slice(61, 91))]
    found = m.against_time(Reads(), *sides, 500)
    (x, y, v), (test, truth, value) = ((codes[first + 1:last], labels[first:last - 1], values[first:last - 1])
                                       for first, last in ((0, 61), (61, 91)))

    def information(a, b):
        return entropy(a.tolist()) + entropy(b.tolist()) - entropy(list(zip(a.tolist(), b.tolist())))
    rolled = [information(np.roll(test, k * 29 // 9), truth) for k in range(1, 9)]
    assert found["null_information"] == near(np.mean(rolled) / entropy(truth.tolist())) and found["steps"] == 29
    named = {k: Counter(y[x == k].tolist()).most_common(1)[0][0] for k in range(4)}
    assert found["named"] == near(np.mean([named[k] == label for k, label in zip(test, truth)]))
    means = np.array([v[x == k].mean() for k in range(4)])
    assert found["r2"] == near(1 - ((value - means[test]) ** 2).sum() / ((value - value.mean()) ** 2).sum())
    assert found["r2"] < 0.9 and m.against_time(Reads(False), *sides, 500)["r2"] == near(
        1 - ((value - v.mean()) ** 2).sum() / ((value - value.mean()) ** 2).sum())
    assert "r2" not in m.against_time(Reads(), *(recorded(frames[:61], labels[:60]),) * 2, 500)


def driven(n, seed):
    """A smooth picture that each action 0, 1, 2 pushes by -1, 0 or 1 pixels sideways."""
    actions = np.random.default_rng(seed).integers(0, 3, n - 1)
    place = np.concatenate([[0], np.cumsum(actions - 1)])[:, None] + np.arange(16)
    rows = 0.5 + 0.4 * np.sin(place / 2.5)
    return recorded(torch.from_numpy(rows)[:, None, :, None].expand(-1, 8, 16, 3).float(), actions)


def test_floors_of_rollouts(monkeypatch):
    """A flow for each true action is found, and moves the last frame as often as there are steps; the mean frame is
    that of the training part."""
    train, val = driven(80, 0), driven(40, 1)
    flows = m.fit_flows(train, 3, steps=60)
    assert flows.shape == (3, 2, 4, 4)
    assert (flows[:, 0, :, 1:3].mean((1, 2)) - torch.tensor([-1, 0, 1])).abs().max() < 0.3
    monkeypatch.setattr(m, "fit_flows", lambda train, n: flows)
    found, index = m.rollout_floors(train, val, 4, 20), val.spread(19, 20)
    frames = val.frames(index, 19)
    mean = train.frames(torch.arange(80), 1).mean((0, 1))
    for t in (1, 4, 16):
        assert found[f"mean_{t}"] == near(decibels((frames[:, 2 + t] - mean).square().mean().item()), 1e-3)
    now, labels = frames[:, 2], val.clips.effective(index, 19)
    copied = decibels((now - frames[:, 3]).square().mean().item())
    for t in range(2, 6):
        now = move(now, flows[labels[:, t]])
    assert found["moved_4"] == near(decibels((now - frames[:, 6]).square().mean().item()), 1e-3)
    assert found["moved_1"] > copied + 8 and found["moved_1"] > found["moved_4"] > found["mean_4"]
    val.n_actions = 0
    assert {*m.rollout_floors(train, val, 4, 20)} == {"mean_1", "mean_4", "mean_16"}


def test_codes_of_a_recording_are_exchanged_with_those_far_away():
    """The next clip's are nearly the same: half of the batch away; of separate worlds the clip before's."""
    plan = torch.arange(10)[:, None].expand(-1, 2)
    assert torch.equal(m.shifted(plan, driven(9, 0)), (plan + 5) % 10)
    assert torch.equal(m.shifted(plan, material(video)), (plan + 9) % 10)
    assert torch.equal(m.shifted(plan[:1], driven(9, 0)), plan[:1])


@pytest.mark.parametrize("stage, figures, flags", [
    ("tokenizer", dict(psnr=23, copy_psnr=19, perplexity=1.6), []),
    ("tokenizer", dict(psnr=18, copy_psnr=19, perplexity=10), ["below_copying"]),
    ("tokenizer", dict(psnr=30, copy_psnr=19, perplexity=1.2), ["dead_codebook"]),
    ("actions", dict(dpsnr_1=0.2, information=0.5, null_information=0.1, untrained_information=0.3,
                     untrained_null_information=0.1), []),
    ("actions", dict(dpsnr_1=0.05, information=0.35, null_information=0.2, untrained_information=0.3,
                     untrained_null_information=0.1, steps=150), ["codes_say_nothing", "few_steps", "as_untrained"]),
    ("actions", dict(dpsnr_1=None, information=0.9), []),
    ("dynamics", dict(tokens=0.34, copy=0.28, rollout_psnr_1=21, rollout_copy_1=19), []),
    ("dynamics", dict(tokens=0.29, copy=0.28, rollout_psnr_1=21, rollout_copy_1=19), ["as_copying"]),
    ("dynamics", dict(tokens=0.34, copy=0.28, rollout_psnr_1=19.1, rollout_copy_1=19), ["as_copying"]),
    ("dynamics", dict(tokens=0.999, copy=0.985), []),
    ("dynamics", dict(tokens=1.0, copy=1.0), ["blank_tokens", "as_copying"]),
    ("dynamics", dict(tokens=0.34, copy=0.28, rollout_psnr_16=13.0, rollout_mean_16=13.9), ["below_mean"])])
def test_what_is_said_of_a_stage_that_learned_nothing(stage, figures, flags):
    found = m.doubts(stage, {key if key.startswith("rollout") else f"{stage}_{key}": value
                             for key, value in figures.items()})
    assert [*found] == flags and all("\n" not in line for line in found.values())


@pytest.mark.parametrize("threshold, changes", [(0.0, 4), (0.06, 2), (0.2, 1)])
def test_what_has_changed(threshold, changes, put):
    """A channel that differs by more than the threshold; so it weighs in the losses."""
    frames = torch.zeros(1, 2, 2, 3, 3)
    frames[0, 1, :, :, 1] = torch.tensor([[0.0, 0.05, -0.1], [0.3, 0.0, 0.01]])
    assert m.changed(frames[:, 1], frames[:, 0], threshold).sum() == changes
    put(change_threshold=threshold, tokens="tokenizer", history=1, tokenizer_frames=2, tokenizer_change=1.0)
    shown = recorded((frames[0] + 0.4), [0])
    for stage in ("tokenizer", "actions"):
        weight = w.STAGES[stage].read(shown, torch.tensor([0]), 0)[-1]
        assert (weight > 1).sum() == changes * weight.size(1)


def test_the_frame_that_the_mean_of_the_codes_is(put):
    """Asked for in the first round of each frame; the mean over codes goes to the decoder."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(8, 16, 4, None, 10, n_embd=8).eval()
    shown = recorded(driven(40, 1).frames(torch.arange(40), 1)[:, 0], np.zeros(39))
    shown.kind, shown.models = "tokenizer", dict(tokenizer=tokenizer)
    logits = 3 * some(2, 8, 10)
    e = torch.stack([sum(p * tokenizer.codebook.look_up(torch.tensor(k)) for k, p in enumerate(row)) for row in
                     logits.softmax(-1).flatten(0, 1)]).view(2, 8, -1)
    torch.testing.assert_close(shown.expected(logits), tokenizer.decode(e).clamp(0, 1))
    model = Dynamics((2, 4), 10, 3, 1, 2, 16).eval()
    with torch.no_grad():
        model.heads[0].normal_(0, 0.5)
    put(action_source="true", rollout_clips=5)
    shown.no_action = 3
    found = m.evaluate_rollouts(model, shown, 4, 5, window=4, steps=1, temperature=0.0)
    assert {f"expected_{t}" for t in (1, 4, 16)} <= found.keys() and found["expected_1"] != found["psnr_1"]
    tokens, actions = shown.tokens_and_actions(shown.spread(19, 5), 19)
    with torch.no_grad():
        hidden = torch.cat((tokens[:, :3], torch.full_like(tokens[:, :1], 10)), 1)
        wanted = shown.expected(model(hidden, actions[:, :4], window=4)[:, -1])
        lost = shown.frames(shown.spread(19, 5), 19)[:, 2] - shown.paint(tokens[:, 2:3])[:, 0]
    for name, made in ("expected_1", wanted[:, 0]), ("expected_residual_1", (wanted[:, 0] + lost).clamp(0, 1)):
        error = (made - shown.frames(shown.spread(19, 5), 19)[:, 3]).square().mean().item()
        assert found[name] == near(decibels(error))
    assert found["psnr_residual_1"] not in (found["psnr_1"], found["expected_residual_1"])


# ---- Played ----

def judged(world, actions, spoil=lambda t, cells: None):
    """What a Referee says of a true world's frames after actions (T, n), each changed by spoil(t, cells)."""
    referee, found = worlds.Referee(world), []
    for t, pressed in enumerate(actions):
        stood, happened, cells = world.agent, world.step(pressed), world.cells()
        spoil(t, cells)
        found.append(referee.judge(pressed, cells) | dict(happened=happened, moved=(world.agent != stood).any(1)))
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize("facing, push", [(False, False), (True, False), (False, True)])
def test_a_referee(facing, push):
    """True frames obey the rules; an agent that is gone, stands elsewhere or twice, and a ball that is gone or jumps,
    slip where they do, and are judged by where they were seen from there on."""
    actions = np.random.default_rng(1).integers(5, size=(40, 50))
    found = judged(World(50, np.random.default_rng(0), 8, 0.2, True, facing, push), actions)
    assert all(found[name].all() for name in ("agent", "effect", "ball"))
    assert (found["way"] == np.where(actions == 0, 0, 2 - found["moved"])).all() and {*found["way"].flat} == {0, 1, 2}
    assert facing or (found["happened"] == np.where(found["moved"], actions, 0)).all()

    def slip(kind, how):
        def spoil(t, cells):
            if t == 3:
                here = plain(cells)[0] == kind
                drawn, floor = cells[0][here], np.argwhere(cells[0] == FLOOR)
                cells[0][here] = FLOOR * (how != "twice") + drawn * (how == "twice")
                if how != "gone":
                    cells[0][tuple(floor[-1])] = drawn[0]
        empty = World(1, np.random.default_rng(3), 8, 0.0, True, facing, push)
        return {name: value[:, 0].tolist() for name, value in judged(empty, np.full((6, 1), 2), spoil).items()}
    one, two = [True] * 3 + [False] + [True] * 2, [True] * 3 + [False] * 2 + [True]
    for how in ("gone", "twice"):
        found = slip(AGENT, how)
        assert found["agent"] == one and found["effect"] == two and found["way"][4] == -1, how
    found = slip(AGENT, "elsewhere")                         # it is back on its true way: another jump
    assert found["agent"] == [True] * 6 and found["effect"] == two
    assert slip(BALL, "gone")["ball"] == one and slip(BALL, "twice")["ball"] == one
    assert slip(BALL, "elsewhere")["ball"][3:5] == [False, False]

    def onto(t, cells):                                      # the agent, over where the ball is
        stood, here = plain(cells) == AGENT, cells == BALL
        cells[here], cells[stood] = cells[stood], FLOOR
    world = World(1, np.random.default_rng(3), 8, 0.0, True, facing, push)
    assert judged(world, np.zeros((1, 1), int), onto)["ball"].item() is not push


class Rules:
    """Dynamics that know the world, and what they are to do wrong: without(actions, happened, world) -> (n,) bool, the
    worlds whose agent is left out."""

    def __init__(self, without):
        self.without = without

    def new_cache(self, n, length, window):
        return None

    def __call__(self, tokens, actions, cache):
        self.world = copy(self.made)

    def next_frame(self, actions, cache, steps, temperature, generator):
        happened = self.world.step(actions.numpy())
        cells = self.world.cells()
        lost = self.without(actions.numpy(), happened)
        cells[lost] = np.where(cells[lost] == AGENT, FLOOR, cells[lost])
        return torch.from_numpy(cells).long().flatten(1)


@pytest.mark.parametrize("without, codes, wanted", [
    (lambda pressed, happened: happened < 0, [0, 1, 2, 3, 4],
     dict(agent=1, effect=1, ball=1, stay=1, free=1, blocked=1, first_slip=41)),
    (lambda pressed, happened: happened != pressed, [0, 1, 2, 3, 4], dict(free=1, blocked=0)),
    (lambda pressed, happened: happened < 0, [None, 1, 2, 3, 4], dict(agent=1, stay=0, free=1, blocked=1))],
    ids=["right", "lost at walls", "no code to stay"])
def test_the_score_of_playing(without, codes, wanted, monkeypatch, put):
    put(tokens="cells", action_source="true")
    rules = Rules(without)
    monkeypatch.setattr(worlds, "World", lambda *how: setattr(rules, "made", World(*how)) or rules.made)
    reader = worlds.Reader(video.val, video.palette, "cpu", dict(dynamics=rules), "cells", "true", 5)
    settings = {name: getattr(w, name) for name in ("split_seed", "side", "walls", "ball", "facing", "push", "context",
                                                    "window", "decode_steps", "temperature")}
    found = worlds.play_score(reader, settings, codes, presses=40, n=10)
    for name, value in wanted.items():
        assert found[name] == value, name
    if None in codes:                                        # what has no code is wrong, though nothing moves
        assert 0.7 < found["effect"] < 0.85 and found["first_slip"] < 12


def test_codes_that_write_the_same_frame_are_one(put):
    """Of 64 pasts: always, after 48 of them; not after 32. The commonest stands for them; nobody chooses 0, 2 and 7."""
    put(action_source="latent")
    means = np.array([[0, 1, 2, 3, 1, 0, 0, 2], [0, 1, 2, 3, 1, 0, 0, 2], [0, 1, 2, 3, 1, 0, 3, 2],
                      [0, 1, 2, 3, 1, 2, 3, 2]])

    def write(cells, codes):
        return (cells + means[np.arange(len(codes)) % 4, codes][:, None, None]) % 4
    model = Actor(lambda action, row: torch.where((action == 0) & (row % 4 == 0), 6, torch.tensor([5, 1, 4, 4, 3])[
        action]), write)
    found = worlds.same_codes(material(video, models=dict(actions=model)), 64)
    assert found.tolist() == [5, 4, 5, 3, 4, 5, 6, 5]


def test_a_code_is_drawn_of_those_that_write_what_happened(put):
    """A step in which nothing moves is explained by every way that was blocked; others by their own code alone."""
    put(action_source="latent")
    shown = material(still, models=dict(actions=Actor(write=simulate)))
    shown.merged, index, T, n = torch.arange(5), torch.arange(12), 4, 40
    frames, before = shown.clips.cells(index, T).numpy(), shown.tokens_and_actions(index, T)[1]
    drawn = torch.stack([shown.redraw(index, before, draw.pair_hash(index.numpy()[:, None] * T + np.arange(T), step))
                         for step in range(n)])                                  # (n, B, T)
    assert (drawn[..., :HISTORY] == before[:, :HISTORY]).all()
    assert shown.redraw(index, before[:, :1], np.zeros((12, 1), np.uint64)).tolist() == before[:, :1].tolist()
    several = 0
    for clip, t in itertools.product(index.tolist(), range(HISTORY, T)):
        right = [code for code in range(5) if (simulate(frames[clip, t - 1][None], [code])[0] == frames[clip, t]).all()]
        counts = drawn[:, clip, t].bincount(minlength=5)
        assert counts.nonzero()[:, 0].tolist() == right and counts[right].min() > n / len(right) / 4
        several += len(right) > 1
    assert several > 3
