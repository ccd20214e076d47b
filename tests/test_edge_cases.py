"""Cases in which attention libraries have failed: hidden NaN, rows without keys, offsets, scales of zero or less."""

import math

import pytest
import torch
from support import BACKENDS, normal

from entropy_attn import attention

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def qkv(Nq=70, Nk=90, D=16, B=2, H=2):
    return normal(B, H, Nq, D, seed=1), normal(B, H, Nk, D, seed=2), normal(B, H, Nk, D, seed=3)


def everything(*args, **kwargs):
    return attention(*args, return_entropy=True, return_lse=True, **kwargs)


def assert_same(a, b, atol=2e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-5)


def hiding_masks(Nq=70, Nk=90):
    """Masks of every form that hide the keys 40 to 59 from all queries."""
    keys = torch.ones(Nk, dtype=torch.bool)
    keys[40:60] = False
    bias = torch.zeros(Nk).masked_fill(~keys, -math.inf)
    rows = keys.expand(1, 1, Nq, Nk) & (normal(1, 1, Nq, Nk, seed=4) > -1)
    return {
        "key padding": keys.view(1, 1, 1, Nk),
        "rows": rows,
        "key bias": bias.view(1, 1, 1, Nk),
        "bias": torch.zeros(1, 1, Nq, Nk).masked_fill(~rows, -math.inf),
    }


@pytest.mark.parametrize("kind", hiding_masks())
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plain", [False, True], ids=["statistics", "plain"])
def test_hidden_keys_cannot_leak(backend, kind, poison, plain):
    query, key, value = qkv()
    mask = hiding_masks()[kind]
    bad_key, bad_value = key.clone(), value.clone()
    bad_key[:, :, 40:60] = poison
    bad_value[:, :, 40:60] = poison
    if plain:
        clean, bad = (attention(query, k, v, mask, backend=backend) for k, v in ((key, value), (bad_key, bad_value)))
        torch.testing.assert_close(bad, clean, atol=2e-6, rtol=1e-5)
    else:
        clean = everything(query, key, value, mask, backend=backend)
        assert_same(everything(query, bad_key, bad_value, mask, backend=backend), clean)


@pytest.mark.parametrize("visible", [(0, 131), (20, 250), (90, 95), (0, 300), (10, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [None, -0.7])
def test_floating_and_boolean_padding_agree(backend, visible, dtype, scale):
    """A padding mask of 0 and -inf equals a boolean one. The kernel may run blocks of zeros without a mask."""
    query, key, value = (x.to(dtype) for x in qkv(Nk=300))
    keep = (torch.arange(300) >= visible[0]) & (torch.arange(300) < visible[1])
    bias = torch.zeros(300).masked_fill(~keep, -math.inf).view(1, 1, 1, 300)
    padded = everything(query, key, value, bias.to(dtype), scale=scale, backend=backend)
    expected = everything(query, key, value, keep.view(1, 1, 1, 300), scale=scale, backend="reference")
    for x, y in zip(padded, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3 if x.dtype == torch.float16 else 1e-5, rtol=1e-5)
    later = bias.clone()
    later[..., visible[0] : visible[0] + 5] -= 0.5  # these keys must not run without a mask
    found = everything(query, key, value, later, scale=scale, backend=backend)
    wanted = everything(query, key, value, later, scale=scale, backend="reference")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3 if x.dtype == torch.float16 else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "bias", "causal"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_keys_do_not_reach_the_queries_they_are_hidden_from(backend, kind, poison):
    query, key, value = qkv()
    mask = torch.ones(70, 90, dtype=torch.bool).tril()
    bias = torch.zeros(70, 90).masked_fill(~mask, -math.inf)
    options = {"bool": {"attn_mask": mask}, "bias": {"attn_mask": bias}, "causal": {"is_causal": True}}[kind]
    clean = everything(query, key, value, **options, backend=backend)
    key[:, :, 50] = poison
    bad = everything(query, key, value, **options, backend=backend)
    assert_same([x[:, :, :50] for x in bad], [x[:, :, :50] for x in clean])
    assert bad.out[:, :, 50:].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_after_the_last_query_cannot_leak(backend, poison):
    query, key, value = qkv(Nq=70, Nk=200)
    clean = everything(query, key, value, is_causal=True, backend=backend)
    key[:, :, 70:] = poison
    value[:, :, 70:] = poison
    assert_same(everything(query, key, value, is_causal=True, backend=backend), clean)


def test_nan_in_a_visible_place_is_not_hidden(backend):
    query, key, value = qkv()
    query[0, 0, 3, 0] = math.nan
    out, entropy, lse = everything(query, key, value, backend=backend)
    for x in (out[..., 0], entropy, lse):
        expected = torch.zeros(2, 2, 70, dtype=torch.bool)
        expected[0, 0, 3] = True
        assert torch.equal(x.isnan(), expected)


@pytest.mark.parametrize("kind", ["bool", "bias", "key padding"])
@pytest.mark.parametrize("scale", [None, 0.0, -0.3])
def test_rows_without_keys(backend, kind, scale):
    query, key, value = qkv()
    mask = torch.ones(2, 1, 70, 90, dtype=torch.bool)
    empty = torch.zeros(2, 1, 70, dtype=torch.bool)
    if kind == "key padding":
        mask = mask[:, :, :1].clone()
        mask[1] = False
        empty[1] = True
    else:
        mask[:, :, 5:9] = False
        empty[:, :, 5:9] = True
    if kind == "bias":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    out, entropy, lse = everything(query, key, value, mask, scale=scale, backend=backend)
    empty = empty.expand(2, 2, 70)
    assert (out[empty] == 0).all()
    assert (entropy[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    assert out[~empty].isfinite().all()
    assert lse[~empty].isfinite().all()
    assert (entropy[~empty] > 0).all()
    plain = attention(query, key, value, mask, scale=scale, backend=backend)
    torch.testing.assert_close(plain, out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_keys_at_all(backend, dtype):
    query, key, value = (x.to(dtype) for x in qkv(Nk=0))
    out, entropy, lse = everything(query, key, value, backend=backend)
    assert out.shape == (2, 2, 70, 16)
    assert (out == 0).all()
    assert (entropy == 0).all()
    assert (lse == -math.inf).all()
    assert (attention(query, key, value, backend=backend) == 0).all()


@pytest.mark.parametrize(("B", "H", "Nq"), [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_inputs(backend, B, H, Nq):
    query, key, value = normal(B, H, Nq, 16), normal(B, H, 9, 16), normal(B, H, 9, 24)
    out, entropy, lse = everything(query, key, value, backend=backend)
    assert out.shape == (B, H, Nq, 24)
    assert entropy.shape == lse.shape == (B, H, Nq)
    assert attention(query, key, value, backend=backend).shape == out.shape


def test_logits_with_an_offset(backend):
    # Sums of few small integers are exact in float32, so the offset itself causes no rounding.
    query = torch.randint(-2, 3, (1, 2, 70, 16), generator=torch.Generator().manual_seed(0)).float()
    key = torch.randint(-2, 3, (1, 2, 90, 16), generator=torch.Generator().manual_seed(1)).float()
    value = normal(1, 2, 90, 16)
    query[..., 0], key[..., 0] = 100.0, 0.0
    base = everything(query.double(), key.double(), value.double(), scale=0.25, backend="reference")
    key[..., 0] = 400.0  # every logit grows by 10^4
    out, entropy, lse = everything(query, key, value, scale=0.25, backend=backend)
    assert (out - base.out.float()).abs().max() <= 2e-6
    assert (entropy - base.entropy).abs().max() <= 2e-5
    assert (lse - 1e4 - base.lse).abs().max() <= 2e-3  # float32's spacing at 1e4 is 1e-3


def test_zero_scale_is_the_mean(backend):
    query, key, value = qkv()
    out, entropy, lse = everything(query, key, value, scale=0.0, backend=backend)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(90)), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_negative_scale_is_the_negative_query(backend, tensor):
    query, key, value = qkv()
    scale = torch.tensor([[-0.3, 0.2], [0.0, -2.0]]) if tensor else -0.3
    flipped = query * (scale.sign()[..., None, None] if tensor else -1)
    expected = everything(flipped, key, value, scale=scale.abs() if tensor else 0.3, backend=backend)
    assert_same(everything(query, key, value, scale=scale, backend=backend), expected)


def test_nan_scale_gives_nan(backend):
    query, key, value = qkv()
    scale = torch.tensor([[math.nan, 0.2], [0.1, 0.3]])
    out, entropy, lse = everything(query, key, value, scale=scale, backend=backend)
    for x in (out, entropy, lse):
        assert x[0, 0].isnan().all()
        assert not x[0, 1].isnan().any()
        assert not x[1].isnan().any()


def test_lowest_finite_bias_still_counts(backend):
    # Many models mask with torch.finfo.min. A row with this bias at every key has equal weights.
    query, key, value = qkv()
    bias = torch.zeros(70, 90)
    bias[5] = torch.finfo(torch.float32).min
    out, entropy, _ = everything(query, key, value, bias, backend=backend)
    torch.testing.assert_close(out[:, :, 5], value.mean(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[:, :, 5], torch.full((2, 2), math.log(90)), atol=1e-5, rtol=0)


def test_peaked_rows_have_no_negative_entropy(backend):
    query, key, value = qkv()
    _, entropy, _ = everything(query * 50, key * 50, value, backend=backend)
    assert (entropy >= 0).all()
    assert entropy.median() < 1e-3


def test_large_float16_logits_do_not_overflow(backend):
    query, key, value = (x.half() for x in qkv())
    out, entropy, lse = everything(query * 300, key * 300, value, backend=backend)
    assert out.isfinite().all()
    assert entropy.isfinite().all()
    assert lse.isfinite().all()
    assert lse.max() > torch.finfo(torch.float16).max


def test_output_lies_in_memory_as_query_does(backend):
    query, key, value = qkv()
    bhnd = attention(query, key, value, backend=backend)
    assert bhnd.is_contiguous()
    tokens_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    bnhd = attention(*tokens_first, layout="bnhd", backend=backend)
    assert bnhd.is_contiguous()
    torch.testing.assert_close(bnhd.transpose(1, 2), bhnd, atol=2e-6, rtol=1e-5)
    views = attention(*(x.transpose(1, 2) for x in tokens_first), backend=backend)
    assert views.transpose(1, 2).is_contiguous()


def test_run_to_run_bitwise_equal(backend):
    query, key, value = qkv()
    first = everything(query, key, value, is_causal=True, backend=backend)
    second = everything(query, key, value, is_causal=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
