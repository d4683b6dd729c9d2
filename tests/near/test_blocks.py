"""Blocks: exactly the tokens of the adjacent leaf blocks."""

from __future__ import annotations

import pytest
import torch

from farfield.merge import attend_dense
from farfield.near.blocks import Blocks
from farfield.parts import Inputs, LayerSpec


@pytest.mark.parametrize(
    ("grid", "block", "causal"),
    [((37,), 5, False), ((37,), 5, True), ((7, 9), (2, 3), False), ((3, 4, 5), 2, False)],
)
def test_the_state_is_a_softmax_over_adjacent_blocks(grid: tuple[int, ...], block: int, causal: bool) -> None:
    tokens = torch.Size(grid).numel()
    q, k, v = (torch.randn(1, 2, tokens, 4, dtype=torch.float64) for _ in range(3))
    spec = LayerSpec(8, 2, 2, 4, causal, len(grid))
    state = Blocks(block).build(spec)(Inputs(q=q, k=k, v=v, x=q[:, 0], grid=grid, causal=causal, scale=0.5))
    sides = torch.tensor(block if isinstance(block, tuple) else (block,) * len(grid))
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(tokens, -1) // sides
    seen = ((where[:, None] - where[None, :]).abs() <= 1).all(-1)
    if causal:
        seen = seen.tril()
    want = attend_dense(q, k, v, scale=0.5, visible=seen)
    torch.testing.assert_close(state.out, want.out)
    torch.testing.assert_close(state.lse, want.lse)
