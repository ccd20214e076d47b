"""The denoiser of the embedded emoji pipeline, and the embedder of its prompts."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from pixels import new_unet, sharpen

from emojis.prompts import LENGTH, WORDS

SIZE = 64  # width and height of the training images
PATCH = 2  # a pixel of the denoiser is a square of PATCH x PATCH pixels of the image
WIDTH = 96  # of the words' embeddings
SHARPNESS = 2.0  # multiplies the initial weights of the query and key projections of self-attention


class PromptEmbedder(ModelMixin, ConfigMixin):
    """Embeds the words of prompts (B, length) as sequences (B, length, dim) for cross-attention."""

    @register_to_config
    def __init__(self, words: int = len(WORDS), length: int = LENGTH, dim: int = WIDTH):
        super().__init__()
        self.table = torch.nn.Embedding(words, dim)
        self.order = torch.nn.Embedding(length, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids) + self.order.weight


def build() -> UNet2DConditionModel:
    """The denoiser with random weights: self-attention at T = 1024, 256, 64 and 16 tokens, heads of 32."""
    unet = new_unet(SIZE // PATCH, 3 * PATCH**2, (64, 96, 128, 96), 32, WIDTH)
    sharpen(unet, SHARPNESS)
    return unet
