"""s2a: scores of low rank, keys from a strided convolution, and the exact limit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from farfield import recipes


def test_scores_have_the_rank_and_the_limit_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    exact = recipes.build("s2a", 16, 2, dims=2, cell=1, rank=None).double()
    dense = recipes.build("dense", 16, 2, dims=2).double()
    dense.load_state_dict(exact.state_dict(), strict=False)
    torch.testing.assert_close(exact(x, grid=(7, 9)), dense(x, grid=(7, 9)))

    for rank in (1, 3):
        layer = recipes.build("s2a", 16, 2, dims=2, cell=(1, 3), rank=rank).double()
        inputs = layer._inputs(x, (7, 9), None, None)
        cells = 7 * 3
        inputs.v = torch.zeros_like(inputs.v)
        # One-hot values of cells, eight channels at a time, read the weights off.
        weights = []
        for first in range(0, cells, 8):
            for c in range(first, min(first + 8, cells)):
                row, column = c // 3, c % 3
                inputs.v[:, :, row * 9 + 3 * column : row * 9 + 3 * column + 3, c - first] = 1
            weights.append(layer.attend(inputs))
            inputs.v = torch.zeros_like(inputs.v)
        table = torch.cat(weights, -1)[..., :cells]
        torch.testing.assert_close(table.sum(-1), torch.ones_like(table[..., 0]))
        logits = table.log()
        logits = logits - logits[..., :1]  # a softmax forgets one number per row
        assert (torch.linalg.matrix_rank(logits, atol=1e-8) == rank).all()


def test_keys_and_values_are_a_strided_convolution() -> None:
    torch.manual_seed(0)
    layer = recipes.build("s2a", 16, 2, dims=2, cell=4, rank=3).double()
    far = layer.far
    assert far is not None
    for parameter in far.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 96, 16, dtype=torch.float64)
    inputs = layer._inputs(x, (8, 12), None, None)

    def conv(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        kernel = weight.permute(0, 3, 1, 2).reshape(16, 1, 4, 4) / 16
        planes = t.transpose(2, 3).reshape(2, 16, 8, 12)
        return F.conv2d(planes, kernel, stride=4, groups=16).reshape(2, 2, 8, 6).transpose(2, 3)

    keys, values = conv(inputs.k, far.key_weights.weight), conv(inputs.v, far.value_weights.weight)
    scores = (inputs.q @ far.query_map) @ (keys @ far.key_map).mT / 3**0.5
    want = scores.softmax(-1) @ values
    torch.testing.assert_close(layer(x, grid=(8, 12)), layer.proj(want.transpose(1, 2).flatten(2)))
