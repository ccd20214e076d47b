"""Launch of the Triton kernel: strides, specialisations and the grid. The kernel itself is in `kernels`."""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
from typing import Any

import torch

from entropy_attn.backends import TRITON_DTYPES, new_outputs
from entropy_attn.kernels import tiles
from entropy_attn.kernels.attention import attention_forward

_HERE = contextlib.nullcontext()


def forward(query, key, value, attn_mask, scale, is_causal, return_entropy, return_lse):
    out, entropy, lse = new_outputs(query, value, return_entropy, return_lse)
    B, H, Nq, D = query.shape
    Dv = value.shape[3]
    if B * H * Nq == 0:
        return out, entropy, lse
    # The kernel reads rows of consecutive elements; a tensor that has none is copied.
    if not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1:
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    tile = tile_for(query.device, query.dtype, max(D, Dv))
    with _on(query.device):
        _launch(tile, query, key, value, attn_mask, scale, is_causal, out, entropy, lse)
    return out, entropy, lse


def _launch(tile, query, key, value, attn_mask, scale, is_causal, out, entropy, lse):
    """Run the kernel; entropy and lse are None if not wanted."""
    mask_kind, mask_shape, mask_strides = "none", (), ()
    if attn_mask is not None:
        mask_kind, mask_shape, mask_strides = "bias", attn_mask.shape, attn_mask.stride()
        if attn_mask.dtype == torch.bool:
            mask_kind, attn_mask = "bool", attn_mask.view(torch.uint8)
    scale_tensor: torch.Tensor | None = None
    scale_strides: tuple[int, ...] = (0, 0)
    if isinstance(scale, torch.Tensor):
        scale_tensor, scale_strides, scale = scale, scale.stride(), 0.0
    else:
        scale = _rounded(scale)

    B, H, Nq, D = query.shape
    _, Hkv, Nk, Dv = value.shape
    strides, unit, mask_unit, farthest, mask_rows = _strides(
        (query.shape, key.shape, value.shape, out.shape, mask_shape),
        (query.stride(), key.stride(), value.stride(), out.stride(), mask_strides),
    )
    constants = _constants(
        _architecture(query.device), TRITON_DTYPES[query.dtype], D, Dv, tile, is_causal, mask_kind, mask_rows,
        query.dtype == torch.float32 and _tf32_allowed(), unit, mask_unit,
        farthest * max(tile.block_m, tile.block_n) >= 2**31,
    )  # fmt: skip
    attention_forward[(B * H * -(-Nq // tile.block_m),)](
        query, key, value, attn_mask, scale_tensor, out, entropy, lse, scale, *strides, *scale_strides,
        H, Hkv, Nq, Nk, **constants,
    )  # fmt: skip


def _rounded(scale: float) -> float:
    """The float32 nearest to λ, as the kernel receives it: the interpreter would compute with the float64."""
    return struct.unpack("f", struct.pack("f", scale))[0]


def _tf32_allowed() -> bool:
    """Whether PyTorch may round float32 matrix products to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32  # before torch 2.9


@functools.lru_cache(maxsize=4096)
def _strides(shapes, strides) -> tuple[tuple[int, ...], int, int, int, bool]:
    """The strides as the kernel takes them, their unit, that of the mask's (but for the keys'), the largest inside a
    tile, and whether queries have masks of their own. Axes of size 1 have stride 0, whatever the tensor says."""
    query, key, value, out, mask = (
        tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))
        for shape, stride in zip(shapes, strides, strict=True)
    )
    rows = (*query[:3], *key[:3], *value[:3], *out[:3])
    unit = 1 if functools.reduce(operator.or_, rows) & 7 else 8
    mask = ((0,) * 4 + mask)[-4:]  # broadcast
    mask_unit = 1 if functools.reduce(operator.or_, mask[:3]) & 15 else 16
    farthest = max(query[2], key[2], value[2], out[2], mask[2], mask[3])
    kernel_strides = (*(s // unit for s in rows), *(s // mask_unit for s in mask[:3]), mask[3])
    return kernel_strides, unit, mask_unit, farthest, mask[2] != 0


@functools.cache
def _constants(
    architecture, dtype, head_dim, value_dim, tile, is_causal, mask, mask_rows, tf32, stride_unit, mask_unit, wide
) -> dict[str, Any]:  # fmt: skip
    """What is fixed when the kernel is compiled."""
    constants = tiles.constexprs(
        architecture, dtype, head_dim, value_dim, tile, is_causal=is_causal, mask=mask, mask_rows=mask_rows,
        tf32=tf32, stride_unit=stride_unit, mask_unit=mask_unit, wide=wide,
    )  # fmt: skip
    # The kernel's sums want fused multiply-adds: Triton 3.10 will not fuse unless asked to.
    return constants | {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


@tiles.cached
def tile_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> tiles.Tile:
    """The tile that such tensors are run with on their device; `head_dim` is the larger of query's and value's."""
    return tiles.find_tile(_architecture(device), TRITON_DTYPES[dtype], head_dim)


@functools.cache
def _architecture(device: torch.device) -> str:
    """ "sm_80", "gfx942" and so on."""
    if device.type == "cpu":  # the interpreter has no architecture: it runs what an A100 would
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
