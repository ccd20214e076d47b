"""What `attention` refuses, before anything runs. The messages name the argument, what came and what is allowed."""

from __future__ import annotations

import torch

from entropy_attn.backends import BACKENDS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SCALE = torch.finfo(torch.float32).max


def bhnd(query, key, value, layout):
    """The three tensors as views with the axes (B, H, N, D)."""
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 axes ({', '.join(layout.upper())}), got shape {tuple(tensor.shape)}")
    if layout == "bnhd":
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return query, key, value


def check(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, train_tokens, train_entropy, num_tokens,
    return_entropy, return_lse, backend,
):  # fmt: skip
    """Raise TypeError or ValueError unless `attention` can be called so; tensors come in (B, H, N, D)."""
    if not type(is_causal) is type(enable_gqa) is type(return_entropy) is type(return_lse) is bool:
        _refuse_flags(is_causal=is_causal, enable_gqa=enable_gqa, return_entropy=return_entropy, return_lse=return_lse)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: this is attention for inference")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask cannot be given together: put the causal part into attn_mask")
    _check_tensors(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    _check_scale(scale, query, train_tokens, train_entropy, num_tokens)
    if torch.is_grad_enabled():
        _refuse_grad(query=query, key=key, value=value, attn_mask=attn_mask, scale=scale)


def _refuse_flags(**flags) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def _check_tensors(query, key, value) -> None:
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"query must be of {allowed}, got {dtype}")
    if dtype == key.dtype == value.dtype and device == key.device == value.device:
        return
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of query, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")


def _check_shapes(query, key, value, enable_gqa) -> None:
    B, H, _, D = query.shape
    Bk, Hkv, Nk, Dk = key.shape
    Bv, Hv, Nv, _ = value.shape
    if D == 0:
        raise ValueError("query must have a head dim of at least 1, got 0")
    if Bk != B or Bv != B:
        raise ValueError(
            f"query, key and value must have the same batch size, got {B}, {Bk} and {Bv} "
            "(a view made by .expand() costs no memory)"
        )
    if Dk != D:
        raise ValueError(f"key must have the head dim of query, {D}, got {Dk}")
    if Hv != Hkv or Nv != Nk:
        raise ValueError(f"value must have the heads and tokens of key, {Hkv} and {Nk}, got {Hv} and {Nv}")
    if Hkv == H:
        return
    if not enable_gqa:
        raise ValueError(f"key must have the heads of query, {H}, got {Hkv} (fewer are allowed with enable_gqa=True)")
    if Hkv == 0 or H % Hkv != 0:
        raise ValueError(f"the heads of query must be a multiple of those of key with enable_gqa, got {H} and {Hkv}")


def _check_mask(attn_mask, query, key) -> None:
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(f"attn_mask must be of torch.bool, torch.float32 or {query.dtype}, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the device of query, {query.device}, got {attn_mask.device}")
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


def _check_scale(scale, query, train_tokens, train_entropy, num_tokens) -> None:
    """Which of the arguments decide the scale; the values of N, T and H_T are checked where λ is computed."""
    if train_tokens is None:
        if num_tokens is not None:
            raise ValueError(f"num_tokens needs train_tokens, got num_tokens={num_tokens} alone")
        if train_entropy != 0.0:
            raise ValueError(f"train_entropy needs train_tokens, got train_entropy={train_entropy} alone")
    elif scale is not None:
        raise ValueError("scale and train_tokens cannot be given together: each decides the scale")
    for name, number in (("train_tokens", train_tokens), ("num_tokens", num_tokens)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, torch.SymInt))):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    if isinstance(train_entropy, bool) or not isinstance(train_entropy, (int, float, torch.SymFloat)):
        raise TypeError(f"train_entropy must be a float, got {type(train_entropy).__name__}")
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(scale, query)
    elif scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
            raise TypeError(f"scale must be a float or a tensor, got {type(scale).__name__}")
        if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
            raise ValueError(f"scale must be finite (in float32), got {scale}")


def _check_scale_tensor(scale, query) -> None:
    if scale.dtype != torch.float32 and not scale.dtype == query.dtype == torch.float64:
        raise ValueError(f"scale must be a float32 tensor (or float64 with float64 query), got {scale.dtype}")
    if scale.device != query.device:
        raise ValueError(f"scale must be on the device of query, {query.device}, got {scale.device}")
    B, H = query.shape[0], query.shape[1]
    if tuple(scale.shape) not in ((), (B,), (B, H)):
        raise ValueError(f"scale must have shape (), (B,) = ({B},) or (B, H) = ({B}, {H}), got {tuple(scale.shape)}")


def _refuse_grad(**inputs) -> None:
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, and attention has no backward pass: call it under torch.no_grad() or "
                "torch.inference_mode(), or train with torch.nn.functional.scaled_dot_product_attention"
            )
