"""The device: its memory, the kernels loaded onto it and the launches it is given."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ptx import GlobalMemory, Launch, Module, Options, Region, launch
from ..ptx.scalars import SIZE

CUDA_SUCCESS, CUDA_ERROR_LAUNCH_FAILED = 0, 719
POISONED_BYTES = 64 << 20  # larger allocations are left as they are: they may be mostly address space


@dataclass(frozen=True)
class Kernel:
    """What Triton has loaded."""

    name: str
    ptx: str
    cubin: bytes


@dataclass(frozen=True)
class Launched:
    """A launch that was run, or recorded into a graph."""

    kernel: Kernel
    launch: Launch
    seconds: float
    captured: bool = False


@dataclass
class Device:
    """An A100 of 40 or 80 GB as far as a launch can tell (CUDA C Programming Guide, compute capability 8.0)."""

    name: str = "NVIDIA A100-SXM4-80GB (emulated)"
    capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 108
    shared_opt_in: int = 163 << 10
    shared_of_multiprocessor: int = 164 << 10
    total_memory: int = 80 << 30
    options: Options = field(default_factory=Options)
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    launches: deque[Launched] = field(default_factory=lambda: deque(maxlen=1000))
    fault: BaseException | None = None  # why the last launch failed
    capture: list[Callable[[], Any]] | None = None  # what a graph being captured does when it is replayed
    kept: list[np.ndarray[Any, Any]] = field(default_factory=list)  # memory of graphs being captured
    _regions: dict[int, Region] = field(default_factory=dict)  # by their address on this machine
    _kernels: dict[int, Kernel] = field(default_factory=dict)  # by function handle
    _modules: dict[str, Module] = field(default_factory=dict)  # by their text

    # Memory

    def allocate(self, nbytes: int) -> np.ndarray[Any, Any]:
        """Bytes of the device's memory, for as long as somebody holds the array. They are NaN as floats."""
        data = np.empty(nbytes, np.uint8)
        if nbytes <= POISONED_BYTES:
            data[:] = 0xFF
        start = data.ctypes.data
        unowned = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(start))
        region = self._regions[start] = self.memory.add(f"an allocation of {nbytes} bytes", unowned)
        weakref.finalize(data, self._free, start, region)
        if self.capture is not None:
            self.kept.append(data)
        return data

    def _free(self, start: int, region: Region) -> None:
        if self._regions.get(start) is region:
            del self._regions[start]
        self.memory.remove(region)

    def owns(self, start: int) -> bool:
        """Whether an allocation begins at this address of this machine."""
        return start in self._regions

    def address(self, start: int) -> int:
        """The address on the device of the allocation that begins at this address of this machine."""
        return self._regions[start].base

    def has_address(self, address: int) -> bool:
        return self.memory.find(address) is not None

    # Launches

    def kernel_loaded(self, function: int, kernel: Kernel) -> None:
        """What a function handle stands for."""
        self._kernels[function] = kernel

    def on_launch(self, x: int, y: int, z: int, threads: int, shared: int, function: int, parameters: int) -> int:
        """What the driver does with a launch that it accepts; a CUresult."""
        self.fault = None
        try:
            kernel = self._kernels[function]
            if kernel.ptx not in self._modules:
                self._modules[kernel.ptx] = Module(kernel.ptx)
            module = self._modules[kernel.ptx]
            count = len(module.parameters)
            pointers = list((ctypes.c_void_p * count).from_address(parameters)) if count else []
            values = tuple(
                ctypes.string_at(pointer, SIZE[parameter.type])
                for pointer, parameter in zip(pointers, module.parameters, strict=True)
            )
            self._accept(kernel, Launch(module, (x, y, z), threads, shared, values))
        except BaseException as error:
            self.fault = error
            return CUDA_ERROR_LAUNCH_FAILED
        return CUDA_SUCCESS

    def _accept(self, kernel: Kernel, what: Launch) -> None:
        if self.capture is not None:
            self.capture.append(lambda: self._run(kernel, what))
            self.launches.append(Launched(kernel, what, 0.0, captured=True))
        else:
            self._run(kernel, what)

    def _run(self, kernel: Kernel, what: Launch) -> None:
        begun = time.perf_counter()
        launch(what, self.memory, self.options)
        self.launches.append(Launched(kernel, what, time.perf_counter() - begun))

    @contextlib.contextmanager
    def with_options(self, **options: Any) -> Iterator[None]:
        """Other options for a while, by their names in `Options`."""
        before = self.options
        self.options = dataclasses.replace(before, **options)
        try:
            yield
        finally:
            self.options = before
