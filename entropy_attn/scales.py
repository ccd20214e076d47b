"""Attention scales that depend on the position of the query: those of language models, as tensors for `scale`.

A language model expresses such a rule by multiplying its query, in the model's precision. Here the same rule is a
tensor for ``attention(scale=...)``, which reaches the kernel in float32 and leaves the query as it is:

    scale = scales.llama4(query, positions)
    out = attention(query, key, value, is_causal=True, scale=scale)

Every function takes the query, for its shape, dtype and device alone. All but `longrope` take the positions:

    query: (B, H, Nq, D), or (B, Nq, H, D) with ``layout="bnhd"``.
    positions: an int32 or int64 tensor on the device of query, (Nq,) or, for samples that differ, (B, Nq). The position
        of a query is the number of keys before its own: ``torch.arange(Nq)`` for a whole causal sequence, and
        ``torch.tensor([Nk - 1])`` where one token is decoded with Nk keys. A query at position i sees N_i = i + 1 keys.

They return λ, with 1/sqrt(D) in it, as a tensor (B, H, Nq): float32, or float64 with a float64 query. Along B and H it
is a view (a stride of 0) where the rule does not differ. The positions are not read by the host, so their values are
not checked: a position below 0 gives NaN or a meaningless λ.

Raises, in every function: TypeError for an argument of a wrong type, ValueError for one of a wrong shape, dtype or
range, named in the message.
"""

from __future__ import annotations

import math

import torch

from entropy_attn import checks, values
from entropy_attn.scale import entropy_ratio

__all__ = ["causal_entropy", "grok", "llama4", "log_n", "longrope", "ministral3", "ssmax"]


def causal_entropy(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    train_tokens: int,
    train_entropy: float = 0.0,
    beyond_training_only: bool = False,
    layout: str = "bhnd",
) -> torch.Tensor:
    """The rule of `entropy_scale` at every row of causal attention, with N the keys that the row sees.

        λ_i = sqrt((ln N_i - H_T) / (ln T - H_T) / D),   N_i = position + 1

    With ``train_entropy`` H_T = 0 it is sqrt(log_T N_i / D), Eq. 7 of Jin et al. (NeurIPS 2023). The paper states the
    rule for attention without a mask, where every row sees N keys.

    Where ln N_i <= H_T no scale gives N_i keys that entropy, and λ_i is 0, which gives the largest there is, ln N_i.

    Args:
        query, positions, layout: see the module.
        train_tokens: T, the keys that a row saw when the model was trained; at least 2.
        train_entropy: H_T in nats, 0 <= H_T < ln T.
        beyond_training_only: leave rows of N_i <= T keys at 1/sqrt(D), as a model that was trained with 1/sqrt(D) at
            every row needs it.
    """
    T = values.integer_from("train_tokens", train_tokens, 2)
    H_T = _real("train_entropy", train_entropy)
    if not 0 <= H_T < math.log(T):
        raise ValueError(f"train_entropy must be in 0 … ln(train_tokens) = {math.log(T):.4f} nats, got {H_T}")
    rows = _Rows(query, positions, layout)
    seen = _keys_seen(rows.positions, T, beyond_training_only)
    return rows.scale(entropy_ratio(seen, T, H_T, torch.float64).clamp(min=0.0).sqrt())


def log_n(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    train_tokens: int,
    beyond_training_only: bool = False,
    layout: str = "bhnd",
) -> torch.Tensor:
    """Log-n scaling: λ_i = log_T N_i / sqrt(D), with N_i = position + 1.

    Su Jianlin, "Attention's scale operation from the viewpoint of entropy invariance" (2021, https://kexue.fm/archives/8823),
    there with T = 512. With ``beyond_training_only`` it is max(1, log_T N_i) / sqrt(D), for models trained without it:
    the ``use_logn_attn`` of the first Qwen models, whose T is ``seq_length`` of their configuration.

    Args:
        query, positions, layout: see the module.
        train_tokens: T, the length of the training sequences; at least 2.
        beyond_training_only: leave rows of N_i <= T keys at 1/sqrt(D).
    """
    T = values.integer_from("train_tokens", train_tokens, 2)
    rows = _Rows(query, positions, layout)
    return rows.scale(_keys_seen(rows.positions, T, beyond_training_only).double().log() / math.log(T))


def ssmax(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    s: float | torch.Tensor,
    b: float | torch.Tensor = 0.0,
    layout: str = "bhnd",
) -> torch.Tensor:
    """Scalable-Softmax: λ_i = (s ln N_i + b) / sqrt(D), with N_i = position + 1.

    Nakanishi, "Scalable-Softmax Is Superior for Attention" (2025, https://arxiv.org/abs/2501.19399). Its SSMax has
    b = 0, its variant with a bias has both. Mistral Large 4 has the variant, with one s and one b a head.

    Args:
        query, positions, layout: see the module.
        s: a number, or a floating tensor () or (H,) on the device of query. It is read there, and not checked.
        b: likewise.
    """
    rows = _Rows(query, positions, layout)
    s, b = rows.of_heads("s", s), rows.of_heads("b", b)
    return rows.scale(s * (rows.positions + 1).double().log() + b)


def llama4(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    floor_scale: int = 8192,
    attn_scale: float = 0.1,
    layout: str = "bhnd",
) -> torch.Tensor:
    """Llama 4's temperature tuning: λ_i = (1 + attn_scale ln(1 + floor((position + 1) / floor_scale))) / sqrt(D).

    Of the layers without rotary embedding (NoPE), where ``attn_temperature_tuning`` is on. ``Llama4TextAttention`` of
    transformers; the arguments are named as in ``Llama4TextConfig``, and the defaults are its defaults.

    Args:
        query, positions, layout: see the module.
        floor_scale: in tokens, at least 1.
        attn_scale: a finite number.
    """
    floor_scale = values.integer_from("floor_scale", floor_scale, 1)
    attn_scale = _real("attn_scale", attn_scale)
    rows = _Rows(query, positions, layout)
    return rows.scale(1 + attn_scale * _log1p_floor(rows.positions + 1, floor_scale))


def ministral3(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    original_max_position_embeddings: int = 16384,
    llama_4_scaling_beta: float = 0.1,
    layout: str = "bhnd",
) -> torch.Tensor:
    """Ministral 3: λ_i = (1 + β ln(1 + floor(position / original_max_position_embeddings))) / sqrt(D).

    Llama 4's form, counted from the position and not from the keys seen: it steps one token later. Of every layer.
    ``Ministral3Attention`` of transformers; the arguments are named as in the ``rope_parameters`` of
    ``Ministral3Config``, and the defaults are its defaults. Mistral 4 has the same form.

    Args:
        query, positions, layout: see the module.
        original_max_position_embeddings: in tokens, at least 1.
        llama_4_scaling_beta: β, a finite number.
    """
    length = values.integer_from("original_max_position_embeddings", original_max_position_embeddings, 1)
    beta = _real("llama_4_scaling_beta", llama_4_scaling_beta)
    rows = _Rows(query, positions, layout)
    return rows.scale(1 + beta * _log1p_floor(rows.positions, length))


def grok(
    query: torch.Tensor,
    positions: torch.Tensor,
    *,
    attn_temperature_len: int = 1024,
    layout: str = "bhnd",
) -> torch.Tensor:
    """Grok 2's temperature: λ_i = max(1, log_L position) / sqrt(D), with L = attn_temperature_len.

    ``attn_temperature_len`` of xai-org/grok-2's configuration, 1024 there, as SGLang computes it
    (``xai_temperature_len`` of its attention). Grok also caps its logits with tanh, which no scale expresses.

    Args:
        query, positions, layout: see the module.
        attn_temperature_len: L in tokens, at least 2.
    """
    L = values.integer_from("attn_temperature_len", attn_temperature_len, 2)
    rows = _Rows(query, positions, layout)
    return rows.scale(rows.positions.clamp(min=L).double().log() / math.log(L))


def longrope(
    query: torch.Tensor,
    *,
    max_position_embeddings: int,
    original_max_position_embeddings: int,
    layout: str = "bhnd",
) -> torch.Tensor:
    """LongRoPE's attention factor, squared: λ = max(1, 1 + ln(M / L) / ln L) / sqrt(D), the same at every position.

    M is ``max_position_embeddings`` and L ``original_max_position_embeddings``. Ding et al., "LongRoPE" (2024,
    https://arxiv.org/abs/2402.13753), as in Phi-3. There the rotary embedding multiplies cos and sin of query and key
    by sqrt(1 + ln(M / L) / ln L). With this λ they stay as they are. For M >= L the multiplier of 1/sqrt(D) is log_L M,
    that of log-n scaling with N = M.

    It stands for the factor only where the whole head dim is rotated (``partial_rotary_factor`` 1).

    Args:
        query, layout: see the module.
        max_position_embeddings: M in tokens, at least 1.
        original_max_position_embeddings: L in tokens, at least 2.

    Returns:
        λ as a tensor of shape ().
    """
    M = values.integer_from("max_position_embeddings", max_position_embeddings, 1)
    L = values.integer_from("original_max_position_embeddings", original_max_position_embeddings, 2)
    _, _, _, D = _shape(query, layout)
    return torch.full((), max(1.0, math.log(M) / math.log(L)) / math.sqrt(D), dtype=_dtype(query), device=query.device)


class _Rows:
    """The rows of a query (B, H, Nq, D): their positions (B or 1, 1, Nq), and the scale from a rule's multiplier."""

    def __init__(self, query: torch.Tensor, positions: torch.Tensor, layout: str) -> None:
        self.B, self.H, self.Nq, self.D = _shape(query, layout)
        checks.plain_tensor("positions", positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"positions must be an int32 or int64 tensor, got {positions.dtype}")
        checks.check_device("positions", positions, query)
        if tuple(positions.shape) not in ((self.Nq,), (self.B, self.Nq)):
            raise ValueError(
                f"positions must have shape (Nq,) = ({self.Nq},) or (B, Nq) = ({self.B}, {self.Nq}), "
                f"got {tuple(positions.shape)}"
            )
        self.positions = positions.unsqueeze(-2) if positions.dim() == 2 else positions.view(1, 1, -1)
        self.dtype = _dtype(query)

    def of_heads(self, name: str, value: float | torch.Tensor) -> float | torch.Tensor:
        """A number, or a tensor () or (H,) as (1, H, 1) in float64."""
        if not isinstance(value, torch.Tensor):
            return _real(name, value, "a float or a tensor")
        checks.plain_tensor(name, value)
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor, got {value.dtype}")
        checks.check_device(name, value, self.positions)
        if tuple(value.shape) not in ((), (self.H,)):
            raise ValueError(f"{name} must have shape () or (H,) = ({self.H},), got {tuple(value.shape)}")
        return value.double().reshape(-1, 1)

    def scale(self, multiplier: torch.Tensor) -> torch.Tensor:
        """λ = multiplier / sqrt(D) of each row, as a view (B, H, Nq)."""
        return (multiplier / math.sqrt(self.D)).to(self.dtype).expand(self.B, self.H, self.Nq)


def _shape(query: torch.Tensor, layout: str) -> tuple[int, int, int, int]:
    """B, H, Nq and D."""
    (query, _, _) = checks.bhnd(query, query, query, layout)
    if not query.is_floating_point():
        raise ValueError(f"query must be a floating tensor, got {query.dtype}")
    B, H, Nq, D = query.shape
    checks.check_head_dim(D)
    return B, H, Nq, D


def _dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _keys_seen(positions: torch.Tensor, train_tokens: int, beyond_training_only: bool) -> torch.Tensor:
    """N_i = position + 1; with `beyond_training_only` at least T, where the rules give 1/sqrt(D)."""
    seen = positions + 1
    return seen.clamp(min=train_tokens) if values.flag("beyond_training_only", beyond_training_only) else seen


def _log1p_floor(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """ln(1 + floor(tokens / length)). The division is of integers, so it steps where it must at any length."""
    return (tokens // length).double().log1p()


def _real(name: str, value: float, kinds: str = "a float") -> float:
    value = values.real(name, value, kinds)
    if not -math.inf < value < math.inf:  # math.isfinite takes no number that torch.compile made a variable
        raise ValueError(f"{name} must be finite, got {value}")
    return value
