"""Instructions and what they name."""

from __future__ import annotations

from dataclasses import dataclass, field

PREDICATE = 0  # the size class of predicate registers; the others' is their size in bytes
TERMINATORS = ("bra", "ret", "exit", "trap")
LOCAL_BASE = 0x10000  # where .local memory begins


@dataclass(frozen=True)
class Register:
    size: int
    index: int


@dataclass(frozen=True)
class Immediate:
    bits: int
    kind: str  # "int", "f32" or "f64"


@dataclass(frozen=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two destinations: `p|q`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    operand: Operand


@dataclass(frozen=True)
class Sink:
    """`_`, a destination nobody wants."""


Operand = Register | Immediate | Special | Symbol | Vector | Address | Pair | Negated | Sink


@dataclass
class Instruction:
    op: str  # "ld.global.v4.b32"
    args: list[Operand]
    guard: Operand | None
    guard_negated: bool
    line: int
    source: str  # "attention.py:42", of Triton's .loc
    text: str
    parts: list[str] = field(init=False)  # "ld", "global", "v4", "b32"; `::` is written `__`

    def __post_init__(self) -> None:
        self.parts = self.op.replace("::", "__").split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    def has(self, *modifiers: str) -> bool:
        """Whether any of the modifiers is there."""
        return any(modifier in self.parts for modifier in modifiers)

    def one_of(self, *modifiers: str) -> str | None:
        """The first of the instruction's parts that is one of these."""
        return next((part for part in self.parts[1:] if part in modifiers), None)

    def where(self) -> str:
        return f"PTX line {self.line} ({self.source or '?'}): {self.text}"


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    is_pointer: bool
