"""Whatever is typed, or stands in a configuration file: it works, or one line says what is needed. No traceback, no hang."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from cli_fuzz import EARLY, RATE_FILES, RATE_JSONS, TOML_FILES, TOML_VALUES, VALUES, Ended, flags_of, lines, make_world, run_line
from reinforce_ada import config
from reinforce_ada.config import values
from reinforce_ada.config.serving import Serving
from reinforce_ada.errors import InputError
from reinforce_ada.explain.costs import Costs
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel

NUM_IN_PROCESS, NUM_IN_CAMPAIGN, NUM_OF_A_WORKER = 150, 1500, 100
ONE_LINE = re.compile(r"[^\n\r]{1,4000}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


# -------------------- command lines


def test_hostile_command_lines_end_with_one_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    quick = [
        line for line in lines(seed=7, count=2 * NUM_IN_PROCESS) if line[0] not in ("eval", "serve", "doctor") and "good.jsonl" not in line
    ]
    ended = [run_line(line) for line in quick[:NUM_IN_PROCESS]]
    assert [str(e) for e in ended if e.fault] == []
    assert {e.code for e in ended} >= {0, 2}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_campaign_of_hostile_command_lines() -> None:
    """In processes of their own with their own limits of memory; NUM_OF_A_WORKER inputs each."""
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    wanted = lines(seed, int(os.environ.get("FUZZ_INPUTS", NUM_IN_CAMPAIGN)))
    ended: list[Ended] = []
    for first in range(0, len(wanted), NUM_OF_A_WORKER):
        ended += campaign(wanted[first : first + NUM_OF_A_WORKER])
    print(f"{len(ended)} inputs with seed {seed}: exit codes {dict(collections.Counter(e.code for e in ended))}")
    assert [str(e) for e in ended if e.fault] == []
    assert len(ended) == len(wanted)


def campaign(batch: list[list[str]]) -> list[Ended]:
    """What came of these lines in one worker, and in another from where the first one died."""
    worker = [sys.executable, str(Path(__file__).parent / "cli_fuzz.py")]
    ended: list[Ended] = []
    while len(ended) < len(batch):
        text = "".join(json.dumps(line) + "\n" for line in batch[len(ended) :])
        done = subprocess.run(worker, input=text, capture_output=True, text=True, check=False)
        ended += [Ended(**json.loads(answer)) for answer in done.stdout.splitlines()]
        if len(ended) < len(batch):
            ended.append(Ended(batch[len(ended)], None, "", f"the worker died: {done.stderr[-2000:]}", 0.0))
    return ended


@pytest.mark.parametrize("command", EARLY)
def test_help_has_no_trap(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A percent sign in a help text raises only when the help is shown."""
    assert run_line([command, "--help"]).code == 0
    assert all(flag.startswith("--") for flag in flags_of(command))


# -------------------- configuration files


def said(load: object) -> str:
    """The one line of a configuration that is refused, "" for one that is taken."""
    try:
        load()  # type: ignore[operator]
    except InputError as e:
        error = str(e)
    else:
        return ""
    assert not re.search(r"[\n\r]", error)
    return error


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("key", config.section_of())
def test_every_key_with_every_value_of_a_file(tmp_path: Path, key: str) -> None:
    """What is taken can be written into a run folder and read back."""
    section, num_refused = config.section_of()[key], 0
    for value in TOML_VALUES:
        path = written(tmp_path / "c.toml", f"[{section}]\n{key} = {value}\n".encode())
        if said(lambda path=path: config.load(path)):
            num_refused += 1
            continue
        taken = config.load(path)
        path.write_text(config.dump(taken), encoding="utf-8")
        assert config.load(path) == taken
    assert num_refused >= 10


@pytest.mark.parametrize("key", config.section_of())
def test_every_key_with_every_value_of_a_command_line(key: str) -> None:
    for value in VALUES:
        said(lambda value=value: config.load(None, {key: value}))


@pytest.mark.parametrize("data", TOML_FILES, ids=range(len(TOML_FILES)))
def test_hostile_files(tmp_path: Path, data: bytes) -> None:
    error = said(lambda: config.load(written(tmp_path / "c.toml", data)))
    assert bool(error) == (data not in (b"", b"\xef\xbb\xbf[training]\nsteps = 3\n", b'"training" = {steps = "3"}\n'))


def test_a_device_without_an_end_is_no_file() -> None:
    tracemalloc.start()
    try:
        assert "cannot read /dev/zero: longer than 1048576 bytes" in said(lambda: config.load(Path("/dev/zero")))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


# (key, what is given, what is needed): numbers past any limit are refused where they are typed, not where they are used.
PAST_LIMITS = [
    ("reward_timeout_s", "1e10", "a number from 0.001 to 1000000"),
    ("reward_timeout_s", "0", "a number from 0.001 to 1000000"),
    ("request_timeout_s", "-1", "a number from 0 to 1000000"),
    ("hung_after_s", "1e300", "a number from 0.001 to 1000000"),
    ("give_up_s", "inf", "a number from 0.001 to 1000000"),
    ("steps", str(10**30), "an integer from 0 to 1000000000"),
    ("steps", "9" * 400, "an integer from 0 to 1000000000"),
    ("learning_rate", "9" * 400, "a number above 0 and up to 1"),
    ("steps", "-1", "an integer from 0 to 1000000000"),
    ("steps", "1.5", "an integer from 0 to 1000000000"),
    ("seed", str(2**64), "an integer from 0 to 9223372036854775807"),
    ("seed", "-1", "an integer from 0 to 9223372036854775807"),
    ("max_num_seqs", str(10**12), "an integer from 1 to 65536"),
    ("reward_workers", "1000000", "an integer from 1 to 1024"),
    ("clip_low", "5", "a number from 0 to 1"),
    ("clip_low", "-0.1", "a number from 0 to 1"),
    ("clip_high", "-1", "a number from 0 to 1000000"),
    ("clip_high", "1e39", "a number from 0 to 1000000"),
    ("correction_high", "0", "a number above 0 and up to 1000000"),
    ("entropy_coef", "nan", "a number from 0 to 1000000"),
    ("learning_rate", "1e39", "a number above 0 and up to 1"),
    ("learning_rate", "-0.0", "a number above 0 and up to 1"),
    ("max_grad_norm", "1e39", "a number above 0 and up to 1e+30"),
    ("memory_fraction", "1.5", "a number above 0 and up to 1"),
    ("temperature", "1e-300", "a number from 0.01 to 100"),
    ("alpha", "1e308", "a number above 0 and up to 100"),
    ("eval_k", str(10**9), "an integer from 1 to 2048"),
    ("group_size", "", "an integer from 1 to 1000000"),
    ("max_tokens", " ", "an integer from 1 to 1000000"),
    ("out", "\ud800", "text that UTF-8 can hold"),
    ("out", "a\0b", "text without a NUL character"),
    ("model", "m" * 200_000, "at most 100000"),
    ("stop", '["\\ud800"]', "text, or a list of texts"),
    ("task_options", '{"a": null}', "values that TOML can hold"),
    ("task_options", '{"a": NaN}', "values that TOML can hold"),
    ("task_options", '{"a": ' + "[" * 30 + "]" * 30 + "}", "16 deep at most"),
    ("task_options", '{"a": ' + "9" * 30 + "}", "integers of 64 bits"),
    ("task_options", "[" * 100_000, "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "given", "needed"), PAST_LIMITS, ids=[f"{key}={given[:20]!r}" for key, given, _ in PAST_LIMITS])
def test_what_is_past_a_limit_is_refused_when_it_is_read(key: str, given: str, needed: str) -> None:
    error = said(lambda: config.load(None, {key: given}))
    assert key in error
    assert needed in error
    assert ONE_LINE.fullmatch(error)


@pytest.mark.parametrize("cls", [*(cls for _, cls in config.sections()), Serving, Costs, EngineModel, LengthModel])
def test_every_number_has_a_range_that_holds_its_default(cls: type) -> None:
    declared = {f.name: f.default for f in dataclasses.fields(cls)}
    for name, hint in values.hints_of(cls).items():
        for kind in values.kinds_of(hint):
            if values.plain_of(kind) in (int, float):
                limits = values.range_of(kind)
                assert limits is not None, name
                assert not isinstance(declared[name], (int, float)) or declared[name] in limits, name


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (values.Range(1, 10**6), (1, 2.5, 10**6), (0, 10**6 + 1, math.nan, math.inf), "from 1 to 1000000"),
        (values.Range(0, 1, above=True), (1e-300, 1), (0, -0.0, 1.0000001, math.nan), "above 0 and up to 1"),
        (values.Range(-1e30, 1e30), (-1e30, 0), (-1e31, math.inf, -math.inf), "from -1e+30 to 1e+30"),
        (values.Range(0.01, 100), (0.01, 100), (0.0099,), "from 0.01 to 100"),
    ],
)
def test_a_range_holds_its_numbers(limits: values.Range, inside: tuple[float, ...], outside: tuple[float, ...], words: str) -> None:
    assert [n for n in inside if n not in limits] == []
    assert [n for n in outside if n in limits] == []
    assert str(limits) == words


# -------------------- files of pass rates


@pytest.mark.parametrize(("name", "data"), [*(("r.csv", data) for data in RATE_FILES), *(("r.json", data) for data in RATE_JSONS)])
def test_hostile_files_of_pass_rates(tmp_path: Path, name: str, data: bytes) -> None:
    path = written(tmp_path / name, data)
    ended = run_line(["simulate", "grpo:group_size=2", "--seeds", "1", "--slots", "2", "--schedule", "rounds", "--population", str(path)])
    assert not ended.fault, ended
