"""What `attention_varlen` refuses, as checks.py does for `attention`."""

from __future__ import annotations

import itertools

import torch

from entropy_attn import checks, values
from entropy_attn.backends import Packed


def operator_arguments(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale, enable_gqa,
    train_tokens, train_entropy, return_entropy, return_lse, check, backend,
):  # fmt: skip
    """The arguments of the operator from those of `attention_varlen`; TypeError or ValueError for what cannot run."""
    _check_inputs(query, key, value, values.flag("enable_gqa", enable_gqa))
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_cu_seqlens(name, cu_seqlens, query)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must have the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    max_seqlen_q = values.integer_from("max_seqlen_q", max_seqlen_q, 0)
    max_seqlen_k = values.integer_from("max_seqlen_k", max_seqlen_k, 0)
    S, H = cu_seqlens_q.shape[0] - 1, query.shape[1]
    scale_tensor = train_tokens_tensor = train_entropy_tensor = None
    _check_rule(scale, train_tokens, train_entropy)
    if isinstance(scale, torch.Tensor):
        checks.check_scale_dtype(scale, query)
        if tuple(scale.shape) not in ((), (S,), (S, H)):
            raise ValueError(
                f"scale must have shape (), (S,) = ({S},) or (S, H) = ({S}, {H}), got {tuple(scale.shape)}"
            )
        scale_tensor, scale = scale, None
    elif scale is not None:
        scale = checks.scale_number(scale)
    if isinstance(train_tokens, torch.Tensor):
        checks.check_one_of_each("train_tokens", train_tokens, (torch.int32, torch.int64), query, "S", S)
        train_tokens_tensor, train_tokens = train_tokens, None
    else:
        train_tokens = values.integer("train_tokens", train_tokens, "an int or a tensor")
    if isinstance(train_entropy, torch.Tensor):
        checks.check_one_of_each("train_entropy", train_entropy, (torch.float32, torch.float64), query, "S", S)
        train_entropy_tensor, train_entropy = train_entropy, 0
    else:
        train_entropy = values.real("train_entropy", train_entropy, "a float or a tensor")
    if torch.is_grad_enabled():
        checks.refuse_grad(query=query, key=key, value=value, scale=scale_tensor, train_entropy=train_entropy_tensor)
    return (
        query, key, value, cu_seqlens_q, cu_seqlens_k, scale_tensor, train_tokens_tensor, train_entropy_tensor,
        max_seqlen_q, max_seqlen_k, scale, train_tokens, train_entropy, values.flag("is_causal", is_causal),
        values.flag("check", check), values.flag("return_entropy", return_entropy),
        values.flag("return_lse", return_lse), checks.backend_name(backend),
    )  # fmt: skip


def _check_inputs(query, key, value, enable_gqa) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.plain_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 axes (total, H, D), got shape {tuple(tensor.shape)}")
    checks.check_dtypes(query, key, value)
    _, H, D = query.shape
    total_k, Hkv, Dk = key.shape
    checks.check_head_dim(D)
    if Dk != D:
        raise ValueError(f"key must have the head dim of query, {D}, got {Dk}")
    if tuple(value.shape[:2]) != (total_k, Hkv):
        raise ValueError(
            f"value must have the tokens and heads of key, {total_k} and {Hkv}, "
            f"got {value.shape[0]} and {value.shape[1]}"
        )
    checks.check_heads(H, Hkv, enable_gqa)


def _check_cu_seqlens(name: str, cu_seqlens, query) -> None:
    checks.plain_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be an int32 tensor, got {cu_seqlens.dtype}")
    checks.check_device(name, cu_seqlens, query)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have shape (S + 1,) for S sequences, got {tuple(cu_seqlens.shape)}")


def _check_rule(scale, train_tokens, train_entropy) -> None:
    """Which of the arguments decide the scale; the values of T and H_T are checked where λ is computed."""
    if train_tokens is not None:
        if scale is not None:
            raise ValueError("scale and train_tokens cannot be given together: each decides the scale")
    elif isinstance(train_entropy, torch.Tensor) or train_entropy != 0:
        given = "a tensor" if isinstance(train_entropy, torch.Tensor) else train_entropy
        raise ValueError(f"train_entropy needs train_tokens, got train_entropy={given} alone")


def check_lengths(packed: Packed) -> None:
    """Raise for cu_seqlens or max_seqlen whose values do not fit. Waits for the device."""
    _check_ends("q", "query", packed.cu_seqlens_q, packed.query.shape[0], packed.max_seqlen_q)
    _check_ends("k", "key", packed.cu_seqlens_k, packed.key.shape[0], packed.max_seqlen_k)


def _check_ends(which: str, of: str, cu_seqlens: torch.Tensor, total: int, longest: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens_{which} must begin at 0, got {ends[0]}")
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end < begin:
            raise ValueError(f"cu_seqlens_{which} must not fall, got {begin} and then {end} at {i} and {i + 1}")
    if ends[-1] > total:
        raise ValueError(f"cu_seqlens_{which} must end at most at the rows of {of}, {total}, got {ends[-1]}")
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{which} must be at least the longest sequence of cu_seqlens_{which}, {max(lengths)}, "
            f"got {longest}"
        )
