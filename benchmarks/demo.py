"""A diffusion pipeline trained at one size, sampled at others: with its original scale, and with λ.

The pipeline is small (see glyphs/) and draws digits. What the table and the picture show is real, and of this small
model: entropy against ln N (Fig. 5 of Jin et al., NeurIPS 2023), entropy by layer (Fig. 6), and how well the digits
come out. The Frechet distance is between features of our own recogniser, to 4000 digits rendered at the size; lower is
better.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is imported

import torch

try:
    import numpy as np
    from evaluation.figures import fit
    from glyphs.evaluate import Judge, digits, draw, entropies, mean_entropies
    from glyphs.pipeline import GlyphPipeline
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'entropy_attn[demo]'")
import harness
from metrics import bootstrap, frechet_distance

from entropy_attn.diffusers import EntropyRecord, enable

MODEL = Path(__file__).parent / "glyphs" / "model"
SIZES = ((16, 16), (24, 16), (24, 24), (36, 24), (32, 32))  # height, width
SHOWN = 10  # images of each size in the picture
WAYS = {"original, 1/√d": None, "λ = √(log$_T$ N / d)": {}}


class Outcome(NamedTuple):
    """One size with one scale: features (n, F), which images were recognised (n,), the first images, and entropies."""

    features: torch.Tensor
    recognised: torch.Tensor
    shown: torch.Tensor
    record: EntropyRecord


def sample(pipe: GlyphPipeline, judge: Judge, size: tuple[int, int], count: int, options: dict | None) -> Outcome:
    if options is None:
        images = draw(pipe, size, count)
    else:
        with enable(pipe, **options):
            images = draw(pipe, size, count)
    features, read = judge.read(images)
    return Outcome(features, read == digits(0, count), images[:SHOWN], entropies(pipe, size, options))


def verdict(judge: Judge, size: tuple[int, int], original: Outcome, adapted: Outcome) -> str:
    """What the Frechet distance says, with the 95 % interval of its change over the images, which share their seeds."""
    reference = judge.reference(size)

    def change(chosen: torch.Tensor) -> float:
        return frechet_distance(adapted.features[chosen], reference) - frechet_distance(
            original.features[chosen], reference
        )

    low, high = bootstrap(change, len(original.features), 100, biased=True)
    word = "helped" if high < 0 else "hurt" if low > 0 else "no difference to be seen"
    return f"{word} ({low:+.1f} to {high:+.1f})"


def row_of(judge: Judge, size: tuple[int, int], trained: bool, original: Outcome, adapted: Outcome) -> list[str]:
    reference = judge.reference(size)
    before, after = (mean_entropies(outcome.record) for outcome in (original, adapted))

    def arrow(form: str, *values: float) -> str:
        return " → ".join(format(value, form) for value in values)

    return [
        f"{size[0]} x {size[1]}",
        ", ".join(str(N) for N in before["tokens"]),
        arrow(".1f", *(frechet_distance(outcome.features, reference) for outcome in (original, adapted))),
        "the same by definition" if trained else verdict(judge, size, original, adapted),
        arrow(".0f", *(100 * outcome.recognised.float().mean().item() for outcome in (original, adapted))),
        ", ".join(arrow(".2f", *pair) for pair in zip(before["entropy"], after["entropy"], strict=True)),
    ]


def picture(outcomes: dict[tuple[int, int], tuple[Outcome, Outcome]], trained: tuple[int, int], path: Path) -> None:
    plt = harness.pyplot()
    figure = plt.figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    draw_images(left, outcomes, trained)
    above, below = right.subplots(2, 1)
    draw_fits(above, outcomes)
    draw_layers(below, outcomes, trained)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_images(figure: Any, outcomes: dict, trained: tuple[int, int]) -> None:
    """A row of images for each size and scale, all in the same proportion to the pixels."""
    shown = [
        (size, way, outcome)
        for size, pair in outcomes.items()
        for way, outcome in zip(WAYS, pair if size != trained else pair[:1], strict=False)
    ]
    heights = [size[0] for size, _, _ in shown]
    for axes, (size, way, outcome) in zip(figure.subplots(len(shown), 1, height_ratios=heights), shown, strict=True):
        strip = torch.nn.functional.pad(outcome.shown[:, 0], (1, 1), value=0.5)
        axes.imshow(torch.cat(list(strip), 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[], frame_on=False)
        name = "trained" if size == trained else way.split(",")[0].split(" ")[0]
        axes.set_ylabel(f"{size[0]} x {size[1]}\n{name}", rotation=0, ha="right", va="center")
    figure.suptitle("The same seeds with both scales")


def draw_fits(axes: Any, outcomes: dict) -> None:
    """Mean entropy of the layers at each level of the UNet against ln N, with straight lines (Fig. 5)."""
    tokens: list[int] = []
    for colour, (position, way) in zip(("tab:red", "tab:blue"), enumerate(WAYS), strict=True):
        means = [mean_entropies(pair[position].record) for pair in outcomes.values()]
        for level, marker in zip(range(len(means[0]["tokens"])), "osD^", strict=False):
            N = np.array([mean["tokens"][level] for mean in means])
            entropy = np.array([mean["entropy"][level] for mean in means])
            line = fit(N, entropy)
            label = f"{way}, level {level}: slope {line.slope:.3f}, R² {line.r_squared:.4f}"
            axes.plot(N, entropy, marker, color=colour, label=label)
            ends = np.array([N.min(), N.max()])
            axes.plot(ends, line.slope * np.log(ends) + line.intercept, color=colour, linewidth=1)
            tokens += N.tolist()
    harness.token_axis(axes, tokens)
    axes.set(xlabel="tokens N of a layer", ylabel="mean entropy (nats)", title="Entropy against ln N")
    axes.legend(frameon=False, fontsize=8)


def draw_layers(axes: Any, outcomes: dict, trained: tuple[int, int]) -> None:
    """Entropy of every layer at the trained size, the smallest and the largest, with both scales (Fig. 6)."""
    sizes = sorted(outcomes, key=lambda size: size[0] * size[1])
    for colour, size in zip(("tab:green", "tab:gray", "tab:purple"), (sizes[0], trained, sizes[-1]), strict=True):
        for style, (position, way) in zip(("-", "--"), enumerate(WAYS), strict=True):
            if size == trained and position:
                continue
            rows = outcomes[size][position].record.table(by=("layer",))
            label = f"{size[0]} x {size[1]}, {'trained' if size == trained else way.split(',')[0].split(' ')[0]}"
            axes.plot([row["entropy"] for row in rows], style, color=colour, marker="o", label=label)
    axes.set(xlabel="self-attention layer, in order", ylabel="mean entropy (nats)", title="Entropy of every layer")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a glyph pipeline (default: our own)")
    parser.add_argument("--count", type=int, default=100, help="images of each size and scale (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.count < 20:
        parser.error(f"--count must be at least 20, for a distance of any meaning, got {arguments.count}")
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {arguments.out.absolute().parent}")
    if not (arguments.model / "model_index.json").is_file():
        parser.error(f"--model: no pipeline in {arguments.model}")
    started = time.perf_counter()
    pipe = GlyphPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    trained = (pipe.train_size, pipe.train_size)
    judge = Judge()
    outcomes = {}
    for size in tqdm(SIZES, desc="sizes"):
        original = sample(pipe, judge, size, arguments.count, None)
        at_trained = size == trained
        adapted = original if at_trained else sample(pipe, judge, size, arguments.count, WAYS[list(WAYS)[1]])
        outcomes[size] = (original, adapted)
    header = ["height x width", "N", "Frechet distance", "λ (95 % of the change)", "recognised (%)", "entropy (nats)"]
    rows = [row_of(judge, size, size == trained, *pair) for size, pair in outcomes.items()]
    print(f"\n{arguments.count} images of each size, original → λ\n\n{harness.markdown(header, rows)}\n")
    picture(outcomes, trained, arguments.out)
    print(f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}")


if __name__ == "__main__":
    main()
