"""Exact attention whose scale follows the number of tokens, and the entropy of every row in the same pass."""

from typing import TYPE_CHECKING

from entropy_attn import scales
from entropy_attn.attention import attention
from entropy_attn.explain import Explanation, explain
from entropy_attn.output import AttentionOutput
from entropy_attn.scale import entropy_scale
from entropy_attn.varlen import attention_varlen

if TYPE_CHECKING:
    from entropy_attn.diffusers.calibrating import calibrate
    from entropy_attn.diffusers.enable import disable, enable

__all__ = [
    "AttentionOutput",
    "Explanation",
    "attention",
    "attention_varlen",
    "calibrate",
    "disable",
    "enable",
    "entropy_scale",
    "explain",
    "scales",
]
__version__ = "0.2.0"

_OF_DIFFUSERS = ("calibrate", "disable", "enable")


def __getattr__(name: str):
    """The adapter for Diffusers is imported when it is first asked for."""
    if name not in (*_OF_DIFFUSERS, "diffusers"):
        raise AttributeError(f"module 'entropy_attn' has no attribute {name!r}")
    import importlib

    adapter = importlib.import_module("entropy_attn.diffusers")
    return adapter if name == "diffusers" else getattr(adapter, name)
