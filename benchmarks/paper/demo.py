"""A diffusion pipeline trained at one size draws at seven: with its own scale, with λ, and with the best rule known.

The pipeline is small and draws digits (see glyphs/). The quality is a Frechet distance to 4000 digits rendered at the
same size, between features of the recogniser in glyphs/; lower is better. The best rule of a size was chosen with the
images of other seeds (rules.md). The picture shows images of the same seeds, the change of the distance at each size,
and the entropy against ln N (Fig. 5 of Jin et al., NeurIPS 2023).
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
    from evaluation import figures, rules
    from evaluation.judges import GlyphJudge, distance_row
    from evaluation.subjects import GLYPHS, Size, Subject, glyphs
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'entropy_attn[demo]'")
import harness
import results

from entropy_attn.entropy import EntropyRecord, plots

BEST = {  # of the rules in rules.md that `enable` has, chosen with images below 400
    (12, 12): "gain 0.5",
    (16, 16): "paper, gain 1",
    (20, 20): "gain 2",
    (16, 24): "exponent 2, gain 1",
    (24, 24): rules.ORIGINAL,
    (24, 36): "exponent 4",
    (36, 36): "gain 2",
}
SIZES: tuple[Size, ...] = tuple(BEST)
FIRST = 400  # number of the first image: none of these has chosen a rule
RECORDED = 20  # images whose entropy is recorded: two of each digit
BATCH = 50
SHOWN = 7  # images of each size and rule in the picture
HEADER = [
    "width x height", "N", "entropy (nats), original → λ", "Frechet distance, original", "λ (95 % of the change)",
    "best rule (95 % of the change)", "best rule", "recognised (%)",
]  # fmt: skip
COLOURS = {rules.ORIGINAL: "tab:red", rules.PAPER: "tab:blue", "best": "tab:green"}


class Outcome(NamedTuple):
    """What one size and one rule give: features (n, F), scores in per cent (n,), and the first images."""

    features: torch.Tensor
    scores: torch.Tensor
    shown: torch.Tensor


class Change(NamedTuple):
    """The Frechet distance of a rule, and its change against the original scale with the 95 % interval."""

    distance: float
    change: float = 0.0
    low: float = 0.0
    high: float = 0.0


Outcomes = dict[str, Outcome]  # by rule: the original scale, the paper's λ, the best


def rules_of(size: Size, trained: Size) -> list[str]:
    """The rules that are drawn at a size. At the trained size all are the original scale."""
    return [rules.ORIGINAL] if size == trained else [rules.ORIGINAL, rules.PAPER, BEST[size]]


def sample(subject: Subject, judge: GlyphJudge, size: Size, count: int, rule: str) -> Outcome:
    numbers, settings = range(FIRST, FIRST + count), rules.options_of(rule, None)
    images = torch.cat([subject.draw(size, numbers[i : i + BATCH], settings) for i in range(0, count, BATCH)])
    return Outcome(judge.features(images), judge.scores(images, numbers), images[:SHOWN])


def record(subject: Subject, size: Size, rule: str) -> EntropyRecord:
    return subject.entropies(size, range(FIRST, FIRST + RECORDED), rules.options_of(rule, None), RECORDED)


def mean_entropies(record: EntropyRecord) -> dict[int, float]:
    """N -> the mean entropy of the layers with N tokens; largest N first."""
    return dict(sorted(plots.mean_entropy(record.table(by=("layer",)), "tokens").items(), reverse=True))


def changes(judge: GlyphJudge, size: Size, outcomes: Outcomes) -> dict[str, Change]:
    reference, original = judge.reference(size), outcomes[rules.ORIGINAL].features
    told = {rules.ORIGINAL: Change(reference.distance(original))}
    for rule, outcome in outcomes.items():
        if rule != rules.ORIGINAL:
            row = distance_row(reference, outcome.features, original)
            told[rule] = Change(row["value"], row["change"], *row["change_interval"])
    return told


def row_of(size: Size, outcomes: Outcomes, told: dict[str, Change], records: list[EntropyRecord]) -> list[str]:
    """A line of the table; `records` are those of the original scale and of λ."""
    before, after = map(mean_entropies, records)
    cells = [
        f"{change.distance:.1f} ({change.low:+.1f} to {change.high:+.1f})"
        for rule, change in told.items()
        if rule != rules.ORIGINAL
    ]
    return [
        f"{size[0]} x {size[1]}",
        ", ".join(str(N) for N in before),
        ", ".join(f"{before[N]:.2f} → {after[N]:.2f}" for N in before),
        f"{told[rules.ORIGINAL].distance:.1f}",
        *(cells or ["the same by definition", ""]),
        BEST[size] if cells else "",
        " → ".join(f"{outcome.scores.mean().item():.0f}" for outcome in outcomes.values()),
    ]


def picture(
    outcomes: dict[Size, Outcomes], told: dict[Size, dict[str, Change]], records: dict, trained: Size, path: Path
) -> None:
    plt = harness.pyplot()
    figure = plt.figure(figsize=(19, 9), layout="constrained")
    images, plotted = figure.subfigures(1, 2, width_ratios=(2.5, 1))
    size = f"{trained[0]} x {trained[1]}"
    images.suptitle(
        f"A model trained at {size} crops digits below that size and repeats them above it: same seeds, three rules"
    )
    smaller = [size for size in outcomes if size[0] * size[1] < trained[0] * trained[1]]
    columns = images.subfigures(1, 2, width_ratios=(1, 1.6))
    for column, sizes in zip(columns, (smaller, [size for size in outcomes if size not in smaller]), strict=True):
        draw_images(column, {size: outcomes[size] for size in sizes}, trained)
    above, below = plotted.subplots(2, 1)
    draw_changes(above, told, trained)
    draw_fits(below, records)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_images(figure: Any, outcomes: dict[Size, Outcomes], trained: Size) -> None:
    """A row of images for each size and rule. A pixel has the same size in all rows of a figure."""
    shown = [(size, rule, outcome) for size, of in outcomes.items() for rule, outcome in of.items()]
    axes = figure.subplots(len(shown), 1, height_ratios=[size[1] for size, _, _ in shown])
    for each, (size, rule, outcome) in zip(axes, shown, strict=True):
        name = "trained" if size == trained else "λ" if rule == rules.PAPER else rule.replace(", ", ",\n")
        figures.draw_strip(each, f"{size[0]} x {size[1]}\n{name}", outcome.shown)
    widest = max(each.get_xlim()[1] for each in axes)
    for each in axes:
        each.set_xlim(right=widest)


def draw_changes(axes: Any, told: dict[Size, dict[str, Change]], trained: Size) -> None:
    """The change of the distance at every size with the paper's λ and with the best rule, in per cent."""
    sizes = [size for size in told if size != trained]
    for offset, (name, position) in zip((-0.15, 0.15), (("λ", 1), ("best rule", 2)), strict=True):
        colour = list(COLOURS.values())[position]
        for place, size in enumerate(sizes):
            original, change = told[size][rules.ORIGINAL].distance, list(told[size].values())[position]
            middle, low, high = (100 * x / original for x in (change.change, change.low, change.high))
            label = name if place == 0 else None
            axes.bar(place + offset, middle, 0.3, color=colour, label=label)
            axes.plot([place + offset] * 2, [low, high], color="black", linewidth=1)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(range(len(sizes)), [f"{width} x {height}" for width, height in sizes])
    axes.set(
        ylabel="against the original scale, % (95 % interval)", title="Change of the Frechet distance: lower is better"
    )
    axes.legend(frameon=False)


def draw_fits(axes: Any, records: dict[str, list[EntropyRecord]]) -> None:
    """Mean entropy of the layers at each level of the UNet against ln N, with fitted lines (Fig. 5)."""
    groups = []
    for rule, of in records.items():
        means = [mean_entropies(each) for each in of]
        name = "λ" if rule == rules.PAPER else rule
        for level, marker in zip(range(len(means[0])), plots.MARKERS, strict=False):
            N, entropy = zip(*(list(mean.items())[level] for mean in means), strict=True)
            look = {"color": COLOURS[rule], "marker": marker, "linewidth": 1}
            groups.append(plots.Points(f"{name}, level {level}", N, entropy, look))
    plots.plot_fits(axes, groups, figures.slope)
    figures.label_tokens(axes, [N for group in groups for N in group.tokens])
    axes.set(xlabel="tokens N of a layer", ylabel="mean entropy (nats)", title="Entropy against ln N")
    axes.legend(frameon=False, fontsize=8)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=GLYPHS, help="folder of a glyph pipeline (default: glyphs/model)")
    parser.add_argument("--count", type=int, default=100, help="images of each size and rule (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.count < 20:
        parser.error(f"--count must be at least 20, for a distance of any meaning, got {arguments.count}")
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {arguments.out.absolute().parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    print(
        f"Drawing {arguments.count} digits of each of {len(SIZES)} sizes with three rules: a minute or two", flush=True
    )
    logging.disable_progress_bar()  # loading takes no time
    try:
        subject = glyphs(arguments.model)
    except ValueError as error:
        print(f"demo.py: --model: {error}", file=sys.stderr)
        sys.exit(2)
    trained, judge = subject.train_size, GlyphJudge()
    outcomes: dict[Size, Outcomes] = {}
    records: dict[str, list[EntropyRecord]] = {rules.ORIGINAL: [], rules.PAPER: []}
    for size in tqdm(SIZES, desc="sizes", leave=False, disable=None):  # shown on a terminal only
        drawn = rules_of(size, trained)
        outcomes[size] = {rule: sample(subject, judge, size, arguments.count, rule) for rule in drawn}
        for rule, of in records.items():
            of.append(record(subject, size, rule))
    told = {size: changes(judge, size, of) for size, of in outcomes.items()}
    lines = [
        row_of(size, of, told[size], [of_rule[i] for of_rule in records.values()])
        for i, (size, of) in enumerate(outcomes.items())
    ]
    print(f"\n{arguments.count} images of each size and rule\n\n{results.markdown(HEADER, lines)}\n")
    picture(outcomes, told, records, trained, arguments.out)
    print(f"{time.perf_counter() - started:.0f} s; wrote {arguments.out}")


if __name__ == "__main__":
    main()
