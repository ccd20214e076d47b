"""The network that names emoji. `python benchmarks/paper/emojis/recogniser.py` trains it, in three minutes."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import recognition
from recognition import Recogniser

from emojis import art, data, prompts

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
SIZE = 48
TRAIN_SIZES = ((32, 32), (48, 48), (64, 64), (80, 80), (96, 96), (32, 64), (64, 32), (64, 96), (96, 64), (48, 80))
AT_ONCE = 100


def build() -> Recogniser:
    """With random weights. Its other properties are the artist and the colour of the ground."""
    others = {"styles": len(prompts.STYLES), "grounds": len(prompts.COLOURS)}
    return Recogniser(3, len(prompts.THINGS), others, SIZE)


def load(path: Path = WEIGHTS) -> Recogniser:
    """The trained recogniser. Raises FileNotFoundError if its weights are missing."""
    return recognition.load(build(), path, "python benchmarks/paper/emojis/recogniser.py")


def draw(
    things: torch.Tensor, height: int, width: int, generator: torch.Generator, folder: Path
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Images (n, 3, SIZE, SIZE) uint8, opacities (n, SIZE, SIZE), styles and grounds: random but for the things."""
    styles = torch.randint(len(prompts.STYLES), things.shape, generator=generator)
    grounds = torch.randint(len(prompts.COLOURS), things.shape, generator=generator)
    objects = data.render(things, styles, height, width, generator, folder)
    images = recognition.resize(data.on_ground(objects, grounds), SIZE)
    opacity = recognition.resize(objects[:, 3:].float() / 255, SIZE)[:, 0]
    return (images * 255).round().byte(), opacity, {"styles": styles, "grounds": grounds}


def examples(count: int, generator: torch.Generator, folder: Path) -> recognition.Examples:
    """`count` training images of each of TRAIN_SIZES."""
    parts = []
    for height, width in tqdm(TRAIN_SIZES, desc="images"):
        for _ in range(count // AT_ONCE):
            things = torch.randint(len(prompts.THINGS), (AT_ONCE,), generator=generator)
            images, opacity, others = draw(things, height, width, generator, folder)
            parts.append(recognition.Examples(images, things, others, recognition.extents(opacity)))
    images, labels, others, extents = zip(*parts, strict=True)
    return recognition.Examples(
        torch.cat(images),
        torch.cat(labels),
        {name: torch.cat([each[name] for each in others]) for name in others[0]},
        torch.cat(extents),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recognition.add_arguments(parser, images=3000, epochs=8, out=WEIGHTS)
    parser.add_argument("--art", type=Path, default=art.FOLDER, help="folder of the emoji (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.images < AT_ONCE or arguments.images % AT_ONCE:
        parser.error(f"--images must be a multiple of {AT_ONCE}, got {arguments.images}")

    def unseen(*kind) -> torch.Tensor:
        return draw(*kind, arguments.art)[0].float() / 255

    drawn = functools.partial(examples, arguments.images, folder=arguments.art)
    recogniser = recognition.train(build, drawn, arguments.epochs, arguments.seed)
    save_file(recogniser.state_dict(), arguments.out)
    recognition.report(recogniser, TRAIN_SIZES, unseen, arguments.seed + 1)


if __name__ == "__main__":
    main()
