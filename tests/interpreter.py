"""Patches of Triton's interpreter, which runs the kernel without a GPU. They apply to Triton 3.4 to 3.9."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import numpy as np


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """The bit patterns of the nearest bfloat16 numbers (round to nearest, ties to even)."""
    numbers = np.asarray(numbers).astype(np.float32)
    bits = numbers.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Patch the interpreter's defects until the context ends. A missing Triton or a missing method is left alone.

    - A cast to bfloat16 truncates, where devices round to nearest. A cast between bfloat16 and any type but float32
      reads the bit patterns as numbers.
    - tl.dot multiplies the bit patterns of bfloat16 as numbers.
    - tl.fma rounds the product before the sum.
    - tl.minimum and tl.maximum give NaN where one operand is NaN. Devices give the other operand.
    - tl.reduce with a custom combine function loops over single elements, which takes minutes.
    """
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle
    except ImportError:
        yield
        return

    def in_float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(from_bfloat16(handle.data), tl.float32)

    def cast_impl(self, source, target):
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        source = in_float32(source)
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return TensorHandle(to_bfloat16(source.data), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, in_float32(a), in_float32(b), *rest)

    def create_fma(self, x, y, z):
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, as on a device
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_minnumf(self, x, y):
        return TensorHandle(np.fmin(x.data, y.data), x.dtype.scalar)

    def create_maxnumf(self, x, y):
        return TensorHandle(np.fmax(x.data, y.data), x.dtype.scalar)

    def generic_reduce(self, input):
        if self.axis is None or self.keep_dims:
            return reduce(self, input)
        slices = zip(*(np.moveaxis(x.handle.data, self.axis, 0) for x in input), strict=True)
        tensors = ([self.to_tensor(s, x.dtype) for s, x in zip(arrays, input, strict=True)] for arrays in slices)
        return list(functools.reduce(lambda a, b: self.combine_fn.fn(*a, *b), tensors))

    cast, dot = (getattr(InterpreterBuilder, name, None) for name in ("cast_impl", "create_dot"))
    reduce = getattr(ReduceOps, "generic_reduce", None)
    repairs = [
        (InterpreterBuilder, cast_impl), (InterpreterBuilder, create_dot), (InterpreterBuilder, create_fma),
        (InterpreterBuilder, create_minnumf), (InterpreterBuilder, create_maxnumf),
        (ReduceOps, generic_reduce),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, repair in repairs:
            if hasattr(owner, repair.__name__):
                stack.enter_context(mock.patch.object(owner, repair.__name__, repair))
        yield
