"""A run of one model: its images, rows, and what is measured of them, kept in a folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from metrics import frechet_distance
from tqdm import tqdm

from entropy_attn.diffusers import Calibration
from evaluation import cost, rules
from evaluation.images import ImageFolder, generate
from evaluation.judges import ImageJudge, Measured, summary
from evaluation.subjects import Size, Subject

RECORDED = 20  # images for entropies and for the calibration
ROUNDS = 5  # of timing


class Run:
    """One model's run in its folder: images, rows, and what is measured of them."""

    def __init__(self, subject: Subject, judge: ImageJudge, num: int, batch: int, out: Path) -> None:
        self.subject, self.judge, self.num, self.batch, self.out = subject, judge, num, batch, out
        self._calibration: Any = None
        self._measured: dict[tuple[Size, str], Measured] = {}

    def check_settings(self, **settings: Any) -> None:
        """What is in the folder was made with these settings and weights, or there is nothing yet.

        Raises:
            ValueError: it was made with others.
        """
        now = settings | {"batch": self.batch, "weights": self.subject.fingerprint()}
        path = self.out / "settings.json"
        if not path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(now, indent=1) + "\n")
            return
        then = json.loads(path.read_text())
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise ValueError(
                f"{self.out} holds images of another {', '.join(changed)}: remove it, or give another --out"
            )

    @property
    def calibration(self) -> Any:
        """Measured once, kept in a file."""
        path = self.out / "calibration.json"
        if self._calibration is None:
            if path.exists():
                self._calibration = Calibration.load(path, self.subject.pipe)
            else:
                self._calibration = self.subject.calibrate(range(RECORDED), self.batch)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._calibration.save(path)
        return self._calibration

    def settings(self, rule: str) -> dict[str, Any] | None:
        needed = rule in (rules.CALIBRATED, rules.MATCHED)
        return rules.options_of(rule, self.calibration if needed else None)

    def way(self, size: Size, rule: str) -> cost.Way:
        """How images of a cell are drawn."""
        if rule == rules.RESIZED:
            return lambda numbers: self.subject.draw_resized(size, numbers)
        if rule == rules.MULTIDIFFUSION:
            panorama = self.subject.with_multidiffusion()
            return lambda numbers: torch.cat([panorama.draw(size, [number], None) for number in numbers])
        settings = self.settings(rule)
        return lambda numbers: self.subject.draw(size, numbers, settings)

    def measured(self, size: Size, rule: str, progress: tqdm) -> Measured:
        """Of all images of a cell, which are generated as far as they are missing."""
        if (size, rule) not in self._measured:
            folder = ImageFolder(self.out / f"{size[0]}x{size[1]}" / rule.replace(" ", "-"))
            progress.set_postfix_str(f"{size[0]}x{size[1]} {rule}")
            numbers = list(range(self.num))
            generate(folder, numbers, self.way(size, rule), self.batch, progress.update)
            self._measured[size, rule] = self.judge.measure(folder.load(numbers), numbers)
        return self._measured[size, rule]

    def row(self, size: Size, rule: str, progress: tqdm) -> dict[str, Any]:
        """A cell's figures, of the second half of its images."""
        second = slice(self.num // 2, None)
        of = Measured(*(x[second] for x in self.measured(size, rule, progress)))
        original = None
        if rule != rules.ORIGINAL:
            original = Measured(*(x[second] for x in self.measured(size, rules.ORIGINAL, progress)))
        return {"width": size[0], "height": size[1], "rule": rule, **summary(self.judge, size, of, original)}

    @functools.cache  # noqa: B019 (a run lives as long as the script)
    def cost(self, size: Size, kind: str) -> dict[str, dict[str, Any]]:
        """Time and memory of the original scale, the paper's and what they are compared with."""
        other = rules.RESIZED if kind == "cost" else rules.MULTIDIFFUSION
        ways = {rule: self.way(size, rule) for rule in (rules.ORIGINAL, rules.PAPER, other)}
        return cost.measure(ways, ROUNDS, self.subject.pipe.device.type)

    def chosen_exponent(self, size: Size, progress: tqdm) -> str:
        """The exponent with the smallest distance on the first half of the images."""
        reference = self.judge.reference(size)
        candidates = [rules.PAPER, *(f"exponent {p:g}" for p in rules.EXPONENTS)]
        return min(
            candidates,
            key=lambda rule: frechet_distance(self.measured(size, rule, progress).features[: self.num // 2], reference),
        )


def cells(subject: Subject, sizes: list[Size], what: list[str]) -> Iterator[tuple[str, Size, str]]:
    """(kind, size, rule) of every cell of images."""
    if "quality" in what:
        for size in sizes:
            for rule in rules.RULES if size != subject.train_size else (rules.ORIGINAL,):
                yield "quality", size, rule
    if "control" in what:
        for rule in (rules.ORIGINAL, *rules.CONTROLS):
            yield "control", subject.train_size, rule
    for kind, rule in (("cost", rules.RESIZED), ("multidiffusion", rules.MULTIDIFFUSION)):
        if kind in what:
            for size in compared(subject, sizes, kind):
                for each in (rules.ORIGINAL, rules.PAPER, rule):
                    yield kind, size, each


def compared(subject: Subject, sizes: list[Size], kind: str) -> list[Size]:
    """The sizes at which time and memory are compared: for resizing, those that are smaller than the trained one."""
    others = [size for size in sizes if size != subject.train_size]
    width, height = subject.train_size
    return [size for size in others if kind == "multidiffusion" or size[0] * size[1] < width * height]


def entropy_rows(run: Run, size: Size, rule: str) -> Iterator[dict[str, Any]]:
    """Mean entropy of every layer and step, for the figures."""
    record = run.subject.entropies(size, range(RECORDED), run.settings(rule), run.batch)
    for row in record.table(by=("layer", "step")):
        yield {"kind": "entropy", "width": size[0], "height": size[1], "rule": rule} | {
            name: row[name] for name in ("layer", "step", "tokens", "train_tokens", "entropy")
        }


def key_of(row: dict[str, Any]) -> tuple:
    return row["kind"], (row["width"], row["height"]), row["rule"]


def work(run: Run, sizes: list[Size], what: list[str], record: harness.Record, kept: list[dict[str, Any]]) -> None:
    """Do what is asked for and not `kept` from an earlier run; a row is written as soon as it is there."""
    kept = [row for row in kept if row.get("images", run.num - run.num // 2) == run.num - run.num // 2]
    record.add(*kept)
    done = {key_of(row) for row in kept}
    planned = [cell for cell in cells(run.subject, sizes, what) if cell not in done]
    if planned:
        run.judge.reference(sizes[0])  # so that what is wrong with it is said before any image is drawn
    distinct = {(size, rule) for _, size, rule in planned}
    with tqdm(total=len(distinct) * run.num, desc="images", unit="image") as progress:
        for kind, size, rule in planned:
            row = {"kind": kind, **run.row(size, rule, progress)}
            if kind in ("cost", "multidiffusion"):
                row |= run.cost(size, kind)[rule]
            record.add(row)
        chosen = [size for size in sizes if size != run.subject.train_size] if "quality" in what else []
        for size in chosen:
            if not any(key[:2] == ("chosen", size) for key in done):
                record.add({"kind": "chosen", **run.row(size, run.chosen_exponent(size, progress), progress)})
    if "entropy" in what:
        for size in tqdm(sizes, desc="entropy"):
            for rule in (rules.ORIGINAL, rules.PAPER, rules.CALIBRATED):
                if ("entropy", size, rule) not in done:
                    record.add(*entropy_rows(run, size, rule))
