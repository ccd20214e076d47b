"""The package in a user's environment: ways to install, imports and their cost, the wheel, the name `kernels`."""

import email
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import entropy_attn

ROOT = Path(__file__).parent.parent
# Calls the kernel if Triton is installed, and prints the files from which the package was imported.
USE = """
import importlib.util, torch, entropy_attn, entropy_attn.kernels.tiles
x = torch.randn(1, 2, 9, 8, device="cuda" if torch.cuda.is_available() else "cpu")
backend = "triton" if importlib.util.find_spec("triton") else "cpu"
out = entropy_attn.attention(x, x, x, train_tokens=64, backend=backend)
torch.testing.assert_close(out, entropy_attn.attention(x, x, x, train_tokens=64, backend="reference"))
print(entropy_attn.__file__)
print(entropy_attn.kernels.tiles.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # PYTHONPATH and PYTHONSAFEPATH would change where Python searches for modules.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=variables | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def git(*arguments: str, cwd: Path) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return run("git", *name, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the clone, without the files that git ignores."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone of git")
    copy = tmp_path_factory.mktemp("clone") / "tree"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=tree)
    (path,) = out.iterdir()
    return path


def build_wheel(source: Path, out: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def fresh(tmp_path):
    """The Python and the site-packages of a new environment, with all packages of this one except entropy_attn."""
    path = tmp_path / "environment"
    venv.create(path, with_pip=False, symlinks=True)
    site = path / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    for entry in {*Path(sysconfig.get_path("purelib")).iterdir(), *Path(sysconfig.get_path("platlib")).iterdir()}:
        if "entropy_attn" not in entry.name and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return path / Path(sys.executable).relative_to(sys.prefix), site


def install(interpreter: Path, *what: str | Path, cwd: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index")
    run(interpreter, "-m", "pip", "install", *options, *what, cwd=cwd)


@pytest.mark.parametrize("way", [".", "-e .", pytest.param("git", marks=pytest.mark.slow)])
def test_an_installation_works_in_the_clone_and_elsewhere(way, fresh, tree, tmp_path):
    interpreter, site = fresh
    if way == "git":
        repository = shutil.copytree(tree, tmp_path / "repository", symlinks=True)
        git("init", "--quiet", cwd=repository)
        git("add", "--all", cwd=repository)
        git("commit", "--quiet", "--message", "all", cwd=repository)
        install(interpreter, f"git+{repository.as_uri()}", cwd=tmp_path)
    else:
        install(interpreter, *way.split(), cwd=tree)
    found = [Path(line) for line in run(interpreter, "-c", USE, cwd=tree).splitlines()]
    assert found == [tree / "entropy_attn" / "__init__.py", tree / "entropy_attn" / "kernels" / "tiles.py"]
    package = (tree if way == "-e ." else site) / "entropy_attn"
    found = [Path(line) for line in run(interpreter, "-c", USE, cwd=tmp_path).splitlines()]
    assert found == [package / "__init__.py", package / "kernels" / "tiles.py"]


@pytest.mark.slow
def test_an_unpacked_sdist_is_as_good_as_a_clone(fresh, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("entropy_attn-*/")
    interpreter, _ = fresh
    install(interpreter, "-e", ".", cwd=unpacked)
    package = unpacked / "entropy_attn"
    for folder in (unpacked, tmp_path):
        found = [Path(line) for line in run(interpreter, "-c", USE, cwd=folder).splitlines()]
        assert found == [package / "__init__.py", package / "kernels" / "tiles.py"]


def test_hugging_face_kernels_keeps_its_name(fresh, wheel, tree, tmp_path):
    interpreter, site = fresh
    install(interpreter, wheel, cwd=tmp_path)
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    if not (site / "kernels").exists():
        # Hugging Face's package is not installed. The clone's folder `kernels` is a namespace package without origin.
        assert run(interpreter, "-c", code, cwd=tmp_path).strip() == "None"
        assert run(interpreter, "-c", code, cwd=tree).strip() == "None"
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").touch()  # a stand-in for Hugging Face's package
    code = "import entropy_attn.kernels.tiles as ours, kernels; print(kernels.__file__, ours.__name__, sep='\\n')"
    for folder in (tmp_path, tree):
        found = run(interpreter, "-c", code, cwd=folder).splitlines()
        assert found == [str(site / "kernels" / "__init__.py"), "entropy_attn.kernels.tiles"]


def test_no_file_is_imported_under_two_names():
    code = """
import collections, os, sys
import entropy_attn.kernels.aot, entropy_attn.diffusers, entropy_attn.backends.triton
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
files = [os.path.realpath(file) for file in files if file]
# Not by name: a clone in a folder "entropy_attn" has PyTorch in it too, which gives a file two names.
ours = tuple(os.path.realpath(package.__path__[0]) + os.sep for package in (entropy_attn, entropy_attn.kernels))
files = [file for file in files if file.startswith(ours)]
print(len(files), [file for file, times in collections.Counter(files).items() if times > 1])
"""
    pytest.importorskip("triton")
    pytest.importorskip("diffusers")
    count, rest = python(code, ROOT).split(maxsplit=1)
    assert int(count) > 20
    assert rest.strip() == "[]"


@pytest.mark.slow
def test_mypy_sees_the_kernels(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text("import entropy_attn.kernels.tiles as tiles\nreveal_type(tiles.find_tile)\n")
    command = (sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "user.py")
    printed = run(*command, "--follow-imports=silent", cwd=ROOT)
    assert "-> entropy_attn.kernels.tiles.Tile" in printed


def test_import_pulls_in_nothing_it_does_not_need(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import entropy_attn
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new))
"""
    assert python(code, tmp_path).strip() == "['entropy_attn']"


def test_the_record_needs_no_diffusers(tmp_path):
    pytest.importorskip("matplotlib")
    code = """
import sys
sys.modules["diffusers"] = None
import torch, entropy_attn, entropy_attn.sdpa, entropy_attn.entropy.rule
from entropy_attn.entropy import EntropyRecord, Moment, Tokens
record = EntropyRecord()
session = record.open_session("my loop")
for run, N in enumerate((9, 16)):
    x = torch.randn(1, 2, N, 8)
    session.add("layer", Moment(run), Tokens(N, 64), entropy_attn.attention(x, x, x, return_entropy=True).entropy)
record.plot("entropy.png")
print([(row["label"], row["tokens"], row["train_tokens"], row["multiplier"]) for row in record.table()])
print(sorted(name for name in sys.modules if name.startswith("entropy_attn.diffusers")))
"""
    rows, adapter = python(code, tmp_path).splitlines()
    assert rows == "[('my loop', 9, 64, 1.0), ('my loop', 16, 64, 1.0)]"
    assert adapter == "[]"
    assert (tmp_path / "entropy.png").exists()


def test_nothing_imports_the_adapter():
    package = ROOT / "entropy_attn"
    sources = [path for path in package.rglob("*.py") if path.parent != package / "diffusers"]
    naming = [path for path in sources if "entropy_attn.diffusers" in path.read_text()]
    assert naming == [package / "__init__.py"]  # which imports it when `enable` is first asked for


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


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_only(wheel, tree):
    names = contents(wheel).keys()
    info = {name for name in names if ".dist-info/" in name}
    sources = [*(tree / "entropy_attn").rglob("*.py"), tree / "entropy_attn" / "py.typed"]
    expected = {path.relative_to(tree).as_posix() for path in sources}
    expected |= {f"entropy_attn/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").glob("*.py")}
    assert names - info == expected
    assert any(name.endswith("LICENSE") for name in info)


def test_sdist_is_complete_and_makes_the_same_wheel(sdist, wheel, tree, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    # The symbolic link is a folder in the sdist.
    paths = [*tree.rglob("*"), *(tree / "entropy_attn" / "kernels").glob("*.py")]
    files = {path.relative_to(tree).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}
    files = {name for name in files if not name.startswith(("build/", "entropy_attn.egg-info/"))}
    generated = {name for name in names if name.startswith("entropy_attn.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert {"tests/conftest.py", "constraints.txt", "docs/function.md", ".ci/run"} <= files
    assert names - generated == files - {"setup.cfg"}
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def test_metadata(wheel):
    (text,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(text)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The entropy_attn authors"
    assert metadata["Version"] == entropy_attn.__version__
    assert {"Repository", "Documentation"} <= {url.split(",")[0] for url in metadata.get_all("Project-URL")}
    versions = [c.rpartition("3.")[2] for c in metadata.get_all("Classifier") if "Python :: 3." in c]
    assert metadata["Requires-Python"] == f">=3.{versions[0]}"
    # A package index has no files beside this text, so its pictures and links must be absolute.
    links = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert links
    assert all(link.startswith("https://") for link in links)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_oldest_versions_tested_are_the_oldest_allowed(wheel):
    (text,) = (data for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    oldest = pins("constraints-oldest.txt")
    floors = dict(re.findall(r"^Requires-Dist: (torch|triton|diffusers)>=([\d.]+)", text.decode(), re.MULTILINE))
    assert floors.keys() == {"torch", "triton", "diffusers"}
    for package, floor in floors.items():
        assert oldest[package].startswith(f"{floor}.")
    assert oldest.keys() == pins("constraints.txt").keys() == pins("constraints-newest.txt").keys()


def test_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == entropy_attn.__version__
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Jin", "Shen", "Li", "Xue"]
    assert {"type", "title", "year"} <= paper.keys()


@pytest.mark.parametrize("mask", ["None", "torch.rand(2, 1, 1, N) > 0.5"], ids=["", "mask"])
def test_memory_of_the_cpu_backend_is_linear(tmp_path, mask):
    pytest.importorskip("resource")
    N = 24_000  # all scores of 2000 queries would take 384 MB, an expanded mask 96 MB
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
