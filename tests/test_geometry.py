"""Integers only: every token is on exactly one list of every query, the tables say what the definition says."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.geometry import EMPTY, Geometry, default_levels, geometry
from support.multipole_oracle import Tree, adjacent, published_levels, sees


@st.composite
def shapes(draw: st.DrawFn, tokens: int = 600) -> Geometry:
    dims = draw(st.integers(1, 3))
    longest = {1: 300, 2: 30, 3: 11}[dims]
    grid = tuple(
        draw(st.lists(st.integers(1, longest), min_size=dims, max_size=dims).filter(lambda g: math.prod(g) <= tokens))
    )
    block = tuple(draw(st.sampled_from((1, 2, 3, 4, 6))) for _ in grid)
    rank = tuple(draw(st.sampled_from([d for d in range(1, m + 1) if m % d == 0])) for m in block)
    most = default_levels(grid, block)
    levels = draw(st.none() | st.integers(min(1, most), most))
    return geometry(grid, block, rank, levels)


def tokens_of_groups(g: Geometry, level: int) -> np.ndarray:
    """[groups, N] bool, from coordinates alone."""
    tokens = list(itertools.product(*(range(n) for n in g.grid)))
    counts = g.group_counts(level)
    out = np.zeros((g.group_total(level), len(tokens)), dtype=bool)
    for t, token in enumerate(tokens):
        index = tuple(x // s for x, s in zip(token, g.group_side(level), strict=True))
        out[np.ravel_multi_index(index, counts), t] = True
    return out


@given(shapes(), st.booleans())
def test_every_token_is_on_exactly_one_list_of_every_block(g: Geometry, causal: bool) -> None:
    causal = causal and g.dims == 1
    leaf = tokens_of_groups(g, 1)
    seen = np.zeros((g.blocks, g.tokens), dtype=int)
    for row, table in enumerate(g.near_list(causal)):
        for block in table[table != EMPTY]:
            seen[row] += leaf[block]
    for level in range(1, g.levels + 1):
        inside, table = tokens_of_groups(g, level), g.far_list(level, causal)
        for row, group in enumerate(g.group_of_block(level)):
            for other in table[group][table[group] != EMPTY]:
                seen[row] += inside[other]
    past = np.arange(g.blocks)[:, None] >= np.arange(g.tokens)[None] // g.block[0] if causal else np.ones_like(seen)
    assert (seen == past).all()


@given(shapes(tokens=150), st.booleans())
def test_lists_are_those_of_the_definition(g: Geometry, causal: bool) -> None:
    causal = causal and g.dims == 1
    tree = Tree(g.grid, g.block, g.rank, g.levels)
    blocks = tree.groups(1)
    for row, table in enumerate(g.near_list(causal)):
        listed = [int(b) for b in table if b != EMPTY]
        assert listed[0] == row
        expected = {j for j, b in enumerate(blocks) if adjacent(b, blocks[row]) and not (causal and j > row)}
        assert len(listed) == len(expected) and set(listed) == expected
    for level in range(1, g.levels + 1):
        groups = tree.groups(level)
        for row, table in enumerate(g.far_list(level, causal)):
            token = tuple(i * s for i, s in zip(groups[row], g.group_side(level), strict=True))
            listed = [int(b) for b in table if b != EMPTY]
            expected = {j for j, b in enumerate(groups) if sees(tree, token, level, b, causal)}
            assert len(listed) == len(expected) and set(listed) == expected


@given(shapes())
def test_block_order_holds_every_token_once_in_its_block(g: Geometry) -> None:
    slots = g.token_of_slot().reshape(g.blocks, g.block_tokens)
    assert sorted(slots[slots != EMPTY]) == list(range(g.tokens))
    leaf = tokens_of_groups(g, 1)
    for block, row in enumerate(slots):
        kept = row[row != EMPTY]
        assert (np.diff(kept) > 0).all()
        assert set(kept) == set(np.nonzero(leaf[block])[0])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(1, 70))
def test_default_levels_are_the_least_with_four_groups(grid: list[int], block: int) -> None:
    assert default_levels(grid, (block,) * len(grid)) == published_levels(tuple(grid), (block,) * len(grid))


@pytest.mark.parametrize("power", range(2, 12))
def test_powers_of_two_have_the_published_levels(power: int) -> None:
    assert default_levels((64 << power,), (64,)) == power - 1


def test_sides_and_counts() -> None:
    g = geometry((100, 37), (8, 4), (2, 1))
    assert (g.dims, g.tokens, g.block_tokens, g.cells_per_group, g.levels) == (2, 3700, 32, 2, 3)
    assert g.group_side(3) == (32, 16) and g.group_counts(3) == (4, 3) and g.group_total(3) == 12
    assert g.cell_side(2) == (8, 8) and g.blocks == 13 * 10


def test_lists_stay_short() -> None:
    """At most 3 near blocks and, below the top, 3 groups per level in 1-D (27 in 2-D, 189 in 3-D): linear work."""
    for grid, near, far in (((5000,), 3, 3), ((90, 90), 9, 27), ((40, 40, 40), 27, 189)):
        g = geometry(grid, 2, 1)
        assert g.near_list().shape[1] == near
        assert all(g.far_list(level).shape[1] <= far for level in range(1, g.levels))
        assert g.far_list(g.levels).shape[1] <= 4 ** len(grid) - 2 ** len(grid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), 4, 2), ["grid=()", "one, two or three lengths"]),
        (((4, 4, 4, 4), 4, 2), ["grid=(4, 4, 4, 4)"]),
        (((0,), 4, 2), ["grid=(0,)", ">= 1"]),
        (((9, 9), (4, 4, 4), 2), ["block=(4, 4, 4)", "2-D"]),
        (((9,), 0, 1), ["block=0", "integer >= 1"]),
        (((9,), 4, 0), ["rank=0", "integer >= 1"]),
        (((9,), True, 1), ["block=True"]),
        (((9,), 8, 3), ["rank=3", "block=8", "[1, 2, 4, 8]"]),
        (((9, 9), (4, 6), (2, 4)), ["rank=4", "block=6", "axis 1", "[1, 2, 3, 6]"]),
        (((64,), 4, 2, 4), ["levels=4", "1 to 3"]),
        (((64,), 4, 2, 0), ["levels=0", "1 to 3"]),
        (((8,), 4, 2, 1), ["levels=1", "0 would be accepted"]),
    ],
)
def test_errors_repeat_what_was_given_and_what_would_do(arguments: tuple[object, ...], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        geometry(*arguments)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)
