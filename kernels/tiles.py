"""Which tile the kernel runs with: a table over architecture, dtype and head dim, and its look-up.

The rows were chosen from binaries compiled ahead of time: they fit the shared memory, their main loops spill few
registers, and for sm_80 in 16-bit types a model of the main loop ranks them among the first (benchmarks/model). None
has been timed on a device yet.

ENTROPY_ATTN_TILES names a JSON file whose entries go before the table: {"sm_80": {"float16": {"64": {"block_m": 128,
"block_n": 64, "num_warps": 4, "num_stages": 2}}}}, with the largest head dim an entry serves as its key. It is read
once in a process, at the first call.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

HEAD_DIMS = (*range(8, 257, 8), 512)
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Tile:
    """How one program cuts its work: block_m queries at a time against block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# architecture -> bits of the dtype -> largest head dim served -> tile
TABLE: dict[str, dict[int, dict[int, Tile]]] = {
    # No tensor cores here: Triton multiplies with FMA instructions.
    "sm_75": {
        16: {
            96: Tile(64, 32, 8, 1), 192: Tile(32, 32, 8, 1),
            256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1),
        },
        32: {
            96: Tile(64, 32, 8, 1), 192: Tile(32, 32, 8, 1),
            256: Tile(16, 16, 8, 1),
            512: Tile(16, 16, 4, 1),  # all 64 KiB of shared memory; 8 warps need 65
        },
    },
    # 16 bits up to 192: among the fastest in the model; ties go to the tile that spills least.
    "sm_80": {
        16: {
            16: Tile(128, 64, 4, 2), 32: Tile(128, 64, 4, 3), 40: Tile(64, 64, 2, 2),
            64: Tile(128, 64, 4, 2), 80: Tile(128, 64, 4, 2), 96: Tile(128, 32, 4, 2),
            128: Tile(128, 32, 4, 3), 160: Tile(128, 32, 4, 2),
            192: Tile(128, 64, 8, 2),
            256: Tile(64, 32, 8, 1),
            512: Tile(64, 16, 8, 1),
        },
        32: {
            64: Tile(64, 16, 4, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2),
            160: Tile(64, 16, 8, 2), 192: Tile(32, 16, 8, 2),
            256: Tile(16, 16, 4, 1), 512: Tile(16, 16, 8, 1),
        },
    },
    "sm_86": {
        16: {
            64: Tile(128, 64, 4, 2), 80: Tile(128, 32, 4, 2),
            96: Tile(128, 64, 8, 2), 192: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1),
            512: Tile(64, 16, 8, 1),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2),
            192: Tile(32, 16, 8, 2), 256: Tile(16, 16, 4, 1),
            512: Tile(16, 16, 8, 1),
        },
    },
    "sm_90": {
        16: {
            64: Tile(128, 128, 8, 2), 96: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 3), 160: Tile(128, 64, 8, 2),
            192: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 8, 1),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2),
            192: Tile(32, 16, 8, 2), 256: Tile(16, 16, 4, 1),
            512: Tile(16, 16, 8, 1),
        },
    },
    "sm_100": {
        16: {
            32: Tile(128, 128, 8, 2), 96: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 3), 192: Tile(128, 32, 8, 2),
            256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 8, 1),
        },
        32: {
            80: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2),
            192: Tile(32, 16, 8, 2), 256: Tile(16, 16, 4, 1),
            512: Tile(16, 16, 8, 1),
        },
    },
    "sm_120": {
        16: {
            32: Tile(128, 64, 4, 2), 64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2),
            192: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1), 512: Tile(32, 16, 8, 1),
        },
        32: {
            64: Tile(64, 32, 8, 2), 96: Tile(64, 16, 8, 2), 128: Tile(32, 16, 4, 2),
            192: Tile(32, 16, 8, 2), 256: Tile(16, 16, 4, 1),
            512: Tile(16, 16, 8, 1),
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
            64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 160: Tile(64, 16, 8, 1),
            192: Tile(16, 16, 4, 1), 256: Tile(32, 16, 4, 1),
            512: Tile(64, 16, 16, 1),
        },
        32: {
            32: Tile(64, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 16, 1),
        },
    },
}  # fmt: skip


def find_tile(architecture: str, dtype: str, head_dim: int) -> Tile:
    """The tile for an architecture ("sm_80", "gfx942"), a dtype ("float16") and the larger of the two head dims."""
    rows = user_table(os.environ.get("ENTROPY_ATTN_TILES", "")).get(architecture, {}).get(dtype, {})
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


@functools.cache
def user_table(path: str) -> dict[str, dict[str, dict[int, Tile]]]:
    """The table in a JSON file; empty without a path. A file is read once in a process."""
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
