"""Draws the same prompts and seeds at several sizes, with the trained scale and with λ: emojis/samples.png.

python benchmarks/paper/emojis/samples.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where evaluation and emojis are, and harness.py

import harness
import torch
from evaluation import figures
from evaluation.subjects import Size, Subject, emojis
from tqdm import tqdm

SIZES: tuple[Size, ...] = ((64, 64), (32, 32), (48, 48), (96, 96), (32, 64))
WAYS = {"1/√d": None, "λ": {}}


def rows(subject: Subject, count: int) -> list[tuple[str, torch.Tensor]]:
    """A label and images (count, 3, H, W) for each size and scale; at the trained size both scales are the same."""
    wanted = [(size, way) for size in SIZES for way in WAYS if size != subject.train_size or WAYS[way] is None]
    return [
        (f"{size[0]} × {size[1]}, {'trained' if size == subject.train_size else way}",
         subject.draw(size, range(count), WAYS[way]))
        for size, way in tqdm(wanted, desc="rows")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=24, help="images of each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "samples.png", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count must be at least 1, got {arguments.count}")
    drawn = rows(emojis(), arguments.count)
    plt = harness.pyplot()
    figure, axes = plt.subplots(len(drawn), 1, figsize=(14, 0.8 * len(drawn)), layout="constrained")
    for each, (label, images) in zip(axes, drawn, strict=True):
        figures.draw_strip(each, label, images)
    figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()
