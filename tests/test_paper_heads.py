"""heads.py: slopes of heads over ln N, in tables and a picture; and emojis/record.py, the picture of a record."""

import json
import math
import sys

import pytest
from benchmark_modules import BENCHMARKS, importable
from PIL import Image

PAPER = BENCHMARKS / "paper"


@pytest.fixture
def part(monkeypatch):
    """Imports modules of the benchmark by name."""
    with importable(monkeypatch, BENCHMARKS, PAPER) as module:
        yield module


@pytest.fixture
def glyphs(part):
    return part("evaluation.subjects").glyphs(num_inference_steps=1)


def run(part, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["heads.py", *map(str, arguments)])
    part("heads").main()


def test_the_slopes_are_those_between_two_sizes(part, glyphs):
    """With two sizes the line goes through both entropies."""
    rows = part("heads").rows_of(glyphs, (16, 24), 2, 1)
    heads_of = part("evaluation.variants").heads_of
    small, trained = (heads_of(glyphs.entropies((side, side), range(2), None, 2)) for side in (16, 24))
    assert [row["layer"] for row in rows] == list(trained)
    for row in rows:
        (N, before), (T, after) = small[row["layer"]], trained[row["layer"]]
        assert row["train_tokens"] == T
        assert row["entropy"] == pytest.approx(sum(after) / len(after), rel=1e-3)
        assert row["sharpness"] == pytest.approx([1 - H / math.log(T) for H in after], abs=1e-3)
        slopes = [(b - a) / math.log(T / N) for a, b in zip(before, after, strict=True)]
        assert row["slopes"] == pytest.approx(slopes, abs=2e-3)


def row_of(slopes, T=64, layer="unet.a"):
    """A layer with half the entropy of uniform attention."""
    return {"layer": layer, "train_tokens": T, "entropy": math.log(T) / 2, "slopes": slopes,
            "sharpness": [0.5] * len(slopes)}  # fmt: skip


def test_heads_are_counted_by_their_slope(part):
    one = [row_of([0.2], T=16), row_of([0.7, 1.0, 0.69]), row_of([0.3, 0.299, -1.0], layer="unet.b")]
    assert part("heads").summary({"one": one, "other": [row_of([1.0])]}).splitlines()[2:] == [
        "| one | 64 | 6 | 2 | 2 | 2 | 0.33 | 0.50 |",
        "| one | 16 | 1 | 0 | 0 | 1 | 0.20 | 0.50 |",
        "| other | 64 | 1 | 1 | 0 | 0 | 1.00 | 0.50 |",
    ]
    assert part("heads").by_sharpness({"one": [row_of([0.2, 1.05]), row_of([0.85]) | {"sharpness": [0.19]}]}) == (
        "| model | sharpness | heads | slope 1 ± 0.1 | mean slope | least | largest |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| one | below 0.2 | 1 | 0 | 0.85 | 0.85 | 0.85 |\n"
        "| one | at least 0.4 | 2 | 1 | 0.62 | 0.20 | 1.05 |"
    )
    assert part("heads").table(one).splitlines()[3] == "| a | 64 | 2.08 | 0.50 | 0.80 | 0.70 1.00 0.69 |"


def test_every_model_is_measured_at_its_trained_size(part):
    heads = part("heads")
    assert set(heads.SIDES) == set(heads.MODELS)
    for model in ("glyphs", "emojis"):  # the terrain model needs its package
        subject, sides = heads.MODELS[model](), heads.SIDES[model]
        assert subject.train_size[0] in sides
        subject.check_sizes([(side, side) for side in sides])


def test_a_run(part, monkeypatch, glyphs, tmp_path, capsys):
    heads = part("heads")
    monkeypatch.setattr(heads, "MODELS", {"glyphs": lambda: glyphs, "emojis": lambda: glyphs})
    monkeypatch.setattr(heads, "SIDES", {"glyphs": (16, 24), "emojis": (24, 32)})
    run(part, monkeypatch, "--model", "glyphs", "--images", 2, "--out", tmp_path)
    assert not (tmp_path / "heads.md").exists()  # which is of several models
    assert f"wrote {tmp_path / 'glyphs' / 'heads.md'} and" in capsys.readouterr().out
    run(part, monkeypatch, "--model", "glyphs", "emojis", "--images", 2, "--out", tmp_path)
    for model, sides in heads.SIDES.items():
        saved = json.loads((tmp_path / model / "heads.json").read_text())
        assert saved["machine"]["sides"] == list(sides)
        assert [row["train_tokens"] for row in saved["rows"]].count(144) == 3
        table = (tmp_path / model / "heads.md").read_text()
        assert table.count(f"| {model} | 144 | 12 |") == table.count("| mid_block.attentions.0") == 1
    both = (tmp_path / "heads.md").read_text()
    assert both.count("| 144 | 12 |") == 2
    assert both.count("| sharpness |") == 1
    assert "mid_block" not in both
    one, two = (Image.open(folder / "heads.png").width for folder in (tmp_path / "glyphs", tmp_path))
    assert 1.5 * one < two
    assert f"wrote {tmp_path / 'heads.md'} and {tmp_path / 'heads.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "sd21"], "invalid choice: 'sd21'"),
        (["--images", 0], "--images must be at least 1, got 0"),
        (["--model", "terrain"], "the package is missing"),
    ],
)
def test_bad_input(part, monkeypatch, capsys, tmp_path, arguments, said):
    def missing():
        raise ValueError("the package is missing")

    monkeypatch.setitem(part("heads").MODELS, "terrain", missing)
    with pytest.raises(SystemExit) as stopped:
        run(part, monkeypatch, *arguments, "--out", tmp_path)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_groups_says_what_writes_its_input(part, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["groups.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        part("terrain.groups").main()
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'heads.json'} is missing: `python benchmarks/paper/heads.py --model terrain` writes it" in said


def test_the_picture_of_a_record_has_both_scales_and_the_heads(part, glyphs):
    record = part("emojis.record").record_of(glyphs, (16, 24), 2)
    assert [row["label"] for row in record.table(by=("run", "label"))] == 2 * ["trained scale"] + 2 * ["λ"]
    assert len(record.plot().axes) == 3
