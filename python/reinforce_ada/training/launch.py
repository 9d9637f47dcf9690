"""Build a trainer or an evaluation from a configuration: model, task, engine, rewards, store, in the order that fails fastest."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reinforce_ada import machine
from reinforce_ada.config import Config
from reinforce_ada.engines.base import Engine, Launch
from reinforce_ada.engines.traced import Trace, TracedEngine, no_span
from reinforce_ada.errors import InputError, needs
from reinforce_ada.loading import whole
from reinforce_ada.outside import installed_version, is_installed
from reinforce_ada.rewards import RewardPool
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import Policy, configured
from reinforce_ada.training import adapters, checkpoint, distributed, lineage, models, run_folder, track
from reinforce_ada.training.display import Display
from reinforce_ada.training.distributed import RankError, Ranks
from reinforce_ada.training.evaluate import Evaluation, evaluate
from reinforce_ada.training.language_model import HuggingFaceModel
from reinforce_ada.training.learner import Learner
from reinforce_ada.training.loss import RunLoss
from reinforce_ada.training.run_folder import RunFolder
from reinforce_ada.training.task_files import answer_of
from reinforce_ada.training.tasks import Records, Task, load_records, render
from reinforce_ada.training.track import Trackers
from reinforce_ada.training.trainer import Parts, Trainer, compared, earlier_store, fingerprint
from reinforce_ada.types import Prompt


def train(config: Config, resume: Path | None = None) -> None:
    """Run `config` to its end, from the start or resuming `resume`; under torchrun on every rank.

    Raises: InputError for anything the configuration, the folder or the machine cannot do. SystemExit on a rank other than 0 when the run
        fails, which rank 0 reports.
    """
    quiet_libraries(config.model.model)
    with distributed.join() as ranks:
        if ranks.rank == 0:
            _lead(config, resume, ranks)
            return
        try:
            path, dtype = ranks.receive()
            model = ranks.together(lambda: _load(path, dtype, pick_device(config.model.device), config))
            Learner(model, config, ranks).follow()
        except RankError:  # rank 0 reports it
            raise SystemExit(1) from None


def _lead(config: Config, resume: Path | None, ranks: Ranks) -> None:
    display = Display()
    policy, engine_name, device = configured(config.sampling), pick_engine(config.engine.engine), pick_device(config.model.device)
    precision = _precision(config.model.dtype, device)
    config = with_dtype(config, device)
    track.check_names(config.run.track)
    needs("train", "tomli_w")  # for the configuration in the run folder, which is written after the model has been loaded
    if config.model.lora_rank:
        needs("train", "peft", "--lora-rank 0 trains the weights and needs nothing more")
    records = load_records(config.task, config.run.seed, config.run.data_seed)
    config = _with_whole_paths(config, records)
    if resume is None:
        if config.model.model not in ("smollm2", "tiny"):
            models.path_of(config.model.model)  # refuses what is no whole model
        lineage.check_held_out(records, config.model.model)
    RunLoss.from_config(config)  # raises for settings that the loss refuses, before anything is made
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder.existing(resume) if resume else run_folder.new(_out(config)))
        out = folder.path
        rewards = stack.enter_context(make_rewards(config, records))
        # A resumed run must fit its store before anything slow happens. A new run gets a store only when all else has been made, so that a
        # first attempt with a wrong setting leaves no run behind.
        store = _open_store(stack, config, records, folder) if resume else None
        torch.manual_seed(config.run.seed)
        is_tiny = config.model.model == "tiny"
        path = _tiny_folder(config, records, out, display, is_new=resume is None) if is_tiny else models.path_of(config.model.model)
        ranks.send([(path, config.model.dtype)] * ranks.size)
        model = ranks.together(lambda: _load(path, config.model.dtype, device, config))
        task = render(records, config.task, model.tokenizer, longest=_longest_prompt(config))
        for note in task.notes:
            display.line(note)
        weights = out / "weights"
        if config.engine.weights_dir:
            weights = stack.enter_context(run_folder.weights_folder(Path(config.engine.weights_dir), folder.name))
        engine = stack.enter_context(make_engine(engine_name, config, path, model, device, weights, display))
        display.line(_what_runs(config, policy, task, precision, ranks.size))
        if isinstance(model, adapters.AdaptedModel):
            display.line(str(model))
        trackers = stack.enter_context(closing(Trackers(config.run.track, out, dataclasses.asdict(config), display.line)))
        trace = stack.enter_context(closing(Trace(Path(config.run.profile)))) if config.run.profile else None
        store = store or _open_store(stack, config, records, folder)
        parts = Parts(model, TracedEngine(engine, trace) if trace else engine, rewards, task.train, task.held_out, policy, store)
        trainer = Trainer(parts, config, out, display, ranks, trackers, trace.span if trace else no_span)
        if resume:
            trainer.resume()
        if not any(record["kind"] == "run" for record in trainer.log.records):
            trainer.log.write({**_header(config, engine, device, ranks.size), "run_id": store.id})
        trainer.run()
    if any(record["kind"] != "run" for record in trainer.log.records):
        finish(out, display)
    else:
        display.line(f"{out}: no step and no evaluation, so there is nothing to report")
    if trace:
        display.line(f"profile {trace.path}")


def finish(out: Path, display: Display) -> None:
    """Print the closing table and draw the figure of a run."""
    from reinforce_ada import report

    display.table(f"{out}", report.summary_table(out))
    if not is_installed("matplotlib"):
        display.line('no figure: matplotlib is not installed; pip install "reinforce-ada[report]", then reinforce-ada report')
        return
    display.line(f"figure {report.draw(out)} · model {out / 'model'} · log {out / 'log.jsonl'}")


def evaluate_model(config: Config, model_name: str) -> Evaluation:
    """Return Avg@k and pass@k of any model on the held-out prompts of the configured task."""
    if distributed.world_size() > 1:
        raise InputError("eval", f"WORLD_SIZE={distributed.world_size()}", "one process: only train works with several", "no torchrun")
    quiet_libraries(model_name)
    display = Display(stderr=True)
    policy, engine_name, device = configured(config.sampling), pick_engine(config.engine.engine), pick_device(config.model.device)
    precision = _precision(config.model.dtype, device)
    config = with_dtype(config, device)
    if model_name == "tiny":
        raise InputError("eval", "the model 'tiny'", "a model folder", "train --model tiny writes one")
    records = load_records(config.task, config.run.seed, config.run.data_seed)
    if not records.held_out:
        raise InputError("eval", "no held-out prompts", "at least one", "raise --eval-prompts")
    folder = Path(model_name)
    are_adapters = models.is_adapters(folder)
    path = adapters.base_of(folder) if are_adapters else models.path_of(model_name)
    records, left_out = lineage.without_trained(records, model_name if lineage.run_beside(model_name) else path)
    with ExitStack() as stack:
        rewards = stack.enter_context(make_rewards(config, records))
        dtype = config.model.dtype
        model = adapters.load(folder, dtype, device) if are_adapters else models.load(path, dtype, device)
        task = render(records, config.task, model.tokenizer, longest=_longest_prompt(config))
        for note in filter(None, (*task.notes, left_out)):
            display.line(note)
        scratch = Path(stack.enter_context(_scratch(config.engine.weights_dir)))
        display.line(f"model {model_name} ({precision})")
        engine = stack.enter_context(make_engine(engine_name, config, path, model, device, scratch, display))
        engine.sync_weights(model.named_tensors(), 0)
        with display.sampling("held-out") as on_progress:
            return evaluate(
                engine, rewards, task.held_out, k=config.task.eval_k, seed=config.run.seed, policy_version=0,
                positive_threshold=policy.positive_threshold, request_timeout_s=config.engine.request_timeout_s or None,
                on_progress=on_progress,
            )  # fmt: skip


def _load(path: str, dtype: str, device: torch.device, config: Config) -> HuggingFaceModel:
    """Return the model that is trained, with new adapters if the configuration has a rank for them."""
    model = models.load(path, dtype, device)
    return adapters.add(model, config.model, config.run.seed) if config.model.lora_rank else model


def export(source: Path, target: Path | None, dtype: str) -> Path:
    """Write the whole model of a run that trained adapters, and return its folder; see `adapters.export`."""
    quiet_libraries(str(source))
    return adapters.export(source, target, dtype)


def model_path(name: str) -> str:
    """Return the path that an engine loads for a model of this name."""
    return models.path_of(name)


def pick_device(name: str) -> torch.device:
    """Return the device to train on. Raises: InputError for cuda if there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train", "device cuda", "a CUDA device and a torch built for it", "--device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return distributed.local_device(name)


def with_dtype(config: Config, device: torch.device) -> Config:
    """Return the configuration with dtype "auto" replaced by the one that `device` computes in; a run keeps it wherever it is resumed."""
    if config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=machine.native_dtype(device.type)))


def _precision(dtype: str, device: torch.device) -> str:
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
    return RewardPool(records.reward, num_workers=config.engine.reward_workers, timeout_s=config.engine.reward_timeout_s)


def make_engine(
    name: str, config: Config, path: str, model: HuggingFaceModel, device: torch.device, weights: Path, display: Display
) -> AbstractContextManager[Engine]:
    """Return the engine of that name, from the function `launch` of its module. `weights` is for weights that other processes load."""
    limits = {
        "max_tokens": config.sampling.max_tokens,
        "max_model_len": config.engine.max_model_len,
        "max_num_seqs": config.engine.max_num_seqs,
        "temperature": config.sampling.temperature,
        "stop": tuple(config.sampling.stop),
    }
    vocab_size = int(model.causal_lm.get_input_embeddings().weight.shape[0])  # the model can read only token ids below it
    run = Launch(
        config.engine, path, config.model.dtype, device.type, model.causal_lm, model.tokenizer, vocab_size, weights, limits, display.line
    )  # fmt: skip
    return closing(import_module(f"reinforce_ada.engines.{name}").launch(run))


def quiet_libraries(model: str) -> None:
    """Silence warnings that do not concern the run, and keep a local model offline. Call it before transformers is imported."""
    if model in ("smollm2", "tiny") or Path(model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # raised by packages that are compiled at their first import
    warnings.filterwarnings("ignore", module=r"(vllm|transformers|torch)\b.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("vllm").setLevel(logging.ERROR)


def _out(config: Config) -> Path:
    """Return the folder of a new run."""
    run, sampling = config.run, config.sampling
    if sampling.memory_from:
        earlier_store(sampling.memory_from).close()  # a wrong name is reported before the model is loaded
    default = f"runs/{Path(config.model.model).name}-{Path(config.task.task).stem}-{sampling.preset}-seed{run.seed}"
    return Path(run.out or default)


@contextmanager
def _scratch(weights_dir: str) -> Iterator[str]:
    """Yield a folder for the weights of an evaluation, inside the one that servers can read."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="eval-", dir=weights_dir or None)
    except OSError as e:
        raise InputError("engine", f"cannot write weights to {weights_dir}: {e.strerror}", "a writable folder", "--weights-dir") from e
    with folder as scratch:
        os.chmod(scratch, 0o755)
        yield scratch


def _with_whole_paths(config: Config, records: Records) -> Config:
    """Make the paths of task, reward, loss and model absolute, since a resume may start from another folder."""
    task, model = config.task.task, config.model.model
    if records.digest:
        task = str(Path(task).absolute())
    if os.path.isdir(model) and model not in ("smollm2", "tiny"):
        model = str(Path(model).absolute())
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, task=task, reward=whole(config.task.reward)),
        training=dataclasses.replace(config.training, loss=whole(config.training.loss)),
        model=dataclasses.replace(config.model, model=model),
    )


def _longest_prompt(config: Config) -> int:
    return config.engine.max_model_len - config.sampling.max_tokens


def _check_file(config: Config, run: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Keep the stored paths of files that have been moved but not renamed. Raises: InputError if the questions changed."""
    then, now = earlier.get("task", {}), run["task"]
    if _function(then.get("reward", "")) == _function(now["reward"]):
        now["reward"] = then.get("reward", "")
    model = earlier.get("model", {}).get("model", "")
    if os.path.basename(model) == os.path.basename(run["model"]["model"]):
        run["model"]["model"] = model
    if not earlier.get("records") or not run["records"]:
        return
    if earlier["records"] != run["records"]:
        given = f"{config.task.task} has changed since the run began"
        raise InputError("train", given, "the file as it was", "put it back, or begin a new run with another --out")
    now["task"] = then.get("task", now["task"])


def _function(reward: str) -> str:
    """Return a reward without its folder, and the same for a file as for a module."""
    return os.path.basename(reward).replace(".py:", ":")


def _open_store(stack: ExitStack, config: Config, records: Records, folder: RunFolder) -> RolloutStore:
    run = {**fingerprint(config), "records": records.digest}
    path = folder.path / "rollouts.sqlite"
    if path.is_file():
        with RolloutStore(path, read_only=True) as earlier:
            _check_file(config, run, earlier.run)
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
