"""davit: channel attention is token attention of the transposed heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from farfield import recipes
from farfield.far import Channels
from farfield.near import Partition


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [(17,), (5, 7), (3, 4, 5)])
def test_equals_attention_over_transposed_heads(grid: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    layer = recipes.build("davit", 16, 4, num_kv_heads=2, dims=len(grid), layer=1).double()
    tokens = torch.Size(grid).numel()
    x = torch.randn(1, tokens, 16, dtype=torch.float64)
    mask = torch.rand(1, tokens) < 0.6 if masked else None
    inputs = layer._inputs(x, grid, mask, None)
    kept = torch.arange(tokens) if mask is None else mask[0].nonzero()[:, 0]
    q = inputs.q[:, :, kept].mT
    k, v = (t.repeat_interleave(2, 1) for t in (inputs.k[:, :, kept].mT, inputs.v.mT))
    # The scale of torch's attention is (length of the contracted axis) ** -0.5, here that of the visible tokens.
    weights = F.scaled_dot_product_attention(q, k, torch.eye(4, dtype=torch.float64).expand(1, 4, 4, 4))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    want = (weights @ v).mT
    torch.testing.assert_close(layer(x, grid=grid, key_mask=mask), layer.proj(want.transpose(1, 2).flatten(2)))


def test_any_order_of_the_tokens_gives_the_same() -> None:
    layer = recipes.build("davit", 16, 4, dims=2, layer=1).double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    order = torch.randperm(30)
    torch.testing.assert_close(layer(x[:, order], grid=(6, 5)), layer(x, grid=(5, 6))[:, order])


def test_one_channel_per_head_is_its_own_value() -> None:
    layer = recipes.build("davit", 6, 6, layer=1).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.proj(x @ layer.qkv.weight[12:].T))


def test_layers_alternate() -> None:
    assert recipes.build("davit", 16, 4, layer=2).near_spec == Partition(7)
    assert recipes.build("davit", 16, 4, layer=3).far_spec == Channels()
