"""Integer arithmetic, logic and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import KernelError, PTXError
from ..machine import Machine, Step
from ..operands import Immediate, Instruction
from ..scalars import DTYPE, SIZE, U8, U32, U64, UINT, Array, Mask, bits, is_signed
from .registry import elementwise, opcode

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


@opcode("and", "or", "xor", "not")
def logic(machine: Machine, ins: Instruction) -> Step:
    function = (_BOOLEAN if ins.type == "pred" else _LOGIC)[ins.name]
    sources = [machine.registers.read(source, ins.type) for source in ins.args[1:]]
    return elementwise(machine, ins.args[0], ins.type, function, *sources)


@opcode("lop3")
def lop3(machine: Machine, ins: Instruction) -> Step:
    a, b, c = (machine.registers.read(source, ins.type) for source in ins.args[1:4])
    write, table = machine.registers.write(ins.args[0], ins.type), ins.args[4]
    assert isinstance(table, Immediate)

    def step(mask: Mask) -> None:
        result = np.zeros_like(a)
        for i in range(8):
            if table.bits >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(result, mask)

    return step


@opcode("shl", "shr")
def shift(machine: Machine, ins: Instruction) -> Step:
    """Amounts of the register's width or more shift everything out."""
    width, left = 8 * SIZE[ins.type], ins.name == "shl"
    a, amount = machine.registers.read(ins.args[1], ins.type), machine.registers.read(ins.args[2], "b32")
    function = np.left_shift if left else np.right_shift
    if isinstance(ins.args[2], Immediate) and ins.args[2].bits < width:
        return elementwise(machine, ins.args[0], ins.type, function, a, amount.astype(a.dtype))
    write = machine.registers.write(ins.args[0], ins.type)

    def step(mask: Mask) -> None:
        shifted = function(a, np.minimum(amount, U32(width - 1)).astype(a.dtype))
        write(shifted if is_signed(ins.type) and not left else np.where(amount < width, shifted, 0), mask)

    return step


@opcode("shf")
def funnel_shift(machine: Machine, ins: Instruction) -> Step:
    low, high, amount = (machine.registers.read(source, "b32") for source in ins.args[1:])
    write, left, wrap = machine.registers.write(ins.args[0], "b32"), ins.has("l"), ins.has("wrap")

    def step(mask: Mask) -> None:
        n = (amount & U32(31) if wrap else np.minimum(amount, U32(32))).astype(U64)
        both = (high.astype(U64) << U64(32)) | low.astype(U64)
        write(((both << n) >> U64(32) if left else both >> n).astype(U32), mask)

    return step


def _ones(count: Array) -> Array:
    """`count` low bits set, of 64."""
    count = count.astype(np.int64)
    return np.where(count < 64, (U64(1) << np.clip(count, 0, 63).astype(U64)) - U64(1), ~U64(0))


@opcode("bfe")
def bit_field_extract(machine: Machine, ins: Instruction) -> Step:
    type_, width = ins.type, 8 * SIZE[ins.type]
    a = machine.registers.read(ins.args[1], type_)
    position, length = (machine.registers.read(source, "b32") for source in ins.args[2:])
    write = machine.registers.write(ins.args[0], type_)

    def step(mask: Mask) -> None:
        at, n = (position & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        u = a.view(UINT[SIZE[type_]]).astype(U64)
        field = np.where(at < 64, u >> np.minimum(at, 63).astype(U64), U64(0)) & _ones(n)
        if is_signed(type_):
            top = np.clip(np.minimum(at + n - 1, width - 1), 0, 63).astype(U64)
            negative = (n > 0) & ((u >> top) & U64(1) == 1)
            field = np.where(negative, field | ~_ones(np.clip(width - at, 0, n)), field)
        write(field.astype(UINT[SIZE[type_]]).view(DTYPE[type_]), mask)

    return step


@opcode("bfi")
def bit_field_insert(machine: Machine, ins: Instruction) -> Step:
    a, b = (machine.registers.read(source, ins.type) for source in ins.args[1:3])
    position, length = (machine.registers.read(source, "b32") for source in ins.args[3:])
    write = machine.registers.write(ins.args[0], ins.type)

    def step(mask: Mask) -> None:
        at = position & U32(255)
        by = np.minimum(at, U32(63)).astype(U64)
        field = np.where(at < 64, _ones(length & U32(255)) << by, U64(0))
        write(((b.astype(U64) & ~field) | ((a.astype(U64) << by) & field)).astype(a.dtype), mask)

    return step


@opcode("prmt")
def permute(machine: Machine, ins: Instruction) -> Step:
    if ins.type != "b32":
        raise PTXError("only the general form of prmt is supported")
    a, b, selector = (machine.registers.read(source, "b32") for source in ins.args[1:])
    write = machine.registers.write(ins.args[0], "b32")

    def step(mask: Mask) -> None:
        eight = np.concatenate([a.copy().view(U8).reshape(-1, 4), b.copy().view(U8).reshape(-1, 4)], 1)
        out = np.empty((machine.threads, 4), U8)
        for j in range(4):
            choice = (selector >> U32(4 * j)) & U32(15)
            byte = eight[machine.thread, choice & U32(7)]
            out[:, j] = np.where(choice & U32(8), np.where(byte & U8(128), U8(255), U8(0)), byte)
        write(out.view(U32).reshape(-1), mask)

    return step


def _bit_length(a: Array) -> Array:
    """Of unsigned integers."""
    length = np.zeros(len(a), U32)
    a = a.astype(U64)
    for by in (32, 16, 8, 4, 2, 1):
        large = (a >> U64(by)) > 0
        length += large * U32(by)
        a = np.where(large, a >> U64(by), a)
    return length + (a > 0)


def _reversed(a: Array) -> Array:
    raw = np.ascontiguousarray(a).view(U8).reshape(len(a), -1)
    return np.packbits(np.unpackbits(raw, axis=1)[:, ::-1], axis=1).view(a.dtype).reshape(-1)


@opcode("popc", "clz", "brev", "bfind")
def count_bits(machine: Machine, ins: Instruction) -> Step:
    if ins.name == "bfind" and (is_signed(ins.type) or ins.has("shiftamt")):
        raise PTXError("bfind of unsigned numbers only")
    a, width = machine.registers.read(ins.args[1], ins.type), U32(8 * SIZE[ins.type])
    functions: dict[str, Callable[[], Array]] = {
        "popc": lambda: np.bitwise_count(a), "clz": lambda: width - _bit_length(a), "brev": lambda: _reversed(a),
        "bfind": lambda: _bit_length(a) - U32(1),
    }  # fmt: skip
    function = functions[ins.name]
    write = machine.registers.write(ins.args[0], ins.type if ins.name == "brev" else "u32")
    return lambda mask: write(function(), mask)


def multiply_high(a: Array, b: Array, type_: str) -> Array:
    size = SIZE[type_]
    if size < 8:
        wide: Any = np.int64 if is_signed(type_) else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(DTYPE[type_])
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], DTYPE[type_])


@opcode("addc", "subc", "madc")
def extended(machine: Machine, ins: Instruction) -> Step:
    """add, sub and mad with `.cc`, and those with carry in: a carry flag for each thread."""
    if SIZE[ins.type] != 4:
        raise PTXError("carries of 32-bit arithmetic only")
    uses_carry, sets_carry, subtracts = ins.name[-1] == "c", ins.has("cc"), ins.name.startswith("sub")
    write = machine.registers.write(ins.args[0], "u32")
    sources = [machine.registers.read(source, ins.type) for source in ins.args[1:]]

    def step(mask: Mask) -> None:
        x = sources[0]
        if len(sources) == 3:
            high = ins.has("hi")
            x = multiply_high(x, sources[1], ins.type) if high else x.view(U32) * sources[1].view(U32)
        left, right = x.view(U32).astype(np.int64), sources[-1].view(U32).astype(np.int64)
        carry = machine.carry.astype(np.int64) if uses_carry else 0
        total = left - right - carry if subtracts else left + right + carry
        write((total & 0xFFFFFFFF).astype(U32), mask)
        if sets_carry:
            np.copyto(machine.carry, (total < 0) | (total > 0xFFFFFFFF), where=mask)

    return step


_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}


def integer_binary(machine: Machine, ins: Instruction) -> Step:
    """add, sub, mul, min, max."""
    destination, x, y = ins.args
    if ins.has("cc"):
        return extended(machine, ins)
    if ins.has("sat", "relu"):
        raise PTXError("saturating arithmetic")
    read, type_ = machine.registers.read, ins.type
    if ins.has("wide"):
        wide = type_[0] + str(16 * SIZE[type_])

        def product(a: Array, b: Array, **into: Any) -> Array:
            return np.multiply(a, b, dtype=DTYPE[wide], casting="unsafe", **into)

        return elementwise(machine, destination, wide, product, read(x, type_), read(y, type_))
    if ins.has("hi"):
        a, b, write = read(x, type_), read(y, type_), machine.registers.write(destination, type_)
        return lambda mask: write(multiply_high(a, b, type_), mask)
    if ins.name not in ("min", "max"):
        type_ = bits(type_)  # the same bits, signed or not
    return elementwise(machine, destination, type_, _BINARY[ins.name], read(x, type_), read(y, type_))


def integer_mad(machine: Machine, ins: Instruction) -> Step:
    if ins.has("cc"):
        return extended(machine, ins)
    if ins.has("sat"):
        raise PTXError("saturating arithmetic")
    type_ = ins.type
    result = type_[0] + str(16 * SIZE[type_]) if ins.has("wide") else type_
    a, b = (machine.registers.read(source, type_) for source in ins.args[1:3])
    c, write = machine.registers.read(ins.args[3], result), machine.registers.write(ins.args[0], result)
    if ins.has("hi"):
        return lambda mask: write(multiply_high(a, b, type_) + c, mask)
    return lambda mask: write(np.multiply(a, b, dtype=DTYPE[result], casting="unsafe") + c, mask)


@opcode("rem")
def integer_divide(machine: Machine, ins: Instruction) -> Step:
    """div and rem; quotients are cut towards zero."""
    type_, remainder = ins.type, ins.name == "rem"
    unsigned = UINT[SIZE[type_]]
    a, b = (machine.registers.read(source, type_) for source in ins.args[1:])
    write = machine.registers.write(ins.args[0], type_)

    def step(mask: Mask) -> None:
        zero = (b == 0) if mask is True else (b == 0) & mask
        if zero.any():
            raise KernelError(f"integer division by zero in thread {int(np.flatnonzero(zero)[0])}; {ins.where()}")
        divisor = np.where(b == 0, 1, b).astype(b.dtype)
        x, y = (np.where(v < 0, ~v.view(unsigned) + unsigned(1), v.view(unsigned)) for v in (a, divisor))
        result = x % y if remainder else x // y
        negative = a < 0 if remainder else (a < 0) != (divisor < 0)
        write(np.where(negative, ~result + unsigned(1), result).astype(unsigned).view(DTYPE[type_]), mask)

    return step


@opcode("dp4a")
def dot_of_bytes(machine: Machine, ins: Instruction) -> Step:
    a, b = (
        machine.registers.read(source, "b32").view(DTYPE[kind[0] + "8"]).reshape(-1, 4)
        for source, kind in zip(ins.args[1:3], ins.parts[1:3], strict=True)
    )
    c, write = machine.registers.read(ins.args[3], "s32"), machine.registers.write(ins.args[0], "s32")
    return lambda mask: write((a.astype(np.int64) * b).sum(1).astype(np.int32) + c, mask)
