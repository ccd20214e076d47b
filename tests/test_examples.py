"""Each example runs, with a tiny pipeline instead of the one that it would download."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import tiny_pipelines as tiny
from PIL import Image

import entropy_attn

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a module. Like scripts, examples can import one another."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in NAMES:
        sys.modules.pop(name, None)


def test_adapt_pipeline(example, tmp_path, capsys):
    pipe, out = tiny.sd(), tmp_path / "adapted.png"
    example("adapt_pipeline").main(["--height", "128", "--width", "192", "--steps", "2", "--out", str(out)], pipe)
    assert re.search(r"unet.mid_block.*attn1 +1024 +96  0.8115", capsys.readouterr().out)
    image = Image.open(out)
    assert image.size == (2 * 192, 128)
    assert image.crop((0, 0, 192, 128)).tobytes() != image.crop((192, 0, 384, 128)).tobytes()
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_custom_unet(example, capsys):
    example("custom_unet").main(["--sizes", "8", "48"])
    printed = capsys.readouterr().out.splitlines()
    for line, shape, layers in zip(
        printed, ["(1, 3, 8, 8)", "(1, 4, 8, 8)", "(1, 3, 48, 48)", "(1, 4, 48, 48)"], [2, 6, 2, 6], strict=True
    ):
        assert shape in line
        entropies = [float(entropy) for entropy in re.findall(r"\d+\.\d{3}", line)]
        assert len(entropies) == layers  # the Diffusers UNet has 2 down, 1 in the middle, 3 up
        assert all(0 < entropy <= math.log(48 * 48) for entropy in entropies)


def test_record_entropy(example, tmp_path, capsys):
    arguments = ["--sizes", "96", "128", "192", "--steps", "2", "--out", str(tmp_path)]
    example("record_entropy").main(arguments, tiny.sd())
    printed = capsys.readouterr().out.splitlines()
    assert sum("trained scale" in line for line in printed) == 3 * 4  # runs x layers
    assert Image.open(tmp_path / "entropy.png").width > 1000
    entries = json.loads((tmp_path / "entropy.json").read_text())["entries"]
    assert len(entries) == 6 * 4 * 2 * 2 * 2  # runs x layers x steps x halves of the batch x heads


def test_match_entropy(example, tmp_path, capsys):
    pipe = tiny.sd(tiny.unet(32, "two levels"))
    for _ in range(2):  # the second run uses the calibration of the first
        arguments = ["--height", "96", "--width", "128", "--steps", "3", "--prompts", "a", "b", "--out", str(tmp_path)]
        example("match_entropy").main(arguments, pipe)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "attn1" in line]
    assert len(rows) == 8
    assert rows[:4] == rows[4:]
    for _, log_tokens, wanted, *found in rows:
        assert float(log_tokens) == pytest.approx(math.log(6 * 8), abs=1e-3)
        assert wanted.endswith("*")  # H_T is near ln 256, above ln N: attention is almost uniform
        assert all(0 < float(entropy) <= math.log(6 * 8) for entropy in found)
        assert len(found) == 4
    assert Image.open(tmp_path / "matched.png").size == (4 * 128, 96)
    assert entropy_attn.diffusers.Calibration.load(tmp_path / "calibration.json", pipe)


@pytest.mark.parametrize("name", NAMES)
def test_help(name, example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    assert "usage:" in capsys.readouterr().out
