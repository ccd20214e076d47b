"""An emulated A100 for PyTorch and Triton: `torch.device("cuda")` on a machine without a GPU."""

from .cuda import fake_torch_cuda, install_driver
from .device import Device
from .libcuda import EmulatorError
from .tensor import Runtime

__all__ = ["Device", "EmulatorError", "Runtime", "fake_torch_cuda", "install_driver"]
