"""Times candidate tiles on your GPU, and writes the best to the file that the variable ENTROPY_ATTN_TILES names.

The present tile of a head dim is the file's, if there is one already, or the table's. The candidates have half, equal
or double its block_m, block_n and num_warps, and up to one stage more or less. Candidates that cannot fit are left out.
Candidates that do not compile, or whose result differs from float64, are dropped. The others are timed one after the
other in each round, at each number of tokens, with and without entropy. A candidate's score is the median of its ratios
to the present tile's time in the same rounds. The present tile stays unless the best is more than 2 % faster. The file
is rewritten after every head dim, the log after every candidate.

An entry serves all head dims that the kernel pads to the same width. The file also gets entries for smaller head dims,
with the tiles that they use at present: otherwise they would use the next larger entry.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import results
import torch
from candidates import candidates, compile_obstacle, label, read, store
from tqdm import tqdm

from entropy_attn import attention
from entropy_attn.backends import triton
from entropy_attn.kernels import tiles
from entropy_attn.kernels.tiles import Tile

Timer = Callable[[dict[str, Callable[[], Any]], int, str], dict[str, list[float]]]
ENOUGH = 0.98  # a new tile must take less than this share of the present tile's time
HEAD_DIMS = [40, 64, 80, 128, 160]
CHECKED_TOKENS = 333  # not a multiple of a block: whole blocks and an edge block


def run(tile: Tile, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, entropy: bool) -> Any:
    """Output, entropy or None, and None, of a launch of the kernel with this tile."""
    scale = query.shape[3] ** -0.5
    return triton.forward(query, key, value, None, scale, False, entropy, False, tile=tile)


def random_inputs(dtype: str, batch: int, heads: int, tokens: int, head_dim: int, device: str) -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, tokens, head_dim)
    return [torch.randn(shape, generator=generator, device=device).to(harness.DTYPES[dtype]) for _ in range(3)]


def wrong(tile: Tile, dtype: str, head_dim: int, device: str) -> str | None:
    """What is wrong with a tile: the exception of its launch, or its error against float64; None if it is right."""
    query, key, value = random_inputs(dtype, 1, 2, CHECKED_TOKENS, head_dim, device)
    expected: Any = attention(query, key, value, return_entropy=True, backend="reference")
    try:
        result = run(tile, query, key, value, entropy=True)
        plain = run(tile, query, key, value, entropy=False)
    except Exception as error:  # whatever the compiler or the driver raises, out of resources included
        harness.check_device(device, error)
        return harness.first_line(error)
    given = {"output": result[0], "entropy": result[1], "output without entropy": plain[0]}
    right = {"output": expected.out, "entropy": expected.entropy, "output without entropy": expected.out}
    output_allowed = 32 * torch.finfo(query.dtype).eps * float(expected.out.abs().max())
    for name, tensor in given.items():
        error = float((tensor.double() - right[name]).abs().max())
        allowed = 1e-3 if name == "entropy" else output_allowed
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.3g}, allowed is {allowed:.3g}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes at which tiles are timed, and the number of rounds."""

    tokens: list[int]
    entropies: tuple[bool, ...] = (False, True)
    batch: int = 2
    heads: int = 16
    rounds: int = 5
    device: str = "cuda"
    timer: Timer = harness.interleaved


def tune(dtype: str, head_dim: int, tried: list[Tile], plan: Plan, add: Callable[..., None]) -> Tile:
    """The best of the tiles; the first is the present one. `add` is called with a row for each tile."""
    row = {"dtype": dtype, "head_dim": head_dim}
    right = {}
    for tile in tqdm(tried, desc=f"{dtype}, D = {head_dim}: checking", leave=False, file=sys.stderr):
        if reason := wrong(tile, dtype, head_dim, plan.device):
            add(row | {"tile": dataclasses.asdict(tile), "dropped": reason})
        else:
            right[label(tile)] = tile
    current = label(tried[0])
    if current not in right:
        raise RuntimeError(f"the present tile for {dtype} and head dim {head_dim} does not run: {label(tried[0])}")
    ratios: dict[str, list[float]] = {name: [] for name in right}
    for tokens, entropy in itertools.product(plan.tokens, plan.entropies):
        query, key, value = random_inputs(dtype, plan.batch, plan.heads, tokens, head_dim, plan.device)
        ways: dict[str, Callable[[], Any]] = {
            name: functools.partial(run, tile, query, key, value, entropy) for name, tile in right.items()
        }
        times = plan.timer(ways, plan.rounds, plan.device)
        for name, taken in times.items():
            ratios[name].append(harness.ratio(taken, times[current]))
            sizes = {"tokens": tokens, "entropy": entropy, "tile": dataclasses.asdict(right[name])}
            add(row | sizes | {"ms": statistics.median(taken), "ratio": ratios[name][-1]})
    scores = {name: statistics.median(mine) for name, mine in ratios.items()}
    best = min(scores, key=scores.__getitem__)
    chosen = best if scores[best] < ENOUGH else current
    for name, score in scores.items():
        add(row | {"tile": dataclasses.asdict(right[name]), "score": score, "chosen": name == chosen})
    return right[chosen]


def architecture_of(machine: dict[str, Any]) -> str:
    """The name of the machine's GPU architecture in the file of tiles."""
    if "compute_capability" in machine:
        return "sm_" + machine["compute_capability"].replace(".", "")
    return machine["architecture"].split(":")[0]


def tune_all(dtypes: list[str], head_dims: list[int], plan: Plan, record: results.Record, out: Path) -> None:
    """Tune, and rewrite the file after every head dim."""
    architecture = architecture_of(record.machine)
    for dtype, head_dim in tqdm(list(itertools.product(dtypes, sorted(head_dims))), desc="tuning", file=sys.stderr):
        tried = [tile for tile, reason in candidates(architecture, dtype, head_dim).items() if reason is None]
        chosen = tune(dtype, head_dim, tried, plan, record.add)
        store(out, architecture, dtype, head_dim, chosen)
        tqdm.write(f"{dtype}, D = {head_dim}: {label(tried[0])} -> {label(chosen)}", file=sys.stderr)


def dry_run(architecture: str, dtypes: list[str], head_dims: list[int], compiled: bool) -> None:
    for dtype, head_dim in itertools.product(dtypes, head_dims):
        reasons = candidates(architecture, dtype, head_dim)
        if compiled:
            for tile in tqdm(reasons, desc=f"{dtype}, D = {head_dim}: compiling", leave=False, file=sys.stderr):
                reasons[tile] = reasons[tile] or compile_obstacle(architecture, dtype, head_dim, tile)
        fit = sum(reason is None for reason in reasons.values())
        print(f"{architecture}, {dtype}, D = {head_dim}: {fit} of {len(reasons)} candidates fit")
        for tile, reason in reasons.items():
            print(f"    {label(tile):48} {reason or ''}".rstrip())


def draw(machine: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """The ratio of every candidate's time to the present tile's, for each dtype and head dim."""
    plt = harness.pyplot()
    scored = [row for row in rows if "score" in row]
    if not scored:
        sys.exit("no candidate was timed: nothing to draw")
    dtypes = list(dict.fromkeys(row["dtype"] for row in scored))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(10, 1 + 4 * len(dtypes)), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        mine = [row for row in scored if row["dtype"] == dtype]
        head_dims = sorted({row["head_dim"] for row in mine})
        axis.axhline(1, color="grey", linewidth=1)
        for row in mine:
            x = head_dims.index(row["head_dim"])
            look = {"color": "tab:red", "zorder": 3} if row["chosen"] else {"color": "tab:blue", "alpha": 0.35}
            axis.plot(x, row["score"], "o", **look)
            if row["chosen"]:
                tile = row["tile"]
                text = f"{tile['block_m']}x{tile['block_n']}\n{tile['num_warps']} warps\n{tile['num_stages']} stages"
                axis.annotate(text, (x, row["score"]), (9, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xticks(range(len(head_dims)), [str(d) for d in head_dims])
        axis.set_xlim(-0.5, len(head_dims) - 0.3)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.margins(y=0.12)
        axis.set(xlabel="head dim", ylabel="time / present tile's", title=dtype)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Candidate tiles (red: chosen)\n{harness.describe(machine)}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=tiles.DTYPES, default=["float16", "bfloat16"])
    parser.add_argument("--head-dims", nargs="+", type=int, choices=tiles.HEAD_DIMS, metavar="D", default=HEAD_DIMS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--entropy", choices=("on", "off", "both"), default="both")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/tiles.json"), help="the tiles (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=Path("build/tune.json"), help="all times (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("build/tune.png"), help="default: %(default)s")
    parser.add_argument("--picture-from", type=Path, metavar="JSON", help="time nothing: draw this log")
    parser.add_argument("--dry-run", action="store_true", help="list candidates and what rules them out; needs no GPU")
    parser.add_argument("--compile", action="store_true", help="with --dry-run: also compile them")
    parser.add_argument("--architecture", choices=list(tiles.TABLE), help="for --dry-run (default: sm_80)")
    arguments = parser.parse_args()
    for name in ("tokens", "batch", "heads", "rounds"):
        given = getattr(arguments, name)
        if min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name}: got {given}, allowed are numbers from 1")
    if (arguments.compile or arguments.architecture) and not arguments.dry_run:
        parser.error("--compile and --architecture go with --dry-run; otherwise the GPU decides")
    architecture = arguments.architecture or "sm_80"
    if arguments.picture_from:
        try:
            draw(*results.load(arguments.picture_from), arguments.picture)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--picture-from: {arguments.picture_from} is no log: {error}")
        return
    try:
        read(arguments.out)
        tiles.find_tile(architecture, "float16", 8)
    except ValueError as error:
        parser.error(f"--out: {error}")
    if arguments.dry_run:
        dry_run(architecture, arguments.dtypes, arguments.head_dims, arguments.compile)
        return
    harness.need_gpu("tune.py", "with --dry-run here")
    entropies = {"off": (False,), "on": (True,), "both": (False, True)}[arguments.entropy]
    plan = Plan(arguments.tokens, entropies, arguments.batch, arguments.heads, arguments.rounds)
    with results.Record(arguments.log) as record:
        tune_all(arguments.dtypes, arguments.head_dims, plan, record, arguments.out)
    draw(record.machine, record.rows, arguments.picture)
    print(f"wrote {arguments.out}, {arguments.log} and {arguments.picture}")
    print(f"to use the tiles: export ENTROPY_ATTN_TILES={arguments.out.absolute()}")


if __name__ == "__main__":
    main()
