"""Everything that is fixed when the kernel is compiled, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tiles import Tile, find_tile, table_architecture

Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Config:
    """What one compiled kernel is for. `configure` builds it; the kernel reads it.

    Triton finds a compiled kernel in its cache by these fields. What is derived from others is a field as well, so
    that another rule in `configure` compiles anew.

    key_pieces, value_pieces: the (start, width) of the pieces that hold the head dim of query and key, and of value.
    precision: of tl.dot with float32, "ieee", "tf32" or "tf32x3".
    mask: "none", "boolean" or "floating". mask_per_query: its rows differ from query to query; else all queries of a
        head share one row of keys.
    scale: "number", or of a tensor "per_head" or "per_query", or "num_tokens": the rule of T, from each sample's N. For
        packed sequences "number", "per_head", "lengths": the rule of T, from the length of each sequence, or
        "lengths_per_sequence", where each has its own T.
    row_unit, mask_unit: strides are given in units of that many elements. The unit tells the compiler how far every
        row is aligned, so that it loads 16 bytes at once.
    large_offsets: an offset inside one tile can pass 2^31 elements.
    round_products: round p * x before it is summed. Where a thread holds a single score of a row, a fused multiply-add
        of a thread and its partner would round the other's product only, and the two sums would differ.
    """

    head_dim: int
    value_dim: int
    key_pieces: Pieces
    value_pieces: Pieces
    tile: Tile
    precision: str
    is_causal: bool
    mask: str
    mask_per_query: bool
    scale: str
    entropy: bool
    lse: bool
    row_unit: int
    mask_unit: int
    large_offsets: bool
    round_products: bool

    @property
    def launch_options(self) -> dict[str, Any]:
        """Triton's own options. The kernel's sums want fused multiply-adds, which Triton 3.10 leaves off by default."""
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, "enable_fp_fusion": True}


def configure(
    architecture: str,
    dtype: str,
    head_dim: int,
    value_dim: int | None = None,
    *,
    tile: Tile | None = None,
    is_causal: bool = False,
    mask: str = "none",
    mask_per_query: bool = False,
    scale: str = "number",
    entropy: bool = False,
    lse: bool = False,
    tf32: bool = False,
    row_unit: int = 8,
    mask_unit: int = 16,
    large_offsets: bool = False,
) -> Config:
    """The configuration for an architecture ("sm_80", "gfx942") and a dtype ("float16").

    value_dim is head_dim by default, and `tile` the table's. tf32 lets float32 products be rounded to TF32. The other
    arguments are fields of `Config`.
    """
    value_dim = value_dim or head_dim
    tile = tile or find_tile(architecture, dtype, max(head_dim, value_dim))
    matrix_units = _has_matrix_units(architecture, dtype, max(head_dim, value_dim))
    tensor_cores = matrix_units and dtype == "float32" and architecture.startswith("sm_")
    return Config(
        head_dim=head_dim,
        value_dim=value_dim,
        key_pieces=pieces(head_dim),
        value_pieces=pieces(value_dim),
        tile=tile,
        precision=("tf32" if tf32 else "tf32x3") if tensor_cores else "ieee",
        is_causal=is_causal,
        mask=mask,
        mask_per_query=mask_per_query,
        scale=scale,
        entropy=entropy,
        lse=lse,
        row_unit=row_unit,
        mask_unit=mask_unit,
        large_offsets=large_offsets,
        round_products=not matrix_units or mask_per_query,
    )


def _has_matrix_units(architecture: str, dtype: str, head_dim: int) -> bool:
    """Whether the products go to tensor cores or their like; float32 does so there as three TF32 products."""
    if table_architecture(architecture) in ("sm_75", "gfx1100"):  # Triton 3.7 has no path to Turing's
        return table_architecture(architecture) == "gfx1100" and dtype != "float32"
    # 512 columns of query do not fit the registers as TF32 operands.
    return not (architecture.startswith("sm_") and dtype == "float32" and head_dim > 256)


def pieces(head_dim: int) -> Pieces:
    """The head dim in one or two powers of two, each as (start, width), that pad it least.

    40 -> 32 + 16, 80 -> 64 + 16, 96 -> 64 + 32, 160 -> 128 + 32. A matrix product needs a width of at least 16.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    first = padded // 2
    rest = max(16, 1 << (head_dim - first - 1).bit_length()) if head_dim > first else 16
    return ((0, first), (first, rest)) if first >= 32 and rest < first else ((0, padded),)
