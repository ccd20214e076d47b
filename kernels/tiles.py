"""Which tile the kernel runs with: a table over architecture, dtype and head dim.

The rows were chosen from binaries compiled ahead of time, by what the compiler makes of them: that they fit, that the
main loop spills little, and for sm_80 in 16-bit types by a count of cycles of the main loop's instructions. None has
been timed on a device yet. `spills` is the most stack in bytes that Triton 3.7.1 gives a thread, main loop or not.

ENTROPY_ATTN_TILES names a JSON file whose entries go before the table: {"sm_80": {"float16": {"64": {"block_m": 128,
"block_n": 64, "num_warps": 4, "num_stages": 2}}}}, with the largest head dim an entry serves as its key.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_DIMS = (*range(8, 257, 8), 512)
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Tile:
    """How one program cuts its work: block_m queries at a time against block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    spills: int = 0


# architecture -> bits of the dtype -> largest head dim served -> tile
TABLE: dict[str, dict[int, dict[int, Tile]]] = {
    # No tensor cores here: Triton multiplies with FMA instructions.
    "sm_75": {
        16: {
            96: Tile(64, 32, 8, 1, spills=272), 192: Tile(32, 32, 8, 1, spills=256),
            256: Tile(32, 16, 8, 1, spills=1360), 512: Tile(16, 16, 8, 1, spills=1464),
        },
        32: {
            96: Tile(64, 32, 8, 1, spills=296), 192: Tile(32, 32, 8, 1, spills=304),
            256: Tile(32, 16, 8, 1, spills=2112),
            512: Tile(16, 16, 4, 1, spills=4840),
        },
    },
    # 16 bits up to 192: the fewest cycles a score, ties to the tile that spills least.
    "sm_80": {
        16: {
            16: Tile(128, 64, 4, 2, spills=16), 32: Tile(128, 64, 4, 3), 40: Tile(64, 64, 2, 2, spills=8),
            64: Tile(128, 64, 4, 2, spills=16), 80: Tile(128, 64, 4, 2, spills=16), 96: Tile(128, 32, 4, 2, spills=16),
            128: Tile(128, 32, 4, 3, spills=72), 160: Tile(128, 64, 8, 3, spills=24),
            192: Tile(128, 64, 8, 2, spills=24),
            256: Tile(64, 32, 8, 1),
            512: Tile(64, 16, 8, 1, spills=8),
        },
        32: {
            64: Tile(64, 16, 4, 2), 96: Tile(64, 16, 8, 2, spills=472), 128: Tile(32, 16, 4, 2, spills=16),
            160: Tile(64, 16, 8, 2, spills=472), 192: Tile(32, 16, 8, 2, spills=16),
            256: Tile(16, 16, 4, 1, spills=144), 512: Tile(32, 16, 8, 1, spills=4208),
        },
    },
    "sm_86": {
        16: {
            64: Tile(128, 64, 4, 2, spills=24), 80: Tile(128, 32, 4, 2, spills=8),
            96: Tile(128, 64, 8, 2, spills=8), 192: Tile(128, 32, 8, 2, spills=96), 256: Tile(64, 32, 8, 1),
            512: Tile(64, 16, 8, 1, spills=8),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2, spills=8), 128: Tile(32, 16, 4, 2, spills=56),
            192: Tile(32, 16, 8, 2, spills=400), 256: Tile(16, 16, 4, 1, spills=248),
            512: Tile(16, 16, 8, 1, spills=1904),
        },
    },
    "sm_90": {
        16: {
            64: Tile(128, 128, 8, 2), 96: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 3), 160: Tile(128, 64, 8, 2),
            192: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 8, 1),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2, spills=40),
            192: Tile(32, 16, 8, 2, spills=440), 256: Tile(16, 16, 4, 1, spills=152),
            512: Tile(32, 16, 8, 1, spills=4288),
        },
    },
    "sm_100": {
        16: {
            32: Tile(128, 128, 8, 2), 96: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 3), 192: Tile(128, 32, 8, 2),
            256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 8, 1),
        },
        32: {
            80: Tile(64, 32, 8, 2, spills=16), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2, spills=80),
            192: Tile(32, 16, 8, 2, spills=488), 256: Tile(16, 16, 4, 1, spills=320),
            512: Tile(32, 16, 8, 1, spills=4384),
        },
    },
    "sm_120": {
        16: {
            32: Tile(128, 64, 4, 2), 64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2, spills=128),
            192: Tile(128, 32, 8, 2, spills=128), 256: Tile(64, 32, 8, 1), 512: Tile(32, 16, 8, 1),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2, spills=32), 128: Tile(32, 16, 4, 2, spills=104),
            192: Tile(32, 16, 8, 2, spills=496), 256: Tile(16, 16, 4, 1, spills=392),
            512: Tile(16, 16, 8, 1, spills=1936),
        },
    },
    "gfx942": {
        16: {
            64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 4, 1), 192: Tile(128, 32, 8, 1), 256: Tile(128, 16, 8, 1),
            512: Tile(64, 16, 4, 1),
        },
        32: {
            128: Tile(64, 32, 4, 1), 256: Tile(64, 16, 8, 1), 512: Tile(16, 16, 8, 1),
        },
    },
    "gfx1100": {
        16: {
            64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1, spills=160), 160: Tile(64, 16, 8, 1),
            192: Tile(16, 16, 4, 1, spills=60), 256: Tile(32, 16, 4, 1, spills=508),
            512: Tile(64, 16, 16, 1, spills=740),
        },
        32: {
            32: Tile(64, 16, 8, 1), 256: Tile(16, 16, 8, 1, spills=812), 512: Tile(16, 16, 16, 1, spills=2176),
        },
    },
}  # fmt: skip


_override: Tile | None = None
_caches: list[Any] = []


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """functools.cache for what depends on `find_tile`: `reload` and `override` empty it."""
    _caches.append(functools.cache(function))
    return _caches[-1]


def reload() -> None:
    """Forget what ENTROPY_ATTN_TILES named and held. Launches read it once; after a change, call this."""
    for cache in _caches:
        cache.cache_clear()


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Every launch inside runs with this tile, in all threads."""
    global _override
    before, _override = _override, tile
    reload()
    try:
        yield
    finally:
        _override = before
        reload()


def find_tile(architecture: str, dtype: str, head_dim: int) -> Tile:
    """The tile for an architecture ("sm_80", "gfx942"), a dtype ("float16") and the larger of the two head dims."""
    if _override is not None:
        return _override
    return _find_tile(os.environ.get("ENTROPY_ATTN_TILES", ""), architecture, dtype, head_dim)


@cached
def _find_tile(path: str, architecture: str, dtype: str, head_dim: int) -> Tile:
    rows = _overrides(path).get(architecture, {}).get(dtype, {})
    if not any(largest >= head_dim for largest in rows):
        rows = TABLE[table_architecture(architecture)][32 if dtype == "float32" else 16]
    return rows[min(largest for largest in rows if largest >= head_dim)]


def table_architecture(architecture: str) -> str:
    """The architecture of the table that stands for this one: the newest of its kind that is not newer."""
    if architecture.startswith("gfx"):
        return "gfx942" if architecture.startswith("gfx9") else "gfx1100"
    known = [name for name in TABLE if name.startswith("sm_")]
    older = [name for name in known if int(name[3:]) <= int(architecture[3:])]
    return max(older or known[:1], key=lambda name: int(name[3:]))


def constexprs(
    architecture: str, dtype: str, head_dim: int, value_dim: int, tile: Tile, *,
    is_causal: bool, mask: str, mask_rows: bool, tf32: bool, stride_unit: int, mask_unit: int, wide: bool,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is fixed when the kernel is compiled, by the names of its parameters.

    `mask` is "none", "bool" or "bias"; `tf32` lets float32 products be rounded to TF32.
    """
    D1, D2 = split_head_dim(head_dim)
    E1, E2 = split_head_dim(value_dim)
    matrix_units = _has_matrix_units(architecture, dtype, max(head_dim, value_dim))
    # A row's columns lie side by side in its threads with matrix units, unless a full mask brings its own layout.
    # Elsewhere the compiler adds up a row as it likes.
    columns = 16 if table_architecture(architecture) == "gfx1100" else 8
    partials = columns if matrix_units and not mask_rows else tile.block_n
    return {
        "D": head_dim, "D1": D1, "D2": D2, "E": value_dim, "E1": E1, "E2": E2,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "PARTIALS": partials,
        "CAUSAL": is_causal, "MASK": mask, "MASK_ROWS": mask_rows,
        "PRECISION": ("tf32" if tf32 else "tf32x3") if matrix_units and architecture.startswith("sm_") else "ieee",
        "STRIDE_UNIT": stride_unit, "MASK_UNIT": mask_unit, "WIDE": wide,
        # Values loaded before the softmax cost no registers during it; with small heads there are enough.
        "VALUE_FIRST": max(head_dim, value_dim) > 96,
    }  # fmt: skip


def _has_matrix_units(architecture: str, dtype: str, head_dim: int) -> bool:
    """Whether the products go to tensor cores or their like; float32 does so there as three TF32 products."""
    if table_architecture(architecture) in ("sm_75", "gfx1100"):  # Triton 3.7 has no path to Turing's
        return table_architecture(architecture) == "gfx1100" and dtype != "float32"
    # 512 columns of query do not fit the registers as TF32 operands.
    return not (architecture.startswith("sm_") and dtype == "float32" and head_dim > 256)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The head dim as two powers of two, (first, second or 0), wasting as little of the matrix units as that allows.

    40 -> (32, 16), 80 -> (64, 16), 96 -> (64, 32), 160 -> (128, 32); a matrix product needs at least 16.
    """
    padded = whole(head_dim)
    first = padded // 2
    rest = max(16, 1 << (head_dim - first - 1).bit_length()) if head_dim > first else 16
    return (first, rest) if first >= 32 and rest < first else (padded, 0)


def whole(head_dim: int) -> int:
    """The head dim as one power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cached
def _overrides(path: str) -> dict[str, dict[str, dict[int, Tile]]]:
    if not path:
        return {}
    try:
        entries = json.loads(Path(path).read_text())
        return {
            architecture: {
                dtype: {int(head_dim): Tile(**tile) for head_dim, tile in rows.items()} for dtype, rows in by.items()
            }
            for architecture, by in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"ENTROPY_ATTN_TILES={path} cannot be read as a table of tiles: {error}") from error
