"""atom and red."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction, Sink
from ..scalars import DTYPE, SIZE, UINT, Array, Mask, bits, float_bits, float_values
from .loads import address_of, space_of
from .registry import opcode

KINDS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
Combine = Callable[[Array, Array, Array], Array]


@opcode("atom", "red")
def atomic(machine: Machine, ins: Instruction) -> Step:
    """One of the legal orders: rounds of accesses to distinct addresses, in the order of the threads."""
    space, type_ = space_of(ins), ins.type
    kind = ins.one_of(*KINDS)
    destination, address, *sources = [Sink(), *ins.args] if ins.name == "red" else ins.args
    if space not in ("global", "shared") or kind is None or ins.has("v2", "v4", "v8"):
        raise PTXError("this atomic is not supported")
    if kind == "add" and type_ in ("f16", "bf16", "f16x2", "bf16x2") and not ins.has("noftz"):
        raise PTXError("half precision without .noftz")
    size = SIZE[type_]
    operands = [machine.registers.read(source, bits(type_)) for source in sources[: 2 if kind == "cas" else 1]]
    where, write = address_of(machine, address, space), machine.registers.write(destination, bits(type_))
    combine = _combination(kind, type_)

    def access(at: Array, threads: Array, x: Array, y: Array) -> Array:
        old = np.zeros(len(at), UINT[size])
        if space == "shared":
            offset = machine.shared.offsets(at, size, ins, threads)
            rows = machine.shared.region.rows(size, 1)
            old = rows[offset // size][:, 0]
            rows[offset // size, 0] = combine(old, x, y)
            if machine.shared.check:  # atomics do not race with each other
                units = (offset // machine.shared.unit)[:, None] + machine.shared.span[size]
                machine.shared.mark_written(units, threads)
            return old
        for rows, selected, row in machine.memory.atomic_view(at, size, ins, threads):
            old[selected] = rows[row, 0]
            rows[row, 0] = combine(old[selected], x[selected], y[selected])
        return old

    def step(mask: Mask) -> None:
        index, threads = machine.selected(mask)
        at, result = where()[index].astype(np.uint64), np.zeros(machine.threads, UINT[size])
        x, y = operands[0][index].copy(), operands[-1][index].copy()
        left = np.arange(len(threads))
        while len(left):
            now = left[np.unique(at[left], return_index=True)[1]]
            left = np.setdiff1d(left, now)
            result[threads[now]] = access(at[now], threads[now], x[now], y[now])
        write(result, mask)

    return step


def _combination(kind: str, type_: str) -> Combine:
    """New bits from the old ones and the operands' bits."""
    size = SIZE[type_]
    unsigned, one = UINT[size], UINT[size](1)

    def values(pattern: Array) -> Array:
        if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
            return float_values(np.ascontiguousarray(pattern).view(np.uint16), type_)
        return pattern.view(DTYPE[type_])

    def pattern(numbers: Array) -> Array:
        if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
            return np.ascontiguousarray(float_bits(numbers, type_)).view(unsigned)
        return np.ascontiguousarray(numbers.astype(DTYPE[type_])).view(unsigned)

    table: dict[str, Combine] = {
        "add": lambda old, x, y: pattern(values(old) + values(x)),
        "min": lambda old, x, y: pattern(np.minimum(values(old), values(x))),
        "max": lambda old, x, y: pattern(np.maximum(values(old), values(x))),
        "exch": lambda old, x, y: x,
        "cas": lambda old, x, y: np.where(old == x, y, old),
        "and": lambda old, x, y: old & x,
        "or": lambda old, x, y: old | x,
        "xor": lambda old, x, y: old ^ x,
        "inc": lambda old, x, y: np.where(old >= x, 0, old + one),
        "dec": lambda old, x, y: np.where((old == 0) | (old > x), x, old - one),
    }
    return table[kind]
