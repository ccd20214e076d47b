"""The terrain model: its network, pipeline, judge and runs with random weights, and its weights where they are."""

import importlib.metadata
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_modules import BENCHMARKS, importable
from PIL import Image

from entropy_attn.diffusers import EntropyRecord, enable

PAPER = BENCHMARKS / "paper"
LAYERS = ("down_blocks.5.1", "mid_block.1", "up_blocks.0.1", "up_blocks.1.1")  # of the tiny network, as they run
INSTALLED = all(importlib.util.find_spec(name) for name in ("terrain_diffusion", "onnx"))


@pytest.fixture
def part(monkeypatch):
    """Imports modules of the benchmark by name, and removes them from sys.modules after the test."""
    with importable(monkeypatch, BENCHMARKS, PAPER) as module:
        yield module


def tiny_unet(part, sample_size=80):
    torch.manual_seed(0)
    return part("terrain.unet").TerrainUNet(sample_size, channels=(32, 32, 64), depth=1, attention_from=2).eval()


def tiny_pipeline(part, sample_size=80):
    pipeline = part("terrain.pipeline")
    pipe = pipeline.TerrainPipeline(tiny_unet(part, sample_size), pipeline.one_step())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(number):
    return torch.Generator().manual_seed(number)


def test_the_network_takes_any_multiple(part):
    unet = tiny_unet(part)
    for height, width in ((16, 16), (32, 20)):
        out = unet(torch.zeros(2, 1, height, width), torch.tensor(3.0), torch.tensor([0.0, 1.0]))
        assert out.shape == (2, 1, height, width)
        assert not torch.equal(out[0], out[1])  # by the difficulty


def test_the_library_scales_its_attention(part):
    pipe, record = tiny_pipeline(part), EntropyRecord()
    draw = lambda size: pipe([5, 80], *size, generator=[seeded(0), seeded(1)]).images  # noqa: E731
    sizes = ((80, 80), (64, 80))
    plain = [draw(size) for size in sizes]
    with enable(pipe, train_size=80, record_entropy=record, strict=True):
        scaled = [draw(size) for size in sizes]
    torch.testing.assert_close(scaled[0], plain[0])
    assert (scaled[1] - plain[1]).abs().max() > 1e-5
    rows = record.table(by=("run", "layer"))
    assert [row["layer"] for row in rows] == 2 * [f"unet.{layer}" for layer in LAYERS]
    assert {(row["tokens"], row["train_tokens"]) for row in rows} == {(20 * 20, 20 * 20), (16 * 20, 20 * 20)}
    expected = math.sqrt(math.log(16 * 20) / math.log(20 * 20))
    assert [row["multiplier"] for row in rows] == pytest.approx(4 * [1.0] + 4 * [expected])


def test_a_map_depends_on_its_seed_and_difficulty_only(part):
    pipe = tiny_pipeline(part)
    both = pipe([5, 80], generator=[seeded(0), seeded(1)]).images
    torch.testing.assert_close(pipe([80], generator=[seeded(1)]).images[0], both[1], rtol=0, atol=1e-5)
    assert both.shape == (2, 1, 80, 80)
    assert both.min() >= 0
    assert both.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"difficulties": [0]}, "from 1 to 100"),
        ({"difficulties": [101]}, "from 1 to 100"),
        ({"difficulties": []}, "from 1 to 100"),
        ({"difficulties": [1.5]}, "from 1 to 100"),
        ({"difficulties": [1], "height": 33}, "height must be a multiple of 4 pixels, got 33"),
        ({"difficulties": [1], "width": 0}, "width must be a multiple of 4 pixels, got 0"),
        ({"difficulties": [1], "generator": []}, "one for each of 1, got 0"),
    ],
)
def test_the_pipeline_refuses(part, arguments, said):
    with pytest.raises(ValueError, match=said):
        tiny_pipeline(part)(**arguments)


def images_of(heights):
    """Images (n, 1, H, W) of heights (n, H, W) in metres."""
    return (torch.asinh(heights.double() / 0.1) / math.asinh(22.16864013671875 / 0.1))[:, None]


def test_heights_are_those_of_the_package(part):
    heights = torch.rand(2, 8, 8, dtype=torch.float64) * 22
    torch.testing.assert_close(part("terrain.features").heights_of(images_of(heights)), heights)


def test_features_of_a_ramp_and_of_a_wave(part):
    features = part("terrain.features")
    ramp = 0.1 * torch.arange(64.0).expand(1, 64, 64)
    told = dict(zip(features.NAMES, features.features_of(images_of(ramp))[0].tolist(), strict=True))
    assert told["log variance"] == pytest.approx(math.log(0.01 * (64**2 - 1) / 12), abs=1e-3)
    assert told["skewness"] == pytest.approx(0, abs=1e-6)
    for lag in features.LAGS:  # the rows have a slope of 0.1, the columns of 0
        assert told[f"log mean square slope over {lag}"] == pytest.approx(math.log(0.005), abs=1e-3)
    for wavelength, band in ((3, "2 to 4"), (6, "4 to 8"), (12, "8 to 16"), (24, "16 to 32")):
        wave = 2 + torch.sin(2 * math.pi * torch.arange(96.0) / wavelength).expand(1, 64, 96)
        told = dict(zip(features.NAMES, features.features_of(images_of(wave))[0].tolist(), strict=True))
        powers = {name: value for name, value in told.items() if "power" in name}
        assert max(powers, key=powers.get) == f"log power of wavelengths {band}"


def test_features_depend_neither_on_the_size_nor_on_the_ground(part):
    features = part("terrain.features")
    noise = torch.randn(64, 192, 128, generator=seeded(0), dtype=torch.float64) + 8
    whole, crops = (features.features_of(images_of(x)).mean(0) for x in (noise, noise[:, :64, :64]))
    assert (whole - crops).abs().max() < 0.06
    raised = features.features_of(images_of(noise + 3)).mean(0)
    torch.testing.assert_close(raised, whole, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at least 64 pixels"):
        features.features_of(images_of(noise[:, :63]))


def test_crops_have_the_same_places_in_every_batch(part):
    features = part("terrain.features")
    images = torch.arange(3 * 20 * 30.0).reshape(3, 1, 20, 30)
    crops = features.random_crops(images, 8, 9)
    assert crops.shape == (3, 1, 8, 9)
    places = [divmod(int(crop[0, 0, 0]) % 600, 30) for crop in crops]
    assert len(set(places)) == 3
    for image, crop, (top, left) in zip(images, crops, places, strict=True):
        assert torch.equal(crop, image[:, top : top + 8, left : left + 9])
    assert torch.equal(features.random_crops(images[:2] + 1, 8, 9), crops[:2] + 1)


def test_the_reader_reads(part):
    features = part("terrain.features")
    given = torch.randn(400, 3, generator=seeded(0), dtype=torch.float64)
    wanted = 50 + 8 * given[:, 0] - 3 * given[:, 1].square()
    reader = features.Reader(given[:200], wanted[:200], penalty=1e-3)
    torch.testing.assert_close(reader.read(given[200:]), wanted[200:].clamp(1, 100), rtol=0, atol=0.01)
    assert reader.read(torch.tensor([[100.0, 0, 0]]).double()).item() == 100


def test_total_score(part):
    total = part("evaluation.judges").total_score
    assert total(torch.tensor([1.0, 2.0, 6.0])) == 3
    assert total(torch.tensor([[1.0, 5.0], [2.0, 5.0]])) == 0
    pairs = torch.tensor([[1.0, 3.0], [2.0, 1.0], [4.0, 2.0]])
    assert total(pairs) == pytest.approx(100 * np.corrcoef(pairs.T.numpy())[0, 1])


def test_sixteen_bits(part, tmp_path):
    folder = part("evaluation.images").ImageFolder(tmp_path, 16)
    image = torch.rand(1, 4, 5, generator=seeded(0))
    folder.save(3, image)
    torch.testing.assert_close(folder.load([3])[0], image, rtol=0, atol=0.51 / 65535)
    assert Image.open(folder.file(3)).mode == "I;16"


def test_the_difficulties_of_a_hundred_images_are_all(part):
    assert sorted(part("evaluation.terrain").difficulties(range(250, 350))) == list(range(1, 101))


def run(part, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper.py", "--model", "terrain", *map(str, arguments)])
    part("paper").main()


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, "adaptive-terrain-diffusion is missing: pip install 'entropy_attn[terrain]'"),
        ("0.5.0", "adaptive-terrain-diffusion must be 0.4.2, whose network is known, got 0.5.0"),
    ],
)
def test_what_is_missing_is_said(part, monkeypatch, capsys, tmp_path, installed, said):
    original = importlib.metadata.version

    def version(name):
        if name != "adaptive-terrain-diffusion":
            return original(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as stopped:
        run(part, monkeypatch, "--out", tmp_path)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_onnx_is_said(part, monkeypatch):
    weights = part("terrain.weights")
    monkeypatch.setattr(weights, "weights_file", lambda: Path("none"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"onnx is missing: pip install 'entropy_attn\[terrain\]'"):
        weights.load()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", 2], "--steps has no meaning for --model terrain"),
        (["--prompts", "x"], "--prompts has no meaning for --model terrain"),
        (["--sizes", "65x64"], "multiples of 4 pixels, got 65x64"),
        (["--sizes", "64x32"], "terrain is judged from 64 pixels on, got 64x32"),
    ],
)
def test_bad_input(part, monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.setattr(part("terrain.weights"), "load", lambda dtype: tiny_unet(part))
    with pytest.raises(SystemExit) as stopped:
        run(part, monkeypatch, *arguments, "--out", tmp_path)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run(part, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(part("terrain.weights"), "load", lambda dtype: tiny_unet(part))
    monkeypatch.setattr(part("evaluation.terrain").TerrainJudge, "natives", 40)
    monkeypatch.setattr(part("evaluation.run"), "RECORDED", 2)
    monkeypatch.setattr(part("evaluation.run"), "ROUNDS", 1)
    sizes = ("64x80", "80x80", "96x80")
    run(
        part, monkeypatch, "--num", 40, "--sizes", *sizes, "--scales", "paper", "calibrated", "matched",
        "--out", tmp_path,
    )  # fmt: skip
    assert "left out: matched, because terrain has one step only" in capsys.readouterr().err
    folder = tmp_path / "terrain"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("fid") == kinds.count("clip") == 3 + 1 + 3 + 5  # below the trained size resized, at it controls
    assert kinds.count("entropy") == 3 * 3
    for row in (row for row in rows if row["kind"] in ("fid", "clip")):
        assert row["images"] == 20
        assert math.isfinite(row["value"])
        assert ("floor" in row) == (row["kind"] == "fid" and row["rule"] == "original")
    assert len(list((folder / "native").glob("*.png"))) == 40
    assert Image.open(folder / "96x80" / "paper" / "000000.png").mode == "I;16"
    table = (folder / "results.md").read_text()
    assert "correlation of asked and read difficulty (%)" in table
    assert table.count("### What outputs of the trained size have, cropped to the size") == 1


def test_images_are_compared_with_crops_of_the_native_ones(part, tmp_path):
    terrain = part("evaluation.terrain")
    judge = terrain.TerrainJudge(terrain.terrain_subject(tiny_pipeline(part)), tmp_path, 10)
    judge.natives = 40
    assert [judge.crop(size) for size in ((64, 128), (80, 80), (192, 64))] == [(64, 80), (80, 80), (80, 64)]
    assert judge.reference((192, 192)).distance(judge.features(judge.native)) == pytest.approx(0, abs=1e-6)
    read = judge.scores(judge.native, judge.numbers)
    assert read.shape == (40, 2)
    assert torch.equal(read[:, 0], judge.asked)
    rough = judge.features((judge.native - 0.5) * 0.5 + 0.5)
    assert judge.reference((80, 80)).distance(rough) > judge.floor((80, 80), 20)["distance"]


def test_the_slopes_of_heads(part):
    heads = part("heads")
    subject = part("evaluation.terrain").terrain_subject(tiny_pipeline(part))
    rows = heads.rows_of(subject, (64, 80), 2, 2)
    assert [row["train_tokens"] for row in rows] == 4 * [20 * 20]
    for row in rows:  # with random weights attention is nearly uniform: the entropy is ln N
        assert row["entropy"] == pytest.approx(math.log(400), abs=0.2)
        assert row["slopes"] == pytest.approx([1.0, 1.0], abs=0.2)
    assert heads.table(rows).count("mid_block.1 | 400") == 1
    assert "| tiny | 400 | 8 | 8 | 0 | 0 |" in heads.summary({"tiny": rows})


def test_a_scale_on_each_group_of_layers(part, tmp_path):
    groups, terrain = part("terrain.groups"), part("evaluation.terrain")
    names = [f"unet.{layer}" for layer in LAYERS]
    rows = [
        {"layer": name, "train_tokens": 400, "entropy": entropy, "slopes": slopes}
        for name, entropy, slopes in zip(
            names, (5.9, 5.0, 5.0, 3.0), ([1, 1], [0.7, 1], [0.6, 0.8], [0, 0]), strict=True
        )
    ]
    found = groups.groups_of(rows)
    assert found == {"uniform": names[:1], "global": names[1:2], "local": names[2:]}
    judge = terrain.TerrainJudge(terrain.terrain_subject(tiny_pipeline(part)), tmp_path, 10)
    judge.natives = 40
    measured = groups.measure(judge, {**found, "none of them": []}, (64, 80), range(20))
    assert [(row["group"], row["layers"]) for row in measured] == [
        ("none", 0), ("uniform", 1), ("global", 1), ("local", 2), ("none of them", 0),
    ]  # fmt: skip
    changes = [row["change"] for row in measured[1:]]
    assert all(change != 0 for change in changes[:3])
    assert changes[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(not INSTALLED, reason="needs adaptive-terrain-diffusion and onnx")
def test_the_network_is_the_package_s(part):
    """The pipeline, with its scheduler and the weights of the package, is the graph that onnxruntime runs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pipeline, weights = part("terrain.pipeline"), part("terrain.weights")
    pipe = pipeline.TerrainPipeline(weights.load(), pipeline.one_step())
    pipe.set_progress_bar_config(disable=True)
    difficulties = [7, 90]
    noise = torch.cat([torch.randn(1, 1, 128, 128, generator=seeded(n)) for n in range(2)]) * 80
    session = onnxruntime.InferenceSession(str(weights.weights_file()), providers=["CPUExecutionProvider"])
    [wanted] = session.run(["denoised"], {
        "noisy": noise.numpy(), "sigma": np.full(2, 80, np.float32),
        "difficulty": (np.array(difficulties, np.float32) - 1) / 99,
    })  # fmt: skip
    drawn = pipe(difficulties, generator=[seeded(n) for n in range(2)]).images
    expected = (torch.from_numpy(wanted) + 1).clamp(0, 2) / 2
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert drawn.std() > 0.02
