"""Compares designs of the embedded pipeline: python benchmarks/paper/glyphs/compare.py build/designs/*

It reads what train.py, attention.py and paper.py wrote to the folder of each design:

    python benchmarks/paper/glyphs/train.py --design sharp --out build/designs/sharp
    python benchmarks/paper/glyphs/attention.py build/designs/sharp
    python benchmarks/paper/paper.py --what fid clip --folder build/designs/sharp --out build/designs/sharp
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where evaluation and glyphs are, and harness.py

import harness
import results
from evaluation import rows as row_files
from evaluation import rules
from evaluation.run import key_of

Row = dict[str, Any]
FILES = ("training.json", "attention.json", "glyphs/results.jsonl")
SCALES = (rules.ORIGINAL, rules.PAPER, "exponent 4", rules.CALIBRATED)
TRAINED = (24, 24)


class Measured(NamedTuple):
    """The contents of a design's folder."""

    name: str
    parameters: float  # millions
    training: Row
    layers: list[Row]
    machine: Row
    cells: dict[tuple, Row]  # rows of paper.py by key_of


def read(folder: Path) -> Measured:
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys()) / 1e6  # noqa: SIM118 (not a dict)
    training = json.loads((folder / FILES[0]).read_text())
    machine, *rows = row_files.read(folder / FILES[2])
    name = f"{training['design']}, {training['steps']} x {training['batch']}"
    cells = {key_of(row): row for row in rows}
    return Measured(name, parameters, training, results.load(folder / FILES[1])[1], machine, cells)


def figures(measured: Measured, size: tuple[int, int], rule: str) -> str:
    """Distance and share of recognised digits (%) of a cell, as text."""
    found = [measured.cells.get((kind, size, rule)) for kind in ("fid", "clip")]
    return " / ".join(f"{row['value']:.1f}" for row in found if row is not None)


def overview(measured: Measured) -> list[str]:
    """A line for a design: its size, its attention at the trained size, and the results of the control."""
    layers = measured.layers
    T = dict.fromkeys(row["tokens"] for row in layers)
    tokens = ", ".join(f"{sum(row['tokens'] == each for row in layers)} x {each}" for each in T)
    columns = [", ".join(f"{row[name]:.1f}" for row in layers) for name in ("deficit", "half_variance")]
    control = [figures(measured, TRAINED, rule) for rule in (rules.ORIGINAL, *rules.CONTROLS)]
    return [measured.name, f"{measured.parameters:.2f}", tokens, *columns, *control]


def sizes(measured: Measured) -> list[list[str]]:
    """A line for each size: distance and recognition with each scale."""
    of = dict.fromkeys(size for _, size, _ in measured.cells if size != TRAINED)
    return [[measured.name, f"{w} x {h}", *(figures(measured, (w, h), rule) for rule in SCALES)] for w, h in of]


def report(folders: list[Path]) -> str:
    designs = [read(folder) for folder in folders]
    header = ["design, steps x batch", "parameters (M)", "self-attention: layers x T", "ln T − entropy, by layer",
              "σ² / 2, by layer", "as trained", *rules.CONTROLS]  # fmt: skip
    first = results.markdown(header, [overview(measured) for measured in designs])
    header = ["design, steps x batch", "width x height", *SCALES]
    second = results.markdown(header, [line for measured in designs for line in sizes(measured)])
    counts = ", ".join(f"{measured.machine['num'] // 2}" for measured in designs)
    return (
        "Frechet distance / recognised (%), at the trained size with multiples of the scale:\n\n"
        f"{first}\n\nAt other sizes:\n\n{second}\n\n"
        f"Images of each cell, design by design: {counts}. {harness.describe(designs[0].machine)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="with the files of train.py, attention.py and paper.py")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        for name in FILES:
            if not (folder / name).is_file():
                parser.error(f"{folder / name} is missing: train and measure the design first")
    print(report(arguments.folders))


if __name__ == "__main__":
    main()
