"""mano: a softmax per level, and the weights with which levels arrive."""

from __future__ import annotations

import math

import pytest
import torch

from farfield import recipes


def _groups(grid: tuple[int, ...], side: int) -> torch.Tensor:
    """[N, N] whether two tokens lie in one cell of that side."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(math.prod(grid), -1) // side
    return (place[:, None] == place[None]).all(-1)


@pytest.mark.parametrize(
    ("grid", "size", "rate", "levels"),
    [((32,), 4, 2, None), ((27,), 3, 3, None), ((16, 32), 4, 2, None), ((16,), 2, 2, 2)],
)
def test_equals_the_sum_of_explicit_levels(grid: tuple[int, ...], size: int, rate: int, levels: int | None) -> None:
    """Every level as an [N, N] matrix over tokens: means into cells, a softmax per window of cells, shares back."""
    torch.manual_seed(0)
    layer = recipes.build("mano", 8, 2, dims=len(grid), size=size, rate=rate, levels=levels, sampling="mean").double()
    tokens = math.prod(grid)
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    inputs = layer._inputs(x, grid, None, None)
    most = levels if levels is not None else math.ceil(math.log(max(grid) / size, rate))
    total, want = most, 0.0
    for level in range(total + 1):
        same = _groups(grid, rate**level).double()
        mean = same / same.sum(1, keepdim=True)
        q, k, v = (mean @ t for t in (inputs.q, inputs.k, inputs.v))
        window = _groups(grid, size * rate**level)
        # The tokens of a cell all carry its summary: equal columns, together as heavy as one cell.
        weights = (q @ k.mT / 2).masked_fill(~window, -torch.inf).softmax(-1)
        want = want + math.factorial(total - level) / math.factorial(total) * (weights @ v)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(want.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("grid", [(37,), (13, 17), (5, 7, 9)])
def test_constant_values_arrive_with_the_sum_of_all_factors(grid: tuple[int, ...]) -> None:
    layer = recipes.build("mano", 8, 2, dims=len(grid), size=3).double()  # learned sampling starts at means
    tokens = math.prod(grid)
    mask = torch.rand(1, tokens) < 0.7
    inputs = layer._inputs(torch.randn(1, tokens, 8, dtype=torch.float64), grid, mask, None)
    inputs.v = mask[:, None, :, None].expand_as(inputs.v).double()
    levels = 0
    while max(grid) > 3 * 2**levels:
        levels += 1
    factors = [math.factorial(levels - k) / math.factorial(levels) for k in range(levels + 1)]
    out = layer.attend(inputs).detach()
    # Where a window shows nothing its level is missing, on fine levels only.
    assert out.max() == pytest.approx(sum(factors))
    assert (out > factors[-1] - 1e-9).all()


def test_the_whole_image_is_seen() -> None:
    torch.manual_seed(0)
    layer = recipes.build("mano", 8, 2, dims=2, size=4).double()
    x = torch.randn(1, 23 * 19, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, grid=(23, 19))[0, 7].square().sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_one_window_is_full_attention() -> None:
    layer = recipes.build("mano", 8, 2, dims=2, sampling="mean").double()
    dense = recipes.build("dense", 8, 2, dims=2).double()
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, grid=(6, 5)), dense(x, grid=(6, 5)))
