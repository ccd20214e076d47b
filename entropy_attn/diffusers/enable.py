"""`enable`, `disable` and the `Handle` of an enabled pipeline or model."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from entropy_attn.diffusers.calibration import Calibration, ModelCalibration
from entropy_attn.diffusers.layer import Context, Layer
from entropy_attn.diffusers.models import find_denoisers, find_layers, read_model
from entropy_attn.diffusers.scaling import Denoiser, attached
from entropy_attn.diffusers.steps import Clock
from entropy_attn.entropy.record import EntropyRecord, cell
from entropy_attn.entropy.rule import Rule


def enable(
    pipe_or_model,
    *,
    train_size: int | tuple[int, ...] | None = None,
    record_entropy: bool | EntropyRecord = False,
    attention: str = "auto",
    joint: str = "keys",
    strict: bool = False,
    exponent: float = 0.5,
    gain_exponent: float = 0.0,
    min_multiplier: float | None = None,
    max_multiplier: float | None = None,
    steps: tuple[int, int | None] | None = None,
    overrides: Mapping[str, float | dict] | None = None,
    calibration: Calibration | str | Path | None = None,
    match_entropy: bool = False,
) -> Handle:
    """Have a Diffusers pipeline scale its self-attention by the number of tokens: λ = sqrt(log_T N / d).

    Each self- and joint-attention layer of the denoiser (UNet or DiT, and the ControlNets beside it) gets the softmax
    scale of Jin et al. (NeurIPS 2023), Eq. 7, for the N it runs at and the T it was trained at: forward hooks multiply
    its query by λ sqrt(d). Attention processors and backends, LoRA, IP-Adapter, offloading and torch.compile work as
    before. At the trained size the outputs are bit for bit the model's own, unless `attention` computes them. Enabling
    again replaces the settings.

    Args:
        pipe_or_model: a Diffusers pipeline, or its UNet, transformer or ControlNet.
        train_size: the size the model was trained at, where its config does not say or is wrong: an int or (height,
            width) in pixels for a pipeline, in latent samples for a bare model; for videos, which need it, (frames,
            height, width).
        record_entropy: record the entropy of those layers in `Handle.entropy`. An `EntropyRecord` is added to.
        attention: who computes the attention. "model": the model itself; `entropy_attn.attention` only measures the
            entropy, beside it. "fused": `entropy_attn.attention`, wherever the layer calls SDPA. "auto": that on a GPU
            at other sizes than the trained one, and wherever entropy is recorded; else the model.
        joint: what counts in joint attention of image and text: "keys", all of them, text in N as well as T; or
            "image".
        strict: raise RuntimeError where a layer can be given no λ, its entropy not be recorded or, with
            attention="fused", its attention not be replaced; and ValueError where a ControlNet is not known. Without
            it these are warnings.
        exponent: λ = (log_T N) ** exponent / sqrt(d). 0.5 is the paper's; 0 leaves the trained scale.
        gain_exponent: beside λ, the output of these layers is multiplied by (log_T N) ** gain_exponent, ahead of its
            projection. 0 leaves it. This is not the paper's: docs/when-it-helps.md says where it helped.
        min_multiplier, max_multiplier: bounds of λ sqrt(d), at most 1 and at least 1. None sets none, or 0.5 and 2 with
            `calibration`.
        steps: (first, stop): only the denoising steps from `first` up to, not including, `stop` (None: to the end),
            as the pipeline's progress bar counts them.
        overrides: for layers whose name matches a pattern (as in `fnmatch`), another multiplier, such as 1.0 to leave
            them alone, or a dict of exponent, gain_exponent, min_multiplier, max_multiplier, steps, train_entropy,
            multiplier, match_entropy. Later patterns win.
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
    _check_options(attention, joint, strict, record_entropy, match_entropy)
    calibration = _check_calibration(calibration, match_entropy, joint)
    rule = Rule(exponent, min_multiplier, max_multiplier, steps, gain_exponent=gain_exponent)
    models = find_denoisers(pipe_or_model)
    pipeline = None if isinstance(pipe_or_model, torch.nn.Module) else pipe_or_model
    context = Context(attention, joint, strict, None if pipeline is None else weakref.ref(pipeline))
    denoisers, skipped = _denoisers(models, pipeline, train_size, rule, context)
    if calibration is not None:
        for denoiser in denoisers:
            _calibrate(denoiser, calibration.of(denoiser.model), match_entropy)
    layers = [layer for denoiser in denoisers for layer in denoiser.layers]
    _override(layers, overrides)
    if record_entropy is not False:
        record = EntropyRecord() if record_entropy is True else record_entropy
        context.session = record.open_session(_label(rule, calibration, match_entropy))
    if any(layer.wants_entropy or layer.rule.steps for layer in layers):
        context.clock = Clock()
    return Handle(type(pipe_or_model).__name__, context, denoisers, skipped)


def disable(pipe_or_model) -> None:
    """Take back what `enable` did to a pipeline or model. One that is not enabled is left as it is."""
    models = find_denoisers(pipe_or_model).values()
    for denoiser in list(attached):
        pipeline = denoiser.context.pipeline and denoiser.context.pipeline()
        if denoiser.model in models or pipeline is pipe_or_model:  # the pipeline may have exchanged its model
            denoiser.detach()


def is_enabled(model: torch.nn.Module) -> bool:
    return any(denoiser.model is model for denoiser in attached)


class Handle:
    """An enabled pipeline or model. A context manager that disables it; printed, a table of its layers.

    Enabling a model again disables it in the older handle. When ``with`` blocks are nested, the outer handle is enabled
    again at the end of the inner block.
    """

    def __init__(self, title: str, context: Context, denoisers: list[Denoiser], skipped: list[str]):
        self._title, self._context, self._denoisers, self._skipped = title, context, denoisers, skipped
        models = [denoiser.model for denoiser in denoisers]
        self._replaced = [other for other in list(attached) if other.model in models]
        try:
            for other in self._replaced:
                other.detach()
            for denoiser in denoisers:
                denoiser.attach()
        except BaseException:
            self.disable()
            raise

    @property
    def entropy(self) -> EntropyRecord | None:
        """The entropy record, if enabled with `record_entropy`."""
        session = self._context.session
        return None if session is None else session.record

    @property
    def enabled(self) -> bool:
        return any(denoiser.is_attached for denoiser in self._denoisers)

    def disable(self) -> None:
        """Remove every hook, and the replacement of SDPA if no other handle needs it. May be called again."""
        for denoiser in self._denoisers:
            denoiser.detach()

    def __enter__(self) -> Handle:
        for denoiser in self._denoisers:
            denoiser.is_in_block = True
        return self

    def __exit__(self, *error) -> None:
        for denoiser in self._denoisers:
            denoiser.is_in_block = False
        self.disable()
        for other in self._replaced:
            if other.is_in_block and not is_enabled(other.model):
                other.attach()

    def layers(self) -> list[dict]:
        """One dict a layer: of its last call `tokens` N, `multiplier` λ √d and `gain`; `train_tokens` T, `remarks`.

        N, T, the multiplier and the gain are None until the layer has run. T is None also for a layer that does not
        attend to the image, which keeps its trained scale.
        """
        return [layer.describe() for denoiser in self._denoisers for layer in denoiser.layers]

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"<entropy_attn handle on {self._title}, {state}: {len(self.layers())} layers>"

    def __str__(self) -> str:
        rows = self.layers()
        width = max(len(row["layer"]) for row in rows)
        state = "" if self.enabled else ", disabled"
        sizes = (f"{d.name} trained at {' x '.join(map(str, d.reading.train_latent))}".strip() for d in self._denoisers)
        gains = any(layer.rule.gain_exponent for denoiser in self._denoisers for layer in denoiser.layers)
        names = ("multiplier", "gain") if gains else ("multiplier",)
        lines = [
            f"entropy_attn on {self._title}{state}: {len(rows)} layers; {', '.join(sizes)} latent samples",
            f"{'layer':{width}}  {'T':>6}  {'N':>6}  {'λ√d     gain' if gains else 'λ√d'}",
        ]
        for row in rows:
            T, N = (cell(row[key]) for key in ("train_tokens", "tokens"))
            factors = [f"{cell(row[name]):6}" if gains else cell(row[name]) for name in names]
            lines.append(
                "  ".join([f"{row['layer']:{width}}", f"{T:>6}", f"{N:>6}", *factors, *row["remarks"]]).rstrip()
            )
        lines += [f"skipped: {n} of {reason}" for reason, n in Counter(self._skipped).items()]
        return "\n".join(lines)


def _denoisers(models, pipeline, train_size, rule: Rule, context: Context) -> tuple[list[Denoiser], list[str]]:
    """The models to enable with their layers, and why other modules are left alone."""
    denoisers: list[Denoiser] = []
    skipped: list[str] = []
    for name, model in models.items():
        modules, others = find_layers(model)
        skipped += others.values()
        if not modules:
            continue
        try:
            reading = read_model(model, pipeline, train_size)
        except ValueError as error:
            if not name.startswith("controlnet") or context.strict:
                raise
            warnings.warn(f"entropy_attn: {name} is left at its trained scale: {error}", RuntimeWarning, stacklevel=3)
            skipped += [f"{name}, which is not known"] * len(modules)
            continue
        denoisers.append(Denoiser(name, model, reading, context, modules, rule))
    if not denoisers:
        kinds = ", ".join(type(model).__name__ for model in models.values())
        reasons = ", ".join(sorted(set(skipped))) or "modules without to_q or to_qkv"
        raise ValueError(
            f"{kinds} has no softmax self-attention to scale, only {reasons}: entropy_attn cannot adapt it"
        )
    return denoisers, skipped


def _check_options(attention, joint, strict, record_entropy, match_entropy) -> None:
    if attention not in ("auto", "fused", "model"):
        raise ValueError(f"attention must be 'auto', 'fused' or 'model', got {attention!r}")
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


def _calibrate(denoiser: Denoiser, known: ModelCalibration, match_entropy: bool) -> None:
    """Give each layer its H_T."""
    if known.train_grid != denoiser.reading.train_grid:
        raise ValueError(
            f"calibration was made at a latent of {known.train_grid}, the model is enabled with "
            f"{denoiser.reading.train_grid} as its trained size: pass the same train_size to both"
        )
    for layer in denoiser.layers:
        entropy = known.entropy.get(layer.name.removeprefix(f"{denoiser.name}."))
        if entropy is None:
            raise ValueError(f"calibration has no entropy for layer {layer.name}: make it anew with calibrate()")
        match = match_entropy and entropy > 0  # it is 0 where a layer had one token: there is nothing to match
        layer.set_rule(replace(layer.rule, train_entropy=entropy, match_entropy=match))


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


def _label(rule: Rule, calibration, match_entropy: bool) -> str:
    """The label in the record of runs with these settings."""
    gain = f", gain exponent {rule.gain_exponent:g}" if rule.gain_exponent else ""
    if rule.exponent == 0 and not match_entropy:
        return f"trained scale{gain}"
    kind = "matched λ" if match_entropy else "λ" if calibration is None else "calibrated λ"
    return kind + ("" if rule.exponent == 0.5 else f", exponent {rule.exponent:g}") + gain
