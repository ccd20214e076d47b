"""The CPU backend: the calls that it passes to PyTorch's SDPA, its own computation and its threads."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from support import normal

from entropy_attn import attention
from entropy_attn.backends import cpu

EVERYTHING = {"return_entropy": True, "return_lse": True}


def qkv(Nq=70, Nk=90, D=16, H=2):
    return normal(1, H, Nq, D, seed=1), normal(1, H, Nk, D, seed=2), normal(1, H, Nk, D, seed=3)


def check(*tensors, **options):
    """Compare the output, without and with statistics, with float64. Returns the result with statistics."""
    truth = attention(*(x.double() for x in tensors[:3]), *tensors[3:], **options, backend="reference")
    plain = attention(*tensors, **options)
    full = attention(*tensors, **options, **EVERYTHING)
    for out in (plain, full.out):
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    return full


@pytest.mark.parametrize("head_dim", [1, 2, 4, 8, 16, 17])
@pytest.mark.parametrize("offset", [0.0, 3.0, 40.0, -40.0])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_small_heads(head_dim, offset, layout):
    shape = (2, 3, 70, head_dim) if layout == "bhnd" else (2, 70, 3, head_dim)
    query, key, value = (normal(*shape, seed=i) for i in range(3))
    query[..., 0] = 1.0
    key[..., 0] += offset / 0.3
    options = {"scale": 0.3, "layout": layout}
    ours = check(query, key, value, **options)
    truth = attention(query.double(), key.double(), value.double(), backend="reference", **options, **EVERYTHING)
    # The rounding of the float32 scores grows with the offset, so the entropy has a larger tolerance.
    torch.testing.assert_close(ours.entropy, truth.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.lse, truth.lse, atol=1e-5, rtol=1e-6)
    assert (ours.entropy >= 0).all()


@pytest.mark.parametrize("head_dim", [2, 8, 40])
def test_heads_fastest_in_memory(head_dim):
    """The last axis is not contiguous. PyTorch's kernels may read it as if it were."""
    query, key, value = (normal(1, n, head_dim, 3, seed=n).permute(0, 3, 1, 2) for n in (70, 90, 91))
    check(query, key, value[:, :, 1:])


def test_values_of_one_give_one():
    query = normal(1, 5, 8, 2).permute(0, 3, 1, 2)
    ones = torch.ones(1, 2, 5, 8)
    out = attention(query, ones, ones, return_lse=True).out
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("strides", [(1, 1, 0, 1), (1, 1, 1, 1), (5, 5, 3, 1)], ids=str)
def test_tokens_that_share_memory(which, strides):
    """SDPA of torch 2.13 on the CPU reads the wrong elements of queries that overlap in memory."""
    tensors = [normal(1, 1, n, 16, seed=n) for n in (40, 50, 50)]
    tensors[which] = normal(1000).as_strided((1, 1, tensors[which].shape[2], 16), strides)
    check(*tensors)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_causal_with_a_scale_of_zero_or_less(scale):
    """SDPA of torch 2.13 on the CPU returns NaN for causal attention with a scale of 0 or less."""
    check(*qkv(), is_causal=True, scale=scale)


def test_sdpa_that_needs_avx512(monkeypatch):
    """SDPA of torch 2.13 raises in bfloat16 if ATEN_CPU_CAPABILITY hides AVX-512 of a processor that has AMX."""
    query, key, value = (x.bfloat16() for x in qkv())
    truth = attention(query.double(), key.double(), value.double(), backend="reference")
    message = "pack_vnni2 is only supported when avx512 is supported"

    def refusing(*arguments, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refusing)
    torch.testing.assert_close(attention(query, key, value).double(), truth, atol=1e-2, rtol=1e-2)
    message = "another error"
    with pytest.raises(RuntimeError, match="another error"):
        attention(query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_with_a_mask(dtype):
    """SDPA of torch 2.13 on the CPU reads a float32 mask as if it were float64."""
    check(*(x.double() for x in qkv()), normal(70, 90, seed=4).to(dtype))


@pytest.mark.parametrize("Nk", [1, 7, 15, 16, 17, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["none", "mask", "causal"])
def test_a_query_that_is_nan(Nk, dtype, kind):
    query, key, value = (x.to(dtype) for x in qkv(Nk=Nk))
    query[0, 1, 5, 3] = math.nan
    options = {"none": {}, "mask": {"attn_mask": torch.ones(1, 1, 1, Nk, dtype=torch.bool)}}
    arguments = options.get(kind, {"is_causal": True})
    expected = torch.zeros(1, 2, 70, dtype=torch.bool)
    expected[0, 1, 5] = True
    full = attention(query, key, value, **arguments, **EVERYTHING)
    for rows in (attention(query, key, value, **arguments).isnan().all(-1), *(x.isnan() for x in full[1:])):
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("size", [1e-30, 1e26])
def test_small_and_large_values(size):
    query, key, value = qkv()
    plain, full = (attention(query, key, value * size, **x) for x in ({}, EVERYTHING))
    expected = attention(query, key, value, backend="reference")
    for out in (plain, full.out):
        torch.testing.assert_close(out / size, expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_the_lowest_float64_is_no_hidden_row():
    query, key, value = (x.double() for x in qkv())
    bias = torch.zeros(70, 90, dtype=torch.float64)
    bias[5] = torch.finfo(torch.float64).min
    full = check(query, key, value, bias)
    torch.testing.assert_close(full.entropy[:, :, 5], torch.full((1, 2), math.log(90)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [(6, 2), (3, 1)])
@pytest.mark.parametrize("Nq", [40, 1500])
def test_shared_keys_are_not_repeated(heads, Nq, monkeypatch):
    H, Hkv = heads
    query, key, value = (normal(1, h, n, 8, seed=n) for h, n in ((H, Nq), (Hkv, 1400), (Hkv, 1401)))
    value = value[:, :, 1:]
    seen = []
    softmax = cpu._softmax
    monkeypatch.setattr(cpu, "_softmax", lambda *rows: seen.append(rows[1].data_ptr()) or softmax(*rows))
    check(query, key, value, enable_gqa=True)
    if Nq == 1500:  # heads of this size are computed one at a time, on views of the keys
        assert set(seen) == {key[:, h].data_ptr() for h in range(Hkv)}


def test_the_number_of_threads_stays():
    for threads in (2, 3):
        torch.set_num_threads(threads)
        attention(*qkv(Nq=400, Nk=400), return_entropy=True)
        assert torch.get_num_threads() == threads
        found = []
        thread = threading.Thread(target=lambda found=found: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [threads]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    mask = torch.rand(1, 1, 400, 500, generator=torch.Generator().manual_seed(0)) > 0.3
    check(*qkv(Nq=400, Nk=500, H=3), mask)
    check(*qkv(Nq=700, Nk=500, H=1), is_causal=True)


def test_an_error_of_a_worker_is_the_callers(monkeypatch):
    def fail(*rows):
        raise RuntimeError("no memory")

    torch.set_num_threads(2)
    monkeypatch.setattr(cpu, "_softmax", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        attention(*qkv(Nq=400, Nk=400), return_entropy=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_the_calling_thread(mode):
    torch.set_num_threads(2)
    with mode():
        query, key, value = qkv(Nq=400, Nk=400)
        if mode is torch.no_grad:
            query = torch.nn.Parameter(query)
        result = attention(query, key, value, return_entropy=True)
    assert result.out.is_inference() == result.entropy.is_inference() == (mode is torch.inference_mode)
    assert not result.out.requires_grad
    if mode is torch.enable_grad:  # the result can enter an autograd graph
        (result.out * torch.ones((), requires_grad=True)).sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
torch.set_num_threads(2)
from entropy_attn.backends import cpu
cpu._workers(2, os.getpid())
child = os.fork()
if child == 0:
    assert cpu._workers(2, os.getpid()).submit(lambda: 7).result(timeout=60) == 7
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0", done.stderr
