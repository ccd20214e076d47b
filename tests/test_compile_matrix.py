"""The kernel compiled ahead of time for every architecture, with limits on shared memory and register spills.

The registers, spills and shared memory of each binary are written to build/compile_matrix/.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from entropy_attn.kernels import config, tiles
from entropy_attn.kernels.aot import ARCHITECTURES

# The spill budget: the most bytes of stack per thread with Triton 3.7, for each entry of the table of tiles. A missing
# entry allows 0 bytes. Spills outside the main loop count too. Other Triton versions have no budget.
BUDGETED = "3.7."
SPILLS = {
    ("sm_75", 16): {96: 288, 192: 352, 256: 168, 512: 1368},
    ("sm_75", 32): {96: 320, 192: 336, 256: 200, 512: 5480},
    ("sm_80", 16): {40: 40, 64: 8, 80: 104, 96: 32, 128: 64, 160: 392, 192: 360},
    ("sm_80", 32): {64: 16, 160: 248, 192: 24, 256: 112, 512: 1456},
    ("sm_86", 16): {64: 32, 80: 16, 192: 152},
    ("sm_86", 32): {96: 8, 128: 120, 192: 168, 256: 232, 512: 1416},
    ("sm_90", 32): {128: 88, 192: 192, 256: 176, 512: 1432},
    ("sm_100", 32): {128: 96, 192: 200, 256: 208, 512: 1432},
    ("sm_120", 16): {128: 16, 192: 144},
    ("sm_120", 32): {64: 88, 96: 88, 128: 112, 192: 184, 256: 200, 512: 1408},
    ("gfx942", 32): {512: 532},
    ("gfx1100", 16): {192: 64, 256: 396, 512: 1064},
    ("gfx1100", 32): {256: 840, 512: 2168},
}
SPILLS_WITH_MASKS = {64: 448, 128: 480, 160: 864}  # by head dim
RECORDS = Path(__file__).parent.parent / "build" / "compile_matrix"
MAIN_HEAD_DIMS = (40, 64, 80, 128, 160)
HEAD_DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 512)


def compile_all(architecture: str, dtype: str, head_dims: tuple[int, ...], *options: str) -> list[dict]:
    """Compiles in a separate process, because this one may use Triton's interpreter instead of the compiler."""
    command = [sys.executable, "-m", "entropy_attn.kernels.aot", "--architecture", architecture, "--dtype", dtype]
    command += ["--head-dim", *map(str, head_dims), *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ENTROPY_ATTN_TILES")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(architecture: str, dtype: str, head_dims: tuple[int, ...]) -> None:
    rows = compile_all(architecture, dtype, head_dims)
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{architecture}-{dtype}-{len(head_dims)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row["head_dim"], row["entropy"]) for row in rows] == [(d, e) for d in head_dims for e in (False, True)]
    too_large = [row for row in rows if row["shared"] > row["shared_limit"]]
    assert not too_large, "needs more shared memory than the architecture has"
    spilling = [row for row in rows if row["spills"] > spills_allowed(architecture, dtype, row["head_dim"])]
    assert not (spilling and triton.__version__.startswith(BUDGETED)), "spills more than it may"


def spills_allowed(architecture: str, dtype: str, head_dim: int) -> int:
    architecture, bits = tiles.table_architecture(architecture), 32 if dtype == "float32" else 16
    entry = min(largest for largest in tiles.TABLE[architecture][bits] if largest >= head_dim)
    return SPILLS.get((architecture, bits), {}).get(entry, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_main_head_dims(architecture, dtype):
    check(architecture, dtype, MAIN_HEAD_DIMS)


@pytest.mark.parametrize(
    "options",
    ["--causal", "--mask boolean", "--mask boolean --mask-per-query", "--mask floating --mask-per-query",
     "--mask floating --mask-per-query --mask-dtype float32"],
)  # fmt: skip
def test_masks_cost_no_registers_they_do_not_have(options):
    for row in compile_all("sm_80", "float16", (64, 128, 160), *options.split()):
        assert row["shared"] <= row["shared_limit"]
        if triton.__version__.startswith(BUDGETED):  # Triton 3.4's ptxas gives up on one of these at D = 160
            assert row["registers"] > 100, "the compiler gave up on registers"
            assert row["spills"] <= SPILLS_WITH_MASKS[row["head_dim"]], row


@pytest.mark.parametrize("options", ["", "--causal"], ids=["", "causal"])
def test_packed_sequences_cost_few_registers(options):
    """The kernel for packed sequences spills about as much as the other: the same loops follow another prologue."""
    packed = compile_all("sm_80", "float16", MAIN_HEAD_DIMS, "--packed", *options.split())
    for row, other in zip(packed, compile_all("sm_80", "float16", MAIN_HEAD_DIMS, *options.split()), strict=True):
        assert row["tile"] == other["tile"]
        assert row["shared"] == other["shared"]
        assert row["spills"] <= other["spills"] + 64 or not triton.__version__.startswith(BUDGETED), row


MAIN_LOOPS = """
import json, re, sys
from entropy_attn.kernels import aot
from entropy_attn.kernels.config import configure

def main_loop(kernel):
    lines = [line.split("//")[0].strip() for line in kernel.asm["ptx"].splitlines()]
    for end, line in enumerate(lines):
        jump = re.search(r"bra\\s+(\\S+);", line)
        if jump and jump[1] + ":" in lines[:end]:
            loop = [x for x in lines[lines.index(jump[1] + ":") : end] if x.endswith(";") and not x.startswith(".loc")]
            if any(x.startswith("cp.async.cg") for x in loop):  # the edge loop copies nothing
                return sorted(re.sub(r"%\\w+", "%", x) for x in loop)

for scale in ("number", "per_head", "per_query", "num_tokens", "lengths"):
    config = configure("sm_80", "float16", int(sys.argv[1]), scale=scale, entropy=sys.argv[2] == "True")
    kernel = aot.compile_config("sm_80", "float16", config, packed=scale == "lengths")
    print(json.dumps([scale, main_loop(kernel)]))
"""


@pytest.mark.parametrize(("head_dim", "entropy"), [(40, False), (96, False), (96, True), (160, False)])
def test_a_scale_of_any_kind_adds_no_instruction_to_the_main_loop(head_dim, entropy):
    """In PTX. Which registers ptxas gives them, and in which order it puts them, may differ."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MAIN_LOOPS, str(head_dim), str(entropy)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loops = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(loops["number"]) > 300
    assert [scale for scale, loop in loops.items() if loop != loops["number"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", tiles.DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_matrix(architecture, dtype):
    check(architecture, dtype, HEAD_DIMS)


def test_head_dims_meet_every_entry():
    for rows in (rows for by_bits in tiles.TABLE.values() for rows in by_bits.values()):
        assert {min(largest for largest in rows if largest >= d) for d in HEAD_DIMS} == set(rows)
        assert max(rows) == 512


@pytest.mark.parametrize("head_dim", tiles.HEAD_DIMS)
def test_pieces_of_the_head_dim(head_dim):
    pieces = config.pieces(head_dim)
    widths = [width for _, width in pieces]
    assert [start for start, _ in pieces] == [0, widths[0]][: len(pieces)]
    assert head_dim <= sum(widths) <= max(16, 1 << (head_dim - 1).bit_length())
    assert all(width >= 16 and width & (width - 1) == 0 for width in widths)


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(8, [16]), (24, [32]), (40, [32, 16]), (64, [64]), (72, [64, 16]), (80, [64, 16]), (96, [64, 32]), (128, [128]),
     (160, [128, 32]), (192, [128, 64]), (256, [256]), (512, [512])],
)  # fmt: skip
def test_known_pieces(head_dim, widths):
    assert [width for _, width in config.pieces(head_dim)] == widths


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_89", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
     ("sm_121", "sm_120"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"), ("gfx1201", "gfx1100")],
)  # fmt: skip
def test_architectures_without_an_entry(architecture, entry):
    assert tiles.table_architecture(architecture) == entry
    assert tiles.find_tile(architecture, "float16", 64) == tiles.find_tile(entry, "float16", 64)


def test_tiles_of_the_user(tmp_path, monkeypatch):
    mine = {"sm_80": {"float16": {"64": {"block_m": 64, "block_n": 32, "num_warps": 2, "num_stages": 4}}}}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(mine))
    monkeypatch.setenv("ENTROPY_ATTN_TILES", str(path))
    assert tiles.find_tile("sm_80", "float16", 40) == tiles.Tile(64, 32, 2, 4)
    assert tiles.find_tile("sm_80", "bfloat16", 40) == tiles.TABLE["sm_80"][16][40]
    assert tiles.find_tile("sm_80", "float16", 160) == tiles.TABLE["sm_80"][16][160]


@pytest.mark.parametrize("text", ["not json", "[1]", '{"sm_80": {"float16": {"64": {"block": 1}}}}', None])
def test_bad_tiles_of_the_user(tmp_path, monkeypatch, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("ENTROPY_ATTN_TILES", str(path))
    with pytest.raises(ValueError, match=r"ENTROPY_ATTN_TILES=.*broken\.json cannot be read as a table of tiles"):
        tiles.find_tile("sm_80", "float16", 64)


OPTIONS = """
import itertools, sys
from entropy_attn.kernels import aot
from entropy_attn.kernels.config import configure
masks = [("none", False), ("boolean", False), ("boolean", True), ("floating", False), ("floating", True)]
for (mask, mask_per_query), dtype in itertools.product(masks, ("float16", "float32")):
    plain = mask == "none"
    kernel = aot.compile_kernel(
        sys.argv[1], dtype, 40, 24, entropy=True, lse=True, mask=mask, mask_per_query=mask_per_query,
        is_causal=plain, scale="per_query" if plain else "per_head", large_offsets=plain, row_unit=1 if plain else 8,
    )
    assert aot.resources(kernel).shared <= aot.SHARED_MEMORY[sys.argv[1]], (mask, dtype)
for dtype in ("float16", "float32"):
    kernel = aot.compile_kernel(sys.argv[1], dtype, 40, 24, entropy=True, mask="boolean", scale="num_tokens")
    assert aot.resources(kernel).shared <= aot.SHARED_MEMORY[sys.argv[1]], dtype
scales = ("number", "per_head", "lengths", "lengths_per_sequence")
for (i, scale), dtype in itertools.product(enumerate(scales), ("float16", "float32")):
    config = configure(
        sys.argv[1], dtype, 40, 24, entropy=i % 2 == 0, lse=i < 2, is_causal=i in (0, 3), scale=scale,
        large_offsets=i == 1, row_unit=1 if i == 1 else 8,
    )
    kernel = aot.compile_config(sys.argv[1], dtype, config, packed=True)
    assert aot.resources(kernel).shared <= aot.SHARED_MEMORY[sys.argv[1]], (scale, dtype)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_compile(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", OPTIONS, architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.stdout.strip() == "done", done.stderr[-3000:]
