"""Exponents, bounds, steps, overrides, calibration and entropy matching."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines as tiny

import entropy_attn
from entropy_attn.diffusers import Calibration, EntropyRecord, calibrate, calibration_from
from entropy_attn.entropy import Moment, Tokens
from entropy_attn.entropy.rule import Matcher, Rule

PAPER = math.sqrt(math.log(64) / math.log(1024))


def multipliers(pipe, size=128, steps=1, **options):
    with entropy_attn.enable(pipe, **options) as handle:
        tiny.call(pipe, size, size, steps=steps)
    return {row["layer"]: row["multiplier"] for row in handle.layers()}


def peaked(pipe=None):
    """A pipeline whose attention is not as near to uniform as random weights make it, but in some layers more so."""
    pipe = pipe or tiny.sd()
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn1")]
    for factor, name in zip((2.0, 3.0, 2.5, 2.2), names, strict=True):
        attn = pipe.unet.get_submodule(name)
        attn.to_q.weight.data *= factor
        attn.to_k.weight.data *= factor
    return pipe


@pytest.mark.parametrize("exponent", [0, 0.25, 0.5, 1, 4])
def test_exponent(exponent):
    assert list(multipliers(tiny.sd(), exponent=exponent).values()) == pytest.approx([PAPER ** (2 * exponent)] * 4)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (128, {"min_multiplier": 0.9}, 0.9),
        (128, {"min_multiplier": 0.5}, PAPER),
        (128, {"max_multiplier": 1.0}, PAPER),
        (1024, {"max_multiplier": 1.02}, 1.02),
        (1024, {"min_multiplier": 1.0, "max_multiplier": 1.0}, 1.0),
        (512, {"min_multiplier": 0.9, "max_multiplier": 1.1}, 1.0),
    ],
)
def test_bounds(size, options, expected):
    assert list(multipliers(tiny.sd(), size, **options).values()) == pytest.approx([expected] * 4)


@pytest.mark.parametrize(("steps", "inside"), [((1, 3), [1, 2]), ((2, None), [2, 3]), ((0, 1), [0])])
def test_steps(steps, inside):
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, steps=steps, record_entropy=True) as handle:
        tiny.call(pipe, 128, 128, steps=4)
        tiny.call(pipe, 128, 128, steps=4)
    for row in handle.entropy.table(by=("run", "step")):
        assert row["multiplier"] == pytest.approx(PAPER if row["step"] in inside else 1.0)


def test_overrides_by_name():
    found = multipliers(
        tiny.sd(),
        exponent=1,
        overrides={"*": {"exponent": 0.5}, "unet.down_blocks.*": 1.0, "*mid_block*": {"exponent": 2}},
    )
    for name, multiplier in found.items():
        expected = 1.0 if "down_blocks" in name else PAPER**4 if "mid_block" in name else PAPER
        assert multiplier == pytest.approx(expected)


def test_an_override_of_steps_alone():
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, record_entropy=True, overrides={"*mid*": {"steps": (1, 2)}}) as handle:
        tiny.call(pipe, 128, 128, steps=2)
    for row in handle.entropy.table(by=("step", "layer")):
        off = "mid_block" in row["layer"] and row["step"] == 0
        assert row["multiplier"] == pytest.approx(1.0 if off else PAPER)


@pytest.mark.parametrize(
    ("N", "T", "H", "expected"),
    [
        (4096, 4096, 5.0, 1.0),
        (1024, 4096, 0.0, math.sqrt(math.log(1024, 4096))),
        (1024, 4096, 6.0, math.sqrt((math.log(1024) - 6) / (math.log(4096) - 6))),
        (8192, 4096, 7.0, math.sqrt((math.log(8192) - 7) / (math.log(4096) - 7))),
        (256, 4096, 6.0, 0.5),  # ln 256 < 6: out of reach, so the lower bound
        (16384, 4096, 8.3, 2.0),  # nearly uniform when trained: the upper bound
        (1024, 4096, 8.4, 1.0),  # beyond uniform: nothing to correct
        (1, 16, 0.0, 1.0),
        (16, 1, 0.0, 1.0),
    ],
)
def test_the_closed_form(N, T, H, expected):
    assert Rule(train_entropy=H).multiplier_for(Tokens(N, T)) == pytest.approx(expected)


@pytest.fixture(scope="module")
def calibrated():
    pipe = peaked()
    return pipe, calibrate(
        pipe, ["a cat", "a dog"], train_size=256, num_inference_steps=3, output_type="latent", progress=False
    )


def test_calibration_measures_the_trained_size(calibrated):
    pipe, calibration = calibrated
    (model,) = calibration.models
    with entropy_attn.enable(pipe, train_size=256, record_entropy=True) as handle:
        for prompt in ("a cat", "a dog"):
            pipe(prompt, height=256, width=256, num_inference_steps=3, output_type="latent",
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    rows = handle.entropy.table(by=("layer",))
    assert {row["tokens"] for row in rows} == {256}
    assert {f"unet.{name}": h for name, h in model.entropy.items()} == pytest.approx(
        {row["layer"]: row["entropy"] for row in rows},
        rel=0.05,  # other noise
    )
    assert model.train_grid == (32, 32)


def test_calibration_is_saved_and_loaded(calibrated, tmp_path):
    pipe, calibration = calibrated
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json", pipe) == calibration
    for given in (calibration, tmp_path / "calibration.json", str(tmp_path / "calibration.json")):
        found = multipliers(pipe, 384, train_size=256, calibration=given)
        for name, multiplier in found.items():
            H = calibration.models[0].entropy[name.removeprefix("unet.")]
            assert multiplier == pytest.approx(min(2.0, math.sqrt((math.log(576) - H) / (math.log(256) - H))))


def test_calibration_of_another_model(calibrated, tmp_path):
    _, calibration = calibrated
    calibration.save(tmp_path / "calibration.json")
    weights, config = tiny.sd(), peaked(tiny.sd(tiny.unet(32, "two levels", attention_head_dim=4)))
    weights.unet.conv_in.weight.data *= 1.5
    for other, reason in [
        (tiny.flux(), "it is of a UNet2DConditionModel"),
        (config, "with another config"),
        (weights, "with other weights"),
    ]:
        with pytest.raises(ValueError, match=f"calibration is not of this .*{reason}"):
            Calibration.load(tmp_path / "calibration.json", other)
        with pytest.raises(ValueError, match=f"calibration is not of this .*{reason}"):
            entropy_attn.enable(other, train_size=256, calibration=tmp_path / "calibration.json")


def test_calibration_holds_in_half_precision(calibrated):
    _, calibration = calibrated
    half = peaked()
    half.unet.to(torch.float16)
    assert calibration.of(half.unet) == calibration.models[0]


def test_calibration_at_another_trained_size(calibrated):
    pipe, calibration = calibrated
    with pytest.raises(ValueError, match=r"made at a latent of \(32, 32\).*pass the same train_size"):
        entropy_attn.enable(pipe, calibration=calibration)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "other"}', '{"format": "entropy_attn.calibration/1"}', "\x00"]
)
def test_a_file_that_is_no_calibration(text, tmp_path):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken.json is not a calibration"):
        Calibration.load(tmp_path / "broken.json")


def test_calibration_without_a_layer(calibrated, tmp_path):
    pipe, calibration = calibrated
    calibration.save(tmp_path / "calibration.json")
    content = json.loads((tmp_path / "calibration.json").read_text())
    content["models"][0]["entropy"].popitem()
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="calibration has no entropy for layer"):
        entropy_attn.enable(pipe, train_size=256, calibration=tmp_path / "calibration.json")


def test_calibration_of_a_bare_model():
    model, record = tiny.qwen_transformer(), EntropyRecord()
    with entropy_attn.enable(model, train_size=(16, 16), record_entropy=record), torch.no_grad():
        model(
            hidden_states=torch.randn(1, 64, 16), encoder_hidden_states=torch.randn(1, 7, 16),
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.long), timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 8, 8)]],
        )  # fmt: skip
    calibration = calibration_from(model, record, train_size=(16, 16))
    assert set(calibration.models[0].entropy) == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    with pytest.raises(ValueError, match="no layer at its trained size"):
        calibration_from(model, EntropyRecord())
    with pytest.raises(TypeError, match="calibrate takes a pipeline"):
        calibrate(model)


def measured(pipe, known, size, steps=8, **options):
    """By layer: the entropy of the last steps, and the calibrated one."""
    with entropy_attn.enable(pipe, train_size=256, record_entropy=True, **options) as handle:
        tiny.call(pipe, size, size, steps=steps)
    rows = [row for row in handle.entropy.table(by=("step", "layer")) if row["step"] >= steps // 2]
    names = list(known.models[0].entropy)
    found = [np.mean([r["entropy"] for r in rows if r["layer"] == f"unet.{name}"]) for name in names]
    return np.array(found), np.array([known.models[0].entropy[name] for name in names])


@pytest.mark.parametrize("size", [192, 384])
def test_each_refinement_comes_nearer_to_the_trained_entropy(size, calibrated):
    pipe, calibration = calibrated
    errors = []
    for options in (
        {"exponent": 0},
        {},
        {"calibration": calibration},
        {"calibration": calibration, "match_entropy": True},
    ):
        found, wanted = measured(pipe, calibration, size, **options)
        reachable = wanted < math.log((size // 16) ** 2) - 0.05
        assert reachable.sum() >= 2
        errors.append(np.abs(found - wanted)[reachable].mean())
    plain, paper, closed, matched = errors
    assert plain > paper > closed > matched
    assert matched < 0.1 * plain


def test_matching_is_deterministic_and_bounded(calibrated):
    pipe, calibration = calibrated
    options = {"train_size": 256, "calibration": calibration, "match_entropy": True}
    runs = []
    for _ in range(2):
        with entropy_attn.enable(pipe, record_entropy=True, min_multiplier=0.9, **options) as handle:
            runs.append(tiny.call(pipe, 128, 128, steps=4))
        assert all(0.8999 <= row["multiplier"] <= 2.0 for row in handle.entropy.table(by=("step", "layer")))
    assert torch.equal(*runs)
    stock = tiny.call(pipe, 256, 256)
    with entropy_attn.enable(pipe, **options):
        torch.testing.assert_close(tiny.call(pipe, 256, 256), stock, atol=1e-4, rtol=1e-4)


def test_a_layer_that_had_one_token_has_nothing_to_match():
    """The middle of this UNet has a single token at 64 x 64, whose entropy is 0."""
    pipe = tiny.sd15()
    with entropy_attn.enable(pipe, train_size=64, record_entropy=True, exponent=0) as handle:
        tiny.call(pipe, 64, 64, steps=1)
    record = handle.entropy
    calibration = calibration_from(pipe, record, train_size=64)
    assert abs(calibration.models[0].entropy["mid_block.attentions.0.transformer_blocks.0.attn1"]) < 1e-6
    calibration.models[0].entropy["mid_block.attentions.0.transformer_blocks.0.attn1"] = 0.0  # but for rounding
    with entropy_attn.enable(
        pipe, train_size=64, calibration=calibration, match_entropy=True, record_entropy=True
    ) as handle:
        tiny.call(pipe, 128, 128, steps=3)
    multipliers = {row["layer"]: row["multiplier"] for row in handle.entropy.table(by=("step", "layer"))}
    assert multipliers["unet.mid_block.attentions.0.transformer_blocks.0.attn1"] == 1.0
    assert sum(m != 1.0 for m in multipliers.values()) >= 10


def test_the_matcher_finds_the_multiplier_of_a_row():
    """Logits of a normal distribution: Eq. 5 holds but roughly, and the steps still lead to H_T."""
    logits = torch.randn(1, 1, 64, 4096, generator=torch.Generator().manual_seed(0)) * 1.5

    def entropy(multiplier):
        log_weights = (logits * multiplier).log_softmax(-1)
        return -(log_weights.exp() * log_weights).sum(-1)

    matcher = Matcher(Rule(train_entropy=6.0, match_entropy=True))
    for step in range(8):
        multiplier = matcher.multiplier_for(Moment(0, step, 0), Tokens(4096, 1024))
        matcher.observe(Moment(0, step, 0), entropy(multiplier))
    assert float(entropy(multiplier).mean()) == pytest.approx(6.0, abs=1e-3)
    again = matcher.multiplier_for(Moment(1, 0, 0), Tokens(4096, 1024))
    assert again == Rule(train_entropy=6.0).multiplier_for(Tokens(4096, 1024))


def test_matching_stays_at_the_bound_out_of_reach():
    matcher = Matcher(Rule(train_entropy=6.0, match_entropy=True))
    for step in range(3):
        assert matcher.multiplier_for(Moment(0, step, 0), Tokens(256, 4096)) == 0.5
        matcher.observe(Moment(0, step, 0), torch.full((1, 1, 256), 5.0))
