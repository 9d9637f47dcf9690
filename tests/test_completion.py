"""Completion in a real bash: commands, flags, names and paths; and one line where argcomplete is not installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reinforce_ada
from reinforce_ada import cli
from reinforce_ada.commands import completion
from reinforce_ada.outside import is_installed
from reinforce_ada.sampling import PRESETS

needs_argcomplete = pytest.mark.skipif(
    not is_installed("argcomplete"), reason="argcomplete is not installed; the extra completion brings it"
)
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
ADA = {name for name in PRESETS if name.startswith("reinforce-ada-")}

# (what is typed, what is offered)
TYPED = [
    ("reinforce-ada ", {"--help", "--version", *(c.__name__.rpartition(".")[2].replace("evaluate", "eval") for c in cli.COMMANDS)}),
    ("reinforce-ada si", {"simulate "}),
    ("reinforce-ada train --learn", {"--learning-rate "}),
    ("reinforce-ada train --lr", {"--lr-schedule", "--lr-min-fraction"}),
    ("reinforce-ada train --preset reinforce-ada-", ADA),
    ("reinforce-ada train --preset=gr", {"grpo "}),
    ("reinforce-ada train --sleep ", {"true", "false"}),
    ("reinforce-ada train --model t", {"tiny", "two/"}),
    ("reinforce-ada train --config o", {"one.toml "}),
    ("reinforce-ada train --config two/", {"two/three.toml "}),
    ("reinforce-ada train --steps ", set()),
    ("reinforce-ada eval --reward exa", {"exact "}),
    ("reinforce-ada eval tw", {"two/"}),
    ("reinforce-ada explain d", {"dapo "}),
    ("reinforce-ada simulate grpo kn", {"knapsack "}),
    ("reinforce-ada export --dtype f", {"float32 "}),
    ("reinforce-ada report tw", {"two/"}),
    ("reinforce-ada completion ", {"--help", "bash", "zsh", "fish"}),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of configuration, and the command on the path."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "two").mkdir()
    for name in ("one.toml", "two/three.toml"):
        (folder / name).write_text("")
    command = folder / ".bin/reinforce-ada"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m reinforce_ada "$@"\n')
    command.chmod(0o755)
    return folder


def bash(world: Path, script: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(reinforce_ada.__file__).parent.parent)
    environment = {**os.environ, "PATH": f"{world / '.bin'}:{os.environ['PATH']}", "PYTHONPATH": package}
    return subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, cwd=world, env=environment, check=True)


@needs_argcomplete
@needs_bash
def test_bash_completes_commands_flags_names_and_paths(world: Path) -> None:
    """By the code that `completion bash` prints, which bash calls as it does after a tab."""
    asked = [
        f"COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}; COMP_TYPE=9; COMPREPLY=(); _python_argcomplete reinforce-ada; "
        "printf '%s|' \"${COMPREPLY[@]}\"; echo"
        for line, _ in TYPED
    ]
    said = bash(world, "\n".join(['eval "$(reinforce-ada completion bash)"', *asked]))
    assert said.stderr == ""
    offered = {line: set(filter(None, found.split("|"))) for (line, _), found in zip(TYPED, said.stdout.splitlines(), strict=True)}
    assert offered == dict(TYPED)


@needs_argcomplete
@pytest.mark.parametrize(("shell", "marks"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command reinforce-ada")])
def test_each_shell_has_its_code(capsys: pytest.CaptureFixture[str], shell: str, marks: str) -> None:
    assert cli.main(["completion", shell]) == 0
    assert marks in capsys.readouterr().out


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "csh"]) == 2
    assert "argument SHELL: 'csh'; one of bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("asks", [False, True])
def test_without_argcomplete_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asks: bool
) -> None:
    """Also where a shell asks, which does not show it."""
    monkeypatch.setattr("reinforce_ada.errors.is_installed", lambda package: package != "argcomplete")
    if asks:
        monkeypatch.setenv(completion.ASKED, "1")
    assert cli.main(["completion", "bash"]) == 2
    error = 'reinforce-ada: completion: argcomplete is not installed; pip install "reinforce-ada[completion]"\n'
    assert capsys.readouterr().err == error
