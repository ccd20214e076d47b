"""A rejected call raises before anything runs. The error names the argument, what was given and what is allowed."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import entropy_attn.backends
from entropy_attn import attention, explain


def tensors(B=2, H=4, Hkv=4, Nq=6, Nk=5, D=8, Dv=8, dtype=torch.float32):
    return {
        "query": torch.zeros(B, H, Nq, D, dtype=dtype),
        "key": torch.zeros(B, Hkv, Nk, D, dtype=dtype),
        "value": torch.zeros(B, Hkv, Nk, Dv, dtype=dtype),
    }


def as_masked(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that masked tensors are a prototype
        return masked_tensor(data, data)


def as_nested(data, layout=torch.strided):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that nested tensors are a prototype
        return torch.nested.nested_tensor(data, layout=layout)


class Doubled(torch.Tensor):
    """A subclass whose values are twice its data."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, [2 * x for x in args], kwargs)


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


META = torch.zeros(2, 4, 5, 8, device="meta")
MASK = torch.ones(2, 1, 6, 5, dtype=torch.bool)
FINITE = r"scale must be finite \(at most 2.359e\+38 in magnitude\), got "

CASES = {
    "query not a tensor": (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
    "key with 3 axes": (dict(key=torch.zeros(4, 5, 8)), ValueError, r"key must have 4 axes .*got shape \(4, 5, 8\)"),
    "integer dtype": (tensors(dtype=torch.int32), ValueError, "query must be of float16.*got torch.int32"),
    "mixed dtypes": (dict(key=torch.zeros(2, 4, 5, 8).half()), ValueError, "key must have the dtype of query"),
    "mixed devices": (dict(value=META), ValueError, "value must be on the device of query, cpu, got meta"),
    "batch sizes": (dict(key=torch.zeros(1, 4, 5, 8)), ValueError, "the same batch size, got 2, 1 and 2"),
    "head dims": (dict(key=torch.zeros(2, 4, 5, 16)), ValueError, "key must have the head dim of query, 8, got 16"),
    "head dim 0": (tensors(D=0), ValueError, "query must have a head dim of at least 1, got 0"),
    "value tokens": (dict(value=torch.zeros(2, 4, 7, 8)), ValueError, "heads and tokens of key, 4 and 5, got 4 and 7"),
    "value heads": (dict(value=torch.zeros(2, 2, 5, 8)), ValueError, "heads and tokens of key, 4 and 5, got 2 and 5"),
    "fewer heads without gqa": (tensors(Hkv=2), ValueError, "heads of query, 4, got 2 .*enable_gqa=True"),
    "heads no multiple": (tensors(Hkv=3) | dict(enable_gqa=True), ValueError, "must be a multiple .*got 4 and 3"),
    "dropout": (dict(dropout_p=0.1), ValueError, "dropout_p must be 0, got 0.1"),
    "causal and mask": (dict(is_causal=True, attn_mask=MASK), ValueError, "is_causal and attn_mask cannot be given"),
    "mask not a tensor": (dict(attn_mask=[True]), TypeError, "attn_mask must be a tensor, got list"),
    "mask dtype": (dict(attn_mask=MASK.int()), ValueError, "attn_mask must be of torch.bool, .*got torch.int32"),
    "mask device": (dict(attn_mask=MASK.to("meta")), ValueError, "attn_mask must be on the device of query"),
    "mask shape": (dict(attn_mask=MASK[:, :, :4]), ValueError, r"\(2, 4, 6, 5\).*got shape \(2, 1, 4, 5\)"),
    "mask with 1 axis": (dict(attn_mask=MASK[0, 0, 0]), ValueError, r"from 2 to 4 axes, got shape \(5,\)"),
    "scale infinite": (dict(scale=math.inf), ValueError, FINITE + "inf"),
    "scale of another shape": (
        dict(scale=torch.ones(2, 3, 5)),
        ValueError,
        r"scale must have shape \(\), \(B,\) = .* or \(B, H, Nq\) = .*, got \(2, 3, 5\)",
    ),
    "num_tokens floating": (
        dict(train_tokens=64, num_tokens=torch.ones(2)),
        ValueError,
        "num_tokens must be a number, or a tensor of int32 or int64, got torch.float32",
    ),
    "num_tokens of another shape": (
        dict(train_tokens=64, num_tokens=torch.ones(7, dtype=torch.int64)),
        ValueError,
        r"num_tokens must have shape \(B,\) = .*, got \(7,\)",
    ),
    "num_tokens a tensor alone": (
        dict(num_tokens=torch.ones(2, dtype=torch.int64)),
        ValueError,
        "num_tokens needs train_tokens, got num_tokens=a tensor alone",
    ),
    "scale nan": (dict(scale=math.nan), ValueError, FINITE + "nan"),
    "scale beyond float32": (dict(scale=1e39), ValueError, FINITE + r"1e\+39"),
    "scale 0 bits too large": (dict(scale=2.4e38), ValueError, FINITE + r"2.4e\+38"),
    "dropout a tensor": (dict(dropout_p=torch.zeros(1)), TypeError, "dropout_p must be a float, got torch.Tensor"),
    "T beyond int64": (dict(train_tokens=10**30), ValueError, r"train_tokens must be below 2\*\*63, got 10000"),
    "N beyond int64": (dict(train_tokens=9, num_tokens=2**63), ValueError, r"num_tokens must be below 2\*\*63"),
    "T below int64": (dict(train_tokens=-(10**30)), ValueError, r"train_tokens must be above -2\*\*63, got -10000"),
    "N below int64": (dict(train_tokens=9, num_tokens=-(2**70)), ValueError, r"num_tokens must be above -2\*\*63"),
    "H_T beyond float64": (dict(train_tokens=9, train_entropy=10**400), ValueError, "train_entropy must be finite in "),
    "scale beyond float64": (dict(scale=-(10**400)), ValueError, "scale must be finite in float64, got an int of 1329"),
    "T a numpy float": (dict(train_tokens=np.float64(9)), TypeError, "train_tokens must be an int, got numpy.float64"),
    "flag a numpy int": (dict(is_causal=np.int64(1)), TypeError, "is_causal must be a bool, got numpy.int64"),
    "sparse": (
        dict(query=torch.zeros(2, 4, 6, 8).to_sparse()),
        TypeError,
        "query must be a strided .*sparse_coo",
    ),
    "nested": (dict(key=as_nested([torch.zeros(4, 5, 8)] * 2)), TypeError, "key must be a strided tensor.*nested"),
    "jagged": (
        dict(key=as_nested([torch.zeros(4, 5)] * 2, torch.jagged)),
        TypeError,
        "key must be .*NestedTensor",
    ),
    "sparse mask": (
        dict(attn_mask=MASK[0, 0].to_sparse()),
        TypeError,
        "attn_mask must be a strided .*sparse_coo",
    ),
    "masked tensor": (dict(attn_mask=as_masked(MASK[0, 0])), TypeError, r"attn_mask must be a plain .*MaskedTensor"),
    "scale of a subclass": (
        dict(scale=Doubled(torch.ones(2))),
        TypeError,
        "scale must be a plain .*Doubled",
    ),
    "query of a subclass": (dict(query=Doubled(torch.ones(2, 4, 6, 8))), TypeError, "query must be a plain .*Doubled"),
    "key that dispatches": (
        dict(key=torch.zeros(2, 4, 5, 8).as_subclass(Dispatching)),
        TypeError,
        "key must be a plain .*Dispatching",
    ),
    "causal bias and causal": (
        dict(attn_mask=causal_upper_left(6, 5), is_causal=True),
        ValueError,
        "is_causal and attn_mask cannot be given",
    ),
    "causal bias of another size": (
        dict(attn_mask=causal_upper_left(6, 7)),
        ValueError,
        r"attn_mask must be for \(6, 5\) .* got one for \(6, 7\)",
    ),
    "scale a string": (dict(scale="0.1"), TypeError, "scale must be a float or a tensor, got str"),
    "scale shape": (dict(scale=torch.ones(4)), ValueError, r"shape \(\), \(B,\) = \(2,\), .*got \(4,\)"),
    "scale dtype": (dict(scale=torch.ones(2).half()), ValueError, "scale must be a float32 tensor .*got torch.float16"),
    "scale device": (dict(scale=torch.ones(2, device="meta")), ValueError, "scale must be on the device of query"),
    "scale and T": (dict(scale=0.1, train_tokens=9), ValueError, "scale and train_tokens cannot be given together"),
    "N without T": (dict(num_tokens=9), ValueError, "num_tokens needs train_tokens, got num_tokens=9"),
    "H_T without T": (dict(train_entropy=1.0), ValueError, "train_entropy needs train_tokens"),
    "T a float": (dict(train_tokens=9.0), TypeError, "train_tokens must be an int, got float"),
    "T too small": (dict(train_tokens=1), ValueError, "train_tokens must be at least 2, got 1"),
    "N a float": (dict(train_tokens=9, num_tokens=4.5), TypeError, "num_tokens must be an int or a tensor, got float"),
    "N too small": (tensors(Nk=1) | dict(train_tokens=9), ValueError, "num_tokens must be at least 2, got 1"),
    "H_T too large": (dict(train_tokens=9, train_entropy=2.3), ValueError, "train_entropy must be below ln"),
    "H_T negative": (dict(train_tokens=9, train_entropy=-1.0), ValueError, "train_entropy must be a finite number"),
    "T too small with N of each": (
        dict(train_tokens=1, num_tokens=torch.tensor([3, 4])),
        ValueError,
        "train_tokens must be at least 2, got 1",
    ),
    "H_T too large with N of each": (
        dict(train_tokens=9, train_entropy=2.3, num_tokens=torch.tensor([3, 4])),
        ValueError,
        r"train_entropy must be below ln\(train_tokens\) = 2.1972 nats, got 2.3",
    ),
    "layout": (dict(layout="nbhd"), ValueError, "layout must be 'bhnd' or 'bnhd', got 'nbhd'"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'cpu', 'reference', got"),
    "flag not a bool": (dict(return_entropy="yes"), TypeError, "return_entropy must be a bool, got str"),
}


@pytest.mark.parametrize("call", [attention, explain])
@pytest.mark.parametrize(("arguments", "error", "message"), CASES.values(), ids=CASES)
def test_rejected(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(**(tensors() | arguments))


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "scale"])
def test_inputs_that_require_grad(name):
    arguments = tensors() | {"attn_mask": torch.zeros(6, 5), "scale": torch.ones(())}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad.*scaled_dot_product_attention"):
        attention(**arguments)
    with torch.no_grad():
        assert not attention(**arguments).requires_grad


def test_grad_mode_without_inputs_that_require_grad():
    with torch.enable_grad():
        assert not attention(**tensors()).requires_grad


def test_other_devices_need_another_backend():
    arguments = {name: x.to("meta") for name, x in tensors().items()}
    with pytest.raises(ValueError, match=r"backend='auto'.*CUDA or ROCm device, got query on meta.*'reference'"):
        explain(**arguments)
    with pytest.raises(ValueError, match="backend='cpu' takes tensors on the CPU, got query on meta"):
        explain(**arguments, backend="cpu")


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(entropy_attn.backends, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run this call: .*got query on cpu"):
        attention(**tensors(), backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    backends = entropy_attn.backends
    monkeypatch.setattr(backends, "_triton_is_installed", backends._triton_is_installed.__wrapped__)
    with pytest.raises(ValueError, match="Triton is not installed"):
        attention(**tensors(), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors reach the kernel only in the interpreter")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tensors(dtype=torch.float64), "float16, bfloat16 and float32, got query of torch.float64"),
        (tensors(D=20), "got query with head dim 20"),
        (tensors(Dv=264), "got value with head dim 264"),
        (tensors(D=4), "got query with head dim 4"),
    ],
)
def test_triton_says_what_it_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(**arguments, backend="triton")


def test_explain():
    arguments = tensors(Nk=784, D=40)
    told = explain(**arguments, train_tokens=4096)
    assert (told.backend, told.reason, told.num_tokens) == ("cpu", "query is on the CPU", 784)
    assert told.scale == entropy_attn.entropy_scale(784, 4096, 40)
    assert str(told).splitlines() == [
        "backend  cpu: query is on the CPU",
        f"scale    {told.scale:.6g} (T = 4096, N = 784)",
    ]
    assert explain(**arguments).scale == 1 / math.sqrt(40)
    assert explain(**arguments, scale=torch.ones(2)).scale is None
    assert explain(**arguments, backend="reference").backend == "reference"


def test_explain_with_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.randn(1, 2, 33, 16), static_shapes=False)
    assert "N = 33" in str(explain(fake, fake, fake, train_tokens=64, backend="reference"))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")  # SDPA has NaN in rows without keys, `attention` 0
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(40, 40), (40, 60), (60, 40)])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_causal_bias(variant, sizes, layout, return_entropy):
    """The masks of torch.nn.attention.bias mean what SDPA takes them for. Their data does not hold the mask."""
    Nq, Nk = sizes
    query, key, value = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(i)) for i, n in
                         enumerate((Nq, Nk, Nk)))  # fmt: skip
    mask = torch.ones(Nq, Nk, dtype=torch.bool).tril(0 if variant is causal_upper_left else Nk - Nq)
    expected = attention(query, key, value, mask, backend="reference")
    if layout == "bnhd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    for backend in ("cpu", "reference"):
        found = attention(
            query, key, value, variant(Nq, Nk), layout=layout, return_entropy=return_entropy, backend=backend
        )
        found = found.out if return_entropy else found
        found = found.transpose(1, 2) if layout == "bnhd" else found
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_numpy_numbers_are_taken():
    given = tensors(Nk=9)
    expected = attention(**given, train_tokens=64, num_tokens=9, train_entropy=0.5, is_causal=True)
    numpy = {"train_tokens": np.int64(64), "num_tokens": np.int32(9), "train_entropy": np.float32(0.5)}
    torch.testing.assert_close(attention(**given, **numpy, is_causal=np.bool_(True)), expected)
    for scale in (np.float32(0.25), np.float64(0.25), np.float16(0.25)):
        torch.testing.assert_close(attention(**given, scale=scale), attention(**given, scale=0.25))
    torch.testing.assert_close(attention(**given, scale=np.int64(1)), attention(**given, scale=1))
    assert explain(**given, scale=np.float32(0.25)).scale == 0.25
