"""The model against published speeds of an A100: PyTorch's and Triton's kernels, in benchmarks/model/validation.md.

    python benchmarks/model/validate.py            # about half a minute, needs no GPU and none of the libraries
    python benchmarks/model/validate.py --fit      # how the errors depend on the one fitted constant

The main loops of the kernels are in benchmarks/model/loops/, their figures and addresses in a100/anchors.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where harness.py, sass.py and occupancy.py are

import results
from a100 import anchors, estimate, loops
from a100.anchors import Checked
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "validation.json"
SHARES = [n / 100 for n in range(0, 21, 2)]
# Loops without a published figure for their build, for comparison: PyTorch does not compile with fast math.
WITHOUT_FIGURE = {"PyTorch 2.8's FlashAttention-2, D = 64": "torch_flash_attention_64",
                  "PyTorch 2.8's FlashAttention-2, D = 128": "torch_flash_attention_128"}  # fmt: skip


def table(checked: Sequence[Checked]) -> str:
    header = ["kernel", "published", "modelled", "error", "at boost clock", "clock", "fitted on", "source"]
    lines = []
    for c in checked:
        found = c.estimate
        span = sorted({f"{x * c.unit:.0f}" for x in c.anchor.published})
        published = f"{c.published:.0f}" if len(span) == 1 else f"{c.published:.0f} ({span[0]} to {span[-1]})"
        cycles = f"{found.cycles:.0f} ± {100 * found.error:.1f} %"
        lines.append([c.anchor.name, published, f"{found.speed:.0f}", f"{100 * c.error:+.1f} %", cycles,
                      f"{found.clock:.2f}", "yes" if c.anchor.fitted else "no", c.anchor.source])  # fmt: skip
    return results.markdown(header, lines)


def families(checked: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """Largest and mean error of each family, and of all."""
    groups = {"all": list(checked), "kept out of the fit": [c for c in checked if not c.anchor.fitted]}
    for c in checked:
        groups.setdefault(c.anchor.family, []).append(c)
    return {
        name: {"anchors": len(group), "largest": anchors.largest_error(group), "mean": anchors.mean_error(group)}
        for name, group in groups.items()
    }


def fit(runs: int) -> str:
    """Largest errors for other values of estimate.OTHER."""
    lines = []
    for share in tqdm(SHARES, desc="fitting"):
        estimate.OTHER = share
        checked = [anchors.check(anchor, runs) for anchor in anchors.ANCHORS]
        fitted = [c for c in checked if c.anchor.fitted]
        others = [c for c in checked if not c.anchor.fitted]
        errors = (anchors.largest_error(fitted), anchors.mean_error(fitted), anchors.largest_error(others))
        lines.append([f"{share:.2f}", *(f"{100 * error:.1f} %" for error in errors)])
    return results.markdown(["OTHER", "fitted anchors: largest error", "mean", "the others: largest error"], lines)


def without_figure(runs: int) -> str:
    lines = []
    for name, loop_name in WITHOUT_FIGURE.items():
        loop = loops.load(loop_name)
        found = estimate.estimate(loop.code, loop.flops, runs=runs)
        lines.append([name, f"{found.speed:.0f}", f"{found.cycles:.0f}", f"{found.clock:.2f}"])
    return results.markdown(["kernel", "modelled", "at boost clock", "clock"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8, help="simulations of each loop (default: %(default)s)")
    parser.add_argument("--fit", action="store_true", help="only print the errors for other values of OTHER")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the results go (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error(f"--runs: got {arguments.runs}, allowed are numbers from 2")
    if arguments.fit:
        print(fit(arguments.runs))
        return
    checked = [anchors.check(anchor, arguments.runs) for anchor in tqdm(anchors.ANCHORS, desc="anchors")]
    errors = families(checked)
    summary = results.markdown(
        ["", "anchors", "largest error", "mean error"],
        [
            [name, str(e["anchors"]), f"{100 * e['largest']:.1f} %", f"{100 * e['mean']:+.1f} %"]
            for name, e in errors.items()
        ],
    )  # fmt: skip
    text = "\n\n".join([
        "# Published and modelled speeds on an A100",
        "Written by `python benchmarks/model/validate.py`. TFLOP/s; the cards differ (README.md). An error above 0 "
        "means that the model is too fast.",
        table(checked), summary,
        "The same for kernels without a published figure for their build, on an A100 SXM4 at 400 W:",
        without_figure(arguments.runs),
    ])  # fmt: skip
    results.write_whole(arguments.folder / "validation.md", text + "\n")
    speeds = {c.anchor.name: round(c.estimate.speed, 2) for c in checked}
    summary_of_runs = {"runs": arguments.runs, "errors": errors, "modelled": speeds}
    results.write_whole(arguments.folder / RESULTS.name, json.dumps(summary_of_runs, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
