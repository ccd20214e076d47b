"""A processor for Diffusers' ``Attention`` modules that calls `entropy_attn.attention` and patches nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from entropy_attn.attention import attention


class EntropyAttnProcessor:
    """A drop-in for ``AttnProcessor2_0`` in UNets of one's own, with λ for the scale of self-attention.

    Without arguments it computes what ``AttnProcessor2_0`` does. It holds no state of a layer, so that one instance can
    serve several layers trained with the same number of tokens. Inference only. Loading an IP-Adapter makes a new
    instance of every processor, without arguments: set yours again after it (`enable` needs no such care).

    Args:
        train_tokens: T of the layer; its self-attention then has the scale sqrt(log_T N / d) of `attention`.
            Cross-attention always has the trained scale, as has a self-attention with T or N of 1.
        train_entropy: the layer's calibrated entropy H_T in nats, as in `attention`.
        on_entropy: called as ``on_entropy(attn, entropy)`` with the module and the entropy (B, heads, Nq) of its
            attention in nats, after each call.
    """

    def __init__(
        self,
        train_tokens: int | None = None,
        train_entropy: float = 0.0,
        on_entropy: Callable[[torch.nn.Module, torch.Tensor], None] | None = None,
    ):
        if train_tokens is not None and (isinstance(train_tokens, bool) or not isinstance(train_tokens, int)):
            raise TypeError(f"train_tokens must be an int or None, got {type(train_tokens).__name__}")
        if train_tokens is not None and train_tokens < 1:
            raise ValueError(f"train_tokens must be at least 1, got {train_tokens}")
        if train_tokens is None and train_entropy != 0.0:
            raise ValueError(f"train_entropy needs train_tokens, got train_entropy={train_entropy} alone")
        if on_entropy is not None and not callable(on_entropy):
            raise TypeError(f"on_entropy must be callable, got {type(on_entropy).__name__}")
        self.train_tokens, self.train_entropy, self.on_entropy = train_tokens, train_entropy, on_entropy

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.dim() == 4 else None
        if image_shape is not None:  # (B, C, H, W) -> (B, N, C)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        num_keys = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        attention_mask = _mask(attn, attention_mask, num_keys, hidden_states.shape[0])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = _project(attn, hidden_states, encoder_hidden_states)  # (B, heads, N, D)

        scaled = encoder_hidden_states is None and num_keys > 1 and self.train_tokens != 1
        T = self.train_tokens if scaled else None
        result: Any = attention(
            query, key, value, attention_mask, train_tokens=T, train_entropy=0.0 if T is None else self.train_entropy,
            return_entropy=self.on_entropy is not None,
        )  # fmt: skip
        if self.on_entropy is not None:
            self.on_entropy(attn, result.entropy)
        out = result if self.on_entropy is None else result.out

        hidden_states = out.transpose(1, 2).flatten(2)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _mask(attn, attention_mask, num_keys: int, batch_size: int) -> torch.Tensor | None:
    """The mask of a module's call, as (B, heads, Nq or 1, Nk)."""
    if attention_mask is None:
        return None
    attention_mask = attn.prepare_attention_mask(attention_mask, num_keys, batch_size)
    return attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])


def _project(attn, hidden_states, encoder_hidden_states) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (B, heads, N, D) of a module, as views of its projections (B, N, heads * D)."""
    if encoder_hidden_states is not None and attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    if encoder_hidden_states is None and attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states)
        if attn.fused_projections and hasattr(attn, "to_kv"):
            key, value = attn.to_kv(source).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(source), attn.to_v(source)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value
