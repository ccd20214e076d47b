"""CPU: PyTorch's own SDPA where that gives all that was asked for, else blocks of queries against all their keys.

The block route computes in float32 (float64 for float64 inputs) and never holds more than a few blocks of scores, so
its memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from entropy_attn.backends import heads_lie_inside_tokens, new_outputs

# A thread works on ROWS queries against KEYS keys at a time: with their exponentials they fit a core's level-2 cache.
ROWS, KEYS = 512, 256
# Logits known to stay within this need no running maximum: exp() is far from overflow and underflow, and
# ln l - t/l loses at most LOGIT_BOUND * 2^-23 = 4e-6 nats to cancellation.
LOGIT_BOUND = 30.0
# Up to this head dim PyTorch's kernel spends its time on exponentials, and takes a value of twice the width for little.
FLASH_HEAD_DIM = 16
FLASH_LSE_BOUND = 15.0  # in magnitude; lse - λ q·(P K) is then right to 1e-5 nats
LOWEST = torch.finfo(torch.float32).min


def forward(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy):
    hides = is_causal or attn_mask is not None
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    clean = not hides or bool(key.isfinite().all() and value.isfinite().all())
    if clean and key.shape[2] > 0 and not (return_lse or return_entropy or isinstance(scale, torch.Tensor)):
        return _sdpa(query, key, value, attn_mask, scale, is_causal)
    result = None if hides else _flash(query, key, value, scale, return_lse, return_entropy)
    if result is not None:
        return result
    if not clean:
        value = _without_hidden(value, attn_mask, query.shape[1], query.shape[2])
    return _blockwise(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy)


def _sdpa(query, key, value, attn_mask, scale, is_causal):
    _, H, Nq, _ = query.shape
    Dv = value.shape[3]
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=key.shape[1] != H
    )
    # Those of `new_outputs`, without making them.
    strides = (Nq * H * Dv, Dv, H * Dv, 1) if heads_lie_inside_tokens(query) else (H * Nq * Dv, Nq * Dv, Dv, 1)
    if result.stride() == strides:
        return result, None, None
    out, _, _ = new_outputs(query, value, False, False)
    return out.copy_(result), None, None


def _flash(query, key, value, scale, return_lse, return_entropy):
    """PyTorch's own kernel attending to [K, V] in the place of V: H = lse - λ q·(P K). None where that is not the way.

    It is for heads so small that the kernel's time goes into exponentials, and for rows whose lse is so small that the
    difference loses no digits.
    """
    D = query.shape[3]
    if query.dtype != torch.float32 or D > FLASH_HEAD_DIM or value.shape != key.shape or query.shape[1] != key.shape[1]:
        return None
    if isinstance(scale, torch.Tensor) or query.numel() == 0 or key.numel() == 0:
        return None
    both = torch.cat((key, value), -1)
    attended, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        F.pad(query, (0, D)), both, both, scale=scale
    )
    if not -FLASH_LSE_BOUND <= float(row_lse.min()) <= float(row_lse.max()) <= FLASH_LSE_BOUND:
        return None
    out, lse, entropy = new_outputs(query, value, return_lse, return_entropy)
    out.copy_(attended[..., D:])
    if return_entropy:
        score = attended[..., :D].mul_(query).sum(-1)
        torch.sub(row_lse, score, alpha=scale, out=entropy).clamp_(min=0.0)  # rounding may dip below 0
    return out, lse.copy_(row_lse) if return_lse else lse, entropy


def _without_hidden(value, attn_mask, H, Nq):
    """`value` with 0 in the rows that no query sees: 0 * NaN would carry them into the output."""
    B, Hkv, Nk, _ = value.shape
    if attn_mask is None:  # causal
        seen = torch.arange(Nk, device=value.device) < Nq
    else:
        # Along the axes it was expanded over, once is enough.
        compact = attn_mask[tuple(slice(1 if stride == 0 else None) for stride in attn_mask.stride())]
        seen = (~_hidden(compact)).any(dim=-2).expand(B, H, Nk)
        seen = seen.unflatten(1, (Hkv, H // Hkv)).any(dim=2)
    return value.masked_fill(~seen.unsqueeze(-1), 0.0)


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    return ~mask if mask.dtype == torch.bool else mask == float("-inf")


class _Group(NamedTuple):
    """Some batch entries and heads, g of them in all, that are worked on together; in the dtype to compute in."""

    batch: slice
    heads: slice
    query: torch.Tensor  # (g, Nq, D), scaled
    key: torch.Tensor  # (g, D, Nk)
    value: torch.Tensor  # (g, Nk, Dv)


class _Rows(NamedTuple):
    """The running softmax of g * r rows: the formulas of `kernels.attention`, in base e."""

    peak: torch.Tensor  # (g, r): m
    total: torch.Tensor  # (g, r): l
    centred: torch.Tensor  # (g, r): t
    acc: torch.Tensor  # (g, r, Dv)


def _blockwise(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy):
    out, lse, entropy = new_outputs(query, value, return_lse, return_entropy)
    B, H, Nq, _ = query.shape
    Nk, Dv = value.shape[2:]
    if B * H * Nq == 0:
        return out, lse, entropy
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    r, n = min(ROWS, Nq), max(1, min(KEYS, Nk))
    together = torch.get_num_threads() * max(1, ROWS * KEYS // (r * n))
    scratch = torch.empty((2, min(together, B * H) * r * n), dtype=compute, device=query.device)

    for group in _groups(query, key, value, scale, together, compute):
        g = group.query.shape[0]
        bounded = (attn_mask is None or attn_mask.dtype == torch.bool) and _is_bounded(group)
        mask = None if attn_mask is None else attn_mask[group.batch, group.heads]
        peak = group.query.new_full((g, Nq), 0.0 if bounded else LOWEST)
        total, centred = group.query.new_zeros((2, g, Nq))
        keys = [(j, group.key[..., j : j + n], group.value[:, j : j + n]) for j in range(0, Nk, n)]
        for start in range(0, Nq, r):
            rows = slice(start, min(start + r, Nq))
            q = group.query[:, rows]
            state = _Rows(peak[:, rows], total[:, rows], centred[:, rows], q.new_zeros((g, q.shape[1], Dv)))
            for first, k, v in keys:
                if is_causal and first >= rows.stop:
                    break
                block_mask = None if mask is None else mask[:, :, rows, first : first + n].flatten(0, 1)
                if is_causal and first + n > start + 1:
                    block_mask = k.new_ones((q.shape[1], k.shape[2]), dtype=torch.bool).tril(start - first)
                _attend(state, q, k, v, block_mask, bounded, scratch)
            divisor = state.total.where(state.total != 0, 1.0)  # rows that saw no key stay 0
            target = out[group.batch, group.heads, rows]
            target.copy_(state.acc.div_(divisor.unsqueeze(-1)).view(target.shape))
        if return_lse:
            rows_lse = peak + total.log()
            lse[group.batch, group.heads] = rows_lse.view(target.shape[0], -1, Nq)
        if return_entropy:
            rows_entropy = (total.log() - centred / total).clamp(min=0.0)  # rounding may dip below 0
            entropy[group.batch, group.heads] = rows_entropy.where(total != 0, 0.0).view(target.shape[0], -1, Nq)
    return out, lse, entropy


def _attend(rows: _Rows, query, key, value, mask, bounded: bool, scratch) -> None:
    """Fold the keys (g, D, n) and values (g, n, Dv) into the rows of query (g, r, D), in place."""
    g, r, n = query.shape[0], query.shape[1], key.shape[2]
    scores, weights = scratch[:, : g * r * n].view(2, g, r, n).unbind()
    torch.bmm(query, key, out=scores)
    if mask is not None:
        if mask.dtype != torch.bool:
            scores += mask
        scores.masked_fill_(_hidden(mask), float("-inf"))
    if not bounded:
        _raise_peak(rows, scores)
    torch.exp(scores, out=weights)
    if mask is not None:
        scores.clamp_(min=-1000.0)  # a hidden key has weight 0, and 0 * -inf must be 0
    scores *= weights
    rows.total.add_(weights.sum(dim=-1))
    rows.centred.add_(scores.sum(dim=-1))
    torch.baddbmm(rows.acc, weights, value, out=rows.acc)


def _raise_peak(rows: _Rows, scores: torch.Tensor) -> None:
    """Move the running maximum to that of `scores` too, and make the scores relative to it."""
    peak = torch.maximum(rows.peak, scores.amax(dim=-1))
    drop = rows.peak - peak
    decay = drop.exp()
    rows.centred.addcmul_(rows.total, drop).mul_(decay)
    rows.total.mul_(decay)
    rows.acc.mul_(decay.unsqueeze(-1))
    rows.peak.copy_(peak)
    scores -= peak.unsqueeze(-1)


def _is_bounded(group: _Group) -> bool:
    """Whether no logit of the group can exceed LOGIT_BOUND: |q·k| <= |q| |k|."""
    if group.key.shape[2] == 0:
        return True
    longest = (group.query * group.query).sum(2).amax(1) * (group.key * group.key).sum(1).amax(1)
    return bool((longest <= LOGIT_BOUND**2).all())


def _groups(query, key, value, scale, together: int, compute: torch.dtype) -> Iterator[_Group]:
    """Cut batch and heads into groups of at most `together`."""
    B, H, _, _ = query.shape
    queries_per_kv = H // key.shape[1]
    heads_step = min(H, together)
    batch_step = max(1, together // H)
    for b in range(0, B, batch_step):
        for h in range(0, H, heads_step):
            batch, heads = slice(b, min(b + batch_step, B)), slice(h, min(h + heads_step, H))
            kv = heads
            if queries_per_kv > 1:
                kv = torch.arange(heads.start, heads.stop, device=key.device) // queries_per_kv
            q = query[batch, heads].to(compute)
            q = q * (scale[batch, heads, None, None].to(compute) if isinstance(scale, torch.Tensor) else scale)
            k = key[batch, kv].to(compute).mT.contiguous()
            v = value[batch, kv].to(compute)
            yield _Group(batch, heads, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
