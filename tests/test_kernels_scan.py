"""Recurrences and the grouped product of experts: kernels against twins, and twins' gradients.

A kernel in Triton's interpreter or on a GPU is compared with its twin in float64 on the same numbers. """
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from interpreter import INTERPRETED, formula, interpreted, kernels_of
from kernels import grouped_linear, min_gru, selective_scan
from models import recurrent

pytestmark = pytest.mark.usefixtures("by_triton")
experts, recurrence = kernels_of("experts"), kernels_of("recurrence")
HALVES = [torch.float16, torch.bfloat16]
# One unit in the last place of each type: a result is rounded once, or cut off, by the interpreter, for bfloat16.
EPS = {torch.float32: 1e-5, torch.float16: 2 ** -10, torch.bfloat16: 2 ** -7, torch.float64: 1e-12}


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run: "cpu", in the interpreter, or "cuda"."""
    if request.param == "cuda":
        yield "cuda"
    elif not INTERPRETED:
        pytest.skip("no Triton, or a GPU: kernels do not run in the interpreter")
    else:
        with interpreted():
            yield "cpu"


def draw(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(got, want):
    """Within one rounding of the type of `got` for each number, and 1e-5 (float64: 1e-12) of the greatest, as sums
    cancel."""
    greatest = max(1e-3, want.abs().max().item()) if want.numel() else 1
    least = (1e-12 if got.dtype == torch.float64 else 1e-5) * greatest
    torch.testing.assert_close(got.cpu().double(), want.cpu().double(), rtol=EPS[got.dtype], atol=least)


def assert_agree(op, twin, inputs, device, used=(0, 1)):
    """Results and gradients of op(*inputs) against the twin in float64; `used`: the results whose gradients flow."""
    ours, theirs = [], []
    for t in inputs:
        moved = t.detach().to(device)
        if t.is_floating_point():
            ours.append(moved.requires_grad_())
            theirs.append(t.detach().double().requires_grad_())
        else:
            ours.append(moved)
            theirs.append(t)
    got, want = op(*ours), twin(*theirs)
    got, want = (tuple(x) if isinstance(x, tuple) else (x,) for x in (got, want))
    loss, truth = 0, 0
    for i, (x, y) in enumerate(zip(got, want)):
        assert x.shape == y.shape
        close(x, y)
        if i in used:
            r = draw(x.shape, seed=9 + i, dtype=x.dtype)[0]
            loss, truth = loss + (x * r.to(device)).sum(), truth + (y * r.double()).sum()
    loss.backward()
    truth.backward()
    for t, x, y in zip(inputs, ours, theirs):
        if t.is_floating_point():
            assert x.grad.dtype == t.dtype and x.grad.shape == t.shape
            close(x.grad, y.grad)
    return got


# --- minGRU ---

def gates(B, T, I, dtype=torch.float32):
    z, v, h = draw((B, T, I), (B, T, I), (B, I))
    return z.sigmoid().to(dtype), v.to(dtype), h.to(dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_recurrences_of_nothing(shape, device):
    B, T, I = shape
    for where in (device, "twin"):
        place = "cpu" if where == "twin" else where
        kind = torch.float64 if where == "twin" else torch.float32
        a, b, h = (t.to(place).requires_grad_() for t in gates(B, T, I, kind))
        out = min_gru(a, b, h)
        assert out.shape == shape and min_gru(a, b).shape == shape
        out.sum().backward()
        assert a.grad.shape == shape
        A, Bm, Cm, D, state = draw((I, 3), (B, T, 3), (B, T, 3), (I,), (B, I, 3), dtype=kind)
        y, last = selective_scan(a, b, *(t.to(place) for t in (A, Bm, Cm, D, state)))
        assert y.shape == shape and last.shape == (B, I, 3)
        if T == 0:
            assert torch.equal(last.cpu(), state)
        (y.sum() + last.sum()).backward()


@pytest.mark.parametrize("shape", [(2, 9, 67), (1, 1, 1), (3, 2, 13)])
def test_min_gru(shape, device):
    z, v, h = draw(shape, shape, (shape[0], shape[2]))
    assert_agree(min_gru, formula(min_gru), (z, v, h), device)


@pytest.mark.parametrize("dtype", HALVES)
def test_min_gru_of_halves(dtype, device):
    z, v = draw((2, 7, 9), (2, 7, 9), dtype=dtype)
    (states,) = assert_agree(min_gru, formula(min_gru), (z, v, *draw((2, 9), seed=3)), device)
    assert states.dtype == torch.float32
    assert_agree(min_gru, formula(min_gru), (z, v, *draw((2, 9), seed=3, dtype=dtype)), device)


@pytest.mark.filterwarnings("ignore:overflow")  # exp(1e4), in the interpreter: numpy says so
def test_min_gru_of_extreme_and_strided_values(device):
    z, v, h = draw((2, 18, 5), (18, 2, 5), (2, 5))
    z, v = z[:, ::2], v.transpose(0, 1)[:, ::2]
    z[0, 0], z[0, 1], z[1, 2], v[0, 3], v[1, 4], v[0, 5], h[1, 2] = 1e4, -1e4, 80, 1e4, -1e4, 0, 1e4
    assert_agree(min_gru, formula(min_gru), (z, v, h), device)
    close(min_gru(z.to(device), v.to(device)), formula(min_gru)(z, v, torch.zeros(2, 5)))


def test_padding_changes_no_state_of_min_gru(device):
    z, v, h = draw((2, 6, 5), (2, 6, 5), (2, 5))
    z[:, 3:] = -torch.inf
    (states,) = assert_agree(min_gru, formula(min_gru), (z, v, h), device)
    assert torch.equal(states[:, 2:3].expand(2, 4, 5), states[:, 2:])


def test_min_gru_is_the_mixers():
    mixer = recurrent.MinGRU(SimpleNamespace(expand=2, n_embd=6, bias=True)).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x, h = draw((2, 7, 6), (2, 12), dtype=torch.float64)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    z, v = mixer.into(x).float().chunk(2, -1)  # as the mixer: float32
    states = min_gru(z.masked_fill(~real.unsqueeze(2), -torch.inf), v, h.float())
    with kernels.using("torch"):
        y, (last,) = mixer.run(x, (h.float(),), real)
    torch.testing.assert_close(mixer.out(states.double()), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[:, -1], last, rtol=1e-5, atol=1e-5)


# --- The selective scan ---

def selective_inputs(B, T, I, N, dtype=torch.float32):
    u, dt, A, Bm, Cm, D, h = draw((B, T, I), (B, T, I), (I, N), (B, T, N), (B, T, N), (I,), (B, I, N))
    return u.to(dtype), F.softplus(dt).to(dtype), -A.exp(), Bm.to(dtype), Cm.to(dtype), D, h


@pytest.mark.parametrize("chunk,shape", [(4, (2, 9, 19, 3)), (4, (1, 8, 5, 16)), (64, (1, 1, 1, 1)),
                                         (64, (2, 10, 16, 5))])
def test_selective_scan(chunk, shape, device, monkeypatch):
    monkeypatch.setattr(recurrence, "CHUNK", chunk)
    assert_agree(selective_scan, formula(selective_scan), selective_inputs(*shape), device)


@pytest.mark.parametrize("used", [(0,), (1,)])
def test_selective_scan_of_which_one_result_is_used(used, device, monkeypatch):
    monkeypatch.setattr(recurrence, "CHUNK", 3)
    inputs = selective_inputs(2, 5, 3, 2)
    if used == (1,):  # C and D have no part in the last state
        def last(op):
            return lambda u, dt, A, Bm, h: op(u, dt, A, Bm, *(t.to(u) for t in (inputs[4], inputs[5])), h)[1]

        assert_agree(last(selective_scan), last(formula(selective_scan)), (*inputs[:4], inputs[6]), device)
    else:
        assert_agree(selective_scan, formula(selective_scan), inputs, device, used)


@pytest.mark.parametrize("dtype", HALVES)
def test_selective_scan_of_halves(dtype, device):
    y, last = assert_agree(selective_scan, formula(selective_scan), selective_inputs(2, 7, 5, 3, dtype), device)
    assert y.dtype == last.dtype == torch.float32
    inputs = [t.to(dtype) for t in selective_inputs(1, 4, 3, 2)]
    assert_agree(selective_scan, formula(selective_scan), inputs, device)


def test_selective_scan_of_extreme_and_strided_values(device):
    u, dt, A, Bm, Cm, D, h = selective_inputs(2, 9, 5, 3)
    dt[0, 1], dt[1, 2], dt[:, 6:], u[0, 3], h[1, 0], A[2] = 1e4, 0, 0, 1e4, 1e4, 0
    joined = torch.cat((Bm, Cm), 2)
    inputs = (u.transpose(1, 2).contiguous().transpose(1, 2), dt, A.t().contiguous().t(), *joined.split(3, 2), D, h)
    assert_agree(selective_scan, formula(selective_scan), inputs, device)
    with torch.no_grad():
        u, *rest = (t.to(device) for t in inputs)
        y, last = selective_scan(u, *rest)
        _, before = selective_scan(*(t[:, :6] if t.shape[:2] == (2, 9) else t for t in (u, *rest)))
        assert torch.equal(last, before)  # dt = 0: padding
        close(selective_scan(u, *rest[:-1])[0], formula(selective_scan)(*inputs[:-1], torch.zeros_like(h))[0])
    r = [t.clone().requires_grad_() for t in (u, *rest)]
    assert torch.equal(selective_scan(*r)[0], y)


def test_selective_scan_is_the_mixers():
    u, dt, A, Bm, Cm, D, h = (t.double() for t in selective_inputs(2, 40, 5, 3))
    y, last = recurrent.selective_scan(dt, u, Bm, Cm, A, h)
    torch.testing.assert_close(selective_scan(u, dt, A, Bm, Cm, D, h), (torch.addcmul(y, u, D), last))


# --- Experts ---

def grouped_inputs(sizes, C, W, dtype=torch.float32):
    x, weight = draw((sum(sizes), C), (len(sizes), W, C), dtype=dtype)
    return x, weight, torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("sizes,C,W", [([5, 0, 70, 0, 15], 37, 67), ([1], 1, 1), ([0, 0, 17], 16, 33),
                                       ([16, 32, 0], 70, 5), ([0, 0], 3, 4), ([1, 1, 1, 1], 0, 3), ([2, 1], 3, 0)])
def test_grouped_linear(sizes, C, W, device):
    assert_agree(grouped_linear, formula(grouped_linear), grouped_inputs(sizes, C, W), device)


@pytest.mark.parametrize("dtype", HALVES)
def test_grouped_linear_of_halves(dtype, device):
    (y,) = assert_agree(grouped_linear, formula(grouped_linear), grouped_inputs([3, 0, 90, 4], 71, 131, dtype), device)
    assert y.dtype == dtype


def test_grouped_linear_of_strided_inputs(device):
    x, weight, offsets = grouped_inputs([4, 3, 0], 6, 5)
    x, weight = x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert_agree(grouped_linear, formula(grouped_linear), (x, weight * 1e4, offsets.repeat_interleave(2)[::2]), device)
    a = x.to(device).requires_grad_()
    grouped_linear(a, weight.to(device), offsets.to(device)).sum().backward()  # an expanded gradient; none of weight
    close(a.grad, torch.cat((weight[0].sum(0).expand(4, 6), weight[1].sum(0).expand(3, 6))))


def test_grouped_linear_under_autocast(device):
    x, weight, offsets = (t.to(device) for t in grouped_inputs([4, 3, 0], 6, 5))
    want = formula(grouped_linear)(x.bfloat16().double(), weight.bfloat16().double(), offsets)
    with torch.autocast(device, torch.bfloat16):
        y = grouped_linear(x.requires_grad_(), weight, offsets)
        twin = formula(grouped_linear)(x, weight, offsets)
    assert y.dtype == twin.dtype == torch.bfloat16
    close(y, want)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_tiles_find_their_experts(device):
    """As many experts as rows, most of them empty: the bound on the number of tiles holds."""
    sizes = [0, 1, 0, 0, 33, 0, 16, 0, 0, 2, 0]
    x, weight, offsets = grouped_inputs(sizes, 2, 3)
    assert_agree(grouped_linear, formula(grouped_linear), (x, weight, offsets), device)


# --- What is chosen, and what is refused ---

def test_twins_elsewhere():
    """A CPU tensor, and float64 where kernels only know float32, take the twin."""
    for op, twin, inputs in cases():
        want = twin(*inputs)
        torch.testing.assert_close(op(*inputs), want, rtol=0, atol=0)
        if INTERPRETED:
            with interpreted():
                torch.testing.assert_close(op(*inputs), want, rtol=0, atol=0)


def cases():
    """(operation, twin, small float64 inputs) of each operation."""
    return [(min_gru, formula(min_gru), gates(2, 5, 3, torch.float64)),
            (selective_scan, formula(selective_scan), [t.double() for t in selective_inputs(2, 5, 3, 2)]),
            (grouped_linear, formula(grouped_linear), grouped_inputs([2, 0, 3], 4, 3, torch.float64))]


@pytest.mark.parametrize("i", range(3))
def test_gradients_of_twins(i):
    _, twin, inputs = cases()[i]
    assert torch.autograd.gradcheck(twin, [t.clone().requires_grad_(t.is_floating_point()) for t in inputs])


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 3, 4)
    A, D, side, h = torch.zeros(4, 5), torch.zeros(4), torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)
    rows, weight, offsets = torch.zeros(6, 4), torch.zeros(2, 3, 4), torch.tensor([0, 1, 6])
    for op, inputs in [(min_gru, (x, x[:, :2])), (min_gru, (x, x, x)), (min_gru, (A, A)),
                       (selective_scan, (x, x[:1], A, side, side, D)), (selective_scan, (x, x, A[:3], side, side, D)),
                       (selective_scan, (x, x, A, side, side, D[:3])), (selective_scan, (x, x, A, side, x, D)),
                       (selective_scan, (x, x, A, side[:, :2], side[:, :2], D)),
                       (selective_scan, (x, x, A, side, side, D, h[:1])),
                       (grouped_linear, (rows[:, :3], weight, offsets)), (grouped_linear, (rows, weight[0], offsets)),
                       (grouped_linear, (rows, weight.half(), offsets)), (grouped_linear, (rows, weight, offsets[:2])),
                       (grouped_linear, (rows, weight, offsets.int())),
                       (grouped_linear, (rows, weight[:0], offsets[:1]))]:
        with pytest.raises(ValueError, match=f"^{op.__name__} needs"):
            op(*inputs)


# --- On a GPU ---

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_kernels_equal_compiled_twins(i):
    """At a layer's size, float32: more chunks, blocks and tiles than the interpreter has time for."""
    inputs = [gates(4, 200, 500), selective_inputs(4, 200, 500, 16),
              grouped_inputs([700, 0, 33, 1300, 64], 300, 500)][i]
    op, twin, _ = cases()[i]
    ours = [t.cuda().requires_grad_(t.is_floating_point()) for t in inputs]
    theirs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in ours]
    got, want = op(*ours), torch.compile(twin)(*theirs)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
    sum(x.square().sum() for x in got).backward()
    sum(y.square().sum() for y in want).backward()
    for p, q in zip(ours, theirs):
        if p.is_floating_point():
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item())
