"""Occupancy: how many programs fit on one multiprocessor at a time, by the published limits of each architecture."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_attn.kernels.aot import SHARED_MEMORY


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor. `registers` are those that the warps of one partition have for a lane."""

    warps: int
    programs: int
    shared: int
    reserved: int = 1 << 10  # bytes of shared memory that the system takes for each program
    registers: int = 512
    granularity: int = 8  # registers of a thread are allocated in multiples of this
    partitions: int = 4


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (64 K registers, 4 partitions of
# 32 lanes). AMD: CDNA 3 and RDNA 3 instruction set guides; for gfx1100 a work-group processor of two compute units.
MULTIPROCESSORS = {
    "sm_75": Multiprocessor(32, 16, 64 << 10, reserved=0),
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
    "gfx942": Multiprocessor(32, 16, 64 << 10, reserved=0),
    "gfx1100": Multiprocessor(64, 32, 128 << 10, reserved=0, registers=1536, granularity=24),
}
TENSOR_COLUMNS = 512  # columns of tensor memory on a multiprocessor that has it


def occupancy(architecture: str, registers: int, num_warps: int, shared: int, tensor_columns: int = 0) -> int:
    """How many programs fit on a multiprocessor; 0 if none does."""
    limits = MULTIPROCESSORS[architecture]
    if shared > SHARED_MEMORY[architecture]:
        return 0
    registers = -(-max(registers, 1) // limits.granularity) * limits.granularity
    return min(
        limits.programs,
        limits.warps // num_warps,
        limits.registers // registers * limits.partitions // num_warps,
        limits.shared // max(shared + limits.reserved, 1),
        TENSOR_COLUMNS // max(tensor_columns, 1),
    )
