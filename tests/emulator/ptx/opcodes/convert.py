"""cvt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction
from ..scalars import (
    DTYPE,
    FLOATS,
    SIZE,
    U16,
    U32,
    U64,
    Array,
    Mask,
    float_bits,
    flush,
    integer_range,
    odd_float32,
    toward_zero,
)  # fmt: skip
from .registry import opcode

TO_WHOLE: dict[str, Callable[..., Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", *TO_WHOLE)


@opcode("cvt")
def cvt(machine: Machine, ins: Instruction) -> Step:
    types = [part for part in ins.parts[1:] if part in SIZE]
    if len(types) != 2 or ins.has("satfinite", "rs", "scaled__n2__ue8m0"):
        raise PTXError("this form is not supported")
    to, of = types
    if to.endswith("x2"):
        return _pack(machine, ins, to)
    if to == "tf32":
        return _tf32(machine, ins)
    if of in FLOATS:
        return _float_to_float(machine, ins, to, of) if to in FLOATS else _float_to_integer(machine, ins, to, of)
    return _from_integer(machine, ins, to, of)


def _narrow(x: Array, type_: str, rounding: str | None) -> Array:
    """Bits of f16 or bf16."""
    nearest = np.where(np.isnan(x), U16(0x7FFF), float_bits(x, type_))
    if rounding != "rz":
        return nearest
    if type_.startswith("bf16"):
        return np.where(np.isnan(x), nearest, (np.ascontiguousarray(x, np.float32).view(U32) >> U32(16)).astype(U16))
    too_far = np.abs(nearest.view(np.float16).astype(np.float64)) > np.abs(x)
    return np.where(too_far & np.isfinite(x), nearest - U16(1), nearest)  # of the bits: one step to zero


def _pack(machine: Machine, ins: Instruction, to: str) -> Step:
    """Two numbers into the halves of a register, the first into the high one."""
    rounding = ins.one_of(*ROUNDINGS)
    if rounding not in ("rn", "rz") or ins.type != "f32":
        raise PTXError("only from f32, to the nearest or towards zero")
    high, low = (machine.registers.read(source, "f32") for source in ins.args[1:])
    relu = ins.has("relu")
    write = machine.registers.write(ins.args[0], "b32")
    halves = np.empty((machine.threads, 2), U16)

    def step(mask: Mask) -> None:
        for j, number in enumerate((low, high)):
            halves[:, j] = _narrow(np.maximum(number, np.float32(0)) if relu else number, to, rounding)
        write(halves.view(U32).reshape(-1), mask)

    return step


def _tf32(machine: Machine, ins: Instruction) -> Step:
    """rna: to the nearest of 10 bits, ties away from zero."""
    if not ins.has("rna"):
        raise PTXError("only rna")
    a, write = machine.registers.read(ins.args[1], "b32"), machine.registers.write(ins.args[0], "b32")
    exponent = U32(0x7F800000)
    return lambda mask: write(np.where((a & exponent) == exponent, a, (a + U32(0x1000)) & U32(0xFFFFE000)), mask)


def _float_to_float(machine: Machine, ins: Instruction, to: str, of: str) -> Step:
    rounding = ins.one_of(*ROUNDINGS)
    read, write = machine.registers.read_floats(ins.args[1], of), machine.registers.write_floats(ins.args[0], to)
    if ins.has("sat"):
        raise PTXError("saturation")
    if rounding in TO_WHOLE:
        whole = TO_WHOLE[rounding]
        return lambda mask: write(whole(read()), mask)
    narrowing = SIZE[to] < SIZE[of]
    if rounding in ("rm", "rp") or (rounding == "rz" and not narrowing):
        raise PTXError("directed rounding")
    relu = ins.has("relu")
    if narrowing and SIZE[to] == 2:
        write_bits = machine.registers.write(ins.args[0], "b16")

        def narrow(mask: Mask) -> None:
            x = np.maximum(read(), 0) if relu else read()
            if to == "bf16" and of == "f64":
                raise PTXError("bf16 of f64")
            write_bits(_narrow(x, to, rounding), mask)

        return narrow
    if relu:
        raise PTXError("relu of this form")
    if of == "f64" and to == "f32" and rounding == "rz":
        return lambda mask: write(toward_zero(read()), mask)
    if ins.has("ftz"):
        return lambda mask: write(flush(read().astype(np.float32)), mask)
    if of == "f64":
        return lambda mask: write(read().astype(np.float32), mask)
    return lambda mask: write(read(), mask)


def _float_to_integer(machine: Machine, ins: Instruction, to: str, of: str) -> Step:
    """Out of range gives the nearest integer there is, NaN gives 0."""
    rounding = ins.one_of(*TO_WHOLE)
    if rounding is None:
        raise PTXError("a rounding to whole numbers is wanted")
    whole, (least, most) = TO_WHOLE[rounding], integer_range(to)
    read, write = machine.registers.read_floats(ins.args[1], of), machine.registers.write(ins.args[0], to)
    dtype, wide = DTYPE[to], np.int64 if least < 0 else U64
    ftz = ins.has("ftz") and of == "f32"

    def step(mask: Mask) -> None:
        x = read()
        x = whole((flush(x) if ftz else x).astype(np.float64))
        x = np.where(np.isnan(x), 0.0, x)
        above, below = x >= float(most), x <= float(least)
        inside = np.where(above | below, 0.0, x).astype(wide).astype(dtype)
        write(np.where(above, dtype(most), np.where(below, dtype(least), inside)), mask)

    return step


def _from_integer(machine: Machine, ins: Instruction, to: str, of: str) -> Step:
    a = machine.registers.read(ins.args[1], of)
    if to in FLOATS:
        if ins.one_of(*ROUNDINGS) not in ("rn", None) or ins.has("sat"):
            raise PTXError("directed rounding and saturation")
        write_floats = machine.registers.write_floats(ins.args[0], to)
        if to == "bf16":
            return lambda mask: write_floats(odd_float32(a.astype(np.float64)), mask)
        dtype = np.float32 if to == "f32" else np.float64
        return lambda mask: write_floats(a.astype(dtype), mask)
    write, dtype = machine.registers.write(ins.args[0], to), DTYPE[to]
    if not ins.has("sat"):
        return lambda mask: write(a.astype(dtype), mask)
    (least, most), (smallest, largest) = integer_range(to), integer_range(of)
    low, high = a.dtype.type(max(least, smallest)), a.dtype.type(min(most, largest))
    return lambda mask: write(np.clip(a, low, high).astype(dtype), mask)
