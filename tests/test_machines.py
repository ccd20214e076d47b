"""The script machines.py, and the test order of --shuffle."""

import subprocess
import sys
from pathlib import Path

import machines
import pytest

TESTS = Path(__file__).parent


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "OUT", tmp_path / "machines")
    return machines.OUT


def test_a_failure_is_told_and_stops_nothing(out, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "import os, sys\nfrom signal import SIG_IGN, SIGINT, getsignal\n"
        "def test_threads():\n    assert os.environ.get('OMP_NUM_THREADS') == '8'\n"
        # This test may itself run in the background. Only the new session shows that machines.py started the run.
        "def test_background():\n    assert os.getsid(0) == os.getpid()\n"
        "    assert getsignal(SIGINT) is SIG_IGN and not sys.stdin.read(1)\n"
    )
    assert machines.main(["--only", "8 threads", "background", "--tests", str(tests), "--", "-s"]) == 1
    told = capsys.readouterr().out
    assert [line[:35].split() for line in told.splitlines()[:2]] == [
        ["8", "threads", "exit", "1"],
        ["background", "exit", "1"],
    ]
    assert told.count("1 failed, 1 passed") == 2
    assert "0 of 2 passed" in told
    assert told.index("test_two.py::test_background") < told.rindex("background:") < told.index("::test_threads")
    assert "assert" in (out / "8-threads.txt").read_text()
    assert machines.main(["--only", "8 threads", "--tests", f"{tests}::test_threads"]) == 0
    assert "1 of 1 passed" in capsys.readouterr().out


def test_the_machines_are_listed(out, capsys):
    assert machines.main(["--list"]) == 0
    assert [line[:26].strip() for line in capsys.readouterr().out.splitlines()] == list(machines.MACHINES)
    assert len({machines.file_of(name) for name in machines.MACHINES}) == len(machines.MACHINES)
    with pytest.raises(SystemExit):
        machines.main(["--only", "nothing"])


def test_shuffling():
    def collected(*options):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(TESTS / "test_scale.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True, cwd=TESTS.parent)
        return [line for line in done.stdout.splitlines() if "::" in line]

    plain, one, again, other = (collected(*x) for x in ([], ["--shuffle", "1"], ["--shuffle", "1"], ["--shuffle", "2"]))
    assert one == again
    assert plain != one != other != plain
    assert sorted(plain) == sorted(one) == sorted(other)
