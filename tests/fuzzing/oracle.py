"""The expected results of a call: attention from its definition in float64, and the allowed error of each element.

The bounds follow from rounding that no implementation can avoid. The logits of a row are s_j, p = softmax(s), and the
computed logits s'_j have an error e_j of at most δ_j:

* A sum of D products in any order has an error of at most (D/2) ε Σ|q_d k_d|. The later steps (λ, the mask, subtraction
  of the maximum, the change to base 2) round numbers no larger than |λ q·k|, |mask| and the maximum. Products below the
  smallest number underflow. δ_j is the sum of these errors.
* A computed weight is p'_j = p_j exp(e_j) / Σ p exp(e). It lies between p_j exp(-δ_j - Δ) and p_j exp(δ_j + Δ), with
  Δ = ln Σ p exp(δ). It is at most 1.
* lse' - lse = ln Σ p exp(e), which lies within ±Δ.
* out' - out = Σ (p' - p) v, plus the rounding of the sums, of p (where it is cast to the input dtype) and of out.
  out' is an average, so it also lies between the smallest and the largest v.
* dH/ds_j = -p_j (s_j - E s). Between s and s', p_j stays below the bound above, and s_j - E s changes by at most
  δ_j + Σ p'δ + Σ |p' - p||s - E s|. The entropy of any logits satisfies 0 ≤ H ≤ ln(number of visible keys).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from fuzzing.calls import Call

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-149}
STATISTICS = 1e-5  # nats; the allowed error of entropy and lse where the logits are exact


class Within(NamedTuple):
    """Expected values, with the allowed error of each. The values may be NaN or infinite."""

    value: np.ndarray
    bound: np.ndarray


class Expected(NamedTuple):
    dtype: torch.dtype
    out: Within  # (B, H, Nq, Dv)
    entropy: Within  # (B, H, Nq)
    lse: Within


def cast(call: Call, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, cast to bfloat16 if autocast casts it."""
    if call.autocast and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.bfloat16)
    return tensor


def expect(call: Call, arguments: dict[str, Any]) -> Expected:
    with np.errstate(all="ignore"):
        return _expect(call, arguments)


def _expect(call: Call, arguments: dict[str, Any]) -> Expected:
    given = [cast(call, arguments[name]) for name in ("query", "key", "value")]
    dtype = given[0].dtype
    query, key, value = (numbers(x) for x in given)
    if call.layout == "bnhd":
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    # The shape (B, Hkv, group, N, D) groups the query heads that share a key head.
    query = query.reshape(call.B, call.Hkv, call.group, call.Nq, call.D)
    key, value = key[:, :, None], value[:, :, None]
    scale = _scale(call, arguments)
    visible, bias = _mask(call, arguments)

    short = str(dtype).removeprefix("torch.")
    eps, unit = EPS["float64" if short == "float64" else "float32"], EPS[short] / 2
    tiny = SMALLEST[short if short == "float64" else "float32"]
    s = scale * (query @ key.swapaxes(-1, -2))
    terms = np.abs(scale) * (np.abs(query) @ np.abs(key).swapaxes(-1, -2))
    δ = (call.D / 2 + 4) * eps * terms + tiny * (call.D * np.abs(scale) + np.abs(key).sum(-1)[..., None, :])
    δ += 4 * eps * (np.abs(s) + np.abs(bias))
    s = np.where(visible, s + bias, -np.inf)
    seen = visible.any(-1)  # queries that see a key
    unseen = ~visible.any((2, 3), keepdims=True).swapaxes(3, 4)  # keys that no query sees
    value = np.where(unseen, 0.0, value)
    peak = s.max(-1, keepdims=True, initial=-np.inf)
    δ = np.where(visible, δ + 4 * eps * np.abs(peak), 0.0)

    lse, p, log_p = _softmax(s, peak, visible)
    Δ = np.where(seen, _log_sum_exp(log_p + δ), 0.0)
    most = np.exp(np.minimum(log_p + δ + Δ[..., None], 0.0)) * visible
    apart = np.maximum(most - p, p * -np.expm1(-δ - Δ[..., None]))
    out = p @ value
    size = p @ np.abs(value)
    moved = apart @ np.abs(value)
    lowest = value.min(-2, keepdims=True, initial=np.inf, where=~unseen)
    highest = value.max(-2, keepdims=True, initial=-np.inf, where=~unseen)
    hull = np.maximum(out - lowest, highest - out)
    bound = np.minimum(moved, hull) + unit * np.abs(out) + (call.Nk + 32) * eps * size + 2.0**-126 * call.Nk
    bound += SMALLEST[short]
    if short in ("float16", "bfloat16"):  # p may be rounded to the input dtype
        bound += 2 * unit * size
    if short == "float16":
        bound += SMALLEST[short] * np.abs(value).sum(-2, keepdims=True)

    centred = np.where(visible, np.abs(s - (p * np.where(visible, s, 0.0)).sum(-1, keepdims=True)), 0.0)
    entropy = 0.0 - (p * np.where(p > 0, log_p, 0.0)).sum(-1)
    further = (most * δ + apart * np.where(apart > 0, centred, 0.0)).sum(-1)
    entropy_bound = (most * np.where(most > 0, δ * (centred + δ + further[..., None]), 0.0)).sum(-1)
    entropy_cap = np.maximum(entropy, np.log(np.maximum(visible.sum(-1), 1)) - entropy)
    entropy_bound = np.minimum(entropy_bound, entropy_cap) + STATISTICS
    lse_bound = Δ + 2 * EPS["float32"] * np.abs(lse) + STATISTICS

    def rows(value: np.ndarray, bound: np.ndarray) -> Within:
        """The rows of all heads. Rows without visible keys have the bound 0."""
        empty = (~seen).reshape(seen.shape + (1,) * (value.ndim - seen.ndim))
        joined = (call.B, call.heads, *value.shape[3:])
        return Within(value.reshape(joined), np.where(empty, 0.0, bound).reshape(joined))

    lse = lse.astype(np.float32).astype(np.float64)  # lse may overflow to infinity in float32
    return Expected(dtype, rows(out, bound), rows(entropy, entropy_bound), rows(lse, lse_bound))


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _softmax(s: np.ndarray, peak: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lse, p, ln p). A row without visible keys has -inf, 0 and -inf."""
    shift = np.where(np.isneginf(peak), 0.0, peak)
    log_sum = np.log(np.exp(s - shift).sum(-1, keepdims=True))
    # s - lse would lose the logarithm to rounding where the mask is -1e38.
    log_p = np.where(visible, s - shift - log_sum, -np.inf)
    return (shift + log_sum)[..., 0], np.exp(log_p), log_p


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    peak = x.max(-1, keepdims=True, initial=-np.inf)
    return peak[..., 0] + np.log(np.exp(x - peak).sum(-1))


def _scale(call: Call, arguments: dict[str, Any]) -> np.ndarray:
    """λ, in a shape that broadcasts to the scores (B, Hkv, group, Nq, Nk)."""
    scale = arguments.get("scale")
    if call.scale.kind == "rule":
        N, T, H_T = call.scale.num_tokens or call.Nk, call.scale.train_tokens, call.scale.train_entropy
        scale = math.sqrt((math.log(N) - H_T) / (math.log(T) - H_T) / call.D)
    elif call.scale.kind == "rule per sample":
        T, H_T = call.scale.train_tokens, call.scale.train_entropy
        N = arguments["num_tokens"].cpu().numpy().astype(np.float64)
        each = np.sqrt((np.log(N) - H_T) / (np.log(T) - H_T) / call.D)
        return each.reshape(call.B, 1, 1, 1, 1)
    elif scale is None:
        scale = 1 / math.sqrt(call.D)
    if isinstance(scale, torch.Tensor):
        each = numbers(scale)
        each = each.reshape(*each.shape, *[1] * (3 - each.ndim)) if each.ndim else each
        each = np.broadcast_to(each, (call.B, call.heads, call.Nq))
        return each.reshape(call.B, call.Hkv, call.group, call.Nq, 1)
    return np.full((1, 1, 1, 1, 1), float(scale))


def _mask(call: Call, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The visible keys of each query, (B, Hkv, group, Nq, Nk), and the bias, which broadcasts to that shape."""
    shape = (call.B, call.Hkv, call.group, call.Nq, call.Nk)
    visible, bias = np.ones(shape, bool), np.zeros((1, 1, 1, 1, 1))
    if call.causal:
        more = call.Nk - call.Nq if call.causal == "causal_lower_right" else 0
        return np.tril(visible, more), bias
    if call.mask is not None:
        mask = cast(call, arguments["attn_mask"]).detach()
        full = np.broadcast_to(mask.cpu().double().numpy(), (call.B, call.heads, call.Nq, call.Nk)).reshape(shape)
        if mask.dtype == torch.bool:
            return full != 0, bias
        visible = ~np.isneginf(full)
        return visible, np.where(visible, full, 0.0)
    return visible, bias


class Wrong(NamedTuple):
    """An element outside its bound."""

    place: tuple[int, ...]
    got: float
    wanted: float
    bound: float


def worst(got: np.ndarray, wanted: Within) -> Wrong | None:
    """The element with the largest error relative to its bound, or None if all are within their bounds."""
    value, bound = wanted
    with np.errstate(all="ignore"):
        right = (np.abs(got - value) <= bound) | (got == value) | (np.isnan(got) & np.isnan(value))
        if right.all():
            return None
        excess = np.where(right, -np.inf, np.nan_to_num(np.abs(got - value) / bound, nan=np.inf, posinf=np.inf))
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), got.shape))
    return Wrong(place, float(got[place]), float(value[place]), float(bound[place]))
