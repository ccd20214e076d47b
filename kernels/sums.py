"""Sums along the rows of a tile of scores."""

import triton
import triton.language as tl


@triton.jit
def add_pairs(p, px, other_p, other_px):
    return p + other_p, px + other_px


@triton.jit
def row_sums(p, px, M: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr):
    """Sums of both along their rows, [M, N] -> [M]. PARTIALS columns of the matrix-unit layout lie side by side in the
    threads of a row: each thread first adds what it holds, in as many chains. Both sums in one reduction let a thread
    drop each pair as soon as it is added."""
    p = tl.reshape(p, (M, N // PARTIALS, PARTIALS))
    px = tl.reshape(px, (M, N // PARTIALS, PARTIALS))
    return tl.reduce(tl.reduce((p, px), 1, add_pairs), 1, add_pairs)


@triton.jit
def row_sum(p, M: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr):
    """`row_sums` of p alone."""
    return tl.sum(tl.sum(tl.reshape(p, (M, N // PARTIALS, PARTIALS)), 1), 1)
