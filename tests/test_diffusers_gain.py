"""`gain_exponent`: the gain on the output of self-attention."""

import copy
import math
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines as tiny

import entropy_attn
from entropy_attn.entropy import Tokens
from entropy_attn.entropy.rule import Rule

LOG_RATIO = math.log(64) / math.log(1024)  # log_T N of the first level at 128 pixels, trained at 512


def first_layer(unet):
    return next(module for name, module in unet.named_modules() if name.endswith("attn1"))


def output_of_attention(pipe, attn, size=128, **options):
    """The first input of the layer's output projection: the output of its attention."""
    seen = []
    hook = attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        if options:
            with entropy_attn.enable(pipe, **options):
                tiny.call(pipe, size, size, steps=1)
        else:
            tiny.call(pipe, size, size, steps=1)
    finally:
        hook.remove()
    return seen[0]


def test_the_rule():
    assert Rule(gain_exponent=2.0).gain_for(Tokens(64, 1024)) == pytest.approx(LOG_RATIO**2)
    assert Rule(gain_exponent=2.0, min_multiplier=1.0).gain_for(Tokens(64, 1024)) == pytest.approx(LOG_RATIO**2)
    assert Rule(gain_exponent=2.0, train_entropy=3.0).gain_for(Tokens(64, 1024)) == pytest.approx(LOG_RATIO**2)
    in_graph = Rule(gain_exponent=2.0).gain_for(Tokens(64, 1024), torch.device("cpu"))
    assert in_graph.item() == pytest.approx(LOG_RATIO**2)
    for tokens in (Tokens(64, 64), Tokens(1, 64), Tokens(64, None)):
        assert Rule(gain_exponent=2.0).gain_for(tokens) == 1.0
    assert Rule().gain_for(Tokens(64, 1024)) == 1.0


@pytest.mark.parametrize("attention", ["model", "fused"])
@pytest.mark.parametrize("fused_projections", [False, True])
def test_the_output_is_multiplied(attention, fused_projections):
    pipe = tiny.sd()
    if fused_projections:
        pipe.fuse_qkv_projections()
    attn = first_layer(pipe.unet)
    trained = output_of_attention(pipe, attn)
    found = output_of_attention(pipe, attn, exponent=0, gain_exponent=1.5, attention=attention)
    torch.testing.assert_close(found, trained * LOG_RATIO**1.5)
    scaled = output_of_attention(pipe, attn, exponent=2, attention=attention)
    found = output_of_attention(pipe, attn, exponent=2, gain_exponent=1.5, attention=attention)
    torch.testing.assert_close(found, scaled * LOG_RATIO**1.5)
    assert not torch.allclose(scaled, trained, rtol=1e-4)


def test_cross_attention_and_the_trained_size_have_no_gain():
    pipe = tiny.sd()
    before = tiny.call(pipe, 512, 512, steps=1)
    with entropy_attn.enable(pipe, gain_exponent=1.0, attention="model") as handle:
        assert torch.equal(tiny.call(pipe, 512, 512, steps=1), before)
        cross = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
        assert not cross.to_v._forward_hooks
    assert {row["gain"] for row in handle.layers()} == {1.0}


@pytest.mark.parametrize(("family", "fused_projections"), [("sd3", False), ("flux", False), ("flux", True)])
def test_joint_attention(family, fused_projections):
    """Image and text: all values of a layer have the gain. Flux's query has a norm, behind the fused projection."""
    pipe = getattr(tiny, family)()
    if fused_projections:
        pipe.transformer.fuse_qkv_projections()
    attn = next(m for n, m in pipe.transformer.named_modules() if n.endswith("attn") and hasattr(m, "add_v_proj"))
    seen = {}

    def note(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    hooks = [
        attn.to_out[0].register_forward_pre_hook(note("image")),
        attn.to_add_out.register_forward_pre_hook(note("text")),
    ]
    tiny.call(pipe, 128, 128, steps=1)
    with entropy_attn.enable(pipe, exponent=0, gain_exponent=1.0) as handle:
        tiny.call(pipe, 128, 128, steps=1)
    for hook in hooks:
        hook.remove()
    name = next(n for n, m in pipe.transformer.named_modules() if m is attn)
    [row] = [row for row in handle.layers() if row["layer"] == f"transformer.{name}"]
    assert 0 < row["gain"] < 1
    for before, after in seen.values():
        torch.testing.assert_close(after, before * row["gain"])


def test_only_a_gain_hooks_the_value_and_all_hooks_go():
    pipe = tiny.sd()
    attn = first_layer(pipe.unet)
    with entropy_attn.enable(pipe):
        assert not attn.to_v._forward_hooks
        with entropy_attn.enable(pipe, gain_exponent=1.0):
            assert attn.to_v._forward_hooks
        assert not attn.to_v._forward_hooks
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_steps_and_overrides():
    pipe = tiny.sd()
    attn = first_layer(pipe.unet)
    trained = output_of_attention(pipe, attn)
    for options in ({"steps": (1, None)}, {"overrides": {"*": 1.0}}, {"overrides": {"*": {"gain_exponent": 0}}}):
        found = output_of_attention(pipe, attn, exponent=0, gain_exponent=1.0, **options)
        torch.testing.assert_close(found, trained, msg=str(options))
    found = output_of_attention(pipe, attn, exponent=0, overrides={"*down*": {"gain_exponent": 1.0}})
    torch.testing.assert_close(found, trained * LOG_RATIO)


def test_the_entropy_is_that_without_a_gain():
    tables = []
    for gain in (0.0, 1.0):
        pipe = tiny.sd()
        with entropy_attn.enable(pipe, gain_exponent=gain, record_entropy=True) as handle:
            tiny.call(pipe, 128, 128, steps=1)
        tables.append(handle.entropy.table())
    first, second = (table[0] for table in tables)  # of later layers the input is another
    assert first["entropy"] == pytest.approx(second["entropy"])
    assert (first["label"], second["label"]) == ("λ", "λ, gain exponent 1")


def test_a_copy_has_the_gain():
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, gain_exponent=1.0):
        expected = tiny.call(pipe, 128, 128, steps=1)
        for clone in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
            other = tiny.sd()
            other.unet = clone
            torch.testing.assert_close(tiny.call(other, 128, 128, steps=1), expected)


def test_the_handle_prints_it():
    pipe = tiny.sd()
    with entropy_attn.enable(pipe, gain_exponent=1.0) as handle:
        tiny.call(pipe, 128, 128, steps=1)
    assert f"{LOG_RATIO:.4f}" in str(handle)
    assert handle.layers()[0]["gain"] == pytest.approx(LOG_RATIO)


def test_a_processor_with_a_value_of_its_own_is_reported():
    pipe = tiny.sd()
    attn = first_layer(pipe.unet)

    class Processor:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            query = attn.to_q(hidden_states)
            value = torch.nn.functional.linear(hidden_states, attn.to_v.weight)
            return attn.to_out[0](query * 0 + value)

    attn.set_processor(Processor())
    with entropy_attn.enable(pipe, gain_exponent=1.0) as handle:
        with pytest.warns(RuntimeWarning, match="no gain: Processor makes its value"):
            tiny.call(pipe, 128, 128, steps=1)
        assert handle.layers()[0]["gain"] == 1.0
    with (
        entropy_attn.enable(pipe, gain_exponent=1.0, strict=True),
        pytest.raises(RuntimeError, match="no gain: Processor makes its value"),
    ):
        tiny.call(pipe, 128, 128, steps=1)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (math.inf, ValueError), ("1", TypeError)])
def test_a_wrong_exponent_is_named(value, error):
    with pytest.raises(error, match="gain_exponent must be a"):
        entropy_attn.enable(tiny.sd(), gain_exponent=value)
