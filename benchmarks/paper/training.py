"""Trains a small diffusion pipeline on the CPU. The same command continues a training.

The objective is v-prediction at one image size. Every step has its own seed for images, times and noise. So an
interrupted training ends at the same weights as an uninterrupted one with the same number of processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is imported

import torch
import torch.distributed
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from pixels import Denoiser, PixelPipeline
from tqdm import tqdm

NO_CONDITION = 0.1  # share of the images that are trained without a condition, for classifier-free guidance
WARM_UP = 100  # steps
SAVED_EVERY = 200  # steps
NOISE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


class Task(Protocol):
    """What is trained. It is pickled to every process."""

    pipeline: type[PixelPipeline]

    def prepare(self) -> None:
        """Make what all processes share, before they start."""

    def build(self) -> Denoiser:
        """The trained module, with random weights."""

    def images(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: images (size, C, H, W) in [−1, 1], float32, and their conditions, `NO_CONDITION` of them empty."""


def batch_of(task: Task, size: int, seed: int, noising: DDPMScheduler) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The inputs and the target of one training step in one process, `size` images."""
    generator = torch.Generator().manual_seed(seed)
    clean, conditions = task.images(size, generator)
    # Stratified: one time from each of `size` equal spans.
    spans = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
    timesteps = (spans / size * noising.config.num_train_timesteps).long()
    noise = torch.randn(clean.shape, generator=generator)
    inputs = noising.add_noise(clean, noise, timesteps), timesteps, conditions
    return inputs, noising.get_velocity(clean, noise, timesteps)


def rate_at(step: int, steps: int, highest: float) -> float:
    """The learning rate: linear warm-up, constant up to a fifth of the steps, then half a cosine down to 2 %."""
    fallen = max(0.0, step / steps - 0.2) / 0.8
    return highest * min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices. Queries and keys of self-attention have none: it would make the attention flatter."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        sharp = "attn1.to_q" in name or "attn1.to_k" in name
        (free if parameter.ndim < 2 or sharp or "embedder" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]


def steps_of(task: Task, arguments: argparse.Namespace, rank: int) -> Iterator[tuple[int, float]]:
    """Train. Yields each finished step and its loss. Rank 0 writes checkpoints and, at the end, the pipeline."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    model = task.build()
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.99))
    parameters = list(model.parameters())
    done = load_checkpoint(arguments, model, average, optimiser)
    noising = DDPMScheduler(**NOISE)
    share = arguments.batch // arguments.processes
    for step in range(done, arguments.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, arguments.steps, arguments.rate)
        seed = (arguments.seed * arguments.steps + step) * arguments.processes + rank
        inputs, target = batch_of(task, share, seed, noising)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            predicted = model(*inputs)
        loss = F.mse_loss(predicted.float(), target)
        optimiser.zero_grad()
        loss.backward()
        mean_loss = loss.item() if arguments.processes == 1 else average_gradients(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
        if rank == 0 and ((step + 1) % SAVED_EVERY == 0 or step + 1 == arguments.steps):
            save_checkpoint(arguments, model, average, optimiser, step + 1)
        yield step + 1, mean_loss
    if rank == 0:
        save_pipeline(task, average, arguments.out)
        (arguments.out / "training.json").write_text(json.dumps(settings(arguments), indent=1) + "\n")


def average_gradients(parameters: list[torch.nn.Parameter], loss: torch.Tensor) -> float:
    """Replace the gradients by their mean over all processes; returns the mean of the losses."""
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters] + [loss.detach()[None]])
    torch.distributed.all_reduce(gradients)
    gradients /= torch.distributed.get_world_size()
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients[:-1].split(sizes), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
    return gradients[-1].item()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that must be the same when a training is continued."""
    return {name: x for name, x in vars(arguments).items() if not isinstance(x, Path)}


def save_checkpoint(arguments, model, average, optimiser, step: int) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    state = {"settings": settings(arguments), "step": step, "model": model.state_dict()}
    state |= {"average": average.state_dict(), "optimiser": optimiser.state_dict()}
    path = arguments.out / "checkpoint.pt"
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # atomic: an interruption leaves the old file


def check_settings(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint, or None if there is none. Raises ValueError if it is of a training with other settings."""
    path = arguments.out / "checkpoint.pt"
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings(arguments):
        raise ValueError(f"{path} is of a training with other settings, {state['settings']}: remove it or take them")
    return state


def load_checkpoint(arguments, model, average, optimiser) -> int:
    """Restore the state of the checkpoint; returns the number of steps that are done, 0 without a checkpoint."""
    state = check_settings(arguments)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def save_pipeline(task: Task, average: Denoiser, out: Path) -> None:
    """Save the pipeline in half precision, which makes no visible difference to the images."""
    scheduler = DPMSolverMultistepScheduler(**NOISE, thresholding=True, sample_max_value=1.0)
    task.pipeline(average.unet.half(), average.embedder.half(), scheduler).save_pretrained(out)


def run(rank: int, task: Task, arguments: argparse.Namespace, port: int) -> None:
    """One process of the training."""
    if arguments.processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=arguments.processes)
    smooth = None
    with tqdm(total=arguments.steps, desc="training", disable=rank > 0, smoothing=0.02) as progress:
        for step, loss in steps_of(task, arguments, rank):
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            progress.update(step - progress.n)
            progress.set_postfix(loss=f"{smooth:.4f}")


def add_arguments(parser: argparse.ArgumentParser, steps: int, batch: int, images: int, rate: float, out: Path) -> None:
    """The arguments of every training, with a task's defaults."""
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=batch, help="images per step (default: %(default)s)")
    parser.add_argument("--images", type=int, default=images, help="number of training images (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with a message if an argument is invalid, or not that of the training to continue."""
    for name in ("steps", "batch", "images", "processes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.batch % arguments.processes:
        parser.error(f"--batch {arguments.batch} does not divide among --processes {arguments.processes}")
    try:
        check_settings(arguments)
    except ValueError as error:
        parser.error(str(error))


def train(task: Task, arguments: argparse.Namespace) -> None:
    task.prepare()
    if arguments.processes == 1:
        run(0, task, arguments, 0)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (task, arguments, port), nprocs=arguments.processes)
