"""Without a GPU, Triton kernels run in Triton's interpreter; that has to be decided before they are imported."""

import functools
import os

# Threads that spin while they wait bring CPU attention to a crawl as soon as another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is imported

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device, and there is none"))


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter():
    """Triton 3.7's interpreter multiplies the bit patterns of bfloat16 in tl.dot, rounds the product in tl.fma, and
    reduces with functions it does not know one element at a time."""
    if torch.cuda.is_available():
        yield
        return
    tl = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    dot = InterpreterBuilder.create_dot

    def numbers(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    generic_reduce = ReduceOps.generic_reduce

    def reduce_slices(self, input):
        if self.axis is None or self.keep_dims:
            return generic_reduce(self, input)
        slices = zip(*(np.moveaxis(x.handle.data, self.axis, 0) for x in input), strict=True)
        tensors = ([self.to_tensor(s, x.dtype) for s, x in zip(arrays, input, strict=True)] for arrays in slices)
        return list(functools.reduce(lambda a, b: self.combine_fn.fn(*a, *b), tensors))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReduceOps, "generic_reduce", reduce_slices)
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, numbers(a), numbers(b), *rest)
        )
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        yield


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion pipeline."""
    import tiny_pipelines

    return tiny_pipelines.sd()


@pytest.fixture
def unet(pipe):
    return pipe.unet
