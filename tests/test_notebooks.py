"""The notebooks of docs/ run as they stand, and what they store is what their cells print and draw."""

from __future__ import annotations

import io
import json
import sys
from base64 import b64decode

import numpy as np
import pytest

from notebooks import FOLDER, code_cells, measures, outputs_of

PATHS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """The notebooks set torch's seed."""
    import torch

    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def stored_and_new(path):
    """The stored outputs of each cell whose output does not depend on the machine, and what it gives now."""
    notebook = json.loads(path.read_text())
    both = zip(code_cells(notebook), outputs_of(notebook, path.name), strict=True)
    for number, (cell, new) in enumerate(both):
        assert cell["execution_count"] is None, f"cell {number}: outputs are written by tools/notebooks.py"
        if measures(cell):
            assert cell["outputs"] == []
            assert new, f"cell {number} prints nothing"
        else:
            yield number, cell["outputs"], new


def texts(outputs):
    return ["".join(o["text"]) for o in outputs if o["output_type"] == "stream"]


def pictures(outputs):
    matplotlib = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed: figures are not compared")
    found = [o["data"]["image/png"] for o in outputs if o["output_type"] == "display_data"]
    return [matplotlib.imread(io.BytesIO(b64decode(png)), format="png") for png in found]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_print_and_draw_what_they_store(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    num_figures = 0
    for number, stored, new in stored_and_new(path):
        assert texts(stored) == texts(new), f"cell {number}; if the new text is right: python tools/notebooks.py"
        for before, now in zip(pictures(stored), pictures(new), strict=True):
            assert before.shape == now.shape
            assert np.abs(before - now).mean() < 0.002, f"cell {number} draws something else"  # fonts may move by a pixel
            num_figures += 1
    assert num_figures == (path.stem == "adaptive_sampling")


def test_the_figure_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    notebook = json.loads((FOLDER / "adaptive_sampling.ipynb").read_text())
    said = [text for outputs in outputs_of(notebook, "adaptive_sampling") for text in texts(outputs)]
    assert "the figure needs matplotlib: pip install matplotlib\n" in said


def test_a_figure_that_differs_is_seen():
    """The tolerance above lets no other figure through: a missing line changes more of it."""
    stored = pictures(next(o for _, o, _ in stored_and_new(FOLDER / "adaptive_sampling.ipynb") if len(o) and "data" in o[-1]))[0]
    changed = stored.copy()
    changed[:, : changed.shape[1] // 2] = 1  # without its left half
    assert np.abs(stored - changed).mean() > 0.01


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_are_notebooks(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert notebook["cells"][0]["source"][0].startswith("# ")
