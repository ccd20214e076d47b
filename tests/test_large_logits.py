"""Finite logits of any size give no NaN and no wrong row."""

import math

import pytest
import torch
from support import BACKENDS, normal

from entropy_attn import attention

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
Nq, Nk, D = 40, 200, 16
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "key padding": {"attn_mask": (torch.arange(Nk) < 150).view(1, 1, 1, Nk)},
    "rows": {"attn_mask": torch.rand(Nq, Nk, generator=torch.Generator().manual_seed(9)) > 0.3},
    "bias": {"attn_mask": torch.zeros(Nq, Nk).masked_fill(torch.arange(Nk) >= 150, -math.inf)},
}


def everything(*tensors, **options):
    return attention(*tensors, **options, return_entropy=True, return_lse=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 49152.0), (torch.bfloat16, 133120.0), (torch.float32, 133120.0), (torch.float32, 2.0**50)],
)
def test_equal_logits(backend, dtype, size, sign, mask):
    """Equal queries and equal keys give the mean of the visible values, as in PyTorch's regression test of SDPA.

    The sizes have few significant bits, so sums of their squares are exact in any order.
    """
    query = torch.full((1, 1, Nq, D), size).to(dtype)
    key = torch.full((1, 1, Nk, D), sign * size).to(dtype)
    value = normal(1, 1, Nk, D, seed=0).to(dtype)
    result = everything(query, key, value, **MASKS[mask], backend=backend)
    expected = everything(torch.zeros_like(query), key * 0, value, **MASKS[mask], backend="reference")
    torch.testing.assert_close(result.out, expected.out, atol=16 * torch.finfo(dtype).eps, rtol=0)
    torch.testing.assert_close(result.entropy, expected.entropy, atol=1e-5, rtol=0)
    plain = attention(query, key, value, **MASKS[mask], backend=backend)
    torch.testing.assert_close(plain, expected.out, atol=16 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [1e8, 1e10, 1e20, 1e30])
def test_one_key_wins(backend, size, mask):
    """The logits are so far apart that a row is the value of its largest key, in whichever block of keys it is."""
    query = torch.ones(1, 1, Nq, D)
    order = torch.randperm(Nk, generator=torch.Generator().manual_seed(1))
    key = (size * order / Nk).view(1, 1, Nk, 1).expand(1, 1, Nk, D).contiguous()
    value = normal(1, 1, Nk, D, seed=2)
    visible = torch.ones(Nq, Nk, dtype=torch.bool)
    if mask == "causal":
        visible = visible.tril()
    elif mask != "none":
        given = MASKS[mask]["attn_mask"]
        visible = (given if given.dtype == torch.bool else given == 0).view(-1, Nk).expand(Nq, Nk)
    winner = order.expand(Nq, Nk).masked_fill(~visible, -1).argmax(-1)
    result = everything(query, key, value, scale=0.25, **MASKS[mask], backend=backend)
    torch.testing.assert_close(result.out[0, 0], value[0, 0, winner], atol=1e-6, rtol=0)
    assert (result.entropy == 0).all()
    torch.testing.assert_close(result.lse[0, 0], 0.25 * key[0, 0, winner].sum(-1), atol=0, rtol=1e-6)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_from_one_end_of_float32_to_the_other(backend, order):
    """The first key's logit is -1e35 and the last one's 1e35, or the reverse."""
    query = torch.ones(1, 1, 4, 8)
    logits = torch.linspace(-1e35, 1e35, Nk)
    logits = logits if order == "rising" else logits.flip(0)
    key = torch.zeros(1, 1, Nk, 8)
    key[..., 0] = logits
    value = normal(1, 1, Nk, 8, seed=3)
    out, entropy, lse = everything(query, key, value, scale=1.0, backend=backend)
    torch.testing.assert_close(out, value[:, :, logits.argmax()].unsqueeze(2).expand_as(out), atol=0, rtol=0)
    assert (entropy == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 1e35), atol=0, rtol=1e-6)


def test_rows_of_every_size_in_one_tile(backend):
    """A row with logits beyond 2^26, which uses the edge loop only, does not change the other rows of its tile."""
    query, key, value = normal(1, 1, Nq, D, seed=4), normal(1, 1, Nk, D, seed=5), normal(1, 1, Nk, D, seed=6)
    plain = everything(query, key, value, backend=backend)
    query[:, :, 7] *= 1e12
    query[:, :, 9] *= 1e30
    mixed = everything(query, key, value, backend=backend)
    for x, y in zip(mixed, plain, strict=True):
        keep = [i for i in range(Nq) if i not in (7, 9)]
        torch.testing.assert_close(x[:, :, keep], y[:, :, keep], atol=2e-6, rtol=1e-5)
        assert x.isfinite().all()


def test_masks_of_the_lowest_float(backend):
    """Beside ordinary scores, finfo.min masks a key like -inf. A row of finfo.min alone has equal weights."""
    query, key, value = normal(1, 1, Nq, D, seed=4), normal(1, 1, Nk, D, seed=5), normal(1, 1, Nk, D, seed=6)
    lowest = torch.finfo(torch.float32).min
    hidden = torch.rand(Nq, Nk, generator=torch.Generator().manual_seed(7)) < 0.5
    masked = everything(query, key, value, torch.zeros(Nq, Nk).masked_fill(hidden, lowest), backend=backend)
    expected = everything(query, key, value, ~hidden, backend="reference")
    for x, y in zip(masked, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    alone = everything(query, key, value, torch.full((Nq, Nk), lowest), backend=backend)
    torch.testing.assert_close(alone.out, value.mean(2, keepdim=True).expand_as(alone.out), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.lse, torch.full_like(alone.lse, lowest), atol=0, rtol=1e-6)


def test_a_large_scale(backend):
    query, key, value = (1e-19 * normal(1, 1, n, D, seed=n) for n in (40, 200, 201))
    result = everything(query, key, value[:, :, 1:], scale=2e38, backend=backend)
    expected = everything(query.double(), key.double(), value[:, :, 1:].double(), scale=2e38, backend="reference")
    torch.testing.assert_close(result.out * 1e19, (expected.out * 1e19).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.entropy, expected.entropy, atol=2e-5, rtol=0)
