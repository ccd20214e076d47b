"""The CPU backend against PyTorch's SDPA: plain, with entropy, and the textbook way to entropy that holds every score.

The ways of one case run in turn, round by round; what is reported are medians, and ratios to SDPA of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from entropy_attn import attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and entropy from a softmax held in memory."""
    log_p = (query @ key.mT * query.shape[-1] ** -0.5).log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    return p.to(value.dtype) @ value, -(p * log_p).sum(-1)


def interleaved(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_ > 0:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def measure(dtype: str, N: int, heads: int, head_dim: int, rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, N, head_dim, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    ways = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "ours": lambda: attention(query, key, value),
        "ours with entropy": lambda: attention(query, key, value, return_entropy=True),
    }
    if heads * N * N <= 1 << 28:
        ways["textbook entropy"] = lambda: textbook(query, key, value)
    times = interleaved(ways, rounds)
    row: dict = {
        "dtype": dtype,
        "N": N,
        "heads": heads,
        "head_dim": head_dim,
        "sdpa_ms": statistics.median(times["sdpa"]),
    }
    for name in list(ways)[1:]:
        ratios = [t / s for t, s in zip(times[name], times["sdpa"], strict=True)]
        row[f"{name} / sdpa"] = statistics.median(ratios)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[40, 64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("build/cpu.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds"
    )
    rows = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for dtype in arguments.dtypes:
        for head_dim in arguments.head_dims:
            for N in arguments.tokens:
                row = measure(dtype, N, arguments.heads, head_dim, arguments.rounds)
                rows.append(row)
                if len(rows) == 1:
                    print(" | ".join(row))
                print(" | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()), flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1))
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
