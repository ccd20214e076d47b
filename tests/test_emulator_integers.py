"""Integer instructions of the emulator, thread by thread, against the PTX ISA in Python's integers."""

import itertools

import numpy as np
import pytest
from emulator.ptx.scalars import DTYPE, SIZE, integer_range
from emulator.ptx.testing import evaluate

WORDS = ("u16", "s16", "u32", "s32", "u64", "s64")


def numbers(type_: str, count: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Every combination of special values, and random ones."""
    least, most = integer_range(type_)
    special = [least, least + 1, 0, 1, 2, 3, 7, most - 1, most, most // 3] + ([-1, -2] if least < 0 else [])
    rows = list(itertools.product(special, repeat=count))
    rng = np.random.default_rng(seed)
    rows += [tuple(map(int, row)) for row in rng.integers(least, most, (200, count), dtype=DTYPE[type_], endpoint=True)]
    return [np.array(column, DTYPE[type_]) for column in zip(*rows, strict=True)]


def wrap(value: int, type_: str) -> int:
    width = 8 * SIZE[type_]
    value &= (1 << width) - 1
    return value - (1 << width) if type_[0] == "s" and value >> (width - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def check(instruction, definition, out, *inputs):
    got = evaluate(instruction, out, *inputs)
    wanted = [wrap(definition(*map(int, row)), out) for row in zip(*(x for _, x in inputs), strict=True)]
    np.testing.assert_array_equal(got, np.array(wanted, DTYPE[out]))


ARITHMETIC = {
    "add": lambda a, b, width: a + b,
    "sub": lambda a, b, width: a - b,
    "mul.lo": lambda a, b, width: a * b,
    "mul.hi": lambda a, b, width: (a * b) >> width,
    "min": lambda a, b, width: min(a, b),
    "max": lambda a, b, width: max(a, b),
    "div": lambda a, b, width: quotient(a, b),
    "rem": lambda a, b, width: a - b * quotient(a, b),
}


@pytest.mark.parametrize("type_", WORDS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, type_):
    a, b = numbers(type_, 2)
    if name in ("div", "rem"):
        b[b == 0] = 5
        if type_[0] == "s":
            b[(a == integer_range(type_)[0]) & (b == -1)] = 1  # the quotient is no number of the type
    width = 8 * SIZE[type_]
    check(f"{name}.{type_} %d, %a, %b;", lambda x, y: ARITHMETIC[name](x, y, width), type_, (type_, a), (type_, b))


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32"])
def test_wide_products(type_):
    wide = type_[0] + str(16 * SIZE[type_])
    a, b = numbers(type_, 2)
    c = numbers(wide, 2)[0]
    c = np.resize(c, len(a))
    check(f"mul.wide.{type_} %d, %a, %b;", lambda x, y: x * y, wide, (type_, a), (type_, b))
    check(f"mad.wide.{type_} %d, %a, %b, %c;", lambda x, y, z: x * y + z, wide, (type_, a), (type_, b), (wide, c))


@pytest.mark.parametrize("type_", WORDS)
def test_multiply_add(type_):
    inputs = [(type_, x) for x in numbers(type_)]
    check(f"mad.lo.{type_} %d, %a, %b, %c;", lambda x, y, z: x * y + z, type_, *inputs)
    width = 8 * SIZE[type_]
    check(f"mad.hi.{type_} %d, %a, %b, %c;", lambda x, y, z: ((x * y) >> width) + z, type_, *inputs)


@pytest.mark.parametrize("type_", ["b16", "b32", "b64"])
def test_logic(type_):
    a, b, c = ((type_, x) for x in numbers(type_))
    check(f"and.{type_} %d, %a, %b;", lambda x, y: x & y, type_, a, b)
    check(f"or.{type_} %d, %a, %b;", lambda x, y: x | y, type_, a, b)
    check(f"xor.{type_} %d, %a, %b;", lambda x, y: x ^ y, type_, a, b)
    check(f"not.{type_} %d, %a;", lambda x: ~x, type_, a)
    if type_ == "b32":
        check("lop3.b32 %d, %a, %b, %c, 202;", lambda x, y, z: (x & y) | (~x & z), type_, a, b, c)  # 0xca
        check("lop3.b32 %d, %a, %b, %c, 150;", lambda x, y, z: x ^ y ^ z, type_, a, b, c)  # 0x96


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts(type_):
    width = 8 * SIZE[type_]
    (a,) = numbers(type_, 1)
    amounts = [0, 1, 5, width - 1, width, width + 1, 1000, 2**31]
    pairs = list(itertools.product(a, amounts))
    a, b = np.array([x for x, _ in pairs], DTYPE[type_]), np.array([y for _, y in pairs], np.uint32)
    check(f"shl.b{width} %d, %a, %b;", lambda x, n: x << n if n < width else 0, type_, (type_, a), ("u32", b))
    check(f"shr.{type_} %d, %a, %b;", lambda x, n: x >> min(n, width), type_, (type_, a), ("u32", b))
    check(f"shr.{type_} %d, %a, 3;", lambda x: x >> 3, type_, (type_, a))
    check(f"shl.b{width} %d, %a, 3;", lambda x: x << 3, type_, (type_, a))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode):
    low, high, amount = numbers("u32")
    amount = amount % 70

    def definition(direction):
        def shift(lo, hi, n):
            n = n & 31 if mode == "wrap" else min(n, 32)
            both = hi << 32 | lo
            return both << n >> 32 if direction == "l" else both >> n

        return shift

    inputs = ("u32", low), ("u32", high), ("u32", amount)
    check(f"shf.l.{mode}.b32 %d, %a, %b, %c;", definition("l"), "u32", *inputs)
    check(f"shf.r.{mode}.b32 %d, %a, %b, %c;", definition("r"), "u32", *inputs)


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_fields(type_):
    width = 8 * SIZE[type_]
    a, b = numbers(type_, 2)
    rng = np.random.default_rng(1)
    position, length = (rng.integers(0, limit, len(a)).astype(np.uint32) for limit in (width + 8, width + 8))

    def extract(x, at, n):  # as in the PTX ISA, bit by bit
        bits = [x >> i & 1 for i in range(width)]
        top = 0 if type_[0] == "u" or n == 0 else bits[min(at + n - 1, width - 1)]
        return sum((bits[at + i] if i < n and at + i < width else top) << i for i in range(width))

    def insert(x, y, at, n):
        for i in range(n):
            if at + i < width:
                y = y & ~(1 << at + i) | (x >> i & 1) << at + i
        return y

    fields = ("u32", position), ("u32", length)
    check(f"bfe.{type_} %d, %a, %b, %c;", extract, type_, (type_, a), *fields)
    if type_[0] == "u":
        check(f"bfi.b{width} %d, %a, %b, %c, %f;", insert, type_, (type_, a), (type_, b), *fields)


def test_permute():
    a, b = numbers("u32", 2)
    selector = np.random.default_rng(2).integers(0, 2**16, len(a)).astype(np.uint32)

    def permute(x, y, s):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        out = []
        for j in range(4):
            nibble = s >> 4 * j & 15
            byte = source[nibble & 7]
            out.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    check("prmt.b32 %d, %a, %b, %c;", permute, "u32", ("u32", a), ("u32", b), ("u32", selector))


@pytest.mark.parametrize("width", [32, 64])
def test_counts_of_bits(width):
    (a,) = numbers(f"u{width}", 1)
    source = (f"u{width}", a)
    check(f"popc.b{width} %d, %a;", lambda x: x.bit_count(), "u32", source)
    check(f"clz.b{width} %d, %a;", lambda x: width - x.bit_length(), "u32", source)
    check(f"bfind.u{width} %d, %a;", lambda x: x.bit_length() - 1, "u32", source)
    check(f"brev.b{width} %d, %a;", lambda x: int(format(x, f"0{width}b")[::-1], 2), f"u{width}", source)


@pytest.mark.parametrize("type_", ["s16", "s32", "s64"])
def test_sign(type_):
    (a,) = numbers(type_, 1)
    check(f"neg.{type_} %d, %a;", lambda x: -x, type_, (type_, a))
    check(f"abs.{type_} %d, %a;", abs, type_, (type_, a))


def test_carries():
    a, b = numbers("u32", 2)
    inputs = ("u32", a), ("u32", b)
    add = "add.cc.u32 %d, %a, %b;\naddc.u32 %e, %a, %b;"
    got = evaluate(add, "u32", *inputs)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    wanted = [[(x + y) & 0xFFFFFFFF, (x + y + (x + y >> 32)) & 0xFFFFFFFF] for x, y in pairs]
    np.testing.assert_array_equal(got, np.array(wanted, np.uint32))
    subtract = "sub.cc.u32 %d, %a, %b;\nsubc.u32 %e, %a, %b;"
    got = evaluate(subtract, "u32", *inputs)
    wanted = [[(x - y) & 0xFFFFFFFF, (x - y - (x < y)) & 0xFFFFFFFF] for x, y in pairs]
    np.testing.assert_array_equal(got, np.array(wanted, np.uint32))


@pytest.mark.parametrize(("first", "second"), [("u32", "u32"), ("s32", "s32"), ("u32", "s32"), ("s32", "u32")])
def test_dot_of_bytes(first, second):
    a, b, c = numbers("u32")

    def definition(x, y, z):
        signed = [kind[0] == "s" for kind in (first, second)]
        parts = [
            [int.from_bytes([byte], "little", signed=s) for byte in v.to_bytes(4, "little")]
            for v, s in zip((x, y), signed, strict=True)
        ]
        return sum(p * q for p, q in zip(*parts, strict=True)) + z

    check(f"dp4a.{first}.{second} %d, %a, %b, %c;", definition, "u32", ("u32", a), ("u32", b), ("u32", c))


@pytest.mark.parametrize("type_", WORDS)
@pytest.mark.parametrize("to", ["u8", "s8", *WORDS])
def test_conversions(type_, to):
    (a,) = numbers(type_, 1)
    check(f"cvt.{to}.{type_} %d, %a;", lambda x: x, to, (type_, a))
    least, most = integer_range(to)
    check(f"cvt.sat.{to}.{type_} %d, %a;", lambda x: min(max(x, least), most), to, (type_, a))


@pytest.mark.parametrize("type_", WORDS)
@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(type_, comparison):
    a, b = numbers(type_, 2)
    definition = {
        "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    }[comparison]  # fmt: skip
    wanted = [definition(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    got = evaluate(f"setp.{comparison}.{type_} %d, %a, %b;", "pred", (type_, a), (type_, b))
    np.testing.assert_array_equal(got, wanted)
    third = np.arange(len(a)) % 3 == 0
    got = evaluate(
        f"setp.{comparison}.xor.{type_} %d|%e, %a, %b, !%c;", "pred", (type_, a), (type_, b),
        ("pred", third.astype(np.uint8)),
    )  # fmt: skip
    np.testing.assert_array_equal(got[:, 0], np.array(wanted) ^ ~third)
    np.testing.assert_array_equal(got[:, 1], ~np.array(wanted) ^ ~third)
    got = evaluate(
        "selp.b32 %d, %a, %b, %c;", "u32", ("u32", np.arange(len(a), dtype=np.uint32)),
        ("u32", np.arange(len(a), dtype=np.uint32)[::-1]), ("pred", third.astype(np.uint8)),
    )  # fmt: skip
    np.testing.assert_array_equal(got, np.where(third, np.arange(len(a)), np.arange(len(a))[::-1]))
