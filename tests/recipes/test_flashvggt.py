"""flashvggt: full key frames and pooled frames in one softmax."""

from __future__ import annotations

import math

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "cell", "every"), [((5, 6, 8), 2, 2), ((4, 5, 7), 3, 3), ((3, 4, 4), 4, 200)])
def test_equals_one_softmax_over_key_frames_and_descriptors(
    grid: tuple[int, int, int], cell: int, every: int, masked: bool
) -> None:
    torch.manual_seed(0)
    tokens = math.prod(grid)
    layer = recipes.build("flashvggt", 8, 2, num_kv_heads=1, cell=cell, every=every).double()
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    mask = torch.rand(2, tokens) < 0.5 if masked else torch.ones(2, tokens, dtype=torch.bool)
    inputs = layer._inputs(x, grid, mask if masked else None, None)
    want = torch.empty_like(inputs.q)
    for b in range(2):
        k, v = (t[b, 0].view(*grid, 4) for t in (inputs.k, inputs.v))
        shown = mask[b].view(grid)
        keys, values = [k[::every][shown[::every]]], [v[::every][shown[::every]]]
        for frame in range(grid[0]):
            for y in range(0, grid[1], cell):
                for x_ in range(0, grid[2], cell):
                    part = (frame, slice(y, y + cell), slice(x_, x_ + cell))
                    if shown[part].any():
                        keys.append(k[part][shown[part]].mean(0, keepdim=True))
                        values.append(v[part][shown[part]].mean(0, keepdim=True))
        want[b] = (inputs.q[b] @ torch.cat(keys).T / 2).softmax(-1) @ torch.cat(values)
    got = layer(x, grid=grid, key_mask=mask if masked else None)
    torch.testing.assert_close(got, layer.proj(want.transpose(1, 2).flatten(2)))


def test_cells_of_one_token_are_full_attention() -> None:
    layer = recipes.build("flashvggt", 8, 2, cell=1, every=1).double()
    dense = recipes.build("dense", 8, 2, dims=3).double()
    dense.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    # Every token twice, as a key frame's and as its own cell's: the same weights.
    torch.testing.assert_close(layer(x, grid=(2, 4, 5)), dense(x, grid=(2, 4, 5)))
