"""cp.async: the data lands as late as the ISA allows, when its thread waits for it."""

from __future__ import annotations

import numpy as np

from ..errors import KernelError, PTXError
from ..machine import Machine, Step
from ..operands import PREDICATE, Immediate, Instruction, Register
from ..scalars import U8, U32, U64, Array, Mask
from ..shared import Copy
from .loads import address_of
from .registry import opcode


@opcode("cp")
def cp(machine: Machine, ins: Instruction) -> Step:
    if ins.parts[1] != "async" or ins.has("bulk", "mbarrier"):
        raise PTXError("only the non-bulk cp.async is supported")
    if ins.has("commit_group"):
        return lambda mask: _commit(machine, mask)
    if ins.has("wait_group", "wait_all"):
        return _wait(machine, ins)
    return _copy(machine, ins)


def _commit(machine: Machine, mask: Mask) -> None:
    machine.copy_group[machine.selected(mask)[0]] += 1


def _wait(machine: Machine, ins: Instruction) -> Step:
    """For all groups but the newest `n`."""
    if ins.has("wait_all"):
        newest = None
    else:
        assert isinstance(ins.args[0], Immediate)
        newest = ins.args[0].bits

    def step(mask: Mask) -> None:
        limit = np.full(machine.threads, 1 << 60) if newest is None else machine.copy_group - newest
        machine.shared.land(limit if mask is True else np.where(mask, limit, -1))

    return step


def _copy(machine: Machine, ins: Instruction) -> Step:
    if not ins.has("shared", "shared__cta") or not isinstance(ins.args[2], Immediate):
        raise PTXError("only from global to shared memory, with a fixed size")
    size = ins.args[2].bits
    to, of = address_of(machine, ins.args[0], "shared"), address_of(machine, ins.args[1], "global")
    rest = ins.args[3:-1] if ins.has("L2__cache_hint") else ins.args[3:]
    source_size = ignored = None
    if rest and isinstance(rest[0], Register) and rest[0].size == PREDICATE:
        ignored = machine.predicate(rest[0])
    elif rest:
        source_size = machine.registers.read(rest[0], "b32")

    def step(mask: Mask) -> None:
        index, threads = machine.selected(mask)
        sizes = np.full(len(threads), size) if source_size is None else source_size[index].astype(np.int64)
        if ignored is not None:
            sizes = np.where(ignored()[index], 0, sizes)
        if (sizes > size).any():
            raise KernelError(f"cp.async of {int(sizes.max())} bytes into {size}; {ins.where()}")
        rows = _read(machine, ins, of()[index], sizes, size, threads)
        copy = Copy(threads, threads, rows, machine.copy_group[threads])
        machine.shared.copy_async(to()[index], size, copy, ins)

    return step


def _read(machine: Machine, ins: Instruction, address: Array, sizes: Array, size: int, threads: Array) -> Array:
    """(n, size / 4) words: `sizes` bytes of each, then zeros. What is not asked for is not touched."""
    rows = np.zeros((len(threads), size // 4), U32)
    full = sizes == size
    if full.any():
        ctas = machine.cta_of_thread[threads[full]]
        rows[full] = machine.memory.load(address[full], 4, size // 4, ins, threads[full], ctas)
    for i in np.flatnonzero((sizes > 0) & ~full):
        if int(address[i]) % size:
            raise KernelError(f"misaligned source of cp.async, {int(address[i]):#x}; {ins.where()}")
        each = address[i] + np.arange(int(sizes[i]), dtype=U64)
        who = np.full(len(each), threads[i])
        loaded = machine.memory.load(each, 1, 1, ins, who, machine.cta_of_thread[who])
        rows[i].view(U8)[: len(each)] = loaded[:, 0]
    return rows
