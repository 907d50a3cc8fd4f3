"""What the kernels of this folder share. Nothing here imports anything of ours but this folder."""
import os

import triton
import triton.language as tl
from triton import next_power_of_2

jit = triton.jit
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 bits as if integers


@jit
def dot(a, b):
    """a (M, K) @ b (K, N) summed in float32, whatever a and b are; float32 is not rounded to TF32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def as_rows(x):
    """x (..., C) as (rows, C), features side by side; a copy only where strides leave no other way."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()


def bounded(n, low, high):
    """The smallest power of two that is at least n, within low ... high (powers of two)."""
    return min(high, max(low, next_power_of_2(n)))
