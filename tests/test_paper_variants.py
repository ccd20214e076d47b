"""The rules beyond the paper, on the shipped pipelines of the reproduction."""

import json
import math
import sys

import pytest
import tiny_pipelines
import torch
from benchmark_modules import BENCHMARKS, importable

PAPER = BENCHMARKS / "paper"
SMALL = (16, 16)


@pytest.fixture
def evaluation(monkeypatch):
    """Imports modules of the evaluation by name."""
    with importable(monkeypatch, BENCHMARKS, PAPER) as module:
        yield module


@pytest.fixture
def variants(evaluation):
    return evaluation("evaluation.variants")


@pytest.fixture
def glyphs(evaluation):
    return evaluation("evaluation.subjects").glyphs(num_inference_steps=2)


def drawn(variants, subject, size, recipe, entropies=None):
    with variants.applied(subject.pipe, recipe, entropies):
        return subject.draw(size, [0, 1], None)


def test_every_rule_has_a_recipe_and_a_meaning(evaluation, variants):
    rules = evaluation("evaluation.rules")
    assert {*variants.RECIPES, *rules.GAIN_RULES} == {*rules.BEYOND, *rules.GAIN_CONTROLS}
    families = {
        "gain q": [rule for rule in rules.GAIN_RULES if rule.startswith("gain")],
        "exponent p, gain q": [rule for rule in rules.GAIN_RULES if rule.startswith("exponent")],
        "constant gain g": rules.GAIN_CONTROLS,
    }
    told = {rule for name in rules.BEYOND_MEANING for rule in families.get(name, (name,))}
    assert told == {*rules.BEYOND, *rules.GAIN_CONTROLS}
    assert not set(rules.BEYOND) & set(rules.RULES)


def test_the_options_of_rules_with_a_gain(evaluation):
    options_of = evaluation("evaluation.rules").options_of
    assert options_of("gain 0.5", None) == {"exponent": 0.0, "gain_exponent": 0.5}
    assert options_of("paper, gain 1", None) == {"gain_exponent": 1.0}
    assert options_of("exponent 2, gain 0.5", None) == {"exponent": 2.0, "gain_exponent": 0.5}


def test_an_unknown_rule_is_named(evaluation, variants):
    with pytest.raises(ValueError, match="got 'levels all'"):
        variants.recipe_of("levels all")
    with pytest.raises(ValueError, match="got 'loss 1'"):
        evaluation("evaluation.rules").options_of("loss 1", None)


def test_another_pipeline_is_named(variants):
    with (
        pytest.raises(ValueError, match="got a StableDiffusionPipeline"),
        variants.applied(tiny_pipelines.sd(), variants.Recipe()),
    ):
        pass


def test_hooks_are_removed(variants, glyphs):
    """After a block, after an exception in it, and after an exception while the hooks are put on."""

    def hooks():
        modules = list(glyphs.pipe.unet.modules())
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    assert hooks() == 0
    recipe = variants.recipe_of("constant gain 0.8")

    def fail():
        with variants.applied(glyphs.pipe, recipe):
            assert hooks() > 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert hooks() == 0
    last = [module for name, module in glyphs.pipe.unet.named_modules() if name.endswith("attn1")][-1]
    del last.to_v
    with pytest.raises(AttributeError, match="to_v"), variants.applied(glyphs.pipe, recipe):
        pass
    assert hooks() == 0


def test_the_trained_size_gives_the_original_images(evaluation, variants, glyphs):
    original = glyphs.draw(glyphs.train_size, [0, 1], None)
    none = variants.Entropies({}, {})
    controls = evaluation("evaluation.rules").GAIN_CONTROLS
    for rule, recipe in variants.RECIPES.items():
        if not recipe.temperature:
            same = torch.equal(drawn(variants, glyphs, glyphs.train_size, recipe, none), original)
            assert same == (rule not in controls), rule


def test_the_papers_exponent_gives_the_images_of_enable(variants, glyphs):
    ours = drawn(variants, glyphs, SMALL, variants.Recipe(exponent=0.5))
    torch.testing.assert_close(ours, glyphs.draw(SMALL, [0, 1], {}), rtol=0, atol=1e-4)
    assert (ours - glyphs.draw(SMALL, [0, 1], None)).abs().max() > 1e-2


def test_multipliers_of_heads(variants):
    """A layer of 4 tokens at the trained size and 16 drawn: ln N = 2 ln T, λ is √2."""
    ln = math.log(4)
    trained = {"a": variants.Heads(4, [0.5 * ln, 0.5 * ln, 0.5 * ln])}
    entropies = variants.Entropies(trained, {"a": variants.Heads(16, [0.4 * ln, 1.0 * ln, 1.9 * ln])})
    root = math.sqrt(2)
    assert variants.by_slope("a", entropies) == pytest.approx([1, 2**0.25, root])
    assert variants.of_global_heads("a", entropies) == pytest.approx([1, 1, root])
    assert variants.by_head_entropy("a", entropies) == pytest.approx([math.sqrt(1.5 / 1.6), math.sqrt(1.5), 2])
    assert variants.ultra("a", entropies) == pytest.approx([1.3, 1 + 0.3 * 0.6**2, 1])
    assert variants.ultra("a", variants.Entropies({"a": variants.Heads(64, [])}, entropies.drawn)) == [1, 1, 1]


def test_steps_times_and_levels(variants, glyphs):
    """The multiplier at a first step of three, and at a last."""
    of = {name: variants.Hooks(glyphs.pipe, variants.recipe_of(name), None) for name in
          ("early", "fading", "levels fine", "levels coarse")}  # fmt: skip
    glyphs.pipe.scheduler.set_timesteps(3)
    full = (math.log(1024) / math.log(256)) ** 2
    first, last = glyphs.pipe.scheduler.timesteps[[0, -1]]
    for timestep, early in ((first, full), (last, 1.0)):
        for hooks in of.values():
            hooks.enter(glyphs.pipe.unet, (torch.zeros(2, 1, 24, 24),), {"timestep": timestep.expand(2)})
        assert of["early"].multiplier("a", 1024, 256) == pytest.approx(early)
        share = timestep.item() / 1000
        assert of["fading"].multiplier("a", 1024, 256) == pytest.approx(1 + share**2 * (full - 1))
    assert of["levels fine"].multiplier("a", 1024, 256) == pytest.approx(full)
    assert of["levels coarse"].multiplier("a", 1024, 256) == 1
    assert of["levels fine"].multiplier("a", 256, 64) == 1
    assert of["levels coarse"].multiplier("a", 256, 64) == pytest.approx((math.log(256) / math.log(64)) ** 2)


def test_temperature_guidance(evaluation, variants, monkeypatch):
    """At temperature 1 both predictions are the same, so the images are those without guidance."""
    subjects = evaluation("evaluation.subjects")
    unguided, guided = (subjects.glyphs(num_inference_steps=2, guidance_scale=scale) for scale in (1.0, 3.0))
    recipe = variants.recipe_of("temperature guidance")
    with pytest.raises(ValueError, match="needs guidance"):
        drawn(variants, unguided, SMALL, recipe)
    assert (drawn(variants, guided, SMALL, recipe) - guided.draw(SMALL, [0, 1], None)).abs().max() > 1e-2
    assert (drawn(variants, guided, SMALL, recipe) - unguided.draw(SMALL, [0, 1], None)).abs().max() > 1e-2
    hook = variants.Hooks(guided.pipe, recipe, None).scale_query("a")
    assert hook(None, (), torch.ones(2, 1, 1)).flatten().tolist() == pytest.approx([1, 0.7])
    monkeypatch.setattr(variants, "TEMPERATURE", 1.0)
    same = drawn(variants, guided, SMALL, recipe)
    torch.testing.assert_close(same, unguided.draw(SMALL, [0, 1], None), rtol=0, atol=1e-3)


def run_here(evaluation, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
    evaluation("paper").main()


def test_a_run_with_rules_beyond_the_paper(evaluation, variants, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation("evaluation.run"), "HEADS_RECORDED", 2)
    command = ("--num", 40, "--steps", 1, "--sizes", "16x16", "24x24", "--what", "fid", "--out", tmp_path)
    run_here(evaluation, monkeypatch, *command, "--scales", "gain 1", "heads")
    folder = tmp_path / "glyphs"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]
    told = {size: [row["rule"] for row in rows if row["kind"] == "fid" and row["width"] == size] for size in (16, 24)}
    assert told[16] == ["original", "gain 1", "heads"]
    assert [rule for rule in told[24] if not rule.startswith("multiplier")] == [
        "original", "constant gain 0.8", "constant gain 0.9", "constant gain 1.1"
    ]  # fmt: skip
    [chosen] = [row for row in rows if row["kind"] == "chosen rule"]
    assert chosen["width"] == 16
    assert chosen["among"] == ["original", "gain 1", "heads"]
    table = (folder / "results.md").read_text()
    assert "### The rule chosen on the other half of the images\n\n| width x height | scale |" in table
    assert "| 16 x 16 | gain 1 |" in table
    assert "- heads: " in table
    assert all(len(heads) == 2 for heads in json.loads((folder / "heads-16x16.json").read_text()).values())

    # The same command measures nothing again. With another scale the rule is chosen again.
    monkeypatch.setattr(variants, "heads_of", lambda record: pytest.fail("all is there"))
    run_here(evaluation, monkeypatch, *command, "--scales", "gain 1", "heads")
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(rows) + 1
    run_here(evaluation, monkeypatch, *command, "--scales", "gain 1", "heads", "global heads")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]
    assert [len(row["among"]) for row in rows if row["kind"] == "chosen rule"] == [3, 4]


def test_temperature_guidance_without_guidance_is_refused_first(evaluation, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run_here(evaluation, monkeypatch, "--num", 40, "--scales", "gain 1", "temperature guidance", "--out", tmp_path)
    assert "temperature guidance needs guidance" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_entropies_of_heads_are_those_of_the_original_scale(evaluation, monkeypatch, glyphs, tmp_path):
    runs = evaluation("evaluation.run")
    monkeypatch.setattr(runs, "RECORDED", 2)
    monkeypatch.setattr(runs, "HEADS_RECORDED", 2)
    run = runs.Run(glyphs, None, 4, 4, tmp_path)
    rows = run.entropies(SMALL, "original")
    for layer, (tokens, entropies) in run.heads(SMALL).items():
        of = [row for row in rows if row["layer"] == layer]
        assert {row["tokens"] for row in of} == {tokens}
        assert sum(entropies) / len(entropies) == pytest.approx(sum(row["entropy"] for row in of) / len(of), rel=1e-4)
