"""The rows of results of a run that can be continued: a JSON line for each, appended as soon as it is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import results


class Rows(results.Record):
    """A file with a row of results in each line. Its first line describes the machine, the versions and `about`.

    The rows of an earlier run with the same `about` are kept.
    """

    def __init__(self, path: Path, device: str | None = None, **about: Any) -> None:
        super().__init__(path, device, **about)
        kept = read(self.path) if self.path.exists() else []
        changed = [name for name in about if kept and kept[0].get(name) != json.loads(json.dumps(about[name]))]
        if changed:
            print(f"{self.path} is of another {', '.join(changed)}: all is measured again", file=sys.stderr)
        else:
            self.rows = kept[1:]
        lines = [self.machine, *self.rows]
        # The file is rewritten: an interruption may have left its last line incomplete.
        results.write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, *rows: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


def read(path: Path) -> list[dict[str, Any]]:
    """All lines, without a last line that an interruption left incomplete."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
