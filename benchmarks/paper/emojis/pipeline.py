"""Draws emoji from prompts: a Diffusers pipeline."""

from __future__ import annotations

import torch
from diffusers import ImagePipelineOutput
from pixels import Generators, PixelPipeline

from emojis.model import PromptEmbedder
from emojis.prompts import ids_of


class EmojiPipeline(PixelPipeline):
    """Draws an emoji for every prompt, such as "cat on blue" or "fluent cat on blue".

    Args:
        unet: the denoiser, a `UNet2DConditionModel`.
        embedder: a `PromptEmbedder`.
        scheduler: any scheduler of Diffusers for v-prediction.
    """

    model_cpu_offload_seq = "embedder->unet"

    def __init__(self, unet, embedder: PromptEmbedder, scheduler):
        super().__init__(unet, embedder, scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float = 2.0,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw an image for each prompt.

        Args:
            prompt: words of `emojis.prompts.WORDS`; "" is no condition.
            height, width: in pixels, multiples of `multiple`; by default the trained size.
            guidance_scale: of classifier-free guidance; 1 switches it off and takes half the time.
            generator: one for all images, or a list with one for each.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), in [0, 1].

        Raises:
            ValueError: invalid prompts, size, steps, number of generators or output type.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        height, width = self.size_of(height, width)
        ids = ids_of(prompts)
        return self.sample(
            ids, torch.zeros_like(ids), height, width, num_inference_steps, guidance_scale, generator, output_type
        )
