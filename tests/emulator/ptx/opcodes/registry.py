"""The table of builders, and the step that most of them build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..machine import Machine, Step
from ..operands import Instruction, Operand
from ..scalars import Array

Builder = Callable[[Machine, Instruction], Step | None]
B = TypeVar("B", bound=Builder)
BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[B], B]:
    """Register a builder."""

    def register(builder: B) -> B:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def elementwise(
    machine: Machine, destination: Operand, type_: str, function: Callable[..., Any], *sources: Array
) -> Step:
    """A numpy ufunc from registers to a register, without a copy between where sizes agree."""
    row = machine.registers.row(destination, type_)
    if row is not None:
        return lambda mask: function(*sources, out=row, where=mask)
    write = machine.registers.write(destination, type_)
    return lambda mask: write(function(*sources), mask)
