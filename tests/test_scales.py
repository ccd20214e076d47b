"""Each rule of `entropy_attn.scales`, against its formula, and against the model's attention in transformers."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support import normal
from torch._dynamo.testing import CompileCounter

from entropy_attn import attention, entropy_scale, scales

B, H, HKV, N, D = 2, 4, 2, 40, 16
POSITIONS = torch.arange(N)


def inputs(dtype=torch.float64, heads=(H, H, H)):
    return [normal(B, h, N, D, seed=i).to(dtype) for i, h in enumerate(heads)]


def scaled_query_attention(query, key, value, multiplier):
    """Causal SDPA whose query was multiplied row by row, as models do it."""
    return F.scaled_dot_product_attention(query * multiplier[..., None], key, value, is_causal=True)


# Formulas, one number at a time.
FORMULAS = {
    "causal_entropy": (
        lambda i: math.sqrt(math.log(i + 1) / math.log(12)),
        lambda q, p: scales.causal_entropy(q, p, train_tokens=12),
    ),
    "causal_entropy, H_T": (
        lambda i: math.sqrt(max(0.0, math.log(i + 1) - 1.5) / (math.log(12) - 1.5)),
        lambda q, p: scales.causal_entropy(q, p, train_tokens=12, train_entropy=1.5),
    ),
    "causal_entropy, beyond": (
        lambda i: math.sqrt(max(1.0, (math.log(i + 1) - 1.5) / (math.log(12) - 1.5))),
        lambda q, p: scales.causal_entropy(q, p, train_tokens=12, train_entropy=1.5, beyond_training_only=True),
    ),
    "log_n": (lambda i: math.log(i + 1, 12), lambda q, p: scales.log_n(q, p, train_tokens=12)),
    "log_n, beyond": (
        lambda i: math.log(i + 1, 12) if i + 1 > 12 else 1.0,
        lambda q, p: scales.log_n(q, p, train_tokens=12, beyond_training_only=True),
    ),
    "ssmax": (lambda i: 0.43 * math.log(i + 1), lambda q, p: scales.ssmax(q, p, s=0.43)),
    "ssmax, b": (
        lambda i: 0.43 * math.log(i + 1) + 0.7,
        lambda q, p: scales.ssmax(q, p, s=torch.tensor(0.43, dtype=torch.float64), b=0.7),
    ),
    "llama4": (
        lambda i: 1 + 0.3 * math.log(1 + (i + 1) // 7),
        lambda q, p: scales.llama4(q, p, floor_scale=7, attn_scale=0.3),
    ),
    "ministral3": (
        lambda i: 1 + 0.3 * math.log(1 + i // 7),
        lambda q, p: scales.ministral3(q, p, original_max_position_embeddings=7, llama_4_scaling_beta=0.3),
    ),
    "grok": (
        lambda i: math.log2(i) / math.log2(7) if i > 7 else 1.0,
        lambda q, p: scales.grok(q, p, attn_temperature_len=7),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_attention_of_the_formula(name, dtype):
    formula, rule = FORMULAS[name]
    query, key, value = inputs(dtype)
    multiplier = torch.tensor([formula(i) for i in range(N)], dtype=dtype)
    scale = rule(query, POSITIONS)
    assert scale.shape == (B, H, N)
    assert scale.dtype == dtype
    torch.testing.assert_close(scale, (multiplier / math.sqrt(D)).expand(B, H, N))
    expected = scaled_query_attention(query, key, value, multiplier)
    torch.testing.assert_close(attention(query, key, value, is_causal=True, scale=scale), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_positions_of_samples_and_decoding(name):
    """Each row alone, with the keys that it sees and its position, is that row of the whole sequence."""
    _, rule = FORMULAS[name]
    query, key, value = inputs()
    whole = attention(query, key, value, is_causal=True, scale=rule(query, POSITIONS))
    for i in (0, 6, 7, 11, 12, N - 1):
        row = query[:, :, i : i + 1]
        decoded = attention(row, key[:, :, : i + 1], value[:, :, : i + 1], scale=rule(row, torch.tensor([i])))
        torch.testing.assert_close(decoded, whole[:, :, i : i + 1])
    apart = torch.stack([POSITIONS, POSITIONS + 5]).int()
    scale = rule(query, apart)
    torch.testing.assert_close(scale[0], rule(query[:1], POSITIONS)[0])
    torch.testing.assert_close(scale[1], rule(query[:1], POSITIONS + 5)[0])


@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_has_a_float32_scale_without_copies(name):
    _, rule = FORMULAS[name]
    query, key, value = inputs(torch.bfloat16)
    scale = rule(query, POSITIONS)
    torch.testing.assert_close(scale, rule(query.float(), POSITIONS), atol=0, rtol=0)
    assert scale.dtype == torch.float32
    assert scale.stride()[:2] == (0, 0)
    assert attention(query, key, value, is_causal=True, scale=scale).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_query_is_not_rounded_again(dtype):
    """A scale has less error than a multiplied query, by the factors of docs/function.md."""
    query, key, value = ((x * (3 if i == 0 else 1)).to(dtype) for i, x in enumerate(inputs()))
    rule = functools.partial(scales.llama4, positions=POSITIONS, floor_scale=4)
    exact = (x.double() for x in (query, key, value))
    wanted = attention(*exact, is_causal=True, scale=rule(query.double()))
    multiplied = query * (rule(query) * math.sqrt(D))[..., None].to(dtype)
    unit = torch.full((), 1 / math.sqrt(D))
    errors = [
        (attention(given, key, value, is_causal=True, scale=scale).double() - wanted).norm()
        for given, scale in ((query, rule(query)), (multiplied, unit))
    ]
    assert errors[1] > 1.4 * errors[0]


def test_layout():
    query = inputs()[0]
    for name, options in (("llama4", {"floor_scale": 7}), ("ssmax", {"s": torch.linspace(0.2, 0.6, H)})):
        rule = getattr(scales, name)
        other = rule(query.transpose(1, 2).contiguous(), POSITIONS, layout="bnhd", **options)
        torch.testing.assert_close(other, rule(query, POSITIONS, **options))


def test_one_row_of_the_paper():
    """A row that sees N keys has the scale of `entropy_scale` for N keys."""
    scale = scales.causal_entropy(inputs()[0], POSITIONS, train_tokens=12, train_entropy=0.3)
    for n in (2, 12, 40):
        assert scale[1, 2, n - 1].item() == pytest.approx(entropy_scale(n, 12, D, 0.3), rel=1e-12)


def test_large_positions_step_where_they_must():
    """Above 2**24 float32 has no odd numbers."""
    at = torch.tensor([2**25 - 2, 2**25 - 1])
    query = torch.empty(1, 1, 2, D)
    low, high = scales.llama4(query, at, floor_scale=2**25)[0, 0].tolist()
    assert (low, high) == pytest.approx([1 / 4, (1 + 0.1 * math.log(2)) / 4])


@pytest.mark.parametrize("name", FORMULAS)
def test_is_compiled_once(name):
    torch.compiler.reset()
    graphs, (_, rule) = CompileCounter(), FORMULAS[name]

    def layer(query, key, value, positions):
        return attention(query, key, value, is_causal=True, scale=rule(query, positions))

    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    for n in (5, 9, 33):
        query, key, value = (x[:, :, :n] for x in inputs())
        expected = layer(query, key, value, POSITIONS[:n])
        torch.testing.assert_close(compiled(query, key, value, POSITIONS[:n]), expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, p: scales.llama4(q, p.float()), ValueError, "positions must be an int32 or int64 tensor"),
        (lambda q, p: scales.llama4(q, 3), TypeError, "positions must be a tensor, got int"),
        (lambda q, p: scales.llama4(q, p[:3]), ValueError, r"positions must have shape \(Nq,\) = \(40,\)"),
        (lambda q, p: scales.llama4(q, p.expand(3, N)), ValueError, r"\(2, 40\), got \(3, 40\)"),
        (lambda q, p: scales.llama4(q, p.to("meta")), ValueError, "positions must be on the device of query"),
        (lambda q, p: scales.llama4(q[0], p), ValueError, "query must have 4 axes"),
        (lambda q, p: scales.llama4(q.int(), p), ValueError, "query must be a floating tensor"),
        (lambda q, p: scales.llama4(q, p, layout="nbhd"), ValueError, "layout must be"),
        (lambda q, p: scales.llama4(q, p, floor_scale=0), ValueError, "floor_scale must be at least 1, got 0"),
        (lambda q, p: scales.llama4(q, p, floor_scale=8192.0), TypeError, "floor_scale must be an int, got float"),
        (lambda q, p: scales.llama4(q, p, attn_scale=math.nan), ValueError, "attn_scale must be finite, got nan"),
        (lambda q, p: scales.llama4(q, p, attn_scale="0.1"), TypeError, "attn_scale must be a float, got str"),
        (
            lambda q, p: scales.ministral3(q, p, original_max_position_embeddings=None),
            TypeError,
            "original_max_position_embeddings must be an int, got NoneType",
        ),
        (lambda q, p: scales.ministral3(q, p, llama_4_scaling_beta=None), TypeError, "llama_4_scaling_beta must be"),
        (
            lambda q, p: scales.grok(q, p, attn_temperature_len=-1),
            ValueError,
            "attn_temperature_len must be at least 2",
        ),
        (lambda q, p: scales.log_n(q, p, train_tokens=1), ValueError, "train_tokens must be at least 2, got 1"),
        (
            lambda q, p: scales.log_n(q, p, train_tokens=9, beyond_training_only=1),
            TypeError,
            "beyond_training_only must be a bool",
        ),
        (
            lambda q, p: scales.causal_entropy(q, p, train_tokens=9, train_entropy=2.2),
            ValueError,
            r"train_entropy must be in 0 … ln\(train_tokens\) = 2.1972 nats, got 2.2",
        ),
        (lambda q, p: scales.ssmax(q, p, s=torch.ones(3)), ValueError, r"s must have shape \(\) or \(H,\) = \(4,\)"),
        (lambda q, p: scales.ssmax(q, p, s=torch.ones(4).int()), ValueError, "s must be a floating tensor"),
        (lambda q, p: scales.ssmax(q, p, s=1.0, b=[0.0]), TypeError, "b must be a float or a tensor, got list"),
        (
            lambda q, p: scales.longrope(q, max_position_embeddings=8, original_max_position_embeddings=1),
            ValueError,
            "original_max_position_embeddings must be at least 2",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(inputs()[0], POSITIONS)


# The attention modules of transformers, in float64. Their multipliers are float32, which is the error allowed.
SIZES = {"hidden_size": 32, "num_attention_heads": H, "num_key_value_heads": HKV, "num_hidden_layers": 4}
SIZES |= {"intermediate_size": 32, "vocab_size": 8, "pad_token_id": 0, "attn_implementation": "eager"}
ROUNDING = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture
def transformers():
    torch.manual_seed(0)
    with torch.no_grad():
        yield pytest.importorskip("transformers", minversion="5")


def model_attention(transformers, module, hidden, rotary, steps):
    """The output of the module for the tokens of each step, with the keys of the steps before from its cache."""
    cache, outs, seen = transformers.DynamicCache(), [], 0
    for now in steps:
        part = slice(seen, seen + now)
        mask = torch.full((now, seen + now), -math.inf, dtype=hidden.dtype).triu(seen + 1)
        out, _ = module(
            hidden[:, part], position_embeddings=rotary(part), attention_mask=mask, past_key_values=cache,
            position_ids=POSITIONS[None, part],
        )  # fmt: skip
        outs.append(out)
        seen += now
    return torch.cat(outs, 1)


def our_attention(module, hidden, rotate, steps, rule):
    """The same with `attention` between the module's own projections."""
    query, key, value = (
        projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projected in (module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden))
    )
    (query, key), outs, seen = rotate(query, key), [], 0
    for now in steps:
        row, Nk = query[:, :, seen : seen + now], seen + now
        mask = torch.ones(now, Nk, dtype=torch.bool).tril(seen)
        scale = rule(row, torch.arange(seen, Nk))
        out = attention(row, key[:, :, :Nk], value[:, :, :Nk], mask, scale=scale, enable_gqa=True)
        outs.append(module.o_proj(out.transpose(1, 2).flatten(2)))
        seen += now
    return torch.cat(outs, 1)


def plain(query, positions):
    return query.new_tensor(1 / math.sqrt(D))


STEPS = pytest.mark.parametrize("steps", [[N], [25, 14, 1]], ids=["whole", "prefill and decode"])


@STEPS
def test_llama4_of_transformers(transformers, steps):
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    # The last layer has no rotary embedding.
    config = llama4.Llama4TextConfig(
        **SIZES, head_dim=D, no_rope_layers=[1, 1, 1, 0], floor_scale=7, attn_scale=0.3, attention_chunk_size=64
    )
    module, hidden = llama4.Llama4TextAttention(config, layer_idx=3).double(), 3 * normal(B, N, 32).double()
    theirs = model_attention(transformers, module, hidden, lambda part: None, steps)
    found = [
        our_attention(module, hidden, lambda q, k: (q, k), steps, rule)
        for rule in (lambda q, p: scales.llama4(q, p, floor_scale=7, attn_scale=0.3), plain)
    ]
    torch.testing.assert_close(found[0], theirs, **ROUNDING)
    assert (found[1] - theirs).abs().max() > 1e3 * ROUNDING["atol"]


@STEPS
def test_ministral3_of_transformers(transformers, steps):
    ministral3 = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.3,
        "original_max_position_embeddings": 7,
    }
    config = ministral3.Ministral3Config(**SIZES, head_dim=D, rope_parameters=rope)
    module, hidden = ministral3.Ministral3Attention(config, layer_idx=0).double(), 3 * normal(B, N, 32).double()
    cos, sin = ministral3.Ministral3RotaryEmbedding(config)(hidden, POSITIONS[None])
    theirs = model_attention(transformers, module, hidden, lambda part: (cos[:, part], sin[:, part]), steps)
    found = [
        our_attention(module, hidden, lambda q, k: ministral3.apply_rotary_pos_emb(q, k, cos, sin), steps, rule)
        for rule in (
            lambda q, p: scales.ministral3(q, p, original_max_position_embeddings=7, llama_4_scaling_beta=0.3),
            plain,
        )
    ]
    torch.testing.assert_close(found[0], theirs, **ROUNDING)
    assert (found[1] - theirs).abs().max() > 1e3 * ROUNDING["atol"]


def test_longrope_of_transformers(transformers):
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * (D // 2), "long_factor": [1.5] * (D // 2)}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 16}

    def rotary(**options):
        config = phi3.Phi3Config(**(SIZES | {"hidden_size": H * D}), **lengths, rope_parameters=rope | options)
        return phi3.Phi3RotaryEmbedding(config)

    query, key, value = inputs(torch.float64, (H, HKV, HKV))
    with_factor = phi3.apply_rotary_pos_emb(query, key, *rotary()(query, POSITIONS[None]))
    without = phi3.apply_rotary_pos_emb(query, key, *rotary(attention_factor=1.0)(query, POSITIONS[None]))
    options = {"is_causal": True, "enable_gqa": True}
    theirs = F.scaled_dot_product_attention(*with_factor, value, **options)
    ours = attention(*without, value, scale=scales.longrope(query, **lengths), **options)
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert (attention(*without, value, **options) - theirs).abs().max() > 1e3 * ROUNDING["atol"]


def test_ssmax_of_transformers(transformers):
    large = pytest.importorskip("transformers.models.mistral_large4.modeling_mistral_large4")
    scaling = large.MistralLarge4TextSoftmaxScaling(H).double()
    s, b = torch.linspace(0.2, 0.6, H).double(), torch.linspace(-0.1, 0.5, H).double()
    scaling.load_state_dict({"scale": s, "bias": b})
    query, key, value = inputs()
    scaled = scaling(query, POSITIONS[None], head_dim_first=True)
    theirs = F.scaled_dot_product_attention(scaled, key, value, is_causal=True)
    ours = attention(query, key, value, is_causal=True, scale=scales.ssmax(query, POSITIONS, s=s, b=b))
    torch.testing.assert_close(ours, theirs, **ROUNDING)
