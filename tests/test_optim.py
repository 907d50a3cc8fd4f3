"""nanolab/optim.py: every rule of RULES is its formula, goes on bit for bit from its state, skips, restores and
refuses; OrthoGrad, groups, schedules, moving averages."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

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


# --- The rules' formulas ---

class Slow(torch.optim.Optimizer):
    """A rule tensor by tensor: `one` makes a step of parameter p by its gradient g, with state s."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["t"] = self.state[p].get("t", 0) + 1
                    self.one(group, p, p.grad, self.state[p])


class SlowScheduleFree(Slow):
    """Defazio et al. 2024."""

    def one(self, group, p, g, s):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        z, x, v, largest, total = s.get("held", (p.clone(), p.clone(), 0.0, 0.0, 0.0))
        v, largest = beta2 * v + (1 - beta2) * g ** 2, max(largest, lr)
        z = z - lr * (g / ((v / (1 - beta2 ** s["t"])) ** 0.5 + group.get("eps", 1e-8)) + group["weight_decay"] * p)
        weight = largest ** group.get("power", 2.0)
        x = x + weight / (total + weight) * (z - x)
        p.copy_((1 - beta1) * z + beta1 * x)
        s["held"] = z, x, v, largest, total + weight


class SlowIVON(Slow):
    """Shen et al. 2024 of steps without a sample, which leave the curvature as it is."""

    def one(self, group, p, g, s):
        beta, h, d, radius = group["betas"][0], group["hess_init"], group["weight_decay"], group["clip_radius"]
        s["m"] = beta * s.get("m", 0.0) + (1 - beta) * g
        p -= group["lr"] * (h + d) * ((s["m"] / (1 - beta ** s["t"]) + d * p) / (h + d)).clamp(-radius, radius)


ADAMS = [dict(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0), dict(lr=3e-3, betas=(0.0, 0.5), weight_decay=0.1),
         dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-2)]
FORMULAS = {
    "sgd": (torch.optim.SGD, [dict(lr=1e-3), dict(lr=1e-3, momentum=0.99), dict(
        lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1)]),
    "adam": (torch.optim.Adam, ADAMS),
    "adamw": (torch.optim.AdamW, ADAMS),
    "muon": (lambda params, adjust_lr, **more: torch.optim.Muon(params, adjust_lr_fn=adjust_lr, **more), [
        dict(lr=2e-3, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr="original"),
        dict(lr=1e-3, momentum=0.9, weight_decay=0.0, nesterov=False, adjust_lr="match_rms_adamw")]),
    "schedule_free": (SlowScheduleFree, [*ADAMS, dict(lr=0.01, betas=(0.9, 0.9), power=0.5, weight_decay=0.0)]),
    "ivon": (SlowIVON, [dict(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, hess_init=0.7, clip_radius=0.6)])}


@pytest.mark.parametrize("rule, number, dtype, bound", [
    *((rule, i, torch.float64, 1e-12) for rule in optim.RULES for i in range(len(FORMULAS[rule][1]))),
    *((rule, -1, *how) for rule in optim.RULES for how in ((torch.float32, 2e-6), (torch.bfloat16, 0.03)))], ids=str)
def test_a_rule_is_its_formula(rule, number, dtype, bound, monkeypatch):
    """Also where a parameter had no gradient for a while, of whose own steps it is then corrected; in two groups and
    another order; with weights and gradients that lie in memory by columns; a few tensors at a time. Weights of
    bfloat16 are stepped as those of float32, but for rounding; torch's Muon iterates in bfloat16."""
    theirs, settings = FORMULAS[rule][0], FORMULAS[rule][1][number]
    monkeypatch.setattr(optim, "RUN", 70)
    monkeypatch.setattr(optim, "_iteration_dtype", lambda device: torch.float32 if bound < 1e-6 else torch.bfloat16)
    a = tensors(shapes_of(rule), dtype=dtype)
    a[-1] = torch.nn.Parameter(a[-1].detach().t().contiguous().t())
    b = [torch.nn.Parameter(p.detach().clone().to(torch.promote_types(dtype, torch.float32))) for p in a]
    before, ours = copies(b), CLASSES[rule]([dict(params=a[:1]), dict(params=a[:0:-1])], **settings)
    for optimizer, params in ((ours, a), (theirs(b, **settings), b)):
        for step in range(20):
            set_grads(params, step, (0, 2) if step < 5 or step == 9 else ())
            if optimizer is ours and params[0].grad is not None:
                params[0].grad = params[0].grad.t().contiguous().t()
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (0.5, 1.0, 0.3)[step % 3]
            optimizer.step()
    moved = difference(b, before)
    bound = max(bound, 1e-3) if rule == "muon" else bound
    assert difference(a, b) < bound * (max(1.0, moved) if dtype == torch.bfloat16 else 1.0) and moved > 2e-3
    assert {p.dtype for p in a} == {dtype} and [len(run) for run in optim._runs(tensors(SHAPES), 70)] == [1, 3, 1]


def test_every_rule_is_beside_a_formula():
    assert CLASSES.keys() == optim.STEPS.keys() == optim.RULES.keys() == FORMULAS.keys()


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
    p, draws = torch.nn.Parameter(torch.ones(2000)), []
    optimizer = optim.IVON([p], weight_decay=0.5, ess=200.0)
    posterior = optim.Posterior(optimizer, [("p", p)])
    assert posterior.state_dict() == {} == optim.Posterior(optim.SGD([p]), [("p", p)]).state_dict()
    optimizer.state[p]["hess"] = torch.full((2000,), 3.0)
    for _ in range(50):
        with optimizer.sampled():
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
@pytest.mark.parametrize("block", ["averaged", "sampled"])
def test_weights_come_back_bit_for_bit_also_after_an_error(rule, block):
    """Another point inside for schedule_free's average and ivon's draw, nothing for the others; a sample that ended in
    an error is not noted."""
    params = tensors(shapes_of(rule))
    optimizer = of_rule(rule, params)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    before, other = copies(params), (rule, block) in (("schedule_free", "averaged"), ("ivon", "sampled"))
    with pytest.raises(ZeroDivisionError), getattr(optimizer, block)():
        assert (difference(params, before) > 1e-3) == other and (other or same(params, before))
        sum((p ** 2).sum() for p in params).backward()
        if other and block == "averaged":
            with pytest.raises(RuntimeError, match="leave `averaged` before"):
                optimizer.step()
        1 / 0
    assert same(params, before) and not any("noise_grad" in optimizer.state[p] for p in params)


IMPOSSIBLE = dict(lr=-1.0, weight_decay=math.nan, betas=(0.9, 1.0), eps=-1e-8, momentum=1.0, nesterov=True,
                  adjust_lr="best", ess=0.0, hess_init=-1.0, clip_radius=0.0)


@every_rule
def test_impossible_and_unknown_settings_are_refused(rule):
    for name, value in IMPOSSIBLE.items():
        kind, said = (ValueError, f"{rule} cannot work with.* {name} = ") if name in optim.RULES[rule] else (
            TypeError, f"has no setting .*{name}")
        with pytest.raises(kind, match=said):
            CLASSES[rule](tensors([(4, 4)]), **{name: value, **({"momentum": 0.0} if name == "nesterov" else {})})


def test_impossible_groups_are_refused():
    for groups, said in ((tensors([(4, 4), (4,)]), "2-D"), (tensors([(4, 4), (2, 3, 4)]), "2-D"),
                         ([dict(params=tensors([(12, 8)]), rows=(6, 3, 2))], "add up")):
        with pytest.raises(ValueError, match=said):
            optim.Muon(groups)


# --- OrthoGrad ---

@every_rule
def test_orthograd_steps_by_the_projected_gradient(rule):
    """The same as projecting by hand first; p.grad stays the raw gradient."""
    a, b = tensors(shapes_of(rule)), tensors(shapes_of(rule))
    ours, base = of_rule(rule, a, orthograd=True), of_rule(rule, b)
    for step in range(4):
        set_grads(a, step, skip=(1,)), set_grads(b, step, skip=(1,))
        raw = [None if p.grad is None else p.grad.clone() for p in a]
        for p in b:
            if p.grad is not None and p.numel() > 1:
                w, g = p.detach(), p.grad
                new = g - (w * g).sum() / (w * w).sum() * w
                p.grad = new * g.norm() / new.norm()
        ours.step(), base.step()
        assert all(g is p.grad or torch.equal(g, p.grad) for p, g in zip(a, raw))
    assert difference(a, b) < (5e-3 if rule == "muon" else 1e-5)  # bfloat16 magnifies the rounding of the projection
    assert difference(a, tensors(shapes_of(rule))) > 1e-2


def test_orthograd_leaves_zero_weights_and_scalars_alone_and_drops_a_parallel_gradient():
    zero, scalar, grads = torch.zeros(3, 4), torch.tensor([2.0]), tensors([(3, 4), (1,)])
    new = optim.orthogonal([zero, scalar], grads)
    assert torch.allclose(new[0], grads[0], rtol=1e-6, atol=0) and torch.equal(new[1], grads[1])
    for seed, w in enumerate(tensors([(50,)] * 20)):
        for grad in (w.detach() * (seed - 3.1), torch.zeros(50)):  # what is left is rounding: not to be blown up
            assert not optim.orthogonal([w], [grad])[0].any()


def grok(steps, orthograd, p=59, share=0.4):
    """(training accuracy, test accuracy) of a bias-free network on addition modulo p."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    x, y, n = F.one_hot(pairs, p).flatten(1).float(), pairs.sum(1) % p, int(share * len(pairs))
    torch.manual_seed(0)
    one, two, three = (torch.nn.Linear(a, b, bias=False) for a, b in ((2 * p, 200), (200, 200), (200, p)))
    model = torch.nn.Sequential(one, torch.nn.ReLU(), two, torch.nn.ReLU(), three)
    optimizer = optim.AdamW(model.parameters(), orthograd, lr=0.01, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double()
    return right[:n].mean().item(), right[n:].mean().item()


def test_orthograd_generalises_without_weight_decay_where_adamw_memorises():
    """Prieto et al. 2025, figure 1: modular addition."""
    assert grok(160, orthograd=True)[1] > 0.9
    training, unseen = grok(100, orthograd=False)
    assert training == 1.0 and unseen < 0.05


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
ROWS = {"up.weight": (8, 16)}
SCHEDULE = dict(lr=1e-2, schedule="cosine", warmup_steps=3, max_steps=20, min_lr_scale=0.0, decay_fraction=0.2)


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
            loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rule, orthograd", [*((rule, False) for rule in optim.RULES), ("muon", True)])
def test_saved_and_loaded_state_continues_bit_for_bit(rule, orthograd, tmp_path):
    whole, model = Tiny(), Tiny()
    reference = train(whole, build(whole, rule, orthograd=orthograd), 12)
    assert reference[-1] < reference[0]
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


def by_value(model, rule):
    """An optimiser of weight_decay 0 as it was once saved: what decays and what does not is one group."""
    made, merged = build(model, rule, ROWS, weight_decay=0.0), {}
    for p in model.parameters():
        group = next(g for g in made.param_groups if any(p is q for q in g["params"]))
        merged.setdefault((group["rule"], group.get("rows")), {**group, "params": []})["params"].append(p)
    return type(made)(list(merged.values()))


@every_rule
def test_another_decay_takes_a_checkpoint_over(rule):
    """The state goes to its own parameter, the rate of the last step stays, what was typed counts."""
    for once, now in ((None, 0.0), (None, 0.1), (0.0, 0.1), (0.1, 0.0)):
        old, new = Tiny(), Tiny()
        source = by_value(old, rule) if once is None else build(old, rule, ROWS, weight_decay=once)
        train(old, source, 5)
        new.load_state_dict(old.state_dict())
        target = build(new, rule, ROWS, weight_decay=now)
        optim.load_state(target, copy.deepcopy(source.state_dict()))
        for p, q in zip(new.parameters(), old.parameters()):
            found, wanted = target.state[p], source.state[q]
            assert found.keys() == wanted.keys() and (p is not new.up.weight or wanted)
            assert same(map(torch.as_tensor, found.values()), map(torch.as_tensor, wanted.values()))
        assert {g["weight_decay"] for g in target.param_groups} == {0.0, now}
        assert {g["lr"] for g in target.param_groups} == {g["lr"] for g in source.param_groups}
        assert all(g["lr"] < g["base_lr"] for g in target.param_groups)
        train(new, target, 2, first=5)
        if (once, now) == (None, 0.0) and rule != "ivon":  # ivon draws group by group
            train(old, source, 2, first=5)
            assert same(old.parameters(), new.parameters())


@pytest.mark.parametrize("moments", [torch.zeros(3), 3, {"step": 2, "exp_avg": None}, {"exp_avg": torch.zeros(())},
                                     {"exp_avg": torch.eye(6).to_sparse()}],
                         ids=["tensor", "number", "none", "scalar", "sparse"])
def test_load_state_keeps_what_was_typed_and_refuses_what_is_no_state_of_the_parameter(moments):
    """torch compares none of it: the next step would end in a traceback, or write past a tensor's end."""
    model = Tiny()
    other = build(model, "adamw", lr=5e-4, weight_decay=0.3)
    saved = build(model, "adamw")
    train(model, saved, 2)
    state = saved.state_dict()
    optim.load_state(other, copy.deepcopy(state))
    assert {(g["base_lr"], g["weight_decay"]) for g in other.param_groups} == {(5e-4, 0.0), (5e-4, 0.3)}
    with pytest.raises(ValueError, match="steps by adamw, adamw, this one by .*muon"):
        optim.load_state(build(model, "muon"), state)
    state["state"][0] = moments
    with pytest.raises(ValueError, match="not one of that shape"):
        optim.load_state(build(model, "adamw"), state)


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
    for how, names in (("matrices", {"up.weight", "down.weight", "head.weight"}),
                       ("2d", {"up.weight", "down.weight", "head.weight", "embed.weight"})):
        found = optim.groups(model.named_parameters(), ROLES, 0.1, decay_params=how)
        decays = {p: group["weight_decay"] for group in found for p in group["params"]}
        assert decays == {p: 0.1 * (name in names) for name, p in model.named_parameters()}
    for role in optim.ROLES:
        (group,) = optim.groups([("p", torch.nn.Parameter(torch.ones(2, 2)))], {"p": role}, 0.5)
        assert group["weight_decay"] == (0.5 if role in ("matrix", "residual", "head") else 0.0), role


def test_muon_steps_hidden_matrices_and_adamw_the_rest():
    model, hidden = Tiny(), ("up.weight", "down.weight")
    by_rule = {p: (group["rule"], group["base_lr"], group.get("rows"))
               for group in build(model, "muon", ROWS).param_groups for p in group["params"]}
    assert by_rule == {p: ("muon", 0.05, ROWS.get(name)) if name in hidden else ("adamw", 1e-2, None)
                       for name, p in model.named_parameters()}


def test_groups_refuse_what_is_not_claimed_once():
    pairs = list(Tiny().named_parameters())
    for named, roles, more, said in (
            (pairs, {k: v for k, v in ROLES.items() if k != "norm.bias"}, {}, "norm.bias.*unclaimed"),
            (pairs, {**ROLES, "norm.bias": "offset"}, {}, "norm.bias.*'offset'"),
            ([*pairs, ("up.weight", torch.nn.Parameter(torch.ones(2, 2)))], ROLES, {}, "up.weight.*twice"),
            (pairs, {**ROLES, "up.bias": "matrix"}, dict(muon=True), "up.bias.*2-D")):
        with pytest.raises(ValueError, match=said):
            optim.groups(named, roles, 0.1, **more)
    with pytest.raises(ValueError, match=", ".join(optim.RULES)):
        build(Tiny(), "lion")


def test_a_tied_tensor_is_claimed_once_by_either_name():
    model = Tiny()
    model.head.weight = model.embed.weight
    for every_name, left_out in ((False, None), (True, None), (True, "embed.weight")):
        pairs = model.named_parameters(remove_duplicate=not every_name)
        roles = {name: role for name, role in ROLES.items() if name != left_out}
        claimed = [p for group in optim.groups(pairs, roles, 0.1) for p in group["params"]]
        assert len(claimed) == len(list(model.parameters())) == len({id(p) for p in claimed})


# --- Schedules ---

@pytest.mark.parametrize("name, how, factors", [
    ("constant", {}, {0: 0.1, 9: 1.0, 10 ** 9: 1.0}), ("noam", {}, {0: 0.1, 4: 0.5, 9: 1.0, 39: 0.5, 999: 0.1}),
    ("cosine", {}, {0: 0.1, 9: 1, 10: 1, 35: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 60: 0.6, 110: 0.2, 10 ** 6: 0.2}),
    ("wsd", {}, {0: 0.1, 9: 1.0, 66: 1.0, 88: 0.6, 99: 0.4, 110: 0.2, 500: 0.2}),
    ("wsd", dict(decay_fraction=1.0), {10: 1.0, 35: 0.8, 60: 0.6, 110: 0.2}),
    ("wsd", dict(decay_fraction=0.0), {109: 1.0}),
    *((name, dict(warmup_peak="next"), {0: 1 / 11, 9: 10 / 11, 10: 1.0}) for name in ("constant", "cosine", "wsd")),
    *((name, dict(warmup_steps=0), {0: 1.0}) for name in optim.SCHEDULES)], ids=str)
def test_schedules_at_named_steps(name, how, factors):
    settings = dict(warmup_steps=10, max_steps=110, min_scale=0.2, decay_fraction=0.4) | how
    for step, factor in factors.items():
        assert optim.schedule(name, step, **settings) == pytest.approx(factor, abs=1e-12), step


def test_what_schedules_refuse():
    for name, steps, said in (("cosine", None, "cosine.*max_steps"), ("wsd", None, "wsd.*max_steps"),
                              ("linear", 100, "constant, noam, cosine, wsd")):
        with pytest.raises(ValueError, match=said):
            optim.schedule(name, 0, 10, steps)


@pytest.mark.parametrize("step, seconds, most, steps", [
    (0, 0.0, None, 6e10), (0, 0.0, 100, 100), (50, 15.0, None, 200), (50, 15.0, 150, 150), (50, 30.0, 150, 100),
    (50, 60.0, 150, 50), (7, 99.0, 100, 7 * 60 / 99)])
def test_schedules_end_at_the_share_of_the_clock_or_at_max_steps(step, seconds, most, steps):
    """Of 60 seconds; in their middle cosine is half way down, whatever the number of steps."""
    settings = SCHEDULE | dict(schedule="cosine", warmup_steps=0, max_steps=most, max_seconds=60.0, min_lr_scale=0.0)
    assert optim.horizon(settings, step, seconds) == pytest.approx(steps)
    assert optim.horizon(settings | dict(max_seconds=None), step, seconds) == most
    if steps in (100, 200) and step:
        assert optim.factor(settings, step, seconds) == pytest.approx(0.5 if steps == 100 else 0.5 + math.sqrt(0.125))


# --- Moving average ---

def test_ema_is_the_recurrence_goes_on_from_its_state_and_begins_anew(tmp_path):
    model, other = Tiny(), Tiny(seed=3)
    ema, loaded = optim.EMA(model, 0.5), optim.EMA(other, 0.5)
    expected, optimizer = copies(model.parameters()), build(model, "adamw")
    for t in range(12):
        train(model, optimizer, 1, first=t)
        ema.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
        if t == 10:
            torch.save(ema.state_dict(), tmp_path / "ema.pt")
    assert difference(ema.weights.values(), expected) < 1e-6
    assert difference(ema.weights.values(), model.parameters()) > 1e-3
    other.load_state_dict(model.state_dict())
    saved = torch.load(tmp_path / "ema.pt", weights_only=True)
    loaded.load_state_dict(saved)
    loaded.update()
    assert loaded.updates == 12 and same(ema.weights.values(), loaded.weights.values())
    with loaded.swapped():
        assert same(other.parameters(), ema.weights.values())
    ema.reset()
    assert ema.updates == 0 and same(ema.weights.values(), model.parameters())
    del saved["weights"]["up.bias"]
    with pytest.raises(ValueError, match="up.bias"):
        loaded.load_state_dict(saved)
    with pytest.raises(ValueError, match="ema_decay"):
        optim.EMA(model, 1.0)


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
    for names, average in ((["raw", "ema"], ema), (["raw"], None)):
        with pytest.raises(KeyError):
            with optim.evaluated(optimizer, average):
                assert same(model.parameters(), ema.weights.values() if average else averaged)
                raise KeyError("in the middle of an evaluation")
        assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), kept, raw))
        assert [name for name, _ in optim.both(optimizer, average)] == names
        for name, weights in optim.both(optimizer, average):
            with weights:
                assert same(model.parameters(), averaged if name == "raw" else ema.weights.values())
    assert all(p.requires_grad for p in kept) and not any(w.requires_grad for w in ema.weights.values())
