"""Runs the notebooks of docs/notebooks as a kernel would, and writes what their cells print and draw into them.

    python tools/notebooks.py    # after a change of a notebook, or of what it shows

The cells are plain Python: they share one namespace, and a figure that is open at the end of a cell is shown below it. A cell with the tag
"measures" prints times or bytes, which differ between machines: it is run, and its output is not stored.
"""

from __future__ import annotations

import io
import json
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs/notebooks"
Cell = dict[str, Any]


def code_cells(notebook: Cell) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def measures(cell: Cell) -> bool:
    """Return whether the output of a cell depends on the machine."""
    return "measures" in cell["metadata"].get("tags", [])


def outputs_of(notebook: Cell, name: str) -> Iterator[list[Cell]]:
    """Run the code cells in order, and yield the outputs of each in the form of a notebook."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook)):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}[{number}]", "exec", dont_inherit=True), names)
        text = printed.getvalue()
        stream = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []
        yield stream + [_display(png) for png in _figures()]


def _figures() -> Iterator[bytes]:
    """Yield the open figures as PNG, and close them."""
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is None:
        return
    for number in pyplot.get_fignums():
        drawn = io.BytesIO()
        pyplot.figure(number).savefig(drawn, format="png", dpi=80, metadata={"Software": None})
        pyplot.close(number)
        yield drawn.getvalue()


def _display(png: bytes) -> Cell:
    data = {"image/png": b64encode(png).decode(), "text/plain": ["the figure that this cell draws"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        for cell, outputs in zip(code_cells(notebook), outputs_of(notebook, path.name), strict=True):
            cell["outputs"] = [] if measures(cell) else outputs
            print(f"{path.name}: {''.join(''.join(o.get('text', ['(figure)'])) for o in outputs)}")
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    main()
