from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from farfield.explain import show
from farfield.explain.pattern import EXACT, UNSEEN, Pattern, pattern


@pytest.fixture(scope="module")
def seen() -> Pattern:
    return pattern("fma", 64, block=4, rank=2)


@pytest.fixture(scope="module")
def image() -> Pattern:
    return pattern("fma", (16, 20), causal=False, block=2, rank=1)


def luminance(rgb: tuple[float, float, float]) -> float:
    return float(np.dot(rgb, (0.2126, 0.7152, 0.0722)))


def test_every_code_has_its_own_colour_and_levels_get_paler() -> None:
    colours = [show.colour_of(code, 5) for code in (EXACT, UNSEEN, 1, 2, 3, 4, 5)]
    assert len(set(colours)) == len(colours)
    light = [luminance(colour) for colour in show.level_colours(5)]
    assert light == sorted(light)
    assert min(np.diff(light)) > 0.05


def test_neighbouring_cells_differ_and_the_same_cell_does_not(seen: Pattern) -> None:
    picture = show.paint(seen)
    row = 63
    level = seen.codes[row] == seen.levels[-1]
    cells = seen.cells[seen.levels[-1] - 1]
    for a, b in zip(np.flatnonzero(level)[:-1], np.flatnonzero(level)[1:], strict=True):
        same = np.allclose(picture[row, a], picture[row, b])
        assert same == (cells[a] == cells[b])


def test_the_legend_names_what_occurs(seen: Pattern) -> None:
    words = [text for text, _ in show.legend_entries([seen, pattern("l2vit", 64, layer=1)])]
    assert words[0] == "exact"
    assert "level 1: 2 tokens in one" in words
    assert words[-2:] == ["mixed into landmarks or a state", "not seen"]


def test_descriptions_are_numbers(seen: Pattern) -> None:
    assert show.describe(pattern("dense", 64, causal=False)) == "a query sees 64 tokens"
    assert "summaries for 32 (means)" in show.describe(seen)


def test_figures_are_drawn(seen: Pattern, image: Pattern) -> None:
    exact = show.exact_weights(*show.example_vectors("smooth", (64,)), True)
    for figure in (
        show.pattern_figure([seen, seen]),
        show.grid_figure(image, [0, 100]),
        show.weights_figure(seen, exact, exact, "smooth"),
    ):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=40)
        assert file.getvalue().startswith(b"\x89PNG")


def test_exact_weights_are_a_causal_softmax() -> None:
    weights = show.exact_weights(*show.example_vectors("random", (30,)), True)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights[~np.tri(30, dtype=bool)] == 0).all()


def test_smooth_vectors_prefer_neighbours() -> None:
    weights = show.exact_weights(*show.example_vectors("smooth", (256,)), False)
    near = abs(np.subtract.outer(np.arange(256), np.arange(256))) < 32
    assert weights[near].sum() > 0.5 * weights.sum()


def test_the_terminal_picture_has_two_rows_per_line(seen: Pattern, image: Pattern) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100, record=True)
    console.print(show.terminal_picture(seen, 32))
    console.print(show.terminal_picture(image, 60, query=5))
    console.print(show.terminal_legend(seen))
    lines = console.export_text().splitlines()
    assert [len(line) for line in lines[:16]] == [32] * 16
    assert lines[16] == "▀" * 60
    assert len(lines[16:]) == 24 + 2 or lines[-1].strip()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, _: show.grid_figure(p, [0]), "2-D"),
        (lambda _, g: show.grid_figure(g, [320]), "320 tokens, 0 to 319"),
        (lambda _, g: show.check_queries([-1], 4), "query -1 is outside"),
        (lambda p, g: show.example_vectors("wavy", (4,)), "'smooth' or 'random'"),
    ],
)
def test_bad_input_is_refused(seen: Pattern, image: Pattern, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(seen, image)  # type: ignore[operator]


def test_terminal_weights_are_shaded_by_their_logarithm(seen: Pattern) -> None:
    weights = np.where(seen.codes == UNSEEN, 0.0, 1.0)
    weights[32:] *= 1e-2
    for columns, width in ((64, 64), (16, 16)):
        lines = list(show.terminal_weights(seen, weights, columns).segments)
        shades = {segment.style.color for segment in lines if segment.style is not None}
        assert sum(segment.text != "\n" for segment in lines) == width * (width // 2)
        assert len(shades) == 3  # the largest, a hundredth of it, unseen
    assert "0.0001" in show.weights_legend().plain
