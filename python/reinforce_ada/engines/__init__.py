"""Engines turn requests into completions. Each has its own module; importing this package imports none of them."""

from reinforce_ada.engines.base import Engine

__all__ = ["Engine"]
