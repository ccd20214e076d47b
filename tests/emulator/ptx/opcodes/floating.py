"""Floating arithmetic. Approximate functions are rounded correctly, or off by up to their documented error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction
from ..scalars import FLOATS, U32, Array, Mask, flush, fma_f32, fma_half
from .integer import integer_binary, integer_divide, integer_mad
from .registry import elementwise, opcode

Function = Callable[..., Any]


def apply(machine: Machine, ins: Instruction, function: Function) -> Step:
    """Any function of numbers of any floating type; `.ftz` flushes what goes in and what comes out."""
    type_ = ins.type
    reads = [machine.registers.read_floats(source, type_) for source in ins.args[1:]]
    write = machine.registers.write_floats(ins.args[0], type_)
    if type_ != "f32" or not ins.has("ftz"):
        return lambda mask: write(function(*[read() for read in reads]), mask)

    def step(mask: Mask) -> None:
        write(flush(function(*[flush(read()) for read in reads]).astype(np.float32)), mask)

    return step


def _binary(machine: Machine, ins: Instruction, function: Function) -> Step:
    """float16 and bfloat16 are computed in float32 and rounded again, which no result can tell."""
    if ins.has("rz", "rm", "rp", "sat"):
        raise PTXError("directed rounding and saturation")
    if ins.type in ("f32", "f64") and not ins.has("ftz"):
        sources = [machine.registers.read(source, ins.type) for source in ins.args[1:]]
        return elementwise(machine, ins.args[0], ins.type, function, *sources)
    return apply(machine, ins, function)


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@opcode("add", "sub", "mul")
def arithmetic(machine: Machine, ins: Instruction) -> Step:
    if ins.type not in FLOATS:
        return integer_binary(machine, ins)
    return _binary(machine, ins, _ARITHMETIC[ins.name])


@opcode("min", "max")
def minimum(machine: Machine, ins: Instruction) -> Step:
    if ins.has("xorsign", "abs") or len(ins.args) != 3:
        raise PTXError("only the plain form with two operands is supported")
    if ins.type not in FLOATS:
        return integer_binary(machine, ins)
    if ins.has("NaN"):  # NaN wins; otherwise the number does
        plain: Function = np.minimum if ins.name == "min" else np.maximum
    else:
        plain = np.fmin if ins.name == "min" else np.fmax

    def signed(a: Array, b: Array) -> Array:
        """-0 is less than 0, which numpy does not know."""
        result = plain(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            result = np.where(zeros, a + b if ins.name == "max" else -(-a - b), result)
        return result

    return apply(machine, ins, signed)


@opcode("neg", "abs")
def sign(machine: Machine, ins: Instruction) -> Step:
    function = np.negative if ins.name == "neg" else np.absolute
    if ins.type in FLOATS:
        return _binary(machine, ins, function)
    source = machine.registers.read(ins.args[1], ins.type)
    return elementwise(machine, ins.args[0], ins.type, function, source)


@opcode("copysign")
def copysign(machine: Machine, ins: Instruction) -> Step:
    return apply(machine, ins, lambda signed, number: np.copysign(number, signed))


@opcode("mad")
def mad(machine: Machine, ins: Instruction) -> Step:
    return fma(machine, ins) if ins.type in FLOATS else integer_mad(machine, ins)


@opcode("fma")
def fma(machine: Machine, ins: Instruction) -> Step:
    if ins.has("rz", "rm", "rp", "sat", "oob") or ins.type == "f64":
        raise PTXError("directed rounding, saturation and float64")
    function: Function = fma_f32
    if ins.type != "f32":
        function = functools.partial(fma_half, type_=ins.type)
    if ins.has("relu"):  # NaN stays, as NaN
        return apply(machine, ins, lambda a, b, c: np.maximum(function(a, b, c), 0))
    return apply(machine, ins, function)


@opcode("div")
def div(machine: Machine, ins: Instruction) -> Step:
    if ins.type not in FLOATS:
        return integer_divide(machine, ins)
    if ins.type == "f64":
        return _binary(machine, ins, np.divide)
    return _approximate(machine, ins, np.divide, 0.0 if ins.has("rn") else 2.0**-22)


# The functions and the largest relative error of their `.approx` form (PTX ISA, "Floating Point Instructions").
APPROXIMATE: dict[str, tuple[Function, float]] = {
    "ex2": (np.exp2, 2.0**-22),
    "lg2": (np.log2, 2.0**-22),  # between 0.5 and 2 the error is absolute
    "rcp": (np.reciprocal, 2.0**-23),
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22),
    "sin": (np.sin, 2.0**-20),  # absolute, in [-pi, pi]
    "cos": (np.cos, 2.0**-20),
    "tanh": (np.tanh, 2.0**-11),
}
_ABSOLUTE = ("lg2", "sin", "cos")


@opcode(*APPROXIMATE)
def approximate(machine: Machine, ins: Instruction) -> Step:
    function, error = APPROXIMATE[ins.name]
    return _approximate(machine, ins, function, error if ins.has("approx") else 0.0)


def _approximate(machine: Machine, ins: Instruction, function: Function, error: float) -> Step:
    if ins.type == "f64" or ins.has("rz", "rm", "rp"):
        raise PTXError("float64 and directed rounding")
    if ins.type not in ("f32", "f64") and ins.name in ("ex2", "tanh"):
        error = 2.0**-9.9 if ins.type.startswith("f16") and ins.name == "ex2" else max(error, 2.0**-10)
    size, seed = machine.options.approximation * error, machine.options.seed

    def rounded(*operands: Array) -> Array:
        result = function(*[x.astype(np.float64) for x in operands])
        if size:
            result = result + size * _hash(operands, seed) * _scale(ins.name, operands[0], result)
        return result.astype(np.float32)

    return apply(machine, ins, rounded)


def _scale(name: str, x: Array, result: Array) -> Array:
    """What the error is counted in."""
    if name in _ABSOLUTE:
        near_one = (x > 0.5) & (x < 2) if name == "lg2" else np.True_
        return np.where(near_one, 1.0, np.abs(result))
    return np.where(np.isfinite(result), result, 0.0)


def _hash(operands: tuple[Array, ...], seed: int) -> Array:
    """Numbers from -1 to 1 that depend on the operands alone, as an approximation's error does."""
    state: Any = np.full(operands[0].shape, seed & 0xFFFFFFFF, U32)
    for x in operands:
        state = (state ^ np.ascontiguousarray(x, np.float32).view(U32)) * U32(2654435761)
        state ^= state >> U32(15)
        state *= U32(2246822519)
        state ^= state >> U32(13)
    return state.astype(np.float64) / 2**31 - 1


@opcode("testp")
def testp(machine: Machine, ins: Instruction) -> Step:
    tests: dict[str, Function] = {
        "finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)
    }  # fmt: skip
    test = tests[ins.parts[1]]
    read = machine.registers.read_floats(ins.args[1], ins.type)
    write = machine.registers.write(ins.args[0], "pred")
    return lambda mask: write(test(read()), mask)
