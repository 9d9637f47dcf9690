"""The truncation of a sampling distribution by min_p, top_k and top_p, in the order and with the rules of vLLM."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(logits: Tensor, *, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Return the logits with -inf for every token that must not be sampled; their softmax is the truncated, renormalized distribution.

    With p = softmax(logits), what remains is, in this order,
        min_p: the tokens with p >= min_p max(p);
        top_k: the top_k likeliest of these, and all that are as likely as the last of them;
        top_p: with p renormalized over what is left, the fewest of the likeliest whose sum reaches top_p, at least one: a token
            goes if it and all less likely ones together have a mass of at most 1 - top_p. Among equally likely tokens the sort decides.
    A setting at its default changes nothing; the likeliest token always remains.

    Args:
        logits: [N, V] float32, already divided by the temperature.
        top_p: in (0, 1]. 1 keeps all.
        top_k: 0 keeps all, and so does V or more.
        min_p: in [0, 1]. 0 keeps all.
    Returns: [N, V] float32; the argument itself if nothing is truncated.
    Source: vLLM 0.32, v1/sample/sampler.py (the order), ops/topk_topp_sampler.py and logits_processor/builtin.py; min_p: arXiv 2407.01082,
        top_p: arXiv 1904.09751.
    """
    if min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(-1)
        goes = ascending.softmax(-1).cumsum(-1) <= 1 - logits.new_tensor(top_p)  # the difference in float32, as vLLM rounds it
        goes[:, -1] = False
        logits = logits.masked_fill(torch.empty_like(goes).scatter_(-1, order, goes), -torch.inf)
    return logits
