"""pytest-benchmark over the catalogue that `reinforce-ada bench` runs: results are checked first, then candidates take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce_ada.bench import machine, record
from reinforce_ada.bench.case import Case
from reinforce_ada.bench.measure import Session, settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the cases of `reinforce-ada bench --quick`, at its shapes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the operator that the module names."""
    if "case" in metafunc.fixturenames:
        from reinforce_ada.bench.catalogue import choose

        metafunc.parametrize("case", choose([metafunc.module.OP], quick=metafunc.config.getoption("--quick")), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are those of baselines, and matrix products at full size take their time."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    name = "cuda" if torch.cuda.is_available() else "cpu"
    with settings(name):
        yield name


@pytest.fixture(scope="session")
def about(device: str) -> dict[str, Any]:
    return machine.about(device)


@pytest.fixture
def measure(benchmark: Any, device: str, about: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Callable[[Case], None]:
    """Checks and times one case; `extra_info` receives the record, its verdicts and the machine."""

    def run(case: Case) -> None:
        session, own = Session(case, device), []
        benchmark.pedantic(lambda: own.append(session.subject()), setup=session.turn, rounds=session.rounds)
        found = session.record(own)
        verdicts = [dataclasses.asdict(v) for v in record.verdicts(found)]
        rates = {"gb_per_s": found.gb_per_s, "gflop_per_s": found.gflop_per_s}
        benchmark.extra_info.update({**dataclasses.asdict(found), **rates, "verdicts": verdicts, "about": about})
        with capsys.disabled():
            print("", *(f"  {v['goal']}: {v['reached']} {v['spread']}" for v in verdicts), sep="\n")

    return run
