"""The demo script, with few images."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "paper" / "demo.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=900, check=False
    )


def pair(cell: str) -> tuple[float, float]:
    before, after = re.fullmatch(r"(-?[\d.]+) → (-?[\d.]+)", cell).groups()
    return float(before), float(after)


def test_table_and_picture(tmp_path):
    path = tmp_path / "demo.png"
    done = run("--count", "20", "--out", str(path))
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "→" in line]
    rows = {line[0]: line[1:] for line in lines if line[0] and line[0][0].isdigit()}
    assert list(rows) == ["12 x 12", "16 x 16", "20 x 20", "16 x 24", "24 x 24", "24 x 36", "36 x 36"]
    assert rows["16 x 16"][0] == "64, 16"
    entropies = {size: [pair(cell) for cell in row[1].split(", ")] for size, row in rows.items()}
    trained = entropies.pop("24 x 24")
    assert all(abs(after - before) < 0.02 for before, after in trained)  # the table has two digits
    for size, levels in entropies.items():  # λ raises the entropy below the trained size, and lowers it above
        width, height = map(int, size.split(" x "))
        assert all((after > before) == (height * width < 24 * 24) and after != before for before, after in levels)
        _, paper, best, rule, recognised = rows[size][2:]
        low, high = map(float, re.fullmatch(r"[\d.]+ \(([+-][\d.]+) to ([+-][\d.]+)\)", paper).groups())
        assert low < high
        assert best != paper
        assert rule
        assert len(recognised.split(" → ")) == 3
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "3"], "--count must be at least 20"),
        (["--model", "nowhere"], "--model: no pipeline of glyphs in nowhere"),
        (["--out", "nowhere/demo.png"], "--out: no folder"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
