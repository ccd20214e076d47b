"""Height maps by difficulty as a Diffusers pipeline."""

from __future__ import annotations

import torch
from diffusers import CMStochasticIterativeScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from pixels import Generators, SizedPipeline

from terrain.unet import TerrainUNet

DIFFICULTIES = 100  # from 1, flat, to this one


class TerrainPipeline(SizedPipeline):
    """Draws a height map for every difficulty, in one step from noise of sigma 80.

    The values of a map are not proportional to its heights: see `features.heights_of`.

    Args:
        unet: a `TerrainUNet`.
        scheduler: `one_step()`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: TerrainUNet, scheduler: CMStochasticIterativeScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.multiple = unet.multiple
        self.image_processor = VaeImageProcessor(vae_scale_factor=unet.multiple)

    @property
    def train_size(self) -> int:
        """Height and width in training."""
        return self.unet.config.sample_size

    @torch.no_grad()
    def __call__(
        self,
        difficulties: list[int],
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        output_type: str = "pt",
    ) -> ImagePipelineOutput:
        """Draw a map for each difficulty, from 1 to 100.

        Args:
            height, width: multiples of `multiple`; by default the trained size.
            generator: one for all maps, or a list with one for each.
            output_type: "pil", "np" (B, H, W, 1) or "pt" (B, 1, H, W), in [0, 1].

        Raises:
            ValueError: invalid difficulties, size or number of generators.
        """
        known = all(type(difficulty) is int and 1 <= difficulty <= DIFFICULTIES for difficulty in difficulties)
        if not difficulties or not known:
            raise ValueError(f"difficulties must be a list of ints from 1 to {DIFFICULTIES}, got {difficulties!r}")
        height, width = self.size_of(height, width)
        if isinstance(generator, list) and len(generator) != len(difficulties):
            raise ValueError(f"generator must be one, or one for each of {len(difficulties)}, got {len(generator)}")
        device, dtype = self._execution_device, self.unet.dtype
        difficulty = (torch.tensor(difficulties, device=device) - 1) / (DIFFICULTIES - 1)
        self.scheduler.set_timesteps(1, device=device)
        samples = randn_tensor((len(difficulties), 1, height, width), generator, device, dtype)
        samples = samples * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = self.unet(self.scheduler.scale_model_input(samples, t), timestep=t, difficulty=difficulty)
            samples = self.scheduler.step(predicted, t, samples, return_dict=False)[0]
        images = self.image_processor.postprocess(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)


def one_step() -> CMStochasticIterativeScheduler:
    """The scheduler of the package's network: its sigmas and scalings, which are Diffusers' defaults."""
    return CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
