"""Diffusers pipelines with random weights and few channels, built offline.

`sd15`, `sd21`, `ldm` and `sdxl` have the depth and the blocks of the released models. Their layer names, levels and
numbers of tokens are those of the released models.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

diffusers.utils.logging.set_verbosity_error()
VOCABULARY = 1000
PROMPT = "a red fox"


def tokenizer(length=77):
    """A byte-level tokenizer that replaces those of CLIP, T5 and BERT."""
    names = ["<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]  # CLIP pools at the highest id
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def clip(projection=False):
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=32, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return _seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def t5(width=32):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return _seeded(T5EncoderModel, config)


def bert():
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
    )
    return _seeded(BertModel, config)


def vae(levels=4, latent_channels=4, **options):
    """A VAE that halves the image levels - 1 times. Its middle block has one attention layer, of head dim 8."""
    return _seeded(
        AutoencoderKL, sample_size=32, block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels, **options,
    )  # fmt: skip


def flow_vae(latent_channels=4):
    return vae(latent_channels=latent_channels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def ddim():
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def unet(sample_size=64, depth="real", **options):
    """The UNet of SD 1.5 and LDM. ``depth="two levels"`` builds a quick one, with attention at half the latent size."""
    real = depth == "real"
    arguments = {
        "sample_size": sample_size, "cross_attention_dim": 32, "norm_num_groups": 2, "attention_head_dim": 2,
        "block_out_channels": (8, 16, 16, 16) if real else (8, 16), "layers_per_block": 2 if real else 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) if real
        else ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3 if real
        else ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return _seeded(UNet2DConditionModel, **{**arguments, **options})


def sd(unet_model=None, cls=None, **components):
    """A Stable Diffusion 1.5 pipeline, with the quick UNet by default."""
    return _quiet(
        (cls or diffusers.StableDiffusionPipeline)(
            vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), scheduler=ddim(), safety_checker=None,
            unet=unet(64, "two levels") if unet_model is None else unet_model,
            feature_extractor=None, requires_safety_checker=False, **components,
        )
    )  # fmt: skip


def sd15():
    return sd(unet())


def sd21():
    """Stable Diffusion 2.1 for 768 pixels: linear projections, and a number of heads for each level."""
    return sd(unet(96, attention_head_dim=(1, 2, 4, 4), use_linear_projection=True, upcast_attention=True))


def ldm():
    return _quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=vae(), bert=clip(), tokenizer=tokenizer(), unet=unet(32), scheduler=ddim()
        )
    )


def unet_sdxl():
    """The UNet of SDXL: no attention at the first level, 2 and 10 transformer layers at the others."""
    return unet(
        128, block_out_channels=(8, 16, 32), attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )  # fmt: skip


def sdxl():
    return _quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip(), text_encoder_2=clip(projection=True), tokenizer=tokenizer(),
            tokenizer_2=tokenizer(), unet=unet_sdxl(), scheduler=ddim(), add_watermarker=False,
        )
    )  # fmt: skip


def sd_controlnet():
    model = unet(64, "two levels")
    return sd(
        model, diffusers.StableDiffusionControlNetPipeline,
        controlnet=_seeded(diffusers.ControlNetModel.from_unet, model, conditioning_channels=3),
    )  # fmt: skip


def sd3(dual=(0,), qk_norm="rms_norm"):
    """SD 3.5 medium: QK norm, and a second, image-only self-attention (attn2) in the layers `dual`."""
    transformer = _seeded(
        diffusers.SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64,
        pooled_projection_dim=64, pos_embed_max_size=96, qk_norm=qk_norm, dual_attention_layers=tuple(dual),
    )  # fmt: skip
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=flow_vae(),
            text_encoder=clip(projection=True), tokenizer=tokenizer(), text_encoder_2=clip(projection=True),
            tokenizer_2=tokenizer(), text_encoder_3=t5(64), tokenizer_3=tokenizer(),
        )
    )  # fmt: skip


def flux_transformer(num_layers=1, num_single_layers=2):
    return _seeded(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=16, num_layers=num_layers,
        num_single_layers=num_single_layers, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=False,
    )  # fmt: skip


def flux():
    return _quiet(
        diffusers.FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), transformer=flux_transformer(), vae=flow_vae(),
            text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(64),
        )
    )  # fmt: skip


def pixart_sigma():
    transformer = _seeded(
        diffusers.PixArtTransformer2DModel, sample_size=128, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
    )  # fmt: skip
    return _quiet(
        diffusers.PixArtSigmaPipeline(
            tokenizer=tokenizer(64), text_encoder=t5(), vae=vae(), transformer=transformer, scheduler=ddim()
        )
    )


def hunyuan():
    transformer = _seeded(
        diffusers.HunyuanDiT2DModel, sample_size=128, num_layers=4, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32,
        pooled_projection_dim=4, hidden_size=16, activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )  # fmt: skip
    return _quiet(
        diffusers.HunyuanDiTPipeline(
            vae=vae(), text_encoder=bert(), tokenizer=tokenizer(77), text_encoder_2=t5(), tokenizer_2=tokenizer(256),
            transformer=transformer, scheduler=diffusers.DDPMScheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )
    )  # fmt: skip


def lumina():
    """Lumina-Next. Its pipeline applies the paper's rule itself unless called with proportional_attn=False."""
    transformer = _seeded(
        diffusers.LuminaNextDiT2DModel, sample_size=128, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5,
        learn_sigma=True, qk_norm=True, cross_attention_dim=32, scaling_factor=1.0,
    )  # fmt: skip
    return _quiet(
        diffusers.LuminaPipeline(
            transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=t5(),
            tokenizer=tokenizer(64),
        )
    )  # fmt: skip


def lumina2():
    """Lumina 2 without a text encoder: `call` passes embeddings."""
    transformer = _seeded(
        diffusers.Lumina2Transformer2DModel, sample_size=128, patch_size=2, in_channels=4, hidden_size=16,
        num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 512, 512), cap_feat_dim=8,
    )  # fmt: skip
    return _quiet(
        diffusers.Lumina2Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=flow_vae(), text_encoder=None,
            tokenizer=tokenizer(64),
        )
    )  # fmt: skip


def qwen_transformer():
    return _seeded(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def wan_transformer():
    return _seeded(
        diffusers.WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=16, out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def sana_transformer():
    """Sana. Its self-attention is linear and has no softmax scale."""
    return _seeded(
        diffusers.SanaTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=8, sample_size=32,
    )  # fmt: skip


PIPELINES = {
    "sd15": sd15, "sd21": sd21, "ldm": ldm, "sdxl": sdxl, "controlnet": sd_controlnet, "sd3": sd3, "flux": flux,
    "pixart_sigma": pixart_sigma, "lumina": lumina, "lumina2": lumina2, "hunyuan": hunyuan,
}  # fmt: skip


def call(pipe, height=None, width=None, steps=2, seed=0, **options):
    """The latents of a short run, or the image with another output_type. Each pipeline gets the arguments it needs."""
    arguments = {
        "prompt": PROMPT, "height": height, "width": width, "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed), "output_type": "latent",
    }  # fmt: skip
    kind = type(pipe).__name__
    if kind == "LDMTextToImagePipeline":
        arguments["output_type"] = "np"
    elif kind in ("FluxPipeline", "StableDiffusion3Pipeline"):
        arguments["max_sequence_length"] = 32
    elif kind == "PixArtSigmaPipeline":
        arguments.update(use_resolution_binning=False, clean_caption=False, max_sequence_length=32)
    elif kind == "HunyuanDiTPipeline":
        arguments.update(use_resolution_binning=False)
    elif kind == "LuminaPipeline":
        arguments.update(clean_caption=False, max_sequence_length=32)
    elif kind == "Lumina2Pipeline":
        del arguments["prompt"]
        embeds = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(1, 16, dtype=torch.bool)
        arguments.update(
            prompt_embeds=embeds, negative_prompt_embeds=embeds * 0, prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask, max_sequence_length=16,
        )  # fmt: skip
    elif kind == "StableDiffusionControlNetPipeline":
        size = (1, 3, height or 512, width or 512)
        arguments["image"] = torch.rand(size, generator=torch.Generator().manual_seed(2))
    image = pipe(**{**arguments, **options})[0]
    return torch.as_tensor(image) if not isinstance(image, torch.Tensor) else image


def _seeded(build, *arguments, **options):
    torch.manual_seed(0)
    return build(*arguments, **options).eval()


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
