"""A tenth of make test-emulated, in a process of its own: torch.cuda is replaced there, and Triton must compile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

ROOT = Path(__file__).parent.parent


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
