"""Adaptive sampling inside TRL's GRPOTrainer."""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import trl
from trl_runs import (
    data,
    grpo_trainer,
    logged,
    none,
    recorded_adaptive,
    recorded_plain,
    tenth,
    third,
    trained,
    trainer_of,
    void_for_some,
    weights,
)

from reinforce_ada.integrations.trl import adaptive


@pytest.fixture(autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_preset_grpo_is_trl_itself(model_folder, tmp_path):
    plain = trained(model_folder, tmp_path / "a", cls=recorded_plain(), scale_rewards="none", max_steps=5)
    guest = trained(
        model_folder, tmp_path / "b", cls=recorded_adaptive(), scale_rewards="none", max_steps=5,
        options={"adaptive": ("grpo", {"scale": "none"})},
    )  # fmt: skip
    assert len(plain.batches) == len(guest.batches) == 5
    for a, b in zip(plain.batches, guest.batches, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        assert torch.equal(a["advantages"], b["advantages"])
    assert (weights(plain) - weights(guest)).abs().max() <= 1e-6
    for name in ("loss", "reward", "reward_std", "rewards/third/mean", "rewards/third/std", "frac_reward_zero_std", "num_tokens"):
        assert logged(guest, name) == pytest.approx(logged(plain, name), abs=1e-6), name


def test_the_version_is_the_one_that_is_meant():
    assert os.environ.get("TRL_VERSION", version("trl")) == version("trl") == trl.__version__


# -------------------- what is trained


def completions(out):
    """The one table of completions that TRL wrote."""
    import pandas

    (table,) = (out / "completions").iterdir()
    return pandas.read_parquet(table)


@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "bnpo", "beta": 0.04}, {"gradient_accumulation_steps": 4, "steps_per_generation": 2}]
)
def test_balance_trains_on_rewards_less_the_mean_of_the_pool(model_folder, tmp_path, settings):
    trainer = trained(model_folder, tmp_path, cls=recorded_adaptive(), reward_funcs=tenth, **settings)
    assert len(trainer.results) == 2 * settings.get("gradient_accumulation_steps", 1) / settings.get("steps_per_generation", 1)
    more = 0
    for batch, result in zip(trainer.batches, trainer.results, strict=True):
        rows = iter(zip(batch["advantages"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True))
        for group in result.groups:
            for scored in group.kept:
                advantage, ids, mask = next(rows)
                assert ids[mask.bool()].tolist() == scored.completion.token_ids.tolist()
                assert advantage == pytest.approx(scored.reward - group.pool.mean, abs=1e-7)
            rewards = [o.reward for o in group.pool.outcomes]
            assert group.pool.mean == pytest.approx(sum(rewards) / len(rewards))
            more += len(rewards) > 8
        assert next(rows, None) is None
    assert more  # a pool of two rounds or more, or nothing was adaptive


def test_the_exact_objective_is_divided_by_a_fixed_number(model_folder, tmp_path):
    """By the rows and the longest completion there may be; a ratio of 1 leaves each token its row's advantage."""
    options = {"adaptive": "reinforce-ada-exact"}
    trainer = trained(
        model_folder, tmp_path, cls=recorded_adaptive(), reward_funcs=tenth, loss_type="dr_grpo", max_steps=1, options=options
    )
    (batch,), (result,) = trainer.batches, trainer.results
    assert len({len(pool.outcomes) for pool in result.pools}) > 1
    tokens = batch["completion_mask"].sum(1)
    assert logged(trainer, "loss") == pytest.approx([-(batch["advantages"] * tokens).sum().item() / (16 * 6)], abs=1e-4)
    assert logged(trainer, "sampling/waste_fraction")[0] > 0  # a round that ends within


def test_what_the_logs_say(model_folder, tmp_path):
    trainer = trained(model_folder, tmp_path, cls=recorded_adaptive(), log_completions=True, num_completions_to_print=0, max_steps=1)
    (result,), (log, *_) = trainer.results, trainer.state.log_history
    first = [o.reward for pool in result.pools for o in pool.outcomes[:8]]
    kept = [s.reward for group in result.groups for s in group.kept]
    assert log["reward"] == log["rewards/third/mean"] == pytest.approx(sum(first) / len(first))
    assert log["sampling/selected_reward"] == pytest.approx(sum(kept) / len(kept))
    assert log["sampling/selected_reward"] != log["reward"]
    assert log["frac_reward_zero_std"] == pytest.approx(1 - log["sampling/signal_fraction"])
    assert log["sampling/samples_per_prompt"] == sum(len(pool.outcomes) for pool in result.pools) / 4
    generated = sum(o.completion.token_ids.size for pool in result.pools for o in pool.outcomes)
    assert log["sampling/tokens_generated"] == generated
    assert log["num_tokens"] > generated  # prompts too
    shown = completions(tmp_path)
    assert shown["third"].tolist() == kept
    assert shown["advantage"].tolist() == pytest.approx([s.reward - g.pool.mean for g in result.groups for s in g.kept])


def test_evaluation_is_that_of_trl(model_folder, tmp_path):
    seen = {}
    for cls in (recorded_plain(), recorded_adaptive()):
        trainer = trainer_of(model_folder, tmp_path, cls=cls, options={"eval_dataset": data(8)}, per_device_eval_batch_size=8)
        seen[cls] = trainer.evaluate()
        assert not any("sampling" in name for name in seen[cls])
    plain, guest = ({k: v for k, v in seen[cls].items() if "time" not in k and "second" not in k} for cls in seen)
    assert plain == guest


def test_adapters_learn_and_the_model_stays(model_folder, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_of(model_folder, tmp_path, options={"peft_config": config})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert logged(trainer, "sampling/samples_per_prompt")


def test_generations_are_reused(model_folder, tmp_path):
    trainer = trained(
        model_folder, tmp_path, cls=recorded_adaptive(), gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2,
        max_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    (result,) = trainer.results  # 4 slices, twice
    assert "old_per_token_logps" in trainer.batches[0]
    assert [pool.outcomes[0].id.step for pool in result.pools] == [0] * 4


def test_several_rewards_are_weighted_and_logged(model_folder, tmp_path):
    async def even(completion_ids, log_extra, log_metric, **columns):
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("rows", len(completion_ids))
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    def sometimes(completion_ids, answer, trainer_state, **columns):
        assert len(answer) == len(completion_ids)
        return [None if sum(ids) % 5 else 1.0 for ids in completion_ids]

    trainer = trained(
        model_folder, tmp_path, cls=recorded_adaptive(), reward_funcs=[third, even, sometimes], reward_weights=[1.0, 0.5, 0.25],
        max_steps=1, log_completions=True, num_completions_to_print=0,
    )  # fmt: skip
    for pool in trainer.results[0].pools:
        for o in pool.outcomes:
            total = int(o.completion.token_ids.sum())
            assert o.reward == (total % 3 == 0) + 0.5 * (total % 2 == 0) + 0.25 * (total % 5 == 0)
    assert logged(trainer, "rows")[0] <= 16
    shown = completions(tmp_path)
    masks = trainer.batches[0]["completion_mask"]
    assert shown["length"].tolist() == masks.sum(1).tolist()


# -------------------- padding


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_padding_counts_for_nothing(model_folder, tmp_path, loss_type):
    """Prompts of which every completion is a void, or no two differ, have rows in the batch that change no loss."""
    trainer = trainer_of(
        model_folder, tmp_path, cls=recorded_adaptive(), reward_funcs=void_for_some, loss_type=loss_type, max_steps=1,
        options={"adaptive": ("reinforce-ada-balance", {"degenerate": "drop"})},
    )  # fmt: skip
    losses = []
    compute = trainer._compute_loss

    def computed(model, inputs):
        is_real = inputs["completion_mask"].any(1)
        assert 0 < is_real.sum() < 16
        rows = {k: v[is_real] for k, v in inputs.items() if v.dim()}
        without = compute(model, {**inputs, **rows})
        losses.append((compute(model, inputs), without, is_real.sum()))
        assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()
        assert not inputs["advantages"][~is_real].any()
        return losses[0][0]

    trainer._compute_loss = computed
    trainer.train()
    ((loss, without, num_real),) = losses
    share = num_real / 16 if loss_type.endswith("grpo") else 1.0  # a mean over rows, of which there is a fixed number
    assert loss.item() == pytest.approx((without * share).item(), rel=1e-5, abs=1e-7)
    assert logged(trainer, "sampling/num_voids")[0] > 0
    assert logged(trainer, "sampling/padding_rows") == [16 - num_real]


def test_a_step_without_any_reward_changes_nothing(model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path, reward_funcs=none, num_iterations=2)
    before = weights(trainer)
    trainer.train()
    assert torch.equal(weights(trainer), before)
    assert logged(trainer, "sampling/padding_rows") == [16]
    assert logged(trainer, "loss") == [0, 0]


# -------------------- checkpoints


@pytest.mark.parametrize("adaptive", ["reinforce-ada-balance", "reinforce-ada-est", "reinforce-ada-memory"])
def test_a_resumed_run_is_the_undisturbed_one(model_folder, tmp_path, adaptive):
    settings = {"cls": recorded_adaptive(), "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "options": {"adaptive": adaptive}}
    settings["options"]["train_dataset"] = data(40, distinct=6)  # prompts come again, for the policy that remembers them
    if adaptive == "reinforce-ada-memory":
        settings["loss_type"] = "dr_grpo"  # its objective needs a fixed denominator
    whole = trained(model_folder, tmp_path, **settings)
    resumed = trainer_of(model_folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.results) == 2
    for a, b in zip(whole.results[2:], resumed.results, strict=True):
        assert [[(o.id, o.reward, o.completion.token_ids.tolist()) for o in pool.outcomes] for pool in a.pools] == [
            [(o.id, o.reward, o.completion.token_ids.tolist()) for o in pool.outcomes] for pool in b.pools
        ]
        assert [(pool.cap, pool.prior) for pool in a.pools] == [(pool.cap, pool.prior) for pool in b.pools]
    assert torch.equal(weights(whole), weights(resumed))


def test_a_checkpoint_of_trl_itself_can_be_gone_on_from(model_folder, tmp_path):
    trained(model_folder, tmp_path, cls=recorded_plain(), max_steps=1, save_strategy="steps", save_steps=1)
    guest = trainer_of(model_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    guest.train(resume_from_checkpoint=True)
    assert guest.sampling_result.pools[0].outcomes[0].id.step == 0


# -------------------- classes that others put in the place of TRL's


def test_a_class_that_was_put_in_the_place_of_trls(model_folder, tmp_path, monkeypatch):
    """As unsloth does it: TRL's source is compiled anew, under another name and with another signature, and replaces the class."""
    module = grpo_trainer()
    source = inspect.getsource(module.GRPOTrainer).replace("class GRPOTrainer(", "class _UnslothGRPOTrainer(")
    names = dict(vars(module))
    exec(compile(source, "unsloth_compiled_cache", "exec", dont_inherit=True), names)

    class UnslothGRPOTrainer(names["_UnslothGRPOTrainer"]):
        def __init__(self, model, args=None, reward_funcs=None, train_dataset=None, **kwargs):
            super().__init__(model=model, args=args, reward_funcs=reward_funcs, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(trl, "GRPOTrainer", UnslothGRPOTrainer)
    monkeypatch.setattr(module, "GRPOTrainer", UnslothGRPOTrainer)
    cls = adaptive(trl.GRPOTrainer)
    assert cls.__name__ == "AdaptiveUnslothGRPOTrainer"
    patched = trained(model_folder, tmp_path, cls=cls)
    monkeypatch.undo()
    assert torch.equal(weights(patched), weights(trained(model_folder, tmp_path)))
    assert logged(patched, "sampling/samples_per_prompt") >= [8.0, 8.0]
