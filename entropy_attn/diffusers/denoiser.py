"""An enabled model: the hooks that mark out its calls, and what its layers have to know of them."""

from __future__ import annotations

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


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Registered:
    """Known to the operators by `token`; a copy, by deepcopy or pickle, gets its own."""

    token: torch.Tensor

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "token"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.token = ops.register(self)


class Denoiser(Registered):
    """A model whose layers are enabled. Its hooks open and close the scope that its layers look for."""

    def __init__(self, name: str, reading: Reading, context: Context):
        self.name, self.reading, self.context = name, reading, context
        self.handle: Any = None
        self.call: Any = None  # a Call, while the model runs
        self.last_call: Any = None
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

    def leave(self, module, args, output) -> None:
        """Forward hook, called also when the model raised."""
        self.call = None

    def begin(self, timestep: torch.Tensor | None, grid: Grid) -> None:
        moment, clock = None, self.context.clock
        if clock is not None and timestep is not None:
            moment = clock.tick(self.name, float(timestep.flatten()[0]))
        self.call = self.last_call = Call(grid, moment)

    @property
    def running(self) -> Call | None:
        """The call that runs. In a backward pass, where gradient checkpointing runs layers again, the last."""
        return self.last_call if self.call is None and in_backward() else self.call
