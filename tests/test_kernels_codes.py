"""What is particular to operations on discrete codes: beside models/discrete.py, ties, extreme logits.

Their values and gradients beside the formulas': test_kernels.py.
"""
import pytest
import torch

import choices
from cases import CASES, CHOICES
from interpreter import EVERYWHERE, by_kernel, formula, interpreted, needs_interpreter
from kernels import gumbel_softmax, nearest_code, reinmax
from models import discrete

pytestmark = [pytest.mark.usefixtures("one_thread", "by_triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
gumbel_softmax_reference, reinmax_reference = formula(gumbel_softmax), formula(reinmax)
EXACT = dict(atol=2e-6, rtol=2e-6)


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gumbel(logits, seed=1):
    return discrete.gumbel_like(logits.detach(), torch.Generator().manual_seed(seed))


def gradient(op, logits, *more):
    """y, codes and the logits' gradient for a random one of y."""
    logits = logits.detach().clone().requires_grad_()
    y, codes = op(logits, *more)
    return y.detach(), codes, torch.autograd.grad(y, logits, normal(*y.shape, seed=7).to(y))[0]


# --- Formulas ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code_is_vqs(dtype):
    """The codes that discrete.VQ finds, and the nearest by differences."""
    x, codes = normal(50, 6, dtype=dtype), normal(9, 6, seed=1, dtype=dtype)
    index = nearest_code(x, codes)
    away = (x[:, None] - codes).square().sum(-1)
    choices.assert_best(index, -away)
    assert index.dtype == torch.int64
    vq = discrete.VQ(9, 6, similarity="dot")
    vq.codes.copy_(codes)
    choices.assert_best(vq(x[None].float()).codes[0], -away)


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("estimator, tau", [("gumbel_soft", 0.7), ("gumbel_hard", 0.7), ("reinmax", 1.0),
                                            ("reinmax", 1.6)])
def test_the_formulas_are_discrete_choose(estimator, tau, noise):
    """Same noise, same codes, same y bit for bit, same gradient."""
    logits = normal(40, 7, scale=3)
    drawn = noise * gumbel(logits) if noise else None

    def ours(logits):
        if estimator == "reinmax":
            return reinmax(logits, drawn, tau)
        return gumbel_softmax(logits, drawn, tau, estimator == "gumbel_hard")

    def theirs(logits):
        return discrete.choose(logits, estimator, tau, noise, generator=torch.Generator().manual_seed(1))
    (y, codes, grad), (expected, chosen, wanted) = gradient(ours, logits), gradient(theirs, logits)
    assert torch.equal(y, expected) and torch.equal(codes, chosen)
    torch.testing.assert_close(grad, wanted, **EXACT)


def test_the_hard_gradient_is_the_soft_one_and_that_of_reinmax():
    """The hard one has the soft one's gradient; ReinMax's is 2 J(p1) g - J(p0) g / 2."""
    logits = normal(4, 5, dtype=torch.float64)
    noise = gumbel(logits)
    soft, hard = (gradient(gumbel_softmax_reference, logits, noise, 0.7, way)[2] for way in (False, True))
    torch.testing.assert_close(soft, hard, atol=1e-12, rtol=1e-12)
    y, codes, grad = gradient(reinmax_reference, logits, noise, 1.4)
    g = normal(4, 5, seed=7).double()
    for row in range(4):
        p0 = logits[row].detach().softmax(0)
        p1 = (y[row] + (logits[row].detach() / 1.4).softmax(0)) / 2
        j0, j1 = (p.diag() - torch.outer(p, p) for p in (p0, p1))
        torch.testing.assert_close(grad[row], 2 * j1 @ g[row] - j0 @ g[row] / 2, atol=1e-12, rtol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        nearest_code(normal(3, 4), normal(3, 5))
    with pytest.raises(ValueError, match="K > 0"):
        nearest_code(normal(3, 4), normal(0, 4))
    with pytest.raises(ValueError, match="same shape"):
        gumbel_softmax(normal(3, 4), normal(3, 5), 1.0, True)
    with pytest.raises(ValueError, match="K > 0"):
        reinmax(normal(3, 0), None)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            gumbel_softmax(normal(3, 4), None, temperature, True)
    with pytest.raises(ValueError, match="at least 1"):
        reinmax(normal(3, 4), None, 0.9)


# --- Kernels ---

@EVERYWHERE
@pytest.mark.parametrize("N, K, C", [(1, 1, 1), (70, 130, 37), (64, 64, 64), (3, 5, 0), pytest.param(
    1000, 700, 200, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)],
                         ids=str)
def test_nearest_code(N, K, C, dtypes, device):
    """16-bit inputs are exact in float32, so only the order of the sums differs."""
    x, codes = normal(N, C, dtype=dtypes[0]).to(device), normal(K, C, seed=1, dtype=dtypes[1]).to(device)
    with by_kernel(device):
        index = nearest_code(x, codes)
    away = (x.float()[:, None] - codes.float()).square().sum(-1)
    for found in (index, formula(nearest_code)(x, codes)):
        choices.assert_best(found, -away, 4e-5 if C < 100 else 1e-3)  # |x|^2 is about C
    assert index.dtype == torch.int64 and not index.requires_grad


@EVERYWHERE
def test_nearest_code_takes_the_first_of_equal_ones(device):
    """Within a tile and over tiles, of small integers, whose sums are exact."""
    codes = (4 * normal(9, 37)).round().repeat(20, 1).to(device)  # 180 rows: three tiles
    x = codes[:40].T.contiguous().T  # not contiguous
    with by_kernel(device):
        index = nearest_code(x, codes)
    assert torch.equal(index.cpu(), torch.arange(40) % 9) and torch.equal(index, formula(nearest_code)(x, codes))


@EVERYWHERE
def test_nearest_code_keeps_small_differences_beside_a_large_x(device):
    """|x|^2 has no part in the comparison; a NaN in x still gives a code."""
    x = torch.tensor([[1e4, 0.0], [float("nan"), 0.0]], device=device)
    with by_kernel(device):
        index = nearest_code(x, torch.tensor([[0.0, 1.0], [0.001, 1.0]], device=device))
    assert index.tolist() == [1, 0]


@EVERYWHERE
@pytest.mark.parametrize("name", CHOICES)
def test_choices_among_extreme_logits(name, device):
    """The first of equal ones; a row of -inf alone is NaN; nothing else is, and what cannot be gets no gradient."""
    case = CASES[f"{name}, extreme logits"]
    (y, codes), (grad,) = case.assert_agree(case.make(device=device), device=device)
    assert codes[3] == 0 and codes[5] == 0 and y[5].isnan().all()
    assert grad[:5].isfinite().all() and (grad[4, ::2] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("name", CHOICES)
def test_noise_gets_no_gradient(name):
    noise = torch.zeros(2, 5, requires_grad=True)
    with interpreted():
        made = CHOICES[name](normal(2, 5).requires_grad_(), noise)
    made[0].sum().backward()
    assert noise.grad is None and not made[1].requires_grad
