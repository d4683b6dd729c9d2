"""Agent tokens: rank, row sums, masks."""

from __future__ import annotations

import torch

from farfield.far.landmarks import Landmarks, pool_tokens
from farfield.parts import Inputs, LayerSpec


def _matrix(count: int, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, tokens, 3, dtype=torch.float64), torch.randn(1, 1, tokens, 3, dtype=torch.float64)
    eye = torch.eye(tokens, dtype=torch.float64)[None, None]
    module = Landmarks(count).build(LayerSpec(3, 1, 1, 3))
    weights = module.forward(Inputs(q=q, k=k, v=eye, x=q[:, 0], grid=(tokens,), scale=1.0, key_mask=mask)).out
    return weights[0, 0]


def test_rows_sum_to_one_and_the_rank_is_that_of_the_agents() -> None:
    for count in (1, 3, 8, 20):
        weights = _matrix(count, 15)
        torch.testing.assert_close(weights.sum(1), torch.ones(15, dtype=torch.float64))
        assert torch.linalg.matrix_rank(weights) == min(count, 15)


def test_one_agent_gives_every_token_the_same() -> None:
    weights = _matrix(1, 9)
    torch.testing.assert_close(weights, weights[:1].expand(9, 9))


def test_hidden_tokens_have_no_weight() -> None:
    mask = torch.tensor([[True] * 5 + [False] * 10])
    weights = _matrix(4, 15, mask)
    assert not weights[:, 5:].any()
    torch.testing.assert_close(weights.sum(1), torch.ones(15, dtype=torch.float64))


def test_pooled_means_count_visible_tokens_only() -> None:
    x = torch.arange(12.0).view(1, 1, 12, 1)
    means, present = pool_tokens(x, (12,), (3,))
    assert means.flatten().tolist() == [1.5, 5.5, 9.5] and present is None
    mask = torch.tensor([[True, False, False, False] + [True] * 4 + [False] * 4])
    means, present = pool_tokens(x, (12,), (3,), mask)
    assert means.flatten().tolist() == [0.0, 5.5, 0.0]
    assert present is not None and present.flatten().tolist() == [True, True, False]
    grid, _ = pool_tokens(x, (3, 4), (1, 2))
    assert grid.flatten().tolist() == [4.5, 6.5]
    uneven, _ = pool_tokens(x[:, :, :5], (5,), (2,))  # tokens 0..2 and 2..4
    assert uneven.flatten().tolist() == [1.0, 3.0]


def test_what_is_not_pooled_may_hold_anything() -> None:
    x = torch.randn(1, 2, 9, 3, dtype=torch.float64)
    mask = torch.rand(1, 9) < 0.6
    spoilt = x.masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_()
    means, _ = pool_tokens(spoilt, (9,), (4,), mask)
    torch.testing.assert_close(means, pool_tokens(x, (9,), (4,), mask)[0])
    (grad,) = torch.autograd.grad(means.square().sum(), spoilt)
    assert torch.isfinite(grad).all()
