"""maxvit: grid attention is block attention of permuted pixels, and both together see the image."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes
from farfield.near import Partition


@pytest.mark.parametrize(
    ("grid", "size"), [((21,), 7), ((14, 21), 7), ((8, 12), 4), ((6, 8), (3, 2)), ((4, 6, 2), 2), ((5, 6), 7)]
)
def test_grid_attention_is_block_attention_of_permuted_pixels(
    grid: tuple[int, ...], size: int | tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    block, spread = (recipes.build("maxvit", 16, 4, dims=dims, size=size, layer=i).double() for i in (0, 1))
    assert block.near_spec == Partition(size, bias=True)
    assert spread.near_spec == Partition(size, spread=True, bias=True)
    assert block.near is not None
    torch.nn.init.normal_(block.near.bias.table)
    spread.load_state_dict(block.state_dict())
    sizes = size if isinstance(size, tuple) else (size,) * dims
    x = torch.randn(2, *grid, 16, dtype=torch.float64)

    def swapped(t: torch.Tensor, back: bool) -> torch.Tensor:
        """Along every axis, rows of a table of (size, length / size) become its columns."""
        for axis, (n, s) in enumerate(zip(grid, sizes, strict=True), start=1):
            side = min(s, n)
            table = (n // side, side) if back else (side, n // side)
            t = t.unflatten(axis, table).transpose(axis, axis + 1).flatten(axis, axis + 1)
        return t

    def run(layer: torch.nn.Module, t: torch.Tensor) -> torch.Tensor:
        return layer(t.reshape(2, -1, 16), grid=grid).view(x.shape)

    torch.testing.assert_close(run(spread, x), swapped(run(block, swapped(x, False)), True))


@pytest.mark.parametrize("grid", [(16, 12), (13, 11)])
def test_block_and_grid_together_see_every_pixel(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block, spread = (recipes.build("maxvit", 8, 2, dims=2, size=4, layer=i).double() for i in (0, 1))
    x = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    for first, second in ((block, spread), (spread, block)):
        y = second(first(x, grid=grid), grid=grid)
        (grad,) = torch.autograd.grad(y[0, 5].square().sum(), x)
        read = (grad[0].abs().sum(-1) > 0).float().mean()
        # Of an image that does not divide, the last tiles are smaller and miss some.
        assert read == 1 if grid == (16, 12) else read > 0.6
