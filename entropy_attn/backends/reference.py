"""The textbook form, for checking the other backends: all scores in memory, all arithmetic in float64."""

from __future__ import annotations

import functools

import torch

from entropy_attn.backends import loop, new_outputs, rule_as_tensor


def forward(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse):
    out, entropy, lse = new_outputs(query, value, return_entropy, return_lse)
    groups = query.shape[1] // max(1, key.shape[1])
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scale = rule_as_tensor(scale, query)
    if isinstance(scale, torch.Tensor):
        scale = scale.double()[..., None]
    scores = query.double() @ key.mT * scale  # (B, H, Nq, Nk)

    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    elif attn_mask is not None:
        attn_mask = attn_mask.expand(scores.shape)
        visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
        if attn_mask.dtype != torch.bool:
            scores = scores + attn_mask
    scores = scores.masked_fill(~visible, float("-inf"))
    # The value of a key that no query sees must not reach the output, even if it is NaN.
    value = value.masked_fill(~visible.any(dim=-2).unsqueeze(-1), 0.0)

    empty = ~visible.any(dim=-1, keepdim=True)
    log_p = scores.log_softmax(dim=-1).masked_fill(empty, float("-inf"))
    p = log_p.exp()
    out.copy_(p @ value)
    if return_lse:
        lse.copy_(scores.logsumexp(dim=-1))
    if return_entropy:
        entropy.copy_(-(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1))
    return out, entropy, lse


forward_varlen = functools.partial(loop.forward_varlen, forward)
