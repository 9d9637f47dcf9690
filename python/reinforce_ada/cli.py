"""The command line: train, eval, report, bench, doctor. Stdlib only until a command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError

_TRAIN_EXAMPLES = """\
examples:
  reinforce-ada train                                      SmolLM2-135M learns one-digit sums (minutes on two cores)
  reinforce-ada train --model tiny --steps 4               the whole way in seconds
  reinforce-ada train --model Qwen/Qwen3-0.6B --task gcd --preset reinforce-ada-pos --max-tokens 64
  reinforce-ada train --task problems.jsonl --reward my_rewards:score
  reinforce-ada train --config run.toml --seed 1           a file, with one key overridden
  reinforce-ada train --resume runs/smollm2-chain_sum-reinforce-ada-balance-seed0

Every key below can stand in the TOML file of --config, in the table its heading names.
"""

_BENCH_EXAMPLES = """\
examples:
  reinforce-ada bench --quick                              a first look at small shapes, in a minute
  reinforce-ada bench                                      everything, about 25 minutes on one core
  reinforce-ada bench policy_loss group_advantages --json mine.json
  reinforce-ada bench token_logprobs --case forward/bf16
  reinforce-ada bench --device cuda --json gpu.json        the same on a GPU

Every case is checked before it is timed. Leave the machine alone meanwhile: neighbours cost memory bandwidth.
"""


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend print one line and return 2."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        code = int(given.run(given) or 0)
        sys.stdout.flush()
        return code
    except InputError as e:
        print(f"reinforce-ada: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing may be flushed into the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno not in _DISK_ERRORS:
            raise
        print(f"reinforce-ada: cannot write {e.filename or 'to the disk'}: {e.strerror}; a writable folder with space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; nothing scored is lost, `reinforce-ada train --resume DIR` goes on" if given.run is _train else ""
        print(f"\nreinforce-ada: interrupted{goes_on}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reinforce-ada",
        description="Adaptive sampling for LLM reinforcement learning: rollouts go where the learning signal is.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_train(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse with our one-line errors; an unknown flag is answered by the command it was given to, with the nearest one it has."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest[0].split("=")[0]))
        return found, rest

    def error(self, message: str) -> typing.NoReturn:
        sys.exit(_fail(f"{self.prog}: {message}; see {self.prog} --help"))

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        nearest = difflib.get_close_matches(argument, self._option_string_actions, n=1, cutoff=0.7)
        return f"unknown flag {argument!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def _add_command(commands: Any, name: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return parser


def _add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """One flag per configuration key, grouped by table."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    for section, cls in configuration.sections():
        group = parser.add_argument_group(f"[{section}]")
        for f in dataclasses.fields(cls):
            if names is not None and f.name not in names:
                continue
            default = f.default if f.default is not dataclasses.MISSING else "{}"
            shown = "" if default in (None, "") else f" (default: {default})"
            flag = f"--{f.name.replace('_', '-')}"
            group.add_argument(flag, dest=f"key_{f.name}", metavar=_metavar(cls, f.name), help=_escape(f.metadata["about"] + shown))


def _metavar(cls: type, name: str) -> str:
    hint = typing.get_type_hints(cls)[name]
    kinds = [a for a in typing.get_args(hint) if a is not type(None)] if typing.get_origin(hint) is not dict else []
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, kinds))
    if kinds and typing.get_origin(kinds[0]) is typing.Literal:
        return "|".join(map(str, typing.get_args(kinds[0])))
    kind = kinds[0] if kinds else hint
    return {int: "N", float: "X", str: "NAME"}.get(kind, "JSON")


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _overrides(given: argparse.Namespace) -> dict[str, str]:
    return {k.removeprefix("key_"): v for k, v in vars(given).items() if k.startswith("key_") and v is not None}


def _import_from_here() -> None:
    """The folder the command runs in may hold the module of a reward; the installed command's path has only its own."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# -------------------- train


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", "Train a model by adaptive sampling.", _TRAIN_EXAMPLES)
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR; its configuration holds")
    _add_config_flags(parser)
    parser.set_defaults(run=_train)


def _train(given: argparse.Namespace) -> int:
    overrides = _overrides(given)
    if given.resume is None:
        config = configuration.load(given.config, overrides)
    else:
        if given.config is not None:
            raise InputError("train", "--resume and --config", "one of them: a resumed run keeps its configuration")
        saved = given.resume / "config.toml"
        if not saved.is_file():
            raise InputError("train", f"{given.resume} holds no run", "a folder that `reinforce-ada train` wrote")
        config = configuration.load(saved, overrides)
    _import_from_here()
    from reinforce_ada.training import launch

    launch.train(config, given.resume)
    return 0


# -------------------- eval


def _add_eval(commands: Any) -> None:
    parser = _add_command(commands, "eval", "Avg@k with its standard error and unbiased pass@k of a model on held-out prompts.")
    parser.add_argument("model", metavar="MODEL", help="smollm2, a model folder (such as RUN/model) or a hub id")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    skipped = ("model", "eval_every", "prompts_per_step", "out")
    names = [k for k, s in configuration.section_of().items() if s in ("model", "task", "engine") and k not in skipped]
    _add_config_flags(parser, [*names, "temperature", "max_tokens", "positive_threshold", "preset", "seed"])
    parser.set_defaults(run=_eval)


def _eval(given: argparse.Namespace) -> int:
    beside = Path(given.model).parent / "config.toml"
    if given.config is None and Path(given.model).is_dir() and beside.is_file():
        print(f"task and engine as in {beside}", file=sys.stderr)
        given.config = beside
    config = configuration.load(given.config, _overrides(given))
    _import_from_here()
    from reinforce_ada.training import launch

    e = launch.evaluate_model(config, given.model)
    if given.json:
        print(json.dumps({**e.record(), "model": given.model}))
        return 0
    print(f"Avg@{e.k} {e.avg_at_k:.4f} ± {e.stderr:.4f} (standard error over {len(e.per_prompt)} prompts)")
    print("   ".join(f"pass@{k} {value:.4f}" for k, value in e.pass_at_k.items()))
    if e.num_voids:
        print(f"{e.num_voids} completions could not be scored and are left out")
    return 0


# -------------------- report, bench, doctor


def _add_report(commands: Any) -> None:
    parser = _add_command(commands, "report", "Redraw the figure of a run and export its rollouts to Parquet.")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a folder that `reinforce-ada train` wrote")
    parser.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> int:
    from reinforce_ada import report

    for path in report.report(given.run_dir):
        print(path)
    for name, value in report.summary_table(given.run_dir):
        print(f"{name:<28} {value}")
    return 0


def _add_bench(commands: Any) -> None:
    about = "Time the operators against PyTorch and other libraries, results checked first; write JSON and a figure."
    parser = _add_command(commands, "bench", about, _BENCH_EXAMPLES)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators, such as policy_loss (default: all five)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in their names")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu, one thread)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="the results (default: bench.json)")
    parser.add_argument("--quick", action="store_true", help="fewer cases at smaller shapes")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.set_defaults(run=_bench)


def _bench(given: argparse.Namespace) -> int:
    from reinforce_ada.bench import command

    if given.list:
        command.listing(given.ops, given.case, given.quick)
        return 0
    return command.run(given.ops, given.case, device=given.device, quick=given.quick, to=given.json)


def _add_doctor(commands: Any) -> None:
    about = "Which operators, engines and packages work here, and why not where they do not."
    parser = _add_command(commands, "doctor", about)
    parser.add_argument("--check", action="store_true", help="run every usable form of every operator against the reference")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.set_defaults(run=_doctor)


def _doctor(given: argparse.Namespace) -> int:
    from reinforce_ada import doctor

    return doctor.main(check=given.check, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
