"""The forward kernel: exact attention with a run-time scale, and the entropy of every row in the same pass.

Notation in shape comments: M queries and N keys of one tile, D the query/key head dim, E the value head dim.
A head dim that is no power of two is held in two pieces (D1 + D2, E1 + E2), see `tiles.split_head_dim`.

Online softmax in base 2, u = scale * log2(e) * (q.k), with the entropy sum *centred* at the running maximum m:

    m' = max(m, max u)    x = u - m'    p = 2^x    a = 2^(m - m')
    t <- a * (t + (m - m') * l) + sum p * x
    l <- a * l + sum p
    o <- a * o + p @ v
    entropy = ln 2 * (log2 l - t / l)        lse = ln 2 * (m + log2 l)        out = o / l

The uncentred form, lse - E[score], loses three digits once the logits carry an offset.
"""

import triton
import triton.language as tl

from .mask import load_mask, scan_mask
from .sums import row_sum, row_sums

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The first pivot of rows whose scores are known only after a mask was added. Every finite score reaches it, and being
# finite it keeps inf - inf out of rows that have seen no key yet.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# The first pivot of the other rows. Up to this magnitude the rounding of the maximum moves the weight of the highest
# score by at most 2^4; rows beyond it are done again with differences of scores, which any finite score survives.
HUGE = tl.constexpr(67108864.0)  # 2^26, in units of ln 2
# Stands in for a scale of 0: too small to tell any two scores apart, but TINY * -inf is still -inf.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def load_tile(pointers, row_valid, col_valid, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """Load a tile; rows or columns that are not valid read as 0 and are not touched in memory."""
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(pointers, mask=row_valid & col_valid, other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=row_valid, other=0.0)
    elif CHECK_COLS:
        return tl.load(pointers, mask=col_valid, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def attend(
    q1, q2, K, V, k1_offsets, k2_offsets, v1_offsets, v2_offsets, mask,
    start, end, query_index, stride_kn, stride_vn, scale,
    m, l, t, acc1, acc2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIALS: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_FIRST: tl.constexpr,
):  # fmt: skip
    """Fold the keys start .. start + BLOCK_N, with EDGE those before end, into the running softmax of one tile of
    queries. `mask` is what they add to the scores, [N] or [M, N], where there is a mask."""
    HIDES: tl.constexpr = EDGE or MASK != "none"
    BIAS: tl.constexpr = MASK == "bias"
    key_index = start + tl.arange(0, BLOCK_N)
    offset = tl.cast(start, tl.int64)
    key_inside = key_index < end  # [N]
    # The value of a key hidden from the whole tile is not read, but 0: what stands there, NaN even, cannot leak.
    key_valid = key_inside
    if MASK != "none":
        key_valid = (tl.max(mask, 0) if MASK_ROWS else mask) != float("-inf")

    e1 = tl.arange(0, E1)
    if VALUE_FIRST:
        v1 = load_tile(
            V + offset * stride_vn + v1_offsets, key_valid[:, None], e1[None, :] < E, HIDES, E1 > E
        )  # [N, E1]
    c1 = tl.arange(0, D1)
    k1 = load_tile(K + offset * stride_kn + k1_offsets, key_inside[None, :], c1[:, None] < D, EDGE, D1 > D)  # [D1, N]
    s = tl.dot(q1, k1, input_precision=PRECISION)  # [M, N]
    if D2:
        c2 = D1 + tl.arange(0, D2)
        k2 = load_tile(K + offset * stride_kn + k2_offsets, key_inside[None, :], c2[:, None] < D, EDGE, D1 + D2 > D)
        s = tl.dot(q2, k2, s, input_precision=PRECISION)

    if BIAS:
        if MASK_ROWS:
            s = tl.where(mask == float("-inf"), float("-inf"), tl.fma(s, scale, mask))
        else:
            s = tl.where((mask == float("-inf"))[None, :], float("-inf"), tl.fma(s, scale, mask[None, :]))
    else:
        if MASK_ROWS:
            s = tl.where(mask == 0.0, s, float("-inf"))
        elif CAUSAL and EDGE:
            s = tl.where(key_valid[None, :] & (key_index[None, :] <= query_index[:, None]), s, float("-inf"))
        elif MASK != "none":
            s = tl.where((mask == 0.0)[None, :], s, float("-inf"))
        elif EDGE:  # K is 0 there, and adding -inf hides it
            s += tl.where(key_inside, 0.0, float("-inf"))[None, :]
    if EDGE or BIAS:  # m is in units of s, which may be of any size
        unit = LOG2E if BIAS else scale
        m_new = tl.maximum(m, tl.max(s, 1))
        x = (s - m_new[:, None]) * unit
        d = tl.maximum((m - m_new) * unit, -1000.0)  # from the first pivot it may overflow, and 0 * -inf is not 0
    else:  # one instruction a score, right up to HUGE; its product is not rounded: an offset costs no digits
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        x = tl.fma(s, scale, -m_new[:, None])
        d = m - m_new
    a = tl.math.exp2(d)
    if VALUE_FIRST:
        acc1 = acc1 * a[:, None]
    p = tl.math.exp2(x)
    if ENTROPY:
        px = tl.maximum(x, -1000.0) if HIDES else x  # hidden: 0 * -1000, not 0 * -inf
        # Rounded at once where threads may hold a single score of a row: folded into the sum of a thread and its
        # partner, each would round the other's product only, and the two would differ in the last bit.
        px = tl.fma(p, px, 0.0) if PARTIALS == BLOCK_N else p * px
        sum_p, sum_px = row_sums(p, px, BLOCK_M, BLOCK_N, PARTIALS)
        previous = l
        l = l * a + sum_p
        t = tl.fma(tl.fma(previous, d, t), a, sum_px)
    else:
        l = l * a + row_sum(p, BLOCK_M, BLOCK_N, PARTIALS)

    if not VALUE_FIRST:
        v1 = load_tile(V + offset * stride_vn + v1_offsets, key_valid[:, None], e1[None, :] < E, HIDES, E1 > E)
        acc1 = acc1 * a[:, None]
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1, input_precision=PRECISION)  # [M, E1]
    if E2:
        e2 = E1 + tl.arange(0, E2)
        v2 = load_tile(V + offset * stride_vn + v2_offsets, key_valid[:, None], e2[None, :] < E, HIDES, E1 + E2 > E)
        acc2 = tl.dot(p, v2, acc2 * a[:, None], input_precision=PRECISION)  # [M, E2]
    return m_new, l, t, acc1, acc2


@triton.jit
def offsets_of(rows, D1: tl.constexpr, D2: tl.constexpr, AXIS: tl.constexpr):
    """Offsets of tiles of keys or values from those of their rows, [1, N] or [N, 1], with the head dim along AXIS: of
    the first piece, and of the second, which is the first again where there is none."""
    first = rows + tl.expand_dims(tl.arange(0, D1), 1 - AXIS)
    second = first
    if D2:
        second = rows + tl.expand_dims(D1 + tl.arange(0, D2), 1 - AXIS)
    return first, second


@triton.jit
def edge_block(block, full_start, full_end):
    """Where a block begins that is counted without those from full_start to full_end."""
    return block + tl.where(block >= full_start, full_end - full_start, 0)


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn", "stride_ob", "stride_oh", "stride_on",
        "stride_mb", "stride_mh", "stride_mm", "stride_sb", "stride_sh", "H", "Hkv", "Nq", "Nk",
    ]
)  # fmt: skip
def attention_forward(
    Q, K, V, Mask, Scale, Out, Entropy, Lse,
    scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh,
    H, Hkv, Nq, Nk,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIALS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, WIDE: tl.constexpr, VALUE_FIRST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all their keys.

    Q (B, H, Nq, D), K (B, Hkv, Nk, D), V (B, Hkv, Nk, E), Out (B, H, Nq, E): any strides, the last one 1, given in
    units of STRIDE_UNIT elements, which tells the compiler how far rows are aligned. Mask (B, H, Nq, Nk), uint8 for
    MASK == "bool" and floating for "bias"; its strides may be 0, all but the last are in units of MASK_UNIT elements,
    and without MASK_ROWS all queries share one row.
    Scale (B, H) float32, or None: then the number `scale`. Entropy and Lse (B, H, Nq) float32 in nats, or None.
    WIDE: an offset inside one tile can pass 2^31 elements. Offsets of tiles are 64-bit always.
    """
    tiles = tl.cdiv(Nq, BLOCK_M)
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b = (head // H).to(tl.int64)
    h = head % H
    h_kv = (h // (H // Hkv)).to(tl.int64)
    h = h.to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_M

    # Unsigned, so that adding an offset to a pointer shared by all threads takes no sign extension.
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.uint32
    row = tl.arange(0, BLOCK_M).to(INDEX)
    key = tl.arange(0, BLOCK_N).to(INDEX)
    query_index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = query_index < Nq
    stride_qn = tl.cast(stride_qn, INDEX) * STRIDE_UNIT
    stride_kn = tl.cast(stride_kn, INDEX) * STRIDE_UNIT
    stride_vn = tl.cast(stride_vn, INDEX) * STRIDE_UNIT
    stride_on = tl.cast(stride_on, INDEX) * STRIDE_UNIT
    Q += (b * stride_qb + h * stride_qh) * STRIDE_UNIT + first * stride_qn
    K += (b * stride_kb + h_kv * stride_kh) * STRIDE_UNIT
    V += (b * stride_vb + h_kv * stride_vh) * STRIDE_UNIT
    Out += (b * stride_ob + h * stride_oh) * STRIDE_UNIT + first * stride_on

    if Scale is not None:
        scale = tl.load(Scale + b * stride_sb + h * stride_sh)
    sign = tl.where(scale < 0, -1.0, 1.0)
    scale = tl.where(scale == 0.0, TINY, tl.abs(scale))  # positive: max and scale commute

    c1 = tl.arange(0, D1)
    e1 = tl.arange(0, E1)
    q1 = load_tile(Q + row[:, None] * stride_qn + c1[None, :], row_valid[:, None], c1[None, :] < D, True, D1 > D)
    q1 = (q1.to(tl.float32) * sign).to(q1.dtype)  # [M, D1]
    acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    q2 = q1
    acc2 = acc1
    if D2:
        c2 = D1 + tl.arange(0, D2)
        q2 = load_tile(Q + row[:, None] * stride_qn + c2[None, :], row_valid[:, None], c2[None, :] < D, True, True)
        q2 = (q2.to(tl.float32) * sign).to(q2.dtype)  # [M, D2]
    if E2:
        e2 = E1 + tl.arange(0, E2)
        acc2 = tl.zeros([BLOCK_M, E2], tl.float32)
    if MASK != "none":
        Mask += (b * stride_mb + h * stride_mh) * MASK_UNIT
    if MASK_ROWS:
        stride_mm = tl.cast(stride_mm, INDEX) * MASK_UNIT
        # Rows past the end read the last one again; they are never stored.
        mask_row = tl.minimum(row, Nq - 1 - first)[:, None] * stride_mm
        Mask += first * stride_mm

    BIAS: tl.constexpr = MASK == "bias"
    QUICK: tl.constexpr = not (BIAS and MASK_ROWS)  # whether the whole blocks' scores are all that counts there
    scale_log2 = scale * LOG2E
    edge_scale = scale if BIAS else scale_log2
    unit = LOG2E if BIAS else scale_log2  # of m in the edges, in units of ln 2
    m = tl.full([BLOCK_M], -HUGE if QUICK else LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    t = tl.zeros([BLOCK_M], tl.float32)
    ENTROPY: tl.constexpr = Entropy is not None

    # Keys from full_start to full_end come in whole blocks that every query of the tile sees, without a look at a mask
    # that all queries share. The other blocks between begin and end need checks.
    begin = 0
    end = Nk
    full_start = begin
    full_end = end
    SHARED_MASK: tl.constexpr = MASK != "none" and not MASK_ROWS
    if SHARED_MASK:
        begin, end, full_start, full_end = scan_mask(Mask, stride_mn, begin, end, MASK == "bias")
        begin = begin // BLOCK_N * BLOCK_N
        full_start = tl.cdiv(full_start, BLOCK_N) * BLOCK_N
    if CAUSAL:
        full_end = tl.minimum(full_end, tile * BLOCK_M + 1)
        end = tl.minimum(end, tl.minimum(Nq, (tile + 1) * BLOCK_M))
    full_end = full_end // BLOCK_N * BLOCK_N
    if SHARED_MASK:
        full_end = tl.maximum(full_end, full_start)
    # The loops count from 0 where they can: one that begins at a number the compiler knows nothing of does not load
    # ahead. K and V are moved instead.
    mask = m  # none yet
    K_full = K + tl.cast(full_start, tl.int64) * stride_kn
    V_full = V + tl.cast(full_start, tl.int64) * stride_vn
    k1_offsets, k2_offsets = offsets_of(key[None, :] * stride_kn, D1, D2, 0)
    v1_offsets, v2_offsets = offsets_of(key[:, None] * stride_vn, E1, E2, 1)
    if MASK_ROWS:
        mask_pointers = Mask + mask_row + key[None, :] * stride_mn
    for block in range(0, full_end - full_start, BLOCK_N):
        block_mask = mask
        if MASK_ROWS:
            block_mask = load_mask(mask_pointers, full_start + block, end, stride_mn, BLOCK_N, False, BIAS)
        m, l, t, acc1, acc2 = attend(
            q1, q2, K_full, V_full, k1_offsets, k2_offsets, v1_offsets, v2_offsets, block_mask,
            block, end, query_index, stride_kn, stride_vn, scale_log2 if QUICK else scale, m, l, t, acc1, acc2,
            D, D1, D2, E, E1, E2, BLOCK_M, BLOCK_N, PARTIALS, False, CAUSAL,
            "none" if SHARED_MASK else MASK, MASK_ROWS, ENTROPY, PRECISION, VALUE_FIRST,
        )  # fmt: skip
    if QUICK:
        # A row with logits above HUGE has an m that says so, one with all below -HUGE has l = 0: all keys once more.
        again = tl.max(((m > HUGE) | (l == 0.0)).to(tl.int32), 0) > 0
        full_end = tl.where(again, full_start, full_end)
        # From here on m is in other units. The quotient is rounded: one more step from m to what it stands for.
        pivot = m / unit
        d = tl.fma(pivot, -unit, m)
        a = tl.math.exp2(d)
        m = tl.where(again, LOWEST, pivot)
        t = tl.where(again, 0.0, (t + d * l) * a)
        l = tl.where(again, 0.0, l * a)
        acc1 = tl.where(again, 0.0, acc1 * a[:, None])
        if E2:
            acc2 = tl.where(again, 0.0, acc2 * a[:, None])
    if SHARED_MASK:
        mask_pointers = Mask + key * stride_mn
    edge_start = full_end
    edge_end = end
    if SHARED_MASK:  # edges on both sides of the whole blocks: these are left out of the count
        edge_start = begin
        edge_end = end - (full_end - full_start)
        start = edge_block(edge_start, full_start, full_end)
        mask = load_mask(mask_pointers, start, end, stride_mn, BLOCK_N, True, BIAS)
    for block in tl.range(edge_start, edge_end, BLOCK_N, num_stages=1):
        if not SHARED_MASK:
            start = block
        block_mask = mask
        if MASK_ROWS:
            block_mask = load_mask(mask_pointers, start, end, stride_mn, BLOCK_N, True, BIAS)
        m, l, t, acc1, acc2 = attend(
            q1, q2, K, V, k1_offsets, k2_offsets, v1_offsets, v2_offsets, block_mask,
            start, end, query_index, stride_kn, stride_vn, edge_scale, m, l, t, acc1, acc2,
            D, D1, D2, E, E1, E2, BLOCK_M, BLOCK_N, PARTIALS, True, CAUSAL, MASK, MASK_ROWS, ENTROPY,
            PRECISION, VALUE_FIRST,
        )  # fmt: skip
        if SHARED_MASK:
            # Carried from block to block: loaded where it is used, its 8 bits would decide how the matrix units'
            # operands are laid out, and the queries be held in two layouts.
            start = edge_block(block + BLOCK_N, full_start, full_end)
            mask = load_mask(mask_pointers, start, end, stride_mn, BLOCK_N, True, BIAS)

    # Where no key was visible l is 0: out and entropy are 0 there, lse is -inf.
    inverse = 1.0 / tl.where(l == 0.0, 1.0, l)
    out_pointers = Out + row[:, None] * stride_on
    tl.store(
        out_pointers + e1[None, :],
        (acc1 * inverse[:, None]).to(Out.dtype.element_ty),
        mask=row_valid[:, None] & (e1[None, :] < E),
    )
    if E2:
        tl.store(
            out_pointers + e2[None, :],
            (acc2 * inverse[:, None]).to(Out.dtype.element_ty),
            mask=row_valid[:, None] & (e2[None, :] < E),
        )
    rows = head.to(tl.int64) * Nq + first + row
    if ENTROPY:
        entropy = (tl.math.log2(l) - t * inverse) * LN2
        entropy = tl.where((l == 0.0) | (entropy < 0.0), 0.0, entropy)  # rounding may dip below 0
        tl.store(Entropy + rows, entropy, mask=row_valid)
    if Lse is not None:
        nats = 1.0 if BIAS else scale  # of a unit of m
        tl.store(Lse + rows, m * nats + tl.math.log2(l) * LN2, mask=row_valid)
