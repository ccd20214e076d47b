"""Time, memory and error of the entropy of every row: in the same pass as attention, and in two other ways.

- SDPA: attention without entropy, the lower limit.
- same pass: `attention(..., return_entropy=True)`.
- two passes: PyTorch's fused kernel gives the output and the log-sum-exp; then the scores are computed again, one block
  of queries at a time, for the entropy lse - sum(p s).
- softmax held: scores and softmax are held in memory; matrix products in the dtype of the inputs, softmax in float32.

Times are from interleaved rounds, and memory is the peak beyond the inputs (see harness.py). The error is the largest
difference of the entropy from float64 on some query rows. On a CPU with other users, set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import results
import torch
import torch.nn.functional as F
from peers import textbook
from tqdm import tqdm

from entropy_attn import attention

SDPA, SAME_PASS, TWO_PASSES, HELD = "SDPA, no entropy", "same pass", "two passes", "softmax held"
STYLES = {SDPA: ("black", "s"), SAME_PASS: ("tab:red", "o"), TWO_PASSES: ("tab:blue", "^"), HELD: ("tab:grey", "D")}
TOKENS = {"cuda": [256, 512, 1024, 2048, 4096, 8192, 16384], "cpu": [256, 512, 1024, 2048, 4096]}
DTYPES = ["float16", "bfloat16", "float32"]
QUERY_BLOCK = 512
CHECKED_ROWS = 256

Result = tuple[torch.Tensor, torch.Tensor]


def same_pass(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Result:
    result = attention(query, key, value, return_entropy=True)
    return result.out, result.entropy


def two_passes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Result:
    out, lse = attention_and_lse(query, key, value)
    scale = query.shape[-1] ** -0.5
    entropy = torch.empty_like(lse)
    for start in range(0, query.shape[2], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        scores = (query[:, :, rows] * scale @ key.mT).float()
        p = (scores - lse[:, :, rows, None]).exp_()
        entropy[:, :, rows] = lse[:, :, rows] - p.mul_(scores).sum(-1)
    return out, entropy


def attention_and_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Result:
    """Output and log-sum-exp of the fused kernels that SDPA calls; SDPA itself returns only the output."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype == torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    return out, lse[:, :, : query.shape[2]]  # some kernels pad the log-sum-exp


def measure(N: int, dtype: str, shape: tuple[int, int, int], rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each way. The row of a way that runs out of memory has a reason instead of times."""
    B, H, D = shape
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(B, H, N, D, generator=generator) for _ in range(3))
    query, key, value = (x.to(device, harness.DTYPES[dtype]) for x in drawn)
    checked = torch.linspace(0, N - 1, min(N, CHECKED_ROWS), device=device).long()
    reference = attention(
        query[:, :, checked].double(), key.double(), value.double(), return_entropy=True, backend="reference"
    ).entropy
    ways: dict[str, Callable[[], Any]] = {
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value),
        SAME_PASS: lambda: same_pass(query, key, value),
        TWO_PASSES: lambda: two_passes(query, key, value),
        HELD: lambda: textbook(query, key, value),
    }
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, Exception] = {}
    for name, way in list(ways.items()):
        rows[name] = {"N": N, "B": B, "H": H, "D": D, "dtype": dtype, "way": name}
        try:
            if name != SDPA:
                error = way()[1][:, :, checked].sub(reference).abs().max()
                rows[name]["entropy_error"] = float(error)
            rows[name]["peak_mib"] = harness.peak_memory(way, device)
        except RuntimeError as error:  # out of memory: on a CPU it has no class of its own
            harness.check_device(device, error)
            failed[name] = error
            del ways[name]
    times = harness.interleaved(ways, rounds, device, failed=failed)
    for name, taken in times.items():
        low, middle, high = harness.quartiles(taken)
        rows[name] |= {"ms": middle, "ms_low": low, "ms_high": high}
        rows[name] |= {"time_to_sdpa": harness.ratio(taken, times[SDPA])} if SDPA in times else {}
    for name, error in failed.items():
        rows[name]["reason"] = str(error).splitlines()[0]
    return list(rows.values())


def tables(rows: list[dict[str, Any]]) -> str:
    """For each number of tokens and way: milliseconds, ratio to SDPA's time, MiB, and error in nats."""

    def cell(row: dict[str, Any]) -> str:
        if "ms" not in row:
            return row["reason"].split(". ")[0]
        error = f", {row['entropy_error']:.0e} nats" if "entropy_error" in row else ""
        ratio = f" ({row['time_to_sdpa']:.2f})" if "time_to_sdpa" in row else ""
        return f"{row['ms']:.3g} ms{ratio}, {row['peak_mib']:.3g} MiB{error}"

    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in rows if row["dtype"] == dtype]
        lines = [
            [str(N), *(cell(row) for row in chosen if row["N"] == N)] for N in dict.fromkeys(row["N"] for row in chosen)
        ]
        parts.append(f"## {dtype}, B = {chosen[0]['B']}, H = {chosen[0]['H']}, D = {chosen[0]['D']}")
        parts.append(results.markdown(["N", *dict.fromkeys(row["way"] for row in chosen)], lines))
    return "\n\n".join(parts)


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Time and memory over the number of tokens, a row of panels for each dtype."""
    plt = harness.pyplot()
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, grid = plt.subplots(
        len(dtypes), 2, figsize=(11, 4.3 * len(dtypes) + 0.5), layout="constrained", squeeze=False
    )
    for line, dtype in zip(grid, dtypes, strict=True):
        timed = [row for row in rows if row["dtype"] == dtype and "ms" in row]
        for axes, field, label in zip(line, ("ms", "peak_mib"), ("milliseconds", "MiB beyond the inputs"), strict=True):
            for way, (colour, marker) in STYLES.items():
                points = [(row["N"], row[field]) for row in timed if row["way"] == way]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, ls="-", color=colour, ms=5, label=way)
            harness.token_axis(axes, [row["N"] for row in timed])
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.set(xlabel="tokens N", ylabel=label)
        shape = f"{dtype}, B = {timed[0]['B']}, H = {timed[0]['H']}, D = {timed[0]['D']}"
        line[0].set_title(f"time: {shape}")
        line[1].set_title(f"peak memory: {shape}")
    grid[0][0].legend()
    figure.suptitle(harness.describe(machine), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: Path) -> None:
    """Write the table and the picture of a saved run to files beside it."""
    machine, rows = results.load(path)
    draw(rows, machine, path.with_suffix(".png"))
    markdown = results.write_tables(path, machine, tables(rows))
    ratios = [row["time_to_sdpa"] for row in rows if row["way"] == SAME_PASS and "time_to_sdpa" in row]
    if ratios:
        print(f"same pass: {statistics.median(ratios):.2f} times SDPA without entropy, in the median of these cases")
    print(f"wrote {path}, {markdown}, {path.with_suffix('.png')}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device, help="default: %(default)s")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 256 to 16384, to 4096 on a CPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float16, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    results.add_run_options(parser, "entropy_cost")
    arguments = parser.parse_args()
    if arguments.picture_from:
        return report(arguments.picture_from)
    device = arguments.device
    if device == "cuda":
        harness.need_gpu("entropy_cost.py", "on the CPU by `--device cpu`")
    shape = (arguments.batch, arguments.heads, arguments.head_dim)
    dtypes = arguments.dtypes or ["float16" if device == "cuda" else "float32"]
    cases = [(N, dtype) for dtype in dtypes for N in arguments.tokens or TOKENS[device]]
    B, H, D = shape
    try:
        record = results.Record(arguments.out, device, arguments.resume)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    with record:
        for N, dtype in (progress := tqdm(cases, file=sys.stderr)):
            progress.set_description(f"{dtype} N = {N}")
            if not record.has(N=N, B=B, H=H, D=D, dtype=dtype):
                record.add(*measure(N, dtype, shape, arguments.rounds, device))
    report(arguments.out)


if __name__ == "__main__":
    main()
