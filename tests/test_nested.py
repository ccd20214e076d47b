"""attention() of jagged nested tensors: sequences of different lengths, each with λ from its own length."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from packed import pack
from support import INTERPRETED

from entropy_attn import attention, attention_varlen

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch warns that nested tensors are a prototype
LENGTHS = ((5, 70, 0, 33), (9, 70, 3, 1))
SCALES = torch.linspace(0.05, 0.95, 16).view(4, 4)  # of the 4 sequences and 4 heads


def jagged(values, lengths, layout):
    """Packed values (total, H, D) as a nested tensor."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    return nested.transpose(1, 2) if layout == "bhnd" else nested


def inputs(layout="bhnd", H=4, Hkv=2):
    p = pack(*LENGTHS, H, Hkv, 16, 24)
    lengths = (p.lengths_q, p.lengths_k, p.lengths_k)
    return p, [jagged(x, n, layout) for x, n in zip((p.query, p.key, p.value), lengths, strict=True)]


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETED), "auto", "reference"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": SCALES}, {"train_tokens": 50, "train_entropy": 0.5}],
    ids=["plain", "causal", "scale", "scales", "train"],
)
def test_is_attention_varlen(options, layout, backend):
    p, nested = inputs(layout)
    options = options | {"enable_gqa": True, "backend": backend, "return_entropy": True, "return_lse": True}
    got = attention(*nested, layout=layout, **options)
    packed = attention_varlen(*p.arguments, **options)
    out = got.out.transpose(1, 2) if layout == "bhnd" else got.out
    assert torch.equal(out.values(), packed.out)
    assert torch.equal(got.entropy.values(), packed.entropy)
    assert torch.equal(got.lse.values(), packed.lse)
    assert got.out.shape[:3] == nested[0].shape[:3]
    assert [x.shape for x in got.entropy.unbind()] == [(4, n) for n in LENGTHS[0]]
    plain = attention(*nested, layout=layout, **options | {"return_entropy": False, "return_lse": False})
    assert torch.equal(plain.unbind()[1], got.out.unbind()[1]) or backend == "auto"


def test_is_sdpa_argument_for_argument():
    query, key, value = (jagged(x, (5, 70, 33), "bhnd") for x in pack((5, 70, 33)).arguments[:3])
    got, sdpa = attention(query, key, value), F.scaled_dot_product_attention(query, key, value)
    assert got.values().stride() == sdpa.values().stride()
    assert (got + query).shape == sdpa.shape  # the ragged axis is that of query
    for a, b in zip(got.unbind(), sdpa.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def with_holes():
    start, length = torch.tensor([0, 2]), torch.tensor([3, 4])
    return torch.nested.narrow(torch.zeros(2, 9, 4, 16), 1, start, length, layout=torch.jagged).transpose(1, 2)


def changed(**changes):
    _, nested = inputs()
    return dict(zip(("query", "key", "value"), nested, strict=True)) | {"enable_gqa": True} | changes


def strided(*tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(tensors))


OTHER = jagged(torch.zeros(83, 2, 24), (9, 71, 3, 0), "bhnd")
ERRORS = {
    "a dense key": (dict(key=torch.zeros(4, 2, 9, 16)), TypeError, "key must be a jagged nested tensor, as query"),
    "no tensor": (dict(value=[1.0]), TypeError, "value must be a jagged nested tensor, as query is, got list"),
    "heads ragged": (dict(layout="bnhd"), TypeError, r"query must be .* axis 1 is ragged, got .* \[2\]"),
    "3 axes": (dict(query=jagged(torch.zeros(8, 16), (3, 5), "bnhd")), TypeError, "query must be .*3 axes"),
    "holes": (dict(query=with_holes()), TypeError, "query must be .* without holes .*attention_varlen"),
    "lengths of value": (dict(value=OTHER), ValueError, "value must have the lengths of key"),
    "batch sizes": (
        dict(query=jagged(torch.zeros(8, 4, 16), (3, 5), "bhnd")), ValueError, "the same batch size, got 2, 4 and 4"
    ),
    "mask": (dict(attn_mask=torch.ones(9, 9)), ValueError, "attn_mask must be None where query is a jagged"),
    "num_tokens": (dict(train_tokens=9, num_tokens=9), ValueError, "num_tokens must be None where query is a jagged"),
    "dropout": (dict(dropout_p=0.1), ValueError, "dropout_p must be 0, got 0.1"),
    "layout": (dict(layout="hbnd"), ValueError, "layout must be 'bhnd' or 'bnhd'"),
    "strided nested": (
        dict(query=strided(torch.zeros(4, 5, 16))), TypeError, "query must be a strided .* nested"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_refused(case):
    changes, error, message = ERRORS[case]
    attention(**changed())
    with pytest.raises(error, match=message):
        attention(**changed(**changes))


def test_derivatives_are_refused():
    p, (query, key, value) = inputs()
    query = jagged(p.query.clone().requires_grad_(), p.lengths_q, "bhnd")
    with pytest.raises(ValueError, match="query requires grad, and attention has no derivative"):
        attention(query, key, value, enable_gqa=True)
    with torch.no_grad():
        attention(query, key, value, enable_gqa=True)
