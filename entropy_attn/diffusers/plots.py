"""The two pictures of an entropy record: Fig. 5 and Fig. 6 of Jin et al. (NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLORS = ("#3b6fb6", "#d1495b", "#4f9d69", "#8e6bbf", "#c98a2b", "#5c6770")
MARKERS = "os^Dvp"


class Run(NamedTuple):
    """A run as the pictures show it: layers in their order, without those that do not attend to the image."""

    label: str
    tokens: list[int]
    train_tokens: list[int]
    entropy: list[float]

    @property
    def log_tokens(self) -> float:
        return float(np.mean(np.log(self.tokens)))


class Fit(NamedTuple):
    """entropy = slope * ln N + intercept, by least squares; R² is the share of the variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def runs_of(rows: Sequence[dict]) -> list[Run]:
    """The runs in the rows of `EntropyRecord.table()`."""
    runs: dict[tuple, Run] = {}
    for row in rows:
        if row["train_tokens"] is None:
            continue
        run = runs.setdefault((row["run"], row["label"]), Run(row["label"], [], [], []))
        run.tokens.append(row["tokens"])
        run.train_tokens.append(row["train_tokens"])
        run.entropy.append(row["entropy"])
    return list(runs.values())


def fit(runs: Sequence[Run]) -> Fit | None:
    """The line through the runs' mean entropies over their mean ln N, or None where all have one size."""
    x = np.array([run.log_tokens for run in runs])
    y = np.array([np.mean(run.entropy) for run in runs])
    if len(runs) < 2 or np.ptp(x) < 1e-9:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    missed = float(((y - slope * x - intercept) ** 2).sum())
    return Fit(float(slope), float(intercept), 1.0 - missed / spread if spread > 0 else 1.0)


def draw(rows: Sequence[dict], path: str | Path | None = None):
    """Draw the rows of `EntropyRecord.table()`; returns the figure, also saved to `path` if given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'entropy_attn[plot]'") from error
    runs = runs_of(rows)
    if not runs:
        raise ValueError("there is nothing to plot: no run with self-attention over an image was recorded")
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_tokens, by_layer = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_fit(by_tokens, runs)
    _draw_layers(by_layer, runs)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_fit(axes, runs: Sequence[Run]) -> None:
    labels = list(dict.fromkeys(run.label for run in runs))
    for i, label in enumerate(labels):
        mine = [run for run in runs if run.label == label]
        color = COLORS[i % len(COLORS)]
        x = [run.log_tokens for run in mine]
        axes.scatter(x, [np.mean(run.entropy) for run in mine], color=color, marker=MARKERS[i % len(MARKERS)], zorder=3)
        line, text = fit(mine), label
        if line is not None:
            ends = np.array([min(x), max(x)])
            sign = "−" if line.intercept < 0 else "+"
            text += f": {line.slope:.3f} ln N {sign} {abs(line.intercept):.2f}, R² {line.r_squared:.4f}"
            axes.plot(ends, line.slope * ends + line.intercept, color=color)
        axes.plot([], [], color=color, marker=MARKERS[i % len(MARKERS)], label=text)
    trained = float(np.mean(np.log(runs[0].train_tokens)))
    axes.axvline(trained, color="#999999", linewidth=1, linestyle=":", label="trained size")
    axes.set(xlabel="ln N, mean over the layers", ylabel="attention entropy in nats, mean over the layers")
    axes.set_title("Entropy against the number of tokens")
    axes.legend(fontsize=8)


def _draw_layers(axes, runs: Sequence[Run]) -> None:
    labels = list(dict.fromkeys(run.label for run in runs))
    for i, size in enumerate(_shown_sizes(runs)):
        drawn: list[np.ndarray] = []
        for j, label in enumerate(labels):
            mine = [run for run in runs if run.label == label and _size(run) == size]
            if not mine:
                continue
            entropy = np.mean([run.entropy for run in mine if len(run.entropy) == len(mine[0].entropy)], axis=0)
            trained = mine[0].tokens == mine[0].train_tokens
            if trained and any(np.array_equal(entropy, line) for line in drawn):
                continue  # all scales are the trained one there
            drawn.append(entropy)
            axes.plot(
                entropy, color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":", "-.")[j % 4],
                marker=MARKERS[j % len(MARKERS)], markersize=3.5, linewidth=1.3,
                label=f"N = {size}, " + ("trained size" if trained and j == 0 else label),
            )  # fmt: skip
    axes.set(xlabel="layer", ylabel="attention entropy in nats")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Entropy of each layer")
    axes.legend(fontsize=8)


def _size(run: Run) -> int:
    return max(run.tokens)


def _shown_sizes(runs: Sequence[Run]) -> list[int]:
    """The smallest size, the one nearest to the trained one, and the largest, as many lines as can be told apart."""
    sizes = sorted({_size(run) for run in runs})
    trained = max(runs[0].train_tokens)
    nearest = min(sizes, key=lambda size: abs(math.log(size / trained)))
    return sorted({sizes[0], nearest, sizes[-1]})
