"""What must hold for any attention, as properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entropy_attn import AttentionOutput, attention

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CPU tensors reach the kernel only in the interpreter"
)
pytestmark = pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETED), "cpu", "reference"])
property_test = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def qkv(draw, min_keys=1):
    """query, key and value (1, H, N, D) in float32, from flat to peaked logits."""
    H, Nq = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    Nk, D = draw(st.integers(min_keys, 150)), draw(st.sampled_from([8, 16, 24, 40]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return tuple(torch.randn(1, H, N, D, generator=g) * s for N, s in ((Nq, spread), (Nk, spread), (Nk, 1.0)))


def everything(query, key, value, backend, **kwargs) -> AttentionOutput:
    return attention(query, key, value, return_entropy=True, return_lse=True, backend=backend, **kwargs)


def assert_same(a, b, atol=5e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-5)


@property_test
@given(inputs=qkv(), hidden=st.floats(0, 0.9))
def test_entropy_is_between_0_and_ln_of_the_visible_keys(backend, inputs, hidden):
    query, key, value = inputs
    mask = torch.rand(query.shape[2], key.shape[2], generator=torch.Generator().manual_seed(0)) >= hidden
    entropy = everything(query, key, value, backend, attn_mask=mask).entropy
    assert (entropy >= 0).all()
    assert (entropy <= mask.sum(-1).clamp(min=1).log() + 1e-5).all()


@property_test
@given(inputs=qkv())
def test_small_scale_gives_ln_of_the_keys(backend, inputs):
    entropy = everything(*inputs, backend, scale=1e-6).entropy
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(inputs[1].shape[2])), atol=1e-5, rtol=0)


@property_test
@given(inputs=qkv(), scales=st.lists(st.floats(0, 2), min_size=3, max_size=3))
def test_entropy_does_not_rise_with_the_scale(backend, inputs, scales):
    rows = [everything(*inputs, backend, scale=scale).entropy for scale in sorted(scales)]
    assert (rows[1] <= rows[0] + 5e-5).all()
    assert (rows[2] <= rows[1] + 5e-5).all()


@property_test
@given(inputs=qkv(), seed=st.integers(0, 1000))
def test_order_of_keys_does_not_matter(backend, inputs, seed):
    query, key, value = inputs
    order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(seed))
    assert_same(
        everything(query, key[:, :, order], value[:, :, order], backend), everything(query, key, value, backend)
    )


@property_test
@given(inputs=qkv(), extra=st.integers(1, 70))
def test_hidden_keys_change_nothing(backend, inputs, extra):
    query, key, value = inputs
    longer = [torch.cat([x, torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, extra, -1)], 2) for x in (key, value)]
    mask = (torch.arange(key.shape[2] + extra) < key.shape[2]).view(1, 1, 1, -1)
    assert_same(everything(query, *longer, backend, attn_mask=mask), everything(query, key, value, backend))


@property_test
@given(inputs=qkv(), shift=st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_only_lse(backend, inputs, shift):
    query, key, value = inputs
    plain = everything(query, key, value, backend)
    shifted = everything(query, key, value, backend, attn_mask=torch.full((1, 1, 1, key.shape[2]), shift))
    assert_same(shifted[:2], plain[:2], atol=1e-4)
    torch.testing.assert_close(shifted.lse, plain.lse + shift, atol=1e-4, rtol=1e-5)


@property_test
@given(inputs=qkv(min_keys=2))
def test_trained_size_gives_sdpa(backend, inputs):
    query, key, value = inputs
    adapted = attention(query, key, value, train_tokens=key.shape[2], backend=backend)
    assert torch.equal(adapted, attention(query, key, value, backend=backend))
    torch.testing.assert_close(adapted, F.scaled_dot_product_attention(query, key, value), atol=5e-5, rtol=1e-5)


@property_test
@given(inputs=qkv(min_keys=2), cut=st.floats(0.01, 0.99))
def test_two_halves_of_the_keys_merge(backend, inputs, cut):
    query, key, value = inputs
    at = min(max(1, int(key.shape[2] * cut)), key.shape[2] - 1)
    parts = [everything(query, key[:, :, s], value[:, :, s], backend) for s in (slice(at), slice(at, None))]
    weights = torch.stack([p.lse for p in parts]).softmax(0)
    out = sum(w[..., None] * p.out for w, p in zip(weights, parts, strict=True))
    entropy = sum(w * p.entropy - torch.special.xlogy(w, w) for w, p in zip(weights, parts, strict=True))
    lse = torch.stack([p.lse for p in parts]).logsumexp(0)
    assert_same((out, entropy, lse), everything(query, key, value, backend))
