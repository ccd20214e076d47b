"""A tenth of make test-emulated, in a process of its own: torch.cuda is replaced there, and Triton must compile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
from emulated.mutants import mutate
from emulated.mutations import INSTRUCTIONS, SOURCE

ROOT = Path(__file__).parent.parent
WRITTEN = {  # by each benchmark: its option, and the kind of file
    "throughput": {"out": "json"},
    "entropy_cost": {"out": "json"},
    "tune": {"out": "json", "log": "json", "picture": "png"},
}


def on_emulated_device(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    kept |= {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture
def can_run():
    obstacle = emulator.obstacle()
    if obstacle:
        pytest.skip(obstacle)


@pytest.mark.parametrize(
    ("every", "tests"),
    [
        (3, [f"tests/emulated/test_{name}.py" for name in ("device", "faults", "kernels")]),
        (45, ["tests/emulated/test_attention.py", "tests/test_gpu.py::test_matches_float64"]),
    ],
    ids=["any kernel", "attention"],
)
def test_a_tenth(every, tests, can_run):
    done = on_emulated_device("-m", "pytest", "-p", "emulator.plugin", "-q", f"--every={every}", *tests)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout)
    assert "skipped" not in done.stdout


def test_the_readme_s_example(can_run, tmp_path):
    text = (Path(emulator.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    script = tmp_path / "example.py"  # Triton reads a kernel's source from its file
    script.write_text(code)
    done = on_emulated_device(str(script))
    assert done.returncode == 0, done.stderr
    assert "out of bounds" in done.stdout


def test_without_a_compiler_the_tests_are_skipped_with_that_reason(tmp_path):
    done = on_emulated_device(
        "-m", "pytest", "-p", "emulator.plugin", "-rs", "tests/emulated/test_device.py", PATH=str(tmp_path), CC=""
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "needs a C compiler" in done.stdout
    assert "passed" not in done.stdout


def test_the_interpreter_and_the_emulator_exclude_each_other():
    done = on_emulated_device("-c", "import emulator; emulator.install()", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr


# A benchmark on the emulated device. tune.py tries two tiles.
SCRIPT = """
import dataclasses, runpy, sys
import emulator
emulator.install()
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
import candidates
candidates.around = lambda tile: [tile, dataclasses.replace(tile, block_m=64)]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        (
            "throughput",
            "--models square --lengths 64 --quick --peers sdpa-math",
            r"(?m)^\| square \| 1x16x64x64x128 \|.*\(\d",
        ),
        ("entropy_cost", "--tokens 64 --heads 2 --rounds 2", r"(?m)^same pass: \d"),
        (
            "tune",
            "--dtypes float16 --head-dims 16 --tokens 64 --batch 1 --heads 1 --rounds 1",
            "export ENTROPY_ATTN_TILES=",
        ),
    ],
)
def test_benchmarks_from_end_to_end(name, arguments, told, can_run, tmp_path):
    """The launches and the files of the GPU. The times are those of the emulation."""
    arguments += "".join(f" --{flag} {tmp_path / flag}.{kind}" for flag, kind in WRITTEN[name].items())
    done = on_emulated_device("-c", SCRIPT, str(ROOT / "benchmarks" / f"{name}.py"), *arguments.split())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(told, done.stdout), done.stdout
    assert list(tmp_path.glob("*.png"))
    rows = [row for path in tmp_path.glob("*.json") for row in json.loads(path.read_text()).get("rows", ())]
    assert rows
    assert not [row for row in rows if "dropped" in row or row.get("status", "ok") != "ok"]


def test_the_mutations_apply_to_the_sources():
    for mutation in SOURCE:
        text = (ROOT / mutation.file).read_text()
        assert mutate(text, mutation) != text
    names = [mutation.name for mutation in SOURCE + INSTRUCTIONS]
    assert len(set(names)) == len(names)
    for mutation in INSTRUCTIONS:
        re.compile(mutation.old)
    with pytest.raises(ValueError, match="2 times"):
        mutate(2 * SOURCE[0].old, SOURCE[0])
