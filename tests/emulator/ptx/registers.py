"""The registers of all threads: one row of numbers for each register, one column for each thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PTXError
from .operands import PREDICATE, Immediate, Operand, Register, Sink, Special, Symbol
from .parse import Module
from .scalars import DTYPE, FLOATS, SIZE, U32, UINT, Array, Mask, bits, float_bits, float_values

Write = Callable[[Any, Mask], None]
Read = Callable[[], Array]


class Registers:
    """`read` gives a live view: what it shows later is what the register holds then. `write` gives a function."""

    def __init__(self, module: Module, threads: int, specials: dict[str, Array], symbols: dict[str, int]) -> None:
        self.threads, self.specials, self.symbols = threads, specials, symbols
        self.files: dict[int, Array] = {PREDICATE: np.zeros((module.registers[PREDICATE] or 1, threads), np.bool_)}
        for size, dtype in UINT.items():
            self.files[size] = np.zeros((module.registers[size] or 1, threads), dtype)
        self._constants: dict[tuple[int, int], Array] = {}

    def poison(self, seed: int) -> None:
        """Fill all registers with a pattern; as floats, NaN with seed 0."""
        pattern = 0x7FFFDEAD7FFFDEAD ^ (seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
        for size in UINT:
            self.files[size][:] = pattern & ((1 << 8 * size) - 1)
        self.files[PREDICATE][:] = bool(seed & 1)

    def constant(self, pattern: int, size: int) -> Array:
        pattern &= (1 << 8 * size) - 1
        if (pattern, size) not in self._constants:
            self._constants[pattern, size] = np.full(self.threads, pattern, UINT[size])
        return self._constants[pattern, size]

    def read(self, operand: Operand, type_: str) -> Array:
        """The operand's values, one for each thread. Wider registers are read in their low part."""
        dtype = np.dtype(DTYPE[type_])
        if isinstance(operand, Register):
            row = self.files[operand.size][operand.index]
            if (operand.size == PREDICATE) != (type_ == "pred") or row.itemsize < dtype.itemsize:
                raise PTXError(f"a register of another size than .{type_}")
            return row.view(dtype)[:: row.itemsize // dtype.itemsize]
        if isinstance(operand, Immediate):
            return self._immediate(operand, dtype)
        if isinstance(operand, Special):
            if operand.name not in self.specials or dtype.itemsize > 4:
                raise PTXError(f"special register {operand.name} as .{type_}")
            return self.specials[operand.name].view(dtype)[:: 4 // dtype.itemsize]
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return self.constant(self.symbols[operand.name], dtype.itemsize).view(dtype)
        raise PTXError(f"cannot read the operand {operand}")

    def _immediate(self, operand: Immediate, dtype: np.dtype[Any]) -> Array:
        if dtype == np.bool_:
            return np.full(self.threads, bool(operand.bits))
        if operand.kind == "f32" and dtype.itemsize == 8:
            return np.full(self.threads, np.array([operand.bits], U32).view(np.float32)[0], np.float64).view(dtype)
        if operand.kind == "f64" and dtype.itemsize == 4:
            return np.full(self.threads, np.array([operand.bits], np.uint64).view(np.float64)[0], np.float32).view(
                dtype
            )
        return self.constant(operand.bits, dtype.itemsize).view(dtype)

    def row(self, operand: Operand, type_: str) -> Array | None:
        """The register's own row, to be written in place; None where it is wider than the type, or a sink."""
        if isinstance(operand, Sink):
            return None
        if not isinstance(operand, Register) or (operand.size == PREDICATE) != (type_ == "pred"):
            raise PTXError(f"cannot write a .{type_} to {operand}")
        row = self.files[operand.size][operand.index]
        if row.itemsize < SIZE[type_]:
            raise PTXError(f"a register too narrow for .{type_}")
        return row.view(DTYPE[type_]) if row.itemsize == SIZE[type_] else None

    def write(self, operand: Operand, type_: str) -> Write:
        """A function of values and a mask. In a wider register they are extended, by their sign if they have one."""
        row = self.row(operand, type_)
        if isinstance(operand, Sink):
            return lambda values, mask: None
        if row is not None:
            return lambda values, mask: np.copyto(row, values, where=mask, casting="unsafe")
        assert isinstance(operand, Register)
        wide = self.files[operand.size][operand.index]
        dtype = DTYPE[type_]
        if np.dtype(dtype).kind == "f":
            unsigned = UINT[SIZE[type_]]
            return lambda values, mask: np.copyto(
                wide, np.asarray(values, dtype).view(unsigned), where=mask, casting="unsafe"
            )
        return lambda values, mask: np.copyto(wide, np.asarray(values).astype(dtype), where=mask, casting="unsafe")

    def read_floats(self, operand: Operand, type_: str) -> Read:
        """A function that returns numbers: float32, float64 for f64; of shape (threads, 2) for the packed types."""
        if type_ not in FLOATS:
            raise PTXError(f".{type_} is no floating type")
        if type_ in ("f32", "f64"):
            row = self.read(operand, type_)
            return lambda: row
        row = self.read(operand, bits(type_))
        if type_.endswith("x2"):
            row = row.view(np.uint16).reshape(self.threads, 2)
        return lambda: float_values(row if row.flags.c_contiguous else row.copy(), type_)

    def write_floats(self, operand: Operand, type_: str) -> Write:
        """The opposite of `read_floats`: numbers are rounded to the type."""
        write = self.write(operand, type_ if type_ in ("f32", "f64") else bits(type_))
        if type_ in ("f32", "f64"):
            return write
        if type_.endswith("x2"):
            return lambda values, mask: write(
                np.ascontiguousarray(float_bits(values, type_)).view(U32).reshape(-1), mask
            )
        return lambda values, mask: write(float_bits(values, type_), mask)
