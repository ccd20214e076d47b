"""A batch of images of different sizes, packed and padded, and the ways to compute its attention with λ of each image.

A way is a function that takes the batch and returns the call to be timed. The call's result has the form of the way's
inputs: packed (total, H, D), or padded (B, H, longest N, D). A library whose scale is a single number has its query
multiplied by λ of each image in every call. What is prepared once (a mask, a compiled function) is not in the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import aspect_ratios
import torch
import torch.nn.functional as F

from entropy_attn import attention, attention_varlen, entropy_scale


class Batch(NamedTuple):
    """Seeded noise for the images of a batch, packed and padded."""

    lengths: list[int]  # N of each image
    packed: list[torch.Tensor]  # query, key, value: (total, H, D)
    padded: list[torch.Tensor]  # (B, H, longest N, D)
    cu_seqlens: torch.Tensor  # (B + 1,)
    num_tokens: torch.Tensor  # (B,)
    scale: torch.Tensor  # (B,), λ
    train_tokens: int

    def images(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """N, and query, key and value (1, H, N, D) as views, of each image."""
        for N, stop in zip(self.lengths, itertools.accumulate(self.lengths), strict=True):
            yield N, [x[stop - N : stop].transpose(0, 1)[None] for x in self.packed]

    @property
    def image(self) -> torch.Tensor:
        """The image of each token, (total,)."""
        return torch.repeat_interleave(self.num_tokens)

    def from_padded(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens (total, H, D) of a padded tensor (B, H, longest N, D)."""
        return torch.cat([each[:, :N].transpose(0, 1) for each, N in zip(x, self.lengths, strict=True)])

    @property
    def padding(self) -> float:
        """The share of padding among the padded tokens."""
        return 1 - sum(self.lengths) / (len(self.lengths) * max(self.lengths))


def make_batch(lengths: list[int], layer: aspect_ratios.Layer, dtype: torch.dtype, device: str) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    H, D, T = layer.heads, layer.head_dim, layer.train_tokens
    shape = (sum(lengths), H, D)
    packed = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)]
    padded = [
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous() for x in packed
    ]
    num_tokens = torch.tensor(lengths, device=device)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Batch(lengths, packed, padded, cu_seqlens, num_tokens, entropy_scale(num_tokens, T, D), T)


def packed(batch: Batch, return_entropy: bool = False) -> Callable[[], Any]:
    longest = max(batch.lengths)
    options: dict[str, Any] = {"train_tokens": batch.train_tokens, "return_entropy": return_entropy}
    return lambda: attention_varlen(*batch.packed, *2 * [batch.cu_seqlens], longest, longest, **options)


def key_padding(batch: Batch) -> torch.Tensor:
    """True for the keys of an image and False for padding, (B, 1, 1, longest N)."""
    at = torch.arange(max(batch.lengths), device=batch.num_tokens.device)
    return (at < batch.num_tokens[:, None])[:, None, None]


def padded(batch: Batch) -> Callable[[], torch.Tensor]:
    mask = key_padding(batch)
    return lambda: attention(*batch.padded, mask, train_tokens=batch.train_tokens, num_tokens=batch.num_tokens)


def padded_sdpa(batch: Batch) -> Callable[[], torch.Tensor]:
    mask = key_padding(batch)

    def way() -> torch.Tensor:
        query, key, value = batch.padded
        query = query * batch.scale[:, None, None, None].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)

    return way


def flex_attention(batch: Batch) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # after 8 recompilations it would run uncompiled
    device = batch.num_tokens.device
    image, scale, total = batch.image, batch.scale, sum(batch.lengths)
    same = create_block_mask(lambda b, h, i, j: image[i] == image[j], None, None, total, total, device=device)
    query, key, value = (x.transpose(0, 1)[None] for x in batch.packed)
    compiled = torch.compile(flex_attention, dynamic=False)

    def way() -> torch.Tensor:
        out = compiled(
            query, key, value, score_mod=lambda s, b, h, i, j: s * scale[image[i]], block_mask=same, scale=1.0
        )
        return out[0].transpose(0, 1)

    return way


def one_by_one(batch: Batch) -> Callable[[], torch.Tensor]:
    def way() -> torch.Tensor:
        outs = [attention(*qkv, train_tokens=batch.train_tokens) for _, qkv in batch.images()]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return way


def sdpa_one_by_one(batch: Batch) -> Callable[[], torch.Tensor]:
    D, T = batch.packed[0].shape[-1], batch.train_tokens

    def way() -> torch.Tensor:
        outs = [F.scaled_dot_product_attention(*qkv, scale=entropy_scale(N, T, D)) for N, qkv in batch.images()]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return way


def varlen_attn(batch: Batch) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(batch.lengths)
    image = batch.image

    def way() -> torch.Tensor:
        query, key, value = batch.packed
        query = query * batch.scale[image, None, None].to(query.dtype)
        return varlen_attn(query, key, value, *2 * [batch.cu_seqlens], longest, longest, scale=1.0)

    return way


WAYS: dict[str, Callable[[Batch], Callable[[], Any]]] = {
    "packed": packed,
    "packed, entropy": lambda batch: packed(batch, return_entropy=True),
    "padded": padded,
    "padded SDPA": padded_sdpa,
    "FlexAttention": flex_attention,
    "one by one": one_by_one,
    "SDPA one by one": sdpa_one_by_one,
    "varlen_attn": varlen_attn,
}
GPU_WAYS = ("varlen_attn",)
