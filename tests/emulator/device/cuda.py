"""torch.cuda and Triton's driver over the emulated device."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from . import libcuda
from .device import Device, Kernel
from .libcuda import EmulatorError
from .tensor import Runtime

__all__ = ["CUDAGraph", "EmulatorError", "fake_torch_cuda", "install_driver"]


class Event:
    """Time as the host's clock has it: that of the emulation, not of a GPU."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    """The only one: work is done when it is launched."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *unused: Any, **also_unused: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    wait_stream = wait_event = lambda self, other: None


class Generator(torch.Generator):
    """Operators run on the CPU, and so do the random numbers of the device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == "cuda" else device)  # type: ignore[call-arg]


class CUDAGraph:
    """Launches and operators in the order they were recorded."""

    def __init__(self, device: Device) -> None:
        self.device, self.actions, self.memory = device, [], []  # type: tuple[Device, list[Callable[[], Any]], list[Any]]

    def capture_begin(self, *unused: Any, **also_unused: Any) -> None:
        if self.device.capture is not None:
            raise RuntimeError("a graph is being captured already")
        self.device.capture, self.device.kept = self.actions, self.memory

    def capture_end(self) -> None:
        self.device.capture, self.device.kept = None, []

    def replay(self) -> None:
        for action in self.actions:
            action()

    def reset(self) -> None:
        self.actions.clear()
        self.memory.clear()


@contextlib.contextmanager
def capture(graph: CUDAGraph, *unused: Any, **also_unused: Any) -> Iterator[None]:
    """torch.cuda.graph"""
    gc.collect()
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def fake_torch_cuda(device: Device, runtime: Runtime) -> None:
    """torch.cuda says that there is the device, and nothing but it."""
    properties = types.SimpleNamespace(
        name=device.name, major=device.capability[0], minor=device.capability[1],
        multi_processor_count=device.multiprocessors, total_memory=device.total_memory, warp_size=32,
        shared_memory_per_block_optin=device.shared_opt_in, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, L2_cache_size=40 << 20, uuid="00000000-0000-0000-0000-000000000000",
    )  # fmt: skip
    stream = Stream()

    def set_sync_debug_mode(mode: int | str) -> None:
        runtime.sync_debug_mode = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)

    def used() -> int:
        return sum(len(region.data) for region in device.memory.regions.values())

    def number_of(which: Any = None) -> int:
        if which is not None and which not in ("cuda", 0):
            index = which if isinstance(which, int) else torch.device(which).index
            if index not in (None, 0, -1):
                raise RuntimeError(f"CUDA error: invalid device ordinal {index}; one device is emulated")
        return 0

    def about(value: Any) -> Callable[..., Any]:
        """A function of a device."""

        def get(which: Any = None) -> Any:
            number_of(which)
            return value

        return get

    nothing = mock.Mock(return_value=None)
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "_lazy_init": lambda: None, "init": lambda: None, "current_device": lambda: 0, "set_device": number_of,
        "_exchange_device": lambda which: number_of(None if which < 0 else which),
        "_maybe_exchange_device": lambda which: number_of(None if which < 0 else which),
        "get_device_capability": about(device.capability), "get_device_properties": about(properties),
        "get_device_name": about(device.name), "is_bf16_supported": lambda *unused: True,
        "synchronize": lambda which=None: runtime.synchronise("synchronize"), "Event": Event, "Stream": Stream,
        "current_stream": about(stream), "default_stream": about(stream),
        "stream": lambda stream=None: contextlib.nullcontext(), "CUDAGraph": lambda *unused: CUDAGraph(device),
        "graph": capture, "is_current_stream_capturing": lambda: device.capture is not None,
        "set_sync_debug_mode": set_sync_debug_mode, "get_sync_debug_mode": lambda: runtime.sync_debug_mode,
        "mem_get_info": lambda which=None: (device.total_memory - used(), device.total_memory),
        "memory_allocated": lambda which=None: used(), "max_memory_allocated": lambda which=None: used(),
        "reset_peak_memory_stats": nothing, "empty_cache": gc.collect, "manual_seed": nothing,
        "manual_seed_all": nothing,
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.Generator = Generator  # type: ignore[misc]


def install_driver(device: Device) -> None:
    """Triton's own CUDA driver and launcher, over the stub of libcuda."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise EmulatorError("TRITON_INTERPRET is set: kernels would run in Triton's interpreter")
    libcuda.load(
        device.on_launch, device.has_address, multiprocessors=device.multiprocessors,
        shared_opt_in=device.shared_opt_in, shared_of_multiprocessor=device.shared_of_multiprocessor,
    )  # fmt: skip
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__call__(*args, **kwargs)
            except RuntimeError:
                if device.fault is None:
                    raise
                fault, device.fault = device.fault, None
                raise fault from None  # what went wrong, which CUDA does not tell

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            self.get_current_stream = lambda which: Stream.cuda_stream  # PyTorch with CUDA would ask its runtime

    driver.set_active(Driver())
    _watch_loading(device)


def _watch_loading(device: Device) -> None:
    """Tell the device what each function handle stands for; the hook that Triton has for it came with version 3.5."""
    from triton.compiler.compiler import CompiledKernel

    load = CompiledKernel._init_handles

    def load_and_tell(kernel: Any) -> None:
        load(kernel)
        device.kernel_loaded(kernel.function, Kernel(kernel.name, kernel.asm["ptx"], kernel.asm["cubin"]))

    CompiledKernel._init_handles = load_and_tell
