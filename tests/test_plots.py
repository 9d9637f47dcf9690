"""The palette can be told apart by every eye on both backgrounds, and a way to sample looks the same wherever it is drawn."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reinforce_ada import plots
from reinforce_ada.plots import DARK, FAMILIES, LIGHT, Theme, family_of, looks, spread
from reinforce_ada.sampling.presets import PRESETS

# Machado, Oliveira and Fernandes 2009, table 1, severity 1, for linear RGB.
VISIONS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Ottosson 2020, https://bottosson.github.io/posts/oklab
TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(color: str) -> NDArray[np.float64]:
    assert re.fullmatch("#[0-9a-f]{6}", color)
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_LMS) @ rgb)


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, from 1 to 21."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def test_the_formulas_are_right() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    np.testing.assert_allclose(oklab(linear("#ff0000")), [0.62796, 0.22486, 0.12585], atol=2e-5)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("vision", VISIONS)
def test_every_two_colours_can_be_told_apart(theme: Theme, vision: str) -> None:
    seen = [oklab(np.clip(np.array(VISIONS[vision]) @ linear(color), 0, 1)) for color in theme.series]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 0.085


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_everything_stands_out_from_the_background(theme: Theme) -> None:
    assert len(theme.series) == len(FAMILIES)
    assert all(contrast(color, theme.background) >= 3 for color in theme.series)
    assert all(contrast(color, theme.background) >= 4.5 for color in (theme.ink, theme.muted))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("grpo-8", "grpo"), ("grpo:group_size=16", "grpo"), ("grpo", "grpo"), ("reinforce-ada-balance", "balance"), ("memory-1", "memory"),
        ("reinforce-ada-balance:decide_every=1, stream", "balance"), ("pos", "pos"), ("mine-2", "mine"), ("", ""), ("-8", ""),
    ],
)  # fmt: skip
def test_a_name_has_its_family(name: str, family: str) -> None:
    assert family_of(name) == family


def test_families_are_presets() -> None:
    assert set(FAMILIES) - {"predicted"} <= {family_of(name) for name in PRESETS}


def test_a_family_has_one_colour_wherever_it_is_drawn() -> None:
    alone, among = looks(["reinforce-ada-balance"]), looks(["mine", "grpo-8", "grpo-4", "balance", "other"])
    assert alone["reinforce-ada-balance"].place == among["balance"].place == FAMILIES.index("balance")
    assert among["grpo-8"].place == among["grpo-4"].place != among["mine"].place != among["other"].place
    assert among["grpo-8"].dash == "-" != among["grpo-4"].dash
    assert not {among["mine"].place, among["other"].place} & {FAMILIES.index("grpo"), FAMILIES.index("balance")}


@given(st.lists(st.sampled_from([*FAMILIES, *(f"grpo-{n}" for n in range(6)), "a", "b", "c"]), unique=True, max_size=14))
def test_no_two_series_look_alike(names: list[str]) -> None:
    assert len(set(looks(names).values())) == len(names)


@given(st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), max_size=12), st.integers(1, 80).map(lambda n: n / 8))
def test_labels_are_moved_apart_and_no_further(values: list[float], gap: float) -> None:
    placed = spread(values, gap)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(placed[b] - placed[a] >= gap - 1e-6 for a, b in itertools.pairwise(order))
    assert sum(placed) == pytest.approx(sum(values), abs=1e-6)
    if all(values[b] - values[a] >= gap for a, b in itertools.pairwise(order)):
        assert placed == pytest.approx(values)


@pytest.mark.parametrize(("values", "placed"), [([0, 0], [-1, 1]), ([5, 0, 0.5, 9], [5, -0.75, 1.25, 9]), ([], [])])
def test_where_labels_go(values: list[float], placed: list[float]) -> None:
    assert spread(values, 2) == placed


def test_no_other_module_has_colours_of_its_own() -> None:
    modules = [path for path in (Path(__file__).parents[1] / "python").rglob("*.py") if path.name != "plots.py"]
    assert [path.name for path in modules if re.search(r"[\"']#[0-9a-fA-F]{6}\b", path.read_text())] == []


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = plots.new_figure(4, 3, dpi=100)
    axes = figure.subplots()
    points = [(x / 40, 0.5) for x in range(41)] + [(0.5, y / 20) for y in range(21)]
    axes.plot(*zip(*points, strict=True), "o")
    figure.canvas.draw()
    plots.place_labels(axes, [(x, y, f"{x:.2f}", LIGHT.ink) for x, y in points])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 10 < len(boxes) < len(points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)


def test_labels_at_the_edge_do_not_overlap(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = plots.new_figure(4, 3, dpi=100)
    axes = figure.subplots()
    axes.set_ylim(0, 1)
    plots.label_ends(axes, [(0.5, "one", LIGHT.ink), (0.501, "two", LIGHT.ink), (0.52, "three", LIGHT.ink)])
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 1 for below, above in itertools.pairwise(boxes))
    plots.save(figure, tmp_path / "a.png", where="test")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
