"""EntropyAttnProcessor against the processor it stands in for."""

import inspect
import math

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines as tiny
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0, SpatialNorm

from entropy_attn.diffusers import EntropyAttnProcessor


def module(**options):
    torch.manual_seed(0)
    arguments = {"query_dim": 32, "heads": 4, "dim_head": 8, "processor": AttnProcessor2_0(), **options}
    return Attention(**arguments).eval()


def tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def both(attn, processor, *arguments, stock=None, **options):
    """What the stock processor and `processor` make of a call."""
    with torch.no_grad():
        attn.set_processor(stock or AttnProcessor2_0())
        expected = attn(*arguments, **options)
        attn.set_processor(processor)
        return attn(*arguments, **options), expected


MASK = torch.where(torch.arange(10) < 7, 0.0, -10000.0)
CASES = {
    "self": ({}, (tensor(2, 10, 32),), {}),
    "image": ({"norm_num_groups": 4, "residual_connection": True}, (tensor(2, 32, 4, 5),), {}),
    "spatial norm": ({"spatial_norm_dim": 6}, (tensor(2, 32, 4, 4),), {"temb": tensor(2, 6, 2, 2)}),
    "residual and rescale": ({"residual_connection": True, "rescale_output_factor": 1.7}, (tensor(2, 10, 32),), {}),
    "cross": ({"cross_attention_dim": 12}, (tensor(2, 10, 32),), {"encoder_hidden_states": tensor(2, 7, 12)}),
    "cross norm": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        (tensor(2, 10, 32),),
        {"encoder_hidden_states": tensor(2, 7, 12)},
    ),
    "cross group norm": (
        {"cross_attention_dim": 12, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
        (tensor(2, 10, 32),),
        {"encoder_hidden_states": tensor(2, 7, 12)},
    ),
    "mask": ({}, (tensor(2, 10, 32),), {"attention_mask": MASK.expand(2, 1, 10)}),
    "padded mask": (
        {"cross_attention_dim": 12},
        (tensor(2, 9, 32),),
        {"encoder_hidden_states": tensor(2, 17, 12), "attention_mask": torch.zeros(2, 1, 17)},
    ),
    "qk norm": ({"qk_norm": "layer_norm"}, (tensor(2, 10, 32),), {}),
    "qk rms norm": ({"qk_norm": "rms_norm"}, (tensor(2, 10, 32),), {}),
    "bias": ({"bias": True, "out_bias": False}, (tensor(2, 10, 32),), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_stock_one_does(case):
    options, arguments, keywords = CASES[case]
    ours, expected = both(module(**options), EntropyAttnProcessor(), *arguments, **keywords)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_spatial_norm_takes_part():
    attn = module(spatial_norm_dim=6)
    assert isinstance(attn.spatial_norm, SpatialNorm)


@pytest.mark.parametrize("cross", [False, True])
def test_fused_projections(cross):
    attn = module(**({"cross_attention_dim": 12} if cross else {}))
    text = {"encoder_hidden_states": tensor(2, 7, 12)} if cross else {}
    attn.fuse_projections()
    attn.fused_projections = True
    ours, expected = both(attn, EntropyAttnProcessor(), tensor(2, 10, 32), stock=FusedAttnProcessor2_0(), **text)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_a_whole_unet():
    unet = tiny.unet(32, "two levels")
    sample, text = tensor(2, 4, 16, 16), tensor(2, 77, 32)
    with torch.no_grad():
        expected = unet(sample, 500, encoder_hidden_states=text).sample
        unet.set_attn_processor(EntropyAttnProcessor())
        ours = unet(sample, 500, encoder_hidden_states=text).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_scale_and_entropy_of_self_attention():
    attn, x = module(), tensor(2, 50, 32)
    seen = []
    processor = EntropyAttnProcessor(train_tokens=400, on_entropy=lambda *call: seen.append(call))
    ours, expected = both(attn, processor, x)
    query, key = (p(x).unflatten(-1, (4, 8)).transpose(1, 2).double() for p in (attn.to_q, attn.to_k))
    weights = (query @ key.mT * math.sqrt(math.log(50, 400) / 8)).softmax(-1)
    value = attn.to_v(x).unflatten(-1, (4, 8)).transpose(1, 2).double()
    out = attn.to_out[0]((weights @ value).float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, out, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ours, expected, atol=1e-4)
    (noted, entropy), *rest = seen
    assert noted is attn
    assert not rest
    expected_entropy = -(weights * weights.log()).sum(-1)
    torch.testing.assert_close(entropy, expected_entropy.float(), atol=1e-5, rtol=0)


def test_calibrated_scale():
    attn, x = module(), tensor(2, 50, 32)
    ours, _ = both(attn, EntropyAttnProcessor(train_tokens=400, train_entropy=3.0), x)
    multiplier = math.sqrt((math.log(50) - 3) / (math.log(400) - 3))
    attn.to_q.register_forward_hook(lambda *call: call[-1] * multiplier)
    with torch.no_grad():
        attn.set_processor(AttnProcessor2_0())
        torch.testing.assert_close(ours, attn(x), atol=1e-6, rtol=1e-5)


def test_cross_attention_keeps_its_scale():
    text = {"encoder_hidden_states": tensor(2, 7, 12)}
    attn = module(cross_attention_dim=12)
    ours, expected = both(attn, EntropyAttnProcessor(train_tokens=400), tensor(2, 10, 32), **text)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "train_tokens"), [(1, 16), (16, 1)])
def test_a_single_token_keeps_its_scale(tokens, train_tokens):
    ours, expected = both(module(), EntropyAttnProcessor(train_tokens), tensor(2, tokens, 32))
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_its_signature_names_what_the_stock_one_takes():
    """Modules drop the keyword arguments that a processor does not name."""
    stock = inspect.signature(AttnProcessor2_0.__call__).parameters
    ours = inspect.signature(EntropyAttnProcessor.__call__).parameters
    assert [name for name in stock if name not in ("args", "kwargs")] == [
        n for n in ours if n not in ("args", "kwargs")
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_tokens": 0}, ValueError, "train_tokens must be at least 1, got 0"),
        ({"train_tokens": 64.0}, TypeError, "train_tokens must be an int or None, got float"),
        ({"train_tokens": True}, TypeError, "train_tokens must be an int or None, got bool"),
        ({"train_entropy": 1.0}, ValueError, "train_entropy needs train_tokens"),
        ({"on_entropy": 3}, TypeError, "on_entropy must be callable, got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EntropyAttnProcessor(**arguments)
