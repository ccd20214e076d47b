"""The CPU backend with a scale that is a tensor: the calls that it passes to PyTorch's SDPA."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import normal

from entropy_attn import attention, attention_varlen

B, H, Nq, Nk, D = 2, 4, 50, 70, 16
SCALES = {
    "()": {"scale": torch.tensor(0.3)},
    "(B,)": {"scale": torch.tensor([0.3, -0.2])},
    "(B, H)": {"scale": 0.3 * normal(B, H, seed=6)},
    "(B, H, Nq)": {"scale": 0.3 * normal(B, H, Nq, seed=7)},
    "expanded": {"scale": torch.tensor([0.2, 0.0, -0.1, 0.4]).view(1, H, 1).expand(B, H, Nq)},
    "num_tokens": {"train_tokens": 64, "num_tokens": torch.tensor([70, 20])},
}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "key padding": {"attn_mask": (torch.arange(Nk) < torch.tensor([0, 60])[:, None])[:, None, None]},
    "rows": {"attn_mask": torch.rand(Nk, Nq, generator=torch.Generator().manual_seed(1)).T > 0.4},
    "bias": {"attn_mask": normal(B, 1, Nq, Nk, seed=2).masked_fill(torch.arange(Nq)[:, None] == 3, -math.inf)},
}


def qkv(dtype=torch.float32, Hkv=2, Dv=24):
    shapes = ((B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv))
    return [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


@pytest.fixture
def sdpa(monkeypatch):
    """The arguments of the calls of PyTorch's SDPA."""
    calls, original = [], F.scaled_dot_product_attention

    def recorded(*arguments, **options):
        calls.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return calls


def check(tensors, dtype=torch.float32, **options):
    options = {"enable_gqa": True} | options
    truth = attention(*(x.double() for x in tensors), **options, backend="reference")
    out = attention(*tensors, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.double(), truth, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_query_is_multiplied_for_sdpa(dtype, scale, mask, sdpa):
    """Fewer key heads, another head dim of the values, and rows that see no key."""
    tensors, options = qkv(dtype), SCALES[scale] | MASKS[mask]
    if dtype == torch.float64 and mask == "bias":  # SDPA would read a float32 mask as float64
        options["attn_mask"] = options["attn_mask"].double()
    before = [x.clone() for x in (*tensors, *(x for x in options.values() if isinstance(x, torch.Tensor)))]
    check(tensors, dtype, **options)
    assert [given["scale"] for _, given in sdpa] == [1.0]
    after = (*tensors, *(x for x in options.values() if isinstance(x, torch.Tensor)))
    assert all(map(torch.equal, before, after))


def test_only_float32_and_float64_without_statistics_go_to_sdpa(sdpa):
    """A product rounded to half precision would be wrong: the logits reach 100 here."""
    options = {"scale": torch.full((B,), 0.7), "enable_gqa": True}
    for dtype in (torch.float16, torch.bfloat16):
        query, key, value = qkv(dtype)
        truth = attention(query.double() * 8, key.double(), value.double(), **options, backend="reference")
        out = attention(query * 8, key, value, **options)
        torch.testing.assert_close(out.double(), truth, atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    attention(*qkv(), **options, return_entropy=True)
    attention(*qkv(), **options, return_lse=True)
    assert not sdpa


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 1e38])
def test_a_scale_that_is_no_number_or_overflows(special, mask):
    """A row with a product that is NaN or infinite is what it is beside an lse. The other rows are right."""
    query, key, value = qkv()
    key, query[0, 1, 5] = -key.abs(), 1e3
    scale = 0.3 * normal(B, H, Nq, seed=6)
    scale[0, 1, 5] = special
    options = {"scale": scale, "enable_gqa": True} | MASKS[mask]
    out = attention(query, key, value, **options)
    beside = attention(query, key, value, **options, return_lse=True).out
    torch.testing.assert_close(out, beside, atol=1e-5, rtol=1e-5, equal_nan=True)
    rows = out.isnan().any(-1).nonzero().tolist()
    assert rows in ([], [[0, 1, 5]])
    assert rows or mask != "none"


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("memory", ["contiguous", "heads first", "heads last", "expanded", "shared by tokens"])
def test_any_memory_of_the_query(memory, layout, sdpa):
    query, key, value = qkv()
    query = {
        "contiguous": query,
        "heads first": query.transpose(0, 1).contiguous().transpose(0, 1),
        "heads last": query.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "expanded": query[:, :1].expand(B, H, Nq, D),
        "shared by tokens": query[:, :, :1].expand(B, H, Nq, D),
    }[memory]
    tensors = [x.transpose(1, 2) if layout == "bnhd" else x for x in (query, key, value)]
    for scale in (SCALES["(B, H, Nq)"], SCALES["expanded"]):
        out = check(tensors, **scale, layout=layout)
        beside = attention(*tensors, **scale, enable_gqa=True, layout=layout, return_lse=True)
        assert out.stride() == beside.out.stride()
    assert len(sdpa) == 2


@pytest.mark.parametrize("scale", [{}, SCALES["(B,)"]], ids=["number", "tensor"])
@pytest.mark.parametrize(("mask", "elements"), [("key padding", B * Nk), ("rows", Nq * Nk), ("bias", B * Nq * Nk)])
def test_sdpa_gets_no_repeated_mask(scale, mask, elements, sdpa):
    """Of a boolean mask SDPA makes a floating one with as many elements: B H Nq Nk of them took longer than blocks."""
    wanted = torch.broadcast_to(MASKS[mask]["attn_mask"], (B, H, Nq, Nk))
    for given in (MASKS[mask]["attn_mask"], wanted):
        check(qkv(), attn_mask=given, **scale)
    for (*_, reached), _ in sdpa:
        assert reached.numel() == elements
        assert torch.equal(reached.expand(B, H, Nq, Nk), wanted)
    assert len(sdpa) == 2


def test_packed_sequences_with_a_scale_of_each(sdpa):
    query, key, value = (normal(90, H, D, seed=seed) for seed in range(3))
    ends = torch.tensor([0, 40, 90], dtype=torch.int32)
    scale = torch.tensor([0.3, -0.2])
    out = attention_varlen(query, key, value, ends, ends, 50, 50, scale=scale)
    assert [given["scale"] for _, given in sdpa] == [1.0, 1.0]
    for rows, number in zip((slice(0, 40), slice(40, 90)), scale.tolist(), strict=True):
        one = (x[rows].double().transpose(0, 1)[None] for x in (query, key, value))
        truth = attention(*one, scale=number, backend="reference")[0].transpose(0, 1)
        torch.testing.assert_close(out[rows].double(), truth, atol=1e-5, rtol=1e-5)
