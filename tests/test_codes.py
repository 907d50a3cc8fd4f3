"""models/discrete.py: the KL and its parts beside enumeration, the monitors of codes, the two tables of its command."""
import itertools
import math
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

from models import discrete
from models.discrete import (choose, code_statistics, decompose, entropy, gradient_error, information_gaps, kl_uniform,
                             mutual_information, nmi_matrix, usage_kl)
from test_discrete import close, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


# --- KL ---

def test_kl_to_uniform_in_closed_form():
    """0 at uniform, ln K at one-hot, the enumerated sum elsewhere; a value per choice, whatever the batch."""
    assert kl_uniform(torch.full((3, 4, 7), 2.5)).abs().max() < 1e-6
    for sharp in (1e4, math.inf):
        logits = torch.where(torch.eye(7) > 0, 0.0, -sharp)
        close(kl_uniform(logits), torch.full((7,), math.log(7)))
    logits = normal(5, 4, 7)
    p = torch.softmax(logits.double(), -1)
    close(kl_uniform(logits).double(), (p * (p / (1 / 7)).log()).sum(-1))
    assert kl_uniform(logits).shape == (5, 4) and kl_uniform(logits.bfloat16()).dtype == torch.float32
    assert torch.equal(kl_uniform(logits.repeat(6, 1, 1)), kl_uniform(logits).repeat(6, 1))
    close(kl_uniform(logits + 100), kl_uniform(logits), 1e-5)


def test_entropy():
    """ln K at uniform, 0 at one-hot, and 0 ln 0 = 0 also in the gradient of what comes from a softmax."""
    close(entropy(torch.full((2, 8), 1 / 8)), torch.full((2,), math.log(8)))
    assert torch.equal(entropy(torch.eye(4)), torch.zeros(4))
    close(entropy(torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)).item(), 1.5 * math.log(2), 1e-12)
    p = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    entropy(p).backward()
    assert p.grad.isfinite().all() and p.grad[1] > 10


@pytest.mark.parametrize("sharp", [1.0, 100.0, 1e4])
def test_gradients_of_the_parts_are_finite(sharp):
    """However sure the posterior is, also where whole columns of probabilities are 0 in float32."""
    logits = (sharp * normal(6, 3, 5)).requires_grad_()
    y = F.one_hot(logits.argmax(-1), 5)
    for value in (*decompose(logits, y).values(), kl_uniform(logits).sum(), usage_kl(logits)):
        grad = torch.autograd.grad(value, logits, retain_graph=True)[0]
        assert value.isfinite() and grad.isfinite().all()
        assert sharp > 1 or grad.abs().sum() > 1e-4


def draw(logits, seed=0):
    return F.one_hot(choose(logits, "straight_through", generator=seeded(seed))[1], logits.size(-1))


@pytest.mark.parametrize("B, N, K, sharp", [(1, 1, 2, 1), (4, 3, 5, 0.1), (16, 8, 32, 2), (7, 1, 4, 6),
                                            (32, 16, 64, 4)])
def test_the_parts_sum_to_the_kl(B, N, K, sharp):
    """KL = code_mi + DWKL = MI + TC + DWKL, and it is the mean of the codes' own KLs; MI is at most ln B."""
    logits = sharp * normal(B, N, K)
    parts = decompose(logits, draw(logits))
    kl = parts["kl"].item()
    assert kl == pytest.approx((parts["code_mi"] + parts["dwkl"]).item(), abs=1e-5, rel=1e-6)
    assert kl == pytest.approx((parts["mi"] + parts["tc"] + parts["dwkl"]).item(), abs=1e-5, rel=1e-6)
    p = torch.softmax(logits.double(), -1)
    assert kl == pytest.approx(((p * (p * K).log()).sum() / B).item(), abs=1e-5, rel=1e-6)
    assert kl == pytest.approx(kl_uniform(logits).sum(1).mean().item(), abs=1e-5, rel=1e-6)
    q = p.mean(0)
    assert parts["dwkl"].item() == pytest.approx((q * (q * K).log()).sum().item(), abs=1e-5, rel=1e-5)
    assert parts["mi"] <= math.log(B) + 1e-5
    assert all(value.shape == () and value.dtype == torch.float32 for value in parts.values())
    twice = decompose(logits.repeat(2, 1, 1), draw(logits).repeat(2, 1, 1))
    for name in parts:  # no sum over the batch, and the same mixture
        assert twice[name].item() == pytest.approx(parts[name].item(), abs=2e-5, rel=1e-5)


def enumerated_parts(logits):
    """MI and TC of q(z) = mean_x q(z|x) by all K^N values of z, in float64."""
    p = torch.softmax(logits.double(), -1)
    B, N, K = p.shape
    joint = p[:, 0]
    for n in range(1, N):
        joint = (joint[:, :, None] * p[:, n, None]).flatten(1)                   # (B, K^n)
    mixture = joint.mean(0)
    factors = p.mean(0)[0]
    for n in range(1, N):
        factors = (factors[:, None] * p.mean(0)[n]).flatten()
    mi = (joint * (joint / mixture).log()).sum(1).mean()
    return mi.item(), (mixture * (mixture / factors).log()).sum().item()


@pytest.mark.parametrize("seed, sharp", [(0, 1.0), (1, 2.0), (2, 4.0)])
def test_mi_and_tc_are_exact_in_expectation(seed, sharp):
    """All 9^4 draws of four inputs with two ternary codes, with their probabilities: the true MI and TC."""
    logits = sharp * normal(4, 2, 3, seed=seed)
    pairs = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]         # (9, 2, 3)
    which = torch.tensor(list(itertools.product(range(9), repeat=4)))                       # (9^4, 4)
    q = torch.softmax(logits.double(), -1)
    chances = (q[:, 0, :, None] * q[:, 1, None]).flatten(1)                                 # (4, 9)
    weights = chances[torch.arange(4), which].prod(1)
    parts = torch.vmap(decompose, in_dims=(None, 0))(logits, pairs[which])
    assert weights.sum().item() == pytest.approx(1)
    mi, tc = enumerated_parts(logits)
    assert tc > 0.01 and mi > 0.1
    assert (weights @ parts["mi"].double()).item() == pytest.approx(mi, abs=1e-5)
    assert (weights @ parts["tc"].double()).item() == pytest.approx(tc, abs=1e-5)


def certain(codes, size):
    """Logits (B, N, K) of a posterior that is sure of codes (B, N)."""
    return 1e4 * F.one_hot(codes, size).float()


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_total_correlation_of_copies(copies):
    """Each of 8 inputs has a code of its own, said `copies` times: MI ln 8, TC (copies - 1) ln 8."""
    codes = torch.arange(8)[:, None].expand(-1, copies)
    parts = decompose(certain(codes, 8), F.one_hot(codes, 8))
    assert parts["mi"].item() == pytest.approx(math.log(8), abs=1e-5)
    assert parts["tc"].item() == pytest.approx((copies - 1) * math.log(8), abs=1e-5)
    assert parts["dwkl"].item() == pytest.approx(0, abs=1e-5)
    wide = decompose(certain(codes, 32), F.one_hot(codes, 32))  # a quarter of the codebook in use
    assert wide["dwkl"].item() == pytest.approx(copies * math.log(4), abs=1e-5)
    assert wide["tc"].item() == pytest.approx((copies - 1) * math.log(8), abs=1e-5)


def test_positive_clips_what_chance_made_negative():
    """MI below 0 by draws that other inputs would have made, TC below 0 by draws that are too good; else nothing."""
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()[:, None]
    for codes, negative in (([0, 1], "tc"), ([1, 0], "mi")):
        y = F.one_hot(torch.tensor(codes)[:, None], 2)
        parts, clipped = decompose(logits, y), decompose(logits, y, positive=True)
        assert parts[negative] < -0.1 and clipped[negative] == 0
        assert all(clipped[name] == parts[name] > 0 for name in parts if name not in (negative, "dwkl"))
    assert parts["mi"].item() == pytest.approx(math.log(0.1 / 0.5), abs=1e-5)


def test_gradient_of_the_parts_by_differences():
    """KL, code_mi and DWKL in the logits, MI in logits and y: central differences along a direction."""
    logits, way = normal(5, 3, 4).requires_grad_(), normal(5, 3, 4, seed=1)
    y = torch.softmax(normal(5, 3, 4, seed=2), -1).requires_grad_()
    for name, value in decompose(logits, y).items():
        grads = torch.autograd.grad(value, (logits, y), retain_graph=True, allow_unused=True)
        for i, grad in enumerate(grads):
            moved = [decompose(logits + (i == 0) * s * way, y + (i == 1) * s * way)[name] for s in (0.01, -0.01)]
            found = 0.0 if grad is None else (grad * way).sum().item()
            assert found == pytest.approx((moved[0] - moved[1]).item() / 0.02, abs=2e-3)


def test_usage_kl_asks_for_even_use_and_nothing_else():
    """0 where the mean is uniform, be the posteriors sure or vague; ln K where one code serves for everything."""
    for logits in (torch.zeros(4, 2, 8), certain(torch.arange(8).view(4, 2), 8), normal(1, 8).repeat(8, 1)[
            torch.arange(8)[:, None], (torch.arange(8)[:, None] + torch.arange(8)) % 8].view(4, 2, 8)):
        assert usage_kl(logits).shape == () and abs(usage_kl(logits).item()) < 1e-6
    assert usage_kl(certain(torch.full((4, 2), 3), 8)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert usage_kl(certain(torch.tensor([[0, 1], [1, 0]]), 8)).item() == pytest.approx(math.log(4), abs=1e-6)
    logits = normal(4, 2, 8)  # all of one codebook: positions are pooled, unlike in DWKL
    p = torch.softmax(logits, -1).mean((0, 1))
    assert usage_kl(logits).item() == pytest.approx((p * (p * 8).log()).sum().item(), abs=1e-6)


# --- Monitors ---

def test_code_statistics_of_codes_made_by_hand():
    """Counts codes, not distinct values per bin: one code of eight is 1/8 in use, 7 dead, perplexity 1, no bits."""
    found = code_statistics(torch.full((5, 3), 6), 8)
    assert found["usage"] == 1 / 8 and found["dead"] == 7
    assert found["perplexity"] == pytest.approx(1) and found["code_bits"] == pytest.approx(0, abs=1e-12)
    found = code_statistics(torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]]), 4)  # each position always the same
    assert (found["usage"], found["dead"]) == (0.5, 2) and found["perplexity"] == pytest.approx(2)
    assert found["code_bits"] == pytest.approx(0, abs=1e-12)
    found = code_statistics(torch.tensor([[0, 3], [1, 3], [2, 3], [2, 3]]), 4)  # 1.5 bits and none
    assert found["usage"] == 1 and found["dead"] == 0 and found["code_bits"] == pytest.approx(1.5)
    p = torch.tensor([1 / 8, 1 / 8, 2 / 8, 4 / 8], dtype=torch.float64)
    assert found["perplexity"] == pytest.approx(math.exp(-(p * p.log()).sum()))
    found = code_statistics(torch.cartesian_prod(torch.arange(16), torch.arange(16), torch.arange(16)), 16)
    assert found["usage"] == 1 and found["dead"] == 0
    assert found["perplexity"] == pytest.approx(16) and found["code_bits"] == pytest.approx(12)


def test_mutual_information_by_hand():
    """Equal: H. Independent: 0. A noisy channel: the sum written out. Sizes may differ and values be missing."""
    a = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert mutual_information(a, a, 4, 4) == pytest.approx((math.log(4),) * 3)
    assert mutual_information(a, a // 2, 4, 9) == pytest.approx((math.log(2), math.log(4), math.log(2)))
    assert mutual_information(a, a % 1, 4, 1) == pytest.approx((0, math.log(4), 0))
    assert mutual_information(a, torch.arange(8) % 2, 5, 3) == pytest.approx((0, math.log(4), math.log(2)), abs=1e-12)
    a, b = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert mutual_information(a, b, 2, 2) == pytest.approx((expected, math.log(2), math.log(2)))


def brute_nmi(codes, size):
    N = codes.size(1)
    found = torch.zeros(N, N, dtype=torch.float64)
    for i, j in itertools.product(range(N), repeat=2):
        information, h, k = mutual_information(codes[:, i], codes[:, j], size, size)
        found[i, j] = information / math.sqrt(h * k) if h * k > 0 else 0
    return found


def test_nmi_matrix_by_brute_force():
    """Every pair as `mutual_information` has it; symmetric; the floor is that of codes shuffled among the inputs."""
    codes = torch.randint(6, (49, 5), generator=seeded())
    codes[:, 1] = codes[:, 0]                       # the same
    codes[:, 2] = 3                                 # constant
    codes[:, 3] = (codes[:, 0] + 1) % 6             # renamed
    codes[:20, 4] = codes[:20, 0]                   # in part
    before = torch.get_rng_state()
    found, floor = nmi_matrix(codes, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    close(found, brute_nmi(codes, 6))
    assert found.dtype == torch.float64 and torch.equal(found, found.T) and torch.equal(floor, floor.T)
    for matrix in (found, floor):
        close(matrix.diagonal(), torch.tensor([1, 1, 0, 1, 1], dtype=torch.float64))
        assert matrix[2].abs().max() < 1e-6 and matrix.min() >= 0
    assert found[0, 1].item() == pytest.approx(1) and found[0, 3].item() == pytest.approx(1)
    assert floor[0, 1] < 0.4 and 0.2 < found[0, 4] < 0.9
    again, other = (nmi_matrix(codes, seeded(s))[1] for s in (1, 2))
    assert torch.equal(floor, again) and not torch.equal(floor, other)


def test_information_gap_of_a_position_that_is_the_factor():
    """Best 1 there, the gap down to a position of chance, a small floor; a renamed factor is as good."""
    codes = torch.randint(8, (2000, 4), generator=seeded())
    before = torch.get_rng_state()
    found = information_gaps(codes, 8, {"colour": codes[:, 2], "renamed": 100 - 7 * codes[:, 2],
                                        "half": codes[:, 1] // 4, "none": torch.randint(3, (2000,), generator=seeded(
                                            1))}, seeded(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, position in (("colour", 2), ("renamed", 2), ("half", 1)):
        best, gap, where, floor = found[name]
        assert best == pytest.approx(1) and where == position and 0.97 < gap < 1 and 0 < floor < 0.03
    best, gap, _, floor = found["none"]
    assert 0 < best < 0.03 and 0 <= gap < best and 0 < floor < 0.03


def test_information_gap_in_numbers():
    """Best and gap are I / H(factor) of the first and the second position, by hand; one position has no second."""
    factor = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    codes = torch.stack([factor // 2, torch.zeros(8, dtype=torch.int64), factor], 1)
    best, gap, position, floor = information_gaps(codes, 4, {"f": factor}, seeded())["f"]
    assert (best, gap, position) == (pytest.approx(1), pytest.approx(0.5), 2) and 0 < floor < 1
    assert information_gaps(codes[:, :1], 4, {"f": factor}, seeded())["f"][:3] == (
        pytest.approx(0.5), pytest.approx(0.5), 0)
    assert information_gaps(factor[:, None].repeat(1, 2), 4, {"f": factor}, seeded())["f"][:2] == (
        pytest.approx(1), pytest.approx(0))
    finer = torch.arange(8)  # a position that says more than the factor says all of it
    assert information_gaps(finer[:, None], 8, {"f": factor // 2}, seeded())["f"][0] == pytest.approx(1)


def test_undefined_and_constant_factors():
    """Inputs with -1 do not count; a factor that does not vary, or is nowhere defined, is left out."""
    codes = torch.randint(4, (600, 2), generator=seeded())
    even = torch.arange(600) % 2 == 0
    partly = torch.where(even, codes[:, 0], -1)
    codes[~even] = torch.randint(4, (300, 2), generator=seeded(1))
    found = information_gaps(codes, 4, {"partly": partly, "constant": torch.full((600,), 5), "one": torch.where(
        even, 2, -1), "never": torch.full((600,), -1), "once": torch.arange(600) - 599}, seeded(2))
    assert list(found) == ["partly"]
    assert found["partly"] == information_gaps(codes[even], 4, {"partly": partly[even]}, seeded(2))["partly"]
    assert found["partly"][0] == pytest.approx(1) and found["partly"][2] == 0


# --- The tables ---

def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_table_of_gradients(capsys, monkeypatch):
    """reinmax is without bias on the first two functions, straight-through on the first only."""
    monkeypatch.setattr(sys, "argv", ["models/discrete.py", "gradients"])
    monkeypatch.setattr(discrete, "gradient_error", lambda *given, **how: gradient_error(*given, draws=500, **how))
    discrete.main()
    table = rows(capsys.readouterr().out)
    biases = {(row[0], row[1]): [float(cell.split(",")[0]) for cell in row[2:]] for row in table[2:]}
    assert len(biases) == 10 and len({len(row) for row in table}) == 1
    assert biases["reinmax", "1"][:2] == [0, 0] and biases["reinmax", "1"][2] > 0.1 < biases["reinmax", "2"][0]
    assert biases["straight_through", "1"][0] == 0 and biases["straight_through", "1"][1] > 0.1


def test_table_of_the_decomposition(capsys, monkeypatch):
    """The residual is rounding in every row, our TC is positive, and with the own input left out it goes below 0."""
    monkeypatch.setattr(discrete, "range", lambda draws: range(10), raising=False)
    discrete._decomposition()
    table = rows(capsys.readouterr().out)
    assert len(table) == 5 and {len(row) for row in table} == {6}
    for row in table[2:]:
        code_mi, mi, tc, residual, left_out = (float(cell.split()[0]) for cell in row[1:])
        assert abs(residual) < 1e-4 * code_mi and 0 < tc < code_mi and mi <= math.log(64) + 1e-3
        assert left_out < tc and code_mi == pytest.approx(mi + tc, rel=2e-3)
    assert float(table[2][5].split()[0]) < 0 and float(table[4][5].split()[0]) < -10


@pytest.mark.parametrize("words", [[], ["gradient"], ["gradients", "decomposition"]])
def test_other_words_are_an_error_of_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models/discrete.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(discrete.__file__, run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr() == ("", "error: which table? gradients or decomposition\n")
