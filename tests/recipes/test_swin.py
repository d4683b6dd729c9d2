"""swin: rolled images and the mask that undoes the roll, against tiles with an offset."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes
from farfield.attention import Attention
from farfield.near import Partition


def _rolled(layer: Attention, x: torch.Tensor, grid: tuple[int, int], size: int, shift: int) -> torch.Tensor:
    """Shifted-window attention as the paper draws it: roll, cut into windows, mask what met by rolling, roll back."""
    height, width = grid
    inputs = layer._inputs(x, grid, None, None)

    def windows(t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(*t.shape[:2], height, width, -1).roll((-shift, -shift), (2, 3))
        t = t.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # B, H, rows, size, columns, size, D
        return t.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)  # B, rows, columns, H, places, D

    q, k, v = (windows(t) for t in (inputs.q, inputs.k, inputs.v))
    # An image whose every pixel names the side of the seams on which it lay.
    side = torch.zeros(1, 1, height * width, 1)
    if shift:
        wrapped = [(torch.arange(n) < shift).float() for n in grid]
        side = (2 * wrapped[0][:, None] + wrapped[1][None, :]).reshape(1, 1, -1, 1)
    origin = windows(side)[..., 0]
    apart = origin[..., :, None] != origin[..., None, :]
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    ahead = place[None, :] - place[:, None] + size - 1
    assert layer.near is not None
    bias = layer.near.bias.table[:, ahead[..., 0] * (2 * size - 1) + ahead[..., 1]]
    scores = (q @ k.mT * layer.scale + bias).masked_fill(apart, -torch.inf)
    out = (scores.softmax(-1) @ v).unflatten(4, (size, size)).permute(0, 3, 1, 4, 2, 5, 6)
    out = out.reshape(*inputs.q.shape[:2], height, width, -1).roll((shift, shift), (2, 3)).flatten(2, 3)
    mixed: torch.Tensor = layer.proj(out.transpose(1, 2).flatten(2))
    return mixed


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("grid", "size"), [((14, 21), 7), ((8, 12), 4), ((6, 9), 3)])
def test_equals_the_cyclic_shift_with_its_mask(grid: tuple[int, int], size: int, layer: int) -> None:
    torch.manual_seed(0)
    built = recipes.build("swin", 16, 4, dims=2, size=size, layer=layer).double()
    assert built.near is not None
    torch.nn.init.normal_(built.near.bias.table)
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    want = _rolled(built, x, grid, size, size // 2 if layer else 0)
    torch.testing.assert_close(built(x, grid=grid), want)


def test_layers_alternate() -> None:
    assert recipes.build("swin", 16, 4, layer=0).near_spec == Partition(7, bias=True)
    assert recipes.build("swin", 16, 4, layer=3).near_spec == Partition(7, shift=3, bias=True)
    assert recipes.build("swin", 16, 4, dims=2, layer=1, size=(4, 6)).near_spec == Partition((4, 6), (2, 3), bias=True)


def test_one_window_is_full_attention() -> None:
    for layer in (0, 1):
        built = recipes.build("swin", 16, 4, dims=2, layer=layer, bias=False).double()
        dense = recipes.build("dense", 16, 4, dims=2).double()
        dense.load_state_dict(built.state_dict())
        x = torch.randn(1, 42, 16, dtype=torch.float64)
        torch.testing.assert_close(built(x, grid=(6, 7)), dense(x, grid=(6, 7)))
