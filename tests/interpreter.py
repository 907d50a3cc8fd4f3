"""Kernels on CPU tensors, in Triton's interpreter: what their tests share."""
import functools
import importlib
import importlib.util
import os

import kernels

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = functools.partial(kernels.using, "triton", interpreted=True)  # within it CPU tensors go by kernel


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
