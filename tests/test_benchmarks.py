"""The benchmark scripts on small shapes. The tests do not judge the times."""

import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_modules import importable

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(
    path.relative_to(BENCHMARKS).with_suffix("").as_posix()
    for path in BENCHMARKS.rglob("*.py")
    if "def main(" in path.read_text()
)


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as a module. Like scripts, benchmarks can import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=cwd)


def rows_of(done: subprocess.CompletedProcess, json_file: Path) -> list[dict]:
    """The rows of a run. The run must also have written a table and at least one picture."""
    assert done.returncode == 0, done.stderr
    saved = json.loads(json_file.read_text())
    assert {"date", "device", "threads", "torch", "entropy_attn"} <= set(saved["machine"])
    assert saved["machine"]["torch"] == torch.__version__
    assert json_file.with_suffix(".md").read_text().count("\n| ") >= 3
    pictures = list(json_file.parent.glob(f"{json_file.stem}*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert not list(json_file.parent.glob("*.part"))
    return saved["rows"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torchmetrics
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, tmp_path, monkeypatch, capsys):
    """The scripts run in this process: thirty new ones would take two minutes to import PyTorch and Diffusers."""
    if name == "adapter" or name.startswith("paper/"):
        pytest.importorskip("diffusers")
    script = BENCHMARKS / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with importable(monkeypatch, script.parent), pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")
    assert not list(tmp_path.iterdir())


def test_host_overhead(tmp_path):
    done = run("host_overhead", "--rounds", "2", "--calls", "2", cwd=tmp_path)
    rows = rows_of(done, tmp_path / "build" / "host_overhead.json")
    assert [row["call"] for row in rows][:3] == ["sdpa", "cpu", "launch"]
    assert all(0 < row["quickest_us"] <= row["median_us"] for row in rows)
    assert all(row["python_calls"] > 1 for row in rows if not row["call"].startswith("GPU"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")
def test_throughput_names_what_it_needs(tmp_path):
    done = run("throughput", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"throughput\.py needs a CUDA or ROCm device.*--device cpu.*\.\n", done.stderr)


def test_throughput_on_the_cpu(tmp_path):
    arguments = ["--device", "cpu", "--quick", "--models", "SD1.5", "LDM", "square", "--lengths", "32", "64"]
    done = run("throughput", *arguments, "--variants", "plain", "bias", "scale", "causal", cwd=tmp_path)
    rows = rows_of(done, tmp_path / "build" / "throughput.json")
    assert {row["way"] for row in rows} == {"ours", "ours+entropy", "sdpa", "sdpa-flash", "sdpa-math"}
    assert {row["variant"] for row in rows} == {"plain", "bias", "scale", "causal"}
    assert {row["kind"] for row in rows if row["variant"] == "causal"} == {"self", "square"}
    assert {"SD1.5 64x64", "LDM 64x64"} in [set(row["layers"]) for row in rows]  # equal shapes are timed once
    for row in rows:
        assert row["status"] == "ok", row
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        pairs = row["Nq"] * row["Nk"] * (0.5 if row["variant"] == "causal" else 1)
        assert row["tflops"] == pytest.approx(4 * row["B"] * row["H"] * pairs * row["D"] / row["ms"] / 1e9)
        assert row["peak_mib"] > 0
        assert ("entropy_error" in row) == (row["way"] == "ours+entropy")
        assert row["way"] != "sdpa" or row["time_to_sdpa"] == 1
    picture = tmp_path / "build" / "throughput-plain-float32.png"
    picture.unlink()
    again = run("throughput", "--picture-from", "build/throughput.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert picture.exists()
    assert again.stdout == done.stdout


def test_wrong_and_refusing_ways_are_told_and_not_timed(benchmark, monkeypatch):
    throughput = benchmark("throughput")
    sdpa, ours = throughput.PEERS["sdpa"], throughput.OURS["ours+entropy"]

    def refusing(inputs):
        raise NotImplementedError("takes no queries\nand more")

    def wrong_entropy(inputs):
        way = ours(inputs)
        return lambda: (result := way())._replace(entropy=result.entropy + 0.01)

    monkeypatch.setitem(throughput.PEERS, "flex", lambda inputs: lambda: 1.05 * sdpa(inputs)())
    monkeypatch.setitem(throughput.PEERS, "xformers", lambda inputs: lambda: sdpa(inputs)() * math.nan)
    monkeypatch.setitem(throughput.PEERS, "flash-attn", refusing)
    monkeypatch.setitem(throughput.OURS, "ours+entropy", wrong_entropy)
    shape = throughput.Shape("self", 2, 3, 40, 24, 16)
    peers = ["sdpa", "flex", "xformers", "flash-attn"]
    for variant in ("plain", "padding", "mask", "bias", "scale"):
        rows = {row["way"]: row for row in throughput.measure(shape, "float32", variant, peers, 2, "cpu")}
        statuses = {way: row["status"] for way, row in rows.items()}
        assert statuses == {
            "ours": "ok", "ours+entropy": "wrong", "sdpa": "ok", "flex": "wrong", "xformers": "wrong",
            "flash-attn": "refused",
        }  # fmt: skip
        assert all(("ms" in row) == (row["status"] == "ok") for row in rows.values())
        assert rows["flash-attn"]["reason"] == "NotImplementedError: takes no queries"
        assert rows["flex"]["error"] == pytest.approx(0.05, rel=1e-3)
        assert rows["ours+entropy"]["entropy_error"] == pytest.approx(0.01, rel=1e-2)
        told = throughput.tables([row | {"layers": ["a layer"]} for row in rows.values()])
        assert "- flash-attn: NotImplementedError: takes no queries (1 cases" in told


def test_a_way_that_fails_while_timed_is_its_own(benchmark, monkeypatch):
    throughput = benchmark("throughput")
    sdpa = throughput.PEERS["sdpa"]

    def failing(inputs, left=3):
        left = iter(range(left))
        way = sdpa(inputs)
        return lambda: way() if next(left, None) is not None else throw(RuntimeError("out of luck\nand more"))

    def throw(error):
        raise error

    monkeypatch.setitem(throughput.PEERS, "flex", failing)
    shape = throughput.Shape("self", 1, 1, 40, 24, 16)
    rows = {row["way"]: row for row in throughput.measure(shape, "float32", "plain", ["sdpa", "flex"], 4, "cpu")}
    assert rows["flex"]["status"] == "failed"
    assert rows["flex"]["reason"] == "RuntimeError: out of luck"
    assert "ms" not in rows["flex"]
    assert all(rows[way]["status"] == "ok" and rows[way]["ms"] > 0 for way in ("ours", "ours+entropy", "sdpa"))


def test_a_lost_device_ends_the_run_and_is_continued(benchmark, monkeypatch, tmp_path):
    """--resume skips the case that lost the device, and does not measure finished cases again."""
    throughput = benchmark("throughput")
    harness, saved = throughput.harness, throughput.results
    out = tmp_path / "rows.json"
    arguments = ["throughput.py", "--device", "cpu", "--models", "square", "--lengths", "16", "24", "32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--quick", "--peers", "sdpa", "--out", str(out)])
    measure, seen = throughput.measure, []

    def losing(shape, *rest):
        seen.append(shape.Nq)
        if len(seen) == 2:
            raise harness.DeviceLostError("AcceleratorError: an illegal memory access")
        return measure(shape, *rest)

    monkeypatch.setattr(throughput, "measure", losing)
    with pytest.raises(SystemExit, match=r"stopped working in plain float32 N = 24: .*illegal.*--resume"):
        throughput.main()
    assert [row["status"] for row in saved.load(out)[1]] == ["ok"] * 3 + ["lost"] * 3
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    throughput.main()
    assert seen == [16, 24, 32, 16, 24, 32]  # head dim 64, with the loss at 24, then head dim 128
    rows = saved.load(out)[1]
    assert len(rows) == 3 * 6
    assert "- ours: AcceleratorError" in out.with_suffix(".md").read_text()
    file = json.loads(out.read_text())
    file["machine"]["torch"] = "1.0"
    out.write_text(json.dumps(file))
    with pytest.raises(SystemExit, match="2"):
        throughput.main()


def test_a_default_run_is_short(benchmark):
    throughput = benchmark("throughput")
    short = throughput.SHORT
    sizes = [throughput.parse_size(text) for text in throughput.SIZES["cuda"]][: short["sizes"]]
    chosen = throughput.shapes(short["models"], sizes, throughput.LENGTHS["cuda"][: short["lengths"]])
    cases = [(shape, layers, "float16", "plain") for shape, layers in chosen.items()]
    assert throughput.estimate(cases, [*throughput.OURS, *throughput.PEERS], 9) < 10
    assert {shape.D for shape in chosen} >= {40, 64, 80, 128, 160}


def test_shapes_are_those_of_the_models(benchmark):
    shapes = benchmark("layers").shapes
    tokens = lambda *arguments: {(s.kind, s.H, s.Nq, s.Nk, s.D) for s in shapes(*arguments)}  # noqa: E731
    assert {s for s in tokens(["SD1.5"], [(512, 512)], []) if s[0] == "self"} == {
        ("self", 8, 4096, 4096, 40), ("self", 8, 1024, 1024, 80), ("self", 8, 256, 256, 160), ("self", 8, 64, 64, 160)
    }  # fmt: skip
    assert ("cross", 8, 36 * 64, 77, 40) in tokens(["SD1.5"], [(512, 288)], [])
    assert ("self", 20, 5 * 8, 5 * 8, 64) in tokens(["SD2.1"], [(512, 288)], [])  # half of an odd size is rounded up
    assert tokens(["SDXL"], [(1024, 1024)], []) < tokens(["SD2.1", "SDXL"], [(1024, 1024)], [])
    assert tokens(["SD3", "Flux"], [(1024, 1024)], []) == {
        ("joint", 24, 4096 + 333, 4096 + 333, 64), ("joint", 24, 4096 + 512, 4096 + 512, 128)
    }  # fmt: skip
    assert {s.B * s.Nq for s in shapes(["square"], [], [1024, 16384])} == {16384}


def test_entropy_cost(tmp_path):
    done = run(
        "entropy_cost", "--device", "cpu", "--tokens", "32", "600", "--heads", "2", "--rounds", "2", cwd=tmp_path
    )
    rows = rows_of(done, tmp_path / "build" / "entropy_cost.json")
    assert {(row["N"], row["way"]) for row in rows} == {
        (N, way) for N in (32, 600) for way in ("SDPA, no entropy", "same pass", "two passes", "softmax held")
    }
    assert all(row["entropy_error"] < 1e-4 for row in rows if row["way"] != "SDPA, no entropy")
    memory = {row["way"]: row["peak_mib"] for row in rows if row["N"] == 600}
    assert memory["softmax held"] > memory["same pass"] > 600 * 2 * 64 * 4 / 2**20  # the output alone


def test_cpu(tmp_path):
    arguments = ["--dtypes", "float32", "bfloat16", "--tokens", "32", "--head-dims", "8", "--heads", "2"]
    done = run("cpu", *arguments, "--rounds", "2", cwd=tmp_path)
    rows = rows_of(done, tmp_path / "build" / "cpu.json")
    columns = ["dtype", "N", "heads", "head_dim", "sdpa_ms"]
    ratios = [f"{way} / sdpa" for way in ("ours", "ours with entropy", "textbook entropy")]
    assert [list(row) for row in rows] == 2 * [columns + ratios]
    assert f"| {' | '.join(columns + ratios)} |" in done.stdout


def test_cpu_busy(tmp_path):
    arguments = ["--dtypes", "float32", "--tokens", "32", "--head-dims", "8", "--heads", "2", "--rounds", "2"]
    done = run("cpu", *arguments, "--busy", cwd=tmp_path)
    assert len(rows_of(done, tmp_path / "build" / "cpu.json")) == 1
    others = json.loads((tmp_path / "build" / "cpu.json").read_text())["machine"]["busy_processes"]
    assert others >= 1
    assert f"2 rounds, with {others} other processes on {others} cores" in done.stdout


def cpu_seconds(pid: int) -> float | None:
    """The CPU time of a process in seconds, or None if the process has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if state == "Z" else (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")


def wait_until(true) -> bool:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the test reads CPU times from /proc")


@needs_proc
def test_busy_processes_compute_until_they_are_stopped(benchmark, monkeypatch):
    cpu, started, popen = benchmark("cpu"), [], subprocess.Popen

    def noting(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noting)
    with cpu.busy(2):
        assert len(started) == 2
        assert wait_until(lambda: all(cpu_seconds(process.pid) > 0.3 for process in started))  # startup takes less
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


@needs_proc
@pytest.mark.parametrize("age", [0, 1])
def test_a_busy_process_ends_with_its_parent(benchmark, age):
    """The parent is killed `age` seconds after the child's start. The child is then starting, or computing."""
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-c', sys.argv[1], str(os.getpid())]\n"
        "print(subprocess.Popen(command).pid, flush=True)\n"
        "input()"
    )
    command = [sys.executable, "-c", code, benchmark("cpu").BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(age)
        assert cpu_seconds(child) is not None
        parent.kill()
    try:
        assert wait_until(lambda: cpu_seconds(child) is None)
    finally:
        if cpu_seconds(child) is not None:
            os.kill(child, signal.SIGKILL)


def test_a_busy_process_that_ends_early_is_an_error(benchmark, monkeypatch):
    cpu = benchmark("cpu")
    monkeypatch.setattr(cpu, "BUSY", "")
    with pytest.raises(RuntimeError, match="1 of the 1 busy processes ended early"), cpu.busy(1):
        time.sleep(2)


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows, Ctrl-C goes to every process of the console")
def test_ctrl_c_keeps_the_rows_and_says_so(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--tokens", *(["16"] * 10_000), "--rounds", "3", "--out", path]
    command = [sys.executable, BENCHMARKS / "entropy_cost.py", *arguments]
    # Background jobs ignore SIGINT, and their child processes inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    rows = json.loads(path.read_text())["rows"]
    assert rows
    assert process.returncode == 130, errors
    assert re.search(rf"\ninterrupted: \d+ rows are in {re.escape(str(path))}\n$", errors)
    assert "Traceback" not in errors


def test_a_row_that_cannot_be_written_leaves_the_file(benchmark, tmp_path):
    results = benchmark("results")
    record = results.Record(tmp_path / "folder" / "rows.json", "cpu", seed=3)
    record.add({"N": 1})
    record.add({"N": 2}, {"N": 3})
    with pytest.raises(TypeError):
        record.add({"N": object()})
    machine, rows = results.load(record.path)
    assert machine["seed"] == 3
    assert rows == [{"N": 1}, {"N": 2}, {"N": 3}]


def test_peak_memory_counts_what_is_held_at_once(benchmark):
    peak_memory = benchmark("harness").peak_memory
    mebibytes = lambda n: torch.ones(n << 18)  # noqa: E731
    held = mebibytes(4)
    assert peak_memory(lambda: mebibytes(4)) == pytest.approx(4, abs=0.01)
    assert peak_memory(lambda: (mebibytes(2), mebibytes(3))) == pytest.approx(5, abs=0.01)
    assert peak_memory(lambda: mebibytes(mebibytes(2).numel() >> 18)) == pytest.approx(2, abs=0.01)
    assert peak_memory(lambda: held.add_(1)) == pytest.approx(0, abs=0.01)


def test_ways_run_in_turn(benchmark):
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in ("one", "other")}
    times = benchmark("harness").interleaved(ways, rounds=2)
    assert order == 3 * ["one", "other"]  # the first round is a warm-up
    assert {name: len(taken) for name, taken in times.items()} == {"one": 2, "other": 2}


def test_buckets_are_those_of_the_models(benchmark):
    aspect_ratios = benchmark("aspect_ratios")
    sdxl = aspect_ratios.SIZES["SDXL"]
    assert len(sdxl) == len(set(sdxl)) == 40
    assert [height / width for height, width in sdxl] == sorted(height / width for height, width in sdxl)
    assert all(0.9 < height * width / 1024**2 <= 1 for height, width in sdxl)
    level = aspect_ratios.layers("SDXL")[0]
    assert aspect_ratios.tokens((1024, 1024), level) == level.train_tokens == 4096
    assert aspect_ratios.tokens((512, 1984), level) == 32 * 124
    assert aspect_ratios.layers("PixArt 256 and 512")[0].train_tokens == 1024
    mixed = aspect_ratios.sample("PixArt 256 and 512", 6, seed=1)
    assert all(size in aspect_ratios.SIZES[f"PixArt {(256, 512)[i % 2]}"] for i, size in enumerate(mixed))
    assert mixed == aspect_ratios.sample("PixArt 256 and 512", 6, seed=1)
    assert mixed != aspect_ratios.sample("PixArt 256 and 512", 6, seed=2)
    pixart = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    for edge in (256, 512, 1024):
        table = getattr(pixart, f"ASPECT_RATIO_{edge}_BIN").values()
        assert aspect_ratios.SIZES[f"PixArt {edge}"] == [tuple(size) for size in table]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_ways_agree(benchmark, monkeypatch):
    """Every way that the CPU has gives the output of each image by itself, and the padded tensors hold those images."""
    packed_ways, buckets = benchmark("packed_ways"), benchmark("buckets")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    layer = packed_ways.aspect_ratios.Layer("small", 1, 2, 8, 16)
    batch = packed_ways.make_batch([5, 33, 2, 16], layer, torch.float32, "cpu")
    assert batch.padding == pytest.approx(1 - 56 / (4 * 33))
    assert [torch.equal(batch.from_padded(x), y) for x, y in zip(batch.padded, batch.packed, strict=True)] == 3 * [True]
    assert batch.padded[0][2, :, 2:].count_nonzero() == 0
    wanted = buckets.expected(batch)
    for name in set(packed_ways.WAYS) - set(packed_ways.GPU_WAYS):
        assert buckets.error_of(packed_ways.WAYS[name](batch)(), batch, wanted) < 1e-6, name
    # λ of another T, or of another image, is seen.
    assert buckets.error_of(packed_ways.packed(batch._replace(train_tokens=17))(), batch, wanted) > 1e-3
    one_scale = batch._replace(scale=batch.scale[:1].expand(4))
    assert buckets.error_of(packed_ways.padded_sdpa(one_scale)(), batch, wanted) > 1e-3


def test_buckets(tmp_path):
    arguments = ["--device", "cpu", "--cases", "PixArt 256", "--batch", "2", "--rounds", "2"]
    arguments += ["--ways", "packed", "padded SDPA", "SDPA one by one", "varlen_attn", "--out", "rows.json"]
    stopped = run("buckets", *arguments, "--seconds", "0", cwd=tmp_path)
    assert stopped.returncode == 0
    assert "0 seconds are over: --resume goes on" in stopped.stderr
    assert "no row was measured" in stopped.stderr
    done = run("buckets", *arguments, cwd=tmp_path)
    rows = {row["way"]: row for row in rows_of(done, tmp_path / "rows.json")}
    assert rows["varlen_attn"]["status"] == "not run"  # it has no kernel for the CPU
    assert f"- varlen_attn: {rows.pop('varlen_attn')['reason']}" in done.stdout
    assert list(rows) == ["packed", "padded SDPA", "SDPA one by one"]
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["error"] < 1e-5
        assert len(row["tokens"]) == 2
        assert row["padding"] == pytest.approx(1 - sum(row["tokens"]) / (2 * max(row["tokens"])))
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["peak_mib"] > 0
    assert rows["padded SDPA"]["time_to_base"] == 1
    before = (tmp_path / "rows.json").read_text()
    again = run("buckets", *arguments, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "rows.json").read_text() == before  # nothing was left to measure


def test_wrong_and_missing_ways_of_buckets_are_told_and_not_timed(benchmark, monkeypatch):
    buckets = benchmark("buckets")
    one_by_one = buckets.WAYS["one by one"]

    def without_compiler(batch):
        def way():
            raise RuntimeError("No working C++ compiler found\nand more")

        return way

    monkeypatch.setitem(buckets.WAYS, "FlexAttention", without_compiler)
    monkeypatch.setitem(buckets.WAYS, "packed", lambda batch: lambda: 1.01 * one_by_one(batch)())
    monkeypatch.setitem(buckets.WAYS, "padded", lambda batch: lambda: math.nan * one_by_one(batch)())
    case = {"case": "PixArt 256", "layer": "all layers", "dtype": "float32", "B": 1, "seed": 0}
    rows = buckets.measure(case, ["packed", "padded", "padded SDPA", "FlexAttention"], 1, "cpu")
    statuses = {row["way"]: row["status"] for row in rows}
    assert statuses == {"packed": "wrong", "padded": "wrong", "padded SDPA": "ok", "FlexAttention": "not run"}
    assert ["ms" in row for row in rows] == [False, False, True, False]
    told = buckets.tables(rows)
    assert "- FlexAttention: RuntimeError: No working C++ compiler found\n" in told + "\n"
    assert "- packed: off by 1.0e-02" in told
