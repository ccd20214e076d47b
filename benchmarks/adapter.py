"""What the Diffusers adapter costs: a denoising step with it enabled, and with entropy recorded, against one without.

The model is the UNet of Stable Diffusion 1.5 with random weights and a few channels (or one of yours). The ways run in
turn, round by round; what is reported are medians, and ratios to the plain step of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import entropy_attn

WAYS: dict = {"plain": None, "enabled": {}, "entropy recorded": {"record_entropy": True}}


def tiny_unet() -> UNet2DConditionModel:
    """The layers and tokens of Stable Diffusion 1.5, in 8 to 16 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=32, norm_num_groups=2, attention_head_dim=2,
        block_out_channels=(8, 16, 16, 16), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).eval()  # fmt: skip


@torch.no_grad()
def seconds_a_step(unet, size: tuple[int, int], steps: int) -> float:
    """The median step of a short run with classifier-free guidance, without the first."""
    parameter = next(unet.parameters())
    options = {"device": parameter.device, "dtype": parameter.dtype}
    text = torch.randn(2, 77, unet.config.cross_attention_dim, **options)
    sample = torch.randn(1, unet.config.in_channels, size[0] // 8, size[1] // 8, **options)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps + 1)
    times = []
    for timestep in scheduler.timesteps:
        _finish(parameter)
        started = time.perf_counter()
        without, with_text = unet(torch.cat([sample] * 2), timestep, encoder_hidden_states=text).sample.chunk(2)
        sample = scheduler.step(without + 7.5 * (with_text - without), timestep, sample).prev_sample
        _finish(parameter)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _finish(parameter: torch.Tensor) -> None:
    if parameter.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a UNet2DConditionModel: folder or hub id; default: the tiny one")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("build/adapter.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    unet = tiny_unet() if arguments.model is None else UNet2DConditionModel.from_pretrained(arguments.model)
    if torch.cuda.is_available():
        unet.to("cuda", torch.float16)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(arguments.rounds + 1):
        for way, options in WAYS.items():
            with contextlib.nullcontext() if options is None else entropy_attn.enable(unet, **options):
                taken = seconds_a_step(unet, arguments.size, arguments.steps)
            if round_ > 0:  # the first is to warm up
                times[way].append(taken)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    rows = {
        way: {
            "ms": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, times["plain"], strict=True)),
        }
        for way, mine in times.items()
    }
    for way, row in rows.items():
        print(f"{way:17} {row['ms']:9.2f} ms a step   {row['ratio']:.3f} of plain")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"device": device, "size": arguments.size, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
