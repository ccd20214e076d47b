"""Candidate tiles around a given tile, and the file of tiles that the variable ENTROPY_ATTN_TILES names."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import harness
import results

from entropy_attn.kernels import aot, tiles
from entropy_attn.kernels.config import pieces
from entropy_attn.kernels.tiles import Tile

REGISTERS = 255  # the most that a thread can have
MOST_STAGES = 4


def around(tile: Tile) -> list[Tile]:
    """Tiles whose sizes are half, equal or double, and whose stages differ by one at most; the given tile is first."""
    factors = itertools.product((0.5, 1, 2), (0.5, 1, 2), (0.5, 1, 2), (-1, 0, 1))
    grid = [
        dataclasses.replace(
            tile, block_m=int(tile.block_m * m), block_n=int(tile.block_n * n), num_warps=int(tile.num_warps * w),
            num_stages=tile.num_stages + stages,
        )
        for m, n, w, stages in factors
    ]  # fmt: skip
    possible = [
        t for t in grid
        if 16 <= t.block_m <= 256 and 16 <= t.block_n <= 256 and 2 <= t.num_warps <= 16
        and 1 <= t.num_stages <= MOST_STAGES and t != tile
    ]  # fmt: skip
    return [tile, *possible]


def label(tile: Tile) -> str:
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in dataclasses.asdict(tile).items())


def obstacle(architecture: str, dtype: str, head_dim: int, tile: Tile) -> str | None:
    """Why a tile cannot fit in shared memory or registers, by an estimate without compiling; None if it may fit."""
    width = sum(width for _, width in pieces(head_dim))
    limit = aot.SHARED_MEMORY[tiles.table_architecture(architecture)]
    # Blocks of keys and values in the software pipeline. One stage less, since the pipeline may hold one in registers.
    shared = 2 * width * tile.block_n * harness.DTYPES[dtype].itemsize * max(tile.num_stages - 1, 1)
    if shared > limit:
        return f"needs at least {shared >> 10} KiB of shared memory, {limit >> 10} KiB are there"
    threads = tile.num_warps * (64 if architecture.startswith("gfx9") else 32)
    registers = tile.block_m * (width + tile.block_n) // threads
    limit = 2 * REGISTERS if architecture.startswith("gfx9") else REGISTERS
    return f"scores and output take {registers} registers of {limit}" if registers > limit else None


def compile_obstacle(architecture: str, dtype: str, head_dim: int, tile: Tile) -> str | None:
    """Why a tile does not compile or fit, by compiling it ahead of time, which takes seconds; None if it fits."""
    architecture = tiles.table_architecture(architecture)
    try:
        used = aot.resources(aot.compile_kernel(architecture, dtype, head_dim, tile=tile))
    except Exception as error:  # whatever the compiler raises
        return harness.first_line(error)
    limit = aot.SHARED_MEMORY[architecture]
    return f"needs {used.shared} bytes of shared memory, {limit} are there" if used.shared > limit else None


def candidates(architecture: str, dtype: str, head_dim: int) -> dict[Tile, str | None]:
    """The candidates, the present tile first, each with the reason that rules it out, or None."""
    grid = around(tiles.find_tile(architecture, dtype, head_dim))
    return {tile: obstacle(architecture, dtype, head_dim, tile) for tile in grid} | {grid[0]: None}


def store(path: Path, architecture: str, dtype: str, head_dim: int, tile: Tile) -> None:
    """Put a tile into the file, for all head dims that are padded to the same width.

    Smaller head dims without an entry would now use this one. They get entries with the tiles that they use at present.
    """
    read(path)
    alike = {d for d in tiles.HEAD_DIMS if pieces(d) == pieces(head_dim)}
    served = [d for d in tiles.HEAD_DIMS if d <= head_dim or d in alike]
    run = {d: tile if d in alike else tiles.find_tile(architecture, dtype, d) for d in served}
    rows = {d: run[d] for d, larger in itertools.zip_longest(served, served[1:]) if run[d] != run.get(larger)}
    whole = json.loads(path.read_text()) if path.exists() else {}
    before = whole.setdefault(architecture, {}).get(dtype, {})
    whole[architecture][dtype] = {str(d): dataclasses.asdict(t) for d, t in rows.items()}
    whole[architecture][dtype] |= {d: t for d, t in before.items() if int(d) > served[-1]}
    results.write_whole(path, json.dumps(whole, indent=1) + "\n")
    read(path)


def read(path: Path) -> None:
    """Make find_tile use this file, if it exists, before the table."""
    os.environ["ENTROPY_ATTN_TILES"] = str(path) if path.exists() else ""
    tiles.user_table.cache_clear()
