"""Which backend, scale and tile a call of `attention` would use."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from entropy_attn import checks
from entropy_attn.attention import attention
from entropy_attn.backends import choose
from entropy_attn.op import resolve_scale
from entropy_attn.scale import SampleRule


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call of `attention` would do; `print` it, or read the fields.

    `scale` and `num_tokens` are None for tensors: reading them would synchronise. `config` is what the Triton
    kernel is compiled for, an `entropy_attn.kernels.config.Config`, its tile included; None for the other backends.
    """

    backend: str
    reason: str
    scale: float | None
    num_tokens: int | None
    train_tokens: int | None
    config: Any

    def __str__(self) -> str:
        trained = f"T = {self.train_tokens}, " if self.train_tokens is not None else ""
        scale = "a tensor" if self.scale is None else f"{self.scale:.6g}"
        tokens = "a tensor" if self.num_tokens is None else self.num_tokens
        lines = [f"backend  {self.backend}: {self.reason}", f"scale    {scale} ({trained}N = {tokens})"]
        if self.config is not None:
            lines.append(f"tile     {self.config.tile}")
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """What `attention` would do with these same arguments. Raises what `attention` would raise; runs nothing."""
    bound = inspect.signature(attention).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, key, value, attn_mask, scale_tensor, scale, *rule, is_causal, return_entropy, return_lse, backend = (
        checks.operator_arguments(**given)
    )
    train_tokens, _, num_tokens, num_tokens_tensor = rule
    backend, reason = choose(query, value, backend)
    resolved = resolve_scale(query, key, scale_tensor, scale, *rule)
    config = None
    if backend == "triton":
        from entropy_attn.backends.triton import config_of

        config = config_of(query, key, value, attn_mask, resolved, is_causal, return_entropy, return_lse)
    if num_tokens is None and num_tokens_tensor is None:
        num_tokens = key.shape[2]
    scale = None if isinstance(resolved, (torch.Tensor, SampleRule)) else resolved
    return Explanation(backend, reason, scale, num_tokens, train_tokens, config)
