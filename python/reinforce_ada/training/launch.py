"""Build a trainer or an evaluation from a configuration: model, task, engine, rewards, store, in the order that fails fastest."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from contextlib import AbstractContextManager, ExitStack, closing
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reinforce_ada import config as configuration
from reinforce_ada import machine
from reinforce_ada.config import Config, TaskConfig
from reinforce_ada.engines.base import Engine, Launch
from reinforce_ada.engines.traced import Trace, TracedEngine, no_span
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import installed_version, is_installed
from reinforce_ada.rewards import OverlongPenalty, RewardPool, names
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import Policy, configured
from reinforce_ada.training import adapters, built_in, checkpoint, distributed, hub, inputs, lineage, models, run_folder, track
from reinforce_ada.training.display import Display
from reinforce_ada.training.distributed import RankError, Ranks
from reinforce_ada.training.in_memory import InMemory
from reinforce_ada.training.language_model import HuggingFaceModel
from reinforce_ada.training.learner import Learner
from reinforce_ada.training.loss import RunLoss
from reinforce_ada.training.memory_estimate import Shapes, estimate
from reinforce_ada.training.run_folder import RunFolder
from reinforce_ada.training.task_defaults import completed, max_tokens_of
from reinforce_ada.training.task_files import answer_of
from reinforce_ada.training.tasks import Records, Task, load_records, name_of, render
from reinforce_ada.training.track import Trackers
from reinforce_ada.training.trainer import Parts, Trainer, compared, earlier_store
from reinforce_ada.types import Prompt


def train(config: Config, resume: Path | None = None, given: InMemory | None = None) -> None:
    """Run `config` to its end, from the start or resuming `resume`; under torchrun on every rank.

    Args:
        given: what a Python program gives beside the configuration; None for the command line.
    Raises: InputError for anything the configuration, the folder or the machine cannot do. SystemExit on a rank other than 0 when the run
        fails, which rank 0 reports.
    """
    quiet_libraries(config.model.model, config.task, offline=given is None and not config.run.push_to_hub)
    with distributed.join() as ranks:
        if ranks.rank == 0:
            _lead(config, resume, ranks, given or InMemory())
            return
        try:
            path, whole = ranks.receive()  # with what rank 0 has filled in
            model = ranks.together(lambda: _load(path, pick_device(whole.model.device), whole))
            ranks.together(lambda: Learner(model, whole, ranks)).follow()
        except RankError:  # rank 0 reports it
            raise SystemExit(1) from None


def _lead(config: Config, resume: Path | None, ranks: Ranks, given: InMemory) -> None:
    display = Display()
    policy, engine_name, device = configured(config.sampling), pick_engine(config.engine.engine), pick_device(config.model.device)
    precision = precision_of(config.model.dtype, device)
    config, defaults = completed(with_dtype(config, device))
    built_in.check_template(config.model.model, config.task.template)
    track.check_names(config.run.track)
    if config.run.push_to_hub:
        hub.check(config.run.push_to_hub)
    needs("train", "tomli_w")  # for the configuration in the run folder, which is written after the model has been loaded
    _need_peft(config)
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder.existing(resume) if resume else run_folder.new(out_of(config)))
        out = folder.path
        given.keep_records(out)
        records = load_records(config.task, config.run.seed, config.run.data_seed)
        records = dataclasses.replace(records, reward=given.reward or records.reward)
        config = _with_whole_paths(config, records)
        if resume is None:
            if config.model.model not in built_in.NAMES:
                models.path_of(config.model.model)  # refuses what is no whole model
            lineage.check_held_out(records, config.model.model)
        RunLoss.from_config(config)  # raises for settings that the loss refuses, before anything is made
        rewards = stack.enter_context(make_rewards(config, records))
        # A resumed run must fit its store before anything slow happens. A new run gets a store only when all else has been made, so that a
        # first attempt with a wrong setting leaves no run behind.
        store = _open_store(stack, config, records, folder) if resume else None
        torch.manual_seed(config.run.seed)
        name, is_new = config.model.model, resume is None
        path = _tiny_folder(config, records, out, display, is_new=is_new) if name == "tiny" else models.path_of(name, display.line)
        ranks.send([(path, config)] * ranks.size)
        model = ranks.together(lambda: _load(path, device, config))
        task = render(records, config.task, model.tokenizer, longest=longest_prompt(config))
        for note in filter(None, (defaults, *task.notes)):
            display.line(note)
        weights = out / "weights"
        if config.engine.weights_dir:
            weights = stack.enter_context(run_folder.weights_folder(Path(config.engine.weights_dir), folder.name))
        engine = stack.enter_context(make_engine(engine_name, config, path, model, device, weights, display))
        display.line(_what_runs(config, policy, task, precision, ranks.size))
        if isinstance(model, adapters.AdaptedModel):
            display.line(str(model))
        display.line(_memory(Shapes.of(model.module), config, engine_name, device))
        trackers = stack.enter_context(closing(Trackers(config.run.track, out, dataclasses.asdict(config), display.line)))
        trace = stack.enter_context(closing(Trace(Path(config.run.profile)))) if config.run.profile else None
        store = store or _open_store(stack, config, records, folder)
        parts = Parts(model, TracedEngine(engine, trace) if trace else engine, rewards, task.train, task.held_out, policy, store)
        trainer = Trainer(parts, config, out, display, ranks, trackers, trace.span if trace else no_span, given.callbacks)
        if resume:
            trainer.resume()
        if not any(record["kind"] == "run" for record in trainer.log.records):
            trainer.log.write({**_header(config, engine, device, ranks.size), "run_id": store.id})
        trainer.run()
    _conclude(trainer, trace)


def _conclude(trainer: Trainer, trace: Trace | None) -> None:
    """Report a run that has ended, and push its model if that was asked for."""
    out, display, repo = trainer.out, trainer.display, trainer.config.run.push_to_hub
    if any(record["kind"] != "run" for record in trainer.log.records):
        finish(out, display)
    else:
        display.line(f"{out}: no step and no evaluation, so there is nothing to report")
    if trace:
        display.line(f"profile {trace.path}")
    if repo:
        display.line(f"pushed to {hub.push(out, repo)}")


def estimate_memory(config: Config) -> str:
    """Return in one line what a run would take, without loading its model. Raises: InputError as `train` does for model and device."""
    quiet_libraries(config.model.model, config.task)
    device = pick_device(config.model.device)
    _need_peft(config)
    module = models.without_weights(config.model.model)
    if config.model.lora_rank:
        module = adapters.adapted(module, config.model)
    config, _ = completed(with_dtype(config, device))
    return _memory(Shapes.of(module), config, pick_engine(config.engine.engine), device)


def _need_peft(config: Config) -> None:
    if config.model.lora_rank:
        needs("train", "peft", "--lora-rank 0 trains the weights and needs nothing more")


def _memory(shapes: Shapes, config: Config, engine: str, device: torch.device) -> str:
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return estimate(shapes, config, device.type, engine=engine, gpu_bytes=gpu_bytes).line()


def finish(out: Path, display: Display) -> None:
    """Print the closing table and draw the figure of a run."""
    from reinforce_ada import report

    display.table(f"{out}", report.summary_table(out))
    if not is_installed("matplotlib"):
        display.line('no figure: matplotlib is not installed; pip install "reinforce-ada[report]", then reinforce-ada report')
        return
    display.line(f"figure {report.draw(out)} · model {out / 'model'} · log {out / 'log.jsonl'}")


def _load(path: str, device: torch.device, config: Config) -> HuggingFaceModel:
    """Return the model that is trained, with new adapters if the configuration has a rank for them."""
    model = models.load(path, config.model.dtype, device)
    return adapters.add(model, config.model, config.run.seed) if config.model.lora_rank else model


def export(source: Path, target: Path | None, dtype: str) -> Path:
    """Write the whole model of a run that trained adapters, and return its folder; see `adapters.export`."""
    quiet_libraries(str(source))
    return adapters.export(source, target, dtype)


def model_path(name: str) -> str:
    """Return what an engine loads for a model of this name. Raises: InputError for adapters, which are no whole model."""
    return models.path_of(name) if name in built_in.MODELS or models.is_adapters(Path(name)) else name


def pick_device(name: str) -> torch.device:
    """Return the device to train on. Raises: InputError for cuda if there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train", "device cuda", "a CUDA device and a torch built for it", "--device cpu")
    return distributed.local_device(machine.device_of(name))


def with_dtype(config: Config, device: torch.device) -> Config:
    """Return the configuration with dtype "auto" replaced by the one that `device` computes in; a run keeps it wherever it is resumed."""
    if config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=machine.native_dtype(device.type)))


def precision_of(dtype: str, device: torch.device) -> str:
    """Return the dtype and the device in words, with the reason for the dtype if "auto" chose it."""
    if dtype != "auto":
        return f"{dtype}, {device}"
    has = machine.cpu_arithmetic() if device.type == "cpu" else torch.cuda.get_device_name(device)
    lacks = "" if machine.native_dtype(device.type) == "bfloat16" else ", without native bfloat16"
    return f"{machine.native_dtype(device.type)}, {device}: {has}{lacks}"


def pick_engine(wanted: str) -> str:
    """Choose vLLM if it is installed, otherwise transformers. Raises: InputError if vLLM or Ray is wanted but not installed."""
    if wanted == "auto":
        return "vllm" if is_installed("vllm") else "transformers"
    if wanted in ("vllm", "ray"):
        needs("engine", wanted, "--engine transformers needs nothing more")
    return wanted


def make_rewards(config: Config, records: Records) -> RewardPool:
    """Return the reward workers."""
    task, engine = config.task, config.engine
    if task.reward:
        names.check_threshold(task.reward, configured(config.sampling).positive_threshold)
    penalty = None
    if task.overlong_buffer:
        penalty = OverlongPenalty(max_tokens_of(config), task.overlong_buffer, task.overlong_penalty)
    # No worker needs the script of this process: records are JSON, and a reward of a script goes by value.
    return RewardPool(
        records.reward, num_workers=engine.reward_workers, timeout_s=engine.reward_timeout_s, penalty=penalty, run_code=task.run_code,
        imports_main=False,
    )  # fmt: skip


def make_engine(
    name: str, config: Config, path: str, model: HuggingFaceModel, device: torch.device, weights: Path, display: Display
) -> AbstractContextManager[Engine]:
    """Return the engine of that name, from the function `launch` of its module. `weights` is for weights that other processes load."""
    limits = {
        "max_tokens": max_tokens_of(config),
        "max_model_len": config.engine.max_model_len,
        "max_num_seqs": config.engine.max_num_seqs,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "top_k": config.sampling.top_k,
        "min_p": config.sampling.min_p,
        "stop": tuple(config.sampling.stop),
    }
    vocab_size = int(model.causal_lm.get_input_embeddings().weight.shape[0])  # the model can read only token ids below it
    run = Launch(
        config.engine, path, config.model.dtype, device.type, model.causal_lm, model.tokenizer, vocab_size, weights, limits, display.line
    )  # fmt: skip
    return closing(import_module(f"reinforce_ada.engines.{name}").launch(run))


def quiet_libraries(model: str, *tasks: TaskConfig, offline: bool = True) -> None:
    """Silence warnings that do not concern the run, and keep a whole local model with local questions offline.

    Call it once, before transformers is imported. Adapters may have a base model of the hub. With `offline=False` the process may still use
    the hub, for another model or for an upload.
    """
    is_online = any("hub" in (configuration.kind_of(task.task), configuration.kind_of(task.eval_task)) for task in tasks)
    if offline and not is_online and (model in built_in.NAMES or (Path(model).exists() and not models.is_adapters(Path(model)))):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # raised by packages that are compiled at their first import
    warnings.filterwarnings("ignore", module=r"(vllm|transformers|torch)\b.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("vllm").setLevel(logging.ERROR)


def out_of(config: Config) -> Path:
    """Return the folder of a new run."""
    run, sampling = config.run, config.sampling
    if sampling.memory_from:
        earlier_store(sampling.memory_from).close()  # a wrong name is reported before the model is loaded
    default = f"runs/{Path(config.model.model).name}-{name_of(config.task.task)}-{sampling.preset}-seed{run.seed}"
    return Path(run.out or default)


def _with_whole_paths(config: Config, records: Records) -> Config:
    """Make the paths of task, reward, loss and model absolute, since a resume may start from another folder."""
    task, training, model = config.task, config.training, config.model.model
    named = {"task": task.task, "eval_task": task.eval_task} if records.digest else {}  # a generator's name is no path
    whole = configuration.beside(Path(), {**named, "reward": task.reward, "loss": training.loss})
    if os.path.isdir(model) and model not in built_in.NAMES:
        model = str(Path(model).absolute())
    return dataclasses.replace(
        config,
        training=dataclasses.replace(training, loss=whole.pop("loss")),
        task=dataclasses.replace(task, **whole),
        model=dataclasses.replace(config.model, model=model),
    )


def longest_prompt(config: Config) -> int:
    """Return the most tokens of a prompt that leave room for a completion."""
    return config.engine.max_model_len - max_tokens_of(config)


def _open_store(stack: ExitStack, config: Config, records: Records, folder: RunFolder) -> RolloutStore:
    run = inputs.inputs_of(config, records)
    path = folder.path / "rollouts.sqlite"
    if path.is_file():
        with RolloutStore(path, read_only=True) as earlier:
            inputs.check_inputs(config, run, earlier.run)
    store = stack.enter_context(RolloutStore(path, run=run, compared=compared))
    folder.begin(config)
    return store


def _tiny_folder(config: Config, records: Records, out: Path, display: Display, *, is_new: bool) -> str:
    """Return the folder of this run's warm-started tiny Llama, which is built for a new run, and again if it is damaged."""
    folder = out / "base_model"
    if is_new or not _loads(folder, config, display):
        prompts = _warm_up(records, config)
        tokenizer = models.tiny_tokenizer([p.text for p in prompts])
        examples = [(p.text, answer_of(p.data) or "") for p in prompts]
        checkpoint.write_folder(folder, lambda aside: models.build_tiny(aside, tokenizer, examples, seed=config.run.data_seed))
    return str(folder)


def _warm_up(records: Records, config: Config) -> list[Prompt]:
    prompts = lineage.warm_up_prompts(records, render(records, config.task, models.tiny_tokenizer()).make)
    if not prompts:
        raise InputError("model", "tiny with a task that has no answers", "answers to warm it up on", "--model another one")
    return prompts


def _loads(folder: Path, config: Config, display: Display) -> bool:
    try:
        models.load(str(folder), config.model.dtype, torch.device("cpu"))
    except InputError as e:
        display.line(f"{folder.name} is made again: {e}")
        return False
    return True


def _what_runs(config: Config, policy: Policy, task: Task, precision: str, num_ranks: int) -> str:
    several = f" · {num_ranks} ranks" if num_ranks > 1 else ""
    return (
        f"model {config.model.model} ({precision}) · task {task.name}, {len(task.held_out)} held-out prompts · "
        f"{policy.name}: up to {policy.cap} completions per prompt, {policy.group_size} kept · {config.sampling.schedule} schedule{several}"
    )


def _header(config: Config, engine: Engine, device: torch.device, num_ranks: int) -> dict[str, Any]:
    return {
        "kind": "run",
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "engine": type(engine).__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{machine.cpu_name()}, {machine.cpu_arithmetic()}",
        "ranks": num_ranks,
        "cap": configured(config.sampling).cap,
        "torch": torch.__version__,
        "reinforce_ada": installed_version("reinforce-ada"),
    }
