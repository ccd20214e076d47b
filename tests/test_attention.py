"""Every backend against float64, in cases that cover every pair of options."""

import dataclasses

import pytest
import torch
from support import OPTIONS, Case, all_pairs, assert_close, make_inputs, pairs, pairwise_cases, truth

from entropy_attn import attention

CASES = pairwise_cases()
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the kernel on it")


def test_every_two_options_meet():
    met = set().union(*map(pairs, CASES))
    assert met == all_pairs()
    assert len(CASES) < 250


@pytest.mark.parametrize("memory", OPTIONS["memory"])
@pytest.mark.parametrize("layout", OPTIONS["layout"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_lie_in_memory_as_asked(memory, layout, device):
    """The inputs have the strides of the case, on the CPU and on the meta device."""
    case = dataclasses.replace(CASES[0], memory=memory, layout=layout, lengths=(7, 77), heads=(4, 2), head_dim=40)
    B, H, N, D = 2, 4, 7, 40
    token, head = (H * D, D) if layout == "bnhd" else (D, N * D)
    strides = {
        "contiguous": (H * N * D, head, token, 1),
        "fused qkv": (3 * H * N * D, D, 3 * H * D, 1),
        "transposed": (H * N * D, 1, H * D, H) if layout == "bnhd" else (H * N * D, N * D, 1, N),
        "expanded batch": (0, head, token, 1),
        "expanded heads": (N * D, 0, D, 1),
        "odd strides": (H * N * (D + 1), head // D * (D + 1), token // D * (D + 1), 1),
    }
    inputs = make_inputs(case, device=device, batch=B)
    assert inputs.query.shape == (B, H, N, D)
    assert inputs.query.stride() == strides[memory]
    given = inputs.arguments["query"]
    assert (given.transpose(1, 2) if layout == "bnhd" else given).stride() == strides[memory]


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETED), "cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, backend: str):
    inputs = make_inputs(case)
    before = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
    assert_close(case, inputs, attention(**inputs.arguments, backend=backend))
    after = (inputs.query, inputs.key, inputs.value)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the inputs were written to"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES[:: len(OPTIONS)], ids=str)
def test_float64_inputs(case: Case, backend: str):
    case = dataclasses.replace(case, dtype=torch.float64)
    inputs = make_inputs(case)
    assert_close(case, inputs, attention(**inputs.arguments, backend=backend))


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case in CASES for backend in ("cpu", "reference")]
    + [pytest.param(case, "triton", marks=INTERPRETED) for case in CASES[:: len(OPTIONS) + 2]],
    ids=str,
)
def test_the_answer_does_not_depend_on_what_is_asked_for(case: Case, backend: str):
    inputs = make_inputs(case)
    expected = truth(inputs)
    for entropy in (False, True):
        for lse in (False, True):
            inputs.arguments.update(return_entropy=entropy, return_lse=lse)
            assert_close(case, inputs, attention(**inputs.arguments, backend=backend), expected)
