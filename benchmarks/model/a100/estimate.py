"""TFLOP/s of a kernel's main loop on an A100, from its machine code: the cycles it takes, and the clock that its power
allows.

Cycles: the loop is simulated (simulate.py) at the boost clock.

Clock: with random data a long kernel of matrix products draws more than the card may, and the clock falls until it
does not. In units of what a partition draws that issues one HMMA after the other, a cycle costs IDLE, the HMMA in it
cost their share of the cycle, and each other instruction costs OTHER times what an HMMA does. The card allows what
cuBLAS draws on it at the clock that cuBLAS is known to reach there.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

from occupancy import occupancy

from . import machine, pipes, simulate
from .decode import Instruction

# Fitted to the anchors from Triton's documentation; `validate.py --fit` prints how. The other anchors were kept out.
OTHER = 0.10
# Not fitted. A card of 400 W without work draws 88 W (https://www.thonking.ai/p/strangely-matrix-multiplications, and
# https://www.weaving.news/news/019e6987-7fa2-7876-9aee-9627163ba6c9 on it); the other 312 W are cuBLAS's HMMA, about 1.
IDLE = 0.3
CUBLAS_OTHERS = 0.6  # in the loops of its s16816gemm_fp16_256x128 and 128x256 kernels of CUDA 12: 0.58 to 0.70


@dataclass(frozen=True)
class Code:
    """A kernel: its main loop, and what decides how many of its programs are resident on a multiprocessor."""

    loop: tuple[Instruction, ...]
    warps: int
    registers: int
    shared: int

    @property
    def programs(self) -> int:
        return occupancy("sm_80", self.registers, self.warps, self.shared)


@dataclass(frozen=True)
class Card:
    """cublas: TFLOP/s of cuBLAS with large random matrices. at_boost: what it would be at the boost clock."""

    cublas: float
    at_boost: float

    def clock(self, matrix: float, others: float) -> float:
        """The clock, as a fraction of the boost clock, of a kernel whose HMMA keep the tensor cores busy for this part
        of the cycles, with so many other instructions for each HMMA."""
        allowed = self.cublas / self.at_boost * _power(self.at_boost / PEAK, CUBLAS_OTHERS)
        return min(1.0, allowed / _power(matrix, others))


PEAK = machine.PEAK / 1e12
# 8192 x 8192 x 8192: 257 TFLOP/s with random numbers. With zeros, which draw little, 295: this is taken for the speed
# at the boost clock (https://www.thonking.ai/p/strangely-matrix-multiplications).
SXM4_400_W = Card(257.0, 295.0)


def _power(matrix: float, others: float) -> float:
    return matrix * (1 + OTHER * others) + IDLE


@dataclass(frozen=True)
class Estimate:
    """speed: TFLOP/s of useful operations. cycles: the speed at the boost clock, and error its standard error as a
    fraction. clock: as a fraction of the boost clock. bound: the speed if nothing ever waited but for its busiest unit,
    `bound_by`, at the boost clock."""

    cycles: float
    error: float
    clock: float
    bound: float
    bound_by: str

    @property
    def speed(self) -> float:
        return self.cycles * self.clock


def estimate(code: Code, flops: float, card: Card = SXM4_400_W, runs: int = 8, useful: float = 1.0) -> Estimate:
    """flops: the useful ones of a program in one pass; those on padded columns of the head dim are not. useful: the
    part of the time in which the multiprocessors have such passes to do."""
    if not code.programs:
        raise ValueError(f"no program fits: {code.registers} registers, {code.warps} warps, {code.shared} bytes shared")
    turns = _cycles(code, runs)
    unit, busy = max(pipes.bound(code.loop).items(), key=lambda item: item[1])
    resident = code.warps * code.programs / machine.PARTITIONS
    cycles = _speed(flops * code.programs, statistics.mean(turns)) * useful
    padded = pipes.flops(code.loop) * code.warps / flops
    clock = card.clock(cycles * padded / PEAK, pipes.others_per_matrix(code.loop))
    bound = _speed(flops * code.programs, busy * resident) * useful
    return Estimate(cycles, simulate.standard_error(turns), clock, bound, unit)


@functools.cache
def _cycles(code: Code, runs: int) -> list[float]:
    return simulate.cycles(code.loop, code.warps, code.programs, runs)


def _speed(flops: float, cycles: float) -> float:
    return flops / cycles * machine.MULTIPROCESSORS * machine.CLOCK / 1e12


def waves(*sizes: int, rows: int = 128, columns: int = 128) -> float:
    """Mean part of the multiprocessors that square matrices of these sizes keep busy, in tiles of rows x columns."""
    filled = [math.ceil(n / rows) * math.ceil(n / columns) / machine.MULTIPROCESSORS for n in sizes]
    return statistics.mean(turns / math.ceil(turns) for turns in filled)
