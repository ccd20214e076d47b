"""An attention layer of an enabled model, and the model: the hooks that mark them out, and what a layer does."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from entropy_attn.attention import attention
from entropy_attn.backends import triton_obstacle
from entropy_attn.diffusers import ops, seam
from entropy_attn.diffusers.clock import Clock, Moment
from entropy_attn.diffusers.matching import Matcher
from entropy_attn.diffusers.models import Reading
from entropy_attn.diffusers.record import EntropyRecord
from entropy_attn.diffusers.rule import Rule
from entropy_attn.diffusers.tokens import Grid, Tokens, match_tokens


@dataclass
class Context:
    """What the layers of one handle share."""

    clock: Clock | None  # None where no one asks for the step
    record: EntropyRecord | None
    session: int | None  # of the record
    joint: str
    strict: bool


class Call(NamedTuple):
    """The call of a denoiser that runs: the size it sees and when."""

    grid: Grid
    moment: Moment | None


class _Registered:
    """Known to the operators by `token`; a copy, by deepcopy or pickle, gets its own."""

    token: torch.Tensor

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "token"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.token = ops.register(self)


class Denoiser(_Registered):
    """A model whose layers are enabled. Its hooks open and close the scope that its layers look for."""

    def __init__(self, name: str, reading: Reading, context: Context):
        self.name, self.reading, self.context = name, reading, context
        self.call: Call | None = None  # while the model runs
        self.token = ops.register(self)
        self.call_token = self.token  # what the operators of its layers have to come after

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        grid = self.reading.grid(args, kwargs)
        timestep = None
        if self.context.clock is not None:
            timestep = torch.as_tensor(self.reading.timestep(args, kwargs))
        if torch.compiler.is_compiling():
            self.call_token = torch.ops.entropy_attn.begin_call(timestep, grid, self.token)
        else:
            self.begin(timestep, grid)
            self.call_token = self.token

    def leave(self, module, args, output) -> None:
        """Forward hook, called also when the model raised."""
        self.call = None

    def begin(self, timestep: torch.Tensor | None, grid: Grid) -> None:
        clock = self.context.clock
        moment = None if clock is None else clock.tick(self.name, float(timestep.flatten()[0]))
        self.call = Call(grid, moment)


class Seen(NamedTuple):
    """What a layer last did. Without tokens it attended to something else than the image's."""

    keys: int
    tokens: Tokens | None
    multiplier: float | torch.Tensor


class Layer(_Registered):
    """A self- or joint-attention module: its rule, and its attention while its denoiser runs."""

    def __init__(self, name: str, denoiser: Denoiser, rule: Rule):
        self.name, self.denoiser = name, denoiser
        self.set_rule(rule)
        self.last: Seen | None = None
        self.remarks: list[str] = []
        self._trained_scale: float | None = None  # of the module, while it holds a multiplied one
        self.token = ops.register(self)

    def set_rule(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher = Matcher(rule) if rule.match_entropy else None

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        if self.denoiser.call is None and not torch.compiler.is_compiling():
            return
        if kwargs.get("base_sequence_length") is not None:
            self._remark_once("left alone: the pipeline scales it itself (pass proportional_attn=False to have it here)")
            return
        here = seam.scope()
        here.layer, here.reached = self, False
        if not torch.compiler.is_compiling() and not _names_in(type(module.processor)) & _BY_SEAM:
            self._scale_module(module, args, kwargs)

    def leave(self, module, args, output) -> None:
        """Forward hook, called also when the module raised; it then has no output."""
        here = seam.scope()
        if here.layer is not self:
            return
        here.layer = None
        if not here.reached and output is not None:
            self._missed(module)
        if self._trained_scale is not None:
            module.scale, self._trained_scale = self._trained_scale, None

    def multiplier_for(self, queries: int, keys: int) -> float | torch.Tensor:
        """λ / λ₀ for a call with so many queries and keys, noted in `last`."""
        call, reading = self.denoiser.call, self.denoiser.reading
        if call is None:  # a compiled layer called by itself
            return 1.0
        tokens = match_tokens(call.grid, reading.train_grid, reading.strides, queries, keys, self.context.joint)
        if tokens is None:
            self._remark_once(f"trained scale: {keys} keys do not fit the model's input {_by(call.grid)}")
            multiplier: float | torch.Tensor = 1.0
        elif not self.rule.applies_at(None if call.moment is None else call.moment.step):
            multiplier = 1.0
        elif self.matcher is None or tokens.num_tokens == tokens.train_tokens:
            multiplier = self.rule.multiplier_for(tokens)
        else:
            multiplier = self.matcher.multiplier_for(call.moment, tokens)
        self.last = Seen(keys, tokens, multiplier)
        return multiplier

    def multiplier_elsewhere(self, queries: int, keys: int) -> float | torch.Tensor:
        """λ / λ₀ for whoever computes the attention in our place, and multiplies the query by it."""
        if self.context.record is not None or self.matcher is not None:
            self._missing("entropy not recorded: another backend computes the attention")
        else:
            self._remark_once("another backend computes the attention, with the query multiplied in place of λ")
        return self.multiplier_for(queries, keys)

    @property
    def context(self) -> Context:
        return self.denoiser.context

    @property
    def call_token(self) -> torch.Tensor:
        return self.denoiser.call_token

    def attend(self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> torch.Tensor:
        """SDPA with λ for the scale, its entropy recorded."""
        multiplier = self.multiplier_for(query.shape[-2], key.shape[-2])
        if self._trained_scale is not None and scale is not None:
            multiplier = 1.0  # the processor passed on the module's scale, which has it already
        observed = self.context.record is not None or self.matcher is not None
        untouched = not isinstance(multiplier, torch.Tensor) and multiplier == 1.0
        obstacle = None
        if observed or not untouched:
            obstacle = _obstacle(query, key, value, dropout_p)
        if observed and obstacle is not None:
            self._missing(f"entropy not recorded: {obstacle}")
        if obstacle is not None or (untouched and not observed):
            if isinstance(multiplier, torch.Tensor):
                query = query * multiplier
            elif not untouched:
                scale = multiplier * _scale(query, scale)
            return seam.pytorch_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        result = attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=multiplier * _scale(query, scale),
            enable_gqa=enable_gqa, return_entropy=observed,
        )  # fmt: skip
        if not observed:
            return result
        self._observe(result.entropy)
        return result.out

    def _observe(self, entropy: torch.Tensor) -> None:
        if self.matcher is not None:
            self.matcher.observe(entropy)
        if self.context.record is not None:
            self.context.record.add(
                self.context.session, self.name, self.denoiser.call.moment, self.last, entropy
            )

    def _scale_module(self, module, args, kwargs) -> None:
        """For processors that do not come by the seam, but may read ``attn.scale``."""
        if not isinstance(getattr(module, "scale", None), float):
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        queries = hidden_states.shape[1] if hidden_states.dim() == 3 else hidden_states.shape[2:].numel()
        keys = queries if text is None or text is hidden_states else queries + text.shape[1]
        self._trained_scale = module.scale
        module.scale = float(self.multiplier_for(queries, keys)) * module.scale

    def _missed(self, module) -> None:
        """The module ran, and its attention did not come by the seam."""
        processor = type(module.processor)
        if torch.compiler.is_compiling():
            _not_compiled(self.name, processor.__name__)
        elif self._trained_scale is None or not _names_in(processor) & _READS_SCALE:
            self._missing(f"{processor.__name__} cannot be given a scale: the trained one was used")
        elif self.context.record is not None or self.matcher is not None:
            self._missing(f"entropy not recorded: {processor.__name__} computes its own attention")
        else:
            self._remark_once(f"{processor.__name__} computes its own attention, with λ")

    def _missing(self, remark: str) -> None:
        if self.context.strict:
            raise RuntimeError(f"{self.name}: {remark}")
        self._remark_once(remark, warn=True)

    def _remark_once(self, remark: str, warn: bool = False) -> None:
        if remark in self.remarks:
            return
        self.remarks.append(remark)
        if warn:
            warnings.warn(f"entropy_attn: {self.name}: {remark}", RuntimeWarning, stacklevel=2)


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _obstacle(query, key, value, dropout_p) -> str | None:
    """Why `attention` cannot take a call that SDPA can, or None."""
    if query.dim() != 4:
        return f"query has {query.dim()} axes"
    if dropout_p != 0:
        return "dropout"
    if seam.needs_grad(query, key, value):
        return "gradients are wanted"
    return None if query.device.type == "cpu" else triton_obstacle(query, value)


def _by(grid: Grid) -> str:
    return " x ".join(map(str, grid))


_BY_SEAM = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
_READS_SCALE = frozenset({"scale", "get_attention_scores"})


@functools.lru_cache
def _names_in(processor: type) -> frozenset[str]:
    """The names that a processor's code uses, by which its way of computing attention is told."""
    calls = (cls.__dict__.get("__call__") for cls in processor.__mro__)
    codes = (getattr(inspect.unwrap(call), "__code__", None) for call in calls if callable(call))
    return frozenset(name for code in codes if code is not None for name in code.co_names)


@functools.partial(torch.compiler.disable, reason="this attention processor cannot be compiled with λ")
def _not_compiled(name: str, processor: str) -> None:
    raise RuntimeError(
        f"{name}: {processor} cannot be compiled with λ; set_attn_processor(AttnProcessor2_0()) can be, or do not compile"
    )
