"""The kernels of token_logprobs on the CPU: csrc/ops/token_logprobs on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._torch import address, matrix, row_address
from reinforce_ada.ops.token_logprobs.checks import check_temperature_values, wrong_token
from reinforce_ada.ops.token_logprobs.contract import WHERE, GradientInputs, Inputs, Scores

NORMALIZERS = ("normalizers",)  # csrc/ops/token_logprobs/token_logprobs.h


def empty_normalizers(rows: Tensor) -> tuple[Tensor]:
    """Return memory for the normalizers, [T, 2] float64."""
    return (rows.new_empty((rows.shape[0], 2), dtype=torch.float64),)


def forward(x: Inputs, out: Scores, normalizers: Tensor) -> None:
    """See contract.Kernels. Raises: InputError for ids and temperatures out of range."""
    check_values(WHERE, x.token_ids, x.logits.shape[1], x.temperatures)
    cpu.token_logprobs_forward(
        *matrix(x.logits),
        address(x.token_ids), address(x.temperatures), x.temperature, x.logit_scale, x.soft_cap,
        address(out.logprobs), address(normalizers), address(out.entropy), address(out.sum_p2), torch.get_num_threads(),
    )  # fmt: skip


def check_values(where: str, token_ids: Tensor, vocab: int, temperatures: Tensor | None) -> None:
    """Check ids and temperatures. The public function does not, as under torch.compile values are known only when the operator runs."""
    row = cpu.first_invalid_token(address(token_ids), token_ids.shape[0], vocab)
    if row >= 0:
        raise wrong_token(where, token_ids, row, vocab)
    if temperatures is not None:
        check_temperature_values(where, temperatures)


def gradient(grad: Tensor, x: GradientInputs, normalizers: Tensor, *, first_id: int = 0, bias_sums: Tensor | None = None) -> None:
    """See contract.Kernels. The logits begin at the vocabulary's `first_id`, and the columns are added to `bias_sums` (float64)."""
    cpu.token_logprobs_gradient_piece(
        *matrix(x.logits),
        first_id, address(x.token_ids), address(x.temperatures), x.temperature, x.logit_scale, x.soft_cap,
        address(normalizers), address(x.entropy), address(x.grad_logprobs), address(x.grad_entropy),
        row_address(grad), grad.stride(0), address(bias_sums), torch.get_num_threads(),
    )  # fmt: skip
