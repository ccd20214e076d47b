"""What is left behind by an interrupt, another library's patch or garbage collection at any moment: nothing."""

import contextlib
import gc
import random
import sys
import threading
import unittest.mock
import weakref

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_support import assert_scaled, layers, predict, run

import entropy_attn
from entropy_attn.diffusers.scaling import attached

PYTORCH_SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def grad_mode():
    """An interrupt inside `torch.no_grad` itself may leave gradients off, which is PyTorch's own state."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def stock():
    return predict(tiny.sd().unet)


def state(model):
    """All that a model holds beside its tensors."""
    return [
        {name: repr(value) if name.startswith("_") else value for name, value in module.__dict__.items()}
        for module in model.modules()
        if not isinstance(module, torch.nn.ModuleList)
    ]


def alone(unet):
    """A layer, a projection and SDPA, called by themselves."""
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [layers(unet)[0](x), layers(unet)[0].to_q(x), F.scaled_dot_product_attention(q, q, q)]


def assert_as_new(unet, expected, stock, other):
    """After an interrupt, while the model is still enabled: only what the denoiser itself runs is scaled."""
    assert all(torch.equal(a, b) for a, b in zip(alone(unet), expected, strict=True))
    assert torch.equal(predict(other), stock)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th event of the interpreter's profile hook: a call or a return."""

    def __init__(self, moment):
        self.moment, self.seen = moment, 0

    def __call__(self, frame, event, argument):
        self.seen += 1
        if self.seen == self.moment:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)

    def __exit__(self, *error):
        sys.setprofile(None)


def moments_of(call):
    counter = Interrupter(-1)
    with counter:
        call()
    return counter.seen


@pytest.mark.filterwarnings("ignore:entropy_attn:RuntimeWarning")  # a processor that does not call SDPA
@pytest.mark.parametrize("options", [{}, {"record_entropy": True}, {"attention": "fused", "steps": (0, 9)}])
@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_interrupts_at_random_moments(options, processor, stock):
    unet, other = tiny.sd().unet, tiny.sd().unet
    unet.set_attn_processor(processor())
    expected, before, mine = alone(unet), state(unet), predict(unet)
    handle = entropy_attn.enable(unet, **options)
    scaled = predict(unet)
    chosen = random.Random(0).sample(range(1, moments_of(lambda: predict(unet))), 35)
    for moment in chosen:  # 6 x 35 = 210 of them
        with pytest.raises(KeyboardInterrupt), Interrupter(moment):
            predict(unet)
        assert_as_new(unet, expected, stock, other)
        assert torch.equal(predict(unet), scaled)
    with pytest.raises(KeyboardInterrupt), Interrupter(chosen[0]):
        predict(unet)
    handle.disable()
    assert state(unet) == before
    assert torch.equal(predict(unet), mine)
    assert F.scaled_dot_product_attention is PYTORCH_SDPA


@pytest.mark.parametrize("name", ["attn1", "attn1.to_q", "attn1.to_out.0", "attn2", "attn2.to_q"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", ["register_forward_pre_hook", "register_forward_hook"])
def test_interrupts_in_every_hook(name, error, place, stock):
    def interrupt(*call):
        raise error

    unet, other = tiny.sd().unet, tiny.sd().unet
    expected, before = alone(unet), state(unet)
    with entropy_attn.enable(unet, record_entropy=True):
        scaled = predict(unet)
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        hook = getattr(block.get_submodule(name), place)(interrupt)
        with pytest.raises(error):
            predict(unet)
        hook.remove()
        assert_as_new(unet, expected, stock, other)
        assert torch.equal(predict(unet), scaled)
    assert state(unet) == before
    assert torch.equal(predict(unet), stock)
    assert F.scaled_dot_product_attention is PYTORCH_SDPA


@pytest.mark.parametrize("function", ["linear", "group_norm", "layer_norm", "scaled_dot_product_attention"])
def test_interrupts_in_operators(function, stock):
    unet, other = tiny.sd().unet, tiny.sd().unet
    expected, before, original = alone(unet), state(unet), getattr(F, function)
    with entropy_attn.enable(unet, attention="model", record_entropy=True):
        scaled = predict(unet)
        for number in (0, 2, 5):
            inner = getattr(F, function)
            outcomes = [unittest.mock.DEFAULT] * number + [KeyboardInterrupt]
            failing = unittest.mock.Mock(wraps=inner, side_effect=outcomes)
            with unittest.mock.patch.object(F, function, failing), pytest.raises(KeyboardInterrupt):
                predict(unet)
            assert_as_new(unet, expected, stock, other)
            assert torch.equal(predict(unet), scaled)
    assert state(unet) == before
    assert getattr(F, function) is original


@pytest.mark.parametrize("part", ["enable", "disable"])
def test_interrupts_while_it_is_enabled_or_disabled(part, stock):
    unet = tiny.sd().unet
    before = state(unet)

    def enable():
        return entropy_attn.enable(unet, record_entropy=True)

    last = moments_of(enable().disable if part == "disable" else enable)
    entropy_attn.disable(unet)
    for moment in random.Random(0).sample(range(1, last), 25):
        handle = None if part == "enable" else enable()
        with contextlib.suppress(KeyboardInterrupt), Interrupter(moment):
            enable() if handle is None else handle.disable()
        entropy_attn.disable(unet)
        assert state(unet) == before
        assert F.scaled_dot_product_attention is PYTORCH_SDPA
    assert torch.equal(predict(unet), stock)


def test_disabled_by_another_thread_within_a_layer(stock):
    unet, other = tiny.sd().unet, tiny.sd().unet
    handle = entropy_attn.enable(unet, record_entropy=True)

    def disable(*call):
        thread = threading.Thread(target=handle.disable)
        thread.start()
        thread.join()

    hook = layers(unet)[1].to_k.register_forward_hook(disable)
    predict(unet)
    hook.remove()
    assert torch.equal(predict(unet), stock)
    assert_as_new(unet, alone(other), stock, other)
    assert F.scaled_dot_product_attention is PYTORCH_SDPA


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_threads_that_share_a_unet(processor):
    unet = tiny.sd().unet
    unet.set_attn_processor(processor())
    samples = [torch.randn(1, 4, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 16, 24, 32)]

    def call(sample):
        with torch.no_grad():
            return unet(sample, 500, encoder_hidden_states=torch.ones(1, 7, 32)).sample

    with entropy_attn.enable(unet, strict=True):
        expected = [call(sample) for sample in samples]
        results: dict = {}
        for _ in range(8):
            threads = [
                threading.Thread(target=lambda i=i, sample=sample: results.__setitem__(i, call(sample)))
                for i, sample in enumerate(samples)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for i, wanted in enumerate(expected):
                torch.testing.assert_close(results[i], wanted, atol=1e-5, rtol=0)


def test_nothing_is_left_when_all_is_collected():
    pipe = tiny.sd()
    handle = entropy_attn.enable(pipe, record_entropy=True)
    run(pipe)
    kept = [weakref.ref(thing) for thing in (pipe, pipe.unet, handle)]
    assert F.scaled_dot_product_attention is not PYTORCH_SDPA
    del pipe, handle
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    assert F.scaled_dot_product_attention is PYTORCH_SDPA
    assert not list(attached)


def test_a_patch_around_enable(pipe):
    calls = []

    def patched(*args, **kwargs):
        calls.append(args)
        return PYTORCH_SDPA(*args, **kwargs)

    with unittest.mock.patch.object(F, "scaled_dot_product_attention", patched):
        handle = entropy_attn.enable(pipe, record_entropy=True)
        scaled = run(pipe)
        assert len(handle.entropy) == 1
    with pytest.warns(RuntimeWarning, match="entropy not recorded"):  # ours is gone, and that is said
        torch.testing.assert_close(run(pipe), scaled, atol=1e-5, rtol=0)
    handle.disable()
    assert F.scaled_dot_product_attention is PYTORCH_SDPA
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        assert torch.equal(run(pipe), scaled)
        assert len(handle.entropy) == 1
    assert F.scaled_dot_product_attention is PYTORCH_SDPA


def test_a_patch_that_stays_longer_than_ours(pipe):
    plain = run(pipe)
    handle = entropy_attn.enable(pipe, record_entropy=True)
    scaled = run(pipe)
    F.scaled_dot_product_attention = PYTORCH_SDPA  # someone's idea of the original
    handle.disable()
    with entropy_attn.enable(pipe, record_entropy=True, strict=True):
        assert torch.equal(run(pipe), scaled)
    assert F.scaled_dot_product_attention is PYTORCH_SDPA
    assert_scaled(scaled, plain)


def test_scripting_while_sdpa_is_replaced(pipe):
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 8, 4)
    with entropy_attn.enable(pipe, record_entropy=True):
        scripted = torch.jit.script(Attention())
    assert torch.equal(scripted(q), PYTORCH_SDPA(q, q, q))


def test_pipelines_that_never_were_enabled_are_untouched_after_an_interrupt(pipe):
    other = diffusers.StableDiffusionPipeline(**tiny.sd().components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain = run(other)
    entropy_attn.enable(pipe, record_entropy=True)
    hook = layers(pipe.unet)[1].to_k.register_forward_hook(lambda *call: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        run(pipe)
    hook.remove()
    assert torch.equal(run(other), plain)
    entropy_attn.disable(pipe)
