"""N, T and λ of every layer of every family, against what the untouched models are seen to attend to."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny

import entropy_attn

PAPER_SIZES = [
    (128, 128), (224, 224), (384, 384), (448, 448), (512, 512), (768, 768), (1024, 1024),
    (512, 288), (512, 384), (256, 144), (520, 520),
]  # fmt: skip
UNETS = {"sd15": 512, "sd21": 768, "ldm": 256, "sdxl": 1024}
TRANSFORMERS = ["sd3", "flux", "pixart_sigma", "hunyuan", "lumina2"]


class Calls(list):
    """What SDPA was called with, in its place. It attends to nothing: no query depends on others, any size is cheap."""

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        self.append((query.shape[2], key.shape[2], query.double().norm().item()))
        return value.new_zeros((*query.shape[:3], value.shape[3]))


@pytest.fixture
def calls(monkeypatch):
    recorded = Calls()
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return recorded


@pytest.fixture(scope="module")
def pipeline():
    built = {}

    def build(name):
        if name not in built:
            built[name] = tiny.PIPELINES[name]()
        return built[name]

    return build


def denoise(pipe, height, width):
    """One call of a UNet, as its pipeline makes it at that size in pixels."""
    extra = {}
    if pipe.unet.config.addition_embed_type == "text_time":
        extra = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 32), "time_ids": torch.zeros(2, 6)}}
    sample, text = torch.zeros(2, 4, height // 8, width // 8), torch.zeros(2, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        pipe.unet(sample, 500, encoder_hidden_states=text, **extra)


def self_attention(calls, run):
    """(N, norm of the query) of each self-attention of a run, in order; no level has the 77 tokens of the text."""
    calls.clear()
    run()
    return [(keys, norm) for queries, keys, norm in calls if queries == keys]


@pytest.mark.parametrize("name", UNETS)
def test_unet_layers_are_those_seen_at_both_sizes(name, pipeline, calls):
    pipe, trained = pipeline(name), UNETS[name]
    at_trained_size = self_attention(calls, lambda: denoise(pipe, trained, trained))
    for height, width in PAPER_SIZES:
        seen = self_attention(calls, lambda height=height, width=width: denoise(pipe, height, width))
        with entropy_attn.enable(pipe, strict=True) as handle:
            scaled = self_attention(calls, lambda height=height, width=width: denoise(pipe, height, width))
        expected = [multiplier(N, T) for (N, _), (T, _) in zip(seen, at_trained_size, strict=True)]
        rows = handle.layers()
        assert [row["tokens"] for row in rows] == [N for N, _ in seen]
        assert [row["train_tokens"] for row in rows] == [T for T, _ in at_trained_size]
        assert [row["multiplier"] for row in rows] == pytest.approx(expected, rel=1e-12)
        ratios = [a / b for (_, a), (_, b) in zip(scaled, seen, strict=True)]
        assert ratios == pytest.approx(expected, rel=1e-5)


def multiplier(N, T):
    return 1.0 if N == T or min(N, T) < 2 else math.sqrt(math.log(N, T))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("sd15", (224, 224), {(784, 4096): 0.8951, (196, 1024): 0.8726, (49, 256): 0.8378, (16, 64): 0.8165}),
        ("sd15", (512, 288), {(2304, 4096): 0.9648, (576, 1024): 0.9576, (144, 256): 0.9467, (40, 64): 0.9418}),
        ("sd15", (520, 520), {(4225, 4096): 1.0019, (1089, 1024): 1.0044, (289, 256): 1.0109, (81, 64): 1.0279}),
        ("ldm", (224, 224), {(784, 1024): 0.9805, (196, 256): 0.9756, (49, 64): 0.9674, (16, 16): 1.0}),
        ("ldm", (256, 144), {(576, 1024): 0.9576, (144, 256): 0.9467, (40, 64): 0.9418, (12, 16): 0.9467}),
        ("sdxl", (512, 512), {(1024, 4096): 0.9129, (256, 1024): 0.8944}),
        ("sd21", (224, 224), {(784, 9216): 0.8544, (196, 2304): 0.8257, (49, 576): 0.7825, (16, 144): 0.7469}),
    ],
)
def test_multipliers_of_the_papers_models(name, size, expected, pipeline, calls):
    with entropy_attn.enable(pipeline(name)) as handle:
        denoise(pipeline(name), *size)
    rows = handle.layers()
    assert {(row["tokens"], row["train_tokens"]): round(row["multiplier"], 4) for row in rows} == expected


@pytest.mark.parametrize(("name", "layers"), [("sd15", 16), ("sd21", 16), ("ldm", 16), ("sdxl", 70), ("controlnet", 6)])
def test_every_self_attention_is_found_and_nothing_else(name, layers, pipeline):
    with entropy_attn.enable(pipeline(name)) as handle:
        names = [row["layer"] for row in handle.layers()]
    assert len(names) == layers
    assert all(n.endswith(".attn1") for n in names)
    assert f"skipped: {layers} of cross-attention" in str(handle)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("size", [(128, 128), (224, 224), (512, 288), (512, 384), (768, 768), (1024, 1024)])
def test_transformer_layers_count_all_keys(name, size, pipeline, calls):
    """Joint attention: N is the keys, T the image's tokens at the trained size and the same text."""
    pipe = pipeline(name)
    image, trained_image = (size[0] // 16) * (size[1] // 16), (1024 // 16) ** 2
    tiny.call(pipe, *size, steps=1)
    stock = list(calls)
    calls.clear()
    with entropy_attn.enable(pipe, strict=True) as handle:
        tiny.call(pipe, *size, steps=1)
    for row in handle.layers():
        text = row["tokens"] - image
        assert text in texts(name, row["layer"])
        assert row["train_tokens"] == trained_image + text
        assert row["multiplier"] == pytest.approx(multiplier(image + text, trained_image + text), rel=1e-12)
    ratios = {round(a / b, 4) for (_, _, a), (_, _, b) in zip(calls, stock, strict=True)}
    assert ratios == {1.0} | {round(row["multiplier"], 4) for row in handle.layers()}


def texts(name, layer):
    """The text tokens that a layer attends to beside the image."""
    joint = {"sd3": 109, "flux": 32, "lumina2": 16}.get(name, 0)  # 77 of CLIP and 32 of T5; T5; given
    return {0} if layer.endswith(("attn1", "attn2")) or "noise_refiner" in layer else {joint}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_image_counts_the_image_alone(name, pipeline, calls):
    with entropy_attn.enable(pipeline(name), joint="image") as handle:
        tiny.call(pipeline(name), 512, 512, steps=1)
    assert {(row["tokens"], row["train_tokens"]) for row in handle.layers()} == {(1024, 4096)}


def test_sd35_image_only_attention_is_scaled_too(pipeline, calls):
    with entropy_attn.enable(pipeline("sd3")) as handle:
        tiny.call(pipeline("sd3"), 512, 512, steps=1)
    tokens = {row["layer"]: (row["tokens"], row["train_tokens"]) for row in handle.layers()}
    assert tokens["transformer.transformer_blocks.0.attn2"] == (1024, 4096)
    assert tokens["transformer.transformer_blocks.0.attn"] == (1133, 4205)


def test_lumina_is_not_scaled_twice(pipeline):
    pipe = pipeline("lumina")
    stock, unscaled = tiny.call(pipe, 256, 256), tiny.call(pipe, 256, 256, proportional_attn=False)
    with entropy_attn.enable(pipe) as handle:
        assert torch.equal(tiny.call(pipe, 256, 256), stock)
        assert "scaled by the model itself" in str(handle)
        ours = tiny.call(pipe, 256, 256, proportional_attn=False)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(unscaled, stock, atol=1e-5)


def test_lumina2_text_is_left_alone(pipeline):
    with entropy_attn.enable(pipeline("lumina2")) as handle:
        assert not any("context_refiner" in row["layer"] for row in handle.layers())
    assert "skipped: 1 of not over an image" in str(handle)


@pytest.mark.parametrize("size", [8, 24, 64])
def test_qwen_image(size, calls):
    model = tiny.qwen_transformer()
    with entropy_attn.enable(model) as handle, torch.no_grad():
        model(
            hidden_states=torch.zeros(1, size * size, 16), encoder_hidden_states=torch.zeros(1, 7, 16),
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.long), timestep=torch.tensor([0.5]),
            img_shapes=[[(1, size, size)]],
        )  # fmt: skip
    rows = handle.layers()
    assert {(row["tokens"], row["train_tokens"]) for row in rows} == {(size * size + 7, 4096 + 7)}
    assert [row["multiplier"] for row in rows] == pytest.approx([multiplier(size * size + 7, 4103)] * 2)


def test_wan_is_opt_in(calls):
    model = tiny.wan_transformer()
    with pytest.raises(ValueError, match=r"makes videos.*train_size=\(frames, height, width\)"):
        entropy_attn.enable(model)
    with entropy_attn.enable(model, train_size=(21, 60, 104)) as handle, torch.no_grad():
        model(torch.zeros(1, 16, 3, 16, 16), torch.tensor([500]), torch.zeros(1, 9, 32))
    assert {(row["tokens"], row["train_tokens"]) for row in handle.layers()} == {(3 * 8 * 8, 21 * 30 * 52)}
    assert "skipped: 2 of cross-attention" in str(handle)


def test_wan_in_pixels(calls):
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.UniPCMultistepScheduler(),
        transformer=tiny.wan_transformer(),
    )  # fmt: skip
    with entropy_attn.enable(pipe, train_size=(9, 256, 384)) as handle, torch.no_grad():
        pipe.transformer(torch.zeros(1, 16, 3, 32, 48), torch.tensor([500]), torch.zeros(1, 9, 32))
    assert {(row["tokens"], row["multiplier"]) for row in handle.layers()} == {(3 * 16 * 24, 1.0)}


def test_sana_has_nothing_to_scale():
    with pytest.raises(ValueError, match=r"SanaTransformer2DModel has no softmax self-attention.*linear attention"):
        entropy_attn.enable(tiny.sana_transformer())


def test_controlnet_is_scaled_with_its_unet(pipeline, calls):
    with entropy_attn.enable(pipeline("controlnet")) as handle:
        tiny.call(pipeline("controlnet"), 256, 256, steps=1)
    rows = handle.layers()
    assert {row["layer"].split(".")[0] for row in rows} == {"unet", "controlnet"}
    assert {(row["tokens"], row["train_tokens"]) for row in rows} == {(256, 1024)}


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_undone_bit_for_bit(name, pipeline):
    pipe = pipeline(name)
    stock = tiny.call(pipe, 128, 192)
    with entropy_attn.enable(pipe):
        enabled = tiny.call(pipe, 128, 192)
    assert torch.equal(tiny.call(pipe, 128, 192), stock)
    assert torch.equal(enabled, stock) == (name == "lumina")


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_nothing_changes_at_the_trained_size(name, pipeline):
    """The trained size is taken for 128 x 192, which is quicker than the real one."""
    pipe = pipeline(name)
    options = {"proportional_attn": False} if name == "lumina" else {}
    stock = tiny.call(pipe, 128, 192, **options)
    with entropy_attn.enable(pipe, train_size=(128, 192), strict=True) as handle:
        assert torch.equal(tiny.call(pipe, 128, 192, **options), stock)
    assert {row["multiplier"] for row in handle.layers()} == {1.0}
