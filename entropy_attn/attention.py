"""The public function: check, normalise, call the operator, shape the answer."""

from __future__ import annotations

import torch

from entropy_attn import checks, nested, op  # noqa: F401 (op registers the operator)
from entropy_attn.output import AttentionOutput, answer


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0,  # not 0.0: torch.compile(dynamic=True) takes float defaults for variables, and starts twice
    is_causal: bool = False,
    *,
    scale: float | torch.Tensor | None = None,
    enable_gqa: bool = False,
    train_tokens: int | None = None,
    train_entropy: float = 0,
    num_tokens: int | torch.Tensor | None = None,
    layout: str = "bhnd",
    return_entropy: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | AttentionOutput:
    """Exact attention, softmax(λ Q Kᵀ + mask) V, with λ from the number of tokens and the entropy of every row.

    Without the keyword arguments below it is ``torch.nn.functional.scaled_dot_product_attention``, argument for
    argument, for inference: there is no backward pass.

    λ is one of: 1/sqrt(D) by default; `scale`; or with `train_tokens` the rule of Jin et al. (NeurIPS 2023, Eq. 7),
    sqrt(log_T N / D), computed when the operator runs, so that one compiled graph serves every N.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32, or float64 (CPU and reference only).
        key: (B, Hkv, Nk, D), same dtype and device.
        value: (B, Hkv, Nk, Dv), same dtype and device.
        attn_mask: broadcastable to (B, H, Nq, Nk) and never expanded in memory. Boolean: True where a key takes
            part. Floating (the dtype of query, or float32): added to λ q·k. (B, 1, 1, Nk) is a key-padding mask.
            The masks of `torch.nn.attention.bias` are taken too.
        dropout_p: must be 0.
        is_causal: query i sees the keys 0 … i. Not together with `attn_mask`.
        scale: λ as a number, or as a float32 tensor of shape (), (B,), (B, H) or (B, H, Nq) on the device of query.
            The tensor is read on the device, without synchronising, so its elements are not checked: NaN gives NaN
            (in a row that sees no key, NaN or 0).
        enable_gqa: allow H to be a multiple of Hkv. Keys and values are not repeated in memory (but for "reference").
        train_tokens: T, the number of tokens the model was trained with. Not together with `scale`.
        train_entropy: H_T in nats, the layer's mean entropy at T tokens; λ is then
            sqrt((ln N - H_T) / (ln T - H_T) / D), see `entropy_scale`. Only with `train_tokens`.
        num_tokens: N for the rule; Nk by default. Only with `train_tokens`. An int tensor (B,) on the device of query
            gives each sample λ from its own N, as in a padded batch. The kernel computes it. The elements are not
            checked: where ln N is at most H_T, λ is 0, and every key has the same weight; so it is for N = 1 with any
            H_T.
        layout: "bhnd", or "bnhd" for query, key, value and the output with the axes (B, N, H, D). Neither is copied;
            only a tensor whose last axis is not contiguous is.
        return_entropy: also return the entropy of the softmax rows that were applied, after λ, mask and causality.
        return_lse: also return the log-sum-exp of the rows' scores.
        backend: "auto" (the Triton kernel on a GPU, "cpu" on the CPU), "triton", "cpu", or "reference" (textbook in
            float64, any device, O(Nq * Nk) memory). `explain` tells which one runs a call and why.

    Query, key and value may be jagged nested tensors (`torch.nested`, layout=torch.jagged) whose N is the ragged axis,
    as SDPA has them: from (B, N, H, D) by transpose(1, 2), or without it in layout "bnhd". The call goes to
    `attention_varlen`, λ of each sequence is from its own number of keys, and what is returned is jagged too. The
    lengths of the sequences are read, which waits for the device: in a CUDA graph use `attention_varlen`.

    Under `torch.autocast` query, key, value and a floating mask are cast as for SDPA; λ, entropy and lse are not.

    Returns:
        The output, in the shape of query with Dv for D, the dtype of query, and query's memory order; or, with
        `return_entropy` or `return_lse`, an `AttentionOutput` of out, entropy and lse. Entropy and lse are float32
        tensors (B, H, Nq) in nats (natural logarithm) in either layout.

        A row that sees no key has output 0, entropy 0 and lse -inf. A key hidden from every query cannot reach the
        output, even if its rows hold NaN.

    Raises:
        TypeError: an argument of a wrong type; a tensor that is nested in another way, sparse, or of a subclass whose
            data may not be what it means.
        ValueError: shapes, dtypes, devices or values that do not fit, named in the message; an input that requires
            grad while grad mode is on, or has a forward-mode tangent; N or T below 2 with `train_tokens`; a backend
            that cannot run the call.
    """
    if nested.is_jagged(query):
        return nested.attention_jagged(
            query, key, value, attn_mask, dropout_p, num_tokens, layout, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, train_tokens=train_tokens, train_entropy=train_entropy,
            return_entropy=return_entropy, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    arguments = checks.operator_arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, train_tokens, train_entropy, num_tokens,
        layout, return_entropy, return_lse, backend,
    )  # fmt: skip
    out, entropy, lse = torch.ops.entropy_attn.attention(*arguments)
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return answer(out, entropy, lse, return_entropy, return_lse)
