"""Prompts and reference images, from files or from a dataset of the `datasets` library.

A dataset is written datasets:NAME:SPLIT:COLUMN, with NAME (a hub id or a folder) and SPLIT (train, train[:5000]) as
`datasets.load_dataset` takes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.images import pixels_of, read_image

DATASET = "datasets:"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPTS = (
    "a photo of a dog on a beach", "a red car in front of a house", "a bowl of fruit on a wooden table",
    "a portrait of an old man with a hat", "a castle on a hill at sunset", "two cats on a sofa",
    "a sailing boat in a storm", "a vase of flowers by a window", "a horse in a field", "a city street at night",
)  # fmt: skip


def read_prompts(source: str | None) -> list[str]:
    """Prompts from a text file with one in each line, from all text files of a folder, or from a dataset.

    Without a source they are PROMPTS. A dataset's column has strings, or lists of strings, of which the first is taken.

    Raises:
        ValueError: the source does not exist, or has no prompt.
    """
    if source is None:
        return list(PROMPTS)
    if source.startswith(DATASET):
        column = _column("--prompts", source)
        lines = [row if isinstance(row, str) or not row else row[0] for row in column]
    else:
        path = Path(source)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        try:
            lines = [line for file in files for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts: {source} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if isinstance(line, str) and line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {source} has no prompt in it")
    return prompts


def open_images(source: str) -> Sequence[Callable[[], torch.Tensor]]:
    """Functions that read one image (C, H, W) in [0, 1] each, from a folder of images or from a dataset.

    Raises:
        ValueError: there are fewer than two images. A function raises ValueError if its image cannot be read.
    """
    if source.startswith(DATASET):
        column = _column("--references", source)
        reads = [lambda i=i: _decoded(source, i, column[i]) for i in range(len(column))]
    else:
        folder = Path(source)
        files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        reads = [lambda file=file: read_image(file) for file in files]
    if len(reads) < 2:
        raise ValueError(f"--references: {source} has {len(reads)} images, a distance needs at least 2")
    return reads


def _column(option: str, source: str) -> Any:
    """The column of a dataset. Its rows are read on access."""
    parts = re.fullmatch(r"datasets:(.+):([^:\[\]]+(?:\[.*\])?):([^:]+)", source)  # a split may be sliced: train[:100]
    if parts is None:
        raise ValueError(f"{option}: got {source}, a dataset is written datasets:NAME:SPLIT:COLUMN")
    name, split, column = parts.groups()
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{option}: {source} needs datasets: pip install 'entropy_attn[paper]'") from error
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # exceptions of datasets and of the hub are of many classes
        raise ValueError(f"{option}: {source} cannot be loaded: {str(error).splitlines()[0]}") from error
    if column not in rows.column_names:
        raise ValueError(f"{option}: {source} has the columns {', '.join(rows.column_names)}, not {column}")
    return rows[column]


def _decoded(source: str, number: int, image: Any) -> torch.Tensor:
    if not hasattr(image, "convert"):
        raise ValueError(f"--references: row {number} of {source} is a {type(image).__name__}, not an image")
    return pixels_of(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
