"""Run the tests under the settings of other machines: instruction sets, numbers of threads, test orders.

    python tests/machines.py [--only NAME ...] [--tests PATH ...] [-- ARGUMENTS OF PYTEST]

The output of each run is written to build/machines/NAME.txt. The runs follow one another, and a failed run does not
stop the others. An environment variable that the processor or the library does not support has no effect.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "machines"


@dataclass(frozen=True)
class Machine:
    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # arguments of pytest
    prefix: tuple[str, ...] = ()  # command in front, such as nice
    background: bool = False  # a run like `command &`: no stdin, its own session, SIGINT ignored


MACHINES = {
    "plain": Machine(),
    "shuffled": Machine(options=("--shuffle", "1")),
    "shuffled otherwise": Machine(options=("--shuffle", "2")),
    "background": Machine(background=True),
    "nice": Machine(prefix=("nice", "-n", "19")),
    "1 thread": Machine({"OMP_NUM_THREADS": "1"}),
    "2 threads": Machine({"OMP_NUM_THREADS": "2"}),
    "8 threads": Machine({"OMP_NUM_THREADS": "8"}),
    "no vectors": Machine({"ATEN_CPU_CAPABILITY": "default"}),
    "AVX2": Machine({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "MKL with AVX2": Machine({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "MKL with SSE4.2": Machine({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "oneDNN with AVX2": Machine({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "OpenBLAS for Haswell": Machine({"OPENBLAS_CORETYPE": "Haswell"}),
    "OpenBLAS for Sandy Bridge": Machine({"OPENBLAS_CORETYPE": "Sandybridge"}),
    "oldest": Machine(
        {
            "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41",
            "OPENBLAS_CORETYPE": "Sandybridge", "OMP_NUM_THREADS": "1",
        },
        options=("--shuffle", "3"),
        background=True,
    ),
}  # fmt: skip


def file_of(name: str) -> Path:
    return OUT / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.txt"


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(name: str, arguments: list[str]) -> int:
    """Run pytest under the settings of this machine. Returns its exit status."""
    machine = MACHINES[name]
    prefix = machine.prefix if not machine.prefix or shutil.which(machine.prefix[0]) else ()
    command = [*prefix, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *machine.options, *arguments]
    with file_of(name).open("w") as file:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | machine.variables, stdout=file, stderr=subprocess.STDOUT, check=False,
            stdin=subprocess.DEVNULL if machine.background else None, start_new_session=machine.background,
            preexec_fn=ignore_interrupts if machine.background else None,
        ).returncode  # fmt: skip


def summary_of(name: str) -> str:
    """Pytest's summary line: the numbers of passed and failed tests."""
    told = [line.strip("= ") for line in file_of(name).read_text().splitlines() if re.search(r" in [\d.]+s\b", line)]
    return told[-1] if told else "see its file"


def failures_of(name: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", file_of(name).read_text(), re.M)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MACHINES, default=list(MACHINES), metavar="NAME", help="these")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="only the tests in these files")
    parser.add_argument("--list", action="store_true", help="print the names and what they stand for")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args(arguments)
    if options.list:
        for name, machine in MACHINES.items():
            variables = [f"{variable}={value}" for variable, value in machine.variables.items()]
            told = [*machine.prefix, *variables, *machine.options]
            told += ["in the background"] if machine.background else []
            print(f"{name:26} {' '.join(told)}")
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    rows, failed = [], {}
    try:
        for name in options.only:
            start = time.monotonic()
            status = run(name, [*options.tests, *options.pytest])
            minutes, seconds = divmod(round(time.monotonic() - start), 60)
            rows.append((name, "ok" if status == 0 else f"exit {status}", f"{minutes}:{seconds:02}", summary_of(name)))
            print("{:26} {:8} {:>6}  {}".format(*rows[-1]), flush=True)
            if status != 0:
                failed[name] = failures_of(name)
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    print(f"\n{len(rows) - len(failed)} of {len(rows)} passed; what they said is in {os.path.relpath(OUT)}")
    for name, tests in failed.items():
        print(f"\n{name}:", *(tests or ["no test failed by name"]), sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
