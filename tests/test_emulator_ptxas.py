"""The emulator's instructions against NVIDIA's own: what ptxas makes of them where all their operands are constants."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulator.ptx.testing import evaluate

triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x9ABCDEF0]
# No two of them add up to a tie: ptxas 12.8 folds -1.5 + 0.3f, between two float32, to the odd one.
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    3.5,
    1e-40,
    -1e-40,
    3e38,
    np.inf,
    -np.inf,
    np.nan,
    1 + 2**-11,
    1 + 2**-8,
    0.375,
    1e5,
]
INTEGER = [
    "bfe.u32 %d, %a, %b, %c;", "bfe.s32 %d, %a, %b, %c;", "shf.l.wrap.b32 %d, %a, %b, %c;",
    "shf.r.clamp.b32 %d, %a, %b, %c;", "mul.hi.s32 %d, %a, %b;", "mul.hi.u32 %d, %a, %b;", "popc.b32 %d, %a;",
    "clz.b32 %d, %a;", "brev.b32 %d, %a;", "bfind.u32 %d, %a;", "shl.b32 %d, %a, %b;", "shr.s32 %d, %a, %b;",
    "shr.u32 %d, %a, %b;", "min.s32 %d, %a, %b;", "max.u32 %d, %a, %b;", "abs.s32 %d, %a;",
]  # fmt: skip
FLOATING = [
    "max.f32 %d, %a, %b;", "min.f32 %d, %a, %b;", "max.NaN.f32 %d, %a, %b;", "min.ftz.f32 %d, %a, %b;",
    "add.ftz.f32 %d, %a, %b;", "mul.ftz.f32 %d, %a, %b;", "add.f32 %d, %a, %b;", "mul.f32 %d, %a, %b;",
    "cvt.rni.s32.f32 %d, %a;", "cvt.rzi.u32.f32 %d, %a;", "cvt.rpi.f32.f32 %d, %a;",
    "cvt.rna.tf32.f32 %d, %a;", "cvt.rn.f16x2.f32 %d, %a, %b;", "neg.f32 %d, %a;",
    "abs.ftz.f32 %d, %a;", "ex2.approx.ftz.f32 %d, %a;", "rcp.approx.ftz.f32 %d, %a;",
]  # fmt: skip
APPROXIMATE = ("ex2", "rcp")


def folded(instructions: list[str], rows: list[tuple[int, ...]], tmp_path: Path) -> dict[int, int]:
    """What ptxas stores for each instruction with its constants, where it has computed that itself."""
    body = ""
    for i, (instruction, row) in enumerate(zip(instructions, rows, strict=True)):
        moves = "".join(f"mov.b32 %{name}, {value};" for name, value in zip("abc", row, strict=False))
        body += f"{{ .reg .b32 %a, %b, %c, %d; {moves} {instruction} st.global.b32 [%p+{4 * i}], %d; }}\n"
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 out)"
    source, binary = tmp_path / "k.ptx", tmp_path / "k.cubin"
    source.write_text(f"{head} {{ .reg .b64 %p; ld.param.u64 %p, [out];\n{body} ret; }}")
    subprocess.run([TOOLS / "ptxas", "-arch=sm_80", source, "-o", binary], check=True, capture_output=True)
    listing = subprocess.run([TOOLS / "cuobjdump", "-sass", binary], check=True, capture_output=True, text=True).stdout
    held: dict[str, int | None] = {"RZ": 0}
    stored = {}
    for line in re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?);", listing):
        if "EXIT" in line:
            break
        constant = re.match(r"(?:IMAD\.)?MOV(?:\.U32)? (R\d+), (?:RZ, RZ, )?(-?0x[0-9a-f]+) ?$", line)
        halves = re.match(r"HFMA2\.MMA (R\d+), -RZ, RZ, ([^,]+), (\S+) ?$", line)
        store = re.match(r"STG\.E \[R\d+\.64(?:\+(0x[0-9a-f]+))?\], (R\w+)", line)
        if constant:
            held[constant[1]] = int(constant[2], 16) & 0xFFFFFFFF
        elif halves:
            high, low = (int(np.float16(x.replace("QNAN", "nan")).view(np.uint16)) for x in halves.group(2, 3))
            held[halves[1]] = high << 16 | low
        elif store:
            value = held.get(store[2])
            if value is not None:
                stored[int(store[1] or "0", 16) // 4] = value
        else:
            for register in re.findall(r"^(?:@!?U?P\d )?[\w.]+ (R\d+)", line):
                held[register] = None
    return stored


def one_nan(halves: int) -> int:
    """Two float16 with NaN as it is computed: the disassembler tells no NaN from another."""
    pair = np.array([halves], np.uint32).view(np.uint16)
    pair[np.isnan(pair.view(np.float16))] = 0x7FFF
    return int(pair.view(np.uint32)[0])


@pytest.mark.parametrize("instruction", [*INTEGER, *FLOATING])
def test_constants(instruction, tmp_path):
    count = 1 + ("%b" in instruction) + ("%c" in instruction)
    integers = instruction in INTEGER
    values = WORDS if integers else np.array(FLOATS, np.float32).view(np.uint32).tolist()
    rows = list(dict.fromkeys((a, b, c)[:count] for a in values for b in values for c in (0, 5, 33)))
    rows = rows[:: max(1, len(rows) // 200)]
    wanted = folded([instruction] * len(rows), rows, tmp_path)
    columns = [("b32", np.array(column, np.uint32)) for column in zip(*rows, strict=True)]
    got = evaluate(instruction, "b32", *columns)
    if len(wanted) < len(rows) / 10:
        pytest.skip(f"ptxas leaves it to the GPU ({len(wanted)} of {len(rows)})")
    is_number = not integers and not re.match(r"cvt\.(r.i\.[su]|rn\.)", instruction)
    for i, value in wanted.items():
        mine = int(got[i])
        if "f16x2" in instruction:
            value, mine = (one_nan(x) for x in (value, mine))
        if is_number and np.isnan(np.array([value, mine], np.uint32).view(np.float32)).all():
            continue  # any NaN will do
        approximate = instruction.startswith(APPROXIMATE)
        assert abs(value - mine) <= approximate, (instruction, [hex(x) for x in rows[i]], hex(value), hex(mine))
