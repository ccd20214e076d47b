"""Floating instructions of the emulator against exact rational arithmetic, rounded once."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from emulator.ptx.scalars import DTYPE, from_bfloat16, integer_range
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


ARITHMETIC = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


@pytest.mark.parametrize("type_", ["f16", "f32", "f64"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, type_):
    """Those of bf16 come with sm_90."""
    check(f"{name}.rn.{type_} %d, %a, %b;", exactly(ARITHMETIC[name], type_), type_, *numbers(type_, 2))


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32"])
def test_fused_multiply_add(type_):
    a, b, c = numbers(type_, 3)
    # Products that the sum nearly cancels, and sums next to a tie: one rounding and two differ there.
    check(f"fma.rn.{type_} %d, %a, %b, %c;", exactly(lambda x, y, z: x * y + z, type_), type_, a, b, c)
    pairs = zip(values(a, type_).tolist(), values(b, type_).tolist(), strict=True)
    negated = [rounded(-Fraction(x) * Fraction(y), type_) if math.isfinite(x * y) else 0.0 for x, y in pairs]
    product = held(negated, type_)
    check(f"fma.rn.{type_} %d, %a, %b, %c;", exactly(lambda x, y, z: x * y + z, type_), type_, a, b, product)


@pytest.mark.parametrize("sign", [1, -1])
def test_fused_multiply_add_next_to_a_tie(sign):
    """The product is 2^-24 less 2^-70: float64 rounds its sum with an odd number to a tie, which goes the wrong way."""
    a = np.full(2, 2.0**-12 * (1 + 2.0**-23), np.float32)
    b = np.array([1, -1], np.float32) * np.float32(sign * 2.0**-12 * (1 - 2.0**-23))
    c = np.full(2, sign * (1 + 2.0**-23), np.float32)
    check("fma.rn.f32 %d, %a, %b, %c;", exactly(lambda x, y, z: x * y + z, "f32"), "f32", a, b, c)


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_packed_halves(type_):
    """Each half by itself."""
    a, b, c = numbers(type_, 3)
    n = len(a) // 2 * 2
    packed = [("b32", x[:n].copy().view(np.uint32)) for x in (a, b, c)]
    for op in ("fma.rn", "max", "min.NaN", "neg", "abs"):
        operands = {"fma.rn": 3, "max": 2, "min.NaN": 2}.get(op, 1)
        sources = ", ".join(("%a", "%b", "%c")[:operands])
        both = evaluate(f"{op}.{type_}x2 %d, {sources};", "b32", *packed[:operands]).view(DTYPE[type_])
        alone = evaluate(f"{op}.{type_} %d, {sources};", type_, *((type_, x[:n]) for x in (a, b, c)[:operands]))
        np.testing.assert_array_equal(both.view(np.uint16), alone.view(np.uint16))


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
def test_minimum_and_maximum(type_):
    """The number wins against NaN, and with .NaN it loses."""
    a, b = numbers(type_, 2)

    def of(choose, nan_wins):
        def definition(x, y):
            if math.isnan(x) or math.isnan(y):
                return math.nan if nan_wins or (math.isnan(x) and math.isnan(y)) else y if math.isnan(x) else x
            return choose(x, y)

        return definition

    for name, choose in (("min", min), ("max", max)):
        check(f"{name}.{type_} %d, %a, %b;", of(choose, False), type_, a, b)
        if type_ != "f64":
            check(f"{name}.NaN.{type_} %d, %a, %b;", of(choose, True), type_, a, b)


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
def test_sign(type_):
    (a,) = numbers(type_, 1)
    check(f"neg.{type_} %d, %a;", lambda x: -x, type_, a)
    check(f"abs.{type_} %d, %a;", abs, type_, a)
    got = evaluate(f"neg.{type_} %d, %a;", type_, (type_, held([0.0, -0.0], type_)))
    assert np.signbit(values(got, type_)).tolist() == [True, False]


def test_flush_to_zero():
    """Subnormal operands and results are zeros of their sign."""
    small = np.array([2.0**-127, -(2.0**-127), 2.0**-126, 2.0**-100], np.float32)
    one, half = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
    got = evaluate("mul.ftz.f32 %d, %a, %b;", "f32", ("f32", small), ("f32", one))
    assert got.tolist() == [0.0, 0.0, 2.0**-126, 2.0**-100]
    assert np.signbit(got).tolist() == [False, True, False, False]
    got = evaluate("fma.rn.ftz.f32 %d, %a, %b, %c;", "f32", ("f32", small), ("f32", half), ("f32", 0 * half))
    assert got.tolist() == [0.0, 0.0, 0.0, 2.0**-101]
    got = evaluate("ex2.approx.ftz.f32 %d, %a;", "f32", ("f32", np.array([-126.5, -126.0], np.float32)))
    assert got.tolist() == [0.0, 2.0**-126]
    got = evaluate("setp.gt.ftz.f32 %d, %a, %b;", "pred", ("f32", small), ("f32", 0 * small))
    assert got.tolist() == [0, 0, 1, 1]


FUNCTIONS = {
    "ex2.approx.f32": (math.exp2, -126.0, 127.0, 2.0**-22),
    "lg2.approx.f32": (math.log2, 1e-30, 1e30, 2.0**-22),
    "rcp.approx.f32": (lambda x: 1 / x, 1e-30, 1e30, 2.0**-23),
    "sqrt.approx.f32": (math.sqrt, 0.0, 1e30, 2.0**-23),
    "rsqrt.approx.f32": (lambda x: 1 / math.sqrt(x), 1e-30, 1e30, 2.0**-22),
    "sin.approx.f32": (math.sin, -math.pi, math.pi, 2.0**-20),
    "cos.approx.f32": (math.cos, -math.pi, math.pi, 2.0**-20),
    "tanh.approx.f32": (math.tanh, -5.0, 5.0, 2.0**-11),
    "sqrt.rn.f32": (math.sqrt, 0.0, 1e30, 0.0),
    "rcp.rn.f32": (lambda x: 1 / x, 1e-30, 1e30, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """Rounded correctly; or off by up to their documented error, and by more than a tenth of it somewhere."""
    function, low, high, error = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, 500)
    if low == 1e-30:
        x = 10 ** rng.uniform(-30, 30, 500)
        x[:100] = rng.uniform(0.5, 2, 100)
    x = x.astype(np.float32)
    exact = np.array([function(float(v)) for v in x])
    absolute = name[:3] in ("sin", "cos") or (name[:3] == "lg2" and (x > 0.5) & (x < 2))
    unit = np.where(absolute, 1.0, np.abs(exact))
    rounding = 2.0**-24 * np.abs(exact) * 1.0001
    got = evaluate(f"{name} %d, %a;", "f32", ("f32", x))
    assert (np.abs(got - exact) <= rounding).all()
    worst = 0.0
    for seed in range(3):
        off = np.abs(evaluate(f"{name} %d, %a;", "f32", ("f32", x), approximation=1.0, seed=seed) - exact)
        assert (off <= error * unit + rounding).all()
        worst = max(worst, ((off - rounding) / unit).max())
    assert worst > 0.1 * error if error else worst <= 0


def test_division():
    a, b = numbers("f32", 2)

    def definition(x, y):
        if math.isfinite(x) and math.isfinite(y) and y:
            return rounded(Fraction(x) / Fraction(y), "f32")
        with np.errstate(all="ignore"):
            return float(np.float64(x) / np.float64(y))

    check("div.rn.f32 %d, %a, %b;", definition, "f32", a, b)
    check("div.full.f32 %d, %a, %b;", definition, "f32", a, b)


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "num": lambda a, b: True, "nan": lambda a, b: False,
}  # fmt: skip


def holds(comparison: str, x: float, y: float) -> bool:
    """False for NaN, but for the names that end in u, and nan."""
    if math.isnan(x) or math.isnan(y):
        return comparison == "nan" or comparison in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    return COMPARISONS[comparison[:2] if comparison not in ("num", "nan") else comparison](x, y)


@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("comparison", [*COMPARISONS, "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons(comparison, type_):
    a, b = numbers(type_, 2)
    wanted = [holds(comparison, x, y) for x, y in zip(values(a, type_), values(b, type_), strict=True)]
    got = evaluate(f"setp.{comparison}.{type_} %d, %a, %b;", "pred", (type_, a), (type_, b))
    np.testing.assert_array_equal(got, wanted)
    third = (np.arange(len(a)) % 3 == 0).astype(np.uint8)
    got = evaluate(f"setp.{comparison}.and.{type_} %d|%e, %a, %b, %c;", "pred", (type_, a), (type_, b), ("pred", third))
    np.testing.assert_array_equal(got[:, 0], np.array(wanted) & (third != 0))
    np.testing.assert_array_equal(got[:, 1], ~np.array(wanted) & (third != 0))
    got = evaluate(f"set.{comparison}.u32.{type_} %d, %a, %b;", "u32", (type_, a), (type_, b))
    np.testing.assert_array_equal(got, np.where(wanted, 0xFFFFFFFF, 0))


@pytest.mark.parametrize("type_", ["f16", "bf16"])
@pytest.mark.parametrize("comparison", ["eq", "lt", "geu", "neu", "ne", "nan"])
def test_comparisons_of_packed_halves(comparison, type_):
    """p from the low halves, q from the high ones (PTX ISA, "Half Precision Comparison Instructions")."""
    a, b = (x[: len(x) // 2 * 2] for x in numbers(type_, 2))
    wanted = [holds(comparison, x, y) for x, y in zip(values(a, type_), values(b, type_), strict=True)]
    packed = [("b32", x.copy().view(np.uint32)) for x in (a, b)]
    got = evaluate(f"setp.{comparison}.{type_}x2 %d|%e, %a, %b;", "pred", *packed)
    np.testing.assert_array_equal(got.reshape(-1), wanted)
    third = (np.arange(len(a) // 2) % 3 == 0).astype(np.uint8)
    got = evaluate(f"setp.{comparison}.or.{type_}x2 %d|%e, %a, %b, !%c;", "pred", *packed, ("pred", third))
    np.testing.assert_array_equal(got, np.array(wanted).reshape(-1, 2) | (third == 0)[:, None])


@pytest.mark.parametrize("rounding", ["rn", "rz"])
@pytest.mark.parametrize(("to", "of"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64")])
def test_narrowing(to, of, rounding):
    """Also the halfway points of the narrow format and their neighbours."""
    (narrow,) = numbers(to, 1)
    centre = values(narrow, to)
    step = 2.0 ** -FORMATS[to][0]
    near = [centre * (1 + k * step / 2) * (1 + e * 2.0 ** -FORMATS[of][0]) for k in (-1, 0, 1) for e in (-1, 0, 1)]
    with np.errstate(all="ignore"):
        a = np.concatenate([*(x.astype(DTYPE[of]) for x in near), *numbers(of, 1)])
    check(f"cvt.{rounding}.{to}.{of} %d, %a;", exactly_converted(to, rounding), of, a, out=to)
    if of == "f32":
        got = evaluate(f"cvt.{rounding}.{to}x2.f32 %d, %a, %b;", "b32", ("f32", a), ("f32", a[::-1].copy()))
        one = evaluate(f"cvt.{rounding}.{to}.f32 %d, %a;", to, ("f32", a)).view(np.uint16)
        np.testing.assert_array_equal(got >> 16, one)
        np.testing.assert_array_equal(got & 0xFFFF, one[::-1])


def exactly_converted(to, rounding):
    return lambda x: rounded(Fraction(x), to, rounding) if math.isfinite(x) else x


@pytest.mark.parametrize(("to", "of"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_widening(to, of):
    check(f"cvt.{to}.{of} %d, %a;", lambda x: x, of, *numbers(of, 1), out=to)


def test_tf32():
    """10 bits of fraction, ties away from zero."""
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    x[:4] = [1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23, math.inf]
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", "f32", ("f32", x))
    for value, result in zip(x[np.isfinite(x)].tolist(), got[np.isfinite(x)].tolist(), strict=True):
        scale = 2.0 ** (10 - math.frexp(value)[1] + 1)
        assert result == math.copysign(math.floor(abs(value) * scale + 0.5) / scale, value)
    assert got[3] == math.inf


TO_WHOLE = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", TO_WHOLE)
@pytest.mark.parametrize("of", ["f16", "f32", "f64"])
def test_to_whole_numbers(of, rounding):
    """Out of range is the nearest integer there is; NaN is 0."""
    a = np.concatenate([*numbers(of, 1), held([0.5, 1.5, -0.5, -1.5, 2.5, 1e3], of)])
    for to in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        least, most = integer_range(to)
        got = evaluate(f"cvt.{rounding}.{to}.{of} %d, %a;", to, (of, a))
        for x, result in zip(a.astype(np.float64).tolist(), got.tolist(), strict=True):
            wanted = 0 if math.isnan(x) else x
            if math.isfinite(wanted):
                wanted = TO_WHOLE[rounding](wanted)
            assert result == min(max(wanted, least), most), (to, x)
    check(
        f"cvt.{rounding}.{of}.{of} %d, %a;",
        lambda x: float(TO_WHOLE[rounding](x)) if math.isfinite(x) else x, of, a,
    )  # fmt: skip


@pytest.mark.parametrize("of", ["u8", "s8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_from_whole_numbers(to, of):
    least, most = integer_range(of)
    a = [least, most, most - 1, 0, 1, most // 3, 2**24 + 1, 2**24 + 3, 2**53 + 1, 513, 257]
    a += np.random.default_rng(0).integers(least, most, 200, DTYPE[of]).tolist()
    a = np.array([x for x in a if least <= x <= most], DTYPE[of])
    got = values(evaluate(f"cvt.rn.{to}.{of} %d, %a;", to, (of, a)), to)
    assert got.tolist() == [rounded(Fraction(int(x)), to) for x in a]
