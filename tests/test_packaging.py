"""From the tree to an sdist, from the sdist to a wheel, and the wheel works: through the build backend, without a network."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from sysconfig import get_path

import pybind11
import pytest

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
NAME = f"reinforce_ada-{VERSION}"

# Where the CUDA forms' compiler may be: PATH, the usual place, the wheels of this environment. The build looks for itself.
NVCC = [
    *filter(None, [shutil.which("nvcc")]),
    *Path("/usr/local/cuda/bin").glob("nvcc"),
    *Path(get_path("purelib")).glob("nvidia/*/bin/nvcc"),
]

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed; pip brings its own when it builds")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc; the wheels of nvidia-cuda-nvcc would be enough")


def backend(call: str, cwd: Path, out: Path, **environment: str) -> str:
    """The file that one hook of the build backend writes to `out`."""
    code = f"import sys; from scikit_build_core import build; print('BUILT', build.{call}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
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
    """With the CUDA forms where there is an nvcc, for one architecture: the others take longer and are compiled elsewhere.

    The host compiler is told not to optimise, which halves its time; the module that all other tests run was built as a release is.
    """
    out = tmp_path_factory.mktemp("wheel")
    cxx = script(out / "c++", f'exec {os.environ.get("CXX", "c++")} "$@" -O0')
    options = f"-DREINFORCE_ADA_CUDA_ARCHITECTURES=90 -DCMAKE_CXX_COMPILER={cxx}"
    return out / backend("build_wheel", unpacked, out, REINFORCE_ADA_CUDA="ON" if NVCC else "OFF", CMAKE_ARGS=options)


def modules() -> set[str]:
    return {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}


def test_sdist_has_every_source_and_nothing_that_is_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {f"python/{name}" for name in modules()} <= names
    assert {"CMakeLists.txt", "cmake/cuda.cmake", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "tests/test_packaging.py"} <= names
    assert [name for name in names if re.search(r"\.(o|so|pyc)$|^build/|^runs/|^\.ci/|^\.venv", name)] == []


@needs_cmake
def test_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    native = {name for name in names if name.endswith(".so")}
    assert {name.split(".")[0] for name in native} == {"reinforce_ada/_cpu", *(["reinforce_ada/_cuda"] if NVCC else [])}
    assert len(native) == 1 + bool(NVCC)
    info = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == modules() | native | info | {f"reinforce_ada/{name}" for name in ("py.typed", "_cpu.pyi", "_cuda.pyi")}
    assert "reinforce-ada = reinforce_ada.cli:main" in entry_points.replace("=", " = ").replace("  ", " ")
    assert {"Requires-Python: >=3.10", "License-Expression: Apache-2.0"} <= set(metadata.splitlines())
    required = {
        re.match(r"Requires-Dist: ([\w-]+)", line)[1]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and ";" not in line
    }
    assert required == {"numpy", "torch"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel in it, and how to run code that sees it."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--root-user-action=ignore"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    site = str(folder / "site")
    before = f"""
import sys
SITE = {site!r}
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]  # an editable install would come first
"""

    def run(code: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": site, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", before + code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@needs_cmake
def test_the_installed_wheel_imports_and_computes(installed):
    isa = installed("""
import torch, reinforce_ada
from reinforce_ada import _cpu, ops
assert reinforce_ada.__file__.startswith(SITE) and _cpu.__file__.startswith(SITE)
x = torch.randn(4, 9)
ids = torch.arange(4)
torch.testing.assert_close(ops.token_logprobs(x, ids, backend="cpu"), ops.token_logprobs(x, ids, backend="reference"))
print(_cpu.build_info()["selected_isa"])
""")
    assert isa in {"baseline", "avx2", "avx512"}


@needs_cmake
@needs_nvcc
def test_the_cuda_module_imports_without_a_driver_and_says_why_it_cannot_run(installed):
    info, reason, error = installed("""
from reinforce_ada import _cuda  # before torch, whose own CUDA runtime it must not need
assert _cuda.__file__.startswith(SITE)
print(_cuda.build_info())
reason = _cuda.unusable_device(0)
print(reason)
try:
    if reason is None:
        raise RuntimeError("none, there is a device")
    _cuda.token_logprobs_forward(0, 0, 0, 1, 4, 9, 9, 0, 0, 1.0, 1.0, 0.0, 0, 0, 0, 0, 0)
except RuntimeError as e:
    print(e)
""").splitlines()
    info = ast.literal_eval(info)
    assert info["compiler"].startswith("nvcc ")
    assert (info["architectures"], info["emulated"]) == (["sm_90", "compute_90"], False)
    if reason != "None":
        words = reason.partition("; CUDA says: ")[2]
        assert words
        launched = "token_logprobs_forward_bfloat16: num_tokens = 4, vocab = 9, row_stride = 9, a grid of 4 x 1 blocks of 512: "
        assert error.startswith(launched)
        assert error.endswith(f"; CUDA says: {words}")


# -------------------- REINFORCE_ADA_CUDA


def configure(tmp_path: Path, choice: str, *options: str, python: str = sys.executable, **environment: str) -> tuple[int, str]:
    """CMake's configure step alone: the exit status, and what it said about CUDA."""
    defines = {"REINFORCE_ADA_CUDA": choice, "pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": python}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *(f"-D{name}={value}" for name, value in defines.items()), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.stderr.count("CMake Error") == (done.returncode != 0), done.stderr
    return done.returncode, "\n".join(line for line in [*done.stdout.splitlines(), " ".join(done.stderr.split())] if "_CUDA=" in line)


@needs_cmake
def test_what_cuda_cannot_be_is_one_line(tmp_path):
    status, said = configure(tmp_path, "YES")
    assert status != 0
    assert "REINFORCE_ADA_CUDA=YES: not a choice; use AUTO, ON or OFF." in said


@needs_cmake
def test_off_does_not_look_for_a_compiler(tmp_path):
    assert configure(tmp_path, "OFF", CUDACXX="/no/such/nvcc") == (0, "")


@needs_cmake
@pytest.mark.parametrize("choice", ["ON", "on"])
def test_on_without_nvcc_is_an_error_with_the_remedies(tmp_path, choice):
    status, said = configure(tmp_path, choice, CUDACXX="/no/such/nvcc")
    assert status != 0
    assert "REINFORCE_ADA_CUDA=ON: CUDACXX=/no/such/nvcc is no program; nvcc 12.8 or newer is needed; set CUDACXX to one, or" in said
    assert "'nvidia-cuda-nvcc==13.0.*'" in said


@needs_cmake
def test_auto_without_nvcc_says_why_and_goes_on(tmp_path):
    """Neither in PATH nor where it usually is, and no wheel in this Python's environment."""
    status, said = configure(tmp_path, "AUTO", hidden(), python=environment_with(tmp_path, CUDA_TORCH), CUDA_HOME="")
    assert status == 0
    places = "CUDACXX, CUDA_HOME, PATH, /usr/local/cuda or the wheels of the Python environment"
    assert said == f"-- REINFORCE_ADA_CUDA=AUTO: no nvcc in {places}; building without the CUDA forms."


@needs_cmake
def test_auto_with_an_nvcc_that_fails_says_why_and_goes_on(tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'nvcc fatal: unsupported gcc'; exit 1")
    status, said = configure(tmp_path, "AUTO", python=environment_with(tmp_path, CUDA_TORCH), CUDACXX=str(nvcc))
    assert status == 0
    failed = f"{tmp_path}/nvcc does not compile for sm_120: nvcc fatal: unsupported gcc"
    assert said == f"-- REINFORCE_ADA_CUDA=AUTO: {failed}; building without the CUDA forms."


# What torch/version.py has in its three kinds of wheel.
CUDA_TORCH, CPU_TORCH, ROCM_TORCH = (
    f"__version__ = '2.6.0'\ndebug = False\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = {hip}\n"
    for cuda, hip in (("'12.4'", None), (None, None), (None, "'6.2.4'"))
)


@needs_cmake
@pytest.mark.parametrize(
    ("torch_version", "reason"),
    [
        (None, "there is no torch in the Python environment"),
        (CPU_TORCH, "the torch of the Python environment is built without CUDA"),
        (ROCM_TORCH, "the torch of the Python environment is built without CUDA"),
    ],
    ids=["no torch", "cpu", "rocm"],
)
def test_auto_goes_by_torch_and_does_not_look_for_a_compiler(tmp_path, torch_version, reason):
    nvcc = script(tmp_path / "nvcc", f"touch {tmp_path}/called; exit 1")
    status, said = configure(tmp_path, "AUTO", python=environment_with(tmp_path, torch_version), CUDACXX=str(nvcc))
    assert (status, said) == (0, f"-- REINFORCE_ADA_CUDA=AUTO: {reason}; building without the CUDA forms.")
    assert not (tmp_path / "called").exists()


@needs_cmake
@needs_nvcc
def test_auto_builds_where_torch_has_cuda_and_nvcc_works(tmp_path):
    status, said = configure(tmp_path, "AUTO", python=environment_with(tmp_path, CUDA_TORCH), CUDACXX=str(NVCC[-1]))
    assert (status, said) == (0, f"-- REINFORCE_ADA_CUDA=AUTO: {NVCC[-1]} for sm_80 sm_90 sm_100 sm_120 compute_120")


@needs_cmake
@needs_nvcc
def test_nvcc_is_found_in_the_wheels_of_the_environment(tmp_path):
    python = environment_with(tmp_path, None)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    nvcc = script(site / "nvidia/cu13/bin/nvcc", f'exec {NVCC[-1]} "$@"')
    status, said = configure(tmp_path, "ON", hidden(), python=python, CUDA_HOME="")
    assert (status, said) == (0, f"-- REINFORCE_ADA_CUDA=ON: {nvcc} for sm_80 sm_90 sm_100 sm_120 compute_120")


def environment_with(tmp_path: Path, torch_version: str | None) -> str:
    """The interpreter of a new environment with nothing in it but torch/version.py."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    if torch_version is not None:
        (site / "torch").mkdir()
        (site / "torch/version.py").write_text(torch_version)
    return str(tmp_path / "env/bin/python")


def hidden() -> str:
    """An option with which CMake overlooks every nvcc that is on this machine."""
    return f"-DCMAKE_IGNORE_PATH={';'.join(str(Path(nvcc).parent) for nvcc in NVCC)}"


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
