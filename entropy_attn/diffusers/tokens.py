"""N and T of a layer: which tokens it attends to, found by matching its sequence length to the latent grid."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

Grid = tuple[
    int, ...
]  # (height, width) in latent samples; (frames, height, width); or (tokens,) where they come packed


class Tokens(NamedTuple):
    """What a layer attends to now (N) and attended to at the trained size (T)."""

    num_tokens: int
    train_tokens: int


def count(grid: Grid, stride: Grid) -> int:
    """The tokens of a grid of which every `stride`-th sample is one, as convolutions and patches leave them."""
    return math.prod(-(-size // step) for size, step in zip(grid, stride, strict=True))


@functools.lru_cache(maxsize=4096)
def match_tokens(
    grid: Grid, train_grid: Grid, strides: tuple[Grid, ...], queries: int, keys: int, joint: str
) -> Tokens | None:
    """N and T of a layer that sees `queries` and `keys` while the model sees `grid`; None if they are not its tokens.

    The stride of a layer is the one that gives its number of tokens on `grid`; the same stride on `train_grid` gives
    T. It is exact where the area ratio is not, as with the rounding of a 28 x 28 latent halved three times. Keys
    beyond the grid's are taken for text in joint attention: with ``joint="keys"`` they count in both N and T, with
    ``joint="image"`` in neither.
    """
    for stride in strides:
        if count(grid, stride) == keys:
            return Tokens(keys, count(train_grid, stride))
    for stride in strides:
        image = count(grid, stride)
        if image < keys and (image == queries or len(strides) == 1):
            train_image = count(train_grid, stride)
            return Tokens(image, train_image) if joint == "image" else Tokens(keys, train_image + keys - image)
    return None
