"""AdamW by kernels.adamw_step against "torch": weights, state, checkpoints.

On a CPU adamw_step is its twin, and in Triton's interpreter the kernel. About 25 s on one core.
"""
import copy
import sys
from contextlib import nullcontext

import pytest
import torch

import kernels
from interpreter import INTERPRETED, interpreted
from nanolab import optim, parallel
from test_scripts import fresh
from ways import watched

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
CLOSE = dict(atol=2e-6, rtol=1e-5)
LIKE_MUON = dict(atol=1e-4, rtol=1e-3)  # it magnifies the rounding of OrthoGrad's projection
ROLES = {"embed": ((9, 6), "embedding"), "up": ((12, 6), "matrix"), "down": ((6, 12), "residual"),
         "head": ((9, 6), "head"), "gain": ((6,), "gain"), "scale": ((1,), "gain"), "empty": ((0,), "bias")}
ADAMW, MUON = list(ROLES), [name for name in ROLES if name not in ("up", "down")]  # what goes by the kernel


def going(way):
    """Within it kernels go this way, "triton" in the interpreter if that is on."""
    return nullcontext() if way == "triton" and kernels.on() else kernels.using(way)


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
            before = {name: p.grad.clone() for name, p in self.params.items() if p.grad is not None}
            self.step()
            assert all(torch.equal(self.params[name].grad, grad) for name, grad in before.items())  # only read
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


def equal(ours, theirs):
    assert_same(ours, theirs, dict(atol=0, rtol=0))


@pytest.fixture
def launches(monkeypatch):
    """(sizes of the tensors, what was given by position after them, by name) of every call of adamw_step."""
    found, real = [], kernels.adamw_step

    def noting(params, grads, means, squares, *given, **how):
        found.append(([p.numel() for p in params], given, how))
        return real(params, grads, means, squares, *given, **how)
    monkeypatch.setattr(kernels, "adamw_step", noting)
    return found


@pytest.fixture(params=["twin", "interpreter"])
def way(request, monkeypatch):
    """Within it adamw_step is its twin, or the kernels themselves, and no twin can be called."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("no triton, or a GPU that runs the kernels instead")
        monkeypatch.setattr(kernels, "adamw_step_reference", None)
    with interpreted() if request.param == "interpreter" else nullcontext():
        yield request.param


def sizes(names):
    return sorted(torch.Size(ROLES[name][0]).numel() for name in names)


# --- Steps ---

@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("name, inside", [("adamw", ADAMW), ("muon", MUON)])
def test_same_weights_and_state_by_one_launch_a_step(name, inside, orthograd, way, launches):
    """Groups with and without decay together; Muon's matrices apart, as ever."""
    theirs = Setup(name, orthograd=orthograd).train(range(6))
    assert not launches
    ours = Setup(name, "triton", orthograd=orthograd).train(range(6))
    assert_same(ours, theirs, LIKE_MUON if name == "muon" and orthograd else CLOSE)
    assert len({group["weight_decay"] for group in ours.opt.param_groups}) == 2
    assert [sorted(numbers) for numbers, *_ in launches] == [sizes(inside)] * 6
    for step, (_, given, how) in enumerate(launches):
        count, lr, betas, eps, decays = given
        assert (count, betas, eps) == (step + 1, (0.9, 0.99), 1e-8) and set(decays) == {0.0, 0.1}
        assert how == dict(orthograd=orthograd, tables=ours.opt.tables[0])
        assert lr == 1e-2 * optim.schedule("cosine", step, 3, 20)


@pytest.mark.parametrize("orthograd", [False, True])
def test_a_gradient_that_is_missing_for_a_while(way, launches, orthograd):
    """Each parameter is corrected for the steps that it took; those that took as many go together."""
    def missing(step):
        return {0: ("up", "gain"), 1: ("up", "gain"), 2: ("up",), 4: ("head", "up")}.get(step, ())
    theirs = Setup(orthograd=orthograd).train(range(7), missing)
    ours = Setup(way="triton", orthograd=orthograd).train(range(7), missing)
    assert_same(ours, theirs)
    steps = [given[0] for _, given, _ in launches]
    assert steps == [1, 2, 3, 1, 4, 2, 1, 5, 3, 6, 4, 2, 5, 7, 5, 3, 6]
    assert [sorted(numbers) for numbers, *_ in launches[-4:]] == [sizes(set(ROLES) - {"gain", "up", "head"}),
                                                                 *(sizes([name]) for name in ("gain", "up", "head"))]
    assert {name: ours.opt.state[p]["step"] for name, p in ours.params.items()} == {
        **dict.fromkeys(ROLES, 7), "up": 3, "head": 6, "gain": 5}


def test_who_never_has_a_gradient_is_left_alone(way):
    ours = Setup(way="triton").train(range(2), lambda step: ("up",))
    assert torch.equal(ours.params["up"], Setup().params["up"]) and ours.params["up"] not in ours.opt.state
    before = ours.tensors()
    ours.train([2], lambda step: ROLES)
    assert all(torch.equal(value, before[name]) for name, value in ours.tensors().items() if torch.is_tensor(value))


@pytest.mark.parametrize("change", [dict(lr=3e-2, base_lr=3e-2), dict(betas=[0.8, 0.95]), dict(eps=0.1)])
def test_groups_that_do_not_agree_are_launched_apart(way, launches, change):
    ours, theirs = Setup(way="triton"), Setup()
    for setup in (ours, theirs):
        setup.opt.param_groups[1].update(change)
        setup.train(range(3))
    assert_same(ours, theirs)
    assert len(launches) == 6 and len(ours.opt.tables) == 2


def test_tables_are_kept_while_nothing_moves(way):
    """And no part of the state."""
    ours = Setup(way="triton").train([0])
    kept = ours.opt.tables[0]
    assert (not kept) == (way == "twin")
    rows = None
    for step in range(3):
        ours.step()
        rows = kept.get("rows") if step == 0 else rows
        assert len(ours.opt.tables) == 1 and ours.opt.tables[0] is kept and kept.get("rows") is rows
    assert (rows is None) == (way == "twin")
    state = ours.opt.state_dict()
    theirs = Setup().train([0]).opt.state_dict()
    assert state.keys() == theirs.keys()
    assert [group.keys() for group in state["param_groups"]] == [group.keys() for group in theirs["param_groups"]]


def test_a_closure(way):
    setups = [Setup(way=which, orthograd=True) for which in ("triton", "torch")]
    for setup in setups:
        def closure(params=setup.params):
            for p in params.values():
                p.grad = None
            loss = sum(p.square().sum() + p.sum() for p in params.values())
            loss.backward()
            return loss
        losses = [setup.step(closure).item() for _ in range(4)]
        assert losses == sorted(losses, reverse=True)
    assert_same(*setups)


def test_memory_in_another_order(way):
    setups = [Setup(way=which) for which in ("triton", "torch")]
    for setup in setups:
        up = setup.params["up"]
        up.data = up.data.t().contiguous().t()
        setup.train(range(3))
    assert_same(*setups)


def test_a_scaler_skips_steps_that_overflow(way):
    """As the scripts call it: clipping first, outside; where a gradient is infinite nothing moves."""
    setups = [Setup("muon", which) for which in ("triton", "torch")]
    for setup in setups:
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
    assert_same(*setups)


# --- What goes by "torch" as ever ---

@pytest.mark.parametrize("name", [name for name in optim.RULES if name not in ("adamw", "muon")])
def test_other_rules(launches, name):
    setups = [Setup(name, which, ess=1e3).train(range(3)) for which in ("torch", "triton")]
    equal(*setups)
    assert not launches


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(launches, dtype):
    equal(*(Setup(way=which, dtype=dtype).train(range(3)) for which in ("torch", "triton")))
    assert not launches
    ours, theirs = (Setup(way=which) for which in ("triton", "torch"))  # one in float64 among float32
    for setup in (ours, theirs):
        setup.params["up"].data = setup.params["up"].data.double()
        setup.train(range(3))
    assert_same(ours, theirs)
    assert [sorted(numbers) for numbers, *_ in launches] == [sizes(set(ROLES) - {"up"})] * 3


def test_several_processes_and_their_parts(launches):
    """A mesh of two; and one DTensor, alone in its process."""
    equal(Setup().train(range(2)), Setup(way="triton", mesh=parallel.Mesh(dp=2)).train(range(2)))
    assert not launches
    Setup(way="triton", mesh=parallel.Alone()).train([0])
    assert len(launches) == 1
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain, divided = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
        divided = torch.nn.Parameter(distribute_tensor(divided.detach(), mesh))
        opt = optim.build(dict(optimizer="adamw", lr=0.1), [("a", plain), ("b", divided)],
                          dict(a="matrix", b="matrix"))
        for p in (plain, divided):
            (p * p).sum().backward()
        with going("triton"):
            opt.step()
        torch.testing.assert_close(divided.to_local(), plain, **CLOSE)
        assert not torch.equal(plain, torch.ones(3, 4))
    finally:
        distributed.destroy_process_group()
    assert [numbers for numbers, *_ in launches[1:]] == [[12]]


def test_a_sparse_gradient_gets_the_answer_of_torch(launches):
    """Its error."""
    said = []
    for which in ("torch", "triton"):
        embed = torch.nn.Embedding(5, 3, sparse=True)
        opt = optim.build(dict(optimizer="adamw", lr=0.1), embed.named_parameters(),
                          {"weight": "embedding"})
        embed(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError) as error, going(which):
            opt.step()
        said.append(str(error.value))
    assert said[0] == said[1] and not launches


def test_another_transform(launches):
    """Only OrthoGrad's is in the kernel."""
    setups = [Setup(way=which) for which in ("torch", "triton")]
    for setup in setups:
        setup.train([0])
        setup.step(transform=lambda params, grads: [2 * g + 1 for g in grads])
    assert_same(*setups)
    assert len(launches) == 1 and setups[1].opt.state[setups[1].params["up"]]["step"] == 2


def test_by_default_nothing_changes(launches):
    """Also of a copy, and of an optimiser that is made without build."""
    setup = Setup().train([0])
    assert not setup.opt.tables
    copied = copy.deepcopy((setup.params, setup.opt))
    other = Setup()
    other.params, other.opt = copied
    equal(other.train([1]), setup.train([1]))
    roles = {name: role for name, (_, role) in ROLES.items()}
    for opt in (optim.AdamW(setup.params.values()), optim.build(dict(optimizer="adamw", lr=0.1),
                                                                     setup.params.items(), roles)):
        opt.step()
        assert opt.state
    assert not launches


# --- Checkpoints ---

@pytest.mark.parametrize("name, orthograd, load", [
    ("adamw", True, optim.load_state), ("muon", False, lambda opt, state: opt.load_state_dict(state))])
@pytest.mark.parametrize("first, then", [("torch", "triton"), ("triton", "torch"), ("triton", "triton")])
def test_a_checkpoint_goes_over(first, then, name, orthograd, load, way, tmp_path):
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
    load(two.opt, saved["opt"])
    assert (not two.opt.tables) == (then == "torch")
    assert_same(two.train(range(3, 6), missing), whole, dict(atol=0, rtol=0) if first == then else CLOSE)


# --- Scripts ---

@pytest.mark.parametrize("script, optimizer, own", [
    ("train_enwik8", "adamw", ["--block_size=16", "--sample_length=0"]),
    ("train_facts", "muon", ["--n_people=6", "--n_unseen=4"])])
def test_scripts(script, optimizer, own, tmp_path, monkeypatch):
    """Two steps by "torch", two more on resume by "triton": as four by "torch"."""
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 200)
    own = own + [f"--dataset={tmp_path / 'text.txt'}"] if script == "train_enwik8" else own

    def run(name, *more):
        monkeypatch.setattr(sys, "argv", [
            f"{script}.py", "--out_dir", str(tmp_path), "--device=cpu", "--dtype=float32", "--n_layer=1", "--n_embd=16",
            "--n_head=2", "--batch_size=4", "--warmup_steps=1", "--eval_interval=none", "--save_interval=1",
            "--log_interval=1", "--grad_clip=0.5", "--schedule=constant", "--orthograd", *own,
            f"--optimizer={optimizer}", f"--run_name={name}", *more])
        with watched() as calls:
            fresh(f"{script}.py")["main"]()
        return [(given[4], how["orthograd"]) for given, how in calls.get("adamw_step", ())]
    assert run("whole", "--max_steps=4") == run("run", "--max_steps=2") == []
    assert run("run", "--max_steps=4", "--kernels=triton", "--resume") == [(3, True), (4, True)]
    ours, theirs = (torch.load(tmp_path / script / name / "last.pt", weights_only=True) for name in ("run", "whole"))
    assert ours["step"] == theirs["step"] == 4 and ours["settings"]["kernels"] == "triton"
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for name, p in theirs["model"].items():  # but for few whose gradient is rounding: Adam makes a step of it
        away = ours["model"][name] - p
        assert (away.abs() > 1e-4 + 1e-3 * p.abs()).sum() <= 1 + 0.002 * p.numel(), name
        assert away.norm() <= 1e-3 + 1e-3 * p.norm(), name


# --- On a GPU ---

@pytest.mark.gpu
@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_on_a_gpu(name, orthograd, launches):
    setups = [Setup(name, which, device="cuda", orthograd=orthograd).train(range(6)) for which in ("torch", "triton")]
    assert_same(*setups, dict(atol=1e-2, rtol=1e-2) if name == "muon" else dict(atol=1e-5, rtol=1e-4))
    assert len(launches) == 6
