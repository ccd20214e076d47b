"""Time of the CPU backend, without and with entropy, and of a softmax held in memory, relative to PyTorch's SDPA.

The ways run one after the other in each round (see harness.py). The report has the median time of SDPA, and the median
of each way's ratios to SDPA in the same round. With --busy, other processes use every core all the while, so SDPA's
times are under load too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import results
import torch
import torch.nn.functional as F
from peers import textbook
from tqdm import tqdm

from entropy_attn import attention

DTYPES = ["float32", "bfloat16", "float16", "float64"]
COLOURS = {"ours": "tab:blue", "ours with entropy": "tab:red", "textbook entropy": "tab:grey"}
HELD_SCORES = 1 << 28  # the softmax held in memory is left out where it has more scores
# Computes while its parent is the process that its argument names. So it ends with this script, even by SIGKILL.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))"


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep this many other processes computing until the block ends."""
    running: list[subprocess.Popen] = []
    try:
        for _ in range(processes):  # in sessions of their own, which Ctrl-C does not reach
            command = [sys.executable, "-c", BUSY, str(os.getpid())]
            running.append(subprocess.Popen(command, start_new_session=True))
        yield
        ended = sum(process.poll() is not None for process in running)
        if ended:
            raise RuntimeError(f"{ended} of the {processes} busy processes ended early: the ratios are not under load")
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(dtype: str, N: int, heads: int, head_dim: int, rounds: int) -> dict[str, Any]:
    """A row: milliseconds of SDPA, and the other ways' ratios to it."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, heads, N, head_dim, generator=generator) for _ in range(3))
    query, key, value = (x.to(harness.DTYPES[dtype]) for x in drawn)
    ways = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "ours": lambda: attention(query, key, value),
        "ours with entropy": lambda: attention(query, key, value, return_entropy=True),
    }
    if heads * N * N <= HELD_SCORES:
        ways["textbook entropy"] = lambda: textbook(query, key, value)
    times = harness.interleaved(ways, rounds)
    row: dict[str, Any] = {"dtype": dtype, "N": N, "heads": heads, "head_dim": head_dim}
    row["sdpa_ms"] = statistics.median(times["sdpa"])
    return row | {f"{name} / sdpa": harness.ratio(times[name], times["sdpa"]) for name in list(ways)[1:]}


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        [f"{x:.2f}" if isinstance(x, float) else str(x) for x in (row.get(column, "") for column in columns)]
        for row in rows
    ]
    return results.markdown(columns, lines)


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to SDPA's time, a panel for each dtype."""
    plt = harness.pyplot()
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    most = max(sum(row["dtype"] == dtype for row in rows) for dtype in dtypes)
    figure, grid = plt.subplots(
        len(dtypes), 1, figsize=(1.5 + 1.1 * max(most, 5), 2.4 * len(dtypes) + 1), layout="constrained", squeeze=False
    )
    for axes, dtype in zip(grid[:, 0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for i, (way, colour) in enumerate(COLOURS.items()):
            timed = {j + 0.27 * (i - 1): row[f"{way} / sdpa"] for j, row in enumerate(chosen) if f"{way} / sdpa" in row}
            bars = axes.bar(list(timed), list(timed.values()), 0.25, color=colour, label=way)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="black", lw=0.8, ls=":", zorder=0)
        axes.set_xticks(range(len(chosen)), [f"D = {row['head_dim']}\nN = {row['N']}" for row in chosen], fontsize=8)
        axes.set_ylabel("time / SDPA's")
        axes.set_title(dtype, fontsize=10)
        axes.margins(y=0.12)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(harness.describe(machine), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[40, 64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="measure while one other process for each core computes")
    parser.add_argument("--out", type=Path, default=Path("build/cpu.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    cases = [(dtype, D, N) for dtype in arguments.dtypes for D in arguments.head_dims for N in arguments.tokens]
    others = cores() if arguments.busy else 0
    record = results.Record(arguments.out, "cpu", rounds=arguments.rounds, busy_processes=others)
    print(harness.describe(record.machine), file=sys.stderr)
    with record, busy(others):
        for dtype, D, N in (progress := tqdm(cases, file=sys.stderr)):
            progress.set_description(f"{dtype} D = {D} N = {N}")
            record.add(measure(dtype, N, arguments.heads, D, arguments.rounds))
    picture = arguments.out.with_suffix(".png")
    draw(record.rows, record.machine, picture)
    told = f"{arguments.rounds} rounds"
    if arguments.busy:
        told += f", with {others} other processes on {cores()} cores"
    markdown = results.write_tables(arguments.out, record.machine, f"{told}\n\n{table(record.rows)}")
    print(f"wrote {arguments.out}, {markdown}, {picture}", file=sys.stderr)


if __name__ == "__main__":
    main()
