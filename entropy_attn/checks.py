"""What `attention` refuses, before anything runs. The messages name the argument, what came and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch

from entropy_attn.backends import BACKENDS
from entropy_attn.values import flag, integer, module_of, real, type_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The kernel multiplies the scale by log2(e), in float32.
LARGEST_SCALE = torch.finfo(torch.float32).max * math.log(2.0)


def plain_tensor(name: str, tensor) -> None:
    """Raise unless it is a strided tensor, and of no subclass whose data may not be what it means."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type_of(tensor)}")
    if not _is_plain(type(tensor)):
        raise TypeError(
            f"{name} must be a plain torch.Tensor, got {type_of(tensor)}, whose data may not be what it means"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a strided tensor, got a {kind} one")


def _is_plain(kind: Any) -> bool:
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return True
    if module_of(kind).startswith("torch._subclasses."):  # what torch.compile and torch.export trace with
        return True
    functions = [getattr(each.__torch_function__, "__func__", None) for each in (kind, torch.Tensor)]
    return functions[0] is functions[1] and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def without_causal_bias(attn_mask, is_causal, query, key):
    """(attn_mask, is_causal) for a mask of `torch.nn.attention.bias`, whose data is not its meaning; else as given."""
    if not isinstance(attn_mask, torch.Tensor) or not module_of(type(attn_mask)).startswith("torch.nn.attention"):
        return attn_mask, is_causal
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal
    if is_causal:
        raise ValueError("is_causal and attn_mask cannot be given together: attn_mask is causal")
    Nq, Nk = query.shape[-2], key.shape[-2]
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (Nq, Nk):
        raise ValueError(
            f"attn_mask must be for ({Nq}, {Nk}) tokens of query and key, "
            f"got one for ({attn_mask.seq_len_q}, {attn_mask.seq_len_kv})"
        )
    if attn_mask.variant == CausalVariant.UPPER_LEFT or Nq == Nk:
        return None, True
    return torch.ones(Nq, Nk, dtype=torch.bool, device=query.device).tril(Nk - Nq), False


def bhnd(query, key, value, layout):
    """The three tensors as views with the axes (B, H, N, D)."""
    check_layout(layout)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        plain_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 axes ({', '.join(layout.upper())}), got shape {tuple(tensor.shape)}")
    if layout == "bnhd":
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return query, key, value


def check_layout(layout) -> None:
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")


def check_no_dropout(dropout_p) -> None:
    if real("dropout_p", dropout_p) != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: this is attention for inference")


def check_head_dim(D) -> None:
    if D == 0:
        raise ValueError("query must have a head dim of at least 1, got 0")


def scale_number(scale):
    """`scale` as a number that the kernel can multiply by log2(e)."""
    scale = real("scale", scale, "a float or a tensor")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale must be finite (at most {LARGEST_SCALE:.4g} in magnitude), got {scale}")
    return scale


def backend_name(backend) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def operator_arguments(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, train_tokens, train_entropy, num_tokens,
    layout, return_entropy, return_lse, backend,
):  # fmt: skip
    """The arguments of the operator from those of `attention`; TypeError or ValueError for what cannot be run."""
    query, key, value = bhnd(query, key, value, layout)
    is_causal, enable_gqa = flag("is_causal", is_causal), flag("enable_gqa", enable_gqa)
    return_entropy, return_lse = flag("return_entropy", return_entropy), flag("return_lse", return_lse)
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, query, key)
    backend = backend_name(backend)
    check_no_dropout(dropout_p)
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask cannot be given together: put the causal part into attn_mask")
    check_dtypes(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    train_tokens, num_tokens_tensor = integer("train_tokens", train_tokens), None
    if isinstance(num_tokens, torch.Tensor):
        check_one_of_each("num_tokens", num_tokens, (torch.int32, torch.int64), query, "B", query.shape[0])
        num_tokens_tensor = num_tokens
    else:
        num_tokens = integer("num_tokens", num_tokens, "an int or a tensor")
    train_entropy = real("train_entropy", train_entropy)
    _check_rule(scale, train_tokens, train_entropy, num_tokens)
    scale_tensor = None
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(scale, query)
        scale_tensor, scale = scale, None
    elif scale is not None:
        scale = scale_number(scale)
    if torch.is_grad_enabled():
        refuse_grad(query=query, key=key, value=value, attn_mask=attn_mask, scale=scale_tensor)
    return (
        query, key, value, attn_mask, scale_tensor, scale, train_tokens, train_entropy,
        None if num_tokens_tensor is not None else num_tokens, num_tokens_tensor, is_causal, return_entropy,
        return_lse, backend,
    )  # fmt: skip


def dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """The dtype the operator takes a tensor in: under autocast, as for SDPA, all floating ones but float64 are cast."""
    device = tensor.device.type
    cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if cast and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def check_dtypes(query, key, value) -> None:
    dtype = dtype_of(query)
    if dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"query must be of {allowed}, got {dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if dtype_of(tensor) != dtype:
            raise ValueError(f"{name} must have the dtype of query, {dtype}, got {tensor.dtype}")
        check_device(name, tensor, query)


def _check_shapes(query, key, value, enable_gqa) -> None:
    B, H, _, D = query.shape
    Bk, Hkv, Nk, Dk = key.shape
    Bv, Hv, Nv, _ = value.shape
    check_head_dim(D)
    if Bk != B or Bv != B:
        raise ValueError(
            f"query, key and value must have the same batch size, got {B}, {Bk} and {Bv} "
            "(a view made by .expand() costs no memory)"
        )
    if Dk != D:
        raise ValueError(f"key must have the head dim of query, {D}, got {Dk}")
    if Hv != Hkv or Nv != Nk:
        raise ValueError(f"value must have the heads and tokens of key, {Hkv} and {Nk}, got {Hv} and {Nv}")
    check_heads(H, Hkv, enable_gqa)


def check_heads(H, Hkv, enable_gqa) -> None:
    if Hkv == H:
        return
    if not enable_gqa:
        raise ValueError(f"key must have the heads of query, {H}, got {Hkv} (fewer are allowed with enable_gqa=True)")
    if Hkv == 0 or H % Hkv != 0:
        raise ValueError(f"the heads of query must be a multiple of those of key with enable_gqa, got {H} and {Hkv}")


def _check_mask(attn_mask, query, key) -> None:
    plain_tensor("attn_mask", attn_mask)
    dtype, mask_dtype = dtype_of(query), dtype_of(attn_mask)
    if mask_dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(f"attn_mask must be of torch.bool, torch.float32 or {dtype}, got {attn_mask.dtype}")
    check_device("attn_mask", attn_mask, query)
    B, H, Nq, _ = query.shape
    Nk = key.shape[2]
    given = tuple(attn_mask.shape)
    if 2 <= len(given) <= 4:
        b, h, m, n = given if len(given) == 4 else (1, 1, *given)[-4:]
        if b in (1, B) and h in (1, H) and m in (1, Nq) and n in (1, Nk):
            return
    raise ValueError(
        f"attn_mask must broadcast to (B, H, Nq, Nk) = {(B, H, Nq, Nk)} from 2 to 4 axes, got shape {given}"
    )


def _check_rule(scale, train_tokens, train_entropy, num_tokens) -> None:
    """Which of the arguments decide the scale; the values of N, T and H_T are checked where λ is computed."""
    if train_tokens is None:
        if num_tokens is not None:
            given = "a tensor" if isinstance(num_tokens, torch.Tensor) else num_tokens
            raise ValueError(f"num_tokens needs train_tokens, got num_tokens={given} alone")
        if train_entropy != 0.0:
            raise ValueError(f"train_entropy needs train_tokens, got train_entropy={train_entropy} alone")
    elif scale is not None:
        raise ValueError("scale and train_tokens cannot be given together: each decides the scale")


def check_scale_dtype(scale, query) -> None:
    plain_tensor("scale", scale)
    if scale.dtype != torch.float32 and not scale.dtype == query.dtype == torch.float64:
        raise ValueError(f"scale must be a float32 tensor (or float64 with float64 query), got {scale.dtype}")
    check_device("scale", scale, query)


def check_device(name: str, tensor, query) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


def _check_scale_tensor(scale, query) -> None:
    check_scale_dtype(scale, query)
    B, H, Nq, _ = query.shape
    if tuple(scale.shape) not in ((), (B,), (B, H), (B, H, Nq)):
        raise ValueError(
            f"scale must have shape (), (B,) = ({B},), (B, H) = ({B}, {H}) or (B, H, Nq) = ({B}, {H}, {Nq}), "
            f"got {tuple(scale.shape)}"
        )


def check_one_of_each(name: str, tensor, dtypes, query, axis: str, count) -> None:
    """Raise unless it is a tensor with one number of each of the `count` samples or sequences. axis: "B" or "S"."""
    plain_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be a number, or a tensor of {allowed}, got {tensor.dtype}")
    check_device(name, tensor, query)
    if tuple(tensor.shape) != (count,):
        raise ValueError(f"{name} must have shape ({axis},) = ({count},), got {tuple(tensor.shape)}")


def refuse_grad(**inputs) -> None:
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise no_derivative(name, "requires grad")


def no_derivative(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name} {what}, and attention has no derivative: call it under torch.no_grad() or torch.inference_mode(), "
        "or train with torch.nn.functional.scaled_dot_product_attention"
    )
