"""How large a comparison may be: the types of its numbers of prompts, repetitions and remembered completions."""

from __future__ import annotations

from typing import Annotated

from reinforce_ada.config.values import Range

Prompts = Annotated[int, Range(1, 10**7)]
Seeds = Annotated[int, Range(1, 10**4)]
Earlier = Annotated[int, Range(0, 10**4)]
