"""fma2d: the keys of every pixel, found by walking the quadtree."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes

Cell = tuple[int, int]


def _keys(pixel: Cell, grid: Cell, block: int, rank: int) -> list[list[Cell]]:
    """What a pixel sees: lists of the pixels that share one key, those of one pixel for the near field."""

    def pixels(first: Cell, side: int) -> list[Cell]:
        rows, columns = (range(a, min(a + side, n)) for a, n in zip(first, grid, strict=True))
        return [(y, x) for y in rows for x in columns]

    def adjacent(a: Cell, b: Cell) -> bool:
        return max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1

    levels = 0
    if max(-(-n // block) for n in grid) > 2:
        levels = 1
        while max(-(-n // (block << levels - 1)) for n in grid) > 4:
            levels += 1
    seen: list[list[Cell]] = []

    def visit(group: Cell, level: int) -> None:
        """A group beside that of the pixel opens into its children, the others are seen through their cells."""
        side = block << level - 1
        own = (pixel[0] // side, pixel[1] // side)
        first = (group[0] * side, group[1] * side)
        if not adjacent(group, own):
            cell = side // rank
            for dy in range(0, side, cell):
                for dx in range(0, side, cell):
                    seen.append(pixels((first[0] + dy, first[1] + dx), cell))
        elif level > 1:
            for child in pixels((2 * group[0], 2 * group[1]), 2):
                visit(child, level - 1)
        else:
            seen.extend([p] for p in pixels(first, side))

    if levels == 0:
        return [[p] for p in pixels((0, 0), max(grid))]
    top = block << levels - 1
    for y in range(-(-grid[0] // top)):
        for x in range(-(-grid[1] // top)):
            visit((y, x), levels)
    return [cell for cell in seen if cell]


@pytest.mark.parametrize(
    ("grid", "block", "rank"), [((9, 14), 2, 1), ((13, 10), 2, 2), ((17, 5), 2, 1), ((4, 3), 2, 2), ((11, 23), 4, 2)]
)
def test_equals_the_quadtree_walked_by_hand(grid: Cell, block: int, rank: int) -> None:
    torch.manual_seed(0)
    layer = recipes.build("fma2d", 8, 2, block=block, rank=rank, summary="mean", bias=None).double()
    tokens = grid[0] * grid[1]
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    inputs = layer._inputs(x, grid, None, None)
    want = torch.empty_like(inputs.q)
    for row in range(tokens):
        cells = _keys((row // grid[1], row % grid[1]), grid, block, rank)
        members = [torch.tensor([y * grid[1] + x for y, x in cell]) for cell in cells]
        # Every pixel of the image once, itself or in one summary.
        assert torch.equal(torch.cat(members).sort().values, torch.arange(tokens))
        keys, values = (torch.stack([t[:, :, m].mean(2) for m in members], 2) for t in (inputs.k, inputs.v))
        count = torch.tensor([float(len(m)) for m in members], dtype=torch.float64)
        scores = (inputs.q[:, :, row : row + 1] @ keys.mT)[:, :, 0] * layer.scale + count.log()
        want[:, :, row] = (scores.softmax(-1)[:, :, None] @ values)[:, :, 0]
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(want.transpose(1, 2).flatten(2)))


def test_images_only() -> None:
    assert recipes.build("fma2d", 8, 2).spec.dims == 2
    with pytest.raises(ValueError, match=r"'fma2d' works in 2-D; dims=1 was asked for"):
        recipes.build("fma2d", 8, 2, dims=1)
