"""Conversions from and to floating numbers, against exact fractions rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from emulator.ptx.scalars import DTYPE, integer_range
from emulator.ptx.testing import evaluate
from exact_floats import FORMATS, check, held, numbers, rounded, values


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
