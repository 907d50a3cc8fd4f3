"""Optimisers, learning-rate schedules and the moving average of weights. Nothing here knows a script or a model.

One optimiser object serves a whole model. Its param_groups say by which `rule` they are stepped, with what `lr`, and
which `base_lr` the schedule multiplies, so that the loop of every script reads the same:

    optimizer = optim.build(settings, model.named_parameters(), roles)      # optimizer, lr, weight_decay, ... by name
    rate = optim.set_rate(optimizer, settings, step)
    optimizer.step()

State is tensors and plain numbers: torch.load(weights_only=True) reads it back and the run goes on bit for bit.
"""
import math
from contextlib import contextmanager, nullcontext

import torch

import kernels

ROLES = ("embedding", "position", "matrix", "residual", "head", "gain", "bias")
DECAYED = ("matrix", "residual", "head")  # what multiplies activations; not look-up tables, gains and biases
HIDDEN = ("matrix", "residual")  # the 2-D weights inside the network, which Muon steps
SCHEDULES = ("constant", "noam", "cosine", "wsd")

# What each rule reads from its group, with the value that stands where nothing is said.
RULES = {
    "sgd": dict(lr=1e-3, weight_decay=0.0, momentum=0.0, nesterov=False),
    "adam": dict(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8),
    "adamw": dict(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8),
    "muon": dict(lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True, ns_steps=5, eps=1e-7, adjust_lr="original"),
    "schedule_free": dict(lr=2.5e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, power=2.0, averaged=False),
    "ivon": dict(lr=0.1, weight_decay=1e-4, betas=(0.9, 0.99999), ess=1e6, hess_init=1.0, clip_radius=math.inf),
}


class Settings:
    """What `build` and `set_rate` read of a script's settings by name, and what stands where it has them not; the
    commented ones all scripts have alike."""
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    momentum: float = 0.9
    muon_lr: float = 0.02
    orthograd: bool = False        # gradients made orthogonal to their weights first
    warmup_peak: str = "last"      # [last, next] the step that first has the peak rate: of the warm-up, or after it
    eps: float = 1e-8              # [> 0.0, not with optimizer sgd/ivon] added to a root
    muon_momentum: float = 0.95    # [>= 0.0, < 1.0, with optimizer muon]
    ess: float = None              # [none, > 0.0, with optimizer ivon] sample size; none: bytes, or rows, to train on
    hess_init: float = 1.0         # [> 0.0, with optimizer ivon] curvature at first
    clip_radius: float = None      # [none, > 0.0, with optimizer ivon] largest step of a weight; none: no bound
    decay_params: str = "matrices" # [matrices, 2d] 2d: all of two or more dimensions, embeddings and positions too


# On a CPU a rule takes a few tensors at a time, so that its next operation still finds them in the cache.
RUN = 2 ** 17  # elements


def local(tensor):
    """The tensor; of a DTensor, whose parts lie in several processes, this process's part: the same storage."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _buffers(states, params, name):
    """The state tensor `name` of every parameter, zeros at first."""
    for state, p in zip(states, params):
        if name not in state:
            state[name] = torch.zeros_like(p)
    return [state[name] for state in states]


def _sgd(group, params, grads, states):
    """b = momentum b + g, w -= lr b; with nesterov w -= lr (g + momentum b). Decay is L2: it is added to g."""
    momentum = group["momentum"]
    if group["weight_decay"]:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    if momentum:
        buffers = _buffers(states, params, "momentum")
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = torch._foreach_add(grads, buffers, alpha=momentum) if group["nesterov"] else buffers
    torch._foreach_add_(params, grads, alpha=-group["lr"])


def _adam(group, params, grads, states):
    """Kingma & Ba 2015, algorithm 1, by PyTorch's operation in one pass; decay as L2 in the gradient, for adamw
    decoupled (Loshchilov & Hutter 2019). A parameter counts its own steps: one that had no gradient for a while is
    corrected for what it saw. Of one core 0.97 ms for 0.8 M weights, where torch's own AdamW takes 2.50."""
    (beta1, beta2), by_step = group["betas"], {}
    for state in states:
        state["step"] = state.get("step", 0) + 1
    tensors = zip(params, grads, _buffers(states, params, "exp_avg"), _buffers(states, params, "exp_avg_sq"))
    for state, own in zip(states, tensors):
        by_step.setdefault(state["step"], []).append(own)
    fused = torch._fused_adamw_ if group["rule"] == "adamw" else torch._fused_adam_
    for step, some in by_step.items():
        plain = [[t.contiguous() for t in own] for own in some]  # it reads all four as if they lay in memory alike
        count = torch.full((), float(step), device=params[0].device)
        fused(*map(list, zip(*plain)), [], [count] * len(some), lr=group["lr"], beta1=beta1, beta2=beta2,
              weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False)
        for own, found in zip(some, plain):
            for tensor, new in zip(own, found):
                if new is not tensor:
                    tensor.copy_(new)


def _muon(group, params, grads, states, mesh=None, owners=()):
    """Jordan 2024: momentum, then about the nearest semi-orthogonal matrix in place of the matrix; decay decoupled.

    params of a mesh are parts of their owners: updates are gathered, and of each step this process's part is taken.
    """
    lr, momentum = group["lr"], group["momentum"]
    buffers = _buffers(states, params, "momentum")
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    targets = params
    if mesh:
        updates = [mesh.whole(owner, update) for owner, update in zip(owners, updates)]
        targets = [torch.zeros_like(update) for update in updates]
    stacks = {}  # matrices of one shape, up to transposition, go through one batched iteration
    for p, update in zip(targets, updates):
        for part in zip(p.split(group["rows"]), update.split(group["rows"])) if "rows" in group else [(p, update)]:
            stacks.setdefault((min(part[0].shape), max(part[0].shape)), []).append(part)
    for (_, longer), pairs in stacks.items():
        wide = torch.stack([u if u.shape[1] == longer else u.mT for _, u in pairs])  # (N, shorter, longer)
        for (p, _), update in zip(pairs, orthogonalize(wide, group["ns_steps"], group["eps"])):
            rows, columns = p.shape
            scale = max(1, rows / columns) ** 0.5 if group["adjust_lr"] == "original" else 0.2 * longer ** 0.5
            p.add_(update if columns == longer else update.mT, alpha=-lr * scale)
    if mesh:
        torch._foreach_add_(params, [mesh.part(owner, step) for owner, step in zip(owners, targets)])


def _schedule_free(group, params, grads, states):
    """Defazio et al. 2024, on Adam's second moment: gradients at y = (1 - beta1) z + beta1 x,

        z -= lr (g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y),  x += c (z - x),  c = w_t / sum of all w,

    with w_t = (largest lr so far)^power. The parameters hold y; z and x are state, equal to the parameters at first.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if group["averaged"]:
        raise RuntimeError("schedule_free holds its average, for evaluation: leave `averaged` before the next step")
    for state, p in zip(states, params):
        if "z" not in state:
            state.update(z=p.clone(), x=p.clone(), step=0, largest=0.0, weights=0.0)
        state["step"] += 1
        state["largest"] = max(state["largest"], lr)
        state["weights"] += state["largest"] ** group["power"]
    squares = _buffers(states, params, "exp_avg_sq")
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    for p, g, square, state in zip(params, grads, squares, states):
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        z, x = state["z"], state["x"]
        if group["weight_decay"]:
            z.add_(p, alpha=-lr * group["weight_decay"])
        z.addcdiv_(g, root, value=-lr)
        weight = state["largest"] ** group["power"]
        x.lerp_(z, weight / state["weights"] if state["weights"] else 0.0)
        torch.lerp(z, x, beta1, out=p)


def _ivon(group, params, grads, states):
    """Improved variational online Newton (Shen et al. 2024). The parameters are the mean of a Gaussian
    of precision ess (h + weight_decay). With `noise_grad` the mean of noise * gradient over this step's samples:

        f = ess noise_grad (h + d),  h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d)),
        w -= lr (hess_init + d) clip((m / (1 - b1^t) + d w) / (h + d), clip_radius),  d = weight_decay.

    A parameter that had a gradient but no sample keeps its h.
    """
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    for p, g, state in zip(params, grads, states):
        if "hess" not in state:
            state.update(hess=torch.full_like(p, group["hess_init"]), exp_avg=torch.zeros_like(p), step=0)
        state["step"] += 1
        h, mean = state["hess"], state["exp_avg"]
        mean.lerp_(g, 1 - beta1)
        if (noise_grad := state.pop("noise_grad", None)) is not None:
            found = noise_grad.mul_(group["ess"]).mul_(h + decay)
            second = (h - found).square_().div_(h + decay).mul_(0.5 * (1 - beta2) ** 2)
            h.mul_(beta2).add_(found, alpha=1 - beta2).add_(second)
        step = (mean / (1 - beta1 ** state["step"])).add_(p, alpha=decay).div_(h + decay)
        if group["clip_radius"] < math.inf:
            step.clamp_(-group["clip_radius"], group["clip_radius"])
        p.add_(step, alpha=-lr * (group["hess_init"] + decay))


def orthogonalize(x, steps=5, eps=1e-7, dtype=None):
    """x: (..., rows, columns) -> the same shape and dtype, every singular value pushed to about [.7, 1.2].

    Newton-Schulz: s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5 on every singular value s of x / |x|_F (Jordan 2024). Five
    steps lift an s under about 1e-2 only part of the way. dtype: the iteration's; None: the fastest on the device.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, steps, eps, dtype).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.reshape(-1, *x.shape[-2:]).to(dtype or _iteration_dtype(x.device))  # (N, rows, columns)
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)
    # A step multiplies y from the left, so for wide matrices the steps are multiplied first and meet y once: 1.7 times
    # as fast at 4:1. The Gram matrix then carries its rounding from step to step, which bfloat16 would not survive.
    small = y.dtype != torch.bfloat16 and x.shape[-1] >= 2 * x.shape[-2]
    gram, product = y @ y.mT, None  # (N, rows, rows)
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if small:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else product @ factor
            gram = factor @ gram @ factor if step + 1 < steps else None
        else:
            y = torch.baddbmm(y, factor, y, beta=a)
            gram = y @ y.mT if step + 1 < steps else None
    return (product @ y if small else y).to(x.dtype).reshape(x.shape)


def _iteration_dtype(device):
    """bfloat16 on a GPU and on a CPU that multiplies it, else float32. One core of an AMD EPYC with avx512_bf16, ms a
    batch in either: 16 of 128 x 128 6.6 and 13.0, 4 of 384 x 1536 115 and 136."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


STEPS = {"sgd": _sgd, "adam": _adam, "adamw": _adam, "muon": _muon, "schedule_free": _schedule_free, "ivon": _ivon}


def _eager(method):
    """A method of torch.optim.Optimizer without its guard against being compiled.

    The guard's first call imports torch._dynamo, which costs every start of a script more than a second.
    """
    return getattr(method, "__wrapped__", method)


class _Optimizer(torch.optim.Optimizer):
    """Steps each group by the group's own rule; a group that names none follows the class's. settings: see RULES.
    orthograd: by gradients made `orthogonal` to their weights; decay is as without."""

    tables = ()  # by kernel: what each launch of a step keeps for the next step's
    zero_grad = _eager(torch.optim.Optimizer.zero_grad)
    state_dict = _eager(torch.optim.Optimizer.state_dict)
    load_state_dict = _eager(torch.optim.Optimizer.load_state_dict)

    def __init__(self, params, orthograd=False, **settings):
        unknown = settings.keys() - RULES[self.rule].keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        self.settings, self.orthograd, self.mesh = settings, orthograd, None
        super().__init__(params, {})  # the defaults differ from rule to rule: add_param_group sets them
        self.order = [p for group in self.param_groups for p in group["params"]]  # the model's, for `fitted`

    def add_param_group(self, param_group):
        rule = param_group.get("rule", self.rule)
        settings = self.settings if rule == self.rule else {}
        add = _eager(torch.optim.Optimizer.add_param_group)
        add(self, {"rule": rule, **RULES[rule], **settings, **param_group})
        _check(self.param_groups[-1])

    def averaged(self):
        """with optimizer.averaged(): the parameters are what to evaluate, save and sample from; see ScheduleFree."""
        return nullcontext()

    def sampled(self):
        """with optimizer.sampled(): forward and backward of a pass; see IVON."""
        return nullcontext()

    @torch.no_grad()
    def step(self):
        """Steps every parameter that has a gradient, which is only read."""
        done = self._launch() if kernels.on() and not self.mesh else ()
        for group in self.param_groups:
            whole = group["rule"] == "muon"  # which wants to see all matrices of one shape
            left = [p for p in group["params"] if p.grad is not None and p not in done]
            for owners in _runs(left, math.inf if whole else RUN):
                params, grads = [local(p) for p in owners], [local(p.grad) for p in owners]
                if self.orthograd and self.mesh:
                    complete = ([self.mesh.whole(p, t) for p, t in zip(owners, parts)] for parts in (params, grads))
                    grads = [self.mesh.part(p, g) for p, g in zip(owners, orthogonal(*complete))]
                elif self.orthograd:
                    grads = orthogonal(params, grads)
                more = (self.mesh, owners) if whole else ()
                STEPS[group["rule"]](group, params, grads, [self.state[p] for p in owners], *more)

    def _launch(self):
        """kernels.adamw_step of the dense float32 tensors under AdamW, one launch for all that agree in device, step,
        lr, betas and eps. Returns their set. State is that of `_adam`."""
        launches = {}  # what its tensors agree in -> parameters, each with its decay
        for group in self.param_groups:
            for p in group["params"] if group["rule"] == "adamw" else ():
                if p.grad is not None and all(local(t) is t and t.dtype == torch.float32 and t.layout == torch.strided
                                              for t in (p, p.grad)):
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    shared = p.device, state["step"], group["lr"], tuple(group["betas"]), group["eps"]
                    launches.setdefault(shared, {})[p] = group["weight_decay"]
        self.tables = [*self.tables, *({} for _ in range(len(self.tables), len(launches)))]
        for ((_, *shared), decays), tables in zip(launches.items(), self.tables):
            params = list(decays)
            states = [self.state[p] for p in params]
            kernels.adamw_step(params, [p.grad for p in params], _buffers(states, params, "exp_avg"),
                               _buffers(states, params, "exp_avg_sq"), *shared, list(decays.values()),
                               orthograd=self.orthograd, tables=tables)
        return set().union(*launches.values())


def _runs(params, limit):
    """Lists of parameters of one device and dtype, on a CPU of at most `limit` elements together (or one parameter)."""
    runs, filled = {}, {}  # a kind -> its lists, and how many elements the last of them has
    for p in params:
        kind = p.device, p.dtype
        if kind not in runs or p.is_cpu and filled[kind] + p.numel() > limit:
            runs.setdefault(kind, []).append([])
            filled[kind] = 0
        runs[kind][-1].append(p)
        filled[kind] += p.numel()
    return [run for lists in runs.values() for run in lists]


def _check(group):
    """ValueError naming the value that a group's rule cannot work with."""
    bad = [name for name in ("lr", "weight_decay", "eps") if not 0 <= group.get(name, 0)]
    bad += ["betas"] if not all(0 <= beta < 1 for beta in group.get("betas", ())) else []
    bad += ["momentum"] if not 0 <= group.get("momentum", 0) < 1 else []
    bad += ["nesterov"] if group.get("nesterov") and not group["momentum"] else []
    bad += [name for name in ("ess", "hess_init", "clip_radius") if not 0 < group.get(name, 1)]
    bad += ["adjust_lr"] if group.get("adjust_lr", "original") not in ("original", "match_rms_adamw") else []
    if bad:
        raise ValueError(f"{group['rule']} cannot work with " + ", ".join(f"{name} = {group[name]!r}" for name in bad))
    for p in group["params"] if group["rule"] == "muon" else ():
        if p.ndim != 2 or sum(group.get("rows", p.shape[:1])) != len(p):
            raise ValueError(f"muon steps 2-D weights, by `rows` that add up: the shape {tuple(p.shape)} does not fit")


class SGD(_Optimizer):
    """See _sgd. Al-Rfou et al. 2018 train T64 with a momentum of 0.99."""
    rule = "sgd"


class Adam(_Optimizer):
    """See _adam."""
    rule = "adam"


class AdamW(_Optimizer):
    """See _adam."""
    rule = "adamw"


class Muon(_Optimizer):
    """Orthogonalised momentum for hidden matrices (Jordan 2024); a group {"rule": "adamw", ...} is stepped by AdamW.

    adjust_lr: "original" multiplies lr by max(1, rows/columns)^0.5, "match_rms_adamw" by 0.2 max(rows, columns)^0.5,
    with which AdamW's learning rates fit (Liu et al. 2025). Decay is decoupled, by lr itself. A group's `rows`, say
    (C, C, C), names the parts of a fused matrix: each is orthogonalised by itself. ValueError for what is not 2-D.
    """
    rule = "muon"


class ScheduleFree(_Optimizer):
    """An average of the iterates instead of a falling rate, see _schedule_free; the rate stays constant after its
    warm-up. Three vectors of state (x, z, second moment), one more than where x is computed back from y and z: so
    nothing is lost to rounding.
    """
    rule = "schedule_free"

    def load_state_dict(self, state_dict):
        """As torch's. Of a state taken inside `averaged`, load the model first: the parameters then go back to y."""
        super().load_state_dict(state_dict)
        self._swap(False)

    @contextmanager
    def averaged(self):
        """Afterwards, come what may, the parameters are bit for bit what they were. A state_dict taken inside says so,
        and load_state_dict ends at the point where training goes on."""
        self._swap(True)
        try:
            yield
        finally:
            self._swap(False)

    @torch.no_grad()
    def _swap(self, averaged):
        """Parameters change places with state x, which then is y."""
        for group in self.param_groups:
            for p in group["params"] if group["averaged"] != averaged else ():
                if "x" in self.state[p]:
                    held = local(p).detach().clone()
                    local(p).copy_(self.state[p]["x"])
                    self.state[p]["x"].copy_(held)
            group["averaged"] = averaged


class IVON(_Optimizer):
    """A Gaussian posterior over the weights, see _ivon; ess, the effective sample size, is the number of training
    examples. The curvature is learned from the unclipped gradient; not for a GradScaler, whose factor would be in it.
    """
    rule = "ivon"

    @contextmanager
    def sampled(self):
        """with optimizer.sampled(): the parameters are one draw from the posterior; afterwards, come what may, the mean
        again. The noise comes from the global generator. What `step` needs of the gradients that the block leaves is
        noted: several blocks before one step, each with its share of the loss, are several samples.
        """
        drawn = []
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    h = self.state[p].get("hess", group["hess_init"])
                    spread = torch.as_tensor(group["ess"] * (h + group["weight_decay"]), dtype=p.dtype, device=p.device)
                    noise = torch.randn_like(p).mul_(spread.rsqrt())
                    before = None if p.grad is None else p.grad.clone()
                    drawn.append((p, p.detach().clone(), noise, before))
                    p.add_(noise)
        whole = False
        try:
            yield
            whole = True
        finally:
            with torch.no_grad():
                for p, mean, noise, before in drawn:
                    p.copy_(mean)
                    if whole and p.grad is not None:
                        share = p.grad if before is None else p.grad - before
                        state, product = self.state[p], noise.mul_(share)
                        state["noise_grad"] = product + state["noise_grad"] if "noise_grad" in state else product


@torch.no_grad()
def orthogonal(params, grads):
    """OrthoGrad (Prieto et al. 2025): from each gradient its part along the weights is taken, its length kept.

    Per tensor g' = g - (w.g / w.w) w, g'' = g' |g| / |g'|. Where w = 0 or has one element g stays; where g is parallel
    to w but for rounding it becomes 0. Lists of whole tensors of one device and dtype.
    """
    dots = torch.stack([torch.dot(p.reshape(-1), g.reshape(-1)) for p, g in zip(params, grads)])
    along = -dots / (torch.stack(torch._foreach_norm(params)).square() + 1e-30)
    projected = torch._foreach_mul(params, list(along.unbind()))
    torch._foreach_add_(projected, grads)
    length, left = torch.stack(torch._foreach_norm(grads)), torch.stack(torch._foreach_norm(projected))
    rounding = 16 * torch.finfo(left.dtype).eps * length
    torch._foreach_mul_(projected, list(torch.where(left > rounding, length / (left + 1e-30), 0.0).unbind()))
    return [g if g.numel() == 1 else new for g, new in zip(grads, projected)]


def fitted(optimizer, state_dict):
    """A checkpoint's state in the groups of `optimizer`, which `build` made.

    Checkpoints from when groups were formed by the decay's value have, of a weight_decay of 0, one group for what
    decays and what does not, its parameters in the model's order. Others are given back as they are.
    """
    groups, saved, whole = optimizer.param_groups, state_dict["param_groups"], {}
    for group in groups:
        whole.setdefault((group["rule"], group.get("rows")), []).extend(group["params"])
    if len(saved) == len(groups) or [len(g["params"]) for g in saved] != [len(found) for found in whole.values()]:
        return state_dict
    place = {p: i for i, p in enumerate(optimizer.order)}
    old = {p: i for group, found in zip(saved, whole.values())
           for p, i in zip(sorted(found, key=place.get), group["params"])}
    kept = dict(zip(whole, saved))
    new = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
    return {"state": {new[p]: state_dict["state"][i] for p, i in old.items() if i in state_dict["state"]},
            "param_groups": [{**kept[group["rule"], group.get("rows")], "params": [new[p] for p in group["params"]]}
                             for group in groups]}


def load_state(optimizer, state_dict):
    """A checkpoint's moments and counts, with the hyperparameters that `optimizer` was built with: a flag given on
    resume holds. `lr`, which the schedule sets before every step, stays the checkpoint's: what is saved before the next
    step is what a run that never stopped saves. ValueError where the groups, or a parameter's moments, do not fit.
    """
    built = [{name: value for name, value in group.items() if name not in ("params", "lr")}
             for group in optimizer.param_groups]
    state_dict = fitted(optimizer, state_dict)
    saved = state_dict["param_groups"]
    if [group.get("rule") for group in saved] != [group["rule"] for group in built]:
        raise ValueError(f"the checkpoint's optimizer steps by {', '.join(str(g.get('rule')) for g in saved)}, "
                         f"this one by {', '.join(g['rule'] for g in built)}")
    optimizer.load_state_dict(state_dict)
    for p, state in optimizer.state.items():             # torch compares none of this
        moments = state.values() if isinstance(state, dict) else [None]
        if not all(isinstance(x, (int, float)) or torch.is_tensor(x) and (
                local(x).shape, x.layout) == (local(p).shape, p.layout) for x in moments):
            raise ValueError(f"the optimizer's state of a parameter {tuple(p.shape)} is not one of that shape")
    for group, kept in zip(optimizer.param_groups, built):
        group.update(kept)


class Posterior:
    """The Gaussian around the parameters that "ivon" steps, for a checkpoint only."""

    def __init__(self, optimizer, named_parameters):
        self.optimizer, self.names = optimizer, {p: name for name, p in named_parameters}

    def state_dict(self):
        """{name: standard deviations}; {} under other rules."""
        return {self.names[p]: (group["ess"] * (self.optimizer.state[p]["hess"] + group["weight_decay"])).rsqrt()
                for group in self.optimizer.param_groups if group["rule"] == "ivon"
                for p in group["params"] if "hess" in self.optimizer.state[p]}


@contextmanager
def evaluated(optimizer, ema=None):
    """with optim.evaluated(optimizer, ema): the weights to evaluate and save are in place: the average that the
    optimiser keeps, if it does, or `ema` where there is one."""
    with optimizer.averaged(), ema.swapped() if ema else nullcontext():
        yield


def both(optimizer, ema=None):
    """[(name, context manager)] of the weights to evaluate beside one another: "raw" and, where there is one, "ema"."""
    return [("raw", optimizer.averaged())] + ([("ema", ema.swapped())] if ema else [])


def width_factor(settings):
    """n_embd over mup_base_width with parametrisation "mup", None with "standard".

    The rates for Adam of Yang et al. 2022 (arXiv 2203.03466), table 8: hidden matrices have lr over the factor, and
    decay keeps its pace, lr times weight_decay. Muon needs none: an orthogonal matrix times (rows / columns)^0.5 is the
    update at every width (Yang, Simon & Bernstein 2023, arXiv 2310.17813). ValueError for other rules.
    """
    if settings.get("parametrisation", "standard") == "standard":
        return None
    if settings["optimizer"] in ("sgd", "ivon"):
        raise ValueError(f"parametrisation 'mup' has rates for Adam's kin and muon, not for {settings['optimizer']}: "
                         "choose adam, adamw, muon or schedule_free")
    return settings["n_embd"] / settings["mup_base_width"]


def groups(named_parameters, roles, weight_decay, muon=False, fused_rows=None, decay_params="matrices", factor=None):
    """Parameter groups, with decay or without. Which there are does not depend on weight_decay: a checkpoint goes over
    to another value, 0 too.

    named_parameters: pairs (name, tensor). roles: name -> one of ROLES; a tensor under two names is claimed by the
    first that has one. muon=True puts matrix and residual under rule "muon", the rest under "adamw". fused_rows: name
    -> rows of the parts of a fused matrix, which Muon takes apart. decay_params: see Settings. factor: `width_factor`;
    hidden matrices that Muon does not step then have a group with it as "over". ValueError naming a parameter that no
    role claims, whose name comes twice, or whose role is unknown.
    """
    named, claimed, found = {}, {}, {}
    for name, p in named_parameters:
        if named.setdefault(name, p) is not p:
            raise ValueError(f"parameter {name}: claimed twice, two tensors have this name")
        if roles.get(name, "gain") not in ROLES:
            raise ValueError(f"parameter {name}: unknown role {roles[name]!r}, not one of {', '.join(ROLES)}")
        if name in roles:
            claimed.setdefault(p, name)
    for name, p in named.items():
        if p not in claimed:
            raise ValueError(f"parameter {name}: unclaimed, it has no role")
    for p, name in claimed.items():
        decayed = {"matrices": roles[name] in DECAYED, "2d": p.ndim >= 2}[decay_params]
        settings = {"weight_decay": weight_decay if decayed else 0.0}
        if muon:
            settings["rule"] = "muon" if roles[name] in HIDDEN else "adamw"
            if settings["rule"] == "muon" and p.ndim != 2:
                raise ValueError(f"parameter {name}: Muon steps 2-D weights, its shape is {tuple(p.shape)}")
            if settings["rule"] == "muon" and name in (fused_rows or {}):
                settings["rows"] = tuple(fused_rows[name])
        elif factor and roles[name] in HIDDEN:
            settings.update(over=factor, weight_decay=settings["weight_decay"] * factor)
        found.setdefault((decayed, *settings.items()), {**settings, "params": []})["params"].append(p)
    return list(found.values())


def build(settings, named_parameters, roles, fused_rows=None, mesh=None, n_examples=1e6):
    """The optimiser of a whole model by its name among `settings`; `set_rate` multiplies each group's base_lr.

    settings: optimizer, one of RULES, lr, and what else it reads, or its default in Settings. muon steps matrix and
    residual with muon_lr and muon_momentum, the rest by AdamW with lr, betas, eps; ess None is n_examples. What asks
    for no gradient is left out. Where kernels are on, they step what is dense float32 under AdamW, muon's part too; the
    state is the same. mesh: a parallel.Mesh over whose processes parameters and state are divided, which then go
    without kernels; Muon and orthograd gather whole matrices for the time of a step. ValueError for ivon on several
    processes. For the rest see groups.
    """
    s = {name: settings.get(name, getattr(Settings, name)) for name in Settings.__annotations__}
    rule, lr, betas = settings["optimizer"], settings["lr"], tuple(s["betas"])
    if rule not in RULES:
        raise ValueError(f"optimizer {rule!r}: it must be one of {', '.join(RULES)}")
    if rule == "ivon" and mesh and mesh.size > 1:
        raise ValueError("ivon draws the weights anew in every pass, which several processes cannot agree on here")
    pairs = [(name, p) for name, p in named_parameters if p.requires_grad]
    wanted = groups(pairs, roles, s["weight_decay"], rule == "muon", fused_rows, s["decay_params"],
                    width_factor(settings))
    own = {"sgd": dict(lr=lr, momentum=s["momentum"]),
           "muon": dict(lr=s["muon_lr"], momentum=s["muon_momentum"], nesterov=s["muon_momentum"] > 0),
           "ivon": dict(lr=lr, betas=betas, ess=s["ess"] or n_examples, hess_init=s["hess_init"],
                        clip_radius=s["clip_radius"] or math.inf)}
    for group in wanted:
        group.update(own.get(group.setdefault("rule", rule), dict(lr=lr, betas=betas, eps=s["eps"])))
        group["base_lr"] = group["lr"] = group["lr"] / group.pop("over", 1.0)
    kind = next(kind for kind in _Optimizer.__subclasses__() if kind.rule == rule)
    optimizer = kind(wanted, orthograd=s["orthograd"])
    optimizer.order = list(dict.fromkeys(p for name, p in pairs if name in roles))
    optimizer.mesh = mesh if mesh and mesh.size > 1 else None
    return optimizer


def schedule(name, step, warmup_steps, max_steps, min_scale=0.0, decay_fraction=0.2, warmup_peak="last"):
    """The factor on base_lr of the step that follows `step` finished ones. After a linear warm-up, which reaches 1 in
    its last step, or with warmup_peak "next" (nanoGPT's) would in the step after it, it is, for name

    constant  1
    noam      (warmup_steps / (step + 1))^0.5 (Vaswani et al. 2017, eq. 3, divided by its peak)
    cosine    half a cosine down to min_scale at max_steps (Loshchilov & Hutter 2017)
    wsd       1, then a line down to min_scale over the last decay_fraction of max_steps (Hu et al. 2024); with
              decay_fraction 1 from the end of the warm-up on
    Raises ValueError for an unknown name, and for cosine and wsd without max_steps.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}: it must be one of {', '.join(SCHEDULES)}")
    falls = name in ("cosine", "wsd")
    if falls and max_steps is None:
        raise ValueError(f"schedule {name} ends at max_steps: give max_steps or max_seconds, or take constant or noam")
    if falls and step >= max_steps:
        return min_scale
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + (warmup_peak == "next"))
    if name == "noam":
        return math.sqrt(max(warmup_steps, 1) / (step + 1))
    if name == "cosine":
        part = (step - warmup_steps) / (max_steps - warmup_steps)
        return min_scale + (1 - min_scale) * 0.5 * (1 + math.cos(math.pi * part))
    start = max(warmup_steps, max_steps - decay_fraction * max_steps) if falls else step
    return min_scale + (1 - min_scale) * (max_steps - step) / (max_steps - start) if step > start else 1.0


def horizon(settings, step, seconds=0.0):
    """Steps in all, of which schedules take their shares: max_steps (None: no end), or where max_seconds end the run
    sooner, so many as the pace so far will bring: step / (seconds / max_seconds), after `seconds` of training."""
    steps, limit = settings["max_steps"], settings.get("max_seconds")
    if limit is None:
        return steps
    paced = max(step, 1) * limit / max(seconds, 1e-9)    # before the first step the end is far away
    return paced if steps is None else min(steps, paced)


def factor(settings, step, seconds=0.0):
    """`schedule` by a script's settings, after so many seconds of training."""
    return schedule(settings["schedule"], step, settings["warmup_steps"], horizon(settings, step, seconds),
                    settings["min_lr_scale"], settings["decay_fraction"], settings.get("warmup_peak", "last"))


def check(settings):
    """ValueError where a script's schedule or parametrisation does not go with the rest."""
    factor(settings, 0)
    width_factor(settings)


def set_rate(optimizer, settings, step, seconds=0.0):
    """Gives every group the rate of the step that follows `step` finished ones, which took so many seconds (for
    max_seconds). Returns that of what has rate lr."""
    scale = factor(settings, step, seconds)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
    return settings["lr"] * scale


def take_step(optimizer, scaler, parameters, grad_clip=None, ema=None, clip=torch.nn.utils.clip_grad_norm_):
    """Once all passes have left their gradients: unscaled, clipped to a norm of grad_clip (None: of any), stepped by,
    forgotten; `ema` follows. Returns their norm before, a scalar. clip: a mesh's, over all of its processes."""
    scaler.unscale_(optimizer)
    norm = clip(parameters, grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if ema:
        ema.update()
    return norm


class EMA:
    """Exponential moving average of what a model learns: average += (1 - d) (w - average) at each update.

    d = min(decay, (1 + t) / (10 + t)) after t updates: a short run's average is not mostly its initial weights. Give it
    the uncompiled model, whose names a checkpoint has. Buffers are not averaged; a tied tensor is kept once.
    """

    def __init__(self, model, decay):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay {decay}: it must be at least 0 and below 1")
        self.decay, self.updates = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self):
        """Once after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.weights.values()), self._parts(), 1 - decay)
        self.updates += 1

    def reset(self):
        """Begins anew with the weights as they are."""
        self.updates = 0
        torch._foreach_copy_(list(self.weights.values()), [p.detach() for p in self._parts()])

    @contextmanager
    def swapped(self):
        """with ema.swapped(): the model has the averaged weights; afterwards, come what may, the raw ones."""
        raw = [p.detach().clone() for p in self._parts()]
        try:
            self._fill(list(self.weights.values()))
            yield
        finally:
            self._fill(raw)

    @torch.no_grad()
    def _fill(self, tensors):
        torch._foreach_copy_(self._parts(), tensors)

    def _parts(self):
        return [local(p) for p in self.parameters.values()]

    def state_dict(self):
        """{"updates": int, "weights": {name: tensor}}; decay is a setting."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies in place. Raises ValueError naming a parameter that is missing, foreign or of another shape."""
        shapes, found = ({name: p.shape for name, p in w.items()} for w in (self.weights, state["weights"]))
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise ValueError(f"average of {name}: checkpoint {found.get(name)}, model {shapes.get(name)}")
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
        self.updates = state["updates"]
