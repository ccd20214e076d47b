"""Beyond the paper: calibrate a pipeline, and bring the entropy at another size to that of the size it was trained at.

    python examples/match_entropy.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 768 768

Prints the entropy of each layer with 1/√d, with the paper's λ, with the calibrated λ and with entropy matching, beside
the calibrated one. A nearer entropy is not yet a better image: on small models matching was the strongest of these at
some sizes and harmful at others, above all where ln N is not above the calibrated entropy. So it is off by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from adapt_pipeline import load, side_by_side
from diffusers import DiffusionPipeline

import entropy_attn


def main(arguments: list[str] | None = None, pipe: DiffusionPipeline | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--prompts", nargs="+", default=["a dog on a beach", "a city at night"], help="to calibrate on")
    parser.add_argument("--size", type=int, nargs=2, default=(768, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder, where a calibration.json is used again")
    given = parser.parse_args(arguments)
    pipe = pipe or load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)

    saved = given.out / "calibration.json"
    if not saved.exists():
        entropy_attn.calibrate(pipe, given.prompts, num_inference_steps=given.steps).save(saved)
    ways = {
        "1/√d": {"exponent": 0},
        "λ": {},
        "calibrated": {"calibration": saved},
        "matched": {"calibration": saved, "match_entropy": True},
    }
    images, entropies = [], []
    for options in ways.values():
        with entropy_attn.enable(pipe, record_entropy=True, **options) as handle:
            height, width = given.size
            images += pipe(
                given.prompts[0], height=height, width=width, num_inference_steps=given.steps,
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
        entropies.append({row["layer"]: row["entropy"] for row in handle.entropy.table(by=("layer",))})
    wanted = entropy_attn.diffusers.Calibration.load(saved, pipe).models[0].entropy

    print(f"{'layer':64} {'trained':>10} " + " ".join(f"{way:>10}" for way in ways))
    for layer, trained in wanted.items():
        found = [next(h for name, h in mine.items() if name.endswith(layer)) for mine in entropies]
        print(f"{layer:64} {trained:10.3f} " + " ".join(f"{entropy:10.3f}" for entropy in found))
    side_by_side(images).save(given.out / "matched.png")
    print(f"wrote {given.out / 'matched.png'}: {', '.join(ways)}, from the left")


if __name__ == "__main__":
    main()
