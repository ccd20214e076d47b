"""The code of the README and of docs/ runs as written and does what the text says. Their links resolve."""

import functools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for folder in ("benchmarks", "docs") for page in (ROOT / folder).rglob("*.md"))


def blocks(page):
    """The Python blocks of a page that run by themselves, because they import what they use."""
    return [b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "import" in b]


def run(page, block):
    """Runs a block, and returns the names that it defines."""
    names = {}
    exec(compile(block, str(page), "exec"), names)
    return names


@pytest.fixture
def tiny_pipeline(monkeypatch):
    """Replaces the pipeline that the code downloads with a tiny one, and its fifty steps with three."""
    pipeline = pytest.importorskip("diffusers").StableDiffusionPipeline
    import tiny_pipelines

    monkeypatch.setattr(pipeline, "from_pretrained", lambda *_, **__: tiny_pipelines.sd15())
    call = pipeline.__call__
    quick = functools.wraps(call)(lambda *arguments, **options: call(*arguments, num_inference_steps=3, **options))
    monkeypatch.setattr(pipeline, "__call__", quick)


def test_readme_is_read_in_a_minute():
    assert len(README.read_text().splitlines()) <= 100
    assert len(blocks(README)) == 2
    assert all(len(re.findall(r"^.+$", block, re.M)) <= 5 for block in blocks(README))
    assert re.search(r"^make test\b", README.read_text(), re.MULTILINE)


def test_readme_diffusers(capsys, tiny_pipeline):
    names = run(README, blocks(README)[0])
    printed = capsys.readouterr().out
    # The first level and the middle of SD 1.5 at 224 x 224, trained at 512 x 512. The columns: N, T, λ√d, entropy.
    first = re.search(r"unet\.down_blocks\.0.*attn1 +784 +4096 +0\.8951 +([0-9.]+)", printed)
    assert 0 < float(first[1]) <= math.log(784)
    assert re.search(r"unet\.mid_block.*attn1 +16 +64 +0\.8165 +[0-9.]+", printed)
    assert len(names["handle"].entropy.table()) == 16
    assert not names["handle"].enabled


def test_readme_function():
    names = run(README, blocks(README)[1])
    q, k, v = names["q"], names["k"], names["v"]
    scale = math.sqrt(math.log(784) / math.log(4096) / 40)
    torch.testing.assert_close(names["out"], F.scaled_dot_product_attention(q, k, v, scale=scale))
    logits = q.double() @ k.double().mT * scale
    log_p = logits.log_softmax(-1)
    for name, expected in (("lse", logits.logsumexp(-1)), ("entropy", -(log_p.exp() * log_p).sum(-1))):
        assert names[name].shape == (1, 8, 784)
        torch.testing.assert_close(names[name].double(), expected, atol=1e-4, rtol=0)


def test_docs_function(capsys):
    page = ROOT / "docs" / "function.md"
    assert blocks(page)
    for block in blocks(page):
        run(page, block)
    printed = capsys.readouterr().out
    assert "torch.Size([1, 8, 784])" in printed
    assert "torch.Size([5904, 8, 40]) torch.Size([8, 5904])" in printed
    assert "backend  cpu" in printed
    assert "T = 4096, N = 784" in printed
    assert re.search(r"1 +λ +mid.attn +784 +1024 +0.9805 +\d\.\d{4}", printed)


def test_docs_diffusers(capsys, tiny_pipeline):
    page = ROOT / "docs" / "diffusers.md"
    assert blocks(page)
    for block in blocks(page):
        names = run(page, block)
        assert not names["handle"].enabled
    printed = capsys.readouterr().out
    assert "entropy_attn on StableDiffusionPipeline: 16 layers" in printed
    assert re.search(r"unet.down_blocks.0.*attn1 +4096 +784  0.8951", printed)
    assert "trained scale" not in printed


def published():
    """The files and folders that git tracks, or without git all that exist."""
    if shutil.which("git") is not None and (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return {path for name in listed.stdout.splitlines() for path in (Path(name), *Path(name).parents)}
    return {path.relative_to(ROOT) for path in ROOT.rglob("*")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page):
    """Every script that a page runs exists."""
    for script in re.findall(r"python ([a-z][a-z_/]*\.py)", page.read_text()):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Links within the repository lead to files and folders that git tracks."""
    known = published()
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).resolve().relative_to(ROOT.resolve()) in known, target
