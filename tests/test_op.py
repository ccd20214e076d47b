"""The operator under torch.library's checks, torch.compile and torch.export."""

import itertools

import pytest
import torch
import torch._dynamo.exc
import torch._dynamo.testing

from entropy_attn import attention, entropy_scale

RESOLUTIONS = [(224, 224), (256, 256), (320, 320), (384, 384), (448, 448), (512, 512), (576, 576), (640, 640)]
RESOLUTIONS += [(768, 768), (512, 288), (512, 384), (288, 512)]
TOKENS = [h // 16 * (w // 16) for h, w in RESOLUTIONS]


def qkv(N=33, layout="bhnd", D=16, H=2, Hkv=2):
    shapes = [(2, h, N, D) if layout == "bhnd" else (2, N, h, D) for h in (H, Hkv, Hkv)]
    return [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("tokens_first", [False, True], ids=["bhnd", "bnhd"])
@pytest.mark.parametrize(("lse", "entropy"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("scale", ["number", "tensor", "per query", "train_tokens", "num_tokens"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
def test_opcheck(tokens_first, lse, entropy, scale, mask):
    query, key, value = qkv()
    if tokens_first:
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    attn_mask = torch.rand(2, 1, 1, 33) > 0.3 if mask else None
    scale_tensor = {"tensor": torch.rand(2, 2), "per query": torch.rand(2, 2, query.shape[2])}.get(scale)
    number = 0.3 if scale == "number" else None
    train_tokens = 99 if scale.endswith("_tokens") else None
    num_tokens = torch.tensor([20, 33]) if scale == "num_tokens" else None
    rule = (number, train_tokens, 0.0, None, num_tokens)
    arguments = (query, key, value, attn_mask, scale_tensor, *rule, False, entropy, lse, "auto")
    results = torch.library.opcheck(torch.ops.entropy_attn.attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_not_asked_for_is_not_allocated():
    query, key, value = qkv()
    arguments = (query, key, value, None, None, None, None, 0.0, None, None, False)
    out, entropy, lse = torch.ops.entropy_attn.attention(*arguments, False, False, "cpu")
    assert out.shape == query.shape
    assert lse.shape == entropy.shape == (0,)


def compiled(function):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_train_tokens_compiles_once_for_all_resolutions(layout, entropy):
    def layer(query, key, value):
        result = attention(query, key, value, train_tokens=1024, layout=layout, return_entropy=entropy)
        return (result.out * 2, result.entropy) if entropy else (result * 2,)

    fast, counter = compiled(layer)
    for N in TOKENS:
        inputs = qkv(N, layout)
        for got, expected in zip(fast(*inputs), layer(*inputs), strict=True):
            torch.testing.assert_close(got, expected)
    assert len(set(TOKENS)) >= 10
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(), (2,), (2, 2)], ids=str)
def test_tensor_scale_compiles_once_for_all_resolutions(shape):
    def layer(query, key, value, scale):
        return attention(query, key, value, scale=scale) + 1

    fast, counter = compiled(layer)
    for N in TOKENS:
        inputs, scale = qkv(N), torch.full(shape, entropy_scale(N, 1024, 16))
        torch.testing.assert_close(fast(*inputs, scale), layer(*inputs, scale))
    assert counter.frame_count == 1


def test_train_tokens_as_arguments_compile_once():
    def layer(query, key, value, train_tokens, num_tokens):
        return attention(query, key, value, train_tokens=train_tokens, num_tokens=num_tokens)

    fast, counter = compiled(layer)
    for N in TOKENS:
        inputs = qkv(N)
        torch.testing.assert_close(fast(*inputs, N + 100, N + 7), layer(*inputs, N + 100, N + 7))
    assert counter.frame_count == 1


def test_options_compile_in_one_graph():
    def layer(query, key, value, mask):
        a = attention(query, key, value, attn_mask=mask, enable_gqa=True, return_lse=True)
        b = attention(query, key, value, is_causal=True, enable_gqa=True, train_tokens=64, train_entropy=1.0)
        return a.out, a.lse, b

    fast, counter = compiled(layer)
    for N in TOKENS[:5]:
        inputs = (*qkv(N, H=4), torch.rand(2, 1, 1, N) > 0.2)
        for got, expected in zip(fast(*inputs), layer(*inputs), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_errors_of_values_survive_compilation():
    fast, _ = compiled(lambda q, k, v, T: attention(q, k, v, train_tokens=T))
    fast(*qkv(), 64)
    with pytest.raises(ValueError, match="train_tokens must be at least 2"):
        fast(*qkv(), 1)


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    fast = torch.compile(lambda q, k, v: attention(q * 2, k, v, train_tokens=64) + 1, fullgraph=True, dynamic=True)
    for N in TOKENS[:3]:
        query, key, value = qkv(N)
        expected = attention(query * 2, key, value, train_tokens=64) + 1
        torch.testing.assert_close(fast(query, key, value), expected)


class Layer(torch.nn.Module):
    def forward(self, query, key, value):
        result = attention(query, key, value, train_tokens=1024, return_entropy=True)
        return result.out, result.entropy


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    N = torch.export.Dim("N", min=2, max=1 << 20)
    shapes = {name: {2: N} for name in ("query", "key", "value")}
    program = torch.export.export(Layer(), tuple(qkv(64)), dynamic_shapes=shapes, strict=strict)
    assert any(node.target == torch.ops.entropy_attn.attention.default for node in program.graph.nodes)
    for N in TOKENS[:3]:
        inputs = qkv(N)
        for got, expected in zip(program.module()(*inputs), Layer()(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_float_scale_is_what_the_operator_avoids():
    # As docs/function.md says, SDPA is recompiled for each float scale, and fullgraph=True fails at the ninth.
    def layer(query, key, value, scale):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

    fast, counter = compiled(layer)

    def all_resolutions():
        for N in sorted(set(TOKENS)):
            fast(*qkv(N), entropy_scale(N, 1024, 16))

    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        all_resolutions()
    assert counter.frame_count >= 8
