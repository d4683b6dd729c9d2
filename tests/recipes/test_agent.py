"""agent: the explicit product of two softmax matrices, beside a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from farfield import recipes


@pytest.mark.parametrize(("grid", "count"), [((20,), 4), ((6, 8), 2), ((6, 8), (3, 4)), ((4, 4, 6), 2)])
def test_equals_the_two_matrix_product(grid: tuple[int, ...], count: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = recipes.build("agent", 12, 3, dims=len(grid), count=count).double()
    tokens = torch.Size(grid).numel()
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    inputs = layer._inputs(x, grid, None, None)
    q, k, v = inputs.q, inputs.k, inputs.v
    counts = count if isinstance(count, tuple) else (count,) * len(grid)
    # These counts divide the grid, so that agents are plain means of equal cells.
    cells = [t for n, c in zip(grid, counts, strict=True) for t in (c, n // c)]
    agents = q.reshape(2, 3, *cells, 4).mean([3 + 2 * a for a in range(len(grid))]).reshape(2, 3, -1, 4)
    gather = (agents @ k.mT / 2).softmax(-1)
    spread = (q @ agents.mT / 2).softmax(-1)
    image = v.transpose(2, 3).reshape(2, 12, *grid)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    assert layer.near is not None
    local = conv(image, layer.near.conv.weight, layer.near.conv.bias, padding=1, groups=12)
    want = spread @ gather @ v + local.reshape(2, 3, 4, tokens).transpose(2, 3)
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(want.transpose(1, 2).flatten(2)))
