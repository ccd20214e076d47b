"""Which backend runs a call. Each is a module with two functions, imported when first needed.

``forward(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse) -> (out, entropy, lse)`` takes
tensors in (B, H, N, D), `attn_mask` as it was given or None, and `scale` a float, a tensor expanded to (B, H, Nq) or
a `scale.SampleRule`; what was not asked for comes back as None.

``forward_varlen(packed, scale, is_causal, return_entropy, return_lse)`` takes `Packed` sequences, and `scale` a float,
a tensor expanded to (S, H) or a `scale.LengthRule`. It returns (out, entropy, lse) as `new_varlen_outputs` has them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch

from entropy_attn.kernels.tiles import HEAD_DIMS
from entropy_attn.scale import SampleRule

BACKENDS = ("auto", "triton", "cpu", "reference")
TRITON_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}  # by the table's names
TRITON_HEAD_DIMS = frozenset(HEAD_DIMS)
Outputs = tuple[torch.Tensor, Any, Any]  # out, entropy, lse; what was not asked for is None
_modules: dict[tuple, ModuleType] = {}


class Choice(NamedTuple):
    name: str
    reason: str


def choose(query: torch.Tensor, value: torch.Tensor, backend: str) -> Choice:
    """The backend that runs a call, and why. Raises ValueError where the one asked for cannot."""
    if backend == "reference":
        return Choice("reference", "asked for")
    if backend == "cpu":
        if query.device.type != "cpu":
            raise ValueError(f"backend='cpu' takes tensors on the CPU, got query on {query.device}")
        return Choice("cpu", "asked for")
    if backend == "auto" and query.device.type == "cpu":
        return Choice("cpu", "query is on the CPU")
    obstacle = triton_obstacle(query, value)
    if obstacle is None:
        return Choice("triton", "asked for" if backend == "triton" else f"query is on {query.device}")
    remedy = "" if query.device.type == "cpu" else "; backend='reference' runs it with O(Nq * Nk) memory"
    raise ValueError(f"backend={backend!r} cannot run this call: {obstacle}{remedy}")


def triton_obstacle(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot take these tensors, or None if it can."""
    if not _triton_is_installed():
        return "Triton is not installed (pip install triton)"
    if query.device.type != "cuda" and not (query.device.type == "cpu" and interpreting()):
        return (
            f"the Triton kernel needs a CUDA or ROCm device, got query on {query.device} "
            "(on the CPU, TRITON_INTERPRET=1 set before the first call runs it in Triton's slow interpreter)"
        )
    if query.dtype not in TRITON_DTYPES:
        return f"the Triton kernel takes float16, bfloat16 and float32, got query of {query.dtype}"
    for name, head_dim in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if head_dim not in TRITON_HEAD_DIMS:
            return f"the Triton kernel takes head dims 8, 16, 24 ... 256 and 512, got {name} with head dim {head_dim}"
    if query.device.type == "cuda" and torch.version.hip is None:
        capability = _capability(query.device)
        if capability < (7, 5):
            return f"the Triton kernel needs compute capability 7.5 or newer, {query.device} has {capability}"
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, as decided when they were defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def load(query: torch.Tensor, value: torch.Tensor, backend: str) -> ModuleType:
    """The module that runs a call, chosen once for all that are alike in what `choose` looks at."""
    device = query.device
    interpreted = backend == "triton" and device.type == "cpu" and interpreting()
    alike = (device, query.dtype, query.size(-1), value.size(-1), backend, interpreted)
    module = _modules.get(alike)
    if module is None:
        name = choose(query, value, backend).name
        module = _modules[alike] = importlib.import_module(f"entropy_attn.backends.{name}")
    return module


class Packed(NamedTuple):
    """Sequences one after the other. Sequence i has the rows cu_seqlens[i] .. cu_seqlens[i + 1]."""

    query: torch.Tensor  # (total_q, H, D)
    key: torch.Tensor  # (total_k, Hkv, D)
    value: torch.Tensor  # (total_k, Hkv, Dv)
    cu_seqlens_q: torch.Tensor  # (S + 1,), int32
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def heads_lie_inside_tokens(tensor: torch.Tensor) -> bool:
    """Whether a (B, H, N, D) tensor is (B, N, H, D) in memory, as Diffusers has it."""
    _, of_head, of_token, _ = tensor.stride()
    return of_head < of_token


def scale_of_rows(scale: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A tensor (), (B,), (B, H) or (B, H, Nq) as a view (B, H, Nq)."""
    while 0 < scale.dim() < 3:
        scale = scale.unsqueeze(-1)
    return scale.expand(query.shape[:3])


def rule_as_tensor(scale, query: torch.Tensor):
    """`scale`, with a `SampleRule` as λ (B, H, Nq)."""
    return scale_of_rows(scale.scales(query.shape[3]), query) if isinstance(scale, SampleRule) else scale


def new_outputs(query: torch.Tensor, value: torch.Tensor, return_entropy: bool, return_lse: bool) -> Outputs:
    """Uninitialised (out, entropy, lse): out in the memory order of query, as SDPA does it."""
    B, H, Nq, _ = query.shape
    if heads_lie_inside_tokens(query):
        out = query.new_empty((B, Nq, H, value.shape[3])).transpose(1, 2)
    else:
        out = query.new_empty((B, H, Nq, value.shape[3]))
    entropy = query.new_empty((B, H, Nq), dtype=torch.float32) if return_entropy else None
    lse = query.new_empty((B, H, Nq), dtype=torch.float32) if return_lse else None
    return out, entropy, lse


def new_varlen_outputs(query: torch.Tensor, value: torch.Tensor, return_entropy: bool, return_lse: bool) -> Outputs:
    """(out, entropy, lse) for packed sequences, with what rows get that are in no sequence: 0, 0 and -inf."""
    total_q, H, _ = query.shape
    out = query.new_zeros((total_q, H, value.shape[2]))
    entropy = query.new_zeros((H, total_q), dtype=torch.float32) if return_entropy else None
    lse = query.new_full((H, total_q), -torch.inf, dtype=torch.float32) if return_lse else None
    return out, entropy, lse
