"""Launch of the Triton kernel: strides, specialisations and the grid. The kernel itself is in `kernels`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
from typing import Any, NamedTuple

import torch

from entropy_attn.backends import TRITON_DTYPES, new_outputs
from entropy_attn.kernels import split, tiles
from entropy_attn.kernels.attention import attention_forward

_HERE = contextlib.nullcontext()


def forward(query, key, value, attn_mask, scale, is_causal, return_lse, return_entropy):
    out, lse, entropy = new_outputs(query, value, return_lse, return_entropy)
    B, H, Nq, D = query.shape
    _, _, Nk, Dv = value.shape
    if B * H * Nq == 0:
        return out, lse, entropy
    # The kernel reads rows of consecutive elements; a tensor that has none is copied.
    if not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1:
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    device = query.device
    gpu = _gpu(device)
    tile = _tile(device, query.dtype, max(D, Dv), return_entropy, attn_mask is not None)
    programs = B * H * -(-Nq // tile.block_m)
    splits = split.key_splits(programs, Nk, tile, gpu.processors)
    grid: tuple[int, ...] = (programs,)
    results = (out, lse, entropy)
    if splits > 1:
        parts = query.new_empty((splits, B, H, Nq, Dv), dtype=torch.float32)
        part_lse = query.new_empty((splits, B, H, Nq), dtype=torch.float32)
        part_entropy = torch.empty_like(part_lse) if return_entropy else None
        grid = (programs, splits)
        results = (parts[0], part_lse, part_entropy)
    with _on(device):
        _launch(grid, tile, gpu.architecture, query, key, value, attn_mask, scale, is_causal, *results)
        if splits > 1:
            split.merge_splits[(-(-B * H * Nq // split.MERGED_ROWS),)](
                parts, part_lse, part_entropy, out, lse, entropy,
                *out.stride()[:3], B * H * Nq, H, Nq, splits,
                E=Dv, BLOCK_E=tiles.whole(Dv), BLOCK_R=split.MERGED_ROWS,
            )  # fmt: skip
    return out, lse, entropy


def _launch(
    grid, tile, architecture, query, key, value, attn_mask, scale, is_causal, out, lse, entropy
):  # fmt: skip
    """Run the kernel over a grid of (programs,) or (programs, splits); lse and entropy are None if not wanted."""
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
        scale = ctypes.c_float(scale).value

    _, H, Nq, D = query.shape
    _, Hkv, Nk, Dv = value.shape
    strides, unit, farthest, mask_rows = _strides(
        query.stride(), key.stride(), value.stride(), out.stride(), mask_shape, mask_strides
    )
    keys_per_split = Nk if len(grid) == 1 else -(-Nk // (tile.block_n * grid[1])) * tile.block_n
    dtype = query.dtype
    constants = _constants(
        architecture, TRITON_DTYPES[dtype], D, Dv, tile, is_causal, mask_kind, mask_rows,
        dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        unit, farthest * max(tile.block_m, tile.block_n) >= 2**31, len(grid) > 1,
    )  # fmt: skip
    attention_forward[grid](
        query, key, value, attn_mask, scale_tensor, out, lse, entropy, scale, *strides, *scale_strides,
        H, Hkv, Nq, Nk, keys_per_split, **constants,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _strides(query, key, value, out, mask_shape, mask) -> tuple[tuple[int, ...], int, int, bool]:
    """The strides as the kernel takes them, the unit of all but the mask's, the largest inside a tile, and whether
    queries have masks of their own."""
    strides = (*query[:3], *key[:3], *value[:3], *out[:3])
    unit = 1 if functools.reduce(operator.or_, strides) & 7 else 8
    mask = ((0,) * 4 + tuple(0 if n == 1 else s for n, s in zip(mask_shape, mask, strict=True)))[-4:]  # broadcast
    farthest = max(query[2], key[2], value[2], out[2], mask[2], mask[3])
    return (*(s // unit for s in strides), *mask), unit, farthest, mask[2] != 0


@functools.cache
def _constants(
    architecture, dtype, head_dim, value_dim, tile, is_causal, mask, mask_rows, tf32, stride_unit, wide, is_split
) -> dict[str, Any]:  # fmt: skip
    """What is fixed when the kernel is compiled."""
    constants = tiles.constexprs(
        architecture, dtype, head_dim, value_dim, tile, is_causal=is_causal, mask=mask, mask_rows=mask_rows,
        tf32=tf32, stride_unit=stride_unit, wide=wide, split=is_split,
    )  # fmt: skip
    return constants | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def tile_for(query: torch.Tensor, value: torch.Tensor, return_entropy: bool, masked: bool) -> tiles.Tile:
    """The tile these tensors are run with on their device."""
    return _tile(query.device, query.dtype, max(query.shape[3], value.shape[3]), return_entropy, masked)


@tiles.cached
def _tile(device, dtype, head_dim, return_entropy, masked) -> tiles.Tile:
    return tiles.find_tile(_gpu(device).architecture, TRITON_DTYPES[dtype], head_dim, return_entropy, masked)


class _Gpu(NamedTuple):
    architecture: str  # "sm_80", "gfx942" and so on
    processors: int


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type == "cpu":  # the interpreter has no architecture: it runs what an A100 would
        return _Gpu("sm_80", 108)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return _Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return _Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
