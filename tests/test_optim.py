"""nanolab/optim.py: every rule of RULES is its formula, goes on bit for bit from its state, skips,
restores and refuses; OrthoGrad, groups, schedules, moving averages."""
import copy
import math

import pytest
import torch

from nanolab import optim

SHAPES = [(12, 7), (5,), (3, 4, 5), (1,), (16, 16)]
MATRICES = [(16, 16), (48, 16), (16, 64), (16, 64), (64, 16), (7, 33)]
CLASSES = {kind.rule: kind for kind in optim._Optimizer.__subclasses__()}
every_rule = pytest.mark.parametrize("rule", optim.RULES)


def tensors(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).mul(0.3).to(dtype)) for shape in shapes]


def of_rule(rule, params, **settings):
    return CLASSES[rule](params, **{"lr": 0.02, "weight_decay": 0.1, **settings})


def shapes_of(rule):
    return MATRICES if rule == "muon" else SHAPES


def set_grads(params, step, skip=()):
    """The same gradients for the same step, some of them None."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 1)
        p.grad = None if i in skip else grad.to(p.dtype)


def copies(params):
    return [p.detach().clone() for p in params]


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def run(optimizer, params, steps, skip=lambda step: (), first=0):
    """So many steps, each with another rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(first, first + steps):
        set_grads(params, step, skip(step))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (0.5, 1.0, 0.3)[step % 3]
        optimizer.step()


# --- The rules' formulas ---

class SlowScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024, tensor by tensor."""

    def __init__(self, params, lr, betas, weight_decay=0.0, eps=1e-8, power=2.0):
        super().__init__(params, dict(lr=lr))
        self.betas, self.decay, self.eps, self.power = betas, weight_decay, eps, power

    @torch.no_grad()
    def step(self):
        lr, (beta1, beta2) = self.param_groups[0]["lr"], self.betas
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            s = self.state[p] = self.state[p] or dict(t=0, v=0.0, z=p.clone(), x=p.clone(), largest=0.0, total=0.0)
            s["t"] += 1
            s["v"] = beta2 * s["v"] + (1 - beta2) * p.grad ** 2
            s["z"] = s["z"] - lr * (p.grad / ((s["v"] / (1 - beta2 ** s["t"])) ** 0.5 + self.eps) + self.decay * p)
            s["largest"] = max(s["largest"], lr)
            s["total"] += s["largest"] ** self.power
            s["x"] = s["x"] + s["largest"] ** self.power / s["total"] * (s["z"] - s["x"])
            p.copy_((1 - beta1) * s["z"] + beta1 * s["x"])


ADAMS = [dict(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0), dict(lr=3e-3, betas=(0.0, 0.5), weight_decay=0.1),
         dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-2)]
FORMULAS = {
    "sgd": (torch.optim.SGD, [dict(lr=1e-3), dict(lr=1e-3, momentum=0.99), dict(
        lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1)]),
    "adam": (torch.optim.Adam, ADAMS),
    "adamw": (torch.optim.AdamW, ADAMS),
    "schedule_free": (SlowScheduleFree, [*ADAMS, dict(lr=0.01, betas=(0.9, 0.9), power=0.5)])}


def test_every_rule_is_beside_a_formula():
    assert CLASSES.keys() == optim.STEPS.keys() == optim.RULES.keys() == {*FORMULAS, "muon", "ivon"}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rule, settings", [(rule, settings) for rule in FORMULAS for settings in FORMULAS[rule][1]])
def test_a_rule_is_its_formula(rule, settings, dtype, bound, monkeypatch):
    """Also where a parameter had no gradient for a while, of whose own steps it is then corrected, and, in float64,
    where long lists are stepped a few tensors at a time."""
    monkeypatch.setattr(optim, "RUN", 70 if dtype == torch.float64 else 2 ** 17)
    a, b = tensors(SHAPES, dtype=dtype), tensors(SHAPES, dtype=dtype)
    for optimizer, params in ((CLASSES[rule](a, **settings), a), (FORMULAS[rule][0](b, **settings), b)):
        run(optimizer, params, 20, skip=lambda step: (0, 2) if step < 5 or step == 9 else ())
    assert difference(a, b) < bound and difference(a, tensors(SHAPES)) > 1e-3


def test_runs_lose_nobody():
    params = tensors(SHAPES)
    assert [len(run) for run in optim._runs(params, 70)] == [1, 3, 1]
    assert [len(run) for run in optim._runs(params + tensors([(2,)], dtype=torch.float64), math.inf)] == [5, 1]


@pytest.mark.parametrize("nesterov, adjust_lr, dtype, lr, least", [
    (True, "original", torch.bfloat16, 0.02, 2e-2), (False, "original", torch.bfloat16, 0.02, 2e-2),
    (True, "match_rms_adamw", torch.bfloat16, 0.005, 2e-2), (False, "match_rms_adamw", torch.bfloat16, 0.005, 2e-2),
    (True, "original", torch.float32, 2e-3, 5e-3)])
def test_muon_is_torchs(nesterov, adjust_lr, dtype, lr, least, monkeypatch):
    """Whose iteration is in bfloat16: in float32 ours is it but for its rounding."""
    monkeypatch.setattr(optim, "_iteration_dtype", lambda device: dtype)
    a, b = tensors(MATRICES), tensors(MATRICES)
    settings = dict(lr=lr, momentum=0.95, weight_decay=0.1, nesterov=nesterov)
    for optimizer, params in ((optim.Muon(a, adjust_lr=adjust_lr, **settings), a),
                              (torch.optim.Muon(b, adjust_lr_fn=adjust_lr, **settings), b)):
        for step in range(10):
            set_grads(params, step)
            optimizer.step()
    assert difference(a, b) < 1e-3 and difference(a, tensors(MATRICES)) > least


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


def test_ivon_by_hand_with_two_samples_a_step():
    """Two samples, each with half of the loss, are one step with the means of g and of noise * g; one that had a
    gradient but no sample keeps its curvature."""
    p = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
    optimizer = optim.IVON([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, ess=20.0, hess_init=0.7, clip_radius=0.6)
    w, h, m = p.detach().clone(), torch.full((2,), 0.7, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t in range(1, 5):
        optimizer.zero_grad()
        torch.manual_seed(t)
        for _ in range(2 * (t < 4)):
            with optimizer.sampled():
                (0.5 * (p ** 4).sum()).backward()
        torch.manual_seed(t)
        noises = [torch.randn(2, dtype=torch.float64) / (20 * (h + 0.01)).sqrt() for _ in range(2 * (t < 4))]
        grads = [4 * (w + noise) ** 3 / 2 for noise in noises]
        if t == 4:
            p.grad = torch.tensor([0.3, -0.2], dtype=torch.float64)
            grads = [p.grad]
        optimizer.step()
        m = 0.9 * m + 0.1 * sum(grads)
        if noises:
            f = 20 * sum(noise * g for noise, g in zip(noises, grads)) * (h + 0.01)
            h = 0.99 * h + 0.01 * f + 0.5 * 0.01 ** 2 * (h - f) ** 2 / (h + 0.01)
        w = w - 0.1 * 0.71 * ((m / (1 - 0.9 ** t) + 0.01 * w) / (h + 0.01)).clamp(-0.6, 0.6)
        assert (optimizer.state[p]["hess"] - h).abs().max() < 1e-12 and (p - w).abs().max() < 1e-12


def test_ivon_draws_from_its_posterior():
    """Draws spread by 1 / sqrt(ess (h + weight_decay)) around the mean, as Posterior tells a checkpoint."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(2000))
    optimizer = optim.IVON([p], weight_decay=0.5, ess=200.0)
    posterior = optim.Posterior(optimizer, [("p", p)])
    assert posterior.state_dict() == {} == optim.Posterior(optim.SGD([p]), [("p", p)]).state_dict()
    optimizer.state[p]["hess"] = torch.full((2000,), 3.0)
    draws = []
    for _ in range(50):
        with optimizer.sampled(train=False):
            draws.append(p.detach().clone())
    draws = torch.stack(draws)
    assert abs(draws.mean() - 1) < 1e-3 and abs(draws.std(0).mean() * math.sqrt(200 * 3.5) - 1) < 0.02
    torch.testing.assert_close(posterior.state_dict()["p"], torch.full((2000,), 700 ** -0.5))


# --- Newton-Schulz ---

def quintic(x, steps=5):
    """The quintic applied to the singular values themselves."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (64, 16), (2, 20, 30)])
def test_newton_schulz_maps_singular_values_by_the_quintic(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        found = optim.orthogonalize(x, dtype=dtype)
        assert found.dtype == torch.float64 and (found - quintic(x)).abs().max() < bound
        assert torch.equal(optim.orthogonalize(x.mT, dtype=dtype), found.mT) or shape[-1] == shape[-2]
    assert (optim.orthogonalize(x.float() * 1e-3, steps=2, dtype=torch.float32) - quintic(x, 2)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_survives_low_rank_and_zero(dtype):
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(32, 2, generator=generator) @ torch.randn(2, 128, generator=generator)
    values = torch.linalg.svdvals(optim.orthogonalize(low, dtype=dtype))
    assert 0.5 <= values[1] and values[0] <= 1.25
    assert values[2] < (0.5 if dtype == torch.bfloat16 else 1e-3)  # the other 30 are 0 but for rounding, 485 times
    assert torch.equal(optim.orthogonalize(torch.zeros(4, 8), dtype=dtype), torch.zeros(4, 8))


# --- Every rule ---

@every_rule
def test_what_has_no_gradient_is_left_alone(rule):
    """And what is in a group of rate 0; the rest is stepped."""
    params = tensors([(4, 4), (4, 6), (6, 4)])
    optimizer, before = of_rule(rule, [dict(params=params[:2]), dict(params=params[2:], lr=0.0)]), copies(params)
    for step in range(2):
        set_grads(params, step, skip=(0,))
        optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before)] == [True, False, True]
    assert params[0] not in optimizer.state
    before = copies(params)
    optimizer.zero_grad()
    optimizer.step()
    assert same(params, before)


@every_rule
def test_order_and_memory_change_nothing(rule):
    """Parameters in another order, two groups in place of one, and gradients that lie in memory by columns."""
    params, others = tensors(shapes_of(rule)), tensors(shapes_of(rule))
    optimizers = of_rule(rule, params), of_rule(rule, [dict(params=others[:1]), dict(params=others[:0:-1])])
    for step in range(4):
        set_grads(params, step), set_grads(others, step)
        if step % 2:
            others[0].grad = others[0].grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert difference(params, others) < (5e-3 if rule == "muon" else 1e-6)  # in bfloat16 a stack rounds otherwise


@every_rule
def test_bfloat16_weights_are_stepped_as_float32_ones_but_for_rounding(rule):
    low = tensors(shapes_of(rule), dtype=torch.bfloat16)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    before, optimizers = copies(high), (of_rule(rule, low), of_rule(rule, high))
    for step in range(3):
        set_grads(low, step), set_grads(high, step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(p.dtype == torch.bfloat16 for p in low)
    assert difference(low, high) < 0.03 < 2 * difference(high, before)


@every_rule
@pytest.mark.parametrize("block", ["averaged", "sampled"])
def test_weights_come_back_bit_for_bit_also_after_an_error(rule, block):
    """Another point inside for schedule_free's average and ivon's draw, nothing for the others; a sample that ended in
    an error is not noted."""
    params = tensors(shapes_of(rule))
    optimizer = optim.OrthoGrad(of_rule(rule, params))
    run(optimizer, params, 5)
    before, other = copies(params), (rule, block) in (("schedule_free", "averaged"), ("ivon", "sampled"))
    with pytest.raises(RuntimeError, match="stop"):
        with getattr(optimizer, block)():
            assert (difference(params, before) > 1e-3) == other and (other or same(params, before))
            sum((p ** 2).sum() for p in params).backward()
            if other and block == "averaged":
                with pytest.raises(RuntimeError, match="leave `averaged` before"):
                    optimizer.step()
            raise RuntimeError("stop")
    assert same(params, before) and not any("noise_grad" in optimizer.state[p] for p in params)


@every_rule
def test_orthograd_steps_the_base_by_the_projected_gradient(rule):
    """The same as projecting by hand and stepping the base; p.grad stays the raw gradient, and closures run."""
    a, b = tensors(shapes_of(rule)), tensors(shapes_of(rule))
    ours, base = optim.OrthoGrad(of_rule(rule, a)), of_rule(rule, b)
    for step in range(4):
        set_grads(a, step, skip=(1,)), set_grads(b, step, skip=(1,))
        raw = [None if p.grad is None else p.grad.clone() for p in a]
        for p in b:
            if p.grad is not None and p.numel() > 1:
                w, g = p.detach(), p.grad
                new = g - (w * g).sum() / (w * w).sum() * w
                p.grad = new * g.norm() / new.norm()
        assert ours.step(lambda: torch.tensor(5.0)) == 5
        base.step()
        assert all(g is p.grad or torch.equal(g, p.grad) for p, g in zip(a, raw))
    assert difference(a, b) < (5e-3 if rule == "muon" else 1e-5)  # bfloat16 magnifies the rounding of the projection
    assert difference(a, tensors(shapes_of(rule))) > 1e-2


IMPOSSIBLE = dict(lr=-1.0, weight_decay=math.nan, betas=(0.9, 1.0), eps=-1e-8, momentum=1.0, nesterov=True,
                  adjust_lr="best", ess=0.0, hess_init=-1.0, clip_radius=0.0)


@pytest.mark.parametrize("rule, name", [(rule, name) for rule in optim.RULES for name in IMPOSSIBLE])
def test_impossible_and_unknown_settings_are_refused(rule, name):
    values = {name: IMPOSSIBLE[name], **({"momentum": 0.0} if name == "nesterov" else {})}
    if name not in optim.RULES[rule]:
        with pytest.raises(TypeError, match=f"has no setting .*{name}"):
            CLASSES[rule](tensors([(4, 4)]), **values)
    else:
        with pytest.raises(ValueError, match=f"{rule} cannot work with.* {name} = "):
            CLASSES[rule](tensors([(4, 4)]), **values)


def test_impossible_groups_are_refused():
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="2-D"):
            optim.Muon(tensors([(4, 4), shape]))
    with pytest.raises(ValueError, match="add up"):
        optim.Muon([dict(params=tensors([(12, 8)]), rows=(6, 3, 2))])
    with pytest.raises(ValueError, match="'lamb'.*sgd, adam, adamw, muon"):
        optim.Muon([dict(params=tensors([(4, 4)]), rule="lamb")])


# --- One optimiser for a whole model, its groups, its state ---

class Tiny(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        for p, value in zip(self.parameters(), tensors([p.shape for p in self.parameters()], seed)):
            p.data = value.data

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


ROLES = {"embed.weight": "embedding", "up.weight": "matrix", "up.bias": "bias", "down.weight": "residual",
         "down.bias": "bias", "norm.weight": "gain", "norm.bias": "bias", "head.weight": "head"}
SCHEDULE = dict(lr=1e-2, schedule="cosine", warmup_steps=3, max_steps=20, min_lr_scale=0.0, decay_fraction=0.2)
every_build = pytest.mark.parametrize("rule, orthograd", [(rule, wrapped) for rule in optim.RULES
                                                          for wrapped in (False, True)])


def build(model, rule, fused_rows=None, **more):
    settings = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), muon_lr=0.05, momentum=0.9, ess=1e3)
    return optim.build({**settings, **more, "optimizer": rule}, model.named_parameters(), ROLES, fused_rows)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optim.set_rate(optimizer, SCHEDULE, step)
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))  # (B, T)
        torch.manual_seed(step)
        optimizer.zero_grad()
        with optimizer.sampled():
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_build
def test_saved_and_loaded_state_continues_bit_for_bit(rule, orthograd, tmp_path):
    whole = Tiny()
    reference = train(whole, build(whole, rule, orthograd=orthograd), 12)
    assert reference[-1] < reference[0]
    model = Tiny()
    optimizer = build(model, rule, orthograd=orthograd)
    losses = train(model, optimizer, 5)
    with optimizer.averaged():
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), tmp_path / "last.pt")
    for load in (optim.load_state, lambda optimizer, state: optimizer.load_state_dict(state)):
        saved, model = torch.load(tmp_path / "last.pt", weights_only=True), Tiny(seed=5)
        optimizer = build(model, rule, orthograd=orthograd)
        model.load_state_dict(saved["model"])
        load(optimizer, saved["optimizer"])
        assert losses + train(model, optimizer, 7, first=5) == reference
        assert same(model.parameters(), whole.parameters())


def test_load_state_keeps_what_the_command_asked_for():
    model = Tiny()
    saved = build(model, "adamw")
    train(model, saved, 2)
    other = build(model, "adamw", lr=5e-4, weight_decay=0.3)
    optim.load_state(other, copy.deepcopy(saved.state_dict()))
    assert {g["base_lr"] for g in other.param_groups} == {5e-4}
    assert {g["weight_decay"] for g in other.param_groups} == {0.0, 0.3}
    assert other.state[model.up.weight]["step"] == 2
    with pytest.raises(ValueError, match="steps by adamw, adamw, this one by .*muon"):
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


ROWS = {"up.weight": (8, 16)}


def by_value(model, rule):
    """An optimiser of weight_decay 0 as it was once saved: what decays and what does not is one group."""
    made, merged = build(model, rule, ROWS, weight_decay=0.0), {}
    for p in model.parameters():
        group = next(g for g in made.param_groups if any(p is q for q in g["params"]))
        merged.setdefault((group["rule"], group.get("rows")), {**group, "params": []})["params"].append(p)
    return type(made)(list(merged.values()))


@every_build
def test_another_decay_takes_a_checkpoint_over(rule, orthograd):
    """The state goes to its own parameter, the rate of the last step stays, what was typed counts."""
    for once, now in ((None, 0.0), (None, 0.1), (0.0, 0.1), (0.1, 0.0)):
        old, new = Tiny(), Tiny()
        source = by_value(old, rule) if once is None else build(old, rule, ROWS, weight_decay=once)
        train(old, source, 5)
        new.load_state_dict(old.state_dict())
        target = build(new, rule, ROWS, weight_decay=now, orthograd=orthograd)
        optim.load_state(target, copy.deepcopy(source.state_dict()))
        for p, q in zip(new.parameters(), old.parameters()):
            found, wanted = target.state[p], source.state[q]
            assert found.keys() == wanted.keys() and (p is not new.up.weight or wanted)
            assert same(map(torch.as_tensor, found.values()), map(torch.as_tensor, wanted.values()))
        assert {g["weight_decay"] for g in target.param_groups} == {0.0, now}
        assert {g["lr"] for g in target.param_groups} == {g["lr"] for g in source.param_groups}
        assert all(g["lr"] < g["base_lr"] for g in target.param_groups)
        train(new, target, 2, first=5)
        if (once, now) == (None, 0.0) and rule != "ivon" and not orthograd:  # ivon draws group by group
            train(old, source, 2, first=5)
            assert same(old.parameters(), new.parameters())


@every_rule
def test_build_hands_a_rule_its_settings(rule):
    """Of two settings of a name the rule's own, muon_lr before lr; `set_rate` then multiplies base_lr."""
    settings = dict(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), momentum=0.7, muon_lr=0.05, muon_momentum=0.6,
                    eps=1e-5, ess=50.0, hess_init=0.5, clip_radius=2.0)
    optimizer = build(Tiny(), rule, **settings)
    assert type(optimizer) is CLASSES[rule] and optimizer.param_groups[0]["rule"] in (rule, "adamw")
    for group in optimizer.param_groups:
        own = {**settings, "weight_decay": group["weight_decay"]}
        if group["rule"] == "muon":
            own |= {"lr": 0.05, "momentum": 0.6, "nesterov": True, "eps": 1e-7}
        wanted = {name: own.get(name, value) for name, value in optim.RULES[group["rule"]].items()}
        assert group.items() >= {**wanted, "base_lr": wanted["lr"]}.items()
    assert optim.set_rate(optimizer, {**SCHEDULE, "warmup_steps": 4, "warmup_peak": "next"}, 0) == 1e-2 / 5
    assert all(group["lr"] == pytest.approx(group["base_lr"] / 5) for group in optimizer.param_groups)
    plain = build(Tiny(), rule, muon_momentum=0.0, ess=None, clip_radius=None).param_groups[0]
    assert plain.get("ess", 1e6) == 1e6 and plain.get("clip_radius", math.inf) == math.inf
    assert not plain.get("nesterov")


def test_groups_decay_only_where_it_belongs():
    model = Tiny()
    every = {id(p) for p in model.parameters()}
    for how, names in (("matrices", {"up.weight", "down.weight", "head.weight"}),
                       ("2d", {"up.weight", "down.weight", "head.weight", "embed.weight"})):
        decayed = {id(p) for name, p in model.named_parameters() if name in names}
        found = optim.groups(model.named_parameters(), ROLES, 0.1, decay_params=how)
        assert {g["weight_decay"]: {id(p) for p in g["params"]} for g in found} == {0.1: decayed, 0.0: every - decayed}
    for role in optim.ROLES:
        (group,) = optim.groups([("p", torch.nn.Parameter(torch.ones(2, 2)))], {"p": role}, 0.5)
        assert group["weight_decay"] == (0.5 if role in ("matrix", "residual", "head") else 0.0), role


def test_muon_steps_hidden_matrices_and_adamw_the_rest():
    model = Tiny()
    optimizer, by_rule = build(model, "muon", ROWS), {}
    for group in optimizer.param_groups:
        by_rule.setdefault((group["rule"], group["base_lr"]), set()).update(id(p) for p in group["params"])
    hidden = {id(model.up.weight), id(model.down.weight)}
    assert by_rule == {("muon", 0.05): hidden, ("adamw", 1e-2): {id(p) for p in model.parameters()} - hidden}
    (fused,) = [g for g in optimizer.param_groups if "rows" in g]
    assert fused["rows"] == (8, 16) and fused["params"] == [model.up.weight]


def test_groups_refuse_what_is_not_claimed_once():
    pairs = list(Tiny().named_parameters())
    for named, roles, more, said in (
            (pairs, {k: v for k, v in ROLES.items() if k != "norm.bias"}, {}, "norm.bias.*unclaimed"),
            (pairs, {**ROLES, "norm.bias": "offset"}, {}, "norm.bias.*'offset'"),
            ([*pairs, ("up.weight", torch.nn.Parameter(torch.ones(2, 2)))], ROLES, {}, "up.weight.*twice"),
            (pairs, {**ROLES, "up.bias": "matrix"}, dict(muon=True), "up.bias.*2-D"),
            (pairs, ROLES, dict(decay_params="all"), "decay_params 'all'.*matrices, 2d")):
        with pytest.raises(ValueError, match=said):
            optim.groups(named, roles, 0.1, **more)
    with pytest.raises(ValueError, match=", ".join(optim.RULES)):
        build(Tiny(), "lion")


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


# --- OrthoGrad ---

def test_orthograd_leaves_zero_weights_and_scalars_alone_and_drops_a_parallel_gradient():
    zero, scalar, grads = torch.zeros(3, 4), torch.tensor([2.0]), tensors([(3, 4), (1,)])
    new = optim._project([zero, scalar], grads)
    assert torch.allclose(new[0], grads[0], rtol=1e-6, atol=0) and torch.equal(new[1], grads[1])
    for seed, w in enumerate(tensors([(50,)] * 20)):
        for grad in (w.detach() * (seed - 3.1), torch.zeros(50)):  # what is left is rounding: not to be blown up
            assert not optim._project([w], [grad])[0].any()


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
    wrapper.add_param_group(dict(params=tensors([(3,)]), lr=1.0))
    assert base.param_groups[1]["rule"] == "adamw" and base.param_groups[1]["lr"] == 1.0
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert wrapper.param_groups is base.param_groups and wrapper.state is base.state and len(base.state) == 1
    wrapper.zero_grad()
    assert params[0].grad is None
    with pytest.raises(ValueError, match="SGD"):
        optim.OrthoGrad(torch.optim.SGD(params))


def grok(steps, orthograd, p=59, share=0.4):
    """(training accuracy, test accuracy) of a bias-free network on addition modulo p."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    x, y, n = torch.nn.functional.one_hot(pairs, p).flatten(1).float(), pairs.sum(1) % p, int(share * len(pairs))
    torch.manual_seed(0)
    widths = (2 * p, 200, 200, p)
    layers = [torch.nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)
    optimizer = optim.OrthoGrad(optimizer) if orthograd else optimizer
    for step in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double()
    return right[:n].mean().item(), right[n:].mean().item()


def test_orthograd_generalises_without_weight_decay_where_adamw_memorises():
    """Prieto et al. 2025, figure 1: modular addition."""
    assert grok(200, orthograd=True)[1] > 0.9
    training, unseen = grok(200, orthograd=False)
    assert training == 1.0 and unseen < 0.05


# --- Schedules ---

@pytest.mark.parametrize("name, step, factor", [
    ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 10 ** 9, 1.0),
    ("noam", 0, 0.1), ("noam", 4, 0.5), ("noam", 9, 1.0), ("noam", 39, 0.5), ("noam", 999, 0.1),
    ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 60, 0.6), ("cosine", 110, 0.2),
    ("cosine", 35, 0.2 + 0.4 * (1 + math.sqrt(0.5))), ("cosine", 10 ** 6, 0.2),
    ("wsd", 0, 0.1), ("wsd", 9, 1.0), ("wsd", 66, 1.0), ("wsd", 88, 0.6), ("wsd", 99, 0.4), ("wsd", 110, 0.2),
    ("wsd", 500, 0.2)])
def test_schedules_at_named_steps(name, step, factor):
    assert optim.schedule(name, step, 10, 110, min_scale=0.2, decay_fraction=0.4) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules_are_continuous_with_peak_one(name, warmup):
    values = [optim.schedule(name, step, warmup, 200) for step in range(260)]
    assert max(values) == 1.0 and values[max(warmup - 1, 0)] == 1.0 and min(values) >= 0
    jumps = [abs(a - b) for a, b in zip(values[max(warmup - 1, 0):], values[max(warmup, 1):])]
    assert max(jumps) < (0.3 if name == "noam" and warmup < 2 else 0.07)
    assert all(b > a for a, b in zip(values[:warmup - 1], values[1:warmup]))
    assert values[200] == (0.0 if name in ("cosine", "wsd") else values[200]) and values[199] > 0
    later = [optim.schedule(name, step, warmup, 200, warmup_peak="next") for step in range(260)]
    assert later[warmup:] == values[warmup:] and later[:warmup] == [(i + 1) / (warmup + 1) for i in range(warmup)]


def test_wsd_with_fraction_one_falls_from_the_end_of_the_warm_up():
    values = [optim.schedule("wsd", step, 10, 110, decay_fraction=1.0) for step in range(111)]
    assert values[10:] == pytest.approx([1 - i / 100 for i in range(101)])
    assert optim.schedule("wsd", 99, 10, 100, decay_fraction=0.0) == 1.0


def test_schedules_refuse_what_they_cannot_do():
    for name in ("cosine", "wsd"):
        with pytest.raises(ValueError, match=f"{name}.*max_steps"):
            optim.schedule(name, 0, 10, None)
    with pytest.raises(ValueError, match="constant, noam, cosine, wsd"):
        optim.schedule("linear", 0, 10, 100)


# --- Moving average ---

def test_ema_is_the_recurrence_and_begins_anew():
    model = Tiny()
    ema, expected = optim.EMA(model, 0.5), copies(model.parameters())
    optimizer = build(model, "adamw")
    for t in range(12):
        train(model, optimizer, 1, first=t)
        ema.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
    assert difference(ema.weights.values(), expected) < 1e-6
    assert difference(ema.weights.values(), model.parameters()) > 1e-3
    ema.reset()
    assert ema.updates == 0 and same(ema.weights.values(), model.parameters())


@pytest.mark.parametrize("rule", ["adamw", "schedule_free"])
def test_what_is_evaluated(rule):
    """The EMA where there is one, else the optimiser's own average; `both` gives the two beside one another, and the
    raw weights, the same tensors, come back also after an error."""
    model = Tiny()
    ema, optimizer = optim.EMA(model, 0.9), build(model, rule)
    train(model, optimizer, 3)
    ema.update()
    raw, kept = copies(model.parameters()), list(model.parameters())
    with optimizer.averaged():
        averaged = copies(model.parameters())
    assert same(averaged, raw) == (rule == "adamw")
    for names, average, block in ((["raw", "ema"], ema, lambda: optim.evaluated(optimizer, ema)),
                                  (["raw"], None, lambda: optim.evaluated(optimizer))):
        with pytest.raises(KeyError):
            with block():
                assert same(model.parameters(), ema.weights.values() if average else averaged)
                raise KeyError("in the middle of an evaluation")
        assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), kept, raw))
        assert [name for name, _ in optim.both(optimizer, average)] == names
        for name, weights in optim.both(optimizer, average):
            with weights:
                assert same(model.parameters(), averaged if name == "raw" else ema.weights.values())
    assert all(p.requires_grad for p in kept) and not any(w.requires_grad for w in ema.weights.values())


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
    assert loaded.updates == 4 and same(ema.weights.values(), loaded.weights.values())
    loaded.copy_to_model()
    assert same(other.parameters(), ema.weights.values())
    del saved["ema"]["weights"]["up.bias"]
    with pytest.raises(ValueError, match="up.bias"):
        loaded.load_state_dict(saved["ema"])
    with pytest.raises(ValueError, match="ema_decay"):
        optim.EMA(model, 1.0)
