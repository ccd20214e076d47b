"""The A100 as the model sees it: units, rates and latencies, in cycles of the multiprocessor's clock.

Rates are from NVIDIA's A100 whitepaper and the CUDA C++ Programming Guide, "Arithmetic Instructions", for compute
capability 8.0: results a cycle and multiprocessor, divided by four partitions. Latencies are from microbenchmarks of
Ampere: Abdelkhalik et al. 2022, arXiv 2208.11174, for arithmetic and memory; Huerta et al. 2025, arXiv 2503.20481, for
the queues in front of the memory pipeline. What is marked as a guess is neither.
"""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = 108
PARTITIONS = 4  # of a multiprocessor; each has a scheduler that issues one instruction a cycle
CLOCK = 1.41e9  # Hz, boost
MATRIX_FLOPS = 512  # a cycle and partition, in float16 and bfloat16 with float32 sums
PEAK = MULTIPROCESSORS * PARTITIONS * MATRIX_FLOPS * CLOCK  # 312 TFLOP/s


@dataclass(frozen=True)
class Unit:
    """busy: cycles for which an instruction of a warp keeps the unit of its partition from another one.
    latency: cycles from then to a result that is waited for through a scoreboard; stall counts cover the rest."""

    busy: float
    latency: float = 0.0


UNITS = {
    "matrix": Unit(8),  # HMMA.16816: 4096 operations at 512 a cycle
    "float": Unit(2),  # 16 lanes
    "half": Unit(1),  # packed half precision, 32 lanes
    "integer": Unit(2),  # 16 lanes: integers, comparisons, moves, conversions to half
    "uniform": Unit(2, 12),
    "special": Unit(8, 20),  # 4 lanes: exp2, reciprocal, other conversions
    "control": Unit(1, 20),
}
SPECIAL_QUEUE = 2  # instructions that may wait for the special unit

# The memory pipeline is one for the multiprocessor, behind a queue and an address unit for each partition.
MEMORY_QUEUE = 5
ADDRESS_CYCLES = 4
SHARED_BYTES = 128  # a cycle
SHARED_LATENCY = 23
MATRIX_LOAD_LATENCY = {1: 23, 2: 25, 4: 29}  # LDSM, by the number of 8 x 8 matrices
LOCAL_LATENCY = 33  # a spilled register, from the first-level cache
OPERAND_CYCLES = 10  # until a memory instruction has read its registers

# Loads from global memory are taken to hit the second-level cache.
GLOBAL_LATENCY = 280
GLOBAL_JITTER = 80  # a guess: up to that many cycles more, at random
GLOBAL_BYTES = 40  # a cycle and multiprocessor while all load; a guess from 5120 bytes a cycle for the whole cache
COPY_FACTOR = 2  # LDGSTS keeps the memory pipeline busy for the load and for the store to shared memory; a guess

BARRIER_LATENCY = 20
BRANCH_CYCLES = 12  # a branch that is taken
VARIATION = (0.8, 1.25)  # each run scales the latencies of memory, special unit and barrier by factors from this range
