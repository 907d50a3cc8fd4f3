"""The figures and losses of train_worldmodel.py, by stub models whose scores are known and by loops: about 15 s."""
import itertools
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train_worldmodel as w  # noqa: E402
from data.video import (AGENT, BALL, FLOOR, MOVES, Clips, Stream, World, caption, load, paint, read_cells,  # noqa: E402
                        render)
from models import world_measures as m  # noqa: E402
from models.discrete import Quantised  # noqa: E402
from models.world_actions import ActionModel  # noqa: E402
from models.world_dynamics import Dynamics  # noqa: E402
from models.world_tokenizer import Tokenizer  # noqa: E402
from models.world_words import as_characters  # noqa: E402
from nanolab.play import Session  # noqa: E402
from nanolab.run import load_checkpoint  # noqa: E402
from nanolab.world import Reader, latent_actions  # noqa: E402
from forks import assert_done, assert_equal, records, summary  # noqa: E402
from test_worldmodel_resume import at, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "small")
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


@pytest.fixture
def put(monkeypatch):
    """Sets settings of the script for one test."""
    def put(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(w, name, value)
    return put


@pytest.fixture
def small(put):
    put(side=SIDE, cell_px=PX, patch=PX, history=HISTORY, n_codes=8, codebook_size=8, eval_clips=70, rollout_clips=70,
        context=CONTEXT, window=3, tokens="cells", action_source="true", max_steps=None, tokenizer_frames=3,
        decode_steps=3)


@pytest.fixture(scope="module")
def video():
    return load("gridworld", 12, 24, 20, SIDE, PX)


@pytest.fixture(scope="module")
def still():
    """Without a ball a frame says all of its world, so that World goes on from it exactly."""
    return load("gridworld", 12, 24, 20, SIDE, PX, ball=False)


def reader(clips, palette=None, models=None, n_actions=5):
    """Of clips, by the settings of the script."""
    return Reader(clips, palette, "cpu", models, w.tokens, w.action_source, n_actions, w.n_codes)


def material(video, part="val", models=None):
    return reader(getattr(video, part), video.palette, models)


def spread(clips, T, count):
    return reader(clips).spread(T, count)


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


# --- Small functions ---

def test_psnr_of_known_errors():
    for error, wanted in ((1, 0), (0.1, 10), (0.01, 20), (0.5, 3.0103), (0, 100)):
        assert m.psnr(error) == near(wanted)


@pytest.mark.parametrize("height, width", [(13, 14), (7, 12), (8, 10), (13, 9), (11, 11)])
def test_ssim_is_that_of_loops_over_windows(height, width):
    """11 x 11 windows, or as many pixels as the shorter side has, inside the frame, each with its own moments."""
    a = some(2, height, width, 3)
    b = (a + 0.4 * some(2, height, width, 3, seed=1) - 0.2).clamp(0, 1)
    size = min(11, height, width)
    line = [math.exp(-(i - (size - 1) / 2) ** 2 / (2 * 1.5 ** 2)) for i in range(size)]
    kernel = np.outer(line, line) / sum(line) ** 2
    values = []
    for frame, colour in itertools.product(range(2), range(3)):
        for top, left in itertools.product(range(height - size + 1), range(width - size + 1)):
            x, y = (t[frame, top:top + size, left:left + size, colour].double().numpy() for t in (a, b))
            mx, my = (kernel * x).sum(), (kernel * y).sum()
            vx, vy, cov = ((kernel * u * v).sum() for u, v in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    assert m.ssim(a, b) == near(np.mean(values)) and 0.5 < np.mean(values) < 0.95
    assert m.ssim(a, a) == near(1, 1e-6)


def test_ssim_of_constant_frames():
    """Only the means differ: (2 a b + c1) / (a^2 + b^2 + c1), averaged over colours."""
    a, b = (torch.tensor(colour).expand(1, 12, 12, 3) for colour in ((0.1, 0.5, 0.9), (0.4, 0.5, 0.2)))
    wanted = sum((2 * x * y + 1e-4) / (x * x + y * y + 1e-4) for x, y in ((0.1, 0.4), (0.5, 0.5), (0.9, 0.2))) / 3
    assert m.ssim(a, b) == near(wanted, 2e-3)


def test_spread_reaches_from_the_first_clip_to_the_last(video):
    n = 24 * 15                                               # windows of 6 frames in 24 episodes of 20
    found = spread(video.val, 6, 50)
    gaps = found.diff()
    assert len(found) == 50 and found[0] == 0 and found[-1] == n - 1 and gaps.max() - gaps.min() <= 1
    assert spread(video.val, 6, 10 ** 6).tolist() == list(range(n))
    assert spread(video.val, 6, 1).tolist() == [0]


def test_falling_is_a_line_to_nothing():
    assert [w.falling(step, 100, 20.0, 0.5) for step in (0, 10, 25, 50, 51, 100)] == [20, 16, 10, 0, 0, 0]
    assert w.falling(30, 40, 2.0, 1.0) == 0.5 and w.falling(0, 0, 5.0, 0.5) == 0


def test_majority_map_counts_as_a_counter_does():
    codes, labels = whole(6, 301), whole(5, 301, seed=1)
    labels[codes == 4] = 3
    codes[codes == 5] = 2                                     # 5 never comes
    found = m.majority_map(codes, labels, 6, 5).tolist()
    for code in range(5):
        counts = Counter(labels[codes == code].tolist())
        assert counts[found[code]] == max(counts.values())
    assert found[4] == 3


@pytest.mark.parametrize("counts", [(1, 2, 4, 8, 16), (16, 1, 8, 2, 4), (5, 5, 5, 5), (1, 1, 1, 1, 4), (60, 13, 11, 9),
                                    (0, 3, 0, 5, 1), (40, 15, 15, 15, 15)])  # the last: not the two rarest
@pytest.mark.parametrize("n_codes", [2, 3, 4])
def test_ceilings_are_the_best_map_from_labels_to_codes(counts, n_codes):
    """All maps are tried."""
    labels = [label for label, n in enumerate(counts) for _ in range(n)]
    information = majority = 0
    for map in itertools.product(range(n_codes), repeat=len(counts)):
        codes = [map[label] for label in labels]
        information = max(information, entropy(codes))        # a map of the label: H(code | label) is 0
        best = Counter()
        for pair, n in Counter(zip(codes, labels)).items():
            best[pair[0]] = max(best[pair[0]], n)
        majority = max(majority, sum(best.values()) / len(labels))
    found = m.ceilings(torch.tensor(counts), n_codes)
    assert found["ceiling_information"] == near(information / entropy(labels), 1e-6)
    assert found["ceiling_majority"] == near(majority, 1e-6)


@pytest.mark.parametrize("n_codes", [5, 8])
def test_as_many_codes_as_labels_can_say_all(n_codes):
    assert m.ceilings(torch.tensor([7, 1, 2, 3, 9]), n_codes) == dict(ceiling_information=near(1),
                                                                      ceiling_majority=near(1))


def test_hide(put):
    """A share of each frame's tokens between the two of mask_rate, uniform; the same by the same generator."""
    truth = torch.zeros(40, 5, 1000)

    def shares(low, high, seed=0):
        put(mask_rate=(low, high))
        hidden = w.hide(truth.shape, torch.Generator().manual_seed(seed))
        assert hidden.shape == truth.shape and hidden.dtype == torch.bool
        return hidden.float().mean(-1)
    assert not shares(0.0, 0.0).any() and (shares(1.0, 1.0) == 1).all()
    assert (shares(0.3, 0.3) - 0.3).abs().max() < 0.07
    found = shares(0.2, 0.8)
    assert 0.13 < found.min() < 0.25 and 0.75 < found.max() < 0.87
    assert found.mean().item() == near(0.5, 0.05) and found.std().item() == near(0.6 / 12 ** 0.5, 0.03)
    assert found.std(0).min() > 0.1 < found.std(1).mean()     # each frame has a rate of its own
    assert torch.equal(found, shares(0.2, 0.8)) and not torch.equal(found, shares(0.2, 0.8, seed=1))
    put(mask_rate=(0.5, 0.5))
    columns = w.hide(truth.shape, torch.Generator().manual_seed(0)).float().mean((0, 1))
    assert (columns - 0.5).abs().max() < 0.2                  # and every place its turn


# --- Tokenizer ---

class Painter:
    """A tokenizer that writes `paint_(cells)`, with given codes."""
    patch, codebook_size = PX, 8

    def __init__(self, paint_, T=3):
        self.paint_, self.T, self.n = paint_, T, 0

    def __call__(self, frames, estimator="vq"):
        assert estimator is None and frames.size(1) == self.T   # validation must not move the codebook
        codes = (torch.arange(self.n, self.n + len(frames)) % 4).view(-1, 1).expand(-1, self.T * 25)
        self.n += len(frames)
        return as_logits(self.paint_(cells_of(frames))), Quantised(None, codes.clone())


def test_a_tokenizer_that_returns_the_truth(video):
    found = evaluate("tokenizer", Painter(lambda cells: cells), material(video))
    assert found["psnr"] == found["changed_psnr"] == 100 and found["ssim"] == near(1) and found["changed_floor"] < 30
    assert found["loss"] == near(nats_of(0, 1, 6)) and found["score"] == -found["loss"]
    assert found["usage"] == 0.5 and found["perplexity"] == near(4, 2e-3)     # 70 clips: 18, 18, 17, 17


@pytest.mark.parametrize("T", [2, 3])
def test_a_tokenizer_that_copies_the_frame_before(put, video, T):
    """All by loops over clips, frames and patches; 70 clips are a batch of 64 and one of 6."""
    put(tokenizer_frames=T)
    cells = video.val.cells(spread(video.val, T, 70), T).numpy()
    found = evaluate("tokenizer", Painter(lambda cells: cells[:, [0, *range(T - 1)]], T), material(video))
    errors, changed, wrong, likeness = [], [], 0, []
    for clip in cells:
        for t in range(T):
            a, b = clip[t], clip[max(t - 1, 0)]
            errors.append(picture_error(a, b))
            wrong += (render(a, PX) != render(b, PX)).sum()
            likeness.append(m.ssim(*(torch.from_numpy(paint(x, PX))[None].float() / 255 for x in (a, b))))
            changed += [picture_error(a[i:i + 1, j:j + 1], b[i:i + 1, j:j + 1])
                        for i in range(SIDE) for j in range(SIDE) if a[i, j] != b[i, j]]
    assert found["psnr"] == near(decibels(np.mean(errors)))
    assert found["changed_psnr"] == near(decibels(np.mean(changed))) == near(found["changed_floor"])
    assert found["ssim"] == near(np.mean(likeness))
    assert found["loss"] == near(nats_of(wrong, 70 * T * (SIDE * PX) ** 2, 6))


def test_a_tokenizer_of_pixels_without_a_palette(put):
    """0.1 too bright everywhere: 20 dB, in frames that never change; what is above 1 is seen as 1."""
    put(tokenizer_frames=2, eval_clips=5)
    clips = Clips(None, torch.full((2, 4, 8, 8, 3), 51, dtype=torch.uint8))
    shown = reader(clips)

    class Brighter(Painter):
        def __call__(self, frames, estimator):
            return frames + self.paint_, Quantised(None, whole(8, 5, 8))

    def brighter(by):
        return evaluate("tokenizer", Brighter(by, 2), shown)
    found = brighter(0.1)
    assert found["psnr"] == near(20) == near(found["frame_psnr"]) and found["loss"] == near(0.01)
    assert math.isnan(found["changed_floor"]) and math.isnan(found["changed_psnr"])           # of no patches
    assert brighter(3)["psnr"] == near(decibels(0.8 ** 2)) and brighter(3)["loss"] == near(9)


# --- Latent actions ---

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
        self.training, self.quantiser, self.windows = True, Codes(), []

    def train(self, mode=True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)

    def encode(self, frames):
        assert frames.size(1) == self.history + 1 and not self.training
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


class Blind(Actor):
    """One of pixels, that writes the frame before plus 0.1."""

    def encode(self, frames):
        return torch.zeros(len(frames), dtype=torch.int64)

    def predict(self, frames, e):
        return frames[:, -1] + 0.1

    def __call__(self, frames):
        return self.predict(frames[:, :-1], None), None


def scored(video, model=None, count=70, history=HISTORY):
    """(figures, cells (B, history + 4, side, side), effective actions (B, 4)) of the clips that are scored."""
    T = history + 4
    index = spread(video.val, T, count)
    labels = video.val.effective(index, T)[:, history - 1:]
    assert labels.shape == (count, 4)
    cells = video.val.cells(index, T).numpy()
    if model is None:
        return cells, labels
    found = evaluate("actions", model, material(video))
    assert model.training                                     # as it was
    return found, cells, labels


@pytest.mark.parametrize("history", [1, 2, 3])
def test_codes_that_are_the_action_say_all(put, video, history):
    put(history=history)
    found, _, labels = scored(video, Actor(lambda action, row: action * 3 % 8, history=history), 70, history)
    assert found["information"] == near(1) and found["majority"] == found["majority_200"] == 1
    assert found["usage"] == 5 / 8 and found["perplexity"] == near(math.exp(entropy(labels.flatten().tolist())))
    assert found["ceiling_information"] == near(1) == found["ceiling_majority"]


def test_a_constant_code_says_nothing(video):
    found, _, labels = scored(video, Actor(lambda action, row: action * 0 + 6))
    assert found["information"] == near(0, 1e-9)
    floor = max(Counter(labels[35:].flatten().tolist()).values()) / (35 * 4)      # of the half that is scored
    assert found["majority"] == found["majority_200"] == near(floor) == near(found["majority_floor"])
    assert found["usage"] == 1 / 8 and found["perplexity"] == near(1)


def test_a_code_that_says_moved_or_not(put, video):
    found, _, labels = scored(video, Actor(lambda action, row: (action > 0).long()))
    labels = labels.flatten().tolist()
    wanted = entropy([label > 0 for label in labels]) / entropy(labels)
    assert found["information"] == near(wanted) == near(found["moved_information"]) and 0.2 < wanted < 0.8
    put(n_codes=2)
    model = Actor(lambda action, row: (action > 0).long())
    model.n_codes = 2
    found = evaluate("actions", model, material(video))
    shares = sorted(Counter(labels).values())
    assert found["ceiling_majority"] == near(sum(shares[-2:]) / len(labels)) and found["ceiling_information"] < 1


def test_the_map_is_counted_on_the_first_half_and_scored_on_the_second(put, video):
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


def test_codes_are_shown_with_the_action_that_goes_with_them(video):
    """A code that never comes means nothing in particular; where no actions are known there is nothing to show."""
    model = Actor(lambda action, row: action * 3 % 8).eval()
    found = m.meanings_of(model, material(video), w.eval_clips)
    assert [found[label * 3 % 8].item() for label in range(5)] == [0, 1, 2, 3, 4] and len(found) == 8
    assert m.meanings_of(model, reader(video.val, n_actions=0), w.eval_clips) is None


def test_frames_written_by_a_simulator(still):
    """Inferred codes write the truth; permuted and random ones what their worlds come to, by a loop."""
    model = Actor(write=simulate)
    before = torch.get_rng_state()
    found, cells, labels = scored(still, model)
    assert torch.equal(torch.get_rng_state(), before)         # draws of its own: training goes on as if it were not
    assert found["psnr_1"] == found["psnr_4"] == 100 and found["loss"] == near(nats_of(0, 1, 6))
    plans = {"permuted": [], "random": []}
    for batch in range(2):                                    # 4 frames each by inferred, permuted and random codes
        plans["permuted"].append(torch.stack(model.quantiser.asked[batch * 12 + 4:batch * 12 + 8], 1))
        plans["random"].append(torch.stack(model.quantiser.asked[batch * 12 + 8:batch * 12 + 12], 1))
    shifted = [torch.cat((part[-1:], part[:-1])) for part in labels.split(64)]
    assert all(map(torch.equal, plans["permuted"], shifted))  # those of the clip before in the batch
    drawn = torch.cat(plans["random"]).flatten()
    assert (drawn.bincount(minlength=8).double() / len(drawn) - 1 / 8).abs().max() < 0.06 and drawn.max() == 7
    errors = {}
    for name, plan in plans.items():
        now = cells[:, HISTORY - 1]
        for t, codes in enumerate(torch.cat(plan).T):
            now = simulate(now, codes.numpy())
            errors[name, t] = picture_error(now, cells[:, HISTORY + t])
    for t in (0, 3):
        assert found[f"dpsnr_{t + 1}"] == near(100 - decibels(errors["permuted", t]))
        copied = picture_error(cells[:, HISTORY - 1], cells[:, HISTORY + t])
        assert found[f"copy_{t + 1}"] == near(decibels(copied))
    assert found["dpsnr_random_4"] == near(100 - decibels(errors["random", 3]))
    assert found["dpsnr_1"] > 50 < found["dpsnr_4"]


def test_frames_that_are_copies(video):
    found, cells, _ = scored(video, Actor())
    assert found["psnr_1"] == near(found["copy_1"]) and found["psnr_4"] == near(found["copy_4"])
    assert found["dpsnr_1"] == found["dpsnr_4"] == found["dpsnr_random_4"] == 0 < found["copy_4"] < found["copy_1"]
    wrong = (render(cells[:, HISTORY - 1], PX) != render(cells[:, HISTORY], PX)).sum()
    assert found["loss"] == near(nats_of(wrong, 70 * (SIDE * PX) ** 2, 6)) and found["score"] == -found["loss"]


def test_without_actions_there_is_nothing_to_name(put):
    """Figures of frames alone."""
    put(eval_clips=4)
    clips = Clips(None, torch.full((1, 9, 8, 8, 3), 51, dtype=torch.uint8))
    found = evaluate("actions", Blind(), reader(clips, n_actions=0))
    assert found["psnr_1"] == near(20) and found["psnr_4"] == near(decibels(0.4 ** 2)) and found["copy_4"] == 100
    assert found["frame_psnr_1"] == near(20)
    assert found["loss"] == near(0.01) and not {"information", "majority", "consistency"} & found.keys()


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


def consistency(video, write, shares=None):
    shares = torch.full((8,), 1 / 8) if shares is None else shares
    return m.consistency_of(Actor(write=write).eval(), material(video), shares, w.eval_clips)


def test_codes_that_mean_a_direction_are_consistent(video):
    found = consistency(video, direction)
    assert found["consistency"] == near(1) and found["lost"] == 0
    within = evaluate("actions", Actor(write=direction), material(video))
    assert within["consistency"] == near(1) and within["lost"] == 0


def test_codes_that_mean_nothing_are_not(put, video):
    """Mean cosine of random directions: 0, without a step's cosine with itself, which would make it 1 / n."""
    put(eval_clips=240)
    rng = np.random.default_rng(0)
    found = consistency(video, lambda cells, codes: shifted(cells, MOVES[rng.integers(1, 5, len(cells))]))
    assert abs(found["consistency"]) < 0.01 and found["lost"] == 0
    found = consistency(video, copy_)                         # nobody moves: no direction, which is not one of 0
    assert math.isnan(found["consistency"]) and found["lost"] == 0


def test_an_agent_that_is_gone_or_there_twice_is_lost(video):
    def erased(cells, codes):
        return np.where(cells == AGENT, FLOOR, cells)

    def doubled(cells, codes):
        out = cells.copy()
        for picture in out:
            picture[tuple(np.argwhere(picture != AGENT)[0])] = AGENT
        return out
    for write in (erased, doubled):
        found = consistency(video, write)
        assert math.isnan(found["consistency"]) and found["lost"] == near(1)
    shares = torch.tensor([0.5, 0.3, 0.2, 0, 0, 0, 0, 0])
    found = consistency(video, lambda cells, codes: erased(cells, codes) if codes[0] == 1 else direction(cells, codes),
                        shares)
    assert found["lost"] == near(0.3)


def test_consistency_is_the_mean_cosine_of_all_pairs(put, video):
    """By loops: any jump has a direction, codes count by their share and how often the agent moved."""
    put(eval_clips=70)
    index = spread(video.val, HISTORY, 70)
    before = [tuple(np.argwhere(picture == AGENT)[0]) for picture in video.val.cells(index, HISTORY)[:, -1].numpy()]
    rng = np.random.default_rng(1)
    jumps = rng.integers(-2, 3, (8, 70, 2))
    jumps[0, 10:] = 0                                         # seldom moves
    jumps[1], jumps[2, ::2], jumps[3, 20:] = (1, 0), (0, -1), (-2, 1)
    seen = {code: 0 for code in range(8)}

    def write(cells, codes):
        code = int(codes[0])
        steps = jumps[code][seen[code]:seen[code] + len(cells)]
        seen[code] += len(cells)
        return shifted(cells, steps)
    shares = some(8)
    shares = shares / shares.sum()
    found = consistency(video, write, shares)
    total = weights = 0
    for code in range(8):
        kept = [step / np.linalg.norm(step) for place, step in zip(before, jumps[code]) if step.any()
                and all(0 <= p + s < SIDE for p, s in zip(place, step))]
        cosines = [a @ b for a, b in itertools.combinations(kept, 2)]
        weight = shares[code].item() * len(kept)
        total, weights = total + weight * np.mean(cosines), weights + weight
    assert seen == {code: 70 for code in range(8)}
    assert found["consistency"] == near(total / weights, 1e-3) and 0.1 < total / weights < 0.9


# --- Floors ---

def probed(labels, written, n=700, levels=4):
    """linear_probe of noise in which, on frame k + 1, the patch of label k is a little brighter. labels (n, 2)."""
    frames = np.random.default_rng(0).integers(0, 200, (n, 3, 16, 16, 3), dtype=np.uint8)
    for i, k in itertools.product(range(n), written):
        frames[i, k + 1, 4 * labels[i, k]:4 * labels[i, k] + 4, :8] += 55
    clips = [Clips(None, torch.from_numpy(frames[part]), torch.from_numpy(labels[part]).to(torch.uint8))
             for part in (slice(n - 200), slice(n - 200, n))]
    return m.linear_probe(*(reader(part, n_actions=levels) for part in clips), 3, w.eval_clips)


def test_a_linear_probe_finds_what_is_linear_and_nothing_else(put):
    put(eval_clips=200)
    labels = np.random.default_rng(1).choice(4, (700, 2), p=(0.4, 0.2, 0.2, 0.2))
    floor = max(Counter(labels[500:, 1].tolist()).values()) / 200
    found = probed(labels, [1])
    assert found["probe_information"] > 0.95 and found["probe_majority"] > 0.98
    assert found["probe_floor"] == near(floor)
    found = probed(labels, [0])                               # only the action before is in the frames
    assert found["probe_information"] < 0.08 and abs(found["probe_majority"] - floor) < 0.15


def test_the_untrained_floor_is_the_same_again(put, video, monkeypatch):
    """And it is that of a model whose BatchNorm knows the training batches."""
    put(eval_clips=16, batch_size=8, action_embd=8, action_layers=1, seed=3, data_seed=4, deterministic=False)
    class Unseen(Reader):
        def frames(self, index, T):
            assert T != HISTORY + 1                           # held-out clips settle nothing
            return super().frames(index, T)

    def floor():
        unseen = Unseen(video.val, video.palette, "cpu", n_actions=5)
        return w.floors(video, material(video, "train"), unseen)
    monkeypatch.setattr(m, "linear_probe", lambda *_: {})
    first = floor()
    torch.rand(7)
    assert floor() == first
    assert set(first) == {"untrained_information", "untrained_majority"} and 0 < first["untrained_information"] < 0.9
    built, evaluate = [], m.evaluate_actions
    monkeypatch.setattr(m, "evaluate_actions", lambda model, *more: built.append(model) or evaluate(model, *more))
    assert floor() == first
    model, norm = built[0], built[0].quantiser.norm
    index = torch.cat([Stream(video.train, 3, 8, 4).at(step) for step in range(8)])
    with torch.no_grad():
        u = model.encode(material(video, "train").frames(index, 3))
    torch.manual_seed(3)
    assert all(map(torch.equal, model.parameters(), w.build("actions", video).parameters()))
    assert ((norm.running_mean - u.mean(0)).abs() < 0.3 * u.std(0) + 0.05 * u.mean(0).abs()).all()
    put(seed=5)
    assert floor() != first


# --- Dynamics ---

class Namer:
    """Dynamics that name given tokens said (B, N) of the clips' last frames, in order; checks what it is shown."""
    n_actions = 5

    def __init__(self, clips, said, logits=None, rename=lambda cells: cells, size=4):
        index = spread(clips, CONTEXT, len(said))
        self.truth, self.acts = rename(clips.cells(index, CONTEXT).flatten(2).long()), clips.actions(index, CONTEXT)
        self.logits = F.one_hot(rename(said), size) * SHARP if logits is None else logits
        self.mask, self.n, self.training = size, 0, True

    train, eval = Actor.train, Actor.eval

    def __call__(self, tokens, acts, cache=None, window=None):
        rows = slice(self.n, self.n + len(tokens))
        assert window == (3 if cache is None else None)       # a cache has its own
        assert not self.training and (acts[:, 0] == self.n_actions).all()
        assert torch.equal(acts[:, 1:], self.acts[rows, :acts.size(1) - 1])
        assert torch.equal(tokens[:, :CONTEXT - 1], self.truth[rows, :-1])
        if cache is not None:                                 # causal: reads what is before
            cache += [rows]
            assert tokens.size(1) == CONTEXT - 1
            return None
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
        (rows,) = cache
        assert temperature == 0 and torch.equal(acts, self.acts[rows, -1])
        self.n += len(acts)
        return self.spoken[rows]


def last_frames(video):
    """(last, before), (70, N) each."""
    cells = video.val.cells(spread(video.val, CONTEXT, 70), CONTEXT).flatten(2).long()
    return cells[:, -1], cells[:, -2]


def by_loops(said, last, before):
    """What evaluate_dynamics counts, in plain Python."""
    seen = Counter()
    for row, truth, past in zip(said.tolist(), last.tolist(), before.tolist()):
        seen["frames"] += 1
        seen["frame"] += row == truth
        for a, b, c in zip(row, truth, past):
            seen["all"] += 1
            seen["tokens"] += a == b
            seen["copy"] += b == c
            seen["moved"] += b != c
            seen["changed"] += b != c and a == b
            for kind, name in ((AGENT, "agent"), (BALL, "ball")):
                seen[name + "s"] += b == kind != c
                seen[name] += a == b == kind != c
    return dict(tokens=seen["tokens"] / seen["all"], copy=seen["copy"] / seen["all"],
                changed=seen["changed"] / seen["moved"], frame=seen["frame"] / seen["frames"],
                agent=seen["agent"] / seen["agents"], ball=seen["ball"] / seen["balls"])


def assert_figures(found, wanted):
    for name, value in wanted.items():
        assert found[name] == near(value, 1e-6), name


def test_dynamics_that_know_the_truth(video):
    last, _ = last_frames(video)
    model = Namer(video.val, last)
    found = evaluate("dynamics", model, material(video))
    assert_figures(found, dict(tokens=1, changed=1, agent=1, ball=1, frame=1))
    assert model.n == 70 and model.training
    assert found["loss"] == near(nats_of(0, 1, 4)) and found["perplexity"] == near(math.exp(found["loss"]))


def test_dynamics_that_copy(video):
    last, before = last_frames(video)
    found = evaluate("dynamics", Namer(video.val, before), material(video))
    assert_figures(found, dict(tokens=found["copy"], changed=0, agent=0, ball=0, frame=(last == before).all(1).double()
                               .mean().item()))
    assert found["copy"] == near((last == before).double().mean().item()) and 0.7 < found["copy"] < 0.95
    assert found["loss"] == near(nats_of((last != before).sum().item(), last.numel(), 4))
    assert found["score"] == -found["loss"]


def mixture(video):
    """Frames that are partly right: some whole, most of the others with half of what changed."""
    last, before = last_frames(video)
    said = torch.where(some(*last.shape) < 0.5, last, before)
    said[::5] = last[::5]
    said[1, 3] = (last[1, 3] + 1) % 4
    return said, last, before


def test_dynamics_that_are_partly_right_by_loops(video):
    said, last, before = mixture(video)
    wanted = by_loops(said, last, before)
    assert all(0.2 < wanted[name] < 0.97 for name in wanted)
    assert_figures(evaluate("dynamics", Namer(video.val, said), material(video)), wanted)


def test_loss_of_dynamics_is_in_nats_of_the_last_frame(video):
    last, _ = last_frames(video)
    logits = 3 * some(*last.shape, 4)
    found = evaluate("dynamics", Namer(video.val, last, logits), material(video))
    nats = [-math.log(math.exp(row[k]) / sum(map(math.exp, row)))
            for row, k in zip(logits.view(-1, 4).tolist(), last.flatten().tolist())]
    assert found["loss"] == near(np.mean(nats)) and found["perplexity"] == near(math.exp(np.mean(nats)))


def test_causal_dynamics_name_by_generation(put, video):
    """Figures are of what they generate, the loss of what they say given the true tokens."""
    put(dynamics="causal")
    said, last, before = mixture(video)
    model = Namer(video.val, last)
    model.spoken = said
    found = evaluate("dynamics", model, material(video))
    assert_figures(found, by_loops(said, last, before))
    assert found["loss"] == near(nats_of(0, 1, 4)) and model.n == 70


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


def test_agent_and_ball_are_read_from_what_the_tokenizer_draws(put, video):
    put(tokens="tokenizer")
    said, last, before = mixture(video)
    model = Namer(video.val, said, rename=renamed, size=8)
    coder = Coder()
    found = evaluate("dynamics", model, material(video, models=dict(tokenizer=coder)))
    assert_figures(found, by_loops(said, last, before))
    assert set(coder.shown) == {CONTEXT}


# --- Rollouts ---

class Dreamer:
    """Dynamics whose frames are `write(cells, plan's actions)` of those before."""
    n_actions = 5

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
def test_rollouts_of_a_simulator(put, still, tokens):
    """With the actions that led there the truth, 16 frames on; with others what World comes to."""
    put(window=7, temperature=0.5, tokens=tokens)
    model = Dreamer(simulate, (7, 3, 0.5))
    if tokens == "tokenizer":
        model.rename = renamed
    before, coder = torch.get_rng_state(), Coder()
    found = rollouts(model, material(still, models=dict(tokenizer=coder)))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(coder.shown) == ({CONTEXT - 1 + 16} if tokens == "tokenizer" else set())
    index = spread(still.val, CONTEXT - 1 + 16, 70)
    cells, acts = still.val.cells(index, CONTEXT - 1 + 16).numpy(), still.val.actions(index, CONTEXT - 1 + 16)
    plan = acts[:, CONTEXT - 2:]
    shift = torch.cat([torch.cat((part[-1:], part[:-1])) for part in plan.split(64)])
    true, permuted, random = (torch.cat(model.plans[i::3]) for i in range(3))
    assert torch.equal(true, plan) and torch.equal(permuted, shift) and random.shape == plan.shape
    assert (random.flatten().bincount(minlength=5).double() / random.numel() - 0.2).abs().max() < 0.05
    assert len(index) == len(true) == 48                      # 24 episodes of 20 frames hold two clips of 19
    for name, chosen in (("permuted", permuted), ("random", random)):
        now = cells[:, CONTEXT - 2]
        for t in range(1, 17):
            now = simulate(now, chosen[:, t - 1].numpy())
            if t in (1, 4, 16):
                assert found[f"{name}_{t}"] == near(decibels(picture_error(now, cells[:, CONTEXT - 2 + t]))), (name, t)
    for t in (1, 4, 16):
        assert found[f"psnr_{t}"] == 100 and found[f"exact_{t}"] == 1
        assert found[f"copy_{t}"] == near(decibels(picture_error(cells[:, CONTEXT - 2], cells[:, CONTEXT - 2 + t])))
    assert found["dpsnr_4"] == near(100 - found["random_4"]) and found["dpsnr_permuted_4"] == near(
        100 - found["permuted_4"])
    assert found["permuted_4"] < 40 > found["random_4"]


def test_rollouts_that_copy(put, video):
    """In 70 clips, a batch of 64 and one of 6; 8 frames ahead, so that none is the 16th."""
    clips = Clips(video.val.stored_cells[:, :12], None, video.val.stored_actions[:, :11],
                  video.val.stored_effective[:, :11], PX)
    put(context=5)

    class Copier(Dreamer):
        def generate(self, tokens, acts, plan, **how):
            return tokens[:, -1:].expand(-1, plan.size(1), -1)
    found = rollouts(Copier(None, None), reader(clips, video.palette))
    assert "psnr_16" not in found and found["dpsnr_4"] == found["dpsnr_permuted_4"] == 0
    cells = clips.cells(spread(clips, 12, 70), 12).numpy()
    for t in (1, 4):
        a, b = cells[:, 3], cells[:, 3 + t]
        assert found[f"psnr_{t}"] == found[f"copy_{t}"] == near(decibels(picture_error(a, b)))
        assert found[f"exact_{t}"] == near((a == b).all((1, 2)).mean())


# --- Figures over nothing ---

def cut(video, episodes, length):
    """A Reader of the first episodes of val, each of so many frames: one clip in each of so many."""
    clips = Clips(video.val.stored_cells[:episodes, :length], None, video.val.stored_actions[:episodes, :length - 1],
                  video.val.stored_effective[:episodes, :length - 1], PX)
    return reader(clips, video.palette)


def test_frames_have_a_psnr_each(video):
    """Beside that of the pooled error: the mean over frames, by a loop."""
    cells = video.val.cells(spread(video.val, 3, 70), 3).numpy()
    found = evaluate("tokenizer", Painter(lambda cells: cells[:, [0, 0, 1]]), material(video))
    each = [decibels(picture_error(clip[t], clip[max(t - 1, 0)])) for clip in cells for t in range(3)]
    assert found["frame_psnr"] == near(np.mean(each)) and found["frame_psnr"] > found["psnr"] + 1


def test_a_clip_alone_is_no_control(put, still):
    """One of one clip has none; one that is the 65th is left out of the control and of what that is compared with."""
    put(eval_clips=70, rollout_clips=70, context=CONTEXT, window=3, n_codes=8)
    found = evaluate("actions", Actor(write=simulate), cut(still, 1, HISTORY + 4))
    for key in ("dpsnr_1", "dpsnr_4", "majority", "majority_200"):
        assert math.isnan(found[key]), key
    assert found["psnr_1"] == found["frame_psnr_1"] == 100 and found["dpsnr_random_4"] > 0
    many = load("gridworld", 12, 65, 20, SIDE, PX, ball=False)

    def write(cells, codes):                                  # the clip alone is written wrongly, whatever its code
        return simulate(cells, codes) if len(cells) > 1 else np.where(cells == AGENT, FLOOR, cells)
    figures = [evaluate("actions", Actor(write=write), cut(many, n, HISTORY + 4)) for n in (64, 65)]
    assert figures[0]["dpsnr_4"] == figures[1]["dpsnr_4"] and figures[0]["psnr_4"] > figures[1]["psnr_4"]
    T = CONTEXT + 3
    roll = [rollouts(Dreamer(write, (3, 3, w.temperature)), cut(many, n, T)) for n in (1, 64, 65)]
    assert math.isnan(roll[0]["permuted_4"]) and math.isnan(roll[0]["dpsnr_permuted_4"]) and roll[0]["random_1"] < 100
    for key in ("permuted_1", "permuted_4", "dpsnr_permuted_4"):
        assert roll[1][key] == roll[2][key], key
    assert roll[1]["psnr_4"] == 100 > roll[2]["psnr_4"] and not {key for key in roll[2] if "paired" in key}


def test_what_is_over_nothing_is_not_a_number(put, still):
    """Nothing moves: no changed tokens, no information, no direction; one action: no control. Said in words, not 0."""
    clips = Clips(still.val.stored_cells[:, :1].expand(-1, 9, -1, -1), None, torch.zeros(24, 8, dtype=torch.uint8),
                  torch.zeros(24, 8, dtype=torch.uint8), PX)
    shown = reader(clips, still.palette)
    found = evaluate("actions", Actor(), shown)
    for key in ("information", "moved_information", "ceiling_information", "consistency"):
        assert math.isnan(found[key]), key
    assert found["majority"] == 1 and found["copy_4"] == 100
    truth = clips.cells(spread(clips, CONTEXT, 70), CONTEXT).flatten(2).long()
    found = evaluate("dynamics", Namer(clips, truth[:, -1]), shown)
    assert math.isnan(found["changed"]) and found["tokens"] == 1 and not {"agent", "ball"} & found.keys()
    assert "changed nan (nothing changes)" in w.in_words("dynamics", found)
    found = evaluate("tokenizer", Painter(lambda cells: cells), shown)
    assert math.isnan(found["changed_psnr"]) and math.isnan(found["changed_floor"]) and found["psnr"] == 100
    put(temperature=0.0)
    one = Dreamer(copy_, (3, 3, 0.0))
    one.n_actions = 1
    one.generate = lambda tokens, acts, plan, **how: tokens[:, -1:].expand(-1, plan.size(1), -1)
    found = rollouts(one, shown)
    for key in ("permuted_4", "random_4", "dpsnr_4", "dpsnr_permuted_4"):
        assert math.isnan(found[key]), key
    assert found["psnr_4"] == found["copy_4"] == 100
    assert math.isnan(probed(np.zeros((700, 2), np.int64), [])["probe_information"])


# --- Words ---

def test_first_frames_that_are_known(put, video):
    """A stub that draws what the captions say, but names one wall wrong in a pass; and one that knows nothing."""
    cells = video.val.cells(spread(video.val, 1, 70), 1).flatten(2).long()[:, 0]

    class Illustrator:
        codebook_size, n = 4, 0

        def read(self, text):
            return text

        def __call__(self, tokens, held):
            assert (tokens == 4).all() and held.shape[0] == len(tokens)
            said = cells[self.n:self.n + len(tokens)].clone()
            said[::2, 0] = (said[::2, 0] + 1) % 4
            return F.one_hot(said, 4) * SHARP

        def draw(self, text, steps, temperature):
            assert steps == 3 and temperature == 0
            self.n += len(text)
            return cells[self.n - len(text):self.n]
    found = evaluate("frame", Illustrator(), material(video))
    assert found["tokens"] == near(1 - 35 / (70 * 25)) and found["frame"] == 0.5 and found["drawn"] == 1
    assert found["loss"] == near(nats_of(35, 70 * 25, 4)) and found["score"] == -found["loss"]
    assert found["floor"] == near(max(Counter(cells.flatten().tolist()).values()) / (70 * 25))


def test_a_writer_that_is_known(put, video):
    """Nats are means over characters, so that short captions do not count more; texts are read back."""
    texts = ["agent at a1, walls b2.", "agent at a1, walls b2.", "agent at c3, walls none.", "agent at z9, walls none."]
    lengths = [len(caption(picture)) + 1 for picture in
               video.val.cells(spread(video.val, 1, 70), 1)[:, 0].numpy()]
    stub = SimpleNamespace(nats=lambda text: (text != 0).sum(1).max().float(), write=lambda n, generator: texts * 16)
    found = evaluate("text", stub, material(video))
    parts = lengths[:64], lengths[64:]
    wanted = sum(sum(part) * (max(part) - 1) for part in parts) / sum(lengths)
    assert max(parts[0]) != max(parts[1]) and found["loss"] == near(wanted)
    assert found["valid"] == 0.75 and found["different"] == 2 and found["score"] == -found["loss"]
    assert found["perplexity"] == near(math.exp(wanted))


# --- Losses ---

class Said:
    """Dynamics that say what `logits` (made at the first call) hold; keeps what they were shown."""
    mask, n_actions, more = 4, 5, 0

    def __call__(self, tokens, acts, window=None, streams=None):
        assert window == 3                                    # what generation sees
        self.tokens, self.acts, self.streams = tokens, acts, streams
        self.logits = (3 * some(*tokens.shape, 4)).requires_grad_()
        return self.logits + self.more


@pytest.mark.parametrize("step, extra", [(0, 10), (30, 4), (50, 0), (90, 0)])
@pytest.mark.parametrize("how", ["streams", "last", "causal"])
def test_the_loss_of_dynamics_by_a_loop(put, video, how, step, extra):
    """Hidden tokens of every frame from the third on, or of the last; those that change weigh 1 + `extra`."""
    put(context=5, streams=how == "streams", dynamics="causal" if how == "causal" else "maskgit", mask_rate=(0.4, 0.7),
        dynamics_change=10.0, dynamics_change_fraction=0.5, dynamics_steps=100)
    index = whole(video.train.count(5), 6)
    truth, model = video.train.cells(index, 5).flatten(2).long(), Said()
    loss, _ = loss_of("dynamics", model, material(video, "train"), index, step, 2)
    acts = F.pad(video.train.actions(index, 5), (1, 0), value=5)
    first = 4 if how == "last" else 2
    at_ = {t: t for t in range(first, 5)}                     # where the logits of frame t are
    if how == "streams":                                      # frames 0 to 3 as they are, then 2 to 4 corrupted
        at_ = {t: 4 + t - first for t in range(first, 5)}
        assert model.streams == (4, 2) and torch.equal(model.tokens[:, :4], truth[:, :4])
        assert torch.equal(model.acts, torch.cat((acts[:, :4], acts[:, 2:]), 1))
    else:
        assert torch.equal(model.acts, acts) and torch.equal(model.tokens[:, :first], truth[:, :first])
    total = weights = 0
    counted = torch.zeros(model.logits.shape[:3], dtype=torch.bool)
    for i, t, place in itertools.product(range(6), range(first, 5), range(25)):
        seen, target = model.tokens[i, at_[t], place].item(), truth[i, t, place].item()
        if how == "causal":
            assert seen == target
        elif seen != 4:
            assert seen == target                             # visible: the truth
            continue
        weight = 1 + extra * (target != truth[i, t - 1, place].item())
        row = model.logits[i, at_[t], place].tolist()
        total += weight * (math.log(sum(map(math.exp, row))) - row[target])
        weights += weight
        counted[i, at_[t], place] = True
    assert loss.item() == near(total / weights)
    loss.backward()
    assert torch.equal(model.logits.grad.abs().sum(-1) > 0, counted)
    share = counted[:, list(at_.values())].double().mean().item()
    assert share == 1 if how == "causal" else 0.35 < share < 0.75


def test_what_is_visible_does_not_count(put, video):
    """A logit at a visible place changes nothing; nothing hidden is no loss, not NaN; two frames have one target."""
    put(mask_rate=(0.5, 0.5))
    index, model = whole(video.train.count(CONTEXT), 4), Said()

    def loss(more=0, seed=0):
        model.more = more
        return loss_of("dynamics", model, material(video, "train"), index, seed=seed)[0]
    before = loss().item()
    hidden = model.tokens == 4
    assert loss(seed=1).item() != before
    for where, same in ((~hidden, True), (hidden, False)):
        assert (loss(where[..., None] * torch.arange(4)).item() == before) == same
    model = Said()
    put(mask_rate=(0.0, 0.0))
    assert loss().item() == 0
    put(context=2, mask_rate=(1.0, 1.0))
    index = whole(video.train.count(2), 4)
    loss()
    assert model.streams == (1, 1) and torch.equal(model.tokens[:, 1], torch.full((4, 25), 4))
    assert model.logits.shape == (4, 2, 25, 4)


def test_latent_actions_explain_each_step(video):
    """The code of step t is found in frames t - history + 1 to t + 1, the first frame repeated before the video."""
    index = whole(video.val.count(6), 5)
    cells, labels = video.val.cells(index, 6).numpy(), video.val.effective(index, 6)
    for history in (1, 2, 3):
        model = Actor(history=history).eval()
        assert torch.equal(latent_actions(model, material(video).frames(index, 6)), labels)
        for t, window in enumerate(model.windows):
            assert (window == cells[:, [max(0, t + 1 - history + i) for i in range(history + 1)]]).all()


def test_no_gradient_leaves_the_dynamics(put, video):
    """Latent actions and tokens are data: the models that make them learn nothing here, though they could."""
    put(tokens="tokenizer", action_source="latent", mask_rate=(0.5, 1.0))
    torch.manual_seed(0)
    models = dict(tokenizer=Tokenizer(20, 20, 4, 6, 8, 4, 1, 2, 8), actions=ActionModel(20, 20, 4, 6, n_codes=8,
                                                                                       n_embd=8, n_layer=1).eval())
    with torch.no_grad():                                     # large enough that codes and tokens differ
        for p in itertools.chain(*(model.parameters() for model in models.values())):
            p.normal_(0, 0.4)
        found = models["actions"].train()(material(video, "train").frames(torch.arange(64), 3))[1]
        models["actions"].quantiser.follow(found.z)
        models["actions"].eval().quantiser.norm.running_mean *= 10              # one batch counts a tenth
    before = {name: {key: value.clone() for key, value in model.state_dict().items()}
              for name, model in models.items()}
    model = Dynamics((5, 5), 8, 8, 1, 2, 8)
    index = whole(video.train.count(CONTEXT), 4)
    tokens, acts = material(video, "train", models).tokens_and_actions(index, CONTEXT)
    assert tokens.shape == (4, CONTEXT, 25) and acts.shape == (4, CONTEXT) and (acts[:, 0] == w.n_codes).all()
    with torch.no_grad():
        frames = material(video, "train").frames(index, CONTEXT)
        assert torch.equal(acts[:, 1:], latent_actions(models["actions"], frames))
        assert torch.equal(tokens, models["tokenizer"].tokens(frames))
    assert len(acts[:, 1:].unique()) > 1 < len(tokens.unique())
    loss = loss_of("dynamics", model, material(video, "train", models), index)[0]
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for name, part in models.items():
        assert all(p.requires_grad and p.grad is None for p in part.parameters())
        assert_equal(dict(part.state_dict()), before[name], name)


class Writes:
    """What it writes is a leaf; keeps what it was asked."""

    def __init__(self, *shape):
        self.written = (2 * some(*shape)).requires_grad_()

    def __call__(self, frames, soft=None):
        self.frames, self.soft = frames, soft
        codes = torch.zeros(len(frames), 3, dtype=torch.int64)
        return self.written, Quantised(None, codes, z=torch.ones(len(frames), 3, 2), loss=torch.tensor(0.8))


def coloured(video, palette):
    """Training clips with a palette; or RGB, in which a pixel may change in one colour only."""
    if palette:
        return material(video, "train")
    frames = whole(2, 3, 16, 20, 20, 3)
    frames = torch.where(some(3, 16, 20, 20, 1, seed=1) < 0.7, frames[:, :1], frames)
    return reader(Clips(None, (100 * frames).to(torch.uint8)))


def pixel_nats(row, target):
    """Of one pixel: nats of a palette index, or the squared error of RGB."""
    if isinstance(target, int):
        return math.log(sum(map(math.exp, row))) - row[target]
    return sum((a - b) ** 2 for a, b in zip(row, target)) / 3


@pytest.mark.parametrize("palette", [True, False])
@pytest.mark.parametrize("step, extra, soft", [(0, 20, True), (29, 20 * 41 / 70, True), (30, 20 * 40 / 70, False),
                                               (80, 0, False)])
def test_the_loss_of_actions_by_a_loop(put, video, step, extra, soft, palette):
    """Of the last frame; pixels that differ from the frame before weigh 1 + `extra`; codes are soft at first."""
    put(action_steps=100, action_change=20.0, action_change_fraction=0.7, soft_fraction=0.3)
    shown = coloured(video, palette)
    index = whole(shown.clips.count(3), 3)
    model = Writes(3, 20, 20, 6 if palette else 3)
    loss, _ = loss_of("actions", model, shown, index, step)
    frames = shown.clips.frames(index, 3)
    assert torch.equal(model.frames, frames.float() / 255) and model.soft == soft
    total = weights = changed = 0
    for i, y, x in itertools.product(range(3), range(20), range(20)):
        now, before = frames[i, 2, y, x].tolist(), frames[i, 1, y, x].tolist()
        target = video.palette.tolist().index(now) if palette else [value / 255 for value in now]
        changed += now != before
        weight = 1 + extra * (now != before)
        total += weight * pixel_nats(model.written[i, y, x].tolist(), target)
        weights += weight
    assert 0 < changed < 1200 and loss.item() == near(total / weights)


@pytest.mark.parametrize("palette", [True, False])
def test_the_loss_of_the_tokenizer_by_a_loop(put, video, palette):
    """Of all frames; pixels that are not the same throughout the clip weigh 1 + tokenizer_change in each of them."""
    put(tokenizer_change=10.0)
    shown = coloured(video, palette)
    index = whole(shown.clips.count(3), 3)
    model = Writes(3, 3, 20, 20, 6 if palette else 3)
    loss, found = loss_of("tokenizer", model, shown, index)
    frames = shown.clips.frames(index, 3)
    assert torch.equal(model.frames, frames.float() / 255)
    total = weights = 0
    for i, y, x in itertools.product(range(3), range(20), range(20)):
        pixels = frames[i, :, y, x].tolist()
        weight = 1 + 10 * (len(set(map(tuple, pixels))) > 1)
        for t, pixel in enumerate(pixels):
            target = video.palette.tolist().index(pixel) if palette else [value / 255 for value in pixel]
            total += weight * pixel_nats(model.written[i, t, y, x].tolist(), target)
            weights += weight
    assert 3600 < weights < 11 * 3600 and loss.item() == near(total / weights)
    assert found.codes.shape == (3, 3) and w.STAGES["tokenizer"].commitment == 0.25


def test_the_loss_of_first_frames_by_a_loop(put, video):
    """Of hidden tokens only; a row with none has one."""
    index = whole(video.train.count(1), 6)
    truth = video.train.cells(index, 1).flatten(2)[:, 0].long()
    captions = as_characters([caption(picture) for picture in truth.view(6, SIDE, SIDE).numpy().astype(np.uint8)])

    class Illustrator(Said):
        codebook_size = 4

        def read(self, text):
            assert torch.equal(text, captions)

        def __call__(self, tokens, held):
            return super().__call__(tokens, None, window=3)
    for rate in (0.5, 0.0):
        put(mask_rate=(rate, rate))
        model = Illustrator()
        loss = loss_of("frame", model, material(video, "train"), index)[0]
        nats = []
        for seen, row, target in zip(model.tokens.flatten().tolist(), model.logits.flatten(0, 1).tolist(),
                                     truth.flatten().tolist()):
            assert seen in (target, 4)
            if seen == 4:
                nats.append(math.log(sum(map(math.exp, row))) - row[target])
        assert loss.item() == near(np.mean(nats)) and (len(nats) == 6 if rate == 0 else 40 < len(nats) < 110)


# --- Patience ---

HOW = dict(tokens="cells", action_source="true", schedule="constant", optimizer="adam", eval_interval=2, eval_clips=16,
           save_interval=3, dynamics_change=0)


def test_a_stage_ends_when_validation_no_longer_improves(forks, tmp_path):
    """With a rate that is too high each stage gets better, then worse, and ends `patience` validations after its best,
    whose weights are those of a run that had so many steps only."""
    runs = [at(tmp_path / name) for name in ("patient", "short")]
    assert_done(forks.run(train(runs[0].parents[1], **HOW, patience=2, max_steps=40, lr=0.1, warmup_steps=5), tmp_path))
    told, best, total, scores = summary(runs[0]), {}, 0, {}
    for name in ("dynamics", "text", "frame"):
        losses = {line["stage_step"]: line["loss"] for line in records(runs[0])
                  if line["split"] == "val" and line["stage"] == name}
        best[name] = min(losses, key=losses.get)
        end = max(losses)
        assert 0 < best[name] == end - 4 and end < 40         # two validations of 2 steps later
        assert told[f"{name}_best_step"] == best[name] and told[f"{name}_loss"] == losses[best[name]] < losses[end]
        assert max(line["stage_step"] for line in records(runs[0])
                   if line["split"] == "train" and line["stage"] == name) == end
        total, scores[name] = total + end, losses[best[name]]
    assert told["step"] == total and told["status"] == "done"
    assert_done(forks.run(train(runs[1].parents[1], **HOW, max_steps="none", lr=0.1, warmup_steps=5,
                                **{f"{name}_steps": n for name, n in best.items()}), tmp_path))
    patient, short = (load_checkpoint(run / "last.pt") for run in runs)
    assert_equal(patient["done"], short["done"], "done")
    assert_equal(patient["model"], patient["done"]["frame"], "model")
    assert [summary(runs[1])[f"{name}_loss"] for name in scores] == list(scores.values())


def test_compile_compiles_the_pass_of_training_alone(put, video, monkeypatch):
    """One method of a copy with the same weights; losses are those of the model as it is."""
    put(tokens="cells", action_source="true")
    passes = []

    def compile(method):
        def run(*args, **kwargs):
            passes.append(method.__name__)
            return method(*args, **kwargs)
        return run
    monkeypatch.setattr(w.torch, "compile", compile)
    index, data = torch.arange(3), material(video)
    for name, used, loss in (
            ("dynamics", "forward", lambda m: loss_of("dynamics", m, data, index)),
            ("actions", "forward", lambda m: loss_of("actions", m, data, index)),
            ("text", "nats", lambda m: loss_of("text", m, data, index))):
        model = w.build(name, video).eval()
        fast = w.compiled(model, name)
        value = loss(fast)[0]
        assert passes == [used] and torch.equal(value, loss(model)[0]) and passes == [used]
        value.backward()
        assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
        assert next(model.parameters()).grad is not None
        passes.clear()
    put(action_model="transformer", action_embd=16)
    loss_of("actions", w.compiled(w.build("actions", video), "actions"), data, index)
    assert passes == ["every"]


def test_a_tokenizer_that_sees_time_draws_a_played_world_as_a_rollout(put, video):
    """Frame by frame with the decoder's cache as all at once, far past the frames that it was trained on."""
    put(tokens="tokenizer", action_source="true", tokenizer="spatiotemporal", tokenizer_embd=16, dynamics_embd=16,
        window=3)
    models = {name: w.build(name, video).eval() for name in ("tokenizer", "dynamics")}
    played = Session(material(video, models=models), video, vars(w))
    with torch.no_grad():
        first = torch.randint(8, (1, 4, video.height * video.width // w.patch ** 2))
        whole = torch.cat((first, torch.randint(8, (1, 6, first.size(2)))), 1)
        seen = [played.draw(first)] + [played.draw(whole[:, t:t + 1], first=False) for t in range(4, 10)]
        assert torch.equal(torch.stack(seen), material(video, models=models).paint(whole)[0, 3:])
        alone = torch.stack([material(video, models=models).paint(whole[:, t:t + 1])[0, 0] for t in range(3, 10)])
        assert not torch.equal(torch.stack(seen), alone)      # the frames before do count
        again = played.draw(whole[:, 3:4])
    assert torch.equal(again, alone[0]) and not torch.equal(again, seen[0])  # a new world forgets the last


@pytest.mark.parametrize("source", ["true", "latent"])
def test_clips_of_two_frames_can_be_played(put, video, source):
    """A world of context 2 begins at one frame, to which no action led."""
    put(tokens="tokenizer", action_source=source, tokenizer_embd=16, dynamics_embd=16, action_embd=16, context=2)
    models = {name: w.build(name, video).eval() for name in ("tokenizer", "actions", "dynamics")}
    meanings = torch.arange(8) % 5 if source == "latent" else None
    played = Session(material(video, models=models), video, vars(w), meanings)
    assert played.reset().frame.shape == (20, 20, 3) and played.step(1).cache.startswith("2 frames")


def test_a_prompt_of_words_that_no_caption_has(put, video):
    """One line; captions, and what they are made of in another order, are taken."""
    put(tokens="cells", action_source="true", dynamics_embd=16, frame_embd=16, temperature=0.0)
    models = {name: w.build(name, video).eval() for name in ("dynamics", "frame")}
    played = Session(material(video, models=models), video, vars(w))
    for prompt in ("agent at a1, ball at c2, walls b2.", "walls: all but c3; the agent is there"):
        assert prompt in played.reset(prompt).note
    for prompt, said in (("a red house", "no caption has the word 'a'"), ("agent at f1", "the word 'f1'"),
                         ("agent at a1!", "the word 'a1!'"), ("", "at least one word"),
                         (" ", "at least one word"), ("write", "stage text"), ("agent " * 99, "at most"),
                         ("caf\u00e9", "plain ASCII")):
        with pytest.raises(ValueError, match=said):
            played.reset(prompt)
    models["text"] = SimpleNamespace(write=lambda n, generator: [""])
    with pytest.raises(ValueError, match="empty sentence"):
        played.reset("write")


def test_a_stage_that_cannot_improve_ends_at_its_second_validation(forks, tmp_path):
    """Equal is no better. What comes after goes on all the same; and without patience all steps are taken."""
    for more, end in ((dict(patience=1), 2), ({}, 6)):
        run = at(tmp_path / str(end))
        assert_done(forks.run(train(run.parents[1], **HOW, **more, max_steps=6, lr=1e-30), tmp_path))
        told = summary(run)
        assert told["step"] == 3 * end and told["stages"] == ["dynamics", "text", "frame"]
        assert all(told[f"{name}_best_step"] == 0 for name in told["stages"])
