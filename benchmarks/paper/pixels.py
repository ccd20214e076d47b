"""What the embedded pipelines share: diffusion of pixels, without a VAE, in small squares of them, and their UNet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

Generators = torch.Generator | list[torch.Generator] | None


class SizedPipeline(DiffusionPipeline):
    """A pipeline without a VAE. A subclass sets `multiple` and `train_size`, in pixels."""

    multiple: int
    train_size: int

    def size_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width, by default the trained ones. Raises ValueError unless they are multiples of `multiple`."""
        sizes = {"height": height, "width": width}
        for name, size in sizes.items():
            if size is not None and (type(size) is not int or size <= 0 or size % self.multiple):
                raise ValueError(f"{name} must be a multiple of {self.multiple} pixels, got {size!r}")
        height, width = (self.train_size if size is None else size for size in sizes.values())
        return height, width


class PixelPipeline(SizedPipeline):
    """Draws images with `COLOURS` channels from embedded conditions.

    A pixel of the denoiser has the P x P pixels of a square of the image as its channels.
    """

    COLOURS = 3

    def __init__(self, unet, embedder, scheduler):
        super().__init__()
        self.register_modules(unet=unet, embedder=embedder, scheduler=scheduler)
        # Diffusers' name for the pixels of the image along an edge of a pixel of the denoiser. There is no VAE here.
        self.vae_scale_factor = patch_of(unet, self.COLOURS)
        halvings = max(len(unet.config.get("block_out_channels", ())) - 1, 0)
        self.multiple = self.vae_scale_factor * 2**halvings
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def train_size(self) -> int:
        """Height and width in training, in pixels."""
        return self.unet.config.sample_size * self.vae_scale_factor

    def sample(
        self,
        conditions: torch.Tensor,
        empty: torch.Tensor,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Generators,
        output_type: str,
    ) -> ImagePipelineOutput:
        """Draw an image for each of the embedder's inputs `conditions` (B, ...); `empty`, of that shape, are none.

        Raises:
            ValueError: invalid steps, number of generators or output type.
        """
        count = len(conditions)
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an int of at least 1, got {num_inference_steps!r}")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator must be one, or one for each of {count} images, got {len(generator)}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        device = self._execution_device
        samples = randn_tensor((count, self.COLOURS, height, width), generator, device, self.unet.dtype)
        guided = guidance_scale != 1.0
        embeddings = self.embedder((torch.cat([conditions, empty]) if guided else conditions).to(device))
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        samples = samples * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([samples, samples]) if guided else samples
            inputs = self.scheduler.scale_model_input(inputs, t)
            predicted = denoise(self.unet, inputs, t.expand(len(inputs)), embeddings)
            if guided:
                with_condition, without = predicted.chunk(2)
                predicted = without + guidance_scale * (with_condition - without)
            samples = self.scheduler.step(predicted, t, samples, return_dict=False)[0]
        images = self.image_processor.postprocess(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)


def patch_of(unet, colours: int) -> int:
    """P, where a pixel of the denoiser has the P x P pixels of a square of the image as its channels."""
    return round((unet.config.in_channels / colours) ** 0.5)


def denoise(unet, samples: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The prediction (B, C, H, W) of the denoiser, a UNet or a transformer, for noisy images (B, C, H, W).

    The denoiser itself sees (B, C * P ** 2, H / P, W / P), with P of `patch_of`.
    """
    patch = patch_of(unet, samples.shape[1])
    inputs = F.pixel_unshuffle(samples, patch)
    options: dict[str, Any] = {}
    if isinstance(unet, PixArtTransformer2DModel):
        options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    outputs = unet(inputs, timestep=timesteps, encoder_hidden_states=embeddings, **options).sample
    return F.pixel_shuffle(outputs, patch)


class Denoiser(torch.nn.Module):
    """The trained module: the embedder of the conditions and the denoiser."""

    def __init__(self, embedder: torch.nn.Module, unet: torch.nn.Module):
        super().__init__()
        self.embedder, self.unet = embedder, unet

    def forward(self, samples: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        return denoise(self.unet, samples, timesteps, self.embedder(conditions))


def new_unet(
    size: int, in_channels: int, channels: tuple[int, ...], head_dim: int, condition_dim: int, **options: Any
) -> UNet2DConditionModel:
    """A UNet with random weights, and with self- and cross-attention at every level. size: of its own samples."""
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        # In Diffusers this argument is the number of heads.
        attention_head_dim=tuple(width // head_dim for width in channels),
        cross_attention_dim=condition_dim,
        norm_num_groups=8,
        **options,
    )


@torch.no_grad()
def sharpen(model: torch.nn.Module, sharpness: float) -> None:
    """Multiply the query and key weights of self-attention: the variance of the logits by sharpness ** 4."""
    for name, module in model.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_k")):
            module.weight.mul_(sharpness)
