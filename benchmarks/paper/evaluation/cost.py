"""Time and memory of several ways to draw an image of a given size (Tables 4 and 5)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch

Way = Callable[[list[int]], torch.Tensor]  # from image numbers to images


def measure(ways: dict[str, Way], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """For each way: seconds per image, as the median of interleaved rounds of one image, and peak memory in MiB."""
    calls = {name: (lambda way=way: way([0])) for name, way in ways.items()}
    times = harness.interleaved(calls, rounds, device, repetitions=1)
    return {
        name: {
            "seconds": statistics.median(times[name]) / 1e3,
            "seconds_quartiles": [t / 1e3 for t in harness.quartiles(times[name])[::2]],
            "peak_mib": harness.peak_memory(call, device),
        }
        for name, call in calls.items()
    }
