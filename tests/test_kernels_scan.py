"""What is particular to recurrences and the grouped product of experts: padding, the mixers, autocast.

Their values and gradients beside the formulas': test_kernels.py.
"""
from types import SimpleNamespace

import pytest
import torch

import kernels
from cases import CASES, gates, made, near_scan, of, selective
from interpreter import EVERYWHERE, by_kernel, formula, results
from kernels import grouped_linear, min_gru, selective_scan
from models import recurrent

pytestmark = [pytest.mark.usefixtures("by_triton"), pytest.mark.filterwarnings("ignore:overflow")]  # of exp(1e4)


def close(got, want):
    """As near as the cases."""
    torch.testing.assert_close(got.cpu().double(), want.cpu().double(), **near_scan(None, got, want))


# --- Recurrences ---

@EVERYWHERE
def test_padding_changes_no_state(device):
    """Where z is -inf, or dt is 0."""
    case = CASES["min_gru, padding"]
    (states,), _ = case.assert_agree(case.make(device=device), device=device)
    assert torch.equal(states[:, 2:3].expand(2, 4, 5), states[:, 2:])
    u, dt, A, *rest = CASES["selective_scan, large numbers, padding"].make(device=device)
    with by_kernel(device):
        _, last = selective_scan(u, dt, A, *rest)
        before = selective_scan(u[:, :3], dt[:, :3], A, *(t[:, :3] for t in rest[:2]), *rest[2:])[1]
    assert torch.equal(last, before)


@EVERYWHERE
@pytest.mark.parametrize("case", [gates(2, 9, 5), selective(2, 9, 5, 3)], ids=["min_gru", "selective_scan"])
def test_no_state_is_zeros(case, device):
    """And values do not depend on whether gradients will be asked for."""
    *tensors, h = case.make(device=device)
    with by_kernel(device):
        found, _, _ = results(case.op, tensors, constant=len(tensors))
        asking, _, _ = results(case.op, tensors)
    for y, same, want in zip(found, asking, results(case.twin, [*tensors, torch.zeros_like(h)])[0], strict=True):
        close(y, want)
        assert torch.equal(y, same)


def test_min_gru_is_the_mixers():
    mixer = recurrent.MinGRU(SimpleNamespace(expand=2, n_embd=6, bias=True)).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x, h = made(of(2, 7, 6), of(2, 12), dtype=torch.float64)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    z, v = mixer.into(x).float().chunk(2, -1)  # as the mixer: float32
    states = min_gru(z.masked_fill(~real.unsqueeze(2), -torch.inf), v, h.float())
    with kernels.using("torch"):
        y, (last,) = mixer.run(x, (h.float(),), real)
    torch.testing.assert_close(mixer.out(states.double()), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[:, -1], last, rtol=1e-5, atol=1e-5)


def test_selective_scan_is_the_mixers():
    u, dt, A, Bm, Cm, D, h = (t.double() for t in selective(2, 40, 5, 3).make())
    y, last = recurrent.selective_scan(dt, u, Bm, Cm, A, h)
    torch.testing.assert_close(selective_scan(u, dt, A, Bm, Cm, D, h), (torch.addcmul(y, u, D), last))


# --- Experts ---

@EVERYWHERE
def test_frozen_experts(device):
    """A gradient of the rows alone, one number for all."""
    x, weight, offsets = made(of(7, 6), of(3, 5, 6, scale=1e4), torch.tensor([0, 4, 7, 7]), device=device)
    with by_kernel(device):
        grouped_linear(x.requires_grad_(), weight, offsets).sum().backward()
    close(x.grad, torch.cat((weight[0].sum(0).expand(4, 6), weight[1].sum(0).expand(3, 6))))


@EVERYWHERE
def test_grouped_linear_under_autocast(device):
    x, weight, offsets = made(of(7, 6), of(3, 5, 6), torch.tensor([0, 4, 7, 7]), device=device)
    want = formula(grouped_linear)(x.bfloat16().double(), weight.bfloat16().double(), offsets)
    with torch.autocast(device, torch.bfloat16), by_kernel(device):
        y = grouped_linear(x.requires_grad_(), weight, offsets)
        plain = formula(grouped_linear)(x, weight, offsets)
    assert y.dtype == plain.dtype == torch.bfloat16
    close(y, want)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


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
