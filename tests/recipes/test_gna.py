"""gna: between sliding windows and blocks."""

from __future__ import annotations

import math

import pytest
import torch

from farfield import recipes


def _weights(grid: tuple[int, ...], size: int, stride: int) -> torch.Tensor:
    """[N, N] weights of a layer with random queries and keys."""
    torch.manual_seed(0)
    tokens = math.prod(grid)
    layer = recipes.build("gna", 8, 1, dims=len(grid), size=size, stride=stride).double()
    inputs = layer._inputs(torch.randn(1, tokens, 8, dtype=torch.float64), grid, None, None)
    inputs.v = torch.eye(tokens, dtype=torch.float64)[None, None]
    inputs.q, inputs.k = (torch.nn.functional.pad(t, (0, tokens - 8)) for t in (inputs.q, inputs.k))
    return layer.attend(inputs)[0, 0]


@pytest.mark.parametrize(("grid", "size"), [((36,), 12), ((36,), 4), ((12, 8), 4)])
def test_the_stride_leads_from_sliding_to_blocked(grid: tuple[int, ...], size: int) -> None:
    tokens = math.prod(grid)
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(tokens, -1)
    for stride in range(1, size + 1):
        weights = _weights(grid, size, stride)
        torch.testing.assert_close(weights.sum(1), torch.ones(tokens, dtype=torch.float64))
        seen = weights > 0
        assert (seen.sum(1) == size ** len(grid)).all()
        group = coordinates // stride
        same = (group[:, None] == group[None]).all(-1)
        alike = (seen[:, None] == seen[None]).all(-1)
        assert alike[same].all()
        if stride == size:
            assert torch.equal(seen, same)
        if stride == 1:
            ahead = (coordinates[None] - coordinates[:, None]).abs().amax(-1)
            inner = ((coordinates >= size) & (coordinates < torch.tensor(grid) - size)).all(1)
            assert ((ahead <= size // 2) | ~seen)[inner].all()
