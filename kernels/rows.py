"""Rows of a tensor in memory: where they lie, and how a tile of them is loaded and stored.

A head dim that is no power of two is held in two pieces (`config.pieces`), so a tile is a tuple of tensors.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """The rows of one head. base: pointer to the first. stride: elements from row to row, int64.
    offsets: elements from the first row of a tile to each of its rows, [rows, 1]."""

    base: tl.tensor
    stride: tl.tensor
    offsets: tl.tensor


@triton.jit
def rows_at(base, stride, ROWS: tl.constexpr, C: tl.constexpr):
    """The rows from `base` on, in tiles of ROWS. `stride` is in units of C.row_unit elements."""
    # Unsigned where 32 bits hold an offset: it is added to a pointer without sign extension.
    INDEX: tl.constexpr = tl.int64 if C.large_offsets else tl.uint32
    offsets = tl.arange(0, ROWS).to(INDEX)[:, None] * (tl.cast(stride, INDEX) * C.row_unit)
    return Rows(base, tl.cast(stride, tl.int64) * C.row_unit, offsets)


@triton.jit
def skip(rows, count):
    """The rows without the first `count`."""
    return Rows(rows.base + tl.cast(count, tl.int64) * rows.stride, rows.stride, rows.offsets)


@triton.jit
def load(rows, start, inside, CHECK: tl.constexpr, PIECES: tl.constexpr, DIM: tl.constexpr):
    """The tile of rows from `start` on, [rows, width] for each of the PIECES of a head dim DIM.

    CHECK: rows that are not `inside` [rows] are 0 and are not read. Columns from DIM on are 0 and are not read.
    """
    first = rows.base + tl.cast(start, tl.int64) * rows.stride
    tile = ()
    for i in tl.static_range(len(PIECES)):
        column = PIECES[i][0] + tl.arange(0, PIECES[i][1])[None, :]
        pointers = first + (rows.offsets + column)
        if PIECES[i][0] + PIECES[i][1] > DIM:
            valid = (inside[:, None] & (column < DIM)) if CHECK else column < DIM
            tile = tile + (tl.load(pointers, mask=valid, other=0.0),)
        elif CHECK:
            tile = tile + (tl.load(pointers, mask=inside[:, None], other=0.0),)
        else:
            tile = tile + (tl.load(pointers),)
    return tile


@triton.jit
def store(rows, start, inside, tile, PIECES: tl.constexpr, DIM: tl.constexpr):
    """Write a tile to the rows from `start` on, as far as they are `inside` [rows]."""
    first = rows.base + tl.cast(start, tl.int64) * rows.stride
    for i in tl.static_range(len(PIECES)):
        column = PIECES[i][0] + tl.arange(0, PIECES[i][1])[None, :]
        values = tile[i].to(rows.base.dtype.element_ty)
        tl.store(first + (rows.offsets + column), values, mask=inside[:, None] & (column < DIM))
