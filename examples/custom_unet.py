"""λ and entropy in a custom UNet: `attention()` in a PyTorch module, and an attention processor for Diffusers.

    python examples/custom_unet.py

The weights are random, and nothing is downloaded. The example shows the calls and saves no image.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from entropy_attn import attention
from entropy_attn.diffusers import EntropyAttnProcessor

TRAIN_SIZE = 32  # height and width of the training images or latents


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, train_tokens: int):
        super().__init__()
        self.heads, self.train_tokens = heads, train_tokens
        self.norm, self.to_qkv = nn.GroupNorm(4, channels), nn.Linear(channels, 3 * channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(image).flatten(2).transpose(1, 2)  # (B, N, channels)
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, D)
        out, self.entropy, _ = attention(
            query, key, value, train_tokens=self.train_tokens, layout="bnhd", return_entropy=True
        )  # entropy: (B, heads, N)
        return image + out.flatten(2).transpose(1, 2).reshape(image.shape)


class SmallUNet(nn.Module):
    """A UNet with self-attention at two levels. Each level has its own T."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.down, self.up = nn.Conv2d(channels, channels, 2, stride=2), nn.ConvTranspose2d(channels, channels, 2, 2)
        self.upper, self.lower = (
            SelfAttention(channels, 4, TRAIN_SIZE**2),
            SelfAttention(channels, 4, TRAIN_SIZE**2 // 4),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = self.upper(self.enter(image))
        return self.leave(image + self.up(self.lower(self.down(image))))


def diffusers_unet(entropies: list[torch.Tensor]) -> UNet2DConditionModel:
    """A Diffusers UNet with the same two levels. Its self-attention appends its entropy to `entropies`."""
    unet = UNet2DConditionModel(
        sample_size=TRAIN_SIZE, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    processors = {}
    for name in unet.attn_processors:
        train_tokens = TRAIN_SIZE**2 // 4 if name.startswith("mid_block") else TRAIN_SIZE**2
        processors[name] = (
            EntropyAttnProcessor(train_tokens, on_entropy=lambda attn, entropy: entropies.append(entropy))
            if name.endswith("attn1.processor")
            else EntropyAttnProcessor()  # cross-attention: the number of text keys is fixed
        )
    unet.set_attn_processor(processors)
    return unet


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 48], help="even; height and width of the input")
    sizes = parser.parse_args(arguments).sizes
    torch.manual_seed(0)
    entropies: list[torch.Tensor] = []
    small, unet = SmallUNet().eval(), diffusers_unet(entropies)
    for size in sizes:
        image = small(torch.randn(1, 3, size, size))
        report("SmallUNet", image, [small.upper.entropy, small.lower.entropy])
        entropies.clear()
        sample = unet(torch.randn(1, 4, size, size), timestep=500, encoder_hidden_states=torch.randn(1, 7, 16)).sample
        report("UNet2DConditionModel", sample, entropies)


def report(name: str, out: torch.Tensor, entropies: list[torch.Tensor]) -> None:
    listed = ", ".join(f"{entropy.mean():.3f}" for entropy in entropies)
    print(f"{name}: out {tuple(out.shape)}, mean entropy of its layers {listed} nats")


if __name__ == "__main__":
    main()
