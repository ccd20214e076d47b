"""MultiDiffusion (Bar-Tal et al., 2023, arXiv 2302.08113) for the embedded pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from pixels import PixelPipeline


class WindowedDenoiser(torch.nn.Module):
    """A denoiser that sees windows of the trained size, and predicts the mean of the windows over a pixel.

    Bar-Tal et al. average the images after the scheduler's step. For a step that is linear in the prediction that is
    the same. The embedded pipelines' step is so but for its thresholding, which is then that of the whole image.
    """

    def __init__(self, unet: torch.nn.Module, stride: int) -> None:
        """stride: between windows, in pixels of the denoiser."""
        super().__init__()
        self.unet, self.stride = unet, stride

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, sample: torch.Tensor, **inputs: Any) -> UNet2DConditionOutput:
        """The prediction for sample (B, C, H, W). `inputs` are the same for every window."""
        window = self.config.sample_size
        height, width = sample.shape[-2:]
        total, count = torch.zeros_like(sample), torch.zeros_like(sample)
        for top in starts(height, window, self.stride):
            for left in starts(width, window, self.stride):
                part = (..., slice(top, top + window), slice(left, left + window))
                total[part] += self.unet(sample[part], **inputs).sample
                count[part] += 1
        return UNet2DConditionOutput(sample=total / count)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: a stride apart, the last one at the end; one window if the side is shorter."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def with_multidiffusion(pipe: PixelPipeline, stride: int | None = None) -> PixelPipeline:
    """The same pipeline with MultiDiffusion. stride: in pixels of the denoiser; None is half a window.

    Raises:
        ValueError: a stride that is no int within 1 and the window.
    """
    window = pipe.unet.config.sample_size
    stride = window // 2 if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= window:
        raise ValueError(f"stride must be an int from 1 to {window}, got {stride!r}")
    windowed = type(pipe)(**{**pipe.components, "unet": WindowedDenoiser(pipe.unet, stride)})
    windowed.set_progress_bar_config(disable=True)
    return windowed
