"""The attention scale as a function of the number of tokens."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch


@overload
def entropy_scale(num_tokens: int, train_tokens: int, head_dim: int, train_entropy: float = 0.0) -> float: ...


@overload
def entropy_scale(
    num_tokens: int | torch.Tensor,
    train_tokens: int | torch.Tensor,
    head_dim: int,
    train_entropy: float | torch.Tensor = 0.0,
) -> float | torch.Tensor: ...


def entropy_scale(num_tokens, train_tokens, head_dim, train_entropy=0.0):
    """The softmax scale that holds attention entropy at its trained level as the number of tokens changes.

        λ = sqrt((ln N - H_T) / (ln T - H_T)) / sqrt(d)

    With ``train_entropy`` H_T = 0 this is λ = sqrt(log_T N / d), Eq. 7 of Jin et al., "Training-free Diffusion Model
    Adaptation for Variable-Sized Text-to-Image Synthesis" (NeurIPS 2023). A layer's mean entropy measured at the
    trained size makes it the λ for which Eq. 5 of the paper, entropy = ln N - σ²/2 with σ² proportional to λ², keeps
    that entropy. At N = T it is 1/sqrt(d) exactly.

    Args:
        num_tokens: N, the tokens (keys) attended to now; at least 2.
        train_tokens: T, the tokens the model was trained with; at least 2.
        head_dim: d, the size of one query or key vector.
        train_entropy: H_T in nats, 0 <= H_T < ln T and H_T < ln N.

    N, T and H_T may be tensors that broadcast together; the result is then a float32 tensor, computed without
    reading the elements: where the rule is undefined for an element, it is NaN or infinite.

    Returns:
        λ as a float, or a float32 tensor when an argument is a tensor.

    Raises:
        TypeError: an argument is not of the types above.
        ValueError: a number is out of the ranges above.
    """
    _check_int("head_dim", head_dim, at_least=1)
    numbers = {"num_tokens": num_tokens, "train_tokens": train_tokens}
    for name, number in numbers.items():
        if not isinstance(number, torch.Tensor):
            _check_int(name, number, at_least=2)
    if not isinstance(train_entropy, torch.Tensor):
        _check_train_entropy(train_entropy, numbers)
    if any(isinstance(x, torch.Tensor) for x in (num_tokens, train_tokens, train_entropy)):
        return torch.sqrt(entropy_ratio(num_tokens, train_tokens, train_entropy)) / math.sqrt(head_dim)
    return math.sqrt(entropy_ratio(num_tokens, train_tokens, train_entropy)) / math.sqrt(head_dim)


def entropy_multiplier(num_tokens, train_tokens, train_entropy=0.0, exponent=0.5, bounds=(0.0, math.inf)):
    """λ √d of a rule with other exponents and with bounds: ((ln N - H_T) / (ln T - H_T)) ** exponent, unchecked.

    With the defaults it is `entropy_scale` times sqrt(d). Below ln N = H_T the ratio counts as 0. N and T may both be
    0-d float32 tensors, of sizes that torch.compile is to take for variables; at N = T the result is 1 exactly.
    """
    lowest, highest = bounds
    ratio = entropy_ratio(num_tokens, train_tokens, train_entropy)
    if isinstance(ratio, torch.Tensor):
        return (ratio.clamp(min=0.0) ** exponent).clamp(lowest, highest)
    return min(max(max(ratio, 0.0) ** exponent, lowest), highest)


def entropy_ratio(num_tokens, train_tokens, train_entropy, dtype=torch.float32):
    """(ln N - H_T) / (ln T - H_T), unchecked: the square of λ √d under the rule of `entropy_scale`.

    Tensors are computed in `dtype`. Numbers stay numbers: moving one to a device would copy from the host, which a CUDA
    graph cannot capture.
    """
    log_n, log_t = _log(num_tokens, dtype), _log(train_tokens, dtype)
    if isinstance(train_entropy, torch.Tensor):
        train_entropy = train_entropy.to(dtype)
    return (log_n - train_entropy) / (log_t - train_entropy)


def _log(number, dtype):
    return number.to(dtype).log() if isinstance(number, torch.Tensor) else math.log(number)


class LengthRule(NamedTuple):
    """The rule of `entropy_scale` for packed sequences, each of its own N. Each field is a number or a tensor (S,)."""

    train_tokens: int | torch.Tensor
    train_entropy: float | torch.Tensor

    def check(self) -> None:
        """Raise for a number out of its range. Elements of tensors are not looked at."""
        _check_trained(self.train_tokens, self.train_entropy)

    def scales(self, lengths: list[int], head_dim: int) -> list[float]:
        """λ of sequences of these numbers of keys. Reads the tensors."""
        numbers = [
            x.tolist() if isinstance(x, torch.Tensor) else [x] * len(lengths)
            for x in (self.train_tokens, self.train_entropy)
        ]
        return [length_scale(n, t, head_dim, h) for n, t, h in zip(lengths, *numbers, strict=True)]


class SampleRule(NamedTuple):
    """The rule of `entropy_scale` for a padded batch. num_tokens: the N of each sample, integers (B,)."""

    num_tokens: torch.Tensor
    train_tokens: int
    train_entropy: float

    def check(self) -> None:
        """Raise for a number out of its range. Elements of num_tokens are not looked at."""
        _check_trained(self.train_tokens, self.train_entropy)

    def scales(self, head_dim: int) -> torch.Tensor:
        """λ (B,) in float64, for any N: 0 where ln N is at most H_T."""
        at_least_1 = self.num_tokens.clamp(min=1)
        ratio = entropy_ratio(at_least_1, self.train_tokens, self.train_entropy, torch.float64)
        return ratio.clamp(min=0.0).sqrt() / math.sqrt(head_dim)


def length_scale(num_tokens: int, train_tokens: int, head_dim: int, train_entropy: float) -> float:
    """`entropy_scale` for any N, 0 and 1 included: λ is 0 where ln N is at most H_T. Where T or H_T is out of its
    range, λ is NaN."""
    if train_tokens < 2 or not 0 <= train_entropy < math.log(train_tokens):
        return math.nan
    if num_tokens < 2 or math.log(num_tokens) <= train_entropy:
        return 0.0
    return entropy_scale(num_tokens, train_tokens, head_dim, train_entropy)


def _check_int(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or a tensor, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def _check_trained(train_tokens: int | torch.Tensor, train_entropy: float | torch.Tensor) -> None:
    """Raise for a T or an H_T that is a number out of its range."""
    numbers = {} if isinstance(train_tokens, torch.Tensor) else {"train_tokens": train_tokens}
    for name, number in numbers.items():
        _check_int(name, number, at_least=2)
    if not isinstance(train_entropy, torch.Tensor):
        _check_train_entropy(train_entropy, numbers)


def _check_train_entropy(value: float, numbers: dict) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"train_entropy must be a float or a tensor, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"train_entropy must be a finite number of nats, 0 or more, got {value}")
    for name, number in numbers.items():
        if not isinstance(number, torch.Tensor) and value >= math.log(number):
            raise ValueError(
                f"train_entropy must be below ln({name}) = {math.log(number):.4f} nats, got {value}: "
                f"no scale gives {number} tokens that entropy"
            )
