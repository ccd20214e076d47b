"""Which attention heads have an entropy that grows with ln N, as Eq. 5 of Jin et al. (NeurIPS 2023) says of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from entropy_attn.entropy.plots import fit_line


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
        rows: of `EntropyRecord.table`, by layer and head at least. Rows with λ are left out: those whose multiplier is
            not 1.
    """
    heads: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["train_tokens"] is not None and row["tokens"] is not None and abs(row["multiplier"] - 1) < 1e-6:
            heads.setdefault((row["layer"], row["head"]), []).append(row)
    found = []
    for (layer, head), mine in heads.items():
        line = fit_line([row["tokens"] for row in mine], [row["entropy"] for row in mine])
        if line is not None:
            T = mine[0]["train_tokens"]
            nearest = min(mine, key=lambda row, T=T: abs(math.log(row["tokens"] / T)))
            sharpness = 1 - nearest["entropy"] / math.log(nearest["tokens"])
            found.append(HeadSlope(layer, head, T, sharpness, line.slope))
    return found
