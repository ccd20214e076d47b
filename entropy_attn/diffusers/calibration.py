"""Calibration: the mean entropy H_T of every self-attention layer of a model at the size it was trained at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from entropy_attn.diffusers.models import find_denoisers

FORMAT = "entropy_attn.calibration/1"
WEIGHT_TOLERANCE = 2e-3  # relative: a model keeps its identity in half precision


@dataclass(frozen=True)
class ModelCalibration:
    """H_T of one model's layers by name, in nats, and what identifies the model."""

    model: str
    config: str  # a hash
    weight: float | None  # the norm of its first parameter; None if that was offloaded
    train_grid: tuple[int, ...]
    entropy: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """Mean entropies at the trained size, measured by `calibrate`, for `enable(calibration=...)`."""

    models: tuple[ModelCalibration, ...]

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        models = [asdict(model) for model in self.models]
        Path(path).write_text(json.dumps({"format": FORMAT, "unit": "nats", "models": models}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, pipe_or_model=None) -> Calibration:
        """Read it from a JSON file, and check that it is of `pipe_or_model` if that is given.

        Raises:
            ValueError: the file is not a calibration, or one of another model.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            calibration = cls(
                tuple(
                    ModelCalibration(
                        str(m["model"]), str(m["config"]), None if m["weight"] is None else float(m["weight"]),
                        tuple(int(n) for n in m["train_grid"]), {str(k): float(h) for k, h in m["entropy"].items()},
                    )
                    for m in content["models"]
                )
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a calibration that calibrate() made: {error}") from error
        if pipe_or_model is not None:
            for model in find_denoisers(pipe_or_model).values():
                calibration.of(model)
        return calibration

    def of(self, model: torch.nn.Module) -> ModelCalibration:
        """The calibration of this model. Raises ValueError if there is none."""
        kind, config, weight = identity(model)
        reasons = []
        for mine in self.models:
            if mine.model != kind:
                reasons.append(f"it is of a {mine.model}")
            elif mine.config != config:
                reasons.append(f"it is of a {kind} with another config")
            elif weight and mine.weight and abs(weight / mine.weight - 1) > WEIGHT_TOLERANCE:
                reasons.append(f"it is of a {kind} with other weights")
            else:
                return mine
        raise ValueError(
            f"calibration is not of this {kind}: {'; '.join(reasons) or 'it is empty'}. Make one with calibrate()"
        )


def identity(model: torch.nn.Module) -> tuple[str, str, float | None]:
    """What identifies a model: the first three fields of its `ModelCalibration`."""
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type == "meta" or not parameter.is_floating_point():
        return type(model).__name__, config_hash, None
    return type(model).__name__, config_hash, float(parameter.detach().double().norm())
