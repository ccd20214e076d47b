"""The handle that enabling returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from entropy_attn.diffusers import hooks, seam
from entropy_attn.diffusers.denoiser import Context, Denoiser
from entropy_attn.diffusers.layer import Layer
from entropy_attn.diffusers.record import EntropyRecord


class Plan(NamedTuple):
    """What is to be enabled in one model."""

    model: torch.nn.Module
    denoiser: Denoiser
    layers: dict[str, Layer]  # by the name of their module
    skipped: dict[str, str]  # why the others are left alone


class Handle:
    """What `enable` did to a pipeline or model, and the way back. A context manager; printed, a table of layers."""

    def __init__(self, title: str, context: Context, plans: Sequence[Plan]):
        self._title, self._context = title, context
        self._layers = [layer for plan in plans for layer in plan.layers.values()]
        self._skipped = [reason for plan in plans for reason in plan.skipped.values()]
        self._trained = {plan.denoiser.name: plan.denoiser.reading.train_latent for plan in plans}
        self._hooks: list = []  # torch's removable handles
        for plan in plans:
            plan.denoiser.handle = self
            self._hooks.append(hooks.before(plan.model, plan.denoiser.enter))
            for name, layer in plan.layers.items():
                module = plan.model.get_submodule(name)
                self._hooks += [hooks.before(module, layer.enter), hooks.after(module, layer.leave)]
        seam.install()
        self._enabled = True

    @property
    def entropy(self) -> EntropyRecord | None:
        """The entropy record, if enabled with `record_entropy`."""
        session = self._context.session
        return None if session is None else session.record

    @property
    def enabled(self) -> bool:
        return self._enabled

    def disable(self) -> None:
        """Take everything back: no hook stays, and PyTorch's SDPA with the last handle. May be called again."""
        if not self._enabled:
            return
        self._enabled = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if seam.scope().layer in self._layers:  # left there by an interrupt, which hooks do not hear of
            seam.scope().layer = None
        seam.uninstall()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def layers(self) -> list[dict]:
        """One dict a layer: `layer`, `tokens` N and `multiplier` λ √d of its last call, `train_tokens` T, `remarks`.

        N, T and the multiplier are None until the layer has run. T is None also for a layer that does not attend to the
        image, which keeps its trained scale.
        """
        return [_describe(layer) for layer in self._layers]

    def __str__(self) -> str:
        rows = self.layers()
        width = max(len(row["layer"]) for row in rows)
        state = "" if self._enabled else ", disabled"
        sizes = (f"{name} trained at {' x '.join(map(str, size))}".strip() for name, size in self._trained.items())
        lines = [
            f"entropy_attn on {self._title}{state}: {len(rows)} layers; {', '.join(sizes)} latent samples",
            f"{'layer':{width}}  {'T':>6}  {'N':>6}  λ√d",
        ]
        for row in rows:
            multiplier = "-" if row["multiplier"] is None else f"{row['multiplier']:.4f}"
            numbers = ("-" if row[key] is None else str(row[key]) for key in ("train_tokens", "tokens"))
            line = f"{row['layer']:{width}}  " + "  ".join(f"{n:>6}" for n in numbers) + f"  {multiplier}"
            lines.append("  ".join([line, *row["remarks"]]))
        lines += [f"skipped: {n} of {reason}" for reason, n in Counter(self._skipped).items()]
        return "\n".join(lines)

    def __setstate__(self, state: dict) -> None:
        """A copy of an enabled model, by deepcopy or pickle, is enabled, and this is its handle."""
        self.__dict__.update(state)
        if self._enabled:
            seam.install()


def _describe(layer: Layer) -> dict:
    last = layer.last
    tokens = None if last is None else last.tokens
    return {
        "layer": layer.name,
        "tokens": None if last is None else last.keys if tokens is None else tokens.num_tokens,
        "train_tokens": None if tokens is None else tokens.train_tokens,
        "multiplier": None if last is None else float(last.multiplier),
        "remarks": list(layer.remarks),
    }


def handle_on(model: torch.nn.Module) -> Handle | None:
    """The handle that a model is enabled by, if any."""
    owner = hooks.owner_on(model)
    return owner.handle if isinstance(owner, Denoiser) else None
