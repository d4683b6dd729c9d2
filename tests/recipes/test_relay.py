"""relay: gather, exchange, hand out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size", "count"), [((23,), 5, 3), ((7, 9), 4, 2), ((3, 5), 8, 1), ((4, 3, 5), 2, 2)])
def test_equals_three_softmaxes_written_out(grid: tuple[int, ...], size: int, count: int, masked: bool) -> None:
    torch.manual_seed(0)
    tokens = math.prod(grid)
    layer = recipes.build("relay", 8, 2, dims=len(grid), size=size, count=count).double()
    far = layer.far
    assert far is not None
    for parameter in far.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    mask = torch.rand(1, tokens) < 0.4 if masked else None
    inputs = layer._inputs(x, grid, mask, None)
    tiles: dict[tuple[int, ...], list[int]] = {}
    for i, place in enumerate(itertools.product(*(range(n) for n in grid))):
        tiles.setdefault(tuple(a // size for a in place), []).append(i)
    want = torch.zeros_like(inputs.q)
    for h in range(2):
        q, k, v = (t[0, h] for t in (inputs.q, inputs.k, inputs.v))
        asks, answers, holds = [], [], []
        shown = [[i for i in tile if mask is None or mask[0, i]] for tile in tiles.values()]
        for members in shown:
            if members:
                ask = q[members].mean(0) + far.query_offset[h, 0]
                asks.append(ask)
                answers.append(k[members].mean(0) + far.key_offset[h, 0])
                holds.append((ask @ k[members].T / 2).softmax(-1) @ v[members])
        told = (torch.cat(asks) @ torch.cat(answers).T / 2).softmax(-1) @ torch.cat(holds)
        known = iter(zip(answers, told.split(count), strict=True))
        for tile, members in zip(tiles.values(), shown, strict=True):
            if not members:
                continue
            answer, said = next(known)
            keys, values = torch.cat((k[members], answer)), torch.cat((v[members], said))
            want[0, h, tile] = (q[tile] @ keys.T / 2).softmax(-1) @ values
    got = layer(x, grid=grid, key_mask=mask)
    torch.testing.assert_close(got, layer.proj(want.transpose(1, 2).flatten(2)))


def test_tiles_may_change_places() -> None:
    layer = recipes.build("relay", 8, 2, size=6).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    order = (torch.randperm(5)[:, None] * 6 + torch.arange(6)).flatten()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_one_relay_reaches_every_tile() -> None:
    torch.manual_seed(0)
    layer = recipes.build("relay", 8, 2, dims=2, size=4, count=1).double()
    x = torch.randn(1, 13 * 11, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, grid=(13, 11))[0, 3].square().sum(), x)
    assert (grad.abs().sum(-1) > 0).all()
