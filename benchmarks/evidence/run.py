"""Trains the arms of docs/evidence.md: `python benchmarks/evidence/run.py sort rotate`, about an hour a task on two cores.

For each task a first study tries learning rates with two seeds of its own, further ones while an arm's best lies at the edge of what it has
tried, and a second study trains every arm at its best rate with eight other seeds. Both can be killed and go on. Their runs are in
`--work`; study files and results stay here, in a folder for each study.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from reinforce_ada.study import command
from reinforce_ada.study import results as result_files
from reinforce_ada.study.results import Results
from reinforce_ada.study.statistics import best_rate
from reinforce_ada.study.summary import finals_by_rate

HERE = Path(__file__).resolve().parent
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = slice(2, 5)  # every arm is run with these
RATE_SEEDS, SEEDS = (100, 101), tuple(range(8))
ARMS = {
    "grpo-8": 'preset = "grpo"',
    "grpo-4": 'preset = "grpo"\ngroup_size = 4',
    "grpo-16": 'preset = "grpo"\ngroup_size = 16',
    "dapo-8": 'preset = "dapo"\ngroup_size = 8',
    "pos": 'preset = "reinforce-ada-pos"',
    "balance": 'preset = "reinforce-ada-balance"',
    "exact": 'preset = "reinforce-ada-exact"',
    "memory-1": 'preset = "reinforce-ada-memory"',
    "predicted-1": 'preset = "reinforce-ada-memory"\nbaseline = "predicted"',
    "memory-2": 'preset = "reinforce-ada-memory"\ngroup_size = 2',
}
STUDY = """\
name = "{name}"
baseline = "grpo-8"
seeds = {seeds}
remembered = 4

[budget]
generated_completions = 9600
completions_per_step = 96

[shared]
model = "tiny"
task = "{task}"
dtype = "float32"
device = "cpu"
engine = "transformers"
system_prompt = ""
template = "plain"
num_examples = 0
eval_prompts = 512
eval_k = 4
eval_every = 10
max_tokens = 8
checkpoint_every = 0
"""
Digits = list[str]
TASKS: dict[str, tuple[int, int, Callable[[Digits], Digits]]] = {  # fewest and most digits, and the answer
    "sort": (2, 5, sorted),
    "unique": (2, 6, lambda digits: list(dict.fromkeys(digits))),
    "rotate": (2, 7, lambda digits: digits[1:] + digits[:1]),
}


def questions(task: str) -> Iterator[dict[str, str]]:
    """Yield up to 3000 different questions of a task, of random lengths."""
    fewest, most, answer = TASKS[task]
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        digits = [str(rng.randint(0, 9)) for _ in range(rng.randint(fewest, most))]
        prompt = f"{task} {''.join(digits)} ="
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": "".join(answer(digits))}


def study_file(name: str, task: Path, seeds: tuple[int, ...], rates: dict[str, tuple[float, ...]]) -> str:
    """Return a study file with these learning rates of each arm."""
    arms = [f'[[arm]]\nname = "{arm}"\n{keys}\nlearning_rates = {list(rates[arm])}\n' for arm, keys in ARMS.items()]
    return "\n".join([STUDY.format(name=name, task=task.name, seeds=list(seeds)), *arms])


def run(task: str, num_jobs: int) -> None:
    """Run both studies of a task, in this folder."""
    file = Path(f"{task}.jsonl")
    file.write_text("".join(json.dumps(question) + "\n" for question in questions(task)))
    tried = dict.fromkeys(ARMS, LEARNING_RATES[FIRST])
    while True:
        found = run_study(f"{task}-rates", study_file(f"{task}-rates", file, RATE_SEEDS, tried), num_jobs)
        best = {arm: best_rate(finals_by_rate(found, arm)) or LEARNING_RATES[FIRST][0] for arm in ARMS}
        wider = {arm: with_neighbours(best[arm], tried[arm]) for arm in ARMS}
        if wider == tried:
            break
        tried = wider
    run_study(task, study_file(task, file, SEEDS, {arm: (rate,) for arm, rate in best.items()}), num_jobs)


def with_neighbours(best: float, tried: tuple[float, ...]) -> tuple[float, ...]:
    """Return the rates with those below and above the best one."""
    i = LEARNING_RATES.index(best)
    return tuple(sorted({*tried, *LEARNING_RATES[max(i - 1, 0) : i + 2]}))


def run_study(name: str, text: str, num_jobs: int) -> Results:
    """Run a study and keep its file and results beside this script."""
    file = Path(f"{name}.toml")
    file.write_text(text)
    if command.run(file, out=Path(name), num_jobs=num_jobs):
        raise SystemExit(f"runs of {name} failed")
    kept = HERE / name
    kept.mkdir(exist_ok=True)
    shutil.copy(file, kept / "study.toml")
    shutil.copy(Path(name) / result_files.RESULTS, kept / result_files.RESULTS)
    return result_files.read(Path(name))


def main() -> None:
    """Run the tasks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--work", type=Path, default=Path("studies/evidence"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)  # a study file names its task by a path from here
    for task in given.tasks:
        run(task, given.jobs)


if __name__ == "__main__":
    main()
