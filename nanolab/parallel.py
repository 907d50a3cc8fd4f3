"""One model on several processes: a mesh of dp x tp of them on PyTorch's own engine, and what a script needs for it.

    torchrun --nproc_per_node=2 train_facts.py --preset cpu --dp 1 --tp 2      # the matrices divided over two
    torchrun --nproc_per_node=8 train_enwik8.py --dp 4 --tp 2                  # rows over four pairs, matrices in pairs

Rows of a batch are divided over dp (FSDP2: weights, gradients and optimiser state too), matrices of a layer over tp
(DTensor). Processes speak gloo on CPUs, which is what is tested, and NCCL on GPUs, which is written but not measured.
A script without torchrun is Alone: every method then gives back what it was given.

What each weight is cut along, and why, is a table of docs/parallel.md: rows of qkv and up, columns of out and down
(LowRank's join), over tp; over dp, what a process of tp has of every weight, along dimension 0, however uneven. A layer
is whole for the time of its own forward and backward pass. The fused matrices qkv and up lie in another order than in
one process: their rows are permuted, so that process 0's heads (or features) come first and a contiguous cut is the
right one. So are the heads of "strided" and "fixed", of which each process has half of either pattern. Files never see
it: a checkpoint is that of one process, and any mesh loads it.
"""
import atexit
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from model import Attention, FeedForward
from models.low_rank import LowRank
from models.sparse import Sparse
from nanolab import optim, run as experiment
from nanolab.settings import UserError

SPLIT = ("full", "window", "strided", "fixed", "diff")  # mixers whose heads can be divided over tp
SPLIT_FF = ("mlp", "low_rank", "none")


def fail(text):
    """Raises UserError on rank 0; elsewhere ends the process with the same status, without a word."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(1)  # torchrun ends the others when one has ended: rank 0 speaks first
        sys.exit(2)
    raise UserError(text)


def start(dp=1, tp=1, device="auto"):
    """The Mesh of dp * tp processes that torchrun started, which it joins; ranks above 0 print nothing from now on. Of
    one process: Alone.

    device: the setting; "auto" and "cuda" give each process of a machine the GPU of its LOCAL_RANK. UserError: dp * tp
    is not the number of processes, or a process has no GPU of its own.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    return Alone(device) if dp == tp == world == 1 else _join(dp, tp, device, world)


def _join(dp, tp, device, world):
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if dp * tp != world:
        script = os.path.basename(sys.argv[0]) or "script.py"
        if "WORLD_SIZE" in os.environ:
            fail(f"dp {dp} times tp {tp} is {dp * tp}, but torchrun started {world} processes: the two must agree")
        fail(f"dp {dp} times tp {tp} needs {dp * tp} processes: "
             f"torchrun --nproc_per_node={dp * tp} {script} --dp {dp} --tp {tp}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        fail(f"--device {device}: with {world} processes it must be auto, cpu, or cuda, each its own GPU")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            fail(f"--device cuda: a process for each of {torch.cuda.device_count()} GPUs, not {local + 1} on one "
                 "machine; --device cpu needs none")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    atexit.register(_leave)
    if rank:
        sys.stdout = open(os.devnull, "w")
    mesh = dist.device_mesh.init_device_mesh(device, (dp, tp), mesh_dim_names=("dp", "tp"))
    return Mesh(dp, tp, rank, f"cuda:{local}" if device == "cuda" else device, mesh)


def warn_of_passes(config, grad_accum):
    """One line where a step of several passes is not that of one pass over all of their rows."""
    if grad_accum > 1 and "moe" in config.ffs and config.expert_balance == "loss" and config.balance_weight:
        print(f"grad_accum {grad_accum}: expert_balance loss is not linear in the batch: each pass has its own, and a "
              "step takes their mean")


def _leave():
    if dist.is_initialized():
        dist.destroy_process_group()


class Alone:
    """One process: what a training loop asks of it as of a Mesh, where all is explained."""
    dp = tp = size = 1

    def __init__(self, device="auto"):
        self.device = device

    def check(self, config, batch_size=0, optimizer="adamw", precision=torch.float32, *more, **how):
        """Nothing is divided. UserError: numbers that the optimiser does not go with."""
        if optimizer == "ivon" and precision == torch.float16:
            raise UserError("optimizer ivon learns the curvature from gradients, which float16 scales: choose bfloat16 "
                            "or float32")

    def parallelise(self, model):
        """The model."""
        return model

    def gathered(self, model):
        """Every layer is whole."""
        return nullcontext()

    def rows(self, *tensors):
        """All of them."""
        return tensors[0] if len(tensors) == 1 else tensors

    def weight(self, targets):
        """That of all targets."""
        return 1.0

    def mean(self, value):
        """The value."""
        return value

    def clip_grad_norm(self, parameters, max_norm):
        """PyTorch's."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def gather(self, model, reports):
        """After a step's passes: what each expert was given, over all rows of the step, into model.usage, and the mean
        over the passes of what layers added to the objective into model.extras (of this process's rows: see `mean`).

        reports: of each pass, (model.usage, model.extras).
        """
        usages, extras = zip(*reports)
        model.usage = {layer: sum(usage[layer] for usage in usages) for layer in usages[0]}
        names = dict.fromkeys(name for extra in extras for name in extra)    # compressive: not of every pass
        model.extras = {name: sum(extra.get(name, 0.0) for extra in extras) / len(reports) for name in names}

    def stop(self, run):
        """run.stop."""
        return run.stop


class Mesh(Alone):
    """dp * tp processes, of which this is number `rank`, `dp_rank` * tp + `tp_rank`; made by `start`.

    main: whether it is rank 0, which alone prints and writes. device: for resolve_device.
    """

    def __init__(self, dp, tp=1, rank=0, device="auto", mesh=None):
        self.dp, self.tp, self.size, self.rank, self.device, self.mesh = dp, tp, dp * tp, rank, device, mesh
        self.main, (self.dp_rank, self.tp_rank) = rank == 0, divmod(rank, tp)
        self.cuts = {}  # parameter that is divided over tp: (dimension, order of that dimension)
        self.partial = set()  # parameters whose gradient each process of tp has a part of

    # --- Before the run ---

    def check(self, config, batch_size=0, optimizer="adamw", precision=torch.float32, carry=False, compiled=False):
        """UserError where a model of this TransformerConfig, trained so, cannot be divided. carry: with a memory."""
        c, dp, tp = config, self.dp, self.tp
        if batch_size % dp:
            fail(f"batch_size {batch_size} must be divisible by dp {dp}: every process takes as many rows")
        if optimizer == "ivon":
            fail("optimizer ivon draws the weights anew in every pass, one draw for all processes: it needs dp 1, tp 1")
        if precision == torch.float16:
            fail("dtype float16 scales the loss by what one process finds: with dp or tp choose bfloat16 or float32")
        if compiled:
            fail("--compile is for one process: with dp or tp choose --no-compile")
        if c.lora_rank:
            fail("adapters are trained in one process only: with dp or tp choose --lora_rank 0")
        if c.kernels != "torch":
            fail(f"kernels {c.kernels} are tested in one process only: with dp or tp choose --kernels torch")
        if dp > 1 and carry:
            fail("a memory carried from segment to segment stays with its rows: with dp choose --no-carry_memory")
        if dp > 1 and "moe" in c.ffs and c.expert_balance == "loss":
            fail("expert_balance loss is no mean over rows: with dp choose bias or none")
        if tp == 1:
            return
        for name in ("n_head", "n_kv_head"):
            if getattr(c, name) % tp:
                fail(f"tp {tp} must divide {name} {getattr(c, name)}: every process takes whole heads")
        if c.qk_norm == "full":
            fail(f"qk_norm 'full' is over all heads: it cannot be divided over tp {tp}")
        for kind in c.mixers:
            if kind not in SPLIT:
                fail(f"mixer {kind!r} cannot be divided over tp {tp}: {', '.join(SPLIT)} can")
        for kind in c.ffs:
            if kind not in SPLIT_FF:
                fail(f"ff {kind!r} cannot be divided over tp {tp}: {', '.join(SPLIT_FF)} can")
        if set(c.ffs) != {"none"} and c.ff_width % tp:
            fail(f"tp {tp} must divide the feed-forward's width {c.ff_width}: choose another ff_mult")
        if set(c.ffs) != {"none"} and c.activation == "solu":
            fail(f"activation 'solu' normalises the feed-forward's whole width: it cannot be divided over tp {tp}")
        try:
            self._local(c)
        except ValueError as error:
            fail(f"of each of tp {tp} processes: {error}")

    def _local(self, config):
        """The config of this process's part of a mixer."""
        return replace(config, n_head=config.n_head // self.tp, n_kv_head=config.n_kv_head // self.tp)

    @torch.no_grad()
    def parallelise(self, model):
        """Divides the model, on its device and equal in all processes, in place; returns it. Before the optimiser.

        Dropout then draws from another seed in every process of dp.
        """
        self.check(model.config)
        cuts, partial = self._split(model) if self.tp > 1 else ({}, ())
        if self.dp > 1:
            from torch.distributed.fsdp import fully_shard
            torch.manual_seed(torch.initial_seed() + self.dp_rank)
            for part in (*model.blocks, model):
                fully_shard(part, mesh=self.mesh["dp"], reshard_after_forward=True)
            # The first pass must be through the whole model, and makes room for layers, which must not be of
            # inference_mode: here it is.
            model.eval()(torch.zeros(1, 1, dtype=torch.int64, device=model.embed.device))
            model.train()
        parameters = dict(model.named_parameters())  # FSDP has made new ones
        self.cuts |= {parameters[name]: cut for name, cut in cuts.items()}
        self.partial |= {parameters[name] for name in partial}
        return model

    def _split(self, model):
        """Divides mixers and feed-forwards over tp. Returns what goes into `cuts` and `partial`, by name."""
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        plan, cuts, partial = {}, {}, set()

        def cut(name, linear, dim, parts):
            """Puts the dimension into this mesh's order: of each of its parts, process by process, its share."""
            pieces = [piece.chunk(self.tp) for piece in torch.arange(sum(parts)).split(parts)]
            order = torch.cat([piece[r] for r in range(self.tp) for piece in pieces])
            for kind, p in linear.named_parameters():
                if dim < p.dim() and not (dim and kind == "bias"):
                    p.copy_(p.index_select(dim, order.to(p.device)))
                    cuts[f"{name}.{kind}"] = dim, order
            plan[name] = RowwiseParallel() if dim else ColwiseParallel()

        for name, module in model.named_modules():
            if isinstance(module, Attention):
                halves = 2 if isinstance(module, Sparse) else 1

                def heads(rows):
                    return [n // halves for n in rows for _ in range(halves)]
                cut(f"{name}.qkv", module.qkv, 0, heads(module.fused["qkv"]))
                cut(f"{name}.out", module.out, 1, heads(module.fused["qkv"][:1]))
                self._shrink(module, halves)
                partial |= {f"{name}.{own}" for own in module.roles}
            elif isinstance(module, FeedForward):
                cut(f"{name}.up", module.up, 0, module.fused.get("up", (module.up.out_features,)))
                last = "join" if isinstance(module, LowRank) else "down"
                cut(f"{name}.{last}", getattr(module, last), 1, (getattr(module, last).in_features,))
        parallelize_module(model, self.mesh["tp"], plan)
        return cuts, partial

    def _shrink(self, mixer, halves):
        """A mixer that believes in this process's heads alone."""
        n_head, flops = mixer.config.n_head, mixer.flops
        mixer.config = self._local(mixer.config)
        mixer.flops = lambda T: self.tp * flops(T)  # counted as the whole layer's
        if mixer.slopes is not None:
            own = [half.chunk(self.tp)[self.tp_rank] for half in torch.arange(n_head).chunk(halves)]
            mixer.slopes = mixer.slopes[torch.cat(own)]

    # --- Whole tensors and this process's parts ---

    def whole(self, p, part):
        """`part`, of the shape of this process's part of parameter p, of all processes: the tensor of one process.
        All processes call it."""
        dim, order = self.cuts.get(p, (None, None))
        if self.dp > 1:
            part = self._join(part, "dp", 0, len(p) // self.tp if dim == 0 else len(p))
        if dim is not None:
            part = self._join(part, "tp", dim, p.size(dim)).index_select(dim, order.argsort().to(part.device))
        return part

    def _join(self, part, axis, dim, n):
        """The parts that `chunk` made along dim, of all processes of an axis of the mesh: n in that dimension."""
        size, shape = -(-n // getattr(self, axis)), list(part.shape)
        shape[dim] = size
        padded = part.new_zeros(shape)
        padded.narrow(dim, 0, part.size(dim)).copy_(part)
        found = [torch.empty_like(padded) for _ in range(getattr(self, axis))]
        dist.all_gather(found, padded, group=self.mesh[axis].get_group())
        return torch.cat(found, dim).narrow(dim, 0, n)

    def part(self, p, whole):
        """This process's part of a tensor of the shape that parameter p has in one process."""
        dim, order = self.cuts.get(p, (None, None))
        if dim is not None:
            whole = whole.index_select(dim, order.chunk(self.tp)[self.tp_rank].to(whole.device))
        if self.dp > 1:
            chunks = whole.chunk(self.dp)
            whole = chunks[self.dp_rank] if self.dp_rank < len(chunks) else whole[:0]
        return whole

    @contextmanager
    def gathered(self, model):
        """with mesh.gathered(model): every process of dp holds whole layers, as they are now, to evaluate or generate:
        nothing is sent for them, and parts of the model other than its forward may be called. No training inside."""
        parts = [*model.blocks, model] if self.dp > 1 else []  # as parallelise
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()

    # --- A step ---

    def rows(self, *tensors):
        """Of each tensor (B, ...), the whole batch, this process's rows (B / dp, ...); one alone, or a tuple."""
        found = tuple(t if self.dp == 1 else t.chunk(self.dp)[self.dp_rank] for t in tensors)
        return found[0] if len(found) == 1 else found

    def weight(self, targets):
        """What this process's loss is multiplied by where targets that are -1 do not count: dp n / sum of all n, n the
        targets that count in its rows. The mean over dp is then the mean over all targets that count.

        targets: (B, T) or (B, T, K) int64, of the whole batch. Returns 1.0, or a scalar tensor. Raises ValueError where
        the K targets of a position are not counted in equal shares: one factor would not be right for all.
        """
        if self.dp == 1:
            return 1.0
        counts = (targets >= 0).reshape(self.dp, -1, targets.size(2) if targets.dim() == 3 else 1).sum(1)  # (dp, K)
        shares = self.dp * counts[self.dp_rank] / counts.sum(0).clamp(min=1)  # (K,)
        if len(shares) > 1 and not torch.equal(shares, shares[:1].expand_as(shares)):
            raise ValueError("the targets of a position count in unequal shares: with dp, predict one")
        return shares[0]

    def mean(self, value):
        """The mean over dp of a scalar tensor: of a loss times `weight`, the loss of one process."""
        if self.dp > 1:
            value = value.detach().clone()
            dist.all_reduce(value, group=self.mesh["dp"].get_group())
            value = value / self.dp
        return value

    @torch.no_grad()
    def clip_grad_norm(self, parameters, max_norm):
        """Once before each optimiser step: makes gradients whole and clips them; returns their norm before, a scalar.

        As torch.nn.utils.clip_grad_norm_, over all processes' parts, each counted once.
        """
        parameters = [p for p in parameters if p.grad is not None]
        grads, counted = [optim.local(p.grad) for p in parameters], []
        for p, grad in zip(parameters, grads):
            if p in self.partial:  # each process knows what its own heads say
                dist.all_reduce(grad, group=self.mesh["tp"].get_group())
            if p in self.cuts or self.tp_rank == 0:
                counted.append(grad)
        square = torch.zeros((), device=grads[0].device)
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gather(self, model, reports):
        """As alone, over the rows of all processes."""
        super().gather(model, reports)
        if self.dp > 1:
            for loads in model.usage.values():
                dist.all_reduce(loads, group=self.mesh["dp"].get_group())

    # --- Checkpoints: those of one process ---

    @torch.no_grad()
    def _gather(self, p, part):
        """What `whole` gives, on rank 0's CPU; elsewhere None."""
        whole = self.whole(p, part)
        return whole.detach().cpu() if self.main else None

    @torch.no_grad()
    def state_of(self, thing):
        """What a checkpoint holds of a model, optimiser, average, generators, or of anything that all processes have
        alike: as of one process, on rank 0's CPU, elsewhere without tensors. All processes call it."""
        state = thing.state_dict()
        if isinstance(thing, torch.nn.Module):
            parameters = dict(thing.named_parameters())
            for name, value in state.items():
                p = parameters.get(name)
                state[name] = value.cpu() if p is None else self._gather(p, optim.local(p))
        elif isinstance(thing, torch.optim.Optimizer):
            return self._each_tensor(thing, state, self._gather)
        elif isinstance(thing, optim.EMA):
            state["weights"] = {name: self._gather(thing.parameters[name], t) for name, t in state["weights"].items()}
        elif isinstance(thing, experiment.Generators) and self.dp > 1:   # those of rank 0, and of every process of dp
            ranks = [None] * self.dp
            dist.all_gather_object(ranks, state, group=self.mesh["dp"].get_group())
            return {**ranks[0], "ranks": ranks}
        return state

    @torch.no_grad()
    def load_into(self, thing, state):
        """The reverse of `state_of`, with a state that every process has. Generators that another dp saved: dropout
        goes on from rank 0's seed plus dp_rank. RuntimeError where a model's names or shapes do not fit."""
        if isinstance(thing, torch.nn.Module):
            parameters, held = dict(thing.named_parameters()), thing.state_dict()
            if held.keys() != state.keys():
                raise RuntimeError(f"the state does not fit the model: {', '.join(sorted(held.keys() ^ state.keys()))}")
            for name, value in state.items():
                if value.shape != held[name].shape:
                    raise RuntimeError(f"{name} is {tuple(value.shape)}, but the model's {tuple(held[name].shape)}")
                p = parameters.get(name)
                (held[name] if p is None else optim.local(p)).copy_(value if p is None else self.part(p, value))
        elif isinstance(thing, torch.optim.Optimizer):
            optim.load_state(thing, self._each_tensor(thing, optim.fitted(thing, state), self.part))
        elif isinstance(thing, optim.EMA):
            thing.load_state_dict({**state, "weights": {
                name: self.part(thing.parameters[name], t) if name in thing.parameters else t
                for name, t in state["weights"].items()}})
        elif isinstance(thing, experiment.Generators):
            ranks = state.get("ranks", [])
            known = self.dp > 1 and len(ranks) == self.dp
            thing.load_state_dict(ranks[self.dp_rank] if known else state)
            if not known and self.dp_rank:
                torch.manual_seed(torch.initial_seed() + self.dp_rank)
        else:
            thing.load_state_dict(state)

    @staticmethod
    def _each_tensor(optimizer, state, change):
        """A copy of an optimiser's state with change(parameter, tensor) in place of each tensor."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {**state, "state": {
            i: {name: change(parameters[i], value) if torch.is_tensor(value) else value for name, value in own.items()}
            for i, own in state["state"].items()}}

    # --- The run ---

    def most(self, number):
        """The largest of all processes' numbers."""
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return type(number)(found)

    def stop(self, run):
        """run.stop, the same in all processes: once before every step and once after the loop, by all."""
        asked = self.most(run.stop or 0) or None
        for _ in range(20):  # torchrun's signal to this process is on its way: after ours it would count as a second
            if asked and run.stop is None:
                time.sleep(0.05)
        run.stop = run.stop or asked
        return asked
