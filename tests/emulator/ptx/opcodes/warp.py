"""What the lanes of a warp do together: shuffles, votes, reductions, barriers."""

from __future__ import annotations

import numpy as np

from ..errors import KernelError, PTXError
from ..machine import Machine, Step
from ..operands import Immediate, Instruction, Pair
from ..scalars import U32, U64, Array, Mask
from .registry import opcode


@opcode("bar")
def warp_barrier(machine: Machine, ins: Instruction) -> Step:
    """bar.warp.sync. Barriers of the CTA end a basic block (see machine.py)."""
    if ins.parts[1] != "warp":
        raise PTXError("this barrier is not supported")
    check = machine.members(ins.args[0], ins)

    def step(mask: Mask) -> None:
        check(mask)
        machine.shared.warp_barriers[machine.active(mask).reshape(-1, 32).any(1)] += 1

    return step


@opcode("shfl")
def shuffle(machine: Machine, ins: Instruction) -> Step:
    mode = ins.parts[2]
    if ins.parts[1] != "sync":
        raise PTXError("shfl without .sync")
    destination, *sources, member_mask = ins.args
    check = machine.members(member_mask, ins)
    write_valid = None
    if isinstance(destination, Pair):
        write_valid = machine.registers.write(destination.second, "pred")
        destination = destination.first
    write = machine.registers.write(destination, "b32")
    a, b, c = (machine.registers.read(source, "b32") for source in sources)
    lane = machine.lane

    def index() -> tuple[Array, Array]:
        """Which thread each one reads, and whether that is in its segment."""
        by, clamp, segment = ((x & U32(31)).astype(np.int64) for x in (b, c, c >> U32(8)))
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
        valid = source >= high if mode == "up" else source <= high
        return machine.thread - lane + np.where(valid, source, lane), valid

    fixed = index() if all(isinstance(source, Immediate) for source in sources[1:]) else None

    def step(mask: Mask) -> None:
        check(mask)
        source, valid = fixed or index()
        if mask is not True and (mask & ~mask[source]).any():
            raise KernelError(f"a shuffle reads a lane that does not take part; {ins.where()}")
        write(a[source], mask)
        if write_valid is not None:
            write_valid(valid, mask)

    return step


def _ballot(votes: Array) -> Array:
    return (votes.astype(U64) << np.arange(32, dtype=U64)).sum(1).astype(U32)


@opcode("vote")
def vote(machine: Machine, ins: Instruction) -> Step:
    mode = ins.parts[2]
    predicate, check = machine.predicate(ins.args[1]), machine.members(ins.args[2], ins)
    write = machine.registers.write(ins.args[0], "b32" if mode == "ballot" else "pred")

    def step(mask: Mask) -> None:
        check(mask)
        active = machine.active(mask).reshape(-1, 32)
        yes = predicate().reshape(-1, 32) & active
        every, some = (yes == active).all(1), yes.any(1)
        results = {"ballot": lambda: _ballot(yes), "any": lambda: some, "all": lambda: every,
                   "uni": lambda: every | ~some}  # fmt: skip
        write(np.repeat(results[mode](), 32), mask)

    return step


@opcode("activemask")
def activemask(machine: Machine, ins: Instruction) -> Step:
    write = machine.registers.write(ins.args[0], "b32")
    return lambda mask: write(np.repeat(_ballot(machine.active(mask).reshape(-1, 32)), 32), mask)


@opcode("redux")
def reduce(machine: Machine, ins: Instruction) -> Step:
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                 "xor": np.bitwise_xor}  # fmt: skip
    function = functions[ins.parts[2]]
    a, write = machine.registers.read(ins.args[1], ins.type), machine.registers.write(ins.args[0], ins.type)
    check = machine.members(ins.args[2], ins)

    def step(mask: Mask) -> None:
        check(mask)
        machine.whole_warps(mask, ins)
        write(np.repeat(function.reduce(a.reshape(-1, 32), axis=1, dtype=a.dtype), 32), mask)

    return step
