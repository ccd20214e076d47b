"""The public function for packed sequences."""

from __future__ import annotations

import torch

from entropy_attn import checks_varlen, op  # noqa: F401 (op registers the operator)
from entropy_attn.output import AttentionOutput, answer


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | torch.Tensor | None = None,
    enable_gqa: bool = False,
    train_tokens: int | torch.Tensor | None = None,
    train_entropy: float | torch.Tensor = 0,
    return_entropy: bool = False,
    return_lse: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> torch.Tensor | AttentionOutput:
    """`attention` for sequences of different lengths, packed one after the other in one tensor.

    The form is that of `torch.nn.attention.varlen.varlen_attn` and of flash-attn's `flash_attn_varlen_func`. Sequence
    i has the rows cu_seqlens_q[i] … cu_seqlens_q[i + 1] - 1 of query, and those of key and value by cu_seqlens_k. Its
    queries see its keys and no others. It is attention for inference: there is no backward pass.

    λ is one of: 1/sqrt(D) by default; `scale`; or with `train_tokens` the rule of Jin et al. (NeurIPS 2023, Eq. 7),
    sqrt(log_T N / D), where N is the number of keys of each sequence. The kernel computes it from cu_seqlens_k.

    On a GPU nothing is read by the host, and the grid follows from shapes and max_seqlen_q alone. A CUDA graph of a
    call therefore serves any cu_seqlens that are written to the same memory. The backends "cpu" and "reference" read
    cu_seqlens on the host.

    Args:
        query: (total_q, H, D), float16, bfloat16, float32, or float64 (CPU and reference only).
        key: (total_k, Hkv, D), same dtype and device.
        value: (total_k, Hkv, Dv), same dtype and device.
        cu_seqlens_q: int32 (S + 1,) on the device of query: where each of the S sequences begins, and the last one
            ends. It begins at 0 and does not fall. A sequence may be empty.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q: at least the length of the longest sequence of queries. The kernel's grid has programs for
            S * H sequences of that length.
        max_seqlen_k: the same for keys.
        is_causal: query i of a sequence sees its keys 0 … i, as in `attention`. Where a sequence has different numbers
            of queries and keys, flash-attn instead lets its last query see its last key (bottom-right alignment).
        scale: λ as a number, or as a float32 tensor of shape (), (S,) or (S, H) on the device of query, whose elements
            are not checked.
        enable_gqa: allow H to be a multiple of Hkv. Keys and values are not repeated in memory (but for "reference").
        train_tokens: T, the number of tokens the model was trained with, or an int32 or int64 tensor (S,) on the
            device of query with a T for each sequence. Not together with `scale`.
        train_entropy: H_T in nats, or a float tensor (S,). λ is then sqrt((ln N - H_T) / (ln T - H_T) / D), see
            `entropy_scale`. Only with `train_tokens`. Where ln N is at most H_T, λ is 0, and every key has the same
            weight; so it is for N = 1 with any H_T. Elements of tensors are not checked: T < 2, H_T < 0 and
            H_T >= ln T give λ = NaN.
        return_entropy: also return the entropy of the softmax rows that were applied.
        return_lse: also return the log-sum-exp of the rows' scores.
        check: check the values of cu_seqlens on a device as well, which waits for the device. On the CPU they are
            always checked. Values that are wrong and not checked give wrong numbers, but no access outside the tensors:
            the kernel clamps the bounds of a sequence to the tensor and its length to max_seqlen.
        backend: "auto" (the Triton kernel on a GPU, "cpu" on the CPU), "triton", "cpu", or "reference".

    Under `torch.autocast` query, key and value are cast as for SDPA; λ, entropy and lse are not.

    Returns:
        The output (total_q, H, Dv), contiguous, in the dtype of query; or, with `return_entropy` or `return_lse`, an
        `AttentionOutput` of out, entropy and lse. Entropy and lse are float32 tensors (H, total_q) in nats, the shape
        that flash-attn returns its log-sum-exp in.

        A row that sees no key, and a row that lies in no sequence, has output 0, entropy 0 and lse -inf.

    Raises:
        TypeError: an argument of a wrong type; a tensor that is nested, sparse, or of a subclass whose data may not be
            what it means.
        ValueError: shapes, dtypes, devices or values that do not fit, named in the message; an input that requires
            grad while grad mode is on, or has a forward-mode tangent; a backend that cannot run the call.
    """
    arguments = checks_varlen.operator_arguments(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale, enable_gqa,
        train_tokens, train_entropy, return_entropy, return_lse, check, backend,
    )  # fmt: skip
    out, entropy, lse = torch.ops.entropy_attn.attention_varlen(*arguments)
    return answer(out, entropy, lse, return_entropy, return_lse)
