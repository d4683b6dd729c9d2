"""dina: a dilated window is a window over every dilation-th token."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes
from farfield.near import Window


@pytest.mark.parametrize(
    ("grid", "size", "dilation"),
    [((31,), 5, None), ((31,), 4, 3), ((14, 9), 3, None), ((9, 11), (2, 3), (3, 2)), ((6, 7, 8), 3, None)],
)
def test_equals_neighborhood_attention_of_every_residue(
    grid: tuple[int, ...], size: int | tuple[int, ...], dilation: int | tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    layer = recipes.build("dina", 8, 2, dims=dims, size=size, dilation=dilation, layer=1).double()
    local = recipes.build("dina", 8, 2, dims=dims, size=size, layer=0).double()
    assert local.near_spec == Window(size)
    local.load_state_dict(layer.state_dict())
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    sizes = size if isinstance(size, tuple) else (size,) * dims
    if dilation is None:
        steps = tuple(n // s for n, s in zip(grid, sizes, strict=True))
    else:
        steps = dilation if isinstance(dilation, tuple) else (dilation,) * dims
    want = torch.empty_like(x)
    for residue in torch.cartesian_prod(*(torch.arange(s) for s in steps)).view(-1, dims).tolist():
        part = (slice(None), *(slice(r, None, s) for r, s in zip(residue, steps, strict=True)))
        piece = x[part]
        want[part] = local(piece.reshape(2, -1, 8), grid=piece.shape[1:-1]).view(piece.shape)
    torch.testing.assert_close(layer(x.reshape(2, -1, 8), grid=grid).view(x.shape), want)


def test_a_local_and_a_dilated_layer_see_the_whole_image() -> None:
    torch.manual_seed(0)
    local, wide = (recipes.build("dina", 8, 2, dims=2, size=5, layer=i).double() for i in (0, 1))
    x = torch.randn(1, 15 * 10, 8, dtype=torch.float64, requires_grad=True)
    y = wide(local(x, grid=(15, 10)), grid=(15, 10))
    for row in (0, 77, 149):
        (grad,) = torch.autograd.grad(y[0, row].square().sum(), x, retain_graph=True)
        assert (grad.abs().sum(-1) > 0).all()


def test_two_causal_layers_leave_no_gap() -> None:
    torch.manual_seed(0)
    local, wide = (recipes.build("dina", 8, 2, causal=True, size=5, layer=i).double() for i in (0, 1))
    assert wide.near_spec == Window(5, dilation=5)
    x = torch.randn(1, 60, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(wide(local(x))[0, -1].square().sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    assert torch.equal(seen, torch.arange(60) >= 60 - 25)


def test_the_widest_dilation_is_refused_in_a_causal_layer_and_fits_every_packed_segment() -> None:
    from farfield import Attention

    with pytest.raises(ValueError, match=r"not causal-safe: dilation=None takes it from the length"):
        Attention(8, 2, causal=True, near=Window(3, dilation=None))
    layer = Attention(8, 2, near=Window(3, dilation=None)).double()
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    packed = layer(x, cu_seqlens=torch.tensor([0, 2, 13, 30]))
    torch.testing.assert_close(packed, torch.cat([layer(x[:, a:b]) for a, b in ((0, 2), (2, 13), (13, 30))], 1))
