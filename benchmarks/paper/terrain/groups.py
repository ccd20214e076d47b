"""What a scale on a group of layers only does to the terrain model's outputs: uniform, global and local layers.

Reads heads.json, which ../heads.py writes. A layer is uniform if its entropy is at least 97 % of ln T. Another layer is
global if its slope over ln N is at least 0.8, else local. Writes build/paper/terrain/groups.md. The judge's outputs at
the trained size are those of `paper.py --model terrain` in the same folder. Those that are not there are drawn.
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
import torch
from evaluation.judges import FID, distance_row
from evaluation.subjects import Size
from evaluation.tables import change, interval
from evaluation.terrain import TerrainJudge, terrain

UNIFORM, GLOBAL = 0.97, 0.8  # the least entropy over ln T, and the least slope
NUMBERS = range(100, 200)  # of the images: all difficulties
SIZE = (64, 64)
EXPONENT = 2.0


def groups_of(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Group -> names of its layers, from the rows of heads.py."""
    groups: dict[str, list[str]] = {"uniform": [], "global": [], "local": []}
    for row in rows:
        slope = sum(row["slopes"]) / len(row["slopes"])
        uniform = row["entropy"] >= UNIFORM * math.log(row["train_tokens"])
        groups["uniform" if uniform else "global" if slope >= GLOBAL else "local"].append(row["layer"])
    return groups


def measure(judge: TerrainJudge, groups: dict[str, list[str]], size: Size, numbers: range) -> list[dict[str, Any]]:
    """A row for the original scale and for EXPONENT on each group alone: the distance and its paired change."""

    def features(settings: dict[str, Any] | None) -> torch.Tensor:
        parts = [numbers[i : i + judge.batch] for i in range(0, len(numbers), judge.batch)]
        return judge.features(torch.cat([judge.subject.draw(size, part, settings) for part in parts]))

    judge.prepare({FID})
    reference, original = judge.reference(size), features(None)
    rows = [{"group": "none", "layers": 0} | distance_row(reference, original, None)]
    for group, layers in groups.items():
        left = {layer: 1.0 for other, names in groups.items() if other != group for layer in names}
        scaled = features({"exponent": EXPONENT, "overrides": left})
        rows.append({"group": group, "layers": len(layers)} | distance_row(reference, scaled, original))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/paper/terrain"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error(f"--batch must be at least 1, got {arguments.batch}")
    heads = arguments.out / "heads.json"
    if not heads.exists():
        parser.error(f"{heads} is missing: `python benchmarks/paper/heads.py --model terrain` writes it")
    try:
        judge = TerrainJudge(terrain(), arguments.out / "native", arguments.batch)
    except ValueError as error:
        parser.error(str(error))
    groups = groups_of(results.load(heads)[1])
    with results.Record(arguments.out / "groups.json", "cpu", size=SIZE, exponent=EXPONENT) as record:
        record.add(*measure(judge, groups, SIZE, NUMBERS))
    lines = [[row["group"], str(row["layers"]), interval(row, 1), change(row, 1)] for row in record.rows]
    table = results.markdown(["scaled layers", "number of them", judge.distance_name, "change"], lines)
    print(f"wrote {results.write_tables(record.path, record.machine, table)}")


if __name__ == "__main__":
    main()
