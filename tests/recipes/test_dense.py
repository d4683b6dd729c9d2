"""dense is softmax attention."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes


@pytest.mark.parametrize("causal", [False, True])
def test_equals_a_softmax_written_out(causal: bool) -> None:
    layer = recipes.build("dense", 12, 3, causal=causal).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (t.view(2, 9, 3, 4).transpose(1, 2) for t in (x @ layer.qkv.weight.T).chunk(3, -1))
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    want = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 12) @ layer.proj.weight.T
    torch.testing.assert_close(layer(x), want)
