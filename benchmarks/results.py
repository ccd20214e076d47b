"""The files that the benchmark scripts write: rows as JSON while they run, then tables as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import harness

# What may differ between the parts of a run.
CHANGING = {"date", "sm_clock_mhz", "sm_clock_max_mhz", "power_limit_w"}


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: after an interruption the old file or the new one is there, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


class Record:
    """The rows of a run, in a JSON file {"machine": ..., "rows": [...]} that is rewritten after every row.

    With `resume` it begins with the rows of the file, if there is one. ValueError if that run was on another device or
    with other versions. As a context manager it turns Ctrl-C into exit code 130 and a message that says how many rows
    are in the file.
    """

    def __init__(self, path: Path, device: str | None = None, resume: bool = False, **about: Any) -> None:
        self.path = Path(path)
        self.machine = harness.machine(device) | about
        self.rows: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            machine, self.rows = load(self.path)
            for name in self.machine.keys() - CHANGING:
                if machine.get(name) != self.machine[name]:
                    raise ValueError(
                        f"{self.path} has a run with {name} = {machine.get(name)}, not {self.machine[name]}: "
                        "it cannot be continued here"
                    )

    def has(self, **fields: Any) -> bool:
        """Whether a row has these values."""
        return any(fields.items() <= row.items() for row in self.rows)

    def add(self, *rows: dict[str, Any]) -> None:
        all_rows = [*self.rows, *rows]
        write_whole(self.path, json.dumps({"machine": self.machine, "rows": all_rows}, indent=1) + "\n")
        self.rows = all_rows

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            kept = f"{len(self.rows)} rows are in {self.path}" if self.rows else "no row was finished"
            print(f"\ninterrupted: {kept}", file=sys.stderr)
            sys.exit(130)


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Machine and rows of a file that `Record` wrote."""
    saved = json.loads(Path(path).read_text())
    return saved["machine"], saved["rows"]


def add_run_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a script that saves its runs and can draw a saved run again."""
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(f"build/{name}.json"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--picture-from", type=Path, metavar="JSON", help="draw a saved run again and measure nothing")


def write_tables(path: Path, machine: dict[str, Any], tables: str) -> Path:
    """Print the tables of the run saved at `path` under a line on the machine, and write them to a .md file there."""
    text = f"{harness.describe(machine)}\n\n{tables}\n"
    written = path.with_suffix(".md")
    written.write_text(text)
    print(f"\n{text}")
    return written


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
