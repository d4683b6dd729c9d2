"""inline: the matrix of weights written out, and the kernel that the mean token makes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from farfield import recipes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [(19,), (5, 7), (3, 4, 5)])
def test_equals_the_explicit_matrix_with_rows_of_sum_one(grid: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    dims, tokens = len(grid), math.prod(grid)
    layer = recipes.build("inline", 16, 4, num_kv_heads=2, dims=dims).double()
    x = 3 * torch.randn(1, tokens, 16, dtype=torch.float64)
    mask = torch.rand(1, tokens) < 0.6 if masked else torch.ones(1, tokens, dtype=torch.bool)
    inputs = layer._inputs(x, grid, mask if masked else None, None)
    count = int(mask.sum())
    k, v = (t.repeat_interleave(2, 1) for t in (inputs.k, inputs.v))
    scores = (inputs.q @ k.mT / 2).masked_fill(~mask, 0.0)
    weights = ((scores - scores.sum(-1, keepdim=True) / count + 1) / count).masked_fill(~mask, 0.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights < 0).any()  # no softmax could
    near = layer.near
    assert near is not None
    # Two linear maps per head, from the mean of the visible tokens to a kernel per channel.
    mean = x[0, mask[0]].mean(0).view(2, 8)
    inner = torch.einsum("hoi,hi->ho", near.inner.weight.view(2, 8 // 2, 8), mean) + near.inner.bias.view(2, -1)
    outer = torch.einsum("hoi,hi->ho", near.outer.weight.view(2, -1, 4), F.gelu(inner)) + near.outer.bias.view(2, -1)
    kernel = outer.view(4 // 2, 4, *(3,) * dims)
    local = torch.zeros_like(inputs.v)
    place = list(itertools.product(*(range(n) for n in grid)))
    number = {p: i for i, p in enumerate(place)}
    for i, p in enumerate(place):
        for step in itertools.product((-1, 0, 1), repeat=dims):
            j = number.get(tuple(a + s for a, s in zip(p, step, strict=True)))
            if j is not None:
                local[0, :, i] += kernel[(..., *(s + 1 for s in step))] * inputs.v[0, :, j]
    want = weights @ v + local.repeat_interleave(2, 1)
    got = layer(x, grid=grid, key_mask=mask if masked else None)
    torch.testing.assert_close(got, layer.proj(want.transpose(1, 2).flatten(2)))


def test_different_queries_have_different_rows() -> None:
    """What a division by the sum loses: with relu features, a query and its double read the same."""
    torch.manual_seed(0)
    from farfield.far.linear import centred_attention, linear_attention

    k = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    q = torch.randn(1, 1, 1, 4, dtype=torch.float64).abs()
    both = torch.cat((q, 2 * q), 2)
    both = F.pad(both, (0, 0, 0, 7))
    eye = torch.eye(9, dtype=torch.float64)[None, None]
    centred = centred_attention(both, k, eye, scale=0.5)[0, 0]
    divided = linear_attention(both, k.relu(), eye)[0, 0]
    torch.testing.assert_close(divided[0], divided[1])
    assert (centred[0] - centred[1]).abs().max() > 0.01
