"""The references index with int64 alone, whatever the caller's integers are: torch 2.6 takes no others in scatter and gather."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = calls()
INTEGERS = ("token_ids", "cu_seqlens")


class IndexDtypes(TorchDispatchMode):
    """Records the dtype of every tensor that an operator of torch takes as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        for name in ("index", "indices"):
            values = given.get(name, ())
            for x in values if isinstance(values, list | tuple) else [values]:
                if isinstance(x, Tensor):
                    self.seen.setdefault(str(func), set()).add(x.dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if set(INTEGERS) & set(call.tensors)])
def test_the_reference_indexes_with_int64(name: str) -> None:
    call = CALLS[name].with_tensors(lambda argument, x: x.int() if argument in INTEGERS else x)
    with IndexDtypes() as recorded:
        results = call.evaluate("reference")
    wrong = {op: dtypes for op, dtypes in recorded.seen.items() if not dtypes <= {torch.int64, torch.bool}}
    assert wrong == {}
    torch.testing.assert_close(results, CALLS[name].evaluate("reference"), rtol=0, atol=0)


def test_the_calls_index() -> None:
    """Or the test above could not fail."""
    with IndexDtypes() as recorded:
        torch.zeros(2).index_add(0, torch.zeros(2, dtype=torch.int32), torch.ones(2))
        CALLS["group_advantages offsets"].evaluate("reference")
        CALLS["token_logprobs plain"].evaluate("reference")
    assert torch.int32 in recorded.seen["aten.index_add.default"]
    assert {"aten.scatter_reduce.two", "aten.gather.default"} <= set(recorded.seen)
