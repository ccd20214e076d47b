"""An enabled model: the hooks that mark out its calls, and what its layers have to know of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from entropy_attn.diffusers import compiling, ops
from entropy_attn.diffusers.clock import Clock, Moment
from entropy_attn.diffusers.models import Reading
from entropy_attn.diffusers.record import Session
from entropy_attn.diffusers.tokens import Grid


@dataclass
class Context:
    """What the layers of one handle share."""

    clock: Clock | None  # None where no one asks for the step
    session: Session | None  # of the entropy record, if one is wanted
    joint: str
    strict: bool


class Call(NamedTuple):
    """The call of a denoiser that runs: the size it sees and when."""

    grid: Grid
    moment: Moment | None


class _Thread(threading.local):
    """What a thread last called a model with; not part of a copy."""

    call: Call | None = None

    def __reduce__(self):
        return _Thread, ()


class Registered:
    """Known to the operators by `token`; a copy, by deepcopy or pickle, gets its own."""

    token: torch.Tensor

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "token"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.token = ops.register(self)


class Denoiser(Registered):
    """A model whose layers are enabled. Its hook notes what it is called with, for its layers."""

    def __init__(self, name: str, reading: Reading, context: Context):
        self.name, self.reading, self.context = name, reading, context
        self.handle: Any = None
        self._thread = _Thread()
        self._last_call: Call | None = None
        self.token = ops.register(self)
        self.call_token = self.token  # what the operators of its layers have to come after

    @compiling.without_graph
    def enter(self, module, args, kwargs) -> None:
        """Forward pre-hook."""
        if torch.compiler.is_compiling():
            self.call_token = torch.ops.entropy_attn.begin_call(*self._read(args, kwargs), self.token)
        else:
            self._enter_eagerly(args, kwargs)

    @torch.compiler.disable
    def _enter_eagerly(self, args, kwargs) -> None:
        self.begin(*self._read(args, kwargs))
        self.call_token = self.token

    def _read(self, args, kwargs) -> tuple[torch.Tensor | None, Grid]:
        timed = self.context.clock is not None
        timestep = torch.as_tensor(self.reading.timestep(args, kwargs)) if timed else None
        return timestep, self.reading.grid(args, kwargs)

    def begin(self, timestep: torch.Tensor | None, grid: Grid) -> None:
        moment, clock = None, self.context.clock
        if clock is not None and timestep is not None:
            moment = clock.tick(self.name, float(timestep.flatten()[0]))
        self._thread.call = self._last_call = Call(grid, moment)

    @property
    def call(self) -> Call | None:
        """The last call in this thread; in one that made none, as in a backward pass that runs layers again, of any."""
        return self._thread.call or self._last_call
