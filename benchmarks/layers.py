"""The attention layers of image models: their shapes for an image of any size, and random inputs of those shapes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

# For each level: downsampling factor from the latent image, heads, head dim. LDM is text2im-large-256.
UNETS = {
    "SD1.5": ((1, 8, 40), (2, 8, 80), (4, 8, 160), (8, 8, 160)),
    "SD2.1": ((1, 5, 64), (2, 10, 64), (4, 20, 64), (8, 20, 64)),
    "SDXL": ((2, 10, 64), (4, 20, 64)),
    "LDM": ((1, 8, 40), (2, 8, 80), (4, 8, 160), (8, 8, 160)),
}
TEXT_TOKENS = 77
TRANSFORMERS = {"SD3": (2, 24, 64, 333), "Flux": (1, 24, 128, 512)}  # B, heads, head dim, text tokens
MODELS = [*UNETS, *TRANSFORMERS, "square"]
VARIANTS = ["plain", "padding", "mask", "bias", "scale", "causal"]


class Shape(NamedTuple):
    kind: str
    B: int
    H: int
    Nq: int
    Nk: int
    D: int


class Inputs(NamedTuple):
    query: torch.Tensor  # (B, H, Nq, D)
    key: torch.Tensor  # (B, H, Nk, D)
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: torch.Tensor | None = None  # (B, H)


def shapes(models: list[str], sizes: list[tuple[int, int]], lengths: list[int]) -> dict[Shape, list[str]]:
    """Every shape once, with the layers that have it; `sizes` are (width, height) in pixels.

    The transformers make a token of 16 x 16 pixels. "square" is N queries by N keys for each N of `lengths`, with as
    many samples as make B N = max(lengths).
    """
    found: dict[Shape, list[str]] = {}
    for model in models:
        for width, height in sizes if model != "square" else ():
            for factor, heads, D in UNETS.get(model, ()):
                N = math.ceil(width / 8 / factor) * math.ceil(height / 8 / factor)
                layer = f"{model} {width}x{height}" + (f" /{factor}" if factor > 1 else "")
                found.setdefault(Shape("self", 2, heads, N, N, D), []).append(layer)
                found.setdefault(Shape("cross", 2, heads, N, TEXT_TOKENS, D), []).append(layer)
            if model in TRANSFORMERS:
                B, heads, D, text = TRANSFORMERS[model]
                N = math.ceil(width / 16) * math.ceil(height / 16) + text
                found.setdefault(Shape("joint", B, heads, N, N, D), []).append(f"{model} {width}x{height}")
        for N, D in [(N, D) for D in (64, 128) for N in lengths] if model == "square" else ():
            found.setdefault(Shape("square", max(lengths) // N, 16, N, N, D), []).append(f"N = {N}")
    return found


def make_inputs(shape: Shape, dtype: torch.dtype, variant: str, device: str) -> Inputs:
    """Seeded noise. "padding" hides a quarter of the first sample's keys; "mask" hides a quarter of all pairs."""
    _, B, H, Nq, Nk, D = shape
    generator = torch.Generator(device).manual_seed(0)
    noise = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs = Inputs(*(noise(B, N, H, D).transpose(1, 2) for N in (Nq, Nk, Nk)))
    if variant == "padding":
        seen = torch.ones(B, 1, 1, Nk, dtype=torch.bool, device=device)
        seen[0, ..., math.ceil(0.75 * Nk) :] = False
        return inputs._replace(attn_mask=seen)
    if variant == "mask":
        seen = torch.rand(1, 1, Nq, Nk, generator=generator, device=device) < 0.75
        seen[..., 0] = True  # no fully masked row: libraries differ in what it gives
        return inputs._replace(attn_mask=seen)
    if variant == "bias":
        return inputs._replace(attn_mask=noise(1, H, Nq, Nk))
    if variant == "scale":
        return inputs._replace(scale=torch.linspace(0.8, 1.2, B * H, device=device).view(B, H) / math.sqrt(D))
    return inputs._replace(is_causal=variant == "causal")
