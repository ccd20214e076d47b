"""What the adapter knows of Diffusers' models: denoisers, their self-attention and its queries, N and T."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch

from entropy_attn.entropy.tokens import Grid, count

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")
CONTAINERS = ("ControlNetXSAdapter",)  # of weights that run inside the UNet of their pipeline
# Inputs that come as a sequence of 2 x 2 patches, and models without a size in their config: the latent they are for.
PACKED = {
    "FluxTransformer2DModel": 128, "FluxControlNetModel": 128, "ChromaTransformer2DModel": 128,
    "QwenImageTransformer2DModel": 128, "QwenImageControlNetModel": 128,
}  # fmt: skip
PACKED_STRIDE = 2
REFERENCED = ("Kontext", "Edit", "Layered")  # in the names of pipelines that pack other images with the one they make
UNKNOWN_TOKENS = ("AnyFlow", "MiniMaxH3", "WanAnimate2")  # models whose config reads like one that is known
# Halvings of the latent that a UNet may have.
UNET_STRIDES = tuple((2**level, 2**level) for level in range(6))
# How the names of modules begin that attend to text or to time, not to an image.
NOT_IMAGE = (
    "context_refiner", "token_refiner", "text_", "motion_modules", "temp", "time_", "transformer_in",
    "image_latents_temporal_encoder",
)  # fmt: skip
# The modules that produce a query: a norm if there is one, else the projection, alone or in one with key and value.
QUERIES = (("norm_q", "to_q", "to_qkv"), ("norm_added_q", "add_q_proj", "to_added_qkv"))
VALUES = (("to_v", "to_qkv"), ("add_v_proj", "to_added_qkv"))


@dataclass(frozen=True)
class Reading:
    """How to read the size and the timestep off a call of a model, and what its layers make of the size."""

    sample_name: str
    sample_position: int
    timestep_position: int
    axes: tuple[int, ...]  # of the sample, that its tokens lie along
    strides: tuple[Grid, ...]  # samples a token, along each axis; a UNet's layers have several
    train_latent: Grid
    train_grid: Grid  # the latent, or the tokens that it is packed to

    def sample(self, args: tuple, kwargs: dict) -> torch.Tensor:
        return kwargs[self.sample_name] if self.sample_name in kwargs else args[self.sample_position]

    def grid(self, sample: torch.Tensor) -> Grid:
        return tuple([sample.shape[axis] for axis in self.axes])

    def timestep(self, args: tuple, kwargs: dict) -> float:
        """The first one of the batch. Reading it synchronises with the device."""
        timestep: Any = kwargs["timestep"] if "timestep" in kwargs else args[self.timestep_position]
        return float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)


def queries_and_keys(args: tuple, kwargs: dict) -> tuple[int, int]:
    """How many queries an attention module is called for, and keys: text that is given beside the image joins them."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    queries = hidden_states.shape[1] if hidden_states.dim() == 3 else math.prod(hidden_states.shape[2:])
    if text is None or text is hidden_states:  # Lumina passes the image for both
        return queries, queries
    return queries, queries + text.shape[1]


def own_multiplier(kwargs: dict, keys: int) -> float | None:
    """λ √d of a model that applies the paper's rule by itself: Lumina's, with ``proportional_attn``."""
    base = kwargs.get("base_sequence_length")
    return None if base is None else math.sqrt(math.log(keys, base))


def query_producers(attn: torch.nn.Module) -> list[tuple[torch.nn.Module, bool]]:
    """The modules whose outputs are an attention module's queries, and whether key and value come with them."""
    found = []
    for norm, projection, fused in QUERIES:
        if isinstance(getattr(attn, norm, None), torch.nn.Module):
            found.append((getattr(attn, norm), False))
        else:
            found += _projections(attn, projection, fused)
    return found


def value_producers(attn: torch.nn.Module) -> list[tuple[torch.nn.Module, bool]]:
    """The modules whose outputs are an attention module's values, and whether query and key come with them."""
    return [found for projection, fused in VALUES for found in _projections(attn, projection, fused)]


def _projections(attn: torch.nn.Module, alone: str, fused: str) -> list[tuple[torch.nn.Module, bool]]:
    """A projection by itself, and the fused one. Unfusing leaves both in the module: the one that is called counts."""
    return [
        (getattr(attn, name), name == fused)
        for name in (alone, fused)
        if isinstance(getattr(attn, name, None), torch.nn.Module)
    ]


def find_denoisers(pipe_or_model) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that denoise, by component; a bare model is its own, without a name."""
    if isinstance(pipe_or_model, torch.nn.Module):
        return _parts("", pipe_or_model)
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe_or_model must be a Diffusers pipeline or a model, got {type(pipe_or_model).__name__}")
    found: dict[str, torch.nn.Module] = {}
    for name in DENOISERS:
        if isinstance(components.get(name), torch.nn.Module) and type(components[name]).__name__ not in CONTAINERS:
            found.update(_parts(name, components[name]))
    if not found:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no denoiser: none of its components is one of {', '.join(DENOISERS)}; "
            "pass the model itself"
        )
    return found


def _parts(name: str, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A model by name, or the several ControlNets that are in one."""
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{type(model).__name__} is not a denoiser: pass the model in it, its .module")
    nets = getattr(model, "nets", None)
    if isinstance(nets, torch.nn.ModuleList):
        return {join(name, str(number)): getattr(net, "_orig_mod", net) for number, net in enumerate(nets)}
    return {name: getattr(model, "_orig_mod", model)}  # the latter of what torch.compile returns


def join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def find_layers(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """The self- and joint-attention modules of a model by name, and of the others why they are left alone."""
    layers, skipped = {}, {}
    for name, module in sorted(model.named_modules(), key=_stage):
        if not (hasattr(module, "to_q") or hasattr(module, "to_qkv")):
            continue
        reason = _why_not(name, module)
        if reason is None:
            layers[name] = module
        else:
            skipped[name] = reason
    return layers, skipped


def _stage(named_module: tuple[str, torch.nn.Module]) -> int:
    """UNets name their middle block last, but run it between the others."""
    stages = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return stages.get(named_module[0].split(".")[0], 0)


def _why_not(name: str, module: torch.nn.Module) -> str | None:
    processor = type(getattr(module, "processor", None)).__name__
    with_text = "AddedKV" in processor and not getattr(module, "only_cross_attention", False)
    if getattr(module, "is_cross_attention", False) and not with_text:
        return "cross-attention"
    if "Linear" in processor + type(module).__name__:
        return "linear attention, which has no softmax"
    if any(part.startswith(NOT_IMAGE) for part in name.split(".")):
        return "not over an image"
    return None if hasattr(module, "processor") else "no attention processor"


def read_model(model: torch.nn.Module, pipeline, train_size) -> Reading:
    """How to read a model's calls, with the size it was trained at.

    `train_size` is in pixels for a pipeline, in latent samples for a bare model; None takes the model's own.
    """
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{type(model).__name__} runs in parallel over its tokens: disable that first")
    kind = type(model).__name__
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    sample_name = next((n for n in ("sample", "hidden_states") if n in parameters), None)
    if sample_name is None or "timestep" not in parameters:
        raise ValueError(f"{kind} is not a denoiser that is known: its forward takes no sample and timestep")
    axes, strides, stride = _layout(model, kind, sample_name, pipeline)
    if train_size is None:
        latent = _config_latent(model, kind, stride, pipeline)
    else:
        latent = _given_latent(train_size, stride, pipeline)
    _check_latent(kind, model, latent, stride)
    train_grid = (count(latent, stride),) if axes == (1,) else latent
    positions = parameters.index(sample_name), parameters.index("timestep")
    return Reading(sample_name, *positions, axes, strides, latent, train_grid)


def _layout(model, kind: str, sample_name: str, pipeline) -> tuple[tuple[int, ...], tuple[Grid, ...], Grid]:
    """The axes of the sample that tokens lie along, the strides of its layers, and that of one token of the latent."""
    if sample_name == "sample":
        return (-2, -1), UNET_STRIDES, (1, 1)
    if kind in PACKED:
        if any(part in type(pipeline).__name__ for part in REFERENCED):
            raise ValueError(
                f"{type(pipeline).__name__} puts the tokens of reference images beside those of the image, and they "
                "cannot be told apart: enable its transformer by itself to count them all as the image's"
            )
        return (1,), ((1,),), (PACKED_STRIDE, PACKED_STRIDE)
    patch = getattr(model.config, "patch_size", None)
    if not kind.startswith(UNKNOWN_TOKENS):
        if isinstance(patch, (tuple, list)) and len(patch) == 3:
            return (-3, -2, -1), (tuple(patch),), tuple(patch)
        if isinstance(patch, int) and getattr(model.config, "sample_size", None) is not None:
            return (-2, -1), ((patch, patch),), (patch, patch)
    raise ValueError(
        f"{kind} is not supported: it is not known how its tokens come from the latent. Its own attention can call "
        "entropy_attn.attention()"
    )


def _config_latent(model, kind: str, stride: Grid, pipeline) -> Grid:
    """The latent size that a model says it was trained at."""
    size = PACKED.get(kind) or getattr(model.config, "sample_size", None)
    if size is None and hasattr(pipeline, "unet"):  # a ControlNet has its UNet's
        size = getattr(pipeline.unet.config, "sample_size", None)
    if size is not None:
        return (size, size) if isinstance(size, int) else tuple(size)
    if len(stride) == 3:
        raise ValueError(
            f"{kind} makes videos, and its config has no trained size: pass train_size=(frames, height, width)"
        )
    unit = "latent samples" if pipeline is None else "pixels"
    raise ValueError(f"{kind} has no sample_size in its config: pass train_size, in {unit}")


def _given_latent(train_size, stride: Grid, pipeline) -> Grid:
    """`train_size` as latent samples."""
    size = (train_size, train_size) if isinstance(train_size, int) and len(stride) == 2 else train_size
    wanted = "an int or (height, width)" if len(stride) == 2 else "(frames, height, width)"
    if not isinstance(size, (tuple, list)) or not all(isinstance(n, int) and not isinstance(n, bool) for n in size):
        raise TypeError(f"train_size must be {wanted}, got {train_size!r}")
    if len(size) != len(stride) or min(size) < 1:
        raise ValueError(f"train_size must be {wanted}, of positive numbers, got {train_size!r}")
    if pipeline is None:
        return tuple(size)
    factor = pixels_per_sample(pipeline)
    if any(n % factor for n in size[-2:]):
        raise ValueError(
            f"train_size must be in pixels, a multiple of {factor}, what {type(pipeline).__name__} makes of one latent "
            f"sample; got {train_size!r}"
        )
    height, width = (n // factor for n in size[-2:])
    if len(size) == 2:
        return height, width
    return (size[0] - 1) // getattr(pipeline, "vae_scale_factor_temporal", 1) + 1, height, width


def pixels_per_sample(pipeline) -> int:
    """Pixels along an edge of one latent sample: 1 for a pipeline without a VAE."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if hasattr(pipeline, name):
            return getattr(pipeline, name)
    return 1


def _check_latent(kind: str, model, latent: Grid, stride: Grid) -> None:
    if len(latent) != len(stride):
        raise ValueError(f"{kind} has a sample_size of {latent} in its config, and {len(stride)} axes of tokens")
    if any(n % step for n, step in zip(latent, stride, strict=True)):
        raise ValueError(
            f"train_size contradicts {kind}: a latent of {latent} does not divide into its patches {stride}"
        )
    most = getattr(model.config, "pos_embed_max_size", None)
    if most is not None and max(latent) > most * stride[-1]:
        raise ValueError(
            f"train_size contradicts {kind}: a latent of {latent} is beyond its {most} x {most} positions "
            f"of {stride[-1]} x {stride[-1]} samples"
        )
    if count(latent, stride) < 2:
        raise ValueError(
            f"train_size must give at least 2 tokens, got {count(latent, stride)} from a latent of {latent}"
        )
