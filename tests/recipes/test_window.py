"""window is a softmax over the keys of the index rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farfield import recipes
from farfield.merge import attend_dense
from farfield.ops.window.reference import window_mask


@pytest.mark.parametrize(
    ("grid", "causal", "options"),
    [
        ((100,), True, {"block": 10}),
        ((100,), False, {"block": 10}),
        ((60,), True, {"size": 12, "stride": 4, "dilation": 2}),
        ((12, 9), False, {"size": (5, 4), "stride": (2, 4), "dilation": (2, 1)}),
        ((4, 5, 6), False, {"size": 3}),
    ],
)
def test_equals_the_index_rule(grid: tuple[int, ...], causal: bool, options: dict[str, Any]) -> None:
    dims = len(grid)
    layer = recipes.build("window", 8, 2, causal=causal, dims=dims, **options).double()
    tokens = torch.Size(grid).numel()
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    default = options.get("block", 0) * 3 // (2 if causal else 1)
    rule = [options.get(n, d) for n, d in (("size", default), ("stride", 1), ("dilation", 1))]
    size, stride, dilation = (r if isinstance(r, tuple) else (r,) * dims for r in rule)
    inputs = layer._inputs(x, grid, None, None)
    mask = window_mask(grid, size, stride, dilation, (causal,) * dims)
    want = attend_dense(inputs.q, inputs.k, inputs.v, scale=0.5, visible=mask).out
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(want.transpose(1, 2).flatten(2)))


def test_the_whole_axis_is_dense_attention() -> None:
    torch.manual_seed(0)
    narrow = recipes.build("window", 8, 2, causal=True, rope=100.0)
    dense = recipes.build("dense", 8, 2, causal=True, rope=100.0)
    dense.load_state_dict(narrow.state_dict())
    x = torch.randn(2, 96, 8)
    torch.testing.assert_close(narrow(x), dense(x))
