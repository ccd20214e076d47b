"""The machine code of a cubin with its scheduling bits, and the main loop in it.

Since Volta the assembler schedules: 17 bits of each 128-bit instruction say for how many cycles the warp stalls after
it, which of six scoreboards it sets when its result is there or its operands are read, and which ones it waits for.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sass

NONE = 7  # the number of a scoreboard that is not there


@dataclass(frozen=True)
class Instruction:
    """One instruction. name: the opcode with its modifiers. operand: of DEPBAR, which waits for a number of groups.
    jumps: the next instruction of the loop is not the next in memory. never: predicated off for good."""

    name: str
    stall: int = 1
    result: int = NONE
    operands: int = NONE
    waits: tuple[int, ...] = ()
    operand: str = ""
    jumps: bool = False
    never: bool = False

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    def text(self) -> str:
        """One line: scoreboards waited for, set by operands, set by the result, stall, name."""
        waits = "".join(str(n) if n in self.waits else "-" for n in range(6))
        marks = ("jumps " if self.jumps else "") + ("never " if self.never else "")
        return f"{waits} {self.operands} {self.result} {self.stall:2d} {marks}{self.name} {self.operand}".rstrip()

    @staticmethod
    def parse(line: str) -> Instruction:
        waits, operands, result, stall, *rest = line.split()
        jumps, never = "jumps" in rest, "never" in rest
        name, *operand = [word for word in rest if word not in ("jumps", "never")]
        waited = tuple(int(n) for n in waits if n != "-")
        return Instruction(name, int(stall), int(result), int(operands), waited, " ".join(operand), jumps, never)


_LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<not>!?)(?P<predicate>U?P\w+)\s+)?(?P<text>[A-Z][^;]*?)\s*;"
    r"\s+/\* 0x[0-9a-f]{16} \*/\s*\n\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)


def disassemble(cubin: Path, function: str | None = None) -> str:
    """The machine code of a cubin's function as text with the encoding of each instruction."""
    command = [str(sass.TOOLS / "cuobjdump"), "-sass", *(["-fun", function] if function else []), str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(listing: str) -> list[Instruction]:
    """The longest pass of the main loop: of the innermost loop with the most matrix instructions among those with
    asynchronous copies, or among all where none copies.

    The kernel's edge loop has as many matrix instructions and no asynchronous copies.
    """
    found = [match.groupdict() for match in _LINE.finditer(listing)]
    flow = [_flow(line) for line in found]
    labels = {line["address"].lstrip("0") or "0": n for n, line in enumerate(found)}
    loops = sass.find_loops(flow, labels)
    amount = {loop: (_count(flow, loop, "LDGSTS") > 0, _count(flow, loop, "HMMA")) for loop in loops}
    matrix = [loop for loop in loops if amount[loop][1]]
    innermost = [loop for loop in matrix if not any(other < loop for other in matrix)]
    if not innermost:
        raise ValueError("the machine code has no loop with matrix instructions")
    best = max(innermost, key=lambda loop: (*amount[loop], -min(loop)))
    path = _longest_pass(flow, labels, best)
    following = [*path[1:], path[0]]
    return [_decode(found[n], jumps=after != n + 1) for n, after in zip(path, following, strict=True)]


def _flow(line: dict[str, str]) -> sass.Instruction:
    text = line["text"]
    target = re.search(r"\b(?:BRA|BRX|JMP)\S*\s.*?\b0x0*([0-9a-f]+)", text)
    always = line["predicate"] in (None, "PT") and not line["not"]
    plain = re.match(r"(BRA|JMP)\S*\s+(`\()?0x", text) is not None
    ends = always and (plain or text.startswith(("EXIT", "RET")))
    return sass.Instruction(text, target[1] if target else None, not ends)


def _count(flow: Sequence[sass.Instruction], loop: Iterable[int], name: str) -> int:
    return sum(flow[n].name.startswith(name) for n in loop)


def _longest_pass(flow: Sequence[sass.Instruction], labels: dict[str, int], loop: frozenset[int]) -> list[int]:
    """The longest way from the head of the loop round to it."""
    head = _head(flow, labels, loop)
    best: dict[int, tuple[int, int]] = {}  # of an instruction: how many it and the rest of the pass are, the follower
    waiting = [head]
    opened: set[int] = set()
    while waiting:
        n = waiting[-1]
        followers = [m for m in _followers(flow, labels, n) if m in loop]
        new = [m for m in followers if m != head and m not in opened]
        if n not in opened and new:
            opened.add(n)
            waiting += new
            continue
        opened.add(n)
        waiting.pop()
        lengths = {m: 0 if m == head else best[m][0] for m in followers if m == head or m in best}
        if lengths:
            follower = max(lengths, key=lambda m: lengths[m])
            best[n] = (lengths[follower] + 1, follower)
    path = [head]
    while best[path[-1]][1] != head:
        path.append(best[path[-1]][1])
    return path


def _followers(flow: Sequence[sass.Instruction], labels: dict[str, int], n: int) -> list[int]:
    target = flow[n].target
    jump = [labels[target]] if target is not None and target in labels else []
    return [*jump, *([n + 1] if flow[n].continues else [])]


def _head(flow: Sequence[sass.Instruction], labels: dict[str, int], loop: frozenset[int]) -> int:
    """Where the loop is entered from outside."""
    for n in range(len(flow)):
        if n not in loop:
            entered = [m for m in _followers(flow, labels, n) if m in loop]
            if entered:
                return entered[0]
    return min(loop)


def _decode(line: dict[str, str], jumps: bool) -> Instruction:
    bits = int(line["high"], 16) >> 41
    name, _, operands = line["text"].partition(" ")
    never = line["predicate"] == "PT" and line["not"] == "!"
    return Instruction(
        name=name,
        stall=max(1, bits & 15),
        result=min(NONE, bits >> 5 & 7),
        operands=min(NONE, bits >> 8 & 7),
        waits=tuple(n for n in range(6) if bits >> 11 >> n & 1),
        operand=operands.strip().replace(" ", "") if name.startswith("DEPBAR") else "",
        jumps=jumps,
        never=never,
    )
