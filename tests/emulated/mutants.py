"""Can the emulated tests fail? Breaks the kernel and its launch in every way of mutations.py, and reports what saw it.

    PYTHONPATH=tests python -m emulated.mutants

Each mutant is a copy of the package in a folder of its own, with its own cache of compiled kernels. The calls of
mutant_calls.py run there in a process, up to the first that objects. The results go to --out after every mutant, and
the report to mutants.md. A run goes on where it was interrupted. It begins anew if a source has changed since, and
tries missed mutants again if the calls have.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from emulated.mutations import MUTATIONS, PTX, Mutation
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REPORT = HERE / "mutants.md"
LIMIT = 600  # seconds of one mutant
ORIGINAL = Mutation("the original", "", "", "")
running: set[subprocess.Popen[str]] = set()
stopped = threading.Event()


def mutate(text: str, mutation: Mutation) -> str:
    """The source with the mutation. ValueError unless its text is there exactly once."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


def sources() -> str:
    """The digest of what is mutated and of the emulator. Another one makes all results stale."""
    emulator = ROOT / "tests" / "emulator"
    package = [*(ROOT / "entropy_attn").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return digest(*package, *emulator.rglob("*.py"), *emulator.rglob("*.c"))


def calls() -> str:
    """The digest of the calls. Another one makes the results of missed mutants stale."""
    return digest(HERE / "mutant_calls.py", ROOT / "tests" / "support.py", ROOT / "tests" / "packed.py")


def is_fresh(row: dict[str, Any]) -> bool:
    """Whether a saved result still holds."""
    current = {m.name: [m.old, m.new, m.place] for m in (ORIGINAL, *MUTATIONS)}
    caught = row["check"] not in (None, "none")
    return row["mutation"] == current.get(row["name"]) and (caught or row["of_calls"] == calls())


def run(mutation: Mutation, folder: Path) -> dict[str, Any]:
    """What the calls say of a mutant in an empty folder."""
    shutil.copytree(ROOT / "entropy_attn", folder / "entropy_attn", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "emulated.mutant_calls"]
    if mutation.first:
        command += ["--first", mutation.first]
    if mutation.file == PTX:
        command += ["--ptx", json.dumps([mutation.old, mutation.new, mutation.place])]
    elif mutation.file:
        # entropy_attn/kernels is a symbolic link to kernels, of which the copy has the files.
        path = folder / mutation.file.replace("kernels/", "entropy_attn/kernels/")
        path.write_text(mutate(path.read_text(), mutation))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    kept |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(folder / "cache")}
    begun = time.perf_counter()
    row: dict[str, Any] = {"name": mutation.name, "file": mutation.file, "check": None}
    row |= {"mutation": [mutation.old, mutation.new, mutation.place], "of_calls": calls()}
    try:
        done = finished(command, folder, kept)
        made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"call"')]
        row["calls"] = {call["call"]: call["seconds"] for call in made}
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            row |= {"check": "none" if not made else "raised", "said": said}
        elif "check" in made[-1]:
            row |= {name: made[-1][name] for name in ("check", "call", "said")}
    except subprocess.TimeoutExpired:
        row |= {"check": "endless loop", "said": f"more than {LIMIT} s"}
    return row | {"seconds": round(time.perf_counter() - begun, 1)}


def finished(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, in a session of its own: Ctrl-C must not look like a mutant that raises."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        running.add(process)
        try:
            out, error = process.communicate(timeout=LIMIT)
        finally:
            running.discard(process)
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def said(row: dict[str, Any]) -> str:
    """The first line of what was said, short enough for a cell."""
    line = row.get("said", "").split(": ", 1)[-1].partition("\n")[0].replace("|", "\\|")
    return line if len(line) < 110 else line[:107].rsplit(" ", 1)[0] + " ..."


def report(original: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    import torch
    import triton

    stillborn = [row for row in rows if row["check"] == "none"]
    alive = [row for row in rows if row["check"] != "none"]
    missed = [row for row in alive if row["check"] is None]
    counts = collections.Counter(row["check"] for row in alive if row["check"])
    reasons = {mutation.name: mutation.unseen for mutation in MUTATIONS}
    equivalent = {mutation.name for mutation in MUTATIONS if mutation.equivalent} & {row["name"] for row in missed}
    lines = [
        "# Mutants of the kernel and of its launch",
        "",
        "Written by `make mutants`: each mutant is one change of [mutations.py](mutations.py), and the calls of",
        "[mutant_calls.py](mutant_calls.py) run on the emulated device until one objects.",
        "",
        f"**{len(alive) - len(missed)} of {len(alive) - len(equivalent)} mutants are caught**, beside "
        f"{len(equivalent)} that are equivalent: they change no result on any device. torch {torch.__version__}, "
        f"triton {triton.__version__}.",
        f"The {len(original['calls'])} calls pass on the original in {original['seconds']:.0f} s.",
        "",
        "| check | mutants |",
        "| --- | --- |",
        *(f"| {check} | {count} |" for check, count in counts.most_common()),
        f"| missed | {len(missed)} |",
        "",
        "| mutant | file | check | call | what it said |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['name']} | {Path(row['file']).name} | {row['check'] or '**missed**'} | {row.get('call', '')} "
            f"| {said(row)} |"
            for row in alive
        ),
    ]
    if missed:
        lines += ["", "## Missed", ""]
        for row in missed:
            kind = " (equivalent)" if row["name"] in equivalent else ""
            lines.append(f"- {row['name']}{kind}: {reasons[row['name']] or 'nobody knows why.'}")
    if stillborn:
        lines += ["", "## Did not run, and do not count", ""]
        lines += [f"- {row['name']}: {said(row)}" for row in stillborn]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.json", help="default: build/mutants.json")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time; default: 1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose names have one of these in them")
    arguments = parser.parse_args()
    state: dict[str, Any] = {"sources": sources(), "rows": []}
    if arguments.out.exists():
        saved = json.loads(arguments.out.read_text())
        if saved["sources"] == state["sources"]:
            state["rows"] = [row for row in saved["rows"] if is_fresh(row)]
    wanted = [m for m in MUTATIONS if not arguments.only or any(part in m.name for part in arguments.only)]
    left = [m for m in (ORIGINAL, *wanted) if m.name not in {row["name"] for row in state["rows"]}]

    def one(mutation: Mutation) -> None:
        with tempfile.TemporaryDirectory() as folder:
            row = run(mutation, Path(folder))
        if stopped.is_set():
            return
        state["rows"] = [*state["rows"], row]
        write(arguments.out, json.dumps(state, indent=1) + "\n")
        verdict = f"{row['check']} in {row.get('call')}" if row["check"] else "no call objects"
        tqdm.write(f"{row['seconds']:5.0f} s  {mutation.name}: {verdict}")
        progress.update()

    with tqdm(total=len(left), smoothing=0) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            if left[:1] == [ORIGINAL]:
                one(left.pop(0))
            (original,) = (row for row in state["rows"] if row["name"] == ORIGINAL.name)
            if original["check"]:
                sys.exit(f"the original fails: {original}")
            for _ in pool.map(one, left):
                pass
        except KeyboardInterrupt:
            stopped.set()
            for process in list(running):
                process.kill()
            pool.shutdown(cancel_futures=True)
            tqdm.write(f"interrupted: {len(state['rows'])} results are in {arguments.out}")
            sys.exit(130)
    by_name = {row["name"]: row for row in state["rows"]}
    if all(mutation.name in by_name for mutation in MUTATIONS):
        write(REPORT, report(by_name[ORIGINAL.name], [by_name[mutation.name] for mutation in MUTATIONS]))
        print(f"wrote {REPORT}")


if __name__ == "__main__":
    main()
