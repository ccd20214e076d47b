"""Scales as tensors: per sample, per head and per query, and λ of each sample from its own number of tokens."""

import math

import pytest
import torch
from support import BACKENDS, INTERPRETED, normal

from entropy_attn import attention, entropy_scale, explain

B, H, Nq, Nk, D = 2, 3, 50, 70, 40
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.rand(Nq, Nk, generator=torch.Generator().manual_seed(1)) > 0.4},
    "floating": {"attn_mask": torch.randn(B, 1, Nq, Nk, generator=torch.Generator().manual_seed(2))},
    "key padding": {"attn_mask": (torch.arange(Nk) < 60).view(1, 1, 1, Nk)},
}


def qkv():
    return normal(B, H, Nq, D, seed=3), normal(B, H, Nk, D, seed=4), normal(B, H, Nk, D, seed=5)


def in_float64(query, key, value, scale, attn_mask=None, is_causal=False):
    """Output, entropy and lse by their definitions. scale: (B, H, Nq)."""
    scores = query.double() @ key.double().mT * scale.double().unsqueeze(-1)
    if is_causal:
        attn_mask = torch.ones(Nq, Nk, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    p = scores.softmax(-1)
    return p @ value.double(), torch.special.entr(p).sum(-1), scores.logsumexp(-1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_per_query(backend, mask):
    """Any strides, negative numbers and 0."""
    scale = 0.3 * normal(B, H, Nq, seed=6)
    scale[0, 0, 3] = 0.0
    one_of_two = torch.stack([scale, scale + 1], -1).flatten(2)[:, :, ::2]
    for given in (
        scale,
        scale.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        one_of_two,
        scale[:1, :, :1].expand(B, H, Nq),
    ):
        expected = in_float64(*qkv(), given, **MASKS[mask])
        result = attention(*qkv(), scale=given, **MASKS[mask], return_entropy=True, return_lse=True, backend=backend)
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
        out = attention(*qkv(), scale=given, **MASKS[mask], backend=backend)
        torch.testing.assert_close(out, result.out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_scale_in_every_shape(backend):
    """A number, and tensors of every shape that hold it, give the same result."""
    query, key, value = (x.half() for x in qkv())
    expected = attention(query, key, value, scale=0.2, return_entropy=True, backend=backend)
    for shape in ((), (B,), (B, H), (B, H, Nq)):
        result = attention(query, key, value, scale=torch.full(shape, 0.2), return_entropy=True, backend=backend)
        torch.testing.assert_close(result.out, expected.out, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(result.entropy, expected.entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_num_tokens_per_sample(backend, dtype):
    query, key, value = qkv()
    num_tokens = torch.tensor([50, 64], dtype=dtype)
    options = {"train_tokens": 4096, "train_entropy": 1.5, "return_entropy": True, "backend": backend}
    result = attention(query, key, value, num_tokens=num_tokens, **options)
    for i, n in enumerate(num_tokens.tolist()):
        one = attention(query[i : i + 1], key[i : i + 1], value[i : i + 1], num_tokens=n, **options)
        torch.testing.assert_close(result.out[i], one.out[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(result.entropy[i], one.entropy[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_tokens_for_the_rule_have_scale_0(backend):
    """N of 1, 0 and less, and N at most exp(H_T), as for packed sequences. Every key has the same weight."""
    query, key, value = (x.repeat(2, 1, 1, 1) for x in qkv())
    for train_entropy, num_tokens in ((0.0, [1, 0, -7, 2]), (1.5, [4, 1, 0, 5])):
        result = attention(
            query, key, value, train_tokens=64, train_entropy=train_entropy, num_tokens=torch.tensor(num_tokens),
            return_entropy=True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(result.entropy[:3], torch.full((3, H, Nq), math.log(Nk)))
        torch.testing.assert_close(result.out[:3], value[:3].mean(2, keepdim=True).expand(3, H, Nq, D))
        assert (result.entropy[3] < math.log(Nk) - 1e-3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_tokens_of_any_stride(backend):
    apart = torch.tensor([[50, 9], [64, 9]])[:, 0]
    for given in (apart, torch.tensor([50]).expand(2)):
        wanted = attention(*qkv(), train_tokens=80, num_tokens=given.clone(), backend=backend)
        assert torch.equal(attention(*qkv(), train_tokens=80, num_tokens=given, backend=backend), wanted)


@INTERPRETED
@pytest.mark.parametrize("mask", MASKS)
def test_the_trained_number_of_tokens_has_the_trained_scale_bit_for_bit(mask):
    """The kernel takes both logarithms."""
    plain = attention(*qkv(), **MASKS[mask], return_lse=True, backend="triton")
    for T in (2, 63, 77, 4096):
        for H_T in (0.0, 0.3):
            given = {"train_tokens": T, "train_entropy": H_T, "num_tokens": torch.tensor([T, 5000])}
            rule = attention(*qkv(), **MASKS[mask], **given, return_lse=True, backend="triton")
            assert torch.equal(plain.out[0], rule.out[0])
            assert torch.equal(plain.lse[0], rule.lse[0])
            assert not torch.equal(plain.lse[1], rule.lse[1])


def test_the_rule_on_tensors_is_that_on_numbers():
    n, t, h = torch.tensor([2, 50, 4096]), torch.tensor([64, 4096, 4096]), torch.tensor([0.0, 1.5, 2.0])
    n[0] = 3
    expected = [
        entropy_scale(*row, 40, e) for row, e in zip(zip(n.tolist(), t.tolist(), strict=True), h.tolist(), strict=True)
    ]
    torch.testing.assert_close(entropy_scale(n, t, 40, h), torch.tensor(expected))
    torch.testing.assert_close(
        entropy_scale(n, 4096, 40, 0.5), torch.tensor([entropy_scale(m, 4096, 40, 0.5) for m in n.tolist()])
    )


def test_explain_does_not_read_tensors():
    told = explain(*qkv(), train_tokens=4096, num_tokens=torch.tensor([50, 64]))
    assert (told.scale, told.num_tokens) == (None, None)
    assert "N = a tensor" in str(told)


@INTERPRETED
@pytest.mark.parametrize(
    ("shape", "kind"), [(None, "number"), ((B,), "per_head"), ((B, H), "per_head"), ((B, H, Nq), "per_query")]
)
def test_the_kernel_is_compiled_for_what_the_scale_depends_on(shape, kind):
    scale = None if shape is None else torch.ones(shape)
    assert explain(*qkv(), scale=scale, backend="triton").config.scale == kind


@INTERPRETED
def test_num_tokens_reach_the_kernel_as_they_are(monkeypatch):
    """No operator of PyTorch makes a scale of them."""
    from entropy_attn.backends import triton

    launched = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *arguments, C, **options: launched.append((arguments[4], C.scale))

    monkeypatch.setattr(triton, "attention_forward", Launcher())
    num_tokens = torch.tensor([50, 64])
    attention(*qkv(), train_tokens=4096, train_entropy=0.5, num_tokens=num_tokens, backend="triton")
    ((given, train_tokens, train_entropy), kind) = launched[0]
    assert (given.data_ptr(), train_tokens, train_entropy) == (num_tokens.data_ptr(), 4096.0, 0.5)
    assert kind == "num_tokens"


def test_one_graph_serves_all_numbers_of_tokens():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, n: attention(q, k, v, train_tokens=64, num_tokens=n),
        backend=backend,
        dynamic=True,
        fullgraph=True,
    )
    for length in (20, 30, 40):
        query = normal(B, H, length, D, seed=length)
        num_tokens = torch.tensor([length, length - 5])
        expected = attention(query, query, query, train_tokens=64, num_tokens=num_tokens)
        torch.testing.assert_close(compiled(query, query, query, num_tokens), expected)
    assert len(graphs) == 1
