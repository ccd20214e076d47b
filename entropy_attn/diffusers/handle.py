"""Enabling, and the handle that enabling returns."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from entropy_attn.diffusers import seam
from entropy_attn.diffusers.calibration import Calibration
from entropy_attn.diffusers.clock import Clock
from entropy_attn.diffusers.layer import Context, Denoiser, Layer
from entropy_attn.diffusers.models import find_denoisers, find_layers, read_model
from entropy_attn.diffusers.record import EntropyRecord
from entropy_attn.diffusers.rule import Rule


class Handle:
    """What `enable` did to a pipeline or model, and the way to undo it. A context manager; printed, a table of layers."""

    def __init__(self, title: str, context: Context):
        self._title, self._context = title, context
        self._denoisers: list[Denoiser] = []
        self._layers: list[Layer] = []
        self._skipped: dict[str, str] = {}
        self._hooks: list = []  # torch's removable handles
        self._enabled = False

    @property
    def entropy(self) -> EntropyRecord | None:
        """The entropy record, if enabled with `record_entropy`."""
        return self._context.record

    @property
    def enabled(self) -> bool:
        return self._enabled

    def disable(self) -> None:
        """Take everything back: no hook stays, and PyTorch's SDPA with the last handle. May be called again."""
        if not self._enabled:
            return
        self._enabled = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        seam.uninstall()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def layers(self) -> list[dict]:
        """One dict a layer: `layer`, `tokens` N and `multiplier` λ √d of its last call, `train_tokens` T, `remarks`.

        N, T and the multiplier are None until the layer has run. T is None also for a layer that does not attend to the
        image, which keeps its trained scale.
        """
        return [_describe(layer) for layer in self._layers]

    def __str__(self) -> str:
        rows = self.layers()
        width = max(len(row["layer"]) for row in rows)
        state = "" if self._enabled else ", disabled"
        lines = [f"entropy_attn on {self._title}{state}: {len(rows)} layers", f"{'layer':{width}}  {'T':>6}  {'N':>6}  λ√d"]
        for row in rows:
            multiplier = "-" if row["multiplier"] is None else f"{row['multiplier']:.4f}"
            numbers = ("-" if row[key] is None else str(row[key]) for key in ("train_tokens", "tokens"))
            line = f"{row['layer']:{width}}  " + "  ".join(f"{n:>6}" for n in numbers) + f"  {multiplier}"
            lines.append("  ".join([line, *row["remarks"]]))
        lines += [f"skipped: {n} of {reason}" for reason, n in Counter(self._skipped.values()).items()]
        return "\n".join(lines)

    def _attach(self, name: str, model: torch.nn.Module, denoiser: Denoiser, layers: Mapping[str, Layer]) -> None:
        self._denoisers.append(denoiser)
        self._hook(model, denoiser)
        for layer_name, layer in layers.items():
            self._layers.append(layer)
            self._hook(model.get_submodule(layer_name), layer)

    def _hook(self, module: torch.nn.Module, owner: Denoiser | Layer) -> None:
        owner.handle = self
        self._hooks.append(module.register_forward_pre_hook(owner.enter, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(owner.leave, always_call=True))

    def _start(self) -> None:
        seam.install()
        self._enabled = True

    def __setstate__(self, state: dict) -> None:
        """A copy of an enabled model, by deepcopy or pickle, is enabled, and this is its handle."""
        self.__dict__.update(state)
        if self._enabled:
            seam.install()


def _describe(layer: Layer) -> dict:
    last = layer.last
    tokens = None if last is None else last.tokens
    return {
        "layer": layer.name,
        "tokens": None if last is None else last.keys if tokens is None else tokens.num_tokens,
        "train_tokens": None if tokens is None else tokens.train_tokens,
        "multiplier": None if last is None else float(last.multiplier),
        "remarks": list(layer.remarks),
    }


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
        train_size: the size the model was trained at, where its config does not say or is wrong: an int or (height, width)
            in pixels for a pipeline, in latent samples for a bare model; for videos, which need it, (frames, height,
            width).
        record_entropy: record the entropy of those layers in `Handle.entropy`. An `EntropyRecord` is added to.
        joint: what counts in joint attention of image and text: "keys", all of them, text in N as well as T; or "image".
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
    if joint not in ("keys", "image"):
        raise ValueError(f"joint must be 'keys' or 'image', got {joint!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {type(strict).__name__}")
    if not isinstance(record_entropy, (bool, EntropyRecord)):
        raise TypeError(f"record_entropy must be a bool or an EntropyRecord, got {type(record_entropy).__name__}")
    calibration = _check_calibration(calibration, match_entropy, joint)
    rule = Rule(exponent, min_multiplier, max_multiplier, steps, match_entropy=match_entropy)
    pipeline = None if isinstance(pipe_or_model, torch.nn.Module) else pipe_or_model
    models = find_denoisers(pipe_or_model)

    record = EntropyRecord() if record_entropy is True else record_entropy or None
    context = Context(None, record, None, joint, strict)
    handle = Handle(type(pipe_or_model).__name__, context)
    plans = []
    for name, model in models.items():
        reading = read_model(name, model, pipeline, train_size)
        modules, skipped = find_layers(model)
        denoiser = Denoiser(name, reading, context)
        known = None if calibration is None else calibration.of(model)
        layers = {n: Layer(_join(name, n), denoiser, _calibrated(rule, known, n, reading)) for n in modules}
        handle._skipped.update({_join(name, n): reason for n, reason in skipped.items()})
        plans.append((name, model, denoiser, layers))
    all_layers = [layer for *_, layers in plans for layer in layers.values()]
    if not all_layers:
        reasons = ", ".join(sorted(set(handle._skipped.values()))) or "no attention at all"
        raise ValueError(
            f"{handle._title} has no softmax self-attention to scale: it has {reasons}. entropy_attn cannot adapt it"
        )
    _override(all_layers, overrides)
    if record is not None or any(layer.rule.match_entropy or layer.rule.steps for layer in all_layers):
        context.clock = Clock(pipeline)
    if record is not None:
        context.session = record.open_session(_label(rule, calibration))
    for _, model, _, _ in plans:
        for old in handles_on(model):
            old.disable()
    for plan in plans:
        handle._attach(*plan)
    handle._start()
    return handle


def disable(pipe_or_model) -> None:
    """Take back what `enable` did to a pipeline or model; nothing happens if it was not enabled."""
    for model in find_denoisers(pipe_or_model).values():
        for handle in list(handles_on(model)):
            handle.disable()


def handles_on(model: torch.nn.Module) -> Iterator[Handle]:
    """The handle that a model is enabled by, if any."""
    for hook in list(model._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Denoiser):
            yield owner.handle


def _join(name: str, layer: str) -> str:
    return f"{name}.{layer}" if name else layer


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


def _calibrated(rule: Rule, known, layer: str, reading) -> Rule:
    if known is None:
        return rule
    if known.train_grid != reading.train_grid:
        raise ValueError(
            f"calibration was made at a latent of {known.train_grid}, the model is enabled with {reading.train_grid} as "
            "its trained size: pass the same train_size to both"
        )
    if layer not in known.entropy:
        raise ValueError(f"calibration has no entropy for layer {layer}: make it anew with calibrate()")
    return rule.with_options("calibration", {"train_entropy": known.entropy[layer]})


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


def _label(rule: Rule, calibration) -> str:
    if rule.exponent == 0:
        return "trained scale"
    kind = "matched λ" if rule.match_entropy else "λ" if calibration is None else "calibrated λ"
    return kind if rule.exponent == 0.5 else f"{kind}, exponent {rule.exponent:g}"
