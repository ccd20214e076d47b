"""λ reaches self-attention whatever else is done to the model: against stock runs with the query multiplied by hand."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers_support import (
    assert_close,
    assert_multiplied,
    enabled,
    expected_from,
    layers,
    predict,
    when,
)  # fmt: skip

import entropy_attn


@when
def test_fused_projections(pipe, when):
    expected = expected_from(lambda: predict(pipe.unet), pipe.unet)
    with enabled(pipe, pipe.fuse_qkv_projections, when, strict=True) as handle:
        fused = predict(pipe.unet)
        assert_multiplied(handle)
        pipe.unfuse_qkv_projections()
        unfused = predict(pipe.unet)
    assert_close(fused, expected)
    assert_close(unfused, expected)


def load_ip_adapter(unet):
    """An IP-Adapter of random weights, with 4 image tokens."""
    torch.manual_seed(0)
    width = unet.config.cross_attention_dim
    weights = {}
    for number, attn in enumerate(cross_attention(unet)):
        processor = IPAdapterAttnProcessor2_0(attn.to_q.in_features, width, num_tokens=(4,))
        weights |= {f"{2 * number + 1}.{key.replace('.0', '')}": w for key, w in processor.state_dict().items()}
    projection = diffusers.models.embeddings.ImageProjection(width, 32, num_image_text_embeds=4).state_dict()
    image_proj = {key.replace("image_embeds", "proj"): w for key, w in projection.items()}
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": weights}], low_cpu_mem_usage=False)


def cross_attention(unet):
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [unet.get_submodule(name) for name in names if name.endswith("attn2")]


def with_image(unet):
    return predict(unet, added_cond_kwargs={"image_embeds": [torch.ones(2, 1, 32)]})


@when
def test_ip_adapter(pipe, when):
    unet = pipe.unet
    without = expected_from(lambda: predict(unet), unet)
    load_ip_adapter(unet)
    expected = expected_from(lambda: with_image(unet), unet)
    assert not torch.allclose(expected, without, atol=1e-3)
    pipe.unload_ip_adapter()
    with enabled(pipe, lambda: load_ip_adapter(unet), when, strict=True) as handle:
        loaded = with_image(unet)
        assert_multiplied(handle)
        pipe.unload_ip_adapter()
        unloaded = predict(unet)
    assert_close(loaded, expected)
    assert_close(unloaded, without)


@pytest.mark.parametrize("applied", ["mid", "down"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_perturbed_attention_guidance(applied, guidance_scale):
    pipe = tiny.sd(cls=diffusers.StableDiffusionPAGPipeline, pag_applied_layers=applied)
    processors = dict(pipe.unet.attn_processors)

    def run():
        return tiny.call(pipe, 128, 128, guidance_scale=guidance_scale, pag_scale=3.0)

    expected, stock = expected_from(run, pipe.unet), run()
    assert not torch.allclose(stock, tiny.call(pipe, 128, 128, guidance_scale=guidance_scale, pag_scale=0.0), atol=1e-3)
    with entropy_attn.enable(pipe, strict=True) as handle:
        assert_close(run(), expected, atol=1e-4)
        assert_multiplied(handle)
    assert torch.equal(run(), stock)
    assert pipe.unet.attn_processors == processors


def add_lora(unet):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


@when
def test_lora(unet, when):
    without = predict(unet)
    with enabled(unet, lambda: add_lora(unet), when, strict=True) as handle:
        ours = predict(unet)
        assert_multiplied(handle)
    assert_close(ours, expected_from(lambda: predict(unet), unet))
    assert not torch.allclose(predict(unet), without, atol=1e-3)


def test_lora_taken_off_while_enabled(unet):
    expected = expected_from(lambda: predict(unet), unet)
    with entropy_attn.enable(unet):
        add_lora(unet)
        unet.delete_adapters("default")
        assert_close(predict(unet), expected)


def offload_groups(unet):
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def add_accelerate_hooks(unet):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (unet, *layers(unet)):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))


def offload_leaves(unet):
    pytest.importorskip("accelerate").cpu_offload(unet, execution_device="cpu")


@when
@pytest.mark.parametrize("offload", [offload_groups, add_accelerate_hooks, offload_leaves])
def test_offloading(offload, when, unet):
    expected = expected_from(lambda: predict(unet), unet)
    stock = predict(unet)
    with enabled(unet, lambda: offload(unet), when, strict=True) as handle:
        assert_close(predict(unet), expected)
        assert_multiplied(handle)
    assert torch.equal(predict(unet), stock)


@when
def test_model_offloading(when, pipe):
    pytest.importorskip("accelerate")

    def run():
        return tiny.call(pipe, 128, 128)

    expected = expected_from(run, pipe.unet)
    with enabled(pipe, lambda: pipe.enable_model_cpu_offload(device="cpu"), when, strict=True) as handle:
        assert_close(run(), expected, atol=1e-4)
        assert_multiplied(handle)


def test_accelerate_hooks_removed_while_enabled(unet):
    hooks = pytest.importorskip("accelerate.hooks")
    expected = expected_from(lambda: predict(unet), unet)
    add_accelerate_hooks(unet)
    with entropy_attn.enable(unet, strict=True):
        hooks.remove_hook_from_module(unet, recurse=True)
        assert_close(predict(unet), expected)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"guidance_scale": 7.5}, {"num_images_per_prompt": 2}])
def test_batches(options, pipe):
    def run():
        return tiny.call(pipe, 128, 128, **options)

    expected = expected_from(run, pipe.unet)
    with entropy_attn.enable(pipe, strict=True) as handle:
        assert_close(run(), expected, atol=1e-4)
        assert_multiplied(handle)


def test_images_of_a_batch_do_not_depend_on_one_another(pipe):
    with entropy_attn.enable(pipe):
        pair = tiny.call(pipe, 128, 128, num_images_per_prompt=2)
        alone = tiny.call(pipe, 128, 128)
    assert_close(pair[:1], alone, atol=1e-4)
