"""The rows of a run as pictures: quality by size, entropy against ln N (Fig. 5), and by layer and step (Fig. 6)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

from evaluation import rules

Row = dict[str, Any]
COLOURS = {
    rules.ORIGINAL: "tab:red", rules.PAPER: "tab:blue", "exponent 1": "tab:cyan", "exponent 2": "tab:green",
    "exponent 4": "tab:olive", rules.CALIBRATED: "tab:purple", rules.MATCHED: "tab:brown",
}  # fmt: skip


class Fit(NamedTuple):
    """Entropy = slope ln N + intercept, by least squares, and how much of the variance that explains."""

    slope: float
    intercept: float
    r_squared: float


def fit(N: np.ndarray, entropy: np.ndarray) -> Fit:
    """Raises ValueError for fewer than 2 different N."""
    if len(set(N.tolist())) < 2:
        raise ValueError(f"a fit needs at least 2 different numbers of tokens, got {sorted(set(N.tolist()))}")
    slope, intercept = np.polyfit(np.log(N), entropy, 1)
    return Fit(float(slope), float(intercept), float(np.corrcoef(np.log(N), entropy)[0, 1] ** 2))


def entropy_rows(rows: list[Row]) -> list[Row]:
    """A row for every layer and step, of the rows of kind "entropy", which hold many."""
    return [
        {"width": row["width"], "height": row["height"], "rule": row["rule"], **place}
        for row in rows
        if row["kind"] == "entropy"
        for place in row["places"]
    ]


def draw(rows: list[Row], path: Path, train_size: tuple[int, int], names: dict[str, str]) -> None:
    """All pictures that the rows allow, in one file; `names` are those of the kinds of figures of merit."""
    drawings = [
        functools.partial(draw_quality, kind=kind, name=name)
        for kind, name in names.items()
        if any(row["kind"] == kind and (row["width"], row["height"]) != train_size for row in rows)
    ]
    if any(row["kind"] == "entropy" for row in rows):
        drawings += [draw_fits, draw_layers, draw_steps]
    if not drawings:
        return
    plt = harness.pyplot()
    figure, grid = plt.subplots(
        -(-len(drawings) // 2), 2, figsize=(15, 5 * -(-len(drawings) // 2)), layout="constrained", squeeze=False
    )
    for axes, drawing in zip(grid.flat, drawings, strict=False):
        drawing(axes, rows, train_size)
    for axes in list(grid.flat)[len(drawings) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_quality(axes: Any, rows: list[Row], train_size: tuple[int, int], kind: str, name: str) -> None:
    """A figure of merit relative to that of the original scale, by size."""
    of = [row for row in rows if row["kind"] == kind and (row["width"], row["height"]) != train_size]
    sizes = sorted({(row["width"], row["height"]) for row in of}, key=lambda size: size[0] * size[1])
    for rule, colour in COLOURS.items():
        ratios = []
        for size in sizes:
            by_rule = {row["rule"]: row for row in of if (row["width"], row["height"]) == size}
            ratios.append(
                100 * by_rule[rule]["value"] / by_rule[rules.ORIGINAL]["value"] if rule in by_rule else np.nan
            )
        axes.plot([f"{w}x{h}" for w, h in sizes], ratios, "o-", color=colour, label=rule)
    axes.axhline(100, color="grey", linewidth=1)
    axes.set(ylabel="% of the original scale's", xlabel="width x height", title=name)
    axes.legend(frameon=False, fontsize=8)


def by_level(rows: list[Row], rule: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """T -> (N, mean entropy) over the sizes, from `entropy_rows`."""
    means: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        if row["rule"] == rule:
            means.setdefault(row["train_tokens"], {}).setdefault(row["tokens"], []).append(row["entropy"])
    return {
        T: (np.array(sorted(of)), np.array([np.mean(of[N]) for N in sorted(of)])) for T, of in sorted(means.items())
    }


def draw_fits(axes: Any, rows: list[Row], train_size: tuple[int, int]) -> None:
    tokens: list[int] = []
    for rule in (rules.ORIGINAL, rules.PAPER, rules.CALIBRATED):
        for (T, (N, entropy)), marker in zip(by_level(entropy_rows(rows), rule).items(), "osD^v", strict=False):
            label = f"{rule}, T = {T}"
            if len(N) > 1:
                line = fit(N, entropy)
                label += f": slope {line.slope:.3f}, R² {line.r_squared:.3f}"
                axes.plot(N, line.slope * np.log(N) + line.intercept, color=COLOURS[rule], linewidth=1)
            axes.plot(N, entropy, marker, color=COLOURS[rule], label=label)
            tokens += N.tolist()
    harness.token_axis(axes, tokens)
    axes.set(xlabel="tokens N of a layer", ylabel="mean entropy (nats)", title="Entropy against ln N")
    axes.legend(frameon=False, fontsize=8)


def draw_lines(axes: Any, rows: list[Row], train_size: tuple[int, int], over: str) -> None:
    """Mean entropy over layers or steps: the trained size, the smallest and the largest, with two scales."""
    of = entropy_rows(rows)
    sizes = sorted({(row["width"], row["height"]) for row in of}, key=lambda size: size[0] * size[1])
    shown = [sizes[0], sizes[-1]] + ([train_size] if train_size in sizes else [])
    for size, colour in zip(dict.fromkeys(shown), ("tab:green", "tab:purple", "tab:gray"), strict=False):
        for rule, style in ((rules.ORIGINAL, "-"), (rules.PAPER, "--"), (rules.CALIBRATED, ":")):
            chosen = [row for row in of if (row["width"], row["height"]) == size and row["rule"] == rule]
            places = dict.fromkeys(row[over] for row in chosen)
            means = [np.mean([row["entropy"] for row in chosen if row[over] == place]) for place in places]
            axes.plot(means, style, color=colour, marker=".", label=f"{size[0]}x{size[1]}, {rule}")
    axes.set(xlabel=f"{over}, in order", ylabel="mean entropy (nats)", title=f"Entropy of every {over}")
    axes.legend(frameon=False, fontsize=7, ncols=3)


def draw_layers(axes: Any, rows: list[Row], train_size: tuple[int, int]) -> None:
    draw_lines(axes, rows, train_size, "layer")


def draw_steps(axes: Any, rows: list[Row], train_size: tuple[int, int]) -> None:
    draw_lines(axes, rows, train_size, "step")
