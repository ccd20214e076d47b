"""Pipelines side by side, in one thread and in several, and runs that end in an exception."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_support import assert_close, assert_scaled, layers, run

import entropy_attn


@pytest.fixture
def pipe():
    pipe = tiny.sd()
    yield pipe
    entropy_attn.disable(pipe)


def test_interleaved_pipelines(pipe):
    other = tiny.sd()
    settings = {pipe: {"train_size": 512}, other: {"train_size": 256}}
    alone = {}
    for each, options in settings.items():
        with entropy_attn.enable(each, **options):
            alone[each] = run(each)
    assert_scaled(alone[pipe], alone[other])
    with entropy_attn.enable(pipe, train_size=512) as handle, entropy_attn.enable(other, train_size=256):
        for _ in range(2):
            for each in settings:
                assert torch.equal(run(each), alone[each])
    assert {row["train_tokens"] for row in handle.layers()} == {1024}


def in_step(*pipes, sizes=None):
    """Run pipelines in a thread each, that wait for one another inside of every self-attention."""
    barrier, results = threading.Barrier(len(pipes), timeout=120), {}

    def wait(*call):
        barrier.wait()

    def work(pipe):
        results[pipe] = run(pipe, (sizes or {}).get(pipe, 128))

    hooks = [attn.to_q.register_forward_hook(wait) for pipe in pipes for attn in layers(pipe.unet)]
    threads = [threading.Thread(target=work, args=(pipe,)) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for hook in hooks:
        hook.remove()
    return results


def test_threads_with_a_pipeline_each(pipe):
    other = tiny.sd()
    with entropy_attn.enable(pipe, train_size=512), entropy_attn.enable(other, train_size=256):
        alone = {each: run(each) for each in (pipe, other)}
        together = in_step(pipe, other)
    assert_scaled(alone[pipe], alone[other])
    for each, expected in alone.items():
        assert_close(together[each], expected)


def test_threads_with_one_unet(pipe):
    """As pipelines from `from_pipe` have it."""
    tokenizer = copy.deepcopy(pipe.tokenizer)  # one serves one thread at a time
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe, tokenizer=tokenizer)
    sizes = {pipe: 128, other: 192}
    with entropy_attn.enable(pipe, train_size=512):
        alone = {each: run(each, size) for each, size in sizes.items()}
        together = in_step(pipe, other, sizes=sizes)
    for each, expected in alone.items():
        assert_close(together[each], expected)


def test_thread_with_a_stock_pipeline(pipe):
    stock, other = run(pipe), tiny.sd()
    with entropy_attn.enable(pipe):
        together = in_step(pipe, other)
    assert_scaled(together[pipe], stock)
    assert_close(together[other], stock)


class Failing(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        raise ZeroDivisionError


class FailingAfterwards(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        super().__call__(*args, **kwargs)
        raise ZeroDivisionError


@pytest.mark.parametrize("processor", [Failing, FailingAfterwards])
@pytest.mark.parametrize("attention", ["attn1", "attn2"])
def test_exception_inside_a_layer(processor, attention, pipe):
    other, stock = tiny.sd(), run(pipe)
    attn = getattr(pipe.unet.mid_block.attentions[0].transformer_blocks[0], attention)
    query = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    attended = F.scaled_dot_product_attention(query, query, query)
    with entropy_attn.enable(pipe) as handle:
        scaled = run(pipe)
        attn.set_processor(processor())
        with pytest.raises(ZeroDivisionError):
            run(pipe)
        assert torch.equal(F.scaled_dot_product_attention(query, query, query), attended)
        assert_close(run(other), stock)
        attn.set_processor(AttnProcessor2_0())
        assert torch.equal(run(pipe), scaled)
        assert handle.layers()[0]["multiplier"] == pytest.approx(math.sqrt(math.log(64, 1024)))
        attn.set_processor(processor())
        with pytest.raises(ZeroDivisionError):
            run(pipe)
    attn.set_processor(AttnProcessor2_0())
    assert torch.equal(run(pipe), stock)


def interrupted(*call):
    raise KeyboardInterrupt


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_interrupt_inside_a_layer(processor, pipe):
    """PyTorch's hooks do not hear of it."""
    pipe.unet.set_attn_processor(processor())
    stock = run(pipe)
    with entropy_attn.enable(pipe):
        scaled = run(pipe)
        hook = layers(pipe.unet)[1].to_q.register_forward_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        hook.remove()
        assert torch.equal(run(pipe), scaled)
    assert_scaled(scaled, stock)
    assert torch.equal(run(pipe), stock)


def test_disabled_after_an_interrupt(pipe):
    query = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    attended = F.scaled_dot_product_attention(query, query, query)
    hook = layers(pipe.unet)[1].to_q.register_forward_hook(interrupted)
    with entropy_attn.enable(tiny.sd()) as other:
        with entropy_attn.enable(pipe), pytest.raises(KeyboardInterrupt):
            run(pipe)
        assert torch.equal(F.scaled_dot_product_attention(query, query, query), attended)
        assert other.enabled
    hook.remove()
