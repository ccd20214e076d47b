"""A small convolutional network that judges the images of an embedded pipeline.

Its label says whether an image is read right. Its features make the Frechet distance, which is therefore not comparable
with distances between Inception features (FID).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

FEATURES = 64


class Recogniser(nn.Module):
    """Images (B, colours, H, W) in [0, 1] -> features (B, FEATURES) and logits (B, labels).

    Images are resized to `size` x `size`, whatever their aspect ratio. `others` names further properties and the number
    of their classes. They and the extents are used in training only: the features then depend on them too.
    """

    def __init__(self, colours: int, labels: int, others: dict[str, int], size: int, width: int = 24):
        super().__init__()
        self.size = size
        widths = (colours, width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.Sequential()
        for depth, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if depth % 2 == 0 else 1
            self.layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * (size // 8) ** 2, FEATURES), nn.ReLU())
        self.labels = nn.Linear(FEATURES, labels)
        for name, classes in others.items():
            self.add_module(name, nn.Linear(FEATURES, classes))
        self.extents = nn.Linear(FEATURES, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.layers(resize(images, self.size) * 2 - 1))
        return features, self.labels(features)


class Examples(NamedTuple):
    """Training images (n, C, size, size) uint8, their labels (n,), other properties (n,), and extents (n, 4)."""

    images: torch.Tensor
    labels: torch.Tensor
    others: dict[str, torch.Tensor]
    extents: torch.Tensor


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def load(recogniser: Recogniser, path: Path, command: str) -> Recogniser:
    """The recogniser with its trained weights. Raises FileNotFoundError if they are missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `{command}`")
    recogniser.load_state_dict(load_file(path))
    return recogniser.eval()


@torch.no_grad()
def recognise(recogniser: Recogniser, images: torch.Tensor, batch: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, FEATURES) float32 and labels (B,) int64 of images (B, C, H, W) in [0, 1]."""
    results = [recogniser(part.float()) for part in images.split(batch)]
    return torch.cat([features for features, _ in results]), torch.cat([logits.argmax(1) for _, logits in results])


def extents(light: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of light (B, H, W) along both axes of every image, (B, 4), as shares of its sides."""
    light = light / light.sum((1, 2))[:, None, None].clamp(min=1e-6)
    columns = []
    for axis in (1, 2):
        places = (torch.arange(light.shape[axis]) + 0.5) / light.shape[axis]
        profile = light.sum(3 - axis)
        centre = (profile * places).sum(1)
        columns += [centre, ((profile * places**2).sum(1) - centre**2).clamp(min=0).sqrt()]
    return torch.stack(columns, 1)


def train(
    build: Callable[[], Recogniser], draw: Callable[[torch.Generator], Examples], epochs: int, seed: int
) -> Recogniser:
    """A recogniser trained on examples that `draw` makes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    examples = draw(generator)
    return fit(build(), examples, epochs, 128, generator)


def fit(recogniser: Recogniser, examples: Examples, epochs: int, batch: int, generator: torch.Generator) -> Recogniser:
    """Train the recogniser on the examples, with a little noise."""
    optimiser = torch.optim.AdamW(recogniser.parameters(), weight_decay=0.05)
    steps = epochs * (len(examples.images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="recogniser") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(examples.images), generator=generator)
            for chosen in order[: len(order) // batch * batch].split(batch):
                clean = examples.images[chosen].float() / 255
                noise = torch.rand(batch, 1, 1, 1, generator=generator) * 0.05
                features, logits = recogniser(clean + noise * torch.randn(clean.shape, generator=generator))
                loss = F.cross_entropy(logits, examples.labels[chosen])
                for name, classes in examples.others.items():
                    loss = loss + 0.3 * F.cross_entropy(recogniser.get_submodule(name)(features), classes[chosen])
                loss = loss + 30 * F.mse_loss(recogniser.extents(features), examples.extents[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return recogniser.eval()


def add_arguments(parser: argparse.ArgumentParser, images: int, epochs: int, out: Path) -> None:
    """The arguments of every training, with a recogniser's defaults."""
    parser.add_argument(
        "--images", type=int, default=images, help="training images of each size (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")


def report(
    recogniser: Recogniser, sizes: Sequence[tuple[int, int]], draw: Callable[..., torch.Tensor], seed: int
) -> None:
    """Print how many images are read right. draw(labels, height, width, generator) makes images of these labels."""
    generator, classes = torch.Generator().manual_seed(seed), recogniser.labels.out_features
    for height, width in sizes:
        labels = torch.arange(1000) % classes
        _, read = recognise(recogniser, draw(labels, height, width, generator))
        print(f"{height} x {width}: reads {100 * (read == labels).float().mean():.1f} % of 1000 unseen images right")
