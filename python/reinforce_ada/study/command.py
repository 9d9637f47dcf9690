"""`reinforce-ada study`: checks a study, prints its plan, trains its runs, and writes its results, page and figure."""

from __future__ import annotations

import math
from pathlib import Path

from reinforce_ada.config.values import Processes, check
from reinforce_ada.errors import InputError, needs
from reinforce_ada.explain.efficiency import posteriors
from reinforce_ada.files import replace_file
from reinforce_ada.outside import is_installed, one_line, show
from reinforce_ada.study import results as result_files
from reinforce_ada.study.page import FIGURE, PROGRESS_FIGURE, page, prediction_table
from reinforce_ada.study.plan import Cell, cells_of, keep, untrained_run
from reinforce_ada.study.prediction import Prediction, predict
from reinforce_ada.study.results import Results
from reinforce_ada.study.runs import RunError, execute_all, execute_once, is_finished, pass_rates, shard_of
from reinforce_ada.study.settings import WHERE, Study, read_study

PAGE = "page.md"


def run(path: Path, *, out: Path | None = None, shard: str = "1/1", num_jobs: int = 1, report: bool = False) -> int:
    """Run or report a study, and return 0, or 1 if a run failed.

    Raises: InputError for a study that cannot be run, before anything runs.
    """
    study, part = read_study(path), _shard(shard)
    check(WHERE, "num_jobs", num_jobs, Processes)
    out = out or Path("studies") / study.name
    if report:
        _write_page(result_files.read(out), out)
        return 0
    needs(WHERE, "tomli_w")  # for the configurations of the runs
    predictions = _predictions(study, out)
    cells = cells_of(study, predictions)
    keep(out, [cell.run for cell in cells])
    _show_plan(study, cells, predictions)
    num_failed = execute_all(out, shard_of(cells, part), show, num_jobs)
    results = result_files.collect(study, predictions, cells, out)
    for name in result_files.damaged(results, cells, out):
        show(f"{name} is left out: its log lacks a step or the last evaluation; without its folder the same command trains it again")
    show(str(result_files.write(results, out)))
    _write_page(results, out)
    if num_failed:
        show(f"{num_failed} runs failed; the same command tries them again")
    return 1 if num_failed else 0


def _shard(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not slash or not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()) or len(text) > 20:
        raise InputError(WHERE, f"--shard {one_line(text, 40)}", "I/N, such as 1/2 and 2/2 on two machines")
    if not 1 <= int(first) <= int(last):
        raise InputError(WHERE, f"--shard {text}", "I from 1 to N")
    return int(first), int(last)


def _predictions(study: Study, out: Path) -> list[Prediction]:
    untrained = untrained_run(study)
    keep(out, [untrained])
    if not is_finished(out, untrained):
        show("the untrained model is evaluated")
    try:
        execute_once(out, untrained)
    except RunError as e:
        raise InputError(
            WHERE, f"the untrained model cannot be evaluated: {e}", "a configuration that `reinforce-ada train` accepts"
        ) from None
    rates = pass_rates(out, untrained)
    show(f"held-out reward of the untrained model: {math.fsum(rates) / len(rates):.3f} on {len(rates)} prompts")
    population = posteriors(rates, untrained.config(out).task.eval_k)
    return [predict(study, arm, population) for arm in study.arms]


def _show_plan(study: Study, cells: list[Cell], predictions: list[Prediction]) -> None:
    rates = sum(len(arm.learning_rates) for arm in study.arms)
    show(f"{study.name}: {len(study.arms)} arms, {rates} pairs of arm and learning rate, {len(study.seeds)} seeds: {len(cells)} runs")
    show(f"every run ends after the step in which it reaches {study.budget}; baseline {study.baseline}")
    show(prediction_table(predictions, study.baseline))


def _write_page(results: Results, out: Path) -> None:
    has_figure = is_installed("matplotlib") and bool(results.runs)
    if has_figure:
        from reinforce_ada.study import figure

        for name, draw in ((FIGURE, figure.draw), (PROGRESS_FIGURE, figure.draw_progress)):
            draw(results, out / name)
            show(str(out / name))
    elif results.runs:
        show('no figure: matplotlib is not installed; pip install "reinforce-ada[report]", then --report')
    replace_file(out / PAGE, page(results, has_figure=has_figure), where=WHERE)
    show(str(out / PAGE))
