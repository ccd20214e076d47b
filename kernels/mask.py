"""Masks on the device: a tile of one as numbers, and which keys a mask that all queries share hides or leaves alone."""

import triton
import triton.language as tl

CHUNK = tl.constexpr(1024)  # keys that one program looks at together


@triton.jit
def load_mask(pointers, start, end, stride_mn, N: tl.constexpr, EDGE: tl.constexpr, BIAS: tl.constexpr):
    """N keys of the mask from start on as what they add to the scores, [M, N], or [N] where all queries share it.
    EDGE: those from end on count as hidden, and are not read."""
    pointers += tl.cast(start, tl.int64) * stride_mn
    if EDGE:
        valid = start + tl.arange(0, N) < end
        valid = valid if len(pointers.shape) == 1 else valid[None, :]
        mask = tl.load(pointers, mask=valid, other=float("-inf") if BIAS else 0)
    else:
        mask = tl.load(pointers)
    # As a number either way: the compiler moves numbers between layouts far better than booleans.
    return mask.to(tl.float32) if BIAS else tl.where(mask != 0, 0.0, float("-inf"))


@triton.jit
def scan_mask(Mask, stride_mn, begin, end, BIAS: tl.constexpr):
    """Of a mask that all queries share, between begin and end: the range that holds all keys not hidden, and the range
    of those it leaves as they are, if these are one run (as padding leaves them), else an empty one."""
    index = tl.arange(0, CHUNK)
    pointers = Mask + index.to(tl.int64) * stride_mn
    first_seen = tl.full([CHUNK], 2147483647, tl.int32)
    last_seen = tl.zeros([CHUNK], tl.int32)
    first_plain = first_seen
    last_plain = last_seen
    plain_keys = last_seen
    for start in range(begin, end, CHUNK):
        key = start + index
        mask = load_mask(pointers, start, end, stride_mn, CHUNK, True, BIAS)
        seen = mask != float("-inf")
        plain = mask == 0.0
        first_seen = tl.where(seen, tl.minimum(first_seen, key), first_seen)
        last_seen = tl.where(seen, key + 1, last_seen)
        first_plain = tl.where(plain, tl.minimum(first_plain, key), first_plain)
        last_plain = tl.where(plain, key + 1, last_plain)
        plain_keys += plain.to(tl.int32)
    last_seen = tl.max(last_seen, 0)
    first_seen = tl.minimum(tl.min(first_seen, 0), last_seen)
    last_plain = tl.max(last_plain, 0)
    first_plain = tl.minimum(tl.min(first_plain, 0), last_plain)
    last_plain = tl.where(tl.sum(plain_keys, 0) == last_plain - first_plain, last_plain, first_plain)
    return first_seen, last_seen, first_plain, last_plain
