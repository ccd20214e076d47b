"""Keys split over programs, and merged: when, and that the answer stays what it was."""

import math

import pytest
import torch

pytest.importorskip("triton")

from entropy_attn.kernels import split
from entropy_attn.kernels.tiles import Tile

from entropy_attn import attention
from entropy_attn.backends import triton as backend

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel runs there, in test_gpu.py")
FOUR_WARPS, EIGHT_WARPS = Tile(128, 64, 4, 2), Tile(128, 64, 8, 2)


@pytest.mark.parametrize("tile", [FOUR_WARPS, EIGHT_WARPS])
@pytest.mark.parametrize("Nk", [1, 77, 255])
def test_few_keys_stay_together(Nk, tile):
    assert split.key_splits(1, Nk, tile, 108) == 1


@pytest.mark.parametrize("programs", [216, 1000, 10_000])
def test_a_busy_gpu_does_not_split(programs):
    assert split.key_splits(programs, 4096, FOUR_WARPS, 108) == 1


def test_an_idle_gpu_splits():
    assert split.key_splits(8, 4096, FOUR_WARPS, 108) > 4
    assert split.key_splits(8, 1 << 20, FOUR_WARPS, 108) <= split.MOST_SPLITS
    # Two programs of four warps share a processor, of eight warps one has it for itself.
    assert split.key_splits(120, 1 << 16, FOUR_WARPS, 108) > 1
    assert split.key_splits(120, 1 << 16, FOUR_WARPS, 60) == 1


@pytest.mark.parametrize("programs", [1, 7, 40, 150])
@pytest.mark.parametrize("Nk", [256, 300, 1000, 1025, 4096, 9000])
def test_every_split_has_keys(programs, Nk):
    splits = split.key_splits(programs, Nk, FOUR_WARPS, 108)
    keys_per_split = -(-Nk // (FOUR_WARPS.block_n * splits)) * FOUR_WARPS.block_n
    assert (splits - 1) * keys_per_split < Nk <= splits * keys_per_split
    assert splits == 1 or keys_per_split >= split.FEWEST_BLOCKS * FOUR_WARPS.block_n


def inputs(dtype, Nq, Nk, heads=(2, 2), D=40, Dv=24):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads[0], Nq, D), (2, heads[1], Nk, D), (2, heads[1], Nk, Dv))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def masks(name, Nq, Nk):
    key = torch.arange(Nk)
    return {
        "none": None,
        "left": (key >= 150)[None, None, None],
        "right": (key < 40)[None, None, None],  # all but the first split see nothing
        "scattered": (key % 3 > 0)[None, None, None],
        "bias": torch.where(key < 100, 0.0, -3.0).masked_fill(key % 7 == 0, -math.inf)[None, None, None],
        "rows": (key[None] + torch.arange(Nq)[:, None]) % 5 > 1,
        "nothing": torch.zeros(1, 1, 1, Nk, dtype=torch.bool),
    }[name]


@pytest.fixture(params=[2, 5])
def splits(request, monkeypatch):
    monkeypatch.setattr(split, "key_splits", lambda *_: request.param)
    return request.param


def check(arguments, options):
    ours = attention(*arguments, **options, backend="triton", return_entropy=True, return_lse=True)
    truth = attention(*arguments, **options, backend="reference", return_entropy=True, return_lse=True)
    tolerance = {torch.float16: 2e-3, torch.float32: 2e-6}[arguments[0].dtype]
    torch.testing.assert_close(ours.out, truth.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.lse, truth.lse, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(ours.entropy, truth.entropy, atol=1e-5, rtol=0)
    again = attention(*arguments, **options, backend="triton", return_entropy=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    alone = attention(*arguments, **options, backend="triton")
    torch.testing.assert_close(alone, truth.out, atol=tolerance, rtol=tolerance)


@INTERPRETED
@pytest.mark.parametrize("name", ["none", "left", "right", "scattered", "bias", "rows", "nothing"])
def test_split_attention(splits, name):
    query, key, value = inputs(torch.float32, 33, 300)
    check((query, key, value), {"attn_mask": masks(name, 33, 300)})


@INTERPRETED
@pytest.mark.parametrize("lengths", [(300, 300), (70, 300), (300, 280)])
def test_split_causal_attention(splits, lengths):
    check(inputs(torch.float16, *lengths), {"is_causal": True})


@INTERPRETED
def test_split_with_other_options(splits):
    query, key, value = inputs(torch.float16, 5, 300, heads=(4, 2))
    check((query, key, value), {"enable_gqa": True, "scale": torch.rand(2, 4)})
    query, key, value = (x.transpose(1, 2) for x in inputs(torch.float16, 40, 300))
    check((query, key, value), {"layout": "bnhd", "train_tokens": 100})


@INTERPRETED
def test_a_real_choice_of_splits(monkeypatch):
    """Without a hand in it: so few queries against so many keys are split."""
    taken = []
    launch = backend._launch
    monkeypatch.setattr(backend, "_launch", lambda grid, *rest: taken.append(grid) or launch(grid, *rest))
    check(inputs(torch.float16, 3, 1100, D=16, Dv=16), {})
    assert len(taken[0]) == 2
    assert taken[0][1] > 1
