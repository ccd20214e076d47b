"""Attention entropy of a photograph at the paper's sizes, with the original scale and with λ (the paper's Fig. 5).

A real photograph, cut to each size, becomes tokens of 8 x 8 pixels, as many as Stable Diffusion's latents have.
Multi-head self-attention runs over them with one fixed set of seeded random projections at every size: the photograph
is real, the weights are not trained. What is measured is how entropy follows the number of tokens, not image quality.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Threads that spin while they wait bring CPU attention to a crawl as soon as another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is imported

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


def measure(
    photo: Image.Image, sizes: list[tuple[int, int]], trained: tuple[int, int], device: str
) -> tuple[list[Row], entropy_attn.Explanation]:
    """A row for each size, and how `attention` ran the last one."""
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
    return rows, entropy_attn.explain(*qkv, layout="bnhd", return_entropy=True, train_tokens=T)


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
    at_T = original[rows.index(at_size(rows, trained))]
    print(f"\n{'':>25}  {'entropy (nats)':^19}  {'minus that at T':^19}")
    print(f"{'size':>9} {'N':>6} {'λ/λ0':>8}  {'original':>9} {'λ':>9}  {'original':>9} {'λ':>9}")
    for row, e0, e1 in zip(rows, original, adapted, strict=True):
        size = f"{row.width}x{row.height}"
        entropies = f"{e0:>9.4f} {e1:>9.4f}  {e0 - at_T:>+9.4f} {e1 - at_T:>+9.4f}"
        print(f"{size:>9} {row.N:>6} {row.multiplier:>8.4f}  {entropies}")
    fits = fit(rows, original), fit(rows, adapted)
    print(f"\nentropy, original = {fits[0]}\nentropy, with λ   = {fits[1]}")
    before, after = (sum(abs(e - at_T) for e in series) / (len(rows) - 1) for series in (original, adapted))
    verb = "reduced" if after < before else "increased"
    share = 100 * abs(after / before - 1)
    print(f"λ {verb} the mean distance from the entropy at T by {share:.1f} %: {before:.4f} to {after:.4f} nats")
    return fits


def at_size(rows: list[Row], size: tuple[int, int]) -> Row:
    return next(row for row in rows if (row.width, row.height) == size)


def means(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.original.mean().item() for row in rows], [row.adapted.mean().item() for row in rows]


def draw(rows: list[Row], fits: tuple[Fit, Fit], photo: Image.Image, trained: tuple[int, int], path: Path) -> None:
    """Entropy against ln N with its fits, and maps of it over the image at the smallest, trained and largest size."""
    figure = plt.figure(figsize=(16, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.85))
    draw_fits(left.subplots(), rows, fits, trained)
    by_size = sorted(rows, key=lambda row: row.N)
    ends = {row.N: row for row in (by_size[0], by_size[-1], at_size(rows, trained))}
    shown = [ends[N] for N in sorted(ends)]
    draw_maps(right, shown, photo, trained)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_fits(axes, rows: list[Row], fits: tuple[Fit, Fit], trained: tuple[int, int]) -> None:
    line = np.array([min(row.N for row in rows) / 1.15, max(row.N for row in rows) * 1.15])
    names = ("original, 1/√d", "λ = √(log$_T$ N / d)")
    for colour, name, series, f in zip(("tab:red", "tab:blue"), names, means(rows), fits, strict=True):
        for square, marker in ((True, "o"), (False, "D")):
            chosen = [(r.N, e) for r, e in zip(rows, series, strict=True) if (r.width == r.height) == square]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, mfc=colour if square else "white", mec=colour, ms=7)
        label = f"{name}: slope {f.slope:.3f}, R² {f.r2:.4f}"
        axes.plot(line, f.slope * np.log(line) + f.intercept, color=colour, zorder=1, label=label)
    axes.axvline(at_size(rows, trained).N, color="grey", ls=":", label=f"T = {at_size(rows, trained).N}, trained size")
    for marker, fill, label in (("o", "grey", "square"), ("D", "white", "not square")):
        axes.plot([], [], marker, mfc=fill, mec="grey", label=label)
    axes.set_xscale("log")
    ticks: list[int] = []
    for N in sorted({row.N for row in rows}):  # without those whose labels would overlap
        if not ticks or 1.1 * ticks[-1] < N:
            ticks.append(N)
    axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set(xlabel="tokens N (log scale)", ylabel="mean attention entropy (nats)")
    axes.set_title("Attention entropy against ln N")
    axes.legend(loc="best", fontsize=9)
    axes.grid(alpha=0.3)


def draw_maps(figure, shown: list[Row], photo: Image.Image, trained: tuple[int, int]) -> None:
    """The photograph, then a column for each size: entropy with the original scale above, with λ below."""
    names = ("original", "λ")
    grid = figure.subplot_mosaic([["photo", *(f"{name} {row.N}" for row in shown)] for name in names])
    maps = {
        f"{name} {row.N}": e.mean(0).view(row.height // PATCH, -1)
        for row in shown
        for name, e in zip(names, (row.original, row.adapted), strict=True)
    }
    low, high = np.quantile(torch.cat([m.flatten() for m in maps.values()]).numpy(), (0.005, 0.995))
    for name, entropy in maps.items():
        drawn = grid[name].imshow(entropy, vmin=low, vmax=high, cmap="viridis")
        grid[name].set_xlabel(f"mean {entropy.mean():.2f} nats")
    for row in shown:
        grid[f"original {row.N}"].set_title(f"{row.width}x{row.height}, N = {row.N}")
    for name, label in zip(names, ("original, 1/√d", "λ = √(log$_T$ N / d)"), strict=True):
        grid[f"{name} {shown[0].N}"].set_ylabel(label)
    grid["photo"].imshow(ImageOps.fit(photo, trained, Image.Resampling.LANCZOS))
    grid["photo"].set_title("the photograph")
    for axes in grid.values():
        axes.set(xticks=[], yticks=[])
    label = "entropy of a token's attention, mean of heads (nats)"
    figure.colorbar(drawn, ax=[grid[name] for name in maps], label=label, extend="both", shrink=0.9)


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
    if len(arguments.train_size) > 1:
        parser.error("--train-size: one size, WIDTHxHEIGHT")
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {arguments.out.absolute().parent}")
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
        rows, explanation = measure(photo, sizes, trained, device)
    fits = report(rows, trained)
    print(f"\n{explanation}")
    draw(rows, fits, photo, trained, arguments.out)
    print(f"{time.perf_counter() - started:.1f} s on {device}; wrote {arguments.out}")


if __name__ == "__main__":
    main()
