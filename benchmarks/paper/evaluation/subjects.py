"""The models under test, behind one interface: their sizes, and how they draw images of given numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from emojis.pipeline import EmojiPipeline
from emojis.prompts import numbered
from glyphs import data
from glyphs.pipeline import GlyphPipeline
from multidiffusion import with_multidiffusion
from pixels import PixelPipeline

from entropy_attn.diffusers import Calibration, EntropyRecord, calibration_from, enable

Size = tuple[int, int]  # width, height: the paper's order
# The argument of from_pretrained. Since Diffusers 0.40 it is `dtype`, and `torch_dtype` raises a FutureWarning.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
GLYPHS, EMOJIS = (Path(__file__).parent.parent / name / "model" for name in ("glyphs", "emojis"))
GLYPH_SIZES = ((16, 16), (20, 20), (28, 28), (32, 32), (36, 36), (16, 24), (24, 16), (24, 36), (36, 24), (24, 24))
EMOJI_SIZES = ((32, 32), (48, 48), (80, 80), (96, 96), (32, 64), (64, 32), (64, 96), (96, 64), (64, 64))
SD_SIZES = ((128, 128), (224, 224), (384, 384), (448, 448), (512, 512), (768, 768), (512, 288), (512, 384))
LDM_SIZES = ((128, 128), (224, 224), (256, 256), (384, 384), (256, 144), (256, 192))


@dataclass(frozen=True)
class Known:
    """A model of the paper: its hub id, its key in published.py, the sizes to measure, and its trained size."""

    path: str
    family: str
    sizes: tuple[Size, ...]
    train_size: Size


KNOWN = {
    "sd21": Known("stabilityai/stable-diffusion-2-1-base", "sd", SD_SIZES, (512, 512)),
    "sd15": Known("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd", SD_SIZES, (512, 512)),
    "ldm": Known("CompVis/ldm-text2im-large-256", "ldm", LDM_SIZES, (256, 256)),
}


@dataclass
class Subject:
    """A pipeline that draws image number n from seed n.

    Up to rounding, an image is the same in any batch. The exception is entropy matching, which follows the mean entropy
    of the batch.
    """

    name: str
    pipe: Any
    train_size: Size
    sizes: tuple[Size, ...]
    multiple: int  # width and height must be multiples of this, in pixels
    call: Callable[[list[int]], dict[str, Any]]  # from image numbers to arguments of the pipeline
    family: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # arguments of every call
    smallest: int = 1  # of width and height, in pixels
    bits: int = 8  # of the files of its images
    one_step: bool = False  # whether there is no step before another, whose entropy matching could follow

    def draw(self, size: Size, numbers: Sequence[int], settings: dict[str, Any] | None) -> torch.Tensor:
        """Images (n, C, H, W) in [0, 1]. `settings` are arguments of `enable`; None draws without the adapter."""
        if settings is None:
            return self._draw(size, list(numbers))
        with enable(self.pipe, train_size=self.train_size[::-1], **settings):
            return self._draw(size, list(numbers))

    def _draw(self, size: Size, numbers: list[int]) -> torch.Tensor:
        generators = [torch.Generator(self.pipe.device).manual_seed(number) for number in numbers]
        arguments = {"width": size[0], "height": size[1], "generator": generators, **self.options, **self.call(numbers)}
        images = self.pipe(**arguments, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()

    def draw_resized(self, size: Size, numbers: Sequence[int]) -> torch.Tensor:
        """Images drawn at the trained size and resized, (n, C, H, W) in [0, 1]."""
        images = self.draw(self.train_size, numbers, None)
        return torch.nn.functional.interpolate(images, size[::-1], mode="bilinear", antialias=True).clamp(0, 1)

    def check_multidiffusion(self) -> None:
        """Raises ValueError where there is no MultiDiffusion for the pipeline."""
        from diffusers import StableDiffusionPipeline  # imported here: it imports transformers

        if not isinstance(self.pipe, (PixelPipeline, StableDiffusionPipeline)):
            raise ValueError(
                "MultiDiffusion takes an embedded pipeline or a StableDiffusionPipeline, "
                f"{self.name} is a {type(self.pipe).__name__}"
            )

    def with_multidiffusion(self) -> Subject:
        """The same model with MultiDiffusion. Raises ValueError where there is none for the pipeline."""
        from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline

        self.check_multidiffusion()
        if isinstance(self.pipe, PixelPipeline):
            return replace(self, pipe=with_multidiffusion(self.pipe))
        components = dict(self.pipe.components)
        components["scheduler"] = DDIMScheduler.from_config(self.pipe.scheduler.config)
        pipe = StableDiffusionPanoramaPipeline(**components, requires_safety_checker=False).to(self.pipe.device)
        pipe.set_progress_bar_config(disable=True)
        return replace(self, pipe=pipe)

    @property
    def guided(self) -> bool:
        """Whether images are drawn with classifier-free guidance."""
        default = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        return self.options.get("guidance_scale", default) != 1

    def entropies(
        self, size: Size, numbers: Sequence[int], settings: dict[str, Any] | None, batch: int
    ) -> EntropyRecord:
        """The record of entropies while images of these numbers are drawn, `batch` at a time."""
        record = EntropyRecord()
        settings = {**({"exponent": 0} if settings is None else settings), "record_entropy": record}
        for start in range(0, len(numbers), batch):
            self.draw(size, numbers[start : start + batch], settings)
        return record

    def calibrate(self, numbers: Sequence[int], batch: int) -> Calibration:
        """The calibration: every layer's mean entropy at the trained size, from images of these numbers."""
        record = self.entropies(self.train_size, numbers, None, batch)
        return calibration_from(self.pipe, record, train_size=self.train_size[::-1])

    def fingerprint(self) -> str:
        """A checksum of the denoiser's weights: the sum of their absolute values."""
        return f"{sum(parameter.double().abs().sum().item() for parameter in denoiser(self.pipe).parameters()):.9e}"

    def check_sizes(self, sizes: Sequence[Size]) -> None:
        """Raises ValueError for a size the pipeline cannot draw."""
        for width, height in sizes:
            if min(width, height) <= 0 or width % self.multiple or height % self.multiple:
                raise ValueError(
                    f"{self.name} draws sizes in multiples of {self.multiple} pixels, got {width}x{height}"
                )
            if min(width, height) < self.smallest:
                raise ValueError(f"{self.name} is judged from {self.smallest} pixels on, got {width}x{height}")


def denoiser(pipe: Any) -> torch.nn.Module:
    """The UNet or the transformer of a pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


def glyphs(folder: Path = GLYPHS, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Subject:
    """The embedded pipeline of digits; `options` are arguments of every call. Raises as `embedded`."""

    def call(numbers: list[int]) -> dict[str, Any]:
        return {"labels": data.digits(numbers)}

    return embedded("glyphs", GlyphPipeline, GLYPH_SIZES, call, folder, device, dtype, options)


def emojis(folder: Path = EMOJIS, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Subject:
    """The embedded pipeline of emoji; `options` are arguments of every call. Raises as `embedded`."""

    def call(numbers: list[int]) -> dict[str, Any]:
        return {"prompt": [numbered(number) for number in numbers]}

    return embedded("emojis", EmojiPipeline, EMOJI_SIZES, call, folder, device, dtype, options)


def embedded(
    name: str,
    kind: type[PixelPipeline],
    sizes: tuple[Size, ...],
    call: Callable[[list[int]], dict[str, Any]],
    folder: Path,
    device: str,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Subject:
    """The subject of an embedded pipeline. Raises ValueError if the folder has no pipeline."""
    if not (folder / "model_index.json").exists():
        train = f"python benchmarks/paper/{name}/train.py --out {folder}"
        raise ValueError(f"no pipeline of {name} in {folder}: train one with `{train}`")
    pipe = kind.from_pretrained(folder, **{DTYPE: dtype}).to(device)
    pipe.set_progress_bar_config(disable=True)
    return Subject(name, pipe, (pipe.train_size, pipe.train_size), sizes, pipe.multiple, call, options=options)


def text_to_image(
    name: str,
    prompts: Sequence[str],
    device: str,
    dtype: torch.dtype,
    train_size: Size | None = None,
    **options: Any,
) -> Subject:
    """A model of the paper by its short name, or any text-to-image pipeline by path or hub id.

    Raises:
        ValueError: it cannot be loaded, takes no prompt, or its trained size is unknown.
    """
    known = KNOWN.get(name)
    path = known.path if known else name
    try:
        pipe = DiffusionPipeline.from_pretrained(path, **{DTYPE: dtype})
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be loaded (a local folder, or a hub id with a network): {reason}") from error
    return text_subject(name, pipe.to(device), prompts, train_size, **options)


def text_subject(
    name: str, pipe: Any, prompts: Sequence[str], train_size: Size | None = None, **options: Any
) -> Subject:
    """The subject of a loaded text-to-image pipeline. Raises as `text_to_image`."""
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{name} is a {type(pipe).__name__}, which draws from no prompt")
    pipe.set_progress_bar_config(disable=True)
    known = KNOWN.get(name)
    factor = getattr(pipe, "vae_scale_factor", 8)
    train_size = train_size or (known.train_size if known else trained_size(name, pipe, factor))
    width, height = train_size
    # From 1/2 to 3/2 of the trained width and height, and two sizes of another aspect ratio.
    shares = ((2, 2), (3, 3), (4, 4), (6, 6), (4, 3), (6, 4))
    others = tuple((width * n // 4 // 64 * 64, height * m // 4 // 64 * 64) for n, m in shares)
    return Subject(
        name, pipe, train_size, known.sizes if known else others, factor,
        lambda numbers: {"prompt": [prompts[number % len(prompts)] for number in numbers]},
        known.family if known else None, options,
    )  # fmt: skip


def trained_size(name: str, pipe: Any, factor: int) -> Size:
    """The trained size in the denoiser's config. Raises ValueError if the config has none."""
    size = getattr(denoiser(pipe).config, "sample_size", None)
    if size is None:
        raise ValueError(f"{name} does not say which size it was trained at: give --train-size")
    height, width = (size, size) if isinstance(size, int) else size
    return width * factor, height * factor
