"""λ from a number of tokens, computed in the kernel."""

import triton
import triton.language as tl


@triton.jit
def token_scale(num_tokens, train_tokens, train_entropy, C: tl.constexpr):
    """λ = sqrt((ln N - H_T) / (ln T - H_T) / D) for N = num_tokens, an integer; 0 where ln N is at most H_T, and NaN
    where T or H_T is out of its range. At N = T it is 1 / sqrt(D) exactly."""
    ROOT: tl.constexpr = C.head_dim**-0.5
    log_n = tl.log(tl.maximum(num_tokens, 1).to(tl.float32))
    log_t = tl.log(train_tokens)
    above = log_n - train_entropy
    ratio = tl.div_rn(tl.where(above < 0.0, 0.0, above), log_t - train_entropy)
    valid = (train_tokens >= 2.0) & (train_entropy >= 0.0) & (train_entropy < log_t)
    return tl.where(valid, tl.sqrt_rn(ratio), float("nan")) * ROOT
