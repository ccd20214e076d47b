"""PTX text into instructions."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

from .errors import PTXError
from .operands import (
    LOCAL_BASE,
    PREDICATE,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)  # fmt: skip
from .scalars import SIZE, U8, UINT, Array


def split(text: str) -> list[str]:
    """Cut at the commas that stand outside of {} and []."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    return [*pieces, current.strip()] if current.strip() else pieces


_DECLARATION = r"\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\[(\d*)\]"
_LINKAGE = r"(?:\.(?:extern|visible|weak)\s+)*"


class Module:
    """A PTX module with one kernel."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment.group().count("\n"), text, flags=re.S)
        entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S))
        if len(entries) != 1:
            raise PTXError(f"a module with one .entry is wanted, this one has {len(entries)}")
        entry = entries[0]
        self.name: str = entry.group(1)
        self.parameters = [self._parameter(p) for p in split(re.sub(r"//[^\n]*", "", entry.group(2)))]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.group(3))
        self.threads = int(threads.group(1)) if threads else None
        self.shared_symbols: dict[str, int | None] = {}  # offsets; None: dynamic, behind the static ones
        self.static_shared = 0
        self.global_symbols: dict[str, Array] = {}
        self.local_symbols: dict[str, int] = {}
        self.local_size = 0
        self.registers: dict[int, int] = defaultdict(int)  # how many of each size class
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._named: dict[str, Register] = {}
        self._ranges: dict[str, tuple[Register, int]] = {}  # prefix -> first, count
        self._scopes: list[dict[str, str]] = [{}]
        self._files: dict[str, str] = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        end = self._end_of_body(text, entry.end())
        for line in (text[: entry.start()] + text[end:]).split("\n"):
            self._module_line(line.split("//")[0].strip())
        self._body(text[entry.end() : end - 1], text[: entry.end()].count("\n") + 1)

    @staticmethod
    def _parameter(text: str) -> Parameter:
        found = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(.*?)([\w$]+)(\[\d+\])?$", text, re.S)
        if not found or found.group(4):
            raise PTXError(f"cannot read the parameter {text}")
        return Parameter(found.group(3), found.group(1), ".ptr" in found.group(2))

    @staticmethod
    def _end_of_body(text: str, end: int) -> int:
        depth = 1
        while depth:
            found = re.compile(r"//[^\n]*|[{}]").search(text, end)
            if not found:
                raise PTXError("the kernel's body has no end")
            end = found.end()
            depth += {"{": 1, "}": -1}.get(found.group(), 0)
        return end

    def _module_line(self, text: str) -> None:
        found = re.match(_LINKAGE + r"\.shared" + _DECLARATION, text)
        if found:
            self._shared(found)
        found = re.match(_LINKAGE + r"\.(?:global|const)" + _DECLARATION + r"(?:\s*=\s*\{(.*)\})?", text)
        if found:
            dtype = UINT[SIZE[found.group(2)]]
            data = np.zeros(int(found.group(4)), dtype)
            if found.group(5):
                values = [int(x, 0) for x in found.group(5).split(",")]
                data[: len(values)] = np.array(values).astype(dtype)
            self.global_symbols[found.group(3)] = data.view(U8)

    def _shared(self, found: re.Match[str]) -> None:
        align, type_, name, count = found.groups()
        if not count:
            self.shared_symbols[name] = None
            return
        offset = -(-self.static_shared // int(align or 1)) * int(align or 1)
        self.shared_symbols[name] = offset
        self.static_shared = offset + int(count) * SIZE[type_]

    def _body(self, body: str, first_line: int) -> None:
        source, statement, begun = "", "", 0
        for number, raw in enumerate(body.split("\n"), first_line):
            text = raw.split("//")[0].strip()
            if text.split()[:1] == [".loc"]:
                words = text.split()
                source = f"{self._files.get(words[1], words[1]).split('/')[-1]}:{words[2]}"
                continue
            while text:
                if not statement:
                    mark = re.match(r"([{}])\s*|([$\w.]+):(?!:)\s*", text)
                    if mark:
                        self._mark(mark)
                        text = text[mark.end() :]
                        continue
                    begun = number
                head, semicolon, rest = text.partition(";")
                if not semicolon:
                    if statement or not text.startswith((".pragma", ".file", ".section")):
                        statement += text + " "
                    break
                self._statement((statement + head).strip(), begun, source)
                statement, text = "", rest.strip()
        if statement.strip():
            raise PTXError(f"unfinished statement at the end of the body: {statement}")

    def _mark(self, mark: re.Match[str]) -> None:
        """A brace or a label."""
        if mark.group(1) == "{":
            self._scopes.append({})
        elif mark.group(1) == "}":
            self._scopes.pop()
        else:
            self.labels[mark.group(2)] = len(self.code)

    def _statement(self, text: str, line: int, source: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._declare_registers(text, line)
            return
        found = re.match(r"\.shared" + _DECLARATION, text)
        if found:
            self._shared(found)
            return
        found = re.match(r"\.local" + _DECLARATION, text)
        if found:
            offset = -(-self.local_size // 16) * 16
            self.local_symbols[found.group(3)] = LOCAL_BASE + offset
            self.local_size = offset + int(found.group(4)) * SIZE[found.group(2)]
            return
        found = re.match(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if not found:
            raise PTXError(f"PTX line {line}: cannot read {text}")
        negated, guard, op, args = found.groups()
        operands = [self._operand(a) for a in split(args)]
        condition = self._operand(guard) if guard else None
        shown = " ".join(text.split())
        self.code.append(Instruction(op, operands, condition, negated == "!", line, source, shown))

    def _declare_registers(self, text: str, line: int) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if not found or found.group(1) not in SIZE:
            raise PTXError(f"PTX line {line}: cannot read {text}")
        size = PREDICATE if found.group(1) == "pred" else SIZE[found.group(1)]
        for declared in split(found.group(2)):
            block = re.match(r"(.*?)<(\d+)>$", declared)
            count = int(block.group(2)) if block else 1
            register = Register(size, self.registers[size])
            self.registers[size] += count
            if block:
                self._ranges[block.group(1)] = (register, count)
            else:  # the same name may stand in several scopes
                unique = f"{declared}@{len(self._named)}"
                self._scopes[-1][declared] = unique
                self._named[unique] = register

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return self._named[scope[name]]
        numbered = re.match(r"(.*?)(\d+)$", name)
        if numbered and numbered.group(1) in self._ranges:
            first, count = self._ranges[numbered.group(1)]
            if int(numbered.group(2)) < count:
                return Register(first.size, first.index + int(numbered.group(2)))
        return None

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(x) for x in split(text[1 : text.rindex("}")])))
        if text.startswith("["):
            found = re.match(r"\[\s*(.*?)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
            if not found:
                raise PTXError(f"cannot read the address {text}")
            return Address(self._operand(found.group(1)), int(found.group(2) or "0", 0))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Negated(self._operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        register = self._register(text)
        if register:
            return register
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), "f32")
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), "f64")
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Immediate(int(text.rstrip("U"), 0), "int")
        return Special(text) if text.startswith("%") else Symbol(text)
