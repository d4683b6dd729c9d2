"""The cost model against counts written out: every pair of every query, one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from farfield import far, near, recipes
from farfield.bench import model
from farfield.bench.case import Case
from farfield.bench.model import Rates, Work, floor, work_of
from farfield.explain.pattern import EXACT, pattern_of_parts
from farfield.geometry import default_levels
from farfield.ops.multipole import effective_weights
from farfield.ops.window import window_attention
from farfield.parts import Part


def tokens_of(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in grid)))


def group(token: tuple[int, ...], side: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x // s for x, s in zip(token, side, strict=True))


def beside(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))


def near_pairs(grid: tuple[int, ...], block: tuple[int, ...], causal: bool, sinks: int) -> int:
    tokens = tokens_of(grid)
    return sum(
        (beside(group(q, block), group(k, block)) or j < sinks) and (not causal or j <= i)
        for i, q in enumerate(tokens)
        for j, k in enumerate(tokens)
    )


def far_pairs(
    grid: tuple[int, ...], block: tuple[int, ...], rank: tuple[int, ...], causal: bool, sinks: int, pooled: Any = None
) -> int:
    """Straight from the definition: a cell is on a query's list when its group is not adjacent but the parent is."""
    tokens = tokens_of(grid)
    levels = default_levels(grid, block)
    total = 0
    for level in range(1, levels + 1):
        side = tuple(m << (level - 1) for m in block)
        cell = tuple(s // p for s, p in zip(side, rank, strict=True))
        cells = {group(t, cell) for t in tokens[sinks:]}
        part = (1,) * len(grid) if pooled is None else tuple(s // p for s, p in zip(side, pooled, strict=True))
        askers = {(group(t, side), group(t, part)) for t in tokens}
        for own, _ in askers:
            for c in cells:
                g = tuple(x // p for x, p in zip(c, rank, strict=True))
                seen = not beside(own, g)
                if level < levels:
                    seen = seen and beside(tuple(x // 2 for x in own), tuple(x // 2 for x in g))
                if causal:
                    seen = seen and g < own
                total += seen
    return total


@pytest.mark.parametrize(
    ("grid", "block", "rank", "causal", "sinks", "pooled"),
    [
        ((97,), (4,), (2,), True, 0, None),
        ((64,), (4,), (4,), False, 0, None),
        ((50,), (4,), (2,), True, 3, None),
        ((61,), (4,), (2,), True, 14, None),
        ((50,), (4,), (1,), False, 5, None),
        ((61,), (4,), (2,), False, 0, (2,)),
        ((7,), (4,), (2,), True, 0, None),
        ((19, 14), (2, 2), (2, 1), False, 0, None),
        ((13, 9), (2, 2), (1, 1), False, 4, None),
        ((11, 6, 5), (2, 1, 1), (2, 1, 1), False, 0, None),
    ],
)
def test_multipole(
    grid: tuple[int, ...], block: tuple[int, ...], rank: tuple[int, ...], causal: bool, sinks: int, pooled: Any
) -> None:
    parts = near.Blocks(block), far.Pyramid(rank, sinks=sinks, query_rank=pooled)
    work = work_of(*parts, Case(grid, causal=causal))
    assert work is not None
    assert work.exact == near_pairs(grid, block, causal, sinks)
    assert work.far == far_pairs(grid, block, rank, causal, sinks, pooled)


def test_pairs_are_those_of_the_effective_weights() -> None:
    """Where every summary is a token (rank = block, one level), the matrix itself has as many places as pairs."""
    n, block = 40, 10
    zero = torch.zeros(1, 1, n, 4)
    weights = effective_weights(zero, zero, block=block, rank=block, causal=True)
    work = work_of(near.Blocks(block), far.Pyramid(block), Case((n,), causal=True))
    assert work is not None and work.exact + work.far == int((weights > 0).sum()) == n * (n + 1) // 2


@pytest.mark.parametrize(
    ("grid", "rule", "causal"),
    [
        ((23,), (5, 1, 1), True),
        ((23,), (4, 1, 1), False),
        ((23,), (6, 3, 1), True),
        ((20,), (5, 5, 1), False),
        ((29,), (3, 1, 4), True),
        ((29,), (3, 1, 4), False),
        ((8,), (50, 1, 1), False),
        ((8,), (50, 1, 1), True),
        ((7, 9), (3, 2, 1), False),
        ((4, 5, 3), (3, 1, 1), False),
    ],
)
def test_windows_by_the_weights_of_the_reference_engine(
    grid: tuple[int, ...], rule: tuple[int, int, int], causal: bool
) -> None:
    size, stride, dilation = rule
    n = math.prod(grid)
    zero, eye = torch.zeros(1, 1, n, n), torch.eye(n)[None, None]
    weights = window_attention(
        zero, zero, eye, window=size, stride=stride, dilation=dilation, causal=causal, grid=grid, impl="reference"
    )
    assert model.window(Case(grid, causal=causal), size, stride, dilation).exact == int((weights > 0).sum())


def test_dense_linear_landmarks_projection() -> None:
    case = Case((10,), causal=True, heads=2, head_dim=8)
    assert work_of(near.Dense(), None, case) == Work(exact=55)
    assert work_of(near.Dense(), None, Case((10,))) == Work(exact=100)
    assert work_of(None, far.Linear(), case) == Work(products=20, stored=8)
    assert work_of(None, far.Landmarks(4), Case((10,))).far == 2 * 10 * 4  # type: ignore[union-attr]
    # Chunks of 4: the first four queries see none, the next four one chunk's landmarks, the last two those of two.
    assert work_of(None, far.Projection(3, chunk=4), case).far == 3 * (4 * 1 + 2 * 2)  # type: ignore[union-attr]
    assert work_of(near.Conv(3), None, case) == Work(sums=30)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(29,), (7, 10), (3, 5, 4)])
def test_parts_of_images_are_counted_as_they_are_drawn(grid: tuple[int, ...], causal: bool) -> None:
    if causal and len(grid) > 1:
        return
    case = Case(grid, causal=causal)
    exact = [near.Partition(4), near.Partition(4, shift=2), near.Anchors(2)]
    exact += [] if causal else [near.Partition(3, spread=True), near.GlobalQueries(4), near.Window(2, dilation=None)]
    for part in exact:
        work = work_of(part, None, case)
        seen = pattern_of_parts("near", part, None, grid, causal)
        assert work is not None and work.exact == (seen.codes == EXACT).sum(), part
    for part in (far.Pooled(3), far.Pooled(2, reach=1), far.Pooled(2, reach=2, rank=1)):
        work = work_of(None, part, case)
        seen = pattern_of_parts("far", None, part, grid, causal)
        assert work is not None and work.far == round(seen.summaries_per_query * seen.tokens), part


def test_multigrid_spectrum_relay_and_channels() -> None:
    case = Case((32,), head_dim=8)
    # Levels of 16, 8 and 4 cells, each cell in a window of 4.
    assert work_of(None, far.Multigrid(4), case) == Work(far=4 * (16 + 8 + 4), sums=4 * 56, stored=4 * 28)
    assert work_of(None, far.Channels(), case) == work_of(None, far.Linear(), case)
    assert work_of(None, far.Relay(8, 2), case) == Work(far=2 * 32 * 2 + 8**2, sums=64, stored=32)
    work = work_of(None, far.Spectrum(8), case)
    assert work is not None and work.sums == 2.5 * 32 * 5 + 64
    assert work_of(near.DynamicConv(3), None, case) == Work(sums=32 * 4)


def test_the_summaries_of_two_levels() -> None:
    # 64 tokens in blocks of 4: levels of 16, 8 and 4 groups, two cells each.
    work = model.pyramid(Case((64,)), far.Pyramid(2), 4)
    assert work.sums == 2 * (64 + 32 + 16)
    assert work.stored == 2 * (32 + 16 + 8)


def test_flops_and_bytes_of_dense_attention() -> None:
    case = Case((10,), batch=2, heads=3, head_dim=4, dtype="float32")
    work = model.dense(case)
    assert work.flops(case, "forward") == 2 * 3 * 4 * 4 * 100
    assert work.flops(case, "backward") == 3.5 * work.flops(case, "forward")
    assert work.bytes(case, "forward") == 4 * (2 * 3 * 10 * 4) * 4
    assert work.bytes(case, "backward") == 12 * (2 * 3 * 10 * 4) * 4 + 2 * 2 * 3 * 10 * 4
    one = model.decode(case)
    assert one.flops(case, "decode") == 2 * 3 * 4 * 4 * 10
    assert one.bytes(case, "decode") == (2 * 10 + 2) * (2 * 3 * 4) * 4
    half = Case((10,), batch=2, heads=3, head_dim=4, dtype="bfloat16")
    assert work.bytes(half, "forward") == work.bytes(case, "forward") / 2


def test_the_floor_is_the_slower_of_the_two() -> None:
    assert floor(100.0, 10.0, Rates(matrix=10.0, memory=10.0)) == (floor(100.0, 1.0, Rates(10.0, 10.0)))
    assert floor(100.0, 10.0, Rates(10.0, 10.0)).seconds == 10.0
    assert floor(100.0, 10.0, Rates(10.0, 10.0)).bound == "matrix"
    assert floor(1.0, 10.0, Rates(10.0, 1.0)).bound == "memory"


def test_an_unknown_part_is_not_guessed() -> None:
    class Other(Part):
        pass

    assert work_of(Other(), None, Case((8,))) is None


def test_opened_cells_are_not_counted_as_if_they_were_closed() -> None:
    case = Case((256,), causal=True)
    assert work_of(near.Blocks(8), far.Pyramid(rank=2), case) is not None
    assert work_of(near.Blocks(8), far.Pyramid(rank=2, open=4), case) is None


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_counted(name: str) -> None:
    for layer in (0, 1):
        built = recipes.build(name, 32, 4, layer=layer)
        case = Case({1: (300,), 2: (15, 20), 3: (3, 10, 10)}[built.spec.dims], heads=4, head_dim=8)
        work = work_of(built.near_spec, built.far_spec, case)
        assert work is not None and work.flops(case, "forward") > 0
