"""``torch.ops.entropy_attn.attention``: one opaque operator, so that λ is computed from N and T when it runs.

A graph that holds it has no λ in it, only the integers λ comes from: it is compiled once for any number of sizes.
"""

from __future__ import annotations

import functools
import math

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_keys,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack

from entropy_attn.backends import load, new_outputs
from entropy_attn.scale import entropy_scale

_library = torch.library.Library("entropy_attn", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? scale_tensor, float? scale, "
    "SymInt? train_tokens, float train_entropy, SymInt? num_tokens, bool is_causal, bool return_lse, "
    "bool return_entropy, str backend) -> (Tensor out, Tensor lse, Tensor entropy)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def resolve_scale(head_dim, Nk, scale, train_tokens, train_entropy, num_tokens) -> float:
    """λ as a number, from whichever of the arguments of `attention` decide it."""
    if train_tokens is not None:
        num_tokens = Nk if num_tokens is None else num_tokens
        return entropy_scale(num_tokens, train_tokens, head_dim, train_entropy)
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


# For the operator, whose sizes are numbers when it runs; those of a graph being traced cannot be looked up.
_remembered_scale = functools.lru_cache(maxsize=1024)(resolve_scale)


def forward(
    query, key, value, attn_mask, scale_tensor, scale, train_tokens, train_entropy, num_tokens,
    is_causal, return_lse, return_entropy, backend,
):  # fmt: skip
    """What the operator does, on arguments that `attention` has checked."""
    if scale_tensor is None:
        scale = _remembered_scale(query.shape[3], key.shape[2], scale, train_tokens, train_entropy, num_tokens)
    else:  # (), (B,) or (B, H)
        scale = (scale_tensor[:, None] if scale_tensor.dim() == 1 else scale_tensor).expand(query.shape[:2])
    run = load(query, value, backend)
    return run(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy)


def _operator(query, *rest):
    return _tensors(query, forward(query, *rest))


def _tensors(query, outputs):
    """An operator returns tensors: empty ones for what was not asked for."""
    return tuple(query.new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)


_library.impl("attention", _operator, "CompositeExplicitAutograd")


def call(*arguments):
    """The operator; past PyTorch's dispatcher, the slowest part of a call, where that would only pass it on."""
    query, key, value, attn_mask, scale_tensor = arguments[:5]
    if (
        not torch.compiler.is_compiling()
        and not _watched()
        and _is_plain(query)
        and _is_plain(key)
        and _is_plain(value)
        and _is_plain(attn_mask)
        and _is_plain(scale_tensor)
    ):
        return forward(*arguments)
    return torch.ops.entropy_attn.attention(*arguments)


def _plain_keys() -> set[int]:
    """The dispatch keys of ordinary tensors on the CPU and on a GPU, inside inference mode and outside of it."""
    keys, one = DispatchKey, DispatchKeySet
    CPU = one(keys.CPU).add(keys.AutocastCPU)
    GPU = one(keys.CUDA).add(keys.AutocastCUDA)
    sets = (
        CPU, CPU.add(keys.ADInplaceOrView).add(keys.AutogradCPU),
        GPU, GPU.add(keys.ADInplaceOrView).add(keys.AutogradCUDA),
    )  # fmt: skip
    return {each.raw_repr() for each in sets}


_PLAIN_KEYS = _plain_keys()


def _is_plain(tensor: torch.Tensor | None) -> bool:
    """Whether the dispatcher would hand it over as it is: no subclass or wrapper, no negation put off until read."""
    return tensor is None or (type(tensor) is torch.Tensor and _dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS)


def _watched() -> bool:
    """Whether something looks at operators as they are dispatched: a mode, a transform, a tracer, a profiler."""
    return (
        _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


@torch.library.register_fake("entropy_attn::attention", lib=_library)
def _fake(
    query, key, value, attn_mask, scale_tensor, scale, train_tokens, train_entropy, num_tokens,
    is_causal, return_lse, return_entropy, backend,
):  # fmt: skip
    return _tensors(query, new_outputs(query, value, return_lse, return_entropy))
