"""Which keys a tile of queries sees: every decision that hides a key."""

from typing import NamedTuple

import triton
import triton.language as tl

CHUNK = tl.constexpr(1024)  # keys of a shared mask that are read at once


class MaskRows(NamedTuple):
    """The rows of the mask of a tile's queries. base: pointer to the first query's first key. key_stride: elements from
    key to key, int64. offsets: elements from base to each query and key of a block, [M, N], or [1, N] if shared."""

    base: tl.tensor
    key_stride: tl.tensor
    offsets: tl.tensor


class Visible(NamedTuple):
    """Keys outside begin .. end are hidden from the whole tile. Keys in full_begin .. full_end, a whole number of
    blocks, are visible to the whole tile, and a shared mask adds 0 to their scores. If full_end is not above full_begin
    there are none, and all keys are left to the edge loop (`softmax.begin_again`)."""

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


@triton.jit
def mask_rows(base, query_stride, key_stride, first, Nq, C: tl.constexpr):
    """The rows of the queries from `first` on, of the mask of a head at `base`."""
    INDEX: tl.constexpr = tl.int64 if C.large_offsets else tl.uint32
    offsets = tl.arange(0, C.tile.block_n).to(INDEX)[None, :] * tl.cast(key_stride, INDEX)
    if C.mask_per_query:
        # Queries past the end read the last one's row; they are never stored.
        query = tl.minimum(tl.arange(0, C.tile.block_m), Nq - 1 - first).to(INDEX)
        offsets += query[:, None] * (tl.cast(query_stride, INDEX) * C.mask_unit)
        base += first * query_stride * C.mask_unit
    return MaskRows(base, tl.cast(key_stride, tl.int64), offsets)


@triton.jit
def load(mask, start, inside, C: tl.constexpr, EDGE: tl.constexpr):
    """What the mask adds to the scores of a block from `start` on, [M, N] or [1, N]: 0, -inf or, of a floating mask,
    its numbers. EDGE: keys that are not `inside` [N] count as hidden and are not read."""
    pointers = mask.base + tl.cast(start, tl.int64) * mask.key_stride + mask.offsets
    return read(pointers, inside[None, :], C, EDGE)


@triton.jit
def read(pointers, inside, C: tl.constexpr, EDGE: tl.constexpr):
    FLOATING: tl.constexpr = C.mask == "floating"
    if EDGE:
        mask = tl.load(pointers, mask=inside, other=float("-inf") if FLOATING else 0)
    else:
        mask = tl.load(pointers)
    # A boolean mask as numbers too: the compiler moves numbers between layouts with fewer instructions.
    return mask.to(tl.float32) if FLOATING else tl.where(mask != 0, 0.0, float("-inf"))


@triton.jit
def hide(s, bias, key_index, query_index, inside, C: tl.constexpr, EDGE: tl.constexpr):
    """Scores s [M, N] with those of hidden keys at -inf, and with the bias added where it is floating.

    bias: what the mask adds, [M, N] or [1, N], or None where the mask is not looked at.
    """
    if bias is not None:
        if C.mask == "floating":
            s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
        else:
            s = tl.where(bias == 0.0, s, float("-inf"))
    elif EDGE:
        if C.is_causal:
            s = tl.where(inside[None, :] & (key_index[None, :] <= query_index[:, None]), s, float("-inf"))
        else:
            s += tl.where(inside, 0.0, float("-inf"))[None, :]
    return s


@triton.jit
def visible_keys(mask, tile, Nq, Nk, C: tl.constexpr):
    """The keys that the queries of tile number `tile` see, as `Visible`."""
    N: tl.constexpr = C.tile.block_n
    SHARED: tl.constexpr = C.mask != "none" and not C.mask_per_query
    begin = 0
    full_begin = 0
    full_end = Nk
    end = Nk
    if SHARED:
        begin, full_begin, full_end, end = scan(mask, Nk, C)
        begin = begin // N * N
        full_begin = tl.cdiv(full_begin, N) * N
    if C.is_causal:
        full_end = tl.minimum(full_end, tile * C.tile.block_m + 1)
        end = tl.minimum(end, tl.minimum(Nq, (tile + 1) * C.tile.block_m))
    full_end = full_end // N * N
    return Visible(begin, full_begin, full_end, end)


@triton.jit
def scan(mask, Nk, C: tl.constexpr):
    """Of a shared mask: the range of keys it does not hide, begin .. end, and the range of keys it adds 0 to,
    full_begin .. full_end, if these are one run, as key padding leaves them; else an empty one."""
    index = tl.arange(0, CHUNK)
    first_seen = tl.full([CHUNK], 2147483647, tl.int32)
    last_seen = tl.zeros([CHUNK], tl.int32)
    first_plain = first_seen
    last_plain = last_seen
    plain_keys = last_seen
    for start in range(0, Nk, CHUNK):
        key = start + index
        bias = read(mask.base + key.to(tl.int64) * mask.key_stride, key < Nk, C, True)
        seen = bias != float("-inf")
        plain = bias == 0.0
        first_seen = tl.where(seen, tl.minimum(first_seen, key), first_seen)
        last_seen = tl.where(seen, key + 1, last_seen)
        first_plain = tl.where(plain, tl.minimum(first_plain, key), first_plain)
        last_plain = tl.where(plain, key + 1, last_plain)
        plain_keys += plain.to(tl.int32)
    end = tl.max(last_seen, 0)
    begin = tl.minimum(tl.min(first_seen, 0), end)
    full_end = tl.max(last_plain, 0)
    full_begin = tl.minimum(tl.min(first_plain, 0), full_end)
    full_end = tl.where(tl.sum(plain_keys, 0) == full_end - full_begin, full_end, full_begin)
    return begin, full_begin, full_end, end
