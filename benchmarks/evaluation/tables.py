"""The rows of a run as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import harness

from evaluation import figures, published, rules
from evaluation.judges import ImageJudge
from evaluation.subjects import Subject

Row = dict[str, Any]


def size_of(row: Row) -> str:
    return f"{row['width']} x {row['height']}"


def interval(row: Row, name: str, digits: int) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def change(row: Row, name: str, digits: int) -> str:
    """A paired change with its interval, in bold where the interval leaves 0 out."""
    if f"{name}_change" not in row:
        return ""
    low, high = row[f"{name}_change_interval"]
    text = f"{row[f'{name}_change']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low * high > 0 else text


def quality(judge: ImageJudge, subject: Subject, rows: Iterable[Row]) -> str:
    """Tables 1 and 2: a line for each size and rule."""
    # Rates in per cent are told to a tenth, CLIP scores to four digits.
    digits = 1 if "%" in judge.score_name else 4
    known = [table[subject.family] for table in (published.FID, published.CLIP_SCORE) if subject.family in table]
    header = ["width x height", "scale", judge.distance_name, "change", judge.score_name, "change"]
    header += [f"the paper's {name}" for name in ("FID", "CLIP score")[: len(known)]]
    lines = []
    for row in rows:
        line = [size_of(row), row["rule"], interval(row, "distance", 1), change(row, "distance", 1)]
        line += [interval(row, "score", digits), change(row, "score", digits)]
        for table in known:
            numbers = dict(
                zip((rules.ORIGINAL, rules.PAPER), table.get((row["width"], row["height"]), ()), strict=False)
            )
            line.append(f"{numbers[row['rule']]:.4f}" if row["rule"] in numbers else "")
        lines.append(line)
    return harness.markdown(header, lines)


def costs(judge: ImageJudge, subject: Subject, rows: Iterable[Row], known: dict) -> str:
    """Tables 4 and 5: quality, time and memory of the ways to an image of a size."""
    header = ["width x height", "way", judge.distance_name, "seconds an image", "peak memory (MiB)"]
    header += ["the paper's FID, MiB, s (A100)"] if subject.family == "sd" else []
    lines = []
    for row in rows:
        paper = known.get((row["width"], row["height"]), {}).get(row["rule"])
        low, high = row["seconds_quartiles"]
        lines.append([
            size_of(row), row["rule"], interval(row, "distance", 1), f"{row['seconds']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['peak_mib']:.1f}",
            *([", ".join(map(str, paper)) if paper else ""] if subject.family == "sd" else []),
        ])  # fmt: skip
    return harness.markdown(header, lines)


def entropies(rows: list[Row]) -> str:
    """Mean entropy of the layers at each number of tokens."""
    lines = []
    for width, height in dict.fromkeys((row["width"], row["height"]) for row in rows):
        for rule in dict.fromkeys(row["rule"] for row in rows):
            of = [row for row in rows if (row["width"], row["height"], row["rule"]) == (width, height, rule)]
            by_train: dict[int, list[Row]] = {}
            for row in of:
                by_train.setdefault(row["train_tokens"], []).append(row)
            for T, level in sorted(by_train.items(), reverse=True):
                mean = sum(row["entropy"] for row in level) / len(level)
                lines.append([f"{width} x {height}", rule, str(T), str(level[0]["tokens"]), f"{mean:.3f}"])
    return harness.markdown(["width x height", "scale", "T", "N", "mean entropy (nats)"], lines)


def fits(rows: list[Row]) -> str:
    """Fig. 5 as numbers: mean entropy against ln N for each level and scale."""
    lines = [
        [rule, str(T), f"{line.slope:.3f}", f"{line.intercept:.3f}", f"{line.r_squared:.4f}"]
        for rule in dict.fromkeys(row["rule"] for row in rows)
        for T, (N, entropy) in figures.by_level(rows, rule).items() if len(N) > 1
        for line in [figures.fit(N, entropy)]
    ]  # fmt: skip
    return harness.markdown(["scale", "T", "slope", "intercept (nats)", "R²"], lines)


def report(judge: ImageJudge, subject: Subject, rows: list[Row]) -> str:
    parts = []
    for kind, title in (
        ("quality", "Every size and scale"),
        ("chosen", "The exponent chosen on the other half of the images"),
        ("control", "Control: multiples of the scale at the trained size"),
    ):
        of = [row for row in rows if row["kind"] == kind]
        if of:
            parts.append(f"### {title}\n\n{quality(judge, subject, of)}")
    for kind, title, known in (
        ("cost", "Against resizing from the trained size", published.COST),
        ("multidiffusion", "Against MultiDiffusion", published.MULTIDIFFUSION),
    ):
        of = [row for row in rows if row["kind"] == kind]
        if of:
            parts.append(f"### {title}\n\n{costs(judge, subject, of, known)}")
    of = [row for row in rows if row["kind"] == "entropy"]
    if of:
        parts.append(f"### Entropy against ln N\n\n{fits(of)}\n\n{entropies(of)}")
    scales = "\n".join(f"- {name}: {meaning}" for name, meaning in rules.MEANING.items())
    return "\n\n".join([*parts, f"Scales:\n\n{scales}"])
