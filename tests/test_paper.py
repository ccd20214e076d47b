"""paper.py: its parts, and whole runs on the embedded pipeline and on tiny models of the paper's families."""

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_pipelines
import torch
from benchmark_modules import BENCHMARKS, importable
from PIL import Image

PAPER = BENCHMARKS / "paper"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")


@pytest.fixture
def evaluation(monkeypatch):
    """Imports modules of the evaluation by name, and removes them from sys.modules after the test."""
    with importable(monkeypatch, BENCHMARKS, PAPER) as module:
        yield module


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, PAPER / "paper.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def run_here(evaluation, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
    evaluation("paper").main()


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
    assert sum(done) == 7


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


def test_figures_5_and_6_show_the_rows(evaluation):
    """The entropy of two layers is linear in ln N, at four sizes. Two of the sizes have the same N."""
    figures = evaluation("evaluation.figures")
    plt = evaluation("harness").pyplot()
    trained, slopes = (24, 24), {"original": 0.9, "paper": 0.6, "calibrated": 0.1}

    def places(pixels, slope):
        for layer, factor in (("outer", 4), ("inner", 16)):
            T, N = 576 // factor, pixels // factor
            yield from (
                {"layer": layer, "step": step, "tokens": N, "train_tokens": T,
                 "entropy": 2 + slope * math.log(N / T) + step + (layer == "inner")}
                for step in (0, 1)
            )  # fmt: skip

    rows = [
        {"kind": "entropy", "width": w, "height": h, "rule": rule, "places": list(places(w * h, slope))}
        for w, h in ((16, 24), (24, 16), (36, 36), trained) for rule, slope in slopes.items()
    ]  # fmt: skip
    figure, (fits, layers, steps) = plt.subplots(1, 3)
    figures.draw_fits(fits, rows, trained)
    figures.draw_lines(layers, rows, trained, "layer")
    figures.draw_lines(steps, rows, trained, "step")
    plt.close(figure)
    said = [text.get_text() for text in fits.get_legend().get_texts()]
    assert said == [
        f"{rule}, T = {T}: slope {slope:.3f}, R² 1.0000" for rule, slope in slopes.items() for T in (36, 144)
    ]
    assert [label.get_text() for label in fits.get_xticklabels()] == ["24", "36", "81", "144", "324"]
    lines = {line.get_label(): line for line in layers.get_lines()}
    assert [label.split(", ")[0] for label in lines] == [*3 * ["24x16"], *3 * ["24x24"], *3 * ["36x36"]]
    for rule, slope in slopes.items():
        mean = 2.5 + slope * math.log(36 * 36 / 576)
        assert lines[f"36x36, {rule}"].get_ydata() == pytest.approx([mean, mean + 1])
    assert {line.get_color() for label, line in lines.items() if label.startswith("24x24")} == {"tab:gray"}
    assert steps.get_lines()[0].get_ydata() == pytest.approx([2.5 + 0.9 * math.log(2 / 3), 3.5 + 0.9 * math.log(2 / 3)])
    table = evaluation("evaluation.tables").fits(figures.entropy_rows(rows))
    assert table.splitlines()[2] == f"| original | 36 | 0.900 | {3.5 - 0.9 * math.log(36):.3f} | 1.0000 |"


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_model_is_loaded_in_the_dtype_asked_for(evaluation):
    subjects = evaluation("evaluation.subjects")
    assert subjects.glyphs().pipe.unet.dtype == torch.float32
    assert subjects.glyphs(dtype=torch.bfloat16).pipe.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["evaluation.published"])
def test_published_figures_favour_the_papers_scale(evaluation, name):
    published = evaluation(name)
    assert all(ours <= original for sizes in published.FID.values() for original, ours in sizes.values())
    assert all(ours >= original for sizes in published.CLIP_SCORE.values() for original, ours in sizes.values())


def nearly(value):
    """Floats as pytest.approx, because another process may round differently. Other values stay unchanged."""
    several = isinstance(value, list) and all(isinstance(x, float) for x in value)
    return pytest.approx(value, rel=1e-5) if several or isinstance(value, float) else value


def rows_in(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_a_run_on_the_embedded_pipeline(tmp_path):
    arguments = ("--num", 40, "--steps", 1, "--sizes", "16x16", "24x24", "--out", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "glyphs" / "results.jsonl"
    rows = rows_in(results)
    kinds = [row["kind"] for row in rows]
    # The rules, resizing and MultiDiffusion at 16 x 16; the controls at 24 x 24.
    assert kinds.count("fid") == kinds.count("clip") == 7 + 2 + 5
    assert kinds.count("cost") == kinds.count("multidiffusion") == 3
    assert kinds.count("chosen") == 1
    assert kinds.count("entropy") == 2 * 3
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows if row["kind"] == "cost")
    judged = [row for row in rows if row["kind"] in ("fid", "clip")]
    assert all(row["images"] == 20 for row in judged)
    assert all(("change" in row) == (row["rule"] != "original") for row in judged)
    places = [place for row in rows if row["kind"] == "entropy" for place in row["places"]]
    assert {place["train_tokens"] for place in places} == {144, 36}
    assert len(list((tmp_path / "glyphs" / "16x16" / "paper").glob("*.png"))) == 40
    assert results.with_suffix(".png").stat().st_size > 50_000
    table = results.with_suffix(".md").read_text()
    assert "Frechet distance (glyph recogniser's features)" in table
    assert "| 24 x 24 | multiplier 0.8 |" in table

    # Only the torn line is measured again. Rows of other kinds stay. Other settings are refused.
    lines = results.read_text().splitlines(keepends=True)
    torn = json.loads(lines[3])
    results.write_text("".join([*lines[:3], *lines[4:], lines[3][:-9]]))
    again = run(*arguments, "--what", torn["kind"])
    assert again.returncode == 0, again.stderr
    *others, measured = rows_in(results)
    assert others == [*rows[:2], *rows[3:]]
    assert measured == {name: nearly(value) for name, value in torn.items()}
    other = run(*arguments, "--guidance", 2)
    assert other.returncode == 2
    assert "images of another guidance" in other.stderr


def test_what_is_not_asked_for_is_not_needed(evaluation, monkeypatch, tmp_path):
    """--what entropy loads no judge."""
    judges = evaluation("evaluation.judges")
    monkeypatch.setattr(judges.GlyphJudge, "load", lambda self: pytest.fail("not needed"))
    entropy = ("--what", "entropy", "--num", 40, "--steps", 1, "--sizes", "16x16", "--out", tmp_path)
    run_here(evaluation, monkeypatch, *entropy)
    assert {row["kind"] for row in rows_in(tmp_path / "glyphs" / "results.jsonl")} == {"entropy"}


def test_seeds_are_the_images_numbers(evaluation, monkeypatch, tmp_path):
    for seed in (0, 20):
        run_here(
            evaluation, monkeypatch, "--num", 40, "--steps", 1, "--sizes", "16x16", "--what", "clip", "--scales",
            "paper", "--seed", seed, "--out", tmp_path / str(seed),
        )  # fmt: skip
    folders = [tmp_path / seed / "glyphs" / "16x16" / "original" for seed in ("0", "20")]
    names = [sorted(file.name for file in folder.glob("*.png")) for folder in folders]
    assert names[0][20:] == names[1][:20]
    for name in names[0][20:22]:  # the batches differ, so the images are equal up to rounding
        first, second = (np.array(Image.open(folder / name)).astype(int) for folder in folders)
        assert abs(first - second).max() <= 1


def test_an_interrupted_run_goes_on(evaluation, monkeypatch, tmp_path):
    arguments = ("--num", 40, "--batch", 10, "--steps", 2, "--sizes", "32x32", "--what", "clip", "--out", tmp_path)
    command = [sys.executable, PAPER / "paper.py", *map(str, arguments)]
    # Background jobs ignore SIGINT, and their child processes inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )  # fmt: skip
    try:
        while len(list(tmp_path.rglob("*.png"))) < 50 and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=900)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert re.search(r"interrupted: (no row was finished|\d+ rows are in .*results\.jsonl)", said)
    drawn = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    assert 50 <= len(drawn) < 7 * 40
    run_here(evaluation, monkeypatch, *arguments)
    assert all(file.stat().st_mtime_ns == then for file, then in drawn.items())
    assert len(list(tmp_path.rglob("0*.png"))) == 7 * 40
    assert len(rows_in(tmp_path / "glyphs" / "results.jsonl")) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits exist on POSIX only")
@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="torch 2.8 writes a larger file when torch.distributed is imported"
)
def test_a_full_disk_loses_nothing(evaluation, monkeypatch, tmp_path):
    """A file size limit makes writes fail. Without the limit, the same command continues the run."""
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # images fit, the rows do not

    arguments = (
        "--num",
        40,
        "--steps",
        1,
        "--sizes",
        "16x16",
        "--what",
        "clip",
        "--scales",
        "paper",
        "--out",
        tmp_path,
    )
    command = [sys.executable, PAPER / "paper.py", *map(str, arguments)]
    full = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, preexec_fn=limited)
    assert full.returncode == 2
    assert "paper.py: [Errno 27] File too large" in full.stderr
    drawn = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    assert len(drawn) == 2 * 40
    run_here(evaluation, monkeypatch, *arguments)
    assert all(file.stat().st_mtime_ns == then for file, then in drawn.items())
    assert len(rows_in(tmp_path / "glyphs" / "results.jsonl")) == 2


def test_out_of_memory_is_said(evaluation, monkeypatch, capsys, tmp_path):
    paper = evaluation("paper")

    def draw(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(evaluation("evaluation.subjects").Subject, "_draw", draw)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--num", "40", "--sizes", "16x16", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        paper.main()
    assert stopped.value.code == 2
    assert "lower --batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all cannot be loaded"),
        (["--folder", "/nowhere"], "no pipeline of glyphs in /nowhere"),
        (["--sizes", "17x16"], "multiples of 4 pixels, got 17x16"),
        (["--sizes", "wide"], "got 'wide', allowed is WIDTHxHEIGHT"),
        (["--num", "10"], "--num must be at least 40"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--references", "somewhere"], "--references has no meaning for --model glyphs"),
        (["--train-size", "24x24"], "--train-size has no meaning for --model glyphs"),
        (["--model", "sd21", "--folder", "somewhere"], "--folder has no meaning for --model sd21"),
        (["--model", "sd21", "--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt cannot be read"),
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
    """Replaces Inception's features with the mean and standard deviation of each colour."""

    num_features = 6

    def forward(self, images):
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


def tiny_clip(folder):
    """The folder of a saved CLIP model with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tiny_pipelines.tokenizer()).save_pretrained(folder)
    return folder


def images_in(folder, count=6):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("kind", ["sd21", "sd15", "ldm"])
def test_a_run_on_a_tiny_model_of_the_paper(evaluation, tmp_path, monkeypatch, capsys, kind):
    """Runs the command line on a model folder saved by Diffusers. Inception is replaced, to avoid its download."""
    judges, runs, rules = (evaluation(f"evaluation.{name}") for name in ("judges", "run", "rules"))
    monkeypatch.setattr(judges, "load_inception", lambda weights: Colours())
    monkeypatch.setattr(runs, "ROUNDS", 1)
    monkeypatch.setattr(runs, "RECORDED", 2)
    monkeypatch.setattr(rules, "CONTROLS", ("multiplier 0.9",))
    model = tmp_path / kind
    getattr(tiny_pipelines, kind)().save_pretrained(model)
    (tmp_path / "prompts.txt").write_text("a red fox\n\na blue house\n")
    out = tmp_path / "out"
    command = [
        "paper.py", "--model", model, "--num", "40", "--batch", "20", "--steps", "1", "--sizes", "32x32", "64x64",
        "--train-size", "64x64", "--prompts", tmp_path / "prompts.txt", "--clip", tiny_clip(tmp_path / "clip"),
        "--references", images_in(tmp_path / "references"), "--out", out, "--scales", "paper", "matched",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    paper = evaluation("paper")
    paper.main()
    left_out = "left out: MultiDiffusion takes" in capsys.readouterr().err
    assert left_out == (kind == "ldm")
    [folder] = out.iterdir()
    rows = rows_in(folder / "results.jsonl")
    kinds = [row["kind"] for row in rows]
    beside = 1 if kind == "ldm" else 2  # resizing and MultiDiffusion
    assert kinds.count("fid") == kinds.count("clip") == 3 + beside + 2
    assert kinds.count("multidiffusion") == (0 if kind == "ldm" else 3)
    assert kinds.count("entropy") == 2 * 3
    judged = [row for row in rows if row["kind"] in ("fid", "clip")]
    assert all(row["images"] == 20 and math.isfinite(row["value"]) for row in judged)
    assert all(-1 <= row["value"] <= 1 for row in judged if row["kind"] == "clip")
    original, ours = (
        np.array(Image.open(folder / "32x32" / rule / "000000.png")).tolist() for rule in ("original", "paper")
    )
    assert np.shape(ours) == (32, 32, 3)
    assert ours != original
    assert "FID" in (folder / "results.md").read_text()
    before = (folder / "results.jsonl").read_text().splitlines()[1:]
    monkeypatch.setattr(runs.Subject, "_draw", lambda *arguments: pytest.fail("all is there"))
    paper.main()
    assert (folder / "results.jsonl").read_text().splitlines()[1:] == before


def test_a_size_that_the_model_does_not_say(evaluation):
    subjects = evaluation("evaluation.subjects")
    pipe = tiny_pipelines.sd15()
    pipe.unet.register_to_config(sample_size=(8, 16))
    assert subjects.text_subject("x", pipe, ["a"]).train_size == (16 * pipe.vae_scale_factor, 8 * pipe.vae_scale_factor)
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="give --train-size"):
        subjects.text_subject("x", pipe, ["a"])
    assert subjects.text_subject("x", pipe, ["a"], (64, 32)).train_size == (64, 32)
    with pytest.raises(ValueError, match="draws from no prompt"):
        subjects.text_subject("x", subjects.glyphs().pipe, ["a"])


def test_the_paper_s_own_figures_stand_beside_ours(evaluation):
    tables, subjects, judges = (evaluation(f"evaluation.{name}") for name in ("tables", "subjects", "judges"))
    measured = {"value": 1.0, "value_interval": (0.5, 1.5)}
    scales = ("original", "paper", "exponent 2")
    rows = [
        {"kind": kind, "width": 224, "height": 224, "rule": rule} | measured
        for kind in ("fid", "clip") for rule in scales
    ]  # fmt: skip
    subject = subjects.Subject("sd21", None, (512, 512), (), 8, lambda numbers: {}, "sd")
    cells = [((224, 224), rule) for rule in scales]
    lines = tables.quality(judges.TextJudge(None, ["a"]), subject, rows, cells).splitlines()
    told = [[line.split("|")[i].strip() for i in (5, 8)] for line in lines[2:]]
    assert told == [["74.5742", "0.2553"], ["41.8925", "0.2764"], ["", ""]]


@pytest.mark.parametrize("content", ["none", "empty", "one"])
def test_references_that_cannot_be(evaluation, tmp_path, content):
    if content != "none":
        images_in(tmp_path / "folder", 1 if content == "one" else 0)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation("evaluation.sources").open_images(str(tmp_path / "folder"))


def test_distances_are_those_of_torchmetrics(evaluation, tmp_path):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(Colours())
    judges, images = evaluation("evaluation.judges"), evaluation("evaluation.images")
    reference = [images.read_image(file) for file in sorted(images_in(tmp_path / "folder", 20).glob("*.jpg"))]
    drawn = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    judge = judges.TextJudge(str(tmp_path / "folder"), ["a"])
    judge.inception = Colours()
    fid.update(judges.bytes_of(torch.stack(reference)), real=True)
    fid.update(judges.bytes_of(drawn), real=False)
    row = judges.distance_row(judge.reference((16, 16)), judge.features(drawn), None)
    assert row["value"] == pytest.approx(fid.compute().item(), rel=1e-3)
    assert row["value_interval"][0] < row["value"] < row["value_interval"][1]


def test_what_fid_needs_is_said(evaluation, tmp_path):
    judges = evaluation("evaluation.judges")
    with pytest.raises(ValueError, match="FID needs --references"):
        judges.TextJudge(None, ["a"]).prepare({"fid"})
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(ValueError, match=r"pip install 'entropy_attn\[paper\]'"):
            judges.load_inception(None)
    with pytest.raises(ValueError, match="nowhere cannot be loaded for the CLIP score"):
        judges.TextJudge(None, ["a"], clip=str(tmp_path / "nowhere")).prepare({"clip"})


def test_a_corrupt_reference_is_named(evaluation, tmp_path, monkeypatch):
    judges = evaluation("evaluation.judges")
    monkeypatch.setattr(judges, "load_inception", lambda weights: Colours())
    (images_in(tmp_path / "folder") / "3.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as an image"):
        judges.TextJudge(str(tmp_path / "folder"), ["a"]).prepare({"fid"})


def test_prompts_from_files(evaluation, tmp_path):
    read = evaluation("evaluation.sources").read_prompts
    assert len(read(None)) == 10
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read(str(tmp_path / "a.txt")) == ["one", "two"]
    assert read(str(tmp_path)) == ["one", "two", "three"]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"c\.txt has no prompt"):
        read(str(tmp_path / "c.txt"))


def test_a_dataset_gives_prompts_and_references(evaluation, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources = evaluation("evaluation.sources")
    folder = images_in(tmp_path / "pictures", 3)
    captions = [{"file_name": f"{n}.jpg", "caption": f"picture {n}", "several": [f"the {n}", "x"]} for n in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    dataset = f"datasets:{folder}:train"
    assert sources.read_prompts(f"{dataset}:caption") == ["picture 0", "picture 1", "picture 2"]
    assert sources.read_prompts(f"{dataset}:several") == ["the 0", "the 1", "the 2"]
    images = [read() for read in sources.open_images(f"{dataset}:image")]
    assert torch.equal(images[2], evaluation("evaluation.images").read_image(folder / "2.jpg"))
    assert len(sources.open_images(f"datasets:{folder}:train[:2]:image")) == 2
    for source, said in (
        (f"{dataset}:nothing", "has the columns image, caption, several, not nothing"),
        (f"datasets:{tmp_path / 'nowhere'}:train:image", "cannot be loaded"),
        ("datasets:name", "is written datasets:NAME:SPLIT:COLUMN"),
    ):
        with pytest.raises(ValueError, match=said):
            sources.open_images(source)
    with pytest.raises(ValueError, match="is a str, not an image"):
        sources.open_images(f"{dataset}:caption")[0]()
