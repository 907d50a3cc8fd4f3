"""Every fused operation of cases.py: its kernel beside its formula, in Triton's interpreter and on a GPU.

And what is particular to norms, cross-entropy, recurrences, experts and codes.
"""
import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import choices
import kernels
from cases import (CASES, CHOICES, FIRST, MODELS, NOTHING, below, gates, linear_cross_entropy,
                   linear_cross_entropy_reference, made, near_scan, of, selective)
from interpreter import (EVERYWHERE, INTERPRETED, Largest, by_kernel, formula, interpreted, kernels_of,
                         needs_interpreter, results)
from kernels import grouped_linear, gumbel_softmax, min_gru, nearest_code, reinmax, selective_scan

pytestmark = [pytest.mark.usefixtures("one_thread", "by_triton"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:overflow")]  # numpy says so, of exp(1e4)
FLOAT = torch.float32


def walk(cases):
    """Each case in each of its types."""
    return pytest.mark.parametrize("name, dtype", [pytest.param(name, dtype, id=f"{name}, {str(dtype)[6:]}")
                                                   for name in cases for dtype in cases[name].dtypes])


# --- Every operation ---

@EVERYWHERE
@walk(CASES)
def test_kernel_and_formula_agree(name, dtype, device):
    """Values and gradients: odd sizes, several blocks, extreme numbers, half precision; and no formula can have run."""
    case = CASES[name]
    case.assert_agree(case.make(dtype, device), dtype, device)


@pytest.mark.gpu
@walk(CASES | {f"{name} of a model": case for name, case in MODELS.items()})
def test_kernel_and_compiled_formula_agree(name, dtype):
    case = MODELS[name.removesuffix(" of a model")] if name not in CASES else CASES[name]
    torch.compiler.reset()  # a new set of masks is a new program
    case.assert_agree(case.make(dtype, "cuda"), dtype, "cuda", twin=torch.compile(case.twin))


@pytest.mark.gpu
@walk(MODELS)
def test_kernel_and_formula_agree_at_the_size_of_a_model(name, dtype):
    """And twice the same bits come out."""
    case = MODELS[name]
    found = [case.assert_agree(case.make(dtype, "cuda"), dtype, "cuda") for _ in range(2)]
    for one, two in zip(*([*out, *gradients] for out, gradients in found), strict=True):
        assert torch.equal(one, two)


LAYOUTS = {  # of tensors, and of gradients that come in
    "of a wider one": lambda t: F.pad(t, (7, 6))[..., 7:-6],
    "turned": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one for all": lambda t: t[:1].expand_as(t) if t.is_floating_point() else t,
}
WIDER, TURNED, EVERY, ONE = LAYOUTS
MIXED = (EVERY, WIDER, ONE, TURNED), (ONE, EVERY, TURNED, WIDER), (WIDER, TURNED, EVERY, ONE)  # of the tensors in turn
COPIED = "selective_scan", "min_gru", "grouped_linear", "nearest_code", "soft", "reinmax"  # as their kernels need it
VIEWED = [op for op in FIRST if op not in ("glu", "bilinear", "reglu", "swiglu", "hard")]


@EVERYWHERE
@pytest.mark.parametrize("op, layouts", [pytest.param(op, layouts, id=f"{op}, {'; '.join(layouts)}") for op in VIEWED
                                         for layouts in MIXED[:1 if op in COPIED else 3]])
def test_tensors_and_gradients_need_not_lie_side_by_side(op, layouts, device):
    """Slices of wider ones, as a concatenation's gradients are; one number for all; transposed ones."""
    case, views = CASES[FIRST[op]], [LAYOUTS[name] for name in layouts]
    tensors = [views[i % len(views)](t) if t.dim() else t for i, t in enumerate(case.make(FLOAT, device))]
    case.assert_agree(tensors, FLOAT, device, upstream=lambda t: (
        t.flatten()[:1].expand(t.shape) if layouts[0] == ONE else views[0](t)))


@EVERYWHERE
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "selective_scan, whole chunks"])
def test_only_one_output_is_used(name, which, device):
    """The other's gradient is not there, and is 0."""
    CASES[name].assert_agree(CASES[name].make(FLOAT, device), FLOAT, device, used=which)


@pytest.mark.parametrize("device", [*EVERYWHERE.args[1], "formula"])
@pytest.mark.parametrize("name", NOTHING)
def test_nothing(name, device):
    """Nothing in, nothing or zeros out, with gradients; a scan's last state is the first."""
    case, shapes = NOTHING[name]
    tensors = case.make(FLOAT, "cuda" if device == "cuda" else "cpu")
    with nullcontext() if device == "formula" else by_kernel(device):
        out, gradients, _ = results(case.op, tensors, constant=case.constant)
    assert [y.shape for y in out] == shapes and not out[0].any()
    asking = tensors[:len(tensors) - case.constant]
    for t, gradient in zip([t for t in asking if t.is_floating_point()], gradients):
        assert gradient is None and t is asking[-1] or gradient.shape == t.shape
    if name.startswith("selective"):
        assert torch.equal(out[1], tensors[-1]) or "no time" not in name
    else:
        assert not any(gradient is not None and gradient.any() for gradient in gradients)


def floating(name):
    """(case, its tensors in float64)."""
    case = CASES[name]
    return case, [t.double() if t is not None and t.is_floating_point() else t for t in case.make(torch.float64)]


CHUNKED = [name for name in CASES if name.startswith(("linear", "batched"))]  # which compute by chunks without a kernel
FORMULAS = list(dict.fromkeys([*FIRST.values(), *CHUNKED]))


@pytest.mark.parametrize("name", FORMULAS)
def test_float64_takes_the_formula(name):
    """Or computes by chunks; with kernels, too."""
    case, tensors = floating(name)
    found, want = case.op(*tensors), case.twin(*tensors)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    if INTERPRETED:
        with interpreted():
            torch.testing.assert_close(case.op(*tensors), found, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMULAS if CASES[name].gradcheck and CASES[name].constant != len(
    CASES[name].inputs)])
def test_gradients_of_the_formula(name):
    """Against differences, in float64; and of the operation, which may compute by chunks."""
    case, tensors = floating(name)
    for i, t in enumerate(tensors[:len(tensors) - case.constant]):
        tensors[i] = t.requires_grad_(t.is_floating_point())
    fast = sum(t.numel() for t in tensors) > 400
    for op in {case.twin, case.op}:
        assert torch.autograd.gradcheck(op, tensors, fast_mode=fast)


@walk({name: CASES[name] for name in FORMULAS})
def test_without_a_kernel(name, dtype):
    """By "triton" on a CPU: the formula, or by chunks. Losses and states are float32, codes int64, all else is of the
    type of the inputs."""
    case = CASES[name]
    tensors = case.make(dtype)
    out, found, upstream = results(case.op, tensors, constant=case.constant)
    want, gradients, _ = results(case.twin, tensors, upstream, case.constant)
    for mine, other in zip([*out, *found], [*want, *gradients], strict=True):
        torch.testing.assert_close(mine, other, **case.near(dtype, mine, other))
    op = name.partition(",")[0]
    wide = "cross_entropy", "linear", "batched", "min_gru", "selective_scan"
    for i, y in enumerate(out):
        codes = op == "nearest_code" or i == 1 and op in CHOICES
        assert y.dtype == (torch.int64 if codes else FLOAT if op in wide else dtype)


@pytest.mark.parametrize("name", [*map(FIRST.get, (*kernels.GLU, "rms_norm", "layer_norm", "cross_entropy")),
                                  "rms_norm, one row", "layer_norm, bias"])
def test_by_torch(name):
    """What PyTorch has for it computes the formula."""
    case = CASES[name]
    found, want = (op(*case.make()) for op in (formula(case.op), case.twin))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_no_kernel_takes_tuples_apart_within_a_tuple():
    """Triton 3.6 cannot read `(a, b), c = ...` in a kernel; 3.9 can, so the compiler would not say it everywhere."""
    found = [node for file in Path(kernels.__file__).parent.glob("fused/*.py")
             for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
             and "jit" in map(ast.unparse, node.decorator_list)]
    assert len(found) > 30
    targets = [target for kernel in found for node in ast.walk(kernel) if isinstance(node, ast.Assign)
               for target in node.targets]
    assert not any(isinstance(part, ast.Tuple) for target in targets for part in getattr(target, "elts", ()))


# --- Norms, cross-entropy ---

def test_the_norm_is_of_the_sum():
    x, = made(of(3, 5, 24))
    found = kernels.norm_reference(x, None, None, 1e-6, 2 * x, False)
    torch.testing.assert_close(found, (formula(kernels.rms_norm)(3 * x), 3 * x), rtol=1e-6, atol=1e-6)


@needs_interpreter
def test_the_norm_is_of_the_rounded_sum():
    """What float16 loses beside 2048 is not in the norm either, as the backward pass sees only the sum that is kept."""
    x, residual = torch.full((2, 10), 2048.0).half(), torch.linspace(0.1, 0.9, 20).view(2, 10).half()
    with interpreted():
        y, s = kernels.layer_norm(x, residual=residual)
    assert s.eq(2048).all() and y.eq(0).all()


@needs_interpreter
def test_too_wide_rows_take_the_formula(monkeypatch):
    """Kernels hold a row in one block."""
    x, = made(of(2, 20))
    with interpreted():
        monkeypatch.setattr(kernels_of("rows"), "norm_forward", None)
        with pytest.raises(TypeError):
            kernels.rms_norm(x)
        monkeypatch.setattr(kernels, "WIDEST_ROW", 19)
        torch.testing.assert_close(kernels.rms_norm(x), F.rms_norm(x, (20,), eps=1e-6))
        torch.testing.assert_close(kernels.layer_norm(x), F.layer_norm(x, (20,)))


@needs_interpreter
def test_a_program_sums_over_many_rows():
    """In the cases of more tiles than programs there are: one row a tile, and several."""
    blocks = kernels_of("rows").norm_blocks
    assert blocks(1025)[0] == 1 and 131 > 2 * 2 * blocks(60)[0]


@needs_interpreter
def test_cross_entropy_of_ignored_rows_and_targets_out_of_range():
    """What is ignored may be nan, its gradient is 0; nothing beyond the row is read."""
    logits, _ = CASES["cross_entropy, infinite logits"].make()
    x, labels = logits.requires_grad_(), torch.tensor([-100, 0, -100, -100, -100, -100, -100, 7])
    with interpreted():
        loss = kernels.cross_entropy(x, labels, ignore_index=-100)
        loss.sum().backward()
        wrong = kernels.cross_entropy(torch.zeros(3, 9), torch.tensor([9, -2, 8]))
    assert loss[labels == -100].eq(0).all() and x.grad[labels == -100].eq(0).all()
    assert wrong.isnan().tolist() == [True, True, False]


# --- Cross-entropy of a linear layer ---

@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_all_logits_are_never_there(dtype):
    """Forward and backward make no tensor larger than the larger of h and weight; the formula makes N V numbers."""
    N, C, V = 128, 8, 1024  # V C is N V / 16
    tensors = made(of(N, C), of(V, C), below(V, N), of(V), dtype=dtype)
    several = made(of(2, N, C), of(2, 2, V // 2, C), below(V // 2, N, 2), dtype=dtype)
    for op, tensors, most in ((linear_cross_entropy, tensors, V * C),
                              (linear_cross_entropy_reference, tensors, N * V),
                              (kernels.batched_linear_cross_entropy, several, 2 * V * C)):
        with Largest() as seen:
            results(op, tensors)
        assert seen.numel == most


def test_rows_at_once():
    """The larger of h and the classifiers bounds the logits; at least one row, never more than there are."""
    for sizes, rows in (((8192, 512, 50257), 512), ((100000, 512, 50257), 512 * 100000 // 50257),
                        ((8192, 512, 256), 8192), ((4, 2, 1), 4), ((3, 0, 10), 1)):
        assert kernels.chunk_rows(*sizes) == rows
    for N, C, V in ((5, 3, 100), (100, 3, 7), (64, 8, 64)):
        assert kernels.chunk_rows(N, C, V) * V <= max(N, V) * C or kernels.chunk_rows(N, C, V) == 1


def test_only_what_is_asked_for_is_computed():
    """Frozen inputs get no gradient, and others the same as with all."""
    tensors = made(of(7, 5), of(9, 5), below(9, 7), of(9))
    _, whole, upstream = results(lambda *given: linear_cross_entropy(*given, chunk=3), tensors)
    floating = [0, 1, 3]
    for kept, gradient in zip(floating, whole):
        some = [t.clone().requires_grad_() if i == kept else t for i, t in enumerate(tensors)]
        linear_cross_entropy(*some, chunk=3).backward(upstream[0])
        assert torch.equal(some[kept].grad, gradient)
        assert all(some[i].grad is None for i in floating if i != kept)


def test_weight_gradient_is_summed_in_float32():
    """Of many small chunks in bfloat16: adding them up in bfloat16 would lose a part of the later ones."""
    low = made(of(512, 8, then=torch.abs), of(4, 8), below(4, 512), dtype=torch.bfloat16)
    exact = results(linear_cross_entropy_reference, [t.double() if t.is_floating_point() else t for t in low],
                    [torch.ones(512)])[1][1]
    mine = results(lambda *given: linear_cross_entropy(*given, chunk=1), low, [torch.ones(512)])[1][1]
    assert (mine - exact).norm() / exact.norm() < 4e-3  # 2^-8: one rounding


@pytest.mark.parametrize("inner", [False, True])
def test_autocast(inner):
    """Products are bfloat16 in both passes, wherever backward is called; gradients have the inputs' type."""
    h, weight, bias, labels = made(of(7, 5), of(9, 5), of(9), below(9, 7))
    asking = [t.requires_grad_() for t in (h, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, weight, labels, bias, chunk=3)
        wanted = linear_cross_entropy_reference(h, weight, labels, bias)
        if inner:
            loss.sum().backward()
    if not inner:
        loss.sum().backward()
    assert loss.dtype == FLOAT
    torch.testing.assert_close(loss, wanted)
    for t, gradient in zip(asking, torch.autograd.grad(wanted.sum(), asking)):
        torch.testing.assert_close(t.grad, gradient, rtol=1.6e-2, atol=1.6e-2)
    assert not torch.equal(linear_cross_entropy(h, weight, labels, bias), loss)


def test_losses_may_be_changed_in_place():
    """What the backward pass needs is kept elsewhere."""
    h, weight, labels = made(of(7, 5), of(9, 5), below(9, 7))
    loss = linear_cross_entropy(h.requires_grad_(), weight, labels)
    loss.mul_(2).sum().backward()
    assert kernels.stacked([[weight]]).data_ptr() == weight.data_ptr()  # a single one is not copied
    wanted, = torch.autograd.grad(2 * linear_cross_entropy_reference(h, weight, labels).sum(), h)
    torch.testing.assert_close(h.grad, wanted)


# --- Recurrences, experts ---

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
    want = results(case.twin, [*tensors, torch.zeros_like(h)])[0]
    for y, same, other in zip(found, asking, want, strict=True):
        torch.testing.assert_close(y, other, **near_scan(None, y, other))
        assert torch.equal(y, same)


@EVERYWHERE
def test_frozen_experts_and_autocast(device):
    """A gradient of the rows alone, one number for all. Under autocast products are bfloat16, gradients are not."""
    x, weight, offsets = made(of(7, 6), of(3, 5, 6), torch.tensor([0, 4, 7, 7]), device=device)
    want = torch.cat((weight[0].sum(0).expand(4, 6), weight[1].sum(0).expand(3, 6)))
    for half in (False, True):
        x.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=half), by_kernel(device):
            y = grouped_linear(x.requires_grad_(), weight, offsets)
            plain = formula(grouped_linear)(x, weight, offsets)
        assert y.dtype == plain.dtype == (torch.bfloat16 if half else FLOAT)
        torch.testing.assert_close(y, plain, **near_scan(None, y, plain))
        y.sum().backward()
        near = 2 ** -7 if half else 1e-5
        torch.testing.assert_close(x.grad, want, rtol=near, atol=near)  # float32, both


# --- Codes ---

def normal(*shape, seed=0, dtype=FLOAT):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EVERYWHERE
@pytest.mark.parametrize("N, K, C", [(70, 130, 37), (3, 5, 0), pytest.param(
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
def test_nearest_code_among_equal_ones_and_far_away(device):
    """The first of equal ones, within a tile and over tiles, of small integers, whose sums are exact. |x|^2 has no part
    in the comparison; a NaN in x still gives a code."""
    codes = (4 * normal(9, 37)).round().repeat(20, 1).to(device)  # 180 rows: three tiles
    x = codes[:40].T.contiguous().T  # not contiguous
    far = torch.tensor([[1e4, 0.0], [float("nan"), 0.0]], device=device)
    with by_kernel(device):
        index = nearest_code(x, codes)
        assert nearest_code(far, torch.tensor([[0.0, 1.0], [0.001, 1.0]], device=device)).tolist() == [1, 0]
    assert torch.equal(index.cpu(), torch.arange(40) % 9) and torch.equal(index, formula(nearest_code)(x, codes))


@EVERYWHERE
@pytest.mark.parametrize("name", CHOICES)
def test_choices_among_extreme_logits(name, device):
    """The first of equal ones; a row of -inf alone is NaN; nothing else is, and what cannot be gets no gradient; nor
    does noise."""
    case = CASES[f"{name}, extreme logits"]
    (y, codes), (grad,) = case.assert_agree(case.make(device=device), device=device)
    assert codes[3] == 0 and codes[5] == 0 and y[5].isnan().all()
    assert grad[:5].isfinite().all() and (grad[4, ::2] == 0).all()
    noise = torch.zeros(2, 5, requires_grad=True, device=device)
    with by_kernel(device):
        y, codes = CHOICES[name](normal(2, 5).to(device).requires_grad_(), noise)
    y.sum().backward()
    assert noise.grad is None and not codes.requires_grad


# --- Mistakes ---

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
        ("N, C", lambda: nearest_code(x[0], torch.zeros(3, 5))), ("K > 0", lambda: nearest_code(x[0], x[0, :0])),
        ("same shape", lambda: gumbel_softmax(x, x[:1], 1.0, True)), ("K > 0", lambda: reinmax(x[..., :0], None)),
        *(("above 0", lambda t=t: gumbel_softmax(x, None, t, True)) for t in (0.0, -1.0, float("nan"))),
        ("at least 1", lambda: reinmax(x, None, 0.9)),
    ]
    A, D, side, h = torch.zeros(4, 3), torch.zeros(4), torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)
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
        wrong.append((f"^{op.__name__} needs", lambda op=op, inputs=inputs: op(*inputs)))
    for word, call in wrong:
        with pytest.raises(ValueError, match=word):
            call()
