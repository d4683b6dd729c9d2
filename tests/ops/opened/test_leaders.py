"""Who chooses: the same in a prefill, at sampled positions and from the ring of a decode."""

from __future__ import annotations

import pytest
import torch

from farfield.ops.cache import write_ring
from farfield.ops.opened.leaders import leader_of, leaders, leaders_at


@pytest.mark.parametrize(("share", "recent"), [(1, 0), (4, 0), (1, 1), (4, 32), (4, 6), (16, 8), (8, 5)])
@pytest.mark.parametrize("length", [1, 37, 64])
def test_three_ways(share: int, recent: int, length: int) -> None:
    queries = torch.randn(2, 3, length, 5, dtype=torch.float64)
    whole = leaders(queries.flatten(0, 1), share, recent)
    assert whole.shape == (6, -(-length // share), 5)
    ring = torch.zeros(2, 3, share + recent, 5, dtype=torch.float64)
    for at in range(length):
        write_ring(ring, queries[:, :, at : at + 1], at)
        torch.testing.assert_close(leader_of(ring, at, share, recent).flatten(0, 1), whole[:, at // share])
    some = torch.arange(0, length, 3)
    torch.testing.assert_close(leaders_at(queries.flatten(0, 1), some, share, recent), whole[:, some // share])


def test_padding_says_nothing() -> None:
    queries, valid = torch.randn(1, 24, 5), torch.arange(24)[None] >= 7
    padded = queries.masked_fill(~valid[..., None], torch.nan)
    found = leaders(padded, 4, 8, valid)[0]
    assert torch.equal(found[2], queries[0, 8] + (queries[0, 7] - queries[0, 8]) * 0.5)
    torch.testing.assert_close(found[3], (queries[0, 12] + queries[0, 7:12].mean(0)) / 2)
    assert not found[2:].isnan().any()
