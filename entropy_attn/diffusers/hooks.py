"""Hooks on modules under one number, the same on every module.

torch gives each hook a number of its own, and torch.compile compiles a block anew for each set of numbers: the repeated
blocks of a transformer, compiled one by one, would share no graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

_NUMBER = -1  # torch counts from 0


def before(module: torch.nn.Module, hook: Callable) -> RemovableHandle:
    """Call ``hook(module, args, kwargs)`` before the module."""
    return _put(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def after(module: torch.nn.Module, hook: Callable) -> RemovableHandle:
    """Call ``hook(module, args, output)`` after the module, also when it raised."""
    return _put(hook, module._forward_hooks, module._forward_hooks_always_called)


def owner_on(module: torch.nn.Module):
    """Whose method is called before a module, or None."""
    return getattr(module._forward_pre_hooks.get(_NUMBER), "__self__", None)


def _put(hook: Callable, hooks: dict, flagged: dict) -> RemovableHandle:
    handle = RemovableHandle(hooks, extra_dict=flagged)
    handle.id = _NUMBER
    hooks[_NUMBER] = hook
    flagged[_NUMBER] = True
    return handle
