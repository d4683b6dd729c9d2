"""l2vit: the floored linear attention and the window beside it."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_equals_the_explicit_floored_matrix(size: float) -> None:
    torch.manual_seed(0)
    layer = recipes.build("l2vit", 16, 4, dims=2, layer=1).double()
    assert layer.far is not None
    torch.testing.assert_close(layer.far.tau, torch.full((4,), 0.5, dtype=torch.float64))
    torch.nn.init.uniform_(layer.far.tau)
    x = size * torch.randn(2, 42, 16, dtype=torch.float64)
    inputs = layer._inputs(x, (6, 7), None, None)
    weights = inputs.q.relu() @ inputs.k.relu().mT
    mass = weights.sum(-1, keepdim=True)
    assert (mass > 100).any() == (size > 1)
    want = layer.far.tau[:, None, None] * ((weights / mass.clamp(min=100)) @ inputs.v)
    torch.testing.assert_close(layer(x, grid=(6, 7)), layer.proj(want.transpose(1, 2).flatten(2)))
    # With constant values: tau * V * min(1, mass / 100).
    inputs.v = torch.ones_like(inputs.v)
    share = layer.far.tau[:, None, None] * (mass / 100).clamp(max=1)
    torch.testing.assert_close(layer.far(inputs), share.expand_as(inputs.v))


def test_a_window_over_the_image_is_full_attention() -> None:
    layer = recipes.build("l2vit", 16, 4, dims=2, layer=0, window=8).double()
    dense = recipes.build("dense", 16, 4, dims=2).double()
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(1, 42, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, grid=(6, 7)), dense(x, grid=(6, 7)))
