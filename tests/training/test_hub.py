"""Pushing a run with the real client of the hub to a stand-in for its API on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import RIGHT_TOKEN

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.training import hub
from reinforce_ada.training.card import write_card

SERVER = Path(__file__).with_name("hub_server.py")
# Waiting between the client's own attempts is not what is tested.
PUSH = """
import sys
from huggingface_hub.utils import _http
_http.time.sleep = lambda seconds: None
from reinforce_ada import cli
for arguments in {lines!r}:
    print("code", cli.main(["push", *arguments]), flush=True)
"""


class Server:
    """The stand-in; `holds` is there when it has ended."""

    def __init__(self, trouble: str) -> None:
        self._process = subprocess.Popen([sys.executable, str(SERVER), trouble], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._process.stdout.readline().strip()
        self.holds: dict[str, Any] = {}

    def close(self) -> None:
        self.holds = json.loads(self._process.communicate("")[0])


@contextmanager
def served(trouble: str = "") -> Iterator[Server]:
    server = Server(trouble)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, as far as a push reads it."""
    out = tmp_path_factory.mktemp("hub") / "run"
    (out / "model").mkdir(parents=True)
    (out / "model/model.safetensors").write_bytes(bytes(range(256)) * 40)
    (out / "model/config.json").write_text('{"model_type": "llama"}')
    write_card(out / "model", "run", configuration.load(None, {"model": "org/base"}), [])
    return out


def push(address: str, *lines: list[str], token: str = RIGHT_TOKEN, cwd: Path) -> tuple[str, str]:
    """What pushes print, one after the other."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    code = PUSH.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, check=True)
    return done.stdout, done.stderr


def test_a_run_is_pushed_and_again_and_whatever_fails_is_one_line(run: Path, tmp_path: Path) -> None:
    with served() as server:
        line = [str(run), "--to", "org/mine"]
        out, err = push(server.address, line, line, [str(run), "--to", "theirs/mine"], [str(run), "--to", "a/b/c"], cwd=tmp_path)
        assert out == f"{server.address}/org/mine\ncode 0\n{server.address}/org/mine\ncode 0\ncode 2\ncode 2\n", err
        refused, unnamed = [text for text in err.splitlines() if text.startswith("reinforce-ada: ")]
        assert refused.startswith("reinforce-ada: hub: theirs/mine has not been pushed: HfHubHTTPError: ")
        assert refused.endswith(f"the run is whole; `reinforce-ada push {run} --to theirs/mine` tries again")
        assert unnamed == "reinforce-ada: hub: 'a/b/c' names no repository; org/name, or name for your own"
        out, err = push(server.address, line, token="hf_wrong", cwd=tmp_path)
        assert out == "code 2\n"
        (wrong,) = [text for text in err.splitlines() if text.startswith("reinforce-ada: ")]
        assert "org/mine has not been pushed: " in wrong
        assert "401" in wrong
        assert "hf_wrong" not in out + err
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "model").iterdir()}
    commits = ["run, by reinforce_ada"] * len(server.holds["org/mine"]["commits"])
    assert server.holds == {"org/mine": {"private": server.holds["org/mine"]["private"], "files": files, "commits": commits}}
    assert server.holds["org/mine"]["private"] in (True, "private")
    assert commits


def test_adapters_do_not_tell_where_their_base_model_lay(run: Path, tmp_path: Path) -> None:
    """The run beside them knows it; in the repository they name the model as the card does."""
    out = tmp_path / "adapted"
    shutil.copytree(run, out)
    (out / "config.toml").write_text('[model]\nmodel = "smollm2"\n')
    config = {"r": 16, "base_model_name_or_path": "/data/of/me/reinforce_ada/smollm2-135m-instruct"}
    (out / "model/adapter_config.json").write_text(json.dumps(config))
    with served() as server:
        assert push(server.address, [str(out), "--to", "org/adapted"], cwd=tmp_path)[0].endswith("code 0\n")
    public = json.dumps({**config, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}, indent=2).encode()
    assert server.holds["org/adapted"]["files"]["adapter_config.json"] == hashlib.sha256(public).hexdigest()
    assert json.loads((out / "model/adapter_config.json").read_text()) == config


def test_a_network_that_goes_in_the_middle_is_one_line_and_the_next_push_is_whole(run: Path, tmp_path: Path) -> None:
    with served("gone") as server:
        out, err = push(server.address, [str(run), "--to", "org/mine"], cwd=tmp_path)
    assert out == "code 2\n"
    assert [text for text in err.splitlines() if "org/mine has not been pushed" in text and "tries again" in text], err
    assert server.holds["org/mine"]["files"] == {}  # half a model is nobody's
    with served() as server:
        assert push(server.address, [str(run), "--to", "org/mine"], cwd=tmp_path)[0].endswith("code 0\n")
    assert set(server.holds["org/mine"]["files"]) == {"README.md", "config.json", "model.safetensors"}
    out, err = push(server.address, [str(run), "--to", "org/mine"], cwd=tmp_path)  # nobody listens there any more
    assert out == "code 2\n"
    assert "org/mine has not been pushed: ConnectError" in err


@pytest.mark.parametrize(
    ("token", "offline", "said"),
    [("", False, "there is no token; one that may write, in HF_TOKEN"), ("hf_x", True, "HF_HUB_OFFLINE is set")],
)
def test_what_can_never_be_pushed_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, offline: bool, said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: offline)
    assert cli.main(["train", "--model", "tiny", "--push-to-hub", "org/mine", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"reinforce-ada: hub: {said}")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "check", lambda repo: None)
    with pytest.raises(InputError, match=f"^hub: {tmp_path} has no model with a card; the folder of a finished run"):
        hub.push(tmp_path, "org/mine")
