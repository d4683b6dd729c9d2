"""na: the nearest neighbours, always as many."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes


def _nearest(length: int, size: int) -> torch.Tensor:
    """[length, length] which size tokens in a row lie nearest to each: the run that is most centred on it."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    size = min(size, length)
    for i in range(length):
        runs = range(length - size + 1)
        # An even run has no middle: the one that reaches further back is taken.
        first = min(runs, key=lambda a: (abs(a + (size - 1) / 2 - i), a))
        seen[i, first : first + size] = True
    return seen


@pytest.mark.parametrize(
    ("grid", "size"), [((23,), 7), ((23,), 4), ((9, 11), 5), ((7, 13), (3, 6)), ((5, 4, 7), 3), ((5, 6), 7)]
)
def test_every_query_reads_its_nearest_neighbours(grid: tuple[int, ...], size: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = recipes.build("na", 8, 2, dims=len(grid), size=size).double()
    tokens = torch.Size(grid).numel()
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    sizes = size if isinstance(size, tuple) else (size,) * len(grid)
    seen = torch.ones(1, 1, dtype=torch.bool)
    for length, of_axis in zip(grid, sizes, strict=True):
        seen = torch.kron(seen.int(), _nearest(length, of_axis).int()).bool()
    per_query = torch.tensor([min(n, s) for n, s in zip(grid, sizes, strict=True)]).prod()
    assert (seen.sum(1) == per_query).all()
    q, k, v = (t.view(2, tokens, 2, 4).transpose(1, 2) for t in (x @ layer.qkv.weight.T).chunk(3, -1))
    weights = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1)
    want = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=grid), want)


def test_a_window_over_the_image_is_full_attention() -> None:
    layer = recipes.build("na", 16, 4, dims=2, size=(6, 9)).double()
    dense = recipes.build("dense", 16, 4, dims=2).double()
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(1, 42, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, grid=(6, 7)), dense(x, grid=(6, 7)))
