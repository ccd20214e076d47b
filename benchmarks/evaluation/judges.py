"""What images are judged by: features for a Frechet distance to reference images, and a score for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from glyphs.evaluate import Judge, digits
from metrics import bootstrap, frechet_distance

from evaluation.images import read_image
from evaluation.subjects import Size

CLIP = "openai/clip-vit-base-patch16"
BATCH = 25


class Measured(NamedTuple):
    """Of n images: features (n, F), and the score of each (n,), in `Judge.score_name`'s unit."""

    features: torch.Tensor
    scores: torch.Tensor


class ImageJudge(Protocol):
    distance_name: str
    score_name: str

    def measure(self, images: torch.Tensor, numbers: Sequence[int]) -> Measured: ...

    def reference(self, size: Size) -> torch.Tensor: ...


class GlyphJudge:
    """The embedded pipeline's: features of our own recogniser, and whether it reads the digit that was asked for."""

    distance_name = "Frechet distance (glyph recogniser's features)"
    score_name = "recognised (%)"

    def __init__(self) -> None:
        self.judge = Judge()

    def measure(self, images: torch.Tensor, numbers: Sequence[int]) -> Measured:
        features, read = self.judge.read(images)
        asked = torch.cat([digits(number, 1) for number in numbers])
        return Measured(features, 100 * (read == asked).float())

    def reference(self, size: Size) -> torch.Tensor:
        return self.judge.reference(size[::-1])


class TextJudge:
    """FID by torchmetrics' Inception features against a folder of images, and CLIP score with the prompts.

    CLIP score is the cosine between the image's and the prompt's embedding, by transformers: torchmetrics 1.9 does not
    run with transformers 5.
    """

    distance_name = "FID"
    score_name = "CLIP score"

    def __init__(
        self,
        references: Path | None,
        prompts: Sequence[str],
        inception: Any = None,
        clip: tuple[Any, Any] | None = None,
    ) -> None:
        """`inception` takes the place of torchmetrics' network, as `FrechetInceptionDistance(feature=...)` takes it;
        `clip` that of CLIP: a model and its processor.

        Raises:
            ValueError: torchmetrics is missing, CLIP cannot be loaded, or there are not 2 references.
        """
        self.prompts = prompts
        self.files = image_files(references) if references else []
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self.inception = FrechetInceptionDistance(2048 if inception is None else inception).inception
        except ImportError as error:  # torch-fidelity, which holds the network, may be what is missing
            raise ValueError(f"FID needs torchmetrics: pip install 'entropy_attn[paper]' ({error})") from error
        self.clip, self.processor = load_clip() if clip is None else clip
        self._reference: torch.Tensor | None = None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.inception((part * 255).byte()) for part in rgb(images).split(BATCH)])

    def measure(self, images: torch.Tensor, numbers: Sequence[int]) -> Measured:
        return Measured(self.features(images), torch.cat([
            self.clip_scores(images[start : start + BATCH], numbers[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]))  # fmt: skip

    @torch.no_grad()
    def clip_scores(self, images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The cosine of every image with its prompt, (n,)."""
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        text = self.processor(text=prompts, padding=True, truncation=True, return_tensors="pt")
        pixels = self.processor(images=list((rgb(images) * 255).byte()), return_tensors="pt")
        embedded = self.clip(input_ids=text["input_ids"], attention_mask=text["attention_mask"], **pixels)
        return torch.nn.functional.cosine_similarity(embedded.image_embeds, embedded.text_embeds)

    def reference(self, size: Size) -> torch.Tensor:
        """The reference images' features; the paper compares all sizes with the same images."""
        if not self.files:
            raise ValueError("FID needs --references, a folder of images")
        if self._reference is None:
            self._reference = torch.cat([self.features(read_image(file)[None]) for file in self.files])
        return self._reference


def load_clip() -> tuple[Any, Any]:
    """CLIP and its processor. Raises ValueError where they cannot be had."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{CLIP} cannot be loaded for the CLIP score: {str(error).splitlines()[0]}") from error


def rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name. Raises ValueError where there are not at least two."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in suffixes) if folder.is_dir() else []
    if len(files) < 2:
        raise ValueError(f"--references: {folder} has {len(files)} images, a distance needs at least 2")
    return files


def summary(judge: ImageJudge, size: Size, measured: Measured, original: Measured | None) -> dict[str, Any]:
    """Distance and mean score with 95 % intervals over the images; with `original`, those of the paired changes."""
    reference = judge.reference(size)
    count = len(measured.features)

    def distance(of: Measured, chosen: torch.Tensor) -> float:
        return frechet_distance(of.features[chosen], reference)

    everything = torch.arange(count)
    row = {
        "images": count,
        "distance": distance(measured, everything),
        "distance_interval": bootstrap(lambda i: distance(measured, i), count, 100, biased=True),
        "score": measured.scores.mean().item(),
        "score_interval": bootstrap(lambda i: measured.scores[i].mean().item(), count),
    }
    if original is not None:
        difference = measured.scores - original.scores
        row["distance_change"] = row["distance"] - distance(original, everything)
        row["distance_change_interval"] = bootstrap(
            lambda i: distance(measured, i) - distance(original, i), count, 100, biased=True
        )
        row["score_change"] = difference.mean().item()
        row["score_change_interval"] = bootstrap(lambda i: difference[i].mean().item(), count)
    return row
