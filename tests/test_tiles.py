"""What a tile may say beyond its sizes: narrow edges and sums by thread change nothing but rounding."""

import math

import pytest
import torch

pytest.importorskip("triton")

from entropy_attn.kernels import tiles

from entropy_attn import attention

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel runs there, in test_gpu.py")
Nq, Nk = 70, 200


def padding(start, stop):
    mask = torch.zeros(Nk, dtype=torch.bool)
    mask[start:stop] = True
    return mask.view(1, 1, 1, Nk)


MASKS = {
    "none": None,
    "right": padding(0, 131),
    "left": padding(75, Nk),
    "both": padding(17, 150),
    "short": padding(90, 95),
    "nothing": padding(0, 0),
    "scattered": (torch.arange(Nk) % 3 > 0).view(1, 1, 1, Nk),
    "bias": torch.where(padding(20, 160), 0.0, -math.inf),
    "rows": torch.arange(Nk)[None] <= 2 * torch.arange(Nq)[:, None] + 5,
}


@INTERPRETED
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "tile",
    [
        tiles.Tile(32, 64, 4, 2, edge_n=16),
        tiles.Tile(32, 64, 4, 2, lane_sums=True),
        tiles.Tile(32, 64, 4, 2, edge_n=32, lane_sums=True),
    ],
    ids=["edges", "lanes", "both"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_edges_and_lanes(tile, name, is_causal):
    if is_causal and MASKS[name] is not None:
        pytest.skip("a mask and causal exclude each other")
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, N, 24, generator=g) for N in (Nq, Nk, Nk))
    options = {"attn_mask": MASKS[name], "is_causal": is_causal, "return_entropy": True, "return_lse": True}
    with tiles.override(tile):
        found = attention(query, key, value, **options, backend="triton")
    expected = attention(query, key, value, **options, backend="reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("edge_n", [24, 128])
def test_edges_divide_a_block(edge_n):
    with pytest.raises(ValueError, match=f"edge_n must divide block_n, 64, got {edge_n}"):
        tiles.Tile(64, 64, 4, 2, edge_n=edge_n)


def test_the_file_of_tiles_may_say_them(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text('{"sm_80": {"float16": {"64": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, '
                    '"edge_n": 16, "lane_sums": true}}}}')  # fmt: skip
    monkeypatch.setenv("ENTROPY_ATTN_TILES", str(path))
    tiles.reload()
    assert tiles.find_tile("sm_80", "float16", 64) == tiles.Tile(64, 64, 4, 2, edge_n=16, lane_sums=True)
    monkeypatch.undo()
    tiles.reload()
