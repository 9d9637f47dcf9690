"""Run the cells: python -m install_matrix.run [WORDS OF A CELL'S NAME...]

A cell that passed with the same sources is not run again, so a run that was interrupted goes on; `build/matrix` keeps what each printed.
uv makes the environments and finds the interpreters; UV_FIND_LINKS and UV_EXTRA_INDEX_URL name sources of CPU builds of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from install_matrix.cells import CELLS, QUESTIONS, TEST_TOOLS, Cell
from install_matrix.page import RESULTS, ROOT, write_page

BUILD = ROOT / "build/matrix"
SOURCES = ("CMakeLists.txt", "cmake", "csrc", "pyproject.toml", "python")
SHOWN = ("torch", "numpy", "transformers")
PYTEST = "python -m pytest -q -p no:cacheprovider"
# Bytes and times of the sampler are claims about one version on one machine. torch.compile is tried with the pinned torch alone.
TESTS = (
    f"{PYTEST} tests/sampling --ignore tests/sampling/test_core_speed.py",
    f'{PYTEST} tests/ops -k "reference and not compile"',
    f"{PYTEST} tests/test_examples.py -k python_blocks",
)
COMMANDS = ("train", "eval", "export", "push", "study", "explain", "report", "simulate", "serve", "bench", "completion", "doctor")
# What runs in every cell.
CHECKS = ("python imports.py", "reinforce-ada doctor --check", *(f"reinforce-ada {command} --help" for command in COMMANDS))
_IMPORTS = """
import importlib, pkgutil, reinforce_ada
from reinforce_ada.errors import EXTRA_OF
names = [m.name for m in pkgutil.walk_packages(reinforce_ada.__path__, "reinforce_ada.", onerror=lambda name: None)]
lacks = {}
for name in names:
    if name.endswith("__main__") or "cuda" in name or "triton" in name:
        continue  # the forms for a GPU are imported where one is found
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        assert e.name.partition(".")[0] in {*EXTRA_OF, *OTHERS}, (name, e)
        lacks[name] = e.name
print(len(names) - len(lacks), "modules import;", *(f"{name} lacks {package}" for name, package in lacks.items()))
"""
# What no extra installs: trainers that have an integration, and what these bring.
OTHERS = {"verl", "slime", "areal", "transfer_queue", "omegaconf", "tensordict", "aiohttp"}


def digest() -> str:
    """Return a digest of what is built and of what the cells run."""
    tree = [path for top in SOURCES for path in ([ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*")))]
    found = hashlib.sha256()
    for path in tree:
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


class Failed(Exception):  # noqa: N818 - an outcome of a cell, which is recorded
    """A command of a cell ended with another status than 0."""


def shell(line: str, cwd: Path, log: Path, path: Path | None = None) -> str:
    """Run one line of the shell, with the programs in `path` first, and return its output, which is added to `log`. Raises: Failed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"REINFORCE_ADA_CUDA": "OFF"}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600
    )
    with log.open("a") as file:
        file.write(f"$ {line}\n{done.stdout}\n")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [""]
        raise Failed(f"{line[:80]}: status {done.returncode}: {lines[-1][:200]}")
    return done.stdout


def wheel_of(python: str, sources: str, log: Path) -> Path:
    """Return the wheel for a Python, which is built once."""
    folder = BUILD / f"wheels-{sources}-{python}"
    if not list(folder.glob("*.whl")):
        shell(f"uv build -q --wheel --python {python} --out-dir {folder} {ROOT}", ROOT, log)
    return next(folder.glob("*.whl"))


def run_cell(cell: Cell, sources: str, log: Path) -> dict[str, Any]:
    """Install and run one cell from nothing, and return its record. Raises: Failed."""
    wheel = wheel_of(cell.python, sources, log)
    env, place = BUILD / f"env-{os.getpid()}", BUILD / f"place-{os.getpid()}"
    place.mkdir(parents=True)
    try:
        shell(f"uv venv -q --python {cell.python} {env}", ROOT, log)
        extras = f"[{','.join(cell.extras)}]" if cell.extras else ""
        tools = TEST_TOOLS if cell.tests else ()
        wanted = " ".join(f"'{x}'" for x in (f"reinforce-ada{extras} @ file://{wheel}", *cell.requires, *tools))
        shell(f"uv pip install -q --python {env}/bin/python {wanted}", ROOT, log)
        found = shell(f"uv pip list --format json -q --python {env}/bin/python", ROOT, log)
        versions = {x["name"]: x["version"] for x in json.loads(found)}
        (place / "q.jsonl").write_text(QUESTIONS)
        (place / "imports.py").write_text(f"OTHERS = {OTHERS!r}\n{_IMPORTS}")
        for line in (*CHECKS, *cell.commands):
            shell(line, place, log, env / "bin")
        passed = 0
        for line in TESTS if cell.tests else ():
            passed += int(re.findall(r"(\d+) passed", shell(line, ROOT, log, env / "bin"))[-1])
        python = shell("python -c 'import platform; print(platform.python_version())'", place, log, env / "bin").strip()
    finally:
        for folder in (env, place):
            shutil.rmtree(folder, ignore_errors=True)
    shown = {name: versions[name] for name in SHOWN if name in versions}
    return {**asdict(cell), "sources": sources, "python_version": python, "versions": shown, "tests_passed": passed}


def is_done(cell: Cell, record: dict[str, Any] | None, sources: str) -> bool:
    """Return whether this record is of this cell as it is now, with the same sources."""
    now = json.loads(json.dumps({**asdict(cell), "sources": sources}))
    return record is not None and {key: record.get(key) for key in now} == now


def main(words: list[str]) -> int:
    """Run what is not done yet with one line for each cell, write the results and the page, and return 1 if one failed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources, failures = digest(), 0
    for cell in CELLS:
        if words and not any(word in cell.name for word in words):
            continue
        if is_done(cell, records().get(cell.name), sources):
            print(f"{cell.name}: done before", flush=True)
            continue
        log = BUILD / f"{re.sub(r'[^a-z0-9.]+', '-', cell.name)}.log"
        log.unlink(missing_ok=True)
        try:
            record = run_cell(cell, sources, log)
        except Failed as e:
            failures, record = 1, {}
            print(f"{cell.name}: FAILED, see {log.relative_to(ROOT)}: {e}", flush=True)
        else:
            print(f"{cell.name}: passed, {record['versions']}, {record['tests_passed']} tests", flush=True)
        known = {**records(), cell.name: record}
        RESULTS.write_text(json.dumps([known[c.name] for c in CELLS if known.get(c.name)], indent=1) + "\n")
        write_page()
    return failures


def records() -> dict[str, dict[str, Any]]:
    """Return the record of each cell that passed, by name; they are read each time, since another run may add some."""
    return {record["name"]: record for record in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
