"""What docs/install.md and pyproject.toml say was installed is what the matrix recorded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from install_matrix import cells, page, run
from reinforce_ada import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECORDS = json.loads(page.RESULTS.read_text())


def test_the_page_has_the_table_of_the_results():
    text = page.PAGE.read_text()
    assert page.page_with(text, RECORDS) == text
    assert page.page_with(text, RECORDS[:-1]) != text


def test_the_classifiers_are_the_pythons_whose_tests_passed():
    tested = {record["python"] for record in RECORDS if record["tests_passed"] > 1000}
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)}
    assert named == tested
    assert PROJECT["requires-python"] == f">={min(tested, key=lambda v: int(v.partition('.')[2]))}"


def test_the_lower_bounds_of_the_library_were_run():
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)$", x).groups() for x in PROJECT["dependencies"] if ";" not in x)
    lowest = [r["versions"] for r in RECORDS if r["tests_passed"]]
    assert any(all(f"{versions[name]}.".startswith(f"{bound}.") for name, bound in bounds.items()) for versions in lowest)


def test_every_extra_has_a_row_or_is_named_as_left_out():
    ran = {extra for record in RECORDS for extra in record["extras"]}
    text = page.PAGE.read_text()
    left_out = set(re.findall(r"`(\w+)` was not part of the matrix", text))
    assert ran | left_out == set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_the_records_are_of_cells_that_exist():
    by_name = {cell.name: json.loads(json.dumps(vars(cell))) for cell in cells.CELLS}
    assert len(by_name) == len(cells.CELLS)
    for record in RECORDS:
        assert {key: record[key] for key in by_name[record["name"]]} == by_name[record["name"]]


def test_every_command_prints_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert set(run.COMMANDS) == set(re.findall(r"^  (\w+) +\w", shown, re.MULTILINE))


def test_a_line_that_fails_is_an_error_with_its_last_line_and_is_in_the_log(tmp_path):
    log = tmp_path / "log"
    assert run.shell("echo fine", tmp_path, log) == "fine\n"
    with pytest.raises(run.Failed, match=r"^echo gone; exit 3: status 3: gone$"):
        run.shell("echo gone; exit 3", tmp_path, log)
    assert log.read_text() == "$ echo fine\nfine\n\n$ echo gone; exit 3\ngone\n\n"


def test_the_digest_is_of_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "python").mkdir()
    (tmp_path / "python/a.py").write_text("1")
    first = run.digest()
    (tmp_path / "python/a.so").write_text("built")
    assert run.digest() == first
    (tmp_path / "python/a.py").write_text("2")
    assert run.digest() != first


def test_a_cell_is_done_with_the_same_sources_and_the_same_commands():
    record = RECORDS[0]
    (cell,) = (cell for cell in cells.CELLS if cell.name == record["name"])
    assert run.is_done(cell, record, record["sources"])
    assert not run.is_done(cell, None, record["sources"])
    assert not run.is_done(cell, record, "others")
    assert not run.is_done(cell, {**record, "requires": ["torch==2.7.0"]}, record["sources"])
