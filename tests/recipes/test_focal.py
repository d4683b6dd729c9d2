"""focal: the tokens of window and ring, and the pooled windows around, in one softmax."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("grid", "size", "ring", "reach"), [((41,), 5, 2, 2), ((13, 18), 4, 1, 1), ((11, 7), 3, 1, 1), ((6, 5, 7), 2, 1, 1)]
)
def test_equals_one_softmax_over_ring_and_pooled_windows(
    grid: tuple[int, ...], size: int, ring: int, reach: int, masked: bool
) -> None:
    torch.manual_seed(0)
    dims, tokens = len(grid), math.prod(grid)
    layer = recipes.build("focal", 8, 2, dims=dims, size=size, ring=ring, reach=reach).double()
    far = layer.far
    assert far is not None
    for parameter in far.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    mask = torch.rand(1, tokens) < 0.6 if masked else None
    inputs = layer._inputs(x, grid, mask, None)
    places = list(itertools.product(*(range(n) for n in grid)))
    shown = [mask is None or bool(mask[0, i]) for i in range(tokens)]
    counts = [-(-n // size) for n in grid]
    cells = list(itertools.product(*(range(c) for c in counts)))
    keys, values = {}, {}
    for cell in cells:
        members = [
            i for i, p in enumerate(places) if shown[i] and all(a // size == c for a, c in zip(p, cell, strict=True))
        ]
        if not members:
            continue
        at = [tuple(a % size for a in places[i]) for i in members]
        for store, t, made in ((keys, inputs.k, far.key_weights), (values, inputs.v, far.value_weights)):
            store[cell] = sum(t[0, :, i] * made.weight[(slice(None), *a)] for i, a in zip(members, at, strict=True))
            store[cell] = store[cell] / len(members)
    bias = far.bias.view(2, *(2 * reach + 1,) * dims)
    want = torch.zeros_like(inputs.q)
    for i, place in enumerate(places):
        own = [a // size for a in place]
        spans = []
        for c, n in zip(own, grid, strict=True):
            side = min(size + 2 * ring, n)
            start = min(max(c * size - ring, 0), n - side)
            spans.append(range(start, start + side))
        near = [j for j, p in enumerate(places) if shown[j] and all(a in s for a, s in zip(p, spans, strict=True))]
        around = [c for c in keys if all(abs(a - b) <= reach for a, b in zip(c, own, strict=True))]
        k = torch.stack([inputs.k[0, :, j] for j in near] + [keys[c] for c in around], 1)
        v = torch.stack([inputs.v[0, :, j] for j in near] + [values[c] for c in around], 1)
        extra = [torch.zeros(2, dtype=torch.float64)] * len(near)
        extra += [bias[(slice(None), *(a - b + reach for a, b in zip(c, own, strict=True)))] for c in around]
        weights = (torch.einsum("hd,hmd->hm", inputs.q[0, :, i], k) / 2 + torch.stack(extra, 1)).softmax(-1)
        want[0, :, i] = torch.einsum("hm,hmd->hd", weights, v)
    torch.testing.assert_close(layer(x, grid=grid, key_mask=mask), layer.proj(want.transpose(1, 2).flatten(2)))


def test_causal_layers_see_all_of_the_past_in_reach() -> None:
    torch.manual_seed(0)
    layer = recipes.build("focal", 8, 2, causal=True, size=5, ring=2, reach=2).double()
    x = torch.randn(1, 43, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    for row in (0, 4, 17, 42):
        (grad,) = torch.autograd.grad(y[0, row].square().sum(), x, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0
        first = min(max(row // 5 - 2, 0) * 5, max(row - 6, 0))
        assert torch.equal(seen, (torch.arange(43) >= first) & (torch.arange(43) <= row))
