"""Record the entropy of self-attention at several sizes, with 1/√d and with λ, and draw the paper's Fig. 5 and 6.

    python examples/record_entropy.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --sizes 224 384 448 512 768

The script writes entropy.png (entropy against ln N with a fitted line, entropy of each layer, slope of each head) and
entropy.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from adapt_pipeline import load
from diffusers import DiffusionPipeline
from tqdm import tqdm

import entropy_attn
from entropy_attn.entropy import EntropyRecord


def main(arguments: list[str] | None = None, pipe: DiffusionPipeline | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--prompt", default="a dog on a beach")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 448, 512, 768], help="pixels of an edge")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder")
    given = parser.parse_args(arguments)
    pipe = pipe or load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)

    pipe.set_progress_bar_config(leave=False)
    record = EntropyRecord()
    with tqdm(total=2 * len(given.sizes), desc="runs") as progress:
        for exponent in (0, 0.5):  # 1/√d, and the paper's λ
            with entropy_attn.enable(pipe, record_entropy=record, exponent=exponent):
                for size in given.sizes:
                    generator = torch.Generator().manual_seed(0)
                    options = {"num_inference_steps": given.steps, "generator": generator, "output_type": "latent"}
                    pipe(given.prompt, height=size, width=size, **options)
                    record.to_json(given.out / "entropy.json")  # finished runs survive an interrupt
                    progress.update()
    record.plot(given.out / "entropy.png")
    print(record.table())
    print(f"wrote {given.out / 'entropy.png'} and {given.out / 'entropy.json'}")


if __name__ == "__main__":
    main()
