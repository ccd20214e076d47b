"""Designs side by side, from what evaluate.py wrote of each: python benchmarks/glyphs/compare.py build/designs/*"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import harness

Row = dict[str, Any]


def parameters(folder: Path) -> float:
    """Millions, of the denoiser."""
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys()) / 1e6  # noqa: SIM118 (not a dict)


def overview(folder: Path, training: Row, rows: list[Row]) -> list[str]:
    """A design in a line: what it is, its attention at the trained size, and its control."""
    layers = [row for row in rows if row["kind"] == "layer"]
    control = {row["way"]: row for row in rows if row["kind"] == "control"}
    at_one = control["m = 1"]
    tokens = ", ".join(
        f"{sum(row['tokens'] == T for row in layers)} x {T}" for T in dict.fromkeys(row["tokens"] for row in layers)
    )

    def each(name: str) -> str:
        return ", ".join(f"{row[name]:.1f}" for row in layers)

    return [
        f"{training['design']}", f"{parameters(folder):.2f}", f"{training['steps']} x {training['batch']}", tokens,
        each("deficit"), each("half_variance"), f"{at_one['frechet']:.1f}", f"{at_one['recognised']:.1f}",
        ", ".join(f"{way.removeprefix('m = ')}: {row['frechet']:.1f}" for way, row in control.items()),
    ]  # fmt: skip


def sizes(training: Row, rows: list[Row]) -> list[list[str]]:
    """A line for each size: Frechet distance and recognition with each scale."""
    of = [row for row in rows if row["kind"] == "size"]
    lines = []
    for height, width in dict.fromkeys((row["height"], row["width"]) for row in of):
        cells = {row["way"]: row for row in of if (row["height"], row["width"]) == (height, width)}
        lines.append([
            training["design"], f"{height} x {width}",
            *(f"{cell['frechet']:.1f} / {cell['recognised']:.1f}" for cell in cells.values()),
        ])  # fmt: skip
    return lines


def report(folders: list[Path]) -> str:
    read = []
    for folder in folders:
        training = json.loads((folder / "training.json").read_text())
        machine, rows = harness.load(folder / "evaluation.json")
        read.append((folder, training, machine, rows))
    header = ["design", "parameters (M)", "steps x batch", "self-attention: layers x T", "ln T − entropy, by layer",
              "σ² / 2, by layer", "Frechet distance at 24 x 24", "recognised (%)",
              "Frechet distance with m times the scale"]  # fmt: skip
    first = harness.markdown(header, [overview(folder, training, rows) for folder, training, _, rows in read])
    header = ["design", "height x width", "original", "λ", "calibrated"]
    second = harness.markdown(header, [line for _, training, _, rows in read for line in sizes(training, rows)])
    counts = ", ".join(f"{training['design']} {machine['count']}" for _, training, machine, _ in read)
    return (
        f"{first}\n\nFrechet distance / recognised (%) at other sizes:\n\n{second}\n\n"
        f"Images of each cell: {counts}; image number n comes from seed n. {harness.describe(read[0][2])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="of train.py, with evaluate.py's evaluation.json")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        for name in ("training.json", "evaluation.json"):
            if not (folder / name).is_file():
                parser.error(f"{folder / name} is missing: train and evaluate the design first")
    print(report(arguments.folders))


if __name__ == "__main__":
    main()
