"""What a user's environment sees: imports, their cost, the wheel, and the name `kernels`."""

import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pulls_in_nothing_it_does_not_need(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import entropy_attn
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new))
"""
    assert python(code, tmp_path).strip() == "['entropy_attn']"


def test_works_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, entropy_attn
x = torch.randn(1, 2, 9, 8)
print(entropy_attn.attention(x, x, x, train_tokens=64, return_entropy=True).entropy.shape)
try:
    entropy_attn.attention(x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""
    shape, message = python(code, tmp_path).splitlines()
    assert shape == "torch.Size([1, 2, 9])"
    assert "Triton is not installed" in message


def test_import_takes_at_most_50_ms_on_top_of_torch(tmp_path):
    code = "import torch, time; t = time.perf_counter(); import entropy_attn; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code, tmp_path)) for _ in range(5)) < 0.050


def test_hugging_face_kernels_keeps_its_name(tmp_path):
    # Hugging Face's package `kernels`, or what stands for it: ours must never be found under that name.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'hugging face'")
    code = "import entropy_attn.kernels, kernels; print(kernels.OWNER, entropy_attn.kernels.__name__)"
    assert python(code, tmp_path, PYTHONPATH=str(tmp_path)).split() == ["hugging", "face", "entropy_attn.kernels"]
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import entropy_attn, importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert str(ROOT) not in python(code, empty)


def test_wheel_holds_the_package_only(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(tree),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    info = [name for name in names if ".dist-info/" in name]
    rest = sorted(set(names) - set(info))
    sources = [*(ROOT / "entropy_attn").rglob("*.py"), ROOT / "entropy_attn" / "py.typed"]
    expected = [str(path.relative_to(ROOT)) for path in sources]
    expected += [f"entropy_attn/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")]
    assert rest == sorted(expected)
    assert any(name.endswith("LICENSE") for name in info)


@pytest.mark.parametrize("mask", ["None", "torch.rand(2, 1, 1, N) > 0.5"], ids=["", "mask"])
def test_memory_of_the_cpu_backend_is_linear(tmp_path, mask):
    pytest.importorskip("resource")
    N = 24_000  # the scores alone would be 4.6 GB, an expanded mask 1.2 GB
    code = f"""
import resource, torch, entropy_attn
torch.set_num_threads(1)
N = {N}
x, mask = torch.randn(2, 1, N, 8), {mask}
x[:, :, 3] = float("nan") if mask is not None else 0
if mask is not None:
    mask[..., 3] = False
entropy_attn.attention(x[:, :, :64], x[:, :, :64], x[:, :, :64], return_entropy=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
entropy_attn.attention(x[:, :, :2000], x, x, mask, return_entropy=True, return_lse=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = int(python(code, tmp_path))
    assert kilobytes < 12 * 2 * N * 8 * 4 / 1024 + 16 * 1024
