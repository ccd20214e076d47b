"""Host time of a call of attention(): up to the launch of the kernel, and on the CPU in addition to SDPA's time.

Triton's own launcher is replaced by a function that does nothing. So everything before it is measured, on any machine:
the checks, the scale, the operator, the choice of the tile and the arguments of the launch. There is one thread, and
the tensors are so small that the arithmetic takes no time. The calls run one after the other in each round. The
quickest round counts, since disturbances only add time.

Times depend on the machine. The number of functions that Python calls does not: it is counted too, and has limits in
tests/test_host_overhead.py.

"part" rows time steps of the call "launch" alone; from "operator" on, each is inside the one before it. Where there is
a GPU, "GPU" rows are whole calls on it, with Triton's launcher or SDPA's kernels: they too are host time only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # so that Triton prepares the launch for tensors on the CPU

import harness
import results
import torch.nn.functional as F

from entropy_attn import attention, checks


class NoLauncher:
    """Replaces a Triton kernel: a launch of it does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def inputs(device: str = "cpu") -> list[torch.Tensor]:
    """Query, key and value."""
    return [torch.randn(1, 2, 16, 16, device=device) for _ in range(3)]


def launches(device: str, name: str, **options: Any) -> dict[str, Callable]:
    """Calls of every kind that launch the kernel, by `name` and what they ask for."""
    query, key, value = inputs(device)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device)
    scale = torch.full((1, 2), 0.25, device=device)
    all_kinds: dict[str, dict[str, Any]] = {
        "": {},
        ", scale from N and T": {"train_tokens": 64},
        ", entropy": {"return_entropy": True},
        ", scale per head": {"scale": scale},
        ", key-padding mask": {"attn_mask": mask},
        ", mask, entropy, N and T": {"attn_mask": mask, "return_entropy": True, "train_tokens": 64},
    }

    def call(kind: dict[str, Any]) -> Callable:
        return lambda: attention(query, key, value, **kind, **options)

    return {name + label: call(kind) for label, kind in all_kinds.items()}


def parts(device: str) -> dict[str, Callable]:
    """The steps of the plain call, as `attention` takes them."""
    from entropy_attn.backends import new_outputs, triton

    query, key, value = inputs(device)
    options = (None, 0, False, None, False, None, 0, None, "bhnd", False, False, "triton")
    call = checks.operator_arguments(query, key, value, *options)
    return {
        "part: checks": lambda: checks.operator_arguments(query, key, value, *options),
        "part: operator": lambda: torch.ops.entropy_attn.attention(*call),
        "part: launch": lambda: triton.forward(query, key, value, None, 0.25, False, False, False),
        "part: new outputs": lambda: new_outputs(query, value, False, False),
    }


@contextmanager
def without_launcher() -> Iterator[dict[str, Callable]]:
    """SDPA, the CPU backend, every kind of launch, and the parts of a plain one. The launcher does nothing."""
    from entropy_attn.backends import triton

    query, key, value = inputs()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "cpu": lambda: attention(query, key, value),
    }
    with mock.patch.object(triton, "attention_forward", NoLauncher()):
        yield ways | launches(device, "launch", backend="triton") | parts(device)


def timed(ways: dict[str, Callable], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds on the host of one call of each way, in each round; one thread."""

    def repeated(way: Callable) -> Callable:
        def run() -> None:
            for _ in range(calls):
                way()

        return run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            times = harness.interleaved({name: repeated(way) for name, way in ways.items()}, rounds)
    finally:
        torch.set_num_threads(threads)
    return {name: [1e3 * milliseconds / calls for milliseconds in taken] for name, taken in times.items()}


def calls_of(way: Callable) -> int:
    """How many functions Python calls in one call of `way`, in Python or in C. Calls inside C code are not seen."""
    calls = 0

    def count(frame, event: str, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    way()  # fills the caches
    sys.setprofile(count)
    try:
        way()
    finally:
        sys.setprofile(None)
    return calls - 1  # the last is `sys.setprofile`


def count() -> dict[str, int]:
    """The calls that Python makes in one call of each way, without Triton's launcher."""
    with without_launcher() as ways, torch.inference_mode():
        return {name: calls_of(way) for name, way in ways.items()}


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of one call of each way, in each round."""
    with without_launcher() as ways:
        times = timed(ways, rounds, calls)
    if torch.cuda.is_available():
        on_gpu = inputs("cuda")
        ways = {"GPU: sdpa": lambda: F.scaled_dot_product_attention(*on_gpu)} | launches("cuda", "GPU: launched")
        times |= timed(ways, rounds, calls)
    return times


def row_of(name: str, times: dict[str, list[float]], calls: int | None) -> dict:
    lower, median, _ = harness.quartiles(times[name])
    return {
        "call": name,
        "quickest_us": min(times[name]),
        "lower_quartile_us": lower,
        "median_us": median,
        "python_calls": "-" if calls is None else calls,
    }


def verdict(rows: list[dict]) -> str:
    """A sentence with the largest time to a launch, and the time that the CPU backend adds to SDPA."""
    quickest = {row["call"]: row["quickest_us"] for row in rows}
    slowest = max((name for name in quickest if name.startswith("launch")), key=quickest.__getitem__)
    over = quickest["cpu"] - quickest["sdpa"]
    return f"To the launch: {quickest[slowest]:.1f} us at most, '{slowest}'. On the CPU: {over:.1f} us more than SDPA."


def colour(name: str) -> str:
    return "tab:gray" if name.endswith("sdpa") else "tab:olive" if name.startswith("part") else "tab:blue"


def picture(rows: list[dict], path: Path) -> None:
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    names = [row["call"] for row in rows][::-1]
    times = [row["quickest_us"] for row in rows][::-1]
    bars = axes.barh(names, times, color=[colour(name) for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.15)
    axes.set_xlabel("microseconds a call, the quickest of the rounds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=500, help="of each way in a round (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/host_overhead.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    with results.Record(arguments.out, rounds=arguments.rounds, calls=arguments.calls) as record:
        times = measure(arguments.rounds, arguments.calls)
        calls = count()
        record.add(*(row_of(name, times, calls.get(name)) for name in times))
    lines = [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()] for row in record.rows]
    table = results.markdown(list(record.rows[0]), lines)
    results.write_tables(arguments.out, record.machine, f"{table}\n\n{verdict(record.rows)}")
    picture(record.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
