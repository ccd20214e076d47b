"""Designs of the denoiser, by name. designs.md compares them."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from pixels import new_unet, sharpen

LABEL_DIM = 64
PATCH = 2  # a pixel of the denoiser is a square of PATCH x PATCH pixels of the image
SIZE = 24  # width and height of the training images


@dataclass(frozen=True)
class Design:
    """A UNet with attention at every level, or a transformer if `channels` is empty.

    `sharpness` multiplies the initial weights of the query and key projections of self-attention. So it multiplies the
    initial variance of the logits by sharpness ** 4.
    """

    channels: tuple[int, ...] = ()
    head_dim: int = 32
    transformer_layers: int = 1
    kernel: int = 3  # kernel size of the first and last convolution
    sharpness: float = 1.0
    heads: int = 4  # heads and layers are of a transformer
    layers: int = 6


DESIGNS = {
    "plain": Design((64,), 32, 2, kernel=1),
    "sharp": Design((64,), 16, 2, kernel=1, sharpness=2.0),
    "levels": Design((64, 96), 16, 1, kernel=1, sharpness=2.0),
    "transformer": Design(head_dim=32, heads=4, layers=6, sharpness=1.5),
}


def build(name: str) -> UNet2DConditionModel | PixArtTransformer2DModel:
    """The denoiser of a design, with random weights. Raises ValueError for an unknown design."""
    if name not in DESIGNS:
        raise ValueError(f"design must be one of {', '.join(DESIGNS)}, got {name!r}")
    design = DESIGNS[name]
    model = _unet(design) if design.channels else _transformer(design)
    sharpen(model, design.sharpness)
    return model


def _unet(design: Design) -> UNet2DConditionModel:
    return new_unet(
        SIZE // PATCH, PATCH**2, design.channels, design.head_dim, LABEL_DIM,
        transformer_layers_per_block=design.transformer_layers,
        conv_in_kernel=design.kernel,
        conv_out_kernel=design.kernel,
    )  # fmt: skip


def _transformer(design: Design) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=SIZE // PATCH,
        patch_size=1,
        in_channels=PATCH**2,
        out_channels=PATCH**2,
        num_attention_heads=design.heads,
        attention_head_dim=design.head_dim,
        num_layers=design.layers,
        cross_attention_dim=design.heads * design.head_dim,
        caption_channels=LABEL_DIM,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
