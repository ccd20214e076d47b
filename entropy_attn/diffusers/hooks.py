"""How the adapter's hooks are put on a module and taken off it, so that torch.compile notices both."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Every hook of the adapter has this key; torch's own keys count from 0. Dynamo guards on the keys of hooks: blocks that
# are compiled one by one (compile_repeated_blocks) share a graph only if their keys are equal. With this key six blocks
# take 4 graphs, with torch's own 12.
_KEY = -1


def hook_call(module: torch.nn.Module, before: Callable, after: Callable) -> None:
    """Call `before` ahead of the module's forward, with its keyword arguments, and `after` behind it.

    `after` is also called if the module raised an `Exception`. Its output is then None.
    """
    module._forward_pre_hooks[_KEY] = before
    module._forward_pre_hooks_with_kwargs[_KEY] = True
    module._forward_hooks[_KEY] = after
    module._forward_hooks_always_called[_KEY] = True


def hook_output(module: torch.nn.Module, after: Callable) -> None:
    """Call `after` behind the module's forward. What it returns replaces the output, unless it is None."""
    module._forward_hooks[_KEY] = after


def unhook(module: torch.nn.Module) -> None:
    for hooks in (
        module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
        module._forward_hooks, module._forward_hooks_always_called,
    ):  # fmt: skip
        hooks.pop(_KEY, None)


def show_to_dynamo(module: torch.nn.Module) -> None:
    """Have Dynamo compile a module anew that was compiled without hooks.

    Dynamo guards on the ``forward`` of an instance, but not on hooks where there were none: the compiled model would go
    on running its old graph, without λ.
    """
    if "forward" not in module.__dict__:
        module.forward = module.forward  # type: ignore[method-assign]


def hide_from_dynamo(module: torch.nn.Module) -> None:
    """Take back `show_to_dynamo`."""
    if module.__dict__.get("forward") == type(module).forward.__get__(module):
        del module.forward
