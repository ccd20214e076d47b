"""Every backend against float64, in cases in which every two options meet."""

import dataclasses

import pytest
import torch
from support import OPTIONS, Case, all_pairs, assert_close, make_inputs, pairs, pairwise_cases

from entropy_attn import attention

CASES = pairwise_cases()
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel runs there, in test_gpu.py")


def test_every_two_options_meet():
    met = set().union(*map(pairs, CASES))
    assert met == all_pairs()
    assert len(CASES) < 250


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
