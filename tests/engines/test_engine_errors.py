"""Engines that cannot be had, as who types the command sees it: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_modes import MODES
from hostile_server import HostileServer, hostile, loop_in_a_thread
from scripted_servers import servers

from reinforce_ada.cli import main


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{a} + 1 =", "answer": str(a + 1)}) for a in range(8)))
    return path


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """The line of a command that refuses."""
    assert main([str(a) for a in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reinforce-ada:")]
    assert len(lines) == 1
    return lines[0]


def evaluating(model: Path, task: Path, engine: str, *more: Any) -> list[Any]:
    settings = {
        "task": task,
        "engine": engine,
        "dtype": "float32",
        "eval-prompts": 2,
        "eval-k": 1,
        "max-model-len": 64,
        "system-prompt": "",
    }
    return ["eval", model, *(word for key, value in settings.items() for word in (f"--{key}", value)), *more]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"key": "secret"}], "refuses the key (401); set VLLM_API_KEY or OPENAI_API_KEY to the server's"),
        ([{}, {"model": "other"}], "serves scripted"),
        ([{"max_model_len": 32}], "a context of 32 tokens; 64 are needed: lower --max-model-len, or serve a longer one"),
        ([{"version": "0.21.1"}], "vLLM 0.21.1; at least 0.22 is needed"),
        ([{"dev": False}], "VLLM_SERVER_DEV_MODE=1 is needed where it runs"),
        ([{"takes_weights": False}], "does not take the weights (500: "),
    ],
)
def test_servers_that_cannot_be_used(
    settings: list[dict[str, Any]], message: str, tiny_model: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with servers(*settings) as processes:
        urls = ",".join(p.url for p in processes)
        assert message in said(capsys, *evaluating(tiny_model, task, "openai", "--servers", urls))


def test_servers_that_are_not_there(tiny_model: Path, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--servers URL,URL" in said(capsys, *evaluating(tiny_model, task, "openai"))
    line = said(capsys, *evaluating(tiny_model, task, "openai", "--servers", "http://127.0.0.1:9"))
    assert "http://127.0.0.1:9: ConnectError" in line
    assert "reinforce-ada serve starts some" in line


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("/v1/models is busy", 3, "/v1/models answers 503); the run can be resumed"),
        ("/v1/models redirects", 2, "/v1/models answers 302: see http://other/"),
        ("/v1/models says no models", 2, "serves 0 models; one is needed"),
        ("/v1/models says deep nesting", 2, "is no vLLM server (answered garbage: JSON that is nested too deeply)"),
        ("/collective_rpc is a teapot", 2, r"418: \x1b[2Jshort and stout"),
    ],
)
def test_servers_that_misbehave(
    mode: str, code: int, message: str, tiny_model: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loop_in_a_thread() as loop, hostile(loop, HostileServer(MODES[mode].at, MODES[mode].does)) as (url,):
        line = said(capsys, *evaluating(tiny_model, task, "openai", "--servers", url, "--give-up-s", 1.5), code=code)
    assert message in line


def test_credentials_of_a_server_are_written_nowhere(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by a new run nor by one that goes on."""
    url = "http://user:secret@127.0.0.1:9"
    run, config = tmp_path / "run", tmp_path / "old"
    config.mkdir()
    (config / "config.toml").write_text("[engine]\nengine = 'openai'\n")
    for arguments in (["--task", task, "--out", run, "--engine", "openai"], ["--resume", config]):
        line = said(capsys, "train", *arguments, "--servers", url)
        assert "servers: 'http://127.0.0.1:9' came with credentials" in line
        assert "secret" not in line
    assert not run.exists()
    assert [p.name for p in config.iterdir()] == ["config.toml"]
    assert "secret" not in (config / "config.toml").read_text()


@pytest.mark.parametrize("module", ["vllm", "ray"])
def test_what_is_not_installed(
    module: str, tiny_model: Path, task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    monkeypatch.setitem(sys.modules, module, None)
    line = said(capsys, *evaluating(tiny_model, task, module))
    assert f'pip install "reinforce-ada[{module}]"' in line


@pytest.mark.parametrize("module", ["vllm", "ray"])
def test_a_folder_of_that_name_is_not_it(
    module: str, tiny_model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / module).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / module / "__init__.py").exists())])
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert f'pip install "reinforce-ada[{module}]"' in said(capsys, *evaluating(tiny_model, task, module))


def test_hosts_that_others_reach(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--expose allows it" in said(capsys, "serve", "smollm2", "--host", "0.0.0.0")
    assert "--host and --port of serve itself" in said(capsys, "serve", "smollm2", "--vllm-args", "--host 0.0.0.0")


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_a_port_that_is_taken(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1" in said(capsys, "serve", tiny_model, "--port", port)
