"""Simplify a failing call as long as it fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from fuzzing.broken import WAYS
from fuzzing.calls import Call, is_sound

ATTEMPTS = 250


def shrink(call: Call, fails: Callable[[Call], bool]) -> Call:
    """A simpler call that fails, by greedy search: options get their defaults, sizes become 1, 8, half or one less."""
    attempts = 0
    while True:
        for simpler in _simpler(call, Call(seed=0, backend=call.backend, device=call.device)):
            attempts += 1
            if attempts > ATTEMPTS:
                return call
            if is_sound(simpler) and (not call.broken or WAYS[call.broken].applies(simpler)) and fails(simpler):
                call = simpler
                break
        else:
            return call


def _simpler(value: Any, default: Any) -> Iterator[Any]:
    """Values one step nearer to the default, the largest steps first."""
    if value == default:
        return
    if not isinstance(value, Call):
        yield default
    if dataclasses.is_dataclass(value):
        towards = type(value)() if default is None else default
        for field in dataclasses.fields(value):
            if not field.metadata.get("fixed"):
                for each in _simpler(getattr(value, field.name), getattr(towards, field.name)):
                    yield dataclasses.replace(value, **{field.name: each})  # type: ignore[type-var]
    elif type(value) is int and value > 1:
        yield from sorted({n for n in (8, value // 2, value - 1) if n < value})
    elif type(value) is float and value != 0:
        exponent = round(math.log10(abs(value)))
        yield from (10.0**n for n in sorted({0, exponent // 2, exponent - (exponent > 0)}) if n < exponent)


def traits(value: Any, default: Any = None, name: str = "") -> frozenset[str]:
    """The options, except sizes, that differ from the default. Failures with equal traits are printed once."""
    if dataclasses.is_dataclass(value):
        default = Call(seed=0) if isinstance(value, Call) else type(value)() if default is None else default
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("seed", "B", "Nq", "Nk", "D", "Dv")]
        return frozenset().union(*(traits(getattr(value, f), getattr(default, f), f"{name}.{f}") for f in fields))
    if value == default:
        return frozenset()
    return frozenset({f"{name}={value}" if isinstance(value, str) else name})
