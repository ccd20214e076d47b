"""An enabled model: its forward hooks note the call in progress, from which its layers read N, T and the step."""

from __future__ import annotations

import threading
import weakref

import torch

from entropy_attn import sdpa
from entropy_attn.diffusers.hooks import hook_call, unhook
from entropy_attn.diffusers.layer import Context, DenoiserCall, Layer
from entropy_attn.diffusers.models import Reading, join
from entropy_attn.diffusers.steps import distinct_samples
from entropy_attn.entropy.rule import Rule


class _Thread(threading.local):
    call: DenoiserCall | None = None

    def __reduce__(self):
        return _Thread, ()


attached: weakref.WeakSet[Denoiser] = weakref.WeakSet()


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
