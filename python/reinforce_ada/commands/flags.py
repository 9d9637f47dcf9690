"""The code that commands share: adding a command to the parser, and flags whose values have a declared type."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.config import values

_WIDTH = 79  # of what argparse does not wrap to the terminal


def add_command(commands: Any, name: str, short: str, about: str, epilog: str, **settings: Any) -> argparse.ArgumentParser:
    """Add a command and return its parser: `short` is its line in the overview, `about` stands above its flags and `epilog` below them."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=textwrap.fill(about, _WIDTH), epilog=epilog, allow_abbrev=False,
        formatter_class=HelpFormatter, **settings,
    )  # fmt: skip
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help whose description and epilog are printed as they are, and whose lines break at spaces alone: names hold hyphens."""

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):  # the commands without a line for COMMAND itself
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


@dataclass(frozen=True, slots=True)
class Typed:
    """The `type` of an argument for argparse: converts a text to a type that `config.values` knows."""

    hint: Any

    def __call__(self, text: str) -> Any:
        try:
            return values.converted(text, self.hint)
        except ValueError as e:
            nearest = values.nearest_choice(text, self.hint)
            raise argparse.ArgumentTypeError(f"{values.shown(text)}; {e}{f'; {nearest}' if nearest else ''}") from None


def add_typed(target: Any, flag: str, hint: Any, about: str, *, shown: Any = None, note: str = "", **settings: Any) -> None:
    """Add a flag to a parser or a group; its range or choices and its default follow `about` in the help.

    Args:
        shown: the default in the help, where it is not argparse's own: words, or a value.
        note: words before them.
        settings: what else argparse takes, such as default, dest, nargs and metavar.
    """
    default = settings.get("default") if shown is None else shown
    notes = [note, values.allowed(hint), "" if default in (None, "", [], {}) else f"default: {_plain(default)}"]
    behind = "; ".join(filter(None, notes))
    text = about + (f" ({behind})" if behind else "")
    target.add_argument(flag, type=Typed(hint), help=text.replace("%", "%%"), **{"metavar": _metavar(hint), **settings})


def add_field(target: Any, cls: type, name: str, *, flag: str = "", **settings: Any) -> None:
    """Add the flag of a field that `values.option` declares; without the flag its value is None."""
    f = next(f for f in dataclasses.fields(cls) if f.name == name)
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    own = {"metavar": f.metadata["metavar"]} if f.metadata["metavar"] else {}
    settings = {"shown": f.metadata["unset"] or default, **own, **settings}
    add_typed(target, flag or flag_of(name), values.hints_of(cls)[name], f.metadata["about"], **settings)


def flag_of(key: str) -> str:
    """Return the flag of a key: "--group-size"."""
    return f"--{key.replace('_', '-')}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(hint: Any) -> str:
    plain = values.plain_of(values.kinds_of(hint)[0])
    name = {int: "N", float: "X", bool: "true|false", list: "TEXT", dict: "JSON"}.get(plain, "NAME")
    return "|".join([name, *(values.choices_of(hint) if plain is int else [])])


# -------------------- keys of the configuration


def add_config_flag(target: Any) -> None:
    """Add --config."""
    target.add_argument("--config", type=Path, metavar="FILE", help="TOML file that sets keys; flags win over it")


def add_key_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add one flag for each configuration key, or for each of `names`, grouped by table."""
    for section, cls in configuration.sections():
        chosen = [f.name for f in dataclasses.fields(cls) if names is None or f.name in names]
        group = parser.add_argument_group(f"[{section}]", cls.__doc__) if chosen else parser
        for name in chosen:
            add_key_flag(group, name)


def add_key_flag(target: Any, key: str, **settings: Any) -> None:
    """Add the flag of one configuration key."""
    add_field(target, dict(configuration.sections())[configuration.section_of()[key]], key, dest=f"key_{key}", **settings)


def overrides(given: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration keys that were given as flags, with their values."""
    return {k.removeprefix("key_"): v for k, v in vars(given).items() if k.startswith("key_") and v is not None}


def import_from_here() -> None:
    """Add the current folder to the import path, which an installed command lacks, so that rewards can be imported from it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
