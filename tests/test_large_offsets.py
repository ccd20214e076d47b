"""Offsets past 2^31 elements, in the interpreter. Only the touched pages of the large buffers take memory."""

import pytest
import torch
from support import assert_attends

from entropy_attn import attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the kernel on it")


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 1, 70, 16), (2**31 + 8, 16, 16, 1)),
        ((1, 2, 70, 16), (0, 2**31 + 8, 16, 1)),
        ((1, 1, 140, 16), (0, 16, 2**31 // 128, 1)),
        ((1, 1, 140, 16), (0, 16, 2**31 // 128 + 1, 1)),
    ],
    ids=["batch", "heads", "rows", "odd rows"],
)
def test_offsets_past_2_31(shape, strides):
    elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert elements > 2**31
    view = torch.empty(elements, dtype=torch.float16).as_strided(shape, strides)
    view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    result = attention(view, view, view, return_entropy=True, return_lse=True, backend="triton")
    assert_attends(result, view, view, view)
