"""Trains the embedded emoji pipeline: `python benchmarks/paper/emojis/train.py`. The same command continues a training.

It downloads the emoji of four artists, 9 MB, and draws them with resvg_py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import training
from pixels import Denoiser
from tqdm import tqdm

from emojis import art, data, model, prompts
from emojis.pipeline import EmojiPipeline

NO_STYLE = 0.15  # share of the prompts without a style
AT_ONCE = 96  # training images that are drawn at once


@dataclass
class Emoji:
    """The objects are drawn once, into a file that all processes read. Their ground and prompt change every time."""

    count: int
    seed: int
    out: Path  # folder of that file
    art: Path  # folder of the artists' emoji
    pipeline = EmojiPipeline

    @property
    def file(self) -> Path:
        return self.out / f"objects-{self.count}-{self.seed}.npy"

    def prepare(self) -> None:
        if self.file.exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        things, styles, _ = prompts.kinds_of(torch.arange(self.count))
        part = self.file.with_suffix(".part")
        objects = np.lib.format.open_memmap(part, "w+", np.uint8, (self.count, 4, model.SIZE, model.SIZE))
        for start in tqdm(range(0, self.count, AT_ONCE), desc="objects"):
            some = slice(start, start + AT_ONCE)
            objects[some] = data.render(things[some], styles[some], model.SIZE, model.SIZE, generator, self.art).numpy()
        objects.flush()
        part.replace(self.file)

    def build(self) -> Denoiser:
        embedder = model.PromptEmbedder()
        return Denoiser(embedder, model.build())

    def images(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(self.count, (size,), generator=generator)
        colours = torch.randint(len(prompts.COLOURS), (size,), generator=generator)
        objects = np.load(self.file, mmap_mode="r")[chosen.numpy()]
        clean = data.on_ground(torch.from_numpy(objects), colours) * 2 - 1
        things, styles, _ = (kind.tolist() for kind in prompts.kinds_of(chosen))
        left_out = torch.rand(2, size, generator=generator)
        texts = []
        for place, colour in enumerate(colours.tolist()):
            style = "" if left_out[1, place] < NO_STYLE else prompts.STYLES[styles[place]]
            text = prompts.prompt_of(prompts.THINGS[things[place]], list(prompts.COLOURS)[colour], style)
            texts.append("" if left_out[0, place] < training.NO_CONDITION else text)
        return clean, prompts.ids_of(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, steps=4600, batch=32, images=28800, rate=1e-3, out=Path("build/emojis"))
    parser.add_argument("--art", type=Path, default=art.FOLDER, help="folder of the emoji (default: %(default)s)")
    parser.set_defaults(dtype="bfloat16")
    arguments = parser.parse_args()
    training.check_arguments(parser, arguments)
    try:
        training.train(Emoji(arguments.images, arguments.seed, arguments.out, arguments.art), arguments)
    except (ImportError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
