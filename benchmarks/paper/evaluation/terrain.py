"""The terrain model as a subject, and the judge of its height maps."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from metrics import Reference
from terrain import features, weights
from terrain.pipeline import DIFFICULTIES, TerrainPipeline, one_step
from tqdm import tqdm

from evaluation.images import ImageFolder, generate
from evaluation.judges import Judge, total_score
from evaluation.subjects import Size, Subject

SIZES = ((64, 64), (96, 96), (160, 160), (192, 192), (64, 128), (128, 64), (128, 192), (192, 128), (128, 128))
STRIDE = 37  # between the difficulties of successive images: any run of 100 images has all difficulties
FIRST_NATIVE = 10**6  # number of the first native map, beyond the numbers of a run's images


def difficulties(numbers: Sequence[int]) -> list[int]:
    """The difficulties in the images of these numbers."""
    return [1 + STRIDE * number % DIFFICULTIES for number in numbers]


def terrain(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """The terrain model. Raises ValueError if its package is not installed."""
    return terrain_subject(TerrainPipeline(weights.load(dtype), one_step()).to(device))


def terrain_subject(pipe: TerrainPipeline) -> Subject:
    pipe.set_progress_bar_config(disable=True)
    return Subject(
        "terrain", pipe, (pipe.train_size, pipe.train_size), SIZES, pipe.multiple,
        lambda numbers: {"difficulties": difficulties(numbers)}, smallest=features.SMALLEST, bits=16, one_step=True,
    )  # fmt: skip


class TerrainJudge(Judge):
    """For the terrain model: features of its heights, and whether they tell the difficulty asked for.

    Terrain has no objects, so that its features should be the same at any size. The references are the model's own
    outputs at the trained size (native maps), cropped to the size of the images. Images that are larger than the native
    maps are cropped to the size of those. A feature's unit is a tenth of its standard deviation over the native maps,
    so that the distance is in per cent of a variance. The reader of difficulties is fitted to the same crops.
    """

    distance_name = "Frechet distance (features of the heights, % of a variance)"
    score_name = "correlation of asked and read difficulty (%)"
    natives = 500

    def __init__(self, subject: Subject, folder: Path, batch: int) -> None:
        """The native maps are drawn by `subject` into `folder`, `batch` at a time."""
        self.subject, self.batch = subject, batch
        self.folder = ImageFolder(folder, subject.bits)

    @functools.cached_property
    def native(self) -> torch.Tensor:
        """The native maps. Those that are not in the folder are drawn."""
        draw = functools.partial(self.subject.draw, self.subject.train_size, settings=None)
        with tqdm(total=len(self.folder.missing(self.numbers)), desc="native maps", unit="image") as progress:
            generate(self.folder, self.numbers, draw, self.batch, progress.update)
        return self.folder.load(self.numbers)

    @property
    def numbers(self) -> range:
        return range(FIRST_NATIVE, FIRST_NATIVE + self.natives)

    @functools.cached_property
    def asked(self) -> torch.Tensor:
        """The difficulties of the native maps."""
        return torch.tensor(difficulties(self.numbers)).double()

    @functools.cached_property
    def unit(self) -> torch.Tensor:
        return features.features_of(self.native).std(0) / 10

    def prepare(self, kinds: Collection[str]) -> None:
        if kinds:
            assert len(self.native)  # draws them

    def features(self, images: torch.Tensor) -> torch.Tensor:
        width, height = self.crop(tuple(images.shape[:1:-1]))
        return features.features_of(features.random_crops(images, height, width)) / self.unit

    def scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The difficulties (n, 2), asked and read."""
        read = self.reader(self.crop(tuple(images.shape[:1:-1]))).read(self.features(images))
        return torch.stack([torch.tensor(difficulties(numbers)).double(), read], dim=1)

    def reference(self, size: Size) -> Reference:
        return Reference(self.native_features(self.crop(size)))

    def floor(self, size: Size, count: int) -> dict[str, float]:
        """What native maps themselves have: the least distance and the greatest score that can be expected.

        The distance is that of each `count` successive maps, at most half of all, to the others, the mean. The score is
        that of one half, read by a reader that is fitted to the other.
        """
        crops = self.native_features(self.crop(size))
        some, half = min(count, self.natives // 2), self.natives // 2
        distances = [
            Reference(torch.cat([crops[:start], crops[start + some :]])).distance(crops[start : start + some])
            for start in range(0, self.natives - some + 1, some)
        ]
        read = features.Reader(crops[:half], self.asked[:half]).read(crops[half:])
        score = total_score(torch.stack([self.asked[half:], read], dim=1))
        return {"distance": sum(distances) / len(distances), "score": score}

    def crop(self, size: Size) -> Size:
        """The size of the crops that images of a size are judged by."""
        width, height = (min(sides) for sides in zip(size, self.subject.train_size, strict=True))
        return width, height

    @functools.cache  # noqa: B019 (a judge lives as long as its script)
    def native_features(self, crop: Size) -> torch.Tensor:
        width, height = crop
        return features.features_of(features.random_crops(self.native, height, width)) / self.unit

    @functools.cache  # noqa: B019
    def reader(self, crop: Size) -> features.Reader:
        return features.Reader(self.native_features(crop), self.asked)
