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
import torch
from PIL import Image, ImageChops

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


def test_packed_sizes(example, capsys, monkeypatch):
    module = example("packed_sizes")
    arguments = ["--sizes", "8x8", "4x24", "24x20", "--steps", "3", "--rounds", "1"]
    module.main(arguments)
    printed = capsys.readouterr().out
    rows = re.findall(r"(\d+) x +(\d+): N = +(\d+), λ√D = (\d\.\d+), largest difference (\S+)", printed)
    assert [row[:3] for row in rows] == [("8", "8", "16"), ("4", "24", "24"), ("24", "20", "120")]
    assert all(float(row[3]) == pytest.approx(math.sqrt(math.log(int(row[2]), 64)), abs=1e-3) for row in rows)
    assert all(float(row[4]) <= 1e-4 for row in rows)
    assert re.search(r"packed \d\.\d+ s, one by one \d\.\d+ s: \d+\.\d\d times as long", printed)
    packed = module.attention_varlen
    monkeypatch.setattr(module, "attention_varlen", lambda *qkv, train_tokens: packed(*qkv, train_tokens=48))
    with pytest.raises(AssertionError, match=r"differs by .* from that of a run by itself"):
        module.main(arguments)


def difference(image, other):
    """The largest difference of two images, of 255."""
    return max(high for _, high in ImageChops.difference(image.convert("RGB"), other.convert("RGB")).getextrema())


def test_many_sizes(example, tmp_path, capsys, monkeypatch):
    module, pipe = example("many_sizes"), tiny.sd()
    sizes, seeds, prompts = [(64, 96), (96, 64), (64, 96), (64, 96)], [5, 6, 7, 5], ["a dog", "a cat", "a dog", "a dog"]
    options = {"num_inference_steps": 2}
    with entropy_attn.enable(pipe):
        alone = [
            pipe([prompt], height=height, width=width, generator=torch.Generator().manual_seed(seed), **options).images[
                0
            ]
            for (height, width), seed, prompt in zip(sizes, seeds, prompts, strict=True)
        ]
        batches, call = [], type(pipe).__call__
        monkeypatch.setattr(
            type(pipe), "__call__", lambda self, prompt, **given: batches.append(prompt) or call(self, prompt, **given)
        )
        images = module.generate(pipe, sizes, prompts, seeds, batch_size=2, **options)
    assert batches == [["a dog", "a dog"], ["a dog"], ["a cat"]]
    assert [(image.height, image.width) for image in images] == sizes
    assert all(difference(one, other) <= 1 for one, other in zip(images, alone, strict=True))
    assert difference(images[0], images[2]) > 1
    with pytest.raises(ValueError, match="one entry for each image, got 4, 3 and 4"):
        module.generate(pipe, sizes, "a dog", seeds[:3])
    arguments = ["--prompt", "a dog", "--steps", "2", "--out", str(tmp_path)]
    module.main(["--sizes", "64x96", "96x64", "--seeds", "5", "6", *arguments], pipe)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0-64x96-seed5.png", "1-96x64-seed6.png"]
    assert f"wrote 2 images to {tmp_path}" in capsys.readouterr().out
    saved = Image.open(tmp_path / "0-64x96-seed5.png")
    assert difference(saved, images[0]) <= 1
    assert difference(saved, module.generate(pipe, sizes[:1], "a dog", [5], **options)[0]) > 1  # without λ


def test_many_sizes_of_the_embedded_pipeline(example, monkeypatch):
    """Its first argument is a list of labels."""
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks" / "paper"))
    pipeline = importlib.import_module("glyphs.pipeline")
    pipe = pipeline.GlyphPipeline.from_pretrained(EXAMPLES.parent / "benchmarks" / "paper" / "glyphs" / "model")
    size, sizes, labels = pipe.train_size, [], [3, 3, 7]
    sizes = [(size, size), (size // 2, size), (size, size)]
    with entropy_attn.enable(pipe):
        images = example("many_sizes").generate(pipe, sizes, labels, [0, 1, 2], num_inference_steps=2)
        alone = [
            pipe([label], *size, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).images[0]
            for label, size, seed in zip(labels, sizes, [0, 1, 2], strict=True)
        ]
    assert all(difference(one, other) <= 1 for one, other in zip(images, alone, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    assert "usage:" in capsys.readouterr().out
