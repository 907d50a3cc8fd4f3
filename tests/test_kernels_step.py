"""adamw_step: its formula beside nanolab/optim.py, its kernels beside the formula, optimisers by it beside "torch"."""
import copy
import math
from contextlib import nullcontext

import pytest
import torch

import kernels
from interpreter import formula, interpreted, kernels_of, needs_interpreter
from kernels import adamw_step, using
from nanolab import optim, parallel

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
adamw, twin = kernels_of("adamw"), formula(adamw_step)
CLOSE = dict(atol=2e-6, rtol=1e-5)
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
MORE = pytest.mark.parametrize("more", [{}, dict(clip=0.5), dict(orthograd=True), dict(clip=0.5, orthograd=True)],
                               ids=str)


def tensors(shapes, seed=0, dtype=torch.float32, scale=0.3, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


class Lists:
    """Parameters with their moments; `step` steps them by an operation."""

    def __init__(self, params):
        self.params, self.steps = params, 0
        state = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.means, self.squares = ([torch.zeros_like(p, dtype=state) for p in params] for _ in range(2))

    def step(self, op, grads, **more):
        self.steps += 1
        return op(self.params, grads, self.means, self.squares, self.steps, **{**SETTINGS, **more})


def pair(shapes, dtype=torch.float32, device="cpu"):
    return [Lists(tensors(shapes, dtype=dtype, device=device)) for _ in range(2)]


def assert_equal_lists(ours, theirs, tolerance):
    for name in ("params", "means", "squares"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **tolerance)


def assert_both(ours, theirs, grads, tolerance=CLOSE, tables=None, **more):
    """A step by the kernels and one by the formula; compares all, and the norms. Gradients are only read."""
    before = [None if g is None else g.clone() for g in grads]
    with interpreted():
        norm = ours.step(adamw_step, grads, tables=tables, **more)
    expected = theirs.step(twin, grads, **more)
    assert_equal_lists(ours, theirs, tolerance)
    torch.testing.assert_close(grads, before, rtol=0, atol=0, equal_nan=True)
    assert (norm is None) == (expected is None) == (more.get("clip") is None)
    if norm is not None:
        assert norm.shape == () and norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected, atol=0, rtol=2e-5, equal_nan=True)
    return norm


# --- The formula ---

@pytest.mark.parametrize("dtype, tolerance, more", [
    *((torch.float64, 1e-13, more) for more in MORE.args[1]), (torch.float32, 1e-6, MORE.args[1][-1])], ids=str)
def test_the_formula_is_optim_after_torchs_clipping(dtype, tolerance, more):
    """20 steps: AdamW with OrthoGrad, clip_grad_norm_ before it, decay by tensor, some without a gradient."""
    shapes = [(12, 7), (5,), (1,), (0,), (3, 4, 5)]
    ours, clip = Lists(tensors(shapes, dtype=dtype)), more.get("clip")
    params = [torch.nn.Parameter(p) for p in tensors(shapes, dtype=dtype)]
    groups = [dict(params=params[:2]), dict(params=params[2:], weight_decay=0.0)]
    theirs = optim.AdamW(groups, "orthograd" in more, lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    for step in range(20):
        grads = [*tensors(shapes[:4], 100 + step, dtype), None]
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        norm = ours.step(adamw_step, grads, eps=1e-3, weight_decay=[0.1, 0.1, 0, 0, 0], **more)
        expected = None if clip is None else torch.nn.utils.clip_grad_norm_(params, clip)
        theirs.step()
        assert norm is expected is None or torch.allclose(norm, expected)
    torch.testing.assert_close(ours.params, [p.detach() for p in params], atol=tolerance, rtol=tolerance)
    assert torch.equal(ours.params[4], tensors(shapes, dtype=dtype)[4])


def test_lists_that_do_not_fit():
    a, half = (Lists(tensors([(3,), (4,)])) for _ in range(2))
    half.means[0] = half.means[0].half()
    grads, away = tensors([(3,), (4,)]), [torch.empty(3, device="meta"), None]
    for lists, given, more, said in ((a, grads[:1], {}, "2 params, but 1 grads"), (a, grads[::-1], {}, "of its shape"),
                                     (a, grads, dict(weight_decay=[0] * 3), "2 params, but 3 weight_decay"),
                                     (half, grads, {}, "float32"), (a, away, {}, "one device")):
        with pytest.raises(ValueError, match=said):
            lists.step(adamw_step, given, **more)


# --- The kernels ---

@pytest.mark.skipif(adamw is None, reason="needs Triton")
def test_chunks_grow_with_the_model():
    """Fewer programs for large models, from 4 Mi numbers on."""
    assert [adamw._chunk(n) // adamw.BLOCK for n in (1, 2 ** 22 - 1, 2 ** 22, 2 ** 27)] == [4, 4, 16, 16]


@needs_interpreter
def test_tables_are_kept_and_follow_what_moves():
    """One for steps by the same tensors, whatever is in them; then new gradients, missing ones, another decay; and what
    autograd would miss is told it."""
    shapes = [(7, 5), (1,), (130,)]
    (ours, theirs), tables, grads, rows = pair(shapes), {}, tensors(shapes), None
    version = ours.params[0]._version
    for step in range(4):
        for g, new in zip(grads, tensors(shapes, 100 + step, scale=10.0 ** (step % 3 - 1))):
            g.copy_(new)
        assert_both(ours, theirs, grads, tables=tables, clip=1.0 if step % 2 == 0 else None, orthograd=step == 3)
        rows = tables["rows"] if step == 0 else rows
        assert tables["rows"] is rows
    assert ours.params[0]._version > version
    for step, missing in enumerate(((), (1,), (0,))):
        grads = [None if i in missing else g for i, g in enumerate(tensors(shapes, step))]
        assert_both(ours, theirs, grads, tables=tables)
    assert_both(ours, theirs, grads, tables=tables, weight_decay=10.0)


@needs_interpreter
@pytest.mark.parametrize("more", MORE.args[1][::3], ids=str)  # none and all of it
def test_every_size_dtype_and_gap(more):
    """Several chunks, a whole one, odd, one and no elements; bfloat16 against float32 in any mixture; None."""
    shapes = [(adamw._chunk(0) + 37,), (3, 7), (1,), (0,), (6,), (5,), (20,)]
    ours, theirs = pair(shapes)
    for lists in (ours, theirs):
        for i in (1, 2, 4):
            lists.params[i] = lists.params[i].bfloat16()
        lists.params[6] = torch.cat([torch.zeros(1), lists.params[6]])[1:]  # no multiple of 16 bytes
    for step in range(2):
        grads = tensors(shapes, 100 + step)
        grads[1], grads[5], grads[6] = grads[1].bfloat16(), None, grads[6].bfloat16()
        # the interpreter cuts a bfloat16 off: twice a unit in the last place after two steps
        assert_both(ours, theirs, grads, dict(atol=1e-6, rtol=2 ** -6),
                    weight_decay=[0.1, 0, 0.3, 0, 0.5, 0.1, 0], **more)
        torch.testing.assert_close(ours.params[::6], theirs.params[::6], **CLOSE)
    assert torch.equal(ours.params[5], tensors(shapes)[5])


@needs_interpreter
def test_not_contiguous():
    ours, theirs = pair([(3, 8), (4, 4)])
    for lists in (ours, theirs):
        lists.params[0], lists.means[1] = lists.params[0].T, lists.means[1].T
        lists.means[0], lists.squares[0] = lists.means[0].view(8, 3), lists.squares[0].view(8, 3)
    assert_both(ours, theirs, [tensors([(3, 8)])[0].T, tensors([(8, 4)])[0][::2]])
    assert not ours.params[0].is_contiguous()


@needs_interpreter
@pytest.mark.parametrize("scale, clip", [
    (0.0, math.inf), (1e15, 1e-3), (1e37, 1e-3), (1e37, math.inf), (math.nan, 1e-3)])
def test_clipping_of_nothing_of_much_and_of_too_much(scale, clip):
    """Zero gradients; huge ones; so huge that the norm is infinite, which leaves 0 of them, or NaN of inf / inf, and
    weights so large that the product with them overflows too; one NaN, which is not hidden."""
    ours, theirs = pair([(4,), (9,)])
    for p in ours.params + theirs.params:
        p.mul_(1e3)
    grads = tensors([(4,), (9,)], 1, scale=1.0 if math.isnan(scale) else scale)
    grads[0][2] *= scale if math.isnan(scale) else 1.0
    norm = assert_both(ours, theirs, grads, dict(atol=1e-6, rtol=2e-5, equal_nan=True), clip=clip, orthograd=True)
    assert norm.isinf() == (scale == 1e37) and norm.isnan() == math.isnan(scale)
    assert not math.isnan(scale) or all(p.isnan().all() for p in ours.params)


@needs_interpreter
def test_edges():
    """OrthoGrad: zero weights and one element leave the gradient; one along the weights becomes 0, so that only decay
    is left. A lerp by 1, and an eps that is corrected with the second moment. No tensors, or none with a gradient: a
    norm of 0 where one was asked for."""
    ours, theirs = pair([(6,), (1,), (600,)])
    for lists in (ours, theirs):
        lists.params[0].zero_()
    before = ours.params[2].clone()
    grads = [*tensors([(6,), (1,)], 1), 0.37 * ours.params[2]]  # not quite, by rounding
    assert_both(ours, theirs, grads, orthograd=True)
    torch.testing.assert_close(ours.params[2], before * (1 - 1e-3))
    torch.testing.assert_close(ours.means, [0.1 * grads[0], 0.1 * grads[1], torch.zeros(600)])
    ours, theirs = pair([(6,)])
    for seed in (1, 2):
        assert_both(ours, theirs, tensors([(6,)], seed), betas=(0.0, 0.5), eps=0.1)
    with interpreted():
        assert adamw_step([], [], [], [], 1, **SETTINGS) is None
        assert adamw_step([], [], [], [], 1, clip=1.0, **SETTINGS) == 0
        assert Lists(tensors([(3,), (0,)])).step(adamw_step, [None, torch.zeros(0)], clip=1.0) == 0


# --- Optimisers ---

ROLES = {"embed": ((9, 6), "embedding"), "up": ((12, 6), "matrix"), "down": ((6, 12), "residual"),
         "head": ((9, 6), "head"), "gain": ((6,), "gain"), "scale": ((1,), "gain"), "empty": ((0,), "bias")}
NO_MATRICES = [name for name in ROLES if name not in ("up", "down")]  # what Muon leaves to AdamW


def going(way):
    """Within it kernels go this way, "triton" in the interpreter if that is on."""
    return nullcontext() if way == "triton" and kernels.on() else using(way)


class Setup:
    """Named parameters and their optimiser; `train` steps them by gradients that are the same for a step."""

    def __init__(self, name="adamw", way="torch", dtype=torch.float32, device="cpu", **more):
        generator, self.way = torch.Generator().manual_seed(0), way
        self.params = {name: torch.nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(device, dtype))
                       for name, (shape, _) in ROLES.items()}
        self.opt = optim.build({**dict(optimizer=name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), muon_lr=0.05),
                                **more}, self.params.items(), {name: role for name, (_, role) in ROLES.items()},
                               mesh=more.get("mesh"))

    def train(self, steps, missing=lambda step: ()):
        """steps: their numbers. The schedule multiplies the rate."""
        for step in steps:
            generator = torch.Generator().manual_seed(100 + step)
            for i, (name, p) in enumerate(self.params.items()):
                grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 1)
                p.grad = None if name in missing(step) else grad.to(p)
            for group in self.opt.param_groups:
                group["lr"] = group["base_lr"] * optim.schedule("cosine", step, 3, 20)
            self.step()
        return self

    def step(self, *given, **how):
        """The optimiser's."""
        with going(self.way):
            return self.opt.step(*given, **how)

    def tensors(self):
        """{name of a parameter, and of its state: value}."""
        found = {name: p.detach().clone() for name, p in self.params.items()}
        for name, p in self.params.items():
            found |= {f"{name}.{key}": copy.deepcopy(value) for key, value in self.opt.state.get(p, {}).items()}
        return found


def assert_same(ours, theirs, tolerance=CLOSE):
    """Weights and state, of the same names, types and layout."""
    ours, theirs = (setup.tensors() for setup in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is type(theirs[name])
        torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


EXACT = dict(atol=0, rtol=0)


@pytest.fixture
def launches(monkeypatch):
    """(sizes of the tensors, what was given by position after them, by name) of every call of adamw_step."""
    found, real = [], kernels.adamw_step

    def noting(params, grads, means, squares, *given, **how):
        found.append((sorted(p.numel() for p in params), given, how))
        return real(params, grads, means, squares, *given, **how)
    monkeypatch.setattr(kernels, "adamw_step", noting)
    return found


@pytest.fixture(params=["formula", pytest.param("interpreter", marks=needs_interpreter)])
def way(request, monkeypatch):
    """Within it adamw_step is its formula, or the kernels themselves, and no formula can be called."""
    if request.param == "interpreter":
        monkeypatch.setattr(kernels, "adamw_step_reference", None)
    with interpreted() if request.param == "interpreter" else nullcontext():
        yield request.param


def sizes(names):
    return sorted(torch.Size(ROLES[name][0]).numel() for name in names)


def some_missing(step):
    return {0: ("up", "gain"), 1: ("up", "gain"), 2: ("up",), 4: ("head", "up")}.get(step, ())


@pytest.mark.parametrize("name, missing, orthograd", [("adamw", some_missing, True), ("muon", lambda step: (), False)],
                         ids=["adamw", "muon"])
def test_same_weights_and_state_by_one_launch_a_step(name, missing, orthograd, way, launches):
    """Groups with and without decay together, Muon's matrices apart. Each parameter is corrected for the steps that it
    took; those that took as many go together. Tables are kept from step to step, and are no part of the state."""
    theirs = Setup(name, orthograd=orthograd).train(range(6), missing)
    assert not launches and not theirs.opt.tables
    ours = Setup(name, "triton", orthograd=orthograd)
    taken = dict.fromkeys(ROLES if name == "adamw" else NO_MATRICES, 0)
    for step in range(6):
        ours.train([step], missing)
        for own in taken:
            taken[own] += own not in missing(step)
        together = {count: [own for own in taken if own not in missing(step) and taken[own] == count]
                    for count in sorted(taken.values())}
        assert sorted((given[0], numbers) for numbers, given, _ in launches) == [
            (count, sizes(names)) for count, names in together.items() if names]
        for i, (_, (_, lr, betas, eps, decays), how) in enumerate(launches):
            assert (betas, eps) == ((0.9, 0.99), 1e-8) and set(decays) <= {0.0, 0.1}
            assert how == dict(orthograd=orthograd, tables=ours.opt.tables[i])
            assert lr == 1e-2 * optim.schedule("cosine", step, 3, 20)
        launches.clear()
    assert_same(ours, theirs)
    assert {own: ours.opt.state[ours.params[own]]["step"] for own in taken} == taken
    first, rows = ours.opt.tables[0], ours.opt.tables[0].get("rows")
    assert (rows is None) == (way == "formula")
    ours.step()
    kept = ours.opt.tables[0]
    ours.step()
    assert ours.opt.tables[0] is kept is first
    state, other = ours.opt.state_dict(), theirs.opt.state_dict()
    assert state.keys() == other.keys()
    assert [group.keys() for group in state["param_groups"]] == [group.keys() for group in other["param_groups"]]


def apart(**change):
    """Groups that do not agree."""
    def act(setup):
        setup.opt.param_groups[1].update(change)
        setup.train(range(3))
    return act


def turned(setup):
    setup.params["up"].data = setup.params["up"].data.t().contiguous().t()
    setup.train(range(3))


def scaled(setup):
    """As the scripts call it: clipping first, outside; where a gradient is infinite nothing moves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for step in range(4):
        loss = sum((p * (step + 1)).square().sum() for p in setup.params.values())
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.unscale_(setup.opt)
        torch.nn.utils.clip_grad_norm_(setup.params.values(), 0.5)
        with going(setup.way):
            scaler.step(setup.opt)
        scaler.update()
        setup.opt.zero_grad(set_to_none=True)
    assert setup.opt.state[setup.params["head"]]["step"] == 3


def one_double(setup):
    setup.params["up"].data = setup.params["up"].data.double()
    setup.train(range(3))


def thrice(setup):
    setup.train(range(3))


ALONE = {  # what else a step may meet: (settings, what is done, the sizes of its launches by "triton")
    "another rate": ({}, apart(lr=3e-2, base_lr=3e-2), 6), "other betas": ({}, apart(betas=[0.8, 0.95]), 6),
    "another eps": ({}, apart(eps=0.1), 6),
    "memory in another order": ({}, turned, 3), "a scaler that skips": (dict(name="muon"), scaled, 3),
    "one in float64": ({}, one_double, 3),
    "a mesh of one": (dict(mesh=parallel.Alone()), lambda setup: setup.train([0]), 1),
    # as ever by "torch"
    **{name: (dict(name=name, ess=1e3), thrice, 0) for name in optim.RULES if name not in ("adamw", "muon")},
    **{str(dtype): (dict(dtype=dtype), thrice, 0) for dtype in (torch.float64, torch.bfloat16)},
}


@pytest.mark.parametrize("case", ALONE)
def test_what_a_step_may_meet(case, launches):
    settings, act, n = ALONE[case]
    ours, theirs = (Setup(way=which, **settings) for which in ("triton", "torch"))
    act(theirs)
    assert not launches
    act(ours)
    assert_same(ours, theirs, CLOSE if n else EXACT)
    assert len(launches) == n
    assert case != "one in float64" or [numbers for numbers, *_ in launches] == [sizes(set(ROLES) - {"up"})] * 3


@pytest.mark.parametrize("first, then, name, orthograd", [
    ("torch", "triton", "adamw", True), ("triton", "torch", "muon", False), ("triton", "triton", "adamw", True)])
def test_a_checkpoint_goes_over(first, then, name, orthograd, tmp_path):
    """A parameter's own count of steps with it; with itself bit for bit."""
    def missing(step):
        return ("head",) if step in (0, 4) else ()
    whole = Setup(name, first, orthograd=orthograd).train(range(6), missing)
    one = Setup(name, first, orthograd=orthograd).train(range(3), missing)
    torch.save(dict(params={key: p.detach() for key, p in one.params.items()}, opt=one.opt.state_dict()),
               tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    two = Setup(name, then, orthograd=orthograd).train(range(7, 9))  # what it knew is gone
    with torch.no_grad():
        for key, p in two.params.items():
            p.copy_(saved["params"][key])
    optim.load_state(two.opt, saved["opt"])
    assert (not two.opt.tables) == (then == "torch")
    assert_same(two.train(range(3, 6), missing), whole, EXACT if first == then else CLOSE)


# --- On a GPU ---

@pytest.mark.gpu
@MORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_a_gpu(dtype, more):
    """Hundreds of tensors and a large one, beside the formula; some beside the compiled formula."""
    shapes = [(3000, 1001), (1,), (0,), *[(i + 1,) for i in range(300)]]
    (ours, theirs), (alone, compiled) = pair(shapes, dtype, "cuda"), pair(shapes[:20], dtype, "cuda")
    eager, tables = torch.compile(twin), {}
    tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=1e-5, rtol=2 ** -6)
    for step in range(5):
        grads = tensors(shapes, 100 + step, dtype, device="cuda")
        with using("triton"):
            norm = ours.step(adamw_step, grads, tables=tables, **more)
            alone.step(adamw_step, grads[:20], **more)
        torch.testing.assert_close(norm, theirs.step(twin, grads, **more), atol=0, rtol=1e-4)
        compiled.step(eager, grads[:20], **more)
    assert_equal_lists(ours, theirs, tolerance)
    assert_equal_lists(alone, compiled, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_on_a_gpu(name, orthograd, launches):
    setups = [Setup(name, which, device="cuda", orthograd=orthograd).train(range(6)) for which in ("torch", "triton")]
    assert_same(*setups, dict(atol=1e-2, rtol=1e-2) if name == "muon" else dict(atol=1e-5, rtol=1e-4))
    assert len(launches) == 6
