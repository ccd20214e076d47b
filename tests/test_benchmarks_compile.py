"""What the compile report reads from machine code, and how tune.py chooses tiles. No test needs a GPU."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import triton

from entropy_attn import attention
from entropy_attn.kernels import tiles

MOST_SPILLS = 0 if triton.__version__.startswith("3.7.") else 16  # in the main loop
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# A listing with a spill before its loops. The main loop has a nested wait, a forward jump and a part after EXIT. The
# loop over the last keys has as many matrix instructions, but no asynchronous copies. The third loop has neither.
SASS = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/               @P0 BRA `(.L_x_4) ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R20], [R22.64] ;
.L_x_2:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
.L_x_3:
        /*0080*/                   BRA.U UP0, `(.L_x_6) ;
.L_x_7:
        /*0090*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*00a0*/              @!P3 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*00c0*/                   FADD.FTZ R4, R4, R5 ;
        /*00d0*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*00e0*/                   LDL R2, [R1] ;
        /*00f0*/               @P4 BRA `(.L_x_4) ;
.L_x_5:
        /*0100*/                   FFMA R4, R4, R5, R6 ;
        /*0110*/               @P5 BRA `(.L_x_5) ;
        /*0120*/               @P6 EXIT ;
        /*0130*/                   EXIT ;
.L_x_6:
        /*0140*/                   F2FP.F16.F32.PACK_AB R4, R5, R4 ;
        /*0150*/                   BRA `(.L_x_7) ;
.L_x_8:
        /*0160*/                   BRA `(.L_x_8);
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Lets the scripts import one another by name, and resets the environment variable that tune.py sets."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("ENTROPY_ATTN_TILES", "")


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ENTROPY_ATTN_TILES")}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


def test_main_loop_of_a_listing():
    import sass

    loop = sass.main_loop(SASS)
    assert Counter(instruction.name for instruction in loop) == {
        "HMMA.16816.F32": 2, "LDGSTS.E.BYPASS.128": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1, "MUFU.EX2": 1,
        "F2FP.F16.F32.PACK_AB": 1, "BRA": 4, "BRA.U": 1,
    }  # fmt: skip
    mix = sass.mix(loop)
    assert sum(mix.values()) == len(loop) == 11
    assert {group: n for group, n in mix.items() if n} == {
        "matrix": 2, "exponential": 1, "barrier": 1, "global memory": 1, "conversion": 1, "other": 5,
    }  # fmt: skip


def test_loops_of_a_listing():
    import sass

    instructions, labels = sass.parse(SASS)
    heads = {min(loop, key=lambda i: (i not in labels.values(), i)) for loop in sass.find_loops(instructions, labels)}
    assert heads == {labels[f".L_x_{n}"] for n in (1, 2, 4, 5)}  # .L_x_8 is unreachable, so it is no loop


def test_ties_of_main_loops():
    import sass

    without_copies = SASS.replace("LDGSTS.E.BYPASS.128", "LDG.E.128")
    assert any(i.name == "LDG.E.128" for i in sass.main_loop(without_copies))  # the first loop wins the tie
    assert not any("HMMA" in i.name for i in sass.main_loop(SASS.replace("HMMA.16816.F32", "IADD3")))
    with pytest.raises(ValueError, match="no loop with matrix instructions"):
        sass.main_loop("        /*0000*/                   EXIT ;")


@pytest.mark.parametrize(
    ("text", "group"),
    [("HGMMA.64x64x16.F32 R24", "matrix"), ("UTCHMMA gdesc", "matrix"), ("v_mfma_f32_32x32x8_f16 v[0:15]", "matrix"),
     ("MUFU.EX2 R4, R4", "exponential"), ("MUFU.RCP R4, R4", "other"), ("v_exp_f32_e32 v1, v2", "exponential"),
     ("HADD2.F32 R4, -RZ, R4.H0_H0", "conversion"), ("HADD2 R4, R4, R5", "float multiply-add"),
     ("LDGDEPBAR", "barrier"), ("LDG.E.128 R4", "global memory"), ("LDSM.16.M88.4 R4", "shared memory"),
     ("LDL.LU R4", "spill"), ("scratch_store_dword off", "spill"), ("SHFL.BFLY PT", "shuffle"),
     ("ds_bpermute_b32 v1", "shuffle"), ("ds_read_b64 v[0:1]", "shared memory"), ("FMNMX R4", "float compare"),
     ("v_pk_fma_f32 v[0:1]", "float multiply-add"), ("UIADD3 UR4", "integer and move"), ("s_waitcnt", "barrier"),
     ("v_add_u32_e32 v1", "integer and move"), ("s_cbranch_scc1 .LBB0_1", "other"), ("BRA `(.L_x_0)", "other")],
)  # fmt: skip
def test_groups(text, group):
    import sass

    assert sass.Instruction(text).group == group


@pytest.mark.parametrize(
    ("arguments", "programs"),
    [(("sm_80", 255, 4, 32 << 10), 2),  # registers: 2 warps a partition
     (("sm_80", 128, 4, 40 << 10), 4),  # registers: 4 warps a partition; shared memory: 164 / 41 = 4
     (("sm_80", 32, 1, 0), 32),  # the limit of 32 programs; registers: 64 warps
     (("sm_80", 168, 8, 0), 1),  # registers: 3 warps a partition, 12 of the 16 of two programs
     (("sm_86", 64, 4, 49 << 10), 2),  # shared memory: 100 / (49 + 1)
     (("sm_75", 64, 8, 0), 4),  # the limit of 32 warps
     (("sm_86", 64, 4, 100 << 10), 0),  # more shared memory than a program may have
     (("sm_100", 64, 4, 0, 256), 2)],  # tensor memory: 512 / 256 columns
)  # fmt: skip
def test_occupancy(arguments, programs):
    from occupancy import occupancy

    assert occupancy(*arguments) == programs


def test_report_of_a_tile(tmp_path):
    out, picture, markdown = tmp_path / "report.json", tmp_path / "report.png", tmp_path / "report.md"
    chosen = ["--architectures", "sm_80", "--dtypes", "float16", "--head-dims", "64"]
    done = script(
        "compile_report.py", *chosen, "--out", str(out), "--picture", str(picture), "--markdown", str(markdown)
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads(out.read_text())
    command = [sys.executable, "-m", "entropy_attn.kernels.aot", "--architecture", "sm_80", "--head-dim", "64"]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ENTROPY_ATTN_TILES")}
    lines = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=True).stdout
    tile = tiles.find_tile("sm_80", "float16", 64)
    scores = tile.block_m * tile.block_n // (32 * tile.num_warps)
    rows_of_a_thread = tile.block_m // (8 * tile.num_warps)  # a matrix product of 16 x 8 gives each thread 2 rows
    for row, resources in zip(saved["rows"], map(json.loads, lines.splitlines()), strict=True):
        assert row["status"] == "compiled, not timed"
        assert row["entropy"] == resources["entropy"]
        assert row["registers"] == resources["registers"]
        assert row["spill_bytes"] == resources["spills"]
        assert row["shared_bytes"] == resources["shared"]
        assert row["scores_per_thread"] == scores
        assert row["loop"]["exponential"] == scores + rows_of_a_thread
        assert row["loop_matrix"]["HMMA"] == row["loop"]["matrix"] == 2 * scores
        assert row["loop_spill_loads"] + row["loop_spill_stores"] == row["loop"]["spill"] <= MOST_SPILLS
        assert row["programs_per_multiprocessor"] >= 1
        assert sum(row["loop"].values()) == row["loop_instructions"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = markdown.read_text()
    assert text.count("compiled, not timed |") == len(saved["rows"]) == 2
    assert "ptxas " in text.splitlines()[-1]


def test_report_without_a_report(tmp_path):
    done = script("compile_report.py", "--picture-from", str(tmp_path / "nowhere.json"))
    assert done.returncode == 2
    assert "--picture-from: " in done.stderr
    assert "nowhere.json is no report" in done.stderr


def test_candidates():
    import candidates

    present = tiles.find_tile("sm_80", "float16", 64)
    found = candidates.candidates("sm_80", "float16", 64)
    assert next(iter(found)) == present
    assert found[present] is None
    assert len({candidates.label(tile) for tile in found}) == len(found) > 20
    assert all(16 <= tile.block_n <= 256 and 1 <= tile.num_stages <= 4 for tile in found)
    large = tiles.Tile(16, 256, 8, 4)
    assert "KiB of shared memory" in candidates.obstacle("sm_80", "float16", 128, large)
    assert "registers of 255" in candidates.obstacle("sm_80", "float16", 128, tiles.Tile(256, 128, 4, 1))


FAST, SLOW, BROKEN, UNFIT = (tiles.Tile(32, n, 2, 1) for n in (32, 16, 48, 256))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test runs the tiles in Triton's interpreter")
@pytest.mark.parametrize(("milliseconds", "winner"), [(0.9, FAST), (0.99, SLOW)])
def test_selection(tmp_path, monkeypatch, milliseconds, winner):
    import candidates
    import results
    import tune

    present = tiles.find_tile("sm_80", "float16", 128)
    monkeypatch.setattr(tune, "CHECKED_TOKENS", 40)
    monkeypatch.setattr(tune, "candidates", lambda *_: {SLOW: None, FAST: None, BROKEN: None, UNFIT: "too large"})
    record = results.Record(tmp_path / "log.json")
    record.machine["compute_capability"] = "8.0"
    asked = []

    def timer(ways, rounds, device):
        asked.append(list(ways))
        for way in ways.values():
            way()
        return {name: [milliseconds if name == candidates.label(FAST) else 1.0] * rounds for name in ways}

    plan = tune.Plan([32], batch=1, heads=1, rounds=3, device="cpu", timer=timer)
    tune.tune_all(["float16"], [64], plan, record, tmp_path / "tiles.json")
    assert asked == [[candidates.label(SLOW), candidates.label(FAST)]] * 2  # without entropy, and with it
    assert os.environ["ENTROPY_ATTN_TILES"] == str(tmp_path / "tiles.json")
    assert tiles.find_tile("sm_80", "float16", 64) == winner
    assert tiles.find_tile("sm_80", "float16", 128) == present
    _, rows = results.load(tmp_path / "log.json")
    assert [row["tile"]["block_n"] for row in rows if "dropped" in row] == [48]
    assert [row["ms"] for row in rows if "ms" in row] == [1.0, milliseconds] * 2
    assert [row["chosen"] for row in rows if "score" in row] == [winner == SLOW, winner == FAST]
    tune.draw(record.machine, rows, tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("amount", "name", "entropy"),
    [(0.1, "entropy", True), (0.1, "out", True), (math.nan, "out", True), (0.1, "out", False), (0.0, "out", True)],
)
def test_wrong_answers(monkeypatch, amount, name, entropy):
    import tune

    def off(tile, *inputs, entropy: bool):
        result = attention(*inputs, backend="reference", return_entropy=True)
        return result._replace(**{name: getattr(result, name) + (amount if entropy == wrong else 0.0)})

    wrong = entropy
    monkeypatch.setattr(tune, "run", off)
    reason = tune.wrong(SLOW, "float16", 64, "cpu")
    assert (reason is None) == (amount == 0)
    assert reason is None or "is off by" in reason
    assert reason is None or ("without entropy" in reason) == (not entropy)


def test_file_of_tiles(tmp_path):
    import candidates

    path = tmp_path / "tiles.json"
    before = {d: tiles.find_tile("sm_80", "float16", d) for d in tiles.HEAD_DIMS}
    other = {"gfx942": {"float16": {"64": dataclasses.asdict(SLOW)}}}
    path.write_text(json.dumps(other))
    candidates.store(path, "sm_80", "float16", 64, FAST)
    candidates.store(path, "sm_80", "float16", 40, SLOW)
    candidates.store(path, "sm_80", "bfloat16", 128, SLOW)
    # Head dim 56 is padded to 64, like 64. Head dim 48 is padded to 32 + 16, like 40.
    expected = before | dict.fromkeys((56, 64), FAST) | dict.fromkeys((40, 48), SLOW)
    now = {d: tiles.find_tile("sm_80", "float16", d) for d in tiles.HEAD_DIMS}
    assert {d: dataclasses.asdict(t) for d, t in now.items()} == {d: dataclasses.asdict(t) for d, t in expected.items()}
    assert json.loads(path.read_text())["gfx942"] == other["gfx942"]
    assert tiles.find_tile("sm_80", "bfloat16", 128) == SLOW


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tokens", "0"], "--tokens: got [0], allowed are numbers from 1"),
     (["--head-dims", "44"], "argument --head-dims: invalid choice: 44"),
     (["--compile"], "--compile and --architecture go with --dry-run"),
     (["--dry-run", "--out", __file__], "cannot be read as a table of tiles"),
     (["--picture-from", __file__], "is no log")],
)  # fmt: skip
def test_bad_arguments_of_tune(arguments, message):
    done = script("tune.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_dry_run():
    done = script("tune.py", "--dry-run", "--architecture", "sm_86", "--dtypes", "float16", "--head-dims", "64", "160")
    assert done.returncode == 0, done.stderr
    assert "sm_86, float16, D = 64: " in done.stdout
    assert "registers of 255" in done.stdout
