"""Hooks on modules under one number, the same on every module.

torch gives each hook a number of its own, and torch.compile compiles a block anew for each set of numbers: the repeated
blocks of a transformer, compiled one by one, would share no graph.
"""

from __future__ import annotations

import torch
from torch.utils.hooks import RemovableHandle

_NUMBER = -1  # torch counts from 0


def attach(module: torch.nn.Module, owner) -> list[RemovableHandle]:
    """Call ``owner.enter(module, args, kwargs)`` before the module, and ``owner.leave(module, args, output)`` after it.

    `leave` is called also when the module raised.
    """
    return [
        _put(owner.enter, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        _put(owner.leave, module._forward_hooks, module._forward_hooks_always_called),
    ]


def owner_on(module: torch.nn.Module):
    """Whose hooks a module has, or None."""
    return getattr(module._forward_pre_hooks.get(_NUMBER), "__self__", None)


def _put(hook, hooks: dict, flagged: dict) -> RemovableHandle:
    handle = RemovableHandle(hooks, extra_dict=flagged)
    handle.id = _NUMBER
    hooks[_NUMBER] = hook
    flagged[_NUMBER] = True
    return handle
