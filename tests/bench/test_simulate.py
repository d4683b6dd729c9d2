"""The tile simulator against masks written out, and against the cases that its paper and NATTEN document."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.bench.simulate import DEFAULT_TILES, simulate, tile_map
from farfield.ops.window.reference import window_mask


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.sampled_from([1, 1, 2, 3]))
    longest = {1: 60, 2: 12, 3: 6}[dims]
    grid = [draw(st.integers(1, longest)) for _ in range(dims)]
    window, stride, dilation, causal = [], [], [], []
    for length in grid:
        order = draw(st.booleans())
        step = draw(st.integers(1, 3 if order else min(3, length)))
        size = draw(st.integers(1, length + 3 if order or step == 1 else length // step))
        window.append(size)
        stride.append(draw(st.integers(1, size)))
        dilation.append(step)
        causal.append(order)
    tiles = {name: [draw(st.integers(1, 9)) for _ in grid] for name in ("query_tile", "key_tile")}
    return {"grid": grid, "window": window, "stride": stride, "dilation": dilation, "causal": causal, **tiles}


def _tiles(grid: list[int], dilation: list[int], tile: list[int]) -> tuple[np.ndarray, int]:
    """[N] the tile of every token, row-major, residues of a dilation one after another; and the number of tiles."""
    number, total = np.zeros(1, dtype=int), 1
    for length, step, side in zip(grid, dilation, tile, strict=True):
        of_axis = np.empty(length, dtype=int)
        used = 0
        for residue in range(min(step, length)):
            tokens = np.arange(residue, length, step)
            of_axis[tokens] = used + np.arange(len(tokens)) // side
            used += -(-len(tokens) // side)
        number = (number[:, None] * used + of_axis[None, :]).reshape(-1)
        total *= used
    return number, total


@settings(max_examples=60)
@given(_cases())
def test_equals_brute_force(case: dict[str, Any]) -> None:
    got = simulate(**case)
    rule = [tuple(case[name]) for name in ("grid", "window", "stride", "dilation", "causal")]
    mask = window_mask(*rule).numpy()
    rows, query_tiles = _tiles(case["grid"], case["dilation"], case["query_tile"])
    columns, key_tiles = _tiles(case["grid"], case["dilation"], case["key_tile"])
    drawn = np.zeros((query_tiles, key_tiles), dtype=int)
    for i in range(query_tiles):
        for j in range(key_tiles):
            part = mask[np.ix_(rows == i, columns == j)]
            drawn[i, j] = int(part.any()) + int(part.all())
    assert (got.query_tiles, got.key_tiles) == (query_tiles, key_tiles)
    assert got.touched == (drawn > 0).sum()
    assert got.masked == (drawn == 1).sum()
    assert got.perfect == (got.masked == 0)
    assert got.scores == mask.sum()
    assert got.useful == pytest.approx(mask.sum() / (got.touched * np.prod(case["query_tile"] + case["key_tile"])))
    assert (tile_map(got) == drawn).all()
    plain = simulate(**{**case, "window": case["grid"], "stride": 1, "dilation": 1})
    assert (got.dense, got.dense_scores) == (plain.touched, plain.scores)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tiles", "bound", "speedup", "perfect"),
    [
        ((30, 48, 80), (18, 24, 24), 1, ((4, 8, 8), (2, 8, 8)), 11.11, 5.24, False),
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), ((4, 8, 8), (2, 8, 8)), 11.11, 10.67, False),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), ((4, 8, 8), (2, 8, 8)), 11.11, 11.11, True),
        ((30, 48, 80), (18, 24, 24), 1, ((2, 8, 8), (2, 8, 8)), 11.11, 5.44, False),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), ((2, 8, 8), (2, 8, 8)), 11.11, 11.11, True),
        ((256, 256), 80, 1, ((16, 16), (16, 8)), 10.24, 7.06, False),
        ((256, 256), 80, 16, ((16, 16), (16, 8)), 10.24, 10.24, True),
        ((256, 256), 80, 1, ((16, 8), (16, 8)), 10.24, 7.51, False),
        ((16, 44, 80), (16, 32, 48), (8, 8, 16), ((8, 4, 8), (2, 4, 16)), 2.29, 2.29, True),
    ],
)
def test_the_models_that_the_paper_looks_at(
    grid: tuple[int, ...],
    window: Any,
    stride: Any,
    tiles: tuple[tuple[int, ...], tuple[int, ...]],
    bound: float,
    speedup: float,
    perfect: bool,
) -> None:
    """Hunyuan video, FLUX at 4K, Cosmos: which strides leave nothing to mask."""
    got = simulate(grid, window, stride=stride, query_tile=tiles[0], key_tile=tiles[1])
    assert got.bound == pytest.approx(bound, abs=0.006)
    assert got.speedup == pytest.approx(speedup, abs=0.006)
    assert got.perfect == perfect


def test_a_causal_window_is_compared_with_causal_tiles() -> None:
    got = simulate((1024,), 256, causal=True, query_tile=128, key_tile=128)
    assert got.dense == 8 * 9 // 2
    # The window ends inside the tile two behind, but for the first tiles, which have fewer.
    assert got.touched == 1 + 2 + 6 * 3
    assert got.scores == 256 * 257 // 2 + 768 * 256


def test_defaults_and_json() -> None:
    got = simulate((64, 64), 16)
    assert (got.query_tile, got.key_tile) == DEFAULT_TILES[2]
    told = got.to_json()
    assert told["speedup"] == got.speedup and told["perfect"] is False and told["stride"] == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 2, 3, 4), "window": 3}, "give one, two or three lengths"),
        ({"grid": (0,), "window": 3}, "each >= 1"),
        ({"grid": (9,), "window": 3, "stride": 4}, "stride=4 exceeds window=3"),
        ({"grid": (9,), "window": 3, "dilation": 4}, "dilation=4 spans 12 tokens"),
        ({"grid": (9, 9), "window": 3, "causal": (True,)}, "give one bool, or 2"),
        ({"grid": (9, 9), "window": 3, "query_tile": (3,)}, "query_tile=.* does not fit a 2-D grid"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)


def test_too_many_tiles_are_not_drawn() -> None:
    with pytest.raises(ValueError, match="8,192 tiles cannot be drawn"):
        tile_map(simulate((8192,), 64, query_tile=1, key_tile=1))
