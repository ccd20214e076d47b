"""λ on the query: forward hooks multiply the query of a layer by λ √d, the ratio of λ to the trained scale 1/√d.

The hooks are on the modules that produce the query. The attention itself is not touched, so every attention processor
and backend works.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch

from entropy_attn import sdpa
from entropy_attn.diffusers.hooks import hide_from_dynamo, hook_call, hook_output, show_to_dynamo, unhook
from entropy_attn.diffusers.models import Reading, join, own_multiplier, queries_and_keys, query_producers
from entropy_attn.diffusers.steps import Clock, distinct_samples
from entropy_attn.entropy.record import Moment, Session
from entropy_attn.entropy.rule import Matcher, Rule
from entropy_attn.entropy.tokens import Grid, Tokens, match_tokens, remembered_tokens


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


class _Thread(threading.local):
    call: DenoiserCall | None = None

    def __reduce__(self):
        return _Thread, ()


attached: weakref.WeakSet[Denoiser] = weakref.WeakSet()
_lock = threading.RLock()


class Denoiser:
    """An enabled model. Its forward hooks note the call in progress, which its layers read."""

    def __init__(
        self, name: str, model: torch.nn.Module, reading: Reading, context: Context,
        modules: dict[str, torch.nn.Module], rule: Rule,
    ):  # fmt: skip
        self.name, self.model, self.reading, self.context = name, model, reading, context
        self.layers = [Layer(join(name, part), module, self, rule) for part, module in modules.items()]
        self.is_attached = False
        self.is_in_block = False  # of the with statement of its handle
        self._thread = _Thread()
        self._kept: DenoiserCall | None = None  # the last call, for the backward pass of gradient checkpointing
        # The input of the call in progress. A graph reads N from it: Dynamo treats the sizes of a tensor as variables,
        # but an int attribute as a constant.
        self.sample: torch.Tensor | None = None

    def attach(self) -> None:
        self.is_attached = True
        self._register()
        hook_call(self.model, self.enter, self.leave)
        for layer in self.layers:
            layer.attach()

    def _register(self) -> None:
        attached.add(self)
        ours = self.context.attention == "fused" or (self.context.attention == "auto" and torch.cuda.is_available())
        if ours or any(layer.wants_entropy for layer in self.layers):
            sdpa.install(self)

    def detach(self) -> None:
        """Remove every hook. The denoiser leaves `attached` last, so that a call after an interrupted one finds it."""
        sdpa.release(self)
        for layer in self.layers:
            layer.detach()
        if self.is_attached:
            unhook(self.model)
        self.is_attached = False
        attached.discard(self)

    def __setstate__(self, state):
        """A copy of an enabled model, by deepcopy or pickle, is itself enabled."""
        self.__dict__.update(state)
        if self.is_attached:
            self._register()

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        if self.context.in_graph:
            self.sample = self.reading.sample(args, kwargs)
        else:
            self._enter(args, kwargs)

    @torch.compiler.disable
    def _enter(self, args, kwargs) -> None:
        self.sample = sample = self.reading.sample(args, kwargs)
        moment, images = None, 0
        if self.context.clock is not None:
            moment = self.context.clock.tick(self.name, self.reading.timestep(args, kwargs), sample)
            images = 0 if self.context.session is None else distinct_samples(sample)
        self._thread.call = DenoiserCall(self.reading.grid(sample), moment, images)

    def leave(self, module, args, output) -> None:
        """Forward hook, also called if the model raised an `Exception`."""
        self.sample = None
        if not self.context.in_graph:
            self._leave(module)

    @torch.compiler.disable
    def _leave(self, module) -> None:
        checkpoints = torch.is_grad_enabled() and getattr(module, "is_gradient_checkpointing", False)
        call, self._thread.call = self._thread.call, None
        self._kept = call._replace(recomputed=True) if call is not None and checkpoints else None

    def running_call(self, traced: bool) -> DenoiserCall | None:
        """The call in progress in this thread. If there is none, the last call, whose backward pass may be running."""
        in_graph = torch.compiler.is_compiling()
        call = None if in_graph else self._thread.call
        if in_graph or (call is None and self.sample is not None):  # the latter: only the model's hook was compiled
            return None if self.sample is None else DenoiserCall(self.reading.grid(self.sample))
        if call is not None and (traced or sdpa.is_running(self.model)):
            return call
        return self._kept if torch.is_grad_enabled() else None


class Layer:
    """An enabled self- or joint-attention module: its rule, and the forward hooks that multiply its query."""

    def __init__(self, name: str, module: torch.nn.Module, denoiser: Denoiser, rule: Rule):
        self.name, self.module, self.denoiser, self.context = name, module, denoiser, denoiser.context
        self.set_rule(rule)
        # Of the last call. A call in a graph leaves no multiplier: `describe` computes it from N and T.
        self.tokens: Tokens | None = None
        self.multiplier: float | torch.Tensor | None = None
        self.remarks: dict[str, None] = {}  # each once, in order
        self._producers: list[tuple[torch.nn.Module, bool]] = []

    def set_rule(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher = Matcher(rule) if rule.match_entropy else None

    def describe(self) -> dict:
        """The row of this layer in `Handle.layers`."""
        num_tokens, train_tokens = self.tokens or (None, None)
        multiplier = self.multiplier
        if self.tokens is not None:
            multiplier = float(self.rule.multiplier_for(self.tokens) if multiplier is None else multiplier)
        return {
            "layer": self.name,
            "tokens": num_tokens,
            "train_tokens": train_tokens,
            "multiplier": multiplier,
            "remarks": list(self.remarks),
        }

    @property
    def wants_entropy(self) -> bool:
        return self.context.session is not None or self.matcher is not None

    def attach(self) -> None:
        hook_call(self.module, self.enter, self.leave)
        show_to_dynamo(self.module)
        self.follow_query()

    def detach(self) -> None:
        for producer, _ in self._producers:
            unhook(producer)
        if self.denoiser.is_attached:
            unhook(self.module)
            hide_from_dynamo(self.module)
        self._producers = []

    @torch.compiler.assume_constant_result  # Dynamo runs it while tracing: the hooks are right before they are traced
    def follow_query(self) -> int:
        """Hook the modules that produce the query now. LoRA wraps the projection, fuse_qkv_projections replaces it."""
        producers = query_producers(self.module)
        if producers != self._producers:
            with _lock:
                for producer, _ in self._producers:
                    unhook(producer)
                for producer, fused in producers:
                    hook_output(producer, self.scale_first_third if fused else self.scale_query)
                self._producers = producers
        return len(producers)

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        self.follow_query()
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
        self.tokens, self.multiplier = tokens, own
        if own is None:
            multiplier = self._multiplier(tokens, call.moment, device)
            self.multiplier = multiplier if device is None else None
        elif device is None:
            self.remarks["scaled by the model itself, and left so"] = None
        observe = None
        if self.wants_entropy and not call.recomputed:
            observe = functools.partial(self._observe, call, tokens, self.multiplier)
        sdpa.scope().call = sdpa.LayerCall(
            self.module, multiplier, self.context.attention, observe, self.report, keys, traced
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

    def scale_first_third(self, producer, args, output):
        """Forward hook of a module that produces query, key and value in one tensor."""
        query, rest = output.tensor_split((output.shape[-1] // 3,), dim=-1)
        scaled = self.scale_query(producer, args, query)
        return None if scaled is None else torch.cat([scaled, rest], dim=-1)

    def _scaled(self, query: torch.Tensor) -> torch.Tensor | None:
        call = sdpa.running_call()
        if call is None or call.module is not self.module:
            return None
        call.scaled += 1
        return None if call.is_unscaled else query * call.multiplier

    _scaled_eagerly = torch.compiler.disable(_scaled)

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
