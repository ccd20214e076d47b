"""How well a trained glyph pipeline draws at its trained size and at others, with the original scale and with λ.

Writes evaluation.json beside the weights: at the trained size, the entropy and the logits' variance of every layer
(Eq. 5 of Jin et al., NeurIPS 2023, has entropy = ln N - variance / 2) and a control with constant multipliers of the
scale; at all sizes the Frechet distance (of our own recogniser's features, not Inception's), the share of digits that
are recognised, and the mean entropy. Seeds are the images' numbers: the same for every way.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is imported

import torch
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import harness
from metrics import bootstrap, frechet_distance

from entropy_attn.diffusers import EntropyRecord, calibration_from, enable
from glyphs import data, recogniser
from glyphs.pipeline import GlyphPipeline

SIZES = ((16, 16), (20, 20), (24, 24), (28, 28), (32, 32), (24, 16), (36, 24))  # height, width
MULTIPLIERS = (0.8, 0.9, 1.0, 1.1, 1.25)
WAYS = ("original", "λ", "calibrated")
BATCH = 50
RECORDED = 20  # images for the entropy, two of each digit
REFERENCES = 4000


def draw(pipe: GlyphPipeline, size: tuple[int, int], count: int, first: int = 0) -> torch.Tensor:
    """Images number `first` to `first + count` of a size, (count, 1, H, W): digits in turn, the number is the seed."""
    images = []
    for start in range(first, first + count, BATCH):
        numbers = range(start, min(start + BATCH, first + count))
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        labels = digits(start, len(numbers)).tolist()
        images.append(pipe(labels, height=size[0], width=size[1], generator=generators, output_type="pt").images)
    return torch.cat(images)


def digits(first: int, count: int) -> torch.Tensor:
    """What the images number `first` and on show, (count,)."""
    return torch.arange(first, first + count) % len(data.CLASSES)


def settings(way: str, calibration: Any) -> dict[str, Any] | None:
    """What `enable` is given for a way; None leaves the pipeline as it is."""
    return {"original": None, "λ": {}, "calibrated": {"calibration": calibration}}[way]


def entropies(pipe: GlyphPipeline, size: tuple[int, int], options: dict[str, Any] | None) -> EntropyRecord:
    """The entropies of one run of RECORDED images."""
    record = EntropyRecord()
    with enable(pipe, record_entropy=record, **({"exponent": 0} if options is None else options)):
        draw(pipe, size, RECORDED)
    return record


def mean_entropies(record: EntropyRecord) -> dict[str, list]:
    """The numbers of tokens that layers have, most first, and the mean entropy of the layers with each."""
    levels = defaultdict(list)
    for row in record.table(by=("layer",)):
        levels[row["tokens"]].append(row["entropy"])
    tokens = sorted(levels, reverse=True)
    return {"tokens": tokens, "entropy": [sum(levels[N]) / len(levels[N]) for N in tokens]}


def logit_variances(pipe: GlyphPipeline) -> dict[str, float]:
    """The variance of q . k / sqrt(d) over the keys, its mean over queries, heads, images and steps, of every layer.

    At the trained size; the layers are named as in the records of entropy.
    """
    kept: dict[tuple[str, str], torch.Tensor] = {}
    sums: dict[str, list[float]] = defaultdict(list)
    hooks = []

    def keep(name: str, what: str, heads: int):
        def hook(module, inputs, output):
            kept[name, what] = output.unflatten(-1, (heads, -1)).transpose(1, 2)
            if len(kept) == 2:
                query, key = kept.pop((name, "to_q")), kept.pop((name, "to_k"))
                logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
                sums[name].append(logits.var(-1).mean().item())

        return hook

    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            for what in ("to_q", "to_k"):
                layer = getattr(module, what)
                hooks.append(layer.register_forward_hook(keep(f"unet.{name}", what, module.heads)))
    try:
        draw(pipe, (pipe.train_size, pipe.train_size), RECORDED)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(values) / len(values) for name, values in sums.items()}


def layer_rows(pipe: GlyphPipeline, record: EntropyRecord) -> list[dict[str, Any]]:
    """Entropy at the trained size of every layer, in nats, its distance from ln T, and half the logits' variance."""
    variances = logit_variances(pipe)
    return [
        {
            "kind": "layer", "layer": row["layer"], "tokens": row["tokens"], "entropy": row["entropy"],
            "deficit": math.log(row["tokens"]) - row["entropy"], "half_variance": variances[row["layer"]] / 2,
        }
        for row in record.table(by=("layer",))
    ]  # fmt: skip


class Judge:
    """Scores images against digits rendered at their size."""

    def __init__(self) -> None:
        self.recogniser = recogniser.load()
        self.references: dict[tuple[int, int], torch.Tensor] = {}

    def reference(self, size: tuple[int, int]) -> torch.Tensor:
        if size not in self.references:
            images = data.render(digits(0, REFERENCES), *size, torch.Generator().manual_seed(2**31))
            self.references[size] = self.read(images)[0]
        return self.references[size]

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, F) and the digits that are seen (n,)."""
        return recogniser.recognise(self.recogniser, images)

    def score(self, images: torch.Tensor) -> dict[str, Any]:
        """Frechet distance and recognition rate in per cent, with 95 % intervals over the images."""
        reference = self.reference(tuple(images.shape[-2:]))
        features, read = self.read(images)
        right = (read == digits(0, len(images))).float() * 100
        distance = frechet_distance(features, reference)
        return {
            "images": len(images), "frechet": distance, "recognised": right.mean().item(),
            "frechet_interval": bootstrap(
                lambda i: frechet_distance(features[i], reference), len(images), 100, biased=True
            ),
            "recognised_interval": bootstrap(lambda i: right[i].mean().item(), len(images)),
        }  # fmt: skip


def evaluate(pipe: GlyphPipeline, count: int, record: harness.Record) -> None:
    """Add all rows to the record."""
    trained = (pipe.train_size, pipe.train_size)
    judge = Judge()
    at_trained = entropies(pipe, trained, None)
    calibration = calibration_from(pipe, at_trained)
    record.add(*layer_rows(pipe, at_trained))
    cells = [("control", trained, f"m = {m:g}", {"overrides": {"*": m}}) for m in MULTIPLIERS]
    sizes = [size for size in SIZES if size[0] % pipe.multiple == size[1] % pipe.multiple == 0]
    cells += [("size", size, way, settings(way, calibration)) for size in sizes for way in WAYS if size != trained]
    for kind, size, way, options in tqdm(cells, desc="cells"):
        if options is None:
            images = draw(pipe, size, count)
        else:
            with enable(pipe, **options):
                images = draw(pipe, size, count)
        row = {"kind": kind, "height": size[0], "width": size[1], "way": way, **judge.score(images)}
        row |= mean_entropies(entropies(pipe, size, options))
        record.add(row)


def tables(rows: list[dict[str, Any]]) -> str:
    layers = [
        [row["layer"].removeprefix("unet."), str(row["tokens"])]
        + [f"{row[name]:.2f}" for name in ("entropy", "deficit", "half_variance")]
        for row in rows if row["kind"] == "layer"
    ]  # fmt: skip
    cells = [
        [f"{row['height']} x {row['width']}", ", ".join(map(str, row["tokens"])), row["way"],
         f"{row['frechet']:.2f} ({row['frechet_interval'][0]:.2f} to {row['frechet_interval'][1]:.2f})",
         f"{row['recognised']:.1f} ({row['recognised_interval'][0]:.1f} to {row['recognised_interval'][1]:.1f})",
         ", ".join(f"{entropy:.3f}" for entropy in row["entropy"])]
        for row in rows if row["kind"] != "layer"
    ]  # fmt: skip
    return "\n\n".join([
        harness.markdown(["self-attention", "T", "entropy (nats)", "ln T - entropy", "σ² / 2"], layers),
        harness.markdown(["size", "N", "scale", "Frechet distance", "recognised (%)", "mean entropy (nats)"], cells),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a pipeline, as train.py writes it")
    parser.add_argument("--count", type=int, default=500, help="images of each size and way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = GlyphPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    out = arguments.model / "evaluation.json"
    with harness.Record(out, "cpu", count=arguments.count) as record:
        evaluate(pipe, arguments.count, record)
    harness.write_tables(out, record.machine, tables(record.rows))


if __name__ == "__main__":
    main()
