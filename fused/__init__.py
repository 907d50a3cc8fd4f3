"""Triton's kernels of the operations in kernels.py, which alone imports them."""
from fused import adamw, attention, codes, experts, recurrence, rows  # noqa: F401
