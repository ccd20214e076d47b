"""Tensor cores: ldmatrix and mma.m16n8k*."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PTXError
from ..machine import Machine, Step
from ..operands import Instruction, Operand, Register, Vector
from ..scalars import DTYPE, U16, U32, Array, Mask, from_bfloat16, toward_zero
from .loads import address_of
from .registry import opcode


def _rows(operand: Operand) -> Array:
    """The rows of a vector of 32-bit registers in their file."""
    if not isinstance(operand, Vector):
        raise PTXError("a vector of registers is wanted")
    rows = [item.index for item in operand.items if isinstance(item, Register) and item.size == 4]
    if len(rows) != len(operand.items):
        raise PTXError("32-bit registers are wanted")
    return np.array(rows)


@opcode("ldmatrix")
def ldmatrix(machine: Machine, ins: Instruction) -> Step:
    """1, 2 or 4 matrices of 8 rows of 16 bytes; lanes 8i to 8i + 7 give the addresses of the rows of matrix i."""
    count = int((ins.one_of("x1", "x2", "x4") or "x0")[1])
    if not ins.has("m8n8") or ins.type != "b16" or not count:
        raise PTXError("this form is not supported")
    rows, transposed = _rows(ins.args[0]), ins.has("trans")
    address = address_of(machine, ins.args[1], "shared")
    givers = np.flatnonzero(machine.lane < 8 * count)
    file = machine.registers.files[4]

    def step(mask: Mask) -> None:
        machine.whole_warps(mask, ins)
        threads = givers if mask is True else givers[mask[givers]]
        values = machine.shared.load(address()[threads], 2, 8, ins, threads, collective=True)
        matrices = values.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(U32).reshape(-1, count, 32).transpose(1, 0, 2).reshape(count, -1)
        if mask is True:
            file[rows] = words
        else:
            file[rows[:, None], np.flatnonzero(mask)] = words

    return step


def _fragment(registers: Array, type_: str) -> Array:
    if type_ == "tf32":
        return (registers & U32(0xFFFFE000)).view(np.float32)  # the hardware ignores the low 13 bits
    if type_ == "f16":
        return registers.view(np.float16)
    return from_bfloat16(registers.view(U16)) if type_ == "bf16" else registers.view(DTYPE[type_])


@dataclass(frozen=True)
class Form:
    """Of mma.m16n8k*: D = A B + C of 16 x K, K x 8 and 16 x 8 in every warp."""

    depth: int  # K
    type_a: str
    type_b: str
    saturate: bool

    @property
    def per_register(self) -> int:
        """Elements of A and B in a 32-bit register."""
        return {"tf32": 1, "f16": 2, "bf16": 2}.get(self.type_a, 4)

    @property
    def integer(self) -> bool:
        return self.per_register == 4

    @property
    def halves(self) -> int:
        """Registers of B; A has two for each."""
        return self.depth // (4 * self.per_register)


def form_of(ins: Instruction) -> Form:
    found = re.match(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(\.satfinite)?\.(f32|s32)\.(tf32|f16|bf16|s8|u8)\.(\w+)\.\3$", ins.op
    )
    if not found:
        raise PTXError("this form is not supported")
    form = Form(int(found.group(1)), found.group(4), found.group(5), bool(found.group(2)))
    if form.integer != (found.group(3) == "s32") or (form.type_a != form.type_b and not form.integer):
        raise PTXError("these types are not supported")
    return form


Rows = tuple[int, ...]


@dataclass
class Group:
    """Products with the same A: their Bs are put side by side."""

    a: Rows
    b: list[Rows]
    c: list[Rows]
    d: list[Rows]


def products(machine: Machine, run: list[Instruction]) -> Step:
    """Matrix products that follow each other. Products are exact; see Options.tensor_core for sums."""
    form = form_of(run[0])
    steps, groups, written = [], [], set()  # type: tuple[list[Step], list[Group], set[int]]
    for ins in run:
        d, a, b, c = (tuple(_rows(arg)) for arg in ins.args)
        if [len(d), len(a), len(b), len(c)] != [4, 2 * form.halves, form.halves, 4]:
            raise PTXError("the number of registers does not fit the shape")
        if written & {*a, *b}:  # operands that the run itself has computed
            steps.append(_product_step(machine, run[0], form, groups))
            groups, written = [], set()
        last = groups[-1] if groups else None
        if last and last.a == a and not {*c, *d} & {row for rows in last.d for row in rows}:
            for rows, more in ((last.b, b), (last.c, c), (last.d, d)):
                rows.append(more)
        else:
            groups.append(Group(a, [b], [c], [d]))
        written |= set(d)
    steps.append(_product_step(machine, run[0], form, groups))

    def step(mask: Mask) -> None:
        for each in steps:
            each(mask)

    return step


def _product_step(machine: Machine, ins: Instruction, form: Form, groups: list[Group]) -> Step:
    """Matrices stay in order from group to group where one adds to what another computed; registers get them last."""
    file, warps, halves, e = machine.registers.files[4], machine.warps, form.halves, form.per_register
    number: Any = np.int32 if form.integer else np.float32
    exact = machine.options.tensor_core == "exact" or form.integer

    # Lane 4g + i holds, in register j of A, row g + 8 (j & 1) and columns e i ... of the half j >> 1; in register j of
    # B, rows e i ... of the half j and column g; in register j of C, row g + 8 (j >> 1) and column 2 i + (j & 1).
    def matrix_a(rows: Rows) -> Array:
        a = _fragment(file[list(rows)], form.type_a).reshape(halves, 2, warps, 8, 4, e)
        return a.transpose(2, 1, 3, 0, 4, 5).astype(np.float64, order="C").reshape(warps, 16, form.depth)

    def matrix_b(rows: list[Rows]) -> Array:
        b = _fragment(file[np.array(rows)], form.type_b).reshape(len(rows), halves, warps, 8, 4, e)
        b = b.transpose(2, 1, 4, 5, 0, 3).astype(np.float64, order="C")
        return b.reshape(warps, form.depth, 8 * len(rows))

    def matrix_c(rows: list[Rows]) -> Array:
        c = file[np.array(rows)].view(number).reshape(len(rows), 2, 2, warps, 8, 4)
        return c.transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, 8 * len(rows))

    def put(rows: list[Rows], d: Array, mask: Mask) -> None:
        words = d.reshape(warps, 2, 8, len(rows), 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, machine.threads)
        for row, word in zip((row for four in rows for row in four), words.view(U32), strict=True):
            np.copyto(file[row], word, where=mask)

    def multiply(a: Array, b: Array, c: Array) -> Array:
        if form.integer:  # float64 holds these sums exactly
            total = (np.matmul(a, b) + c).astype(np.int64)
            return (np.clip(total, -(2**31), 2**31 - 1) if form.saturate else total).astype(np.int32)
        if exact:
            return (np.matmul(a, b) + c).astype(np.float32)
        return truncating(a, b, c, 4 if form.type_a == "tf32" else 8)

    def step(mask: Mask) -> None:
        machine.whole_warps(mask, ins)
        matrices: dict[Any, Array] = {}  # A and B, which the run does not change
        sums: dict[tuple[Rows, ...], tuple[list[Rows], Array]] = {}  # not in registers yet
        for group in groups:
            b_key, c_key = ("b", *group.b), tuple(group.c)
            if group.a not in matrices:
                matrices[group.a] = matrix_a(group.a)
            if b_key not in matrices:
                matrices[b_key] = matrix_b(group.b)
            if c_key in sums:
                c = sums[c_key][1]
            else:
                for rows, d in sums.values():
                    put(rows, d, mask)
                sums.clear()
                c = matrix_c(group.c)
            sums[tuple(group.d)] = group.d, multiply(matrices[group.a], matrices[b_key], c)
        for rows, d in sums.values():
            put(rows, d, mask)

    return step


def truncating(a: Array, b: Array, c: Array, width: int) -> Array:
    """About as tensor cores add: for each `width` products, all terms are aligned to the largest exponent and cut to
    25 bits there, then added, and the sum is cut to float32."""
    total = c.astype(np.float64)
    for start in range(0, a.shape[2], width):
        terms = a[:, :, start : start + width, None] * b[:, None, start : start + width, :]
        terms = np.concatenate([terms, total[:, :, None, :]], axis=2)
        exponent = np.frexp(np.abs(terms).max(axis=2))[1]
        step = np.ldexp(1.0, exponent - 25)[:, :, None, :]
        finite = np.isfinite(terms).all(axis=2)
        total = np.where(finite, (np.trunc(terms / step) * step).sum(axis=2), terms.sum(axis=2))
        total = toward_zero(total).astype(np.float64)
    return total.astype(np.float32)
