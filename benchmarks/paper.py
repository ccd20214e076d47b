"""The paper's tables and figures on a model: does λ help, where, and by how much.

    python benchmarks/paper.py --model glyphs
    python benchmarks/paper.py --model sd21 --references coco/ --num 2000 --device cuda

Every image is kept, so an interrupted run goes on where it was. Image number n comes from seed n with every scale. The
first half of the images chooses among the exponents, and all figures are of the second half. Intervals are of 95 %, by
bootstrap over the images; a change is paired, image by image, with the original scale.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is imported

import harness
import torch

try:
    from evaluation import figures, tables
    from evaluation.judges import GlyphJudge, ImageJudge, TextJudge
    from evaluation.run import Run, work
    from evaluation.subjects import GLYPHS, PROMPTS, Size, Subject, glyphs, text_to_image
except ImportError as error:
    print(f"{error.name} is missing: pip install 'entropy_attn[demo]'", file=sys.stderr)
    sys.exit(2)

WHAT = ("quality", "control", "cost", "multidiffusion", "entropy")


def wanted(subject: Subject, what: list[str]) -> list[str]:
    """What is to be done. Raises ValueError for MultiDiffusion where the model has none, unless all was asked for."""
    if "all" not in what:
        if "multidiffusion" in what:
            subject.with_multidiffusion()
        return what
    try:
        subject.with_multidiffusion()
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
        return [each for each in WHAT if each != "multidiffusion"]
    return list(WHAT)


def parse_size(text: str) -> Size:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is WIDTHxHEIGHT") from None
    return width, height


def read_prompts(path: Path | None) -> list[str]:
    """One from each line that is not empty. Raises ValueError where there is none."""
    lines = list(PROMPTS) if path is None else [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} has no prompt in it")
    return lines


def open_run(arguments: argparse.Namespace) -> Run:
    """Raises ValueError for a model, references or sizes that cannot be."""
    judge: ImageJudge
    if arguments.model == "glyphs":
        subject, judge = glyphs(arguments.folder, arguments.steps), GlyphJudge()
    else:
        prompts = read_prompts(arguments.prompts)
        subject = text_to_image(
            arguments.model, prompts, arguments.steps or 50, arguments.guidance, arguments.device,
            harness.DTYPES[arguments.dtype],
        )  # fmt: skip
        judge = TextJudge(arguments.references, prompts)
    subject.check_sizes(arguments.sizes or subject.sizes)
    run = Run(subject, judge, arguments.num, arguments.batch, arguments.out / subject.name.replace("/", "-"))
    run.check_settings(
        **{name: getattr(arguments, name) for name in ("model", "steps", "guidance", "dtype")},
        prompts=None if arguments.prompts is None else arguments.prompts.read_text(),
    )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyphs", help="glyphs, sd21, sd15, ldm, or any path or hub id")
    parser.add_argument(
        "--what", nargs="+", choices=(*WHAT, "all"), default=["all"], help="all: what the model allows (default)"
    )
    parser.add_argument("--sizes", nargs="+", type=parse_size, help="WIDTHxHEIGHT (default: the model's)")
    parser.add_argument("--num", type=int, default=400, help="images of each size and scale (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's, or 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="of text-to-image models (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt in each line")
    parser.add_argument("--references", type=Path, help="a folder of images that FID compares with")
    parser.add_argument("--folder", type=Path, default=GLYPHS, help="of the glyph pipeline (default: our own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="default: %(default)s")
    arguments = parser.parse_args()
    for name, least in (("num", 40), ("batch", 1), ("steps", 1)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: PyTorch {torch.__version__} sees no GPU")
    try:
        run = open_run(arguments)
        out = run.out / "results.json"
        kept = harness.load(out)[1] if out.exists() else []
        with harness.Record(out, arguments.device, model=arguments.model, num=arguments.num) as record:
            work(run, arguments.sizes or list(run.subject.sizes), wanted(run.subject, arguments.what), record, kept)
        written = harness.write_tables(out, record.machine, tables.report(run.judge, run.subject, record.rows))
        figures.draw(record.rows, out.with_suffix(".png"), run.subject.train_size)
    except (ValueError, OSError) as error:
        print(f"paper.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {written} and {out.with_suffix('.png')}; the images stay in {run.out}")


if __name__ == "__main__":
    main()
