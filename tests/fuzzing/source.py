"""Calls as Python source, which the fuzzer executes to make the tensors and prints when a call fails."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from fuzzing.broken import WAYS
from fuzzing.calls import FORWARDS, LARGEST, Call, Mask, Memory, Scale, Tensor

HEADER = """\
import math

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from entropy_attn import attention


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

"""


def build(call: Call) -> dict[str, Any]:
    """The arguments of `attention`, made by executing the call's lines."""
    names: dict[str, Any] = {}
    exec(HEADER + "\n".join(lines(call)), names)
    return names["arguments"]


def reproducer(call: Call, check: str) -> str:
    """A program that makes the call. `check` is Python code about its `result`, usually an assertion."""
    contexts = [f"torch.{call.grad}()"] + ['torch.autocast("cpu", torch.bfloat16)'] * call.autocast
    if call.broken:
        return HEADER + "\n".join((*lines(call), f"with {contexts[0]}:", textwrap.indent(check, "    "), ""))
    with_call = [f"with {', '.join(contexts)}:", "    result = attention(**arguments)", check, ""]
    return HEADER + "\n".join((*lines(call), *with_call))


def lines(call: Call) -> list[str]:
    """Lines of Python that assign the arguments of `attention` to `arguments`."""
    names = ("query", "key", "value")
    made = [_values(call, name, seed) for seed, name in enumerate(names, call.seed)]
    if call.mask is not None:
        made += _mask(call, call.mask)
    made += _planted(call)
    for name in names:
        made += _laid_out(name, call.shape(name), getattr(call, name).memory)
        if call.layout == "bnhd":
            made.append(f"{name} = {name}.transpose(1, 2)")
    if call.mask is not None:
        made += _laid_out("attn_mask", call.mask_shape(), call.mask.memory)
        if call.mask.axes < 4:
            made.append(f"attn_mask = attn_mask[{', '.join('0' * (4 - call.mask.axes))}]")
    made += _scale_tensor(call, call.scale)
    if call.requires_grad:
        made.append("query.requires_grad_()")
    if call.parameter:
        made.append("key = torch.nn.Parameter(key, requires_grad=False)")
    made.append(f"arguments = dict({', '.join(f'{n}={text}' for n, text in _arguments(call).items())})")
    if call.broken:
        made.append(WAYS[call.broken].line(call))
    return made


def _arguments(call: Call) -> dict[str, str]:
    given = {name: name for name in ("query", "key", "value")}
    if call.mask is not None:
        given["attn_mask"] = "attn_mask"
    elif call.causal == "is_causal":
        given["is_causal"] = "True"
    elif call.causal:
        given["attn_mask"] = f"{call.causal}({call.Nq}, {call.Nk})"
    given |= _scale(call, call.scale)
    if call.gqa or call.group != 1:
        given["enable_gqa"] = "True"
    if call.layout != "bhnd":
        given["layout"] = repr(call.layout)
    for flag, name in zip(call.flags, ("return_entropy", "return_lse"), strict=True):
        if flag:
            given[name] = "True"
    given["backend"] = repr(call.backend)
    return given


def _values(call: Call, name: str, seed: int) -> str:
    tensor: Tensor = getattr(call, name)
    shape = _held(call.shape(name), tensor.memory)
    numbers = f"normal{shape}".replace(")", f", seed={seed})")
    text = {
        "normal": numbers if tensor.size == 1 else f"({numbers} * {tensor.size!r})",
        "whole": f"({numbers}.round() * {tensor.size!r})",
        "offset": f"({numbers} + {tensor.size!r})",
        "constant": f"torch.full({shape}, {tensor.size!r})",
    }[tensor.kind]
    dtype = tensor.dtype or call.dtype
    if dtype == "float16" and abs(tensor.size) > 1e4:
        text += f".clamp({-LARGEST[dtype]}, {LARGEST[dtype]})"
    return f"{name} = {text}.to({_device(call)}torch.{dtype})"


def _device(call: Call) -> str:
    return "" if call.device == "cpu" else f"{call.device!r}, "


def _held(shape: tuple[int, ...], memory: Memory) -> tuple[int, ...]:
    """The shape before `expand`, with size 1 in the expanded axes."""
    return tuple(1 if a in memory.expand else n for a, n in enumerate(shape))


def _laid_out(name: str, shape: tuple[int, ...], memory: Memory) -> list[str]:
    made = []
    held = _held(shape, memory)
    plain = Memory(order=memory.order, expand=memory.expand, flip=memory.flip)
    if memory != plain or memory.order != FORWARDS:
        room = [n * step + skip for n, step, skip in zip(held, memory.steps, memory.skipped, strict=True)]
        inner = tuple(room[a] for a in memory.order)
        store = f"{name}.new_full(({math.prod(inner) + memory.offset},), math.nan)"
        if memory.offset:
            store += f"[{memory.offset}:]"
        store += f".view{inner}"
        if memory.order != FORWARDS:
            store += f".permute{tuple(memory.order.index(a) for a in FORWARDS)}"
        if memory != Memory(memory.order, memory.expand, offset=memory.offset, flip=memory.flip):
            store += (
                f"[{', '.join(f'{skip}::{step}' for skip, step in zip(memory.skipped, memory.steps, strict=True))}]"
            )
        made.append(f"{name} = {store}.copy_({name})")
    if memory.flip:
        made.append(f"{name} = {name}.flip({', '.join(map(str, memory.flip))})")
    if memory.expand:
        made.append(f"{name} = {name}.expand{tuple(shape)}")
    return made


def _mask(call: Call, mask: Mask) -> list[str]:
    shape, seed = _held(call.mask_shape(), mask.memory), call.seed + 3
    numbers = f"normal{shape}".replace(")", ", seed={})")
    hide = "False" if mask.dtype == "bool" else "-math.inf"
    device = "" if call.device == "cpu" else f", device={call.device!r}"
    if mask.dtype == "bool":
        made = [f"attn_mask = torch.ones({shape}, dtype=torch.bool{device})"]
    else:
        made = [f"attn_mask = ({numbers.format(seed)} * {mask.size!r}).to({_device(call)}torch.{mask.dtype})"]
    to_device = "" if call.device == "cpu" else f".to({call.device!r})"
    if mask.lowest:
        lowest = f"torch.finfo(torch.{mask.dtype}).min"
        made.append(f"attn_mask[({numbers.format(seed + 1)} > 1){to_device}] = {lowest}")
        if shape[2] > 1:
            made.append(f"attn_mask[:, :, 1::4] = {lowest}")
    if mask.hidden:
        made.append(f"attn_mask[({numbers.format(seed + 2)} < -0.5){to_device}] = {hide}")
    if mask.rows and shape[2] > 1:
        made.append(f"attn_mask[:, :, ::3] = {hide}")
    if mask.columns and shape[3] > 1:
        made.append(f"attn_mask[..., 1::3] = {hide}")
    if mask.padding and shape[3] > 1:
        made.append(f"attn_mask[..., {shape[3] * 2 // 3} :] = {hide}")
    if mask.everything:
        made.append(f"attn_mask[:] = {hide}")
    return made


def _planted(call: Call) -> list[str]:
    """Lines that write NaN or infinity to keys and values that no query sees, or NaN to one row of query or key."""
    made = []
    if call.poison:
        where = f":, :, {call.Nq}:"
        if call.mask is not None:
            mask = "(~attn_mask)" if call.mask.dtype == "bool" else "(attn_mask == -math.inf)"
            shape = (call.B, call.heads, call.Nq, call.Nk)
            made.append(f"unseen = {mask}.expand{shape}.all(2).unflatten(1, ({call.Hkv}, {call.group})).all(2)")
            where = "unseen"
        number = f"{call.poison[:-3]}math.{call.poison[-3:]}"
        made += [f"{name}[{where}] = {number}" for name in ("key", "value")]
    if call.nan_key:
        made.append(f"key[:, :, {call.Nk // 2}] = math.nan")
    if call.nan_query:
        made.append("query[-1, -1, query.shape[2] // 2, 0] = math.nan")
    return made


def _scale(call: Call, scale: Scale) -> dict[str, str]:
    size = scale.size
    if scale.kind == "none":
        return {}
    if scale.kind.startswith("rule"):

        def integer(n: int) -> str:
            return f"{scale.integer}({n})" if scale.integer else str(n)

        given = {"train_tokens": integer(scale.train_tokens)}
        if scale.kind == "rule per sample":
            given["num_tokens"] = "num_tokens"
        elif scale.num_tokens:
            given["num_tokens"] = integer(scale.num_tokens)
        if scale.train_entropy:
            given["train_entropy"] = repr(scale.train_entropy)
        return given
    if scale.kind in ("float", "int"):
        return {"scale": repr(float(size) if scale.kind == "float" else int(size))}
    if scale.kind in ("np.float32", "np.float64"):
        return {"scale": f"{scale.kind}({size!r})"}
    return {"scale": "scale"}


def _scale_tensor(call: Call, scale: Scale) -> list[str]:
    if scale.kind == "rule per sample":
        least = scale.num_tokens or call.Nk
        device = "" if call.device == "cpu" else f", device={call.device!r}"
        return [f"num_tokens = torch.arange({call.B}{device}) + {least}"]
    if "(" not in scale.kind:
        return []
    shape = {
        "()": "", "(B,)": f"{call.B}, ", "(B, H)": f"{call.heads}, {call.B}, ",
        "(B, H, Nq)": f"{call.Nq}, {call.heads}, {call.B}, ",
    }[scale.kind]  # fmt: skip
    # The memory order is the reverse of the axes' order.
    turned = {"(B, H)": ".T", "(B, H, Nq)": ".permute(2, 1, 0)"}.get(scale.kind, "")
    numbers = f"(normal({shape}seed={call.seed + 6}){turned} * {scale.size!r})"
    made = [f"scale = {numbers}.to({_device(call)}torch.{scale.dtype})"]
    if scale.nan:
        made.append(f"scale[{'...' if scale.kind == '()' else '..., -1:'}] = math.nan")
    return made
