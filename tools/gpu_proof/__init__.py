"""Proofs about the GPU kernels on a machine without a GPU; README.md says what each module shows and what it cannot."""

from __future__ import annotations

from pathlib import Path

__all__ = ["HERE", "ROOT"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
