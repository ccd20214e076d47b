"""The rows of a run as Markdown tables."""

from __future__ import annotations

from typing import Any

import results

from entropy_attn.entropy import plots
from evaluation import figures, published, rules
from evaluation.judges import CLIP_SCORE, FID, Judge
from evaluation.run import CHOSEN, CHOSEN_RULE, COST, MULTIDIFFUSION, key_of
from evaluation.subjects import Size, Subject

Row = dict[str, Any]


def text_of(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def interval(row: Row | None, digits: int) -> str:
    if row is None:
        return ""
    low, high = row["value_interval"]
    return f"{row['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def change(row: Row | None, digits: int) -> str:
    """A paired change with its interval, in bold if the interval does not contain 0."""
    if row is None or "change" not in row:
        return ""
    low, high = row["change_interval"]
    text = f"{row['change']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low * high > 0 else text


def kinds_of(judge: Judge) -> dict[str, tuple[str, int]]:
    """Kind of metric -> its name and its number of decimals: 1 for distances and percentages, 4 for CLIP scores."""
    return {FID: (judge.distance_name, 1), CLIP_SCORE: (judge.score_name, 1 if "%" in judge.score_name else 4)}


def quality(judge: Judge, subject: Subject, rows: list[Row], cells: list[tuple[Size, str]]) -> str:
    """Tables 1 and 2: a line for each cell (size, rule), with its metrics and their changes."""
    found = {key_of(row): row for row in rows}
    kinds = {kind: told for kind, told in kinds_of(judge).items() if any(row["kind"] == kind for row in rows)}
    header = ["width x height", "scale"]
    known = {}
    for kind, (name, _) in kinds.items():
        header += [name, "change"]
        if subject.family in published.QUALITY[kind]:
            known[kind] = published.QUALITY[kind][subject.family]
            header.append(f"the paper's {name}")
    lines = []
    for size, rule in cells:
        line = [text_of(size), rule]
        for kind, (_, digits) in kinds.items():
            row = found.get((kind, size, rule))
            line += [interval(row, digits), change(row, digits)]
            if kind in known:
                numbers = dict(zip((rules.ORIGINAL, rules.PAPER), known[kind].get(size, ()), strict=False))
                line.append(f"{numbers[rule]:.4f}" if rule in numbers else "")
        lines.append(line)
    return results.markdown(header, lines)


def floors(judge: Judge, rows: list[Row]) -> str:
    """The distance and the score of crops of the trained size's outputs, where the judge measures them."""
    lines = [
        [text_of(key_of(row)[1]), str(row["images"]), f"{row['floor']['distance']:.1f}", f"{row['floor']['score']:.1f}"]
        for row in rows
    ]
    return results.markdown(["width x height", "images", judge.distance_name, judge.score_name], lines)


def costs(judge: Judge, subject: Subject, rows: list[Row], kind: str) -> str:
    """Tables 4 and 5: distance, time and memory of the ways to draw an image of a size."""
    header = ["width x height", "way", judge.distance_name, "seconds an image", "peak memory (MiB)"]
    header += ["the paper's FID, MiB, s (A100)"] if subject.family == "sd" else []
    known = published.COST if kind == COST else published.MULTIDIFFUSION
    found = {key_of(row): row for row in rows}
    lines = []
    for row in (row for row in rows if row["kind"] == kind):
        _, size, rule = key_of(row)
        paper = known.get(size, {}).get(rule)
        low, high = row["seconds_quartiles"]
        lines.append([
            text_of(size), rule, interval(found.get((FID, size, rule)), 1),
            f"{row['seconds']:.3f} ({low:.3f} to {high:.3f})", f"{row['peak_mib']:.1f}",
            *([", ".join(map(str, paper)) if paper else ""] if subject.family == "sd" else []),
        ])  # fmt: skip
    return results.markdown(header, lines)


def entropies(rows: list[Row]) -> str:
    """The mean entropy of the layers of each T, by size and scale."""
    lines = []
    for size in dict.fromkeys((row["width"], row["height"]) for row in rows):
        for rule in dict.fromkeys(row["rule"] for row in rows):
            of = [row for row in rows if (row["width"], row["height"], row["rule"]) == (*size, rule)]
            tokens = {row["train_tokens"]: row["tokens"] for row in of}
            for T, mean in sorted(plots.mean_entropy(of, "train_tokens").items(), reverse=True):
                lines.append([text_of(size), rule, str(T), str(tokens[T]), f"{mean:.3f}"])
    return results.markdown(["width x height", "scale", "T", "N", "mean entropy (nats)"], lines)


def fits(rows: list[Row]) -> str:
    """The fitted lines of Fig. 5: mean entropy against ln N, for each T and scale."""
    lines = [
        [rule, str(T), f"{line.slope:.3f}", f"{line.intercept:.3f}", f"{line.r_squared:.4f}"]
        for rule in dict.fromkeys(row["rule"] for row in rows)
        for T, level in figures.by_level(rows, rule).items()
        if (line := plots.fit_line(list(level), list(level.values())))
    ]  # fmt: skip
    return results.markdown(["scale", "T", "slope", "intercept (nats)", "R²"], lines)


def report(judge: Judge, subject: Subject, rows: list[Row]) -> str:
    measured = list(dict.fromkeys(key_of(row)[1:] for row in rows if row["kind"] in (FID, CLIP_SCORE)))
    other = [cell for cell in measured if cell[0] != subject.train_size]
    trained = [cell for cell in measured if cell[0] == subject.train_size]
    chosen = [key_of(row)[1:] for row in rows if row["kind"] == CHOSEN]
    chosen_rules = dict(key_of(row)[1:] for row in rows if row["kind"] == CHOSEN_RULE)  # the latest choice of a size
    parts = [
        f"### {title}\n\n{quality(judge, subject, rows, cells)}"
        for title, cells in (
            ("Every size and scale", other),
            ("The exponent chosen on the other half of the images", chosen),
            ("The rule chosen on the other half of the images", list(chosen_rules.items())),
            ("At the trained size, with the control: multiples of the scale", trained),
        )
        if cells
    ]
    floored = [row for row in rows if "floor" in row]
    if floored:
        parts.append(f"### What outputs of the trained size have, cropped to the size\n\n{floors(judge, floored)}")
    for kind, title in ((COST, "Against resizing from the trained size"), (MULTIDIFFUSION, "Against MultiDiffusion")):
        if any(row["kind"] == kind for row in rows):
            parts.append(f"### {title}\n\n{costs(judge, subject, rows, kind)}")
    of = figures.entropy_rows(rows)
    if of:
        parts.append(f"### Entropy against ln N\n\n{fits(of)}\n\n{entropies(of)}")
    beyond = any(row["rule"] in rules.BEYOND for row in rows)
    meaning = rules.MEANING | (rules.BEYOND_MEANING if beyond else {})
    scales = "\n".join(f"- {name}: {text}" for name, text in meaning.items())
    return "\n\n".join([*parts, f"Scales:\n\n{scales}"])
