"""The network that reads digits. `python benchmarks/paper/glyphs/recogniser.py` trains it, in three minutes."""

from __future__ import annotations

import argparse
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


def train(count: int, epochs: int, batch: int, seed: int) -> Recogniser:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = examples(count, generator)
    return recognition.fit(build(), drawn, epochs, batch, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000, help="training images of each size (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="default: %(default)s")
    arguments = parser.parse_args()
    recogniser = train(arguments.images, arguments.epochs, 128, arguments.seed)
    save_file(recogniser.state_dict(), arguments.out)
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    for height, width in TRAIN_SIZES:
        labels = torch.arange(1000) % len(data.CLASSES)
        _, read = recognition.recognise(recogniser, data.render(labels, height, width, generator))
        print(f"{height} x {width}: reads {100 * (read == labels).float().mean():.1f} % of 1000 unseen images right")


if __name__ == "__main__":
    main()
