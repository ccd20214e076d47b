"""What the tests of the Diffusers adapter share: a short call of a UNet, and λ by another route."""

import contextlib
import math

import pytest
import tiny_pipelines as tiny
import torch

import entropy_attn

MULTIPLIER = math.sqrt(math.log(64, 1024))  # of all layers of `tiny.sd` at 128 x 128 pixels


def layers(model):
    return [module for name, module in model.named_modules() if name.endswith("attn1")]


def predict(unet, grad=False, **added):
    """One call of a UNet, with guidance, at 128 x 128 pixels."""
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 77, 32, generator=g)
    with torch.set_grad_enabled(grad):
        return unet(sample, 500, encoder_hidden_states=text, **added).sample


@contextlib.contextmanager
def multiplied_query(model):
    """λ by another route."""
    hooks = [attn.to_q.register_forward_hook(lambda module, args, q: q * MULTIPLIER) for attn in layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expected_from(run, model):
    """What an enabled model should give; told apart from what it gives when it is not."""
    stock = run()
    with multiplied_query(model):
        expected = run()
    assert (expected - stock).abs().max() > 1e-3
    return expected


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_multiplied(handle):
    assert [row["multiplier"] for row in handle.layers()] == pytest.approx([MULTIPLIER] * 4)


def remarks(handle):
    return {remark for row in handle.layers() for remark in row["remarks"]}


when = pytest.mark.parametrize("when", ["before", "after"])  # something is done to the model, relative to enabling it


@contextlib.contextmanager
def enabled(pipe_or_model, change, when, **options):
    """Enable a model before or after something else is done to it."""
    if when == "before":
        change()
    with entropy_attn.enable(pipe_or_model, **options) as handle:
        if when == "after":
            change()
        yield handle


def run(pipe, size=128, **options):
    """One step of a pipeline."""
    return tiny.call(pipe, size, size, steps=1, **options)


def assert_scaled(actual, stock):
    assert (actual - stock).abs().max() > 1e-4
