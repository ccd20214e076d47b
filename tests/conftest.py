"""Options and fixtures of all tests. Without a GPU, the kernels run in Triton's interpreter.

TRITON_INTERPRET is read at the import of the kernels, so this file sets it before any test imports them.
"""

import os
import random

# OpenMP threads that spin while they wait slow CPU attention down when another process uses a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads it once, when torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from interpreter import repaired


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in an order of this number's own")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter():
    if torch.cuda.is_available():
        yield
        return
    with repaired():
        yield


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion pipeline."""
    import tiny_pipelines

    return tiny_pipelines.sd()


@pytest.fixture
def unet(pipe):
    return pipe.unet
