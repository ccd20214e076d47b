"""The network of adaptive-terrain-diffusion: a UNet of consistency models, with Diffusers' attention modules.

The architecture is that of Dhariwal and Nichol, *Diffusion Models Beat GANs on Image Synthesis* (2021), with residual
blocks that resample and with a scale and a shift from the embedding after the second norm. The modules are numbered as
in the package's file of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

GROUPS = 32  # of every group norm
Resample = Callable[[torch.Tensor], torch.Tensor]


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Residual(nn.Module):
    """A residual block, (B, channels, H, W) -> (B, out_channels, H, W); `resample` changes H and W first."""

    def __init__(self, channels: int, out_channels: int, embedding: int, resample: Resample | None = None):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.norm1(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        scale, shift = self.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm2(self.conv1(hidden)) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(hidden))


class Block(nn.Sequential):
    """Layers in a row, of which the residual blocks take the embedding."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, Residual) else layer(x)
        return x


class TerrainUNet(ModelMixin, ConfigMixin):
    """The denoiser.

    Args:
        sample_size: height and width in training.
        channels: of each level. H and W are halved from one level to the next.
        depth: residual blocks of a level on the way down; there is one more on the way up.
        attention_from: the first level with self-attention after each of its residual blocks.
        head_dim: of the self-attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        channels: tuple[int, ...] = (32, 32, 64, 96, 128),
        depth: int = 4,
        attention_from: int = 2,
        head_dim: int = 32,
    ):
        super().__init__()
        width = 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))

        def block(level: int, before: int) -> Block:
            layers: list[nn.Module] = [Residual(before, channels[level], width)]
            if level >= attention_from:
                layers.append(self_attention(channels[level], head_dim))
            return Block(*layers)

        x, last = channels[0], len(channels) - 1
        self.down_blocks = nn.ModuleList([Block(nn.Conv2d(1, x, 3, padding=1))])
        skips = [x]  # the channels of what the blocks on the way down put out
        for level in range(len(channels)):
            for _ in range(depth):
                self.down_blocks.append(block(level, x))
                skips.append(x := channels[level])
            if level != last:
                self.down_blocks.append(Block(Residual(x, x, width, halve)))
                skips.append(x)
        self.mid_block = Block(Residual(x, x, width), self_attention(x, head_dim), Residual(x, x, width))
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for _ in range(depth + 1):
                self.up_blocks.append(block(level, x + skips.pop()))
                x = channels[level]
            if level != 0:
                self.up_blocks[-1].append(Residual(x, x, width, double))
        self.norm_out = nn.GroupNorm(GROUPS, x)
        self.conv_out = nn.Conv2d(x, 1, 3, padding=1)

    @property
    def multiple(self) -> int:
        """H and W must be multiples of this."""
        return 2 ** (len(self.config.channels) - 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        """The output F(x) of a consistency model, before its scalings.

        Args:
            sample: noisy heights (B, 1, H, W), already divided by sqrt(sigma ** 2 + sigma_data ** 2).
            timestep: 250 ln(sigma), as of Diffusers' `CMStochasticIterativeScheduler`, (B,) or a scalar.
            difficulty: (B,), in [0, 1].
        """
        timesteps = timestep.expand(len(sample)).to(torch.float32)
        waves = get_timestep_embedding(timesteps, self.config.channels[0], True, 0).to(sample.dtype)
        embedding = self.time_embed(waves) + self.label_embed(difficulty[:, None].to(sample.dtype))
        x, skips = sample, []
        for block in self.down_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.mid_block(x, embedding)
        for block in self.up_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(x)))


def self_attention(channels: int, head_dim: int) -> Attention:
    return Attention(
        channels, heads=channels // head_dim, dim_head=head_dim, bias=True, norm_num_groups=GROUPS,
        residual_connection=True,
    )  # fmt: skip
