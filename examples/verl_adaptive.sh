#!/usr/bin/env bash
# GRPO of verl 0.9.1 on GSM8K with adaptive sampling, on one machine with 8 GPUs; docs/verl.md explains the last lines.
# The parquet files are those of verl's examples/data_preprocess/gsm8k.py. Further overrides may follow: examples/verl_adaptive.sh trainer.nnodes=2
set -euo pipefail
DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}

overrides=(
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.train_batch_size=256
  data.max_prompt_length=512
  data.max_response_length=1024
  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.actor.ppo_mini_batch_size=256
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
  trainer.n_gpus_per_node=8
  trainer.total_epochs=15
  trainer.test_freq=5
  'trainer.logger=[console]'
  # What makes it adaptive: four completions of each prompt are kept, of the 8 to 32 that the policy draws.
  algorithm.adv_estimator=reinforce_ada
  +actor_rollout_ref.rollout.agent.agent_loop_manager_class=reinforce_ada.integrations.verl.AdaptiveAgentLoopManager
  trainer.v1.sampler.custom_sampler.path=pkg://reinforce_ada.integrations.verl
  trainer.v1.sampler.custom_sampler.name=AdaptiveReplayBuffer
  actor_rollout_ref.rollout.n=4
  +reinforce_ada.preset=reinforce-ada-balance
)
exec ${PYTHON:-python} -m verl.trainer.main_ppo "${overrides[@]}" "$@"
