"""adamw_step: the twin against nanolab/optim.py, the kernels against the twin in Triton's interpreter."""
import math

import pytest
import torch

from interpreter import formula, interpreted, kernels_of, needs_interpreter
from kernels import adamw_step, using
from nanolab import optim

pytestmark = [pytest.mark.usefixtures("one_thread", "by_triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
adamw, twin = kernels_of("adamw"), formula(adamw_step)
CLOSE = dict(atol=1e-6, rtol=1e-5)
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def tensors(shapes, seed=0, dtype=torch.float32, scale=0.3, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


class Setup:
    """Parameters with their moments; `step` steps them by an operation."""

    def __init__(self, params):
        self.params, self.steps = params, 0
        state = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.means, self.squares = ([torch.zeros_like(p, dtype=state) for p in params] for _ in range(2))

    def step(self, op, grads, **more):
        self.steps += 1
        return op(self.params, grads, self.means, self.squares, self.steps, **{**SETTINGS, **more})

    def all(self):
        return [*self.params, *self.means, *self.squares]


def pair(shapes, dtype=torch.float32, device="cpu"):
    return [Setup(tensors(shapes, dtype=dtype, device=device)) for _ in range(2)]


def assert_same(ours, theirs, tolerance=CLOSE):
    for a, b in zip(ours.all(), theirs.all()):
        torch.testing.assert_close(a, b, **tolerance)


def assert_both(ours, theirs, grads, tolerance=CLOSE, tables=None, **more):
    """A step by the kernels and one by the twin; compares all, and the norms."""
    with interpreted():
        norm = ours.step(adamw_step, grads, tables=tables, **more)
    expected = theirs.step(twin, grads, **more)
    assert_same(ours, theirs, tolerance)
    assert (norm is None) == (expected is None) == (more.get("clip") is None)
    if norm is not None:
        assert norm.shape == () and norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected, atol=0, rtol=1e-5)
    return norm


MORE = pytest.mark.parametrize("more", [dict(zip(("clip", "orthograd"), values)) for values in (
    (), (0.5,), (None, True), (0.5, True))], ids=str)


# --- The twin ---

@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5, math.inf])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_twin_is_optim_after_torchs_clipping(dtype, tolerance, clip, orthograd):
    """20 steps: AdamW, OrthoGrad around it, clip_grad_norm_ before it, decay by tensor, some without a gradient."""
    shapes = [(12, 7), (5,), (1,), (0,), (3, 4, 5)]
    ours = Setup(tensors(shapes, dtype=dtype))
    params = [torch.nn.Parameter(p) for p in tensors(shapes, dtype=dtype)]
    groups = [dict(params=params[:2]), dict(params=params[2:], weight_decay=0.0)]
    theirs = optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    theirs = optim.OrthoGrad(theirs) if orthograd else theirs
    for step in range(20):
        grads = tensors(shapes, 100 + step, dtype)
        grads[4] = None
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        norm = ours.step(adamw_step, grads, clip=clip, orthograd=orthograd, eps=1e-3,
                         weight_decay=[0.1, 0.1, 0, 0, 0])
        expected = None if clip is None else torch.nn.utils.clip_grad_norm_(params, clip)
        with using("torch"):
            theirs.step()
        assert (norm is None) == (clip is None)
        if clip is not None:
            torch.testing.assert_close(norm, expected)
    for p, q in zip(ours.params, params):
        torch.testing.assert_close(p, q.detach(), atol=tolerance, rtol=tolerance)
    assert torch.equal(ours.params[4], tensors(shapes, dtype=dtype)[4])


def test_lists_that_do_not_fit():
    a = Setup(tensors([(3,), (4,)]))
    grads = tensors([(3,), (4,)])
    with pytest.raises(ValueError, match="2 params, but 1 grads"):
        a.step(adamw_step, grads[:1])
    with pytest.raises(ValueError, match="2 params, but 3 weight_decay"):
        a.step(adamw_step, grads, weight_decay=[0, 0, 0])
    with pytest.raises(ValueError, match="of its shape"):
        a.step(adamw_step, grads[::-1])
    a.means[0] = a.means[0].half()
    with pytest.raises(ValueError, match="float32"):
        a.step(adamw_step, grads)
    with pytest.raises(ValueError, match="one device"):
        Setup(tensors([(3,)])).step(adamw_step, [torch.empty(3, device="meta")])


# --- Kernels in the interpreter ---

@pytest.mark.skipif(adamw is None, reason="needs Triton")
def test_chunks_grow_with_the_model():
    """Fewer programs for large models, from 4 Mi numbers on."""
    assert [adamw._chunk(n) // adamw.BLOCK for n in (1, 2 ** 22 - 1, 2 ** 22, 2 ** 27)] == [4, 4, 16, 16]


@needs_interpreter
def test_twenty_steps():
    """One table for all steps; the gradients are written into the same tensors."""
    ours, theirs = pair([(7, 5), (1,), (130,)])
    tables, grads, rows = {}, tensors([(7, 5), (1,), (130,)]), None
    for step in range(20):
        for g, new in zip(grads, tensors([g.shape for g in grads], 100 + step, scale=10.0 ** (step % 3 - 1))):
            g.copy_(new)
        assert_both(ours, theirs, grads, tables=tables, clip=1.0 if step % 5 == 0 else None, orthograd=step == 10)
        rows = tables["rows"] if step == 0 else rows
        assert tables["rows"] is rows


@needs_interpreter
@MORE
def test_every_size_dtype_and_gap(more):
    """Several chunks, a whole one, odd, one and no elements; bfloat16 against float32 in any mixture; None."""
    shapes = [(adamw._chunk(0) + 37,), (3, 7), (1,), (0,), (6,), (5,), (20,)]
    ours, theirs = pair(shapes)
    for setup in (ours, theirs):
        for i in (1, 2, 4):
            setup.params[i] = setup.params[i].bfloat16()
        setup.params[6] = torch.cat([torch.zeros(1), setup.params[6]])[1:]  # no multiple of 16 bytes
    for step in range(2):
        grads = tensors(shapes, 100 + step)
        grads[5] = None
        for i in (1, 6):
            grads[i] = grads[i].bfloat16()
        # the interpreter cuts a bfloat16 off: twice a unit in the last place after two steps
        assert_both(ours, theirs, grads, dict(atol=1e-6, rtol=2 ** -6),
                    weight_decay=[0.1, 0, 0.3, 0, 0.5, 0.1, 0], **more)
        for i in (0, 5, 6):
            torch.testing.assert_close(ours.params[i], theirs.params[i], **CLOSE)
    assert torch.equal(ours.params[5], tensors(shapes)[5])


@needs_interpreter
def test_not_contiguous():
    ours, theirs = pair([(3, 8), (4, 4)])
    for setup in (ours, theirs):
        setup.params[0], setup.means[1] = setup.params[0].T, setup.means[1].T
        setup.means[0], setup.squares[0] = setup.means[0].view(8, 3), setup.squares[0].view(8, 3)
    assert_both(ours, theirs, [tensors([(3, 8)])[0].T, tensors([(8, 4)])[0][::2]])
    assert not ours.params[0].is_contiguous()


@needs_interpreter
def test_tables_follow_what_moves():
    """A new gradient, a gradient that is missing, another decay; and what autograd would miss is told it."""
    ours, theirs = pair([(4,), (9,)])
    tables, version = {}, ours.params[0]._version
    for step, missing in enumerate((None, 1, 0, None)):
        grads = tensors([(4,), (9,)], step)
        if missing is not None:
            grads[missing] = None
        assert_both(ours, theirs, grads, tables=tables, weight_decay=0.1)
    assert_both(ours, theirs, grads, tables=tables, weight_decay=10.0)
    assert ours.params[0]._version > version


@needs_interpreter
@pytest.mark.parametrize("clip", [1e-3, math.inf])
@pytest.mark.parametrize("scale", [0.0, 1e15, 1e37])
def test_clipping_of_nothing_of_much_and_of_too_much(scale, clip):
    """Zero gradients; huge ones; and so huge that the norm is infinite, which leaves 0 of them, or NaN of inf / inf.

    The weights are large, so that the product with them overflows too.
    """
    ours, theirs = pair([(4,), (9,)])
    for p in ours.params + theirs.params:
        p.mul_(1e3)
    grads = tensors([(4,), (9,)], 1, scale=scale)
    with interpreted():
        norm = ours.step(adamw_step, grads, clip=clip, orthograd=True)
    assert torch.equal(norm.isinf(), theirs.step(twin, grads, clip=clip, orthograd=True).isinf())
    tolerance = dict(atol=1e-6, rtol=2e-5, equal_nan=True)
    assert_same(ours, theirs, tolerance)
    assert norm.isinf() == (scale == 1e37) and all(torch.equal(g, h) for g, h in zip(
        grads, tensors([(4,), (9,)], 1, scale=scale)))  # only read


@needs_interpreter
def test_nan_gradients_are_not_hidden_by_clipping():
    ours, theirs = pair([(4,), (9,)])
    grads = tensors([(4,), (9,)])
    grads[0][2] = torch.nan
    with interpreted():
        norm = ours.step(adamw_step, grads, clip=1.0)
    assert norm.isnan() and all(p.isnan().all() for p in ours.params)


@needs_interpreter
def test_orthograd_at_its_edges():
    """Zero weights and one element leave the gradient; one along the weights becomes 0, so that only decay is left."""
    ours, theirs = pair([(6,), (1,), (600,)])
    for setup in (ours, theirs):
        setup.params[0].zero_()
    before = ours.params[2].clone()
    grads = [*tensors([(6,), (1,)], 1), 0.37 * ours.params[2]]  # not quite, by rounding
    assert_both(ours, theirs, grads, orthograd=True)
    torch.testing.assert_close(ours.params[2], before * (1 - 1e-3))
    assert (ours.means[2] == 0).all() and torch.allclose(ours.means[1], 0.1 * grads[1])
    torch.testing.assert_close(ours.means[0], 0.1 * grads[0])


@needs_interpreter
def test_beta1_of_0_and_a_large_eps():
    """A lerp by 1; eps is corrected with the second moment."""
    ours, theirs = pair([(6,)])
    assert_both(ours, theirs, tensors([(6,)], 1), betas=(0.0, 0.5), eps=0.1)
    assert_both(ours, theirs, tensors([(6,)], 2), betas=(0.0, 0.5), eps=0.1)


@needs_interpreter
def test_nothing_to_do():
    """No tensors, or none with a gradient: a norm of 0 where one was asked for."""
    with interpreted():
        assert adamw_step([], [], [], [], 1, **SETTINGS) is None
        assert adamw_step([], [], [], [], 1, clip=1.0, **SETTINGS) == 0
        assert Setup(tensors([(3,), (0,)])).step(adamw_step, [None, torch.zeros(0)], clip=1.0) == 0


# --- On a GPU ---

@pytest.mark.gpu
@MORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_a_gpu(dtype, more):
    """Hundreds of tensors and a large one, against the twin and the compiled twin."""
    shapes = [(3000, 1001), (1,), (0,), *[(i + 1,) for i in range(300)]]
    ours, theirs = pair(shapes, dtype, "cuda")
    compiled = Setup(tensors(shapes[:20], dtype=dtype, device="cuda"))
    alone = Setup(tensors(shapes[:20], dtype=dtype, device="cuda"))
    eager, tables = torch.compile(twin), {}
    tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=1e-5, rtol=2 ** -6)
    for step in range(5):
        grads = tensors(shapes, 100 + step, dtype, device="cuda")
        norm = ours.step(adamw_step, grads, tables=tables, **more)
        expected = theirs.step(twin, grads, **more)
        if norm is not None:
            torch.testing.assert_close(norm, expected, atol=0, rtol=1e-4)
        alone.step(adamw_step, grads[:20], **more)
        compiled.step(eager, grads[:20], **more)
    assert_same(ours, theirs, tolerance)
    assert_same(alone, compiled, tolerance)
