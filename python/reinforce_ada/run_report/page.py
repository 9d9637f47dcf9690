"""The page of a run: one HTML file that answers what was learned, at what cost, what the answers look like, and what it was run with."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from reinforce_ada import config as configuration
from reinforce_ada.files import replace_file
from reinforce_ada.outside import one_line
from reinforce_ada.plots import DARK, LIGHT
from reinforce_ada.rollouts import SampledPool
from reinforce_ada.run_report import figure
from reinforce_ada.run_report.answers import answers, read_sample
from reinforce_ada.run_report.markup import Head, document, element, picture, table
from reinforce_ada.run_report.reading import WHERE, Run, as_float, read_run
from reinforce_ada.run_report.style import SCRIPT, STYLE
from reinforce_ada.run_report.table import Rows, average, cost_rows, evaluation_rows, gain_of, mean_signal

_MOST_STEPS = 200  # rows of the table of steps
_LONGEST = 500  # characters of a value of the configuration
# Columns of the table of steps: the head, the number of the log, and its format.
_STEP_COLUMNS = (
    ("step", "step", "d"), ("reward, first round", "first_round_reward", ".3f"), ("with signal", "signal_fraction", ".0%"),
    ("samples per prompt", "samples_per_prompt", ".1f"), ("wasted", "waste_fraction", ".1%"), ("length", "completion_length_mean", ".1f"),
    ("loss", "loss", ".4f"), ("gradient norm", "grad_norm", ".3g"), ("learning rate", "learning_rate", ".3g"),
    ("sampling s", "sampling_s", ".1f"), ("training s", "training_s", ".1f"),
)  # fmt: skip


def write(run_dir: Path, path: Path) -> None:
    """Write the page of the run in `run_dir`. Raises: InputError when there is no run, or the file cannot be written."""
    run = read_run(run_dir)
    replace_file(path, page(run, *read_sample(run_dir)), where=WHERE)


def page(run: Run, pools: Sequence[SampledPool], num_steps: int) -> str:
    """Return the page; `pools` and `num_steps` are what `answers.read_sample` gives."""
    sections: list[tuple[str, list[Element]]] = [
        ("Did it learn?", _learned(run)),
        ("What did it cost?", _cost(run)),
        ("What do its answers look like?", answers(run, pools, num_steps)),
        ("What was it run with?", _settings(run)),
    ]
    links = [element("a", title, href=f"#part-{i}") for i, (title, _) in enumerate(sections)]
    parts = [part for i, (title, elements) in enumerate(sections) for part in (element("h2", title, id=f"part-{i}"), *elements)]
    head = [element("h1", run.title), element("p", _state(run), class_="note"), _tiles(run), element("nav", *links)]
    return document(f"{run.name}: {run.title}", element("main", *head, *parts), style=STYLE, script=SCRIPT)


def _state(run: Run) -> str:
    last, planned = max((r["step"] for r in run.steps), default=0), run.setting("training", "steps")
    of = f" of {planned:,}" if type(planned) is int and planned != last else ""
    settings = (("seed", "run", "seed"), ("learning rate", "training", "learning_rate"), ("dtype", "model", "dtype"))
    known = [f"{name} {_value(found)}" for name, *key in settings if (found := run.setting(*key)) is not None]
    return " · ".join([f"{one_line(run.name, 120)}, after step {last:,}{of}", *known])


# -------------------- at a glance


def _tiles(run: Run) -> Element:
    tiles = [element("div", element("dt", name), *(element("dd", line) for line in lines)) for name, *lines in _glance(run)]
    return element("dl", *tiles, class_="tiles")


def _glance(run: Run) -> Iterator[tuple[str, ...]]:
    """Yield (what, number, explanation)."""
    if run.evals:
        first, last = run.evals[0], run.evals[-1]
        ends = [f"{as_float(e.get('avg_at_k')):.3f}" for e in ([first, last] if first is not last else [last])]
        gain = gain_of(run.evals)
        change = f"{gain.difference:+.3f} ± {gain.stderr:.3f} over {gain.num_prompts} prompts" if gain else f"after step {last['step']}"
        yield f"held-out Avg@{last['k']}", " → ".join(ends), change
    if not run.steps:
        return
    issued, wasted = run.total("num_completions_issued"), run.total("num_completions_issued") - run.total("num_completions_committed")
    yield (
        "completions generated",
        f"{issued:,}",
        f"{wasted / max(issued, 1):.1%} wasted" + (f", cap {run.cap} per prompt" if run.cap else ""),
    )
    yield (
        "tokens generated",
        f"{run.total('tokens_committed') + run.total('tokens_wasted'):,}",
        f"{run.total('tokens_trained'):,} trained on",
    )
    sampling, training = (float(np.nansum(run.series(metric))) for metric in ("sampling_s", "training_s"))
    yield "time of the steps", _duration(sampling + training), f"{_duration(sampling)} sampling, {_duration(training)} training"
    if not math.isnan(signal := mean_signal(run)):
        yield "prompts with a learning signal", f"{signal:.0%}", "on average over the steps"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


# -------------------- the sections


def _learned(run: Run) -> list[Element]:
    found = [element("p", _verdict(run)), _plots(run, ["reward", "pass_rates"] if run.steps else ["reward"])]
    if run.evals:
        found.append(_pairs(evaluation_rows(run.evals)))
    if len(run.evals) > 2:
        rows = [([f"{e['step']:,}", str(e["k"]), average(e)], "") for e in _thinned(run.evals, _MOST_STEPS)]
        heads = (("step", "number"), ("k", "number"), ("held-out Avg@k ± standard error", "number"))
        found.append(_folded("Every evaluation", run.evals, table(heads, rows, class_="sortable")))
    return found


def _verdict(run: Run) -> str:
    """Say whether the held-out reward has changed by more than two standard errors."""
    if not run.evals:
        return "No held-out evaluation has been logged, so the page cannot say whether the model answers new questions better."
    if len(run.evals) == 1:
        return f"There is one held-out evaluation so far: Avg@{run.evals[-1]['k']} is {average(run.evals[-1])}."
    gain = gain_of(run.evals)
    if gain is None or math.isnan(gain.difference) or math.isnan(gain.stderr):
        return "The first and the last evaluation cannot be compared, prompt by prompt."
    size = f"by {abs(gain.difference):.3f} ± {gain.stderr:.3f} (standard error, paired over {gain.num_prompts} prompts)"
    if abs(gain.difference) <= 2 * gain.stderr or gain.difference == 0:
        return f"Not visibly: the held-out reward changed {size}, which is within two standard errors, so chance can explain it."
    better = gain.difference > 0
    return f"{'Yes' if better else 'It got worse'}: the held-out reward {'rose' if better else 'fell'} {size}."


def _cost(run: Run) -> list[Element]:
    if not run.steps:
        return [element("p", "No step has been logged.", class_="note")]
    heads: list[Head] = [(name, "number") for name, *_ in _STEP_COLUMNS]
    rows = [([_number(record.get(key), form) for _, key, form in _STEP_COLUMNS], "") for record in _thinned(run.steps, _MOST_STEPS)]
    steps = _folded("Every step", run.steps, table(heads, rows, class_="sortable"))
    has_lengths = not np.isnan(run.series("completion_length_mean")).all()
    return [_plots(run, ["samples", "signal", "time", *(["length"] if has_lengths else [])]), _pairs(cost_rows(run)), steps]


def _number(value: Any, form: str) -> str:
    number = as_float(value)
    return "" if math.isnan(number) else format(int(number) if form == "d" else number, form)


def _thinned(records: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return at most `most` of the records, evenly, with the first and the last."""
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]


def _folded(title: str, records: Sequence[Any], content: Element) -> Element:
    shown = title if len(records) <= _MOST_STEPS else f"{_MOST_STEPS} of {len(records):,} ({title.lower()} is in log.jsonl)"
    return element("details", element("summary", shown), content)


def _plots(run: Run, names: Sequence[str]) -> Element:
    pictures = [picture(figure.svg(name, run, LIGHT), figure.svg(name, run, DARK), figure.PANELS[name].about) for name in names]
    return element("div", *pictures, class_="plots")


def _pairs(rows: Rows) -> Element:
    body = [element("tr", element("td", name), element("td", value)) for name, value in rows]
    return element("table", element("tbody", *body), class_="pairs")


# -------------------- the configuration


def _settings(run: Run) -> list[Element]:
    config = run.header.get("config") or {}
    about = [(name, _value(value)) for name, value in run.header.items() if name not in ("kind", "config")]
    changed, rest = _by_default(config)
    found: list[Element] = []
    if changed:
        found += [element("p", "These keys differ from their defaults:"), _pairs(changed)]
    elif config:
        found.append(element("p", "Every key has its default."))
    else:
        found.append(element("p", "The log does not say what the run was started with.", class_="note"))
    if about:
        found += [element("p", "The run and its machine:"), _pairs(about)]
    if rest:
        found.append(element("details", element("summary", f"The {len(rest)} keys that have their defaults"), _pairs(rest)))
    return found


def _by_default(config: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Return the keys that differ from their defaults, and those that do not."""
    defaults = json.loads(json.dumps(dataclasses.asdict(configuration.Config())))
    changed: Rows = []
    rest: Rows = []
    for section, keys in config.items():
        for key, value in keys.items():
            known = defaults.get(section, {})
            (rest if key in known and known[key] == value else changed).append((f"{section}.{key}", _value(value)))
    return changed, rest


def _value(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _LONGEST)
