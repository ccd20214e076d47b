"""By how much a layer's trained scale 1/sqrt(d) is multiplied, as a function of N and T."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from entropy_attn.diffusers.tokens import Tokens
from entropy_attn.scale import entropy_ratio

# Rules that aim at a layer's entropy can ask for anything when that entropy is out of reach; the paper's cannot.
ENTROPY_BOUNDS = (0.5, 2.0)


@dataclass(frozen=True)
class Rule:
    """λ √d = ((ln N - H_T) / (ln T - H_T)) ** exponent, within bounds and within a range of denoising steps.

    With `train_entropy` H_T = 0 and `exponent` 0.5 it is Eq. 7 of Jin et al. (NeurIPS 2023). At N = T it is 1, and
    also where the logarithm of N or T is 0. `multiplier` puts a number in its place.
    """

    exponent: float = 0.5
    min_multiplier: float | None = None
    max_multiplier: float | None = None
    steps: tuple[int, int | None] | None = None
    train_entropy: float = 0.0
    multiplier: float | None = None
    match_entropy: bool = False

    def __post_init__(self):
        _check_number("exponent", self.exponent, at_least=0.0)
        _check_number("train_entropy", self.train_entropy, at_least=0.0)
        for name in ("min_multiplier", "max_multiplier", "multiplier"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, at_least=0.0)
        if self.min_multiplier is not None and self.min_multiplier > 1:
            raise ValueError(f"min_multiplier must be at most 1, the trained scale, got {self.min_multiplier}")
        if self.max_multiplier is not None and self.max_multiplier < 1:
            raise ValueError(f"max_multiplier must be at least 1, the trained scale, got {self.max_multiplier}")
        if not isinstance(self.match_entropy, bool):
            raise TypeError(f"match_entropy must be a bool, got {type(self.match_entropy).__name__}")
        if self.match_entropy and self.train_entropy <= 0:
            raise ValueError("match_entropy needs a train_entropy to match, from a calibration or by itself")
        _check_steps(self.steps)

    @property
    def bounds(self) -> tuple[float, float]:
        lowest, highest = ENTROPY_BOUNDS if self.train_entropy > 0 else (0.0, math.inf)
        return (
            lowest if self.min_multiplier is None else self.min_multiplier,
            highest if self.max_multiplier is None else self.max_multiplier,
        )

    def applies_at(self, step: int | None) -> bool:
        if self.steps is None or step is None:
            return True
        start, stop = self.steps
        return start <= step and (stop is None or step < stop)

    def multiplier_for(self, tokens: Tokens) -> float:
        """The multiplier of the closed form, a positive number, or 0 where the lower bound is 0."""
        if self.multiplier is not None:
            return float(self.multiplier)
        if tokens.num_tokens == tokens.train_tokens or min(tokens) < 2:
            return 1.0
        if self.train_entropy >= math.log(tokens.train_tokens):
            return 1.0  # uniform attention when trained: no scale makes it any less so
        lowest, highest = self.bounds
        ratio = entropy_ratio(*tokens, self.train_entropy)
        return min(max(ratio**self.exponent if ratio > 0 else lowest, lowest), highest)

    def with_options(self, pattern: str, options: float | dict) -> Rule:
        """This rule with what `overrides` says for a layer: a multiplier, or some of the fields by name."""
        if not isinstance(options, dict):
            return replace(self, multiplier=options, match_entropy=False)
        unknown = set(options) - set(self.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}] has unknown options {', '.join(sorted(map(repr, unknown)))}; "
                f"allowed are {', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **options)


def _check_number(name: str, value: object, at_least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not at_least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, at least {at_least:g}, got {value}")


def _check_steps(steps: object) -> None:
    if steps is None:
        return
    if not isinstance(steps, tuple) or len(steps) != 2:
        raise TypeError(f"steps must be a pair (first, stop) of denoising steps counted from 0, got {steps!r}")
    start, stop = steps
    for value in (start, 0 if stop is None else stop):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"steps must be a pair of ints, or (first, None), got {steps!r}")
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"steps must be (first, stop) with 0 <= first < stop, got {steps!r}")
