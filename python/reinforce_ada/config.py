"""One typed configuration: defaults < TOML file < command-line flags. Every key is also a flag of `reinforce-ada train`.

Stdlib at import, so that `--help` stays fast; msgspec does the type conversion when a configuration is built.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reinforce_ada.errors import InputError, unknown_name


def option(default: Any, about: str) -> Any:
    """A configuration key: its default and the line `--help` prints."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which policy is trained, and where."""

    model: str = option("smollm2", "smollm2 | tiny | a folder or hub id of any Hugging Face causal LM")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "dtype of the weights; bfloat16 keeps an fp32 master copy")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes cuda where there is one")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What is asked, and how answers are scored."""

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
    """How rollouts are spent."""

    preset: str = option("reinforce-ada-balance", "grpo | dapo | pods | knapsack | reinforce-ada-{pos,balance,est,exact}; docs/policies.md")
    schedule: Literal["stream", "rounds"] = option("stream", "stream has no barrier between rounds; same pools either way")
    prompts_per_step: int = option(12, "prompts entering each step")
    group_size: int | None = option(None, "completions kept per prompt (default: the preset's)")
    round_size: int | None = option(None, "completions requested together (default: the preset's)")
    max_rounds: int | None = option(None, "rounds at most; the cap is round_size x max_rounds (default: the preset's)")
    decide_every: int | None = option(None, "committed completions between two looks of the exit rule (default: the preset's)")
    min_pool: int | None = option(None, "no exit before this many scored completions (default: the preset's)")
    positive_threshold: float | None = option(None, "a completion is correct when its reward exceeds this (default: the preset's)")
    mean_budget: int | None = option(None, "reinforce-ada-est, knapsack: completions per prompt on average (default: the preset's)")
    degenerate: Literal["keep", "drop"] | None = option(None, "groups without signal: keep or drop (default: the preset's)")
    objective: Literal["as-published", "mean", "log", "power"] | None = option(
        None, "what the expected gradient climbs: pass rate (mean), its log or power; as published, or exactly (default: the preset's)"
    )
    alpha: float | None = option(None, "exponent of objective power (default: 1, which is mean)")
    propose: Literal["nearest-rate", "skip-streaks"] | None = option(None, "choose prompts by what is remembered of them (default: all)")
    memory_decay: float = option(0.99, "of what is remembered of a prompt's pools, per step; 1 forgets nothing")
    memory_from: str = option("", "run folder whose pools are remembered at the start; prompts are known by question and answer")
    window: int | Literal["posterior"] | None = option(
        None,
        "stream: requests a prompt may have ahead, or as many as it will probably need (default: posterior on a GPU, round_size on a CPU)",
    )
    temperature: float = option(1.0, "sampling temperature; logprobs are taken at the same one")
    max_tokens: int = option(12, "tokens per completion at most")
    stop: list[str] = field(
        default_factory=list,
        metadata={"about": 'a completion ends where it says this; a list in TOML or JSON for several: ["</answer>", "\\n\\n"]'},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What generates, and what scores."""

    engine: Literal["auto", "vllm", "transformers", "openai", "ray"] = option(
        "auto", "auto takes vllm where it is installed, and says which; openai: --servers; ray: vLLM in --replicas actors"
    )
    servers: str = option("", "openai: URLs of the servers, with commas between; `reinforce-ada serve` starts some")
    weights_dir: str = option("", "openai: folder for new weights that every server reads (default: weights in the run folder)")
    replicas: int = option(1, "ray: actors; those for which no node of a cluster has room wait until one joins")
    ray_address: str = option("", 'ray: of a cluster; "auto": the one this node belongs to (default: starts Ray on this machine)')
    cpus_per_replica: int = option(1, "ray: cores of each")
    tensor_parallel: int = option(1, "ray on cuda: GPUs of each")
    hung_after_s: float = option(60.0, "openai, ray: a replica that brings nothing for so long is dead; its requests go to others")
    give_up_s: float = option(600.0, "openai, ray: without any replica for so long the run stops, and can be resumed")
    max_num_seqs: int = option(128, "requests in the engine at once; of each replica")
    max_model_len: int = option(512, "longest prompt + completion in tokens")
    memory_fraction: float = option(0.45, "cuda: share of the GPU for vLLM; the trainer has the rest")
    sleep: bool = option(True, "cuda: vLLM in this process gives its memory back while the model trains; false: faster where both fit")
    request_timeout_s: float = option(0.0, "a request unanswered for so long is issued again; 0: never (engines in this process lose none)")
    reward_workers: int = option(1, "processes that score completions")
    reward_timeout_s: float = option(
        10.0, "one scoring call at most, ten times as long for the first of a worker; then the worker is replaced and the call retried"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the kept completions become a gradient."""

    steps: int = option(30, "steps in all; a resumed run goes on to this number")
    learning_rate: float = option(1e-5, "AdamW, after warm-up")
    warmup_steps: int = option(2, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW")
    max_grad_norm: float = option(1.0, "gradient clipping by global norm")
    minibatches: int = option(1, "optimizer steps per step; above 1 the ratios are to logprobs recomputed before the first")
    tokens_per_pass: int = option(2048, "padded tokens per forward; larger minibatches accumulate gradients")
    loss: Literal["reinforce", "ppo", "cispo", "gspo", "sapo"] = option("ppo", "policy loss")
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] | None = option(
        None, "how token losses become one number (default: token-mean; seq-mean-token-sum-norm with an objective, which needs it)"
    )
    clip_low: float = option(0.2, "ppo, gspo: ratio clipped below 1 - clip_low")
    clip_high: float = option(0.28, "ppo, gspo: ratio clipped above 1 + clip_high")
    entropy_coef: float = option(0.0, "entropy bonus")
    rollout_correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = option(
        "none", "importance weights for the engine's own logprobs"
    )
    correction_high: float = option(2.0, "largest importance weight of the rollout correction")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run lives."""

    out: str = option("", "run folder; default runs/<model>-<task>-<preset>-seed<seed>")
    seed: int = option(0, "of training: order of the prompts, sampling, shuffles")
    data_seed: int = option(0, "of the data: which questions there are and which are held out, and the base model of tiny")
    checkpoint_every: int = option(15, "steps between checkpoints; 0 writes none before the end")
    track: str = option("", "where numbers go beside log.jsonl and TensorBoard: wandb, mlflow, trackio, by commas")
    profile: str = option(
        "", "write a trace of requests by slot, weight sync and training to this file (chrome://tracing, ui.perfetto.dev)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration; one TOML table per section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)


def sections() -> Iterator[tuple[str, type]]:
    """(section name, its dataclass), in order."""
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        yield f.name, hints[f.name]


def section_of() -> dict[str, str]:
    """Key -> section. Keys are unique over all sections, so each is one flag."""
    return {f.name: name for name, cls in sections() for f in dataclasses.fields(cls)}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError("config", f"cannot read {path}: {e.strerror}", "a readable TOML file") from e
    except tomllib.TOMLDecodeError as e:
        raise InputError("config", f"{path} is not TOML: {e}", "a valid TOML file") from e


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Defaults, then the file at `path`, then `overrides` (key -> value or its text).

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
    """The configuration that a run has written into its folder, then `overrides`; what an older run means by it is kept.

    One without a data_seed took its data from `seed`.
    """
    run = read_toml(path).get("run")
    kept = {"data_seed": run["seed"]} if isinstance(run, Mapping) and "seed" in run and "data_seed" not in run else {}
    return load(path, {**kept, **(overrides or {})})


def dump(config: Config) -> str:
    """The configuration as TOML that `load` reads back to an equal one (keys that are None are left out).

    Raises: InputError for a task option that TOML has no form for.
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
        raise InputError(where, f"{section} = {values!r}", f"a table [{section}]")
    known = [f.name for f in dataclasses.fields(dict(sections())[section])]
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"{where} [{section}]", "key", key, known)
        merged[section][key] = value


def _convert(section: str, cls: type, values: dict[str, Any]) -> Any:
    import json

    import msgspec

    hints = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        is_text = isinstance(value, str)
        try:
            if is_text and typing.get_origin(hints[key]) is dict:
                value = json.loads(value)
            elif is_text and typing.get_origin(hints[key]) is list:
                value = json.loads(value) if value.startswith("[") else [value]
            # Text comes from the command line, where "10" is the integer; a TOML file has types of its own.
            out[key] = msgspec.convert(value, type=hints[key], strict=not is_text)
        except (msgspec.ValidationError, json.JSONDecodeError) as e:
            raise InputError(f"config [{section}]", f"{key} = {value!r}", _needed(hints[key]) or str(e)) from None
    return cls(**out)


def _needed(hint: Any) -> str:
    """What a key with words or a form of its own takes, "" for any other."""
    if typing.get_origin(hint) is list:
        return 'text, or a list of texts such as ["</answer>", "[end]"]'
    if hint is bool:
        return "true or false"
    kinds = [hint] if typing.get_origin(hint) is Literal else typing.get_args(hint)
    words = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    return f"{'an integer or ' if int in kinds else ''}one of {', '.join(words)}" if words else ""


_AT_LEAST = {
    "prompts_per_step": 1, "eval_prompts": 0, "eval_k": 1, "eval_every": 0, "num_examples": 0, "max_tokens": 1, "max_num_seqs": 1,
    "max_model_len": 2, "reward_workers": 1, "steps": 0, "warmup_steps": 0, "minibatches": 1, "tokens_per_pass": 1,
    "checkpoint_every": 0, "seed": 0, "data_seed": 0,
    "weight_decay": 0, "clip_low": 0, "clip_high": 0, "entropy_coef": 0, "request_timeout_s": 0,
    "replicas": 1, "cpus_per_replica": 1, "tensor_parallel": 1,
}  # fmt: skip
_POSITIVE = (
    "temperature", "memory_fraction", "reward_timeout_s", "learning_rate", "max_grad_norm", "correction_high", "hung_after_s", "give_up_s",
)  # fmt: skip


def _check(config: Config) -> None:
    values = {k: v for section in dataclasses.asdict(config).values() for k, v in section.items()}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError("config", f"{key} = {value}", "a finite number")
    for key, least in _AT_LEAST.items():
        if values[key] < least:
            raise InputError("config", f"{key} = {values[key]}", f"at least {least}")
    sampling = config.sampling
    if not 0 < sampling.memory_decay <= 1:
        raise InputError("config", f"memory_decay = {sampling.memory_decay}", "a number in (0, 1]")
    if isinstance(sampling.window, int) and sampling.window < 1:
        raise InputError("config", f"window = {sampling.window}", 'at least 1, or "posterior"')
    if sampling.window is not None and sampling.schedule == "rounds":
        raise InputError("config", f"window {sampling.window} with schedule 'rounds'", "rounds have no window", "leave it out")
    if sampling.max_tokens >= config.engine.max_model_len:
        given = f"max_tokens = {sampling.max_tokens} with max_model_len = {config.engine.max_model_len}"
        raise InputError("config", given, "room for the prompt", "raise --max-model-len")
    if "" in sampling.stop:
        raise InputError("config", f"stop = {sampling.stop}", "strings that are not empty")
    for key in _POSITIVE:
        if not values[key] > 0:
            raise InputError("config", f"{key} = {values[key]}", "a positive number")
