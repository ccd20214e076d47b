"""What lanes do together, against the PTX ISA's definitions written out lane by lane and element by element."""

import numpy as np
import pytest
from emulator.ptx import KernelError
from emulator.ptx.scalars import from_bfloat16
from emulator.ptx.testing import THREADS, evaluate, run

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, THREADS, dtype=np.uint32)


def shuffled(mode: str, a: list[int], b: int, c: int) -> list[tuple[int, bool]]:
    """The PTX ISA's pseudo-code for one warp."""
    out = []
    for lane in range(32):
        clamp, segment = c & 31, c >> 8 & 31
        high, low = lane & segment | clamp & ~segment, lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | b & ~segment}[mode]
        valid = j >= high if mode == "up" else j <= high
        out.append((a[j if valid else lane], valid))
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(("by", "width"), [(1, 32), (16, 32), (5, 32), (2, 8), (1, 2), (31, 16)])
def test_shuffle(mode, by, width):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    wanted = [row for w in range(0, THREADS, 32) for row in shuffled(mode, WORDS[w : w + 32].tolist(), by & 31, c)]
    got = evaluate(f"shfl.sync.{mode}.b32 %d, %a, {by}, {c}, -1;", "b32", ("b32", WORDS))
    assert got.tolist() == [value for value, _ in wanted]
    variable = ("b32", np.full(THREADS, by, np.uint32)), ("b32", np.full(THREADS, c, np.uint32))
    instruction = f".reg .pred %q;\nshfl.sync.{mode}.b32 %d|%q, %a, %b, %c, -1;\n@!%q mov.b32 %d, 0;"
    got = evaluate(instruction, "b32", ("b32", WORDS), *variable)
    assert got.tolist() == [value if valid else 0 for value, valid in wanted]


def test_votes():
    p = (RNG.random(THREADS) < 0.5).astype(np.uint8)
    p[32:64], p[64:96] = 1, 0
    warps = p.reshape(-1, 32)
    for mode, wanted in {
        "any": warps.any(1), "all": warps.all(1), "uni": warps.all(1) | ~warps.any(1),
    }.items():  # fmt: skip
        got = evaluate(f"vote.sync.{mode}.pred %d, %a, -1;", "pred", ("pred", p))
        np.testing.assert_array_equal(got, np.repeat(wanted, 32))
    ballot = [sum(int(bit) << i for i, bit in enumerate(row)) for row in warps]
    got = evaluate("vote.sync.ballot.b32 %d, %a, -1;", "b32", ("pred", p))
    np.testing.assert_array_equal(got, np.repeat(np.array(ballot, np.uint32), 32))


@pytest.mark.parametrize("type_", ["u32", "s32"])
def test_reductions(type_):
    a = WORDS.view(np.int32 if type_ == "s32" else np.uint32)
    for name, function in {"min": np.min, "max": np.max}.items():
        got = evaluate(f"redux.sync.{name}.{type_} %d, %a, -1;", type_, (type_, a))
        np.testing.assert_array_equal(got, np.repeat(function(a.reshape(-1, 32), axis=1), 32))
    got = evaluate("redux.sync.xor.b32 %d, %a, -1;", "b32", ("b32", WORDS))
    np.testing.assert_array_equal(got, np.repeat(np.bitwise_xor.reduce(WORDS.reshape(-1, 32), axis=1), 32))


def test_a_part_of_a_warp_cannot_shuffle():
    body = """.reg .pred %q; .reg .b32 %x;
    setp.lt.u32 %q, %t, 7;
    @%q shfl.sync.idx.b32 %x, %t, 0, 31, -1;"""
    with pytest.raises(KernelError, match="part of a warp"):
        run(body)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Thread 4 r + i gets elements 2 i and 2 i + 1 of row r; of column r, if transposed."""
    halves = np.arange(THREADS * 8, dtype=np.uint16)  # every thread stores a row of 16 bytes
    out = np.zeros((THREADS, 4), np.uint32)
    registers = ", ".join(f"%r{i}" for i in range(count))
    body = f"""
    .reg .b32 %r<8>; .reg .b64 %x; .reg .b32 %s, %rows;
    mad.lo.u64 %x, %tid, 16, %p0;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%x];
    mov.u32 %rows, memory;
    mad.lo.u32 %s, %t, 16, %rows;
    st.shared.v4.b32 [%s], {{%r0, %r1, %r2, %r3}};
    bar.sync 0;
    mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%s];
    mad.lo.u64 %x, %tid, 16, %p1;
    st.global.v4.b32 [%x], {{%r0, %r1, %r2, %r3}};"""
    run(body, halves, out, shared=THREADS * 16)
    rows = halves.reshape(4, 32, 8)  # of each warp
    for warp in range(4):
        for matrix in range(count):
            eight = rows[warp, 8 * matrix : 8 * matrix + 8]
            eight = eight.T if transposed else eight
            for lane in range(32):
                low, high = eight[lane // 4, 2 * (lane % 4)], eight[lane // 4, 2 * (lane % 4) + 1]
                assert out[32 * warp + lane, matrix] == int(low) | int(high) << 16


FORMS = {
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, 1), "m16n8k4.row.col.f32.tf32.tf32.f32": (4, 1),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, 2), "m16n8k8.row.col.f32.f16.f16.f32": (8, 2),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, 2), "m16n8k32.row.col.s32.s8.s8.s32": (32, 4),
    "m16n8k16.row.col.s32.u8.s8.s32": (16, 4), "m16n8k32.row.col.satfinite.s32.s8.s8.s32": (32, 4),
}  # fmt: skip


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":
        return (registers & 0xFFFFE000).astype(np.uint32).view(np.float32)
    if kind == "bf16":
        return from_bfloat16(registers.view(np.uint16))
    return registers.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind])


@pytest.mark.parametrize("form", FORMS)
def test_mma(form):
    """Two products, the second of which adds to the first, by the fragment layouts of the PTX ISA."""
    depth, e = FORMS[form]
    integer = e == 4
    kinds = form.replace(".satfinite", "").split(".")[4:6]
    halves = depth // (4 * e)
    rng = np.random.default_rng(1)
    if integer:
        a, b = (rng.integers(0, 2**32, (THREADS, n), dtype=np.uint32) for n in (2 * halves, halves))
        c = rng.integers(-(2**31), 2**31, (THREADS, 4)).astype(np.int32)
    else:

        def draw(n):
            x = rng.standard_normal((THREADS, n * e)).astype(np.float32)
            if kinds[0] == "f16":
                return x.astype(np.float16).view(np.uint32)
            return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32) if e == 2 else x.view(np.uint32)

        a, b = draw(2 * halves), draw(halves)
        c = rng.standard_normal((THREADS, 4)).astype(np.float32)
    out = np.zeros((THREADS, 4), c.dtype)
    body = ".reg .b32 %a<4>, %b<2>, %c<4>; .reg .b64 %x;\n"
    for i, (name, n) in enumerate((("a", 2 * halves), ("b", halves), ("c", 4))):
        for j in range(n):
            body += f"mad.lo.u64 %x, %tid, {4 * n}, %p{i};\nld.global.b32 %{name}{j}, [%x+{4 * j}];\n"
    vectors = ["{" + ", ".join(f"%{name}{j}" for j in range(n)) + "}" for name, n in (("a", 2 * halves), ("b", halves))]
    sums = "{%c0, %c1, %c2, %c3}"
    body += 2 * f"mma.sync.aligned.{form} {sums}, {vectors[0]}, {vectors[1]}, {sums};\n"
    body += f"mad.lo.u64 %x, %tid, 16, %p3;\nst.global.v4.b32 [%x], {sums};\n"
    run(body, a, b, c, out)
    for warp in range(4):
        of = slice(32 * warp, 32 * warp + 32)
        A, B, C = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
        xa, xb = (
            elements(np.ascontiguousarray(x[of]), k).reshape(32, -1, e) for x, k in ((a, kinds[0]), (b, kinds[1]))
        )
        for lane in range(32):
            g, i = lane // 4, lane % 4
            for j in range(2 * halves):
                for k in range(e):
                    A[g + 8 * (j % 2), e * i + k + 4 * e * (j // 2)] = xa[lane, j, k]
            for j in range(halves):
                for k in range(e):
                    B[e * i + k + 4 * e * j, g] = xb[lane, j, k]
            for j in range(4):
                C[g + 8 * (j // 2), 2 * i + j % 2] = c[of][lane, j]
        for _ in range(2):
            D = A @ B + C
            if integer:
                D = np.clip(D, -(2**31), 2**31 - 1) if "satfinite" in form else (D + 2**31) % 2**32 - 2**31
            C = D.astype(c.dtype).astype(np.float64)
        for lane in range(32):
            for j in range(4):
                assert out[of][lane, j] == C[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2]


def test_mma_of_what_an_mma_computed():
    """D of the first is A of the second, and the third overwrites what it adds to."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(-4, 5, (THREADS, 4)).astype(np.float32), rng.integers(-4, 5, (THREADS, 2)).astype(np.float32)
    outs = [np.zeros((THREADS, 4), np.float32) for _ in range(2)]
    form = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    zero = "mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0;\n"
    load = f"""
    .reg .b32 %a<4>, %b<2>, %c<4>, %d<4>; .reg .b64 %x;
    mad.lo.u64 %x, %tid, 16, %p0; ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%x];
    mad.lo.u64 %x, %tid, 8, %p1; ld.global.v2.b32 {{%b0, %b1}}, [%x];
    {zero}"""
    A, C, D = ("{" + ", ".join(f"%{name}{j}" for j in range(4)) + "}" for name in "acd")
    B = "{%b0, %b1}"
    apart = "mov.b32 %c0, %c0;\n"  # a step between makes each product a run of its own
    products = f"{form} {D}, {A}, {B}, {C};", f"{form} {C}, {D}, {B}, {C};", f"{form} {C}, {D}, {B}, {C};"
    store = "mad.lo.u64 %x, %tid, 16, %p2; st.global.v4.b32 [%x], {%c0, %c1, %c2, %c3};"
    run(load + apart.join(products) + store, a, b, outs[0])
    run(load + "".join(products) + store, a, b, outs[1])
    assert outs[0].any()
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    "kind", ["add.u32", "add.f32", "min.s32", "max.u32", "or.b32", "exch.b32", "inc.u32", "cas.b32"]
)
def test_atomics(kind, space):
    """Eight counters, on which many threads act in the same instruction; the order is that of some sequence."""
    name, type_ = kind.split(".")
    dtype = {"u32": np.uint32, "f32": np.float32, "s32": np.int32, "b32": np.uint32}[type_]
    values = np.arange(1, THREADS + 1).astype(dtype)
    cells, old = np.zeros(8, dtype), np.zeros(THREADS, dtype)
    into_shared = space == "shared"
    address = "%s" if into_shared else "%x"
    operands = {"inc": "1000", "cas": "0, %v"}.get(name, "%v")
    body = f"""
    .reg .b64 %x, %y; .reg .b32 %v, %o, %i, %s, %m; .reg .pred %q;
    mad.lo.u64 %y, %tid, 4, %p0;
    ld.global.b32 %v, [%y];
    and.b32 %i, %t, 7;
    cvt.u64.u32 %x, %i;
    mad.lo.u64 %x, %x, 4, %p1;
    mov.u32 %m, memory;
    mad.lo.u32 %s, %i, 4, %m;
    setp.lt.u32 %q, %t, 8;
    @%q st.shared.b32 [%s], 0;
    bar.sync 0;
    atom.{space}.{kind} %o, [{address}], {operands};
    bar.sync 0;
    mad.lo.u64 %y, %tid, 4, %p2;
    st.global.b32 [%y], %o;
    {"ld.shared.b32 %v, [%s]; @%q st.global.b32 [%x], %v;" if into_shared else ""}"""
    run(body, values, cells, old, shared=32)
    for cell in range(8):
        mine = values[cell::8].tolist()
        wanted = {
            "add": sum(mine), "min": min(0, *mine), "max": max(mine), "or": np.bitwise_or.reduce(values[cell::8])
            if type_ != "f32" else 0, "inc": len(mine),
        }  # fmt: skip
        if name in wanted:
            assert cells[cell] == wanted[name]
        else:
            assert cells[cell] in mine
        if name == "exch":  # what each put there, somebody else found
            assert sorted([*old[cell::8].tolist(), cells[cell]]) == [0, *mine]
        if name in ("inc", "cas"):
            assert sorted(old[cell::8].tolist())[0] == 0
