"""Trains the embedded pipeline: `python benchmarks/paper/glyphs/train.py`. The same command continues a training.

The network that judges the images is trained by recogniser.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import training
from pixels import Denoiser

from glyphs import data, designs
from glyphs.pipeline import GlyphPipeline, LabelEmbedder


@dataclass
class Glyphs:
    """Digits of random fonts, heights and positions, all drawn before the training."""

    design: str
    count: int
    seed: int
    pipeline = GlyphPipeline

    def prepare(self) -> None:
        """Draw the images, (count, 1, S, S) uint8."""
        self.labels = torch.arange(self.count) % len(data.CLASSES)
        images = data.render(self.labels, designs.SIZE, designs.SIZE, torch.Generator().manual_seed(self.seed))
        self.drawn = (images * 255).round().byte()

    def build(self) -> Denoiser:
        embedder = LabelEmbedder(len(data.CLASSES), designs.LABEL_DIM)
        return Denoiser(embedder, designs.build(self.design))

    def images(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(self.count, (size,), generator=generator)
        given = self.labels[chosen].clone()
        given[torch.rand(size, generator=generator) < training.NO_CONDITION] = len(data.CLASSES)
        return self.drawn[chosen].float() / 127.5 - 1, given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--design", choices=designs.DESIGNS, default="levels", help="default: %(default)s")
    training.add_arguments(parser, steps=5000, batch=48, images=40000, rate=1.5e-3, out=Path("build/glyphs"))
    arguments = parser.parse_args()
    training.check_arguments(parser, arguments)
    training.train(Glyphs(arguments.design, arguments.images, arguments.seed), arguments)


if __name__ == "__main__":
    main()
