"""The forward kernel for packed sequences: sequences of different lengths, one after the other in one tensor.

It finds the sequence of its program, that sequence's λ and the rows of its head. `attention.attend_all` is the rest.
"""

import triton
import triton.language as tl

from . import attention, rows
from .scale import token_scale


@triton.jit
def bounds(Cu_seqlens, sequence, total, longest):
    """First row and length of a sequence. Whatever Cu_seqlens holds, its rows lie in 0 .. total, and it has at most
    `longest`."""
    begin = tl.load(Cu_seqlens + sequence)
    end = tl.load(Cu_seqlens + sequence + 1)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    return begin, tl.minimum(end - begin, longest).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "stride_qn", "stride_qh", "stride_kn", "stride_kh", "stride_vn", "stride_vh", "stride_on", "stride_oh",
        "stride_ss", "stride_sh", "H", "Hkv", "total_q", "total_k", "max_seqlen_q", "max_seqlen_k",
    ]
)  # fmt: skip
def attention_varlen_forward(
    Q, K, V, Cu_seqlens_q, Cu_seqlens_k, Scale, Out, Entropy, Lse,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh, stride_ss, stride_sh,
    H, Hkv, total_q, total_k, max_seqlen_q, max_seqlen_k,
    C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one sequence against all keys of that sequence.

    Q (total_q, H, D), K (total_k, Hkv, D), V (total_k, Hkv, Dv) and Out (total_q, H, Dv): any strides, in units of
    C.row_unit elements; that of the last axis is 1. Cu_seqlens_q and Cu_seqlens_k: int32 (S + 1,), where each sequence
    begins and the last one ends. Scale: by C.scale a number; float32 (S, H) of any strides; or (T, H_T), two
    numbers or two float32 (S,). Entropy and Lse: float32 (H, total_q), or None. Rows in no sequence are not written.
    The grid has S * H * cdiv(max_seqlen_q, BLOCK_M) programs, for any lengths; a program beyond the end of its sequence
    sees no key and stores nothing.
    C: a `config.Config`.
    """
    M: tl.constexpr = C.tile.block_m
    N: tl.constexpr = C.tile.block_n
    tiles = tl.cdiv(max_seqlen_q, M)
    tile = tl.program_id(0) % tiles
    if C.is_causal:
        tile = tiles - 1 - tile  # the longest first
    sequence_head = tl.program_id(0) // tiles
    sequence = sequence_head // H
    begin_q, Nq = bounds(Cu_seqlens_q, sequence, total_q, max_seqlen_q)
    begin_k, Nk = bounds(Cu_seqlens_k, sequence, total_k, max_seqlen_k)
    # No early return: with it the compiler orders the main loop of D = 96 so that it is 8 % slower with Triton 3.7, and
    # 5 % with 3.9 (modelled by benchmarks/model, whose largest error is 8 %).
    Nk = tl.where(tile * M < Nq, Nk, 0)
    head = sequence_head % H
    key_head = (head // (H // Hkv)).to(tl.int64)
    head = head.to(tl.int64)
    begin_q = begin_q.to(tl.int64)
    begin_k = begin_k.to(tl.int64)
    query_index = tile * M + tl.arange(0, M)

    q_rows = rows.rows_at(Q + (begin_q * stride_qn + head * stride_qh) * C.row_unit, stride_qn, M, C)
    k_rows = rows.rows_at(K + (begin_k * stride_kn + key_head * stride_kh) * C.row_unit, stride_kn, N, C)
    v_rows = rows.rows_at(V + (begin_k * stride_vn + key_head * stride_vh) * C.row_unit, stride_vn, N, C)
    out_rows = rows.rows_at(Out + (begin_q * stride_on + head * stride_oh) * C.row_unit, stride_on, M, C)

    if C.scale == "number":
        scale = Scale
    elif C.scale == "per_head":
        scale = tl.load(Scale + sequence.to(tl.int64) * stride_ss + head * stride_sh)
    elif C.scale == "lengths":
        scale = token_scale(Nk, Scale[0], Scale[1], C)
    else:
        scale = token_scale(Nk, tl.load(Scale[0] + sequence), tl.load(Scale[1] + sequence), C)
    row = head * total_q + begin_q
    whole = attention.Head(q_rows, k_rows, v_rows, out_rows, None, scale, Entropy, Lse, row)
    attention.attend_all(whole, tile, query_index, Nq, Nk, C)
