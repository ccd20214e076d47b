"""Enabling a pipeline or model, and disabling it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from entropy_attn.diffusers.calibration import Calibration, ModelCalibration
from entropy_attn.diffusers.clock import Clock
from entropy_attn.diffusers.denoiser import Context, Denoiser
from entropy_attn.diffusers.handle import Handle, Plan, handle_on
from entropy_attn.diffusers.layer import Layer
from entropy_attn.diffusers.models import Reading, find_denoisers, find_layers, read_model
from entropy_attn.diffusers.record import EntropyRecord
from entropy_attn.diffusers.rule import Rule


def enable(
    pipe_or_model,
    *,
    train_size: int | tuple[int, ...] | None = None,
    record_entropy: bool | EntropyRecord = False,
    joint: str = "keys",
    strict: bool = False,
    exponent: float = 0.5,
    min_multiplier: float | None = None,
    max_multiplier: float | None = None,
    steps: tuple[int, int | None] | None = None,
    overrides: Mapping[str, float | dict] | None = None,
    calibration: Calibration | str | Path | None = None,
    match_entropy: bool = False,
) -> Handle:
    """Have a Diffusers pipeline scale its self-attention by the number of tokens: λ = sqrt(log_T N / d).

    Each self- and joint-attention layer of the denoiser (UNet or DiT, and the ControlNets beside it) gets the softmax
    scale of Jin et al. (NeurIPS 2023), Eq. 7, for the N it runs at and the T it was trained at. Nothing is replaced but
    ``torch.nn.functional.scaled_dot_product_attention``, and that only within those layers: attention processors, LoRA,
    IP-Adapter, offloading and the rest work as before. At the trained size the outputs are bit for bit the model's own
    (unless entropy is recorded, which computes them in another order). Enabling again replaces the settings.

    Args:
        pipe_or_model: a Diffusers pipeline, or its UNet, transformer or ControlNet.
        train_size: the size the model was trained at, where its config does not say or is wrong: an int or (height,
            width) in pixels for a pipeline, in latent samples for a bare model; for videos, which need it, (frames,
            height, width).
        record_entropy: record the entropy of those layers in `Handle.entropy`. An `EntropyRecord` is added to.
        joint: what counts in joint attention of image and text: "keys", all of them, text in N as well as T; or
            "image".
        strict: raise RuntimeError where a layer can be given no λ, or its entropy not recorded, instead of a warning.
        exponent: λ = (log_T N) ** exponent / sqrt(d). 0.5 is the paper's; 0 leaves the trained scale.
        min_multiplier, max_multiplier: bounds of λ sqrt(d), at most 1 and at least 1. None sets none, or 0.5 and 2 with
            `calibration`.
        steps: (first, stop): only the denoising steps from `first` up to, not including, `stop` (None: to the end).
        overrides: for layers whose name matches a pattern (as in `fnmatch`), another multiplier, such as 1.0 to leave
            them alone, or a dict of exponent, min_multiplier, max_multiplier, steps, train_entropy, multiplier,
            match_entropy. Later patterns win.
        calibration: a `Calibration` or the path of one: λ = ((ln N - H_T) / (ln T - H_T)) ** exponent / sqrt(d), with
            H_T the layer's measured entropy at the trained size. Only with joint="keys".
        match_entropy: beyond that closed form, adjust λ at every step so that the entropy of the step before would have
            been H_T. Needs `calibration`.

    Returns:
        A `Handle`: print it, read its `entropy`, `disable` it or use it as a context manager.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: no denoiser or no softmax self-attention found; a train_size that does not fit the model, or is
            needed; a pattern that matches no layer; a calibration of another model; options that exclude each other.
    """
    _check_options(joint, strict, record_entropy, match_entropy)
    calibration = _check_calibration(calibration, match_entropy, joint)
    rule = Rule(exponent, min_multiplier, max_multiplier, steps)
    context = Context(None, None, joint, strict)
    plans = _plan(pipe_or_model, train_size, rule, calibration, match_entropy, context)
    layers = [layer for plan in plans for layer in plan.layers.values()]
    _override(layers, overrides)
    if record_entropy is not False:
        record = EntropyRecord() if record_entropy is True else record_entropy
        context.session = record.open_session(_label(exponent, calibration, match_entropy))
    if context.session is not None or any(layer.rule.match_entropy or layer.rule.steps for layer in layers):
        context.clock = Clock(_pipeline(pipe_or_model))
    disable(pipe_or_model)
    return Handle(type(pipe_or_model).__name__, context, plans)


def disable(pipe_or_model) -> None:
    """Take back what `enable` did to a pipeline or model; nothing happens if it was not enabled."""
    for model in find_denoisers(pipe_or_model).values():
        handle = handle_on(model)
        if handle is not None:
            handle.disable()


def _plan(pipe_or_model, train_size, rule: Rule, calibration, match_entropy: bool, context: Context) -> list[Plan]:
    plans = []
    for name, model in find_denoisers(pipe_or_model).items():
        reading = read_model(model, _pipeline(pipe_or_model), train_size)
        denoiser = Denoiser(name, reading, context)
        modules, skipped = find_layers(model)
        rules = dict.fromkeys(modules, rule)
        if calibration is not None:
            rules = _calibrated(rules, calibration.of(model), reading, match_entropy)
        layers = {n: Layer(_join(name, n), denoiser, rules[n], _own_scale(modules[n])) for n in modules}
        plans.append(Plan(model, denoiser, layers, skipped))
    if not any(plan.layers for plan in plans):
        reasons = ", ".join(sorted({reason for plan in plans for reason in plan.skipped.values()}))
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no softmax self-attention to scale, only "
            f"{reasons or 'layers without attention'}: entropy_attn cannot adapt it"
        )
    return plans


def _pipeline(pipe_or_model):
    return None if isinstance(pipe_or_model, torch.nn.Module) else pipe_or_model


def _join(name: str, layer: str) -> str:
    return f"{name}.{layer}" if name else layer


def _own_scale(module: torch.nn.Module) -> float | None:
    scale = getattr(module, "scale", None)
    return scale if isinstance(scale, float) else None


def _check_options(joint, strict, record_entropy, match_entropy) -> None:
    if joint not in ("keys", "image"):
        raise ValueError(f"joint must be 'keys' or 'image', got {joint!r}")
    for name, flag in (("strict", strict), ("match_entropy", match_entropy)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if not isinstance(record_entropy, (bool, EntropyRecord)):
        raise TypeError(f"record_entropy must be a bool or an EntropyRecord, got {type(record_entropy).__name__}")


def _check_calibration(calibration, match_entropy: bool, joint: str) -> Calibration | None:
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)
    if calibration is None:
        if match_entropy:
            raise ValueError("match_entropy needs a calibration, which says what entropy to match: see calibrate()")
        return None
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be a Calibration or a path, got {type(calibration).__name__}")
    if joint != "keys":
        raise ValueError("calibration needs joint='keys': the entropies that it holds are those over all keys")
    return calibration


def _calibrated(
    rules: dict[str, Rule], known: ModelCalibration, reading: Reading, match_entropy: bool
) -> dict[str, Rule]:
    """The rules of a model's layers, each with its H_T."""
    if known.train_grid != reading.train_grid:
        raise ValueError(
            f"calibration was made at a latent of {known.train_grid}, the model is enabled with {reading.train_grid} "
            "as its trained size: pass the same train_size to both"
        )
    missing = [name for name in rules if name not in known.entropy]
    if missing:
        raise ValueError(f"calibration has no entropy for layer {missing[0]}: make it anew with calibrate()")
    entropy = known.entropy  # 0 where a layer had one token: there is nothing to match
    return {
        name: replace(rule, train_entropy=entropy[name], match_entropy=match_entropy and entropy[name] > 0)
        for name, rule in rules.items()
    }


def _override(layers: list[Layer], overrides) -> None:
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must map patterns to multipliers or options, got {type(overrides).__name__}")
    for pattern, options in overrides.items():
        matched = [layer for layer in layers if fnmatch.fnmatchcase(layer.name, pattern)]
        if not matched:
            raise ValueError(f"overrides[{pattern!r}] matches no layer; one is named {layers[0].name}")
        for layer in matched:
            layer.set_rule(layer.rule.with_options(pattern, options))


def _label(exponent: float, calibration, match_entropy: bool) -> str:
    """What runs with these settings are called in the record."""
    if exponent == 0 and not match_entropy:
        return "trained scale"
    kind = "matched λ" if match_entropy else "λ" if calibration is None else "calibrated λ"
    return kind if exponent == 0.5 else f"{kind}, exponent {exponent:g}"
