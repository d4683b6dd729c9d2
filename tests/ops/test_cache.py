"""Rings of recent tokens, and attention of a few queries."""

from __future__ import annotations

import pytest
import torch

from farfield.ops.cache import attend_few, grown, join_rows, read_ring, room_for, write_ring
from farfield.ops.state import AttentionState, attend_dense


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_ring_holds_the_last_tokens(size: int) -> None:
    x = torch.randn(2, 1, 40, 3)
    ring, done = torch.full((2, 1, size, 3), torch.nan), 0
    for piece in (1, 3, 1, 9, 2, 6, 1, 1, 16):
        write_ring(ring, x[:, :, done : done + piece], done)
        done += piece
        for count in range(min(size, done) + 1):
            assert torch.equal(read_ring(ring, done - count, done), x[:, :, done - count : done])


def test_growing_keeps_what_is_there() -> None:
    x = torch.randn(2, 1, 3, 2)
    bigger = grown(x, 5, fill=7.0)
    assert torch.equal(bigger[:, :, :3], x) and (bigger[:, :, 3:] == 7).all()
    assert grown(x, 2) is x


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("biased", ["no", "keys", "heads", "queries"])
def test_few_queries_equal_dense_attention(heads: int, tokens: int, biased: str) -> None:
    f64 = torch.float64
    q, (k, v) = torch.randn(2, heads, tokens, 4, dtype=f64), torch.randn(2, 2, 2, 9, 4, dtype=f64)
    shape = {"no": None, "keys": (1, 9), "heads": (2, heads, 1, 9), "queries": (2, 1, tokens, 9)}[biased]
    bias = None if shape is None else torch.randn(shape, dtype=f64).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    if bias is not None:
        bias[..., 0] = 0.5
    want = attend_dense(q, k, v, scale=0.3, bias=bias)
    got = attend_few(q, k, v, scale=0.3, bias=bias, dtype=f64)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(attend_few(q, k, v, scale=0.3, bias=bias, dtype=f64, need_lse=False), want.out)


@pytest.mark.parametrize("keys", [0, 5])
def test_a_query_that_sees_nothing(keys: int) -> None:
    q, (k, v) = torch.randn(1, 2, 1, 4), torch.randn(2, 1, 2, keys, 4)
    state = attend_few(q, k, v, scale=1.0, bias=torch.full((1, keys), -torch.inf), dtype=torch.float32)
    assert isinstance(state, AttentionState)
    assert (state.out == 0).all() and (state.lse == -torch.inf).all()


def test_rows_of_pieces_are_joined() -> None:
    a, b = (AttentionState(torch.randn(1, 2, n, 3), torch.randn(1, 2, n)) for n in (2, 4))
    joined = join_rows([a, b])
    assert isinstance(joined, AttentionState)
    assert torch.equal(joined.out, torch.cat((a.out, b.out), 2)) and torch.equal(
        joined.lse, torch.cat((a.lse, b.lse), 2)
    )
    assert join_rows([a]) is a
    outs = join_rows([a.out, b.out])
    assert isinstance(outs, torch.Tensor) and torch.equal(outs, joined.out)


def test_room_is_what_is_needed_or_a_quarter_more_than_there_is() -> None:
    assert [room_for(n, 0) for n in (1, 100)] == [1, 100]
    assert [room_for(n, 100) for n in (101, 125, 126)] == [125, 125, 126]
