"""Denoise images of different sizes in one packed batch with `attention_varlen`, with λ of each from its own size.

    python examples/packed_sizes.py --sizes 16x16 8x32 24x8 32x32

The model is a small diffusion transformer (DiT) whose layers take the tokens of all images in one row, without padding.
Its weights are random and nothing is downloaded, so its images are noise. The script checks that every image is that of
a run by itself with SDPA, and prints how long both take.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from entropy_attn import attention_varlen, entropy_scale

PATCH, CHANNELS = 2, 4  # a token is a square of PATCH x PATCH latent pixels with CHANNELS channels
TRAIN_SIZE = 16  # height and width of the training latents
TRAIN_TOKENS = (TRAIN_SIZE // PATCH) ** 2
TOLERANCE = 1e-4
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def packed_attention(lengths: list[int], device: torch.device) -> Attend:
    """Attention within each image, for tokens (total, heads, D). λ follows the N of each image."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    arguments = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    return lambda query, key, value: attention_varlen(query, key, value, *arguments, train_tokens=TRAIN_TOKENS)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same for the tokens of one image."""
    N, _, D = query.shape
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=entropy_scale(N, TRAIN_TOKENS, D))
    return out[0].transpose(0, 1)


class Block(nn.Module):
    """Self-attention and an MLP, modulated by the time. All but the attention works on each token by itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor, attend: Attend) -> torch.Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time).chunk(6, -1)
        qkv = self.to_qkv(self.norm(tokens) * (1 + scale) + shift)
        out = attend(*qkv.unflatten(-1, (3, self.heads, -1)).unbind(1))  # three of (total, heads, D)
        tokens = tokens + gate * self.to_out(out.flatten(1))
        return tokens + gate_mlp * self.mlp(self.norm(tokens) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    """Predicts the velocity of packed tokens (total, PATCH² CHANNELS) at a time from 0 to 1."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4):
        super().__init__()
        self.width = width
        self.enter, self.leave = (
            nn.Linear(*sizes) for sizes in ((PATCH**2 * CHANNELS, width), (width, PATCH**2 * CHANNELS))
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, tokens: torch.Tensor, places: torch.Tensor, time: float, attend: Attend) -> torch.Tensor:
        """`places`: the row and the column of each token in its image, (total, 2)."""
        hidden = self.enter(tokens) + waves(places, self.width)
        at = waves(torch.full((1, 2), 1000 * time, device=tokens.device), self.width)
        for block in self.blocks:
            hidden = block(hidden, at, attend)
        return self.leave(hidden)


def waves(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of two numbers a token, (tokens, 2) to (tokens, width)."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 4, device=numbers.device) / (width // 4))
    angles = numbers[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def to_tokens(image: torch.Tensor) -> torch.Tensor:
    """(CHANNELS, height, width) to (N, PATCH² CHANNELS)."""
    return F.pixel_unshuffle(image, PATCH).flatten(1).T


def to_image(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return F.pixel_shuffle(tokens.T.unflatten(1, (height // PATCH, width // PATCH)), PATCH)


def places_of(size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return torch.cartesian_prod(torch.arange(height // PATCH), torch.arange(width // PATCH)).float()


@torch.no_grad()
def denoise(model: DiT, images: list[torch.Tensor], steps: int, attend: Attend) -> list[torch.Tensor]:
    """Euler steps from time 1 to 0 for all images (CHANNELS, height, width) at once."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    tokens = torch.cat([to_tokens(image) for image in images])
    places = torch.cat([places_of(size) for size in sizes]).to(tokens.device)
    for step in range(steps):
        tokens = tokens - model(tokens, places, 1 - step / steps, attend) / steps
    lengths = [height * width // PATCH**2 for height, width in sizes]
    return [to_image(each, size) for each, size in zip(tokens.split(lengths), sizes, strict=True)]


def timed(function: Callable[[], list[torch.Tensor]], device: torch.device) -> tuple[list[torch.Tensor], float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [(16, 16), (8, 32), (24, 8), (32, 32), (12, 20), (16, 24), (8, 8), (28, 12)]
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", default=sizes, help="as 16x24, height x width of the latents, even"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median time is printed")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DiT().to(device).eval()
    noise = [torch.randn(CHANNELS, *size).to(device) for size in given.sizes]
    lengths = [height * width // PATCH**2 for height, width in given.sizes]

    attend = packed_attention(lengths, device)
    times = []
    for _ in tqdm(range(given.rounds + 1), desc="rounds", leave=False):
        packed, packed_s = timed(lambda: denoise(model, noise, given.steps, attend), device)
        separate, separate_s = timed(lambda: [denoise(model, [x], given.steps, sdpa)[0] for x in noise], device)
        times.append((packed_s, separate_s))
    for size, N, one, other in zip(given.sizes, lengths, packed, separate, strict=True):
        difference = (one - other).abs().max().item()
        multiplier = math.sqrt(math.log(N) / math.log(TRAIN_TOKENS))
        print(f"{size[0]:3} x {size[1]:3}: N = {N:4}, λ√D = {multiplier:.3f}, largest difference {difference:.1e}")
        assert difference <= TOLERANCE, f"the packed image differs by {difference} from that of a run by itself"
    packed_s, separate_s = (statistics.median(each) for each in zip(*times[1:], strict=True))  # the first warms up
    print(f"packed {packed_s:.3f} s, one by one {separate_s:.3f} s: {separate_s / packed_s:.2f} times as long")


if __name__ == "__main__":
    main()
