"""`attention` and its operator have no derivative. Every way of requesting one raises an error."""

import pytest
import torch
from torch.autograd import forward_ad

from entropy_attn import attention

NAMES = ("query", "key", "value", "attn_mask", "scale")


def inputs():
    g = torch.Generator().manual_seed(0)
    shapes = {"query": (1, 2, 6, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8), "attn_mask": (6, 5), "scale": (1, 2)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def operator(query, key, value, attn_mask, scale, backend="cpu"):
    options = (None, None, 0.0, None, None, False, False, False, backend)
    return torch.ops.entropy_attn.attention(query, key, value, attn_mask, scale, *options)[0]


WAYS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
    "autograd": lambda f, x: f(x.clone().requires_grad_()).sum().backward(),
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x.clone().requires_grad_(), use_reentrant=False),
}


@pytest.mark.parametrize("function", [attention, operator], ids=["attention", "operator"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_no_derivative(function, way, name):
    given = inputs()
    with pytest.raises(ValueError, match=f"^{name} .*no derivative.*scaled_dot_product_attention"):
        WAYS[way](lambda x: function(**(given | {name: x})), given[name])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("function", [attention, operator], ids=["attention", "operator"])
def test_dual_numbers(function, backend):
    given = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given["query"], given["query"])
        with pytest.raises(ValueError, match="query has a tangent"):
            function(**(given | {"query": dual}), backend=backend)


@pytest.mark.parametrize("function", [attention, operator], ids=["attention", "operator"])
@pytest.mark.parametrize("name", NAMES)
def test_without_grad_mode_the_input_is_taken_as_it_is(function, name):
    given = inputs()
    expected = function(**given)
    given[name].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = function(**given)
        assert not out.requires_grad
        assert out.grad_fn is None
        torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func.vmap without a batching rule
def test_functional_transforms_without_a_derivative():
    given = inputs()
    batch = torch.stack([given["query"], 2 * given["query"]])
    rest = {name: x for name, x in given.items() if name != "query"}
    mapped = torch.func.vmap(lambda query: attention(query, **rest))(batch)
    for got, query in zip(mapped, batch, strict=True):
        torch.testing.assert_close(got, attention(query, **rest))
