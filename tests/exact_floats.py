"""Floating formats in exact rational arithmetic, and instructions of the emulator against it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
from emulator.ptx.scalars import DTYPE, from_bfloat16
from emulator.ptx.testing import evaluate

# Bits of the fraction, least exponent of a normal number, largest exponent.
FORMATS = {"f16": (10, -14, 15), "bf16": (7, -126, 127), "f32": (23, -126, 127), "f64": (52, -1022, 1023)}


def rounded(exact: Fraction, type_: str, mode: str = "rn") -> float:
    """The nearest number of the format, of two as near the even one; or the nearest towards zero."""
    if exact == 0:
        return 0.0
    sign = -1.0 if exact < 0 else 1.0
    fraction, least, most = FORMATS[type_]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, least) - fraction)
    steps = size / step
    whole = steps.numerator // steps.denominator if mode == "rz" else round(steps)  # to even, as Python rounds
    if whole * step >= Fraction(2) ** (most + 1):
        largest = (2 - Fraction(1, 2**fraction)) * Fraction(2) ** most
        return sign * (float(largest) if mode == "rz" else math.inf)
    return sign * float(whole * step)


def values(pattern: np.ndarray, type_: str) -> np.ndarray:
    """What is held, in float64."""
    return (from_bfloat16(pattern) if type_ == "bf16" else pattern).astype(np.float64)


def held(numbers, type_: str) -> np.ndarray:
    """Exact numbers of the format, as they are held."""
    numbers = np.array(numbers, np.float64)
    if type_ == "bf16":
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(DTYPE[type_])


def numbers(type_: str, count: int, seed: int = 0) -> list[np.ndarray]:
    """Special values with each other, random ones of every exponent, and ones of like size, as held."""
    fraction, least, most = FORMATS[type_]
    largest, smallest = (2 - 2.0**-fraction) * 2.0**most, 2.0 ** (least - fraction) if type_ != "f64" else 5e-324
    special = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-fraction, 3.0, -largest, largest, smallest, 2.0**least, math.inf]
    special += [-math.inf, math.nan, 0.5, 2.0 ** (fraction + 1) + 2]
    rows = list(itertools.product(special, repeat=count))
    rng = np.random.default_rng(seed)
    for spread in ((least - fraction, most), (-2, 2)):
        mantissa = rng.integers(2**fraction, 2 ** (fraction + 1), (300, count)) * rng.choice([-1, 1], (300, count))
        exponent = rng.integers(*spread, (300, count))
        sample = np.ldexp(mantissa.astype(np.float64), exponent - fraction)
        rows += [tuple(rounded(Fraction(x), type_) for x in row) for row in sample.tolist()]
    return [held(column, type_) for column in zip(*rows, strict=True)]


def check(instruction, definition, type_, *inputs, out=None):
    """`definition` of finite numbers is exact; where an operand or the result is not finite, floating rules hold."""
    out = out or type_
    got = values(evaluate(instruction, out, *((type_, x) for x in inputs)), out)
    for row, result in zip(zip(*(values(x, type_) for x in inputs), strict=True), got, strict=True):
        wanted = definition(*row)
        assert (math.isnan(wanted) and math.isnan(result)) or wanted == result, (instruction, row, wanted, result)


def exactly(function, type_):
    """The function on fractions, rounded once; on what is not finite, as Python's floats have it."""

    def definition(*row):
        if all(map(math.isfinite, row)):
            return rounded(function(*map(Fraction, row)), type_)
        with np.errstate(all="ignore"):
            return float(function(*map(np.float64, row)))

    return definition
