"""Host time of a call of attention(): up to the launch of the kernel, and on the CPU in addition to SDPA's time.

Triton's own launcher is replaced by a function that does nothing. So everything before it is measured, on any machine:
the checks, the scale, the operator, the choice of the tile and the arguments of the launch. There is one thread, and
the tensors are so small that the arithmetic takes no time. The calls run one after the other in each round. The
quickest round counts, since disturbances only add time.

"part" rows time steps of the call "launch" alone; from "operator" on, each is inside the one before it. Where there is
a GPU, "GPU" rows are whole calls on it, with Triton's launcher or SDPA's kernels: they too are host time only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
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

LIMITS = {"launch": 25.0, "cpu": 15.0}  # microseconds: to the launch, and on the CPU in addition to SDPA


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


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of one call of each way, in each round; names that begin with "launch" stop before the launcher."""
    from entropy_attn.backends import triton

    query, key, value = inputs()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    ways = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "cpu": lambda: attention(query, key, value),
    }
    with mock.patch.object(triton, "attention_forward", NoLauncher()):
        times = timed(ways | launches(device, "launch", backend="triton") | parts(device), rounds, calls)
    if gpu:
        on_gpu = inputs("cuda")
        ways = {"GPU: sdpa": lambda: F.scaled_dot_product_attention(*on_gpu)} | launches("cuda", "GPU: launched")
        times |= timed(ways, rounds, calls)
    return times


def row_of(name: str, times: dict[str, list[float]]) -> dict:
    lower, median, _ = harness.quartiles(times[name])
    return {"call": name, "quickest_us": min(times[name]), "lower_quartile_us": lower, "median_us": median}


def verdict(rows: list[dict]) -> str:
    """A sentence with the two figures that have limits."""
    quickest = {row["call"]: row["quickest_us"] for row in rows}
    slowest = max((name for name in quickest if name.startswith("launch")), key=quickest.__getitem__)
    over = quickest["cpu"] - quickest["sdpa"]
    return (
        f"To the launch: {quickest[slowest]:.1f} us at most, '{slowest}' (our limit: {LIMITS['launch']:.0f}). "
        f"On the CPU: {over:.1f} us more than SDPA (our limit: {LIMITS['cpu']:.0f})."
    )


def colour(name: str) -> str:
    return "tab:gray" if name.endswith("sdpa") else "tab:olive" if name.startswith("part") else "tab:blue"


def picture(rows: list[dict], path: Path) -> None:
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    names = [row["call"] for row in rows][::-1]
    times = [row["quickest_us"] for row in rows][::-1]
    bars = axes.barh(names, times, color=[colour(name) for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(
        LIMITS["launch"], color="tab:red", linewidth=1, label=f"our limit for a launch, {LIMITS['launch']:.0f}"
    )
    axes.margins(x=0.15)
    axes.set_xlabel("microseconds a call, the quickest of the rounds")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
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
        record.add(*(row_of(name, times) for name in times))
    lines = [[f"{x:.1f}" if isinstance(x, float) else x for x in row.values()] for row in record.rows]
    table = results.markdown(list(record.rows[0]), lines)
    results.write_tables(arguments.out, record.machine, f"{table}\n\n{verdict(record.rows)}")
    picture(record.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
