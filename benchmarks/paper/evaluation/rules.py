"""The scales that are compared: the trained one, the paper's, and the alternatives to it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from entropy_attn.diffusers import Calibration

EXPONENTS = (1.0, 2.0, 4.0)
MULTIPLIERS = (0.8, 0.9, 1.1, 1.25)  # of the trained scale: the control at the trained size
ORIGINAL, PAPER, CALIBRATED, MATCHED = "original", "paper", "calibrated", "matched"
RESIZED, MULTIDIFFUSION = "resized", "multidiffusion"  # ways to draw an image of a size without changing the scale
CANDIDATES = (PAPER, *(f"exponent {p:g}" for p in EXPONENTS))  # the exponents among which one is chosen
RULES = (ORIGINAL, *CANDIDATES, CALIBRATED, MATCHED)
CONTROLS = tuple(f"multiplier {m:g}" for m in MULTIPLIERS)
GAINS = (0.5, 1.0, 2.0)  # exponents of log_T N
GAIN_RULES = (
    *(f"gain {q:g}" for q in GAINS),
    "paper, gain 1", "exponent 2, gain 0.5", "exponent 2, gain 1", "exponent 4, gain 2",
)  # fmt: skip
CONSTANT_GAINS = (0.8, 0.9, 1.1)  # the control of the gains at the trained size
GAIN_CONTROLS = tuple(f"constant gain {g:g}" for g in CONSTANT_GAINS)
TEMPERATURE = "temperature guidance"  # the one rule beyond the paper that changes images of the trained size
BY_HEADS = ("heads", "global heads", "head entropy", "ultra")  # they need the entropy of every head
BEYOND = (
    *GAIN_RULES,
    *BY_HEADS,
    "early",
    "fading",
    "levels fine",
    "levels coarse",
    TEMPERATURE,
)
OPTIONS = {"exponent": "exponent", "gain": "gain_exponent"}  # part of a rule's name -> argument of `enable`
MEANING = {
    ORIGINAL: "1 / √d, as trained",
    PAPER: "λ = √(log_T N / d), Eq. 7 of the paper",
    "exponent p": "(log_T N)^p / √d; the paper's p is 0.5",
    CALIBRATED: "√((ln N − H_T) / (ln T − H_T) / d), with H_T each layer's measured entropy at the trained size",
    MATCHED: "that, and then each step follows the entropy of the step before towards H_T",
    RESIZED: "drawn at the trained size, then resized",
    MULTIDIFFUSION: "MultiDiffusion (Bar-Tal et al., 2023); on an embedded pipeline windows are half their side apart",
    "multiplier m": "m / √d at every size: the control",
}
BEYOND_MEANING = {
    "gain q": "the attention's output times (log_T N)^q; the scale as trained",
    "paper, gain 1": "λ, and the attention's output times log_T N",
    "exponent p, gain q": "(log_T N)^p / √d, and the attention's output times (log_T N)^q",
    "heads": "(log_T N)^(s / 2) / √d, with s the head's dH / d ln N, within 0 and 1",
    "global heads": "λ in the heads whose dH / d ln N is at least 0.7",
    "head entropy": "√((ln N − H_T) / (ln N − H_N)) / √d, H the head's entropy at T and at N, within 0.5 and 2",
    "ultra": "UltraImage, Eq. 11: above the trained size 1 / √d times 1 to 1.3, most where a head's H / ln N is lowest",
    "early": "(log_T N)² / √d in the first third of the steps",
    "fading": "1 + (t / t_max)² ((log_T N)² − 1) times 1 / √d, t the timestep",
    "levels fine": "(log_T N)² / √d in the layers of T ≥ 256",
    "levels coarse": "(log_T N)² / √d in the layers of T < 256",
    TEMPERATURE: "the prediction without condition is replaced: with condition, and 0.7 / √d in self-attention",
    "constant gain g": "the attention's output times g at every size: the control of the gains",
}


def at_trained_size(scales: Collection[str]) -> tuple[str, ...]:
    """What is measured at the trained size. The rules of size give the original scale there, so controls do instead."""
    gains = GAIN_CONTROLS if set(scales) & set(BEYOND) else ()
    return (ORIGINAL, *CONTROLS, *gains, *((TEMPERATURE,) if TEMPERATURE in scales else ()))


def options_of(rule: str, calibration: Calibration | None) -> dict[str, Any] | None:
    """The arguments of `enable` for a rule, or None if the rule is the pipeline's original scale.

    Raises:
        ValueError: the rule is unknown, or needs the calibration that is missing.
    """
    if rule in (CALIBRATED, MATCHED):
        if calibration is None:
            raise ValueError(f"rule {rule!r} needs a calibration")
        return {"calibration": calibration} | ({"match_entropy": True} if rule == MATCHED else {})
    if rule == ORIGINAL:
        return None
    options: dict[str, Any] = {}
    parts = rule.split(", ")
    for part in parts:
        name, _, number = part.partition(" ")
        if name == "multiplier":
            options["overrides"] = {"*": float(number)}
        elif name in OPTIONS:
            options[OPTIONS[name]] = float(number)
        elif part != PAPER:
            raise ValueError(f"rule must be one of {', '.join((*RULES, *GAIN_RULES))} or 'multiplier m', got {rule!r}")
    return {"exponent": 0.0, **options} if parts[0].startswith("gain ") else options
