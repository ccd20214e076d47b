"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionOutput(NamedTuple):
    """What attention returns when asked for more than the output; what was not asked for is None."""

    out: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor | None


def answer(out, entropy, lse, return_entropy: bool, return_lse: bool) -> torch.Tensor | AttentionOutput:
    """The output alone, or an `AttentionOutput` of what was asked for."""
    if not (return_entropy or return_lse):
        return out
    return AttentionOutput(out, entropy if return_entropy else None, lse if return_lse else None)
