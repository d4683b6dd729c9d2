"""gna: between sliding windows and blocks."""

from __future__ import annotations

import math

import pytest
import torch

from farfield import recipes


def _weights(
    grid: tuple[int, ...], size: int | tuple[int, ...], stride: int | tuple[int, ...], causal: bool = False
) -> torch.Tensor:
    """[N, N] weights of a layer with random queries and keys."""
    torch.manual_seed(0)
    tokens = math.prod(grid)
    layer = recipes.build("gna", 8, 1, dims=len(grid), size=size, stride=stride, causal=causal).double()
    inputs = layer._inputs(torch.randn(1, tokens, 8, dtype=torch.float64), grid, None, None)
    inputs.v = torch.eye(tokens, dtype=torch.float64)[None, None]
    inputs.q, inputs.k = (torch.nn.functional.pad(t, (0, tokens - 8)) for t in (inputs.q, inputs.k))
    return layer.attend(inputs)[0, 0]


# Keys of the queries of every group, written down: (length, size, stride, causal), then per query first and last key.
# The middle query of a group leads (of an even one the later of the two), its window stops at the borders, and an even
# window has one more key before it; causal the last query leads, and every query ends at itself.
SPANS = [
    (12, 5, 3, False, [(0, 4)] * 3 + [(2, 6)] * 3 + [(5, 9)] * 3 + [(7, 11)] * 3),
    (12, 5, 2, False, [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 2 + [(5, 9)] * 2 + [(7, 11)] * 4),
    (11, 6, 4, False, [(0, 5)] * 4 + [(3, 8)] * 4 + [(5, 10)] * 3),
    (10, 4, 3, False, [(0, 3)] * 3 + [(2, 5)] * 3 + [(5, 8)] * 3 + [(6, 9)]),
    (9, 4, 2, False, [(0, 3)] * 2 + [(1, 4)] * 2 + [(3, 6)] * 2 + [(5, 8)] * 3),
    (10, 4, 3, True, [(0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8), (6, 9)]),
    (8, 5, 2, True, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (3, 6), (3, 7)]),
]


def _runs(length: int, spans: list[tuple[int, int]]) -> torch.Tensor:
    """[length, length] the keys from the first to the last of every query."""
    place = torch.arange(length)
    first, last = torch.tensor(spans).T
    return (place >= first[:, None]) & (place <= last[:, None])


@pytest.mark.parametrize(("length", "size", "stride", "causal", "spans"), SPANS)
def test_every_group_reads_the_keys_of_its_leader(
    length: int, size: int, stride: int, causal: bool, spans: list[tuple[int, int]]
) -> None:
    assert 1 < stride < size
    assert torch.equal(_weights((length,), size, stride, causal) > 0, _runs(length, spans))


def test_on_a_grid_every_axis_has_its_own_groups() -> None:
    (rows, tall, down, _, first), (columns, wide, right, _, second) = SPANS[0], SPANS[3]
    seen = _weights((rows, columns), (tall, wide), (down, right)) > 0
    assert torch.equal(seen, torch.kron(_runs(rows, first).int(), _runs(columns, second).int()) > 0)


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
