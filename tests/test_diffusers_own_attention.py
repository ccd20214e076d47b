"""λ where attention is computed by others, or differentiated: every processor and backend of Diffusers, gradients."""

import math
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines as tiny
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_support import (
    assert_close,
    assert_multiplied,
    enabled,
    expected_from,
    layers,
    multiplied_query,
    predict,
    remarks,
    when,
)  # fmt: skip

import entropy_attn


@pytest.fixture
def default_backend():
    """Models that set a backend set it for all of the process, and leave it so."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry._active_backend = active


OWN_ATTENTION = {
    "slices": lambda unet: unet.set_attention_slice(1),
    "default processors": lambda unet: unet.set_default_attn_processor(),
}
own_attention = pytest.mark.parametrize("change", OWN_ATTENTION.values(), ids=OWN_ATTENTION)


@own_attention
@when
def test_processors_that_read_the_scale(change, when, unet):
    expected = expected_from(lambda: predict(unet), unet)
    scales = [attn.scale for attn in layers(unet)]
    with enabled(unet, lambda: change(unet), when, strict=True) as handle:
        assert_close(predict(unet), expected)
        assert_multiplied(handle)
        assert not remarks(handle)
        assert [attn.scale for attn in layers(unet)] == scales


@own_attention
def test_entropy_of_processors_that_compute_their_own_attention(change, unet):
    with entropy_attn.enable(unet, record_entropy=True) as handle:
        change(unet)
        with pytest.warns(RuntimeWarning, match="entropy not recorded: .*AttnProcessor did not call F.scaled_dot_"):
            predict(unet)
    assert len(handle.entropy) == 0
    with (
        entropy_attn.enable(unet, record_entropy=True, strict=True),
        pytest.raises(RuntimeError, match="attn1: entropy not"),
    ):
        predict(unet)
    assert [attn.scale for attn in layers(unet)] == [8**-0.5] * 4


class Foreign:
    """Computes attention without SDPA and without a scale from outside."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


class LikeXFormers:
    """Gives attn.scale to an attention function of its own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            attn.head_to_batch_dim(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = self.attend(query, key, value, scale=attn.scale)
        return attn.to_out[0](attn.batch_to_head_dim(out))

    def attend(self, query, key, value, scale):
        return (query @ key.mT * scale).softmax(dim=-1) @ value


def set_self_attention(unet, processor):
    for attn in layers(unet):
        attn.set_processor(processor)


def test_processor_that_computes_everything_itself(unet):
    set_self_attention(unet, Foreign())
    expected = expected_from(lambda: predict(unet), unet)
    with entropy_attn.enable(unet, strict=True) as handle:
        assert_close(predict(unet), expected)
    assert_multiplied(handle)
    assert not remarks(handle)


class Multiplying:
    """Makes its query without the module's projection."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            (hidden_states @ p.weight.mT).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:entropy_attn.*Multiplying")
def test_processor_that_has_no_query_to_multiply(unet):
    stock = predict(unet)
    set_self_attention(unet, Multiplying())
    assert_close(predict(unet), stock)
    with entropy_attn.enable(unet) as handle:
        with pytest.warns(RuntimeWarning, match=r"mid_block.*attn1: trained scale: Multiplying makes its query"):
            assert_close(predict(unet), stock)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predict(unet)
    assert {row["multiplier"] for row in handle.layers()} == {1.0}
    assert str(handle).count("trained scale: Multiplying makes its query") == 4
    with entropy_attn.enable(unet, strict=True), pytest.raises(RuntimeError, match="attn1: trained scale: Multiplying"):
        predict(unet)
    assert_close(predict(unet), stock)


def test_processor_that_has_no_query_to_multiply_needs_none_at_the_trained_size(unet):
    set_self_attention(unet, Multiplying())
    stock = predict(unet)
    with entropy_attn.enable(unet, train_size=16, strict=True) as handle:
        assert torch.equal(predict(unet), stock)
    assert not remarks(handle)


def test_processor_like_that_of_xformers(unet):
    expected = expected_from(lambda: predict(unet), unet)
    set_self_attention(unet, LikeXFormers())
    with entropy_attn.enable(unet, strict=True) as handle:
        assert_close(predict(unet), expected)
    assert_multiplied(handle)
    assert not remarks(handle)


def test_backend_of_pytorch(default_backend):
    pipe = tiny.flux()
    stock = tiny.call(pipe, 128, 128)
    with entropy_attn.enable(pipe, strict=True) as handle:
        native = tiny.call(pipe, 128, 128)
        pipe.transformer.set_attention_backend("_native_math")
        assert_close(tiny.call(pipe, 128, 128), native, atol=1e-4)
    assert not torch.allclose(native, stock, atol=1e-2)
    assert not remarks(handle)


FLEX = "ignore:.*flex_attention called without torch.compile"


@pytest.mark.filterwarnings(FLEX)
def test_backend_other_than_pytorchs(default_backend):
    pipe = tiny.flux()
    stock = tiny.call(pipe, 128, 128)
    with entropy_attn.enable(pipe, strict=True) as handle:
        native = tiny.call(pipe, 128, 128)
        rows = handle.layers()
        pipe.transformer.set_attention_backend("flex")
        assert_close(tiny.call(pipe, 128, 128), native, atol=1e-4)
        assert [row["multiplier"] for row in handle.layers()] == [row["multiplier"] for row in rows]
    assert not torch.allclose(native, stock, atol=1e-2)
    assert not remarks(handle)
    assert_close(tiny.call(pipe, 128, 128), stock, atol=1e-4)


@pytest.mark.filterwarnings(FLEX)
def test_entropy_with_another_backend(default_backend):
    pipe = tiny.flux()
    pipe.transformer.set_attention_backend("flex")
    with (
        entropy_attn.enable(pipe, record_entropy=True) as handle,
        pytest.warns(
            RuntimeWarning,
            match="entropy not recorded: Flux.* did not call F.scaled_dot_product_attention over 96 keys",
        ),
    ):
        tiny.call(pipe, 128, 128, steps=1)
    assert len(handle.entropy) == 0
    with entropy_attn.enable(pipe, record_entropy=True, strict=True), pytest.raises(RuntimeError, match="not recorded"):
        tiny.call(pipe, 128, 128, steps=1)


@pytest.mark.filterwarnings(FLEX)
def test_backend_of_a_context(default_backend):
    pipe = tiny.flux()
    with entropy_attn.enable(pipe) as handle:
        native = tiny.call(pipe, 128, 128)
        with attention_dispatch.attention_backend("flex"):
            assert_close(tiny.call(pipe, 128, 128), native, atol=1e-4)
    assert not remarks(handle)


def gradients(unet, **added):
    unet.zero_grad()
    predict(unet, grad=True, **added).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in unet.named_parameters() if weight.grad is not None}


def assert_gradients_agree(actual, expected, stock):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(actual[name], grad, atol=1e-5 + 1e-4 * grad.abs().max().item())
    queries = [name for name in stock if "attn1.to_q" in name]
    assert len(queries) == 4
    assert all((stock[name] - expected[name]).abs().max() > 0.01 * expected[name].abs().max() for name in queries)


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_gradients(processor, unet):
    unet.set_attn_processor(processor())
    stock = gradients(unet)
    with multiplied_query(unet):
        expected = gradients(unet)
    with entropy_attn.enable(unet, strict=True):
        actual = gradients(unet)
    assert_gradients_agree(actual, expected, stock)


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_gradients_with_checkpointing(processor, unet):
    """The backward pass runs the layers again, when the model no longer does."""
    unet.set_attn_processor(processor())
    stock = gradients(unet)
    with multiplied_query(unet):
        expected = gradients(unet)
    unet.train().enable_gradient_checkpointing()
    with entropy_attn.enable(unet, strict=True):
        actual = gradients(unet)
    assert_gradients_agree(actual, expected, stock)


def test_gradient_of_the_sample(unet):
    unet.requires_grad_(False)

    def gradient():
        sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        unet(sample, 500, encoder_hidden_states=torch.ones(1, 7, 32)).sample.square().sum().backward()
        return sample.grad

    expected = expected_from(gradient, unet)
    with entropy_attn.enable(unet, strict=True):
        assert_close(gradient(), expected)


def test_entropy_is_not_recorded_with_gradients(unet):
    with entropy_attn.enable(unet, record_entropy=True) as handle:
        with pytest.warns(RuntimeWarning, match="entropy not recorded: query requires grad"):
            gradients(unet)
        assert len(handle.entropy) == 0
        predict(unet)
        assert len(handle.entropy) == 1


def test_entropy_is_recorded_once_with_checkpointing(unet):
    unet.requires_grad_(False)
    last = unet.up_blocks[0].attentions[1].transformer_blocks[0].ff.requires_grad_(True)
    with multiplied_query(unet):
        expected = gradients(unet)
    unet.train().enable_gradient_checkpointing()
    with entropy_attn.enable(unet, record_entropy=True, strict=True) as handle:
        actual = gradients(unet)
    assert len(expected) == len(list(last.parameters()))
    for name, grad in expected.items():
        assert_close(actual[name], grad, atol=1e-5 + 1e-4 * grad.abs().max().item())
    assert len(handle.entropy) == 1
