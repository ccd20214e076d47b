"""A diffusion pipeline trained at one size draws at five sizes, with its original scale and with λ.

The pipeline is small and draws digits (see glyphs/). The table and the picture show measurements of this model: entropy
against ln N (Fig. 5 of Jin et al., NeurIPS 2023), entropy of each layer (Fig. 6), and the quality of the digits. The
quality is a Frechet distance to 4000 digits rendered at the same size, between features of the recogniser in glyphs/;
lower is better.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where harness.py is

import torch

try:
    from diffusers.utils import logging
    from evaluation import figures
    from evaluation.judges import GlyphJudge, distance_row
    from evaluation.subjects import GLYPHS, Size, Subject, glyphs
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'entropy_attn[demo]'")
import harness
import results

from entropy_attn.entropy import EntropyRecord, plots

SIZES: tuple[Size, ...] = ((16, 16), (16, 24), (24, 24), (24, 36), (32, 32))
RECORDED = 20  # images whose entropy is recorded: two of each digit
BATCH = 50
SHOWN = 10  # images of each size and scale in the picture
WAYS = {"original, 1/√d": None, "λ = √(log$_T$ N / d)": {}}


class Outcome(NamedTuple):
    """What one size and one scale give: features (n, F), scores in per cent (n,), the first images, and entropies."""

    features: torch.Tensor
    scores: torch.Tensor
    shown: torch.Tensor
    record: EntropyRecord


def sample(subject: Subject, judge: GlyphJudge, size: Size, count: int, settings: dict | None) -> Outcome:
    numbers = range(count)
    images = torch.cat([subject.draw(size, numbers[i : i + BATCH], settings) for i in range(0, count, BATCH)])
    record = subject.entropies(size, range(RECORDED), settings, RECORDED)
    return Outcome(judge.features(images), judge.scores(images, numbers), images[:SHOWN], record)


def mean_entropies(record: EntropyRecord) -> dict[int, float]:
    """N -> the mean entropy of the layers with N tokens; largest N first."""
    return dict(sorted(plots.mean_entropy(record.table(by=("layer",)), "tokens").items(), reverse=True))


def verdict(low: float, high: float) -> str:
    """What λ did, by the 95 % interval of the paired change of the Frechet distance."""
    word = "helped" if high < 0 else "hurt" if low > 0 else "no difference to be seen"
    return f"{word} ({low:+.1f} to {high:+.1f})"


def row_of(judge: GlyphJudge, size: Size, trained: bool, original: Outcome, adapted: Outcome) -> list[str]:
    before, after = (mean_entropies(outcome.record) for outcome in (original, adapted))
    distance = distance_row(judge.reference(size), adapted.features, original.features)

    def arrow(form: str, *values: float) -> str:
        return " → ".join(format(value, form) for value in values)

    return [
        f"{size[0]} x {size[1]}",
        ", ".join(str(N) for N in before),
        arrow(".1f", distance["value"] - distance["change"], distance["value"]),
        "the same by definition" if trained else verdict(*distance["change_interval"]),
        arrow(".0f", original.scores.mean().item(), adapted.scores.mean().item()),
        ", ".join(arrow(".2f", before[N], after[N]) for N in before),
    ]


def picture(outcomes: dict[Size, tuple[Outcome, Outcome]], trained: Size, path: Path) -> None:
    plt = harness.pyplot()
    figure = plt.figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    draw_images(left, outcomes, trained)
    above, below = right.subplots(2, 1)
    draw_fits(above, outcomes)
    draw_layers(below, outcomes, trained)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_images(figure: Any, outcomes: dict, trained: Size) -> None:
    """A row of images for each size and scale. A pixel has the same size in all rows."""
    shown = [
        (size, way, outcome)
        for size, pair in outcomes.items()
        for way, outcome in zip(WAYS, pair if size != trained else pair[:1], strict=False)
    ]
    heights = [size[1] for size, _, _ in shown]
    for axes, (size, way, outcome) in zip(figure.subplots(len(shown), 1, height_ratios=heights), shown, strict=True):
        name = "trained" if size == trained else way.split(",")[0].split(" ")[0]
        figures.draw_strip(axes, f"{size[0]} x {size[1]}\n{name}", outcome.shown)
    figure.suptitle("The same seeds with both scales")


def draw_fits(axes: Any, outcomes: dict) -> None:
    """Mean entropy of the layers at each level of the UNet against ln N, with fitted lines (Fig. 5)."""
    groups = []
    for colour, (position, way) in zip(("tab:red", "tab:blue"), enumerate(WAYS), strict=True):
        means = [mean_entropies(pair[position].record) for pair in outcomes.values()]
        for level, marker in zip(range(len(means[0])), plots.MARKERS, strict=False):
            N, entropy = zip(*(list(mean.items())[level] for mean in means), strict=True)
            look = {"color": colour, "marker": marker, "linewidth": 1}
            groups.append(plots.Points(f"{way}, level {level}", N, entropy, look))
    plots.plot_fits(axes, groups, figures.slope)
    figures.label_tokens(axes, [N for group in groups for N in group.tokens])
    axes.set(xlabel="tokens N of a layer", ylabel="mean entropy (nats)", title="Entropy against ln N")
    axes.legend(frameon=False, fontsize=8)


def draw_layers(axes: Any, outcomes: dict, trained: Size) -> None:
    """Entropy of each layer at the smallest size, the trained one and the largest, with both scales (Fig. 6)."""
    sizes = sorted(outcomes, key=lambda size: size[0] * size[1])
    lines = []
    for colour, size in zip(("tab:green", "tab:gray", "tab:purple"), (sizes[0], trained, sizes[-1]), strict=True):
        for style, (position, way) in zip(("-", "--"), enumerate(WAYS), strict=True):
            if size == trained and position:
                continue
            label = f"{size[0]} x {size[1]}, {'trained' if size == trained else way.split(',')[0].split(' ')[0]}"
            entropy = [row["entropy"] for row in outcomes[size][position].record.table(by=("layer",))]
            lines.append(plots.Line(label, entropy, {"color": colour, "linestyle": style, "marker": "o"}))
    plots.plot_lines(axes, lines)
    axes.set(xlabel="self-attention layer, in order", ylabel="mean entropy (nats)", title="Entropy of every layer")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=GLYPHS, help="folder of a glyph pipeline (default: glyphs/model)")
    parser.add_argument("--count", type=int, default=100, help="images of each size and scale (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.count < 20:
        parser.error(f"--count must be at least 20, for a distance of any meaning, got {arguments.count}")
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {arguments.out.absolute().parent}")
    started = time.perf_counter()
    print(
        f"Drawing {arguments.count} digits of each of {len(SIZES)} sizes with both scales: a minute or two", flush=True
    )
    logging.disable_progress_bar()  # loading takes no time
    try:
        subject = glyphs(arguments.model)
    except ValueError as error:
        parser.error(f"--model: {error}")
    trained, judge = subject.train_size, GlyphJudge()
    outcomes = {}
    for size in tqdm(SIZES, desc="sizes", leave=False, disable=None):  # shown on a terminal only
        original = sample(subject, judge, size, arguments.count, None)
        at_trained = size == trained
        adapted = original if at_trained else sample(subject, judge, size, arguments.count, WAYS[list(WAYS)[1]])
        outcomes[size] = (original, adapted)
    header = ["width x height", "N", "Frechet distance", "λ (95 % of the change)", "recognised (%)", "entropy (nats)"]
    rows = [row_of(judge, size, size == trained, *pair) for size, pair in outcomes.items()]
    print(f"\n{arguments.count} images of each size, original → λ\n\n{results.markdown(header, rows)}\n")
    picture(outcomes, trained, arguments.out)
    print(f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}")


if __name__ == "__main__":
    main()
