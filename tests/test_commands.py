"""The commands' flags: every key of the configuration has one, and each command takes those it reads."""

from __future__ import annotations

import re

import pytest

from reinforce_ada import cli, config
from reinforce_ada.commands import flags


def flags_in_help(capsys, command) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))


def test_train_has_a_flag_for_every_key(capsys):
    keys = {f"--{key.replace('_', '-')}" for key in config.section_of()}
    assert flags_in_help(capsys, "train") == keys | {"--help", "--config", "--resume", "--estimate"}


def test_eval_has_the_flags_that_an_evaluation_reads(capsys):
    found = flags_in_help(capsys, "eval")
    assert {"--help", "--config", "--json", "--task", "--reward", "--eval-k", "--temperature", "--max-tokens", "--engine"} <= found
    assert not found & {"--steps", "--learning-rate", "--out", "--prompts-per-step", "--loss"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("report", {"--help", "--html"}),
        ("bench", {"--help", "--case", "--device", "--json", "--quick", "--list"}),
        ("doctor", {"--help", "--check", "--json"}),
    ],
)
def test_the_other_commands_have_their_flags(capsys, command, expected):
    assert flags_in_help(capsys, command) == expected


def test_every_flag_gives_its_key():
    values = {"task_options": "{}"}
    line = [part for key in config.section_of() for part in (f"--{key.replace('_', '-')}", values.get(key, "7"))]
    given = cli._parser().parse_args(["train", *line])
    assert flags.overrides(given) == {key: values.get(key, "7") for key in config.section_of()}
