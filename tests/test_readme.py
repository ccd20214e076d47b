"""The README's code runs as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "import" in b]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([1, 8, 784])" in printed
    assert "backend  " in printed


def test_there_is_code():
    assert len(BLOCKS) == 1
