"""Generate images of many sizes with one adapted pipeline, in one call with one progress bar.

    python examples/many_sizes.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --sizes 224x224 384x512 512x384 224x224 --seeds 0 1 2 3 --out images

Images of one size share a batch, and λ follows the size of each batch. Each image has the noise of its own seed, so it
is the image of a call by itself, up to the rounding of a batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapt_pipeline import load
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

import entropy_attn


def generate(
    pipe: DiffusionPipeline,
    sizes: Sequence[tuple[int, int]],
    prompt: Any,
    seeds: Sequence[int],
    batch_size: int = 4,
    **options: Any,
) -> list[Image.Image]:
    """Images in the order of `sizes`.

    Args:
        pipe: a pipeline that `entropy_attn.enable` has adapted. Its call takes a list of prompts, height and width.
        sizes: height and width of each image, in pixels.
        prompt: the prompt of all images, or a list with one for each.
        seeds: the seed of each image's noise.
        batch_size: the most images in one call of the pipeline.
        options: further arguments of the pipeline's call, such as num_inference_steps.
    """
    prompts = prompt if isinstance(prompt, list) else [prompt] * len(sizes)
    if not len(prompts) == len(seeds) == len(sizes):
        counts = f"{len(prompts)}, {len(seeds)} and {len(sizes)}"
        raise ValueError(f"prompt, seeds and sizes must have one entry for each image, got {counts}")
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    images: dict[int, Image.Image] = {}
    with tqdm(total=len(sizes), unit="image") as progress:
        for (height, width), members in groups.items():
            for first in range(0, len(members), batch_size):
                batch = members[first : first + batch_size]
                progress.set_description(f"{len(batch)} of {height} x {width}")
                noise = [torch.Generator().manual_seed(seeds[i]) for i in batch]
                inputs = [prompts[i] for i in batch]
                made = pipe(inputs, height=height, width=width, generator=noise, **options).images
                images |= dict(zip(batch, made, strict=True))
                progress.update(len(batch))
    return [images[i] for i in range(len(sizes))]


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def main(arguments: list[str] | None = None, pipe: DiffusionPipeline | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--prompt", default="a dog on a beach")
    sizes = [(224, 224), (384, 512), (512, 384), (224, 224)]
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=sizes, help="as 384x512, height x width")
    parser.add_argument("--seeds", type=int, nargs="+", help="one for each size; default: 0, 1, 2 …")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder")
    given = parser.parse_args(arguments)
    pipe = pipe or load(given.model)
    pipe.set_progress_bar_config(leave=False)  # one bar stays, that of the images
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(len(given.sizes))) if given.seeds is None else given.seeds
    with entropy_attn.enable(pipe):
        images = generate(pipe, given.sizes, given.prompt, seeds, given.batch_size, num_inference_steps=given.steps)
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        image.save(given.out / f"{i}-{image.height}x{image.width}-seed{seed}.png")
    print(f"wrote {len(images)} images to {given.out}")


if __name__ == "__main__":
    main()
