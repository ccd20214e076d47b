"""The calls that look for a mutant: python -m emulated.mutant_calls, in a folder with a mutated copy of the package.

A line of JSON for each call: its name, its seconds and, if it objects, the check that did so and what it said. The
first that objects is the last.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import emulator

emulator.install()

import torch  # noqa: E402
from emulator.device import device as loading  # noqa: E402
from emulator.ptx import Module  # noqa: E402
from packed import assert_packed, pack, rule, scales  # noqa: E402
from support import Inputs, assert_attends, assert_results, truth  # noqa: E402

import entropy_attn  # noqa: E402
from entropy_attn import attention, attention_varlen  # noqa: E402

BOTH = {"return_entropy": True, "return_lse": True}
FAR = 2**31 + 8
CALLS: dict[str, Callable[[], None]] = {}
KINDS = {  # what a fault says -> the check
    "out of bounds": "out of bounds",
    "misaligned": "misaligned",
    "in flight": "copy not waited for",
    "race": "race",
    "no barrier": "race",
    "uninitialised": "uninitialised",
    "endless loop": "endless loop",
}


def call(function: Callable[[], None]) -> Callable[[], None]:
    CALLS[function.__name__.replace("_", " ")] = function
    return function


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to("cuda")


def inputs(B: int, H: int, Nq: int, Nk: int, D: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [normal(B, H, N, D, dtype=dtype, seed=seed) for seed, N in enumerate((Nq, Nk, Nk))]


def hidden(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.3


def causal(Nq: int, Nk: int) -> torch.Tensor:
    return torch.ones(Nq, Nk, dtype=torch.bool).tril()


@call
def float16_head_dim_64() -> None:
    """Whole blocks of keys, one at the edge, and a second tile of queries that is not full."""
    q, k, v = inputs(2, 2, 150, 200, 64)
    assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def float16_head_dim_40() -> None:
    """Two pieces of a head dim, padded. An edge block of one key, and none."""
    for Nk in (129, 128):
        q, k, v = inputs(1, 2, 70, Nk, 40)
        assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def other_head_dim_of_value() -> None:
    q, k, v = normal(1, 2, 40, 64), normal(1, 2, 100, 64, seed=1), normal(1, 2, 100, 96, seed=2)
    assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def is_causal() -> None:
    """After a call that was not. Entropy without LSE."""
    q, k, v = inputs(1, 2, 150, 150, 64)
    assert_attends(attention(q, k, v, return_entropy=True), q, k, v)
    assert_attends(attention(q, k, v, is_causal=True, return_entropy=True), q, k, v, causal(150, 150))


@call
def causal_with_fewer_keys() -> None:
    q, k, v = inputs(1, 1, 150, 70, 64)
    assert_attends(attention(q, k, v, is_causal=True, **BOTH), q, k, v, causal(150, 70))


@call
def boolean_mask_per_query() -> None:
    """(Nq, Nk), with a row that sees no key."""
    q, k, v = inputs(2, 2, 150, 200, 64)
    mask = ~hidden(150, 200)
    mask[17] = False
    assert_attends(attention(q, k, v, mask.to("cuda"), **BOTH), q, k, v, mask)


@call
def floating_mask_per_query() -> None:
    q, k, v = inputs(2, 2, 70, 160, 64)
    mask = normal(2, 1, 70, 160, seed=3).cpu().masked_fill(hidden(2, 1, 70, 160), -math.inf)
    assert_attends(attention(q, k, v, mask.to("cuda"), **BOTH), q, k, v, mask)


def padded(mask: torch.Tensor, Nq: int, Nk: int) -> None:
    """A call with a mask (B, 1, 1, Nk) that hides keys whose rows hold NaN."""
    q, k, v = inputs(len(mask), 1, Nq, Nk, 64)
    shown = (mask if mask.dtype == torch.bool else mask > -math.inf).view(len(mask), 1, Nk, 1).to("cuda")
    holes = [x.masked_fill(~shown, math.nan) for x in (k, v)]
    result = attention(q, *holes, mask.to("cuda"), **BOTH)
    assert_attends(result, q, *(x.masked_fill(~shown, 0.0) for x in (k, v)), mask)


@call
def key_padding() -> None:
    """Left, right, both, a hole, a short run, nothing."""
    key = torch.arange(270)
    rows = [key >= 70, key < 150, (key >= 3) & (key < 263), (key < 100) | (key >= 230), (key >= 70) & (key < 100)]
    padded(torch.stack([*rows, key < 0])[:, None, None], 40, 270)


@call
def key_padding_of_1100_keys() -> None:
    padded((torch.arange(1100) >= 40)[None, None, None], 20, 1100)


@call
def floating_mask_of_keys() -> None:
    key = torch.arange(200)
    mask = normal(2, 1, 1, 200, seed=3).cpu().masked_fill((key < 70) | (key >= 190), -math.inf)
    padded(mask, 40, 200)


@call
def grouped_queries() -> None:
    q, k, v = normal(2, 4, 70, 64), normal(2, 2, 100, 64, seed=1), normal(2, 2, 100, 64, seed=2)
    assert_attends(attention(q, k, v, enable_gqa=True, **BOTH), q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


@call
def scale_per_head() -> None:
    """One is negative, one is 0."""
    q, k, v = inputs(2, 3, 40, 100, 64)
    scale = torch.tensor([[0.125, -0.1, 0.0], [0.3, 0.05, 0.2]])
    meant = Inputs({}, q, k, v, None, scale.double())
    assert_results(attention(q, k, v, scale=scale.to("cuda"), **BOTH), meant, truth(meant))


@call
def scale_per_query() -> None:
    """Powers of 2, which the queries can take exactly."""
    q, k, v = inputs(2, 2, 150, 100, 64)
    powers = 2.0 ** torch.randint(-3, 2, (2, 2, 150), generator=torch.Generator().manual_seed(4))
    meant = Inputs({}, q * powers[..., None].half().to("cuda"), k, v, None, torch.full((2, 2), 0.125))
    assert_results(attention(q, k, v, scale=(powers / 8).to("cuda"), **BOTH), meant, truth(meant))


@call
def num_tokens() -> None:
    """λ of each sample from its own N, which lie apart in memory. One is below exp(H_T)."""
    q, k, v = inputs(3, 2, 40, 100, 64)
    given = torch.tensor([[60, 9], [4, 9], [100, 9]]).to("cuda")
    wanted = torch.tensor([rule(N, 64, 64, 1.5) for N in (60, 4, 100)])[:, None].expand(3, 2)
    meant = Inputs({}, q, k, v, None, wanted)
    for tokens in (given[:, 0], given[:, 0].int()):
        result = attention(q, k, v, train_tokens=64, train_entropy=1.5, num_tokens=tokens, **BOTH)
        assert_results(result, meant, truth(meant))


@call
def rows_of_other_alignments() -> None:
    """One kernel after another for rows of 32, 36 and 33 elements, and from the second element on."""
    for width in (32, 36, 33):
        q, k, v = (x[..., width - 32 :] for x in inputs(1, 2, 80, 80, width))
        assert_attends(attention(q, k, v, **BOTH), q, k, v)
    q, k, v = normal(3 * 2 * 80 * 32 + 1)[1:].view(3, 1, 2, 80, 32).unbind(0)
    assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def other_strides_of_the_same_shapes() -> None:
    """(B, H, N, D) and (B, N, H, D) in memory, a fused projection, and a last axis that is not contiguous."""
    fused = normal(2, 80, 3, 2, 64).permute(2, 0, 3, 1, 4).unbind(0)
    across = [normal(2, 2, 64, 80, seed=seed).transpose(2, 3) for seed in range(3)]
    inside = [normal(2, 80, 2, 64, seed=seed).transpose(1, 2) for seed in range(3)]
    apart = inputs(2, 2, 80, 80, 64)
    for q, k, v in (apart, inside, fused, across, (apart[0], inside[1], fused[2])):
        assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def float32() -> None:
    q, k, v = inputs(1, 1, 70, 70, 64, torch.float32)
    assert_attends(attention(q, k, v, **BOTH), q, k, v)


@call
def bfloat16() -> None:
    q, k, v = inputs(1, 1, 70, 70, 64, torch.bfloat16)
    assert_attends(attention(q, k, v, **BOTH), q, k, v)


def extreme(logits: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Each row has the logits (Nk): the largest wins."""
    key = torch.zeros(1, 1, len(logits), 16)
    key[0, 0, :, 0] = logits
    q, k, v = torch.ones(1, 1, 40, 16), key, normal(1, 1, len(logits), 16, dtype=torch.float32).cpu()
    result = attention(*(x.to("cuda") for x in (q, k, v)), None if mask is None else mask.to("cuda"), scale=1.0, **BOTH)
    seen = logits if mask is None else logits + mask.flatten()
    wanted = v[:, :, seen.argmax(), None].expand_as(v[:, :, :40])
    torch.testing.assert_close(result.out.cpu(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.entropy.cpu(), torch.zeros(1, 1, 40), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.lse.cpu(), seen.max().expand(1, 1, 40), atol=0, rtol=1e-6)


@call
def large_logits() -> None:
    ramp = torch.linspace(0.9, 1.0, 150)
    for order in (ramp, ramp.flip(0)):
        for size in (1e9, -1e9, 1e35):
            extreme(size * order)


@call
def large_logits_that_are_equal() -> None:
    """The weights are equal, whatever the rounding of the maximum."""
    for size in (133.0, 1001.0, 2.0**20 + 1):
        k = torch.full((1, 1, 100, 64), size * 1024, device="cuda")
        q, v = torch.full((1, 1, 40, 64), size), normal(1, 1, 100, 64, dtype=torch.float32)
        for sign in (1.0, -1.0):
            result = attention((sign * q).to("cuda"), k, v, scale=0.37, **BOTH)
            torch.testing.assert_close(result.out, v.mean(2, keepdim=True).expand_as(result.out), atol=1e-5, rtol=0)
            torch.testing.assert_close(result.entropy.cpu(), torch.full((1, 1, 40), math.log(100)), atol=1e-5, rtol=0)


@call
def large_logits_with_a_floating_mask() -> None:
    key = torch.arange(150.0)
    extreme(1e36 * (key - 75), torch.where(key < 70, -math.inf, 0.0).view(1, 1, 1, 150))
    extreme(1e9 * key, (-1e8 * key)[None, None, None])


def far_view(shape: tuple[int, ...], axis: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor's shape, but the stride of one axis. Only what is touched takes memory."""
    strides = list(torch.empty(shape, device="meta").stride())
    strides[axis] = stride
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.empty(elements, dtype=dtype, device="cuda").as_strided(shape, strides)


@call
def heads_and_samples_past_32_bits() -> None:
    near = inputs(2, 2, 70, 70, 32)
    for axis in (0, 1):
        q, k, v = (far_view(x.shape, axis, FAR, x.dtype).copy_(x) for x in near)
        for given in ((q, *near[1:]), (near[0], k, near[2]), (*near[:2], v)):
            assert_attends(attention(*given, **BOTH), *near)


@call
def rows_past_32_bits() -> None:
    """Each in turn, after a call with rows that are near."""
    near = inputs(1, 1, 150, 150, 32)
    assert_attends(attention(*near, **BOTH), *near)
    q, k, v = (far_view(x.shape, 2, 2**32 // 60 // 8 * 8, x.dtype).copy_(x) for x in near)
    for given in ((q, *near[1:]), (near[0], k, near[2]), (*near[:2], v)):
        assert_attends(attention(*given, **BOTH), *near)


@call
def masks_past_32_bits() -> None:
    """Rows, then keys that are far apart."""
    near = inputs(1, 1, 150, 150, 32)
    mask = ~hidden(1, 1, 150, 150)
    for axis in (2, 3):
        far = far_view(mask.shape, axis, 2**32 // 60 // 16 * 16, torch.bool).copy_(mask.to("cuda"))
        assert_attends(attention(*near, far, **BOTH), *near, mask)


@call
def scales_past_32_bits() -> None:
    q, k, v = inputs(1, 1, 150, 70, 32)
    scale = far_view((1, 1, 150), 2, 2**31 // 100, torch.float32).fill_(0.125)
    assert_attends(attention(q, k, v, scale=scale, **BOTH), q, k, v, scale=0.125)


@call
def packed_sequences() -> None:
    """λ from the length of each sequence, causal and not; lengths that no tile divides; an empty sequence."""
    p = pack((70, 0, 150, 5), (30, 3, 150, 200), H=4, Hkv=2, D=32, dtype=torch.float16, device="cuda")
    T, H_T = [64, 9, 200, 300], [0.0, 0.5, 1.5, 0.2]
    tensors = {"train_tokens": torch.tensor(T).to("cuda"), "train_entropy": torch.tensor(H_T).to("cuda")}
    for given, wanted in (
        ({"train_tokens": 64, "train_entropy": 3.5}, scales(p, 64, 3.5)),
        (tensors, scales(p, T, H_T)),
    ):
        for is_causal in (False, True):
            result = attention_varlen(*p.arguments, enable_gqa=True, is_causal=is_causal, **given, **BOTH)
            assert_packed(result, p, wanted, is_causal)
    scale = normal(4, 4, dtype=torch.float32)
    result = attention_varlen(*p.arguments, enable_gqa=True, scale=scale, **BOTH)
    assert_packed(result, p, scale.cpu().double())


@call
def malformed_ends_of_packed_sequences() -> None:
    """No access outside the tensors, which the emulator would see. Results are finite."""
    query, key, value = (normal(90, 1, 32, seed=seed) for seed in range(3))
    good = torch.tensor([0, 40, 90], dtype=torch.int32).to("cuda")
    for ends in ((-500, 30, 2000), (90, 20, 70), (0, 2**31 - 1, -(2**31))):
        bad = torch.tensor(ends, dtype=torch.int32).to("cuda")
        for of_queries, of_keys in ((bad, good), (good, bad), (bad, bad)):
            for longest in (50, 1000):
                result = attention_varlen(query, key, value, of_queries, of_keys, longest, longest, **BOTH)
                assert result.out.isfinite().all()
    short = attention_varlen(query, key, value, good, good, 30, 50)  # 40 and 50 queries, of which 30 count
    assert (short[30:40] == 0).all()
    assert (short[70:] == 0).all()


@call
def packed_rows_past_32_bits() -> None:
    """Strides that 8 does not divide, so that they are in units of one element."""
    p = pack((3, 70, 60), H=1, D=32, dtype=torch.float16, device="cuda")
    near = (p.query, p.key, p.value)
    far = [far_view(x.shape, 0, 2**32 // 60 // 8 * 8 + 1, x.dtype).copy_(x) for x in near]
    for i in range(3):
        p.query, p.key, p.value = (far[j] if i == j else near[j] for j in range(3))
        assert_packed(attention_varlen(*p.arguments, **BOTH), p)


def kind(error: BaseException) -> str:
    """The check that an exception comes from. "none" if the mutant did not compile."""
    name, text = type(error).__name__, str(error)
    if name == "KernelError":
        return next((check for said, check in KINDS.items() if said in text), "other fault")
    if isinstance(error, AssertionError):
        return "wrong number"
    return "none" if name in ("PTXError", "CompilationError", "SyntaxError", "PTXASError") else "raised"


def changed(text: str, pattern: str, new: str, place: int) -> str:
    """The PTX with one match of the pattern replaced."""
    found = list(re.finditer(pattern, text))[place]
    return text[: found.start()] + new + text[found.end() :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", help="a call to make before the others")
    parser.add_argument("--ptx", type=json.loads, help="[pattern, new, place] for the PTX of every kernel")
    arguments = parser.parse_args()
    here = Path.cwd()
    if here not in Path(entropy_attn.__file__).parents:
        sys.exit(f"entropy_attn is that of {entropy_attn.__file__}, not of {here}")
    if arguments.first and arguments.first not in CALLS:
        parser.error(f"--first: got {arguments.first!r}, allowed are {list(CALLS)}")
    if arguments.ptx:
        mock.patch.object(loading, "Module", lambda text: Module(changed(text, *arguments.ptx))).start()
    names = sorted(CALLS, key=lambda name: name != arguments.first)  # the others in their order
    for name in names[:1] if arguments.ptx else names:
        row: dict[str, Any] = {"call": name}
        begun = time.perf_counter()
        try:
            CALLS[name]()
        except Exception as error:
            row |= {"check": kind(error), "said": f"{type(error).__name__}: {str(error).strip()}"}
        row["seconds"] = round(time.perf_counter() - begun, 2)
        print(json.dumps(row), flush=True)
        if "check" in row:
            return


if __name__ == "__main__":
    main()
