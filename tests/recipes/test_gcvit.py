"""gcvit: one grid of queries for all windows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from farfield import recipes
from farfield.attention import Attention
from farfield.near import GlobalQueries, Partition
from farfield.parts import Inputs


def _layer(dims: int, size: int, bias: bool = True) -> Attention:
    torch.manual_seed(0)
    layer = recipes.build("gcvit", 8, 2, dims=dims, size=size, bias=bias, layer=1).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def _shared_queries(layer: Attention, inputs: Inputs) -> torch.Tensor:
    """[B, size, size, 8] by loops over cells: the largest of what the network says of each cell's visible pixels."""
    near, grid, mask = layer.near, inputs.grid, inputs.key_mask
    assert near is not None
    q = inputs.q.transpose(1, 2).reshape(-1, math.prod(grid), 8)
    shown = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    q = q * shown[..., None]
    mixed = F.gelu(F.conv2d(q.mT.reshape(-1, 8, *grid), near.conv.weight, padding=1, groups=8)).flatten(2).mT
    sides = [min(near.size[0], n) for n in grid]
    made = torch.zeros(len(q), *sides, 8, dtype=torch.float64)
    for b in range(len(q)):
        mean = mixed[b, shown[b]].mean(0)
        gate = torch.sigmoid(near.excite.weight @ F.gelu(near.squeeze.weight @ mean))
        said = q[b] + (mixed[b] * gate) @ near.point.weight.T
        for y in range(sides[0]):
            for x in range(sides[1]):
                rows = range(y * grid[0] // sides[0], -(-(y + 1) * grid[0] // sides[0]))
                columns = range(x * grid[1] // sides[1], -(-(x + 1) * grid[1] // sides[1]))
                cell = torch.tensor([r * grid[1] + c for r in rows for c in columns])
                cell = cell[shown[b, cell]]
                if len(cell):
                    made[b, y, x] = said[cell].amax(0)
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size"), [((8, 12), 4), ((7, 11), 3), ((5, 4), 7)])
def test_equals_a_loop_over_windows_with_shared_queries(grid: tuple[int, int], size: int, masked: bool) -> None:
    layer = _layer(2, size)
    tokens = math.prod(grid)
    x = torch.randn(3, tokens, 8, dtype=torch.float64)
    mask = torch.rand(3, tokens) < 0.6 if masked else None
    inputs = layer._inputs(x, grid, mask, None)
    shared = _shared_queries(layer, inputs)
    assert layer.near is not None
    table = layer.near.bias.table.view(2, 2 * size - 1, 2 * size - 1)
    want = torch.zeros_like(inputs.q)
    for b in range(3):
        for y in range(grid[0]):
            for x_ in range(grid[1]):
                rows = range(y // size * size, min(y // size * size + size, grid[0]))
                columns = range(x_ // size * size, min(x_ // size * size + size, grid[1]))
                window = [(r, c) for r in rows for c in columns if mask is None or mask[b, r * grid[1] + c]]
                if not window:
                    continue
                index = torch.tensor([r * grid[1] + c for r, c in window])
                q = shared[b, y % size, x_ % size].view(2, 4)
                bias = torch.stack([table[:, r - y + size - 1, c - x_ + size - 1] for r, c in window], 1)
                scores = torch.einsum("hd,hmd->hm", q, inputs.k[b, :, index]) / 2 + bias
                want[b, :, y * grid[1] + x_] = torch.einsum("hm,hmd->hd", scores.softmax(-1), inputs.v[b, :, index])
    torch.testing.assert_close(layer(x, grid=grid, key_mask=mask), layer.proj(want.transpose(1, 2).flatten(2)))


def test_windows_of_keys_and_values_may_change_places() -> None:
    layer = _layer(1, 4)
    inputs = layer._inputs(torch.randn(2, 20, 8, dtype=torch.float64), (20,), None, None)
    order = torch.randperm(5)
    moved = (order[:, None] * 4 + torch.arange(4)).flatten()
    out = layer.attend(inputs)
    inputs.k, inputs.v = inputs.k[:, :, moved], inputs.v[:, :, moved]
    torch.testing.assert_close(layer.attend(inputs), out[:, :, moved])


def test_every_pixel_changes_what_is_asked() -> None:
    layer = _layer(2, 4, bias=False)
    x = torch.randn(1, 96, 8, dtype=torch.float64, requires_grad=True)
    inputs = layer._inputs(x, (8, 12), None, None)
    assert isinstance(layer.near_spec, GlobalQueries) and layer.near is not None
    (grad,) = torch.autograd.grad(layer.near.queries(inputs).square().sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_even_layers_are_plain_windows() -> None:
    assert recipes.build("gcvit", 16, 4, layer=2).near_spec == Partition(7, bias=True)
