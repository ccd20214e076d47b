"""Floating instructions of the emulator against exact rational arithmetic, rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from emulator.ptx.scalars import DTYPE
from emulator.ptx.testing import evaluate
from exact_floats import check, exactly, held, numbers, rounded, values

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
