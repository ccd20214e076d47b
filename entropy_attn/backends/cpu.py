"""The CPU backend: PyTorch's SDPA where only the output is asked for and SDPA is right; else blocks of queries.

The second way computes a block of queries against all keys, in float32 (float64 for float64 inputs). A worker thread
holds BLOCK scores and their softmax, so memory is linear in the number of tokens. Each worker thread runs PyTorch's
operators on one thread. An operator that runs on all threads waits for the slowest one, and on a busy machine that wait
is long.

A scale that is a tensor multiplies the query before SDPA. In half precision such a call takes blocks of queries.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from entropy_attn.backends import heads_lie_inside_tokens, loop, new_outputs, rule_as_tensor

BLOCK = 1 << 19  # scores that a worker thread holds at a time
FEWEST_ROWS = 16  # the smallest block of queries, however many keys there are
INLINE = 1 << 16  # a call of at most so many scores runs in the calling thread
# With fewer keys PyTorch's SDPA on the CPU gives 0 instead of NaN where a query is NaN (torch 2.13).
SDPA_KEYS = 16


def forward(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse):
    B, H, Nq, _ = query.shape
    Nk = key.shape[2]
    scale = rule_as_tensor(scale, query)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(B, H, Nq, Nk)
    if not (return_lse or return_entropy):
        out = _by_sdpa(query, key, value, attn_mask, scale, is_causal)
        if out is not None:
            return out, None, None
    out, entropy, lse = new_outputs(query, value, return_entropy, return_lse)
    call = _Call(query, key, value, attn_mask, scale, is_causal, out, entropy, lse)
    threads = torch.get_num_threads()
    if threads == 1 or B * H * Nq * Nk <= INLINE:
        for part in _parts(query, Nk, threads):
            _attend(call, part)
    else:
        for _ in _workers(threads, os.getpid()).map(functools.partial(_attend, call), _parts(query, Nk, threads)):
            pass  # the iteration raises what a worker raised
    return out, entropy, lse


forward_varlen = functools.partial(loop.forward_varlen, forward)


def _by_sdpa(query, key, value, attn_mask, scale, is_causal) -> torch.Tensor | None:
    """The output by PyTorch's SDPA, or None where SDPA cannot take the call or is not right."""
    if key.shape[2] < SDPA_KEYS:
        return None
    of_rows = query
    if isinstance(scale, torch.Tensor):
        # SDPA takes one number, so the query is multiplied by the scale, as in `_attend`. In half precision SDPA would
        # read a product rounded to 8 or 11 bits, and the logits would be wrong by far more than float32's rounding.
        if query.dtype != _compute_dtype(query):
            return None
        of_rows, scale = query * scale.to(query.dtype).unsqueeze(-1), 1.0
        if not _is_finite(of_rows):  # SDPA gives 0 instead of NaN where all logits of a row are -inf (torch 2.13)
            return None
    if not _sdpa_is_right(of_rows, key, value, attn_mask, scale, is_causal):
        return None
    try:
        result = _sdpa(of_rows, key, value, attn_mask, scale, is_causal)
    except RuntimeError as error:
        # In half precision, on a processor with AMX, where ATEN_CPU_CAPABILITY hides AVX-512 (torch 2.13).
        if "pack_vnni2" in str(error):
            return None
        raise
    _, H, Nq, Dv = result.shape
    # The strides that `new_outputs` gives.
    strides = (Nq * H * Dv, Dv, H * Dv, 1) if heads_lie_inside_tokens(query) else (H * Nq * Dv, Nq * Dv, Dv, 1)
    if result.stride() == strides:
        return result
    out, _, _ = new_outputs(query, value, False, False)
    return out.copy_(result)


def _sdpa_is_right(query, key, value, attn_mask, scale, is_causal) -> bool:
    """Whether PyTorch's SDPA gives what `attention` promises, for a number as scale and at least SDPA_KEYS keys."""
    if not all(map(_rows_lie_apart, (query, key, value))):
        return False
    if is_causal and scale <= 0:  # SDPA gives NaN (torch 2.13)
        return False
    if attn_mask is not None and query.dtype == torch.float64 and attn_mask.dtype == torch.float32:
        return False  # SDPA reads the mask's memory as float64 (torch 2.13)
    # SDPA lets a hidden key that is NaN or infinite reach the output (torch 2.13).
    return (attn_mask is None and not is_causal) or all(map(_is_finite, (query, key, value)))


def _rows_lie_apart(tensor: torch.Tensor) -> bool:
    """Whether no two tokens share memory. After .expand() they do, and SDPA reads past the tensor (torch 2.13)."""
    return tensor.stride(3) != 1 or tensor.stride(2) >= tensor.shape[3] or tensor.shape[2] == 1


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether the sum of all elements is finite. It may overflow although each element is finite."""
    return bool(tensor.sum(dtype=_compute_dtype(tensor)).isfinite())


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sdpa(query, key, value, attn_mask, scale, is_causal) -> torch.Tensor:
    if attn_mask is not None:
        # SDPA makes a floating mask of a boolean one, with as many elements. An axis that repeats one row is cut to it.
        attn_mask = attn_mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in attn_mask.stride()[:3])]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


class _Call(NamedTuple):
    query: torch.Tensor  # (B, H, Nq, D)
    key: torch.Tensor  # (B, Hkv, Nk, D)
    value: torch.Tensor  # (B, Hkv, Nk, Dv)
    mask: torch.Tensor | None  # (B, H, Nq, Nk)
    scale: float | torch.Tensor  # a tensor is (B, H, Nq)
    is_causal: bool
    out: torch.Tensor  # (B, H, Nq, Dv)
    entropy: torch.Tensor | None  # (B, H, Nq)
    lse: torch.Tensor | None  # (B, H, Nq)


class _Part(NamedTuple):
    """The work of one task: the queries from `first` to `stop` of some heads of one batch entry."""

    batch: int
    heads: slice
    first: int
    stop: int


def _parts(query: torch.Tensor, Nk: int, threads: int) -> Iterator[_Part]:
    """The tasks of a call. Small heads are taken together. Few large heads are cut into several tasks each."""
    B, H, Nq, _ = query.shape
    heads = max(1, min(BLOCK // max(1, Nq * Nk), -(-H // threads)))
    pieces = -(-4 * threads // max(1, B * H)) if threads > 1 else 1
    rows = max(-(-Nq // pieces), min(Nq, _rows_at_once(1, Nk)), 1)
    for b in range(B):
        for h in range(0, H, heads):
            for first in range(0, Nq, rows):
                yield _Part(b, slice(h, min(h + heads, H)), first, min(first + rows, Nq))


def _rows_at_once(heads: int, Nk: int) -> int:
    return max(FEWEST_ROWS, BLOCK // max(1, heads * Nk))


@torch.inference_mode()
def _attend(call: _Call, part: _Part) -> None:
    """Compute one part of a call, a few rows at a time, and write it to the outputs."""
    dtype = _compute_dtype(call.query)
    batch, heads = part.batch, part.heads
    Nk, queries_per_kv = call.key.shape[2], call.query.shape[1] // call.key.shape[1]
    # key (g, Nk, D) and value (g, Nk, Dv) of g query heads. With grouped queries a single head's are a view.
    kv: slice | torch.Tensor = heads
    if queries_per_kv > 1:
        first_kv = heads.start // queries_per_kv
        kv = slice(first_kv, first_kv + 1)
        if heads.stop - heads.start > 1:
            kv = torch.arange(heads.start, heads.stop) // queries_per_kv
    key, value = call.key[batch, kv].to(dtype), call.value[batch, kv].to(dtype)
    mask = None if call.mask is None else call.mask[batch, heads]
    if (mask is not None or call.is_causal) and not _is_finite(value):
        value = _without_hidden(value, mask, call.query.shape[2])

    step = _rows_at_once(key.shape[0], Nk)
    for first in range(part.first, part.stop, step):
        rows = slice(first, min(first + step, part.stop))
        keys = min(Nk, rows.stop) if call.is_causal else Nk
        hidden = None
        if mask is not None:
            hidden = mask[:, rows]
        elif call.is_causal and keys > first + 1:
            hidden = torch.ones((rows.stop - first, keys), dtype=torch.bool).tril(first)
        scale = call.scale
        if isinstance(scale, torch.Tensor):
            scale = scale[batch, heads, rows, None].to(dtype)
        query = call.query[batch, heads, rows].to(dtype) * scale
        out, entropy, lse = _softmax(query, key[:, :keys], value[:, :keys], hidden)
        call.out[batch, heads, rows] = out
        if call.entropy is not None:
            call.entropy[batch, heads, rows] = entropy
        if call.lse is not None:
            call.lse[batch, heads, rows] = lse


def _softmax(query, key, value, mask):
    """Output (g, r, Dv), entropy and lse (g, r) for g heads, r queries and n keys.

    query: (g, r, D), already multiplied by the scale. key: (g, n, D). value: (g, n, Dv). mask: broadcasts to (g, r, n),
    or None.
    """
    g, r, n = query.shape[0], query.shape[1], key.shape[1]
    if n == 0:
        return 0.0, 0.0, -torch.inf
    scores, weights = _scratch(2 * g * r * n, query.dtype).view(2, g, r, n).unbind()
    torch.bmm(query, key.mT, out=scores)
    if mask is not None:
        if mask.dtype != torch.bool:
            scores.add_(mask)
        scores.masked_fill_(~mask if mask.dtype == torch.bool else mask == -torch.inf, -torch.inf)
    peak = scores.amax(-1, keepdim=True)  # (g, r, 1)
    no_key = peak == -torch.inf
    scores.sub_(peak.masked_fill(no_key, 0.0))  # centred: an offset of all logits costs the entropy no digits
    torch.softmax(scores, -1, out=weights)
    if mask is not None:
        weights.masked_fill_(no_key, 0.0)
        scores.clamp_(min=-1000.0)  # a hidden key has weight 0, and 0 * -inf must be 0
    out = torch.bmm(weights, value)
    # The highest score is now 0. Its weight is 1 / l with l = Σ exp(score), which gives ln l.
    log_sum = weights.amax(-1).log_().neg_()
    entropy = log_sum - scores.mul_(weights).sum(-1)
    no_key, peak = no_key.squeeze(-1), peak.squeeze(-1)
    entropy = entropy.clamp_(min=0.0).masked_fill_(no_key, 0.0)  # rounding may dip below 0
    return out, entropy, (peak + log_sum).masked_fill_(no_key, -torch.inf)


def _without_hidden(value: torch.Tensor, mask: torch.Tensor | None, Nq: int) -> torch.Tensor:
    """Values (g, Nk, Dv) with 0 for the keys that no query sees. Otherwise 0 * NaN would reach the output."""
    if mask is None:  # causal
        seen = torch.arange(value.shape[1]) < Nq
    else:
        # mask: (g, Nq, Nk). One row is enough where all queries share it.
        mask = mask[:, :1] if mask.stride(1) == 0 else mask
        seen = (mask if mask.dtype == torch.bool else mask != -torch.inf).any(1)
    return value.masked_fill(~seen.unsqueeze(-1), 0.0)


_of_thread = threading.local()


def _scratch(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the current thread for scores. Up to the usual size it is kept between calls: page faults of new memory
    take a fifth of the time of a head of 1024 tokens."""
    if elements > 2 * BLOCK:
        return torch.empty(elements, dtype=dtype)
    kept = getattr(_of_thread, "scratch", None)
    if kept is None:
        kept = _of_thread.scratch = torch.empty(2 * BLOCK, dtype=torch.float64)
    return kept.view(dtype)[:elements]


@functools.cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """A pool of threads, each of which runs PyTorch's operators on one thread. `process` is the pid: after a fork the
    child has none of its parent's threads."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # PyTorch sets a thread's number at its first look: before the next line
        torch.set_num_threads(1)  # this thread's number, and the first one of threads that start later
        started.wait()

    workers = ThreadPoolExecutor(threads, "entropy_attn")
    starting = [workers.submit(start) for _ in range(threads)]
    started.wait()
    for each in starting:
        each.result()
    torch.set_num_threads(threads)  # restores the first number of threads that start later
    return workers
