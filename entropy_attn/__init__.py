"""Exact attention whose scale follows the number of tokens, and the entropy of every row in the same pass."""

from entropy_attn.attention import AttentionOutput, attention
from entropy_attn.explain import Explanation, explain
from entropy_attn.scale import entropy_scale

__all__ = ["AttentionOutput", "Explanation", "attention", "entropy_scale", "explain"]
__version__ = "0.1.0"
