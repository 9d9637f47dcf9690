"""The commands' flags: every key of the configuration has one, and each command takes those it reads."""

from __future__ import annotations

import re
import shlex

import pytest

from reinforce_ada import cli, config
from reinforce_ada.commands import flags
from reinforce_ada.config import values


def flags_in_help(capsys, command) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(capsys, command), re.MULTILINE))


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


def text_of(hint) -> str:
    """A text that the type accepts."""
    kind = values.kinds_of(hint)[0]
    limits = values.range_of(kind)
    if limits is not None:
        return str(limits.most)
    return "{}" if values.plain_of(kind) is dict else next(iter(values.choices_of(hint)), "some text")


def test_every_flag_gives_its_key():
    """As the value that a file of the same text would give."""
    hints = {key: hint for _, cls in config.sections() for key, hint in values.hints_of(cls).items()}
    texts = {key: text_of(hint) for key, hint in hints.items()}
    line = [part for key, text in texts.items() for part in (f"--{key.replace('_', '-')}", text)]
    given = flags.overrides(cli._parser().parse_args(["train", *line]))
    assert given == {key: values.converted(text, hints[key]) for key, text in texts.items()}
    assert (given["steps"], given["task_options"], given["stop"], given["sleep"]) == (10**9, {}, ["some text"], True)


# What the help says of a value, by command and flag: its range or choices, and its default, from the declaration alone.
HELP = {
    ("train", "--prompts-per-step N"): "prompts entering each step (from 1 to 1000000; default: 12)",
    ("train", "--learning-rate X"): "AdamW, after warm-up (above 0 and up to 1; default: 1e-05)",
    ("train", "--steps N"): "total number of steps; a resumed run continues to this number ([training]; from 0 to 1000000000; default: 30)",
    ("train", "--group-size N"): "completions kept per prompt (from 1 to 1000000; default: the preset's)",
    (
        "train",
        "--window N|posterior",
    ): "as many as it needs (from 1 to 1000000, or posterior; default: posterior on a GPU, round_size on a CPU)",
    ("train", "--schedule NAME"): "same pools either way (one of stream, rounds; default: stream)",
    ("train", "--loss NAME"): "docs/operators.md (reinforce, ppo, cispo, gspo, sapo, or your own; default: ppo)",
    ("train", "--sleep true|false"): "false is faster if both fit (default: true)",
    ("train", "--out DIR"): "run folder ([run]; default: runs/<model>-<task>-<preset>-seed<seed>)",
    ("eval", "--eval-k N"): "completions per held-out prompt, the k of Avg@k (from 1 to 2048; default: 8)",
    ("explain", "--remembered N"): "earlier completions of each prompt in the memory (from 0 to 256; default: 8)",
    ("simulate", "--slots N"): "sequences decoded together (from 1 to 1000000; default: 256)",
    ("simulate", "--sigma-prompt X"): "spread of log tokens between prompts (from 0 to 10; default: 0.55)",
    ("simulate", "--earlier N"): "completions of earlier steps in the history of each prompt (from 0 to 10000; default: 0)",
    ("serve", "--port N"): "port of the first server (from 1 to 65535; default: 8000)",
    ("serve", "--memory-fraction X"): "cuda: share of the GPU's memory (above 0 and up to 1; default: 0.9)",
    ("study", "--jobs N"): "runs at the same time, which share the CPU's threads (from 1 to 1024; default: 1)",
    ("export", "--dtype NAME"): "(one of auto, bfloat16, float32; default: auto)",
    ("bench", "--device NAME"): "where to run; cpu: on one thread (one of cpu, cuda; default: cpu)",
}


@pytest.mark.parametrize(("command", "flag"), HELP)
def test_the_help_of_a_flag(capsys, command, flag):
    said = " ".join(help_of(capsys, command).split())
    assert re.search(rf" {re.escape(flag)} [^()]*{re.escape(HELP[command, flag])}", said), said


def test_the_help_of_train_begins_with_what_most_runs_set(capsys):
    said = help_of(capsys, "train")
    shown = re.findall(r"^  (--[\w-]+)", said, re.MULTILINE)
    assert shown[:6] == ["--model", "--task", "--reward", "--preset", "--steps", "--out"]
    assert len(shown) == len(set(shown))
    tables = re.findall(r"^\[(\w+)\]:$", said, re.MULTILINE)
    assert tables == [name for name, _ in config.sections()]


def help_of(capsys, *command) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


# -------------------- every page of help


COMMANDS = [command.__name__.rpartition(".")[2].replace("evaluate", "eval") for command in cli.COMMANDS]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["reinforce-ada", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    said = help_of(capsys, *command)
    assert [line for line in said.splitlines() if len(line) > 80] == []
    assert "examples:\n" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_is_a_command_line_that_parses(capsys, monkeypatch, command):
    seen = []
    for module in cli.COMMANDS:
        monkeypatch.setattr(module, "run", lambda given: seen.append(given.command) or 0)
    lines = examples(help_of(capsys, command))
    for line in lines:
        assert cli.main(line) == 0
    assert command in seen
    assert len(seen) == len(lines)


def examples(said: str) -> list[list[str]]:
    """The command lines of ours below "examples:", without what a shell does with their output."""
    text = re.sub(r"\\\n +", "", said.partition("\nexamples:\n")[2])
    shown = re.findall(r"^    (?:reinforce-ada|torchrun .* -m reinforce_ada) (.+)$", text, re.MULTILINE)
    return [shlex.split(re.split(r" [>|] ", line)[0]) for line in shown]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_reinforce_ada_alone_is_a_short_screen(capsys, arguments):
    """What it does, the commands in one line each, and two examples."""
    if arguments:
        said = help_of(capsys)
    else:
        assert cli.main([]) == 0
        said = capsys.readouterr().out
    assert len(said.splitlines()) <= 35
    assert re.findall(r"^  ([a-z]+)  +\S", said, re.MULTILINE) == COMMANDS
    assert len(re.findall(r"^  reinforce-ada ", said, re.MULTILINE)) == 2
