"""Arguments that are no tensors: bools, ints and floats, of Python, of NumPy, or symbolic while tracing."""

from __future__ import annotations

import sys

import numpy as np
import torch

LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = int(sys.float_info.max)  # a float here would be a variable to torch.compile(dynamic=True)


def flag(name: str, value) -> bool:
    """`value` as a bool; numpy's are taken too."""
    if type(value) is bool:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type_of(value)}")


def integer(name: str, value, kinds: str = "an int"):
    """`value` as an int, a symbolic one while tracing, or None; numpy's are taken too."""
    if isinstance(value, np.integer):
        value = int(value)
    if value is None or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {kinds}, got {type_of(value)}")
    if not -LARGEST_INT <= value <= LARGEST_INT:  # the operator takes 64 bits
        raise ValueError(f"{name} must be {'below 2**63' if value > 0 else 'above -2**63'}, got {value}")
    return value


def integer_from(name: str, value, least: int):
    """`value` as an int of at least `least`."""
    if value is None:
        raise TypeError(f"{name} must be an int, got NoneType")
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def real(name: str, value, kinds: str = "a float"):
    """`value` as a number, a symbolic one while tracing; numpy's are taken too."""
    if isinstance(value, (np.floating, np.integer)):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {kinds}, got {type_of(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_FLOAT:
        raise ValueError(f"{name} must be finite in float64, got an int of {value.bit_length()} bits")
    return value


def type_of(value) -> str:
    kind = type(value)
    return kind.__name__ if module_of(kind) in ("", "builtins") else f"{module_of(kind)}.{kind.__name__}"


def module_of(kind: type) -> str:
    return getattr(kind, "__module__", "")  # a class made by type() may have none
