"""Which run of a pipeline and which denoising step a call of the denoiser belongs to."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple


class Moment(NamedTuple):
    """A call of a denoiser: the run and the step it is in, and which of the step's calls it is, all from 0."""

    run: int
    step: int
    turn: int


class Clock:
    """Tells runs and steps apart by the timesteps that the denoisers are called with.

    A new timestep is a new step. A new run begins when the pipeline's scheduler has a new schedule; where there is no
    pipeline, when the timesteps turn back.
    """

    def __init__(self, pipeline=None):
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._schedule = None
        self._run = self._step = -1
        self._timestep = math.nan  # of the last call
        self._direction = 0.0
        self._turns: dict[str, int] = {}

    def __getstate__(self):
        return {**self.__dict__, "_pipeline": None, "_schedule": None}  # a copy cannot know its own pipeline

    def tick(self, denoiser: str, timestep: float) -> Moment:
        schedule = self._current_schedule()
        if self._is_new_run(timestep, schedule):
            self._run, self._step, self._direction, self._turns = self._run + 1, 0, 0.0, {}
        elif timestep != self._timestep:
            self._direction = timestep - self._timestep
            self._step, self._turns = self._step + 1, {}
        self._timestep, self._schedule = timestep, schedule
        turn = self._turns.get(denoiser, 0)
        self._turns[denoiser] = turn + 1
        return Moment(self._run, self._step, turn)

    def _current_schedule(self):
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    def _is_new_run(self, timestep: float, schedule) -> bool:
        if self._run < 0:
            return True
        if schedule is not None or self._schedule is not None:
            return schedule is not self._schedule
        return (timestep - self._timestep) * self._direction < 0
