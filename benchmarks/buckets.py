"""Attention over a batch of images of different sizes: packed, padded, masked or one by one, with λ of each image.

The sizes are sampled from the aspect-ratio buckets that SDXL and PixArt-α were trained on (aspect_ratios.py), every
size as likely as another. Every way has λ = sqrt(log_T N / D) of each image, and its inputs in the form that it takes
them in (packed_ways.py).

The ways run one after the other in each round (see harness.py). Their outputs are checked against float64, one image at
a time. The report has the time of each, and the median of its ratios to padded SDPA in the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aspect_ratios
import harness
import results
import torch
from packed_ways import GPU_WAYS, WAYS, Batch, make_batch
from tqdm import tqdm

from entropy_attn import attention
from entropy_attn.output import AttentionOutput

DTYPES = ["float16", "bfloat16", "float32"]
TOLERANCE = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 2e-5}  # of the output, relative to its norm
BASE = "padded SDPA"
COLOURS = dict(zip(WAYS, ("blue", "red", "cyan", "grey", "purple", "green", "olive", "brown"), strict=True))


def expected(batch: Batch) -> torch.Tensor:
    """The output (total, H, D) in float64, one image at a time."""
    options: dict[str, Any] = {"train_tokens": batch.train_tokens, "backend": "reference"}
    outs = [attention(*(x.double() for x in qkv), **options) for _, qkv in batch.images()]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def error_of(result: Any, batch: Batch, wanted: torch.Tensor) -> float:
    """The error of a way's output, relative to the norm of the output wanted."""
    out = result.out if isinstance(result, AttentionOutput) else result
    out = batch.from_padded(out) if out.dim() == 4 else out
    return float((out.double() - wanted).norm() / wanted.norm())


def measure(case: dict[str, Any], names: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each way. A way that raises has a reason, and the others go on."""
    layer = next(each for each in aspect_ratios.layers(case["case"]) if each.name == case["layer"])
    sizes = aspect_ratios.sample(case["case"], case["B"], case["seed"])
    lengths = [aspect_ratios.tokens(size, layer) for size in sizes]
    batch = make_batch(lengths, layer, harness.DTYPES[case["dtype"]], device)
    case = case | {"tokens": lengths, "padding": batch.padding}
    wanted = expected(batch)
    rows = {name: case | {"way": name} for name in names}
    ways: dict[str, Callable[[], Any]] = {}
    for name in names:
        try:
            way = WAYS[name](batch)
            error = error_of(way(), batch, wanted)
            right = error <= TOLERANCE[case["dtype"]]  # False for NaN
            rows[name] |= {"status": "ok" if right else "wrong", "error": error}
            if right:
                rows[name]["peak_mib"] = harness.peak_memory(way, device)
                ways[name] = way
        except Exception as failure:  # whatever a library raises, a missing compiler included
            harness.check_device(device, failure)
            rows[name] |= {"status": "not run", "reason": harness.first_line(failure)}
    failed: dict[str, Exception] = {}
    times = harness.interleaved(ways, rounds, device, failed=failed)
    for name, taken in times.items():
        low, middle, high = harness.quartiles(taken)
        rows[name] |= {"ms": middle, "ms_low": low, "ms_high": high}
        rows[name] |= {"time_to_base": harness.ratio(taken, times[BASE])} if BASE in times else {}
    for name, failure in failed.items():
        rows[name] |= {"status": "not run", "reason": harness.first_line(failure)}
    return list(rows.values())


def tables(rows: list[dict[str, Any]]) -> str:
    """For each dtype a line for each batch, with milliseconds and the ratio to padded SDPA of each way."""

    def cell(row: dict[str, Any]) -> str:
        if "ms" not in row:
            return row["status"]
        ratio = f" ({row['time_to_base']:.2f})" if "time_to_base" in row else ""
        return f"{row['ms']:.3g} ms{ratio}, {row['peak_mib']:.3g} MiB"

    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in rows if row["dtype"] == dtype]
        names = list(dict.fromkeys(row["way"] for row in chosen))
        lines = []
        for key in dict.fromkeys((row["case"], row["layer"]) for row in chosen):
            found = {row["way"]: row for row in chosen if (row["case"], row["layer"]) == key}
            first = next(iter(found.values()))
            about = [f"{key[0]}, {key[1]}", f"{min(first['tokens'])} … {max(first['tokens'])}"]
            about.append(f"{100 * first['padding']:.0f} %")
            lines.append([*about, *(cell(found[name]) if name in found else "" for name in names)])
        parts += [f"## {dtype}", results.markdown(["batch", "tokens", "padding", *names], lines)]
    reasons = dict.fromkeys(f"- {row['way']}: {row['reason']}" for row in rows if "reason" in row)
    wrong = dict.fromkeys(f"- {row['way']}: off by {row['error']:.1e}" for row in rows if row["status"] == "wrong")
    return "\n\n".join([*parts, *(["Not run:\n\n" + "\n".join(reasons)] if reasons else []),
                        *(["Wrong:\n\n" + "\n".join(wrong)] if wrong else [])])  # fmt: skip


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to padded SDPA's time, a panel for each dtype."""
    plt = harness.pyplot()
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    batches = list(dict.fromkeys((row["case"], row["layer"]) for row in rows))
    width = 3 + 2.2 * len(batches)
    figure, grid = plt.subplots(
        len(dtypes), 1, figsize=(max(width, 8), 3 * len(dtypes) + 1), layout="constrained", squeeze=False
    )
    for axes, dtype in zip(grid[:, 0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype and "time_to_base" in row]
        names = [name for name in COLOURS if any(row["way"] == name for row in chosen)]
        for i, name in enumerate(names):
            at = {batches.index((row["case"], row["layer"])): row for row in chosen if row["way"] == name}
            offset = (i - (len(names) - 1) / 2) * 0.8 / len(names)
            heights = [row["time_to_base"] for row in at.values()]
            bars = axes.bar(
                [x + offset for x in at], heights, 0.75 / len(names), color=f"tab:{COLOURS[name]}", label=name
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="black", lw=0.8, ls=":", zorder=0)
        about = {(row["case"], row["layer"]): f"{100 * row['padding']:.0f} % padding" for row in rows}
        axes.set_xticks(range(len(batches)), [f"{b[0]}\n{b[1]}\n{about[b]}" for b in batches], fontsize=8)
        axes.set_ylabel("time / padded SDPA's")
        axes.set_title(dtype, fontsize=10)
        axes.margins(y=0.12)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(harness.describe(machine), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: Path) -> None:
    """Write the table and the picture of a saved run to files beside it."""
    machine, rows = results.load(path)
    picture = path.with_suffix(".png")
    draw(rows, machine, picture)
    markdown = results.write_tables(path, machine, tables(rows))
    print(f"wrote {path}, {markdown}, {picture}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device, help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=aspect_ratios.CASES, help="default: all; on a CPU without 1024")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float16, float32 on a CPU")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all that the device has")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes that are sampled")
    parser.add_argument("--seconds", type=float, help="begin no batch after this time; --resume goes on")
    results.add_run_options(parser, "buckets")
    arguments = parser.parse_args()
    if arguments.picture_from:
        return report(arguments.picture_from)
    device = arguments.device
    if device == "cuda":
        harness.need_gpu("buckets.py", "on the CPU by `--device cpu`")
    small = [case for case in aspect_ratios.CASES if "1024" not in case and case != "SDXL"]
    names = arguments.ways or [name for name in WAYS if device == "cuda" or name not in GPU_WAYS]
    batches = [
        {"case": case, "layer": layer.name, "dtype": dtype, "B": arguments.batch, "seed": arguments.seed}
        for dtype in arguments.dtypes or ["float16" if device == "cuda" else "float32"]
        for case in arguments.cases or (aspect_ratios.CASES if device == "cuda" else small)
        for layer in aspect_ratios.layers(case)
    ]
    try:
        record = results.Record(arguments.out, device, arguments.resume)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    started = time.monotonic()
    with record:
        for common in (progress := tqdm([b for b in batches if not record.has(**b)], file=sys.stderr)):
            if arguments.seconds is not None and time.monotonic() - started >= arguments.seconds:
                print(f"\n{arguments.seconds:g} seconds are over: --resume goes on", file=sys.stderr)
                break
            progress.set_description(f"{common['dtype']} {common['case']}, {common['layer']}")
            record.add(*measure(common, names, arguments.rounds, device))
            record.machine |= harness.clocks()  # those of a busy device
    if not record.rows:
        return print("no row was measured", file=sys.stderr)
    report(arguments.out)


if __name__ == "__main__":
    main()
