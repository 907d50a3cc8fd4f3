"""Operations on discrete codes: twins against models/discrete.py, kernels in Triton's interpreter."""
import pytest
import torch

import choices
import kernels
from interpreter import INTERPRETED, formula, interpreted, kernels_of
from kernels import gumbel_softmax, nearest_code, reinmax
from models import discrete

pytestmark = [pytest.mark.usefixtures("one_thread", "by_triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
kernels_codes = kernels_of("codes")
gumbel_softmax_reference, reinmax_reference = formula(gumbel_softmax), formula(reinmax)
EXACT = dict(atol=2e-6, rtol=2e-6)
# one unit in the last place: the interpreter cuts bfloat16 off, and half rounds what float32 gives
ROUNDED = {torch.float16: dict(atol=1e-6, rtol=2 ** -10), torch.bfloat16: dict(atol=1e-6, rtol=2 ** -7)}


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gumbel(logits, seed=1):
    generator = torch.Generator(logits.device).manual_seed(seed)
    return discrete.gumbel_like(logits.detach(), generator)


def gradient(op, logits, *more, seed=7):
    """y, codes and the logits' gradient for a random one of y."""
    logits = logits.detach().clone().requires_grad_()
    y, codes = op(logits, *more)
    g = normal(*y.shape, seed=seed, dtype=torch.bfloat16).to(y)  # the same number in every precision
    return y.detach(), codes, torch.autograd.grad(y, logits, g)[0]


def assert_agree(op, twin, logits, *more, tolerance=EXACT):
    """Kernel against twin: value, codes, gradient; of 16-bit logits against the twin's float32."""
    wide = logits.float() if logits.dtype in ROUNDED else logits
    with interpreted():
        y, codes, grad = gradient(op, logits, *more)
    expected, chosen, wanted = gradient(twin, wide, *more)
    assert y.dtype == grad.dtype == logits.dtype and codes.dtype == torch.int64
    assert torch.equal(codes, chosen)
    torch.testing.assert_close(y.float(), expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(grad.float(), wanted, equal_nan=True, **tolerance)
    return y, codes, grad


# --- Twins ---

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
def test_the_twins_are_discrete_choose(estimator, tau, noise):
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


def test_gradcheck_of_the_soft_twin_and_the_hard_ones_gradient():
    """The hard one has the soft one's gradient; ReinMax's is 2 J(p1) g - J(p0) g / 2."""
    logits = normal(4, 5, dtype=torch.float64).requires_grad_()
    noise = gumbel(logits)
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax_reference(x, noise, 0.7, False)[0], logits)
    soft, hard = (gradient(gumbel_softmax_reference, logits, noise, 0.7, way)[2] for way in (False, True))
    torch.testing.assert_close(soft, hard, atol=1e-12, rtol=1e-12)
    y, codes, grad = gradient(reinmax_reference, logits, noise, 1.4)
    g = normal(4, 5, seed=7, dtype=torch.bfloat16).double()
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


# --- Kernels in the interpreter ---

@pytest.fixture
def in_interpreter():
    if not INTERPRETED:
        pytest.skip("no triton, or a GPU that runs the kernels instead")


@pytest.mark.parametrize("N, K, C", [(1, 1, 1), (70, 130, 37), (64, 64, 64), (3, 5, 0)])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
def test_nearest_code(in_interpreter, N, K, C, dtypes):
    """16-bit inputs are exact in float32, so only the order of the sums differs."""
    x, codes = normal(N, C, dtype=dtypes[0]), normal(K, C, seed=1, dtype=dtypes[1])
    with interpreted():
        index = nearest_code(x, codes)
    expected = nearest_code(x, codes)
    away = (x.float()[:, None] - codes.float()).square().sum(-1)
    for found in (index, expected):
        choices.assert_best(found, -away, 4e-5)  # |x|^2 is about 50
    assert index.dtype == torch.int64 and not index.requires_grad


def test_nearest_code_takes_the_first_of_equal_ones(in_interpreter):
    """Within a tile and over tiles, of small integers, whose sums are exact; nothing of nothing."""
    codes = (4 * normal(9, 37)).round().repeat(20, 1)  # 180 rows: three tiles
    x = codes[:40].T.contiguous().T  # not contiguous
    with interpreted():
        index = nearest_code(x, codes)
        none = nearest_code(x[:0], codes)
    assert torch.equal(index, torch.arange(40) % 9) and torch.equal(index, nearest_code(x, codes))
    assert none.shape == (0,)


def test_nearest_code_keeps_small_differences_beside_a_large_x(in_interpreter):
    """|x|^2 has no part in the comparison; a NaN in x still gives a code."""
    x = torch.tensor([[1e4, 0.0], [float("nan"), 0.0]])
    codes = torch.tensor([[0.0, 1.0], [0.001, 1.0]])
    with interpreted():
        index = nearest_code(x, codes)
    assert index.tolist() == [1, 0]


OPS = {"soft": (gumbel_softmax, gumbel_softmax_reference, (0.7, False)),
       "hard": (gumbel_softmax, gumbel_softmax_reference, (0.7, True)),
       "reinmax": (reinmax, reinmax_reference, (1.3,))}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3, 130), (3, 2500)])
@pytest.mark.parametrize("name", OPS)
def test_choices(in_interpreter, name, shape):
    op, twin, more = OPS[name]
    logits = normal(*shape, scale=3)
    _, codes, _ = assert_agree(op, twin, logits, gumbel(logits), *more)
    assert codes.shape == shape[:-1]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", OPS)
def test_choices_of_16_bits_without_noise_and_not_contiguous(in_interpreter, name, dtype):
    op, twin, more = OPS[name]
    assert_agree(op, twin, normal(33, 17, scale=3, dtype=dtype).T, None, *more, tolerance=ROUNDED[dtype])


@pytest.mark.parametrize("name", OPS)
def test_choices_among_extreme_logits(in_interpreter, name):
    """1e4, -inf in some places, first or last, a whole first tile of it, equal logits, and a row of -inf alone."""
    op, twin, more = OPS[name]
    logits = normal(6, 1500)
    logits[0] *= 1e4
    logits[1, :1400] = -torch.inf
    logits[2, 5:] = -torch.inf
    logits[3] = 2.0
    logits[4, ::2] = -torch.inf
    logits[5] = -torch.inf
    y, codes, grad = assert_agree(op, twin, logits, None, *more)
    assert codes[3] == 0 and codes[5] == 0 and y[5].isnan().all()
    assert grad[:5].isfinite().all() and (grad[4, ::2] == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_no_rows_and_what_gets_no_gradient(in_interpreter, name):
    op, _, more = OPS[name]
    with interpreted():
        y, codes, grad = gradient(op, torch.zeros(0, 5), torch.zeros(0, 5), *more)
        noise = torch.zeros(2, 5, requires_grad=True)
        made = op(normal(2, 5).requires_grad_(), noise, *more)
    assert y.shape == grad.shape == (0, 5) and codes.shape == (0,)
    made[0].sum().backward()
    assert noise.grad is None and not made[1].requires_grad


# --- On a GPU ---

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_code_on_a_gpu(dtype):
    x, codes = normal(1000, 200, dtype=dtype).cuda(), normal(700, 200, seed=1, dtype=dtype).cuda()
    index = nearest_code(x, codes)
    away = torch.cdist(x.double(), codes.double()).square()
    with kernels.using("torch"):
        for found in (index, nearest_code(x, codes), torch.compile(nearest_code)(x, codes)):
            choices.assert_best(found, -away, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_choices_on_a_gpu(name, dtype):
    op, twin, more = OPS[name]
    logits = normal(500, 3000, scale=3, dtype=dtype).cuda()
    noise = gumbel(logits.float())
    y, codes, grad = gradient(op, logits, noise, *more)
    for other in (twin, torch.compile(twin)):
        expected, chosen, wanted = gradient(other, logits, noise, *more)
        tolerance = ROUNDED.get(dtype, dict(atol=1e-5, rtol=1e-4))
        assert torch.equal(codes, chosen)
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(grad, wanted, **tolerance)
