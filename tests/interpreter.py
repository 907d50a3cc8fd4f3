"""Kernels on CPU tensors, in Triton's interpreter, and on a GPU: what their tests share."""
import functools
import importlib
import importlib.util
import os
from contextlib import contextmanager

import pytest
import torch

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
