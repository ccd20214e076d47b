"""setp and set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction, Pair
from ..scalars import FLOATS, SIZE, Array, Mask, flush
from .registry import elementwise, opcode

Function = Callable[..., Any]
ORDERED: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINE: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def float_comparison(name: str) -> Function:
    """Comparisons are false where an operand is NaN; those that end in u are true there."""
    if name in ("nan", "num"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    if name.endswith("u"):
        function = ORDERED[name[:-1]]
        return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # numpy's is true for NaN
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return ORDERED[name]


def comparison(machine: Machine, ins: Instruction) -> Callable[[], Array]:
    """A function that compares the first two sources, of shape (threads, 2) for the packed types."""
    name, type_ = ins.parts[1], ins.type
    if type_ not in FLOATS:
        if name in UNSIGNED:
            name, type_ = UNSIGNED[name], f"u{8 * SIZE[type_]}"
        a, b = (machine.registers.read(source, type_) for source in ins.args[1:3])
        compare = ORDERED[name]
        return lambda: compare(a, b)
    read_a, read_b = (machine.registers.read_floats(source, type_) for source in ins.args[1:3])
    compare = float_comparison(name)
    if ins.has("ftz") and type_ == "f32":
        return lambda: compare(flush(read_a()), flush(read_b()))
    return lambda: compare(read_a(), read_b())


@opcode("setp")
def setp(machine: Machine, ins: Instruction) -> Step:
    """`setp p|q` puts the opposite into q; of packed halves, p is the comparison of the low ones, q of the high."""
    packed = ins.type.endswith("x2")
    destination = ins.args[0]
    combine = next((COMBINE[part] for part in ins.parts[2:-1] if part in COMBINE), None)
    compare = comparison(machine, ins)
    if not isinstance(destination, Pair):
        if packed:
            raise PTXError("packed comparison into a single predicate")
        if combine is None and ins.type not in FLOATS:
            return _plain(machine, ins)
    first, second = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    other = machine.predicate(ins.args[3]) if combine else None
    write_first = machine.registers.write(first, "pred")
    write_second = machine.registers.write(second, "pred") if second is not None else None

    def step(mask: Mask) -> None:
        result = compare()
        p, q = (result[:, 0], result[:, 1]) if packed else (result, ~result)
        if combine is not None and other is not None:
            c = other()
            p, q = combine(p, c), combine(q, c)
        write_first(p, mask)
        if write_second is not None:
            write_second(q, mask)

    return step


def _plain(machine: Machine, ins: Instruction) -> Step:
    """Of integers, straight into the predicate."""
    name, type_ = ins.parts[1], ins.type
    if name in UNSIGNED:
        name, type_ = UNSIGNED[name], f"u{8 * SIZE[type_]}"
    a, b = (machine.registers.read(source, type_) for source in ins.args[1:3])
    return elementwise(machine, ins.args[0], "pred", ORDERED[name], a, b)


@opcode("set")
def set_(machine: Machine, ins: Instruction) -> Step:
    """All ones or 1.0 where the comparison holds, else 0."""
    type_ = ins.parts[-2]
    if ins.one_of(*COMBINE) or ins.type.endswith("x2") != type_.endswith("x2"):
        raise PTXError("set with another predicate, or of packed halves to a number")
    compare = comparison(machine, ins)
    if type_ in FLOATS:
        write_floats = machine.registers.write_floats(ins.args[0], type_)
        return lambda mask: write_floats(compare().astype(np.float32), mask)
    write = machine.registers.write(ins.args[0], f"s{8 * SIZE[type_]}")
    return lambda mask: write(-compare().astype(np.int32), mask)
