"""Partition as a part: tiles on any grid, their biases, what cannot be."""

from __future__ import annotations

import itertools

import pytest
import torch

from farfield import Attention
from farfield.merge import attend_dense
from farfield.near import Partition
from farfield.parts import Inputs, LayerSpec


def _inputs(grid: tuple[int, ...], masked: bool, causal: bool = False) -> Inputs:
    tokens = torch.Size(grid).numel()
    q, k, v = (torch.randn(2, h, tokens, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    mask = torch.rand(2, tokens) < 0.5 if masked else None
    return Inputs(q=q, k=k, v=v, x=q[:, 0], grid=grid, scale=0.5, key_mask=mask, causal=causal)


def _tile(i: int, n: int, size: int, shift: int, spread: bool) -> tuple[int, int]:
    """The tile of token i on an axis of n, and its place in the tile."""
    size = min(size, n)
    if spread:
        step = -(-n // size)
        return i % step, i // step
    return ((i - shift) // size, (i - shift) % size) if n > size else (0, i)


CASES = [
    ((23,), 5, 0, False), ((23,), 5, 2, False), ((23,), 5, 0, True), ((13, 7), 4, 3, False),
    ((7, 11), (3, 20), 0, True), ((9, 5), (3, 5), (1, 2), False), ((4, 5, 7), 3, 1, False), ((4, 5, 7), 2, 0, True),
    ((1, 2), 3, 1, False),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size", "shift", "spread"), CASES)
def test_equals_one_masked_softmax(
    grid: tuple[int, ...], size: int | tuple[int, ...], shift: int | tuple[int, ...], spread: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    dims = len(grid)
    sizes = size if isinstance(size, tuple) else (size,) * dims
    shifts = shift if isinstance(shift, tuple) else (shift,) * dims
    inputs = _inputs(grid, masked)
    part = Partition(size, shift=shift, spread=spread, bias=True)
    module = part.build(LayerSpec(16, 4, 2, 4, dims=dims)).double()
    torch.nn.init.normal_(module.bias.table)
    table = module.bias.table.view(4, *(2 * s - 1 for s in sizes))
    axes = [[_tile(i, *rule, spread) for i in range(rule[0])] for rule in zip(grid, sizes, shifts, strict=True)]
    places = list(itertools.product(*axes))
    tokens = len(places)
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    ahead = torch.zeros(tokens, tokens, dims, dtype=torch.int64)
    for i, j in itertools.product(range(tokens), repeat=2):
        visible[i, j] = all(a[0] == b[0] for a, b in zip(places[i], places[j], strict=True))
        if visible[i, j]:
            ahead[i, j] = torch.tensor([b[1] - a[1] for a, b in zip(places[i], places[j], strict=True)])
    bias = table[(slice(None), *(ahead[..., a] + sizes[a] - 1 for a in range(dims)))]
    seen = visible if inputs.key_mask is None else visible & inputs.key_mask[:, None, None]
    want = attend_dense(inputs.q, inputs.k, inputs.v, scale=0.5, bias=bias, visible=seen)
    got = module(inputs)
    torch.testing.assert_close(tuple(got), tuple(want))
    torch.testing.assert_close(module.output(inputs), want.out)
    leaves = (inputs.q, inputs.k, inputs.v, module.bias.table)
    finite = want.lse > -torch.inf
    wanted = torch.autograd.grad(want.out.square().sum() + want.lse[finite].sum(), leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got.out.square().sum() + got.lse[finite].sum(), leaves), wanted)
    wanted = torch.autograd.grad(want.out.square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(module.output(inputs).square().sum(), leaves), wanted)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6, 23])
@pytest.mark.parametrize("shift", [0, 2])
def test_causal_tiles_see_themselves_and_what_came_before(shift: int, tokens: int) -> None:
    """A short sequence is cut where a longer one is: how long it will be is not known yet."""
    inputs = _inputs((tokens,), False, causal=True)
    module = Partition(5, shift=shift, bias=True).build(LayerSpec(16, 4, 2, 4, causal=True)).double()
    i = torch.arange(tokens)
    tile = (i - shift) // 5
    visible = (tile[:, None] == tile) & (i[:, None] >= i)
    bias = module.bias.table[:, (i - i[:, None]).clamp(-4, 4) + 4]
    want = attend_dense(inputs.q, inputs.k, inputs.v, scale=0.5, bias=bias, visible=visible)
    torch.testing.assert_close(tuple(module(inputs)), tuple(want))
    torch.testing.assert_close(module.output(inputs), want.out)


def test_dropout_drops_weights_in_training_only() -> None:
    layer = Attention(16, 4, near=Partition(4, bias=True), dropout=0.5)
    x = torch.randn(1, 11, 16)
    assert not torch.equal(layer(x), layer(x))
    mask = torch.ones(1, 11, dtype=torch.bool)
    assert not torch.equal(layer(x, key_mask=mask), layer(x, key_mask=mask))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x, key_mask=mask))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Partition(4, shift=4), r"shift=4 with size=4: give 0 to size - 1"),
        (Partition(4, shift=1, spread=True), "spread tiles have no boundary"),
        (Partition(4, shift=(1, 1)), r"shift=\(1, 1\) does not fit a 1-D grid"),
        (Partition(0), "size=0 does not fit a 1-D grid"),
    ],
)
def test_what_does_not_fit_is_refused(part: Partition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, 4, near=part)


def test_spread_tiles_are_not_causal() -> None:
    with pytest.raises(ValueError, match="spread=True takes its spacing from the length"):
        Attention(16, 4, causal=True, near=Partition(4, spread=True))
