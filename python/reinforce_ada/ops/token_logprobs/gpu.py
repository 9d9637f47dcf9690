"""The normalizers that the GPU forms save for the gradient. With z = logit_scale x, capped, and the temperature t of the row:

    row_max = max_j z[j]      log2_sum = log2 sum_j 2^((z[j] - row_max) log2(e) / t)

so that p[j] = 2^((z[j] - row_max) log2(e) / t - log2_sum). Each form may choose the unit of row_max. A token outside the vocabulary
makes the logprob and the gradient of its row NaN; a temperature that is not positive and finite makes everything of its row NaN. Neither
makes a kernel read anything outside of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMALIZERS = ("row_max", "log2_sum")


def empty_normalizers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for row_max and log2_sum, [T] float32 each."""
    num_tokens = rows.shape[0]
    return rows.new_empty(num_tokens, dtype=torch.float32), rows.new_empty(num_tokens, dtype=torch.float32)
