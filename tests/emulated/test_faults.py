"""What kernels must not do, and what the emulator does not know."""

import dataclasses
import re

import pytest
import torch
import triton
import triton.language as tl
from emulator import KernelError, PTXError
from emulator.ptx import Module
from emulator.ptx import launch as run
from triton_kernels import add_kernel, matmul, matmul_kernel, randn


def test_a_forgotten_mask(device):
    x = randn(100)
    with pytest.raises(KernelError, match=r"global load of 4 bytes out of bounds.*triton_kernels.py"):
        add_kernel[(1,)](x, x, torch.empty_like(x), 128, BLOCK=128)


def test_a_tensor_on_the_cpu():
    x = torch.zeros(128)
    with pytest.raises(ValueError, match="cpu tensor"):
        add_kernel[(1,)](x, x, x, 128, BLOCK=128)


@triton.jit
def same_place_kernel(Out):
    tl.store(Out, tl.program_id(0))


def test_ctas_that_race():
    with pytest.raises(KernelError, match="race: CTA"):
        same_place_kernel[(2,)](torch.empty(1, dtype=torch.int32, device="cuda"))


def test_what_nobody_writes_is_nan():
    out = torch.empty(100, device="cuda")
    add_kernel[(1,)](randn(100), randn(100), out, 50, BLOCK=128)
    assert out[:50].isfinite().all()
    assert out[50:].isnan().all()


@pytest.mark.parametrize(
    ("what", "pattern", "fault"),
    [
        ("barriers", r"bar\.sync[^;]*;", "with no barrier|in flight"),
        ("waits", r"cp\.async\.wait_group[^;]*;", "in flight"),
    ],
)
def test_missing_barriers_and_waits_in_compiled_kernels(device, what, pattern, fault, monkeypatch):
    """Any one of them that is taken out of a matrix product's PTX is missed, but for those at its end."""
    a, b = randn(64, 128, dtype=torch.float16), randn(128, 64, dtype=torch.float16, seed=1)
    out = matmul(a, b, torch.float32, num_stages=3)
    launched = device.launches[-1]
    text = launched.kernel.ptx
    places = list(re.finditer(pattern, text))
    assert len(places) >= 2
    missed = 0
    for place in places:
        without = Module(text[: place.start()] + text[place.end() :])
        try:
            run(dataclasses.replace(launched.launch, module=without), device.memory, device.options)
        except KernelError as error:
            missed += bool(re.search(fault, str(error)))
    assert missed >= len(places) - 1, f"{missed} of {len(places)} {what}"
    del out


@triton.jit
def float64_kernel(X, Out):
    at = tl.arange(0, 128)
    tl.store(Out + at, tl.fma(tl.load(X + at), tl.load(X + at), tl.load(X + at)))


def test_what_is_not_emulated_says_so():
    x = randn(128).double()
    with pytest.raises(PTXError, match=r"fma.rn.f64.*PTX line"):
        float64_kernel[(1,)](x, torch.empty_like(x))


def test_shared_memory_that_no_a100_has():
    a, b = randn(256, 256, dtype=torch.float16), randn(256, 256, dtype=torch.float16)
    c = torch.empty(256, 256, device="cuda")
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        matmul_kernel[(1, 1)](
            a, b, c, 256, 256, 256, 256, 256, 256, BM=128, BN=256, BK=128, PRECISION="ieee", num_stages=4, num_warps=8
        )
