"""``torch.ops.entropy_attn.attention``: the operator behind `attention`.

The operator takes N and T and computes λ when it runs. A compiled graph therefore holds integers, which torch.compile
makes symbolic, and one graph serves every size. A float λ would recompile for each size.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.autograd.forward_ad import unpack_dual

from entropy_attn import checks
from entropy_attn.backends import load, new_outputs
from entropy_attn.scale import entropy_scale, tensor_scale


def resolve_scale(head_dim, Nk, scale, train_tokens, train_entropy, num_tokens) -> float:
    """λ as a number: from the rule if train_tokens is given, else `scale`, else 1/sqrt(head_dim)."""
    if train_tokens is not None:
        num_tokens = Nk if num_tokens is None else num_tokens
        return entropy_scale(num_tokens, train_tokens, head_dim, train_entropy)
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def scale_as_tensor(query, scale_tensor, train_tokens, train_entropy, num_tokens_tensor) -> torch.Tensor | None:
    """λ as a view (B, H, Nq) if it is a tensor, else None: `scale_tensor`, or the rule's with `num_tokens_tensor`."""
    if num_tokens_tensor is not None:  # (B,)
        dtype = torch.promote_types(query.dtype, torch.float32)
        scale_tensor = tensor_scale(num_tokens_tensor, train_tokens, query.shape[3], train_entropy, dtype)
    if scale_tensor is None:
        return None
    while 0 < scale_tensor.dim() < 3:  # (B,) and (B, H)
        scale_tensor = scale_tensor.unsqueeze(-1)
    return scale_tensor.expand(query.shape[:3])


# Only for the running operator: while tracing, sizes are symbolic and cannot be keys of a cache.
_remembered_scale = functools.lru_cache(maxsize=1024)(resolve_scale)


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
    resolved: float | torch.Tensor | None
    resolved = scale_as_tensor(query, scale_tensor, train_tokens, train_entropy, num_tokens_tensor)
    if resolved is None:
        resolved = _remembered_scale(query.shape[3], key.shape[2], scale, train_tokens, train_entropy, num_tokens)
    run = load(query, value, backend)
    return _tensors(query, run(query, key, value, attn_mask, resolved, is_causal, return_entropy, return_lse))


def _tensors(query, outputs):
    """The outputs with an empty tensor for each that was not asked for: an operator cannot return None."""
    return tuple(query.new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)


def _fake(query, key, value, attn_mask, scale_tensor, *rest):
    *_, return_entropy, return_lse, _ = rest
    return _tensors(query, new_outputs(query, value, return_entropy, return_lse))


def _refuse_derivatives(keyset, query, key, value, attn_mask, scale_tensor, *rest):
    """The kernel for the Autograd keys: raises where a backward- or forward-mode derivative is asked for."""
    inputs = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "scale": scale_tensor}
    if torch.is_grad_enabled():
        checks.refuse_grad(**inputs)
    for name, tensor in inputs.items():
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise checks.no_derivative(name, "has a tangent (torch.func.jvp, forward-mode derivatives)")
    with torch.no_grad():
        below = keyset.remove(keyset.highestPriorityTypeId())
        return torch.ops.entropy_attn.attention.default.redispatch(
            below, query, key, value, attn_mask, scale_tensor, *rest
        )


def _autocast(device_type: str):
    """The kernel for an Autocast key: as for SDPA, floating inputs but float64 are cast. λ stays in float32."""

    def cast(tensor):
        return tensor if tensor is None else tensor.to(checks.dtype_of(tensor))

    def operator(query, key, value, attn_mask, *rest):
        inputs = [cast(tensor) for tensor in (query, key, value, attn_mask)]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.entropy_attn.attention(*inputs, *rest)

    return operator


_library = torch.library.Library("entropy_attn", "DEF")
_library.define(
    "attention" + torch.library.infer_schema(_attention, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", _refuse_derivatives, "Autograd", with_keyset=True)
_library.impl("attention", _autocast("cpu"), "AutocastCPU")
_library.impl("attention", _autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("entropy_attn::attention", _fake, lib=_library)
