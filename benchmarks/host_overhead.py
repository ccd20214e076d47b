"""What a call of attention() costs the host: the time until the kernel is launched, and on the CPU over PyTorch's SDPA.

Triton's own launcher is put out of action, so that everything before it is measured, on any machine: the checks, the
scale, the operator, the choice of the tile and the launcher's arguments. One thread, tensors so small that the
arithmetic takes no time; the calls run in turn, and the quickest of the rounds counts, as anything else is disturbance.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # lets the launch be prepared for tensors on the CPU

import harness
import torch
import torch.nn.functional as F

from entropy_attn import attention

LIMITS = {"launch": 25.0, "cpu": 15.0}  # microseconds, see `ways`


class NoLauncher:
    """Stands in for a Triton kernel: takes the launch and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def ways() -> dict[str, Callable]:
    """What is timed; names that begin with "launch" stop before Triton's launcher."""
    query, key, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    scale = torch.full((1, 2), 0.25)
    launch = {"backend": "triton"}
    return {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "cpu": lambda: attention(query, key, value),
        "launch": lambda: attention(query, key, value, **launch),
        "launch, scale from N and T": lambda: attention(query, key, value, train_tokens=64, **launch),
        "launch, entropy": lambda: attention(query, key, value, return_entropy=True, **launch),
        "launch, scale per head": lambda: attention(query, key, value, scale=scale, **launch),
        "launch, key-padding mask": lambda: attention(query, key, value, mask, **launch),
    }


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of one call of each way, in each round."""
    from entropy_attn.backends import triton

    def repeated(way: Callable) -> Callable:
        def run() -> None:
            for _ in range(calls):
                way()

        return run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(triton, "attention_forward", NoLauncher()), torch.inference_mode():
            times = harness.interleaved({name: repeated(way) for name, way in ways().items()}, rounds)
    finally:
        torch.set_num_threads(threads)
    return {name: [1e3 * ms / calls for ms in rounds_ms] for name, rounds_ms in times.items()}


def row_of(name: str, times: dict[str, list[float]]) -> dict:
    lower, median, _ = harness.quartiles(times[name])
    return {"call": name, "quickest_us": min(times[name]), "lower_quartile_us": lower, "median_us": median}


def picture(rows: list[dict], path: Path) -> None:
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    names = [row["call"] for row in rows][::-1]
    times = [row["quickest_us"] for row in rows][::-1]
    bars = axes.barh(names, times, color=["tab:gray" if name == "sdpa" else "tab:blue" for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(
        LIMITS["launch"], color="tab:red", linewidth=1, label=f"our limit for a launch, {LIMITS['launch']:.0f}"
    )
    axes.set_xlabel("microseconds a call, at the quickest (launch: without Triton's launcher)")
    axes.legend(frameon=False, loc="upper right")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=500, help="of each way in a round (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/host_overhead.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    with harness.Record(arguments.out, "cpu", rounds=arguments.rounds, calls=arguments.calls) as record:
        times = measure(arguments.rounds, arguments.calls)
        record.add(*(row_of(name, times) for name in times))
    lines = [[f"{x:.1f}" if isinstance(x, float) else x for x in row.values()] for row in record.rows]
    harness.write_tables(arguments.out, record.machine, harness.markdown(list(record.rows[0]), lines))
    picture(record.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
