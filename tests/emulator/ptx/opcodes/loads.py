"""ld and st."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Address, Immediate, Instruction, Operand, Register, Symbol, Vector
from ..scalars import DTYPE, SIZE, U64, UINT, Array, Mask
from .registry import opcode

SPACES = ("global", "shared", "local", "param")


def space_of(ins: Instruction) -> str:
    """Generic addresses are global: others cannot be made (see cvta)."""
    if ins.has("const", "shared__cluster"):
        raise PTXError("this state space is not supported")
    return "shared" if ins.has("shared__cta") else ins.one_of(*SPACES) or "global"


def address_of(machine: Machine, operand: Operand, space: str) -> Callable[[], Array]:
    """A function that returns the address in each thread: uint64 in global memory, int64 elsewhere."""
    if not isinstance(operand, Address):
        raise PTXError(f"an address is wanted, not {operand}")
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        row = machine.registers.files[base.size][base.index]
        if space != "global":
            return lambda: row.astype(np.int64) + offset
        if base.size != 8:
            raise PTXError("a global address of less than 64 bits")
        by = U64(offset & 0xFFFFFFFFFFFFFFFF)
        return (lambda: row + by) if offset else (lambda: row)
    if isinstance(base, Immediate):
        start = base.bits
    elif isinstance(base, Symbol):
        start = machine.registers.symbols[base.name]
    else:
        raise PTXError(f"an address in {base}")
    fixed = np.full(machine.threads, start + offset, U64 if space == "global" else np.int64)
    return lambda: fixed


def _items(operand: Operand, ins: Instruction) -> tuple[Operand, ...]:
    count = int((ins.one_of("v2", "v4", "v8") or "v1")[1:])
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise PTXError(f"{len(items)} registers for a vector of {count}")
    return items


@opcode("ld", "ldu")
def ld(machine: Machine, ins: Instruction) -> Step:
    space, type_ = space_of(ins), ins.type
    size = SIZE[type_]
    if space == "param":
        return _parameter(machine, ins)
    items = _items(ins.args[0], ins)
    address = address_of(machine, ins.args[1], space)
    rows = [machine.registers.row(item, type_) for item in items]
    writes = [machine.registers.write(item, type_) for item in items]
    unsigned, load = UINT[size], _loader(machine, ins, space, size, len(items))

    def step(mask: Mask) -> None:
        index, threads = machine.selected(mask)
        values = load(address()[index], threads)
        for j, (row, write) in enumerate(zip(rows, writes, strict=True)):
            if row is not None:
                row.view(unsigned)[index] = values[:, j]
            else:
                column = np.zeros(machine.threads, unsigned)
                column[index] = values[:, j]
                write(column.view(DTYPE[type_]), mask)

    return step


def _loader(machine: Machine, ins: Instruction, space: str, size: int, count: int) -> Callable[[Array, Array], Array]:
    if space == "shared":
        return lambda address, threads: machine.shared.load(address, size, count, ins, threads)
    if space == "local":
        return lambda address, threads: machine.local.load(address, size, count, ins, threads)
    return lambda address, threads: machine.memory.load(
        address, size, count, ins, threads, machine.cta_of_thread[threads]
    )


def _parameter(machine: Machine, ins: Instruction) -> Step:
    address, size, dtype = ins.args[1], SIZE[ins.type], DTYPE[ins.type]
    assert isinstance(address, Address)
    assert isinstance(address.base, Symbol)
    name, offset = address.base.name, address.offset
    write = machine.registers.write(ins.args[0], ins.type)

    def step(mask: Mask) -> None:
        value = np.frombuffer(machine.parameters[name], dtype, 1, offset)
        write(np.repeat(value, machine.threads), mask)

    if offset + size > next(SIZE[p.type] for p in machine.module.parameters if p.name == name):
        raise PTXError("a read behind the parameter")
    return step


@opcode("st")
def st(machine: Machine, ins: Instruction) -> Step:
    space, size = space_of(ins), SIZE[ins.type]
    if space == "param":
        raise PTXError("calls")
    items = _items(ins.args[1], ins)
    sources = [machine.registers.read(item, ins.type).view(UINT[size]) for item in items]
    address = address_of(machine, ins.args[0], space)

    def step(mask: Mask) -> None:
        index, threads = machine.selected(mask)
        values = np.stack(sources, 1)[index]
        at = address()[index]
        if space == "shared":
            machine.shared.store(at, size, len(items), values, ins, threads)
        elif space == "local":
            machine.local.store(at, size, len(items), values, ins, threads)
        else:
            ctas = machine.cta_of_thread[threads]
            machine.memory.store(at, size, len(items), values, ins, threads, ctas)

    return step
