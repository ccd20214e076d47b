"""Metrics of generated images: Frechet distance between sets of features, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Reference:
    """The normal distribution with mean and covariance of reference features (n, F), to which distances are measured.

    The Frechet distance is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau, 1982). It is in float64.
    """

    def __init__(self, features: torch.Tensor) -> None:
        features = _checked("reference", features)
        self.mean = features.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(features.T))
        values = values.clamp(min=0)  # negative values are rounding errors
        self.trace = values.sum()
        self.root = vectors * values.sqrt() @ vectors.T

    def distances(self, features: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """A function from indices into `features` (n, F) to the distance of the samples with these indices."""
        features = _checked("features", features)
        projected = features @ self.root

        def distance(chosen: torch.Tensor) -> float:
            x, y = features[chosen], projected[chosen]
            y = (y - y.mean(0)) / (len(chosen) - 1) ** 0.5
            # C1 C2 has the eigenvalues of y.T y. Those of y y.T are the same but for zeros: the smaller matrix serves.
            gram = y @ y.T if y.shape[0] < y.shape[1] else y.T @ y
            root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
            between = (x.mean(0) - self.mean).square().sum()
            return (between + x.var(0).sum() + self.trace - 2 * root).item()

        return distance

    def distance(self, features: torch.Tensor) -> float:
        """The distance of all samples `features`, (n, F)."""
        return self.distances(features)(torch.arange(len(features)))


def _checked(name: str, x: torch.Tensor) -> torch.Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{name} must have shape (n, F) with n of at least 2, got {tuple(x.shape)}")
    return x.double()


def bootstrap(
    statistic: Callable[[torch.Tensor], Any],
    count: int,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
    biased: bool = False,
) -> list:
    """Percentile bootstrap interval [low, high] of a statistic of `count` samples.

    `statistic` is called with indices that are drawn with replacement. If it returns several values, the result is a
    list of their intervals. Repeated samples bias a Frechet distance upwards. With `biased`, the interval is shifted by
    the difference between the statistic of all samples and the mean of the resamples. A paired difference of two
    methods with the same seeds is a statistic that takes the difference itself.
    """
    generator = torch.Generator().manual_seed(seed)
    values = np.array([statistic(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)])
    if biased:
        values += np.array(statistic(torch.arange(count))) - values.mean(0)
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist()
