"""What enabling leaves as it was: everything once disabled, and what is not enabled all along."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers_support import assert_close, assert_scaled, layers, run

import entropy_attn

PYTORCH_SDPA = F.scaled_dot_product_attention
BACKENDS = dict(_AttentionBackendRegistry._backends)


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert seam_is_out()


@pytest.fixture
def pipe(nothing_stays):
    pipe = tiny.sd()
    yield pipe
    entropy_attn.disable(pipe)


def seam_is_out():
    backends = _AttentionBackendRegistry._backends
    untouched = backends.keys() == BACKENDS.keys() and all(backends[name] is BACKENDS[name] for name in BACKENDS)
    return F.scaled_dot_product_attention is PYTORCH_SDPA and untouched


def hooks_on(model):
    """The number of hooks of any kind on a model's modules."""
    kinds = [
        "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
    ]  # fmt: skip
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_disabled(pipe):
    stock, forward = run(pipe), pipe.unet.forward
    attributes = [set(module.__dict__) for module in pipe.unet.modules()]
    handle = entropy_attn.enable(pipe)
    assert seam_is_out()  # λ alone needs none
    assert_scaled(run(pipe), stock)
    handle.disable()
    assert [set(module.__dict__) for module in pipe.unet.modules()] == attributes
    assert not handle.enabled
    assert seam_is_out()
    assert hooks_on(pipe.unet) == 0
    assert pipe.unet.forward == forward
    assert torch.equal(run(pipe), stock)


def test_disabled_by_pipeline_or_model(pipe):
    for target in (pipe, pipe.unet):
        handle = entropy_attn.enable(pipe)
        entropy_attn.disable(target)
        assert not handle.enabled
        assert seam_is_out()
        assert hooks_on(pipe.unet) == 0


def test_context_manager(pipe):
    stock = run(pipe)
    with entropy_attn.enable(pipe) as handle:
        assert_scaled(run(pipe), stock)
    assert not handle.enabled
    assert hooks_on(pipe.unet) == 0
    with pytest.raises(ZeroDivisionError), entropy_attn.enable(pipe):
        raise ZeroDivisionError
    assert hooks_on(pipe.unet) == 0
    assert torch.equal(run(pipe), stock)


def test_handle_before_a_run(pipe):
    with entropy_attn.enable(pipe) as handle:
        title, _, first, *_ = str(handle).splitlines()
    assert title == "entropy_attn on StableDiffusionPipeline: 4 layers; unet trained at 64 x 64 latent samples"
    assert first.split() == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1", "-", "-", "-"]
    assert handle.layers()[0] == {
        "layer": first.split()[0], "tokens": None, "train_tokens": None, "multiplier": None, "gain": None,
        "remarks": [],
    }  # fmt: skip


def test_handle_can_be_read_when_disabled(pipe):
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        run(pipe)
    assert str(handle).startswith("entropy_attn on StableDiffusionPipeline, disabled: 4 layers")
    assert {row["tokens"] for row in handle.layers()} == {64}
    assert len(handle.entropy) == 1


def test_other_hooks_stay(pipe):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda *call: seen.append("before"))
    with entropy_attn.enable(pipe):
        layers(pipe.unet)[0].register_forward_hook(lambda *call: seen.append("after"))
        run(pipe)
    assert hooks_on(pipe.unet) == 2
    run(pipe)
    assert seen == ["before", "after"] * 2


def test_enabling_again_replaces_the_settings(pipe):
    stock = run(pipe)
    first = entropy_attn.enable(pipe, exponent=2.0)
    hooks = hooks_on(pipe.unet)
    with entropy_attn.enable(pipe, train_size=128) as second:
        assert not first.enabled
        assert hooks_on(pipe.unet) == hooks
        assert torch.equal(run(pipe), stock)
        first.disable()
        assert second.enabled
        assert hooks_on(pipe.unet) == hooks
    assert hooks_on(pipe.unet) == 0


def test_enabling_again_in_vain_keeps_the_settings(pipe):
    with entropy_attn.enable(pipe) as handle:
        scaled = run(pipe)
        with pytest.raises(ValueError, match="matches no layer"):
            entropy_attn.enable(pipe, overrides={"nothing": 1.0})
        assert handle.enabled
        assert torch.equal(run(pipe), scaled)


def test_disabling_twice_or_what_was_not_enabled(pipe):
    other = tiny.sd()
    entropy_attn.disable(other)
    with entropy_attn.enable(pipe) as handle:
        entropy_attn.disable(other)
        assert handle.enabled
        handle.disable()
        handle.disable()
        entropy_attn.disable(pipe)
    assert seam_is_out()


def test_seam_stays_until_the_last_handle(pipe):
    other, stock = tiny.sd(), run(pipe)
    handles = [entropy_attn.enable(each, record_entropy=True) for each in (pipe, other)]
    taken_over = F.scaled_dot_product_attention
    handles[0].disable()
    handles[0].disable()
    assert F.scaled_dot_product_attention is taken_over
    assert torch.equal(run(pipe), stock)
    assert_scaled(run(other), stock)
    handles[1].disable()
    assert seam_is_out()


def test_function_in_the_place_of_sdpa_is_given_back(pipe, monkeypatch):
    calls = []

    def replaced(query, *arguments, **options):
        calls.append(query.shape[2])
        return PYTORCH_SDPA(query, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
    with entropy_attn.enable(pipe, record_entropy=True):
        assert F.scaled_dot_product_attention is not replaced
        run(pipe)
        assert 77 in calls  # the text encoder
    assert F.scaled_dot_product_attention is replaced
    monkeypatch.undo()


def test_function_that_covers_ours_stays(pipe):
    """Someone takes over SDPA while a pipeline is enabled, and calls what was there before."""
    stock, calls, options = run(pipe), [], {"record_entropy": True}

    def covering(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    with entropy_attn.enable(pipe, **options):
        scaled = run(pipe)
        inner = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = covering
        assert torch.equal(run(pipe), scaled)
    try:
        assert F.scaled_dot_product_attention is covering
        assert torch.equal(run(pipe), stock)
        with entropy_attn.enable(pipe, **options) as handle:
            assert torch.equal(run(pipe), scaled)
            assert len(handle.entropy) == 1
        assert F.scaled_dot_product_attention is covering
        assert calls
    finally:
        F.scaled_dot_product_attention = inner  # ours, which no one needs
    assert torch.equal(run(pipe), stock)
    assert seam_is_out()  # once it was called
    with entropy_attn.enable(pipe, **options):
        assert torch.equal(run(pipe), scaled)


def test_nothing_is_scaled_but_self_attention(pipe):
    tokens = pipe.tokenizer(tiny.PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = {
        "text encoder": lambda: pipe.text_encoder(tokens)[0],
        "decoder": lambda: pipe.vae.decode(latents).sample,
        "encoder": lambda: pipe.vae.encode(latents[:, :3].repeat(1, 1, 8, 8)).latent_dist.mean,
        "layer by itself": lambda: layers(pipe.unet)[0](torch.ones(1, 64, 16)),
    }
    with torch.no_grad():
        stock = {name: part() for name, part in parts.items()}
        with entropy_attn.enable(pipe, exponent=2.0, strict=True):
            run(pipe)
            for name, part in parts.items():
                assert torch.equal(part(), stock[name]), name


def test_cross_attention_is_not_scaled(pipe):
    """Its outputs, given what it is given when enabled."""
    seen = []
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hook = attn.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    with entropy_attn.enable(pipe, exponent=2.0):
        run(pipe)
    hook.remove()
    (args, kwargs, output), *_ = seen
    with torch.no_grad():
        assert torch.equal(attn(*args, **kwargs), output)


def test_image_is_decoded_as_ever(pipe):
    with entropy_attn.enable(pipe, train_size=128):
        enabled = run(pipe, output_type="pt")
    assert torch.equal(run(pipe, output_type="pt"), enabled)


def test_nothing_changes_at_512_pixels(pipe):
    stock = run(pipe, 512)
    with entropy_attn.enable(pipe, strict=True) as handle:
        assert torch.equal(run(pipe, 512), stock)
    assert {(row["tokens"], row["train_tokens"]) for row in handle.layers()} == {(1024, 1024)}


@pytest.mark.parametrize("record_entropy", [False, True])
def test_copy_is_enabled_by_itself(pipe, record_entropy):
    stock = run(pipe)
    handle = entropy_attn.enable(pipe, record_entropy=record_entropy)
    scaled = run(pipe)
    twin = copy.deepcopy(pipe)
    assert_close(run(twin), scaled)
    handle.disable()
    assert_close(run(twin), scaled)
    assert torch.equal(run(pipe), stock)
    handle = entropy_attn.enable(pipe, record_entropy=record_entropy)
    entropy_attn.disable(twin)
    assert hooks_on(twin.unet) == 0
    assert_close(run(twin), stock)
    assert torch.equal(run(pipe), scaled)
    handle.disable()


def test_copy_has_settings_and_record_of_its_own(pipe):
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        twin = copy.deepcopy(pipe)
        run(twin)
        assert len(handle.entropy) == 0
        assert handle.layers()[0]["tokens"] is None
        entropy_attn.disable(twin)
        run(pipe)
    assert len(handle.entropy) == 1


def test_copy_of_a_disabled_pipeline(pipe):
    with entropy_attn.enable(pipe):
        pass
    assert hooks_on(copy.deepcopy(pipe).unet) == 0


def predict(unet):
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(sample, 500, encoder_hidden_states=torch.ones(1, 7, 32)).sample


@pytest.mark.parametrize("record_entropy", [False, True])
def test_saved_and_loaded_model_is_enabled(pipe, record_entropy, tmp_path):
    stock = predict(pipe.unet)
    with entropy_attn.enable(pipe, record_entropy=record_entropy):
        scaled = predict(pipe.unet)
        torch.save(pipe.unet, tmp_path / "unet.pt")
    assert seam_is_out()
    loaded = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert_close(predict(loaded), scaled)
    assert_scaled(scaled, stock)
    entropy_attn.disable(loaded)
    assert_close(predict(loaded), stock)


def test_saved_pipeline_is_stock(pipe, tmp_path):
    stock = run(pipe)
    with entropy_attn.enable(pipe):
        pipe.save_pretrained(tmp_path)
        state = pipe.unet.state_dict()
    assert state.keys() == pipe.unet.state_dict().keys()
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert hooks_on(loaded.unet) == 0
    assert_close(run(loaded), stock)


def test_pipelines_that_share_a_unet(pipe):
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    stock = run(pipe)
    first = entropy_attn.enable(pipe)
    with entropy_attn.enable(other, train_size=128):
        assert not first.enabled
        assert torch.equal(run(pipe), stock)
    assert hooks_on(pipe.unet) == 0
