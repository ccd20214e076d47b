"""Sums along the rows of a tile of scores, as its threads hold them."""

import triton
import triton.language as tl


@triton.jit
def add_pairs(p, px, other_p, other_px):
    return p + other_p, px + other_px


@triton.jit
def split_rows(p, M: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr, LANES: tl.constexpr):
    """[M, N] with the columns that each of LANES threads of a row holds along axes of their own, 1 and 3.

    PARTIALS columns of the matrix-unit layout lie side by side in the threads of a row. The last axis, of 1, keeps sums
    [M, LANES, 1] from being laid out as a matrix, where a thread would hold them twice."""
    return tl.reshape(p, (M, N // PARTIALS, LANES, PARTIALS // LANES, 1))


@triton.jit
def row_sums(p, px, M: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr, LANES: tl.constexpr):
    """Sums of both along their rows, [M, N] -> [M, LANES, 1]: of each thread by itself, or of all with LANES = 1. Each
    thread first adds what it holds, in as many chains as it has columns side by side. Both sums in one reduction let a
    thread drop each pair as soon as it is added."""
    p = split_rows(p, M, N, PARTIALS, LANES)
    px = split_rows(px, M, N, PARTIALS, LANES)
    return tl.reduce(tl.reduce((p, px), 1, add_pairs), 2, add_pairs)


@triton.jit
def row_sum(p, M: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr, LANES: tl.constexpr):
    """`row_sums` of p alone."""
    return tl.sum(tl.sum(split_rows(p, M, N, PARTIALS, LANES), 1), 2)


@triton.jit
def row_total(x):
    """[M, LANES, 1] -> [M]."""
    return tl.sum(tl.sum(x, 2), 1)
