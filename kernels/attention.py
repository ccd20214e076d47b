"""The forward kernel: exact attention with a run-time scale, and the entropy of every row in the same pass.

One program holds BLOCK_M queries of one head:

    prologue      find the rows of its head, load its queries, find the keys they see (masks.py)
    main loop     whole blocks of BLOCK_N keys that all its queries see
    edge loop     the other blocks: the last keys, the causal diagonal, the ends of a mask
    epilogue      store the output, the entropy and the log-sum-exp of its rows

`attention_forward` is the kernel for sequences of one length; varlen.py has the kernel for packed sequences. Each finds
the rows of its program's head; `attend_all` is the rest of both.

Both loops fold blocks of keys into the running softmax (softmax.py). rows.py loads and stores tiles; a tile is a tuple
of one tensor for each piece of the head dim. config.py has all that is fixed when the kernel is compiled.
In shape comments M are the queries of the program, N the keys of a block, D and Dv the head dims of key and value.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import masks, rows, softmax
from .scale import token_scale

# Stands in for a scale of 0: too small to tell any two scores apart, but times -inf it is still -inf.
SMALLEST = tl.constexpr(1.1754943508222875e-38)


class Queries(NamedTuple):
    """The queries of the program. tile: [M, width] for each piece of D. index: [M]."""

    tile: tl.tuple
    index: tl.tensor


class Keys(NamedTuple):
    """The keys of the program's head. The keys from `end` on are hidden. mask: `masks.MaskRows` or None."""

    key: rows.Rows
    value: rows.Rows
    mask: masks.MaskRows
    end: tl.tensor


class Head(NamedTuple):
    """What one head is made of. mask: `masks.MaskRows` or None. scale: a number or [M]. entropy, lse: pointers or None.
    row: where the head's first query is in both, int64."""

    query: rows.Rows
    key: rows.Rows
    value: rows.Rows
    out: rows.Rows
    mask: masks.MaskRows | None
    scale: tl.tensor
    entropy: tl.tensor
    lse: tl.tensor
    row: tl.tensor


@triton.jit
def scores(queries, k, C: tl.constexpr):
    """q @ k^T [M, N]. k: [N, width] for each piece of D."""
    s = tl.dot(queries.tile[0], k[0].T, input_precision=C.precision)
    for i in tl.static_range(1, len(k)):
        s = tl.dot(queries.tile[i], k[i].T, s, input_precision=C.precision)
    return s


@triton.jit
def attend(queries, keys, start, state, scale, C: tl.constexpr, EDGE: tl.constexpr):
    """Fold the keys start .. start + BLOCK_N into the running softmax. EDGE: some may be hidden, and logits may be of
    any size."""
    KEY_PIECES: tl.constexpr = C.key_pieces  # Triton 3.4 passes on a tuple only under a name of its own
    VALUE_PIECES: tl.constexpr = C.value_pieces
    MASKED: tl.constexpr = C.mask_per_query or (EDGE and C.mask != "none")
    key_index = start + tl.arange(0, C.tile.block_n)
    inside = key_index < keys.end  # [N]
    bias = masks.load(keys.mask, start, inside, C, EDGE) if MASKED else None  # [M, N] or [1, N]
    # The value of a key that is hidden from the whole tile is not read: NaN there does not reach the output.
    seen = (tl.max(bias, 0) != float("-inf")) if MASKED else inside  # [N]

    k = rows.load(keys.key, start, inside, EDGE, KEY_PIECES, C.head_dim)
    s = scores(queries, k, C)
    unit = scale
    if MASKED and C.mask == "floating":
        s *= softmax.column(scale, C)
        unit = tl.full([C.tile.block_m], 1.0, tl.float32) if C.scale == "per_query" else 1.0
    s = masks.hide(s, bias, key_index, queries.index, inside, C, EDGE)
    state, p = softmax.fold(state, s, unit, C, EDGE or MASKED, EDGE)
    v = rows.load(keys.value, start, seen, EDGE or MASKED, VALUE_PIECES, C.value_dim)
    return softmax.accumulate(state, p, v, C)


@triton.jit
def attend_all(head, tile, query_index, Nq, Nk, C: tl.constexpr):
    """Tile number `tile` of the queries of a `Head`, `query_index` [M], against its Nk keys: computes and stores."""
    M: tl.constexpr = C.tile.block_m
    N: tl.constexpr = C.tile.block_n
    KEY_PIECES: tl.constexpr = C.key_pieces
    VALUE_PIECES: tl.constexpr = C.value_pieces
    first = tile * M
    inside = query_index < Nq

    sign = tl.where(head.scale < 0, -1.0, 1.0)
    # Positive: the maximum of s * scale is max(s) * scale.
    scale = tl.where(head.scale == 0.0, SMALLEST, tl.abs(head.scale))
    if C.mask != "floating":
        scale *= softmax.LOG2E
    q = rows.load(head.query, first, inside, True, KEY_PIECES, C.head_dim)
    signed = ()
    for i in tl.static_range(len(q)):
        signed = signed + ((q[i].to(tl.float32) * softmax.column(sign, C)).to(q[i].dtype),)
    queries = Queries(signed, query_index)
    visible = masks.visible_keys(head.mask, tile, Nq, Nk, C)

    # The main loop counts from 0 and its rows begin at full_begin: a loop that begins at a number the compiler knows
    # nothing of is not software-pipelined. A mask per query has full_begin = 0.
    k_rows, v_rows = rows.skip(head.key, visible.full_begin), rows.skip(head.value, visible.full_begin)
    keys = Keys(k_rows, v_rows, head.mask, visible.end)
    state = softmax.empty(-softmax.LARGE, C)
    for start in range(0, visible.full_end - visible.full_begin, N):
        state = attend(queries, keys, start, state, scale, C, False)

    # Logits beyond 2^26 are rare: their rows take all keys in the edge loop. Its clamp in the main loop would cost 3
    # to 11 % (modelled by benchmarks/model, whose largest error is 8 %).
    again, state = softmax.begin_again(state, C)
    full_keys = tl.where(again, 0, visible.full_end - visible.full_begin)
    keys = Keys(head.key, head.value, head.mask, visible.end)
    for block in tl.range(visible.begin, visible.end - full_keys, N, num_stages=1):
        start = block + tl.where(block >= visible.full_begin, full_keys, 0)
        state = attend(queries, keys, start, state, scale, C, True)

    out, entropy, lse = softmax.results(state, C)
    rows.store(head.out, first, inside, out, VALUE_PIECES, C.value_dim)
    row = head.row + query_index
    if C.entropy:
        tl.store(head.entropy + row, entropy, mask=inside)
    if C.lse:
        tl.store(head.lse + row, lse, mask=inside)


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_ob", "stride_oh", "stride_on",
        "stride_mb", "stride_mh", "stride_mm", "stride_sb", "stride_sh", "stride_sn", "H", "Hkv", "Nq", "Nk",
    ]
)  # fmt: skip
def attention_forward(
    Q, K, V, Mask, Scale, Out, Entropy, Lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh, stride_sn,
    H, Hkv, Nq, Nk,
    C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all their keys.

    Q (B, H, Nq, D), K (B, Hkv, Nk, D), V (B, Hkv, Nk, Dv) and Out (B, H, Nq, Dv): any strides, in units of C.row_unit
    elements; that of the last axis is 1. Mask (B, H, Nq, Nk), uint8 or floating, or None: strides may be 0; all but
    the last are in units of C.mask_unit elements. Scale: by C.scale a number; float32 (B, H, Nq) of any strides; or
    (N, T, H_T) with N an integer (B,) of any stride, and T and H_T numbers. Entropy and Lse: float32 (B, H, Nq), or
    None. C: a `config.Config`.
    """
    M: tl.constexpr = C.tile.block_m
    N: tl.constexpr = C.tile.block_n
    tiles = tl.cdiv(Nq, M)
    tile = tl.program_id(0) % tiles
    if C.is_causal:
        tile = tiles - 1 - tile  # the longest first
    batch_head = tl.program_id(0) // tiles
    batch = (batch_head // H).to(tl.int64)
    head = batch_head % H
    key_head = (head // (H // Hkv)).to(tl.int64)
    head = head.to(tl.int64)
    query_index = tile * M + tl.arange(0, M)

    q_rows = rows.rows_at(Q + (batch * stride_qb + head * stride_qh) * C.row_unit, stride_qn, M, C)
    k_rows = rows.rows_at(K + (batch * stride_kb + key_head * stride_kh) * C.row_unit, stride_kn, N, C)
    v_rows = rows.rows_at(V + (batch * stride_vb + key_head * stride_vh) * C.row_unit, stride_vn, N, C)
    out_rows = rows.rows_at(Out + (batch * stride_ob + head * stride_oh) * C.row_unit, stride_on, M, C)
    mask = None
    if C.mask != "none":
        mask = Mask + (batch * stride_mb + head * stride_mh) * C.mask_unit
        mask = masks.mask_rows(mask, stride_mm, stride_mn, tile.to(tl.int64) * M, Nq, C)

    if C.scale == "number":
        scale = Scale
    elif C.scale == "per_head":
        scale = tl.load(Scale + batch * stride_sb + head * stride_sh)
    elif C.scale == "per_query":  # [M]
        scale = Scale + batch * stride_sb + head * stride_sh + query_index.to(tl.int64) * stride_sn
        scale = tl.load(scale, mask=query_index < Nq, other=1.0)
    else:
        scale = token_scale(tl.load(Scale[0] + batch * stride_sb), Scale[1], Scale[2], C)
    row = batch_head.to(tl.int64) * Nq
    attend_all(Head(q_rows, k_rows, v_rows, out_rows, mask, scale, Entropy, Lse, row), tile, query_index, Nq, Nk, C)
