"""The row-wise kernels against their twins: in Triton's interpreter and on a GPU."""
import ast
import contextlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model
import model as mixers
from interpreter import INTERPRETED, interpreted, kernels_of

pytestmark = pytest.mark.usefixtures("one_thread", "by_triton")
rows = kernels_of("rows")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
gpu = pytest.mark.gpu

# One unit in the last place of a result is 2^-10 or 2^-7 of it at most; of bfloat16 two are allowed, as the interpreter
# truncates, and a residual sum one unit off moves what is made of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def linear_cross_entropy(h, weight, targets, bias=None, **how):
    """batched_linear_cross_entropy of one classifier weight (V, C) with bias (V,): h (..., C), targets (...) alike."""
    losses = kernels.batched_linear_cross_entropy(
        h.reshape(1, -1, h.size(-1)), weight[None, None], targets.reshape(1, -1, 1),
        None if bias is None else bias[None, None], **how)
    return losses.view(targets.shape)


def linear_cross_entropy_reference(h, weight, targets, bias=None, ignore_index=-1):
    """The same with all logits."""
    logits = F.linear(h, weight, bias).flatten(0, -2)
    return kernels.cross_entropy_reference(logits, targets.flatten(), ignore_index).view(targets.shape)


def batched_linear_cross_entropy_reference(h, weights, targets, biases):
    """batched_linear_cross_entropy with all logits."""
    logits = torch.einsum("gnc,gkvc->gnkv", h, weights.expand(len(h), -1, -1, -1)) + biases.unsqueeze(1)
    targets = targets.expand(logits.shape[:3])
    return kernels.cross_entropy_reference(logits.flatten(0, 2), targets.flatten()).view(targets.shape)


def values(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    """Normal numbers of this shape, the same on every device."""
    return (torch.randn(shape) * scale).to(device, dtype)


def targets(*shape, V, device="cpu", ignored=()):
    """int64 labels below V, some places -1."""
    labels = torch.randint(0, V, shape)
    for place in ignored:
        labels[place] = -1
    return labels.to(device)


def run(function, given, upstream=None):
    """(outputs, gradients of all floating given, upstream gradients), the latter drawn where there are none."""
    given = [t.detach().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in given]
    out = function(*given)
    out = out if isinstance(out, tuple) else (out,)
    if upstream is None:
        upstream = [torch.randn(t.shape).to(t.device, t.dtype) for t in out]
    torch.autograd.backward(out, upstream)
    found = [t.grad for t in given if torch.is_tensor(t) and t.is_floating_point()]
    assert all(t is not None for t in found)
    return out, found, upstream


def assert_agree(function, twin, given, tolerance=1e-5):
    """Asserts that function and twin give the same outputs and gradients, of the same types; and that it is a kernel.

    On the CPU in the interpreter. All plain PyTorch in kernels.py begins with `exactly`: no kernel may need it.
    """
    where = contextlib.nullcontext if given[0].is_cuda else interpreted
    with where(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "exactly", None)
        out, found, upstream = run(function, given)
    wanted, gradients, _ = run(twin, given, upstream)
    for mine, other in zip([*out, *found], [*wanted, *gradients], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def tables(B, T, D, device="cpu"):
    """cos and sin (B, T, 1, D) of places further and further on in each row, as Positions has them."""
    rope = mixers.Rope(D, 100.0, 4 * B + T)
    places = torch.arange(T) + 4 * torch.arange(B)[:, None]
    return tuple(t[places].unsqueeze(2).to(device) for t in rope(4 * B + T))


def norm_case(name, n, C, gain=True, bias=True, residual=True):
    """(function, twin, maker of tensors) of one norm."""
    def make(dtype, device):
        def some(*shape):
            return values(*shape, dtype=dtype, device=device)
        return [some(*n, C), *([some(C)] if gain else []), *([some(C)] if bias else []),
                *([some(*n, C)] if residual else [])]

    def call(function):
        def with_names(x, *rest):
            rest = list(rest)
            named = {key: rest.pop(0) for key, there in (("gain", gain), ("bias", bias), ("residual", residual))
                     if there}
            return function(x, **named)
        return with_names
    return call(getattr(kernels, name)), call(getattr(kernels, f"{name}_reference")), make


def rotary_case(B, T, H, D, n_tables):
    """rotary, with a table for every row or one for all."""
    def make(dtype, device):
        return [values(B, T, H, D, dtype=dtype, device=device)]

    def call(function):
        return lambda x: function(x, *tables(n_tables, T, D, x.device))
    return call(kernels.rotary), call(kernels.rotary_reference), make


def act_case(kind, *shape):
    """gated of one kind, or a plain activation."""
    if kind in kernels.GLU:
        return (lambda x: kernels.gated(kind, x), lambda x: kernels.gated_reference(kind, x),
                lambda dtype, device: [values(*shape, dtype=dtype, device=device, scale=2)])
    return (getattr(kernels, kind), getattr(kernels, f"{kind}_reference"),
            lambda dtype, device: [values(*shape, dtype=dtype, device=device, scale=2)])


def entropy_case(N, V, ignored=()):
    """cross_entropy of N rows."""
    return (kernels.cross_entropy, kernels.cross_entropy_reference,
            lambda dtype, device: [values(N, V, dtype=dtype, device=device, scale=3),
                                   targets(N, V=V, device=device, ignored=ignored)])


def linear_case(N, C, V, chunk, ignored=()):
    """linear_cross_entropy of N rows, with a bias."""
    def make(dtype, device):
        return [values(N, C, dtype=dtype, device=device), values(V, C, dtype=dtype, device=device, scale=0.5),
                targets(N, V=V, device=device, ignored=ignored), values(V, dtype=dtype, device=device)]
    return (lambda *given: linear_cross_entropy(*given, chunk=chunk), linear_cross_entropy_reference,
            make)


def batched_case(G, groups, N, C, K, V, chunk):
    """batched_linear_cross_entropy of G groups of rows with `groups` of classifiers."""
    def make(dtype, device):
        return [values(G, N, C, dtype=dtype, device=device),
                values(groups, K, V, C, dtype=dtype, device=device, scale=0.5),
                targets(G, N, K, V=V, device=device, ignored=[(0, 1)]),
                values(groups, K, V, dtype=dtype, device=device)]
    return (lambda *given: kernels.batched_linear_cross_entropy(*given, chunk=chunk),
            batched_linear_cross_entropy_reference, make)


CASES = {
    "rms": norm_case("rms_norm", (5, 3), 37, bias=False),
    "rms, plain": norm_case("rms_norm", (5, 3), 37, gain=False, bias=False, residual=False),
    "rms, one row": norm_case("rms_norm", (1,), 128, bias=False, residual=False),
    "rms, one feature": norm_case("rms_norm", (5,), 1, bias=False),
    "layer": norm_case("layer_norm", (2, 4), 37),
    "layer, plain": norm_case("layer_norm", (9,), 64, gain=False, bias=False, residual=False),
    "layer, gain": norm_case("layer_norm", (9,), 64, bias=False),
    "layer, bias": norm_case("layer_norm", (9,), 64, gain=False, residual=False),
    "layer, wide": norm_case("layer_norm", (3,), 2049),
    "rotary": rotary_case(2, 5, 3, 16, n_tables=2),
    "rotary, one table": rotary_case(3, 7, 5, 10, n_tables=1),
    "rotary, one pair": rotary_case(1, 1, 1, 2, n_tables=1),
    "rotary, several tiles": rotary_case(2, 9, 3, 64, n_tables=2),
    **{kind: act_case(kind, 3, 5, 78) for kind in kernels.GLU},
    "swiglu, two blocks": act_case("swiglu", 3, 2 * 1030),
    "gelu": act_case("gelu", 3, 411),
    "relu2": act_case("relu2", 3, 411),
    "relu2, a scalar": act_case("relu2"),
    "cross-entropy": entropy_case(9, 77, ignored=[3, 8]),
    "cross-entropy, two blocks": entropy_case(5, 4099, ignored=[0]),
    "cross-entropy, one class": entropy_case(2, 1),
    "cross-entropy, one row": entropy_case(1, 130),
    "linear": linear_case(11, 6, 77, None, ignored=[3]),
    "linear, row by row": linear_case(5, 6, 9, 1),
    "linear, chunks of 4": linear_case(11, 6, 77, 4, ignored=[3, 10]),
    "batched": batched_case(2, 2, 7, 6, 3, 20, 3),
    "batched, one group": batched_case(2, 1, 7, 6, 3, 20, None),
}


# --- In the interpreter ---

@needs_interpreter
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_kernel_and_twin_agree(name, dtype):
    """Outputs and gradients, odd sizes."""
    torch.manual_seed(0)
    function, twin, make = CASES[name]
    assert_agree(function, twin, make(dtype, "cpu"), TOLERANCE[dtype])


@needs_interpreter
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_program_sums_over_many_rows(name, monkeypatch):
    """More tiles than programs: each goes on with the next of its own."""
    monkeypatch.setattr(rows, "PROGRAMS", 2)
    torch.manual_seed(0)
    bias = name == "layer_norm"
    function, twin, make = norm_case(name, (11,), 1025, bias=bias)
    assert rows.norm_blocks(1025)[0] == 1
    assert_agree(function, twin, make(torch.float32, "cpu"))
    function, twin, make = norm_case(name, (131,), 60, bias=bias)
    assert 131 > 2 * 2 * rows.norm_blocks(60)[0]
    assert_agree(function, twin, make(torch.float32, "cpu"))


@needs_interpreter
def test_rows_need_not_lie_side_by_side():
    """Views of wider tensors, transposed ones, and gradients that are one number for all."""
    torch.manual_seed(0)
    wide, turned, one = values(5, 3, 50), values(37, 4, 3).permute(2, 1, 0), values(1, 1, 37).expand(3, 4, 37)
    for x in (wide[..., 7:44], turned, one):
        for residual in (wide[..., 7:44], turned, one):
            if residual.shape == x.shape:
                assert_agree(kernels.layer_norm, kernels.layer_norm_reference,
                             [x, values(37), values(74)[::2], 1e-5, residual])
                assert_agree(lambda x: kernels.layer_norm(x).sum(),
                             lambda x: kernels.layer_norm_reference(x).sum(), [x])
    for x in (wide[..., 8:44], turned[..., 1:]):
        assert_agree(lambda x: kernels.gated("geglu", x), lambda x: kernels.gated_reference("geglu", x), [x])
        assert_agree(lambda x: kernels.gated("geglu", x).sum(),
                     lambda x: kernels.gated_reference("geglu", x).sum(), [x])
        assert_agree(kernels.gelu, kernels.gelu_reference, [x])
        assert_agree(lambda x: kernels.gelu(x).sum(), lambda x: kernels.gelu_reference(x).sum(), [x])
    cos, sin = tables(2, 5, 6)
    qkv = values(2, 5, 3 * 24)
    for x in (qkv[..., 24:48].view(2, 5, 4, 6), values(2, 4, 5, 6).transpose(1, 2),
              values(6, 2, 4, 5).permute(1, 3, 2, 0), values(1, 5, 1, 6).expand(2, 5, 4, 6)):
        assert_agree(lambda x: kernels.rotary(x, cos, sin), lambda x: kernels.rotary_reference(x, cos, sin), [x])
        assert_agree(lambda x: kernels.rotary(x, cos.transpose(1, 3).contiguous().transpose(1, 3), sin).sum(),
                     lambda x: kernels.rotary_reference(x, cos, sin).sum(), [x])
    labels = targets(5, 2, V=37)[:, 0]
    for x in (values(5, 50)[:, 7:44], values(37, 5).t(), values(1, 37).expand(5, 37)):
        assert_agree(kernels.cross_entropy, kernels.cross_entropy_reference, [x, labels])
        assert_agree(lambda x: kernels.cross_entropy(x, labels).sum(),
                     lambda x: kernels.cross_entropy_reference(x, labels).sum(), [x])
    assert_agree(linear_cross_entropy, linear_cross_entropy_reference,
                 [values(8, 5).t(), values(8, 37).t(), labels])


@needs_interpreter
def test_gradients_need_not_lie_side_by_side():
    """Those that come in are slices of a wider one: a concatenation's."""
    torch.manual_seed(0)
    for name in ("norm", "gated", "rotary", "gelu"):
        def function(x, twin=""):
            if name == "norm":
                return torch.cat(getattr(kernels, f"layer_norm{twin}")(x, residual=x), -1)
            if name == "rotary":
                y = getattr(kernels, f"rotary{twin}")(x.view(1, 3, 2, 6), *tables(1, 3, 6)).reshape(3, 12)
            else:
                given = (x,) if name == "gelu" else ("reglu", x)
                y = getattr(kernels, name + twin)(*given)
            return torch.cat((y, x), -1)
        assert_agree(function, lambda x: function(x, "_reference"), [values(3, 12)])


@needs_interpreter
def test_only_one_output_of_a_norm_is_used():
    """The other's gradient is not there, and is 0."""
    torch.manual_seed(0)
    for which in range(2):
        x, residual = values(3, 10).requires_grad_(), values(3, 10).requires_grad_()
        gain = values(10).requires_grad_()
        with interpreted():
            kernels.rms_norm(x, gain, residual=residual)[which].square().sum().backward()
        found = x.grad, residual.grad, gain.grad
        x.grad = residual.grad = gain.grad = None
        kernels.rms_norm_reference(x, gain, residual=residual)[which].square().sum().backward()
        torch.testing.assert_close(found, (x.grad, residual.grad, gain.grad))


@needs_interpreter
def test_the_norm_is_of_the_rounded_sum():
    """What float16 loses beside 2048 is not in the norm either, as the backward pass sees only the sum that is kept."""
    x, residual = torch.full((2, 10), 2048.0).half(), torch.linspace(0.1, 0.9, 20).view(2, 10).half()
    with interpreted():
        y, s = kernels.layer_norm(x, residual=residual)
    assert s.eq(2048).all() and y.eq(0).all()


@needs_interpreter
def test_norm_of_two_types():
    """A half-precision branch into a float32 stream, float32 gain: gradients have their inputs' types."""
    torch.manual_seed(0)
    for x, residual in ((torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        given = [values(3, 10, dtype=x), values(10), values(10), 1e-5, values(3, 10, dtype=residual)]
        assert_agree(kernels.layer_norm, kernels.layer_norm_reference, given, TOLERANCE[torch.bfloat16])
        with interpreted():
            assert kernels.layer_norm(*given)[0].dtype == torch.float32
    assert_agree(kernels.rms_norm, kernels.rms_norm_reference, [values(3, 10, dtype=torch.float16), values(10)], 2e-3)


@needs_interpreter
def test_norms_of_large_equal_and_no_values():
    """1e4 overflows float16 when squared; equal values have no variance; eps counts."""
    torch.manual_seed(0)
    for dtype, tolerance in TOLERANCE.items():
        x = values(3, 20, dtype=dtype)
        x[0], x[1, 3], x[2] = 0, 1e4, -1e4
        assert_agree(kernels.rms_norm, kernels.rms_norm_reference, [x, values(20, dtype=dtype), 1e-3], tolerance)
    x = torch.tensor([[0.5] * 20, [4.0] * 20, [0.25] * 20])
    assert_agree(kernels.layer_norm, kernels.layer_norm_reference, [x, values(20), values(20), 1e-2])
    assert_agree(kernels.layer_norm, kernels.layer_norm_reference,
                 [x + values(3, 20) * 1e-2, values(20), values(20), 1e-4], 1e-3)  # gradients of a hundred


@needs_interpreter
@pytest.mark.parametrize("kind", [*kernels.GLU, "gelu", "relu2"])
def test_activations_of_large_numbers(kind):
    """1e4 either way, 0, infinities and nan: as the twin, without nan of their own."""
    function, twin, _ = act_case(kind)
    x = torch.tensor([1e4, -1e4, 90.0, -90.0, 0.0, -0.0, 1e-30, math.nan])
    x = torch.cat((x, torch.tensor([2.0, -3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0]))).view(1, 16)
    assert_agree(function, twin, [x], 1e-6)


@needs_interpreter
def test_cross_entropy_of_infinite_logits():
    """Classes that cannot be; a row where nothing can; one whose target cannot; ignored rows of nan."""
    torch.manual_seed(0)
    logits = values(8, 4100, scale=1e4)
    logits[0, :4096] = -math.inf  # a whole block
    logits[1, 1:] = -math.inf
    logits[2] = -math.inf
    logits[3, 5] = -math.inf
    logits[4] = math.nan
    logits[5], logits[6, 7] = math.inf, math.nan
    assert_agree(kernels.cross_entropy, kernels.cross_entropy_reference,
                 [logits, torch.tensor([4098, 0, 3, 5, 1, 1, 1, 4099])])
    labels = torch.tensor([-100, 0, -100, -100, -100, -100, -100, 7])
    x = logits.clone().requires_grad_()
    with interpreted():
        loss = kernels.cross_entropy(x, labels, ignore_index=-100)
        loss.sum().backward()
    assert loss[labels == -100].eq(0).all() and x.grad[labels == -100].eq(0).all()


@needs_interpreter
def test_a_later_block_has_the_maximum():
    """Then the sum so far is made smaller: none of the two is lost beside the other."""
    x = torch.ones(2, 4100)
    x[0, 4096:] = 4
    assert_agree(kernels.cross_entropy, kernels.cross_entropy_reference, [x, torch.tensor([0, 4099])])


@needs_interpreter
def test_an_ignored_class_may_be_a_real_one():
    """ignore_index inside the vocabulary."""
    torch.manual_seed(0)
    assert_agree(lambda x, t: kernels.cross_entropy(x, t, ignore_index=1),
                 lambda x, t: kernels.cross_entropy_reference(x, t, ignore_index=1),
                 [values(4, 9), torch.tensor([0, 1, 1, 2])])
    assert_agree(lambda h, w, t: linear_cross_entropy(h, w, t, ignore_index=1),
                 lambda h, w, t: linear_cross_entropy_reference(h, w, t, ignore_index=1),
                 [values(4, 5), values(9, 5), torch.tensor([0, 1, 1, 2])])


@needs_interpreter
def test_targets_out_of_range_cost_nan():
    """Nothing beyond the row is read."""
    with interpreted():
        loss = kernels.cross_entropy(torch.zeros(3, 9), torch.tensor([9, -2, 8]))
    assert loss.isnan().tolist() == [True, True, False]


@needs_interpreter
def test_too_wide_rows_and_double_precision_take_the_twin(monkeypatch):
    """Kernels hold a row in one block, and count in float32."""
    torch.manual_seed(0)
    x = values(2, 20)
    with interpreted():
        torch.testing.assert_close(kernels.gelu(x.double()), F.gelu(x.double()), rtol=1e-12, atol=0)
        monkeypatch.setattr(rows, "norm_forward", None)
        with pytest.raises(TypeError):
            kernels.rms_norm(x)
        monkeypatch.setattr(kernels, "WIDEST_ROW", 19)
        torch.testing.assert_close(kernels.rms_norm(x), F.rms_norm(x, (20,), eps=1e-6))
        torch.testing.assert_close(kernels.layer_norm(x), F.layer_norm(x, (20,)))


# --- The twins ---

def double(name):
    """(function, twin, float64 tensors) of a case."""
    torch.manual_seed(0)
    function, twin, make = CASES[name]
    return function, twin, [t.requires_grad_() if t.is_floating_point() else t for t in make(torch.float64, "cpu")]


SMALL = [name for name in CASES if "tile" not in name and "wide" not in name and "blocks" not in name]


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_the_twin(name):
    """Against differences, in float64; and the public function, which is the twin there or computes by chunks."""
    function, twin, given = double(name)
    assert torch.autograd.gradcheck(twin, given, fast_mode=True)
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    for mine, other in zip(*(torch.utils._pytree.tree_leaves(f(*given)) for f in (function, twin)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_the_public_function_without_a_kernel(name, dtype):
    """On the CPU: the twin, or by chunks."""
    torch.manual_seed(0)
    function, twin, make = CASES[name]
    given = make(dtype, "cpu")
    out, found, upstream = run(function, given)
    wanted, gradients, _ = run(twin, given, upstream)
    for mine, other in zip([*out, *found], [*wanted, *gradients], strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_references_are_what_pytorch_computes():
    """Each operation by "torch" beside its reference."""
    torch.manual_seed(0)
    x, gain, bias = values(3, 5, 24), values(24), values(24)
    with kernels.using("torch"):
        for kind, mine in (("rms", kernels.rms_norm_reference(x, gain)),
                           ("layer", kernels.layer_norm_reference(x, gain, bias))):
            norm = mixers.Norm(kind, 24, True, True)
            norm.load_state_dict({"gain": gain, **({"bias": bias} if kind == "layer" else {})})
            torch.testing.assert_close(mine, norm(x), rtol=1e-6, atol=1e-6)
        y, s = kernels.rms_norm_reference(x, residual=2 * x)
        torch.testing.assert_close((y, s), (kernels.rms_norm(3 * x), 3 * x), rtol=1e-6, atol=1e-6)
        heads, (cos, sin) = x.view(3, 5, 4, 6), tables(3, 5, 6)
        torch.testing.assert_close(kernels.rotary_reference(heads, cos, sin), kernels.rotary(heads, cos, sin),
                                   rtol=1e-6, atol=1e-6)
        for kind in kernels.GLU:
            torch.testing.assert_close(kernels.gated_reference(kind, x), kernels.activate(kind, x))
        for kind in ("gelu", "relu2"):
            torch.testing.assert_close(getattr(kernels, f"{kind}_reference")(x), kernels.activate(kind, x))


def test_no_kernel_takes_tuples_apart_within_a_tuple():
    """Triton 3.6 cannot read `(a, b), c = ...` in a kernel; 3.9 can, so the compiler would not say it everywhere."""
    def is_kernel(node):
        return isinstance(node, ast.FunctionDef) and "jit" in map(ast.unparse, node.decorator_list)
    files = sorted(Path(kernels.__file__).parent.glob("fused/*.py"))
    found = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if is_kernel(node)]
    assert len(found) > 30
    for kernel in found:
        for node in ast.walk(kernel):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                assert not any(isinstance(part, ast.Tuple) for part in getattr(target, "elts", ())), ast.unparse(node)


def test_turning_back():
    """RoPE's turn is undone by its gradient."""
    torch.manual_seed(0)
    x, (cos, sin) = values(2, 5, 3, 8).requires_grad_(), tables(2, 5, 8)
    y = kernels.rotary(x, cos, sin)
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, x.detach())


def test_empty_tensors():
    """Nothing in, nothing out, with gradients; in the interpreter too where there is one."""
    def check():
        for name, shape in (("rms_norm", (0, 7)), ("layer_norm", (3, 0, 7)), ("gelu", (0,)), ("relu2", (2, 0))):
            x = torch.empty(shape, requires_grad=True)
            y = getattr(kernels, name)(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == shape
        y, s = kernels.rms_norm(torch.empty(0, 7), torch.ones(7), residual=torch.empty(0, 7))
        assert y.shape == s.shape == (0, 7)
        assert kernels.gated("glu", torch.empty(0, 8)).shape == (0, 4)
        assert kernels.gated("glu", torch.empty(3, 0)).shape == (3, 0)
        assert kernels.rotary(torch.empty(2, 0, 3, 4), *[torch.empty(1, 0, 1, 4)] * 2).shape == (2, 0, 3, 4)
        none = torch.empty(0, dtype=torch.int64)
        assert kernels.cross_entropy(torch.empty(0, 9), none).shape == (0,)
        h, weight = torch.empty(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
        linear_cross_entropy(h, weight, none).sum().backward()
        assert h.grad.shape == (0, 4) and weight.grad.eq(0).all()
        assert kernels.batched_linear_cross_entropy(torch.empty(2, 0, 4), torch.empty(2, 3, 9, 4),
                                                    none.view(0, 3)).shape == (2, 0, 3)
    check()
    if INTERPRETED:
        with interpreted():
            check()


def test_arguments_that_do_not_go_together():
    """One sentence each."""
    x, labels = torch.zeros(2, 5, 4), torch.zeros(2, dtype=torch.int64)
    wrong = [
        ("residual", lambda: kernels.rms_norm(x, residual=x[:1])),
        ("gain", lambda: kernels.layer_norm(x, torch.ones(5))),
        ("bias", lambda: kernels.layer_norm(x, torch.ones(4), torch.ones(1))),
        ("even", lambda: kernels.rotary(torch.zeros(1, 2, 1, 3), *[torch.zeros(1, 2, 1, 3)] * 2)),
        ("tables", lambda: kernels.rotary(torch.zeros(1, 2, 1, 4), *[torch.zeros(2, 4)] * 2)),
        ("tables", lambda: kernels.rotary(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 1, 4))),
        ("kind", lambda: kernels.gated("gelu", x)),
        ("even", lambda: kernels.gated("glu", torch.zeros(3))),
        ("int64", lambda: kernels.cross_entropy(torch.zeros(2, 3), labels.int())),
        ("targets", lambda: kernels.cross_entropy(torch.zeros(3, 3), labels)),
        ("go together", lambda: linear_cross_entropy(torch.zeros(2, 3), torch.zeros(9, 4), labels)),
        ("go together", lambda: linear_cross_entropy(torch.zeros(2, 3), torch.zeros(9, 3), labels, x[0, 0])),
        ("targets", lambda: linear_cross_entropy(x, torch.zeros(9, 4), labels)),
        ("chunk", lambda: linear_cross_entropy(torch.zeros(2, 3), torch.zeros(9, 3), labels, chunk=0)),
        ("float64", lambda: linear_cross_entropy(torch.zeros(2, 3), torch.zeros(9, 3).double(), labels)),
        ("go together", lambda: kernels.batched_linear_cross_entropy(x, torch.zeros(3, 1, 9, 4), labels)),
        ("go together", lambda: kernels.batched_linear_cross_entropy(x, torch.zeros(2, 0, 9, 4), labels)),
        ("targets", lambda: kernels.batched_linear_cross_entropy(x, torch.zeros(1, 3, 9, 4), labels.view(2, 1))),
    ]
    for word, call in wrong:
        with pytest.raises(ValueError, match=word):
            call()


# --- Cross-entropy of a linear layer ---

class Largest(TorchDispatchMode):
    """The most numbers that one result of any operation had."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_logits_are_never_there(dtype):
    """Forward and backward make no tensor larger than the larger of h and weight; the twin makes N V numbers."""
    torch.manual_seed(0)
    N, C, V = 512, 16, 2048
    given = [values(N, C, dtype=dtype), values(V, C, dtype=dtype), targets(N, V=V), values(V, dtype=dtype)]
    with Largest() as seen:
        run(linear_cross_entropy, given)
    assert seen.numel == V * C == N * V // 32
    with Largest() as seen:
        run(linear_cross_entropy_reference, given)
    assert seen.numel == N * V
    given = [values(2, N, C, dtype=dtype), values(2, 2, V // 2, C, dtype=dtype), targets(N, 2, V=V // 2)]
    with Largest() as seen:
        run(kernels.batched_linear_cross_entropy, given)
    assert seen.numel == 2 * V * C == 2 * N * V // 32


def test_rows_at_once():
    """The larger of h and the classifiers bounds the logits; at least one row, never more than there are."""
    assert kernels.chunk_rows(8192, 512, 50257) == 512
    assert kernels.chunk_rows(100000, 512, 50257) == 512 * 100000 // 50257
    assert kernels.chunk_rows(8192, 512, 256) == 8192
    assert kernels.chunk_rows(4, 2, 1) == 4
    assert kernels.chunk_rows(3, 0, 10) == 1
    for N, C, V in ((5, 3, 100), (100, 3, 7), (64, 8, 64)):
        assert kernels.chunk_rows(N, C, V) * V <= max(N, V) * C or kernels.chunk_rows(N, C, V) == 1


def test_only_what_is_asked_for_is_computed():
    """Frozen inputs get no gradient, and others the same as with all."""
    torch.manual_seed(0)
    given = [values(7, 5), values(9, 5), targets(7, V=9), values(9)]
    _, whole, upstream = run(lambda h, w, t, b: linear_cross_entropy(h, w, t, b, chunk=3), given)
    floating = [0, 1, 3]
    for kept, gradient in zip(floating, whole):
        some = [t.clone().requires_grad_() if i == kept else t for i, t in enumerate(given)]
        linear_cross_entropy(*some, chunk=3).backward(upstream[0])
        assert torch.equal(some[kept].grad, gradient)
        assert all(some[i].grad is None for i in floating if i != kept)


def test_weight_gradient_is_summed_in_float32():
    """Of many small chunks in bfloat16: adding them up in bfloat16 would lose a part of the later ones."""
    torch.manual_seed(0)
    h, weight, labels = values(512, 8).abs(), values(4, 8), targets(512, V=4)
    low = [h.bfloat16(), weight.bfloat16(), labels]
    exact = run(linear_cross_entropy_reference, [t.double() if t.is_floating_point() else t for t in low],
                [torch.ones(512).double()])[1][1]
    mine = run(lambda *given: linear_cross_entropy(*given, chunk=1), low, [torch.ones(512)])[1][1]
    assert (mine - exact).norm() / exact.norm() < 4e-3  # 2^-8: one rounding


@pytest.mark.parametrize("inner", [False, True])
def test_autocast(inner):
    """Products are bfloat16 in both passes, wherever backward is called; gradients have the inputs' type."""
    torch.manual_seed(0)
    h, weight, bias = (values(*s).requires_grad_() for s in ((7, 5), (9, 5), (9,)))
    labels = targets(7, V=9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, weight, labels, bias, chunk=3)
        wanted = linear_cross_entropy_reference(h, weight, labels, bias)
        if inner:
            loss.sum().backward()
    if not inner:
        loss.sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    mine = [t.grad.clone() for t in (h, weight, bias)]
    for t in (h, weight, bias):
        t.grad = None
    wanted.sum().backward()
    for t, gradient in zip((h, weight, bias), mine):
        torch.testing.assert_close(gradient, t.grad, rtol=1.6e-2, atol=1.6e-2)
    exact = [t.detach().clone().requires_grad_() for t in (h, weight, bias)]
    assert not torch.equal(linear_cross_entropy(exact[0], exact[1], labels, exact[2]), loss)


def test_losses_of_a_model():
    """Lists of classifiers of some layers, some targets each: as Transformer.losses computes them."""
    torch.manual_seed(0)
    A, N, C, K, V = 3, 6, 8, 2, 11
    h, labels = values(A, N, C), targets(N, K, V=V, ignored=[(2, 1)])
    for groups in (A, 1):
        heads = [values(V, C).requires_grad_() for _ in range(groups * K)]
        biases = [values(V).requires_grad_() for _ in range(groups * K)]
        logits = model.batched_linear(h, heads, groups, biases).view(A * N * K, V)
        wanted = F.cross_entropy(logits, labels.expand(A, N, K).reshape(-1), reduction="none", ignore_index=-1)
        mine = kernels.batched_linear_cross_entropy(h, [heads[g * K:g * K + K] for g in range(groups)], labels,
                                                    [biases[g * K:g * K + K] for g in range(groups)], chunk=4)
        torch.testing.assert_close(mine, wanted.view(A, N, K))
        upstream = torch.randn(A, N, K)
        torch.testing.assert_close(torch.autograd.grad(mine, heads + biases, upstream),
                                   torch.autograd.grad(wanted.view(A, N, K), heads + biases, upstream))
    one = values(V, C)
    assert kernels.stacked([[one]]).data_ptr() == one.data_ptr()  # a single one is not copied
    torch.testing.assert_close(linear_cross_entropy(h, one, labels[:, 0].expand(A, N)),
                               linear_cross_entropy_reference(h, one, labels[:, 0].expand(A, N)))


def test_losses_may_be_changed_in_place():
    """What the backward pass needs is kept elsewhere."""
    torch.manual_seed(0)
    h, weight, labels = values(7, 5).requires_grad_(), values(9, 5), targets(7, V=9)
    loss = linear_cross_entropy(h, weight, labels)
    loss.mul_(2).sum().backward()
    wanted, = torch.autograd.grad(2 * linear_cross_entropy_reference(h, weight, labels).sum(), h)
    torch.testing.assert_close(h.grad, wanted)


# --- On a GPU ---

@gpu
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernel_and_twin_agree(name, dtype):
    """Outputs and gradients on the device, and the twin compiled."""
    torch.manual_seed(0)
    function, twin, make = CASES[name]
    given = make(dtype, "cuda")
    assert_agree(function, twin, given, TOLERANCE[dtype])
    assert_agree(function, torch.compile(twin), given, TOLERANCE[dtype])


@gpu
@pytest.mark.parametrize("case", [norm_case("rms_norm", (4099,), 8192, bias=False),
                                  norm_case("layer_norm", (4099,), 513),
                                  rotary_case(4, 512, 12, 64, n_tables=1), act_case("swiglu", 4099, 2 * 2730),
                                  entropy_case(2049, 50257), linear_case(2048, 64, 50257, None)],
                         ids=["rms", "layer", "rotary", "swiglu", "cross-entropy", "linear"])
def test_gpu_of_a_models_size(case):
    """More tiles than programs, more blocks than one; sums of gains over thousands of rows differ by more."""
    torch.manual_seed(0)
    function, twin, make = case
    assert_agree(function, twin, make(torch.float32, "cuda"), 1e-3)
