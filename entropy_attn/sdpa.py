"""`attention` in the place of ``F.scaled_dot_product_attention``, inside the attention modules that want it.

The process-wide function is replaced while it has users: see `install` and `release`. Its replacement calls `attention`
while the call of such a module, a layer, is noted in `scope`. Otherwise it calls the function that it replaced.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from entropy_attn.attention import attention

# The code of every frame in which a module is called; its `self` is the module.
_MODULE_CALL = torch.nn.Module.__call__.__code__


@dataclass
class LayerCall:
    """One call of a layer, while it is in progress."""

    module: torch.nn.Module
    multiplier: float | torch.Tensor  # λ √d
    attention: str  # who computes it: "auto", "fused", "model"
    observe: Callable[[torch.Tensor], None] | None  # takes the entropy (B, H, Nq), where it is wanted
    report: Callable[[str], None]  # takes a sentence on λ or entropy that is missing
    keys: int
    traced: bool = False  # parts of the module are compiled, and its frame may be missing from the stack
    gain: float | torch.Tensor = 1.0  # of the output, and so of the value
    scaled: int = 0  # queries that were multiplied
    gained: int = 0  # values that were multiplied
    attended: int = 0  # calls of SDPA with this many keys

    @property
    def is_unscaled(self) -> bool:
        return not isinstance(self.multiplier, torch.Tensor) and self.multiplier == 1.0

    @property
    def has_no_gain(self) -> bool:
        return not isinstance(self.gain, torch.Tensor) and self.gain == 1.0

    @property
    def missed(self) -> str | None:
        """What is missing where `attention` does not run, if it was asked for."""
        if self.observe is not None:
            return "entropy not recorded"
        return "the model's own attention was used" if self.attention == "fused" else None

    def is_ours(self, query: torch.Tensor) -> bool:
        """Whether `attention` computes the output. With "auto" the model does at the trained size: same bits."""
        if self.attention == "auto":
            return self.observe is not None or (query.is_cuda and not self.is_unscaled)
        return self.attention == "fused"


class _Scope:
    call: LayerCall | None = None
    cut: bool = False  # the layer in progress cuts the graph of a compiled model


class _ThreadScope(_Scope, threading.local):
    pass


# While tracing, a global: Dynamo does not track writes to threading.local.
_running, _traced = _ThreadScope(), _Scope()


def scope() -> _Scope:
    """The current thread's scope, or the one of the trace."""
    return _traced if torch.compiler.is_compiling() else _running


def running_call() -> LayerCall | None:
    """The call of a layer in progress in this thread, or in the trace."""
    here = scope()
    call = here.call
    if call is None or torch.compiler.is_compiling() or call.traced or is_running(call.module):
        return call
    here.call = None
    return None


def is_running(module: torch.nn.Module) -> bool:
    """Whether a call of `module` is on the stack of this thread.

    A KeyboardInterrupt ends a call without the forward hook that clears our note of it: torch runs ``always_call``
    hooks after an `Exception` only. The frame of the call is gone, so the note counts as stale.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _MODULE_CALL and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


_lock = threading.RLock()
_users: weakref.WeakSet = weakref.WeakSet()
_latest: list[Callable] = []  # the latest replacement, used again: compiled graphs guard on the function


def install(user: object) -> None:
    """Replace SDPA until `release` is called for the last user, or the last one is garbage collected."""
    with _lock:
        _users.add(user)
        weakref.finalize(user, _settle).atexit = False
        _settle()


def release(user: object) -> None:
    with _lock:
        _users.discard(user)
        _settle()


def _settle() -> None:
    """Put the replacement in its place while it has users, and what it replaced back when it has none.

    A function that someone else has put over ours in the meantime is left alone. It may call ours, which then calls
    what it replaced.
    """
    with _lock:
        current = F.scaled_dot_product_attention
        if not any(True for _ in _users):
            F.scaled_dot_product_attention = _under(current)
        elif _under(current) is current:
            if not _latest or _under(_latest[0]) is not current:
                _latest[:] = [_replacement(current)]
            F.scaled_dot_product_attention = _latest[0]


def _under(function: Callable) -> Callable:
    """What a replacement of ours replaced; any other function is returned as it is."""
    code = getattr(function, "__code__", None)  # an attribute would be copied by functools.wraps
    return function.replaced if code is _REPLACEMENT else function  # type: ignore[attr-defined]


def _replacement(sdpa: Callable) -> Callable:
    """A function that stands in for `sdpa`."""

    def scaled_dot_product_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """SDPA; inside a layer, that layer's attention."""
        if torch.jit.is_scripting():
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        else:
            attend = _attend_eagerly if torch.compiler.is_compiling() and scope().cut else _attend
            return attend(sdpa, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    scaled_dot_product_attention.replaced = sdpa  # type: ignore[attr-defined]
    return scaled_dot_product_attention


_REPLACEMENT = _replacement(F.scaled_dot_product_attention).__code__


def _attend(sdpa: Callable, query: torch.Tensor, key: torch.Tensor, *rest, **options) -> torch.Tensor:
    call, here = running_call(), scope()
    if not torch.compiler.is_compiling() and not _users:
        _settle()  # another library restored our replacement after the last user was gone
    if call is None or key.shape[-2] != call.keys:  # an IP-Adapter attends to its image tokens by another call
        return sdpa(query, key, *rest, **options)
    call.attended += 1
    here.call = None  # meanwhile: `attention` on the CPU itself calls SDPA
    try:
        ours, result = call.is_ours(query), None
        if ours or call.observe is not None:
            result = _attention(call, query, key, *rest, **options)
        return result if ours and result is not None else sdpa(query, key, *rest, **options)
    finally:
        here.call = call


_attend_eagerly = torch.compiler.disable(_attend)


def _attention(call: LayerCall, *arguments, **options) -> torch.Tensor | None:
    """The output of `attention`, or None where it cannot run. Observes the entropy where that is wanted."""
    try:
        result: Any = attention(*arguments, **options, return_entropy=call.observe is not None)
    except (TypeError, ValueError) as error:
        if call.missed:
            call.report(f"{call.missed}: {error}")
        return None
    if call.observe is None:
        return result
    call.observe(result.entropy)
    return result.out
