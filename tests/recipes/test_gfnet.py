"""gfnet: a product of spectra is a circular convolution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize(
    ("grid", "size"),
    [((16,), 16), ((17,), 17), ((21,), 8), ((5,), 8), ((6, 8), (6, 8)), ((7, 5), (7, 5)), ((9, 4), 5), ((3, 4, 5), 4)],
)
def test_equals_a_circular_convolution_written_out(grid: tuple[int, ...], size: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    layer = recipes.build("gfnet", 4, 2, dims=dims, size=size).double()
    far = layer.far
    assert far is not None
    torch.nn.init.normal_(far.filter)
    sizes = size if isinstance(size, tuple) else (size,) * dims
    kernel = torch.fft.irfftn(torch.view_as_complex(far.filter), s=sizes, dim=tuple(range(1, dims + 1)))
    x = torch.randn(1, math.prod(grid), 4, dtype=torch.float64)
    v = (x @ layer.qkv.weight[8:].T).view(*grid, 4)
    want = torch.zeros_like(v)
    for lags in itertools.product(*(range(-(s // 2), s - s // 2) for s in sizes)):
        taken = v.roll(lags, tuple(range(dims)))
        want += taken * kernel[(slice(None), *(lag % s for lag, s in zip(lags, sizes, strict=True)))]
    torch.testing.assert_close(layer(x, grid=grid), layer.proj(want.view(1, -1, 4)))
    if grid == sizes:
        # Exactly the paper's: both transforms orthonormal, the filter between them.
        axes = tuple(range(dims))
        made = torch.fft.rfftn(v, dim=axes, norm="ortho") * torch.view_as_complex(far.filter).movedim(0, -1)
        same = torch.fft.irfftn(made, s=grid, dim=axes, norm="ortho")
        torch.testing.assert_close(same, want)


def test_a_filter_of_ones_is_the_identity_and_rolls_commute() -> None:
    layer = recipes.build("gfnet", 4, 2, dims=2, size=6).double()
    x = torch.randn(1, 7, 9, 4, dtype=torch.float64)

    def run(t: torch.Tensor) -> torch.Tensor:
        return layer(t.reshape(1, -1, 4), grid=(7, 9)).view(t.shape)

    torch.testing.assert_close(run(x.roll((2, 5), (1, 2))), run(x).roll((2, 5), (1, 2)))
    assert layer.far is not None
    with torch.no_grad():
        layer.far.filter.copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(run(x), layer.proj(x @ layer.qkv.weight[8:].T))
