"""The two pictures of an entropy record: Fig. 5 and Fig. 6 of Jin et al. (NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLORS = ("#3b6fb6", "#d1495b", "#4f9d69", "#8e6bbf", "#c98a2b", "#5c6770")
MARKERS = "os^Dvp"
TRAINED = "#333333"  # where all scales are the trained one
STYLES = (":", "--", "-.")  # of the other sizes


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
    looks = {}  # color and marker of a scale, the same in both pictures
    for i, label in enumerate(dict.fromkeys(run.label for run in runs)):
        looks[label] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
    _draw_fit(by_tokens, runs, looks)
    _draw_layers(by_layer, runs, looks)
    for axes in (by_tokens, by_layer):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, framealpha=1)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_fit(axes, runs: Sequence[Run], looks: dict[str, dict]) -> None:
    for label, look in looks.items():
        mine = [run for run in runs if run.label == label]
        x = [run.log_tokens for run in mine]
        line, text = fit(mine), label
        if line is not None:
            ends = np.array([min(x), max(x)])
            sign = "−" if line.intercept < 0 else "+"
            text += f": {line.slope:.3f} ln N {sign} {abs(line.intercept):.2f}, R² {line.r_squared:.4f}"
            axes.plot(ends, line.slope * ends + line.intercept, color=look["color"])
        axes.plot(x, [np.mean(run.entropy) for run in mine], linestyle="", **look)
        axes.plot([], [], label=text, linestyle="-" if line else "", **look)
    trained = float(np.mean(np.log(runs[0].train_tokens)))
    axes.axvline(trained, color=TRAINED, linewidth=1, linestyle=":", label="trained size")
    axes.set(xlabel="ln N, mean over the layers", ylabel="mean attention entropy (nats)")
    axes.set_title("Entropy against the number of tokens")


def _draw_layers(axes, runs: Sequence[Run], looks: dict[str, dict]) -> None:
    trained = max(runs[0].train_tokens)
    styles = iter(STYLES)
    for size in _shown_sizes(runs):
        style = "-" if size == trained else next(styles)
        lines: dict[str, np.ndarray] = {}
        for label in looks:
            mine = [run for run in runs if run.label == label and _size(run) == size]
            if mine:
                lines[label] = np.mean([r.entropy for r in mine if len(r.entropy) == len(mine[0].entropy)], axis=0)
        lone = size == trained and len({line.tobytes() for line in lines.values()}) == 1
        for label, line in list(lines.items())[: 1 if lone else None]:
            look = {"color": TRAINED, "marker": "."} if lone else looks[label]
            axes.plot(line, linestyle=style, linewidth=1.4, markersize=4, **look)
        name = f"N = {size}" + (", the trained size" if size == trained else "")
        axes.plot([], [], color=TRAINED, linestyle=style, linewidth=1.4, label=name)
    for label, look in looks.items():
        axes.plot([], [], linestyle="", markersize=4, label=label, **look)
    axes.set(xlabel="layer", ylabel="attention entropy (nats)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Entropy of each layer")


def _size(run: Run) -> int:
    return max(run.tokens)


def _shown_sizes(runs: Sequence[Run]) -> list[int]:
    """The smallest size, the one nearest to the trained one, and the largest, as many lines as can be told apart."""
    sizes = sorted({_size(run) for run in runs})
    trained = max(runs[0].train_tokens)
    nearest = min(sizes, key=lambda size: abs(math.log(size / trained)))
    return sorted({sizes[0], nearest, sizes[-1]})
