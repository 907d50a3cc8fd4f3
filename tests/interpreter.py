"""Kernels on CPU tensors, in Triton's interpreter, and on a GPU: what their tests share; below, models by "torch" and
by "triton" side by side."""
import functools
import importlib
import importlib.util
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import choices
import kernels

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = functools.partial(kernels.using, "triton", interpreted=True)  # within it CPU tensors go by kernel
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or a GPU that runs the kernels instead")
EVERYWHERE = pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_interpreter, id="interpreter"),
                                                pytest.param("cuda", marks=pytest.mark.gpu)])


def kernels_of(name):
    """The module of fused/ of this name; None where there is no Triton."""
    return importlib.import_module(f"fused.{name}") if TRITON else None


def formula(operation):
    """The operation without a kernel, wherever its tensors are."""
    @functools.wraps(operation)
    def plain(*given, **how):
        with kernels.using("torch"):
            return operation(*given, **how)
    return plain


def by_kernel(device):
    """Within it tensors on "cpu" go by the interpreter, those on "cuda" by kernel as ever."""
    return interpreted() if device == "cpu" else kernels.using("triton")


@contextmanager
def alone(device="cpu"):
    """by_kernel, and no formula in PyTorch can run: what nearly all of them begin with is not there."""
    with pytest.MonkeyPatch.context() as patch, by_kernel(device):
        for name in ("exactly", "softmax_over", "scan_reference", "adamw_step_reference"):
            patch.setattr(kernels, name, None)
        yield


def results(op, tensors, upstream=None, constant=0, used=None):
    """(outputs, gradients of the floating tensors, the outputs' gradients).

    upstream: those of the outputs that ask for one, where they are known; else they are drawn, and come through this
    function if it is one. constant: so many tensors, the last, ask for no gradient. used: the only output that has one.
    """
    n = len(tensors) - constant
    given = [t.detach().requires_grad_() if i < n and torch.is_tensor(t) and t.is_floating_point() else t
             for i, t in enumerate(tensors)]
    out = op(*given)
    out = out if isinstance(out, tuple) else (out,)
    flows = [y for i, y in enumerate(out) if y.requires_grad and used in (None, i)]
    if not isinstance(upstream, list):
        drawn = [torch.randn(y.shape).to(y) for y in flows]
        upstream = [upstream(g) for g in drawn] if upstream else drawn
    if flows:
        torch.autograd.backward(flows, [g.to(y) for g, y in zip(upstream, flows)])
    return [y.detach() for y in out], [t.grad for t in given if torch.is_tensor(t) and t.requires_grad], upstream


# --- Models by each ---

ROOT = Path(kernels.__file__).resolve().parent
OPERATIONS = ("rms_norm", "layer_norm", "rotary", "gated", "gelu", "relu2", "cross_entropy",
              "batched_linear_cross_entropy", "attend", "attend_differential", "attend_space", "attend_time",
              "attend_one", "attend_latent", "min_gru", "selective_scan", "grouped_linear", "nearest_code",
              "gumbel_softmax", "reinmax", "adamw_step")


def some(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, near=2e-5):
    torch.testing.assert_close(got, want, atol=near, rtol=min(near, 2e-5))


def in_words(value):
    """Of a test's name: a set in one order in all processes, which must collect the same tests."""
    return str(sorted(value) if isinstance(value, set) else value)


@contextmanager
def watched():
    """Notes the calls of each operation by "triton", not those by another: {name: [arguments of a call, ...]}."""
    calls, inside = {}, []
    modules = [module for module in list(sys.modules.values())
               if str(getattr(module, "__file__", None)).startswith(str(ROOT)) and "tests" not in module.__file__]
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            def spy(*given, name=name, operation=(real := getattr(kernels, name)), **how):
                if kernels.on() and not inside:
                    calls.setdefault(name, []).append((given, how))
                inside.append(name)
                try:
                    return operation(*given, **how)
                finally:
                    inside.pop()
            for module in modules:
                if getattr(module, name, None) is real:
                    patch.setattr(module, name, spy)
            if name in kernels.PLAIN:
                patch.setitem(kernels.PLAIN, name, spy)
        yield calls


def pair(build, noise=0.05):
    """build() twice, with one set of weights, none of them 0 or 1."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build())
    one, two = models
    assert one.state_dict().keys() == two.state_dict().keys()  # and so for checkpoints
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    two.load_state_dict(one.state_dict())
    return one, two


def by_each(models):
    """The first model, and while it is used kernels "torch"; then the second, with "triton"."""
    for way, model in zip(kernels.WAYS, models):
        with kernels.using(way):
            yield model


def learn(model, run):
    """(what run(model) gives: {name: value}, every parameter's gradient of the first, a loss; a tensor alone: of its
    sum with random weights)."""
    model.zero_grad()
    out = run(model)
    out = out if isinstance(out, dict) else {"out": out}
    first = next(iter(out.values()))
    (first * some(*first.shape, seed=9) if first.dim() else first).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_same(models, run, expected=None, way=partial(kernels.using, "triton"), near=2e-5, largest=True):
    """Two models of one set of weights give the same, the first by "torch", the second this `way`; which calls the
    operations `expected`. largest: gradients are as near as float32's rounding of the largest of a tensor."""
    found = []
    for how, model in zip((partial(kernels.using, "torch"), way), models):
        with watched() as calls, how(), choices.clear():
            found.append(learn(model, run))
    (out, gradients), (other, theirs) = found
    assert next(iter(out.values())).abs().mean() > 0.01
    assert sum(g is not None and g.abs().max() > 1e-3 for g in gradients.values()) > 3
    assert out.keys() == other.keys() and (expected is None or calls.keys() == expected)
    for name in out:
        close(other[name], out[name], near)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item() if largest and gradient is not None else 0
        close(theirs[name], gradient, near * max(1.0, scale))
    return calls


def assert_near_under_autocast(models, run, near, cosine):
    """Under bfloat16 the types fit: both ways are a rounding away from float32. run: to (outputs, loss)."""
    found = []
    for model in by_each(models):
        with torch.autocast("cpu", torch.bfloat16), watched() as calls:
            out, loss = run(model)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        embed = [model.embed.grad.flatten()] if isinstance(getattr(model, "embed", None), torch.nn.Parameter) else []
        found.append([out.detach().float().flatten(), torch.cat(gradients), *embed])
    close(found[1][0], found[0][0], near)
    assert all(torch.nn.functional.cosine_similarity(*two, 0) > cosine for two in zip(*found, strict=True))
    return calls


def assert_dropped_alike(models, run, operations, near=2e-5):
    """With dropout both draw the same, as none of the operations goes by kernel; in evaluation all do."""
    found = []
    for model in by_each(models):
        torch.manual_seed(5)
        with watched() as calls:
            found.append(run(model))
        assert not calls.keys() & operations
    close(*found, near)
    with watched() as calls, kernels.using("triton"):
        run(models[1].eval())
    assert operations <= calls.keys()


class Largest(TorchDispatchMode):
    """The most numbers that one result of any operation had."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))])
        return out
