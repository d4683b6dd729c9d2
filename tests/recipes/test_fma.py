"""fma: the layer is the operator, and exact in its limits."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes
from farfield.attention import Attention
from farfield.ops.multipole import multipole_attention


def _far(layer: Attention) -> torch.nn.Module:
    assert layer.fused and layer.far is not None
    return layer.far


@pytest.mark.parametrize("summary", ["shared", "mean", "pooled"])
@pytest.mark.parametrize(("grid", "causal"), [((90,), True), ((90,), False), ((9, 14), False), ((5, 6, 7), False)])
def test_equals_the_reference_engine(grid: tuple[int, ...], causal: bool, summary: str) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    layer = recipes.build("fma", 16, 4, num_kv_heads=2, causal=causal, dims=dims, block=4, rank=2, summary=summary)
    layer = layer.double()
    for parameter in _far(layer).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, torch.Size(grid).numel(), 16, dtype=torch.float64)
    mask = torch.rand(x.shape[:2]) < 0.8
    inputs = layer._inputs(x, grid, mask, None)
    far = _far(layer)
    want = multipole_attention(
        inputs.q, inputs.k, inputs.v, grid=grid, block=4, rank=2, causal=causal, key_mask=mask, summary=far.summary(),
        level_bias=far.biases(), impl="reference",
    )  # fmt: skip
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(layer(x, grid=grid, key_mask=mask), layer.proj(want.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("causal", [False, True])
def test_exact_limits(causal: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    dense = recipes.build("dense", 16, 4, causal=causal, rope=100.0).double()
    # Two blocks are all near; with a cell per token and one level the far field is exact as well.
    for options in ({"block": 16}, {"block": 8, "rank": 8, "summary": "mean", "bias": None}):
        layer = recipes.build("fma", 16, 4, causal=causal, rope=100.0, **options).double()
        layer.load_state_dict(dense.state_dict(), strict=False)
        torch.testing.assert_close(layer(x), dense(x))


def test_the_far_field_starts_quiet_and_is_needed_for_the_past() -> None:
    torch.manual_seed(0)
    layer = recipes.build("fma", 16, 4, causal=True, block=8, rank=2).double()
    blocks = recipes.build("blocks", 16, 4, causal=True, block=8).double()
    blocks.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(1, 200, 16, dtype=torch.float64)
    difference = (layer(x) - blocks(x)).abs().max() / blocks(x).abs().max()
    assert 0 < difference < 0.05
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:, -1].sum(), x)
    assert (grad.abs().sum((0, 2)) > 0).all()


def test_values_of_ones_give_ones() -> None:
    layer = recipes.build("fma", 16, 4, block=8, rank=2).double()
    x = torch.randn(1, 100, 16, dtype=torch.float64)
    inputs = layer._inputs(x, None, None, None)
    inputs.v = torch.ones_like(inputs.v)
    torch.testing.assert_close(_far(layer)(inputs).out, torch.ones_like(inputs.v))
