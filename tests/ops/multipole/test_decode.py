"""Rows of causal multipole attention equal those of the whole, at every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farfield import PooledSummary, SharedSummary, multipole_attention
from farfield.ops.multipole import multipole_rows

SHAPE = {"block": 4, "rank": 2}


def tensors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, n, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 6, dtype=torch.float64)
    return q, k, v


def options(n: int) -> list[dict[str, Any]]:
    mask = torch.rand(2, n) > 0.3
    shared = SharedSummary(*(torch.rand(2, 2, 6, dtype=torch.float64) for _ in range(4)))
    return [
        {},
        {"key_mask": mask, "count_bias": False, "scale": 0.3},
        {"sinks": 3, "level_bias": torch.randn(8, 4, dtype=torch.float64), "key_mask": mask},
        {"summary": shared, "sinks": 1},
        {"summary": PooledSummary(torch.randn(2, 6, dtype=torch.float64)), "key_mask": mask},
        {"part": "near"},
        {"part": "far", "sinks": 2},
    ]


@pytest.mark.parametrize("n", [*range(1, 36), 67, 130])
def test_rows_equal_the_prefill_at_every_length(n: int) -> None:
    q, k, v = tensors(n)
    for given in options(n):
        whole = multipole_attention(q, k, v, causal=True, **SHAPE, **given)
        for count in {1, min(n, 3), n}:
            rows = multipole_rows(q[:, :, n - count :], k, v, **SHAPE, **given)
            torch.testing.assert_close(rows, whole[:, :, n - count :], rtol=1e-10, atol=1e-12)


def test_fewer_levels_are_honoured() -> None:
    q, k, v = tensors(100)
    whole = multipole_attention(q, k, v, causal=True, levels=1, **SHAPE)
    torch.testing.assert_close(multipole_rows(q[:, :, 97:], k, v, levels=1, **SHAPE), whole[:, :, 97:])
    assert not torch.allclose(multipole_rows(q[:, :, 97:], k, v, **SHAPE), whole[:, :, 97:])


@pytest.mark.parametrize("n", [9, 33, 61])
def test_rows_may_lie_elsewhere_in_each_batch_entry(n: int) -> None:
    q, k, v = tensors(n)
    first = torch.tensor([n - 5, n // 2 - 1])
    some = torch.stack([q[b, :, i : i + 3] for b, i in enumerate(first.tolist())])
    for given in options(n):
        whole = multipole_attention(q, k, v, causal=True, **SHAPE, **given)
        expected = torch.stack([whole[b, :, i : i + 3] for b, i in enumerate(first.tolist())])
        rows = multipole_rows(some, k, v, first=first, **SHAPE, **given)
        torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


def test_later_keys_do_not_matter() -> None:
    q, k, v = tensors(50)
    rows = multipole_rows(q[:, :, 20:24], k, v, first=20, **SHAPE)
    k[:, :, 24:], v[:, :, 24:] = 7.0, -7.0
    assert torch.equal(multipole_rows(q[:, :, 20:24], k, v, first=20, **SHAPE), rows)


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = tensors(50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[:, [3, 30, 48]] = False
    clean = multipole_rows(q[:, :, 47:], k, v, key_mask=mask, sinks=4, **SHAPE)
    k[:, :, [3, 30, 48]], v[:, :, [3, 30, 48]] = torch.nan, torch.nan
    assert torch.equal(multipole_rows(q[:, :, 47:], k, v, key_mask=mask, sinks=4, **SHAPE), clean)


def test_low_precision_stays_within_twice_the_error_of_dense_attention() -> None:
    q, k, v = tensors(70)
    truth = multipole_attention(q, k, v, causal=True, **SHAPE)[:, :, 66:]
    low = multipole_rows(q[:, :, 66:].bfloat16(), k.bfloat16(), v.bfloat16(), **SHAPE)
    assert low.dtype == torch.bfloat16
    repeated = [x.bfloat16().repeat_interleave(2, 1) for x in (k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), *repeated, is_causal=True)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    assert (low - truth).abs().max() <= 2 * (dense - exact).abs().max()


def test_gradients_equal_those_of_the_prefill() -> None:
    inputs = [x.requires_grad_() for x in tensors(45)]
    weight = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    q, k, v = inputs
    whole = multipole_attention(q, k, v, causal=True, **SHAPE)[:, :, 42:]
    rows = multipole_rows(q[:, :, 42:], k, v, **SHAPE)
    expected = torch.autograd.grad((whole * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((rows * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_more_queries_than_keys_are_refused() -> None:
    q, k, v = tensors(8)
    with pytest.raises(ValueError, match="8 tokens, key 5"):
        multipole_rows(q, k[:, :, :5], v[:, :, :5], **SHAPE)
    with pytest.raises(ValueError, match="first=6 with 3 queries"):
        multipole_rows(q[:, :, :3], k, v, first=6, **SHAPE)
