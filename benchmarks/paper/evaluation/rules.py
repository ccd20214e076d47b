"""The scales that are compared: the trained one, the paper's, and the alternatives to it."""

from __future__ import annotations

from typing import Any

from entropy_attn.diffusers import Calibration

EXPONENTS = (1.0, 2.0, 4.0)
MULTIPLIERS = (0.8, 0.9, 1.1, 1.25)  # of the trained scale: the control at the trained size
ORIGINAL, PAPER, CALIBRATED, MATCHED = "original", "paper", "calibrated", "matched"
RESIZED, MULTIDIFFUSION = "resized", "multidiffusion"  # ways to draw an image of a size without changing the scale
CANDIDATES = (PAPER, *(f"exponent {p:g}" for p in EXPONENTS))  # the exponents among which one is chosen
RULES = (ORIGINAL, *CANDIDATES, CALIBRATED, MATCHED)
CONTROLS = tuple(f"multiplier {m:g}" for m in MULTIPLIERS)
MEANING = {
    ORIGINAL: "1 / √d, as trained",
    PAPER: "λ = √(log_T N / d), Eq. 7 of the paper",
    "exponent p": "(log_T N)^p / √d; the paper's p is 0.5",
    CALIBRATED: "√((ln N − H_T) / (ln T − H_T) / d), with H_T each layer's measured entropy at the trained size",
    MATCHED: "that, and then each step follows the entropy of the step before towards H_T",
    RESIZED: "drawn at the trained size, then resized",
    MULTIDIFFUSION: "MultiDiffusion (Bar-Tal et al., 2023), by Diffusers' panorama pipeline",
    "multiplier m": "m / √d at every size: the control",
}


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
    if rule == PAPER:
        return {}
    kind, _, number = rule.partition(" ")
    if kind == "exponent":
        return {"exponent": float(number)}
    if kind == "multiplier":
        return {"overrides": {"*": float(number)}}
    raise ValueError(f"rule must be one of {', '.join(RULES)} or 'multiplier m', got {rule!r}")
