"""Packed sequences as a loop of a backend's `forward` over them. Reads their lengths on the host."""

from __future__ import annotations

import torch

from entropy_attn.backends import Packed, new_varlen_outputs
from entropy_attn.scale import LengthRule


def forward_varlen(forward, packed: Packed, scale, is_causal, return_entropy, return_lse):
    """A backend's `forward_varlen`, from its `forward`."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packed
    outputs = new_varlen_outputs(query, value, return_entropy, return_lse)
    of_queries = _sequences(cu_seqlens_q, query.shape[0], max_seqlen_q)
    of_keys = _sequences(cu_seqlens_k, key.shape[0], max_seqlen_k)
    scales = [scale] * len(of_keys)
    if isinstance(scale, LengthRule):
        scales = scale.scales([rows.stop - rows.start for rows in of_keys], query.shape[2])
    elif isinstance(scale, torch.Tensor):
        scales = [scale[i : i + 1, :, None] for i in range(len(of_keys))]
    for rows, keys, of_sequence in zip(of_queries, of_keys, scales, strict=True):
        heads_first = (x[None].transpose(1, 2) for x in (query[rows], key[keys], value[keys]))
        if isinstance(of_sequence, torch.Tensor):
            of_sequence = of_sequence.expand(1, query.shape[1], rows.stop - rows.start)
        results = forward(*heads_first, None, of_sequence, is_causal, return_entropy, return_lse)
        for output, result in zip(outputs, results, strict=True):
            if output is outputs[0]:
                output[rows] = result[0].transpose(0, 1)
            elif output is not None:
                output[:, rows] = result[0]
    return outputs


def _sequences(cu_seqlens: torch.Tensor, total: int, longest: int) -> list[slice]:
    """The rows of each sequence. Whatever cu_seqlens holds, they lie in 0 .. total, and are at most `longest`."""
    ends = cu_seqlens.tolist()
    begins = [min(max(begin, 0), total) for begin in ends[:-1]]
    stops = [min(max(end, begin), total) for begin, end in zip(begins, ends[1:], strict=True)]
    return [slice(begin, min(stop, begin + longest)) for begin, stop in zip(begins, stops, strict=True)]
