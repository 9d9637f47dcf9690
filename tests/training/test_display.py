"""What a person watching the run sees: names as they are, and nothing that steers the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from reinforce_ada.sampling import Progress
from reinforce_ada.training.display import Display

# Names and texts as files, tasks, servers and rewards may have them, and how they are shown.
NAMES = {
    "plain é 漢字": "plain é 漢字",
    "x[/b]": "x[/b]",
    "[bold red]loud[/]": "[bold red]loud[/]",
    ":smile: $x_{": ":smile: $x_{",
    "a\x1b[2Jb\x07": "a\\x1b[2Jb\\x07",
    "\x9b31m\r": "\\x9b31m\\r",
    "\udcff\u202e": "\\udcff\\u202e",
    "{0} %s {task}": "{0} %s {task}",
}
CONTROL = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff\u202e]")  # all but the escapes that rich itself writes


@pytest.mark.parametrize(("given", "shown"), NAMES.items())
def test_lines_and_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str], given: str, shown: str) -> None:
    display = Display()
    display.line(given)
    display.table(given, [(given, given)])
    out = capsys.readouterr().out
    assert out.count(shown) == 4
    assert not re.search("[\x1b]", out)
    assert not CONTROL.search(out)


@pytest.mark.parametrize(("given", "shown"), NAMES.items())
def test_bars_show_names_as_they_are(given: str, shown: str) -> None:
    display, out = Display(), io.StringIO()
    display._console = Console(file=out, force_terminal=True, width=200, highlight=False, markup=False, emoji=False)
    with display.training(given, 10) as advance:
        advance(3)
    with display.sampling(given) as update:
        update(Progress(4, 2, 1, 1, 8, 6, 3, 1, 10, 2))
    assert shown in out.getvalue()
    assert not CONTROL.search(out.getvalue().replace("\r", ""))


def test_without_a_terminal_a_line_tells_of_the_progress_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    times, looks = [0.0], []

    def engine() -> dict[str, float]:
        looks.append(times[-1])
        return {}

    display = Display(stderr=True, clock=lambda: times[-1])
    with display.sampling("held-out", engine) as update:
        for now in (1.0, 29.0, 31.0, 32.0, 60.0, 61.5, 300.0):
            times.append(now)
            update(Progress(4, 2, 1, 1, 8, 6, 620, 1, 0, 2))
    assert looks == [1.0, 29.0, 31.0, 32.0, 60.0, 61.5, 300.0]  # the meter averages over all of them
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[:2] for line in lines] == [["held-out", f"{s} s"] for s in (31, 62, 300)]
    assert lines[0].endswith(" tok/s")
