"""The kept completions of a step as the rows of one batch of TRL's, with padding where a prompt kept fewer than it has rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reinforce_ada.advantages import advantages_of
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.trl.rounds import Rounds
from reinforce_ada.integrations.trl.rows import Generated, Row
from reinforce_ada.sampling import Policy
from reinforce_ada.types import CompletionId, SamplingResult


@dataclass(frozen=True)
class Kept:
    """A row of the batch that trains."""

    row: Row
    advantage: float = 0.0
    is_padding: bool = False  # it counts for nothing


def kept_rows(result: SamplingResult, policy: Policy, rows: Mapping[CompletionId, Row]) -> list[Kept]:
    """Return `policy.group_size` rows of each prompt, over all processes: those that were kept, then padding.

    Raises: InputError for a selection that keeps more.
    """
    groups = zip(result.groups, advantages_of(result, policy), strict=True)
    kept_of = {group.pool.prompt.prompt_id: list(zip(group.kept, advantages, strict=True)) for group, advantages in groups}
    batch: list[Kept] = []
    for pool in result.pools:
        kept = kept_of.get(pool.prompt.prompt_id, [])
        if len(kept) > policy.group_size:
            given = f"a selection that keeps {len(kept)} completions"
            raise InputError(f"adaptive: policy {policy.name!r}", given, f"at most group_size {policy.group_size} is possible")
        padding = Kept(rows[pool.outcomes[-1].id].as_padding(), is_padding=True)
        batch += [Kept(rows[s.id], advantage) for s, advantage in kept] + [padding] * (policy.group_size - len(kept))
    return batch


class Playback:
    """What TRL's own code is given in the place of generating and scoring, and what is then corrected in its batch.

    Args:
        kept: the rows of all processes.
        rounds: which sampled them.
        num_rows: of this process.
        rank: of this process.
    """

    def __init__(self, kept: Sequence[Kept], rounds: Rounds, num_rows: int, rank: int) -> None:
        self._kept = kept
        self._mine = kept[rank * num_rows : (rank + 1) * num_rows]
        self._form: Generated = rounds.generated

    def generated(self) -> tuple[Any, ...]:
        """Return what `_generate` returns, with the kept rows of this process."""
        num_tokens = sum(k.row.num_tokens for k in self._kept if not k.is_padding)
        return self._form.with_rows([k.row for k in self._mine], max(num_tokens, 1))

    def rewards(self) -> torch.Tensor:
        """Return what `_calculate_rewards` returns: [rows of all processes, reward functions]."""
        return torch.tensor([k.row.rewards for k in self._kept])

    def extra_logs(self) -> dict[str, list[Any]]:
        """Return the columns that reward functions logged, the same ones on every process, for the rows of this one."""
        columns = dict.fromkeys(name for k in self._kept for name in k.row.extra_logs)
        return {name: [k.row.extra_logs.get(name) for k in self._mine] for name in columns}

    @property
    def advantages(self) -> list[float]:
        """Return the advantages of all processes' rows."""
        return [k.advantage for k in self._kept]

    @property
    def num_padding(self) -> int:
        """Return the number of padding rows over all processes."""
        return sum(k.is_padding for k in self._kept)

    def correct(self, batch: dict[str, Any], gather: Any) -> None:
        """Put the advantages over whole pools into the batch, and take the padding out of its mask and its number of tokens."""
        batch["advantages"] = torch.tensor([k.advantage for k in self._mine]).to(batch["advantages"])
        if not self.num_padding:
            return
        mask = batch["completion_mask"]
        is_padding = torch.tensor([k.is_padding for k in self._mine], device=mask.device)[:, None].to(mask.dtype)
        if not self._form.counts_tokens:
            counted = mask * is_padding * batch.get("tool_mask", 1)
            batch["num_items_in_batch"] = (batch["num_items_in_batch"] - gather(counted.sum()).sum()).clamp(min=1)
        batch["completion_mask"] = mask * (1 - is_padding)
