"""MultiDiffusion for the embedded pipelines."""

import pytest
import tiny_pipelines
import torch
from benchmark_modules import BENCHMARKS, importable


@pytest.fixture
def evaluation(monkeypatch):
    """Imports modules of the benchmark by name."""
    with importable(monkeypatch, BENCHMARKS, BENCHMARKS / "paper") as module:
        yield module


@pytest.fixture
def glyphs(evaluation):
    return evaluation("evaluation.subjects").glyphs(num_inference_steps=2)


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [(24, 12, [0]), (16, 12, [0]), (36, 12, [0, 12]), (40, 12, [0, 12, 16]), (28, 24, [0, 4])],
)
def test_windows_cover_a_side(evaluation, length, stride, expected):
    found = evaluation("multidiffusion").starts(length, 24, stride)
    assert found == expected
    covered = {place for start in found for place in range(start, min(start + 24, length))}
    assert covered == set(range(length))


def test_a_prediction_is_the_mean_over_the_windows(evaluation):
    """The denoiser's prediction is its window's mean, so that every window gives another one."""

    class Mean(torch.nn.Module):
        config = type("Config", (), {"sample_size": 4})

        def forward(self, sample, timestep):
            return type("Output", (), {"sample": sample.mean((-2, -1), keepdim=True).expand_as(sample) + timestep})

    sample = torch.arange(12.0).reshape(1, 1, 2, 6).expand(1, 1, 2, 6)
    found = evaluation("multidiffusion").WindowedDenoiser(Mean(), 2)(sample, timestep=1).sample
    left, right = sample[..., :4].mean() + 1, sample[..., 2:].mean() + 1
    both = (left + right) / 2
    expected = torch.stack([left, left, both, both, right, right]).expand(1, 1, 2, 6)
    torch.testing.assert_close(found, expected)


def test_images(glyphs):
    """One window is the plain pipeline. Several are not, and begin to differ where they overlap."""
    windowed = glyphs.with_multidiffusion()
    for size in ((24, 24), (16, 24)):
        torch.testing.assert_close(windowed.draw(size, [0, 1], None), glyphs.draw(size, [0, 1], None))
    images = windowed.draw((36, 24), [0, 1], None)
    assert images.shape == (2, 1, 24, 36)
    assert (images - glyphs.draw((36, 24), [0, 1], None)).abs().max() > 0.01


@pytest.mark.parametrize("stride", [0, 13, 1.5])
def test_a_wrong_stride_is_named(evaluation, glyphs, stride):
    with pytest.raises(ValueError, match=f"stride must be an int from 1 to 12, got {stride}"):
        evaluation("multidiffusion").with_multidiffusion(glyphs.pipe, stride)


def test_another_pipeline_is_refused_where_it_is_asked_for(evaluation, capsys):
    subject = evaluation("evaluation.subjects").text_subject("ldm", tiny_pipelines.ldm(), ["a fox"], (64, 64))
    wanted = evaluation("paper").wanted
    with pytest.raises(ValueError, match="MultiDiffusion takes an embedded pipeline or a StableDiffusionPipeline"):
        wanted(subject, ["fid", "multidiffusion"])
    assert "multidiffusion" not in wanted(subject, ["all"])
    assert "left out: MultiDiffusion takes" in capsys.readouterr().err
