"""Which unit an instruction goes to, and what one pass of a loop asks of every unit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from . import machine
from .decode import Instruction

FLOAT = {"FFMA", "FADD", "FMUL", "IMAD", "IMUL", "IDP", "FSWZADD"}
HALF = {"HFMA2", "HADD2", "HMUL2", "HSETP2", "HSET2"}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "I2I", "FRND"}
CONTROL = set(
    [
        "BRA",
        "NOP",
        "BSSY",
        "BSYNC",
        "BREAK",
        "WARPSYNC",
        "EXIT",
        "DEPBAR",
        "BAR",
        "YIELD",
        "BRX",
        "JMP",
        "CALL",
        "RET",
        "ERRBAR",
        "MEMBAR",
        "LDGDEPBAR",
        "CCTL",
        "VOTE",
        "VOTEU",
        "NANOSLEEP",
        "KILL",
        "CS2R",
    ]
)
SHARED = {"LDSM", "LDS", "STS", "ATOMS"}
LOCAL = {"LDL", "STL"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LD", "ST", "RED", "ATOM", "ATOMG"}
OTHER_MEMORY = {"SHFL", "S2R", "S2UR", "R2UR", "REDUX", "MATCH", "LDC"}  # through the memory pipeline, without data
INTEGER_BUT_U = {"UMOV"}


class Demand(NamedTuple):
    """What an instruction asks for. busy: cycles of its unit. global_bytes: through the second-level cache."""

    unit: str
    busy: float
    latency: float
    global_bytes: int = 0


def demand(instruction: Instruction) -> Demand:
    base = instruction.base
    if base == "HMMA":
        cycles = machine.UNITS["matrix"].busy
        return Demand("matrix", cycles if "16816" in instruction.name else cycles / 2, 0)
    if base in SHARED | LOCAL | GLOBAL | OTHER_MEMORY and not instruction.never:
        return _memory(instruction)
    if base in FLOAT:
        unit = "float"
    elif base in HALF:
        unit = "half"
    elif base in SPECIAL:
        unit = "special"
    elif base in CONTROL or instruction.never:
        unit = "control"
    else:
        unit = "uniform" if base.startswith("U") and base not in INTEGER_BUT_U else "integer"
    return Demand(unit, machine.UNITS[unit].busy, machine.UNITS[unit].latency)


def _memory(instruction: Instruction) -> Demand:
    base = instruction.base
    if base in OTHER_MEMORY:
        return Demand("memory", 1, machine.SHARED_LATENCY)
    if base == "LDSM":
        matrices = int(instruction.name[-1]) if instruction.name[-2:] in (".2", ".4") else 1
        return Demand("memory", matrices * 128 / machine.SHARED_BYTES, machine.MATRIX_LOAD_LATENCY[matrices])
    bytes_ = 32 * _width(instruction.name)
    busy = max(1, bytes_ / machine.SHARED_BYTES)
    if base in GLOBAL:
        copies = machine.COPY_FACTOR if base == "LDGSTS" else 1
        return Demand("memory", busy * copies, machine.GLOBAL_LATENCY, bytes_)
    return Demand("memory", busy, machine.LOCAL_LATENCY if base in LOCAL else machine.SHARED_LATENCY)


def _width(name: str) -> int:
    """Bytes of a thread."""
    match = re.search(r"\.(64|128|U8|S8|U16|S16)\b", name)
    return {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[match[1]] if match else 4


def flops(loop: Sequence[Instruction]) -> float:
    """Floating-point operations of the matrix instructions in one pass of a warp."""
    return sum(demand(i).busy for i in loop if i.base == "HMMA") * machine.MATRIX_FLOPS


def others_per_matrix(loop: Sequence[Instruction]) -> float:
    """Instructions that are not HMMA, for each HMMA of 4096 operations."""
    matrix = sum(demand(i).busy for i in loop if i.base == "HMMA") / machine.UNITS["matrix"].busy
    return sum(i.base != "HMMA" for i in loop) / matrix


def bound(loop: Sequence[Instruction]) -> dict[str, float]:
    """Cycles that one pass of one warp keeps each unit of its partition busy, its share of the memory pipeline and of
    the second-level cache among them. No schedule is faster than the largest."""
    busy: defaultdict[str, float] = defaultdict(float)
    for instruction in loop:
        asked = demand(instruction)
        share = machine.PARTITIONS if asked.unit == "memory" else 1
        busy[asked.unit] += asked.busy * share
        busy["cache"] += asked.global_bytes * machine.PARTITIONS / machine.GLOBAL_BYTES
        if asked.unit == "memory":
            busy["address"] += machine.ADDRESS_CYCLES
    busy.pop("control", None)
    return {**busy, "issue": float(len(loop))}
