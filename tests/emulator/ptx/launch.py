"""A grid of CTAs, run in batches."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass

from .errors import KernelError, PTXError
from .machine import Grid, Machine
from .memory import GlobalMemory
from .options import Options
from .parse import Module

_MACHINES_KEPT = 4  # decoding takes a few hundredths of a second; a machine holds some ten MiB of registers
_REGISTER_BYTES = 64 << 20  # at most, of the threads that are run at once
_machines: OrderedDict[tuple[object, ...], Machine] = OrderedDict()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the driver is given it. It can be run again."""

    module: Module
    grid: Grid
    threads: int  # of one CTA
    shared_bytes: int  # dynamic
    parameters: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if self.module.threads not in (None, self.threads):
            raise KernelError(f"CTAs of {self.threads} threads, but the kernel wants {self.module.threads}")
        if len(self.parameters) != len(self.module.parameters):
            raise PTXError(f"{len(self.parameters)} parameters for {len(self.module.parameters)}")


def launch(what: Launch, memory: GlobalMemory, options: Options) -> None:
    """Run all CTAs of the grid. Raises KernelError where the kernel does what it must not."""
    total = what.grid[0] * what.grid[1] * what.grid[2]
    if not total:
        raise KernelError(f"an empty grid: {what.grid}")
    per_thread = sum(max(size, 1) * count for size, count in what.module.registers.items())
    threads = min(options.threads_at_once, _REGISTER_BYTES // max(per_thread, 1))
    most = max(1, min(total, threads // what.threads))
    batches = -(-total // most)
    ctas = -(-total // batches)  # as even as can be
    machine = _machine(what, ctas, memory, options)
    names = [parameter.name for parameter in what.module.parameters]
    machine.parameters = dict(zip(names, what.parameters, strict=True))
    memory.begin_launch()
    for first in range(0, total, ctas):
        machine.run(what.grid, first, min(ctas, total - first))


def _machine(what: Launch, ctas: int, memory: GlobalMemory, options: Options) -> Machine:
    """The machine for such a launch, decoded once."""
    decoded_for = dataclasses.replace(options, poison=0, max_blocks=0)  # the others are part of what is decoded
    key = (what.module, ctas, what.threads, what.shared_bytes, id(memory), decoded_for)
    if key not in _machines:
        while len(_machines) >= _MACHINES_KEPT:
            _machines.popitem(last=False)
        _machines[key] = Machine(what.module, ctas, what.threads, what.shared_bytes, memory, options)
    _machines.move_to_end(key)
    _machines[key].options = options
    return _machines[key]
