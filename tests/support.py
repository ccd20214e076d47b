"""Cases that meet every pair of options, the float64 truth about them, and how near to it an answer must be."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

HEAD_DIMS = (8, 16, 40, 64, 72, 80, 96, 128, 160, 256, 512)
OPTIONS: dict[str, tuple] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "head_dim": HEAD_DIMS,
    "value_dim": ("same", 24, 64, 96),
    "lengths": ((1, 1), (1, 200), (7, 77), (64, 64), (77, 7), (129, 129), (200, 64), (129, 200), (200, 1)),
    "mask": ("none", "key padding", "rows", "rows and heads", "bias", "float32 bias", "key bias", "causal"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "layout": ("bhnd", "bnhd"),
    "memory": ("contiguous", "fused qkv", "transposed", "expanded batch", "expanded heads", "odd strides"),
    "outputs": ("none", "entropy", "lse", "both"),
    "scale": (
        "default", "train", "train and num", "calibrated", "number", "zero", "negative",
        "tensor ()", "tensor (B,)", "tensor (B, H)",
    ),
}  # fmt: skip


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
    """Every two options the case brings together."""
    values = [(f.name, getattr(case, f.name)) for f in fields(case)]
    return set(itertools.combinations(values, 2))


def all_pairs() -> set[tuple]:
    named = [[(name, value) for value in values] for name, values in OPTIONS.items()]
    return {pair for a, b in itertools.combinations(named, 2) for pair in itertools.product(a, b)}


def pairwise_cases() -> list[Case]:
    """Cases in which every two options meet at least once: greedily, the same ones each time."""
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
    """One case as tensors: what `attention` is called with, and the same in (B, H, N, D) and in numbers."""

    arguments: dict
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # as given, or the triangle of causal attention
    scale: torch.Tensor  # (B, H), float64


def make_inputs(case: Case, device: str = "cpu", batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(17)
    (H, Hkv), (Nq, Nk), D = case.heads, case.lengths, case.head_dim
    Dv = D if case.value_dim == "same" else int(case.value_dim)
    query = _tensor(case, g, batch, H, Nq, D).to(device)
    key = _tensor(case, g, batch, Hkv, Nk, D).to(device)
    value = _tensor(case, g, batch, Hkv, Nk, Dv).to(device)
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


def _tensor(case: Case, g: torch.Generator, B: int, H: int, N: int, D: int) -> torch.Tensor:
    """Random numbers, (B, H, N, D), lying in memory as the case asks; bnhd cases lie so in memory too."""
    inner = (N, H) if case.layout == "bnhd" else (H, N)

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if case.layout == "bnhd" else x

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(case.dtype)

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
    """The arguments that give λ, and λ itself as (B, H) numbers."""
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
    numbers = {"default": None, "number": 1.7 * root, "zero": 0.0, "negative": -0.8 * root}
    if case.scale in numbers:
        scale = numbers[case.scale]
        return {"scale": scale}, ones * (root if scale is None else scale)
    shape = {"tensor ()": (), "tensor (B,)": (B,), "tensor (B, H)": (B, H)}[case.scale]
    scale = torch.randn(shape, generator=g) * root
    return {"scale": scale}, (scale[:, None] if scale.dim() == 1 else scale).expand(B, H).double()


@dataclass
class Truth:
    out: torch.Tensor  # (B, H, Nq, Dv), float64
    entropy: torch.Tensor  # (B, H, Nq), float64
    lse: torch.Tensor  # (B, H, Nq), float64
    largest: float  # the largest |logit|


def truth(inputs: Inputs) -> Truth:
    """Attention by its definition, in float64, on the same rounded inputs."""
    H = inputs.query.shape[1]
    query, key, value = (x.detach().cpu().double() for x in (inputs.query, inputs.key, inputs.value))
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * inputs.scale[..., None, None]
    largest = scores.abs().max().item() if scores.numel() else 0.0
    if inputs.mask is not None:
        mask = inputs.mask.cpu()
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            scores = (scores + mask.double()).masked_fill(mask == -math.inf, -math.inf)
    lse = scores.logsumexp(-1)
    p = torch.where(scores > -math.inf, (scores - lse[..., None]).exp(), 0.0)
    out = p @ value
    return Truth(out, -torch.special.xlogy(p, p).sum(-1), lse, largest)


def sdpa_error(inputs: Inputs, expected: Truth) -> float:
    """The largest error that PyTorch's own attention makes on the CPU in the dtype of the inputs."""
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
            worst = max(worst, _distance(out[0], expected.out[b, h]))
    return worst


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b).abs().max().item() if a.numel() else 0.0


def assert_close(case: Case, inputs: Inputs, result, statistics_atol: float = 1e-5) -> None:
    """`result` of the case against the truth: shapes, dtypes, and errors no larger than twice SDPA's plus two ulps."""
    expected = truth(inputs)
    out, entropy, lse = (result, None, None) if isinstance(result, torch.Tensor) else result
    assert (entropy is not None) == inputs.arguments["return_entropy"]
    assert (lse is not None) == inputs.arguments["return_lse"]

    assert out.dtype == case.dtype
    if case.layout == "bnhd":
        out = out.transpose(1, 2)
    assert out.shape == expected.out.shape
    ulp = torch.finfo(case.dtype).eps * expected.out.abs().max().item()
    error, allowed = _distance(out.cpu(), expected.out), 2 * sdpa_error(inputs, expected) + 2 * ulp
    assert error <= allowed, f"out is off by {error:.2e}, allowed {allowed:.2e}"

    # Scores are sums of D products in float32: their own rounding is the floor for what is computed from them.
    atol = statistics_atol + 4 * torch.finfo(torch.float32).eps * expected.largest
    for name, got, wanted in (("entropy", entropy, expected.entropy), ("lse", lse, expected.lse)):
        if got is None:
            continue
        assert got.dtype == torch.float32
        assert got.shape == wanted.shape
        got = got.cpu().double()
        assert torch.equal(got.isinf(), wanted.isinf()), f"{name} is infinite in other places"
        finite = wanted.isfinite()
        error = _distance(got[finite], wanted[finite])
        assert error <= atol, f"{name} is off by {error:.2e} nats, allowed {atol:.2e}"
    if entropy is not None:
        assert (entropy >= 0).all()
