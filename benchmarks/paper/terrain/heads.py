"""Entropy of each self-attention layer and head of the terrain model against ln N: how much of it follows the size.

The paper's rule is derived for heads whose entropy grows by 1 nat when ln N does. A local head, which attends to its
neighbourhood only, has a slope near 0. Writes build/paper/terrain/heads.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where evaluation and terrain are, and harness.py

import results
from evaluation.subjects import Subject
from evaluation.terrain import terrain
from evaluation.variants import heads_of

from entropy_attn.entropy import plots

SIDES = (64, 80, 96, 112, 128)  # pixels


def rows_of(subject: Subject, sides: tuple[int, ...], images: int, batch: int) -> list[dict[str, Any]]:
    """A row for every layer: T, the mean entropy at the trained size, and the slope over ln N of each head."""
    by_size = {
        (side, side): heads_of(subject.entropies((side, side), range(images), None, batch)) for side in sides
    }  # fmt: skip
    rows = []
    for layer, (T, entropies) in by_size[subject.train_size].items():
        tokens = [heads[layer].tokens for heads in by_size.values()]
        of_heads = zip(*(heads[layer].entropies for heads in by_size.values()), strict=True)
        lines = [plots.fit_line(tokens, each) for each in of_heads]
        mean = sum(entropies) / len(entropies)
        rows.append({"layer": layer, "train_tokens": T, "entropy": mean, "slopes": [line.slope for line in lines]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        slopes, T = row["slopes"], row["train_tokens"]
        told = [f"{row['entropy']:.2f}", f"{row['entropy'] / math.log(T):.2f}", f"{sum(slopes) / len(slopes):.2f}"]
        lines.append([row["layer"].removeprefix("unet."), str(T), *told, " ".join(f"{slope:.2f}" for slope in slopes)])
    header = ["self-attention", "T", "entropy (nats)", "entropy / ln T", "slope", "slopes of the heads"]
    return results.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20, help="of each size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/paper/terrain"), help="default: %(default)s")
    arguments = parser.parse_args()
    for name in ("images", "batch"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    try:
        subject = terrain()
    except ValueError as error:
        parser.error(str(error))
    with results.Record(arguments.out / "heads.json", "cpu", images=arguments.images, sides=SIDES) as record:
        record.add(*rows_of(subject, SIDES, arguments.images, arguments.batch))
    print(f"wrote {results.write_tables(record.path, record.machine, table(record.rows))}")


if __name__ == "__main__":
    main()
