"""Registers, spills, occupancy and main-loop instructions of every tile, from the compiled kernel.

No GPU is needed: each kernel is compiled ahead of time, and its machine code is read. Nothing is timed. The counts say
which instructions a warp issues for a block of keys, not how long they take. Without --head-dims, sm_80 is reported at
more head dims than the other architectures.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import harness
import results
import sass
import triton
from occupancy import occupancy
from tqdm import tqdm

from entropy_attn.kernels import aot, tiles
from entropy_attn.kernels.config import configure

HEAD_DIMS = {"sm_80": (40, 64, 72, 80, 96, 128, 160, 256)}
MAIN_HEAD_DIMS = (40, 64, 80, 128, 160, 256)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "key padding": {"mask": "boolean"},
    "boolean": {"mask": "boolean", "mask_per_query": True},
    "floating": {"mask": "floating", "mask_per_query": True},
}
STATUS = "compiled, not timed"


class Case(NamedTuple):
    architecture: str
    dtype: str
    head_dim: int
    mask: str
    entropy: bool


def measure(case: Case) -> dict[str, Any]:
    """A row of the report."""
    config = configure(case.architecture, case.dtype, case.head_dim, entropy=case.entropy, **MASKS[case.mask])
    tile = config.tile
    row = {**case._asdict(), "status": STATUS, "tile": dataclasses.asdict(tile)}
    try:
        kernel = aot.compile_config(case.architecture, case.dtype, config)
        loop = sass.main_loop(sass.disassemble(kernel))
    except Exception as error:  # whatever the compiler raises; the other tiles are compiled all the same
        return row | {"status": "failed", "error": harness.first_line(error)}
    used = aot.resources(kernel)
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    programs = occupancy(case.architecture, used.registers, tile.num_warps, used.shared, columns)
    matrix = Counter(instruction.name.split(".")[0] for instruction in loop if instruction.group == "matrix")
    spilled = Counter(bool(re.match("STL|scratch_store", i.text)) for i in loop if i.group == "spill")
    return row | {
        "registers": used.registers, "spill_bytes": used.spills, "shared_bytes": used.shared,
        "shared_limit": aot.SHARED_MEMORY[case.architecture], "tensor_columns": columns,
        "programs_per_multiprocessor": programs, "warps_per_multiprocessor": programs * tile.num_warps,
        "loop_instructions": len(loop), "loop_spill_loads": spilled[False], "loop_spill_stores": spilled[True],
        "loop_matrix": dict(matrix), "warp_group_matrix": any(map(sass.WARP_GROUP_MATRIX.match, matrix)),
        "scores_per_thread": tile.block_m * tile.block_n / (tile.num_warps * kernel.metadata.target.warp_size),
        "loop": sass.mix(loop),
    }  # fmt: skip


def assembler_versions() -> dict[str, str]:
    """The assemblers that Triton brings along, by name."""
    found = {}
    for name in ("ptxas", "ptxas-blackwell"):
        if (sass.TOOLS / name).exists():
            text = subprocess.run([str(sass.TOOLS / name), "--version"], capture_output=True, text=True, check=True)
            version = re.search(r"V(\d[\d.]+)", text.stdout)
            found[name] = version[1] if version else "unknown"
    return found


def tile_text(tile: dict[str, Any]) -> str:
    return f"{tile['block_m']}x{tile['block_n']}, {tile['num_warps']} warps, {tile['num_stages']} stages"


def table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The report as Markdown. An empty cell of an instruction group is a zero."""
    groups = [group for group in sass.GROUPS if group not in ("matrix", "spill", "exponential")]
    header = ["architecture", "dtype", "D", "mask", "entropy", "tile", "registers", "stack (bytes)",
              "shared memory (KiB)", "programs (warps) a multiprocessor", "loop: instructions", "matrix",
              "spill loads + stores", "exponentials (a score)", *groups, "status"]  # fmt: skip
    lines = []
    for row in rows:
        cells = [row["architecture"], row["dtype"], row["head_dim"], row["mask"], "yes" if row["entropy"] else "no"]
        cells.append(tile_text(row["tile"]))
        if "error" in row:
            cells += [*[""] * (len(header) - len(cells) - 1), row["error"].replace("|", "/")]
        else:
            fits = f"{row['programs_per_multiprocessor']} ({row['warps_per_multiprocessor']})"
            matrix = " + ".join(f"{count} {name}" for name, count in row["loop_matrix"].items())
            spilled = f"{row['loop_spill_loads']} + {row['loop_spill_stores']}"
            cells += [row["registers"], row["spill_bytes"] or "", f"{row['shared_bytes'] / 1024:.1f}", fits]
            cells += [row["loop_instructions"], matrix, spilled if row["loop"]["spill"] else ""]
            exponentials = row["loop"]["exponential"]
            cells.append(f"{exponentials} ({exponentials / row['scores_per_thread']:.2f})")
            cells += [*(row["loop"][group] or "" for group in groups), row["status"]]
        lines.append([str(cell) for cell in cells])
    done = [row for row in rows if row["architecture"] == "sm_90" and "error" not in row]
    warp_groups = sum(row["warp_group_matrix"] for row in done)
    notes = ["Well above one exponential a score, warps repeat each other's rows, or layouts pad."]
    notes += [f"sm_90: warp-group matrix instructions in {warp_groups} of {len(done)} main loops."] if done else []
    tools = ", ".join(f"{name} {version}" for name, version in machine["assemblers"].items())
    notes.append(f"{machine['date'][:10]}, triton {machine['triton']}, {tools}. Compiled, not timed.")
    return "\n\n".join([results.markdown(header, lines), *notes]) + "\n"


def draw(machine: dict[str, Any], rows: list[dict[str, Any]], architecture: str, path: Path) -> None:
    """Bars of the main loop's instructions by group, for each dtype and head dim: left without entropy, right with it.

    Heights are relative to the loop without entropy. The numbers are instructions per score.
    """
    plt = harness.pyplot()
    rows = [r for r in rows if r["architecture"] == architecture and r["mask"] == rows[0]["mask"] and "error" not in r]
    if not rows:
        sys.exit(f"no compiled rows of {architecture} to draw")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 1 + 4 * len(dtypes)), squeeze=False, layout="constrained")
    colours = dict(zip(sass.GROUPS, plt.get_cmap("tab20").colors, strict=False))
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        head_dims = sorted({row["head_dim"] for row in chosen})
        for row in chosen:
            base = next(r for r in chosen if r["head_dim"] == row["head_dim"])  # without entropy, if there is one
            unit = row["scores_per_thread"] * base["loop_instructions"] / base["scores_per_thread"]
            x = head_dims.index(row["head_dim"]) + (0.21 if row["entropy"] else -0.21)
            bottom = 0.0
            for group, colour in colours.items():
                height = row["loop"][group] / unit
                axis.bar(x, height, 0.38, bottom=bottom, color=colour, edgecolor="white", linewidth=0.4)
                bottom += height
            number = f"{row['loop_instructions'] / row['scores_per_thread']:.1f}"
            axis.text(x, bottom, f"H\n{number}" if row["entropy"] else number, ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(head_dims)), [str(d) for d in head_dims])
        axis.set(xlabel="head dim", ylabel="relative to without entropy", title=f"{architecture}, {dtype}")
        axis.margins(y=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[group]) for group in reversed(sass.GROUPS)]
    figure.legend(handles, list(reversed(sass.GROUPS)), loc="outside right center", frameon=False)
    about = f"{STATUS} (triton {machine['triton']}, {machine['date'][:10]})"
    figure.suptitle(
        f"Instructions of the main loop; H: with entropy; numbers: instructions a score\n{about}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def cases(arguments: argparse.Namespace) -> list[Case]:
    entropies = {"off": (False,), "on": (True,), "both": (False, True)}[arguments.entropy]
    return [
        Case(*case)
        for architecture in arguments.architectures
        for case in itertools.product(
            (architecture,), arguments.dtypes,
            arguments.head_dims or HEAD_DIMS.get(architecture, MAIN_HEAD_DIMS), arguments.masks, entropies,
        )
    ]  # fmt: skip


def compile_all(chosen: list[Case], jobs: int, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with results.Record(out, assemblers=assembler_versions()) as record:
        rows: Iterator[dict[str, Any]] = map(measure, chosen)
        if jobs > 1:
            rows = ProcessPoolExecutor(jobs, get_context("spawn"), harness.ignore_interrupts).map(measure, chosen)
        for row in tqdm(rows, total=len(chosen), desc="compiling", file=sys.stderr):
            record.add(row)
    return record.machine, record.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # An architecture that the table does not have uses the tiles of another.
    parser.add_argument("--architectures", nargs="+", choices=aot.ARCHITECTURES, default=list(tiles.TABLE))
    parser.add_argument("--dtypes", nargs="+", choices=tiles.DTYPES, default=["float16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tiles.HEAD_DIMS, metavar="D")
    parser.add_argument("--entropy", choices=("on", "off", "both"), default="both")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["none"])
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/compile_report.json"), help="default: %(default)s")
    parser.add_argument("--markdown", type=Path, help="write the table here, and not to the terminal")
    parser.add_argument("--picture", type=Path, default=Path("build/compile_report.png"), help="default: %(default)s")
    parser.add_argument("--picture-architecture", choices=aot.ARCHITECTURES, help="default: sm_80 if it is there")
    parser.add_argument("--picture-from", type=Path, metavar="JSON", help="compile nothing: show what is in this file")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: got {arguments.jobs}, allowed are numbers from 1")
    if arguments.picture_from:
        try:
            machine, rows = results.load(arguments.picture_from)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--picture-from: {arguments.picture_from} is no report: {error}")
    else:
        if triton.knobs.runtime.interpret:
            parser.error("TRITON_INTERPRET is set: the interpreter stands in for the compiler; unset it")
        machine, rows = compile_all(cases(arguments), arguments.jobs, arguments.out)
    text = table(machine, rows)
    if arguments.markdown:
        arguments.markdown.write_text(
            f"# {__doc__.splitlines()[0]}\n\n{__doc__.split(chr(10), 2)[2].strip()}\n\n{text}"
        )
    else:
        print(text)
    known = [row["architecture"] for row in rows]
    draw(
        machine, rows, arguments.picture_architecture or ("sm_80" if "sm_80" in known else known[0]), arguments.picture
    )
    print(f"wrote {arguments.markdown or arguments.picture_from or arguments.out} and {arguments.picture}")


if __name__ == "__main__":
    main()
