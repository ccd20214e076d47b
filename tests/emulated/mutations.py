"""The mutants: what is changed in the sources of the kernel and of its launch, or in the PTX that comes of them."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which the file has exactly once, becomes `new`. Of the PTX `old` is a pattern, and its `place`-th match
    becomes `new`. `first`: a call that is likely to see it, and so is made before the others. `unseen`: why no call on
    the emulated device can tell it from the original. `equivalent`: no call on any device can, for it changes no
    result."""

    name: str
    file: str
    old: str
    new: str
    place: int = 0
    first: str = ""
    unseen: str = ""
    equivalent: bool = False


KERNEL, PACKED, SCALE, MASKS, ROWS, SOFTMAX, CONFIG = (
    f"kernels/{name}.py" for name in ("attention", "varlen", "scale", "masks", "rows", "softmax", "config")
)
LAUNCH, PTX = "entropy_attn/backends/triton.py", "PTX"

SOURCE = [
    # Offsets in 32 bits
    Mutation(
        "batch and heads in int32", KERNEL,
        "    batch = (batch_head // H).to(tl.int64)\n    head = batch_head % H\n"
        "    key_head = (head // (H // Hkv)).to(tl.int64)\n    head = head.to(tl.int64)\n",
        "    batch = batch_head // H\n    head = batch_head % H\n    key_head = head // (H // Hkv)\n",
        first="heads and samples past 32 bits",
    ),
    Mutation(
        "batch in int32", KERNEL, "batch = (batch_head // H).to(tl.int64)", "batch = batch_head // H",
        unseen="What it is added to has 64 bits. It takes strides of 2^33 elements, an allocation of 32 GiB, to "
        "overflow in the product, and the calls reserve 13 GiB at most.",
    ),
    Mutation(
        "first query in int32", KERNEL, "tile.to(tl.int64) * M, Nq, C)", "tile * M, Nq, C)", first="masks past 32 bits",
    ),
    Mutation(
        "offsets of rows in uint32", ROWS, "tl.int64 if C.large_offsets else tl.uint32", "tl.uint32",
        first="rows past 32 bits",
    ),
    Mutation(
        "offsets of the mask in uint32", MASKS, "tl.int64 if C.large_offsets else tl.uint32", "tl.uint32",
        first="masks past 32 bits",
    ),
    Mutation(
        "offset of the scale in int32", KERNEL, "query_index.to(tl.int64) * stride_sn", "query_index * stride_sn",
        first="scales past 32 bits",
    ),
    Mutation(
        "row of entropy and LSE in int32", KERNEL, "row = batch_head.to(tl.int64) * Nq", "row = batch_head * Nq",
        unseen="It takes B H Nq >= 2^31 rows, which are 8 GiB of entropy and more than 10^7 programs. That is hours of "
        "emulation.",
    ),
    Mutation("limit of large offsets too high", LAUNCH, ">= 2**31", ">= 2**40", first="rows past 32 bits"),
    Mutation(
        "rows of value left out of the largest stride", LAUNCH, "key[2], value[2], out[2]", "key[2], out[2]",
        first="rows past 32 bits",
    ),
    Mutation(
        "mask left out of the largest stride", LAUNCH, "out[2], mask[2], mask[3])", "out[2])",
        first="masks past 32 bits",
    ),
    # Bounds and masks of loads and stores
    Mutation("one query too many", KERNEL, "inside = query_index < Nq", "inside = query_index <= Nq"),
    Mutation("one key too many", KERNEL, "inside = key_index < keys.end", "inside = key_index <= keys.end"),
    Mutation(
        "load of edge rows without a mask", ROWS, "tl.load(pointers, mask=inside[:, None], other=0.0)",
        "tl.load(pointers)",
    ),
    Mutation(
        "edge rows undefined instead of 0", ROWS, "tl.load(pointers, mask=inside[:, None], other=0.0)",
        "tl.load(pointers, mask=inside[:, None])",
        equivalent=True,
        unseen="Triton 3.7 writes 0 to the registers of every masked load: the rows are 0 all the same.",
    ),
    Mutation(
        "load of padded columns without a mask", ROWS, "(inside[:, None] & (column < DIM)) if CHECK",
        "(inside[:, None] & (column >= 0)) if CHECK", first="float16 head dim 40",
    ),
    Mutation(
        "load of padded columns in the main loop", ROWS, "if CHECK else column < DIM", "if CHECK else column >= 0",
        first="float16 head dim 40",
    ),
    Mutation(
        "store of padded columns", ROWS, "mask=inside[:, None] & (column < DIM))", "mask=inside[:, None])",
        first="float16 head dim 40",
    ),
    Mutation("store of rows past the end", ROWS, "mask=inside[:, None] & (column < DIM))", "mask=column < DIM)"),
    Mutation(
        "store of entropy without a mask", KERNEL, "tl.store(head.entropy + row, entropy, mask=inside)",
        "tl.store(head.entropy + row, entropy)",
    ),
    Mutation(
        "load of scales without a mask", KERNEL, "tl.load(scale, mask=query_index < Nq, other=1.0)", "tl.load(scale)",
        first="scale per query",
    ),
    Mutation(
        "load of a mask without a mask", MASKS,
        'tl.load(pointers, mask=inside, other=float("-inf") if FLOATING else 0)', "tl.load(pointers)",
        first="boolean mask per query",
    ),
    Mutation(
        "a mask's edge keys are visible", MASKS, 'other=float("-inf") if FLOATING else 0)', "other=0)",
        first="floating mask per query",
    ),
    Mutation(
        "rows of the mask past the end", MASKS,
        "query = tl.minimum(tl.arange(0, C.tile.block_m), Nq - 1 - first).to(INDEX)",
        "query = tl.arange(0, C.tile.block_m).to(INDEX)", first="boolean mask per query",
    ),
    Mutation("one key too many in the scan", MASKS, "key < Nk, C, True)", "key <= Nk, C, True)", first="key padding"),
    # Which keys are seen
    Mutation("edge keys not hidden", MASKS, 's += tl.where(inside, 0.0, float("-inf"))[None, :]', "s += 0.0"),
    Mutation(
        "causal: a query does not see itself", MASKS, "key_index[None, :] <= query", "key_index[None, :] < query",
        first="is causal",
    ),
    Mutation(
        "causal: keys past the end", MASKS, "inside[None, :] & (key_index", "(key_index",
        first="causal with fewer keys",
    ),
    Mutation(
        "causal: the diagonal in the main loop", MASKS, "tile * C.tile.block_m + 1)", "(tile + 1) * C.tile.block_m)",
        first="is causal",
    ),
    Mutation(
        "causal: the end one tile short", MASKS, "(tile + 1) * C.tile.block_m)", "tile * C.tile.block_m)",
        first="is causal",
    ),
    Mutation(
        "edge loop one block short", KERNEL, "tl.range(visible.begin, visible.end - full_keys, N",
        "tl.range(visible.begin, visible.end - full_keys - N, N",
    ),
    Mutation(
        "edge loop one key short", KERNEL, "tl.range(visible.begin, visible.end - full_keys, N",
        "tl.range(visible.begin, visible.end - full_keys - 1, N", first="float16 head dim 40",
    ),
    Mutation(
        "edge loop begins again at 0", KERNEL, "block >= visible.full_begin, full",
        "block > visible.full_begin, full",
    ),
    Mutation(
        "main loop one block too long", MASKS, "full_end = full_end // N * N", "full_end = tl.cdiv(full_end, N) * N",
    ),
    Mutation(
        "keys of the main loop not skipped", KERNEL, "rows.skip(head.key, visible.full_begin)",
        "rows.skip(head.key, 0)",
        first="key padding",
    ),
    Mutation(
        "begin rounded up", MASKS, "begin = begin // N * N", "begin = tl.cdiv(begin, N) * N", first="key padding",
    ),
    Mutation(
        "full_begin rounded down", MASKS, "full_begin = tl.cdiv(full_begin, N) * N",
        "full_begin = full_begin // N * N", first="key padding",
    ),
    Mutation(
        "holes of a padding mask not seen", MASKS, "== full_end - full_begin, full_end, full_begin)",
        "> 0, full_end, full_begin)", first="key padding",
    ),
    Mutation(
        "last visible key lost", MASKS, "tl.where(seen, key + 1, last_seen)", "tl.where(seen, key, last_seen)",
        first="key padding",
    ),
    Mutation(
        "first visible key of the last chunk only", MASKS, "tl.where(seen, tl.minimum(first_seen, key), first_seen)",
        "tl.where(seen, key, first_seen)", first="key padding of 1100 keys",
    ),
    Mutation(
        "values of hidden keys are read", KERNEL, 'seen = (tl.max(bias, 0) != float("-inf")) if MASKED else inside',
        "seen = inside", first="key padding",
    ),
    Mutation(
        "a hidden key's score is added to -inf", MASKS,
        's = tl.where(bias == float("-inf"), float("-inf"), s + bias)', "s = s + bias", first="floating mask of keys",
    ),
    Mutation(
        "rows of the mask of the first tile", MASKS, "        base += first * query_stride * C.mask_unit\n", "",
        first="boolean mask per query",
    ),
    Mutation(
        "stride of the mask in wrong units", MASKS, "(tl.cast(query_stride, INDEX) * C.mask_unit)",
        "tl.cast(query_stride, INDEX)", first="floating mask per query",
    ),
    # Strides and heads
    Mutation(
        "strides of key swapped", KERNEL, "K + (batch * stride_kb + key_head * stride_kh)",
        "K + (batch * stride_kh + key_head * stride_kb)", first="other strides of the same shapes",
    ),
    Mutation(
        "row stride of value is that of key", KERNEL, "C.row_unit, stride_vn, N, C)", "C.row_unit, stride_kn, N, C)",
        first="other strides of the same shapes",
    ),
    Mutation(
        "row stride of out is that of query", KERNEL, "C.row_unit, stride_on, M, C)", "C.row_unit, stride_qn, M, C)",
        first="other strides of the same shapes",
    ),
    Mutation("heads of keys interleaved", KERNEL, "(head // (H // Hkv))", "(head % Hkv)", first="grouped queries"),
    Mutation(
        "key and value swapped in the strides", LAUNCH, "*key[:3], *value[:3], *out[:3]",
        "*value[:3], *key[:3], *out[:3]", first="other strides of the same shapes",
    ),
    Mutation(
        "strides of the scale backwards", LAUNCH, "# (B, H, Nq)\n        return scale, scale.stride()",
        "# (B, H, Nq)\n        return scale, scale.stride()[::-1]",
        first="scale per query",
    ),
    Mutation("axes of size 1 keep their stride", LAUNCH, "0 if n == 1 else s for n", "s for n", first="key padding"),
    Mutation(
        "mask broadcast from the left", LAUNCH, "((0,) * 4 + mask)[-4:]", "(mask + (0,) * 4)[:4]",
        first="boolean mask per query",
    ),
    Mutation(
        "last axis taken for contiguous", LAUNCH,
        "lse\n    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for",
        "lse\n    query, key, value = (x for", first="other strides of the same shapes",
    ),
    Mutation("number of key heads", LAUNCH, "H, key.shape[1], Nq,", "H, H, Nq,", first="grouped queries"),
    Mutation("Nq and Nk swapped", LAUNCH, "Nq, key.shape[2],", "key.shape[2], Nq,"),
    Mutation("grid one tile short", LAUNCH, "-(-Nq // config.tile.block_m)", "max(1, Nq // config.tile.block_m)"),
    # Hints of alignment, and keys of specialisation
    Mutation(
        "loads said to be aligned to 16 bytes", ROWS, "pointers = first + (rows.offsets + column)",
        "pointers = tl.multiple_of(first + (rows.offsets + column), (16, 16))", first="rows of other alignments",
    ),
    Mutation(
        "stores said to be aligned to 16 bytes", ROWS, "tl.store(first + (rows.offsets + column), values",
        "tl.store(tl.multiple_of(first + (rows.offsets + column), (16, 16)), values", first="rows of other alignments",
        equivalent=True, unseen="It is true: the library allocates out, and its rows have a multiple of 8 elements.",
    ),
    Mutation(
        "row unit of 8 for multiples of 4", LAUNCH, "& 7 else 8", "& 3 else 8", first="rows of other alignments",
    ),
    Mutation(
        "mask unit of 16 for multiples of 8", LAUNCH, "& 15 else 16", "& 7 else 16", first="boolean mask per query",
    ),
    Mutation(
        "row unit not in the key of the kernel", CONFIG, "    row_unit: int\n    mask",
        '    row_unit: int = __import__("dataclasses").field(repr=False)\n    mask', first="rows of other alignments",
    ),
    Mutation(
        "causality not in the key of the kernel", CONFIG, "    is_causal: bool\n",
        '    is_causal: bool = __import__("dataclasses").field(repr=False)\n', first="is causal",
    ),
    Mutation(
        "large offsets not in the key of the kernel", CONFIG, "    large_offsets: bool\n",
        '    large_offsets: bool = __import__("dataclasses").field(repr=False)\n', first="rows past 32 bits",
    ),
    Mutation(
        "strides cached by shape", LAUNCH, "@functools.lru_cache(maxsize=4096)\ndef _strides(",
        "@lambda f, cache={}: lambda shapes, strides: cache.setdefault(shapes, f(shapes, strides))\ndef _strides(",
        first="other strides of the same shapes",
    ),
    Mutation(
        "a mask per query taken for a shared one", LAUNCH, "mask_per_query=mask[2] != 0", "mask_per_query=False",
        first="boolean mask per query",
    ),
    Mutation(
        "a scale per query taken for one per head", LAUNCH, '"per_query" if scale.dim() == 3 and scale.stride(2) else',
        '"per_head" if scale.dim() == 3 and scale.stride(2) else', first="scale per query",
    ),
    Mutation(
        "entropy only with LSE", LAUNCH, "entropy=entropy is not None", "entropy=lse is not None", first="is causal",
    ),
    Mutation("causality dropped", LAUNCH, "is_causal=is_causal", "is_causal=False", first="is causal"),
    Mutation(
        "launch on the current device", LAUNCH, "with _on(query.device):\n        attention_forward[",
        "with _HERE:\n        attention_forward[",
        unseen="The emulator has one device.",
    ),
    # Packed sequences
    Mutation(
        "a sequence begins before the first row", PACKED, "tl.minimum(tl.maximum(begin, 0), total)",
        "tl.minimum(begin, total)", first="malformed ends of packed sequences",
    ),
    Mutation(
        "a sequence ends past the last row", PACKED, "tl.minimum(tl.maximum(end, begin), total)",
        "tl.maximum(end, begin)", first="malformed ends of packed sequences",
    ),
    Mutation(
        "a sequence is longer than max_seqlen", PACKED, "tl.minimum(end - begin, longest)", "(end - begin)",
        first="malformed ends of packed sequences",
    ),
    Mutation(
        "keys of the first sequence", PACKED, "bounds(Cu_seqlens_k, sequence,", "bounds(Cu_seqlens_k, 0,",
        first="packed sequences",
    ),
    Mutation(
        "the longest sequence decides the scale", PACKED, "token_scale(Nk, Scale[0],",
        "token_scale(max_seqlen_k, Scale[0],", first="packed sequences",
    ),
    Mutation(
        "T of the first sequence", PACKED, "tl.load(Scale[0] + sequence),", "tl.load(Scale[0]),",
        first="packed sequences",
    ),
    Mutation(
        "no scale below H_T", SCALE, "tl.where(above < 0.0, 0.0, above)", "above", first="packed sequences",
    ),
    Mutation(
        "entropy and LSE of the first sequence's rows", PACKED, "head * total_q + begin_q",
        "head * total_q", first="packed sequences",
    ),
    Mutation(
        "programs beyond their sequence go on", PACKED, "Nk = tl.where(tile * M < Nq, Nk, 0)", "Nk = Nk",
        equivalent=True, unseen="Every load and store of such a program is masked. It takes time and does nothing.",
    ),
    Mutation(
        "first key of a sequence in int32", PACKED, "begin_k = begin_k.to(tl.int64)", "begin_k = begin_k",
        first="packed rows past 32 bits",
    ),
    # Arithmetic
    Mutation(
        "N of the first sample", KERNEL, "tl.load(Scale[0] + batch * stride_sb)", "tl.load(Scale[0])",
        first="num tokens",
    ),
    Mutation(
        "stride of num_tokens", LAUNCH, "(num_tokens.stride(0), 0, 0)", "(1, 0, 0)", first="num tokens",
    ),
    Mutation(
        "sign of the scale", KERNEL, "tl.where(head.scale < 0, -1.0, 1.0)", "tl.where(head.scale < 0, 1.0, 1.0)",
        first="scale per head",
    ),
    Mutation(
        "scale of 0", KERNEL, "tl.where(head.scale == 0.0, SMALLEST, tl.abs(head.scale))", "tl.abs(head.scale)",
        first="scale per head",
    ),
    Mutation(
        "unit of the scale with a mask", KERNEL, 'if C.mask != "floating":\n        scale',
        'if C.mask == "none":\n        scale', first="boolean mask per query",
    ),
    Mutation("running sum not rescaled", SOFTMAX, "l = state.l * a + tl.sum(p, 1)", "l = state.l + tl.sum(p, 1)"),
    Mutation("output not rescaled", SOFTMAX, "state.acc[i] * a[:, None]", "state.acc[i] * 1.0"),
    Mutation(
        "entropy not centred again", SOFTMAX, "tl.fma(tl.fma(state.l, d, t), a, tl.sum(px, 1))",
        "tl.fma(t, a, tl.sum(px, 1))",
    ),
    Mutation("0 * -inf in the entropy", SOFTMAX, "            x = tl.maximum(x, -1000.0)", "            x = x + 0.0"),
    Mutation(
        "0 * -inf in the rescaling", SOFTMAX, "d = tl.maximum(d, -1000.0)", "d = d + 0.0",
        first="large logits with a floating mask",
    ),
    Mutation(
        "rows that saw no key", SOFTMAX, "1.0 / tl.where(state.l == 0.0, 1.0, state.l)", "1.0 / state.l",
        first="boolean mask per query",
    ),
    Mutation(
        "unit of the LSE with a floating mask", SOFTMAX, 'nats = 1.0 if C.mask == "floating" else LN2', "nats = LN2",
        first="floating mask per query",
    ),
    Mutation(
        "large logits left to the main loop", KERNEL, "full_keys = tl.where(again, 0, ",
        "full_keys = tl.where(again, visible.full_end - visible.full_begin, ", first="large logits",
    ),
    Mutation(
        "beginning again at the old maximum", SOFTMAX, "m = tl.where(again, -LARGEST, state.m)", "m = state.m",
        first="large logits",
    ),
    Mutation(
        "maximum of large logits rounded up", SOFTMAX, "m - tl.abs(m) * EPSILON, m)", "m, m)",
        first="large logits that are equal",
    ),
    Mutation("float32 as TF32", CONFIG, '("tf32" if tf32 else "tf32x3")', '"tf32"', first="float32"),
    Mutation(
        "second piece too narrow", CONFIG, "rest = max(16, 1 << (head_dim - first - 1).bit_length())", "rest = 16",
        first="other head dim of value",
    ),
]  # fmt: skip

# Of the kernel for float16 and head dim 64, with entropy and LSE. The main loop has one wait and two barriers.
INSTRUCTIONS = [
    Mutation("wait of the main loop", PTX, r"cp\.async\.wait_group[^;]*;", "", 0),
    Mutation("wait of the main loop for all but one", PTX, r"(?<=cp\.async\.wait_group)\s+0", " 1", 0),
    Mutation("commit of the last copies", PTX, r"cp\.async\.commit_group;", "", -1),
    Mutation("barrier after the wait", PTX, r"bar\.sync[^;]*;", "", 0),
    Mutation("barrier before the next copies", PTX, r"bar\.sync[^;]*;", "", 1),
    Mutation("barrier of the edge loop", PTX, r"bar\.sync[^;]*;", "", 6),
    Mutation("barrier of the epilogue", PTX, r"bar\.sync[^;]*;", "", -4),
    Mutation("mask of the last store", PTX, r"@%p\d+ (?=st\.global\.v4)", "", -1),
    Mutation("a transposed load of values", PTX, r"(?<=ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", "", 0),
    Mutation("a reduction over the wrong lanes", PTX, "(?<=, )1(?=, 31, -1;)", "4", 0),
    Mutation("mask of a copy", PTX, r"(?<=, 0x10), %r\d+", "", -1),
]  # fmt: skip

MUTATIONS = SOURCE + INSTRUCTIONS
