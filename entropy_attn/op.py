"""``torch.ops.entropy_attn.attention``: one opaque operator, so that λ is computed from N and T when it runs.

A graph that holds it has no λ in it, only the integers λ comes from: it is compiled once for any number of sizes.
"""

from __future__ import annotations

import math

import torch

from entropy_attn.backends import choose, load, new_outputs
from entropy_attn.scale import entropy_scale

_library = torch.library.Library("entropy_attn", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? scale_tensor, float? scale, "
    "SymInt? train_tokens, float train_entropy, SymInt? num_tokens, bool is_causal, bool return_lse, "
    "bool return_entropy, str backend) -> (Tensor out, Tensor lse, Tensor entropy)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def resolve_scale(query, key, scale, train_tokens, train_entropy, num_tokens) -> float:
    """λ as a number, from whichever of the arguments of `attention` decide it."""
    if train_tokens is not None:
        num_tokens = key.shape[2] if num_tokens is None else num_tokens
        return entropy_scale(num_tokens, train_tokens, query.shape[3], train_entropy)
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else scale


def forward(
    query, key, value, attn_mask, scale_tensor, scale, train_tokens, train_entropy, num_tokens,
    is_causal, return_lse, return_entropy, backend,
):  # fmt: skip
    """What the operator does, on arguments that `attention` has checked."""
    B, H, Nq, _ = query.shape
    if scale_tensor is None:
        scale = resolve_scale(query, key, scale, train_tokens, train_entropy, num_tokens)
    else:  # (), (B,) or (B, H)
        scale = scale_tensor[:, None].expand(B, H) if scale_tensor.dim() == 1 else scale_tensor.expand(B, H)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(B, H, Nq, key.shape[2])
    run = load(choose(query, value, backend).name)
    return run(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy)


_library.impl("attention", forward, "CompositeExplicitAutograd")


@torch.library.register_fake("entropy_attn::attention", lib=_library)
def _fake(
    query, key, value, attn_mask, scale_tensor, scale, train_tokens, train_entropy, num_tokens,
    is_causal, return_lse, return_entropy, backend,
):  # fmt: skip
    return new_outputs(query, value, return_lse, return_entropy)
