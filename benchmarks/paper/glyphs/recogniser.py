"""The network that reads digits. `python benchmarks/paper/glyphs/recogniser.py` trains it, in three minutes."""

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

from glyphs import data

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
SIZE = 32
TRAIN_SIZES = ((12, 12), (16, 16), (20, 20), (24, 24), (28, 28), (32, 32), (36, 36), (48, 48),
               (24, 16), (16, 24), (36, 24), (24, 36), (48, 24), (24, 48))  # fmt: skip


def build() -> Recogniser:
    """With random weights. Its other property is the font of the digit."""
    return Recogniser(1, len(data.CLASSES), {"faces": len(data.FACES)}, SIZE)


def load(path: Path = WEIGHTS) -> Recogniser:
    """The trained recogniser. Raises FileNotFoundError if its weights are missing."""
    return recognition.load(build(), path, "python benchmarks/paper/glyphs/recogniser.py")


def examples(count: int, generator: torch.Generator) -> recognition.Examples:
    """`count` training images of each of TRAIN_SIZES."""
    images, labels, faces = [], [], []
    for height, width in tqdm(TRAIN_SIZES, desc="images"):
        label = torch.randint(len(data.CLASSES), (count,), generator=generator)
        drawn, face = data.render_with_faces(label, height, width, generator)
        images.append((recognition.resize(drawn, SIZE) * 255).round().byte())
        labels.append(label)
        faces.append(face)
    light = torch.cat(images)
    extents = recognition.extents(light[:, 0].float() / 255)
    return recognition.Examples(light, torch.cat(labels), {"faces": torch.cat(faces)}, extents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recognition.add_arguments(parser, images=4000, epochs=4, out=WEIGHTS)
    arguments = parser.parse_args()
    draw = functools.partial(examples, arguments.images)
    recogniser = recognition.train(build, draw, arguments.epochs, arguments.seed)
    save_file(recogniser.state_dict(), arguments.out)
    recognition.report(recogniser, TRAIN_SIZES, data.render, arguments.seed + 1)


if __name__ == "__main__":
    main()
