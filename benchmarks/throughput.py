"""Throughput of the kernel and of other attention libraries on the attention layers of image models.

A case is the shape of an attention layer (see layers.py) and a variant: plain, masked, causal, or with a scale per
head. Our kernel runs each case without and with entropy. The other libraries (see peers.py) run it without, since none
of them returns the entropy. Tensors lie in memory as (B, N, H, D), as Diffusers passes them.

Every way is first checked against float64 on some query rows. A wrong result is reported and not timed. A library that
refuses a case is reported with its reason. Then the ways run one after the other in each round (see harness.py).
TFLOP/s count 4 B H Nq Nk D operations, half of that for causal, and all of it for other masks. Ratios are to the time
of SDPA, with the backend that it chooses, in the same round. Where the kernel takes microseconds only, the time
includes the launch from the host.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import results
import torch
from layers import MODELS, VARIANTS, Inputs, Shape, make_inputs, shapes
from peers import DISTRIBUTIONS, OURS, PEERS
from tqdm import tqdm

from entropy_attn import AttentionOutput, attention

TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-5}  # norm of the error / norm of the output
ENTROPY_TOLERANCE = 1e-3  # nats
CHECKED_ROWS = 16
SIZES = {
    "cuda": ["512x512", "128x128", "256x256", "768x768", "1024x1024", "512x288", "512x384"],
    "cpu": ["64x64", "128x64"],
}
LENGTHS = {"cuda": [1024, 4096, 16384, 2048, 8192], "cpu": [64, 128, 256]}
SHORT = {"models": ["SD1.5", "SD2.1", "square"], "variants": ["plain"], "sizes": 1, "lengths": 3}  # without --full
# What the estimate of a run's length assumes. Nobody has measured these.
ASSUMED_TFLOPS = {"float16": 100.0, "bfloat16": 100.0, "float32": 10.0}
LAUNCH_AND_FLUSH = 0.5e-3  # seconds a repetition
SETUP = {"flex": 8.0, "ours": 3.0, "ours+entropy": 3.0}  # seconds to compile and check a way; 1 for the others
SLOWER = {"sdpa-math": 10.0, "sdpa-efficient": 2.0}
CPU_PEERS = ["sdpa", "sdpa-flash", "sdpa-math"]
STYLES = {
    "ours": ("tab:blue", "o"),
    "ours+entropy": ("tab:red", "o"),
    "sdpa": ("black", "s"),
    "sdpa-flash": ("tab:green", "^"),
    "sdpa-cudnn": ("tab:purple", "v"),
    "sdpa-efficient": ("tab:olive", "<"),
    "sdpa-math": ("grey", ">"),
    "flex": ("tab:orange", "D"),
    "flash-attn": ("tab:cyan", "P"),
    "xformers": ("tab:pink", "X"),
}


def expected(inputs: Inputs, rows: torch.Tensor) -> AttentionOutput:
    """Output and entropy of some query rows in float64."""
    mask = inputs.attn_mask
    if inputs.is_causal:
        mask = torch.arange(inputs.key.shape[2], device=rows.device) <= rows[:, None]
    elif mask is not None:
        mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
        mask = mask if mask.dtype == torch.bool else mask.double()
    query, key, value = inputs.query[:, :, rows].double(), inputs.key.double(), inputs.value.double()
    return attention(query, key, value, mask, scale=inputs.scale, return_entropy=True, backend="reference")


def check(way: Callable[[], Any], reference: AttentionOutput, rows: torch.Tensor, dtype: str) -> dict[str, Any]:
    """The status of a way, "ok" or "wrong", and the errors that decide it."""
    result = way()
    out, entropy = (result.out, result.entropy) if isinstance(result, AttentionOutput) else (result, None)
    verdict = {"error": float((out[:, :, rows].double() - reference.out).norm() / reference.out.norm())}
    right = verdict["error"] <= TOLERANCE[dtype]  # False for NaN
    if entropy is not None:
        verdict["entropy_error"] = float((entropy[:, :, rows] - reference.entropy).abs().max())
        right = right and verdict["entropy_error"] <= ENTROPY_TOLERANCE
    return {"status": "ok" if right else "wrong"} | verdict


def reason(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """Why a way refused the case. SDPA gives its reasons as warnings, the others in the exception."""
    texts = [str(w.message).split(" (Triggered")[0].strip() for w in said if issubclass(w.category, UserWarning)]
    # SDPA with one backend also warns that each of the others is disabled.
    texts = [t for t in texts if not re.search(r"not used because:$|runtime disabled", t)]
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return " ".join(dict.fromkeys(texts)) or f"{type(error).__name__}: {first_line}"


def measure(shape: Shape, dtype: str, variant: str, peers: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each way. A way that raises has a reason, and the others go on."""
    builders = OURS | {name: PEERS[name] for name in peers}
    rows = {name: case(shape, dtype, variant) | {"way": name} for name in builders}
    ways: dict[str, Callable[[], Any]] = {}
    query_rows = torch.linspace(0, shape.Nq - 1, min(shape.Nq, CHECKED_ROWS), device=device).long()
    try:
        inputs = make_inputs(shape, harness.DTYPES[dtype], variant, device)
        reference = expected(inputs, query_rows)
    except Exception as error:  # out of memory
        harness.check_device(device, error)
        return [row | {"status": "refused", "reason": reason(error, [])} for row in rows.values()]
    for name, build in builders.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                way = build(inputs)
                rows[name] |= check(way, reference, query_rows, dtype)
            except Exception as error:  # whatever a library raises, out of memory included
                harness.check_device(device, error)
                rows[name] |= {"status": "refused", "reason": reason(error, said)}
                continue
        if rows[name]["status"] == "ok":
            ways[name] = way
    failed: dict[str, Exception] = {}
    times = harness.interleaved(ways, rounds, device, failed=failed)
    clock = harness.clocks().get("sm_clock_mhz")
    operations = 4 * shape.B * shape.H * shape.Nq * shape.Nk * shape.D * (0.5 if variant == "causal" else 1)
    for name, taken in times.items():
        low, middle, high = harness.quartiles(taken)
        rows[name] |= {"ms": middle, "ms_low": low, "ms_high": high, "tflops": operations / middle / 1e9}
        rows[name] |= {"time_to_sdpa": harness.ratio(taken, times["sdpa"])} if "sdpa" in times else {}
        rows[name] |= {"sm_clock_mhz": clock} if clock else {}
        try:
            rows[name]["peak_mib"] = harness.peak_memory(ways[name], device)
        except Exception as error:  # the time stands
            harness.check_device(device, error)
            rows[name]["peak_reason"] = reason(error, [])
    for name, error in failed.items():
        rows[name] |= {"status": "failed", "reason": reason(error, [])}
    return list(rows.values())


def case(shape: Shape, dtype: str, variant: str) -> dict[str, Any]:
    """What the rows of one case have in common."""
    return shape._asdict() | {"dtype": dtype, "variant": variant}


def estimate(cases: list[tuple[Shape, list[str], str, str]], ways: list[str], rounds: int) -> float:
    """Minutes that a run takes on a GPU of ASSUMED_TFLOPS, from the operations and the seconds to compile and check."""
    seconds = 0.0
    for shape, _, dtype, _ in cases:
        operations = 4 * shape.B * shape.H * shape.Nq * shape.Nk * shape.D
        one = operations / (ASSUMED_TFLOPS[dtype] * 1e12) + LAUNCH_AND_FLUSH
        seconds += sum(SETUP.get(way, 1.0) + 10 * (rounds + 1) * one * SLOWER.get(way, 1.0) for way in ways)
    return seconds / 60


def tables(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s by shape and way, and ratio to SDPA's time, for each dtype and variant; then the refused cases."""
    parts = []
    for dtype, variant in dict.fromkeys((row["dtype"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["dtype"], row["variant"]) == (dtype, variant)]
        ways = list(dict.fromkeys(row["way"] for row in chosen))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for row in chosen:
            shape = "x".join(str(row[axis]) for axis in ("B", "H", "Nq", "Nk", "D"))
            timed = row["status"] == "ok"
            ratio = f" ({row['time_to_sdpa']:.2f})" if "time_to_sdpa" in row else ""
            text = f"{row['tflops']:.3g}{ratio}" if timed else row["status"]
            cells.setdefault((row["kind"], shape, ", ".join(row["layers"])), {})[row["way"]] = text
        lines = [[*head, *(by_way[way] for way in ways)] for head, by_way in cells.items()]
        parts += [f"## {variant}, {dtype}", "TFLOP/s (time as a multiple of SDPA's)"]
        parts.append(results.markdown(["attention", "B x H x Nq x Nk x D", "layers", *ways], lines))
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            told = failed.setdefault(f"{row['way']}: {row.get('reason', 'wrong result')}", [])
            told.append(f"{row['variant']} {row['dtype']}")
    if failed:
        reasons = [f"- {why} ({len(cases)} cases: {', '.join(dict.fromkeys(cases))})" for why, cases in failed.items()]
        parts += ["## Not timed", "\n".join(reasons)]
    return "\n\n".join(parts)


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> list[Path]:
    """A picture for each dtype and variant: TFLOP/s over the number of tokens, a panel for each kind of layer."""
    plt = harness.pyplot()
    pictures = []
    for dtype, variant in dict.fromkeys((row["dtype"], row["variant"]) for row in rows):
        timed = [r for r in rows if (r["dtype"], r["variant"]) == (dtype, variant) and r["status"] == "ok"]
        panels: dict[tuple, list[dict[str, Any]]] = {}
        for row in timed:
            panels.setdefault((row["kind"], row["H"], row["D"]), []).append(row)
        columns = min(4, max(1, len(panels)))
        lines = max(1, -(-len(panels) // columns))
        figure, grid = plt.subplots(
            lines, columns, figsize=(4.2 * columns + 0.4, 3.1 * lines + 1.3), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, ((kind, H, D), chosen) in zip(grid.flat, panels.items(), strict=False):
            models = dict.fromkeys(layer.split()[0] for row in chosen for layer in row["layers"])
            of = "" if kind == "square" else f" ({', '.join(models)})"
            axes.set_title(f"{kind}{of}, H = {H}, D = {D}", fontsize=10)
            draw_panel(axes, chosen)
        figure.supylabel("TFLOP/s")
        lines_of = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        known = [way for way in STYLES if way in lines_of]
        figure.legend([lines_of[way] for way in known], known, loc="outside lower center", ncols=max(3, 2 * columns))
        figure.suptitle(f"{variant}, {dtype}\n{harness.describe(machine)}", fontsize=9)
        pictures.append(path.with_name(f"{path.stem}-{variant}-{dtype}.png"))
        figure.savefig(pictures[-1], dpi=110)
        plt.close(figure)
    return pictures


def draw_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    for way, (colour, marker) in STYLES.items():
        points = sorted((row["Nq"], row["tflops"]) for row in rows if row["way"] == way)
        if points:
            width = 2.2 if way in OURS else 1.2
            axes.plot(*zip(*points, strict=True), marker, color=colour, lw=width, ms=4.5, ls="-", label=way)
    harness.token_axis(axes, [row["Nq"] for row in rows])
    axes.set_xlabel("query tokens", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def report(path: Path) -> None:
    """Write the table and the pictures of a saved run to files beside it."""
    machine, rows = results.load(path)
    pictures = draw(rows, machine, path)
    written = [path, results.write_tables(path, machine, tables(rows)), *pictures]
    print("wrote " + ", ".join(str(p) for p in written), file=sys.stderr)


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or 0 in (size := (int(match[1]), int(match[2]))):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is WIDTHxHEIGHT in pixels")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, help="square: N queries by N keys")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="WIDTHxHEIGHT", help="of images, in pixels")
    parser.add_argument("--lengths", nargs="+", type=int, help="N of square; B is the longest over N")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="default: float16, float32 on a CPU")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="SDPA always runs; default: all that are installed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes, to try the script")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one size, two lengths, two rounds")
    extent.add_argument("--full", action="store_true", help="all models, variants, sizes and lengths: hours on a GPU")
    results.add_run_options(parser, "throughput")
    arguments = parser.parse_args()
    if arguments.picture_from:
        return report(arguments.picture_from)
    device = arguments.device
    if device == "cuda":
        harness.need_gpu("throughput.py", "try the script with tiny shapes by `--device cpu`")
    sizes = (
        arguments.sizes or [parse_size(text) for text in SIZES[device]][: None if arguments.full else SHORT["sizes"]]
    )
    kept = None if arguments.full else 2 if arguments.quick else SHORT["lengths"]
    lengths = arguments.lengths or LENGTHS[device][:kept]
    models = arguments.models or (MODELS if arguments.full else SHORT["models"])
    variants = arguments.variants or (VARIANTS if arguments.full else SHORT["variants"])
    rounds = 2 if arguments.quick else arguments.rounds
    missing = [name for name, package in DISTRIBUTIONS.items() if harness.version(package) is None]
    peers = arguments.peers or [p for p in (PEERS if device == "cuda" else CPU_PEERS) if p not in missing]
    peers = list(dict.fromkeys(["sdpa", *peers]))
    cases = [
        (shape, layers, dtype, variant)
        for dtype in arguments.dtypes or ["float16" if device == "cuda" else "float32"]
        for variant in variants
        for shape, layers in shapes(models, sizes, lengths).items()
        if variant != "causal" or shape.Nq == shape.Nk
    ]
    about = {name: harness.version(package) for name, package in DISTRIBUTIONS.items()}
    try:
        record = results.Record(arguments.out, device, arguments.resume, **about)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    left = [each for each in cases if not record.has(**case(each[0], each[2], each[3]))]
    if device == "cuda":
        minutes = estimate(left, [*OURS, *peers], rounds)
        print(f"{len(left)} cases, about {minutes:.0f} minutes (an estimate that nobody has measured)", file=sys.stderr)
    with record:
        for shape, layers, dtype, variant in (progress := tqdm(left, file=sys.stderr)):
            progress.set_description(f"{variant} {dtype} {layers[0]}")
            try:
                rows = measure(shape, dtype, variant, peers, rounds, device)
            except harness.DeviceLostError as error:
                lost = {"layers": layers, "status": "lost", "reason": str(error)}
                record.add(*(case(shape, dtype, variant) | lost | {"way": way} for way in [*OURS, *peers]))
                sys.exit(
                    f"the device stopped working in {variant} {dtype} {layers[0]}: {error}. {len(record.rows)} rows "
                    f"are in {record.path}; the same command with --resume goes on with the next case"
                )
            record.add(*(row | {"layers": layers} for row in rows))
            record.machine |= harness.clocks()  # those of a busy device
    report(arguments.out)


if __name__ == "__main__":
    main()
