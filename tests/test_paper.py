"""paper.py: its parts, and whole runs on the embedded pipeline and on tiny ones of the paper's families."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")


@pytest.fixture
def evaluation(monkeypatch):
    """Imports a module of the evaluation by its name, and forgets them all at the end."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(name)
    ours = ("evaluation", "glyphs", "metrics", "harness", "paper")
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "paper.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_an_interrupted_folder_goes_on(evaluation, tmp_path):
    images = evaluation("evaluation.images")
    folder, drawn = images.ImageFolder(tmp_path / "cell"), []

    def draw(numbers):
        if len(drawn) >= 4:
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return torch.stack([torch.full((1, 2, 2), number / 255) for number in numbers])

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        images.generate(folder, range(7), draw, 2, done.append)
    assert drawn == [0, 1, 2, 3]
    assert sum(done) == 4
    rest = []
    images.generate(folder, range(7), lambda n: (rest.extend(n), torch.zeros(len(n), 1, 2, 2))[1], 2, done.append)
    assert rest == [4, 5, 6]
    folder.file(2).unlink()  # drawn again with its batch, of which the other is kept
    images.generate(folder, range(7), lambda n: torch.full((len(n), 1, 2, 2), 2 / 255), 2, done.append)
    assert folder.load([2, 3])[:, 0, 0, 0].mul(255).tolist() == [2, 3]


def test_a_file_that_is_no_image_is_named(evaluation, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png"):
        evaluation("evaluation.images").read_image(path)


def test_rules(evaluation):
    rules = evaluation("evaluation.rules")
    assert rules.options_of("original", None) is None
    assert rules.options_of("paper", None) == {}
    assert rules.options_of("exponent 2", None) == {"exponent": 2.0}
    assert rules.options_of("multiplier 0.8", None) == {"overrides": {"*": 0.8}}
    with pytest.raises(ValueError, match="needs a calibration"):
        rules.options_of("matched", None)
    with pytest.raises(ValueError, match="rule must be"):
        rules.options_of("nothing", None)


def test_fit(evaluation):
    figures = evaluation("evaluation.figures")
    N = np.array([16, 64, 256, 1024])
    line = figures.fit(N, 0.9 * np.log(N) - 0.2)
    assert line.slope == pytest.approx(0.9)
    assert line.intercept == pytest.approx(-0.2)
    assert line.r_squared == pytest.approx(1)
    with pytest.raises(ValueError, match="different numbers"):
        figures.fit(np.array([16, 16]), np.array([1.0, 2.0]))


@pytest.mark.parametrize("name", ["evaluation.published"])
def test_published_figures_favour_the_papers_scale(evaluation, name):
    published = evaluation(name)
    assert all(ours <= original for sizes in published.FID.values() for original, ours in sizes.values())
    assert all(ours >= original for sizes in published.CLIP_SCORE.values() for original, ours in sizes.values())


def test_a_run_on_the_embedded_pipeline(tmp_path):
    arguments = ("--num", 40, "--steps", 1, "--sizes", "16x16", "24x24", "--out", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "glyphs" / "results.json").read_text())["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("quality") == 7 + 1
    assert kinds.count("control") == 5
    assert kinds.count("cost") == 3
    assert "MultiDiffusion takes" in done.stderr
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows if row["kind"] == "cost")
    assert kinds.count("chosen") == 1
    assert all(row["images"] == 20 for row in rows if row["kind"] != "entropy")
    first = next(row for row in rows if row["rule"] == "original")
    assert "distance_change" not in first
    assert all("distance_change" in row for row in rows if row["kind"] == "quality" and row["rule"] == "paper")
    assert {row["train_tokens"] for row in rows if row["kind"] == "entropy"} == {144, 36}
    assert len(list((tmp_path / "glyphs" / "16x16" / "paper").glob("*.png"))) == 40
    assert (tmp_path / "glyphs" / "results.png").stat().st_size > 50_000
    assert "Frechet distance (glyph recogniser's features)" in (tmp_path / "glyphs" / "results.md").read_text()

    # A second run keeps the rows it is not asked for; with other settings there is none.
    again = run(*arguments, "--what", "quality")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "glyphs" / "results.json").read_text())["rows"] == rows
    other = run(*arguments, "--batch", 20)
    assert other.returncode == 2
    assert "images of another batch" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all cannot be loaded"),
        (["--folder", "/nowhere"], "no glyph pipeline in /nowhere"),
        (["--sizes", "17x16"], "multiples of 4 pixels, got 17x16"),
        (["--sizes", "wide"], "got 'wide', allowed is WIDTHxHEIGHT"),
        (["--num", "10"], "--num must be at least 40"),
        (["--batch", "0"], "--batch must be at least 1"),
        pytest.param(["--device", "cuda:7"], "sees no GPU", marks=NO_GPU),
    ],
)
def test_bad_input(evaluation, monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.setattr(sys, "argv", ["paper.py", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        evaluation("paper").main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


class Colours(torch.nn.Module):
    """Features in the place of Inception's: mean and spread of the colours."""

    num_features = 6

    def forward(self, images):
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    tokenizer = tiny_pipelines.tokenizer()
    text = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()

    def processor(text=None, images=None, **options):
        if text is not None:
            return tokenizer(text, padding=True, return_tensors="pt")
        small = [torch.nn.functional.interpolate(image[None].float() / 255, (32, 32)) for image in images]
        return {"pixel_values": torch.cat(small)}

    return model, processor


def references(folder, count=6):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("kind", ["sd21", "sd15", "ldm"])
def test_a_run_on_a_tiny_model_of_the_paper(evaluation, tmp_path, monkeypatch, kind):
    pytest.importorskip("torchmetrics")
    subjects, judges, tables = (evaluation(f"evaluation.{name}") for name in ("subjects", "judges", "tables"))
    paper, runs, harness = evaluation("paper"), evaluation("evaluation.run"), evaluation("harness")
    prompts = ["a red fox", "a blue house"]
    subject = subjects.text_subject(kind, getattr(tiny_pipelines, kind)(), prompts, 2, 2.0, subjects.KNOWN[kind])
    assert subject.train_size == (subjects.KNOWN[kind].train_size,) * 2
    judge = judges.TextJudge(references(tmp_path / "references"), prompts, Colours(), tiny_clip())
    run = runs.Run(subject, judge, 6, 3, tmp_path / kind)
    size = (64, 128)
    subject.check_sizes([size])
    with harness.Record(tmp_path / "rows.json", "cpu") as record, runs.tqdm(disable=True) as progress:
        for rule in ("original", "paper", "exponent 2"):
            record.add({"kind": "quality", **run.row(size, rule, progress)})
        monkeypatch.setattr(runs, "ROUNDS", 1)
        record.add({"kind": "cost", **run.row(size, "resized", progress), **run.cost(size, "cost")["resized"]})
        if kind == "ldm":
            with pytest.raises(ValueError, match="MultiDiffusion takes a StableDiffusionPipeline"):
                paper.wanted(subject, ["multidiffusion"])
        else:
            costs = run.cost(size, "multidiffusion")["multidiffusion"]
            record.add({"kind": "multidiffusion", **run.row(size, "multidiffusion", progress), **costs})
    rows = record.rows
    assert ("multidiffusion" in paper.wanted(subject, ["all"])) == (kind != "ldm")
    assert all(row["images"] == 3 for row in rows)
    assert all(math.isfinite(row["distance"]) and -1 <= row["score"] <= 1 for row in rows)
    shown = run.out / "64x128" / "paper" / "000000.png"
    assert Image.open(shown).size == size
    original = Image.open(run.out / "64x128" / "original" / "000000.png")
    assert np.array(original).tolist() != np.array(Image.open(shown)).tolist()
    assert "FID" in tables.report(judge, subject, rows)


def test_the_paper_s_own_figures_stand_beside_ours(evaluation, tmp_path):
    tables, subjects, judges = (evaluation(f"evaluation.{name}") for name in ("tables", "subjects", "judges"))
    measured = {"distance": 1.0, "distance_interval": (0.5, 1.5), "score": 0.3, "score_interval": (0.2, 0.4)}
    rows = [{"width": 224, "height": 224, "rule": rule} | measured for rule in ("original", "paper", "exponent 2")]
    subject = subjects.Subject("sd21", None, (512, 512), (), 8, lambda numbers: {}, "sd")
    judge = judges.TextJudge.__new__(judges.TextJudge)
    lines = tables.quality(judge, subject, rows).splitlines()
    assert lines[2].endswith("| 74.5742 | 0.2553 |")
    assert lines[3].endswith("| 41.8925 | 0.2764 |")
    assert lines[4].endswith("|  |  |")


@pytest.mark.parametrize("content", ["none", "empty", "one"])
def test_references_that_cannot_be(evaluation, tmp_path, content):
    if content != "none":
        references(tmp_path / "folder", 1 if content == "one" else 0)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation("evaluation.judges").image_files(tmp_path / "folder")
