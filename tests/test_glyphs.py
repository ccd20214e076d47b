"""The embedded glyph pipeline: rendering, recognition, resumed training, and the pipeline under `enable`."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from benchmark_modules import BENCHMARKS, importable

from entropy_attn.diffusers import calibrate, enable

PAPER = BENCHMARKS / "paper"


@pytest.fixture
def glyphs(monkeypatch):
    with importable(monkeypatch, BENCHMARKS, PAPER):
        import glyphs.pipeline
        import glyphs.recogniser
        import glyphs.train
        import metrics
        import recognition
        import training

        yield argparse.Namespace(
            data=glyphs.data, designs=glyphs.designs, pipeline=glyphs.pipeline, recogniser=glyphs.recogniser,
            train=glyphs.train, training=training, metrics=metrics, recognition=recognition,
        )  # fmt: skip


def seeded(number):
    return torch.Generator().manual_seed(number)


def test_rendering_depends_on_the_seed_only(glyphs):
    first, again, other = (glyphs.data.render([3, 7], 24, 16, seeded(n)) for n in (0, 0, 1))
    assert first.shape == (2, 1, 24, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() == 0
    assert first.max() > 0.8


@pytest.mark.parametrize(("labels", "size"), [([10], 24), ([-1], 24), ([1], 7), ([1.5], 24)])
def test_rendering_refuses(glyphs, labels, size):
    with pytest.raises(ValueError, match="must be"):
        glyphs.data.render(labels, size, size, seeded(0))


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (36, 24)])
def test_the_recogniser_reads_what_is_rendered(glyphs, size):
    labels = torch.arange(300) % 10
    images = glyphs.data.render(labels, *size, seeded(123))
    features, read = glyphs.recognition.recognise(glyphs.recogniser.load(), images)
    assert features.shape == (300, glyphs.recognition.FEATURES)
    assert (read == labels).float().mean() > 0.99


def test_a_missing_recogniser_is_named(glyphs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recogniser\.py"):
        glyphs.recogniser.load(tmp_path / "nothing.safetensors")


def arguments_for(out, **changed):
    chosen = {
        "design": "plain",
        "steps": 4,
        "batch": 4,
        "images": 40,
        "rate": 1e-3,
        "seed": 5,
        "processes": 1,
        "dtype": "float32",
    }
    return argparse.Namespace(**(chosen | changed), out=out)


def train(glyphs, out, monkeypatch, stop_after=None, **changed):
    monkeypatch.setattr(glyphs.training, "SAVED_EVERY", 1)
    threads = torch.get_num_threads()
    arguments = arguments_for(out, **changed)
    task = glyphs.train.Glyphs(arguments.design, arguments.images, arguments.seed)
    task.prepare()
    try:
        for step, _ in glyphs.training.steps_of(task, arguments, 0):
            if step == stop_after:
                return
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_training_ends_at_the_same_weights(glyphs, tmp_path, monkeypatch):
    train(glyphs, tmp_path / "whole", monkeypatch)
    train(glyphs, tmp_path / "cut", monkeypatch, stop_after=2)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    train(glyphs, tmp_path / "cut", monkeypatch)
    whole, cut = (glyphs.pipeline.GlyphPipeline.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    torch.manual_seed(arguments_for(tmp_path).seed)
    weights = [
        torch.cat([x.detach().flatten() for x in unet.parameters()])
        for unet in (whole.unet, cut.unet, glyphs.train.Glyphs("plain", 1, 0).build().unet)
    ]
    # Adam's first steps follow the sign of each gradient. Rounding may change the sign of a gradient near 0.
    assert (weights[0] - weights[1]).norm() < 0.01 * (weights[0] - weights[2]).norm()


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(tmp_path):
    """The training is killed after its first checkpoint, and the same command resumes it."""
    command = [sys.executable, PAPER / "glyphs" / "train.py", "--steps", "205", "--batch", "2", "--images", "20"]
    command += ["--out", tmp_path, "--design", "levels"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = tmp_path / "checkpoint.pt"
    for _ in range(6000):
        if checkpoint.exists() or training.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    assert checkpoint.exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "model_index.json").exists()
    other = subprocess.run([*command, "--seed", "9"], capture_output=True, text=True, timeout=900, check=False)
    assert other.returncode == 2
    assert "other settings" in other.stderr


def test_a_training_does_not_go_on_with_other_settings(glyphs, tmp_path, monkeypatch):
    train(glyphs, tmp_path, monkeypatch, stop_after=1)
    with pytest.raises(ValueError, match="other settings"):
        train(glyphs, tmp_path, monkeypatch, batch=6)


@pytest.mark.parametrize("design", ["plain", "sharp", "levels", "transformer"])
def test_every_design_makes_a_pipeline(glyphs, design):
    from diffusers import DPMSolverMultistepScheduler

    unet, embedder = glyphs.designs.build(design), glyphs.pipeline.LabelEmbedder()
    pipe = glyphs.pipeline.GlyphPipeline(unet, embedder, DPMSolverMultistepScheduler(**glyphs.training.NOISE))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(labels=[1, 2], height=32, width=16, num_inference_steps=2, generator=seeded(0), output_type="pt")
    assert images.images.shape == (2, 1, 32, 16)
    assert 0 <= images.images.min() <= images.images.max() <= 1


def test_an_unknown_design_is_refused(glyphs):
    with pytest.raises(ValueError, match="plain"):
        glyphs.designs.build("nothing")


@pytest.fixture
def shipped(glyphs):
    pipe = glyphs.pipeline.GlyphPipeline.from_pretrained(PAPER / "glyphs" / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_pipeline_draws_digits(glyphs, shipped):
    labels = [number % 10 for number in range(40)]
    images = shipped(labels=labels, generator=seeded(0), output_type="pt").images
    _, read = glyphs.recognition.recognise(glyphs.recogniser.load(), images)
    assert (read == torch.tensor(labels)).float().mean() >= 0.9


def test_images_depend_on_their_own_generator_only(shipped):
    both = shipped(labels=[4, 5], num_inference_steps=3, generator=[seeded(1), seeded(2)], output_type="pt").images
    one = shipped(labels=[5], num_inference_steps=3, generator=[seeded(2)], output_type="pt").images
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=0)


def test_enabled_it_has_more_than_one_token_count(shipped):
    size = {"height": 32, "width": 16}
    call = {"labels": [3, 8], "num_inference_steps": 2, "output_type": "pt"}
    original = shipped(**call, **size, generator=seeded(0)).images
    trained = shipped(**call, generator=seeded(0)).images
    with enable(shipped, record_entropy=True) as handle:
        changed = shipped(**call, **size, generator=seeded(0)).images
        counts = {row["tokens"] for row in handle.entropy.table(by=("layer",))}
    with enable(shipped):
        same = shipped(**call, generator=seeded(0)).images
    assert len(counts) > 1
    assert not torch.equal(original, changed)
    assert torch.equal(trained, same)


def test_it_calibrates(shipped):
    calibration = calibrate(shipped, labels=[1, 2], num_inference_steps=2, progress=False)
    with enable(shipped, calibration=calibration, match_entropy=True):
        shipped(labels=[1, 2], height=32, width=32, num_inference_steps=3)


def test_it_is_saved_and_loaded(glyphs, shipped, tmp_path):
    shipped.save_pretrained(tmp_path)
    again = glyphs.pipeline.GlyphPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {"labels": [6], "num_inference_steps": 2, "output_type": "np"}
    images = [pipe(**call, generator=seeded(3)).images for pipe in (again, shipped)]
    assert abs(images[0] - images[1]).max() < 1e-4  # sums may round differently: the memory alignment differs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"labels": []}, "labels"), ({"labels": [10]}, "labels"), ({"labels": 3}, "labels"),
        ({"height": 25}, "height must be a multiple"), ({"width": -8}, "width must be a multiple"),
        ({"output_type": "latent"}, "output_type"), ({"labels": [True]}, "labels"), ({"height": 0}, "height"),
        ({"width": 24.0}, "width"), ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one"),
    ],
)  # fmt: skip
def test_the_pipeline_refuses(shipped, wrong, said):
    with pytest.raises(ValueError, match=said):
        shipped(**({"labels": [1]} | wrong))


def test_a_design_is_measured_and_compared(tmp_path):
    """Runs the commands that compare.py names, on the shipped weights."""

    def script(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = tmp_path / "levels"
    shutil.copytree(PAPER / "glyphs" / "model", folder)
    (folder / "training.json").write_text(json.dumps({"design": "levels", "steps": 5000, "batch": 48}))
    script(PAPER / "glyphs" / "attention.py", folder)
    rows = json.loads((folder / "attention.json").read_text())["rows"]
    assert [row["tokens"] for row in rows].count(144) == 3
    assert [row["tokens"] for row in rows].count(36) == 4
    assert all(0 < row["entropy"] < math.log(row["tokens"]) for row in rows)
    assert sum(row["half_variance"] for row in rows) / len(rows) > 1  # the attention is peaked, as designed
    script(
        PAPER / "paper.py", "--what", "fid", "clip", "--num", 40, "--steps", 1, "--sizes", "16x16", "24x24",
        "--scales", "paper", "--folder", folder, "--out", folder,
    )  # fmt: skip
    lines = script(PAPER / "glyphs" / "compare.py", folder).splitlines()
    assert sum(line.startswith("| levels, 5000 x 48 | 2.76 | 3 x 144, 4 x 36 |") for line in lines) == 1
    [small] = [line for line in lines if line.startswith("| levels, 5000 x 48 | 16 x 16 |")]
    assert [len(cell.split(" / ")) for cell in small.strip("|").split("|")[2:4]] == [2, 2]


def test_frechet_distance_of_known_normals(glyphs):
    x = torch.randn(20000, 3, generator=seeded(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly mean 0 and covariance 1
    reference = glyphs.metrics.Reference(x)
    distance = reference.distance(x * torch.tensor([1.0, 2.0, 3.0]) + 4)
    assert distance == pytest.approx(3 * 16 + 0 + 1 + 4, rel=1e-9)
    assert reference.distance(x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="features"):
        reference.distance(x[:1])
    with pytest.raises(ValueError, match="reference must"):
        glyphs.metrics.Reference(x[0])


def test_bootstrap_covers_the_mean(glyphs):
    covered = 0
    for seed in range(100):
        sample = torch.randn(100, generator=seeded(seed))
        low, high = glyphs.metrics.bootstrap(lambda i, x=sample: x[i].mean().item(), 100, 200, seed)
        covered += low <= 0 <= high
    assert 85 <= covered <= 100
