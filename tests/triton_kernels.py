"""Triton kernels that several files of tests/emulated share."""

import torch
import triton
import triton.language as tl


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to("cuda")


@triton.jit
def add_kernel(X, Y, Out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(Out + at, tl.load(X + at, mask=inside) + tl.load(Y + at, mask=inside), mask=inside)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, stride_am, stride_bk, stride_cm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.int32 if A.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(A + m[:, None] * stride_am + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0)
        b = tl.load(B + k[:, None] * stride_bk + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    at = C + m[:, None] * stride_cm + n[None, :]
    tl.store(at, total.to(C.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def matmul(a, b, out_dtype, precision="ieee", num_stages=3, num_warps=4):
    M, K, N = *a.shape, b.shape[1]
    c = torch.empty(M, N, dtype=out_dtype, device="cuda")
    matmul_kernel[(triton.cdiv(M, 32), triton.cdiv(N, 32))](
        a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0), BM=32, BN=32, BK=32, PRECISION=precision,
        num_stages=num_stages, num_warps=num_warps,
    )  # fmt: skip
    return c
