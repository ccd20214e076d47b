"""Under torch.autocast, `attention` casts its inputs as SDPA does, for every set of outputs and every kind of call."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from entropy_attn import attention, explain

LOW = [torch.bfloat16, torch.float16]
EVERYTHING = {"return_entropy": True, "return_lse": True}
OPTIONS = {
    "plain": {},
    "entropy": {"return_entropy": True},
    "everything": EVERYTHING,
    "tensor scale": {"scale": torch.tensor([0.3, 0.4])},
    "train": {"train_tokens": 64},
    "causal": {"is_causal": True},
}


def qkv(dtype=torch.float32, N=33):
    return [torch.randn(2, 2, N, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]


def out_of(result):
    return result if isinstance(result, torch.Tensor) else result.out


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("low", LOW)
def test_the_same_as_of_cast_inputs(options, low, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("CPU tensors reach the kernel only in the interpreter")
    inputs = qkv()
    expected = attention(*(x.to(low) for x in inputs), **options, backend=backend)
    with torch.autocast("cpu", low):
        result = attention(*inputs, **options, backend=backend)
        assert out_of(result).dtype == low
        assert F.scaled_dot_product_attention(*inputs).dtype == low
    if isinstance(result, torch.Tensor):
        result, expected = (result,), (expected,)
    for got, wanted in zip(result, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("which", range(3))
def test_mixed_inputs(which, options):
    inputs = qkv()
    expected = attention(*(x.bfloat16() for x in inputs), **options)
    inputs[which] = inputs[which].bfloat16()
    with pytest.raises(ValueError, match="must have the dtype of query"):
        attention(*inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out_of(attention(*inputs, **options)), out_of(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_masks(dtype, options):
    """SDPA casts a floating-point mask too."""
    mask = torch.randn(33, 33, generator=torch.Generator().manual_seed(9))
    mask = mask > 0 if dtype == torch.bool else mask.to(dtype)
    inputs = qkv()
    cast = mask if dtype == torch.bool else mask.bfloat16()
    expected = attention(*(x.bfloat16() for x in inputs), cast, **options)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out_of(attention(*inputs, mask, **options)), out_of(expected))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_float64_is_left(options):
    inputs = qkv(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(*inputs, **options)
    assert out_of(result).dtype == torch.float64
    torch.testing.assert_close(out_of(result), out_of(attention(*inputs, **options)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled(options):
    def layer(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs, **options)

    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (33, 40):
        torch.testing.assert_close(out_of(fast(*qkv(N=N))), out_of(layer(*qkv(N=N))))


@contextlib.contextmanager
def autocast_of_a_gpu(low):
    """Like torch.autocast("cuda"), which disables itself without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", low)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_on_a_gpu_by_its_dispatch_keys(options, low):
    """Fake CUDA tensors have the dispatch keys of real ones, and take the same path up to the kernel."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty(2, 2, 33, 16, device="cuda") for _ in range(3)]
        with autocast_of_a_gpu(low):
            result = attention(*inputs, **options)
            # Autocast for CUDA does not cast CPU tensors.
            assert out_of(attention(*(torch.empty(2, 2, 33, 16) for _ in range(3)))).dtype == torch.float32
        assert out_of(result).dtype == low
        assert out_of(result).device.type == "cuda"
        if options:
            assert result.entropy.dtype == result.lse.dtype == torch.float32
        with torch.autocast("cpu", low):
            assert out_of(attention(*inputs, **options)).dtype == torch.float32


def test_explain_says_what_runs():
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(*qkv(), backend="cpu").backend == "cpu"
    mixed = [*qkv()[:2], qkv()[2].bfloat16()]
    with pytest.raises(ValueError, match="value must have the dtype of query"):
        explain(*mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(*mixed).backend == "cpu"
