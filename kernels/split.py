"""Split-KV: where few queries leave most of the GPU idle, programs share out their keys, and the parts are merged.

Every split leaves its own (out, lse, entropy). With w = softmax(lse) over the splits the whole row has
out = sum w * out, lse = logsumexp(lse) and entropy = sum w * (entropy - ln w). The order of the sums is fixed.
"""

import functools

import triton
import triton.language as tl

from .tiles import Tile

MERGED_ROWS = 16  # by one program
MOST_SPLITS = 32
FEWEST_BLOCKS = 4  # of keys in a split


@functools.lru_cache(maxsize=4096)
def key_splits(programs: int, Nk: int, tile: Tile, processors: int) -> int:
    """Over how many programs to split the Nk keys of each of `programs` tiles of queries, on a GPU of `processors`.

    The cost is counted in blocks of keys that the busiest processor goes through one after the other; writing and
    merging the parts is taken for 8 blocks and one more for each split (an estimate, not timed).
    """
    at_once = processors * max(1, 8 // tile.num_warps)  # 8 warps of 255 registers fill a processor
    blocks = -(-Nk // tile.block_n)

    def cost(splits: int) -> int:
        return -(-programs * splits // at_once) * -(-blocks // splits) + (8 + splits if splits > 1 else 0)

    most = min(MOST_SPLITS, blocks // FEWEST_BLOCKS)
    if programs >= at_once or most < 2:
        return 1
    best = min(range(1, most + 1), key=cost)
    return -(-blocks // -(-blocks // best))  # without splits that would get no keys


@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "stride_on", "rows", "H", "Nq", "splits"])
def merge_splits(
    PartOut, PartLse, PartEntropy, Out, Lse, Entropy,
    stride_ob, stride_oh, stride_on, rows, H, Nq, splits,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of the output from their parts.

    PartOut (splits, B, H, Nq, E), PartLse and PartEntropy (splits, B, H, Nq) float32, contiguous; rows = B * H * Nq.
    Out (B, H, Nq, E) with any strides, the last one 1. Lse and Entropy (B, H, Nq) float32, or None.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    valid = row < rows
    e = tl.arange(0, BLOCK_E)
    tile_valid = valid[:, None] & (e[None, :] < E)
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for split in range(splits):
        highest = tl.maximum(highest, tl.load(PartLse + split * rows + row, mask=valid, other=float("-inf")))
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # no key visible in any split

    total = tl.zeros([BLOCK_R], tl.float32)
    surprise = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for split in range(splits):
        part = split * rows + row
        x = tl.load(PartLse + part, mask=valid, other=float("-inf")) - highest
        w = tl.exp(x)
        total += w
        acc += w[:, None] * tl.load(PartOut + part[:, None] * E + e[None, :], mask=tile_valid, other=0.0)
        if Entropy is not None:
            entropy = tl.load(PartEntropy + part, mask=valid, other=0.0)
            surprise += w * (entropy - tl.maximum(x, -1000.0))  # a split without keys: 0 * 1000, not 0 * inf
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    b = row // (H * Nq)
    h = row // Nq % H
    n = row % Nq
    pointers = Out + (b * stride_ob + h * stride_oh + n * stride_on)[:, None] + e[None, :]
    tl.store(pointers, (acc * inverse[:, None]).to(Out.dtype.element_ty), mask=tile_valid)
    if Lse is not None:
        tl.store(Lse + row, highest + tl.log(total), mask=valid)
    if Entropy is not None:
        entropy = tl.log(total) + surprise * inverse
        entropy = tl.where((total == 0.0) | (entropy < 0.0), 0.0, entropy)
        tl.store(Entropy + row, entropy, mask=valid)
