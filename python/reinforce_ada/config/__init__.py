"""One typed configuration: defaults < TOML file < command-line flags. Every key is also a flag of `reinforce-ada train`.

It needs the standard library alone, so that `--help` stays fast and a base install reads every configuration.
"""

from __future__ import annotations

from reinforce_ada.config.files import BUDGET_UNITS, Budget, budget_of, check_room, dump, load, load_saved, read_toml, unknown_key
from reinforce_ada.config.keys import (
    OTHER_NAMES,
    POLICY_KEYS,
    Config,
    EngineConfig,
    ModelConfig,
    ModelName,
    PresetName,
    RunConfig,
    SamplingConfig,
    TaskConfig,
    TrainingConfig,
    section_of,
    sections,
)
from reinforce_ada.config.paths import FILE_KINDS, SAVED_DATASET, beside, kind_of, suffix_of

__all__ = [
    "BUDGET_UNITS",
    "FILE_KINDS",
    "OTHER_NAMES",
    "POLICY_KEYS",
    "SAVED_DATASET",
    "Budget",
    "Config",
    "EngineConfig",
    "ModelConfig",
    "ModelName",
    "PresetName",
    "RunConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrainingConfig",
    "beside",
    "budget_of",
    "check_room",
    "dump",
    "kind_of",
    "load",
    "load_saved",
    "read_toml",
    "section_of",
    "sections",
    "suffix_of",
    "unknown_key",
]
