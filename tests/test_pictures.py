"""The pictures of docs are those that the kept results give: `make figures` draws them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import BENCHMARKS, loaded

DOCS = BENCHMARKS.parent / "docs"
SHOWN = {name for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"] for name in re.findall(r"\(([^()]*\.png)\)", page.read_text())}
WRITERS = loaded("write_figures.py").WRITERS


def test_every_picture_that_is_shown_is_there_and_every_one_there_is_shown() -> None:
    assert {Path(name).name for name in SHOWN} == {path.name for path in DOCS.glob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_the_pictures_are_what_the_kept_results_give(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel by pixel, where matplotlib has the version that drew them."""
    mpl = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    script = loaded(name)
    drawn = tmp_path / "docs"
    drawn.mkdir()
    for constant, value in {"ROOT": tmp_path, "DOCS": drawn, "FIGURE": drawn / getattr(script, "FIGURE", drawn).name}.items():
        if hasattr(script, constant):
            monkeypatch.setattr(script, constant, value)
    script.draw()
    found = sorted(drawn.iterdir())
    assert found
    for path in found:
        with image.open(path) as new, image.open(DOCS / path.name) as kept:
            if kept.info.get("Software") != f"matplotlib {mpl.__version__}":
                pytest.skip(f"{path.name} was drawn by {kept.info.get('Software')}, and this is {mpl.__version__}")
            assert new.size == kept.size
            assert new.tobytes() == kept.tobytes(), f"{path.name}: make figures draws another picture"
