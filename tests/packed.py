"""Packed sequences for tests, and their expected results, which support.py computes for each sequence by itself."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import Inputs, assert_results, normal, truth

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Pack:
    """Tensors of `attention_varlen`, and where their sequences lie."""

    query: torch.Tensor  # (total_q, H, D)
    key: torch.Tensor  # (total_k, Hkv, D)
    value: torch.Tensor  # (total_k, Hkv, Dv)
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    @property
    def arguments(self) -> tuple:
        """The positional arguments of `attention_varlen`."""
        device = self.query.device
        longest = (max(lengths, default=0) for lengths in (self.lengths_q, self.lengths_k))
        ends = (cu_seqlens(lengths, device) for lengths in (self.lengths_q, self.lengths_k))
        return (self.query, self.key, self.value, *ends, *longest)

    @property
    def sequences(self) -> list[tuple[slice, slice]]:
        """The rows of query, and those of key and value, of each sequence."""
        return list(zip(_slices(self.lengths_q), _slices(self.lengths_k), strict=True))


def _slices(lengths: Sequence[int]) -> list[slice]:
    return [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]


def cu_seqlens(lengths: Sequence[int], device="cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def pack(
    lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None, H: int = 2, Hkv: int | None = None, D: int = 16,
    Dv: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", spare: int = 0,
) -> Pack:  # fmt: skip
    """Sequences of these lengths with seeded numbers. spare: rows of each tensor that lie in no sequence."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    shapes = ((lengths_q, H, D), (lengths_k, Hkv or H, D), (lengths_k, Hkv or H, Dv or D))
    tensors = [normal(sum(n) + spare, h, d, seed=i).to(dtype).to(device) for i, (n, h, d) in enumerate(shapes)]
    return Pack(*tensors, tuple(lengths_q), tuple(lengths_k))


def rule(N: int, T: int, D: int, H_T: float = 0.0) -> float:
    """λ of a sequence of N keys."""
    log_n = math.log(max(N, 1))
    return math.sqrt(max(log_n - H_T, 0.0) / (math.log(T) - H_T) / D)


def scales(pack: Pack, T: int | Sequence[int] | None = None, H_T: float | Sequence[float] = 0.0) -> torch.Tensor:
    """λ (S, H) in float64: the rule's, for each sequence its own T and H_T if these are lists; without T 1/sqrt(D)."""
    S, (_, H, D) = len(pack.lengths_k), pack.query.shape
    if T is None:
        return torch.full((S, H), D**-0.5, dtype=torch.float64)
    T, H_T = (list(x) if isinstance(x, Sequence) else [x] * S for x in (T, H_T))
    of_sequences = [rule(n, t, D, h) for n, t, h in zip(pack.lengths_k, T, H_T, strict=True)]
    return torch.tensor(of_sequences, dtype=torch.float64)[:, None].expand(S, H)


def assert_packed(result, pack: Pack, scale: torch.Tensor | None = None, is_causal: bool = False) -> None:
    """Compare a result of `attention_varlen` with the truth of each sequence. scale: (S, H) in float64."""
    out, entropy, lse = (result, None, None) if isinstance(result, torch.Tensor) else result
    scale = scales(pack) if scale is None else scale
    total_q, H, _ = pack.query.shape
    assert out.shape == (total_q, H, pack.value.shape[2])
    assert out.dtype == pack.query.dtype
    assert out.is_contiguous()
    statistics = [x for x in (entropy, lse) if x is not None]
    assert all(x.shape == (H, total_q) for x in statistics)
    for i, (queries, keys) in enumerate(pack.sequences):
        q, k, v = (x.transpose(0, 1)[None] for x in (pack.query[queries], pack.key[keys], pack.value[keys]))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if is_causal else None
        inputs = Inputs({}, q, k, v, mask, scale[i : i + 1])
        if q.shape[2]:
            of_sequence = [None if x is None else x[None, :, queries] for x in (entropy, lse)]
            assert_results((out[queries].transpose(0, 1)[None], *of_sequence), inputs, truth(inputs))
    end = sum(pack.lengths_q)
    assert (out[end:] == 0).all()
    assert entropy is None or (entropy[:, end:] == 0).all()
    assert lse is None or (lse[:, end:] == -math.inf).all()


def random_call(seed: int, device: str = "cpu") -> tuple[Pack, dict[str, Any], torch.Tensor]:
    """A pack, options of `attention_varlen` and λ (S, H), at random."""
    r = random.Random(seed)
    S, Hkv, group, D = r.randrange(6), r.choice((1, 2)), r.choice((1, 1, 2)), r.choice((8, 16, 40, 72))
    lengths = [[r.choice((0, 1, 2, 15, 16, 17, 63, 64, 65, 100, 130)) for _ in range(S)] for _ in range(2)]
    Dv, dtype, spare = r.choice((D, 24)), r.choice(DTYPES), r.choice((0, 0, 5))
    p = pack(*lengths, Hkv * group, Hkv, D, Dv, dtype, device, spare)
    if r.random() < 0.5:  # heads first in memory
        p.query, p.key, p.value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (p.query, p.key, p.value))
    options = {"is_causal": r.random() < 0.4, "enable_gqa": group > 1}
    kind = r.choice(("default", "rule", "rule", "rules", "tensor"))
    wanted = scales(p)
    if kind == "rule":
        T, H_T = r.choice((2, 64, 10**6)), r.choice((0, 0.5))
        options |= {"train_tokens": T, "train_entropy": H_T}
        wanted = scales(p, T, H_T)
    elif kind == "rules":
        T, H_T = [r.choice((9, 64, 10**6)) for _ in range(S)], [r.choice((0.0, 0.7, 2.0)) for _ in range(S)]
        options |= {"train_tokens": torch.tensor(T, dtype=torch.int64), "train_entropy": torch.tensor(H_T)}
        wanted = scales(p, T, H_T)
    elif kind == "tensor":
        options["scale"] = normal(S, Hkv * group, seed=seed) * 0.2
        wanted = options["scale"].double()
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return p, options, wanted
