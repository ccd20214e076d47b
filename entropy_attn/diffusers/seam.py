"""The way in: ``torch.nn.functional.scaled_dot_product_attention``, taken over inside the layers of enabled models.

Hooks on a layer put it in a scope of the running thread; a call of SDPA inside that scope goes to the layer, any other
(text encoders, VAE, cross-attention, other pipelines) to PyTorch. PyTorch's function is replaced while at least one
handle is enabled, and so are the entries of Diffusers' attention dispatcher.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import torch.nn.functional as F

from entropy_attn.diffusers import dispatch, ops  # noqa: F401 (ops registers the operators)

pytorch_sdpa = F.scaled_dot_product_attention

_lock = threading.Lock()
_users = 0
_covered = False  # whether SDPA was taken over from us


class _Scope:
    layer: Any = None  # the enabled layer that runs
    reached: bool = False  # whether its attention came by here


class _ThreadScope(_Scope, threading.local):
    pass


_running, _traced = _ThreadScope(), _Scope()


def scope() -> _Scope:
    """That of the running thread; or of the trace, since torch.compile sees no changes of what is local to a thread."""
    return _traced if torch.compiler.is_compiling() else _running


def install() -> None:
    """Take over SDPA, once for all handles."""
    global _users, _covered, pytorch_sdpa
    with _lock:
        if _users == 0:
            if not _covered:
                pytorch_sdpa = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = scaled_dot_product_attention
            dispatch.install(attend_elsewhere)
        _users += 1


def uninstall() -> None:
    """Give SDPA back with the last handle, unless someone took it over in turn: theirs may call ours."""
    global _users, _covered
    with _lock:
        _users -= 1
        if _users == 0:
            _covered = F.scaled_dot_product_attention is not scaled_dot_product_attention
            if not _covered:
                F.scaled_dot_product_attention = pytorch_sdpa
            dispatch.uninstall()


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0, is_causal=False, scale=None, enable_gqa=False
):
    """SDPA, or inside an enabled layer that layer's attention."""
    here = scope()
    layer = here.layer
    if layer is None:
        return pytorch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    here.reached = True
    if not torch.compiler.is_compiling():
        with _outside():
            return layer.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if query.dim() == 4 and not needs_grad(query, key, value, attn_mask):
        return torch.ops.entropy_attn.layer_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layer.call_token, layer.token
        )
    query = query * _multiplier(layer, query, key.shape[-2])
    return pytorch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def attend_elsewhere(backend, kwargs: dict):
    """Call another backend of Diffusers' dispatcher, on (B, N, H, D), with the query multiplied in place of λ."""
    here = scope()
    layer = here.layer
    if layer is None:
        return backend(**kwargs)
    here.reached = True
    query, key = kwargs["query"], kwargs["key"]
    query = query * _multiplier(layer, query.transpose(1, 2), key.shape[1])
    with _outside():
        return backend(**{**kwargs, "query": query})


@contextlib.contextmanager
def _outside():
    """Leave the layer for a while: who computes its attention may call SDPA."""
    here = scope()
    layer, here.layer = here.layer, None
    try:
        yield
    finally:
        here.layer = layer


def _multiplier(layer, query, num_keys) -> torch.Tensor:
    """The multiplier of queries (…, Nq, D) as a tensor, for whoever cannot be given λ itself."""
    return torch.ops.entropy_attn.layer_multiplier(query.detach(), num_keys, layer.call_token, layer.token)
