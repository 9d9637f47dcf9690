"""The methods of verl's classes that are overridden or called. Importing this needs no verl."""

from __future__ import annotations

from reinforce_ada.integrations.hooks import Hooks

_FOLDER = "trainer/ppo/v1"
WORKER = Hooks(
    "verl",
    "verl 0.9.1",
    f"{_FOLDER}/agent_loop_tq.py",
    "AgentLoopWorkerTQ",
    {
        "_run_prompt": ("prompt", "sampling_params", "trajectory", "trace"),
        "_agent_loop_postprocess": ("output", "validate", "**kwargs"),
    },
)
LOOP = Hooks(
    "verl",
    "verl 0.9.1",
    "experimental/agent_loop/agent_loop.py",
    "AgentLoopWorker",
    {
        "_run_agent_loop": ("sampling_params", "trajectory", "agent_name", "trace", "**kwargs"),
        "_compute_score": ("outputs", "kwargs"),
    },
)
BUFFER = Hooks(
    "verl",
    "verl 0.9.1",
    f"{_FOLDER}/replay_buffer.py",
    "ReplayBuffer",
    {"_materialize_batch": ("partition_id", "selected_prompt_uids", "partition_snapshot")},
)
VERL = (WORKER, LOOP, BUFFER)


def state() -> str:
    """Return "ok" if the installed verl has the hooks, and otherwise why not."""
    return next((state for hooks in VERL if (state := hooks.state()) != "ok"), "ok")
