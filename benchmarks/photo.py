"""Attention entropy of a photograph at the paper's sizes, with the original scale and with λ (the paper's Fig. 5).

A real photograph, cut to each size, becomes tokens of 8 x 8 pixels, as many as Stable Diffusion's latents have.
Multi-head self-attention runs over them with one fixed set of seeded random projections at every size: the photograph
is real, the weights are not trained. What is measured is how entropy follows the number of tokens, not image quality.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import entropy_attn

try:
    import matplotlib
    import numpy as np
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_image
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'entropy_attn[demo]'")

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH = 8
HEADS, HEAD_DIM = 8, 64
COMPONENTS, OCTAVES = 16, 2  # features of a token: principal components of its pixels, and sines of its position
GAIN, SIMILARITY = 0.3, 0.5  # how peaked the attention is, and how much keys resemble queries
SIZES = "224x224,384x384,448x448,512x512,768x768,512x288,512x384"


class Row(NamedTuple):
    """One size: tokens, λ over the original scale, and the entropy in nats of every head and token, both ways."""

    width: int
    height: int
    N: int
    multiplier: float
    original: torch.Tensor  # (HEADS, N)
    adapted: torch.Tensor  # (HEADS, N)


def load_photo(name: str) -> Image.Image:
    if name in ("china", "flower"):
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    return Image.open(name).convert("RGB")


def patches(photo: Image.Image, width: int, height: int) -> torch.Tensor:
    """The photograph cropped and resized, as tokens (N, PATCH * PATCH * 3) in reading order."""
    pixels = np.asarray(ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    h, w = height // PATCH, width // PATCH
    return torch.from_numpy(pixels).view(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, -1)


def positions(width: int, height: int) -> torch.Tensor:
    """Sines and cosines of the relative position in the image, (N, 4 * OCTAVES)."""
    h, w = height // PATCH, width // PATCH
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    angles = torch.stack([y.flatten(), x.flatten()], 1)[:, :, None] * 2.0 ** torch.arange(OCTAVES) * math.pi
    return torch.cat([angles.sin(), angles.cos()], 1).flatten(1) * math.sqrt(2)


class Layer:
    """A self-attention layer with fixed projections; the pixels are whitened as at the trained size."""

    def __init__(self, trained: torch.Tensor, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        features = COMPONENTS + 4 * OCTAVES
        self.device = device
        self.mean = trained.mean(0)
        _, spread, directions = torch.linalg.svd(trained - self.mean, full_matrices=False)
        self.whiten = directions[:COMPONENTS].T * (math.sqrt(len(trained)) / spread[:COMPONENTS])
        self.to_query, other, self.to_value = GAIN * torch.randn(3, features, HEADS * HEAD_DIM, generator=generator)
        self.to_key = SIMILARITY * self.to_query + math.sqrt(1 - SIMILARITY**2) * other

    def project(self, photo: Image.Image, width: int, height: int) -> list[torch.Tensor]:
        """query, key and value, (1, N, HEADS, HEAD_DIM)."""
        x = torch.cat([(patches(photo, width, height) - self.mean) @ self.whiten, positions(width, height)], 1)
        x = torch.nn.functional.layer_norm(x, x.shape[1:])
        weights = (self.to_query, self.to_key, self.to_value)
        return [(x @ weight).view(1, -1, HEADS, HEAD_DIM).to(self.device) for weight in weights]


def measure(photo: Image.Image, sizes: list[tuple[int, int]], trained: tuple[int, int], device: str) -> list[Row]:
    layer = Layer(patches(photo, *trained), device)
    T = trained[0] // PATCH * (trained[1] // PATCH)
    rows = []
    for width, height in tqdm(sizes, desc="sizes", file=sys.stderr):
        qkv = layer.project(photo, width, height)
        N = qkv[0].shape[1]
        both = [
            entropy_attn.attention(*qkv, layout="bnhd", return_entropy=True, train_tokens=t).entropy[0].cpu()
            for t in (None, T)
        ]
        multiplier = entropy_attn.entropy_scale(N, T, HEAD_DIM) * math.sqrt(HEAD_DIM)
        rows.append(Row(width, height, N, multiplier, *both))
    print(entropy_attn.explain(*qkv, layout="bnhd", return_entropy=True, train_tokens=T))
    return rows


class Fit(NamedTuple):
    slope: float
    intercept: float
    r2: float

    def __str__(self) -> str:
        return f"{self.slope:.3f} ln N {self.intercept:+.3f}   R² {self.r2:.4f}"


def fit(rows: list[Row], means: list[float]) -> Fit:
    """Least squares of entropy against ln N."""
    x, y = np.log([row.N for row in rows]), np.array(means)
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    return Fit(slope, intercept, 1 - residual.var() / y.var())


def report(rows: list[Row], trained: tuple[int, int]) -> tuple[Fit, Fit]:
    """Print the table, the two fits, and what λ did."""
    original, adapted = means(rows)
    at_T = next(e for row, e in zip(rows, original, strict=True) if (row.width, row.height) == trained)
    print(f"\n{'size':>9} {'N':>6} {'λ/λ0':>7} {'entropy':>9} {'with λ':>9} {'off T':>9} {'with λ':>9}   (nats)")
    for row, e0, e1 in zip(rows, original, adapted, strict=True):
        size = f"{row.width}x{row.height}"
        print(
            f"{size:>9} {row.N:>6} {row.multiplier:>7.4f} {e0:>9.4f} {e1:>9.4f} {e0 - at_T:>+9.4f} {e1 - at_T:>+9.4f}"
        )
    fits = fit(rows, original), fit(rows, adapted)
    print(f"\nentropy, original = {fits[0]}\nentropy, with λ   = {fits[1]}")
    before, after = (sum(abs(e - at_T) for e in series) for series in (original, adapted))
    print(f"λ changes the mean distance from the entropy at T by {100 * (after / before - 1):+.1f} %")
    return fits


def means(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.original.mean().item() for row in rows], [row.adapted.mean().item() for row in rows]


def draw(rows: list[Row], fits: tuple[Fit, Fit], photo: Image.Image, trained: tuple[int, int], path: Path) -> None:
    """Entropy against ln N with its fits, and maps of it over the image at the smallest, trained and largest size."""
    figure = plt.figure(figsize=(15, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.55))
    draw_fits(left.subplots(), rows, fits, trained)
    by_size = sorted(rows, key=lambda row: row.N)
    shown = [by_size[0], next(row for row in rows if (row.width, row.height) == trained), by_size[-1]]
    draw_maps(right, shown, photo)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_fits(axes, rows: list[Row], fits: tuple[Fit, Fit], trained: tuple[int, int]) -> None:
    line = np.array([min(row.N for row in rows) / 1.15, max(row.N for row in rows) * 1.15])
    names = ("original 1/√d", "λ = √(log_T N / d)")
    for colour, name, series, f in zip(("tab:red", "tab:blue"), names, means(rows), fits, strict=True):
        for square, marker in ((True, "o"), (False, "D")):
            chosen = [(r.N, e) for r, e in zip(rows, series, strict=True) if (r.width == r.height) == square]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, color=colour, ms=7, alpha=0.8)
        label = f"{name}: slope {f.slope:.3f}, R² {f.r2:.4f}"
        axes.plot(line, f.slope * np.log(line) + f.intercept, color=colour, label=label)
    T = next(row.N for row in rows if (row.width, row.height) == trained)
    axes.axvline(T, color="grey", ls=":", label=f"T = {T} tokens (trained size)")
    axes.set_xscale("log")
    ticks: list[int] = []
    for N in sorted({row.N for row in rows}):  # without those whose labels would overlap
        if not ticks or 1.1 * ticks[-1] < N:
            ticks.append(N)
    axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="tokens N (diamonds: not square)", ylabel="mean attention entropy (nats)")
    axes.set_title("Entropy grows with ln N; λ works against it")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)


def draw_maps(figure, shown: list[Row], photo: Image.Image) -> None:
    grid = figure.subplots(2, len(shown) + 1)
    maps = [e.mean(0).view(r.height // PATCH, -1) for r in shown for e in (r.original, r.adapted)]
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    grid[0, 0].imshow(ImageOps.fit(photo, (shown[1].width, shown[1].height), Image.Resampling.LANCZOS))
    grid[0, 0].set_title("the photograph")
    grid[1, 0].set_visible(False)
    for column, row in enumerate(shown, 1):
        for axes, name, entropy in zip(grid[:, column], ("original", "λ"), (row.original, row.adapted), strict=True):
            image = entropy.mean(0).view(row.height // PATCH, -1)
            drawn = axes.imshow(image, vmin=low, vmax=high, cmap="viridis")
            axes.set_title(f"{row.width}x{row.height}, {name}: {image.mean():.2f}", fontsize=10)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(drawn, ax=grid[:, 1:], label="entropy of the token's attention, mean of heads (nats)", shrink=0.9)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", word.strip())
        width, height = (int(n) for n in match.groups()) if match else (0, 0)
        if min(width, height) < 2 * PATCH or width % PATCH or height % PATCH:
            raise argparse.ArgumentTypeError(
                f"got {word.strip()!r}, allowed is WIDTHxHEIGHT in multiples of {PATCH} from {2 * PATCH}"
            )
        sizes.append((width, height))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", default="china", help="china, flower (both ship with scikit-learn), or a file")
    parser.add_argument("--sizes", type=parse_sizes, default=SIZES, help="WIDTHxHEIGHT,... (default: %(default)s)")
    parser.add_argument("--train-size", type=parse_sizes, default="512x512", help="the size T belongs to")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    trained = arguments.train_size[0]
    sizes = list(dict.fromkeys([*arguments.sizes, trained]))
    if len(sizes) < 3:
        parser.error("--sizes: a fit needs at least 3 different sizes, the trained one included")
    try:
        photo = load_photo(arguments.photo)
    except OSError as error:
        parser.error(f"--photo: {error}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    with torch.inference_mode():
        rows = measure(photo, sizes, trained, device)
    fits = report(rows, trained)
    draw(rows, fits, photo, trained, arguments.out)
    print(f"{time.perf_counter() - started:.1f} s on {device}; wrote {arguments.out}")


if __name__ == "__main__":
    main()
