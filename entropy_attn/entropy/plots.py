"""Fig. 5 and Fig. 6 of Jin et al. (NeurIPS 2023): entropy against ln N with fitted lines, and entropy of each layer.

`draw` makes both pictures of an entropy record, and one of the heads: how their entropy grows with ln N. `plot_fits`,
`plot_lines` and `plot_heads` draw one of them into given axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from entropy_attn.entropy.heads import HeadSlope

COLORS = ("#3b6fb6", "#d1495b", "#4f9d69", "#8e6bbf", "#c98a2b", "#5c6770")
MARKERS = "os^Dvp"
TRAINED = "#333333"  # color of the trained size, where the lines of all scales are the same
STYLES = (":", "--", "-.")  # line styles of the other sizes


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


class Points(NamedTuple):
    """Points of Fig. 5 through which one line is fitted."""

    label: str
    tokens: Sequence[float]  # N; where a point stands for several layers, their geometric mean
    entropy: Sequence[float]  # nats
    look: dict[str, Any]  # arguments of matplotlib's Axes.plot: color, marker


class Line(NamedTuple):
    """A line of Fig. 6."""

    label: str | None  # in the legend; None leaves it out
    entropy: Sequence[float]  # nats, of each layer or step in order
    look: dict[str, Any]  # arguments of matplotlib's Axes.plot: color, linestyle, marker


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


def mean_entropy(rows: Iterable[Mapping[str, Any]], by: str) -> dict[Any, float]:
    """The mean of the column "entropy" for each value of the column `by`, in the order of the rows."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row["entropy"])
    return {value: sum(entropies) / len(entropies) for value, entropies in groups.items()}


def fit_line(tokens: Sequence[float], entropy: Sequence[float]) -> Fit | None:
    """The line through entropies over ln N, or None where all N are the same."""
    x, y = np.log(tokens), np.asarray(entropy)
    if len(x) < 2 or np.ptp(x) < 1e-9:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    missed = float(((y - slope * x - intercept) ** 2).sum())
    return Fit(float(slope), float(intercept), 1.0 - missed / spread if spread > 0 else 1.0)


def fit(runs: Sequence[Run]) -> Fit | None:
    """The line through the runs' mean entropies over their mean ln N, or None where all have one size."""
    return fit_line(*_means(runs))


def _means(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Of each run: the geometric mean of N, and the mean entropy."""
    return [math.exp(run.log_tokens) for run in runs], [float(np.mean(run.entropy)) for run in runs]


def equation(line: Fit) -> str:
    sign = "−" if line.intercept < 0 else "+"
    return f"{line.slope:.3f} ln N {sign} {abs(line.intercept):.2f}, R² {line.r_squared:.4f}"


def shown_sizes(sizes: Iterable[int], trained: int) -> list[int]:
    """The smallest size, the one nearest to the trained one, and the largest, as many lines as can be told apart."""
    ordered = sorted(set(sizes))
    nearest = min(ordered, key=lambda size: abs(math.log(size / trained)))
    return sorted({ordered[0], nearest, ordered[-1]})


def plot_fits(axes: Any, groups: Iterable[Points], caption: Callable[[Fit], str] = equation) -> None:
    """Fig. 5: entropy over ln N, and the line fitted to each group. `caption` says in the legend what the line is."""
    for label, tokens, entropy, look in groups:
        line = fit_line(tokens, entropy)
        if line is not None:
            ends = np.log([min(tokens), max(tokens)])
            axes.plot(ends, line.slope * ends + line.intercept, **{**look, "marker": ""})
            label = f"{label}: {caption(line)}"
        axes.plot(np.log(tokens), entropy, linestyle="", **look)
        axes.plot([], [], label=label, linestyle="-" if line else "", **look)


def plot_lines(axes: Any, lines: Iterable[Line]) -> None:
    """Fig. 6: the entropy of each layer, or of each step, in order."""
    for line in lines:
        axes.plot(line.entropy, label=line.label, **line.look)
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_heads(axes: Any, heads: Sequence[HeadSlope]) -> None:
    """dH / d ln N of every head against its sharpness. The colors are T in order, other colors than those of scales."""
    from matplotlib import colormaps

    levels = sorted({head.train_tokens for head in heads}, reverse=True)
    for i, T in enumerate(levels):
        mine = [head for head in heads if head.train_tokens == T]
        look = {"color": colormaps["viridis"](0.9 * i / max(1, len(levels) - 1)), "marker": MARKERS[i % len(MARKERS)]}
        x, y = [head.sharpness for head in mine], [head.slope for head in mine]
        axes.plot(x, y, linestyle="", markeredgecolor="white", markeredgewidth=0.5, label=f"T = {T}", **look)
    for slope, style, text in ((1, "--", "1: Eq. 5"), (0, ":", "0: the entropy does not follow N")):
        axes.axhline(slope, color=TRAINED, linewidth=1, linestyle=style, label=text)
    axes.set(xlabel="sharpness at the trained size, 1 − H / ln N", ylabel="dH / d ln N")


def draw(rows: Sequence[dict], path: str | Path | None = None, heads: Sequence[HeadSlope] = ()):
    """Draw the rows of `EntropyRecord.table()`, and heads if given. The figure is also saved to `path` if given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'entropy_attn[plot]'") from error
    runs = runs_of(rows)
    if not runs:
        raise ValueError("there is nothing to plot: no run with self-attention over an image was recorded")
    figure = Figure(figsize=(12, 9.4 if heads else 4.8), layout="constrained")
    above, *below = figure.subfigures(2 if heads else 1, 1, squeeze=False).flat
    by_tokens, by_layer = above.subplots(1, 2, width_ratios=(1, 1.25))
    looks = {}  # color and marker of a scale, the same in both pictures
    for i, label in enumerate(dict.fromkeys(run.label for run in runs)):
        looks[label] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
    _draw_fits(by_tokens, runs, looks)
    _draw_layers(by_layer, runs, looks)
    for part in below:
        axes = part.subplots()
        plot_heads(axes, heads)
        axes.set_title("Every head with the trained scale: how its entropy grows with ln N")
    for axes in figure.axes:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, framealpha=1)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_fits(axes, runs: Sequence[Run], looks: dict[str, dict]) -> None:
    by_label = {label: [run for run in runs if run.label == label] for label in looks}
    plot_fits(axes, [Points(label, *_means(mine), looks[label]) for label, mine in by_label.items()])
    trained = float(np.mean(np.log(runs[0].train_tokens)))
    axes.axvline(trained, color=TRAINED, linewidth=1, linestyle=":", label="trained size")
    axes.set(xlabel="ln N, mean over the layers", ylabel="mean attention entropy (nats)")
    axes.set_title("Entropy against the number of tokens")


def _draw_layers(axes, runs: Sequence[Run], looks: dict[str, dict]) -> None:
    trained = max(runs[0].train_tokens)
    styles = iter(STYLES)
    for size in shown_sizes(map(_size, runs), trained):
        style = {"linestyle": "-" if size == trained else next(styles), "linewidth": 1.4}
        lines = []
        for label, look in looks.items():
            mine = [run.entropy for run in runs if run.label == label and _size(run) == size]
            if mine:
                entropy = np.mean([e for e in mine if len(e) == len(mine[0])], axis=0)
                lines.append(Line(None, entropy, {**look, **style, "markersize": 4}))
        if size == trained and len({tuple(line.entropy) for line in lines}) == 1:  # all scales are the trained one
            lines = [Line(None, lines[0].entropy, {**style, "color": TRAINED, "marker": ".", "markersize": 4})]
        plot_lines(axes, lines)
        name = f"N = {size}" + (", the trained size" if size == trained else "")
        axes.plot([], [], color=TRAINED, label=name, **style)
    for label, look in looks.items():
        axes.plot([], [], linestyle="", markersize=4, label=label, **look)
    axes.set(xlabel="layer", ylabel="attention entropy (nats)")
    axes.set_title("Entropy of each layer")


def _size(run: Run) -> int:
    return max(run.tokens)
