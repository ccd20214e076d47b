"""PTX written by hand, for tests: an instruction over arrays, or a whole body."""

from __future__ import annotations

from typing import Any

import numpy as np

from .launch import Launch, launch
from .memory import GlobalMemory
from .options import Options
from .parse import Module
from .scalars import DTYPE, SIZE, U8, UINT, Array, bits

THREADS = 128


def module(body: str, buffers: int, shared: int = 0) -> Module:
    """A kernel with the addresses of its buffers in %p0, %p1 ... and the thread's number in %tid, which is 64 bits."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 buffer{i}" for i in range(buffers))
    loads = "".join(f".reg .b64 %p{i};\nld.param.u64 %p{i}, [buffer{i}];\n" for i in range(buffers))
    declared = f".shared .align 16 .b8 memory[{shared}];\n" if shared else ""
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel({parameters})
.reqntid {THREADS}
{{
{declared}.reg .b32 %t, %cta, %n;
.reg .b64 %tid;
mov.u32 %t, %tid.x;
mov.u32 %cta, %ctaid.x;
mad.lo.u32 %n, %cta, {THREADS}, %t;
cvt.u64.u32 %tid, %n;
{loads}{body}
ret;
}}
"""
    return Module(text)


def run(body: str, *buffers: Array, shared: int = 0, ctas: int = 1, **options: Any) -> None:
    """Run such a kernel over buffers, which it may change."""
    memory = GlobalMemory()
    addresses = [
        memory.add(f"buffer {i}", buffer.reshape(-1).view(U8)).base.to_bytes(8, "little")
        for i, buffer in enumerate(buffers)
    ]
    what = Launch(module(body, len(buffers), shared), (ctas, 1, 1), THREADS, 0, tuple(addresses))
    launch(what, memory, Options(**options))


def evaluate(instruction: str, out: str, *inputs: tuple[str, Array], **options: Any) -> Array:
    """An instruction with %d, %e as destinations of the type `out`, and %a, %b, %c ... as sources, over arrays.

    Predicates come and go as bytes. Returns (n,) numbers, or (n, 2) where there is an %e.
    """
    both = "%e" in instruction
    count = -(-len(inputs[0][1]) // THREADS)
    body, buffers = "", []
    for i, (type_, values) in enumerate(inputs):
        padded = np.resize(np.ascontiguousarray(values).view(DTYPE[_held(type_)]), count * THREADS)
        buffers.append(padded)
        body += _declare("abcf"[i], type_) + _move(f"%p{i}", "abcf"[i], type_, load=True)
    result = np.zeros((1 + both, count * THREADS), UINT[SIZE[_held(out)]])
    body += "".join(_declare(name, out) for name in "de"[: 1 + both]) + instruction + "\n"
    for i, name in enumerate("de"[: 1 + both]):
        body += _move(f"%p{len(inputs) + i}", name, out, load=False)
    run(body, *buffers, *result, ctas=count, **options)
    result = result[:, : len(inputs[0][1])].view(DTYPE[_held(out)])
    return result.T.copy() if both else result[0]


def _held(type_: str) -> str:
    return "u8" if type_ == "pred" else type_


def _declare(name: str, type_: str) -> str:
    kind = "pred" if type_ == "pred" else "b16" if SIZE[type_] == 1 else bits(type_)
    return f".reg .{kind} %{name};\n.reg .b64 %at_{name};\n.reg .b16 %byte_{name};\n"


def _move(base: str, name: str, type_: str, load: bool) -> str:
    at = f"mad.lo.u64 %at_{name}, %tid, {SIZE[_held(type_)]}, {base};\n"
    if type_ == "pred" and load:
        return at + f"ld.global.u8 %byte_{name}, [%at_{name}];\nsetp.ne.u16 %{name}, %byte_{name}, 0;\n"
    if type_ == "pred":
        return at + f"selp.u16 %byte_{name}, 1, 0, %{name};\nst.global.u8 [%at_{name}], %byte_{name};\n"
    kind = type_ if SIZE[type_] == 1 else bits(type_)
    move = f"ld.global.{kind} %{name}, [%at_{name}]" if load else f"st.global.{kind} [%at_{name}], %{name}"
    return at + move + ";\n"
