"""The command line: one function a command. Stdlib only until a command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import io
import json
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.errors import EXTRA_OF, EngineLost, InputError, not_installed
from reinforce_ada.outside import finite, one_line, show

_TRAIN_EXAMPLES = """\
examples:
  reinforce-ada train                                      SmolLM2-135M learns one-digit sums (minutes on two cores)
  reinforce-ada train --model tiny --steps 4               the whole way in seconds
  reinforce-ada train --model Qwen/Qwen3-0.6B --task gcd --preset reinforce-ada-pos --max-tokens 64
  reinforce-ada train --task problems.jsonl --reward my_rewards:score
  reinforce-ada train --config run.toml --seed 1           a file, with one key overridden
  reinforce-ada train --resume runs/smollm2-chain_sum-reinforce-ada-balance-seed0
  torchrun --nproc-per-node 2 -m reinforce_ada.cli train   the same run, its gradients computed by two processes

Every key below can stand in the TOML file of --config, in the table its heading names.
"""

_EXPLAIN_EXAMPLES = """\
examples:
  reinforce-ada explain                                    all presets side by side
  reinforce-ada explain reinforce-ada-balance              one of them: its parts in words, its numbers over the pass rate
  reinforce-ada explain reinforce-ada-pos --decide-every 1 --min-pool 4
  reinforce-ada explain reinforce-ada-balance --objective mean --population 1,2 2.5,0.6
  reinforce-ada explain runs/mine --figure curves.png

The numbers are exact, for rewards of 0 and 1: a sum over all states the stopping rule can end in. Their use:
w(p) says which prompts a policy learns from. Mean baseline and fixed size: the same for all. Adaptive rules: hard ones (and with balance
easy ones) count several times as much, so the pass rate is not what they climb. --objective mean makes w(p) = 1.
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

_SIMULATE_EXAMPLES = """\
examples:
  reinforce-ada simulate                                   the published comparison, with the posterior window beside it
  reinforce-ada simulate reinforce-ada-balance:decide_every=1 --window 8 16 posterior posterior:0.2
  reinforce-ada simulate grpo:group_size=16 reinforce-ada-pos --population beta:0.5,2.5 --prompts 1024 --slots 512
  reinforce-ada simulate --fit runs/mine                   engine, lengths and pass rates of a run that has been
  reinforce-ada simulate --population rates.csv --json study.json --figure study.png

A policy is a preset, with overrides after a colon: reinforce-ada-balance:decide_every=1,round_size=4. It runs with every --schedule, and
streams with every --window: a number, adaptive, or posterior, which keeps asking for a prompt while it will need the answer with
probability 0.4 (posterior:0.3: another). Every row meets the same completions; wall-clock is relative to the first row.
"""

_SERVE_EXAMPLES = """\
examples:
  reinforce-ada serve smollm2 --replicas 2                 two servers on ports 8000 and 8001, each with half of the cores
  reinforce-ada serve Qwen/Qwen3-8B --device cuda --replicas 4 --max-model-len 8192
  reinforce-ada serve Qwen/Qwen3-32B --device cuda --tensor-parallel 2 --vllm-args "--quantization fp8"
  ssh -N -L 8000:127.0.0.1:8000 HOST                       where `train` runs: reaches a server on another machine
  reinforce-ada serve MODEL --host 10.0.0.5 --expose       open to a network on which everyone is trusted

The calls that load weights can run code in the server, and vLLM's key does not guard them: whoever reaches the port may use them. So only
this machine is served unless --expose says otherwise. VLLM_API_KEY, set here and where `train` runs, guards the completions.

Then, here or on another machine that sees the same folder of weights:
  reinforce-ada train --engine openai --servers http://127.0.0.1:8000,http://127.0.0.1:8001
A server that dies is started again, and gets the current weights before it samples. Ctrl-C ends them all.
"""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENXIO)
_LONGEST_ARGUMENT = 100_000  # characters


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend print one line and return 2, an engine that is gone for too long 3."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal whose encoding lacks a character gets an escape, not an exception
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    given = parser.parse_args(_readable(parser, sys.argv[1:] if arguments is None else arguments))
    try:
        code = int(given.run(given) or 0)
        sys.stdout.flush()
        return code
    except InputError as e:
        return _fail(f"reinforce-ada: {e}")
    except EngineLost as e:
        _fail(f"reinforce-ada: {e}")
        return 3
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        return _fail(f"reinforce-ada: {not_installed(given.command, package)}")
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing may be flushed into the pipe at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        return _fail(f"reinforce-ada: {_of_the_system(e)}")
    except MemoryError as e:
        return _fail(f"reinforce-ada: {InputError('memory', str(e) or 'there is no more', 'a smaller size of what was asked for')}")
    except KeyboardInterrupt as e:
        goes_on = "; nothing scored is lost, `reinforce-ada train --resume DIR` goes on" if given.run is _train else ""
        _fail(f"reinforce-ada: interrupted{f' {e}' if str(e) else ''}{goes_on}", first="\n")
        return 130


def _readable(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Sequence[str]:
    """The arguments; one that no file name and no text can be ends the program with one line."""
    for argument in arguments:
        try:
            os.fsencode(argument)
        except UnicodeEncodeError:
            parser.error(f"argument {one_line(argument)}: half of a surrogate pair")
        if "\0" in argument:
            parser.error(f"argument {one_line(argument)}: a NUL character")
        if len(argument) > _LONGEST_ARGUMENT:
            parser.error(f"argument {one_line(argument)}: longer than {_LONGEST_ARGUMENT} characters")
    return arguments


def _of_the_system(e: OSError) -> InputError:
    """What the operating system refused, where it says of which file. Raises: the error itself otherwise, which is ours."""
    if e.errno in _DISK_ERRORS:
        return InputError("files", f"cannot write {e.filename or 'to the disk'}: {e.strerror}", "a writable folder with space")
    if e.filename is None:
        raise e
    name = os.fsdecode(e.filename) if isinstance(e.filename, bytes) else e.filename
    return InputError("files", f"cannot use {name}: {e.strerror}", "a file or folder of another name or kind")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reinforce-ada",
        description="Adaptive sampling for LLM reinforcement learning: rollouts go where the learning signal is.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command", parser_class=_Parser)
    _add_train(commands)
    _add_eval(commands)
    _add_explain(commands)
    _add_report(commands)
    _add_simulate(commands)
    _add_serve(commands)
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


def _fail(text: str, *, first: str = "") -> int:
    """Say it on one line, where torchrun has started several of us once; messages quote what was typed, files and servers.

    A RANK without the rest of torchrun's variables silences nobody.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_one_of_several = rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size)
    if not (is_one_of_several and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        print(first + one_line(text, most=4000), file=sys.stderr)
    return 2


def _add_command(commands: Any, name: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return parser


def _add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """--config and one flag per configuration key."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of the keys below")
    _add_key_flags(parser, names)


def _add_key_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None) -> None:
    """One flag per configuration key, grouped by table."""
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
        if not os.path.isfile(saved):
            raise InputError("train", f"{given.resume} holds no run", "a folder that `reinforce-ada train` wrote")
        config = configuration.load_saved(saved, overrides)
    _import_from_here()
    from reinforce_ada.training import launch

    launch.train(config, given.resume)
    return 0


# -------------------- eval


# What an evaluation does not read of the tables about model, task and engine, and what it reads of others.
_NOT_OF_EVAL = {"model", "eval_every"}
_OF_EVAL = {"temperature", "max_tokens", "stop", "positive_threshold", "preset", "seed", "data_seed"}


def _add_eval(commands: Any) -> None:
    parser = _add_command(commands, "eval", "Avg@k with its standard error and unbiased pass@k of a model on held-out prompts.")
    parser.add_argument("model", metavar="MODEL", help="smollm2, a model folder (such as RUN/model) or a hub id")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    homes = configuration.section_of()
    whole = {key for key, section in homes.items() if section in ("model", "task", "engine")}
    _add_config_flags(parser, [key for key in homes if key in whole - _NOT_OF_EVAL | _OF_EVAL])
    parser.set_defaults(run=_eval)


def _eval(given: argparse.Namespace) -> int:
    beside = Path(given.model).parent / "config.toml"
    if given.config is None and Path(given.model).is_dir() and beside.is_file():
        show(f"task and engine as in {beside}", file=sys.stderr)
        given.config = beside
    load = configuration.load_saved if given.config == beside else configuration.load
    config = load(given.config, _overrides(given))
    _import_from_here()
    with _prints_aside() if given.json else nullcontext():
        from reinforce_ada.training import launch

        e = launch.evaluate_model(config, given.model)
    if given.json:
        show(json.dumps(finite({**e.record(), "model": given.model}), allow_nan=False))
        return 0
    show(f"Avg@{e.k} {e.avg_at_k:.4f} ± {e.stderr:.4f} (standard error over {len(e.per_prompt)} prompts)")
    show("   ".join(f"pass@{k} {value:.4f}" for k, value in e.pass_at_k.items()))
    if e.num_voids:
        show(f"{e.num_voids} completions could not be scored and are left out")
    return 0


@contextmanager
def _prints_aside() -> Iterator[None]:
    """Whatever libraries, rewards and their processes print meanwhile goes to standard error: the output is the result alone."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


# -------------------- explain


def _add_explain(commands: Any) -> None:
    about = "What a sampling policy does: its parts in words, what it costs, and the objective it climbs, in exact numbers."
    parser = _add_command(commands, "explain", about, _EXPLAIN_EXAMPLES)
    parser.add_argument(
        "what", nargs="?", metavar="PRESET|CONFIG.toml|RUN", help="a preset, a configuration file or a run folder (default: every preset)"
    )
    parser.add_argument("--population", nargs="+", default=[], metavar="A,B", help="prompts with Beta(A, B) pass rates (default: three)")
    parser.add_argument("--class-weights", metavar="W,C", help="factors of the advantages of wrong and of correct completions")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, one object a policy, unrounded")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw w(p), f(p), E[N] and P(signal) into this PNG")
    _add_key_flags(parser, configuration.POLICY_KEYS)
    parser.set_defaults(run=_explain)


def _explain(given: argparse.Namespace) -> int:
    from reinforce_ada.explain import command

    return command.run(
        given.what, _overrides(given), class_weights=given.class_weights, populations=given.population, as_json=given.json,
        figure=given.figure,
    )  # fmt: skip


# -------------------- report, bench, doctor


def _add_report(commands: Any) -> None:
    parser = _add_command(commands, "report", "Redraw the figure of a run and export its rollouts to Parquet.")
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="a folder that `reinforce-ada train` wrote")
    parser.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> int:
    from reinforce_ada import report

    for path in report.report(given.run_dir):
        show(str(path))
    for name, value in report.summary_table(given.run_dir):
        show(f"{name:<28} {value}")
    return 0


# What the models of the simulator are called on the command line; defaults are those of EngineModel and LengthModel.
_ENGINE_FLAGS = (
    ("slots", "slots", int, "N", "sequences decoded together (default: 256)"),
    ("engine-step-ms", "step_ms", float, "MS", "a decode step takes this (default: 8)"),
    ("engine-busy-ms", "busy_ms", float, "MS", "and this for each sequence in it (default: 0.03)"),
    ("engine-prefill-ms", "prefill_ms", float, "MS", "and this for each prompt token of a request that starts (default: 0)"),
    ("prompt-tokens", "prompt_tokens", int, "N", "tokens of a prompt (default: 0)"),
    ("engine-sync-ms", "sync_ms", float, "MS", "weight synchronisation, once (default: 0)"),
)
_LENGTH_FLAGS = (
    ("median-correct", "median_correct", float, "N", "tokens of a correct answer, median (default: 430)"),
    ("median-wrong", "median_wrong", float, "N", "tokens of a wrong answer, median (default: 709)"),
    ("sigma", "sigma", float, "X", "spread of log tokens within a prompt (default: 0.8)"),
    ("sigma-prompt", "sigma_prompt", float, "X", "spread of log tokens between prompts (default: 0.55)"),
    ("max-tokens", "max_tokens", int, "N", "longest answer (default: 4096)"),
)


def _add_simulate(commands: Any) -> None:
    about = "Compare policies, schedules and windows on a virtual clock: wall-clock, tokens, waste and signal before paying for them."
    parser = _add_command(commands, "simulate", about, _SIMULATE_EXAMPLES)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="presets (default: the published comparison)")
    parser.add_argument("--schedule", nargs="+", choices=("rounds", "stream"), default=[], help="of each policy (default: both)")
    parser.add_argument("--window", nargs="+", metavar="W", default=[], help="of streams: N, adaptive, posterior (default: posterior)")
    shown = "pass rates: beta:A,B, a file (one a line, or JSON), a run folder or its store (default: beta:1,2)"
    parser.add_argument("--population", nargs="+", metavar="P", default=[], help=shown)
    parser.add_argument("--prompts", type=int, metavar="N", help="prompts (default: 64, or those of the file)")
    parser.add_argument("--seeds", type=int, default=8, metavar="K", help="repetitions (default: 8)")
    shown = "completions of earlier steps that are known of each prompt (default: 0)"
    parser.add_argument("--earlier", type=int, default=0, metavar="N", help=shown)
    shown = "ask the sampler only when this share of the slots has ended; for 100 000 prompts and more (default: 0, at every end)"
    parser.add_argument("--poll-fraction", type=float, default=0.0, metavar="X", help=shown)
    parser.add_argument("--fit", type=Path, metavar="RUN", help="take engine, lengths and pass rates from a run folder or its store")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="write wall-clock against waste, and busy slots over time")
    for title, flags in (("engine", _ENGINE_FLAGS), ("lengths", _LENGTH_FLAGS)):
        group = parser.add_argument_group(title)
        for flag, name, kind, metavar, text in flags:
            group.add_argument(f"--{flag}", dest=name, type=kind, metavar=metavar, help=text)
    parser.set_defaults(run=_simulate)


def _simulate(given: argparse.Namespace) -> int:
    from reinforce_ada.simulate import command

    engine, lengths = (
        {name: value for _, name, *_ in flags if (value := getattr(given, name)) is not None} for flags in (_ENGINE_FLAGS, _LENGTH_FLAGS)
    )
    command.run(
        given.policies, given.schedule, given.window, given.population, num_prompts=given.prompts, num_seeds=given.seeds,
        num_earlier=given.earlier, poll_fraction=given.poll_fraction, engine=engine, lengths=lengths, fit=given.fit, json_to=given.json,
        figure_to=given.figure,
    )  # fmt: skip
    return 0


def _add_serve(commands: Any) -> None:
    about = "Start vLLM servers on this machine for --engine openai, and start again what dies."
    parser = _add_command(commands, "serve", about, _SERVE_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="smollm2, a model folder or a hub id; what is trained starts from the same")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="servers, on consecutive ports (default: 1)")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--expose", action="store_true", help="allow a --host that other machines reach; they can run code here")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port of the first (default: 8000)")
    shown = "of the weights; auto: bfloat16 where the device computes in it, else float32 (default: auto)"
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=shown)
    parser.add_argument("--max-model-len", type=int, default=512, metavar="N", help="longest prompt + completion in tokens (default: 512)")
    parser.add_argument("--max-num-seqs", type=int, default=128, metavar="N", help="requests at once, of each (default: 128)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: consecutive GPUs for each (default: cpu)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="cuda: GPUs of one server (default: 1)")
    parser.add_argument("--memory-fraction", type=float, default=0.9, metavar="X", help="cuda: share of the GPU's memory (default: 0.9)")
    parser.add_argument("--kv-cache-mb", type=int, default=512, metavar="N", help="cpu: key-value cache of each (default: 512)")
    parser.add_argument("--logs", type=Path, default=Path("serve-logs"), metavar="DIR", help="what the servers print (default: serve-logs)")
    parser.add_argument("--vllm-args", default="", metavar="TEXT", help="further arguments for vLLM's server")
    parser.set_defaults(run=_serve)


def _serve(given: argparse.Namespace) -> int:
    from reinforce_ada.engines import serve

    settings = {k: v for k, v in vars(given).items() if k in {f.name for f in dataclasses.fields(serve.Serving)}}
    settings["extra"] = serve.split_arguments(given.vllm_args)
    serve.check(serve.Serving(**settings))
    if given.model == "smollm2":
        from reinforce_ada.training import launch

        settings["model"] = launch.model_path(given.model)
    serve.serve(serve.Serving(**settings), show)
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
