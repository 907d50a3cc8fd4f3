"""Multiplication: the split, how problems are written, the loss's identities, teacher forcing, the models."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import choices  # noqa: E402
import train_mult  # noqa: E402
from data import multiplication  # noqa: E402
from data.multiplication import END, FORMATS, PADDING, SYMBOLS, Notation, Problems, Stream, held_out  # noqa: E402
from nanolab.run import UserError, override  # noqa: E402
from test_scripts import fresh  # noqa: E402
from train_mult import Forcing, named_sums, sequence_loss, sum_loss  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs_of(examples):
    return set(map(tuple, examples.tolist()))


def unordered(examples):
    return {(min(a, b), max(a, b)) for a, b in examples.tolist()}


# ------------------------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def default():
    return Problems()


def test_split_by_unordered_pair(default):
    """All 810,000 ordered pairs are on one side; no unordered pair on both; the evaluation set holds none twice."""
    train, val = unordered(default.train), unordered(default.val)
    assert not train & val
    assert len(default.train) == 1_000_000 and len(default.val) == 10_000 == len(pairs_of(default.val))
    assert len(pairs_of(default.train)) == default.n_pairs and default.n_pairs + default.n_held_out == 810_000
    assert abs(default.n_held_out / 810_000 - 0.05) < 0.002
    counts = np.unique(default.train.numpy().astype(np.int64) @ [1000, 1], return_counts=True)[1]
    assert set(counts.tolist()) == {1, 2}                    # every training pair before one comes twice
    assert {int(default.train.min()), int(default.train.max())} == {100, 999}
    a, b = default.train.long().T
    assert not held_out(a, b, 0.05, 0).any() and held_out(*default.val.long().T, 0.05, 0).all()
    assert default.hash in default.describe() and "seed 0" in default.describe()


def test_the_split_is_this_one():
    """What is held out may never change: a figure would then be of other pairs. splitmix64's published first values."""
    assert [hex(int(multiplication.mix(np.uint64(x)))) for x in (0, 0x9E3779B97F4A7C15)] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    assert Problems().hash == "de503717660f" and Problems(2, 2, val_fraction=0.1).hash == "cc06346a6bd8"
    assert Problems(seed=1).hash != Problems().hash


def test_the_split_does_not_depend_on_the_range():
    narrow, wide = Problems(2, 2, 100, 0.1), Problems(1, 3, 1000, 0.1)
    assert narrow.val.dtype == torch.int16
    assert not unordered(narrow.val) & unordered(wide.train) and not unordered(narrow.train) & unordered(wide.val)


def test_within_memory():
    default, long = Problems(), Problems(8, 8)
    for problems in (default, long):
        assert problems.train.nbytes + problems.val.nbytes <= 8.1e6 and len(problems.train) == 1_000_000
        held = [value for value in vars(problems).values() if torch.is_tensor(value)]
        assert len(held) == 2 and all(t.untyped_storage().nbytes() == t.nbytes for t in held)
    assert long.train.min() >= 10 ** 7 and long.train.max() < 10 ** 8
    assert not unordered(long.train[:50_000]) & unordered(long.val)


def test_short_ones_beside():
    problems = Problems(3, 3, 90_000, 0.05, 1000, short_share=0.5)
    a, b = problems.train.long().T
    lengths = ((a >= 10).long() + (a >= 100)) * 3 + (b >= 10).long() + (b >= 100)
    assert lengths.bincount(minlength=9).tolist() == [5000] * 8 + [50_000]
    assert not held_out(a, b, 0.05, 0).any()                 # short ones are held out too
    full = multiplication.of_length(problems.train, 3)
    assert len(full) == 50_000 and full.min() == 100 and len(multiplication.of_length(problems.train, 1)) == 90_000
    assert problems.val.min() >= 100 and torch.equal(problems.val, Problems(3, 3, 10, 0.05, 1000).val)


@pytest.mark.parametrize("how, said", [
    (dict(min_digits=3, max_digits=2), "min_digits 3"), (dict(max_digits=9), "1 to 8"),
    (dict(n_examples=0), "at least 1"),
    (dict(val_fraction=0.0), "above 0"), (dict(min_digits=1, max_digits=1, val_fraction=1e-6), "no held-out pairs"),
    (dict(min_digits=1, max_digits=1, val_fraction=1 - 1e-9), "no training pairs"),
    (dict(short_share=1.5), "from 0 to 1")])
def test_refused_problems(how, said):
    with pytest.raises(UserError, match=said):
        Problems(**how)


def test_stream():
    """Each epoch has every example once, in another order; any position can be asked for, in any pieces."""
    examples = Problems(2, 2, 1000, 0.1).train
    stream, other = Stream(examples, 1), Stream(examples, 2)
    whole = stream.at(0, 3000)
    rows = [sorted(map(tuple, part.tolist())) for part in whole.split(1000)]
    assert rows[0] == rows[1] == rows[2] == sorted(map(tuple, examples.tolist()))
    assert not torch.equal(whole[:1000], whole[1000:2000]) and not torch.equal(whole[:1000], other.at(0, 1000))
    torch.testing.assert_close(torch.cat([stream.at(i, 7) for i in range(0, 2996, 7)]), whole[:2996], rtol=0, atol=0)
    assert torch.equal(stream.at(990, 20), whole[990:1010]) and whole.dtype == torch.int64
    assert torch.equal(Stream(examples[:1], 1).at(5, 3), examples[:1].long().expand(3, 2))
    assert not (whole[:999] == whole[1:1000]).all(1).any()
    first, second = ({tuple(map(tuple, pair)) for pair in torch.stack([part[:-1], part[1:]], 1).tolist()}
                     for part in whole[:2000].split(1000))
    assert len(first & second) < 50                          # not the same order from another start


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


def test_carries_as_published():
    """The example of Castells's page: 999*999=+108017026818909900, the sign apart."""
    notation = Notation("trace", 3)
    assert notation.text(notation.answers(*torch.tensor([[999], [999]]))[0][0]) == "108017026818909900"


@pytest.mark.parametrize("digits", [1, 2, 3, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_every_number_reads_back(format, digits):
    notation = Notation(format, digits)
    x = torch.tensor([0, 1, 9, 10 ** digits - 1, 10 ** (digits - 1), 7] + [3 ** (2 * digits) % 10 ** digits])
    a, b = (t.flatten() for t in torch.meshgrid(x, x, indexing="ij"))
    targets, places = notation.answers(a, b)
    assert notation.numbers(targets) == (a * b).tolist()
    source, _ = notation.sources(a, b)
    for row, x, y in zip(source, a.tolist(), b.tolist()):
        one, two = notation.text(row).split("*")
        if format != "plain":
            one, two = one[::-1], two[::-1]
        assert (int(one), int(two)) == (x, y)
    for k in range(2 * digits):
        at = places == k
        assert torch.equal(targets[at], (a * b)[at.any(1)] // 10 ** k % 10)
    sums = notation.running_sums(a, b)
    assert torch.equal(sums % 10, notation.digits(a * b, 2 * digits)) and (sums[:, -1] < 10).all()


def test_junk_is_no_number():
    notation = Notation("reversed", 2)
    junk = torch.tensor([[END, 1, 1, 1, 1], [1, 11, END, 0, 0], [5, 1, END, 12, 7], [1, 2, 3, 4, 5]])
    assert notation.numbers(junk) == [None, None, 15, 54321]
    with pytest.raises(ValueError, match="can be plain"):
        Notation("roman", 3)


def test_evaluation_reads_what_training_read():
    """Both build their prompts with the same function from the same settings: the prompt begins a training string."""
    notation = Notation("reversed", 3)
    a, b = torch.tensor([123, 7]), torch.tensor([456, 89])
    alone = notation.sources(a[1:], b[1:])[0]
    assert torch.equal(notation.sources(a, b)[0][1:], alone)
    assert notation.example(7, 89).split("reads ")[1].startswith(notation.text(alone[0]))


# ------------------------------------------------------------------------------------------------------------ loss

def batch(seed=0, B=6, T=5, V=7):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 5])[:B, None]
    return logits, targets, mask


def test_loss_weight_zero_is_cross_entropy():
    logits, targets, mask = batch()
    loss, accuracy = sequence_loss(logits, targets, mask)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert sequence_loss(logits, targets, torch.ones_like(mask))[0] == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-12)
    assert accuracy == 0


def test_loss_by_the_formula():
    """B = 3 by hand: one right, one wrong, one right where it counts."""
    logits, targets, mask = batch(B=3)
    logits[0, :, :] = 5 * F.one_hot(targets[0], 7)
    logits[2, 0] = 5 * F.one_hot(targets[2, 0], 7)
    loss, accuracy = sequence_loss(logits, targets, mask, 2.0)
    ce = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    w = [1, 3, 1]
    total = sum(w[b] / (5 / 3) * ce[b, t] for b in range(3) for t in range(5) if mask[b, t])
    assert loss.item() == pytest.approx((total / mask.sum()).item(), rel=1e-12) and accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_loss_ignores_what_is_masked(weight):
    logits, targets, mask = batch()
    logits[0] = 9 * F.one_hot(targets[0], 7)
    found = []
    for junk in (0.0, 1e9, math.nan, math.inf):
        z = torch.where(mask[..., None], logits, junk).requires_grad_()
        y = torch.where(mask, targets, 3 if junk else -1)
        loss, accuracy = sequence_loss(z, y, mask, weight)
        loss.backward()
        found.append((loss.item(), accuracy.item(), z.grad))
        assert (z.grad[~mask] == 0).all()
    for other in found[1:]:
        assert other[:2] == found[0][:2] and torch.equal(other[2], found[0][2])
    assert found[0][1] == pytest.approx(1 / 6)


@pytest.mark.parametrize("right", [True, False])
def test_loss_of_all_right_or_all_wrong(right):
    """The weights have mean 1; a row without any token neither counts nor weighs."""
    logits, targets, mask = batch()
    logits = (3.0 if right else -3.0) * F.one_hot(targets, 7).double()
    mask[2] = False
    plain, accuracy = sequence_loss(logits, targets, mask)
    assert sequence_loss(logits, targets, mask, 4.0)[0].item() == pytest.approx(plain.item(), rel=1e-12)
    assert accuracy == float(right)


def test_loss_of_nothing():
    logits, targets, mask = batch()
    for z, y, m in ((logits, targets, torch.zeros_like(mask)), (logits[:0], targets[:0], mask[:0])):
        z = z.clone().requires_grad_()
        loss, accuracy = sequence_loss(z, y, m, 1.0)
        loss.backward()
        assert loss.item() == 0 == accuracy.item() and (z.grad == 0).all()


def test_loss_weight_is_no_way_for_a_gradient():
    logits, targets, mask = batch()
    logits[0] = 9 * F.one_hot(targets[0], 7)
    z = logits.clone().requires_grad_()
    sequence_loss(z, targets, mask, 1.0)[0].backward()
    softmax = logits.softmax(-1) - F.one_hot(targets, 7)
    w = torch.tensor([1.0, 2, 2, 2, 2, 2], dtype=torch.float64) * 6 / 11
    torch.testing.assert_close(z.grad, softmax * (w[:, None] * mask / mask.sum())[..., None], rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------------------------------------- forcing

@pytest.mark.parametrize("kind, k, expected", [
    ("linear", 1.0, lambda i: max(0.2, 1 - 0.01 * i)), ("exponential", 0.99, lambda i: max(0.2, 0.99 ** i)),
    ("inverse_sigmoid", 20.0, lambda i: max(0.2, 20 / (20 + math.exp(i / 20)))),
    ("none", None, lambda i: 1.0)])
def test_forcing_schedules(kind, k, expected):
    forcing = Forcing(kind, start=5, k=k, slope=0.01, minimum=0.2)
    for step in range(1, 400):
        forcing.stepped(step)
        assert forcing.probability() == pytest.approx(expected(step - 5) if step > 5 else 1.0, rel=1e-12)
    assert Forcing("inverse_sigmoid", k=1.0, minimum=0.0).probability() == 1.0


def test_inverse_sigmoid_far_out():
    forcing = Forcing("inverse_sigmoid", k=1.0)
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
        forcing.validated(loss)
        assert steps(1) == after
    twin = Forcing("linear", slope=0.1, window=3, eps=0.05)
    twin.load_state_dict(forcing.state_dict())
    assert twin.probability() == forcing.probability() and list(twin.losses) == [1.2, 1.21, 1.2]
    targets, predicted = torch.zeros(50, 4, dtype=torch.long), torch.ones(50, 4, dtype=torch.long)
    mixed = forcing.mix(targets, predicted)
    assert torch.equal(mixed, twin.mix(targets, predicted)) and 0.05 < mixed.double().mean() < 0.4


# ---------------------------------------------------------------------------------------------------------- models

def script(*words):
    """The module's namespace with these settings, apart from everybody else's."""
    g = fresh("train_mult.py")
    settings = override(g, list(words))
    names, notation, config = g["check"](settings)
    return g, names, notation, config


SMALL = ("--n_embd", "32", "--n_head", "2", "--device", "cpu", "--dtype", "float32")


def trained(words, steps, name="simple", pairs=None, sums=0.0):
    """A Learner after some steps of plain teacher forcing on `pairs`, or on the script's own stream; sums: weight of a
    head's loss."""
    g, _, notation, config = script(*words)
    learner = g["Learner"](name, config, torch.device("cpu"), torch.float32, g)
    if pairs is None:
        pairs = Problems(g["min_digits"], g["max_digits"], g["n_examples"], g["val_fraction"]).train
    stream = Stream(pairs, 1)
    for step in range(steps):
        a, b = stream.at(step * g["batch_size"], g["batch_size"]).unbind(1)
        source, padding = notation.sources(a, b)
        targets, places = notation.answers(a, b)
        for group in learner.opt.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        logits, said = learner.model(source, notation.inputs(targets), padding)
        loss = sequence_loss(logits, targets, places > -2)[0]
        if sums:
            truth = notation.running_sums(a, b).gather(1, places.clamp(min=0))
            loss = loss + sums * sum_loss(said, truth, places >= 0, notation.n_sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        learner.opt.step()
        learner.opt.zero_grad()
    return g, learner, notation


def test_every_parameter_has_a_gradient():
    """One that is not rounding: 1e-7 of the longest at least, where the least that was found is 3e-6 and rounding is
    1e-9. What has none is as the docstring of Solver says."""
    variants = ["", "--format plain", "--format padded", "--format trace", "--sum_head value", "--sum_head classes",
                "--norm layer --norm_gain --bias", "--no-qk_norm --bias", "--n_read 2", "--n_layer 2", "--n_head 8",
                "--sequence_weight 2", "--sum_head classes --sum_weight 0", "--n_latent 1", *(
                    f"--positions {kind}" for kind in ("rope", "alibi", "none")), *(f"--activation {kind}" for kind in (
                        "relu", "relu2", "silu", "swiglu", "geglu")), *(f"--init {kind}" for kind in (
                            "normal", "xavier", "truncated", "zero"))]
    g, (a, b) = fresh("train_mult.py"), torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(1))
    for words in variants:
        settings = override(g, ["--max_digits", "2", "--min_digits", "1", "--n_layer", "1", "--n_head", "2",
                                "--n_embd", "16", "--n_latent", "3", *words.split()])
        _, notation, config = g["check"](settings)
        (source, padding), (targets, places) = notation.sources(a, b), notation.answers(a, b)
        for kind in train_mult.KINDS:
            torch.manual_seed(0)
            solver = g["Solver"](kind, config, {"none": 0, "value": 1, "classes": notation.n_sums}[g["sum_head"]])
            with torch.no_grad():
                for p in solver.parameters():                # `init zero` begins with some at 0
                    p.add_(0.05 * torch.randn(p.shape))
            logits, sums = solver(source, notation.inputs(targets), padding)
            loss = sequence_loss(logits, targets, places > -2, g["sequence_weight"])[0]
            if sums is not None:
                truth = notation.running_sums(a, b).gather(1, places.clamp(min=0))
                loss = loss + g["sum_weight"] * sum_loss(sums, truth, places >= 0, notation.n_sums)
            loss.backward()
            lengths = {name: p.grad.norm().item() for name, p in solver.named_parameters()}
            without = {name for name, length in lengths.items() if not length > 1e-7 * max(lengths.values())}
            assert without == ({"sum_head"} if g["sum_weight"] == 0 else {"body.blocks.0.cross.q.weight"} if
                               (kind, g["n_latent"]) == ("latent", 1) else set()), (kind, words)


@pytest.mark.parametrize("name", train_mult.KINDS)
def test_learns_64_problems_by_heart(name):
    pairs = Problems(2, 2, 64).train
    words = ["--n_embd", "64", "--n_head", "2", "--min_digits", "2", "--max_digits", "2", "--batch_size", "64"]
    g, learner, notation = trained(words, 100, name, pairs)
    found = g["evaluate"](learner.model, notation, pairs, torch.autocast("cpu", enabled=False))
    assert found["accuracy"] == 1.0 and found["examples"] == 64


@pytest.mark.parametrize("name", train_mult.KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_teacher_forced_exact_is_greedy_exact(format, name):
    """A half-trained model, right on some problems and wrong on others: both ways agree on every one."""
    words = [*SMALL, "--min_digits", "1", "--max_digits", "2", "--format", format, "--n_examples", "20000",
             "--batch_size", "64"]
    g, learner, notation = trained(words, 60, name)
    pairs = Problems(1, 2, 1, 0.3, 400).val
    found = g["evaluate"](learner.model, notation, pairs, torch.autocast("cpu", enabled=False))
    exact = ((found["predicted"] == found["targets"]) | (found["places"] == -2)).all(1)
    a, b = pairs.long().unbind(1)
    written = g["solve"](learner.model, notation, a, b)
    source, padding = notation.sources(a, b)
    with torch.no_grad():                                    # one path's choice is the other's unless it is a near tie
        scores = learner.model.eval()(source, notation.inputs(found["targets"]), padding)[0]
        choices.best(written, learner.model(source, notation.inputs(written), padding)[0], 1e-4)
    choices.best(found["predicted"], scores, 1e-4)
    sure = ((choices.margin(scores) > 1e-4) | (found["places"] == -2)).all(1)
    agree = ((written == found["targets"]) | (found["places"] == -2)).all(1) == exact
    assert agree[sure].all() and sure.double().mean() > 0.9
    assert found["accuracy"] == pytest.approx(exact.double().mean().item()) and 0 < exact.sum() < len(pairs)
    if format != "trace":                                    # whose carries may be wrong where the number is right
        answers = torch.tensor([found == truth for found, truth in zip(notation.numbers(written), (a * b).tolist())])
        assert answers[sure & exact].all()                   # the other way round: a zero too many, first of a number
        assert format != "padded" or torch.equal(answers[sure], exact[sure])
    torch.testing.assert_close(found["loss"], sum(found["digit_loss"][k] * (found["places"] == k).sum().item()
                               for k in found["digit_loss"]) / (found["places"] > -2).sum().item()) \
        if format == "padded" else None


def test_evaluation_does_not_depend_on_the_batch():
    g, _, notation, config = script(*SMALL)
    learner = g["Learner"]("simple", config, torch.device("cpu"), torch.float32, g)
    pairs = Problems(3, 3, 100).train
    found = []
    for size in (7, 100):
        g["eval_batch_size"] = size
        found.append(g["evaluate"](learner.model, notation, pairs, torch.autocast("cpu", enabled=False)))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert found[0]["digit_accuracy"] == pytest.approx(found[1]["digit_accuracy"])


def test_latents_are_the_only_path():
    """Where the readers' weights let nothing through, no gradient reaches the encoder; otherwise it does."""
    g, _, notation, config = script(*SMALL, "--n_latent", "3", "--init", "xavier")
    body = g["Learner"]("latent", config, torch.device("cpu"), torch.float32, g).model.body
    a, b = torch.tensor([123, 456]), torch.tensor([789, 12])
    source, padding = notation.sources(a, b)
    x = notation.inputs(notation.answers(a, b)[0])
    states = {}
    body.encoder.register_forward_hook(lambda module, given, out: states.update(encoder=out))

    def reach():
        logits = body.decode(x, body.encode(source, padding))
        return torch.autograd.grad(logits.square().sum(), states["encoder"])[0].abs().sum().item()
    assert reach() > 0
    for reader in body.readers:
        torch.nn.init.zeros_(reader.cross.out.weight)
    assert reach() == 0
    with torch.no_grad():
        latents = body.encode(source, padding)
        assert latents.shape == (2, 3, 32)
        one = body.decode(x, latents)
        body.encoder.embed.add_(1.0)
        assert torch.equal(body.decode(x, latents), one)     # the decoder has not looked at the source


def test_padding_does_not_matter():
    """A problem alone and the same beside longer ones: equal logits where its tokens are, for both models."""
    g, names, notation, config = script(*SMALL, "--min_digits", "1", "--init", "xavier")
    a, b = torch.tensor([7, 999]), torch.tensor([81, 999])
    source, padding = notation.sources(a, b)
    targets, places = notation.answers(a, b)
    assert padding[0].sum() == 3
    for name in train_mult.KINDS:
        model = g["Learner"](name, config, torch.device("cpu"), torch.float32, g).model.eval()
        with torch.no_grad():
            beside = model(source, notation.inputs(targets), padding)[0][0]
            alone = model(source[:1, :4], notation.inputs(targets[:1]), None)[0][0]
            other = source.clone()
            other[0, 4:] = 5
            junk = model(other, notation.inputs(targets), padding)[0][0]
        torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(beside, junk, rtol=1e-6, atol=1e-6)


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


def test_running_sums_are_below_their_number():
    for digits in range(1, 9):
        notation, x = Notation("padded", digits), torch.tensor([10 ** digits - 1])
        assert notation.running_sums(x, x).max() < notation.n_sums == 90 * digits


@pytest.mark.parametrize("head, rows", [("classes", 90), ("value", 1)])
def test_sum_head_learns_running_sums_and_leaves_the_rest(head, rows):
    """Without, there are no such weights; with one, all else starts the same, and on training pairs it gets right."""
    words = [*SMALL, "--min_digits", "1", "--max_digits", "1", "--format", "padded", "--n_examples", "2000",
             "--n_layer", "1"]
    models = []
    for choice in ("none", head):
        g, _, notation, config = script(*words, "--sum_head", choice)
        models.append(g["Learner"]("simple", config, torch.device("cpu"), torch.float32, g).model)
    assert models[0].sum_head is None and models[1].n_params() == models[0].n_params() + 32 * rows
    a, b = Problems(1, 1, 64).train.long().unbind(1)
    source, padding = notation.sources(a, b)
    targets, places = notation.answers(a, b)
    x = notation.inputs(targets)
    with torch.no_grad():
        (one, none), (two, sums) = models[0](source, x, padding), models[1](source, x, padding)
    assert none is None and torch.equal(one, two) and sums.shape == (*x.shape, rows)
    words += ["--sum_head", head, "--batch_size", "64"]
    g, learner, notation = trained(words, 300, sums=30.0 if head == "value" else 1.0)
    found = g["evaluate"](learner.model, notation, torch.stack([a, b], 1), torch.autocast("cpu", enabled=False))
    assert found["sum_accuracy"] > 0.95 and "sum_accuracy" in g["numbers_of"](found), found["sum_accuracy"]


def test_a_model_alone_learns_what_it_learns_beside_another():
    g, names, _, config = script(*SMALL, "--dropout", "0.2")
    where = torch.device("cpu")
    alone = g["Learner"]("latent", config, where, torch.float32, g)
    both = [g["Learner"](name, config, where, torch.float32, g) for name in names]
    for one, two in zip(alone.model.parameters(), both[1].model.parameters()):
        assert torch.equal(one, two)
    with alone.own_randomness():
        first = torch.rand(3)
    for learner in both:
        with learner.own_randomness():
            second = torch.rand(3)
    assert torch.equal(first, second)


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


def test_imports_nothing_and_says_its_own_name():
    done = subprocess.run([sys.executable, str(ROOT / "train_mult.py"), "--num_latents", "4"], capture_output=True,
                          text=True, cwd="/")
    assert done.returncode == 2 and "--n_latent" in done.stderr or "--num_latent" in done.stderr
    assert SYMBOLS[END] == "$" and len(SYMBOLS) == 14
