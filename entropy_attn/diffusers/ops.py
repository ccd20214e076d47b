"""What the layers of an enabled model do, as operators that torch.compile does not look into.

A graph that holds them has no N, T, λ, step or record in it: it takes the layer as a tensor with the layer's number,
and Python settles the rest when it runs. So it is compiled as often as the stock model, and layers of one kind share
it. `call` orders a layer's operators after the `begin_call` of the denoiser's call that they are part of.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from entropy_attn.backends import new_outputs

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(thing) -> torch.Tensor:
    """A name for a layer or denoiser that a graph can take as an input."""
    number = next(_numbers)
    _known[number] = thing
    return torch.tensor(number, dtype=torch.int64, device="cpu")


_library = torch.library.Library("entropy_attn", "FRAGMENT")


def _define(schema: str, implementation, fake) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"entropy_attn::{name}", fake, lib=_library)


def _begin_call(timestep, grid, denoiser):
    _known[int(denoiser)].begin(timestep, tuple(grid))
    return torch.zeros((), dtype=torch.int64)


_define(
    "begin_call(Tensor? timestep, SymInt[] grid, Tensor denoiser) -> Tensor",
    _begin_call,
    lambda timestep, grid, denoiser: torch.empty((), dtype=torch.int64),
)


def _layer_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, call, layer):
    result = _known[int(layer)].attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out, _, _ = new_outputs(query, value, False, False)
    return result if result.stride() == out.stride() else out.copy_(result)


_define(
    "layer_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa, Tensor call, Tensor layer) -> Tensor",
    _layer_attention,
    lambda query, key, value, *rest: new_outputs(query, value, False, False)[0],
)


def _layer_multiplier(query, num_keys, call, layer):
    multiplier = _known[int(layer)].multiplier_elsewhere(query.shape[-2], num_keys)
    return torch.as_tensor(multiplier, dtype=_precise(query), device=query.device).clone()


def _precise(query) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


_define(
    "layer_multiplier(Tensor query, SymInt num_keys, Tensor call, Tensor layer) -> Tensor",
    _layer_multiplier,
    lambda query, num_keys, call, layer: query.new_empty((), dtype=_precise(query)),
)
