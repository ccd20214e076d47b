"""The demo script, with few images."""

import re
import sys

import pytest
from benchmark_modules import BENCHMARKS, importable

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")


def pair(cell: str) -> tuple[float, float]:
    before, after = re.fullmatch(r"(-?[\d.]+) → (-?[\d.]+)", cell).groups()
    return float(before), float(after)


def test_table_and_picture(monkeypatch, capsys, tmp_path):
    """At three of the sizes, with few images."""
    path = tmp_path / "demo.png"
    with importable(monkeypatch, BENCHMARKS, BENCHMARKS / "paper") as module:
        demo = module("demo")
        assert len(demo.SIZES) == 7
        monkeypatch.setattr(demo, "SIZES", ((16, 16), (24, 24), (24, 36)))
        monkeypatch.setattr(demo, "RECORDED", 4)
        monkeypatch.setattr(sys, "argv", ["demo.py", "--count", "20", "--out", str(path)])
        demo.main()
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "→" in line]
    rows = {line[0]: line[1:] for line in lines if line[0] and line[0][0].isdigit()}
    assert list(rows) == ["16 x 16", "24 x 24", "24 x 36"]
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
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with importable(monkeypatch, BENCHMARKS, BENCHMARKS / "paper") as module, pytest.raises(SystemExit) as stopped:
        module("demo").main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
