"""The rows of a run as pictures: quality by size, entropy against ln N (Fig. 5), and by layer and step (Fig. 6).

The library draws and fits Fig. 5 and 6; this module chooses what they show.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from entropy_attn.entropy import plots
from evaluation import rules
from evaluation.subjects import Size

Row = dict[str, Any]
SHOWN = (rules.ORIGINAL, rules.PAPER, rules.CALIBRATED)  # the scales in Fig. 5 and 6
COLOURS = {
    rules.ORIGINAL: "tab:red", rules.PAPER: "tab:blue", "exponent 1": "tab:cyan", "exponent 2": "tab:green",
    "exponent 4": "tab:olive", rules.CALIBRATED: "tab:purple", rules.MATCHED: "tab:brown",
}  # fmt: skip


def draw_strip(axes: Any, label: str, images: torch.Tensor) -> None:
    """Images (n, C, H, W) in [0, 1] side by side, with grey lines between them and a label on the left."""
    strip = torch.cat(list(torch.nn.functional.pad(images, (1, 1), value=0.5)), 2)
    pixels = (strip.squeeze(0) if len(strip) == 1 else strip.permute(1, 2, 0)).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[], frame_on=False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center")


def entropy_rows(rows: list[Row]) -> list[Row]:
    """A row for every layer and step: a row of kind "entropy" holds many of them."""
    return [
        {"width": row["width"], "height": row["height"], "rule": row["rule"], **place}
        for row in rows
        if row["kind"] == "entropy"
        for place in row["places"]
    ]


def draw(rows: list[Row], path: Path, train_size: Size, names: dict[str, str]) -> None:
    """Draw all pictures for which there are rows, into one file; `names` maps the kinds of metrics to their names."""
    drawings = [
        functools.partial(draw_quality, kind=kind, name=name)
        for kind, name in names.items()
        if any(row["kind"] == kind and (row["width"], row["height"]) != train_size for row in rows)
    ]
    if any(row["kind"] == "entropy" for row in rows):
        drawings += [draw_fits, functools.partial(draw_lines, over="layer"), functools.partial(draw_lines, over="step")]
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


def draw_quality(axes: Any, rows: list[Row], train_size: Size, kind: str, name: str) -> None:
    """A metric as a percentage of its value with the original scale, by size."""
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


def by_level(rows: list[Row], rule: str) -> dict[int, dict[int, float]]:
    """From `entropy_rows`: T -> N -> mean entropy of the layers with these T and N; N ascending."""
    levels: dict[int, list[Row]] = {}
    for row in rows:
        if row["rule"] == rule:
            levels.setdefault(row["train_tokens"], []).append(row)
    return {T: dict(sorted(plots.mean_entropy(levels[T], "tokens").items())) for T in sorted(levels)}


def slope(line: plots.Fit) -> str:
    """The caption of a fitted line."""
    return f"slope {line.slope:.3f}, R² {line.r_squared:.4f}"


def label_tokens(axes: Any, tokens: Iterable[int]) -> None:
    """Label an axis of ln N with N."""
    ticks = harness.token_ticks(tokens)
    axes.set_xticks(np.log(ticks), [str(N) for N in ticks])


def draw_fits(axes: Any, rows: list[Row], train_size: Size) -> None:
    """Fig. 5: mean entropy against ln N, a line for each T and scale."""
    groups = [
        plots.Points(
            f"{rule}, T = {T}", list(level), list(level.values()),
            {"color": COLOURS[rule], "marker": marker, "linewidth": 1},
        )
        for rule in SHOWN
        for (T, level), marker in zip(by_level(entropy_rows(rows), rule).items(), plots.MARKERS, strict=False)
    ]  # fmt: skip
    plots.plot_fits(axes, groups, slope)
    label_tokens(axes, [N for group in groups for N in group.tokens])
    axes.set(xlabel="tokens N of a layer", ylabel="mean entropy (nats)", title="Entropy against ln N")
    axes.legend(frameon=False, fontsize=8)


def draw_lines(axes: Any, rows: list[Row], train_size: Size, over: str) -> None:
    """Fig. 6: mean entropy of each layer, or step, at the smallest size, the trained one and the largest."""
    by_size: dict[Size, list[Row]] = {}
    for row in entropy_rows(rows):
        by_size.setdefault((row["width"], row["height"]), []).append(row)
    by_pixels = {width * height: (width, height) for width, height in by_size}
    shown = [by_pixels[pixels] for pixels in plots.shown_sizes(by_pixels, train_size[0] * train_size[1])]
    colours = {shown[0]: "tab:green", shown[-1]: "tab:purple"}
    lines = []
    for size in shown:
        for rule, style in zip(SHOWN, ("-", "--", ":"), strict=True):
            means = plots.mean_entropy((row for row in by_size[size] if row["rule"] == rule), over)
            look = {"color": colours.get(size, "tab:gray"), "linestyle": style, "marker": "."}
            lines.append(plots.Line(f"{size[0]}x{size[1]}, {rule}", list(means.values()), look))
    plots.plot_lines(axes, lines)
    axes.set(xlabel=f"{over}, in order", ylabel="mean entropy (nats)", title=f"Entropy of every {over}")
    axes.legend(frameon=False, fontsize=7, ncols=3)
