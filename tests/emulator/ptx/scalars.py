"""PTX's fundamental types in numpy: their sizes, and the roundings that numpy lacks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
# Which threads take part in an instruction; True stands for all of them.
Mask = Array | Literal[True]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UINT: dict[int, Any] = {1: U8, 2: U16, 4: U32, 8: U64}  # by size in bytes
SINT: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
# bfloat16 and tf32 are held as their bits.
DTYPE: dict[str, Any] = {
    "pred": np.bool_,
    "b8": U8, "u8": U8, "s8": np.int8,
    "b16": U16, "u16": U16, "s16": np.int16, "f16": np.float16, "bf16": U16,
    "b32": U32, "u32": U32, "s32": np.int32, "f32": np.float32, "f16x2": U32, "bf16x2": U32, "tf32": U32,
    "b64": U64, "u64": U64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
SIZE: dict[str, int] = {name: np.dtype(dtype).itemsize for name, dtype in DTYPE.items()}
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


def bits(type_: str) -> str:
    """The untyped kind of the same size: b32 for f32."""
    return f"b{8 * SIZE[type_]}"


def is_signed(type_: str) -> bool:
    return type_[0] == "s"


def integer_range(type_: str) -> tuple[int, int]:
    limits = np.iinfo(DTYPE[type_])
    return int(limits.min), int(limits.max)


def flush(x: Array) -> Array:
    """float32 with subnormal numbers as zeros of their sign, as `.ftz` has them."""
    u = x.view(U32)
    return np.where(u & U32(0x7F800000), u, u & U32(0x80000000)).view(np.float32)


def from_bfloat16(pattern: Array) -> Array:
    return (pattern.astype(U32) << U32(16)).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16, of two as near the even one. float64 must be exact in float32."""
    x = np.ascontiguousarray(x, np.float32)
    u = x.view(U32)
    nearest = ((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), nearest)


def to_float16(x: Array) -> Array:
    """The bits of the nearest float16."""
    return x.astype(np.float16).view(U16)


def float_bits(x: Array, type_: str) -> Array:
    """Numbers rounded to f16 or bf16, as bits."""
    return to_float16(x) if type_.startswith("f16") else to_bfloat16(x)


def float_values(pattern: Array, type_: str) -> Array:
    """What bits of f16 or bf16 stand for, in float32."""
    return pattern.view(np.float16).astype(np.float32) if type_.startswith("f16") else from_bfloat16(pattern)


def toward_zero(x: Array) -> Array:
    """float64 to float32, rounded towards zero."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def odd_float32(x: Array) -> Array:
    """float64 to float32 such that rounding that again, to fewer bits, is as one rounding: inexact numbers are cut, and
    their last bit is set."""
    cut = toward_zero(x)
    inexact = np.isfinite(x) & (cut.astype(np.float64) != x)
    return (cut.view(U32) | inexact.astype(U32)).view(np.float32)


def fma_half(a: Array, b: Array, c: Array, type_: str) -> Array:
    """a * b + c for f16 and bf16, in a number that rounds to them as the exact sum does: the product is exact in
    float64, and a sum that is not gets an odd last bit."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = np.isfinite(total) & (error != 0)
    if inexact.any():
        beyond = inexact & (np.signbit(error) != np.signbit(total)) & (total != 0)  # rounded away from zero
        cut = np.where(beyond, np.nextafter(total, 0.0), total)
        total = np.where(inexact, (cut.view(U64) | U64(1)).view(np.float64), total)
    return odd_float32(total) if type_.startswith("bf16") else total


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once. float64 holds the product exactly; where its own rounding of the sum ends in a tie of
    float32, the sum's error decides."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if tie.any():
        c_part = total - product
        error = (product - (total - c_part)) + (c - c_part)
        up, down = tie & (error > 0), tie & (error < 0)
        total = np.where(up, np.nextafter(total, np.inf), np.where(down, np.nextafter(total, -np.inf), total))
    return total.astype(np.float32)
