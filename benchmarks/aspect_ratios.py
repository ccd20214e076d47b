"""Image sizes that published models were trained on, in buckets by aspect ratio, and the tokens of their attention.

SDXL: Podell et al., "SDXL" (2023, https://arxiv.org/abs/2307.01952), the table of its appendix I, as height x width.
PixArt-α: Chen et al. (2023, https://arxiv.org/abs/2310.00426), the tables of its code, which Diffusers has as
``ASPECT_RATIO_256_BIN``, ``ASPECT_RATIO_512_BIN`` and ``ASPECT_RATIO_1024_BIN``.
"""

from __future__ import annotations

import random
from typing import NamedTuple

# Height and width in units of 64 pixels.
_SDXL = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip
# In units of 16, 32 and 64 pixels for the models trained at 256, 512 and 1024.
_PIXART = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21), (12, 20),
    (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15), (17, 14), (18, 14),
    (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (27, 9), (32, 8),
)  # fmt: skip
SIZES = {"SDXL": [(64 * height, 64 * width) for height, width in _SDXL]}
SIZES |= {
    f"PixArt {edge}": [(edge // 16 * height, edge // 16 * width) for height, width in _PIXART]
    for edge in (256, 512, 1024)
}
# A batch has sizes from the lists of its case, each list as often as it is named.
CASES = {
    "PixArt 256": ["PixArt 256"],
    "PixArt 512": ["PixArt 512"],
    "PixArt 1024": ["PixArt 1024"],
    "PixArt 256 and 512": ["PixArt 256", "PixArt 512"],
    "PixArt 256, 512 and 1024": ["PixArt 256", "PixArt 512", "PixArt 1024"],
    "SDXL": ["SDXL"],
}


class Layer(NamedTuple):
    """Self-attention of a model. A token is `pixels` x `pixels` pixels of the image."""

    name: str
    pixels: int
    heads: int
    head_dim: int
    train_tokens: int  # T, at the largest square size of the case


def layers(case: str) -> list[Layer]:
    """PixArt's self-attention has 16 heads of 72 everywhere. SDXL's UNet has 10 and 20 heads of 64 at two levels."""
    edge = max(height for name in CASES[case] for height, width in SIZES[name] if height == width)
    levels = [("level 2", 16, 10, 64), ("level 3", 32, 20, 64)] if case == "SDXL" else [("all layers", 16, 16, 72)]
    return [Layer(*level, (edge // level[1]) ** 2) for level in levels]


def sample(case: str, batch: int, seed: int) -> list[tuple[int, int]]:
    """Height and width of each image of a batch. Every size of a list is as likely as another."""
    draw, lists = random.Random(f"{case} {seed}"), CASES[case]
    return [draw.choice(SIZES[lists[i % len(lists)]]) for i in range(batch)]


def tokens(size: tuple[int, int], layer: Layer) -> int:
    height, width = size
    return (height // layer.pixels) * (width // layer.pixels)
