"""Models and pipelines of Diffusers that are harder to tell: what is found in them, and what is said of the others."""

import warnings

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers_support import MULTIPLIER, assert_close, assert_multiplied, expected_from, layers, predict, run

import entropy_attn


def test_the_keys_of_another_size_are_an_error_if_strict(unet):
    """As token merging leaves them."""
    attn = layers(unet)[1]
    hook = attn.register_forward_pre_hook(lambda module, args: (args[0][:, ::3], *args[1:]))
    tail = attn.register_forward_hook(lambda module, args, out: out.repeat_interleave(3, 1)[:, :64])
    attn._forward_pre_hooks.move_to_end(hook.id, last=False)
    stock = predict(unet)
    with (
        entropy_attn.enable(unet) as handle,
        pytest.warns(RuntimeWarning, match="22 keys do not fit the model's input 16 x 16"),
    ):
        assert (predict(unet) - stock).abs().max() > 1e-4
    assert [row["multiplier"] for row in handle.layers()].count(1.0) == 1
    with entropy_attn.enable(unet, strict=True), pytest.raises(RuntimeError, match="22 keys do not fit"):
        predict(unet)
    hook.remove(), tail.remove()


def test_a_layer_by_itself_is_not_scaled(unet):
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layers(unet)[0](x)
        with entropy_attn.enable(unet, exponent=4.0, attention="fused"):
            predict(unet)
            assert torch.equal(layers(unet)[0](x), expected)


def test_recording_beside_the_model_is_bit_for_bit(pipe):
    with entropy_attn.enable(pipe):
        plain = run(pipe)
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        run(pipe)
    expected = handle.entropy.table()
    with entropy_attn.enable(pipe, record_entropy=True, attention="model", strict=True) as handle:
        assert torch.equal(run(pipe), plain)
    for row, wanted in zip(handle.entropy.table(), expected, strict=True):
        assert row == wanted | {"entropy": pytest.approx(wanted["entropy"], abs=1e-5)}
    with entropy_attn.enable(pipe, record_entropy=True, attention="model", train_size=128):
        recorded = run(pipe)
    assert torch.equal(recorded, run(pipe))


def test_our_attention_everywhere(pipe):
    with entropy_attn.enable(pipe) as handle:
        plain = run(pipe)
    with entropy_attn.enable(pipe, attention="fused", strict=True) as handle:
        assert_close(run(pipe), plain, atol=1e-4)
    assert not [remark for row in handle.layers() for remark in row["remarks"]]
    pipe.unet.set_default_attn_processor()
    with (
        entropy_attn.enable(pipe, attention="fused"),
        pytest.warns(RuntimeWarning, match="the model's own attention was"),
    ):
        assert_close(run(pipe), plain, atol=1e-4)


@pytest.mark.parametrize("attention", ["auto", "fused"])
def test_a_learned_mask_keeps_its_gradient(attention, unet):
    """With everything else frozen, only the mask says that a gradient is wanted."""
    unet.requires_grad_(False)
    bias = torch.zeros(1, 1, 64, requires_grad=True)

    class Biased(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            mask = bias.expand(len(hidden_states), -1, -1)
            kwargs["attention_mask"] = mask.repeat_interleave(attn.heads, 0)
            return super().__call__(attn, hidden_states, **kwargs)

    for attn in layers(unet):
        attn.set_processor(Biased())
    weights = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    def gradient():
        (result,) = torch.autograd.grad((predict(unet, grad=True) * weights).sum(), bias)
        return result

    expected = expected_from(gradient, unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with entropy_attn.enable(unet, attention=attention, record_entropy=True):
            assert_close(gradient(), expected, atol=1e-5 + 1e-4 * expected.abs().max().item())


def test_lora_and_fused_projections_come_and_go(unet):
    peft = pytest.importorskip("peft")
    plain = expected_from(lambda: predict(unet), unet)

    def load():
        torch.manual_seed(0)
        unet.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))

    load()
    with_lora = expected_from(lambda: predict(unet), unet)
    unet.delete_adapters("default")
    with entropy_attn.enable(unet, strict=True):
        for _ in range(2):
            assert_close(predict(unet), plain)
            load()
            assert_close(predict(unet), with_lora)
            unet.delete_adapters("default")
        unet.fuse_qkv_projections()
        assert_close(predict(unet), plain)
        unet.unfuse_qkv_projections()
        assert_close(predict(unet), plain)
    hooks = [hook for module in unet.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks


def test_with_blocks_within_each_other(pipe):
    stock = run(pipe)
    with entropy_attn.enable(pipe) as outer:
        plain = run(pipe)
        with entropy_attn.enable(pipe, exponent=2.0) as inner:
            assert (run(pipe) - plain).abs().max() > 1e-4
            assert not outer.enabled
        assert outer.enabled
        assert not inner.enabled
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), stock)


def test_enabling_a_part_leaves_the_rest_enabled():
    pipe = tiny.sd_controlnet()
    with entropy_attn.enable(pipe) as whole:
        entropy_attn.enable(pipe.unet, train_size=16)
        run(pipe)
        rows = {row["layer"]: row["multiplier"] for row in whole.layers()}
        assert whole.enabled
        assert {name.split(".")[0] for name, multiplier in rows.items() if multiplier} == {"controlnet"}
        entropy_attn.disable(pipe)
        assert not whole.enabled


def test_disabled_after_its_model_was_exchanged(pipe):
    old = pipe.unet
    stock = predict(old)
    handle = entropy_attn.enable(pipe)
    pipe.unet = tiny.unet(64, "two levels")
    entropy_attn.disable(pipe)
    assert not handle.enabled
    assert torch.equal(predict(old), stock)


def test_what_a_handle_says_of_itself(pipe):
    handle = entropy_attn.enable(pipe)
    assert repr(handle) == "<entropy_attn handle on StableDiffusionPipeline, enabled: 4 layers>"
    handle.disable()
    assert repr(handle) == "<entropy_attn handle on StableDiffusionPipeline, disabled: 4 layers>"


def test_models_in_wrappers(unet):
    with pytest.raises(ValueError, match=r"DataParallel is not a denoiser: pass the model in it, its .module"):
        entropy_attn.enable(torch.nn.DataParallel(unet))


def test_several_controlnets_by_themselves():
    net = diffusers.ControlNetModel.from_unet(tiny.unet(64, "two levels"), conditioning_channels=3)
    nets = diffusers.MultiControlNetModel([net, diffusers.ControlNetModel.from_unet(tiny.unet(64, "two levels"))])
    with entropy_attn.enable(nets, train_size=64) as handle:
        assert {row["layer"].split(".")[0] for row in handle.layers()} == {"0", "1"}


def test_a_controlnet_that_is_not_known(pipe):
    """Such as come with other pipelines: the rest is enabled, and it is said."""

    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = diffusers.models.attention_processor.Attention(8, heads=2, dim_head=4)

        def forward(self, picture):
            return picture

    both = type("Both", (), {"components": {"unet": pipe.unet, "controlnet": Strange()}, "vae_scale_factor": 8})()
    with pytest.warns(RuntimeWarning, match="controlnet is left at its trained scale: Strange is not a denoiser"):
        handle = entropy_attn.enable(both)
    assert "skipped: 1 of controlnet, which is not known" in str(handle)
    with pytest.raises(ValueError, match="Strange is not a denoiser that is known"):
        entropy_attn.enable(both, strict=True)
    handle.disable()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Diffusers' own call
def test_flux_controlnet():
    net = diffusers.FluxControlNetModel.from_transformer(
        tiny.flux_transformer(), num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2
    )
    with entropy_attn.enable(net, strict=True) as handle, torch.no_grad():
        net(
            hidden_states=torch.randn(1, 64, 16), controlnet_cond=torch.randn(1, 64, 16), timestep=torch.tensor([0.5]),
            encoder_hidden_states=torch.randn(1, 7, 32), pooled_projections=torch.randn(1, 32),
            img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(7, 3),
        )  # fmt: skip
    assert {(row["tokens"], row["train_tokens"]) for row in handle.layers()} == {(71, 4103)}


def test_added_keys_of_the_text():
    """Kandinsky 2.2 and DeepFloyd IF: the image attends to itself and to the text."""
    unet = tiny.unet(
        32, "two levels", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with entropy_attn.enable(unet, strict=True) as handle, torch.no_grad():
        unet(torch.randn(1, 4, 16, 16), 500, encoder_hidden_states=text)
    assert {(row["tokens"], row["train_tokens"]) for row in handle.layers()} <= {(71, 263), (263, 1031)}
    assert handle.layers()


@pytest.mark.parametrize(
    "name", ["AnyFlowTransformer3DModel", "MiniMaxH3Transformer3DModel", "WanAnimate2Transformer3DModel"]
)
def test_models_whose_tokens_are_not_known(name):
    kind = type(name, (type(tiny.wan_transformer()),), {})
    model = tiny.wan_transformer()
    model.__class__ = kind
    with pytest.raises(ValueError, match=f"{name} is not supported: it is not known how its tokens come"):
        entropy_attn.enable(model, train_size=(21, 60, 104))


def test_layered_images_are_not_taken_for_one():
    pipeline = type("QwenImageLayeredPipeline", (), {"components": {"transformer": tiny.qwen_transformer()}})
    with pytest.raises(ValueError, match="QwenImageLayeredPipeline puts the tokens of reference images beside"):
        entropy_attn.enable(pipeline())


def test_nothing_is_read_from_the_device(unet):
    """A meta tensor cannot be read: λ alone needs no synchronisation."""
    unet.to("meta")
    with entropy_attn.enable(unet, strict=True) as handle, torch.no_grad():
        unet(torch.empty(1, 4, 16, 16, device="meta"), 500, encoder_hidden_states=torch.empty(1, 7, 32, device="meta"))
    assert_multiplied(handle)
    assert MULTIPLIER < 1
