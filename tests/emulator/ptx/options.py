"""How kernels are run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    check: bool = True  # races, hazards of cp.async and uninitialised reads in shared memory
    tensor_core: str = "exact"  # sums in float64, rounded once; "truncating": about as the hardware adds
    approximation: float = 0.0  # 1.0: ex2.approx and its like are off by up to their documented error
    seed: int = 0  # of those errors
    poison: int = 0  # what registers and shared memory hold before they are written; 0: NaN
    max_blocks: int = 2_000_000  # basic blocks that a batch may run before it counts as an endless loop
    threads_at_once: int = 2048  # CTAs are run together up to this many threads
