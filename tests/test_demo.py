"""The photograph demo, at sizes small enough for a test."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "photo.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_table_fit_and_picture(tmp_path):
    picture = tmp_path / "demo.png"
    done = run("--sizes", "64x64,96x64,96x96,128x128", "--train-size", "96x96", "--out", str(picture))
    assert done.returncode == 0, done.stderr
    rows = {m[0]: [float(x) for x in m[1].split()] for m in re.findall(r"^ *(\d+x\d+) +(.*)$", done.stdout, re.M)}
    assert list(rows) == ["64x64", "96x64", "96x96", "128x128"]
    assert [row[0] for row in rows.values()] == [64, 96, 144, 256]
    multipliers, original, adapted = ([row[i] for row in rows.values()] for i in (1, 2, 3))
    assert multipliers[2] == 1
    assert multipliers == sorted(multipliers)
    assert original == sorted(original)
    assert original[2] == adapted[2]
    # λ lies nearer to the trained size's entropy at every other size.
    assert all(abs(adapted[i] - adapted[2]) < abs(original[i] - original[2]) for i in (0, 1, 3))
    slopes = [float(s) for s in re.findall(r"= ([\d.]+) ln N", done.stdout)]
    assert slopes[1] < slopes[0]
    assert "backend  " in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64x60"], "argument --sizes: got '64x60', allowed is WIDTHxHEIGHT in multiples of 8"),
        (["--sizes", "8x64"], "argument --sizes: got '8x64'"),
        (["--sizes", "wide"], "argument --sizes: got 'wide'"),
        (["--sizes", "64x64"], "--sizes: a fit needs at least 3 different sizes"),
        (["--photo", "nowhere.png"], "--photo: .*nowhere.png"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
