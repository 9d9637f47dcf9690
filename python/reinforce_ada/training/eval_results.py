"""The results of `reinforce-ada eval`: one table, one JSON object, and the paired comparison with an earlier one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import GarbageError, finite, one_line, parse_json, printable, read_text
from reinforce_ada.training.display import length_text
from reinforce_ada.training.evaluate import Evaluation, paired_difference

_MOST_BYTES = 1 << 28  # of an earlier result: 40 bytes a prompt


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The evaluation of one task."""

    task: str  # as it was named
    evaluation: Evaluation
    keys: tuple[str, ...]  # [P], of the prompts by their content, see `tasks.content_key`

    def record(self) -> dict[str, Any]:
        """Return the entry of the JSON object."""
        return {"task": self.task, **{k: v for k, v in self.evaluation.record().items() if k != "kind"}, "prompt_keys": list(self.keys)}


@dataclass(frozen=True, slots=True)
class Difference:
    """The paired difference of Avg@k on the prompts that two evaluations share, from the earlier to the later; nan if they share none."""

    task: str
    difference: float
    stderr: float
    num_prompts: int


def json_object(model: str, settings: Mapping[str, Any], results: Sequence[TaskResult], differences: Sequence[Difference]) -> Any:
    """Return the results as one JSON object; a number that JSON cannot hold is null."""
    compared = {d.task: {"difference": d.difference, "stderr": d.stderr, "num_prompts": d.num_prompts} for d in differences}
    tasks = [{**r.record(), **({"compared": compared[r.task]} if r.task in compared else {})} for r in results]
    return finite({"kind": "eval", "model": model, "settings": dict(settings), "tasks": tasks})


def table(results: Sequence[TaskResult]) -> list[str]:
    """Return the lines of the table: a row for each task, with one standard error after each mean, and then the pass@j of each."""
    head = ("task", "prompts", "k", "Avg@k", "pass@k", "maj@k")
    rows = [head, *(_row(r.task, r.evaluation) for r in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for r in results:
        if r.evaluation.k > 1:
            lines.append(f"{printable(r.task)}: " + "   ".join(f"pass@{j} {value:.4f}" for j, value in r.evaluation.pass_at_k.items()))
        if not math.isnan(r.evaluation.completion_length_mean):
            lines.append(f"{printable(r.task)}: {length_text(r.evaluation.record())}")
        if r.evaluation.num_voids:
            lines.append(f"{printable(r.task)}: {r.evaluation.num_voids} completions could not be scored and are left out")
    return lines


def in_short(e: Evaluation) -> str:
    """Return the first number of an evaluation, with its standard error."""
    return f"Avg@{e.k} {_with_error(e.avg_at_k, e.stderr)} on {len(e.per_prompt)} prompts"


def _row(task: str, e: Evaluation) -> tuple[str, ...]:
    measured = _with_error(e.avg_at_k, e.stderr), _with_error(e.pass_at_k[str(e.k)], e.pass_at_k_stderr[str(e.k)])
    voted = "-" if e.maj_at_k is None or e.maj_at_k_stderr is None else _with_error(e.maj_at_k, e.maj_at_k_stderr)
    return printable(task), str(len(e.per_prompt)), str(e.k), *measured, voted


def _with_error(mean: float, stderr: float) -> str:
    return f"{mean:.4f} ± {stderr:.4f}"


def lines_of(differences: Sequence[Difference], earlier: Path) -> list[str]:
    """Return the comparison in words, a line for each task."""
    return [
        f"{printable(d.task)}: Avg@k {d.difference:+.4f} ± {d.stderr:.4f} against {earlier}, paired over {d.num_prompts} prompts"
        for d in differences
    ]


# -------------------- the comparison


class Earlier:
    """An evaluation that `eval --json` has written: of each task, the share of correct completions by the key of its prompt.

    Raises: InputError for a file that is no such evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = parse_json(read_text(path, _MOST_BYTES))
            tasks = found["tasks"]
            self._shares = {str(entry["task"]): _shares_of(entry) for entry in tasks}
        except GarbageError as e:
            raise InputError("eval", f"cannot read {path}: {e}", _NEEDED) from None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError("eval", f"{path} is no evaluation ({type(e).__name__}: {one_line(str(e), 60)})", _NEEDED) from None

    def check(self, tasks: Sequence[str]) -> None:
        """Raise InputError if a task is not among the earlier ones; alone, each may have another name."""
        if len(tasks) == len(self._shares) == 1:
            return
        if missing := [task for task in tasks if task not in self._shares]:
            given = f"{self.path} has no task {missing[0]}; it has {', '.join(self._shares)}"
            raise InputError("eval", one_line(given), "the same tasks in both evaluations")

    def differences(self, results: Sequence[TaskResult]) -> list[Difference]:
        """Return what has changed since, a difference for each task."""
        only = next(iter(self._shares.values())) if len(results) == len(self._shares) == 1 else None
        return [self._difference(result, self._shares[result.task] if only is None else only) for result in results]

    def _difference(self, result: TaskResult, before: Mapping[str, float]) -> Difference:
        shared = [(before[key], share) for key, share in zip(result.keys, result.evaluation.per_prompt, strict=True) if key in before]
        shared = [pair for pair in shared if not any(map(math.isnan, pair))]
        mean, stderr = paired_difference([pair[0] for pair in shared], [pair[1] for pair in shared])
        return Difference(result.task, mean, stderr, len(shared))


_NEEDED = "what `reinforce-ada eval --json` printed"


def _shares_of(entry: Mapping[str, Any]) -> dict[str, float]:
    keys, shares = entry["prompt_keys"], entry["per_prompt"]
    known = {str(key): math.nan if share is None else float(share) for key, share in zip(keys, shares, strict=True)}
    if not all(math.isnan(share) or 0 <= share <= 1 for share in known.values()):
        raise ValueError("per_prompt holds other numbers than shares")
    return known
