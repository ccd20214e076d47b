"""Triton kernels of every kind on the emulated device, against PyTorch."""

import pytest
import torch
import triton
import triton.language as tl
from triton_kernels import add_kernel, matmul, randn


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64]
)
@pytest.mark.parametrize("n", [1, 1000, 4096])
def test_vector_addition(dtype, n):
    x, y = ((10 * randn(n, seed=i)).to(dtype) for i in range(2))
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(X, Out, stride, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + column, mask=column < n, other=float("-inf"))
    p = tl.exp(x - tl.max(x, 0))
    tl.store(Out + row * stride + column, p / tl.sum(p, 0), mask=column < n)


@pytest.mark.parametrize("n", [5, 100, 781])
@pytest.mark.parametrize("num_warps", [1, 4])
def test_softmax(n, num_warps):
    x = randn(9, n)
    out = torch.empty_like(x)
    softmax_kernel[(9,)](x, out, x.stride(0), n, BLOCK=triton.next_power_of_2(n), num_warps=num_warps)
    torch.testing.assert_close(out, x.softmax(1))


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matmul_of_half_precision(dtype, num_stages):
    a, b = randn(70, 96, dtype=dtype), randn(96, 48, dtype=dtype, seed=1)
    torch.testing.assert_close(matmul(a, b, torch.float32, num_stages=num_stages), a.float() @ b.float())


@pytest.mark.parametrize(("precision", "error"), [("ieee", 1e-5), ("tf32x3", 1e-5), ("tf32", 5e-2)])
def test_matmul_of_float32(precision, error):
    a, b = randn(64, 64), randn(64, 64, seed=1)
    off = (matmul(a, b, torch.float32, precision).double() - a.double() @ b.double()).abs().max().item()
    assert off < error
    assert off > 1e-3 or precision != "tf32"


def test_matmul_of_integers():
    a, b = ((50 * randn(64, 64, seed=i)).to(torch.int8) for i in range(2))
    assert torch.equal(matmul(a, b, torch.int32), (a.cpu().int() @ b.cpu().int()).to("cuda"))


def test_tensor_cores_that_truncate(device):
    """Off by some units of the least exact sum, and not equal to it."""
    a, b = randn(64, 64, dtype=torch.float16), randn(64, 64, dtype=torch.float16, seed=1)
    exact = a.double() @ b.double()
    plain = matmul(a, b, torch.float32)
    with device.with_options(tensor_core="truncating"):
        cut = matmul(a, b, torch.float32)
    assert not torch.equal(plain, cut)
    bound = 16 * 2.0**-23 * (a.double().abs() @ b.double().abs())
    assert ((cut.double() - exact).abs() <= bound).all()


@triton.jit
def layer_norm_kernel(X, W, B, Out, stride, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    centred = tl.where(inside, x - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    w, b = tl.load(W + column, mask=inside), tl.load(B + column, mask=inside)
    tl.store(Out + row * stride + column, centred * inverse * w + b, mask=inside)


def test_layer_norm():
    x, w, b = randn(7, 300, dtype=torch.float16), randn(300, seed=1), randn(300, seed=2)
    out = torch.empty(7, 300, device="cuda")
    layer_norm_kernel[(7,)](x, w, b, out, x.stride(0), 300, 1e-5, BLOCK=512)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x.float(), (300,), w, b), atol=1e-5, rtol=1e-5)


@triton.jit
def attention_kernel(Q, K, V, Out, n, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(Q + m[:, None] * D + d[None, :], mask=m[:, None] < n, other=0.0)
    highest, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, n, BN):
        key = start + tl.arange(0, BN)
        k = tl.load(K + key[:, None] * D + d[None, :], mask=key[:, None] < n, other=0.0)
        v = tl.load(V + key[:, None] * D + d[None, :], mask=key[:, None] < n, other=0.0)
        s = tl.where(key[None, :] < n, tl.dot(q, k.T) * scale, float("-inf"))
        now = tl.maximum(highest, tl.max(s, 1))
        p, shrink = tl.exp(s - now[:, None]), tl.exp(highest - now)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        highest = now
    tl.store(Out + m[:, None] * D + d[None, :], acc / total[:, None], mask=m[:, None] < n)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_flash_attention(num_stages):
    q, k, v = (randn(150, 64, dtype=torch.float16, seed=i) for i in range(3))
    out = torch.empty(150, 64, device="cuda")
    attention_kernel[(3,)](q, k, v, out, 150, 0.125, D=64, BM=64, BN=32, num_stages=num_stages)
    exact = (q.double() @ k.double().T * 0.125).softmax(1) @ v.double()
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=0)


@triton.jit
def histogram_kernel(X, Counts, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(Counts + tl.load(X + at, mask=at < n, other=0), 1, mask=at < n)


def test_atomics_of_many_ctas():
    x = (randn(1000) * 3).abs().to(torch.int32)
    counts = torch.zeros(32, dtype=torch.int32, device="cuda")
    histogram_kernel[(8,)](x, counts, 1000, BLOCK=128)
    assert torch.equal(counts.cpu().long(), torch.bincount(x.cpu().long(), minlength=32))


@triton.jit
def scan_and_sort_kernel(X, Sums, Sorted, Best, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.store(Sums + tl.arange(0, BLOCK), tl.cumsum(x, 0))
    tl.store(Sorted + tl.arange(0, BLOCK), tl.sort(x))
    tl.store(Best, tl.argmax(x, 0))


def test_scan_sort_and_argmax():
    x = randn(256)
    sums, ordered, best = torch.empty_like(x), torch.empty_like(x), torch.empty(1, dtype=torch.int32, device="cuda")
    scan_and_sort_kernel[(1,)](x, sums, ordered, best, BLOCK=256)
    torch.testing.assert_close(sums, x.cumsum(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(ordered, x.sort().values)
    assert best.item() == x.argmax().item()


@triton.jit
def functions_kernel(X, Out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=1.0)
    tl.store(Out + at, tl.exp(x) + tl.sin(x) * tl.log(tl.abs(x) + 1) + tl.sqrt(tl.abs(x)) / (x * x + 1), mask=at < n)
    tl.store(Out + n + at, tl.floor(x) + tl.where(x > 0, tl.ceil(x), -x), mask=at < n)


def test_functions():
    x = randn(200)
    out = torch.empty(2, 200, device="cuda")
    functions_kernel[(1,)](x, out, 200, BLOCK=256)
    y = x.double()
    expected = y.exp() + y.sin() * (y.abs() + 1).log() + y.abs().sqrt() / (y * y + 1)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], x.floor() + torch.where(x > 0, x.ceil(), -x))


@triton.jit
def mask_kernel(X, Out, BLOCK: tl.constexpr):
    """Comparisons of packed halves, as floating masks make them."""
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(Out + at, tl.where((x == float("-inf")) | (x > 1), 0.0, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_comparisons_of_half_precision(dtype):
    x = randn(512, dtype=dtype)
    x[::7] = float("-inf")
    out = torch.empty_like(x)
    mask_kernel[(1,)](x, out, BLOCK=512)
    assert torch.equal(out, torch.where((x == float("-inf")) | (x > 1), 0.0, x))


@triton.jit
def integer_kernel(X, Y, Out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(Out + at, x // y)
    tl.store(Out + BLOCK + at, x % y)
    tl.store(Out + 2 * BLOCK + at, (x << 3) ^ (y >> 1))
    tl.store(Out + 3 * BLOCK + at, tl.umulhi(x.to(tl.uint32), y.to(tl.uint32)).to(tl.int32))


def test_integers():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-(2**30), 2**30, (256,), generator=g, dtype=torch.int32) for _ in range(2))
    out = torch.empty(4, 256, dtype=torch.int32, device="cuda")
    integer_kernel[(1,)](x.to("cuda"), y.to("cuda"), out, BLOCK=256)
    out = out.cpu()
    assert torch.equal(out[0], x.div(y, rounding_mode="trunc"))  # as in C
    assert torch.equal(out[1], x.fmod(y))
    assert torch.equal(out[2], (x << 3) ^ (y >> 1))
    high = [((a & 0xFFFFFFFF) * (b & 0xFFFFFFFF) >> 32) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert (out[3].long() & 0xFFFFFFFF).tolist() == high


@triton.jit
def transpose_kernel(X, Out, n: tl.constexpr):
    row, column = tl.arange(0, n)[:, None], tl.arange(0, n)[None, :]
    tl.store(Out + row * n + column, tl.load(X + row * n + column).T)


def test_layouts_are_converted_through_shared_memory():
    x = randn(64, 64)
    out = torch.empty_like(x)
    transpose_kernel[(1,)](x, out, 64)
    assert torch.equal(out, x.T)
