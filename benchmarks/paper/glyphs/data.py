"""Digits of matplotlib's DejaVu fonts, drawn at any size."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

CLASSES = tuple("0123456789")
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
)  # fmt: skip
HEIGHTS = (0.45, 0.9)  # smallest and largest height of a digit, as a share of the shorter side of its image
DIGIT = 0.73  # height of a digit / size of its font
FINER = 4  # digits are drawn this many times larger, then averaged down


def digits(numbers: Iterable[int]) -> list[int]:
    """The digits in the images of these numbers: 0 to 9 in turn."""
    return [number % len(CLASSES) for number in numbers]


def render(labels: torch.Tensor | list[int], height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Images (B, 1, height, width) in [0, 1], float32: a white digit on black, one for each label (B,).

    Font, height and position are random. Height and position are relative to the image, so their distribution is the
    same at every size.

    Raises:
        ValueError: a label is not a class, or a side has fewer than 8 pixels.
    """
    return render_with_faces(labels, height, width, generator)[0]


def render_with_faces(
    labels: torch.Tensor | list[int], height: int, width: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `render`, and the index in FACES of each image's font, (B,) int64."""
    if min(height, width) < 8:
        raise ValueError(f"height and width must be at least 8, got {height} and {width}")
    labels = torch.as_tensor(labels).tolist()
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"labels must be ints from 0 to {len(CLASSES) - 1}, got {labels}")
    drawn = torch.rand(len(labels), 4, generator=generator)
    images = [_draw(CLASSES[label], height, width, *where) for label, where in zip(labels, drawn.tolist(), strict=True)]
    return torch.from_numpy(np.stack(images))[:, None].float() / 255, (drawn[:, 0] * len(FACES)).long()


def _draw(character: str, height: int, width: int, face: float, size: float, x: float, y: float) -> np.ndarray:
    tall = (HEIGHTS[0] + (HEIGHTS[1] - HEIGHTS[0]) * size) * min(height, width) * FINER
    font = _font(FACES[int(face * len(FACES))], round(tall / DIGIT))
    image = Image.new("L", (width * FINER, height * FINER))
    left, top, right, bottom = font.getbbox(character)
    # The digit is inside the image; its position varies over the middle half of the free space.
    across = (image.width - (right - left)) * (0.25 + 0.5 * x)
    down = (image.height - (bottom - top)) * (0.25 + 0.5 * y)
    ImageDraw.Draw(image).text((across - left, down - top), character, fill=255, font=font)
    return np.asarray(image.reduce(FINER))


@functools.lru_cache(maxsize=2048)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), size)
