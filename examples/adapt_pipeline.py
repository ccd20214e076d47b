"""Adapt a text-to-image pipeline with one line, and compare images of the same seed with scale 1/√d and with λ.

    python examples/adapt_pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --height 224 --width 224 --out image.png

The left half of the picture comes from the original pipeline, the right half from the adapted one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import entropy_attn


def load(model: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(model)
    return pipe.to("cuda", torch.float16) if torch.cuda.is_available() else pipe


def side_by_side(images: list[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width
    return canvas


def main(arguments: list[str] | None = None, pipe: DiffusionPipeline | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--prompt", default="a dog on a beach")
    parser.add_argument("--height", type=int, default=224, help="in pixels, as is the width")
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    given = parser.parse_args(arguments)
    pipe = pipe or load(given.model)

    def generate() -> Image.Image:
        generator = torch.Generator().manual_seed(given.seed)
        options = {"num_inference_steps": given.steps, "generator": generator}
        return pipe(given.prompt, height=given.height, width=given.width, **options).images[0]

    before = generate()
    with entropy_attn.enable(pipe) as handle:
        after = generate()
        print(handle)
    side_by_side([before, after]).save(given.out)
    print(f"wrote {given.out}: 1/√d on the left, λ on the right")


if __name__ == "__main__":
    main()
