"""Time of a denoising step with λ, and with λ and the entropy recorded, relative to a step without the adapter.

The models are UNets with random weights. They have the blocks and the tokens of Stable Diffusion, and the head dims of
released models: 40 (the first level of SD 1.5), 64 (SD 2.1, SDXL) and 80 (the second level of SD 1.5). They have fewer
channels than those models, so attention takes a larger part of a step, and the adapter's cost is a larger part too.
`--model` measures a real model. The ways run one after the other in each round. The report has medians of the times,
and of the ratios to the stock step of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import results
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tqdm import tqdm

import entropy_attn

WAYS: dict[str, dict | None] = {"stock": None, "λ": {}, "λ, entropy recorded": {"record_entropy": True}}
LEVELS = 4  # the last level has attention only in the middle block


def unet(head_dim: int, heads: int) -> UNet2DConditionModel:
    """A UNet with the blocks and tokens of Stable Diffusion, and the same channels and heads at every level."""
    torch.manual_seed(0)
    return UNet2DConditionModel(  # its attention_head_dim is the number of heads
        sample_size=64, cross_attention_dim=32, norm_num_groups=8, attention_head_dim=heads,
        block_out_channels=(heads * head_dim,) * LEVELS, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * (LEVELS - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (LEVELS - 1),
    ).eval()  # fmt: skip


def head_dims(model: UNet2DConditionModel) -> str:
    """The head dims of the model's self-attention layers, such as "40, 80, 160"."""
    modules = (module for name, module in model.named_modules() if name.endswith(".attn1"))
    return ", ".join(map(str, sorted({module.inner_dim // module.heads for module in modules})))


@torch.no_grad()
def seconds_a_step(model: UNet2DConditionModel, size: tuple[int, int], steps: int) -> float:
    """The median time of a step in a short run with classifier-free guidance; the first step is not counted."""
    parameter = next(model.parameters())
    options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    text = torch.randn(2, 77, model.config.cross_attention_dim, **options)
    sample = torch.randn(1, model.config.in_channels, size[0] // 8, size[1] // 8, **options)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps + 1)
    times = []
    for timestep in scheduler.timesteps:
        _finish(parameter)
        started = time.perf_counter()
        without, with_text = model(torch.cat([sample] * 2), timestep, encoder_hidden_states=text).sample.chunk(2)
        sample = scheduler.step(without + 7.5 * (with_text - without), timestep, sample).prev_sample
        _finish(parameter)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _finish(parameter: torch.Tensor) -> None:
    if parameter.is_cuda:
        torch.cuda.synchronize()


def measure(
    model: UNet2DConditionModel, size: tuple[int, int], steps: int, rounds: int, progress: tqdm
) -> list[dict[str, Any]]:
    """A row for each way."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(rounds + 1):
        for way, options in WAYS.items():
            with contextlib.nullcontext() if options is None else entropy_attn.enable(model, **options):
                taken = seconds_a_step(model, size, steps)
            progress.update()
            if round_ > 0:  # the first round warms up
                times[way].append(1e3 * taken)
    rows = []
    for way, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times["stock"], strict=True)]
        row = {"head_dim": head_dims(model), "way": way, "ms": statistics.median(mine)}
        rows.append(row | {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each head dim and way."""
    lines = [
        [
            row["head_dim"],
            row["way"],
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
        ]
        for row in rows
    ]
    return results.markdown(["head dim", "way", "ms a step", "of stock: median of the rounds (least to most)"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[40, 64, 80], help="default: 40 64 80")
    parser.add_argument("--heads", type=int, default=2, help="of every layer (default: %(default)s)")
    parser.add_argument("--model", help="a UNet2DConditionModel instead: folder or hub id")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"), help="default: 512 512"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/adapter.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    builders = (
        [lambda dim=dim: unet(dim, arguments.heads) for dim in arguments.head_dims]
        if arguments.model is None
        else [lambda: UNet2DConditionModel.from_pretrained(arguments.model)]
    )
    about = {"size": list(arguments.size), "rounds": arguments.rounds, "steps": arguments.steps}
    about |= {"heads": arguments.heads} if arguments.model is None else {"model": arguments.model}
    total = len(builders) * (arguments.rounds + 1) * len(WAYS)
    with results.Record(arguments.out, **about) as record, tqdm(total=total, file=sys.stderr) as progress:
        for build in builders:
            model = build()
            if torch.cuda.is_available():
                model.to("cuda", torch.float16)
            progress.set_description(f"D = {head_dims(model)}")
            record.add(*measure(model, arguments.size, arguments.steps, arguments.rounds, progress))
    height, width = arguments.size
    told = f"{height} x {width}, {arguments.rounds} rounds of {arguments.steps} steps"
    told += f", {arguments.heads} heads a layer" if arguments.model is None else f", {arguments.model}"
    written = results.write_tables(arguments.out, record.machine, f"{told}\n\n{table(record.rows)}")
    print(f"wrote {arguments.out}, {written}", file=sys.stderr)


if __name__ == "__main__":
    main()
