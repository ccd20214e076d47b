"""λ on the query: forward hooks multiply the query of a layer by λ √d, the ratio of λ to the trained scale 1/√d.

The hooks are on the modules that produce the query. The attention itself is not touched, so every attention processor
and backend works. A gain on the attention's output is on the modules that produce the value, in the same way.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_attn import sdpa
from entropy_attn.diffusers.hooks import hide_from_dynamo, hook_call, hook_output, show_to_dynamo, unhook
from entropy_attn.diffusers.models import own_multiplier, queries_and_keys, query_producers, value_producers
from entropy_attn.diffusers.steps import Clock
from entropy_attn.entropy.record import Moment, Session
from entropy_attn.entropy.rule import Matcher, Rule
from entropy_attn.entropy.tokens import Grid, Tokens, match_tokens, remembered_tokens

if TYPE_CHECKING:
    from entropy_attn.diffusers.scaling import Denoiser

_lock = threading.RLock()


@dataclass
class Context:
    """What the layers of one handle share."""

    attention: str  # who computes it: "auto", "fused", "model"
    joint: str
    strict: bool
    pipeline: weakref.ref | None
    session: Session | None = None  # where entropies are recorded, if they are
    clock: Clock | None = None  # None if neither a rule nor the record needs the denoising step

    @property
    def in_graph(self) -> bool:
        """Whether λ is being traced into a graph. It is not where a rule or the record needs the denoising step."""
        return torch.compiler.is_compiling() and self.clock is None

    def __getstate__(self):
        return {**self.__dict__, "pipeline": None}  # a copied model belongs to another pipeline, or to none


class DenoiserCall(NamedTuple):
    """A call of a denoiser in progress. `moment` and `images` are only known where the handle has a clock."""

    grid: Grid
    moment: Moment | None = None
    images: int = 0
    recomputed: bool = False  # gradient checkpointing runs the layers again in the backward pass


class Layer:
    """An enabled self- or joint-attention module: its rule, and the forward hooks that multiply its query and value."""

    def __init__(self, name: str, module: torch.nn.Module, denoiser: Denoiser, rule: Rule):
        self.name, self.module, self.denoiser, self.context = name, module, denoiser, denoiser.context
        self.set_rule(rule)
        # Of the last call. A call in a graph leaves no multiplier and no gain: `describe` computes them from N and T.
        self.tokens: Tokens | None = None
        self.multiplier: float | torch.Tensor | None = None
        self.gain: float | torch.Tensor | None = None
        self.remarks: dict[str, None] = {}  # each once, in order
        self._hooked: list[tuple[torch.nn.Module, Callable]] = []

    def set_rule(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher = Matcher(rule) if rule.match_entropy else None

    def describe(self) -> dict:
        """The row of this layer in `Handle.layers`."""
        num_tokens, train_tokens = self.tokens or (None, None)
        multiplier, gain = self.multiplier, self.gain
        if self.tokens is not None:
            multiplier = float(self.rule.multiplier_for(self.tokens) if multiplier is None else multiplier)
            gain = float(self.rule.gain_for(self.tokens) if gain is None else gain)
        return {
            "layer": self.name,
            "tokens": num_tokens,
            "train_tokens": train_tokens,
            "multiplier": multiplier,
            "gain": gain,
            "remarks": list(self.remarks),
        }

    @property
    def wants_entropy(self) -> bool:
        return self.context.session is not None or self.matcher is not None

    def attach(self) -> None:
        hook_call(self.module, self.enter, self.leave)
        show_to_dynamo(self.module)
        self.follow_projections()

    def detach(self) -> None:
        for projection, _ in self._hooked:
            unhook(projection)
        if self.denoiser.is_attached:
            unhook(self.module)
            hide_from_dynamo(self.module)
        self._hooked = []

    @torch.compiler.assume_constant_result  # Dynamo runs it while tracing: the hooks are right before they are traced
    def follow_projections(self) -> int:
        """Hook the modules that produce query and value now. LoRA wraps them, fuse_qkv_projections replaces them."""
        hooks = self._hooks()
        if hooks != self._hooked:
            with _lock:
                for projection, _ in self._hooked:
                    unhook(projection)
                for projection, hook in hooks:
                    hook_output(projection, hook)
                self._hooked = hooks
        return len(hooks)

    def _hooks(self) -> list[tuple[torch.nn.Module, Callable]]:
        """The modules to hook, each with its forward hook. The value is left alone where there is no gain."""
        hooks: dict[torch.nn.Module, Callable] = {
            producer: self.scale_first_third if fused else self.scale_query
            for producer, fused in query_producers(self.module)
        }
        for producer, fused in value_producers(self.module) if self.rule.gain_exponent else ():
            alone = self.scale_last_third if fused else self.scale_value
            hooks[producer] = self.scale_outer_thirds if producer in hooks else alone
        return list(hooks.items())

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        self.follow_projections()
        queries, keys = queries_and_keys(args, kwargs)
        own, traced = own_multiplier(kwargs, keys), torch.compiler.is_compiling()
        if self.context.in_graph:
            device = (args[0] if args else kwargs["hidden_states"]).device
            self._begin(queries, keys, own, traced, device)
        else:
            sdpa.scope().cut = traced
            self._begin_eagerly(queries, keys, own, traced)

    def _begin(self, queries: int, keys: int, own: float | None, traced: bool, device=None) -> None:
        """Note the call of the layer and its multiplier. In a graph `device` is given, and the sizes are symbols."""
        sdpa.scope().call = None
        call = self.denoiser.running_call(traced)
        if call is None:  # the layer is called outside of its model
            return
        reading, match = self.denoiser.reading, remembered_tokens if device is None else match_tokens
        tokens = match(call.grid, reading.train_grid, reading.strides, queries, keys, self.context.joint)
        if tokens.train_tokens is None:
            self.report(f"trained scale: {keys} keys do not fit the model's input {' x '.join(map(str, call.grid))}")
        multiplier: float | torch.Tensor = 1.0
        gain: float | torch.Tensor = 1.0
        self.tokens, self.multiplier, self.gain = tokens, own, 1.0
        if own is None:
            multiplier = self._multiplier(tokens, call.moment, device)
            gain = self.rule.gain_for(tokens, device) if self.rule.applies_at(call.moment) else 1.0
            self.multiplier, self.gain = (multiplier, gain) if device is None else (None, None)
        elif device is None:
            self.remarks["scaled by the model itself, and left so"] = None
        observe = None
        if self.wants_entropy and not call.recomputed:
            observe = functools.partial(self._observe, call, tokens, self.multiplier)
        sdpa.scope().call = sdpa.LayerCall(
            self.module, multiplier, self.context.attention, observe, self.report, keys, traced, gain
        )

    _begin_eagerly = torch.compiler.disable(_begin)

    def _multiplier(self, tokens: Tokens, moment: Moment | None, device) -> float | torch.Tensor:
        if not self.rule.applies_at(moment):
            return 1.0
        if self.matcher is None or moment is None or tokens.train_tokens in (None, tokens.num_tokens):
            return self.rule.multiplier_for(tokens, device)
        return self.matcher.multiplier_for(moment, tokens)

    def _observe(self, call: DenoiserCall, tokens: Tokens, multiplier, entropy: torch.Tensor) -> None:
        assert call.moment is not None
        if self.matcher is not None and tokens.train_tokens is not None:
            self.matcher.observe(call.moment, entropy)
        if self.context.session is not None:
            self.context.session.add(self.name, call.moment, tokens, entropy, multiplier, call.images)

    def scale_query(self, producer, args, output):
        """Forward hook of a module that produces a query."""
        return self._scaled(output) if self.context.in_graph else self._scaled_eagerly(output)

    def scale_value(self, producer, args, output):
        """Forward hook of a module that produces a value. The attention's output is linear in it."""
        return self._gained(output) if self.context.in_graph else self._gained_eagerly(output)

    def scale_first_third(self, producer, args, output):
        """Forward hook of a module that produces query, key and value in one tensor."""
        query, rest = output.tensor_split((output.shape[-1] // 3,), dim=-1)
        scaled = self.scale_query(producer, args, query)
        return None if scaled is None else torch.cat([scaled, rest], dim=-1)

    def scale_last_third(self, producer, args, output):
        """Forward hook of a module that produces query, key and value, where the query has a norm behind it."""
        rest, value = output.tensor_split((output.shape[-1] // 3 * 2,), dim=-1)
        scaled = self.scale_value(producer, args, value)
        return None if scaled is None else torch.cat([rest, scaled], dim=-1)

    def scale_outer_thirds(self, producer, args, output):
        """Forward hook of a module that produces query, key and value, of which it scales the query and the value."""
        first = self.scale_first_third(producer, args, output)
        last = self.scale_last_third(producer, args, output if first is None else first)
        return first if last is None else last

    def _scaled(self, query: torch.Tensor) -> torch.Tensor | None:
        call = sdpa.running_call()
        if call is None or call.module is not self.module:
            return None
        call.scaled += 1
        return None if call.is_unscaled else query * call.multiplier

    def _gained(self, value: torch.Tensor) -> torch.Tensor | None:
        call = sdpa.running_call()
        if call is None or call.module is not self.module:
            return None
        call.gained += 1
        return None if call.has_no_gain else value * call.gain

    _scaled_eagerly = torch.compiler.disable(_scaled)
    _gained_eagerly = torch.compiler.disable(_gained)

    def leave(self, module, args, output) -> None:
        """Forward hook, also called if the module raised an `Exception`; it then has no output."""
        if self.context.in_graph:
            self._end(output is not None)
        else:
            sdpa.scope().cut = False
            self._end_eagerly(output is not None)

    def _end(self, finished: bool) -> None:
        """Report what the attention processor made impossible: a query or an SDPA call that no hook has seen."""
        call = sdpa.running_call()
        sdpa.scope().call = None
        if call is None or not finished:
            return
        processor = type(self.module.processor).__name__
        if call.scaled == 0 and not call.is_unscaled:
            self.multiplier = 1.0
            self.report(f"trained scale: {processor} makes its query without the module's own projection and norm")
        if call.gained == 0 and not call.has_no_gain:
            self.gain = 1.0
            self.report(f"no gain: {processor} makes its value without the module's own projection")
        if call.attended == 0 and call.missed:
            self.report(f"{call.missed}: {processor} did not call F.scaled_dot_product_attention over {call.keys} keys")

    _end_eagerly = torch.compiler.disable(_end)

    @torch.compiler.disable(reason="λ or the entropy is missing in a layer")
    def report(self, remark: str) -> None:
        """Raise RuntimeError if strict. Else warn, once for each remark."""
        if self.context.strict:
            raise RuntimeError(f"{self.name}: {remark}")
        if remark not in self.remarks:
            warnings.warn(f"entropy_attn: {self.name}: {remark}", RuntimeWarning, stacklevel=2)
        self.remarks[remark] = None
