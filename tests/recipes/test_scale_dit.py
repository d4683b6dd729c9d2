"""scale_dit: a window's own tokens and all of a low-resolution copy, in one softmax."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("reach", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size", "cell"), [((29,), 6, 4), ((9, 11), 4, 3), ((4, 7), 16, 2), ((5, 4, 6), 3, 2)])
def test_equals_one_softmax_over_window_and_low_resolution(
    grid: tuple[int, ...], size: int, cell: int, masked: bool, reach: int | None
) -> None:
    torch.manual_seed(0)
    tokens = math.prod(grid)
    layer = recipes.build("scale_dit", 8, 2, dims=len(grid), size=size, cell=cell, reach=reach).double()
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    mask = torch.rand(1, tokens) < 0.6 if masked else torch.ones(1, tokens, dtype=torch.bool)
    inputs = layer._inputs(x, grid, mask if masked else None, None)
    place = torch.tensor(list(itertools.product(*(range(n) for n in grid))))
    window, coarse = place // size, place // cell
    near = (window[:, None] == window[None]).all(-1) & mask
    cells = torch.unique(coarse[mask[0]], dim=0)
    member = (coarse[None] == cells[:, None]).all(-1) & mask
    mean = member.double() / member.sum(1, keepdim=True)
    far = torch.ones(tokens, len(cells), dtype=torch.bool)
    if reach is not None:
        far = ((coarse[:, None] - cells[None]).abs() <= reach).all(-1)
    k, v = (torch.cat((t, mean @ t), 2) for t in (inputs.k, inputs.v))
    scores = (inputs.q @ k.mT / 2).masked_fill(~torch.cat((near, far), 1), -torch.inf)
    want = scores.softmax(-1).nan_to_num(0.0) @ v
    got = layer(x, grid=grid, key_mask=mask if masked else None)
    torch.testing.assert_close(got, layer.proj(want.transpose(1, 2).flatten(2)))
