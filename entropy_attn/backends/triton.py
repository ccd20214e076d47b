"""Launch of the Triton kernel: strides, specialisations and the grid. The kernel itself is in `kernels`."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import torch

from entropy_attn.backends import new_outputs
from entropy_attn.kernels import tiles
from entropy_attn.kernels.attention import attention_forward


def forward(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy):
    out, lse, entropy = new_outputs(query, value, return_lse, return_entropy)
    # The kernel reads rows of consecutive elements; a tensor that has none is copied.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    B, H, Nq, D = query.shape
    Dv = value.shape[3]
    if B * H * Nq == 0:
        return out, lse, entropy
    architecture, dtype = _architecture(query.device), _name(query.dtype)
    tile = tiles.find_tile(architecture, dtype, max(D, Dv))
    mask_kind, mask_strides = "none", (0, 0, 0, 0)
    if attn_mask is not None:
        mask_kind, mask_strides = "bool" if attn_mask.dtype == torch.bool else "bias", attn_mask.stride()
        attn_mask = attn_mask.view(torch.uint8) if mask_kind == "bool" else attn_mask
    scale_tensor: torch.Tensor | None = None
    scale_strides: tuple[int, ...] = (0, 0)
    if not isinstance(scale, torch.Tensor):
        scale = ctypes.c_float(scale).value
    else:
        scale_tensor, scale_strides, scale = scale, scale.stride(), 0.0

    strides = [s for x in (query, key, value, out) for s in x.stride()[:3]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    farthest = max(tile.block_m, tile.block_n) * max(*strides[2::3], *mask_strides[2:])
    constants = tiles.constexprs(
        architecture, dtype, D, Dv, tile,
        is_causal=is_causal, mask=mask_kind, mask_rows=mask_strides[2] != 0 and Nq > 1,
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32", stride_unit=unit, wide=farthest >= 2**31,
    )  # fmt: skip
    with _on(query.device):
        attention_forward[(B * H * -(-Nq // tile.block_m),)](
            query, key, value, attn_mask, scale_tensor, out,
            lse if return_lse else None, entropy if return_entropy else None,
            scale, *(s // unit for s in strides), *mask_strides, *scale_strides,
            H, key.shape[1], Nq, key.shape[2],
            **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse, entropy


def tile_for(query: torch.Tensor, value: torch.Tensor) -> tiles.Tile:
    """The tile of the table for these tensors on their device."""
    return tiles.find_tile(_architecture(query.device), _name(query.dtype), max(query.shape[3], value.shape[3]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _architecture(device: torch.device) -> str:
    # The interpreter has no architecture; it runs the tiles of the A100.
    return "sm_80" if device.type == "cpu" else _device_architecture(device.index)


@functools.cache
def _device_architecture(index: int) -> str:
    """ "sm_80", "gfx942" and so on."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
