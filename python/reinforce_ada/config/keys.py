"""Every key of the configuration, with its default and its line of `--help`; one class per TOML table."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from reinforce_ada.config.values import (
    Coefficient,
    ContextLength,
    Count,
    CountOrNone,
    Dtype,
    Fraction,
    PositiveCoefficient,
    PositiveFraction,
    Processes,
    Range,
    Requests,
    Seconds,
    Seed,
    Steps,
    option,
)

ModelName = Literal["smollm2", "gemma3-270m", "tiny"]
PresetName = Literal[
    "grpo", "dapo", "pods", "knapsack",
    "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-est", "reinforce-ada-exact", "reinforce-ada-memory",
]  # fmt: skip
_PRESET = "the preset's"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy to train, its dtype and its device."""

    model: ModelName | str = option("smollm2", "model to train; your own is a folder or the hub id of any Hugging Face causal LM")
    dtype: Dtype = option(
        "auto", "dtype of the weights; bfloat16 keeps an fp32 master copy; auto: bfloat16 where the device computes in it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device of the trainer; auto: cuda if available")
    lora_rank: Annotated[int, Range(0, 65536)] = option(
        0, "rank of LoRA adapters, which are trained in place of the weights; 0 trains the weights; docs/lora.md"
    )
    lora_alpha: Count | None = option(None, "adapters are scaled by lora_alpha / lora_rank", unset="twice the rank")
    lora_targets: str = option(
        "all-linear",
        "layers that get adapters: all-linear (all but the output head), or names of linear layers: q_proj,v_proj",
        metavar="NAMES",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """The questions, and how answers are scored."""

    task: str = option(
        "chain_sum",
        "a reasoning-gym dataset to generate from, or your own questions: a file of records (JSONL, JSON, CSV, Parquet), a folder that "
        "`datasets` saved, or org/name[:config] on the Hugging Face hub; docs/tasks.md",
    )
    split: str = option("", "part of a dataset to train on", unset="train")
    eval_task: str = option("", "file, folder or hub id of the held-out questions", unset="some questions of the task are held out")
    eval_split: str = option(
        "", "part of a dataset whose questions are held out: of --eval-task if that is given (default: test), otherwise of the task"
    )
    prompt_column: str = option("", "column of the prompts, such as problem or extra_info.question", unset="prompt, messages or question")
    answer_column: str = option("", "column of the answers, such as reward_model.ground_truth", unset="answer")
    task_options: dict[str, Any] = option(
        {}, 'generator settings as TOML or JSON, e.g. {"max_terms": 3}', unset="the generator's; chain_sum: one digit, two terms"
    )
    reward: Literal["exact", "number", "math", "choice", "json", "python"] | str = option(
        "",
        'how completions are scored; your own is module:function or file.py:function; "number, my.py:form:0.2" adds two with weights; '
        "docs/rewards.md",
        unset="the task's own, or exact",
    )
    run_code: bool = option(False, "allow --reward python to run programs that the model wrote; docs/rewards.md has the limits")
    overlong_buffer: CountOrNone = option(
        0, "tokens before max_tokens over which the reward falls by up to overlong_penalty, as in DAPO; 0: none"
    )
    overlong_penalty: PositiveCoefficient = option(1.0, "what a completion of max_tokens loses if there is an overlong_buffer")
    system_prompt: str | None = option(
        None,
        "system message before each question that has none of its own",
        unset='none for your own questions, "Reply with one number and nothing else." for generated ones',
        metavar="TEXT",
    )
    template: Literal["chat", "plain"] = option("chat", "render prompts by the tokenizer's chat template, or as plain lines")
    template_options: dict[str, Any] = option({}, 'variables for the chat template as TOML or JSON, e.g. {"enable_thinking": false}')
    num_examples: Annotated[int, Range(0, 1000)] | None = option(
        None, "worked examples shown before each question", unset="none for your own questions, one for generated ones"
    )
    eval_prompts: CountOrNone = option(64, "held-out prompts; never trained on")
    eval_k: Annotated[int, Range(1, 2048)] = option(8, "completions per held-out prompt, the k of Avg@k")
    eval_every: Steps = option(0, "steps between evaluations; 0 evaluates before and after only")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the rollout budget is spent."""

    preset: PresetName = option("reinforce-ada-balance", "way of sampling; docs/policies.md")
    schedule: Literal["stream", "rounds"] = option("stream", "stream has no barrier between rounds; same pools either way")
    prompts_per_step: Count = option(12, "prompts entering each step")
    group_size: Count | None = option(None, "completions kept per prompt", unset=_PRESET)
    round_size: Count | None = option(None, "completions requested together", unset=_PRESET)
    max_rounds: Count | None = option(None, "rounds at most; the cap is round_size x max_rounds", unset=_PRESET)
    decide_every: Count | None = option(None, "committed completions between two evaluations of the exit rule", unset=_PRESET)
    min_pool: CountOrNone | None = option(None, "no exit before this many scored completions", unset=_PRESET)
    positive_threshold: Annotated[float, Range(-1e30, 1e30)] | None = option(
        None, "a completion is correct when its reward exceeds this", unset=_PRESET
    )
    mean_budget: Count | None = option(None, "reinforce-ada-est, knapsack: completions per prompt on average", unset=_PRESET)
    num_completions: Count | None = option(None, "pods: completions per prompt, of which group_size are kept", unset=_PRESET)
    baseline: Literal["pool", "group", "leave-one-out", "memory", "predicted"] | None = option(
        None,
        "mean that a reward is compared with; memory: posterior mean of the prompt's pass rate; predicted: the same, with a prior from the "
        "model's own state at the prompt's end",
        unset=_PRESET,
    )
    scale: Literal["none", "pool", "group", "batch"] | None = option(
        None, "rewards whose standard deviation divides the advantages", unset=_PRESET
    )
    degenerate: Literal["keep", "drop"] | None = option(None, "what becomes of groups without signal", unset=_PRESET)
    objective: Literal["as-published", "mean", "log", "power"] | None = option(
        None, "function of the pass rate that the expected gradient climbs", unset=_PRESET
    )
    alpha: Annotated[float, Range(0, 100, above=True)] | None = option(None, "exponent of objective power", unset="1, which is mean")
    propose: Literal["nearest-rate", "skip-streaks"] | None = option(None, "choose prompts by their earlier pools", unset="all are taken")
    memory_decay: PositiveFraction = option(0.99, "factor by which the memory of a prompt's pools fades per step; 1 keeps everything")
    memory_from: str = option("", "run folder whose pools initialize the memory; prompts are matched by question and answer", metavar="RUN")
    window: Count | Literal["posterior"] | None = option(
        None, "stream: most requests ahead of a prompt; posterior: as many as it needs", unset="posterior on a GPU, round_size on a CPU"
    )
    temperature: Annotated[float, Range(0.01, 100)] = option(  # below, vLLM samples at another temperature than requested
        1.0, "sampling temperature; logprobs are taken at the same one"
    )
    top_p: PositiveFraction = option(1.0, "sample only from the fewest likeliest tokens whose probabilities add up to this; 1: from all")
    top_k: Annotated[int, Range(0, 10**7)] = option(0, "sample only from this many likeliest tokens; 0: from all")
    min_p: Fraction = option(0.0, "sample only from tokens that are at least this fraction as likely as the likeliest; 0: from all")
    max_tokens: Count | None = option(
        None, "tokens per completion at most", unset="half of max_model_len for your own questions, 12 for generated ones"
    )
    stop: list[str] = option([], 'stop string that ends a completion; a TOML or JSON list for several: ["</answer>", "\\n\\n"]')

    @property
    def truncation(self) -> str:
        """Return the settings that leave tokens out of the sampling distribution, such as "top_p 0.9"; "" if there are none."""
        is_set = {"min_p": self.min_p > 0, "top_k": self.top_k > 0, "top_p": self.top_p < 1}
        return ", ".join(f"{name} {getattr(self, name):g}" for name, there in is_set.items() if there)


# The keys that make the policy, besides the name of its preset. Keys that are not set keep the preset's values.
POLICY_KEYS = (
    "group_size", "round_size", "max_rounds", "decide_every", "min_pool", "positive_threshold", "mean_budget", "num_completions",
    "baseline", "scale", "degenerate", "objective", "alpha", "propose",
)  # fmt: skip

# The names that keys have in other trainers.
OTHER_NAMES = {
    "algorithm": "preset", "batch_size": "prompts_per_step", "beta": "kl_coef", "data": "task", "dataset": "task", "lora_r": "lora_rank",
    "lr": "learning_rate", "max_completion_length": "max_tokens", "max_new_tokens": "max_tokens", "max_steps": "steps",
    "num_generations": "group_size", "output_dir": "out", "reward_funcs": "reward", "train_batch_size": "prompts_per_step",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine that generates, and the workers that score."""

    engine: Literal["auto", "vllm", "transformers", "openai", "ray"] = option(
        "auto", "auto: vllm if installed, else transformers; openai: the servers of --servers; ray: vLLM in --replicas actors"
    )
    servers: str = option("", "openai: comma-separated URLs of the servers, which `reinforce-ada serve` starts", metavar="URLS")
    weights_dir: str = option(
        "", "folder for new weights, which every server or actor reads", unset="weights in the run folder", metavar="DIR"
    )
    replicas: Processes = option(1, "ray: number of actors; an actor without a node that has room waits for one")
    ray_address: str = option(
        "", 'ray: address of a cluster; "auto": the cluster of this node', unset="starts Ray on this machine", metavar="ADDRESS"
    )
    cpus_per_replica: Annotated[int, Range(1, 4096)] = option(1, "ray: CPU cores of each actor")
    tensor_parallel: Processes = option(1, "ray on cuda: GPUs of each actor")
    hung_after_s: Seconds = option(60.0, "openai, ray: a replica without an answer for this long counts as dead; its requests go to others")
    give_up_s: Seconds = option(600.0, "openai, ray: the run stops, and can be resumed, after this long without any replica")
    max_num_seqs: Requests = option(128, "concurrent requests in the engine, or in each replica")
    max_model_len: ContextLength = option(512, "longest prompt + completion in tokens")
    memory_fraction: PositiveFraction = option(0.45, "cuda: share of the GPU for vLLM; the trainer has the rest")
    sleep: bool = option(True, "cuda: vLLM in this process frees its memory while the model trains; false is faster if both fit")
    request_timeout_s: Annotated[float, Range(0, 10**6)] = option(
        0.0, "reissue a request after this time without an answer; 0: never, as engines in this process lose none"
    )
    reward_workers: Processes = option(1, "processes that score completions")
    reward_timeout_s: Seconds = option(
        10.0,
        "limit of a scoring call, tenfold for a worker's first; then a new worker retries the call; math gives 0 instead",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the kept completions become a gradient."""

    steps: Steps = option(30, "total number of steps; a resumed run continues to this number")
    budget: str = option(
        "", 'end after the step in which this is spent, such as "20000 generated completions"; steps stays the limit', metavar="TEXT"
    )
    learning_rate: PositiveFraction = option(1e-5, "AdamW, after warm-up")
    warmup_steps: Steps = option(2, "steps of linear warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "the rate after warm-up; linear and cosine fall until the last of the steps, which may then not change on a resume"
    )
    lr_min_fraction: Fraction = option(0.0, "linear, cosine: share of learning_rate that the rate falls towards")
    weight_decay: Annotated[float, Range(0, 100)] = option(0.0, "decay of AdamW, per unit of learning rate")
    max_grad_norm: Annotated[float, Range(0, 1e30, above=True)] = option(1.0, "gradient clipping by global norm")
    minibatches: Count = option(1, "optimizer updates per step; above 1, ratios use logprobs that are recomputed before the first update")
    moments: Literal["float32", "bfloat16"] = option("float32", "dtype of AdamW's two moments; bfloat16 saves 4 bytes a weight")
    tokens_per_pass: Annotated[int, Range(1, 10**9)] = option(2048, "padded tokens per forward; larger minibatches accumulate gradients")
    gradient_checkpointing: bool = option(False, "keep only each layer's input for the backward, which computes the layer again")
    loss: Literal["reinforce", "ppo", "cispo", "gspo", "sapo"] | str = option(
        "ppo", "policy loss; your own is module:function or file.py:function; docs/operators.md"
    )
    loss_agg: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] | None = option(
        None, "aggregation of the token losses", unset="token-mean; seq-mean-token-sum-norm with an objective, which needs it"
    )
    clip_low: Fraction = option(0.2, "ppo, gspo, cispo: ratio clipped below 1 - clip_low")
    clip_high: Coefficient = option(0.28, "ppo, gspo, cispo: ratio clipped above 1 + clip_high")
    entropy_coef: Coefficient = option(0.0, "factor of the entropy bonus in the loss")
    kl_coef: Coefficient = option(
        0.0, "factor of the KL to the model before the first step, in the loss; 0 computes none and keeps no copy"
    )
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"] = option(
        "k3", "estimator of that KL on a token; a trailing + keeps its value and takes the gradient of k2"
    )
    rollout_correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = option(
        "none", "importance weights for the engine's own logprobs"
    )
    correction_high: PositiveCoefficient = option(2.0, "largest importance weight of the rollout correction")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run's folder, seeds, checkpoints and trackers."""

    out: str = option("", "run folder", unset="runs/<model>-<task>-<preset>-seed<seed>", metavar="DIR")
    seed: Seed = option(0, "seed of the training: order of prompts, sampling, shuffles")
    data_seed: Seed = option(0, "seed of the data: the questions, the held-out split, and the base model of tiny")
    checkpoint_every: Steps = option(15, "steps between checkpoints; 0 writes none before the end")
    push_to_hub: str = option(
        "", "org/name: upload the model and its card to the Hugging Face Hub at the end; a new repository is private", metavar="ORG/NAME"
    )
    track: str = option("", "further trackers, comma-separated: wandb, mlflow, trackio", metavar="NAMES")
    profile: str = option(
        "", "write a trace of requests by slot, weight sync and training to this file (chrome://tracing, ui.perfetto.dev)", metavar="FILE"
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
