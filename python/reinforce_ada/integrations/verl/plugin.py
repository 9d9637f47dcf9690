"""The entry point `verl.plugins`, which verl imports in each of its processes: it registers the advantage estimator."""

from __future__ import annotations

from verl.trainer.ppo.core_algos import register_adv_est

from reinforce_ada.integrations.verl.estimator import estimate
from reinforce_ada.integrations.verl.settings import ESTIMATOR

register_adv_est(ESTIMATOR)(estimate)
