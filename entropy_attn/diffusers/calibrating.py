"""`calibrate`: record the entropy of a pipeline at its trained size and trained scale."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm  # which Diffusers needs too

from entropy_attn.diffusers.calibration import Calibration, ModelCalibration, identity
from entropy_attn.diffusers.enable import enable, is_enabled
from entropy_attn.diffusers.models import find_denoisers, pixels_per_sample, read_model
from entropy_attn.entropy.record import EntropyRecord


def calibrate(
    pipe, prompts: str | Iterable[str] = "", *, train_size=None, progress: bool = True, **call
) -> Calibration:
    """Measure the mean entropy H_T of every self-attention layer at the trained size, for `enable(calibration=...)`.

    Args:
        pipe: a Diffusers pipeline, not enabled.
        prompts: one run each. They should resemble the prompts to come. A pipeline that takes no prompt is run once;
            its own arguments go into `call`.
        train_size: as in `enable`.
        progress: show a progress bar.
        call: further arguments of the pipeline, such as num_inference_steps or generator. A `prompt`, `height` or
            `width` here overrides `prompts` and the trained size.

    Returns:
        A `Calibration`; its `save` writes it to a file.

    Raises:
        TypeError: `pipe` is a bare model: record a run of your own and use `calibration_from`.
        ValueError: it is enabled already; or what `enable` raises.
    """
    if isinstance(pipe, torch.nn.Module):
        raise TypeError(
            f"calibrate takes a pipeline, which it can call, got {type(pipe).__name__}; for a bare model enable it "
            "with record_entropy=True and exponent=0, call it at its trained size, and use calibration_from()"
        )
    models = find_denoisers(pipe)
    if any(is_enabled(model) for model in models.values()):
        raise ValueError("calibrate takes a pipeline that is not enabled: disable it first")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be one or more strings, got {prompts!r}")
    latent, factor = read_model(next(iter(models.values())), pipe, train_size).train_latent, pixels_per_sample(pipe)
    size = {"height": latent[-2] * factor, "width": latent[-1] * factor}
    prompted = "prompt" in inspect.signature(pipe.__call__).parameters and "prompt_embeds" not in call
    record = EntropyRecord()
    with enable(pipe, train_size=train_size, record_entropy=record, exponent=0):
        for prompt in tqdm(prompts, desc="calibrating", disable=not progress):
            pipe(**{**size, **({"prompt": prompt} if prompted else {}), **call})
    return calibration_from(pipe, record, train_size=train_size)


def calibration_from(pipe_or_model, record: EntropyRecord, *, train_size=None) -> Calibration:
    """The calibration from a record of runs at the trained size with the trained scale.

    Raises:
        ValueError: the record has no layer of a model at its trained size.
    """
    pipeline = None if isinstance(pipe_or_model, torch.nn.Module) else pipe_or_model
    rows = [r for r in record.table(by=("layer",)) if r["tokens"] == r["train_tokens"] and r["multiplier"] == 1.0]
    models = []
    for name, model in find_denoisers(pipe_or_model).items():
        prefix = f"{name}." if name else ""
        entropy = {r["layer"].removeprefix(prefix): r["entropy"] for r in rows if r["layer"].startswith(prefix)}
        if entropy:
            grid = read_model(model, pipeline, train_size).train_grid
            models.append(ModelCalibration(*identity(model), grid, entropy))
    if not models:
        raise ValueError("record has no layer at its trained size with the trained scale: nothing to calibrate from")
    return Calibration(tuple(models))
