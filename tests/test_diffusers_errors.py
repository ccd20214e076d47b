"""What `enable` refuses, and what it says then."""

import importlib.metadata
import sys

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers import StableDiffusionPipeline

import entropy_attn
from entropy_attn.diffusers import check_version


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_size": 500}, ValueError, "train_size must be in pixels, a multiple of 8.*got 500"),
        ({"train_size": (512, 500)}, ValueError, "multiple of 8"),
        ({"train_size": 0}, ValueError, "train_size must be an int or .height, width., of positive numbers, got 0"),
        ({"train_size": -512}, ValueError, "positive"),
        ({"train_size": (512, 512, 512)}, ValueError, "train_size must be an int or .height, width."),
        ({"train_size": (512,)}, ValueError, "train_size must be an int or .height, width."),
        ({"train_size": 8}, ValueError, "train_size must give at least 2 tokens, got 1"),
        ({"train_size": 512.0}, TypeError, "train_size must be an int or .height, width., got 512.0"),
        ({"train_size": "512"}, TypeError, "train_size must be"),
        ({"train_size": True}, TypeError, "train_size must be"),
        ({"joint": "text"}, ValueError, "joint must be 'keys' or 'image', got 'text'"),
        ({"strict": 1}, TypeError, "strict must be a bool, got int"),
        ({"record_entropy": "yes"}, TypeError, "record_entropy must be a bool or an EntropyRecord, got str"),
        ({"exponent": -1}, ValueError, "exponent must be a finite number, at least 0, got -1"),
        ({"exponent": float("nan")}, ValueError, "exponent must be a finite number"),
        ({"exponent": "half"}, TypeError, "exponent must be a number, got str"),
        ({"min_multiplier": 1.5}, ValueError, "min_multiplier must be at most 1"),
        ({"max_multiplier": 0.5}, ValueError, "max_multiplier must be at least 1"),
        ({"max_multiplier": float("inf")}, ValueError, "max_multiplier must be a finite number"),
        ({"steps": 5}, TypeError, "steps must be a pair"),
        ({"steps": (3, 3)}, ValueError, "0 <= first < stop"),
        ({"steps": (-1, 3)}, ValueError, "0 <= first < stop"),
        ({"steps": (0.0, 3)}, TypeError, "steps must be a pair of ints"),
        (
            {"overrides": {"*attn7*": 1.0}},
            ValueError,
            r"overrides\['\*attn7\*'\] matches no layer; one is named unet.down",
        ),
        ({"overrides": {"*": {"scale": 1.0}}}, ValueError, "unknown options 'scale'; allowed are exponent, "),
        ({"overrides": {"*": "off"}}, TypeError, "multiplier must be a number, got str"),
        ({"overrides": ["*"]}, TypeError, "overrides must map patterns"),
        ({"overrides": {"*": {"match_entropy": True}}}, ValueError, "match_entropy needs a train_entropy"),
        ({"calibration": "nowhere.json"}, FileNotFoundError, "nowhere.json"),
        ({"calibration": 5.0}, TypeError, "calibration must be a Calibration or a path, got float"),
        ({"match_entropy": True}, ValueError, "match_entropy needs a calibration"),
        ({"match_entropy": 1, "calibration": None}, TypeError, "match_entropy must be a bool"),
        ({"resolution": 512}, TypeError, "resolution"),
    ],
)
def test_bad_options(options, error, message, pipe):
    with pytest.raises(error, match=message):
        entropy_attn.enable(pipe, **options)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_a_failed_enable_leaves_the_last_one(pipe):
    with entropy_attn.enable(pipe) as handle:
        with pytest.raises(ValueError, match="joint"):
            entropy_attn.enable(pipe, joint="text")
        assert handle.enabled
        tiny.call(pipe, 128, 128, steps=1)
        assert all(row["multiplier"] < 1 for row in handle.layers())


def test_a_pipeline_without_a_denoiser(pipe):
    captioner = type("Captioner", (), {"components": {"text_encoder": pipe.text_encoder}})
    with pytest.raises(ValueError, match=r"Captioner has no denoiser: .*unet, transformer.*pass the model itself"):
        entropy_attn.enable(captioner())
    without = StableDiffusionPipeline(**{**pipe.components, "unet": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no denoiser"):
        entropy_attn.enable(without)


@pytest.mark.parametrize("thing", [None, 3, "stabilityai/sdxl", object()])
def test_what_is_no_pipeline(thing):
    with pytest.raises(TypeError, match="pipe_or_model must be a Diffusers pipeline or a model"):
        entropy_attn.enable(thing)


def test_models_that_are_no_denoisers(pipe):
    with pytest.raises(ValueError, match="AutoencoderKL is not a denoiser that is known"):
        entropy_attn.enable(pipe.vae)
    for model in (pipe.text_encoder, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no softmax self-attention to scale"):
            entropy_attn.enable(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Kandinsky5Transformer3DModel", "modules without to_q or to_qkv"),
        ("SanaVideoTransformer3DModel", "cross-attention, linear attention, which has no softmax"),
    ],
)
def test_video_models_without_softmax_self_attention(name, reason):
    """The error names what they have, and does not ask for a train_size."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this Diffusers has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"{name} has no softmax self-attention to scale, only {reason}"):
        entropy_attn.enable(model)


def test_a_unet_without_attention():
    unet = tiny.unet(
        32, "two levels", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel has no softmax self-attention to scale, only"):
        entropy_attn.enable(unet)


def test_a_unet_without_a_size():
    unet = tiny.unet(32, "two levels")
    unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="has no sample_size in its config: pass train_size, in latent samples"):
        entropy_attn.enable(unet)
    with entropy_attn.enable(unet, train_size=32) as handle, torch.no_grad():
        unet(torch.zeros(1, 4, 16, 16), 1, encoder_hidden_states=torch.zeros(1, 7, 32))
    assert {row["train_tokens"] for row in handle.layers()} == {256}


@pytest.mark.parametrize(
    ("build", "size", "message"),
    [
        (tiny.sd3, 8 * 2 * 97, "beyond its 96 x 96 positions"),
        (tiny.sd3, 520, "does not divide into its patches"),
        (tiny.pixart_sigma, 1000, "does not divide into its patches"),
    ],
)
def test_a_trained_size_that_contradicts_the_model(build, size, message):
    with pytest.raises(ValueError, match=f"train_size contradicts .*{message}"):
        entropy_attn.enable(build(), train_size=size)


def test_reference_tokens_are_not_taken_for_the_image():
    pipeline = type("FluxKontextPipeline", (), {"components": tiny.flux().components})
    with pytest.raises(ValueError, match="FluxKontextPipeline puts the tokens of reference images beside"):
        entropy_attn.enable(pipeline())


def test_calibrating_what_is_enabled(pipe):
    with entropy_attn.enable(pipe), pytest.raises(ValueError, match="not enabled: disable it first"):
        entropy_attn.calibrate(pipe)
    for prompts in ([], [3]):
        with pytest.raises(ValueError, match="prompts must be one or more strings"):
            entropy_attn.calibrate(pipe, prompts)


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.42.1", True), ("0.43.0.dev0", True), ("1.0.0", True), ("0.30.3", False)]
)
def test_versions_of_diffusers(installed, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    if fits:
        check_version()
    else:
        with pytest.raises(ImportError, match=f"needs Diffusers .* or newer, {installed} is installed: pip install"):
            check_version()


def test_without_diffusers(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for name in [name for name in sys.modules if name.startswith("entropy_attn.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs Diffusers: pip install 'entropy_attn\[diffusers\]'"):
        entropy_attn.enable(None)
