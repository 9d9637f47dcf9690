"""The operators between kept completions and a gradient. See docs/operators.md for their forms."""

from reinforce_ada.ops.group_advantages import CONVENTIONS, group_advantages
from reinforce_ada.ops.linear_policy_loss import linear_policy_loss
from reinforce_ada.ops.linear_token_logprobs import linear_token_logprobs
from reinforce_ada.ops.policy_loss import RolloutCorrection, policy_loss
from reinforce_ada.ops.token_logprobs import TokenLogprobs, token_logprobs

# A package and the function in it share a name: importing the package binds the name to it, the line above then to the function.
__all__ = [
    "CONVENTIONS",
    "RolloutCorrection",
    "TokenLogprobs",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
]
