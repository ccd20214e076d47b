"""Class-conditional diffusion of glyphs as a Diffusers pipeline."""

from __future__ import annotations

import torch
from diffusers import ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from pixels import Generators, PixelPipeline


class LabelEmbedder(ModelMixin, ConfigMixin):
    """Embeds labels (B,) as sequences (B, 1, dim) for cross-attention. Label `num_classes` means "no label"."""

    @register_to_config
    def __init__(self, num_classes: int = 10, dim: int = 64):
        super().__init__()
        self.table = torch.nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table(labels)[:, None]


class GlyphPipeline(PixelPipeline):
    """Draws a digit for every label.

    Args:
        unet: the denoiser, a `UNet2DConditionModel` or a `PixArtTransformer2DModel`.
        embedder: a `LabelEmbedder`.
        scheduler: any scheduler of Diffusers for v-prediction.
    """

    model_cpu_offload_seq = "embedder->unet"
    COLOURS = 1

    def __init__(self, unet, embedder: LabelEmbedder, scheduler):
        super().__init__(unet, embedder, scheduler)

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        generator: Generators = None,
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
        classes = self.embedder.config.num_classes
        known = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
        if not labels or not known:
            raise ValueError(f"labels must be a list of ints from 0 to {classes - 1}, got {labels!r}")
        height, width = self.size_of(height, width)
        ids = torch.tensor(labels)
        no_label = torch.full_like(ids, classes)
        return self.sample(ids, no_label, height, width, num_inference_steps, guidance_scale, generator, output_type)
