"""Whatever is damaged in a run folder: one line, and the run goes on from what is whole, to the weights of the undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import damages
import numpy as np
import pytest
from damages import EVERY_FILE, LINES, TENSORS, Case, at, both, copied, delete, empty, sql, tree
from test_resume import check_like, same_weights
from toy_runs import Runner, beside, error, pools, said, trained
from toy_training import toy_config, toy_trainer

from reinforce_ada import cli
from reinforce_ada.errors import InputError
from reinforce_ada.packing import pack
from reinforce_ada.training.track import Trackers, _known

DB, NEWEST, BEFORE = "rollouts.sqlite", "checkpoints/step-000004", "checkpoints/step-000002"


@pytest.fixture(scope="module")
def runs(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, one that was killed in its fifth step (checkpoints of 2 and 4), that one earlier, and another one like it."""
    folder = tmp_path_factory.mktemp("runs")
    assert toy_run(folder / "whole") == 0
    assert toy_run(folder / "killed", kill=("between sampling and update", 5)) == -9
    assert toy_run(folder / "older", kill=("between sampling and update", 3)) == -9
    assert toy_run(folder / "other", kill=("between sampling and update", 5)) == -9  # the same, but a run of its own
    assert toy_run(folder / "another seed", kill=("between sampling and update", 5), seed=1) == -9
    return folder


def cases(runs: Path) -> list[Case]:
    """The table."""
    older, other, another = runs / "older", runs / "other", runs / "another seed"
    fallen_back, rebuilt = "checkpoint step-000004 cannot be used: ", "no checkpoint can be used: the run is trained again from its journal"
    no_journal = "is not the journal of this run: "
    return [
        # checkpoints: the one before
        *(Case(f"state {k}", at(f"{NEWEST}/state.json", d), f"{fallen_back}state", True) for k, d in EVERY_FILE.items()),
        *(Case(f"tensors {k}", at(f"{NEWEST}/trainer.safetensors", d), f"{fallen_back}trainer", True) for k, d in EVERY_FILE.items()),
        Case("the checkpoint of an earlier version", at(NEWEST, damages.plain_state), "resuming after step 4", True),
        Case("a file for a checkpoint", at(NEWEST, damages.file), fallen_back, True),
        Case("an empty checkpoint", at(NEWEST, lambda p: (delete(p), p.mkdir())), fallen_back, True),
        Case("no newest checkpoint", at(NEWEST, delete), "resuming after step 2", True),
        Case("another run's newest checkpoint", tree(other, NEWEST), f"{fallen_back}it is of another run", True),
        Case("its model", at(f"{NEWEST}/model/model.safetensors", delete), "resuming after step 4", True),
        # checkpoints: the journal
        Case("both checkpoints", both(at(f"{NEWEST}/state.json", empty), at(f"{BEFORE}/state.json", empty)), rebuilt, True),
        Case("all checkpoints gone", at("checkpoints", delete), "resuming after step 0; the journal reaches step 5", True),
        Case("a file for checkpoints", at("checkpoints", damages.file), "checkpoints is no folder", False),
        # the journal
        Case("no journal", both(at(DB, delete), at(f"{DB}-wal", delete)), "rollouts.sqlite is not there; the journal that", False),
        Case("an empty journal", both(at(DB, empty), at(f"{DB}-wal", delete)), f"{no_journal}checkpoints/step-000004", False),
        Case("no journal and no checkpoint", both(at(DB, delete), at(f"{DB}-wal", delete), at("checkpoints", delete)), "has lost", True),
        Case("half a journal", both(at(DB, damages.cut), at(f"{DB}-wal", delete)), "an undamaged rollout store is needed", False),
        Case("a journal of garbage", at(DB, damages.garbage), "file is not a database; an undamaged rollout store is needed", False),
        Case("a folder for a journal", at(DB, damages.folder), "is no file", False),
        Case("an older journal", copied(older, DB), no_journal, False),
        Case("another run's journal", copied(other, DB), "it is of another run than the journal", False),
        Case("another configuration's journal", copied(another, DB), "was made with run.seed=1 (now 0)", False),
        Case("a newer journal", at(DB, sql("UPDATE meta SET value = '9' WHERE key = 'schema_version'")), "has schema version 9", False),
        Case("a journal with a gap", at(DB, sql("DELETE FROM finished_steps WHERE step = 3")), f"{fallen_back}the journal reaches", True),
        Case("a journal without tables", at(DB, sql("DROP TABLE pools")), "no such table: pools", False),
        Case("an event damaged", at(DB, sql("UPDATE events SET tokens = x'01' WHERE step = 5")), "is damaged", False),
        Case("no wal", at(f"{DB}-wal", delete), "resuming after step 4; the journal reaches step 4", True),
        Case("an empty wal", at(f"{DB}-wal", empty), "resuming after step 4; the journal reaches step 4", True),
        Case("a wal of garbage", at(f"{DB}-wal", damages.garbage), "resuming after step 4; the journal reaches step 4", True),
        Case("half a wal", at(f"{DB}-wal", damages.cut), "resuming after step 4", True),
        Case("a folder for a wal", at(f"{DB}-wal", damages.folder), "is no file", False),
        Case("a shm of garbage", at(f"{DB}-shm", damages.garbage), "the journal reaches step 5", True),
        Case("no shm", at(f"{DB}-shm", delete), "the journal reaches step 5", True),
        Case("no lock", at(f"{DB}.lock", delete), "the journal reaches step 5", True),
        # the log
        *(Case(f"log {k}", at("log.jsonl", d), "log.jsonl lacks", True) for k, d in EVERY_FILE.items() if k != "a folder"),
        *(Case(f"log with {k}", at("log.jsonl", d), "resuming after step 4", True) for k, d in LINES.items()),
        Case("a folder for a log", at("log.jsonl", damages.folder), "log.jsonl is no file", False),
        Case("another run's log", at("log.jsonl", lambda p: p.write_text(run_line(p))), "belongs to another run than log.jsonl", False),
        # the rest
        Case("config.toml cut", at("config.toml", lambda p: p.write_text(p.read_text()[:-40])), "it was cut short", False),
        Case("a file for the model", lambda out: (out / "model").write_text("x"), "model is no folder", False),
        Case("a folder for the figure", lambda out: (out / "figure.png").mkdir(), "figure.png is no file", False),
        Case("no marker", at(".reinforce-ada", delete), "resuming after step 4", True),
        Case("a marker of garbage", at(".reinforce-ada", damages.garbage), "resuming after step 4", True),
    ]  # fmt: skip


def run_line(path: Path) -> str:
    return json.dumps({"kind": "run", "run_id": "0" * 32}) + "\n" + path.read_text()


NAMES = [case.what for case in cases(Path("runs"))]


@pytest.mark.parametrize("name", NAMES)
def test_train_goes_on_from_what_is_whole(toy_run: Runner, runs: Path, tmp_path: Path, name: str) -> None:
    (case,) = (case for case in cases(runs) if case.what == name)
    out = tmp_path / "run"
    shutil.copytree(runs / "killed", out)
    case.damage(out)
    status = toy_run(out, resume=True)
    if not case.goes_on:
        assert status == 1
        message = error(out)
        assert message.startswith("InputError: ")
        assert "\n" not in message
        assert case.says in message
        return
    assert status == 0
    assert case.says in said(out)
    assert same_weights(out, runs / "whole")
    assert pools(out) == pools(runs / "whole")
    logged, whole = trained(out), trained(runs / "whole")
    assert set(logged) <= set(whole) if "log" in name else logged == whole
    assert not list((out / "checkpoints").glob("set-aside-*"))  # the next one written has removed them


def test_the_table_has_a_case_for_every_kind_of_file() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 40


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_not_taken(runs: Path, tmp_path: Path, name: str) -> None:
    damage, message = TENSORS[name]
    out = tmp_path / "run"
    shutil.copytree(runs / "killed", out)
    damage(out / NEWEST)
    trainer = toy_trainer(toy_config(out), out, resume=True)
    trainer.parts.store.close()
    assert trainer.step == 2
    (line,) = (line for line in said(out).splitlines() if "cannot be used" in line)
    assert line.startswith("checkpoint step-000004 cannot be used: ")
    assert message in line


def test_an_older_journal_and_a_checkpoint_it_reaches(toy_run: Runner, runs: Path, tmp_path: Path) -> None:
    """Steps that the journal has lost are sampled again; of the checkpoints those that it reaches are used."""
    out = tmp_path / "run"
    shutil.copytree(runs / "killed", out)
    sql("DELETE FROM finished_steps WHERE step > 3")(out / DB)
    sql("DELETE FROM events WHERE step > 3")(out / DB)
    sql("DELETE FROM pools WHERE step > 3")(out / DB)
    assert toy_run(out, resume=True) == 0
    assert "checkpoint step-000004 cannot be used: the journal reaches step 3 only" in said(out)
    assert "log.jsonl has step 4, which the journal has lost" in said(out)
    check_like(out, runs / "whole")


@pytest.mark.parametrize("column", ["token_ids", "rollout_logprobs"])
def test_poison_in_the_journal_is_sampled_again(toy_run: Runner, runs: Path, tmp_path: Path, column: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs / "killed", out)
    ids, logprobs = ([5, 32], [-1.0, -2.0]) if column == "token_ids" else ([5, 6], [-1.0, np.nan])
    where = "seq IN (SELECT e.seq FROM events e JOIN committed USING (seq) WHERE step = 5 AND num_tokens > 1 LIMIT 1)"
    bad = pack(np.array(ids, np.int32), np.array(logprobs, np.float32))
    sql(f"UPDATE events SET num_tokens = 2, tokens = ? WHERE {where}", bad)(out / DB)
    assert toy_run(out, resume=True) == 0
    assert "step 5: 1 completions of the journal cannot be the model's: they are sampled again" in said(out)
    check_like(out, runs / "whole")


# -------------------- what reads a run


COMMANDS = {
    "report": lambda out: ["report", str(out)],
    "explain": lambda out: ["explain", str(out)],
    "simulate --fit": lambda out: ["simulate", "--fit", str(out), "--seeds", "1", "--prompts", "4", "reinforce-ada-pos"],
    "simulate --population": lambda out: ["simulate", "--population", str(out), "--seeds", "1", "--prompts", "4", "reinforce-ada-pos"],
    "train --resume": lambda out: ["train", "--resume", str(out), "--steps", "-1"],  # as far as its configuration
}
READ = [
    ("config.toml", "explain"), ("config.toml", "train --resume"), ("log.jsonl", "report"), ("log.jsonl", "simulate --fit"), (DB, "report"),
    (DB, "simulate --fit"), (DB, "simulate --population"), ("figure.png", "report"), ("rollouts.parquet", "report"),
]  # fmt: skip
ODD = damages.lines(lambda them: [*damages.ODD_LINES.values(), *them])
# Which damages end a command; of "perhaps" it depends on how much it reads.
ENDS: dict[str, set[str]] = {
    "config.toml": {"cut", "garbage", "deleted", "a folder"},
    "log.jsonl": {"cut", "empty", "garbage", "deleted", "a folder", "every line damaged"},
    DB: {"garbage", "a folder"},
    "figure.png": {"a folder"},
    "rollouts.parquet": {"a folder"},
}
PERHAPS = {"config.toml": {"cut", "empty"}, "log.jsonl": {"cut", "odd"}, DB: {"cut", "empty", "deleted"}}


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    """The whole run, with the header that a real one has."""
    path = runs / "whole" / "log.jsonl"
    header = {"kind": "run", "config": dataclasses.asdict(toy_config(runs / "whole")), "cap": 12, "device": "cpu"}
    shutil.copytree(runs / "whole", runs / "with a header")
    (runs / "with a header" / "log.jsonl").write_text(json.dumps(header) + "\n" + path.read_text())
    return runs / "with a header"


@pytest.mark.parametrize(("entry", "command"), READ)
def test_a_command_that_reads_a_damaged_run_is_one_line_or_works(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: str, command: str
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    failed = set()
    for kind, damage in {**EVERY_FILE, **({**LINES, "odd": ODD} if entry == "log.jsonl" else {})}.items():
        out = tmp_path / kind.replace(" ", "-") / "run"
        shutil.copytree(whole, out)
        if not (out / entry).exists():
            (out / entry).write_text("x")
        damage(out / entry)
        code = cli.main(COMMANDS[command](out))
        message = capsys.readouterr().err.strip()
        assert (code, bool(message)) in ((0, False), (2, True)), (kind, message)
        assert "\n" not in message
        failed |= {kind} if code else set()
    assert ENDS[entry] - PERHAPS.get(entry, set()) <= failed <= ENDS[entry] | PERHAPS.get(entry, set())


@pytest.mark.parametrize("damage", EVERY_FILE.values(), ids=EVERY_FILE.keys())
def test_memory_from_a_damaged_run_is_one_line(toy_run: Runner, runs: Path, tmp_path: Path, damage: damages.Damage) -> None:
    shutil.copytree(runs / "whole", tmp_path / "earlier")
    damage(tmp_path / "earlier" / DB)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=DB) as caught:
        toy_trainer(toy_config(out, memory_from=str(tmp_path / "earlier")), out, resume=False)
    assert "\n" not in str(caught.value)


def test_a_file_named_tensorboard_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match=r"^track: cannot write to .*tensorboard: File exists; a folder for TensorBoard's files; move"):
        Trackers("", tmp_path, {}, print)
    assert (tmp_path / "tensorboard").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"wandb": 3}', "\0", "[" * 100_000])
def test_a_damaged_track_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "track.json").write_text(text)
    assert _known(tmp_path) == {}


def test_settings_of_the_engine_may_change_on_resume_and_its_kind_may_not(toy_run: Runner, runs: Path, tmp_path: Path) -> None:
    for change, says in (
        ({"sleep": False, "memory_fraction": 0.3, "replicas": 2}, ""),
        ({"engine": "vllm"}, "engine.engine=auto (now vllm)"),
    ):
        out = tmp_path / ("other" if says else "same")
        shutil.copytree(runs / "killed", out)
        assert toy_run(out, resume=True, **change) == bool(says)
        assert says in (error(out) if says else "")


def test_beside_is_no_part_of_a_run(runs: Path) -> None:
    assert beside(runs / "whole", "submitted").exists()
    assert not [path for path in (runs / "whole").iterdir() if path.suffix == ".txt"]
