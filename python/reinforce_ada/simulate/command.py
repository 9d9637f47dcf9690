"""`reinforce-ada simulate`: runs the settings, shows its progress, prints the table, writes JSON and figure."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from reinforce_ada import heartbeat
from reinforce_ada.errors import InputError, needs
from reinforce_ada.files import replace_file
from reinforce_ada.outside import one_line, show
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.fit import fit_run, fit_store
from reinforce_ada.simulate.population import BetaRates, Population, read_rates
from reinforce_ada.simulate.study import HEADINGS, Setting, Study, published_settings, run_study, setting

_WHERE = "simulate"
_EVERY_S = 0.2  # time between two updates of the progress line


def run(
    policies: Sequence[str],
    schedules: Sequence[Literal["rounds", "stream"]],
    windows: Sequence[str],
    populations: Sequence[str],
    *,
    num_prompts: int | None,
    num_seeds: int,
    num_earlier: int,
    engine: Mapping[str, float],
    lengths: Mapping[str, float],
    fit: Path | None,
    json_to: Path | None,
    figure_to: Path | None,
) -> None:
    """Compare settings on populations and print a table for each.

    Args:
        policies, schedules, windows: see `settings`.
        populations: see `population`; an empty list means Beta(1, 2), or the population of `fit`.
        num_prompts: None means 64, or the number in a file.
        num_seeds, num_earlier: see `run_study`.
        engine, lengths: fields of EngineModel and LengthModel that differ from the default, or from `fit`.
        fit: a run that supplies engine, lengths and pass rates.
    Raises: InputError for any argument that cannot be used.
    """
    compared = settings(policies, schedules, windows)
    fitted = None if fit is None else fit_run(fit)
    if fitted is not None:
        show(f"{fitted}\n")
    chosen = [population(text) for text in populations] or [fitted.population if fitted else BetaRates()]
    engine_model: EngineModel = replace(fitted.engine if fitted else EngineModel(), **engine)  # type: ignore[arg-type]
    length_model: LengthModel = replace(fitted.lengths if fitted else LengthModel(), **lengths)  # type: ignore[arg-type]
    _check_files(json_to, figure_to)
    studies = []
    with _ProgressLine(len(chosen) * num_seeds * len(compared)) as progress:
        for p in chosen:
            n = num_prompts if num_prompts is not None else len(p.rates) if not isinstance(p, BetaRates) else 64
            studies.append(
                run_study(
                    compared, p, engine_model, length_model, num_prompts=n, num_seeds=num_seeds, num_earlier=num_earlier,
                    on_poll=progress.tell,
                )
            )  # fmt: skip
    for study in studies:
        show(table(study))
    if json_to is not None:
        replace_file(json_to, json.dumps([study.record() for study in studies], indent=1) + "\n", where="simulate")
    if figure_to is not None:
        from reinforce_ada.simulate import figure

        figure.draw([study.record() for study in studies], figure_to)


def population(text: str) -> Population:
    """Return the pass rates that a text names: "beta:a,b", a store, a run folder, or a file of rates.

    Raises: InputError if it names none of these.
    """
    if text.startswith("beta:"):
        try:
            a, b = map(float, text.removeprefix("beta:").split(","))
        except ValueError as e:
            raise InputError(_WHERE, f"population {text!r}", "beta:A,B with two numbers is needed") from e
        return BetaRates(a, b)
    path = Path(text)
    return fit_store(path) if path.is_dir() or path.suffix == ".sqlite" else read_rates(path)


def table(study: Study) -> str:
    """Return the study as a text with aligned columns."""
    rows = [HEADINGS, *study.cells()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    seeds = "1 seed" if study.num_seeds == 1 else f"{study.num_seeds} seeds (± is their spread)"
    about = f"{study.population}, {study.num_prompts} prompts on {study.engine.slots} slots, {seeds}"
    return "\n".join([about, *(line.rstrip() for line in lines), ""])


def settings(policies: Sequence[str], schedules: Sequence[Literal["rounds", "stream"]], windows: Sequence[str]) -> list[Setting]:
    """Return every policy with every schedule, and streams with every window; without policies, the published comparison.

    Raises: InputError for schedules or windows without a policy, for windows in rounds, and for texts that cannot be read.
    """
    if not policies:
        if schedules or windows:
            raise InputError(_WHERE, "--schedule or --window without a preset", "a preset is needed", "such as reinforce-ada-balance")
        return published_settings()
    if windows and set(schedules) == {"rounds"}:
        raise InputError(_WHERE, "--window with --schedule rounds", "rounds have no window", "leave one of them out")
    found: list[Setting] = []
    for policy in policies:
        for schedule in schedules or ("rounds", "stream"):
            found += (
                [setting(policy, "stream", w) for w in windows or ("posterior",)] if schedule == "stream" else [setting(policy, "rounds")]
            )
    return found


def _check_files(json_to: Path | None, figure_to: Path | None) -> None:
    """Raise InputError for a file that cannot be written, before the work starts."""
    for flag, path in (("--json", json_to), ("--figure", figure_to)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(_WHERE, f"{flag} {path}", "a file in a folder that exists is needed")
    if figure_to is not None and figure_to.suffix != ".png":
        raise InputError(_WHERE, f"--figure {figure_to}", "a file name that ends with .png is needed")
    if figure_to is not None:
        needs(_WHERE, "matplotlib")


class _ProgressLine:
    """The progress line on standard error, which is overwritten at each update; the heartbeat tells the same if that is no terminal."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._started = self._shown = time.monotonic()
        self._seen: dict[Any, None] = {}
        self._is_terminal = sys.stderr.isatty()

    def tell(self, s: Setting, seed: int, num_ended: int) -> None:
        """Show how far a run is."""
        self._seen[id(s), seed] = None
        now = time.monotonic()
        if now < self._shown + _EVERY_S:
            return
        self._shown = now
        elapsed = int(now - self._started)
        what = one_line(f"{s.policy_text} {s.schedule_label}, seed {seed}: {num_ended} completions")
        text = f"[{len(self._seen)}/{self._num_runs}] {elapsed // 60}:{elapsed % 60:02} {what}"
        heartbeat.begins(text)
        if self._is_terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
