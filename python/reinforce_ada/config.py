"""One typed configuration: defaults < TOML file < command-line flags. Every key is also a flag of `reinforce-ada train`.

It needs the standard library alone, so that `--help` stays fast and a base install reads every configuration.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.outside import GarbageError, is_utf8, one_line, parse_json, read_text, server_url, without_credentials

_MOST_BYTES = 1 << 20  # of a configuration file
_DEEPEST = 16  # tables in tables of task_options


def option(default: Any, about: str) -> Any:
    """Declare a configuration key: its default and the line that `--help` prints."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy to train, its dtype and its device."""

    model: str = option("smollm2", "smollm2 | tiny | a folder or hub id of any Hugging Face causal LM")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "dtype of the weights; bfloat16 keeps an fp32 master copy; auto: bfloat16 where the device computes in it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device of the trainer; auto: cuda if available")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """The questions, and how answers are scored."""

    task: str = option("chain_sum", "a reasoning-gym dataset, or a file of {prompt, answer, ...} records: JSONL, JSON, CSV, Parquet")
    task_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"about": 'generator settings as TOML or JSON, e.g. {"max_terms": 3}; chain_sum: one digit, two terms'},
    )
    reward: str = option("", 'module:function or file.py:function taking (prompt, completion) -> float; "" takes the task\'s own')
    system_prompt: str = option("Reply with one number and nothing else.", 'system message; "" for none')
    template: Literal["chat", "plain"] = option("chat", "render prompts by the tokenizer's chat template, or as plain lines")
    num_examples: int = option(1, "worked examples shown before each question (from the same generator)")
    eval_prompts: int = option(64, "held-out prompts; never trained on")
    eval_k: int = option(8, "completions per held-out prompt (the k of Avg@k)")
    eval_every: int = option(0, "steps between evaluations; 0 evaluates before and after only")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the rollout budget is spent."""

    preset: str = option(
        "reinforce-ada-balance", "grpo | dapo | pods | knapsack | reinforce-ada-{pos,balance,est,exact,memory}; docs/policies.md"
    )
    schedule: Literal["stream", "rounds"] = option("stream", "stream has no barrier between rounds; same pools either way")
    prompts_per_step: int = option(12, "prompts entering each step")
    group_size: int | None = option(None, "completions kept per prompt (default: the preset's)")
    round_size: int | None = option(None, "completions requested together (default: the preset's)")
    max_rounds: int | None = option(None, "rounds at most; the cap is round_size x max_rounds (default: the preset's)")
    decide_every: int | None = option(None, "committed completions between two evaluations of the exit rule (default: the preset's)")
    min_pool: int | None = option(None, "no exit before this many scored completions (default: the preset's)")
    positive_threshold: float | None = option(None, "a completion is correct when its reward exceeds this (default: the preset's)")
    mean_budget: int | None = option(None, "reinforce-ada-est, knapsack: completions per prompt on average (default: the preset's)")
    num_completions: int | None = option(None, "pods: completions per prompt, of which group_size are kept (default: the preset's)")
    baseline: Literal["pool", "group", "leave-one-out", "memory", "predicted"] | None = option(
        None,
        "mean that a reward is compared with; memory: posterior mean of the prompt's pass rate; predicted: the same, with a prior from the "
        "model's own state at the prompt's end (default: the preset's)",
    )
    scale: Literal["none", "pool", "group", "batch"] | None = option(
        None, "rewards whose standard deviation divides the advantages (default: the preset's)"
    )
    degenerate: Literal["keep", "drop"] | None = option(None, "groups without signal: keep or drop (default: the preset's)")
    objective: Literal["as-published", "mean", "log", "power"] | None = option(
        None, "objective of the expected gradient: mean, log or power of the pass rate, or as published (default: the preset's)"
    )
    alpha: float | None = option(None, "exponent of objective power (default: 1, which is mean)")
    propose: Literal["nearest-rate", "skip-streaks"] | None = option(None, "choose prompts by their earlier pools (default: take all)")
    memory_decay: float = option(0.99, "factor by which the memory of a prompt's pools fades per step; 1 keeps everything")
    memory_from: str = option("", "run folder whose pools initialize the memory; prompts are matched by question and answer")
    window: int | Literal["posterior"] | None = option(
        None,
        "stream: most requests ahead of a prompt; posterior: as many as it needs (default: posterior on a GPU, round_size on a CPU)",
    )
    temperature: float = option(1.0, "sampling temperature; logprobs are taken at the same one")
    max_tokens: int = option(12, "tokens per completion at most")
    stop: list[str] = field(
        default_factory=list,
        metadata={"about": 'stop string that ends a completion; a TOML or JSON list for several: ["</answer>", "\\n\\n"]'},
    )


# The keys that make the policy, besides the name of its preset. Keys that are not set keep the preset's values.
POLICY_KEYS = (
    "group_size", "round_size", "max_rounds", "decide_every", "min_pool", "positive_threshold", "mean_budget", "num_completions",
    "baseline", "scale", "degenerate", "objective", "alpha", "propose",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine that generates, and the workers that score."""

    engine: Literal["auto", "vllm", "transformers", "openai", "ray"] = option(
        "auto", "auto: vllm if installed, else transformers; openai: the servers of --servers; ray: vLLM in --replicas actors"
    )
    servers: str = option("", "openai: comma-separated URLs of the servers, which `reinforce-ada serve` starts")
    weights_dir: str = option("", "folder for new weights, which every server or actor reads (default: weights in the run folder)")
    replicas: int = option(1, "ray: number of actors; an actor without a node that has room waits for one")
    ray_address: str = option("", 'ray: address of a cluster; "auto": the cluster of this node (default: starts Ray on this machine)')
    cpus_per_replica: int = option(1, "ray: CPU cores of each actor")
    tensor_parallel: int = option(1, "ray on cuda: GPUs of each actor")
    hung_after_s: float = option(60.0, "openai, ray: a replica without an answer for this long counts as dead; its requests go to others")
    give_up_s: float = option(600.0, "openai, ray: the run stops, and can be resumed, after this long without any replica")
    max_num_seqs: int = option(128, "concurrent requests in the engine, or in each replica")
    max_model_len: int = option(512, "longest prompt + completion in tokens")
    memory_fraction: float = option(0.45, "cuda: share of the GPU for vLLM; the trainer has the rest")
    sleep: bool = option(True, "cuda: vLLM in this process frees its memory while the model trains; false is faster if both fit")
    request_timeout_s: float = option(
        0.0, "reissue a request after this time without an answer; 0: never (engines in this process lose none)"
    )
    reward_workers: int = option(1, "processes that score completions")
    reward_timeout_s: float = option(
        10.0, "limit of a scoring call, tenfold for a worker's first; afterwards the worker is replaced and the call retried"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the kept completions become a gradient."""

    steps: int = option(30, "total number of steps; a resumed run continues to this number")
    budget: str = option("", 'end after the step in which this is spent, such as "20000 generated completions"; steps stays the limit')
    learning_rate: float = option(1e-5, "AdamW, after warm-up")
    warmup_steps: int = option(2, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW")
    max_grad_norm: float = option(1.0, "gradient clipping by global norm")
    minibatches: int = option(1, "optimizer updates per step; above 1, ratios use logprobs that are recomputed before the first update")
    tokens_per_pass: int = option(2048, "padded tokens per forward; larger minibatches accumulate gradients")
    loss: str = option("ppo", "policy loss: reinforce, ppo, cispo, gspo or sapo, or your own as module:function or file.py:function")
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] | None = option(
        None, "aggregation of the token losses (default: token-mean; seq-mean-token-sum-norm with an objective, which needs it)"
    )
    clip_low: float = option(0.2, "ppo, gspo, cispo: ratio clipped below 1 - clip_low")
    clip_high: float = option(0.28, "ppo, gspo, cispo: ratio clipped above 1 + clip_high")
    entropy_coef: float = option(0.0, "entropy bonus")
    rollout_correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = option(
        "none", "importance weights for the engine's own logprobs"
    )
    correction_high: float = option(2.0, "largest importance weight of the rollout correction")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run's folder, seeds, checkpoints and trackers."""

    out: str = option("", "run folder; default runs/<model>-<task>-<preset>-seed<seed>")
    seed: int = option(0, "seed of the training: order of prompts, sampling, shuffles")
    data_seed: int = option(0, "seed of the data: the questions, the held-out split, and the base model of tiny")
    checkpoint_every: int = option(15, "steps between checkpoints; 0 writes none before the end")
    track: str = option("", "further trackers, comma-separated: wandb, mlflow, trackio")
    profile: str = option(
        "", "write a trace of requests by slot, weight sync and training to this file (chrome://tracing, ui.perfetto.dev)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, with one TOML table per section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)


def sections() -> Iterator[tuple[str, type]]:
    """Yield (section name, its dataclass), in order."""
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        yield f.name, hints[f.name]


def section_of() -> dict[str, str]:
    """Return key -> section. Keys are unique over all sections, so each is one flag."""
    return {f.name: name for name, cls in sections() for f in dataclasses.fields(cls)}


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as nested dictionaries."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(read_text(path, _MOST_BYTES))
    except GarbageError as e:
        raise InputError("config", f"cannot read {path}: {e}", "a readable TOML file") from e
    except RecursionError as e:
        raise InputError("config", f"{path} is nested too deeply", "a valid TOML file") from e
    except ValueError as e:  # TOMLDecodeError, and Python's error for an integer of 5000 digits
        raise InputError("config", f"{path} is not TOML: {one_line(str(e))}", "a valid TOML file") from e


class Budget(NamedTuple):
    """The amount that a run may spend of what `unit` counts, one of BUDGET_UNITS."""

    amount: int
    unit: str


BUDGET_UNITS = ("generated_completions", "generated_tokens", "trained_completions", "trained_tokens")


def budget_of(training: TrainingConfig) -> Budget | None:
    """Return the budget of a run; None if `steps` alone ends it. Raises: InputError for a text that is no budget."""
    if not training.budget:
        return None
    found = re.fullmatch(r"0*([1-9][0-9]{0,14}) ((?:generated|trained) (?:completions|tokens))", training.budget)
    if found is None:
        needed = 'a number of generated or trained completions or tokens, such as "20000 generated completions"'
        raise InputError("config", f"budget = {_shown(training.budget)}", needed)
    return Budget(int(found[1]), found[2].replace(" ", "_"))


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the defaults, overridden by the file at `path`, then by `overrides` (key -> value or its text).

    Raises: InputError for an unknown section or key (naming the nearest valid one) and for a value of the wrong type.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name, _ in sections()}
    where = str(path) if path else "config"
    for section, values in (read_toml(path) if path else {}).items():
        _merge_section(merged, where, section, values)
    homes = section_of()
    for key, value in (overrides or {}).items():
        if key not in homes:
            raise unknown_name("config", "key", key, homes)
        merged[homes[key]][key] = value
    config = Config(**{name: _convert(name, cls, merged[name]) for name, cls in sections()})
    _check(config)
    return config


def load_saved(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration in a run's folder, then `overrides`, with the meaning that it had for an older run.

    A run without a data_seed took its data from `seed`.
    """
    run = read_toml(path).get("run")
    kept = {"data_seed": run["seed"]} if isinstance(run, Mapping) and "seed" in run and "data_seed" not in run else {}
    return load(path, {**kept, **(overrides or {})})


def dump(config: Config) -> str:
    """Return the configuration as TOML that `load` reads back to an equal one (keys that are None are left out).

    Raises: InputError for a task option that TOML cannot hold.
    """
    import tomli_w

    sections = dataclasses.asdict(config).items()
    try:
        return tomli_w.dumps({name: {k: v for k, v in values.items() if v is not None} for name, values in sections})
    except TypeError as e:
        raise InputError("config", f"task_options = {config.task.task_options}", "values that TOML can hold") from e


def _merge_section(merged: dict[str, dict[str, Any]], where: str, section: str, values: Any) -> None:
    if section not in merged:
        raise unknown_name(where, "section", section, merged)
    if not isinstance(values, Mapping):
        raise InputError(where, f"{section} = {_shown(values)}", f"a table [{section}]")
    known = [f.name for f in dataclasses.fields(dict(sections())[section])]
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"{where} [{section}]", "key", key, known)
        merged[section][key] = value


def _convert(section: str, cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        try:
            out[key] = _converted(value, hints[key])
        except ValueError as e:
            needed = _needed(hints[key]) or str(e)
            raise InputError(f"config [{section}]", f"{key} = {_shown(value)}", needed) from None
    return cls(**out)


def _converted(value: Any, hint: Any) -> Any:
    """Return `value` as the type of a key. Text comes from the command line, where "10" is the integer; TOML has its own types.

    Raises: ValueError that says what is needed.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None) and (found := _as(kind, value)) is not None:
            return found
    raise ValueError(" or ".join(_KIND_NAMES.get(kind, "text") for kind in kinds if kind is not type(None)))


_KIND_NAMES: Mapping[Any, str] = {int: "an integer (int)", float: "a number (float)", str: "text in quotes (str)"}
_LONGEST = 100_000  # characters of a text


def _as(kind: Any, value: Any) -> Any:
    """Return `value` as one plain type, or None if it cannot be one."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) and isinstance(value, str) else None
    if origin is dict:
        found = parse_json(value) if isinstance(value, str) else value
        return _checked_table(found, _DEEPEST) if isinstance(found, dict) else None
    if origin is list:
        if isinstance(value, str):
            value = parse_json(value) if value.startswith("[") else [value]
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        return value if isinstance(value, bool) else _SWITCH.get(value.lower()) if isinstance(value, str) else None
    return _number(kind, value)


_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def _number(kind: type, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if kind is float:
            return float(value)
        return int(value) if not isinstance(value, float) or value.is_integer() else None
    except (ValueError, OverflowError):  # not a number; an integer past every float
        return None


def _checked_table(value: Any, depth: int) -> Any:
    """Return a table of settings. Raises: ValueError for values that TOML, JSON or a fingerprint cannot hold."""
    if depth == 0:
        raise ValueError(f"tables in tables are possible {_DEEPEST} deep at most")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _checked_table(item, depth - 1)
    elif not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"no {type(value).__name__}, but values that TOML can hold: text, finite numbers, true, false, lists and tables")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("integers of 64 bits")
    return value


def _shown(value: Any) -> str:
    """Return a value of unknown size in one short line."""
    try:
        return one_line(without_credentials(repr(value)))
    except (RecursionError, ValueError):  # nested too deeply; an integer of 5000 digits
        return f"a {type(value).__name__} too large to show"


def _needed(hint: Any) -> str:
    """Return what a key with its own words or form takes; "" for any other."""
    if typing.get_origin(hint) is list:
        return 'text, or a list of texts such as ["</answer>", "[end]"]'
    if hint is bool:
        return "true or false"
    kinds = [hint] if typing.get_origin(hint) is Literal else typing.get_args(hint)
    words = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    return f"{'an integer or ' if int in kinds else ''}one of {', '.join(words)}" if words else ""


class Range(NamedTuple):
    """Numbers from `least` (above it) to `most`."""

    least: float
    most: float
    above: bool = False

    def needed(self, value: float) -> str:
        """Return what is needed instead of `value`; "" if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.least or (self.above and value == self.least):
            return "a positive number" if self.above else f"at least {self.least:g}"
        return f"at most {self.most:.10g}" if value > self.most else ""


_COUNT, _OPTIONAL_COUNT = Range(1, 10**6), Range(0, 10**6)
_STEPS = Range(0, 10**9)
_SECONDS = Range(0.001, 10**6)  # poll() takes its milliseconds as a C int, which ends at 2 147 483 s
# Every number of the configuration. A preset or an operator with a narrower range checks it itself.
RANGES: Mapping[str, Range] = {
    "num_examples": Range(0, 1000), "eval_prompts": _OPTIONAL_COUNT, "eval_k": Range(1, 2048), "eval_every": _STEPS,
    "prompts_per_step": _COUNT, "group_size": _COUNT, "round_size": _COUNT, "max_rounds": _COUNT, "decide_every": _COUNT,
    "min_pool": _OPTIONAL_COUNT, "mean_budget": _COUNT, "num_completions": _COUNT, "positive_threshold": Range(-1e30, 1e30),
    "alpha": Range(0, 100, above=True), "memory_decay": Range(0, 1, above=True), "window": _COUNT, "max_tokens": _COUNT,
    "temperature": Range(0.01, 100),  # below, vLLM samples at another temperature than requested
    "replicas": Range(1, 1024), "cpus_per_replica": Range(1, 4096), "tensor_parallel": Range(1, 1024),
    "hung_after_s": _SECONDS, "give_up_s": _SECONDS, "reward_timeout_s": _SECONDS, "request_timeout_s": Range(0, 10**6),
    "max_num_seqs": Range(1, 65536), "max_model_len": Range(2, 10**7), "memory_fraction": Range(0, 1, above=True),
    "reward_workers": Range(1, 1024),
    "steps": _STEPS, "warmup_steps": _STEPS, "checkpoint_every": _STEPS, "minibatches": _COUNT, "tokens_per_pass": Range(1, 10**9),
    "learning_rate": Range(0, 1, above=True), "weight_decay": Range(0, 100), "max_grad_norm": Range(0, 1e30, above=True),
    "clip_low": Range(0, 1), "clip_high": Range(0, 1e6), "entropy_coef": Range(0, 1e6), "correction_high": Range(0, 1e6, above=True),
    "seed": Range(0, 2**63 - 1), "data_seed": Range(0, 2**63 - 1),
}  # fmt: skip


def _check(config: Config) -> None:
    """Check all values as far as the configuration alone allows."""
    values = {f.name: getattr(getattr(config, section), f.name) for section, cls in sections() for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if isinstance(value, str):
            _check_text(key, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (needed := RANGES[key].needed(value)):
            raise InputError("config", f"{key} = {_shown(value)}", needed)
    budget_of(config.training)
    sampling = config.sampling
    if sampling.window is not None and sampling.schedule == "rounds":
        raise InputError("config", f"window {sampling.window} with schedule 'rounds'", "rounds have no window", "leave it out")
    if sampling.max_tokens >= config.engine.max_model_len:
        given = f"max_tokens = {sampling.max_tokens} with max_model_len = {config.engine.max_model_len}"
        raise InputError("config", given, "room for the prompt", "raise --max-model-len")
    for text in sampling.stop:
        _check_text("stop", text)
    if "" in sampling.stop:
        raise InputError("config", f"stop = {_shown(sampling.stop)}", "strings that are not empty")
    try:
        for url in filter(None, map(str.strip, config.engine.servers.split(","))):
            server_url(url)
    except GarbageError as e:
        raise InputError("config", f"servers: {e}", "URLs such as http://host:8000", "VLLM_API_KEY holds the key") from None


def _check_text(key: str, text: str) -> None:
    """Refuse text that no file can hold, or that no system call accepts as a name."""
    if not is_utf8(text):
        raise InputError("config", f"{key} = {_shown(text)}", "text that UTF-8 can hold")
    if "\0" in text:
        raise InputError("config", f"{key} = {_shown(text)}", "text without a NUL character")
    if len(text) > _LONGEST:
        raise InputError("config", f"{key} has {len(text)} characters", f"at most {_LONGEST}")
