"""vLLM in this process, measured: `run` against `LLM.generate`, and schedules against each other beside the simulator's prediction.

    python benchmarks/write_engines.py [--turns 5] [--only tiny|smollm2]

Takes about a quarter of an hour on two quiet cores. benchmarks/engines.json has the numbers; the tables of docs/engines.md are made of
them. All that is compared runs in one process and takes turns, each turn with another one first; medians are shown, with the range.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.config import TaskConfig
from reinforce_ada.driver import run
from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.sampling import AdaptiveSampler, History, Policy, preset
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.sampling.windows import PosteriorWindow
from reinforce_ada.simulate.engine_model import EngineModel
from reinforce_ada.simulate.run import simulate
from reinforce_ada.training import models
from reinforce_ada.training.tasks import load_records, render
from reinforce_ada.types import Completion, CompletionId, Prompt, Request, SamplingResult

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs/engines.md", ROOT / "benchmarks/engines.json"
CAP = 32
MEAN_LENGTH = 24
Reward = Callable[[Prompt, str], float]


# -------------------- what is asked of what


@dataclass(frozen=True)
class Setting:
    """A model, prompts with rewards, and the engine's limits."""

    name: str
    about: str
    model: str
    dtype: str
    prompts: tuple[Prompt, ...]
    reward: Reward
    max_tokens: int
    slots: int
    repeats: int  # of the comparison with `LLM.generate` in a turn: short runs scatter more


def tiny(folder: Path) -> Setting:
    """A Llama of 100 000 random weights: a decode step costs about the same for 1 sequence as for 64, as on a GPU.

    Completions end at random, so lengths are geometric up to the limit. One is right by a hash of its text, at a rate of its prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    texts = [f"question {i}" for i in range(32)]
    tokenizer = models.tiny_tokenizer(texts)
    models.build_tiny(folder, tokenizer, [(texts[0], "3")], seed=0, num_updates=0)
    module = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        # The same embedding for every token gives the same hidden state everywhere: the end comes at one rate, the rest is uniform.
        module.get_input_embeddings().weight.copy_(module.get_input_embeddings().weight[-1].clone())  # not the first: padding is 0
        hidden = module.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        head = module.get_output_embeddings().weight
        head.zero_()
        head[tokenizer.eos_token_id] = hidden / hidden.square().sum() * math.log(len(head) / MEAN_LENGTH)
    module.save_pretrained(folder)
    rates = np.random.default_rng(0).beta(1, 2, len(texts))
    prompts = tuple(Prompt(f"p{i}", tuple(tokenizer(t).input_ids), t, {"rate": float(rates[i])}) for i, t in enumerate(texts))

    def reward(prompt: Prompt, text: str) -> float:
        digest = hashlib.sha256(f"{prompt.prompt_id} {text}".encode()).digest()
        return float(int.from_bytes(digest[:8], "big") < prompt.data["rate"] * 2**64)

    return Setting("tiny", "Llama of 100 000 weights, float32", str(folder), "float32", prompts, reward, 96, slots=64, repeats=4)


def smollm2() -> Setting:
    """SmolLM2-135M asked for sums of two digits without being told to be brief: right where the sum is in the answer."""
    from transformers import AutoTokenizer

    path = models.path_of("smollm2")
    config = TaskConfig(system_prompt="", num_examples=0, eval_prompts=0)
    task = render(load_records(config, 0, 0), config, AutoTokenizer.from_pretrained(path))

    def reward(prompt: Prompt, text: str) -> float:
        return float(bool(re.search(rf"(?<!\d){re.escape(str(prompt.data['answer']))}(?!\d)", text)))

    prompts = tuple(islice(task.train(0), 12))
    return Setting("smollm2", "SmolLM2-135M-Instruct, bfloat16", path, "bfloat16", prompts, reward, 48, slots=64, repeats=1)


# -------------------- an engine that is watched


@dataclass
class Steps:
    """Of each decode step: seconds, sequences, prompt tokens of those that began."""

    seconds: list[float] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)

    def extend(self, other: Steps) -> None:
        self.seconds += other.seconds
        self.busy += other.busy
        self.prompt_tokens += other.prompt_tokens


class Watched:
    """A VllmEngine whose calls are timed."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._running: set[CompletionId] = set()
        self._begun = 0
        self.submitted: list[Request] = []
        self.steps = Steps()
        self.seconds = 0.0  # inside the engine

    @property
    def free_slots(self) -> int:
        return self._engine.free_slots

    def submit(self, requests: Sequence[Request]) -> None:
        self._running.update(r.id for r in requests)
        self._begun += sum(len(r.prompt.token_ids) for r in requests)
        self.submitted += requests
        self._timed(lambda: self._engine.submit(requests))

    def poll(self) -> list[Completion]:
        busy, before = len(self._running), self.seconds
        done: list[Completion] = self._timed(self._engine.poll)
        self._running.difference_update(c.id for c in done)
        self.steps.seconds.append(self.seconds - before)
        self.steps.busy.append(busy)
        self.steps.prompt_tokens.append(self._begun)
        self._begun = 0
        return done

    def abort(self, ids: Sequence[CompletionId]) -> None:
        self._running.difference_update(ids)
        self._timed(lambda: self._engine.abort(ids))

    def _timed(self, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - began
        return result

    def sync_weights(self, named_tensors: Any, policy_version: int) -> None:
        self._engine.sync_weights(named_tensors, policy_version)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


# -------------------- run against LLM.generate


def throughput(engine: VllmEngine, setting: Setting, turns: int) -> dict[str, Any]:
    """Seconds of the same requests, in the same order, through `run`, and through `LLM.generate` with the text of each and without.

    And the share of `run` that is not the engine's.
    """
    policy = preset("grpo", group_size=8)
    first = Watched(engine)
    run(AdaptiveSampler(setting.prompts, policy, step=1), first, setting.reward)
    requests = first.submitted
    seconds: dict[str, list[float]] = {"run": [], "generate": [], "generate without text": []}
    answers, share = [], []
    for turn in range(turns):
        order = list(seconds)
        for which in order[turn % 3 :] + order[: turn % 3]:
            engine.forget_prefixes()
            began = time.perf_counter()
            if which == "run":
                watched = Watched(engine)
                result = run(AdaptiveSampler(setting.prompts, policy, step=1), watched, setting.reward)
                share.append(1 - watched.seconds / (time.perf_counter() - began))
                answers = _tokens_of(result, requests)
            else:
                _generated(engine, requests, with_text=which == "generate")
            seconds[which].append(time.perf_counter() - began)
    backwards = [list(o.outputs[0].token_ids) for o in _generated(engine, requests[::-1], with_text=False)][::-1]
    same = statistics.fmean(a == b for a, b in zip(answers, backwards, strict=True))
    assert same == 1 or setting.dtype != "float32", "the same requests must give the same tokens"
    return {
        "requests": len(requests),
        "tokens": sum(map(len, answers)),
        "same": same,
        "seconds": seconds,
        "ratio": {k: statistics.median(r / s for r, s in zip(seconds["run"], seconds[k], strict=True)) for k in seconds if k != "run"},
        "share": statistics.median(share),
    }


def _tokens_of(result: SamplingResult, requests: Sequence[Request]) -> list[list[int]]:
    found = {s.id: s.completion.token_ids.tolist() for pool in result.pools for s in pool.scored}
    return [found[r.id] for r in requests]


def _generated(engine: VllmEngine, requests: Sequence[Request], *, with_text: bool) -> Any:
    params = [engine._params(r) for r in requests]
    for p in params:
        p.detokenize = with_text
    prompts = [{"prompt_token_ids": list(r.prompt.token_ids)} for r in requests]
    return engine._llm.generate(prompts, params, use_tqdm=False)


# -------------------- schedules


@dataclass(frozen=True)
class Method:
    name: str
    policy: Policy
    schedule: Schedule = "stream"
    window: Any = None


def methods() -> list[Method]:
    """The first is all there could be: its completions are what the others are predicted from."""
    balance = preset("reinforce-ada-balance", max_rounds=4, round_size=8)
    each = preset("reinforce-ada-balance", max_rounds=4, round_size=8, decide_every=1)
    assert balance.cap == CAP
    return [
        Method(f"fixed, n = {CAP}", preset("grpo", group_size=CAP)),
        Method("fixed, n = 8", preset("grpo", group_size=8)),
        Method("balance, rounds", balance, "rounds"),
        Method("balance, stream, window 8", balance, "stream", 8),
        Method("balance, stream, posterior window", balance, "stream", PosteriorWindow(balance)),
        Method("balance each, stream, posterior window", each, "stream", PosteriorWindow(each)),
    ]


@dataclass
class Measured:
    """One method over all turns."""

    method: str
    wall_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waste: list[float] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)


class Recorded:
    """A world whose completions have been sampled: outcomes and lengths [P, CAP]."""

    def __init__(self, correct: NDArray[np.bool_], tokens: NDArray[np.int64]) -> None:
        self._correct, self._tokens = correct, tokens

    @property
    def num_prompts(self) -> int:
        return len(self._tokens)

    def histories(self, num_earlier: int) -> list[History]:
        return [History(1.0, 1.0)] * self.num_prompts

    def draw(self, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        return self._correct[prompt_of, index], self._tokens[prompt_of, index]


def schedules(engine: VllmEngine, setting: Setting, turns: int) -> dict[str, Any]:
    """Every method on the same prompts and seeds, in turns; then each on the virtual clock with the very same completions."""
    all_methods = methods()
    measured = [Measured(m.name) for m in all_methods]
    steps = Steps()
    world: Recorded | None = None
    for turn in range(turns):
        for i in range(len(all_methods)):
            k = (i + turn) % len(all_methods) if turn else i
            engine.forget_prefixes()
            watched = Watched(engine)
            m = all_methods[k]
            began = time.perf_counter()
            sampler = AdaptiveSampler(setting.prompts, m.policy, step=1, schedule=m.schedule, window=m.window)
            result = run(sampler, watched, setting.reward)
            _note(measured[k], time.perf_counter() - began, watched.steps, result.metrics)
            steps.extend(watched.steps)
            world = world or _recorded(result, setting)
    assert world is not None
    model, r2 = _fitted(steps, setting)
    for m, found in zip(all_methods, measured, strict=True):
        o = simulate(world, m.policy, model, schedule=m.schedule, window=m.window)  # type: ignore[arg-type]
        found.predicted = {"wall_s": o.wall_s, "tokens": o.tokens, "waste": o.waste}
    lengths = world._tokens.ravel()
    return {
        "prompts": len(setting.prompts),
        "slots": setting.slots,
        "engine": {**asdict(model), "r2": r2},
        "lengths": {str(q): float(np.quantile(lengths, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        | {"mean": float(lengths.mean()), "max_tokens": setting.max_tokens, "at_the_limit": float((lengths == setting.max_tokens).mean())},
        "pass_rates": {str(q): float(np.quantile(world._correct.mean(1), q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "methods": [asdict(x) for x in measured],
    }


def _note(found: Measured, wall_s: float, steps: Steps, metrics: Any) -> None:
    tokens = sum(steps.busy)  # a step gives each sequence one
    found.wall_s.append(wall_s)
    found.tokens.append(tokens)
    found.waste.append(1 - metrics["tokens_committed"] / tokens)
    found.signal.append(metrics["signal_fraction"])
    found.samples.append(metrics["samples_per_prompt"])


def _recorded(result: Any, setting: Setting) -> Recorded:
    correct, tokens = (np.zeros((len(setting.prompts), CAP), t) for t in (np.bool_, np.int64))
    for p, pool in enumerate(result.pools):
        for k, scored in enumerate(pool.scored):
            correct[p, k], tokens[p, k] = scored.reward > 0.7, len(scored.completion.token_ids)
    return Recorded(correct, tokens)


def _fitted(steps: Steps, setting: Setting) -> tuple[EngineModel, float]:
    """Least squares: seconds = step + busy x sequences + prefill x prompt tokens; and the share of the variance it explains."""
    seconds = np.array(steps.seconds)
    columns = np.stack([np.ones_like(seconds), np.array(steps.busy), np.array(steps.prompt_tokens)], axis=1)
    some = columns[:, 1] > 0
    (step, busy, prefill), *_ = np.linalg.lstsq(columns[some], seconds[some], rcond=None)
    rest = seconds[some] - columns[some] @ np.array([step, busy, prefill])
    prompt_tokens = round(float(np.mean([len(p.token_ids) for p in setting.prompts])))
    model = EngineModel(setting.slots, max(step, 0) * 1e3, max(busy, 0) * 1e3, max(prefill, 0) * 1e3, prompt_tokens)
    return model, float(1 - rest.var() / seconds[some].var())


# -------------------- the page


def tables(results: dict[str, Any]) -> Iterator[str]:
    for found in results.values():
        t, s = found["throughput"], found["schedules"]
        e, n = s["engine"], s["lengths"]
        yield from _throughput_lines(found["about"], s, t)
        yield ""
        yield f"Lengths: mean {n['mean']:.0f}, quantiles {_quantiles(n)} (5, 25, 50, 75, 95 %), {n['at_the_limit']:.0%} at the limit of"
        yield f"{n['max_tokens']}. Pass rates: {_quantiles(s['pass_rates'], 2)}. A decode step takes {e['step_ms']:.2f} ms +"
        yield f"{e['busy_ms']:.3f} ms a sequence + {e['prefill_ms']:.4f} ms a prompt token (least squares, R² {e['r2']:.2f}); predicted is"
        yield "what the simulator says of that engine and the very same completions."
        yield ""
        yield "| sampling | wall-clock s | predicted | tokens | predicted | waste | predicted | with signal | samples a prompt |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for m in s["methods"]:
            p = m["predicted"]
            yield (
                f"| {m['method']} | {_median(m['wall_s'])} | {p['wall_s']:.2f} | {statistics.median(m['tokens']):.0f} | {p['tokens']:.0f} "
                f"| {statistics.median(m['waste']):.1%} | {p['waste']:.1%} | {statistics.median(m['signal']):.0%} "
                f"| {statistics.median(m['samples']):.1f} |"
            )
        yield ""


def _throughput_lines(about: str, s: dict[str, Any], t: dict[str, Any]) -> Iterator[str]:
    times = {k: _median(v) for k, v in t["seconds"].items()}
    with_text, without = (t["ratio"][k] for k in ("generate", "generate without text"))
    yield f"**{about}**, {s['prompts']} prompts, {s['slots']} slots. `LLM.generate` of {t['requests']} requests, {t['tokens']} tokens, with"
    yield f"logprobs and text: {times['generate']} s; without text: {times['generate without text']} s. `run`, texts and rewards included:"
    yield f"{times['run']} s, {with_text:.3f} and {without:.3f} times as long. Outside of the engine (sampler, driver, rewards):"
    yield f"{t['share']:.2%} of the wall-clock. Asked for in reverse order, {t['same']:.0%} of the completions have the same tokens."


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _quantiles(values: dict[str, float], digits: int = 0) -> str:
    return ", ".join(f"{values[str(q)]:.{digits}f}" for q in (0.05, 0.25, 0.5, 0.75, 0.95))


def write_page(results: dict[str, Any]) -> None:
    """The measurements of docs/engines.md."""
    begin, end = "<!-- measured: generated by make engines-docs -->", "<!-- end of measured -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(before + begin + "\n\n" + "\n".join(tables(results)) + end + after)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for make in (lambda: tiny(Path(folder) / "tiny"), smollm2):
            setting = make()
            if options.only not in setting.name:
                continue
            engine = VllmEngine(
                setting.model, dtype=setting.dtype, max_tokens=setting.max_tokens, max_model_len=512, max_num_seqs=setting.slots
            )
            run(AdaptiveSampler(setting.prompts, preset("grpo", group_size=2), step=0), engine, setting.reward)  # warm
            found = {
                "about": setting.about,
                "throughput": throughput(engine, setting, options.turns * setting.repeats),
                "schedules": schedules(engine, setting, options.turns),
            }
            results[setting.name] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_page(results)
            engine.close()


if __name__ == "__main__":
    main()
