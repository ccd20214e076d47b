"""The rule: λ √d, the ratio of λ to the trained scale, from N and T or from the entropy of earlier steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from entropy_attn.entropy.record import Moment
from entropy_attn.entropy.tokens import Tokens
from entropy_attn.scale import entropy_multiplier

# Default bounds with H_T > 0: near ln N = H_T or ln T = H_T that rule has no bounds of its own.
ENTROPY_BOUNDS = (0.5, 2.0)
RUNS_KEPT = 8  # a matcher forgets older runs


@dataclass(frozen=True)
class Rule:
    """λ √d = ((ln N - H_T) / (ln T - H_T)) ** exponent, within bounds and within a range of denoising steps.

    With `train_entropy` H_T = 0 and `exponent` 0.5 it is Eq. 7 of Jin et al. (NeurIPS 2023). At N = T it is 1, and
    also where the logarithm of N or T is 0. `multiplier` puts a number in its place. Beside it, (log_T N) **
    `gain_exponent` is a gain on the attention's output, which is not the paper's.
    """

    exponent: float = 0.5
    min_multiplier: float | None = None
    max_multiplier: float | None = None
    steps: tuple[int, int | None] | None = None
    train_entropy: float = 0.0
    multiplier: float | None = None
    match_entropy: bool = False
    gain_exponent: float = 0.0

    def __post_init__(self):
        for name in ("exponent", "gain_exponent", "train_entropy", "min_multiplier", "max_multiplier", "multiplier"):
            value = getattr(self, name)
            if value is not None or name in ("exponent", "gain_exponent", "train_entropy"):
                _check_number(name, value)
        if self.min_multiplier is not None and self.min_multiplier > 1:
            raise ValueError(f"min_multiplier must be at most 1, the trained scale, got {self.min_multiplier}")
        if self.max_multiplier is not None and self.max_multiplier < 1:
            raise ValueError(f"max_multiplier must be at least 1, the trained scale, got {self.max_multiplier}")
        if not isinstance(self.match_entropy, bool):
            raise TypeError(f"match_entropy must be a bool, got {type(self.match_entropy).__name__}")
        if self.match_entropy and self.train_entropy <= 0:
            raise ValueError("match_entropy needs a train_entropy to match, from a calibration or by itself")
        if self.steps is not None:
            object.__setattr__(self, "steps", _checked_steps(self.steps))

    @property
    def bounds(self) -> tuple[float, float]:
        lowest, highest = ENTROPY_BOUNDS if self.train_entropy > 0 else (0.0, math.inf)
        return (
            lowest if self.min_multiplier is None else self.min_multiplier,
            highest if self.max_multiplier is None else self.max_multiplier,
        )

    def applies_at(self, moment: Moment | None) -> bool:
        if self.steps is None or moment is None:
            return True
        first, stop = self.steps
        return first <= moment.step and (stop is None or moment.step < stop)

    def multiplier_for(self, tokens: Tokens, device: torch.device | None = None) -> float | torch.Tensor:
        """λ √d of the closed form: a float; or, for a graph in which N and T are symbols, a tensor on `device`."""
        if self.multiplier is not None and tokens.train_tokens is not None:
            return float(self.multiplier)
        return _power(tokens, self.train_entropy, self.exponent, self.bounds, device)

    def gain_for(self, tokens: Tokens, device: torch.device | None = None) -> float | torch.Tensor:
        """The gain on the attention's output, as `multiplier_for` gives λ √d."""
        if self.gain_exponent == 0:
            return 1.0
        return _power(tokens, 0.0, self.gain_exponent, (0.0, math.inf), device)

    def with_options(self, pattern: str, options: float | dict) -> Rule:
        """This rule with what `overrides` says for a layer: a multiplier, or some of the fields by name."""
        if not isinstance(options, dict):
            return replace(self, multiplier=options, match_entropy=False, gain_exponent=0.0)
        unknown = set(options) - set(self.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}] has unknown options {', '.join(sorted(map(repr, unknown)))}; "
                f"allowed are {', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **options)


def _power(
    tokens: Tokens, train_entropy: float, exponent: float, bounds: tuple[float, float], device: torch.device | None
) -> float | torch.Tensor:
    """((ln N - H_T) / (ln T - H_T)) ** exponent within bounds: a float, or a tensor on `device`; 1 where N = T."""
    num_tokens, train_tokens = tokens
    if train_tokens is None or min(num_tokens, train_tokens) < 2 or (device is None and num_tokens == train_tokens):
        return 1.0
    if train_entropy > 0 and train_entropy >= math.log(train_tokens):
        return 1.0  # the trained attention was uniform: no scale makes it less peaked
    if device is None:
        return entropy_multiplier(num_tokens, train_tokens, train_entropy, exponent, bounds)
    N, T = (torch.full((), size, dtype=torch.float32, device=device) for size in (num_tokens, train_tokens))
    return entropy_multiplier(N, T, train_entropy, exponent, bounds)


class Matcher:
    """Drives one layer's multiplier m from the entropy H that earlier steps of the run had.

    Eq. 5 of Jin et al. says H = ln N - c m². A step with m and H tells c, and c the m for which H would be H_T:

        m <- m sqrt((ln N - H_T) / (ln N - H)), within the rule's bounds.

    The first step takes the closed form. Nothing is read from the device: m becomes a tensor there.
    """

    def __init__(self, rule: Rule):
        self._rule = rule
        self._runs: dict[int, _Matched] = {}

    def multiplier_for(self, moment: Moment, tokens: Tokens) -> float | torch.Tensor:
        matched = self._runs.get(moment.run)
        if matched is None or matched.tokens != tokens:
            matched = self._runs[moment.run] = _Matched(tokens, moment.step, self._rule.multiplier_for(tokens), [])
            for run in list(self._runs)[:-RUNS_KEPT]:
                self._runs.pop(run, None)
        elif matched.step != moment.step:
            self._update(matched)
            matched.step = moment.step
        return matched.multiplier

    def observe(self, moment: Moment, entropy: torch.Tensor) -> None:
        """Take note of the entropy (B, H, Nq) that the multiplier led to."""
        if moment.run in self._runs:
            self._runs[moment.run].measured.append(entropy.mean())

    def _update(self, matched: _Matched) -> None:
        measured, matched.measured = matched.measured, []
        log_tokens = math.log(matched.tokens.num_tokens)
        wanted = log_tokens - self._rule.train_entropy
        if not measured or wanted <= 0:  # out of reach: the closed form is at its lower bound, and stays there
            return
        distance = (log_tokens - torch.stack(measured).mean()).clamp(min=1e-6)
        matched.multiplier = (matched.multiplier * (wanted / distance).sqrt()).clamp(*self._rule.bounds)


@dataclass
class _Matched:
    """The state of a matcher in one run."""

    tokens: Tokens
    step: int
    multiplier: float | torch.Tensor
    measured: list[torch.Tensor]  # mean entropies of the calls of this step


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, at least 0, got {value}")


def _checked_steps(steps: object) -> tuple[int, int | None]:
    if not isinstance(steps, (tuple, list)) or len(steps) != 2:
        raise TypeError(f"steps must be a pair (first, stop) of denoising steps counted from 0, got {steps!r}")
    first, stop = steps
    for value in (first, 0 if stop is None else stop):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"steps must be a pair of ints, or (first, None), got {steps!r}")
    if first < 0 or (stop is not None and stop <= first):
        raise ValueError(f"steps must be (first, stop) with 0 <= first < stop, got {steps!r}")
    return first, stop
