"""From the tree to an sdist, from the sdist to a wheel, and the wheel works: through the build backend, without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
NAME = f"reinforce_ada-{VERSION}"

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed; pip brings its own when it builds")


def backend(call: str, cwd: Path, out: Path) -> str:
    """The file that one hook of the build backend writes to `out`."""
    code = f"import sys; from scikit_build_core import build; print('BUILT', build.{call}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^BUILT (\S+)$", done.stdout, re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project as a fresh clone with leftovers of daily work in it: what is ignored must not travel."""
    folder = tmp_path_factory.mktemp("tree") / "project"
    ignored = shutil.ignore_patterns("build", ".venv*", ".git", "__pycache__", "*.so", "runs", "dist", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for leftover in ("build/dev/CMakeFiles/csrc/ops/x.cpp.o", "python/reinforce_ada/_cpu.old.so", "runs/a/log.jsonl"):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_text("leftover")
    return folder


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    return out / backend("build_sdist", tree, out)


@pytest.fixture(scope="module")
def unpacked(sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / NAME


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    return out / backend("build_wheel", unpacked, out)


def modules() -> set[str]:
    return {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}


def test_sdist_has_every_source_and_nothing_that_is_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {f"python/{name}" for name in modules()} <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "tests/test_packaging.py"} <= names
    assert [name for name in names if re.search(r"\.(o|so|pyc)$|^build/|^runs/|^\.ci/|^\.venv", name)] == []


@needs_cmake
def test_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    native = {name for name in names if re.fullmatch(r"reinforce_ada/_cpu\.[\w-]+\.so", name)}
    assert len(native) == 1
    info = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == modules() | native | info | {"reinforce_ada/py.typed", "reinforce_ada/_cpu.pyi"}
    assert "reinforce-ada = reinforce_ada.cli:main" in entry_points.replace("=", " = ").replace("  ", " ")
    assert {"Requires-Python: >=3.10", "License-Expression: Apache-2.0"} <= set(metadata.splitlines())
    required = {
        re.match(r"Requires-Dist: ([\w-]+)", line)[1]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and ";" not in line
    }
    assert required == {"numpy", "torch"}


@needs_cmake
def test_the_installed_wheel_imports_and_computes(wheel, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]  # an editable install would come first
import torch, reinforce_ada
from reinforce_ada import _cpu, ops
assert reinforce_ada.__file__.startswith(SITE) and _cpu.__file__.startswith(SITE)
x = torch.randn(4, 9)
ids = torch.arange(4)
torch.testing.assert_close(ops.token_logprobs(x, ids, backend="cpu"), ops.token_logprobs(x, ids, backend="reference"))
print(_cpu.build_info()["selected_isa"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": str(tmp_path / "site"),
        "OMP_NUM_THREADS": "1",
    }
    run = [sys.executable, "-c", f"SITE = {str(tmp_path / 'site')!r}\n{code}"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"baseline", "avx2", "avx512"}


# -------------------- REINFORCE_ADA_CUDA


def configure(tmp_path: Path, choice: str) -> subprocess.CompletedProcess[str]:
    """CMake's configure step alone."""
    defines = {"REINFORCE_ADA_CUDA": choice, "pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": sys.executable}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *(f"-D{name}={value}" for name, value in defines.items())]
    return subprocess.run(command, capture_output=True, text=True)


@needs_cmake
@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("ON", "REINFORCE_ADA_CUDA=ON: this version has no CUDA kernels to build; use AUTO or OFF."),
        ("on", "REINFORCE_ADA_CUDA=ON: this version has no CUDA kernels to build; use AUTO or OFF."),
        ("YES", "REINFORCE_ADA_CUDA=YES: not a choice; use AUTO, ON or OFF."),
    ],
)
def test_what_cuda_cannot_be_is_one_line(tmp_path, choice, line):
    done = configure(tmp_path, choice)
    assert done.returncode != 0
    assert line in " ".join(done.stderr.split())
    assert done.stderr.count("CMake Error") == 1


@needs_cmake
@pytest.mark.parametrize("choice", ["AUTO", "OFF"])
def test_without_cuda_the_build_configures(tmp_path, choice):
    done = configure(tmp_path, choice)
    assert done.returncode == 0, done.stderr
    assert ("no CUDA kernels to build; building for the CPU only" in done.stdout) == (choice == "AUTO")
