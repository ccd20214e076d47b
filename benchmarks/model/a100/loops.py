"""Main loops kept as text, so that the validation runs without the libraries and compilers they come from.

A file has a head of `key: value` lines and, after an empty line, an instruction a line: its name and scheduling bits,
without operands (decode.Instruction.text). The model reads nothing else of an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .decode import Instruction
from .estimate import Code

FOLDER = Path(__file__).parent.parent / "loops"


@dataclass(frozen=True)
class Loop:
    """flops: useful ones of a program in one pass. origin: where the machine code is from."""

    code: Code
    flops: float
    origin: str


def save(path: Path, loop: Loop) -> None:
    code = loop.code
    head = [
        f"origin: {loop.origin}",
        f"flops: {loop.flops:.0f}",
        f"warps: {code.warps}",
        f"registers: {code.registers}",
    ]
    head.append(f"shared: {code.shared}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, "", *(i.text() for i in code.loop)]) + "\n")


def load(name: str) -> Loop:
    head, _, body = (FOLDER / f"{name}.txt").read_text().partition("\n\n")
    about = dict(line.split(": ", 1) for line in head.splitlines())
    loop = tuple(Instruction.parse(line) for line in body.splitlines())
    code = Code(loop, int(about["warps"]), int(about["registers"]), int(about["shared"]))
    return Loop(code, float(about["flops"]), about["origin"])


def matching(pattern: str) -> list[str]:
    """Names of the loops that match a pattern of file names."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.txt"))
