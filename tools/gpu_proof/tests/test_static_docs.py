"""The facts about machine code are known to be old when the code is, and not before."""

from __future__ import annotations

import ast

from gpu_proof.static_docs import meaning


def test_comments_make_no_facts_stale() -> None:
    """The hash is of the code alone."""
    one, other = '"""Doc."""\nx = 1  # why\n', "x = (\n    1\n)\n"
    assert meaning(ast.parse(one)) == meaning(ast.parse(other))
    assert meaning(ast.parse(one)) != meaning(ast.parse("x = 2\n"))
