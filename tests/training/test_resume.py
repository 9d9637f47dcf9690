"""A run killed anywhere and resumed ends with the weights of the undisturbed run, to the bit, and samples nothing scored again."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_process import POINTS
from toy_runs import TRAINED, Runner, error, evaluations, pools, scored, submitted, trained
from toy_training import saved_weights, toy_config, toy_trainer

from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import History, Memory
from reinforce_ada.training.tasks import content_key
from reinforce_ada.training.trainer import compared, fingerprint
from reinforce_ada.types import Prompt

STEPS = 5


@pytest.fixture(scope="module")
def undisturbed(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "undisturbed"
    assert toy_run(out) == 0
    return out


def same_weights(a: Path, b: Path) -> bool:
    left, right = saved_weights(a), saved_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def check_like(out: Path, undisturbed: Path) -> None:
    assert same_weights(out, undisturbed)
    assert pools(out) == pools(undisturbed)
    assert trained(out) == trained(undisturbed)
    assert evaluations(out) == evaluations(undisturbed)


def test_the_undisturbed_run_learns_something(undisturbed: Path) -> None:
    records = trained(undisturbed)
    assert [r[0] for r in records] == [1, 2, 3, 4, 5]
    assert all(r[2] > 0 for r in records)  # every step has a gradient, or a lost step would not show
    assert list(evaluations(undisturbed)) == [0, 2, 4, 5]
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_the_same_seed_gives_the_same_run_and_another_does_not(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    assert toy_run(tmp_path / "again") == 0
    check_like(tmp_path / "again", undisturbed)
    assert toy_run(tmp_path / "other", seed=1) == 0
    assert not same_weights(tmp_path / "other", undisturbed)


@pytest.mark.parametrize(
    ("point", "n"),
    [
        ("before a journal transaction", 1),  # nothing journaled at all
        ("before a journal transaction", 40),
        ("between the journal and the sampler", 3),  # before any checkpoint
        ("between the journal and the sampler", 60),
        ("between sampling and update", 3),
        ("between two parameters", 2),
        ("between two parameters", 5),
        ("between two minibatches", 7),
        ("before the log", 3),
        ("inside a line of the log", 5),
        ("between log and checkpoint", 1),
        ("inside a checkpoint", 1),
        ("inside a checkpoint", 2),
        ("before the checkpoint's rename", 2),
        ("after the checkpoint's rename", 1),
        ("after the checkpoint's rename", 3),
        ("inside the removal of the old one", 1),
        ("between checkpoint and next step", 1),
        ("between checkpoint and next step", 3),
        ("inside an evaluation", 2),
        ("inside a checkpoint", 4),  # the folder of the finished model
    ],
)
def test_killed_and_resumed(toy_run: Runner, undisturbed: Path, tmp_path: Path, point: str, n: int) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=(point, n)) == -9
    before, num_submitted = scored(out), len(submitted(out))
    assert toy_run(out, resume=True) == 0
    check_like(out, undisturbed)
    after = scored(out)
    assert Counter(before) <= Counter(after)
    again = set(submitted(out)[num_submitted:])
    assert not again & {f"{i.step} {i.prompt_id} {i.index}" for i, *_ in before}
    assert not list(out.rglob(".aside*"))


def test_every_point_is_tried() -> None:
    (mark,) = (m for m in test_killed_and_resumed.pytestmark if m.name == "parametrize")
    assert {point for point, _ in mark.args[1]} == POINTS.keys()


def test_killed_again_and_again(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kills = [("between the journal and the sampler", 9), ("between two parameters", 2), ("inside a checkpoint", 1), ("before the log", 4)]
    for k, kill in enumerate(kills):
        assert toy_run(out, kill=kill, resume=k > 0) == -9
    assert toy_run(out, resume=True) == 0
    check_like(out, undisturbed)


def test_without_checkpoints_the_journal_alone_is_enough(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=("between sampling and update", 5), checkpoint_every=0) == -9
    assert not (out / "checkpoints").exists()
    num_submitted = len(submitted(out))
    assert toy_run(out, resume=True, checkpoint_every=0) == 0
    check_like(out, undisturbed)
    assert {line.split()[0] for line in submitted(out)[num_submitted:]} == {"-1"}  # the held-out prompts only


def test_a_finished_run_is_extended(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out, steps=3) == 0
    num_submitted = len(submitted(out))
    assert toy_run(out, steps=STEPS, resume=True) == 0
    assert same_weights(out, undisturbed)
    assert trained(out) == trained(undisturbed)
    assert list(evaluations(out)) == [0, 2, 3, 4, 5]
    assert {line.split()[0] for line in submitted(out)[num_submitted:]} == {"4", "5", "-1"}  # nothing of the finished steps


def test_a_falling_rate_resumes_to_the_bit_and_keeps_its_number_of_steps(toy_run: Runner, tmp_path: Path) -> None:
    """The rates are literal: 0.02 after one step of warm-up, and four steps that fall by a quarter each."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert toy_run(whole, lr_schedule="linear") == 0
    assert [row[TRAINED.index("learning_rate")] for row in trained(whole)] == pytest.approx([0.01, 0.02, 0.015, 0.01, 0.005])
    assert toy_run(out, lr_schedule="linear", kill=("before the log", 3)) == -9
    for changed in ({"steps": STEPS + 1}, {"lr_schedule": "cosine"}, {"lr_min_fraction": 0.5}):
        assert toy_run(out, resume=True, **{"lr_schedule": "linear", **changed}) not in (0, -9)
        assert f"was made with training.{next(iter(changed))}=" in error(out)
    assert toy_run(out, resume=True, lr_schedule="linear") == 0
    assert trained(out) == trained(whole)
    assert same_weights(out, whole)


def test_a_finished_run_resumed_as_it_is_changes_nothing(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out) == 0
    num_submitted, log = len(submitted(out)), (out / "log.jsonl").read_text()
    assert toy_run(out, resume=True) == 0
    assert len(submitted(out)) == num_submitted
    assert (out / "log.jsonl").read_text() == log
    assert same_weights(out, undisturbed)


# -------------------- with a memory across steps

EST = {"preset": "reinforce-ada-est", "round_size": None, "max_rounds": None, "mean_budget": 6}
KEYS = [content_key({"question": f"{i}"}) for i in range(10)]  # of the toy records, all seen after two and a half steps


def remembered(out: Path, **overrides: Any) -> list[History]:
    """What a trainer that takes up this run remembers of every record."""
    trainer = toy_trainer(toy_config(out, **EST, **overrides), out, resume=True)
    histories = [trainer.memory.history(Prompt("?", key=key)) for key in KEYS]
    trainer.parts.store.close()
    return histories


@pytest.fixture(scope="module")
def undisturbed_est(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "undisturbed est"
    assert toy_run(out, **EST) == 0
    return out


def test_budgets_follow_what_is_remembered_over_epochs(undisturbed_est: Path) -> None:
    sizes = [[c + w for s, _, c, w, _ in pools(undisturbed_est) if s == step] for step in range(1, STEPS + 1)]
    assert sizes[0] == [6, 6, 6, 6]  # the first epoch knows nothing
    assert any(size != [6, 6, 6, 6] for size in sizes[2:])
    assert all(sum(size) == 24 for size in sizes)
    memory = Memory(0.99)
    with RolloutStore(undisturbed_est / "rollouts.sqlite", read_only=True) as store:
        for row in store.pool_counts():
            memory.add(row.step, KEYS[int(row.prompt_id.partition("@")[0])], row.num_correct, row.num_wrong)
    assert remembered(undisturbed_est) == [memory.history(Prompt("?", key=key)) for key in KEYS]


@pytest.mark.parametrize(
    ("point", "n"),
    [
        ("between the journal and the sampler", 30),
        ("between sampling and update", 4),
        ("between log and checkpoint", 2),
        ("after the checkpoint's rename", 2),
    ],
)
def test_killed_and_resumed_with_a_memory(toy_run: Runner, undisturbed_est: Path, tmp_path: Path, point: str, n: int) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=(point, n), **EST) == -9
    assert toy_run(out, resume=True, **EST) == 0
    check_like(out, undisturbed_est)
    assert remembered(out) == remembered(undisturbed_est)


@pytest.mark.parametrize("baseline", ["memory", "predicted"])
def test_killed_and_resumed_with_a_baseline_that_remembers(toy_run: Runner, tmp_path: Path, baseline: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    memory = {"preset": "reinforce-ada-memory", "group_size": 2, "round_size": None, "max_rounds": None, "baseline": baseline}
    assert toy_run(whole, **memory) == 0
    assert toy_run(out, kill=("between log and checkpoint", 2), **memory) == -9
    assert toy_run(out, resume=True, **memory) == 0
    check_like(out, whole)
    assert same_weights(out, whole)


def test_killed_and_resumed_with_chosen_prompts(toy_run: Runner, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    chosen = {"propose": "nearest-rate"}
    assert toy_run(whole, **chosen) == 0
    assert toy_run(out, kill=("between the journal and the sampler", 60), **chosen) == -9
    assert toy_run(out, resume=True, **chosen) == 0
    check_like(out, whole)
    assert {prompt_id for _, prompt_id, *_ in pools(out)} == {prompt_id for _, prompt_id, *_ in pools(whole)}


def test_steps_after_the_checkpoint_are_trained_again_with_the_memory_of_their_time(toy_run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=("between sampling and update", 4), **EST) == -9
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        assert store.finished_steps() == [1, 2, 3, 4]
        expected = Memory(0.99)
        for seen in store.seen(2):
            expected.add(*seen)
    assert remembered(out) == [expected.history(Prompt("?", key=key)) for key in KEYS]  # the checkpoint is of step 2


def test_a_run_begins_with_what_an_earlier_one_has_seen(toy_run: Runner, undisturbed_est: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(undisturbed_est, earlier)
    later = {**EST, "memory_from": str(earlier), "seed": 1}
    assert toy_run(tmp_path / "later", **later) == 0
    first = [c + w for step, _, c, w, _ in pools(tmp_path / "later") if step == 1]
    assert sum(first) == 24
    assert first != [6, 6, 6, 6]
    out = tmp_path / "killed"
    assert toy_run(out, kill=("before a journal transaction", 1), **later) == -9
    assert remembered(out, memory_from=str(earlier), seed=1) == remembered(undisturbed_est)
    shutil.rmtree(earlier)  # its pools have been copied
    assert toy_run(out, resume=True, **later) == 0
    check_like(out, tmp_path / "later")
    with pytest.raises(InputError, match=r"^RolloutStore: .*rollouts.sqlite does not exist; a store to read is needed$"):
        toy_trainer(toy_config(tmp_path / "new", **later), tmp_path / "new", resume=False)


def test_memory_settings_belong_to_the_run_and_are_no_news_at_their_defaults(undisturbed: Path) -> None:
    with pytest.raises(InputError, match=r"was made with sampling.memory_decay=0.99 \(now 0.5\)"):
        toy_trainer(toy_config(undisturbed, memory_decay=0.5), undisturbed, resume=True)
    kept = fingerprint(toy_config(undisturbed))
    for name in (
        "memory_decay",
        "memory_from",
        "mean_budget",
        "baseline",
        "scale",
        "num_completions",
    ):  # a store of an earlier version does not have them
        del kept["sampling"][name]
    assert compared(kept) == fingerprint(toy_config(undisturbed))


def test_the_store_of_another_configuration_is_refused(undisturbed: Path) -> None:
    message = r"RolloutStore: .* was made with sampling.group_size=4 \(now 2\); a store belongs to one configuration; use a new folder"
    with pytest.raises(InputError, match=message):
        toy_trainer(toy_config(undisturbed, group_size=2), undisturbed, resume=True)
