"""The display for a person who watches the run: a bar while sampling and training, a line per step, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from reinforce_ada import heartbeat
from reinforce_ada.outside import printable
from reinforce_ada.sampling import Progress

LINE_EVERY_S = 30.0  # where no bar can be drawn


class Display:
    """Rich bars on a terminal, plain lines elsewhere (rich draws no bar into a pipe); on standard error if the output is a result."""

    def __init__(self, *, stderr: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._clock = clock
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=stderr)

    def line(self, text: str) -> None:
        """Print one line, even while a bar is shown."""
        self._console.print(_literal(text))
        heartbeat.heard()

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print two columns under a title."""
        from rich.table import Table

        table = Table(title=_literal(title), title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(_literal(name), _literal(value))
        self._console.print(table)

    @contextmanager
    def sampling(self, what: str, engine: Callable[[], Mapping[str, float]] = dict) -> Iterator[Callable[[Progress], None]]:
        """Show a bar over eliminated prompts with the metrics of `engine`; yield the function that the driver calls after every poll.

        Where there is no terminal, a line says the same every 30 s.
        """
        started = said = self._clock()
        with self._bar(what, "{task.fields[text]}") as (bar, task):

            def update(p: Progress) -> None:
                nonlocal said
                now = self._clock()
                done = p.num_prompts - p.num_active
                num_tokens = p.num_tokens + p.num_tokens_wasted
                text = (
                    f"{p.num_active} active, {done} eliminated · {p.num_committed} of {p.num_issued} committed · "
                    f"signal {p.num_with_signal / max(p.num_prompts, 1):.2f} · waste {p.num_tokens_wasted / max(num_tokens, 1):.2f} · "
                    f"{load_text(engine())}{num_tokens / max(now - started, 1e-3):.0f} tok/s"
                )
                if not self._console.is_terminal and now - said >= LINE_EVERY_S:
                    said = now
                    self.line(f"{what} · {now - started:.0f} s · {text}")
                bar.update(task, total=p.num_prompts, completed=done, text=text)

            yield update

    @contextmanager
    def training(self, what: str, num_tokens: int) -> Iterator[Callable[[int], None]]:
        """Show a bar over completion tokens; yield a function that takes how many more have been trained on."""
        started = time.monotonic()
        with self._bar(what, "{task.fields[text]}") as (bar, task):

            def advance(count: int) -> None:
                bar.advance(task, count)
                done = bar.tasks[0].completed
                text = f"{done:.0f} tokens · {done / max(time.monotonic() - started, 1e-3):.0f} tok/s"
                bar.update(task, text=text)
                heartbeat.begins(f"{what} · {text}")

            bar.update(task, total=num_tokens)
            yield advance

    @contextmanager
    def _bar(self, what: str, text: str) -> Iterator[tuple[Any, Any]]:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        heartbeat.begins(what)
        words = [TextColumn(form, markup=False) for form in ("{task.description}", text)]
        columns = (words[0], BarColumn(bar_width=20), words[1], TimeElapsedColumn())
        with Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            yield bar, bar.add_task(printable(what), total=None, text="")


def _literal(text: str) -> Any:
    """Return text that rich prints literally: names of files, tasks and servers contain brackets, and rewards print anything."""
    from rich.text import Text

    return Text(printable(text))


def load_text(metrics: Mapping[str, float]) -> str:
    """Return the busy slots, queue, prefix hits and restarts of an engine that reports them."""
    texts = {
        "engine_busy_slots": "{:.0f} busy · ",
        "engine_queue": "{:.0f} queued · ",
        "engine_prefix_hit_rate": "{:.2f} prefix hits · ",
        "engine_restarts": "{:.0f} restarts · ",
    }
    shown = [name for name in texts if metrics.get(name) or (name == "engine_busy_slots" and name in metrics)]
    return "".join(texts[name].format(metrics[name]) for name in shown)


def length_text(metrics: Mapping[str, float]) -> str:
    """Return the mean length of the completions and the share that was cut at max_tokens, of a step's record or an evaluation's."""
    return f"length {metrics['completion_length_mean']:.0f}, {metrics['truncated_fraction']:.0%} cut"


def truncation_warning(truncated_fraction: float, max_tokens: int) -> str:
    """Return a line for the user if most completions were cut at max_tokens; "" otherwise."""
    if not truncated_fraction > 0.5:  # nan: none was scored
        return ""
    return (
        f"warning: {truncated_fraction:.0%} of the completions were cut at max_tokens = {max_tokens} before their end, where most rewards "
        "look for the answer; raise --max-tokens (and --max-model-len) in a new run, or ask for shorter answers"
    )


def step_line(record: dict[str, Any], steps: int) -> str:
    """Return the line of one finished step."""
    trouble = "".join(f"{record[f'num_{what}']:.0f} {what} · " for what in ("voids", "lost") if record[f"num_{what}"])
    kl = f"KL {record['kl']:.4f} · " if "kl" in record else ""
    return (
        f"step {record['step']:>3}/{steps} · reward {record['first_round_reward']:.3f} · signal {record['signal_fraction']:.2f} · "
        f"samples/prompt {record['samples_per_prompt']:.1f} · waste {record['waste_fraction']:.2f} · {length_text(record)} · {trouble}"
        f"kept {record['num_completions_kept']:.0f} · loss {record['loss']:+.4f} · {kl}grad {record['grad_norm']:.2f} · "
        f"{load_text(record)}"
        f"sampling {record['sampling_s']:.1f} s ({record['sampling_tokens_per_s']:.0f} tok/s) · training {record['training_s']:.1f} s"
    )
