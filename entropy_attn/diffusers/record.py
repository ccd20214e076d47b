"""The entropy of a pipeline's self-attention, as running means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entropy_attn.diffusers.models import Tokens
from entropy_attn.diffusers.steps import Moment

KEYS = ("run", "label", "layer", "step", "half", "head")


class Seen(NamedTuple):
    """A call of a layer as the record has it. `tokens` is None if the layer did not attend to the image."""

    keys: int
    tokens: Tokens | None
    multiplier: float | torch.Tensor | None  # λ √d; None: the rule tells it from the tokens


class EntropyTable(list):
    """A list of dicts that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no entropy recorded"
        columns = list(self[0])
        cells = [columns] + [[_cell(row[name]) for name in columns] for row in self]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class _Mean:
    """The mean entropy (halves, H) of a layer, over queries, images and repeated calls. It stays on the device."""

    def __init__(self, entropy: torch.Tensor, seen: Seen):
        self.total, self.calls, self.seen = entropy, 1, seen

    def add(self, entropy: torch.Tensor) -> None:
        self.total, self.calls = self.total + entropy, self.calls + 1

    def halves(self) -> list[list[float]]:
        return (self.total / self.calls).tolist()


class EntropyRecord:
    """Mean attention entropy, in nats, for each run, layer, denoising step, half of the batch and head.

    Neither attention maps nor entropies of single queries are kept. A half is one condition of classifier-free
    guidance, in the pipeline's order: usually 0 without the prompt and 1 with it. Some pipelines have three. The
    conditions are parts of one batch, or successive calls in one step. Without guidance there is only half 0.

    One record can be given to several `enable` calls, so that their runs can be compared.
    """

    def __init__(self):
        self._labels: list[str] = []  # of sessions, one for each `enable`
        self._runs: dict[tuple[int, int], int] = {}  # (session, its run) -> run
        self._means: dict[tuple[int, str, int, int], _Mean] = {}  # (run, layer, step, turn)
        self._sessions: list[int] = []  # of runs

    def open_session(self, label: str) -> Session:
        """Begin a session, whose runs get this label."""
        self._labels.append(label)
        return Session(self, len(self._labels) - 1)

    def _add(
        self, session: int, layer: str, moment: Moment, seen: Seen, entropy: torch.Tensor, images: int | None
    ) -> None:
        key = (session, moment.run)
        if key not in self._runs:
            self._runs[key] = len(self._sessions)
            self._sessions.append(session)
        B, H, _ = entropy.shape
        halves = B // images if images and B % images == 0 else 1
        place = (self._runs[key], layer, moment.step, moment.turn)
        mean = entropy.mean(dim=2)
        if halves < B:
            mean = mean.view(halves, B // halves, H).mean(dim=1)
        if place in self._means:
            self._means[place].add(mean)
        else:
            self._means[place] = _Mean(mean, seen)

    def __len__(self) -> int:
        """The number of runs."""
        return len(self._sessions)

    def clear(self) -> None:
        """Forget all runs."""
        self._runs, self._means, self._sessions = {}, {}, []

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
            tokens, halves = mean.seen.tokens, mean.halves()
            for half, heads in enumerate(halves):
                entry = {
                    "run": run,
                    "label": self._labels[self._sessions[run]],
                    "layer": layer,
                    "step": step,
                    "half": turn * len(halves) + half,
                    "tokens": tokens.num_tokens if tokens else mean.seen.keys,
                    "train_tokens": tokens.train_tokens if tokens else None,
                    "multiplier": 1.0 if mean.seen.multiplier is None else float(mean.seen.multiplier),
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
        with the trained scale, give one record to `enable(..., exponent=0)` and to `enable(...)`.

        Returns:
            The matplotlib figure, also saved to `path` if given.
        """
        from entropy_attn.diffusers import plots

        return plots.draw(self.table(), path)


class Session:
    """The runs of one `enable` in a record."""

    def __init__(self, record: EntropyRecord, number: int):
        self.record, self._number = record, number

    def add(self, layer: str, moment: Moment, seen: Seen, entropy: torch.Tensor, images: int | None = None) -> None:
        """Fold in the entropy (B, H, Nq) that `layer` had at `moment`; B is `images` times the conditions."""
        self.record._add(self._number, layer, moment, seen, entropy, images)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _common(values: Iterable) -> Any:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
