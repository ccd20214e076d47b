"""What an A100 should make of the kernel, from its machine code: modelled TFLOP/s for the tiles of the table.

    python benchmarks/model/predict.py

compiles the kernel for sm_80, float16, finds its main loop and models it on an A100 SXM4 at 400 W. Beside every figure
stands the model's largest error over all kernels with published speeds (validate.py). Nothing here was measured. Long
sequences are meant: launch, prologue, epilogue, edge blocks and the last wave are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where harness.py, sass.py and occupancy.py are

import harness
import results
import triton
from a100 import decode, pipes
from a100.estimate import SXM4_400_W, Code, estimate
from tqdm import tqdm

from entropy_attn.kernels import aot, tiles
from entropy_attn.kernels.config import configure
from entropy_attn.kernels.tiles import Tile

HERE = Path(__file__).parent
HEAD_DIMS = (40, 64, 80, 96, 128, 160)
PACKED = "packed, λ by length"  # the kernel of attention_varlen with train_tokens
CALLS: dict[str, dict[str, Any]] = {
    "plain": {}, "key padding": {"mask": "boolean"}, "causal": {"is_causal": True},
    "scale per query": {"scale": "per_query"}, "λ by num_tokens": {"scale": "num_tokens"}, PACKED: {"scale": "lengths"},
}  # fmt: skip
STATUS = "modelled"


class Case(NamedTuple):
    head_dim: int
    call: str
    entropy: bool
    dtype: str = "float16"
    tile: Tile | None = None  # the table's


def compiled(case: Case) -> tuple[Code, float, Tile]:
    """The kernel of a case, the useful operations of one of its passes, and its tile."""
    config = configure("sm_80", case.dtype, case.head_dim, entropy=case.entropy, tile=case.tile, **CALLS[case.call])
    kernel = aot.compile_config("sm_80", case.dtype, config, packed=case.call == PACKED)
    used = aot.resources(kernel)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        loop = decode.main_loop(decode.disassemble(path))
    code = Code(tuple(loop), config.tile.num_warps, used.registers, used.shared)
    return code, 4.0 * config.tile.block_m * config.tile.block_n * case.head_dim, config.tile


def predict(case: Case, runs: int) -> dict[str, Any]:
    """A row of the results."""
    code, flops, tile = compiled(case)
    found = estimate(code, flops, SXM4_400_W, runs)
    return {
        "head_dim": case.head_dim, "call": case.call, "entropy": case.entropy, "dtype": case.dtype,
        "tile": dataclasses.asdict(tile), "status": STATUS, "tflops": round(found.speed, 1),
        "tflops_at_boost_clock": round(found.cycles, 1), "standard_error": round(found.error, 4),
        "clock": round(found.clock, 3), "bound_tflops": round(found.bound, 1), "bound_by": found.bound_by,
        "registers": code.registers, "programs_per_multiprocessor": code.programs,
        "loop_instructions": len(code.loop),
        "loop_matrix": sum(i.base == "HMMA" for i in code.loop),
        "loop_copies": sum(i.base == "LDGSTS" for i in code.loop),
        "others_per_matrix": round(pipes.others_per_matrix(code.loop), 2),
    }  # fmt: skip


def known_error(path: Path) -> float:
    """The largest error over all anchors, from a file that validate.py wrote."""
    return json.loads(path.read_text())["errors"]["all"]["largest"]


def table(rows: list[dict[str, Any]], error: float) -> str:
    header = ["D", "call", "entropy", "tile", "modelled TFLOP/s", "entropy costs", "call costs", "at boost clock",
              "clock", "bound", "others per HMMA", "programs"]  # fmt: skip
    speeds = {(r["head_dim"], r["call"], r["entropy"]): r["tflops"] for r in rows}
    lines = []
    for r in rows:
        tile = "{block_m}x{block_n}, {num_warps} warps, {num_stages} stages".format(**r["tile"])
        without = speeds.get((r["head_dim"], r["call"], False)) if r["entropy"] else None
        plain = speeds.get((r["head_dim"], "plain", r["entropy"])) if r["call"] != "plain" else None
        costs = [f"{100 * (base / r['tflops'] - 1):+.0f} %" if base else "" for base in (without, plain)]
        lines.append([str(r["head_dim"]), r["call"], "yes" if r["entropy"] else "no", tile,
                      f"{r['tflops']:.0f} ± {100 * error:.0f} %", *costs,
                      f"{r['tflops_at_boost_clock']:.0f} ± {100 * r['standard_error']:.1f} %", f"{r['clock']:.2f}",
                      f"{r['bound_tflops']:.0f} ({r['bound_by']})", f"{r['others_per_matrix']:.1f}",
                      str(r["programs_per_multiprocessor"])])  # fmt: skip
    return results.markdown(header, lines)


def draw(rows: list[dict[str, Any]], error: float, title: str, path: Path) -> None:
    """Bars for each head dim of the first kind of call, with the model's error; outlines at the boost clock."""
    plt = harness.pyplot()
    rows = [r for r in rows if r["call"] == rows[0]["call"]]
    head_dims = sorted({r["head_dim"] for r in rows})
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for entropy, shift, colour, label in ((False, -0.2, "C0", "without entropy"), (True, 0.2, "C1", "with entropy")):
        chosen = [r for r in rows if r["entropy"] == entropy]
        if not chosen:
            continue
        x = [head_dims.index(r["head_dim"]) + shift for r in chosen]
        y = [r["tflops"] for r in chosen]
        boost = [r["tflops_at_boost_clock"] for r in chosen]
        axis.bar(x, y, 0.36, color=colour, label=label, yerr=[error * v for v in y], capsize=3, ecolor="0.3")
        axis.bar(x, boost, 0.36, fill=False, edgecolor=colour, linestyle="--", label=f"{label}, at boost clock")
        for position, value in zip(x, y, strict=True):
            axis.text(position, value / 2, f"{value:.0f}", ha="center", va="center", color="white", fontsize=8)
    axis.set_xticks(range(len(head_dims)), [str(d) for d in head_dims])
    axis.set(xlabel="head dim", ylabel="TFLOP/s, modelled", title=title)
    axis.margins(y=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(machine: dict[str, Any], rows: list[dict[str, Any]], error: float) -> str:
    about = (
        f"Modelled, not measured: main loop on an A100 SXM4 at 400 W, float16, triton {machine['triton']}, "
        f"{machine['date'][:10]}. ± {100 * error:.0f} % is the largest error over the kernels with published speeds "
        "(validation.md). Differences under 5 % are ties: the compiler's choice of registers alone moves a figure that "
        "much."
    )
    return f"{about}\n\n{table(rows, error)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tiles.HEAD_DIMS, default=HEAD_DIMS, metavar="D")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--entropy", choices=("on", "off", "both"), default="both")
    parser.add_argument("--tile", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="another tile")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--runs", type=int, default=8, help="simulations of each loop (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/model.json"), help="default: %(default)s")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--picture", type=Path, default=Path("build/model.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.runs < 2 or arguments.jobs < 1:
        parser.error(f"got --runs {arguments.runs} --jobs {arguments.jobs}, allowed are runs from 2 and jobs from 1")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter stands in for the compiler; unset it")
    entropies = {"off": (False,), "on": (True,), "both": (False, True)}[arguments.entropy]
    tile = Tile(*arguments.tile) if arguments.tile else None
    chosen = [
        Case(head_dim, call, entropy, arguments.dtype, tile)
        for call, head_dim, entropy in itertools.product(arguments.calls, arguments.head_dims, entropies)
    ]
    error = known_error(HERE / "validation.json")
    pool = ProcessPoolExecutor(arguments.jobs, get_context("spawn"), harness.ignore_interrupts)
    with results.Record(arguments.out, error=error) as record, pool:
        rows = pool.map(predict, chosen, itertools.repeat(arguments.runs))
        for row in tqdm(rows, total=len(chosen), desc="modelling", file=sys.stderr):
            record.add(row)
    text = report(record.machine, record.rows, error)
    print(text)
    if arguments.markdown:
        results.write_whole(arguments.markdown, f"# {__doc__.splitlines()[0]}\n\n{text}")
    title = f"A100 SXM4, 400 W, {arguments.dtype}, {record.rows[0]['call']}; modelled ± {100 * error:.0f} %"
    draw(record.rows, error, title, arguments.picture)


if __name__ == "__main__":
    main()
