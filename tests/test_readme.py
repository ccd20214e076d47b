"""The README's code runs as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "import" in b]


def run(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    return capsys.readouterr().out


def test_quickstart(capsys):
    printed = run(BLOCKS[0], capsys)
    assert "torch.Size([1, 8, 784])" in printed
    assert "backend  " in printed


def test_diffusers_quickstart(capsys, monkeypatch):
    """With a tiny pipeline in the place of the one that it downloads."""
    diffusers = pytest.importorskip("diffusers")
    import tiny_pipelines

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: tiny_pipelines.sd15())
    printed = run(BLOCKS[1], capsys)
    assert "entropy_attn on StableDiffusionPipeline: 16 layers" in printed
    assert re.search(r"unet.down_blocks.0.*attn1 +4096 +784  0.8951", printed)
    assert "trained scale" not in printed
    assert re.search(r"0 +λ +unet.mid_block.*attn1 +16 +64 +0.8165 +[0-9.]+", printed)


def test_there_is_code():
    assert len(BLOCKS) == 2
