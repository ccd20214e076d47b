"""Entropy of each self-attention layer of a glyph pipeline while it draws at its trained size.

Writes attention.json beside the weights. It has the entropy in nats, the deficit ln T - entropy, and half the variance
of the logits. By Eq. 5 of Jin et al., NeurIPS 2023, the deficit is half the variance.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where evaluation and glyphs are, and harness.py

import results
from evaluation.subjects import Subject, glyphs

IMAGES = 20  # two of each digit


def logit_variances(subject: Subject) -> dict[str, float]:
    """For every layer: the variance of q . k / sqrt(d) over the keys, averaged over queries, heads, images and steps.

    The layers have the names of the entropy record.
    """
    kept: dict[tuple[str, str], Any] = {}
    sums: dict[str, list[float]] = defaultdict(list)
    hooks = []

    def keep(name: str, what: str, heads: int):
        def hook(module, inputs, output):
            kept[name, what] = output.unflatten(-1, (heads, -1)).transpose(1, 2)
            if len(kept) == 2:
                query, key = kept.pop((name, "to_q")), kept.pop((name, "to_k"))
                logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
                sums[name].append(logits.var(-1).mean().item())

        return hook

    for name, module in subject.pipe.unet.named_modules():
        if name.endswith("attn1"):
            for what in ("to_q", "to_k"):
                layer = getattr(module, what)
                hooks.append(layer.register_forward_hook(keep(f"unet.{name}", what, module.heads)))
    try:
        subject.draw(subject.train_size, range(IMAGES), None)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(values) / len(values) for name, values in sums.items()}


def rows_of(subject: Subject) -> list[dict[str, Any]]:
    """A row for every layer."""
    variances = logit_variances(subject)
    record = subject.entropies(subject.train_size, range(IMAGES), None, IMAGES)
    return [
        {
            "layer": row["layer"], "tokens": row["tokens"], "entropy": row["entropy"],
            "deficit": math.log(row["tokens"]) - row["entropy"], "half_variance": variances[row["layer"]] / 2,
        }
        for row in record.table(by=("layer",))
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["layer"].removeprefix("unet."), str(row["tokens"])]
        + [f"{row[name]:.2f}" for name in ("entropy", "deficit", "half_variance")]
        for row in rows
    ]
    return results.markdown(["self-attention", "T", "entropy (nats)", "ln T - entropy", "σ² / 2"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a pipeline that train.py wrote")
    arguments = parser.parse_args()
    try:
        subject = glyphs(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    with results.Record(arguments.model / "attention.json", "cpu", images=IMAGES) as record:
        record.add(*rows_of(subject))
    results.write_tables(record.path, record.machine, table(record.rows))


if __name__ == "__main__":
    main()
