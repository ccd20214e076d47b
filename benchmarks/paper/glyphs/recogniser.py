"""A small convolutional network that reads digits. It judges the images of the embedded pipeline.

Its label says whether an image is read right. Its features make the Frechet distance, which is therefore not comparable
with distances between Inception features (FID).

`python benchmarks/paper/glyphs/recogniser.py` trains it, in about three minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from glyphs import data

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
SIZE = 32  # images are resized to this width and height, whatever their aspect ratio
FEATURES = 64
TRAIN_SIZES = ((12, 12), (16, 16), (20, 20), (24, 24), (28, 28), (32, 32), (36, 36), (48, 48),
               (24, 16), (16, 24), (36, 24), (24, 36), (48, 24), (24, 48))  # fmt: skip


class Recogniser(nn.Module):
    """Images (B, 1, H, W) in [0, 1] -> features (B, FEATURES) and logits (B, classes)."""

    def __init__(self, channels: int = 24):
        super().__init__()
        widths = (1, channels, channels, 2 * channels, 2 * channels, 4 * channels, 4 * channels)
        self.layers = nn.Sequential()
        for depth, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if depth % 2 == 0 else 1
            self.layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * (SIZE // 8) ** 2, FEATURES), nn.ReLU())
        self.labels = nn.Linear(FEATURES, len(data.CLASSES))
        # Used in training only: they make the features depend on font, position and size of the digit too.
        self.faces = nn.Linear(FEATURES, len(data.FACES))
        self.extents = nn.Linear(FEATURES, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.layers(resize(images) * 2 - 1))
        return features, self.labels(features)


def resize(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def load(path: Path = WEIGHTS) -> Recogniser:
    """The trained recogniser. Raises FileNotFoundError if its weights are missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python benchmarks/paper/glyphs/recogniser.py`")
    recogniser = Recogniser()
    recogniser.load_state_dict(load_file(path))
    return recogniser.eval()


@torch.no_grad()
def recognise(recogniser: Recogniser, images: torch.Tensor, batch: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, FEATURES) float32 and labels (B,) int64 of images (B, 1, H, W) in [0, 1]."""
    results = [recogniser(part.float()) for part in images.split(batch)]
    return torch.cat([features for features, _ in results]), torch.cat([logits.argmax(1) for _, logits in results])


def extents(images: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the light along both axes of every image, (B, 4), as shares of its sides."""
    light = images[:, 0] / images.sum((1, 2, 3))[:, None, None].clamp(min=1e-6)
    columns = []
    for axis in (1, 2):
        places = (torch.arange(images.shape[axis + 1]) + 0.5) / images.shape[axis + 1]
        profile = light.sum(3 - axis)
        centre = (profile * places).sum(1)
        columns += [centre, ((profile * places**2).sum(1) - centre**2).clamp(min=0).sqrt()]
    return torch.stack(columns, 1)


def examples(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images of all TRAIN_SIZES, resized (uint8), their labels, and their fonts."""
    images, labels, faces = [], [], []
    for height, width in tqdm(TRAIN_SIZES, desc="images"):
        label = torch.randint(len(data.CLASSES), (count,), generator=generator)
        drawn, face = data.render_with_faces(label, height, width, generator)
        images.append((resize(drawn) * 255).round().byte())
        labels.append(label)
        faces.append(face)
    return torch.cat(images), torch.cat(labels), torch.cat(faces)


def train(count: int, epochs: int, batch: int, seed: int) -> Recogniser:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels, faces = examples(count, generator)
    recogniser = Recogniser()
    optimiser = torch.optim.AdamW(recogniser.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="recogniser") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for chosen in order[: len(order) // batch * batch].split(batch):
                clean = images[chosen].float() / 255
                noise = torch.rand(batch, 1, 1, 1, generator=generator) * 0.05
                features, logits = recogniser(clean + noise * torch.randn(clean.shape, generator=generator))
                loss = F.cross_entropy(logits, labels[chosen])
                loss = loss + 0.3 * F.cross_entropy(recogniser.faces(features), faces[chosen])
                loss = loss + 30 * F.mse_loss(recogniser.extents(features), extents(clean))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return recogniser.eval()


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
        _, read = recognise(recogniser, data.render(labels, height, width, generator))
        print(f"{height} x {width}: reads {100 * (read == labels).float().mean():.1f} % of 1000 unseen images right")


if __name__ == "__main__":
    main()
