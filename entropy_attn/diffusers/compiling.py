"""How the adapter's Python behaves under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def without_graph(function: _F) -> _F:
    """Have a function that a compiled model calls from outside its graph run as it is, instead of as one more graph.

    Within a graph it is traced as any other function.
    """
    try:
        from torch._dynamo.eval_frame import skip_code
    except ImportError:  # then it is one more graph, a tiny one
        return function
    skip_code(function.__code__)
    return function


@functools.partial(torch.compiler.disable, reason="this attention processor cannot be compiled with λ")
def refuse(layer: str, processor: str) -> None:
    """Raise for a processor that does not come by SDPA; with fullgraph=True, torch.compile itself raises."""
    raise RuntimeError(
        f"{layer}: {processor} cannot be compiled with λ: set_attn_processor(AttnProcessor2_0()), or do not compile"
    )
