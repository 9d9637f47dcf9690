"""The code that commands share: adding a command to the parser, and one flag for each key of the configuration."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration


def add_command(commands: Any, name: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    """Add a command and return its parser; `about` is its line in the overview, and `epilog` follows its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return parser


def add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Add --config and one flag for each configuration key, or for each of `names`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    add_key_flags(parser, names)


def add_key_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None) -> None:
    """Add one flag for each configuration key, or for each of `names`, grouped by table."""
    for section, cls in configuration.sections():
        fields = [f for f in dataclasses.fields(cls) if names is None or f.name in names]
        group = parser.add_argument_group(f"[{section}]") if fields else parser
        for f in fields:
            default = getattr(cls(), f.name)
            shown = "" if default in (None, "", []) else f" (default: {default})"
            flag = f"--{f.name.replace('_', '-')}"
            group.add_argument(flag, dest=f"key_{f.name}", metavar=_metavar(cls, f.name), help=_escape(f.metadata["about"] + shown))


def _metavar(cls: type, name: str) -> str:
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is list:
        return "TEXT"
    kinds = [a for a in typing.get_args(hint) if a is not type(None)] if typing.get_origin(hint) is not dict else []
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, kinds))
    return "|".join(_kind(kind) for kind in kinds or [hint])


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return {int: "N", float: "X", str: "NAME", bool: "true|false"}.get(hint, "JSON")


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def overrides(given: argparse.Namespace) -> dict[str, str]:
    """Return the configuration keys that were given as flags, with their texts."""
    return {k.removeprefix("key_"): v for k, v in vars(given).items() if k.startswith("key_") and v is not None}


def import_from_here() -> None:
    """Add the current folder to the import path, which an installed command lacks, so that rewards can be imported from it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
