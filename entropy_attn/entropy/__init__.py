"""The entropy of a model's attention layers: its record with tables and plots, and the rules that λ follows.

Nothing here knows of Diffusers: `EntropyRecord` takes entropies from any loop over any model.
"""

from entropy_attn.entropy.record import EntropyRecord, EntropyTable, Moment, Session
from entropy_attn.entropy.tokens import Tokens

__all__ = ["EntropyRecord", "EntropyTable", "Moment", "Session", "Tokens"]
