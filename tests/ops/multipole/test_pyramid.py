"""Summaries up and their gradients down: the hand-written gradient equals autograd's, counts are counts."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.geometry import EMPTY, Geometry
from farfield.ops.multipole import pyramid
from farfield.ops.multipole.summary import Summaries, pack
from support.multipole_cases import geometries, make_summary


def validity(g: Geometry, batch: int, share: float) -> torch.Tensor:
    """[batch, slots]: filled slots, some of them hidden."""
    filled = torch.from_numpy(g.token_of_slot() != EMPTY)
    return filled & (torch.rand(batch, len(filled)) < share)


@settings(max_examples=60)
@given(
    geometries(),
    st.sampled_from(("mean", "shared", "pooled", "learned")),
    st.booleans(),
    st.sampled_from((1.0, 0.7, 0.1)),
)
def test_down_is_the_gradient_of_up(g: Geometry, kind: str, own: bool, share: float) -> None:
    summary = make_summary(kind, g, 2, 2, 3, own)
    valid = validity(g, 2, share)
    key, value = (
        torch.randn(2, 2, valid.shape[1], 3, dtype=torch.float64)
        .masked_fill(~valid[:, None, :, None], 0.0)
        .requires_grad_()
        for _ in range(2)
    )
    counts = pyramid.count(valid, g, g.levels)
    built = pyramid.up(summary, key, value, valid, counts, g, g.levels)
    for level, side in itertools.product(range(1, g.levels + 1), built):
        assert side[level - 1].shape == (2, 2, g.group_total(level), g.cells_per_group, 3)
    grads = Summaries(*(tuple(torch.randn_like(x) for x in side) for side in built))
    leaves = [key, value, *pack(summary)[1]]
    into = torch.zeros_like(key.detach()), torch.zeros_like(key.detach())
    with torch.no_grad():
        again = pyramid.up(summary, key, value, valid, counts, g, g.levels)
        weights = pyramid.down(summary, key, value, valid, counts, g, again, grads, *into)
    for a, b in zip((*built.keys, *built.values), (*again.keys, *again.values), strict=True):
        torch.testing.assert_close(a, b)
    if g.levels == 0:
        assert all((x == 0).all() for x in (*into, *weights))
        return
    loss = sum((a * b).sum() for x, y in zip(built, grads, strict=True) for a, b in zip(x, y, strict=True))
    wanted = torch.autograd.grad(loss, leaves, allow_unused=True)
    keep = valid[:, None, :, None].expand_as(key)
    for i, (got, want, leaf) in enumerate(zip((*into, *weights), wanted, leaves, strict=True)):
        want = torch.zeros_like(leaf) if want is None else want
        if i < 2:  # hidden tokens get no gradient: the operator masks it, here it is not looked at
            got, want = got[keep], want[keep]
        torch.testing.assert_close(got, want)


@given(geometries(), st.sampled_from((1.0, 0.6)))
def test_counts_and_means(g: Geometry, share: float) -> None:
    """Counts are the valid tokens of a cell, by looking at each token; means are over them."""
    valid = validity(g, 1, share)
    counts = pyramid.count(valid, g, g.levels)
    x = torch.randn(1, 1, valid.shape[1], 2, dtype=torch.float64).masked_fill(~valid[:, None, :, None], 0.0)
    means = pyramid.means(x, g, counts, g.levels)
    token = g.token_of_slot()
    for level in range(1, g.levels + 1):
        number = torch.zeros(pyramid.cell_shape(g, level), dtype=torch.float64)
        total = torch.zeros(*number.shape, 2, dtype=torch.float64)
        for slot, t in enumerate(token):
            if t != EMPTY and valid[0, slot]:
                place, rest = [], int(t)
                for n in reversed(g.grid):
                    place.insert(0, rest % n)
                    rest //= n
                cell = tuple(a // s for a, s in zip(place, g.cell_side(level), strict=True))
                number[cell] += 1
                total[cell] += x[0, 0, slot]
        assert torch.equal(counts.cells[level - 1][0, 0, ..., 0].double(), number)
        torch.testing.assert_close(means[level - 1][0, 0], total / number.clamp(min=1)[..., None])


@given(geometries())
def test_cells_and_groups_are_two_views_of_one_thing(g: Geometry) -> None:
    for level in range(1, g.levels + 1):
        cells = torch.arange(prod(pyramid.cell_shape(g, level))).view(1, 1, *pyramid.cell_shape(g, level), 1)
        groups = pyramid.to_groups(cells, g, level)
        assert groups.shape == (1, 1, g.group_total(level), g.cells_per_group, 1)
        assert torch.equal(pyramid.to_cells(groups, g, level), cells)


@pytest.mark.parametrize("levels", [1, 2])
def test_ready_summaries_of_more_levels_than_needed(levels: int) -> None:
    g = Geometry((32,), (4,), (2,), levels)
    ready = make_summary("given", Geometry((32,), (4,), (2,), 2), 1, 1, 3)
    valid = torch.ones(1, 32, dtype=torch.bool)
    x = torch.zeros(1, 1, 32, 3, dtype=torch.float64)
    counts = pyramid.count(valid, g, levels)
    built = pyramid.up(ready, x, x, valid, counts, g, levels)
    assert len(built.keys) == levels
    grads = Summaries(*(tuple(torch.ones_like(t) for t in side) for side in built))
    got = pyramid.down(ready, x, x, valid, counts, g, built, grads, x.clone(), x.clone())
    assert [t.sum().item() == t.numel() for t in got] == [level < levels for _ in range(2) for level in range(2)]
    assert len({t.untyped_storage().data_ptr() for t in got}) == 4
