"""mano: a softmax per level, and the weights with which levels arrive."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


def _windows(grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """[N, N] whether a query sees a key: blocks of `size` cells, the last of an axis moved inside."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for length, side in zip(grid, size, strict=True):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            start = max(0, min(i // side * side, length - side))
            axis[i, start : start + side] = True
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return seen


def _down(x: Tensor, weight: Tensor, grid: tuple[int, int], rate: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """[B, H, N, D] to coarser cells by a grouped convolution with stride; a cell divides by the tokens that it has."""
    image = x.mT.flatten(1, 2).unflatten(2, grid)
    spare = (0, -grid[1] % rate[1], 0, -grid[0] % rate[0])
    kernel = weight.movedim(-1, 1).flatten(0, 1)[:, None]
    total = F.conv2d(F.pad(image, spare), kernel, stride=rate, groups=image.shape[1])
    count = F.conv2d(F.pad(torch.ones_like(image[:1, :1]), spare), torch.ones_like(kernel[:1]), stride=rate)
    coarse = total / count
    return coarse.flatten(2).unflatten(1, (x.shape[1], -1)).mT, (coarse.shape[2], coarse.shape[3])


def _up(x: Tensor, weight: Tensor, coarse: tuple[int, int], fine: tuple[int, int], rate: tuple[int, int]) -> Tensor:
    """The way back by a grouped transposed convolution, cut to the finer grid."""
    image = x.mT.flatten(1, 2).unflatten(2, coarse)
    kernel = weight.movedim(-1, 1).flatten(0, 1)[:, None]
    spread = F.conv_transpose2d(image, kernel, stride=rate, groups=image.shape[1])[..., : fine[0], : fine[1]]
    return spread.flatten(2).unflatten(1, (x.shape[1], -1)).mT


@pytest.mark.parametrize(
    ("grid", "size", "rate"),
    [((16, 12), (4, 4), (2, 2)), ((13, 9), (3, 3), (2, 2)), ((11, 14), (3, 2), (2, 3)), ((5, 20), (4, 4), (3, 2))],
)
def test_learned_sampling_equals_strided_convolutions(
    grid: tuple[int, int], size: tuple[int, int], rate: tuple[int, int]
) -> None:
    """The default: every level by convolutions with random kernels, a softmax per window as a matrix, the way back."""
    torch.manual_seed(0)
    layer = recipes.build("mano", 16, 4, num_kv_heads=2, dims=2, size=size, rate=rate).double()
    assert layer.far_spec is not None and layer.far is not None
    assert layer.far_spec.sampling == "learned"
    for cells in (*layer.far.down, layer.far.up):
        torch.nn.init.normal_(cells.weight)
    x = torch.randn(2, math.prod(grid), 16, dtype=torch.float64)
    inputs = layer._inputs(x, grid, None, None)
    q, k, v = inputs.q, inputs.k, inputs.v
    grids, outs = [grid], []
    while True:
        keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = (q @ keys.mT / 2).masked_fill(~_windows(grids[-1], size), -torch.inf)
        outs.append(scores.softmax(-1) @ values)
        here = grids[-1]
        if here[0] <= size[0] and here[1] <= size[1]:
            break
        downs = [_down(t, cells.weight, here, rate) for t, cells in zip((q, k, v), layer.far.down, strict=True)]
        q, k, v = (t for t, _ in downs)
        grids.append(downs[0][1])
    assert len(outs) > 2
    total = outs[-1]
    for level in range(len(outs) - 2, -1, -1):
        fading = len(outs) - 1 - level
        total = outs[level] + _up(total, layer.far.up.weight, grids[level + 1], grids[level], rate) / fading
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(total.transpose(1, 2).flatten(2)))


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
