"""Jagged nested tensors for `attention`: batches of sequences of different lengths, which `attention_varlen` takes."""

from __future__ import annotations

from typing import Any

import torch

from entropy_attn.checks import check_layout, check_no_dropout
from entropy_attn.output import AttentionOutput
from entropy_attn.values import integer, module_of, type_of
from entropy_attn.varlen import attention_varlen


def is_jagged(tensor) -> bool:
    # By its class: another subclass may not let its attributes be read.
    kind = type(tensor)
    return kind is not torch.Tensor and module_of(kind).startswith("torch.nested") and tensor.layout == torch.jagged


def attention_jagged(query, key, value, attn_mask, dropout_p, num_tokens, layout, **options: Any):
    """`attention` of jagged tensors (B, H, N, D), or (B, N, H, D) with layout="bnhd", with the N of each sequence."""
    check_layout(layout)
    if attn_mask is not None:
        raise ValueError("attn_mask must be None where query is a jagged nested tensor")
    if integer("num_tokens", num_tokens, "None where query is a jagged nested tensor") is not None:
        raise ValueError(f"num_tokens must be None where query is a jagged nested tensor, got {num_tokens}")
    check_no_dropout(dropout_p)
    inputs = {"query": query, "key": key, "value": value}
    packed = {name: _packed(name, tensor, layout) for name, tensor in inputs.items()}
    of_queries, of_keys = (packed[name][1] for name in ("query", "key"))
    if not of_queries.shape == of_keys.shape == packed["value"][1].shape:
        raise ValueError(
            f"query, key and value must have the same batch size, "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    if value.offsets() is not key.offsets() and not torch.equal(value.offsets(), key.offsets()):
        raise ValueError("value must have the lengths of key, where both are jagged nested tensors")
    longest_q, longest_k = _longest(of_queries), _longest(of_keys)
    q, k, v = (tensor for tensor, _ in packed.values())
    result = attention_varlen(q, k, v, of_queries, of_keys, longest_q, longest_k, **options)

    def nested(values, jagged_dim):
        return torch.nested.nested_tensor_from_jagged(values, query.offsets(), None, jagged_dim, None, longest_q)

    out, entropy, lse = (result, None, None) if isinstance(result, torch.Tensor) else result
    out = nested(out, 1)
    out = out.transpose(1, 2) if layout == "bhnd" else out
    if isinstance(result, torch.Tensor):
        return out
    return AttentionOutput(out, *(x if x is None else nested(x, 2) for x in (entropy, lse)))


def _packed(name: str, tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The data of a jagged tensor as (total, H, D), and where its sequences begin and end."""
    if not is_jagged(tensor):
        raise TypeError(f"{name} must be a jagged nested tensor, as query is, got {type_of(tensor)}")
    axis = layout.index("n")
    ragged = [i for i, n in enumerate(tensor.shape) if isinstance(n, torch.SymInt)]
    if tensor.dim() != 4 or ragged != [axis]:
        raise TypeError(
            f"{name} must be a jagged nested tensor with the axes ({', '.join(layout.upper())}) whose axis {axis} is "
            f"ragged, got one of {tensor.dim()} axes with {ragged} ragged (attention_varlen takes packed tensors)"
        )
    if tensor.lengths() is not None:
        raise TypeError(f"{name} must be a jagged nested tensor without holes (attention_varlen takes packed tensors)")
    values = tensor.values()
    return values.transpose(0, 1) if layout == "bhnd" else values, tensor.offsets().to(torch.int32)


def _longest(ends: torch.Tensor) -> int:
    """The length of the longest sequence. Waits for the device: PyTorch has no public way to its own record of it."""
    return int(ends.diff().max()) if ends.shape[0] > 1 else 0
