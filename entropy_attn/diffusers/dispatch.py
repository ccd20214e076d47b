"""Diffusers' attention dispatcher: the backends that do not come by PyTorch's SDPA get their λ here.

The table of backends is private to Diffusers. It is not needed for the default backend, and left alone where it is
not found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

# These end in torch.nn.functional.scaled_dot_product_attention.
_BY_SDPA = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")

_originals: dict = {}


def _backends() -> dict:
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry
    except ImportError:
        return {}
    return getattr(_AttentionBackendRegistry, "_backends", {})


def install(attend: Callable) -> None:
    """Have ``attend(backend, kwargs)`` called in the place of every backend that does not come by SDPA."""
    for name, backend in _backends().items():
        if getattr(name, "value", name) not in _BY_SDPA:
            _originals[name] = backend
            _backends()[name] = _through(attend, backend)


def uninstall() -> None:
    """Put the backends back that are still ours."""
    for name, backend in _originals.items():
        if getattr(_backends().get(name), "__wrapped__", None) is backend:
            _backends()[name] = backend
    _originals.clear()


def _through(attend: Callable, backend: Callable) -> Callable:
    @functools.wraps(backend)
    def call(**kwargs):
        return attend(backend, kwargs)

    return call
