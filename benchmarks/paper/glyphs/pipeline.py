"""Class-conditional diffusion of glyphs as a Diffusers pipeline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


class LabelEmbedder(ModelMixin, ConfigMixin):
    """Embeds labels (B,) as sequences (B, 1, dim) for cross-attention. Label `num_classes` means "no label"."""

    @register_to_config
    def __init__(self, num_classes: int = 10, dim: int = 64):
        super().__init__()
        self.table = torch.nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table(labels)[:, None]


def patch_of(unet) -> int:
    """P, where a pixel of the denoiser has the P x P pixels of a square of the image as its channels."""
    return round(unet.config.in_channels**0.5)


def denoise(unet, samples: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The prediction (B, 1, H, W) of the denoiser, a UNet or a transformer, for noisy images (B, 1, H, W).

    The denoiser itself sees (B, P ** 2, H / P, W / P), with P of `patch_of`.
    """
    patch = patch_of(unet)
    inputs = F.pixel_unshuffle(samples, patch)
    options = {}
    if isinstance(unet, PixArtTransformer2DModel):
        options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    outputs = unet(inputs, timestep=timesteps, encoder_hidden_states=embeddings, **options).sample
    return F.pixel_shuffle(outputs, patch)


class GlyphPipeline(DiffusionPipeline):
    """Draws a digit for every label.

    Args:
        unet: the denoiser, a `UNet2DConditionModel` or a `PixArtTransformer2DModel`.
        embedder: a `LabelEmbedder`.
        scheduler: any scheduler of Diffusers for v-prediction.
    """

    model_cpu_offload_seq = "embedder->unet"

    def __init__(self, unet, embedder: LabelEmbedder, scheduler):
        super().__init__()
        self.register_modules(unet=unet, embedder=embedder, scheduler=scheduler)
        # Diffusers' name for the pixels of the image along an edge of a pixel of the denoiser. There is no VAE here.
        self.vae_scale_factor = patch_of(unet)
        halvings = max(len(unet.config.get("block_out_channels", ())) - 1, 0)
        self.multiple = self.vae_scale_factor * 2**halvings
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def train_size(self) -> int:
        """Height and width in training, in pixels."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw an image for each label, from 0 to 9.

        Args:
            height, width: in pixels, multiples of `multiple`; by default the trained size.
            guidance_scale: of classifier-free guidance; 1 switches it off and takes half the time.
            generator: one for all images, or a list with one for each.
            output_type: "pil", "np" (B, H, W, 1) or "pt" (B, 1, H, W), in [0, 1].

        Raises:
            ValueError: invalid labels, size, steps, number of generators or output type.
        """
        height = self.train_size if height is None else height
        width = self.train_size if width is None else width
        self._check(labels, height, width, num_inference_steps, generator, output_type)
        count, no_label = len(labels), self.embedder.config.num_classes
        samples = randn_tensor((count, 1, height, width), generator, self._execution_device, self.unet.dtype)
        ids = torch.tensor(labels, device=samples.device)
        guided = guidance_scale != 1.0
        embeddings = self.embedder(torch.cat([ids, torch.full_like(ids, no_label)]) if guided else ids)
        self.scheduler.set_timesteps(num_inference_steps, device=samples.device)
        samples = samples * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([samples, samples]) if guided else samples
            inputs = self.scheduler.scale_model_input(inputs, t)
            predicted = denoise(self.unet, inputs, t.expand(len(inputs)), embeddings)
            if guided:
                with_label, without = predicted.chunk(2)
                predicted = without + guidance_scale * (with_label - without)
            samples = self.scheduler.step(predicted, t, samples, return_dict=False)[0]
        images = self.image_processor.postprocess(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _check(self, labels, height, width, steps, generator, output_type) -> None:
        classes = self.embedder.config.num_classes
        known = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
        if not labels or not known:
            raise ValueError(f"labels must be a list of ints from 0 to {classes - 1}, got {labels!r}")
        for name, size in (("height", height), ("width", width)):
            if type(size) is not int or size <= 0 or size % self.multiple:
                raise ValueError(f"{name} must be a multiple of {self.multiple} pixels, got {size!r}")
        if type(steps) is not int or steps < 1:
            raise ValueError(f"num_inference_steps must be an int of at least 1, got {steps!r}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"generator must be one, or one for each of {len(labels)} labels, got {len(generator)}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
