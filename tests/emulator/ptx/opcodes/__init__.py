"""What each PTX instruction does: builders, by the first part of its name.

A builder takes the machine and the instruction and returns a function of the mask of threads that take part. It raises
PTXError for a form that it does not know.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import PTXError
from .matrix import products
from .registry import BUILDERS

if TYPE_CHECKING:
    from ..machine import Machine, Step
    from ..operands import Instruction

for _name in ("moves", "integer", "floating", "compare", "convert", "loads", "copies", "atomics", "warp"):
    importlib.import_module(f"{__name__}.{_name}")


def build(machine: Machine, run: list[Instruction]) -> Step | None:
    """What one instruction does, or several matrix products."""
    if run[0].name == "mma":
        return products(machine, run)
    builder = BUILDERS.get(run[0].name)
    if builder is None:
        raise PTXError("this instruction is not supported")
    return builder(machine, run[0])
