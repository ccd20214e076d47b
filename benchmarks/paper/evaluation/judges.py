"""Judges of images: features for the Frechet distance to reference images, and a score for each image."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import emojis.art
import emojis.data
import emojis.prompts
import emojis.recogniser
import glyphs.data
import glyphs.recogniser
import torch
from metrics import Reference, bootstrap
from recognition import Recogniser, recognise
from tqdm import tqdm

from evaluation.sources import open_images
from evaluation.subjects import Size

FID, CLIP_SCORE = "fid", "clip"  # the names in --what of the distance and of the score, for every judge
CLIP = "openai/clip-vit-base-patch16"
BATCH = 25
RESAMPLES = 100


class Judge(Protocol):
    distance_name: str
    score_name: str

    def prepare(self, kinds: Collection[str]) -> None:
        """Load the networks and references that these kinds need. Raises ValueError if one cannot be loaded."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, F) of images (n, C, H, W) in [0, 1]."""

    def scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Scores of images (n, C, H, W) with these image numbers: (n,), or pairs (n, 2) as in `total_score`."""

    def reference(self, size: Size) -> Reference:
        """The reference that images of a size are compared with."""

    def floor(self, size: Size, count: int) -> dict[str, float] | None:
        """The distance and score of the best `count` images that can be expected, where the judge knows them."""
        return None


class ReadingJudge(Judge, abc.ABC):
    """For an embedded pipeline: features of its recogniser, and whether the recogniser reads what was asked for."""

    distance_name = "Frechet distance (recogniser's features)"
    score_name = "recognised (%)"

    @abc.abstractmethod
    def load(self) -> Recogniser: ...

    @abc.abstractmethod
    def labels(self, numbers: Sequence[int]) -> list[int]:
        """What the images of these numbers are to show."""

    @abc.abstractmethod
    def render(self, size: Size) -> torch.Tensor:
        """Reference images (n, C, H, W) in [0, 1], rendered at the size."""

    @functools.cached_property
    def recogniser(self) -> Recogniser:
        return self.load()

    def prepare(self, kinds: Collection[str]) -> None:
        if kinds:
            assert self.recogniser  # loads it

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return recognise(self.recogniser, images)[0]

    def scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        return 100 * (recognise(self.recogniser, images)[1] == torch.tensor(self.labels(numbers))).float()

    @functools.cache  # noqa: B019 (a judge lives as long as its script)
    def reference(self, size: Size) -> Reference:
        return Reference(self.features(self.render(size)))


class GlyphJudge(ReadingJudge):
    distance_name = "Frechet distance (glyph recogniser's features)"
    references = 4000  # the number of digits rendered at the size

    def load(self) -> Recogniser:
        return glyphs.recogniser.load()

    def labels(self, numbers: Sequence[int]) -> list[int]:
        return glyphs.data.digits(numbers)

    def render(self, size: Size) -> torch.Tensor:
        digits = self.labels(range(self.references))
        return glyphs.data.render(digits, *size[::-1], torch.Generator().manual_seed(2**31))


class EmojiJudge(ReadingJudge):
    distance_name = "Frechet distance (emoji recogniser's features)"
    references = 3840  # emoji rendered at the size: every kind as often

    def __init__(self, folder: Path = emojis.art.FOLDER) -> None:
        """`folder` is where the emoji of the artists are, or are downloaded to."""
        self.folder = folder

    def load(self) -> Recogniser:
        return emojis.recogniser.load()

    def prepare(self, kinds: Collection[str]) -> None:
        super().prepare(kinds)
        if FID in kinds:
            try:
                emojis.data.references(len(emojis.prompts.THINGS) * len(emojis.prompts.STYLES), 16, 16, self.folder)
            except (ImportError, OSError) as error:
                raise ValueError(f"the distance to rendered emoji cannot be measured: {error}") from error

    def labels(self, numbers: Sequence[int]) -> list[int]:
        return [emojis.prompts.kinds_of(number)[0] for number in numbers]

    def render(self, size: Size) -> torch.Tensor:
        return emojis.data.references(self.references, *size[::-1], self.folder)


class TextJudge(Judge):
    """For text-to-image models: FID to reference images, and the CLIP score with the prompts.

    FID uses the Inception features of torchmetrics. The CLIP score is the cosine between the embeddings of image and
    prompt. It is computed with transformers, since the CLIP score of torchmetrics 1.9 does not run with transformers 5.
    """

    distance_name = "FID"
    score_name = "CLIP score"

    def __init__(
        self,
        references: str | None,
        prompts: Sequence[str],
        device: str = "cpu",
        clip: str = CLIP,
        inception_weights: str | None = None,
    ) -> None:
        """`references` as in `sources.open_images`; `clip` is a path or hub id; `inception_weights` is a file.

        Without `inception_weights`, torch-fidelity downloads them.
        """
        self.prompts, self.device = prompts, device
        self.references, self.clip_id, self.inception_weights = references, clip, inception_weights

    def prepare(self, kinds: Collection[str]) -> None:
        if FID in kinds:
            self.reference((0, 0))
        if CLIP_SCORE in kinds:
            assert self.clip

    @functools.cached_property
    def inception(self) -> torch.nn.Module:
        return load_inception(self.inception_weights).to(self.device)

    @functools.cached_property
    def clip(self) -> tuple[Any, Any]:
        model, processor = load_clip(self.clip_id)
        return model.to(self.device), processor

    def features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            parts = [self.inception(bytes_of(part).to(self.device)).cpu() for part in images.split(BATCH)]
        return torch.cat(parts)

    def scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        starts = range(0, len(images), BATCH)
        return torch.cat([self._scores(images[i : i + BATCH], numbers[i : i + BATCH]) for i in starts])

    @torch.no_grad()
    def _scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        model, processor = self.clip
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        inputs = processor(
            text=prompts, images=list(bytes_of(images)), padding=True, truncation=True, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask", "pixel_values")
        embedded = model(**{name: inputs[name].to(self.device) for name in names})
        return torch.nn.functional.cosine_similarity(embedded.image_embeds, embedded.text_embeds).float().cpu()

    def reference(self, size: Size) -> Reference:
        """The same images for all sizes, as in the paper."""
        return self._reference

    @functools.cached_property
    def _reference(self) -> Reference:
        if self.references is None:
            raise ValueError("FID needs --references, a folder of images or a dataset")
        reads = open_images(self.references)
        return Reference(torch.cat([self.features(read()[None]) for read in tqdm(reads, desc="references")]))


def load_inception(weights: str | None) -> torch.nn.Module:
    """The Inception network of torchmetrics. Raises ValueError if it is not installed or has no weights."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights).inception
    except ImportError as error:  # torchmetrics, or torch-fidelity, which holds the network
        raise ValueError(f"FID needs torchmetrics: pip install 'entropy_attn[paper]' ({error})") from error
    except (OSError, RuntimeError) as error:
        where = "from the net, give --inception FILE where there is none" if weights is None else weights
        raise ValueError(f"Inception's weights cannot be loaded ({where}): {str(error).splitlines()[0]}") from error


def load_clip(name: str) -> tuple[Any, Any]:
    """CLIP and its processor, by path or hub id. Raises ValueError if they cannot be loaded."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} cannot be loaded for the CLIP score: {str(error).splitlines()[0]}") from error


def bytes_of(images: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) in [0, 1] as (n, 3, H, W) uint8."""
    return (images.expand(-1, 3, -1, -1) * 255).round().byte()


def distance_row(reference: Reference, features: torch.Tensor, original: torch.Tensor | None) -> dict[str, Any]:
    """The Frechet distance with its 95 % interval; with features `original`, the paired change and its interval too."""
    ours = reference.distances(features)
    return _row(ours, None if original is None else reference.distances(original), len(features), True)


def score_row(scores: torch.Tensor, original: torch.Tensor | None) -> dict[str, Any]:
    """`total_score` with its interval; with scores `original`, the paired change and its interval too."""
    base = None if original is None else lambda i: total_score(original[i])
    return _row(lambda i: total_score(scores[i]), base, len(scores), False)


def total_score(scores: torch.Tensor) -> float:
    """The mean of scores (n,), or the correlation, in %, of the two columns of pairs (n, 2): 0 if one is constant."""
    if scores.ndim == 1:
        return scores.mean().item()
    if (scores == scores[0]).all(0).any():
        return 0.0
    return 100 * torch.corrcoef(scores.T)[0, 1].item()


Statistic = Callable[[torch.Tensor], float]


def _row(ours: Statistic, original: Statistic | None, count: int, biased: bool) -> dict[str, Any]:
    """The columns `value` and `value_interval` and, if there is an original, `change` and `change_interval`."""

    def both(chosen: torch.Tensor) -> list[float]:
        value = ours(chosen)
        return [value] if original is None else [value, value - original(chosen)]

    intervals = bootstrap(both, count, RESAMPLES, biased=biased)
    names = ("value", "change")
    row: dict[str, Any] = {"images": count}
    for name, value, interval in zip(names, both(torch.arange(count)), intervals, strict=False):
        row |= {name: value, f"{name}_interval": interval}
    return row
