"""maxvit, davit and gcvit against timm's layers, where timm is installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from farfield import recipes
from farfield.attention import Attention
from support.torchvision_stub import timm as timm_or_skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm_or_skip()
    from timm.models import davit, gcvit, maxxvit


def _projections(layer: Attention, other: Any, skip: int = 0) -> None:
    """Takes over the weights of both projections; without those of queries when the other has none."""
    with torch.no_grad():
        layer.qkv.weight[skip:].copy_(other.qkv.weight)
        layer.qkv.bias[skip:].copy_(other.qkv.bias)
        layer.proj.weight.copy_(other.proj.weight)
        layer.proj.bias.copy_(other.proj.bias)


def _shaken(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


@pytest.mark.parametrize(("index", "kind"), [(0, "block"), (1, "grid")])
def test_maxvit(index: int, kind: str) -> None:
    settings = maxxvit.MaxxVitTransformerCfg(
        dim_head=8, window_size=(7, 7), grid_size=(7, 7), rel_pos_type="bias_tf", head_first=False
    )
    other = _shaken(maxxvit.PartitionAttentionCl(16, kind, settings))
    layer = recipes.build("maxvit", 16, 2, dims=2, layer=index, qkv_bias=True, proj_bias=True).double()
    _projections(layer, other.attn)
    assert layer.near is not None
    with torch.no_grad():
        layer.near.bias.table.copy_(other.attn.rel_pos.relative_position_bias_table.flatten(1))
    x = torch.randn(3, 14, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flatten(1, 2), grid=(14, 21)), other._partition_attn(x).flatten(1, 2))


def test_davit() -> None:
    other = _shaken(davit.ChannelAttentionV2(16, 4))
    layer = recipes.build("davit", 16, 4, dims=2, layer=1, qkv_bias=True, proj_bias=True).double()
    _projections(layer, other)
    x = torch.randn(3, 35, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, grid=(5, 7)), other(x))


def test_gcvit() -> None:
    """At batch 3, where older versions mixed up the images."""
    other = _shaken(gcvit.WindowAttentionGlobal(16, 2, (4, 4)))
    layer = recipes.build("gcvit", 16, 2, dims=2, size=4, layer=1, qkv_bias=True, proj_bias=True).double()
    _projections(layer, other, skip=16)
    assert layer.near is not None
    with torch.no_grad():
        # [offsets, heads] by query place - key place, here by key place - query place.
        layer.near.bias.table.copy_(other.rel_pos.relative_position_bias_table.T.flip(1))
    x = torch.randn(3, 8, 12, 16, dtype=torch.float64)
    inputs = layer._inputs(x.flatten(1, 2), (8, 12), None, None)
    shared = layer.near.queries(inputs).transpose(1, 2).flatten(2)
    windows = x.view(3, 2, 4, 3, 4, 16).transpose(2, 3).reshape(-1, 16, 16)
    want = other(windows, shared).view(3, 2, 3, 4, 4, 16).transpose(2, 3).reshape(3, 96, 16)
    torch.testing.assert_close(layer(x.flatten(1, 2), grid=(8, 12)), want)
