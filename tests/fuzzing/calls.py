"""Descriptions of calls of `attention`. `draw` makes random ones, and shrink.py simplifies those that fail."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from entropy_attn.kernels.tiles import HEAD_DIMS

T = TypeVar("T")
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1e300}
# Lengths at the edges of blocks, and some between.
LENGTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300)
CPU_HEAD_DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 40, 63, 64, 65, 72, 80, 96, 128, 129, 160)
MULTIPLY_ADDS = 1.5e7  # the maximum of one call, which keeps calls fast
PROGRAMS = 4  # the maximum of one call in Triton's interpreter
# The kinds of scale with their frequencies: a number, a tensor of a shape, or the paper's rule.
SCALES = {
    "none": 6, "float": 6, "int": 1, "np.float32": 1, "np.float64": 1, "()": 2, "(B,)": 2, "(B, H)": 3,
    "(B, H, Nq)": 3, "rule": 6, "rule per sample": 2,
}  # fmt: skip
INTEGERS = ("", "np.int64")
FORWARDS = (0, 1, 2, 3)  # the axes (B, H, N, D) in their order


@dataclass(frozen=True)
class Memory:
    """The memory layout of a tensor with the axes (B, H, N, D)."""

    order: tuple[int, ...] = FORWARDS  # the axes, from the largest stride to the smallest
    expand: tuple[int, ...] = ()  # axes with stride 0
    steps: tuple[int, ...] = (1, 1, 1, 1)  # slice steps of the axes of a larger tensor
    skipped: tuple[int, ...] = (0, 0, 0, 0)  # slice starts of the axes
    offset: int = 0  # storage offset in elements
    flip: tuple[int, ...] = ()  # axes reversed by torch.flip


@dataclass(frozen=True)
class Tensor:
    """The description of query, key or value."""

    kind: str = "normal"  # "normal", "offset", "constant" or "whole"
    size: float = 1.0
    memory: Memory = Memory()
    dtype: str = ""  # dtype of this input under autocast, if not the call's


@dataclass(frozen=True)
class Mask:
    dtype: str = "bool"
    axes: int = 2
    full: tuple[bool, ...] = (False, False, True, True)  # axes of (B, H, Nq, Nk) without broadcasting
    hidden: bool = True  # random hidden entries
    rows: bool = False  # every third query without a visible key
    columns: bool = False  # every third key hidden from all queries
    padding: bool = False  # the last third of the keys hidden from all queries
    everything: bool = False  # all entries hidden
    lowest: bool = False  # the dtype's lowest number in random entries and in every fourth row
    size: float = 1.0  # standard deviation of a floating-point mask
    memory: Memory = Memory()


@dataclass(frozen=True)
class Scale:
    kind: str = "none"  # key of `SCALES`
    size: float = 1.0
    dtype: str = "float32"  # dtype of a tensor scale
    nan: bool = False  # NaN in the last elements of a tensor scale
    # The arguments of the rule: T, N (0 if not given) and H_T.
    train_tokens: int = 64
    num_tokens: int = 0
    train_entropy: float = 0.0
    integer: str = ""  # integer type of T and N, one of `INTEGERS`


@dataclass(frozen=True)
class Call:
    seed: int
    backend: str = "cpu"
    device: str = "cpu"
    dtype: str = "float32"
    B: int = 1
    Hkv: int = 1
    group: int = 1  # H / Hkv
    Nq: int = 1
    Nk: int = 1
    D: int = 1
    Dv: int = 1
    query: Tensor = Tensor()
    key: Tensor = Tensor()
    value: Tensor = Tensor()
    layout: str = "bhnd"
    causal: str = ""  # empty, "is_causal", "causal_upper_left" or "causal_lower_right"
    mask: Mask | None = None
    scale: Scale = Scale()
    flags: tuple[bool, bool] = (False, False)  # return_entropy, return_lse
    other_flags: tuple[bool, bool] = (True, True)  # return_entropy, return_lse of the second call
    gqa: bool = False  # enable_gqa with equal numbers of heads
    grad: str = "no_grad"  # "no_grad", "enable_grad" or "inference_mode"
    requires_grad: bool = False  # requires_grad of query
    parameter: bool = False  # key as a torch.nn.Parameter
    autocast: bool = False
    poison: str = ""  # "nan", "inf" or "-inf" in the keys and values that no query sees
    nan_key: bool = False  # NaN in the middle key
    nan_query: bool = False  # NaN in one element of query
    broken: str = field(default="", metadata={"fixed": True})  # the mistake, a key of `broken.WAYS`

    @property
    def heads(self) -> int:
        return self.Hkv * self.group

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """The shape (B, H, N, D) of query, key or value, in every layout."""
        heads, tokens = (self.heads, self.Nq) if name == "query" else (self.Hkv, self.Nk)
        return self.B, heads, tokens, self.Dv if name == "value" else self.D

    def mask_shape(self) -> tuple[int, int, int, int]:
        """The shape of the mask with four axes. Expanded axes have their full size."""
        assert self.mask is not None
        sizes = (self.B, self.heads, self.Nq, self.Nk)
        return tuple(n if self.mask.full[a] and a >= 4 - self.mask.axes else 1 for a, n in enumerate(sizes))  # type: ignore[return-value]


def is_sound(call: Call) -> bool:
    """Whether the call is valid, apart from the mistake in `broken`."""
    if call.backend == "triton" and (
        call.dtype == "float64" or call.D not in HEAD_DIMS or call.Dv not in HEAD_DIMS
    ):  # fmt: skip
        return False
    if call.causal and call.mask:
        return False
    if call.requires_grad and call.grad == "enable_grad":
        return False
    planted = [x.memory for x in (call.key, call.value, call.mask) if x is not None]
    if (call.poison or call.nan_key) and any(memory.expand or memory.flip for memory in planted):
        return False
    if call.poison and not (call.mask or call.causal in ("is_causal", "causal_upper_left")):
        return False
    if min(call.B, call.Hkv, call.group, call.Nq, call.Nk) == 0 and (call.poison or call.nan_key or call.nan_query):
        return False
    if call.autocast and call.device != "cpu":
        return False
    if any(x.dtype for x in (call.query, call.key, call.value)) and not (call.autocast and call.dtype != "float64"):
        return False
    return _mask_is_sound(call) and _numbers_are_sound(call)


def _mask_is_sound(call: Call) -> bool:
    if call.mask is None:
        return True
    if call.autocast and call.dtype == "float64" and call.mask.dtype == "float32":
        return False
    if call.mask.dtype == "bool" and (call.mask.lowest or call.mask.size != 1):
        return False
    return call.mask.dtype in ("bool", "float32", call.dtype)


def _numbers_are_sound(call: Call) -> bool:
    """Whether every product in a logit is finite in float32, in any order of multiplication."""
    rule = call.scale
    if rule.nan and (call.mask or call.causal == "causal_lower_right" or call.Nk == 0):
        return False  # a row without keys may then be 0 or NaN
    if rule.kind.startswith("rule"):
        N = rule.num_tokens or call.Nk
        if min(N, rule.train_tokens) < 2 or rule.train_entropy >= 0.9 * math.log(min(N, rule.train_tokens)):
            return False
    if (rule.nan and "(" not in rule.kind) or (rule.dtype == "float64" and call.dtype != "float64"):
        return False
    query, key = (largest(x, call.dtype) for x in (call.query, call.key))
    product = call.D * query * key
    scale = (
        abs(rule.size) * (6 if "(" in rule.kind else 1)
        if rule.kind != "none" and not rule.kind.startswith("rule")
        else 10.0
    )
    most = 1e28 if call.mask is not None and call.mask.lowest else 1e36
    if scale > 2.3e38 or max(product, query * scale) > 1e37 or product * scale > most:
        return False
    return largest(call.value, call.dtype) < 1e28


def largest(tensor: Tensor, dtype: str) -> float:
    """An upper bound of the elements' magnitude: 6 standard deviations for normal numbers."""
    most = {"constant": abs(tensor.size), "offset": abs(tensor.size) + 6}.get(tensor.kind, 6 * abs(tensor.size))
    return min(most, LARGEST[dtype])


def draw(seed: int, index: int, backend: str = "cpu", device: str = "cpu", broken: Sequence[str] = ()) -> Call:
    """The call number `index` of `seed`, drawn deterministically. One call in four has a mistake of `broken`."""
    from fuzzing.broken import WAYS

    r = random.Random(f"{seed}/{index}/{backend}")
    way = r.choice(broken) if broken and r.random() < 0.25 else ""
    for _ in range(1000):
        call = _draw(r, backend, device)
        if way:
            grad = "enable_grad" if "grad" in way else call.grad
            call = replace(call, autocast=False, requires_grad=False, grad=grad, broken=way)
        if is_sound(call) and _is_small(call) and (not way or WAYS[way].applies(call)):
            return call
    raise AssertionError(f"no call can be drawn that is broken so: {way}")


def _is_small(call: Call) -> bool:
    if call.backend == "triton" and call.device == "cpu":
        blocks = max(call.Nq // 64, 1)
        return call.B * call.heads * blocks <= PROGRAMS and call.Nk * max(call.D, call.Dv) <= 20000
    return call.B * call.heads * max(1, call.Nq) * max(1, call.Nk) * (call.D + call.Dv) <= MULTIPLY_ADDS


def _draw(r: random.Random, backend: str, device: str) -> Call:
    triton = backend == "triton"
    dtypes = ["float32", "float16", "bfloat16"] + ([] if triton else ["float64"])
    dtype = r.choice(dtypes)
    lengths = tuple(n for n in LENGTHS if n < 140 or not triton or device != "cpu")
    head_dims: tuple[int, ...] = HEAD_DIMS if triton else CPU_HEAD_DIMS
    if triton and device == "cpu":
        head_dims = tuple(d for d in head_dims for _ in range(1 + 4 * (d <= 80)))
    D = r.choice(head_dims)
    hiding = r.choices(("", "mask", "is_causal", "bias"), (4, 5, 2, 1))[0]
    autocast = not triton and r.random() < 0.1
    mask = _draw_mask(r, dtype) if hiding == "mask" else None
    bias = r.choice(("causal_upper_left", "causal_lower_right"))
    grad = r.choice(("no_grad", "enable_grad", "inference_mode"))
    flags = [(False, False), (True, False), (False, True), (True, True)]
    r.shuffle(flags)
    calm = r.random() < 0.6  # ordinary magnitudes, which show errors best
    query, key, value = (_draw_tensor(r, dtype, autocast, calm) for _ in range(3))
    return Call(
        seed=r.randrange(1000),
        backend=backend,
        device=device,
        dtype=dtype,
        B=_rarely(r, 0.03, 0, r.choice((1, 2, 3))),
        Hkv=_rarely(r, 0.02, 0, r.choice((1, 2, 3, 4))),
        group=_rarely(r, 0.7, 1, r.choice((2, 3, 4))),
        Nq=_rarely(r, 0.03, 0, r.choice(lengths)),
        Nk=_rarely(r, 0.04, 0, r.choice(lengths)),
        D=D,
        Dv=_rarely(r, 0.6, D, r.choice(head_dims)),
        query=query,
        key=key,
        value=replace(value, kind="normal", size=_draw_value_size(r, dtype)),
        layout=r.choice(("bhnd", "bhnd", "bnhd")),
        causal={"is_causal": "is_causal", "bias": bias}.get(hiding, ""),
        mask=mask,
        scale=_draw_scale(r, dtype, calm),
        flags=flags[0],
        other_flags=flags[1],
        gqa=r.random() < 0.2,
        grad=grad,
        requires_grad=r.random() < 0.1,
        parameter=r.random() < 0.1,
        autocast=autocast,
        poison=r.choices(("", "nan", "inf", "-inf"), (6, 2, 1, 1))[0],
        nan_key=r.random() < 0.05,
        nan_query=r.random() < 0.05,
    )


def _rarely(r: random.Random, share: float, one: T, other: T) -> T:
    return one if r.random() < share else other


def _draw_memory(r: random.Random) -> Memory:
    kind = r.choice(("plain", "plain", "order", "channels last", "expand", "cut", "offset", "fused", "anything"))
    order = tuple(r.sample(FORWARDS, 4))
    expand = tuple(sorted(r.sample(FORWARDS, r.choice((1, 1, 2)))))
    steps = tuple(r.choice((1, 1, 2, 3)) for _ in FORWARDS)
    skipped = tuple(r.choice((0, 0, 1, 3)) for _ in FORWARDS)
    flip = (r.choice(FORWARDS),)
    return {
        "plain": Memory(),
        "order": Memory(order=order),
        "channels last": Memory(order=(0, 2, 3, 1)),
        "expand": Memory(expand=expand, order=_rarely(r, 0.5, order, FORWARDS)),
        "cut": Memory(steps=steps, skipped=skipped),
        "offset": Memory(offset=r.choice((1, 2, 3, 5))),
        "fused": Memory(order=(0, 2, 1, 3), steps=(1, 1, 3, 1), skipped=(0, 0, 1, 0)),
        "anything": Memory(order, _rarely(r, 0.8, (), expand), steps, skipped, r.choice((0, 1)), flip),
    }[kind]


def _draw_tensor(r: random.Random, dtype: str, autocast: bool, calm: bool) -> Tensor:
    kind = r.choices(("normal", "whole", "offset", "constant"), (7, 1, 1, 1))[0]
    sizes: tuple[float, ...] = (1.0, 0.0, 1e-3, 3.0, 30.0, 300.0, 1e4, 65504.0)
    if dtype != "float16":
        sizes += (133120.0, 1e10, 1e15, 1e18, -1e5, 1e-30, 1e-20, 1e-10)
    size = r.choice((1.0, 1.0, 0.5, 2.0) if calm else sizes)
    return Tensor(kind, size, _draw_memory(r), "bfloat16" if autocast and r.random() < 0.2 else "")


def _draw_value_size(r: random.Random, dtype: str) -> float:
    if r.random() < 0.7:
        return 1.0
    return r.choice((1e-7, 1e-4, 1e3, 1e4) if dtype == "float16" else (1e-30, 1e-20, 1e-5, 1e5, 1e20, 1e26))


def _draw_mask(r: random.Random, dtype: str) -> Mask:
    kind = r.choice(("bool", "float32", dtype))

    def some(share: float) -> bool:
        return r.random() < share

    padding = some(0.25)  # often alone, as in a key-padding mask
    return Mask(
        dtype=kind,
        axes=r.choice((2, 3, 4, 4)),
        full=(some(0.6), some(0.6), some(0.3 if padding else 0.6), padding or some(0.6)),
        hidden=some(0.3 if padding else 0.8),
        rows=some(0.2),
        columns=some(0.4),
        padding=padding,
        everything=some(0.04),
        lowest=kind != "bool" and some(0.2),
        size=1.0 if kind == "bool" else r.choice((0.0, 0.0, 1.0, 10.0, 1e4)),
        memory=_draw_memory(r),
    )


def _draw_scale(r: random.Random, dtype: str, calm: bool) -> Scale:
    kind = r.choices(list(SCALES), list(SCALES.values()))[0]
    size = r.choice((0.125, 0.1, 0.3, 1.0, 0.0, -0.1, -1.0))
    if not calm:
        size = r.choice((size, 2.0, 1e-5, 1e-30, 50.0, 1e4, 1e10, 1e30, 2e38))
    if kind == "int":
        size = r.choice((0.0, 1.0, -1.0, 2.0))
    train_tokens = r.choice((2, 3, 64, 77, 256, 4096, 10**9))
    entropy = _rarely(r, 0.6, 0.0, round(r.uniform(0, 0.85) * math.log(train_tokens), 3))
    given = _rarely(r, 0.5, 0, r.choice((2, 5, 64, 300, 10**6)))
    of_tensor = "float64" if dtype == "float64" and r.random() < 0.5 else "float32"
    nan = "(" in kind and r.random() < 0.05
    return Scale(kind, size, of_tensor, nan, train_tokens, given, entropy, r.choice(INTEGERS))
