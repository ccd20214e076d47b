"""Kernels like those that the published figures were measured with: their arithmetic and their tiles, in our words.

    python benchmarks/model/anchor_kernels.py build/anchors

compiles every tile for sm_80 with the Triton that is installed. It needs nothing but Triton, 3.1 or newer, and no GPU.

The attention is that of Triton's tutorial on fused attention, forward and without a mask: softmax in base 2, the scale
multiplied with the maximum. The tutorial addressed memory by block pointers up to Triton 3.2, and by tensor descriptors
since. The matrix product is that of the tutorial on matrix multiplication: tiles in groups of 8 rows, loads masked
along K. Both tutorials take the fastest of a list of tiles.
"""

import argparse
import itertools
import json
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_block_pointers(
    Q, K, V, Out, scale, stride_b, stride_h, stride_n, H, N,
    M: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    start = (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h
    queries = tl.make_block_ptr(Q + start, (N, D), (stride_n, 1), (tile * M, 0), (M, D), (1, 0))
    keys = tl.make_block_ptr(K + start, (D, N), (1, stride_n), (0, 0), (D, BLOCK), (0, 1))
    values = tl.make_block_ptr(V + start, (N, D), (stride_n, 1), (0, 0), (BLOCK, D), (1, 0))
    out = tl.make_block_ptr(Out + start, (N, D), (stride_n, 1), (tile * M, 0), (M, D), (1, 0))
    unit = scale * LOG2E
    q = tl.load(queries)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.full([M], 1.0, tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for _ in range(0, N, BLOCK):
        s = tl.dot(q, tl.load(keys))
        top = tl.maximum(m, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - top[:, None])
        total = tl.sum(p, 1)
        shrink = tl.math.exp2(m - top)
        l = l * shrink + total
        acc = tl.dot(p.to(tl.float16), tl.load(values), acc * shrink[:, None])
        m = top
        keys = tl.advance(keys, (0, BLOCK))
        values = tl.advance(values, (BLOCK, 0))
    tl.store(out, (acc / l[:, None]).to(tl.float16))


@triton.jit
def attention_descriptors(
    Q, K, V, Out, scale, B, H, N, M: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    rows = B * H * N
    queries = tl.make_tensor_descriptor(Q, [rows, D], [D, 1], [M, D])
    keys = tl.make_tensor_descriptor(K, [rows, D], [D, 1], [BLOCK, D])
    values = tl.make_tensor_descriptor(V, [rows, D], [D, 1], [BLOCK, D])
    out = tl.make_tensor_descriptor(Out, [rows, D], [D, 1], [M, D])
    first = tl.program_id(1) * N
    row = first
    unit = scale * LOG2E
    q = queries.load([first + tile * M, 0])
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.full([M], 1.0, tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for _ in tl.range(0, N, BLOCK):
        s = tl.dot(q, keys.load([row, 0]).T)
        top = tl.maximum(m, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - top[:, None])
        shrink = tl.math.exp2(m - top)
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(tl.float16), values.load([row, 0]), acc * shrink[:, None])
        l = l * shrink + total
        m = top
        row += BLOCK
    out.store([first + tile * M, 0], (acc / l[:, None]).to(tl.float16))


@triton.jit
def matmul(
    A, B, C, rows, columns, depth, stride_a, stride_b, stride_c,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(rows, M)
    tiles_n = tl.cdiv(columns, N)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    tile_m = first + place % height
    tile_n = place // height
    row = tile_m * M + tl.arange(0, M)
    column = tile_n * N + tl.arange(0, N)
    k = tl.arange(0, BLOCK)
    a = A + (row % rows)[:, None] * stride_a + k[None, :]
    b = B + k[:, None] * stride_b + (column % columns)[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for block in range(0, tl.cdiv(depth, BLOCK)):
        left = depth - block * BLOCK
        acc = tl.dot(tl.load(a, mask=k[None, :] < left, other=0.0), tl.load(b, mask=k[:, None] < left, other=0.0), acc)
        a += BLOCK
        b += BLOCK * stride_b
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(C + row[:, None] * stride_c + column[None, :], acc.to(tl.float16), mask=inside)


VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
DESCRIPTORS = VERSION >= (3, 3)
MULTIPLES = {"N", "rows", "columns", "depth"}  # of 16
# (rows, columns, depth, stages, warps) of the tutorial
MATMUL_TILES = [
    (128, 256, 64, 3, 8), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (128, 32, 32, 4, 4), (64, 32, 32, 5, 2), (32, 64, 32, 5, 2), (128, 256, 128, 3, 8), (256, 128, 128, 3, 8),
    (256, 64, 128, 4, 4), (64, 256, 128, 4, 4), (128, 128, 128, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (128, 32, 64, 4, 4),
]  # fmt: skip


def attention_tiles(head_dim):
    """(queries, keys, stages, warps) of the tutorial."""
    if DESCRIPTORS:
        tiles = itertools.product((64, 128), (32, 64, 128), (2, 3, 4), (4, 8))
        return [tile for tile in tiles if tile[1] <= head_dim]
    return list(itertools.product((64, 128), (32, 64), (3, 4, 7), (4,)))  # it drops 8 warps for tiles as small as these


def compile_kernel(kernel, constants, stages, warps):
    """The compiled kernel for float16 tensors aligned to 16 bytes and sizes that are multiples of 16."""
    names = kernel.arg_names
    tensors = {"Q", "K", "V", "Out"} if kernel is not matmul else {"A", "B", "C"}
    types = {n: "*fp16" if n in tensors else "fp32" if n == "scale" else "i32" for n in names if n not in constants}
    aligned = [
        i
        for i, n in enumerate(names)
        if types.get(n) == "*fp16" or n.startswith("stride") or n in MULTIPLES - set(constants)
    ]
    if VERSION >= (3, 3):
        signature = {n: types.get(n, "constexpr") for n in names}
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    else:
        from triton.compiler.compiler import AttrsDescriptor

        signature = {names.index(n): t for n, t in types.items()}
        values = {names.index(n): value for n, value in constants.items()}
        source = ASTSource(kernel, signature, values, AttrsDescriptor(divisible_by_16=aligned, equal_to_1=[]))
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)


def jobs():
    """(name, kernel, constants, stages, warps, useful operations of a program in one pass of its loop)"""
    for head_dim in (64, 128):
        for queries, keys, stages, warps in attention_tiles(head_dim):
            kernel = attention_descriptors if DESCRIPTORS else attention_block_pointers
            name = f"attention_{head_dim}_{queries}x{keys}_{warps}warps_{stages}stages"
            constants = {"M": queries, "BLOCK": keys, "D": head_dim}
            yield name, kernel, constants, stages, warps, 4 * queries * keys * head_dim
    for rows, columns, depth, stages, warps in MATMUL_TILES:
        constants = {"M": rows, "N": columns, "BLOCK": depth, "GROUP": 8}
        name = f"matmul_{rows}x{columns}x{depth}_{warps}warps_{stages}stages"
        yield name, matmul, constants, stages, warps, 2 * rows * columns * depth


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where NAME.cubin and NAME.json go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, kernel, constants, stages, warps, flops in jobs():
        if (folder / f"{name}.json").exists():
            continue
        try:
            compiled = compile_kernel(kernel, constants, stages, warps)
        except Exception as error:  # whatever the compiler raises; the tutorial passes over such a tile too
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        about = {"triton": triton.__version__, "warps": warps, "shared": compiled.metadata.shared, "flops": flops}
        (folder / f"{name}.cubin").write_bytes(compiled.asm["cubin"])
        (folder / f"{name}.json").write_text(json.dumps(about))
        print(name, flush=True)


if __name__ == "__main__":
    main()
