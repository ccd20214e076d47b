"""Random calls of `entropy_attn.attention`, valid and invalid, checked against attention in float64.

    python tests/fuzz.py --calls 20000 --seed 0 --backend cpu
    python tests/fuzz.py --seed 0 --only 1234        # repeats one call
    python tests/fuzz.py --packed --calls 2000       # of attention_varlen

Seed, backend and index determine a call. In `fuzzing/`, `calls.py` draws the calls and `source.py` makes their tensors.
`oracle.py` computes the expected results, `broken.py` lists invalid calls, and `shrink.py` simplifies failing calls.
A failure is printed at once, with a program that reproduces it. The exit code is 1 if a call failed.
Packed calls are drawn in `packed.py`; their failures are printed by index.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

# OpenMP threads that spin while they wait slow CPU attention down when another process uses a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads it once, when torch is imported

import numpy as np
import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are imported

from fuzzing.broken import WAYS
from fuzzing.calls import Call, draw
from fuzzing.oracle import Expected, expect, numbers, worst
from fuzzing.shrink import shrink, traits
from fuzzing.source import build, reproducer
from interpreter import repaired
from packed import assert_packed, random_call

import entropy_attn

FLAGS = ("return_entropy", "return_lse")


@dataclass(frozen=True)
class Failure:
    call: Call
    kind: str  # category of the failure, without numbers
    text: str
    check: str  # Python code that shows the failure, usually an assertion

    @property
    def program(self) -> str:
        return reproducer(self.call, self.check)


def check(call: Call) -> Failure | None:
    """The first failure of a call, or None. A valid call is made twice: with `flags` and with `other_flags`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = build(call)
        if call.broken:
            return _check_refused(call, arguments)
        expected = expect(call, arguments)
        for flags in (call.flags, call.other_flags):
            failure = _check_answer(replace(call, flags=flags), arguments, expected)
            if failure is not None:
                return failure
    return None


def _check_answer(call: Call, arguments: dict[str, Any], expected: Expected) -> Failure | None:
    before = {name: numbers(arguments[name]).copy() for name in ("query", "key", "value")}
    try:
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(getattr(torch, call.grad)())
            if call.autocast:
                contexts.enter_context(torch.autocast("cpu", torch.bfloat16))
            result = entropy_attn.attention(**arguments | dict(zip(FLAGS, call.flags, strict=True)))
    except Exception as error:
        text = f"raises {_told(error)}"
        return Failure(call, re.sub(r"\d+", "…", text)[:60], text, "")
    for name, array in before.items():
        if not np.array_equal(array, numbers(arguments[name]), equal_nan=True):
            return Failure(call, f"{name} written to", f"{name} is written to", f"print({name})")
    plain = isinstance(result, torch.Tensor)
    if plain != (call.flags == (False, False)):
        return Failure(call, "type", f"returns a {type(result).__name__}", "print(type(result))")
    returned = (result, None, None) if plain else tuple(result)
    for i, name in enumerate(("out", "entropy", "lse")):
        source = "result" if plain else f"result.{name}"
        failure = _check_tensor(call, name, source, returned[i], expected)
        if failure is not None:
            return failure
    return None


def _check_tensor(call: Call, name: str, source: str, tensor: Any, expected: Expected) -> Failure | None:
    if name != "out" and not call.flags[("entropy", "lse").index(name)]:
        return None if tensor is None else Failure(call, name, f"{name} unasked", f"assert {source} is None")
    if not isinstance(tensor, torch.Tensor):
        return Failure(call, name, f"{name} is a {type(tensor).__name__}", f"assert {source} is not None")
    wanted = getattr(expected, name)
    turned = name == "out" and call.layout == "bnhd"
    dtype = expected.dtype if name == "out" else torch.float32
    shape = tuple(wanted.value.swapaxes(1, 2).shape if turned else wanted.value.shape)
    for what, got, right, text in (
        ("shape", tuple(tensor.shape), shape, f"assert {source}.shape == {shape}, {source}.shape"),
        ("dtype", tensor.dtype, dtype, f"assert {source}.dtype == {dtype}, {source}.dtype"),
        ("requires_grad", tensor.requires_grad, False, f"assert not {source}.requires_grad"),
    ):
        if got != right:
            return Failure(call, f"{name}'s {what}", f"{name}'s {what} is {got}, must be {right}", text)
    array = numbers(tensor)
    wrong = worst(array.swapaxes(1, 2) if turned else array, wanted)
    if wrong is None and name == "entropy" and (array < 0).any():
        return Failure(call, "negative entropy", f"entropy of {array.min():.3g}", "assert (result.entropy >= 0).all()")
    if wrong is None:
        return None
    place = wrong.place
    if turned:
        place = (place[0], place[2], place[1], place[3])
    number = f"{source}[{', '.join(map(str, place))}].item()"
    text = f"{name}{list(place)} is {wrong.got:.9g}, must be {wrong.wanted:.9g} within {wrong.bound:.2g}"
    if np.isnan(wrong.wanted):
        right = f"math.isnan({number})"
    elif np.isinf(wrong.wanted) or wrong.bound == 0:
        right = f"{number} == {wrong.wanted}".replace("inf", "math.inf")
    else:
        right = f"abs({number} - {wrong.wanted!r}) <= {wrong.bound!r}"
    return Failure(call, f"{name}{' is NaN' if np.isnan(wrong.got) else ''}", text, f"assert {right}, {number}")


def _check_refused(call: Call, arguments: dict[str, Any]) -> Failure | None:
    named = WAYS[call.broken].named
    text = (
        f"try:\n    attention(**arguments)\nexcept (TypeError, ValueError) as error:\n"
        f"    assert any(name in str(error) for name in {named}), error\n"
        "else:\n    raise AssertionError('accepted')"
    )
    try:
        with getattr(torch, call.grad)():
            entropy_attn.attention(**arguments)
    except (TypeError, ValueError) as error:
        if any(re.search(rf"\b{name}\b", str(error)) for name in named):
            return None
        wrong = f"{call.broken}: the message does not name {' or '.join(named)}"
        return Failure(call, wrong, f"{wrong}: {_told(error)}", text)
    except Exception as error:
        wrong = f"{call.broken}: raises {type(error).__name__}"
        return Failure(call, wrong, f"{call.broken}: raises {_told(error)}", text)
    return Failure(call, f"{call.broken}: accepted", f"{call.broken}: accepted", text)


def _told(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:150]}"


def shrunk(failure: Failure) -> Failure:
    """A failure of the same kind, of the simplest call that `shrink` finds."""
    last = failure

    def fails(call: Call) -> bool:
        nonlocal last
        found = check(call)
        if found is None or found.kind != failure.kind:
            return False
        last = found
        return True

    shrink(failure.call, fails)
    return last


def fuzz(
    indices: Iterable[int], seed: int, backend: str = "cpu", device: str = "cpu", say: Callable[[str], None] = print,
    shrinks: int = 25,
) -> Counter[str]:  # fmt: skip
    """Make the calls of these indices and pass each failure to `say`. Returns the number of failures of each kind.

    At most `shrinks` failures are printed with a simplified program. Ctrl-C ends the run early and keeps its result.
    """
    kinds: Counter[str] = Counter()
    known: set[tuple[str, frozenset[str]]] = set()
    try:
        for index in indices:
            failure = check(draw(seed, index, backend, device, tuple(WAYS)))
            if failure is None:
                continue
            kinds[failure.kind] += 1
            say(f"call {index}: {failure.text}")
            if len(known) < shrinks and kinds[failure.kind] <= (1 if failure.call.broken else 12):
                small = shrunk(failure)
                alike = (failure.kind, traits(small.call))
                if alike not in known:
                    known.add(alike)
                    say(f"  simplest: {small.text}\n{small.program}")
    except KeyboardInterrupt:
        say("interrupted")
    return kinds


def fuzz_packed(
    indices: Iterable[int], seed: int, backend: str = "cpu", device: str = "cpu", say: Callable[[str], None] = print
) -> Counter[str]:
    """As `fuzz`, with calls of `attention_varlen`."""
    kinds: Counter[str] = Counter()
    try:
        for index in indices:
            pack, options, scale = random_call(seed * 10**9 + index, device)
            asked = {"return_entropy": True, "return_lse": True, "backend": backend}
            try:
                result = entropy_attn.attention_varlen(*pack.arguments, **options, **asked)
                assert_packed(result, pack, scale, options["is_causal"])
            except Exception as error:
                kinds[type(error).__name__] += 1
                say(f"packed call {index}: {pack.lengths_q}, {pack.lengths_k}, {options}: {_told(error)}")
    except KeyboardInterrupt:
        say("interrupted")
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls of attention against its definition in float64.")
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=("cpu", "triton", "reference", "auto"))
    parser.add_argument("--only", type=int, metavar="I", help="make call I alone, and print its program")
    parser.add_argument("--shrinks", type=int, default=25, metavar="N", help="simplify this many failures at most")
    parser.add_argument("--packed", action="store_true", help="make calls of attention_varlen")
    given = parser.parse_args()
    device = "cuda" if given.backend == "triton" and torch.cuda.is_available() else "cpu"
    kinds: Counter[str] = Counter()
    with repaired() if os.environ.get("TRITON_INTERPRET") == "1" else contextlib.nullcontext():
        if given.packed:
            progress = tqdm(range(given.calls) if given.only is None else [given.only], unit="call", smoothing=0)
            kinds = fuzz_packed(progress, given.seed, given.backend, device, progress.write)
            progress.close()
        elif given.only is not None:
            call = draw(given.seed, given.only, given.backend, device, tuple(WAYS))
            print(f"# {call}\n{reproducer(call, '')}")
            kinds = fuzz([given.only], given.seed, given.backend, device, shrinks=given.shrinks)
        else:
            progress = tqdm(range(given.calls), unit="call", smoothing=0)
            kinds = fuzz(progress, given.seed, given.backend, device, progress.write, given.shrinks)
            progress.close()
    for kind, count in kinds.most_common():
        print(f"{count:6} {kind}")
    print(f"{sum(kinds.values())} calls failed")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
