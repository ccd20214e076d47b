"""Draws what `EntropyRecord.plot` shows of the emoji model, with the trained scale and with λ: docs/entropy-record.png.

python benchmarks/paper/emojis/record.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where evaluation and emojis are, and harness.py

from evaluation.subjects import Subject, emojis
from tqdm import tqdm

from entropy_attn.entropy import EntropyRecord

SIDES = (32, 48, 64, 80, 96)  # pixels
SCALES: tuple[dict[str, Any], ...] = ({"exponent": 0}, {})  # arguments of `enable`: 1/√d and λ
PICTURE = Path(__file__).parents[3] / "docs" / "entropy-record.png"


def record_of(subject: Subject, sides: tuple[int, ...], count: int) -> EntropyRecord:
    """The entropies of `count` images of each size and scale, drawn in one batch."""
    record = EntropyRecord()
    with tqdm(total=len(SCALES) * len(sides), desc="runs") as progress:
        for settings in SCALES:
            for side in sides:
                subject.draw((side, side), range(count), {**settings, "record_entropy": record})
                progress.update()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5, help="images of each size and scale (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: docs/entropy-record.png)")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count must be at least 1, got {arguments.count}")
    record_of(emojis(), SIDES, arguments.count).plot(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
