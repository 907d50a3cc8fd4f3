"""What a run asks of the machine, by its settings and before it starts: memory that there is not, and what to know.

    limits.weigh(lambda: build_model(config), device)            # refused: a model that cannot be held
    limits.fits(batch_size * block_size * 8, f"batch_size {batch_size}", device)
    limits.notes(settings, {"max_steps": max_steps}, before)     # a warm-up longer than the run, a longer schedule
"""
import re

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from nanolab.device import as_size, fits, memory
from nanolab.settings import UserError

SIZES = "(?i)overflow|too large|negative dimension|must be tuple of ints|can't allocate"  # torch, of such sizes


def kept(rows, T, width, layers):
    """Bytes that a training pass over rows of T positions keeps at the least: tokens and targets in 64 bits, and the
    input of every layer in 16 bits a feature."""
    return rows * T * (16 + 2 * width * layers)


# Of a tensor and plain numbers these make a tensor of the same shape.
SAME = {torch.Tensor.normal_, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.div,
        torch.Tensor.__truediv__, torch.Tensor.__rpow__, torch.Tensor.neg, torch.Tensor.__neg__,
        torch.Tensor.cumprod, torch.Tensor.__rfloordiv__}


class _Undrawn(TorchFunctionMode):
    """Numbers that no one will read are not made: for these torch imports its compiler first, more than a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in SAME and not any(isinstance(other, torch.Tensor) for other in args[1:]):
            return args[0]
        if function is torch.randn:
            return torch.empty(*args)
        if function is torch.arange:
            return torch.empty(len(range(*args)), **(kwargs or {}))
        if function is torch.eye and "out" in (kwargs or {}):
            return kwargs["out"]
        return function(*args, **(kwargs or {}))


def weigh(build, device="cpu"):
    """The model that `build` makes, on torch's meta device: shapes only, nothing is drawn, nothing allocated.

    UserError: what building it says of settings that cannot go together; weights and gradients, 8 bytes a parameter,
    that the device cannot hold. That is found while it grows: a model of a million layers is not waited for.
    """
    count, limit = 0, memory(device)

    def add(module, name, parameter):
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if 8 * count > limit:
            fits(8 * count, f"a model of {count:,} parameters and more", device)
    drawn, hook = torch.get_rng_state(), register_module_parameter_registration_hook(add)
    try:
        with torch.device("meta"), _Undrawn():
            return build()
    except (OverflowError, MemoryError, RuntimeError, TypeError, ValueError) as error:      # of every kind for a size
        if isinstance(error, (OverflowError, MemoryError)) or re.search(SIZES, str(error)):
            raise UserError("a model of these sizes cannot be held: it has more numbers than can be counted") from None
        if not isinstance(error, ValueError):
            raise
        raise UserError(error) from None
    finally:
        hook.remove()
        torch.set_rng_state(drawn)


def notes(settings, steps, before=None):
    """Prints what a person should know before step 1, a line each: a flag without an effect; a warm-up that the run
    does not outlast; on resume a schedule whose length is another one now.

    steps, before: {setting: steps of what is trained}, now and by the checkpoint; a value None has no end.
    """
    for name in settings.flags:
        if where := settings.idle(name):
            print(f"--{name} has no effect {where}")
    schedule, warmup_steps = settings["schedule"], settings["warmup_steps"]
    for name, limit in steps.items():
        if limit and warmup_steps >= limit:
            print(f"warmup_steps {warmup_steps} of {name} {limit}: the rate rises to the end and never reaches its peak"
                  if warmup_steps > limit else f"warmup_steps {warmup_steps} are all of {name} {limit}: the rate rises "
                  "to the end")
        was = (before or {}).get(name, limit)
        if schedule in ("cosine", "wsd") and was != limit and limit is not None:
            print(f"{name} {limit} was {was}: the rate of schedule {schedule} is computed anew for the new length, "
                  "from the step where this goes on")


def first_step(model, rows, T, passes, peak_flops, half=False):
    """(bytes, seconds) that a training step of a Transformer takes on a CPU, an estimate from its sizes.

    rows of T positions a pass; peak_flops: of the best matrix product there; half: whether autocast halves what is
    kept. Bytes: parameters with gradient and two moments; of every position and layer twelve vectors of the width, the
    hidden layer twice, with dropout the scores three times; the logits three times. Seconds: twice what the products
    alone would take (see docs/speed.md).
    """
    c, size = model.config, 2 if half else 4
    layer = 12 * c.n_embd + (2 * c.ff_width if set(c.ffs) != {"none"} else 0)
    scores = 3 * c.n_head * T if c.dropout or half or c.attention == "manual" or not c.plain_scores else 0
    heads = 3 * c.vocab_size * (c.n_targets * (c.n_layer if c.intermediate_losses else 1) + c.mtp_depth)
    kept = rows * T * (size * c.n_layer * (layer + scores) + 4 * heads)
    if c.checkpoint_activations:
        kept = rows * T * (size * (c.n_layer * c.n_embd + layer + scores) + 4 * heads)
    weights = sum((16 if p.requires_grad else 4) * p.numel() for p in model.parameters())
    return weights + kept, 2 * passes * rows * T * model.flops_per_token(T) / peak_flops


def size(model):
    """A model's parameters in words, and how many of them a position uses, or are trained, where not all."""
    parts = dict(active=model.n_active_params(), trained=sum(p.numel() for p in model.parameters() if p.requires_grad))
    some = ", ".join(f"{n:,} {word}" for word, n in parts.items() if n != model.n_params())
    return f"{model.n_params():,} parameters" + f" ({some})" * bool(some)


def hint(where, model, rows, T, passes, peak_flops, half=False):
    """Before the first step on a CPU: one line where that takes long or much, with the smaller preset."""
    if where.type != "cpu":
        return
    n_bytes, seconds = first_step(model, rows, T, passes, peak_flops, half)
    if seconds > 5 or n_bytes > min(4e9, memory("cpu") / 2):
        print(f"without a GPU a step will take about {seconds:,.0f} s and {as_size(n_bytes)} of memory, of "
              f"{as_size(memory('cpu'))} that there are; --preset cpu takes minutes", flush=True)


def hint_hours(step, max_steps, seconds, say):
    """On a CPU, after a few steps: one line to `say` where the steps that are left take more than an hour."""
    left = (max_steps - step) * seconds / step / 3600
    if left > 1:
        say(f"without a GPU these {max_steps:,} steps will take about {left:,.0f} hours; --preset cpu takes minutes")
