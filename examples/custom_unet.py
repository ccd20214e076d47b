"""λ and the entropy in a UNet of one's own, on random weights: `attention()`, and a processor for Diffusers' modules.

python examples/custom_unet.py
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from entropy_attn import attention
from entropy_attn.diffusers import EntropyAttnProcessor


class SelfAttention(nn.Module):
    """Self-attention over an image (B, C, height, width), trained at `train_tokens` pixels."""

    def __init__(self, channels: int, heads: int, train_tokens: int):
        super().__init__()
        self.heads, self.train_tokens = heads, train_tokens
        self.norm, self.to_qkv, self.to_out = (
            nn.GroupNorm(4, channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.norm(image).flatten(2).transpose(1, 2)  # (B, N, C)
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, D), views
        out, entropy, _ = attention(
            query, key, value, train_tokens=self.train_tokens, layout="bnhd", return_entropy=True
        )  # entropy: (B, heads, N)
        return image + self.to_out(out.flatten(2)).transpose(1, 2).reshape(image.shape), entropy


def use_attention(sizes: list[int]) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(channels=64, heads=4, train_tokens=32 * 32).eval()
    print("attention() in a layer trained at 32 x 32")
    for size in sizes:
        image, entropy = layer(torch.randn(1, 64, size, size))
        print(f"  {size} x {size}: out {tuple(image.shape)}, mean entropy {entropy.mean():.3f} nats")


def use_processor(sizes: list[int]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    entropies: list[float] = []
    train_tokens = {"down_blocks.0": 32 * 32, "mid_block": 16 * 16, "up_blocks.1": 32 * 32}
    unet.set_attn_processor(
        {
            name: EntropyAttnProcessor(
                next(T for part, T in train_tokens.items() if name.startswith(part)),
                on_entropy=lambda attn, entropy: entropies.append(entropy.mean().item()),
            )
            if name.endswith("attn1.processor")
            else EntropyAttnProcessor()
            for name in unet.attn_processors
        }
    )
    print("EntropyAttnProcessor in a UNet trained at 32 x 32")
    for size in sizes:
        entropies.clear()
        sample = unet(torch.randn(1, 4, size, size), 500, encoder_hidden_states=torch.randn(1, 7, 16)).sample
        listed = ", ".join(f"{entropy:.3f}" for entropy in entropies)
        print(f"  {size} x {size}: sample {tuple(sample.shape)}, entropy of its self-attention {listed} nats")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 48], help="height and width of the input")
    sizes = parser.parse_args(arguments).sizes
    use_attention(sizes)
    use_processor(sizes)


if __name__ == "__main__":
    main()
