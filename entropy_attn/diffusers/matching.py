"""Entropy matching: the multiplier that brings a layer's measured entropy to its calibrated one."""

from __future__ import annotations

import math

import torch

from entropy_attn.diffusers.clock import Moment
from entropy_attn.diffusers.rule import Rule
from entropy_attn.diffusers.tokens import Tokens


class Matcher:
    """Drives one layer's multiplier m from the entropy H that earlier steps of the run had.

    Eq. 5 of Jin et al. says H = ln N - c m². A step with m and H tells c, and c the m for which H would be H_T:

        m <- m sqrt((ln N - H_T) / (ln N - H)), within the rule's bounds.

    The first step takes the closed form. Nothing is read from the device: m becomes a tensor there.
    """

    def __init__(self, rule: Rule):
        self._rule = rule
        self._moment: Moment | None = None
        self._tokens: Tokens | None = None
        self._multiplier: float | torch.Tensor = 1.0
        self._measured: list[torch.Tensor] = []  # mean entropies of the calls of the step in progress

    def multiplier_for(self, moment: Moment, tokens: Tokens) -> float | torch.Tensor:
        if self._moment is None or moment.run != self._moment.run or tokens != self._tokens:
            self._multiplier, self._measured = self._rule.multiplier_for(tokens), []
        elif moment.step != self._moment.step:
            self._update(math.log(tokens.num_tokens))
        self._moment, self._tokens = moment, tokens
        return self._multiplier

    def observe(self, entropy: torch.Tensor) -> None:
        """Take note of the entropy (B, H, Nq) that the multiplier led to."""
        self._measured.append(entropy.mean())

    def _update(self, log_tokens: float) -> None:
        measured, self._measured = self._measured, []
        wanted = log_tokens - self._rule.train_entropy
        if not measured or wanted <= 0:  # beyond reach: the closed form is at its lower bound, and stays there
            return
        distance = (log_tokens - torch.stack(measured).mean()).clamp(min=1e-6)
        self._multiplier = (self._multiplier * (wanted / distance).sqrt()).clamp(*self._rule.bounds)
