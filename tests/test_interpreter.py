"""The patches of Triton's interpreter."""

import numpy as np
import pytest
import torch
from interpreter import from_bfloat16, repaired, to_bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles the kernels")
triton = pytest.importorskip("triton")
tl = triton.language

NUMBERS = torch.cat(
    [
        torch.randn(1000, generator=torch.Generator().manual_seed(0)).exp() * 1e3,
        -torch.rand(1000, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, 3.4e38, 1e-40, np.inf, -np.inf, np.nan]),
    ]
)


@triton.jit
def cast_and_multiply(X, Whole, Out, Narrow, Product, N: tl.constexpr):
    index = tl.arange(0, N)
    x = tl.load(X + index)
    tl.store(Out + index, x.to(tl.bfloat16))
    tl.store(Narrow + index, x.to(tl.bfloat16).to(tl.float16))
    tl.store(Whole + index, index.to(tl.bfloat16))
    square = tl.load(X + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.bfloat16)
    tl.store(Product + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(square, square))


@triton.jit
def fused(X, Y, Z, Out, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(Out + index, tl.fma(tl.load(X + index), tl.load(Y + index), tl.load(Z + index)))


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(X, Out, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    one, two = tl.reduce((x, x * 2), 1, add_two)
    tl.store(Out + tl.arange(0, M), one + two)


def test_bit_patterns():
    bits = to_bfloat16(NUMBERS.numpy())
    expected = NUMBERS.bfloat16()
    assert (torch.from_numpy(from_bfloat16(bits)).isnan() == NUMBERS.isnan()).all()
    finite = ~NUMBERS.isnan()
    assert torch.equal(torch.from_numpy(from_bfloat16(bits))[finite], expected.float()[finite])


@pytest.mark.parametrize("twice", [False, True])
def test_bfloat16(twice):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    whole, out = torch.empty(2, 256, dtype=torch.bfloat16)
    narrow, product = torch.empty(256, dtype=torch.float16), torch.empty(16, 16)
    with repaired():
        if twice:
            with repaired():
                pass
        cast_and_multiply[(1,)](x, whole, out, narrow, product, N=256)
    assert torch.equal(out, x.bfloat16())
    assert torch.equal(narrow, x.bfloat16().half())
    assert torch.equal(whole, torch.arange(256).bfloat16())
    square = x.view(16, 16).bfloat16().double()
    torch.testing.assert_close(product.double(), square @ square, atol=1e-5, rtol=0)


def test_fma_rounds_once():
    x = torch.full((16,), 1 + 2**-12)
    out = torch.empty(16)
    with repaired():
        fused[(1,)](x, x, -x * x, out, N=16)
    assert torch.equal(out, torch.full((16,), 2.0**-24))


def test_reductions_of_ones_own():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    out = torch.empty(8)
    with repaired():
        sums[(1,)](x, out, M=8, N=64)
    torch.testing.assert_close(out, 3 * x.sum(1), atol=1e-4, rtol=0)
