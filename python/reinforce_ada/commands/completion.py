"""`reinforce-ada completion`: what a shell needs to complete commands, flags, names and paths, by argcomplete."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Literal

from reinforce_ada.commands.flags import Typed, add_command
from reinforce_ada.config import values
from reinforce_ada.errors import needs
from reinforce_ada.outside import show

ASKED = "_ARGCOMPLETE"  # the variable with which the shell asks
_EXAMPLES = """\
examples:
  bash, in ~/.bashrc
    eval "$(reinforce-ada completion bash)"
  zsh, in ~/.zshrc, below compinit
    eval "$(reinforce-ada completion zsh)"
  fish, in ~/.config/fish/config.fish
    reinforce-ada completion fish | source
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Print the code with which a shell completes commands, flags, presets and other names, and paths."
    parser = add_command(commands, "completion", "code for completion in bash, zsh or fish", about, _EXAMPLES)
    parser.add_argument("shell", type=Typed(Literal["bash", "zsh", "fish"]), metavar="SHELL", help="one of bash, zsh, fish")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the code, and return 0."""
    needs("completion", "argcomplete")
    import argcomplete

    show(argcomplete.shellcode(["reinforce-ada"], shell=given.shell), end="")
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell what may follow, and end this process. Names come from the types of the arguments; other arguments take paths."""
    needs("completion", "argcomplete")
    import argcomplete

    files = argcomplete.FilesCompleter()
    for action in _actions(parser):
        if isinstance(action.type, Typed):
            action.completer = partial(_words, action.type.hint, files)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=files)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [own for command in action.choices.values() for own in command._actions]
    return found


def _words(hint: Any, files: Any, prefix: str, **how: Any) -> list[str]:
    """Return the names that a type has, and paths if it takes any text."""
    paths = list(files(prefix=prefix, **how)) if str in values.kinds_of(hint) else []
    return values.choices_of(hint) + paths
