"""nanolab/optim.py: rules against torch's, exact continuation, OrthoGrad, groups, schedules, EMA: about 10 s."""
import copy
import math

import pytest
import torch

from nanolab import optim

SHAPES = [(12, 7), (5,), (3, 4, 5), (1,), (16, 16)]
MATRICES = [(16, 16), (48, 16), (16, 64), (16, 64), (64, 16), (7, 33)]


def tensors(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).mul(0.3).to(dtype)) for shape in shapes]


def set_grads(params, step, skip=()):
    """The same gradients for the same step, some of them None."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 1)
        p.grad = None if i in skip else grad.to(p.dtype)


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def run_both(ours, theirs, a, b, steps, skip=lambda step: ()):
    for step in range(steps):
        for params, optimizer in ((a, ours), (b, theirs)):
            set_grads(params, step, skip(step))
            optimizer.step()


# --- Against torch ---

@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_and_adamw_are_torchs(name, betas, weight_decay):
    a, b = tensors(SHAPES), tensors(SHAPES)
    settings = dict(lr=3e-3, betas=betas, weight_decay=weight_decay)
    run_both(getattr(optim, name)(a, **settings), getattr(torch.optim, name)(b, **settings), a, b, 25)
    assert difference(a, b) < 1e-6
    assert difference(a, tensors(SHAPES)) > 1e-2


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_memory_in_another_order_changes_nothing(name):
    """torch's fused operation reads weights, gradients and state as if they lay in memory alike."""
    plain, turned = tensors(SHAPES[:1]), tensors(SHAPES[:1])
    ours = [getattr(optim, name)(params, lr=3e-3, weight_decay=0.1) for params in (plain, turned)]
    for step in range(4):
        set_grads(plain, step), set_grads(turned, step)
        if step % 2:
            turned[0].grad = turned[0].grad.t().contiguous().t()
        for optimizer in ours:
            optimizer.step()
    assert difference(plain, turned) < 1e-6


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_in_float64_large_eps_and_skipped_gradients(name):
    """A parameter without a gradient is left alone, and later corrected for the steps that it did take."""
    a, b = tensors(SHAPES, dtype=torch.float64), tensors(SHAPES, dtype=torch.float64)
    settings = dict(lr=1e-2, eps=1e-2, weight_decay=0.1)
    ours, theirs = getattr(optim, name)(a, **settings), getattr(torch.optim, name)(b, **settings)
    run_both(ours, theirs, a, b, 20, skip=lambda step: (0, 2) if step < 5 or step == 9 else ())
    assert difference(a, b) < 1e-12
    assert ours.state[a[0]]["step"] == 14 and ours.state[a[1]]["step"] == 20


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_parameter_without_gradient_is_skipped(name):
    params = tensors([(4, 4), (4, 6)])
    optimizer = {"sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon}[name](
        params, lr=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0, skip=(0,))
    optimizer.step()
    assert torch.equal(params[0], before[0]) and params[0] not in optimizer.state
    assert not torch.equal(params[1], before[1])
    set_grads(params, 0, skip=(0, 1))
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("settings", [dict(), dict(momentum=0.99), dict(momentum=0.9, nesterov=True, weight_decay=0.1)])
def test_sgd_is_torchs(settings):
    a, b = tensors(SHAPES), tensors(SHAPES)
    run_both(optim.SGD(a, lr=1e-3, **settings), torch.optim.SGD(b, lr=1e-3, **settings), a, b, 25)
    assert difference(a, b) < 1e-6
    assert difference(a, tensors(SHAPES)) > 1e-3


def test_long_lists_are_stepped_in_runs_that_lose_nobody(monkeypatch):
    a, b = tensors(SHAPES), tensors(SHAPES)
    monkeypatch.setattr(optim, "RUN", 70)
    assert [len(run) for run in optim._runs(a, 70)] == [1, 3, 1]
    mixed = a + tensors([(2,)], dtype=torch.float64)
    assert [len(run) for run in optim._runs(mixed, math.inf)] == [5, 1]
    run_both(optim.AdamW(a), torch.optim.AdamW(b), a, b, 5)
    assert difference(a, b) < 1e-6


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(adjust_lr, nesterov, monkeypatch):
    monkeypatch.setattr(optim, "_iteration_dtype", lambda device: torch.bfloat16)  # torch's, whatever the machine
    a, b = tensors(MATRICES), tensors(MATRICES)
    settings = dict(lr=0.02 if adjust_lr == "original" else 0.005, momentum=0.95, weight_decay=0.1, nesterov=nesterov)
    ours = optim.Muon(a, adjust_lr=adjust_lr, **settings)
    run_both(ours, torch.optim.Muon(b, adjust_lr_fn=adjust_lr, **settings), a, b, 10)
    assert difference(a, b) < 1e-3
    assert difference(a, tensors(MATRICES)) > 2e-2


def test_muon_in_float32_is_torchs_but_for_its_rounding(monkeypatch):
    monkeypatch.setattr(optim, "_iteration_dtype", lambda device: torch.float32)
    a, b = tensors(MATRICES), tensors(MATRICES)
    settings = dict(lr=2e-3, weight_decay=0.1)
    run_both(optim.Muon(a, **settings), torch.optim.Muon(b, **settings), a, b, 10)
    assert difference(a, b) < 1e-3
    assert difference(a, tensors(MATRICES)) > 5e-3


def test_muon_takes_fused_matrices_apart():
    (fused,), parts = tensors([(12, 8)]), tensors([(6, 8), (3, 8), (3, 8)])
    with torch.no_grad():
        fused.copy_(torch.cat(parts))
    together, apart = optim.Muon([dict(params=[fused], rows=(6, 3, 3))]), optim.Muon(parts)
    for step in range(3):
        set_grads([fused], step)
        for p, grad in zip(parts, fused.grad.split((6, 3, 3))):
            p.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.allclose(fused, torch.cat(parts), atol=1e-6)
    with pytest.raises(ValueError, match="add up"):
        optim.Muon([dict(params=[fused], rows=(6, 3, 2))])


def test_muon_refuses_other_than_matrices():
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="2-D"):
            optim.Muon(tensors([(4, 4), shape]))


# --- Newton-Schulz ---

def exact(x, steps=5):
    """The quintic applied to the singular values themselves."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (64, 16), (2, 20, 30)])
def test_newton_schulz_maps_singular_values_by_the_quintic(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (optim.orthogonalize(x, dtype=torch.float64) - exact(x)).abs().max() < 1e-9
    assert (optim.orthogonalize(x.float(), dtype=torch.float32) - exact(x)).abs().max() < 1e-4
    assert (optim.orthogonalize(x.float(), dtype=torch.bfloat16) - exact(x)).abs().max() < 0.05
    assert (optim.orthogonalize(x.float() * 1e-3, steps=2, dtype=torch.float32) - exact(x, 2)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_in_the_band(dtype):
    generator = torch.Generator().manual_seed(2)
    wide, square = torch.randn(8, 32, 128, generator=generator), torch.randn(8, 64, 64, generator=generator)
    values = torch.linalg.svdvals(optim.orthogonalize(wide, dtype=dtype))
    assert 0.5 <= values.min() and values.max() <= 1.25
    assert torch.equal(optim.orthogonalize(wide.mT, dtype=dtype), optim.orthogonalize(wide, dtype=dtype).mT)
    assert torch.linalg.svdvals(optim.orthogonalize(square, dtype=dtype)).max() <= 1.25  # tiny ones stay under the band


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_survives_low_rank_and_zero(dtype):
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(32, 2, generator=generator) @ torch.randn(2, 128, generator=generator)
    values = torch.linalg.svdvals(optim.orthogonalize(low, dtype=dtype))
    assert 0.5 <= values[1] and values[0] <= 1.25
    assert values[2] < (0.5 if dtype == torch.bfloat16 else 1e-3)  # the other 30 are 0 but for rounding, 485 times
    assert torch.equal(optim.orthogonalize(torch.zeros(4, 8), dtype=dtype), torch.zeros(4, 8))


# --- One optimiser for a whole model, its groups, its state ---

class Tiny(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


ROLES = {"embed.weight": "embedding", "up.weight": "matrix", "up.bias": "bias", "down.weight": "residual",
         "down.bias": "bias", "norm.weight": "gain", "norm.bias": "bias", "head.weight": "head"}
NAMES = ["sgd", "adam", "adamw", "muon", "schedule_free", "ivon"]


def build(model, name, **more):
    settings = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), muon_lr=0.05, momentum=0.9, ess=1e3)
    own = dict(fused_rows=more.pop("fused_rows", None), mesh=more.pop("mesh", None))
    return optim.build({**settings, **more, "optimizer": name}, model.named_parameters(), ROLES, **own)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * optim.schedule("cosine", step, 3, 20)
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))  # (B, T)
        torch.manual_seed(step)
        optimizer.zero_grad()
        with optimizer.sampled():
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_state_continues_bit_for_bit(name, orthograd, tmp_path):
    whole = Tiny()
    optimizer = build(whole, name, orthograd=orthograd)
    reference = train(whole, optimizer, 12)
    assert reference[-1] < reference[0]

    model = Tiny()
    optimizer = build(model, name, orthograd=orthograd)
    losses = train(model, optimizer, 5)
    with optimizer.averaged():
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / "last.pt")
    for load in (optim.load_state, lambda optimizer, state: optimizer.load_state_dict(state)):
        saved = torch.load(tmp_path / "last.pt", weights_only=True)
        model = Tiny(seed=5)
        optimizer = build(model, name, orthograd=orthograd)
        model.load_state_dict(saved["model"])
        load(optimizer, saved["optimizer"])
        assert losses + train(model, optimizer, 7, first=5) == reference
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters()))


def test_load_state_keeps_what_the_command_asked_for():
    model = Tiny()
    saved = build(model, "adamw")
    train(model, saved, 2)
    other = build(model, "adamw", lr=5e-4, weight_decay=0.3)
    optim.load_state(other, copy.deepcopy(saved.state_dict()))
    assert {g["base_lr"] for g in other.param_groups} == {5e-4}
    assert {g["weight_decay"] for g in other.param_groups} == {0.0, 0.3}
    assert other.state[model.up.weight]["step"] == 2
    with pytest.raises(ValueError, match="muon"):
        optim.load_state(build(model, "muon"), saved.state_dict())


@pytest.mark.parametrize("moments", [torch.zeros(3), 3, {"step": 2, "exp_avg": None}, {"exp_avg": torch.zeros(())},
                                     {"exp_avg": torch.eye(6).to_sparse()}], ids=str)
def test_load_state_refuses_what_is_no_state_of_the_parameter(moments):
    """torch compares none of it: the next step would end in a traceback, or write past a tensor's end."""
    model = Tiny()
    saved = build(model, "adamw")
    train(model, saved, 2)
    state = saved.state_dict()
    state["state"][0] = moments
    with pytest.raises(ValueError, match="not one of that shape"):
        optim.load_state(build(model, "adamw"), state)


@pytest.mark.parametrize("orthograd", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_another_decay_takes_a_checkpoint_over(name, orthograd):
    """From 0 and to 0; and from a weight_decay of 0 as it was once saved, where what decays and what does not was one
    group. The state goes to its own parameter, the rate of the last step stays, what was typed counts."""
    def by_value(model):
        made, merged = build(model, name, weight_decay=0.0, fused_rows={"up.weight": (8, 16)}), {}
        for p in model.parameters():
            group = next(g for g in made.param_groups if any(p is q for q in g["params"]))
            key = group["rule"], group.get("rows")
            merged.setdefault(key, {**group, "params": []})["params"].append(p)
        return type(made)(list(merged.values()))

    def by_name(model, optimizer):
        return {n: optimizer.state[p] for n, p in model.named_parameters()}

    for make, decay in ((by_value, 0.0), (by_value, 0.1), *((lambda m, d=d: build(
            m, name, weight_decay=d, fused_rows={"up.weight": (8, 16)}), 0.1 - d) for d in (0.0, 0.1))):
        old, new = Tiny(), Tiny()
        source = make(old)
        train(old, source, 5)
        new.load_state_dict(old.state_dict())
        target = build(new, name, weight_decay=decay, orthograd=orthograd, fused_rows={"up.weight": (8, 16)})
        optim.load_state(target, copy.deepcopy(source.state_dict()))
        found, wanted = by_name(new, target), by_name(old, source)
        assert wanted["up.weight"] and all(found[n].keys() == wanted[n].keys() for n in wanted)
        assert all(torch.equal(torch.as_tensor(found[n][key]), torch.as_tensor(wanted[n][key]))
                   for n in wanted for key in wanted[n])
        assert {g["weight_decay"] for g in target.param_groups} == {0.0, decay}
        assert {g["lr"] for g in target.param_groups} == {g["lr"] for g in source.param_groups}
        assert all(g["lr"] < g["base_lr"] for g in target.param_groups)
        train(new, target, 2, first=5)
        if decay == 0 and make is by_value and name != "ivon" and not orthograd:     # ivon draws group by group
            train(old, source, 2, first=5)
            assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))


def test_groups_decay_only_where_it_belongs():
    model = Tiny()
    found = optim.groups(model.named_parameters(), ROLES, 0.1)
    decayed = {id(p) for p in (model.up.weight, model.down.weight, model.head.weight)}
    assert {g["weight_decay"]: {id(p) for p in g["params"]} for g in found} == {
        0.1: decayed, 0.0: {id(p) for p in model.parameters()} - decayed}
    assert sum(len(g["params"]) for g in found) == len(list(model.parameters()))


def test_positions_have_no_decay_and_roles_cover_all():
    assert set(optim.DECAYED) == {"matrix", "residual", "head"} and set(optim.HIDDEN) == {"matrix", "residual"}
    for role in optim.ROLES:
        (group,) = optim.groups([("p", torch.nn.Parameter(torch.ones(2, 2)))], {"p": role}, 0.5)
        assert group["weight_decay"] == (0.5 if role in ("matrix", "residual", "head") else 0.0), role


def test_muon_steps_hidden_matrices_and_adamw_the_rest():
    model = Tiny()
    optimizer = build(model, "muon", fused_rows={"up.weight": (8, 16)}, muon_momentum=0.8)
    by_rule = {}
    for group in optimizer.param_groups:
        by_rule.setdefault((group["rule"], group["base_lr"]), set()).update(id(p) for p in group["params"])
    hidden = {id(model.up.weight), id(model.down.weight)}
    assert by_rule == {("muon", 0.05): hidden, ("adamw", 1e-2): {id(p) for p in model.parameters()} - hidden}
    (fused,) = [g for g in optimizer.param_groups if "rows" in g]
    assert fused["rows"] == (8, 16) and fused["params"] == [model.up.weight] and fused["momentum"] == 0.8
    other, theirs = Tiny(), Tiny()  # what is under adamw moves as under AdamW alone
    optimizer, reference = build(other, "muon"), torch.optim.AdamW(
        [dict(params=[theirs.head.weight], weight_decay=0.1), dict(params=[theirs.embed.weight])], lr=1e-2,
        betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        for params in (list(other.parameters()), list(theirs.parameters())):
            set_grads(params, step)
        optimizer.step()
        reference.step()
    assert difference([other.head.weight, other.embed.weight], [theirs.head.weight, theirs.embed.weight]) < 1e-6


def test_groups_refuse_what_is_not_claimed_once():
    model = Tiny()
    with pytest.raises(ValueError, match="norm.bias.*unclaimed"):
        optim.groups(model.named_parameters(), {k: v for k, v in ROLES.items() if k != "norm.bias"}, 0.1)
    with pytest.raises(ValueError, match="norm.bias.*'offset'"):
        optim.groups(model.named_parameters(), {**ROLES, "norm.bias": "offset"}, 0.1)
    with pytest.raises(ValueError, match="up.weight.*twice"):
        optim.groups([*model.named_parameters(), ("up.weight", torch.nn.Parameter(torch.ones(2, 2)))], ROLES, 0.1)
    with pytest.raises(ValueError, match="up.bias.*2-D"):
        optim.groups(model.named_parameters(), {**ROLES, "up.bias": "matrix"}, 0.1, muon=True)
    with pytest.raises(ValueError, match="sgd, adam, adamw, muon"):
        build(model, "lion")


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_a_tied_tensor_is_claimed_once(remove_duplicate):
    model = Tiny()
    model.head.weight = model.embed.weight
    pairs = list(model.named_parameters(remove_duplicate=remove_duplicate))
    claimed = [p for group in optim.groups(pairs, ROLES, 0.1) for p in group["params"]]
    assert len(claimed) == len(list(model.parameters())) == len({id(p) for p in claimed})
    if not remove_duplicate:  # claimed by either name
        roles = {name: role for name, role in ROLES.items() if name != "embed.weight"}
        claimed = [p for group in optim.groups(pairs, roles, 0.1) for p in group["params"]]
        assert sum(p is model.embed.weight for p in claimed) == 1


@pytest.mark.parametrize("make, words", [
    (lambda p: optim.SGD(p, lr=-1.0), "lr"), (lambda p: optim.AdamW(p, betas=(0.9, 1.0)), "betas"),
    (lambda p: optim.SGD(p, nesterov=True), "nesterov"), (lambda p: optim.Muon(p, adjust_lr="best"), "adjust_lr"),
    (lambda p: optim.Adam(p, eps=-1e-8), "eps"), (lambda p: optim.SGD(p, momentum=1.0), "momentum"),
    (lambda p: optim.Muon([dict(params=p, rule="lamb")]), "lamb"),
    (lambda p: optim.AdamW(p, weight_decay=math.nan), "weight_decay")])
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(tensors([(4, 4)]))


def test_unknown_settings_are_refused_and_closures_run():
    with pytest.raises(TypeError, match="momentum"):
        optim.AdamW(tensors([(4, 4)]), momentum=0.9)
    (p,) = tensors([(4,)])
    optimizer = optim.OrthoGrad(optim.SGD([p], lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        return loss
    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


# --- OrthoGrad ---

@pytest.mark.parametrize("shape", [(64,), (16, 48), (8, 4, 6)])
def test_orthograd_is_orthogonal_and_keeps_the_norm(shape):
    for seed in range(20):
        params, grads = tensors([shape, shape], seed), [p.detach() for p in tensors([shape, shape], seed + 99)]
        for p, g, new in zip(params, grads, optim._project(params, grads)):
            p, g, new = p.detach().double(), g.double(), new.double()
            assert (p * new).sum().abs() <= 1e-6 * p.norm() * new.norm()
            assert abs(new.norm() / g.norm() - 1) < 1e-6
            assert (new * g).sum() > 0.5 * g.norm() ** 2  # still the gradient, but for its part along p


def test_orthograd_leaves_zero_weights_and_scalars_alone_and_drops_a_parallel_gradient():
    zero, scalar, grads = torch.zeros(3, 4), torch.tensor([2.0]), tensors([(3, 4), (1,)])
    new = optim._project([zero, scalar], grads)
    assert torch.allclose(new[0], grads[0], rtol=1e-6, atol=0) and torch.equal(new[1], grads[1])
    for seed, w in enumerate(tensors([(50,)] * 20)):
        (new,) = optim._project([w], [w.detach() * (seed - 3.1)])  # what is left is rounding: not to be blown up
        assert not new.any()
        (new,) = optim._project([w], [torch.zeros(50)])
        assert not new.any()


@pytest.mark.parametrize("name", NAMES)
def test_orthograd_steps_the_base_by_the_projected_gradient(name):
    """The same as projecting by hand and stepping the base; p.grad stays the raw gradient."""
    a, b = Tiny(), Tiny()
    ours, base = build(a, name, orthograd=True), build(b, name)
    for step in range(4):
        set_grads(list(a.parameters()), step, skip=(1,))
        set_grads(list(b.parameters()), step, skip=(1,))
        raw = [None if p.grad is None else p.grad.clone() for p in a.parameters()]
        for p in b.parameters():
            if p.grad is not None:
                w, g = p.detach(), p.grad
                new = g - (w * g).sum() / (w * w).sum() * w
                p.grad = new * g.norm() / new.norm()
        ours.step()
        base.step()
        assert all(g is p.grad or torch.equal(g, p.grad) for p, g in zip(a.parameters(), raw))
    bound = 5e-3 if name == "muon" else 1e-5  # bfloat16 magnifies the rounding of the projection
    assert difference(a.parameters(), b.parameters()) < bound
    assert difference(a.parameters(), Tiny().parameters()) > 1e-2


def test_schedulers_hooks_and_groups_reach_the_base_of_orthograd():
    params = tensors([(4, 4)])
    base = optim.AdamW(params, lr=1e-2)
    wrapper = optim.OrthoGrad(base)
    assert isinstance(wrapper, torch.optim.Optimizer) and wrapper.param_groups is base.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapper, lambda step: 0.5 ** step)
    set_grads(params, 0)
    wrapper.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == 5e-3
    before = params[0].detach().clone()
    wrapper.param_groups[0]["lr"] = 0.0
    wrapper.step()
    assert torch.equal(params[0], before)
    more = tensors([(3,)])
    wrapper.add_param_group(dict(params=more, lr=1.0))
    assert base.param_groups[1]["rule"] == "adamw" and base.param_groups[1]["lr"] == 1.0
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert wrapper.param_groups is base.param_groups and wrapper.state is base.state and len(base.state) == 1
    wrapper.zero_grad()
    assert params[0].grad is None
    with pytest.raises(ValueError, match="SGD"):
        optim.OrthoGrad(torch.optim.SGD(params))


# --- Schedules ---

@pytest.mark.parametrize("name, step, factor", [
    ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 10 ** 9, 1.0),
    ("noam", 0, 0.1), ("noam", 4, 0.5), ("noam", 9, 1.0), ("noam", 39, 0.5), ("noam", 999, 0.1),
    ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 60, 0.6), ("cosine", 110, 0.2),
    ("cosine", 35, 0.2 + 0.4 * (1 + math.sqrt(0.5))), ("cosine", 10 ** 6, 0.2),
    ("wsd", 0, 0.1), ("wsd", 9, 1.0), ("wsd", 66, 1.0), ("wsd", 88, 0.6), ("wsd", 99, 0.4), ("wsd", 110, 0.2),
    ("wsd", 500, 0.2)])
def test_schedules_at_named_steps(name, step, factor):
    for _ in range(2):  # nothing is remembered
        scale = optim.schedule(name, step, 10, 110, min_scale=0.2, decay_fraction=0.4)
        assert scale == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules_are_continuous_with_peak_one(name, warmup):
    values = [optim.schedule(name, step, warmup, 200) for step in range(260)]
    assert max(values) == 1.0 and values[max(warmup - 1, 0)] == 1.0 and min(values) >= 0
    jumps = [abs(a - b) for a, b in zip(values[max(warmup - 1, 0):], values[max(warmup, 1):])]
    assert max(jumps) < (0.3 if name == "noam" and warmup < 2 else 0.07)
    assert all(b > a for a, b in zip(values[:warmup - 1], values[1:warmup]))
    assert values[200] == (0.0 if name in ("cosine", "wsd") else values[200]) and values[199] > 0


def test_wsd_with_fraction_one_falls_from_the_end_of_the_warm_up():
    values = [optim.schedule("wsd", step, 10, 110, decay_fraction=1.0) for step in range(111)]
    assert values[10:] == pytest.approx([1 - i / 100 for i in range(101)])
    assert optim.schedule("wsd", 99, 10, 100, decay_fraction=0.0) == 1.0


def test_schedules_refuse_what_they_cannot_do():
    for name in ("cosine", "wsd"):
        with pytest.raises(ValueError, match=f"{name}.*max_steps"):
            optim.schedule(name, 0, 10, None)
    for name in ("constant", "noam"):
        assert optim.schedule(name, 9, 10, None) == 1.0
    with pytest.raises(ValueError, match="constant, noam, cosine, wsd"):
        optim.schedule("linear", 0, 10, 100)


def test_noam_is_the_papers():
    peak = (512 * 4000) ** -0.5
    assert peak == pytest.approx(6.99e-4, rel=1e-3)
    for s in (1, 100, 4000, 20000):  # equation 3
        paper = 512 ** -0.5 * min(s ** -0.5, s * 4000 ** -1.5)
        assert peak * optim.schedule("noam", s - 1, 4000, None) == pytest.approx(paper)


# --- Moving average ---

def test_ema_is_the_recurrence():
    model = Tiny()
    ema, expected = optim.EMA(model, 0.5), [p.detach().clone() for p in model.parameters()]
    optimizer = build(model, "adamw")
    for t in range(12):
        train(model, optimizer, 1, first=t)
        ema.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
    assert difference(ema.weights.values(), expected) < 1e-6
    assert difference(ema.weights.values(), model.parameters()) > 1e-3


def test_ema_swaps_in_place_and_restores_also_after_an_error():
    model = Tiny()
    ema = optim.EMA(model, 0.9)
    train(model, build(model, "adamw"), 3)
    ema.update()
    raw, kept = [p.detach().clone() for p in model.parameters()], list(model.parameters())
    with pytest.raises(KeyError):
        with ema.swapped():
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ema.weights.values()))
            assert not torch.equal(model.head.weight, raw[-1])
            raise KeyError("in the middle of an evaluation")
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), kept, raw))
    assert all(p.requires_grad for p in model.parameters()) and not any(w.requires_grad for w in ema.weights.values())


def test_ema_state_round_trip_is_exact(tmp_path):
    model = Tiny()
    ema, optimizer = optim.EMA(model, 0.9), build(model, "sgd")
    for t in range(3):
        train(model, optimizer, 1, first=t)
        ema.update()
    torch.save(dict(ema=ema.state_dict(), model=model.state_dict()), tmp_path / "last.pt")
    saved, other = torch.load(tmp_path / "last.pt", weights_only=True), Tiny(seed=3)
    other.load_state_dict(saved["model"])
    loaded = optim.EMA(other, 0.9)
    loaded.load_state_dict(saved["ema"])
    ema.update()
    loaded.update()
    assert loaded.updates == 4
    assert all(torch.equal(a, b) for a, b in zip(ema.weights.values(), loaded.weights.values()))
    loaded.copy_to_model()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ema.weights.values()))
    del saved["ema"]["weights"]["up.bias"]
    with pytest.raises(ValueError, match="up.bias"):
        loaded.load_state_dict(saved["ema"])
    with pytest.raises(ValueError, match="ema_decay"):
        optim.EMA(model, 1.0)


# --- Schedule-free ---

def quadratic(p, step):
    """A noisy loss around 1 for a parameter of any shape."""
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
    return ((p - 1 + noise) ** 2).sum()


def test_schedule_free_averages_every_iterate_at_a_constant_rate():
    """At constant lr without warm-up x is the running mean of z, and gradients are taken at y between the two."""
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = optim.ScheduleFree([p], lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)
    zs = []
    for step in range(40):
        optimizer.zero_grad()
        quadratic(p, step).backward()
        optimizer.step()
        zs.append(optimizer.state[p]["z"].clone())
        x = torch.stack(zs).mean(0)
        assert (optimizer.state[p]["x"] - x).abs().max() < 1e-12
        assert (p - (0.1 * zs[-1] + 0.9 * x)).abs().max() < 1e-12
    with optimizer.averaged():
        assert (p - x).abs().max() < 1e-12


def test_schedule_free_by_hand():
    """Two steps with a warm-up, written out: c = lr^2 / sum of lr^2, weight decay at y."""
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optim.ScheduleFree([p], lr=1.0, betas=(0.5, 0.75), weight_decay=0.1, eps=0.0)
    y = z = x = 2.0
    v = total = 0.0
    for t, lr in enumerate((0.1, 0.3), 1):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (p ** 2).sum().backward()
        optimizer.step()
        g = 2 * y
        v = 0.75 * v + 0.25 * g * g
        z -= lr * (g / math.sqrt(v / (1 - 0.75 ** t)) + 0.1 * y)
        total += lr ** 2
        x += lr ** 2 / total * (z - x)
        y = 0.5 * z + 0.5 * x
        assert abs(p.item() - y) < 1e-12


def test_averaged_is_undone_bit_for_bit_also_after_an_error():
    params = tensors(SHAPES)
    optimizer = optim.OrthoGrad(optim.ScheduleFree(params, lr=0.02))
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="stop"):
        with optimizer.averaged():
            assert difference(params, before) > 1e-3
            with pytest.raises(RuntimeError, match="averaged"):
                optimizer.step()
            raise RuntimeError("stop")
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    with optim.AdamW(params).averaged():  # nothing to average
        assert all(torch.equal(p, old) for p, old in zip(params, before))


# --- IVON ---

def test_ivon_finds_the_curvature_and_the_minimum_of_a_quadratic():
    """0.5 h0 w^2: hess -> h0, w -> 0, and draws spread by 1 / sqrt(ess (h + weight_decay))."""
    torch.manual_seed(0)
    h0, ess, decay = 3.0, 200.0, 1e-3
    p = torch.nn.Parameter(torch.ones(2000))
    optimizer = optim.IVON([p], lr=0.1, betas=(0.9, 0.99), weight_decay=decay, ess=ess, hess_init=1.0)
    for _ in range(600):
        optimizer.zero_grad()
        with optimizer.sampled():
            (0.5 * h0 * p ** 2).sum().backward()
        optimizer.step()
    assert abs(optimizer.state[p]["hess"].mean().item() / h0 - 1) < 0.1
    assert p.detach().abs().mean() < 0.05
    optimizer.state[p]["hess"].fill_(h0)
    draws = []
    for _ in range(50):
        with optimizer.sampled(train=False):
            draws.append(p.detach().clone())
    spread = torch.stack(draws).std(0).mean().item()
    assert abs(spread * math.sqrt(ess * (h0 + decay)) - 1) < 0.02


def test_sampled_restores_the_mean_also_after_an_error_and_notes_nothing_then():
    params = tensors(SHAPES)
    optimizer = optim.IVON(params, ess=10.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="stop"):
        with optimizer.sampled():
            assert difference(params, before) > 0.1
            sum((p ** 2).sum() for p in params).backward()
            raise RuntimeError("stop")
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert not any("noise_grad" in optimizer.state[p] for p in params)


def test_ivon_by_hand_with_two_samples_a_step():
    """Two samples, each with half of the loss, are one step with the means of g and of noise * g."""
    p = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
    optimizer = optim.IVON([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, ess=20.0, hess_init=0.7, clip_radius=0.6)
    w, h, m = p.detach().clone(), torch.full((2,), 0.7, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t in range(1, 4):
        optimizer.zero_grad()
        torch.manual_seed(t)
        for _ in range(2):
            with optimizer.sampled():
                (0.5 * (p ** 4).sum()).backward()
        optimizer.step()
        torch.manual_seed(t)
        noises = [torch.randn(2, dtype=torch.float64) / (20 * (h + 0.01)).sqrt() for _ in range(2)]
        grads = [4 * (w + noise) ** 3 / 2 for noise in noises]
        m = 0.9 * m + 0.1 * sum(grads)
        f = 20 * sum(noise * g for noise, g in zip(noises, grads)) * (h + 0.01)
        h = 0.99 * h + 0.01 * f + 0.5 * 0.01 ** 2 * (h - f) ** 2 / (h + 0.01)
        step = ((m / (1 - 0.9 ** t) + 0.01 * w) / (h + 0.01)).clamp(-0.6, 0.6)
        w = w - 0.1 * 0.71 * step
        assert (optimizer.state[p]["hess"] - h).abs().max() < 1e-12
        assert (p - w).abs().max() < 1e-12


# --- Grokking: what OrthoGrad is for ---

def modular_addition(seed, p=113, share=0.4):
    """One-hot pairs (a, b) and a + b mod p, split at random: (train x, train y, test x, test y)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    x = torch.nn.functional.one_hot(pairs, p).flatten(1).float()
    y, n = pairs.sum(1) % p, int(share * len(pairs))
    return x[:n], y[:n], x[n:], y[n:]


def grok(seed, steps, orthograd, stop_at=2.0):
    """(first step with test accuracy of stop_at, or None, last train and test accuracy) of a bias-free MLP."""
    x, y, test_x, test_y = modular_addition(seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(226, 200, bias=False), torch.nn.ReLU(),
                                torch.nn.Linear(200, 200, bias=False), torch.nn.ReLU(),
                                torch.nn.Linear(200, 113, bias=False))
    optimizer = optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)
    optimizer = optim.OrthoGrad(optimizer) if orthograd else optimizer

    @torch.no_grad()
    def accuracy(inputs, wanted):
        return (model(inputs).argmax(1) == wanted).float().mean().item()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 10 == 0 and accuracy(test_x, test_y) >= stop_at:
            return step, accuracy(x, y), accuracy(test_x, test_y)
    return None, accuracy(x, y), accuracy(test_x, test_y)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_orthograd_generalises_without_weight_decay(seed):
    """Prieto et al. 2025, figure 1: modular addition, no weight decay; test accuracy >= .99 by step 250."""
    step, _, test = grok(seed, 250, orthograd=True, stop_at=0.99)
    assert step is not None, f"test accuracy {test} after 250 steps"


def test_adamw_without_weight_decay_memorises():
    """In more steps than OrthoGrad needs."""
    _, train, test = grok(0, 300, orthograd=False)
    assert train == 1.0 and test <= 0.05
