"""blocks is fma without its far field."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("causal", [False, True])
def test_sees_exactly_the_adjacent_blocks(causal: bool) -> None:
    layer = recipes.build("blocks", 8, 2, causal=causal, block=5).double()
    x = torch.randn(1, 43, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    for row in range(43):
        (grad,) = torch.autograd.grad(y[:, row].sum(), x, retain_graph=True)
        read = grad.abs().sum((0, 2)) > 0
        first, last = max(row // 5 - 1, 0) * 5, min((row // 5 + 2) * 5, 43)
        index = torch.arange(43)
        assert torch.equal(read, (index >= first) & (index < (row + 1 if causal else last)))


def test_short_inputs_are_dense_attention() -> None:
    layer = recipes.build("blocks", 8, 2, causal=True, block=16, rope=100.0)
    dense = recipes.build("dense", 8, 2, causal=True, rope=100.0)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 8)
    torch.testing.assert_close(layer(x), dense(x))
