"""Generated images in a folder, one file each. An image whose file exists is not generated again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


class ImageFolder:
    """Images by number. Files are written atomically: after an interruption there are only whole ones.

    `bits` is 8, or 16 for images of one channel whose grey levels are measured.
    """

    def __init__(self, path: Path, bits: int = 8) -> None:
        self.path, self.bits = path, bits

    def file(self, number: int) -> Path:
        return self.path / f"{number:06}.png"

    def missing(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if not self.file(number).exists()]

    def save(self, number: int, image: torch.Tensor) -> None:
        """Write an image (C, H, W) in [0, 1]; C is 1 or 3."""
        self.path.mkdir(parents=True, exist_ok=True)
        most, kind = 2**self.bits - 1, f"uint{self.bits}"
        pixels = (image.permute(1, 2, 0) * most).round().clamp(0, most).cpu().numpy().astype(kind)
        part = self.file(number).with_suffix(".part")
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(part, format="png")
        os.replace(part, self.file(number))

    def load(self, numbers: Iterable[int]) -> torch.Tensor:
        """Images (n, C, H, W) in [0, 1], float32."""
        return torch.stack([read_image(self.file(number)) for number in numbers])


def read_image(path: Path) -> torch.Tensor:
    """An image (C, H, W) in [0, 1], float32. Raises ValueError if the file cannot be read as an image."""
    try:
        with Image.open(path) as image:
            return pixels_of(np.array(image if image.mode in ("L", "I;16", "RGB") else image.convert("RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def pixels_of(image: np.ndarray) -> torch.Tensor:
    """An image (H, W) or (H, W, C), uint8 or uint16, as (C, H, W) float32 in [0, 1]."""
    values = torch.tensor(image.astype(np.float32)) / np.iinfo(image.dtype).max
    return values.reshape(*image.shape[:2], -1).permute(2, 0, 1)


def generate(
    folder: ImageFolder,
    numbers: Iterable[int],
    draw: Callable[[list[int]], torch.Tensor],
    batch: int,
    progress: Callable[[int], object],
) -> None:
    """Generate the images of these numbers that the folder does not have, `batch` at a time.

    `draw` takes image numbers and returns images (n, C, H, W) in [0, 1]. `progress` is called with the number of images
    after each batch.
    """
    missing = folder.missing(numbers)
    for start in range(0, len(missing), batch):
        chosen = missing[start : start + batch]
        for number, image in zip(chosen, draw(chosen), strict=True):
            folder.save(number, image)
        progress(len(chosen))
