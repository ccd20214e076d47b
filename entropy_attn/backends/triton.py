"""Launch of the Triton kernels: their strides, their configuration and their grid. They themselves are in `kernels`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
import struct
import warnings
from typing import NamedTuple

import torch

from entropy_attn.backends import TRITON_DTYPES, Packed, new_outputs, new_varlen_outputs
from entropy_attn.kernels.attention import attention_forward
from entropy_attn.kernels.config import Config, configure
from entropy_attn.kernels.tiles import Tile, find_tile
from entropy_attn.kernels.varlen import attention_varlen_forward
from entropy_attn.scale import LengthRule, SampleRule

_HERE = contextlib.nullcontext()
RIGHT_PTXAS = (13, 0)  # the oldest that is known to assemble the kernel right for Hopper


def forward(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse, tile: Tile | None = None):
    """As every backend's; `tile` stands in for the table's."""
    out, entropy, lse = new_outputs(query, value, return_entropy, return_lse)
    B, H, Nq, _ = query.shape
    if B * H * Nq == 0:
        return out, entropy, lse
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    strides, config = _plan(query, key, value, attn_mask, scale, is_causal, out, entropy, lse, tile)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.uint8)
    scale, scale_strides = _scale(scale)
    with _on(query.device):
        attention_forward[(B * H * -(-Nq // config.tile.block_m),)](
            query, key, value, attn_mask, scale, out, entropy, lse, *strides, *scale_strides,
            H, key.shape[1], Nq, key.shape[2],
            C=config, **config.launch_options,
        )  # fmt: skip
    return out, entropy, lse


def forward_varlen(packed: Packed, scale, is_causal, return_entropy, return_lse, tile: Tile | None = None):
    """As every backend's; `tile` stands in for the table's. Nothing is read by the host."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packed
    out, entropy, lse = new_varlen_outputs(query, value, return_entropy, return_lse)
    total_q, H, _ = query.shape
    S, max_seqlen_q = cu_seqlens_q.shape[0] - 1, min(max_seqlen_q, total_q)
    if S * H * max_seqlen_q == 0:
        return out, entropy, lse
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    q, k, v, o = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value, out))  # (1, H, total, D)
    strides, config = _plan(q, k, v, None, scale, is_causal, o, entropy, lse, tile)
    _, qh, qn, _, kh, kn, _, vh, vn, _, oh, on, *_ = strides
    scale, scale_strides = _varlen_scale(scale, S, query.device)
    with _on(query.device):
        attention_varlen_forward[(S * H * -(-max_seqlen_q // config.tile.block_m),)](
            query, key, value, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), scale, out, entropy, lse,
            qn, qh, kn, kh, vn, vh, on, oh, *scale_strides,
            H, key.shape[1], total_q, key.shape[0], max_seqlen_q, min(max_seqlen_k, key.shape[0]),
            C=config, **config.launch_options,
        )  # fmt: skip
    return out, entropy, lse


def _scale(scale):
    """The argument Scale of `attention_forward`, and its strides."""
    if isinstance(scale, torch.Tensor):  # (B, H, Nq)
        return scale, scale.stride()
    if isinstance(scale, SampleRule):
        num_tokens, train_tokens, train_entropy = scale
        return (num_tokens, _rounded(train_tokens), _rounded(train_entropy)), (num_tokens.stride(0), 0, 0)
    return _rounded(scale), (0, 0, 0)


def _varlen_scale(scale, S: int, device: torch.device):
    """The argument Scale of `attention_varlen_forward`, and its strides."""
    if isinstance(scale, torch.Tensor):  # (S, H)
        return scale, scale.stride()
    if not isinstance(scale, LengthRule):
        return _rounded(scale), (0, 0)
    train_tokens, train_entropy = scale
    if not isinstance(train_tokens, torch.Tensor) and not isinstance(train_entropy, torch.Tensor):
        return (_rounded(train_tokens), _rounded(train_entropy)), (0, 0)
    tensors = (x if isinstance(x, torch.Tensor) else torch.full((S,), x, device=device) for x in scale)
    return tuple(x.to(torch.float32).contiguous() for x in tensors), (0, 0)


def config_of(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse) -> Config:
    """The configuration that `forward` launches the kernel with for these arguments. Nothing runs."""
    device = query.device
    query, key, value = (x.to("meta") for x in (query, key, value))
    outputs = new_outputs(query, value, return_entropy, return_lse)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return _plan(query, key, value, attn_mask, scale, is_causal, *outputs, tile=None, device=device)[1]


def _plan(
    query, key, value, attn_mask, scale, is_causal, out, entropy, lse, tile: Tile | None, device=None
) -> tuple[tuple[int, ...], Config]:
    """The strides that the kernel is given and the configuration it is compiled for."""
    mask, mask_shape, mask_strides = "none", (), ()
    if attn_mask is not None:
        mask = "boolean" if attn_mask.dtype == torch.bool else "floating"
        mask_shape, mask_strides = attn_mask.shape, attn_mask.stride()
    strides = _strides(
        (query.shape, key.shape, value.shape, out.shape, mask_shape),
        (query.stride(), key.stride(), value.stride(), out.stride(), mask_strides),
    )
    config = _config(
        device or query.device,
        query.dtype,
        query.shape[3],
        value.shape[3],
        tile,
        strides.largest,
        is_causal=is_causal,
        mask=mask,
        mask_per_query=strides.mask_per_query,
        scale=_scale_kind(scale),
        entropy=entropy is not None,
        lse=lse is not None,
        tf32=query.dtype == torch.float32 and _tf32_allowed(),
        row_unit=strides.row_unit,
        mask_unit=strides.mask_unit,
    )
    return strides.strides, config


class _Strides(NamedTuple):
    """strides: in the order and units of the kernel. largest: of a query's, key's or value's row, or of the mask's row
    or key, in elements. The rest: fields of `Config`."""

    strides: tuple[int, ...]
    row_unit: int
    mask_unit: int
    largest: int
    mask_per_query: bool


@functools.lru_cache(maxsize=4096)
def _strides(shapes, strides) -> _Strides:
    """Axes of size 1 have stride 0, whatever the tensor says."""
    query, key, value, out, mask = (
        tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))
        for shape, stride in zip(shapes, strides, strict=True)
    )
    rows = (*query[:3], *key[:3], *value[:3], *out[:3])
    row_unit = 1 if functools.reduce(operator.or_, rows) & 7 else 8
    mask = ((0,) * 4 + mask)[-4:]  # broadcast
    mask_unit = 1 if functools.reduce(operator.or_, mask[:3]) & 15 else 16
    in_units = (*(s // row_unit for s in rows), *(s // mask_unit for s in mask[:3]), mask[3])
    largest = max(query[2], key[2], value[2], out[2], mask[2], mask[3])
    return _Strides(in_units, row_unit, mask_unit, largest, mask_per_query=mask[2] != 0)


@functools.lru_cache(maxsize=4096)
def _config(device, dtype, head_dim, value_dim, tile, largest_stride, **options) -> Config:
    architecture, dtype = _architecture(device), TRITON_DTYPES[dtype]
    tile = tile or find_tile(architecture, dtype, max(head_dim, value_dim))
    large_offsets = largest_stride * max(tile.block_m, tile.block_n) >= 2**31
    return configure(architecture, dtype, head_dim, value_dim, tile=tile, large_offsets=large_offsets, **options)


def _scale_kind(scale) -> str:
    """`Config.scale` for a number, a tensor expanded to (B, H, Nq) or (S, H), a `SampleRule` or a `LengthRule`."""
    if isinstance(scale, SampleRule):
        return "num_tokens"
    if isinstance(scale, LengthRule):
        return "lengths_per_sequence" if any(isinstance(x, torch.Tensor) for x in scale) else "lengths"
    if not isinstance(scale, torch.Tensor):
        return "number"
    return "per_query" if scale.dim() == 3 and scale.stride(2) else "per_head"


def _rounded(scale: float) -> float:
    """The float32 nearest to the scale, as a device receives it: Triton's interpreter would go on with the float64."""
    return struct.unpack("f", struct.pack("f", scale))[0]


def _tf32_allowed() -> bool:
    """Whether PyTorch may round float32 matrix products to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32  # before torch 2.9


@functools.cache
def _architecture(device: torch.device) -> str:
    """ "sm_80", "gfx942" and so on."""
    if device.type == "cpu":  # the interpreter has no architecture: it runs what an A100 would
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    if properties.major == 9:
        _check_assembler()
    return f"sm_{properties.major}{properties.minor}"


def _check_assembler() -> None:
    """Warn where Triton has an assembler that makes wrong code of the kernel for Hopper (benchmarks/README.md)."""
    from triton.backends.nvidia import compiler

    takes_architecture = inspect.signature(compiler.get_ptxas_version).parameters  # not in Triton 3.4
    version = compiler.get_ptxas_version(90) if takes_architecture else compiler.get_ptxas_version()
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release and (int(release[1]), int(release[2])) < RIGHT_PTXAS:
        warnings.warn(
            f"entropy_attn: Triton's ptxas {release[1]}.{release[2]} miscompiles this kernel for Hopper at some head "
            "dims, with wrong results or an illegal memory access. ptxas of CUDA 13.0 does not: set TRITON_PTXAS_PATH "
            "to it before the first call",
            RuntimeWarning,
            stacklevel=2,
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
