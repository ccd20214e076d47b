"""Beyond the paper: calibrate a pipeline, and match its entropy at another size to that at its trained size.

    python examples/match_entropy.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --height 768 --width 768

The script prints a table of layers: ln N, the calibrated entropy H_T, and the entropy with 1/√d, with the paper's λ,
with the calibrated λ and with entropy matching. A nearer entropy does not imply a better image. On our small models,
matching was the strongest of these at some sizes and harmful at others, above all where ln N <= H_T. No scale reaches
H_T there, and the table marks H_T with a *. So matching is off by default.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from adapt_pipeline import load, side_by_side
from diffusers import DiffusionPipeline

import entropy_attn
from entropy_attn.diffusers import Calibration


def main(arguments: list[str] | None = None, pipe: DiffusionPipeline | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--prompts", nargs="+", default=["a dog on a beach", "a city at night"], help="to calibrate on")
    parser.add_argument("--height", type=int, default=768, help="in pixels, as is the width")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder, where a calibration.json is used again")
    given = parser.parse_args(arguments)
    pipe = pipe or load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)

    saved = given.out / "calibration.json"
    if not saved.exists():
        generator = torch.Generator().manual_seed(1)  # other noise than the images start from
        entropy_attn.calibrate(pipe, given.prompts, num_inference_steps=given.steps, generator=generator).save(saved)
    trained = Calibration.load(saved, pipe).models[0].entropy
    ways = {
        "1/√d": {"exponent": 0},
        "λ": {},
        "calibrated": {"calibration": saved},
        "matched": {"calibration": saved, "match_entropy": True},
    }
    images, tables = [], []
    for options in ways.values():
        with entropy_attn.enable(pipe, record_entropy=True, **options) as handle:
            images += pipe(
                given.prompts[0], height=given.height, width=given.width, num_inference_steps=given.steps,
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
        tables.append(handle.entropy.table(by=("layer",)))

    print(f"{'layer':64} {'ln N':>8} {'H_T':>8}  " + " ".join(f"{way:>10}" for way in ways))
    for rows in zip(*tables, strict=True):
        layer, log_tokens = rows[0]["layer"], math.log(rows[0]["tokens"])
        wanted = trained[layer.partition(".")[2]]  # the layer's name without the pipeline's component
        found = " ".join(f"{row['entropy']:10.3f}" for row in rows)
        print(f"{layer:64} {log_tokens:8.3f} {wanted:8.3f}{'*' if log_tokens <= wanted else ' '} {found}")
    side_by_side(images).save(given.out / "matched.png")
    print(f"wrote {given.out / 'matched.png'}: {', '.join(ways)}, from the left")


if __name__ == "__main__":
    main()
