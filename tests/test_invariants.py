"""Mathematical properties of attention, tested on random inputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BACKENDS, assert_attends, assert_within, plain_inputs, truth

from entropy_attn import AttentionOutput, attention, explain

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
property_test = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def qkv(draw, min_keys=1):
    """query, key and value (1, H, N, D) in float32, with logits from flat to peaked."""
    H, Nq = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    Nk, D = draw(st.integers(min_keys, 150)), draw(st.sampled_from([8, 16, 24, 40]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return tuple(torch.randn(1, H, N, D, generator=g) * s for N, s in ((Nq, spread), (Nk, spread), (Nk, 1.0)))


def everything(query, key, value, backend, **kwargs) -> AttentionOutput:
    return attention(query, key, value, return_entropy=True, return_lse=True, backend=backend, **kwargs)


def assert_agree(result: AttentionOutput, other, expected) -> None:
    """Compare two results that must be equal up to rounding. The bound is doubled, because both are rounded."""
    for name, a, b in zip(("out", "entropy", "lse"), result, other, strict=True):
        assert_within(name, a, b.double(), 2 * getattr(expected, f"{name}_bound"))


@property_test
@given(inputs=qkv(), hidden=st.floats(0, 0.9))
def test_entropy_is_between_0_and_ln_of_the_visible_keys(backend, inputs, hidden):
    query, key, value = inputs
    mask = torch.rand(query.shape[2], key.shape[2], generator=torch.Generator().manual_seed(0)) >= hidden
    entropy = everything(query, key, value, backend, attn_mask=mask).entropy
    assert (entropy >= 0).all()
    assert (entropy <= mask.sum(-1).clamp(min=1).log() + 1e-5).all()


@property_test
@given(inputs=qkv(), scale=st.sampled_from([0.0, 1e-30, 1e-6, -1e-6]))
def test_small_scale_gives_ln_of_the_keys(backend, inputs, scale):
    _, key, value = inputs
    out, entropy, lse = everything(*inputs, backend, scale=scale)
    logarithm = torch.full_like(entropy, math.log(key.shape[2]))
    torch.testing.assert_close(entropy, logarithm, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, logarithm, atol=1e-3, rtol=0)  # the logits reach 1e-6 * 360
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out), atol=1e-3, rtol=0)


@property_test
@given(inputs=qkv(), scales=st.lists(st.floats(0, 2), min_size=3, max_size=3))
def test_entropy_does_not_rise_with_the_scale(backend, inputs, scales):
    scales = sorted(scales)
    rows = [everything(*inputs, backend, scale=scale).entropy for scale in scales]
    bounds = [truth(plain_inputs(*inputs, scale=scale)).entropy_bound for scale in scales]
    assert (rows[1] <= rows[0] + bounds[0] + bounds[1]).all()
    assert (rows[2] <= rows[1] + bounds[1] + bounds[2]).all()


@property_test
@given(inputs=qkv(), scale=st.floats(0, 2))
def test_slope_of_entropy_is_the_variance_of_the_logits(backend, inputs, scale):
    """dH/dλ = -λ Var_p(q·k), as a finite difference over a small step of λ."""
    query, key, _ = inputs
    products = (query.double() @ key.double().mT).squeeze(0)
    step = 0.02 / max(1.0, products.abs().max().item())
    ends = [everything(*inputs, backend, scale=s).entropy[0].double() for s in (scale, scale + step)]
    middle = scale + step / 2
    p = (middle * products).softmax(-1)
    variance = (p * products**2).sum(-1) - (p * products).sum(-1) ** 2
    bound = 2 * truth(plain_inputs(*inputs, scale=scale + step)).entropy_bound[0]
    assert_within("slope", ends[1] - ends[0], -middle * variance * step, bound + 1e-5)


@property_test
@given(inputs=qkv(), seed=st.integers(0, 1000))
def test_order_of_keys_does_not_matter(backend, inputs, seed):
    query, key, value = inputs
    order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(seed))
    result = everything(query, key[:, :, order], value[:, :, order], backend)
    assert_agree(result, everything(query, key, value, backend), truth(plain_inputs(*inputs)))


@property_test
@given(inputs=qkv(), extra=st.integers(1, 70))
def test_hidden_keys_change_nothing(backend, inputs, extra):
    query, key, value = inputs
    longer = [torch.cat([x, torch.full_like(x[:, :, :1], 7.0).expand(-1, -1, extra, -1)], 2) for x in (key, value)]
    mask = (torch.arange(key.shape[2] + extra) < key.shape[2]).view(1, 1, 1, -1)
    result = everything(query, *longer, backend, attn_mask=mask)
    assert_agree(result, everything(query, key, value, backend), truth(plain_inputs(*inputs)))


@property_test
@given(inputs=qkv(), shift=st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_only_lse(backend, inputs, shift):
    query, key, value = inputs
    plain = everything(query, key, value, backend)
    mask = torch.full((1, 1, 1, key.shape[2]), shift)
    out, entropy, lse = everything(query, key, value, backend, attn_mask=mask)
    assert_agree((out, entropy, lse - shift), plain, truth(plain_inputs(*inputs, mask=mask)))


@property_test
@given(inputs=qkv(min_keys=2))
def test_trained_size_gives_sdpa(backend, inputs):
    query, key, value = inputs
    assert explain(query, key, value, train_tokens=key.shape[2]).scale == pytest.approx(query.shape[3] ** -0.5, 1e-15)
    adapted = attention(query, key, value, train_tokens=key.shape[2], backend=backend)
    assert_attends(adapted, query, key, value)
    sdpa = F.scaled_dot_product_attention(query, key, value)
    assert_within("out", adapted, sdpa.double(), 2 * truth(plain_inputs(*inputs)).out_bound)


@property_test
@given(inputs=qkv(), copies=st.integers(2, 4))
def test_copies_of_all_keys_add_their_logarithm(backend, inputs, copies):
    query, key, value = inputs
    result = everything(query, *(x.repeat(1, 1, copies, 1) for x in (key, value)), backend)
    out, entropy, lse = everything(query, key, value, backend)
    more = math.log(copies)
    assert_agree(result, (out, entropy + more, lse + more), truth(plain_inputs(*inputs)))


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
    # The rounding errors of both lse enter the merge weights, even where one half has little weight.
    expected = truth(plain_inputs(*inputs))
    spread = 4 * expected.lse_bound.amax(-1, keepdim=True)
    expected.out_bound += spread[..., None] * value.abs().amax((2, 3), keepdim=True)
    expected.entropy_bound += spread * math.log(2 * key.shape[2])
    expected.lse_bound += spread
    assert_agree((out, entropy, lse), everything(query, key, value, backend), expected)
