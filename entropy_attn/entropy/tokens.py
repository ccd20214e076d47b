"""N and T of a layer: the tokens it attends to now, and attended to at the size it was trained at."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# (height, width) in latent samples; (frames, height, width); or (tokens,) where they come packed
Grid = tuple[int, ...]


class Tokens(NamedTuple):
    """What a layer attends to now (N) and attended to at the trained size (T). T is None if that is not the image."""

    num_tokens: int
    train_tokens: int | None = None


def count(grid: Grid, stride: Grid) -> int:
    """The tokens of a grid of which every `stride`-th sample is one, as convolutions and patches leave them."""
    return math.prod([-(-size // step) for size, step in zip(grid, stride, strict=True)])


def match_tokens(
    grid: Grid, train_grid: Grid, strides: tuple[Grid, ...], queries: int, keys: int, joint: str
) -> Tokens:
    """N and T of a layer that has `queries` and `keys` while the model sees `grid`.

    The stride of a layer is the one that gives its number of tokens on `grid`; the same stride on `train_grid` gives
    T. It is exact where the area ratio is not, as with the rounding of a 28 x 28 latent halved three times. Keys
    beyond the grid's are taken for text in joint attention: with ``joint="keys"`` they count in both N and T, with
    ``joint="image"`` in neither. T is None if no stride fits.
    """
    for stride in strides:
        if count(grid, stride) == keys:
            return Tokens(keys, count(train_grid, stride))
    for stride in strides:
        image = count(grid, stride)
        if image < keys and (image == queries or len(strides) == 1):
            train_image = count(train_grid, stride)
            return Tokens(image, train_image) if joint == "image" else Tokens(keys, train_image + keys - image)
    return Tokens(keys)


remembered_tokens = functools.lru_cache(maxsize=4096)(match_tokens)
