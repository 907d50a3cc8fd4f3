"""Multiplication: the split never changes, every number is written and read back, losses and forcing by slow formulas,
teacher-forced exact is greedy exact. Then the script as it is typed: models at steps of their own, in one stream,
asked. The models themselves: test_networks.py."""
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import choices
import train_mult
from data import multiplication
from data.multiplication import END, PADDING, Notation, Problems, Stream, held_out
from nanolab.run import UserError, load_checkpoint, override
from forks import assert_equal, assert_error, snapshot, summary
from scripts import KEEP, curve, of
from test_scripts import fresh
from train_mult import Forcing, named_sums, sequence_loss, sum_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def unordered(examples):
    """The set of the pairs, each as one number."""
    return set(np.unique(examples.long().sort(1).values.numpy() @ [10 ** 8, 1]).tolist())


# ------------------------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def default():
    return Problems()


def test_split_by_unordered_pair(default):
    """All 810,000 ordered pairs are on one side; no unordered pair on both; the evaluation set holds none twice."""
    train, val = unordered(default.train), unordered(default.val)
    assert not train & val
    assert len(default.train) == 1_000_000 and len(default.val) == 10_000 == len(default.val.unique(dim=0))
    assert abs(default.n_held_out / 810_000 - 0.05) < 0.002
    counts = np.unique(default.train.numpy().astype(np.int64) @ [1000, 1], return_counts=True)[1]
    assert len(counts) == default.n_pairs and default.n_pairs + default.n_held_out == 810_000
    assert {*counts.tolist()} == {1, 2}                      # every training pair before one comes twice
    assert {int(default.train.min()), int(default.train.max())} == {100, 999}
    a, b = default.train.long().T
    assert not held_out(a, b, 0.05, 0).any() and held_out(*default.val.long().T, 0.05, 0).all()
    assert default.hash in default.describe() and "seed 0" in default.describe()


def test_the_split_does_not_depend_on_the_range_and_fits_into_memory(default):
    narrow, wide, long = Problems(2, 2, 100, 0.1), Problems(1, 3, 1000, 0.1), Problems(8, 8, 200_000)
    assert not unordered(narrow.val) & unordered(wide.train) and not unordered(narrow.train) & unordered(wide.val)
    assert long.train.min() >= 10 ** 7 and long.train.max() < 10 ** 8 and len(wide.train) == 1000
    assert not unordered(long.train[:50_000]) & unordered(long.val) and narrow.val.dtype == torch.int16
    for problems in (default, long):
        held = [value for value in vars(problems).values() if torch.is_tensor(value)]
        assert len(held) == 2 and sum(t.untyped_storage().nbytes() for t in held) <= 8.1e6


def test_the_split_is_this_one(default):
    """What is held out may never change: a figure would then be of other pairs. splitmix64's published first values."""
    assert [hex(int(multiplication.mix(np.uint64(x)))) for x in (0, 0x9E3779B97F4A7C15)] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    assert default.hash == "de503717660f" and Problems(2, 2, val_fraction=0.1).hash == "cc06346a6bd8"
    a = np.arange(1000)                                      # another seed holds out others
    assert (held_out(a, a + 1, 0.05, 0) != held_out(a, a + 1, 0.05, 1)).any()


def test_short_ones_beside():
    problems = Problems(3, 3, 90_000, 0.05, 1000, short_share=0.5)
    a, b = problems.train.long().T
    lengths = ((a >= 10).long() + (a >= 100)) * 3 + (b >= 10).long() + (b >= 100)
    assert lengths.bincount(minlength=9).tolist() == [5000] * 8 + [50_000]
    assert not held_out(a, b, 0.05, 0).any()                 # short ones are held out too
    full = multiplication.of_length(problems.train, 3)
    assert len(full) == 50_000 and full.min() == 100 and len(multiplication.of_length(problems.train, 1)) == 90_000
    assert problems.val.min() >= 100 and torch.equal(problems.val, Problems(3, 3, 10, 0.05, 1000).val)


def test_a_side_without_pairs():
    for fraction, side in ((1e-6, "held-out"), (1 - 1e-9, "training")):
        with pytest.raises(UserError, match=f"no {side} pairs"):
            Problems(1, 1, val_fraction=fraction)


def test_stream():
    """Each epoch has every example once, in another order from another start; any piece can be asked for."""
    examples = Problems(2, 2, 1000, 0.1).train
    stream, other = Stream(examples, 1), Stream(examples, 2)
    whole = stream.at(0, 3000)
    for part in whole.split(1000):
        assert sorted(part.tolist()) == sorted(examples.tolist())
    assert whole.dtype == torch.int64 and not torch.equal(whole[:1000], other.at(0, 1000))
    assert torch.equal(torch.cat([stream.at(i, 7) for i in range(0, 2996, 7)]), whole[:2996])
    assert torch.equal(Stream(examples[:1], 1).at(5, 3), examples[:1].long().expand(3, 2))
    first, second = ({*map(str, torch.stack([part[:-1], part[1:]], 1).tolist())} for part in whole[:2000].split(1000))
    assert len(first & second) < 50


# -------------------------------------------------------------------------------------------------------- notation

@pytest.mark.parametrize("format, read, write", [
    ("plain", "123*45", "5535$"), ("reversed", "321*54", "5355$"), ("padded", "321*540", "535500"),
    # 3*5 = 15: 5 carry 1; 2*5 + 3*4 + 1 = 23: 3 carry 2; 1*5 + 2*4 + 2 = 15: 5 carry 1; 1*4 + 1 = 5
    ("trace", "321*540", "501302501500000000")])
def test_written(format, read, write):
    notation = Notation(format, 3)
    a, b = torch.tensor([123, 999, 0]), torch.tensor([45, 999, 7])
    source, padding = notation.sources(a, b)
    targets, places = notation.answers(a, b)
    assert notation.text(source[0]) == read and notation.text(targets[0]) == write
    assert source.shape[1] == notation.source_length and targets.shape[1] == notation.answer_length
    assert padding is None or torch.equal(padding, source == PADDING)
    assert torch.equal(places == -2, targets == PADDING)
    assert f"123 x 45 = 5535: the model reads {read} and writes ={write}" == notation.example(123, 45)
    assert notation.text(notation.inputs(targets)[0]) == "=" + write[:source.size(1) * 3][:notation.answer_length - 1]
    if format == "trace":                                    # the example of Castells's page, the sign apart
        assert notation.text(targets[1]) == "108017026818909900"


@pytest.mark.parametrize("digits", [1, 3, 8])
@pytest.mark.parametrize("format", ["plain", "reversed", "padded", "trace"])
def test_every_number_reads_back(format, digits):
    notation = Notation(format, digits)
    x = torch.tensor([0, 1, 9, 10 ** digits - 1, 10 ** (digits - 1), 7, 3 ** (2 * digits) % 10 ** digits])
    a, b = torch.cartesian_prod(x, x).T
    targets, places = notation.answers(a, b)
    assert notation.numbers(targets) == (a * b).tolist()
    for row, x, y in zip(notation.sources(a, b)[0], a.tolist(), b.tolist()):
        read = [word if format == "plain" else word[::-1] for word in notation.text(row).split("*")]
        assert [*map(int, read)] == [x, y]
    for k in range(2 * digits):
        at = places == k
        assert torch.equal(targets[at], (a * b)[at.any(1)] // 10 ** k % 10)
    sums = notation.running_sums(a, b)
    assert torch.equal(sums % 10, notation.digits(a * b, 2 * digits)) and (sums[:, -1] < 10).all()
    assert sums.max() < notation.n_sums == 90 * digits


def test_junk_is_no_number():
    notation = Notation("reversed", 2)
    junk = torch.tensor([[END, 1, 1, 1, 1], [1, 11, END, 0, 0], [5, 1, END, 12, 7], [1, 2, 3, 4, 5]])
    assert notation.numbers(junk) == [None, None, 15, 54321]


# ------------------------------------------------------------------------------------------------------------ loss

def slow_loss(logits, targets, mask, weight, mean=None):
    """(loss, accuracy) of `sequence_loss`, sequence by sequence and token by token."""
    costs, right = [], []
    for row, wanted, counts in zip(logits, targets, mask):
        costs.append([-row[t].log_softmax(0)[wanted[t]] for t in range(len(row)) if counts[t]])
        if costs[-1]:
            right.append(all(row[t].argmax() == wanted[t] for t in range(len(row)) if counts[t]))
    costs = [row for row in costs if row]
    if not costs:
        return logits.sum() * 0, 0.0
    weights = [1 + weight * (not yes) for yes in right]
    mean = sum(weights) / len(weights) if mean is None else mean
    return sum(w / mean * sum(row) for w, row in zip(weights, costs)) / sum(map(len, costs)), sum(right) / len(right)


@pytest.mark.parametrize("rows", ["some right", "all right", "all wrong", "one without a token", "nothing", "no rows"])
def test_the_loss_is_its_formula(rows):
    """Value, accuracy and gradient; what stands at masked places, NaN too, changes nothing."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 5, 7, generator=g, dtype=torch.float64), torch.randint(7, (6, 5), generator=g)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    sign = {"some right": torch.tensor([9, 0, 9, 0, 0, 0]), "all right": 9, "all wrong": -9}.get(rows, 0)
    logits = logits + F.one_hot(targets, 7) * (sign * torch.ones(6))[:, None, None]
    mask[2] &= rows != "one without a token"
    mask &= rows != "nothing"
    logits, targets, mask = (part[:0] if rows == "no rows" else part for part in (logits, targets, mask))
    for weight, mean, junk in ((0.0, None, 0.0), (0.0, 1.25, 1e9), (1.5, None, math.nan), (1.5, 1.25, math.inf)):
        z = logits.clone().requires_grad_()
        expected, share = slow_loss(z, targets, mask, weight, mean)
        wanted = torch.autograd.grad(expected, z)[0]
        z = torch.where(mask[..., None], logits, junk).requires_grad_()
        loss, accuracy = sequence_loss(z, torch.where(mask, targets, 3 if junk else -1), mask, weight, mean)
        loss.backward()
        torch.testing.assert_close((loss, z.grad), (expected, wanted), rtol=1e-12, atol=1e-14)
        assert accuracy == pytest.approx(share)


# --------------------------------------------------------------------------------------------------------- forcing

@pytest.mark.parametrize("kind, k, expected", [
    ("linear", 1.0, lambda i: 1 - 0.01 * i), ("exponential", 0.99, lambda i: 0.99 ** i),
    ("inverse_sigmoid", 20.0, lambda i: 20 / (20 + math.exp(i / 20))), ("none", None, lambda i: 1.0)],
    ids=["linear", "exponential", "inverse_sigmoid", "none"])
def test_forcing_schedules(kind, k, expected):
    forcing = Forcing(kind, start=5, k=k, slope=0.01, minimum=0.2)
    for step in range(1, 400):
        forcing.stepped(step)
        assert forcing.probability() == pytest.approx(max(0.2, expected(step - 5)) if step > 5 else 1.0, rel=1e-12)
    forcing = Forcing("inverse_sigmoid", k=1.0)
    assert forcing.probability() == 1.0
    forcing.steps = 10 ** 6
    assert 0 <= forcing.probability() < 1e-300


def test_stability_window_holds_the_probability():
    forcing = Forcing("linear", slope=0.1, window=3, eps=0.05)

    def steps(n):
        for _ in range(n):
            forcing.stepped(10)
        return round(forcing.probability(), 6)
    assert steps(3) == 1.0                                   # nothing validated yet
    for loss, after in ((1.0, 1.0), (1.01, 1.0), (1.02, 0.9), (1.2, 0.9), (1.21, 0.9), (1.2, 0.8)):
        forcing.losses.append(loss)
        assert steps(1) == after
    twin = Forcing("linear", slope=0.1, window=3, eps=0.05, seed=5)
    twin.load_state_dict(forcing.state_dict())
    assert twin.probability() == forcing.probability() and list(twin.losses) == [1.2, 1.21, 1.2]
    targets, predicted = torch.zeros(50, 4, dtype=torch.long), torch.ones(50, 4, dtype=torch.long)
    mixed = forcing.mix(targets, predicted)
    assert torch.equal(mixed, twin.mix(targets, predicted)) and 0.05 < mixed.double().mean() < 0.4


# ---------------------------------------------------------------------------------------------------------- models

def learner(name, *words):
    """(the module's namespace with these settings, apart from everybody else's; a Notation; a Learner of a model)."""
    g = fresh("train_mult.py")
    settings = override(g, ["--n_embd", "32", "--n_head", "2", "--n_layer", "1", "--device", "cpu", *words])
    _, notation, config = g["check"](settings)
    return g, notation, g["Learner"](name, config, torch.device("cpu"), torch.float32, g)


def test_every_parameter_has_a_gradient():
    """One that is not rounding: 1e-7 of the longest at least, where the least that was found is 3e-6 and rounding is
    1e-9. What has none is as the docstring of Solver says."""
    variants = ["", "--format plain --positions rope --activation relu --init normal --norm layer --norm_gain --bias",
                "--format padded --positions alibi --activation relu2 --init xavier --no-qk_norm --sum_head value",
                "--format trace --positions none --activation silu --init truncated --sum_head classes --n_read 2",
                "--n_layer 2 --activation swiglu --init zero --sequence_weight 2", "--n_head 8 --activation geglu",
                "--sum_head classes --sum_weight 0", "--n_latent 1"]
    g, (a, b) = fresh("train_mult.py"), torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(1))
    for words in variants:
        settings = override(g, ["--max_digits", "2", "--min_digits", "1", "--n_layer", "1", "--n_head", "2",
                                "--n_embd", "16", "--n_latent", "3", *words.split()])
        _, notation, config = g["check"](settings)
        some = (a, b, *notation.sources(a, b), *notation.answers(a, b))
        for kind in train_mult.KINDS:
            one = g["Learner"](kind, config, torch.device("cpu"), torch.float32, settings)
            with torch.no_grad():
                for p in one.model.parameters():             # `init zero` begins with some at 0
                    p.add_(0.05 * torch.randn(p.shape))
            one.losses(notation, some, notation.inputs(some[4]), 1, 1, None, torch.autocast("cpu", enabled=False))[
                0].backward()
            lengths = {name: p.grad.norm().item() for name, p in one.model.named_parameters()}
            without = {name for name, length in lengths.items() if not length > 1e-7 * max(lengths.values())}
            assert without == ({"sum_head"} if g["sum_weight"] == 0 else {"body.blocks.0.cross.q.weight"} if
                               (kind, g["n_latent"]) == ("latent", 1) else set()), (kind, words)


@pytest.mark.parametrize("format, name", [("plain", "latent"), ("reversed", "simple"), ("padded", "prefix")])
def test_teacher_forced_exact_is_greedy_exact(format, name):
    """A half-trained model, right on some problems and wrong on others: both ways agree on every one, in any batch."""
    g, notation, one = learner(name, "--min_digits", "1", "--max_digits", "2", "--format", format)
    stream, model = Stream(Problems(1, 2, 20_000).train, 1), one.model
    for step in range(80):
        a, b = stream.at(step * 64, 64).unbind(1)
        (source, padding), (targets, places) = notation.sources(a, b), notation.answers(a, b)
        for group in one.opt.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 50, 2 * (1 - step / 80))
        sequence_loss(model(source, notation.inputs(targets), padding)[0], targets, places > -2)[0].backward()
        one.opt.step()
        one.opt.zero_grad()
    pairs = Problems(1, 2, 1, 0.3, 300).val
    found, few, again = (g["evaluate"](model, notation, some, torch.autocast("cpu", enabled=False))
                         for some, g["eval_batch_size"] in ((pairs, 1000), (pairs[:60], 1000), (pairs[:60], 7)))
    assert again["loss"] == pytest.approx(few["loss"], rel=1e-5)
    assert again["digit_loss"] == pytest.approx(few["digit_loss"], rel=1e-4)
    exact = ((found["predicted"] == found["targets"]) | (found["places"] == -2)).all(1)
    a, b = pairs.long().unbind(1)
    written = g["solve"](model, notation, a, b)
    source, padding = notation.sources(a, b)
    with torch.no_grad():                                    # one path's choice is the other's unless it is a near tie
        scores = model.eval()(source, notation.inputs(found["targets"]), padding)[0]
        choices.assert_best(written, model(source, notation.inputs(written), padding)[0], 1e-4)
    choices.assert_best(found["predicted"], scores, 1e-4)
    sure = ((choices.margin(scores) > 1e-4) | (found["places"] == -2)).all(1)
    agree = ((written == found["targets"]) | (found["places"] == -2)).all(1) == exact
    assert agree[sure].all() and sure.double().mean() > 0.9
    assert found["accuracy"] == pytest.approx(exact.double().mean().item()) and 0 < exact.sum() < len(pairs)
    answers = torch.tensor([found == truth for found, truth in zip(notation.numbers(written), (a * b).tolist())])
    assert answers[sure & exact].all()                       # the other way round: a zero too many, first of a number
    assert format != "padded" or torch.equal(answers[sure], exact[sure])
    weighed = sum(found["digit_loss"][k] * (found["places"] == k).sum().item() for k in found["digit_loss"])
    assert format != "padded" or found["loss"] == pytest.approx(
        weighed / (found["places"] > -2).sum().item(), rel=1e-5)


def test_a_models_randomness_goes_on_and_is_its_own():
    one, before, drawn = learner("simple", "--dropout", "0.2")[2], torch.get_rng_state(), []
    for _ in range(2):
        with one.own_randomness():
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] != drawn[1] and torch.equal(torch.get_rng_state(), before)


def test_sum_loss_by_the_formula():
    """Uniform: ln of the number of sums; the truth: 0; masked places change nothing; values: squared error by hand."""
    notation = Notation("padded", 3)
    truth = notation.running_sums(*torch.tensor([[999, 123], [999, 45]]))
    assert truth.max() == 9 * 9 * 3 + 17 < notation.n_sums == 270    # 999 x 999: 81, 170, 260, 188, 99, 9
    mask = torch.ones_like(truth, dtype=torch.bool)
    assert sum_loss(torch.zeros(2, 6, 270), truth, mask, 270).item() == pytest.approx(math.log(270))
    sure = 100.0 * F.one_hot(truth, 270)
    assert sum_loss(sure, truth, mask, 270) == 0 and torch.equal(named_sums(sure, 270), truth)
    junk, mask[0, 3] = sure.clone(), False
    junk[0, 3] = torch.arange(270) * 1.0
    assert sum_loss(junk, truth, mask, 270) == 0
    value = (truth + torch.tensor([[0.4], [-0.4]]))[..., None] / 27
    assert sum_loss(value, truth, mask, 270).item() == pytest.approx((0.4 / 27) ** 2, rel=1e-4)
    assert torch.equal(named_sums(value, 270), truth) and not torch.equal(named_sums(value * 1.01, 270), truth)
    assert sum_loss(sure, truth, torch.zeros_like(mask), 270) == 0


@pytest.mark.parametrize("head, rows", [("classes", 90), ("value", 1)])
def test_sum_head_leaves_the_rest_and_is_scored(head, rows):
    """Without, there are no such weights; with one, all else starts the same; the share of sums that it names."""
    models = []
    for choice in ("none", head):
        g, notation, one = learner("simple", "--min_digits", "1", "--max_digits", "1", "--sum_head", choice)
        models.append(one.model)
    assert models[0].sum_head is None and models[1].n_params() == models[0].n_params() + 32 * rows
    pairs = Problems(1, 1, 64).train
    a, b = pairs.long().unbind(1)
    source, padding = notation.sources(a, b)
    targets, places = notation.answers(a, b)
    x = notation.inputs(targets)
    with torch.no_grad():
        (one, none), (two, sums) = models[0](source, x, padding), models[1](source, x, padding)
    assert none is None and torch.equal(one, two) and sums.shape == (*x.shape, rows)
    named = notation.running_sums(a, b).gather(1, places.clamp(min=0)).masked_fill(places < 0, -5)   # of digits only
    named[::4] = -5
    g["named_sums"] = lambda *_: named
    found = g["evaluate"](models[1], notation, pairs, torch.autocast("cpu", enabled=False))
    right = ((named >= 0).sum() / (places >= 0).sum()).item()
    assert found["sum_accuracy"] == g["numbers_of"](found)["sum_accuracy"] == pytest.approx(right) and 0.6 < right < 0.9


def test_report_says_where_errors_fall(capsys):
    notation = Notation("padded", 2)
    a, b = torch.tensor([12, 34, 99]), torch.tensor([12, 56, 99])
    targets, places = notation.answers(a, b)                 # 4410, 4091, 1089, least significant first
    predicted = targets.clone()
    predicted[1, 1], predicted[1, 2], predicted[2, 1] = 7, 2, 7
    found = dict(predicted=predicted, targets=targets, places=places, accuracy=1 / 3, loss=0.5, examples=3,
                 digit_accuracy={0: 1.0, 1: 1 / 3, 2: 2 / 3, 3: 1.0}, digit_loss=dict.fromkeys(range(4), 0.5))
    train_mult.report(found, notation, "toy")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["toy:", "exact", "match", "0.3333"]
    assert rows[3] == ["10^1", "0.3333", "0.5000", "100.0%"] and rows[4][-1] == "0.0%"
    assert "1: 1, 2: 1" in out
    table = {row[0]: row[1:] for row in rows[-10:]}
    assert table["0"][7] == "2" and table["9"][2] == "1"
    assert sum(int(n) for row in table.values() for n in row if n != ".") == 3


# ------------------------------------------------------------------------------------------------- as it is typed

_, at, done = of("train_mult")
KEEP = KEEP["train_mult"]


@pytest.fixture(scope="module")
def base(forks, tmp_path_factory):
    """A finished run with all its numbered checkpoints and TensorBoard; tests work on copies."""
    folder = tmp_path_factory.mktemp("base")
    done(forks, folder, **KEEP)
    return at(folder)


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, at(tmp_path / "runs")))


def test_one_stream_whatever_is_trained(forks, tmp_path):
    """Together, or one after the other: each model sees the same batches and learns the same bits. The best is its own
    highest exact match, then its lowest loss."""
    both, later, how = at(tmp_path / "both"), at(tmp_path / "later"), dict(dropout=0.2, max_digits=1, eval_interval=2)
    done(forks, tmp_path / "both", **how)
    done(forks, tmp_path / "later", **how, models="simple")
    assert {*load_checkpoint(later / "last.pt")["models"]} == {"simple"}
    done(forks, tmp_path / "later", "--resume", **how, models="latent")
    assert_equal(*(dict(sorted(load_checkpoint(run / "last.pt")["models"].items())) for run in (later, both)))
    assert curve(both, "loss", model="simple") == curve(later, "loss", model="simple")
    for model in ("simple", "latent"):
        steps, hits, losses = (curve(both, key, "val", model=model) for key in ("step", "accuracy", "loss"))
        best = max(zip(steps, hits, losses), key=lambda line: (line[1], -line[2]))[0]
        assert load_checkpoint(both / f"best_{model}.pt")["steps"][model] == best == summary(both)[f"best_step_{model}"]
        assert len({*hits}) > 1


def test_forcing(forks, base, tmp_path):
    """A falling probability changes the run after its start, and not before."""
    done(forks, tmp_path, forcing="linear", forcing_slope=0.1, forcing_start=5)
    none, falling = (curve(run, "loss", model="latent") for run in (base, at(tmp_path)))
    assert falling[:6] == none[:6] and falling != none
    assert curve(at(tmp_path), "forcing", model="simple")[5:8] == pytest.approx([1, 0.9, 0.8])


def test_tensorboard_is_one_curve_for_each_model(forks, base, copy, tmp_path):
    """Resumed from an older checkpoint, with one model ahead afterwards: no step twice, nothing of the old branch. The
    one that is not trained is kept; evaluate.py, which knows one model of a run, scores none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    done(forks, tmp_path / "runs", "--resume", copy / "step_00000007.pt", models="simple", max_steps=14, **KEEP)
    last, before = (load_checkpoint(path) for path in (copy / "last.pt", base / "step_00000007.pt"))
    assert last["steps"] == {"simple": 14, "latent": 7}
    assert_equal(last["models"]["latent"], before["models"]["latent"])
    assert_error(forks.run(["evaluate.py", copy], tmp_path), "last.pt")
    done(forks, tmp_path / "runs", "--resume", models="simple,latent", max_steps=13, **KEEP)
    for model, end in (("simple", 14), ("latent", 13)):
        assert curve(copy, model=model) == list(range(1, end + 1))
        events = EventAccumulator(str(copy / "tensorboard" / model), size_guidance={"scalars": 0}).Reload()
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in found] == list(range(1, end + 1))
        assert [value for _, value in found] == pytest.approx(curve(copy, "loss", model=model), rel=1e-5)
    assert load_checkpoint(copy / "last.pt")["steps"] == {"simple": 14, "latent": 13}


def test_early_stopped_one_rests(forks, tmp_path):
    """A rate of nearly zero never gets better: with patience 1 both rest early, and more patience wakes them."""
    how, last = dict(lr=1e-12, muon_lr=1e-12, weight_decay=0.0, eval_interval=3), at(tmp_path) / "last.pt"
    child = done(forks, tmp_path, **how, patience=1)
    assert all(step < 12 for step in load_checkpoint(last)["steps"].values()) and "exact match" in child.out
    done(forks, tmp_path, "--resume", **how, patience=99)
    assert load_checkpoint(last)["steps"] == {"simple": 12, "latent": 12}


def test_original_command_line(in_process, tmp_path):
    """With the names of old and hyphens; -h names them."""
    g, words = fresh("train_mult.py"), "--d_model 16 --num-layers 1 --num_latent 4 --save-every 3".split()
    settings = override(g, words)
    assert [settings[name] for name in ("n_embd", "n_layer", "n_latent", "save_interval")] == [16, 1, 4, 3]
    status, out, _ = in_process(train_mult, "-h")
    assert status == 0 and "also --d_model" in " ".join(out.split()) and "also --save_every" in " ".join(out.split())


def test_start_and_questions(forks, base, copy, tmp_path):
    """What is said at the start; what --ask and --eval_only print; and that they write nothing."""
    before = snapshot(tmp_path)
    asked = done(forks, tmp_path / "runs", "--resume", "--ask", "12*34, 7 x 8")
    assert "12 x 34 = 408 (" in asked.out and "7 x 8 = 56 (" in asked.out
    assert len(re.findall(r"^  (simple|latent) +\S.* (right|wrong) \(wrote \S*, step 12\)$", asked.out, re.M)) == 4
    assert re.search(r"split by unordered pair: seed 0, hash [0-9a-f]{12}\n", asked.out)
    assert re.search(r"\d+ x \d+ = \d+: the model reads \d+\*\d+ and writes =\d+\$\n", asked.out)
    evaluated = done(forks, tmp_path / "runs", "--resume", "--eval_only")
    row = r"(simple|latent), step 12, (training|held-out) pairs: exact match (\S+) on (\d+)"
    found, held_out = re.findall(row, evaluated.out), len(Problems(1, 2, 1, 0.2, 60).val)
    assert [row[:2] for row in found] == [(m, s) for m in ("simple", "latent") for s in ("training", "held-out")]
    for model, split, accuracy, n in found:
        if split == "held-out":
            assert accuracy == f"{summary(base)[f'val_accuracy_{model}']:.4f}" and int(n) == held_out
    assert "truth (rows) against prediction" in evaluated.out and "first error here" in evaluated.out
    assert snapshot(tmp_path) == before


def test_training_pairs_are_as_long_as_those_held_out(forks, tmp_path):
    """Where three of four training examples are shorter: exact match on training pairs is not of these."""
    done(forks, tmp_path, short_share=1.0, min_digits=2, n_examples=16, max_steps=1)
    assert " training pairs: exact match 0.0000 on 4 examples" in done(forks, tmp_path, "--resume", "--eval_only").out
    problems = Problems(2, 2, 16, 0.2, 60, short_share=1.0)
    assert (problems.train >= 10).all(1).sum() == 4 and not (problems.train[:4] >= 10).all()
