"""The entropy of a model's attention layers, as running means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entropy_attn.entropy.tokens import Tokens

KEYS = ("run", "label", "layer", "step", "half", "head")


class Moment(NamedTuple):
    """When a model is called: the run, the step in it, and the number of the call in that step, all from 0."""

    run: int = 0
    step: int = 0
    turn: int = 0


class EntropyTable(list):
    """A list of dicts that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no entropy recorded"
        columns = list(self[0])
        cells = [columns] + [[cell(row[name]) for name in columns] for row in self]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join(lines)


def cell(value: object) -> str:
    """How tables print a value."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@dataclass
class _Mean:
    """The mean entropy (halves, H) of a layer, over queries, images and repeated calls. It stays on the device."""

    tokens: Tokens
    multiplier: float | torch.Tensor
    total: torch.Tensor
    calls: int = 1

    def halves(self) -> list[list[float]]:
        return (self.total / self.calls).tolist()


class EntropyRecord:
    """Mean attention entropy, in nats, for each run, layer, denoising step, half of the batch and head.

    Neither attention maps nor entropies of single queries are kept. A half is one condition of classifier-free
    guidance, in the pipeline's order: usually 0 without the prompt and 1 with it. Some pipelines have three. The
    conditions are parts of one batch, or successive calls in one step. Without guidance there is only half 0.

    One record can be given to several `enable` calls, so that their runs can be compared. A loop over a model of your
    own adds to it by `open_session`.
    """

    def __init__(self):
        self._labels: list[str] = []  # of runs
        self._runs: dict[tuple[Session, int], int] = {}  # (session, its run) -> run
        self._means: dict[tuple[int, str, int, int], _Mean] = {}  # (run, layer, step, turn)

    def open_session(self, label: str) -> Session:
        """Begin a session, whose runs get this label."""
        return Session(self, label)

    def _run(self, session: Session, run: int) -> int:
        """The number in the record of a session's run."""
        if (session, run) not in self._runs:
            self._runs[session, run] = len(self._labels)
            self._labels.append(session.label)
        return self._runs[session, run]

    def __len__(self) -> int:
        """The number of runs."""
        return len(self._labels)

    def clear(self) -> None:
        """Forget all runs."""
        self._labels, self._runs, self._means = [], {}, {}

    def table(self, by: Iterable[str] = ("run", "label", "layer")) -> EntropyTable:
        """Mean entropies, a row for each combination of `by`: of "run", "label", "layer", "step", "half", "head".

        Returns:
            A list of dicts that prints as a table. A row has the keys of `by`; `tokens` and `train_tokens`, N and T
            (None where they differ in the row, or where the layer does not attend to the image); the mean
            `multiplier` of the trained scale; and the mean `entropy` in nats.
        """
        if isinstance(by, str):
            raise TypeError(f"by must be a sequence of names, such as ({by!r},), got a string")
        by = tuple(by)
        unknown = set(by) - set(KEYS)
        if unknown:
            raise ValueError(f"by must be of {', '.join(KEYS)}, got {', '.join(sorted(unknown))}")
        groups: dict[tuple[Any, ...], list[dict]] = {}
        for entry in self._entries(by_head="head" in by):
            groups.setdefault(tuple(entry[name] for name in by), []).append(entry)
        return EntropyTable(
            {
                **dict(zip(by, key, strict=True)),
                "tokens": _common(e["tokens"] for e in entries),
                "train_tokens": _common(e["train_tokens"] for e in entries),
                "multiplier": _mean(e["multiplier"] for e in entries),
                "entropy": _mean(e["entropy"] for e in entries),
            }
            for key, entries in groups.items()
        )

    def _entries(self, by_head: bool) -> Iterable[dict]:
        for (run, layer, step, turn), mean in self._means.items():
            halves = mean.halves()
            for half, heads in enumerate(halves):
                entry = {
                    "run": run,
                    "label": self._labels[run],
                    "layer": layer,
                    "step": step,
                    "half": turn * len(halves) + half,
                    "tokens": mean.tokens.num_tokens,
                    "train_tokens": mean.tokens.train_tokens,
                    "multiplier": float(mean.multiplier),
                }
                if by_head:
                    yield from ({**entry, "head": head, "entropy": entropy} for head, entropy in enumerate(heads))
                else:
                    yield {**entry, "entropy": sum(heads) / len(heads)}

    def to_json(self, path: str | Path | None = None) -> str:
        """All that was recorded, as JSON: entries with the keys of `table`. Also written to `path` if given."""
        entries = list(self._entries(by_head=True))
        text = json.dumps({"format": "entropy_attn.entropy/1", "unit": "nats", "entries": entries}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path: str | Path | None = None):
        """Draw the paper's Fig. 5 (entropy against ln N, with its fit) and Fig. 6 (entropy of each layer).

        Needs matplotlib. Each run is a point of Fig. 5, and a fitted line needs runs at two sizes or more. To compare λ
        with the trained scale, give one record to `enable(..., exponent=0)` and to `enable(...)`. With runs of the
        trained scale at two sizes, a third picture has dH / d ln N of every head against its sharpness, 1 - H / ln T at
        the trained size or at the one nearest to it: Eq. 5 says 1, and λ has nothing to correct in a head with 0. Runs
        in which any layer is scaled do not count for it.

        Returns:
            The matplotlib figure, also saved to `path` if given.
        """
        from entropy_attn.entropy import heads, plots

        by_head = self.table(by=("run", "layer", "head"))
        return plots.draw(self.table(), path, heads.head_slopes(by_head))


class Session:
    """The runs in a record that have one label."""

    def __init__(self, record: EntropyRecord, label: str):
        self.record, self.label = record, label

    def add(
        self, layer: str, moment: Moment, tokens: Tokens, entropy: torch.Tensor,
        multiplier: float | torch.Tensor = 1.0, images: int | None = None,
    ) -> None:  # fmt: skip
        """Fold in the entropy that `layer` had at `moment`.

        Args:
            layer: its name.
            moment: run, step and turn. Entropies of one layer at one moment are averaged.
            tokens: N and T of the layer.
            entropy: (B, H, Nq), in nats, as `entropy_attn.attention` returns it.
            multiplier: λ √d, the ratio of λ to the trained scale.
            images: the images in the batch, whose B is a multiple of it: one for each condition of guidance. None
                takes all of the batch for one condition.
        """
        if entropy.dim() != 3:
            raise ValueError(f"entropy must be (B, H, Nq), got shape {tuple(entropy.shape)}")
        B, H, _ = entropy.shape
        halves = B // images if images and B % images == 0 else 1
        total = entropy.mean(dim=2)
        if halves < B:
            total = total.view(halves, B // halves, H).mean(dim=1)
        means, place = self.record._means, (self.record._run(self, moment.run), layer, moment.step, moment.turn)
        if place in means:
            means[place].total = means[place].total + total
            means[place].calls += 1
        else:
            means[place] = _Mean(tokens, multiplier, total)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _common(values: Iterable) -> Any:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
