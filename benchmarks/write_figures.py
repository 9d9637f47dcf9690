"""Draws every picture of docs from the results that are kept in this repository, in seconds; `make figures` calls it."""

from __future__ import annotations

import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent
WRITERS = ("write_demo.py", "write_docs.py", "write_simulator.py", "evidence/write.py")


def main() -> None:
    """Call the function `draw` of every script that has a picture."""
    for name in WRITERS:
        runpy.run_path(str(HERE / name), run_name=name)["draw"]()


if __name__ == "__main__":
    main()
