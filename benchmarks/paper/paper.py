"""The paper's tables and figures, measured on a model: at which sizes λ helps, and how much.

    python benchmarks/paper/paper.py --model glyphs
    python benchmarks/paper/paper.py --model terrain
    python benchmarks/paper/paper.py --model sd21 --references coco/ --num 2000 --device cuda

Every image is kept, so the same command continues an interrupted run. Image number n has seed n with every scale. The
first half of the images chooses the exponent; all results are from the second half. Intervals are 95 % bootstrap
intervals over the images. A change is paired: each image is compared with the one of the original scale and the same
seed. At the trained size, if it is among the sizes, multiples of the scale are the control. With rules beyond
the paper among --scales, the first half of the images also chooses the best of these scales. For an embedded pipeline
"fid" is the Frechet distance between features of its recogniser, and "clip" is the share of images that it reads right.
For terrain they are features of the heights, and the correlation of the asked with the read difficulty.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where harness.py is

import harness
import results
import torch

try:
    from evaluation import figures, rules, tables
    from evaluation.judges import CLIP, EmojiJudge, GlyphJudge, Judge, TextJudge
    from evaluation.rows import Rows
    from evaluation.run import MULTIDIFFUSION, WHAT, Run, work
    from evaluation.sources import read_prompts
    from evaluation.subjects import Size, Subject, emojis, glyphs, text_to_image
    from evaluation.terrain import TerrainJudge, terrain
except ImportError as error:
    print(f"{error.name} is missing: pip install 'entropy_attn[demo]'", file=sys.stderr)
    sys.exit(2)

TERRAIN = "terrain"
EMBEDDED = {"glyphs": (glyphs, GlyphJudge), "emojis": (emojis, EmojiJudge)}
TEXT_ONLY = ("prompts", "references", "clip", "inception", "train_size")
MEANINGLESS = {**dict.fromkeys(EMBEDDED, TEXT_ONLY), TERRAIN: (*TEXT_ONLY, "folder", "steps", "guidance")}  # options


def wanted(subject: Subject, what: list[str]) -> list[str]:
    """The kinds of results to measure. Raises ValueError if MultiDiffusion is named and the model has none."""
    chosen = list(WHAT) if "all" in what else what
    if MULTIDIFFUSION in chosen:
        try:
            subject.check_multidiffusion()
        except ValueError as error:
            if "all" not in what:
                raise
            print(f"left out: {error}", file=sys.stderr)
            chosen.remove(MULTIDIFFUSION)
    return chosen


def wanted_scales(subject: Subject, named: list[str]) -> list[str]:
    """The original scale and those that are named. Matching is left out where there is no step to follow."""
    chosen = [rule for rule in (*rules.RULES, *rules.BEYOND) if rule in (rules.ORIGINAL, *named)]
    if subject.one_step and rules.MATCHED in chosen:
        print(f"left out: {rules.MATCHED}, because {subject.name} has one step only", file=sys.stderr)
        chosen.remove(rules.MATCHED)
    return chosen


def parse_size(text: str) -> Size:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is WIDTHxHEIGHT") from None
    return width, height


def open_model(arguments: argparse.Namespace) -> tuple[Subject, Judge]:
    """The model and its judge. Raises ValueError if the model cannot be loaded or the prompts cannot be read."""
    device, dtype = arguments.device, harness.DTYPES[arguments.dtype]
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    if arguments.model in EMBEDDED:
        subject, judge = EMBEDDED[arguments.model]
        given = {"folder": arguments.folder, **options}  # None: the subject's and the pipeline's own defaults
        return subject(device=device, dtype=dtype, **{name: x for name, x in given.items() if x is not None}), judge()
    if arguments.model == TERRAIN:
        subject = terrain(device, dtype)
        return subject, TerrainJudge(subject, arguments.out / TERRAIN / "native", arguments.batch)
    for name, default in (("num_inference_steps", 50), ("guidance_scale", 7.5)):
        options[name] = default if options[name] is None else options[name]
    prompts = read_prompts(arguments.prompts)
    subject = text_to_image(arguments.model, prompts, device, dtype, arguments.train_size, **options)
    return subject, TextJudge(arguments.references, prompts, device, arguments.clip or CLIP, arguments.inception)


def open_run(arguments: argparse.Namespace) -> Run:
    """The run. Raises as `open_model`, and for sizes that the model cannot draw, or a folder of other settings."""
    subject, judge = open_model(arguments)
    subject.check_sizes(arguments.sizes or subject.sizes)
    name = Path(subject.name).resolve().name if Path(subject.name).is_dir() else subject.name.replace("/", "-")
    run = Run(subject, judge, arguments.num, arguments.batch, arguments.out / name, arguments.seed)
    run.check_settings(
        **{name: getattr(arguments, name) for name in ("model", "steps", "guidance", "dtype", "train_size")},
        prompts=getattr(judge, "prompts", None),
    )
    return run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = "glyphs, emojis, terrain, sd21, sd15, ldm, or any path or hub id"
    parser.add_argument("--model", default="glyphs", help=models)
    parser.add_argument(
        "--what", nargs="+", choices=(*WHAT, "all"), default=["all"], help="all: what the model allows (default)"
    )
    parser.add_argument(
        "--scales", nargs="+", choices=(*rules.RULES, *rules.BEYOND), default=rules.RULES,
        metavar="SCALE", help="scales to compare with the original, of which the first seven are the default, and with "
        f"all seven the exponent is chosen: {', '.join(map(repr, (*rules.RULES, *rules.BEYOND)))}",
    )  # fmt: skip
    parser.add_argument("--sizes", nargs="+", type=parse_size, help="WIDTHxHEIGHT (default: the model's)")
    parser.add_argument("--num", type=int, default=400, help="images of each size and scale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first image (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the embedded pipeline's own, or 50)")
    parser.add_argument("--guidance", type=float, help="default: the embedded pipeline's own, or 7.5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="folder of the embedded pipeline (default: the shipped one)")
    text = parser.add_argument_group("text-to-image models", "A dataset is written datasets:NAME:SPLIT:COLUMN.")
    text.add_argument("--prompts", help="a file with a prompt in each line, a folder of such, or a dataset")
    text.add_argument("--references", help="the images that FID compares with: a folder or a dataset")
    text.add_argument("--clip", help=f"path or hub id of the CLIP model (default: {CLIP})")
    text.add_argument("--inception", help="file of Inception's weights, where there is no network")
    text.add_argument("--train-size", type=parse_size, help="WIDTHxHEIGHT, where the model does not say it")
    arguments = parser.parse_args()
    for name, least in (("num", 40), ("batch", 1), ("steps", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: PyTorch {torch.__version__} sees no GPU")
    for name in MEANINGLESS.get(arguments.model, ("folder",)):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no meaning for --model {arguments.model}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        run = open_run(arguments)
        what = wanted(run.subject, arguments.what)
        about = {name: getattr(arguments, name) for name in ("model", "num", "seed", "references", "clip", "inception")}
        with Rows(run.out / "results.jsonl", arguments.device, **about) as rows:
            scales = wanted_scales(run.subject, arguments.scales)
            work(run, arguments.sizes or list(run.subject.sizes), what, scales, rows)
        written = results.write_tables(rows.path, rows.machine, tables.report(run.judge, run.subject, rows.rows))
        names = {kind: name for kind, (name, _) in tables.kinds_of(run.judge).items()}
        figures.draw(rows.rows, rows.path.with_suffix(".png"), run.subject.train_size, names)
    except torch.OutOfMemoryError as error:
        print(f"paper.py: out of memory, what was drawn is kept: lower --batch ({error})", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"paper.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {written} and {rows.path.with_suffix('.png')}; the images stay in {run.out}")


if __name__ == "__main__":
    main()
