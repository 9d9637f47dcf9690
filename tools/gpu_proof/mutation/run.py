"""Runs every mutant of mutants.py: builds it, and holds it to the cases of its operators until one fails.

    make test-gpu-mutations MUTATION_FLAGS="[--only REGEX] [--again]"

CUDA sources are compiled for the CPU and run under cuda_on_cpu, Triton kernels run in the interpreter. What a mutant came to is kept in
build/gpu_mutants/results.json as soon as it is known, so an interrupted run goes on where it was. A source whose mutants are those of
docs/gpu_mutations.md is not tried again; when all are known that page is written. Two mutants run at a time, each in a process forked
after the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from gpu_proof import ROOT
from gpu_proof.cuda_on_cpu.build import build_module
from gpu_proof.mutation.mutants import Mutant, all_mutants
from gpu_proof.mutation.report import PAGE, RESULTS, SURVIVED, known, read, render

PROCESSES = 2
LIMIT_S = 300  # a mutant that runs longer hangs
CUDA_OPERATORS = ("token_logprobs", "group_advantages", "policy_loss")
LINEAR_OPERATORS = ("linear_token_logprobs", "linear_policy_loss")
RULES = ("barrier", "bound", "clamp", "mask", "guard", "choice", "other", "part", "where", "limit")  # the order in which they are tried
SCRATCH = ROOT / "build/gpu_mutants"

# They are about torch's side of an operator, take long, and do not fork well: torch.compile, opcheck.
SKIPPED = re.compile(r"torch|compile|fake|offsets_past_int32")


def operators_of(mutant: Mutant) -> list[str]:
    """Whose cases a mutant has to fail."""
    folder = Path(mutant.file).parent.name
    if folder == "common":
        return list(CUDA_OPERATORS)
    if folder == "ops":
        return ["token_logprobs", *LINEAR_OPERATORS]
    return [folder, "linear_policy_loss"] if folder == "linear_token_logprobs" else [folder]


def backend_of(mutant: Mutant) -> str:
    return "triton" if mutant.file.endswith(".py") else "cuda"


# -------------------- in a child


class FromTree:
    """A finder that takes the package from `tree` first: an editable installation stands before everything on sys.path."""

    def __init__(self, tree: Path) -> None:
        self.top = [str(tree / "python")]

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path or self.top) if name.partition(".")[0] == "reinforce_ada" else None


def try_cases(tree: Path, backend: str, operators: Iterable[str], report: Path, *, every: bool) -> None:
    """Runs the cases against the sources in `tree` until one fails, or every one; writes which failed, and how long each took."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    outcome, running = SURVIVED, ""
    try:
        sys.meta_path.insert(0, FromTree(tree))
        if backend == "cuda":
            os.environ["CUDA_ON_CPU_MODULE"] = str(build_module(tree / "csrc"))
            import_module("gpu_proof.cuda_on_cpu.plugin")
        else:
            import_module("gpu_proof.interpreter_guards").install()
        cases = import_module("cases")  # brings the operators
        assert Path(str(sys.modules["reinforce_ada"].__file__)).is_relative_to(tree), "the operators are not those of the tree"
        known = [(op, case) for op in operators for case in _cases(op)]
        for op, case in sorted(known, key=_order(backend)):
            running, began = f"{op}: {case.name}: ", time.perf_counter()
            if running in UNSOUND:
                continue
            try:
                with np.errstate(all="ignore"):
                    cases.run(case, backend, "cpu")
            except Exception as error:
                if not every:
                    raise
                failed[running] = str(error)[:200]
            times[f"{backend} {op} {case.name}"] = time.perf_counter() - began
        assert known, f"no case for {operators}"
    except BaseException as error:  # whatever a wrong kernel makes of it
        outcome = f"{running}{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    report.write_text(json.dumps({"outcome": outcome, "times": times, "failed": failed}))


def _cases(op: str) -> list[Any]:
    return [case for case in import_module(f"cases_{op}").CASES if not case.large and not SKIPPED.search(case.name)]


DURATIONS: dict[str, float] = {}
KILLS: Counter[str] = Counter()
UNSOUND: set[str] = set()


def _order(backend: str) -> Callable[[tuple[str, Any]], tuple[Any, ...]]:
    """One case of each check first, then the second of each, and so on; of these the ones that killed most, then the short ones."""
    met: Counter[str] = Counter()

    def key(pair: tuple[str, Any]) -> tuple[Any, ...]:
        op, case = pair
        check = f"{op} {case.name.split('-')[0]}"
        met[check] += 1
        return met[check], -KILLS[f"{op}: {case.name}"], DURATIONS.get(f"{backend} {op} {case.name}", 1.0)

    return key


# -------------------- in the parent


class Child:
    """A forked process that tries one mutant, or the sources as they are."""

    def __init__(self, mutant: Mutant | None, backend: str, operators: list[str]) -> None:
        self.mutant = mutant
        self.tree = SCRATCH / f"{os.getpid()}-{time.monotonic_ns()}"
        self.report = self.tree / "report.json"
        self.began = time.perf_counter()
        plant(self.tree, mutant)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            log = os.open(self.tree / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                try_cases(self.tree, backend, operators, self.report, every=mutant is None)
            finally:
                os._exit(0)

    def outcome(self) -> dict[str, Any] | None:
        """None while it runs."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done == 0:
            if self.mutant is None or time.perf_counter() - self.began < LIMIT_S:
                return None
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            result: dict[str, Any] = {"outcome": f"does not end within {LIMIT_S} s", "times": {}}
        elif self.report.exists():
            result = json.loads(self.report.read_text())
        else:
            result = {"outcome": f"the process died with status {status}", "times": {}}
        result["seconds"] = round(time.perf_counter() - self.began, 1)
        shutil.rmtree(self.tree)
        return result


def plant(tree: Path, mutant: Mutant | None) -> None:
    """The sources as links, but for the mutated file."""
    for folder in ("csrc", "python/reinforce_ada"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                link = tree / path.relative_to(ROOT)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    if mutant is not None:
        changed = tree / mutant.file
        changed.unlink()
        changed.write_text(mutant.apply((ROOT / mutant.file).read_text()))


def _sound_first(mutants: Iterable[Mutant]) -> None:
    """How long the cases take on the unchanged sources; from one that fails there nothing is learned."""
    needed = {(backend_of(m), tuple(operators_of(m))) for m in mutants}
    for backend, operators in sorted(needed):
        child = Child(None, backend, list(operators))
        while (result := child.outcome()) is None:
            time.sleep(0.05)
        if result["outcome"] != SURVIVED:
            sys.exit(f"the {backend} kernels of {', '.join(operators)} fail as they are: {result['outcome']}")
        DURATIONS.update(result["times"])
        UNSOUND.update(result["failed"])
        for name, error in result["failed"].items():
            print(f"left out, it fails on the sources as they are: {backend} {name}{error}", flush=True)
        print(f"{backend} {', '.join(operators)}: sound in {result['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="regular expression that a mutant's file and name must match")
    parser.add_argument("--again", action="store_true", help="try what is known once more")
    options = parser.parse_args()
    mutants, page = all_mutants(), read(PAGE.read_text())
    results = known(mutants, page)
    chosen = [m for m in mutants if re.search(options.only, f"{m.file} {m.name}")]
    left = [m for m in chosen if options.again or m.name not in results]
    if left:
        _warm()
        _sound_first(left)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for mutant, outcome in _outcomes(sorted(left, key=lambda m: RULES.index(m.rule))):
        results[mutant.name] = outcome
        RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    missing = [m.name for m in mutants if m.name not in results]
    survivors = {m.name: page.reasons.get(m.name, "") for m in mutants if results.get(m.name) == SURVIVED}
    if not missing:
        PAGE.write_text(render(mutants, survivors))
    for name in (name for name, reason in survivors.items() if not reason):
        print(f"survived, and nobody has said why it may: {name}")
    killed = len(mutants) - len(survivors) - len(missing)
    print(f"{len(mutants)} mutants, {killed} killed, {len(survivors)} survived, {len(missing)} not tried")
    sys.exit(bool(missing) or not all(survivors.values()))


def _outcomes(left: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with what it came to, as soon as that is known."""
    running: list[Child] = []
    total, began = len(left), time.perf_counter()
    while left or running:
        while left and len(running) < PROCESSES:
            mutant = left.pop(0)
            running.append(Child(mutant, backend_of(mutant), operators_of(mutant)))
        time.sleep(0.02)
        for child in list(running):
            if (result := child.outcome()) is None:
                continue
            running.remove(child)
            assert child.mutant is not None
            KILLS[": ".join(result["outcome"].split(": ")[:2])] += 1
            done = total - len(left) - len(running)
            print(f"{done}/{total} {time.perf_counter() - began:.0f} s  {child.mutant.name}: {result['outcome']}", flush=True)
            yield child.mutant, result["outcome"]


def _warm() -> None:
    """Imports what does not depend on the sources, once; a child begins with it."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("numpy", "pytest", "torch", "torch._subclasses.fake_tensor", "triton", "triton.language"):
        import_module(name)
    assert "reinforce_ada" not in sys.modules


if __name__ == "__main__":
    main()
