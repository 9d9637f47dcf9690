"""The command line: its parser and its errors. Only the standard library is imported until a command runs, so --help answers at once."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import typing
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import reinforce_ada
from reinforce_ada import heartbeat
from reinforce_ada.commands import bench, completion, doctor, evaluate, explain, export, push, report, serve, simulate, study, train
from reinforce_ada.commands.flags import HelpFormatter, flag_of
from reinforce_ada.config import OTHER_NAMES
from reinforce_ada.errors import EXTRA_OF, EngineLost, InputError, did_you_mean, not_installed
from reinforce_ada.outside import log_on_stderr, one_line, show

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENXIO)
_PROGRESS_ON_STDOUT = ("train", "study")  # the output of the others is a result
_LONGEST_ARGUMENT = 100_000  # characters
_ABOUT = """\
Adaptive sampling for reinforcement learning of language models: a prompt gets
completions until its pool holds right and wrong answers, or a cap is reached,
and a small balanced group of them is trained on."""
_EXAMPLES = """\
examples:
  reinforce-ada train --model tiny --steps 4      a complete run, in seconds
  reinforce-ada train --task problems.jsonl       your own questions

`reinforce-ada COMMAND --help` has the flags of a command, and examples.
"""
COMMANDS = (doctor, train, evaluate, report, explain, simulate, study, export, push, serve, bench, completion)
_GOES_ON = {
    "train": "; nothing scored is lost, `reinforce-ada train --resume DIR` goes on",
    "study": "; nothing is lost, the same command goes on",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend print one line and return 2, an engine that is gone for too long 3."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal whose encoding lacks a character gets an escape, not an exception
            stream.reconfigure(errors="backslashreplace")
    command = ""
    try:
        parser = _parser()
        if completion.ASKED in os.environ:
            completion.answer(parser)
        given = parser.parse_args(_readable(parser, sys.argv[1:] if arguments is None else arguments))
        command = given.command
        with log_on_stderr(), _heartbeat(command):
            code = int(given.run(given) or 0)
        sys.stdout.flush()
        return code
    except _UsageError as e:
        return _fail(str(e))
    except InputError as e:
        return _fail(f"reinforce-ada: {e}")
    except EngineLost as e:
        _fail(f"reinforce-ada: {e}")
        return 3
    except ModuleNotFoundError as e:
        package = _missing_package(e)
        if package is None:
            raise
        return _fail(f"reinforce-ada: {not_installed(command, package)}")
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing may be flushed into the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        return _fail(f"reinforce-ada: {_of_the_system(e)}")
    except MemoryError as e:
        return _fail(f"reinforce-ada: {InputError('memory', str(e) or 'there is no more', 'a smaller size of what was asked for')}")
    except KeyboardInterrupt as e:
        _fail(f"reinforce-ada: interrupted{f' {e}' if str(e) else ''}{_GOES_ON.get(command, '')}", first="\n")
        return 130


def _heartbeat(command: str) -> AbstractContextManager[None]:
    """Return what tells every 30 s that a command is still there, on the stream of its progress if that is no terminal."""
    stream = sys.stdout if command in _PROGRESS_ON_STDOUT else sys.stderr
    if command == "serve" or stream.isatty() or _is_another_rank():
        return nullcontext()
    return heartbeat.beating(lambda text: show(f"reinforce-ada {command}: {text}", file=stream))


def _missing_package(e: BaseException | None) -> str | None:
    """Return the package of an extra that this error, or what caused it, lacks: transformers imports lazily and wraps such errors."""
    while e is not None:
        package = (getattr(e, "name", None) or "").partition(".")[0]
        if isinstance(e, ModuleNotFoundError) and package in EXTRA_OF:
            return package
        e = e.__cause__
    return None


def _readable(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments; one that no file name and no text can be ends the program with one line."""
    for argument in arguments:
        try:
            os.fsencode(argument)
        except UnicodeEncodeError:
            parser.error(f"argument {one_line(argument)}: half of a surrogate pair")
        if "\0" in argument:
            parser.error(f"argument {one_line(argument)}: a NUL character")
        if len(argument) > _LONGEST_ARGUMENT:
            parser.error(f"argument {one_line(argument)}: longer than {_LONGEST_ARGUMENT} characters")
    if arguments and arguments[0].startswith("-") and arguments[0] not in parser._option_string_actions:
        parser.error(f"unknown flag {arguments[0]!r}; a command comes first, such as train")
    return arguments


def _of_the_system(e: OSError) -> InputError:
    """Return what the operating system refused, where it says of which file. Raises: the error itself otherwise, which is ours."""
    if e.errno in _DISK_ERRORS:
        return InputError("files", f"cannot write {e.filename or 'to the disk'}: {e.strerror}", "a writable folder with space")
    if e.filename is None:
        raise e
    name = os.fsdecode(e.filename) if isinstance(e.filename, bytes) else e.filename
    return InputError("files", f"cannot use {name}: {e.strerror}", "a file or folder of another name or kind")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reinforce-ada", usage="reinforce-ada COMMAND ...", description=_ABOUT, epilog=_EXAMPLES, add_help=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    title = "commands, in the order in which you may need them"
    commands = parser.add_subparsers(title=title, prog="reinforce-ada", metavar="COMMAND", dest="command", parser_class=_Parser)
    for command in COMMANDS:
        command.add(commands)
    options = parser.add_argument_group("options")
    options.add_argument("-h", "--help", action="help", help="show this help message and exit")
    options.add_argument("--version", action=_Version, help="print the version and exit")
    parser.set_defaults(run=lambda given: parser.print_help())
    return parser


class _UsageError(Exception):
    """Arguments that cannot be parsed; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """argparse with our one-line errors; an unknown flag is answered by the command it was given to, with the nearest one it has."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest[0].split("=")[0]))
        return found, rest

    def error(self, message: str) -> typing.NoReturn:
        raise _UsageError(f"{self.prog}: {message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> typing.NoReturn:
        sys.stdout.flush()  # the help; a reader that has seen enough is no error of ours
        super().exit(status, message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            nearest = did_you_mean(value, [*action.choices, *self._option_string_actions])
            self.error(f"unknown command {value!r}; known: {', '.join(action.choices)}{f'; {nearest}' if nearest else ''}")
        super()._check_value(action, value)

    def _unknown(self, argument: str) -> str:
        """Return what is wrong with an argument, and what may be meant: a file for --config, another trainer's flag, or the nearest."""
        flags = self._option_string_actions
        if not argument.startswith("-"):
            is_config = argument.endswith(".toml") and "--config" in flags
            return f"unexpected argument {argument!r}" + (f"; did you mean '--config {argument}'?" if is_config else "")
        meant = flag_of(OTHER_NAMES.get(argument.lstrip("-").replace("-", "_"), ""))
        nearest = f"did you mean {meant!r}?" if meant in flags else did_you_mean(argument, flags, likeness=0.7)
        return f"unknown flag {argument!r}" + (f"; {nearest}" if nearest else "")


class _Version(argparse.Action):
    """Print the version; it is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"reinforce-ada {reinforce_ada.__version__}")
        parser.exit()


def _fail(text: str, *, first: str = "") -> int:
    """Print it on one line, once where torchrun has started several of us, and return 2; messages quote what was typed and servers."""
    if not _is_another_rank():
        print(first + one_line(text, most=4000), file=sys.stderr)
    return 2


def _is_another_rank() -> bool:
    """Return whether another process speaks for this one. A RANK without the rest of torchrun's variables silences nobody."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_one_of_several = rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size)
    return is_one_of_several and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


if __name__ == "__main__":
    sys.exit(main())
