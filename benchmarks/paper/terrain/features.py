"""Numbers that describe a height map whatever its size, and the difficulty that they tell."""

from __future__ import annotations

import math

import torch

from terrain.pipeline import DIFFICULTIES

HIGHEST = 22.16864013671875  # metres: the value 1 of a map. The value 0 is the ground.
KNEE = 0.1  # metres: values are proportional to asinh(height / KNEE)
LAGS = (1, 2, 4, 8, 16)  # pixels between the two heights of a slope
BANDS = ((2, 4), (4, 8), (8, 16), (16, 32))  # pixels: wavelengths of the power spectrum
SMALLEST = 2 * BANDS[-1][1]  # of a side: the longest wave fits in twice
NAMES = (
    "log variance", "skewness", "log kurtosis",
    *(f"log mean square slope over {lag}" for lag in LAGS),
    *(f"log power of wavelengths {low} to {high}" for low, high in BANDS),
)  # fmt: skip
TINY = 1e-6  # square metres: keeps the logarithms of a flat map finite


def heights_of(images: torch.Tensor) -> torch.Tensor:
    """Heights (n, H, W) in metres, float64, of images (n, 1, H, W) in [0, 1]."""
    return KNEE * torch.sinh(images[:, 0].double() * math.asinh(HIGHEST / KNEE))


def random_crops(images: torch.Tensor, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A crop (n, C, height, width) of each image (n, C, H, W). Image number i of any batch has the same place."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(len(images), 2, generator=generator)
    room = torch.tensor([images.shape[-2] - height + 1, images.shape[-1] - width + 1])
    tops_and_lefts = (places * room).long().tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(images, tops_and_lefts, strict=True)
        ]
    )


def features_of(images: torch.Tensor) -> torch.Tensor:
    """Features (n, F), float64, of images (n, 1, H, W) in [0, 1], as NAMES has them.

    They do not change when a constant is added to all heights: the lowest point of a map depends on its size. Slopes
    and powers are means over pixels, so that they do not depend on the size as such.

    Raises:
        ValueError: a side has fewer than SMALLEST pixels.
    """
    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(f"images must have sides of at least {SMALLEST} pixels, got {tuple(images.shape)}")
    heights = heights_of(images)
    heights = heights - heights.mean((1, 2), keepdim=True)
    variance = heights.square().mean((1, 2))
    standard = heights / (variance + TINY).sqrt()[:, None, None]
    columns = [
        (variance + TINY).log(),
        standard.pow(3).mean((1, 2)),
        (standard.pow(4).mean((1, 2)) + TINY).log(),
        *((_slope(heights, lag) + TINY).log() for lag in LAGS),
        *((power + TINY).log() for power in _powers(heights)),
    ]
    return torch.stack(columns, dim=1)


def _slope(heights: torch.Tensor, lag: int) -> torch.Tensor:
    """The mean square difference (n,) of heights that lie `lag` pixels apart, along rows and columns, over lag²."""
    differences = [
        (heights[:, lag:] - heights[:, :-lag]).square().mean((1, 2)),
        (heights[:, :, lag:] - heights[:, :, :-lag]).square().mean((1, 2)),
    ]
    return torch.stack(differences).mean(0) / lag**2


def _powers(heights: torch.Tensor) -> list[torch.Tensor]:
    """The mean power density (n,) in each band of wavelengths, under a Hann window."""
    height, width = heights.shape[-2:]
    window = torch.outer(*(torch.hann_window(side, dtype=heights.dtype) for side in (height, width)))
    power = torch.fft.fft2(heights * window).abs().square() / window.square().sum()
    rows, columns = (torch.fft.fftfreq(side, dtype=heights.dtype) for side in (height, width))
    frequency = torch.hypot(rows[:, None], columns)
    return [power[:, (frequency > 1 / high) & (frequency <= 1 / low)].mean(1) for low, high in BANDS]


class Reader:
    """Reads the difficulty of maps from their features: a ridge regression on features and their squares."""

    def __init__(self, features: torch.Tensor, difficulties: torch.Tensor, penalty: float = 10.0) -> None:
        """Fit to features (n, F) of maps with these difficulties (n,)."""
        self.mean, self.deviation = features.mean(0), features.std(0)
        inputs, targets = self._inputs(features), difficulties.double()
        self.level = targets.mean()
        self.center = inputs.mean(0)
        centered = inputs - self.center
        gram = centered.T @ centered + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        self.weights = torch.linalg.solve(gram, centered.T @ (targets - self.level))

    def _inputs(self, features: torch.Tensor) -> torch.Tensor:
        standard = (features - self.mean) / self.deviation
        return torch.cat([standard, standard.square()], dim=1)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Difficulties (n,), from 1 to 100, of maps with these features (n, F)."""
        return (self.level + (self._inputs(features) - self.center) @ self.weights).clamp(1, DIFFICULTIES)
