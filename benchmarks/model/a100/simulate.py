"""The main loop, played cycle by cycle on one multiprocessor with all its resident warps.

Each partition issues one instruction a cycle from a warp that may go on: its stall is over, the scoreboards it waits
for are clear, its unit is free. The partitions share the memory pipeline and the bandwidth to the second-level cache,
and the warps of a program meet at barriers.

Two or three warps on a partition can lock into a lucky or an unlucky phase, in which one latency, a little different,
moves the result by 10 %. So a figure is the mean of several runs. Half of them schedule the warp that issued last and
then the oldest (greedy), half take turns. The programs start at random offsets, and each run scales the variable
latencies. The seeds are 0, 1, 2 and so on: the same for every kernel, and the same every time.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from . import machine, pipes
from .decode import NONE, Instruction

NEVER = math.inf
WARM_UP = 3  # passes of a warp before it is measured
PLAIN, BARRIER, COMMIT, WAIT_GROUPS, WAIT_SCOREBOARD = range(5)  # what else an instruction does to a warp


class Step(NamedTuple):
    """An instruction, ready to be played."""

    unit: str
    busy: float
    latency: float
    global_bytes: int
    result: int
    operands: int
    waits: tuple[int, ...]
    stall: int
    kind: int
    number: int


@dataclass
class Warp:
    program: int
    ready: float
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0  # when the last asynchronous copy is there
    groups: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # when each committed group is there
    position: int = 0
    passes: int = 0
    began: float = 0.0


@dataclass
class Partition:
    warps: list[Warp]
    free: dict[str, float] = field(default_factory=lambda: dict.fromkeys(machine.UNITS, 0.0))
    special: deque[float] = field(default_factory=deque)  # when each queued instruction leaves
    memory: deque[float] = field(default_factory=deque)
    address_free: float = 0.0
    last: int = 0


def cycles(loop: Sequence[Instruction], warps: int, programs: int, runs: int = 8, passes: int = 10) -> list[float]:
    """Cycles in which every resident program advances by one pass of the loop, from each run."""
    return [Run(loop, warps, programs, seed, passes).play() for seed in range(runs)]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, as a fraction of it."""
    return statistics.stdev(values) / math.sqrt(len(values)) / statistics.mean(values) if len(values) > 1 else 0.0


class Run:
    """One run on one multiprocessor. Odd seeds schedule greedily."""

    def __init__(self, loop: Sequence[Instruction], warps: int, programs: int, seed: int, passes: int) -> None:
        self.random = random.Random(seed)
        self.greedy = seed % 2 == 1
        self.passes = passes
        self.warps_per_program = warps
        self.memory_scale, self.special_scale, barrier = (self.random.uniform(*machine.VARIATION) for _ in range(3))
        self.barrier_latency = machine.BARRIER_LATENCY * barrier
        self.steps = self._steps(loop)
        length = max(pipes.bound(loop).values()) * warps * programs / machine.PARTITIONS
        offsets = [length * self.random.random() for _ in range(programs)]
        self.warps = [Warp(n // warps, offsets[n // warps] + 4 * (n % warps)) for n in range(warps * programs)]
        self.partitions = [Partition(self.warps[n :: machine.PARTITIONS]) for n in range(machine.PARTITIONS)]
        self.arrived = [0] * programs
        self.memory_free = self.cache_free = self.rate = 0.0
        self.running = len(self.warps)

    def _steps(self, loop: Sequence[Instruction]) -> list[Step]:
        grouped = any(i.base == "LDGDEPBAR" for i in loop)
        scales = {"memory": self.memory_scale, "special": self.special_scale}
        steps = []
        for instruction in loop:
            asked = pipes.demand(instruction)
            kind, number = _effect(instruction, grouped)
            stall = max(instruction.stall, machine.BRANCH_CYCLES) if instruction.jumps else instruction.stall
            latency = asked.latency * scales.get(asked.unit, 1.0)
            steps.append(
                Step(asked.unit, asked.busy, latency, asked.global_bytes, instruction.result, instruction.operands,
                     instruction.waits, stall, kind, number)
            )  # fmt: skip
        return steps

    def play(self) -> float:
        """Cycles of a pass, when all warps have done their passes. A warp runs on, so that the load stays even."""
        now = 0.0
        while self.running:
            wake = min(self._turn(partition, now) for partition in self.partitions)
            if wake == NEVER:
                raise ValueError("the loop waits for what never comes")
            now = max(now + 1, math.ceil(wake))
        return 1 / self.rate

    def _turn(self, partition: Partition, now: float) -> float:
        """Issue one instruction if a warp may; when to look again."""
        warps = partition.warps
        count = len(warps)
        wake = NEVER
        # Without barriers nothing holds the first warp back for the others: far ahead, it takes turns.
        greedy = self.greedy and warps[partition.last].passes < 2 * self.passes
        for n in range(count):
            if greedy:  # the last one, then the others from the oldest
                index = partition.last if n == 0 else n - (n <= partition.last)
            else:
                index = (partition.last + 1 + n) % count
            warp = warps[index]
            if warp.ready > now:
                wake = min(wake, warp.ready)
                continue
            step = self.steps[warp.position]
            held = _held(warp, step)
            if held > now:
                warp.ready = held
                wake = min(wake, held)
                continue
            held = _unit_free(partition, step.unit, now)
            if held > now:
                wake = min(wake, held)
                continue
            partition.last = index
            self._issue(partition, warp, step, now)
            return now + 1
        return wake

    def _issue(self, partition: Partition, warp: Warp, step: Step, now: float) -> None:
        start, end = self._occupy(partition, warp, step, now)
        if step.result != NONE:
            warp.scoreboards[step.result] = max(warp.scoreboards[step.result], end)
        if step.operands != NONE:
            read = start + machine.OPERAND_CYCLES
            warp.scoreboards[step.operands] = max(warp.scoreboards[step.operands], read)
        warp.ready = now + step.stall
        if step.kind == BARRIER:
            self._arrive(warp, now)
        elif step.kind == COMMIT:
            warp.groups.append(warp.copies)
        warp.position += 1
        if warp.position == len(self.steps):
            self._end_pass(warp, now)

    def _occupy(self, partition: Partition, warp: Warp, step: Step, now: float) -> tuple[float, float]:
        """Take the unit; when the instruction starts there and when its result is there."""
        if step.unit == "memory":
            start = max(now + 1, partition.address_free, self.memory_free)
            partition.address_free = max(now, partition.address_free) + machine.ADDRESS_CYCLES
            self.memory_free = start + step.busy
            partition.memory.append(max(start, partition.address_free))
            if not step.global_bytes:
                return start, start + step.busy - 1 + step.latency
            self.cache_free = max(self.cache_free, start) + step.global_bytes / machine.GLOBAL_BYTES
            end = self.cache_free + step.latency + self.random.random() * machine.GLOBAL_JITTER
            warp.copies = max(warp.copies, end)
            return start, end
        start = max(now, partition.free[step.unit])
        partition.free[step.unit] = start + step.busy
        if step.unit == "special":
            partition.special.append(start + step.busy)
        return start, start + step.latency

    def _arrive(self, warp: Warp, now: float) -> None:
        self.arrived[warp.program] += 1
        if self.arrived[warp.program] < self.warps_per_program:
            warp.ready = NEVER
            return
        self.arrived[warp.program] = 0
        first = warp.program * self.warps_per_program
        for other in self.warps[first : first + self.warps_per_program]:
            other.ready = max(now + self.barrier_latency, other.ready if other.ready < NEVER else 0.0)

    def _end_pass(self, warp: Warp, now: float) -> None:
        warp.position = 0
        warp.passes += 1
        if warp.passes == WARM_UP:
            warp.began = now
        elif warp.passes == self.passes:
            self.rate += (self.passes - WARM_UP) / (now - warp.began) / len(self.warps)
            self.running -= 1


def _effect(instruction: Instruction, grouped: bool) -> tuple[int, int]:
    if instruction.base == "BAR":
        return BARRIER, 0
    if instruction.base == "LDGDEPBAR":
        return COMMIT, 0
    if instruction.base == "DEPBAR":
        scoreboard, _, number = instruction.operand.partition(",")
        if grouped and scoreboard == "SB0":
            return WAIT_GROUPS, int(number, 16)
        return WAIT_SCOREBOARD, int(scoreboard[2:])
    return PLAIN, 0


def _held(warp: Warp, step: Step) -> float:
    """Until when the warp waits for scoreboards, or for all asynchronous copies but the youngest groups."""
    until = 0.0
    for n in step.waits:
        until = max(until, warp.scoreboards[n])
    if step.kind == WAIT_GROUPS and len(warp.groups) > step.number:
        until = max(until, *list(warp.groups)[: len(warp.groups) - step.number])
    elif step.kind == WAIT_SCOREBOARD:
        until = max(until, warp.scoreboards[step.number])
    return until


def _unit_free(partition: Partition, unit: str, now: float) -> float:
    """When the unit, or the queue in front of it, takes another instruction."""
    if unit not in ("memory", "special"):
        return partition.free[unit]
    queue, length = (
        (partition.memory, machine.MEMORY_QUEUE) if unit == "memory" else (partition.special, machine.SPECIAL_QUEUE)
    )
    while queue and queue[0] <= now:
        queue.popleft()
    return queue[0] if len(queue) >= length else now
