"""The model of an A100's main loop: its parts against hand-counted code, its validation, and its command."""

import functools
import json
import os
import subprocess
import sys

import pytest
from benchmark_modules import BENCHMARKS, importable

MODEL = BENCHMARKS / "model"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its disassembler on Linux only")


@pytest.fixture
def a100(monkeypatch):
    """Imports a module of the model by its name, and forgets them all at the end."""
    with importable(monkeypatch, BENCHMARKS, MODEL) as module:
        yield module


def listing(*lines: str, bits: int = 0) -> str:
    """As cuobjdump prints instructions that all have the same scheduling bits, 16 bytes apart."""
    return "\n".join(
        f"        /*{16 * n:04x}*/                   {text} ;   /* 0x0000000000000000 */\n"
        f"                                           /* 0x{bits << 41:016x} */"
        for n, text in enumerate(lines)
    )


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, MODEL / script, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_scheduling_bits(a100):
    # stall 5, no yield, result to scoreboard 2, operands to scoreboard 3, waits for 0 and 4
    bits = 5 | 1 << 4 | 2 << 5 | 3 << 8 | 0b010001 << 11
    loop = a100("a100.decode").main_loop(listing("HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x0", "EXIT", bits=bits))
    first = loop[0]
    assert (first.stall, first.result, first.operands, first.waits) == (5, 2, 3, (0, 4))
    assert [i.base for i in loop] == ["HMMA", "BRA"]
    assert [i.jumps for i in loop] == [False, True]


def test_main_loop_is_the_one_that_copies(a100):
    """The second loop has more matrix instructions and no asynchronous copy, as the kernel's edge loop may."""
    code = listing(
        "MOV R1, R2", "LDGSTS.E.128 [R3], [R4.64]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x10",
        "HMMA.16816.F32 R4, R8, R12, R4", "HMMA.16816.F32 R4, R8, R12, R4", "@P1 BRA 0x40", "EXIT",
    )  # fmt: skip
    assert [i.base for i in a100("a100.decode").main_loop(code)] == ["LDGSTS", "HMMA", "BRA"]


def test_main_loop_takes_the_longest_pass(a100):
    """A copy that is jumped over in the last pass only, and one that the assembler moved behind the loop."""
    code = listing(
        "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x30", "LDGSTS.E.128 [R3], [R4.64]", "@P1 BRA 0x60",
        "@P2 BRA 0x0", "EXIT", "LDGSTS.E.128 [R5], [R6.64]", "BRA 0x40",
    )  # fmt: skip
    loop = a100("a100.decode").main_loop(code)
    assert [i.base for i in loop] == ["HMMA", "BRA", "LDGSTS", "BRA", "LDGSTS", "BRA", "BRA"]


def test_no_loop_is_an_error(a100):
    with pytest.raises(ValueError, match="no loop with matrix instructions"):
        a100("a100.decode").main_loop(listing("HMMA.16816.F32 R4, R8, R12, R4", "EXIT"))


def test_text_of_an_instruction_is_read_back(a100):
    Instruction = a100("a100.decode").Instruction
    for instruction in (
        Instruction("DEPBAR.LE", 4, operand="SB0,0x4"),
        Instruction("LDSM.16.MT88.4", 2, result=1, operands=0, waits=(3, 5)),
        Instruction("BRA", 5, jumps=True),
        Instruction("LDS", 1, never=True),
    ):
        assert Instruction.parse(instruction.text()) == instruction


def test_counters_of_a_hand_counted_loop(a100):
    pipes, Instruction = a100("a100.pipes"), a100("a100.decode").Instruction
    names = ["HMMA.16816.F32", "HMMA.16816.F32", "MUFU.EX2", "FFMA", "FADD", "LDSM.16.M88.4", "LDGSTS.E.128"]
    loop = [Instruction(name) for name in names]
    assert pipes.flops(loop) == 2 * 2 * 16 * 8 * 16
    assert pipes.others_per_matrix(loop) == 2.5
    bound = pipes.bound(loop)
    # four partitions share 128 bytes a cycle: LDSM 512 bytes; LDGSTS 512 bytes, in and out
    assert (bound["matrix"], bound["special"], bound["float"], bound["issue"]) == (16, 8, 4, 7)
    assert bound["memory"] == 4 * 512 / 128 + 2 * 4 * 512 / 128
    assert bound["cache"] == pytest.approx(4 * 512 / 40)


def test_simulation_of_what_one_unit_bounds(a100):
    simulate, Instruction = a100("a100.simulate"), a100("a100.decode").Instruction
    loop = [Instruction("HMMA.16816.F32", 1)] * 64
    assert simulate.cycles(loop, warps=4, programs=1, runs=2) == pytest.approx([512, 512], rel=0.02)
    together = [*loop, Instruction("BAR.SYNC", 1)]
    assert simulate.cycles(together, warps=8, programs=1, runs=2) == pytest.approx([1024, 1024], rel=0.04)
    (alone,) = simulate.cycles(loop, warps=8, programs=1, runs=1)
    assert alone == pytest.approx(1024, rel=0.02)


def test_simulation_ends_where_one_warp_could_starve_the_other(a100):
    simulate, Instruction = a100("a100.simulate"), a100("a100.decode").Instruction
    assert simulate.Run([Instruction("HMMA.16816.F32", 1)] * 16, 8, 1, seed=1, passes=5).play() > 0


def test_simulation_waits_for_scoreboards_and_barriers(a100):
    simulate, Instruction = a100("a100.simulate"), a100("a100.decode").Instruction
    free = [Instruction("LDS", 1, result=0), Instruction("FADD", 1)]
    waiting = [Instruction("LDS", 1, result=0), Instruction("FADD", 1, waits=(0,))]
    barrier = [*free, Instruction("BAR.SYNC", 1)]
    (fast,), (slow,), (met,) = (simulate.cycles(loop, 4, 1, runs=1) for loop in (free, waiting, barrier))
    assert slow >= 0.8 * 23 > fast
    assert met >= 0.8 * 20 > fast


def test_simulation_is_determined_by_its_seed(a100):
    simulate, loops = a100("a100.simulate"), a100("a100.loops")
    loop = loops.load("triton_3.7.1_matmul_128x128x32_4warps_4stages").code.loop
    first, again = (simulate.cycles(loop, 4, 2, runs=3, passes=5) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3


def test_clock(a100):
    estimate = a100("a100.estimate")
    card = estimate.Card(200.0, 290.0)
    assert card.clock(290.0 / estimate.PEAK, estimate.CUBLAS_OTHERS) == pytest.approx(200 / 290)
    assert card.clock(0.7, 5.0) < card.clock(0.7, 3.0) < card.clock(0.5, 3.0)
    assert card.clock(0.05, 1.0) == 1.0


def test_parts_of_the_time(a100):
    estimate, anchors = a100("a100.estimate"), a100("a100.anchors")
    assert estimate.waves(4096) == pytest.approx(32 * 32 / 108 / 10)
    assert estimate.waves(128 * 108, rows=128 * 108) == pytest.approx(1)
    # 2 tiles of 128 queries: 1 + 2 blocks multiplied, of which 4 halves count
    assert anchors.causal(256) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """The rows of predict.py for a head dim and a tile, without and with entropy, and the folder of its files."""

    @functools.cache
    def predict(head_dim: int, *tile: int, entropy: str = "off"):
        folder = tmp_path_factory.mktemp("model")
        files = ["--out", folder / "model.json", "--markdown", folder / "model.md", "--picture", folder / "model.png"]
        arguments = [
            "--head-dims",
            head_dim,
            "--calls",
            "plain",
            "--runs",
            2,
            "--jobs",
            1,
            "--entropy",
            entropy,
            "--tile",
            *tile,
            *files,
        ]
        result = run("predict.py", *arguments)
        assert result.returncode == 0, result.stderr
        return json.loads((folder / "model.json").read_text())["rows"], folder

    return predict


@pytest.mark.parametrize("arguments", [(64, 128, 64, 4, 2), (64, 128, 64, 8, 2), (128, 128, 32, 4, 3)])
def test_main_loop_of_the_kernel(predicted, arguments):
    """It multiplies one block of keys and of values, and copies one: 16 bytes a thread."""
    head_dim, M, N, warps, _ = arguments
    (row,), _ = predicted(*arguments)
    assert row["loop_matrix"] == 2 * M * N * head_dim / 2048 / warps
    assert row["loop_copies"] == 2 * N * head_dim * 2 / 16 / 32 / warps


def test_a_slower_tile_ranks_below(predicted):
    """With 8 warps for 128 queries every warp reads all of K and V for half the products."""
    (four,), _ = predicted(64, 128, 64, 4, 2)
    (eight,), _ = predicted(64, 128, 64, 8, 2)
    assert eight["tflops"] < 0.9 * four["tflops"]
    assert (four["bound_by"], eight["bound_by"]) == ("matrix", "memory")


def test_predict(predicted):
    rows, folder = predicted(64, 64, 64, 4, 2, entropy="both")
    assert [r["entropy"] for r in rows] == [False, True]
    assert rows[1]["loop_instructions"] > rows[0]["loop_instructions"]
    assert all(r["status"] == "modelled" for r in rows)
    assert all(100 < r["tflops"] <= r["tflops_at_boost_clock"] <= r["bound_tflops"] for r in rows)
    error = json.loads((MODEL / "validation.json").read_text())["errors"]["all"]["largest"]
    text = (folder / "model.md").read_text()
    assert f"{rows[0]['tflops']:.0f} ± {100 * error:.0f} %" in text
    assert "not measured" in text
    assert (folder / "model.png").stat().st_size > 10_000


def test_a_tile_that_does_not_fit_is_an_error(a100):
    estimate = a100("a100.estimate")
    loop = a100("a100.loops").load("flash_attention_64").code.loop
    with pytest.raises(ValueError, match="no program fits"):
        estimate.estimate(estimate.Code(loop, 4, 255, 200 << 10), 1.0)


def test_anchors_have_loops_and_sources(a100):
    anchors, loops = a100("a100.anchors"), a100("a100.loops")
    for anchor in anchors.ANCHORS:
        assert anchor.source.startswith("https://")
        lowest, highest = (100, 312) if anchor.relative_to is None else (0.5, 1.5)
        assert all(lowest < published < highest for published in anchor.published)
        names = loops.matching(anchor.loops)
        assert names, anchor.name
        for name in names:
            loop = loops.load(name)
            assert loop.origin
            assert loop.flops == a100("a100.pipes").flops(loop.code.loop) * loop.code.warps


def test_stored_validation_is_that_of_this_model(a100):
    anchors = a100("a100.anchors")
    stored = json.loads((MODEL / "validation.json").read_text())
    (anchor,) = (a for a in anchors.ANCHORS if a.name == "FlashAttention-2, D = 128, causal")
    speed = anchors.check(anchor, stored["runs"]).estimate.speed
    assert speed == pytest.approx(stored["modelled"][anchor.name], abs=0.01)
    assert stored["modelled"].keys() == {anchor.name for anchor in anchors.ANCHORS}
    assert stored["errors"]["all"]["largest"] < 0.08  # what the README says


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("predict.py", ["--runs", 1], "allowed are runs from 2"),
        ("extract.py", ["--torch", "nowhere.so"], "nowhere.so does not exist"),
    ],
)
def test_wrong_arguments(script, arguments, said):
    result = run(script, *arguments)
    assert result.returncode == 2
    assert said in result.stderr
