"""The scans against a loop and their gradients; minGRU and Mamba against their formulas. About 5 s on two cores."""
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import scan_reference
from model import Positions, Transformer, TransformerConfig
from models import recurrent
from models.recurrent import scan, selective_scan, stretch


def build(mixer, **settings):
    torch.manual_seed(0)
    base = dict(n_layer=1, n_head=2, n_embd=12, block_size=16, positions="none", mixer=mixer, init="xavier")
    return Transformer(TransformerConfig(**{**base, **settings})).double()


def draw(*shapes, seed=0, **kind):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, **kind) for shape in shapes]


@pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 31])
def test_scan_equals_a_loop(T):
    a, b, h = draw((2, T, 3, 4), (2, T, 3, 4), (2, 3, 4))
    a = a.sigmoid()
    torch.testing.assert_close(scan(a, b, h), scan_reference(a, b, h))
    torch.testing.assert_close(scan(a, b), scan_reference(a, b, torch.zeros_like(h)))
    for t in (a, b, h):
        t.requires_grad_()
    assert torch.autograd.gradcheck(scan, (a, b, h))


def inputs(T, seed=0):
    dt, u, b, c, a, h = draw((2, T, 3), (2, T, 3), (2, T, 4), (2, T, 4), (3, 4), (2, 3, 4), seed=seed)
    return [t.requires_grad_() for t in (F.softplus(dt).detach(), u, b, c, -a.exp().detach(), h)]


@pytest.mark.parametrize("T", [1, 5, 33, 70])
def test_selective_scans_agree(T):
    """The loop of a CPU, the parallel scan of a GPU, with gradients."""
    one, two = inputs(T), inputs(T)
    y, last = selective_scan(*one)
    z, end = stretch(*two)
    torch.testing.assert_close((y, last), (z, end))
    (y.square().sum() + last.sin().sum()).backward()
    (z.square().sum() + end.sin().sum()).backward()
    for p, q in zip(one, two):
        torch.testing.assert_close(p.grad, q.grad)
    with torch.no_grad():
        torch.testing.assert_close(selective_scan(*one), (y, last))


def test_selective_scan_gradients(monkeypatch):
    monkeypatch.setattr(recurrent, "STRETCH", 3)
    assert torch.autograd.gradcheck(selective_scan, inputs(7))


def test_mingru_by_its_formula():
    model, (x,) = build("mingru"), draw((1, 9, 12))
    mixer, h = model.blocks[0].mixer, torch.zeros(24, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x, Positions(0, 9))
        for t in range(9):
            gate, v = mixer.into(x[0, t]).split(24)
            z, candidate = torch.sigmoid(gate), torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
            h = (1 - z) * h + z * candidate
            torch.testing.assert_close(found[0, t], mixer.out(h), atol=1e-6, rtol=1e-5)  # states are float32


def test_mamba_by_its_formula():
    model, (x,) = build("mamba", state_dim=3, conv_width=4), draw((1, 9, 12))
    m, h = model.blocks[0].mixer, torch.zeros(24, 3, dtype=torch.float64)
    with torch.no_grad():
        found = m(x, Positions(0, 9))
        u, gate = m.into(x[0]).chunk(2, -1)
        for t in range(9):
            s = m.conv_bias + sum(m.conv[k] * u[t - 3 + k] for k in range(4) if t - 3 + k >= 0)
            s = s * torch.sigmoid(s)
            dt, b, c = m.join(s).split((1, 3, 3))
            dt = torch.log1p(torch.exp(m.dt @ dt + m.dt_bias))
            h = torch.exp(-dt[:, None] * torch.exp(m.a_log)) * h + dt[:, None] * b * s[:, None]
            y = (h @ c + m.skip * s) * gate[t] * torch.sigmoid(gate[t])
            torch.testing.assert_close(found[0, t], m.out(y), atol=1e-5, rtol=1e-4)


def test_mamba_starts_as_the_paper_does():
    mixer = build("mamba", n_embd=64).float().blocks[0].mixer
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1 + 1e-6
    torch.testing.assert_close(mixer.a_log[5], torch.arange(1, 17).float().log())


@pytest.mark.parametrize("mixer", ["mamba", "mingru"])
def test_padding_anywhere(mixer):
    """Padding left, right and in between touches neither the state nor the convolution."""
    model = build(mixer).eval()
    index = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5], [0, 1, -1, 2, -1, 3, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7]])
    x = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for positions in (index[:, :5], index):
            found = model(x[:, :positions.size(1)], positions=positions)
            for row, places in enumerate(positions):
                alone = model(x[row:row + 1, :len(places)][:, places >= 0])[0]
                torch.testing.assert_close(found[row, places >= 0], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba", "mingru"])
def test_state_does_not_grow_and_autocast_keeps_it_in_float32(mixer):
    model = build(mixer).float()
    cache = model.new_cache(2, 4)
    size, x = cache.bytes, torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model(x)
        low = torch.cat([model(part, cache=cache) for part in x.split([11, 1, 28], 1)], 1)
    assert cache.bytes == size and all(t.dtype == torch.float32 for t in cache.layers[0].states)
    torch.testing.assert_close(low, full, atol=0.05, rtol=0.05)
    assert math.isclose(cache.layers[0].hits, 11 + 12)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, x.unsqueeze(-1))[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
