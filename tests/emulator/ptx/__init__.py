"""Triton's sm_80 PTX, run on the CPU with numpy. It knows nothing of PyTorch and Triton."""

from .errors import KernelError, PTXError
from .launch import Launch, launch
from .memory import GlobalMemory, Region
from .options import Options
from .parse import Module

__all__ = ["GlobalMemory", "KernelError", "Launch", "Module", "Options", "PTXError", "Region", "launch"]
