"""A run of one model: its images and its rows of results, in a folder that a later run continues."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from tqdm import tqdm

from entropy_attn.diffusers import Calibration
from evaluation import cost, rules, variants
from evaluation.images import ImageFolder, generate
from evaluation.judges import CLIP_SCORE, FID, Judge, distance_row, score_row
from evaluation.rows import Rows
from evaluation.subjects import Size, Subject

COST, MULTIDIFFUSION, ENTROPY, CHOSEN = "cost", "multidiffusion", "entropy", "chosen"
CHOSEN_RULE = "chosen rule"  # among all scales of a run, if it has rules beyond the paper
WHAT = (FID, CLIP_SCORE, COST, MULTIDIFFUSION, ENTROPY)
RECORDED = 20  # images whose entropies are recorded, also for the calibration
HEADS_RECORDED = 12  # images whose entropies are recorded head by head
ROUNDS = 5  # of timing one image

Row = dict[str, Any]
Cell = tuple[str, Size, str]  # kind, size, rule


class Run:
    """One model's run in its folder. A cell of the tables is a size and a rule. Image numbers begin at `seed`."""

    def __init__(self, subject: Subject, judge: Judge, num: int, batch: int, out: Path, seed: int = 0) -> None:
        self.subject, self.judge, self.batch, self.out = subject, judge, batch, out
        self.numbers = range(seed, seed + num)
        self.first_half, self.second_half = slice(num // 2), slice(num // 2, None)

    def check_settings(self, **settings: Any) -> None:
        """Check that the images in the folder were made with these settings and weights, or that there are none.

        Raises:
            ValueError: they were made with others.
        """
        now = json.loads(json.dumps(settings | {"weights": self.subject.fingerprint()}))  # as read from a file
        path = self.out / "settings.json"
        if not path.exists():
            results.write_whole(path, json.dumps(now, indent=1) + "\n")
            return
        then = json.loads(path.read_text())
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise ValueError(
                f"{self.out} holds images of another {', '.join(changed)}: remove it, or give another --out"
            )

    @functools.cached_property
    def calibration(self) -> Any:
        """The calibration of the model: read from the folder, or measured and written there."""
        path = self.out / "calibration.json"
        if path.exists():
            return Calibration.load(path, self.subject.pipe)
        calibration = self.subject.calibrate(range(RECORDED), self.batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
        return calibration

    def check_scales(self, scales: Collection[str]) -> None:
        """Raises ValueError for a rule beyond the paper that the model cannot be drawn with."""
        if set(scales) & set(variants.RECIPES):
            variants.check_pipeline(self.subject.pipe)
        if rules.TEMPERATURE in scales and not self.subject.guided:
            raise ValueError(variants.UNGUIDED)

    def settings(self, rule: str) -> dict[str, Any] | None:
        needed = rule in (rules.CALIBRATED, rules.MATCHED)
        return rules.options_of(rule, self.calibration if needed else None)

    def way(self, size: Size, rule: str) -> cost.Way:
        """The function that draws images of a cell."""
        if rule == rules.RESIZED:
            return lambda numbers: self.subject.draw_resized(size, numbers)
        if rule in variants.RECIPES:
            return self.variant(size, rule)
        subject, settings = self.subject, None
        if rule == rules.MULTIDIFFUSION:
            subject = self.subject.with_multidiffusion()
        else:
            settings = self.settings(rule)
        if rule in (rules.MULTIDIFFUSION, rules.MATCHED):  # one by one: matching follows the mean entropy of its batch
            return lambda numbers: torch.cat([subject.draw(size, [number], settings) for number in numbers])
        return lambda numbers: subject.draw(size, numbers, settings)

    def variant(self, size: Size, rule: str) -> cost.Way:
        """The function that draws images of a cell whose rule is beyond the paper."""
        recipe, entropies = variants.recipe_of(rule), None
        if rule in rules.BY_HEADS:
            entropies = variants.Entropies(self.heads(self.subject.train_size), self.heads(size))

        def draw(numbers: Sequence[int]) -> torch.Tensor:
            with variants.applied(self.subject.pipe, recipe, entropies):
                return self.subject.draw(size, numbers, None)

        return draw

    @functools.cache  # noqa: B019 (a run lives as long as the script)
    def heads(self, size: Size) -> dict[str, variants.Heads]:
        """The entropies of the heads with the original scale: read from the folder, or measured and written there."""
        path = self.out / f"heads-{size[0]}x{size[1]}.json"
        if path.exists():
            return {layer: variants.Heads(*heads) for layer, heads in json.loads(path.read_text()).items()}
        heads = variants.heads_of(self.subject.entropies(size, range(HEADS_RECORDED), None, self.batch))
        results.write_whole(path, json.dumps(heads, indent=1) + "\n")
        return heads

    def folder(self, size: Size, rule: str) -> ImageFolder:
        """The folder of a cell's images."""
        return ImageFolder(self.out / f"{size[0]}x{size[1]}" / rule.replace(" ", "-"), self.subject.bits)

    def images(self, size: Size, rule: str, progress: tqdm) -> torch.Tensor:
        """All images of a cell. Those that are not in the folder are generated."""
        folder = self.folder(size, rule)
        if folder.missing(self.numbers):
            progress.set_postfix_str(f"{size[0]}x{size[1]} {rule}")
            generate(folder, self.numbers, self.way(size, rule), self.batch, progress.update)
        return folder.load(self.numbers)

    @functools.cache  # noqa: B019 (a run lives as long as the script)
    def features(self, size: Size, rule: str, progress: tqdm) -> torch.Tensor:
        return self.judge.features(self.images(size, rule, progress))

    @functools.cache  # noqa: B019
    def scores(self, size: Size, rule: str, progress: tqdm) -> torch.Tensor:
        return self.judge.scores(self.images(size, rule, progress), self.numbers)

    @functools.cache  # noqa: B019
    def costs(self, size: Size, kind: str) -> dict[str, Row]:
        """Time and memory with the original scale, with the paper's, and of resizing or MultiDiffusion."""
        other = rules.RESIZED if kind == COST else rules.MULTIDIFFUSION
        ways = {rule: self.way(size, rule) for rule in (rules.ORIGINAL, rules.PAPER, other)}
        return cost.measure(ways, ROUNDS, self.subject.pipe.device.type)

    def judged(self, kind: str, size: Size, rule: str, progress: tqdm) -> Row:
        """The row of a cell's distance or score, from the second half of its images."""
        row = row_of(kind, size, rule)
        measured = self.features if kind == FID else self.scores
        ours, original = (measured(size, each, progress)[self.second_half] for each in (rule, rules.ORIGINAL))
        paired = None if rule == rules.ORIGINAL else original
        if kind == FID:
            row |= distance_row(self.judge.reference(size), ours, paired)
            floor = self.judge.floor(size, len(ours)) if paired is None else None
            return row | ({"floor": floor} if floor else {})
        return row | score_row(ours, paired)

    def measured(self, kind: str, size: Size, rule: str) -> Row:
        """The row of a cell's time and memory, or of its entropies."""
        row = row_of(kind, size, rule)
        return row | ({"places": self.entropies(size, rule)} if kind == ENTROPY else self.costs(size, kind)[rule])

    def entropies(self, size: Size, rule: str) -> list[Row]:
        """A row with the mean entropy for every layer and step."""
        record = self.subject.entropies(size, range(RECORDED), self.settings(rule), self.batch)
        names = ("layer", "step", "tokens", "train_tokens", "entropy")
        return [{name: row[name] for name in names} for row in record.table(by=("layer", "step"))]

    def chosen(self, size: Size, candidates: Collection[str], progress: tqdm) -> str:
        """The rule with the smallest distance on the first half of the images."""
        reference = self.judge.reference(size)
        return min(
            candidates,
            key=lambda rule: reference.distance(self.features(size, rule, progress)[self.first_half]),
        )


def cells(subject: Subject, sizes: list[Size], what: Collection[str], scales: Collection[str]) -> Iterator[Cell]:
    """All cells to measure, in the order of the work. `what` is among WHAT, `scales` among rules.RULES and BEYOND.

    At the trained size those of `rules.at_trained_size` are measured instead. The tables of time and memory also need
    the distances of the ways that they compare.
    """
    for size in sizes:
        compared = {kind: way for kind, way in ways_beside(subject, size).items() if kind in what}
        compared_scales = scales if size != subject.train_size else rules.at_trained_size(scales)
        beside = (rules.ORIGINAL, rules.PAPER, *compared.values()) if compared else ()
        for kind in (FID, CLIP_SCORE):
            chosen = (*compared_scales, *compared.values()) if kind in what else beside if kind == FID else ()
            yield from ((kind, size, rule) for rule in chosen)
        for kind, way in compared.items():
            yield from ((kind, size, rule) for rule in (rules.ORIGINAL, rules.PAPER, way))
    if ENTROPY in what:
        for size in sizes:
            yield from ((ENTROPY, size, rule) for rule in (rules.ORIGINAL, rules.PAPER, rules.CALIBRATED))


def ways_beside(subject: Subject, size: Size) -> dict[str, str]:
    """Kind of table -> the way that the scales are compared with; resizing only below the trained size (Table 4)."""
    if size == subject.train_size:
        return {}
    smaller = size[0] * size[1] < subject.train_size[0] * subject.train_size[1]
    return ({COST: rules.RESIZED} if smaller else {}) | {MULTIDIFFUSION: rules.MULTIDIFFUSION}


def row_of(kind: str, size: Size, rule: str) -> Row:
    return {"kind": kind, "width": size[0], "height": size[1], "rule": rule}


def key_of(row: Row) -> Cell:
    return row["kind"], (row["width"], row["height"]), row["rule"]


def choices(scales: Collection[str]) -> dict[str, Collection[str]]:
    """Kind of row -> the scales among which one is chosen for each size."""
    exponents = {CHOSEN: rules.CANDIDATES} if set(rules.CANDIDATES) <= set(scales) else {}
    return exponents | ({CHOSEN_RULE: scales} if set(rules.BEYOND) & set(scales) else {})


def is_chosen(rows: Rows, kind: str, size: Size, among: list[str]) -> bool:
    """Whether the choice was made. Another list of scales is another choice."""
    made = (row for row in rows.rows if key_of(row)[:2] == (kind, size))
    return any(row.get("among", among) == among for row in made)


def work(run: Run, sizes: list[Size], what: Collection[str], scales: Collection[str], rows: Rows) -> None:
    """Measure the cells that have no row yet. A row is written as soon as it is measured."""
    done = {key_of(row) for row in rows.rows}
    planned = [cell for cell in cells(run.subject, sizes, what, scales) if cell not in done]
    judged = [cell for cell in planned if cell[0] in (FID, CLIP_SCORE)]
    run.check_scales(scales)
    run.judge.prepare({kind for kind, _, _ in judged})  # so that an error comes before any image is drawn
    images = sum(len(run.folder(*cell).missing(run.numbers)) for cell in {cell[1:] for cell in judged})
    with tqdm(total=images, desc="images", unit="image") as progress:
        for cell in judged:
            rows.add(run.judged(*cell, progress))
        for kind, candidates in choices(scales).items() if FID in what else ():
            for size in sizes:
                among = {"among": list(candidates)}
                if size != run.subject.train_size and not is_chosen(rows, kind, size, among["among"]):
                    rows.add(row_of(kind, size, run.chosen(size, candidates, progress)) | among)
    for cell in tqdm([cell for cell in planned if cell not in judged], desc="time, memory, entropy", unit="cell"):
        rows.add(run.measured(*cell))
