"""mov, selp, cvta, and what has no effect that can be seen here."""

from __future__ import annotations

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction, Pair, Vector
from ..scalars import DTYPE, SIZE, U64, Mask, bits
from .registry import opcode


@opcode("mov")
def mov(machine: Machine, ins: Instruction) -> Step:
    registers = machine.registers
    destination, source = ins.args
    if isinstance(source, Vector):
        return _pack(machine, ins)
    if isinstance(destination, (Vector, Pair)):
        return _unpack(machine, ins)
    type_ = "pred" if ins.type == "pred" else bits(ins.type)
    row, values = registers.row(destination, type_), registers.read(source, type_)
    if row is None:
        write = registers.write(destination, type_)
        return lambda mask: write(values, mask)
    return lambda mask: np.copyto(row, values, where=mask)


def _pack(machine: Machine, ins: Instruction) -> Step:
    destination, source = ins.args
    assert isinstance(source, Vector)
    n = len(source.items)
    part = f"b{8 * SIZE[ins.type] // n}"
    parts = [machine.registers.read(item, part) for item in source.items]
    row = machine.registers.row(destination, bits(ins.type))
    if row is None:
        raise PTXError("packing into a register of another size")
    target = row.view(DTYPE[part]).reshape(machine.threads, n)

    def step(mask: Mask) -> None:
        values = np.stack(parts, 1)
        np.copyto(target, values, where=mask if mask is True else mask[:, None])

    return step


def _unpack(machine: Machine, ins: Instruction) -> Step:
    destination, source = ins.args
    assert isinstance(destination, Vector)
    n = len(destination.items)
    part = f"b{8 * SIZE[ins.type] // n}"
    values = machine.registers.read(source, bits(ins.type))
    writes = [machine.registers.write(item, part) for item in destination.items]

    def step(mask: Mask) -> None:
        pieces = values.copy().view(DTYPE[part]).reshape(machine.threads, n)
        for j, write in enumerate(writes):
            write(pieces[:, j], mask)

    return step


@opcode("cvta")
def cvta(machine: Machine, ins: Instruction) -> Step:
    if not ins.has("global"):
        raise PTXError("generic addresses of anything but global memory")
    return mov(machine, ins)


@opcode("selp")
def selp(machine: Machine, ins: Instruction) -> Step:
    type_ = bits(ins.type)
    write = machine.registers.write(ins.args[0], type_)
    yes, no = machine.registers.read(ins.args[1], type_), machine.registers.read(ins.args[2], type_)
    choice = machine.predicate(ins.args[3])
    return lambda mask: write(np.where(choice(), yes, no), mask)


@opcode("createpolicy")
def createpolicy(machine: Machine, ins: Instruction) -> Step:
    """Cache policies are not emulated."""
    write = machine.registers.write(ins.args[0], "b64")
    return lambda mask: write(U64(0), mask)


@opcode("prefetch", "prefetchu", "membar", "fence", "applypriority", "discard", "nanosleep")
def nothing(machine: Machine, ins: Instruction) -> None:
    """Caches and time are not emulated, and stores are seen at once."""
