"""Which attention heads have an entropy that grows with ln N, as Eq. 5 of Jin et al. (NeurIPS 2023) says of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from entropy_attn.entropy.plots import fit_line, mean_entropy


class HeadSlope(NamedTuple):
    """A head with the trained scale. By Eq. 5 its slope is 1; that of a head that attends to neighbours is near 0."""

    layer: str
    head: int
    train_tokens: int
    sharpness: float  # 1 - H / ln N at the size nearest to the trained one: 0 is uniform attention
    slope: float  # dH / d ln N, of the line by least squares


def head_slopes(rows: Iterable[Mapping[str, Any]]) -> list[HeadSlope]:
    """The heads that were recorded with the trained scale at two or more N.

    Args:
        rows: of `EntropyRecord.table`, by run, layer and head at least. Runs with λ are left out: those in which the
            multiplier of any layer is not 1, since a scaled layer changes the inputs of the others. A gain on the
            output does too, and is not in the record: runs with a gain need a record of their own. A head has one
            point for each N, the mean over the runs with that N.
    """
    rows = list(rows)
    scaled = {row["run"] for row in rows if abs(row["multiplier"] - 1) > 1e-6}
    heads: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["train_tokens"] is not None and row["tokens"] is not None and row["run"] not in scaled:
            heads.setdefault((row["layer"], row["head"]), []).append(row)
    found = []
    for (layer, head), mine in heads.items():
        entropies = mean_entropy(mine, "tokens")
        line = fit_line(list(entropies), list(entropies.values()))
        if line is not None:
            T = mine[0]["train_tokens"]
            _, N = min((abs(math.log(tokens / T)), tokens) for tokens in entropies)
            sharpness = 1 - entropies[N] / math.log(N) if N > 1 else 0.0  # attention to one key is uniform
            found.append(HeadSlope(layer, head, T, sharpness, line.slope))
    return found
