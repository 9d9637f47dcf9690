from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch_forks import Done, Forks, forks

from reinforce_ada import ops
from reinforce_ada.errors import InputError
from reinforce_ada.ops import _dispatch, _native
from reinforce_ada.ops._dispatch import BackendError, Form, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ["group_advantages", "linear_policy_loss", "linear_token_logprobs", "policy_loss", "token_logprobs"]
needs_native = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """An operator "toy": a cpu form for float32 whose absence the test can set, a cuda form without nvcc, a reference."""
    state: dict[str, str | None] = {"cpu": None}
    monkeypatch.setattr(_dispatch, "_forms", {})
    _dispatch.declare(
        "toy",
        Form("reference"),
        Form("cpu", devices=("cpu",), dtypes=(torch.float32,), missing=lambda: state["cpu"]),
        Form("cuda", devices=("cuda",), missing=lambda: "built without nvcc"),
    )
    return state


def test_all_five_operators_are_functions_and_declared() -> None:
    for name in OPS:
        assert callable(getattr(ops, name)), name
        assert getattr(ops, name).__name__ == name
    assert sorted(_dispatch.table()) == OPS


@needs_native
def test_declared_forms() -> None:
    """The CUDA sources are of the three operators that are not a matrix product."""
    forms = {op: set(by_backend) for op, by_backend in _dispatch.table().items()}
    everywhere = {"triton", "cpu", "reference"}
    with_cuda = {"token_logprobs", "group_advantages", "policy_loss"}
    assert forms == {op: everywhere | {"cuda"} if op in with_cuda else everywhere for op in OPS}
    assert {by_backend[name] for by_backend in _dispatch.table().values() for name in ("cpu", "reference")} == {"ok"}


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "runs"),
    [
        ("auto", CPU, torch.float32, "cpu"),
        ("auto", CPU, torch.float64, "reference"),
        ("auto", CUDA, torch.float32, "reference"),
        ("cpu", CPU, torch.float32, "cpu"),
        ("reference", CPU, torch.float32, "reference"),
        ("reference", CUDA, torch.float32, "reference"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_resolve(backend: str, device: torch.device, dtype: torch.dtype, runs: str) -> None:
    assert resolve("toy", backend, device, dtype) == runs


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("cuda", CPU, torch.float32, 'toy: backend "cuda" cannot run here: built without nvcc. Usable: cpu, reference.'),
        ("triton", CPU, torch.float32, 'toy: backend "triton" cannot run here: this version has no such form. Usable: cpu, reference.'),
        ("cpu", CPU, torch.float64, 'toy: backend "cpu" cannot run here: it takes float32, not float64. Usable: reference.'),
        ("cpu", CUDA, torch.float32, 'toy: backend "cpu" cannot run here: it takes tensors on cpu, not cuda. Usable: reference.'),
    ],
)
@pytest.mark.usefixtures("toy")
def test_a_backend_that_cannot_run_says_why(backend: str, device: torch.device, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(BackendError) as error:
        resolve("toy", backend, device, dtype)
    assert str(error.value) == f"{message} See reinforce-ada doctor."
    assert isinstance(error.value, InputError)


def test_absence_moves_auto_to_the_reference(toy: dict[str, str | None]) -> None:
    toy["cpu"] = "broken: undefined symbol"
    assert resolve("toy", "auto", CPU, torch.float32) == "reference"
    assert _dispatch.table() == {"toy": {"cuda": "built without nvcc", "cpu": "broken: undefined symbol", "reference": "ok"}}
    with pytest.raises(BackendError, match=r"broken: undefined symbol. Usable: reference\."):
        resolve("toy", "cpu", CPU, torch.float32)


@pytest.mark.usefixtures("toy")
def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"toy: unknown backend 'tritn'; known: .*; did you mean 'triton'\?"):
        resolve("toy", "tritn", CPU, torch.float32)


@needs_native
def test_build_info() -> None:
    info = _native.cpu.build_info()
    assert info["built_isas"][0] == "baseline"
    assert set(info["usable_isas"]) <= set(info["built_isas"])
    assert info["selected_isa"] in info["usable_isas"]
    assert isinstance(info["openmp"], bool)
    assert info["compiler"]


@pytest.fixture(scope="module")
def apart() -> Iterator[Forks]:
    with forks() as apart:
        yield apart


def selected_isa(apart: Forks, choice: str | None) -> Done:
    env = {name: value for name, value in os.environ.items() if name != "REINFORCE_ADA_ISA"}
    env |= {} if choice is None else {"REINFORCE_ADA_ISA": choice}
    code = "from reinforce_ada.ops import _native; info = _native.cpu.build_info(); print(info['selected_isa'], *info['usable_isas'])"
    return apart(code, env)


@needs_native
def test_isa_from_the_environment(apart: Forks) -> None:
    strongest, *usable = selected_isa(apart, None).stdout.split()
    assert strongest == usable[-1]
    assert selected_isa(apart, "baseline").stdout.split() == ["baseline", "baseline"]
    unknown = selected_isa(apart, "sse9").stderr.strip().splitlines()[-1]
    expected = f"REINFORCE_ADA_ISA: unknown instruction set sse9; usable here: {', '.join(usable)}; or leave it unset"
    assert unknown == f"reinforce_ada.errors.InputError: {expected}"


@needs_native
def test_isa_from_the_environment_is_the_strongest_there_is(apart: Forks) -> None:
    """So a run, the suite included, is as on a processor that has no more."""
    code = (
        "from reinforce_ada.ops import _native\n"
        "cpu = _native.cpu\n"
        "print(cpu.build_info()['usable_isas'])\n"
        "try: cpu.select_isa('avx512')\n"
        "except ValueError as e: print(e)\n"
    )
    env = {**os.environ, "REINFORCE_ADA_ISA": "baseline"}
    assert apart.checked(code, env).splitlines() == ["['baseline']", "this CPU or this build lacks avx512"]


@needs_native
def test_one_openmp_runtime() -> None:
    """The native module shares torch's libgomp: a second copy in the process would cost 5x on small regions."""
    code = "import reinforce_ada.ops\nprint(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # torch must not come first
    assert result.stdout.strip() == "1"


def test_without_the_native_module_everything_still_imports(apart: Forks) -> None:
    """Absent and broken are different, and neither stops the reference."""
    code = (
        "import sys, importlib.util, torch\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'reinforce_ada._cpu' else find(name, *a)\n"
        "from reinforce_ada import ops\n"
        "from reinforce_ada.ops import _dispatch\n"
        "print(_dispatch.table()['token_logprobs']['cpu'])\n"
        "print(ops.token_logprobs(torch.zeros(1, 4), torch.tensor([1])).exp().item())\n"
    )
    reason, value = apart.checked(code).strip().splitlines()
    assert reason == "reinforce_ada._cpu is not built (install with a C++17 compiler present)"
    assert float(value) == pytest.approx(0.25)


def test_import_is_light(apart: Forks) -> None:
    """`import reinforce_ada.ops` brings torch, and nothing else that is heavy."""
    code = (
        "import sys, torch\n"
        "with_torch = set(sys.modules)\n"
        "import reinforce_ada.ops\n"
        "print(*sorted({'triton', 'transformers', 'vllm', 'scipy', 'matplotlib'} & (set(sys.modules) - with_torch)))\n"
    )
    assert apart.checked(code).split() == []
