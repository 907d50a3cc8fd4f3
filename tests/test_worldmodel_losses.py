"""The losses that train_worldmodel.py minimises, by loops; what is hidden, and for how long; that no gradient leaves a
stage; figures of words; when a stage ends; the trained models as they are compiled and played."""
import contextlib
import copy
import dataclasses
import itertools
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_worldmodel as w
from data.video import Clips, caption
from forks import assert_equal, records, summary
from models.discrete import Quantised
from models.world_actions import ActionModel
from models.world_dynamics import Dynamics
from models.world_tokenizer import Tokenizer
from models.world_words import as_characters
from nanolab.play import Session
from nanolab.run import load_checkpoint
from nanolab.world import latent_actions
from test_worldmodel_resume import at, done
from world_clips import (CONTEXT, SHARP, SIDE, SMALL, evaluate, loss_of, material, nats_of, near, reader, some,
                         video, whole)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(put):
    """The script's settings for 5 x 5 cells of 4 pixels."""
    put(**SMALL)


class Said:
    """Dynamics that say what `logits` (made at the first call) hold; keeps what they were shown."""
    mask, n_actions = 4, 5

    def __call__(self, tokens, acts, window=None, streams=None):
        assert window == 3                                    # what generation sees
        self.tokens, self.acts, self.streams = tokens, acts, streams
        self.logits = (3 * some(*tokens.shape, 4)).requires_grad_()
        return self.logits


@pytest.mark.parametrize("how, step, extra", [("streams", 0, 10), ("streams", 50, 0), ("last", 30, 4),
                                              ("causal", 30, 4)])
def test_the_loss_of_dynamics_by_a_loop(put, how, step, extra):
    """Hidden tokens of every frame from the third on, or of the last; those that change weigh 1 + `extra`."""
    put(context=5, streams=how == "streams", dynamics="causal" if how == "causal" else "maskgit", mask_rate=(0.4, 0.7),
        dynamics_change=10.0, dynamics_change_fraction=0.5, dynamics_steps=100)
    index = whole(video.train.count(5), 6)
    truth, model = video.train.cells(index, 5).flatten(2).long(), Said()
    loss, _ = loss_of("dynamics", model, material(video, "train"), index, step, 2)
    acts, first = F.pad(video.train.actions(index, 5), (1, 0), value=5), 4 if how == "last" else 2
    offset = 4 - first if how == "streams" else 0             # logits of frame t are at t + offset: of streams, frames
    assert model.streams == ((4, 2) if how == "streams" else None)               # 0 to 3 as they are, 2 to 4 corrupted
    assert torch.equal(model.acts, torch.cat((acts[:, :4], acts[:, 2:]), 1) if how == "streams" else acts)
    assert torch.equal(model.tokens[:, :first + offset], truth[:, :first + offset])
    total, counted = Counter(), torch.zeros(model.logits.shape[:3], dtype=torch.bool)
    for i, t, place in itertools.product(range(6), range(first, 5), range(25)):
        seen, target = model.tokens[i, t + offset, place].item(), truth[i, t, place].item()
        assert seen == target or seen == 4 and how != "causal"
        if seen == target and how != "causal":
            continue                                          # visible: the truth
        weight = 1 + extra * (target != truth[i, t - 1, place].item())
        row = model.logits[i, t + offset, place].tolist()
        total.update(nats=weight * (math.log(sum(map(math.exp, row))) - row[target]), weight=weight)
        counted[i, t + offset, place] = True
    assert loss.item() == near(total["nats"] / total["weight"])
    loss.backward()
    assert torch.equal(model.logits.grad.abs().sum(-1) > 0, counted)
    share = counted[:, first + offset:].double().mean().item()
    assert share == 1 if how == "causal" else 0.35 < share < 0.75


def test_nothing_hidden_is_no_loss_and_two_frames_have_one_target(put):
    put(mask_rate=(0.0, 0.0))
    index = whole(video.train.count(CONTEXT), 4)
    assert loss_of("dynamics", Said(), material(video, "train"), index)[0].item() == 0
    put(context=2, mask_rate=(1.0, 1.0))
    model, index = Said(), whole(video.train.count(2), 4)
    loss_of("dynamics", model, material(video, "train"), index)
    assert model.streams == (1, 1) and torch.equal(model.tokens[:, 1], torch.full((4, 25), 4))
    assert model.logits.shape == (4, 2, 25, 4)


def test_no_gradient_leaves_the_dynamics(put):
    """Latent actions and tokens are data: the models that make them learn nothing here, though they could."""
    put(tokens="tokenizer", action_source="latent", mask_rate=(0.5, 1.0))
    torch.manual_seed(0)
    models = dict(tokenizer=Tokenizer(20, 20, 4, 6, 8, 4, 1, 2, 8),
                  actions=ActionModel(20, 20, 4, 6, n_codes=8, n_embd=8, n_layer=1))
    shown, index = material(video, "train", models), whole(video.train.count(CONTEXT), 4)
    with torch.no_grad():                                     # large enough that codes and tokens differ
        for p in itertools.chain(*(model.parameters() for model in models.values())):
            p.normal_(0, 0.4)
        found = models["actions"](shown.frames(torch.arange(64), 3))[1]
        models["actions"].quantiser.follow(found.z)
        models["actions"].eval().quantiser.norm.running_mean *= 10              # one batch counts a tenth
    before = copy.deepcopy({name: dict(model.state_dict()) for name, model in models.items()})
    model, (tokens, acts) = Dynamics((5, 5), 8, 8, 1, 2, 8), shown.tokens_and_actions(index, CONTEXT)
    assert tokens.shape == (4, CONTEXT, 25) and acts.shape == (4, CONTEXT) and (acts[:, 0] == w.n_codes).all()
    with torch.no_grad():
        frames = shown.frames(index, CONTEXT)
        assert torch.equal(acts[:, 1:], latent_actions(models["actions"], frames))
        assert torch.equal(tokens, models["tokenizer"].tokens(frames))
    assert len(acts[:, 1:].unique()) > 1 < len(tokens.unique())
    loss_of("dynamics", model, shown, index)[0].backward()
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


def coloured(palette):
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


@pytest.mark.parametrize("stage, step, extra, soft, palette", [
    ("actions", 0, 20, True, True), ("actions", 29, 20 * 41 / 70, True, False),
    ("actions", 30, 20 * 40 / 70, False, True), ("actions", 80, 0, False, False), ("tokenizer", 0, 10, None, True),
    ("tokenizer", 0, 10, None, False)])
def test_the_loss_of_pictures_by_a_loop(put, stage, step, extra, soft, palette):
    """Actions: of the last frame, where pixels that differ from the frame before weigh 1 + `extra`, and codes are soft
    at first. Tokenizer: of all frames, where pixels that are not the same throughout the clip do."""
    put(action_steps=100, action_change=20.0, action_change_fraction=0.7, soft_fraction=0.3, tokenizer_change=10.0)
    shown, times = coloured(palette), (2,) if stage == "actions" else (0, 1, 2)
    index = whole(shown.clips.count(3), 3)
    model = Writes(3, *times[1:] and (3,), 20, 20, 6 if palette else 3)
    loss, found = loss_of(stage, model, shown, index, step)
    frames, written = shown.clips.frames(index, 3), model.written.view(3, len(times), 20, 20, -1)
    assert torch.equal(model.frames, frames.float() / 255) and model.soft == soft
    total = weights = changed = 0
    for i, y, x in itertools.product(range(3), range(20), range(20)):
        pixels = frames[i, :, y, x].tolist()
        moved = pixels[2] != pixels[1] if stage == "actions" else pixels != pixels[:1] * 3
        changed += moved
        for t, row in zip(times, written[i, :, y, x].tolist()):
            target = video.palette.tolist().index(pixels[t]) if palette else [value / 255 for value in pixels[t]]
            total += (1 + extra * moved) * pixel_nats(row, target)
            weights += 1 + extra * moved
    assert 0 < changed < 1200 and loss.item() == near(total / weights)
    assert found.codes.shape == (3, 3) and w.STAGES["tokenizer"].commitment == 0.25


def test_the_loss_of_first_frames_by_a_loop(put):
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


# --- Words ---

def test_first_frames_that_are_known():
    """A stub that draws what the captions say, but names one wall wrong in a pass of every second."""
    cells = video.val.cells(video.val.spread(1, 70), 1).flatten(2).long()[:, 0]
    named, drawn = iter(cells.split(64)), iter(cells.split(64))

    class Illustrator:
        codebook_size, read = 4, staticmethod(lambda text: text)

        def __call__(self, tokens, text):
            assert (tokens == 4).all() and len(text) == len(tokens)
            said = next(named).clone()
            said[::2, 0] = (said[::2, 0] + 1) % 4
            return F.one_hot(said, 4) * SHARP

        def draw(self, text, steps, temperature):
            assert steps == 3 and temperature == 0
            return next(drawn)
    found = evaluate("frame", Illustrator(), material(video))
    assert found["tokens"] == near(1 - 35 / (70 * 25)) and found["frame"] == 0.5 and found["drawn"] == 1
    assert found["loss"] == near(nats_of(35, 70 * 25, 4)) and found["score"] == -found["loss"]
    assert found["floor"] == near(max(Counter(cells.flatten().tolist()).values()) / (70 * 25))


def test_a_writer_that_is_known():
    """Nats are means over characters, so that short captions do not count more; texts are read back."""
    texts = ["agent at a1, walls b2.", "agent at a1, walls b2.", "agent at c3, walls none.", "agent at z9, walls none."]
    lengths = [len(caption(picture)) + 1 for picture in video.val.cells(video.val.spread(1, 70), 1)[:, 0].numpy()]
    stub = SimpleNamespace(nats=lambda text: (text != 0).sum(1).max().float(), write=lambda n, generator: texts * 16)
    found, parts = evaluate("text", stub, material(video)), (lengths[:64], lengths[64:])
    wanted = sum(sum(part) * (max(part) - 1) for part in parts) / sum(lengths)
    assert max(parts[0]) != max(parts[1]) and found["loss"] == near(wanted)
    assert found["valid"] == 0.75 and found["different"] == 2 and found["score"] == -found["loss"]
    assert found["perplexity"] == near(math.exp(wanted))


# --- What is hidden, and for how long ---

def test_falling_is_a_line_to_nothing():
    assert [w.falling(step, 100, 20.0, 0.5) for step in (0, 10, 25, 50, 51, 100)] == [20, 16, 10, 0, 0, 0]
    assert w.falling(30, 40, 2.0, 1.0) == 0.5 and w.falling(0, 0, 5.0, 0.5) == 0


def test_hide(put):
    """A share of each frame's tokens between the two of mask_rate, uniform; the same by the same generator."""
    def hidden(low, high, seed=0):
        put(mask_rate=(low, high))
        return w.hide((40, 5, 1000), torch.Generator().manual_seed(seed)).float()
    assert not hidden(0.0, 0.0).any() and (hidden(1.0, 1.0) == 1).all()
    found = hidden(0.2, 0.8).mean(-1)
    assert 0.13 < found.min() < 0.25 and 0.75 < found.max() < 0.87
    assert found.mean().item() == near(0.5, 0.05) and found.std().item() == near(0.6 / 12 ** 0.5, 0.03)
    assert found.std(0).min() > 0.1 < found.std(1).mean()     # each frame has a rate of its own
    assert torch.equal(found, hidden(0.2, 0.8).mean(-1)) and not torch.equal(found, hidden(0.2, 0.8, seed=1).mean(-1))
    assert (hidden(0.5, 0.5).mean((0, 1)) - 0.5).abs().max() < 0.2  # and every place its turn


# --- Patience ---

def test_a_stage_ends_when_validation_no_longer_improves(forks, tmp_path):
    """With a rate that is too high it gets better, then worse, and ends `patience` validations after its best, whose
    weights are those of a run that had so many steps only."""
    how = dict(stage="dynamics", tokens="cells", action_source="true", schedule="constant", optimizer="adam", lr=0.1,
               warmup_steps=5, dynamics_change=0, eval_interval=2, eval_clips=16, save_interval=30, play_presses=0)
    done(forks, tmp_path / "patient", **how, patience=2, max_steps=40)
    told, lines = summary(at(tmp_path / "patient")), records(at(tmp_path / "patient"))
    losses = {line["stage_step"]: line["loss"] for line in lines if line["split"] == "val"}
    best, end = min(losses, key=losses.get), max(losses)
    assert 0 < best == end - 4 and end < 40                   # two validations of 2 steps later
    assert told["dynamics_best_step"] == best and told["dynamics_loss"] == losses[best] < losses[end]
    assert max(line["stage_step"] for line in lines if line["split"] == "train") == end == told["step"]
    done(forks, tmp_path / "short", **how, max_steps="none", dynamics_steps=best)
    patient, short = (load_checkpoint(at(tmp_path / name) / "last.pt") for name in ("patient", "short"))
    assert_equal(patient["done"], short["done"], "done")
    assert_equal(patient["model"], patient["done"]["dynamics"], "model")
    assert summary(at(tmp_path / "short"))["dynamics_loss"] == told["dynamics_loss"] and told["status"] == "done"


@pytest.mark.parametrize("name, used", [("dynamics", "forward"), ("actions", "every"), ("text", "nats")])
def test_compile_compiles_the_pass_of_training_alone(name, used, put, monkeypatch):
    """One method of a copy with the same weights; losses are those of the model as it is."""
    put(tokens="cells", action_source="true", action_model="transformer", action_embd=16)
    passes, index, data, model = [], torch.arange(3), material(video), w.build(name, video).eval()
    monkeypatch.setattr(w.torch, "compile", lambda method: lambda *given, **how: (
        passes.append(method.__name__) or method(*given, **how)))
    fast = w.compiled(model, name)
    value = loss_of(name, fast, data, index)[0]
    assert passes == [used] and torch.equal(value, loss_of(name, model, data, index)[0]) and passes == [used]
    value.backward()
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert next(model.parameters()).grad is not None


def test_a_tokenizer_that_sees_time_draws_a_played_world_as_a_rollout(put):
    """Frame by frame with the decoder's cache as all at once, far past the frames that it was trained on."""
    put(tokens="tokenizer", action_source="true", tokenizer="spatiotemporal", tokenizer_embd=16, dynamics_embd=16)
    models = {name: w.build(name, video).eval() for name in ("tokenizer", "dynamics")}
    shown, tokens = material(video, models=models), whole(8, 1, 10, 25)
    played = Session(shown, video, vars(w))
    with torch.no_grad():
        seen = torch.stack([played.draw(tokens[:, :4])] + [
            played.draw(tokens[:, t:t + 1], first=False) for t in range(4, 10)])
        assert torch.equal(seen, shown.paint(tokens)[0, 3:])
        alone = torch.stack([shown.paint(tokens[:, t:t + 1])[0, 0] for t in range(3, 10)])
        assert not torch.equal(seen, alone)                   # the frames before do count
        assert torch.equal(played.draw(tokens[:, 3:4]), alone[0]) and not torch.equal(alone[0], seen[0])  # a new world
    played.reset()
    held = played.drawn
    played.step(1)
    assert played.drawn is held and held.length == 4          # a step goes on from three frames


@pytest.mark.parametrize("source", ["true", "latent"])
def test_clips_of_two_frames_can_be_played(put, source):
    """A world of context 2 begins at one frame, to which no action led."""
    put(tokens="tokenizer", action_source=source, tokenizer_embd=16, dynamics_embd=16, action_embd=16, context=2)
    models = {name: w.build(name, video).eval() for name in ("tokenizer", "actions", "dynamics")}
    codes, latent = [0, 1, 7, 3, None], source == "latent"
    played = Session(material(video, models=models), video, vars(w), torch.arange(8) % 5, codes if latent else None)
    assert played.reset().frame.shape == (20, 20, 3) and played.step(1).cache.startswith("2 frames")
    assert played.missing == ["right"] * latent
    assert played.keys["ArrowDown"] == 2 and ("ArrowRight" in played.keys) != latent
    seen = played.step(2)
    assert re.fullmatch("right so far: [0-2] of 2 presses", seen.score)
    assert seen.note.startswith("down" + " (code 7)" * latent + "; in the true world: down")
    if latent:
        with pytest.raises(ValueError, match="no code means right"):
            played.step(4)


def test_a_prompt_of_words_that_no_caption_has(put):
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


@pytest.mark.parametrize("name", ["actions", "dynamics"])
def test_the_actions_may_have_a_rate_of_their_own(name, put, tmp_path):
    """A stage in training: its rates; it is evaluated by the weights' average, and not as it is trained."""
    put(tokens="cells", action_source="true", action_lr=0.5, lr=0.25, dynamics_embd=16, action_embd=16, ema_decay=0.5)
    shown = material(video, "train")
    world = SimpleNamespace(video=video, train=shown, val=shown, models={}, total=0, precision=torch.float32,
                            autocast=contextlib.nullcontext())
    learner = w.Learner(name, world, vars(w))
    w.optim.set_rate(learner.opt, {**learner.settings, "max_steps": 9, "schedule": "constant", "warmup_steps": 0}, 0)
    assert {group["lr"] for group in learner.opt.param_groups} - {w.muon_lr} == {0.5 if name == "actions" else 0.25}
    learner.stage = dataclasses.replace(learner.stage, draw=lambda model, val: [], evaluate=lambda model, val: [
        model.training, next(model.parameters()).sum().item()])
    which, weight = next(learner.model.named_parameters())
    with torch.no_grad():
        weight.fill_(9)                                       # which the average has not seen
    (training, total), weights = learner.evaluated(tmp_path / "a", SimpleNamespace(start=lambda: 0, lap=lambda part: 0))
    assert not training and learner.model.training and total == weights[which].sum().item() < 9 == weight.max()
