"""The rules beyond the paper that `enable` does not have, as forward hooks on an embedded pipeline's self-attention.

A hook on `to_q` multiplies the query, which is a multiple of the scale. A hook on `to_v` multiplies the value, which is
a gain on the attention's output, since the output is linear in the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pixels import PixelPipeline

from entropy_attn.diffusers import EntropyRecord
from entropy_attn.entropy.rule import Rule
from entropy_attn.entropy.tokens import Tokens
from evaluation import rules

GLOBAL_SLOPE = 0.7  # a head is global if its entropy grows at least this much with ln N
HEAD_BOUNDS = (0.5, 2.0)  # of the multiplier of a head, near ln N = H
ULTRA_STRENGTH, ULTRA_POWER = 0.3, 2
FINE_TOKENS = 256  # T of the fine levels
EARLY_SHARE = 1 / 3  # of the denoising steps
TEMPERATURE = 0.7  # multiplies the query of the weaker prediction
UNGUIDED = f"{rules.TEMPERATURE} needs guidance, a guidance_scale other than 1"


class Heads(NamedTuple):
    """N of a layer, and the mean entropy of each of its heads."""

    tokens: int
    entropies: list[float]


class Entropies(NamedTuple):
    """The entropies with the original scale, by layer, at the trained size and at the size that is drawn."""

    trained: dict[str, Heads]
    drawn: dict[str, Heads]


def heads_of(record: EntropyRecord) -> dict[str, Heads]:
    """Layer -> its heads, from a record of images of one size."""
    found: dict[str, Heads] = {}
    for row in sorted(record.table(by=("layer", "head")), key=lambda row: row["head"]):
        found.setdefault(row["layer"], Heads(row["tokens"], [])).entropies.append(row["entropy"])
    return found


def slopes(layer: str, entropies: Entropies) -> list[float]:
    """dH / d ln N of each head, within 0 and 1."""
    trained, drawn = entropies.trained[layer], entropies.drawn[layer]
    run = math.log(drawn.tokens / trained.tokens)
    return [min(max((n - t) / run, 0.0), 1.0) for t, n in zip(trained.entropies, drawn.entropies, strict=True)]


def by_slope(layer: str, entropies: Entropies) -> list[float]:
    ratio = log_ratio(entropies.drawn[layer].tokens, entropies.trained[layer].tokens)
    return [ratio ** (0.5 * slope) for slope in slopes(layer, entropies)]


def of_global_heads(layer: str, entropies: Entropies) -> list[float]:
    ratio = log_ratio(entropies.drawn[layer].tokens, entropies.trained[layer].tokens)
    return [ratio**0.5 if slope >= GLOBAL_SLOPE else 1.0 for slope in slopes(layer, entropies)]


def by_head_entropy(layer: str, entropies: Entropies) -> list[float]:
    trained, (tokens, drawn) = entropies.trained[layer].entropies, entropies.drawn[layer]
    lowest, highest = HEAD_BOUNDS
    multipliers = []
    for at_trained, now in zip(trained, drawn, strict=True):
        wanted, distance = math.log(tokens) - at_trained, math.log(tokens) - now
        ratio = max(wanted, 0.0) / max(distance, 1e-6)
        multipliers.append(min(max(math.sqrt(ratio), lowest), highest))
    return multipliers


def ultra(layer: str, entropies: Entropies) -> list[float]:
    if entropies.drawn[layer].tokens < entropies.trained[layer].tokens:
        return [1.0] * len(entropies.drawn[layer].entropies)
    # Layers differ in N, so entropies are compared as shares of ln N.
    shares = {name: [H / math.log(tokens) for H in heads] for name, (tokens, heads) in entropies.drawn.items()}
    every = [share for heads in shares.values() for share in heads]
    lowest, highest = min(every), max(every)
    width = max(highest - lowest, 1e-6)
    return [1 + ULTRA_STRENGTH * ((highest - share) / width) ** ULTRA_POWER for share in shares[layer]]


def log_ratio(num_tokens: int, train_tokens: int) -> float:
    """log_T N, or 1 where a logarithm is 0."""
    return float(Rule(exponent=1.0).multiplier_for(Tokens(num_tokens, train_tokens)))


@dataclass(frozen=True)
class Recipe:
    """What a rule multiplies the query and the value of a layer by. At N = T only the last two fields matter."""

    exponent: float = 0.0  # of log_T N, on the query
    heads: Callable[[str, Entropies], list[float]] | None = None  # a multiplier of the query for each head
    early: bool = False  # the query in the first steps only
    fading: bool = False  # the query's multiplier goes to 1 with the timestep
    levels: str | None = None  # "fine" or "coarse": the query in these layers only
    constant_gain: float = 1.0  # on the value
    temperature: bool = False  # of the prediction without condition, which gets the condition


RECIPES = {
    "heads": Recipe(heads=by_slope),
    "global heads": Recipe(heads=of_global_heads),
    "head entropy": Recipe(heads=by_head_entropy),
    "ultra": Recipe(heads=ultra),
    "early": Recipe(exponent=2.0, early=True),
    "fading": Recipe(exponent=2.0, fading=True),
    "levels fine": Recipe(exponent=2.0, levels="fine"),
    "levels coarse": Recipe(exponent=2.0, levels="coarse"),
    rules.TEMPERATURE: Recipe(temperature=True),
    **{f"constant gain {g:g}": Recipe(constant_gain=g) for g in rules.CONSTANT_GAINS},
}


def recipe_of(rule: str) -> Recipe:
    """The recipe of a rule by its name. Raises ValueError if there is none."""
    if rule not in RECIPES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RECIPES))}, got {rule!r}")
    return RECIPES[rule]


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError unless it is an embedded pipeline."""
    if not isinstance(pipe, PixelPipeline):
        raise ValueError(f"the rules beyond the paper take an embedded pipeline, got a {type(pipe).__name__}")


@contextmanager
def applied(pipe: Any, recipe: Recipe, entropies: Entropies | None = None) -> Iterator[None]:
    """Apply a recipe to an embedded pipeline within a `with` block. Recipes with `heads` need the entropies.

    Raises:
        ValueError: another pipeline, or no entropies where they are needed; while drawing, temperature guidance of a
            call without guidance.
    """
    check_pipeline(pipe)
    if recipe.heads is not None and entropies is None:
        raise ValueError("a rule by heads needs their entropies")
    hooks, handles = Hooks(pipe, recipe, entropies), []
    try:
        handles.append(pipe.unet.register_forward_pre_hook(hooks.enter, with_kwargs=True))
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn1"):
                handles.append(module.to_q.register_forward_hook(hooks.scale_query(f"unet.{name}")))
                handles.append(module.to_v.register_forward_hook(hooks.scale_value))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Hooks:
    """The forward hooks of one recipe. `enter` notes the call of the denoiser, which the others read."""

    def __init__(self, pipe: PixelPipeline, recipe: Recipe, entropies: Entropies | None) -> None:
        self.recipe, self.entropies, self.scheduler = recipe, entropies, pipe.scheduler
        self.train_area = pipe.unet.config.sample_size**2
        self.area = self.train_area
        self.time = 0.0  # the share of the trained timesteps
        self.step = 0.0  # the share of the denoising steps that are done

    def enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Forward pre-hook of the denoiser."""
        sample = args[0]
        self.area = sample.shape[-2] * sample.shape[-1]
        if self.recipe.early or self.recipe.fading:  # reading the timestep waits for the device
            timestep, timesteps = kwargs["timestep"].flatten()[0].item(), self.scheduler.timesteps.tolist()
            self.step = timesteps.index(timestep) / len(timesteps)
            self.time = timestep / self.scheduler.config.num_train_timesteps
        if not self.recipe.temperature:
            return None
        halves = sample.chunk(2)  # guidance calls the denoiser with every sample twice
        if len(sample) % 2 or not torch.equal(*halves):
            raise ValueError(UNGUIDED)
        with_condition, _ = kwargs["encoder_hidden_states"].chunk(2)
        return args, kwargs | {"encoder_hidden_states": torch.cat([with_condition, with_condition])}

    def tokens(self, args: tuple) -> tuple[int, int]:
        """N and T of a layer, from the input of one of its projections (B, N, C)."""
        N = args[0].shape[1]
        return N, round(N * self.train_area / self.area)

    def multiplier(self, layer: str, N: int, T: int) -> float | list[float]:
        """What the query is multiplied by: a number, or one for each head."""
        recipe = self.recipe
        outside = recipe.levels is not None and (T >= FINE_TOKENS) != (recipe.levels == "fine")
        if N == T or outside or (recipe.early and self.step >= EARLY_SHARE):
            return 1.0
        if recipe.heads is not None and self.entropies is not None:
            return recipe.heads(layer, self.entropies)
        full = log_ratio(N, T) ** recipe.exponent
        return 1 + self.time**2 * (full - 1) if recipe.fading else full

    def scale_query(self, layer: str) -> Callable[..., torch.Tensor]:
        """The forward hook of a layer's `to_q`."""

        def hook(module: torch.nn.Module, args: tuple, query: torch.Tensor) -> torch.Tensor:
            if self.recipe.temperature:
                stronger, weaker = query.chunk(2)
                return torch.cat([stronger, weaker * TEMPERATURE])
            multiplier = self.multiplier(layer, *self.tokens(args))
            if isinstance(multiplier, float):
                return query * multiplier
            by_head = torch.tensor(multiplier, dtype=query.dtype, device=query.device)
            return query * by_head.repeat_interleave(query.shape[-1] // len(by_head))

        return hook

    def scale_value(self, module: torch.nn.Module, args: tuple, value: torch.Tensor) -> torch.Tensor:
        """The forward hook of a layer's `to_v`."""
        return value * self.recipe.constant_gain
