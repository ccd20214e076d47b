"""An A100 in software: Triton's real launch path, with the PTX run on the CPU under checks of memory and races.

    import emulator

    device = emulator.install()  # before a GPU is looked for
    x = torch.randn(1000, device="cuda")
    my_kernel[(8,)](x, 1000, BLOCK=128)

See README.md for what is emulated and what is not.
"""

from __future__ import annotations

from .device import Device, EmulatorError, Runtime, fake_torch_cuda, install_driver, libcuda
from .ptx import KernelError, Options, PTXError

__all__ = ["Device", "EmulatorError", "KernelError", "Options", "PTXError", "install", "obstacle"]

_installed: Device | None = None


def obstacle() -> str:
    """Why the emulator cannot run on this machine, or "" if it can."""
    try:
        libcuda.build()
    except EmulatorError as error:
        return str(error)
    return ""


def install(**options: object) -> Device:
    """Make `cuda:0` the emulated device, in this process from now on. Raises EmulatorError, whose text says why.

    The options are those of `Options`. They can be changed later: `with device.with_options(poison=1):`.
    """
    global _installed
    if _installed is None:
        device = Device(options=Options(**options))  # type: ignore[arg-type]
        runtime = Runtime(device)
        fake_torch_cuda(device, runtime)
        install_driver(device)
        runtime.install()
        _installed = device
    return _installed
