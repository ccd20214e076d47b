"""The entropy record against entropies of attention maps that were held in memory, and what is made of it."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import tiny_pipelines as tiny

import entropy_attn
from entropy_attn.diffusers import EntropyRecord
from entropy_attn.diffusers.steps import Clock
from entropy_attn.entropy import Moment, Tokens
from entropy_attn.entropy.plots import Run, fit


@pytest.fixture
def maps(monkeypatch):
    """The mean entropy (halves, heads) of every self-attention that PyTorch's SDPA computes."""
    noted, sdpa = [], F.scaled_dot_product_attention

    def noting(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.shape[2] == key.shape[2] and attn_mask is None and not is_causal and query.shape[2] != 77:
            scores = query.double() @ key.double().mT * (query.shape[3] ** -0.5 if scale is None else scale)
            log_weights = scores.log_softmax(-1)
            noted.append(-(log_weights.exp() * log_weights).sum(-1).mean(-1).float())
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return noted


def latents(pipe, **options):
    return tiny.call(pipe, 128, 128, **options)


def test_it_is_the_entropy_of_the_maps(maps):
    pipe = tiny.sd()
    latents(pipe)
    expected = torch.stack(maps[:8])  # 2 steps x 4 layers; the middle of the VAE is not run for latents
    with entropy_attn.enable(pipe, record_entropy=True, exponent=0) as handle:
        latents(pipe)
    rows = handle.entropy.table(by=("step", "layer", "half", "head"))
    recorded = torch.tensor([row["entropy"] for row in rows]).view(expected.shape)
    torch.testing.assert_close(recorded, expected, atol=2e-5, rtol=0)
    assert {row["tokens"] for row in rows} == {64}
    assert {row["multiplier"] for row in rows} == {1.0}


def test_it_is_that_of_the_scaled_softmax(maps):
    pipe = tiny.sd()
    with entropy_attn.enable(pipe):
        latents(pipe)  # without a record, λ goes to PyTorch's SDPA on the CPU
    expected = torch.stack(maps[:8]).mean((1, 2))
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        latents(pipe)
    rows = handle.entropy.table(by=("step", "layer"))
    torch.testing.assert_close(torch.tensor([r["entropy"] for r in rows]), expected, atol=2e-5, rtol=0)
    assert {round(row["multiplier"], 6) for row in rows} == {round(math.sqrt(math.log(64, 1024)), 6)}


def test_recording_does_not_change_the_image():
    pipe = tiny.sd()
    with entropy_attn.enable(pipe):
        plain = latents(pipe)
    with entropy_attn.enable(pipe, record_entropy=True):
        torch.testing.assert_close(latents(pipe), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [tiny.sd, tiny.ldm, tiny.sd_controlnet])
def test_rows_of_a_run(build):
    pipe = build()
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        latents(pipe, steps=3, guidance_scale=5.0)
        latents(pipe, steps=2, guidance_scale=5.0)
    rows = handle.entropy.table(by=("run", "step", "half"))
    assert [(r["run"], r["step"], r["half"]) for r in rows] == [
        (run, step, half) for run, steps in ((0, 3), (1, 2)) for step in range(steps) for half in (0, 1)
    ]
    assert len(handle.entropy) == 2
    assert all(0 < r["entropy"] <= math.log(1024) for r in rows)
    layers = [row["layer"] for row in handle.entropy.table(by=("layer",))]
    assert sorted(layers) == sorted(row["layer"] for row in handle.layers())


def test_calls_of_one_step_are_its_halves():
    """Lumina 2 calls its transformer once for each prediction."""
    pipe = tiny.lumina2()
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        tiny.call(pipe, 128, 128, steps=2)
    rows = handle.entropy.table(by=("step", "half"))
    assert [(row["step"], row["half"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_guided_and_an_unguided_half_differ():
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        latents(pipe, guidance_scale=7.5)
        guided = [row["entropy"] for row in handle.entropy.table(by=("half",))]
        handle.entropy.clear()
        assert len(handle.entropy) == 0
        latents(pipe, guidance_scale=1.0)
        single = [row["half"] for row in handle.entropy.table(by=("half",))]
    assert guided[0] != guided[1]
    assert single == [0]


def test_memory_does_not_grow_with_the_image():
    def numbers(size):
        with entropy_attn.enable(pipe, record_entropy=True) as handle:
            tiny.call(pipe, size, size)
        return sum(mean.total.numel() for mean in handle.entropy._means.values())

    pipe = tiny.sd()
    assert numbers(128) == numbers(256) == 2 * 4 * 2 * 2  # steps, layers, halves, heads


def test_repeated_calls_of_a_step_are_averaged():
    record = EntropyRecord()
    session, clock = record.open_session("λ"), Clock()
    moment = clock.tick("unet", 900.0, torch.zeros(1))
    session.add("layer", moment, Tokens(9), torch.full((1, 2, 9), 1.0))
    session.add("layer", moment, Tokens(9), torch.full((1, 2, 9), 4.0))
    session.add("layer", moment, Tokens(9), torch.full((1, 2, 9), 4.0))
    (row,) = record.table()
    assert row["entropy"] == pytest.approx(3.0)
    assert row["tokens"] == 9
    assert row["train_tokens"] is None


def test_one_record_for_several_settings(tmp_path):
    pipe, record = tiny.sd(), EntropyRecord()
    for exponent in (0, 0.5, 2):
        with entropy_attn.enable(pipe, record_entropy=record, exponent=exponent):
            for size in (96, 128, 192):
                tiny.call(pipe, size, size, steps=1)
    table = record.table(by=("run", "label"))
    assert [row["label"] for row in table] == ["trained scale"] * 3 + ["λ"] * 3 + ["λ, exponent 2"] * 3
    assert [row["tokens"] for row in table] == [36, 64, 144] * 3
    plain, scaled, more = (np.array([row["entropy"] for row in table[i : i + 3]]) for i in (0, 3, 6))
    assert (plain < scaled).all()
    assert (scaled < more).all()  # all the sizes are below the trained one

    text = str(table)
    assert text.splitlines()[0].split() == ["run", "label", "tokens", "train_tokens", "multiplier", "entropy"]
    assert f"{table[0]['entropy']:.4f}" in text

    path = tmp_path / "entropy.json"
    written = record.to_json(path)
    content = json.loads(path.read_text())
    assert json.loads(written) == content
    assert content["unit"] == "nats"
    by_run = [np.mean([e["entropy"] for e in content["entries"] if e["run"] == run]) for run in range(9)]
    assert by_run == pytest.approx([row["entropy"] for row in table], rel=1e-6)
    assert set(content["entries"][0]) == {
        "run", "label", "layer", "step", "half", "head", "tokens", "train_tokens", "multiplier", "entropy",
    }  # fmt: skip

    figure = record.plot(tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")
    by_tokens, by_layer, by_head = figure.axes
    assert "ln N" in by_tokens.get_xlabel()
    assert any("R²" in text.get_text() for text in by_tokens.get_legend().get_texts())
    assert by_layer.get_xlabel() == "layer"
    assert len(by_head.get_lines()[0].get_xdata()) == 4 * 2  # layers x heads
    lines = [line for line in by_layer.get_lines() if len(line.get_xdata()) == 4]
    first = record.table(by=("run", "layer"))[:4]
    assert any(np.allclose(line.get_ydata(), [row["entropy"] for row in first]) for line in lines)


def test_fit_of_a_line():
    runs = [
        Run("λ", [N, N // 4], [256, 64], [0.9 * math.log(N) + 0.1, 0.9 * math.log(N // 4) + 0.1]) for N in (64, 256)
    ]
    line = fit(runs)
    assert line.slope == pytest.approx(0.9)
    assert line.intercept == pytest.approx(0.1)
    assert line.r_squared == pytest.approx(1.0)
    assert fit(runs[:1]) is None


@pytest.mark.parametrize("timesteps", [(900, 600, 300), (0.1, 0.4, 0.9)])
def test_clock_without_a_pipeline(timesteps):
    clock = Clock()
    moments = [clock.tick("", t, torch.zeros(1)) for t in (*timesteps, *timesteps)]
    assert [(m.run, m.step, m.turn) for m in moments] == [(run, step, 0) for run in (0, 1) for step in (0, 1, 2)]
    assert clock.tick("", timesteps[-1], torch.zeros(1))[1:] == (2, 1)


def test_clock_knows_a_new_schedule():
    """Runs of one step cannot be told apart by their timesteps."""
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        for _ in range(3):
            latents(pipe, steps=1)
    assert [(r["run"], r["step"]) for r in handle.entropy.table(by=("run", "step"))] == [(0, 0), (1, 0), (2, 0)]


def test_bad_arguments():
    record = EntropyRecord()
    assert str(record.table()) == "no entropy recorded"
    with pytest.raises(ValueError, match="by must be of run, label, layer, step, half, head, got colour"):
        record.table(by=("layer", "colour"))
    with pytest.raises(TypeError, match="by must be"):
        record.table(by="layer")
    with pytest.raises(ValueError, match=r"entropy must be \(B, H, Nq\), got shape \(2, 9\)"):
        record.open_session("λ").add("layer", Moment(), Tokens(9), torch.ones(2, 9))
    with pytest.raises(ValueError, match="nothing to plot"):
        record.plot()
