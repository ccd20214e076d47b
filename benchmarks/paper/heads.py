"""Entropy of each self-attention layer and head of a model against ln N: how much of it follows the size.

    python benchmarks/paper/heads.py --model glyphs emojis terrain

The paper's rule is derived for heads whose entropy grows by 1 nat when ln N does (Eq. 5). A local head, which attends
to its neighbourhood only, has a slope near 0. Writes heads.json, heads.md and heads.png into the model's folder of
--out, and for several models also a table and a picture of all into --out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where harness.py is

try:
    from evaluation.subjects import Subject, emojis, glyphs
    from evaluation.terrain import terrain
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'entropy_attn[demo]'")
import harness
import results

from entropy_attn.entropy import plots
from entropy_attn.entropy.heads import HeadSlope, head_slopes

MODELS = {"glyphs": glyphs, "emojis": emojis, "terrain": terrain}
SIDES = {  # pixels
    "glyphs": (12, 16, 20, 24, 28, 32, 36),
    "emojis": (32, 48, 64, 80, 96),
    "terrain": (64, 80, 96, 112, 128),
}
GLOBAL, LOCAL = 0.7, 0.3  # bounds of the slopes that the summary counts
SHARPNESS, NEAR = (0.2, 0.4), 0.1  # bounds of the bands of sharpness, and how near to 1 a slope is counted as 1


def rows_of(subject: Subject, sides: tuple[int, ...], images: int, batch: int) -> list[dict[str, Any]]:
    """A row for every layer: T, the mean entropy at the trained size, and slope and sharpness of each head."""
    measured = []
    for side in tqdm(sides, desc=subject.name, unit="size"):
        record = subject.entropies((side, side), range(images), None, batch)
        measured += [row | {"run": side} for row in record.table(by=("layer", "head"))]
    rows = []
    trained = plots.mean_entropy((row for row in measured if row["run"] == subject.train_size[0]), "layer")
    slopes = head_slopes(measured)
    for layer, entropy in trained.items():
        heads = [head for head in slopes if head.layer == layer]
        rows.append({
            "layer": layer, "train_tokens": heads[0].train_tokens, "entropy": entropy,
            "slopes": [head.slope for head in heads], "sharpness": [head.sharpness for head in heads],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every layer."""
    lines = []
    for row in rows:
        slopes, T = row["slopes"], row["train_tokens"]
        told = [f"{row['entropy']:.2f}", f"{row['entropy'] / math.log(T):.2f}", f"{sum(slopes) / len(slopes):.2f}"]
        lines.append([row["layer"].removeprefix("unet."), str(T), *told, " ".join(f"{slope:.2f}" for slope in slopes)])
    header = ["self-attention", "T", "entropy (nats)", "entropy / ln T", "slope", "slopes of the heads"]
    return results.markdown(header, lines)


def summary(models: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each T of each model: how many heads follow ln N, and how sharp they are on average."""
    lines = []
    for model, rows in models.items():
        for T in sorted({row["train_tokens"] for row in rows}, reverse=True):
            of = [row for row in rows if row["train_tokens"] == T]
            slopes = [slope for row in of for slope in row["slopes"]]
            sharpness = [value for row in of for value in row["sharpness"]]
            follow, stay = sum(slope >= GLOBAL for slope in slopes), sum(slope < LOCAL for slope in slopes)
            counts = [str(follow), str(len(slopes) - follow - stay), str(stay)]
            means = [f"{sum(slopes) / len(slopes):.2f}", f"{sum(sharpness) / len(sharpness):.2f}"]
            lines.append([model, str(T), str(len(slopes)), *counts, *means])
    bounds = [f"slope ≥ {GLOBAL}", f"{LOCAL} to {GLOBAL}", f"< {LOCAL}"]
    return results.markdown(["model", "T", "heads", *bounds, "mean slope", "mean sharpness, 1 − H / ln T"], lines)


def by_sharpness(models: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each band of sharpness of each model: the slopes of its heads."""
    lines = []
    for model, rows in models.items():
        heads = [head for row in rows for head in zip(row["sharpness"], row["slopes"], strict=True)]
        for low, high in itertools.pairwise((-math.inf, *SHARPNESS, math.inf)):
            slopes = [slope for sharpness, slope in heads if low <= sharpness < high]
            if slopes:
                band = f"below {high}" if low < 0 else f"at least {low}" if high > 1 else f"{low} to {high}"
                near = sum(abs(slope - 1) <= NEAR for slope in slopes)
                numbers = (sum(slopes) / len(slopes), min(slopes), max(slopes))
                lines.append([model, band, str(len(slopes)), str(near), *(f"{number:.2f}" for number in numbers)])
    header = ["model", "sharpness", "heads", f"slope 1 ± {NEAR}", "mean slope", "least", "largest"]
    return results.markdown(header, lines)


def report(models: dict[str, list[dict[str, Any]]]) -> str:
    return f"{summary(models)}\n\n{by_sharpness(models)}"


def draw(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each model."""
    plt = harness.pyplot()
    figure, axes = plt.subplots(
        1, len(models), figsize=(5.5 * len(models), 4.8), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for each, (model, rows) in zip(axes.flat, models.items(), strict=True):
        heads = [
            HeadSlope(row["layer"], head, row["train_tokens"], sharpness, slope)
            for row in rows
            for head, (slope, sharpness) in enumerate(zip(row["slopes"], row["sharpness"], strict=True))
        ]
        plots.plot_heads(each, heads)
        each.set_title(model)
        each.label_outer()
        each.legend(fontsize=9, framealpha=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(model: str, out: Path, images: int, batch: int) -> results.Record:
    """Measure a model and write its files. Raises ValueError if it cannot be loaded."""
    subject = MODELS[model]()
    with results.Record(out / model / "heads.json", "cpu", images=images, sides=SIDES[model]) as record:
        record.add(*rows_of(subject, SIDES[model], images, batch))
    results.write_tables(record.path, record.machine, f"{report({model: record.rows})}\n\n{table(record.rows)}")
    draw({model: record.rows}, record.path.with_suffix(".png"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["glyphs"], help="default: glyphs")
    parser.add_argument("--images", type=int, default=20, help="of each size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="default: %(default)s")
    arguments = parser.parse_args()
    for name in ("images", "batch"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    try:
        records = [measure(model, arguments.out, arguments.images, arguments.batch) for model in arguments.model]
    except ValueError as error:
        parser.error(str(error))
    path = records[0].path
    if len(records) > 1:
        models, path = {record.path.parent.name: record.rows for record in records}, arguments.out / "heads.json"
        results.write_tables(path, records[0].machine, report(models))
        draw(models, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
