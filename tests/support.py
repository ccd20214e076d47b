"""Cases that cover every pair of options, their expected results in float64, and the allowed error of each."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F

# Without a GPU, the kernel runs on CPU tensors in Triton's interpreter.
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CPU tensors reach the kernel only in the interpreter"
)
BACKENDS = [pytest.param("triton", marks=INTERPRETED), "cpu", "reference"]
HEAD_DIMS = (8, 16, 40, 64, 72, 80, 96, 128, 160, 256, 512)
OPTIONS: dict[str, tuple] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "head_dim": HEAD_DIMS,
    "value_dim": ("same", 24, 64, 96),
    "lengths": ((1, 1), (1, 600), (7, 77), (64, 64), (77, 7), (129, 129), (200, 64), (129, 200), (200, 1)),
    "mask": ("none", "key padding", "rows", "rows and heads", "bias", "float32 bias", "key bias", "causal"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "layout": ("bhnd", "bnhd"),
    "memory": ("contiguous", "fused qkv", "transposed", "expanded batch", "expanded heads", "odd strides"),
    "outputs": ("none", "entropy", "lse", "both"),
    "scale": (
        "default", "train", "train and num", "calibrated", "number", "large", "zero", "negative",
        "tensor ()", "tensor (B,)", "tensor (B, H)",
    ),
}  # fmt: skip

# Allowed errors in units of roundoff, which `truth` explains. Each is a small multiple of the error on random numbers.
SCORE, WEIGHT, SUM = 6.0, 8.0, 8.0
STATISTICS = 1e-5  # nats; the absolute part of the allowed error of entropy and LSE


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded random numbers of this shape in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    head_dim: int
    value_dim: int | str
    lengths: tuple[int, int]
    mask: str
    heads: tuple[int, int]
    layout: str
    memory: str
    outputs: str
    scale: str

    def __str__(self) -> str:
        values = (getattr(self, f.name) for f in fields(self))
        return "-".join(str(v).removeprefix("torch.").replace(" ", "_") for v in values)


def pairs(case: Case) -> set[tuple]:
    """All pairs of option values in the case."""
    values = [(f.name, getattr(case, f.name)) for f in fields(case)]
    return set(itertools.combinations(values, 2))


def all_pairs() -> set[tuple]:
    named = [[(name, value) for value in values] for name, values in OPTIONS.items()]
    return {pair for a, b in itertools.combinations(named, 2) for pair in itertools.product(a, b)}


def pairwise_cases() -> list[Case]:
    """Cases that cover every pair of option values. The search is greedy and deterministic."""
    rng = random.Random(0)
    missing = all_pairs()
    cases = []
    while missing:
        (name, value), (other, other_value) = min(missing, key=str)
        candidates = []
        for _ in range(40):
            choice = {n: rng.choice(values) for n, values in OPTIONS.items()}
            candidates.append(Case(**(choice | {name: value, other: other_value})))
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


@dataclass
class Inputs:
    """The tensors of one case: the arguments of `attention`, and the same inputs with axes (B, H, N, D)."""

    arguments: dict
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # the given mask, or the lower triangle of causal attention
    scale: torch.Tensor  # (B, H), float64


def make_inputs(case: Case, device: str = "cpu", batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(17)
    (H, Hkv), (Nq, Nk), D = case.heads, case.lengths, case.head_dim
    Dv = D if case.value_dim == "same" else int(case.value_dim)
    query = _tensor(case, g, device, batch, H, Nq, D)
    key = _tensor(case, g, device, batch, Hkv, Nk, D)
    value = _tensor(case, g, device, batch, Hkv, Nk, Dv)
    mask = _mask(case, g, batch, H, Nq, Nk)
    mask = None if mask is None else mask.to(device)
    scale_arguments, scale = _scale(case, g, batch, H, Nk, D)
    scale_arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in scale_arguments.items()}
    given = (query, key, value)
    if case.layout == "bnhd":
        given = tuple(x.transpose(1, 2) for x in given)
    arguments = dict(
        zip(("query", "key", "value"), given, strict=True),
        attn_mask=None if case.mask == "causal" else mask,
        is_causal=case.mask == "causal",
        enable_gqa=Hkv != H,
        layout=case.layout,
        return_entropy=case.outputs in ("entropy", "both"),
        return_lse=case.outputs in ("lse", "both"),
        **scale_arguments,
    )
    return Inputs(arguments, query, key, value, mask, scale)


def _tensor(case: Case, g: torch.Generator, device: str, B: int, H: int, N: int, D: int) -> torch.Tensor:
    """Random numbers of shape (B, H, N, D), in the memory layout of the case. bnhd stores tokens before heads.

    The tensors are moved to the device before they get their strides, because `to` does not keep all strides.
    """
    inner = (N, H) if case.layout == "bnhd" else (H, N)

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if case.layout == "bnhd" else x

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(case.dtype).to(device)

    if case.memory == "fused qkv":
        return normal(B, N, 3, H, D)[:, :, 1].transpose(1, 2)
    if case.memory == "transposed":
        return heads_first(normal(B, *inner[:1], D, inner[1]).transpose(2, 3))
    if case.memory == "expanded batch":
        return heads_first(normal(1, *inner, D)).expand(B, H, N, D)
    if case.memory == "expanded heads":
        return normal(B, 1, N, D).expand(B, H, N, D)
    if case.memory == "odd strides":
        return heads_first(normal(B, *inner, D + 1)[..., 1:])
    return heads_first(normal(B, *inner, D))


def _mask(case: Case, g: torch.Generator, B: int, H: int, Nq: int, Nk: int) -> torch.Tensor | None:
    def bools(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g) > 0.3

    def numbers(*shape: int) -> torch.Tensor:
        bias = torch.randn(shape, generator=g)
        return bias.masked_fill(torch.rand(shape, generator=g) < 0.2, float("-inf"))

    if case.mask == "key padding":
        return bools(B, 1, 1, Nk)
    if case.mask == "rows":
        return bools(Nq, Nk)
    if case.mask == "rows and heads":
        return bools(B, H, Nq, Nk)
    if case.mask == "bias":
        return numbers(B, 1, Nq, Nk).to(case.dtype)
    if case.mask == "float32 bias":
        return numbers(1, H, Nq, Nk)
    if case.mask == "key bias":
        return numbers(B, 1, 1, Nk).to(case.dtype)
    if case.mask == "causal":
        return torch.ones(Nq, Nk, dtype=torch.bool).tril()
    return None


def _scale(case: Case, g: torch.Generator, B: int, H: int, Nk: int, D: int) -> tuple[dict, torch.Tensor]:
    """The arguments of `attention` that determine λ, and λ itself with shape (B, H)."""
    root = 1 / math.sqrt(D)
    N, T, H_T = max(Nk, 2), 96, 0.4
    ones = torch.ones(B, H, dtype=torch.float64)
    if case.scale == "train" and Nk >= 2:
        return {"train_tokens": T}, ones * math.sqrt(math.log(N) / math.log(T) / D)
    if case.scale in ("train", "train and num"):
        return {"train_tokens": T, "num_tokens": 300}, ones * math.sqrt(math.log(300) / math.log(T) / D)
    if case.scale == "calibrated":
        ratio = (math.log(N) - H_T) / (math.log(T) - H_T)
        return {"train_tokens": T, "train_entropy": H_T, "num_tokens": N}, ones * math.sqrt(ratio / D)
    numbers = {"default": None, "number": 1.7 * root, "large": 12 * root, "zero": 0.0, "negative": -0.8 * root}
    if case.scale in numbers:
        scale = numbers[case.scale]
        return {"scale": scale}, ones * (root if scale is None else scale)
    shape = {"tensor ()": (), "tensor (B,)": (B,), "tensor (B, H)": (B, H)}[case.scale]
    scale = torch.randn(shape, generator=g) * root
    return {"scale": scale}, (scale[:, None] if scale.dim() == 1 else scale).expand(B, H).double()


@dataclass
class Truth:
    """Attention from its definition in float64, and the allowed error of each element."""

    out: torch.Tensor  # (B, H, Nq, Dv), float64
    entropy: torch.Tensor  # (B, H, Nq), float64
    lse: torch.Tensor  # (B, H, Nq), float64
    out_bound: torch.Tensor
    entropy_bound: torch.Tensor
    lse_bound: torch.Tensor


def truth(inputs: Inputs) -> Truth:
    """Attention in float64 on the same rounded inputs, and bounds that do not depend on the machine.

    The bounds are unavoidable rounding errors, propagated to the results to first order:

    - A score is a sum of rounded products. Its error is SCORE units of its terms, |q| |k| λ and |bias|.
    - A weight is an exponential. Its error is WEIGHT units of the weight, twice the error of a GPU's exp2 and division.
      The cast to the input dtype for the product with the values adds one unit and half the smallest subnormal number.
    - The sums of weights and of weighted values have an error of SUM units of their terms, p |v|.
    - The output is rounded to its dtype.
    """
    H = inputs.query.shape[1]
    dtype = inputs.query.dtype
    query, key, value = (x.detach().cpu().double() for x in (inputs.query, inputs.key, inputs.value))
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scale = inputs.scale.cpu()[..., None, None]
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    terms = torch.einsum("bhid,bhjd->bhij", query.abs(), key.abs()) * scale.abs()
    if inputs.mask is not None:
        mask = inputs.mask.cpu()
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            hidden = mask == -math.inf
            scores = (scores + mask.double()).masked_fill(hidden, -math.inf)
            terms = terms + mask.double().abs().masked_fill(hidden, 0.0)
    lse = scores.logsumexp(-1)
    p = torch.where(scores > -math.inf, (scores - lse[..., None]).exp(), 0.0)
    out = p @ value
    entropy = -torch.special.xlogy(p, p).sum(-1)

    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    narrow = torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * narrow  # half the smallest subnormal number
    off = SCORE * unit * terms * p  # error of the weights from the rounding of the scores
    weights = off + (WEIGHT * unit + narrow) * p + least * (p > 0)
    out_bound = weights @ value.abs() + (off.sum(-1, keepdim=True) + WEIGHT * unit) * out.abs()
    out_bound += SUM * unit * (p @ value.abs()) + narrow * out.abs() + least
    surprise = torch.where(p > 0, (scores - lse[..., None] + entropy[..., None]).abs(), 0.0)  # |ln p + H|
    magnitude = torch.where(lse.isfinite(), lse.abs(), 0.0)
    return Truth(
        out, entropy, lse, out_bound,
        entropy_bound=STATISTICS + (off * surprise).sum(-1),
        lse_bound=STATISTICS + off.sum(-1) + 4 * torch.finfo(torch.float32).eps / 2 * magnitude,
    )  # fmt: skip


def sdpa_error(inputs: Inputs, expected: Truth) -> float:
    """The largest error of PyTorch's SDPA on the CPU in the dtype of the inputs."""
    B, H, Nq, _ = inputs.query.shape
    Nk, group = inputs.key.shape[2], H // inputs.key.shape[1]
    query, key, value = (x.cpu() for x in (inputs.query, inputs.key, inputs.value))
    mask = None if inputs.mask is None else inputs.mask.cpu().expand(B, H, Nq, Nk)
    worst = 0.0
    for b in range(B):
        for h in range(H):
            q, k, v = query[b, h][None], key[b, h // group][None], value[b, h // group][None]
            m = None if mask is None else mask[b, h][None]
            out = F.scaled_dot_product_attention(q, k, v, m, scale=inputs.scale[b, h].item())
            worst = max(worst, (out[0].double() - expected.out[b, h]).abs().max().item())
    return worst


def assert_within(name: str, got: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor, unit: str = "") -> None:
    """Assert that each element is within its bound of `wanted`. Infinite elements must be equal."""
    assert got.shape == wanted.shape, f"{name} has the shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    got = got.detach().cpu().double()
    finite = wanted.isfinite()
    assert torch.equal(got[~finite], wanted[~finite]), f"{name} is finite where it must not be"
    error = torch.where(finite, (got - wanted).abs(), 0.0)
    wrong = ~(error <= bound)  # NaN compares false, so it counts as wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[(error / bound)[wrong].nan_to_num(math.inf).argmax()].tolist())
        raise AssertionError(
            f"{name} is off by {error[at]:.2e}{unit} at {at}, allowed {bound[at]:.2e}; {int(wrong.sum())} are wrong"
        )


def assert_results(result, inputs: Inputs, expected: Truth) -> None:
    """Compare a result of `attention` with the truth. Its out has the axes (B, H, Nq, Dv)."""
    out, entropy, lse = (result, None, None) if isinstance(result, torch.Tensor) else result
    try:
        assert_within("out", out, expected.out, expected.out_bound)
    except AssertionError as error:
        raise AssertionError(f"{error} (SDPA is off by {sdpa_error(inputs, expected):.2e})") from None
    if entropy is not None:
        assert entropy.dtype == torch.float32
        assert_within("entropy", entropy, expected.entropy, expected.entropy_bound, " nats")
        assert (entropy >= 0).all()
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_within("lse", lse, expected.lse, expected.lse_bound, " nats")


def assert_close(case: Case, inputs: Inputs, result, expected: Truth | None = None) -> None:
    """Compare `result` of the case with the truth: the outputs returned, their shapes and dtypes, and each element."""
    out, entropy, lse = (result, None, None) if isinstance(result, torch.Tensor) else result
    assert (entropy is not None) == inputs.arguments["return_entropy"]
    assert (lse is not None) == inputs.arguments["return_lse"]
    assert out.dtype == case.dtype
    if case.layout == "bnhd":
        out = out.transpose(1, 2)
    assert_results((out, entropy, lse), inputs, expected or truth(inputs))


def plain_inputs(query, key, value, mask: torch.Tensor | None = None, scale: float | None = None) -> Inputs:
    """The inputs of `truth`, from tensors (B, H, N, D) and one λ."""
    B, H, _, D = query.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    return Inputs({}, query, key, value, mask, torch.full((B, H), scale, dtype=torch.float64))


def assert_attends(result, query, key, value, mask: torch.Tensor | None = None, scale: float | None = None) -> None:
    """Compare a result of `attention` for tensors (B, H, N, D) and one λ with the truth."""
    inputs = plain_inputs(query, key, value, mask, scale)
    assert_results(result, inputs, truth(inputs))
