"""Runs, steps and halves: with every scheduler, from images, with shared models, with several conditions."""

import copy
import threading

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import tiny_pipelines as tiny

import entropy_attn
from entropy_attn.diffusers import EntropyRecord
from entropy_attn.diffusers.steps import distinct_samples

STEPS = 4
SCHEDULERS = sorted(
    kind.__name__
    for kind in tiny.ddim().compatibles
    if kind.__name__ != "DPMSolverSDEScheduler"  # needs torchsde
)
EVERY = [*SCHEDULERS, "PNDMScheduler, skip_prk_steps"]  # the latter is Stable Diffusion 1.5's
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]


def set_scheduler(pipe, name):
    name, _, option = name.partition(", ")
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    pipe.scheduler = getattr(diffusers, name).from_config(tiny.ddim().config, **({option: True} if option else {}))


@pytest.fixture(scope="module")
def pipes():
    pipe = tiny.sd()
    return pipe, _quiet(diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bar_of(pipe, call):
    """How often the pipeline's own progress bar was moved: the steps as Diffusers counts them."""
    moves = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            moves.append(True)

    pipe.progress_bar = lambda *args, **kwargs: Bar()
    call()
    del pipe.progress_bar
    return len(moves)


def rows(handle, by=("run", "step", "half")):
    return [tuple(row[name] for name in by) for row in handle.entropy.table(by=by)]


def test_there_are_schedulers():
    assert len(SCHEDULERS) >= 14
    assert {"PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"} <= set(
        SCHEDULERS
    )


@pytest.mark.parametrize("name", EVERY)
def test_steps_with_every_scheduler(name, pipes):
    pipe, _ = pipes
    set_scheduler(pipe, name)
    with entropy_attn.enable(pipe, record_entropy=True, steps=(1, 3), strict=True) as handle:
        for _ in range(2):
            assert bar_of(pipe, lambda: tiny.call(pipe, 64, 64, steps=STEPS, guidance_scale=5.0)) == STEPS
    assert rows(handle) == [(run, step, half) for run in (0, 1) for step in range(STEPS) for half in (0, 1)]
    for row in handle.entropy.table(by=("step",)):
        assert (row["multiplier"] < 1) == (row["step"] in (1, 2))


@pytest.mark.parametrize("name", EVERY)
def test_steps_from_an_image(name, pipes):
    pipe, from_image = pipes
    set_scheduler(pipe, name)
    from_image.scheduler = pipe.scheduler
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"image": image, "strength": 0.75, "num_inference_steps": STEPS, "output_type": "latent"}
    with entropy_attn.enable(from_image, record_entropy=True, strict=True) as handle:
        for _ in range(2):
            steps = bar_of(from_image, lambda: from_image(tiny.PROMPT, **arguments))
    assert steps in (2, 3)
    assert rows(handle) == [(run, step, half) for run in (0, 1) for step in range(steps) for half in (0, 1)]


@pytest.mark.parametrize("name", FLOW)
def test_steps_of_flow_matching(name):
    pipe = tiny.sd3()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    with entropy_attn.enable(pipe, record_entropy=True, strict=True) as handle:
        assert bar_of(pipe, lambda: tiny.call(pipe, 64, 64, steps=3)) == 3
    assert rows(handle) == [(0, step, half) for step in range(3) for half in (0, 1)]


def test_a_controlnet_keeps_step_with_its_unet():
    pipe = tiny.sd_controlnet()
    set_scheduler(pipe, "PNDMScheduler, skip_prk_steps")
    with entropy_attn.enable(pipe, record_entropy=True, strict=True) as handle:
        tiny.call(pipe, 64, 64, steps=3, guidance_scale=5.0)
    names = {row["layer"].split(".")[0] for row in handle.entropy.table(by=("layer",))}
    assert names == {"unet", "controlnet"}
    assert set(rows(handle)) == {(0, step, half) for step in range(3) for half in (0, 1)}


def test_two_pipelines_with_one_unet_and_schedulers_of_their_own(pipes):
    pipe, _ = pipes
    other = _quiet(diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    set_scheduler(pipe, "DDIMScheduler")
    set_scheduler(other, "EulerDiscreteScheduler")
    with entropy_attn.enable(pipe, record_entropy=True, steps=(0, 1)) as handle:
        for each in (pipe, other, other, pipe):
            tiny.call(each, 64, 64, steps=2, guidance_scale=1.0)
    assert rows(handle) == [(run, step, 0) for run in range(4) for step in range(2)]
    assert [row["multiplier"] < 1 for row in handle.entropy.table(by=("run", "step"))] == [True, False] * 4


def test_two_threads_with_one_unet(pipes):
    pipe, _ = pipes
    components = {**pipe.components, "tokenizer": copy.deepcopy(pipe.tokenizer)}  # one serves one thread at a time
    other = _quiet(diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False))
    set_scheduler(pipe, "DDIMScheduler")
    set_scheduler(other, "EulerDiscreteScheduler")
    barrier = threading.Barrier(2, timeout=30)
    hook = pipe.unet.mid_block.register_forward_hook(lambda *call: [barrier.wait(), None][1])
    with entropy_attn.enable(pipe, record_entropy=True, steps=(1, 2)) as handle:
        threads = [
            threading.Thread(target=lambda each=each: tiny.call(each, 64, 64, steps=3, guidance_scale=1.0))
            for each in (pipe, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    hook.remove()
    assert sorted(rows(handle)) == [(run, step, 0) for run in (0, 1) for step in range(3)]
    assert all((row["multiplier"] < 1) == (row["step"] == 1) for row in handle.entropy.table(by=("run", "step")))


def test_images_without_guidance_are_no_halves(pipes):
    pipe, _ = pipes
    set_scheduler(pipe, "DDIMScheduler")
    with entropy_attn.enable(pipe, record_entropy=True) as handle:
        tiny.call(pipe, 64, 64, steps=1, guidance_scale=1.0, num_images_per_prompt=2)
        tiny.call(pipe, 64, 64, steps=1, guidance_scale=5.0, num_images_per_prompt=3)
    assert rows(handle) == [(0, 0, 0), (1, 0, 0), (1, 0, 1)]


@pytest.mark.parametrize("images", [1, 2])
def test_three_way_guidance(images):
    """Instruct-Pix2Pix: with the prompt and the image, with the image alone, with neither."""
    pipe = tiny.sd(tiny.unet(64, "two levels", in_channels=8), diffusers.StableDiffusionInstructPix2PixPipeline,
                   image_encoder=None)  # fmt: skip
    image = torch.rand(images, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"image": image, "num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": images}
    with entropy_attn.enable(pipe, record_entropy=True, strict=True) as handle:
        pipe(tiny.PROMPT, **arguments)
    assert rows(handle) == [(0, step, half) for step in range(2) for half in range(3)]
    first, second, third = (row["entropy"] for row in handle.entropy.table(by=("half",)))
    assert len({first, second, third}) == 3


def test_halves_are_the_means_of_their_conditions(pipes):
    """A batch of [a, b, a, b] against the two prompts by themselves."""
    pipe, _ = pipes
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def entropies(sample, text):
        with entropy_attn.enable(pipe.unet, record_entropy=True) as handle, torch.no_grad():
            pipe.unet(sample, 500, encoder_hidden_states=text)
        return [row["entropy"] for row in handle.entropy.table(by=("half",))]

    both = entropies(torch.cat([sample] * 2), text.repeat_interleave(2, 0))
    apart = [entropies(sample, text[[i, i]])[0] for i in (0, 1)]
    assert both == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize(
    ("latents", "images"), [([1], 1), ([1, 2], 2), ([1, 1], 1), ([1, 2, 1, 2], 2), ([1, 1, 1], 1), ([1, 2, 1], 3)]
)
def test_distinct_samples(latents, images):
    sample = torch.tensor(latents)[:, None, None, None].expand(-1, 3, 2, 2)
    assert distinct_samples(sample) == images


def test_one_record_and_steps_as_a_list(pipes):
    pipe, _ = pipes
    set_scheduler(pipe, "DDIMScheduler")
    record = EntropyRecord()
    with entropy_attn.enable(pipe, record_entropy=record, steps=[0, 1]):
        tiny.call(pipe, 64, 64, steps=2)
    assert [row["multiplier"] < 1 for row in record.table(by=("step",))] == [True, False]
