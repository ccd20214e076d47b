"""``torch.ops.entropy_attn.attention`` and ``attention_varlen``: the operators behind the public functions.

The operators take N and T and compute λ when they run. A compiled graph therefore holds integers, which torch.compile
makes symbolic, and one graph serves every size. A float λ would recompile for each size.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from torch.autograd.forward_ad import unpack_dual

from entropy_attn import checks, checks_varlen
from entropy_attn.backends import Packed, load, new_outputs, new_varlen_outputs, scale_of_rows
from entropy_attn.scale import LengthRule, SampleRule, entropy_scale


def scale_number(head_dim, Nk, scale, train_tokens, train_entropy, num_tokens) -> float:
    """λ as a number: from the rule if train_tokens is given, else `scale`, else 1/sqrt(head_dim)."""
    if train_tokens is not None:
        num_tokens = Nk if num_tokens is None else num_tokens
        return entropy_scale(num_tokens, train_tokens, head_dim, train_entropy)
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


# Only for the running operator: while tracing, sizes are symbolic and cannot be keys of a cache.
_remembered_scale = functools.lru_cache(maxsize=1024)(scale_number)


def resolve_scale(
    query, key, scale_tensor, scale, train_tokens, train_entropy, num_tokens, num_tokens_tensor, number=scale_number
) -> float | torch.Tensor | SampleRule:
    """λ in the form that a backend takes. number: `scale_number`, or one that remembers."""
    if num_tokens_tensor is not None:
        rule = SampleRule(num_tokens_tensor, train_tokens, train_entropy)
        rule.check()
        return rule
    if scale_tensor is not None:
        return scale_of_rows(scale_tensor, query)
    return number(query.shape[3], key.shape[2], scale, train_tokens, train_entropy, num_tokens)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale_tensor: torch.Tensor | None,
    scale: float | None,
    train_tokens: int | None,
    train_entropy: float,
    num_tokens: int | None,
    num_tokens_tensor: torch.Tensor | None,
    is_causal: bool,
    return_entropy: bool,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, entropy and lse from the arguments that `checks.operator_arguments` returns, in this order.

    The operator's schema is this signature.
    """
    rule = (train_tokens, train_entropy, num_tokens, num_tokens_tensor)
    resolved = resolve_scale(query, key, scale_tensor, scale, *rule, _remembered_scale)
    run = load(query, value, backend).forward
    return _tensors(query, run(query, key, value, attn_mask, resolved, is_causal, return_entropy, return_lse))


def _tensors(query, outputs):
    """The outputs with an empty tensor for each that was not asked for: an operator cannot return None."""
    return tuple(query.new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)


def _fake(query, key, value, attn_mask, scale_tensor, *rest):
    *_, return_entropy, return_lse, _ = rest
    return _tensors(query, new_outputs(query, value, return_entropy, return_lse))


def _attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale_tensor: torch.Tensor | None,
    train_tokens_tensor: torch.Tensor | None,
    train_entropy_tensor: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    train_tokens: int | None,
    train_entropy: float,
    is_causal: bool,
    check: bool,
    return_entropy: bool,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, entropy and lse from the arguments that `checks_varlen.operator_arguments` returns, in this order.

    The operator's schema is this signature.
    """
    packed = Packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if check or cu_seqlens_q.device.type == "cpu":
        checks_varlen.check_lengths(packed)
    T = train_tokens if train_tokens_tensor is None else train_tokens_tensor
    resolved: float | torch.Tensor | LengthRule
    if T is not None:
        resolved = LengthRule(T, train_entropy if train_entropy_tensor is None else train_entropy_tensor)
        resolved.check()
    elif scale_tensor is not None:
        if scale_tensor.dim() == 1:
            scale_tensor = scale_tensor.unsqueeze(-1)
        resolved = scale_tensor.expand(cu_seqlens_q.shape[0] - 1, query.shape[1])
    else:
        resolved = 1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    run = load(query, value, backend).forward_varlen
    return _tensors(query, run(packed, resolved, is_causal, return_entropy, return_lse))


def _fake_varlen(query, key, value, *rest):
    *_, return_entropy, return_lse, _ = rest
    return _tensors(query, new_varlen_outputs(query, value, return_entropy, return_lse))


def _register(name: str, function, fake, cast: tuple[str, ...], differentiable: tuple[str, ...]) -> None:
    """Define an operator whose schema is the signature of `function`. `cast`: the inputs that autocast casts.
    `differentiable`: those of which a derivative is refused."""
    _library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.entropy_attn, name).default
    place = {name: i for i, name in enumerate(inspect.signature(function).parameters)}
    refused = [(name.removesuffix("_tensor"), place[name]) for name in differentiable]

    def refuse_derivatives(keyset, *arguments):
        """The kernel for the Autograd keys: raises where a backward- or forward-mode derivative is asked for."""
        inputs = {name: arguments[i] for name, i in refused}
        if torch.is_grad_enabled():
            checks.refuse_grad(**inputs)
        for name, tensor in inputs.items():
            if tensor is not None and unpack_dual(tensor).tangent is not None:
                raise checks.no_derivative(name, "has a tangent (torch.func.jvp, forward-mode derivatives)")
        with torch.no_grad():
            return operator.redispatch(keyset.remove(keyset.highestPriorityTypeId()), *arguments)

    def autocast(device_type: str):
        """The kernel for an Autocast key: as for SDPA, floating inputs but float64 are cast. λ stays in float32."""

        def run(*arguments):
            given = list(arguments)
            for name in cast:
                tensor = given[place[name]]
                given[place[name]] = tensor if tensor is None else tensor.to(checks.dtype_of(tensor))
            with torch.autocast(device_type, enabled=False):
                return operator(*given)

        return run

    _library.impl(name, function, "CompositeExplicitAutograd")
    _library.impl(name, refuse_derivatives, "Autograd", with_keyset=True)
    _library.impl(name, autocast("cpu"), "AutocastCPU")
    _library.impl(name, autocast("cuda"), "AutocastCUDA")
    torch.library.register_fake(f"entropy_attn::{name}", fake, lib=_library)


_library = torch.library.Library("entropy_attn", "DEF")
_INPUTS = ("query", "key", "value")
_register(
    "attention", _attention, _fake,
    cast=(*_INPUTS, "attn_mask"), differentiable=(*_INPUTS, "attn_mask", "scale_tensor"),
)  # fmt: skip
_register(
    "attention_varlen", _attention_varlen, _fake_varlen,
    cast=_INPUTS, differentiable=(*_INPUTS, "scale_tensor", "train_entropy_tensor"),
)  # fmt: skip
