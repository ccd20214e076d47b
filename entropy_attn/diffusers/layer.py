"""An attention layer of an enabled model: the hooks that mark out its calls, and what it does in the place of SDPA."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any, NamedTuple

import torch

from entropy_attn import op  # noqa: F401 (registers the operator)
from entropy_attn.backends import triton_obstacle
from entropy_attn.diffusers import compiling, ops, seam
from entropy_attn.diffusers.clock import Moment
from entropy_attn.diffusers.denoiser import Context, Denoiser, Registered
from entropy_attn.diffusers.matching import Matcher
from entropy_attn.diffusers.rule import Rule
from entropy_attn.diffusers.tokens import Grid, Tokens, match_tokens


class Seen(NamedTuple):
    """What a layer last did. Without tokens it attended to something else than the image's."""

    keys: int
    tokens: Tokens | None
    multiplier: float | torch.Tensor


class Layer(Registered):
    """A self- or joint-attention module: its rule, and its attention while its denoiser runs."""

    def __init__(self, name: str, denoiser: Denoiser, rule: Rule, trained_scale: float | None):
        self.name, self.denoiser, self.trained_scale = name, denoiser, trained_scale
        self.set_rule(rule)
        self.last: Any = None  # Seen, once it ran
        self.remarks: list[str] = []
        self._held_scale: float | None = None  # of the module, while it has a multiplied one
        self.token = ops.register(self)

    def set_rule(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher = Matcher(rule) if rule.match_entropy else None

    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        if not torch.compiler.is_compiling() and self.denoiser.call is None:
            return
        here = seam.scope()
        here.layer, here.reached = self, False
        if not torch.compiler.is_compiling() and not _names_used_by(module.processor) & _BY_SEAM:
            self._scale_module(module, args, kwargs)

    def leave(self, module, args, output) -> None:
        """Forward hook, called also when the module raised; it then has no output."""
        here = seam.scope()
        if here.layer is not self:
            return
        here.layer = None
        by_module = self._held_scale is not None
        if by_module:
            module.scale, self._held_scale = self._held_scale, None
        if not here.reached and output is not None:
            self._missed(module, by_module)

    def multiplier_for(self, queries: int, keys: int) -> float | torch.Tensor:
        """λ / λ₀ for a call with so many queries and keys, noted in `last`."""
        call, reading = self.denoiser.call, self.denoiser.reading
        if call is None:  # a layer called by itself
            return 1.0
        tokens = match_tokens(call.grid, reading.train_grid, reading.strides, queries, keys, self.context.joint)
        if tokens is None:
            self._remark(f"trained scale: {keys} keys do not fit the model's input {_by(call.grid)}")
        self.last = Seen(keys, tokens, self._rule_for(tokens, call.moment))
        return self.last.multiplier

    def _rule_for(self, tokens: Tokens | None, moment: Moment | None) -> float | torch.Tensor:
        if tokens is None or not self.rule.applies_at(None if moment is None else moment.step):
            return 1.0
        if self.matcher is None or moment is None or tokens.num_tokens == tokens.train_tokens:
            return self.rule.multiplier_for(tokens)
        return self.matcher.multiplier_for(moment, tokens)

    def multiplier_elsewhere(self, queries: int, keys: int) -> float | torch.Tensor:
        """λ / λ₀ for whoever computes the attention in our place, and multiplies the query by it."""
        if self.observes:
            self._missing("entropy not recorded: another backend computes the attention")
        else:
            self._remark("another backend computes the attention, with the query multiplied in place of λ")
        return self.multiplier_for(queries, keys)

    def attend(self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> torch.Tensor:
        """SDPA with λ for the scale, its entropy recorded."""
        multiplier = self.multiplier_for(query.shape[-2], key.shape[-2])
        if scale is not None and self.trained_scale is not None and scale != self.trained_scale:
            multiplier = self._leave_scaled(scale, self.trained_scale)
        untouched = not isinstance(multiplier, torch.Tensor) and multiplier == 1.0
        obstacle = None if untouched and not self.observes else _obstacle(query, key, value, attn_mask, dropout_p)
        if obstacle is not None and self.observes:
            self._missing(f"entropy not recorded: {obstacle}")
        if obstacle is not None or (untouched and not self.observes):
            if isinstance(multiplier, torch.Tensor):
                query = query * multiplier
            elif not untouched:
                scale = multiplier * _scale(query, scale)
            return seam.pytorch_sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        scale = multiplier * _scale(query, scale)
        scale, scale_tensor = (None, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        out, entropy, _ = torch.ops.entropy_attn.attention(
            query, key, value, attn_mask, scale_tensor, scale, None, 0.0, None, None,
            is_causal, self.observes, False, "auto",
        )  # fmt: skip
        if self.observes:
            self._observe(entropy)
        return out

    def _leave_scaled(self, scale: float, trained_scale: float) -> float:
        """The multiplier for a processor that passes a scale other than the trained one: it did what we would do."""
        self.last = self.last._replace(multiplier=scale / trained_scale)
        self._remark("scaled by the model itself, and left so")
        return 1.0

    @property
    def observes(self) -> bool:
        """Whether the entropy is wanted, as it is once of each call of the denoiser."""
        return self.denoiser.call is not None and (self.context.session is not None or self.matcher is not None)

    def _observe(self, entropy: torch.Tensor) -> None:
        if self.matcher is not None:
            self.matcher.observe(entropy)
        if self.context.session is not None:
            call: Any = self.denoiser.call
            self.context.session.add(self.name, call.moment, self.last, entropy)

    def _scale_module(self, module, args, kwargs) -> None:
        """For processors that do not come by the seam, but may read ``attn.scale``."""
        if self.trained_scale is None:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        queries = hidden_states.shape[1] if hidden_states.dim() == 3 else hidden_states.shape[2:].numel()
        keys = queries if text is None or text is hidden_states else queries + text.shape[1]
        if self._held_scale is None:  # else an interrupt, which hooks do not hear of, left the module with it
            self._held_scale = module.scale
        module.scale = float(self.multiplier_for(queries, keys)) * self._held_scale

    def _missed(self, module, by_module: bool) -> None:
        """The module ran, with a multiplied scale if `by_module`, and its attention did not come by the seam."""
        processor = type(module.processor).__name__
        if torch.compiler.is_compiling():
            compiling.refuse(self.name, processor)
            return
        if not (by_module and _names_used_by(module.processor) & _READS_SCALE):
            if by_module and self.last.multiplier == 1.0 and not self.observes:
                return  # the trained scale was right
            self.last = self.last and self.last._replace(multiplier=1.0)
            self._missing(f"{processor} cannot be given a scale: the trained one was used")
        elif self.observes:
            self._missing(f"entropy not recorded: {processor} computes its own attention")
        else:
            self._remark(f"{processor} computes its own attention, with λ")

    def _missing(self, remark: str) -> None:
        """Say what cannot be had: in an error if strict, else in a warning, once."""
        if self.context.strict:
            raise RuntimeError(f"{self.name}: {remark}")
        if remark not in self.remarks:
            warnings.warn(f"entropy_attn: {self.name}: {remark}", RuntimeWarning, stacklevel=2)
        self._remark(remark)

    def _remark(self, remark: str) -> None:
        if remark not in self.remarks:
            self.remarks.append(remark)

    @property
    def context(self) -> Context:
        return self.denoiser.context

    @property
    def call_token(self) -> torch.Tensor:
        return self.denoiser.call_token


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _obstacle(query, key, value, attn_mask, dropout_p) -> str | None:
    """Why `attention` cannot take a call that SDPA can, or None."""
    if query.dim() != 4:
        return f"query has {query.dim()} axes"
    if dropout_p != 0:
        return "dropout"
    if seam.needs_grad(query, key, value, attn_mask):
        return "gradients are wanted"
    return None if query.device.type == "cpu" else triton_obstacle(query, value)


def _by(grid: Grid) -> str:
    return " x ".join(map(str, grid))


_BY_SEAM = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
_READS_SCALE = frozenset({"scale", "get_attention_scores"})


_names: dict[type, frozenset[str]] = {}


def _names_used_by(processor) -> frozenset[str]:
    """The names that a processor's code uses, by which its way of computing attention is told."""
    kind = type(processor)
    if kind not in _names:
        calls = (cls.__dict__.get("__call__") for cls in kind.__mro__)
        codes = (getattr(inspect.unwrap(call), "__code__", None) for call in calls if callable(call))
        _names[kind] = frozenset(name for code in codes if code is not None for name in code.co_names)
    return _names[kind]
