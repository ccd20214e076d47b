"""Steps: the run of a pipeline, the denoising step and the turn within it that a call of a denoiser belongs to."""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from dataclasses import dataclass, field

import torch

from entropy_attn.entropy.record import Moment


@dataclass
class _Progress:
    """How far one run has come."""

    run: int
    schedule: torch.Tensor | None = None  # the scheduler's timesteps: another tensor in every run
    timesteps: list[float] = field(default_factory=list)
    steps: int | None = None  # num_inference_steps
    order: int = 1  # timesteps a step
    position: int = 0  # of the current timestep among those seen
    timestep: float = math.nan
    repeats: int = 1  # positions with this timestep so far
    direction: float = 0.0
    turns: dict[str, int] = field(default_factory=dict)  # by denoiser
    samples: dict[str, weakref.ref] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step as the progress bar counts it. A step is `order` timesteps; a schedule may begin with extra ones."""
        begin = 0 if self.steps is None else max(0, len(self.timesteps) - self.steps * self.order)
        return max(0, self.position - begin) // self.order

    def advance(self, timestep: float) -> None:
        self.repeats = self.repeats + 1 if timestep == self.timestep else 1
        self.direction = timestep - self.timestep
        self.position, self.timestep, self.turns, self.samples = self.position + 1, timestep, {}, {}

    def is_next(self, timestep: float, denoiser: str, sample: torch.Tensor) -> bool:
        """Whether a call belongs to the next position, and not to the current one."""
        if timestep != self.timestep:
            return True
        seen = self.samples.get(denoiser)
        return seen is not None and seen() is not sample and self.repeats < self.occurrences(timestep)

    def occurrences(self, timestep: float) -> int:
        """How often the schedule has this timestep; where the model gets it in other units, the most it has any."""
        return self.timesteps.count(timestep) or max(map(self.timesteps.count, self.timesteps), default=1)


class Clock:
    """Tells runs and steps apart, by the scheduler of the pipeline that runs and the timesteps it gives the denoisers.

    A new schedule is a new run, a new timestep a new position in it. At one timestep, another sample is a new position
    if the schedule repeats that timestep (PNDM, Heun), else one more call of the same step (guidance by a second call).
    Without a pipeline on the stack there is no schedule: a new run begins when the timesteps turn back.
    """

    def __init__(self, runs: int = 0):
        self._runs = runs
        self._progress: weakref.WeakKeyDictionary[object, _Progress] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return Clock, (self._runs,)  # the pipeline of a copied model is not running

    def tick(self, denoiser: str, timestep: float, sample: torch.Tensor) -> Moment:
        """The moment of a call of `denoiser`."""
        scheduler = running_scheduler()
        key = threading.current_thread() if scheduler is None else scheduler
        with _lock:
            progress = self._progress.get(key)
            if progress is None or _is_new_run(progress, timestep, getattr(scheduler, "timesteps", None)):
                progress = self._progress[key] = self._new_run(scheduler, timestep)
            elif progress.is_next(timestep, denoiser, sample):
                progress.advance(timestep)
            progress.samples[denoiser] = weakref.ref(sample)
            turn = progress.turns.get(denoiser, 0)
            progress.turns[denoiser] = turn + 1
            return Moment(progress.run, progress.step, turn)

    def _new_run(self, scheduler, timestep: float) -> _Progress:
        run, self._runs = self._runs, self._runs + 1
        if scheduler is None:
            return _Progress(run, timestep=timestep)
        steps, order = getattr(scheduler, "num_inference_steps", None), getattr(scheduler, "order", 1)
        timesteps = scheduler.timesteps
        return _Progress(run, timesteps, torch.as_tensor(timesteps).tolist(), steps, order, timestep=timestep)


_lock = threading.Lock()


def _is_new_run(progress: _Progress, timestep: float, schedule) -> bool:
    if schedule is not None:
        return schedule is not progress.schedule
    return (timestep - progress.timestep) * progress.direction < 0


def running_scheduler():
    """The scheduler of the pipeline whose ``__call__`` is on the stack of this thread, or None.

    Neither a model nor its handle knows it: pipelines share models, and exchange their schedulers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            scheduler = getattr(frame.f_locals["self"], "scheduler", None)
            if getattr(scheduler, "timesteps", None) is not None:
                return scheduler
        frame = frame.f_back
    return None


def distinct_samples(sample: torch.Tensor) -> int:
    """How many images a batch holds: classifier-free guidance repeats all of them, once for each condition.

    Only the first channel (or token) is compared. Others may hold a condition, such as an image to edit.
    """
    latents = sample[:, 0]
    for images in range(1, len(latents)):
        if len(latents) % images == 0 and torch.equal(latents[images:], latents[:-images]):
            return images
    return len(latents)
