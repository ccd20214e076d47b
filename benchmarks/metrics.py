"""Figures of merit of generated images: distances between sets of features, and intervals of what was measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance of the normal distributions with the means and covariances of two sets of features, (n, F).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by Dowson and Landau (1982); in float64.
    """
    for name, x in (("features", features), ("reference", reference)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} must have shape (n, F) with n of at least 2, got {tuple(x.shape)}")
    features, reference = features.double(), reference.double()
    covariance, other = torch.cov(features.T), torch.cov(reference.T)
    # The eigenvalues of C1 C2 are real and not negative, but for rounding.
    root = torch.linalg.eigvals(covariance @ other).real.clamp(min=0).sqrt().sum()
    between = (features.mean(0) - reference.mean(0)).square().sum()
    return (between + covariance.trace() + other.trace() - 2 * root).item()


def bootstrap(
    statistic: Callable[[torch.Tensor], float],
    count: int,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
    biased: bool = False,
) -> tuple[float, float]:
    """Percentile interval of a statistic of `count` samples: it is given indices of samples, drawn with repetition.

    Repeated samples bias a Frechet distance upwards: with `biased` the interval is moved by as much as the resamples'
    mean is off the statistic of all samples. For the difference of two ways with the same seeds, take the difference
    within the statistic: that is paired.
    """
    generator = torch.Generator().manual_seed(seed)
    values = np.array([statistic(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)])
    if biased:
        values += statistic(torch.arange(count)) - values.mean()
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
