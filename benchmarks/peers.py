"""Our attention and that of other libraries. Each is a function that takes inputs and returns the call to be timed.

What a library prepares once (a block mask, a compiled function) is made before the timed call. What it needs in every
call is timed: for example, a library whose scale is a single number has its query multiplied by the scale of each head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layers import Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_attn import attention


def ours(inputs: Inputs, return_entropy: bool = False) -> Callable[[], Any]:
    q, k, v, mask, is_causal, scale = inputs
    return lambda: attention(q, k, v, mask, is_causal=is_causal, scale=scale, return_entropy=return_entropy)


def scaled(inputs: Inputs) -> tuple[torch.Tensor, float | None]:
    """Query and scale for a library whose scale is a single number: a scale per head is multiplied into the query."""
    if inputs.scale is None:
        return inputs.query, None
    return inputs.query * inputs.scale[..., None, None].to(inputs.query.dtype), 1.0


def sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Callable[[], torch.Tensor]:
    def way() -> torch.Tensor:
        query, scale = scaled(inputs)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, inputs.key, inputs.value, inputs.attn_mask, is_causal=inputs.is_causal, scale=scale
            )

    return way


def flex(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # after 8 recompilations it would run uncompiled
    query, key, value, mask, is_causal, scale = inputs
    B, H, Nq, Nk = (*query.shape[:3], key.shape[2])
    if mask is not None:
        mask = mask.expand(B, H, Nq, Nk)
    block_mask, score_mod = None, None
    if is_causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, Nq, Nk, device=query.device)
    elif mask is not None and mask.dtype == torch.bool:
        block_mask = create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], B, None, Nq, Nk, device=query.device)
    elif mask is not None:
        score_mod = lambda score, b, h, i, j: score + mask[b, h, i, j]  # noqa: E731
    elif scale is not None:
        score_mod = lambda score, b, h, i, j: score * scale[b, h]  # noqa: E731
    compiled = torch.compile(flex_attention, dynamic=False)
    number = None if scale is None else 1.0
    return lambda: compiled(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=number)


def flash_attn(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flash_attn import flash_attn_func

    if inputs.attn_mask is not None:
        raise NotImplementedError("flash_attn_func takes no mask")
    key, value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)

    def way() -> torch.Tensor:
        query, scale = scaled(inputs)
        out = flash_attn_func(query.transpose(1, 2), key, value, softmax_scale=scale, causal=inputs.is_causal)
        return out.transpose(1, 2)

    return way


def xformers(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if inputs.is_causal else inputs.attn_mask
    if isinstance(bias, torch.Tensor):
        if bias.dtype == torch.bool:
            raise NotImplementedError("memory_efficient_attention takes no boolean mask")
        bias = bias.expand(*inputs.query.shape[:3], -1)
    key, value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)

    def way() -> torch.Tensor:
        query, scale = scaled(inputs)
        return memory_efficient_attention(query.transpose(1, 2), key, value, bias, scale=scale).transpose(1, 2)

    return way


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and entropy from a softmax held in memory: how the entropy is usually computed."""
    log_p = (query @ key.mT * query.shape[-1] ** -0.5).log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    return p.to(value.dtype) @ value, -(p * log_p).sum(-1)


OURS: dict[str, Callable[[Inputs], Callable]] = {
    "ours": ours,
    "ours+entropy": functools.partial(ours, return_entropy=True),
}
PEERS: dict[str, Callable[[Inputs], Callable]] = {
    "sdpa": sdpa,
    "sdpa-flash": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": functools.partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": functools.partial(sdpa, backend=SDPBackend.MATH),
    "flex": flex,
    "flash-attn": flash_attn,
    "xformers": xformers,
}
DISTRIBUTIONS = {"flash-attn": "flash-attn", "xformers": "xformers"}  # packages of the peers outside PyTorch
